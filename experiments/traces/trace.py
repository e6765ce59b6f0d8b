"""Traces in memory and on disk: the episodes of one decoding, with what made them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from agents.common.rollout import Episode
from envs.arrays import BoolArray, FloatArray, IntArray
from envs.costs import COLUMNS as LEDGER_COLUMNS
from envs.costs import ModelProfile
from envs.decoding.observation import TakenBack
from envs.storage import write_whole
from experiments.traces.schema import COLUMNS, LEDGER, SCHEMA, arrow_schema, example_hash

SUFFIX = ".parquet"
HEAD = (
    "schema", "environment", "decoding", "settings", "hardware", "threads", "models", "model_fingerprints", "profiles",
    "policy", "policy_fingerprint", "policy_profile", "per_response", "threshold", "task", "split",
)  # fmt: skip
"""The columns in which all episodes of a file are alike."""


SETTINGS = ("start", "max_new_tokens", "end_tokens", "rows", "gather", "timed")
"""What the settings of every trace hold; those of some decodings hold more."""


@dataclass(frozen=True)
class Head:
    """What all episodes of one decoding have in common; each field is the column of its name in `COLUMNS`."""

    environment: str
    decoding: str
    settings: Mapping[str, Any]
    hardware: str
    threads: int
    models: Sequence[str]
    model_fingerprints: Sequence[str]
    profiles: Sequence[ModelProfile]
    policy: str
    policy_fingerprint: str | None
    policy_profile: ModelProfile | None
    per_response: bool
    threshold: float | None
    task: str
    split: str

    def row(self) -> dict[str, Any]:
        """As the file has it."""
        sizes = self.policy_profile
        return {
            **{name: getattr(self, name) for name in HEAD if name != "schema"},
            "schema": SCHEMA,
            "settings": json.dumps(dict(self.settings), sort_keys=True),
            "profiles": json.dumps([asdict(profile) for profile in self.profiles]),
            "policy_profile": None if sizes is None else json.dumps(asdict(sizes)),
            "models": list(self.models),
            "model_fingerprints": list(self.model_fingerprints),
        }

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Head:
        """What `row` gave, as it is read again."""
        sizes, settings = row["policy_profile"], json.loads(row["settings"])
        missing = [name for name in SETTINGS if name not in settings]
        if missing:
            raise ValueError(f"its settings lack {', '.join(missing)}")
        changed = {
            "settings": settings,
            "profiles": [ModelProfile(**profile) for profile in json.loads(row["profiles"])],
            "policy_profile": None if sizes is None else ModelProfile(**json.loads(sizes)),
        }
        return cls(**{name: row[name] for name in HEAD if name != "schema"} | changed)


@dataclass(frozen=True)
class TracedEpisode:
    """One episode of a trace; each field is the column of its name in `COLUMNS`.

    A ledger is (models, COLUMNS) of `envs.costs`, decisions are (COLUMNS,).
    """

    episode: int
    example: str
    example_hash: str
    prompt: IntArray
    response: IntArray
    text: str
    writers: npt.NDArray[np.int8]
    scores: npt.NDArray[np.float32]
    taken_back: Sequence[TakenBack]
    ledger: FloatArray
    decisions: FloatArray
    correct: bool
    terminated: bool


@dataclass(frozen=True)
class Trace:
    """The episodes of one decoding.

    Attributes:
        head: what they have in common.
        episodes: in the order of the problems.
    """

    head: Head
    episodes: Sequence[TracedEpisode]

    @property
    def correct(self) -> BoolArray:
        """The verdicts, (episodes,)."""
        return np.array([episode.correct for episode in self.episodes], dtype=bool)


def traced(number: int, episode: Episode, prompt: IntArray, decided: bool = True) -> TracedEpisode:
    """A decoded episode as traces hold it.

    Args:
        number: of the episode.
        episode: that was decoded.
        prompt: its token ids, (n,).
        decided: whether a policy scored its tokens.
    """
    return TracedEpisode(
        episode=number,
        example=episode.example.id,
        example_hash=example_hash(episode.example),
        prompt=prompt,
        response=episode.tokens,
        text=episode.text,
        writers=episode.writers,
        scores=episode.scores if decided else episode.scores[:0],
        taken_back=episode.taken_back,
        ledger=episode.ledger,
        decisions=episode.decisions,
        correct=bool(episode.correct),
        terminated=bool(episode.terminated),
    )


def write_trace(path: Path, trace: Trace) -> None:
    """Write a Parquet file, whole or not at all; the same trace gives the same bytes.

    Raises:
        OSError: it cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    head = trace.head.row()
    rows = [_row(episode) for episode in trace.episodes]
    columns = {
        column.name: [head[column.name]] * len(rows) if column.name in HEAD else [row[column.name] for row in rows]
        for column in COLUMNS
    }
    table = pa.table(columns, schema=arrow_schema())
    how = {"compression": "zstd", "compression_level": 9, "write_page_checksum": True, "write_statistics": False}
    write_whole(path, lambda partial: pq.write_table(table, partial, **how))


def read_trace(path: Path) -> Trace:
    """Read what `write_trace` wrote.

    Raises:
        ValueError: the file is damaged, of another format, or of several decodings; the error names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{path} is no readable trace: {error}") from error
    numbers = set(table.column("schema").to_pylist()) if "schema" in table.column_names else {None}
    if numbers != {SCHEMA}:
        raise ValueError(f"{path} is a trace of format {_words(numbers)}; this version reads format {SCHEMA}")
    if not table.schema.equals(arrow_schema()):
        raise ValueError(f"{path} is damaged: its columns are not those of format {SCHEMA}")
    try:
        heads = {json.dumps(row, sort_keys=True) for row in table.select(list(HEAD)).to_pylist()}
        if len(heads) != 1:
            raise ValueError("its episodes are not of one decoding: they differ in what stands before the problem")
        head = Head.of_row(json.loads(heads.pop()))
        return Trace(head, [_episode(row) for row in table.drop_columns(list(HEAD)).to_pylist()])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _row(episode: TracedEpisode) -> dict[str, Any]:
    row = {column.name: getattr(episode, column.name) for column in COLUMNS if column.name not in HEAD}
    gone = [
        {"position": one.position, "writer": one.writer, "tokens": np.asarray(one.tokens, dtype=np.int32)}
        for one in episode.taken_back
    ]
    narrow = {name: np.asarray(row[name], dtype=np.int32) for name in ("prompt", "response")}
    ledger = [_entry(entry) for entry in episode.ledger]
    return row | narrow | {"taken_back": gone, "ledger": ledger, "decisions": _entry(episode.decisions)}


def _entry(values: FloatArray) -> dict[str, float]:
    return {name: float(values[column]) for name, column in LEDGER.items()}


def _episode(row: Mapping[str, Any]) -> TracedEpisode:
    empty = sorted(name for name, value in row.items() if value is None)
    if empty:
        raise ValueError(f"episode {row['episode']} has no {', '.join(empty)}")
    gone = [TakenBack(o["position"], o["writer"], np.array(o["tokens"], dtype=np.int64)) for o in row["taken_back"]]
    return TracedEpisode(
        **{
            **row,
            "prompt": np.array(row["prompt"], dtype=np.int64),
            "response": np.array(row["response"], dtype=np.int64),
            "writers": np.array(row["writers"], dtype=np.int8),
            "scores": np.array(row["scores"], dtype=np.float32),
            "taken_back": gone,
            "ledger": np.array([_values(entry) for entry in row["ledger"]]).reshape(-1, LEDGER_COLUMNS),
            "decisions": np.array(_values(row["decisions"])),
        }
    )


def _values(entry: Mapping[str, float]) -> list[float]:
    values = [0.0] * LEDGER_COLUMNS
    for name, column in LEDGER.items():
        values[column] = entry[name]
    return values


def _words(numbers: set[Any]) -> str:
    return ", ".join("none" if number is None else f"{number}" for number in sorted(numbers, key=str))
