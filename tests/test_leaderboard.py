import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.errors import HydraException

from experiments.common.config import CONF
from experiments.reporting.leaderboard_tables import headline, ranked, standing
from experiments.reporting.paper import headlines
from experiments.training.many import Run, check, runs_of
from tests.programs import composed

ROOT = CONF.parent


def settings(*overrides):
    return composed("leaderboard", *overrides)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_agent_and_seed_is_a_run_and_composes(every, tmp_path):
    whole = settings("agents=null")
    runs = runs_of(whole, tmp_path)
    # composed are those that the leaderboard treats each in its own way, and two that it does not; all of them if slow
    special = {*whole.departures, *whole.live, "citer", "random"}
    agents = {path.stem for path in (CONF / "agent").glob("*.yaml")}
    made = {(agent, seed) for agent in agents for seed in (0, 1, 2) if not seed or agent not in whole.untrained}
    assert {(run.agent, run.seed) for run in runs} == made
    assert runs[0].agent == "citer"
    assert len({run.folder for run in runs}) == len(runs)
    for run in runs:
        if run.seed == 0 and (every or run.agent in special):
            config = run.config()
            assert config.evaluate
            assert config.evaluation.shared.startswith(str(tmp_path / "shared"))
            assert (config.evaluation.tree is None) == (run.agent in ("r2r", "r2r_small"))


def test_the_core_table_has_one_budget_rule_and_twenty_agents_at_most(tmp_path):
    core = settings()
    runs = runs_of(core, tmp_path)
    assert not core.departures
    assert len({run.agent for run in runs}) == len(core.agents) <= 20
    assert len(runs) == 3 * len(core.agents) - 2 * len({*core.agents} & {*core.untrained})


STARTS = re.compile(r"\bstart\b\s*[=:]\s*(\d[\d_]*)")
OPENED = range(4000, 5000)
"""The problems of the test split that only the core table's program opens."""


def problems_named(text):
    """Of Python code: the problems of the test split that calls of a task name by plain numbers, a range a call."""
    named = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        keys = {"example": ("split", "start"), "examples": ("split", "count", "start")}.get(node.func.attr, ())
        values = [*zip(keys, node.args, strict=False), *((keyword.arg, keyword.value) for keyword in node.keywords)]
        known = {key: value.value for key, value in values if isinstance(value, ast.Constant)}
        if known.get("split") == "test":
            start = known.get("start") or 0
            named.append(range(start, start + (known.get("count") or 1)))
    return named


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the files lie outside a repository")
def test_nothing_else_opens_the_test_problems_of_the_core_table():
    """They stand in one file; no code, configuration or command starts among them, or a thousand problems before."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    opened = composed("train", "experiment=benchmark").evaluation
    assert (opened.split, opened.start, opened.examples) == ("test", 4000, 1000)
    found = {
        name
        for name in listed
        if Path(name).suffix in (".py", ".yaml", ".md")
        and any(3000 < int(start) < 5000 for start in STARTS.findall((ROOT / name).read_text()))
    }
    assert found == {"conf/experiment/benchmark.yaml"}
    code = [name for name in listed if Path(name).suffix == ".py"]
    assert not [
        name
        for name in code
        if any(
            some.start < OPENED.stop and some.stop > OPENED.start for some in problems_named((ROOT / name).read_text())
        )
    ]
    calls = "task.examples('test', 1000, 4000); task.example('test', 4999); task.examples('test', 30, start=7)"
    assert problems_named(calls) == [range(4000, 5000), range(4999, 5000), range(7, 37)]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("agents=[citer,citter]", "citter"),
        ('+departures.citter=["seed=1"]', "citter"),
        ("first=nobody", "nobody"),
        ("agents=[citer,agents.heuristics.Nobody]", "Nobody cannot be imported"),
        ("seeds=[]", "seed"),
        ("timings=0", "timings"),
        ("agents=citer", r"agents is a list, such as agents=\[citer\]"),
        ("+more_seeds.ppo=3", r"more_seeds.ppo is a list, such as more_seeds.ppo=\[3\]"),
        ("+more_seeds.ppo=[3,-1]", r"more_seeds.ppo is \[3, -1\]; name seeds of 0 or more"),
        ("+more_seeds.ppoo=[3]", "ppoo"),
    ],
)
def test_bad_settings_are_named(override, message, tmp_path):
    with pytest.raises((ValueError, HydraException), match=message):
        runs_of(settings(override), tmp_path)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            'train=["experiment=benchmark","agent.examples=50"]',
            r"^random cannot .*agent\.examples.*goes to every agent$",
        ),
        ('+departures.random=["agent.odds=2"]', r"^random cannot .*agent\.odds"),
        ('train=["experiment=benchmark","evaluation.refine=-1"]', r"^citer_s cannot .*refine"),
    ],
)
def test_settings_that_an_agent_does_not_take_are_named_before_anything_runs(override, message, tmp_path):
    runs = runs_of(settings("agents=[citer_s,random]", "first=citer_s", "seeds=[0,1]", override), tmp_path)
    with pytest.raises(ValueError, match=message):
        check(runs)
    for run in runs:
        run.folder.mkdir(parents=True)
        (run.folder / "summary.json").write_text("{}")
    check(runs)  # what is done is not made


def test_an_agent_has_the_seeds_of_all_and_those_that_are_its_own(tmp_path):
    chosen = settings("agents=[citer,ppo,entropy]", "seeds=[0,1]", "+more_seeds.ppo=[1,4]", "+more_seeds.entropy=[5]")
    seeds = [(run.agent, run.seed) for run in runs_of(chosen, tmp_path)]
    assert seeds == [("citer", 0), ("citer", 1), ("entropy", 0), ("ppo", 0), ("ppo", 1), ("ppo", 4)]


def test_a_class_is_an_agent_too(tmp_path):
    chosen = settings("agents=[citer,agents.heuristics.Uncertainty]", "seeds=[0]")
    run = next(run for run in runs_of(chosen, tmp_path) if run.agent != "citer")
    assert run.folder == tmp_path / "runs" / "agents.heuristics.Uncertainty-seed0"
    assert run.config().agent["_target_"].endswith("Uncertainty")


def test_a_run_is_done_when_its_summary_is_there(tmp_path):
    run = Run("random", 0, (), tmp_path, tmp_path)
    assert not run.done
    (tmp_path / "summary.json").write_text("{}")
    assert run.done


def test_rows_are_ranked_by_cost_and_ties_by_the_paired_ratio():
    costs = {"a": 0.3, "b": None, "c": 0.1}
    assert ranked({"policies": {name: {"cost_at": {"0.95": cost}} for name, cost in costs.items()}}) == ["c", "a", "b"]
    intervals = {"c": [1.0, 1.0], "a": [0.99, 1.3], "b": [1.01, 1.3], "d": [None, None]}
    policies = {name: {"against_c": {"ratio_at_0.95": {"interval": pair}}} for name, pair in intervals.items()}
    said = {name: standing({"cheapest": "c", "policies": policies}, name) for name in policies}
    unclear = "not significantly costlier"
    assert said == {"c": "cheapest", "a": unclear, "b": "", "d": unclear}


def test_savings_follow_from_ratios_and_gains_from_the_rivals_losses():
    against = {
        "ratio_at_0.95": {"value": 2.0, "interval": [1.6, 4.0]},
        "gain_at_0.25": {"value": -0.2, "interval": [-0.3, -0.1]},
        "gain_at_0.50": {"value": -0.05, "interval": [-0.06, 0.01]},
    }
    page = headlines({"policies": {"collm": {"against_citer": against}}})
    assert "50% [38%, 75%] | up to 27% | 20.0 [10.0, 30.0] | 5.0 [-1.0, 6.0] | up to 17" in page
    assert headlines({"policies": {"collm": {"against_entropy": against}}}) == ""


@pytest.mark.slow
def test_a_small_leaderboard_writes_its_page_and_makes_no_run_twice(tmp_path):
    quick = ["experiment=benchmark", "evaluation.examples=20", "evaluation.threshold_examples=10"]
    quick += ["evaluation.llm_shares=[0.05,0.15,0.4]", "evaluation.oracle=20"]
    command = [
        sys.executable, "-m", "experiments.leaderboard", f"hydra.run.dir={tmp_path / 'run'}",
        "agents=[citer_s,routellm_sw,r2r,entropy]", "first=citer_s", "seeds=[0]", "timings=1", "bootstrap=20",
        f"train={json.dumps(quick)}", *(f'+departures.{name}=["agent.examples=40"]' for name in
        ("citer_s", "routellm_sw", "r2r")), f"target={tmp_path / 'PAGE.md'}",
    ]  # fmt: skip

    def run():
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return (tmp_path / "PAGE.md").read_text()

    page = run()
    for name in (
        "citer_s (1) *",
        "routellm_sw (1) *",
        "r2r (1) *",
        "entropy (1) |",
        "*oracle, per query*",
        "cheapest |",
    ):
        assert name in page
    assert "](PAGE.png)" in page
    assert (tmp_path / "PAGE.png").stat().st_size > 10_000
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").glob("runs/*/summary.json")}
    assert len(made) == 4
    (tmp_path / "PAGE.md").unlink()
    run()
    assert made == {path: path.stat().st_mtime_ns for path in made}


@pytest.mark.slow
def test_a_run_that_fails_is_named_and_stops_no_other(tmp_path):
    command = [
        sys.executable, "-m", "experiments.leaderboard", f"hydra.run.dir={tmp_path / 'run'}", "agents=[citer_s,random]",
        "first=citer_s", "seeds=[0]", '+departures.citer_s=["agent.preferences=nowhere"]',
        f"target={tmp_path / 'PAGE.md'}",
        'train=["experiment=benchmark","evaluation.examples=8","evaluation.oracle=0","evaluation.threshold_examples=4"]',
    ]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "citer_s with seed 0" in done.stdout + done.stderr
    assert "nowhere" in done.stdout + done.stderr
    assert (tmp_path / "run" / "runs" / "random-seed0" / "summary.json").is_file()
    assert not (tmp_path / "PAGE.md").exists()


def test_measured_latency_is_a_column_of_its_own_where_there_is_some():
    costs = {unit: {"0.95": 0.2} for unit in ("bytes", "flops", "llm_tokens", "dollars")}
    summary = {
        "first": "citer",
        "cheapest": "checked",
        "policies": {name: {"cost_at_by_unit": costs} for name in ("citer", "checked")},
        "limits": {"line": {"cost_at_by_unit": costs}},
    }
    lines = headline(summary, {}, {"checked_seconds_over_llm_only": 0.25}).splitlines()
    assert [line.split(" | ")[5] for line in lines if "---" not in line] == ["seconds, batch 1", "", "0.250", ""]
    assert "batch 1" not in headline(summary, {}, {})
