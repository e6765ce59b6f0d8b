"""Environments: token-level LLM routing as a decision process.

Importing this package registers `citer/TokenRouting-v0` with Gymnasium; nothing heavy is imported until it is made.
"""

from gymnasium.envs.registration import register

register(
    id="citer/TokenRouting-v0",
    entry_point="envs.routing:RoutingEnv",
    vector_entry_point="envs.routing:RoutingVectorEnv",
)
