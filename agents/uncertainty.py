"""The SLM's own uncertainty as a router: no training, a hard baseline to beat."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from agents.policy import Track, untracked
from envs.models import ModelPool
from envs.steps import Observation
from envs.tasks.task import Task

MEASURES = ("max_probability", "margin", "entropy")
MOST_NATS = math.log(2**18)
"""The entropy that scores 0: a uniform draw from a vocabulary larger than any."""


@dataclass(frozen=True)
class Uncertainty:
    """Scores a decision by how sure the SLM is of its next token.

    Args:
        measure: `max_probability`, `margin` (first less second probability) or `entropy` (1 - H / MOST_NATS).
    """

    measure: Literal["max_probability", "margin", "entropy"] = "entropy"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"unknown measure {self.measure!r}; choose one of {', '.join(MEASURES)}")

    def fit(
        self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked, folder: Path | None = None
    ) -> Uncertainty:
        return self

    def score(self, observation: Observation) -> Tensor:
        entropy, top, second = observation.logit_features[:, :3].unbind(-1)
        if self.measure == "entropy":
            return 1 - entropy / MOST_NATS
        return top.exp() if self.measure == "max_probability" else top.exp() - second.exp()
