"""The thresholds a policy's curve is drawn at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import VIEWS, Policy, as_tensor, check_scores
from envs.arrays import FloatArray, IntArray
from envs.decoding.observation import Observation
from experiments.evaluation.decoder import ExampleDecoder


class ScoreRecorder(Policy):
    """Lets the SLM write everything and keeps what each policy would have scored.

    Args:
        policies: by name.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        self.scores: dict[str, list[Tensor]] = {name: [] for name in policies}

    @property
    def sees(self) -> Sequence[str]:
        seen = {view for policy in self.policies.values() for view in policy.sees}
        return [view for view in VIEWS if view in seen]

    def score(self, observation: Observation) -> Tensor:
        first = torch.from_numpy(observation.host_positions == 0)
        for name, policy in self.policies.items():
            once = policy.per_response
            if once and not first.any():
                continue  # it is asked once a response
            scored = policy.score(observation)
            if not self.scores[name]:  # its first decision: before minutes of work
                check_scores(policy, scored, len(first))
            scores = as_tensor(scored).float().cpu()
            self.scores[name].append(scores[first] if once else scores)
        return torch.ones(len(observation))

    def forget(self, episodes: IntArray) -> None:
        for policy in self.policies.values():
            policy.forget(episodes)


def record_scores(decoder: ExampleDecoder, policies: Mapping[str, Policy]) -> dict[str, FloatArray]:
    """The score that each policy gives each decision where the SLM answers alone, (decisions,) by name.

    Args:
        decoder: of validation problems.
        policies: by name.
    """
    recorder = ScoreRecorder(policies)
    decoder.decode(recorder, 0.5, "thresholds")
    return {name: torch.cat(scores).double().numpy() for name, scores in recorder.scores.items()}


def choose_thresholds(scores: Mapping[str, FloatArray], llm_shares: Sequence[float]) -> dict[str, list[float]]:
    """Thresholds at quantiles of each policy's score, so that curves are evenly covered.

    Args:
        scores: of each policy, see `record_scores`.
        llm_shares: the quantiles, each in (0, 1).

    Returns:
        Rising thresholds of each policy, those that are equal once.
    """
    return {name: np.unique(np.quantile(some, np.array(llm_shares))).tolist() for name, some in scores.items()}
