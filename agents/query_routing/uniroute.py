"""UniRoute: models described by their error rates on clusters of queries, so that they come and go without training.

Jitkrittum et al., 2025, "Universal Model Routing for Efficient LLM Inference". A query is routed to the model of least
Phi(x) . Psi(m) + lambda c_m (`agents.query_routing.router.choose`): Phi says which clusters a query belongs to, Psi
how often a model is wrong in each.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Track, untracked
from agents.common.saving import saved_as
from agents.query_routing.features import standardisation, standardise, with_constant
from agents.query_routing.learner import QueryLearner
from agents.query_routing.optim import GradientDescent
from agents.query_routing.outcomes import fewest_queries
from agents.query_routing.router import SUREST, EmbeddedQueries, QueryRouter
from envs.arrays import BoolArray

CLUSTERS = (2, 4, 8, 16, 32, 64, 128)
"""What the number of clusters is chosen from, as far as half of the queries go; one cluster where they do not."""
DRAWS = 8
"""Validation passes that are drawn to choose it."""


def cluster_errors(memberships: Tensor, wrong: Tensor, shrinkage: float = 0.0) -> Tensor:
    """Psi, the error rate of each model in each cluster, (clusters, K).

    Sum over queries of Phi_k(x) err_m(x), divided by the sum of Phi_k(x); a model's mean error where no query is.

    Args:
        memberships: Phi of queries, (n, clusters).
        wrong: 1 where a model's answer is wrong, 0 elsewhere, (n, K).
        shrinkage: queries with the model's mean error added to each cluster.
    """
    mean = wrong.mean(0)
    weight = memberships.sum(0)[:, None] + shrinkage
    rates = (memberships.T @ wrong + shrinkage * mean) / weight.clamp(min=1e-12)
    return torch.where(weight > 1e-12, rates, mean)


@dataclass(frozen=True, eq=False)
class ClusterRouter(QueryRouter):
    """Phi and Psi, and what a model that joins needs: Phi of the validation queries.

    Attributes:
        mean: of the training queries' embeddings, (width,).
        scale: their deviation, (width,).
        theta: what the map consists of, a row for each cluster, (clusters, ...).
        known: Phi of the validation queries, (n, clusters).
        rates: Psi, (clusters, K).
        shrinkage: of `cluster_errors`, ().
    """

    mean: Tensor
    scale: Tensor
    theta: Tensor
    known: Tensor
    rates: Tensor
    shrinkage: Tensor

    @staticmethod
    @abstractmethod
    def memberships(features: Tensor, theta: Tensor) -> Tensor:
        """Phi of standardised embeddings (n, width) under a map `theta`: (n, clusters), rows that sum to 1."""

    @classmethod
    def of(cls, known: EmbeddedQueries, mean: Tensor, scale: Tensor, theta: Tensor, shrinkage: float) -> Self:
        """The router among the models whose outcomes are known, by a map of embeddings on the scale given."""
        phi = cls.memberships(standardise(known.embeddings, mean, scale), theta)
        empty = cls((), mean, scale, theta, phi, phi.new_zeros(phi.shape[1], 0), torch.tensor(shrinkage))
        rates = [empty._rates(known.correct[:, number]) for number in range(len(known.models))]
        return replace(empty, models=known.models, rates=torch.cat(rates, dim=1))

    @property
    def clusters(self) -> int:
        """How many there are."""
        return len(self.theta)

    @property
    def parameters(self) -> int:
        """Numbers read at a decision; the validation queries are read only when a model joins."""
        return super().parameters - self.known.numel()

    def errors(self, embeddings: Tensor) -> Tensor:
        return self.memberships(standardise(embeddings, self.mean, self.scale), self.theta) @ self.rates

    def with_model(self, name: str, correct: BoolArray | Sequence[bool] | None, place: int | None = None) -> Self:
        """This router with one more model; nothing is trained.

        Args:
            name: of the model.
            correct: its validation pass: whether it answers each validation query rightly, in their order, (n,).
            place: its number among the models, cheapest first; the last where None.

        Raises:
            ValueError: it is there already, its outcomes are missing or not those of the validation queries, or there
                is no such place.
        """
        queries, count = len(self.known), len(self.models)
        place = count if place is None else place
        if name in self.models:
            raise ValueError(f"{name} is among the models already ({', '.join(self.models)}); take it out first")
        if correct is None or np.shape(correct) != (queries,):
            raise ValueError(
                f"{name} needs a validation pass, whether it is right on each of the {queries} validation queries; "
                + ("there is none" if correct is None else f"its outcomes have shape {np.shape(correct)}")
            )
        if not 0 <= place <= count:
            raise ValueError(f"place of {name} must be in 0..{count}, is {place}")
        rates = torch.cat([self.rates[:, :place], self._rates(np.asarray(correct)), self.rates[:, place:]], dim=1)
        return replace(self, models=(*self.models[:place], name, *self.models[place:]), rates=rates)

    def without_model(self, name: str) -> Self:
        """This router with one model less.

        Raises:
            ValueError: it is not there, or only one would be left.
        """
        if name not in self.models:
            raise ValueError(f"{name} is not among the models ({', '.join(self.models)})")
        if len(self.models) < 3:
            raise ValueError(f"without {name} one model is left of {', '.join(self.models)}: nothing to choose from")
        kept = [number for number, model in enumerate(self.models) if model != name]
        return replace(self, models=tuple(self.models[number] for number in kept), rates=self.rates[:, kept])

    def _rates(self, correct: BoolArray) -> Tensor:
        """One model's column of Psi, (clusters, 1): by itself, so that it is the same in whatever pool."""
        wrong = torch.from_numpy(~correct.astype(bool)).to(self.known.dtype)[:, None]
        return cluster_errors(self.known, wrong, float(self.shrinkage))


@saved_as("uniroute_kmeans")
class NearestCentreRouter(ClusterRouter):
    """A query belongs to the cluster whose centre is nearest; `theta` are the centres, (clusters, width)."""

    @staticmethod
    def memberships(features: Tensor, theta: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(torch.cdist(features, theta).argmin(1), len(theta)).float()


@saved_as("uniroute_learned")
class LearnedMapRouter(ClusterRouter):
    """A query belongs to cluster k in proportion to exp(theta_k . phi), phi its embedding and a constant.

    `theta` is (clusters, width + 1).
    """

    @staticmethod
    def memberships(features: Tensor, theta: Tensor) -> Tensor:
        return torch.softmax(with_constant(features) @ theta.T, dim=1)


@dataclass(frozen=True)
class UniRoute(QueryLearner):
    """Learns a map from queries to clusters, and describes models by it.

    Args:
        clusters: how many; where None the one of CLUSTERS by which error rates found on one half of the training
            queries, or as many of it as are known of the models to route among, predict best what the training models
            make of the other half (mean squared error, both ways).
        shrinkage: queries with the model's mean error that are added to each cluster; none as published.
        starts: of K-means; the best is taken.
    """

    clusters: int | None = None
    shrinkage: float = 0.0
    starts: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None and self.clusters < 1:
            raise ValueError(f"clusters must be at least 1, is {self.clusters}")
        if self.starts < 1:
            raise ValueError(f"starts must be at least 1, is {self.starts}")
        if self.shrinkage < 0:
            raise ValueError(f"shrinkage must be at least 0, is {self.shrinkage}")

    def check(self, models: Sequence[str], queries: int) -> None:
        super().check(models, queries)
        if self.clusters is not None:
            fewest_queries("clusters", self.clusters, range(queries))

    def fit_queries(
        self, train: EmbeddedQueries, known: EmbeddedQueries, seed: int = 0, track: Track = untracked
    ) -> ClusterRouter:
        self.check(train.models, len(train))
        self.check(known.models, len(known))
        clusters = self.clusters or self._chosen(train, len(known), seed, track)
        return self.fit_map(train, known, clusters, seed, track)

    @abstractmethod
    def fit_map(
        self, train: EmbeddedQueries, known: EmbeddedQueries, clusters: int, seed: int, track: Track
    ) -> ClusterRouter:
        """Learn the map of training queries to so many clusters; the router among the models that are known."""

    def _chosen(self, train: EmbeddedQueries, known: int, seed: int, track: Track) -> int:
        """The number of clusters by cross-validation over the training queries."""
        rng = np.random.default_rng(seed)
        halves = [train.rows(np.sort(part)) for part in np.array_split(rng.permutation(len(train)), 2)]
        most_known = min(map(len, halves))
        counts = [count for count in CLUSTERS if count <= min(known, most_known)]
        if not counts:
            return 1
        draws = DRAWS if known < most_known else 1
        squared_errors = {}
        for clusters in counts:
            squares = 0.0
            for half, other_half in (halves, halves[::-1]):
                router = self.fit_map(half, half, clusters, seed, untracked)
                wrong = torch.from_numpy(~other_half.correct).float()
                # error rates of as many queries as will be known: few do not describe many clusters
                for _ in range(draws):
                    drawn = half.rows(rng.permutation(len(half))[:known])
                    redrawn = router.of(drawn, router.mean, router.scale, router.theta, self.shrinkage)
                    squares += ((redrawn.errors(other_half.embeddings) - wrong) ** 2).mean(1).sum().item()
            squared_errors[clusters] = squares / len(train) / draws
        chosen = min(squared_errors, key=lambda clusters: squared_errors[clusters])
        track({"run": "uniroute", "clusters": chosen, "squared_error": squared_errors[chosen]})
        return chosen


def centres_of(features: Tensor, clusters: int, starts: int, seed: int) -> Tensor:
    """Centres of features (n, width) by K-means, (clusters, width), the best of so many starts."""
    from sklearn.cluster import KMeans

    means = KMeans(clusters, n_init=starts, random_state=seed).fit(features.numpy())
    return torch.tensor(means.cluster_centers_).float()  # a copy, as those that are read from files


@dataclass(frozen=True)
class UniRouteKMeans(UniRoute):
    """UniRoute by K-means: clusters of the training queries' standardised embeddings, without their outcomes."""

    def fit_map(
        self, train: EmbeddedQueries, known: EmbeddedQueries, clusters: int, seed: int, track: Track
    ) -> NearestCentreRouter:
        mean, scale = standardisation(train.embeddings)
        centres = centres_of(standardise(train.embeddings, mean, scale), clusters, self.starts, seed)
        return NearestCentreRouter.of(known, mean, scale, centres, self.shrinkage)


def map_loss(theta: Tensor, features: Tensor, wrong: Tensor, described: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Log-loss of the training models' errors predicted as Phi(x) . Psi(m).

    Args:
        theta: the map, (clusters, width + 1).
        features: standardised embeddings of queries, (n, width).
        wrong: 1 where a model's answer is wrong, (n, K).
        described: the queries, features and errors, on which Psi is taken; the same where None.
    """
    phi = LearnedMapRouter.memberships(features, theta)
    others, errors = described or (features, wrong)
    predicted = phi @ cluster_errors(LearnedMapRouter.memberships(others, theta), errors)
    return torch.nn.functional.binary_cross_entropy(predicted.clamp(SUREST, 1 - SUREST), wrong)


@dataclass(frozen=True)
class UniRouteLearned(UniRoute):
    """UniRoute by a learned map, which starts as a soft form of K-means.

    Args:
        training: how the map is trained. Psi is taken on the batch itself, and for queries held out on all the others,
            so that a batch should have several queries a cluster.
    """

    training: GradientDescent = field(default_factory=lambda: GradientDescent(batch_size=1024, lr=2e-2))

    def fit_map(
        self, train: EmbeddedQueries, known: EmbeddedQueries, clusters: int, seed: int, track: Track
    ) -> LearnedMapRouter:
        mean, scale = standardisation(train.embeddings)
        features = standardise(train.embeddings, mean, scale)
        wrong = torch.from_numpy(~train.correct).float()
        rows, held_out = self.training.split(len(train), seed)
        trained = self.training.lower(
            {"theta": soft_map(features, centres_of(features, clusters, self.starts, seed))},
            rows,
            lambda tensors, batch: map_loss(tensors["theta"], features[batch], wrong[batch]),
            lambda tensors: map_loss(
                tensors["theta"], features[held_out], wrong[held_out], (features[rows], wrong[rows])
            ),
            seed,
            track,
            "uniroute",
        )
        return LearnedMapRouter.of(known, mean, scale, trained["theta"], self.shrinkage)


def soft_map(features: Tensor, centres: Tensor) -> Tensor:
    """The map of weights exp(-d_k^2 / 2), d_k the distance to centre k of (clusters, width): (clusters, width + 1).

    The unit is the mean distance of the features, (n, width), to the nearest centre. By the deviation of each feature,
    as in a mixture of Gaussians, queries would belong to one cluster all but entirely, and nothing would move the map.
    """
    unit = (torch.cdist(features, centres).min(1).values ** 2).mean()
    bias = -(centres**2).sum(1, keepdim=True) / 2
    return torch.cat([centres, bias], dim=1) / unit.clamp(min=1e-4)
