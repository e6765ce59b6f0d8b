"""What a policy and a learner are: all that a file with a new one imports of ours."""

from __future__ import annotations

import hashlib
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from envs.arrays import IntArray
from envs.costs import ModelProfile
from envs.decoding.judges import Judge
from envs.decoding.observation import Observation as Observation  # what `score` is given
from envs.models.pool import ModelPool
from envs.tasks.task import Task

Track = Callable[[Mapping[str, Any]], None]
"""Where a learner reports what it measures: a row of named numbers."""
VIEWS = ("slm", "llm", "text")
"""What a policy can see: what an `Observation` always holds; the LLM's state behind the prompt; the prompt's text."""
DRAFTED = "drafted"
"""What a policy with a judge that does not observe can see besides: the SLM's states that drafts were written by."""
Scores = Tensor | npt.NDArray[np.floating[Any]]
"""What a policy may score with: a tensor on any device, or an array."""


def untracked(row: Mapping[str, Any]) -> None:
    """Reports nothing."""


class Policy(ABC):
    """Chooses which model writes the next token.

    The SLM writes where `score >= threshold`, the last model of the pool elsewhere; sweeping the threshold draws the
    policy's accuracy-cost curve. `score` is all that a policy must have. Torch modules that it decides with are
    best attributes of its own: then they are part of its cost and of its fingerprint.

    A policy with a judge decides when the last model is called, which then checks what the SLM has drafted since it was
    called last (`envs.decoding.checking`): the SLM drafts on, or its drafted end is accepted, where `score >=
    threshold`, the last model is called elsewhere. What was drafted it finds in `observation.drafts`.

    Attributes:
        per_response: whether it chooses one model for a whole response. It is then asked once a response, and the SLM
            reads no further than that where another model writes.
        judge: which drafted tokens stand; None where none is checked.
        observes: whether it looks at the SLM's states. One with a judge need not: `observation.drafts` is known
            without, and the SLM then reads its last token together with the next one that it drafts.
    """

    per_response: ClassVar[bool] = False
    judge: Judge | None = None
    observes: ClassVar[bool] = True

    @abstractmethod
    def score(self, observation: Observation) -> Scores:
        """The probability that the SLM should write, in [0, 1], for each of n decisions.

        Args:
            observation: n responses that await a decision; see its class.

        Returns:
            A floating-point tensor or array, (n,).
        """

    @property
    def sees(self) -> Sequence[str]:
        """What its observations hold, of VIEWS. For `llm` the LLM reads every prompt, which is part of the cost.

        A policy with a judge that does not observe may see DRAFTED: in the place of the SLM's state behind the last
        token that by which the SLM drafted this token, which costs nothing; of no meaning where nothing is drafted.
        """
        return ("slm",)

    @property
    def parameters(self) -> int:
        """Parameters read at every decision; they are part of the cost. Those of its torch modules by default."""
        modules = [value for value in self._attributes.values() if isinstance(value, nn.Module)]
        return sum(parameter.numel() for module in modules for parameter in module.parameters())

    @property
    def inputs_per_decision(self) -> int:
        """Inputs that the parameters are multiplied with at a decision."""
        return 1

    @property
    def fingerprint(self) -> str:
        """Tells policies apart that would score differently: by their class, settings and weights."""
        # the repr of a class that writes none says where in memory it lies, which no other run repeats
        unwritten = type(self).__repr__ is object.__repr__
        text = f"{type(self).__qualname__}({self._attributes})" if unwritten else repr(self)
        weights = _weights(self._attributes)
        if weights:
            digest = hashlib.sha256()
            for weight in weights:
                digest.update(weight.detach().cpu().flatten().contiguous().view(torch.uint8).numpy().tobytes())
            text += f" {digest.hexdigest()[:16]}"
        return text

    @property
    def _attributes(self) -> dict[str, Any]:
        return getattr(self, "__dict__", {})

    def forget(self, episodes: IntArray) -> None:  # noqa: B027 (most policies keep nothing)
        """Called when `episodes`, (n,), have ended; what a policy has kept of them is not asked for again."""


def _weights(attributes: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among some attributes, and those of the torch modules among them."""
    weights: list[Tensor] = []
    for value in attributes.values():
        weights += [value] if isinstance(value, Tensor) else []
        weights += value.state_dict().values() if isinstance(value, nn.Module) else []
    return weights


ROUNDING = 1e-5
"""How far from [0, 1] a score may lie: sums of probabilities are rounded."""


def check_scores(policy: Policy, scores: object, count: int) -> Tensor:
    """The scores of `count` decisions, if they are what `Policy.score` promises; asked at a policy's first decision.

    Args:
        policy: named in the errors.
        scores: what it returned.
        count: decisions it was asked for.

    Raises:
        TypeError: they are no tensor and no array of numbers.
        FloatingPointError: one is not a number.
        ValueError: their shape is not (count,), they are no floating-point numbers, or one lies outside [0, 1].
    """
    name = type(policy).__name__
    promised = f"score must return a floating-point tensor or array of shape ({count},), in [0, 1]"
    if isinstance(scores, np.ndarray):
        try:
            scores = as_tensor(scores)
        except TypeError as error:
            raise TypeError(f"{name} scored with an array of {scores.dtype}; {promised}") from error
    if not isinstance(scores, Tensor):
        raise TypeError(f"{name} scored with {type(scores).__module__}.{type(scores).__name__}; {promised}")
    if scores.shape != (count,):
        raise ValueError(f"{name} gave scores of shape {tuple(scores.shape)} to {count} decisions; {promised}")
    if not scores.is_floating_point():
        raise ValueError(f"{name} gave scores of type {scores.dtype}; {promised}")
    if scores.isnan().any():
        raise FloatingPointError(f"{name} scored NaN; check its weights and its inputs")
    outside = scores[(scores < -ROUNDING) | (scores > 1 + ROUNDING)]
    if len(outside):
        raise ValueError(f"{name} scored {outside[0].item():g}; {promised}")
    return scores


def as_tensor(scores: Scores) -> Tensor:
    """Scores as a tensor: itself, or a copy of an array."""
    return scores if isinstance(scores, Tensor) else torch.from_numpy(np.array(scores, order="C"))


def decision_profile(policy: Policy) -> ModelProfile:
    """What one decision costs: the policy's weights are read once, and multiplied with each of its inputs."""
    return ModelProfile(
        name="policy",
        body_parameters=0,
        head_parameters=policy.parameters,
        bytes_per_parameter=4,
        kv_bytes_per_token=0,
        attention_width=0,
        head_inputs=policy.inputs_per_decision,
    )


@dataclass(frozen=True)
class TrainingRun:
    """What a learner is trained on, and where it reports and keeps what it does.

    Attributes:
        pool: the models, SLM first.
        task: where examples come from.
        seed: makes the result repeat.
        track: receives rows of measurements.
        folder: where to keep what is collected and learned; nothing is kept where None.
    """

    pool: ModelPool
    task: Task
    seed: int = 0
    track: Track = untracked
    folder: Path | None = None

    def file(self, name: str) -> Path | None:
        """A file of the run's folder; None where nothing is kept."""
        return None if self.folder is None else self.folder / name

    @property
    def workspace(self) -> Path:
        """The folder, for a learner that `needs_folder`."""
        assert self.folder is not None, "only learners that say needs_folder = True are sure of a folder"
        return self.folder


P = TypeVar("P", bound=Policy, covariant=True)


class Learner(ABC, Generic[P]):
    """Makes a policy for a pool on a task.

    Attributes:
        needs_folder: whether it cannot train without a folder; it is lent a temporary one where none is given.
    """

    needs_folder: ClassVar[bool] = False

    @abstractmethod
    def train(self, run: TrainingRun) -> P:
        """The policy trained on the task's train split, and on nothing else of it that is reported on."""

    def fit(
        self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked, folder: Path | None = None
    ) -> P:
        """Train on the task's train split.

        Args:
            pool: the models, SLM first.
            task: where examples come from.
            seed: makes the result repeat.
            track: receives rows of measurements.
            folder: where to keep what it collects and learns, and to go on from after an interruption; nothing is kept
                where None.
        """
        run = TrainingRun(pool, task, seed, track, folder)
        if folder is not None or not self.needs_folder:
            return self.train(run)
        with tempfile.TemporaryDirectory(prefix=f"{type(self).__name__.lower()}-") as temporary:
            return self.train(TrainingRun(pool, task, seed, track, Path(temporary)))


def policy_from(
    agent: Policy | Learner[Policy],
    pool: ModelPool,
    task: Task,
    seed: int = 0,
    track: Track = untracked,
    folder: Path | None = None,
) -> Policy:
    """The policy of an agent: a policy is its own, a learner makes one by `fit`, which takes the other arguments.

    Raises:
        ValueError: it is neither.
    """
    agent = checked_agent(agent)
    return agent if isinstance(agent, Policy) else agent.fit(pool, task, seed, track, folder)


def checked_agent(agent: object) -> Policy | Learner[Policy]:
    """`agent` if it is a policy or a learner.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(agent, (Policy, Learner)):
        return agent
    raise ValueError(f"{type(agent).__name__} is no agent; derive it from Policy or Learner of agents.common.policy")
