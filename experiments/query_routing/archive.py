"""A comparison of query-level agents as one file: what the models answered, and what each agent chose in each split."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

from envs.storage import write_whole

KEPT = ("outcomes.json", "outcomes.jsonl", "splits")
"""What a comparison goes on from, in the folder of its run."""


def pack(folder: Path, path: Path) -> None:
    """Write what the run in `folder` has done into one file, a tar archive, atomically.

    Args:
        folder: of the run.
        path: of the file, `NAME.tar.xz`; the same bytes come of the same run.
    """

    def plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
        entry.mtime, entry.uid, entry.gid, entry.uname, entry.gname, entry.mode = 0, 0, 0, "", "", 0o644
        if entry.isdir():
            entry.mode = 0o755
        return None if ".lock" in entry.name else entry

    def write(partial: Path) -> None:
        with tarfile.open(partial, "w:xz") as archive:
            for name in filter(lambda name: (folder / name).exists(), KEPT):
                archive.add(folder / name, name, filter=plain)

    write_whole(path, write)


def unpack(path: Path, folder: Path) -> None:
    """Put what a file holds into the folder of a run, which goes on from it.

    Raises:
        ValueError: the file is damaged, or no such archive.
    """
    try:
        with tarfile.open(path, "r:xz") as archive:
            archive.extractall(folder, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); delete it to make it anew") from error


def remove(folder: Path) -> None:
    """Take what was unpacked out of the folder of a run again."""
    for name in KEPT:
        place = folder / name
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink(missing_ok=True)
