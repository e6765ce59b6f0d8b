"""Seconds of what training runs have made, beside LLM-only decoding; when nothing else runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from agents.common.policy import Policy, policy_from
from agents.common.saving import POLICY_FILE, load_policy
from envs.models.pool import ModelPool
from envs.progress import ProgressBar
from envs.storage import write_text
from envs.tasks.task import Task
from experiments.common.config import build, build_settings
from experiments.common.timing import alternate
from experiments.evaluation.answers import Answers
from experiments.evaluation.decoder import ExampleDecoder
from experiments.evaluation.settings import EvaluationSettings
from experiments.training.many import Run

TIMED = 128
"""Problems that are decoded to measure seconds."""


def measure_seconds(runs: Sequence[Run], seed: int, repeats: int, path: Path) -> dict[str, float | None]:
    """Seconds of forward passes and decisions at 95 % of the LLM's accuracy, over those of LLM-only decoding.

    Args:
        runs: that are complete.
        seed: of those that are measured.
        repeats: turns that a policy and LLM-only decoding take; medians are compared.
        path: a JSON file; what is there is not measured again.

    Returns:
        The ratio of each agent; None where no threshold reaches that accuracy.
    """
    ratios: dict[str, float | None] = json.loads(path.read_text()) if path.is_file() else {}
    missing = [run for run in runs if run.seed == seed and run.agent not in ratios]
    for run in ProgressBar(missing, desc="seconds"):
        threshold = threshold_at(run, 0.95)
        if threshold is None:
            ratios[run.agent] = None
            continue
        ratios[run.agent] = round(seconds_over_llm_only(run, threshold, repeats), 4)
        write_text(path, json.dumps(ratios, indent=1) + "\n")
    return ratios


def threshold_at(run: Run, level: float) -> float | None:
    """The cheapest threshold (memory traffic) of a run that reaches `level` of the LLM's accuracy; None: none does."""
    rows = [json.loads(line) for line in (run.folder / "evaluation" / "results.jsonl").read_text().splitlines()]
    llm = next(row["accuracy"] for row in rows if row["policy"] == "llm")
    reaching = [row for row in rows if row["policy"] == run.agent and row["accuracy"] >= level * llm]
    return min(reaching, key=lambda row: float(row["cost_bytes"]))["threshold"] if reaching else None


def seconds_over_llm_only(run: Run, threshold: float, repeats: int) -> float:
    """Seconds of one run's policy over those of LLM-only decoding, taking turns in this process."""
    config = OmegaConf.load(run.folder / "config.yaml")
    assert isinstance(config, DictConfig)
    task, pool = build(config, "task"), build(config, "models")
    policy, settings = policy_of(run, config, pool, task), build_settings(config.evaluation, EvaluationSettings)
    examples = task.examples(settings.split, min(TIMED, settings.examples), start=settings.start)
    decoder = ExampleDecoder(pool, task, examples, settings.max_new_tokens)

    def routed() -> float:
        return float(Answers.of(decoder.decode(policy, threshold), pool, policy).costs["seconds"].sum())

    def llm_only() -> float:
        return float(Answers.of(decoder.llm_only(), pool).costs["seconds"].sum())

    medians = alternate({"routed": routed, "llm": llm_only}, repeats, run.agent)
    return medians["routed"] / medians["llm"]


def policy_of(run: Run, config: DictConfig, pool: ModelPool, task: Task) -> Policy:
    """The policy a run has made; one that is not saved learns nothing, and is made again."""
    place = run.folder / "policy"
    if (place / POLICY_FILE).is_file():
        return load_policy(place, pool)
    return policy_from(build(config, "agent"), pool, task, run.seed)
