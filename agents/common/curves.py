"""A sweep over thresholds and its upper concave hull: the best accuracy at a cost, the least cost at an accuracy.

Everything is computed for many weightings of the same examples at once, which is what intervals need.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from envs.arrays import FloatArray

DIGITS = 12
"""Points are rounded to these: a product may sum the same answers to another last bit, and a tie be none."""


@dataclass(frozen=True)
class Sweep:
    """One policy's answers to the same examples at several thresholds, the SLM alone first and the LLM alone last.

    Attributes:
        correct: whether each answer is right, (thresholds, examples).
        costs: cost of each answer, in any unit, (thresholds, examples).
    """

    correct: npt.NDArray[np.bool_]
    costs: FloatArray

    def points(self, weights: FloatArray) -> FloatArray:
        """(cost relative to LLM-only decoding, accuracy) of each threshold, (..., thresholds, 2).

        Args:
            weights: of the examples, summing to 1, (..., examples).
        """
        costs, accuracies = weights @ self.costs.T, weights @ self.correct.T.astype(float)
        return np.stack([(costs / costs[..., -1:]).round(DIGITS), accuracies.round(DIGITS)], axis=-1)


@dataclass(frozen=True)
class Hull:
    """The upper concave hull of some points: the best accuracy at each cost that any mixture of them has.

    Who answers each query with one of two operating points, drawn at random, has any point on the line between them.
    So the hull is itself a policy, and one more point can only raise it. It ends at the most accurate point.

    Attributes:
        costs: of its vertices, rising; the last one is repeated to the length of others in a batch, (..., vertices).
        accuracies: of its vertices, rising alike, (..., vertices).
    """

    costs: FloatArray
    accuracies: FloatArray

    @classmethod
    def of(cls, points: FloatArray) -> Self:
        """The hull of points (..., points, 2): each a cost and an accuracy."""
        order = np.lexsort((-points[..., 1], points[..., 0]), axis=-1)
        ordered = np.take_along_axis(points, order[..., None], axis=-2)
        vertices = _chains(ordered.reshape(-1, *points.shape[-2:])).reshape(points.shape)
        return cls(vertices[..., 0], vertices[..., 1])

    @property
    def vertices(self) -> FloatArray:
        """Those of one hull, each once, (vertices, 2)."""
        kept = np.concatenate([[True], np.diff(self.costs) > 0])
        return np.stack([self.costs[kept], self.accuracies[kept]], axis=-1)

    def cost_at(self, accuracy: FloatArray | float) -> FloatArray:
        """The least cost that reaches `accuracy` (...); infinite where none does."""
        wanted = np.broadcast_to(accuracy, self.costs.shape[:-1])[..., None]
        costs = _interpolated(wanted, self.accuracies, self.costs)
        return np.asarray(np.where(wanted > self.accuracies[..., -1:], np.inf, costs)[..., 0])

    def accuracy_at(self, cost: FloatArray | float) -> FloatArray:
        """The accuracy at `cost` (...); NaN below the cheapest point, the last accuracy beyond the dearest."""
        wanted = np.broadcast_to(cost, self.costs.shape[:-1])[..., None]
        accuracies = _interpolated(wanted, self.costs, self.accuracies)
        return np.asarray(np.where(wanted < self.costs[..., :1], np.nan, accuracies)[..., 0])

    def area(self, low: FloatArray | float, high: FloatArray | float) -> FloatArray:
        """The integral of the accuracy over costs from `low`, at least that of the cheapest point, to `high` (...)."""
        shape = self.costs.shape[:-1]
        low, high = (np.broadcast_to(end, shape)[..., None] for end in (low, high))
        low = np.maximum(low, self.costs[..., :1])
        at = np.concatenate([low, np.clip(self.costs, low, high), high], axis=-1)
        return np.asarray(np.trapezoid(_interpolated(at, self.costs, self.accuracies), at, axis=-1))


def _chains(ordered: FloatArray) -> FloatArray:
    """The rising part of each upper hull (Andrew's monotone chain), filled up with its last vertex.

    Args:
        ordered: points by rising cost, the most accurate first where costs are equal, (batch, points, 2).
    """
    batch, count, _ = ordered.shape
    chain, sizes, rows = ordered.copy(), np.zeros(batch, dtype=np.int64), np.arange(batch)
    for position in range(count):
        point = ordered[:, position]
        while True:
            last, before = (chain[rows, np.maximum(sizes - back, 0)] for back in (1, 2))
            run, rise = (last - before).T
            below = (sizes >= 2) & (rise * (point[:, 0] - before[:, 0]) <= (point[:, 1] - before[:, 1]) * run)
            if not below.any():
                break
            sizes -= below
        higher = (sizes == 0) | (point[:, 1] > chain[rows, sizes - 1, 1])
        chain[rows[higher], sizes[higher]] = point[higher]
        sizes += higher
    held = np.minimum(np.arange(count), sizes[:, None] - 1)
    return np.take_along_axis(chain, held[..., None], axis=1)


def _interpolated(at: FloatArray, x: FloatArray, y: FloatArray) -> FloatArray:
    """`numpy.interp` along the last axis: `at` (..., n), `x` and `y` (..., vertices), `x` not falling."""
    right = np.clip((x[..., None, :] < at[..., :, None]).sum(-1), min(1, x.shape[-1] - 1), x.shape[-1] - 1)
    left = np.maximum(right - 1, 0)
    x0, x1, y0, y1 = (np.take_along_axis(some, index, -1) for some in (x, y) for index in (left, right))
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.where(x1 > x0, (x1 - np.clip(at, x0, x1)) / (x1 - x0), 0.0)
    return y1 - share * (y1 - y0)
