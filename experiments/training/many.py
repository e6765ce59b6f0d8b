"""Many training runs, a few processes at a time; what is done is not done again."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import as_completed
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing import current_process
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from envs.progress import ProgressBar
from experiments.common.config import CONF, imported, prepare, register_schemas
from experiments.common.continuing import TRAINING
from experiments.common.run_folder import run_folder
from experiments.common.stopping import Workers
from experiments.training.run import SUMMARY, checked, train_as_configured

OWN_THREADS = torch.get_num_threads()
"""Those that torch has chosen, or its user, before any run."""


@dataclass(frozen=True)
class Run:
    """One agent with one seed.

    Attributes:
        agent: its name in `conf/agent`, or the full name of a class.
        seed: of training.
        overrides: of `experiments.train`, besides these two.
        folder: of the run.
        shared: folder of what no agent changes.
        live: decode every token; otherwise the runs of a process share one replay tree of what was decoded.
    """

    agent: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    shared: Path
    live: bool = False

    @property
    def name(self) -> str:
        """Of its folder, and of what else is kept of it."""
        return self.folder.name

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return (self.folder / SUMMARY).is_file()

    def config(self) -> DictConfig:
        """What `experiments.train` is called with."""
        register_schemas()
        overrides = [f"agent={self.agent}", f"seed={self.seed}", *self.overrides, *self.place()]
        # in a program Hydra reads this folder already
        reading = GlobalHydra.instance().is_initialized()
        with nullcontext() if reading else initialize_config_dir(str(CONF), version_base=None):
            return compose("train", overrides=overrides)

    @property
    def shared_baselines(self) -> Path:
        """The folder of what no agent changes; timed baselines are kept apart."""
        return self.shared / ("live" if self.live else "replayed")

    def place(self) -> list[str]:
        """Where the evaluation keeps what runs share; one report is made of all."""
        shared = f"evaluation.shared={self.shared_baselines}"
        if self.live:
            return ["evaluation.report=false", shared]
        # processes that wrote one file would undo each other's work
        tree = self.shared / f"{current_process().name}.tree"
        return ["evaluation.report=false", shared, f"evaluation.tree={tree}"]


def runs_of(config: DictConfig, folder: Path) -> list[Run]:
    """Every run, those that depart from their defaults first: they take longest.

    Raises:
        ValueError: an agent that is not there, or a setting out of range.
        ConfigCompositionException: a class that cannot be imported.
    """
    for key in ("agents", "seeds", "train", "live", "untrained"):
        check_list(key, config[key] or [])
    known = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))
    names = list(config.agents or known)
    for name in (*names, *config.departures, *config.live, *config.untrained):
        if "." in name:
            imported(name)  # a class that lies outside
        elif name not in known:
            raise ValueError(f"there is no agent {name!r}; there are {', '.join(known)}, or classes, as mine.Impatient")
    if config.first not in names:
        raise ValueError(f"first is {config.first!r}, the agents are {', '.join(names)}; choose one of them")
    if not config.seeds or min(config.seeds) < 0 or config.workers < 1 or config.timings < 1 or config.timed < 0:
        raise ValueError(
            f"name at least one seed, 0 or more (seeds: {list(config.seeds)}), and at least one of workers "
            f"({config.workers}) and timings ({config.timings}); timed ({config.timed}) is 0 or more"
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
        for seed in (config.seeds[:1] if name in config.untrained else config.seeds)
    ]


def check_list(key: str, value: object) -> None:
    """Refuse what is no list: the letters of a name are no names.

    Raises:
        ValueError: it is none; the error names the setting.
    """
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ValueError(f"{key} is a list, such as {key}=[{value}]; it is {value!r}")


def check(runs: Sequence[Run]) -> None:
    """Compose each run that is not there yet, and build what its settings describe, before any is made.

    Raises:
        ValueError: a setting is wrong, or not one of the agent's, or no evaluation is asked for; the error names the
            agent and the setting.
    """
    alike = {(run.agent, run.overrides): run for run in runs if not run.done}  # but for their seeds
    for run in alike.values():
        try:
            config = run.config()
            checked(config, run.agent)
        except (HydraException, ValueError) as error:
            raise ValueError(f"{run.agent} cannot be made as asked: {_said(error)}") from error
        if not config.evaluate:
            raise ValueError(f"{run.agent} cannot be compared: evaluate is false")


def _said(error: Exception) -> str:
    """What an error says, in one line, without what Hydra adds: where it has looked, the names of its schemas."""
    text = re.split(r"\nConfig search path|\nSee http", f"{error}")[0]
    if isinstance(error.__cause__, OmegaConfBaseException):
        cause = f"{error.__cause__}".splitlines()[0]
        if cause not in text:
            text = f"{text.splitlines()[0]} {cause}; what stands in train goes to every agent"
    return " ".join(text.replace("Builds_", "").split())


def make(run: Run) -> str | None:
    """Make one run, in a process of one thread; what went wrong, or None."""
    torch.set_num_threads(1)
    try:
        config = run.config()
        with (
            run_folder(config, run.folder, TRAINING) as begin,
            (run.folder / "log.txt").open("w") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            try:
                prepare(config)
                train_as_configured(config, run.folder, run.agent, begin)
            except Exception:
                logging.getLogger(__name__).exception("run failed")
                raise
    except Exception as error:  # whatever it is, the other runs go on
        return f"{type(error).__name__}: {error}"
    return None


def make_all(runs: Sequence[Run], workers: int, made: Callable[[Run], None] = lambda run: None) -> None:
    """Make the runs that are not there yet.

    Args:
        runs: all of them.
        workers: how many at a time.
        made: called with each that was made, in this process.

    Raises:
        ValueError: some failed; the error names them and what they said.
    """
    missing = [run for run in runs if not run.done]
    failed: dict[str, str] = {}
    # torch's own threads would wait for each other where processes share the cores
    os.environ["OMP_NUM_THREADS"] = "1"
    with (
        ProgressBar(total=len(runs), initial=len(runs) - len(missing), desc="runs", mininterval=5) as progress,
        Workers(workers) as processes,
    ):
        # the first of all makes alone what all share
        first = int(len(missing) == len(runs))
        for part in (missing[:first], missing[first:]):
            waiting = {processes.submit(make, run): run for run in part}
            for future in as_completed(waiting):
                run, error = waiting[future], future.result()
                if error:
                    failed[f"{run.agent} with seed {run.seed} ({run.folder / 'log.txt'})"] = error
                else:
                    made(run)
                progress.update()
    if failed:
        lines = "\n".join(f"  {name}: {error}" for name, error in failed.items())
        raise ValueError(f"{len(failed)} runs failed; the others are kept, and are not made again:\n{lines}")
