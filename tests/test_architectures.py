"""The architectures that docs/own/architectures.md lists: each tried with a random tiny model."""

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from envs.models.checks import check_attention
from envs.models.language_model import LanguageModel
from tests.test_profile import ARCHITECTURES, GROUPED, SIZES, network

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own" / "architectures.md"
FAST = ["gemma2", "gemma3", "mistral", "phi3", "gpt_neox", "qwen2"]
REFUSED = {
    "phi3": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 8,
                                  "long_factor": [2.0] * 8, "original_max_position_embeddings": 64}}, "longrope"),
    "falcon": ({"alibi": True}, "alibi"),
    "bloom": ({}, "sdpa"),
    "mpt": ({}, "sdpa"),
    "gpt_oss": ({}, "sdpa"),
    "llama4_text": ({}, "chunked_attention"),
    "qwen3_next": ({}, "recurrent state|linear_attention"),
    "mamba": ({}, "recurrent state"),
    "mamba2": ({}, "recurrent state"),
    "jamba": ({}, "recurrent state"),
    "rwkv": ({}, "recurrent state"),
    "falcon_h1": ({}, "recurrent state"),
    "recurrent_gemma": ({}, "recurrent"),
    "lfm2": ({"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
}  # fmt: skip


def uncached(model, ids):
    """Logits behind `ids`, (vocab,), of the model as transformers has it: eager attention, no cache, no mask."""
    plain = copy.deepcopy(model).eval()
    plain.set_attn_implementation("eager")
    plain.get_output_embeddings()._forward_pre_hooks.clear()
    with torch.inference_mode():
        return plain(torch.tensor([ids]), use_cache=False).logits[0, -1]


@pytest.mark.parametrize(
    "architecture", [pytest.param(a, marks=() if a in FAST else pytest.mark.slow) for a in ARCHITECTURES]
)
def test_ragged_cached_passes_equal_the_whole_sequence(architecture, make_tokenizer):
    made = network(architecture)
    original = copy.deepcopy(made)
    model = LanguageModel(architecture, made, make_tokenizer())
    rng = np.random.default_rng(0)
    cache, ids = model.new_cache(3, min(60, model.max_positions)), [[], [], []]
    for _ in range(4):
        rows = rng.permutation(3)[: rng.integers(1, 4)]
        chunks = [rng.integers(2, 96, rng.integers(1, 12)) for _ in rows]
        _, logits = model.feed(cache, rows, chunks)
        for i, row in enumerate(rows):
            ids[row] += chunks[i].tolist()
            torch.testing.assert_close(logits[i], uncached(original, ids[row]), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3", "mistral"])
def test_a_window_is_as_long_as_sequences_may_be(architecture, make_tokenizer):
    model = LanguageModel(architecture, network(architecture), make_tokenizer())
    assert model.max_positions == 64
    # behind the window the model itself forgets, and what is cached does not
    ids = np.random.default_rng(1).integers(2, 96, 80)
    cache = model.new_cache(1, 90)
    _, logits = model.feed(cache, np.array([0]), [ids])
    assert not torch.allclose(logits[0], uncached(network(architecture), ids.tolist()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_the_page_says_is_refused(kind):
    settings, named = REFUSED[kind]
    sizes = SIZES | GROUPED if kind == "phi3" else {}
    config = CONFIG_MAPPING[kind](**sizes | settings)
    with pytest.raises(ValueError, match=named):
        check_attention(kind, config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def test_the_page_lists_what_was_tried():
    rows = re.findall(r"^\| `(\w+)` \| (works|refused)", PAGE.read_text(), re.MULTILINE)
    assert {name for name, says in rows if says == "works"} == {kind for kind, _ in ARCHITECTURES.values()}
    assert {name for name, says in rows if says == "refused"} == set(REFUSED) - {"phi3", "falcon"}
