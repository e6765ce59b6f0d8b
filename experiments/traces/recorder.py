"""Writes the traces of an evaluation: what all of its decodings have in common, and each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agents.common.policy import Policy, decision_profile
from agents.common.rollout import Episode, Scheduling
from agents.heuristics import Always
from agents.oracle import SearchResult
from envs.arrays import FloatArray
from envs.costs import COLUMNS, response_entries
from envs.decoding.judges import described
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import TERMINATED, PrefixTree
from envs.tasks.task import Example, Task
from experiments.traces.schema import CHECKED, LLM_ONLY, PROMPT_READERS, ROUTED, SEARCH, SPECULATIVE
from experiments.traces.trace import SUFFIX, Head, Trace, traced, write_trace

LIVE, TREE = "citer/TokenRouting-v1", "citer/TreeRouting-v1"


def prompt_readers(policy: Policy, models: int) -> list[int]:
    """The models of a pool of so many that read each prompt because the policy sees their states behind it."""
    return [models - 1] if "llm" in policy.sees else []


def hardware_of(pool: ModelPool) -> str:
    """What runs the models: the GPU, or the kind of CPU that torch computes for."""
    devices = {model.device for model in pool.models}
    names = {
        torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        for device in devices
    }
    return f"{'+'.join(sorted({device.type for device in devices}))} {', '.join(sorted(names))}"


@dataclass(frozen=True)
class Recorder:
    """Writes traces.

    Args:
        pool: the models.
        task: that judged.
        split: of the task.
        start: the first problem of the split.
        max_new_tokens: the longest response.
        scheduling: how responses shared passes.
        timed: whether the seconds of passes are part of the costs; they are not with a replay tree.
    """

    pool: ModelPool
    task: Task
    split: str
    start: int = 0
    max_new_tokens: int = 128
    scheduling: Scheduling | None = None
    timed: bool = True

    def on_validation(self) -> Recorder:
        """The same for the validation problems."""
        return replace(self, split="validation", start=0)

    def routed(
        self, path: Path, episodes: Sequence[Episode], name: str, policy: Policy, threshold: float, priced: bool = True
    ) -> None:
        """Write the trace of episodes that a policy routed, beside what is kept of them.

        Args:
            path: of the file that keeps the answers, whose name the trace takes but for its end.
            episodes: that were decoded.
            name: what results call the policy.
            policy: it.
            threshold: that its scores were compared with.
            priced: whether its decisions are part of the cost.
        """
        if policy.judge is None:
            head = self._head(name, ROUTED, policy, threshold, priced)
        else:
            how = {"judge": described(policy.judge), "observes": policy.observes}
            head = self._head(name, CHECKED, policy, threshold, priced, **how)
        self._write(path, episodes, head)

    def llm_only(self, path: Path, episodes: Sequence[Episode], name: str) -> None:
        """Write the trace of LLM-only decoding: the routing that asks the LLM always, less the work of the SLM."""
        self._write(path, episodes, self._head(name, LLM_ONLY, Always(slm=False), 0.5, priced=False))

    def speculative(self, path: Path, episodes: Sequence[Episode], name: str, draft_tokens: int) -> None:
        """Write the trace of speculative decoding with drafts of so many tokens."""
        self._write(path, episodes, self._head(name, SPECULATIVE, draft_tokens=draft_tokens))

    def searched(
        self,
        path: Path,
        tree: PrefixTree,
        results: Sequence[SearchResult],
        examples: Sequence[Example],
        name: str,
        budget: int,
    ) -> None:
        """Write the trace of what the oracle found: the cheapest right answers, the SLM's where it found none."""
        episodes = [_found(tree, result, example) for result, example in zip(results, examples, strict=True)]
        self._write(path, episodes, self._head(name, SEARCH, oracle_budget=budget))

    def _write(self, path: Path, episodes: Sequence[Episode], head: Head) -> None:
        decided = head.policy_fingerprint is not None
        records = [
            traced(number, episode, self.pool.encode_prompt(episode.example), decided)
            for number, episode in enumerate(episodes)
        ]
        write_trace(path.with_suffix(SUFFIX), Trace(head, records))

    def _head(
        self,
        name: str,
        decoding: str,
        policy: Policy | None = None,
        threshold: float | None = None,
        priced: bool = False,
        **more: Any,
    ) -> Head:
        scheduling = self.scheduling or Scheduling()
        readers = [] if policy is None else prompt_readers(policy, len(self.pool))
        settings = {
            "start": self.start,
            "max_new_tokens": self.max_new_tokens,
            "end_tokens": self.pool.end_tokens.tolist(),
            "rows": scheduling.rows_for(self.pool),
            "gather": scheduling.gather,
            "timed": self.timed,
            **({PROMPT_READERS: readers} if readers else {}),
            **more,
        }
        return Head(
            environment=LIVE if self.timed else TREE,
            decoding=decoding,
            settings=settings,
            hardware=hardware_of(self.pool),
            threads=torch.get_num_threads(),
            models=self.pool.names,
            model_fingerprints=self.pool.fingerprints,
            profiles=self.pool.profiles,
            policy=name,
            policy_fingerprint=None if policy is None else policy.fingerprint,
            policy_profile=decision_profile(policy) if policy is not None and priced else None,
            per_response=policy is not None and policy.per_response,
            threshold=None if threshold is None else float(threshold),
            task=self.task.name,
            split=self.split,
        )


def _found(tree: PrefixTree, result: SearchResult, example: Example) -> Episode:
    """The answer of a search as an episode."""
    path, end, pool = result.nodes[:-1], int(result.nodes[-1]), tree.pool
    tokens = tree.tokens[path, result.writers].astype(np.int64)
    terminated = bool(tree.ends[end] == TERMINATED)
    nothing: FloatArray = np.zeros(COLUMNS)
    return Episode(
        example=example,
        tokens=tokens,
        writers=result.writers,
        text=pool.decode(tokens),
        correct=result.solved,
        terminated=terminated,
        ledger=response_entries(len(tree.prompt(end)), result.writers, terminated, len(pool)),
        decisions=nothing,
        scores=np.zeros(len(tokens), dtype=np.float32),
    )
