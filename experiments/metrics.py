"""What a sweep over thresholds says: curves, costs at an accuracy, accuracies at a cost, and their intervals."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from envs.costs import FloatArray

LEVELS = (0.90, 0.95, 0.99)


@dataclass(frozen=True)
class Sweep:
    """One policy's answers to the same examples at several thresholds.

    Attributes:
        correct: whether each answer is right, (thresholds, examples).
        costs: cost of each answer, in any unit, (thresholds, examples).
    """

    correct: npt.NDArray[np.bool_]
    costs: FloatArray

    def points(self, weights: FloatArray, llm_costs: FloatArray) -> FloatArray:
        """(cost relative to LLM-only decoding, accuracy) of each threshold, (thresholds, 2).

        Args:
            weights: of the examples, summing to 1, (examples,).
            llm_costs: cost of LLM-only decoding of each example, (examples,).
        """
        return np.stack([self.costs @ weights / (llm_costs @ weights), self.correct @ weights], axis=-1)


def monotone_hull(points: FloatArray) -> FloatArray:
    """The points that no cheaper point matches or beats, by rising cost: (n, 2) of cost and accuracy."""
    order = np.lexsort((-points[:, 1], points[:, 0]))
    ordered = points[order]
    best = np.maximum.accumulate(ordered[:, 1])
    rising = np.concatenate([[True], best[1:] > best[:-1]])
    return np.asarray(ordered[rising])


def cost_at(hull: FloatArray, accuracy: float) -> float:
    """The least cost at which the hull reaches `accuracy`, linear between its points; infinite where it never does."""
    costs, accuracies = hull[:, 0], hull[:, 1]
    if accuracy > accuracies[-1]:
        return float("inf")
    if accuracy <= accuracies[0]:
        return float(costs[0])
    return float(np.interp(accuracy, accuracies, costs))


def accuracy_at(hull: FloatArray, cost: float) -> float:
    """The hull's accuracy at `cost`; NaN below its cheapest point, its last accuracy beyond the dearest."""
    return float("nan") if cost < hull[0, 0] else float(np.interp(cost, hull[:, 0], hull[:, 1]))


def bootstrap(
    statistic: Callable[[FloatArray], float], examples: int, samples: int, seed: int
) -> tuple[float | None, float | None]:
    """A 95 % percentile interval over examples; a bound is None where the statistic has none (cost unreachable).

    The same seed draws the same examples, so that intervals of different policies are paired.

    Args:
        statistic: of example weights, (examples,).
        examples: how many there are.
        samples: resamplings.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=samples) / examples
    values = np.sort([statistic(row) for row in weights])
    low, high = values[int(0.025 * samples)], values[min(samples - 1, int(0.975 * samples))]
    return finite(low), finite(high)


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return round(float(value), 6) if np.isfinite(value) else None
