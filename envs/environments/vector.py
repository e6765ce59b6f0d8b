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
from envs.environments.episodes import (
    EpisodeRows,
    Info,
    State,
    all_masked,
    chosen_start,
    chosen_starts,
    generator_numbers,
    generator_of,
    masked,
    part,
    reset_mask,
    scalars,
    without,
)
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
        self._over: BoolArray = np.ones(1, dtype=bool)
        self._begun = False

    def reset(self, *, seed: int | None = None, options: Info | None = None) -> tuple[np.ndarray, Info]:
        check_open(self)
        super().reset(seed=None if seed is None else operator.index(seed))
        given = chosen_start(options, self.episodes.options)
        if seed is not None:
            self.episodes.numbers.position = 0
        info = self.episodes.start(self.episodes.all_rows, [self.np_random], [given])
        self._over, self._begun = np.zeros(1, dtype=bool), True
        return self.episodes.observe(self.episodes.all_rows)[0], scalars(info)

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, Info]:
        check_open(self)
        check_in_episode(self._over)
        step = self.episodes.step(self.episodes.all_rows, np.array([action]))
        self._over = step.terminated | step.truncated
        observation = self.episodes.observe(self.episodes.all_rows)[0]
        info = step.infos | step.finals if self._over[0] else step.infos
        return observation, float(step.rewards[0]), bool(step.terminated[0]), bool(step.truncated[0]), scalars(info)

    def get_state(self) -> State:
        """Where the episode stands, in numbers: tokens, costs, the generator; for `set_state`.

        Raises:
            gymnasium.error.ResetNeeded: there was no reset.
        """
        check_open(self)
        if not self._begun:
            raise gym.error.ResetNeeded("there is no episode whose state could be kept; call reset first")
        return {
            "episodes": self.episodes.state(self.episodes.all_rows),
            "position": np.array(self.episodes.numbers.position),
            "over": self._over.copy(),
            "generators": generator_numbers(self.np_random)[None],
        }

    def set_state(self, state: State) -> None:
        """Go on from a state that `get_state` gave, of this environment or of one made with the same arguments.

        Restored, the same actions lead to the same steps as they did from there.
        """
        check_open(self)
        self.np_random = generator_of(state["generators"][0])
        self.episodes.restore(self.episodes.all_rows, state["episodes"], [self.np_random])
        self.episodes.numbers.position = int(state["position"])
        self._over, self._begun = state["over"].copy(), True

    def __reduce__(self) -> tuple[Any, ...]:
        """How an environment is copied, and travels to another process: as what it was made with, and its state."""
        return rebuilt, recipe(self, render_mode=self.render_mode)

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
                self.episodes.numbers.position = 0
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
        infos = {} if over.all() else without(step.infos, ended)
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

    def get_state(self, rows: IntArray | None = None) -> State:
        """Where rows, (n,), all of them where None, stand, in numbers; see `EpisodeEnv.get_state`."""
        check_open(self)
        if not self._generators:
            raise gym.error.ResetNeeded("there are no episodes whose states could be kept; call reset first")
        rows = self.episodes.all_rows if rows is None else np.asarray(rows, dtype=np.int64)
        return {
            "episodes": self.episodes.state(rows),
            "position": np.array(self.episodes.numbers.position),
            "over": self._over[rows],
            "generators": np.stack([generator_numbers(self._generators[row]) for row in rows]),
        }

    def set_state(self, state: State, rows: IntArray | None = None) -> None:
        """Let rows, (n,), all of them where None, stand where the n rows of a state stood; see `EpisodeEnv.set_state`.

        The pass over the examples, which rows share, is taken from the state where all rows are restored.

        Raises:
            ValueError: the state is of another number of rows.
        """
        check_open(self)
        whole = rows is None
        rows = self.episodes.all_rows if rows is None else np.asarray(rows, dtype=np.int64)
        if len(state["over"]) != len(rows):
            raise ValueError(f"the state is of {len(state['over'])} rows, to be restored in {len(rows)}")
        if not whole and not self._generators:
            raise gym.error.ResetNeeded("other rows have no episode; call reset first")
        generators = [generator_of(numbers) for numbers in state["generators"]]
        self._generators = self._generators or generators
        for row, generator in zip(rows, generators, strict=True):
            self._generators[row] = generator
        self.episodes.restore(rows, state["episodes"], generators)
        self._over[rows] = state["over"]
        if whole:
            self.episodes.numbers.position = int(state["position"])

    def __reduce__(self) -> tuple[Any, ...]:
        """How an environment is copied, and travels to another process; see `EpisodeEnv`."""
        shell = {"num_envs": self.num_envs, "autoreset_mode": self.autoreset_mode.value}
        return rebuilt, recipe(self, render_mode=self.render_mode, **shell)

    def render(self) -> tuple[Frame, ...] | None:
        check_open(self)
        if self.render_mode is None:
            return None
        return tuple(frame(self.episodes, row, self.render_mode) for row in range(self.num_envs))

    def close_extras(self, **kwargs: Any) -> None:
        """Give back the memory of the episodes; a prefix tree stays with whoever holds it."""
        vars(self).pop("episodes", None)


def recipe(environment: EpisodeEnv | EpisodeVectorEnv, **shell: Any) -> tuple[Any, ...]:
    """What `rebuilt` makes a copy of an environment of: class, keywords, state, and what Gymnasium has set on it."""
    check_open(environment)
    begun = environment._begun if isinstance(environment, EpisodeEnv) else bool(environment._generators)
    state = environment.get_state() if begun else None
    kept = {name: vars(environment)[name] for name in ("spec", "_np_random_seed") if name in vars(environment)}
    return type(environment), shell | environment.episodes.arguments(), state, kept


def rebuilt(
    kind: type[EpisodeEnv | EpisodeVectorEnv], arguments: dict[str, Any], state: State | None, kept: dict[str, Any]
) -> EpisodeEnv | EpisodeVectorEnv:
    """An environment out of its `recipe`."""
    environment: EpisodeEnv | EpisodeVectorEnv = kind(**arguments)
    if state is not None:
        environment.set_state(state)
    vars(environment).update(kept)
    return environment


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
