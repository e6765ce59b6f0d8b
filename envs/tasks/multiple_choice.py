"""Multiple-choice questions: a response explains, then names a choice by its label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from envs.tasks.choice_answers import DIGITS, LETTERS, find_choice, find_label
from envs.tasks.records import Problem, RecordTask, Row, check_template, fill, prompt_template, text
from envs.tasks.task import Example

# The wording of the published router training rows.
MULTIPLE_CHOICE_TEMPLATE = (
    "Question: {question}\nChoices:\n{choices}\n\nPlease format your response in the following way:\n"
    "[Explanation]. Therefore, the answer is answer (label).\n"
    "Ensure the final sentence includes the answer followed by the label in parentheses.\n\nAnswer and Reasoning:"
)
_CHOICE = re.compile(rf"^\s*\(?([{LETTERS}{DIGITS}])[.):]\s+(\S.*)$", re.MULTILINE)
INSTRUCTED_CHOICE = "Question: {question}\nChoices:\n{choices}\n\n{instruction}"
"""The prompt where an instruction is given."""


@dataclass(frozen=True, kw_only=True)
class MultipleChoiceTask(RecordTask):
    """Multiple-choice questions. `find_choice` says which choice a response decides for.

    A record has `question`, `choices` and `answerKey`, the choices as `{"label": [...], "text": [...]}`
    (CommonsenseQA, ARC); or `question`, `choices` as a list of texts and `answer` as an index (MMLU); or `question`,
    `options` as a list of texts and `answer` as a letter (MMLU-Pro). Router training rows bring `prompt` and `cot` too,
    which are used as they are. Labels are letters A to J or digits 1 to 9.

    Args:
        template: the prompt of records that bring none; `{question}` and `{choices}` (one a line) are filled in.
            With an `instruction`, of all records; `{instruction}` says where it stands.

    The source (`path`, `test_path`, `dataset` and what belongs to it), `name`, `instruction`, `chat` and its settings:
    see `RecordTask`.

    Raises:
        ValueError, OSError: as `RecordTask`; a template without `{question}` or `{choices}`, or that has
            `{instruction}` where none is given, or lacks it.
    """

    template: str = MULTIPLE_CHOICE_TEMPLATE

    def __post_init__(self) -> None:
        check_template(self.template, "question", "choices")
        prompt_template(self.template, MULTIPLE_CHOICE_TEMPLATE, INSTRUCTED_CHOICE, self.instruction)
        super().__post_init__()

    def problem(self, row: Row) -> Problem:
        return multiple_choice_problem(row, self.template, self.instruction)

    def is_correct(self, example: Example, response: str) -> bool:
        """The label the response decides for, or the choice it ends in without one, is the example's."""
        choices = choices_in(example.prompt)
        if example.answer in choices:
            return find_choice(response, choices) == example.answer
        return find_label(response, _kind(example.answer)) == example.answer


@dataclass(frozen=True)
class Choices:
    """The choices of a question: labels and texts in order, and the label of the right one."""

    labels: Sequence[str]
    texts: Sequence[str]
    answer: str

    def __post_init__(self) -> None:
        if not self.answer:
            raise ValueError(
                "an answerless example: its answer is empty. Some test splits are published without labels: choose a "
                "split that has them (test_split=validation)"
            )
        if len(self.labels) != len(self.texts) or not self.labels:
            raise ValueError(f"{len(self.labels)} labels for {len(self.texts)} choices")
        if any(len(label) != 1 or label not in LETTERS + DIGITS for label in self.labels):
            raise ValueError(f"the labels {', '.join(self.labels)}; a label is a letter A to J or a digit 1 to 9")
        if self.answer not in self.labels:
            raise ValueError(f"an answerless example: its answer {self.answer!r} is none of {', '.join(self.labels)}")

    @property
    def answer_text(self) -> str:
        return self.texts[self.labels.index(self.answer)]

    def __str__(self) -> str:
        return "\n".join(f"{label}. {choice}" for label, choice in zip(self.labels, self.texts, strict=True))


def choices_in(prompt: str) -> dict[str, str]:
    """What each choice of a prompt says, by its label: the last list of lines such as "A. a river" in it."""
    choices: dict[str, str] = {}
    for label, said in _CHOICE.findall(prompt):
        if label in (LETTERS[0], DIGITS[0]):
            choices = {}
        choices[label] = said.strip()
    return choices


def multiple_choice_problem(
    row: Row, template: str = MULTIPLE_CHOICE_TEMPLATE, instruction: str | None = None
) -> Problem:
    """The problem of a record in any of the forms of `MultipleChoiceTask`.

    Raises:
        ValueError: a field is missing or empty, the answer is none of the choices, or the reference names another.
    """
    choices = read_choices(row)
    prompt, key = text(row, "prompt") if "prompt" in row else "", ""
    if not prompt:
        prompt = fill(template, question=text(row, "question"), choices=str(choices))
    if instruction is not None:
        key = prompt
        values = {"question": text(row, "question"), "choices": str(choices), "instruction": instruction}
        prompt = fill(prompt_template(template, MULTIPLE_CHOICE_TEMPLATE, INSTRUCTED_CHOICE, instruction), **values)
    if "cot" in row:
        reference = text(row, "cot")
    else:
        reference = f"Therefore, the answer is {choices.answer_text} ({choices.answer.lower()})."
    named = find_label(reference, _kind(choices.answer))
    if named != choices.answer:
        raise ValueError(
            f"the answer is {choices.answer!r} but the reference that ends in {reference[-40:]!r} names {named!r}; "
            "correct it or delete the record"
        )
    return Problem(prompt, reference, choices.answer, key)


def read_choices(row: Row) -> Choices:
    """The choices of a record, and which one is right.

    Raises:
        ValueError: `choices` or the answer is missing or malformed.
    """
    choices = row.get("choices", row.get("options"))
    if isinstance(choices, dict) and {"label", "text"} <= choices.keys():
        for key in ("label", "text"):
            if not isinstance(choices[key], list | tuple):
                raise ValueError(f"choices whose {key} is {choices[key]!r}; it is a list, one entry for each choice")
        labels = [str(label).upper() for label in choices["label"]]
        texts = [str(choice) for choice in choices["text"]]
    elif isinstance(choices, list):
        if len(choices) > len(LETTERS):
            raise ValueError(f"{len(choices)} choices; a question has at most {len(LETTERS)}, A to {LETTERS[-1]}")
        labels, texts = list(LETTERS[: len(choices)]), [str(choice) for choice in choices]
    else:
        raise ValueError(
            f"no choices among the fields {', '.join(row) or 'none'}; a multiple-choice record has question, choices "
            '({"label": [...], "text": [...]} or a list of texts) and answerKey (a label) or answer (an index)'
        )
    index = row.get("answer")
    if "answerKey" not in row and isinstance(index, int):
        if not 0 <= index < len(texts):
            raise ValueError(f"an answerless example: there is no choice {index} among {len(texts)}")
        return Choices(labels, texts, labels[index])
    if "answerKey" not in row and "options" in row and isinstance(index, str):
        return Choices(labels, texts, index.strip().upper())
    if "answerKey" not in row:
        raise ValueError(f"no answerKey (a label) and no answer (an index) among the fields {', '.join(row)}")
    return Choices(labels, texts, str(row["answerKey"] or "").strip().upper())


def _kind(label: str) -> str:
    """The labels of the kind of `label`: letters or digits."""
    return DIGITS if label in DIGITS else LETTERS
