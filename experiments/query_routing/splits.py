"""Random splits of queries and models, and what agents choose in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import DictConfig
from torch import Tensor

from agents.common.policy import Track
from agents.query_routing.embeddings import Embedding
from agents.query_routing.learner import QueryLearner
from agents.query_routing.outcomes import QueryOutcomes
from agents.query_routing.router import EmbeddedQueries, choose
from envs.arrays import FloatArray, IntArray
from experiments.evaluation.metrics import Sweep

SWEEP = 64
"""Cost weights on a curve."""


@dataclass(frozen=True)
class Split:
    """One random split.

    Attributes:
        train: queries agents are fitted on, (a,).
        known: queries of the validation pass, (b,); the training queries where no model is withheld.
        test: queries that are routed, (c,).
        seen: the training models.
        routed: the models to route among.
    """

    train: IntArray
    known: IntArray
    test: IntArray
    seen: tuple[str, ...]
    routed: tuple[str, ...]

    @classmethod
    def draw(cls, outcomes: QueryOutcomes, settings: DictConfig, number: int) -> Split:
        """Split `number`: a function of the seed and the number alone."""
        rng = np.random.default_rng([settings.seed, number])
        order = rng.permutation(len(outcomes))
        test, rest = np.split(order, [round(settings.test_share * len(order))])
        models = outcomes.models
        if not settings.unseen:
            return cls(np.sort(rest), np.sort(rest), np.sort(test), models, models)
        unseen = set(rng.permutation(len(models))[: settings.unseen].tolist())
        known, train = np.split(rest, [settings.validation_queries])
        return cls(
            np.sort(train), np.sort(known), np.sort(test),
            tuple(model for number, model in enumerate(models) if number not in unseen),
            tuple(model for number, model in enumerate(models) if number in unseen),
        )  # fmt: skip


@dataclass(frozen=True)
class Routed:
    """What one agent chose in one split.

    Attributes:
        choices: the model chosen for each test query at each cost weight, (SWEEP, queries).
    """

    choices: npt.NDArray[np.int8]

    def sweep(self, test: QueryOutcomes) -> Sweep:
        """Its curve, between the cheapest model alone and the most accurate one, which every agent can fall back on."""
        best = int(test.correct.mean(0).argmax())
        queries = np.arange(len(test))
        choices = np.concatenate(
            [np.zeros((1, len(test)), dtype=np.int64), self.choices, np.full((1, len(test)), best)], dtype=np.int64
        )
        return Sweep(test.correct[queries, choices], test.costs[queries, choices])

    def calls(self, test: QueryOutcomes) -> Sweep | None:
        """The same between two models, a call of the dearer one counted as 1; None where there are more."""
        if len(test.models) > 2:
            return None
        priced = np.broadcast_to([1e-12, 1.0], test.costs.shape)
        return self.sweep(replace(test, costs=priced))


def cost_weights(errors: Tensor, costs: FloatArray) -> FloatArray:
    """Cost weights that cover a curve evenly, (SWEEP,): quantiles of those at which a choice between two models turns.

    Args:
        errors: estimated for some queries, (n, models).
        costs: of an answer by each model, (models,).
    """
    estimated = errors.double().numpy()
    first, second = np.triu_indices(len(costs), 1)
    # models that cost all but the same are told apart by their errors, whatever a unit of cost is worth
    apart = costs[second] - costs[first] > 0.01 * costs.max()
    first, second = first[apart], second[apart]
    turns = (estimated[:, first] - estimated[:, second]) / (costs[second] - costs[first])
    return np.quantile(turns, np.linspace(0, 1, SWEEP)) if turns.size else np.zeros(SWEEP)


def route(errors: Tensor, costs: FloatArray) -> npt.NDArray[np.int8]:
    """Choices at every cost weight, (SWEEP, n)."""
    relative = costs / costs.max()
    weights = cost_weights(errors, relative)
    return np.stack([choose(errors, relative, float(weight)) for weight in weights]).astype(np.int8)


def embedded(outcomes: QueryOutcomes, embeddings: Tensor, rows: IntArray, models: Sequence[str]) -> EmbeddedQueries:
    """Some queries and models, as agents see them."""
    part = outcomes.of(models).rows(rows)
    return EmbeddedQueries.of_outcomes(part, embeddings[torch.from_numpy(rows)])


def route_split(
    outcomes: QueryOutcomes,
    split: Split,
    embedding: Embedding,
    agents: Mapping[str, QueryLearner],
    seed: int,
    track: Track,
) -> dict[str, Routed]:
    """What every agent, and the oracle that knows the outcomes, chooses in one split."""
    embedder = embedding.fit([outcomes.prompts[i] for i in split.train], seed)
    embeddings = embedder.embed(outcomes.prompts)
    train = embedded(outcomes, embeddings, split.train, split.seen)
    known = embedded(outcomes, embeddings, split.known, split.routed)
    test = embedded(outcomes, embeddings, split.test, split.routed)
    found = {}
    for name, agent in agents.items():
        router = agent.fit_queries(train, known, seed, track)
        found[name] = Routed(route(router.errors(test.embeddings), known.costs))
    found["oracle"] = Routed(route(torch.from_numpy(1.0 - test.correct), known.costs))
    return found


def check_split(outcomes: QueryOutcomes, config: DictConfig) -> None:
    """Refuse splits that leave too few models or queries."""
    models = len(outcomes.models)
    if config.unseen and not 2 <= config.unseen <= models - 2:
        raise ValueError(
            f"unseen must be 0, or leave at least two models on either side; it is {config.unseen} of {models} "
            f"({', '.join(outcomes.models)})"
        )
    left = len(outcomes) - round(config.test_share * len(outcomes)) - bool(config.unseen) * config.validation_queries
    if left < 2 or round(config.test_share * len(outcomes)) < 1:
        raise ValueError(
            f"of {len(outcomes)} queries, a test_share of {config.test_share} and {config.validation_queries} "
            f"validation_queries leave {left} to train on; lower them"
        )
