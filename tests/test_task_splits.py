"""Splits of every task: what is in them, that they share no prompt, and what an empty one does."""

from __future__ import annotations

import hashlib
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from envs.tasks.arithmetic import LEVELS, ArithmeticTask
from envs.tasks.math import MathTask
from envs.tasks.multiple_choice import MultipleChoiceTask
from envs.tasks.records import RecordTask
from envs.tasks.task import SPLITS, FirstExamples, Split, Task

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published router data is not beside the repository")
KINDS = ("+-", "*/", "+*", "-/")  # those of the changing pool


def write(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def sums(*numbers: int) -> list[dict[str, str]]:
    return [{"problem": f"What is {n} + 1?", "solution": f"It is \\boxed{{{n + 1}}}."} for n in numbers]


def choices(*numbers: int) -> list[dict[str, object]]:
    return [{"question": f"What is {n} + 1?", "choices": [f"{n}", f"{n + 1}"], "answer": 1} for n in numbers]


def prompts(task: Task, split: Split, count: int | None = None) -> list[str]:
    return [example.prompt for example in task.examples(split, count)] if task.size(split) != 0 else []


def check_law(*tasks: Task, count: int | None = None) -> None:
    """No prompt stands in two splits, of one task or of two; within one split of one task none stands twice."""
    by_split: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for task in tasks:
        for split in SPLITS:
            split_prompts = prompts(task, split, count)
            assert len(set(split_prompts)) == len(split_prompts), (task.name, split)
            by_split[split].update(split_prompts)
    for one, other in combinations(SPLITS, 2):
        assert not by_split[one] & by_split[other], (one, other)


# --- generated problems -----------------------------------------------------------------------------------------------


def test_no_generated_prompt_stands_in_two_splits() -> None:
    check_law(*map(ArithmeticTask, LEVELS), count=100)  # 900 problems
    check_law(*(ArithmeticTask(level, kind) for level in ("easy", "default") for kind in KINDS), count=10)


def test_kinds_of_problems_share_no_problems() -> None:
    tasks = [ArithmeticTask("easy"), ArithmeticTask(), *(ArithmeticTask(operations=kind) for kind in KINDS)]
    test_prompts = [prompt for task in tasks for prompt in prompts(task, "test", 25)]
    assert len(set(test_prompts)) == len(test_prompts)


def test_operations_make_the_problems_and_their_order_does_not() -> None:
    one, other = ArithmeticTask(operations="+-"), ArithmeticTask(operations="-+")
    assert prompts(one, "test", 20) == prompts(other, "test", 20)
    assert (one.name, one.example("test", 3).id) == ("arithmetic +-", "arithmetic/default +-/test/3")
    assert prompts(ArithmeticTask(operations="/*-+"), "test", 20) == prompts(ArithmeticTask(), "test", 20)
    for task in (one, ArithmeticTask(operations="*/")):
        signs = {sign for example in task.examples("test", 50) for sign in "+-*/" if f" {sign} " in example.reference}
        assert signs == set(task.operations)


@pytest.mark.parametrize(
    ("level", "digests"),
    [
        ("easy", ("a207e668ed80e815", "31fcacb98c9bb8a0", "66ab1dc88e21fc75")),
        ("default", ("233796ae7fd53a8d", "a95e569845511068", "8a50fb28e9f2a5a8")),
        ("hard", ("5a69a3d1ee27ae96", "df2ae953b4e706ab", "4a47ff7ddb0ab81d")),
    ],
)
def test_problems_of_all_operations_are_pinned_in_every_split(level: str, digests: tuple[str, ...]) -> None:
    # The embedded models and every figure rest on these problems.
    assert set(LEVELS) == {"easy", "default", "hard"}
    for split, digest in zip(SPLITS, digests, strict=True):
        examples = ArithmeticTask(level).examples(split, 300)
        content = "\x1f".join("\x1e".join([e.id, e.prompt, e.reference, e.answer]) for e in examples)
        assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest, split


# --- records ----------------------------------------------------------------------------------------------------------


@published
def test_no_published_prompt_stands_in_two_splits() -> None:
    gsm8k = DATA / "gsm8k_router_train.jsonl", DATA / "gsm8k_test.jsonl"
    commonsense = DATA / "commonsense_qa_router_train.jsonl", DATA / "commonsense_qa_test.jsonl"
    check_law(MathTask(path=str(gsm8k[0]), test_path=str(gsm8k[1])))
    check_law(MathTask(path=str(gsm8k[0])))
    check_law(MultipleChoiceTask(path=str(commonsense[0]), test_path=str(commonsense[1])))
    check_law(MultipleChoiceTask(path=str(commonsense[1])))


@pytest.mark.parametrize("kind", [MathTask, MultipleChoiceTask])
def test_records_that_repeat_within_and_across_files_stay_once(kind: type[RecordTask], tmp_path: Path) -> None:
    rows = sums if kind is MathTask else choices
    train = write(tmp_path / "train.jsonl", *rows(*range(100), *range(50, 150)))
    test = write(tmp_path / "test.jsonl", *rows(*range(140, 160), 141))
    alone, both = kind(path=train), kind(path=train, test_path=test)
    for task, total in ((alone, 150), (both, 160)):
        check_law(task)
        assert sum(task.size(split) or 0 for split in SPLITS) == total
    assert both.size("test") == 20


def test_what_is_left_out_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = sums(1, 2, 3, 2, 2)
    rows[3]["solution"] = "It is \\boxed{4}."
    task = MathTask(path=write(tmp_path / "a.jsonl", *rows), test_path=write(tmp_path / "b.jsonl", *sums(8, 9, 9)))
    assert (
        "a: left out 3 records whose prompts stand before them in the same split, 1 of them with another" in caplog.text
    )
    kept = [example for split in SPLITS if task.size(split) for example in task.examples(split)]
    assert sorted(example.answer for example in kept) == ["10", "2", "3", "4", "9"]


# --- empty splits -----------------------------------------------------------------------------------------------------


def test_an_empty_split_is_refused_by_name(tmp_path: Path) -> None:
    task = MathTask(path=write(tmp_path / "one.jsonl", *sums(1)), test_path=write(tmp_path / "t.jsonl", *sums(5, 6)))
    assert [task.size(split) for split in SPLITS] == [1, 0, 2]
    message = r"the validation split of task one is empty \(train has 1 and test has 2\): choose a split that has"
    for empty in (task, FirstExamples(task, 1)):
        for draw in (
            lambda empty=empty: empty.sample("validation", np.random.default_rng(0)),
            lambda empty=empty: empty.examples("validation"),
            lambda empty=empty: empty.examples("validation", 3),
        ):
            with pytest.raises(ValueError, match=message.replace("test has 2", f"test has {empty.size('test')}")):
                draw()
    assert task.sample("train", np.random.default_rng(0)).answer == "2"


def test_first_examples_that_start_past_the_end_of_a_split_are_refused_by_name(tmp_path: Path) -> None:
    task = MathTask(
        path=write(tmp_path / "a.jsonl", *sums(*range(50))), test_path=write(tmp_path / "t.jsonl", *sums(70))
    )
    first = FirstExamples(task, 3, start=20)
    with pytest.raises(ValueError, match=r"the test split of task a is empty .*train has 3 and validation has 0"):
        first.sample("test", np.random.default_rng(0))
