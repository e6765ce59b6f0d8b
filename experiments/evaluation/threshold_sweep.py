"""The thresholds a policy's curve is drawn at first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import DRAFTED, VIEWS, Policy, as_tensor, check_scores
from envs.arrays import FloatArray, IntArray
from envs.decoding.observation import Observation
from experiments.evaluation.decoder import ExampleDecoder
from experiments.evaluation.operating_points import SHARES


class ScoreRecorder(Policy):
    """Lets the SLM write everything and keeps what each policy would have scored.

    Args:
        policies: by name; all of them with a judge, or none, and all of them observe, or none.
    """

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        first = next(iter(policies.values()))
        # nobody is called, so that any judge will do
        self.judge, self.observes = first.judge, first.observes  # type: ignore[misc]
        self.scores: dict[str, list[Tensor]] = {name: [] for name in policies}
        self.episodes: list[IntArray] = []

    @property
    def sees(self) -> Sequence[str]:
        seen = {view for policy in self.policies.values() for view in policy.sees}
        return [view for view in (*VIEWS, DRAFTED) if view in seen]

    def score(self, observation: Observation) -> Tensor:
        first = torch.from_numpy(observation.host_positions == 0)
        ended = torch.zeros_like(first)
        if observation.drafts is not None:
            ended = torch.from_numpy(observation.drafts.ended)  # of these there is one a response
            self.episodes.append(observation.host_episodes[~observation.drafts.ended])
        for name, policy in self.policies.items():
            once = policy.per_response
            if once and not first.any():
                continue  # it is asked once a response
            scored = policy.score(observation)
            if not self.scores[name]:  # its first decision: before minutes of work
                check_scores(policy, scored, len(first))
            scores = as_tensor(scored).float().cpu()
            self.scores[name].append(scores[first] if once else scores[~ended])
        return torch.ones(len(observation))

    def forget(self, episodes: IntArray) -> None:
        for policy in self.policies.values():
            policy.forget(episodes)


def record_scores(
    decoder: ExampleDecoder, policies: Mapping[str, Policy], by: str | None = None
) -> dict[str, FloatArray]:
    """The score that each policy gives each decision where the SLM answers alone, (decisions,) by name.

    Drafted ends are left out: whether these are checked says little of where thresholds should lie.

    Args:
        decoder: of validation problems.
        policies: by name.
        by: `calls`: of policies that check drafts what `called_at` makes of the scores instead.
    """
    groups: dict[tuple[bool, bool], dict[str, Policy]] = {}
    for name, policy in policies.items():
        groups.setdefault((policy.judge is None, policy.observes), {})[name] = policy
    scores: dict[str, FloatArray] = {}
    for (routes, _), group in groups.items():
        recorder = ScoreRecorder(group)
        decoder.decode(recorder, 0.5, "thresholds")
        found = {name: torch.cat(some).double().numpy() for name, some in recorder.scores.items()}
        if by == "calls" and not routes:
            episodes = np.concatenate(recorder.episodes)
            found = {
                name: some if policies[name].per_response else called_at(some, episodes) for name, some in found.items()
            }
        scores |= found
    return {name: scores[name] for name in policies}


def called_at(scores: FloatArray, episodes: IntArray) -> FloatArray:
    """The thresholds at which about each of SHARES of the decisions is a call, (shares,): as good as such quantiles.

    A draft begins with the answer, and the LLM is first called where a score is below the threshold: the decisions up
    to there, on average over answers, stand for those between two calls. Quantiles of all scores are of drafts as long
    as an answer; where it has hundreds of tokens, and a score falls with each, nobody would draft that far.

    Args:
        scores: of decisions in answers that the SLM writes alone, in their order, (decisions,).
        episodes: which answer each is of, (decisions,).
    """
    order = np.argsort(episodes, kind="stable")
    answers = np.split(scores[order], np.flatnonzero(np.diff(episodes[order])) + 1)
    # an answer goes on without a call for as long as its least score so far reaches the threshold
    least = np.sort(np.concatenate([np.minimum.accumulate(one) for one in answers]))[::-1]
    with np.errstate(divide="ignore"):
        uncalled = len(answers) * (1 / SHARES - 1)
    return np.asarray(least[np.minimum(uncalled, len(least) - 1).astype(np.int64)])


def choose_thresholds(scores: Mapping[str, FloatArray], llm_shares: Sequence[float]) -> dict[str, list[float]]:
    """Thresholds at quantiles of each policy's score, so that curves are evenly covered.

    A score of no more values than there are quantiles, such as a rule's zero and one, gets every threshold that tells
    two of them apart: all of its quantiles may be the least value, at which the LLM is never called.

    Args:
        scores: of each policy, see `record_scores`.
        llm_shares: the quantiles, each in (0, 1).

    Returns:
        Rising thresholds of each policy, those that are equal once.
    """
    return {name: _thresholds(some, llm_shares).tolist() for name, some in scores.items()}


def _thresholds(scores: FloatArray, llm_shares: Sequence[float]) -> FloatArray:
    values = np.unique(scores)
    if 1 < len(values) <= len(llm_shares):
        return values[1:]
    return np.unique(np.quantile(scores, np.array(llm_shares)))


def quantiles(scores: Mapping[str, FloatArray]) -> dict[str, list[float]]:
    """The quantiles of each policy's score at SHARES, between which further thresholds are found."""
    return {name: np.quantile(some, SHARES).tolist() for name, some in scores.items()}
