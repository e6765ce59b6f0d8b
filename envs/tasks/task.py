"""What a task is: examples with reference solutions, and a judge of answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
EXAMPLES_PER_SEED = 1_000_000
"""How far apart learners of two seeds begin in a task without end."""
NOT_OPTIONS = ("add_generation_prompt", "chat_template", "continue_final_message", "conversation", "tokenize")
"""What the template of a chat is called with, and no setting of a task."""


@dataclass(frozen=True)
class Chat:
    """How a prompt is put to models that were tuned on chats: by the template of their tokenizer.

    Args:
        system: the system's turn, before the user's; None leaves it to the template.
        options: names and values that the template reads, such as `enable_thinking`.

    Raises:
        ValueError: an option that is no plain value, or one that decoding decides.
    """

    system: str | None = None
    options: tuple[tuple[str, str | bool | int | float | None], ...] = ()

    def __post_init__(self) -> None:
        for name, value in self.options:
            if name in NOT_OPTIONS or not isinstance(value, str | bool | int | float | None):
                raise ValueError(
                    f"chat_options has {name}={value!r}; an option is a text, a number, true or false that the chat "
                    f"template reads, and none of {', '.join(NOT_OPTIONS)}"
                )


@dataclass(frozen=True)
class Example:
    """One problem.

    Attributes:
        id: unique within its task, stable across runs.
        prompt: the text both models read first.
        reference: a solution the task judges right, without the end-of-sequence token; None where only the answer is
            known, which is enough to judge by.
        answer: the final answer alone.
        chat: how the prompt is put, as the user's turn of a chat; None where models read it as it is.
    """

    id: str
    prompt: str
    reference: str | None
    answer: str
    chat: Chat | None = None

    def __post_init__(self) -> None:
        for field in ("prompt", "reference", "answer"):
            value = getattr(self, field)
            if not (field == "reference" and value is None) and not value.strip():
                raise ValueError(
                    f"example {self.id!r} has an empty {field}; drop it or complete it in the task's source"
                )

    def known_reference(self) -> str:
        """The reference; ValueError where there is none."""
        if self.reference is None:
            raise ValueError(
                f"example {self.id} has an answer and no reference solution: train an agent that learns from outcomes, "
                "or give its task records with solutions"
            )
        return self.reference

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any]) -> Example:
        """The example of which `dataclasses.asdict` made `kept`, by way of JSON or not."""
        chat = kept.get("chat")
        if chat is not None:
            chat = Chat(chat["system"], tuple((name, value) for name, value in chat["options"]))
        return cls(**{**kept, "chat": chat})


class Task(ABC):
    """A source of examples in three disjoint splits, and the rule that says which response is right.

    A task is deterministic: `example(split, index)` is the same in every process.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """What results call it."""

    @abstractmethod
    def size(self, split: Split) -> int | None:
        """The number of examples in `split`; None where they are generated without end."""

    @abstractmethod
    def example(self, split: Split, index: int) -> Example:
        """Example `index` of `split`; raises IndexError past the end."""

    @abstractmethod
    def is_correct(self, example: Example, response: str) -> bool:
        """Whether `response` (the written text alone, without the prompt) answers `example` rightly."""

    def token_kind(self, token: str) -> str:
        """What kind of token this is, for reports of what labels are made of; `other` where the task does not say.

        Args:
            token: the text of one token of a reference, as the tokenizer cuts it; never one that ends a sequence.
        """
        return "other"

    def examples(self, split: Split, count: int | None = None, start: int = 0) -> list[Example]:
        """`count` examples from `start` on; all that remain where `count` is None.

        Raises:
            ValueError: the split is empty or holds fewer, or it is endless and `count` is None.
        """
        size = self._size_of_nonempty(split)
        if count is None:
            if size is None:
                raise ValueError(f"{self.name} generates {split} examples without end: say how many")
            count = size - start
        if count < 1 or (size is not None and start + count > size):
            raise ValueError(f"{self.name} has {size} {split} examples; {count} from {start} on were asked for")
        return [self.example(split, start + offset) for offset in range(count)]

    def training_start(self, seed: int) -> int:
        """The first training example of learners with this seed: elsewhere for every seed where there is no end."""
        return EXAMPLES_PER_SEED * seed if self.size("train") is None else 0

    def sample(self, split: Split, rng: np.random.Generator) -> Example:
        """One example of `split`, drawn uniformly with `rng`.

        Raises:
            ValueError: the split is empty.
        """
        size = self._size_of_nonempty(split)
        return self.example(split, int(rng.integers(2**31 if size is None else size)))

    def _size_of_nonempty(self, split: Split) -> int | None:
        """`size(split)`; raises ValueError if it is 0."""
        size = self.size(split)
        if size == 0:
            sizes = {other: self.size(other) for other in SPLITS if other != split}
            others = " and ".join(f"{other} has {'no end' if n is None else n}" for other, n in sizes.items())
            raise ValueError(
                f"the {split} split of task {self.name} is empty ({others}): choose a split that has examples, or give "
                f"the task records for this one"
            )
        return size


class FirstExamples(Task):
    """A task with no more than its first examples: what an agent trains on again and again, kept once made.

    Args:
        task: where they come from, and who judges the answers.
        count: examples of each split.
        start: the first one.

    Raises:
        ValueError: the task has fewer in its train split.
    """

    def __init__(self, task: Task, count: int, start: int = 0) -> None:
        size = task.size("train")
        if count < 1 or start < 0 or (size is not None and start + count > size):
            raise ValueError(f"{task.name} has {size} train examples; {count} from {start} on were asked for")
        self.task, self.count, self.start = task, count, start
        self._made: dict[tuple[Split, int], Example] = {}

    @property
    def name(self) -> str:
        return self.task.name

    def size(self, split: Split) -> int:
        size = self.task.size(split)
        return self.count if size is None else max(0, min(self.count, size - self.start))

    def example(self, split: Split, index: int) -> Example:
        if not 0 <= index < self.size(split):
            raise IndexError(f"{self.name} was cut to {self.size(split)} {split} examples; there is no {index}")
        if (split, index) not in self._made:
            self._made[split, index] = self.task.example(split, self.start + index)
        return self._made[split, index]

    def is_correct(self, example: Example, response: str) -> bool:
        return self.task.is_correct(example, response)

    def token_kind(self, token: str) -> str:
        return self.task.token_kind(token)


def check_split(split: str) -> Split:
    """`split` if it is one of the three; an error that names them otherwise."""
    for known in SPLITS:
        if split == known:
            return known
    raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
