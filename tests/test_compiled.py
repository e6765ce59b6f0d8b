"""Passes of one token as a graph: they are those of the cache without one, whatever rows they take."""

import re
import shutil

import numpy as np
import pytest
import torch
from torch._inductor.exc import InvalidCxxCompiler

from agents.common.rollout import Scheduling, decode
from agents.heuristics import Uncertainty
from envs.costs import SECONDS
from envs.models import compiled
from envs.models.language_model import LanguageModel
from envs.models.loading import load_pool
from tests.test_profile import ARCHITECTURES, network

FAST = ["llama", "gemma2", "gpt_neox"]
BROKEN = [
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "glm4_moe", "hunyuan_v1_moe",
    "ernie4_5_moe", "deepseek_v2", "deepseek_v3",
]  # fmt: skip
"""What goes on by values that a graph does not know: which expert a token goes to, one after the other as here."""


@pytest.fixture
def traced(monkeypatch):
    """Graphs are traced and run as they are, not compiled: seconds in place of minutes. Counts their calls."""
    calls = []
    ours = torch.compile

    def compile_(step, dynamic, mode, fullgraph):
        assert (dynamic, mode, fullgraph) == (False, None, True)
        graph = ours(step, dynamic=dynamic, backend="eager", fullgraph=fullgraph)

        def counted(*inputs):
            calls.append(inputs[0].shape)
            return graph(*inputs)

        return counted

    monkeypatch.setattr(torch, "compile", compile_)
    monkeypatch.setattr("envs.models.source._check_compiler", lambda name: None)  # none is needed then
    return calls


def pair_of(architecture, tokenizer):
    return [LanguageModel(architecture, network(architecture), tokenizer, compiled=c) for c in (False, True)]


def feeds(model, capacity=60):
    """Logits of ragged prompts, then of single tokens: of rows in any order, behind chunks, behind a rewind."""
    rng = np.random.default_rng(0)
    cache = model.new_cache(5, min(capacity, model.max_positions))
    found = [model.feed(cache, np.array([0, 2, 4]), [rng.integers(2, 96, n) for n in (5, 9, 3)])]
    for rows in ([0], [4, 2], [2, 0, 4], [4]):
        found.append(model.feed(cache, np.array(rows), [rng.integers(2, 96, 1) for _ in rows]))
    cache.rewind(np.array([2]), np.array([7]))
    cache.fork(np.array([2]), np.array([3]), np.array([6]))
    found.append(model.feed(cache, np.array([3, 2]), [rng.integers(2, 96, n) for n in (1, 4)]))
    found.append(model.feed(cache, np.array([1, 3]), [rng.integers(2, 96, 1) for _ in range(2)]))
    return found, cache.lengths.tolist()


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a in FAST else pytest.mark.slow) for a in ARCHITECTURES]
)
def test_a_graph_gives_what_the_cache_without_one_gives(architecture, make_tokenizer, traced, monkeypatch):
    monkeypatch.setattr(compiled, "FEWEST_COLUMNS", 16)
    plain, graphed = pair_of(architecture, make_tokenizer())
    if architecture in BROKEN:
        with pytest.raises(ValueError, match="passes of this network cannot be one graph"):
            feeds(graphed)
        return
    (expected, lengths), (found, ours) = feeds(plain), feeds(graphed)
    assert ours == lengths
    assert [shape[1] for shape in traced] == [1, 2, 4, 1, 2]  # rows, filled up; what has a longer chunk goes without
    for (hidden, logits), (their_hidden, their_logits) in zip(found, expected, strict=True):
        torch.testing.assert_close(hidden, their_hidden, rtol=2e-4, atol=2e-4)
        torch.testing.assert_close(logits, their_logits, rtol=2e-4, atol=2e-4)


def test_rows_that_others_hold_are_left_alone(make_tokenizer, traced):
    _, graphed = pair_of("llama", make_tokenizer())
    cache = graphed.new_cache(4, 30)
    graphed.feed(cache, np.arange(4), [np.arange(2, 2 + n) for n in (5, 9, 3, 7)])
    before = [store.clone() for store in cache.stores]
    graphed.feed(cache, np.array([3, 0, 1]), [np.array([7])] * 3)
    for store, was in zip(cache.stores, before, strict=True):
        changed = (store != was).flatten(2).any(-1).nonzero().tolist()
        assert [where for where in changed if where != [3, 30]] == [[0, 5], [1, 9], [3, 7]]
    assert len(traced) == 1


def test_a_first_pass_and_a_full_row_are_as_without_a_graph(make_tokenizer, traced):
    _, graphed = pair_of("llama", make_tokenizer())
    cache = graphed.new_cache(2, 3)
    for _ in range(3):
        graphed.feed(cache, np.array([0]), [np.array([5])])
    assert len(traced) == 2  # where nothing was read the stores are not there yet
    with pytest.raises(ValueError, match="a sequence of 4 tokens does not fit the cache of 3; raise capacity"):
        graphed.feed(cache, np.array([0]), [np.array([5])])
    assert cache.lengths.tolist() == [3, 0]


def test_answers_of_a_pool_are_those_without_graphs(task, pool, traced):
    graphed = load_pool(["embedded/slm", "embedded/llm"], dtype="float32", rows=4, verbose=False, compile=True)
    assert graphed.fingerprints == pool.fingerprints
    examples = task.examples("validation", 6)
    policy = Uncertainty("entropy")
    ours, theirs = (
        decode(pool, task, examples, policy, 0.9, max_new_tokens=48, scheduling=Scheduling(rows=4))
        for pool in (graphed, pool)
    )
    assert traced
    for one, other in zip(ours, theirs, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert np.array_equal(np.delete(one.ledger, SECONDS, 1), np.delete(other.ledger, SECONDS, 1))


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="there is no C++ compiler")
def test_a_compiled_graph_writes_the_same_answers(task, pool):
    """The real compiler, in float32; sums are added in another order, so that near ties alone may fall otherwise."""
    graphed = load_pool(["embedded/slm", "embedded/llm"], dtype="float32", rows=1, verbose=False, compile=True)
    examples = task.examples("validation", 12)
    ours, theirs = (
        decode(pool, task, examples, Uncertainty("entropy"), 0.9, max_new_tokens=48, scheduling=Scheduling(rows=1))
        for pool in (graphed, pool)
    )
    same = [one.tokens.tolist() == other.tokens.tolist() for one, other in zip(ours, theirs, strict=True)]
    assert sum(same) >= 11


def test_a_cpu_without_a_compiler_is_refused(monkeypatch):
    def missing():
        raise InvalidCxxCompiler

    monkeypatch.setattr("torch._inductor.cpp_builder.get_cpp_compiler", missing)
    with pytest.raises(ValueError, match=re.escape("embedded/slm: compile=true needs a C++ compiler on the CPU, and")):
        load_pool(["embedded/slm", "embedded/llm"], compile=True)


def test_a_model_over_several_devices_is_refused():
    with pytest.raises(ValueError, match="embedded/llm: compile=true is for models on one device"):
        load_pool(["embedded/slm", {"name": "embedded/llm", "device_map": "auto", "compile": True}])
