"""Evaluations of several runs as one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from envs.storage import check_manifest, write_text
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.runner import present
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
    read = [(path.parent, json.loads(path.read_text())) for path in manifests]
    found: dict[str, dict[int, list[Answers]]] = {}
    trained: set[str] = set()
    for place, manifest in read:
        check_manifest(place, manifest, read[0][1], SAME)
        for name in manifest["policies"]:
            seeds = found.setdefault(name, {})
            if manifest["seed"] in seeds:
                raise ValueError(f"{place}: {name} with seed {manifest['seed']} is there twice; report on fewer runs")
            paths = [place / name / f"{number:02d}.safetensors" for number in range(len(manifest["thresholds"][name]))]
            for path in paths:
                if not path.is_file():
                    raise ValueError(f"{path} is missing: that evaluation was interrupted; start it again first")
            seeds[manifest["seed"]] = [Answers.load(path) for path in paths]
        trained |= set(manifest["trained"])
    if first is not None and first not in found:
        raise ValueError(f"there is no policy {first!r} in {folder}; there are {', '.join(sorted(found))}")
    names = sorted(found, key=lambda name: (name != first, name not in trained, name))
    place, about = read[0]
    return Results(
        {key: about[key] for key in ("task", "pool", "split", "start", "max_new_tokens")},
        Baselines.load(place),
        {name: [found[name][seed] for seed in sorted(found[name])] for name in names},
        frozenset(trained),
    )


def report(folder: Path, first: str | None, unit: str, samples: int) -> dict[str, Any]:
    """Write the merged report into `folder`."""
    results = gather(folder, first)
    summary = summarize(results, unit, samples, seed=0)
    rows = [path.read_text() for path in sorted(folder.glob("*/evaluation/results.jsonl"))]
    write_text(folder / "results.jsonl", "".join(rows))
    present(summary, folder)
    print(f"wrote {folder}")
    return summary
