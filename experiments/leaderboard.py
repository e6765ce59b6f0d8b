"""Train and evaluate every agent of `conf/agent` with several seeds, and write a page: BENCHMARK.md.

    python -m experiments.leaderboard target=BENCHMARK.md    # `make benchmark`, but for the place of the picture
    python -m experiments.leaderboard agents=[citer,mine] seeds=[0] hydra.run.dir=outputs/mine

Each agent and seed is a run of `experiments.train` in a folder of its own below the run's folder, with a log; runs
share what no agent changes. Started again, it goes on where it was: a run that is complete is not made again. One that
fails does not stop the others.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from agents.common.policy import Policy, policy_from
from agents.common.rollout import Episode, decode
from agents.common.saving import POLICY_FILE, load_policy
from agents.heuristics import Always
from envs.storage import write_text
from experiments.common.config import CONF, build, program
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import by_llm_alone
from experiments.evaluation.merge import report
from experiments.reporting.leaderboard_page import page, picture
from experiments.speed_suites.timing import alternate, machine
from experiments.training.many import Run, make_all, runs_of

TIMED = 128
"""Problems that are decoded to measure seconds."""


def policy_of(run: Run, config: DictConfig, pool: Any, task: Any) -> Policy:
    """The policy a run has made; one that is not saved learns nothing, and is made again."""
    place = run.folder / "policy"
    if (place / POLICY_FILE).is_file():
        return load_policy(place, pool)
    return policy_from(build(config, "agent"), pool, task, run.seed)


def threshold_at(run: Run, level: float) -> float | None:
    """The cheapest threshold (memory traffic) of a run that reaches `level` of the LLM's accuracy; None: none does."""
    rows = [json.loads(line) for line in (run.folder / "evaluation" / "results.jsonl").read_text().splitlines()]
    llm = next(row["accuracy"] for row in rows if row["policy"] == "llm")
    reaching = [row for row in rows if row["policy"] == run.agent and row["accuracy"] >= level * llm]
    return min(reaching, key=lambda row: float(row["cost_bytes"]))["threshold"] if reaching else None


def measure_seconds(runs: Sequence[Run], seed: int, repeats: int, path: Path) -> dict[str, float | None]:
    """Seconds of forward passes and decisions at 95 % of the LLM's accuracy, over those of LLM-only decoding.

    The agent and LLM-only decoding take turns in this process, when nothing else runs; medians are compared. What is
    measured is kept at `path`.
    """
    found: dict[str, float | None] = json.loads(path.read_text()) if path.is_file() else {}
    for run in tqdm([run for run in runs if run.seed == seed and run.agent not in found], desc="seconds"):
        config, threshold = OmegaConf.load(run.folder / "config.yaml"), threshold_at(run, 0.95)
        assert isinstance(config, DictConfig)
        if threshold is None:
            found[run.agent] = None
            continue
        task, pool = build(config, "task"), build(config, "models")
        policy, settings = policy_of(run, config, pool, task), config.evaluation
        examples = task.examples(settings.split, min(TIMED, settings.examples), start=settings.start)

        def answers(one: Policy, at: float) -> list[Episode]:
            return decode(pool, task, examples, one, at, settings.max_new_tokens)  # noqa: B023

        def routed() -> float:
            return float(Answers.of(answers(policy, threshold), pool, policy).costs["seconds"].sum())  # noqa: B023

        def alone() -> float:
            episodes = [by_llm_alone(episode) for episode in answers(Always(slm=False), 0.5)]
            return float(Answers.of(episodes, pool).costs["seconds"].sum())  # noqa: B023

        medians = alternate({"routed": routed, "llm": alone}, repeats, run.agent)
        found[run.agent] = round(medians["routed"] / medians["llm"], 4)
        write_text(path, json.dumps(found, indent=1) + "\n")
    return found


def commit() -> str:
    """The commit the code is at, and whether it was changed since; "unknown" outside of a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=CONF, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


def about(config: DictConfig, runs: Sequence[Run], seconds: float) -> Mapping[str, Any]:
    """What the page says of how it was made."""
    return {
        **machine(),
        "commit": commit(),
        "workers": config.workers,
        "seeds": list(config.seeds),
        "minutes": round(seconds / 60),
        "train": list(config.train),
        "departures": {
            name: list(config.departures[name]) for name in {run.agent for run in runs} & {*config.departures}
        },
    }


@program("leaderboard")
def main(config: DictConfig, folder: Path) -> None:
    """Make all runs, measure seconds, and write the page."""
    runs = runs_of(config, folder)
    clock = folder / "seconds.json"
    spent = json.loads(clock.read_text()) if clock.is_file() else 0.0
    started = time.perf_counter()
    try:
        make_all(runs, config.workers)
        seconds = measure_seconds(runs, config.seeds[0], config.timings, folder / "timings.json")
    finally:
        spent += time.perf_counter() - started
        write_text(clock, json.dumps(spent) + "\n")
    summary = report(folder / "runs", config.first, "bytes", config.bootstrap)
    target = Path(config.target or folder / "BENCHMARK.md")
    drawn = Path(config.picture or target.with_suffix(".png"))
    picture(summary, drawn)
    told = about(config, runs, spent + time.perf_counter() - started)
    write_text(target, page(summary, seconds, told, os.path.relpath(drawn, target.parent)))
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(main())
