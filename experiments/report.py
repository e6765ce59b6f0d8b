"""Merge the evaluations of a multirun into one report, with means and intervals over seeds and examples.

    python -m experiments.report multirun/citer_vs_citer_s
    python -m experiments.report multirun/train-... --first "ppo cost_weight=0.05" --out outputs/front

    python -m experiments.report outputs/mine experiments/results/arithmetic --agents mine,citer --out outputs/beside

Policies are told apart by the settings in which they differ (`ppo cost_weight=0.02`), then by their training seeds;
over the settings of one agent a front is drawn. Every run must have evaluated the same problems with the same models
and settings. Of results that ship, the files of `experiments.leaderboard`, `--agents` names those that are wanted.
`--transcripts 3` shows what each policy answered to the first problems, side by side, as traces have it. The report's
folder receives `summary.json`, `table.md`, `curve.png` and `results.jsonl`, of all runs together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

UNITS = ("bytes", "flops", "llm_tokens", "seconds", "dollars")
"""Of costs; those of `envs.costs`, which is not imported for `--help`."""


class ReportAfterMultirun(Callback):
    """Ends a multirun with its report.

    Args:
        first: the policy that the others are compared with, or an agent, the first of its settings.
        samples: of the bootstrap.
    """

    def __init__(self, first: str | None = None, samples: int = 1000) -> None:
        self.first, self.samples = first, samples

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from experiments.common.locks import only_writer
        from experiments.evaluation.merge import report

        folder, settings = Path(config.hydra.sweep.dir), config.evaluation
        try:
            with only_writer(folder):
                report(folder, self.first, settings.cost, self.samples, columns=settings.columns)
        except (ValueError, OSError) as error:  # which Hydra would make a warning of
            print(f"no report is written: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on a folder."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description="Merge evaluations.")
    parser.add_argument("folders", type=Path, nargs="+", help="of a multirun with evaluate=true, or of results")
    parser.add_argument("--out", type=Path, help="where the report is written; into the first folder if not given")
    parser.add_argument("--agents", default="", help="whose policies alone are wanted, separated by commas")
    parser.add_argument("--first", help="the policy that the others are compared with")
    parser.add_argument("--cost", default="bytes", choices=UNITS, help="unit of curves")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamplings for the intervals")
    parser.add_argument("--columns", default="few", choices=("few", "all"), help="of the table that is printed")
    parser.add_argument("--transcripts", type=int, default=0, help="problems whose answers the page shows side by side")
    parser.add_argument("--partial", action="store_true", help="leave out runs that are not finished")
    options = parser.parse_intermixed_args(arguments)
    if options.bootstrap < 1:
        parser.error(f"--bootstrap must be at least 1, is {options.bootstrap}")
    if options.transcripts < 0:
        parser.error(f"--transcripts must be 0 or more, is {options.transcripts}")
    from experiments.common.locks import only_writer
    from experiments.evaluation.merge import report
    from experiments.published.store import Store, tracks_in

    agents = [name for name in options.agents.split(",") if name]
    try:
        with TemporaryDirectory() as unpacked:
            folders: list[Path] = []
            for folder in options.folders:
                if not folder.is_dir():
                    raise ValueError(f"there is no folder {folder}")
                tracks = tracks_in(folder)
                if tracks and options.out is None:
                    raise ValueError(f"{folder} holds results, which stay as they are; say where with --out")
                for track in tracks:
                    folders.append(Path(unpacked) / str(len(folders)))
                    Store(track).unpack_all(folders[-1], agents)
                folders += [] if tracks else [folder]
            with only_writer(options.out or folders[0]):
                report(
                    folders,
                    options.first,
                    options.cost,
                    options.bootstrap,
                    out=options.out,
                    partial=options.partial,
                    columns=options.columns,
                    agents=agents,
                    transcripts=options.transcripts,
                )
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
