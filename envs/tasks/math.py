r"""Math word problems: records whose reference ends in `\boxed{answer}`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from envs.tasks.math_answers import find_answer, same_value
from envs.tasks.records import Problem, RecordTask, Row, check_template, fill, prompt_template, text
from envs.tasks.task import Example

# The wording of the published router training rows.
MATH_TEMPLATE = (
    "Solve the following math problem step by step. Ensure all reasoning is shown clearly in LaTeX format, and you "
    "should enclose your answer with \\boxed{}.\nQuestion: {question}\nSolution: "
)

INSTRUCTED_MATH = "{question}\n\n{instruction}"
"""The prompt where an instruction is given."""

_CALCULATOR_MARK = re.compile(r"<<[^<>]*>>")


@dataclass(frozen=True, kw_only=True)
class MathTask(RecordTask):
    r"""Math problems. The last `\boxed{}` of a response is its answer, compared by value (`1/2`, `0.5`, `\frac12`).

    A record has one of these forms, told by its fields:

    - `prompt`, `cot`, `answerKey`: a router training row. The prompt is used as it is; `cot` is the reference.
    - `problem`, `solution`: a published test row, or MATH. The answer is in the solution's last `\boxed{}`.
    - `question`, `answer`: GSM8K as the hub has it, the answer behind `####`.
    - `problem`, `answer`: the answer alone. Such examples have no reference.

    Args:
        template: the prompt of records that bring none; `{question}` stands for the problem. With an `instruction`, of
            all records; `{instruction}` says where it stands.

    The source (`path`, `test_path`, `dataset` and what belongs to it), `name`, `instruction`, `chat` and its settings:
    see `RecordTask`.

    Raises:
        ValueError, OSError: as `RecordTask`; a template without `{question}`, or that has `{instruction}` where none
            is given, or lacks it.
    """

    template: str = MATH_TEMPLATE

    def __post_init__(self) -> None:
        check_template(self.template, "question")
        prompt_template(self.template, MATH_TEMPLATE, INSTRUCTED_MATH, self.instruction)
        super().__post_init__()

    def problem(self, row: Row) -> Problem:
        return math_problem(row, self.template, self.instruction)

    def is_correct(self, example: Example, response: str) -> bool:
        r"""The last answer of the response (`\boxed{}`, else `####`) has the value of the example's answer."""
        answer = find_answer(response)
        return answer is not None and same_value(example.answer, answer)


def math_problem(row: Row, template: str = MATH_TEMPLATE, instruction: str | None = None) -> Problem:
    """The problem of a record in any of the forms of `MathTask`.

    Raises:
        ValueError: a field is missing or empty, or the reference has no answer, or another one than `answerKey`.
    """
    reference: str | None = None
    if "cot" in row:
        reference = text(row, "cot")
    elif "solution" in row:
        reference = text(row, "solution")
    elif "answer" in row and "problem" in row:
        pass  # no reference
    elif "answer" in row:
        reference = gsm8k_reference(text(row, "answer"))
    else:
        raise ValueError(
            f"no reference among the fields {', '.join(row) or 'none'}; a math record has prompt, cot and answerKey, "
            "or problem and solution (or answer), or question and answer"
        )
    prompt, key = text(row, "prompt") if "prompt" in row else "", ""
    if not prompt:
        prompt = fill(template, question=_question(row))
    if instruction is not None:
        key = prompt
        whole = prompt_template(template, MATH_TEMPLATE, INSTRUCTED_MATH, instruction)
        prompt = fill(whole, question=_question(row), instruction=instruction)
    if reference is None:
        alone = text(row, "answer").strip()
        return Problem(prompt, None, find_answer(alone) or alone, key)
    answer = find_answer(reference)
    if answer is None:
        raise ValueError(
            f"an answerless example: no \\boxed{{}} or #### in the reference that ends in {reference[-40:]!r}; "
            "enclose its answer in \\boxed{} or delete the record"
        )
    if "cot" in row and not same_value(text(row, "answerKey"), answer):
        raise ValueError(
            f"the answerKey is {row['answerKey']!r} but the reference answers {answer!r}; correct one or delete the "
            "record"
        )
    return Problem(prompt, reference, answer, key)


def _question(row: Row) -> str:
    """What a record asks, by itself.

    Raises:
        ValueError: it has no such field, and a prompt of other words than those of the published rows.
    """
    for key in ("problem", "question"):
        if key in row:
            return text(row, key)
    if "prompt" not in row:
        return text(row, "question")
    before, after = MATH_TEMPLATE.split("{question}")
    prompt = text(row, "prompt")
    if not (prompt.startswith(before) and prompt.rstrip().endswith(after.rstrip())):
        raise ValueError(
            f"no question among the fields {', '.join(row) or 'none'}, and a prompt of other words than those of the "
            "published rows; give the record a question"
        )
    return prompt.removeprefix(before).rstrip().removesuffix(after.rstrip()).strip()


def gsm8k_reference(answer: str) -> str:
    r"""The `answer` field of GSM8K as a reference: without calculator marks `<<2*3=6>>`, ending in `\boxed{}`.

    Raises:
        ValueError: it has no `####`.
    """
    steps, marker, value = answer.rpartition("####")
    if not marker or not value.strip():
        raise ValueError(
            f"an answerless example: no #### in the answer that ends in {answer[-40:]!r}; add it or delete the record"
        )
    return f"{_CALCULATOR_MARK.sub('', steps).rstrip()}\nThe final answer is: \\boxed{{{value.strip()}}}".lstrip()
