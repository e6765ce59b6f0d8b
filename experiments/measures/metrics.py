"""What a sweep over thresholds says: costs at an accuracy, accuracies at a cost, and areas.

Everything is computed for many weightings of the same examples at once, which is what intervals need
(`experiments.measures.intervals`).
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from agents.common.curves import Hull, Sweep
from envs.arrays import FloatArray

LEVELS = (0.90, 0.95, 0.99)
"""Shares of the LLM's accuracy that costs are read at."""
COSTS = (0.15, 0.25, 0.50)
"""Costs that accuracies are read at, fixed before anything was measured."""


def measures(sweep: Sweep, calls: Sweep | None, weights: FloatArray) -> dict[str, FloatArray]:
    """All that is reported of one sweep by itself.

    Args:
        sweep: in the unit that is compared.
        calls: the same in LLM tokens: RouteLLM's measures count strong calls; None where there are more models.
        weights: of the examples, (..., examples).

    Returns:
        Arrays (...) by name. cost_at_X: at share X of the LLM's accuracy. accuracy_at_C: at cost C. deferral_area: the
        integral from the SLM's cost to the LLM's. aiq: its mean accuracy (RouterBench). area_above_line: that less the
        mean accuracy of the straight line between the two models, which a coin per query has. qnc: least cost that
        matches the better single model, over that model's (UniRoute). apgr: share of the gap between the models that is
        recovered, averaged over shares of strong calls; cpt_X: least share of strong calls that recovers X of it
        (RouteLLM).
    """
    points = sweep.points(weights)
    hull, slm, llm = Hull.of(points), points[..., 0, :], points[..., -1, :]
    values = {f"cost_at_{level:.2f}": hull.cost_at(level * llm[..., 1]) for level in LEVELS}
    values |= {f"accuracy_at_{cost:.2f}": hull.accuracy_at(cost) for cost in COSTS}
    with np.errstate(divide="ignore", invalid="ignore"):
        width = np.where(llm[..., 0] > slm[..., 0], llm[..., 0] - slm[..., 0], np.nan)
        values["deferral_area"] = hull.area(slm[..., 0], llm[..., 0])
        values["aiq"] = values["deferral_area"] / width
        values["area_above_line"] = values["aiq"] - _line(points).area(slm[..., 0], llm[..., 0]) / width
        best = np.where((slm[..., 1] >= llm[..., 1])[..., None], slm, llm)
        values["qnc"] = np.where(best[..., 0] > 0, hull.cost_at(best[..., 1]) / best[..., 0], np.nan)
        if calls is not None:
            by_calls = Hull.of(calls.points(weights))
            gap = np.where(llm[..., 1] > slm[..., 1], llm[..., 1] - slm[..., 1], np.nan)
            values["apgr"] = (by_calls.area(0.0, 1.0) - slm[..., 1]) / gap
            values |= {f"cpt_{share:.2f}": by_calls.cost_at(slm[..., 1] + share * gap) for share in (0.5, 0.8)}
    return {name: np.where(np.isfinite(value), value, np.nan) for name, value in values.items()}


def _line(points: FloatArray) -> Hull:
    """The hull of the two ends of a sweep: what a coin per query has."""
    return Hull.of(points[..., [0, -1], :])


def oracle_share(sweep: Sweep, oracle: Sweep, weights: FloatArray) -> FloatArray:
    """How much of the oracle's area above the line between the models a policy has, (...).

    Args:
        sweep: of the policy.
        oracle: in the same unit.
        weights: of the examples, (..., examples).
    """
    ours, best = sweep.points(weights), oracle.points(weights)
    low, high = ours[..., 0, 0], ours[..., -1, 0]
    line, area, limit = (hull.area(low, high) for hull in (_line(ours), Hull.of(ours), Hull.of(best)))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(limit > line, (area - line) / (limit - line), np.nan)


def over_price(
    costs_at: Mapping[str, FloatArray], price: FloatArray, llm: FloatArray, weights: FloatArray
) -> dict[str, FloatArray]:
    """A policy's costs over those of a way to decode that has but one.

    Args:
        costs_at: `cost_at_X` of the policy, relative to LLM-only decoding, (...).
        price: cost of each answer the other way, (examples,).
        llm: cost of each answer by the LLM alone, (examples,).
        weights: of the examples, (..., examples).

    Returns:
        over_speculative_at_X.
    """
    relative = (weights @ price) / (weights @ llm)
    return {f"over_speculative_at_{level:.2f}": costs_at[f"cost_at_{level:.2f}"] / relative for level in LEVELS}


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return round(float(value), 6) if np.isfinite(value) else None
