"""Checking drafts: what it equals where nothing or everything is taken back, live and along a prefix tree."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from envs.arrays import UNKNOWN
from envs.costs import COLUMNS, PASSES, READ, SECONDS, WRITTEN
from envs.decoding.checked_session import CheckedSession
from envs.decoding.checking import agreed
from envs.decoding.judges import GAP, RANK, FirstDisagreement, Gap, TopK, described, judge_of, opinions
from envs.decoding.session import Session
from envs.prefix_tree.checked_tree_session import CheckedTreeSession
from envs.prefix_tree.tree import PrefixTree
from tests.drafting import MAX_NEW, Letters, Plain, array, kin_of

COUNTED = [column for column in range(COLUMNS) if column != SECONDS]
NEVER = Gap(float("inf"))
FAMILIES = ["llama", "qwen2", "gpt2"]


@pytest.fixture(scope="module")
def kin(pools):
    return {family: kin_of(pools[family]) for family in FAMILIES}


def sessions(pool, rows, judge, max_new=MAX_NEW):
    """A live session and one along a new tree."""
    tree = PrefixTree(pool, Letters(), max_new, memory=2**24)
    return {
        "live": CheckedSession(pool, rows, max_new, judge=judge),
        "tree": CheckedTreeSession(tree, rows, judge=judge),
    }


def prompts_of(pool, count):
    return [pool.encode(example.prompt) for example in Letters().examples("test", count)]


def answer(session, prompts, decide, observed=True):
    """Let `decide(drafts, rng of the row)` choose the action of every row till its end; what each row went through."""
    rows = np.arange(len(prompts))
    session.start(rows, prompts, observed=observed)
    rngs = [np.random.default_rng([3, row]) for row in rows]
    steps, going = [[] for _ in rows], rows
    while len(going):
        if observed:
            session.observe(going)
        drafts = session.drafts(going) if isinstance(session, (CheckedSession, CheckedTreeSession)) else None
        actions = np.array([decide(drafts, i, rngs[row]) for i, row in enumerate(going)])
        step = session.step(going, actions)
        for i, row in enumerate(going):
            steps[row].append((int(actions[i]), step, i))
        going = going[~(step.terminated | step.truncated)]
    return steps


def by_coin(models=2, share=0.4):
    def decide(drafts, i, rng):
        coin, model = rng.random(), int(rng.integers(1, models))
        return 0 if drafts is not None and drafts.ended[i] else model * int(coin < share)

    return decide


def whole(session, row):
    """What a row came to."""
    return session.response(row).tolist(), session.writers(row).tolist(), session.ledger[row][:, COUNTED].tolist()


# -- nothing is ever taken back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "three"])
def test_where_nothing_is_taken_back_it_is_token_routing(pools, family):
    """Infinite tau, drafted ends accepted: the tokens, writers and ledger of routing by the same actions."""
    pool, count = pools[family], 8
    prompts, decide = prompts_of(pool, count), by_coin(len(pool))
    routed = Session(pool, count, MAX_NEW)
    answer(routed, prompts, decide)
    for session in sessions(pool, count, NEVER).values():
        answer(session, prompts, decide)
        for row in range(count):
            assert whole(session, row) == whole(routed, row)
            assert session.taken_back(row) == ()


def start_of(pool, prompt):
    """The ledger of a row that was started."""
    session = Session(pool, 1, MAX_NEW)
    return session.start(array(0), [prompt])[0][:, COUNTED]


def test_the_costs_of_steps_are_those_of_the_response(pools):
    """What steps enter in the ledger sums up to what the row took, thrown-away passes included."""
    pool, count = pools["llama"], 6
    prompts = prompts_of(pool, count)
    for session in sessions(pool, count, FirstDisagreement()).values():
        steps = answer(session, prompts, by_coin())
        for row in range(count):
            total = sum(step.ledger[i][:, COUNTED] for _, step, i in steps[row]) + start_of(pool, prompts[row])
            np.testing.assert_array_equal(total, session.ledger[row][:, COUNTED])
            written = np.bincount(session.writers(row), minlength=2)
            np.testing.assert_array_equal(session.ledger[row][:, WRITTEN], written)


# -- any judge, any policy --------------------------------------------------------------------------------------------


class Process:
    """The process as the docs say it, by models that read whole sequences without a cache."""

    def __init__(self, pool, judge, prompt, limit):
        self.pool, self.plain, self.judge, self.prompt, self.limit = pool, Plain(pool), judge, list(prompt), limit
        self.response, self.pending, self.over = [], 0, False

    @property
    def ended(self):
        full = len(self.response) >= self.limit
        return self.pending > 0 and (full or self.response[-1] in self.pool.end_tokens)

    def next_logits(self, model, length):
        return self.plain.logits(model, [*self.prompt, *self.response[:length]])

    def step(self, action):
        """Take an action; the token written, or UNKNOWN, how many drafted tokens stand, and those taken back."""
        if action == 0 and self.ended:
            self.over = True
            return UNKNOWN, 0, []
        if action == 0:
            token = self.plain.token(0, [*self.prompt, *self.response])
            self.response.append(token)
            self.pending += 1
            return token, 0, []
        begun, kept = len(self.response) - self.pending, 0
        while kept < self.pending:
            logits = self.next_logits(action, begun + kept)[None]
            if not self.judge.stands(opinions(logits, array(self.response[begun + kept])).numpy())[0]:
                break
            kept += 1
        gone = self.response[begun + kept :]
        if self.ended and not gone:
            self.over = True
            return UNKNOWN, kept, []
        self.response = self.response[: begun + kept]
        token = self.plain.token(action, [*self.prompt, *self.response])
        self.response.append(token)
        self.pending = 0
        self.over = token in self.pool.end_tokens or len(self.response) >= self.limit
        return token, kept, gone


def recklessly(models):
    """Calls at random, also at drafted ends."""

    def decide(drafts, i, rng):
        share = 0.5 if drafts.ended[i] else 0.3
        coin, model = rng.random(), int(rng.integers(1, models))
        return model * int(coin < share)

    return decide


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("judge", [FirstDisagreement(), Gap(0.0), Gap(0.5), TopK(2), NEVER], ids=repr)
@pytest.mark.parametrize("family", ["llama", "gpt2", "three"])
def test_every_step_is_that_of_models_without_a_cache(pools, kin, family, judge, observed):
    pool, count, limit = kin.get(family, pools[family]), 12, 10
    prompts, gone, ended = prompts_of(pool, count), 0, []
    for session in sessions(pool, count, judge, limit).values():
        steps = answer(session, prompts, recklessly(len(pool)), observed)
        for row in range(count):
            process, terminated = Process(pool, judge, prompts[row], limit), False
            for action, step, i in steps[row]:
                assert not process.over
                token, kept, back = process.step(action)
                found = step.checks.taken_back.get(i)
                assert (step.tokens[i], step.checks.kept[i]) == (token, kept)
                assert ([] if found is None else found.tokens.tolist()) == back
                if found is not None:
                    assert (found.position, found.writer) == (len(process.response) - 1, 0)
                    gone += len(back)
                assert step.terminated[i] | step.truncated[i] == process.over
                terminated = bool(step.terminated[i])
            assert process.over
            assert session.response(row).tolist() == process.response
            assert terminated == (process.response[-1] in pool.end_tokens)
            assert session.taken_back_tokens(row) == sum(len(one.tokens) for one in session.taken_back(row))
            ended.append(steps[row][-1][0])
    assert (gone > 10) == (judge != NEVER)
    assert {0, 1} <= set(ended), "no drafted end was accepted, or none called"


@pytest.mark.parametrize("observed", [True, False])
@pytest.mark.parametrize("family", ["llama", "three"])
def test_one_row_at_a_time_many_and_a_tree_come_to_the_same(pools, kin, family, observed):
    pool, count, judge = kin.get(family, pools[family]), 8, Gap(0.5)
    prompts, decide = prompts_of(pool, count), recklessly(len(pool))
    both = sessions(pool, count, judge)
    for session in both.values():
        answer(session, prompts, decide, observed)
    again = CheckedTreeSession(both["tree"].tree, count, judge=judge)
    answer(again, prompts, decide, observed)
    for row in range(count):
        alone = CheckedSession(pool, 1, MAX_NEW, judge=judge)

        def own(drafts, i, rng, row=row, kept=np.random.default_rng([3, row])):  # noqa: B008
            return decide(drafts, i, kept)

        answer(alone, prompts[row : row + 1], own, observed)
        for session in (*both.values(), again):
            assert whole(session, row) == whole(alone, 0)
            backs = [(one.position, one.tokens.tolist()) for one in alone.taken_back(0)]
            assert [(one.position, one.tokens.tolist()) for one in session.taken_back(row)] == backs


@pytest.mark.parametrize("observed", [True, False])
def test_the_ledger_has_every_pass_that_is_made_and_no_other(kin, passes, observed):
    pool = kin["llama"]
    session = CheckedSession(pool, 1, MAX_NEW, judge=Gap(0.5))
    for prompt in prompts_of(pool, 6):
        passes.clear()
        answer(session, [prompt], recklessly(2), observed)
        for name, entry in zip(pool.names, session.ledger[0], strict=True):
            reads = [len(read) for model, (read,) in passes if model == name]
            assert entry[[PASSES, READ]].tolist() == [len(reads), sum(reads)]


def test_what_is_observed_is_the_state_a_drafted_token_was_written_by(kin):
    """Entropies and -log p of drafts are sums over the states passed since the call, live and along the tree."""
    pool, count = kin["llama"], 5
    both = sessions(pool, count, Gap(1.0))
    prompts, rows = prompts_of(pool, count), np.arange(count)
    for session in both.values():
        session.start(rows, prompts)
    sums = np.zeros((count, 2))
    for number in range(12):
        seen = [session.observe(rows) for session in both.values()]
        for one in seen:
            width = pool.slm.width + 11 + 2
            vector = one.vector("hidden_logits_history_drafts")
            torch.testing.assert_close(vector[:, width:], one.vector("drafts"))
            np.testing.assert_allclose(one.drafts.entropies, sums[:, 0], atol=1e-4)
            np.testing.assert_allclose(one.drafts.surprisals, sums[:, 1], atol=1e-4)
            torch.testing.assert_close(vector, seen[0].vector("hidden_logits_history_drafts"), atol=1e-4, rtol=1e-4)
        actions = np.full(count, int(number % 5 == 4)) | seen[0].drafts.ended
        steps = [session.step(rows, actions) for session in both.values()]
        states = seen[0].logit_features.double().numpy()
        sums = np.where(actions[:, None] > 0, 0, sums + np.stack([states[:, 0], -states[:, 1]], -1))
        over = steps[0].terminated | steps[0].truncated
        rows, sums = rows[~over], sums[~over]
        count = len(rows)
        if not count:
            break
    assert number > 5


def test_of_an_unobserved_row_nothing_is_seen_but_its_drafts(kin):
    for session in sessions(kin["llama"], 2, None).values():
        session.start(array(0, 1), prompts_of(kin["llama"], 2), observed=False)
        session.step(array(0, 1), array(0, 0))
        seen = session.observe(array(0, 1))
        assert len(seen) == 2
        assert seen.vector("drafts").shape == (2, 4)
        assert seen.drafts.counts.tolist() == [1, 1]
        assert (seen.drafts.last_surprisals > 0).all()
        with pytest.raises(ValueError, match="rows are not observed"):
            seen.vector("hidden")


@pytest.mark.parametrize("kind", ["live", "tree"])
def test_a_row_goes_on_where_another_stood(kin, kind):
    pool, count, judge = kin["llama"], 6, Gap(0.5)
    prompts, decide = prompts_of(pool, count), recklessly(2)
    first, other = sessions(pool, count, judge)[kind], sessions(pool, count, judge)[kind]
    rows, rng = np.arange(count), np.random.default_rng(4)
    first.start(rows, prompts)
    taken = 0
    while len(rows):
        actions = np.array([decide(first.drafts(rows), i, rng) for i in range(len(rows))])
        other.restore(rows, first.state(rows))
        ours, theirs = first.step(rows, actions), other.step(rows, actions)
        for row in rows:
            backs = [[(one.position, one.writer, *one.tokens) for one in of.taken_back(row)] for of in (first, other)]
            assert backs[0] == backs[1]
        for name in ("tokens", "slm_tokens", "terminated", "truncated"):
            np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
        np.testing.assert_array_equal(ours.ledger[..., COUNTED], theirs.ledger[..., COUNTED])
        np.testing.assert_array_equal(ours.checks.kept, theirs.checks.kept)
        rows = rows[~(ours.terminated | ours.truncated)]
        taken += 1
    assert taken > 8


# -- judges -----------------------------------------------------------------------------------------------------------


def test_opinions_are_gaps_and_ranks():
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0], [0.5, 0.0, -1.0, 4.0]])
    thought = opinions(logits, array(3, 0)).numpy()
    # of two that are equally likely the first is written, and the other comes behind it
    assert thought[:, RANK].tolist() == [1, 1]
    assert thought[:, GAP].tolist() == [0.0, 3.5]
    assert opinions(logits, array(1, 2)).numpy()[:, RANK].tolist() == [0, 3]
    assert opinions(logits[:0], array()).shape == (0, 2)


def test_judges_are_ordered_by_what_they_let_stand():
    rng = np.random.default_rng(0)
    thought = opinions(torch.from_numpy(rng.normal(size=(500, 12))), rng.integers(0, 12, 500)).numpy()
    stands = [judge.stands(thought) for judge in (FirstDisagreement(), Gap(0.0), Gap(0.7), Gap(2.0), NEVER)]
    for strict, lax in pairwise(stands):
        assert (strict <= lax).all()
    np.testing.assert_array_equal(stands[0], stands[1])
    np.testing.assert_array_equal(stands[0], TopK(1).stands(thought))
    assert stands[0].sum() < TopK(3).stands(thought).sum() < stands[-1].sum() == 500


def test_of_a_draft_the_longest_beginning_stands():
    stands = np.array([1, 1, 0, 1, 0, 1, 1], dtype=bool)
    assert agreed(stands, array(4, 0, 1, 2)).tolist() == [2, 0, 0, 2]
    assert agreed(stands[:0], array(0, 0)).tolist() == [0, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda pool: Gap(-1.0), "tau must be at least 0, is -1"),
        (lambda pool: Gap(float("nan")), "tau must be at least 0, is nan"),
        (lambda pool: TopK(0), "k must be at least 1, is 0"),
    ],
)
def test_wrong_settings_are_named(tiny_pool, make, message):
    with pytest.raises(ValueError, match=message):
        make(tiny_pool)


def test_a_row_that_has_ended_takes_no_step(kin):
    for session in sessions(kin["llama"], 1, NEVER, 1).values():
        session.start(array(0), prompts_of(kin["llama"], 1))
        assert not session.step(array(0), array(0)).truncated[0]
        assert session.drafts(array(0)).ended[0]
        last = session.step(array(0), array(0))
        assert last.terminated[0] | last.truncated[0]
        assert not last.ledger.any()
        with pytest.raises(ValueError, match=r"rows \[0\] are not in flight"):
            session.step(array(0), array(0))


def test_rows_whose_drafts_are_checked_are_not_copied_nor_taught(kin):
    session = CheckedSession(kin["llama"], 2, MAX_NEW)
    session.start(array(0), prompts_of(kin["llama"], 1))
    with pytest.raises(ValueError, match=r"rows \[0\] are of a session that checks drafts, .* use `state`"):
        session.fork(array(0), array(1))
    with pytest.raises(ValueError, match=r"rows \[0\] are of a session that checks drafts; teach"):
        session.extend(array(0), [array(5)])


def test_no_model_reads_prompts_by_itself_where_drafts_are_checked(kin):
    for session in sessions(kin["llama"], 1, NEVER).values():
        session.start(array(0), prompts_of(kin["llama"], 1))
        with pytest.raises(
            ValueError, match=r"rows \[0\] are of a session that checks drafts, where no model reads prompts"
        ):
            session.read_prompts(array(0), 1)


def test_a_judge_is_written_down_and_read_again():
    for judge in (FirstDisagreement(), Gap(1.5), NEVER, TopK(3)):
        assert judge_of(json.loads(json.dumps(described(judge)))) == judge
    with pytest.raises(ValueError, match="unknown judge 'taste'; there are first_disagreement, gap, top_k"):
        judge_of({"name": "taste"})
    with pytest.raises(ValueError, match="no settings of the judge gap"):
        judge_of({"name": "gap", "k": 1})
