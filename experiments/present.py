"""What people look at: the curve, the table and the transcripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from agents.rollout import Episode
from envs.files import write_whole
from envs.models import ModelPool
from envs.render import html

UNITS = {
    "bytes": "memory traffic",
    "flops": "floating-point operations",
    "llm_tokens": "LLM tokens",
    "seconds": "seconds of forward passes",
    "dollars": "price",
}
ALONE = ("slm only", "llm only")


MEASURED = ("over_speculative_at_0.99", "area_above_random", "oracle_share")
LIMITS = {
    "random": "random routing",
    "query_oracle": "oracle, per query",
    "speculative": "speculative decoding",
    "oracle": "oracle",
}
COMPARED = ("ratio_at_0.95", "largest_gain")


def plot_curves(summary: Mapping[str, Any], path: Path, axis: str | None = None, alone: Sequence[str] = ALONE) -> None:
    """Draw accuracy over relative cost, a line per policy, to a PNG file.

    Args:
        summary: of an evaluation.
        path: of the file.
        axis: what the cost is; relative to LLM-only decoding where None.
        alone: what the two ends of all curves are called.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for position, (name, policy) in enumerate(summary["policies"].items()):
        costs, accuracies = zip(*policy["curve"], strict=True)
        style = "-" if policy["trained"] else "--"
        colour = colours[position % 10]
        axes.plot(costs, accuracies, style, marker="." if len(costs) < 25 else "", color=colour, label=name)
        grid, low, high = (np.array(column, dtype=float) for column in zip(*policy["band"], strict=True))
        axes.fill_between(grid, low, high, color=colour, alpha=0.12, linewidth=0)
    for name, limit in summary["limits"].items():
        if "curve" not in limit:
            axes.plot(limit[f"cost_{summary['cost']}"], limit["accuracy"], "k*", label=LIMITS[name], zorder=3)
            continue
        axes.plot(
            *zip(*limit["curve"], strict=True),
            color="grey" if name == "random" else "black",
            ls="-." if name == "query_oracle" else ":",
            label=LIMITS[name],
        )
    for name, label in zip(("slm", "llm"), alone, strict=True):
        model = summary["models"][name]
        axes.plot(model["cost"], model["accuracy"], "k^" if name == "llm" else "ks", label=label, zorder=3)
    axes.axhline(0.95 * summary["models"]["llm"]["accuracy"], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xlabel(axis or f"cost relative to LLM-only decoding ({UNITS[summary['cost']]})")
    axes.set_ylabel(f"accuracy ({summary['examples']} {summary['split']} problems)")
    few = f": {' -> '.join(summary['pool'])}" if len(summary["pool"]) < 4 else ""
    axes.set_title(f"{summary['task']}{few}", fontsize="medium")
    axes.set_xlim(0, 1.03)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    write_whole(path, lambda partial: figure.savefig(partial, dpi=130, format="png"))
    plt.close(figure)


LEARNING = {
    "time/total_timesteps": ("rollout/ep_rew_mean", "rollout/success_rate"),
    "iteration": ("return", "accuracy", "llm_share"),
    "epoch": ("loss", "validation_loss"),
}
"""By what a learner counts its progress: the measurements that are drawn over it."""


def plot_learning(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw learning curves to a PNG file, a panel per run of the learner; False where its rows hold none."""
    curves: dict[str, tuple[str, list[Mapping[str, Any]]]] = {}
    for row in rows:
        for count in LEARNING:
            if count in row:
                curves.setdefault(f"{row.get('run', '')}", (count, []))[1].append(row)
    if not curves:
        return False
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(6 * len(curves), 4), layout="constrained", squeeze=False)
    for panel, (name, (count, measured)) in zip(axes[0], curves.items(), strict=True):
        for key in LEARNING[count]:
            points = [(row[count], row[key]) for row in measured if key in row and count in row]
            if points:
                panel.plot(*zip(*points, strict=True), label=key.removeprefix("rollout/"))
        panel.set_title(name)
        panel.set_xlabel("tokens" if count == "time/total_timesteps" else count)
        panel.grid(alpha=0.3)
        panel.legend()
    write_whole(path, lambda partial: figure.savefig(partial, dpi=110, format="png"))
    plt.close(figure)
    return True


def table(summary: Mapping[str, Any]) -> Table:
    """The comparison as a table, with 95 % intervals: costs at shares of the LLM's accuracy, areas, and gains."""
    first = summary["first"]
    result = Table(
        title=f"{summary['task']}, {summary['examples']} {summary['split']} problems; cost: {UNITS[summary['cost']]}, "
        "LLM only = 1; intervals: 95 %, over problems and training seeds"
    )
    result.add_column("policy (seeds)")
    result.add_column("accuracy", justify="right")
    result.add_column("cost", justify="right")
    for level in next(iter(summary["policies"].values()))["cost_at"]:
        result.add_column(f"cost at {float(level):.0%} of\nthe LLM's accuracy", justify="right")
    result.add_column(f"at 95%: cost\nover {first}'s", justify="right")
    result.add_column(f"most above\n{first}", justify="right")
    if "speculative" in summary["limits"]:
        result.add_column("at 99%: cost over\nspeculative's", justify="right")
    result.add_column("area above\nrandom", justify="right")
    if "oracle" in summary["limits"]:
        result.add_column("share of the\noracle's", justify="right")
    result.add_column("LLM tokens\nat 95%", justify="right")
    for name in ("slm", "llm"):
        model = summary["models"][name]
        result.add_row(f"{name} only", f"{model['accuracy']:.1%}", f"{model['cost']:.3f}")
    for name, policy in summary["policies"].items():
        cells = [with_interval(cost, policy["cost_at_interval"][level]) for level, cost in policy["cost_at"].items()]
        against = policy[f"against_{first}"]
        compared = [_measured(against[key]) if name != first else "" for key in COMPARED]
        tokens = number(policy["cost_at_by_unit"]["llm_tokens"]["0.95"])
        label = f"{name} ({policy['seeds']})"
        areas = [_measured(policy["measures"][key]) for key in MEASURED if key in policy["measures"]]
        result.add_row(label, "", "", *cells, *compared, *areas, tokens)
    for name, limit in summary["limits"].items():
        if "curve" not in limit:
            result.add_row(LIMITS[name], f"{limit['accuracy']:.1%}", number(limit[f"cost_{summary['cost']}"]))
            continue
        by_unit = limit["cost_at_by_unit"]
        cells = [number(cost) for cost in by_unit[summary["cost"]].values()]
        empty = len(result.columns) - len(cells) - 4
        result.add_row(LIMITS[name], "", "", *cells, *[""] * empty, number(by_unit["llm_tokens"]["0.95"]))
    return result


QUERY_MEASURES = {
    "area_above_random": "area above\nrandom",
    "aiq": "AIQ",
    "qnc": "QNC",
    "peak_accuracy": "peak\naccuracy",
    "apgr": "APGR",
    "cpt_0.50": "CPT(50%)",
    "cpt_0.80": "CPT(80%)",
}
COMPARED_QUERIES = ("qnc", "aiq")


def query_table(summary: Mapping[str, Any]) -> Table:
    """Query-level agents as a table: measures with 95 % intervals, and differences from the first agent."""
    first = summary["first"]
    result = Table(
        title=f"{summary['task']}: {summary['splits']} splits, {summary['examples']} test queries each; "
        "intervals: 95 %, over splits and queries"
    )
    result.add_column("agent")
    shown = [key for key in QUERY_MEASURES if key in summary["policies"][first]["measures"]]
    for key in shown:
        result.add_column(QUERY_MEASURES[key], justify="right")
    for key in COMPARED_QUERIES:
        result.add_column(f"{QUERY_MEASURES[key]} less\n{first}'s", justify="right")
    for name, policy in summary["policies"].items():
        cells = [_measured(policy["measures"][key]) for key in shown]
        less = [_measured(policy[f"less_{first}"][key]) if name != first else "" for key in COMPARED_QUERIES]
        result.add_row(name, *cells, *less)
    return result


def _measured(measure: Mapping[str, Any]) -> str:
    return with_interval(measure["value"], measure["interval"])


def with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    """A number with its interval."""
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def number(value: float | None) -> str:
    """Three digits, or that there is none."""
    return "none" if value is None else f"{value:.3f}"


def markdown(rich_table: Table) -> str:
    """A rich table as GitHub-flavoured markdown, its title above it."""
    headers = [str(column.header).replace("\n", " ") for column in rich_table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in rich_table.columns), strict=True)
    return f"{rich_table.title}\n\n{markdown_table(headers, list(map(list, rows)))}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table in GitHub-flavoured markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def transcripts(pool: ModelPool, episodes: Sequence[Episode], title: str) -> str:
    """A page of responses, each token marked by its writer."""
    parts = []
    for episode in episodes:
        verdict = "right" if episode.correct else f"wrong, the answer is {episode.example.answer}"
        share = (episode.writers > 0).mean()
        parts.append(
            f'<article class="{"right" if episode.correct else "wrong"}"><h2>{escape(episode.example.id)}</h2>'
            f"<p>{escape(episode.example.prompt.strip())}</p>"
            f"<pre>{html(pool, episode.tokens, episode.writers)}</pre>"
            f"<footer>{escape(verdict)}; {share:.0%} of {len(episode.writers)} tokens by the LLM</footer></article>"
        )
    return _PAGE.format(title=escape(title), body="\n".join(parts))


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
article {{ border-left: 4px solid #2a8; padding: 0 1rem; margin: 2rem 0; }}
article.wrong {{ border-color: #c33; }}
h2 {{ font-size: 1rem; color: #666; }}
pre {{ white-space: pre-wrap; background: #f6f6f4; padding: 0.8rem; }}
mark {{ border-radius: 3px; }}
footer {{ color: #666; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>The small model wrote the plain tokens, the large one the <mark style="background:#ffb3a7">marked</mark> ones.</p>
{body}
</body>
</html>
"""
