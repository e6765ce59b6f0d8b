"""Policies that learn nothing: one model alone, a random choice, the SLM's own uncertainty.

The measures of uncertainty are those of model cascades (e.g. Gupta et al., ICLR 2024), but taken at every token, not
once a query.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Observation, Policy


@dataclass(frozen=True)
class Always(Policy):
    """One model writes everything.

    Args:
        slm: whether it is the SLM.
    """

    slm: bool = True

    def score(self, observation: Observation) -> Tensor:
        return torch.full((len(observation),), float(self.slm))


@dataclass(frozen=True)
class Random(Policy):
    """A score drawn uniformly for every decision.

    The draw is a function of seed, episode and position alone: it does not depend on which rows step together, and a
    higher threshold sends a superset of the decisions to the LLM.

    Args:
        seed: of the draws.
    """

    seed: int = 0

    def score(self, observation: Observation) -> Tensor:
        with np.errstate(over="ignore"):
            key = np.full(len(observation), self.seed, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            for part in (observation.host_episodes, observation.host_positions):
                key = splitmix64(key ^ part.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        return torch.from_numpy((key >> np.uint64(11)).astype(np.float64) / 2**53)


def splitmix64(key: np.ndarray[Any, np.dtype[np.uint64]]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The finalizer of SplitMix64 (Steele et al. 2014): well-spread bits out of counters."""
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))


MEASURES = ("max_probability", "margin", "entropy")
MOST_NATS = math.log(2**18)
"""The entropy that scores 0: a uniform draw from a vocabulary larger than any."""


@dataclass(frozen=True)
class Uncertainty(Policy):
    """Scores a decision by how sure the SLM is of its next token.

    Args:
        measure: `max_probability`, `margin` (first less second probability) or `entropy` (1 - H / MOST_NATS).
    """

    measure: Literal["max_probability", "margin", "entropy"] = "entropy"

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise ValueError(f"unknown measure {self.measure!r}; choose one of {', '.join(MEASURES)}")

    def score(self, observation: Observation) -> Tensor:
        entropy, top, second = observation.logit_features[:, :3].unbind(-1)
        if self.measure == "entropy":
            return 1 - entropy / MOST_NATS
        return top.exp() if self.measure == "max_probability" else top.exp() - second.exp()
