"""The jobs of a multirun: each has a record, what is lost is named with its command, and no report averages over holes.
Shards of a collection: the same bytes in however many processes."""

import json
import random
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf
from safetensors.torch import load_file

from agents.citer import Citer
from agents.common.rollout import Scheduling
from agents.distillation import OracleDistillation
from agents.oracle import Oracle
from agents.preferences.store import Share
from experiments.common import multirun as multirun_of_jobs
from experiments.common.config import CONF, build, build_settings
from experiments.common.multirun import EXTRAS, JOBS, Job, jobs_of, missing_extra, own, shard_folder, with_launcher
from experiments.common.program import program
from experiments.evaluation.kept import kept_below
from experiments.evaluation.merge import gather
from experiments.evaluation.settings import EvaluationSettings
from experiments.evaluation.shards import check as check_shards
from tests.programs import call, composed
from tests.test_labels import Odd
from tests.test_preferences import contents
from tests.test_sweeps import ppo

# -- launchers --------------------------------------------------------------------------------------------------------


def test_a_launcher_that_is_not_installed_names_its_extra():
    said = missing_extra(MissingConfigException("no", missing_cfg_file="hydra/launcher/submitit_slurm"))
    assert "'submitit_slurm' is not installed" in said
    assert "citer-gym[slurm]" in said
    assert missing_extra(MissingConfigException("no", missing_cfg_file="launcher/moon")) is None
    assert missing_extra(ValueError("no")) is None
    extras = (CONF.parent / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in extras for extra in EXTRAS.values())


@pytest.mark.skipif(find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_its_launcher_names_the_extra_before_anything_runs(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        call("train", "-m", "launcher=ray", "agent=entropy", f"hydra.sweep.dir={tmp_path / 'there'}")
    assert ended.value.code == 1
    assert "pip install 'citer-gym[ray]'" in capsys.readouterr().err
    assert not (tmp_path / "there").exists()


def test_without_joblib_programs_that_would_take_its_launcher_take_the_basic_one(monkeypatch):
    assert with_launcher("demo", ["--cfg", "job"]) == ["--cfg", "job"]

    def without_the_namespace(name):
        if "." in name:  # as it does where the parent is no package
            raise ModuleNotFoundError(name)

    monkeypatch.setattr(multirun_of_jobs, "find_spec", without_the_namespace)
    for program_name in ("demo", "leaderboard"):
        assert with_launcher(program_name, ["seed=1", "--cfg", "job"]) == ["launcher=basic", "seed=1", "--cfg", "job"]
        assert with_launcher(program_name, ["launcher=joblib"]) == ["launcher=joblib"]
    assert with_launcher("train", ["seed=1"]) == ["seed=1"]


# -- records of jobs --------------------------------------------------------------------------------------------------


@pytest.fixture
def multirun(tmp_path, monkeypatch, capsys):
    """Starts a multirun of a program that fails for the seeds in `bad`; what it printed, its exit code, seeds made."""

    def start(*arguments, bad=()):
        made = []

        @program("train")
        def job(config, folder, begin):
            if config.seed in bad:
                raise bad[config.seed]
            begin()
            made.append(config.seed)

        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train", "-m", "agent=entropy", *arguments, f"hydra.sweep.dir={tmp_path}"])
        try:
            job()
            code = 0
        except SystemExit as ended:
            code = ended.code
        return capsys.readouterr().err, code, made

    return start


def test_jobs_that_fail_do_not_stop_the_others_and_are_named_with_their_commands(multirun, tmp_path, monkeypatch):
    said, code, made = multirun("seed=0,1,2", bad={0: ValueError("too small"), 1: RuntimeError("a bug")})
    assert code == 2
    assert made == [2]
    assert "2 of 3 jobs are not done" in said
    assert f"{tmp_path / 'entropy-seed0'} failed: too small" in said
    assert f"{tmp_path / 'entropy-seed1'} failed: RuntimeError: a bug" in said
    assert {job.folder: job.state for job in jobs_of(tmp_path)} == {
        "entropy-seed0": "failed", "entropy-seed1": "failed", "entropy-seed2": "done",
    }  # fmt: skip
    # the command of one makes it where it belongs, as a run of its own
    (line,) = [line for line in said.splitlines() if line.startswith("  python") and "seed=0" in line]
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "experiments.train"]
    assert {"agent=entropy", "seed=0", "hydra.mode=RUN", f"hydra.run.dir={tmp_path / 'entropy-seed0'}"} <= {*words[3:]}
    said, code, made = multirun("seed=0,1,2", "threads=1")
    assert (code, made) == (0, [0, 1, 2])
    assert "not done" not in said
    # how it is launched, and on how many threads, makes no other job of it
    assert {job.state for job in jobs_of(tmp_path)} == {"done"}
    assert len(jobs_of(tmp_path)) == 3


def test_a_multirun_that_does_not_compose_leaves_no_jobs_behind(multirun, tmp_path):
    _, code, made = multirun("seed=0,1", "agent.nothing=1")
    assert (code, made) == (1, [])
    assert jobs_of(tmp_path) == []


def test_how_a_job_is_launched_is_no_part_of_it():
    given = ("agent=citer", "launcher=ray", "threads=2", "seed=1")
    assert own(given) == ("agent=citer", "threads=2", "seed=1")
    assert Job("train", own(given)).name == Job("train", ("agent=citer", "seed=1")).name
    assert Job("train", ("seed=1",)).name != Job("train", ("seed=2",)).name


def test_a_report_refuses_holes_and_names_them(tmp_path, capsys):
    for seed in (0, 1):
        ppo(tmp_path, 0.02, seed)
    begun = {f"ppo-0.02-{seed}": ("agent=ppo", f"seed={seed}") for seed in (0, 1)}
    for folder, overrides in begun.items():
        Job("train", overrides, "done", folder).keep(tmp_path)
    assert len(gather(tmp_path, None).policies["ppo"]) == 2
    Job("train", ("agent=ppo", "seed=2")).keep(tmp_path)
    Job("train", ("agent=ppo", "seed=3"), "begun", "ppo-0.02-3").keep(tmp_path)
    with pytest.raises(ValueError, match=r"2 jobs are not there.*") as refused:
        gather(tmp_path, None)
    assert "agent=ppo seed=2" in f"{refused.value}"
    assert f"hydra.run.dir={tmp_path / 'ppo-0.02-3'}" in f"{refused.value}"
    assert len(gather(tmp_path, None, partial=True).policies["ppo"]) == 2
    assert "agent=ppo seed=2 is not there and left out" in capsys.readouterr().out
    Job("train", ("agent=ppo", "seed=2")).keep(tmp_path / "below")
    (tmp_path / JOBS / Job("train", ("agent=ppo", "seed=2")).name).write_text("{")
    with pytest.raises(ValueError, match="is no record of a job"):
        gather(tmp_path, None)


# -- shards -----------------------------------------------------------------------------------------------------------


def test_shards_are_numbered_and_have_folders_of_their_own():
    assert shard_folder(OmegaConf.create({"shards": 4, "shard": 3}), Path("run")) == Path("run/shards/3-of-4")
    assert shard_folder(OmegaConf.create({"shards": 4, "shard": None}), Path("run")) == Path("run")
    assert shard_folder(OmegaConf.create(), Path("run")) == Path("run")
    for shards, number in ((2, 2), (1, 1), (2, "a"), (0, None), (2, -1)):
        with pytest.raises(ValueError, match="shard"):
            shard_folder(OmegaConf.create({"shards": shards, "shard": number}), Path("run"))


SHARDED = {
    "citer": Citer(examples=5, shard_examples=1, scheduling=Scheduling(rows=16)),
    "llm": Citer(examples=5, shard_examples=1, scheduling=Scheduling(rows=16), references="llm"),
    "expert": OracleDistillation(examples=5, shard_examples=1, oracle=Oracle(budget=8), memory=2**24),
}


@pytest.mark.parametrize("name", ["citer", pytest.param("llm", marks=pytest.mark.slow), "expert"])
def test_a_collection_in_shards_is_that_of_one_process(name, pool, tmp_path):
    agent, task, rows = SHARDED[name], Odd(), []
    agent.collect(pool, task, 1, tmp_path / "whole", rows.append)
    whole = contents(tmp_path / "whole")
    for count in (1, 2, 5):
        folder, joined = tmp_path / f"{count}", []
        order = list(range(count))
        random.Random(count).shuffle(order)
        for number in order:
            store = agent.collect_share(pool, task, 1, folder, Share(number, count))
        assert store.missing() == []
        agent.collect(pool, task, 1, folder, joined.append)
        assert contents(folder) == whole, count
        assert joined == rows
    # one is lost and another damaged: whoever made them makes them again, and nothing else
    (folder / "shard-00001.json").unlink()
    (folder / "shard-00002.arrow").write_bytes(b"")
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("shard-0000[034].*")}
    agent.collect_share(pool, task, 1, folder, Share(1, 5))
    assert (store.missing(), store.check()) == ([], [2])
    agent.collect_share(pool, task, 1, folder, Share(2, 5))
    assert contents(folder) == whole
    assert kept == {path: path.stat().st_mtime_ns for path in kept}


def test_a_join_names_the_shards_that_are_missing(tmp_path, capsys):
    small = ["threads=1", "agent.examples=4", "agent.shard_examples=1", "agent.scheduling.rows=8"]
    with pytest.raises(SystemExit):
        call("collect", *small, "shards=3", f"hydra.run.dir={tmp_path}")
    assert "lacks 3 of 3 shards" in capsys.readouterr().out
    call("collect", *small, "shards=3", "shard=1", f"hydra.run.dir={tmp_path}")
    assert not (tmp_path / "summary.json").exists()
    with pytest.raises(SystemExit):
        call("collect", *small, "shards=3", f"hydra.run.dir={tmp_path}")
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m experiments.collect")
    ]
    assert len(lines) == 2
    for line in lines:  # what is named makes them; the last to be done joins all
        call("collect", *shlex.split(line)[3:])
    assert json.loads((tmp_path / "summary.json").read_text())["shards"] == 4
    rows = (tmp_path / "metrics.jsonl").read_text()
    call("collect", *small, f"hydra.run.dir={tmp_path / 'whole'}")
    assert contents(tmp_path / "preferences") == contents(tmp_path / "whole" / "preferences")
    assert rows == (tmp_path / "whole" / "metrics.jsonl").read_text()


EVALUATED = [
    "threads=1", "agents=[entropy,random]", "examples=7", "threshold_examples=3", "llm_shares=[0.1,0.3]", "bootstrap=5",
    "oracle_budget=4", "draft_tokens=4", "max_new_tokens=48", "transcripts=1", "traces=false",
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("timed", [False, True])
def test_an_evaluation_in_shards_is_that_of_one_process(timed, tmp_path, capsys):
    def evaluated(folder, *given):
        through = [] if timed else [f"tree={folder}.tree"]
        call("evaluate", *EVALUATED, *through, *given, f"hydra.run.dir={folder}")

    def answers(folder):
        found = {path.relative_to(folder): load_file(path) for path in (folder / "runs").rglob("*.safetensors")}
        return {path: {k: v.tolist() for k, v in one.items() if "seconds" not in k} for path, one in found.items()}

    evaluated(tmp_path / "whole")
    evaluated(tmp_path / "parted", "shards=3", "shard=2")
    with pytest.raises(SystemExit):
        evaluated(tmp_path / "parted", "shards=3")
    lines = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("  python -m experiments.evaluate")
    ]
    assert len(lines) == 2
    for line in lines:
        call("evaluate", *shlex.split(line)[3:])
    assert answers(tmp_path / "parted") == answers(tmp_path / "whole")
    if not timed:  # nothing measured is in it
        for name in ("results.jsonl", "table.md", "summary.json", "metrics.jsonl", "runs/manifest.json"):
            assert (tmp_path / "parted" / name).read_text() == (tmp_path / "whole" / name).read_text(), name
    # a report sees one evaluation, not its shards
    assert len(kept_below(tmp_path / "parted")) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["traces=true"], "traces=false"),
        (["traces=false", "cost=seconds"], "cost=seconds"),
        (["traces=false", "examples=1"], "2 shards of 1 problems"),
        (["traces=false", "+agent@agents.collm=collm"], "collm is to be trained"),
    ],
)
def test_shards_of_an_evaluation_that_cannot_be_put_together_are_refused(given, message):
    config = composed("evaluate", *given)
    agents = {name: build(config.agents, name) for name in config.agents}
    with pytest.raises(ValueError, match=message):
        check_shards(build_settings(config, EvaluationSettings), 2, agents)
