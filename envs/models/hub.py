"""Whether the Hugging Face hub can be reached: asked once and quickly, before its client tries again and again."""

from __future__ import annotations

import socket
import threading
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from huggingface_hub import constants, is_offline_mode

PATIENCE = 2.0
"""Seconds a connection may take."""


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
