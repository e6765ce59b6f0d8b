"""What a comparison of query-level agents leaves for people, and the rows behind it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from envs.storage import write_text
from experiments.reporting.figures import plot_curves
from experiments.reporting.tables import query_table, write_table

AXIS = "cost, from the cheapest model's (0) to the most accurate one's (1)"
ENDS = ("cheapest model", "most accurate model")


def write_query_report(summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], folder: Path) -> None:
    """Write `results.jsonl`, `summary.json`, `curve.png` and `table.md`, and print the table."""
    write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    # the oracle is drawn as a baseline
    agents = {name: policy for name, policy in summary["policies"].items() if name not in summary["limits"]}
    plot_curves({**summary, "policies": agents}, folder / "curve.png", AXIS, ENDS)
    write_table(query_table(summary), folder / "table.md")


def flat_measures(summary: Mapping[str, Any]) -> dict[str, float | None]:
    """Every measure of every agent, AGENT/MEASURE, for a tracker."""
    return {
        f"{name}/{measure}": shown["value"]
        for name, policy in summary["policies"].items()
        for measure, shown in policy["measures"].items()
    }
