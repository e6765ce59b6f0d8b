"""Tables, for the terminal and as markdown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from envs.storage import write_text
from experiments.reporting.figures import BASELINE_NAMES, UNITS, front_name

Summary = Mapping[str, Any]
WIDTH = 100
"""Characters of a printed table; one that is wider leaves columns out."""
COLUMNS = ("few", "all")
"""How many columns are printed: as many as WIDTH has room for, or all."""
AREAS = {
    "over_speculative_at_0.99": "at 99%: cost over\nspeculative's",
    "area_above_line": "area above\nthe line",
    "oracle_share": "share of the\noracle's",
}
"""Measures of a policy that are shown where they were measured, with their headers."""
COMPARED = {"ratio_at_0.95": "at 95%: cost\nover {first}'s", "gain_at_0.25": "at cost 0.25:\nabove {first}"}
"""What is shown of the comparison with the first policy."""
QUERY_MEASURES = {
    "area_above_line": "area above\nthe line",
    "aiq": "AIQ",
    "qnc": "QNC",
    "peak_accuracy": "peak\naccuracy",
    "apgr": "APGR",
    "cpt_0.50": "CPT(50%)",
    "cpt_0.80": "CPT(80%)",
}
COMPARED_QUERIES = {"qnc": "QNC less\n{first}'s", "aiq": "AIQ less\n{first}'s"}


def table(summary: Summary) -> Table:
    """The comparison as a table, with 95 % intervals: operating points, costs on the hull, areas, and gains."""
    first, areas = summary["first"], _measured_of(summary, AREAS)
    levels, timed = list(summary["policies"][first]["cost_at"]), any(map(_seconds, summary["policies"].values()))
    headers = [
        "policy (seeds)",
        "accuracy",
        "cost",
        *(f"chosen for {float(level):.0%}:\n{what}" for level in levels for what in ("accuracy", "cost")),
        *(f"hull: cost at {float(level):.0%} of\nthe LLM's accuracy" for level in levels),
        *_headers(COMPARED, first),
        *_headers({key: AREAS[key] for key in areas}, first),
        "LLM tokens\nat 95%",
        *(["seconds\nat 95%"] if timed else []),
    ]
    rows = []
    for name in ("slm", "llm"):
        model = summary["models"][name]
        rows.append([f"{name} only", f"{model['accuracy']:.1%}", f"{model['cost']:.3f}"])
    fronts = {front_name(name, front): front for name, front in summary.get("fronts", {}).items()}
    for name, policy in {**summary["policies"], **fronts}.items():
        rows.append(
            [
                f"{name} ({policy['seeds']})",
                "",
                "",
                *_chosen(policy, levels, summary["cost"]),
                *(with_interval(policy["cost_at"][level], policy["cost_at_interval"][level]) for level in levels),
                *_compared(policy, name, first, "against", COMPARED),
                *(measured(policy["measures"][key]) for key in areas),
                number(policy["cost_at_by_unit"]["llm_tokens"]["0.95"]),
                *([number(_seconds(policy))] if timed else []),
            ]
        )
    rows += [_baseline_row(summary, name, 2 * len(levels), len(COMPARED) + len(areas)) for name in summary["limits"]]
    title = (
        f"{summary['task']}, {summary['examples']} {summary['split']} problems; cost: {UNITS[summary['cost']]}, "
        "LLM only = 1; intervals: 95 %, over problems and training seeds"
    )
    return _table(title, headers, rows)


def _chosen(policy: Mapping[str, Any], levels: Sequence[str], unit: str) -> list[str]:
    """Accuracy and cost at the operating point for each level; empty where none was chosen."""
    points = policy.get("operating_points") or {}
    keys = [(level, key) for level in levels for key in ("accuracy", f"cost_{unit}")]
    return [measured(points[level][key]) if level in points else "" for level, key in keys]


def _seconds(policy: Mapping[str, Any]) -> float | None:
    """Seconds at 95 % of the LLM's accuracy over those of LLM-only decoding; None where they were not measured."""
    seconds: float | None = policy["cost_at_by_unit"].get("seconds", {}).get("0.95")
    return seconds


def most_wanted(rich_table: Table) -> list[int]:
    """The columns of what `table` makes, by number, in the order in which they are left out last."""
    headers = [str(column.header) for column in rich_table.columns]

    def of(*beginnings: str) -> list[int]:
        return [i for beginning in beginnings for i, header in enumerate(headers) if header.startswith(beginning)]

    wanted = of("policy", "chosen for 95%", "accuracy", "hull: cost at 95%", "LLM tokens", "seconds")
    wanted += of("chosen for 99%", "chosen for 90%", "hull")
    wanted = list(dict.fromkeys(wanted))
    wanted += [headers.index("cost")]
    return wanted + [i for i in range(len(headers)) if i not in wanted]


def _baseline_row(summary: Summary, name: str, unchosen: int, empty: int) -> list[str]:
    """A row of one baseline: one point, or costs on its hull, with `unchosen` empty cells before and `empty` behind."""
    baseline, unit = summary["limits"][name], summary["cost"]
    if "curve" not in baseline:
        return [BASELINE_NAMES[name], f"{baseline['accuracy']:.1%}", number(baseline[f"cost_{unit}"])]
    costs = baseline["cost_at_by_unit"]
    at_levels = [number(cost) for cost in costs[unit].values()]
    return [
        BASELINE_NAMES[name],
        "",
        "",
        *[""] * unchosen,
        *at_levels,
        *[""] * empty,
        number(costs["llm_tokens"]["0.95"]),
    ]


def query_table(summary: Summary) -> Table:
    """Query-level agents as a table: measures with 95 % intervals, and differences from the first agent."""
    first, measures = summary["first"], _measured_of(summary, QUERY_MEASURES)
    headers = ["agent", *(QUERY_MEASURES[key] for key in measures), *_headers(COMPARED_QUERIES, first)]
    rows = [
        [
            name,
            *(measured(policy["measures"][key]) for key in measures),
            *_compared(policy, name, first, "less", COMPARED_QUERIES),
        ]
        for name, policy in summary["policies"].items()
    ]
    title = (
        f"{summary['task']}: {summary['splits']} splits, {summary['examples']} test queries each; "
        "intervals: 95 %, over splits and queries"
    )
    return _table(title, headers, rows)


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Names on the left, numbers on the right, none of them broken; rows may be shorter than the headers."""
    result = Table(title=title, box=SIMPLE, show_edge=False, pad_edge=False, collapse_padding=True)
    for position, header in enumerate(headers):
        result.add_column(header, justify="right" if position else "left", no_wrap=True)
    for row in rows:
        result.add_row(*row, *[""] * (len(headers) - len(row)))
    return result


def _headers(columns: Mapping[str, str], first: str) -> list[str]:
    return [header.format(first=first) for header in columns.values()]


def _measured_of(summary: Summary, keys: Iterable[str]) -> list[str]:
    """Those of `keys` that policies were measured by: there may be no oracle, no speculative decoding, more models."""
    return [key for key in keys if key in summary["policies"][summary["first"]]["measures"]]


def _compared(policy: Mapping[str, Any], name: str, first: str, how: str, keys: Iterable[str]) -> list[str]:
    """What a policy has over the first one; empty for that one itself."""
    return [measured(policy[f"{how}_{first}"][key]) if name != first else "" for key in keys]


def measured(measure: Mapping[str, Any]) -> str:
    """A measure with its interval; that it says nothing, where the summary tells why."""
    return "n/a" if "why" in measure else with_interval(measure["value"], measure["interval"])


def with_interval(value: float | None, interval: Sequence[float | None]) -> str:
    """A number with its interval."""
    return f"{number(value)} [{number(interval[0])}, {number(interval[1])}]"


def number(value: float | None) -> str:
    """Three digits, or that there is none."""
    return "none" if value is None else f"{value:.3f}"


def write_table(
    rich_table: Table,
    path: Path,
    wanted: Sequence[int] | None = None,
    columns: str = "few",
    notes: Sequence[str] = (),
    more: str = "",
) -> None:
    """Write a table as markdown, all of it, and print it.

    Args:
        rich_table: the table.
        path: of the file.
        wanted: numbers of its columns, those to leave out last first; from left to right where None.
        columns: `few`: those that WIDTH has room for are printed; `all`: all are.
        notes: sentences that stand below.
        more: how columns that are left out are printed, if they can be; a part of a sentence.
    """
    write_text(path, markdown(rich_table) + "".join(f"\n{note}\n" for note in notes))
    printed = narrowed(rich_table, wanted or range(len(rich_table.columns))) if columns == "few" else rich_table
    wide = max(WIDTH, measured_width(printed))
    Console(width=wide, markup=False).print(printed)
    left_out = len(rich_table.columns) - len(printed.columns)
    for line in (*notes, *([f"{path} holds {left_out} more columns{more}"] if left_out else [])):
        print(line)


def measured_width(rich_table: Table) -> int:
    """Characters a table takes, but for its title, where nothing in it is broken."""
    console = Console(width=10_000, markup=False)
    return console.measure(rich_table).maximum


def narrowed(rich_table: Table, wanted: Sequence[int], width: int = WIDTH) -> Table:
    """A table with those of its columns that there is room for, in the order they stand in.

    Args:
        rich_table: the table.
        wanted: numbers of its columns; each is taken where there is room beside those before it, the first always.
        width: in characters.
    """

    def part(numbers: Iterable[int]) -> Table:
        columns = [rich_table.columns[number] for number in sorted(numbers)]
        rows = zip(*([str(cell) for cell in column.cells] for column in columns), strict=True)
        return _table(str(rich_table.title), [str(column.header) for column in columns], rows)

    taken = list(wanted[:1])
    for number in wanted[1:]:
        if measured_width(part([*taken, number])) <= width:
            taken.append(number)
    return part(taken)


def markdown(rich_table: Table) -> str:
    """A rich table as GitHub-flavoured markdown, its title above it."""
    headers = [str(column.header).replace("\n", " ") for column in rich_table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in rich_table.columns), strict=True)
    return f"{rich_table.title}\n\n{markdown_table(headers, list(map(list, rows)))}"


def cells(rich_table: Table) -> dict[str, list[Any]]:
    """The `headers` of a table, and its `rows`: each cell in two parts, a number and its interval."""
    headers = [str(column.header) for column in rich_table.columns]
    rows = zip(*([str(cell) for cell in column.cells] for column in rich_table.columns), strict=True)
    return {"headers": headers, "rows": [[_parted(cell) for cell in row] for row in rows]}


def _parted(cell: str) -> tuple[str, str]:
    value, bracket, interval = cell.partition(" [")
    return value, f"[{interval}" if bracket else ""


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Cells as a table in GitHub-flavoured markdown."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
