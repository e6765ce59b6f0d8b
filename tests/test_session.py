from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from envs.costs import COLUMNS, CONTEXT, PAIRS, PASSES, READ, SECONDS, WRITTEN
from envs.decoding.sampling import Sampling
from envs.decoding.session import Session
from envs.decoding.teacher_forcing import TeacherSession
from envs.models.attention import COPY_BYTES
from envs.models.language_model import LanguageModel
from envs.models.loading import embedded_pool, load_pool
from envs.models.pool import ModelPool
from envs.tasks.arithmetic import ArithmeticTask

FAMILIES = ["llama", "qwen2", "gpt2", "three"]
MAX_NEW, CAPACITY, ROWS = 16, 40, 6


def array(*values):
    return np.array(values, dtype=np.int64)


def prompt_of(rng, longest=12):
    return rng.integers(2, 96, rng.integers(1, longest + 1))


class Plain:
    """Decoding without a cache: at every token the chosen model reads the whole sequence again."""

    def __init__(self, pool):
        self.pool, self._tokens = pool, {}

    def token(self, model, ids):
        key = model, tuple(ids)
        if key not in self._tokens:
            with torch.inference_mode():
                logits = self.pool.models[model].network(torch.tensor([key[1]]), use_cache=False).logits
            self._tokens[key] = int(logits[0, -1].argmax())
        return self._tokens[key]


@dataclass(frozen=True)
class Row:
    prompt: int
    ids: tuple[int, ...]
    writers: tuple[int, ...] = ()
    active: bool = True

    @property
    def new(self):
        return len(self.ids) - self.prompt

    def cut(self, length):
        if length == len(self.ids):
            return self
        return Row(self.prompt, self.ids[:length], self.writers[: length - self.prompt])


class Script:
    """Random calls on a session, each followed in a plain model of what its rows must hold."""

    OPERATIONS = ("step", "start", "fork", "fork_shortened", "rewind", "extend", "free")
    TIMES = (65, 14, 8, 10, 10, 8, 5)

    def __init__(self, pool, seed):
        self.pool, self.rng, self.plain = pool, np.random.default_rng(seed), Plain(pool)
        self.session = TeacherSession(pool, rows=ROWS, max_new_tokens=MAX_NEW, capacity=CAPACITY)
        self.rows: dict[int, Row] = {}
        self.done = dict.fromkeys((*self.OPERATIONS, "refilled", "terminated", "truncated", "every model"), 0)

    def some(self, rows):
        """A random subset in random order; the rows in order now and then, which are read without a copy."""
        rows = sorted(rows)
        if not rows or self.rng.random() < 0.3:
            return rows
        return self.rng.permutation(rows)[: self.rng.integers(1, len(rows) + 1)].tolist()

    def active(self):
        return [r for r, row in self.rows.items() if row.active]

    def step(self):
        rows = self.some(self.active())
        if not rows:
            return 0
        actions = self.rng.integers(len(self.pool), size=len(rows))
        step = self.session.step(array(*rows), actions)
        for i, r in enumerate(rows):
            before, action = self.rows[r], int(actions[i])
            token = self.plain.token(action, before.ids)
            assert (step.tokens[i], step.slm_tokens[i]) == (token, self.plain.token(0, before.ids))
            ended = token in self.pool.end_tokens
            full = not ended and before.new + 1 == MAX_NEW
            assert (step.terminated[i], step.truncated[i]) == (ended, full)
            self.rows[r] = Row(before.prompt, (*before.ids, token), (*before.writers, action), not (ended or full))
            self.done["terminated"] += ended
            self.done["truncated"] += full
        self.done["every model"] += set(actions) == set(range(len(self.pool)))
        return 1

    def start(self):
        rows = self.some(set(range(ROWS)) - set(self.active())) or self.some(range(ROWS))[:2]
        prompts = [prompt_of(self.rng, CAPACITY - MAX_NEW) for _ in rows]
        self.done["refilled"] += bool(self.active())
        self.session.start(array(*rows), prompts)
        self.rows |= {r: Row(len(p), tuple(p.tolist())) for r, p in zip(rows, prompts, strict=True)}
        return 1

    def fork(self, shorten=False):
        targets = self.some(range(ROWS))[: ROWS // 2]
        sources = [r for r in self.rows if r not in targets and (self.rows[r].new or not shorten)]
        if not sources:
            return 0
        sources = self.rng.choice(sources, len(targets)).tolist()  # one may stand several times
        copies = [self.rows[s].cut(self.length(s) if shorten else len(self.rows[s].ids)) for s in sources]
        if shorten:
            self.session.fork_shortened(array(*sources), array(*targets), array(*(len(c.ids) for c in copies)))
        else:
            self.session.fork(array(*sources), array(*targets))
        self.rows |= dict(zip(targets, copies, strict=True))
        return int(not shorten or any(c is not self.rows[s] for c, s in zip(copies, sources, strict=True)))

    def fork_shortened(self):
        return self.fork(shorten=True)

    def rewind(self):
        rows = self.some(r for r, row in self.rows.items() if row.new)
        if not rows:
            return 0
        lengths = [self.length(r) for r in rows]
        self.session.rewind(array(*rows), array(*lengths))
        self.rows |= {r: self.rows[r].cut(length) for r, length in zip(rows, lengths, strict=True)}
        return 1

    def extend(self):
        rows = self.some(r for r in self.active() if self.rows[r].new < MAX_NEW - 1)
        if not rows:
            return 0
        chunks = [self.rng.integers(2, 30, self.rng.integers(1, MAX_NEW - self.rows[r].new)) for r in rows]
        model = int(self.rng.integers(len(self.pool)))
        self.session.extend(array(*rows), chunks, model)
        for r, chunk in zip(rows, chunks, strict=True):
            row = self.rows[r]
            self.rows[r] = Row(row.prompt, (*row.ids, *chunk.tolist()), (*row.writers, *[model] * len(chunk)))
        return 1

    def free(self):
        rows = self.some(self.active())[:1]
        if rows:
            self.session.free(array(*rows))
        for r in rows:
            del self.rows[r]
        return len(rows)

    def length(self, row):
        return int(self.rng.integers(self.rows[row].prompt, len(self.rows[row].ids) + 1))

    def check(self):
        for r, row in self.rows.items():
            assert tuple(self.session.response(r)) == row.ids[row.prompt :]
            assert tuple(self.session.writers(r)) == row.writers
            if row.active:
                seen = self.session.observe(array(r))
                assert int(seen.logits.argmax()) == self.plain.token(0, row.ids)
                assert seen.positions[0] == row.new


# -- routed decoding --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [True, False], ids=["rows copied", "rows read in place"])
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("family", FAMILIES)
def test_routed_decoding_equals_uncached_decoding(pools, family, seed, copied, monkeypatch):
    monkeypatch.setitem(COPY_BYTES, "cpu", 2**40 if copied else 0)
    script = Script(pools[family], seed)
    script.start()
    for operation in script.rng.permutation(np.repeat(script.OPERATIONS, script.TIMES)):
        script.done[operation] += getattr(script, operation)()
        script.check()
    assert min(script.done.values()) > 0


@pytest.mark.parametrize("family", FAMILIES)
def test_which_rows_step_together_changes_no_token(pools, family):
    pool, rng = pools[family], np.random.default_rng(5)
    prompts = [prompt_of(rng) for _ in range(ROWS)]
    actions = rng.integers(len(pool), size=(ROWS, MAX_NEW))
    together, alone = (Session(pool, ROWS, MAX_NEW, CAPACITY) for _ in range(2))
    together.start(np.arange(ROWS), prompts)
    going = np.arange(ROWS)
    for t in range(MAX_NEW):
        step = together.step(going, actions[going, t])
        going = going[~(step.terminated | step.truncated)]
        if not len(going):
            break
    for r, prompt in enumerate(prompts):
        alone.start(array(0), [prompt])
        for action in actions[r]:
            step = alone.step(array(0), array(action))
            if step.terminated[0]:
                break
        assert alone.response(0).tolist() == together.response(r).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_order_of_rows_changes_nothing(pools, family):
    """Prompts of one length: rows that attend in one call, whatever their order."""
    pool, rng = pools[family], np.random.default_rng(3)
    prompts = [rng.integers(2, 96, 6) for _ in range(ROWS)]
    rows, order = np.arange(ROWS), rng.permutation(ROWS)
    one, other = (Session(pool, ROWS, MAX_NEW, CAPACITY) for _ in range(2))
    one.start(rows, prompts)
    other.start(order, [prompts[row] for row in order])
    for _ in range(4):
        going_on = order[~np.isin(order, rows[~one._active])]
        actions = np.full(ROWS, len(pool) - 1)  # every model reads one token of each row
        one.step(np.sort(going_on), actions[np.sort(going_on)])
        other.step(going_on, actions[going_on])
        for row in rows:
            np.testing.assert_array_equal(one.response(row), other.response(row))


@pytest.mark.parametrize("family", FAMILIES)
def test_one_model_alone_equals_generate(pools, family):
    pool, rng, ends = pools[family], np.random.default_rng(6), 0
    for action, model in enumerate(pool.models):
        prompts = [prompt_of(rng) for _ in range(ROWS)]
        responses = decode(pool, prompts, action, max_new_tokens=40)
        for prompt, response in zip(prompts, responses, strict=True):
            assert response == generate(model, prompt, max_new_tokens=40)
            ends += response[-1] in pool.end_tokens
    assert ends > 0


def test_the_embedded_pair_alone_equals_generate():
    pool = embedded_pool()
    examples = ArithmeticTask().examples("test", 8)
    prompts = [pool.encode(example.prompt) for example in examples]
    for action, model in enumerate(pool.models):
        responses = decode(pool, prompts, action, max_new_tokens=96)
        assert responses == [generate(model, prompt, max_new_tokens=96) for prompt in prompts]
        assert any(response[-1] in pool.end_tokens for response in responses)


def decode(pool, prompts, action, max_new_tokens):
    session = TeacherSession(pool, len(prompts), max_new_tokens)
    going = np.arange(len(prompts))
    session.start(going, prompts)
    while len(going):
        step = session.step(going, np.full(len(going), action))
        going = going[~(step.terminated | step.truncated)]
    return [session.response(row).tolist() for row in range(len(prompts))]


def generate(model, prompt, max_new_tokens):
    ids = torch.from_numpy(prompt)[None]
    written = model.network.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=1
    )
    return written[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_observation_is_the_last_hidden_state_after_the_final_norm(pools, family):
    pool, rng = pools[family], np.random.default_rng(7)
    session = TeacherSession(pool, ROWS, MAX_NEW)
    rows = np.arange(ROWS)
    prompts = [prompt_of(rng) for _ in rows]
    session.start(rows, prompts)
    for t in range(4):
        seen = session.observe(rows)
        assert seen.hidden.shape == (len(rows), pool.slm.width)
        assert seen.hidden.dtype == torch.float32
        for i, r in enumerate(rows):
            ids = torch.tensor([[*prompts[r], *session.response(r)]])
            with torch.inference_mode():
                output = pool.slm.network(ids, output_hidden_states=True, use_cache=False)
            torch.testing.assert_close(seen.hidden[i], output.hidden_states[-1][0, -1], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(seen.logits[i], output.logits[0, -1], rtol=1e-4, atol=1e-4)
        assert seen.positions.tolist() == [t] * len(rows)
        step = session.step(rows, rng.integers(len(pool), size=len(rows)))
        rows = rows[~step.terminated]


def test_an_observation_stays_as_it_was(tiny_pool):
    session = unending(tiny_pool)
    session.start(array(0), [array(5, 6, 7)], episodes=array(41))
    seen = session.observe(array(0))
    hidden = seen.hidden.clone()
    session.step(array(0), array(0))
    assert torch.equal(seen.hidden, hidden)
    assert not torch.equal(session.observe(array(0)).hidden, hidden)
    assert (seen.episodes[0], seen.positions[0]) == (41, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("known", [True, False])
def test_references_and_their_forks_equal_uncached_decoding(pools, family, known):
    pool, rng = pools[family], np.random.default_rng(11)
    session, plain = TeacherSession(pool, ROWS, MAX_NEW, CAPACITY), Plain(pool)
    prompts = [prompt_of(rng) for _ in range(3)]
    references = [rng.integers(2, 96, count) for count in (7, 1, MAX_NEW)]
    hidden, choices = session.start_references(np.arange(3), prompts, references)
    for prompt, reference, states, tokens in zip(prompts, references, hidden, choices, strict=True):
        ids = [*prompt, *reference]
        with torch.inference_mode():
            output = pool.slm.network(torch.tensor([ids]), output_hidden_states=True, use_cache=False)
        expected = output.hidden_states[-1][0, len(prompt) - 1 : -1]
        torch.testing.assert_close(states, expected, rtol=1e-4, atol=1e-4)
        for t in range(len(reference)):
            expected_tokens = [plain.token(model, ids[: len(prompt) + t]) for model in range(len(pool))]
            assert tokens[t].tolist() == expected_tokens
    rows = array(3, 4, 5)
    for _ in range(4):
        kept = array(*(rng.integers(len(reference)) for reference in references))
        next_tokens = array(*(choices[r][kept[r], 0] for r in range(3)))
        lengths = kept + array(*map(len, prompts))
        if known:
            session.fork_with_next(np.arange(3), rows, lengths, next_tokens)
        else:
            session.fork_shortened(np.arange(3), rows, lengths)
        ids = [[*prompts[r], *references[r][: kept[r]]] for r in range(3)]
        going = np.arange(3)
        while len(going):
            actions = rng.integers(len(pool), size=len(going))
            step = session.step(rows[going], actions)
            for i, action, token, slm_token in zip(going, actions, step.tokens, step.slm_tokens, strict=True):
                assert (token, slm_token) == (plain.token(action, ids[i]), plain.token(0, ids[i]))
                ids[i].append(int(token))
            going = going[~(step.terminated | step.truncated)]


# -- rows that are used again -----------------------------------------------------------------------------------------


def unending(pool, rows=4, max_new_tokens=MAX_NEW, sampling=None):
    """A session in which no token ends a response."""
    return TeacherSession(ending_with(pool), rows, max_new_tokens, capacity=CAPACITY, sampling=sampling)


def ending_with(pool, *tokens):
    other = ModelPool(pool.models)
    other.end_tokens = array(*tokens)
    return other


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("freed", [True, False])
def test_a_row_used_again_holds_no_trace(pools, family, freed):
    rng = np.random.default_rng(8)
    used, fresh = unending(pools[family]), unending(pools[family])
    used.start(array(1), [rng.integers(2, 96, CAPACITY - MAX_NEW)])
    for _ in range(MAX_NEW):
        used.step(array(1), array(len(used.pool) - 1))
    if freed:
        used.free(array(1))
    prompt, actions = prompt_of(rng, 5), rng.integers(len(used.pool), size=MAX_NEW)
    for session in (used, fresh):
        session.start(array(1), [prompt])
    for action in actions:
        seen, expected = used.observe(array(1)), fresh.observe(array(1))
        assert torch.equal(seen.hidden, expected.hidden)
        assert torch.equal(seen.logits, expected.logits)
        assert used.step(array(1), array(action)).tokens == fresh.step(array(1), array(action)).tokens
    assert used.writers(1).tolist() == actions.tolist()
    assert np.array_equal(np.delete(used.ledger[1], SECONDS, -1), np.delete(fresh.ledger[1], SECONDS, -1))


@pytest.mark.parametrize("back", range(1, 6))
def test_the_llm_writes_the_same_again_after_a_rewind(tiny_pool, back):
    session = unending(tiny_pool)
    session.start(array(0), [array(5, 6, 7)])
    for action in (1, 0, 1, 1, 1):
        session.step(array(0), array(action))
    written = session.response(0).tolist()
    session.rewind(array(0), array(8 - back))
    for action in (1, 0, 1, 1, 1)[5 - back :]:
        session.step(array(0), array(action))
    assert session.response(0).tolist() == written


def test_a_copy_of_a_finished_row_is_finished(tiny_pool):
    session = unending(tiny_pool, max_new_tokens=2)
    session.start(array(0), [array(5, 6, 7)])
    session.step(array(0), array(0))
    assert session.step(array(0), array(0)).truncated[0]
    session.fork(array(0), array(1))
    with pytest.raises(ValueError, match=r"rows \[1\] are not in flight"):
        session.step(array(1), array(0))
    session.rewind(array(1), array(4))
    assert session.step(array(1), array(0)).tokens == session.response(0)[1]


# -- endings ----------------------------------------------------------------------------------------------------------


def test_an_end_token_terminates_even_at_the_limit(tiny_pool):
    prompt = array(5, 6, 7)
    free = unending(tiny_pool)
    free.start(array(0), [prompt])
    tokens = [int(free.step(array(0), array(1)).tokens[0]) for _ in range(4)]
    assert tokens[3] not in tokens[:3]
    for limit, ending in ((4, "terminated"), (5, "terminated"), (3, "truncated")):
        session = Session(ending_with(tiny_pool, tokens[3]), 1, limit)
        session.start(array(0), [prompt])
        for _ in range(min(limit, 4)):
            step = session.step(array(0), array(1))
        assert (step.terminated[0], step.truncated[0]) == (ending == "terminated", ending == "truncated")
        assert session.response(0).tolist() == tokens[:limit]


def test_a_row_may_have_a_limit_of_its_own(tiny_pool):
    session = unending(tiny_pool)
    rows = np.arange(3)
    session.start(rows, [array(5, 6, 7)] * 3, limits=array(2, 4, MAX_NEW + 9))
    session.step(rows, array(0, 1, 0))
    session.fork(array(0), array(3))
    assert session.step(array(0, 1, 2, 3), array(0, 0, 0, 1)).truncated.tolist() == [True, False, False, True]
    session.start(array(0), [array(5, 6, 7)])
    going, written = [0, 1, 2], 0
    while going:
        step = session.step(array(*going), array(*[0] * len(going)))
        going = [row for row, truncated in zip(going, step.truncated, strict=True) if not truncated]
        written += 1
    assert [len(session.response(row)) for row in rows] == [MAX_NEW, 4, MAX_NEW]
    assert written == MAX_NEW


# -- the ledger -------------------------------------------------------------------------------------------------------


def test_the_ledger_of_a_scripted_episode_equals_hand_counts(tiny_pool):
    session = unending(tiny_pool, max_new_tokens=5)
    works = [session.start(array(2), [array(5, 6, 7, 8, 9)])]
    for action in (0, 0, 1, 0, 1):
        step = session.step(array(2), array(action))
        works.append(step.ledger)
    assert step.truncated[0]
    columns = [PASSES, READ, CONTEXT, PAIRS, WRITTEN]
    # The SLM reads the prompt (5 tokens) and then each of the 5 tokens written, over 5, 6, 7, 8 and 9 tokens.
    # The LLM reads 7 tokens when first chosen, and the 2 it has missed when chosen again.
    assert session.ledger[2][:, columns].tolist() == [[6, 10, 35, 55, 3], [2, 9, 7, 45, 2]]
    assert works[0][0][:, columns].tolist() == [[1, 5, 0, 15, 0], [0, 0, 0, 0, 0]]
    assert works[2][0][:, columns].tolist() == [[1, 1, 6, 7, 1], [0, 0, 0, 0, 0]]
    assert works[3][0][:, columns].tolist() == [[1, 1, 7, 8, 0], [1, 7, 0, 28, 1]]
    assert works[5][0][:, columns].tolist() == [[1, 1, 9, 10, 0], [1, 2, 7, 17, 1]]
    # the SLM's seconds come in when it reads, after the step that made it
    counted = [column for column in range(COLUMNS) if column != SECONDS]
    np.testing.assert_allclose(sum(works)[0][:, counted], session.ledger[2][:, counted])
    assert (session.ledger[2, :, SECONDS] > 0).all()
    assert not session.ledger[[0, 1, 3]].any()


def test_what_a_row_is_taught_the_slm_reads_with_what_it_left_unread(tiny_pool):
    session, columns = unending(tiny_pool), [PASSES, READ, CONTEXT, PAIRS, WRITTEN]
    session.start(array(2), [array(5, 6, 7)])
    session.extend(array(2), [array(8, 9)])  # in one pass with the prompt
    session.extend(array(2), [array(10)], model=1)
    assert session.ledger[2][:, columns].tolist() == [[1, 6, 0, 21, 2], [0, 0, 0, 0, 1]]
    assert session.observe(array(2)).since_llm[0] == 0
    session.step(array(2), array(0))
    session.extend(array(2), [array(11, 12)])  # with the token just written, over 6
    assert session.ledger[2][:, columns].tolist() == [[2, 9, 6, 45, 5], [0, 0, 0, 0, 1]]
    seen = session.observe(array(2))
    assert (seen.since_llm[0], seen.positions[0]) == (3, 6)
    assert session.writers(2).tolist() == [0, 0, 1, 0, 0, 0]
    ids = [5, 6, 7, *session.response(2).tolist()]
    assert int(seen.logits.argmax()) == Plain(tiny_pool).token(0, ids)
    assert session.step(array(2), array(1)).tokens[0] == Plain(tiny_pool).token(1, ids)
    assert session.ledger[2, 1, [PASSES, READ, WRITTEN]].tolist() == [1, 9, 2]


def test_a_terminated_row_is_not_read_by_the_slm(tiny_pool):
    session = Session(ending_with(tiny_pool, *range(97)), 1, MAX_NEW)
    session.start(array(0), [array(5, 6, 7)])
    assert session.step(array(0), array(1)).terminated[0]
    assert session.ledger[0, :, [PASSES, READ, WRITTEN]].T.tolist() == [[1, 3, 0], [1, 3, 1]]


# -- sampling ---------------------------------------------------------------------------------------------------------

LOGITS = [1.0, 3.0, 0.0, 2.0, -1.0]


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.0861, 0.6364, 0.0317, 0.2341, 0.0117]),
        (2.0, 1.0, [0.1577, 0.4287, 0.0956, 0.2600, 0.0580]),
        (0.5, 1.0, [0.0158, 0.8647, 0.0021, 0.1170, 0.0003]),
        (1.0, 0.7, [0.0, 0.7311, 0.0, 0.2689, 0.0]),
        (1.0, 0.9, [0.0900, 0.6652, 0.0, 0.2447, 0.0]),
        (1.0, 0.63, [0.0, 1.0, 0.0, 0.0, 0.0]),
    ],
)
def test_draws_follow_the_distribution(temperature, top_p, expected):
    draws = 40_000
    logits = torch.tensor(LOGITS).expand(draws, -1)
    tokens = Sampling(temperature, top_p).draw(logits, np.random.default_rng(0).random(draws))
    counts = np.bincount(tokens, minlength=5)
    expected = np.array(expected)
    assert not counts[expected == 0].any()
    four_sigma = 4 * np.sqrt(expected * (1 - expected) / draws)
    assert (np.abs(counts / draws - expected) <= four_sigma).all(), counts / draws


def test_the_first_draw_follows_the_logits_of_the_chosen_model(tiny_pool):
    rows, prompt = 400, array(5, 6, 7)
    sampling = Sampling(temperature=1.5)
    session = Session(tiny_pool, rows, MAX_NEW, capacity=20, sampling=sampling)
    for action, model in enumerate(tiny_pool.models):
        with torch.inference_mode():
            logits = model.network(torch.from_numpy(prompt)[None]).logits[0, -1]
        expected = (logits.double() / 1.5).softmax(-1).numpy()
        generators = [np.random.default_rng([action, row]) for row in range(rows)]
        session.start(np.arange(rows), [prompt] * rows, generators=generators)
        tokens = session.step(np.arange(rows), np.full(rows, action)).tokens
        drawn = np.bincount(tokens, minlength=len(expected)) / rows
        four_sigma = 4 * np.sqrt(expected * (1 - expected) / rows) + 2 / rows
        assert (np.abs(drawn - expected) <= four_sigma).all()
        assert drawn.max() < 0.9


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0, top_p=1e-6), Sampling(temperature=1e-4)])
def test_a_small_top_p_or_temperature_is_greedy(tiny_pool, sampling):
    greedy, sampled = unending(tiny_pool), unending(tiny_pool, sampling=sampling)
    rng = np.random.default_rng(9)
    prompts = [prompt_of(rng) for _ in range(4)]
    greedy.start(np.arange(4), prompts)
    sampled.start(np.arange(4), prompts, generators=[np.random.default_rng(r) for r in range(4)])
    for _ in range(MAX_NEW):
        actions = rng.integers(2, size=4)
        assert (greedy.step(np.arange(4), actions).tokens == sampled.step(np.arange(4), actions).tokens).all()


def test_sampled_tokens_depend_on_the_generator_alone(tiny_pool):
    rng = np.random.default_rng(10)
    prompts, actions = [prompt_of(rng) for _ in range(4)], rng.integers(2, size=(4, MAX_NEW))

    def responses(batches, seed=0):
        session = unending(tiny_pool, sampling=Sampling(temperature=1.0, top_p=0.95))
        written = {}
        for batch in batches:
            rows = np.array([batch.index(episode) for episode in batch])
            generators = [np.random.default_rng([seed, episode]) for episode in batch]
            session.start(rows, [prompts[episode] for episode in batch], generators=generators)
            for t in range(MAX_NEW):
                session.step(rows, actions[batch, t])
            written |= {episode: session.response(row).tolist() for row, episode in zip(rows, batch, strict=True)}
        return [written[episode] for episode in range(4)]

    together = responses([[0, 1, 2, 3]])
    assert responses([[2, 0], [3], [1]]) == together
    assert responses([[3, 2, 1, 0]]) == together
    assert responses([[0, 1, 2, 3]], seed=1) != together


def test_a_sampled_step_still_tells_what_the_slm_would_have_written(tiny_pool):
    session = unending(tiny_pool, sampling=Sampling(temperature=3.0))
    session.start(array(0), [array(5, 6, 7)], generators=[np.random.default_rng(0)])
    differ = 0
    for _ in range(MAX_NEW):
        best = int(session.observe(array(0)).logits.argmax())
        step = session.step(array(0), array(0))
        assert step.slm_tokens[0] == best
        differ += step.tokens[0] != best
    assert differ


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0, is -0.1"),
        ({"top_p": 0.0}, "top_p must be in .* is 0.0"),
        ({"top_p": 1.01}, "top_p must be in .* is 1.01"),
    ],
)
def test_sampling_refuses_settings_out_of_range(settings, named):
    with pytest.raises(ValueError, match=named):
        Sampling(**settings)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"rows": 0}, "rows must be at least 1, is 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, is 0"),
        ({"capacity": 8}, "capacity 8 must exceed max_new_tokens 8"),
        ({"capacity": 129}, "capacity 129 .* 128 positions"),
        ({"capacity": 0}, "capacity 0"),
        ({"rows": 10**9}, r"lower rows \(1000000000\), lower capacity \(64\)"),
    ],
)
def test_a_session_refuses_settings_out_of_range(tiny_pool, settings, named):
    with pytest.raises(ValueError, match=named):
        Session(tiny_pool, **({"rows": 2, "max_new_tokens": 8, "capacity": 64} | settings))


@pytest.fixture
def running(tiny_pool):
    """Rows 0, 1 and 2 of 4 in flight, with 3 tokens each."""
    session = unending(tiny_pool)
    session.start(array(0, 1, 2), [array(5, 6, 7)] * 3)
    return session


@pytest.mark.parametrize(
    ("rows", "actions", "named"),
    [
        ([0, 1], [0, 2], r"actions must be 2 integers in 0\.\.1; they are \[0, 2\]"),
        ([0, 1], [-1, 0], r"in 0\.\.1; they are \[-1, 0\]"),
        ([0, 1], [0], r"actions must be 2 integers .* \[0\]"),
        ([0, 1], [0.0, 0.7], r"integers .* \[0.0, 0.7\]"),
        ([0, 3], [0, 0], r"rows \[3\] are not in flight"),
        ([0, 0], [0, 0], r"rows must be distinct .* \[0, 0\]"),
        ([0, 4], [0, 0], r"rows must be distinct and in 0\.\.3; they are \[0, 4\]"),
        ([-1], [0], r"rows must be distinct and in 0\.\.3; they are \[-1\]"),
        ([], [], r"rows must be distinct .* \[\]"),
    ],
)
def test_a_step_refuses_rows_and_actions_out_of_range(running, rows, actions, named):
    with pytest.raises(ValueError, match=named):
        running.step(np.array(rows), np.array(actions))
    assert [len(running.response(row)) for row in range(3)] == [0, 0, 0]
    assert running.step(array(0, 1, 2), array(0, 1, 0)).tokens.shape == (3,)


def test_actions_may_be_booleans(running):
    step = running.step(array(0, 1), np.array([True, False]))
    assert step.ledger[:, :, WRITTEN].tolist() == [[0, 1], [1, 0]]
    assert [running.writers(0)[0], running.writers(1)[0]] == [1, 0]


@pytest.mark.parametrize("length", [0, CAPACITY - MAX_NEW + 1])
def test_start_refuses_a_prompt_that_is_empty_or_leaves_no_room(running, length):
    with pytest.raises(
        ValueError, match=f"row 3 has a prompt of {length} tokens; the cache of 40 .* 24 .* raise capacity"
    ):
        running.start(array(2, 3), [array(5), np.full(length, 5)])
    assert running.lengths(array(2)) == 3


def test_sampling_refuses_to_start_without_generators(tiny_pool):
    session = unending(tiny_pool, sampling=Sampling(temperature=1.0))
    with pytest.raises(ValueError, match="needs a generator for each row"):
        session.start(array(0), [array(5)])


@pytest.mark.parametrize(
    ("sources", "targets", "lengths", "named"),
    [
        ([0], [1], [4], r"lengths \[4\] must lie between the prompts and the \[3\] tokens"),
        ([0], [1], [2], r"lengths \[2\] must lie between"),
        ([0, 1], [1, 2], None, "a fork's target is another fork's source"),
        ([0, 0], [1, 1], None, r"rows must be distinct .* \[1, 1\]"),
        ([0], [4], None, r"they are \[4\]"),
        ([-1], [1], None, r"they are \[-1\]"),
        ([4], [1], None, r"they are \[4\]"),
    ],
)
def test_a_fork_refuses_rows_and_lengths_out_of_range(running, sources, targets, lengths, named):
    rows, fork = (np.array(sources), np.array(targets)), running.fork if lengths is None else running.fork_shortened
    given = () if lengths is None else (np.array(lengths),)
    with pytest.raises(ValueError, match=named):
        fork(*rows, *given)


def test_extend_refuses_to_fill_a_response_or_a_row_not_in_flight(running):
    running.extend(array(0), [np.full(MAX_NEW - 1, 9)])
    for row, chunk in ((0, array(9)), (1, np.full(MAX_NEW, 9)), (3, array(9))):
        with pytest.raises(ValueError, match=rf"rows \[{row}\] cannot take \[{len(chunk)}\] more tokens"):
            running.extend(array(row), [chunk])
    assert running.step(array(0), array(1)).truncated[0]


def test_extend_refuses_chunks_without_tokens_and_models_out_of_range(running):
    with pytest.raises(ValueError, match=r"rows \[1\] are given no tokens"):
        running.extend(array(0, 1), [array(9), array()])
    for model in (-1, 2):
        with pytest.raises(ValueError, match=rf"model must be in 0\.\.1, is {model}"):
            running.extend(array(0), [array(9)], model)
    assert running.lengths(array(0, 1)).tolist() == [3, 3]


@pytest.mark.parametrize("broken", [0, 1])
def test_nan_logits_stop_with_the_name_of_the_model(pools, broken):
    names = ["sound", "sound"]
    names[broken] = "broken"
    networks = [copy.deepcopy(model.network) for model in pools["llama"].models]
    with torch.no_grad():
        networks[broken].model.layers[0].mlp.down_proj.weight[3, 3] = torch.nan
    tokenizer = pools["llama"].tokenizer
    pool = ModelPool([LanguageModel(n, network, tokenizer) for n, network in zip(names, networks, strict=True)])
    session = Session(pool, 1, MAX_NEW)
    session.start(array(0), [array(5, 6, 7)])
    if broken == 1:
        session.observe(array(0))
    with pytest.raises(FloatingPointError, match="the logits of broken are NaN; load it with another dtype"):
        session.step(array(0), array(1)) if broken == 1 else session.observe(array(0))


def test_tokens_that_are_rewound_were_not_written(tiny_pool):
    session = unending(tiny_pool)
    session.start(array(0), [array(5, 6, 7)])
    for action in (0, 1, 1, 0):
        session.step(array(0), array(action))
    session.rewind(array(0), array(5))
    assert session.ledger[0, :, WRITTEN].tolist() == [1, 1]
    session.fork(array(0), array(1))
    assert session.ledger[1, :, WRITTEN].tolist() == [1, 1]


def test_references_end_with_the_tokenizers_own_end(save_model, make_tokenizer):
    tokenizer = make_tokenizer(end="z")
    config = LlamaConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    folder = str(save_model("ends", config, tokenizer=tokenizer, ends=[0, tokenizer.eos_token_id]))
    pool = load_pool([folder, folder], dtype="float32", verbose=False)
    assert pool.end_tokens.min() < pool.end_token == tokenizer.eos_token_id
    assert pool.encode_response("ab").tolist() == [*pool.encode("ab"), pool.end_token]
