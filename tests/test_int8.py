"""Weights of 8-bit integers: what they take, what they cost, and that decoding is that of such a model."""

import re

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from envs.models import linear
from envs.models.linear import use_int8
from envs.models.loading import load_pool
from envs.models.profile import stored
from envs.models.source import ModelSpec, Source

PAIR = ["embedded/slm", "embedded/llm"]


@pytest.fixture(scope="module")
def pair():
    return load_pool(PAIR, dtype="bfloat16", rows=3, capacity=96, weights="int8", verbose=False)


@pytest.fixture(scope="module")
def plain():
    return load_pool(PAIR, dtype="bfloat16", rows=3, capacity=96, verbose=False)


def test_costs_and_plans_are_what_lies_in_memory(pair, plain):
    for model, other in zip(pair.models, plain.models, strict=True):
        held = sum(part.nbytes for tensor in model.network.parameters() for part in stored(tensor))
        planned = Source.find(ModelSpec(model.name, dtype="bfloat16", device="cpu", weights="int8")).weight_bytes()
        assert model.profile.weight_bytes == planned == held
        assert model.profile.parameters == other.profile.parameters
        matrices = [m for m in other.network.modules() if type(m) is torch.nn.Linear]
        head = other.network.get_output_embeddings()
        saved = sum(m.weight.numel() - 2 * m.out_features for m in matrices if m is not head)
        assert model.profile.weight_bytes == other.profile.weight_bytes - saved
        assert len({model.fingerprint, other.fingerprint}) == 2


def test_the_head_stays_as_it_is(pair, plain):
    ours, theirs = (pool.models[-1].network.get_output_embeddings().weight for pool in (pair, plain))
    assert torch.equal(ours, theirs)


def test_weights_are_rounded_to_a_256th_of_the_largest_of_their_output(pair, plain):
    ours, theirs = (pool.models[-1].network.model.layers[0].mlp.down_proj.weight for pool in (pair, plain))
    error = (ours.dequantize().float() - theirs.float()).abs()
    # half a step, and what bfloat16 rounds of the scale and the product
    assert bool((error <= theirs.float().abs().amax(1, keepdim=True) * (0.5 / 127 + 2**-7)).all())
    assert error.max() > 0


def test_ragged_cached_passes_are_those_of_the_whole_sequence_but_for_rounding(pair):
    model, rng = pair.models[-1], np.random.default_rng(0)
    cache, ids = model.new_cache(3, 60), [np.zeros(0, dtype=np.int64)] * 3
    for _ in range(4):
        rows = rng.permutation(3)[: rng.integers(1, 4)]
        chunks = [rng.integers(2, 96, rng.integers(1, 12)) for _ in rows]
        _, logits = model.feed(cache, rows, chunks)
        for i, row in enumerate(rows):
            ids[row] = np.concatenate([ids[row], chunks[i]])
            _, whole = model.feed(model.new_cache(1, 60), np.array([0]), [ids[row]])
            torch.testing.assert_close(logits[i], whole[0], rtol=0.05, atol=0.25)


def test_answers_are_nearly_those_of_the_weights_before(pair, plain, task):
    same = tokens = 0
    for example in task.examples("validation", 20):
        read = pair.encode_prompt(example)
        read = np.concatenate([read, pair.tokenizer.encode(example.reference, add_special_tokens=False)])
        found = [
            pool.models[-1].feed(pool.models[-1].new_cache(1, len(read)), np.array([0]), [read], every_position=True)[1]
            for pool in (pair, plain)
        ]
        same += int((found[0].argmax(-1) == found[1].argmax(-1)).sum())
        tokens += len(read)
    assert 0.95 * tokens < same


def test_what_int8_weights_cannot_do_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(Source, "load", lambda self: pytest.fail(f"weights of {self.name} were read"))
    with pytest.raises(
        ValueError, match=re.escape("embedded/slm: weights=int8 are multiplied with activations in half")
    ):
        load_pool(PAIR, dtype="float32", weights="int8")
    with pytest.raises(ValueError, match=re.escape("embedded/llm: unknown weights 'int3'; choose int8, or null")):
        load_pool(["embedded/slm", {"name": "embedded/llm", "weights": "int3"}])
    with pytest.raises(ValueError, match="weights=int8 is for models on one device"):
        load_pool(["embedded/slm", {"name": "embedded/llm", "weights": "int8", "device_map": "auto"}])
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'citer-gym[int8]'")):
        load_pool(PAIR, dtype="bfloat16", weights="int8")


def test_a_network_without_linear_layers_is_refused():
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no linear layers that int8 weights are for"):
        use_int8(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)))
