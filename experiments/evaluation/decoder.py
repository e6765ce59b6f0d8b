"""Decoding the same examples again and again: by policies, speculatively, by search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from agents.checking.speculative import speculate
from agents.common.policy import Policy
from agents.common.rollout import Episode, Scheduling, decode
from agents.heuristics import Always
from agents.oracle import Oracle, SearchResult
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import PrefixTree
from envs.tasks.task import Example, Task


@dataclass(frozen=True)
class ExampleDecoder:
    """Answers one set of examples in every way that is compared.

    Args:
        pool: the models.
        task: judges the answers.
        examples: what is answered.
        max_new_tokens: the longest answer.
        scheduling: how rows share passes.
        tree: a replay tree to decode through; nothing is timed then.
        first: the number of the first example, where others are answered elsewhere.
    """

    pool: ModelPool
    task: Task
    examples: Sequence[Example]
    max_new_tokens: int = 128
    scheduling: Scheduling = field(default_factory=Scheduling)
    tree: PrefixTree | None = None
    first: int = 0

    @property
    def timed(self) -> bool:
        """Whether the seconds of passes are measured."""
        return self.tree is None

    def on(self, examples: Sequence[Example]) -> ExampleDecoder:
        """The same for other examples."""
        return replace(self, examples=examples, first=0)

    def decode(self, policy: Policy, threshold: float, label: str | None = None) -> list[Episode]:
        """Answer every example; `label` names the progress bar, none is shown where None."""
        return decode(
            self.pool,
            self.task,
            self.examples,
            policy,
            threshold,
            self.max_new_tokens,
            self.scheduling,
            label=label,
            tree=self.tree,
            first=self.first,
        )

    def llm_only(self, label: str | None = None) -> list[Episode]:
        """Answer every example by the LLM alone; the ledgers hold its work and no other model's."""
        return [by_llm_alone(episode) for episode in self.decode(Always(slm=False), 0.5, label)]

    def speculate(self, draft_tokens: int) -> list[Episode]:
        """Answer every example by speculative decoding."""
        return speculate(
            self.pool,
            self.task,
            self.examples,
            draft_tokens,
            self.max_new_tokens,
            self.scheduling,
            "speculative",
            self.tree,
        )

    def search(self, oracle: Oracle) -> tuple[PrefixTree, list[SearchResult]]:
        """The cheapest right answer to every example, and the tree it stands in: that which is decoded through."""
        tree = PrefixTree(self.pool, self.task, self.max_new_tokens) if self.tree is None else self.tree
        return tree, oracle.search(tree, self.examples)


def by_llm_alone(episode: Episode) -> Episode:
    """A routed answer in which the LLM wrote everything, less the reading of the SLM: LLM-only decoding runs none."""
    ledger = episode.ledger.copy()
    ledger[:-1] = 0
    return replace(episode, ledger=ledger)
