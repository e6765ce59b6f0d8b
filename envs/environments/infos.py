"""Infos of rows as Gymnasium has them: scalars of one row, or arrays over all rows, each with its mask."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from envs.arrays import IntArray
from envs.environments.episodes import Info


def scalars(info: Info) -> Info:
    """The infos of one row out of arrays of one."""
    return {key: value[0].item() if isinstance(value[0], np.generic) else value[0] for key, value in info.items()}


def part(info: Mapping[str, Any], rows: IntArray) -> Info:
    """The infos of some rows out of those of all."""
    return {key: value[rows] for key, value in info.items()}


def all_masked(info: Info) -> Info:
    """Vector infos in which every row has a value."""
    masks = {f"_{key}": np.ones(len(value), dtype=bool) for key, value in info.items()}
    return info | masks


def masked(info: Info, rows: IntArray, num_envs: int, infos: Info | None = None) -> Info:
    """Vector infos, added to `infos`: values of `rows`, each key with its mask, as Gymnasium has them."""
    infos = {} if infos is None else infos
    for key, value in info.items() if len(rows) else ():
        empty = np.full(num_envs, None if value.dtype == object else 0, dtype=value.dtype)
        whole = infos.setdefault(key, empty)
        mask = infos.setdefault(f"_{key}", np.zeros(num_envs, dtype=bool))
        whole[rows], mask[rows] = value, True
    return infos
