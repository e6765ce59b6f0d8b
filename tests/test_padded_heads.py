"""Heads of models are often padded beyond the tokenizer: what it cannot decode is never written."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import GPT2Config, LlamaConfig

from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.loading import load_pool
from envs.models.pool import ModelPool

KNOWN, PADDED = 97, 128
LENGTH = 24


@pytest.fixture(scope="module")
def padded_pool(save_model, make_tokenizer):
    """Models that like best what nobody can decode."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 128}
    configs = [
        LlamaConfig(hidden_size=32, intermediate_size=48, tie_word_embeddings=False, **sizes),
        LlamaConfig(hidden_size=48, intermediate_size=48, tie_word_embeddings=False, **sizes),
    ]
    pool = load_pool(
        [str(save_model(f"padded{i}", config, i, ends=[0])) for i, config in enumerate(configs)], verbose=False
    )
    models = []
    for model in pool.models:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model.network.resize_token_embeddings(PADDED, mean_resizing=False)
        model.network.get_output_embeddings().weight[KNOWN:] *= 1000
        model.network.requires_grad_(False)
        models.append(type(model)(model.name, model.network, model.tokenizer))
    return ModelPool(models)


def generated(model, prompt):
    """What transformers writes where ids without a token are suppressed."""
    out = model.network.generate(
        torch.tensor([prompt]),
        max_new_tokens=LENGTH,
        do_sample=False,
        suppress_tokens=list(range(KNOWN, PADDED)),
        eos_token_id=0,
        pad_token_id=1,
    )
    return out[0, len(prompt) :].tolist()


PROMPTS = [np.arange(5, 12), np.array([40, 3, 77, 21])]


def test_the_models_would_write_what_cannot_be_decoded(padded_pool):
    for model in padded_pool.models:
        assert model.vocab_size == PADDED
        _, logits = model.feed(model.new_cache(1, 20), np.array([0]), PROMPTS[:1])
        assert int(logits.argmax()) >= KNOWN


@pytest.mark.parametrize("number", [0, 1])
def test_one_model_writes_what_it_generates_with_those_ids_suppressed(padded_pool, number):
    session, rows = Session(padded_pool, 2, LENGTH), np.arange(2)
    session.start(rows, PROMPTS)
    flying = rows
    while len(flying):
        step = session.step(flying, np.full(len(flying), number))
        flying = flying[~(step.terminated | step.truncated)]
    for row, prompt in enumerate(PROMPTS):
        assert session.response(row).tolist() == generated(padded_pool.models[number], prompt)


def test_sampled_tokens_can_be_decoded(padded_pool):
    session, rows = Session(padded_pool, 2, LENGTH, sampling=Sampling(temperature=5.0)), np.arange(2)
    session.start(rows, PROMPTS, generators=[np.random.default_rng(i) for i in rows])
    rng, flying = np.random.default_rng(0), rows
    while len(flying):
        step = session.step(flying, rng.integers(0, 2, len(flying)))
        assert (step.tokens < KNOWN).all()
        flying = flying[~(step.terminated | step.truncated)]


def test_teacher_forced_choices_can_be_decoded(padded_pool):
    forcing = TeacherSession(padded_pool, 2, LENGTH)
    _, choices = forcing.start_references(np.arange(2), PROMPTS, [np.arange(20, 30), np.arange(50, 70)])
    assert all((chosen < KNOWN).all() for chosen in choices)


def test_heads_as_large_as_the_tokenizer_are_read_whole(pool, tiny_pool, save_model):
    assert pool.vocab_size == 512 == min(model.vocab_size for model in pool.models)
    assert tiny_pool.vocab_size == KNOWN
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=128)
    folder = str(save_model("plain", config))
    assert load_pool([folder, folder], verbose=False).vocab_size == KNOWN
