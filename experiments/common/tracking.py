"""Where rows of measurements go: always a JSON-lines file in the run's folder, and wandb if asked.

A run that is started again in its folder goes on in the same file and the same run of wandb. What it reports again, it
does not report twice: the row that was written first stays, and the one that comes again is skipped (see `Reported`).
"""

from __future__ import annotations

import json
import secrets
import time
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from agents.common.policy import Track
from envs.storage import write_text

METRICS = "metrics.jsonl"
COUNTERS = ("time/total_timesteps", "iteration", "epoch", "step")
"""What learners count their progress by; the first that stands in a row is the row's."""
LABELS = ("split", "agent", "run")
"""What says whose measurements a row holds."""


def labelled(track: Track, **labels: Any) -> Track:
    """A track whose rows also say whose they are: several learners report to one run."""
    return lambda row: track({**labels, **row})


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, none where there is no file; a last line that was cut off half-written is left out.

    Raises:
        ValueError: another line is no row; the error names it.
    """
    rows = []
    text = path.read_bytes().decode(errors="replace") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}, is no row of measurements ({error}); delete the line") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}, is no row of measurements: {line!r}; delete the line")
        rows.append(row)
    return rows


class Reported:
    """Tells which rows of a run that goes on had been reported before it was interrupted.

    A learner goes on from its last checkpoint, and reports again what lies between that and the interruption. A row
    that counts the learner's progress (COUNTERS) is known by that count. One at a count below the furthest that was
    reported is known too, whether it was reported at the very same count or not: rows stand at other steps where a
    learner goes on from a step of its own. Other rows are known by their columns, the n-th of them as the n-th.

    Args:
        rows: that were reported before.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]]) -> None:
        self._left: Counter[Hashable] = Counter()
        self._furthest: dict[Hashable, float] = {}
        for row in rows:
            series, count = _identity(row)
            self._left[series, count] += 1
            if count is not None:
                self._furthest[series] = max(count, self._furthest.get(series, count))

    def again(self, row: Mapping[str, Any]) -> bool:
        """Whether this row was reported before; each of those is told once."""
        series, count = _identity(row)
        if self._left[series, count]:
            self._left[series, count] -= 1
            return True
        new = (series, count) not in self._left
        return new and count is not None and count < self._furthest.get(series, count)


def _identity(row: Mapping[str, Any]) -> tuple[Hashable, float | None]:
    """The series a row belongs to, and its place in it where it counts any."""
    whose = tuple(str(row.get(label)) for label in LABELS)
    for counter in COUNTERS:
        if isinstance(row.get(counter), int | float):
            return (whose, counter), row[counter]
    return (whose, frozenset(row)), None


class Tracker:
    """Appends rows to `metrics.jsonl`; a context manager. Nothing is written before the first new row.

    Args:
        folder: of the run.

    Raises:
        ValueError: what stands in `metrics.jsonl` are no rows.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / METRICS
        before = read_rows(self.path)
        self.count = len(before)
        self._reported = Reported(before)
        self._file: IO[str] | None = None

    def __call__(self, row: Mapping[str, Any]) -> None:
        """Record one row of named numbers, visible on disk at once; one that was recorded before is skipped."""
        if not self._reported.again(row):
            self._record(row)

    def _record(self, row: Mapping[str, Any]) -> None:
        if self._file is None:
            self._file = self._opened()
        self._file.write(json.dumps(dict(row)) + "\n")
        self._file.flush()
        self.count += 1

    def _opened(self) -> IO[str]:
        """The file, to append to; a line that was cut off half-written is dropped."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = self.path.open("a+b")
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)
        file.close()
        return self.path.open("a")

    def rows(self) -> list[dict[str, Any]]:
        """All that was recorded, before the run was interrupted too."""
        return read_rows(self.path)

    def summary(self, values: Mapping[str, Any], images: Mapping[str, Path]) -> None:
        """Record what the run ended with."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Jsonl:
    """Track to `metrics.jsonl` alone."""

    def open(self, folder: Path, config: Mapping[str, Any], job: str) -> Tracker:
        """A tracker for one run."""
        return Tracker(folder)


WANDB_RUN = "wandb_run.json"
"""In a run's folder: which run of wandb it is, and how many seconds were worked on it."""
AXIS = "seconds"
"""The x-axis of everything in wandb: seconds that were worked on a run, all its starts together."""
NO_LOGIN = (
    "track.mode=online needs a login, and wandb knows of none here: run `wandb login`, or set WANDB_API_KEY; or leave "
    "track.mode=offline, and upload later with `wandb sync FOLDER/wandb/offline-run-*`"
)
TABLES: dict[str, list[str | int]] = {
    "reliability": ["score", "prefers_slm", "count"],
    "curve": ["cost", "accuracy"],
    "band": ["cost", "low", "high"],
    "table": ["policy", "measure", "value", "low", "high"],
}


@dataclass
class WandbRun:
    """The run of wandb that a folder's run is.

    Attributes:
        path: where this is kept.
        id: of the run.
        seconds: that were worked on it.
        new: whether wandb has not heard of it yet.
    """

    path: Path
    id: str
    seconds: float = 0.0
    new: bool = True

    @classmethod
    def of(cls, folder: Path) -> WandbRun:
        """The one of this folder, or a new one.

        Raises:
            ValueError: what is kept there names no run.
        """
        path = folder / WANDB_RUN
        if not path.is_file():
            return cls(path, secrets.token_hex(4))
        try:
            kept = json.loads(path.read_text())
            return cls(path, str(kept["id"]), float(kept["seconds"]), new=False)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} names no run of wandb; delete it, and this run becomes a new one there"
            ) from error

    def keep(self) -> None:
        write_text(self.path, json.dumps({"id": self.id, "seconds": round(self.seconds, 3)}) + "\n")


class WandbTracker(Tracker):
    """A tracker that mirrors to a wandb run.

    Measurements stand under the name of the learner's run, `round 1/loss`; what agents are compared by also stands
    under one name for all of them (`comparable`). All of it is drawn over `seconds`.

    Args:
        folder: of the run.
        run: of wandb.
        kept: which run that is.
        cost: the unit of costs that evaluations of a single policy are shown in; None where there are several.
    """

    def __init__(self, folder: Path, run: Any, kept: WandbRun, cost: str | None = None) -> None:
        super().__init__(folder)
        self._run, self._kept, self._cost = run, kept, cost
        self._begun = time.monotonic() - kept.seconds
        run.define_metric(AXIS)
        run.define_metric("*", step_metric=AXIS)
        if kept.new:
            for number, row in enumerate(self.rows()):  # what was recorded before wandb was asked for
                self._mirror(row, number)
        kept.keep()

    def _record(self, row: Mapping[str, Any]) -> None:
        super()._record(row)
        self._kept.seconds = time.monotonic() - self._begun
        self._mirror(row, self.count - 1)
        self._kept.keep()

    def _mirror(self, row: Mapping[str, Any], number: int) -> None:
        whose = dict.fromkeys(f"{row[label]}" for label in ("agent", "run") if row.get(label))
        prefix = "".join(f"{name}/" for name in whose)
        shown = {f"{prefix}{key}": _shown(value, key) for key, value in row.items() if key not in ("agent", "run")}
        # numbered as in metrics.jsonl: the numbers go on where a run does, which wandb's own begin at 0 again offline
        self._run.log({**shown, **comparable(row, self._cost), AXIS: self._kept.seconds}, step=number)

    def summary(self, values: Mapping[str, Any], images: Mapping[str, Path]) -> None:
        import wandb

        plain = dict(values)
        policies = plain.pop("policies", {})
        shown: dict[str, Any] = {name: wandb.Image(str(path)) for name, path in images.items()}
        for name, policy in policies.items():
            shown |= {f"{name}/{key}": _shown(policy[key], key) for key in ("curve", "band")}
            plain[name] = {key: policy[key] for key in ("cost_at", "measures") if key in policy}
        if policies:
            shown["table"] = _shown(table_rows(policies), "table")
        self._run.summary.update(plain)
        self._kept.seconds = time.monotonic() - self._begun
        self._run.log({**shown, AXIS: self._kept.seconds}, step=self.count)
        self._kept.keep()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        self._run.finish(exit_code=0 if kind is None else 1)


def comparable(row: Mapping[str, Any], cost: str | None) -> dict[str, float]:
    """What agents of all kinds are compared by, under the same names, as far as a row holds it.

    `training/`: the mean return, the share of right answers (accuracy), the LLM's share of the tokens, and what these
    cost a response, in right answers: accuracy less return. `evaluation/`: accuracy, LLM share and cost, in the unit
    `cost` and relative to LLM-only decoding, of the policy at one threshold after the other.
    """
    if row.get("threshold") is not None:
        if cost is None or f"cost_{cost}" not in row:
            return {}
        named = {"accuracy": "accuracy", "llm_share": "llm_share", "cost": f"cost_{cost}"}
        return {f"evaluation/{name}": row[key] for name, key in named.items()}
    returned = row.get("rollout/ep_rew_mean", row.get("return"))
    if returned is None:
        return {}
    accuracy = row.get("rollout/success_rate", row.get("accuracy"))
    measured = {
        "return": returned,
        "accuracy": accuracy,
        "llm_share": row.get("rollout/llm_share", row.get("llm_share")),
        "cost": None if accuracy is None else accuracy - returned,
    }
    return {f"training/{name}": value for name, value in measured.items() if value is not None}


def table_rows(policies: Mapping[str, Any]) -> list[list[Any]]:
    """Every measure of every policy with its interval: policy, measure, value, low, high."""
    return [
        [name, measure, shown["value"], *(shown["interval"] or (None, None))]
        for name, policy in policies.items()
        for measure, shown in policy["measures"].items()
    ]


def _shown(value: Any, key: str) -> Any:
    """A value as wandb shows it: rows of numbers as a table."""
    if key not in TABLES:
        return value
    import wandb

    return wandb.Table(columns=list(TABLES[key]), data=value)


def logged_in() -> bool:
    """Whether wandb has credentials; neither the user nor the server is asked."""
    import wandb

    try:
        return bool(wandb.login(prompt=False, verify=False))
    except wandb.errors.Error as error:  # credentials that cannot be any
        raise ValueError(f"wandb: {error}; run `wandb login`, or leave track.mode=offline") from error


@dataclass(frozen=True)
class Wandb:
    """Track to `metrics.jsonl` and to wandb.

    A run that is started again in its folder goes on in the same run of wandb, which `wandb_run.json` names. Offline,
    each start leaves files of its own of that run; `wandb sync FOLDER/wandb/offline-run-*` uploads them in order.

    Args:
        project: of the run.
        mode: `offline` (files only; `wandb sync` uploads them later), `online` or `disabled`.
        group: groups the runs of a multirun; the folder above the run's where None. A run is named as its folder.

    Raises:
        ValueError: the mode is unknown, or `online` without a login.
    """

    project: str = "citer-gym"
    mode: Literal["offline", "online", "disabled"] = "offline"
    group: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("offline", "online", "disabled"):
            raise ValueError(f"unknown track.mode {self.mode!r}; choose offline, online or disabled")
        # here, because settings are built before any model is loaded
        if self.mode == "online" and not logged_in():
            raise ValueError(NO_LOGIN)

    def open(self, folder: Path, config: Mapping[str, Any], job: str) -> Tracker:
        """A tracker for one run.

        Raises:
            ValueError: wandb cannot begin the run; the error says why.
        """
        import wandb

        kept = WandbRun.of(folder)
        read_rows(folder / METRICS)  # what is refused is refused before wandb hears of it
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run = wandb.init(
                project=self.project,
                mode=self.mode,
                group=self.group or folder.parent.name,
                name=folder.name,
                job_type=job,
                config=dict(config),
                dir=str(folder),
                id=kept.id,
                resume="allow",
                reinit="finish_previous",
            )
        except wandb.errors.Error as error:
            raise ValueError(f"wandb begins no run: {error}; track.mode=offline needs no connection") from error
        evaluated = config.get("evaluation", {}) if job == "train" else {}
        return WandbTracker(folder, run, kept, evaluated.get("cost"))
