"""Cost weights that a conditioned policy is trained with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from envs.arrays import FloatArray

GRID = 16
"""Cost weights over which a conditioned policy averages."""


@dataclass(frozen=True)
class CostWeights:
    """A range of cost weights, drawn from evenly on a logarithmic scale.

    Args:
        low: the smallest price of one LLM token, in right answers.
        high: the largest.
    """

    low: float = 0.001
    high: float = 0.1

    def __post_init__(self) -> None:
        if not (0 < self.low < self.high and math.isfinite(self.high)):
            raise ValueError(f"conditioned: low ({self.low}) must be above 0 and below high ({self.high}), both finite")

    def draw(self, rng: np.random.Generator) -> float:
        """One weight."""
        return math.exp(rng.uniform(math.log(self.low), math.log(self.high)))

    def scaled(self, weights: FloatArray) -> FloatArray:
        """What is observed of weights (n,): their logarithms, -1 at `low` and 1 at `high`, (n,)."""
        return np.asarray(2 * np.log(weights / self.low) / math.log(self.high / self.low) - 1)

    def grid(self, count: int = GRID) -> FloatArray:
        """Weights from `low` to `high`, evenly spaced on a logarithmic scale, (count,)."""
        return np.geomspace(self.low, self.high, count)
