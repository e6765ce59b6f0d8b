"""Pools travel between processes as what they were loaded from."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import pickle
from concurrent.futures import ProcessPoolExecutor

import cloudpickle
import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from envs.decoding.session import Session
from envs.models import loading
from envs.models.loading import embedded_pool, load_pool
from envs.models.pool import ModelPool
from envs.models.source import Source

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch):
    monkeypatch.setattr(loading, "_KEPT", {})


@pytest.fixture
def loads(monkeypatch):
    """Names of the models whose weights are read."""
    loaded, original = [], Source.load
    monkeypatch.setattr(Source, "load", lambda self: loaded.append(self.name) or original(self))
    return loaded


def decoded(pool):
    session, row, tokens = Session(pool, 1, 12), np.array([0]), []
    session.start(row, [np.array([5, 6, 7])])
    for number in range(12):
        step = session.step(row, np.array([number % len(pool)]))
        tokens += step.tokens.tolist()
        if step.terminated[0]:
            break
    return tokens


def decoded_elsewhere(pool):
    kept = loading._KEPT.values()
    return decoded(pool), pool.names, pool.rows, pool.capacity, [pool is other for other in kept]


@pytest.mark.parametrize("module", [pickle, cloudpickle])
def test_a_pool_travels_without_its_weights(folders, module, loads):
    pool = load_pool([str(folders["llama_small"]), str(folders["llama_large"])], dtype="float32", rows=3, verbose=False)
    sent = module.dumps(pool)
    assert len(sent) < 2000
    assert module.loads(sent) is pool
    tokens, names, capacity = decoded(pool), pool.names, pool.capacity
    del pool
    gc.collect()
    loads.clear()
    again, same = module.loads(sent), module.loads(sent)
    assert again is same
    assert loads == names == again.names
    assert (again.rows, again.capacity) == (3, capacity)
    assert all(model.network.dtype == torch.float32 for model in again.models)
    assert decoded(again) == tokens


def test_another_process_decodes_the_same_with_one_loading(folders):
    pool = load_pool(
        [str(folders["gpt2_small"]), {"name": str(folders["gpt2_large"]), "layers": 1}],
        rows=2,
        capacity=64,
        verbose=False,
    )
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        for _ in range(2):
            result = processes.submit(decoded_elsewhere, pool).result()
            assert result == (decoded(pool), pool.names, 2, 64, [True])


def test_a_pool_made_of_models_at_hand_says_why_it_cannot_travel(tiny_pool):
    made = ModelPool(tiny_pool.models)
    with pytest.raises(TypeError, match=r"llama_small, .*llama_large was made of models at hand; .* with load_pool"):
        pickle.dumps(made)
    assert copy.deepcopy(made) is copy.copy(made) is made


def test_the_embedded_pair_arrives_as_the_pool_everybody_has():
    pool = embedded_pool()
    assert pickle.loads(pickle.dumps(pool)) is pool is embedded_pool()
    assert (pool.rows, pool.capacity) == (64, 512)


def test_weights_that_were_replaced_are_refused(save_model):
    folder = save_model("replaced", LlamaConfig(**SIZES, max_position_embeddings=128))
    pool = load_pool([str(folder)] * 2, verbose=False)
    sent = pickle.dumps(pool)
    network = pool.slm.network
    with torch.no_grad():
        network.lm_head.weight += 1
    network.save_pretrained(folder)
    del pool
    gc.collect()
    with pytest.raises(ValueError, match=r"the weights of .*replaced.* are others than those of the pool"):
        pickle.loads(sent)
