"""Search distillation: a router that learns the oracle's routings, and those from states it comes to itself.

The oracle's path through each training problem is taught token by token: the LLM where it needed it, the SLM everywhere
else, harmless disagreements included. Later rounds let the router answer, search on from states it visited, and add
those paths (DAgger, Ross et al. 2011, with search as the expert, as in expert iteration, Anthony et al. 2017).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from agents.common.policy import Track, untracked
from agents.common.rollout import Scheduling, decode
from agents.oracle import Oracle, SearchResult
from agents.router.dataset import LabelledTokens
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from envs.arrays import BoolArray, IntArray
from envs.decoding.decoder import since_at_each
from envs.decoding.observation import check_features
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.tree import PrefixTree
from envs.prefix_tree.tree_session import observation_at
from envs.tasks.task import Example, Task, first_training_example

SEARCHED_AT_ONCE = 1000
"""Problems searched between two savings of the tree."""


@dataclass(frozen=True)
class TaughtStates:
    """States of a tree with the expert's choice in each.

    Attributes:
        nodes: (n,).
        since_llm: tokens since the LLM last wrote, (n,).
        prefers_slm: the expert's choice, (n,).
        examples: the number of the problem each is from, (n,).
    """

    nodes: IntArray
    since_llm: IntArray
    prefers_slm: BoolArray
    examples: IntArray

    @classmethod
    def of(cls, found: Sequence[SearchResult], examples: Sequence[int]) -> TaughtStates:
        """The states on the paths of solved searches, each of the problem of that number."""
        solved = [(one, number) for one, number in zip(found, examples, strict=True) if one.solved]
        nothing: IntArray = np.zeros(0, dtype=np.int64)
        writers = [one.writers[-(len(one.nodes) - 1) :] for one, _ in solved]
        since = [since_at_each(one.writers)[-(len(one.nodes) - 1) :] for one, _ in solved]
        return cls(
            np.concatenate([nothing, *(one.nodes[:-1] for one, _ in solved)]),
            np.concatenate([nothing, *since]),
            np.concatenate([nothing, *writers]) == 0,
            np.concatenate([nothing, *(np.full(len(w), n) for w, (_, n) in zip(writers, solved, strict=True))]),
        )

    def joined(self, other: TaughtStates) -> TaughtStates:
        """Both together."""
        return TaughtStates(*(np.concatenate(pair) for pair in zip(self._columns(), other._columns(), strict=True)))

    def _columns(self) -> tuple[IntArray, IntArray, BoolArray, IntArray]:
        return self.nodes, self.since_llm, self.prefers_slm, self.examples

    def features(self, tree: PrefixTree, features: str) -> Tensor:
        """What a router of these `features` sees of them: float16, (n, width)."""
        return observation_at(tree, self.nodes, self.since_llm).seen(features).half()


@dataclass(frozen=True)
class OracleDistillation:
    """A router distilled from search.

    Args:
        examples: training problems; all of the train split where None.
        rounds: of searching and training; the first from the prompts, later ones from states the router came to.
        states: how many states of each of the router's answers later rounds search from.
        llm_share: the share of tokens the router gives to the LLM when later rounds let it answer.
        ties: among routings of the same cost, the oracle tries first where the SLM is least sure (`entropy`), or where
            the router of the round before would rather ask the LLM (`router`): then a later round searches the first
            one's problems again, for paths that are likely under that router.
        features: what the router sees, one of `envs.decoding.observation.FEATURES`.
        oracle: how paths are searched.
        max_new_tokens: the longest response.
        memory: bytes of the replay tree.
        training: how the router is trained.
        scheduling: how responses share passes.
    """

    examples: int | None = 4000
    rounds: int = 1
    states: int = 2
    llm_share: float = 0.06
    ties: Literal["entropy", "router"] = "entropy"
    features: Literal["hidden", "hidden_logits", "hidden_logits_history"] = "hidden_logits_history"
    oracle: Oracle = field(default_factory=lambda: Oracle(budget=200))
    max_new_tokens: int = 128
    memory: int = 2**31
    training: RouterTraining = field(default_factory=RouterTraining)
    scheduling: Scheduling = field(default_factory=Scheduling)

    def __post_init__(self) -> None:
        check_features(self.features)
        if (self.examples is not None and self.examples < 2) or self.rounds < 1 or self.states < 0:
            raise ValueError(
                f"examples ({self.examples}) must be at least 2, rounds ({self.rounds}) at least 1 and states "
                f"({self.states}) at least 0"
            )
        if not 0 < self.llm_share < 1:
            raise ValueError(f"llm_share must be in (0, 1), is {self.llm_share}")
        if self.ties not in ("entropy", "router"):
            raise ValueError(f"unknown ties {self.ties!r}; choose entropy or router")

    def fit(
        self, pool: ModelPool, task: Task, seed: int = 0, track: Track = untracked, folder: Path | None = None
    ) -> RouterPolicy:
        start = first_training_example(task, seed)
        examples = task.examples("train", self.examples, start=start)
        # what a search found stays found when a run is interrupted; other problems of the task have another start
        kept = None if folder is None else folder / "expert.tree"
        tree = PrefixTree(pool, task, self.max_new_tokens, self.memory, kept if kept and kept.is_file() else None)
        rng = np.random.default_rng(seed)
        numbers = list(range(len(examples)))
        found: list[SearchResult] = []
        for begin in range(0, len(examples), SEARCHED_AT_ONCE):
            found += self.oracle.search(tree, examples[begin : begin + SEARCHED_AT_ONCE])
            if kept is not None:
                tree.save(kept)
        taught = TaughtStates.of(found, numbers)
        policy = self._train(tree, taught, found, seed, 1, track, folder)
        for number in range(2, self.rounds + 1):
            if self.ties == "router":
                taught = TaughtStates.of(self.oracle.search(tree, examples, likely=policy), numbers)
            starts, written, owners = self._visited(tree, task, examples, policy, taught, rng)
            if starts:
                found = self.oracle.search(
                    tree, [examples[owner] for owner in owners], starts, written,
                    policy if self.ties == "router" else None,
                )  # fmt: skip
                taught = taught.joined(TaughtStates.of(found, owners))
                if kept is not None:
                    tree.save(kept)
            policy = self._train(tree, taught, found, seed, number, track, folder)
        return policy

    def _visited(
        self,
        tree: PrefixTree,
        task: Task,
        examples: Sequence[Example],
        policy: RouterPolicy,
        taught: TaughtStates,
        rng: np.random.Generator,
    ) -> tuple[list[int], list[npt.NDArray[np.int8]], list[int]]:
        """States the router comes to: their nodes, who wrote what stands there, and of which problem."""
        scores = policy.score(observation_at(tree, taught.nodes, taught.since_llm)).double().numpy()
        threshold = float(np.quantile(scores, self.llm_share))
        episodes = decode(
            tree.pool, task, examples, policy, threshold, self.max_new_tokens, self.scheduling,
            label="the router's answers", tree=tree,
        )  # fmt: skip
        starts, written, owners = [], [], []
        for number, episode in enumerate(episodes):
            nodes = tree.descend(tree.pool.encode(episode.example.prompt), episode.tokens)
            inner = np.arange(1, len(nodes) - 1)
            for depth in np.sort(rng.choice(inner, min(self.states, len(inner)), replace=False)).tolist():
                starts.append(int(nodes[depth]))
                written.append(episode.writers[:depth])
                owners.append(number)
        return starts, written, owners

    def _train(
        self,
        tree: PrefixTree,
        taught: TaughtStates,
        found: Sequence[SearchResult],
        seed: int,
        number: int,
        track: Track,
        folder: Path | None,
    ) -> RouterPolicy:
        # a forgotten state's number names another one
        if tree.evictions:
            raise ValueError(
                f"the tree's memory of {self.memory} bytes does not hold the searches of {len(found)} problems; "
                "raise memory or lower examples"
            )
        name = f"round {number}"
        track(
            {
                "run": name,
                "searches": len(found),
                "solved": float(np.mean([one.solved for one in found])),
                "ran_out_of_budget": int(sum(one.exhausted for one in found)),
                "answers_tried": float(np.mean([one.walks for one in found])),
                "states": len(taught.nodes),
                "llm_share": float(1 - taught.prefers_slm.mean()) if len(taught.nodes) else 0.0,
                "tree": len(tree),
            }
        )
        data = LabelledTokens.in_memory(taught.features(tree, self.features), taught.prefers_slm, taught.examples)
        checkpoint = folder / f"round-{number}.safetensors" if folder else None
        network, report = fit_router(data, self.training, seed, track, tree.pool.slm.device, name, checkpoint)
        track({"run": name, **report})
        return RouterPolicy(network, models_manifest(tree.pool), self.features, report)
