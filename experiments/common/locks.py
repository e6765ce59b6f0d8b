"""Locks on run folders and shared files: one writer at a time, and who it is.

They are locks of the operating system (`flock`, by the library filelock), so that no crash leaves one behind: a process
that ends, however it ends, holds nothing. On a local disk they hold. On a shared file system they hold as far as it
passes them on: NFS does between hosts (Linux, version 4, or 3 with its lock daemon), Lustre where it is mounted with
`flock`, CephFS and GPFS do; with `localflock`, `nolock` or on sshfs they hold within one host alone. Where there are no
locks at all, a line says so, and nothing is locked.
"""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

LOCK = ".lock"
"""The lock of a folder: a file in it, that stays there and says who has written in the folder last."""
_WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class InUseError(ValueError):
    """Somebody else writes there."""


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold a folder while a program writes in it.

    Raises:
        InUseError: another process does; the error names it.
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place = folder / LOCK
    lock = _lock(place)
    try:
        _acquire(lock, place, wait=False)
    except Timeout:
        raise InUseError(
            f"{folder} is in use by {_holder(place)}; wait for it or end it, or give this run another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def writer_of(folder: Path) -> str | None:
    """Who writes in a folder now, in words; None where nobody does, or the folder is not there."""
    place = folder / LOCK
    if not place.is_file():
        return None
    lock = _lock(place)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return _holder(place)
    except OSError:  # no locks here, or no right to
        return None
    lock.release()
    return None


@contextmanager
def one_at_a_time(shared: Path) -> Iterator[None]:
    """Hold a file or folder that several runs share; waits while another run does.

    Args:
        shared: which need not be there yet; the lock lies beside it, `NAME.lock`.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    place = shared.with_name(f"{shared.name}.lock")
    lock = _lock(place)
    try:
        _acquire(lock, place, wait=False)
    except Timeout:
        logging.getLogger(__name__).info("waiting for %s, which writes %s", _holder(place), shared)
        _acquire(lock, place, wait=True)
    try:
        yield
    finally:
        lock.release()


@contextmanager
def one_of(shared: Path) -> Iterator[Path]:
    """Hold a file that several runs share, or one of several such files: the first that no other run holds.

    Args:
        shared: the file; where there are several, a number stands for the `*` of its name: 0, 1 and so on.
    """
    shared.parent.mkdir(parents=True, exist_ok=True)
    if "*" not in shared.name:
        with one_at_a_time(shared):
            yield shared
        return
    for number in itertools.count():
        path = shared.with_name(shared.name.replace("*", f"{number}"))
        place = path.with_name(f"{path.name}.lock")
        lock = _lock(place)
        try:
            _acquire(lock, place, wait=False)
        except Timeout:
            continue
        try:
            yield path
        finally:
            lock.release()
        return


def _lock(place: Path) -> FileLock:
    # a lock that is a mere file would outlive a crash
    return FileLock(place, fallback_to_soft=False, poll_interval=0.2)


def _acquire(lock: FileLock, place: Path, wait: bool) -> None:
    """Acquire, and say in the file who holds it."""
    try:
        lock.acquire(blocking=wait)
    except Timeout:
        raise
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
        logging.getLogger(__name__).warning("%s: this file system has no locks; start no two runs there", place.parent)
        return
    holder = {"pid": os.getpid(), "host": platform.node(), "since": datetime.now().isoformat(" ", "seconds")}
    try:
        place.write_text(json.dumps(holder) + "\n")
    except OSError as error:
        lock.release()
        raise OSError(error.errno, error.strerror, f"{place}") from error  # a full disk does not say where


def _holder(place: Path) -> str:
    """Who holds a lock, in words."""
    try:
        holder = json.loads(place.read_text())
        return f"process {holder['pid']} on {holder['host']}, since {holder['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is about to write it
        return "another process"
