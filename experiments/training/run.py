"""One training run: fit an agent, save its policy, evaluate it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import Learner, Policy, policy_from
from agents.common.saving import SavedPolicy
from agents.router.policy import RouterPolicy
from envs.models.pool import ModelPool
from envs.storage import write_text
from envs.tasks.task import Task
from experiments.common.config import build, build_settings
from experiments.common.tracking import Tracker
from experiments.evaluation.runner import evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.reporting.figures import plot_learning

SUMMARY = "summary.json"
"""Written last: a run in a folder is complete with it."""


def train(
    agent: Policy | Learner[Policy],
    pool: ModelPool,
    task: Task,
    folder: Path,
    track: Tracker,
    name: str,
    seed: int = 0,
    evaluation: EvaluationSettings | None = None,
) -> dict[str, Any]:
    """Fit an agent on the task's train split, save its policy, evaluate it; what is in `folder` is not done again.

    Args:
        agent: a policy, or a learner that makes one.
        pool: the models.
        task: where examples come from.
        folder: of the run.
        track: receives rows and the summary; it writes to `folder`.
        name: what results call the agent.
        seed: of training.
        evaluation: how the policy is evaluated afterwards; not at all where None.

    Returns:
        The contents of `summary.json`.
    """
    started = time.perf_counter()
    policy = policy_from(agent, pool, task, seed, track, folder)
    seconds = round(time.perf_counter() - started, 1)
    summary: dict[str, Any] = {"agent": type(agent).__name__, "seed": seed, "seconds": seconds}
    if isinstance(policy, SavedPolicy):
        policy.save(folder / "policy")
        print(f"saved {folder / 'policy'} after {seconds} s")
    if isinstance(policy, RouterPolicy) and policy.calibration:
        summary["calibration"] = policy.calibration
    images: dict[str, Path] = {}
    if plot_learning(track.rows(), folder / "learning.png"):
        images["learning"] = folder / "learning.png"
    if evaluation is not None:
        place = folder / "evaluation"
        trained = [name] if isinstance(policy, SavedPolicy) else []
        evaluated = evaluate(pool, task, {name: policy}, evaluation, place, track=track, trained=trained, seed=seed)
        summary["policies"], images["curve"] = evaluated["policies"], place / "curve.png"
    track.summary(summary, images)
    return summary


def train_as_configured(config: DictConfig, folder: Path, name: str) -> None:
    """Build what `config` describes, and train.

    Args:
        config: of `experiments.train`.
        folder: of the run.
        name: what results call the agent.
    """
    evaluation = build_settings(config.evaluation, EvaluationSettings) if config.evaluate else None
    agent, task, tracking = build(config, "agent"), build(config, "task"), build(config, "track")
    pool = build(config, "models")
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "train") as track:
        summary = train(agent, pool, task, folder, track, name=name, seed=config.seed, evaluation=evaluation)
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")
