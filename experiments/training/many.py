"""Many training runs: which there are, what they share, and how one is made."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from envs.storage import write_text
from experiments.common.config import CONF, imported, prepare, register_schemas
from experiments.common.continuing import TRAINING
from experiments.common.run_folder import run_folder
from experiments.common.stopping import quoted
from experiments.training.run import SUMMARY, checked, train_as_configured

LOG = "log.txt"
"""In a run's folder: what it printed."""
FAILED = "failed.txt"
"""In a run's folder: what went wrong when it was last made; not there while it is, nor where it is done."""


@dataclass(frozen=True)
class Run:
    """One agent with one seed.

    Attributes:
        agent: its name in `conf/agent`, or the full name of a class.
        seed: of training.
        overrides: of `experiments.train`, besides these two.
        folder: of the run.
        shared: folder of what no agent changes.
        live: decode every token; otherwise runs share replay trees of what was decoded, each of them one at a time.
        after: a file that it reads, and the folder of the run that makes it: it begins when the file is there.
    """

    agent: str
    seed: int
    overrides: tuple[str, ...]
    folder: Path
    shared: Path
    live: bool = False
    after: tuple[Path, Path] | None = None

    @property
    def name(self) -> str:
        """Of its folder, and of what else is kept of it."""
        return self.folder.name

    @property
    def done(self) -> bool:
        """Whether it is complete."""
        return (self.folder / SUMMARY).is_file()

    @property
    def failed(self) -> str | None:
        """What went wrong; None where nothing did, or nothing is known."""
        path = self.folder / FAILED
        return path.read_text().strip() if path.is_file() and not self.done else None

    @property
    def settings(self) -> list[str]:
        """The overrides that `experiments.train` is called with."""
        return [f"agent={self.agent}", f"seed={self.seed}", *self.overrides, *self._place]

    def config(self) -> DictConfig:
        """What `experiments.train` is called with."""
        register_schemas()
        # in a program Hydra reads this folder already
        reading = GlobalHydra.instance().is_initialized()
        with nullcontext() if reading else initialize_config_dir(str(CONF), version_base=None):
            return compose("train", overrides=self.settings)

    @property
    def shared_baselines(self) -> Path:
        """The folder of what no agent changes; timed baselines are kept apart."""
        return self.shared / ("live" if self.live else "replayed")

    @property
    def _place(self) -> list[str]:
        """Where the evaluation keeps what runs share; one report is made of all."""
        shared = f"evaluation.shared={quoted(self.shared_baselines)}"
        tree = [] if self.live else [f"evaluation.tree={quoted(self.shared / '*.tree')}"]
        return ["evaluation.report=false", shared, *tree]


def runs_of(config: DictConfig, folder: Path) -> list[Run]:
    """Every run, those that depart from their defaults first: they take longest.

    Raises:
        ValueError: an agent that is not there, or a setting out of range.
        ConfigCompositionException: a class that cannot be imported.
    """
    for key in ("agents", "further", "seeds", "train", "live", "untrained"):
        check_list(key, config[key] or [])
    known = sorted(path.stem for path in (CONF / "agent").glob("*.yaml"))
    names = list(dict.fromkeys([*(config.agents or known), *config.further]))
    more_seeds = config.more_seeds or {}
    for name in more_seeds:
        check_list(f"more_seeds.{name}", more_seeds[name])
        if min(more_seeds[name], default=0) < 0:
            raise ValueError(f"more_seeds.{name} is {list(more_seeds[name])}; name seeds of 0 or more")
    for name in (*names, *config.departures, *config.live, *config.untrained, *more_seeds):
        if "." in name:
            imported(name)  # a class that lies outside
        elif name not in known:
            raise ValueError(f"there is no agent {name!r}; there are {', '.join(known)}, or classes, as mine.Impatient")
    if config.first not in names:
        raise ValueError(f"first is {config.first!r}, the agents are {', '.join(names)}; choose one of them")
    if not config.seeds or min(config.seeds) < 0 or config.timings < 1 or config.timed < 0:
        raise ValueError(
            f"name at least one seed, 0 or more (seeds: {list(config.seeds)}), and at least one of timings "
            f"({config.timings}); timed ({config.timed}) is 0 or more"
        )
    names.sort(key=lambda name: (name != config.first, name not in config.departures, name))
    shared = folder / "shared"
    seeds = {name: dict.fromkeys([*config.seeds, *more_seeds.get(name, [])]) for name in names}
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
        for seed in (config.seeds[:1] if name in config.untrained else seeds[name])
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


def make_as_configured(config: DictConfig, folder: Path, agent: str) -> None:
    """Make the run of `config` in `folder`, in this process and with one thread unless `threads` says otherwise.

    Its log is `log.txt` there; what goes wrong is kept there too, see `Run.failed`.
    """
    threads = torch.get_num_threads()
    try:
        with (
            run_folder(config, folder, TRAINING) as begin,
            (folder / LOG).open("w") as log,
            redirect_stdout(log),
            redirect_stderr(log),
        ):
            (folder / FAILED).unlink(missing_ok=True)
            try:
                prepare(config, side_by_side=True)
                train_as_configured(config, folder, agent, begin)
            except Exception:
                logging.getLogger(__name__).exception("run failed")
                raise
    except Exception as error:  # whatever it is, the other runs go on
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FAILED, f"{type(error).__name__}: {error}\n")
    finally:
        torch.set_num_threads(threads)
