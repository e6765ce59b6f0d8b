"""Labelled tokens that stay on disk, and the loss of a router on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.arrays import BoolArray, IntArray

# Rows shuffled together, so that memory does not grow with the data: 73 MB at 139 features.
SHUFFLED_ROWS = 2**18
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True)
class LabelledTokens:
    """Labelled tokens in shards whose features are read when they are needed.

    Attributes:
        features: reads shard i: float16, (rows of i, width).
        sizes: rows of each shard.
        prefers_slm: labels of all rows, (n,).
        examples: the example each row is from, (n,).
        kept: rows that have a label, (n,).
        width: features used, the first ones.
        counts: how many tokens each row stands for, (n,), where some are a sample of more; 1 each where None.
    """

    features: Callable[[int], Tensor]
    sizes: Sequence[int]
    prefers_slm: BoolArray
    examples: IntArray
    kept: BoolArray
    width: int
    counts: IntArray | None = field(default=None, kw_only=True)

    @classmethod
    def in_memory(cls, features: Tensor, prefers_slm: BoolArray, examples: IntArray) -> LabelledTokens:
        """All tokens in one shard: features (n, width), labels (n,), examples (n,)."""
        return cls(
            features=lambda shard: features,
            sizes=[len(features)],
            prefers_slm=prefers_slm,
            examples=examples,
            kept=np.ones(len(features), dtype=bool),
            width=features.shape[1],
        )

    def loss(self, logits: Tensor, rows: IntArray, weights: tuple[float, float] = (1.0, 1.0)) -> Tensor:
        """What training lowers: the mean loss of some rows, whose logits are (m,), with numbers `rows`, (m,).

        `weights` are those of tokens labelled LLM and SLM.
        """
        labels = torch.from_numpy(self.prefers_slm[rows]).to(logits.device)
        weight = torch.where(labels, weights[1], weights[0])
        if self.counts is not None:
            weight = weight * torch.from_numpy(self.counts[rows]).to(logits.device)
        return preference_loss(logits, labels.to(logits.dtype), weight)

    def as_they_count(self, values: npt.NDArray[Scalar], rows: BoolArray | IntArray) -> npt.NDArray[Scalar]:
        """Values of some rows, (m,), each as often as its row counts."""
        return values if self.counts is None else np.repeat(values, self.counts[rows])

    def blocks(self, where: BoolArray, order: Sequence[int] | None = None) -> Iterator[tuple[Tensor, IntArray]]:
        """Rows `where` (n,), shard by shard: features (m, width) float16 and the numbers of the rows (m,)."""
        starts = np.concatenate([[0], np.cumsum(self.sizes)])
        for shard in range(len(self.sizes)) if order is None else order:
            rows = np.flatnonzero(where[starts[shard] : starts[shard + 1]])
            if len(rows):
                yield self.features(shard)[torch.from_numpy(rows), : self.width], rows + starts[shard]

    def batches(
        self, where: BoolArray, size: int, rng: np.random.Generator | None
    ) -> Iterator[tuple[Tensor, IntArray]]:
        """Batches of exactly `size` rows, shuffled by `rng`; in the order of the rows where that is None.

        A smaller remainder is left to other epochs, for BatchNorm's sake; in the order of the rows it is always the
        last ones. Rows are shuffled among SHUFFLED_ROWS of shards in random order: all of them where there are fewer.
        """
        size = min(size, int(where.sum()))
        held: list[Tensor] = []
        numbers: list[IntArray] = []
        count = 0

        def ordered(number: int) -> IntArray:
            return np.arange(number) if rng is None else rng.permutation(number)

        def cut(last: bool) -> Iterator[tuple[Tensor, IntArray]]:
            nonlocal count
            features, rows = torch.cat(held), np.concatenate(numbers)
            held.clear()
            numbers.clear()
            order = ordered(count)
            full = count // size * size
            for first in range(0, full, size):
                part = order[first : first + size]
                yield features[torch.from_numpy(part)], rows[part]
            left = order[full:]
            count = len(left)
            if not last and count:
                held.append(features[torch.from_numpy(left)])
                numbers.append(rows[left])

        for features, rows in self.blocks(where, ordered(len(self.sizes)).tolist()):
            held.append(features)
            numbers.append(rows)
            count += len(rows)
            if count >= SHUFFLED_ROWS:
                yield from cut(last=False)
        if held:
            yield from cut(last=True)


def preference_loss(logits: Tensor, prefers_slm: Tensor, weight: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of preferences under Bradley-Terry (Zheng et al. 2025, eq. 5): binary cross-entropy.

    Args:
        logits: log-odds that the SLM should write, (n,).
        prefers_slm: the labels, 0 or 1, (n,).
        weight: of each token, (n,); 1 where None.
    """
    return torch.nn.functional.binary_cross_entropy_with_logits(logits, prefers_slm, weight=weight)


def held_out_rows(examples: IntArray, share: float, rng: np.random.Generator) -> BoolArray:
    """Which rows belong to the examples held out; at least one example on either side."""
    known = np.unique(examples)
    if len(known) < 2:
        raise ValueError("a router needs at least two examples, to hold one out")
    count = min(max(1, round(share * len(known))), len(known) - 1)
    return np.isin(examples, rng.permutation(known)[:count])
