"""Programs killed at random moments and started again end where undisturbed ones do.

`KILLS` are spread evenly over the programs, at moments drawn uniformly over what an undisturbed run takes: 20, or 200
where CITER_SOAK=1 (`make soak`). After each the program is started again in the same folder, until it ends by itself.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from experiments.report import main as report
from tests.programs import Start

pytestmark = pytest.mark.slow

KILLS = 200 if os.environ.get("CITER_SOAK") == "1" else 20
TIMED = ("seconds", "time/fps", "time/time_elapsed")
NOT_PROMISED = (*TIMED, "tokens_read")
"""What is timed, and what the models read in training, which one that was interrupted does not know."""
COLLECTING = ["agent.examples=24", "agent.shard_examples=6", "agent.scheduling.rows=24", "agent.training.epochs=4"]
SELECTING = ["agent.selection.evaluations=3", "agent.selection.examples=6", "agent.selection.llm_shares=[0.2]"]
PLAYING = ["agent.examples=20", "agent.num_envs=16", "agent.steps=2000", "agent.net_arch=[8]", *SELECTING]
EVALUATING = [
    "examples=8", "threshold_examples=4", "llm_shares=[0.1,0.3]", "bootstrap=10", "transcripts=0", "oracle_budget=4",
    "draft_tokens=0", "max_new_tokens=64",
]  # fmt: skip
EVALUATED = ["evaluate=true", *(f"evaluation.{setting}" for setting in EVALUATING)]


@dataclass(frozen=True)
class Program:
    """A program to kill.

    Attributes:
        script: of `experiments`.
        overrides: its settings.
        same_bytes: files that are promised to be those of an undisturbed run, patterns in the run's folder.
        same_rows: JSON lines of which all is promised but NOT_PROMISED.
        same_summaries: JSON of which all is promised but NOT_PROMISED.
    """

    script: str
    overrides: tuple
    same_bytes: tuple = ("policy/*",)
    same_rows: tuple = ("metrics.jsonl",)
    same_summaries: tuple = ("summary.json",)

    def start(self, folder):
        folder.mkdir(parents=True, exist_ok=True)
        log = folder.with_name(f"{folder.name}.log")
        return Start(self.script, [*self.overrides, f"hydra.run.dir={folder}"], log)

    def promised(self, folder):
        """What is the same in every run of it."""

        def found(patterns):
            return {str(p.relative_to(folder)): p for pattern in patterns for p in folder.glob(pattern) if p.is_file()}

        rows = {name: path.read_text().splitlines() for name, path in found(self.same_rows).items()}
        return {
            "bytes": {name: path.read_bytes() for name, path in found(self.same_bytes).items()},
            "rows": {name: [promises(json.loads(line)) for line in lines] for name, lines in rows.items()},
            "summaries": {
                name: promises(json.loads(path.read_text())) for name, path in found(self.same_summaries).items()
            },
        }


def training(agent, *overrides, same_bytes=("policy/*",)):
    return Program("train", ("threads=1", f"agent={agent}", *overrides), same_bytes)


PROGRAMS = {
    "citer": training("citer", *COLLECTING, *EVALUATED, same_bytes=("policy/*", "round-*/*")),
    "r2r": training("r2r_small", *COLLECTING, same_bytes=("policy/*", "paths/*")),
    "expert": training("expert", "agent.examples=16", "agent.training.epochs=4", "agent.oracle.budget=10"),
    "checked": training("checked", "agent.examples=24", "agent.rounds=2", "agent.training.epochs=4",
        same_bytes=("policy/*", "states-*.safetensors", "round-*.safetensors")),
    "collm": training("collm", "agent.examples=40", "agent.training.epochs=4", "agent.validation_examples=6"),
    "tapo": training("tapo_scratch", "agent.examples=16", "agent.iterations=5", "agent.batch=8", "agent.branches=2",
        *SELECTING),
    "ppo": training("ppo", *PLAYING, "+agent.arguments.n_steps=16", "+agent.arguments.batch_size=256"),
    "dqn": training("dqn", *PLAYING),
    "routellm": training("routellm_mf", "agent.examples=40"),
    "collect": Program("collect", ("threads=1", *COLLECTING), ("preferences/*",)),
    "evaluate": Program(
        "evaluate",
        ("threads=1", "scheduling.rows=16", "+agent@agents.collm=collm", "agents.collm.examples=20",
            "agents.collm.validation_examples=0", *EVALUATING),
        (),
        ("metrics.jsonl", "results.jsonl"),
    ),
    "leaderboard": Program(
        "leaderboard",
        (
            "agents=[citer_s,entropy]", "first=citer_s", "seeds=[0]", "timings=1", "bootstrap=20",
            "results=${hydra:run.dir}/results",
            '+departures.citer_s=["agent.examples=12","agent.training.epochs=3"]',
            f"train={json.dumps(['experiment=benchmark', *(f'evaluation.{setting}' for setting in EVALUATING)])}",
        ),
        ("runs/*/policy/*", "results/policies/*/*"),
        ("runs/*/metrics.jsonl", "runs/*/evaluation/results.jsonl"),
        ("runs/summary.json",),
    ),
    "queries": Program(
        "queries",
        (
            "threads=1", "experiment=changing_pool", "results=null", "~outcomes.tasks.plus_minus",
            "~outcomes.tasks.times_over",
            "~outcomes.tasks.plus_times", "~outcomes.tasks.minus_over", "outcomes.examples=24",
            "outcomes.max_new_tokens=40", "validation_queries=8", "splits=4", "bootstrap=10", "~agents.mlp",
            "~agents.uniroute_learned",
        ),
        ("results.jsonl", "summary.json", "table.md", "splits/*"),
    ),
}  # fmt: skip


def promises(value):
    """Everything that is promised."""
    if isinstance(value, dict):
        return {key: promises(inner) for key, inner in value.items() if not key.endswith(NOT_PROMISED)}
    return [promises(inner) for inner in value] if isinstance(value, list) else value


def killed(program, folder, kills, seconds, rng):
    """Start a program until it ends by itself, killed so many times at most; how many times it was."""
    for made in range(kills):
        start = program.start(folder)
        if start.ended(rng.uniform(0, seconds)):
            start.finish()
            return made
        start.kill()
    program.start(folder).finish()
    return kills


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_killed_program_ends_where_an_undisturbed_one_does(name, tmp_path):
    program, number = PROGRAMS[name], list(PROGRAMS).index(name)
    left = KILLS // len(PROGRAMS) + (number < KILLS % len(PROGRAMS))
    rng = np.random.default_rng([14, number])
    Start("train", ["--cfg", "job"], tmp_path / "imports.log").finish()  # the first start of all waits for the imports
    seconds = program.start(tmp_path / "whole").finish()
    promised = program.promised(tmp_path / "whole")
    for kind, patterns in (
        ("bytes", program.same_bytes), ("rows", program.same_rows), ("summaries", program.same_summaries)
    ):  # fmt: skip
        assert bool(promised[kind]) == bool(patterns), f"{name} made none of {patterns}"
    kills = left
    for cycle in range(50 * kills):
        folder = tmp_path / f"cut-{cycle}"
        left -= killed(program, folder, left, seconds, rng)
        assert program.promised(folder) == promised, f"{name}, {folder}"
        if not left:
            break
    print(f"{name}: {kills} kills, {cycle + 1} runs of {seconds:.1f} s")
    assert left == 0
    assert not list((tmp_path / "whole").rglob("*.partial"))


SWEEP = [
    "-m", "threads=1", "agent=citer_s,citer_agreement,citer_slm", "agent.training.lr=0.001,0.002,0.004",
    "agent.examples=20", "agent.training.epochs=2", *EVALUATED, "evaluation.examples=4", "evaluation.llm_shares=[0.3]",
]  # fmt: skip


SWEPT = 600.0
"""Seconds after which nine jobs hang."""


def test_a_sweep_of_which_jobs_were_killed_goes_on_and_is_one_table(tmp_path):
    def swept(folder):
        shared = f"evaluation.shared={folder / 'shared'}"  # what no policy changes is measured once
        return Start("train", [*SWEEP, shared, f"hydra.sweep.dir={folder}"], tmp_path / f"{folder.name}.log")

    def reported(folder):
        report([str(folder)])
        return promises(json.loads((folder / "summary.json").read_text()))

    seconds = swept(tmp_path / "whole").finish(SWEPT)
    rng = np.random.default_rng(14)
    for early, late in ((0.1, 0.45), (0.1, 0.3)):  # of what is left then, so that two jobs are hit
        start = swept(tmp_path / "cut")
        assert not start.ended(seconds * rng.uniform(early, late))
        start.kill()
    swept(tmp_path / "cut").finish(SWEPT)
    summary = reported(tmp_path / "cut")
    assert len(summary["policies"]) == 9
    assert summary == reported(tmp_path / "whole")
    assert len((tmp_path / "cut" / "table.md").read_text().splitlines()) >= 9
    assert len([path for path in Path(tmp_path / "cut").iterdir() if (path / "policy").is_dir()]) == 9
