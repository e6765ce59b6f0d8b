"""Inputs on a unit scale, by statistics of a rollout before training."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from agents.rl.vec_env import VectorEnvBridge

# A few coordinates of a hidden state stray far; beyond so many deviations they say nothing more.
CLIP = 10.0


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
    observations = bridge.reset()
    count, total, squares = 0, np.zeros(observations.shape[1]), np.zeros(observations.shape[1])
    for _ in range(steps):
        count, wide = count + len(observations), observations.astype(np.float64)
        total, squares = total + wide.sum(0), squares + (wide**2).sum(0)
        rows = len(observations)
        others = rng.integers(1, models, size=rows) if models > 1 else np.zeros(rows, dtype=np.int64)
        observations = bridge.step(np.where(rng.random(rows) < slm_share, 0, others))[0]  # type: ignore[assignment]
    mean = total / count
    deviation = np.sqrt((squares / count - mean**2).clip(min=0))
    if bridge.weights is not None:  # it is on a unit scale as it is
        mean[-1], deviation[-1] = 0, 1
    return torch.from_numpy(mean).float(), torch.from_numpy(deviation).float()
