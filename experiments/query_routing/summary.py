"""Measures of query-level agents over many splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from agents.common.curves import Sweep
from agents.query_routing.outcomes import QueryOutcomes
from envs.arrays import FloatArray
from experiments.evaluation.summary import band, mean_curve
from experiments.measures.intervals import estimates, resampled
from experiments.measures.metrics import finite, measures
from experiments.query_routing.splits import Routed, Split


def measured(sweep: Sweep, calls: Sweep | None, weights: FloatArray) -> dict[str, FloatArray]:
    """`experiments.measures.metrics.measures` of one agent in one split.

    Also peak_accuracy: the best the agent itself reaches at any cost weight.
    """
    return {
        **measures(sweep, calls, weights),
        "peak_accuracy": sweep.points(weights)[..., 1:-1, 1].max(-1),
    }


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

    def measured(self, name: str, weights: FloatArray) -> list[dict[str, FloatArray]]:
        """Measures of one agent in each split, for weights (..., queries)."""
        return [
            measured(sweep, calls, weights) for sweep, calls in zip(self.sweeps[name], self.calls[name], strict=True)
        ]

    def rows(self) -> list[dict[str, Any]]:
        """A row per split and agent, the contents of `results.jsonl`."""
        of = {name: self.measured(name, self.even()) for name in self.routed}
        return [
            {
                "policy": name,
                "split": number,
                "models": list(split.routed),
                **{key: finite(float(value)) for key, value in of[name][number].items()},
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
    weights = resampled(len(results.even()), samples, seed)
    measured_of = {name: results.measured(name, weights) for name in results.routed}
    summaries = {}
    for name, sweeps in results.sweeps.items():
        # splits are the same for all agents: differences are taken in each of them
        apart = [
            {key: ours[key] - theirs[key] for key in ours}
            for ours, theirs in zip(measured_of[name], measured_of[first], strict=True)
        ]
        # the pools of the splits cost differently: their curves are laid over each other by their ends
        above_cheapest = [replace(sweep, costs=sweep.costs - sweep.costs[0]) for sweep in sweeps]
        summaries[name] = {
            "trained": True,
            "measures": {key: one.described() for key, one in estimates(measured_of[name]).items()},
            f"less_{first}": {key: one.described() for key, one in estimates(apart).items()},
            "curve": mean_curve(above_cheapest, weights[0]),
            "band": band(above_cheapest, weights),
        }
    return summaries
