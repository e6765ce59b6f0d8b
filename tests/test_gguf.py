"""GGUF files are converted once, and what was converted is the same model."""

import json

import numpy as np
import pytest
import torch

from envs.models import gguf_cache
from envs.models.loading import load_pool
from envs.models.source import Source

gguf = pytest.importorskip("gguf")
pytest.importorskip("accelerate")


def write_model(path, seed=0):
    """A random model of one layer, and a tokenizer of letters."""
    rng = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(str(path), "qwen2")
    tokens = ["<end>", *(chr(code) for code in range(33, 127)), "Ġ", "ab"]
    width, inner, heads, kv_heads, size = 32, 48, 4, 2, 8
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(0)
    shapes = {
        "token_embd.weight": (len(tokens), width), "output.weight": (len(tokens), width),
        "output_norm.weight": (width,),
        "blk.0.attn_norm.weight": (width,), "blk.0.ffn_norm.weight": (width,),
        "blk.0.attn_q.weight": (heads * size, width), "blk.0.attn_q.bias": (heads * size,),
        "blk.0.attn_k.weight": (kv_heads * size, width), "blk.0.attn_k.bias": (kv_heads * size,),
        "blk.0.attn_v.weight": (kv_heads * size, width), "blk.0.attn_v.bias": (kv_heads * size,),
        "blk.0.attn_output.weight": (width, heads * size), "blk.0.ffn_gate.weight": (inner, width),
        "blk.0.ffn_up.weight": (inner, width), "blk.0.ffn_down.weight": (width, inner),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(name, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def load(name, cache, **settings):
    return load_pool([name, name], dtype="float32", rows=2, verbose=False, gguf_cache=str(cache), **settings)


@pytest.fixture
def read(monkeypatch):
    """Where weights were read from."""
    places, original = [], Source.load

    def spied(self):
        places.append("gguf" if "gguf_file" in self.options else "safetensors")
        return original(self)

    monkeypatch.setattr(Source, "load", spied)
    return places


def test_a_file_is_converted_once_and_stays_the_same_model(tmp_path, read):
    name, cache = write_model(tmp_path / "small.gguf"), tmp_path / "cache"
    first, again = load(name, cache), load(name, cache)
    assert read == ["gguf", "safetensors"]
    assert first.fingerprints == again.fingerprints
    assert (first.names, first.end_tokens.tolist()) == (again.names, again.end_tokens.tolist())
    for (one, a), (other, b) in zip(
        first.slm.network.state_dict().items(), again.slm.network.state_dict().items(), strict=True
    ):
        assert one == other
        assert torch.equal(a, b)
    assert first.tokenizer.get_vocab() == again.tokenizer.get_vocab()
    assert again.encode("ab").tolist() == first.encode("ab").tolist()
    [folder] = cache.iterdir()
    assert json.loads((folder / gguf_cache.ABOUT).read_text())["file"] == "small.gguf"
    # another precision, and another file of the same name, are other conversions
    load_pool([name, name], dtype="bfloat16", rows=2, verbose=False, gguf_cache=str(cache))
    write_model(tmp_path / "small.gguf", seed=1)
    assert load(name, cache).fingerprints != first.fingerprints
    assert read == ["gguf", "safetensors", "gguf", "gguf"]
    assert len(list(cache.iterdir())) == 3


def test_what_is_not_whole_is_not_read(tmp_path, read, monkeypatch):
    name, cache = write_model(tmp_path / "small.gguf"), tmp_path / "cache"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(gguf_cache.os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            load(name, cache)
    assert not list(cache.iterdir())
    load(name, cache)
    assert read == ["gguf", "gguf"]


def test_nothing_is_kept_unless_asked_or_of_a_part_of_the_layers(tmp_path, read):
    name = write_model(tmp_path / "small.gguf")
    load_pool([name, name], dtype="float32", rows=2, verbose=False)
    load_pool([{"name": name, "layers": 1}] * 2, dtype="float32", rows=2, verbose=False, gguf_cache=str(tmp_path / "c"))
    assert read == ["gguf", "gguf"]
    assert not (tmp_path / "c").exists()
