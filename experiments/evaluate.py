"""Draw the accuracy-cost curves of several policies on problems none of them has seen.

    python -m experiments.evaluate saved.citer=outputs/train/citer-.../policy
    python -m experiments.evaluate +agent@agents.margin=margin examples=500

The run's folder receives `config.yaml`, `results.jsonl` (a row per policy and threshold, written as each is done),
`summary.json`, `table.md`, `curve.png` and `transcripts.html`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from torch import Tensor
from tqdm import tqdm

from agents.policy import POLICY_FILE, Always, Policy, load_policy
from agents.rollout import Episode, Scheduling, decode
from envs.costs import ALL_COSTS, WRITTEN, FloatArray, Price
from envs.models import ModelPool
from envs.session import Observation
from envs.tasks.task import Example, Task, check_split
from experiments.build import build, program, write_text
from experiments.metrics import LEVELS, Sweep, accuracy_at, bootstrap, cost_at, finite, monotone_hull
from experiments.present import markdown, plot_curves, table, transcripts
from experiments.track import Tracker

ABOVE_ALL = 2.0  # a threshold no score reaches: the LLM writes everything


@dataclass
class Evaluation:
    """Decodes the same examples again and again, and keeps what came out.

    Args:
        pool: the models.
        task: judges the answers.
        examples: what is answered.
        max_new_tokens: the longest response.
        scheduling: how rows share passes.
    """

    pool: ModelPool
    task: Task
    examples: Sequence[Example]
    max_new_tokens: int
    scheduling: Scheduling

    def __post_init__(self) -> None:
        self.price = Price(self.pool.profiles)
        self.slm = self.run(Always(slm=True), 0.5, "slm only")
        self.llm = self.run(Always(slm=False), 0.5, "llm only")
        # LLM-only decoding runs no SLM: of the routed run in which the LLM wrote everything, only its own work counts
        ledger = np.stack([episode.ledger for episode in self.llm])
        ledger[:, :-1] = 0
        self.llm_costs = self.price.of(ledger)

    def run(self, policy: Policy, threshold: float, label: str) -> list[Episode]:
        return decode(
            self.pool, self.task, self.examples, policy, threshold, self.max_new_tokens, self.scheduling, label=label
        )

    def row(self, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Accuracy, relative cost in every unit, and token shares of one run."""
        ledger = np.stack([episode.ledger for episode in episodes])
        costs = {
            f"cost_{unit}": round(float(cost.sum() / self.llm_costs[unit].sum()), 6)
            for unit, cost in self.price.of(ledger).items()
        }
        written = ledger[..., WRITTEN].sum(0)
        return {
            "accuracy": float(np.mean([episode.correct for episode in episodes])),
            "llm_share": round(float(written[1:].sum() / written.sum()), 6),
            "terminated": float(np.mean([episode.terminated for episode in episodes])),
            **costs,
        }

    def sweep(self, runs: Sequence[Sequence[Episode]], unit: str) -> Sweep:
        """Runs of one policy, with the two ends every policy has: the SLM alone, and LLM-only decoding."""
        correct = [[episode.correct for episode in run] for run in (self.slm, *runs, self.llm)]
        costs = [self.price.of(np.stack([episode.ledger for episode in run]))[unit] for run in (self.slm, *runs)]
        return Sweep(np.array(correct), np.stack([*costs, self.llm_costs[unit]]))


class _Recorder:
    """Lets the SLM write everything and keeps what each policy would have scored."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self.policies = policies
        self.scores: dict[str, list[Tensor]] = {name: [] for name in policies}

    def score(self, observation: Observation) -> Tensor:
        for name, policy in self.policies.items():
            self.scores[name].append(policy.score(observation).float().cpu())
        return torch.ones(len(observation.positions))


def choose_thresholds(
    pool: ModelPool, task: Task, policies: Mapping[str, Policy], config: DictConfig, scheduling: Scheduling
) -> dict[str, FloatArray]:
    """Thresholds at quantiles of each policy's score on validation problems, so that curves are evenly covered."""
    recorder = _Recorder(policies)
    examples = task.examples("validation", config.threshold_examples)
    decode(pool, task, examples, recorder, 0.5, config.max_new_tokens, scheduling, label="thresholds")
    quantiles = np.array(list(config.llm_shares))
    return {
        name: np.unique(np.quantile(torch.cat(s).double().numpy(), quantiles)) for name, s in recorder.scores.items()
    }


def summarize(evaluation: Evaluation, sweeps: Mapping[str, list[list[Episode]]], config: DictConfig) -> dict[str, Any]:
    """The contents of `summary.json`."""
    count = len(evaluation.examples)
    even = np.full(count, 1 / count)
    llm_correct = np.array([episode.correct for episode in evaluation.llm])
    slm, llm = evaluation.row(evaluation.slm), evaluation.row(evaluation.llm)
    llm |= {"cost_" + unit: 1.0 for unit in evaluation.llm_costs}
    policies: dict[str, Any] = {}
    for name, runs in sweeps.items():
        by_unit: dict[str, Any] = {}
        for unit in evaluation.llm_costs:
            sweep = evaluation.sweep(runs, unit)
            hull = monotone_hull(sweep.points(even, evaluation.llm_costs[unit]))
            by_unit[unit] = {f"{q:.2f}": finite(cost_at(hull, q * llm["accuracy"])) for q in LEVELS}
        sweep = evaluation.sweep(runs, config.cost)
        llm_costs = evaluation.llm_costs[config.cost]

        def cost_for(
            level: float, weights: FloatArray, sweep: Sweep = sweep, llm_costs: FloatArray = llm_costs
        ) -> float:
            return cost_at(monotone_hull(sweep.points(weights, llm_costs)), level * float(llm_correct @ weights))

        hull = monotone_hull(sweep.points(even, llm_costs))
        policies[name] = {
            "cost_at": by_unit[config.cost],
            "cost_at_interval": {
                f"{q:.2f}": bootstrap(partial(cost_for, q), count, config.bootstrap, config.seed) for q in LEVELS
            },
            "cost_at_by_unit": by_unit,
            "accuracy_at": {f"{c:.2f}": finite(accuracy_at(hull, c)) for c in (0.25, 0.5)},
            "curve": [[round(float(c), 6), round(float(a), 6)] for c, a in hull],
        }
    return {
        "task": evaluation.task.name,
        "pool": evaluation.pool.names,
        "cost": config.cost,
        "examples": count,
        "seed": config.seed,
        "models": {
            "slm": {"accuracy": slm["accuracy"], "cost": slm[f"cost_{config.cost}"]},
            "llm": {"accuracy": llm["accuracy"], "cost": 1.0},
        },
        "policies": policies,
    }


def pick_transcripts(evaluation: Evaluation, runs: Sequence[list[Episode]], cost: str) -> list[Episode]:
    """The cheapest run that reaches 95 % of the LLM's accuracy, or the most accurate one."""
    rows = [evaluation.row(run) for run in runs]
    target = 0.95 * evaluation.row(evaluation.llm)["accuracy"]
    reaching = [i for i, row in enumerate(rows) if row["accuracy"] >= target]
    if reaching:
        return runs[min(reaching, key=lambda i: rows[i][f"cost_{cost}"])]
    return runs[max(range(len(rows)), key=lambda i: rows[i]["accuracy"])]


def evaluate(config: DictConfig, folder: Path, track: Tracker, agents: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Fit or load the policies, sweep their thresholds, and write everything into `folder`."""
    pool = build(config, "models")
    policies: dict[str, Policy] = {name: load_policy(Path(path), pool) for name, path in config.saved.items()}
    policies |= {name: agent.fit(pool, task, seed=config.seed, track=track) for name, agent in agents.items()}
    scheduling = build(config, "scheduling")
    thresholds = choose_thresholds(pool, task, policies, config, scheduling)
    examples = task.examples(check_split(config.split), config.examples)
    evaluation = Evaluation(pool, task, examples, config.max_new_tokens, scheduling)
    sweeps: dict[str, list[list[Episode]]] = {}
    with (
        (folder / "results.jsonl").open("w") as results,
        tqdm(total=sum(map(len, thresholds.values())), desc="evaluate", mininterval=0.5) as progress,
    ):

        def record(policy: str, threshold: float | None, episodes: list[Episode]) -> None:
            row = {"policy": policy, "threshold": threshold, "seed": config.seed, **evaluation.row(episodes)}
            results.write(json.dumps(row) + "\n")
            results.flush()
            track({"run": policy, **{key: value for key, value in row.items() if key != "policy"}})

        record("slm", None, evaluation.slm)
        record("llm", None, evaluation.llm)
        for name, policy in policies.items():
            sweeps[name] = []
            for threshold in thresholds[name]:
                sweeps[name].append(evaluation.run(policy, float(threshold), name))
                record(name, float(threshold), sweeps[name][-1])
                progress.update()
    summary = summarize(evaluation, sweeps, config)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    comparison = table(summary)
    write_text(folder / "table.md", markdown(comparison))
    Console().print(comparison)
    if config.transcripts:
        name = next(iter(sweeps))
        chosen = pick_transcripts(evaluation, sweeps[name], config.cost)[: config.transcripts]
        write_text(folder / "transcripts.html", transcripts(pool, chosen, f"{task.name}, routed by {name}"))
    print(f"wrote {folder}")
    return summary


@program("evaluate")
def main(config: DictConfig, folder: Path) -> None:
    """Evaluate `config.saved` policies and `config.agents`."""
    if not config.saved and not config.agents:
        raise ValueError(
            "nothing to evaluate: name saved policies (saved.NAME=FOLDER) or agents (+agent@agents.NAME=...)"
        )
    if config.cost not in [cost.name for cost in ALL_COSTS]:
        raise ValueError(f"unknown cost {config.cost!r}; choose one of {', '.join(cost.name for cost in ALL_COSTS)}")
    if not all(0 < share < 1 for share in config.llm_shares):
        raise ValueError(f"llm_shares must lie between 0 and 1, are {list(config.llm_shares)}")
    for name, path in config.saved.items():
        if not (Path(path) / POLICY_FILE).is_file():
            raise ValueError(f"saved.{name}: {path} holds no {POLICY_FILE}; give the policy folder of a training run")
    agents = {name: build(config.agents, name) for name in config.agents}
    task, tracking = build(config, "task"), build(config, "track")
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "evaluate") as track:
        summary = evaluate(config, folder, track, agents, task)
        track.summary(summary["policies"], {"curve": folder / "curve.png"})


if __name__ == "__main__":
    main()
