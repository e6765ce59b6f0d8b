"""How a token is drawn from logits, and how drafts are checked that were drawn from other ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from envs.arrays import UNKNOWN, BoolArray, FloatArray, IntArray


class SpeculativeSample(NamedTuple):
    """What one draft came to.

    Attributes:
        kept: how many drafted tokens stand.
        token: drawn to stand behind them; UNKNOWN where nothing is to follow.
    """

    kept: int
    token: int


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn from a model's logits.

    Args:
        temperature: 0 is greedy.
        top_p: keep the most likely tokens whose probabilities sum to this (nucleus sampling), of those `top_k` keeps.
        top_k: keep this many of the most likely tokens; all where None.
        min_p: keep tokens at least this likely, relative to the most likely one (0: all).
        models: instead of all that, the sampling of each model of the pool, SLM first.

    Raises:
        ValueError: a setting out of range, or `models` beside others.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float = 0.0
    models: Sequence[Sampling] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", tuple(self.models))
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, is {self.top_k}; leave it out to keep all tokens")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], is {self.min_p}")
        if self.models and (replace(self, models=()) != Sampling() or any(one.models for one in self.models)):
            raise ValueError("models says how each model is sampled, once and with nothing beside it")
        if self.temperature < 0:
            raise ValueError(f"temperature must be >= 0, is {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], is {self.top_p}")

    @property
    def greedy(self) -> bool:
        return all(one.greedy for one in self.models) if self.models else self.temperature == 0

    @property
    def warmest(self) -> float:
        """The highest temperature of a model."""
        return max((one.temperature for one in self.models), default=self.temperature)

    def of(self, model: int) -> Sampling:
        """The sampling of model number `model` of the pool."""
        return self.models[model] if self.models else self

    def check_models(self, count: int) -> Sampling:
        """The sampling itself, if it is one for a pool of `count` models; ValueError otherwise."""
        if self.models and len(self.models) != count:
            raise ValueError(f"sampling says how {len(self.models)} models are sampled, the pool has {count}")
        return self

    def draw(self, logits: Tensor, uniforms: FloatArray) -> IntArray:
        """One token a row from logits (n, vocab), by inverting the distribution function at `uniforms`, (n,)."""
        kept, tokens = self._nucleus(logits)
        return np.asarray(tokens.gather(-1, _inverted(kept, uniforms))[:, 0].cpu().numpy())

    def probabilities(self, logits: Tensor) -> Tensor:
        """What `draw` draws from, for logits (n, vocab): float64, (n, vocab)."""
        if self._keeps_all:
            return (logits.double() / self.temperature).softmax(-1)
        kept, tokens = self._nucleus(logits)
        chances = torch.zeros(logits.shape, dtype=kept.dtype, device=kept.device)
        return chances.scatter_(-1, tokens, kept / kept.sum(-1, keepdim=True))

    def speculative(
        self,
        drafts: IntArray,
        slm: Sequence[Tensor],
        llm: Tensor,
        spared: BoolArray,
        generator: np.random.Generator,
        model: int = 1,
    ) -> SpeculativeSample:
        """Check drafts that one model has drawn by what another thinks of them: speculative sampling.

        In their order draft i stands with probability min(1, p_i / q_i), where p is the distribution of the model that
        checks and q that of the one that has drafted. In the place of the first that does not, a token is drawn from
        norm(max(0, p - q)); where all stand, one is drawn from p. So each token written is distributed as p, whatever q
        is, as long as none is spared.

        Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1; Chen et al.
        2023, "Accelerating Large Language Model Decoding with Speculative Sampling", algorithm 2.

        Args:
            drafts: the tokens drafted, (n,).
            slm: n logits, (vocab,), that they were drawn from.
            llm: logits in their places and behind them, (n + 1, vocab); (n, vocab) where nothing is to follow.
            spared: which stand whatever their probabilities, (n,).
            generator: gives a number for each draft that is not spared, and one for the token drawn.
            model: number in the pool of the model that checks.
        """
        asked = np.flatnonzero(~spared)
        coins = generator.random(len(asked))
        kept = len(drafts)
        if len(asked):
            p = self.of(model).probabilities(llm[torch.from_numpy(asked).to(llm.device)])
            q = self.of(0).probabilities(torch.stack([slm[i] for i in asked.tolist()]).to(llm.device))
            chosen = torch.from_numpy(drafts[asked]).to(llm.device)[:, None]
            both = torch.cat([p.gather(-1, chosen), q.gather(-1, chosen)], dim=-1).cpu().numpy()
            refused = np.flatnonzero(coins * both[:, 1] >= both[:, 0])
            if len(refused):
                kept = int(asked[refused[0]])
                left = (p[refused[0]] - q[refused[0]]).clamp(min=0)[None]
                if bool((left > 0).any()):
                    return SpeculativeSample(kept, int(_inverted(left, generator.random(1))))
                # a difference of rounding alone: both are the same distribution
        if kept == len(llm):
            return SpeculativeSample(kept, UNKNOWN)
        return SpeculativeSample(kept, int(self.of(model).draw(llm[kept : kept + 1], generator.random(1))[0]))

    @property
    def _keeps_all(self) -> bool:
        """Whether every token may be drawn."""
        return self.temperature > 0 and self.top_p == 1 and self.top_k is None and self.min_p == 0

    def _nucleus(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities, most likely first, 0 where a token is not to be drawn, and the tokens: (n, k) both."""
        if self.temperature == 0:  # one of models that are not all greedy
            tokens = logits.argmax(-1, keepdim=True)
            return torch.ones_like(tokens, dtype=torch.float64), tokens
        probabilities, tokens = (logits.double() / self.temperature).softmax(-1).sort(-1, descending=True)
        if self.top_k is not None:
            probabilities, tokens = probabilities[:, : self.top_k], tokens[:, : self.top_k]
            probabilities = probabilities / probabilities.sum(-1, keepdim=True)
        cumulative = probabilities.cumsum(-1)
        # a token stays while those before it do not reach top_p; the first always stays
        stays = cumulative - probabilities < self.top_p
        if self.min_p > 0:
            stays &= probabilities >= self.min_p * probabilities[:, :1]
        return torch.where(stays, probabilities, 0.0), tokens


def _inverted(weights: Tensor, uniforms: FloatArray) -> Tensor:
    """Where the distribution functions of weights, (n, k), reach `uniforms`, (n,): (n, 1)."""
    cumulative = weights.cumsum(-1)
    drawn = torch.from_numpy(uniforms).to(cumulative)[:, None] * cumulative[:, -1:]
    return (cumulative <= drawn).sum(-1, keepdim=True).clamp(max=cumulative.shape[-1] - 1)
