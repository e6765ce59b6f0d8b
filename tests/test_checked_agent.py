"""The agent that learns when drafts must be checked: its states, its score, its training, its files."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from agents.checking.checked import Checked, CheckedPolicy
from agents.checking.judged_states import judged_states, until_refused
from agents.checking.speculative import RelaxedAcceptance, Speculative
from agents.common.policy import Policy
from agents.common.rollout import Scheduling, decode, look
from agents.common.saving import load_policy
from agents.router.network import RouterNetwork
from agents.router.training import RouterTraining
from envs.arrays import UNKNOWN
from envs.costs import PASSES
from envs.decoding.checked_session import CheckedSession
from envs.decoding.decoder import since_at_each
from envs.decoding.judges import FirstDisagreement, Gap, TopK
from envs.decoding.observation import feature_width
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.checked_tree_session import CheckedTreeSession
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Example
from tests.drafting import MAX_NEW, Letters, Plain, array, kin_of, successors

FEATURES = "hidden_logits_history"
END = 26
QUICK = {
    "examples": 16,
    "rounds": 2,
    "max_new_tokens": 44,
    "training": RouterTraining(epochs=2, units=[8]),
    "scheduling": Scheduling(rows=16),
}


@pytest.fixture(scope="module")
def kin(pools):
    return kin_of(pools["llama"])


@pytest.fixture(scope="module")
def easy():
    return ArithmeticTask("easy")


@pytest.fixture(scope="module")
def trained(pool, easy, tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("checked"), []
    return Checked(**QUICK).fit(pool, easy, track=rows.append, folder=folder), folder, rows


def untrained(pool, judge=None, end_weight=1.0, seed=0, looks_ahead=True):
    torch.manual_seed(seed)
    network = RouterNetwork(feature_width(FEATURES, pool.slm.width), units=[8]).eval().requires_grad_(False)
    settings = {"judge": judge or Gap(), "end_weight": end_weight, "looks_ahead": looks_ahead}
    return CheckedPolicy(network, models_manifest(pool), **settings)


class Coin(Policy):
    """Calls at random, the same for the same decision."""

    def __init__(self, judge):
        self.judge = judge

    def score(self, observation):
        decisions = zip(observation.host_episodes.tolist(), observation.host_positions.tolist(), strict=True)
        return np.array([np.random.default_rng(decision).random() for decision in decisions])


# -- the states -------------------------------------------------------------------------------------------------------


def test_of_a_draft_the_states_count_up_to_the_first_refused_token():
    stands = np.array([1, 0, 1, 1, 0, 0, 1, 1, 1], dtype=bool)
    writers = np.array([0, 0, 0, 1, 0, 1, 1, 0, 0])
    since = since_at_each(writers)
    assert since.tolist() == [0, 1, 2, 3, 0, 1, 0, 0, 1]
    assert until_refused(stands, since).tolist() == [True, True, False, False, True, False, True, True, True]


@pytest.mark.parametrize("judge", [FirstDisagreement(), Gap(0.5), TopK(3)])
def test_states_and_verdicts_are_those_of_reading_each_prefix_by_itself(kin, judge):
    plain, task = Plain(kin), Letters()
    episodes = decode(kin, task, task.examples("test", 7), Coin(judge), 0.4, MAX_NEW)
    found = judged_states(kin, episodes, judge, FEATURES, rows=3)
    at = 0
    for number, episode in enumerate(episodes):
        ids, since, refused = kin.encode(episode.example.prompt).tolist(), since_at_each(episode.writers), False
        for place, token in enumerate(episode.tokens.tolist()):
            refused = refused and since[place] > 0
            if not refused:
                of_slm, of_llm = plain.logits(0, ids), plain.logits(1, ids)
                drafted = int(of_slm.argmax())
                logp = of_llm.log_softmax(-1)
                gap, rank = float(logp.max() - logp[drafted]), int((logp > logp[drafted]).sum())
                assert bool(judge.stands(np.array([[gap, rank]], dtype=np.float32))[0]) == found.stands[at]
                assert found.examples[at] == number
                history = torch.tensor([place, since[place]]).float().log1p().half()
                assert torch.equal(found.seen[at, -2:], history)
                entropy = -(of_slm.softmax(-1) * of_slm.log_softmax(-1)).sum()
                assert abs(float(found.seen[at, kin.slm.width]) - float(entropy)) < 1e-2
                refused, at = not found.stands[at], at + 1
            ids.append(token)
    assert at == len(found.stands) == len(found.seen)
    assert 0 < found.stands.mean() < 1


# -- the score --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end_weight", [0.0, 1.0, 3.0])
def test_looking_ahead_the_score_is_the_probability_that_the_draft_and_the_next_token_stand(kin, end_weight):
    policy = untrained(kin, Gap(0.5), end_weight)
    session = CheckedSession(kin, 3, MAX_NEW, judge=policy.judge)
    rows = np.arange(3)
    session.start(rows, [kin.encode(one.prompt) for one in Letters().examples("test", 3)])
    sums, ends, calls = np.zeros(3), 0, 0
    while len(rows):
        seen = session.observe(rows)
        own = torch.nn.functional.logsigmoid(policy.network(seen.vector(FEATURES))).numpy()
        ended = seen.drafts.ended
        sums[rows] += np.where(ended, 0.0, own)
        expected = np.exp(np.where(ended, end_weight, 1.0) * sums[rows])
        score = policy.score(seen).numpy()
        np.testing.assert_allclose(score, expected, rtol=1e-5)
        np.testing.assert_array_equal(policy.score(seen).numpy(), score)  # to be asked again changes nothing
        called = (seen.drafts.counts >= 4) | ended
        step = session.step(rows, called.astype(np.int64))
        sums[rows[called]] = 0
        ends, calls = ends + ended.sum(), calls + called.sum()
        gone = step.terminated | step.truncated
        policy.forget(seen.host_episodes[gone])
        rows = rows[~gone]
    assert ends
    assert calls > ends
    assert not policy._standing


@pytest.mark.parametrize("kind", ["live", "tree"])
def test_the_score_is_the_probability_that_the_draft_stands_by_the_states_it_was_written_by(kin, kind):
    policy, end_weight = untrained(kin, Gap(0.5), 3.0, looks_ahead=False), 3.0
    assert not policy.observes
    examples, rows = Letters().examples("test", 3), np.arange(3)
    ahead = CheckedSession(kin, 3, MAX_NEW, judge=policy.judge)
    late = CheckedSession(kin, 3, MAX_NEW, judge=policy.judge)
    if kind == "tree":
        late = CheckedTreeSession(PrefixTree(kin, Letters(), MAX_NEW, memory=2**24), 3, judge=policy.judge)
    for session, observed in ((ahead, True), (late, False)):
        session.start(rows, [kin.encode(one.prompt) for one in examples], observed=observed)
    sums, next_one, ends = np.zeros(3), np.zeros(3), 0
    saved = len(rows)  # the prompts are read with the first draft
    while len(rows):
        seen, drafts = ahead.observe(rows), late.drafts(rows)
        sums[rows] = np.where(drafts.counts > 0, sums[rows] + next_one[rows], 0.0)
        next_one[rows] = torch.nn.functional.logsigmoid(policy.network(seen.vector(FEATURES))).numpy()
        expected = np.exp(np.where(drafts.ended, end_weight, 1.0) * sums[rows])
        shown = look(late, rows, policy.sees)
        np.testing.assert_allclose(policy.score(shown).numpy(), expected, rtol=1e-4)
        called = (drafts.counts >= 4) | drafts.ended
        step, same = (session.step(rows, called.astype(np.int64)) for session in (late, ahead))
        assert step.tokens.tolist() == same.tokens.tolist()
        gone = step.terminated | step.truncated
        ends += drafts.ended.sum()
        # what the LLM wrote the SLM reads in the pass that drafts the next token; an end it does not read either way
        going_on = ~np.isin(step.tokens, kin.end_tokens)
        saved += (called & (step.tokens != UNKNOWN) & going_on).sum() - (~called & ~going_on).sum()
        policy.forget(shown.host_episodes[gone])
        rows = rows[~gone]
    assert ends
    assert saved > 0
    assert ahead.ledger[:, 0, PASSES].sum() - late.ledger[:, 0, PASSES].sum() == saved
    assert not policy._standing


def test_a_policy_that_comes_late_says_so(kin):
    session = CheckedSession(kin, 1, MAX_NEW)
    session.start(array(0), [kin.encode("abc?")])
    session.step(array(0), array(0))
    with pytest.raises(ValueError, match=r"episode 0: 1 tokens are drafted, and the policy was asked at 0 of them"):
        untrained(kin).score(session.observe(array(0)))


@pytest.mark.parametrize("looks_ahead", [True, False])
def test_rows_and_the_tree_change_nothing_about_the_answers(kin, looks_ahead):
    policy, task = untrained(kin, Gap(0.5), looks_ahead=looks_ahead), Letters()
    examples = task.examples("test", 12)
    threshold = 0.2
    answers = [
        decode(kin, task, examples, policy, threshold, MAX_NEW, Scheduling(rows=5)),
        decode(kin, task, examples, policy, threshold, MAX_NEW, Scheduling(rows=12, gather=0.0)),
        decode(kin, task, examples, policy, threshold, MAX_NEW, tree=PrefixTree(kin, task, MAX_NEW, memory=2**24)),
    ]
    for others in answers[1:]:
        for one, other in zip(answers[0], others, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.writers.tolist() == other.writers.tolist()
            np.testing.assert_allclose(one.scores, other.scores, rtol=1e-4)
    assert sum(len(one.taken_back) for one in answers[0]) > 0
    assert not policy._standing


# -- training ---------------------------------------------------------------------------------------------------------


class Digits(Letters):
    """Prompts of digits, behind which a script goes on from the last one."""

    def example(self, split, index):
        return Example(
            f"digits/{split}/{index}", "".join(np.random.default_rng(index).choice(list("012345"), 3)), "x", "x"
        )


@pytest.mark.parametrize("ahead", [True, False])
def test_it_learns_to_call_where_the_llm_takes_back_and_nowhere_else(make_tokenizer, ahead):
    tokenizer, task = make_tokenizer(), Digits()
    pool = ModelPool([successors("slm", tokenizer, END), successors("llm", tokenizer, END, t12=20)])
    training = RouterTraining(epochs=30, units=[16], batch_size=64, lr=1e-2)
    # of a script the logits say nothing: each token is as sure as any
    settings = {"end_weight": 1.0, "features": "hidden", "max_new_tokens": MAX_NEW, "training": training}
    learner = Checked(30, 1, looks_ahead=ahead, **settings)
    policy = learner.fit(pool, task)
    for episode in decode(pool, task, task.examples("test", 10), policy, 0.5, MAX_NEW):
        # behind token 12 the LLM goes on with 20, and the SLM would with 13
        assert 13 not in episode.tokens
        assert [token for token, writer in zip(episode.tokens, episode.writers, strict=True) if writer] == [20]
        assert episode.tokens[-1] == END
        assert episode.ledger[1, PASSES] == 1
        # looking ahead the LLM is called before it, else behind it
        assert [back.tokens.tolist() for back in episode.taken_back] == ([] if ahead else [[13]])


def test_training_repeats_reports_and_goes_on(pool, easy, trained, tmp_path, monkeypatch):
    policy, folder, rows = trained
    assert all(json.dumps(row) for row in rows)
    about = [row for row in rows if "states" in row]
    assert [row["run"] for row in about] == ["round 1", "round 2"]
    assert all(0 < row["risk"] < 1 and row["calls"] > 0 for row in about)
    again: list = []
    for kept in folder.glob("*.safetensors"):
        (tmp_path / kept.name).write_bytes(kept.read_bytes())
    (tmp_path / "round-2.safetensors").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("envs.models.language_model.LanguageModel.feed", None)  # all answers are there: no model runs
        resumed = Checked(**QUICK).fit(pool, easy, track=again.append, folder=tmp_path)
    assert resumed.fingerprint == policy.fingerprint
    assert again == rows
    (tmp_path / "states-2.safetensors").write_bytes(b"no tensors")
    with pytest.raises(ValueError, match=r"states-2.safetensors cannot be read .* delete it"):
        Checked(**QUICK).fit(pool, easy, folder=tmp_path)


def test_a_saved_policy_decides_as_before(pool, easy, trained, tmp_path):
    policy = replace(trained[0], end_weight=2.5, judge=Gap(1.5))
    policy.save(tmp_path)
    found = load_policy(tmp_path, pool)
    assert isinstance(found, CheckedPolicy)
    assert (found.judge, found.end_weight, found.fingerprint) == (Gap(1.5), 2.5, policy.fingerprint)
    assert replace(policy, end_weight=2.0).fingerprint != policy.fingerprint
    assert replace(policy, judge=Gap(2.0)).fingerprint != policy.fingerprint
    assert replace(policy, looks_ahead=True).fingerprint != policy.fingerprint
    examples = easy.examples("validation", 6)
    first, second = (decode(pool, easy, examples, one, 0.6, 44) for one in (policy, found))
    assert [one.tokens.tolist() for one in first] == [one.tokens.tolist() for one in second]
    assert [one.scores.tolist() for one in first] == [one.scores.tolist() for one in second]


def test_what_was_saved_before_there_was_a_choice_looks_ahead(pool, trained, tmp_path):
    policy = replace(trained[0], looks_ahead=True)
    policy.save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    del settings["looks_ahead"]
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    found = load_policy(tmp_path, pool)
    assert found.looks_ahead
    assert found.observes
    assert found.fingerprint == policy.fingerprint


def test_relaxed_acceptance_is_speculative_decoding_but_for_its_judge(kin):
    task, scheduling = Letters(), Scheduling(rows=10)
    examples = task.examples("test", 10)

    def answers(policy):
        return [one.tokens.tolist() for one in decode(kin, task, examples, policy, 0.5, MAX_NEW, scheduling)]

    lossless = answers(Speculative(4))
    assert answers(RelaxedAcceptance(4, judge=FirstDisagreement())) == lossless
    assert answers(RelaxedAcceptance(4, judge=Gap(1.0))) != lossless


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"examples": 1}, "examples .1. must be at least 2"),
        ({"rounds": 0}, "rounds .0. at least 1"),
        ({"threshold": 1.0}, r"threshold must be in \(0, 1\), is 1.0"),
        ({"end_weight": -1.0}, "end_weight must be at least 0, is -1.0"),
        ({"features": "all"}, "unknown features 'all'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Checked(**settings)
