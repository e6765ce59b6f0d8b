"""Rows that go on from what their models have read of another response to the same prompt."""

import numpy as np
import pytest
import torch

from envs.decoding.teacher_forcing import TeacherSession

MAX_NEW = 8
PROMPTS = [np.array([5, 9, 6, 7]), np.array([5, 9, 6, 8, 4])]


@pytest.fixture
def sessions(tiny_pool):
    return [TeacherSession(tiny_pool, 3, MAX_NEW) for _ in range(2)]


def asked(session, rows, responses, unread):
    """What the LLM thinks of, and would write in the place of, the tokens from `unread` on; and what the SLM sees."""
    drafts = [response[begun:] for response, begun in zip(responses, unread, strict=True)]
    llm = len(session.pool) - 1
    choices, thought = session.read_with_opinions(rows, llm, np.zeros(len(rows), dtype=bool), drafts)
    seen = session.observe(rows)
    behind = [own[len(own) - len(draft) :] for own, draft in zip(choices, drafts, strict=True)]
    return behind, thought, seen


def test_a_resumed_row_is_one_that_was_started(sessions):
    """Whatever the row held before: the same response, a longer or a shorter one, another prompt, one at its end."""
    resumed, started = sessions
    rng = np.random.default_rng(0)
    kept = []
    for _ in range(60):
        rows = rng.permutation(3)[: rng.integers(1, 4)]
        prompts = [PROMPTS[rng.integers(2)] for _ in rows]
        # few tokens, so that responses begin alike
        responses = [rng.integers(4, 6, rng.integers(1, MAX_NEW + 1)) for _ in rows]
        unread = np.array([rng.integers(0, len(response)) for response in responses])
        resumed.resume(rows, prompts, responses, unread)
        kept.append(resumed._caches[1].lengths[rows].sum())
        started.start(rows, prompts, responses=responses)
        for row, response in zip(rows, responses, strict=True):
            assert (resumed.response(row) == response).all()
            assert (resumed.writers(row) == 0).all()
        if rng.random() < 0.7:
            found, wanted = (asked(session, rows, responses, unread) for session in sessions)
            for own, other in zip(found[0], wanted[0], strict=True):
                assert (own == other).all()
            torch.testing.assert_close(found[1], wanted[1], atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[2].hidden, wanted[2].hidden, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found[2].logits, wanted[2].logits, atol=1e-4, rtol=1e-4)
            assert (found[2].host_since_llm == wanted[2].host_since_llm).all()
        going = [i for i, response in enumerate(responses) if len(response) < MAX_NEW]
        if going and rng.random() < 0.5:
            actions = rng.integers(0, 2, len(going))
            tokens = [session.step(rows[going], actions).tokens for session in sessions]
            assert (tokens[0] == tokens[1]).all()
    assert np.count_nonzero(kept) > 15, "next to nothing was gone on with"


def test_what_was_read_is_not_read_again(tiny_pool):
    session = TeacherSession(tiny_pool, 1, MAX_NEW)
    row, response = np.array([0]), np.array([4, 5, 4, 5, 4])
    session.resume(row, PROMPTS[:1], [response])
    asked(session, row, [response], [0])
    read = [cache.lengths[0] for cache in session._caches]
    assert read == [len(PROMPTS[0]) + 5, len(PROMPTS[0]) + 4]
    session.resume(row, PROMPTS[:1], [np.array([4, 5, 4, 7])])
    # the last token that is shared is read again, for what follows it
    assert [cache.lengths[0] for cache in session._caches] == [len(PROMPTS[0]) + 2] * 2
    session.resume(row, PROMPTS[:1], [np.array([4, 5, 4, 7])], unread=np.array([1]))
    assert session._caches[1].lengths[0] == len(PROMPTS[0])
    session.resume(row, PROMPTS[:1], [response], afresh=np.array([True]))
    assert [cache.lengths[0] for cache in session._caches] == [0, 0]
    session.resume(row, PROMPTS[1:], [response])
    assert [cache.lengths[0] for cache in session._caches] == [0, 0]
