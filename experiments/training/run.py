"""One training run: fit an agent, save its policy, evaluate it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import policy_from
from agents.common.saving import SavedPolicy
from agents.router.policy import RouterPolicy
from envs.storage import write_text
from experiments.common.config import build
from experiments.evaluation.runner import check_evaluation, evaluate
from experiments.reporting.figures import plot_learning

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
        policy = policy_from(agent, pool, task, config.seed, track, folder)
        summary: dict[str, Any] = {
            "agent": type(agent).__name__,
            "seed": config.seed,
            "seconds": round(time.perf_counter() - started, 1),
        }
        if isinstance(policy, SavedPolicy):
            policy.save(folder / "policy")
            print(f"saved {folder / 'policy'} after {summary['seconds']} s")
        if isinstance(policy, RouterPolicy) and policy.calibration:
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
