"""Token-level routing over a replay tree as Gymnasium environments: the episodes of `RoutingEnv`, remembered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from envs.costs import CostModel
from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
from envs.models.loading import embedded_pool
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask
from envs.tasks.task import Task


def tree_for(
    tree: PrefixTree | None,
    pool: ModelPool | None,
    task: Task | None,
    max_new_tokens: int,
    memory: int,
    path: Path | None,
    cost: CostModel | None = None,
) -> PrefixTree:
    """`tree`, or a new one where it is None; refused where rewards would weigh a `cost` that is measured."""
    if cost is not None and not cost.reproducible:
        raise ValueError(
            f"cost {cost.name} is measured, and a replay tree runs no model twice; choose another cost, or use "
            "citer/TokenRouting-v0"
        )
    if tree is None:
        return PrefixTree(
            (pool or embedded_pool()).check_choice(), task or ArithmeticTask(), max_new_tokens, memory, path
        )
    if path is not None:
        raise ValueError(
            f"a tree and the path {path} were given; give the tree alone, or open the path with PrefixTree(...)"
        )
    return tree


class TreeRoutingEnv(RoutingEnv):
    """`RoutingEnv` that decodes no state twice: what a prefix and an action lead to is kept in a replay tree.

    ## Description, spaces, reward, starting state, episode end, info
    Those of `RoutingEnv`: for the same seeds and actions the same observations, rewards, endings, costs and infos, but
    for `total_cost_seconds`, which is 0 since nothing is timed. Decoding must be greedy. A task without end hardly ever
    draws the same prompt twice: train on `envs.tasks.task.FirstExamples` of it.

    ## Arguments
    Those of `RoutingEnv` by keyword, and:

    Args:
        tree: the tree to walk, shared with other environments and agents; a new one where None.
        memory: bytes a new tree may take.
        path: a saved tree that a new one goes on from.
        pool: as in `RoutingEnv`, like all that follow.
        task: where prompts come from.
        max_new_tokens: the longest response.
        **arguments: further ones of `RoutingEnv`.

    ## Version
    v0: first version.
    """

    def __init__(
        self,
        tree: PrefixTree | None = None,
        memory: int = 2**30,
        path: Path | None = None,
        pool: ModelPool | None = None,
        task: Task | None = None,
        max_new_tokens: int = 128,
        **arguments: Any,
    ) -> None:
        self.tree = tree_for(tree, pool, task, max_new_tokens, memory, path, arguments.get("cost"))
        super().__init__(pool=pool, task=task, max_new_tokens=max_new_tokens, tree=self.tree, **arguments)


class TreeRoutingVectorEnv(RoutingVectorEnv):
    """`num_envs` walks through one replay tree; see `TreeRoutingEnv` and `RoutingVectorEnv`.

    Args:
        num_envs: rows.
        tree: as in `TreeRoutingEnv`, like all that follow.
        memory: bytes a new tree may take.
        path: a saved tree that a new one goes on from.
        pool: the models.
        task: where prompts come from.
        max_new_tokens: the longest response.
        **arguments: further ones of `RoutingVectorEnv`.
    """

    def __init__(
        self,
        num_envs: int = 1,
        tree: PrefixTree | None = None,
        memory: int = 2**30,
        path: Path | None = None,
        pool: ModelPool | None = None,
        task: Task | None = None,
        max_new_tokens: int = 128,
        **arguments: Any,
    ) -> None:
        self.tree = tree_for(tree, pool, task, max_new_tokens, memory, path, arguments.get("cost"))
        super().__init__(num_envs, pool=pool, task=task, max_new_tokens=max_new_tokens, tree=self.tree, **arguments)
