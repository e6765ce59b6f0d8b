"""Measure speed, as ratios in one run against something real.

    python -m experiments.speed suite=decode
    python -m experiments.speed suite=env
    python -m experiments.speed suite=collect
    python -m experiments.speed suite=rl

The last line printed is a JSON object: {"suite", "ratios", "rates", "machine"}. Everything that is compared is run in
turn (A B A B ...) in one process, and medians are compared, since machines are noisy. Where something else took the
machine's time meanwhile, a line says so, and "machine" holds {"quiet": false, "why": [...]}.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from omegaconf import DictConfig

from experiments.common.config import program
from experiments.common.quiet import QuietWatch
from experiments.common.timing import Numbers, machine
from experiments.speed_suites.collect import collect_suite
from experiments.speed_suites.decode import decode_suite
from experiments.speed_suites.env import env_suite
from experiments.speed_suites.rl import rl_suite

SUITES: dict[str, Callable[[DictConfig], tuple[Numbers, Numbers]]] = {
    "decode": decode_suite,
    "env": env_suite,
    "collect": collect_suite,
    "rl": rl_suite,
}


@program("speed")
def main(config: DictConfig, folder: Path) -> None:
    """Run one suite."""
    if config.suite not in SUITES:
        raise ValueError(f"unknown suite {config.suite!r}; choose one of {', '.join(SUITES)}")
    watch = QuietWatch()
    ratios, rates = SUITES[config.suite](config)
    quiet = watch.report()
    if not quiet["quiet"]:
        print(f"the machine was not quiet: {'; '.join(quiet['why'])}; measure again, or read ratios alone")
    report = {
        "suite": config.suite,
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "rates": {name: round(value, 2) for name, value in rates.items()},
        "machine": machine() | quiet,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
