"""BENCHMARK.md: the leaderboard as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.reporting.figures import LIMITS, plot_curves
from experiments.reporting.tables import markdown_table, number, with_interval

LEVEL = "0.95"
DRAWN = 9
"""Policies in the picture, besides the first one."""
PAPER = {
    "collm": ("Co-LLM", ("collm",), 0.27, 17),
    "routellm": ("RouteLLM", ("routellm_mf", "routellm_sw", "routellm_classifier"), 0.30, 12),
    "citer_s": ("CITER-S", ("citer_s",), 0.42, 23),
}
"""The headlines of Zheng et al. 2025: CITER's rival, what it is here, CITER's saving at equal accuracy and its gain in
points at equal cost."""
Summary = Mapping[str, Any]


def picture(summary: Summary, path: Path) -> None:
    """Draw the curves of the cheapest policies and of the first one: more could not be told apart."""
    names = ranked(summary)[:DRAWN]
    shown = {name: summary["policies"][name] for name in dict.fromkeys([*names, summary["first"]])}
    plot_curves({**summary, "policies": shown}, path)


def ranked(summary: Summary) -> list[str]:
    """Policies by their cost at 95 % of the LLM's accuracy, those that never reach it last."""
    costs = {name: policy["cost_at"][LEVEL] for name, policy in summary["policies"].items()}
    return sorted(costs, key=lambda name: (costs[name] is None, costs[name] or 0.0))


def page(summary: Summary, seconds: Mapping[str, float | None], about: Mapping[str, Any], curve: str) -> str:
    """The page.

    Args:
        summary: of all evaluations.
        seconds: of each policy at 95 % of the LLM's accuracy, over those of LLM-only decoding.
        about: how it was made.
        curve: where the picture is, from the page.
    """
    models = summary["models"]
    seeds = ", ".join(map(str, about["seeds"]))
    return f"""# Benchmark

Every agent of `conf/agent`, trained and decoded through the same engine on the same problems: `make benchmark`. The
task is {summary["task"]}, the models are {" and ".join(summary["pool"])}. The {summary["examples"]} {summary["split"]}
problems were seen in no training and no tuning; alone, the SLM is right on {models["slm"]["accuracy"]:.1%} of them, the
LLM on {models["llm"]["accuracy"]:.1%}. Training seeds: {seeds}.

![accuracy over cost]({curve})

The {DRAWN} policies that are cheapest at 95 % of the LLM's accuracy, and {summary["first"]}; all are in the table.

## Cost at 95 % of the LLM's accuracy

{results_table(summary, seconds, about)}
Costs are relative to LLM-only decoding of the same problems. The first three are memory traffic (the paper's measure);
the table is sorted by that at 95 %. In brackets: 95 % intervals, bootstrapped over problems and training seeds, whose
number stands behind the name. The other units are at 95 % of the LLM's accuracy too: LLM tokens, floating-point
operations, dollars at a price in proportion to parameters, and seconds of passes and decisions, in which the rows of a
batch share passes (first seed, policy and LLM-only decoding in turn; none where no threshold reaches 95 %). AIQ is the
mean accuracy from the SLM's cost to the LLM's. "Over {summary["first"]}'s" is the ratio of memory traffic at 95 %,
paired. The last column says which rows cannot be told from the leader: those whose intervals overlap its own.

A policy's curve is the monotone hull of its thresholds, the SLM alone and LLM-only decoding; thresholds are quantiles
of the score on validation problems. Query-level agents decide once a response, and the SLM then reads no more than the
prompt of what the LLM answers.

## The paper's headlines

What CITER saves at equal accuracy (95 % of the LLM's) and gains at equal cost (where it gains most), over its rivals:

{headlines(summary)}
The paper's numbers were measured with other models (Qwen2 1.5B and 72B among them) on other tasks; they stand here to
compare directions, not digits.

## How it was made

{about["processor"]}, {about["cores"]} cores, torch {about["torch"]}, Python {about["python"]}; commit
`{about["commit"]}`; {about["workers"]} runs at a time, one thread each; {about["minutes"]} minutes in all. One row:

```
{reproduce(about)}
```
{departures(about)}"""


def results_table(summary: Summary, seconds: Mapping[str, float | None], about: Mapping[str, Any]) -> str:
    """A row a policy, the limits below."""
    first, order = summary["first"], ranked(summary)
    leader = summary["policies"][order[0]]["cost_at_interval"][LEVEL]
    rows = []
    for name in order:
        policy = summary["policies"][name]
        units = policy["cost_at_by_unit"]
        ratio = policy[f"against_{first}"][f"ratio_at_{LEVEL}"]
        departed = " *" if name in about["departures"] else ""
        rows.append(
            [
                f"{name} ({policy['seeds']}){departed}",
                *(with_interval(cost, policy["cost_at_interval"][level]) for level, cost in policy["cost_at"].items()),
                share(units["llm_tokens"][LEVEL]),
                *(number(units[unit][LEVEL]) for unit in ("flops", "dollars")),
                number(seconds.get(name)),
                number(policy["measures"]["aiq"]["value"]),
                with_interval(ratio["value"], ratio["interval"]) if name != first else "",
                standing(name, order[0], policy["cost_at_interval"][LEVEL], leader),
            ]
        )
    for name, limit in summary["limits"].items():
        if "curve" in limit:
            units = limit["cost_at_by_unit"]
            cells = [number(cost) for cost in units[summary["cost"]].values()]
            others = [share(units["llm_tokens"][LEVEL]), *(number(units[unit][LEVEL]) for unit in ("flops", "dollars"))]
        else:  # one point, at the LLM's own accuracy
            cells = ["", "", number(limit[f"cost_{summary['cost']}"])]
            others = [share(limit["cost_llm_tokens"]), number(limit["cost_flops"]), number(limit["cost_dollars"])]
        rows.append([f"*{LIMITS[name]}*", *cells, *others, "", "", "", "limit"])
    headers = [
        "policy (seeds)",
        *(f"cost at {float(level):.0%}" for level in summary["policies"][first]["cost_at"]),
        "LLM tokens", "FLOPs", "dollars", "seconds", "AIQ", f"over {first}'s", "",
    ]  # fmt: skip
    return markdown_table(headers, rows)


def standing(name: str, leader: str, interval: Sequence[float | None], leading: Sequence[float | None]) -> str:
    """Whether a row leads, or cannot be told from the one that does."""
    if name == leader:
        return "leader"
    low, high = interval[0], leading[1]
    return "overlaps the leader" if low is None or high is None or low <= high else ""


def headlines(summary: Summary) -> str:
    """CITER against what the paper compares it with."""
    rows = []
    for label, names, saved, gained in PAPER.values():
        for name in names:
            if name not in summary["policies"] or summary["first"] != "citer":
                continue
            against = summary["policies"][name]["against_citer"]
            ratio, loss = against[f"ratio_at_{LEVEL}"], against["largest_loss"]
            saving = [None if value is None else 1 - 1 / value for value in (ratio["value"], *ratio["interval"])]
            points = [None if value is None else 100 * value for value in (loss["value"], *loss["interval"])]
            rows.append(
                [
                    f"{label} (`{name}`)",
                    "none" if saving[0] is None else f"{saving[0]:.0%} [{percent(saving[1])}, {percent(saving[2])}]",
                    f"{saved:.0%}",
                    "none" if points[0] is None else f"{points[0]:.0f} [{whole(points[1])}, {whole(points[2])}]",
                    f"{gained}",
                ]
            )
    if not rows:
        return "CITER and its rivals were not among the agents.\n"
    headers = ["CITER against", "saving here", "saving in the paper", "most points above, here", "points in the paper"]
    return markdown_table(headers, rows)


def reproduce(about: Mapping[str, Any]) -> str:
    """The command that makes one row."""
    return f"python -m experiments.train {' '.join(about['train'])} agent=NAME seed={about['seeds'][0]}"


def departures(about: Mapping[str, Any]) -> str:
    """What some agents were run with, other than their defaults."""
    if not about["departures"]:
        return ""
    lines = "".join(f"- {name}: `{' '.join(changes)}`\n" for name, changes in sorted(about["departures"].items()))
    return f"\nRows with a star were run for less long than by default; add to the command:\n\n{lines}"


def share(value: float | None) -> str:
    """A share as a percentage with one digit."""
    return "none" if value is None else f"{value:.1%}"


def percent(value: float | None) -> str:
    """A share as a whole percentage."""
    return "none" if value is None else f"{value:.0%}"


def whole(value: float | None) -> str:
    """A whole number."""
    return "none" if value is None else f"{value:.0f}"
