"""What a learner of Stable-Baselines3 goes on from between two rollouts, and the callback that keeps it."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.callbacks import BaseCallback

from agents.common.checkpoints import (
    Checkpoints,
    array_of,
    optimizer_state,
    read,
    restore_optimizer,
    restoring,
)
from agents.common.selection import BestPolicy
from agents.rl.sb3_extensions import Reporting
from agents.rl.vec_env import VectorEnvBridge
from envs.environments.episodes import generator_numbers, generator_of

TREE_FILE = "replay.tree"
NUMBERS = (
    "num_timesteps", "_episode_num", "_n_updates", "_n_calls", "_current_progress_remaining", "exploration_rate",
)  # fmt: skip
"""Attributes of learners that are numbers; each has some of them."""


class Checkpointing(BaseCallback):
    """Keeps a checkpoint between two rollouts, every so many steps.

    Models read the answers in flight anew then, as they must where a checkpoint is gone on from: both go on with the
    same bits.

    Args:
        checkpoints: where they are kept.
        interval: steps between two of them.
        bridge: the learner's environment, which has `get_state` and `set_state`.
        reporting: reports the learner's rows; called before this.
        best: the best weights so far, which are part of a checkpoint; they are chosen before this is called.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        interval: int,
        bridge: VectorEnvBridge,
        reporting: Reporting,
        best: BestPolicy | None = None,
    ) -> None:
        super().__init__()
        self.checkpoints, self.interval, self.bridge, self.reporting = checkpoints, interval, bridge, reporting
        self.best = best
        self._kept, self._seconds = 0, 0.0

    def restore(self, learner: Any, folder: Path) -> None:
        """Let a learner that was made with the same settings stand where one stood when a checkpoint was kept.

        Raises:
            ValueError: the checkpoint is damaged.
        """
        arrays, about = read(folder)
        with restoring(folder):
            self.bridge.set_state(arrays["bridge"])
            self._kept, self._seconds = about["numbers"]["num_timesteps"], about["seconds"]
            self.reporting.dumped = about["reported"]
            restore_learner(learner, arrays, about)
            if self.best is not None:
                self.best.restore(arrays.get("best", {}), about["best"], learner.policy)

    def _on_training_start(self) -> None:
        # what is logged of time is that of the whole training
        self.model.start_time -= round(self._seconds * 1e9)
        self.model._num_timesteps_at_start = 0

    def _on_rollout_start(self) -> None:
        steps = self.model.num_timesteps
        if steps - self._kept < self.interval:
            return
        self._kept = steps
        state = self.bridge.get_state()
        self.bridge.set_state(state)
        arrays, about = learner_state(self.model)
        about |= {"reported": self.reporting.dumped, "seconds": time.time() - self.model.start_time / 1e9}
        if self.best is not None:
            arrays["best"], about["best"] = self.best.state()
        self.checkpoints.save(steps, {**arrays, "bridge": state}, about, self._write_tree)

    def _on_step(self) -> bool:
        return True

    def _write_tree(self, folder: Path) -> None:
        """Keep what was decoded: it is not decoded again, and its bits are the same."""
        tree = getattr(self.bridge.environment, "tree", None)
        if tree is not None:
            tree.save(folder / TREE_FILE)


def learner_state(learner: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """All that a learner goes on from between two rollouts, but its environment: arrays, and plain data."""
    moments, others = optimizer_state(learner.policy.optimizer)
    arrays = {
        "policy": {name: array_of(value) for name, value in learner.policy.state_dict().items()},
        "optimizer": moments,
        "observations": learner._last_obs,
        "episode_starts": learner._last_episode_starts,
        "random": _random_states(learner),
    }
    if (states := getattr(learner, "_last_lstm_states", None)) is not None:
        arrays["lstm"] = {"pi": [array_of(part) for part in states.pi], "vf": [array_of(part) for part in states.vf]}
    about = {
        "numbers": {name: getattr(learner, name) for name in NUMBERS if hasattr(learner, name)},
        "optimizer": others,
        "episodes": list(learner.ep_info_buffer),
        "successes": list(learner.ep_success_buffer),
        "logged": {key: float(value) for key, value in learner.logger.name_to_value.items()},
        "logged_counts": dict(learner.logger.name_to_count),
        "numpy": {key: value for key, value in _numpy_state().items() if key != "state"},
        "python": random.getstate()[2],
    }
    buffer = getattr(learner, "replay_buffer", None)
    if buffer is not None:
        filled = buffer.buffer_size if buffer.full or buffer.optimize_memory_usage else buffer.pos
        arrays["replay"] = {name: value[:filled] for name, value in _replayed(buffer).items()}
        about["replay"] = {"pos": buffer.pos, "full": buffer.full}
    return arrays, about


def restore_learner(learner: Any, arrays: Mapping[str, Any], about: Mapping[str, Any]) -> None:
    """Let a learner, made with the same settings, stand where the one stood whose `learner_state` this is.

    Raises:
        KeyError, ValueError, RuntimeError or TypeError: the state is of a learner of other settings.
    """
    device = learner.device
    learner.policy.load_state_dict({name: torch.tensor(value) for name, value in arrays["policy"].items()})
    restore_optimizer(learner.policy.optimizer, arrays.get("optimizer", {}), about["optimizer"])
    for name, value in about["numbers"].items():
        setattr(learner, name, value)
    learner._last_obs, learner._last_episode_starts = arrays["observations"], arrays["episode_starts"]
    if "lstm" in arrays:
        pi, vf = (tuple(torch.tensor(part, device=device) for part in arrays["lstm"][name]) for name in ("pi", "vf"))
        learner._last_lstm_states = RNNStates(pi, vf)
    window = learner._stats_window_size
    learner.ep_info_buffer = deque(about["episodes"], maxlen=window)
    learner.ep_success_buffer = deque(about["successes"], maxlen=window)
    learner.logger.name_to_value.update(about["logged"])
    learner.logger.name_to_count.update(about["logged_counts"])
    if "replay" in about:
        buffer = learner.replay_buffer
        for name, value in _replayed(buffer).items():
            value[: len(arrays["replay"][name])] = arrays["replay"][name]
        buffer.pos, buffer.full = about["replay"]["pos"], about["replay"]["full"]
    _set_random_states(learner, arrays["random"], about)


def _replayed(buffer: Any) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a replay buffer, (steps, rows, ...) each; returns of n steps are summed when they are drawn."""
    return {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}


def _numpy_state() -> dict[str, Any]:
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002
    return {**state, "pos": state["state"]["pos"]}


def _random_states(learner: Any) -> dict[str, npt.NDArray[Any]]:
    """Generators that Stable-Baselines3 draws from: the global ones, and that of the actions."""
    states = {
        "torch": torch.get_rng_state().numpy(),
        "numpy": _numpy_state()["state"]["key"],
        "python": np.array(random.getstate()[1], dtype=np.int64),
        "actions": generator_numbers(learner.action_space.np_random),
    }
    if learner.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(learner.device).numpy()
    return states


def _set_random_states(learner: Any, states: Mapping[str, npt.NDArray[Any]], about: Mapping[str, Any]) -> None:
    torch.set_rng_state(torch.tensor(states["torch"]))
    kept = about["numpy"]
    numpy_state = {**kept, "state": {"key": states["numpy"], "pos": kept["pos"]}}
    np.random.set_state(numpy_state)  # noqa: NPY002
    random.setstate((3, tuple(states["python"].tolist()), about["python"]))
    learner.action_space.np_random.bit_generator.state = generator_of(states["actions"]).bit_generator.state
    if "cuda" in states:
        torch.cuda.set_rng_state(torch.tensor(states["cuda"]), learner.device)
