from __future__ import annotations

import re
import socket
import threading
import time

import pytest
import torch
from transformers import BertConfig, FalconConfig, GPT2Config, LlamaConfig, MambaConfig, MistralConfig, Qwen2Config

from envs.models import places
from envs.models.checks import longest_sequence
from envs.models.loading import load_pool
from envs.models.pool import ModelPool
from envs.models.source import ModelSpec, Source

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "max_position_embeddings": 128}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}


def load(*names, **settings):
    settings = {"dtype": "float32", "verbose": False} | settings
    return load_pool([n if isinstance(n, (ModelSpec, dict)) else str(n) for n in names], **settings)


@pytest.fixture
def no_weights(monkeypatch):
    """What happens in a test that takes this must happen before weights are read."""
    monkeypatch.setattr(Source, "load", lambda self: pytest.fail(f"weights of {self.name} were read"))


@pytest.fixture(scope="module")
def bare(save_model):
    """A model without weights."""
    return save_model("bare", LlamaConfig(**SIZES, **HEADS), weights=False)


# -- what loads -------------------------------------------------------------------------------------------------------


def test_a_pool_holds_its_models_in_order_with_one_vocabulary(folders):
    members = [str(folders[name]) for name in ("llama_small", "gpt2_small", "qwen2_large")]
    pool = load(*members)
    assert pool.names == members
    assert [model.network.config.model_type for model in pool.models] == ["llama", "gpt2", "qwen2"]
    assert (len(pool), pool.vocab_size, pool.max_positions, pool.capacity) == (3, 97, 128, 128)
    assert pool.slm is pool.models[0]
    assert pool.tokenizer is pool.slm.tokenizer
    assert pool.end_tokens.tolist() == [0, 30, 45, 60, 75, 90]
    assert pool.decode(pool.encode("Two plus 2 = 4.")) == "Two plus 2 = 4."


def test_end_tokens_are_those_of_every_model(save_model):
    folders = [save_model(f"ends{e}", LlamaConfig(**SIZES, **HEADS), ends=e) for e in ([0, 7], 9)]
    assert load(*folders).end_tokens.tolist() == [0, 7, 9]


def test_equal_specs_are_loaded_once_and_unequal_ones_apart(folders, monkeypatch):
    loaded, original = [], Source.load
    monkeypatch.setattr(Source, "load", lambda self: loaded.append(self.name) or original(self))
    same = load(folders["llama_small"], folders["llama_small"])
    assert same.models[0] is same.models[1]
    assert loaded == same.names[:1]
    spec = {"name": str(folders["llama_small"])}
    apart = load(spec, spec | {"layers": 1})
    assert apart.models[0] is not apart.models[1]


def test_weights_are_those_saved(folders):
    pool = load(folders["llama_small"], folders["llama_large"])
    again = load(folders["llama_small"], folders["llama_large"])
    for model, other in zip(pool.models, again.models, strict=True):
        for a, b in zip(model.network.parameters(), other.network.parameters(), strict=True):
            assert torch.equal(a, b)
            assert not a.requires_grad
        assert not model.network.training


def test_layers_keeps_the_first_layers(folders):
    whole, cut = load(ModelSpec(str(folders["llama_large"])), ModelSpec(str(folders["llama_large"]), layers=2)).models
    assert (len(whole.network.model.layers), len(cut.network.model.layers)) == (3, 2)
    for kept, original in zip(cut.network.model.layers, whole.network.model.layers, strict=False):
        assert torch.equal(kept.mlp.up_proj.weight, original.mlp.up_proj.weight)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16), ("auto", torch.float32)],
)
def test_dtype_is_the_one_asked_for(folders, dtype, expected):
    pool = load(folders["llama_small"], ModelSpec(str(folders["llama_large"]), dtype="bfloat16"), dtype=dtype)
    assert pool.slm.network.dtype == expected
    assert pool.models[1].network.dtype == torch.bfloat16


def test_auto_dtype_is_the_stored_one(save_model, folders, tmp_path):
    network = load(folders["llama_small"], folders["llama_large"]).slm.network.to(torch.bfloat16)
    network.save_pretrained(tmp_path)
    load(folders["llama_small"], folders["llama_large"]).tokenizer.save_pretrained(tmp_path)
    assert load(tmp_path, folders["llama_large"], dtype="auto").slm.network.dtype == torch.bfloat16


def test_the_memory_plan_is_printed_before_weights_are_read(no_weights, bare, capsys):
    with pytest.raises(pytest.fail.Exception, match="were read"):
        load(bare, {"name": str(bare), "dtype": "bfloat16"}, rows=1000, capacity=99, verbose=True)
    # 21,728 parameters of 4 or 2 bytes; 1,000 rows x 100 columns x 64 elements
    assert capsys.readouterr().out.splitlines() == [
        f"{bare}: weights 0.1 MB, cache 25.6 MB (1000 rows x 99 tokens), float32 on cpu",
        f"{bare}: weights 0.0 MB, cache 12.8 MB (1000 rows x 99 tokens), bfloat16 on cpu",
    ]


def test_the_memory_plan_counts_what_loading_takes(folders):
    for name in ("llama_large", "qwen2_small", "gpt2_large"):
        source = Source.find(ModelSpec(str(folders[name]), dtype="bfloat16"))
        model = load(folders[name], folders[name], dtype="bfloat16").slm
        assert source.weight_bytes() == sum(p.nbytes for p in model.network.parameters())


# -- what is refused, before weights are read -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("embedded/xl", "unknown embedded model 'embedded/xl'; there are embedded/slm, embedded/llm"),
        ("./nowhere", r"unknown model '\./nowhere': there is no such folder"),
        ("some/where/else", "unknown model 'some/where/else': there is no such folder"),
        ("weights/nowhere.gguf", r"unknown model 'weights/nowhere\.gguf': there is no such GGUF file"),
        ("nobody/nothing", "unknown model 'nobody/nothing': .* nor a hub id that can be reached"),
        ("nothing", "unknown model 'nothing': .* nor a hub id that can be reached"),
    ],
)
def test_an_unknown_model_is_refused_by_name(no_weights, bare, name, named):
    for names in ((name, bare), (bare, name)):
        with pytest.raises(ValueError, match=named):
            load(*names)


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("patience", "named"),
    [(0.0, "Name or service not known"), (30.0, "no answer within 0.5 s")],
)
def test_a_hub_that_cannot_be_reached_is_said_at_once(no_weights, bare, monkeypatch, online, patience, named):
    released = threading.Event()

    def resolve(*args, **kwargs):
        released.wait(patience)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(places, "PATIENCE", 0.5)
    started = time.perf_counter()
    try:
        with pytest.raises(ValueError, match=f"unknown model 'nobody/nothing': .*{named}; nor was it downloaded"):
            load(bare, "nobody/nothing")
    finally:
        released.set()
    assert time.perf_counter() - started < 2


def test_a_proxy_that_leads_to_the_hub_is_what_must_be_reached(monkeypatch, online):
    asked = []

    def resolve(host, port, *args, **kwargs):
        asked.append((host, port))
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setenv("https_proxy", "http://gate.invalid:3128")
    assert "gate.invalid" in places.why_unreachable()
    assert asked == [("gate.invalid", 3128)]


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: pytest.fail("a name was looked up"))
    assert places.why_unreachable() is None


def test_weights_that_would_run_code_are_refused(no_weights, bare, save_model, tmp_path):
    folder = save_model("unsafe", LlamaConfig(**SIZES, **HEADS), weights=False)
    (folder / "pytorch_model.bin").write_bytes(b"code")
    with pytest.raises(ValueError, match=r"unsafe: its weights are \.bin files, .* GGUF; .*save_pretrained"):
        load(bare, folder)


def test_nothing_but_safetensors_is_read(save_model, monkeypatch):
    folder = save_model("sharded", LlamaConfig(**SIZES, **HEADS), weights=False)
    (folder / "pytorch_model-00001-of-00001.bin").write_bytes(b"code")
    monkeypatch.setattr("envs.models.source._check_safetensors", lambda *args: None)  # as with a hub id
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: pytest.fail("code was run"))
    with pytest.raises(ValueError, match=r"sharded: its weights cannot be read .*convert it"):
        load(folder, folder)


def test_a_folder_without_a_model_is_refused_by_name(no_weights, bare, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=re.escape(f"unknown model '{tmp_path}'")):
        load(bare, tmp_path)
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    monkeypatch.setattr("transformers.utils.is_accelerate_available", lambda: True)
    with pytest.raises(ValueError, match=r"unknown model '.*broken\.gguf'"):
        load(bare, tmp_path / "broken.gguf")


@pytest.mark.parametrize("missing", ["is_gguf_available", "is_accelerate_available"])
def test_a_gguf_file_is_refused_where_its_packages_are_missing(no_weights, bare, tmp_path, monkeypatch, missing):
    (tmp_path / "some.gguf").touch()
    monkeypatch.setattr(f"transformers.utils.{missing}", lambda: False)
    with pytest.raises(ValueError, match=r"some\.gguf: GGUF files need two packages; pip install gguf accelerate"):
        load(bare, tmp_path / "some.gguf")


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_models_are_refused(no_weights, bare, tiny_pool, count):
    with pytest.raises(ValueError, match="a pool needs at least two models, the SLM first"):
        load(*[bare] * count)
    with pytest.raises(ValueError, match="a pool needs at least two models, the SLM first"):
        ModelPool(tiny_pool.models[:count]).check_choice()


def test_vocabularies_that_differ_are_refused_with_both_names(no_weights, bare, save_model, make_tokenizer):
    config = LlamaConfig(**SIZES, **HEADS)
    fewer = save_model("fewer", config, tokenizer=make_tokenizer("abc"), weights=False)
    with pytest.raises(ValueError, match=r"bare has 97 tokens, .*fewer 5 .* models of one family"):
        load(bare, bare, fewer)
    characters = "".join(sorted(bare_characters(bare), reverse=True))
    other = save_model("shuffled", config, tokenizer=make_tokenizer(characters), weights=False)
    with pytest.raises(ValueError, match=r"vocabularies differ: .*bare has 97 tokens, .*shuffled 97"):
        load(bare, other)


def bare_characters(folder):
    tokenizer = Source.find(ModelSpec(str(folder))).tokenizer
    return [token for token in tokenizer.get_vocab() if len(token) == 1]


def test_special_tokens_that_differ_are_refused_with_both_names(no_weights, bare, save_model, make_tokenizer):
    config = LlamaConfig(**SIZES, **HEADS)
    other = save_model("turned", config, tokenizer=make_tokenizer(end="<|endoftext|>", pad="<end>"), weights=False)
    with pytest.raises(ValueError, match=r"special tokens differ: eos_token_id is 0 for .*bare, 1 for .*turned"):
        load(bare, other)


@pytest.mark.parametrize(
    ("name", "config", "named"),
    [
        (
            "recurrent",
            MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4),
            "recurrent keeps a recurrent state, .* choose another model",
        ),
        (
            "distances",
            FalconConfig(**SIZES, num_attention_heads=4, alibi=True),
            "distances biases attention by distances .*alibi.* choose a model with rotary or learned positions",
        ),
        (
            "encoder",
            BertConfig(**SIZES, num_attention_heads=4, intermediate_size=48),
            r"encoder \(bert\) is not a causal language model; choose a decoder",
        ),
    ],
)
def test_a_model_whose_attention_cannot_take_the_cache_is_refused(no_weights, bare, save_model, name, config, named):
    folder = save_model(name, config, weights=False)
    with pytest.raises(ValueError, match=named):
        load(bare, folder)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("windowed", MistralConfig(**SIZES, **HEADS, sliding_window=40)),
        (
            "half_windowed",
            Qwen2Config(**SIZES, **HEADS, sliding_window=40, use_sliding_window=True, max_window_layers=1),
        ),
    ],
)
def test_sequences_are_no_longer_than_a_window(no_weights, bare, save_model, name, config):
    folder = save_model(name, config, weights=False)
    with pytest.raises(ValueError, match=rf"must be in 1\.\.40, the positions of .*{name} or the window .* 41"):
        load(bare, folder, capacity=41)
    with pytest.raises(pytest.fail.Exception, match="were read"):
        load(bare, folder, capacity=40)
    config.use_sliding_window, config.sliding_window, config.layer_types = False, None, None
    assert longest_sequence(config) == 128


def test_a_mistral_without_a_window_is_taken(save_model):
    folder = save_model("mistral", MistralConfig(**SIZES, **HEADS, sliding_window=None))
    assert load(folder, folder).slm.network.config.model_type == "mistral"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"dtype": "float8"}, r"bare: unknown dtype 'float8'; choose one of auto, float32, bfloat16, float16"),
        ({"device": "cuda"}, r"bare: device cuda is not there \(0 CUDA devices\); say device=cpu"),
        ({"device": "cuda:3"}, r"bare: device cuda:3 is not there"),
        ({"device": "toaster"}, r"bare: unknown device 'toaster'; say cpu, cuda or cuda:N"),
        ({"capacity": 129}, r"capacity must be in 1..128, the positions of .*bare or the window .*; it is 129"),
        ({"rows": 10**9}, r"cpu: .* GB are needed, .* lower rows \(1000000000\), lower capacity \(128\)"),
    ],
)
def test_a_setting_that_cannot_be_met_is_refused(no_weights, bare, monkeypatch, settings, named):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=named):
        load(bare, bare, **settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"layers": 3}, r"bare has 2 layers; layers=3 asks for more"),
        ({"layers": 0}, r"bare: layers must be at least 1, is 0"),
        ({"dtype": "int8"}, r"bare: unknown dtype 'int8'"),
        ({"device": "cuda"}, r"bare: device cuda is not there"),
    ],
)
def test_a_spec_that_cannot_be_met_is_refused(no_weights, bare, monkeypatch, settings, named):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=named):
        load(bare, {"name": str(bare)} | settings)


def test_a_misspelt_key_of_a_spec_is_refused_by_name(no_weights, bare):
    with pytest.raises(TypeError, match="layer_count"):
        load(bare, {"name": str(bare), "layer_count": 1})


def test_the_shortest_limit_of_the_models_bounds_the_capacity(no_weights, bare, save_model):
    short = save_model("short", GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=64), weights=False)
    with pytest.raises(ValueError, match="it is 65"):
        load(bare, short, capacity=65)


def test_a_model_without_an_end_token_is_refused_by_name(folders):
    model = load(folders["llama_small"], folders["llama_small"]).slm
    model.network.generation_config.eos_token_id = model.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="llama_small has no end-of-sequence token"):
        _ = model.end_tokens


def test_the_memory_plan_is_printed_unless_told_otherwise(folders, capsys):
    load_pool([str(folders["llama_small"])] * 2, rows=3)
    assert "3 rows x 128 tokens" in capsys.readouterr().out
    load_pool([str(folders["llama_small"])] * 2, rows=3, verbose=False)
    assert not capsys.readouterr().out
