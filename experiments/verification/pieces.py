"""The pieces of an evaluation: each file of traces, with what is kept of the same answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from agents.heuristics import Always
from envs.tasks.task import Example, Task
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import VALIDATION
from experiments.evaluation.kept import VALIDATED, KeptEvaluation
from experiments.traces.recorder import LIVE, TREE
from experiments.traces.schema import CHECKED, LLM_ONLY, ROUTED, SEARCH, SPECULATIVE
from experiments.traces.trace import SUFFIX, Trace, read_trace

ROUNDING = 1e-9
"""How far sums of products may differ between machines, as a share of them."""
ANSWERS = ".safetensors"


@dataclass(frozen=True)
class Piece:
    """One decoding of all problems.

    Attributes:
        kept: the file of what is kept of it.
        wanted: columns and settings that the head of its trace must have.
        count: of the problems.
        part: whether its trace holds the first of them alone, since no more were shipped.
    """

    kept: Path
    wanted: Mapping[str, Any]
    count: int
    part: bool = False

    def problems(self, task: Task) -> Sequence[Example]:
        """What was answered."""
        return task.examples(self.wanted["split"], self.count, start=self.wanted["start"])

    @property
    def path(self) -> Path:
        """The file of its trace."""
        return self.kept.with_suffix(SUFFIX)

    @cached_property
    def trace(self) -> Trace:
        """Its trace.

        Raises:
            ValueError: it is damaged.
        """
        return read_trace(self.path)


def pieces_of(evaluation: KeptEvaluation) -> list[Piece]:
    """The pieces of an evaluation that must have traces: baselines, then each policy at each threshold.

    Of one that was unpacked these are the pieces whose traces were shipped.
    """
    pieces = _all_pieces(evaluation)
    shipped = evaluation.shipped
    if shipped is None:
        return pieces
    names = {f"{piece.kept.relative_to(evaluation.runs).with_suffix('')}": piece for piece in pieces}
    unknown = [name for name in shipped if name not in names]
    if unknown:
        raise ValueError(f"{evaluation.runs} has traces of {', '.join(unknown)}, of which there are no answers")
    return [
        replace(names[name], count=min(count, names[name].count), part=count < names[name].count)
        for name, count in shipped.items()
    ]


def _all_pieces(evaluation: KeptEvaluation) -> list[Piece]:
    manifest = evaluation.manifest
    timed = bool(manifest.get("timed", True))
    every = {
        "environment": LIVE if timed else TREE,
        "timed": timed,
        "models": [model["name"] for model in manifest["models"]],
        "model_fingerprints": [model["fingerprint"] for model in manifest["models"]],
        "task": manifest["task"],
        "split": manifest["split"],
        "start": manifest["start"],
        "max_new_tokens": manifest["max_new_tokens"],
    }
    validation = {**every, "split": "validation", "start": 0}
    baselines: dict[str, dict[str, Any]] = {
        "slm": {"decoding": ROUTED, "policy_fingerprint": Always(slm=True).fingerprint, "threshold": 0.5},
        "llm": {"decoding": LLM_ONLY, "policy_fingerprint": Always(slm=False).fingerprint, "threshold": 0.5},
        "speculative": {"decoding": SPECULATIVE, "draft_tokens": manifest.get("draft_tokens")},
        "oracle": {"decoding": SEARCH, "oracle_budget": manifest.get("oracle")},
    }
    baselines |= {name: {**validation, **baselines[name.split("-")[1]]} for name in VALIDATION}
    pieces = []
    for path in sorted(evaluation.runs.glob(f"*{ANSWERS}")):
        wanted = {**every, "policy": path.stem, "policy_profile": None, **baselines.get(path.stem, {})}
        pieces.append(Piece(path, wanted, counts_of(manifest, path.stem in VALIDATION)))
    for name, fingerprint in manifest["policies"].items():
        # the fingerprint says whether it has a judge
        own = {"policy": name, "decoding": (ROUTED, CHECKED), "policy_fingerprint": fingerprint}
        for number, threshold in enumerate(evaluation.thresholds[name]):
            for under, shared in (("", every), (VALIDATED, validation)):
                kept = evaluation.runs / under / name / f"{number:02d}{ANSWERS}"
                # few thresholds are tried on validation problems
                if not under or kept.is_file() or kept.with_suffix(SUFFIX).is_file():
                    wanted = {**shared, **own, "threshold": threshold}
                    pieces.append(Piece(kept, wanted, counts_of(manifest, bool(under))))
    return pieces


def counts_of(manifest: Mapping[str, Any], validation: bool) -> int:
    """How many problems were answered."""
    return int(manifest["thresholds_at"]["examples"] if validation else manifest["examples"])


def traced_answers(trace: Trace, slm: Trace | None) -> Answers:
    """What is kept of the episodes of a trace.

    Args:
        trace: of one decoding.
        slm: of the SLM alone, whose answers stand where the oracle found none.
    """
    head = trace.head
    answers = _answers(trace)
    if head.decoding != SEARCH or slm is None or len(slm.episodes) != len(trace.episodes):
        return answers
    return answers.where(trace.correct, _answers(slm))


def _answers(trace: Trace) -> Answers:
    head = trace.head
    return Answers.priced(trace.episodes, head.profiles, head.policy_profile, head.settings["timed"])


def kept_faults(kept: Answers, traced: Answers) -> Iterator[tuple[int | None, str]]:
    """Where what is kept of answers is not what their traces come to: the episode, and what differs."""
    if len(kept.correct) != len(traced.correct):
        yield None, f"{len(kept.correct)} answers are kept, {len(traced.correct)} are traced"
        return
    for name in ("correct", "terminated", "llm_tokens", "tokens"):
        ours, theirs = getattr(traced, name), getattr(kept, name)
        for number in np.flatnonzero(ours != theirs).tolist():
            yield number, f"{name} is {theirs[number]:g} here, {ours[number]:g} by its trace"
    if kept.costs.keys() != traced.costs.keys():
        yield None, f"costs are kept in {', '.join(kept.costs)}, traces give {', '.join(traced.costs)}"
        return
    for unit, cost in kept.costs.items():
        for number in np.flatnonzero(~np.isclose(cost, traced.costs[unit], rtol=ROUNDING, atol=0)).tolist():
            yield (
                number,
                f"its cost in {unit} is {cost[number]:.10g} here, {traced.costs[unit][number]:.10g} by its trace",
            )


def check_task(evaluation: KeptEvaluation, task: Task) -> None:
    """Check that a task is the one that an evaluation is of, and has its problems.

    Raises:
        ValueError: it is another one, or has fewer.
    """
    manifest = evaluation.manifest
    if task.name != manifest["task"]:
        raise ValueError(f"{evaluation.runs.parent} evaluated the task {manifest['task']}, the task is {task.name}")
    task.examples(manifest["split"], manifest["examples"], start=manifest["start"])
