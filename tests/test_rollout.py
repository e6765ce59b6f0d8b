"""One queue of episodes: which row serves what, and when."""

import numpy as np
import pytest

from agents.common.episode_queue import EpisodeQueue


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
