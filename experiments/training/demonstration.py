"""The demo: a few runs, seconds measured when all are done, and one page."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from logging import Logger
from pathlib import Path
from typing import Any, Self

from experiments.common.help import CONF
from experiments.common.timing import lasting_clock, machine
from experiments.common.tracking import METRICS, read_rows
from experiments.evaluation.merge import report
from experiments.evaluation.runner import TRANSCRIPTS
from experiments.reporting.page import PageParts, Training
from experiments.training.launching import make_all
from experiments.training.many import Run, check, check_list
from experiments.training.run import SUMMARY
from experiments.training.seconds import TIMED, measure_seconds

CLOCK = "seconds.json"


@dataclass(frozen=True)
class Demonstration:
    """The runs of a demo, and what its page says.

    Attributes:
        folder: of the page; the runs are in `train`, what they share while they are made in `shared`.
        first: the run that the others are compared with, and whose preferences the controls take.
        beside: runs that wait for nothing.
        controls: runs that take the preferences of `first`.
        about: what the page says of each policy.
        timings: times that a policy and LLM-only decoding take turns.
        bootstrap: resamplings behind every interval.
    """

    folder: Path
    first: Run
    beside: tuple[Run, ...]
    controls: tuple[Run, ...]
    about: Mapping[str, str]
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
        for key in ("timings", "bootstrap"):
            if config[key] < 1:
                raise ValueError(f"{key} must be at least 1, is {config[key]}")

        def run(name: str, *overrides: str, after: tuple[Path, Path] | None = None) -> Run:
            shown = () if name == config["first"] else ("evaluation.transcripts=0",)
            overrides = (*config["train"], *shown, *overrides)
            place = folder / "train" / name
            return Run(name, config["seed"], overrides, place, folder / "shared", after=after)

        first = run(config["first"])
        given = f"agent.preferences='{first.folder / 'round-1'}'"
        # the router of round 1 is trained on them
        collected = first.folder / "round-1.safetensors"
        made = cls(
            folder,
            first,
            beside=tuple(run(name) for name in config["heuristics"]),
            controls=tuple(run(name, given, after=(collected, first.folder)) for name in config["controls"]),
            about=config["about"],
            timings=config["timings"],
            bootstrap=config["bootstrap"],
        )
        check(made.runs)
        return made

    @property
    def runs(self) -> list[Run]:
        """All of them."""
        return [self.first, *self.controls, *self.beside]

    def make(self, log: Logger) -> None:
        """Make what is not there yet, and the page.

        Args:
            log: told of each step.

        Raises:
            ValueError: runs failed; the error names them and what they said.
        """
        with lasting_clock(self.folder / CLOCK) as spent:
            missing = [run.agent for run in self.runs if not run.done]
            if missing:
                log.info("making %s; logs: %s", ", ".join(missing), self.folder / "train/*/log.txt")
            # controls last: they begin when the first one's preferences are there
            runs = [self.first, *self.beside, *self.controls]
            make_all(runs, self.folder, lambda run: log.info("%s is done", run.agent), first_alone=False)
            log.info("measuring seconds, then intervals")
            self._write_page(spent(), time.time())
        shutil.rmtree(self.folder / "shared", ignore_errors=True)  # what is decoded is kept with each run

    def _write_page(self, spent: float, since: float) -> None:
        """Measure seconds, merge the evaluations, and write the page, which took `spent` seconds until `since`."""
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
