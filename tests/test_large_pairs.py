"""The pairs of the field, planned and refused without their weights, by the shapes that their configurations have."""

from pathlib import Path
from types import SimpleNamespace

import hydra
import pytest
import torch
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from envs.models import loading
from envs.models.loading import load_pool
from envs.models.profile import profile_of
from envs.models.source import Source
from experiments.common.config import register_schemas

PAGE = Path(__file__).resolve().parents[1] / "docs" / "guides" / "large_pairs.md"


def shape(hidden, layers, heads, kv_heads, mlp, vocabulary, tied=False, **more):
    sizes = {"hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads}
    sizes |= {"num_key_value_heads": kv_heads, "intermediate_size": mlp, "vocab_size": vocabulary}
    return sizes | {"tie_word_embeddings": tied, "max_position_embeddings": 32768, "dtype": "bfloat16"} | more


CONFIGS = {
    "Qwen/Qwen2-1.5B-Instruct": (Qwen2Config, shape(1536, 28, 12, 2, 8960, 151936, tied=True)),
    "Qwen/Qwen2-72B-Instruct": (Qwen2Config, shape(8192, 80, 64, 8, 29568, 152064)),
    "meta-llama/Llama-3.1-8B-Instruct": (LlamaConfig, shape(4096, 32, 32, 8, 14336, 128256)),
    "meta-llama/Llama-3.1-70B-Instruct": (LlamaConfig, shape(8192, 80, 64, 8, 28672, 128256)),
    "Qwen/Qwen3-0.6B": (Qwen3Config, shape(1024, 28, 16, 8, 3072, 151936, tied=True, head_dim=128)),
    "Qwen/Qwen3-8B": (Qwen3Config, shape(4096, 36, 32, 8, 12288, 151936, head_dim=128)),
}
# Parameters, as the models' cards have them.
PARAMETERS = {
    "Qwen/Qwen2-1.5B-Instruct": 1.54e9, "Qwen/Qwen2-72B-Instruct": 72.7e9,
    "meta-llama/Llama-3.1-8B-Instruct": 8.03e9, "meta-llama/Llama-3.1-70B-Instruct": 70.6e9,
    "Qwen/Qwen3-0.6B": 0.596e9, "Qwen/Qwen3-8B": 8.19e9,
}  # fmt: skip
SLOW = pytest.mark.slow  # networks of 80 layers, without memory
PAIRS = [pytest.param("qwen2", marks=SLOW), pytest.param("llama31", marks=SLOW), "qwen3"]
CARD = 84_000_000_000
"""Bytes that are free on a card of 80 GiB."""
BANDWIDTH, RENT = 3.35e12, 2.5
"""An H100's bytes a second, and dollars an hour: a round figure."""


@pytest.fixture
def cards(monkeypatch, make_tokenizer):
    """So many cards of 80 GiB, and configurations in place of the hub; weights cannot be read."""
    tokenizer = make_tokenizer()

    def find(spec):
        kind, settings = CONFIGS[spec.name]
        return Source(spec, spec.name, {}, kind(**settings), tokenizer)

    def make(count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (CARD, CARD))
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)

    monkeypatch.setattr(loading, "Source", SimpleNamespace(find=find))
    monkeypatch.setattr(Source, "load", lambda self: pytest.fail(f"weights of {self.name} were read"))
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: True)
    return make


def settings_of(pair, *overrides):
    register_schemas()
    with hydra.initialize_config_dir(str(PAGE.parents[2] / "conf"), version_base="1.3"):
        models = hydra.compose("evaluate", [f"models={pair}", *overrides]).models
    plain = {key: models[key] for key in ("device", "rows", "capacity")}
    return [dict(name) for name in models.names], plain


def plan_of(pair, capsys, *overrides):
    """The lines of the plan; it ends where weights would be read."""
    names, settings = settings_of(pair, *overrides)
    with pytest.raises(pytest.fail.Exception, match="were read"):
        load_pool(names, **settings)
    return capsys.readouterr().out.splitlines()


def priced(name):
    """Milliseconds that a token takes at least, hours of 1,000 answers of 256 tokens, dollars of a million tokens."""
    kind, settings = CONFIGS[name]
    with torch.device("meta"):
        from transformers import AutoModelForCausalLM

        network = AutoModelForCausalLM.from_config(kind(**settings)).to(torch.bfloat16)
    profile = profile_of(name, network)
    assert sum(weight.numel() for weight in network.parameters()) == pytest.approx(PARAMETERS[name], rel=0.01)
    seconds = (profile.weight_bytes + 1024 * profile.kv_bytes_per_token) / BANDWIDTH
    return 1000 * seconds, 256_000 * seconds / 3600, 1e6 * seconds / 3600 * RENT


@pytest.mark.parametrize("pair", PAIRS)
def test_the_plan_is_the_pages(pair, cards, capsys):
    cards(8)
    lines = plan_of(pair, capsys)
    assert len(lines) == 2
    for line in lines:
        assert line in PAGE.read_text()


@pytest.mark.parametrize("pair", [pytest.param("qwen2", marks=SLOW), pytest.param("llama31", marks=SLOW)])
def test_a_pair_that_does_not_fit_one_card_is_refused_by_what_it_needs(pair, cards):
    cards(1)
    names, settings = settings_of(pair)
    with pytest.raises(ValueError, match=r"device_map=auto: 1\d\d\.\d\d GB are needed, \d\d\.\d\d GB .* on 1 CUDA"):
        load_pool(names, **settings)


def test_a_pair_fits_one_card_until_its_caches_do_not(cards, capsys):
    cards(1)
    plan_of("qwen3", capsys)
    names, settings = settings_of("qwen3", "models.rows=512")
    with pytest.raises(ValueError, match=r"cuda: \d+\.\d\d GB are needed, 84\.00 GB are free; lower rows \(512\)"):
        load_pool(names, **settings)


@pytest.mark.parametrize("name", [pytest.param(n, marks=SLOW if "7" in n else ()) for n in CONFIGS])
def test_times_and_prices_are_the_pages(name):
    milliseconds, hours, dollars = priced(name)
    row = f"| `{name}` | {milliseconds:.1f} | {hours:.2f} | {dollars:.2f} |"
    assert row in PAGE.read_text(), row
