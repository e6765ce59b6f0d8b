"""Train and evaluate every agent of `conf/agent` with several seeds, and write a page: BENCHMARK.md.

    python -m experiments.leaderboard target=BENCHMARK.md    # `make benchmark`, but for the place of the picture
    python -m experiments.leaderboard agents=[citer,mine] seeds=[0] hydra.run.dir=outputs/mine

Each agent and seed is a run of `experiments.train` in a folder of its own below the run's folder, with a log; runs
share what no agent changes. Started again, it goes on where it was: a run that is complete is not made again. One that
fails does not stop the others.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONTINUING = Continuing(
    may_differ=("agents", "seeds", "first", "workers", "live", "timings", "bootstrap", "target", "picture")
)
"""Runs have settings of their own; which there are, and the page, may change."""


@program("leaderboard", CONTINUING)
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Make all runs, measure seconds, and write the page."""
    from envs.storage import write_text
    from experiments.common.timing import commit, lasting_clock, machine
    from experiments.evaluation.merge import report
    from experiments.reporting.leaderboard_page import HowMade, page, picture
    from experiments.training.many import make_all, runs_of
    from experiments.training.seconds import measure_seconds

    runs = runs_of(config, folder)
    begin()
    with lasting_clock(folder / "seconds.json") as spent:
        make_all(runs, config.workers)
        seconds = measure_seconds(runs, config.seeds[0], config.timings, folder / "timings.json")
    summary = report(folder / "runs", config.first, "bytes", config.bootstrap, partial=True)
    how = HowMade(
        machine=machine(),
        commit=commit(),
        workers=config.workers,
        seeds=list(config.seeds),
        minutes=round(spent() / 60),
        train=list(config.train),
        departures={name: list(config.departures[name]) for name in {run.agent for run in runs} & {*config.departures}},
    )
    target = Path(config.target or folder / "BENCHMARK.md")
    drawn = Path(config.picture or target.with_suffix(".png"))
    picture(summary, drawn)
    write_text(target, page(summary, seconds, how, os.path.relpath(drawn, target.parent)))
    print(f"wrote {target}")


if __name__ == "__main__":
    sys.exit(main())
