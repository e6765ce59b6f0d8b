"""RouteLLM: the LLM where it is likely enough to beat the SLM on a query.

Ong et al., 2024, "RouteLLM: Learning to Route LLMs with Preference Data". The preferences here are verdicts: the LLM
wins a query where it alone is right, loses where the SLM alone is right, and ties otherwise. With a tie as half a win,
P(the LLM wins) is 1/2 plus half of what it is expected to gain over the SLM.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Track, untracked
from agents.common.saving import saved_as
from agents.query_routing.features import compared_at_once, standardisation, standardise, with_constant
from agents.query_routing.learner import QueryLearner, same_models
from agents.query_routing.mlp import NetworksRouter
from agents.query_routing.optim import GradientDescent, Tensors
from agents.query_routing.router import EmbeddedQueries, QueryRouter
from agents.router.dataset import LabelledTokens, preference_loss
from agents.router.training import RouterTraining, fit_router
from envs.arrays import BoolArray


def llm_wins(correct: BoolArray) -> Tensor:
    """1 where the LLM alone is right, 0 where the SLM alone is, 1/2 where neither beats the other: (n,).

    Args:
        correct: of the SLM and the LLM, (n, 2).
    """
    slm, llm = torch.from_numpy(correct).float().unbind(1)
    return (1 + llm - slm) / 2


def as_errors(wins: Tensor) -> Tensor:
    """Columns (SLM, LLM) of a router whose model loses a query as often as it answers it wrongly, (n, 2)."""
    return torch.stack([wins, 1 - wins], dim=1)


@dataclass(frozen=True)
class RouteLlm(QueryLearner):
    """Learns who wins between two models."""

    def check(self, models: Sequence[str], queries: int) -> None:
        super().check(models, queries)
        if len(models) != 2:
            raise ValueError(
                f"{type(self).__name__} routes between two models, the pool has {len(models)} ({', '.join(models)}); "
                "name two of them, or choose an agent for larger pools (uniroute, knn, mlp)"
            )

    def fit_queries(
        self, train: EmbeddedQueries, known: EmbeddedQueries, seed: int = 0, track: Track = untracked
    ) -> QueryRouter:
        same_models(type(self).__name__, train, known)
        self.check(train.models, len(train))
        return self.fit_wins(train, llm_wins(train.correct), seed, track)

    @abstractmethod
    def fit_wins(self, train: EmbeddedQueries, wins: Tensor, seed: int, track: Track) -> QueryRouter:
        """Learn from the LLM's wins, (n,), over the SLM."""


# -- matrix factorisation ---------------------------------------------------------------------------------------------


def factorised_logits(tensors: Tensors, features: Tensor) -> Tensor:
    """Log-odds that the LLM wins, (n,): w . ((v_llm - v_slm) * (W e)).

    Args:
        tensors: `vectors` v of SLM and LLM, (2, dimension), `projection` W, (dimension, width), `weights` w,
            (dimension,).
        features: e, (n, width).
    """
    slm, llm = tensors["vectors"]
    logits: Tensor = (features @ tensors["projection"].T * (llm - slm)) @ tensors["weights"]
    return logits


@saved_as("routellm_mf")
@dataclass(frozen=True, eq=False)
class FactorisationRouter(QueryRouter):
    """A score of each model for a query, bilinear in the model's vector and the query's embedding.

    Attributes:
        mean: of the training queries' embeddings, (width,).
        scale: their deviation, (width,).
        vectors: of SLM and LLM, (2, dimension).
        projection: of standardised embeddings and a constant, (dimension, width + 1).
        weights: of the product, (dimension,).
    """

    mean: Tensor
    scale: Tensor
    vectors: Tensor
    projection: Tensor
    weights: Tensor

    def errors(self, embeddings: Tensor) -> Tensor:
        features = with_constant(standardise(embeddings, self.mean, self.scale))
        return as_errors(torch.sigmoid(factorised_logits(self.tensors(), features)))


@dataclass(frozen=True)
class MatrixFactorisation(RouteLlm):
    """RouteLLM's matrix factorisation: binary cross-entropy of `factorised_logits`, ties with the label 1/2.

    Args:
        dimension: of the models' vectors.
        training: how it is trained.
    """

    dimension: int = 128
    training: GradientDescent = field(default_factory=lambda: GradientDescent(weight_decay=1.0))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dimension < 1:
            raise ValueError(f"dimension must be at least 1, is {self.dimension}")

    def fit_wins(self, train: EmbeddedQueries, wins: Tensor, seed: int, track: Track) -> FactorisationRouter:
        mean, scale = standardisation(train.embeddings)
        features = with_constant(standardise(train.embeddings, mean, scale))
        rows, held_out = self.training.split(len(train), seed)

        def loss(tensors: Tensors, batch: Tensor) -> Tensor:
            return preference_loss(factorised_logits(tensors, features[batch]), wins[batch])

        generator = torch.Generator().manual_seed(seed)
        shapes = {"vectors": (2, self.dimension), "projection": (self.dimension, features.shape[1])}
        start = {
            name: torch.randn(shape, generator=generator) / math.sqrt(shape[1]) for name, shape in shapes.items()
        } | {"weights": torch.ones(self.dimension)}
        trained = self.training.lower(
            start, rows, loss, lambda tensors: loss(tensors, held_out), seed, track, "matrix factorisation"
        )
        return FactorisationRouter(train.models, mean, scale, **trained)


# -- similarity-weighted ranking --------------------------------------------------------------------------------------


def similarities(queries: Tensor, known: Tensor) -> Tensor:
    """Cosine similarity of queries (n, width) to known ones (m, width), divided by the largest of each: (n, m).

    Both are of length 1, or 0. Where a query is like none of them, none being positive, nothing is divided.
    """
    similarity = queries @ known.T
    largest = similarity.max(1, keepdim=True).values
    return torch.where(largest > 0, similarity / largest, similarity)


@saved_as("routellm_sw")
@dataclass(frozen=True, eq=False)
class SimilarityRouter(QueryRouter):
    """The LLM's wins over training queries, weighted by their similarity to the query.

    Attributes:
        mean: of the training queries' embeddings, (width,).
        known: those embeddings without the mean, of length 1, (m, width).
        wins: of the LLM, (m,).
        gamma: how much more a similar query counts, ().
    """

    mean: Tensor
    known: Tensor
    wins: Tensor
    gamma: Tensor

    def errors(self, embeddings: Tensor) -> Tensor:
        queries = torch.nn.functional.normalize(embeddings.float() - self.mean, dim=1)
        parts = [similarities(part, self.known) for part in compared_at_once(queries, len(self.known))]
        # gamma ** (1 + s), divided by their sum
        wins = [torch.softmax(torch.log(self.gamma) * part, dim=1) @ self.wins for part in parts]
        return as_errors(torch.cat(wins))


@dataclass(frozen=True)
class SimilarityWeighted(RouteLlm):
    """RouteLLM's similarity-weighted ranking: a Bradley-Terry model for every query; nothing is trained.

    Training query i counts omega_i = gamma ** (1 + s_i), s_i its `similarities`. Between two models Bradley-Terry has
    one number, the difference x of their strengths, and the log-likelihood is the sum of
    omega_i (y_i log sigma(x) + (1 - y_i) log sigma(-x)), with the win y_i = 1/2 for a tie. Its derivative, the sum of
    omega_i (y_i - sigma(x)), is 0 where sigma(x) = sum(omega_i y_i) / sum(omega_i): the probability sought, without a
    search for x.

    The training queries' mean is taken off the embeddings first, which the paper does not do with its own: hidden
    states have a large part in common, which would make all cosines close to 1 and all weights alike.

    Args:
        gamma: the base of the weights; 10 as published.
    """

    gamma: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma > 1:
            raise ValueError(f"gamma must be above 1, or similar queries count no more than others; it is {self.gamma}")

    def fit_wins(self, train: EmbeddedQueries, wins: Tensor, seed: int, track: Track) -> SimilarityRouter:
        mean = train.embeddings.double().mean(0).float()
        known = torch.nn.functional.normalize(train.embeddings.float() - mean, dim=1)
        return SimilarityRouter(train.models, mean, known, wins, torch.tensor(self.gamma))


# -- classifier -------------------------------------------------------------------------------------------------------


@saved_as("routellm_classifier")
class ClassifierRouter(NetworksRouter):
    """Asks one network, whose logits are those of the SLM winning."""

    def errors(self, embeddings: Tensor) -> Tensor:
        return as_errors(torch.sigmoid(-self.networks[0](embeddings.float())))


@dataclass(frozen=True)
class QueryClassifier(RouteLlm):
    """RouteLLM's classifier, here a router network instead of a fine-tuned language model.

    A tie enters once with either label, a win or a loss twice: the same as a label of 1/2.

    Args:
        training: how the network is trained.
    """

    training: RouterTraining = field(default_factory=lambda: RouterTraining(batch_size=128, epochs=20))

    def fit_wins(self, train: EmbeddedQueries, wins: Tensor, seed: int, track: Track) -> ClassifierRouter:
        twice = np.concatenate([wins.numpy() == 0, wins.numpy() < 1])  # the SLM wins: once strictly, once with ties
        features = train.embeddings.float().repeat(2, 1)
        data = LabelledTokens.in_memory(features, twice, np.tile(np.arange(len(train)), 2))
        network, report = fit_router(data, self.training, seed, track, torch.device("cpu"), "query")
        track({"run": "query", **report})
        return ClassifierRouter(train.models, (network,))
