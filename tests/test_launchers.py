"""Multiruns and shards on each launcher, whose processes are killed: nothing is lost, nothing double."""

import contextlib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import psutil
import pytest

from experiments.common.multirun import jobs_of
from tests.pages import ROOT
from tests.test_interruptions import EVALUATED, KILLS, promises
from tests.test_preferences import contents

pytestmark = pytest.mark.slow

OPTIONS = {
    "basic": (),
    "joblib": ("hydra.launcher.n_jobs=2",),
    "ray": ("+hydra.launcher.ray.init.num_cpus=2",),
    "slurm_local": (),
}
PLUGINS = {"joblib": "hydra-joblib-launcher", "ray": "hydra-ray-launcher", "slurm_local": "hydra-submitit-launcher"}
SMALL = ["threads=1", "agent.examples=20", "agent.shard_examples=3", "agent.scheduling.rows=24"]
STUDY = [
    "experiment=citer_vs_citer_s", "threads=1", "agent=citer,citer_s", "seed=0,1,2", "agent.examples=20",
    "agent.training.epochs=2", *EVALUATED, "evaluation.examples=6", "+hydra.callbacks.report.samples=20",
]  # fmt: skip
LIMIT = 500.0
"""Seconds after which a start hangs."""


@pytest.fixture(scope="module", autouse=True)
def token():
    """A token of these tests' own for their clusters of Ray, which keeps one in the user's home otherwise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
        yield


def launched_by(launcher):
    """The settings of a launcher; the test is skipped where it is not installed."""
    if launcher in PLUGINS:
        try:
            distribution(PLUGINS[launcher])
        except PackageNotFoundError:
            pytest.skip(f"{PLUGINS[launcher]} is an extra that is not installed here")
    return [f"launcher={launcher}", *OPTIONS[launcher]]


class Started:
    """A program in a session of its own, with what it prints in a file."""

    def __init__(self, script, *overrides, log):
        words = [sys.executable, "-m", f"experiments.{script}", *overrides]
        with log.open("a") as file:
            self.process = subprocess.Popen(
                words,
                cwd=ROOT,
                stdout=file,
                stderr=file,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.log = log

    def ended(self, seconds=LIMIT):
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def finish(self):
        code = self.ended()
        if code is None:
            self.kill_all()
        assert code == 0, self.log.read_text()[-4000:]

    def kill_all(self):
        """As when the machine goes down."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def kill_one(self, rng):
        """One of its processes, whichever."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            rng.choice([own, *own.children(recursive=True)]).kill()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What one process collects: its preferences, and its rows."""
    folder = tmp_path_factory.mktemp("whole")
    Started("collect", *SMALL, f"hydra.run.dir={folder}", log=folder / "log.txt").finish()
    return contents(folder / "preferences"), (folder / "metrics.jsonl").read_text()


def collected(folder):
    return contents(folder / "citer-seed0" / "preferences"), (folder / "citer-seed0" / "metrics.jsonl").read_text()


def sharded(count, folder):
    return ["-m", *SMALL, f"shards={count}", f"shard=range(0,{count})", f"hydra.sweep.dir={folder}"]


@pytest.mark.parametrize("launcher", OPTIONS)
def test_a_collection_has_the_same_bytes_in_however_many_shards(launcher, whole, tmp_path):
    launching = launched_by(launcher)
    for count in (1, 2, 5):
        folder = tmp_path / f"{count}"
        Started("collect", *sharded(count, folder), *launching, log=tmp_path / "log.txt").finish()
        assert collected(folder) == whole, count
        assert [job.state for job in jobs_of(folder)] == ["done"] * count


def at_work(folder):
    """The processes that work on jobs of a multirun now."""
    pids = set()
    for job in jobs_of(folder):
        place = folder / job.place / ".lock" if job.state == "begun" else None
        if place is not None and place.is_file() and place.read_text():
            pids.add(json.loads(place.read_text())["pid"])
    return sorted(pid for pid in pids if psutil.pid_exists(pid))


@pytest.mark.parametrize("launcher", OPTIONS)
def test_a_study_of_which_three_jobs_were_killed_is_the_same_table(launcher, tmp_path):
    launching = launched_by(launcher)
    log, folder, rng = tmp_path / "log.txt", tmp_path / "cut", random.Random(19)
    Started("train", "-m", *STUDY, f"hydra.sweep.dir={tmp_path / 'whole'}", log=log).finish()
    killed, code, begun = 0, None, time.monotonic()
    while code != 0:
        assert time.monotonic() - begun < 3 * LIMIT, log.read_text()[-4000:]
        start = Started("train", "-m", *STUDY, *launching, f"hydra.sweep.dir={folder}", log=log)
        while killed < 3 and start.ended(rng.uniform(0.1, 2)) is None:
            if working := at_work(folder):
                os.kill(rng.choice(working), signal.SIGKILL)
                killed += 1
        code = start.ended()
        if code != 0:
            said = log.read_text()
            # a process that is gone altogether says nothing; one that lost a job names it
            assert code == -signal.SIGKILL or "jobs are not done" in said, said[-4000:]
    assert killed == 3
    there, here = (json.loads((place / "summary.json").read_text()) for place in (tmp_path / "whole", folder))
    assert promises(here) == promises(there)
    assert len((folder / "table.md").read_text().splitlines()) == len(
        (tmp_path / "whole" / "table.md").read_text().splitlines()
    )
    assert [job.state for job in jobs_of(folder)] == ["done"] * 6


def test_killed_shards_lose_nothing_and_make_nothing_twice(whole, tmp_path):
    launching, rng, left, cycle = launched_by("joblib"), random.Random(20), KILLS, 0
    begun = time.monotonic()
    Started("collect", *sharded(3, tmp_path / "timed"), *launching, log=tmp_path / "log.txt").finish()
    seconds = time.monotonic() - begun
    while left:
        folder, cycle, code = tmp_path / f"{cycle}", cycle + 1, None
        while code != 0:
            start = Started("collect", *sharded(3, folder), *launching, log=tmp_path / "log.txt")
            if left and start.ended(rng.uniform(0, seconds)) is None:
                left -= 1
                if rng.random() < 0.5:
                    start.kill_all()
                else:
                    start.kill_one(rng)
            code = start.ended()
            start.kill_all()  # what a process that was killed has left behind
        assert collected(folder) == whole, folder
    print(f"{KILLS} kills, {cycle} collections of {seconds:.1f} s")


@pytest.fixture
def cluster(tmp_path):
    """A cluster of Ray that is there before, of two cores; its address."""
    launched_by("ray")
    log, folder = tmp_path / "cluster.txt", f"/tmp/ray-{os.getpid()}"  # a socket's path must be short
    words = [Path(sys.executable).with_name("ray"), "start", "--head", "--num-cpus=2", "--port=0", "--block"]
    words += ["--include-dashboard=false", "--disable-usage-stats"]
    with log.open("w") as file:
        head = subprocess.Popen(words, stdout=file, stderr=file, env={**os.environ, "RAY_TMPDIR": folder})
    try:
        while not (address := re.search(r"--address='([^']+)'", log.read_text())):
            assert head.poll() is None, log.read_text()
            time.sleep(0.2)
        yield address[1]
    finally:
        # not `ray stop`, which ends whatever of Ray there is on this machine
        for process in [*psutil.Process(head.pid).children(recursive=True), head]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        head.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cluster_that_is_there_is_joined_and_a_killed_worker_is_made_up_for(cluster, whole, tmp_path):
    joining = ["launcher=ray", f"hydra.launcher.ray.init.address={cluster}"]
    start = Started("collect", *sharded(3, tmp_path / "there"), *joining, log=tmp_path / "log.txt")
    while not (working := at_work(tmp_path / "there")):
        assert start.ended(0.05) is None, (tmp_path / "log.txt").read_text()[-4000:]
    os.kill(working[0], signal.SIGKILL)
    start.finish()
    assert collected(tmp_path / "there") == whole
