"""Train CITER, compare it with two controls and two heuristics, and write a page: outputs/demo/index.html.

    python -m experiments.demo                                            # `make demo`
    python -m experiments.demo 'train=["experiment=demo","task=arithmetic_hard"]' hydra.run.dir=outputs/hard

Each policy is a run of `experiments.train` in a folder of its own in `train/`, with a log; as many are made at a time
as there are cores. Policies are evaluated through a replay tree, so that no state is decoded twice. Seconds are
measured at the end, while nothing else runs: of each policy at the threshold to use it at, and of LLM-only decoding in
turn. Started again, it goes on where it was.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program
from experiments.common.stopping import near

if TYPE_CHECKING:
    from omegaconf import DictConfig

CONTINUING = Continuing(may_differ=("timings", "bootstrap", "about"))


@program("demo", CONTINUING)
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Make what is not there yet, and name the page."""
    from omegaconf import OmegaConf

    from experiments.reporting.page import PAGE

    page = near(folder / PAGE)
    if page.is_file():
        begin()
        print(f"nothing is left to do: open {page}")
        return
    from experiments.training.demonstration import Demonstration

    demonstration = Demonstration.of(OmegaConf.to_container(config, resolve=True), near(folder))
    begin()
    demonstration.make(logging.getLogger("demo"))
    print(f"open {page}")


if __name__ == "__main__":
    sys.exit(main())
