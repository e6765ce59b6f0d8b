"""What a router may see of a decision: the SLM's hidden state, its next-token logits in short, and the history."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from envs.cache import IntArray

Features = Literal["hidden", "hidden_logits", "hidden_logits_history"]
FEATURES: tuple[Features, ...] = get_args(Features)
"""What can be seen, each the one before and more: as published; with logit features; with the history."""
TOP = 10
"""Log-probabilities among the logit features."""
LOGIT_FEATURES = 1 + TOP
HISTORY_FEATURES = 2


def check_features(features: str) -> Features:
    """`features` if it is one of FEATURES; an error that names them otherwise."""
    for known in FEATURES:
        if features == known:
            return known
    raise ValueError(f"unknown features {features!r}; choose one of {', '.join(FEATURES)}")


def feature_width(features: str, width: int) -> int:
    """Numbers seen at a decision by a router of an SLM `width` wide."""
    widths = (width, width + LOGIT_FEATURES, width + LOGIT_FEATURES + HISTORY_FEATURES)
    return widths[FEATURES.index(check_features(features))]


def entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy in nats, (n,), of distributions given by their log-probabilities, (n, vocab)."""
    return -(log_probabilities.exp() * log_probabilities.clamp(min=-1e9)).sum(-1)


def logit_features(logits: Tensor) -> Tensor:
    """Entropy (nats) and the TOP largest log-probabilities of next-token logits (n, vocab): float32, (n, 1 + TOP)."""
    log_probabilities = logits.float().log_softmax(-1)
    # far below what float16 and a router can tell apart
    top = log_probabilities.topk(TOP, dim=-1).values.clamp(min=-50)
    return torch.cat([entropy(log_probabilities)[:, None], top], dim=-1)


def all_features(hidden: Tensor, logits: Tensor) -> Tensor:
    """Hidden states (n, width), then logit features: float32, (n, width + 1 + TOP)."""
    return torch.cat([hidden.float(), logit_features(logits)], dim=-1)


def history_features(positions: IntArray, since_llm: IntArray) -> Tensor:
    """Logarithms of 1 + the tokens written, and of 1 + those since the LLM last wrote: float32, (n, 2)."""
    counts = torch.stack([torch.from_numpy(positions), torch.from_numpy(since_llm)], dim=-1)
    return counts.float().log1p()
