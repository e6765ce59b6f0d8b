"""The tables of a leaderboard's page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.reporting.figures import BASELINE_NAMES
from experiments.reporting.paper import LEVEL
from experiments.reporting.tables import markdown_table, measured, number, with_interval

Summary = Mapping[str, Any]


@dataclass(frozen=True)
class HowMade:
    """What the page says of how it was made.

    Attributes:
        machine: processor, cores and versions, as `experiments.common.timing.machine` gives them.
        runs_made_on: for each run the machine and the commit that made it.
        seeds: of training.
        more_seeds: some agents have others besides.
        training: what each agent had for it: problems, features, parameters, LLM tokens, minutes.
        further: agents in a table of their own.
        train: overrides of every run.
        departures: overrides of some agents' runs, by agent.
        latency: what `experiments.speed suite=latency` measured, by name; empty where it did not.
        title: of the page.
        command: that makes it.
    """

    machine: Mapping[str, Any]
    runs_made_on: Sequence[Mapping[str, Any]]
    seeds: Sequence[int]
    more_seeds: bool
    training: Mapping[str, Mapping[str, Any]]
    further: Sequence[str]
    train: Sequence[str]
    departures: Mapping[str, Sequence[str]]
    latency: Mapping[str, float]
    title: str
    command: str


def ranked(summary: Summary, but: Sequence[str] = ()) -> list[str]:
    """Policies but for some, by their cost at 95 % of the LLM's accuracy, those that never reach it last."""
    costs = {name: policy["cost_at"][LEVEL] for name, policy in summary["policies"].items() if name not in but}
    return sorted(costs, key=lambda name: (costs[name] is None, costs[name] or 0.0))


def seconds_key(name: str) -> str:
    """What the suite `latency` calls the seconds of a policy."""
    return f"{name}_seconds_over_llm_only"


def headline(summary: Summary, seconds: Mapping[str, float | None] | None, latency: Mapping[str, float]) -> str:
    """The first policy, the cheapest, speculative decoding and a coin per query, in every unit."""

    def alone(name: str) -> list[str]:
        value = latency.get(seconds_key(name))
        return ["" if value is None else number(value)] if latency else []

    def batches(name: str) -> list[str]:
        return [] if seconds is None else [number(seconds[name]) if name in seconds else ""]

    units = ("bytes", "flops", "llm_tokens", "dollars")
    rows = []
    for name in dict.fromkeys((summary["first"], summary["cheapest"])):
        costs = summary["policies"][name]["cost_at_by_unit"]
        rows.append([name, *(number(costs[unit][LEVEL]) for unit in units), *alone(name), *batches(name)])
    for name in ("speculative", "line"):
        limit = summary["limits"].get(name)
        if limit is not None:
            costs = limit.get("cost_at_by_unit")
            values = [limit[f"cost_{unit}"] if costs is None else costs[unit][LEVEL] for unit in units]
            rows.append([f"*{BASELINE_NAMES[name]}*", *map(number, values), *alone(name), *batches("")])
    timed = [*(["seconds, batch 1"] if latency else []), *([] if seconds is None else ["seconds, in batches"])]
    return markdown_table(["", "memory traffic", "FLOPs", "LLM tokens", "dollars", *timed], rows)


def trainings(how: HowMade) -> str:
    """What each agent had for its training."""

    def whole(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}"

    rows = [
        [
            name,
            whole(had["problems"]),
            had["features"] or "",
            whole(had["parameters"]),
            whole(had["llm_tokens"]),
            "" if had["minutes"] is None else f"{had['minutes']:.1f}",
        ]
        for name, had in sorted(how.training.items())
    ]
    return markdown_table(["agent", "problems", "features", "weights", "LLM tokens", "minutes"], rows)


def label_shares(how: HowMade) -> str:
    """What labels that ask for the LLM are made of, by case and kind of token: a row an agent that has labels."""
    labels = {name: had["labels"] for name, had in sorted(how.training.items()) if had.get("labels")}
    columns = sorted({(case, kind) for cases in labels.values() for case, kinds in cases.items() for kind in kinds})
    rows = [
        [name, *(share(cases.get(case, {}).get(kind, 0.0)) for case, kind in columns)] for name, cases in labels.items()
    ]
    if not rows:
        return ""
    return markdown_table(["agent", *(f"{case.replace('_', ' ')}: {kind}" for case, kind in columns)], rows)


def chosen_table(
    summary: Summary, how: HowMade, names: Sequence[str], seconds: Mapping[str, float | None] | None = None
) -> str:
    """The operating points: a row a policy, with its seconds where some are given."""
    first, levels = summary["first"], list(summary["policies"][summary["first"]]["cost_at"])
    alone = [seconds_key(name) in how.latency for name in names]
    headers = ["policy (seeds)"]
    for level in levels:
        headers += [f"chosen for {float(level):.0%}: {what}" for what in ("accuracy", "cost", f"over {first}'s")]
    rows = []
    for name in names:
        policy = summary["policies"][name]
        row = [_named(summary, name, how)]
        for level in levels:
            point = policy["operating_points"].get(level)
            ratio = policy[f"against_{first}"].get(f"chosen_ratio_at_{level}")
            keys = ("accuracy", f"cost_{summary['cost']}")
            row += ["", ""] if point is None else [measured(point[key]) for key in keys]
            row.append("" if ratio is None or name == first else measured(ratio))
        if any(alone):
            row.append(number(how.latency[seconds_key(name)]) if seconds_key(name) in how.latency else "")
        rows.append([*row, *([] if seconds is None else [number(seconds.get(name))])])
    timed = [*(["seconds, batch 1"] if any(alone) else []), *([] if seconds is None else ["seconds, in batches"])]
    return markdown_table([*headers, *timed], rows)


def results_table(summary: Summary, how: HowMade, names: Sequence[str], limits: bool = True) -> str:
    """Costs on the hull: a row a policy, the baselines below where `limits` are wanted."""
    first = summary["first"]
    headers = [
        "policy (seeds)",
        *(f"hull: cost at {float(level):.0%}" for level in summary["policies"][first]["cost_at"]),
        "LLM tokens",
        "FLOPs",
        "dollars",
        "AIQ",
        f"hull: over {first}'s",
        "",
    ]
    policies = [_policy_row(summary, name, how) for name in names]
    baselines = [_baseline_row(summary, name) for name in summary["limits"]] if limits else []
    return markdown_table(headers, policies + baselines)


def _named(summary: Summary, name: str, how: HowMade) -> str:
    """A policy with the number of its seeds, and a star where it was run with settings of its own."""
    return f"{name} ({summary['policies'][name]['seeds']}){' *' if name in how.departures else ''}"


def _policy_row(summary: Summary, name: str, how: HowMade) -> list[str]:
    policy, first = summary["policies"][name], summary["first"]
    intervals, units = policy["cost_at_interval"], policy["cost_at_by_unit"]
    return [
        _named(summary, name, how),
        *(with_interval(cost, intervals[level]) for level, cost in policy["cost_at"].items()),
        share(units["llm_tokens"][LEVEL]),
        number(units["flops"][LEVEL]),
        number(units["dollars"][LEVEL]),
        number(policy["measures"]["aiq"]["value"]),
        "" if name == first else measured(policy[f"against_{first}"][f"ratio_at_{LEVEL}"]),
        standing(summary, name),
    ]


def _baseline_row(summary: Summary, name: str) -> list[str]:
    baseline, unit = summary["limits"][name], summary["cost"]
    if "curve" in baseline:
        costs = baseline["cost_at_by_unit"]
        at_levels = [number(cost) for cost in costs[unit].values()]
        tokens, flops, dollars = (costs[other][LEVEL] for other in ("llm_tokens", "flops", "dollars"))
    else:  # one point, at the LLM's own accuracy
        at_levels = ["", "", number(baseline[f"cost_{unit}"])]
        tokens, flops, dollars = (baseline[f"cost_{other}"] for other in ("llm_tokens", "flops", "dollars"))
    costs_at_level = [share(tokens), number(flops), number(dollars)]
    return [f"*{BASELINE_NAMES[name]}*", *at_levels, *costs_at_level, "", "", "limit"]


def standing(summary: Summary, name: str) -> str:
    """Whether a row is the cheapest, or costs no more, as far as the interval says: their paired ratio may be 1."""
    cheapest = summary["cheapest"]
    if name == cheapest:
        return "cheapest"
    low, high = summary["policies"][name][f"against_{cheapest}"][f"ratio_at_{LEVEL}"]["interval"]
    return "not significantly costlier" if low is None or high is None or low <= 1 <= high else ""


def share(value: float | None) -> str:
    """A share as a percentage with one digit."""
    return "none" if value is None else f"{value:.1%}"
