"""The two shells over rows of episodes: a Gymnasium environment of one row, and a vector environment of many."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from envs.arrays import BoolArray, FloatArray, IntArray
from envs.decoding.decoder import checked_actions
from envs.environments.episodes import EpisodeRows, Info, chosen_start, chosen_starts, reset_mask
from envs.environments.infos import all_masked, masked, part, scalars
from envs.environments.picture import picture
from envs.environments.render import ansi

Frame = str | npt.NDArray[np.uint8]
RENDERING = {"render_modes": ["ansi", "rgb_array"], "render_fps": 10}


class EpisodeEnv(gym.Env[np.ndarray, int]):
    """One row of episodes as an environment.

    A closed environment has given back its memory and can only be closed again.

    Args:
        episodes: the row.
        render_mode: one of the class's `metadata["render_modes"]`, or None.

    Raises:
        gymnasium.error.ResetNeeded: a step before the first reset, or after an episode's end.
        gymnasium.error.ClosedEnvironmentError: a call after `close`.
    """

    metadata: ClassVar[dict[str, Any]] = RENDERING  # type: ignore[misc]
    episodes: EpisodeRows

    def __init__(self, episodes: EpisodeRows, render_mode: str | None = None) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.episodes = episodes
        episodes.rendered = render_mode is not None
        self.observation_space = episodes.observation_space
        self.action_space = episodes.action_space  # type: ignore[assignment]
        self.render_mode = render_mode
        self._over = np.ones(1, dtype=bool)

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        check_open(self)
        super().reset(seed=None if seed is None else operator.index(seed))
        given = chosen_start(options, self.episodes.options)
        if seed is not None:
            self.episodes.begin_anew()
        info = self.episodes.start(self.episodes.all_rows, [self.np_random], [given])
        self._over[:] = False
        return self.episodes.observe(self.episodes.all_rows)[0], scalars(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        check_open(self)
        check_in_episode(self._over)
        step = self.episodes.step(self.episodes.all_rows, np.array([action]))
        self._over = step.terminated | step.truncated
        observation = self.episodes.observe(self.episodes.all_rows)[0]
        info = step.infos | step.finals if self._over[0] else step.infos
        return observation, float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), scalars(info)

    def render(self) -> Frame | None:
        check_open(self)
        return None if self.render_mode is None else frame(self.episodes, 0, self.render_mode)

    def close(self) -> None:
        """Give back the memory of the episodes; a prefix tree stays with whoever holds it."""
        vars(self).pop("episodes", None)


class EpisodeVectorEnv(VectorEnv[np.ndarray, np.ndarray, np.ndarray]):
    """Rows of episodes as a vector environment.

    `autoreset_mode` says when a row that ended is given its next episode:

    - `SameStep`: at once. The last observation and info stand in `final_obs` and `final_info`, the infos of the new
      episode's reset in their place.
    - `NextStep`: at the next step, which takes no action in that row, earns 0 and has the infos of a reset.
    - `Disabled`: when the user asks for it, by `reset(options={"reset_mask": rows})`.

    In each mode what comes out is that of `gymnasium.vector.SyncVectorEnv` over single environments: row i, seeded
    with `row_seeds(seed, num_envs)[i]` (or `seed[i]`), goes through the same episodes as a single environment seeded so
    and given the same actions. `options={"reset_mask": mask}` resets the rows where the mask, (num_envs,) of booleans,
    is true, and leaves the others in their episodes.

    Args:
        episodes: the rows.
        render_mode: one of the class's `metadata["render_modes"]`, or None.
        autoreset_mode: one of `gymnasium.vector.AutoresetMode`, or its name or value as a string.

    Raises:
        gymnasium.error.ResetNeeded: a step before the first reset, or of a row that has ended.
        gymnasium.error.ClosedEnvironmentError: a call after `close`.
    """

    metadata: ClassVar[dict[str, Any]] = RENDERING  # type: ignore[misc]
    episodes: EpisodeRows

    def __init__(
        self,
        episodes: EpisodeRows,
        render_mode: str | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
    ) -> None:
        check_render_mode(render_mode, self.metadata["render_modes"])
        self.autoreset_mode = autoreset_mode_of(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}  # type: ignore[misc]
        self.num_envs, self.episodes = episodes.rows, episodes
        episodes.rendered = render_mode is not None
        self.single_observation_space = episodes.observation_space
        self.single_action_space = episodes.action_space
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        self.render_mode = render_mode
        self._generators: list[np.random.Generator] = []
        self._over: BoolArray = np.ones(self.num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: Info | None = None
    ) -> tuple[np.ndarray, Info]:
        check_open(self)
        given = chosen_starts(options, self.episodes.row_options, self.num_envs)
        mask = reset_mask(options, self.num_envs)
        generators = row_generators(seed, self.num_envs, self._generators)
        if mask is None:
            rows, self._generators = self.episodes.all_rows, generators
            if seed is not None:
                self.episodes.begin_anew()
        else:
            if not self._generators:
                raise gym.error.ResetNeeded("reset_mask leaves rows without an episode; call reset for all rows first")
            rows = np.flatnonzero(mask)
            for row in rows:
                self._generators[row] = generators[row]
        info = self._start(rows, [given[row] for row in rows])
        infos = all_masked(info) if mask is None else masked(info, rows, self.num_envs)
        return self.episodes.observe(self.episodes.all_rows), infos

    def step(self, actions: npt.NDArray[Any]) -> tuple[np.ndarray, FloatArray, BoolArray, BoolArray, Info]:
        check_open(self)
        if self.autoreset_mode is AutoresetMode.NEXT_STEP and self._generators and self._over.any():
            return self._step_beside_starts(np.asarray(actions))
        check_in_episode(self._over)
        rows = self.episodes.all_rows
        step = self.episodes.step(rows, np.asarray(actions))
        over = step.terminated | step.truncated
        ended = np.flatnonzero(over)
        if not len(ended):
            return self.episodes.observe(rows), step.rewards, step.terminated, step.truncated, all_masked(step.infos)
        if self.autoreset_mode is not AutoresetMode.SAME_STEP:
            self._over = over
            infos = masked(step.finals, ended, self.num_envs, all_masked(step.infos))
            return self.episodes.observe(rows), step.rewards, step.terminated, step.truncated, infos
        going_on = np.flatnonzero(~over)
        infos = masked(part(step.infos, going_on), going_on, self.num_envs)
        last = np.full(self.num_envs, None, dtype=object)
        for row, observation in zip(ended, self.episodes.observe(ended), strict=True):
            last[row] = observation
        whole = part(step.infos, ended) | step.finals
        infos |= {"final_obs": last, "_final_obs": over.copy()}
        infos |= {"final_info": masked(whole, ended, self.num_envs), "_final_info": over.copy()}
        infos = masked(self._start(ended, [None] * len(ended)), ended, self.num_envs, infos)
        return self.episodes.observe(rows), step.rewards, step.terminated, step.truncated, infos

    def _step_beside_starts(
        self, actions: npt.NDArray[Any]
    ) -> tuple[np.ndarray, FloatArray, BoolArray, BoolArray, Info]:
        """A step of the rows in an episode, while those that ended begin their next one."""
        actions = checked_actions(actions, self.num_envs, int(self.episodes.action_space.n))
        going_on, starting = np.flatnonzero(~self._over), np.flatnonzero(self._over)
        rewards = np.zeros(self.num_envs)
        terminated, truncated = np.zeros((2, self.num_envs), dtype=bool)
        infos: Info = {}
        if len(going_on):
            step = self.episodes.step(going_on, actions[going_on])
            rewards[going_on] = step.rewards
            terminated[going_on], truncated[going_on] = step.terminated, step.truncated
            masked(step.infos, going_on, self.num_envs, infos)
            masked(step.finals, going_on[step.terminated | step.truncated], self.num_envs, infos)
        masked(self._start(starting, [None] * len(starting)), starting, self.num_envs, infos)
        self._over = terminated | truncated
        return self.episodes.observe(self.episodes.all_rows), rewards, terminated, truncated, infos

    def _start(self, rows: IntArray, given: Sequence[Any]) -> Info:
        info = self.episodes.start(rows, [self._generators[row] for row in rows], given)
        self._over[rows] = False
        return info

    def render(self) -> tuple[Frame, ...] | None:
        check_open(self)
        if self.render_mode is None:
            return None
        return tuple(frame(self.episodes, row, self.render_mode) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Give back the memory of the episodes; a prefix tree stays with whoever holds it."""
        vars(self).pop("episodes", None)


def frame(episodes: EpisodeRows, row: int, render_mode: str) -> Frame:
    """A row as text with colours, or as a picture."""
    stretches = episodes.stretches(row)
    return ansi(stretches) if render_mode == "ansi" else picture(stretches)


def check_open(environment: EpisodeEnv | EpisodeVectorEnv) -> None:
    """Refuse a call of an environment whose episodes are gone."""
    if "episodes" not in vars(environment):
        name = type(environment).__name__
        raise gym.error.ClosedEnvironmentError(f"this {name} is closed and has given back its memory; make a new one")


def check_in_episode(over: BoolArray) -> None:
    """Refuse a step of rows that have ended or not begun, (rows,)."""
    if over.any():
        which = "" if len(over) == 1 else f" of rows {np.flatnonzero(over).tolist()}"
        raise gym.error.ResetNeeded(f"the episode{which} has ended or was never begun; call reset before the next step")


def autoreset_mode_of(mode: AutoresetMode | str) -> AutoresetMode:
    """A mode by itself, its value (`NextStep`) or its name (`next_step`)."""
    for known in AutoresetMode:
        if mode is known or (isinstance(mode, str) and mode.lower() in (known.value.lower(), known.name.lower())):
            return known
    raise ValueError(
        f"unknown autoreset_mode {mode!r}; choose one of {', '.join(known.value for known in AutoresetMode)}"
    )


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
