"""What a session hands out: what may be observed of its rows, and what a step did to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.cache import IntArray
from envs.costs import FloatArray
from envs.features import FEATURES, check_features, history_features, logit_features

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Observation:
    """What a router may see of n rows that await a decision.

    Attributes:
        hidden: the SLM's last hidden state after the final norm, float32, (n, width).
        logits: the SLM's next-token logits, (n, vocab); None where a replay tree kept their features alone.
        positions: tokens of the response written so far, (n,).
        episodes: a number for each row's episode, (n,); together with the position it names the decision.
        since_llm: tokens since another model than the SLM last wrote, or since the response began, (n,).
        kept_logit_features: what `logit_features` are where the logits are not there.
    """

    hidden: Tensor
    logits: Tensor | None
    positions: IntArray
    episodes: IntArray
    since_llm: IntArray
    kept_logit_features: Tensor | None = None

    @property
    def logit_features(self) -> Tensor:
        """Entropy and top log-probabilities of the SLM's next token, float32, (n, 1 + TOP)."""
        if self.logits is not None:
            return logit_features(self.logits)
        assert self.kept_logit_features is not None
        return self.kept_logit_features

    def seen(self, features: str) -> Tensor:
        """What a router of these `features` sees, float32, (n, feature_width)."""
        level = FEATURES.index(check_features(features))
        parts = [self.hidden.float()]
        if level > 0:
            parts.append(self.logit_features)
        if level > 1:
            parts.append(history_features(self.positions, self.since_llm).to(self.hidden.device))
        return torch.cat(parts, dim=-1) if level else parts[0]


def since_at_each(writers: npt.NDArray[np.int8]) -> IntArray:
    """Tokens since another model than the SLM last wrote, or since the response began, before each token: (n,)."""
    positions = np.arange(len(writers))
    last = np.maximum.accumulate(np.where(writers > 0, positions, -1))
    return np.asarray(positions - np.concatenate([[-1], last])[: len(writers)] - 1)


def since_llm(writers: npt.NDArray[np.int8]) -> int:
    """Tokens since another model than the SLM last wrote, or since the response began; writers (n,)."""
    return int(since_at_each(np.append(writers, 0))[-1])


@dataclass(frozen=True)
class Step:
    """What one routed step did to n rows.

    Attributes:
        tokens: the tokens written, (n,).
        slm_tokens: the tokens the SLM would have written (greedily), (n,).
        terminated: an end-of-sequence token was written, (n,).
        truncated: the limit of new tokens was reached without one, (n,).
        work: ledger entries of the step, (n, models, COLUMNS).
    """

    tokens: IntArray
    slm_tokens: IntArray
    terminated: BoolArray
    truncated: BoolArray
    work: FloatArray
