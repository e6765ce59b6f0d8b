"""Answers of one pair that another pair writes again: the same tokens, by the same writers, in the same passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from agents.common.policy import Policy
from agents.common.rollout import Episode, Scheduling, decode, decode_alone
from envs.costs import PASSES, SECONDS
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task
from experiments.speed_suites.forced import ForcedModel, ForcedPolicy, Script, as_large

Item = TypeVar("Item")


@dataclass(frozen=True)
class Way:
    """A way to answer.

    Attributes:
        episodes: what the deciding pair wrote, one for each problem.
        answer: lets the other pair write those of a batch again, by its number.
        policy: whose decisions are part of the cost; None where nobody decides.
    """

    episodes: Sequence[Episode]
    answer: Callable[[int], list[Episode]]
    policy: Policy | None = None


@dataclass(frozen=True)
class Replay:
    """Problems, a pair that decides how they are answered, and one that writes the answers again, batch by batch.

    A batch is as many problems as there are rows. They begin together, each in the row of its number, and share passes;
    a row whose answer has ended stays empty until all have.

    Args:
        pool: decides.
        large: writes again; its models are `ForcedModel`s.
        task: judges.
        examples: what is answered.
        rows: problems of a batch.
        gather: of what a policy decides, see `Scheduling`.
        max_new_tokens: the longest response.

    Raises:
        ValueError: the problems are no whole number of batches.
    """

    pool: ModelPool
    large: ModelPool
    task: Task
    examples: Sequence[Example]
    rows: int = 1
    gather: float = 0.5
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        if self.rows < 1 or not self.examples or len(self.examples) % self.rows:
            raise ValueError(f"{len(self.examples)} problems are no whole number of batches of {self.rows}")

    @property
    def batches(self) -> int:
        """How many there are."""
        return len(self.examples) // self.rows

    def of(self, items: Sequence[Item], number: int) -> Sequence[Item]:
        """Those of some items, one for each problem, that are of a batch."""
        return items[number * self.rows : (number + 1) * self.rows]

    def llm_only(self) -> Way:
        """The LLM writes every token."""

        def answer(pool: ModelPool, examples: Sequence[Example]) -> list[Episode]:
            return decode_alone(pool.models[-1], self.task, examples, pool=pool, **self._settings)

        decided = answer(self.pool, self.examples)

        def again(number: int) -> list[Episode]:
            self._lay_down(decided, number)
            return answer(self.large, self.of(self.examples, number))

        return Way(decided, again)

    def routed(self, policy: Policy, threshold: float) -> Way:
        """A policy decides; where it has a judge, drafts are checked.

        Raises:
            ValueError: it cannot be timed on another pair.
        """
        forced = ForcedPolicy(as_large(policy, self.large))
        decided = decode(self.pool, self.task, self.examples, policy, threshold, **self._settings)

        def again(number: int) -> list[Episode]:
            forced.scripts = self._lay_down(decided, number, threshold)
            return decode(self.large, self.task, self.of(self.examples, number), forced, **self._settings)

        return Way(decided, again, forced)

    @property
    def _settings(self) -> dict[str, Any]:
        return {"max_new_tokens": self.max_new_tokens, "scheduling": Scheduling(self.rows, self.gather)}

    @cached_property
    def _prompts(self) -> list[int]:
        """Tokens of the prompts."""
        return [len(self.pool.encode_prompt(example)) for example in self.examples]

    def _lay_down(self, decided: Sequence[Episode], number: int, threshold: float = 0.0) -> list[Script]:
        """Give the models the scripts of a batch; what they are."""
        scripts = [
            Script.of(episode, prompt, threshold)
            for episode, prompt in zip(self.of(decided, number), self.of(self._prompts, number), strict=True)
        ]
        for model in self.large.models:
            assert isinstance(model, ForcedModel)
            model.scripts = scripts
        return scripts


def check_same(name: str, ours: Episode, decided: Episode) -> None:
    """Refuse a response that is not the one decided upon, or that took other passes or decisions.

    Raises:
        RuntimeError: it is not; the error says where.
    """
    passes = np.delete(ours.ledger - decided.ledger, SECONDS, axis=1)
    back, before = ([(one.position, one.writer, *one.tokens) for one in some.taken_back] for some in (ours, decided))
    for what, same in (
        ("tokens", np.array_equal(ours.tokens, decided.tokens)),
        ("writers", np.array_equal(ours.writers, decided.writers)),
        ("tokens that were taken back", back == before),
        ("passes", not passes.any()),
        ("decisions", ours.decisions[PASSES] == decided.decisions[PASSES]),
    ):
        if not same:
            raise RuntimeError(f"{name}: {decided.example.id} has other {what} when it is written again")
