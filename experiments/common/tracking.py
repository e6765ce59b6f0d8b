"""Where rows of measurements go: always a JSON-lines file in the run's folder, and wandb if asked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self


class Tracker:
    """Appends rows to `metrics.jsonl`; a context manager."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / "metrics.jsonl").open("w")

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Record one row of named numbers; visible on disk at once."""
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()

    def summary(self, values: Mapping[str, Any], images: Mapping[str, Path]) -> None:
        """Record what the run ended with."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


class WandbTracker(Tracker):
    """A tracker that mirrors to a wandb run."""

    def __init__(self, folder: Path, run: Any) -> None:
        super().__init__(folder)
        self._run = run

    def __call__(self, row: Mapping[str, Any]) -> None:
        super().__call__(row)
        prefix = str(row.get("run", ""))
        self._run.log({f"{prefix}/{k}" if prefix else k: _shown(v, k) for k, v in row.items() if k != "run"})

    def summary(self, values: Mapping[str, Any], images: Mapping[str, Path]) -> None:
        import wandb

        plain = dict(values)
        for name, policy in plain.pop("policies", {}).items():
            self._run.log(
                {f"{name}/curve": _shown(policy["curve"], "curve"), f"{name}/band": _shown(policy["band"], "band")}
            )
            plain[name] = {key: policy[key] for key in ("cost_at", "measures")}
        self._run.summary.update(plain)
        self._run.log({name: wandb.Image(str(path)) for name, path in images.items()})

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._run.finish(exit_code=0 if kind is None else 1)


TABLES: dict[str, list[str | int]] = {
    "reliability": ["score", "prefers_slm", "count"],
    "curve": ["cost", "accuracy"],
    "band": ["cost", "low", "high"],
}


def _shown(value: Any, key: str) -> Any:
    """A value as wandb shows it: rows of numbers as a table."""
    if key not in TABLES:
        return value
    import wandb

    return wandb.Table(columns=list(TABLES[key]), data=value)


@dataclass(frozen=True)
class Jsonl:
    """Track to `metrics.jsonl` alone."""

    def open(self, folder: Path, config: Mapping[str, Any], job: str) -> Tracker:
        """A tracker for one run."""
        return Tracker(folder)


@dataclass(frozen=True)
class Wandb:
    """Track to `metrics.jsonl` and to wandb.

    Args:
        project: of the run.
        mode: `offline` (files only; `wandb sync` uploads them later), `online` or `disabled`.
        group: groups the runs of a multirun; the folder above the run's where None.
    """

    project: str = "citer-gym"
    mode: Literal["offline", "online", "disabled"] = "offline"
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "disabled"):
            raise ValueError(f"unknown track.mode {self.mode!r}; choose offline, online or disabled")

    def open(self, folder: Path, config: Mapping[str, Any], job: str) -> Tracker:
        """A tracker for one run."""
        import wandb

        run = wandb.init(
            project=self.project,
            mode=self.mode,
            group=self.group or folder.parent.name,
            name=folder.name,
            job_type=job,
            config=dict(config),
            dir=str(folder),
            reinit="finish_previous",
        )
        return WandbTracker(folder, run)
