"""What a session hands out: what may be observed of its rows, and what a step did to them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from envs.cache import IntArray
from envs.costs import FloatArray

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Observation:
    """What a router may see of n rows that await a decision.

    Attributes:
        hidden: the SLM's last hidden state after the final norm, float32, (n, width).
        logits: the SLM's next-token logits, (n, vocab).
        positions: tokens of the response written so far, (n,).
        episodes: a number for each row's episode, (n,); together with the position it names the decision.
    """

    hidden: Tensor
    logits: Tensor
    positions: IntArray
    episodes: IntArray


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
