"""Decisions of one pair, written again by another: token by token, writer by writer, in the same passes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from agents.common.policy import Policy
from agents.common.rollout import TakenBack
from agents.heuristics import Uncertainty
from agents.router.network import RouterNetwork
from agents.router.policy import RouterPolicy
from envs.costs import PASSES, SECONDS
from envs.models.pool import models_manifest
from envs.tasks.arithmetic import ArithmeticTask
from experiments.speed_suites.forced import ForcedPolicy, Script
from experiments.speed_suites.latency import (
    LLM,
    ROUTED,
    SPECULATIVE,
    as_large,
    check_same,
    chosen_threshold,
    forced_pool,
    measure,
    over,
    ways,
)

TINY = {"hidden_size": 32, "layers": 1, "heads": 2, "kv_heads": 2, "mlp_size": 32}
CONFIG = OmegaConf.create({"seed": 0, "slm": TINY, "llm": TINY | {"layers": 2}})
NEW, DRAFT = 60, 5


@pytest.fixture(scope="module")
def large(pool):
    return forced_pool(CONFIG, pool, capacity=300)


@pytest.fixture(scope="module")
def router(pool):
    network = RouterNetwork(pool.slm.width, units=[20, 10]).eval()
    return RouterPolicy(network, models_manifest(pool))


@pytest.fixture(scope="module")
def found(pool, large):
    task = ArithmeticTask()
    examples = task.examples("validation", 3)
    return ways(pool, task, examples, Uncertainty(), large, 0.95, DRAFT, NEW)


def test_every_way_is_written_again_to_the_token_in_the_same_passes(found, large):
    assert sum(len(episode.taken_back) for episode in found[SPECULATIVE].episodes) > 1
    assert {0, 1} == {writer for episode in found[ROUTED].episodes for writer in episode.writers.tolist()}
    for name, way in found.items():
        for number, decided in enumerate(way.episodes):
            again = way.answer(number)
            check_same(name, again, decided)
            back, before = (
                [(one.position, one.tokens.tolist()) for one in some.taken_back] for some in (again, decided)
            )
            assert back == before
            assert again.ledger[:, SECONDS].sum() > 0
            assert again.decisions[PASSES] == (len(decided.tokens) if name == ROUTED else 0)
    # the large pair itself would write something else
    assert large.models[1].fingerprint != large.models[0].fingerprint


def test_other_tokens_writers_or_passes_are_an_error(found):
    one = found[ROUTED].episodes[0]
    other = np.roll(one.tokens, 1)
    for changed, what in (
        (replace(one, tokens=other), "tokens"),
        (replace(one, writers=1 - one.writers), "writers"),
        (replace(one, ledger=one.ledger + np.eye(6)[PASSES]), "passes"),
    ):
        with pytest.raises(RuntimeError, match=rf"routed: .* has other {what}"):
            check_same(ROUTED, changed, one)
    check_same(ROUTED, replace(one, ledger=one.ledger + np.eye(6)[SECONDS]), one)


def test_measuring_counts_what_was_written_and_takes_turns(found, large):
    measured = measure(found, large, repeats=2)
    for name, one in measured.items():
        assert one.seconds.shape == (3, 2)
        assert (one.seconds > 0).all()
        assert (one.passes.sum(1) < one.seconds.max(1)).all()
        assert ((one.passes > 0) == [name != LLM, True, name == ROUTED]).all()
        assert one.answers.tokens.tolist() == [len(episode.tokens) for episode in found[name].episodes]
    assert measured[LLM].answers.costs["bytes"].sum() > 0
    assert measured[ROUTED].answers.llm_tokens.sum() < measured[LLM].answers.llm_tokens.sum()


def test_a_ratio_has_an_interval_around_it():
    theirs = np.full((8, 3), 2.0)
    ours = theirs * np.linspace(0.4, 0.6, 8)[:, None] + np.array([0.0, 9.0, 0.0])  # one turn was disturbed
    found = over(ours, theirs)
    assert found[""] == pytest.approx(0.5)
    assert found["_low"] < 0.5 < found["_high"]
    assert over(theirs, theirs) == pytest.approx({"": 1.0, "_low": 1.0, "_high": 1.0})


def test_a_script_says_what_was_drafted_in_vain_until_it_is_refused():
    script = Script(10, np.array([5, 6, 7, 8]), [TakenBack(1, 0, np.array([9, 9]))])
    assert script.next_tokens(np.array([0]), slm=True).tolist() == [5]
    assert script.next_tokens(np.array([1]), slm=True).tolist() == [9]
    assert script.next_tokens(np.array([-1, 0, 1, 2]), slm=False).tolist()[1:3] == [5, 6]
    assert script.next_tokens(np.array([2]), slm=True).tolist() == [7]
    assert script.next_tokens(np.array([7]), slm=True).tolist() == [8]


def test_a_forced_model_wants_a_script_and_one_row(large, pool):
    model = large.models[0]
    cache = model.new_cache(2, 10)
    with pytest.raises(ValueError, match="one row at a time"):
        model.feed(cache, np.arange(2), [np.array([1]), np.array([2])])


def test_a_policy_computes_as_much_as_its_network_would_for_the_large_pair(router, large, pool):
    scaled = as_large(router, large)
    assert scaled.network.width == large.slm.width
    assert scaled.network.units == [round(count * large.slm.width / pool.slm.width) for count in (20, 10)]
    forced = ForcedPolicy(scaled)
    assert forced.parameters == scaled.parameters > 0
    assert as_large(Uncertainty(), large) == Uncertainty()

    class Once(Policy):
        per_response = True

        def score(self, observation):
            return torch.ones(len(observation))

    with pytest.raises(ValueError, match="Once cannot be timed on another pair"):
        as_large(Once(), large)


@pytest.mark.slow
def test_the_threshold_is_chosen_on_validation_problems(pool, task):
    threshold = chosen_threshold(Uncertainty(), pool, task, 40, NEW)
    assert 0.9 < threshold < 1
