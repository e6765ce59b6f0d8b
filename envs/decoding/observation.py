"""What a router may see of a decision, and what a step did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from envs.arrays import BoolArray, FloatArray, IntArray

Features = Literal["hidden", "hidden_logits", "hidden_logits_history"]
FEATURES: tuple[Features, ...] = get_args(Features)
"""What can be seen, each the one before and more: as published; with logit features; with the history."""
TOP = 10
"""Log-probabilities among the logit features."""
LOGIT_FEATURES = 1 + TOP
HISTORY_FEATURES = 2


def check_features(features: str) -> Features:
    """`features` if it is one of FEATURES; an error that names them otherwise."""
    for known in FEATURES:
        if features == known:
            return known
    raise ValueError(f"unknown features {features!r}; choose one of {', '.join(FEATURES)}")


def feature_width(features: str, width: int) -> int:
    """Numbers seen at a decision by a router of an SLM `width` wide."""
    widths = (width, width + LOGIT_FEATURES, width + LOGIT_FEATURES + HISTORY_FEATURES)
    return widths[FEATURES.index(check_features(features))]


def entropy(log_probabilities: Tensor) -> Tensor:
    """Entropy in nats, (n,), of distributions given by their log-probabilities, (n, vocab)."""
    return -(log_probabilities.exp() * log_probabilities.clamp(min=-1e9)).sum(-1)


def logit_features(logits: Tensor) -> Tensor:
    """Entropy (nats) and the TOP largest log-probabilities of next-token logits (n, vocab): float32, (n, 1 + TOP)."""
    log_probabilities = logits.float().log_softmax(-1)
    # far below what float16 and a router can tell apart
    top = log_probabilities.topk(TOP, dim=-1).values.clamp(min=-50)
    return torch.cat([entropy(log_probabilities)[:, None], top], dim=-1)


def all_features(hidden: Tensor, logits: Tensor) -> Tensor:
    """Hidden states (n, width), then logit features: float32, (n, width + 1 + TOP)."""
    return torch.cat([hidden.float(), logit_features(logits)], dim=-1)


def history_features(positions: IntArray, since_llm: IntArray) -> Tensor:
    """Logarithms of 1 + the tokens written, and of 1 + those since the LLM last wrote: float32, (n, 2)."""
    counts = torch.stack([torch.from_numpy(positions), torch.from_numpy(since_llm)], dim=-1)
    return counts.float().log1p()


@dataclass(frozen=True)
class Observation:
    """What a policy may see of n responses that await a decision, n differing from one call to the next.

    What is tensors is on one device, the SLM's:

    | | type, shape | |
    |---|---|---|
    | `hidden` | float32, (n, width) | the SLM's last hidden state, after the final norm |
    | `logit_features` | float32, (n, 11) | entropy (nats) and the 10 largest log-probabilities of its next token |
    | `logits` | the SLM's, (n, vocab), or None | its next-token logits; a replay tree keeps only their features |
    | `positions` | int64, (n,) | tokens of the response written so far |
    | `since_llm` | int64, (n,) | tokens since another model than the SLM last wrote, or since the response began |
    | `episodes` | int64, (n,) | a number for the response; with its position it names the decision |
    | `llm_prompt_states` | float32, (n, LLM's width), or None | the LLM's last hidden state behind the prompt |
    | `prompts` | n texts, or None | of the prompts |

    The last two are there for a policy that `sees` them; the LLM reads the prompt for it, which is part of the cost.

    `vector(features)` puts them together as a network reads them. Counts are kept on the host, where they are made, and
    copied when they are asked for: `host_positions`, `host_since_llm` and `host_episodes` are the same numbers as numpy
    arrays, for what is looked up by number, which on a GPU then waits for nothing.

    Attributes:
        hidden: as above.
        logits: as above.
        host_positions: `positions`, on the host.
        host_episodes: `episodes`, on the host.
        host_since_llm: `since_llm`, on the host.
        kept_logit_features: what `logit_features` are where the logits are not there.
        llm_prompt_states: as above.
        prompts: as above.
    """

    hidden: Tensor
    logits: Tensor | None
    host_positions: IntArray
    host_episodes: IntArray
    host_since_llm: IntArray
    kept_logit_features: Tensor | None = None
    llm_prompt_states: Tensor | None = None
    prompts: Sequence[str] | None = None

    def __len__(self) -> int:
        """The number of decisions, n."""
        return len(self.hidden)

    @property
    def positions(self) -> Tensor:
        """Tokens of the response written so far, int64, (n,)."""
        return self._on_device(self.host_positions)

    @property
    def episodes(self) -> Tensor:
        """A number for each row's episode, int64, (n,)."""
        return self._on_device(self.host_episodes)

    @property
    def since_llm(self) -> Tensor:
        """Tokens since another model than the SLM last wrote, or since the response began, int64, (n,)."""
        return self._on_device(self.host_since_llm)

    def _on_device(self, counts: IntArray) -> Tensor:
        # on the CPU it shares the memory; to a GPU it is copied without waiting for what runs there
        return torch.from_numpy(counts).to(self.hidden.device)

    @property
    def logit_features(self) -> Tensor:
        """Entropy (nats) and top log-probabilities of the SLM's next token, float32, (n, 1 + TOP)."""
        if self.logits is not None:
            return logit_features(self.logits)
        assert self.kept_logit_features is not None
        return self.kept_logit_features

    def vector(self, features: str) -> Tensor:
        """What a router of these `features` reads, one row a decision, float32, (n, feature_width)."""
        level = FEATURES.index(check_features(features))
        parts = [self.hidden.float()]
        if level > 0:
            parts.append(self.logit_features)
        if level > 1:
            parts.append(history_features(self.host_positions, self.host_since_llm).to(self.hidden.device))
        return torch.cat(parts, dim=-1) if level else parts[0]


@dataclass(frozen=True)
class Step:
    """What one routed step did to n rows.

    Attributes:
        tokens: the tokens written, (n,).
        slm_tokens: the tokens the SLM would have written (greedily), (n,).
        terminated: an end-of-sequence token was written, (n,).
        truncated: the limit of new tokens was reached without one, (n,).
        ledger: ledger entries of the step, (n, models, COLUMNS).
    """

    tokens: IntArray
    slm_tokens: IntArray
    terminated: BoolArray
    truncated: BoolArray
    ledger: FloatArray
