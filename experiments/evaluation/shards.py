"""An evaluation in shards: each process answers some of the problems, and the answers are put together.

A shard is an evaluation of its own, of fewer problems; what does not depend on them (thresholds, answers to validation
problems) each shard makes, and all must agree. Put together, every piece is what one process would have written, but
for measured seconds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from agents.common.policy import Learner
from envs.storage import write_manifest, write_text
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import EXHAUSTED, VALIDATION
from experiments.evaluation.baselines import MANIFEST as LIMITS
from experiments.evaluation.kept import CHOSEN, MANIFEST, VALIDATED, KeptEvaluation
from experiments.evaluation.settings import EvaluationSettings

TREE = "states.tree"
"""In a shard's folder: its replay tree, where there is one."""
OF_PROBLEMS = ("start", "examples")
"""What the manifests of shards differ in."""


def check(settings: EvaluationSettings, shards: int, agents: Mapping[str, object]) -> None:
    """Refuse what cannot be put together.

    Raises:
        ValueError: it says what, and the way out.
    """
    for name, agent in agents.items():
        if isinstance(agent, Learner):
            raise ValueError(
                f"shards evaluate policies, and {name} is to be trained: train it first (experiments.train), and give "
                f"it as +saved.{name}=FOLDER"
            )
    if settings.traces:
        raise ValueError("traces of shards are not put together: add traces=false, or leave shards out")
    if settings.cost == "seconds":
        raise ValueError("with cost=seconds each shard would choose thresholds of its own; choose another cost")
    if shards > settings.examples:
        raise ValueError(f"there are {shards} shards of {settings.examples} problems; choose fewer")


def of_shard(settings: EvaluationSettings, shard: int, shards: int, folder: Path) -> EvaluationSettings:
    """The settings of one shard: its problems, and no report.

    Args:
        settings: of the whole.
        shard: its number.
        shards: how many there are.
        folder: of the shard.
    """
    first, last = (number * settings.examples // shards for number in (shard, shard + 1))
    return replace(
        settings,
        start=settings.start + first,
        examples=last - first,
        report=False,
        transcripts=0,
        refine_curve=None,  # all problems together say where that is
        shared=None,
        tree=None if settings.tree is None else folder / TREE,
    )


def is_done(folder: Path) -> bool:
    """Whether all pieces of a shard are there."""
    manifest = folder / "runs" / MANIFEST
    return manifest.is_file() and KeptEvaluation.read(manifest).missing() is None


def put_together(folders: Sequence[Path], settings: EvaluationSettings, folder: Path) -> None:
    """Write the pieces of the whole into `folder`, from those of its shards.

    Args:
        folders: of the shards, in order, all done.
        settings: of the whole.
        folder: of the whole.

    Raises:
        ValueError: shards are not of one evaluation; the error says what differs.
    """
    runs, places = folder / "runs", [one / "runs" for one in folders]
    whole = {"start": settings.start, "examples": settings.examples, "thresholds_at": settings.thresholds_at}
    manifests = {name: _agreed(places, name, OF_PROBLEMS) for name in (LIMITS, MANIFEST)}
    chosen = _agreed(places, CHOSEN)
    counts = [int(json.loads((place / MANIFEST).read_text())["examples"]) for place in places]
    if sum(counts) != settings.examples:
        raise ValueError(
            f"the shards in {folder} hold {sum(counts)} problems, not {settings.examples}: start them anew"
        )
    of_policies = [f"{name}/{number:02d}" for name, some in chosen.items() for number in range(len(some))]
    baselines = [name for name in ("slm", "llm", "speculative", "oracle") if _has(places[0], name)]
    for name in (*baselines, *of_policies):
        _joined([Answers.load(place / f"{name}.safetensors") for place in places]).save(runs / f"{name}.safetensors")
    # every shard has answered all validation problems
    for name in (*VALIDATION, *(f"{VALIDATED}/{name}" for name in of_policies)):
        some = [Answers.load(place / f"{name}.safetensors") for place in places if _has(place, name)]
        if some:
            if any(not np.array_equal(one.correct, some[0].correct) for one in some) or len(some) != len(places):
                raise ValueError(f"the shards in {folder} do not agree in {name}: start them anew, on like machines")
            some[0].save(runs / f"{name}.safetensors")
    exhausted = sum(int(json.loads((place / EXHAUSTED).read_text())) for place in places)
    write_text(runs / EXHAUSTED, json.dumps(exhausted) + "\n")
    write_text(runs / CHOSEN, json.dumps(chosen, indent=1) + "\n")
    for name, manifest in manifests.items():
        write_manifest(runs / name, {key: whole.get(key, value) for key, value in manifest.items()})


def _has(place: Path, name: str) -> bool:
    return (place / f"{name}.safetensors").is_file()


def _agreed(places: Sequence[Path], name: str, but: Sequence[str] = ()) -> dict[str, Any]:
    """What a JSON file says in all shards, but for some keys."""
    said = [json.loads((place / name).read_text()) for place in places]
    for place, one in zip(places, said, strict=True):
        differing = [key for key in {*one, *said[0]} if key not in but and one.get(key) != said[0].get(key)]
        if differing:
            raise ValueError(f"{place / name} and {places[0] / name} differ in {', '.join(sorted(differing))}")
    return dict(said[0])


def _joined(parts: Sequence[Answers]) -> Answers:
    """Answers to all problems, from those to some, in order."""
    plain = {
        field.name: np.concatenate([getattr(part, field.name) for part in parts])
        for field in fields(Answers)
        if field.name != "costs"
    }
    return Answers(
        **plain, costs={unit: np.concatenate([part.costs[unit] for part in parts]) for unit in parts[0].costs}
    )
