"""What a router may see of a decision, and what a step did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from envs.arrays import UNKNOWN, BoolArray, FloatArray, IntArray

Features = Literal["hidden", "hidden_logits", "hidden_logits_history"]
FEATURES: tuple[Features, ...] = get_args(Features)
"""What can be seen, each the one before and more: as published; with logit features; with the history."""
CheckedFeatures = Literal["hidden", "hidden_logits", "hidden_logits_history", "hidden_logits_history_drafts", "drafts"]
CHECKED_FEATURES: tuple[CheckedFeatures, ...] = get_args(CheckedFeatures)
"""What can be seen where drafts are checked: also with what was drafted since the last call; and that alone."""
DRAFTS: CheckedFeatures = "drafts"
TOP = 10
"""Log-probabilities among the logit features."""
LOGIT_FEATURES = 1 + TOP
HISTORY_FEATURES = 2
DRAFT_FEATURES = 4


def check_features(features: str) -> Features:
    """`features` if it is one of FEATURES; an error that names them otherwise."""
    for known in FEATURES:
        if features == known:
            return known
    raise ValueError(f"unknown features {features!r}; choose one of {', '.join(FEATURES)}")


def check_checked_features(features: str) -> CheckedFeatures:
    """`features` if it is one of CHECKED_FEATURES; an error that names them otherwise."""
    for known in CHECKED_FEATURES:
        if features == known:
            return known
    raise ValueError(f"unknown features {features!r}; choose one of {', '.join(CHECKED_FEATURES)}")


def feature_width(features: str, width: int) -> int:
    """Numbers seen at a decision by a router of an SLM `width` wide."""
    if features == DRAFTS:
        return DRAFT_FEATURES
    added = (0, LOGIT_FEATURES, HISTORY_FEATURES, DRAFT_FEATURES)
    return width + sum(added[: CHECKED_FEATURES.index(check_checked_features(features)) + 1])


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
class Drafts:
    """What is known of the tokens that the SLM wrote since a larger model last read a response, for n responses.

    Attributes:
        counts: how many they are, (n,).
        entropies: sum of the entropies of the distributions they were chosen from, in nats, (n,).
        surprisals: sum of their -log p under the SLM, in nats, (n,).
        last_surprisals: -log p of the last one, (n,); 0 where there is none.
        ended: the last one ends the response, (n,): by an end-of-sequence token, or since there is room for no more.
        room: tokens that may still be written, (n,).
        runs: tokens that a larger model has written in a row, by calls with nothing drafted between them, (n,); 0 where
            the SLM wrote the last token, or nothing is written.
        corrected: whether the first of these stands where drafted tokens were taken back, (n,).
        last_tokens: ids of the last tokens of the responses, (n,); UNKNOWN where there is none.
        text_of: the text of a token.
    """

    counts: IntArray
    entropies: FloatArray
    surprisals: FloatArray
    last_surprisals: FloatArray
    ended: BoolArray
    room: IntArray
    runs: IntArray
    corrected: BoolArray
    last_tokens: IntArray
    text_of: Callable[[int], str] = field(repr=False, compare=False)

    def last_texts(self) -> list[str | None]:
        """The texts of the last tokens, n of them, each by itself; None where nothing is written."""
        return [None if token == UNKNOWN else self.text_of(token) for token in self.last_tokens.tolist()]

    def vector(self) -> Tensor:
        """log(1 + tokens drafted), the sums of entropies and of -log p, whether an end is drafted: float32, (n, 4)."""
        columns = (np.log1p(self.counts), self.entropies, self.surprisals, self.ended)
        return torch.from_numpy(np.stack([np.asarray(c, dtype=np.float32) for c in columns], axis=-1))


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

    Where drafts are checked, a drafted end of sequence is a decision too: `hidden` and the logits are then those it was
    written by, since nobody reads it. Rows whose states are not observed have a `hidden` of no width, and no logits.

    Attributes:
        hidden: as above.
        logits: as above.
        host_positions: `positions`, on the host.
        host_episodes: `episodes`, on the host.
        host_since_llm: `since_llm`, on the host.
        kept_logit_features: what `logit_features` are where the logits are not there.
        drafts: what was drafted since the last call; None where drafts are not checked.
        llm_prompt_states: as above.
        prompts: as above.
    """

    hidden: Tensor
    logits: Tensor | None
    host_positions: IntArray
    host_episodes: IntArray
    host_since_llm: IntArray
    kept_logit_features: Tensor | None = None
    drafts: Drafts | None = None
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
        level = CHECKED_FEATURES.index(check_checked_features(features))
        if level > 2 and self.drafts is None:
            raise ValueError(f"features {features} are those of checked drafts; there are none here")
        drafts = None if self.drafts is None else self.drafts.vector().to(self.hidden.device)
        if features == DRAFTS and drafts is not None:
            return drafts
        if not self.hidden.shape[-1]:
            raise ValueError(f"the rows are not observed: of them drafts are seen, not {features}")
        parts = [self.hidden.float()]
        if level > 0:
            parts.append(self.logit_features)
        if level > 1:
            parts.append(history_features(self.host_positions, self.host_since_llm).to(self.hidden.device))
        if level > 2 and drafts is not None:
            parts.append(drafts)
        return torch.cat(parts, dim=-1) if level else parts[0]


class TakenBack(NamedTuple):
    """Tokens that a model wrote and that were taken back, such as drafts that another model refused.

    Attributes:
        position: of the response, where the first of them stood.
        writer: the model that wrote them.
        tokens: their ids, (n,).
    """

    position: int
    writer: int
    tokens: IntArray


@dataclass(frozen=True)
class Checks:
    """What a step checked in n rows.

    Attributes:
        kept: drafted tokens that a larger model read and let stand, (n,).
        taken_back: what it took back, by the place of the row among the n.
    """

    kept: IntArray
    taken_back: Mapping[int, TakenBack]


@dataclass(frozen=True)
class Step:
    """What one routed step did to n rows.

    Attributes:
        tokens: the tokens written, (n,); UNKNOWN where none was, for an end that was drafted stands.
        slm_tokens: the tokens the SLM would have written (greedily), (n,).
        terminated: an end-of-sequence token was written, (n,).
        truncated: the limit of new tokens was reached without one, (n,).
        ledger: ledger entries of the step, (n, models, COLUMNS).
        checks: what was checked; None where nothing is.
    """

    tokens: IntArray
    slm_tokens: IntArray
    terminated: BoolArray
    truncated: BoolArray
    ledger: FloatArray
    checks: Checks | None = None
