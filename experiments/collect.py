"""Collect what an agent's first round is trained on: CITER's preferences, the searches of `agent=expert`.

    python -m experiments.collect agent=citer hydra.run.dir=outputs/preferences
    python -m experiments.train agent=citer agent.preferences=outputs/preferences/preferences
    python -m experiments.collect agent=expert hydra.run.dir=outputs/searches
    python -m experiments.train agent=expert agent.searched=outputs/searches/preferences

The run's folder receives `preferences/`: Arrow shards and the manifest of what made them. Started again in the same
folder, a run goes on after the last shard that is done. Several processes collect together, on one machine or many:

    python -m experiments.collect -m shards=4 'shard=range(0,4)' launcher=joblib hydra.sweep.dir=outputs/four

Each makes every fourth Arrow shard, in one folder; whoever is done last writes what one process would have written.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from agents.preferences.store import Collecting
    from envs.models.pool import ModelPool
    from envs.tasks.task import Task
    from experiments.common.tracking import Jsonl, Wandb

CONTINUING = Continuing(may_differ=("shards", "shard"))
"""In how many processes it is collected changes nothing of what is."""
SUMMARY, PREFERENCES = "summary.json", "preferences"


@program("collect", CONTINUING)
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Collect for `config.agent`."""
    from agents.preferences.store import Collecting, Share
    from experiments.common.config import build
    from experiments.common.multirun import missing_shards_said

    agent = build(config, "agent")
    if not isinstance(agent, Collecting):
        raise ValueError(
            f"agent {type(agent).__name__} collects nothing before it is trained; choose agent=citer or one of its "
            "kind, or agent=expert"
        )
    task, tracking, pool = build(config, "task"), build(config, "track"), build(config, "models")
    if config.shard is None:
        if config.shards > 1 and (missing := missing_shards(folder / PREFERENCES, config.shards)):
            raise ValueError(missing_shards_said("collect", config, folder, missing))
        begin()
        finish(agent, pool, task, tracking, config, folder)
        return
    begin()
    whole = folder.parent.parent
    share = Share(config.shard, config.shards)
    store = agent.collect_share(pool, task, config.seed, whole / PREFERENCES, share)
    print(f"shard {config.shard} of {config.shards} is done, in {whole / PREFERENCES}")
    if not store.missing():
        join(agent, pool, task, tracking, config, whole)


def join(
    agent: Collecting, pool: ModelPool, task: Task, tracking: Jsonl | Wandb, config: DictConfig, folder: Path
) -> None:
    """Write what one process would have written, once, where all shards are there."""
    from omegaconf import OmegaConf

    from experiments.common.locks import one_at_a_time
    from experiments.common.run_folder import run_folder

    alone: DictConfig = OmegaConf.merge(config, {"shard": None})  # type: ignore[assignment]
    with one_at_a_time(folder / PREFERENCES):  # two may be done at once
        if (folder / SUMMARY).is_file():
            return
        with run_folder(alone, folder, CONTINUING) as begin:
            begin()
            finish(agent, pool, task, tracking, alone, folder)


def finish(
    agent: Collecting, pool: ModelPool, task: Task, tracking: Jsonl | Wandb, config: DictConfig, folder: Path
) -> None:
    """Collect what is not there, check all of it, and say what it is."""
    from omegaconf import OmegaConf

    from envs.storage import write_text
    from experiments.training.run import labels_summary

    plain = OmegaConf.to_container(config, resolve=True)
    with tracking.open(folder, plain, "collect") as track:  # type: ignore[arg-type]
        store = agent.collect(pool, task, config.seed, folder / PREFERENCES, track)
        store.require()
        summary = {"tokens": sum(store.rows()), "shards": store.shards, "skipped": store.skipped()}
        summary |= labels_summary(track)
        track.summary(summary, {})
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
    print(f"collected {summary['tokens']} tokens in {folder / PREFERENCES}")


def missing_shards(preferences: Path, shards: int) -> list[int]:
    """Which of so many processes have not made all of their share, or of which something is damaged."""
    from agents.preferences.store import MANIFEST, PreferenceStore

    if not (preferences / MANIFEST).is_file():
        return list(range(shards))
    store = PreferenceStore.open(preferences)
    return sorted({number % shards for number in (*store.missing(), *store.check())})


if __name__ == "__main__":
    main()
