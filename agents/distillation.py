"""Search distillation: a router that learns the oracle's routings, and those from states it comes to itself.

The router imitates the oracle's path through each training problem, token by token: the LLM where the path needed it,
the SLM everywhere else, harmless disagreements included; the loss is binary cross-entropy. Later rounds let the router
answer, search on from states it visited, and add those paths: DAgger (Ross et al., AISTATS 2011, algorithm 3.1), with
search as the demonstrator as in expert iteration (Anthony et al., NeurIPS 2017). Unlike there, the demonstrator never
acts in the router's place, it starts from a few states of each answer, and where it solves nothing nothing is added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from agents.common.policy import Learner, Track, TrainingRun, untracked
from agents.common.rollout import Scheduling, decode
from agents.oracle import Oracle, SearchResult
from agents.preferences.store import Columns, PreferenceStore, Share, shard_ranges
from agents.router.policy import RouterPolicy
from agents.router.training import RouterTraining, fit_router
from agents.searched_states import SearchedStates, searches_kept
from envs.decoding.observation import check_features
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.tree import PrefixTree
from envs.storage import check_manifest
from envs.tasks.task import Example, Task

SEARCHED_AT_ONCE = 1000
"""Problems searched between two savings of the tree."""


@dataclass(frozen=True)
class OracleDistillation(Learner[RouterPolicy]):
    """A router distilled from search.

    Args:
        examples: training problems; all of the train split where None.
        searched: a folder written by `experiments.collect` to take the searches of the first round from.
        shard_examples: problems of one file of such a folder.
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
    searched: str | None = None
    shard_examples: int = 256
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
        if (self.examples is not None and self.examples < 2) or self.states < 0:
            raise ValueError(f"examples ({self.examples}) must be at least 2, states ({self.states}) at least 0")
        if self.rounds < 1 or self.shard_examples < 1:
            raise ValueError(f"rounds ({self.rounds}) and shard_examples ({self.shard_examples}) must be at least 1")
        if not 0 < self.llm_share < 1:
            raise ValueError(f"llm_share must be in (0, 1), is {self.llm_share}")
        if self.ties not in ("entropy", "router"):
            raise ValueError(f"unknown ties {self.ties!r}; choose entropy or router")

    def train(self, run: TrainingRun) -> RouterPolicy:
        pool, task = run.pool, run.task
        examples = self._problems(task, run.seed)
        # what was searched is kept when a run is interrupted; other problems of the task have another start
        kept = run.file("expert.tree")
        tree = PrefixTree(pool, task, self.max_new_tokens, self.memory, kept if kept and kept.is_file() else None)
        rng = np.random.default_rng(run.seed)
        numbers = list(range(len(examples)))
        if self.searched is not None:
            labelled = self._given(Path(self.searched), self._manifest(pool, task, run.seed, len(examples)))
        else:
            searches: list[SearchResult] = []
            for begin in range(0, len(examples), SEARCHED_AT_ONCE):
                searches += self.oracle.search(tree, examples[begin : begin + SEARCHED_AT_ONCE])
                if kept is not None:
                    tree.save(kept)
            labelled = SearchedStates.of(searches, numbers, tree, self.features)
        policy = self._train_router(run, len(tree), labelled, 1)
        for number in range(2, self.rounds + 1):
            if self.ties == "router":
                again = self.oracle.search(tree, examples, likely=policy)
                labelled = SearchedStates.of(again, numbers, tree, self.features)
            starts, written, owners = self._visited(tree, task, examples, policy, labelled, rng)
            if starts:
                searches = self.oracle.search(
                    tree,
                    [examples[owner] for owner in owners],
                    starts=starts,
                    written=written,
                    likely=policy if self.ties == "router" else None,
                )
                labelled = labelled.joined(SearchedStates.of(searches, owners, tree, self.features))
                if kept is not None:
                    tree.save(kept)
            policy = self._train_router(run, len(tree), labelled, number)
        return policy

    def collect(
        self, pool: ModelPool, task: Task, seed: int, folder: Path, track: Track = untracked
    ) -> PreferenceStore:
        """Search what the first round searches, into `folder`, going on where an earlier run was interrupted."""
        store = self.collect_share(pool, task, seed, folder, Share())
        track({"run": "round 1", "tokens": sum(store.rows()), **searches_kept(store)})
        return store

    def collect_share(self, pool: ModelPool, task: Task, seed: int, folder: Path, share: Share) -> PreferenceStore:
        """Make one share of what `collect` makes, beside other processes; the bytes are the same."""
        examples = self._problems(task, seed)
        parts = shard_ranges(len(examples), self.shard_examples)

        def searched(shard: int) -> tuple[Columns, Mapping[str, Any]]:
            # a tree of its own: which other problems a process searches changes no bit
            tree, numbers = PrefixTree(pool, task, self.max_new_tokens, self.memory), parts[shard]
            searches = self.oracle.search(tree, [examples[number] for number in numbers])
            return SearchedStates.of(searches, numbers, tree, self.features).columns()

        store = PreferenceStore(folder, self._manifest(pool, task, seed, len(examples)), len(parts))
        store.complete(parts, searched, "search", share)
        return store

    def _problems(self, task: Task, seed: int) -> Sequence[Example]:
        return task.examples("train", self.examples, start=task.training_start(seed))

    def _manifest(self, pool: ModelPool, task: Task, seed: int, examples: int) -> dict[str, Any]:
        """What makes the searches of the first round, of so many problems."""
        return {
            "models": models_manifest(pool),
            "task": {"name": task.name, "start": task.training_start(seed), "examples": examples},
            "searched": {
                "features": self.features,
                "max_new_tokens": self.max_new_tokens,
                "shard_examples": self.shard_examples,
                "oracle": {"cost": self.oracle.cost, "budget": self.oracle.budget},
            },
        }

    def _given(self, folder: Path, manifest: Mapping[str, Any]) -> SearchedStates:
        """The states of searches that were collected, as `manifest` says.

        Raises:
            ValueError: other models, problems or settings made them, or files are missing or damaged.
        """
        store = PreferenceStore.open(folder)
        check_manifest(folder, store.manifest, manifest, [*manifest])
        store.require()
        return SearchedStates.kept(store)

    def _visited(
        self,
        tree: PrefixTree,
        task: Task,
        examples: Sequence[Example],
        policy: RouterPolicy,
        labelled: SearchedStates,
        rng: np.random.Generator,
    ) -> tuple[list[int], list[npt.NDArray[np.int8]], list[int]]:
        """States the router comes to: their nodes, who wrote what stands there, and of which problem."""
        with torch.no_grad():
            scores = policy.network(labelled.features.float().to(tree.pool.slm.device)).sigmoid().double().cpu().numpy()
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

    def _train_router(self, run: TrainingRun, tree: int, labelled: SearchedStates, number: int) -> RouterPolicy:
        name, about = f"round {number}", labelled.about
        run.track(
            {
                "run": name,
                "searches": about["searches"],
                "solved": about["solved"] / about["searches"],
                "ran_out_of_budget": about["exhausted"],
                "answers_tried": about["tried"] / about["searches"],
                "states": len(labelled.features),
                "llm_share": float(1 - labelled.prefers_slm.mean()) if len(labelled.features) else 0.0,
                "tree": tree,
            }
        )
        network, report = fit_router(
            labelled.labelled(),
            self.training,
            run.seed,
            run.track,
            device=run.pool.slm.device,
            label=name,
            checkpoint=run.file(f"round-{number}.safetensors"),
        )
        run.track({"run": name, **report})
        return RouterPolicy(network, models_manifest(run.pool), self.features, report)
