"""Suite rl: how fast policies can be optimised, on the embedded pair."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from omegaconf import DictConfig

from agents.common.policy import untracked
from agents.oracle import Oracle
from agents.sb3 import StableBaselines, train
from envs.environments.checked_routing import CheckedRoutingVectorEnv
from envs.environments.shortcut_routing import ShortcutRoutingVectorEnv
from envs.environments.token_routing import RoutingVectorEnv
from envs.environments.tree_routing import TreeRoutingVectorEnv
from envs.models.loading import embedded_pool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import FirstExamples
from experiments.common.timing import Numbers, alternate


def steps_per_second(environment: VectorEnv, actions: Callable[[int], np.ndarray], steps: int) -> float:
    """Rows x steps over the seconds they took; `actions` gives those of step t, (rows,)."""
    begun = time.perf_counter()
    for step in range(steps):
        environment.step(actions(step))
    return steps * environment.num_envs / (time.perf_counter() - begun)


def rl_suite(config: DictConfig) -> tuple[Numbers, Numbers]:
    """Steps per second of the shortcut environment, the replay tree where it knows all, PPO on it; and the oracle.

    The live environment is measured beside them, for the ratios `shortcut_over_live` and `tree_over_live`, and the
    replay tree where drafts are checked, for `checked_over_tree`.
    """
    pool, task = embedded_pool(), ArithmeticTask()
    rng = np.random.default_rng(0)
    rows = config.rl_envs
    problems = FirstExamples(task, config.rl_known_examples)
    live = RoutingVectorEnv(config.envs, pool=pool, task=task)
    shortcut = ShortcutRoutingVectorEnv(rows, pool=pool, task=task, examples=config.rl_references)
    tree = TreeRoutingVectorEnv(rows, pool=pool, task=problems)
    checked = CheckedRoutingVectorEnv(rows, tree=PrefixTree(pool, problems))
    # Every seed goes through the same episodes, so that states met in a first round are known in the next.
    choices = (rng.random((config.rl_steps, rows)) < config.llm_share).astype(np.int64)
    environments: dict[str, VectorEnv] = {"live": live, "shortcut": shortcut, "tree": tree, "checked": checked}

    def rate(name: str) -> float:
        environment = environments[name]
        environment.reset(seed=0)
        steps = config.env_steps if name == "live" else config.rl_steps
        return steps_per_second(environment, lambda step: choices[step, : environment.num_envs], steps)

    rate("tree")
    rate("checked")
    rate_of = alternate({name: (lambda name=name: rate(name)) for name in environments}, config.env_repeats, "rl")  # type: ignore[misc]
    rates = {
        "live_steps_per_second": rate_of["live"],
        "shortcut_steps_per_second": rate_of["shortcut"],
        "tree_steps_per_second": rate_of["tree"],
        "checked_steps_per_second": rate_of["checked"],
    }
    ratios = {f"{name}_over_live": rate_of[name] / rate_of["live"] for name in ("shortcut", "tree")}
    ratios["checked_over_tree"] = rate_of["checked"] / rate_of["tree"]

    searched = task.examples("test", config.rl_oracle_examples)
    begun = time.perf_counter()
    Oracle().search(PrefixTree(pool, task), searched)
    rates["oracle_seconds"] = time.perf_counter() - begun

    settings = StableBaselines(steps=config.rl_ppo_steps, num_envs=config.rl_ppo_envs)
    begun = time.perf_counter()
    environment = settings.make(pool, task, seed=0)
    train(environment, settings, 0, untracked, torch.device("cpu"))
    rates["ppo_steps_per_second"] = config.rl_ppo_steps / (time.perf_counter() - begun)
    return ratios, rates
