"""Speculative decoding: what the LLM would write, for less than it takes alone; the price to beat.

Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding": the SLM drafts a few tokens, the LLM
reads them all in one pass, which tells what it would have written in the place of each, and the first that it would not
have written is replaced by its own. Of the checked process it is the policy that calls after so many tokens, or behind
a token that the SLM was not sure of, and takes back at the first disagreement. Where tokens are sampled, they are
distributed as the LLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np

from agents.checking.span import Span, SpanningPolicy, Tokens, drafts_of
from agents.common.policy import Observation, Scores
from agents.common.rollout import Episode, Scheduling, decode
from envs.costs import COLUMNS
from envs.decoding.judges import FirstDisagreement, Gap, Judge
from envs.decoding.sampling import Sampling
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Example, Task


@dataclass(frozen=True)
class Speculative(SpanningPolicy):
    """Calls the LLM behind a draft; scores are 1 where the SLM drafts on and 0 where it is called.

    A drafted end is checked. The last token that there is room for is not drafted: the LLM writes one behind a draft.

    Args:
        draft_tokens: the longest draft.
        confidence: a draft ends behind a token whose probability under the SLM is below this; 0: at no token.
        judge: which drafted tokens stand; without loss those that the LLM would have written.
        span: how long the LLM writes once it is called.

    Raises:
        ValueError: a setting out of range.
    """

    observes: ClassVar[bool] = False

    draft_tokens: int = 16
    confidence: float = 0.0
    judge: Judge = field(default_factory=FirstDisagreement)
    span: Span = field(default_factory=Tokens, repr=False)

    def __post_init__(self) -> None:
        if self.draft_tokens < 1:
            raise ValueError(f"draft_tokens must be at least 1, is {self.draft_tokens}")
        if not 0 <= self.confidence <= 1:
            raise ValueError(f"confidence must be in [0, 1], is {self.confidence}")

    def score(self, observation: Observation) -> Scores:
        drafts = drafts_of(observation)
        unsure = np.where(drafts.counts > 0, np.exp(-drafts.last_surprisals), 1.0) < self.confidence
        at_its_end = drafts.ended | (drafts.counts >= self.draft_tokens) | (drafts.room <= 1)
        scores = 1.0 - (unsure | at_its_end)
        return self.span.hold(scores, drafts)


@dataclass(frozen=True)
class RelaxedAcceptance(Speculative):
    """The same, but for the judge: a drafted token is accepted that the LLM finds almost as likely as its own.

    Args:
        draft_tokens: the longest draft.
        confidence: a draft ends behind a token whose probability under the SLM is below this; 0: at no token.
        judge: which drafted tokens stand.
        span: how long the LLM writes once it is called.
    """

    judge: Judge = field(default_factory=Gap)


def speculate(
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    draft_tokens: int = 16,
    max_new_tokens: int = 128,
    scheduling: Scheduling | None = None,
    label: str | None = None,
    tree: PrefixTree | None = None,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[Episode]:
    """Answer every example with the tokens the LLM alone would write, most of them drafted by the SLM.

    Where tokens are sampled, they are others than the LLM alone draws by the same seed, from the same distribution.

    Drafts that are right count as the SLM's tokens. The ledger has each pass that was made, those for drafts that were
    forgotten too: that is the price of speculation. An LLM pass that checks needs its output head at every drafted
    position, where the ledger counts it once, as for any pass.

    Args:
        pool: the models; the first drafts, the last one checks.
        task: judges the answers.
        examples: what to answer; their positions number the episodes.
        draft_tokens: how many tokens the SLM drafts before the LLM checks them; fewer where it ends the response or
            nears its limit.
        max_new_tokens: the longest response.
        scheduling: how rows share passes.
        label: of the progress bar; none is shown without.
        tree: a replay tree of this pool and task to walk instead of decoding; nothing is timed then.
        sampling: greedy where None.
        seed: of sampled decoding.

    Returns:
        Episodes in the order of `examples`, with the drafts that were refused as what was taken back. Counting is no
        decision: decisions and scores are zeros.

    Raises:
        ValueError: there are no examples or draft tokens, a prompt does not fit the cache, or tokens are sampled with a
            tree.
    """
    policy = Speculative(draft_tokens)
    episodes = decode(
        pool,
        task,
        examples,
        policy,
        0.5,
        max_new_tokens,
        scheduling or Scheduling(gather=1.0),
        sampling,
        seed,
        label=label,
        tree=tree,
    )
    return [
        replace(one, decisions=np.zeros(COLUMNS), scores=np.zeros(len(one.tokens), dtype=np.float32))
        for one in episodes
    ]
