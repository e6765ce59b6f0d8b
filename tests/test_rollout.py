"""One queue of episodes: which row serves what, and when; and one model that answers by itself."""

import gymnasium as gym
import numpy as np
import pytest

from agents.common.episode_queue import EpisodeQueue
from agents.common.rollout import Scheduling, decode, decode_alone
from agents.heuristics import Always
from envs.costs import COLUMNS, READ, SECONDS
from envs.decoding.sampling import Sampling
from envs.models.loading import embedded_pool, load_model
from envs.models.pool import ModelPool
from envs.tasks.task import Example


def started_by(rows, items):
    log = []
    queue = EpisodeQueue(np.array(rows), items, lambda r, i: log.append((r.tolist(), i.tolist())))
    return queue, log


def test_free_rows_take_items_in_order_and_end_for_the_next_ones():
    queue, log = started_by([4, 5, 6], 6)
    assert queue.fill().tolist() == [4, 5, 6]
    assert queue.fill().tolist() == []
    queue.end(np.array([6, 4]))
    assert queue.busy.tolist() == [5]
    assert queue.fill().tolist() == [4, 6]
    assert queue.busy.tolist() == [4, 5, 6]
    assert [queue.item(row) for row in (4, 5, 6)] == [3, 1, 4]
    queue.end(queue.busy)
    assert queue.fill().tolist() == [4]
    assert queue.item(4) == 5
    queue.end(queue.busy)
    assert queue.fill().tolist() == queue.busy.tolist() == []
    assert log == [([4, 5, 6], [0, 1, 2]), ([4, 6], [3, 4]), ([4], [5])]


@pytest.mark.parametrize("items", [0, 1, 2, 3, 17])
def test_every_item_is_served_once_whatever_ends_when(items):
    rng = np.random.default_rng(items)
    queue, log = started_by([0, 1, 2], items)
    ended = []
    while len(queue.fill()) or len(queue.busy):
        assert (np.diff(queue.busy) > 0).all()
        assert len(queue.busy) == min(3, items - len(ended))
        done = queue.busy[rng.random(len(queue.busy)) < 0.5]
        ended += [queue.item(row) for row in done]
        queue.end(done)
    assert sorted(ended) == list(range(items))
    assert [item for _, taken in log for item in taken] == list(range(items))


# -- one model --------------------------------------------------------------------------------------------------------


def unmeasured(ledger):
    """A ledger, (..., COLUMNS), without the seconds, which differ from run to run."""
    return np.delete(ledger, SECONDS, axis=-1)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_the_llm_alone_does_what_it_does_where_it_writes_everything(sampling, pool, task):
    examples = task.examples("test", 9)
    settings = {"max_new_tokens": 40, "scheduling": Scheduling(rows=4), "sampling": sampling, "seed": 3}
    routed = decode(pool, task, examples, Always(slm=False), **settings)
    alone = decode_alone(pool.models[-1], task, examples, pool=pool, **settings)
    assert 0 < sum(episode.terminated for episode in routed) < 9
    for one, other in zip(alone, routed, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_array_equal(one.writers, other.writers)
        assert (one.correct, one.terminated) == (other.correct, other.terminated)
        np.testing.assert_array_equal(unmeasured(one.ledger[-1]), unmeasured(other.ledger[-1]))
        assert not one.ledger[:-1].any()
        assert not one.decisions.any()


def test_the_slm_alone_reads_what_it_must(pool, task):
    """It leaves the last state of a response that was cut off unread, which is read where somebody may look at it."""
    examples = task.examples("test", 9)
    observed = decode(pool, task, examples, Always(slm=True), max_new_tokens=40, scheduling=Scheduling(rows=4))
    alone = decode_alone(pool.slm, task, examples, max_new_tokens=40, scheduling=Scheduling(rows=4))
    for one, other in zip(alone, observed, strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        assert one.ledger.shape == (1, COLUMNS)
        assert other.ledger[0, READ] - one.ledger[0, READ] == (not one.terminated)


@pytest.mark.parametrize("name", ["llama", "gpt2", "three"])
def test_any_model_of_a_pool_answers_alone(name, pools, task):
    pool, examples = pools[name], [Example("short", "1+1=", "2", "2")] * 3
    for number, model in enumerate(pool.models):
        episodes = decode_alone(model, task, examples, max_new_tokens=12, pool=pool)
        assert all((episode.writers == number).all() for episode in episodes)
        assert all(episode.ledger[:, READ].nonzero()[0].tolist() == [number] for episode in episodes)
        # by itself it writes what it does in the pool, whose models share tokens and ends
        np.testing.assert_array_equal(decode_alone(model, task, examples, 12)[0].tokens, episodes[0].tokens)


def test_one_model_is_loaded_and_answers_but_is_nothing_to_route_among(pool, task):
    model = load_model("embedded/slm", dtype="float32", verbose=False)
    assert model.fingerprint == pool.slm.fingerprint
    [own], [pooled] = (decode_alone(m, task, task.examples("test", 1), 40) for m in (model, pool.slm))
    np.testing.assert_array_equal(own.tokens, pooled.tokens)
    alone = ModelPool([model])
    for name in ("TokenRouting", "TreeRouting", "ShortcutRouting"):
        with pytest.raises(ValueError, match="a pool needs at least two models, the SLM first; it has embedded/slm"):
            gym.make(f"citer/{name}-v1", pool=alone, task=task)
    with pytest.raises(ValueError, match="embedded/slm is not of the pool"):
        decode_alone(model, task, task.examples("test", 1), pool=embedded_pool())
    with pytest.raises(ValueError, match="it has none"):
        ModelPool([])
    with pytest.raises(ValueError, match="no examples"):
        decode_alone(model, task, [])
