"""Bars at a terminal, lines in a log."""

import io
import time

import pytest

from envs.progress import ProgressBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr("envs.progress.SECONDS", 0.05)


def steps(file, count=20, pause=0.01, **kwargs):
    with ProgressBar(total=count, desc="shards", file=file, mininterval=0.001, **kwargs) as progress:
        for step in range(count):
            time.sleep(pause)
            progress.update()
            progress.set_postfix(loss=step)
    return file.getvalue()


def test_in_a_log_a_bar_is_a_line_now_and_then():
    written = steps(io.StringIO())
    assert "\r" not in written
    lines = written.splitlines()
    assert 2 <= len(lines) <= 6, written
    assert all(line.startswith("shards") and "loss=" in line for line in lines)
    assert lines[-1].startswith("shards: 100%")


def test_a_bar_that_is_soon_done_or_not_left_standing_ends_without_a_line():
    assert steps(io.StringIO(), count=3, pause=0) == ""
    assert steps(io.StringIO(), disable=True) == ""
    for leave, lines in ((False, 1), (True, 2)):
        file = io.StringIO()
        with ProgressBar(total=2, file=file, leave=leave) as progress:
            time.sleep(0.06)
            progress.update()  # the first line
            progress.update()  # too soon for another
        assert file.getvalue().count("\n") == lines


def test_at_a_terminal_a_bar_is_redrawn():
    written = steps(Terminal())
    assert written.count("\r") > 5
    assert written.count("\n") == 1


def test_what_is_said_beside_a_bar_in_a_log_wipes_nothing():
    file = io.StringIO()
    with ProgressBar(total=2, file=file) as progress:
        ProgressBar.write("a shard is damaged", file=file)
        progress.update()
    assert file.getvalue() == "a shard is damaged\n"
