"""What costs count of a pass equals what the pass reads, on random tiny models of many architectures."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from envs.costs import Flops, MemoryTraffic
from envs.models.language_model import LanguageModel
from envs.models.loading import load_pool
from envs.models.source import ModelSpec, Source

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 80,
    "max_position_embeddings": 128, "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": 1,
}  # fmt: skip
GROUPED = {"num_key_value_heads": 2}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 97}
# 2 of 8 experts, whatever an architecture calls them; one layer of DeepSeek is dense
EXPERTS = {
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "moe_num_experts": 8, "num_experts_per_tok": 2,
    "moe_topk": 2, "moe_k": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip
LATENT = {
    "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
# Scores that reach their cap, in layers that attend to a window in turn with others.
CAPPED = GROUPED | {
    "head_dim": 16, "sliding_window": 64, "tie_word_embeddings": True, "attn_logit_softcapping": 0.5,
    "query_pre_attn_scalar": 1, "initializer_range": 0.3,
}  # fmt: skip
ARCHITECTURES = {
    "llama": ("llama", SIZES | GROUPED),
    "llama_tied": ("llama", SIZES | GROUPED | {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", SIZES | GROUPED),
    "qwen3": ("qwen3", SIZES | GROUPED | {"head_dim": 32}),
    "olmo2": ("olmo2", SIZES | GROUPED),
    "mistral": ("mistral", SIZES | GROUPED | {"sliding_window": 64}),
    "smollm3": ("smollm3", SIZES | GROUPED),
    "olmo": ("olmo", SIZES | GROUPED),
    "olmo3": ("olmo3", SIZES | GROUPED | {"sliding_window": 64}),
    "granite": ("granite", SIZES | GROUPED),
    "stablelm": ("stablelm", SIZES | GROUPED),
    "starcoder2": ("starcoder2", SIZES | GROUPED | {"sliding_window": 64}),
    "cohere": ("cohere", SIZES | GROUPED | {"tie_word_embeddings": True}),
    "cohere2": ("cohere2", SIZES | GROUPED | {"tie_word_embeddings": True, "sliding_window": 64}),
    "glm4": ("glm4", SIZES | GROUPED | {"head_dim": 16}),
    "nemotron": ("nemotron", SIZES | GROUPED | {"head_dim": 16}),
    "phi": ("phi", SIZES),
    "phi3": ("phi3", SIZES | GROUPED | {"sliding_window": 64}),
    "gemma2": ("gemma2", SIZES | CAPPED),
    "gemma3": ("gemma3_text", SIZES | CAPPED),
    "gemma": ("gemma", SIZES | GROUPED | {"head_dim": 16, "tie_word_embeddings": True}),
    "gpt_neox": ("gpt_neox", SIZES),
    "gpt2": ("gpt2", GPT),
    "gpt_bigcode": ("gpt_bigcode", GPT),
    "gpt_bigcode_heads": ("gpt_bigcode", GPT | {"multi_query": False}),
    "opt": ("opt", SIZES | {"ffn_dim": 80, "word_embed_proj_dim": 64}),
    "falcon": ("falcon", SIZES | {"multi_query": True}),
    "falcon_new": ("falcon", SIZES | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "minicpm3": ("minicpm3", SIZES | LATENT),
    "mixtral": ("mixtral", SIZES | GROUPED | EXPERTS),
    "qwen2_moe": ("qwen2_moe", SIZES | GROUPED | EXPERTS | {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("qwen3_moe", SIZES | GROUPED | EXPERTS | {"head_dim": 16}),
    "olmoe": ("olmoe", SIZES | GROUPED | EXPERTS),
    "granitemoe": ("granitemoe", SIZES | GROUPED | EXPERTS),
    "glm4_moe": ("glm4_moe", SIZES | GROUPED | EXPERTS),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", SIZES | GROUPED | EXPERTS | {"head_dim": 16}),
    "ernie4_5_moe": ("ernie4_5_moe", SIZES | GROUPED | EXPERTS | {"moe_layer_start_index": 1}),
    "deepseek_v2": ("deepseek_v2", SIZES | EXPERTS | LATENT),
    "deepseek_v3": ("deepseek_v3", SIZES | EXPERTS | LATENT),
}


def network(architecture, dtype=torch.float32, **changes):
    kind, settings = ARCHITECTURES[architecture]
    config = CONFIG_MAPPING[kind](**settings | changes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
    # one expert after the other, so that what is taken of the stack can be seen
    made.set_experts_implementation("eager")
    return made.to(dtype)


@pytest.fixture
def model(request, make_tokenizer):
    return LanguageModel(request.param, network(request.param), make_tokenizer())


class WeightsRead(TorchDispatchMode):
    """Counts the bytes of a network's tensors that operations take in; rows, where an operation takes rows of one."""

    GATHERS = ("aten::embedding", "aten::index", "aten::index_select")

    def __init__(self, network):
        super().__init__()
        self.stores = {t.untyped_storage().data_ptr() for t in [*network.parameters(), *network.buffers()]}
        self.read = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        name = operation._schema.name
        if not any(returned.alias_info for returned in operation._schema.returns):  # not a view
            for tensor in tree_leaves((args, kwargs)):
                if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() in self.stores:
                    rows = name in self.GATHERS
                    key = (tensor.data_ptr(), name, len(self.read)) if rows else (tensor.data_ptr(), tensor.numel())
                    self.read[key] = result.nbytes if rows else tensor.nbytes
        return result

    @property
    def bytes(self):
        return sum(self.read.values())


def read_in_a_pass(model, before=5):
    """Bytes of weights that a pass over one token reads; and bytes that the cache then holds for each token."""
    cache = model.new_cache(1, 20)
    model.feed(cache, np.array([0]), [np.arange(2, 2 + before)])
    with WeightsRead(model.network) as weights:
        model.feed(cache, np.array([0]), [np.array([9])])
    held = [store[0, : before + 1] for layer in cache.layers for store in (layer.keys, layer.values)]
    assert all(bool(store.any()) for store in held)
    return weights.bytes, sum(store.nbytes for store in held) / (before + 1)


@pytest.mark.parametrize("model", ARCHITECTURES, indirect=True)
def test_costs_count_what_a_pass_reads(model, recwarn):
    weights, token = read_in_a_pass(model)
    assert model.profile.weight_bytes == pytest.approx(weights, rel=0.01)
    assert model.profile.kv_bytes_per_token == token
    rates = MemoryTraffic().rates([model.profile])[0]
    assert rates[:3].tolist() == [model.profile.weight_bytes, token, token]
    assert not [warning for warning in recwarn if "experts" in str(warning.message)]


@pytest.mark.parametrize("model", ["falcon", "gpt_bigcode", "minicpm3", "deepseek_v2", "deepseek_v3"], indirect=True)
def test_models_with_few_keys_decode_as_without_a_cache(model):
    rng = np.random.default_rng(0)
    cache, ids = model.new_cache(3, 40), [[], [], []]
    for _ in range(4):
        chunks = [rng.integers(2, 96, rng.integers(1, 6)) for _ in range(3)]
        _, logits = model.feed(cache, np.arange(3), chunks)
        for row, chunk in enumerate(chunks):
            ids[row] += chunk.tolist()
            with torch.inference_mode():
                whole = model.network(torch.tensor([ids[row]]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row], whole, rtol=1e-4, atol=1e-4)


def test_a_pass_is_charged_the_experts_a_token_goes_through(make_tokenizer):
    dense, sparse = (
        LanguageModel("m", network("mixtral", num_experts_per_tok=k), make_tokenizer()).profile for k in (8, 2)
    )
    # an expert is 3 x 64 x 80; two layers do without 6 of them
    assert dense.body_parameters - sparse.body_parameters == 2 * 6 * 3 * 64 * 80
    assert Flops().rates([dense])[0, 1] - Flops().rates([sparse])[0, 1] == 2 * 2 * 6 * 3 * 64 * 80


def test_experts_that_are_laid_out_otherwise_are_charged_whole_and_named(make_tokenizer):
    known = network("mixtral")
    every = sum(p.numel() for p in known.parameters()) - 2 * 97 * 64
    for module in known.modules():
        if "Experts" in type(module).__name__:
            module.expert_count = module.__dict__.pop("num_experts")
            module.forward = lambda hidden, index, weights: hidden  # what they make of a token is not counted
    with pytest.warns(UserWarning, match=r"strange: how many of its experts .* cannot be told \(model\.layers\.0\."):
        profile = LanguageModel("strange", known, make_tokenizer()).profile
    assert profile.body_parameters == every


def test_experts_one_beside_the_other_are_counted_like_stacked_ones(make_tokenizer):
    stacked = network("mixtral")
    expected = LanguageModel("m", copy.deepcopy(stacked), make_tokenizer()).profile
    for layer in stacked.model.layers:
        layer.mlp.experts = nn.ModuleList(
            nn.ModuleDict({"gate_up": nn.Linear(64, 160, bias=False), "down": nn.Linear(80, 64, bias=False)})
            for _ in range(8)
        )
        layer.mlp.forward = lambda hidden: hidden  # profiles do not depend on what experts make of a token
    assert LanguageModel("m", stacked, make_tokenizer()).profile == expected


# -- other precisions -------------------------------------------------------------------------------------------------


class PackedLinear(nn.Module):
    """A linear layer of 4-bit weights, kept as GPTQ keeps them: in buffers."""

    def __init__(self, layer):
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 7
        levels = ((weight / scales).round() + 8).to(torch.int32)  # (out, in)
        shifts = torch.arange(0, 32, 4, dtype=torch.int32)
        packed = (levels.view(len(weight), -1, 8) << shifts).sum(-1, dtype=torch.int32)
        self.register_buffer("qweight", packed)
        self.register_buffer("scales", scales.half())
        self.register_buffer("shifts", shifts, persistent=False)
        self.bias = None

    def forward(self, x):
        levels = (self.qweight[..., None] >> self.shifts) & 15
        weight = (levels.flatten(1) - 8).to(x.dtype) * self.scales.to(x.dtype)
        return nn.functional.linear(x, weight)


def packed(seed_change=0):
    made = network("llama")
    for layer in made.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            linear.weight.data[0, 0] += seed_change
            setattr(layer.mlp, name, PackedLinear(linear))
    return made


def test_weights_in_buffers_are_counted(make_tokenizer):
    model = LanguageModel("packed", packed(), make_tokenizer())
    weights, _ = read_in_a_pass(model)
    assert model.profile.weight_bytes == pytest.approx(weights, rel=0.01)
    whole = LanguageModel("whole", network("llama"), make_tokenizer()).profile
    # 2 layers of 3 matrices of 80 x 64, half a byte each instead of 4; 2 bytes of scale for each row
    saved = 2 * 3 * 80 * 64 * 3.5 - 2 * 2 * (80 + 80 + 64)
    assert model.profile.weight_bytes == whole.weight_bytes - saved
    # which multiply as many numbers as before
    assert model.profile.body_parameters == whole.body_parameters


def test_fingerprints_tell_weights_in_buffers_apart(make_tokenizer):
    one, same, other = (LanguageModel("m", packed(change), make_tokenizer()) for change in (0, 0, 0.5))
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_fingerprints_of_embedded_models_are_those_that_saved_policies_name(pool):
    assert [model.fingerprint for model in pool.models] == ["5ab42c3c7d124dbf", "c6bb3b627ed92be2"]


def test_each_tensor_counts_by_its_own_precision(make_tokenizer):
    made = network("llama", torch.bfloat16)
    made.lm_head.float()
    made.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    model = LanguageModel("mixed", made, make_tokenizer())
    body, head = model.profile.body_parameters, model.profile.head_parameters
    assert MemoryTraffic().rates([model.profile])[0, 0] == 2 * body + 4 * head
    assert read_in_a_pass(model)[0] == pytest.approx(2 * body + 4 * head, rel=0.01)


def test_costs_of_the_embedded_pair_are_what_they_were(pool):
    slm, llm = pool.profiles
    assert (slm.body_parameters, slm.head_parameters, slm.attention_width) == (46_320, 24_576, 96)
    assert (llm.body_parameters, llm.head_parameters, llm.attention_width) == (1_439_040, 98_304, 576)
    # loaded in float32: four bytes for each number, keys and values too
    assert MemoryTraffic().rates([slm, llm])[:, :2].tolist() == [[283_584, 768], [6_149_376, 4_608]]


# -- the memory plan --------------------------------------------------------------------------------------------------


PLANNED = ["falcon", "gpt_bigcode", "minicpm3", "deepseek_v3", "mixtral", "llama", "gpt2"]


@pytest.mark.parametrize("architecture", PLANNED)
def test_caches_are_planned_as_large_as_they_are(architecture, make_tokenizer, tmp_path):
    network(architecture).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    planned = Source.find(ModelSpec(str(tmp_path), dtype="float32")).cache_bytes(rows=3, capacity=20)
    model = load_pool([str(tmp_path)] * 2, dtype="float32", rows=3, capacity=20, verbose=False).slm
    cache = model.new_cache(3, 20)
    model.feed(cache, np.array([0]), [np.array([5])])
    assert planned == sum(store.nbytes for layer in cache.layers for store in (layer.keys, layer.values))


def test_a_model_that_runs_on_memory_alone_is_planned_with_all_its_heads(folders, monkeypatch):
    def refuse(network):
        raise NotImplementedError("no kernel")

    monkeypatch.setattr("envs.models.source.cached_token", refuse)
    source = Source.find(ModelSpec(str(folders["llama_large"]), dtype="float32"))
    with pytest.warns(UserWarning, match=re.escape(f"{source.name}: what its cache keeps of a token cannot be told")):
        # keys and values of 3 layers, 6 heads of 8
        assert source.cache_bytes(rows=1, capacity=9) == 2 * 3 * 6 * 8 * 4 * 10
