"""The demo: a few runs, two at a time, seconds measured when all are done, and one page."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Self

import torch

from experiments.common.help import CONF
from experiments.common.stopping import Workers
from experiments.common.timing import lasting_clock, machine
from experiments.common.tracking import METRICS, read_rows
from experiments.evaluation.merge import report
from experiments.evaluation.runner import TRANSCRIPTS
from experiments.reporting.page import PageParts, Training
from experiments.training.many import OWN_THREADS, Run, check, check_list, make
from experiments.training.run import SUMMARY
from experiments.training.seconds import TIMED, measure_seconds

CLOCK = "seconds.json"
PATIENCE = 1.0
"""Seconds after which it is looked again whether preferences are there."""


@dataclass(frozen=True)
class Demonstration:
    """The runs of a demo, and what its page says.

    Attributes:
        folder: of the page; the runs are in `train`, what they share while they are made in `shared`.
        first: the run that the others are compared with, and whose preferences the controls take.
        beside: runs that wait for nothing.
        controls: runs that take the preferences of `first`.
        about: what the page says of each policy.
        workers: runs at a time.
        timings: times that a policy and LLM-only decoding take turns.
        bootstrap: resamplings behind every interval.
    """

    folder: Path
    first: Run
    beside: tuple[Run, ...]
    controls: tuple[Run, ...]
    about: Mapping[str, str]
    workers: int
    timings: int
    bootstrap: int

    @classmethod
    def of(cls, config: Any, folder: Path) -> Self:
        """As `conf/demo.yaml` has it.

        Args:
            config: plain data.
            folder: of the page.

        Raises:
            ValueError: an agent that is not there, one that is named twice, a number out of range, or a setting that
                not all agents take; the error names it.
        """
        for key in ("controls", "heuristics", "train"):
            check_list(key, config[key])
        names = [config["first"], *config["controls"], *config["heuristics"]]
        known = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))
        for name in names:
            if name not in known:
                raise ValueError(f"there is no agent {name!r}; there are {', '.join(known)}")
            if names.count(name) > 1:
                raise ValueError(f"the agent {name} is named twice; name it once, as first, in controls or heuristics")
        for key in ("workers", "timings", "bootstrap"):
            if config[key] < 1:
                raise ValueError(f"{key} must be at least 1, is {config[key]}")

        def run(name: str, *overrides: str) -> Run:
            shown = () if name == config["first"] else ("evaluation.transcripts=0",)
            overrides = (*config["train"], *shown, *overrides)
            place = folder / "train" / name
            return Run(name, config["seed"], overrides, place, folder / "shared")

        first = run(config["first"])
        given = f"agent.preferences='{first.folder / 'round-1'}'"
        made = cls(
            folder,
            first,
            beside=tuple(run(name) for name in config["heuristics"]),
            controls=tuple(run(name, given) for name in config["controls"]),
            about=config["about"],
            workers=config["workers"],
            timings=config["timings"],
            bootstrap=config["bootstrap"],
        )
        check(made.runs)
        return made

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [self.first, *self.controls, *self.beside]

    @property
    def _collected(self) -> bool:
        """Whether the preferences that the controls take are there: the router of round 1 is trained on them."""
        return self.first.done or (self.first.folder / "round-1.safetensors").is_file()

    def make(self, log: Logger) -> None:
        """Make what is not there yet, and the page.

        Args:
            log: told of each step.

        Raises:
            ValueError: runs failed; the error names them and what they said.
        """
        with lasting_clock(self.folder / CLOCK) as spent, Workers(self.workers) as processes:
            self._make_runs(processes, log)
            log.info("measuring seconds, then intervals")
            # in a process that has everything loaded; the others have nothing to do
            processes.submit(self._write_page, spent(), time.time()).result()
        shutil.rmtree(self.folder / "shared", ignore_errors=True)  # what is decoded is kept with each run

    def _make_runs(self, processes: Workers, log: Logger) -> None:
        failed: dict[str, str] = {}
        waiting: dict[Future[str | None], Run] = {}

        def begin(runs: Sequence[Run]) -> None:
            missing = [run for run in runs if not run.done]
            waiting.update({processes.submit(make, run): run for run in missing})
            if missing:
                log.info(
                    "making %s; logs: %s", ", ".join(run.agent for run in missing), self.folder / "train/*/log.txt"
                )

        begin([self.first, *self.beside])
        controls = list(self.controls)
        while waiting or controls:
            if controls and (self._collected or self.first not in waiting.values()):
                begin(controls)
                controls = []
            for future in wait(waiting, PATIENCE, return_when=FIRST_COMPLETED).done:
                run, error = waiting.pop(future), future.result()
                if error:
                    failed[f"{run.agent} ({run.folder / 'log.txt'})"] = error
                    controls = [] if run is self.first else controls  # there is nothing that they could take
                    continue
                log.info("%s is done", run.agent)
        if failed:
            lines = "\n".join(f"  {name}: {error}" for name, error in failed.items())
            raise ValueError(f"{len(failed)} runs failed; the others are kept, and are not made again:\n{lines}")

    def _write_page(self, spent: float, since: float) -> None:
        """Measure seconds, merge the evaluations, and write the page, which took `spent` seconds until `since`."""
        torch.set_num_threads(OWN_THREADS)  # nothing else runs
        seconds = measure_seconds(self.runs, self.first.seed, self.timings, self.folder / "timings.json")
        transcripts = self.first.folder / "evaluation" / TRANSCRIPTS
        report(
            self.folder / "train",
            self.first.agent,
            unit="bytes",
            samples=self.bootstrap,
            out=self.folder,
            seconds=seconds,
            parts=PageParts(
                about=self.about,
                trainings=[_training(run) for run in (self.first, *self.controls)],
                transcripts=json.loads(transcripts.read_text()) if transcripts.is_file() else {},
                seconds_of=TIMED,
                machine=machine(),
                began=since - spent,
                next=_next(self.first),
            ),
        )
        sys.stdout.flush()


def _training(run: Run) -> Training:
    """What is known of the training that a run is of."""
    summary = json.loads((run.folder / SUMMARY).read_text())
    return Training(run.agent, summary["seconds"], read_rows(run.folder / METRICS))


def _next(first: Run) -> list[tuple[str, str]]:
    python = ".venv/bin/python -m"
    return [
        (
            f"Evaluate {first.agent}, as it was trained here, on harder problems",
            f"{python} experiments.evaluate +saved.{first.agent}={first.folder / 'policy'} task=arithmetic_hard",
        ),
        (
            "Train and evaluate a router distilled from search, the cheapest of the benchmark",
            f"{python} experiments.train agent=expert evaluate=true",
        ),
    ]
