"""Seconds of what training runs have made, beside LLM-only decoding; when nothing else runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import Policy, policy_from
from agents.common.rollout import Episode
from agents.common.saving import POLICY_FILE, load_policy
from envs.models.pool import ModelPool
from envs.storage import write_text
from envs.tasks.task import Task
from experiments.common.config import build, build_settings
from experiments.common.timing import alternate
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines
from experiments.evaluation.decoder import ExampleDecoder
from experiments.evaluation.kept import MANIFEST, KeptEvaluation
from experiments.evaluation.operating_points import threshold_to_use
from experiments.evaluation.settings import EvaluationSettings
from experiments.training.many import Run

TIMED = 128
"""Problems that are decoded to measure seconds."""
LLM_ONLY = "llm only"


def measure_seconds(
    runs: Sequence[Run], seed: int, repeats: int, path: Path, problems: int = TIMED
) -> dict[str, float | None]:
    """Seconds of forward passes and decisions at the operating point for 95 %, over those of LLM-only decoding.

    All take turns in this process, LLM-only decoding among them; medians are compared.

    Args:
        runs: that are complete, all with the same models and problems.
        seed: of those that are measured.
        repeats: turns that each takes.
        path: a JSON file of such ratios. They are those of one sitting: where one agent's is missing, all are measured.
        problems: that are decoded in a turn, at most; 0: nothing is measured.

    Returns:
        The ratio of each agent; None where validation chooses none of its thresholds, or nothing is measured.
    """
    kept: dict[str, float | None] = json.loads(path.read_text()) if path.is_file() else {}
    timed = [run for run in runs if run.seed == seed]
    if all(run.agent in kept for run in timed):
        return {run.agent: kept[run.agent] for run in timed}
    if not problems:
        return {run.agent: None for run in timed}
    thresholds = {run: chosen_threshold(run) for run in timed}
    ratios: dict[str, float | None] = {run.agent: None for run in timed}
    measured = {run: threshold for run, threshold in thresholds.items() if threshold is not None}
    if measured:
        ratios |= _seconds_over_llm_only(measured, repeats, problems)
    write_text(path, json.dumps(ratios, indent=1) + "\n")
    return ratios


def chosen_threshold(run: Run, level: float = 0.95) -> float | None:
    """The threshold of a run that validation chooses for `level` of the LLM's accuracy (memory traffic); None: none."""
    kept = KeptEvaluation.read(run.folder / "evaluation" / "runs" / MANIFEST)
    runs, ends = kept.validated(run.agent), Baselines.load(kept.runs).validation
    if runs is None or ends is None:
        raise ValueError(f"{kept.runs} holds no answers to validation problems: delete {run.folder}, and start again")
    number = threshold_to_use(runs, ends[1], "bytes", level)
    return None if number is None else kept.thresholds[run.agent][number]


def _seconds_over_llm_only(thresholds: Mapping[Run, float], repeats: int, problems: int) -> dict[str, float]:
    """The ratio of each run's agent, used at its threshold."""
    config = OmegaConf.load(next(iter(thresholds)).folder / "config.yaml")
    assert isinstance(config, DictConfig)
    task, pool = build(config, "task"), build(config, "models")
    settings = build_settings(config.evaluation, EvaluationSettings)
    examples = task.examples(settings.split, min(problems, settings.examples), start=settings.start)
    decoder = ExampleDecoder(pool, task, examples, settings.max_new_tokens)

    def seconds(episodes: Sequence[Episode], policy: Policy | None = None) -> float:
        return float(Answers.of(episodes, pool, policy).costs["seconds"].sum())

    def turns(policy: Policy, threshold: float) -> Callable[[], float]:
        return lambda: seconds(decoder.decode(policy, threshold), policy)

    actions = {run.agent: turns(policy_of(run, pool, task), at) for run, at in thresholds.items()}
    decoder.llm_only()  # what is made once is not measured
    medians = alternate({**actions, LLM_ONLY: lambda: seconds(decoder.llm_only())}, repeats, "seconds")
    return {agent: round(medians[agent] / medians[LLM_ONLY], 4) for agent in actions}


def policy_of(run: Run, pool: ModelPool, task: Task) -> Policy:
    """The policy a run has made; one that is not saved learns nothing, and is made again."""
    place = run.folder / "policy"
    if (place / POLICY_FILE).is_file():
        return load_policy(place, pool)
    config = OmegaConf.load(run.folder / "config.yaml")
    assert isinstance(config, DictConfig)
    return policy_from(build(config, "agent"), pool, task, run.seed)
