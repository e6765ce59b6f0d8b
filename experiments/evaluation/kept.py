"""An evaluation as its folder keeps it, and what tells it from others: the program, the models, the task, settings."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from experiments.common.continuing import SETTINGS
from experiments.common.multirun import JOBS, SHARDS, jobs_of
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import EXHAUSTED, Baselines
from experiments.evaluation.operating_points import threshold_to_use

MANIFEST = "manifest.json"
CHOSEN = "thresholds.json"
"""All thresholds of each policy; written when the validation problems are answered at each."""
VALIDATED = "validation"
"""The folder of the answers to validation problems."""
SAME = ("models", "task", "split", "start", "examples", "max_new_tokens", "oracle", "draft_tokens", "thresholds_at")
"""What the manifests of one experiment agree in; not `thresholds_by`, which matters where drafts are checked alone."""
SHIPPED = "shipped.json"
"""In an evaluation that was unpacked: the pieces whose traces came with it, and how many episodes each holds."""


def settings_of_models(pool: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a pool that change what it writes; the others are of the machine."""
    return {key: pool.get(key) for key in ("names", "dtype")}


@dataclass(frozen=True)
class KeptEvaluation:
    """One evaluation on disk.

    Attributes:
        runs: the folder of its pieces.
        manifest: what made them.
        config: of the program that made it, which stands in the folder of the run; empty where there was none.
    """

    runs: Path
    manifest: Mapping[str, Any]
    config: Mapping[str, Any]

    @classmethod
    def read(cls, manifest: Path) -> KeptEvaluation:
        """The evaluation that a manifest describes."""
        run = run_folder(manifest.parent)
        config = run / SETTINGS
        return cls(manifest.parent, json.loads(manifest.read_text()), _yaml(config) if config.is_file() else {})

    @property
    def seed(self) -> int:
        """That its policies were trained with."""
        return int(self.manifest["seed"])

    @property
    def program(self) -> str:
        """That made it; empty where no program did."""
        return "train" if "agent" in self.config else "evaluate" if "agents" in self.config else ""

    @property
    def rows(self) -> Path:
        """The rows of its results."""
        return self.runs.parent / "results.jsonl"

    @cached_property
    def experiment(self) -> dict[str, Any]:
        """What must be the same in all evaluations that are compared, by name."""
        about: dict[str, Any] = {key: self.manifest.get(key) for key in SAME}
        if self.config:
            about["program"] = f"experiments.{self.program}"
            about["settings of the task"] = self.config.get("task")
            about["settings of the models"] = settings_of_models(self.config.get("models", {}))
        return about

    def settings(self, policy: str) -> dict[str, Any]:
        """The settings that made a policy, nested keys joined by dots; empty where they are not known."""
        if self.program == "train":
            return dict(flat(self.config["agent"]))
        if policy in self.config.get("saved", {}):
            return {"saved": self.config["saved"][policy]}
        return dict(flat(self.config.get("agents", {}).get(policy, {})))

    @property
    def thresholds_chosen(self) -> bool:
        """Whether validation problems were answered at all thresholds that operating points are chosen by."""
        return (self.runs / CHOSEN).is_file()

    @cached_property
    def thresholds(self) -> dict[str, list[float]]:
        """All thresholds of each policy."""
        text = (self.runs / CHOSEN).read_text() if self.thresholds_chosen else ""
        return dict(json.loads(text) if text else self.manifest["thresholds"])

    @cached_property
    def shipped(self) -> dict[str, int] | None:
        """Which traces came with an evaluation that was unpacked, see SHIPPED; None where it was made here."""
        path = self.runs / SHIPPED
        return dict(json.loads(path.read_text())) if path.is_file() else None

    def missing(self) -> Path | None:
        """The first piece that is not there; None where it is complete."""
        pieces = [self.runs / CHOSEN] if "quantiles" in self.manifest else []  # not so in evaluations of before
        pieces += [self.runs / EXHAUSTED, *(path for name in self.manifest["policies"] for path in self._paths(name))]
        return next((path for path in pieces if not path.is_file()), None)

    def answers(self, policy: str) -> list[Answers]:
        """A policy's answers at each of its thresholds."""
        return [Answers.load(path) for path in self._paths(policy)]

    def validated(self, policy: str) -> list[Answers | None] | None:
        """The same to the validation problems, where they were tried; None in evaluations that did not keep them."""
        paths = self._paths(policy, VALIDATED)
        return [Answers.load(path) if path.is_file() else None for path in paths] if self.thresholds_chosen else None

    def number_to_trace(self, policy: str) -> int:
        """The threshold whose trace ships: of the operating point for 95 %; if there is none, of most LLM tokens."""
        thresholds, tried = self.thresholds[policy], self.validated(policy)
        ends = Baselines.load(self.runs).validation
        chosen = None if tried is None or ends is None else threshold_to_use(tried, ends[1], "bytes")
        return thresholds.index(max(thresholds)) if chosen is None else chosen

    def _paths(self, policy: str, under: str = "") -> list[Path]:
        return [self.runs / under / policy / f"{i:02d}.safetensors" for i in range(len(self.thresholds[policy]))]


def run_folder(runs: Path) -> Path:
    """The folder of the run whose evaluation keeps its pieces in `runs`: training evaluates in a folder of its own."""
    return runs.parent if (runs.parent / SETTINGS).is_file() else runs.parent.parent


def kept_below(folder: Path) -> list[KeptEvaluation]:
    """All evaluations below a folder, by path; shards are parts of one."""
    found = sorted(folder.glob(f"**/runs/{MANIFEST}"))
    return [KeptEvaluation.read(path) for path in found if path.parents[2].name != SHARDS]


def not_evaluated_yet(folder: Path) -> list[Path]:
    """Runs below a folder that evaluate what they train, and have not come to it."""
    # the configs of Hydra's own folders and of wandb's lie deeper, and are of no run
    configs = (path for path in sorted(folder.glob(f"**/{SETTINGS}")) if path.parent.name not in (".hydra", "files"))
    return [
        path.parent
        for path in configs
        if _yaml(path).get("evaluate") is True and not (path.parent / "evaluation" / "runs" / MANIFEST).is_file()
    ]


def lost_jobs(folder: Path) -> list[str]:
    """In words, the jobs of multiruns at or below a folder that have left nothing: each a hole in what is compared."""
    lost = []
    for records in sorted(folder.glob(f"**/{JOBS}")):
        multirun = records.parent
        for job in jobs_of(multirun):
            if job.program not in ("train", "evaluate"):
                continue
            place = multirun / job.folder if job.folder is not None else None
            if place is None:
                lost.append(f"{multirun}: {' '.join(job.overrides)}")
            elif not (place / SETTINGS).is_file():
                lost.append(f"{place}: {job.said or 'was lost on the way'}\n    {job.command(multirun, place)}")
    return lost


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The settings inside a mapping, each with its key, which is joined by dots."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def told_apart(settings: Sequence[Mapping[str, Any]], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Of runs of one agent, the settings in which they differ.

    A `seed` that is the run's own in all of them is none. Where settings are not known nothing is told. Settings that
    some runs do not have are told only where the others do not tell these runs apart.

    Args:
        settings: of each run.
        seeds: of each run.

    Returns:
        What differs, for each run.
    """
    runs = [(one, seed) for one, seed in zip(settings, seeds, strict=True) if one]
    known = [one for one, _ in runs]
    keys = sorted({key for one in known for key in one})
    differing = [
        key
        for key in keys
        if any(one.get(key) != known[0].get(key) or (key in one) != (key in known[0]) for one in known)
        and not (key.split(".")[-1] == "seed" and all(one.get(key) == seed for one, seed in runs))
    ]
    everywhere = [key for key in differing if all(key in one for one in known)]
    # settings that came later are no part of a name, so long as the others tell as many runs apart
    if len({_told(one, everywhere) for one in known}) == len({_told(one, differing) for one in known}):
        differing = everywhere
    return [{key: one[key] for key in differing if key in one} for one in settings]


def _told(settings: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The values of some settings as one text; what is not there is as what is None."""
    return json.dumps([settings.get(key) for key in keys])


def _yaml(path: Path) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.load(path))
    return {str(key): value for key, value in plain.items()} if isinstance(plain, dict) else {}
