"""BENCHMARK.md: the leaderboard as a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.reporting.figures import BASELINE_NAMES, plot_curves
from experiments.reporting.paper import LEVEL, headlines
from experiments.reporting.tables import markdown_table, measured, number, with_interval

DRAWN = 9
"""Policies in the picture, besides the first one."""
BATCHES = """ Seconds are of passes and decisions, in which the rows of a batch share
passes, over those of LLM-only decoding (first seed, all in turn; none where validation chooses no threshold)."""
Summary = Mapping[str, Any]


@dataclass(frozen=True)
class HowMade:
    """What the page says of how it was made.

    Attributes:
        machine: processor, cores and versions, as `experiments.common.timing.machine` gives them.
        commit: of the code.
        seeds: of training.
        more_seeds: how many others there are, of agents that have some.
        training: what each agent had for it: problems, features, parameters, LLM tokens, minutes.
        further: agents in a table of their own.
        train: overrides of every run.
        departures: overrides of some agents' runs, by agent.
        latency: what `experiments.speed suite=latency` measured, by name; empty where it did not.
        title: of the page.
        command: that makes it.
    """

    machine: Mapping[str, Any]
    commit: str
    seeds: Sequence[int]
    more_seeds: Mapping[str, int]
    training: Mapping[str, Mapping[str, Any]]
    further: Sequence[str]
    train: Sequence[str]
    departures: Mapping[str, Sequence[str]]
    latency: Mapping[str, float]
    title: str
    command: str


def picture(summary: Summary, path: Path, further: Sequence[str] = ()) -> None:
    """Draw the curves of the cheapest policies and of the first one: more could not be told apart.

    Args:
        summary: of all evaluations.
        path: of the picture.
        further: agents that are not drawn.
    """
    names = ranked(summary, further)[:DRAWN]
    shown = {name: summary["policies"][name] for name in dict.fromkeys([*names, summary["first"]])}
    plot_curves({**summary, "policies": shown}, path, logarithmic=True)


def ranked(summary: Summary, but: Sequence[str] = ()) -> list[str]:
    """Policies but for some, by their cost at 95 % of the LLM's accuracy, those that never reach it last."""
    costs = {name: policy["cost_at"][LEVEL] for name, policy in summary["policies"].items() if name not in but}
    return sorted(costs, key=lambda name: (costs[name] is None, costs[name] or 0.0))


def page(summary: Summary, seconds: Mapping[str, float | None], how: HowMade, curve: str) -> str:
    """The page.

    Args:
        summary: of all evaluations.
        seconds: of each policy at 95 % of the LLM's accuracy, over those of LLM-only decoding.
        how: it was made.
        curve: where the picture is, from the page.
    """
    models, machine = summary["models"], how.machine
    seeds = ", ".join(map(str, how.seeds))
    if how.more_seeds:
        seeds += "; " + ", ".join(f"{more} more of {name}" for name, more in how.more_seeds.items())
    core = ranked(summary, how.further)
    timed = seconds if any(one is not None for one in seconds.values()) else None
    unseen = "no training and no tuning" if summary["split"] == "test" else "no training"
    return f"""# {how.title}

Agents of `conf/agent`, trained and decoded through the same engine on the same problems:
`{how.command}`. The task is {summary["task"]}, the models are {" and ".join(summary["pool"])}.
The {summary["examples"]} {summary["split"]} problems
were seen in {unseen}; alone, the SLM is right on {models["slm"]["accuracy"]:.1%} of them, the LLM on
{models["llm"]["accuracy"]:.1%}. Training seeds: {seeds}.

![accuracy over cost]({curve})

The {DRAWN} policies that are cheapest at 95 % of the LLM's accuracy, and {summary["first"]}; all are in the table.

## What is saved, in every unit

{headline(summary, timed, how.latency)}
At 95 % of the LLM's accuracy (speculative decoding: at all of it), relative to LLM-only decoding of the same problems.
The order of policies is that of memory traffic, the paper's measure, which is what one user waits for where weights
are read anew for every token; where passes are bound by arithmetic (large batches) FLOPs count, of which every token of
the SLM takes some.{measured_latency(how)}

## What a user gets

{chosen_table(summary, how, core, timed)}
"Chosen for 95 %" is the operating point: the threshold that validation problems choose for 95 % of the LLM's accuracy,
here {float(LEVEL) * models["llm"]["accuracy"]:.1%}, and the accuracy and cost it then has on these problems. Costs are
memory traffic, relative to LLM-only decoding of the same problems. In brackets: 95 % intervals over problems
(resampled) and training seeds (a t interval), whose number stands behind the name. "Over {summary["first"]}'s" is the
paired ratio of costs, whatever the accuracies.{"" if timed is None else BATCHES}

## Cost at equal accuracy

{results_table(summary, how, core)}
"Hull" is the least cost of 90, 95 and 99 % of the LLM's accuracy on these problems themselves: in memory traffic with
intervals, by which at 95 % both tables are sorted, and at 95 % as LLM tokens, floating-point operations and dollars, at
a price in proportion to parameters. AIQ is the mean accuracy from the SLM's cost to the LLM's. "Hull: over
{summary["first"]}'s" is the paired ratio of memory traffic at 95 %. The last column says which rows are not
significantly costlier than the cheapest: those whose paired ratio to it may be 1.

A policy's curve is the upper concave hull of its thresholds, the SLM alone and LLM-only decoding: who answers each
query with one of two of these, drawn at random, has any point between them. Thresholds are set on validation problems.
Query-level agents decide once a response, and the SLM then reads no more than the prompt of what the LLM answers.

{further_tables(summary, how, core)}## What each agent had

{trainings(how)}
Problems are those of the train split that labels, preferences or episodes are made of; LLM tokens are all that the LLM
read or wrote while the agent was trained; minutes are those of one processor core; weights are those of a decision.
Means over seeds, of tokens and minutes over those whose training was not interrupted.

{label_section(how)}{headline_section(summary)}## How it was made

{machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}, Python {machine["python"]}; commit
`{how.commit}`; each run in a process of one thread. One row:

```
{reproduce(how)}
```
{departures(how)}"""


def label_section(how: HowMade) -> str:
    """What labels are made of; empty where no agent learned from such labels."""
    shares = label_shares(how)
    if not shares:
        return ""
    return f"""## What labels are made of

{shares}
Of the labels that ask for the LLM, in the last round: the share that each case and kind of token has, means over seeds.
In case 2 only the LLM would write the reference's token, in case 3 neither model would. References are worded at random
and only the number is judged, so that a label on wording asks for what changes no verdict.

"""


def headline_section(summary: Summary) -> str:
    """CITER and its rivals beside the paper's figures; empty where they are not among the agents."""
    compared = headlines(summary)
    if not compared:
        return ""
    return f"""## The paper's headlines

What CITER saves at equal accuracy (95 % of the LLM's) and gains at equal cost (a quarter and a half of LLM-only
decoding's, fixed beforehand), over its rivals; the paper's figures are "up to":

{compared}
The paper's numbers were measured with other models (Qwen2 1.5B and 72B among them) on other tasks; they stand here to
compare directions, not digits.

"""


def measured_latency(how: HowMade) -> str:
    """How seconds at batch 1 were measured, where they were."""
    if not how.latency:
        return ""
    return """ Seconds at batch 1 are those of a pair of 26 and 296 million random weights, which writes what this pair
decides, one response at a time ([measured latency](docs/costs.md#measured-latency))."""


def headline(summary: Summary, seconds: Mapping[str, float | None] | None, latency: Mapping[str, float]) -> str:
    """The first policy, the cheapest, speculative decoding and a coin per query, in every unit."""

    def alone(name: str) -> list[str]:
        value = latency.get(f"{name}_seconds_over_llm_only")
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


def further_tables(summary: Summary, how: HowMade, core: Sequence[str]) -> str:
    """Those agents that do not belong to the core table."""
    names = ranked(summary, core)
    if not names:
        return ""
    return f"""## Further policies

On the same problems, by the same rules, and not in the tables above:

{chosen_table(summary, how, names)}
{results_table(summary, how, names, limits=False)}
"""


def chosen_table(
    summary: Summary, how: HowMade, names: Sequence[str], seconds: Mapping[str, float | None] | None = None
) -> str:
    """The operating points: a row a policy, with its seconds where some are given."""
    first, levels = summary["first"], (LEVEL, "0.99")
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
        rows.append([*row, *([] if seconds is None else [number(seconds.get(name))])])
    return markdown_table([*headers, *([] if seconds is None else ["seconds"])], rows)


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


def reproduce(how: HowMade) -> str:
    """The command that makes one row."""
    return f"python -m experiments.train {' '.join(how.train)} agent=NAME seed={how.seeds[0]}"


def departures(how: HowMade) -> str:
    """What some agents were run with, other than their defaults."""
    if not how.departures:
        return ""
    lines = "".join(f"- {name}: `{' '.join(changes)}`\n" for name, changes in sorted(how.departures.items()))
    return f"\nRows with a star were made with settings other than their defaults; add to the command:\n\n{lines}"


def share(value: float | None) -> str:
    """A share as a percentage with one digit."""
    return "none" if value is None else f"{value:.1%}"
