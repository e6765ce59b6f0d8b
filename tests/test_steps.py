"""Policies whose calls last for tokens or steps: by hand, and the laws that tie them to other policies."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from agents.checking.checked import Checked
from agents.checking.span import ToEndOfStep, Tokens
from agents.checking.steps import Glimp, Relay, StepJudge
from agents.common.rollout import Scheduling, decode, decode_alone
from agents.heuristics import MOST_NATS, Uncertainty
from envs.decoding.checked_session import CheckedSession
from envs.decoding.checking import standing
from envs.decoding.judges import FirstDisagreement, Gap, StepLikelihood, described, judge_of
from envs.decoding.sampling import Sampling
from envs.prefix_tree.tree import PrefixTree
from experiments.traces.recorder import Recorder
from experiments.traces.trace import SUFFIX, read_trace
from experiments.verification.checking import wrong_verdicts
from experiments.verification.forcing import forced
from tests.drafting import Letters, Plain, array, kin_of

MAX_NEW, TASK = 18, Letters()
MARKS = tuple("aeiou159")
STEP = ToEndOfStep(MARKS)


@pytest.fixture(scope="module")
def kin(pools):
    return kin_of(pools["llama"])


def step_judge(threshold):
    return StepJudge(StepLikelihood(threshold), ToEndOfStep(MARKS, corrections=True))


def answers(pool, policy, threshold=0.5, rows=6, tree=None):
    examples = TASK.examples("test", 6)
    return decode(pool, TASK, examples, policy, threshold, MAX_NEW, Scheduling(rows=rows), tree=tree)


def ends_step(pool, token):
    return pool.decode(array(token)).rstrip(" ").endswith(MARKS)


# -- step_judge -------------------------------------------------------------------------------------------------------


def steps_by_hand(pool, prompt, threshold):
    """The method as its class says it, by models without a cache; tokens, writers, and what was taken back."""
    plain, response, writers, gone = Plain(pool), [], [], []

    def write(model):
        response.append(plain.token(model, [*prompt, *response]))
        writers.append(model)
        return response[-1] in pool.end_tokens or len(response) == MAX_NEW

    while True:
        begun, ended = len(response), False
        while MAX_NEW - len(response) > 1 and not (len(response) > begun and ends_step(pool, response[-1])):
            if write(0):
                ended = True
                break
        gaps = [0.0] * (len(response) == begun)
        for place in range(begun, len(response)):
            logp = plain.logits(1, [*prompt, *response[:place]]).double().log_softmax(-1)
            gaps.append(float(logp.max() - logp[response[place]]))
        if -np.mean(gaps) >= threshold:
            if ended or write(1):
                return response, writers, gone
            continue
        gone.append((begun, response[begun:]))
        del response[begun:], writers[begun:]
        if write(1):
            return response, writers, gone
        while not ends_step(pool, response[-1]):
            if write(1):
                return response, writers, gone


@pytest.mark.parametrize("threshold", [-0.1, -0.5])
def test_each_step_stands_or_is_rewritten_as_by_hand(kin, threshold):
    backs = kept = 0
    for one in answers(kin, step_judge(threshold)):
        tokens, writers, gone = steps_by_hand(kin, kin.encode(one.example.prompt).tolist(), threshold)
        assert one.tokens.tolist() == tokens
        assert one.writers.tolist() == writers
        assert [(back.position, back.tokens.tolist()) for back in one.taken_back] == gone
        backs, kept = backs + len(gone), kept + writers.count(0)
    assert backs
    assert kept


def test_at_minus_infinity_nothing_is_taken_back_and_at_zero_the_llm_writes_all(kin):
    alone = decode_alone(kin.models[-1], TASK, TASK.examples("test", 6), MAX_NEW, pool=kin)
    for one in answers(kin, step_judge(-math.inf)):
        assert not one.taken_back
        assert (one.writers == 0).any()
    strict = answers(kin, step_judge(0.0))
    assert [one.tokens.tolist() for one in strict] == [one.tokens.tolist() for one in alone]
    assert any(one.taken_back for one in strict)


def test_a_trace_is_judged_again_step_for_step(kin, tmp_path):
    policy = step_judge(-0.3)
    Recorder(kin, TASK, "test", max_new_tokens=MAX_NEW).routed(
        tmp_path / "one", answers(kin, policy), "step_judge", policy, 0.5
    )
    trace = read_trace(tmp_path / f"one{SUFFIX}")
    told = {"same": [], "stricter": []}
    for one in trace.episodes:
        ((_, made),) = next(forced(kin, 1, [one.prompt], [one.response]))
        for name, threshold in (("same", -0.3), ("stricter", -0.01)):
            told[name] += wrong_verdicts(StepLikelihood(threshold), trace.head, one, made.logits)
    assert told["same"] == []
    places = [place for place, _, _ in told["stricter"]]
    assert len(places) > 5
    assert all(0 < margin < 0.29 for _, _, margin in told["stricter"])


# -- relay and glimp --------------------------------------------------------------------------------------------------


def test_a_relay_of_one_token_is_token_routing_by_entropy(kin):
    for threshold in (0.02, 0.04, 0.08):
        relayed = answers(kin, Relay(span=Tokens(1)), threshold)
        routed = answers(kin, Uncertainty("entropy"), 1 + math.log(threshold) / MOST_NATS)
        assert [one.writers.tolist() for one in relayed] == [one.writers.tolist() for one in routed]
        assert [one.tokens.tolist() for one in relayed] == [one.tokens.tolist() for one in routed]
    assert Relay().judge == Glimp().judge == Gap(math.inf)


def sureness(pool, prompt, response):
    logp = Plain(pool).logits(0, [*prompt, *response]).double().log_softmax(-1)
    return float((logp.exp() * logp).sum().exp())


def middle(pool):
    """A threshold that half of the first tokens are above."""
    prompts = [pool.encode(one.prompt).tolist() for one in TASK.examples("test", 6)]
    low, high = sorted(sureness(pool, prompt, []) for prompt in prompts)[2:4]
    return (low + high) / 2


def test_a_relay_hands_over_where_the_slm_is_unsure_and_for_so_many_tokens(kin):
    threshold, calls = middle(kin), 0
    for one in answers(kin, Relay(span=Tokens(4)), threshold):
        prompt, left = kin.encode(one.example.prompt).tolist(), 0
        for place, writer in enumerate(one.writers.tolist()):
            if not left and sureness(kin, prompt, one.tokens[:place].tolist()) < threshold:
                left, calls = 4, calls + 1
            assert writer == (left > 0)
            left -= left > 0
    assert calls > 3


def test_a_step_has_one_writer_chosen_by_its_first_token(kin):
    threshold, chosen = middle(kin), []
    for one in answers(kin, Glimp(span=STEP), threshold):
        prompt, border = kin.encode(one.example.prompt).tolist(), True
        for place, (token, writer) in enumerate(zip(one.tokens.tolist(), one.writers.tolist(), strict=True)):
            if border:
                chosen.append(int(sureness(kin, prompt, one.tokens[:place].tolist()) < threshold))
            assert writer == chosen[-1]
            border = ends_step(kin, token)
    assert set(chosen) == {0, 1}
    assert len(chosen) > 8


@pytest.mark.parametrize("policy", [Relay(), Glimp(span=STEP), step_judge(-0.3)], ids=lambda one: type(one).__name__)
def test_rows_and_the_tree_change_nothing(kin, policy):
    threshold, tree = middle(kin), PrefixTree(kin, TASK, MAX_NEW, memory=2**24)
    first = answers(kin, policy, threshold)
    for others in (answers(kin, policy, threshold, rows=2), answers(kin, policy, threshold, tree=tree)):
        for one, other in zip(first, others, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.writers.tolist() == other.writers.tolist()
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
            assert len(one.taken_back) == len(other.taken_back)


def test_settings_tell_policies_apart():
    made = [Relay(), Relay(span=Tokens(2)), Relay(Gap(1.0)), Glimp(), Glimp(span=STEP), StepJudge(), step_judge(-0.3)]
    assert len({one.fingerprint for one in made}) == len(made)


# -- the judge --------------------------------------------------------------------------------------------------------


def thought(*gaps):
    return np.array([[gap, gap > 0] for gap in gaps], dtype=np.float32).reshape(-1, 2)


def test_a_draft_stands_or_falls_as_a_whole():
    judge, gaps = StepLikelihood(-0.5), thought(0.0, 1.0, 4.0, 0.0, 0.0, 0.0, 0.25)
    assert standing(judge, gaps, array(2, 3, 0, 2)).tolist() == [2, 0, 0, 2]
    assert standing(Gap(0.5), gaps, array(2, 3, 0, 2)).tolist() == [1, 0, 0, 2]
    assert judge.stands(thought(0.0, 1.0)).tolist() == [True, True]  # the mean is the threshold
    assert judge.margin(thought(0.0, 4.0)).tolist() == [1.5, 1.5]
    assert judge.stands(thought()).shape == (0,)
    assert standing(StepLikelihood(-math.inf), thought(50.0), array(1)).tolist() == [1]
    assert standing(StepLikelihood(0.0), thought(0.0, 1e-6), array(1, 1)).tolist() == [1, 0]
    assert not FirstDisagreement().whole
    assert judge_of(json.loads(json.dumps(described(judge)))) == judge


def test_wrong_settings_are_named():
    for threshold in (0.1, math.nan):
        with pytest.raises(ValueError, match="threshold must be at most 0, is"):
            StepLikelihood(threshold)
    with pytest.raises(ValueError, match="is of whole drafts, and a risk is of a token; choose another judge"):
        Checked(judge=StepLikelihood())


def test_whole_drafts_are_not_judged_where_tokens_are_sampled(kin):
    with pytest.raises(ValueError, match="is of whole drafts, and sampled tokens stand one by one"):
        CheckedSession(kin, 1, MAX_NEW, sampling=Sampling(temperature=1.0), judge=StepLikelihood())
