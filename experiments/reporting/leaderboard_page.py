"""BENCHMARK.md: the leaderboard as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.reporting.figures import plot_curves
from experiments.reporting.leaderboard_tables import (
    HowMade,
    Summary,
    chosen_table,
    headline,
    label_shares,
    ranked,
    results_table,
    seconds_key,
    trainings,
)
from experiments.reporting.paper import LEVEL, headlines
from experiments.reporting.tables import number

DRAWN = 9
"""Policies in the picture, besides the first one."""
BENCHMARK = "Benchmark"
"""The title of the page that has a study of its own in the docs."""
EQUAL = "\n[What was equal, and what was not](docs/studies/benchmark.md#what-was-equal)."
BATCHES = """ Seconds in batches are of passes and decisions of the first seed at its chosen threshold, where
rows share passes, over those of LLM-only decoding, all in turn (none where validation chooses no threshold)."""


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


def page(summary: Summary, seconds: Mapping[str, float | None], how: HowMade, curve: str) -> str:
    """The page.

    Args:
        summary: of all evaluations.
        seconds: of each policy at 95 % of the LLM's accuracy, over those of LLM-only decoding.
        how: it was made.
        curve: where the picture is, from the page.
    """
    models, machine = summary["models"], how.machine
    seeds = ", ".join(map(str, how.seeds)) + ", and more of some (behind the name stands how many)" * how.more_seeds
    core, equal = ranked(summary, how.further), EQUAL if how.title == BENCHMARK else ""
    timed = seconds if any(one is not None for one in seconds.values()) else None
    unseen = "no training and no tuning" if summary["split"] == "test" else "no training"
    return f"""# {how.title}

Agents of `conf/agent`, trained and decoded through the same engine on the same problems:
`{how.command}`. The task is {summary["task"]}, the models are {" and ".join(summary["pool"])}.
The {summary["examples"]} {summary["split"]} problems
were seen in {unseen}; alone, the SLM is right on {models["slm"]["accuracy"]:.1%} of them, the LLM on
{models["llm"]["accuracy"]:.1%}. Training seeds: {seeds}.

{saved_where(summary, timed, how)}

![accuracy over cost]({curve})

The {DRAWN} policies that are cheapest at 95 % of the LLM's accuracy, and {summary["first"]}; all are in the
table.{equal}

## What is saved, in every unit

{headline(summary, timed, how.latency)}
At 95 % of the LLM's accuracy (speculative decoding: at all of it), relative to LLM-only decoding of the same problems.
The order of policies is that of memory traffic, the paper's measure, which is what one user waits for where weights
are read anew for every token; where passes are bound by arithmetic (large batches) FLOPs count, of which every token of
the SLM takes some.{measured_latency(how)}{"" if timed is None else BATCHES}

## What a user gets

{chosen_table(summary, how, core, timed)}
"Chosen for 95 %" is the operating point: the threshold that validation problems choose for 95 % of the LLM's accuracy,
here {float(LEVEL) * models["llm"]["accuracy"]:.1%}, and the accuracy and cost it then has on these problems. Costs are
memory traffic, relative to LLM-only decoding of the same problems. In brackets: 95 % intervals over problems
(resampled) and training seeds (a t interval), whose number stands behind the name. "Over {summary["first"]}'s" is the
paired ratio of costs, whatever the accuracies.

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
Means over seeds, of tokens and minutes over those whose training was not interrupted.{trained_for(how)}

{label_section(how)}{headline_section(summary)}## How it was made

{made_on(how)}
The page was written on {machine["processor"]}, {machine["cores"]} cores, torch {machine["torch"]}, Python
{machine["python"]}. One row:

```
{reproduce(how)}
```
{departures(how)}"""


def saved_where(summary: Summary, seconds: Mapping[str, float | None] | None, how: HowMade) -> str:
    """In which units something is saved, and in which next to nothing: what a reader must know first."""
    names = [*dict.fromkeys((summary["first"], summary["cheapest"]))]
    costs = {name: summary["policies"][name]["cost_at_by_unit"] for name in names}
    costs["a coin per query"] = summary["limits"]["line"]["cost_at_by_unit"]

    def listed(values: Mapping[str, float | None]) -> str:
        return ", ".join(f"{name} {number(value)}" for name, value in values.items() if value is not None)

    traffic, flops = ({name: one[unit][LEVEL] for name, one in costs.items()} for unit in ("bytes", "flops"))
    alone = {name: how.latency.get(seconds_key(name)) for name in names}
    batches = {name: (seconds or {}).get(name) for name in names}
    said = {
        "memory traffic, which one user waits for at batch 1": traffic,
        "floating-point operations, which large batches wait for": flops,
        "seconds, measured at batch 1": alone,
        "seconds, measured in batches": batches,
    }
    lines = [f"- {what}: {listed(values)}" for what, values in said.items() if listed(values)]
    return "\n".join(["At 95 % of the LLM's accuracy is taken, of what it takes alone:", "", *lines])


def made_on(how: HowMade) -> str:
    """Which machines made the runs, and how many commits."""
    if not how.runs_made_on:
        return "Each run in a process of one thread."
    machines = Counter(f"{one['processor']}, {one['cores']} cores, torch {one['torch']}" for one in how.runs_made_on)
    commits = {one["commit"] for one in how.runs_made_on}
    lines = "".join(f"- {count} runs on {machine}\n" for machine, count in machines.most_common())
    plural = "s" * (len(commits) != 1)
    return f"""Each run in a process of one thread; each row names its commit, {len(commits)} commit{plural} in all.

{lines}"""


def trained_for(how: HowMade) -> str:
    """How long all of the training took, as far as it is known; empty where nothing was trained."""
    minutes = sum((had["minutes"] or 0.0) * had["seeds"] for had in how.training.values())
    return f" All of it took {minutes / 60:.1f} hours of one core." if minutes else ""


def label_section(how: HowMade) -> str:
    """What labels are made of; empty where no agent learned from such labels."""
    shares = label_shares(how)
    if not shares:
        return ""
    return f"""## What labels are made of

{shares}
Of the labels that ask for the LLM, in the last round: the share that each case and kind of token has, means over seeds.
In case 2 only the LLM would write the reference's token, in case 3 neither model would. Only the result is judged, so
that a label on wording may ask for what changes no verdict.

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
    return """ Seconds at batch 1 are those of the thresholds that are chosen for 95 %, on some validation problems: a
pair of 26 and 296 million random weights writes what this pair decides, one response at a time
([measured latency](docs/costs.md#measured-latency))."""


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


def reproduce(how: HowMade) -> str:
    """The command that makes one row."""
    return f"python -m experiments.train {' '.join(how.train)} agent=NAME seed={how.seeds[0]}"


def departures(how: HowMade) -> str:
    """What some agents were run with, other than their defaults."""
    if not how.departures:
        return ""
    lines = "".join(f"- {name}: `{' '.join(changes)}`\n" for name, changes in sorted(how.departures.items()))
    return f"\nRows with a star were made with settings other than their defaults; add to the command:\n\n{lines}"
