from __future__ import annotations

import hashlib
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import hydra
import numpy as np
import pytest
from hydra.errors import ConfigCompositionException

from envs.tasks.arithmetic import LEVELS, ArithmeticTask
from envs.tasks.choice_answers import find_label
from envs.tasks.math import MathTask, gsm8k_reference, math_problem
from envs.tasks.math_answers import find_answer, same_value
from envs.tasks.multiple_choice import MultipleChoiceTask, multiple_choice_problem
from envs.tasks.records import RecordTask, fill
from envs.tasks.task import SPLITS, Example, FirstExamples, Split, Task
from experiments.common.config import build, register_schemas

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published router data is not beside the repository")

# One literal record of each format.
GSM8K_RAW = {
    "question": "Ann has 3 boxes of 6 eggs. How many eggs?",
    "answer": "She has 3*6=<<3*6=18>>18 eggs.\n#### 18",
}
MATH_RAW = {
    "problem": "What is one half of $\\frac{2}{3}$?",
    "level": "Level 1",
    "type": "Prealgebra",
    "solution": "Half of \\boxed{\\text{it}} is $\\frac12\\cdot\\frac23 = \\boxed{\\frac{1}{3}}$.",
}
MATH_ROUTER = {"prompt": "Solve it, enclose in \\boxed{}: 2+2?", "cot": "2+2=4.\n\\boxed{4}", "answerKey": "4"}
CHOICE = {
    "question": "Where is a book?",
    "choices": {"label": ["A", "B", "C"], "text": ["a river", "a library", "an oven"]},
    "answerKey": "B",
}
CHOICE_ROUTER = CHOICE | {"prompt": "Where is a book?", "cot": "It is read. So, the answer is a library (b)."}
ARC_RAW = {
    "id": "Mercury_1",
    "question": "Which is a gas?",
    "choices": {"text": ["iron", "salt", "neon", "wood"], "label": ["1", "2", "3", "4"]},
    "answerKey": "3",
}
MMLU_PRO_RAW = {
    "question_id": 70,
    "question": "Which is the smallest?",
    "options": [f"{n} m" for n in range(1, 11)],
    "answer": "A",
    "answer_index": 0,
    "cot_content": "",
    "category": "physics",
    "src": "theoremQA",
}
MMLU_RAW = {
    "question": "Conditioning was studied by",
    "subject": "professional_psychology",
    "choices": ["Rogers", "Maslow", "Beck", "Pavlov"],
    "answer": 3,
}


def write(file: Path, *rows: object) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def math_rows(count: int, start: int = 0) -> list[dict[str, str]]:
    return [
        {"problem": f"What is {n} + 1?", "solution": f"It is \\boxed{{{n + 1}}}."} for n in range(start, start + count)
    ]


def all_examples(task: Task, count: int | None = None) -> list[Example]:
    return [example for split in SPLITS for example in task.examples(split, count)]


def prompts(task: Task, split: Split) -> set[str]:
    return {example.prompt for example in task.examples(split)} if task.size(split) else set()


# --- arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_arithmetic_judges_references_right_and_other_answers_wrong(level: str) -> None:
    task = ArithmeticTask(level)
    for example in all_examples(task, 300):
        assert task.is_correct(example, example.reference)
        wrong = re.sub(r"#### .*", f"#### {int(example.answer) + 1}", example.reference)
        assert not task.is_correct(example, wrong)
        assert not task.is_correct(example, example.reference.split("####")[0])
        assert task.is_correct(example, f"#### {int(example.answer) + 1}\n{example.reference}")


@pytest.mark.parametrize("level", LEVELS)
def test_arithmetic_splits_share_no_chain_of_equations(level: str) -> None:
    def chains(split: Split) -> set[str]:
        examples = ArithmeticTask(level).examples(split, 1000)
        return {"; ".join(re.findall(r"\d+ [-+*/] \d+ = \d+", example.reference)) for example in examples}

    found = {split: chains(split) for split in SPLITS}
    assert all(len(one) > 500 for one in found.values())
    for one, other in combinations(SPLITS, 2):
        assert not found[one] & found[other]


@pytest.mark.parametrize(
    ("level", "digest"), [("easy", "6dea36819f078a03"), ("default", "54b54ad7bdd83c66"), ("hard", "96f6d4375f1b03c6")]
)
def test_arithmetic_is_pinned(level: str, digest: str) -> None:
    # The embedded pair is trained on these very problems: a change of them is a new task.
    examples = all_examples(ArithmeticTask(level), 100)
    content = "".join(example.id + example.prompt + example.reference + example.answer for example in examples)
    assert hashlib.sha256(content.encode()).hexdigest()[:16] == digest


def test_arithmetic_example_depends_on_its_index_alone() -> None:
    task = ArithmeticTask()
    assert task.examples("test", 5, start=7) == [task.example("test", index) for index in range(7, 12)]
    assert task.example("test", 3) == ArithmeticTask().example("test", 3)
    assert task.example("test", 3) != task.example("train", 3)
    assert task.sample("train", np.random.default_rng(0)) == task.sample("train", np.random.default_rng(0))


def test_arithmetic_refuses() -> None:
    with pytest.raises(ValueError, match=r"unknown level 'esy'.*easy, default, hard"):
        ArithmeticTask("esy")
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, validation, test"):
        ArithmeticTask().example("dev", 0)
    with pytest.raises(ValueError, match="without end"):
        ArithmeticTask().examples("test")


# --- published data ---------------------------------------------------------------------------------------------------


@published
def test_gsm8k_judges_references_right_and_other_answers_wrong() -> None:
    task = MathTask(path=str(DATA / "gsm8k_router_train.jsonl"), test_path=str(DATA / "gsm8k_test.jsonl"), name="gsm8k")
    assert [task.size(split) for split in SPLITS] == [1690, 179, 1319]
    examples = all_examples(task)
    assert all(task.is_correct(example, example.reference) for example in examples)
    assert len({example.prompt for example in examples}) == len({example.id for example in examples}) == len(examples)
    # Test prompts are built; their wording is that of the published ones.
    wording = {tuple(re.split(r"(?<=Question: ).*(?=\nSolution: $)", e.prompt, flags=re.DOTALL)) for e in examples}
    assert len(wording) == 1
    for example in examples[::10]:
        value = int(example.answer.replace(",", ""))
        before, box, after = example.reference.rpartition(f"\\boxed{{{example.answer}}}")
        assert box
        assert task.is_correct(example, f"{before}\\boxed{{{value}.0}}{after}")
        assert not task.is_correct(example, f"{before}\\boxed{{{value + 1}}}{after}")
        assert not task.is_correct(example, f"{before}{value}{after}")
        # The prompt has an empty \boxed{}: it neither hides the answer nor is it one.
        assert task.is_correct(example, f"{example.reference} Always answer with \\boxed{{}}.")
        assert not task.is_correct(example, "I shall enclose it with \\boxed{}.")


@published
def test_commonsense_qa_judges_references_right_and_other_answers_wrong() -> None:
    task = MultipleChoiceTask(
        path=str(DATA / "commonsense_qa_router_train.jsonl"), test_path=str(DATA / "commonsense_qa_test.jsonl")
    )
    assert [task.size(split) for split in SPLITS] == [1854, 195, 1197]
    for example in all_examples(task):
        assert task.is_correct(example, example.reference)
        other = "ABCDE"[("ABCDE".index(example.answer) + 1) % 5]
        start, label, end = example.reference.rpartition(f"({example.answer.lower()})")
        assert label
        assert not task.is_correct(example, f"{start}({other.lower()}){end}")
        assert not task.is_correct(example, start)


@published
def test_built_prompts_and_references_are_those_of_the_published_rows() -> None:
    for line in (DATA / "commonsense_qa_router_train.jsonl").read_text().splitlines():
        row = json.loads(line)
        built = multiple_choice_problem({key: row[key] for key in ("question", "choices", "answerKey")})
        assert built.prompt == row["prompt"]
        assert built.reference == f"Therefore, the answer is {row['answer']} ({row['answerKey'].lower()})."
    row = json.loads((DATA / "gsm8k_router_train.jsonl").open().readline())
    question = row["prompt"].partition("Question: ")[2].removesuffix("\nSolution: ")
    assert math_problem({"problem": question, "solution": row["cot"]}).prompt == row["prompt"]


# --- formats ----------------------------------------------------------------------------------------------------------


def test_gsm8k_record() -> None:
    problem = math_problem(GSM8K_RAW)
    assert problem.prompt.endswith(
        "enclose your answer with \\boxed{}.\nQuestion: " + GSM8K_RAW["question"] + "\nSolution: "
    )
    assert problem.reference == "She has 3*6=18 eggs.\nThe final answer is: \\boxed{18}"
    assert problem.answer == "18"
    assert gsm8k_reference("#### -1,200") == "The final answer is: \\boxed{-1,200}"


def test_math_record() -> None:
    problem = math_problem(MATH_RAW, "Q: {question}\nA:")
    assert problem[:3] == ("Q: What is one half of $\\frac{2}{3}$?\nA:", MATH_RAW["solution"], "\\frac{1}{3}")


def test_math_router_record() -> None:
    assert math_problem(MATH_ROUTER)[:3] == (MATH_ROUTER["prompt"], MATH_ROUTER["cot"], "4")


def test_choice_records() -> None:
    built = multiple_choice_problem(CHOICE, "{question}\n{choices}\n")
    assert built.prompt == "Where is a book?\nA. a river\nB. a library\nC. an oven\n"
    assert built[1:3] == ("Therefore, the answer is a library (b).", "B")
    assert multiple_choice_problem(CHOICE_ROUTER)[:3] == (CHOICE_ROUTER["prompt"], CHOICE_ROUTER["cot"], "B")


def test_arc_record_keeps_its_digits() -> None:
    problem = multiple_choice_problem(ARC_RAW)
    assert "\n3. neon\n" in problem.prompt
    assert problem[1:3] == ("Therefore, the answer is neon (3).", "3")


def test_mmlu_record() -> None:
    problem = multiple_choice_problem(MMLU_RAW)
    assert "\nD. Pavlov\n" in problem.prompt
    assert problem[1:3] == ("Therefore, the answer is Pavlov (d).", "D")


def test_templates_fill_only_their_own_placeholders(tmp_path: Path) -> None:
    assert fill("\\boxed{} {question} {choices}", question="{choices}", choices="A") == "\\boxed{} {choices} A"
    with pytest.raises(ValueError, match=r"lacks \{question\}"):
        MathTask(path=write(tmp_path / "a.jsonl", MATH_RAW), template="Q: {problem}")
    with pytest.raises(ValueError, match=r"lacks \{choices\}"):
        MultipleChoiceTask(path=write(tmp_path / "b.jsonl", CHOICE), template="Q: {question}")


# --- answers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("so \\boxed{4}, no: \\boxed{5}.", "5"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("$\\boxed{\\left\\{ 1, 2 \\right\\}}$", "\\left\\{ 1, 2 \\right\\}"),
        ("\\boxed{ 7 } and \\boxed{}", "7"),
        ("\\boxed{6} and \\boxed{12", "6"),
        ("\\fbox{3}", "3"),
        ("\\boxed 18 eggs", "18"),
        ("#### 1\n#### 2 \n", "2"),
        ("#### 1 \\boxed{2}", "2"),
        ("####\n", None),
        ("\\boxed{}", None),
        ("it is \\boxed{", None),
        ("the answer is 18", None),
        ("", None),
    ],
)
def test_find_answer(response: str, answer: str | None) -> None:
    assert find_answer(response) == answer


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1,000", "1000"),
        ("1000", "1{,}000"),
        ("24,960", "24960.00"),
        ("18", "\\$18"),
        ("18", "$18$"),
        ("18", "18."),
        ("18", "18\\text{ dollars}"),
        ("50", "50\\%"),
        ("-7", "-7.0"),
        ("\\frac{1}{2}", "0.5"),
        ("0.5", "\\frac12"),
        ("\\frac{3}{4}", "3/4"),
        ("\\dfrac{6}{8}", "\\frac34"),
        ("x + 1", "1 + x"),
        ("\\text{east}", "east"),
        ("(1, 2)", "(1,2)"),
        ("2\\sqrt{2}", "\\sqrt{8}"),
        ("9^{99999}", "9^{99999}"),
    ],
)
def test_same_value(gold: str, answer: str) -> None:
    assert same_value(gold, answer)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1,234", "1"),
        ("18", "81"),
        ("18", "-18"),
        ("18", "180"),
        ("\\frac{1}{2}", "2"),
        ("(1, 2)", "(2, 1)"),
        ("x + 1", "x"),
        ("18", ""),
        ("18", "eighteen"),
        ("18", "}{\\frac"),
        ("18", "{" * 50),
        ("18", "1" * 5000),
    ],
)
def test_other_value(gold: str, answer: str) -> None:
    assert not same_value(gold, answer)


@pytest.mark.parametrize("answer", ["9^{9^{9}}", "10**10**10", "99999999!", "9!!!!", "(x + y + z)^{999}"])
def test_numbers_too_large_to_evaluate_are_wrong_at_once(answer: str) -> None:
    with ThreadPoolExecutor(1) as pool:  # no time limit there
        assert pool.submit(same_value, "18", answer).result(timeout=5) is False


def test_answers_are_checked_in_threads() -> None:
    cases = [(f"\\frac{{{n}}}{{4}}", str(n / 4 if n % 2 else n)) for n in range(1, 41)]
    same_value.cache_clear()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda case: same_value(*case), cases)) == [bool(n % 2) for n in range(1, 41)]


@pytest.mark.parametrize(
    ("response", "label"),
    [
        ("It is big. Therefore, the answer is a bank (c).", "C"),
        ("THE ANSWER IS BANK (C).", "C"),
        ("The answer is bank (a). No: the answer is river (b).", "B"),
        ("The answer is (B) because (A) is wrong.", "B"),
        ("The answer is river (b). Whether this answer is good?", "B"),
        ("The answer is both (a) and (b) (c).", "C"),
        ("The answer is C", "C"),
        ("the answer is c.", "C"),
        ("The answer is: **C**", "C"),
        ("The answer is C. sharing, not (A).", "C"),
        ("The answer is option D.", "D"),
        ("One could take lights (b).", "B"),
        ("(C)", "C"),
        ("the answer is a", None),  # cut off before "bank (c)"
        ("the answer is a bank", None),
        ("the answer is e.g. a bank", None),
        ("the answer is bad.", None),
        ("the answer is f(a)", None),
        ("the answer is bank (cab)", None),
        ("I like C", None),
        ("the answer is bank (x)", None),
        ("", None),
    ],
)
def test_find_label(response: str, label: str | None) -> None:
    assert find_label(response) == label


def test_digit_labels_are_told_from_letters(tmp_path: Path) -> None:
    task = MultipleChoiceTask(path=write(tmp_path / "arc.jsonl", ARC_RAW))
    example = next(example for split in SPLITS if task.size(split) for example in task.examples(split))
    assert task.is_correct(example, "The answer is neon (3).")
    assert not task.is_correct(example, "The answer is neon (c).")
    assert not task.is_correct(example, "The answer is 3.5 (4).")


# --- sources ----------------------------------------------------------------------------------------------------------


def test_one_file_gives_three_disjoint_splits(tmp_path: Path) -> None:
    rows = math_rows(400)
    task = MathTask(path=write(tmp_path / "sums.jsonl", *rows, *rows[:100]))
    sizes = [task.size(split) for split in SPLITS]
    assert sum(sizes) == 400
    assert 250 < sizes[0] < 350
    for one, other in combinations(SPLITS, 2):
        assert not prompts(task, one) & prompts(task, other)
    assert task.example("test", 1).id == "sums/test/1"
    assert all_examples(MathTask(path=str(tmp_path / "sums.jsonl"))) == all_examples(task)
    # A record keeps its split when others come and go.
    fewer = MathTask(path=write(tmp_path / "fewer.jsonl", *rows[::3]))
    assert all(prompts(fewer, split) <= prompts(task, split) for split in SPLITS)


def test_test_path_is_the_test_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, test = write(tmp_path / "train.jsonl", *math_rows(200)), write(tmp_path / "test.jsonl", *math_rows(20, 500))
    task = MathTask(path=train, test_path=test)
    assert [example.answer for example in task.examples("test")] == [str(n + 1) for n in range(500, 520)]
    assert task.size("train") + task.size("validation") == 200
    assert 5 < task.size("validation") < 40
    assert not caplog.records

    contaminated = MathTask(path=train, test_path=write(tmp_path / "test.jsonl", *math_rows(20, 190)))
    assert contaminated.size("test") == 20
    assert contaminated.size("train") + contaminated.size("validation") == 190
    assert "left out 10 train or validation records" in caplog.text


def test_index_past_the_end(tmp_path: Path) -> None:
    task = MathTask(path=write(tmp_path / "a.jsonl", *math_rows(50)), name="sums")
    for index in (-1, task.size("test")):
        with pytest.raises(IndexError, match=f"sums has {task.size('test')} test examples; there is no number {index}"):
            task.example("test", index)
    with pytest.raises(ValueError, match=r"unknown split 'dev'.*train, validation, test"):
        task.size("dev")
    with pytest.raises(ValueError, match="500 from 0 on were asked for"):
        task.examples("test", 500)


def test_blank_lines_and_a_byte_order_mark_are_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(MATH_RAW).encode() + b"\r\n\r\n" + json.dumps(GSM8K_RAW).encode())
    assert len([example for split in SPLITS for example in prompts(MathTask(path=str(file)), split)]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"problem": "x", ', r"bad\.jsonl:3: not JSON .*Correct or delete the line"),
        ('{"problem": "\xff"}', r"bad\.jsonl:3: not JSON .*utf-8"),
        ("[1, 2]", r"bad\.jsonl:3: a JSON list; each line must hold one JSON object"),
        ('{"problem": "x"}', r"bad\.jsonl:3: no reference among the fields problem; a math record has prompt"),
        ('{"solution": "\\\\boxed{1}"}', r"bad\.jsonl:3: no field 'question' among solution"),
        ('{"problem": " ", "solution": "\\\\boxed{1}"}', r"bad\.jsonl:3: field 'problem' is empty"),
        ('{"problem": null, "solution": "\\\\boxed{1}"}', r"bad\.jsonl:3: field 'problem' is a NoneType"),
        ('{"problem": "x", "solution": "It is 1."}', r"bad\.jsonl:3: an answerless example: no \\boxed\{\}"),
        ('{"problem": "x", "solution": "\\\\boxed{}"}', r"bad\.jsonl:3: an answerless example"),
        ('{"question": "x", "answer": "It is 1."}', r"bad\.jsonl:3: an answerless example: no ####"),
        ('{"prompt": "x", "cot": "\\\\boxed{1}"}', r"bad\.jsonl:3: no field 'answerKey' among prompt, cot"),
        (
            '{"prompt": "x", "cot": "\\\\boxed{1}", "answerKey": "2"}',
            r"bad\.jsonl:3: the answerKey is '2' .*answers '1'",
        ),
    ],
)
def test_bad_math_records_are_named_by_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    good = json.dumps(MATH_RAW)
    file.write_text(f"{good}\n{good}\n{line}\n{good}\n", encoding="latin-1")
    with pytest.raises(ValueError, match=message):
        MathTask(path=str(file))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choices": None}, "no choices among the fields"),
        ({"choices": {"label": ["A"], "text": ["x", "y"]}}, "1 labels for 2 choices"),
        ({"choices": {"label": None, "text": ["x", "y"]}}, "choices whose label is None"),
        ({"choices": {"label": ["A", "B"], "text": "xy"}}, "choices whose text is 'xy'"),
        ({"choices": {"label": ["A", "yes"], "text": ["x", "y"]}}, "the labels A, YES; a label is a letter"),
        ({"answerKey": ""}, "an answerless example.*test_split=validation"),
        ({"answerKey": "E"}, "an answerless example: its answer 'E' is none of A, B, C"),
        ({"cot": "The answer is a river (a)."}, "the answer is 'B' but the reference .* names 'A'"),
        ({"cot": "No idea."}, "the answer is 'B' but the reference .* names None"),
        ({"question": ""}, "field 'question' is empty"),
    ],
)
def test_bad_choice_records_are_named_by_line(tmp_path: Path, change: dict[str, object], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", CHOICE, CHOICE | change)
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: {message}"):
        MultipleChoiceTask(path=path)


def test_choice_record_without_an_answer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r":1: no answerKey \(a label\) and no answer \(an index\)"):
        MultipleChoiceTask(path=write(tmp_path / "a.jsonl", {key: CHOICE[key] for key in ("question", "choices")}))
    with pytest.raises(ValueError, match=r":1: an answerless example: there is no choice -1 among 4"):
        MultipleChoiceTask(path=write(tmp_path / "a.jsonl", MMLU_RAW | {"answer": -1}))


def test_contradicting_sources(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", MATH_RAW)
    for settings in ({}, {"path": path, "dataset": "openai/gsm8k"}):
        with pytest.raises(ValueError, match="exactly one source: path"):
            MathTask(**settings)
    with pytest.raises(ValueError, match="revision='v1' goes with dataset"):
        MathTask(path=path, revision="v1")
    with pytest.raises(ValueError, match=r"test_path=.* goes with path"):
        MathTask(dataset="openai/gsm8k", test_path=path)


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*none\.jsonl .*give the path of a \.jsonl file"):
        MathTask(path=str(tmp_path / "none.jsonl"))
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
        MathTask(path=str(tmp_path / "empty.jsonl"))
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
        MathTask(path=write(tmp_path / "a.jsonl", MATH_RAW), test_path=str(tmp_path / "empty.jsonl"))


def test_folder_as_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "sums"
    folder.mkdir()
    write(folder / "train.jsonl", *math_rows(50))
    write(folder / "test.jsonl", *math_rows(5, 100))
    task = MathTask(dataset=str(folder))
    assert task.example("test", 0).id == "sums/test/0"
    assert (task.size("train") + task.size("validation"), task.size("test")) == (50, 5)
    with pytest.raises(
        ValueError, match=r'cannot read .*sums:dev .*"dev".*set config_name and the names of the splits'
    ):
        MathTask(dataset=str(folder), test_split="dev")
    with pytest.raises(OSError, match=r"cannot fetch .*nowhere:train .*give them as JSON lines with path="):
        MathTask(dataset=str(tmp_path / "nowhere"))


# --- configurations ---------------------------------------------------------------------------------------------------

# What the hub holds: records by split, in the format of the data set.
HUB: dict[str, Callable[[int], dict[str, object]]] = {
    "openai/gsm8k": lambda n: GSM8K_RAW | {"question": f"{n}?"},
    "EleutherAI/hendrycks_math": lambda n: MATH_RAW | {"problem": f"{n}?"},
    "tau/commonsense_qa": lambda n: CHOICE | {"question": f"{n}?"},
    "allenai/ai2_arc": lambda n: ARC_RAW | {"question": f"{n}?"},
    "TIGER-Lab/MMLU-Pro": lambda n: MMLU_PRO_RAW | {"question": f"{n}?"},
    "cais/mmlu": lambda n: MMLU_RAW | {"question": f"{n}?"},
}
SPLITS_READ = {
    "gsm8k": ["train", "test"],
    "math": ["train"] * 7 + ["test"] * 7,
    "commonsense_qa": ["train", "validation"],
    "arc_challenge": ["train", "validation", "test"],
    "mmlu_pro": ["test"],
    "mmlu_professional_psychology": ["dev+validation", "test"],
}


@pytest.mark.parametrize("file", sorted((ROOT / "conf" / "task").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_configuration_makes_a_task(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def load_dataset(dataset: str, config: str | None, revision: str | None, split: str) -> list[dict[str, object]]:
        read.append(split)
        return [HUB[dataset](100 * len(read) + n) for n in range(50)]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    register_schemas()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None):
        config = hydra.compose("train", overrides=[f"task={file.stem}"])
    if file.stem.endswith(("_jsonl", "_chat")):
        with pytest.raises(ValueError, match="path"):
            build(config, "task")
        config.task.path = str(
            write(
                tmp_path / "rows.jsonl",
                *[CHOICE | MATH_RAW | {"question": f"{n}?", "problem": f"{n}?"} for n in range(50)],
            )
        )
    task = build(config, "task")
    assert isinstance(task, Task)
    assert read == SPLITS_READ.get(file.stem, [])
    if isinstance(task, RecordTask):
        assert task.name == file.stem.removesuffix("_jsonl").removesuffix("_chat")
        assert task.chat == file.stem.endswith("_chat")
        if task.dataset and task.test_split is None:
            assert sum(task.size(split) for split in SPLITS) == 50
            assert all(task.size(split) for split in SPLITS)
        elif task.dataset:
            assert task.size("test") == 50 * read.count(read[-1])
        copy = pickle.loads(pickle.dumps(task))
        assert copy == task
        assert hash(copy) == hash(task)
        assert copy.examples("train") == task.examples("train")
        examples = [example for split in SPLITS if task.size(split) for example in task.examples(split)]
    else:
        examples = all_examples(task, 5)
    assert all(task.is_correct(example, example.reference) for example in examples)
    with (
        pytest.raises(ConfigCompositionException, match="lvel"),
        hydra.initialize_config_dir(str(ROOT / "conf"), version_base=None),
    ):
        hydra.compose("train", overrides=[f"task={file.stem}", "task.lvel=easy"])


def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = (
        "import sys, envs.tasks.arithmetic, envs.tasks.math, envs.tasks.multiple_choice\n"
        "print({'datasets', 'math_verify', 'sympy', 'torch', 'transformers'} & sys.modules.keys())"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_learners_of_other_seeds_begin_elsewhere_in_a_task_without_end():
    class Endless(ArithmeticTask):
        def training_start(self, seed):
            return Task.training_start(self, seed)

    assert [Endless().training_start(seed) for seed in range(3)] == [0, 1_000_000, 2_000_000]
    # the embedded models were pretrained on the first million
    assert [ArithmeticTask().training_start(seed) for seed in range(3)] == [1_000_000, 2_000_000, 3_000_000]
    assert FirstExamples(ArithmeticTask(), 5, start=7).training_start(2) == 0
