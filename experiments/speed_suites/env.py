"""Suite env: steps per second of the vector environment."""

from __future__ import annotations

import time

from omegaconf import DictConfig

from envs.environments.token_routing import RoutingVectorEnv
from experiments.common.timing import Numbers, alternate


def env_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Steps per second of the vector environment on the embedded pair, actions drawn at random."""
    environment = RoutingVectorEnv(num_envs=config.envs)
    environment.action_space.seed(0)
    environment.reset(seed=0)

    def steps(count: int) -> float:
        begun = time.perf_counter()
        for _ in range(count):
            environment.step(environment.action_space.sample())
        return count * environment.num_envs / (time.perf_counter() - begun)

    steps(config.env_steps)  # past the start, when all rows read prompts together
    rate = alternate({"steps": lambda: steps(int(config.env_steps))}, config.env_repeats, "env")["steps"]
    return {}, {"vector_steps_per_second": rate}
