"""Learning to route whole queries from what each model of a pool makes of them by itself."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Learner, Policy, Track, TrainingRun, untracked
from agents.common.rollout import Scheduling, decode, decode_alone
from agents.query_routing.embeddings import TextEmbedding
from agents.query_routing.inputs import PromptViews, RouterInputs, check_views
from agents.query_routing.outcomes import QueryOutcomes, check_models, fewest_queries
from agents.query_routing.policy import QueryPolicy
from agents.query_routing.router import EmbeddedQueries, QueryRouter
from envs.costs import MemoryTraffic, Price
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool, models_manifest
from envs.storage import check_manifest, read_tensors, write_tensors, write_text
from envs.tasks.task import Example, Task


@dataclass(frozen=True)
class QueryLearner(Learner[QueryPolicy]):
    """Learns to route whole queries from what each model of a pool makes of training queries by itself.

    Args:
        examples: training problems that every model answers.
        max_new_tokens: the longest answer.
        llm_share: where given, scores are moved so that at the threshold 0.5 this share of the training queries goes to
            the LLM: a threshold calibrated by the share of strong calls, as RouteLLM's. Their order stays.
        sees: of each prompt, on the token track: `slm` and `llm`, the models' states behind it; `text`, its words. For
            `llm` the LLM reads each prompt, which is part of the cost.
        text: how words are embedded.
        scheduling: how answers share passes.
    """

    examples: int = 2000
    max_new_tokens: int = 128
    llm_share: float | None = None
    sees: Sequence[str] = field(default_factory=lambda: ["slm"])
    text: TextEmbedding = field(default_factory=TextEmbedding)
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        if self.examples < 2:
            raise ValueError(f"examples must be at least 2, is {self.examples}")
        if self.llm_share is not None and not 0 < self.llm_share < 1:
            raise ValueError(f"llm_share must be in (0, 1), is {self.llm_share}")
        check_views(self.sees)

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

    def train(self, run: TrainingRun) -> QueryPolicy:
        pool = run.pool
        self.check(pool.names, self.examples)
        if "text" in self.sees:
            fewest_queries("text.dimensions", self.text.dimensions, range(self.examples))
        queries, inputs = self._answered(run)
        router = self.fit_queries(queries, queries, run.seed, run.track)
        policy = QueryPolicy(router, models_manifest(pool), inputs=inputs)
        right = queries.correct.mean(0).tolist()
        run.track({"run": "queries", **{f"right_{name}": share for name, share in zip(pool.names, right, strict=True)}})
        if self.llm_share is not None:
            scores = policy.slm_scores(queries.embeddings)
            policy = replace(policy, threshold=calibrated_threshold(scores, self.llm_share))
        return policy

    def _answered(self, run: TrainingRun) -> tuple[EmbeddedQueries, RouterInputs]:
        """What the models make of training problems, and what is seen of these, kept in the run's folder."""
        pool, task = run.pool, run.task
        start = task.training_start(run.seed)
        about: dict[str, Any] = {
            "models": models_manifest(pool),
            "task": {"name": task.name, "start": start, "examples": self.examples},
            "max_new_tokens": self.max_new_tokens,
        }
        sees = check_views(self.sees)
        if sees != ("slm",):  # folders of before there was a choice do not name it
            about["sees"] = {"views": list(sees), "text": asdict(self.text) if "text" in sees else None}
        path, manifest = run.file("queries.safetensors"), run.file("queries.json")
        if path and manifest and path.is_file():
            made = json.loads(manifest.read_text())
            check_manifest(path, made, about, sorted({*about, "sees"}))
            kept = read_tensors(path)
            correct, costs = kept["correct"].numpy(), kept["costs"].numpy()
            queries = EmbeddedQueries(kept["embeddings"], tuple(pool.names), correct, costs)
            return queries, RouterInputs.restored(made.get("inputs", {}), kept)
        examples = task.examples("train", self.examples, start=start)
        outcomes, views = answer_alone(pool, task, examples, self.max_new_tokens, self.scheduling, sees)
        inputs = RouterInputs.fit(sees, views, self.text, run.seed)
        embeddings = inputs.vectors(views).contiguous()
        queries = EmbeddedQueries(embeddings, tuple(pool.names), outcomes.correct, outcomes.costs.mean(0))
        if path and manifest:
            made = about if sees == ("slm",) else {**about, "inputs": inputs.settings()}
            write_text(manifest, json.dumps(made, indent=1) + "\n")
            tensors = {"correct": torch.from_numpy(queries.correct), "costs": torch.from_numpy(queries.costs)}
            write_tensors(path, {"embeddings": embeddings, **tensors, **inputs.tensors()})
        return queries, inputs


def calibrated_threshold(scores: Tensor, llm_share: float) -> float:
    """The threshold under which `llm_share` of the scores, (n,), lie (Ong et al. 2024)."""
    return float(torch.quantile(scores.double(), llm_share))


class _FirstLook(Policy):
    """Lets the SLM write everything, and keeps what can be seen where each response begins.

    Args:
        sees: what is looked at, of VIEWS.
    """

    def __init__(self, sees: Sequence[str]) -> None:
        self._sees = sees
        self.seen: dict[int, tuple[Tensor, Tensor | None, str | None]] = {}

    @property
    def sees(self) -> Sequence[str]:
        return self._sees

    def score(self, observation: Observation) -> Tensor:
        views = PromptViews.of(observation)
        for i in np.flatnonzero(observation.host_positions == 0).tolist():
            llm = None if views.llm is None else views.llm[i]
            text = None if views.prompts is None else views.prompts[i]
            self.seen[int(observation.host_episodes[i])] = views.slm[i], llm, text
        return torch.ones(len(observation))

    def views(self) -> PromptViews:
        """All of it, in the order of the examples."""
        slm, llm, prompts = zip(*(self.seen[i] for i in range(len(self.seen))), strict=True)
        states = torch.stack(llm) if "llm" in self.sees else None
        return PromptViews(torch.stack(slm), states, list(prompts) if "text" in self.sees else None)


def answer_alone(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
    sees: Sequence[str] = ("slm",),
) -> tuple[QueryOutcomes, PromptViews]:
    """Let every model of a pool answer every example by itself.

    Args:
        pool: the models.
        task: judges the answers.
        examples: the queries.
        max_new_tokens: the longest answer.
        scheduling: how answers share passes.
        sees: what is looked at of the prompts, of VIEWS.

    Returns:
        The outcomes, costs in bytes of memory traffic of each model by itself, and what there is to see of the prompts.
    """
    look = _FirstLook(sees)
    correct, costs = [], []
    for number, (name, model) in enumerate(zip(pool.names, pool.models, strict=True)):
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens, "scheduling": scheduling, "label": f"queries answered by {name}"
        }  # fmt: skip
        if number == 0:  # its states are looked at, so that it reads what a router would have it read
            episodes = decode(pool, task, examples, look, **settings)
        else:
            episodes = decode_alone(model, task, examples, pool=pool, **settings)
        alone = np.stack([episode.ledger[number] for episode in episodes])
        correct.append([episode.correct for episode in episodes])
        costs.append(Price([pool.profiles[number]], [MemoryTraffic()]).of(alone[:, None])["bytes"])
    outcomes = QueryOutcomes(
        prompts=[pool.prompt_text(example) for example in examples],
        groups=[task.name] * len(examples),
        models=tuple(pool.names),
        correct=np.stack(correct, axis=1),
        costs=np.stack(costs, axis=1),
    )
    return outcomes, look.views()


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
