"""Which of the tokens that the SLM drafted stand, by what a larger model that has read them thinks of each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.arrays import BoolArray, IntArray

Opinions = npt.NDArray[np.float32]
"""What a model thinks of n tokens in their places, (n, OPINION)."""
GAP, RANK = range(2)
OPINION = 2
"""Numbers of an opinion:

    GAP    log p(most likely token) - log p(this token), in nats; 0 for the most likely one
    RANK   tokens that come before this one; 0 for the one that greedy decoding writes
"""


def opinions(logits: Tensor, tokens: IntArray) -> Tensor:
    """What next-token logits (n, vocab) say of tokens, (n,): float32, (n, OPINION), on the device of the logits."""
    logits = logits.float()
    best, greedy = logits.max(-1)
    chosen = torch.from_numpy(tokens).to(logits.device)
    own = logits.gather(-1, chosen[:, None])
    before = (logits > own).sum(-1)
    # of tokens that are equally likely greedy decoding writes one: the others come behind it
    rank = torch.where(chosen == greedy, before, before.clamp(min=1))
    return torch.stack([best - own[:, 0], rank.float()], dim=-1)


class Judge(ABC):
    """Says which drafted tokens a larger model lets stand.

    Of a draft the longest beginning stands in which each token does. A judge depends on nothing but the opinions, so
    that a prefix tree can keep these and be walked under any judge.
    """

    @abstractmethod
    def stands(self, opinions: Opinions) -> BoolArray:
        """Whether each of n tokens stands, (n,), by what the model thinks of it, (n, OPINION)."""

    def margin(self, opinions: Opinions) -> npt.NDArray[np.float32]:
        """How far each opinion is from the other verdict, (n,): nats where the judge weighs these, else infinite."""
        return np.full(len(opinions), np.inf, dtype=np.float32)

    def spares(self, opinions: Opinions) -> BoolArray:
        """Whether each of n tokens stands without a coin, (n,), where tokens are sampled.

        These are what the judge lets stand; the others stand with the probability of speculative sampling, see
        `Sampling.speculative`. A judge that spares some gives up the model's distribution.
        """
        return self.stands(opinions)


@dataclass(frozen=True)
class FirstDisagreement(Judge):
    """What the larger model would not have written itself is taken back: speculative decoding, without loss.

    Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding". Where tokens are sampled nothing
    is spared the coin of speculative sampling, which keeps the larger model's distribution.
    """

    def stands(self, opinions: Opinions) -> BoolArray:
        return np.asarray(opinions[:, RANK] == 0)

    def margin(self, opinions: Opinions) -> npt.NDArray[np.float32]:
        return np.where(opinions[:, RANK] > 0, opinions[:, GAP], np.inf).astype(np.float32)

    def spares(self, opinions: Opinions) -> BoolArray:
        return np.zeros(len(opinions), dtype=bool)


@dataclass(frozen=True)
class Gap(Judge):
    """A token is taken back that the larger model finds less likely than its own by more than `tau`.

    Args:
        tau: log p(most likely) - log p(drafted) that stands, in nats; infinite: nothing is ever taken back; 0: all that
            the model does not find as likely as its own token. Where tokens are sampled, p is still that of
            temperature 1, all tokens included.

    Raises:
        ValueError: it is below 0, or not a number.
    """

    tau: float = 2.0

    def __post_init__(self) -> None:
        if math.isnan(self.tau) or self.tau < 0:
            raise ValueError(f"tau must be at least 0, is {self.tau}")

    def stands(self, opinions: Opinions) -> BoolArray:
        return np.asarray(opinions[:, GAP] <= self.tau)

    def margin(self, opinions: Opinions) -> npt.NDArray[np.float32]:
        return np.asarray(np.abs(opinions[:, GAP] - np.float32(self.tau)), dtype=np.float32)


@dataclass(frozen=True)
class TopK(Judge):
    """A token stands that is among the larger model's `k` most likely ones; 1 is the greedy `FirstDisagreement`.

    Args:
        k: at least 1.

    Raises:
        ValueError: it is not.
    """

    k: int = 2

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"k must be at least 1, is {self.k}")

    def stands(self, opinions: Opinions) -> BoolArray:
        return np.asarray(opinions[:, RANK] < self.k)


JUDGES: Mapping[str, type[Judge]] = {"first_disagreement": FirstDisagreement, "gap": Gap, "top_k": TopK}
"""Judges by the names that settings and traces have for them."""


def described(judge: Judge) -> dict[str, Any]:
    """A judge as plain data: its name, or that of its class, and its settings."""
    known = [name for name, kind in JUDGES.items() if kind is type(judge)]
    settings: dict[str, Any] = asdict(judge) if is_dataclass(judge) else {}
    return {"name": known[0] if known else type(judge).__qualname__, **settings}


def judge_of(description: Mapping[str, Any]) -> Judge:
    """The judge that was `described`.

    Raises:
        ValueError: it is none of JUDGES, or its settings are not; the error says which there are.
    """
    settings = dict(description)
    kind = JUDGES.get(settings.pop("name", ""))
    if kind is None:
        raise ValueError(f"unknown judge {description.get('name')!r}; there are {', '.join(JUDGES)}")
    try:
        return kind(**settings)
    except TypeError as error:
        raise ValueError(f"{settings} are no settings of the judge {description['name']}") from error
