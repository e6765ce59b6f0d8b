"""Merge the evaluations of a multirun into one report, with means and intervals over seeds and examples.

    python -m experiments.report multirun/citer_vs_citer_s

Every run must have evaluated the same problems with the same models. The folder receives `summary.json`, `table.md`,
`curve.png` and `results.jsonl`, of all runs together.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from envs.files import write_text
from envs.manifest import check_manifest
from experiments.evaluate import present
from experiments.limits import Limits
from experiments.outcomes import Outcomes
from experiments.summary import Results, summarize

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
    found: dict[str, dict[int, list[Outcomes]]] = {}
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
            seeds[manifest["seed"]] = [Outcomes.load(path) for path in paths]
        trained |= set(manifest["trained"])
    if first is not None and first not in found:
        raise ValueError(f"there is no policy {first!r} in {folder}; there are {', '.join(sorted(found))}")
    names = sorted(found, key=lambda name: (name != first, name not in trained, name))
    place, about = read[0]
    return Results(
        {key: about[key] for key in ("task", "pool", "split", "start", "max_new_tokens")},
        Limits.load(place),
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


class ReportAfterMultirun(Callback):
    """Ends a multirun with its report.

    Args:
        first: the policy that the others are compared with.
        samples: of the bootstrap.
    """

    def __init__(self, first: str | None = None, samples: int = 1000) -> None:
        self.first, self.samples = first, samples

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        report(Path(config.hydra.sweep.dir), self.first, config.evaluation.cost, self.samples)


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on a folder."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description="Merge evaluations.")
    parser.add_argument("folder", type=Path, help="of a multirun with evaluate=true")
    parser.add_argument("--first", help="the policy that the others are compared with")
    parser.add_argument("--cost", default="bytes", help="unit of curves and comparisons")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamplings for the intervals")
    options = parser.parse_args(arguments)
    try:
        report(options.folder, options.first, options.cost, options.bootstrap)
    except ValueError as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
