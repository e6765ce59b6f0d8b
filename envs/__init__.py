"""Environments: token-level LLM routing as a decision process.

Importing this package registers `citer/TokenRouting-v0` and `citer/ShortcutRouting-v0` with Gymnasium; nothing
heavy is imported until one is made.
"""

from gymnasium.envs.registration import register

register(
    id="citer/TokenRouting-v0",
    entry_point="envs.environments.token_routing:RoutingEnv",
    vector_entry_point="envs.environments.token_routing:RoutingVectorEnv",
)
register(
    id="citer/ShortcutRouting-v0",
    entry_point="envs.environments.shortcut_routing:ShortcutRoutingEnv",
    vector_entry_point="envs.environments.shortcut_routing:ShortcutRoutingVectorEnv",
)
register(
    id="citer/TreeRouting-v0",
    entry_point="envs.environments.tree_routing:TreeRoutingEnv",
    vector_entry_point="envs.environments.tree_routing:TreeRoutingVectorEnv",
)
