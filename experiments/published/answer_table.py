"""Answers to many problems, at many thresholds, as one Parquet file: a row an answer."""

from __future__ import annotations

import base64
import gzip
import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from envs.storage import write_whole
from experiments.evaluation.answers import Answers

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA = 1
"""The number of this format. A column that is added, goes or changes its meaning makes it another one."""
ABOUT, FILES = "citer-gym", "citer-gym files"
"""Keys of the file's metadata: JSON of what made the answers; files kept with them, as JSON, gzipped, in base64."""
INTEGERS = ("llm_tokens", "tokens")
FLAGS = ("correct", "terminated")


def write_answers(
    path: Path, pieces: Mapping[str, Answers], about: Mapping[str, Any], files: Mapping[str, str]
) -> None:
    """Write answers, whole or not at all.

    The columns: `piece` (its key in `pieces`), `problem` (a number), `correct`, `terminated`, `llm_tokens`, `tokens`,
    and `cost_UNIT` for each unit.

    Args:
        path: of the file.
        pieces: answers by name, each to all problems of one split, all with costs in the same units.
        about: plain data that is kept with them.
        files: texts that are kept with them, by name.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([_table(name, answers) for name, answers in pieces.items()])
    said = json.dumps({"schema": SCHEMA, **about})
    packed = base64.b64encode(gzip.compress(json.dumps(dict(files)).encode(), mtime=0)).decode()

    def write(partial: Path) -> None:
        # the schema in Arrow's own words would hold the metadata once more
        how: dict[str, Any] = {
            "compression": "zstd",
            "compression_level": 19,
            "store_schema": False,
            "write_page_checksum": True,
        }
        with pq.ParquetWriter(partial, table.schema, **how) as writer:
            writer.write_table(table)
            writer.add_key_value_metadata({ABOUT: said, FILES: packed})

    write_whole(path, write)


def read_answers(path: Path) -> tuple[dict[str, Answers], dict[str, Any], dict[str, str]]:
    """Read what `write_answers` wrote: the answers by name, what made them, and the files that are kept with them.

    Raises:
        ValueError: the file is damaged, or of another format; the error names it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, page_checksum_verification=True)
        metadata = table.schema.metadata or {}
        about, files = (metadata[key.encode()] for key in (ABOUT, FILES))
        about, files = json.loads(about), json.loads(gzip.decompress(base64.b64decode(files)))
        columns = {name: table.column(name).to_numpy() for name in table.column_names}
        if about["schema"] != SCHEMA:
            raise ValueError(f"it has schema {about['schema']}, this version reads {SCHEMA}")
        names = columns.pop("piece")
        pieces = {
            name: _answers({key: column[names == name] for key, column in columns.items()})
            for name in dict.fromkeys(names.tolist())
        }
    except (OSError, EOFError, zlib.error, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no readable results: {error}") from error
    return pieces, about, files


def _table(name: str, answers: Answers) -> pa.Table:
    import pyarrow as pa

    count = len(answers.correct)
    columns: dict[str, Any] = {
        "piece": pa.array([name] * count).dictionary_encode(),
        "problem": np.arange(count, dtype=np.int32),
        **{key: getattr(answers, key) for key in FLAGS},
        **{key: getattr(answers, key).astype(np.int32) for key in INTEGERS},
        **{f"cost_{unit}": cost for unit, cost in answers.costs.items()},
    }
    return pa.table(columns)


def _answers(columns: Mapping[str, Any]) -> Answers:
    """The answers of one piece."""
    if columns["problem"].tolist() != list(range(len(columns["problem"]))):
        raise ValueError("its problems are not numbered from 0 on")
    return Answers(
        **{key: columns[key].astype(np.bool_) for key in FLAGS},
        **{key: columns[key].astype(np.float64) for key in INTEGERS},
        costs={key.removeprefix("cost_"): column for key, column in columns.items() if key.startswith("cost_")},
    )
