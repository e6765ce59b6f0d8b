"""What is added to Stable-Baselines3: exploration row by row, logs as rows of numbers, random states kept."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from sb3_contrib import QRDQN
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter

from agents.common.policy import Track
from envs.progress import ProgressBar


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

    def __init__(self, interval: int, progress: ProgressBar) -> None:
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
