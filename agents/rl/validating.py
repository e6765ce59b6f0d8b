"""The callback that measures a learner of Stable-Baselines3 on validation problems between two rollouts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.callbacks import BaseCallback

from agents.common.policy import Policy, Track
from agents.common.selection import BestPolicy
from agents.rl.vec_env import VectorEnvBridge, threads


class Validating(BaseCallback):
    """Measures the policy when it is due and at the end, and keeps the best one's weights.

    Models run with as many threads as those of the environment.

    Args:
        best: measures, and keeps.
        policy_of: makes a policy of the learner.
        bridge: the learner's environment.
        track: receives a row of every measurement.
        run: names the run in them.
    """

    def __init__(
        self, best: BestPolicy, policy_of: Callable[[Any], Policy], bridge: VectorEnvBridge, track: Track, run: str
    ) -> None:
        super().__init__()
        self.best, self.policy_of, self.bridge, self.track, self.run = best, policy_of, bridge, track, run

    def _on_rollout_start(self) -> None:
        if self.best.due(self.model.num_timesteps):
            self._measure()

    def _on_step(self) -> bool:
        return True

    def _on_training_end(self) -> None:
        if self.model.num_timesteps > self.best.made:
            self._measure()

    def _measure(self) -> None:
        steps = self.model.num_timesteps
        with threads(self.bridge.threads):
            found = self.best.measure(steps, self.policy_of(self.model), self.model.policy)
        self.track({"run": self.run, "time/total_timesteps": steps, **found})
