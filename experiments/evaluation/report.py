"""What an evaluation leaves for people: `summary.json`, `curve.png`, `table.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.storage import write_text
from experiments.reporting.figures import plot_curves
from experiments.reporting.tables import most_wanted, table, write_table


def write_report(summary: Mapping[str, Any], folder: Path, columns: str = "few") -> None:
    """Write `summary.json`, `curve.png` and `table.md`, and print the table: `few` of its columns, or `all`."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    full = table(summary)
    how = " (columns=all prints them)"
    write_table(full, folder / "table.md", most_wanted(full), columns, summary.get("notes", ()), how)
