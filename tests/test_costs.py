from __future__ import annotations

import numpy as np
import pytest

from envs.costs import (
    ALL_COSTS,
    CONTEXT,
    PAIRS,
    PASSES,
    READ,
    SECONDS,
    WRITTEN,
    Dollars,
    Flops,
    LlmTokens,
    MemoryTraffic,
    ModelProfile,
    Price,
    Seconds,
    pass_entry,
)

SLM = ModelProfile("small", 800, 200, bytes_per_parameter=2, kv_bytes_per_token=10, attention_width=5)
LLM = ModelProfile("large", 8_000, 2_000, bytes_per_parameter=2, kv_bytes_per_token=100, attention_width=50)
POOL = [SLM, LLM]

# passes, read, context, pairs, written, seconds
PROMPT_PASS = [[1, 5, 0, 15, 0, 0.25], [0, 0, 0, 0, 0, 0.0]]
SLM_STEP = [[1, 1, 5, 6, 1, 0.125], [0, 0, 0, 0, 0, 0.0]]
CATCH_UP_STEP = [[1, 1, 7, 8, 0, 0.125], [1, 7, 0, 28, 1, 0.5]]  # the LLM reads 7 tokens it has missed
EPISODE = [[6, 10, 35, 55, 3, 0.75], [2, 9, 7, 45, 2, 1.25]]


def test_an_entry_says_what_a_pass_did():
    entry = pass_entry(np.array([3, 1]), np.array([4, 0]), seconds=0.5)
    assert entry[:, [PASSES, READ, CONTEXT, PAIRS, WRITTEN, SECONDS]].tolist() == [
        [1, 3, 4, 18, 0, 0.25],  # queries that see 5, 6 and 7 tokens
        [1, 1, 0, 1, 0, 0.25],
    ]


@pytest.mark.parametrize(
    ("cost", "prompt_pass", "slm_step", "catch_up_step", "episode"),
    [
        # weights: 2,000 bytes for the SLM, 20,000 for the LLM; keys and values: 10 or 100 bytes a token
        (MemoryTraffic(), 2_050, 2_060, 2_080 + 20_700, 12_450 + 41_600),
        # 1,600 or 16,000 for each token read, 400 or 4,000 a pass, 20 or 200 a pair
        (Flops(), 8_700, 2_120, 2_160 + 121_600, 19_500 + 161_000),
        (LlmTokens(), 0, 0, 1, 2),
        (Seconds(), 0.25, 0.125, 0.625, 2.0),
        (Dollars(read=[1, 10], written=[2, 30]), 5e-6, 3e-6, 101e-6, 166e-6),
        # a millionth and a hundred-thousandth of a billion parameters
        (Dollars(), 5e-12, 2e-12, 81e-12, 123e-12),
    ],
    ids=["bytes", "flops", "llm_tokens", "seconds", "dollars", "dollars_by_size"],
)
def test_costs_equal_hand_counts(cost, prompt_pass, slm_step, catch_up_step, episode):
    ledger = np.array([PROMPT_PASS, SLM_STEP, CATCH_UP_STEP, EPISODE])
    expected = [prompt_pass, slm_step, catch_up_step, episode]
    np.testing.assert_allclose(cost.of(ledger, POOL), expected, rtol=1e-12)
    np.testing.assert_allclose(cost.of(ledger[3], POOL), episode, rtol=1e-12)


@pytest.mark.parametrize(
    ("cost", "expected"),
    [
        (MemoryTraffic(), 20_100),
        (Flops(), 20_200),
        (LlmTokens(), 1),
        (Seconds(), 1),
        (Dollars([1, 10], [2, 30]), 40e-6),
    ],
)
def test_the_cost_of_one_llm_token_equals_hand_counts(cost, expected):
    assert cost.per_llm_token(POOL) == pytest.approx(expected, rel=1e-12)


def test_every_model_beside_the_slm_writes_llm_tokens():
    middle = ModelProfile("middle", 2_000, 500, 2, 30, 15)
    ledger = np.zeros((3, 6))
    ledger[:, WRITTEN] = [4, 2, 1]
    assert LlmTokens().of(ledger, [SLM, middle, LLM]) == 2 * 0.25 + 1


def test_a_price_gives_every_cost_at_once():
    priced = Price(POOL).of(np.array([[PROMPT_PASS, SLM_STEP], [CATCH_UP_STEP, EPISODE]]))
    assert list(priced) == ["bytes", "flops", "llm_tokens", "seconds", "dollars"] == [cost.name for cost in ALL_COSTS]
    np.testing.assert_allclose(priced["bytes"], [[2_050, 2_060], [22_780, 54_050]])
    np.testing.assert_allclose(priced["flops"], [[8_700, 2_120], [123_760, 180_500]])
    np.testing.assert_allclose(priced["llm_tokens"], [[0, 0], [1, 2]])
    np.testing.assert_allclose(priced["seconds"], [[0.25, 0.125], [0.625, 2.0]])
    np.testing.assert_allclose(priced["dollars"], [[5e-12, 2e-12], [81e-12, 123e-12]])


def test_only_measured_seconds_are_not_reproducible():
    assert [cost.name for cost in ALL_COSTS if not cost.reproducible] == ["seconds"]


@pytest.mark.parametrize(
    ("cost", "named"),
    [
        (Dollars(read=[1]), r"cost dollars: read must hold one price >= 0 for each of small, large; it is \[1\]"),
        (Dollars(written=[1, 2, 3]), r"cost dollars: written must hold one price .* it is \[1, 2, 3\]"),
        (Dollars(read=[1, -2]), r"cost dollars: read must .* it is \[1, -2\]"),
        (Dollars(read=[]), r"cost dollars: read must .* it is \[\]"),
    ],
)
def test_prices_that_do_not_fit_the_pool_are_refused(cost, named):
    with pytest.raises(ValueError, match=named):
        cost.rates(POOL)


def test_two_costs_of_one_name_are_refused():
    with pytest.raises(ValueError, match="cost models share a name: bytes, dollars, dollars"):
        Price(POOL, [MemoryTraffic(), Dollars(), Dollars([1, 1], [2, 2])])


def test_with_three_models_an_llm_token_weighs_as_its_model_does():
    middle = ModelProfile("middle", 2_000, 500, bytes_per_parameter=2, kv_bytes_per_token=10, attention_width=5)
    rates = LlmTokens().rates([SLM, middle, LLM])
    assert rates[:, WRITTEN].tolist() == [0, 0.25, 1]
    assert LlmTokens().per_llm_token([SLM, middle, LLM]) == 1
    assert LlmTokens().rates([LLM, SLM])[:, WRITTEN].tolist() == [0, 1], "one LLM: its token is the unit"
