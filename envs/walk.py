"""Walking a replay tree: known states are array work, unknown ones are decoded through a live session."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from envs.cache import IntArray
from envs.costs import COLUMNS, FloatArray, pass_entry, step_entries
from envs.features import LOGIT_FEATURES, all_features
from envs.models import gigabytes
from envs.sampling import Sampling
from envs.session import check_fit, check_followed, checked_actions, sequence_capacity
from envs.steps import Observation, Step
from envs.tasks.task import Example, Task
from envs.teacher import TeacherSession
from envs.tree import GOING_ON, TERMINATED, TRUNCATED, UNKNOWN, Tree


class Explorer:
    """Makes states of a tree known, in batches.

    Args:
        tree: gains the states.
        rows: of the live session; a row that goes on into the unknown keeps its caches.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.
    """

    def __init__(self, tree: Tree, rows: int, capacity: int | None = None) -> None:
        self.tree, self.pool, self.rows = tree, tree.pool, rows
        self._capacity = capacity
        self._session: TeacherSession | None = None
        self._at: IntArray = np.full(rows, UNKNOWN)  # the node each live row stands at
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
            pinned: pin the prompts, until `Tree.release`; else they must be among those of `Tree.walks`.
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

    def read_along(self, rows: IntArray, nodes: IntArray, model: int) -> None:
        """Learn what a model would write at every node before `nodes`, (n,), in distinct rows that it may overwrite."""
        self._forget_evicted()
        tree = self.tree
        paths = [tree.path(int(node))[:-1] for node in nodes]
        todo = [i for i, path in enumerate(paths) if (tree.tokens[path, model] == UNKNOWN).any()]
        if not todo:
            return
        # from the prompt on: of tokens it has read already, a model does not tell again what it would write after them
        self._start(rows[todo], nodes[todo].tolist())
        self._at[rows[todo]] = nodes[todo]
        for i, tokens in zip(todo, self.session.read_along(rows[todo], model), strict=True):
            unknown = np.flatnonzero(tree.tokens[paths[i], model] == UNKNOWN)
            found = tokens[len(tokens) - len(paths[i]) :]
            tree.learn_tokens(paths[i][unknown], np.full(len(unknown), model), found[unknown])

    def _start(self, rows: IntArray, nodes: Sequence[int], tokens: Sequence[int] | None = None) -> None:
        """Let live rows stand at nodes, or behind further tokens there."""
        tree = self.tree
        responses = [tree.written(tree.path(int(node))) for node in nodes]
        if tokens is not None:
            responses = [np.append(response, token) for response, token in zip(responses, tokens, strict=True)]
        prompts = [tree.prompt(node) for node in nodes]
        self.session.start(rows, prompts, responses=responses)

    def _expand(self, rows: IntArray, nodes: IntArray, actions: IntArray) -> None:
        """Add what is behind distinct pairs of node and action."""
        self._forget_evicted()
        tree = self.tree
        tokens = tree.tokens[nodes, actions].astype(np.int64)
        ends_known = np.isin(tokens, self.pool.end_tokens)
        here = self._at[rows] == nodes
        by_slm = here & (tokens == tree.tokens[nodes, 0])
        taught = np.flatnonzero((tokens != UNKNOWN) & ~by_slm & ~ends_known)
        if len(taught):
            self._start(rows[taught], nodes[taught].tolist(), tokens[taught].tolist())
        lost = np.flatnonzero((tokens == UNKNOWN) & ~here)
        if len(lost):
            self._start(rows[lost], nodes[lost].tolist())
        stepped = np.flatnonzero((by_slm | (tokens == UNKNOWN)) & ~ends_known)
        if len(stepped):
            models = np.where(by_slm[stepped], 0, actions[stepped])
            written = self.session.step(rows[stepped], models).tokens
            # between all but equal logits another pass may choose otherwise; what is known stays
            strayed = stepped[by_slm[stepped] & (written != tokens[stepped])]
            tokens[stepped] = np.where(by_slm[stepped], tokens[stepped], written)
            if len(strayed):
                self._start(rows[strayed], nodes[strayed].tolist(), tokens[strayed].tolist())
        tree.learn_tokens(nodes, actions, tokens)
        _, first = np.unique(nodes * self.pool.vocab_size + tokens, return_index=True)
        new = first[tree.children[nodes[first], actions[first]] == UNKNOWN]
        ended = np.isin(tokens, self.pool.end_tokens)
        last = tree.depths[nodes] + 1 >= tree.max_new_tokens
        ends = np.where(ended, TERMINATED, np.where(last, TRUNCATED, GOING_ON)).astype(np.int8)
        features = np.zeros((len(rows), self.pool.slm.width + LOGIT_FEATURES), dtype=np.float32)
        slm_tokens = np.full(len(rows), UNKNOWN)
        seen = new[~ended[new]]
        if len(seen):
            features[seen], slm_tokens[seen] = self._look(rows[seen])
        if len(new):
            tree.add(nodes[new], actions[new], tokens[new], ends[new], features[new], slm_tokens[new])
        tree.learn_tokens(nodes, actions, tokens)
        self._at[rows] = np.where(ended, UNKNOWN, tree.children[nodes, actions])

    def _forget_evicted(self) -> None:
        """A node's number may name another state after an eviction."""
        if self._evictions != self.tree.evictions:
            self._at[:], self._evictions = UNKNOWN, self.tree.evictions

    def _look(self, rows: IntArray) -> tuple[npt.NDArray[np.float32], IntArray]:
        """What a router sees of live rows, and the tokens the SLM would write there."""
        seen = self.session.observe(rows)
        assert seen.logits is not None
        features = all_features(seen.hidden, seen.logits).cpu().numpy()
        return features, self.pool.greedy(0, seen.logits)


def observation_at(tree: Tree, nodes: IntArray, since_llm: IntArray, episodes: IntArray | None = None) -> Observation:
    """What may be seen at states of a tree, (n,); each an episode of its own where `episodes` is None."""
    hidden, logits = torch.from_numpy(tree.features(nodes)).split([tree.pool.slm.width, LOGIT_FEATURES], dim=-1)
    episodes = np.arange(len(nodes)) if episodes is None else episodes
    return Observation(hidden, None, tree.depths[nodes].astype(np.int64), episodes, since_llm, logits)


class TreeSession:
    """Walks a tree as `Session` decodes: the same tokens, endings, observations and ledger, but for seconds.

    Args:
        tree: what is known, and gains what is not.
        rows: sequences in flight.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.

    Raises:
        ValueError: the tree's memory cannot hold the sequences in flight.
    """

    def __init__(self, tree: Tree, rows: int, capacity: int | None = None) -> None:
        if rows < 1:
            raise ValueError(f"rows must be at least 1, is {rows}")
        if rows * (tree.max_new_tokens + 1) > tree.capacity:
            raise ValueError(
                f"{rows} sequences in flight of up to {tree.max_new_tokens} tokens do not fit the tree's memory of "
                f"{gigabytes(tree.memory)} ({tree.capacity} states); raise memory or lower the rows"
            )
        self.tree, self.pool, self.rows, self.max_new_tokens = tree, tree.pool, rows, tree.max_new_tokens
        self.capacity = sequence_capacity(self.pool, self.max_new_tokens, capacity)
        self.sampling = Sampling()
        self.explorer = Explorer(tree, rows, self.capacity)
        tree.walks.add(self)
        self._prompts: list[IntArray | None] = [None] * rows
        self._prompt_lengths: IntArray = np.zeros(rows, dtype=np.int64)
        self._nodes: IntArray = np.zeros(rows, dtype=np.int64)
        self._written: IntArray = np.zeros(rows, dtype=np.int64)
        self._tokens: IntArray = np.zeros((rows, self.max_new_tokens), dtype=np.int64)
        self._writers = np.zeros((rows, self.max_new_tokens), dtype=np.int8)
        self._since_llm: IntArray = np.zeros(rows, dtype=np.int64)
        self._episodes: IntArray = np.zeros(rows, dtype=np.int64)
        self._read: IntArray = np.zeros((rows, len(self.pool)), dtype=np.int64)
        self._active = np.zeros(rows, dtype=bool)
        self._followed = np.ones(rows, dtype=bool)
        self.ledger: FloatArray = np.zeros((rows, len(self.pool), COLUMNS))
        """What decoding each row would have taken, (rows, models, COLUMNS); no seconds, since nothing was timed."""

    def check_fit(self, name: str, prompt: IntArray) -> None:
        """Refuse a prompt that leaves no room for `max_new_tokens`; see `Session.check_fit`."""
        check_fit(name, prompt, (), self.capacity, self.max_new_tokens)

    def start(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        episodes: IntArray | None = None,
        generators: Sequence[np.random.Generator] | None = None,
    ) -> FloatArray:
        """Start a new sequence in each row; see `Session.start`. Generators are not used: decoding is greedy."""
        rows = np.asarray(rows, dtype=np.int64)
        for row, prompt in zip(rows, prompts, strict=True):
            self.check_fit(f"row {row}", prompt)
        self.free(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            self._prompts[row], self._nodes[row] = prompt, UNKNOWN
        self._nodes[rows] = self.explorer.roots(rows, prompts, pinned=False)
        self._prompt_lengths[rows] = [len(prompt) for prompt in prompts]
        self._written[rows] = self._since_llm[rows] = 0
        self._episodes[rows] = rows if episodes is None else episodes
        self._read[rows] = 0
        self._active[rows] = self._followed[rows] = True
        self.ledger[rows] = 0
        self.ledger[rows, 0] = pass_entry(self._prompt_lengths[rows], np.zeros_like(rows), 0.0)
        return self.ledger[rows]

    def step(self, rows: IntArray, actions: IntArray) -> Step:
        """Write one token in each row, by the model its action names; see `Session.step`."""
        rows, actions = np.asarray(rows, dtype=np.int64), checked_actions(actions, len(rows), len(self.pool))
        if not self._active[rows].all():
            raise ValueError(f"rows {rows[~self._active[rows]].tolist()} are not in flight; start them first")
        check_followed(rows[actions == 0], self._followed)
        tree, nodes, written = self.tree, self._nodes[rows], self._written[rows]
        nexts = self.explorer.step(rows, nodes, actions)
        tokens, slm_tokens = tree.tokens[nodes, actions].astype(np.int64), tree.tokens[nodes, 0].astype(np.int64)
        ends = tree.ends[nexts]
        terminated, truncated = ends == TERMINATED, ends == TRUNCATED
        read = self._read[rows]
        work = step_entries(actions, self._prompt_lengths[rows] + written, read, ~terminated & self._followed[rows])
        self._read[rows] = read
        self.ledger[rows] += work
        self._tokens[rows, written], self._writers[rows, written] = tokens, actions
        self._written[rows] = written + 1
        self._since_llm[rows] = np.where(actions > 0, 0, self._since_llm[rows] + 1)
        self._nodes[rows], self._active[rows] = nexts, ends == GOING_ON
        return Step(tokens, slm_tokens, terminated, truncated, work)

    def observe(self, rows: IntArray) -> Observation:
        """What a router may see of `rows`, (n,); without logits, of which the tree keeps the features alone."""
        rows = np.asarray(rows, dtype=np.int64)
        check_followed(rows, self._followed)
        return observation_at(self.tree, self._nodes[rows], self._since_llm[rows], self._episodes[rows])

    def release_slm(self, rows: IntArray) -> None:
        """Let the SLM read no more of `rows`, (n,); see `Session.release_slm`."""
        self._followed[rows] = False

    def free(self, rows: IntArray) -> None:
        """Take rows out of flight; their prompts may be forgotten when room is needed."""
        for row in rows:
            self._prompts[row] = None
        self._active[rows] = False

    def in_flight(self) -> list[tuple[IntArray, int]]:
        """Prompts that are in flight or were last, and the nodes of their rows; see `Tree.walks`."""
        flights = zip(self._prompts, self._nodes.tolist(), strict=True)
        return [(prompt, node) for prompt, node in flights if prompt is not None]

    def response(self, row: int) -> IntArray:
        """Tokens of the response so far, (n,), an end-of-sequence token included."""
        return self._tokens[row, : self._written[row]].copy()

    def writers(self, row: int) -> npt.NDArray[np.int8]:
        """Which model wrote each token of the response, (n,)."""
        return self._writers[row, : self._written[row]].copy()

    def lengths(self, rows: IntArray) -> IntArray:
        """Tokens of each row, prompt included, (n,)."""
        return np.asarray(self._prompt_lengths[rows] + self._written[rows])

    def nodes(self, row: int) -> IntArray:
        """The states of a row from the prompt on, (n + 1,)."""
        return self.tree.path(int(self._nodes[row]))

    def correct(self, row: int, task: Task, example: Example) -> bool:
        """Whether a finished row answers `example`, judged once."""
        return self.tree.correct(int(self._nodes[row]), example)
