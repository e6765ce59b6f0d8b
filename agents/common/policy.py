"""What a policy and a learner are."""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from envs.costs import ModelProfile
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool
from envs.tasks.task import Task

POLICY_FILE = "policy.json"
Track = Callable[[Mapping[str, Any]], None]
"""Where a learner reports what it measures: a row of named numbers."""


def untracked(row: Mapping[str, Any]) -> None:
    """Reports nothing."""


@runtime_checkable
class Policy(Protocol):
    """Chooses which model writes the next token.

    The SLM writes where `score >= threshold`, the last model of the pool elsewhere; sweeping the threshold draws the
    policy's accuracy-cost curve.
    """

    def score(self, observation: Observation) -> Tensor:
        """The probability that the SLM should write, in [0, 1], for each of n decisions: (n,)."""


def decision_profile(policy: Policy) -> ModelProfile:
    """What one decision costs: a policy with a network says so by an attribute `parameters`; others are free.

    One that runs it on several inputs a decision says so by `inputs_per_decision`: it reads its weights once, and
    multiplies with them as often.
    """
    return ModelProfile(
        name="policy",
        body_parameters=0,
        head_parameters=int(getattr(policy, "parameters", 0)),
        bytes_per_parameter=4,
        kv_bytes_per_token=0,
        attention_width=0,
        head_inputs=int(getattr(policy, "inputs_per_decision", 1)),
    )


def decides_once(policy: Policy) -> bool:
    """Whether a policy chooses one model for a whole response: it says so by an attribute `per_response`.

    It is then asked once a response, and the SLM reads no further than that where another model writes.
    """
    return bool(getattr(policy, "per_response", False))


@runtime_checkable
class SavedPolicy(Policy, Protocol):
    """A policy that can be written to a folder and read again by `load_policy`."""

    def save(self, folder: Path) -> None:
        """Write weights as safetensors, and `policy.json`, which names the class and its settings."""

    @classmethod
    def load(cls, folder: Path, pool: ModelPool) -> Policy:
        """Read what `save` wrote, for use with `pool`."""


def load_policy(folder: Path, pool: ModelPool) -> Policy:
    """Read a saved policy of any class of `agents`.

    Raises:
        ValueError: there is none in `folder`, it names a class elsewhere, or it was made for other models.
    """
    try:
        name = str(json.loads((folder / POLICY_FILE).read_text())["class"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} holds no readable {POLICY_FILE}; give the policy folder of a training run"
        ) from error
    try:
        saved: type[SavedPolicy] = class_named(name, "policy")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return saved.load(folder, pool)


def class_name(kind: type) -> str:
    """What a saved file calls a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def class_named(name: str, what: str) -> Any:
    """The class of `agents` that a saved file names.

    Args:
        name: made by `class_name`.
        what: the kind of class it should be, for errors.

    Raises:
        ValueError: it lies elsewhere, or is not there.
    """
    module, _, kind = name.rpartition(".")
    # a file must not choose what is imported: what is saved lives in this package
    if not module.startswith("agents."):
        raise ValueError(f"{name} is not a {what} of agents; load it with the class's own load")
    try:
        return getattr(importlib.import_module(module), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no {what} {name}; was it renamed since?") from error


def weights_fingerprint(about: str, tensors: Mapping[str, Tensor]) -> str:
    """Tells policies with other weights apart, or with other settings, said in `about`."""
    digest = hashlib.sha256(about.encode())
    for name, value in tensors.items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


class Learner(Protocol):
    """Makes a policy for a pool on a task."""

    def fit(
        self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked, folder: Path | None = None
    ) -> Policy:
        """Train on the task's train split, and on nothing else of it.

        Args:
            pool: the models, SLM first.
            task: where examples come from.
            seed: makes the result repeat.
            track: receives rows of measurements.
            folder: where to keep what it collects and learns, and to go on from after an interruption; a learner that
                takes long keeps nothing where None.
        """
