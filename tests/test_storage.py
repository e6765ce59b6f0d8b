"""Manifests that are checked or written, and clocks that last over interruptions."""

import json

import pytest

from envs.storage import keep_manifest
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
