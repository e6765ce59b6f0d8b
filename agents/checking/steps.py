"""Policies whose calls last: the LLM writes some tokens, or a step, before the SLM goes on. Nothing is trained.

`Relay` hands over some tokens where the SLM is unsure of the next one, as RelayLLM does by a command; `Glimp` asks once
a step, as GlimpRouter does; `StepJudge` lets the SLM write a step and the LLM take it back as a whole, as SpecReason
and RSD do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

import numpy as np
import torch

from agents.checking.span import Span, ToEndOfStep, Tokens, drafts_of
from agents.common.policy import Observation, Policy, Scores
from envs.arrays import BoolArray
from envs.decoding.judges import Gap, Judge, StepLikelihood


@dataclass(frozen=True)
class Relay(Policy):
    """The LLM writes some tokens where the SLM is not sure of the next one.

    Huang et al. 2026, "RelayLLM: Efficient Reasoning via Collaborative Decoding", arXiv 2601.05167, where the SLM is
    trained to say so, and how many, by a command. Here the score is exp(-entropy) of the SLM's next token, entropy in
    nats, and their number is fixed. A drafted end is accepted.

    Args:
        judge: which drafted tokens stand at a call; by default all.
        span: how long the LLM writes once it is called.
    """

    judge: Judge = field(default_factory=partial(Gap, float("inf")))
    span: Span = field(default_factory=partial(Tokens, 4))

    def score(self, observation: Observation) -> Scores:
        drafts = drafts_of(observation)
        return self.span.hold(_sureness(observation, drafts.ended), drafts)


@dataclass(frozen=True)
class Glimp(Policy):
    """Once a step it is decided who writes it, by the entropy of the SLM's first token.

    Zeng et al. 2026, "GlimpRouter: Efficient Collaborative Inference by Glimpsing One Token of Thoughts", arXiv
    2601.05110. The score is exp(-entropy) where a step begins, entropy in nats, and 1 within one.

    Args:
        judge: which drafted tokens stand at a call; by default all.
        span: what a step is: the LLM writes to its end.
    """

    judge: Judge = field(default_factory=partial(Gap, float("inf")))
    span: ToEndOfStep = field(default_factory=ToEndOfStep)

    def score(self, observation: Observation) -> Scores:
        drafts = drafts_of(observation)
        return self.span.hold(_sureness(observation, drafts.ended | ~self.span.at_border(drafts)), drafts)


@dataclass(frozen=True)
class StepJudge(Policy):
    """The SLM writes a step, the LLM reads it and lets it stand or takes all of it back, and then writes it itself.

    Pan et al. 2025, "SpecReason: Fast and Accurate Inference-Time Compute via Speculative Reasoning", arXiv 2504.07891,
    and Liao et al. 2025, "Reward-Guided Speculative Decoding for Efficient LLM Reasoning", arXiv 2501.19324. Scores are
    1 where the SLM drafts on and 0 at the end of a step. The last token that there is room for is not drafted, as in
    speculative decoding. Behind a step that stands the LLM writes one token, which its pass has given anyway.

    Args:
        judge: whether a step stands.
        span: what a step is, and how long the LLM writes: to the end of a step that it took back.
    """

    observes: ClassVar[bool] = False

    judge: Judge = field(default_factory=StepLikelihood)
    span: ToEndOfStep = field(default_factory=partial(ToEndOfStep, corrections=True))

    def score(self, observation: Observation) -> Scores:
        drafts = drafts_of(observation)
        written = (drafts.counts > 0) & self.span.at_border(drafts)
        return self.span.hold(1.0 - (written | drafts.ended | (drafts.room <= 1)), drafts)


def _sureness(observation: Observation, passed: BoolArray) -> Scores:
    """exp(-entropy) of the SLM's next token, (n,); 1 at decisions that are `passed`, (n,)."""
    own = observation.logit_features[:, 0].double()
    return torch.exp(-own).masked_fill(torch.from_numpy(np.asarray(passed)).to(own.device), 1.0)
