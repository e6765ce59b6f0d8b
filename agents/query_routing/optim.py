"""Gradient descent on a few tensors, stopped early by queries held out."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agents.common.policy import Track
from agents.router.dataset import held_out_rows

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class GradientDescent:
    """How tensors are trained: AdamW, the best epoch kept.

    Args:
        epochs: passes over the queries; the tensors of the best one (validation loss) are kept.
        patience: epochs without a better validation loss after which training stops.
        batch_size: queries a step.
        lr: learning rate.
        weight_decay: of AdamW.
        validation_share: share of the queries held out.
    """

    epochs: int = 100
    patience: int = 10
    batch_size: int = 128
    lr: float = 1e-3
    weight_decay: float = 0.01
    validation_share: float = 0.1

    def __post_init__(self) -> None:
        for key in ("epochs", "patience", "batch_size"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, is {getattr(self, key)}")
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(f"lr ({self.lr}) must be > 0, weight_decay ({self.weight_decay}) >= 0")
        if not 0 < self.validation_share < 1:
            raise ValueError(f"validation_share must be in (0, 1), is {self.validation_share}")

    def split(self, queries: int, seed: int) -> tuple[Tensor, Tensor]:
        """Numbers of the queries to train on, and of those held out; at least one on either side."""
        held_out = held_out_rows(np.arange(queries), self.validation_share, np.random.default_rng(seed))
        return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))

    def lower(
        self,
        tensors: Tensors,
        rows: Tensor,
        loss: Callable[[Tensors, Tensor], Tensor],
        validation_loss: Callable[[Tensors], Tensor],
        seed: int,
        track: Track,
        label: str,
    ) -> dict[str, Tensor]:
        """The tensors of the epoch of least validation loss, the start counting as one.

        Args:
            tensors: to start from; they stay as they are.
            rows: numbers of the queries to train on, (n,).
            loss: given tensors and the numbers of a batch of queries.
            validation_loss: given tensors.
            seed: of the batches.
            track: receives a row per epoch.
            label: names the run in rows and errors.

        Raises:
            FloatingPointError: a loss is not finite.
        """
        trained = {name: value.clone().requires_grad_() for name, value in tensors.items()}
        optimizer = torch.optim.AdamW(trained.values(), lr=self.lr, weight_decay=self.weight_decay)
        generator = torch.Generator().manual_seed(seed)
        best, best_loss, best_epoch = dict(tensors), math.inf, -1
        for epoch in range(-1, self.epochs):
            total = 0.0
            order = rows[torch.randperm(len(rows), generator=generator)]
            for batch in order.split(self.batch_size) if epoch >= 0 else ():
                value = loss(trained, batch)
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
                total += value.item() * len(batch)
            with torch.no_grad():
                held_out_loss = validation_loss(trained).item()
            if not math.isfinite(total + held_out_loss):
                raise FloatingPointError(
                    f"{label}: the loss is {total / len(rows)}, {held_out_loss} on queries held out, after epoch "
                    f"{epoch}; look at the embeddings, or lower training.lr"
                )
            if epoch >= 0:
                track({"run": label, "epoch": epoch, "loss": total / len(rows), "validation_loss": held_out_loss})
            if held_out_loss < best_loss:
                best_loss, best_epoch = held_out_loss, epoch
                best = {name: copy.deepcopy(value.detach()) for name, value in trained.items()}
            elif epoch - best_epoch >= self.patience:
                break
        return best
