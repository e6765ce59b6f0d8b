"""A decoder that walks a prefix tree: known states are array work."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from envs.arrays import FloatArray, IntArray
from envs.costs import COLUMNS, pass_entry, step_entries
from envs.decoding.decoder import check_fit, check_followed, checked_actions, sequence_capacity
from envs.decoding.observation import LOGIT_FEATURES, Observation, Step
from envs.decoding.sampling import Sampling
from envs.models.checks import gigabytes
from envs.prefix_tree.expander import TreeExpander
from envs.prefix_tree.tree import GOING_ON, TERMINATED, TRUNCATED, UNKNOWN, PrefixTree
from envs.tasks.task import Example, Task


def observation_at(
    tree: PrefixTree, nodes: IntArray, since_llm: IntArray, episodes: IntArray | None = None
) -> Observation:
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

    def __init__(self, tree: PrefixTree, rows: int, capacity: int | None = None) -> None:
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
        self.explorer = TreeExpander(tree, rows, self.capacity)
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
        """Prompts that are in flight or were last, and the nodes of their rows; see `PrefixTree.walks`."""
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
