"""Token-level routing over a prefix tree as Gymnasium environments: the episodes of `RoutingEnv`, remembered."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envs.environments.names import resolved, settings_of
from envs.environments.settings import RoutingSettings
from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
from envs.models.loading import embedded_pool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.arithmetic import ArithmeticTask


@dataclass(frozen=True, kw_only=True)
class TreeSettings(RoutingSettings):
    """What `TreeRoutingEnv` is made with: all of `RoutingSettings`, where `tree` is a new one if None, and its size.

    Args:
        memory: bytes a new tree may take.
        path: a saved tree that a new one goes on from.

    Raises:
        ValueError: rewards would weigh a cost that is measured, or a tree and a path are given.
    """

    memory: int = 2**30
    path: Path | str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cost is not None and not self.cost.reproducible:
            raise ValueError(
                f"cost {self.cost.name} is measured, and a replay tree runs no model twice; choose another cost, or "
                "use citer/TokenRouting-v1"
            )
        if self.tree is not None and self.path is not None:
            raise ValueError(
                f"a tree and the path {self.path} were given; give the tree alone, or open the path with "
                "PrefixTree(...)"
            )


def tree_of(settings: Mapping[str, Any]) -> PrefixTree:
    """The tree among settings of `TreeRoutingEnv`, or a new one."""
    chosen = settings_of(TreeSettings, settings)
    if chosen.tree is not None:
        return chosen.tree
    pool, task = (chosen.pool or embedded_pool()).check_choice(), chosen.task or ArithmeticTask()
    path = None if chosen.path is None else Path(chosen.path)
    return PrefixTree(pool, task, chosen.max_new_tokens, chosen.memory, path)


def with_tree(settings: Mapping[str, Any], tree: PrefixTree) -> dict[str, Any]:
    """Settings of `RoutingEnv` out of those of `TreeRoutingEnv`."""
    return {name: value for name, value in settings.items() if name not in ("memory", "path")} | {"tree": tree}


class TreeRoutingEnv(RoutingEnv):
    """`RoutingEnv` that decodes no state twice: what a prefix and an action lead to is kept in a prefix tree.

    ## Description, spaces, reward, starting state, episode end, info
    Those of `RoutingEnv`: for the same seeds and actions the same observations, rewards, endings, costs and infos, but
    for `total_cost_seconds`, which is 0 since nothing is timed. Decoding must be greedy. A task without end hardly ever
    draws the same prompt twice: train on `envs.tasks.task.FirstExamples` of it.

    ## Arguments
    Those of `RoutingEnv`, where `tree` is the tree to walk, shared with other environments and agents, a new one where
    None; and `memory` and `path` of a new one: see `TreeSettings`.

    ## Version
    v1: seeds of rows and the default cost of several LLMs, as in `RoutingEnv`.
    v0: first version.
    """

    def __init__(self, *, render_mode: str | None = None, **settings: Any) -> None:
        settings = resolved(settings)
        self.tree = tree_of(settings)
        super().__init__(render_mode=render_mode, **with_tree(settings, self.tree))


class TreeRoutingVectorEnv(RoutingVectorEnv):
    """`num_envs` walks through one prefix tree; see `TreeRoutingEnv` and `RoutingVectorEnv`."""

    def __init__(self, num_envs: int = 1, **settings: Any) -> None:
        shell = {name: settings.pop(name) for name in ("render_mode", "autoreset_mode") if name in settings}
        settings = resolved(settings)
        self.tree = tree_of(settings)
        super().__init__(num_envs, **shell, **with_tree(settings, self.tree))
