"""Draw the accuracy-cost curves of several policies on problems none of them has seen.

    python -m experiments.evaluate +saved.citer=outputs/train/citer-.../policy
    python -m experiments.evaluate +agent@agents.margin=margin examples=500

The run's folder receives `config.yaml`, `results.jsonl` (a row per policy and threshold), `summary.json`, `table.md`,
`curve.png`, `transcripts.html`, and in `runs/` the outcome of every example at every threshold. Started again in the
same folder (`hydra.run.dir=...`), an evaluation goes on after the last threshold that is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from agents.oracle import Oracle
from agents.policy import POLICY_FILE, Policy, decides_once, load_policy
from agents.rollout import Episode, Scheduling, decode
from agents.speculative import speculate
from envs.costs import ALL_COSTS
from envs.files import write_text
from envs.manifest import check_manifest, models_manifest
from envs.models import ModelPool
from envs.steps import Observation
from envs.tasks.task import Example, Task, check_split
from envs.tree import Tree
from experiments.build import build, program
from experiments.limits import Limits, measure_limits
from experiments.outcomes import Outcomes
from experiments.present import markdown, plot_curves, table, transcripts
from experiments.summary import Results, summarize
from experiments.track import Tracker


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
    tree: Tree | None = None

    def run(self, policy: Policy, threshold: float, label: str) -> list[Episode]:
        """Answer every example."""
        return decode(
            self.pool, self.task, self.examples, policy, threshold, self.max_new_tokens, self.scheduling, label=label,
            tree=self.tree,
        )  # fmt: skip

    def outcomes(self, policy: Policy, threshold: float, name: str, number: int) -> Outcomes:
        """What a policy's answers at its threshold `number` come to."""
        path = self.folder and self.folder / name / f"{number:02d}.safetensors"
        timed = self.tree is None
        return Outcomes.kept(path, lambda: Outcomes.of(self.run(policy, threshold, name), self.pool, policy, timed))

    def limits(self, settings: DictConfig, about: Mapping[str, Any]) -> Limits:
        """Each model alone, random routing and the oracle; taken from, or kept in, `settings.shared` if it is set."""
        oracle = Oracle(budget=settings.oracle) if settings.oracle else None
        place = Path(settings.shared) if settings.shared else self.folder
        drafts = settings.draft_tokens
        speculated = partial(self._speculated, drafts) if drafts else None
        limits = measure_limits(
            self.run, self.pool, self.examples, speculated, oracle, self._searched, place, about, self.tree is None
        )
        if self.folder and place != self.folder:
            limits.save(self.folder)
        return limits

    def _speculated(self, draft_tokens: int) -> list[Episode]:
        return speculate(
            self.pool, self.task, self.examples, draft_tokens, self.max_new_tokens, self.scheduling, "speculative"
        )

    def _searched(self) -> Tree:
        return self.tree or Tree(self.pool, self.task, self.max_new_tokens)


class _Recorder:
    """Lets the SLM write everything and keeps what each policy would have scored."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        self.scores: dict[str, list[Tensor]] = {name: [] for name in policies}

    def score(self, observation: Observation) -> Tensor:
        first = torch.from_numpy(observation.positions == 0)
        for name, policy in self.policies.items():
            once = decides_once(policy)
            if once and not first.any():
                continue  # it is asked once a response
            scores = policy.score(observation).float().cpu()
            self.scores[name].append(scores[first] if once else scores)
        return torch.ones(len(observation.positions))


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


def pick_threshold(runs: Sequence[Outcomes], llm: Outcomes, unit: str) -> int:
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
        "policies": {name: getattr(policy, "fingerprint", repr(policy)) for name, policy in policies.items()},
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
    runs: dict[str, list[Outcomes]] = {}
    rows: list[dict[str, Any]] = []

    def record(name: str, threshold: float | None, outcomes: Outcomes) -> None:
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


def open_tree(config: DictConfig, pool: ModelPool, task: Task) -> Tree | None:
    """The replay tree an evaluation decodes through, from `config.tree` if it is there; None where it is not set."""
    if not config.tree:
        return None
    path = Path(config.tree)
    return Tree(pool, task, config.max_new_tokens, config.tree_memory, path if path.is_file() else None)


def present(summary: Mapping[str, Any], folder: Path) -> None:
    """Write `summary.json`, `curve.png` and `table.md`, and print the table."""
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    comparison = table(summary)
    write_text(folder / "table.md", markdown(comparison))
    Console(width=max(150, Console().width)).print(comparison)


def check(config: DictConfig) -> None:
    """Refuse settings that would fail later, before any model is loaded."""
    if not config.saved and not config.agents:
        raise ValueError("nothing to evaluate: name policies (+saved.NAME=FOLDER) or agents (+agent@agents.NAME=...)")
    check_evaluation(config)
    for name, path in config.saved.items():
        if not (Path(path) / POLICY_FILE).is_file():
            raise ValueError(f"saved.{name}: {path} holds no {POLICY_FILE}; give the policy folder of a training run")


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


@program("evaluate")
def main(config: DictConfig, folder: Path) -> None:
    """Evaluate `config.saved` policies and `config.agents`."""
    check(config)
    agents = {name: build(config.agents, name) for name in config.agents}
    task, tracking, pool = build(config, "task"), build(config, "track"), build(config, "models")
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "evaluate") as track:
        policies: dict[str, Policy] = {name: load_policy(Path(path), pool) for name, path in config.saved.items()}
        for name, agent in agents.items():
            policies[name] = agent.fit(pool, task, seed=config.seed, track=track, folder=folder / "agents" / name)
        summary = evaluate(config, folder, track, pool, task, policies, list(config.saved), config.seed)
        track.summary({"policies": summary["policies"]}, {"curve": folder / "curve.png"})


if __name__ == "__main__":
    main()
