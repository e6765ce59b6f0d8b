"""Training runs on Hydra's launchers: in this process, in several of this machine, on a cluster."""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hydra._internal.callbacks import Callbacks  # Hydra has no other way to its launchers
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import env_override
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, flag_override

from envs.progress import ProgressBar
from experiments.common.stopping import end_with, quoted
from experiments.training.many import FAILED, LOG, Run, make_as_configured
from experiments.training.run import SUMMARY

PATIENCE = 0.5
"""Seconds after which it is looked again what is done."""
Made = Callable[[Run], None]


@dataclass(frozen=True)
class MakeRun:
    """What a launcher calls with the configuration of a run, in whichever process.

    Attributes:
        place: the folder that relative paths are meant from.
        launched_by: the number of the process that launches.
        after: what runs wait for, by their folders; see `Run.after`.
    """

    place: Path
    launched_by: int
    after: Mapping[Path, tuple[Path, Path]]

    def __call__(self, config: DictConfig) -> None:
        about = HydraConfig.get()
        os.chdir(self.place)
        end_with(self.launched_by)
        folder = Path(about.runtime.output_dir)
        if folder in self.after:
            file, maker = self.after[folder]
            while not any(path.exists() for path in (file, maker / SUMMARY, maker / FAILED)):
                time.sleep(PATIENCE)
        make_as_configured(config, folder, about.runtime.choices["agent"])


def make_all(runs: Sequence[Run], folder: Path, made: Made = lambda run: None, first_alone: bool = True) -> None:
    """Make the runs that are not there yet, by the launcher that this program was started with.

    Args:
        runs: all of them.
        folder: that theirs lie in.
        made: called with each that is done, in this process, in a thread.
        first_alone: where none is there, make the first alone: it makes what all share.

    Raises:
        ValueError: some failed; the error names them and what they said.
    """
    missing = [run for run in runs if not run.done]
    for run in missing:
        (run.folder / FAILED).unlink(missing_ok=True)
    first = int(first_alone and len(missing) == len(runs))
    parts = [part for part in (missing[:first], missing[first:]) if part]
    lost = ""
    with (
        ProgressBar(total=len(runs), initial=len(runs) - len(missing), desc="runs", mininterval=5) as progress,
        _watched(missing, made, progress),
    ):
        for part in parts:
            try:
                _launch(part, folder)
            except Exception as error:  # a launcher that has lost a job says so in its own way
                lost = f"{type(error).__name__}: {f'{error}'.strip().partition(chr(10))[0]}"
    failed = {f"{run.agent} with seed {run.seed} ({run.folder / LOG})": run.failed for run in missing if not run.done}
    if failed:
        lines = "\n".join(f"  {name}: {said or lost or 'was lost on the way'}" for name, said in failed.items())
        raise ValueError(f"{len(failed)} runs failed; the others are kept, and are not made again:\n{lines}")


@contextmanager
def _watched(runs: Sequence[Run], made: Made, progress: ProgressBar) -> Iterator[None]:
    """Call `made` with each run as soon as it is done: a launcher says nothing before all are.

    Raises:
        Exception: what `made` raised, in the end.
    """
    ended, raised = threading.Event(), []
    waiting = list(runs)

    def look() -> None:
        for run in [run for run in waiting if run.done]:
            waiting.remove(run)
            made(run)
            progress.update()

    def watch() -> None:
        try:
            while not ended.wait(PATIENCE):
                look()
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    if raised:
        raise raised[0]
    look()


def _launch(runs: Sequence[Run], folder: Path) -> None:
    """Hand runs to the launcher, and wait until it has done with them.

    Raises:
        Exception: whatever the launcher raises where a job is lost.
    """
    here, launching, own = HydraConfig.instance(), HydraConfig.get().launcher, HydraConfig.instance().cfg
    loader = GlobalHydra.instance().config_loader()
    root = folder.absolute()
    # what runs print goes to their logs; the launchers' own lines say nothing that the bar does not
    quiet = ["hydra.job_logging.root=null", "hydra.hydra_logging.root=null"]
    config = loader.load_configuration("train", [f"hydra.sweep.dir={quoted(root)}", *quiet], RunMode.MULTIRUN)
    with flag_override(config.hydra, ["readonly", "struct"], False):
        config.hydra.launcher = launching
    after = {run.folder.absolute(): run.after for run in runs if run.after}
    launcher = Plugins.instance().instantiate_launcher(
        hydra_context=HydraContext(config_loader=loader, callbacks=Callbacks(config)),
        task_function=MakeRun(Path.cwd(), os.getpid(), after),
        config=config,
    )
    jobs = [[*run.settings, f"hydra.sweep.subdir={quoted(run.folder.absolute().relative_to(root))}"] for run in runs]
    levels = {name: logging.getLogger(name).level for name in ("hydra", "hydra_plugins")}
    for name in levels:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        # torch's own threads would wait for each other where processes share the cores
        with env_override({"OMP_NUM_THREADS": "1"}):
            launcher.launch(jobs, initial_job_idx=0)
    finally:
        _free_processes()
        here.cfg = own  # a launcher that makes runs in this process leaves the last one's
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _free_processes() -> None:
    """End joblib's processes, which it keeps for a while, and their models with them: seconds are measured next."""
    if (loky := sys.modules.get("joblib.externals.loky")) is not None:
        loky.get_reusable_executor().shutdown(kill_workers=True)
