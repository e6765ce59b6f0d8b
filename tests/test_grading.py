"""Answers are compared in processes that can be killed: in threads, in daemonic and in forked processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest

from envs.tasks import math_answers
from envs.tasks.grading import GradingError, GradingPool
from envs.tasks.math_answers import same_value
from envs.tasks.quantities import read_quantity

ROOT = Path(__file__).resolve().parents[1]
ENDLESS = ("9^{9*999*999*999}", "2^{99!}", "\\prod_{n=1}^{999} n!")
EQUAL, OTHER = ("2\\sqrt{2}", "\\sqrt{8}"), ("2\\sqrt{2}", "\\sqrt{7}")
START = 30.0  # seconds in which a worker starts, even where other work shares the cores


def children() -> list[psutil.Process]:
    return [child for child in psutil.Process().children() if "grading_worker" in " ".join(child.cmdline())]


def gone(pid: int, seconds: float = 10.0) -> bool:
    end = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.fixture
def pool() -> Iterator[GradingPool]:
    pool = GradingPool(seconds=1.0)
    yield pool
    pool.close()


# --- what never ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ENDLESS)
def test_an_answer_without_end_is_wrong_in_time_and_the_next_is_right(pool: GradingPool, answer: str) -> None:
    assert pool.same_value(*EQUAL)  # started
    began = time.monotonic()
    assert not pool.same_value("18", answer)
    assert time.monotonic() - began < 1.0 + START
    assert pool.same_value(*EQUAL)
    assert not pool.same_value(*OTHER)


def test_the_task_grades_answers_without_end_in_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers.GRADING_POOL, "seconds", 1.0)
    with ThreadPoolExecutor(4) as threads:
        pairs = [("18", ENDLESS[2]), EQUAL, OTHER, ("18", ENDLESS[0]), ("\\frac{1}{2}", "2^{-1}")]
        began = time.monotonic()
        assert list(threads.map(lambda pair: same_value(*pair), pairs)) == [False, True, False, False, True]
        assert time.monotonic() - began < 2 * (1 + START)


def test_threads_get_their_own_verdicts(pool: GradingPool) -> None:
    pairs = [(f"{n} + x", f"x + {n + n % 3}") for n in range(60)]
    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(lambda pair: pool.same_value(*pair), pairs)) == [n % 3 == 0 for n in range(60)]
    assert len(pool._alive) <= pool.workers


# --- where processes are not free -------------------------------------------------------------------------------------


class Grading(gym.Env[np.ndarray, int]):
    """Its actions are answers; the reward is the verdict."""

    action_space = gym.spaces.Discrete(3)
    observation_space = gym.spaces.Box(0.0, 1.0, (1,))
    pairs = (EQUAL, OTHER, ("18", ENDLESS[0]))

    def reset(self, *, seed: int | None = None, options: dict[str, object] | None = None):
        same_value.cache_clear()  # of a forked process: what its parent had asked
        math_answers.GRADING_POOL.seconds = 1.0  # in the process of this environment
        return np.zeros(1, np.float32), {}

    def step(self, action: int):
        info = {"worker": children()[0].pid if children() else 0, "daemonic": daemonic()}
        return np.zeros(1, np.float32), float(same_value(*self.pairs[action])), False, False, info


def daemonic() -> bool:
    import multiprocessing

    return multiprocessing.current_process().daemon


@pytest.mark.parametrize("context", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_daemonic_workers_of_a_vector_environment_grade(context: str) -> None:
    assert same_value(*EQUAL)  # a fork inherits a worker that is not its own
    envs = gym.vector.AsyncVectorEnv([Grading, Grading], context=context)
    try:
        envs.reset()
        steps = [envs.step(np.array(actions)) for actions in ([0, 1], [2, 0], [1, 0], [0, 1])]
    finally:
        envs.close()
    assert [step[1].tolist() for step in steps] == [[1, 0], [0, 1], [0, 1], [1, 0]]
    info = steps[-1][4]
    assert info["daemonic"].all()
    assert all(pid and gone(int(pid)) for pid in info["worker"])
    assert same_value("x + 1", "1 + x")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_forked_process_has_workers_of_its_own(pool: GradingPool) -> None:
    assert pool.same_value(*EQUAL)
    busy = threading.Thread(target=pool.same_value, args=("18", ENDLESS[2]))  # holds what a fork would find locked
    busy.start()
    time.sleep(0.2)
    child = os.fork()
    if child == 0:
        alone = not pool._alive
        signal.alarm(60)
        os._exit(0 if alone and pool.same_value(*EQUAL) and not pool.same_value(*OTHER) and pool._alive else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    busy.join()
    assert pool.same_value(*EQUAL)


@pytest.mark.parametrize("end", ["pass", "os._exit(0)", "os.kill(os.getpid(), 9)", "raise SystemExit(3)"])
@pytest.mark.parametrize("busy", [pytest.param(False, marks=pytest.mark.slow), True])
def test_no_worker_outlives_its_process(end: str, busy: bool) -> None:
    code = f"""
        import os, sys, threading, time
        from envs.tasks.grading import GradingPool
        pool = GradingPool(seconds=2.0)
        assert pool.same_value({EQUAL[0]!r}, {EQUAL[1]!r})
        print(*[worker._process.pid for worker in pool._alive], flush=True)
        if {busy}:
            threading.Thread(target=pool.same_value, args=("18", {ENDLESS[2]!r}), daemon=True).start()
            time.sleep(0.3)
        {end}
    """
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, capture_output=True, text=True)
    assert run.stderr == ""
    pids = [int(pid) for pid in run.stdout.split()]
    assert len(pids) == 1
    assert all(gone(pid) for pid in pids)


# --- workers that fail ------------------------------------------------------------------------------------------------


def command(code: str) -> tuple[str, ...]:
    return sys.executable, "-c", textwrap.dedent(code)


@pytest.mark.parametrize(
    ("start", "seconds", "message"),
    [
        (("/nowhere/python",), 20.0, r"cannot start a process that grades answers .*No such file.*: /nowhere/python"),
        (command("raise SystemExit(1)"), 20.0, r"cannot start a process that grades answers \(it ended at once\); see"),
        (command("import time; time.sleep(60)"), 0.5, r"cannot start .* \(nothing within 0.5 seconds\)"),
        (
            command("print('\"ModuleNotFoundError: math_verify\"')"),
            20.0,
            r"cannot start .*ModuleNotFoundError: math_verify",
        ),
    ],
)
def test_a_worker_that_cannot_start_is_an_error(start: tuple[str, ...], seconds: float, message: str) -> None:
    pool = GradingPool(command=start, start_seconds=seconds)
    for _ in range(3):  # not the number of workers that may run is used up
        with pytest.raises(GradingError, match=message):
            pool.same_value(*EQUAL)
    assert not pool._alive


def test_a_worker_says_why_it_cannot_work(tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('broken')")
    run = subprocess.run(
        [sys.executable, "-P", str(ROOT / "envs" / "tasks" / "grading_worker.py"), "1", "1"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.stdout == '"ImportError: broken"\n'


def test_a_comparison_whose_worker_dies_is_tried_in_a_new_one(pool: GradingPool) -> None:
    assert pool.same_value(*EQUAL)
    (worker,) = pool._alive
    worker._process.kill()
    worker._process.wait()
    assert pool.same_value(*EQUAL)
    assert worker not in pool._alive


def test_an_answer_two_workers_die_of_is_wrong_and_told(caplog: pytest.LogCaptureFixture) -> None:
    pool = GradingPool(command=command("print('\"ready\"', flush=True); input()"))
    assert not pool.same_value("18", "x + 1")
    assert "two processes died while they compared the answer 'x + 1' with '18'" in caplog.text
    assert not pool._alive


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="no timers")
def test_an_interrupted_comparison_leaves_no_verdict_to_the_next(pool: GradingPool) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    assert pool.same_value(*EQUAL)
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        with pytest.raises(KeyboardInterrupt):
            pool.same_value("18", ENDLESS[2])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not pool._alive
    assert pool.same_value(*EQUAL)


@pytest.mark.parametrize("limits", [{"seconds": 0}, {"workers": 0}, {"start_seconds": -1}])
def test_limits_are_positive(limits: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        GradingPool(**limits)


# --- what never leaves the process ------------------------------------------------------------------------------------

NUMBERS = (
    "72",
    "-72",
    "+72",
    "072",
    "72.0",
    "72.50",
    "72.5",
    "1,072",
    "1072",
    "1,072.00",
    "145/2",
    "3/4",
    "0.75",
    "6/8",
    "0",
)


def test_equal_spellings_and_plain_numbers_start_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(math_answers, "GRADING_POOL", None)
    same_value.cache_clear()
    assert same_value("x^2 + 9^{99999}", "x^2 + 9^{99999}")
    for gold in NUMBERS:
        for answer in NUMBERS:
            assert same_value(gold, answer) == (read_quantity(gold) == read_quantity(answer))
    assert not same_value("1/3", "0.3333")


def test_plain_numbers_are_compared_as_math_verify_compares_them() -> None:
    pool = GradingPool()
    for gold in NUMBERS[::2]:
        for answer in NUMBERS:
            assert pool.same_value(gold, answer) == (read_quantity(gold) == read_quantity(answer)), (gold, answer)
    pool.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "1,07",
        "1/0",
        "1/0.5",
        "--1",
        "٣",
        "9" * 5000,
        "0.1234567",
        "5x",
        "5 x",
        "72 or 73",
        "72, 73",
        "(72)",
        "x = 5, y = 6",
        "x = 5 or x = 6",
        "72 and 73",
        "5 - 3",
        "8 * 9",
        "12:30",
        "2 hours and 30 minutes",
        "5 plus 2",
        "5 squared",
        "7 thirds",
        "2^3",
        "5!",
        "3 4",
        "1/2/3",
        "72 + c",
        "72, x",
        "5 feet 6 inches",
        "5 pi",
        "-",
        "$",
    ],
)
def test_what_may_be_something_else_is_not_read_as_a_number(text: str) -> None:
    assert read_quantity(text) is None
