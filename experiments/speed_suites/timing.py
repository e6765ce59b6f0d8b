"""How speed is measured: everything that is compared runs in turn, in one process, and medians are compared."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

Numbers = dict[str, float]


def alternate(actions: dict[str, Callable[[], float]], repeats: int, label: str) -> Numbers:
    """Run each action in turn, `repeats` times; medians of what they return."""
    values: dict[str, list[float]] = {name: [] for name in actions}
    with tqdm(total=repeats * len(actions), desc=label, leave=False) as progress:
        for _ in range(repeats):
            for name, action in actions.items():
                values[name].append(action())
                progress.update()
    return {name: float(np.median(found)) for name, found in values.items()}


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
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
