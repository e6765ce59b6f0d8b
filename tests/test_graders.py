"""A table of answers as models write them, each with the verdict of a careful reader."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.choice_answers import DIGITS, LETTERS, find_choice, find_label
from envs.tasks.math import MathTask
from envs.tasks.math_answers import find_answer, same_value
from envs.tasks.multiple_choice import MultipleChoiceTask, multiple_choice_problem
from envs.tasks.quantities import read_quantity
from envs.tasks.task import SPLITS, Example, Task

TABLE = Path(__file__).parent / "data" / "graded_answers.jsonl"
ROWS = [json.loads(line) for line in TABLE.read_text(encoding="utf-8").splitlines()]


def row_id(row: dict[str, str]) -> str:
    return f"{row['task']} {row['gold']}: {row['answer'][:40]}"


def write(file: Path, row: object) -> str:
    file.write_text(json.dumps(row) + "\n")
    return str(file)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Task]:
    folder = tmp_path_factory.mktemp("tasks")
    choice = {"question": "?", "choices": ["x", "y"], "answer": 0}
    return {
        "choice": MultipleChoiceTask(path=write(folder / "choice.jsonl", choice)),
        "math": MathTask(path=write(folder / "math.jsonl", {"problem": "?", "solution": "\\boxed{1}"})),
        "arithmetic": ArithmeticTask(),
    }


@pytest.mark.parametrize("row", ROWS, ids=row_id)
def test_answers_are_judged_as_a_careful_reader_would(tasks: dict[str, Task], row: dict[str, Any]) -> None:
    labels = DIGITS if row["gold"] in DIGITS else LETTERS
    choices = dict(zip(labels, row.get("choices", ()), strict=False))
    prompt = "\n".join(["Which?", *(f"{label}. {choice}" for label, choice in choices.items())])
    example = Example("table", prompt, "a reference", row["gold"])
    assert tasks[row["task"]].is_correct(example, row["answer"]) == (row["verdict"] == "right"), row["remark"]
    if row["task"] == "choice":
        label = find_choice(row["answer"], choices)
        assert (label is None) == (row["verdict"] == "none"), (label, row["remark"])
    if row["task"] == "math":
        assert (find_answer(row["answer"]) is None) == (row["verdict"] == "none"), row["remark"]


def test_the_table_is_large_and_has_all_verdicts() -> None:
    verdicts = Counter(row["verdict"] for row in ROWS)
    assert len({(row["task"], row["gold"], row["answer"]) for row in ROWS}) == len(ROWS) >= 200
    assert verdicts["wrong"] + verdicts["none"] >= 70
    assert verdicts.keys() == {"right", "wrong", "none"}


# Rows in which A and E may be words ("a", "e.g.") are left out.
EXCHANGED = [
    row
    for row in ROWS
    if row["task"] == "choice" and row["gold"] in "BCD" and not re.search(r"\b[AaEe]\b", row["answer"])
]


@pytest.mark.parametrize("row", EXCHANGED, ids=row_id)
def test_the_labels_exchanged_the_answer_is_the_other_label(row: dict[str, str]) -> None:
    exchanged = re.sub(
        r"(?<![A-Za-z<])(?<!</)(?<!\w')[BCDbcd](?![A-Za-z]|'\w)",
        lambda match: match[0].translate(str.maketrans("BCDbcd", "CDBcdb")),
        row["answer"],
    )
    label = find_label(row["answer"])
    assert find_label(exchanged) == (label and {"B": "C", "C": "D", "D": "B"}.get(label, label))


def test_ten_choices_are_read_and_eleven_refused() -> None:
    row = {"question": "Which?", "choices": [f"choice {n}" for n in range(10)], "answer": 9}
    problem = multiple_choice_problem(row)
    assert "\nJ. choice 9\n" in problem.prompt
    assert (problem.reference, problem.answer) == ("Therefore, the answer is choice 9 (j).", "J")
    with pytest.raises(ValueError, match="11 choices; a question has at most 10, A to J"):
        multiple_choice_problem({**row, "choices": [f"choice {n}" for n in range(11)]})


def test_every_label_of_ten_is_its_tasks_right_answer(tmp_path: Path) -> None:
    for index, label in enumerate(LETTERS):
        row = {"question": "Which?", "choices": ["not this", "a", "(b)", "e.g. c", *"defghi"], "answer": index}
        task = MultipleChoiceTask(path=write(tmp_path / f"{label}.jsonl", row))
        (example,) = (example for split in SPLITS if task.size(split) for example in task.examples(split))
        assert task.is_correct(example, example.reference)
        assert task.is_correct(example, f"Answer: {label}")
        assert not task.is_correct(example, f"Answer: {LETTERS[index - 1]}")


@pytest.mark.parametrize("number", ["72", "-3", "1/2", "2.5", "1,000"])
@pytest.mark.parametrize(
    "form", ["{}", "${}", "**{}**", "{} dollars", "\\text{{{}}}", "x = {}", "{}.", "about {}", "{} kg"]
)
def test_what_stands_around_a_number_does_not_change_it(number: str, form: str) -> None:
    assert read_quantity(form.format(number)) == read_quantity(number)
    assert same_value(number, form.format(number))
    assert not same_value(number, form.format("7919"))


REPEATED = (
    "(A) or ",
    "(A)",
    "(A) (B) ",
    "B, ",
    "A is not ",
    "\\boxed{",
    "\\boxed{}",
    "\\text{",
    "#### ",
    "the answer is ",
    "answer is (A) ",
)
REPEATED += (
    "not (A) ",
    "*",
    "'",
    "$",
    " ",
    "{",
    "1,",
    "1 ",
    "answer = ",
    "####\n",
    "best option ",
    "or ",
    "####answer\n",
)


@pytest.mark.parametrize("part", REPEATED)
def test_reading_a_long_answer_takes_no_longer_than_it_is(part: str) -> None:
    def seconds(count: int) -> float:
        began = time.process_time()
        for read in (find_label, find_answer, read_quantity):
            read(part * count)
        return time.process_time() - began

    assert seconds(4000) < 5.0  # 28,000 characters took fifteen seconds where it was quadratic
