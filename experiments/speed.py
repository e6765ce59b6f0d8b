"""Measure speed, as ratios in one run against something real.

    python -m experiments.speed suite=decode
    python -m experiments.speed suite=env
    python -m experiments.speed suite=collect
    python -m experiments.speed suite=rl
    python -m experiments.speed suite=latency
    python -m experiments.speed suite=pair models=qwen25_coder models.rows=1 task=commonsense_qa_chat

The last line printed is a JSON object: {"suite", "ratios", "rates", "machine"}; `speed.json` in the run's folder holds
the same. Everything that is compared is run in turn (A B A B ...) in one process, and medians are compared, since
machines are noisy. Where something else took the machine's time meanwhile, a line says so, and "machine" holds
{"quiet": false, "why": [...]}.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

SUITES = ("decode", "env", "collect", "rl", "latency", "pair")


@program("speed", Continuing(anything_differs=True))
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Run one suite."""
    from envs.storage import write_text
    from experiments.common.quiet import QuietWatch
    from experiments.common.timing import machine

    if config.suite not in SUITES:
        raise ValueError(f"unknown suite {config.suite!r}; choose one of {', '.join(SUITES)}")
    suite = getattr(import_module(f"experiments.speed_suites.{config.suite}"), f"{config.suite}_suite")
    begin()
    watch = QuietWatch()
    ratios, rates = suite(config)
    quiet = watch.report()
    if not quiet["quiet"]:
        print(f"the machine was not quiet: {'; '.join(quiet['why'])}; measure again, or read ratios alone")
    report = {
        "suite": config.suite,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "rates": {name: round(value, 2) for name, value in rates.items()},
        "machine": machine() | quiet,
    }
    write_text(folder / "speed.json", json.dumps(report, indent=1) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
