"""`make demo`, in a small setting: it goes on, ends in a page, and its controls are those that would collect anew."""

import json
import time

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from agents.citer import Citer
from agents.common.policy import policy_from
from agents.preferences.labels import Labels
from agents.router.training import RouterTraining
from experiments.common.config import CONF, register_schemas
from experiments.common.locks import only_writer
from experiments.common.program import REFUSED
from experiments.training.demonstration import Demonstration
from tests.programs import Start, call

SMALL = (
    "experiment=demo", "evaluation.examples=6", "evaluation.threshold_examples=4", "evaluation.llm_shares=[0.1,0.5]",
    "evaluation.bootstrap=5", "evaluation.transcripts=2", "evaluation.max_new_tokens=32", "evaluation.oracle_budget=2",
    "evaluation.draft_tokens=4",
)  # fmt: skip


def config_of(*overrides):
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        return compose("demo", overrides=list(overrides))


def demo_of(folder, *overrides):
    return Demonstration.of(OmegaConf.to_container(config_of(*overrides), resolve=True), folder)


def test_every_run_of_the_demo_composes_and_measures_as_always(tmp_path):
    demo = demo_of(tmp_path)
    assert [run.agent for run in demo.runs] == ["citer", "citer_slm", "citer_agreement", "random", "entropy"]
    for run in demo.runs:
        config = run.config()
        assert config.evaluation.examples == config.models.rows == 300  # none waits for a row
        assert list(config.evaluation.llm_shares) == [0.03, 0.06, 0.1, 0.15, 0.22, 0.4]
        assert config.evaluation.bootstrap == demo.bootstrap == 1000
        given = config.agent.get("preferences")
        assert given == (f"{tmp_path / 'train' / 'citer' / 'round-1'}" if run in demo.controls else None)
    assert demo.about.keys() == {run.agent for run in demo.runs}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("controls=[citter]", "there is no agent 'citter'"),
        ("heuristics=[citer]", "citer is named twice"),
        ("timings=0", "timings must be at least 1"),
        ("heuristics=random", r"heuristics is a list, such as heuristics=\[random\]"),
        (
            'train=["experiment=demo","agent.examples=50"]',
            r"random cannot .*agent\.examples.*not in 'Random'; .* every agent",
        ),
        ('train=["experiment=demo","task.level=medium"]', "citer cannot be made .*unknown level 'medium'"),
        ("train=[]", "citer cannot be compared: evaluate is false"),
    ],
)
def test_bad_settings_of_the_demo_are_named(override, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        demo_of(tmp_path, override)


def test_controls_that_take_preferences_are_those_that_collect_them(pool, task, tmp_path):
    training = RouterTraining(epochs=2, batch_size=64)
    settings = {"examples": 20, "shard_examples": 8, "training": training}

    def trained(folder, **more):
        rows = []
        policy = policy_from(Citer(**settings, **more), pool, task, 0, rows.append, tmp_path / folder)
        return policy, rows

    trained("citer", rounds=1)
    for case_3 in ("slm", "agreement"):
        labels = Labels(case_3=case_3)
        collected, rows = trained(case_3, labels=labels)
        given, same_rows = trained(f"{case_3}-given", labels=labels, preferences=f"{tmp_path / 'citer' / 'round-1'}")
        assert same_rows == rows
        weights, same = collected.network.state_dict(), given.network.state_dict()
        assert all(torch.equal(weights[name], same[name]) for name in weights)


def test_controls_wait_for_the_preferences_of_the_first(tmp_path):
    demo = demo_of(tmp_path)
    assert [run.after for run in (demo.first, *demo.beside)] == [None] * 3
    made_of = tmp_path / "train" / "citer"
    assert {run.after for run in demo.controls} == {(made_of / "round-1.safetensors", made_of)}


def overrides_of(folder):
    quoted = ",".join(f'"{override}"' for override in SMALL)
    return [f"train=[{quoted}]", "bootstrap=5", f"hydra.run.dir={folder}"]


def test_a_second_demo_is_refused_in_one_line_and_a_finished_one_ends_at_once(tmp_path, capsys):
    folder = tmp_path / "demo"
    with only_writer(folder), pytest.raises(SystemExit) as refused:
        call("demo", *overrides_of(folder))
    assert refused.value.code == REFUSED
    printed = capsys.readouterr()
    *_, line = (printed.out + printed.err).splitlines()
    assert "is in use by process" in line
    assert "Traceback" not in printed.err
    assert {path.name for path in folder.iterdir()} == {".lock"}
    (folder / "index.html").write_text("done")
    call("demo", *overrides_of(folder))
    assert capsys.readouterr().out.splitlines()[-1] == f"nothing is left to do: open {folder / 'index.html'}"
    assert (folder / "index.html").read_text() == "done"


@pytest.mark.slow
def test_a_demo_that_was_killed_goes_on_and_ends_in_a_page(tmp_path):
    folder, log = tmp_path / "demo", tmp_path / "log.txt"
    killed = Start("demo", overrides_of(folder), log)
    begun = time.monotonic()
    while not list(folder.glob("train/citer/round-1/*.arrow")) and time.monotonic() - begun < 200:
        time.sleep(0.2)
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("train/citer/round-1/*.arrow")}
    killed.kill()
    assert kept
    Start("demo", overrides_of(folder), log).finish()
    # a process that was forked for the test ends without joblib's last clearing up, which is said behind it
    assert f"open {folder / 'index.html'}" in log.read_text().splitlines()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    page, summary = (folder / "index.html").read_text(), json.loads((folder / "summary.json").read_text())
    assert list(summary["policies"]) == ["citer", "citer_agreement", "citer_slm", "entropy", "random"]
    assert page.count("<article") == 2
    assert page.count('<img src="data:image/svg+xml') == 4
    timings = json.loads((folder / "timings.json").read_text())
    shown = {name: one["cost_at_by_unit"]["seconds"]["0.95"] for name, one in summary["policies"].items()}
    assert shown == timings
    assert not (folder / "shared").exists()
    assert not list(folder.rglob("*.tree"))
