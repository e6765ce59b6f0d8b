"""States on the oracle's paths, which a router learns from: as nodes of a tree, and as what the router sees of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from agents.oracle import SearchResult
from agents.preferences.store import FEATURES, Columns, PreferenceStore
from agents.router.dataset import LabelledTokens
from envs.arrays import BoolArray, IntArray
from envs.decoding.decoder import since_at_each
from envs.prefix_tree.tree import PrefixTree
from envs.prefix_tree.tree_session import observation_at


@dataclass(frozen=True)
class OracleStates:
    """States of a tree with the oracle's choice in each.

    Attributes:
        nodes: (n,).
        since_llm: tokens since the LLM last wrote, (n,).
        prefers_slm: the oracle's choice, (n,).
        examples: the number of the problem each is from, (n,).
    """

    nodes: IntArray
    since_llm: IntArray
    prefers_slm: BoolArray
    examples: IntArray

    @classmethod
    def of(cls, searches: Sequence[SearchResult], problems: Sequence[int]) -> OracleStates:
        """The states on the paths of solved searches, each of the problem of that number."""
        solved = [(search, number) for search, number in zip(searches, problems, strict=True) if search.solved]
        nothing: IntArray = np.zeros(0, dtype=np.int64)
        writers = [search.writers[-(len(search.nodes) - 1) :] for search, _ in solved]
        since = [since_at_each(search.writers)[-(len(search.nodes) - 1) :] for search, _ in solved]
        return cls(
            np.concatenate([nothing, *(search.nodes[:-1] for search, _ in solved)]),
            np.concatenate([nothing, *since]),
            np.concatenate([nothing, *writers]) == 0,
            np.concatenate([nothing, *(np.full(len(w), n) for w, (_, n) in zip(writers, solved, strict=True))]),
        )

    def features(self, tree: PrefixTree, features: str) -> Tensor:
        """What a router of these `features` sees of them: float16, (n, width)."""
        return observation_at(tree, self.nodes, self.since_llm).vector(features).half()


@dataclass(frozen=True)
class SearchedStates:
    """What a router sees of states, and the oracle's choice in each.

    Attributes:
        features: float16, (n, width).
        prefers_slm: the oracle's choice, (n,).
        examples: the number of the problem each is from, (n,).
        about: how the searches went, as `searches_said` has it.
    """

    features: Tensor
    prefers_slm: BoolArray
    examples: IntArray
    about: Mapping[str, int]

    @classmethod
    def of(
        cls, searches: Sequence[SearchResult], problems: Sequence[int], tree: PrefixTree, features: str
    ) -> SearchedStates:
        """The states on the paths of searches in a tree, each of the problem of that number.

        Raises:
            ValueError: the tree had to forget states.
        """
        # a forgotten state's number names another one
        if tree.evictions:
            raise ValueError(
                f"the tree's memory of {tree.memory} bytes does not hold the searches of {len(searches)} problems; "
                "raise memory or lower examples"
            )
        states = OracleStates.of(searches, problems)
        return cls(states.features(tree, features), states.prefers_slm, states.examples, searches_said(searches))

    @classmethod
    def kept(cls, store: PreferenceStore) -> SearchedStates:
        """Those that a store holds."""
        return cls(
            torch.cat([store.features(shard) for shard in range(store.shards)]),
            store.column("label") == 1,
            store.column("example").astype(np.int64),
            searches_kept(store),
        )

    def columns(self) -> tuple[Columns, dict[str, Any]]:
        """As a shard of a store, and the note beside it."""
        columns: Columns = {
            "example": self.examples.astype(np.int32),
            "label": self.prefers_slm.astype(np.int8),
            FEATURES: self.features.numpy(),
        }
        return columns, {"searches": dict(self.about), "skipped": []}

    def joined(self, other: SearchedStates) -> Self:
        """Both together; how the searches of the other one went."""
        return type(self)(
            torch.cat([self.features, other.features]),
            np.concatenate([self.prefers_slm, other.prefers_slm]),
            np.concatenate([self.examples, other.examples]),
            other.about,
        )

    def labelled(self) -> LabelledTokens:
        """As a router is trained on them."""
        return LabelledTokens.in_memory(self.features, self.prefers_slm, self.examples)


def searches_kept(store: PreferenceStore) -> dict[str, int]:
    """How the searches went that a store holds, as `searches_said` has it: from its notes, no state is read."""
    notes = [store.note(shard)["searches"] for shard in range(store.shards)]
    return {key: sum(note[key] for note in notes) for key in searches_said([])}


def searches_said(searches: Sequence[SearchResult]) -> dict[str, int]:
    """How many searches there were, how many were solved, ran out of budget, and how many answers they tried."""
    return {
        "searches": len(searches),
        "solved": sum(search.solved for search in searches),
        "exhausted": sum(search.exhausted for search in searches),
        "tried": sum(search.walks for search in searches),
    }
