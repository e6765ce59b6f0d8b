"""Runs on launchers: what is done is taken in at once, what fails is named, one that reads a file waits for it."""

import os
import threading
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from experiments.training import launching
from experiments.training.launching import MakeRun, make_all
from experiments.training.many import FAILED, Run
from experiments.training.run import SUMMARY
from tests.programs import call


def runs_in(folder, *names):
    return [Run(name, 0, (), folder / name, folder / "shared") for name in names]


def finish(run):
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / SUMMARY).write_text("{}")


def test_each_run_is_taken_in_when_it_is_done_and_the_first_is_made_alone(monkeypatch, tmp_path):
    runs, launched, taken = runs_in(tmp_path, "a", "b", "c"), [], []

    def launch(some, folder):
        launched.append([run.agent for run in some])
        for run in some:
            finish(run)
            begun = time.monotonic()
            while run.agent not in taken and time.monotonic() - begun < 60:  # though the launcher has not returned
                time.sleep(0.01)
            assert taken[-1] == run.agent

    monkeypatch.setattr(launching, "_launch", launch)
    monkeypatch.setattr(launching, "PATIENCE", 0.01)
    make_all(runs, tmp_path, lambda run: taken.append(run.agent))
    assert launched == [["a"], ["b", "c"]]
    make_all(runs, tmp_path)  # nothing is left
    (runs[1].folder / SUMMARY).unlink()
    make_all(runs, tmp_path, lambda run: taken.append(run.agent))
    assert launched[2:] == [["b"]]
    assert taken == ["a", "b", "c", "b"]


def test_what_failed_is_named_and_what_a_launcher_lost(monkeypatch, tmp_path):
    runs = runs_in(tmp_path, "bad", "good", "lost")

    def launch(some, folder):
        for run in some:
            if run.agent == "bad":
                run.folder.mkdir(parents=True, exist_ok=True)
                (run.folder / FAILED).write_text("ValueError: no room\n")
            if run.agent == "good":
                finish(run)
            if run.agent == "lost":
                raise RuntimeError("a worker is gone\nand more")

    monkeypatch.setattr(launching, "_launch", launch)
    with pytest.raises(ValueError, match=r"2 runs failed") as refused:
        make_all(runs, tmp_path)
    bad, lost = f"{refused.value}".splitlines()[1:]
    assert bad.startswith("  bad with seed 0 (")
    assert bad.endswith("log.txt): ValueError: no room")
    assert lost.startswith("  lost with seed 0 (")
    assert lost.endswith("log.txt): RuntimeError: a worker is gone")
    # started again, what was said before is forgotten
    monkeypatch.setattr(launching, "_launch", lambda some, folder: [finish(run) for run in some])
    make_all(runs, tmp_path)
    assert not (runs[0].folder / FAILED).exists()


def test_what_goes_wrong_where_runs_are_taken_in_is_raised(monkeypatch, tmp_path):
    def refuse(run):
        raise ValueError("beside another baseline")

    monkeypatch.setattr(launching, "_launch", lambda some, folder: [finish(run) for run in some])
    with pytest.raises(ValueError, match="beside another baseline"):
        make_all(runs_in(tmp_path, "a"), tmp_path, refuse)


@pytest.mark.parametrize("there", ["file", "done", "failed"])
def test_a_run_waits_for_the_file_that_it_reads_or_the_end_of_its_maker(there, monkeypatch, tmp_path):
    maker, waiter, file = tmp_path / "maker", tmp_path / "waiter", tmp_path / "maker" / "file"
    made = []
    about = OmegaConf.create({"runtime": {"output_dir": f"{waiter}", "choices": {"agent": "citer"}}})
    monkeypatch.setattr(launching.HydraConfig, "get", lambda: about)
    monkeypatch.setattr(launching, "make_as_configured", lambda *some: made.append(some))
    monkeypatch.setattr(launching, "PATIENCE", 0.01)
    thread = threading.Thread(target=MakeRun(Path.cwd(), os.getpid(), {waiter: (file, maker)}), args=["config"])
    thread.start()
    time.sleep(0.1)
    assert not made
    maker.mkdir()
    (maker / {"file": "file", "done": SUMMARY, "failed": FAILED}[there]).touch()
    thread.join(60)
    assert made == [("config", waiter, "citer")]


def test_a_leaderboard_in_this_process_names_the_run_that_fails_and_keeps_the_others(tmp_path, capsys):
    quick = ["examples=4", "oracle_budget=0", "draft_tokens=0", "threshold_examples=4", "llm_shares=[0.2]", "refine=0"]
    quick = ",".join(f'"evaluation.{setting}"' for setting in quick)
    with pytest.raises(SystemExit) as ended:
        call(
            "leaderboard", "launcher=basic", "agents=[citer_s,random]", "first=citer_s", "seeds=[0]",
            '+departures.citer_s=["agent.preferences=nowhere"]', f'train=["experiment=benchmark",{quick}]',
            f"hydra.run.dir={tmp_path / 'its'}",
        )  # fmt: skip
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert "citer_s with seed 0" in said.out + said.err
    assert "nowhere" in said.out + said.err
    done = tmp_path / "its" / "runs" / "random-seed0" / "summary.json"
    assert done.is_file()
    assert [path.name for path in (tmp_path / "its" / "shared").glob("*.tree")] == ["0.tree"]
