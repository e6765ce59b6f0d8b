"""What labels are made of: by case, by kind of token, by label; and what rollouts say of a sample of case 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from agents.preferences.labels import DROPPED
from agents.preferences.store import Columns
from envs.arrays import IntArray
from envs.models.pool import ModelPool
from envs.tasks.task import Task

END = "end"
"""The kind of tokens that end a sequence, whatever the task."""
LABELS = {"slm": 1, "llm": 0, "dropped": DROPPED}
Composition = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Tokens by case (`case_1`), kind and label (LABELS)."""


@dataclass(frozen=True)
class CaseTwoSample:
    """Tokens in case 2 whose SLM token is rolled out to report what comes out; no label follows from it.

    Args:
        positions: how many, drawn by the run's seed; all where there are fewer, none where 0.
        finisher: who finishes the answers, `slm` or `llm`.
    """

    positions: int = 0
    finisher: Literal["slm", "llm"] = "llm"

    def __post_init__(self) -> None:
        if self.positions < 0:
            raise ValueError(f"positions must be at least 0, is {self.positions}")
        if self.finisher not in ("slm", "llm"):
            raise ValueError(f"unknown finisher {self.finisher!r}; choose slm or llm")

    def draw(self, columns: Columns, seed: int) -> IntArray:
        """Numbers of the rows that are rolled out, rising, (m,)."""
        second = np.flatnonzero(columns["case"] == 2)
        rng = np.random.default_rng(seed)
        return np.sort(rng.choice(second, min(self.positions, len(second)), replace=False))


def token_kinds(tokens: IntArray, pool: ModelPool, task: Task) -> npt.NDArray[np.str_]:
    """The kind of each token of references, (n,): END, or what the task calls it (`Task.token_kind`)."""
    known, where = np.unique(tokens, return_inverse=True)
    ends = set(pool.end_tokens.tolist())
    kinds = [END if token in ends else task.token_kind(pool.decode(np.array([token]))) for token in known.tolist()]
    return np.array(kinds, dtype=np.str_)[where]


def composition(columns: Columns, kinds: npt.NDArray[np.str_]) -> dict[str, dict[str, dict[str, int]]]:
    """How many tokens there are of each case, kind and label.

    Args:
        columns: `case` and `label`, (n,).
        kinds: of the reference's tokens, (n,).

    Returns:
        Counts by case (`case_1`), kind and label (`slm`, `llm`, `dropped`); kinds that a case lacks are left out. They
        sum to n.
    """
    return {
        f"case_{case}": {
            str(kind): {
                name: int(((columns["case"] == case) & (kinds == kind) & (columns["label"] == label)).sum())
                for name, label in LABELS.items()
            }
            for kind in np.unique(kinds[columns["case"] == case])
        }
        for case in (1, 2, 3)
    }


def right_by_kind(outcomes: npt.NDArray[np.int8], kinds: npt.NDArray[np.str_]) -> dict[str, dict[str, int]]:
    """Of rollouts, (n,), how many there were and how many came out right, by the kind of the reference's token."""
    return {
        str(kind): {"rollouts": int((kinds == kind).sum()), "right": int(outcomes[kinds == kind].sum())}
        for kind in np.unique(kinds)
    }


def composition_table(counts: Composition) -> str:
    """Counts as text, a line for each case and kind, those with the most LLM labels first.

    `of LLM labels` is a line's share of all LLM labels.
    """
    lines = [(case, kind, labels) for case, kinds in counts.items() for kind, labels in kinds.items()]
    lines.sort(key=lambda line: (-line[2]["llm"], line[0], line[1]))
    asked = max(1, sum(labels["llm"] for _, _, labels in lines))
    rows = [
        [
            case.replace("_", " "),
            kind,
            *(f"{number:,}" for number in (sum(labels.values()), labels["slm"], labels["llm"], labels["dropped"])),
            f"{labels['llm'] / asked:.1%}",
        ]
        for case, kind, labels in lines
    ]
    return _aligned([["case", "token", "tokens", "SLM", "LLM", "dropped", "of LLM labels"], *rows])


def sample_table(counts: Mapping[str, Mapping[str, Any]]) -> str:
    """Rollouts of a sample of case 2 as text, a line for each kind."""
    rows = [
        [kind, f"{found['rollouts']:,}", f"{found['right']:,}", f"{found['right'] / max(1, found['rollouts']):.1%}"]
        for kind, found in sorted(counts.items(), key=lambda item: -item[1]["rollouts"])
    ]
    return _aligned([["token", "rollouts", "right", "share"], *rows])


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """Cells in columns, words to the left and numbers to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = [not rows[-1][column][:1].isdigit() for column in range(len(widths))]
    lines = (
        "  ".join(
            cell.ljust(width) if words else cell.rjust(width)
            for cell, width, words in zip(row, widths, left, strict=True)
        )
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)
