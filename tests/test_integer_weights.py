"""Weights of 8-bit and 4-bit integers: what they take, what they cost, and that decoding is that of such a model."""

import re

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config

from envs.models import linear
from envs.models.linear import GROUP, quantise
from envs.models.loading import load_pool
from envs.models.profile import stored
from envs.models.source import ModelSpec, Source

PAIR = ["embedded/slm", "embedded/llm"]


@pytest.fixture(scope="module", params=["int8", "int4"])
def weights(request):
    return request.param


@pytest.fixture(scope="module")
def names(weights, save_model):
    """The embedded pair; for 4-bit weights one of widths that groups of these fit in, with a layer that they do not."""
    if weights == "int8":
        return PAIR
    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    return [
        str(save_model(f"grouped_{layers}", Qwen2Config(**sizes, intermediate_size=width, num_hidden_layers=layers)))
        for layers, width in ((1, 384), (2, 320))
    ]


@pytest.fixture(scope="module")
def pair(names, weights):
    return load_pool(names, dtype="bfloat16", rows=3, capacity=96, weights=weights, verbose=False)


@pytest.fixture(scope="module")
def plain(names):
    return load_pool(names, dtype="bfloat16", rows=3, capacity=96, verbose=False)


def changed_layers(pair, plain):
    """Pairs of a layer with weights of integers and the one it was made of."""
    theirs = dict(plain.models[-1].network.named_modules())
    return [
        (module, theirs[path])
        for path, module in pair.models[-1].network.named_modules()
        if hasattr(getattr(module, "weight", None), "dequantize") and hasattr(module.weight, "qtype")
    ]


def test_costs_and_plans_are_what_lies_in_memory(pair, plain, weights):
    for model, other in zip(pair.models, plain.models, strict=True):
        held = sum(part.nbytes for tensor in model.network.parameters() for part in stored(tensor))
        source = Source.find(ModelSpec(model.name, dtype="bfloat16", device="cpu", weights=weights))
        assert source.weight_bytes() == held
        tables = 0 if other.network.config.tie_word_embeddings else other.network.get_input_embeddings().weight.nbytes
        assert model.profile.weight_bytes == held - tables
        assert model.profile.parameters == other.profile.parameters
        matrices = [m for m in other.network.modules() if type(m) is torch.nn.Linear]
        head = other.network.get_output_embeddings()
        saved = sum(
            m.weight.numel() - 2 * m.out_features
            if weights == "int8"
            else m.weight.numel() * 3 // 2 - 2 * 2 * m.weight.numel() // 128
            for m in matrices
            if m is not head and (weights == "int8" or m.in_features % 128 == 0)
        )
        assert model.profile.weight_bytes == other.profile.weight_bytes - saved
        assert len({model.fingerprint, other.fingerprint}) == 2


def test_the_head_stays_as_it_is(pair, plain):
    ours, theirs = (pool.models[-1].network.get_output_embeddings().weight for pool in (pair, plain))
    assert torch.equal(ours, theirs)


def test_layers_that_groups_do_not_fit_in_stay_as_they_are(pair, plain, weights):
    changed = changed_layers(pair, plain)
    linear_layers = [m for m in plain.models[-1].network.modules() if type(m) is torch.nn.Linear][:-1]
    fitting = [m for m in linear_layers if weights == "int8" or m.in_features % GROUP == 0]
    assert [id(theirs) for _, theirs in changed] == [id(m) for m in fitting]
    assert (len(fitting) < len(linear_layers)) is (weights == "int4")


def test_weights_are_rounded_to_as_many_steps_as_their_bits_give(pair, plain, weights):
    for ours, theirs in changed_layers(pair, plain):
        groups = theirs.weight.float() if weights == "int8" else theirs.weight.float().unflatten(1, (-1, GROUP))
        error = (ours.weight.dequantize().float().view(groups.shape) - groups).abs()
        largest = groups.abs().amax(-1, keepdim=True)
        if weights == "int8":
            step = largest / 127
        else:
            least, most = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
            step = (most - least) / 15
        # half a step, and what bfloat16 rounds of the scale and the product; of 4 bits the shift is rounded too
        assert bool((error <= 0.5 * step + largest * 2 ** (-7 if weights == "int8" else -5)).all())
        assert error.max() > 0


def test_ragged_cached_passes_are_those_of_the_whole_sequence_but_for_rounding(pair, weights):
    model, rng = pair.models[-1], np.random.default_rng(0)
    cache, ids = model.new_cache(3, 60), [np.zeros(0, dtype=np.int64)] * 3
    for _ in range(4):
        rows = rng.permutation(3)[: rng.integers(1, 4)]
        chunks = [rng.integers(2, 16, rng.integers(1, 12)) for _ in rows]
        _, logits = model.feed(cache, rows, chunks)
        for i, row in enumerate(rows):
            ids[row] = np.concatenate([ids[row], chunks[i]])
            _, whole = model.feed(model.new_cache(1, 60), np.array([0]), [ids[row]])
            rounding = 0.25 if weights == "int8" else 0.02 * float(whole.float().std()) + 0.25
            torch.testing.assert_close(logits[i], whole[0], rtol=0.05, atol=rounding)


def test_products_are_those_with_the_rounded_weights(pair, plain):
    for ours, theirs in changed_layers(pair, plain):
        rows = torch.randn(5, theirs.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
        with torch.inference_mode():
            found, expected = ours(rows), rows.float() @ ours.weight.dequantize().float().T
        if theirs.bias is not None:
            expected = expected + theirs.bias.float()
        torch.testing.assert_close(found.float(), expected, rtol=0.02, atol=0.05 * float(expected.std()))


def test_answers_are_nearly_those_of_the_weights_before(task):
    same = tokens = 0
    pools = [load_pool(PAIR, dtype="bfloat16", rows=1, verbose=False, weights=weights) for weights in ("int8", None)]
    for example in task.examples("validation", 20):
        read = pools[0].encode_prompt(example)
        read = np.concatenate([read, pools[0].tokenizer.encode(example.reference, add_special_tokens=False)])
        found = [
            pool.models[-1].feed(pool.models[-1].new_cache(1, len(read)), np.array([0]), [read], every_position=True)[1]
            for pool in pools
        ]
        same += int((found[0].argmax(-1) == found[1].argmax(-1)).sum())
        tokens += len(read)
    assert 0.95 * tokens < same


def test_what_weights_of_integers_cannot_do_is_refused_before_weights_are_read(monkeypatch):
    monkeypatch.setattr(Source, "load", lambda self: pytest.fail(f"weights of {self.name} were read"))
    with pytest.raises(ValueError, match=re.escape("embedded/slm: weights=int8 are not multiplied with torch.float32")):
        load_pool(PAIR, dtype="float32", weights="int8")
    with pytest.raises(ValueError, match=re.escape("embedded/slm: weights=int4 are not multiplied with torch.float16")):
        load_pool(PAIR, dtype="float16", weights="int4")
    with pytest.raises(
        ValueError, match="embedded/slm has no linear layers that int4 weights are for; say weights=null"
    ):
        load_pool(PAIR, dtype="bfloat16", weights="int4")
    with pytest.raises(ValueError, match=re.escape("embedded/llm: unknown weights 'int3'; choose one of int8, int4")):
        load_pool(["embedded/slm", {"name": "embedded/llm", "weights": "int3"}])
    with pytest.raises(ValueError, match="weights=int8 is for models on one device"):
        load_pool(["embedded/slm", {"name": "embedded/llm", "weights": "int8", "device_map": "auto"}])
    monkeypatch.setattr(linear.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=re.escape("pip install 'citer-gym[quanto]'")):
        load_pool(PAIR, dtype="bfloat16", weights="int8")


def test_a_network_without_linear_layers_is_refused(weights):
    with pytest.raises(ValueError, match=f"GPT2LMHeadModel has no linear layers that {weights} weights are for"):
        quantise(GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16)), weights)
