"""Rewards: a right answer, less what it cost; and the shortcut's dense reward along a reference solution."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from envs.arrays import UNKNOWN, BoolArray, FloatArray, IntArray


@dataclass(frozen=True)
class Transition:
    """What a reward may depend on, for n rows that took a step.

    Attributes:
        actions: the models chosen, (n,).
        tokens: the tokens written, (n,).
        slm_tokens: the tokens the SLM would have written, (n,).
        reference_tokens: the reference's token here, UNKNOWN where the response has left the reference, (n,).
        reference_lengths: tokens of the reference, end of sequence included, (n,).
        costs: cost of the step, in costs of one LLM token on an empty cache, (n,).
        ended: the episode ended with this step, (n,).
        correct: it ended with a right answer, (n,).
    """

    actions: IntArray
    tokens: IntArray
    slm_tokens: IntArray
    reference_tokens: IntArray
    reference_lengths: IntArray
    costs: FloatArray
    ended: BoolArray
    correct: BoolArray


class Reward(ABC):
    """A reward per step."""

    uses_reference: ClassVar[bool] = False
    """Whether `reference_tokens` must be filled in; they are UNKNOWN otherwise."""

    @abstractmethod
    def __call__(self, transition: Transition) -> FloatArray:
        """The rewards of n rows, (n,)."""


@dataclass(frozen=True)
class OutcomeReward(Reward):
    """At each step -cost_weight x cost; at the end + 1 if the answer is right.

    Args:
        cost_weight: the price of one LLM token (on an empty cache), in right answers.
    """

    cost_weight: float = 0.01

    def __post_init__(self) -> None:
        if not (math.isfinite(self.cost_weight) and self.cost_weight >= 0):
            raise ValueError(f"cost_weight must be a finite number >= 0, is {self.cost_weight}")

    def __call__(self, transition: Transition) -> FloatArray:
        return transition.correct - self.cost_weight * transition.costs


@dataclass(frozen=True)
class ShortcutReward(Reward):
    """Dense: agree with CITER's shortcut for as long as the response follows the reference solution.

    Where the SLM would write the reference's token, choosing the SLM earns 1 / reference length; where only the chosen
    other model writes it, that choice does. Every other step earns nothing. The outcome and the cost are added, each
    with its weight.

    Args:
        cost_weight: as in `OutcomeReward`.
        outcome_weight: the worth of a right answer.
    """

    uses_reference: ClassVar[bool] = True
    cost_weight: float = 0.0
    outcome_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("cost_weight", "outcome_weight"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, is {getattr(self, name)}")

    def __call__(self, transition: Transition) -> FloatArray:
        slm_right = transition.slm_tokens == transition.reference_tokens
        written_right = transition.tokens == transition.reference_tokens
        agrees = written_right & (slm_right == (transition.actions == 0)) & (transition.reference_tokens != UNKNOWN)
        dense = agrees / np.maximum(transition.reference_lengths, 1)
        return np.asarray(
            dense + self.outcome_weight * transition.correct - self.cost_weight * transition.costs, dtype=np.float64
        )
