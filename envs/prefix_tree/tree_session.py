"""A decoder that walks a prefix tree: known states are array work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from envs.arrays import UNKNOWN, FloatArray, IntArray
from envs.costs import pass_entry, step_entries
from envs.decoding.decoder import Decoder
from envs.decoding.observation import Drafts, Observation, Step
from envs.decoding.sampling import Sampling
from envs.models.checks import gigabytes
from envs.models.pool import ModelPool
from envs.prefix_tree.expander import TreeExpander
from envs.prefix_tree.tree import GOING_ON, TERMINATED, TRUNCATED, PrefixTree
from envs.tasks.task import Example, Task


def observation_at(
    tree: PrefixTree,
    nodes: IntArray,
    since_llm: IntArray,
    episodes: IntArray | None = None,
    drafts: Drafts | None = None,
) -> Observation:
    """What may be seen at states of a tree, (n,); each an episode of its own where `episodes` is None."""
    features, width = tree.features(nodes), tree.pool.slm.width
    hidden, logits = torch_copy(features[:, :width]), torch_copy(features[:, width:])
    episodes = np.arange(len(nodes)) if episodes is None else episodes
    return Observation(hidden, None, tree.depths[nodes].astype(np.int64), episodes, since_llm, logits, drafts)


def torch_copy(values: npt.NDArray[np.float32]) -> Tensor:
    """A copy in memory of torch's own, float32, of the same shape.

    What torch allocates is aligned and contiguous, as in live decoding, and the last bits of a product depend on that;
    what lies in a file, or where NumPy put it, need not be. NumPy copies, since it wakes no thread for so little.
    """
    copy = torch.empty(values.shape)
    copy.numpy()[...] = values
    return copy


class TreeSession(Decoder):
    """Walks a tree as `Session` decodes: the same tokens, endings, observations and ledger, but for seconds.

    Nothing is timed, so that the ledger holds none.

    Args:
        tree: what is known, and gains what is not.
        rows: sequences in flight.
        capacity: the longest sequence, prompt and response; the pool's capacity where None.

    Raises:
        ValueError: the tree's memory cannot hold the sequences in flight.
    """

    def __init__(self, tree: PrefixTree, rows: int, capacity: int | None = None) -> None:
        super().__init__(tree.pool, rows, tree.max_new_tokens, capacity)
        if rows * (tree.max_new_tokens + 1) > tree.capacity:
            raise ValueError(
                f"{rows} sequences in flight of up to {tree.max_new_tokens} tokens do not fit the tree's memory of "
                f"{gigabytes(tree.memory)} ({tree.capacity} states); raise memory or lower the rows"
            )
        self._open_books()
        self.tree = tree
        self.explorer = TreeExpander(tree, rows, self.capacity)
        tree.walks.add(self)
        self._prompts: list[IntArray | None] = [None] * rows
        self._nodes: IntArray = np.zeros(rows, dtype=np.int64)
        self._read: IntArray = np.zeros((rows, len(self.pool)), dtype=np.int64)  # by each model, counted alone

    def start(
        self,
        rows: IntArray,
        prompts: Sequence[IntArray],
        episodes: IntArray | None = None,
        generators: Sequence[np.random.Generator] | None = None,
        *,
        observed: bool = True,
    ) -> FloatArray:
        """Start a new sequence in each row; see `Decoder.start`. Generators are not used: decoding is greedy."""
        rows = self._checked(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            self.check_fit(f"row {row}", prompt)
        self.free(rows)
        for row, prompt in zip(rows, prompts, strict=True):
            self._prompts[row], self._nodes[row] = prompt, UNKNOWN
        self._stand(rows, self.explorer.roots(rows, prompts, pinned=False))
        self._begin(rows, prompts, episodes)
        self._followed[rows] = self._observed[rows] = observed
        self._read[rows] = 0
        if observed:
            self._read[rows, 0] = self._prompt_lengths[rows]
            self.ledger[rows, 0] = pass_entry(self._prompt_lengths[rows], np.zeros_like(rows), 0.0)
        return self.ledger[rows]

    def step(self, rows: IntArray, actions: IntArray) -> Step:
        """Write one token in each row, by the model its action names; see `Decoder.step`."""
        return self._walk(*self._checked_step(rows, actions))

    def _walk(self, rows: IntArray, actions: IntArray) -> Step:
        """A step of rows and actions that were checked, (n,) both."""
        tree, nodes = self.tree, self._nodes[rows]
        nexts = self.explorer.step(rows, nodes, actions)
        tokens, slm_tokens = tree.tokens[nodes, actions].astype(np.int64), tree.tokens[nodes, 0].astype(np.int64)
        ends = tree.ends[nexts]
        terminated, truncated = ends == TERMINATED, ends == TRUNCATED
        read, lengths = self._read[rows], self._lengths[rows]
        ledger = step_entries(actions, lengths, read, ~terminated & self._followed[rows])
        late = np.flatnonzero(~self._observed[rows] & (actions == 0))
        if len(late):
            # what nobody observes the SLM reads when it is chosen
            ledger[late, 0] += pass_entry(lengths[late] - read[late, 0], read[late, 0], 0.0)
            read[late, 0] = lengths[late]
        self._read[rows] = read
        self.ledger[rows] += ledger
        self._enter(rows, tokens, actions)
        self._stand(rows, nexts)
        self._active[rows] = ends == GOING_ON
        return Step(tokens, slm_tokens, terminated, truncated, ledger)

    def observe(self, rows: IntArray) -> Observation:
        """What a router may see of `rows`, (n,); without logits, of which the tree keeps the features alone."""
        rows = np.asarray(rows, dtype=np.int64)
        self._check_followed(rows)
        return observation_at(self.tree, self._nodes[rows], self._since_llm[rows], self._episodes[rows])

    def read_prompts(self, rows: IntArray, model: int) -> Tensor:
        """The states of a model other than the SLM behind the prompts of `rows`, (n,); see `Decoder.read_prompts`."""
        rows = self._checked(rows)
        self._check_reader(model)
        new = rows[self._read[rows, model] == 0]
        self._check_unwritten(new, model)
        self.ledger[new, model] += pass_entry(self._prompt_lengths[new], np.zeros_like(new), 0.0)
        self._read[new, model] = self._prompt_lengths[new]
        prompts = [self._tokens[row, : self._prompt_lengths[row]] for row in rows]
        return torch_copy(self.explorer.prompt_states(rows, prompts, model))

    def release_slm(self, rows: IntArray) -> None:
        """Let the SLM read no more of `rows`, (n,); see `Decoder.release_slm`."""
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

    def nodes(self, row: int) -> IntArray:
        """The states of a row from the prompt on, (n + 1,)."""
        return self.tree.path(int(self._nodes[row]))

    def state(self, rows: IntArray) -> dict[str, npt.NDArray[Any]]:
        """Where `rows`, (n,), stand, in numbers; see `Decoder.state`."""
        return self._books_of(rows, "_read")

    def restore(
        self,
        rows: IntArray,
        state: Mapping[str, npt.NDArray[Any]],
        generators: Sequence[np.random.Generator] | None = None,
    ) -> None:
        """Let `rows`, (n,), stand where others stood, walking there again; see `Decoder.restore`."""
        rows = self._checked(rows)
        self._set_books(rows, state, "_read")
        self.explorer.forget(rows)  # as in a process that begins here: what comes next has the same bits in both
        for row in rows:
            self._prompts[row], self._nodes[row] = None, UNKNOWN
        begun = rows[self._prompt_lengths[rows] > 0]
        if not len(begun):
            return
        prompts = [self._tokens[row, : self._prompt_lengths[row]].copy() for row in begun]
        for row, prompt in zip(begun, prompts, strict=True):
            self._prompts[row] = prompt
        self._stand(begun, self.explorer.roots(begun, prompts, pinned=False))
        written = self._lengths[begun] - self._prompt_lengths[begun]
        for position in range(int(written.max())):
            walking = begun[written > position]
            actions = self._writers[walking, self._prompt_lengths[walking] + position].astype(np.int64)
            self._stand(walking, self.explorer.step(walking, self._nodes[walking], actions))

    def _stand(self, rows: IntArray, nodes: IntArray) -> None:
        """Let rows stand at nodes that they have come to, (n,) both."""
        self._nodes[rows] = nodes

    def correct(self, row: int, task: Task, example: Example) -> bool:
        """Whether a finished row answers `example`, judged once."""
        return self.tree.correct(int(self._nodes[row]), example)


def check_tree(
    tree: PrefixTree, pool: ModelPool | None, task: Task | None, max_new_tokens: int, sampling: Sampling | None
) -> None:
    """Refuse a tree for a run on other models, another task or other settings, or that samples."""
    if sampling is not None and not sampling.greedy:
        raise ValueError(
            f"a replay tree keeps what greedy decoding did; sampling at temperature {sampling.warmest} gives other "
            "states each time: leave sampling out, or the tree, as citer/TokenRouting-v1 does"
        )
    for name, of_tree, given in (("pool", tree.pool, pool), ("task", tree.task, task)):
        if given is not None and given is not of_tree:
            raise ValueError(f"the tree was made for another {name}; give the tree's, or none")
    if tree.max_new_tokens != max_new_tokens:
        raise ValueError(
            f"the tree ends responses after {tree.max_new_tokens} tokens, this run after {max_new_tokens}; give "
            "both the same max_new_tokens"
        )
