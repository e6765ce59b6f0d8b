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


@dataclass(frozen=True)
class Uncertainty:
    """Scores a decision by how sure the SLM is of its next token.

    Args:
        measure: `max_probability`, `margin` (first less second probability) or `entropy` (1 - H / log vocabulary).
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
        log_probabilities = observation.logits.float().log_softmax(-1)
        if self.measure == "entropy":
            entropy = -(log_probabilities.exp() * log_probabilities.clamp(min=-1e9)).sum(-1)
            return 1 - entropy / math.log(log_probabilities.shape[-1])
        top = log_probabilities.topk(2, dim=-1).values.exp()
        return top[:, 0] if self.measure == "max_probability" else top[:, 0] - top[:, 1]
