"""The results of one track: a file an agent and seed, never rewritten, with policies and traces beside them.

experiments/results/arithmetic/
    citer-seed0.parquet       answers problem by problem, and all that made them
    baselines-tree.parquet    each model alone, speculative decoding, the oracle
    policies/citer-seed0/     the policy as it was saved
    traces/citer-seed0.parquet    of the operating point for 95 %: all problems, or the canaries
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.errors import HydraException
from omegaconf import OmegaConf

from envs.storage import copy_files, write_text, write_whole
from experiments.common.continuing import SETTINGS, TRAINING
from experiments.evaluation.kept import SHIPPED
from experiments.published.run_file import (
    RUNS,
    PublishedRun,
    pack_baselines,
    same_baselines,
    unpack_baselines,
)
from experiments.traces.trace import SUFFIX, read_trace, write_trace
from experiments.training.many import Run

CANARIES = 8
"""Problems, the first ones, of which every run's trace is shipped: whether engine and policy are still those that made
a run is told by them."""
BASELINES = "baselines-"
SEED = re.compile(r"-seed\d+$")
"""Behind the agent in the name of a run."""


@dataclass(frozen=True)
class Store:
    """The results of a track.

    Args:
        folder: of them; it need not be there yet.
    """

    folder: Path

    def row(self, run: Run) -> Path:
        """The file of a run."""
        return self.folder / f"{run.name}{SUFFIX}"

    def has(self, run: Run) -> bool:
        """Whether a run is among them."""
        return self.row(run).is_file()

    def rows(self) -> list[Path]:
        """The files of all runs, by name."""
        return [path for path in sorted(self.folder.glob(f"*{SUFFIX}")) if SEED.search(path.stem)]

    def check_settings(self, runs: Sequence[Run]) -> None:
        """Refuse runs that are there and were made by other settings than these.

        Raises:
            ValueError: the error names the file, and what differs.
        """
        for run in filter(self.has, runs):
            here: Any = OmegaConf.to_container(run.config(), resolve=True)
            there = PublishedRun.read(self.row(run)).settings
            others = TRAINING.others(there, here)
            if others:  # a setting that came later was never set: its default is what made the run
                here["agent"] = _known_to(there["agent"], here["agent"], _defaults(run, here["agent"]["_target_"]))
                others = TRAINING.others(there, here)
            if others:
                raise ValueError(
                    f"{self.row(run)} was made with {'; '.join(others)}: results are never rewritten; delete it to "
                    "make it anew, or keep the settings that made it"
                )

    def add(self, run: Run, made_on: dict[str, object], whole_trace: bool) -> None:
        """Add a run that is complete.

        Args:
            run: it.
            made_on: the machine and the commit.
            whole_trace: ship the trace of all problems at its operating point; of the canaries alone otherwise.

        Raises:
            ValueError: it is there already, is not complete, or was compared with other baselines.
        """
        if self.has(run):
            raise ValueError(f"{self.row(run)} is there already, and is never rewritten")
        published = PublishedRun.of(run.folder, run.agent, made_on)
        runs, baselines = run.folder / RUNS, self.baselines_of(published)
        if baselines.is_file() and (piece := same_baselines(runs, baselines)) is not None:
            raise ValueError(
                f"{run.folder} was measured beside another {piece} than {baselines} holds: other models or another "
                "engine made it; delete one of them"
            )
        if not baselines.is_file():
            copy_files(run.shared_baselines, self._traces(baselines), f"*{SUFFIX}")
            pack_baselines(run.shared_baselines, baselines)
        copy_files(run.folder / "policy", self._policy(run.name))
        traced = runs / f"{published.traced}{SUFFIX}"
        if traced.is_file():
            _copy_trace(traced, self._trace(run.name), None if whole_trace else CANARIES)
        published.write(self.row(run))

    def unpack(
        self, name: str, published: PublishedRun, folder: Path, episodes: int | None = None, baselines: bool = False
    ) -> None:
        """Write a run as the folder it had, with the trace that came with it.

        Args:
            name: of its file, without the ending.
            published: what the file holds.
            folder: of the run.
            episodes: how many of the trace at most; all where None.
            baselines: write the traces of the baselines too.
        """
        runs, shipped, of = folder / RUNS, {}, self.baselines_of(published)
        unpack_baselines(of, runs)
        if baselines:
            for path in sorted(self._traces(of).glob(f"*{SUFFIX}")):
                shipped[path.stem] = _copy_trace(path, runs / path.name, episodes)
        copy_files(self._policy(name), folder / "policy")
        if self._trace(name).is_file():
            place = runs / f"{published.traced}{SUFFIX}"
            shipped[published.traced] = _copy_trace(self._trace(name), place, episodes)
        write_text(runs / SHIPPED, json.dumps(shipped, indent=1) + "\n")
        # so that runs with and without a setting that came later are runs of one agent
        settings = OmegaConf.to_yaml(OmegaConf.create(_completed(published.settings)))
        replace(published, texts={**published.texts, SETTINGS: settings}).unpack(folder)

    def unpack_all(self, folder: Path, agents: Sequence[str] = ()) -> None:
        """Write every run into a folder of its own below `folder`.

        Args:
            folder: it need not be there.
            agents: whose runs alone are wanted; all where empty.

        Raises:
            ValueError: a file is damaged.
        """
        seen: set[Path] = set()
        for path in self.rows():
            if agents and SEED.sub("", path.stem) not in agents:
                continue
            published = PublishedRun.read(path)
            of = self.baselines_of(published)
            self.unpack(path.stem, published, folder / path.stem, baselines=of not in seen)
            seen.add(of)

    def restore_baselines(self, runs: Sequence[Run]) -> None:
        """Write the baselines where runs share them."""
        for place, live in {run.shared_baselines: run.live for run in runs}.items():
            path = self._baselines_made(live)
            if path.is_file() and not place.is_dir():
                unpack_baselines(path, place)
                copy_files(self._traces(path), place, f"*{SUFFIX}")

    def baselines_of(self, published: PublishedRun) -> Path:
        """The file of the baselines that a run stands beside."""
        return self._baselines_made(published.manifest["timed"])

    def _baselines_made(self, live: bool) -> Path:
        """The file of the baselines that were decoded live, or through a replay tree."""
        return self.folder / f"{BASELINES}{'live' if live else 'tree'}{SUFFIX}"

    def _traces(self, baselines: Path) -> Path:
        return self.folder / "traces" / baselines.stem

    def _policy(self, name: str) -> Path:
        return self.folder / "policies" / name

    def _trace(self, name: str) -> Path:
        return self.folder / "traces" / f"{name}{SUFFIX}"


def tracks_in(folder: Path) -> list[Path]:
    """The folders of results: `folder` itself where it is one, or else those below it."""
    below = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    found = [path for path in below if Store(path).rows()]
    return found[:1] if folder in found else found


def _copy_trace(path: Path, to: Path, episodes: int | None) -> int:
    """Copy the first episodes of a trace; how many there are then."""
    trace = read_trace(path)
    if episodes is None or len(trace.episodes) <= episodes:
        write_whole(to, partial(shutil.copyfile, path))
        return len(trace.episodes)
    write_trace(to, replace(trace, episodes=trace.episodes[:episodes]))
    return episodes


def _defaults(run: Run, kind: str) -> dict[str, Any]:
    """The settings of a run's agent, of the class `kind`, where none is set."""
    alone = tuple(change for change in run.overrides if not change.lstrip("+").startswith("agent."))
    config: Any = OmegaConf.to_container(replace(run, agent=kind, overrides=alone).config(), resolve=True)
    return dict(config["agent"])


@cache
def _defaults_of(kind: str) -> dict[str, Any]:
    """The settings of an agent of the class `kind` where none is set; none where that class is not here."""
    try:
        return _defaults(Run("citer", 0, (), Path(), Path()), kind)
    except (HydraException, ValueError):  # of somebody else's
        return {}


def _completed(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run, with the defaults of those that its agent was given later."""
    agent = settings["agent"]
    return {**settings, "agent": _filled(agent, _defaults_of(agent["_target_"]))}


def _filled(there: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    whole = {**defaults, **there}
    for key, default in defaults.items():
        old = whole[key]
        if isinstance(old, Mapping) and isinstance(default, Mapping) and old.get("_target_") == default.get("_target_"):
            whole[key] = _filled(old, default)
    return whole


def _known_to(there: Mapping[str, Any], here: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Settings without those that are not `there` and have their default."""
    known = {}
    for key, value in here.items():
        old, default = there.get(key), defaults.get(key)
        if key not in there and key in defaults and value == default:
            continue
        if isinstance(value, Mapping) and isinstance(old, Mapping) and isinstance(default, Mapping):
            value = _known_to(old, value, default)
        known[key] = value
    return known
