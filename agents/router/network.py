"""The router network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn


class RouterNetwork(nn.Module):
    """CITER's router: from a hidden state to the logit of "the SLM should write" (Zheng et al. 2025).

    Linear w -> 2w, BatchNorm, ReLU, Dropout, Linear 2w -> w, ReLU, Linear w -> 1, or hidden layers of other widths, or
    none: Linear w -> 1. Inputs are standardised first, by statistics of the training data that are part of the weights.

    Args:
        width: features per decision.
        dropout: share of the first hidden layer's units dropped in training.
        units: of the hidden layers; 2w and w as published where None, no hidden layer where empty.
    """

    mean: Tensor  # (width,)
    scale: Tensor  # (width,)

    def __init__(self, width: int, dropout: float = 0.1, units: Sequence[int] | None = None) -> None:
        super().__init__()
        self.width = width
        self.units = [2 * width, width] if units is None else list(units)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        layers: list[nn.Module] = []
        if self.units:
            first = self.units[0]
            layers = [nn.Linear(width, first), nn.BatchNorm1d(first), nn.ReLU(), nn.Dropout(dropout)]
        for before, after in pairwise(self.units):
            layers += [nn.Linear(before, after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear([width, *self.units][-1], 1))

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Standardise inputs by these statistics of the training data, (width,) each."""
        self.mean.copy_(mean)
        self.scale.copy_(deviation.clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n,) of features (n, width)."""
        standardised = (features - self.mean) / self.scale
        return cast(Tensor, self.layers(standardised))[:, 0]
