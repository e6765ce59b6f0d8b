"""How long the LLM writes once it is called: by hand, live and along the tree, saved and restored."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from agents.checking.checked import CheckedPolicy
from agents.checking.entropy import CheckedEntropy
from agents.checking.span import Span, SpanningPolicy, ToEndOfStep, Tokens, described_span, span_of
from agents.checking.speculative import RelaxedAcceptance, Speculative
from agents.common.rollout import Scheduling, decode
from agents.common.saving import load_policy
from agents.router.network import RouterNetwork
from envs.decoding.checked_session import CheckedSession
from envs.decoding.judges import Gap, Judge
from envs.decoding.observation import feature_width
from envs.models.pool import models_manifest
from envs.prefix_tree.checked_tree_session import CheckedTreeSession
from envs.prefix_tree.tree import PrefixTree
from tests.drafting import Letters, array, kin_of

NEVER, MAX_NEW, TASK = Gap(float("inf")), 18, Letters()
MARKS = tuple("aeiou159")
SPANS = [Tokens(3), ToEndOfStep(MARKS), ToEndOfStep(MARKS, corrections=True)]


@pytest.fixture(scope="module")
def kin(pools):
    return kin_of(pools["llama"])


def coin(episode, position):
    return np.random.default_rng([episode, position]).random()


@dataclass(frozen=True)
class Coin(SpanningPolicy):
    """Calls at random, the same for the same decision; accepts ends."""

    judge: Judge = NEVER
    span: Span = field(default_factory=Tokens)

    def score(self, observation):
        decisions = zip(observation.host_episodes.tolist(), observation.host_positions.tolist(), strict=True)
        scores = np.array([coin(*decision) for decision in decisions])
        return self.span.hold(np.where(observation.drafts.ended, 1.0, scores), observation.drafts)


def answers(kin, policy, threshold=0.3, rows=8, tree=None):
    return decode(kin, TASK, TASK.examples("test", 8), policy, threshold, MAX_NEW, Scheduling(rows=rows), tree=tree)


def over_behind(span, kin, tokens, written, corrected):
    """Whether a span is over that has written so many tokens, behind `tokens`."""
    if isinstance(span, Tokens):
        return written >= span.n
    text = kin.decode(array(tokens[-1])).rstrip(" ")
    return (span.corrections and not corrected) or any(text.endswith(mark) for mark in span.marks)


@pytest.mark.parametrize("span", [Tokens(1), *SPANS], ids=repr)
def test_who_writes_each_token_is_as_by_hand(kin, span):
    """Nothing is taken back: the coin decides, but while a span lasts."""
    spans = 0
    for number, one in enumerate(answers(kin, Coin(NEVER, span))):
        written, writers = 0, []
        for position in range(len(one.tokens)):
            if written and not over_behind(span, kin, one.tokens[:position].tolist(), written, corrected=False):
                llm = True
            else:
                written, llm = 0, coin(number, position) < 0.3
            written = written + 1 if llm else 0
            spans += written > 1
            writers.append(int(llm))
        assert one.writers.tolist() == writers
    assert (spans > 10) == (span not in (Tokens(1), SPANS[2]))


@pytest.mark.parametrize("span", [*SPANS, ToEndOfStep(("\n\n",))], ids=repr)
def test_with_tokens_taken_back_decisions_are_as_by_hand(kin, span):
    """Each decision of a response again, from its scores and from what was taken back."""
    went_on = 0
    for number, one in enumerate(answers(kin, Coin(Gap(0.5), span))):
        backs, tokens, pending, written, corrected = list(one.taken_back), [], 0, 0, False
        for score in one.scores.tolist():
            position = len(tokens)
            ended = pending > 0 and (position == MAX_NEW or tokens[-1] in kin.end_tokens)
            on = written > 0 and not over_behind(span, kin, tokens, written, corrected)
            went_on += on
            assert score == pytest.approx(0.0 if on else 1.0 if ended else coin(number, position))
            if score >= 0.3:
                source, at = (backs[0].tokens, backs[0].position) if backs else (one.tokens, 0)
                source, at = (source, at) if position >= at else (one.tokens, 0)
                tokens += [] if ended else [int(source[position - at])]
                pending, written = pending + 1, 0
                continue
            corrected = corrected and not pending
            if backs and position - pending <= backs[0].position < position:
                tokens, corrected = tokens[: backs.pop(0).position], True
            tokens.append(int(one.tokens[len(tokens)]))
            pending, written = 0, (written if on else 0) + 1
        assert tokens == one.tokens.tolist()
    assert went_on > 10


@pytest.mark.parametrize("span", SPANS, ids=repr)
def test_rows_and_the_tree_change_nothing(kin, span):
    policy = Coin(Gap(0.5), span)
    tree = PrefixTree(kin, TASK, MAX_NEW, memory=2**24)
    first = answers(kin, policy)
    assert sum(len(one.taken_back) for one in first) > 0
    for others in (answers(kin, policy, rows=3), answers(kin, policy, tree=tree)):
        for one, other in zip(first, others, strict=True):
            assert one.tokens.tolist() == other.tokens.tolist()
            assert one.writers.tolist() == other.writers.tolist()
            assert one.scores.tolist() == other.scores.tolist()


@pytest.mark.parametrize("kind", ["live", "tree"])
def test_a_restored_row_knows_how_long_the_llm_has_written(kin, kind):
    def session():
        if kind == "live":
            return CheckedSession(kin, 4, MAX_NEW, judge=Gap(0.5))
        return CheckedTreeSession(PrefixTree(kin, TASK, MAX_NEW, memory=2**24), 4, judge=Gap(0.5))

    first, other, rows, rng = session(), session(), np.arange(4), np.random.default_rng(0)
    first.start(rows, [kin.encode(one.prompt) for one in TASK.examples("test", 4)])
    runs = corrected = 0
    for _ in range(10):
        if not len(rows):
            break
        other.restore(rows, first.state(rows))
        ours, theirs = first.drafts(rows), other.drafts(rows)
        for name in ("runs", "corrected", "last_tokens"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        assert ours.last_texts() == theirs.last_texts()
        runs, corrected = max(runs, ours.runs.max()), corrected + ours.corrected.sum()
        step = first.step(rows, (rng.random(len(rows)) < 0.5).astype(np.int64))
        rows = rows[~(step.terminated | step.truncated)]
    assert runs > 1
    assert corrected


def policies(span):
    return [CheckedEntropy(span=span), Speculative(span=span), RelaxedAcceptance(span=span)]


def test_one_token_at_a_call_is_what_policies_without_a_span_do(kin):
    """The same array comes back, and evaluations of before are gone on with: the fingerprint is that of before."""
    session = CheckedSession(kin, 1, MAX_NEW)
    session.start(array(0), [kin.encode("abc?")])
    scores = np.array([0.5])
    for action in (0, 1, 1):
        session.step(array(0), array(action))
        assert Tokens(1).hold(scores, session.drafts(array(0))) is scores
    assert [one.fingerprint for one in policies(Tokens(1))] == [
        "CheckedEntropy(judge=Gap(tau=2.0))",
        "Speculative(draft_tokens=16, confidence=0.0, judge=FirstDisagreement())",
        "RelaxedAcceptance(draft_tokens=16, confidence=0.0, judge=Gap(tau=2.0))",
    ]
    for one, other in zip(policies(Tokens(1)), policies(Tokens(2)), strict=True):
        assert one.fingerprint != other.fingerprint


@pytest.mark.parametrize("span", SPANS, ids=repr)
def test_a_span_is_saved_with_the_policy(kin, span, tmp_path):
    torch.manual_seed(0)
    network = RouterNetwork(feature_width("hidden", kin.slm.width), units=[4]).eval().requires_grad_(False)
    plain = CheckedPolicy(network, models_manifest(kin), "hidden", judge=Gap(0.5))
    policy = replace(plain, span=span)
    assert policy.fingerprint != plain.fingerprint
    policy.save(tmp_path)
    found = load_policy(tmp_path, kin)
    assert (found.span, found.fingerprint) == (span, policy.fingerprint)
    first, again = (answers(kin, one) for one in (policy, found))
    assert [one.scores.tolist() for one in first] == [one.scores.tolist() for one in again]
    assert [len(one.tokens) for one in first] != [0] * 8
    text = (tmp_path / "policy.json").read_text()
    (tmp_path / "policy.json").write_text(text.replace('"span"', '"of later versions"'))
    assert load_policy(tmp_path, kin).fingerprint == plain.fingerprint  # saved before there were spans


def test_a_span_is_written_down_and_read_again():
    for span in SPANS:
        assert span_of(described_span(span)) == span
    with pytest.raises(ValueError, match="unknown span 'page'; there are tokens, to_end_of_step"):
        span_of({"name": "page"})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Tokens(0), "n must be at least 1, is 0"),
        (lambda: ToEndOfStep(()), "marks must be texts that steps end with"),
        (lambda: ToEndOfStep((" ",)), "marks must be texts that steps end with"),
        (lambda: ToEndOfStep("."), "marks must be texts that steps end with"),
    ],
)
def test_wrong_settings_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
