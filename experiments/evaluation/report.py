"""What an evaluation leaves for people: `results.jsonl`, `index.html`, and what lies beside it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from agents.common.policy import Track
from envs.storage import write_text
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.reporting.figures import plot_curves
from experiments.reporting.page import PAGE, PageParts, page
from experiments.reporting.tables import most_wanted, table, write_table

RESULTS = "results.jsonl"
"""In a folder: a row for each policy and threshold."""


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


def baseline_runs(baselines: Baselines, unit: str) -> Iterator[tuple[str, Answers]]:
    """The answers of baselines that have a row in `results.jsonl`, each with its name there.

    Args:
        baselines: of one set of problems.
        unit: of the costs that the oracle's answers are ordered by.
    """
    yield "slm", baselines.slm
    yield "llm", baselines.llm
    if baselines.speculative is not None:
        yield "speculative", baselines.speculative
    for answers in baselines.frontier(unit):
        yield "oracle", answers


def result_row(threshold: float | None, seed: int, answers: Answers, llm: Answers) -> dict[str, Any]:
    """A row of `results.jsonl`, but for its name."""
    return {"threshold": threshold, "seed": seed, **answers.row(llm)}


class ResultRows:
    """Writes a row for every run of a policy, all of them at each new one.

    Args:
        llm: that costs are relative to.
        seed: named in every row.
        path: of the JSON lines; nothing is written where None.
        track: receives them too.
    """

    def __init__(self, llm: Answers, seed: int, path: Path | None, track: Track) -> None:
        self.llm, self.seed, self.path, self.track = llm, seed, path, track
        self.lines: list[str] = []

    def record(self, name: str, threshold: float | None, answers: Answers) -> None:
        row = result_row(threshold, self.seed, answers, self.llm)
        self.track({"run": name, **row})
        self.lines.append(json.dumps({"policy": name, **row}) + "\n")
        if self.path is not None:
            write_text(self.path, "".join(self.lines))
