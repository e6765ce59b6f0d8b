"""A vector environment of Gymnasium as the VecEnv of Stable-Baselines3."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices

from agents.rl.cost_weights import CostWeights
from envs.arrays import BoolArray, FloatArray, IntArray
from envs.environments.episodes import generator_numbers, generator_of
from envs.environments.vector import row_seeds

Info = dict[str, Any]
FloatRows = npt.NDArray[np.float32]


class VectorEnvBridge(VecEnv):
    """A Gymnasium `VectorEnv` of same-step autoreset as a VecEnv of Stable-Baselines3.

    An ended row's info holds `terminal_observation`, `TimeLimit.truncated`, `episode` (`r`, `l`, `t`: return, steps
    and seconds since the environment was made) and, where the environment judges answers, `is_success`.

    With `weights` the agent is told what cost weight it plays for: every episode draws one, its scaled logarithm is the
    last number of the observation, and `weight x info["cost"]` is taken from the reward, so that the environment should
    take nothing itself.

    The environment runs with as many threads as there were when it was wrapped (`threads`), whatever the agent learns
    with.

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
        observed, actions = environment.single_observation_space, environment.single_action_space
        if (
            not isinstance(observed, gym.spaces.Box)
            or len(observed.shape) != 1
            or not isinstance(actions, gym.spaces.Discrete)
        ):
            raise ValueError(
                f"the bridge needs a Box of one axis and a Discrete; the spaces are {observed} and {actions}"
            )
        self.environment, self.weights, self.bootstrap = environment, weights, bootstrap
        if weights is not None:
            observed = gym.spaces.Box(np.append(observed.low, np.float32(-1)), np.append(observed.high, np.float32(1)))
        super().__init__(environment.num_envs, observed, actions)
        rows, self._width = self.num_envs, observed.shape[0]
        self._actions: IntArray = np.zeros(rows, dtype=np.int64)
        self._returns, self._lengths = np.zeros(rows), np.zeros(rows, dtype=np.int64)
        self._weights = np.ones(rows)
        self._generators = [np.random.default_rng() for _ in range(rows)] if weights is not None else []
        self._examples: npt.NDArray[Any] = np.full(rows, None)
        self._made, self.threads = time.perf_counter(), torch.get_num_threads()

    def seed(self, seed: int | None = None) -> list[int | None]:
        """Seed the rows at the next reset, as the environment itself would from one number."""
        drawn = int(np.random.default_rng().integers(2**32)) if seed is None else seed
        self._seeds = list(row_seeds(drawn, self.num_envs))
        return self._seeds

    def reset(self) -> FloatRows:
        seeds = None if self._seeds[0] is None else list(self._seeds)
        if seeds is not None and self.weights is not None:
            # another stream than the environment's, which is seeded with the same numbers
            self._generators = [np.random.default_rng([1, seed or 0]) for seed in seeds]
        with threads(self.threads):
            observations, infos = self.environment.reset(seed=seeds)  # type: ignore[arg-type]
        self._reset_seeds()
        self._returns[:], self._lengths[:] = 0, 0
        self._examples = infos.get("example", self._examples)
        self._draw_weights(np.arange(self.num_envs))
        return self._seen(observations, self._weights)

    def step_async(self, actions: npt.NDArray[Any]) -> None:
        self._actions = actions

    def step_wait(self) -> tuple[FloatRows, FloatRows, BoolArray, list[Info]]:
        with threads(self.threads):
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
        llm_tokens = infos.get("final_info", {}).get("llm_tokens")
        for row, observation in zip(rows.tolist(), final, strict=True):
            row_infos[row] = {
                "terminal_observation": observation,
                "TimeLimit.truncated": bool(cut[row]) and self.bootstrap,
                "episode": {"r": float(self._returns[row]), "l": int(self._lengths[row]), "t": seconds},
            }
            if correct is not None:
                row_infos[row]["is_success"] = bool(correct[row])
            if llm_tokens is not None:
                row_infos[row]["episode"]["llm"] = int(llm_tokens[row])
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
        shown = np.empty((len(observations), self._width), dtype=np.float32)
        shown[:, : observations.shape[1]] = observations
        if self.weights is not None:
            shown[:, -1] = self.weights.scaled(weights)
        self._check_finite(shown, "an observation", rows)
        return shown

    def _check_finite(self, values: npt.NDArray[Any], what: str, rows: IntArray | None = None) -> None:
        finite = np.isfinite(values)
        if not finite.all():
            first = np.argwhere(~finite)[0]
            row = int(first[0] if rows is None else rows[first[0]])
            raise FloatingPointError(
                f"row {row} of {type(self.environment).__name__} has {what} of {values[tuple(first)]}, on example "
                f"{self._examples[row]}; look at its models and its reward"
            )

    def get_state(self) -> dict[str, Any]:
        """Where all rows stand, in numbers, of an environment that has `get_state`; for `set_state`."""
        environment: Any = self.environment
        with threads(self.threads):
            state = {"environment": environment.get_state()}
        state |= {"returns": self._returns.copy(), "lengths": self._lengths.copy(), "weights": self._weights.copy()}
        if self.weights is not None:
            state["generators"] = np.stack([generator_numbers(generator) for generator in self._generators])
        names = json.dumps([None if name is None else str(name) for name in self._examples])
        return state | {"examples": np.frombuffer(names.encode(), dtype=np.uint8)}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that `get_state` gave, of this bridge or of one made with the same arguments.

        Models read again what they had read: from there on the same actions see the same numbers to the bit, in either.
        """
        environment: Any = self.environment
        with threads(self.threads):
            environment.set_state(state["environment"])
        self._returns[:], self._lengths[:], self._weights[:] = state["returns"], state["lengths"], state["weights"]
        if self.weights is not None:
            self._generators = [generator_of(numbers) for numbers in state["generators"]]
        self._examples = np.array(json.loads(state["examples"].tobytes()), dtype=object)

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


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Let torch use so many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
