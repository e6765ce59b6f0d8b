"""A query-level router: one decision per response, by a classifier of the SLM's state after the prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from agents.policy import Track, untracked
from agents.rollout import Scheduling, decode
from agents.router import RouterPolicy
from agents.training import LabelledTokens, RouterTraining, fit_router
from envs.manifest import models_manifest
from envs.models import ModelPool
from envs.steps import Observation
from envs.tasks.task import Task, first_training_example


@dataclass
class QueryPolicy(RouterPolicy):
    """Scores the first observation of a response, and keeps that score to its end."""

    _kept: dict[int, float] = field(default_factory=dict, init=False, repr=False)

    def score(self, observation: Observation) -> Tensor:
        scores: Tensor = super().score(observation)
        for i, (episode, position) in enumerate(zip(observation.episodes, observation.positions, strict=True)):
            # a response forked from another starts where that one stood
            if position == 0 or int(episode) not in self._kept:
                self._kept[int(episode)] = scores[i].item()
            scores[i] = self._kept[int(episode)]
        return scores


class _FirstStates:
    """Lets the SLM write everything, and keeps the state each response began in."""

    def __init__(self) -> None:
        self.states: dict[int, Tensor] = {}

    def score(self, observation: Observation) -> Tensor:
        for i in np.flatnonzero(observation.positions == 0):
            self.states[int(observation.episodes[i])] = observation.hidden[i].half().cpu()
        return torch.ones(len(observation.positions))


@dataclass(frozen=True)
class QueryClassifier:
    """Learns which problems the SLM answers rightly by itself; the others are the LLM's from the first token.

    Args:
        examples: training problems the SLM answers.
        max_new_tokens: the longest response.
        training: how the classifier is trained.
        scheduling: how responses share passes.
    """

    examples: int = 3000
    max_new_tokens: int = 128
    training: RouterTraining = field(default_factory=lambda: RouterTraining(batch_size=128, epochs=20))
    scheduling: Scheduling = field(default_factory=Scheduling)

    def fit(
        self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked, folder: Path | None = None
    ) -> QueryPolicy:
        examples = task.examples("train", self.examples, start=first_training_example(task, seed))
        seen = _FirstStates()
        episodes = decode(
            pool, task, examples, seen, 0.5, self.max_new_tokens, self.scheduling, label="queries answered by the SLM"
        )
        states = torch.stack([seen.states[i] for i in range(len(examples))])
        right = np.array([episode.correct for episode in episodes])
        data = LabelledTokens.in_memory(states, right, np.arange(len(examples)))
        network, report = fit_router(data, self.training, seed, track, pool.slm.device, "query")
        track({"run": "query", **report})
        return QueryPolicy(network, models_manifest(pool), "hidden", report)
