"""Multiruns over any setting: a folder for every job, and one report that tells settings apart."""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import experiments.evaluation.report
import experiments.train
import experiments.training.run as training
from agents.common.policy import Learner
from agents.common.rollout import decode_alone
from agents.heuristics import Uncertainty
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.costs import ALL_COSTS
from envs.models.pool import models_manifest
from experiments.common.config import CONF, register_schemas
from experiments.common.job_names import LONGEST, folder_name
from experiments.common.program import program
from experiments.common.tracking import Tracker
from experiments.evaluate import listed_agents
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.kept import told_apart
from experiments.evaluation.merge import gather, report
from experiments.evaluation.summary import summarize
from experiments.report import main as report_main

EXAMPLES = 40


@pytest.fixture(autouse=True)
def logging_as_before():
    """Programs set up the log of their process, here that of all tests."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:], root.level = handlers, level


def config_of(script, *overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose(script, overrides=list(overrides))


def jobs_of(name, monkeypatch, *arguments):
    """Runs a multirun of a program that only says which folders it was given; their names."""
    folders = []

    @program(name)
    def job(config, folder, *rest):
        folders.append(folder)

    GlobalHydra.instance().clear()
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    job()
    return [folder.name for folder in folders]


def test_names_say_what_differs_and_never_collide():
    assert folder_name("citer", {}, 0) == "citer-seed0"
    assert folder_name("ppo", {"agent.cost_weight": "0.02"}, 3) == "ppo-cost_weight-0.02-seed3"
    assert folder_name("ppo", {"task.level": "hard", "agent.lr": "1e-05"}, 0) == "ppo-lr-1e-05-task.level-hard-seed0"
    values = ["a/b", "a_b", "a b", "[64,32]", "[64, 32]", "64_32", "-1", "1", "{a: 1}", "ü", "..", "x" * 200, "x" * 201]
    names = [folder_name("ppo", {"agent.units": value}, 0) for value in values]
    names += [folder_name("a" * 200, {}, seed) for seed in (0, 1)]
    assert len(set(names)) == len(names)
    for name in names:
        assert len(name) <= LONGEST
        assert "/" not in name
        assert name.isascii()
        # a folder can be named on a command line of Hydra's without quotes
        override = OverridesParser.create().parse_override(f"+saved.x=multirun/{name}/policy")
        assert override.value() == f"multirun/{name}/policy"
        assert not override.is_sweep_override()


@pytest.mark.parametrize(
    ("script", "sweep", "names"),
    [
        (
            "train",
            ["agent=ppo", "agent.cost_weight=0.02,0.1", "evaluate=true", "threads=1"],
            ["ppo-cost_weight-0.02-seed0", "ppo-cost_weight-0.1-seed0"],
        ),
        (
            "train",
            ["agent=citer", "agent.labels.case_3=rollout,llm", "seed=0,1", "agent.examples=20"],
            [f"citer-labels.case_3-{case}-seed{seed}" for case in ("rollout", "llm") for seed in (0, 1)],
        ),
        ("train", ["agent=citer,citer_s", "seed=1"], ["citer-seed1", "citer_s-seed1"]),
        (
            "train",
            ["experiment=citer_vs_citer_s", "seed=0", "agent=citer,citer_both"],
            ["citer-seed0", "citer_both-seed0"],
        ),
        ("collect", ["agent.rounds=1,2"], ["citer-rounds-1-seed0", "citer-rounds-2-seed0"]),
        ("evaluate", ["examples=5,6"], ["evaluate-examples-5-seed0", "evaluate-examples-6-seed0"]),
    ],
)
def test_every_job_of_a_multirun_has_a_folder_of_its_own(script, sweep, names, tmp_path, monkeypatch):
    assert jobs_of(script, monkeypatch, "-m", *sweep, f"hydra.sweep.dir={tmp_path}") == names


def answers(rng, accuracy, cost, timed=True):
    """Made up: one policy's answers at one threshold."""
    shape = (EXAMPLES,)
    units = [unit.name for unit in ALL_COSTS if timed or unit.reproducible]
    return Answers(
        correct=rng.random(shape) < accuracy,
        terminated=np.ones(shape, dtype=bool),
        llm_tokens=np.full(shape, 10 * cost),
        tokens=np.full(shape, 10.0),
        costs={unit: np.full(shape, cost) for unit in units},
    )


def evaluated(folder, policies, config, seed=0, timed=True, **manifest):
    """An evaluation as `experiments.train` leaves it; `policies`: accuracies at two thresholds."""
    runs = folder / "evaluation" / "runs"
    same = np.random.default_rng(0)
    slm, llm = answers(same, 0.3, 0.1, timed), answers(same, 0.95, 1.0, timed)
    Baselines(slm, llm, None, answers(same, 0.98, 0.15, timed), exhausted=3).save(runs)
    rng = np.random.default_rng(seed + 1)
    rows = []
    for name, points in policies.items():
        for number, (accuracy, cost) in enumerate(points):
            answers(rng, accuracy, cost, timed).save(runs / name / f"{number:02d}.safetensors")
            rows.append({"policy": name, "threshold": number, "seed": seed})
    about = {
        "task": "arithmetic",
        "pool": ["slm", "llm"],
        "split": "test",
        "max_new_tokens": 128,
        "start": 0,
        "models": [{"name": "slm", "fingerprint": "1"}, {"name": "llm", "fingerprint": "2"}],
        "examples": EXAMPLES,
        "oracle": 300,
        "draft_tokens": 0,
        "thresholds_at": {"llm_shares": [0.1, 0.3], "examples": 4},
        "timed": timed,
        "policies": dict.fromkeys(policies, "fingerprint"),
        "thresholds": {name: list(range(len(points))) for name, points in policies.items()},
        "trained": list(policies),
        "seed": seed,
    }
    (runs / "manifest.json").write_text(json.dumps({**about, **manifest}))
    (folder / "evaluation" / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = {"agent": {}, "task": {"level": "default"}, "models": {"names": ["slm", "llm"]}, "evaluate": True}
    OmegaConf.save(OmegaConf.create({**whole, **config}), folder / "config.yaml")


def ppo(folder, cost_weight, seed, points=((0.8, 0.3), (0.9, 0.5)), **manifest):
    agent = {"cost_weight": cost_weight, "arguments": {"clip_range": 0.1}, "seed": seed}
    evaluated(folder / f"ppo-{cost_weight}-{seed}", {"ppo": points}, {"agent": agent}, seed, **manifest)


@pytest.fixture
def sweep(tmp_path):
    """Three cost weights with two seeds each; the dearer ones are better, the middle one is beaten by both."""
    for seed in (0, 1):
        ppo(tmp_path, 0.02, seed, ((0.97, 0.6), (0.97, 0.7)))
        ppo(tmp_path, 0.5, seed, ((0.4, 0.65), (0.4, 0.75)))
        ppo(tmp_path, 10.0, seed, ((0.7, 0.2), (0.7, 0.3)))
    evaluated(tmp_path / "entropy", {"entropy": ((0.6, 0.3), (0.7, 0.6))}, {"agent": {"measure": "entropy"}})
    return tmp_path


def test_a_report_tells_settings_apart_and_draws_their_front(sweep, capsys):
    out = sweep / "there" / "report"
    report_main([str(sweep), "--out", str(out), "--bootstrap", "10", "--first", "entropy"])
    summary = json.loads((out / "summary.json").read_text())
    names = ["ppo cost_weight=0.02", "ppo cost_weight=0.5", "ppo cost_weight=10.0"]
    assert list(summary["policies"]) == ["entropy", *names]
    assert [policy["seeds"] for policy in summary["policies"].values()] == [1, 2, 2, 2]
    front = summary["fronts"]["ppo"]
    assert front["settings"] == names
    assert front["on_front"] == [names[0], names[2]]
    assert front["seeds"] == 2
    for name in names:
        for level, cost in summary["policies"][name]["cost_at"].items():
            assert front["cost_at"][level] <= cost
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert {(row["policy"], row["seed"]) for row in rows} == {
        ("entropy", 0),
        *((name, seed) for name in names for seed in (0, 1)),
    }
    table = (out / "table.md").read_text()
    assert "ppo, front of 3 (2)" in table
    assert "On the front of ppo: ppo cost_weight=0.02; ppo cost_weight=10.0." in table
    assert "ran out of its budget on 3 of 40 problems" in table
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert not (sweep / "summary.json").exists()
    printed = capsys.readouterr().out.split("On the front of")[0].splitlines()
    assert max(map(len, printed)) <= 100
    assert any(line.startswith("ppo cost_weight=0.02 (2) ") for line in printed)


def test_the_first_may_be_an_agent_of_several_settings(sweep):
    assert gather(sweep, "ppo").first == "ppo cost_weight=0.02"
    assert gather(sweep, "ppo cost_weight=10.0").first == "ppo cost_weight=10.0"
    with pytest.raises(ValueError, match=r"no policy 'dqn'.*ppo cost_weight=0\.5"):
        gather(sweep, "dqn")


def test_without_several_settings_names_are_plain_and_there_is_no_front(tmp_path):
    for seed in (0, 1):
        ppo(tmp_path, 0.02, seed)
    summary = summarize(gather(tmp_path), samples=5)
    assert list(summary["policies"]) == ["ppo"]
    assert summary["policies"]["ppo"]["seeds"] == 2
    assert "fronts" not in summary


def test_seeds_of_agents_are_no_settings_and_unknown_ones_are_not_told():
    assert told_apart([{"seed": 0, "x": 1}, {"seed": 1, "x": 1}], [0, 1]) == [{}, {}]
    assert told_apart([{"seed": 5}, {"seed": 6}], [0, 0]) == [{"seed": 5}, {"seed": 6}]
    assert told_apart([{"x": True}, {"x": False}], [1, 0]) == [{"x": True}, {"x": False}]
    assert told_apart([{"x": 1}, {"x": 1, "y": 2}], [0, 0]) == [{}, {"y": 2}]
    assert told_apart([{"x": 1}, {}], [0, 1]) == [{}, {}]
    # a setting that came later, where another tells these runs apart, and where none does
    assert told_apart([{"x": 1}, {"x": 2, "y": 2}], [0, 0]) == [{"x": 1}, {"x": 2}]
    assert told_apart([{"x": 1}, {"x": 2, "y": 2}, {"x": 2, "y": 3}], [0] * 3) == [
        {"x": 1},
        {"x": 2, "y": 2},
        {"x": 2, "y": 3},
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"thresholds_at": {"llm_shares": [0.2], "examples": 4}}, "thresholds_at"),
        ({"examples": 39}, "examples 40 and 39"),
        ({"models": []}, "models"),
        ({"task": "math"}, "task arithmetic and math"),
        ({"oracle": 20}, "oracle 300 and 20"),
    ],
)
def test_what_is_not_of_one_experiment_is_not_merged(changed, message, tmp_path):
    ppo(tmp_path, 0.02, 0)
    ppo(tmp_path, 0.05, 0, **changed)
    with pytest.raises(ValueError, match=f"not of one experiment: {message}"):
        gather(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"task": {"level": "hard"}}, "settings of the task"),
        ({"models": {"names": ["slm", "llm"], "dtype": "bfloat16"}}, "settings of the models"),
        ({"agent": None, "agents": {"ppo": {}}}, "program experiments.train and experiments.evaluate"),
    ],
)
def test_other_tasks_models_and_programs_are_not_merged(config, message, tmp_path):
    ppo(tmp_path, 0.02, 0)
    evaluated(tmp_path / "z", {"margin": ((0.6, 0.3),)}, {"agent": {"measure": "margin"}, **config})
    if config.get("agent", 0) is None:
        kept = OmegaConf.load(tmp_path / "z" / "config.yaml")
        del kept["agent"]
        OmegaConf.save(kept, tmp_path / "z" / "config.yaml")
    with pytest.raises(ValueError, match=f"not of one experiment: {message}"):
        gather(tmp_path)


def test_the_same_run_twice_is_refused(tmp_path):
    ppo(tmp_path / "one", 0.02, 0)
    ppo(tmp_path / "other", 0.02, 0)
    with pytest.raises(ValueError, match="ppo with seed 0 is there twice"):
        gather(tmp_path)


def test_unfinished_runs_are_named_and_can_be_left_out(sweep, capsys):
    (sweep / "waiting").mkdir()
    OmegaConf.save(OmegaConf.create({"agent": {}, "evaluate": True}), sweep / "waiting" / "config.yaml")
    with pytest.raises(ValueError, match=r"not evaluated yet: .*waiting; .*--partial"):
        gather(sweep)
    (sweep / "ppo-0.5-1" / "evaluation" / "runs" / "ppo" / "01.safetensors").unlink()
    assert [len(seeds) for seeds in gather(sweep, "ppo", partial=True).policies.values()] == [2, 1, 1, 2]
    left_out = [line for line in capsys.readouterr().out.splitlines() if line.endswith("not finished and left out")]
    assert [Path(line.split(" is ")[0]).parent.name for line in left_out] == ["ppo-0.5-1", sweep.name]


def test_timed_and_walked_evaluations_are_compared_in_the_units_of_both(tmp_path):
    evaluated(tmp_path / "a", {"live": ((0.8, 0.3),)}, {"agent": {"x": 1}}, timed=True)
    evaluated(tmp_path / "b", {"walked": ((0.8, 0.3),)}, {"agent": {"x": 1}}, timed=False)
    summary = report(tmp_path, None, "bytes", 5)
    assert "seconds" not in summary["policies"]["live"]["cost_at_by_unit"]
    assert summary["policies"].keys() == {"live", "walked"}


SMALL = [
    "evaluation.examples=2",
    "evaluation.threshold_examples=2",
    "evaluation.llm_shares=[0.2]",
    "evaluation.bootstrap=5",
    "evaluation.max_new_tokens=8",
    "evaluation.transcripts=0",
    "evaluation.draft_tokens=0",
    "evaluation.oracle_budget=0",
]


def test_a_sweep_of_which_jobs_died_goes_on_and_ends_in_one_table(tmp_path, monkeypatch, pool):
    dead, trained = {0.02, 0.1}, []

    def fit(agent, pool, task, seed, track, folder):
        trained.append(agent.cost_weight)
        if agent.cost_weight in dead:
            raise RuntimeError("out of memory")
        torch.manual_seed(int(1000 * agent.cost_weight))
        return RouterPolicy(RouterNetwork(pool.slm.width).eval(), models_manifest(pool))

    monkeypatch.setattr(training, "policy_from", fit)
    monkeypatch.setattr(experiments.evaluation.report, "plot_curves", lambda summary, path: None)
    monkeypatch.setattr(experiments.evaluation.report, "page", lambda summary, parts: "")
    sweep = ["agent=ppo", "agent.cost_weight=0.02,0.05,0.1", "evaluate=true", "threads=1", *SMALL]
    sweep += [f"evaluation.shared={tmp_path / 'shared'}"]

    def start(*more):
        GlobalHydra.instance().clear()
        monkeypatch.setattr(sys, "argv", ["train", "-m", *sweep, f"hydra.sweep.dir={tmp_path}", *more])
        experiments.train.main()

    with pytest.raises((SystemExit, RuntimeError)):
        start()
    assert trained == [0.02, 0.05, 0.1]
    with pytest.raises(ValueError, match=r"not evaluated yet: .*ppo-cost_weight-0\.02-seed0, .*0\.1-seed0; start the"):
        gather(tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    dead.clear()
    trained.clear()
    start()
    assert trained == [0.02, 0.1]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    summary = report(tmp_path, None, "bytes", 5)
    assert list(summary["policies"]) == [f"ppo cost_weight={weight}" for weight in (0.02, 0.05, 0.1)]
    # a policy that is trained is evaluated anew where that is asked, and not trained
    trained.clear()
    start("agent.cost_weight=0.02,0.05", "evaluation.bootstrap=6")
    assert trained == []
    done = json.loads((tmp_path / "ppo-cost_weight-0.02-seed0" / "summary.json").read_text())
    assert done["evaluated_by"]["bootstrap"] == 6


def test_a_trained_policy_is_not_taken_for_one_of_other_settings(tmp_path, pool, task):
    made_by = {"agent": {"steps": 5}, "seed": 0}
    (tmp_path / "trained.json").write_text(json.dumps({"made_by": made_by, "summary": {"agent": "Ppo"}}))
    assert training.read_trained(tmp_path, made_by) == {"agent": "Ppo"}
    assert training.read_trained(tmp_path / "nowhere", made_by) is None
    with pytest.raises(ValueError, match=r"made with agent .*5.*, this run has .*6"):
        training.read_trained(tmp_path, {**made_by, "agent": {"steps": 6}})


def test_a_training_that_goes_on_does_not_know_what_was_read_before_it(tmp_path, pool, task):
    class Reader(Learner):
        def train(self, run):
            decode_alone(run.pool.slm, run.task, run.task.examples("train", 1), 2)
            if dies:
                raise KeyboardInterrupt  # before any row
            return Uncertainty()

    def read(folder):
        with Tracker(folder) as track:
            return training.train(Reader(), pool, task, folder, track, "reader")["tokens_read"]

    dies = False
    whole = read(tmp_path / "whole")
    assert whole[0] > 0
    dies = True
    with pytest.raises(KeyboardInterrupt):
        read(tmp_path / "cut")
    dies = False
    assert read(tmp_path / "cut") is None
    assert read(tmp_path / "cut") == whole  # trained anew


def test_agents_are_evaluated_by_a_list():
    listed = config_of("evaluate", *listed_agents(["agents=[margin,entropy,citer_s]", "agents.citer_s.rounds=1"]))
    assert set(listed.agents) == {"margin", "entropy", "citer_s"}
    assert listed.agents.citer_s.rounds == 1
    assert listed.first == "margin"
    assert config_of("evaluate", *listed_agents(["agents=[random]"])).agents.keys() == {"random"}
    assert config_of("evaluate", *listed_agents(["first=entropy", "agents=[random,entropy]"])).first == "entropy"
    assert config_of("evaluate", *listed_agents(["agents=[]", "+saved.x=there"])).agents == {}
    added = config_of("evaluate", *listed_agents(["+agent@agents.mine=margin"]))
    assert set(added.agents) == {"random", "entropy", "mine"}
    outside = ["agents=[agents.heuristics.Uncertainty,random]", "agents.Uncertainty.measure=margin"]
    classes = config_of("evaluate", *listed_agents(outside))
    assert list(classes.agents) == ["random", "Uncertainty"]
    assert (classes.first, classes.agents.Uncertainty.measure) == ("Uncertainty", "margin")
    assert "agent@agents.random=mine.random" in listed_agents(["agents=[mine.random]"])
    with pytest.raises(ValueError, match=r"mine\.Random and random would both be called random; .*other=random"):
        listed_agents(["agents=[mine.Random,random]"])
    with pytest.raises(ValueError, match="one list"):
        listed_agents(["-m", "agents=[random],[entropy]"])
