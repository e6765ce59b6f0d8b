"""Measures of query-level agents over many splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
    values = measures(sweep, calls, weights)
    low, high = points[0][0], points[-1][0]
    line = area(points[[0, -1]], low, high) if high > low else float("nan")
    values["area_above_random"] = (values["deferral_area"] - line) / (high - low) if high > low else float("nan")
    values["peak_accuracy"] = float(points[1:-1, 1].max())
    return values


@dataclass(frozen=True)
class QueryResults:
    """What agents chose in every split of some outcomes.

    Attributes:
        name: what reports call the outcomes.
        outcomes: of all queries and models.
        splits: of them.
        routed: for each agent, and the oracle, its choices in each split.
    """

    name: str
    outcomes: QueryOutcomes
    splits: Sequence[Split]
    routed: Mapping[str, Sequence[Routed]]

    @cached_property
    def tests(self) -> list[QueryOutcomes]:
        """The outcomes that each split routes among."""
        return [self.outcomes.of(split.routed).rows(split.test) for split in self.splits]

    @cached_property
    def sweeps(self) -> dict[str, list[Sweep]]:
        """Each agent's sweep in each split."""
        return {
            name: [one.sweep(test) for one, test in zip(routed, self.tests, strict=True)]
            for name, routed in self.routed.items()
        }

    @cached_property
    def calls(self) -> dict[str, list[Sweep | None]]:
        """The same in calls of the dearer model; None in splits of more than two."""
        return {
            name: [one.calls(test) for one, test in zip(routed, self.tests, strict=True)]
            for name, routed in self.routed.items()
        }

    def even(self) -> FloatArray:
        """The same weight for every test query, (queries,)."""
        count = len(self.tests[0])
        return np.full(count, 1 / count)

    def measured(self, name: str, number: int, weights: FloatArray) -> dict[str, float]:
        """Measures of one agent in split `number`."""
        return measured(self.sweeps[name][number], self.calls[name][number], weights)

    def rows(self) -> list[dict[str, Any]]:
        """A row per split and agent, the contents of `results.jsonl`."""
        even = self.even()
        return [
            {
                "policy": name,
                "split": number,
                "models": list(split.routed),
                **{key: finite(value) for key, value in self.measured(name, number, even).items()},
            }
            for number, split in enumerate(self.splits)
            for name in sorted(self.routed)
        ]


def summarize_queries(results: QueryResults, first: str, samples: int = 300, seed: int = 0) -> dict[str, Any]:
    """The contents of `summary.json`: measures with 95 % intervals over splits and test queries, and comparisons.

    Args:
        results: what was chosen.
        first: the agent that the others are compared with.
        samples: of the bootstrap.
        seed: of its draws.
    """
    outcomes, even = results.outcomes, results.even()
    policies = _summarize_policies(results, first, samples, seed)
    ends = np.mean([sweep.points(even)[[0, -1], 1] for sweep in results.sweeps[first]], axis=0)
    return {
        "task": results.name,
        "pool": list(outcomes.models),
        "accuracy": dict(zip(outcomes.models, outcomes.correct.mean(0).tolist(), strict=True)),
        "price": dict(zip(outcomes.models, outcomes.costs.mean(0).tolist(), strict=True)),
        "split": "test",
        "splits": len(results.splits),
        "examples": len(even),
        "first": first,
        "models": {
            "slm": {"cost": 0.0, "accuracy": float(ends[0])},
            "llm": {"cost": 1.0, "accuracy": float(ends[1])},
        },
        "limits": {"oracle": {"curve": policies["oracle"]["curve"]}},
        "policies": policies,
    }


def _summarize_policies(results: QueryResults, first: str, samples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Measures of every agent, its differences from the first, and its curve."""
    even, splits = results.even(), len(results.splits)

    def statistic(number: int, weights: FloatArray) -> dict[str, float]:
        by_agent = {name: results.measured(name, number, weights) for name in results.routed}
        values = {}
        for name, measures_of in by_agent.items():
            for measure, value in measures_of.items():
                values[_key(name, measure)] = value
                values[_key(name, measure, less=True)] = value - by_agent[first][measure]
        return values

    values = over_seeds(statistic, range(splits), even)
    # one resampling for all: what is compared is paired
    intervals = bootstrap(statistic, splits, len(even), samples, seed)
    measures_of_all = list(results.measured(first, 0, even))

    def named(name: str, less: bool) -> dict[str, dict[str, Any]]:
        keys = {measure: _key(name, measure, less) for measure in measures_of_all}
        return {measure: {"value": finite(values[key]), "interval": intervals[key]} for measure, key in keys.items()}

    summaries = {}
    for name, sweeps in results.sweeps.items():
        # the pools of the splits cost differently: their curves are laid over each other by their ends
        above_cheapest = [replace(sweep, costs=sweep.costs - sweep.costs[0]) for sweep in sweeps]
        summaries[name] = {
            "trained": True,
            "measures": named(name, less=False),
            f"less_{first}": named(name, less=True),
            "curve": mean_curve(above_cheapest, even),
            "band": band(above_cheapest, min(samples, BAND_SAMPLES), seed),
        }
    return summaries


def _key(name: str, measure: str, less: bool = False) -> str:
    """What the bootstrap calls a measure of an agent, or that less the first agent's."""
    return f"{name} less {measure}" if less else f"{name} {measure}"
