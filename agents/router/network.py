"""The router network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, Self, cast

import torch
from torch import Tensor, nn

RELEASED = "released"
"""Stands among the weights of a network of the released code's layout."""


class RouterNetwork(nn.Module):
    """CITER's router: from a hidden state to the logit of "the SLM should write" (Zheng et al. 2025).

    Linear w -> 2w, BatchNorm, ReLU, Dropout, Linear 2w -> w, ReLU, Linear w -> 1, or hidden layers of other widths, or
    none: Linear w -> 1. Inputs are standardised first, by statistics of the training data that are part of the weights.
    In the released code a second Dropout stands in place of the second ReLU; weights of that layout say so by one more
    entry, RELEASED, since their shapes do not.

    Args:
        width: features per decision.
        dropout: share of the first hidden layer's units dropped in training.
        units: of the hidden layers; 2w and w as published where None, no hidden layer where empty.
        layout: `paper`, or `released`: Dropout in place of the ReLU behind every hidden layer but the first.
    """

    mean: Tensor  # (width,)
    scale: Tensor  # (width,)

    def __init__(
        self,
        width: int,
        dropout: float = 0.1,
        units: Sequence[int] | None = None,
        layout: Literal["paper", "released"] = "paper",
    ) -> None:
        super().__init__()
        self.width = width
        self.units = [2 * width, width] if units is None else list(units)
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(width))
        if layout == "released":
            self.register_buffer(RELEASED, torch.ones(()))
        layers: list[nn.Module] = []
        if self.units:
            first = self.units[0]
            layers = [nn.Linear(width, first), nn.BatchNorm1d(first), nn.ReLU(), nn.Dropout(dropout)]
        for before, after in pairwise(self.units):
            layers += [nn.Linear(before, after), nn.Dropout(dropout) if layout == "released" else nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Linear([width, *self.units][-1], 1))

    @classmethod
    def of_weights(cls, weights: Mapping[str, Tensor], width: int, units: Sequence[int] | None) -> Self:
        """The network that has these weights, in evaluation mode; their layout is theirs.

        Raises:
            RuntimeError: they are not of this width and these units.
        """
        network = cls(width, units=units, layout="released" if RELEASED in weights else "paper")
        network.load_state_dict(dict(weights))
        return network.eval().requires_grad_(False)

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Standardise inputs by these statistics of the training data, (width,) each."""
        self.mean.copy_(mean)
        self.scale.copy_(deviation.clamp(min=1e-4))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (n,) of features (n, width)."""
        standardised = (features - self.mean) / self.scale
        return cast(Tensor, self.layers(standardised))[:, 0]
