"""Decoding anew what a trace says, in the passes that made it: the same bits on the same kind of machine."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from agents.checking.speculative import speculate
from agents.common.policy import VIEWS, Observation, Policy
from agents.common.rollout import Episode, Scheduling, decode
from envs.decoding.judges import judge_of
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task
from experiments.traces.recorder import LIVE, hardware_of
from experiments.traces.schema import CHECKED, PROMPT_READERS, SEARCH, SPECULATIVE
from experiments.traces.trace import Head, Trace


class Recorded(Policy):
    """Chooses the writers that a trace names.

    Args:
        trace: its episodes; behind the end of one the SLM writes.
    """

    def __init__(self, trace: Trace) -> None:
        self.writers = {episode.episode: episode.writers.tolist() for episode in trace.episodes}
        self._sees = VIEWS[:2] if trace.head.settings.get(PROMPT_READERS) else VIEWS[:1]

    @property
    def sees(self) -> Sequence[str]:
        return self._sees

    def score(self, observation: Observation) -> Tensor:
        decisions = zip(observation.host_episodes.tolist(), observation.host_positions.tolist(), strict=True)
        return torch.tensor([float(self._slm(*decision)) for decision in decisions])

    def _slm(self, episode: int, position: int) -> bool:
        writers = self.writers.get(episode, [])
        return position >= len(writers) or writers[position] == 0


class RecordedOnce(Recorded):
    """The same where one decision holds for a whole response."""

    per_response = True


class RecordedScores(Policy):
    """Decides on drafts as a trace says, one decision after the other.

    Args:
        trace: of a policy with a judge, its threshold among what holds.
    """

    def __init__(self, trace: Trace) -> None:
        self.scores = {episode.episode: iter(episode.scores.tolist()) for episode in trace.episodes}
        self.judge = judge_of(trace.head.settings["judge"])
        self.observes = bool(trace.head.settings["observes"])  # type: ignore[misc]

    def score(self, observation: Observation) -> Tensor:
        # behind the end of what was decided ends are accepted
        return torch.tensor([next(self.scores.get(n, iter(())), 1.0) for n in observation.host_episodes.tolist()])


def same_machine(head: Head, pool: ModelPool) -> bool:
    """Whether a trace was made by live decoding on such hardware, with as many threads: bits repeat then."""
    live = head.environment == LIVE and head.decoding != SEARCH
    return live and head.hardware == hardware_of(pool) and head.threads == torch.get_num_threads()


def on_cpu(head: Head) -> bool:
    """Whether a trace was made where the same passes give the same bits; on a GPU they may be summed in any order."""
    return head.hardware.startswith("cpu ")


def replayed(
    pool: ModelPool, task: Task, examples: Sequence[Example], trace: Trace, policy: Policy | None = None
) -> list[Episode]:
    """Decode all problems of a trace again, in passes of as many rows.

    Args:
        pool: the models.
        task: judges.
        examples: the problems.
        trace: whose settings hold.
        policy: that decides anew; where None the writers are those that the trace names.
    """
    settings, threshold = trace.head.settings, trace.head.threshold
    scheduling = Scheduling(settings["rows"], settings["gather"])
    if trace.head.decoding == SPECULATIVE:
        return speculate(pool, task, examples, settings["draft_tokens"], settings["max_new_tokens"], scheduling)
    if policy is None and trace.head.decoding == CHECKED:
        policy = RecordedScores(trace)
    if policy is None or threshold is None:
        policy, threshold = (RecordedOnce if trace.head.per_response else Recorded)(trace), 0.5
    return decode(pool, task, examples, policy, threshold, settings["max_new_tokens"], scheduling)
