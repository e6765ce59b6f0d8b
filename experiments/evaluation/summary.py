"""From answers to what is reported: measures with intervals over examples and seeds, comparisons and curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agents.common.curves import Hull, Sweep
from envs.arrays import FloatArray
from experiments.evaluation.answers import Answered, Answers, sweep
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.operating_points import OperatingPoint, Tried, operating_points
from experiments.measures.intervals import Estimate, described, estimates, resampled
from experiments.measures.metrics import (
    COSTS,
    LEVELS,
    finite,
    measures,
    oracle_share,
    over_price,
)

BAND_POINTS, BAND_SAMPLES = 40, 200
PUBLISHED = "citer"
"""The agent that the paper compares with its rivals: where it is there, the others are compared with it too."""


@dataclass(frozen=True)
class Front:
    """Several settings of an agent as one policy, which is used at the thresholds of all of them.

    Attributes:
        owners: for each training seed that the settings share, the policy that each run is of.
        runs: for each of these seeds, the answers at each threshold of each setting.
        validated: the same on validation problems; None where that is not known.
    """

    owners: Sequence[Sequence[str]]
    runs: Answered
    validated: Sequence[Tried] | None = None


@dataclass(frozen=True)
class Results:
    """All that an evaluation measured.

    Attributes:
        about: task, pool, split and their like.
        baselines: each model alone, speculative decoding and the oracle.
        policies: for each policy, for each training seed, the answers at each threshold.
        validated: the same on validation problems, at the thresholds that were tried there, by which operating points
            are chosen; without policies for which that is not known.
        trained: which policies were trained.
        thresholds: for each policy, for each training seed, the thresholds.
        fronts: of agents that were trained with several settings, by agent.
    """

    about: Mapping[str, Any]
    baselines: Baselines
    policies: Mapping[str, Answered]
    trained: frozenset[str]
    thresholds: Mapping[str, Sequence[Sequence[float]]]
    fronts: Mapping[str, Front] = field(default_factory=dict)
    validated: Mapping[str, Sequence[Tried]] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """The policy that the others are compared with."""
        return next(iter(self.policies))

    def sweep(self, runs: Sequence[Answers], unit: str) -> Sweep:
        """Some runs between the two ends every policy has."""
        return sweep(runs, self.baselines.slm, self.baselines.llm, unit)

    @property
    def units(self) -> list[str]:
        """Of all costs that are known."""
        return list(self.baselines.slm.costs)

    @property
    def even(self) -> FloatArray:
        """The same weight for every example, (examples,)."""
        count = len(self.baselines.slm.correct)
        return np.full(count, 1 / count)

    def sweeps_of(self, seeds: Answered, unit: str) -> list[Sweep]:
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
    weights = resampled(len(baselines.slm.correct), samples, seed)

    def points(name: str, answers: Answered, validated: Sequence[Tried] | None) -> dict[str, OperatingPoint]:
        if validated is None:
            return {}
        return operating_points(baselines, answers, validated, results.thresholds.get(name), unit, weights)

    measured = {
        name: (_measured(results, seeds, unit, weights), points(name, seeds, results.validated.get(name)))
        for name, seeds in results.policies.items()
    }
    least = cheapest({name: own for name, (own, _) in measured.items()})
    compared_with = [name for name in dict.fromkeys((results.first, least, PUBLISHED)) if name in measured]

    def summarized(
        own: Mapping[str, Estimate], chosen: Mapping[str, OperatingPoint], answers: Answered
    ) -> dict[str, Any]:
        return {
            **_summarize_policy(results, own, answers, unit, weights),
            "operating_points": {level: point.described() for level, point in chosen.items()},
            **{
                f"against_{other}": _compared(own, measured[other][0])
                | _compared_points(chosen, measured[other][1], f"cost_{unit}")
                for other in compared_with
            },
        }

    policies = {
        name: {"trained": name in results.trained, **summarized(*measured[name], seeds)}
        for name, seeds in results.policies.items()
    }
    fronts = {
        agent: {
            "trained": front.owners[0][0] in results.trained,
            "settings": list(dict.fromkeys(front.owners[0])),
            "on_front": _on_front(results, front, unit),
            **summarized(
                _measured(results, front.runs, unit, weights), points("", front.runs, front.validated), front.runs
            ),
        }
        for agent, front in results.fronts.items()
    }
    rows = {"slm": baselines.slm.row(baselines.llm), "llm": baselines.llm.row(baselines.llm)}
    return {
        **results.about,
        "cost": unit,
        "examples": len(baselines.slm.correct),
        "first": results.first,
        "cheapest": least,
        "models": {name: {"accuracy": row["accuracy"], "cost": row[f"cost_{unit}"]} for name, row in rows.items()},
        "limits": _summarize_baselines(results, unit),
        "policies": policies,
        "thresholds": {name: [list(seed) for seed in seeds] for name, seeds in results.thresholds.items()},
        **({"fronts": fronts} if fronts else {}),
        "notes": _notes(results, policies, fronts),
    }


def cheapest(measured: Mapping[str, Mapping[str, Estimate]]) -> str:
    """The policy whose hull is cheapest at 95 % of the LLM's accuracy."""
    return min(measured, key=lambda name: measured[name]["cost_at_0.95"].value)


def _summarize_policy(
    results: Results, own: Mapping[str, Estimate], answers: Answered, unit: str, weights: FloatArray
) -> dict[str, Any]:
    """Measures of one policy, or of a front, with intervals; its curve and its costs in all units."""
    sweeps = results.sweeps_of(answers, unit)
    values = {
        key: described(one.value, one.cost_interval()) if key.startswith("cost_at_") else one.described()
        for key, one in own.items()
    }
    return {
        "seeds": len(sweeps),
        "cost_at": {f"{level:.2f}": values[f"cost_at_{level:.2f}"]["value"] for level in LEVELS},
        "cost_at_interval": {f"{level:.2f}": values[f"cost_at_{level:.2f}"]["interval"] for level in LEVELS},
        "cost_at_by_unit": {other: _costs_at(results.sweeps_of(answers, other), weights[0]) for other in results.units},
        "measures": _explained(values, results),
        "curve": mean_curve(sweeps, weights[0]),
        "band": band(sweeps, weights),
    }


def _measured(results: Results, answers: Answered, unit: str, weights: FloatArray) -> dict[str, Estimate]:
    """All that is measured of one policy's curve, by name."""
    baselines = results.baselines
    oracle = results.sweep(baselines.frontier(unit), unit) if baselines.oracle else None

    def of_seed(sweep: Sweep, calls: Sweep) -> dict[str, FloatArray]:
        values = measures(sweep, calls, weights)
        if oracle is not None:
            values["oracle_share"] = oracle_share(sweep, oracle, weights)
        if baselines.speculative is not None:
            values |= over_price(values, baselines.speculative.costs[unit], baselines.llm.costs[unit], weights)
        return values

    calls = results.sweeps_of(answers, "llm_tokens")
    return estimates(list(map(of_seed, results.sweeps_of(answers, unit), calls)))


def _compared(ours: Mapping[str, Estimate], theirs: Mapping[str, Estimate]) -> dict[str, dict[str, Any]]:
    """A policy beside another one, paired: ratios of costs, what is saved, and accuracies gained at fixed costs."""
    compared = {}
    for level in (f"{level:.2f}" for level in LEVELS):
        ratio, (low, high) = ours[f"cost_at_{level}"].over(theirs[f"cost_at_{level}"])
        compared[f"ratio_at_{level}"] = described(ratio, (low, high))
        saved = (None if high is None else finite(1 - high), None if low is None else finite(1 - low))
        compared[f"saving_at_{level}"] = described(1 - ratio, saved)
    for cost in (f"{cost:.2f}" for cost in COSTS):
        compared[f"gain_at_{cost}"] = described(*ours[f"accuracy_at_{cost}"].less(theirs[f"accuracy_at_{cost}"]))
    compared["aiq_gain"] = described(*ours["aiq"].less(theirs["aiq"]))
    return compared


def _compared_points(
    ours: Mapping[str, OperatingPoint], theirs: Mapping[str, OperatingPoint], cost: str
) -> dict[str, dict[str, Any]]:
    """A policy's cost at its operating points beside another one's, paired: ratios by level."""
    return {
        f"chosen_ratio_at_{level}": described(*point.measured[cost].over(theirs[level].measured[cost]))
        for level, point in ours.items()
        if level in theirs
    }


def _on_front(results: Results, front: Front, unit: str) -> list[str]:
    """The settings that the front is made of, for any seed: those with a vertex of its hull."""
    even, on_front = results.even, set()
    for owners, one in zip(front.owners, results.sweeps_of(front.runs, unit), strict=True):
        points = one.points(even)
        hull = {tuple(point) for point in Hull.of(points).vertices.tolist()}
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
    if results.validated and results.about.get("split") == "validation":
        notes.append("Operating points were chosen on the problems of this split: they say nothing of others.")
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


def _summarize_baselines(results: Results, unit: str) -> dict[str, Any]:
    """Curve and costs of a coin per query and of the oracles, and how many of its searches were cut short."""
    baselines, even = results.baselines, results.even
    runs: dict[str, Sequence[Answers]] = {"line": (), "query_oracle": baselines.query_frontier(unit)}
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


def _costs_at(sweeps: Sequence[Sweep], weights: FloatArray) -> dict[str, float | None]:
    """Costs at shares of the LLM's accuracy, means over seeds."""
    curves = [one.points(weights) for one in sweeps]
    hulls = [(Hull.of(points), points[-1, 1]) for points in curves]
    return {
        f"{level:.2f}": finite(float(np.mean([hull.cost_at(level * accuracy) for hull, accuracy in hulls])))
        for level in LEVELS
    }


def mean_curve(sweeps: Sequence[Sweep], weights: FloatArray) -> list[list[float]]:
    """The hull of one seed; over several, the mean accuracy at every cost of theirs that all of them reach down to."""
    hulls = [Hull.of(one.points(weights)) for one in sweeps]
    costs = np.unique(np.concatenate([hull.vertices[:, 0] for hull in hulls]))
    costs = costs[costs >= max(hull.costs[0] for hull in hulls)]
    return [[round(float(c), 6), round(float(np.mean([hull.accuracy_at(c) for hull in hulls])), 6)] for c in costs]


def band(sweeps: Sequence[Sweep], weights: FloatArray) -> list[list[float | None]]:
    """Cost, and the 95 % interval of the hull's accuracy there, each by itself.

    Args:
        sweeps: of each training seed.
        weights: of the examples, as `resampled` gives them; the first BAND_SAMPLES draws are used.
    """
    some = weights[: 1 + BAND_SAMPLES]
    hulls = [Hull.of(one.points(some)) for one in sweeps]
    lowest = max(hull.costs[0, 0] for hull in hulls)
    rows: list[list[float | None]] = []
    for cost in np.linspace(lowest, 1, BAND_POINTS):
        at = np.stack([hull.accuracy_at(np.maximum(cost, hull.costs[:, 0])) for hull in hulls])
        rows.append([round(float(cost), 6), *Estimate(at).share_interval(weights.shape[1])])
    return rows
