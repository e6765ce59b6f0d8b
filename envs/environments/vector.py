"""The two shells over rows of episodes: a Gymnasium environment of one row, and a vector environment of many."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.environments.episodes import EpisodeRows, Info, asked_for


class EpisodeEnv(gym.Env[np.ndarray, int]):
    """One row of episodes as an environment.

    Args:
        episodes: the row.
        render_mode: one of the class's `metadata["render_modes"]`, or None.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": []}  # type: ignore[misc]

    def __init__(self, episodes: EpisodeRows, render_mode: str | None = None) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.episodes = episodes
        self.observation_space = episodes.observation_space
        self.action_space = episodes.action_space  # type: ignore[assignment]
        self.render_mode = render_mode

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        super().reset(seed=None if seed is None else operator.index(seed))
        given = asked_for(options, self.episodes.option)
        info = self.episodes.start(self.episodes.all_rows, [self.np_random], [given])
        return self.episodes.observe(self.episodes.all_rows)[0], scalars(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        step = self.episodes.step(self.episodes.all_rows, np.array([action]))
        observation = self.episodes.observe(self.episodes.all_rows)[0]
        terminated, truncated = bool(step.terminated[0]), bool(step.truncated[0])
        info = step.infos | step.finals if terminated or truncated else step.infos
        return observation, float(step.rewards[0]), terminated, truncated, scalars(info)

    def render(self) -> str | None:
        return None if self.render_mode is None else self.episodes.render(0)


class EpisodeVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Rows of episodes as a vector environment.

    Autoreset mode: same step. A row that ends is given its next episode at once; the last observation and info stand
    in `final_obs` and `final_info`, the infos of the new episode's reset in their place. Row i, seeded with
    `row_seeds(seed, num_envs)[i]` (or `seed[i]`), goes through the same episodes as a single environment seeded so and
    given the same actions.

    Args:
        episodes: the rows.
        render_mode: one of the class's `metadata["render_modes"]`, or None.
    """

    metadata: ClassVar[dict[str, Any]] = {  # type: ignore[misc]
        "render_modes": [],
        "autoreset_mode": AutoresetMode.SAME_STEP,
    }

    def __init__(self, episodes: EpisodeRows, render_mode: str | None = None) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.num_envs, self.episodes = episodes.rows, episodes
        self.single_observation_space = episodes.observation_space
        self.single_action_space = episodes.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = render_mode
        self._generators: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Info | None = None
    ) -> tuple[np.ndarray, Info]:
        self._generators = row_generators(seed, self.num_envs, self._generators)
        option = self.episodes.row_option
        given = asked_for(options, option)
        if given is None or not len(given):
            given = [None] * self.num_envs
        if len(given) != self.num_envs:
            raise ValueError(f"options[{option!r}] holds {len(given)} {option} for {self.num_envs} environments")
        rows = self.episodes.all_rows
        info = self.episodes.start(rows, self._generators, given)
        return self.episodes.observe(rows), all_masked(info)

    def step(self, actions: npt.NDArray[Any]) -> tuple[np.ndarray, FloatArray, BoolArray, BoolArray, Info]:
        rows = self.episodes.all_rows
        step = self.episodes.step(rows, np.asarray(actions))
        over = step.terminated | step.truncated
        ended = np.flatnonzero(over)
        if not len(ended):
            return self.episodes.observe(rows), step.rewards, step.terminated, step.truncated, all_masked(step.infos)
        going_on = np.flatnonzero(~over)
        infos = masked(part(step.infos, going_on), going_on, self.num_envs)
        last = np.full(self.num_envs, None, dtype=object)
        for row, observation in zip(ended, self.episodes.observe(ended), strict=True):
            last[row] = observation
        whole = part(step.infos, ended) | step.finals
        infos |= {"final_obs": last, "_final_obs": over.copy()}
        infos |= {"final_info": masked(whole, ended, self.num_envs), "_final_info": over.copy()}
        started = self.episodes.start(ended, [self._generators[row] for row in ended], [None] * len(ended))
        infos = masked(started, ended, self.num_envs, infos)
        return self.episodes.observe(rows), step.rewards, step.terminated, step.truncated, infos

    def render(self) -> tuple[str, ...] | None:
        if self.render_mode is None:
            return None
        return tuple(self.episodes.render(row) for row in range(self.num_envs))


def check_render_mode(render_mode: str | None, known: Sequence[str]) -> None:
    """Refuse a render mode that does not exist."""
    if render_mode is not None and render_mode not in known:
        choice = " or ".join([*(repr(mode) for mode in known), "None"])
        raise ValueError(f"unknown render_mode {render_mode!r}; choose {choice}")


def row_seeds(seed: int, num_envs: int) -> list[int]:
    """The seeds of the rows of a vector environment that is reset with `seed`: streams of their own for every seed.

    A single environment that is reset with the seed of row i goes through the episodes of that row, and so does
    `gymnasium.vector.SyncVectorEnv`, reset with the list. Spawned by `numpy.random.SeedSequence`: with `seed + i` two
    neighbouring seeds would share all rows but one.

    Raises:
        ValueError: the seed is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, is {seed}")
    children = np.random.SeedSequence(seed).spawn(num_envs)
    # within 63 bits, so that they fit arrays of integers
    return [int(child.generate_state(1, np.uint64)[0] >> np.uint64(1)) for child in children]


def row_generators(
    seed: int | Sequence[int | None] | None, rows: int, before: list[np.random.Generator]
) -> list[np.random.Generator]:
    """A generator for each row: from `row_seeds` or `seed[i]`; the one there was before, or a new one, without."""
    if seed is None:
        seeds: Sequence[int | None] = [None] * rows
    else:
        seeds = row_seeds(int(seed), rows) if isinstance(seed, int | np.integer) else seed
    if len(seeds) != rows:
        raise ValueError(f"seed holds {len(seeds)} seeds for {rows} environments")
    kept = before or [seeding.np_random()[0] for _ in range(rows)]
    return [
        generator if row_seed is None else seeding.np_random(operator.index(row_seed))[0]
        for generator, row_seed in zip(kept, seeds, strict=True)
    ]


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
    for key, value in info.items():
        empty = np.full(num_envs, None if value.dtype == object else 0, dtype=value.dtype)
        whole = infos.setdefault(key, empty)
        mask = infos.setdefault(f"_{key}", np.zeros(num_envs, dtype=bool))
        whole[rows], mask[rows] = value, True
    return infos
