"""One writer at a time, and who it is."""

import errno
import logging
import os
import platform
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from agents.common.rollout import Scheduling
from agents.heuristics import Random
from envs.prefix_tree.tree import PrefixTree
from experiments.common.locks import InUseError, one_at_a_time, one_of, only_writer
from experiments.evaluation.runner import evaluate
from experiments.evaluation.settings import EvaluationSettings

ROOT = Path(__file__).parent.parent


def test_who_holds_a_folder_is_named_and_what_was_let_go_is_free(tmp_path):
    holder = rf"process {os.getpid()} on {re.escape(platform.node())}, since 20"
    with only_writer(tmp_path), pytest.raises(InUseError, match=holder), only_writer(tmp_path):
        pass
    with only_writer(tmp_path):
        pass


def test_a_process_that_is_killed_leaves_no_lock(tmp_path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom experiments.common.locks import only_writer\n"
        "with only_writer(Path(sys.argv[1])):\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout.readline() == b"held\n"
    with pytest.raises(InUseError, match=f"process {holder.pid} "), only_writer(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with only_writer(tmp_path):
        pass


def test_a_file_system_without_locks_is_said_and_used(tmp_path, monkeypatch, caplog):
    def none(self, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("filelock.BaseFileLock.acquire", none)
    with only_writer(tmp_path):
        assert "has no locks" in caplog.text


def test_who_shares_a_file_waits_for_the_other(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    order, held = [], threading.Event()

    def first():
        with one_at_a_time(tmp_path / "some.tree"):
            held.set()
            time.sleep(0.5)
            order.append("first")

    with ThreadPoolExecutor(1) as threads:
        threads.submit(first)
        held.wait()
        with one_at_a_time(tmp_path / "some.tree"):
            order.append("second")
    assert order == ["first", "second"]
    assert f"waiting for process {os.getpid()}" in caplog.text


def test_of_several_files_each_holds_one_that_no_other_does(tmp_path):
    shared = tmp_path / "trees" / "*.tree"
    with one_of(shared) as first, one_of(shared) as second:
        assert [first.name, second.name] == ["0.tree", "1.tree"]
    with one_of(shared) as again, one_of(tmp_path / "one.tree") as only:
        assert [again.name, only.name] == ["0.tree", "one.tree"]


def test_evaluations_that_share_a_tree_lose_no_states(pool, task, tmp_path):
    path = tmp_path / "shared.tree"

    def evaluated(start):
        settings = EvaluationSettings(
            start=start, examples=3, threshold_examples=2, llm_shares=(0.5,), bootstrap=5, transcripts=0, oracle=0,
            max_new_tokens=48, draft_tokens=0, tree=path, tree_memory=2**27, scheduling=Scheduling(rows=4),
        )  # fmt: skip
        return evaluate(pool, task, {"random": Random()}, settings, tmp_path / f"run-{start}")

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(evaluated, (0, 3)))
    tree = PrefixTree(pool, task, 48, 2**27, path)
    assert all(tree.root(pool.encode(example.prompt)) >= 0 for example in task.examples("test", 6))
