"""The router network."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn


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
