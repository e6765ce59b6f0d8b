"""What a verification found: faults, near ties, and how much was checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple


class Fault(NamedTuple):
    """Something that does not hold.

    Attributes:
        file: that says it.
        episode: its number; None where it is of the whole file.
        what: is wrong.
    """

    file: Path
    episode: int | None
    what: str

    def __str__(self) -> str:
        return f"{self.file}{'' if self.episode is None else f', episode {self.episode}'}: {self.what}"


@dataclass
class Findings:
    """What was checked, and what came out.

    Attributes:
        faults: what does not hold.
        near_ties: tokens that another machine computes otherwise, where the logits of the two are nearly equal.
        unchecked: what could not be checked, and why.
        counts: how many evaluations, files, episodes, tokens, scores, verdicts and rows were checked.
        largest_score_difference: between a score that is traced and the same one computed again.
    """

    faults: list[Fault] = field(default_factory=list)
    near_ties: list[Fault] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    largest_score_difference: float = 0.0

    def fault(self, file: Path, episode: int | None, what: str) -> None:
        """Note a fault."""
        self.faults.append(Fault(file, episode, what))

    def count(self, what: str, number: int = 1) -> None:
        """Note that so many more of something were checked."""
        self.counts[what] = self.counts.get(what, 0) + number

    def summary(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "right": not self.faults,
            "checked": self.counts,
            "largest_score_difference": self.largest_score_difference,
            "faults": [str(fault) for fault in self.faults],
            "near_ties": [str(tie) for tie in self.near_ties],
            "unchecked": self.unchecked,
        }
