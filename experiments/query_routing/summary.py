"""Measures of query-level agents over many splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from agents.query_routing.outcomes import QueryOutcomes
from envs.arrays import FloatArray
from experiments.evaluation.metrics import Sweep, area, bootstrap, finite, measures, over_seeds
from experiments.evaluation.summary import BAND_SAMPLES, band, mean_curve
from experiments.query_routing.splits import Routed, Split


def measured(sweep: Sweep, calls: Sweep | None, weights: FloatArray) -> dict[str, float]:
    """`experiments.evaluation.metrics.measures` of one agent in one split.

    Also area_above_random: of the deferral curve above the line between the two ends. peak_accuracy: the best the agent
    itself reaches at any cost weight.
    """
    points = sweep.points(weights)
    found = measures(sweep, calls, weights)
    low, high = points[0][0], points[-1][0]
    line = area(points[[0, -1]], low, high) if high > low else float("nan")
    found["area_above_random"] = (found["deferral_area"] - line) / (high - low) if high > low else float("nan")
    found["peak_accuracy"] = float(points[1:-1, 1].max())
    return found


def summarize_queries(
    name: str,
    outcomes: QueryOutcomes,
    splits: Sequence[Split],
    routed: Mapping[str, Sequence[Routed]],
    first: str,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The contents of `summary.json`: measures with 95 % intervals over splits and test queries, and comparisons."""
    tests = [outcomes.of(split.routed).rows(split.test) for split in splits]
    count = len(tests[0])
    even = np.full(count, 1 / count)
    sweeps = {key: [one.sweep(test) for one, test in zip(some, tests, strict=True)] for key, some in routed.items()}
    calls = {key: [one.calls(test) for one, test in zip(some, tests, strict=True)] for key, some in routed.items()}

    def statistic(number: int, weights: FloatArray) -> dict[str, float]:
        found = {key: measured(sweeps[key][number], calls[key][number], weights) for key in routed}
        own = {f"{key} {measure}": value for key in routed for measure, value in found[key].items()}
        less = {
            f"{key} less {measure}": value - found[first][measure]
            for key in routed
            for measure, value in found[key].items()
        }
        return own | less

    values = over_seeds(statistic, range(len(splits)), even)
    # one resampling for all: what is compared is paired
    intervals = bootstrap(statistic, len(splits), count, samples, seed)

    def named(prefix: str) -> dict[str, dict[str, Any]]:
        measures_of = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
        return {
            measure: {"value": finite(values[prefix + measure]), "interval": intervals[prefix + measure]}
            for measure in measures_of
            if " " not in measure
        }

    # the pools of the splits cost differently: their curves are laid over each other by their ends
    above_cheapest = {
        key: [replace(sweep, costs=sweep.costs - sweep.costs[0]) for sweep in some] for key, some in sweeps.items()
    }
    policies = {
        key: {
            "trained": True,
            "measures": named(f"{key} "),
            f"less_{first}": named(f"{key} less "),
            "curve": mean_curve(above_cheapest[key], even),
            "band": band(above_cheapest[key], min(samples, BAND_SAMPLES), seed),
        }
        for key in routed
    }
    accuracies = np.mean([sweep.points(even)[[0, -1], 1] for sweep in sweeps[first]], axis=0)
    return {
        "task": name,
        "pool": list(outcomes.models),
        "accuracy": dict(zip(outcomes.models, outcomes.correct.mean(0).tolist(), strict=True)),
        "price": dict(zip(outcomes.models, outcomes.costs.mean(0).tolist(), strict=True)),
        "split": "test",
        "splits": len(splits),
        "examples": count,
        "first": first,
        "models": {
            key: {"cost": cost, "accuracy": float(accuracy)}
            for key, cost, accuracy in zip(("slm", "llm"), (0.0, 1.0), accuracies, strict=True)
        },
        "limits": {"oracle": {"curve": policies["oracle"]["curve"]}},
        "policies": policies,
    }
