"""Policies on disk."""

from __future__ import annotations

import hashlib
import importlib
import json
from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from agents.common.policy import Policy
from envs.models.pool import ModelPool

POLICY_FILE = "policy.json"


class SavedPolicy(Policy):
    """A policy that can be written to a folder and read again by `load_policy`."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write weights as safetensors, and `policy.json`, which names the class and its settings."""

    @classmethod
    @abstractmethod
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
