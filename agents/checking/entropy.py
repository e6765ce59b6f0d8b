"""When the LLM is called by the SLM's own entropy; nothing is trained."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from agents.checking.span import Span, SpanningPolicy, Tokens, drafts_of
from agents.common.policy import Observation, Scores
from envs.decoding.judges import Gap, Judge


@dataclass(frozen=True)
class CheckedEntropy(SpanningPolicy):
    """Calls the LLM before the entropies of the draft sum up to too much; the end of a response is always checked.

    The score is exp(-sum), where the sum is over the tokens drafted since the last call and the one that would be
    drafted next, in nats, and 0 at a drafted end. With each token's entropy in place of -log(1 - risk) it stands for
    the probability that the whole draft stands.

    Args:
        judge: which drafted tokens stand.
        span: how long the LLM writes once it is called.
    """

    judge: Judge = field(default_factory=Gap)
    span: Span = field(default_factory=Tokens, repr=False)

    def score(self, observation: Observation) -> Scores:
        drafts = drafts_of(observation)
        own = observation.logit_features[:, 0].double()
        total = torch.from_numpy(drafts.entropies).to(own.device) + own
        scores = torch.where(torch.from_numpy(drafts.ended).to(own.device), 0.0, torch.exp(-total))
        return self.span.hold(scores, drafts)
