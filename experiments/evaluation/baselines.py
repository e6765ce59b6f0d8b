"""What no policy changes: each model alone, random routing, speculative decoding, and the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agents.common.policy import Policy
from agents.common.rollout import Episode
from agents.heuristics import Always, Random
from agents.oracle import Oracle, SearchResult
from envs.costs import ALL_COSTS, WRITTEN, Price, response_entries
from envs.models.pool import ModelPool
from envs.prefix_tree.tree import TERMINATED, PrefixTree
from envs.storage import check_manifest, write_text
from envs.tasks.task import Example
from experiments.evaluation.answers import Answers

RANDOM_SHARES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of tokens that random routing gives to the LLM."""
FRONTIER_POINTS = 24
EXHAUSTED = "oracle_exhausted.json"
"""Written last: the limits in a folder are complete with it."""
Decode = Callable[[Policy, float, str], Sequence[Episode]]


@dataclass(frozen=True)
class Baselines:
    """The limits of one set of examples.

    Attributes:
        slm: the SLM alone.
        llm: the LLM alone.
        random: random routing, at RANDOM_SHARES.
        speculative: greedy speculative decoding, which gives the LLM's answers; None where it was not asked.
        oracle: the cheapest right answer to each example, the SLM's where none was found; None where it was not asked.
        exhausted: how many searches ran out of their budget.
    """

    slm: Answers
    llm: Answers
    random: Sequence[Answers]
    speculative: Answers | None
    oracle: Answers | None
    exhausted: int

    def frontier(self, unit: str) -> list[Answers]:
        """The oracle with rising budgets: examples go from the SLM's answer to the oracle's, the cheapest first."""
        return [] if self.oracle is None else self._rising(self.oracle, unit)

    def query_frontier(self, unit: str) -> list[Answers]:
        """The same for whole queries: they go from the SLM's answer to the LLM's where that alone is right."""
        return self._rising(self.llm, unit)

    def _rising(self, best: Answers, unit: str) -> list[Answers]:
        gained = best.correct & ~self.slm.correct
        extra = best.costs[unit] - self.slm.costs[unit]
        # a right answer that is cheaper than the SLM's own is taken at once
        free = best.correct & (extra <= 0)
        rank = np.full(len(gained), np.inf)
        order = np.flatnonzero(gained & ~free)[np.argsort(extra[gained & ~free], kind="stable")]
        rank[order] = np.arange(1, len(order) + 1)
        rank[free] = 0
        cuts = np.unique(np.linspace(0, len(order), FRONTIER_POINTS).round())
        return [_chosen(best, self.slm, rank <= cut) for cut in cuts]

    def save(self, folder: Path) -> None:
        """Write all of it into `folder`."""
        pieces = {"slm": self.slm, "llm": self.llm, "speculative": self.speculative, "oracle": self.oracle}
        pieces |= {random_name(share): run for share, run in zip(RANDOM_SHARES, self.random, strict=True)}
        for name, outcomes in pieces.items():
            if outcomes is not None:
                outcomes.save(folder / f"{name}.safetensors")
        write_text(folder / EXHAUSTED, json.dumps(self.exhausted) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Baselines:
        """Read what `save` wrote."""

        def piece(name: str) -> Answers:
            return Answers.load(folder / f"{name}.safetensors")

        def asked(name: str) -> Answers | None:
            return piece(name) if (folder / f"{name}.safetensors").is_file() else None

        random = [piece(random_name(share)) for share in RANDOM_SHARES]
        exhausted = json.loads((folder / EXHAUSTED).read_text())
        return cls(piece("slm"), piece("llm"), random, asked("speculative"), asked("oracle"), exhausted)


def random_name(share: float) -> str:
    """What random routing with this share of LLM tokens is called on disk."""
    return f"random-{share}"


def _chosen(one: Answers, other: Answers, where: np.ndarray) -> Answers:
    """`one` for the examples `where`, `other` for the rest."""

    def splitmix64(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(where, a, b)

    return Answers(
        splitmix64(one.correct, other.correct),
        splitmix64(one.terminated, other.terminated),
        splitmix64(one.llm_tokens, other.llm_tokens),
        splitmix64(one.tokens, other.tokens),
        {unit: splitmix64(one.costs[unit], other.costs[unit]) for unit in one.costs},
    )


def measure_baselines(
    decode: Decode,
    pool: ModelPool,
    examples: Sequence[Example],
    speculate: Callable[[], Sequence[Episode]] | None,
    oracle: Oracle | None,
    tree: Callable[[], PrefixTree],
    folder: Path | None,
    about: Mapping[str, Any],
    timed: bool = True,
) -> Baselines:
    """Measure all limits, or read those that are there.

    Args:
        decode: answers the examples with a policy at a threshold; the last argument is a label.
        pool: the models.
        examples: what is answered.
        speculate: answers the examples by speculative decoding; None for none.
        oracle: how to search; None for no oracle.
        tree: opens the tree that is searched.
        folder: where each piece is kept when it is made; nothing is kept where None.
        about: what makes the limits; pieces in a folder that something else made are refused.
        timed: whether passes are timed.
    """
    if folder is not None:
        manifest = folder / "limits.json"
        if manifest.is_file():
            check_manifest(manifest, json.loads(manifest.read_text()), about)
        else:
            write_text(manifest, json.dumps(about, indent=1) + "\n")

    def kept(name: str, make: Callable[[], Answers]) -> Answers:
        return Answers.kept(folder and folder / f"{name}.safetensors", make)

    def random(share: float) -> Answers:
        return Answers.of(decode(Random(0), share, f"random, {share:.0%} LLM"), pool, timed=timed)

    def llm_only() -> Answers:
        # LLM-only decoding runs no SLM: of the routed run in which the LLM wrote everything, only its own work counts
        return Answers.of(
            [by_llm_alone(episode) for episode in decode(Always(slm=False), 0.5, "llm only")], pool, timed=timed
        )

    slm = kept("slm", lambda: Answers.of(decode(Always(slm=True), 0.5, "slm only"), pool, timed=timed))
    limits = Baselines(slm, kept("llm", llm_only), [], None, None, 0)
    limits = replace(limits, random=[kept(random_name(share), partial(random, share)) for share in RANDOM_SHARES])
    if speculate is not None:
        limits = replace(limits, speculative=kept("speculative", lambda: Answers.of(speculate(), pool, timed=timed)))
    if oracle is not None and not (folder and (folder / EXHAUSTED).is_file()):
        place = tree()
        found = oracle.search(place, examples)
        limits = replace(
            limits, oracle=oracle_outcomes(place, found, slm), exhausted=sum(one.exhausted for one in found)
        )
    if folder is None:
        return limits
    if not (folder / EXHAUSTED).is_file():
        limits.save(folder)
    return Baselines.load(folder)


def by_llm_alone(episode: Episode) -> Episode:
    """A routed answer in which the LLM wrote everything, less the reading of the SLM: LLM-only decoding runs none."""
    ledger = episode.ledger.copy()
    ledger[:-1] = 0
    return replace(episode, ledger=ledger)


def oracle_outcomes(tree: PrefixTree, found: Sequence[SearchResult], slm: Answers) -> Answers:
    """What the oracle's answers come to; where it found none, the SLM's."""
    ends = np.array([one.nodes[-1] for one in found])
    terminated = tree.ends[ends] == TERMINATED
    prompts = [len(tree.prompt(end)) for end in ends]
    entries = np.stack(
        [
            response_entries(prompt, one.writers, bool(end), len(tree.pool))
            for one, prompt, end in zip(found, prompts, terminated, strict=True)
        ]
    )
    price = Price(tree.pool.profiles, [cost for cost in ALL_COSTS if cost.name in slm.costs])
    outcomes = Answers(
        np.array([one.solved for one in found]),
        terminated,
        entries[:, 1:, WRITTEN].sum(1),
        entries[:, :, WRITTEN].sum(1),
        price.of(entries),
    )
    return _chosen(outcomes, slm, outcomes.correct)
