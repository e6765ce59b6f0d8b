"""Random splits of queries and models, and what agents choose in each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file
from torch import Tensor

from agents.common.curves import Sweep
from agents.common.policy import Track, untracked
from agents.query_routing.embeddings import Embedding
from agents.query_routing.learner import QueryLearner
from agents.query_routing.outcomes import QueryOutcomes
from agents.query_routing.router import EmbeddedQueries, choose
from envs.arrays import FloatArray, IntArray
from envs.progress import ProgressBar
from envs.storage import write_tensors
from experiments.common.tracking import labelled

SWEEP = 64
"""Cost weights on a curve."""


@dataclass(frozen=True)
class SplitSettings:
    """How queries and models are split, again and again.

    Args:
        seed: of the splits, and of the agents fitted in them.
        splits: how many there are.
        test_share: share of the queries that are routed, in (0, 1).
        unseen: models withheld from training, which are then routed among; all are known and routed among where 0.
        validation_queries: that withheld models answer, so that something is known of them.

    Raises:
        ValueError: a setting is out of range; the error names it.
    """

    seed: int = 0
    splits: int = 50
    test_share: float = 0.4
    unseen: int = 0
    validation_queries: int = 100

    def __post_init__(self) -> None:
        for key, least in (("splits", 1), ("unseen", 0), ("validation_queries", 1)):
            if getattr(self, key) < least:
                raise ValueError(f"{key} must be at least {least}, is {getattr(self, key)}")
        if not 0 < self.test_share < 1:
            raise ValueError(f"test_share must be in (0, 1), is {self.test_share}")


@dataclass(frozen=True)
class Split:
    """One random split.

    Attributes:
        train: queries agents are fitted on, (a,).
        known: queries of the validation pass, (b,); the training queries where no model is withheld.
        test: queries that are routed, (c,).
        training_models: those whose answers to the training queries are known.
        routed: the models to route among.
    """

    train: IntArray
    known: IntArray
    test: IntArray
    training_models: tuple[str, ...]
    routed: tuple[str, ...]

    @classmethod
    def draw(cls, outcomes: QueryOutcomes, settings: SplitSettings, number: int) -> Split:
        """Split `number`: a function of the seed and the number alone."""
        rng = np.random.default_rng([settings.seed, number])
        order = rng.permutation(len(outcomes))
        test, rest = np.split(order, [round(settings.test_share * len(order))])
        models = outcomes.models
        if not settings.unseen:
            return cls(
                train=np.sort(rest), known=np.sort(rest), test=np.sort(test), training_models=models, routed=models
            )
        unseen = set(rng.permutation(len(models))[: settings.unseen].tolist())
        known, train = np.split(rest, [settings.validation_queries])
        return cls(
            train=np.sort(train),
            known=np.sort(known),
            test=np.sort(test),
            training_models=tuple(model for number, model in enumerate(models) if number not in unseen),
            routed=tuple(model for number, model in enumerate(models) if number in unseen),
        )


def draw_splits(outcomes: QueryOutcomes, settings: SplitSettings) -> list[Split]:
    """Every split.

    Raises:
        ValueError: the splits would leave too few models or queries.
    """
    check_split(outcomes, settings)
    return [Split.draw(outcomes, settings, number) for number in range(settings.splits)]


def check_split(outcomes: QueryOutcomes, settings: SplitSettings) -> None:
    """Refuse splits that leave too few models or queries."""
    models = len(outcomes.models)
    if settings.unseen and not 2 <= settings.unseen <= models - 2:
        raise ValueError(
            f"unseen must be 0, or leave at least two models on either side; it is {settings.unseen} of {models} "
            f"({', '.join(outcomes.models)})"
        )
    tested = round(settings.test_share * len(outcomes))
    left = len(outcomes) - tested - bool(settings.unseen) * settings.validation_queries
    if left < 2 or tested < 1:
        raise ValueError(
            f"of {len(outcomes)} queries, a test_share of {settings.test_share} and {settings.validation_queries} "
            f"validation_queries leave {left} to train on; lower them"
        )


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
    train = embedded(outcomes, embeddings, split.train, split.training_models)
    known = embedded(outcomes, embeddings, split.known, split.routed)
    test = embedded(outcomes, embeddings, split.test, split.routed)
    routed = {}
    for name, agent in agents.items():
        router = agent.fit_queries(train, known, seed, labelled(track, agent=name))
        routed[name] = Routed(route(router.errors(test.embeddings), known.costs))
    routed["oracle"] = Routed(route(torch.from_numpy(1.0 - test.correct), known.costs))
    return routed


def check_agents(agents: Mapping[str, QueryLearner], splits: Sequence[Split]) -> None:
    """Refuse agents that cannot be fitted to these models, or on so few queries."""
    for agent in agents.values():
        agent.check(splits[0].routed, len(splits[0].known))


def route_splits(
    outcomes: QueryOutcomes,
    splits: Sequence[Split],
    embedding: Embedding,
    agents: Mapping[str, QueryLearner],
    seed: int = 0,
    folder: Path | None = None,
    track: Track = untracked,
) -> dict[str, list[Routed]]:
    """What every agent, and the oracle, chooses in each split.

    Args:
        outcomes: of all queries and models.
        splits: of them.
        embedding: fitted on the training queries of each split.
        agents: by name.
        seed: of the agents in the first split; one more in each that follows.
        folder: where a split is kept when it is done, and not made again; nothing is kept where None.
        track: receives what agents measure, each row with its split and agent.
    """
    routed: dict[str, list[Routed]] = {name: [] for name in (*agents, "oracle")}
    for number, split in enumerate(ProgressBar(splits, desc="splits", leave=False)):
        path = folder and folder / f"{number:03d}.safetensors"
        if path and path.is_file():
            chosen = {name: Routed(choices.numpy()) for name, choices in load_file(path).items()}
        else:
            chosen = route_split(outcomes, split, embedding, agents, seed + number, labelled(track, split=number))
            if path:
                write_tensors(path, {name: torch.from_numpy(one.choices) for name, one in chosen.items()})
        for name, one in chosen.items():
            routed[name].append(one)
    return routed
