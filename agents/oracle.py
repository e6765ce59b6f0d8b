"""The oracle: for each problem the cheapest routing that gives a right answer, the limit of every policy.

Best-first search (uniform-cost, Dijkstra 1959) over which model writes each token, on the replay tree: the path cost is
that of the passes behind a routing, and what comes first off the queue with a right answer is the cheapest there is. It
reads verdicts, so that it is no policy: it bounds them, and `agents.distillation` imitates it.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from agents.common.policy import Policy, check_scores
from envs.arrays import UNKNOWN, FloatArray, IntArray
from envs.costs import ALL_COSTS, response_entries
from envs.decoding.decoder import since_at_each
from envs.prefix_tree.expander import TreeExpander
from envs.prefix_tree.tree import GOING_ON, TERMINATED, PrefixTree
from envs.prefix_tree.tree_session import observation_at
from envs.progress import ProgressBar
from envs.tasks.task import Example


@dataclass(frozen=True)
class SearchResult:
    """What a search came to.

    Attributes:
        solved: a right answer was found.
        exhausted: the budget ran out before it was known to be the cheapest, or that there is none.
        nodes: states of the answer from the start of the search to its end, (tokens + 1,); where nothing was found
            those of the answer the SLM gives by itself.
        writers: the model that writes each token of the response, those before the start included, (n,).
        walks: answers that were tried.
    """

    solved: bool
    exhausted: bool
    nodes: IntArray
    writers: npt.NDArray[np.int8]
    walks: int

    @property
    def llm_tokens(self) -> int:
        """Tokens the LLM writes after the start."""
        return int((self.writers[len(self.writers) - len(self.nodes) + 1 :] > 0).sum())


@dataclass(order=True)
class _Item:
    """Something to be done for one problem: the lowest bound first, then where the SLM is least sure."""

    bound: float
    rank: float
    node: int = field(compare=False)  # where the LLM writes next; or the end of an answer whose branches are unknown
    read: bool = field(compare=False)
    first: int = field(compare=False)  # the depth from which on an answer may branch
    writers: npt.NDArray[np.int8] = field(compare=False)


class _Search:
    """The search of one problem."""

    def __init__(self, example: Example, start: int, writers: npt.NDArray[np.int8]) -> None:
        self.example, self.start = example, start
        self.heap = [_Item(0.0, 0.0, node=start, read=False, first=len(writers), writers=writers)]
        self.best = np.inf
        self.end = self.alone = UNKNOWN
        self.writers = self.alone_writers = writers
        self.walks = self.busy = 0
        self.exhausted = False

    def done(self) -> bool:
        """Nothing is under way, and nothing cheaper can be found."""
        return not self.busy and (self.exhausted or not self.heap or self.heap[0].bound >= self.best)


@dataclass(frozen=True)
class Oracle:
    """Best-first search over a replay tree.

    The answer the SLM gives by itself is tried first; an answer that is wrong branches wherever the LLM would have
    written another token, behind its own last branch, so that no routing is tried twice. What is cheaper by `cost` is
    tried first, so the first right answer is the cheapest; among equals, the branch where the SLM is least sure. Where
    both models write the same token nothing branches.

    Args:
        cost: the name of the cost model that is minimised: `llm_tokens`, or any other that repeats.
        budget: answers tried per problem.
        rows: answers in flight.
        together: answers of one problem in flight.
    """

    cost: str = "llm_tokens"
    budget: int = 300
    rows: int = 256
    together: int = 8

    def __post_init__(self) -> None:
        known = [cost.name for cost in ALL_COSTS if cost.reproducible]
        if self.cost not in known:
            raise ValueError(f"unknown cost {self.cost!r} of the oracle; choose one of {', '.join(known)}")
        if self.budget < 1 or self.rows < 1 or self.together < 1:
            raise ValueError(
                f"budget ({self.budget}), rows ({self.rows}) and together ({self.together}) must be at least 1"
            )

    def search(
        self,
        tree: PrefixTree,
        examples: Sequence[Example],
        starts: Sequence[int] | None = None,
        written: Sequence[npt.NDArray[np.int8]] | None = None,
        likely: Policy | None = None,
        label: str | None = "oracle",
    ) -> list[SearchResult]:
        """Find the cheapest right answer to each of `examples`.

        Args:
            tree: where states are kept; unknown ones are added.
            examples: problems.
            starts: the nodes the answers go on from, one each; those after the prompts where None.
            written: the models that wrote what stands there already; needed with `starts`.
            likely: among equals, branch first where this policy's score is lowest, not where the SLM is least sure.
            label: of the progress bar; none is shown without.

        Raises:
            ValueError: a prompt does not fit, the tree's memory cannot hold the answers in flight, or the scores of
                `likely` are not what `Policy.score` promises.
        """
        return _Searches(self, tree, examples, starts, written, likely).run(label)


class _Searches:
    """Searches of many problems that share passes."""

    def __init__(
        self,
        settings: Oracle,
        tree: PrefixTree,
        examples: Sequence[Example],
        starts: Sequence[int] | None,
        written: Sequence[npt.NDArray[np.int8]] | None,
        likely: Policy | None,
    ) -> None:
        self.likely = likely
        self.settings, self.tree, self.pool = settings, tree, tree.pool
        self.llm = len(self.pool) - 1
        self.cost = next(cost for cost in ALL_COSTS if cost.name == settings.cost)
        self.examples, self.starts, self.written = examples, starts, written
        self.rows = min(settings.rows, settings.together * len(examples))
        self.expander = TreeExpander(tree, self.rows)
        self.results: list[SearchResult | None] = [None] * len(examples)
        self.open: dict[int, _Search] = {}
        self.serving: dict[int, tuple[int, _Item]] = {}
        self.nodes = np.full(self.rows, UNKNOWN)
        self.actions = np.zeros(self.rows, dtype=np.int64)
        self.next = 0

    def run(self, label: str | None) -> list[SearchResult]:
        with ProgressBar(total=len(self.examples), desc=label, disable=label is None, leave=False) as progress:
            while self.next < len(self.examples) or self.open:
                self._close(progress)
                self._begin()
                self._assign()
                self._step()
        return [result for result in self.results if result is not None]

    def _begin(self) -> None:
        """Take up problems while there are fewer than rows."""
        new = list(range(self.next, min(len(self.examples), self.next + self.rows - len(self.open))))
        free = self._free()[: len(new)]
        new = new[: len(free)]
        if not new:
            return
        prompts = [self.pool.encode_prompt(self.examples[e]) for e in new]
        roots = self.expander.roots(np.array(free), prompts)
        for e, root in zip(new, roots.tolist(), strict=True):
            start = root if self.starts is None else self.starts[e]
            writers = np.zeros(0, dtype=np.int8) if self.written is None else self.written[e]
            self.open[e] = _Search(self.examples[e], int(start), writers)
        self.next += len(new)

    def _free(self) -> list[int]:
        return [row for row in range(self.rows) if row not in self.serving]

    def _assign(self) -> None:
        """Give free rows to problems in turn, each its most promising answers."""
        free = self._free()
        reads: list[tuple[int, _Item, int]] = []
        for _ in range(self.settings.together):
            for number, search in self.open.items():
                if not free or search.busy >= self.settings.together:
                    continue
                if search.exhausted or not search.heap or search.heap[0].bound >= search.best:
                    continue
                if search.walks >= self.settings.budget:
                    search.exhausted = True
                    continue
                item = heapq.heappop(search.heap)
                row = free.pop()
                if item.read:
                    reads.append((number, item, row))
                    continue
                search.busy += 1
                search.walks += 1
                self.serving[row] = (number, item)
                self.nodes[row] = item.node
                self.actions[row] = 0 if item.node == search.start and search.walks == 1 else self.llm
        if reads:
            rows = np.array([row for _, _, row in reads])
            self.expander.read_along(rows, np.array([item.node for _, item, _ in reads]), self.llm)
            for number, item, _ in reads:
                self._branch(self.open[number], item)

    def _branch(self, search: _Search, answer: _Item) -> None:
        """Queue what an answer could have been, had the LLM written one token more."""
        tree = self.tree
        path = tree.path(answer.node)[answer.first : -1]
        tokens = tree.tokens[path]
        others = np.flatnonzero(tokens[:, self.llm] != tokens[:, 0])
        ranks = self._ranks(path, answer)
        for offset in others.tolist():
            depth = answer.first + offset
            writers = np.concatenate([answer.writers[:depth], np.array([self.llm], dtype=np.int8)])
            bound = self._cost(int(path[offset]), writers, False)
            if bound < search.best:
                node = int(path[offset])
                item = _Item(bound, float(ranks[offset]), node=node, read=False, first=depth + 1, writers=writers)
                heapq.heappush(search.heap, item)

    def _ranks(self, path: IntArray, item: _Item) -> npt.NDArray[Any]:
        """What comes first among equals, (n,): the lowest."""
        tree = self.tree
        if self.likely is None:
            return np.asarray(-tree.features(path)[:, self.pool.slm.width])  # the entropy is the first logit feature
        whole = np.zeros(item.first + len(path), dtype=np.int8)
        whole[: len(item.writers)] = item.writers
        since = since_at_each(whole)[item.first :]
        with torch.no_grad():
            scores = self.likely.score(observation_at(tree, path, since))
            return check_scores(self.likely, scores, len(path)).double().numpy()

    def _step(self) -> None:
        """One token in every row."""
        if not self.serving:
            return
        rows = np.array(sorted(self.serving))
        self.nodes[rows] = self.expander.step(rows, self.nodes[rows], self.actions[rows])
        self.actions[rows] = 0
        for row in rows[self.tree.ends[self.nodes[rows]] != GOING_ON].tolist():
            number, item = self.serving.pop(row)
            self._finish(self.open[number], item, int(self.nodes[row]))

    def _finish(self, search: _Search, item: _Item, end: int) -> None:
        tree = self.tree
        search.busy -= 1
        writers = np.zeros(int(tree.depths[end]), dtype=np.int8)
        writers[: len(item.writers)] = item.writers
        if search.alone == UNKNOWN:
            search.alone, search.alone_writers = end, writers
        if tree.correct(end, search.example):
            cost = self._cost(end, writers, bool(tree.ends[end] == TERMINATED))
            if cost < search.best:
                search.best, search.end, search.writers = cost, end, writers
            return
        # one more token of the LLM costs at least what stands there already
        bound = self._cost(end, writers[: item.first], False) + self._least
        if bound < search.best and len(writers) > item.first:
            heapq.heappush(search.heap, _Item(bound, 0.0, node=end, read=True, first=item.first, writers=writers))

    @property
    def _least(self) -> float:
        """The least that one more token of the LLM can cost."""
        return 1.0 if self.cost.name == "llm_tokens" else 0.0

    def _cost(self, node: int, writers: npt.NDArray[np.int8], terminated: bool) -> float:
        """Cost of a response, or of the beginning of one, by these writers."""
        if self.cost.name == "llm_tokens":
            return float((writers > 0).sum())
        prompt = self.tree.prompt(node)
        entries: FloatArray = response_entries(len(prompt), writers, terminated, len(self.pool))
        return float(self.cost.of(entries, self.pool.profiles))

    def _close(self, progress: ProgressBar) -> None:
        """Put away the problems whose search is over."""
        for number in [number for number, search in self.open.items() if search.done()]:
            search = self.open.pop(number)
            solved = search.end != UNKNOWN
            end = search.end if solved else search.alone
            start = int(self.tree.depths[search.start])
            self.results[number] = SearchResult(
                solved=solved,
                exhausted=search.exhausted,
                nodes=self.tree.path(end)[start:],
                writers=search.writers if solved else search.alone_writers,
                walks=search.walks,
            )
            self.tree.release(self.tree.prompt(search.start))
            progress.update()
