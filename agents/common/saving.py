"""Policies on disk: weights as safetensors, and a text that names the class by the name it is registered under."""

from __future__ import annotations

import hashlib
import importlib
import json
import pkgutil
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

from safetensors import SafetensorError
from torch import Tensor

from agents.common.policy import Policy
from envs.models.pool import ModelPool, models_manifest
from envs.storage import read_tensors, write_tensors, write_text

POLICY_FILE = "policy.json"
OLD_NAMES = {
    "agents.router.RouterPolicy": "router",
    "agents.r2r.R2RPolicy": "r2r",
    "agents.sb3_policy.Sb3Policy": "sb3",
    "agents.query.QueryPolicy": "query",
    "agents.neighbours.NeighboursRouter": "knn",
    "agents.query_mlp.MlpRouter": "mlp",
    "agents.routellm.FactorisationRouter": "routellm_mf",
    "agents.routellm.SimilarityRouter": "routellm_sw",
    "agents.routellm.ClassifierRouter": "routellm_classifier",
    "agents.uniroute.NearestCentreRouter": "uniroute_kmeans",
    "agents.uniroute.LearnedMapRouter": "uniroute_learned",
}
"""What files that named a class by its place say, and the name it is registered under."""
_REGISTERED: dict[str, type] = {}

C = TypeVar("C", bound=type)


def saved_as(name: str) -> Callable[[C], C]:
    """Registers the class under it as what saved files call `name`.

    Raises:
        ValueError: another class has that name already.
    """

    def register(kind: C) -> C:
        other = _REGISTERED.setdefault(name, kind)
        # a module that is imported anew makes its classes anew
        if (other.__module__, other.__qualname__) != (kind.__module__, kind.__qualname__):
            raise ValueError(f"{kind.__module__}: the name {name!r} is taken by {other.__module__}; choose another")
        _REGISTERED[name] = kind
        return kind

    return register


def saved_name(kind: type) -> str:
    """What saved files call a class.

    Raises:
        ValueError: it is not registered.
    """
    for name, registered in _REGISTERED.items():
        if registered is kind:
            return name
    raise ValueError(f"{kind.__name__} has no name for files; put @saved_as(...) before the class")


T = TypeVar("T")


def saved_class(name: str, base: type[T], what: str) -> type[T]:
    """The class that a saved file names.

    A file chooses among classes that are registered, and nothing else: where the name is not known, the modules of
    `agents` are imported one after the other until it is.

    Args:
        name: given by `saved_name`, or one of OLD_NAMES.
        base: what the class must derive from.
        what: the kind of class it should be, for errors.

    Raises:
        ValueError: no such class of `agents` is registered.
    """
    name, failed = OLD_NAMES.get(name, name), ""
    modules = (module.name for module in pkgutil.walk_packages(importlib.import_module("agents").__path__, "agents."))
    while name not in _REGISTERED:
        module = next(modules, None)
        if module is None:
            known = ", ".join(sorted(key for key, kind in _REGISTERED.items() if issubclass(kind, base)))
            raise ValueError(f"{name} is not a {what} of agents; there are {known}{failed}")
        try:
            importlib.import_module(module)
        except ImportError as error:  # another agent's module, which may need a package that is not there
            failed += f"; {module} cannot be imported ({error})"
    kind = _REGISTERED[name]
    if not issubclass(kind, base):
        raise ValueError(f"{name} is not a {what} of agents, it is {kind.__name__}")
    return kind


class SavedPolicy(Policy):
    """A policy that can be written to a folder and read again by `load_policy`.

    It is its tensors and a few plain settings. A class of this kind is registered with `saved_as`.

    Attributes:
        weights_file: what the file of its tensors is called.
    """

    weights_file: ClassVar[str] = "policy.safetensors"

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """All weights."""

    @abstractmethod
    def settings(self) -> Mapping[str, Any]:
        """All else, as plain data.

        Two keys have a meaning: `models`, the manifest of the pool it was made for, and `width`, the numbers it sees at
        a decision, which may be left out.
        """

    @classmethod
    @abstractmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], pool: ModelPool) -> Self:
        """The policy of these `settings` and `tensors`, for use with `pool`.

        Raises:
            RuntimeError, TypeError or KeyError: they do not belong together.
        """

    @classmethod
    def input_width(cls, settings: Mapping[str, Any], pool: ModelPool) -> int | None:
        """Numbers a policy of these `settings` sees at a decision over `pool`; None where that is not compared."""
        return None

    def about(self) -> str:
        """What its scores depend on beside the weights, for its fingerprint."""
        return ""

    @property
    def fingerprint(self) -> str:
        """Tells policies with other weights or settings apart."""
        digest = hashlib.sha256(self.about().encode())
        for name, value in self.tensors().items():
            digest.update(name.encode() + value.cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def save(self, folder: Path) -> None:
        """Write the weights, and `policy.json`: the class's name and the settings.

        Raises:
            ValueError: the class is not registered, or a setting is no plain data.
        """
        settings = {"class": saved_name(type(self)), **self.settings()}
        try:
            text = json.dumps(settings, indent=1) + "\n"
        except TypeError as error:
            raise ValueError(f"{folder}: the settings {settings} cannot be written: {error}") from error
        # tensors may share memory; the format wants each on its own
        tensors = {name: value.detach().cpu().contiguous().clone() for name, value in self.tensors().items()}
        write_tensors(folder / self.weights_file, tensors)
        write_text(folder / POLICY_FILE, text)

    @classmethod
    def load(cls, folder: Path, pool: ModelPool) -> Self:
        """Read what `save` wrote, for use with `pool`.

        Raises:
            ValueError: there is no such policy in `folder`, or it was made for other models than the pool's.
        """
        settings = _read_settings(folder)
        try:
            weights = read_tensors(folder / cls.weights_file)
            models, width = [dict(model) for model in settings["models"]], settings.get("width")
            named = _named(models)
            expected_width = cls.input_width(settings, pool)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise ValueError(
                f"{folder} holds no readable policy ({type(error).__name__}: {error}); train one with experiments.train"
            ) from error
        if models != models_manifest(pool) or (expected_width is not None and width != expected_width):
            sees = "" if expected_width is None else f" ({width} features)"
            raise ValueError(
                f"{folder}: the policy was trained for the models {named}{sees}; the pool is "
                f"{_named(models_manifest(pool))} ({pool.slm.width} wide): load that pool, or train for it"
            )
        try:
            return cls.restored(settings, weights, pool)
        except (RuntimeError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
            raise ValueError(f"{folder}: {cls.weights_file} does not fit {POLICY_FILE}: {error}") from error


def load_policy(folder: Path, pool: ModelPool) -> SavedPolicy:
    """Read a saved policy of any class of `agents`.

    Raises:
        ValueError: there is none in `folder`, its class is not registered, or it was made for other models.
    """
    settings = _read_settings(folder)
    try:
        kind: type[SavedPolicy] = saved_class(str(settings["class"]), SavedPolicy, "policy")  # type: ignore[type-abstract]
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    return kind.load(folder, pool)


def _read_settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / POLICY_FILE).read_text())
        if not isinstance(settings, dict) or "class" not in settings:
            raise ValueError("it names no class")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} holds no readable {POLICY_FILE}; give the policy folder of a training run"
        ) from error
    return settings


def _named(models: Sequence[Mapping[str, str]]) -> str:
    return ", ".join(f"{model['name']} ({model['fingerprint']})" for model in models)
