"""Compute everything that an evaluation says again, from its traces alone: tokens, verdicts, ledgers, costs, tables.

    python -m experiments.verify outputs/citer
    python -m experiments.verify multirun/citer_vs_citer_s sample=200
    python -m experiments.verify outputs/evaluate/... rescore=true
    python -m experiments.verify FOLDER models=embedded task=arithmetic
    python -m experiments.verify experiments/results/arithmetic sample=1000

Models and task are those that `config.yaml` in the run's folder names, or those that are chosen here. What holds is
said in one line; what does not is listed, each with its file and episode, and the exit status is 1. The program's own
folder receives `verification.json`; what is verified is left as it is.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.evaluation.kept import KeptEvaluation
    from experiments.verification.findings import Findings

WRONG = 1
"""Exit status where something does not hold."""
UNPACKED = "unpacked"
"""In the program's folder: what files of results hold; left there where something does not hold."""
LISTED = 100
"""Faults, and near ties, that are printed; the file holds them all."""


def named_folder(arguments: Sequence[str]) -> list[str]:
    """A command line in which a folder that stands there without a name is `folder=...`."""
    named = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        of_option = before.startswith("-") and before not in ("-m", "--multirun")  # as in `--cfg job`
        if argument.startswith("-") or of_option or ("=" in argument and not Path(argument).is_dir()):
            named.append(argument)
        else:
            quoted = argument.replace("\\", "\\\\").replace("'", "\\'")
            named.append(f"folder='{quoted}'")
    return named


@program("verify", Continuing(anything_differs=True))
def verify_as_configured(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Verify all evaluations below `config.folder`."""
    from omegaconf import OmegaConf

    from envs.storage import write_text
    from experiments.common.config import import_modules
    from experiments.evaluation.kept import kept_below
    from experiments.published.store import Store, tracks_in
    from experiments.verification.evaluation import Verification
    from experiments.verification.findings import Findings

    place = Path(OmegaConf.select(config, "folder", throw_on_missing=True))
    if not place.is_dir():
        raise ValueError(f"there is no folder {place}; give that of an evaluation, or of several")
    evaluations = kept_below(place)
    if not evaluations:
        shutil.rmtree(folder / UNPACKED, ignore_errors=True)
        for track in tracks_in(place):
            Store(track).unpack_all(folder / UNPACKED / track.name)
        evaluations = kept_below(folder / UNPACKED)
    if not evaluations:
        raise ValueError(
            f"{place} holds no evaluations; give the folder of experiments.evaluate, experiments.train, or of results "
            "that experiments.leaderboard keeps"
        )
    import_modules([*config.imports, *(name for one in evaluations for name in one.config.get("imports", []))])
    before: dict[str, Any] = {}
    checks = []
    for one in evaluations:
        task, pool = made("task", config, one, before), None if config.rescore else made("models", config, one, before)
        checks.append((one, Verification(task, pool, config.sample, config.seed)))
        checks[-1][1].refuse(one)  # refuses, before anything is written
    begin()
    findings = Findings()
    for one, verification in checks:
        verification.check(one, findings)
    write_text(folder / "verification.json", json.dumps(findings.summary(), indent=1) + "\n")
    report(findings)
    if findings.faults:
        raise SystemExit(WRONG)
    shutil.rmtree(folder / UNPACKED, ignore_errors=True)


def made(key: str, config: DictConfig, evaluation: KeptEvaluation, before: dict[str, Any]) -> Any:
    """The task or the models of an evaluation: those that are chosen, or else those that made it.

    Args:
        key: `task` or `models`.
        config: of this program.
        evaluation: it.
        before: what was made, by its settings: the models of a multirun are loaded once.

    Raises:
        ValueError: nothing says which, or they cannot be made.
    """
    from omegaconf import DictConfig, OmegaConf

    from experiments.common.config import build

    settings = config.get(key)
    if settings is None:
        settings = evaluation.config.get(key)
    if settings is None:
        raise ValueError(
            f"no config.yaml beside {evaluation.runs} says which {key} it had; choose: {key}=NAME, as in "
            "experiments.evaluate"
        )
    plain = OmegaConf.to_container(settings, resolve=True) if isinstance(settings, DictConfig) else settings
    name = f"{key} {json.dumps(plain, sort_keys=True, default=str)}"
    if name not in before:
        before[name] = build(OmegaConf.create({key: plain}), key)
    return before[name]


def report(findings: Findings) -> None:
    """Print what was found."""
    for title, found in (("faults", findings.faults), ("near ties", findings.near_ties)):
        if found:
            print(f"{len(found)} {title}:", *map(str, found[:LISTED]), sep="\n  ")
        if len(found) > LISTED:
            print(f"  and {len(found) - LISTED} more in verification.json")
    for what in findings.unchecked:
        print(f"not checked: {what}")
    counts = ", ".join(f"{number:,} {what}" for what, number in findings.counts.items())
    print(f"{'WRONG' if findings.faults else 'right'}: {counts}; {len(findings.near_ties)} near ties")


def main() -> None:
    """The program: the folder may stand on its command line by itself."""
    sys.argv[1:] = named_folder(sys.argv[1:])
    verify_as_configured()


if __name__ == "__main__":
    main()
