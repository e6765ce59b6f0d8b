"""What no policy changes: each model alone, speculative decoding, and the oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from agents.common.policy import Policy
from agents.common.rollout import Episode
from agents.heuristics import Always
from agents.oracle import Oracle, SearchResult
from envs.costs import ALL_COSTS, WRITTEN, Price, response_entries
from envs.prefix_tree.tree import TERMINATED, PrefixTree
from envs.storage import keep_manifest, write_text
from experiments.evaluation.answers import Answers
from experiments.evaluation.decoder import ExampleDecoder
from experiments.traces.recorder import Recorder

FRONTIER_POINTS = 24
VALIDATION = ("validation-slm", "validation-llm")
"""Names on disk of the models' answers to validation problems."""
Record = Callable[..., None]
"""A method of `Recorder` that is given it, a path, episodes and a name."""
MANIFEST = "limits.json"
EXHAUSTED = "oracle_exhausted.json"
"""Written last: the baselines in a folder are complete with it."""


@dataclass(frozen=True)
class Baselines:
    """The baselines of one set of examples.

    Attributes:
        slm: the SLM alone.
        llm: the LLM alone.
        speculative: greedy speculative decoding, which gives the LLM's answers; None where it was not asked.
        oracle: the cheapest right answer to each example, the SLM's where none was found; None where it was not asked.
        exhausted: how many searches ran out of their budget.
        validation: the SLM's and the LLM's answers to the validation problems; None where there are none.
    """

    slm: Answers
    llm: Answers
    speculative: Answers | None
    oracle: Answers | None
    exhausted: int
    validation: tuple[Answers, Answers] | None = None

    def in_units(self, units: Collection[str]) -> Baselines:
        """The same with costs in some units alone."""
        speculative, oracle = (one and one.in_units(units) for one in (self.speculative, self.oracle))
        ends = self.validation and (self.validation[0].in_units(units), self.validation[1].in_units(units))
        return Baselines(self.slm.in_units(units), self.llm.in_units(units), speculative, oracle, self.exhausted, ends)

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
        return [best.where(rank <= cut, self.slm) for cut in cuts]

    def pieces(self) -> dict[str, Answers]:
        """All answers that are there, by their names on disk."""
        pieces = {"slm": self.slm, "llm": self.llm, "speculative": self.speculative, "oracle": self.oracle}
        pieces |= dict(zip(VALIDATION, self.validation or (), strict=False))
        return {name: answers for name, answers in pieces.items() if answers is not None}

    def save(self, folder: Path) -> None:
        """Write all of it into `folder`."""
        for name, answers in self.pieces().items():
            answers.save(folder / f"{name}.safetensors")
        write_text(folder / EXHAUSTED, json.dumps(self.exhausted) + "\n")

    @classmethod
    def load(cls, folder: Path) -> Baselines:
        """Read what `save` wrote."""

        def piece(name: str) -> Answers:
            return Answers.load(folder / f"{name}.safetensors")

        def asked(name: str) -> Answers | None:
            return piece(name) if (folder / f"{name}.safetensors").is_file() else None

        ends = asked(VALIDATION[0]), asked(VALIDATION[1])
        return cls(
            slm=piece("slm"),
            llm=piece("llm"),
            speculative=asked("speculative"),
            oracle=asked("oracle"),
            exhausted=json.loads((folder / EXHAUSTED).read_text()),
            validation=None if ends[0] is None or ends[1] is None else (ends[0], ends[1]),
        )


def measure_baselines(
    decoder: ExampleDecoder,
    oracle: Oracle | None = None,
    draft_tokens: int = 0,
    folder: Path | None = None,
    about: Mapping[str, Any] | None = None,
    validation: ExampleDecoder | None = None,
    recorder: Recorder | None = None,
) -> Baselines:
    """Measure all baselines, or read those that are there.

    Args:
        decoder: of the examples.
        oracle: how to search; None for no oracle.
        draft_tokens: of speculative decoding; 0 for none of it.
        folder: where each piece is kept when it is made; nothing is kept where None.
        about: what makes the baselines.
        validation: the decoder of validation problems; None for none of them.
        recorder: writes their traces into `folder`; there are none where None.

    Raises:
        ValueError: something else made the pieces in `folder`; the error names what differs.
    """
    if folder is not None:
        keep_manifest(folder / MANIFEST, about or {})

    def kept(name: str, decode: Callable[[], Sequence[Episode]], record: Record, recorder: Recorder | None) -> Answers:
        path = folder and folder / f"{name}.safetensors"

        def decoded() -> Answers:
            episodes = decode()
            if path is not None and recorder is not None:
                record(recorder, path, episodes, name)  # first: what is kept has a trace
            return Answers.of(episodes, decoder.pool, timed=decoder.timed)

        return Answers.kept(path, decoded)

    def routed(policy: Policy, threshold: float) -> Record:
        return partial(Recorder.routed, policy=policy, threshold=threshold, priced=False)

    def ends(one: ExampleDecoder, names: Sequence[str], recorder: Recorder | None) -> tuple[Answers, Answers]:
        slm = Always(slm=True)
        return (
            kept(names[0], lambda: one.decode(slm, 0.5, "slm only"), routed(slm, 0.5), recorder),
            kept(names[1], lambda: one.llm_only("llm only"), Recorder.llm_only, recorder),
        )

    slm, llm = ends(decoder, ("slm", "llm"), recorder)
    validated = None if validation is None else ends(validation, VALIDATION, recorder and recorder.on_validation())
    speculative = None
    if draft_tokens:
        drafted = partial(Recorder.speculative, draft_tokens=draft_tokens)
        speculative = kept("speculative", lambda: decoder.speculate(draft_tokens), drafted, recorder)
    if folder is not None and (folder / EXHAUSTED).is_file():
        return Baselines.load(folder)
    baselines = Baselines(slm, llm, speculative, None, 0, validated)
    if oracle is not None:
        tree, results = decoder.search(oracle)
        if folder is not None and recorder is not None:
            recorder.searched(folder / "oracle", tree, results, decoder.examples, "oracle", oracle.budget)
        best = oracle_outcomes(tree, results, slm)
        baselines = replace(baselines, oracle=best, exhausted=sum(result.exhausted for result in results))
    if folder is None:
        return baselines
    baselines.save(folder)
    return Baselines.load(folder)


def oracle_outcomes(tree: PrefixTree, results: Sequence[SearchResult], slm: Answers) -> Answers:
    """What the oracle's answers come to; where it found none, the SLM's."""
    ends = np.array([result.nodes[-1] for result in results])
    terminated = tree.ends[ends] == TERMINATED
    prompts = [len(tree.prompt(end)) for end in ends]
    entries = np.stack(
        [
            response_entries(prompt, result.writers, bool(end), len(tree.pool))
            for result, prompt, end in zip(results, prompts, terminated, strict=True)
        ]
    )
    price = Price(tree.pool.profiles, [cost for cost in ALL_COSTS if cost.name in slm.costs])
    answers = Answers(
        correct=np.array([result.solved for result in results]),
        terminated=terminated,
        llm_tokens=entries[:, 1:, WRITTEN].sum(1),
        tokens=entries[:, :, WRITTEN].sum(1),
        costs=price.of(entries),
    )
    return answers.where(answers.correct, slm)
