"""Ctrl-C and `kill`: a program ends in one line that says how to go on, and its worker processes end with it."""

from __future__ import annotations

import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

SIGNALS = (signal.SIGINT, signal.SIGTERM)
PATIENCE = 5.0
"""Seconds that a worker may take to end."""
FOLLOWING = 0.5
"""Seconds after which it is looked again whether a parent is there."""
CLOSING = 10.0
"""Seconds that a program may take to close what it holds."""


class Stopped(KeyboardInterrupt):
    """A signal asks the program to end.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


@dataclass
class Progress:
    """How far a program has come, for the line it ends with.

    Attributes:
        folder: where it keeps what is done; None before it has one.
        command: goes on in that folder.
    """

    folder: Path | None = None
    command: str = ""

    def line(self, number: int) -> str:
        """What is said when a signal ends the program."""
        name = signal.Signals(number).name
        if self.folder is None:
            return f"stopped by {name} before anything was done"
        return f"stopped by {name}; what is done is kept in {near(self.folder)}; to go on: {self.command}"


@contextmanager
def stoppable() -> Iterator[Progress]:
    """Let SIGINT and SIGTERM end what is inside with one line, and exit codes 130 and 143.

    What is inside sees them as a KeyboardInterrupt, so that it can close what it holds. The process ends at once when
    that takes longer than CLOSING, or a library has swallowed the exception, or a second signal comes: what is on disk
    is whole at any moment. A signal that the process was told to ignore, as under `nohup`, is.
    """
    progress = Progress()

    closed = threading.Event()

    def stop_at_once(number: int, frame: FrameType | None = None) -> NoReturn:
        end_workers(patience=0)
        os.write(2, f"{progress.line(number)}\n".encode())
        os._exit(128 + number)

    def stop_in_the_end(number: int) -> None:
        if not closed.wait(CLOSING):
            stop_at_once(number)

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        for one in caught:
            signal.signal(one, stop_at_once)
        threading.Thread(target=stop_in_the_end, args=[number], daemon=True).start()
        raise Stopped(number)

    caught = {one: signal.getsignal(one) for one in SIGNALS}
    caught = {one: handler for one, handler in caught.items() if handler is not signal.SIG_IGN}
    for one in caught:
        signal.signal(one, stop)
    try:
        yield progress
    except KeyboardInterrupt as error:
        number = error.number if isinstance(error, Stopped) else int(signal.SIGINT)
        end_workers()
        sys.stdout.flush()
        print(progress.line(number), file=sys.stderr, flush=True)
        raise SystemExit(128 + number) from None
    finally:
        closed.set()
        for one, handler in caught.items():
            signal.signal(one, handler)


def command_to_go_on(program: str, arguments: Sequence[str], key: str, folder: Path) -> str:
    """The command line that goes on in a folder.

    Args:
        program: its name.
        arguments: that it was started with.
        key: of Hydra's setting for the folder.
        folder: of the run, or of the multirun.
    """
    kept = [argument for argument in arguments if argument.partition("=")[0].lstrip("+") != key]
    return shlex.join(["python", "-m", f"experiments.{program}", *kept, f"{key}={quoted(near(folder))}"])


def quoted(folder: Path) -> str:
    """A folder as Hydra's command line takes it; the shell's quotes come around it."""
    place = f"{folder}"
    if all(letter.isalnum() or letter in "/._-" for letter in place):
        return place
    return "'" + place.replace("\\", "\\\\").replace("'", "\\'") + "'"


def near(folder: Path) -> Path:
    """A folder as it is named from where the program was started, if it lies below."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def end_workers(patience: float = PATIENCE) -> None:
    """End the processes that work for this one, and wait for so many seconds until they have."""
    workers = multiprocessing.active_children()
    for process in workers:
        process.terminate()
    for process in workers:
        process.join(patience)


@cache
def end_with(parent: int) -> None:
    """End this process when the one that has started it is gone; Ctrl-C at the terminal is for that one.

    Args:
        parent: its number; where it is not this one's parent, nothing is done: what runs on clusters ends with them.
            A process that makes several jobs of it follows it once.
    """
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # tqdm's own is a semaphore, of which Python says that it leaked when a signal ends the process
    tqdm.set_lock(threading.RLock())

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(FOLLOWING)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
