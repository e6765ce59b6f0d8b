"""Which example an episode is about, and whether its prompt fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np

from envs.arrays import IntArray
from envs.tasks.task import Example, Split, Task

Order = Literal["random", "sequential"]
TooLong = Literal["error", "skip", "truncate"]
DRAWS = 1000
"""Prompts that are skipped in a row before it is an error."""
# More than the special tokens that a tokenizer puts around a prompt. A token is a byte or more.
SPECIAL_TOKENS = 16


def check_choices(**choices: tuple[str, Any]) -> None:
    """Refuse values that are none of a literal's: `order=(order, Order)`."""
    for name, (value, literal) in choices.items():
        if value not in get_args(literal):
            raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(get_args(literal))}")


class Pass:
    """Numbers of examples: drawn, or in order, each once a pass.

    Args:
        size: how many there are; None where there is no end.
        order: `random` or `sequential`.
    """

    def __init__(self, size: int | None, order: Order) -> None:
        self.size, self.order, self.position = size, order, 0

    def draw(self, rng: np.random.Generator) -> int:
        """The next number."""
        if self.order == "random":
            return int(rng.integers(self.size or 2**31))
        number = self.position if self.size is None else self.position % self.size
        self.position = number + 1
        return number


class PromptSource:
    """The examples of a split and their prompts in tokens.

    Args:
        task: where they come from.
        split: of the task.
        encode: the tokens of an example's prompt, (n,).
        room: the longest prompt, in tokens.
        on_too_long: what becomes of a longer one: `error`, `skip` (another example in its place) or `truncate` (its
            last `room` tokens; of a chat the last of the user's text, so that all of it fits).
        order: `random` or `sequential`.

    Raises:
        ValueError: the split is finite, and empty, or holds prompts that are too long where that is an error, or holds
            no others where they are skipped.
    """

    def __init__(
        self,
        task: Task,
        split: Split,
        encode: Callable[[Example], IntArray],
        room: int,
        on_too_long: TooLong = "error",
        order: Order = "random",
    ) -> None:
        self.task, self.split, self.room, self.on_too_long = task, split, room, on_too_long
        self._encode, size = encode, task.size(split)
        self.numbers = Pass(size, order)
        if size == 0:
            raise ValueError(f"task {task.name} has no {split} examples; choose another split or another task")
        if size is None or on_too_long == "truncate":
            return
        examples = (task.example(split, number) for number in range(size))
        long = [example.id for example in examples if not self.fits(example)]
        if len(long) == size or (long and on_too_long == "error"):
            raise ValueError(
                f"{len(long)} of {size} {split} examples have prompts longer than the {room} tokens that capacity "
                f"leaves beside max_new_tokens, the first is {long[0]}: raise capacity, lower max_new_tokens, or say "
                "on_too_long='truncate'" + (" or 'skip'" if len(long) < size else "")
            )

    def fits(self, example: Example) -> bool:
        """Whether a prompt is short enough."""
        sure = example.chat is None and len(example.prompt.encode()) + SPECIAL_TOKENS <= self.room
        return sure or len(self._encode(example)) <= self.room

    def choose(self, given: Example | int | None, rng: np.random.Generator) -> tuple[Example, IntArray]:
        """The example given, that number of the split, or the next one; and its prompt, (n,).

        Raises:
            ValueError: there is no such number, or the prompt is too long and neither skipped nor cut.
        """
        if isinstance(given, Example):
            example = given
        elif given is not None:
            example = self._numbered(given)
        else:
            example = self.task.example(self.split, self.numbers.draw(rng))
            draws = 1
            while self.on_too_long == "skip" and not self.fits(example):
                if draws == DRAWS:
                    raise ValueError(
                        f"{DRAWS} prompts in a row are longer than {self.room} tokens, the last is {example.id}; raise "
                        "capacity or lower max_new_tokens"
                    )
                example, draws = self.task.example(self.split, self.numbers.draw(rng)), draws + 1
        if self.on_too_long == "truncate" and example.chat is not None:
            example = self._cut(example)
        prompt = self._encode(example)
        return example, prompt[-self.room :] if self.on_too_long == "truncate" else prompt

    def _cut(self, example: Example) -> Example:
        """A chat whose prompt fits: the last characters of the user's text, since the words around it must stay.

        Raises:
            ValueError: there is no room for any of it.
        """
        if self.fits(example):
            return example
        text, fitting, longer = example.prompt, 0, len(example.prompt)
        while longer - fitting > 1:
            half = (fitting + longer) // 2
            short = self.fits(replace(example, prompt=text[-half:])) if text[-half:].strip() else True
            fitting, longer = (half, longer) if short else (fitting, half)
        cut = text[-fitting:] if fitting else ""
        if not cut.strip():
            raise ValueError(
                f"example {example.id}: its chat alone takes more than the {self.room} tokens that capacity leaves "
                "beside max_new_tokens; raise capacity or lower max_new_tokens"
            )
        return replace(example, prompt=cut)

    def _numbered(self, number: Any) -> Example:
        size = self.numbers.size
        whole = isinstance(number, int | np.integer) and not isinstance(number, bool)
        if not whole or number < 0 or (size is not None and number >= size):
            last = "" if size is None else f"..{size - 1}"
            raise ValueError(f"there is no {self.split} example {number!r}; give an index in 0{last}, or an Example")
        return self.task.example(self.split, int(number))
