"""How speed is measured, and on what: what is compared runs in turn, in one process, and medians are compared."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from envs.progress import ProgressBar
from envs.storage import write_text

Numbers = dict[str, float]


def alternate(actions: dict[str, Callable[[], float]], repeats: int, label: str) -> Numbers:
    """Run each action in turn, `repeats` times; medians of what they return."""
    values = alternated(actions, repeats, label)
    return {name: float(np.median(measured)) for name, measured in values.items()}


def alternated(actions: dict[str, Callable[[], float]], repeats: int, label: str) -> dict[str, list[float]]:
    """Run each action in turn, `repeats` times; all that they return, in order."""
    values: dict[str, list[float]] = {name: [] for name in actions}
    with ProgressBar(total=repeats * len(actions), desc=label, leave=False) as progress:
        for _ in range(repeats):
            for name, action in actions.items():
                values[name].append(action())
                progress.update()
    return values


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def commit() -> str:
    """The commit the code is at, and whether it was changed since; "unknown" outside of a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return described.stdout.strip()


@contextmanager
def lasting_clock(path: Path) -> Iterator[Callable[[], float]]:
    """Counts the seconds of a run that may be interrupted and started again: those before are kept at `path`.

    Gives a function that says how many there are so far.
    """
    before = json.loads(path.read_text()) if path.is_file() else 0.0
    started = time.perf_counter()

    def seconds() -> float:
        return float(before + time.perf_counter() - started)

    try:
        yield seconds
    finally:
        write_text(path, json.dumps(seconds()) + "\n")
