"""Environments: token-level LLM routing as a decision process.

Importing this package registers `citer/TokenRouting-v1`, `citer/TreeRouting-v1`, `citer/ShortcutRouting-v1` and
`citer/CheckedRouting-v0` with Gymnasium; `gym.make("envs:citer/TokenRouting-v1")` imports it by itself. The names below
are imported when they are first asked for; nothing heavy is before.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gymnasium.envs.registration import register

if TYPE_CHECKING:
    from envs.costs import Dollars, Flops, LlmTokens, MemoryTraffic, Seconds
    from envs.decoding.judges import FirstDisagreement, Gap, Learned, TopK
    from envs.decoding.sampling import Sampling
    from envs.decoding.session import Session
    from envs.environments.checked_routing import CheckedRoutingEnv, CheckedRoutingVectorEnv
    from envs.environments.rewards import OutcomeReward, ShortcutReward
    from envs.environments.shortcut_routing import ShortcutRoutingEnv, ShortcutRoutingVectorEnv
    from envs.environments.token_routing import RoutingEnv, RoutingVectorEnv
    from envs.environments.tree_routing import TreeRoutingEnv, TreeRoutingVectorEnv
    from envs.environments.vector import row_seeds
    from envs.models.checks import ModelOrderWarning
    from envs.models.loading import embedded_pool, load_pool
    from envs.models.pool import ModelPool
    from envs.prefix_tree.tree import PrefixTree
    from envs.tasks.arithmetic import ArithmeticTask
    from envs.tasks.math import MathTask
    from envs.tasks.multiple_choice import MultipleChoiceTask
    from envs.tasks.task import FirstExamples

__all__ = [
    "ArithmeticTask",
    "CheckedRoutingEnv",
    "CheckedRoutingVectorEnv",
    "Dollars",
    "FirstDisagreement",
    "FirstExamples",
    "Flops",
    "Gap",
    "Learned",
    "LlmTokens",
    "MathTask",
    "MemoryTraffic",
    "ModelOrderWarning",
    "ModelPool",
    "MultipleChoiceTask",
    "OutcomeReward",
    "PrefixTree",
    "RoutingEnv",
    "RoutingVectorEnv",
    "Sampling",
    "Seconds",
    "Session",
    "ShortcutReward",
    "ShortcutRoutingEnv",
    "ShortcutRoutingVectorEnv",
    "TopK",
    "TreeRoutingEnv",
    "TreeRoutingVectorEnv",
    "embedded_pool",
    "load_pool",
    "row_seeds",
]

_DEFINED_IN = {
    "envs.costs": ("Dollars", "Flops", "LlmTokens", "MemoryTraffic", "Seconds"),
    "envs.decoding.judges": ("FirstDisagreement", "Gap", "Learned", "TopK"),
    "envs.decoding.sampling": ("Sampling",),
    "envs.decoding.session": ("Session",),
    "envs.environments.checked_routing": ("CheckedRoutingEnv", "CheckedRoutingVectorEnv"),
    "envs.environments.rewards": ("OutcomeReward", "ShortcutReward"),
    "envs.environments.shortcut_routing": ("ShortcutRoutingEnv", "ShortcutRoutingVectorEnv"),
    "envs.environments.token_routing": ("RoutingEnv", "RoutingVectorEnv"),
    "envs.environments.tree_routing": ("TreeRoutingEnv", "TreeRoutingVectorEnv"),
    "envs.environments.vector": ("row_seeds",),
    "envs.models.checks": ("ModelOrderWarning",),
    "envs.models.loading": ("embedded_pool", "load_pool"),
    "envs.models.pool": ("ModelPool",),
    "envs.prefix_tree.tree": ("PrefixTree",),
    "envs.tasks.arithmetic": ("ArithmeticTask",),
    "envs.tasks.math": ("MathTask",),
    "envs.tasks.multiple_choice": ("MultipleChoiceTask",),
    "envs.tasks.task": ("FirstExamples",),
}
_MODULES = {name: module for module, names in _DEFINED_IN.items() for name in names}


def __getattr__(name: str) -> Any:
    """A public name, out of the module that defines it."""
    if name not in _MODULES:
        raise AttributeError(f"module 'envs' has no attribute {name!r}; its names are {', '.join(__all__)}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    """All names, those too that were not asked for yet."""
    return sorted({*globals(), *__all__})


for _name, _module, _single, _vector in (
    ("TokenRouting-v1", "token_routing", "RoutingEnv", "RoutingVectorEnv"),
    ("TreeRouting-v1", "tree_routing", "TreeRoutingEnv", "TreeRoutingVectorEnv"),
    ("ShortcutRouting-v1", "shortcut_routing", "ShortcutRoutingEnv", "ShortcutRoutingVectorEnv"),
    ("CheckedRouting-v0", "checked_routing", "CheckedRoutingEnv", "CheckedRoutingVectorEnv"),
):
    register(
        id=f"citer/{_name}",
        entry_point=f"envs.environments.{_module}:{_single}",
        vector_entry_point=f"envs.environments.{_module}:{_vector}",
    )
