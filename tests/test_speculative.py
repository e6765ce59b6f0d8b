from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from agents.checking.speculative import Speculative, speculate
from agents.common.rollout import Scheduling, decode
from agents.heuristics import Always
from envs.costs import COLUMNS, CONTEXT, PAIRS, PASSES, READ, SECONDS, WRITTEN
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Example
from experiments.traces.recorder import Recorder
from experiments.traces.schema import SPECULATIVE
from experiments.traces.trace import traced
from experiments.verification.ledgers import speculative_entries
from tests.drafting import MAX_NEW, Letters, Plain, array, kin_of, successors

FAMILIES = ["llama", "qwen2", "gpt2"]
DRAFTS = [1, 3, 16, 200]
SOME = {("llama", 1), ("llama", 200), ("qwen2", 3), ("gpt2", 16)}
"""Each family and each length of drafts once or twice; the slow tests try all."""
COUNTED = [column for column in range(COLUMNS) if column != SECONDS]


@pytest.fixture(scope="module")
def kin(pools):
    return {family: kin_of(pools[family]) for family in FAMILIES}


def assert_same_answers(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.tokens.tolist() == other.tokens.tolist()
        assert (one.example, one.text, one.correct) == (other.example, other.text, other.correct)
        assert one.terminated == other.terminated


def assert_sound(episode, llm):
    """Laws of every ledger of speculation."""
    written = np.bincount(episode.writers, minlength=llm + 1)
    np.testing.assert_array_equal(episode.ledger[:, WRITTEN], written)
    assert set(episode.writers) <= {0, llm}
    # each of its passes writes a token, but for one that finds a drafted end right
    assert episode.ledger[llm, PASSES] == written[llm] + (episode.writers[-1] == 0)
    assert not episode.ledger[1:llm].any()
    assert not episode.decisions.any()
    assert episode.scores.tolist() == [0] * len(episode.tokens)


# -- the tokens -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "draft_tokens"),
    [
        pytest.param(*case, marks=[] if case in SOME else pytest.mark.slow)
        for case in itertools.product(FAMILIES, DRAFTS)
    ],
)
def test_the_tokens_are_those_the_llm_writes_alone(pools, kin, family, draft_tokens):
    task, drafted, by_llm = Letters(), 0, 0
    for pool in (pools[family], kin[family]):
        examples = task.examples("test")
        expected = decode(pool, task, examples, Always(slm=False), max_new_tokens=MAX_NEW)
        # fewer rows than examples: they are refilled as they end
        found = speculate(pool, task, examples, draft_tokens, MAX_NEW, Scheduling(rows=20))
        assert_same_answers(found, expected)
        for episode in found:
            assert_sound(episode, llm=1)
        drafted += sum((episode.writers == 0).sum() for episode in found)
        by_llm += sum((episode.writers == 1).sum() for episode in found)
        assert {episode.terminated for episode in found} == {True, False}
    ends = {int(episode.writers[-1]) for episode in found if episode.terminated}
    assert min(drafted, by_llm) > 50
    assert 0 in ends, "no drafted end was right"


@pytest.mark.parametrize("max_new_tokens", range(1, 7))
def test_a_response_has_its_limit_wherever_that_falls(kin, max_new_tokens):
    pool, task = kin["llama"], Letters()
    examples = task.examples("test", 12)
    expected = decode(pool, task, examples, Always(slm=False), max_new_tokens=max_new_tokens)
    for draft_tokens in (1, 2, 3, 5):
        found = speculate(pool, task, examples, draft_tokens, max_new_tokens, Scheduling(rows=5))
        assert_same_answers(found, expected)
        for episode in found:
            assert_sound(episode, llm=1)


@pytest.mark.parametrize("draft_tokens", DRAFTS)
def test_the_embedded_pair_writes_what_its_llm_writes_alone(pool, task, draft_tokens):
    examples = task.examples("test", 16)
    expected = decode(pool, task, examples, Always(slm=False), max_new_tokens=96)
    found = speculate(pool, task, examples, draft_tokens, 96, Scheduling(rows=10))
    assert_same_answers(found, expected)
    assert sum((episode.writers == 0).mean() for episode in found) > 0.4 * len(found)


def test_of_a_larger_pool_the_first_drafts_and_the_last_checks(pools):
    pool, task = pools["three"], Letters()
    examples = task.examples("test", 10)
    expected = decode(pool, task, examples, Always(slm=False), max_new_tokens=MAX_NEW)
    found = speculate(pool, task, examples, 3, MAX_NEW, Scheduling(rows=4))
    assert_same_answers(found, expected)
    for episode in found:
        assert_sound(episode, llm=2)


def test_scheduling_changes_neither_tokens_nor_ledger(kin):
    pool, task = kin["qwen2"], Letters()
    runs = [speculate(pool, task, task.examples("test", 12), 4, MAX_NEW, Scheduling(rows)) for rows in (1, 5, 12)]
    for run in runs[1:]:
        assert_same_answers(run, runs[0])
        for one, other in zip(run, runs[0], strict=True):
            np.testing.assert_array_equal(one.writers, other.writers)
            np.testing.assert_array_equal(one.ledger[:, COUNTED], other.ledger[:, COUNTED])


# -- the ledger -------------------------------------------------------------------------------------------------------

END = 26


@pytest.mark.parametrize(
    ("draft_tokens", "limit", "slm_writes", "tokens", "writers", "passes_of_slm", "passes_of_llm"),
    [
        # The prompt is 5 6 7; the LLM counts up, but writes 20 after 12. A draft that is right is read with what
        # follows it in the next pass; after 12 the SLM forgets 13 and goes on with 20; nobody reads 14 but the LLM.
        (
            3, 16, {}, [8, 9, 10, 11, 12, 20, 21, 22, 23, 24, 25, END], "000101000100",
            [[5, 6, 7], [8], [9], [10, 11], [12], [13], [20], [21], [22], [23, 24], [25]],
            [[5, 6, 7, 8, 9, 10], [11, 12, 13, 14], [20, 21, 22, 23], [24, 25]],
        ),
        # the last token is the LLM's: it is not drafted, and the SLM reads nothing any more
        (3, 4, {}, [8, 9, 10, 11], "0001", [[5, 6, 7], [8], [9]], [[5, 6, 7, 8, 9, 10]]),
        (3, 5, {}, [8, 9, 10, 11, 12], "00011", [[5, 6, 7], [8], [9]], [[5, 6, 7, 8, 9, 10], [11]]),
        (1, 3, {}, [8, 9, 10], "011", [[5, 6, 7]], [[5, 6, 7, 8], [9]]),
        # an end that is drafted is not read, and may be wrong
        (5, 4, {"t9": END}, [8, 9, 10, 11], "0011", [[5, 6, 7], [8], [9]], [[5, 6, 7, 8, 9], [10]]),
        # nothing that is drafted is right: it is read once by the LLM, and all but its last by the SLM
        (
            2, 3, {"t7": 50, "t8": 60}, [8, 9, 10], "111", [[5, 6, 7], [50], [8]],
            [[5, 6, 7, 50, 51], [8, 60], [9]],
        ),
        # an end the LLM writes itself, behind a draft or in the place of one
        (
            5, 16, {}, [8, 9, 10, 11, 12, 20, 21, 22, 23, 24, 25, END], "000001000001",
            [[5, 6, 7], [8], [9], [10], [11], [12, 20], [21], [22], [23], [24]],
            [[5, 6, 7, 8, 9, 10, 11, 12], [20, 21, 22, 23, 24, 25]],
        ),
        (
            6, 16, {"t25": 1}, [8, 9, 10, 11, 12, 20, 21, 22, 23, 24, 25, END], "000001000001",
            [[5, 6, 7], [8], [9], [10], [11], [12], [20], [21], [22], [23], [24], [25]],
            [[5, 6, 7, 8, 9, 10, 11, 12, 13], [20, 21, 22, 23, 24, 25, 1]],
        ),
    ],
)  # fmt: skip
def test_the_ledger_of_a_script_equals_hand_counts(
    make_tokenizer, passes, draft_tokens, limit, slm_writes, tokens, writers, passes_of_slm, passes_of_llm
):
    tokenizer = make_tokenizer()
    models = successors("slm", tokenizer, END, **slm_writes), successors("llm", tokenizer, END, t12=20)
    examples = [Example("script", "345", "x", "x")]
    (episode,) = speculate(ModelPool(models), Letters(), examples, draft_tokens, limit)
    assert episode.tokens.tolist() == tokens
    assert "".join(map(str, episode.writers)) == writers
    assert [read for name, (read,) in passes if name == "slm"] == passes_of_slm
    assert [read for name, (read,) in passes if name == "llm"] == passes_of_llm
    for model, made in enumerate((passes_of_slm, passes_of_llm)):
        assert episode.ledger[model, PASSES] == len(made)
        assert episode.ledger[model, READ] == sum(map(len, made))
        assert episode.ledger[model, WRITTEN] == writers.count(str(model))
        assert episode.ledger[model, SECONDS] > 0


def test_the_contexts_of_a_script_equal_hand_counts(make_tokenizer):
    tokenizer = make_tokenizer()
    models = successors("slm", tokenizer, END), successors("llm", tokenizer, END, t12=20)
    (episode,) = speculate(ModelPool(models), Letters(), [Example("script", "345", "x", "x")], 3, 16)
    # The SLM: the prompt over 0, then 8 and 9 over 3 and 4; 10 and 11 over 5, 12 and 13 over 7 and 8; of 9 tokens 13 is
    # forgotten, 20, 21 and 22 over 8, 9 and 10; 23 and 24 over 11, 25 over 13.
    # The LLM: 6 tokens over 0, 4 over 6; of 10 tokens two are forgotten, 4 over 8, and 2 over 12.
    expected = [[11, 15, 78, 6 + 4 + 5 + 13 + 8 + 9 + 9 + 10 + 11 + 25 + 14], [4, 16, 26, 21 + 34 + 42 + 27]]
    assert episode.ledger[:, [PASSES, READ, CONTEXT, PAIRS]].tolist() == expected


@pytest.mark.parametrize("draft_tokens", [1, 3, 16])
def test_the_ledger_has_every_pass_that_is_made_and_no_other(kin, passes, draft_tokens):
    pool, task = kin["llama"], Letters()
    found = speculate(pool, task, task.examples("test", 8), draft_tokens, MAX_NEW, Scheduling(rows=1))
    ledger = np.sum([episode.ledger for episode in found], axis=0)
    for name, entry in zip(pool.names, ledger, strict=True):
        reads = [len(read) for model, (read,) in passes if model == name]
        assert entry[[PASSES, READ]].tolist() == [len(reads), sum(reads)]


@pytest.mark.parametrize("on_tree", [False, True])
@pytest.mark.parametrize("draft_tokens", [1, 3, 16])
def test_the_ledger_is_the_one_that_writers_and_refused_drafts_tell(kin, draft_tokens, on_tree):
    """By a count that knows no session: the same process decoded live and along a tree."""
    pool, task = kin["llama"], Letters()
    tree = PrefixTree(pool, task, MAX_NEW, memory=2**24) if on_tree else None
    found = speculate(pool, task, task.examples("test", 12), draft_tokens, MAX_NEW, Scheduling(rows=5), tree=tree)
    recorder = Recorder(pool, task, "test", max_new_tokens=MAX_NEW)
    settings = recorder._head("speculative", SPECULATIVE, draft_tokens=draft_tokens).settings
    for number, episode in enumerate(found):
        trace = traced(number, episode, pool.encode(episode.example.prompt))
        expected = speculative_entries(trace, 2, settings)
        np.testing.assert_array_equal(episode.ledger[:, COUNTED], expected[:, COUNTED])
    assert sum(len(episode.taken_back) for episode in found) > 5


@pytest.mark.parametrize("confidence", [0.3, 0.9])
def test_a_draft_ends_behind_a_token_that_the_slm_is_not_sure_of(kin, confidence):
    pool, task, policy = kin["llama"], Letters(), Speculative(32, confidence)
    examples = task.examples("test", 12)
    expected = decode(pool, task, examples, Always(slm=False), max_new_tokens=MAX_NEW)
    found = decode(pool, task, examples, policy, max_new_tokens=MAX_NEW)
    assert_same_answers(found, expected)
    plain, unsure = Plain(pool), 0
    for episode in found:
        ids = pool.encode(episode.example.prompt).tolist()
        sure = [
            float(plain.logits(0, [*ids, *episode.tokens[:place]]).softmax(-1).max()) >= confidence
            for place in range(len(episode.tokens))
        ]
        for place in np.flatnonzero(episode.writers == 0).tolist():
            if not sure[place] and place + 1 < len(episode.tokens):
                unsure += 1
                assert episode.writers[place + 1] == 1
    assert unsure > 5
    assert len({len(episode.scores) for episode in found}) > 1


# -- checking in a session --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole", [False, True, np.array([True, False, True])])
def test_a_model_may_read_the_last_token_along(tiny_pool, whole):
    session, plain, rng = TeacherSession(tiny_pool, 4, MAX_NEW), Plain(tiny_pool), np.random.default_rng(4)
    prompts = [rng.integers(2, 96, count) for count in (4, 2, 7)]
    session.start(np.arange(3), prompts, responses=[array(9), array(5, 6, 7), array()])
    rows = array(2, 0, 1)
    found = session.read_along(rows, 1, whole)
    for row, last, tokens in zip(rows, np.broadcast_to(whole, 3), found, strict=True):
        ids = [*prompts[row], *session.response(row)]
        expected = [plain.token(1, ids[: count + 1]) for count in range(len(ids) - (not last))]
        assert tokens.tolist() == expected
        assert session.ledger[row, 1, [PASSES, READ]].tolist() == [1, len(expected)]


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draft_tokens", [0, -3])
def test_drafts_without_tokens_are_refused(tiny_pool, draft_tokens, passes):
    with pytest.raises(ValueError, match=f"draft_tokens must be at least 1, is {draft_tokens}"):
        speculate(tiny_pool, Letters(), Letters().examples("test", 2), draft_tokens)
    assert not passes


def test_examples_are_refused_by_name_before_any_model_runs(tiny_pool, passes):
    examples = Letters().examples("test", 2)
    with pytest.raises(ValueError, match="no examples to decode"):
        speculate(tiny_pool, Letters(), [])
    long = [examples[0], replace(examples[1], prompt="a" * 120)]
    with pytest.raises(ValueError, match=r"example letters/1 has a prompt of 120 tokens; the cache of 128 .* raise"):
        speculate(tiny_pool, Letters(), long, max_new_tokens=MAX_NEW)
    assert not passes


@pytest.mark.parametrize("confidence", [-0.1, 1.1])
def test_a_confidence_is_a_probability(confidence):
    with pytest.raises(ValueError, match=rf"confidence must be in \[0, 1\], is {confidence}"):
        Speculative(confidence=confidence)
