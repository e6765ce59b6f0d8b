"""From outcomes to what is reported: measures with intervals over examples and seeds, comparisons and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.arrays import FloatArray
from experiments.evaluation.answers import Answers, sweep
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.metrics import (
    LEVELS,
    Sweep,
    above_random,
    accuracy_at,
    bootstrap,
    comparison,
    cost_at,
    finite,
    measures,
    monotone_hull,
    over_price,
    over_seeds,
)

BAND_POINTS, BAND_SAMPLES = 40, 200


@dataclass(frozen=True)
class Results:
    """All that an evaluation measured.

    Attributes:
        about: task, pool, split and their like.
        limits: each model alone, random routing and the oracle.
        policies: for each policy, for each training seed, the outcomes at each threshold.
        trained: which policies were trained.
    """

    about: Mapping[str, Any]
    limits: Baselines
    policies: Mapping[str, Sequence[Sequence[Answers]]]
    trained: frozenset[str]

    def sweep(self, runs: Sequence[Answers], unit: str) -> Sweep:
        """Some runs between the two ends every policy has."""
        return sweep(runs, self.limits.slm, self.limits.llm, unit)

    def sweeps(self, name: str, unit: str) -> list[Sweep]:
        """A policy's sweep for each training seed."""
        return [self.sweep(runs, unit) for runs in self.policies[name]]


def summarize(results: Results, unit: str, samples: int, seed: int) -> dict[str, Any]:
    """The contents of `summary.json`.

    Args:
        results: what was measured.
        unit: of costs that curves and comparisons are in.
        samples: of the bootstrap.
        seed: of its draws.
    """
    limits = results.limits
    count = len(limits.slm.correct)
    even = np.full(count, 1 / count)
    in_unit = {name: results.sweeps(name, unit) for name in results.policies}
    calls = {name: results.sweeps(name, "llm_tokens") for name in results.policies}
    first = next(iter(results.policies))
    random = results.sweep(limits.random, unit)
    oracle = results.sweep(limits.frontier(unit), unit) if limits.oracle else None
    summaries: dict[str, Any] = {}
    for name, sweeps in in_unit.items():
        seeds = len(sweeps)

        def own(number: int, weights: FloatArray, name: str = name) -> dict[str, float]:
            found = measures(in_unit[name][number], calls[name][number], weights)
            found |= above_random(in_unit[name][number], random, oracle, weights)
            if limits.speculative is not None:
                found |= over_price(found, limits.speculative.costs[unit], limits.llm.costs[unit], weights)
            return found

        def above(number: int, weights: FloatArray, name: str = name) -> dict[str, float]:
            # seeds are paired as far as they go; one that is not trained has one
            other = in_unit[first][number % len(in_unit[first])]
            return comparison(in_unit[name][number], other, weights)

        values = over_seeds(own, range(seeds), even)
        intervals = bootstrap(own, seeds, count, samples, seed)
        against = over_seeds(above, range(seeds), even)
        against_intervals = bootstrap(above, seeds, count, samples, seed)
        summaries[name] = {
            "trained": name in results.trained,
            "seeds": seeds,
            "cost_at": {f"{level:.2f}": finite(values[f"cost_at_{level:.2f}"]) for level in LEVELS},
            "cost_at_interval": {f"{level:.2f}": intervals[f"cost_at_{level:.2f}"] for level in LEVELS},
            "cost_at_by_unit": {other: _costs_at(results.sweeps(name, other), even) for other in limits.slm.costs},
            "measures": {key: {"value": finite(values[key]), "interval": intervals[key]} for key in values},
            f"against_{first}": {
                key: {"value": finite(against[key]), "interval": against_intervals[key]} for key in against
            },
            "curve": mean_curve(sweeps, even),
            "band": band(sweeps, min(samples, BAND_SAMPLES), seed),
        }
    rows = {"slm": limits.slm.row(limits.llm), "llm": limits.llm.row(limits.llm)}
    return {
        **results.about,
        "cost": unit,
        "examples": count,
        "first": first,
        "models": {name: {"accuracy": row["accuracy"], "cost": row[f"cost_{unit}"]} for name, row in rows.items()},
        "limits": _limits(results, unit, even),
        "policies": summaries,
    }


def _limits(results: Results, unit: str, weights: FloatArray) -> dict[str, Any]:
    """Curve and costs of random routing and of the oracles, and how many of its searches were cut short."""
    limits = results.limits
    runs = {"random": limits.random, "query_oracle": limits.query_frontier(unit)}
    runs |= {"oracle": limits.frontier(unit)} if limits.oracle else {}
    found: dict[str, Any] = {
        name: {
            "curve": mean_curve([results.sweep(some, unit)], weights),
            "cost_at_by_unit": {
                other: _costs_at([results.sweep(some, other)], weights)
                for other in limits.slm.costs
                if other != "seconds"  # the oracle's answers are not timed
            },
        }
        for name, some in runs.items()
    }
    if limits.speculative is not None:
        found["speculative"] = limits.speculative.row(limits.llm)
    if limits.oracle:
        found["oracle"] |= {
            "solved": float(limits.oracle.correct.mean()),
            "ran_out_of_budget": limits.exhausted,
            "llm_share": round(float(limits.oracle.llm_tokens.sum() / limits.oracle.tokens.sum()), 6),
        }
    return found


def _costs_at(sweeps: Sequence[Sweep], weights: FloatArray) -> dict[str, float | None]:
    found = {}
    for level in LEVELS:
        costs = [
            cost_at(monotone_hull(points), level * points[-1, 1]) for points in (one.points(weights) for one in sweeps)
        ]
        found[f"{level:.2f}"] = finite(float(np.mean(costs)))
    return found


def mean_curve(sweeps: Sequence[Sweep], weights: FloatArray) -> list[list[float]]:
    """The hull of one seed; over several, the mean accuracy at every cost of theirs that all of them reach down to."""
    hulls = [monotone_hull(one.points(weights)) for one in sweeps]
    costs = np.unique(np.concatenate([hull[:, 0] for hull in hulls]))
    costs = costs[costs >= max(hull[0, 0] for hull in hulls)]
    accuracies = np.mean([np.interp(costs, hull[:, 0], hull[:, 1]) for hull in hulls], axis=0)
    return [[round(float(c), 6), round(float(a), 6)] for c, a in zip(costs, accuracies, strict=True)]


def band(sweeps: Sequence[Sweep], samples: int, seed: int) -> list[list[float | None]]:
    """Cost, and the 95 % interval of the accuracy there."""
    count = sweeps[0].correct.shape[1]
    even = np.full(count, 1 / count)
    lowest = max(monotone_hull(one.points(even))[0, 0] for one in sweeps)
    grid = np.linspace(lowest, 1, BAND_POINTS)
    at = {f"{cost:.9f}": cost for cost in grid}

    def statistic(number: int, weights: FloatArray) -> dict[str, float]:
        hull = monotone_hull(sweeps[number].points(weights))
        return {name: accuracy_at(hull, max(cost, hull[0, 0])) for name, cost in at.items()}

    intervals = bootstrap(statistic, len(sweeps), count, samples, seed)
    return [[round(float(cost), 6), *intervals[name]] for name, cost in at.items()]
