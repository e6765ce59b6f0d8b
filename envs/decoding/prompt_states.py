"""What models other than the SLM make of prompts, kept for policies that see it and for the first token."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from envs.arrays import BoolArray, IntArray


class PromptStates:
    """States and logits behind prompts, of models that have read them before anything was written.

    Memory is taken when a model first reads one.

    Args:
        rows: of the session.
        models: of the pool.

    Attributes:
        known: which model's are there, (rows, models).
    """

    def __init__(self, rows: int, models: int) -> None:
        self.known: BoolArray = np.zeros((rows, models), dtype=bool)
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(self, model: int, rows: IntArray, hidden: Tensor, logits: Tensor) -> None:
        """Keep what a model makes of the prompts of rows, (n,): states (n, width) and logits (n, vocab)."""
        if model not in self._kept:
            states = torch.zeros(len(self.known), hidden.shape[1], device=hidden.device)
            chances = torch.zeros(len(self.known), logits.shape[1], dtype=logits.dtype, device=logits.device)
            self._kept[model] = states, chances
        for kept, made in zip(self._kept[model], (hidden, logits), strict=True):
            kept[torch.from_numpy(rows).to(kept.device)] = made.to(kept)
        self.known[rows, model] = True

    def states(self, model: int, rows: IntArray) -> Tensor:
        """The states of a model behind the prompts of rows, (n,): a copy, float32, (n, width)."""
        states = self._kept[model][0]
        return states[torch.from_numpy(rows).to(states.device)]

    def logits(self, model: int, rows: IntArray) -> Tensor:
        """Its logits there: a copy, (n, vocab)."""
        logits = self._kept[model][1]
        return logits[torch.from_numpy(rows).to(logits.device)]

    def copy(self, sources: IntArray, targets: IntArray) -> None:
        """Let rows, (n,), hold what others do."""
        self.known[targets] = self.known[sources]
        for kept in (part for parts in self._kept.values() for part in parts):
            kept[torch.from_numpy(targets).to(kept.device)] = kept[torch.from_numpy(sources).to(kept.device)]

    def forget(self, rows: IntArray) -> None:
        """Forget what rows, (n,), hold."""
        self.known[rows] = False
