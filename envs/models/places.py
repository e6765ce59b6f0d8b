"""Where models lie: those that ship with the package, and whether the Hugging Face hub can be reached.

The hub is asked once and quickly, before its client tries again and again.
"""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, is_offline_mode

WEIGHTS = Path(__file__).parent.parent / "weights"
EMBEDDED = ("embedded/slm", "embedded/llm")
"""The pair that token-level routing is about."""
OTHERS = ("tiny", "small", "medium", "large", "plus_minus", "times_over", "plus_times", "minus_over")
EMBEDDED_MODELS = (*EMBEDDED, *(f"embedded/{name}" for name in OTHERS))
"""With it the other generalists, and the specialists: a pool for routing whole queries."""
PATIENCE = 2.0
"""Seconds a connection may take."""


def embedded_folder(name: str) -> Path:
    """Where the weights of an embedded model lie.

    Raises:
        ValueError: there is no embedded model of that name.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"unknown embedded model {name!r}; there are {', '.join(EMBEDDED_MODELS)}")
    return WEIGHTS / name.removeprefix("embedded/")


def why_unreachable() -> str | None:
    """What keeps the hub, or the proxy that leads there, from being reached; None where it answers.

    None in offline mode too: the hub's client then asks nobody and says so itself.
    """
    if is_offline_mode():
        return None
    target = urlsplit(constants.ENDPOINT)
    proxies = getproxies()
    proxy = proxies.get(target.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(target.hostname or ""):
        target = urlsplit(proxy if "://" in proxy else f"//{proxy}")
    host, port = target.hostname or "", target.port or (80 if target.scheme == "http" else 443)
    answers: list[str | None] = []

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
            answers.append(None)
        except OSError as error:
            answers.append(f"{host}: {error}")

    # a resolver keeps to no timeout, so that the one who waits for it must
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(PATIENCE)
    return answers[0] if answers else f"{host}: no answer within {PATIENCE:g} s"
