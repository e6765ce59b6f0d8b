"""The best policy of a training: it is measured on validation problems from time to time, and the best one is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor, nn

from agents.common.checkpoints import array_of
from agents.common.comparison import answer_costs
from agents.common.curves import Hull, Sweep
from agents.common.policy import Policy
from agents.common.rollout import Episode, Scheduling, decode
from envs.arrays import BoolArray, FloatArray
from envs.costs import MemoryTraffic
from envs.decoding.decoder import check_fit, sequence_capacity
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Example, Task

LEVEL = 0.95
"""The share of the LLM's accuracy at which costs are compared."""
SLM_ALONE, LLM_ALONE = -np.inf, np.inf
"""Thresholds that every score is above, and below."""


@dataclass(frozen=True)
class Selection:
    """How a learner finds the best policy of its training, on validation problems.

    Measured is the least cost at 95 % of the LLM's accuracy on the concave hull over a few thresholds and both models
    alone, in memory traffic relative to LLM-only decoding; of policies equal in that, the hull's area decides.

    Args:
        evaluations: how often, evenly over the training, its end included; 0 keeps the policy it ends with.
        examples: validation problems.
        start: the first one where problems are generated; of other splits the last ones are taken. Evaluations choose
            thresholds on the first 200 by default, which have no part in this.
        llm_shares: thresholds are these quantiles of the score, at decisions where the SLM answers alone.

    Raises:
        ValueError: a setting is out of range; the error names it.
    """

    evaluations: int = 20
    examples: int = 200
    start: int = 2000
    llm_shares: Sequence[float] = field(default_factory=lambda: [0.02, 0.035, 0.06, 0.1, 0.17, 0.3])

    def __post_init__(self) -> None:
        for key, least in (("evaluations", 0), ("examples", 1), ("start", 0)):
            if getattr(self, key) < least:
                raise ValueError(f"selection.{key} must be at least {least}, is {getattr(self, key)}")
        if not self.llm_shares or not all(0 < share < 1 for share in self.llm_shares):
            shares = list(self.llm_shares)
            raise ValueError(f"selection.llm_shares must lie between 0 and 1, at least one; they are {shares}")

    def problems(self, pool: ModelPool, task: Task, max_new_tokens: int) -> list[Example]:
        """The validation problems; none where nothing is measured.

        Raises:
            ValueError: there are too few, or a prompt does not fit.
        """
        count = self.examples if self.evaluations else 0
        otherwise = "selection.evaluations=0 keeps the policy that training ends with"
        return validation_problems(pool, task, count, self.start, max_new_tokens, "selection.examples", otherwise)


def validation_problems(
    pool: ModelPool, task: Task, count: int, start: int, max_new_tokens: int, setting: str, otherwise: str
) -> list[Example]:
    """Validation problems that a learner chooses by.

    Args:
        pool: answers them.
        task: where they come from.
        count: how many; none where 0.
        start: the first one where problems are generated; of other splits the last ones are taken.
        max_new_tokens: the longest response.
        setting: what `count` is called, for errors.
        otherwise: what else can be done, for errors.

    Raises:
        ValueError: there are too few, or a prompt does not fit.
    """
    size = task.size("validation")
    if size is not None and count > size:
        raise ValueError(f"{setting} is {count}, {task.name} has {size} validation examples; lower it, or {otherwise}")
    if not count:
        return []
    problems = task.examples("validation", count, start=start if size is None else size - count)
    capacity = sequence_capacity(pool, max_new_tokens, None)
    for problem in problems:
        check_fit(f"example {problem.id}", pool.encode_prompt(problem), (), capacity, max_new_tokens)
    return problems


class Measured(NamedTuple):
    """What a policy came to on validation problems.

    Attributes:
        cost: the least one at 95 % of the LLM's accuracy, on the hull of the policy's curve, relative to the LLM's.
        accuracy: of the hull, the mean over costs from the SLM's to the LLM's.
    """

    cost: float
    accuracy: float

    @classmethod
    def of(cls, sweep: Sweep) -> Self:
        """Of answers to the same problems, the SLM alone first and the LLM alone last."""
        points = sweep.points(np.full(sweep.correct.shape[1], 1 / sweep.correct.shape[1]))
        hull, (low, high) = Hull.of(points), points[[0, -1], 0]
        accuracy = hull.area(low, high) / (high - low) if high > low else hull.accuracy_at(high)
        return cls(float(hull.cost_at(LEVEL * points[-1, 1])), float(accuracy))

    def better_than(self, other: Measured | None) -> bool:
        """Whether it is cheaper than another or, where that is equal, more accurate."""
        return other is None or (self.cost, -self.accuracy) < (other.cost, -other.accuracy)

    @property
    def row(self) -> dict[str, float]:
        """As learners report it."""
        return {"validation_cost": self.cost, "validation_accuracy": self.accuracy}


class Validation:
    """Answers validation problems with a policy at several thresholds.

    Args:
        selection: the thresholds.
        problems: those of `Selection.problems`.
        pool: the models.
        task: judges the answers.
        max_new_tokens: the longest response.
        rows: answers in flight; those memory was planned for where None.
        tree: a replay tree of this pool and task to walk instead of decoding.
    """

    def __init__(
        self,
        selection: Selection,
        problems: Sequence[Example],
        pool: ModelPool,
        task: Task,
        max_new_tokens: int,
        rows: int | None = None,
        tree: PrefixTree | None = None,
    ) -> None:
        self.shares, self.problems, self.pool, self.task = selection.llm_shares, problems, pool, task
        self.max_new_tokens, self.tree = max_new_tokens, tree
        # who walks through a tree knows most states: to wait for others would save no pass
        self.scheduling = Scheduling(rows, 0.0 if tree is not None else Scheduling().gather)
        self._llm: tuple[BoolArray, FloatArray] | None = None

    def measure(self, policy: Policy) -> Measured:
        """What a policy comes to: thresholds first, from the SLM's answers, then the answers at each of them."""
        slm = self._answer(policy, SLM_ALONE)
        scores = np.concatenate([episode.scores for episode in slm]).astype(np.float64)
        answers = [_outcome(slm, self.pool)]
        for threshold in np.unique(np.quantile(scores, self.shares)):
            answers.append(_outcome(self._answer(policy, float(threshold)), self.pool, policy))
        if self._llm is None:
            self._llm = _outcome(self._answer(policy, LLM_ALONE), self.pool, llm_alone=True)
        correct, costs = zip(*answers, self._llm, strict=True)
        return Measured.of(Sweep(np.stack(correct), np.stack(costs)))

    def _answer(self, policy: Policy, threshold: float) -> list[Episode]:
        return decode(
            self.pool, self.task, self.problems, policy, threshold, self.max_new_tokens, self.scheduling, tree=self.tree
        )


def _outcome(
    episodes: Sequence[Episode], pool: ModelPool, policy: Policy | None = None, llm_alone: bool = False
) -> tuple[BoolArray, FloatArray]:
    """Whether answers are right, and what they cost, (n,) each; decisions are priced where `policy` is given."""
    correct = np.array([episode.correct for episode in episodes])
    return correct, answer_costs(episodes, policy, pool, MemoryTraffic(), llm_alone)


class BestPolicy:
    """The best policy of a training so far.

    Args:
        validation: what policies are measured on.
        evaluations: how often, evenly over the training.
        length: of the training, in whatever it counts.

    Attributes:
        made: how far the training was when a policy was last measured; -1 before.
        measured: what the best one came to; None before the first.
        weights: of its network.
    """

    def __init__(self, validation: Validation, evaluations: int, length: int, made: int = -1) -> None:
        self.validation, self.evaluations, self.length = validation, evaluations, length
        self.made = made
        self.measured: Measured | None = None
        self.weights: dict[str, Tensor] = {}

    def due(self, made: int) -> bool:
        """Whether a policy is to be measured when so much of the training is made."""
        return made * self.evaluations // self.length > self.made * self.evaluations // self.length

    def measure(self, made: int, policy: Policy, network: nn.Module) -> dict[str, float]:
        """Measure a policy, and keep its network's weights where it is the best; the row it is reported by."""
        found = self.validation.measure(policy)
        if found.better_than(self.measured):
            self.measured = found
            self.weights = {name: value.detach().clone() for name, value in network.state_dict().items()}
        self.made = made
        return found.row

    def state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """What it goes on from: arrays, and plain data."""
        weights = {name: array_of(value) for name, value in self.weights.items()}
        return weights, {"made": self.made, "measured": self.measured}

    def restore(self, weights: Mapping[str, Any], about: Mapping[str, Any], network: nn.Module) -> None:
        """Go on from what `state` gave; `network` has its layers.

        Raises:
            RuntimeError: the weights are of other layers.
        """
        kept = {name: torch.tensor(value) for name, value in weights.items()}
        shapes = {name: value.shape for name, value in network.state_dict().items()}
        if kept and {name: value.shape for name, value in kept.items()} != shapes:
            raise RuntimeError("the best weights so far are those of another network")
        self.weights, self.made = kept, about["made"]
        self.measured = None if about["measured"] is None else Measured(*about["measured"])
