"""Threads that wait quietly, and machines that are not quiet."""

import os
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest

import experiments.common.quiet
from experiments.common.quiet import QuietWatch, disturbances

ROOT = Path(__file__).parents[1]
Times = namedtuple("Times", "user nice system idle iowait steal guest guest_nice")


@pytest.mark.parametrize(
    ("busy", "stolen", "uneven", "cores", "threads", "message"),
    [
        (0.1, 0.0, 1.1, 2, 2, None),
        (1.0, 0.0, 1.1, 2, 1, None),  # the other core
        (30.0, 0.0, 1.1, 64, 2, None),
        (1.0, 0.0, 1.1, 2, 2, "other processes kept 1.00 of 2 cores busy, 2 threads were measured"),
        (63.0, 0.0, 1.1, 64, 2, "other processes kept 63.00 of 64 cores"),
        (0.0, 0.1, 1.1, 2, 2, "hypervisor took 10%"),
        (0.0, 0.0, 3.0, 2, 2, "took 3.0 times its fastest"),
    ],
)
def test_what_is_not_quiet_is_said(busy, stolen, uneven, cores, threads, message):
    why = disturbances(busy, stolen, uneven, cores, threads)
    assert len(why) == (message is not None)
    assert not why or message in why[0]


def test_what_others_take_counts_and_what_is_ones_own_does_not(monkeypatch):
    room = experiments.common.quiet
    clock, own = [100.0], [10.0]
    times = [Times(50, 0, 5, 100, 0, 0, 0, 0)]
    monkeypatch.setattr(room.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(room, "_own_seconds", lambda: own[0])
    monkeypatch.setattr(room.psutil, "cpu_times", lambda: times[0])
    monkeypatch.setattr(room.psutil, "cpu_count", lambda: 2)
    monkeypatch.setattr(room.torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(room, "spin", lambda: 1.0)
    watch = QuietWatch()
    clock[0], own[0], times[0] = 110.0, 28.0, Times(66, 0, 7.5, 101.5, 0, 0, 3, 0)
    assert watch.report() == {"quiet": True, "why": []}, "18 of 18.5 seconds were its own"
    own[0] = 20.0
    report = watch.report()
    assert not report["quiet"]
    assert "0.85 of 2 cores" in report["why"][0]
    own[0], times[0] = 28.0, Times(66, 0, 7.5, 99.5, 0, 2, 0, 0)
    assert "hypervisor took 10%" in watch.report()["why"][0]


def test_a_busy_neighbour_is_seen(monkeypatch):
    """The same counters, on this machine: a process that computes beside this one is more than none."""
    monkeypatch.setattr(experiments.common.quiet, "SPARE", -1e9)  # so that the share of others is always named
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        watch = QuietWatch()
        begun = os.times()
        while os.times().user - begun.user < 0.5:
            sum(range(10_000))
        why = watch.report()["why"]
    finally:
        neighbour.kill()
        neighbour.wait()
    assert float(why[0].split("kept ")[1].split(" ")[0]) > 0.1


def test_programs_wait_quietly_unless_they_are_told_otherwise():
    # what sets it runs before torch is loaded, which reads it then
    program = "import os, sys, experiments; assert 'torch' not in sys.modules; print(os.environ['OMP_WAIT_POLICY'])"
    clean = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for environment, expected in ((clean, "PASSIVE"), (clean | {"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert done.stdout.strip() == expected, done.stderr
