"""What query routers make of embeddings: put on one scale, and compared with many others in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

COMPARED = 2**24
"""Pairs of queries compared at once: 64 MB of float32, however many queries there are."""


def standardisation(embeddings: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each number of embeddings (n, width), (width,) each; constants keep a deviation above 0."""
    wide = embeddings.double()
    return wide.mean(0).float(), wide.std(0, unbiased=False).clamp(min=1e-4).float()


def standardise(embeddings: Tensor, mean: Tensor, scale: Tensor) -> Tensor:
    """Embeddings (n, width) by statistics of training queries, (width,) each."""
    return (embeddings.float() - mean) / scale


def with_constant(features: Tensor) -> Tensor:
    """Features (n, width) and a constant 1, (n, width + 1), by which a product with them has a bias."""
    return torch.cat([features, torch.ones(len(features), 1)], dim=1)


def compared_at_once(queries: Tensor, others: int) -> Iterator[Tensor]:
    """Parts of queries (n, width) in order, each to be compared with `others` queries at once."""
    yield from queries.split(max(1, COMPARED // max(1, others)))
