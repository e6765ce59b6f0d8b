"""Files that are whole, manifests that are checked or written, and clocks that last over interruptions."""

import json
import os
import re
import subprocess
import sys

import pytest

import envs.storage
from envs.storage import keep_manifest, write_tensors, write_text, write_whole
from experiments.common.timing import lasting_clock


def test_a_manifest_is_written_once_and_checked_afterwards(tmp_path):
    path = tmp_path / "made" / "manifest.json"
    assert keep_manifest(path, {"task": "sums", "examples": 3}) == {"task": "sums", "examples": 3}
    written = path.read_text()
    assert json.loads(written) == {"task": "sums", "examples": 3}
    assert keep_manifest(path, {"examples": 3, "task": "sums"}) == {"task": "sums", "examples": 3}
    with pytest.raises(ValueError, match=rf"{path} was made with examples 3, this run has 4"):
        keep_manifest(path, {"task": "sums", "examples": 4})
    with pytest.raises(ValueError, match="answers was made with seed None, this run has 0"):
        keep_manifest(path, {"task": "sums", "examples": 3, "seed": 0}, place=tmp_path / "answers")
    assert path.read_text() == written


def test_what_a_manifest_holds_besides_is_made_once_and_not_compared(tmp_path):
    path, made = tmp_path / "manifest.json", []

    def thresholds():
        made.append(len(made))
        return {"thresholds": made[-1]}

    for _ in range(2):
        assert keep_manifest(path, {"task": "sums"}, made_once=thresholds) == {"task": "sums", "thresholds": 0}
    assert made == [0]
    with pytest.raises(ValueError, match="task"):
        keep_manifest(path, {"task": "stories"}, made_once=thresholds)


def test_a_clock_counts_the_seconds_of_runs_that_were_interrupted(tmp_path):
    path = tmp_path / "seconds.json"
    path.write_text("100.0\n")

    def interrupted():
        with lasting_clock(path) as seconds:
            assert 100 <= seconds() < 200
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert 100 < json.loads(path.read_text()) < 200


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    path = tmp_path / "file.txt"

    def slowly(partial):
        partial.write_text("first, ")
        write_text(path, "second")
        with partial.open("a") as file:
            file.write("whole")

    write_whole(path, slowly)
    assert path.read_text() == "first, whole"
    assert [one.name for one in tmp_path.iterdir()] == ["file.txt"]


def test_what_a_killed_writer_left_is_cleared_away_and_a_living_ones_is_not(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = [tmp_path / f"file.txt.{envs.storage._HOST}-{pid}-0a1b.partial" for pid in (gone.pid, os.getpid())]
    elsewhere = tmp_path / "file.txt.another_host-1-0a1b.partial"
    for partial in (*left, elsewhere):
        partial.write_text("half")
    write_text(tmp_path / "file.txt", "whole")
    assert not left[0].exists()
    assert left[1].exists()
    assert elsewhere.exists()


def test_a_write_that_fails_names_its_file(tmp_path, monkeypatch):
    def full(partial):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    path = tmp_path / "summary.json"
    with pytest.raises(OSError, match=rf"No space left on device: '{re.escape(str(path))}'"):
        write_whole(path, full)

    def broken(*args, **kwargs):
        raise envs.storage.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr("envs.storage.save_file", broken)
    with pytest.raises(OSError, match=rf"{re.escape(str(path))} cannot be written: .*No space left"):
        write_tensors(path, {})
    assert list(tmp_path.iterdir()) == []
