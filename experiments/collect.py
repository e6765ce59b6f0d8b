"""Collect the preferences of round 1, to train several agents on.

    python -m experiments.collect agent=citer hydra.run.dir=outputs/preferences
    python -m experiments.train agent=citer agent.preferences=outputs/preferences/preferences

The run's folder receives `preferences/`: Arrow shards and the manifest of what made them. Started again in the same
folder, a run goes on after the last shard that is done.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig


@program("collect")
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Collect for `config.agent`, a `Citer`."""
    from omegaconf import OmegaConf

    from agents.citer import Citer
    from envs.storage import write_text
    from experiments.common.config import build
    from experiments.training.run import labels_summary

    agent = build(config, "agent")
    if not isinstance(agent, Citer):
        raise ValueError(f"agent {type(agent).__name__} collects no preferences; choose agent=citer or one of its kind")
    task, tracking, pool = build(config, "task"), build(config, "track"), build(config, "models")
    begin()
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "collect") as track:
        store = agent.collect(pool, task, config.seed, folder / "preferences", track)
        summary = {"tokens": sum(store.rows()), "shards": store.shards, "skipped": store.skipped()}
        summary |= labels_summary(track)
        track.summary(summary, {})
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    print(f"collected {summary['tokens']} tokens in {folder / 'preferences'}")


if __name__ == "__main__":
    main()
