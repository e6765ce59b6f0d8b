from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import envs.models.attention
import envs.models.language_model
import envs.models.linear
from envs.decoding.session import Session
from envs.models.attention import split_by_length
from envs.models.language_model import LanguageModel
from envs.models.linear import OneDnnLinear, use_onednn

MODELS = ["llama_small", "llama_large", "qwen2_small", "qwen2_large", "gpt2_small", "gpt2_large"]


def padding(model, monkeypatch):
    """The same model as one whose attention cannot do without padding."""
    monkeypatch.setattr(envs.models.language_model, "PACKED", ())
    network = copy.deepcopy(model.network)
    network.get_output_embeddings()._forward_pre_hooks.clear()
    network.set_attn_implementation("sdpa")
    return LanguageModel(model.name, network, model.tokenizer)


@pytest.fixture(params=[*MODELS, "llama_large_padded", "gpt2_small_padded"])
def model(request, pools, monkeypatch):
    family, size, *padded = request.param.split("_")
    model = pools[family].models[size == "large"]
    return padding(model, monkeypatch) if padded else model


def whole(model, ids):
    """Hidden states after the final norm (n, width) and logits (n, vocab) of all positions, without a cache."""
    with torch.inference_mode():
        output = model.network(torch.tensor([list(ids)]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0], output.logits[0]


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# -- feeding ----------------------------------------------------------------------------------------------------------


def test_ragged_chunks_equal_reading_the_whole_sequence(model):
    rng = np.random.default_rng(0)
    cache, ids = model.new_cache(5, 60), [[] for _ in range(5)]
    for _ in range(12):
        rows = rng.permutation(5)[: rng.integers(1, 6)]
        if rng.random() < 0.3:
            rows = np.sort(rows)
        chunks = [rng.integers(2, 96, rng.integers(1, 6)) for _ in rows]
        hidden, logits = model.feed(cache, rows, chunks)
        for i, row in enumerate(rows):
            ids[row] += chunks[i].tolist()
            states, scores = whole(model, ids[row])
            close(hidden[i], states[-1])
            close(logits[i], scores[-1])
    assert cache.lengths.tolist() == [len(row) for row in ids]


def test_every_position_equals_reading_the_whole_sequence(model):
    rng = np.random.default_rng(1)
    cache, head = model.new_cache(3, 30), rng.integers(2, 96, 4)
    model.feed(cache, np.array([1]), [head])
    chunks = [rng.integers(2, 96, count) for count in (2, 7, 5)]
    hidden, logits = model.feed(cache, np.arange(3), chunks, every_position=True)
    assert len(hidden) == len(logits) == 14
    for row, chunk, part in zip(range(3), chunks, (slice(0, 2), slice(2, 9), slice(9, 14)), strict=True):
        states, scores = whole(model, [*head, *chunk] if row == 1 else chunk)
        close(hidden[part], states[-len(chunk) :])
        close(logits[part], scores[-len(chunk) :])


@pytest.mark.parametrize("sparse", [1.0, 1.5, 9.0])
@pytest.mark.parametrize("call_queries", [0, 8, 1000])
@pytest.mark.parametrize("copy_bytes", [0, 10**9])
def test_rows_may_attend_in_any_groups(pools, monkeypatch, sparse, call_queries, copy_bytes):
    monkeypatch.setattr(envs.models.attention, "SPARSE", sparse)
    monkeypatch.setattr(envs.models.attention, "CALL_QUERIES", call_queries)
    monkeypatch.setitem(envs.models.attention.COPY_BYTES, "cpu", copy_bytes)
    for family in ("llama", "gpt2"):
        test_ragged_chunks_equal_reading_the_whole_sequence(pools[family].slm)


def test_split_groups_equal_one_pass_and_one_row_at_a_time(pools, monkeypatch):
    model = padding(pools["llama"].models[1], monkeypatch)
    rng = np.random.default_rng(2)
    rows, counts = np.array([5, 0, 3, 1, 4]), [3, 17, 1, 3, 9]
    chunks, later = ([rng.integers(2, 96, count) for count in part] for part in (counts, [2] * 5))
    passes = []
    original = LanguageModel._padded_pass
    monkeypatch.setattr(LanguageModel, "_padded_pass", lambda *a, **k: passes.append(len(a[2])) or original(*a, **k))

    def fed(pass_tokens, one_by_one=False):
        monkeypatch.setattr(model, "pass_tokens", pass_tokens)
        cache = model.new_cache(6, 40)
        passes.clear()
        if one_by_one:
            results = [model.feed(cache, rows[i : i + 1], chunks[i : i + 1]) for i in range(5)]
            first = [torch.cat(parts) for parts in zip(*results, strict=True)]
        else:
            first = model.feed(cache, rows, chunks)
        made = sorted(passes)
        assert cache.lengths[rows].tolist() == counts
        return first, model.feed(cache, rows, later), made

    expected, expected_later, _ = fed(0, one_by_one=True)
    for pass_tokens, groups in ((0, [1, 1, 1, 2]), (20, [2, 3]), (1000, [5])):
        first, second, made = fed(pass_tokens)
        assert made == groups
        for got, wanted in ((first, expected), (second, expected_later)):
            close(got[0], wanted[0])
            close(got[1], wanted[1])


def test_an_empty_chunk_is_refused_by_row(model):
    with pytest.raises(ValueError, match="row 7 was fed an empty chunk"):
        model.feed(model.new_cache(8, 10), np.array([3, 7]), [np.array([5]), np.array([], dtype=int)])


def test_a_sequence_longer_than_the_cache_is_refused(model):
    cache = model.new_cache(2, 10)
    model.feed(cache, np.arange(2), [np.full(10, 5), np.full(4, 5)])
    with pytest.raises(ValueError, match="a sequence of 11 tokens does not fit the cache of 10; raise capacity"):
        model.feed(cache, np.array([0]), [np.array([5])])
    assert cache.lengths.tolist() == [10, 4]


# -- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_tokens", [0, 5, 24, 256])
@pytest.mark.parametrize("seed", range(5))
def test_a_split_holds_each_index_once(pass_tokens, seed):
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, rng.choice([3, 50, 500]), rng.integers(1, 40))
    groups = split_by_length(counts, pass_tokens)
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(counts)))
    assert all((np.diff(group) > 0).all() for group in groups)
    padded = sum(len(group) * counts[group].max() for group in groups)
    assert padded + pass_tokens * (len(groups) - 1) <= len(counts) * counts.max()


def test_equal_lengths_are_not_split():
    assert [group.tolist() for group in split_by_length(np.full(6, 300), 0)] == [[0, 1, 2, 3, 4, 5]]
    assert [group.tolist() for group in split_by_length(np.array([9]), 0)] == [[0]]


def test_one_long_chunk_among_short_ones_goes_alone():
    counts = np.array([1, 1, 200, 1, 2])
    assert [group.tolist() for group in split_by_length(counts, 24)] == [[0, 1, 3, 4], [2]]
    # 4 short ones would be padded by 198 or 199: a pass worth more than that is not added
    assert [group.tolist() for group in split_by_length(counts, 796)] == [[0, 1, 2, 3, 4]]


def test_a_difference_worth_less_than_a_pass_is_padded():
    assert len(split_by_length(np.array([1, 7, 7]), 6)) == 1
    assert [group.tolist() for group in split_by_length(np.array([1, 7, 7]), 5)] == [[0], [1, 2]]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, 31), (3, 11), (1, 300), (2, 1100)])
def test_onednn_layers_multiply_as_pytorch_does(shape, bias, monkeypatch):
    monkeypatch.setattr(envs.models.linear, "FEW_ROWS", 0)
    torch.manual_seed(0)
    layer, expected = torch.nn.Linear(24, 40, bias=bias), torch.nn.Linear(24, 40, bias=bias)
    expected.load_state_dict(layer.state_dict())
    use_onednn(layer)
    assert type(layer) is OneDnnLinear
    rows = torch.randn(*shape, 24)
    with torch.inference_mode():
        torch.testing.assert_close(layer(rows), expected(rows), rtol=1e-5, atol=1e-5)
    layer(rows).sum().backward()
    expected(rows).sum().backward()
    torch.testing.assert_close(layer.weight.grad, expected.weight.grad)


# -- the cache --------------------------------------------------------------------------------------------------------


def test_forked_and_rewound_rows_go_on_as_if_read_anew(model):
    rng = np.random.default_rng(3)
    cache = model.new_cache(6, 30)
    ids = [rng.integers(2, 96, count).tolist() for count in (9, 4, 6)]
    model.feed(cache, np.arange(3), [np.array(row) for row in ids])
    cache.fork(np.array([0, 0, 2, 1]), np.array([3, 4, 5, 1]), np.array([9, 5, 100, 2]))
    cache.rewind(np.array([0, 2]), np.array([1, 50]))
    expected = [ids[0][:1], ids[1][:2], ids[2], ids[0], ids[0][:5], ids[2]]
    assert cache.lengths.tolist() == [1, 2, 6, 9, 5, 6]
    chunks = [rng.integers(2, 96, count) for count in (3, 1, 2, 4, 1, 2)]
    hidden, _ = model.feed(cache, np.arange(6), chunks)
    for row in range(6):
        close(hidden[row], whole(model, [*expected[row], *chunks[row]])[0][-1])
    cache.free(np.array([0, 5]))
    assert cache.lengths.tolist() == [0, 3, 8, 13, 6, 0]


def test_a_cache_takes_the_memory_planned_for_it(model):
    cache = model.new_cache(3, 20)
    model.feed(cache, np.array([0]), [np.array([5, 6])])
    taken = sum(store.nbytes for layer in cache.layers for store in (layer.keys, layer.values))
    assert taken == model.profile.kv_bytes_per_token * 3 * 21


# -- sizes ------------------------------------------------------------------------------------------------------------


def test_profiles_equal_hand_counts(pools):
    llama, gpt2 = pools["llama"].slm.profile, pools["gpt2"].slm.profile
    # A llama layer: q 32 x 32, k and v 32 x 16, o 32 x 32, three 32 x 48, two norms of 32 = 7,744; a final norm of 32.
    # Keys and values: 2 x 2 layers x 2 heads x 8 elements x 4 bytes. Attention: 4 heads x 8 x 2 layers.
    assert (llama.body_parameters, llama.head_parameters) == (15_520, 3_104)
    assert (llama.kv_bytes_per_token, llama.attention_width, llama.bytes_per_parameter) == (256, 64, 4)
    # A GPT-2 layer: 32 x 96 + 96, 32 x 32 + 32, 32 x 128 + 128, 128 x 32 + 32, two norms of 64 = 12,704; a final norm
    # of 64. Of its 128 positions a pass reads one. The head is the embedding table, counted once.
    assert (gpt2.body_parameters, gpt2.head_parameters) == (25_472, 3_104)
    assert (gpt2.kv_bytes_per_token, gpt2.attention_width) == (512, 64)


def test_a_pool_that_is_copied_is_the_same_pool(tiny_pool):
    assert copy.deepcopy(tiny_pool) is tiny_pool


def test_models_of_different_widths_share_a_session(pools):
    pool = pools["llama"]
    assert [model.width for model in pool.models] == [32, 48]
    session = Session(pool, 1, 4)
    session.start(np.array([0]), [np.array([5, 6])])
    session.step(np.array([0]), np.array([1]))
    assert session.observe(np.array([0])).hidden.shape == (1, 32)
