"""Between Stable-Baselines3 and the environments: rows as its VecEnv, inputs standardised, logs as rows of numbers."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices
from torch import Tensor
from tqdm import tqdm

from agents.policy import Track
from agents.sb3_policy import CostWeights
from envs.cache import IntArray
from envs.costs import FloatArray
from envs.steps import BoolArray

Info = dict[str, Any]
FloatRows = npt.NDArray[np.float32]
# A few coordinates of a hidden state stray far; beyond so many deviations they say nothing more.
CLIP = 10.0


class VectorEnvBridge(VecEnv):
    """A Gymnasium `VectorEnv` of same-step autoreset as a VecEnv of Stable-Baselines3.

    An ended row's info holds `terminal_observation`, `TimeLimit.truncated`, `episode` (`r`, `l`, `t`: return, steps
    and seconds since the environment was made) and, where the environment judges answers, `is_success`.

    With `weights` the agent is told what cost weight it plays for: every episode draws one, its scaled logarithm is the
    last number of the observation, and `weight x info["cost"]` is taken from the reward, so that the environment should
    take nothing itself.

    The environment runs with as many threads as there were when it was wrapped, whatever the agent learns with.

    Args:
        environment: steps all rows at once.
        weights: a range to draw cost weights from.
        bootstrap: say that a truncated response was cut short, so that what would have come is estimated; where False
            it counts as ended.

    Raises:
        ValueError: the environment resets in another mode, or its spaces are others than Box of one axis and Discrete.
    """

    def __init__(self, environment: VectorEnv, weights: CostWeights | None = None, bootstrap: bool = True) -> None:
        mode = environment.metadata.get("autoreset_mode")
        if mode != AutoresetMode.SAME_STEP:
            raise ValueError(f"{type(environment).__name__} has autoreset mode {mode}; the bridge needs SAME_STEP")
        seen, actions = environment.single_observation_space, environment.single_action_space
        if not isinstance(seen, gym.spaces.Box) or len(seen.shape) != 1 or not isinstance(actions, gym.spaces.Discrete):
            raise ValueError(f"the bridge needs a Box of one axis and a Discrete; the spaces are {seen} and {actions}")
        self.environment, self.weights, self.bootstrap = environment, weights, bootstrap
        if weights is not None:
            seen = gym.spaces.Box(np.append(seen.low, np.float32(-1)), np.append(seen.high, np.float32(1)))
        super().__init__(environment.num_envs, seen, actions)
        rows, self._width = self.num_envs, seen.shape[0]
        self._actions: IntArray = np.zeros(rows, dtype=np.int64)
        self._returns, self._lengths = np.zeros(rows), np.zeros(rows, dtype=np.int64)
        self._weights = np.ones(rows)
        self._generators = [np.random.default_rng() for _ in range(rows)] if weights is not None else []
        self._examples: npt.NDArray[Any] = np.full(rows, None)
        self._made, self._threads = time.perf_counter(), torch.get_num_threads()

    def reset(self) -> FloatRows:
        seeds = None if self._seeds[0] is None else list(self._seeds)
        if seeds is not None and self.weights is not None:
            # another stream than the environment's, which is seeded with the same numbers
            self._generators = [np.random.default_rng([1, seed or 0]) for seed in seeds]
        with threads(self._threads):
            observations, infos = self.environment.reset(seed=seeds)  # type: ignore[arg-type]
        self._reset_seeds()
        self._returns[:], self._lengths[:] = 0, 0
        self._examples = infos.get("example", self._examples)
        self._draw_weights(np.arange(self.num_envs))
        return self._seen(observations, self._weights)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[FloatRows, FloatRows, BoolArray, list[Info]]:
        with threads(self._threads):
            observations, rewards, terminated, truncated, infos = self.environment.step(self._actions)
        ended = np.asarray(terminated | truncated)
        rows = np.flatnonzero(ended)
        rewards = np.array(rewards, dtype=np.float64)
        if self.weights is not None:
            rewards -= self._weights * self._costs(infos, ended)
        self._check_finite(rewards, "a reward")
        self._returns += rewards
        self._lengths += 1
        row_infos: list[Info] = [{} for _ in range(self.num_envs)]
        if len(rows):
            self._fill(row_infos, rows, infos, np.asarray(truncated & ~terminated))
            self._draw_weights(rows)
        return self._seen(observations, self._weights), rewards.astype(np.float32), ended, row_infos

    def _fill(self, row_infos: list[Info], rows: IntArray, infos: Info, cut: BoolArray) -> None:
        """The infos of ended rows; then their counts begin anew."""
        seconds = time.perf_counter() - self._made
        final = self._seen(np.stack([infos["final_obs"][row] for row in rows]), self._weights[rows], rows)
        correct = infos.get("final_info", {}).get("correct")
        for row, observation in zip(rows.tolist(), final, strict=True):
            row_infos[row] = {
                "terminal_observation": observation,
                "TimeLimit.truncated": bool(cut[row]) and self.bootstrap,
                "episode": {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": seconds},
            }
            if correct is not None:
                row_infos[row]["is_success"] = bool(correct[row])
        self._returns[rows], self._lengths[rows] = 0, 0
        if "_example" in infos:
            self._examples = np.where(infos["_example"], infos["example"], self._examples)

    def _costs(self, infos: Info, ended: BoolArray) -> FloatArray:
        """Costs of the step, (rows,): those of ended rows stand in their final infos."""
        costs = np.zeros(self.num_envs)
        try:
            if not ended.all():
                costs[~ended] = infos["cost"][~ended]
            if ended.any():
                costs[ended] = infos["final_info"]["cost"][ended]
        except KeyError as error:
            name = type(self.environment).__name__
            raise ValueError(f"{name} reports no info {error}: it cannot train a conditioned policy") from error
        self._check_finite(costs, "a cost")
        return costs

    def _draw_weights(self, rows: IntArray) -> None:
        if self.weights is not None:
            self._weights[rows] = [self.weights.draw(self._generators[row]) for row in rows]

    def _seen(self, observations: npt.NDArray[Any], weights: FloatArray, rows: IntArray | None = None) -> FloatRows:
        """A copy of observations (n, width), with the weight where there is one: the environment may reuse its own."""
        seen = np.empty((len(observations), self._width), dtype=np.float32)
        seen[:, : observations.shape[1]] = observations
        if self.weights is not None:
            seen[:, -1] = self.weights.scaled(weights)
        self._check_finite(seen, "an observation", rows)
        return seen

    def _check_finite(self, values: npt.NDArray[Any], what: str, rows: IntArray | None = None) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            first = np.argwhere(~finite)[0]
            row = int(first[0] if rows is None else rows[first[0]])
            raise FloatingPointError(
                f"row {row} of {type(self.environment).__name__} has {what} of {values[tuple(first)]}, on example "
                f"{self._examples[row]}; look at its models and its reward"
            )

    def close(self) -> None:
        self.environment.close()

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        return [getattr(self.environment, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        raise NotImplementedError("rows share one environment: set the attribute on it before it is wrapped")

    def env_method(self, method_name: str, *args: Any, indices: VecEnvIndices = None, **kwargs: Any) -> list[Any]:
        raise NotImplementedError("rows share one environment: call its method")

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class Standardised(BaseFeaturesExtractor):
    """Inputs less their mean, over their deviation, clipped.

    Hidden states are not of unit scale, and their coordinates differ by orders of magnitude. The statistics are fixed
    before training and are part of the weights, so that a saved policy needs nothing beside them.

    Args:
        observation_space: of one axis.
        mean: (width,).
        deviation: (width,).
    """

    mean: Tensor  # (width,)
    scale: Tensor  # (width,)

    def __init__(
        self, observation_space: gym.spaces.Box, mean: Tensor | None = None, deviation: Tensor | None = None
    ) -> None:
        width = observation_space.shape[0]
        super().__init__(observation_space, width)
        self.register_buffer("mean", torch.zeros(width) if mean is None else mean.clone())
        self.register_buffer("scale", torch.ones(width) if deviation is None else deviation.clamp(min=1e-4))

    def forward(self, observations: Tensor) -> Tensor:
        """Inputs (n, width) on a unit scale, (n, width)."""
        return ((observations - self.mean) / self.scale).clamp(-CLIP, CLIP)


def input_statistics(bridge: VectorEnvBridge, slm_share: float, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """Mean and deviation of what is observed, (width,) each.

    Args:
        bridge: is seeded, and left somewhere in its episodes.
        slm_share: share of the tokens the SLM writes, at random.
        steps: steps of each row.
        seed: of the environment and of the choices.
    """
    assert isinstance(bridge.action_space, gym.spaces.Discrete)
    models, rng = int(bridge.action_space.n), np.random.default_rng(seed)
    bridge.seed(seed)
    seen = bridge.reset()
    count, total, squares = 0, np.zeros(seen.shape[1]), np.zeros(seen.shape[1])
    for _ in range(steps):
        count, wide = count + len(seen), seen.astype(np.float64)
        total, squares = total + wide.sum(0), squares + (wide**2).sum(0)
        others = rng.integers(1, models, size=len(seen)) if models > 1 else np.zeros(len(seen), dtype=np.int64)
        seen = bridge.step(np.where(rng.random(len(seen)) < slm_share, 0, others))[0]  # type: ignore[assignment]
    mean = total / count
    deviation = np.sqrt((squares / count - mean**2).clip(min=0))
    if bridge.weights is not None:  # it is on a unit scale as it is
        mean[-1], deviation[-1] = 0, 1
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()


class _Rowwise:
    """Explores row by row.

    Stable-Baselines3 tosses one coin for all rows: with a thousand of them a few steps would be random for all, and
    most for none.
    """

    policy: Any
    action_space: Any
    exploration_rate: float

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[Any, Any]:
        """Actions (rows,), greedy where `deterministic`."""
        actions, state = self.policy.predict(observation, state, episode_start, deterministic=True)
        if not deterministic:
            rng = self.action_space.np_random
            explores = rng.random(np.shape(actions)) < self.exploration_rate
            actions = np.where(explores, rng.integers(self.action_space.n, size=np.shape(actions)), actions)
        return actions, state


class RowwiseDQN(_Rowwise, DQN):
    """DQN (Mnih et al. 2015) of Stable-Baselines3, exploring row by row."""


class RowwiseQRDQN(_Rowwise, QRDQN):
    """QR-DQN (Dabney et al. 2018) of sb3-contrib, exploring row by row."""


class Rows(KVWriter):
    """Reports every dump of Stable-Baselines3's logger as a row of numbers.

    Args:
        track: receives the rows.
        run: names the run in them.
    """

    def __init__(self, track: Track, run: str) -> None:
        self.track, self.run = track, run

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Report the numbers that are finite; an explained variance of constant returns is not.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        numbers = {key: float(value) for key, value in key_values.items() if isinstance(value, int | float | np.number)}
        for key, value in numbers.items():
            if "loss" in key and not math.isfinite(value):
                raise FloatingPointError(f"{self.run}: {key} is {value} after {step} steps; lower lr")
        self.track({"run": self.run, **{key: value for key, value in numbers.items() if math.isfinite(value)}})

    def close(self) -> None:
        """Nothing to close."""


class Reporting(BaseCallback):
    """Dumps the log every `interval` steps and at the end, and moves a progress bar.

    Stable-Baselines3 counts iterations or episodes, of which a thousand rows end many at once; and it dumps before it
    trains, so that losses would be those of the iteration before.

    Args:
        interval: steps between dumps.
        progress: counts steps.
    """

    def __init__(self, interval: int, progress: tqdm[Any]) -> None:
        super().__init__()
        self.interval, self.progress, self._dumped = interval, progress, 0

    def _on_rollout_start(self) -> None:
        if self.model.num_timesteps - self._dumped >= self.interval:
            self._dump()

    def _on_step(self) -> bool:
        self.progress.update(self.training_env.num_envs)
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self._dumped:
            self._dump()

    def _dump(self) -> None:
        self._dumped = self.model.num_timesteps
        self.model.dump_logs()


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the global generators back where they were: Stable-Baselines3 seeds and draws from all of them."""
    plain, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(plain)
            np.random.set_state(legacy)  # noqa: NPY002


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
