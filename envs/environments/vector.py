"""What vector environments share: the seeding of their rows, and infos as Gymnasium lays them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium.utils import seeding

from envs.arrays import IntArray

Info = dict[str, Any]


def row_generators(
    seed: int | Sequence[int | None] | None, rows: int, before: list[np.random.Generator]
) -> list[np.random.Generator]:
    """A generator for each row: from `seed + i` or `seed[i]`; without a seed those there were before, or new ones."""
    seeds = [seed + row for row in range(rows)] if isinstance(seed, int) else seed
    if seeds is None:
        return before or [seeding.np_random()[0] for _ in range(rows)]
    if len(seeds) != rows:
        raise ValueError(f"seed holds {len(seeds)} seeds for {rows} environments")
    return [seeding.np_random(row_seed)[0] for row_seed in seeds]


def scalars(info: Info) -> Info:
    """The infos of one row out of arrays of one."""
    return {key: value[0].item() if isinstance(value[0], np.generic) else value[0] for key, value in info.items()}


def all_masked(info: Info) -> Info:
    """Vector infos in which every row has a value."""
    masks = {f"_{key}": np.ones(len(value), dtype=bool) for key, value in info.items()}
    return info | masks


def masked(info: Info, rows: IntArray, num_envs: int, infos: Info | None = None) -> Info:
    """Vector infos, added to `infos`: values of `rows`, each key with its mask, as Gymnasium has them."""
    infos = {} if infos is None else infos
    for key, value in info.items():
        empty = np.full(num_envs, None if value.dtype == object else 0, dtype=value.dtype)
        whole = infos.setdefault(key, empty)
        mask = infos.setdefault(f"_{key}", np.zeros(num_envs, dtype=bool))
        whole[rows], mask[rows] = value, True
    return infos
