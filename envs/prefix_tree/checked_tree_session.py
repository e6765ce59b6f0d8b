"""Checking drafts along a prefix tree: known states and known opinions are array work."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from envs.arrays import UNKNOWN, IntArray
from envs.costs import WRITTEN, pass_entry
from envs.decoding.checking import END, NO_END, Called, CheckingDecoder, standing
from envs.decoding.judges import GAP, FirstDisagreement, Judge
from envs.decoding.observation import Observation, Step
from envs.prefix_tree.tree import TERMINATED, PrefixTree
from envs.prefix_tree.tree_session import TreeSession, observation_at


class CheckedTreeSession(CheckingDecoder, TreeSession):
    """Walks a tree as `CheckedSession` decodes: the same tokens, endings, observations and ledger, but for seconds.

    Args:
        tree: what is known, and gains what is not.
        rows: sequences in flight.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
        judge: says which drafted tokens stand; `FirstDisagreement` where None.

    Raises:
        ValueError: the tree's memory cannot hold the sequences in flight.
    """

    def __init__(self, tree: PrefixTree, rows: int, capacity: int | None = None, judge: Judge | None = None) -> None:
        super().__init__(tree, rows, capacity)
        self.judge = judge or FirstDisagreement()

    def observe(self, rows: IntArray) -> Observation:
        """What a policy may see of `rows`, (n,), all of them observed or none; see `CheckedSession.observe`."""
        rows = np.asarray(rows, dtype=np.int64)
        since, drafts = self._since_llm[rows], self.drafts(rows)
        if not self._observed[rows].all():
            positions, hidden = self._lengths[rows] - self._prompt_lengths[rows], torch.zeros(len(rows), 0)
            return Observation(hidden, None, positions, self._episodes[rows], since, drafts=drafts)
        self._check_followed(rows)
        seen = observation_at(self.tree, self._read_nodes(rows), since, self._episodes[rows], drafts)
        # a drafted end of sequence stands behind the state that is seen
        seen.host_positions[:] = self.tree.depths[self._nodes[rows]]
        return seen

    def look_back(self, rows: IntArray, observation: Observation) -> Observation:
        """See `CheckingDecoder`."""
        nodes = self._nodes[rows]
        nodes = np.where(self._since_llm[rows] > 0, self.tree.parents[nodes], nodes)
        seen = observation_at(self.tree, nodes, observation.host_since_llm, observation.host_episodes)
        return replace(observation, hidden=seen.hidden, kept_logit_features=seen.kept_logit_features)

    def _read_nodes(self, rows: IntArray) -> IntArray:
        """The nodes of what the SLM reads of rows, (n,): of a drafted end of sequence the one before it."""
        nodes = self._nodes[rows]
        ended = self._ends[rows] == END
        return np.where(ended, self.tree.parents[nodes], nodes) if ended.any() else nodes

    def _draft(self, rows: IntArray) -> Step:
        width = self.pool.slm.width
        # the first logit features: entropy, and the log-probability of the token that is drafted
        known = self.tree.features(self._nodes[rows])[:, width : width + 2].astype(np.float64)
        step = self._walk(rows, np.zeros_like(rows))
        return self._enter_drafts(rows, known[:, 0], -known[:, 1], step, step.tokens.copy())

    def _call(self, rows: IntArray, models: IntArray) -> Called:
        tree, nodes, counts, whole = self.tree, self._nodes[rows], self._since_llm[rows], self._lengths[rows]
        # the nodes each drafted token was written at, draft after draft, and where its first one stands among them
        starts, begun = np.cumsum(counts) - counts, whole - self._prompt_lengths[rows] - counts
        depths = np.arange(counts.sum()) + np.repeat(begun - starts, counts)
        places = self._paths[np.repeat(rows, counts), depths].astype(np.int64)
        readers = np.repeat(models - 1, counts)
        opinions = tree.opinions[places, readers]
        unknown = opinions[:, GAP] == UNKNOWN
        if unknown.any():
            unread = np.unique(np.repeat(np.arange(len(rows)), counts)[unknown])
            for model in np.unique(models[unread]).tolist():
                some = unread[models[unread] == model]
                self.explorer.read_along(rows[some], nodes[some], model, opinions=True)
            opinions = tree.opinions[places, readers]
        kept = standing(self.judge, opinions, counts)
        ended = self._ends[rows] != NO_END
        whole_stands = ended & (kept == counts)
        at = nodes.copy()
        cut = np.flatnonzero(kept < counts)
        at[cut] = places[starts[cut] + kept[cut]]

        # each model reads to the end of the draft, but for the end of the response
        read, lengths = self._read[rows], whole - counts + kept
        n = np.arange(len(rows))
        new = whole - ended - read[n, models]
        self.ledger[rows, models] += pass_entry(new, read[n, models], 0.0)
        read[n, models] += new
        read = np.minimum(read, lengths[:, None])
        gone = self._cut(rows, lengths)
        tokens = np.full(len(rows), UNKNOWN)
        some = np.flatnonzero(~whole_stands)
        if len(some):
            writing, by = rows[some], models[some]
            self._nodes[writing] = at[some]
            nexts = self.explorer.step(writing, at[some], by)
            tokens[some] = tree.tokens[at[some], by]
            self._stand(writing, nexts)
            self._enter(writing, tokens[some], by)
            self.ledger[writing, by, WRITTEN] += 1
            going_on = some[self._followed[writing] & (tree.ends[nexts] != TERMINATED)]
            self.ledger[rows[going_on], 0] += pass_entry(np.ones_like(going_on), lengths[going_on], 0.0)
            read[going_on, 0] += 1
        self._read[rows] = read
        return Called(tokens, kept, gone)

    def _open_books(self) -> None:
        super()._open_books()
        # the node behind each number of tokens of a response; behind those that are written: of what was taken back
        self._paths = np.zeros((self.rows, self.max_new_tokens + 1), dtype=np.int32)

    def _stand(self, rows: IntArray, nodes: IntArray) -> None:
        super()._stand(rows, nodes)
        self._paths[rows, self.tree.depths[nodes]] = nodes

    def _slm_would_write(self, rows: IntArray) -> IntArray:
        return np.asarray(self.tree.tokens[self._read_nodes(rows), 0], dtype=np.int64)

    def _longest(self, rows: IntArray) -> IntArray:
        return np.full(len(rows), self.max_new_tokens)
