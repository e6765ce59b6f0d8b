"""Preferences on disk: Arrow shards that are whole or absent, and a manifest that says what made them."""

from __future__ import annotations

import errno
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.progress import ProgressBar
from envs.storage import check_manifest, write_text, write_whole

if TYPE_CHECKING:
    from agents.common.policy import Track
    from envs.models.pool import ModelPool
    from envs.tasks.task import Task

FORMAT = 1
MANIFEST = "manifest.json"
COLUMNS = {
    "example": "int32",
    "position": "int32",
    "case": "int8",
    "slm_token": "int32",
    "llm_token": "int32",
    "slm_outcome": "int8",
    "llm_outcome": "int8",
    "label": "int8",
    "round": "int8",
}
FEATURES = "features"
"""Column of what is kept of the SLM at each token, its hidden state first, float16."""
Columns = dict[str, npt.NDArray[Any]]


def shard_ranges(examples: int, size: int) -> list[range]:
    """The numbers of `examples` examples in shards of `size`, the last one perhaps smaller."""
    return [range(first, min(first + size, examples)) for first in range(0, examples, size)]


@dataclass(frozen=True)
class Share:
    """What one of several processes makes of a store: every `count`-th shard, from `number` on.

    Args:
        number: of the process, from 0.
        count: of processes.
    """

    number: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.number < self.count:
            raise ValueError(f"share {self.number} of {self.count}: they are numbered from 0")

    def of(self, shards: int) -> range:
        """The shards that it makes."""
        return range(self.number, shards, self.count)


@runtime_checkable
class Collecting(Protocol):
    """A learner whose first round several processes can collect, before it or others are trained on it."""

    def collect(self, pool: ModelPool, task: Task, seed: int, folder: Path, track: Track = ...) -> PreferenceStore:
        """Collect all of it into `folder`, going on where an earlier run was interrupted."""
        ...

    def collect_share(self, pool: ModelPool, task: Task, seed: int, folder: Path, share: Share) -> PreferenceStore:
        """Collect one share of it, beside other processes; the bytes are those that `collect` writes."""
        ...


class PreferenceStore:
    """A folder of Arrow shards, each written at once and read by memory map (Hugging Face `datasets`).

    Shard i is `shard-0000i.arrow`; `shard-0000i.json` beside it, written last, says that it is whole and holds its
    checksum. A shard without it does not count.

    Args:
        folder: made where it is missing.
        manifest: what makes the preferences: models, task, seed, settings.
        shards: how many there will be.

    Raises:
        ValueError: the folder holds preferences made by something else; the error names both.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], shards: int) -> None:
        self.folder, self.shards = folder, shards
        self.manifest = {"format": FORMAT, **manifest, "shards": shards}
        path = folder / MANIFEST
        if path.is_file():
            check_manifest(folder, _read_manifest(folder), self.manifest)
        else:
            write_text(path, json.dumps(self.manifest, indent=1) + "\n")

    @classmethod
    def open(cls, folder: Path) -> PreferenceStore:
        """A store that is there already.

        Raises:
            ValueError: there is none.
        """
        manifest = _read_manifest(folder)
        return cls(folder, {k: v for k, v in manifest.items() if k not in ("format", "shards")}, manifest["shards"])

    def path(self, shard: int, suffix: str = "arrow") -> Path:
        """Where a shard lies."""
        return self.folder / f"shard-{shard:05d}.{suffix}"

    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [shard for shard in range(self.shards) if not self.path(shard, "json").is_file()]

    def complete(
        self,
        parts: Sequence[range],
        make: Callable[[int], tuple[Columns, Mapping[str, Any]]],
        label: str,
        share: Share | None = None,
    ) -> None:
        """Make the shards that are not there yet, and those that are damaged.

        Args:
            parts: the examples of each shard.
            make: makes a shard's columns, and the note to keep beside it.
            label: of the progress bar.
            share: make these alone, beside other processes; all where None.
        """
        own = (share or Share()).of(self.shards)
        for shard in self.check(discard=True, among=own):
            ProgressBar.write(f"{self.path(shard)} is damaged; making it again")
        missing = [shard for shard in self.missing() if shard in own]
        with ProgressBar(total=sum(len(parts[shard]) for shard in own), desc=label, leave=False) as progress:
            progress.update(sum(len(parts[shard]) for shard in own if shard not in missing))
            for shard in missing:
                self.write(shard, *make(shard))
                progress.update(len(parts[shard]))

    def write(self, shard: int, columns: Columns, note: Mapping[str, Any]) -> None:
        """Write a shard: all of it, or nothing.

        Args:
            shard: its number.
            columns: arrays of one length; `features` may be left out.
            note: kept beside the shard.

        Raises:
            OSError: the disk is full; the shards written before are untouched.
        """
        from datasets import Features, Sequence, Value
        from datasets.arrow_writer import ArrowWriter

        schema: dict[str, Any] = {name: Value(COLUMNS[name]) for name in columns if name != FEATURES}
        if FEATURES in columns:
            schema[FEATURES] = Sequence(Value("float16"), length=columns[FEATURES].shape[1])
        features = Features(schema)

        def write(partial: Path) -> None:
            writer = ArrowWriter(path=str(partial), features=features)
            writer.write_table(arrow_table(columns, features))
            writer.finalize()

        try:
            write_whole(self.path(shard), write)
            about = {"rows": len(columns["example"]), "sha256": checksum(self.path(shard)), **note}
            write_text(self.path(shard, "json"), json.dumps(about) + "\n")
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                done = self.shards - len(self.missing())
                raise OSError(
                    error.errno,
                    f"no space left for shard {shard} in {self.folder}; the {done} shards before it are whole: free "
                    "space and run the same command again",
                ) from error
            raise

    def check(self, discard: bool = False, among: Sequence[int] | None = None) -> list[int]:
        """Shards whose content is not what was written; with `discard` they are removed, to be made again.

        Args:
            discard: remove them.
            among: which are looked at; all where None.
        """
        bad = []
        for shard in range(self.shards) if among is None else among:
            if not self.path(shard, "json").is_file():
                continue
            path, note = self.path(shard), self.note(shard)
            whole = path.is_file() and checksum(path) == note.get("sha256")
            # what is noted beside it may be damaged too
            if not whole or note.get("rows") != self._table(shard).num_rows:
                bad.append(shard)
                if discard:
                    self.path(shard, "json").unlink()
        return bad

    def require(self) -> None:
        """Refuse a store that is not complete and sound.

        Raises:
            ValueError: shards are missing or damaged; the error names them.
        """
        for shards, state in ((self.missing(), "missing"), (self.check(), "damaged")):
            if shards:
                raise ValueError(
                    f"{self.folder}: {', '.join(self.path(shard).name for shard in shards[:5])} of {self.shards} "
                    f"shards {'is' if len(shards) == 1 else 'are'} {state}; run the command that made them again: it "
                    "makes these anew and keeps the others"
                )

    def note(self, shard: int) -> dict[str, Any]:
        """What was written beside a shard."""
        try:
            note = json.loads(self.path(shard, "json").read_text())
        except ValueError:
            return {}
        return note if isinstance(note, dict) else {}

    def rows(self) -> list[int]:
        """Rows of each shard."""
        return [int(self.note(shard)["rows"]) for shard in range(self.shards)]

    def skipped(self) -> int:
        """How many examples were left out.

        Raises:
            ValueError: a shard does not say.
        """
        count = 0
        for shard in range(self.shards):
            skipped = self.note(shard).get("skipped")
            if not isinstance(skipped, list):
                raise ValueError(
                    f"{self.path(shard, 'json')} does not say what was skipped; delete it, and it is made again"
                )
            count += len(skipped)
        return count

    def column(self, name: str) -> npt.NDArray[Any]:
        """One of the short columns of all shards, (rows,)."""
        return np.concatenate([self._table(shard).column(name).to_numpy() for shard in range(self.shards)])

    def shard(self, shard: int) -> Columns:
        """The short columns of one shard, copies."""
        table = self._table(shard)
        return {name: table.column(name).to_numpy().copy() for name in COLUMNS}

    def features(self, shard: int) -> Tensor:
        """Features of one shard, a copy, float16, (rows, width)."""
        column = self._table(shard).column(FEATURES)
        width = column.type.list_size
        parts = [chunk.flatten().to_numpy().reshape(-1, width) for chunk in column.chunks]
        return torch.from_numpy(np.concatenate([np.zeros((0, width), dtype=np.float16), *parts]))

    def _table(self, shard: int) -> Any:
        from datasets import Dataset

        return Dataset.from_file(str(self.path(shard))).data.table


def _read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store that is there.

    Raises:
        ValueError: there is none that can be read.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        if not isinstance(manifest, dict) or type(manifest["shards"]) is not int or manifest["shards"] < 0:
            raise ValueError("it does not say how many shards there are")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{folder} holds no readable {MANIFEST}; give a folder that experiments.collect has written"
        ) from error
    return manifest


def arrow_table(columns: Columns, features: Any) -> Any:
    """Columns as an Arrow table of these `datasets` features."""
    import pyarrow as pa

    schema = features.arrow_schema
    arrays = []
    for name in schema.names:
        values = np.ascontiguousarray(columns[name])
        if values.ndim == 2:
            flat = pa.array(values.astype(np.float16).reshape(-1))
            arrays.append(pa.FixedSizeListArray.from_arrays(flat, values.shape[1]))
        else:
            arrays.append(pa.array(values).cast(schema.field(name).type))
    return pa.table(arrays, schema=schema)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
