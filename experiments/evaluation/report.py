"""What an evaluation leaves for people: `summary.json`, `curve.png`, `table.md`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.storage import write_text
from experiments.reporting.figures import plot_curves
from experiments.reporting.tables import table, write_table


def write_report(summary: Mapping[str, Any], folder: Path) -> None:
    """Write `summary.json`, `curve.png` and `table.md`, and print the table."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    write_table(table(summary), folder / "table.md")
