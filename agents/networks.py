"""The router network, and what it sees."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

FEATURES = ("hidden", "hidden_logits")
TOP = 10
"""Log-probabilities among the logit features."""


def logit_features(logits: Tensor) -> Tensor:
    """Entropy (nats) and the TOP largest log-probabilities of next-token logits (n, vocab): float32, (n, 1 + TOP)."""
    log_probabilities = logits.float().log_softmax(-1)
    entropy = -(log_probabilities.exp() * log_probabilities.clamp(min=-1e9)).sum(-1, keepdim=True)
    # far below what float16 and a router can tell apart
    return torch.cat([entropy, log_probabilities.topk(TOP, dim=-1).values.clamp(min=-50)], dim=-1)


def all_features(hidden: Tensor, logits: Tensor) -> Tensor:
    """All a router may see of n states: hidden states (n, width), then logit features; (n, width + 1 + TOP)."""
    return torch.cat([hidden.float(), logit_features(logits)], dim=-1)


def feature_width(features: str, width: int) -> int:
    """How many of `all_features` a router sees, the first ones."""
    return width if features == "hidden" else width + 1 + TOP


class RouterNetwork(nn.Module):
    """CITER's router: from a hidden state to the logit of "the SLM should write" (Zheng et al. 2025).

    Linear w -> 2w, BatchNorm, ReLU, Dropout, Linear 2w -> w, ReLU, Linear w -> 1. Inputs are standardised first, by
    statistics of the training data that are part of the weights.

    Args:
        width: features per decision.
        dropout: share of the hidden features dropped in training.
    """

    mean: Tensor  # (width,)
    scale: Tensor  # (width,)

    def __init__(self, width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.width = width
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        self.layers = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.BatchNorm1d(2 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
            nn.ReLU(),
            nn.Linear(width, 1),
        )

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Standardise inputs by these statistics of the training data, (width,) each."""
        self.mean.copy_(mean)
        self.scale.copy_(deviation.clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n,) of features (n, width)."""
        standardised = (features - self.mean) / self.scale
        return cast(Tensor, self.layers(standardised))[:, 0]
