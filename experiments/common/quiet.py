"""Whether a machine was quiet while something was measured on it: who else took its cores, what a fixed work took."""

from __future__ import annotations

import os
import time
from typing import Any

import psutil
import torch

SPARE = 0.25
"""Cores that others may take of those that the measured threads need."""
STOLEN = 0.02
"""Share of the machine's time that a hypervisor may give to others."""
UNEVEN = 1.5
"""How many times its fastest a fixed piece of work may take, in the median."""
SPINS = 31
WORK = 192
"""Side of the square matrices of the fixed work: a millisecond or so."""


def spin() -> float:
    """How many times its fastest a fixed piece of work takes, in the median: about 1 where nobody interferes."""
    factor = torch.ones(WORK, WORK)
    seconds = []
    for _ in range(SPINS):
        begun = time.perf_counter()
        factor @ factor @ factor
        seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[SPINS // 2] / min(seconds)


def disturbances(busy: float, stolen: float, uneven: float, cores: int, threads: int) -> list[str]:
    """What was not quiet; nothing where all was.

    Args:
        busy: cores that other processes kept busy, on average.
        stolen: share of the machine's time that a hypervisor gave to others.
        uneven: what `spin` gives.
        cores: of the machine.
        threads: that the measured process computes with.
    """
    why = []
    if busy > max(0, cores - threads) + SPARE:
        why.append(f"other processes kept {busy:.2f} of {cores} cores busy, {threads} threads were measured")
    if stolen > STOLEN:
        why.append(f"the hypervisor took {stolen:.0%} of the machine's time")
    if uneven > UNEVEN:
        why.append(f"the same work took {uneven:.1f} times its fastest in the median")
    return why


class QuietWatch:
    """Watches a machine from when it is made until `report` is asked."""

    def __init__(self) -> None:
        self._uneven = spin()
        self._begun = time.perf_counter()
        self._machine, self._own = psutil.cpu_times(), _own_seconds()

    def report(self) -> dict[str, Any]:
        """`quiet`, whether nothing interfered since, and `why` not: a list of sentences."""
        now, cores = psutil.cpu_times(), psutil.cpu_count() or 1
        spent = {name: getattr(now, name) - getattr(self._machine, name) for name in now._fields}
        seconds = max(time.perf_counter() - self._begun, 1e-9)
        # guests' time is counted among the user's already
        resting = ("idle", "iowait", "steal", "guest", "guest_nice")
        busy = sum(value for name, value in spent.items() if name not in resting) - (_own_seconds() - self._own)
        why = disturbances(
            busy=max(0.0, busy) / seconds,
            stolen=spent.get("steal", 0.0) / (seconds * cores),
            uneven=max(self._uneven, spin()),
            cores=cores,
            threads=torch.get_num_threads(),
        )
        return {"quiet": not why, "why": why}


def _own_seconds() -> float:
    """Seconds of processors that this process has taken, and the children it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
