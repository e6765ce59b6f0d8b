"""What routes whole queries: what it sees of them, what it estimates, and what it chooses."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from agents.query_routing.outcomes import QueryOutcomes, check_models
from envs.arrays import BoolArray, FloatArray, IntArray

SUREST = 1e-6
"""Scores are kept this far from 0 and 1, so that a threshold can always be moved."""


@dataclass(frozen=True, eq=False)
class EmbeddedQueries:
    """Queries as a router sees them, with the outcomes it learns from.

    Attributes:
        embeddings: float32, (n, width).
        models: names of the K models, cheapest first.
        correct: whether each model's answer is right, (n, K).
        costs: mean cost of an answer by each model, (K,).
    """

    embeddings: Tensor
    models: tuple[str, ...]
    correct: BoolArray
    costs: FloatArray

    def __post_init__(self) -> None:
        check_models(self.models)
        if self.correct.shape != (len(self.embeddings), len(self.models)):
            raise ValueError(
                f"{len(self.embeddings)} queries and {len(self.models)} models need outcomes of that shape; they have "
                f"{self.correct.shape}"
            )

    def __len__(self) -> int:
        return len(self.embeddings)

    @classmethod
    def of_outcomes(cls, outcomes: QueryOutcomes, embeddings: Tensor) -> EmbeddedQueries:
        """Outcomes with the embeddings of their prompts, (n, width)."""
        return cls(embeddings, outcomes.models, outcomes.correct, outcomes.costs.mean(0))

    def rows(self, chosen: IntArray) -> EmbeddedQueries:
        """Some of the queries, by number, (m,)."""
        return replace(self, embeddings=self.embeddings[torch.from_numpy(chosen)], correct=self.correct[chosen])


@dataclass(frozen=True, eq=False)
class QueryRouter(ABC):
    """Estimates how likely each model of a pool is to answer a query wrongly.

    A router is its tensors: they are what is saved, and what a decision reads.

    Attributes:
        models: names of the K models it routes among.
    """

    models: tuple[str, ...]

    @abstractmethod
    def errors(self, embeddings: Tensor) -> Tensor:
        """Estimated probability of a wrong answer by each model, (n, K), for queries (n, width)."""

    def tensors(self) -> dict[str, Tensor]:
        """All it consists of."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @classmethod
    def of_tensors(cls, models: tuple[str, ...], tensors: Mapping[str, Tensor]) -> Self:
        """The router that has these tensors."""
        return cls(models, **tensors)

    @property
    def parameters(self) -> int:
        """Numbers read at a decision; they are part of the cost."""
        return sum(tensor.numel() for tensor in self.tensors().values())


def choose(errors: Tensor, costs: FloatArray, cost_weight: float) -> IntArray:
    """The model of least estimated error plus weighted cost, (n,), the cheapest of equals (Jitkrittum et al. 2025).

    Args:
        errors: (n, K).
        costs: of an answer by each model, (K,).
        cost_weight: what a unit of cost is worth in errors.
    """
    return np.asarray((errors.double() + cost_weight * torch.from_numpy(costs)).argmin(1))
