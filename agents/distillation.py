"""Search distillation: a router that learns the oracle's routings, and those from states it comes to itself.

The router imitates the oracle's path through each training problem, token by token: the LLM where the path needed it,
the SLM everywhere else, harmless disagreements included; the loss is binary cross-entropy. Later rounds let the router
answer, search on from states it visited, and add those paths: DAgger (Ross et al., AISTATS 2011, algorithm 3.1), with
search as the demonstrator as in expert iteration (Anthony et al., NeurIPS 2017). Unlike there, the demonstrator never
acts in the router's place, it starts from a few states of each answer, and where it solves nothing nothing is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt
from torch import Tensor

from agents.common.policy import Learner, TrainingRun
from agents.common.rollout import Scheduling, decode
from agents.oracle import Oracle, SearchResult
from agents.router.dataset import LabelledTokens
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from envs.arrays import BoolArray, IntArray
from envs.decoding.decoder import since_at_each
from envs.decoding.observation import check_features
from envs.models.pool import models_manifest
from envs.prefix_tree.tree import PrefixTree
from envs.prefix_tree.tree_session import observation_at
from envs.tasks.task import Example, Task

SEARCHED_AT_ONCE = 1000
"""Problems searched between two savings of the tree."""


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

    def joined(self, other: OracleStates) -> OracleStates:
        """Both together."""
        return OracleStates(*(np.concatenate(pair) for pair in zip(self._columns(), other._columns(), strict=True)))

    def _columns(self) -> tuple[IntArray, IntArray, BoolArray, IntArray]:
        return self.nodes, self.since_llm, self.prefers_slm, self.examples

    def features(self, tree: PrefixTree, features: str) -> Tensor:
        """What a router of these `features` sees of them: float16, (n, width)."""
        return observation_at(tree, self.nodes, self.since_llm).vector(features).half()


@dataclass(frozen=True)
class OracleDistillation(Learner[RouterPolicy]):
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

    def train(self, run: TrainingRun) -> RouterPolicy:
        pool, task = run.pool, run.task
        start = task.training_start(run.seed)
        examples = task.examples("train", self.examples, start=start)
        # what was searched is kept when a run is interrupted; other problems of the task have another start
        kept = run.file("expert.tree")
        tree = PrefixTree(pool, task, self.max_new_tokens, self.memory, kept if kept and kept.is_file() else None)
        rng = np.random.default_rng(run.seed)
        numbers = list(range(len(examples)))
        searches: list[SearchResult] = []
        for begin in range(0, len(examples), SEARCHED_AT_ONCE):
            searches += self.oracle.search(tree, examples[begin : begin + SEARCHED_AT_ONCE])
            if kept is not None:
                tree.save(kept)
        labelled = OracleStates.of(searches, numbers)
        policy = self._train_router(run, tree, labelled, searches, 1)
        for number in range(2, self.rounds + 1):
            if self.ties == "router":
                labelled = OracleStates.of(self.oracle.search(tree, examples, likely=policy), numbers)
            starts, written, owners = self._visited(tree, task, examples, policy, labelled, rng)
            if starts:
                searches = self.oracle.search(
                    tree,
                    [examples[owner] for owner in owners],
                    starts=starts,
                    written=written,
                    likely=policy if self.ties == "router" else None,
                )
                labelled = labelled.joined(OracleStates.of(searches, owners))
                if kept is not None:
                    tree.save(kept)
            policy = self._train_router(run, tree, labelled, searches, number)
        return policy

    def _visited(
        self,
        tree: PrefixTree,
        task: Task,
        examples: Sequence[Example],
        policy: RouterPolicy,
        labelled: OracleStates,
        rng: np.random.Generator,
    ) -> tuple[list[int], list[npt.NDArray[np.int8]], list[int]]:
        """States the router comes to: their nodes, who wrote what stands there, and of which problem."""
        scores = policy.score(observation_at(tree, labelled.nodes, labelled.since_llm)).double().numpy()
        threshold = float(np.quantile(scores, self.llm_share))
        episodes = decode(
            tree.pool,
            task,
            examples,
            policy,
            threshold,
            max_new_tokens=self.max_new_tokens,
            scheduling=self.scheduling,
            label="the router's answers",
            tree=tree,
        )
        starts, written, owners = [], [], []
        for number, episode in enumerate(episodes):
            nodes = tree.descend(tree.pool.encode_prompt(episode.example), episode.tokens)
            inner = np.arange(1, len(nodes) - 1)
            for depth in np.sort(rng.choice(inner, min(self.states, len(inner)), replace=False)).tolist():
                starts.append(int(nodes[depth]))
                written.append(episode.writers[:depth])
                owners.append(number)
        return starts, written, owners

    def _train_router(
        self, run: TrainingRun, tree: PrefixTree, labelled: OracleStates, searches: Sequence[SearchResult], number: int
    ) -> RouterPolicy:
        # a forgotten state's number names another one
        if tree.evictions:
            raise ValueError(
                f"the tree's memory of {self.memory} bytes does not hold the searches of {len(searches)} problems; "
                "raise memory or lower examples"
            )
        name = f"round {number}"
        run.track(
            {
                "run": name,
                "searches": len(searches),
                "solved": float(np.mean([search.solved for search in searches])),
                "ran_out_of_budget": int(sum(search.exhausted for search in searches)),
                "answers_tried": float(np.mean([search.walks for search in searches])),
                "states": len(labelled.nodes),
                "llm_share": float(1 - labelled.prefers_slm.mean()) if len(labelled.nodes) else 0.0,
                "tree": len(tree),
            }
        )
        data = LabelledTokens.in_memory(labelled.features(tree, self.features), labelled.prefers_slm, labelled.examples)
        network, report = fit_router(
            data,
            self.training,
            run.seed,
            run.track,
            device=tree.pool.slm.device,
            label=name,
            checkpoint=run.file(f"round-{number}.safetensors"),
        )
        run.track({"run": name, **report})
        return RouterPolicy(network, models_manifest(tree.pool), self.features, report)
