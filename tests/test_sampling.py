"""Which tokens may be drawn, with what probability, and each model by its own settings."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from envs.decoding.checked_session import CheckedSession
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_k": 1000},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 8, "top_p": 0.7},
        {"top_p": 0.9, "min_p": 0.05},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},
    ],
    ids=str,
)
def test_probabilities_are_those_of_generate(settings):
    logits = 3 * torch.randn(6, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sampling = Sampling(**{"temperature": 1.0} | settings)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k is not None:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = warpers(None, logits).softmax(-1)
    torch.testing.assert_close(sampling.probabilities(logits), expected, rtol=1e-9, atol=1e-12)
    drawn = sampling.draw(logits, np.array([0.0, 0.2, 0.4, 0.6, 0.8, 0.999]))
    assert (expected[torch.arange(6), torch.from_numpy(drawn)] > 0).all()


def test_each_model_is_sampled_by_its_own_settings(tiny_pool):
    warm = Sampling(temperature=5.0)
    sampling = Sampling(models=[Sampling(), warm])
    assert (sampling.greedy, sampling.of(0).greedy, sampling.of(1), sampling.warmest) == (False, True, warm, 5.0)
    assert Sampling(models=[Sampling(), Sampling()]).greedy
    rows, prompt = 40, np.array([5, 6, 7])
    for observed in (True, False):
        for action, drawn in ((0, 1), (1, 10)):
            session = Session(tiny_pool, rows, 8, capacity=20, sampling=sampling)
            generators = [np.random.default_rng(row) for row in range(rows)]
            session.start(np.arange(rows), [prompt] * rows, generators=generators, observed=observed)
            tokens = session.step(np.arange(rows), np.full(rows, action)).tokens
            assert (len(np.unique(tokens)) >= drawn) if drawn > 1 else (tokens == tokens[0]).all()


def test_drafts_of_a_greedy_model_are_checked_by_a_sampled_one(tiny_pool):
    """The token in place of a draft is distributed as the model that checks would have it."""
    rows, prompt = 600, np.array([5, 6, 7])
    sampling = Sampling(models=[Sampling(), Sampling(temperature=3.0)])
    session = CheckedSession(tiny_pool, rows, 8, capacity=20, sampling=sampling)
    session.start(np.arange(rows), [prompt] * rows, generators=[np.random.default_rng(row) for row in range(rows)])
    session.step(np.arange(rows), np.zeros(rows, dtype=int))
    session.step(np.arange(rows), np.ones(rows, dtype=int))
    first = np.array([session.response(row)[0] for row in range(rows)])
    with torch.inference_mode():
        logits = tiny_pool.models[1].network(torch.from_numpy(prompt)[None]).logits[0, -1, : tiny_pool.vocab_size]
    expected = (logits.double() / 3).softmax(-1).numpy()
    found = np.bincount(first, minlength=len(expected)) / rows
    assert (np.abs(found - expected) <= 4 * np.sqrt(expected * (1 - expected) / rows) + 2 / rows).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_k": 0}, "top_k must be at least 1, is 0"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], is -0.1"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\], is 1.1"),
        ({"temperature": 1.0, "models": [Sampling()]}, "models says how each model is sampled, once"),
        ({"models": [Sampling(models=[Sampling()])]}, "models says how each model is sampled, once"),
    ],
)
def test_settings_out_of_range_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**settings)


def test_sampling_is_of_as_many_models_as_the_pool_has(tiny_pool):
    with pytest.raises(ValueError, match="sampling says how 1 models are sampled, the pool has 2"):
        Session(tiny_pool, 1, 8, sampling=Sampling(models=[Sampling(temperature=1.0)]))
