"""What sweeps over thresholds say: curves, costs at an accuracy, accuracies at a cost, areas, and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from envs.arrays import FloatArray

LEVELS = (0.90, 0.95, 0.99)
COSTS = (0.25, 0.50)


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
        """(cost relative to LLM-only decoding, accuracy) of each threshold, (thresholds, 2).

        Args:
            weights: of the examples, summing to 1, (examples,).
        """
        costs = self.costs @ weights
        # rounded: a product may sum the same answers to another last bit, and a tie would not be seen as one
        return np.stack([costs / costs[-1], (self.correct @ weights).round(12)], axis=-1)


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


def area(hull: FloatArray, low: float, high: float) -> float:
    """The integral of the hull's accuracy over costs from `low`, at least that of its cheapest point, to `high`."""
    costs = np.unique(np.clip(np.concatenate([[low, high], hull[:, 0]]), max(low, hull[0, 0]), high))
    return float(np.trapezoid(np.interp(costs, hull[:, 0], hull[:, 1]), costs))


def measures(sweep: Sweep, calls: Sweep | None, weights: FloatArray) -> dict[str, float]:
    """All that is reported of one sweep.

    Args:
        sweep: in the unit that is compared.
        calls: the same in LLM tokens: RouteLLM's measures count strong calls; None where there are more models.
        weights: of the examples, (examples,).

    Returns:
        cost_at_X: at share X of the LLM's accuracy. accuracy_at_C: at cost C. aiq: mean accuracy from the SLM's cost
        to the LLM's (RouterBench). deferral_area: the integral over the same costs. qnc: least cost that matches the
        better single model, over that model's (UniRoute). apgr: share of the gap between the models that is recovered,
        averaged over shares of strong calls; cpt_X: least share of strong calls that recovers X of it (RouteLLM).
    """
    points = sweep.points(weights)
    hull, slm, llm = monotone_hull(points), points[0], points[-1]
    values = {f"cost_at_{level:.2f}": cost_at(hull, level * llm[1]) for level in LEVELS}
    values |= {f"accuracy_at_{cost:.2f}": accuracy_at(hull, cost) for cost in COSTS}
    values["deferral_area"] = area(hull, slm[0], llm[0])
    values["aiq"] = values["deferral_area"] / (llm[0] - slm[0]) if llm[0] > slm[0] else float("nan")
    best = slm if slm[1] >= llm[1] else llm
    values["qnc"] = cost_at(hull, best[1]) / best[0] if best[0] > 0 else float("nan")
    if calls is None:
        return values
    by_calls = monotone_hull(calls.points(weights))
    gap = llm[1] - slm[1]
    if gap > 0:
        values["apgr"] = (area(by_calls, 0.0, 1.0) - slm[1]) / gap
        values |= {f"cpt_{share:.2f}": cost_at(by_calls, slm[1] + share * gap) for share in (0.5, 0.8)}
    else:
        values |= {"apgr": float("nan"), "cpt_0.50": float("nan"), "cpt_0.80": float("nan")}
    return values


def above_random(sweep: Sweep, random: Sweep, oracle: Sweep | None, weights: FloatArray) -> dict[str, float]:
    """How far a policy is from random routing to the oracle.

    Returns:
        area_above_random: of the deferral curve, from the SLM's cost to the LLM's. oracle_share: that area over the
        oracle's, where there is one.
    """
    points = [one.points(weights) for one in (sweep, random, oracle or random)]
    low, high = points[0][0, 0], points[0][-1, 0]
    ours, theirs, best = (area(monotone_hull(some), low, high) for some in points)
    values = {"area_above_random": ours - theirs}
    if oracle is not None:
        values["oracle_share"] = (ours - theirs) / (best - theirs) if best > theirs else float("nan")
    return values


def over_price(
    costs_at: Mapping[str, float], price: FloatArray, llm: FloatArray, weights: FloatArray
) -> dict[str, float]:
    """A policy's costs over those of a way to decode that has but one.

    Args:
        costs_at: `cost_at_X` of the policy, relative to LLM-only decoding.
        price: cost of each answer the other way, (examples,).
        llm: cost of each answer by the LLM alone, (examples,).
        weights: of the examples, (examples,).

    Returns:
        over_speculative_at_X.
    """
    relative = float(price @ weights / (llm @ weights))
    return {f"over_speculative_at_{level:.2f}": costs_at[f"cost_at_{level:.2f}"] / relative for level in LEVELS}


def comparison(sweep: Sweep, other: Sweep, weights: FloatArray) -> dict[str, float]:
    """What a policy saves and gains over another one, both in the same unit.

    Returns:
        saving_at_X: 1 - cost / other's cost at share X of the LLM's accuracy. extra_cost_at_X: their difference.
        ratio_at_X: cost / other's cost. gain_at_C: accuracy less the other's at cost C. largest_gain: where it is
        largest, and largest_gain_cost that cost; largest_loss and largest_loss_cost the other way round.
    """
    ours, theirs = (monotone_hull(one.points(weights)) for one in (sweep, other))
    llm = float((sweep.correct @ weights)[-1])
    values: dict[str, float] = {}
    for level in LEVELS:
        a, b = cost_at(ours, level * llm), cost_at(theirs, level * llm)
        ratio = a / b if b > 0 and np.isfinite(a) and np.isfinite(b) else float("nan")
        values |= {f"ratio_at_{level:.2f}": ratio, f"saving_at_{level:.2f}": 1 - ratio}
        values[f"extra_cost_at_{level:.2f}"] = a - b if np.isfinite(a) and np.isfinite(b) else float("nan")
    values |= {f"gain_at_{cost:.2f}": accuracy_at(ours, cost) - accuracy_at(theirs, cost) for cost in COSTS}
    grid = np.unique(np.concatenate([ours[:, 0], theirs[:, 0]]))
    grid = grid[grid >= max(ours[0, 0], theirs[0, 0])]
    gains = np.interp(grid, ours[:, 0], ours[:, 1]) - np.interp(grid, theirs[:, 0], theirs[:, 1])
    values["largest_gain"], values["largest_gain_cost"] = float(gains.max()), float(grid[gains.argmax()])
    values["largest_loss"], values["largest_loss_cost"] = float(-gains.min()), float(grid[gains.argmin()])
    return values


Statistic = Callable[[int, FloatArray], Mapping[str, float]]


def over_seeds(statistic: Statistic, seeds: Sequence[int], weights: FloatArray) -> dict[str, float]:
    """The mean of each measure over seeds; infinite where one of them never gets there."""
    rows = [statistic(seed, weights) for seed in seeds]
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


def bootstrap(
    statistic: Statistic, seeds: int, examples: int, samples: int, seed: int
) -> dict[str, tuple[float | None, float | None]]:
    """95 % percentile intervals over examples and training seeds, drawn independently with replacement.

    The same `seed` draws the same examples and seeds, so that intervals of different policies are paired. A bound is
    None where the statistic has none (a cost that is never reached).

    Args:
        statistic: of a training seed's number and of example weights (examples,), named measures.
        seeds: how many training seeds there are.
        examples: how many examples there are.
        samples: resamplings.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(examples, np.full(examples, 1 / examples), size=samples) / examples
    drawn = rng.integers(seeds, size=(samples, seeds))
    rows = [over_seeds(statistic, numbers.tolist(), row) for numbers, row in zip(drawn, weights, strict=True)]
    low, high = int(0.025 * samples), min(samples - 1, int(0.975 * samples))
    intervals = {}
    for name in rows[0]:
        ordered = np.sort([row[name] for row in rows])  # what is not a number comes last
        intervals[name] = (finite(ordered[low]), finite(ordered[high]))
    return intervals


def finite(value: float) -> float | None:
    """`value`, or None where JSON has no word for it."""
    return round(float(value), 6) if np.isfinite(value) else None
