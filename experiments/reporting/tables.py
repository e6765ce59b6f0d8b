"""Tables, for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from experiments.reporting.figures import LIMITS, UNITS

MEASURED = ("over_speculative_at_0.99", "area_above_random", "oracle_share")
COMPARED = ("ratio_at_0.95", "largest_gain")


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
