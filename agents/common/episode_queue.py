"""Which rows of a session are free, which are busy, and what each serves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from envs.arrays import IntArray

Start = Callable[[IntArray, IntArray], object]
"""Starts items, (n,), in rows, (n,)."""


class EpisodeQueue:
    """Items that wait for a row, in order, and the rows that serve them.

    Free rows are filled by rising number, and rows that end are free for the next items, so that the same rows hold the
    same items in every run: passes then hold the same sequences in the same order.

    Args:
        rows: rows of a session to fill, distinct and rising, (n,).
        items: how many items wait; they are numbered in the order in which they are taken.
        start: called with the rows that are filled and their new items.
    """

    def __init__(self, rows: IntArray, items: int, start: Start) -> None:
        self.rows, self.items, self._start = np.asarray(rows), items, start
        self._free = self.rows
        self._taken = 0
        self._serving: IntArray = np.zeros(int(self.rows.max(initial=-1)) + 1, dtype=np.int64)
        self.busy: IntArray = np.zeros(0, dtype=np.int64)
        """Rows that serve an item, rising."""

    def fill(self) -> IntArray:
        """Start waiting items in the rows that are free; the rows that were filled, (m,)."""
        rows = self._free[: self.items - self._taken]
        if len(rows):
            items = np.arange(self._taken, self._taken + len(rows))
            self._start(rows, items)
            self._serving[rows] = items
            self._taken += len(rows)
            self._free = self._free[len(rows) :]
            self.busy = np.sort(np.concatenate([self.busy, rows]))
        return rows

    def item(self, row: int) -> int:
        """The number of the item that a row serves, or has served last."""
        return int(self._serving[row])

    def end(self, rows: IntArray) -> None:
        """Say that the items of some busy rows, (m,), are done; the rows are free."""
        self.busy = np.setdiff1d(self.busy, rows)
        self._free = np.union1d(self._free, rows)
