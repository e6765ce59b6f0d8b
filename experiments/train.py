"""Train an agent and save its policy.

    python -m experiments.train agent=citer
    python -m experiments.train -m agent=citer,citer_s seed=0,1,2 evaluate=true

The run's folder receives `config.yaml`, `metrics.jsonl`, `learning.png`, `summary.json` and, in `policy/`, the policy;
with `evaluate=true` also an evaluation, in `evaluation/`. Started again in the same folder (`hydra.run.dir=...`), a run
goes on after the last shard of preferences, epoch or threshold that is done.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import TRAINING
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig


@program("train", TRAINING)
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Train the agent that was chosen."""
    from hydra.core.hydra_config import HydraConfig

    from experiments.training.run import train_as_configured

    train_as_configured(config, folder, HydraConfig.get().runtime.choices["agent"], begin)


if __name__ == "__main__":
    main()
