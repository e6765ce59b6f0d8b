"""Train an agent and save its policy.

    python -m experiments.train agent=citer
    python -m experiments.train -m agent=citer,citer_s seed=0,1,2 evaluate=true

The run's folder receives `config.yaml`, `metrics.jsonl`, `learning.png`, `summary.json` and, in `policy/`, the policy;
with `evaluate=true` also an evaluation, in `evaluation/`. Started again in the same folder (`hydra.run.dir=...`), a run
goes on after the last shard of preferences, epoch or threshold that is done.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from agents.policy import SavedPolicy
from envs.files import write_text
from experiments.build import build, program
from experiments.evaluate import check_evaluation, evaluate
from experiments.present import plot_learning

SUMMARY = "summary.json"
"""Written last: a run in a folder is complete with it."""


def train(config: DictConfig, folder: Path, name: str) -> None:
    """Fit `config.agent` on the task's train split; what is done already in `folder` is not done again.

    Args:
        config: of the program.
        folder: of the run.
        name: what results call the agent.
    """
    if config.evaluate:
        check_evaluation(config.evaluation)
    agent, task, tracking = build(config, "agent"), build(config, "task"), build(config, "track")
    pool = build(config, "models")
    started = time.perf_counter()
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "train") as track:
        policy = agent.fit(pool, task, seed=config.seed, track=track, folder=folder)
        summary: dict[str, Any] = {
            "agent": type(agent).__name__,
            "seed": config.seed,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if isinstance(policy, SavedPolicy):
            policy.save(folder / "policy")
            print(f"saved {folder / 'policy'} after {summary['seconds']} s")
        if getattr(policy, "calibration", None):
            summary["calibration"] = policy.calibration
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        images = {"learning": folder / "learning.png"} if plot_learning(rows, folder / "learning.png") else {}
        if config.evaluate:
            trained = [name] if isinstance(policy, SavedPolicy) else []
            place = folder / "evaluation"
            evaluated = evaluate(config.evaluation, place, track, pool, task, {name: policy}, trained, config.seed)
            summary["policies"], images["curve"] = evaluated["policies"], place / "curve.png"
        track.summary(summary, images)
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


@program("train")
def main(config: DictConfig, folder: Path) -> None:
    """Train the agent that was chosen."""
    train(config, folder, HydraConfig.get().runtime.choices["agent"])


if __name__ == "__main__":
    main()
