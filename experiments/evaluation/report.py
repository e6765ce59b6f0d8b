"""What an evaluation leaves for people: `index.html`, and `summary.json`, `curve.png` and `table.md` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from envs.storage import write_text
from experiments.reporting.figures import plot_curves
from experiments.reporting.page import PAGE, PageParts, page
from experiments.reporting.tables import most_wanted, table, write_table


def write_report(
    summary: Mapping[str, Any], folder: Path, columns: str = "few", parts: PageParts | None = None
) -> None:
    """Write `summary.json`, `curve.png`, `table.md` and, last, `index.html`, and print the table.

    Args:
        summary: of an evaluation, or of several that were merged.
        folder: where it is written.
        columns: of the table that is printed, `few` or `all`.
        parts: what the page shows besides.
    """
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    full = table(summary)
    how = " (columns=all prints them)"
    write_table(full, folder / "table.md", most_wanted(full), columns, summary.get("notes", ()), how)
    write_text(folder / PAGE, page(summary, parts or PageParts()))
