"""Compares answers in processes that can be killed: what a model writes may take for ever to evaluate.

Libraries of process pools (pebble, loky) start theirs through multiprocessing, which daemonic processes such as the
workers of Gymnasium's `AsyncVectorEnv` may not, and send code. Hence a few plain subprocesses, and JSON.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import psutil

WORKER = Path(__file__).with_name("grading_worker.py")
PATIENCE = 12.0
"""So many times its seconds a comparison may take by the clock: where other work takes the cores, it gets few."""


class GradingError(RuntimeError):
    """No process that grades answers can be started."""


class GradingPool:
    """Subprocesses that compare two answers by value with math-verify, started when needed and kept.

    Threads may ask at the same time. A forked process starts workers of its own; those of its parent stay its parent's.
    Workers end with the process that started them, however it ends.

    Args:
        seconds: processor time a comparison may take, so that no verdict depends on what else runs; its worker is
            killed then, or after PATIENCE times as much by the clock.
        workers: how many processes at most; further threads wait.
        start_seconds: how long a worker may take to start.
        command: what starts a worker, for tests; its last arguments are the processor time, and the time by the clock,
            after which it is to end itself.

    Raises:
        ValueError: a limit that is not positive.
    """

    def __init__(
        self,
        seconds: float = 5.0,
        workers: int = 2,
        start_seconds: float = 60.0,
        command: tuple[str, ...] | None = None,
    ) -> None:
        if min(seconds, workers, start_seconds) <= 0:
            raise ValueError(
                f"seconds ({seconds}), workers ({workers}) and start_seconds ({start_seconds}) of a grading pool must "
                "be positive"
            )
        self.seconds, self.workers, self.start_seconds = seconds, workers, start_seconds
        # -P: else the folder of the worker would come first, and this one has a `math`
        self.command = command or (sys.executable, "-P", str(WORKER), str(seconds + 1), str(PATIENCE * seconds + 1))
        self._alive: set[_Worker] = set()
        self._reset()
        self._ended = threading.Event()
        weakref.finalize(self, _end, self._ended, self._alive)  # when the pool goes, or the interpreter
        if hasattr(os, "register_at_fork"):
            after_fork = weakref.WeakMethod(self._leave_to_parent)
            os.register_at_fork(after_in_child=lambda: (method := after_fork()) and method())

    def same_value(self, gold: str, answer: str) -> bool:
        """Whether math-verify finds the same value in both; False if that takes too long or too much memory.

        A comparison whose worker dies is tried once more in a new one. If that dies too, the answer is taken for one
        that cannot be evaluated: False, and a warning.

        Raises:
            GradingError: no worker can be started.
        """
        request = json.dumps([gold, answer]).encode() + b"\n"
        with self._free:
            for _ in range(2):
                with self._lock:
                    worker = self._idle.pop() if self._idle else None
                worker = worker or self._start()
                try:
                    reply, expired = worker.ask(request, self.seconds, PATIENCE * self.seconds)
                except BaseException:  # interrupted: its reply to this request must not become that to another
                    self._discard(worker)
                    raise
                if reply in (b"true\n", b"false\n"):
                    with self._lock:
                        self._idle.append(worker)
                    return reply == b"true\n"
                self._discard(worker)
                if expired or self._ended.is_set():
                    return False
        logging.getLogger(__name__).warning(
            "two processes died while they compared the answer %.80r with %.80r: graded as wrong", answer, gold
        )
        return False

    def close(self) -> None:
        """Ends the workers; the next comparison starts new ones. No thread may be comparing."""
        with self._lock:
            self._idle.clear()
            _kill_all(self._alive)

    def _start(self) -> _Worker:
        try:
            worker = _Worker(self.command)
        except OSError as error:
            raise GradingError(self._no_start(str(error))) from error
        self._alive.add(worker)
        try:
            if self._ended.is_set():  # a daemon thread goes on while the interpreter ends
                raise GradingError("no answer is graded any more: the interpreter ends")
            reply, expired = worker.ask(b"", self.start_seconds, self.start_seconds)
        except BaseException:
            self._discard(worker)
            raise
        if reply != b'"ready"\n':
            self._discard(worker)
            reason = f"nothing within {self.start_seconds:g} seconds" if expired else "it ended at once"
            raise GradingError(self._no_start(reply.decode(errors="replace").strip() or reason))
        return worker

    def _no_start(self, reason: str) -> str:
        return f"cannot start a process that grades answers ({reason}); see what this prints: {' '.join(self.command)}"

    def _discard(self, worker: _Worker) -> None:
        self._alive.discard(worker)
        worker.kill()

    def _reset(self) -> None:
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._free = threading.BoundedSemaphore(self.workers)

    def _leave_to_parent(self) -> None:
        """In a forked process: no worker, and no lock that a thread of the parent may have held."""
        for worker in self._alive:
            worker.leave()
        self._alive.clear()
        self._reset()


class _Worker:
    """A subprocess that is asked one thing at a time."""

    def __init__(self, command: tuple[str, ...]) -> None:
        self._process = subprocess.Popen(
            command,
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONHASHSEED": "0"},  # the order of SymPy's sets, hence the verdicts
        )

    def ask(self, request: bytes, seconds: float, patience: float) -> tuple[bytes, bool]:
        """The line it replies with, empty if it died; and whether it was killed for taking too long.

        Args:
            request: a line; nothing is asked where empty.
            seconds: processor time it may take.
            patience: seconds by the clock it may take.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        expired, answered = threading.Event(), threading.Event()
        begun, spent = time.monotonic(), self._spent()

        def watch() -> None:
            while True:
                left = min(seconds - (self._spent() - spent), patience - (time.monotonic() - begun))
                if left <= 0:
                    expired.set()
                    self._process.kill()
                    return
                if answered.wait(left):
                    return

        threading.Thread(target=watch, daemon=True).start()
        try:
            if request:
                self._process.stdin.write(request)
            reply = self._process.stdout.readline()
        except OSError:  # a broken pipe
            reply = b""
        finally:
            answered.set()
        return reply, expired.is_set()

    def _spent(self) -> float:
        """Processor time it has taken so far, in seconds; as much as there is where it is gone."""
        try:
            user, system = psutil.Process(self._process.pid).cpu_times()[:2]
        except psutil.Error:
            return float("inf")
        return float(user + system)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close_pipes()

    def leave(self) -> None:
        """Without ending it: to the worker, this process is not there."""
        self._close_pipes()  # else it would not see its input end while this process lives
        self._process.poll()  # nothing to wait for

    def _close_pipes(self) -> None:
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def _end(ended: threading.Event, workers: set[_Worker]) -> None:
    ended.set()
    _kill_all(workers)


def _kill_all(workers: set[_Worker]) -> None:
    while workers:
        workers.pop().kill()


GRADING_POOL = GradingPool()
"""The pool of this process."""
