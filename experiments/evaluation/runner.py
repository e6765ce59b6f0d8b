"""Evaluating policies: thresholds, baselines, a sweep, a summary, a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from agents.common.policy import Policy
from agents.common.rollout import Episode, Scheduling, decode
from agents.oracle import Oracle
from agents.speculative import speculate
from envs.arrays import IntArray
from envs.costs import ALL_COSTS
from envs.decoding.observation import Observation
from envs.models.pool import ModelPool, models_manifest
from envs.prefix_tree.tree import PrefixTree
from envs.storage import check_manifest, write_text
from envs.tasks.task import Example, Task, check_split
from experiments.common.config import build
from experiments.common.tracking import Tracker
from experiments.evaluation.answers import Answers
from experiments.evaluation.baselines import Baselines, measure_baselines
from experiments.evaluation.summary import Results, summarize
from experiments.reporting.figures import plot_curves
from experiments.reporting.tables import markdown, table
from experiments.reporting.transcripts import transcripts


@dataclass
class Evaluation:
    """Decodes the same examples again and again, and keeps what came out.

    Args:
        pool: the models.
        task: judges the answers.
        examples: what is answered.
        max_new_tokens: the longest response.
        scheduling: how rows share passes.
        folder: of the outcomes, which are not made again where they are there; nothing is kept where None.
        tree: a replay tree to decode through; nothing is timed then.
    """

    pool: ModelPool
    task: Task
    examples: Sequence[Example]
    max_new_tokens: int
    scheduling: Scheduling
    folder: Path | None = None
    tree: PrefixTree | None = None

    def run(self, policy: Policy, threshold: float, label: str) -> list[Episode]:
        """Answer every example."""
        return decode(
            self.pool, self.task, self.examples, policy, threshold, self.max_new_tokens, self.scheduling, label=label,
            tree=self.tree,
        )  # fmt: skip

    def outcomes(self, policy: Policy, threshold: float, name: str, number: int) -> Answers:
        """What a policy's answers at its threshold `number` come to."""
        path = self.folder and self.folder / name / f"{number:02d}.safetensors"
        timed = self.tree is None
        return Answers.kept(path, lambda: Answers.of(self.run(policy, threshold, name), self.pool, policy, timed))

    def limits(self, settings: DictConfig, about: Mapping[str, Any]) -> Baselines:
        """Each model alone, random routing and the oracle; taken from, or kept in, `settings.shared` if it is set."""
        oracle = Oracle(budget=settings.oracle) if settings.oracle else None
        place = Path(settings.shared) if settings.shared else self.folder
        drafts = settings.draft_tokens
        speculated = partial(self._speculated, drafts) if drafts else None
        limits = measure_baselines(
            self.run, self.pool, self.examples, speculated, oracle, self._searched, place, about, self.tree is None
        )
        if self.folder and place != self.folder:
            limits.save(self.folder)
        return limits

    def _speculated(self, draft_tokens: int) -> list[Episode]:
        return speculate(
            self.pool, self.task, self.examples, draft_tokens, self.max_new_tokens, self.scheduling, "speculative"
        )

    def _searched(self) -> PrefixTree:
        return self.tree or PrefixTree(self.pool, self.task, self.max_new_tokens)


class _Recorder(Policy):
    """Lets the SLM write everything and keeps what each policy would have scored."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        self.scores: dict[str, list[Tensor]] = {name: [] for name in policies}

    def score(self, observation: Observation) -> Tensor:
        first = torch.from_numpy(observation.positions == 0)
        for name, policy in self.policies.items():
            once = policy.per_response
            if once and not first.any():
                continue  # it is asked once a response
            scores = policy.score(observation).float().cpu()
            self.scores[name].append(scores[first] if once else scores)
        return torch.ones(len(observation.positions))

    def forget(self, episodes: IntArray) -> None:
        for policy in self.policies.values():
            policy.forget(episodes)


def choose_thresholds(
    evaluation: Evaluation, examples: Sequence[Example], policies: Mapping[str, Policy], shares: Sequence[float]
) -> dict[str, list[float]]:
    """Thresholds at quantiles of each policy's score on validation problems, so that curves are evenly covered."""
    recorder = _Recorder(policies)
    replace(evaluation, examples=examples).run(recorder, 0.5, "thresholds")
    return {
        name: np.unique(np.quantile(torch.cat(scores).double().numpy(), np.array(shares))).tolist()
        for name, scores in recorder.scores.items()
    }


def pick_threshold(runs: Sequence[Answers], llm: Answers, unit: str) -> int:
    """The cheapest run that reaches 95 % of the LLM's accuracy, or the most accurate one."""
    rows = [run.row(llm) for run in runs]
    reaching = [i for i, row in enumerate(rows) if row["accuracy"] >= 0.95 * float(llm.correct.mean())]
    if reaching:
        return min(reaching, key=lambda i: rows[i][f"cost_{unit}"])
    return max(range(len(rows)), key=lambda i: rows[i]["accuracy"])


def evaluate(
    config: DictConfig,
    folder: Path,
    track: Tracker,
    pool: ModelPool,
    task: Task,
    policies: Mapping[str, Policy],
    trained: Sequence[str],
    seed: int,
) -> dict[str, Any]:
    """Sweep the thresholds of policies, and write everything into `folder`.

    Args:
        config: an evaluation's settings.
        folder: of the run.
        track: receives rows.
        pool: the models.
        task: where problems come from.
        policies: what is evaluated; the others are compared with the first.
        trained: which of them learned anything.
        seed: that they were trained with.
    """
    runs_folder = folder / "runs"
    about = {
        "task": task.name,
        "pool": pool.names,
        "split": config.split,
        "max_new_tokens": config.max_new_tokens,
        "start": config.start,
    }
    manifest = {
        **about,
        "models": models_manifest(pool),
        "examples": config.examples,
        "oracle": config.oracle,
        "draft_tokens": config.draft_tokens,
        "thresholds_at": {"llm_shares": list(config.llm_shares), "examples": config.threshold_examples},
        "timed": not config.tree,
        "policies": {name: policy.fingerprint for name, policy in policies.items()},
    }
    kept = runs_folder / "manifest.json"
    examples = task.examples(check_split(config.split), config.examples, start=config.start)
    scheduling, tree = build(config, "scheduling"), open_tree(config, pool, task)
    evaluation = Evaluation(pool, task, examples, config.max_new_tokens, scheduling, runs_folder, tree)
    if kept.is_file():
        found = json.loads(kept.read_text())
        check_manifest(runs_folder, found, manifest, list(manifest))
        thresholds: dict[str, list[float]] = found["thresholds"]
    else:
        for_thresholds = task.examples("validation", config.threshold_examples)
        thresholds = choose_thresholds(evaluation, for_thresholds, policies, config.llm_shares)
        manifest |= {"thresholds": thresholds, "trained": list(trained), "seed": seed}
        write_text(kept, json.dumps(manifest, indent=1) + "\n")
    made_by = {key: manifest[key] for key in (*about, "models", "examples", "oracle", "draft_tokens")}
    limits = evaluation.limits(config, {**made_by, "timed": tree is None})
    slm, llm = limits.slm, limits.llm
    runs: dict[str, list[Answers]] = {}
    rows: list[dict[str, Any]] = []

    def record(name: str, threshold: float | None, outcomes: Answers) -> None:
        rows.append({"policy": name, "threshold": threshold, "seed": seed, **outcomes.row(llm)})
        track({"run": name, **{key: value for key, value in rows[-1].items() if key != "policy"}})
        write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))

    record("slm", None, slm)
    record("llm", None, llm)
    if limits.speculative is not None:
        record("speculative", None, limits.speculative)
    for outcomes in limits.frontier(config.cost):
        record("oracle", None, outcomes)
    with tqdm(total=sum(map(len, thresholds.values())), desc="evaluate", mininterval=0.5) as progress:
        for name, policy in policies.items():
            runs[name] = []
            for number, threshold in enumerate(thresholds[name]):
                runs[name].append(evaluation.outcomes(policy, threshold, name, number))
                record(name, threshold, runs[name][-1])
                progress.update()
    results = Results(about, limits, {name: [runs[name]] for name in policies}, frozenset(trained))
    summary = {**summarize(results, config.cost, config.bootstrap, seed), "seed": seed}
    present(summary, folder)
    if config.transcripts:
        name, policy = next(iter(policies.items()))
        chosen = thresholds[name][pick_threshold(runs[name], llm, config.cost)]
        shown = replace(evaluation, examples=examples[: config.transcripts]).run(policy, chosen, "transcripts")
        write_text(folder / "transcripts.html", transcripts(pool, shown, f"{task.name}, routed by {name}"))
    if tree is not None:
        tree.save(Path(config.tree))
    print(f"wrote {folder}")
    return summary


def open_tree(config: DictConfig, pool: ModelPool, task: Task) -> PrefixTree | None:
    """The replay tree an evaluation decodes through, from `config.tree` if it is there; None where it is not set."""
    if not config.tree:
        return None
    path = Path(config.tree)
    return PrefixTree(pool, task, config.max_new_tokens, config.tree_memory, path if path.is_file() else None)


def present(summary: Mapping[str, Any], folder: Path) -> None:
    """Write `summary.json`, `curve.png` and `table.md`, and print the table."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    comparison = table(summary)
    write_text(folder / "table.md", markdown(comparison))
    Console(width=max(150, Console().width)).print(comparison)


def check_evaluation(config: DictConfig) -> None:
    """Refuse settings of an evaluation that would fail later."""
    if config.cost not in [cost.name for cost in ALL_COSTS]:
        raise ValueError(f"unknown cost {config.cost!r}; choose one of {', '.join(cost.name for cost in ALL_COSTS)}")
    if config.draft_tokens < 0:
        raise ValueError(
            f"draft_tokens must be at least 1, or 0 for no speculative decoding; it is {config.draft_tokens}"
        )
    if config.oracle < 0:
        raise ValueError(f"oracle is how many answers are tried per problem, 0 for none; it is {config.oracle}")
    if not config.llm_shares or not all(0 < share < 1 for share in config.llm_shares):
        raise ValueError(f"llm_shares must lie between 0 and 1, at least one; they are {list(config.llm_shares)}")
    for key, least in (("examples", 1), ("threshold_examples", 1), ("bootstrap", 1), ("max_new_tokens", 1)):
        if config[key] < least:
            raise ValueError(f"{key} must be at least {least}, is {config[key]}")
    check_split(config.split)
