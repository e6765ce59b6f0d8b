"""The format of traces: what is written is read again, the same bytes each time, and the page says what they hold."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from agents.checking.speculative import speculate
from agents.common.rollout import Scheduling, decode
from agents.heuristics import Uncertainty
from envs.tasks.task import Example
from experiments.evaluation.runner import Evaluation
from experiments.evaluation.settings import EvaluationSettings
from experiments.traces.recorder import Recorder
from experiments.traces.schema import COLUMNS, LEDGER, SCHEMA, arrow_schema, example_hash
from experiments.traces.trace import read_trace, write_trace

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def decoded(pool, task):
    return decode(pool, task, task.examples("test", 4), Uncertainty(), 0.99, 128, Scheduling(rows=3))


@pytest.fixture(scope="module")
def recorder(pool, task):
    return Recorder(pool, task, "test")


@pytest.fixture
def path(recorder, decoded, tmp_path):
    recorder.routed(tmp_path / "00.safetensors", decoded, "entropy", Uncertainty(), 0.99)
    return tmp_path / "00.parquet"


def test_a_trace_equals_the_episodes(path, decoded, pool):
    trace = read_trace(path)
    assert trace.head.policy_fingerprint == Uncertainty().fingerprint
    assert trace.head.threshold == 0.99
    assert trace.head.profiles == pool.profiles
    assert tuple(trace.head.model_fingerprints) == pool.fingerprints
    assert {writer for one in trace.episodes for writer in one.writers} == {0, 1}
    for number, (one, episode) in enumerate(zip(trace.episodes, decoded, strict=True)):
        assert one.episode == number
        assert one.example == episode.example.id
        assert one.example_hash == example_hash(episode.example)
        assert (one.text, one.correct, one.terminated) == (episode.text, episode.correct, episode.terminated)
        np.testing.assert_array_equal(one.prompt, pool.encode(episode.example.prompt))
        np.testing.assert_array_equal(one.response, episode.tokens)
        for name in ("writers", "scores", "ledger", "decisions"):
            mine, theirs = getattr(one, name), getattr(episode, name)
            np.testing.assert_array_equal(mine, theirs, err_msg=name)
            assert mine.dtype == theirs.dtype


def test_drafts_that_were_refused_are_in_the_trace(recorder, pool, task, tmp_path):
    episodes = speculate(pool, task, task.examples("test", 4), 8, 128)
    recorder.speculative(tmp_path / "speculative", episodes, "speculative", 8)
    trace = read_trace(tmp_path / "speculative.parquet")
    assert sum(len(one.taken_back) for one in trace.episodes) > 0
    for one, episode in zip(trace.episodes, episodes, strict=True):
        assert not len(one.scores)
        for mine, theirs in zip(one.taken_back, episode.taken_back, strict=True):
            assert (mine.position, mine.writer) == (theirs.position, theirs.writer)
            np.testing.assert_array_equal(mine.tokens, theirs.tokens)
            # the LLM's own token stands where the first one that it refused did
            assert one.writers[mine.position] == 1
            assert one.response[mine.position] != mine.tokens[0]


def test_the_same_trace_gives_the_same_bytes_whoever_writes_it(path, recorder, decoded, tmp_path):
    again = tmp_path / "again.parquet"
    write_trace(again, read_trace(path))
    assert again.read_bytes() == path.read_bytes()
    recorder.routed(tmp_path / "third", decoded, "entropy", Uncertainty(), 0.99)
    assert (tmp_path / "third.parquet").read_bytes() == path.read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_traces_are_read_in_one_line(path, decoded, tmp_path):
    table = pandas.read_parquet(path)
    assert [column.name for column in COLUMNS] == list(table.columns)
    assert table["response"][2].tolist() == decoded[2].tokens.tolist()
    rows = datasets.load_dataset("parquet", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows[1]["writers"] == decoded[1].writers.tolist()
    assert rows[1]["ledger"][0]["passes"] == decoded[1].ledger[0, LEDGER["passes"]]


def test_the_page_has_the_columns_of_the_format():
    page = (ROOT / "docs" / "guides" / "traces.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \| (.*) \|$", page, re.MULTILINE)
    assert rows == [(column.name, column.type, column.meaning) for column in COLUMNS]
    assert f"Format {SCHEMA}." in page
    assert [field.name for field in arrow_schema()] == [column.name for column in COLUMNS]


def test_importing_the_format_imports_nothing_heavy():
    code = (
        "import sys, experiments.traces.trace, experiments.traces.schema, experiments.verification.evaluation\n"
        "assert not {'pyarrow', 'datasets', 'pandas'} & sys.modules.keys()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_damaged_traces_and_those_of_other_formats_are_named(path, tmp_path):
    content = path.read_bytes()
    for place in (5, len(content) // 5, len(content) - 2):
        damaged = bytearray(content)
        damaged[place] ^= 64
        (tmp_path / "damaged.parquet").write_bytes(bytes(damaged))
        with pytest.raises(ValueError, match=r"damaged\.parquet is (no readable trace|damaged)"):
            read_trace(tmp_path / "damaged.parquet")
    table = pq.read_table(path)
    later = table.set_column(0, table.schema.field(0), pa.array([SCHEMA + 1] * len(table), pa.int16()))
    pq.write_table(later, tmp_path / "later.parquet")
    with pytest.raises(ValueError, match=f"later.parquet is a trace of format {SCHEMA + 1}; this version reads format"):
        read_trace(tmp_path / "later.parquet")
    pq.write_table(table.drop_columns(["text"]), tmp_path / "less.parquet")
    with pytest.raises(ValueError, match="its columns are not those of format"):
        read_trace(tmp_path / "less.parquet")
    with pytest.raises(ValueError, match="no readable trace"):
        read_trace(tmp_path / "nowhere.parquet")


def test_the_hash_of_a_problem_tells_every_part_of_it():
    example = Example("1", "prompt", "reference", "answer")
    others = [replace(example, **{name: "x"}) for name in ("id", "prompt", "reference", "answer")]
    assert len({example_hash(one) for one in (example, *others)}) == 5


def test_an_evaluation_writes_a_trace_beside_every_piece_unless_told_not_to(pool, task, tmp_path):
    few = {"examples": 2, "threshold_examples": 2, "llm_shares": (0.3,), "oracle_budget": 2, "draft_tokens": 4}
    few |= {"refine": 0}
    shared = tmp_path / "shared"
    settings = EvaluationSettings(**few, shared=shared)
    Evaluation(pool, task, settings, tmp_path / "one").run({"entropy": Uncertainty()})
    pieces = {path.with_suffix("") for path in tmp_path.glob("one/runs/**/*.safetensors")}
    assert {path.with_suffix("") for path in tmp_path.glob("one/runs/**/*.parquet")} == pieces
    # baselines that are shared come with their traces
    Evaluation(pool, task, settings, tmp_path / "two").run({"entropy": Uncertainty()})
    assert (tmp_path / "two" / "runs" / "llm.parquet").read_bytes() == (shared / "llm.parquet").read_bytes()
    Evaluation(pool, task, EvaluationSettings(**few, traces=False), tmp_path / "none").run({"entropy": Uncertainty()})
    assert not list(tmp_path.glob("none/**/*.parquet"))
    with pytest.raises(ValueError, match="traces must be true or false, is 'no'"):
        EvaluationSettings(traces="no")
