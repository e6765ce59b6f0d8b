from __future__ import annotations

import os
import string
from contextlib import contextmanager

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test reaches the network
# Models here are tiny: threads that wait for each other take longer, many times so where other work shares the cores.
os.environ["OMP_NUM_THREADS"] = os.environ.get("CITER_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # nor do they spin, which takes the cores from everyone else

import pytest

# Nothing heavy is imported here: the process that hands out the tests reads this file too, before it starts the others.
CHARACTERS = string.printable[:95]
ENDS = [0, 30, 45, 60, 75, 90]  # several end tokens, so that random text ends now and then
PLAIN = {"max_position_embeddings": 128, "tie_word_embeddings": False}
POOLS = {
    "llama": ["llama_small", "llama_large"],
    "qwen2": ["qwen2_small", "qwen2_large"],
    "gpt2": ["gpt2_small", "gpt2_large"],
    "three": ["llama_small", "gpt2_small", "qwen2_large"],
}


def configs():
    """Tiny models of three families."""
    from transformers import GPT2Config, LlamaConfig, Qwen2Config

    def gqa(config, width, layers, heads, kv_heads, mlp):
        sizes = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": mlp}
        return config(**sizes, num_attention_heads=heads, num_key_value_heads=kv_heads, **PLAIN)

    return {
        # grouped-query attention: 4 query heads over 2, 6 over 2
        "llama_small": gqa(LlamaConfig, 32, 2, 4, 2, 48),
        "llama_large": gqa(LlamaConfig, 48, 3, 6, 2, 64),
        "qwen2_small": gqa(Qwen2Config, 32, 2, 2, 1, 48),
        "qwen2_large": gqa(Qwen2Config, 32, 3, 4, 4, 64),
        "gpt2_small": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128),
        "gpt2_large": GPT2Config(n_embd=48, n_layer=2, n_head=4, n_positions=128),
    }


@pytest.fixture(scope="session", autouse=True)
def _threads():
    import torch

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(scope="session")
def make_tokenizer():
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    def make(characters=CHARACTERS, end="<end>", pad="<|endoftext|>"):
        vocabulary = {token: index for index, token in enumerate(["<end>", "<|endoftext|>", *characters])}
        letters = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        letters.decoder = decoders.Fuse()
        return PreTrainedTokenizerFast(tokenizer_object=letters, eos_token=end, pad_token=pad)

    return make


@pytest.fixture(scope="session")
def save_model(tmp_path_factory, make_tokenizer):
    """Saves a random model and its tokenizer; weights wide enough that greedy text is not constant."""
    import torch
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    def save(name, config, seed=0, tokenizer=None, weights=True, ends=ENDS):
        folder = tmp_path_factory.mktemp("models") / name
        tokenizer = tokenizer or make_tokenizer()
        config.vocab_size, config.initializer_range = len(tokenizer), 0.5
        config.bos_token_id, config.eos_token_id, config.pad_token_id = None, tokenizer.eos_token_id, 1
        tokenizer.save_pretrained(folder)
        if weights:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                network = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
            network.generation_config.eos_token_id = ends
            network.save_pretrained(folder)
        else:
            config.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def folders(save_model):
    return {name: save_model(name, config, seed) for seed, (name, config) in enumerate(configs().items())}


@pytest.fixture(scope="session")
def pools(folders):
    from envs.models.loading import load_pool

    return {
        name: load_pool([str(folders[m]) for m in members], dtype="float32", verbose=False)
        for name, members in POOLS.items()
    }


@pytest.fixture(scope="session")
def tiny_pool(pools):
    return pools["llama"]


@pytest.fixture(scope="session")
def pool():
    from envs.models.loading import embedded_pool

    return embedded_pool()


@pytest.fixture(scope="session")
def task():
    from envs.tasks.arithmetic import ArithmeticTask

    return ArithmeticTask()


@pytest.fixture
def passes(monkeypatch):
    """The passes that models make: which model, and the tokens of each row."""
    from envs.models.language_model import LanguageModel

    made, feed = [], LanguageModel.feed

    def counted(self, cache, rows, chunks, every_position=False):
        made.append((self.name, [chunk.tolist() for chunk in chunks]))
        return feed(self, cache, rows, chunks, every_position)

    monkeypatch.setattr(LanguageModel, "feed", counted)
    return made


class Interruption(BaseException):
    pass


@pytest.fixture
def interrupted_at(monkeypatch):
    """A context that is broken off when its n-th file is about to be moved to its place."""
    import envs.storage

    @contextmanager
    def interrupted(moment):
        replace, left = envs.storage.os.replace, [moment]

        def failing(source, target):
            left[0] -= 1
            if left[0] == 0:
                raise Interruption
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr("envs.storage.os.replace", failing)
            with pytest.raises(Interruption):
                yield

    return interrupted
