"""Files that are whole or absent, and manifests that say what made them."""

from __future__ import annotations

import functools
import glob
import json
import os
import platform
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, and move it to `path` when it is done; nothing is left behind where it fails.

    Each writer has a partial file of its own, so that two of one file do not mix what they write: the file is that of
    the last to be done. What writers left that were killed on this machine is cleared away.

    Raises:
        OSError: the disk is full, the folder is read-only, or the like; the error names the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_partials(path)
    partial = path.with_name(f"{path.name}.{_HOST}-{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    except OSError as error:
        # a write that fails does not say where
        if error.errno is None or error.filename not in (None, f"{partial}", partial):
            raise
        raise OSError(error.errno, error.strerror, f"{path}") from error
    finally:
        partial.unlink(missing_ok=True)


def _clear_partials(path: Path) -> None:
    """Delete the partial files of `path` whose writers are gone; those of other hosts may live."""
    for partial in path.parent.glob(f"{glob.escape(path.name)}.{glob.escape(_HOST)}-*-*.partial"):
        writer = partial.name.removesuffix(".partial").split("-")[-2]
        if writer.isdecimal() and not psutil.pid_exists(int(writer)):
            partial.unlink(missing_ok=True)


_HOST = re.sub(r"\W", "_", platform.node())
"""This machine, as names of files may hold it."""


def write_text(path: Path, text: str) -> None:
    """Write text."""
    write_whole(path, lambda partial: partial.write_text(text))


def copy_files(source: Path, target: Path, pattern: str = "*") -> None:
    """Copy the files of a folder whose names match into another one, each whole or not at all."""
    for path in sorted(source.glob(pattern)):
        write_whole(target / path.name, functools.partial(shutil.copyfile, path))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors, and words about them, as safetensors.

    Raises:
        OSError: they cannot be written.
        ValueError: more than one entry of metadata, whose order in the file each process draws anew; the same contents
            make the same bytes.
    """
    if metadata is not None and len(metadata) > 1:
        raise ValueError(f"{path}: give {list(metadata)} as one entry")

    def write(partial: Path) -> None:
        try:
            save_file(dict(tensors), partial, metadata=dict(metadata or {}))
        except SafetensorError as error:  # a full disk, in its words
            raise OSError(f"{path} cannot be written: {error}") from error

    write_whole(path, write)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in memory that torch allocates.

    Those that are mapped from a file lie where it has them, which need not be aligned, and the last bits of a product
    depend on that: a copy computes what the tensors did that were written.

    Raises:
        OSError: there is no such file, or it cannot be read.
        SafetensorError: it holds no tensors.
    """
    return {name: value.clone() for name, value in load_file(path).items()}


def check_manifest(place: Path, kept: Mapping[str, Any], wanted: Mapping[str, Any], only: Sequence[str] = ()) -> None:
    """Refuse what was made by other models, another task or other settings than wanted.

    Args:
        place: named in the error.
        kept: the manifest that is there.
        wanted: the manifest it should be.
        only: compare these keys; all where empty.

    Raises:
        ValueError: they differ; the error names what differs, both ways.
    """
    for key in only or sorted({*kept, *wanted}):
        old, new = kept.get(key), json.loads(json.dumps(wanted.get(key)))
        if old == new:
            continue
        if isinstance(old, dict) and isinstance(new, dict):
            inner = [k for k in sorted({*old, *new}) if old.get(k) != new.get(k)]
            old, new = ({k: part.get(k) for k in inner} for part in (old, new))
        raise ValueError(
            f"{place} was made with {key} {old}, this run has {new}; give this run another folder, or the settings "
            "that made it"
        )


def write_manifest(path: Path, about: Mapping[str, Any]) -> None:
    """Write what made something, in place of what stood there."""
    write_text(path, json.dumps(about, indent=1) + "\n")


def keep_manifest(
    path: Path,
    about: Mapping[str, Any],
    place: Path | None = None,
    made_once: Callable[[], Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """Check the manifest at `path` against `about` if it is there; write it if it is not.

    Args:
        path: of the manifest, a JSON file.
        about: what makes what lies beside it: models, task, settings.
        place: named in the error; `path` where None.
        made_once: gives what a new manifest holds besides `about`; in one that is there it is kept and not compared.

    Returns:
        The manifest that is there now.

    Raises:
        ValueError: the manifest there says that something else made it; the error names what differs.
    """
    if path.is_file():
        kept: dict[str, Any] = json.loads(path.read_text())
        check_manifest(place or path, kept, about, list(about) if made_once else ())
        return kept
    manifest = {**about, **(made_once() if made_once else {})}
    write_manifest(path, manifest)
    return manifest
