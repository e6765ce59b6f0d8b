"""Train and evaluate agents with several seeds on the same problems, and write a page: BENCHMARK.md.

    make benchmark    # the core agents of conf/leaderboard.yaml, three seeds each
    python -m experiments.leaderboard agents=[citer,mine.Impatient] seeds=[0] hydra.run.dir=outputs/mine

Each agent and seed is a run of `experiments.train` in a folder of its own below the run's folder, with a log; runs
share what no agent changes. Hydra's launchers make them: `launcher=joblib`, the default, in as many processes as there
are cores (`hydra.launcher.n_jobs=2`), `launcher=basic` one after the other in this one. Started again, it goes on where
it was: a run that is complete is not made again. One that fails does not stop the others. With `results=FOLDER` each
run that is done is kept there as one file, and those that are kept there are not made, if this code still decodes what
they hold.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONTINUING = Continuing(
    may_differ=(
        "agents",
        "further",
        "seeds",
        "more_seeds",
        "untrained",
        "first",
        "live",
        "timings",
        "timed",
        "bootstrap",
        "target",
        "picture",
        "results",
        "whole_traces",
    )
)
"""Runs have settings of their own; which there are, and the page, may change."""
PAGE = "benchmark_page"
"""In `conf/experiment`, what `make benchmark` makes."""
COMMAND = "python -m experiments.leaderboard"
LATENCY = "latency.json"
"""Among the results: `speed.json` of the suite `latency`."""


@program("leaderboard", CONTINUING)
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Make all runs, measure seconds, and write the page."""
    from hydra.core.hydra_config import HydraConfig

    from envs.storage import write_text
    from experiments.common.timing import commit, machine
    from experiments.evaluation.merge import report
    from experiments.published.canaries import restore
    from experiments.published.entries import entries, training_of, write_leaderboard
    from experiments.published.run_file import PublishedRun
    from experiments.published.store import Store
    from experiments.reporting.leaderboard_page import BENCHMARK, page, picture
    from experiments.reporting.leaderboard_tables import HowMade
    from experiments.training.launching import make_all
    from experiments.training.many import Run, check, runs_of
    from experiments.training.seconds import measure_seconds

    runs = runs_of(config, folder)
    store = Store(Path(config.results)) if config.results else None
    experiment = HydraConfig.get().runtime.choices.get("experiment")
    command = f"{COMMAND} experiment={experiment}" if experiment else COMMAND
    if experiment == PAGE:
        command = "make benchmark"
    made_on = {**machine(), "commit": commit()}

    def keep(run: Run) -> None:
        if store is not None and not store.has(run):
            whole = run.seed in config.seeds[: config.whole_traces] and run.agent not in config.further
            store.add(run, made_on, whole_trace=whole)

    if store is not None:
        store.check_settings(runs)
    check([run for run in runs if store is None or not store.has(run)])
    begin()
    if store is not None:
        restore(store, runs, folder)
    for run in runs:
        if run.done:
            keep(run)
    make_all(runs, folder, keep)
    timings = store.folder / "seconds.json" if store else folder / "timings.json"
    core = [run for run in runs if run.agent not in config.further]
    seconds = measure_seconds(core, config.seeds[0], config.timings, timings, config.timed)
    summary = report(folder / "runs", config.first, "bytes", config.bootstrap, partial=True)
    training = training_of(runs)
    latency = store.folder / LATENCY if store else folder / LATENCY
    how = HowMade(
        machine=machine(),
        runs_made_on=[PublishedRun.read(store.row(run)).made_on for run in runs] if store else [],
        seeds=list(config.seeds),
        more_seeds=any(run.seed not in config.seeds for run in runs),
        training=training,
        further=list(config.further),
        train=list(config.train),
        title=BENCHMARK if experiment in (None, PAGE) else f"Leaderboard {experiment}",
        command=command,
        latency=json.loads(latency.read_text())["ratios"] if latency.is_file() else {},
        departures={name: list(config.departures[name]) for name in {run.agent for run in runs} & {*config.departures}},
    )
    target = Path(config.target or folder / "BENCHMARK.md")
    drawn = Path(config.picture or target.with_suffix(".png"))
    picture(summary, drawn, how.further)
    write_text(target, page(summary, seconds, how, os.path.relpath(drawn, target.parent)))
    if store is not None:
        write_leaderboard(store.folder.parent, store.folder.name, summary, entries(summary, training, seconds))
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(main())
