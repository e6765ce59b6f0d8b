"""CITER: a router trained on token-level preferences (Zheng et al., COLM 2025, arXiv 2502.01976), and its ablations."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from agents.policy import Always, Policy, Track, untracked
from agents.preferences import Collector, Preferences
from agents.rollout import Scheduling
from agents.router import RouterPolicy, RouterTraining, fit_router
from envs.models import ModelPool
from envs.session import BoolArray
from envs.tasks.task import Task

CASE_3 = ("rollout", "slm", "llm", "agreement", "drop")


@dataclass(frozen=True)
class Citer:
    """CITER, and what it becomes when case 3 is labelled without rollouts.

    A reference solution is walked token by token. Where the SLM would write the reference's token the SLM is preferred
    (case 1); else, where the LLM would, the LLM (case 2). Where neither would (case 3) the SLM's token is taken and the
    answer finished: by the SLM in round 1, by the router of the round before in later ones. The SLM is preferred iff
    the answer is right. Cases 1 and 2 need no rollout: the shortcut.

    Class imbalance (most tokens prefer the SLM) is not corrected: the score stays a probability, and the threshold,
    chosen by quantiles of the score, does the trading.

    Args:
        examples: training problems to collect preferences on.
        rounds: of collecting and training; later rounds redo case 3 alone.
        threshold: the SLM threshold of the router that finishes rollouts after round 1 (0.5 in the paper's
            pseudo-code, 0.95 in its released code).
        case_3: `rollout` (CITER); or without rollouts `slm`, `llm`, `agreement` (SLM iff both models would write the
            same token, else LLM), `drop` (left out of training).
        max_new_tokens: the longest response.
        training: how the router is trained.
        scheduling: how rollouts share passes.
    """

    examples: int = 1500
    rounds: int = 2
    threshold: float = 0.5
    case_3: Literal["rollout", "slm", "llm", "agreement", "drop"] = "rollout"
    max_new_tokens: int = 128
    training: RouterTraining = field(default_factory=RouterTraining)
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        if self.examples < 2 or self.rounds < 1:
            raise ValueError(f"examples ({self.examples}) must be at least 2 and rounds ({self.rounds}) at least 1")
        if not 0 <= self.threshold <= 1:
            raise ValueError(f"threshold must be in [0, 1], is {self.threshold}")
        if self.case_3 not in CASE_3:
            raise ValueError(f"unknown case_3 {self.case_3!r}; choose one of {', '.join(CASE_3)}")

    def fit(self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked) -> RouterPolicy:
        examples = task.examples("train", self.examples, start=self._first_example(task, seed))
        collector = Collector(pool, task, examples, self.max_new_tokens, self.scheduling)
        preferences = collector.shortcut()
        policy: Policy = Always(slm=True)
        for number in range(1, (self.rounds if self.case_3 == "rollout" else 1) + 1):
            if self.case_3 == "rollout":
                collector.rollouts(preferences, preferences.cases == 3, policy, self.threshold)
            track({"run": f"round {number}", **preferences.shares()})
            prefers_slm, kept = label(preferences, self.case_3)
            network = fit_router(
                preferences.hidden[torch.from_numpy(kept)],
                torch.from_numpy(prefers_slm[kept]),
                preferences.examples[kept],
                self.training,
                seed,
                track,
                pool.slm.device,
                label=f"round {number}",
            )
            policy = RouterPolicy(network, pool.names)
        assert isinstance(policy, RouterPolicy)
        return policy

    def _first_example(self, task: Task, seed: int) -> int:
        """Another seed collects on other problems where the task generates them without end.

        The first million is passed over: the embedded pair was pretrained on problems from there.
        """
        return 1_000_000 * (seed + 1) if task.size("train") is None else 0


def label(preferences: Preferences, case_3: str) -> tuple[BoolArray, BoolArray]:
    """Whether each token prefers the SLM (n,), and whether it is trained on (n,)."""
    third = preferences.cases == 3
    verdicts = {
        "rollout": preferences.outcomes == 1,
        "slm": np.ones_like(third),
        "llm": np.zeros_like(third),
        "agreement": preferences.agree,
        "drop": np.zeros_like(third),
    }
    prefers_slm = np.where(third, verdicts[case_3], preferences.cases == 1)
    return prefers_slm, ~third if case_3 == "drop" else np.ones_like(third)
