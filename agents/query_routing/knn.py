"""A baseline: a model is as often wrong on a query as it was on the most similar queries that it answered."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from agents.common.policy import Track, untracked
from agents.common.saving import saved_as
from agents.query_routing.features import compared_at_once, standardisation, standardise
from agents.query_routing.learner import QueryLearner
from agents.query_routing.outcomes import fewest_queries
from agents.query_routing.router import EmbeddedQueries, QueryRouter

NEIGHBOURS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""What the number of neighbours is chosen from, as far as there are others."""


@saved_as("knn")
@dataclass(frozen=True, eq=False)
class NeighboursRouter(QueryRouter):
    """The mean error of each model over the nearest queries, by Euclidean distance of standardised embeddings.

    Attributes:
        mean: of the embeddings of the queries it knows, (width,).
        scale: their deviation, (width,).
        known: those embeddings, standardised, (n, width).
        wrong: whether each model's answer is wrong, (n, K).
        neighbours: how many to ask, ().
    """

    mean: Tensor
    scale: Tensor
    known: Tensor
    wrong: Tensor
    neighbours: Tensor

    def errors(self, embeddings: Tensor) -> Tensor:
        queries = standardise(embeddings, self.mean, self.scale)
        rates = [self.wrong[near].float().mean(1) for near in nearest(queries, self.known, int(self.neighbours))]
        return torch.cat(rates)


def nearest(queries: Tensor, known: Tensor, count: int, others: bool = False) -> Iterator[Tensor]:
    """Numbers of the `count` nearest of `known`, (m, width), by rising distance, for some queries at a time.

    Args:
        queries: (n, width).
        known: (m, width).
        count: how many.
        others: the queries are the known ones, and none is a neighbour of itself.

    Yields:
        (part of n, count), in order.
    """
    begun = 0
    for part in compared_at_once(queries, len(known)):
        distances = torch.cdist(part, known)
        if others:
            distances[torch.arange(len(part)), begun + torch.arange(len(part))] = torch.inf
        begun += len(part)
        yield distances.topk(count, largest=False).indices


def leave_one_out(known: Tensor, wrong: Tensor, counts: Sequence[int]) -> Tensor:
    """Mean squared error of the error rates of each query's nearest others, (len(counts),).

    Args:
        known: queries, (n, width).
        wrong: whether each model's answer is wrong, (n, K).
        counts: numbers of neighbours, rising and below n.
    """
    asked = torch.tensor(counts)
    total, begun = torch.zeros(len(counts)).double(), 0
    for near in nearest(known, known, counts[-1], others=True):
        rates = wrong[near].float().cumsum(1)[:, asked - 1] / asked[:, None]  # (rows, counts, K)
        truth = wrong[begun : begun + len(near), None].float()
        total += ((rates - truth) ** 2).double().sum((0, 2))
        begun += len(near)
    return total / wrong.numel()


@dataclass(frozen=True)
class Neighbours(QueryLearner):
    """Nearest neighbours: nothing is trained, so that any model can join by answering the queries that are known.

    Args:
        neighbours: how many queries are asked; where None the one of NEIGHBOURS that predicts best what models make of
            a known query from the others (mean squared error).
    """

    neighbours: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.neighbours is not None and self.neighbours < 1:
            raise ValueError(f"neighbours must be at least 1, is {self.neighbours}")

    def check(self, models: Sequence[str], queries: int) -> None:
        super().check(models, queries)
        if self.neighbours is not None:
            fewest_queries("neighbours", self.neighbours, range(queries))

    def fit_queries(
        self, train: EmbeddedQueries, known: EmbeddedQueries, seed: int = 0, track: Track = untracked
    ) -> NeighboursRouter:
        self.check(known.models, len(known))
        mean, scale = standardisation(known.embeddings)
        features, wrong = standardise(known.embeddings, mean, scale), torch.from_numpy(~known.correct)
        neighbours = self.neighbours
        if neighbours is None:
            counts = [count for count in NEIGHBOURS if count < len(known)]
            squared_errors = leave_one_out(features, wrong, counts)
            neighbours = counts[int(squared_errors.argmin())]
            track({"run": "knn", "neighbours": neighbours, "squared_error": squared_errors.min().item()})
        return NeighboursRouter(known.models, mean, scale, features, wrong, torch.tensor(neighbours))
