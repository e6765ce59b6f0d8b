"""Whether the engine, the models and a policy are still those that made a run that is kept."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from envs.progress import ProgressBar
from experiments.common.config import build
from experiments.evaluation.kept import MANIFEST, KeptEvaluation
from experiments.published.run_file import RUNS, PublishedRun
from experiments.published.store import CANARIES, Store
from experiments.training.many import Run
from experiments.verification.evaluation import Verification

TRIED = "canaries"
"""The folder, below that of the program, in which runs are unpacked to be tried."""


def restore(store: Store, runs: Sequence[Run], folder: Path) -> None:
    """Put runs that are among the results where they would have been made, if this code still decodes what they hold.

    Of each, the first problems at its operating point are decoded again by its saved policy: tokens, scores, verdicts
    and costs must come out (a token may differ where two logits are nearly equal, as in `experiments.verify`).

    Args:
        store: the results.
        runs: those that are wanted.
        folder: of the program.

    Raises:
        ValueError: another engine, agent or model made one of them; the error names it.
    """
    there = [run for run in runs if store.has(run)]
    if not there:
        return
    config = there[0].config()  # task and models are those of all
    verification = Verification(build(config, "task"), build(config, "models"))
    for run in ProgressBar(there, desc="canaries"):
        published, place = PublishedRun.read(store.row(run)), folder / TRIED / run.name
        store.unpack(run.name, published, place, CANARIES)
        try:
            findings = verification.check(KeptEvaluation.read(place / RUNS / MANIFEST))
        except ValueError as error:
            raise ValueError(f"{store.row(run)} cannot be gone on from: {error}") from error
        if findings.faults:
            fault = findings.faults[0]
            where = "" if fault.episode is None else f", problem {fault.episode}"
            raise ValueError(
                f"{store.row(run)} was made by another engine, agent or model: {fault.file.name}{where}: {fault.what}; "
                "delete it to make it anew, or go back to the code that made it"
            )
        if not run.done:
            store.unpack(run.name, published, run.folder)
    shutil.rmtree(folder / TRIED, ignore_errors=True)
    store.restore_baselines(runs)
