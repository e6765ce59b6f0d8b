"""Tasks and models for tests of drafts: random letters, an SLM akin to its LLM, scripts, and models without a cache."""

from __future__ import annotations

import copy

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from envs.models.language_model import LanguageModel
from envs.models.pool import ModelPool
from envs.tasks.task import Example, Task

MAX_NEW = 24


def array(*values):
    return np.array(values, dtype=np.int64)


class Letters(Task):
    """Prompts of random characters; right is a response of an even length."""

    name = "letters"

    def size(self, split):
        return 30

    def example(self, split, index):
        rng = np.random.default_rng(index)
        prompt = "".join(rng.choice(list("abcdefghijkl 0123456789"), rng.integers(1, 12))) + "?"
        return Example(f"letters/{index}", prompt, "x", "x")

    def is_correct(self, example, response):
        return len(response) % 2 == 0


def kin_of(pool, seed=0):
    """The LLM of a pool behind a copy of itself with noise in its weights, which often writes the same."""
    network = copy.deepcopy(pool.models[-1].network)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.03 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return ModelPool([LanguageModel("kin", network, pool.tokenizer), pool.models[-1]])


def successors(name, tokenizer, end, **others):
    """A model that writes token t + 1 after token t, or what `others` say after `t<t>`: a script."""
    size = len(tokenizer)
    config = LlamaConfig(
        hidden_size=128, num_hidden_layers=1, num_attention_heads=4, intermediate_size=8, vocab_size=size,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=end, pad_token_id=1,
    )  # fmt: skip
    network = LlamaForCausalLM(config)
    follows = {token: token + 1 for token in range(size - 1)} | {int(t[1:]): token for t, token in others.items()}
    with torch.no_grad():
        for parameter in network.model.layers.parameters():
            parameter.zero_()
        network.model.embed_tokens.weight.copy_(torch.eye(size, 128))
        network.lm_head.weight.zero_()
        for token, following in follows.items():
            network.lm_head.weight[following, token] = 1
    return LanguageModel(name, network, tokenizer)


class Plain:
    """What a model writes next when it reads a whole sequence."""

    def __init__(self, pool):
        self.pool = pool

    def logits(self, model, ids):
        """Of the next token, (vocab,)."""
        with torch.inference_mode():
            logits = self.pool.models[model].network(torch.tensor([list(map(int, ids))]), use_cache=False).logits
        return logits[0, -1, : self.pool.vocab_size]

    def token(self, model, ids):
        return int(self.logits(model, ids).argmax())
