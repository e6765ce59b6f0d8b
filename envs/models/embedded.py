"""The models that ship with the package: real transformers, trained on the arithmetic task."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent.parent / "weights"
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
