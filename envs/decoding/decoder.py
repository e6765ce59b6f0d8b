"""What every decoder checks before it decodes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from envs.arrays import BoolArray, IntArray
from envs.models.pool import ModelPool


def sequence_capacity(pool: ModelPool, max_new_tokens: int, capacity: int | None) -> int:
    """The longest sequence, the pool's where None; refused where responses or the models' positions do not fit."""
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, is {max_new_tokens}")
    if capacity is None:
        capacity = pool.capacity or pool.max_positions
    if not max_new_tokens < capacity <= pool.max_positions:
        raise ValueError(
            f"capacity {capacity} must exceed max_new_tokens {max_new_tokens} and stay within the models' "
            f"{pool.max_positions} positions; change capacity or lower max_new_tokens"
        )
    return capacity


def check_fit(name: str, prompt: IntArray, response: Sequence[int] | IntArray, capacity: int, new: int) -> None:
    """Refuse a prompt that leaves no room for `new` tokens within `capacity`, or a response longer than these."""
    room = capacity - new
    if not 1 <= len(prompt) <= room:
        raise ValueError(
            f"{name} has a prompt of {len(prompt)} tokens; the cache of {capacity} leaves room for 1 to {room} beside "
            f"{new} new: raise capacity, lower max_new_tokens or drop the example"
        )
    if len(response) > new:
        raise ValueError(
            f"{name} has a reference of {len(response)} tokens, max_new_tokens is {new}; raise it or drop the example"
        )


def checked_actions(actions: IntArray, count: int, models: int) -> IntArray:
    """Actions as integers, (count,); refused where they are not, or name no model."""
    actions = np.asarray(actions)
    whole = actions.shape == (count,) and actions.dtype.kind in "biu"
    if not whole or actions.min() < 0 or actions.max() >= models:
        raise ValueError(f"actions must be {count} integers in 0..{models - 1}; they are {actions.tolist()}")
    return actions.astype(np.int64)  # booleans would index as a mask


def check_followed(rows: IntArray, followed: BoolArray) -> None:
    """Refuse rows, (n,), that the SLM was released from; `followed` says it of every row of a session."""
    if not followed[rows].all():
        raise ValueError(
            f"the SLM was released from rows {rows[~followed[rows]].tolist()}; other models write them to their ends"
        )
