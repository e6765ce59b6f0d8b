"""Train and evaluate every agent of `conf/agent` with several seeds, and write a page: BENCHMARK.md.

    python -m experiments.leaderboard target=BENCHMARK.md    # `make benchmark`, but for the place of the picture
    python -m experiments.leaderboard agents=[citer,mine] seeds=[0] hydra.run.dir=outputs/mine

Each agent and seed is a run of `experiments.train` in a folder of its own below the run's folder, with a log; runs
share what no agent changes. Started again, it goes on where it was: a run that is complete is not made again. One that
fails does not stop the others.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import current_process, get_context
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from tqdm import tqdm

from agents.policy import POLICY_FILE, Always, Policy, load_policy
from agents.rollout import Episode, decode
from envs.files import write_text
from experiments.build import CONF, build, prepare, program, register_schemas
from experiments.leaderboard_page import page, picture
from experiments.limits import by_llm_alone
from experiments.outcomes import Outcomes
from experiments.report import report
from experiments.timing import alternate, machine
from experiments.train import SUMMARY, train

TIMED = 128
"""Problems that are decoded to measure seconds."""


@dataclass(frozen=True)
class Run:
    """One agent with one seed.

    Attributes:
        agent: its name in `conf/agent`.
        seed: of training.
        overrides: of `experiments.train`, besides these two.
        folder: of the run.
        shared: folder of what no agent changes.
        live: decode every token; otherwise the runs of a process walk one replay tree of what was decoded.
    """

    agent: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    shared: Path
    live: bool = False

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return (self.folder / SUMMARY).is_file()

    def config(self) -> DictConfig:
        """What `experiments.train` is called with."""
        register_schemas()
        with initialize_config_dir(str(CONF), version_base=None):
            return compose(
                "train", overrides=[f"agent={self.agent}", f"seed={self.seed}", *self.overrides, *self.place()]
            )

    def place(self) -> list[str]:
        """Where the evaluation keeps what runs share. Limits that were timed are others than those that were not."""
        if self.live:
            return [f"evaluation.shared={self.shared / 'live'}"]
        # processes that wrote one file would undo each other's work
        tree = self.shared / f"{current_process().name}.tree"
        return [f"evaluation.shared={self.shared / 'walked'}", f"evaluation.tree={tree}"]


def runs_of(config: DictConfig, folder: Path) -> list[Run]:
    """Every run, those that depart from their defaults first: they take longest.

    Raises:
        ValueError: an agent that is not there.
    """
    known = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))
    names = list(config.agents or known)
    for name in (*names, *config.departures, *config.live):
        if name not in known:
            raise ValueError(f"there is no agent {name!r}; there are {', '.join(known)}")
    if config.first not in names:
        raise ValueError(f"first is {config.first!r}, the agents are {', '.join(names)}; choose one of them")
    if not config.seeds or min(config.seeds) < 0 or config.workers < 1 or config.timings < 1:
        raise ValueError(
            f"name at least one seed, 0 or more (seeds: {list(config.seeds)}), and at least one of workers "
            f"({config.workers}) and timings ({config.timings})"
        )
    names.sort(key=lambda name: (name != config.first, name not in config.departures, name))
    shared = folder / "shared"
    return [
        Run(
            name,
            seed,
            (*config.train, *config.departures.get(name, [])),
            folder / "runs" / f"{name}-seed{seed}",
            shared,
            name in config.live,
        )
        for name in names
        for seed in config.seeds
    ]


def make(run: Run) -> str | None:
    """Make one run, in a process of one thread; what went wrong, or None."""
    torch.set_num_threads(1)
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "log.txt").open("w") as log, redirect_stdout(log), redirect_stderr(log):
        try:
            config = run.config()
            prepare(config, run.folder)
            train(config, run.folder, run.agent)
        except Exception as error:  # whatever it is, the other runs go on
            logging.getLogger(__name__).exception("run failed")
            return f"{type(error).__name__}: {error}"
    return None


def make_all(runs: Sequence[Run], workers: int) -> None:
    """Make the runs that are not there yet.

    Raises:
        ValueError: some failed; the error names them and what they said.
    """
    missing = [run for run in runs if not run.done]
    failed: dict[str, str] = {}
    # torch's own threads would wait for each other where processes share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        tqdm(total=len(runs), initial=len(runs) - len(missing), desc="runs", mininterval=5) as progress,
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as processes,
    ):
        # one run alone makes what all share
        for part in (missing[:1], missing[1:]):
            waiting = {processes.submit(make, run): run for run in part}
            for future in as_completed(waiting):
                run, error = waiting[future], future.result()
                if error:
                    failed[f"{run.agent} with seed {run.seed} ({run.folder / 'log.txt'})"] = error
                progress.update()
    if failed:
        lines = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise ValueError(f"{len(failed)} runs failed; the others are kept, and are not made again:\n{lines}")


def policy_of(run: Run, config: DictConfig, pool: Any, task: Any) -> Policy:
    """The policy a run has made; one that is not saved learns nothing, and is made again."""
    place = run.folder / "policy"
    if (place / POLICY_FILE).is_file():
        return load_policy(place, pool)
    policy: Policy = build(config, "agent").fit(pool, task, seed=run.seed)
    return policy


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
            return float(Outcomes.of(answers(policy, threshold), pool, policy).costs["seconds"].sum())  # noqa: B023

        def alone() -> float:
            episodes = [by_llm_alone(episode) for episode in answers(Always(slm=False), 0.5)]
            return float(Outcomes.of(episodes, pool).costs["seconds"].sum())  # noqa: B023

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
