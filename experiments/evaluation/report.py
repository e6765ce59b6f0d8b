"""What an evaluation leaves for people: `summary.json`, `curve.png`, `table.md`, `transcripts.html`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from envs.storage import write_text
from experiments.reporting.figures import plot_curves
from experiments.reporting.tables import markdown, table


def write_report(summary: Mapping[str, Any], folder: Path) -> None:
    """Write `summary.json`, `curve.png` and `table.md`, and print the table."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    comparison = table(summary)
    write_text(folder / "table.md", markdown(comparison))
    Console(width=max(150, Console().width)).print(comparison)
