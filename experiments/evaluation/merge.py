"""Evaluations of several runs as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from envs.storage import check_manifest, write_text
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.report import write_report
from experiments.evaluation.summary import Results, summarize

SAME = ("models", "task", "split", "start", "examples", "max_new_tokens", "oracle", "draft_tokens")


def gather(folder: Path, first: str | None = None) -> Results:
    """All evaluations below `folder`; runs of a policy are told apart by their training seeds.

    Args:
        folder: of a multirun.
        first: the policy that the others are compared with; the first by name where None.

    Raises:
        ValueError: there are none, one is not finished, or they are not of the same problems and models.
    """
    manifests = sorted(folder.glob("**/runs/manifest.json"))
    if not manifests:
        raise ValueError(f"{folder} holds no evaluations; run experiments.train -m evaluate=true first")
    evaluations = [(path.parent, json.loads(path.read_text())) for path in manifests]
    place, about = evaluations[0]
    runs: dict[str, dict[int, list[Answers]]] = {}
    thresholds: dict[str, dict[int, list[float]]] = {}
    trained: set[str] = set()
    for runs_folder, manifest in evaluations:
        check_manifest(runs_folder, manifest, about, SAME)
        seed = manifest["seed"]
        for name in manifest["policies"]:
            if seed in runs.setdefault(name, {}):
                raise ValueError(f"{runs_folder}: {name} with seed {seed} is there twice; report on fewer runs")
            at = thresholds.setdefault(name, {})[seed] = manifest["thresholds"][name]
            runs[name][seed] = _read_runs(runs_folder / name, len(at))
        trained |= set(manifest["trained"])
    if first is not None and first not in runs:
        raise ValueError(f"there is no policy {first!r} in {folder}; there are {', '.join(sorted(runs))}")
    names = sorted(runs, key=lambda name: (name != first, name not in trained, name))
    return Results(
        {key: about[key] for key in ("task", "pool", "split", "start", "max_new_tokens")},
        Baselines.load(place),
        policies={name: [runs[name][seed] for seed in sorted(runs[name])] for name in names},
        trained=frozenset(trained),
        thresholds={name: [thresholds[name][seed] for seed in sorted(runs[name])] for name in names},
    )


def _read_runs(folder: Path, count: int) -> list[Answers]:
    """A policy's answers at each of its thresholds."""
    paths = [folder / f"{number:02d}.safetensors" for number in range(count)]
    for path in paths:
        if not path.is_file():
            raise ValueError(f"{path} is missing: that evaluation was interrupted; start it again first")
    return [Answers.load(path) for path in paths]


def report(folder: Path, first: str | None, unit: str, samples: int) -> dict[str, Any]:
    """Write the merged report into `folder`."""
    results = gather(folder, first)
    summary = summarize(results, unit, samples, seed=0)
    rows = [path.read_text() for path in sorted(folder.glob("*/evaluation/results.jsonl"))]
    write_text(folder / "results.jsonl", "".join(rows))
    write_report(summary, folder)
    print(f"wrote {folder}")
    return summary
