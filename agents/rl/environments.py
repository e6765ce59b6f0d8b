"""The environments that reinforcement learning plays, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gymnasium.vector import VectorEnv

from envs.environments.rewards import OutcomeReward
from envs.tasks.task import Task


@dataclass(frozen=True)
class EnvSettings:
    """What an environment is made with.

    Attributes:
        rows: episodes in flight.
        task: the training problems, so many of them.
        examples: how many.
        cost_weight: the price of one LLM token.
        arguments: those that all environments take by the same names.
    """

    rows: int
    task: Task
    examples: int
    cost_weight: float
    arguments: dict[str, Any]


def tree_environment(settings: EnvSettings) -> VectorEnv:
    """Every visited transition is remembered."""
    from envs.environments.tree_routing import TreeRoutingVectorEnv

    return TreeRoutingVectorEnv(
        settings.rows, task=settings.task, reward=OutcomeReward(settings.cost_weight), **settings.arguments
    )


def checked_tree_environment(settings: EnvSettings) -> VectorEnv:
    """The same where drafts are checked."""
    from envs.environments.checked_routing import CheckedRoutingVectorEnv
    from envs.prefix_tree.tree import PrefixTree

    others = {name: value for name, value in settings.arguments.items() if name not in ("pool", "path")}
    path = settings.arguments.get("path")
    tree = PrefixTree(settings.arguments["pool"], settings.task, others["max_new_tokens"], path=path)
    return CheckedRoutingVectorEnv(settings.rows, tree=tree, reward=OutcomeReward(settings.cost_weight), **others)


def token_environment(settings: EnvSettings) -> VectorEnv:
    """Every token is decoded."""
    from envs.environments.token_routing import RoutingVectorEnv

    return RoutingVectorEnv(
        settings.rows, task=settings.task, reward=OutcomeReward(settings.cost_weight), **settings.arguments
    )


def shortcut_environment(settings: EnvSettings) -> VectorEnv:
    """Reference solutions, teacher-forced."""
    from envs.environments.shortcut_routing import ShortcutRoutingVectorEnv

    return ShortcutRoutingVectorEnv(
        settings.rows,
        task=settings.task,
        cost_weight=settings.cost_weight,
        examples=settings.examples,
        start=0,
        **settings.arguments,
    )


ENVIRONMENTS: dict[str, Callable[[EnvSettings], VectorEnv]] = {
    "tree": tree_environment, "checked_tree": checked_tree_environment, "token": token_environment,
    "shortcut": shortcut_environment,
}  # fmt: skip
