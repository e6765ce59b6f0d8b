"""Which of the tokens that the SLM drafted stand, by what a larger model that has read them thinks of each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from typing import Any, ClassVar

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

    Attributes:
        whole: whether it judges a draft as a whole. `stands` is then given one draft at a time, and its answer is the
            same for all tokens.
    """

    whole: ClassVar[bool] = False

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


@dataclass(frozen=True)
class StepLikelihood(Judge):
    """A draft stands as a whole, or is taken back as a whole, by its likelihood under the larger model.

    What is compared is the mean over its tokens of log p(drafted) - log p(most likely): the draft's log-likelihood a
    token, less what it would be if each token were the larger model's own choice behind those before it.

    Args:
        threshold: the least mean that stands, in nats, at most 0; minus infinity: nothing is ever taken back; 0: every
            draft in which a token is less likely than another.

    Raises:
        ValueError: it is above 0, or not a number.
    """

    whole: ClassVar[bool] = True

    threshold: float = -0.1

    def __post_init__(self) -> None:
        if math.isnan(self.threshold) or self.threshold > 0:
            raise ValueError(f"threshold must be at most 0, is {self.threshold}")

    def stands(self, opinions: Opinions) -> BoolArray:
        return np.full(len(opinions), self._mean(opinions) >= self.threshold)

    def margin(self, opinions: Opinions) -> npt.NDArray[np.float32]:
        return np.full(len(opinions), abs(self._mean(opinions) - self.threshold), dtype=np.float32)

    def _mean(self, opinions: Opinions) -> float:
        return -float(opinions[:, GAP].mean(dtype=np.float64)) if len(opinions) else 0.0


@dataclass(frozen=True)
class Learned(Judge):
    """A token stands that a logistic model finds harmless; what the larger model would write itself always stands.

    The probability that a disagreement is harmless is sigmoid(bias + weights[0] gap + weights[1] log(1 + rank)).

    Args:
        weights: of the gap, in nats, and of the logarithm of the rank.
        bias: of the logistic model.
        threshold: the least probability that stands, in (0, 1).

    Raises:
        ValueError: a setting is not finite, or out of range.
    """

    weights: tuple[float, float] = (-1.0, 0.0)
    bias: float = 2.0
    threshold: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(float(weight) for weight in self.weights))  # a file gives a list
        if len(self.weights) != 2 or not all(map(math.isfinite, (*self.weights, self.bias))):
            raise ValueError(f"weights ({self.weights}) must be two finite numbers, and bias ({self.bias}) finite")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), is {self.threshold}")

    def stands(self, opinions: Opinions) -> BoolArray:
        return np.asarray((opinions[:, RANK] == 0) | (self._above(opinions) >= 0))

    def margin(self, opinions: Opinions) -> npt.NDArray[np.float32]:
        steep = abs(self.weights[0])
        nats = np.abs(self._above(opinions)) / steep if steep > 0 else np.full(len(opinions), np.inf)
        # what is taken back would also stand if it were no disagreement
        nats = np.where(self.stands(opinions), nats, np.minimum(nats, opinions[:, GAP]))
        return np.where(opinions[:, RANK] > 0, nats, np.inf).astype(np.float32)

    def _above(self, opinions: Opinions) -> npt.NDArray[np.float64]:
        """How far log-odds are above those of the threshold, (n,)."""
        gaps, ranks = (opinions[:, column].astype(np.float64) for column in (GAP, RANK))
        logits = self.bias + self.weights[0] * gaps + self.weights[1] * np.log1p(ranks)
        return np.asarray(logits - math.log(self.threshold / (1 - self.threshold)))


JUDGES: Mapping[str, type[Judge]] = {
    "first_disagreement": FirstDisagreement, "gap": Gap, "top_k": TopK, "step_likelihood": StepLikelihood,
    "learned": Learned,
}  # fmt: skip
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
