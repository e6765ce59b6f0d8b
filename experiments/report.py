"""Merge the evaluations of a multirun into one report, with means and intervals over seeds and examples.

    python -m experiments.report multirun/citer_vs_citer_s

Every run must have evaluated the same problems with the same models. The folder receives `summary.json`, `table.md`,
`curve.png` and `results.jsonl`, of all runs together.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig


class ReportAfterMultirun(Callback):
    """Ends a multirun with its report.

    Args:
        first: the policy that the others are compared with.
        samples: of the bootstrap.
    """

    def __init__(self, first: str | None = None, samples: int = 1000) -> None:
        self.first, self.samples = first, samples

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from experiments.common.locks import only_writer
        from experiments.evaluation.merge import report

        folder = Path(config.hydra.sweep.dir)
        with only_writer(folder):
            report(folder, self.first, config.evaluation.cost, self.samples)


def main(arguments: Sequence[str] | None = None) -> None:
    """Report on a folder."""
    parser = argparse.ArgumentParser(prog="python -m experiments.report", description="Merge evaluations.")
    parser.add_argument("folder", type=Path, help="of a multirun with evaluate=true")
    parser.add_argument("--first", help="the policy that the others are compared with")
    parser.add_argument("--cost", default="bytes", help="unit of curves and comparisons")
    parser.add_argument("--bootstrap", type=int, default=1000, help="resamplings for the intervals")
    options = parser.parse_args(arguments)
    from experiments.common.locks import only_writer
    from experiments.evaluation.merge import report

    try:
        if not options.folder.is_dir():
            raise ValueError(f"there is no folder {options.folder}")
        with only_writer(options.folder):
            report(options.folder, options.first, options.cost, options.bootstrap)
    except (ValueError, OSError) as error:
        sys.exit(f"{error}")


if __name__ == "__main__":
    main()
