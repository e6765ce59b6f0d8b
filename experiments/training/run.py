"""One training run: fit an agent, save its policy, evaluate it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import Learner, Policy, checked_agent, policy_from
from agents.common.saving import POLICY_FILE, SavedPolicy, load_policy
from agents.preferences.composition import composition_table, sample_table
from agents.router.policy import RouterPolicy
from envs.models.pool import ModelPool
from envs.storage import check_manifest, write_text
from envs.tasks.task import Task
from experiments.common.config import build, build_settings
from experiments.common.program import Begin
from experiments.common.tracking import Jsonl, Tracker, Wandb
from experiments.evaluation.kept import settings_of_models
from experiments.evaluation.runner import evaluate
from experiments.evaluation.settings import EvaluationSettings
from experiments.reporting.figures import plot_learning
from experiments.reporting.page import Training

SUMMARY = "summary.json"
"""Written last: a run in a folder is complete with it."""
TRAINED = "trained.json"
"""Written when a policy is made and saved, if it can be: what made it, and what is known of its training."""
BEGUN = "training_begun"
"""There while a policy is made: a training that finds it goes on where another one was interrupted."""
TABLES: dict[str, Callable[[Any], str]] = {"composition": composition_table, "case_2_sample": sample_table}
"""What learners log of their labels that stands in the summary too, and how it is printed."""


def train(
    agent: Policy | Learner[Policy],
    pool: ModelPool,
    task: Task,
    folder: Path,
    track: Tracker,
    name: str,
    seed: int = 0,
    evaluation: EvaluationSettings | None = None,
    made_by: Mapping[str, Any] | None = None,
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
        made_by: the settings that make the policy, as plain data: one that is in `folder`, made by the same, is not
            trained again. It always is where None.

    Returns:
        The contents of `summary.json`.

    Raises:
        ValueError: the policy in `folder` was made by other settings; the error names what differs.
    """
    known = read_trained(folder, made_by)
    if known is not None and (folder / "policy" / POLICY_FILE).is_file():
        policy: Policy = load_policy(folder / "policy", pool)
        print(f"the policy in {folder / 'policy'} is trained")
    else:
        policy, known = _fit(agent, pool, task, folder, track, seed)
        if made_by is not None:
            write_text(folder / TRAINED, json.dumps({"made_by": made_by, "summary": known}, indent=1) + "\n")
        (folder / BEGUN).unlink(missing_ok=True)
    summary: dict[str, Any] = dict(known)
    images: dict[str, Path] = {}
    reported = evaluation is None or evaluation.report  # else the report of many runs shows it
    if reported and plot_learning(track.rows(), folder / "learning.png"):
        images["learning"] = folder / "learning.png"
    if evaluation is not None:
        place = folder / "evaluation"
        trained = [name] if isinstance(policy, SavedPolicy) else []
        trainings = [Training(name, known["seconds"], track.rows())] if trained else []
        evaluated = evaluate(pool, task, {name: policy}, evaluation, place, track, trained, seed, trainings)
        if evaluated is not None:
            summary["policies"], images["curve"] = evaluated["policies"], place / "curve.png"
    track.summary(summary, images)
    return summary


def _fit(
    agent: Policy | Learner[Policy], pool: ModelPool, task: Task, folder: Path, track: Tracker, seed: int
) -> tuple[Policy, dict[str, Any]]:
    """The agent's policy, saved if it can be, and what the summary says of its training."""
    # a training that goes on has read more than it knows of; most read long before they report a row
    resumed = (folder / BEGUN).exists() or bool(track.rows())
    write_text(folder / BEGUN, "")
    before = [model.tokens_read for model in pool.models]
    started, computed = time.perf_counter(), time.process_time()
    policy = policy_from(agent, pool, task, seed, track, folder)
    seconds = round(time.perf_counter() - started, 1)
    # of all threads; what else runs on the machine hardly changes it
    cpu_seconds = None if resumed else round(time.process_time() - computed, 1)
    summary: dict[str, Any] = {"agent": type(agent).__name__, "seed": seed, "seconds": seconds}
    summary["cpu_seconds"] = cpu_seconds
    read = [model.tokens_read - was for model, was in zip(pool.models, before, strict=True)]
    summary |= {"parameters": policy.parameters, "tokens_read": None if resumed else read}
    summary["features"] = getattr(policy, "features", None)
    if isinstance(policy, SavedPolicy):
        policy.save(folder / "policy")
        print(f"saved {folder / 'policy'} after {seconds} s")
    if isinstance(policy, RouterPolicy) and policy.calibration:
        summary["calibration"] = policy.calibration
    summary |= labels_summary(track)
    return policy, summary


def labels_summary(track: Tracker) -> dict[str, Any]:
    """What a learner's last round says of the labels it trained on, printed too; empty where it says nothing."""
    found: dict[str, Any] = {}
    for row in track.rows():
        found |= {key: row[key] for key in TABLES if key in row}
    for key, table in TABLES.items():
        if key in found:
            print(f"{key.replace('_', ' ')}\n{table(found[key])}")
    return found


def read_trained(folder: Path, made_by: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """What the summary says of a training that is done in `folder`; None where it is not.

    Raises:
        ValueError: other settings made what is there; the error names what differs.
    """
    path = folder / TRAINED
    if made_by is None or not path.is_file():
        return None
    kept = json.loads(path.read_text())
    check_manifest(folder, kept["made_by"], made_by)
    return dict(kept["summary"])


def train_as_configured(config: DictConfig, folder: Path, name: str, begin: Begin) -> None:
    """Build what `config` describes, and train; a run that is complete is left as it is.

    Args:
        config: of `experiments.train`.
        folder: of the run.
        name: what results call the agent.
        begin: called when all is built, before anything is written.

    Raises:
        ValueError: a setting is wrong, or others made what is in `folder`; the error names it.
    """
    plain: Any = OmegaConf.to_container(config, resolve=True)
    made_by = {key: plain[key] for key in ("task", "seed")}
    # how answers share passes changes none
    made_by["agent"] = {key: value for key, value in plain["agent"].items() if key != "scheduling"}
    made_by["models"] = settings_of_models(plain["models"])
    evaluated_by = plain["evaluation"] if config.evaluate else None
    if read_trained(folder, made_by) is not None and _is_complete(folder, evaluated_by):
        print(f"{folder} is complete, nothing is left to do")
        return
    evaluation, agent, task, tracking = checked(config, name)
    pool = build(config, "models")
    begin()
    with tracking.open(folder, plain, "train") as track:
        summary = train(agent, pool, task, folder, track, name, config.seed, evaluation, made_by)
    summary = {**summary, **({"evaluated_by": evaluated_by} if evaluated_by else {})}
    write_text(folder / SUMMARY, json.dumps(summary, indent=1) + "\n")


def checked(
    config: DictConfig, name: str
) -> tuple[EvaluationSettings | None, Policy | Learner[Policy], Task, Jsonl | Wandb]:
    """What `config` describes, but for the models: the evaluation if there is one, the agent, the task, where rows go.

    Args:
        config: of `experiments.train`.
        name: what results call the agent.

    Raises:
        ValueError: a setting is wrong; the error names it.
    """
    evaluation = build_settings(config.evaluation, EvaluationSettings) if config.evaluate else None
    if evaluation is not None:
        evaluation.shown([name])
    return evaluation, checked_agent(build(config, "agent")), build(config, "task"), build(config, "track")


def _is_complete(folder: Path, evaluated_by: Mapping[str, Any] | None) -> bool:
    """Whether a run is summarized, with the evaluation that is asked for if one is."""
    path = folder / SUMMARY
    if not path.is_file():
        return False
    return evaluated_by is None or json.loads(path.read_text()).get("evaluated_by") == evaluated_by
