"""Threads that decode over one pool write what they would have written one after the other."""

from __future__ import annotations

import copy
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import envs.models.language_model
from envs.decoding.session import Session
from envs.models.language_model import LanguageModel
from envs.models.pool import ModelPool

THREADS, EACH = 4, 2


@pytest.fixture(autouse=True)
def _hurried():
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.fixture(params=["llama", "gpt2", "qwen2", "llama_padded"])
def shared_pool(request, pools, monkeypatch):
    family, *padded = request.param.split("_")
    if not padded:
        return pools[family]
    monkeypatch.setattr(envs.models.language_model, "PACKED", ())
    models = []
    for model in pools[family].models:
        network = copy.deepcopy(model.network)
        network.get_output_embeddings()._forward_pre_hooks.clear()
        network.set_attn_implementation("sdpa")
        models.append(LanguageModel(model.name, network, model.tokenizer))
    return ModelPool(models)


def episode(pool, number):
    """Tokens, hidden states and logits of two rows that a random policy decodes."""
    rng = np.random.default_rng(number)
    session, rows = Session(pool, 2, 16), np.arange(2)
    session.start(rows, [rng.integers(2, 96, rng.integers(3, 20)) for _ in rows])
    states, flying = [], rows
    while len(flying):
        seen = session.observe(flying)
        states += [seen.hidden.flatten(), seen.logits.flatten()]
        step = session.step(flying, rng.integers(0, 2, len(flying)))
        flying = flying[~(step.terminated | step.truncated)]
    return [session.response(row).tolist() for row in rows], torch.cat(states), session.ledger[..., :5]


def test_threads_decode_what_one_thread_decodes(shared_pool):
    expected = [episode(shared_pool, number) for number in range(THREADS * EACH)]
    begin = threading.Barrier(THREADS)

    def decode(thread):
        begin.wait()
        return [episode(shared_pool, EACH * thread + number) for number in range(EACH)]

    with ThreadPoolExecutor(THREADS) as threads:
        decoded = [result for part in threads.map(decode, range(THREADS)) for result in part]
    for (texts, states, ledger), (wanted, wanted_states, wanted_ledger) in zip(decoded, expected, strict=True):
        assert texts == wanted
        assert torch.equal(states, wanted_states)
        assert np.array_equal(ledger, wanted_ledger)


def test_threads_decode_with_the_embedded_pair(pool, task):
    def answer(number):
        session, row = Session(pool, 1, 24), np.array([0])
        session.start(row, [pool.encode(task.example("test", number).prompt)])
        states, ended = [], False
        while not ended:
            states.append(session.observe(row).hidden)
            step = session.step(row, (states[-1][:, 0] > 0).long().numpy())
            ended = step.terminated[0] or step.truncated[0]
        return session.response(0).tolist(), torch.cat(states)

    expected = [answer(number) for number in range(8)]
    with ThreadPoolExecutor(THREADS) as threads:
        decoded = list(threads.map(answer, range(8)))
    for (tokens, hidden), (wanted, wanted_hidden) in zip(decoded, expected, strict=True):
        assert tokens == wanted
        assert torch.equal(hidden, wanted_hidden)


def test_what_users_run_on_a_network_is_not_kept(tiny_pool):
    model = tiny_pool.slm
    with torch.inference_mode():
        model.network(torch.tensor([[5, 6, 7]]))
    assert envs.models.language_model._PASS.hidden is None
