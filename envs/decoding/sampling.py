"""How a token is drawn from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from envs.arrays import FloatArray, IntArray


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a model's logits.

    Args:
        temperature: 0 is greedy.
        top_p: keep the most likely tokens whose probabilities sum to this (nucleus sampling).
    """

    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], is {self.top_p}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def draw(self, logits: Tensor, uniforms: FloatArray) -> IntArray:
        """One token a row from logits (n, vocab), by inverting the distribution function at `uniforms`, (n,)."""
        probabilities, tokens = (logits.double() / self.temperature).softmax(-1).sort(-1, descending=True)
        cumulative = probabilities.cumsum(-1)
        # a token stays while those before it do not reach top_p; the first always stays
        kept = torch.where(cumulative - probabilities < self.top_p, probabilities, 0.0).cumsum(-1)
        drawn = torch.from_numpy(uniforms).to(kept)[:, None] * kept[:, -1:]
        choice = (kept <= drawn).sum(-1, keepdim=True).clamp(max=kept.shape[-1] - 1)
        return np.asarray(tokens.gather(-1, choice)[:, 0].cpu().numpy())
