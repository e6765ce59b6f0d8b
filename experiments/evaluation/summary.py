"""From answers to what is reported: measures with intervals over examples and seeds, comparisons and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
class Front:
    """Several settings of an agent as one policy, which is used at the thresholds of all of them.

    Attributes:
        owners: for each training seed that the settings share, the policy that each run is of.
        runs: for each of these seeds, the answers at each threshold of each setting.
    """

    owners: Sequence[Sequence[str]]
    runs: Sequence[Sequence[Answers]]


@dataclass(frozen=True)
class Results:
    """All that an evaluation measured.

    Attributes:
        about: task, pool, split and their like.
        baselines: each model alone, random routing, speculative decoding and the oracle.
        policies: for each policy, for each training seed, the answers at each threshold.
        trained: which policies were trained.
        thresholds: for each policy, for each training seed, the thresholds.
        fronts: of agents that were trained with several settings, by agent.
    """

    about: Mapping[str, Any]
    baselines: Baselines
    policies: Mapping[str, Sequence[Sequence[Answers]]]
    trained: frozenset[str]
    thresholds: Mapping[str, Sequence[Sequence[float]]]
    fronts: Mapping[str, Front] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The policy that the others are compared with."""
        return next(iter(self.policies))

    def sweep(self, runs: Sequence[Answers], unit: str) -> Sweep:
        """Some runs between the two ends every policy has."""
        return sweep(runs, self.baselines.slm, self.baselines.llm, unit)

    def sweeps(self, name: str, unit: str) -> list[Sweep]:
        """A policy's sweep for each training seed."""
        return self.sweeps_of(self.policies[name], unit)

    def sweeps_of(self, seeds: Sequence[Sequence[Answers]], unit: str) -> list[Sweep]:
        """The sweep of each training seed."""
        return [self.sweep(runs, unit) for runs in seeds]


def summarize(results: Results, unit: str = "bytes", samples: int = 1000, seed: int = 0) -> dict[str, Any]:
    """The contents of `summary.json`.

    Args:
        results: what was measured.
        unit: of costs that curves and comparisons are in.
        samples: of the bootstrap.
        seed: of its draws.
    """
    baselines = results.baselines

    def summarized(seeds: Sequence[Sequence[Answers]], trained: bool) -> dict[str, Any]:
        return {"trained": trained, **_summarize_policy(results, seeds, unit, samples, seed)}

    policies = {name: summarized(seeds, name in results.trained) for name, seeds in results.policies.items()}
    fronts = {
        agent: {
            "settings": list(dict.fromkeys(front.owners[0])),
            "on_front": _on_front(results, front, unit),
            **summarized(front.runs, front.owners[0][0] in results.trained),
        }
        for agent, front in results.fronts.items()
    }
    rows = {"slm": baselines.slm.row(baselines.llm), "llm": baselines.llm.row(baselines.llm)}
    return {
        **results.about,
        "cost": unit,
        "examples": len(baselines.slm.correct),
        "first": results.first,
        "models": {name: {"accuracy": row["accuracy"], "cost": row[f"cost_{unit}"]} for name, row in rows.items()},
        "limits": _summarize_baselines(results, unit),
        "policies": policies,
        "thresholds": {name: [list(seed) for seed in seeds] for name, seeds in results.thresholds.items()},
        **({"fronts": fronts} if fronts else {}),
        "notes": _notes(results, policies, fronts),
    }


def _summarize_policy(
    results: Results, answers: Sequence[Sequence[Answers]], unit: str, samples: int, seed: int
) -> dict[str, Any]:
    """Measures of one policy and its comparison with the first, both with intervals; its curve and costs."""
    baselines = results.baselines
    sweeps, calls = results.sweeps_of(answers, unit), results.sweeps_of(answers, "llm_tokens")
    others = results.sweeps(results.first, unit)
    random = results.sweep(baselines.random, unit)
    oracle = results.sweep(baselines.frontier(unit), unit) if baselines.oracle else None

    def own(number: int, weights: FloatArray) -> dict[str, float]:
        values = measures(sweeps[number], calls[number], weights)
        values |= above_random(sweeps[number], random, oracle, weights)
        if baselines.speculative is not None:
            values |= over_price(values, baselines.speculative.costs[unit], baselines.llm.costs[unit], weights)
        return values

    def above(number: int, weights: FloatArray) -> dict[str, float]:
        # seeds are paired as far as they go; one that is not trained has one
        return comparison(sweeps[number], others[number % len(others)], weights)

    seeds, even = len(sweeps), _even(baselines)
    values = over_seeds(own, range(seeds), even)
    intervals = bootstrap(own, seeds, len(even), samples, seed)
    against = over_seeds(above, range(seeds), even)
    against_intervals = bootstrap(above, seeds, len(even), samples, seed)
    return {
        "seeds": seeds,
        "cost_at": {f"{level:.2f}": finite(values[f"cost_at_{level:.2f}"]) for level in LEVELS},
        "cost_at_interval": {f"{level:.2f}": intervals[f"cost_at_{level:.2f}"] for level in LEVELS},
        "cost_at_by_unit": {other: _costs_at(results.sweeps_of(answers, other), even) for other in baselines.slm.costs},
        "measures": _explained(with_intervals(values, intervals), results),
        f"against_{results.first}": with_intervals(against, against_intervals),
        "curve": mean_curve(sweeps, even),
        "band": band(sweeps, min(samples, BAND_SAMPLES), seed),
    }


def _on_front(results: Results, front: Front, unit: str) -> list[str]:
    """The settings that the front is made of, for any seed: no cheaper point matches or beats one of theirs."""
    even, on_front = _even(results.baselines), set()
    for owners, one in zip(front.owners, results.sweeps_of(front.runs, unit), strict=True):
        points = one.points(even)
        hull = {tuple(point) for point in monotone_hull(points).tolist()}
        on_front |= {owner for owner, point in zip(owners, points[1:-1].tolist(), strict=True) if tuple(point) in hull}
    return [name for name in dict.fromkeys(front.owners[0]) if name in on_front]


def _explained(measured: dict[str, dict[str, Any]], results: Results) -> dict[str, dict[str, Any]]:
    """Measures in which no policy is given more than all of the oracle's area: that is no limit then, and is said."""
    share = measured.get("oracle_share", {}).get("value")
    if share is None or share <= 1:
        return measured
    why = (
        "its search ran out of budget, so that it is no limit here; raise oracle_budget"
        if results.baselines.exhausted
        else "it looks for the fewest LLM tokens, which is no limit of other costs"
    )
    return {**measured, "oracle_share": {"value": None, "interval": (None, None), "why": why}}


def _notes(
    results: Results, policies: Mapping[str, Mapping[str, Any]], fronts: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """What must be known to read the table."""
    baselines = results.baselines
    notes = [f"On the front of {agent}: {'; '.join(front['on_front']) or 'none'}." for agent, front in fronts.items()]
    if baselines.exhausted:
        notes.append(ran_out(baselines))
    shares = {name: policy["measures"].get("oracle_share", {}) for name, policy in {**policies, **fronts}.items()}
    above = [name for name, share in shares.items() if "why" in share]
    if above:
        notes.append(
            f"More than the oracle's area (n/a): {', '.join(above)}. Of the oracle: {shares[above[0]]['why']}."
        )
    return notes


def ran_out(baselines: Baselines) -> str:
    """That searches of the oracle were cut short, and how many."""
    return (
        f"The oracle's search ran out of its budget on {baselines.exhausted} of {len(baselines.slm.correct)} problems: "
        "there may be cheaper right answers to them, or one at all; raise oracle_budget."
    )


def with_intervals(
    values: Mapping[str, float], intervals: Mapping[str, tuple[float | None, float | None]]
) -> dict[str, dict[str, Any]]:
    """Each value beside its interval, as summaries hold them."""
    return {key: {"value": finite(value), "interval": intervals[key]} for key, value in values.items()}


def _summarize_baselines(results: Results, unit: str) -> dict[str, Any]:
    """Curve and costs of random routing and of the oracles, and how many of its searches were cut short."""
    baselines, even = results.baselines, _even(results.baselines)
    runs = {"random": baselines.random, "query_oracle": baselines.query_frontier(unit)}
    runs |= {"oracle": baselines.frontier(unit)} if baselines.oracle else {}
    summaries: dict[str, Any] = {
        name: {
            "curve": mean_curve([results.sweep(some, unit)], even),
            "cost_at_by_unit": {
                other: _costs_at([results.sweep(some, other)], even)
                for other in baselines.slm.costs
                if other != "seconds"  # the oracle's answers are not timed
            },
        }
        for name, some in runs.items()
    }
    if baselines.speculative is not None:
        summaries["speculative"] = baselines.speculative.row(baselines.llm)
    if baselines.oracle:
        summaries["oracle"] |= {
            "solved": float(baselines.oracle.correct.mean()),
            "ran_out_of_budget": baselines.exhausted,
            "llm_share": round(float(baselines.oracle.llm_tokens.sum() / baselines.oracle.tokens.sum()), 6),
        }
    return summaries


def _even(baselines: Baselines) -> FloatArray:
    """The same weight for every example, (examples,)."""
    count = len(baselines.slm.correct)
    return np.full(count, 1 / count)


def _costs_at(sweeps: Sequence[Sweep], weights: FloatArray) -> dict[str, float | None]:
    """Costs at shares of the LLM's accuracy, means over seeds."""
    curves = [one.points(weights) for one in sweeps]
    hulls = [(monotone_hull(points), points[-1, 1]) for points in curves]
    return {
        f"{level:.2f}": finite(float(np.mean([cost_at(hull, level * accuracy) for hull, accuracy in hulls])))
        for level in LEVELS
    }


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
