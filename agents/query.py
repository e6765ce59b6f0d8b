"""Routing whole queries: what routers see of them, what a router is, and its policy on the token-level track."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from agents.policy import POLICY_FILE, Always, Track, class_name, class_named, untracked, weights_fingerprint
from agents.rollout import Scheduling, decode
from envs.cache import IntArray
from envs.costs import Bytes, FloatArray, Price
from envs.files import write_tensors, write_text
from envs.manifest import check_manifest, models_manifest
from envs.models import ModelPool
from envs.queries import QueryOutcomes, check_models
from envs.steps import BoolArray, Observation
from envs.tasks.task import Example, Task, first_training_example

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


@dataclass(frozen=True)
class QueryLearner(ABC):
    """Learns to route whole queries from what each model of a pool makes of training queries by itself.

    Args:
        examples: training problems that every model answers.
        max_new_tokens: the longest answer.
        llm_share: where given, scores are moved so that at the threshold 0.5 this share of the training queries goes to
            the LLM: a threshold calibrated by the share of strong calls, as RouteLLM's. Their order stays.
        scheduling: how answers share passes.
    """

    examples: int = 2000
    max_new_tokens: int = 128
    llm_share: float | None = None
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        if self.examples < 2:
            raise ValueError(f"examples must be at least 2, is {self.examples}")
        if self.llm_share is not None and not 0 < self.llm_share < 1:
            raise ValueError(f"llm_share must be in (0, 1), is {self.llm_share}")

    def check(self, models: Sequence[str], queries: int) -> None:
        """Refuse a pool or a number of queries that it cannot learn from; called before any model answers.

        Raises:
            ValueError: it cannot; the error says why.
        """
        check_models(models)
        if queries < 2:
            raise ValueError(f"a router needs at least 2 queries to learn from, there are {queries}")

    @abstractmethod
    def fit_queries(
        self, train: EmbeddedQueries, known: EmbeddedQueries, seed: int = 0, track: Track = untracked
    ) -> QueryRouter:
        """Learn to route.

        Args:
            train: what training models made of training queries.
            known: what the models to route among made of queries: the same as `train` where the pool is fixed, else one
                validation pass of each, whether it was among the training models or not.
            seed: makes the result repeat.
            track: receives rows of measurements.

        Raises:
            ValueError: a setting asks for more than there are queries.
        """

    def fit(
        self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked, folder: Path | None = None
    ) -> QueryPolicy:
        self.check(pool.names, self.examples)
        queries = self._answered(pool, task, seed, folder)
        router = self.fit_queries(queries, queries, seed, track)
        policy = QueryPolicy(router, models_manifest(pool))
        right = queries.correct.mean(0).tolist()
        track({"run": "queries", **{f"right_{name}": share for name, share in zip(pool.names, right, strict=True)}})
        if self.llm_share is not None:
            scores = policy.slm_scores(queries.embeddings)
            policy = replace(policy, threshold=calibrated_threshold(scores, self.llm_share))
        return policy

    def _answered(self, pool: ModelPool, task: Task, seed: int, folder: Path | None) -> EmbeddedQueries:
        """What the models make of training problems, kept in `folder`."""
        start = first_training_example(task, seed)
        about = {
            "models": models_manifest(pool),
            "task": {"name": task.name, "start": start, "examples": self.examples},
            "max_new_tokens": self.max_new_tokens,
        }
        path = folder and folder / "queries.safetensors"
        manifest = folder and folder / "queries.json"
        if path and manifest and path.is_file():
            check_manifest(path, json.loads(manifest.read_text()), about)
            kept = load_file(path)
            return EmbeddedQueries(
                kept["embeddings"], tuple(pool.names), kept["correct"].numpy(), kept["costs"].numpy()
            )
        examples = task.examples("train", self.examples, start=start)
        outcomes, embeddings = answer_alone(pool, task, examples, self.max_new_tokens, self.scheduling)
        queries = EmbeddedQueries(embeddings, tuple(pool.names), outcomes.correct, outcomes.costs.mean(0))
        if path and manifest:
            write_text(manifest, json.dumps(about, indent=1) + "\n")
            tensors = {"correct": torch.from_numpy(queries.correct), "costs": torch.from_numpy(queries.costs)}
            write_tensors(path, {"embeddings": queries.embeddings.contiguous(), **tensors})
        return queries


def calibrated_threshold(scores: Tensor, llm_share: float) -> float:
    """The threshold under which `llm_share` of the scores, (n,), lie (Ong et al. 2024)."""
    return float(torch.quantile(scores.double(), llm_share))


@dataclass(frozen=True, eq=False)
class QueryPolicy:
    """Decides once a response, by a query router that sees the SLM's state after the prompt.

    Attributes:
        router: of the pool's models; the choice is between the first and the last.
        pool: names and fingerprints of the models it was made for.
        threshold: the score that becomes 0.5.
    """

    router: QueryRouter
    pool: Sequence[Mapping[str, str]]
    threshold: float = 0.5
    per_response: ClassVar[bool] = True

    @property
    def parameters(self) -> int:
        """Numbers read at a decision; they are part of the cost."""
        return self.router.parameters

    @property
    def fingerprint(self) -> str:
        """Tells policies with other routers or thresholds apart."""
        about = f"{class_name(type(self.router))} {self.threshold!r}"
        return weights_fingerprint(about, self.router.tensors())

    def slm_scores(self, embeddings: Tensor) -> Tensor:
        """Half of 1 + what the SLM is estimated to be better by, (n,), before the threshold is moved."""
        errors = self.router.errors(embeddings.float().cpu())
        return ((1 + errors[:, -1] - errors[:, 0]) / 2).clamp(SUREST, 1 - SUREST)

    def score(self, observation: Observation) -> Tensor:
        moved = self.slm_scores(observation.hidden).double().logit()
        threshold = min(max(self.threshold, SUREST), 1 - SUREST)
        # rounded, so that a score that equals the threshold is not the LLM's by the last bit
        return torch.sigmoid(moved - float(np.log(threshold / (1 - threshold)))).float()

    def save(self, folder: Path) -> None:
        """Write `router.safetensors` and `policy.json`."""
        tensors = {name: value.contiguous() for name, value in self.router.tensors().items()}
        write_tensors(folder / "router.safetensors", tensors)
        settings = {
            "class": class_name(type(self)),
            "router": class_name(type(self.router)),
            "names": list(self.router.models),
            "models": list(self.pool),
            "threshold": self.threshold,
        }
        write_text(folder / POLICY_FILE, json.dumps(settings, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path, pool: ModelPool) -> QueryPolicy:
        """Read what `save` wrote.

        Raises:
            ValueError: there is no such router in `folder`, or it was made for other models than the pool's.
        """
        try:
            settings: dict[str, Any] = json.loads((folder / POLICY_FILE).read_text())
            router: type[QueryRouter] = class_named(settings["router"], "router")
            tensors = load_file(folder / "router.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no readable query router: {error}; train one with experiments.train"
            ) from error
        check_manifest(folder, settings, {"models": models_manifest(pool)}, ["models"])
        return cls(router.of_tensors(tuple(settings["names"]), tensors), settings["models"], settings["threshold"])


class _FirstStates:
    """Lets the SLM write everything, and keeps the state each response began in."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def score(self, observation: Observation) -> Tensor:
        for i in np.flatnonzero(observation.positions == 0):
            self.states[int(observation.episodes[i])] = observation.hidden[i].float().cpu()
        return torch.ones(len(observation.positions))


def answer_alone(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
) -> tuple[QueryOutcomes, Tensor]:
    """Let every model of a pool answer every example by itself.

    Args:
        pool: the models.
        task: judges the answers.
        examples: the queries.
        max_new_tokens: the longest answer.
        scheduling: how answers share passes.

    Returns:
        The outcomes, costs in bytes of memory traffic, and the SLM's states after the prompts: float32, (n, width).
    """
    seen = _FirstStates()
    correct, costs = [], []
    for number, name in enumerate(pool.names):
        # the engine's decisions are between the first model and the last: a pair for each model
        pair = ModelPool([pool.slm, pool.models[max(1, number)]], pool.rows, pool.capacity)
        episodes = decode(
            pair, task, examples, Always(slm=False) if number else seen, 0.5, max_new_tokens, scheduling,
            label=f"queries answered by {name}",
        )  # fmt: skip
        alone = np.stack([episode.ledger[-1 if number else 0] for episode in episodes])
        correct.append([episode.correct for episode in episodes])
        costs.append(Price([pool.profiles[number]], [Bytes()]).of(alone[:, None])["bytes"])
    outcomes = QueryOutcomes(
        [example.prompt for example in examples], [task.name] * len(examples), tuple(pool.names),
        np.stack(correct, axis=1), np.stack(costs, axis=1),
    )  # fmt: skip
    return outcomes, torch.stack([seen.states[i] for i in range(len(examples))])


def same_models(learner: str, train: EmbeddedQueries, known: EmbeddedQueries) -> None:
    """Refuse to route among models a learner has not been trained on, where it cannot.

    Raises:
        ValueError: they are others than the training models.
    """
    if train.models != known.models:
        others = ", ".join(model for model in known.models if model not in train.models) or ", ".join(known.models)
        raise ValueError(
            f"{learner} routes between the models it was trained on ({', '.join(train.models)}), not {others}; train "
            "it on these, or choose an agent for pools that change (uniroute, knn)"
        )
