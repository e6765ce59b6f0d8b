"""What a training that was interrupted goes on from: checkpoints, each a folder that is whole or absent."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor

from agents.common.saving import POLICY_FILE, SavedPolicy
from envs.models.pool import ModelPool
from envs.storage import keep_manifest

STATE_FILE = "state.safetensors"
TRAINED = "trained"
"""The folder of the policy that a training ended with."""
P = TypeVar("P", bound=SavedPolicy)
Arrays = dict[str, npt.NDArray[Any]]


class Checkpoints:
    """The checkpoints of one training, of which the newest is kept, and then the policy it ended with.

    A checkpoint is a folder that is filled under another name and renamed when it is whole; then the one before is
    deleted. A process that is killed at any moment loses what it did since the last one; a training that has ended is
    not made again.

    Args:
        folder: of the checkpoints of this training alone, and of the manifest that says what makes it; nothing is kept
            where None.
        about: what makes it: models, task, seed and settings, as plain data.

    Raises:
        ValueError: checkpoints of another training are there; the error names what differs.
    """

    def __init__(self, folder: Path | None, about: Mapping[str, Any]) -> None:
        self.folder = folder
        if folder is not None:
            keep_manifest(folder / "manifest.json", about, folder)

    def newest(self) -> Path | None:
        """The folder of the newest checkpoint; None where there is none."""
        return next(reversed(self._whole()), None)

    def save(
        self,
        steps: int,
        arrays: Mapping[str, Any],
        about: Mapping[str, Any],
        write: Callable[[Path], object] | None = None,
    ) -> None:
        """Keep a checkpoint in place of the one before.

        Args:
            steps: made so far, which names it; more than those of the one before.
            arrays: what is kept, nested in dictionaries and lists; see `read`.
            about: plain data that belongs to it.
            write: writes what else belongs to it into the folder it is given.

        Raises:
            OSError: it cannot be written; the error names the folder, and the checkpoint before stays.
        """
        if self.folder is None:
            return
        place = self.folder / f"{steps:012d}"
        partial = place.with_name(f"{place.name}.partial")
        self._clear_partial()
        partial.mkdir()
        try:
            if write is not None:
                write(partial)
            save_file(flat(arrays), partial / STATE_FILE, {"about": json.dumps(about)})
            os.replace(partial, place)
        except SafetensorError as error:
            raise OSError(f"{self.folder}: the checkpoint after step {steps} cannot be written ({error})") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for older in self._whole()[:-1]:
            shutil.rmtree(older)

    def trained(self, kind: type[P], pool: ModelPool) -> P | None:
        """The policy the training ended with; None where it has not ended."""
        if self.folder is None or not (self.folder / TRAINED / POLICY_FILE).is_file():
            return None
        return kind.load(self.folder / TRAINED, pool)

    def finish(self, policy: SavedPolicy) -> None:
        """Keep the policy the training ended with, and delete the checkpoints."""
        if self.folder is None:
            return
        policy.save(self.folder / TRAINED)
        self._clear_partial()
        for folder in self._whole():
            shutil.rmtree(folder)

    def _whole(self) -> list[Path]:
        """Checkpoints, by steps. Of older ones than the newest, some files may be deleted already."""
        if self.folder is None:
            return []
        return sorted(path for path in self.folder.iterdir() if path.name.isdigit())

    def _clear_partial(self) -> None:
        """Delete what a process has left that was killed while it wrote."""
        assert self.folder is not None
        for left in self.folder.glob("*.partial"):
            if left.is_dir():
                shutil.rmtree(left)


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arrays and the plain data of a checkpoint, nested as `Checkpoints.save` was given them.

    Dictionaries and lists that hold no array are left out.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        with safe_open(folder / STATE_FILE, framework="np") as file:
            about = json.loads((file.metadata() or {})["about"])
            # copies: what lies in the file cannot be written to
            arrays = {name: np.array(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{folder} is no readable checkpoint; delete it, and training begins anew") from error
    return nested(arrays), about


@contextmanager
def restoring(folder: Path) -> Iterator[None]:
    """Lets errors name the checkpoint that is gone on from, where its parts do not belong together."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{folder} is damaged ({what}); delete it, and training begins anew") from error


def flat(value: Any, name: str = "") -> Arrays:
    """Arrays by where they stand in dictionaries and lists: {"a": {"b": [x, y]}} as {"a/b/#0": x, "a/b/#1": y}."""
    if isinstance(value, Mapping):
        parts = {str(key): part for key, part in value.items()}
    elif isinstance(value, list | tuple):
        parts = {f"#{number}": part for number, part in enumerate(value)}
    else:
        return {name: np.ascontiguousarray(value).reshape(np.shape(value))}
    prefix = f"{name}/" if name else ""
    return {key: array for inner, part in parts.items() for key, array in flat(part, f"{prefix}{inner}").items()}


def nested(arrays: Arrays) -> dict[str, Any]:
    """What `flat` has flattened; tuples come back as lists."""
    whole: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, last = name.split("/")
        place = whole
        for part in path:
            place = place.setdefault(part, {})
        place[last] = array
    return {key: _with_lists(part) for key, part in whole.items()}


def _with_lists(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    inner = {key: _with_lists(part) for key, part in value.items()}
    return [inner[f"#{number}"] for number in range(len(inner))] if "#0" in inner else inner


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Arrays], dict[str, dict[str, Any]]]:
    """What an optimizer remembers of each parameter: its tensors as arrays, and what else there is."""
    state = {str(number): of for number, of in optimizer.state_dict()["state"].items()}
    arrays = {
        number: {name: array_of(value) for name, value in of.items() if isinstance(value, Tensor)}
        for number, of in state.items()
    }
    others = {
        number: {name: value for name, value in of.items() if not isinstance(value, Tensor)}
        for number, of in state.items()
    }
    return arrays, others


def restore_optimizer(
    optimizer: torch.optim.Optimizer, arrays: Mapping[str, Arrays], others: Mapping[str, Mapping[str, Any]]
) -> None:
    """Let an optimizer of the same parameters remember what `optimizer_state` gave."""
    state = {
        int(number): {name: torch.tensor(value) for name, value in arrays.get(number, {}).items()} | dict(of)
        for number, of in others.items()
    }
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def array_of(tensor: Tensor) -> npt.NDArray[Any]:
    """A tensor as an array, wherever it lies."""
    return tensor.detach().cpu().numpy()


def plain(value: Any, other: Callable[[Any], Any] = lambda item: item) -> Any:
    """Settings as dictionaries and lists, whatever kinds of mappings and sequences hold them.

    Args:
        value: the settings.
        other: says what stands for what is neither; it itself unless given.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(item, other) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(item, other) for item in value]
    return other(value)


def described(settings: Any) -> Any:
    """Settings as plain data; objects by their names."""

    def word(value: Any) -> Any:
        if value is None or isinstance(value, str | int | float):
            return value
        return getattr(value, "__qualname__", type(value).__qualname__)

    return plain(settings, word)
