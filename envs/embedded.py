"""The models that ship with the package: real transformers, trained on the arithmetic task."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from envs.models import ModelPool

WEIGHTS = Path(__file__).parent / "weights"
EMBEDDED = ("embedded/slm", "embedded/llm")
"""The pair that token-level routing is about."""
OTHERS = ("tiny", "small", "medium", "large", "plus_minus", "times_over", "plus_times", "minus_over")
EMBEDDED_MODELS = (*EMBEDDED, *(f"embedded/{name}" for name in OTHERS))
"""With it the other generalists, and the specialists: a pool for routing whole queries."""


def embedded_folder(name: str) -> Path:
    """Where the weights of an embedded model lie.

    Raises:
        ValueError: there is no embedded model of that name.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"unknown embedded model {name!r}; there are {', '.join(EMBEDDED_MODELS)}")
    return WEIGHTS / name.removeprefix("embedded/")


@cache
def embedded_pool() -> ModelPool:
    """The embedded pair on the CPU in float32; the same object at every call, since pools hold no sequences."""
    from envs.models import ModelPool

    return ModelPool.load(EMBEDDED, dtype="float32", rows=64, capacity=512, verbose=False)
