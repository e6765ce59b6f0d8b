"""Expanding a prefix tree: unknown states are decoded through a live session, in batches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from envs.arrays import UNKNOWN, BoolArray, IntArray
from envs.decoding.judges import GAP, RANK, Opinions
from envs.decoding.observation import LOGIT_FEATURES, all_features
from envs.decoding.teacher_forcing import TeacherSession
from envs.prefix_tree.tree import GOING_ON, TERMINATED, TRUNCATED, PrefixTree


class TreeExpander:
    """Makes states of a tree known, in batches.

    Args:
        tree: gains the states.
        rows: of the live session; a row that goes on into the unknown keeps its caches.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
    """

    def __init__(self, tree: PrefixTree, rows: int, capacity: int | None = None) -> None:
        self.tree, self.pool, self.rows = tree, tree.pool, rows
        self._capacity = capacity
        self._session: TeacherSession | None = None
        self._at: IntArray = np.full(rows, UNKNOWN)  # the node each live row stands at
        self._anew: BoolArray = np.zeros(rows, dtype=bool)  # rows that go on from nothing they have read
        self._evictions = tree.evictions

    @property
    def session(self) -> TeacherSession:
        """Opened when the first unknown state is met: a tree that knows all needs no caches."""
        if self._session is None:
            self._session = TeacherSession(self.pool, self.rows, self.tree.max_new_tokens, self._capacity)
        return self._session

    def roots(self, rows: IntArray, prompts: Sequence[IntArray], pinned: bool = True) -> IntArray:
        """The nodes of prompts, (n,); unknown ones are read in these rows, (n,).

        Args:
            rows: distinct rows.
            prompts: n arrays of token ids.
            pinned: pin the prompts, until `PrefixTree.release`; else they must be among those of `PrefixTree.walks`.
        """
        self._forget_evicted()
        use = self.tree.pin if pinned else self.tree.use
        new: dict[bytes, int] = {}
        for i, prompt in enumerate(prompts):
            if self.tree.root(prompt) == UNKNOWN:
                new.setdefault(prompt.tobytes(), i)
            else:
                use(prompt)
        if new:
            where = np.array(list(new.values()))
            self.session.start(rows[where], [prompts[i] for i in where])
            features, slm_tokens = self._look(rows[where])
            for i, row_features, token in zip(where, features, slm_tokens, strict=True):
                self._at[rows[i]] = self.tree.add_root(prompts[i], row_features, int(token))
                use(prompts[i])
            for i, prompt in enumerate(prompts):
                if new.get(prompt.tobytes(), i) != i:
                    use(prompt)
        return np.array([self.tree.root(prompt) for prompt in prompts])

    def prompt_states(self, rows: IntArray, prompts: Sequence[IntArray], model: int) -> npt.NDArray[np.float32]:
        """The states of a model other than the SLM behind prompts of the tree, (n, width), in distinct rows, (n,).

        Unknown ones are read in these rows, which then stand at the prompts.
        """
        self._forget_evicted()
        known, texts = self.tree.prompt_states, [prompt.tobytes() for prompt in prompts]
        new = {text: i for i, text in enumerate(texts) if model not in known.get(text, {})}
        if new:
            where = np.array(list(new.values()))
            roots = np.array([self.tree.root(prompts[i]) for i in where])
            elsewhere = where[self._at[rows[where]] != roots]
            if len(elsewhere):
                self.session.start(rows[elsewhere], [prompts[i] for i in elsewhere])
            self._at[rows[where]] = roots
            states = self.session.read_prompts(rows[where], model).cpu().numpy()
            for text, state in zip(new, states, strict=True):
                known.setdefault(text, {})[model] = state
        return np.stack([known[text][model] for text in texts])

    def step(self, rows: IntArray, nodes: IntArray, actions: IntArray) -> IntArray:
        """The nodes behind `actions` at `nodes`, (n,) each; unknown ones are decoded in distinct rows, (n,)."""
        children = self.tree.children[nodes, actions]
        # to make room, states may be forgotten that nobody has come by yet
        while len(unknown := np.flatnonzero(children == UNKNOWN)):
            _, first = np.unique(nodes[unknown] * len(self.pool) + actions[unknown], return_index=True)
            todo = unknown[first]
            self._expand(rows[todo], nodes[todo], actions[todo])
            children = self.tree.children[nodes, actions]
        return children.astype(np.int64)

    def read_along(self, rows: IntArray, nodes: IntArray, model: int, opinions: bool = False) -> None:
        """Learn what a model would write at every node before `nodes`, (n,), in distinct rows that it may overwrite.

        With `opinions` also what it, another one than the SLM, thinks of the SLM's token at each of them.
        """
        self._forget_evicted()
        tree = self.tree
        paths = [tree.path(int(node))[:-1] for node in nodes]
        unknown_at = [tree.tokens[path, model] == UNKNOWN for path in paths]
        if opinions:
            unknown_at = [tree.opinions[path, model - 1, 0] == UNKNOWN for path in paths]
        todo = [i for i, unknown in enumerate(unknown_at) if unknown.any()]
        if not todo:
            return
        # of tokens it has read already, a model does not tell again what it would write after them
        first = np.array([int(unknown_at[i].argmax()) for i in todo])
        self._start(rows[todo], nodes[todo].tolist(), unread=first)
        self._at[rows[todo]] = nodes[todo]
        unread = [paths[i][begun:] for i, begun in zip(todo, first, strict=True)]
        if opinions:
            drafts = [tree.tokens[path, 0].astype(np.int64) for path in unread]
            last = np.zeros(len(todo), dtype=bool)
            choices, thought = self.session.read_with_opinions(rows[todo], model, last, drafts)
        else:
            choices, thought = self.session.read_along(rows[todo], model), None
        for path, tokens in zip(unread, choices, strict=True):
            unknown = np.flatnonzero(tree.tokens[path, model] == UNKNOWN)
            along = tokens[len(tokens) - len(path) :]
            tree.learn_tokens(path[unknown], np.full(len(unknown), model), along[unknown])
        if thought is not None:
            read = np.concatenate(unread)
            own = tree.tokens[read, model] == tree.tokens[read, 0]
            tree.learn_opinions(read, model, _as_known(thought.float().cpu().numpy(), own))

    def forget(self, rows: IntArray) -> None:
        """Let live rows, (n,), stand nowhere: what comes next in them is read from the prompt on."""
        self._at[rows], self._anew[rows] = UNKNOWN, True

    def _start(
        self,
        rows: IntArray,
        nodes: Sequence[int],
        tokens: Sequence[int] | None = None,
        unread: IntArray | None = None,
    ) -> None:
        """Let live rows stand at nodes, or behind further tokens there; see `TeacherSession.resume`."""
        tree = self.tree
        responses = [tree.written(tree.path(int(node))) for node in nodes]
        if tokens is not None:
            responses = [np.append(response, token) for response, token in zip(responses, tokens, strict=True)]
        prompts = [tree.prompt(node) for node in nodes]
        anew = self._anew[rows]
        self._anew[rows] = False
        self.session.resume(rows, prompts, responses, unread, anew)

    def _expand(self, rows: IntArray, nodes: IntArray, actions: IntArray) -> None:
        """Add what is behind distinct pairs of node and action, (n,) each.

        Example: at one node the SLM writes 7, and two models that were not asked yet both write 9. The pairs (node, 1)
        and (node, 2) are decoded in a live row each; both learn 9, one state is added, and their actions share it.
        """
        self._forget_evicted()
        tree = self.tree
        tokens = self._write(rows, nodes, actions)
        tree.learn_tokens(nodes, actions, tokens)
        # of pairs that write the same token at a node one is enough, and none where a known state is behind it
        _, first = np.unique(nodes * self.pool.vocab_size + tokens, return_index=True)
        new = first[tree.children[nodes[first], actions[first]] == UNKNOWN]
        ended = np.isin(tokens, self.pool.end_tokens)
        last = tree.depths[nodes] + 1 >= tree.max_new_tokens
        ends = np.where(ended, TERMINATED, np.where(last, TRUNCATED, GOING_ON)).astype(np.int8)
        features = np.zeros((len(rows), self.pool.slm.width + LOGIT_FEATURES), dtype=np.float32)
        slm_tokens = np.full(len(rows), UNKNOWN)
        going_on = new[~ended[new]]
        if len(going_on):
            features[going_on], slm_tokens[going_on] = self._look(rows[going_on])
        if len(new):
            tree.add(nodes[new], actions[new], tokens[new], ends[new], features[new], slm_tokens[new])
        tree.learn_tokens(nodes, actions, tokens)
        self._at[rows] = np.where(ended, UNKNOWN, tree.children[nodes, actions])

    def _write(self, rows: IntArray, nodes: IntArray, actions: IntArray) -> IntArray:
        """Let live rows stand behind the tokens that `actions` write at `nodes`; these tokens, (n,).

        A token that is known and ends the response needs no row. A known one that the SLM would write is written by a
        row that stands at its node; any other known one is given to a row started anew. An unknown one is asked for, in
        a row that stands at its node or is started there.
        """
        tree = self.tree
        tokens = tree.tokens[nodes, actions].astype(np.int64)
        unknown, ends_known = tokens == UNKNOWN, np.isin(tokens, self.pool.end_tokens)
        at_node = self._at[rows] == nodes
        by_slm = at_node & (tokens == tree.tokens[nodes, 0])
        given = np.flatnonzero(~unknown & ~by_slm & ~ends_known)
        if len(given):
            self._start(rows[given], nodes[given].tolist(), tokens[given].tolist())
        elsewhere = np.flatnonzero(unknown & ~at_node)
        if len(elsewhere):
            self._start(rows[elsewhere], nodes[elsewhere].tolist())
        stepped = np.flatnonzero((by_slm | unknown) & ~ends_known)
        if len(stepped):
            models = np.where(by_slm[stepped], 0, actions[stepped])
            written = self.session.step(rows[stepped], models).tokens
            # between all but equal logits another pass may choose otherwise; what is known stays
            strayed = stepped[by_slm[stepped] & (written != tokens[stepped])]
            tokens[stepped] = np.where(by_slm[stepped], tokens[stepped], written)
            if len(strayed):
                self._start(rows[strayed], nodes[strayed].tolist(), tokens[strayed].tolist())
        return tokens

    def _forget_evicted(self) -> None:
        """A node's number may name another state after an eviction."""
        if self._evictions != self.tree.evictions:
            self._at[:], self._evictions = UNKNOWN, self.tree.evictions

    def _look(self, rows: IntArray) -> tuple[npt.NDArray[np.float32], IntArray]:
        """What a router sees of live rows, and the tokens the SLM would write there."""
        observation = self.session.observe(rows)
        assert observation.logits is not None
        features = all_features(observation.hidden, observation.logits).cpu().numpy()
        return features, self.pool.greedy(0, observation.logits)


def _as_known(opinions: Opinions, own: BoolArray) -> Opinions:
    """Opinions of tokens, (n, OPINION), that agree with which of them the model is known to write itself, (n,).

    Another pass may have told that. Passes of other shapes round otherwise, and of two tokens that are equally likely
    they may find either the likelier one: a draft would be taken back, and the very same token written in its place.
    """
    rank = np.where(own, 0, np.maximum(opinions[:, RANK], 1))
    return np.stack([np.where(own, 0, opinions[:, GAP]), rank], axis=-1).astype(np.float32)
