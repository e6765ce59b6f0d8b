"""The jobs of a multirun: which there are, how each ended, and the command for each that is not done.

Launchers tell failures in ways of their own, and some call what was lost completed. So every job keeps a record in the
multirun's folder, `jobs/*.json`: it waits, is begun, done or failed. A job that was killed has begun and not ended; one
whose node was gone before waits.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from envs.storage import write_text
from experiments.common.continuing import ALWAYS_MAY_DIFFER
from experiments.common.help import CONF
from experiments.common.locks import writer_of
from experiments.common.stopping import Progress, command_to_go_on, near, quoted

JOBS = "jobs"
"""In a multirun's folder: the records of its jobs."""
SHARDS = "shards"
"""In a run's folder: the folders that its shards write in."""
PLUGINS = "hydra_plugins"
"""The namespace that launchers beyond Hydra's own are in."""
EXTRAS = {"joblib": "joblib", "ray": "ray", "ray_aws": "ray", "submitit_slurm": "slurm", "submitit_local": "slurm"}
"""Hydra's launchers that are no part of Hydra, and the extra that installs each."""


@dataclass(frozen=True)
class Job:
    """One job of a multirun.

    Attributes:
        program: its name.
        overrides: the settings it is given.
        state: how far it has come.
        folder: of its run, from the multirun's; None before it has begun.
        place: the folder that it alone writes in, where shards share that of the run.
        said: what went wrong.
    """

    program: str
    overrides: tuple[str, ...]
    state: Literal["waiting", "begun", "done", "failed"] = "waiting"
    folder: str | None = None
    place: str | None = None
    said: str | None = None

    @property
    def name(self) -> str:
        """Of its record: the same wherever and how fast the job is made."""
        same = [one for one in self.overrides if _key(one) not in ALWAYS_MAY_DIFFER]
        return f"{hashlib.sha256(json.dumps(same).encode()).hexdigest()[:16]}.json"

    def keep(self, multirun: Path) -> None:
        """Write the record, in place of what stood there."""
        write_text(multirun / JOBS / self.name, json.dumps(asdict(self)) + "\n")

    def command(self, multirun: Path, folder: Path) -> str:
        """Makes this job alone.

        Args:
            multirun: its folder.
            folder: of the run.
        """
        places = [f"hydra.sweep.dir={quoted(near(multirun))}", f"hydra.run.dir={quoted(near(folder))}"]
        return shlex.join(["python", "-m", f"experiments.{self.program}", *self.overrides, "hydra.mode=RUN", *places])


def own(overrides: Iterable[str]) -> tuple[str, ...]:
    """The settings of a job, without what launched it."""
    return tuple(one for one in overrides if _key(one) != "launcher")


def jobs_of(multirun: Path) -> list[Job]:
    """The jobs that a multirun's folder has records of, by their settings.

    Raises:
        ValueError: a record cannot be read.
    """
    jobs = []
    for path in (multirun / JOBS).glob("*.json"):
        try:
            kept = json.loads(path.read_text())
            jobs.append(Job(**{**kept, "overrides": tuple(kept["overrides"])}))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no record of a job; delete it, and start the multirun again") from error
    return sorted(jobs, key=lambda job: job.overrides)


class PlanJobs(Callback):
    """Writes down the jobs of a multirun before the first is begun; Hydra calls it."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            plan.begin(config)
        except ValueError as error:  # Hydra would make a warning of it
            raise SystemExit(f"{error}") from error
        except OSError:
            return  # what Hydra itself writes there next fails too, and is said


class Plan:
    """The multirun that this process launches.

    Attributes:
        progress: of the program, told of the multirun's folder.
        folder: of the multirun; None where there is none.
        names: of the records of its jobs.
    """

    def __init__(self, progress: Progress | None = None) -> None:
        self.progress = progress or Progress()
        self.folder: Path | None = None
        self.names: list[str] = []
        self._config: DictConfig | None = None
        self._loader: ConfigLoader | None = None

    def begin(self, config: DictConfig) -> None:
        """Write a record of each job; where one was begun before stays known."""
        self._config, self._loader = config, GlobalHydra.instance().config_loader()
        folder, program = absolute_sweep(config), f"{config.hydra.job.name}"
        command = command_to_go_on(program, sys.argv[1:], "hydra.sweep.dir", folder)
        self.folder, self.progress.folder, self.progress.command = folder, folder, command
        self.names = []
        if not f"{config.hydra.sweeper._target_}".endswith(".BasicSweeper"):
            return  # which jobs there are is found out on the way
        before = {job.name: job for job in jobs_of(folder)}
        for overrides in combinations(config, self._loader):
            job = Job(program, own(overrides))
            if job.name in before:
                job = replace(job, folder=before[job.name].folder, place=before[job.name].place)
            job.keep(folder)
            self.names.append(job.name)

    @property
    def jobs(self) -> list[Job]:
        """As far as they have come."""
        return [job for job in jobs_of(self.folder) if job.name in self.names] if self.folder is not None else []

    def unfinished(self) -> list[str]:
        """In words, each job that is not done, with the command that makes it."""
        return [self._said(job) for job in self.jobs if job.state != "done"]

    def forget(self) -> None:
        """Take back the records of jobs that were never begun, where the whole multirun is refused."""
        for job in self.jobs:
            if job.state == "waiting" and job.folder is None and self.folder is not None:
                (self.folder / JOBS / job.name).unlink(missing_ok=True)

    def _said(self, job: Job) -> str:
        assert self.folder is not None
        folder = self.folder / job.folder if job.folder is not None else self._folder_of(job)
        place = folder if job.place is None else self.folder / job.place
        holder = writer_of(place)
        if job.state == "failed":
            state = f"failed: {job.said}"
        elif holder is not None:
            state = f"is at work still: {holder}"
        else:
            state = "was lost on the way" if job.state == "begun" else "was not begun"
        return f"{near(place)} {state}\n  {job.command(self.folder, folder)}"

    def _folder_of(self, job: Job) -> Path:
        """Where a job that was not begun would have its folder."""
        assert self._loader is not None
        assert self._config is not None
        assert self.folder is not None
        # settings of the launcher, which Hydra takes over, are none of another one's
        launching = [one for one in self._config.hydra.overrides.task if _key(one) == "launcher"]
        config = self._loader.load_sweep_config(self._config, [*launching, *job.overrides])
        HydraConfig.instance().set_config(config)
        return self.folder / f"{config.hydra.sweep.subdir}"


plan = Plan()
"""Of this process: Hydra makes a callback itself, so that nothing can be handed to it."""


def absolute_sweep(config: DictConfig) -> Path:
    """Name the multirun's folder from the root, for jobs that are not begun where this process was.

    Args:
        config: of the multirun, with what is Hydra's; changed in place.
    """
    folder = Path(config.hydra.sweep.dir).absolute()
    kept = [one for one in config.hydra.overrides.hydra if _key(one) != "hydra.sweep.dir"]
    with flag_override(config.hydra, ["readonly", "struct"], False):
        config.hydra.sweep.dir = f"{folder}"
        config.hydra.overrides.hydra = [*kept, f"hydra.sweep.dir={quoted(folder)}"]
    return folder


def combinations(config: DictConfig, loader: ConfigLoader) -> Iterator[tuple[str, ...]]:
    """The settings of each job of Hydra's own sweeper, as it hands them to the launcher."""
    params: Any = OmegaConf.to_container(config.hydra.sweeper.params or OmegaConf.create())
    given = [f"{key}={value}" for key, value in params.items()]
    values: dict[str, list[str]] = {}
    for override in OverridesParser.create(loader).parse_overrides([*given, *config.hydra.overrides.task]):
        key = override.get_key_element()
        if override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
    return itertools.product(*values.values())


class Recorded:
    """The record of the job that this process is at; none where it is no job of a multirun.

    Args:
        about: Hydra's part of the configuration.
        program: its name.
        place: the folder that this job alone writes in.
    """

    def __init__(self, about: Any, program: str, place: Path) -> None:
        self.is_job = about.mode is not None and about.mode.name == "MULTIRUN"
        self.folder = Path(about.sweep.dir)
        self._job = Job(
            program,
            own(about.overrides.task),
            folder=os.path.relpath(about.runtime.output_dir, self.folder),
            place=os.path.relpath(place, self.folder),
        )

    def __call__(self, state: Literal["begun", "done", "failed"], said: str | None = None) -> None:
        """Write down how far it has come."""
        if self.is_job:
            replace(self._job, state=state, said=said).keep(self.folder)


def shard_folder(config: DictConfig, folder: Path) -> Path:
    """The folder that a run alone writes in: its own, or where it makes one shard of several, one below it.

    Args:
        config: of the run; `shard` of `shards`, where its program has any.
        folder: of the run, which all shards share.

    Raises:
        ValueError: there is no such shard.
    """
    shards, shard = config.get("shards", 1), config.get("shard")
    if not isinstance(shards, int) or shards < 1:
        raise ValueError(f"shards must be a whole number, at least 1, is {shards}")
    if shard is None:
        return folder
    if not isinstance(shard, int) or not 0 <= shard < shards:
        raise ValueError(
            f"there is no shard {shard} of {shards}; they are numbered 0 to {shards - 1} (shards=N shard=k)"
        )
    return shard_folders(folder, shards)[shard]


def shard_folders(folder: Path, shards: int) -> list[Path]:
    """The folders that the shards of a run write in, in order."""
    return [folder / SHARDS / f"{shard}-of-{shards}" for shard in range(shards)]


def missing_shards_said(program: str, config: DictConfig, folder: Path, missing: Sequence[int]) -> str:
    """That some shards of a run are missing, with the command that makes each.

    Args:
        program: its name.
        config: of the run.
        folder: of the run.
        missing: numbers of the shards.
    """
    given = [one for one in own(HydraConfig.get().overrides.task) if _key(one) not in ("shard", "shards")]
    lines = []
    for shard in missing:
        words = [*given, f"shards={config.shards}", f"shard={shard}", f"hydra.run.dir={quoted(near(folder))}"]
        lines.append(f"  {shlex.join(['python', '-m', f'experiments.{program}', *words])}")
    return "\n".join(
        [f"{folder} lacks {len(lines)} of {config.shards} shards, each of which its command makes:", *lines]
    )


def with_launcher(program: str, arguments: Sequence[str]) -> list[str]:
    """A command line that chooses the basic launcher where its program would take joblib's, which is not installed.

    Args:
        program: its name.
        arguments: of its command line; a launcher that they name is left as it is.
    """
    # without any launcher beyond Hydra's own there is no such namespace either
    installed = find_spec(PLUGINS) is not None and find_spec(f"{PLUGINS}.hydra_joblib_launcher") is not None
    if installed or any(_key(one) == "launcher" for one in arguments):
        return list(arguments)
    config: Any = OmegaConf.to_container(OmegaConf.load(CONF / f"{program}.yaml"))
    if not any(entry.get("override launcher") == "joblib" for entry in config["defaults"] if isinstance(entry, dict)):
        return list(arguments)
    return ["launcher=basic", *arguments]  # in front: Hydra takes no overrides after an option


def missing_extra(error: BaseException) -> str | None:
    """What is said where a launcher is asked for that is not installed; None where `error` says something else."""
    wanted = getattr(error, "missing_cfg_file", None)
    names = [wanted] if isinstance(wanted, str) else wanted if isinstance(wanted, Sequence) else []
    for name in names:
        launcher = f"{name}".removeprefix("hydra/launcher/")
        extra = EXTRAS.get(launcher)
        if launcher != name and extra is not None:
            return (
                f"Hydra's launcher {launcher!r} is not installed; it comes with an extra: pip install "
                f"'citer-gym[{extra}]', in a checkout pip install -c constraints.txt -e '.[{extra}]'; launcher=basic "
                "needs none"
            )
    return None


def _key(override: str) -> str:
    """The setting that an override is of."""
    return override.partition("=")[0].lstrip("+")
