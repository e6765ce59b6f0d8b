"""Draw the accuracy-cost curves of several policies on problems none of them has seen.

    python -m experiments.evaluate +saved.citer=outputs/train/citer-.../policy
    python -m experiments.evaluate +agent@agents.margin=margin examples=500

The run's folder receives `config.yaml`, `results.jsonl` (a row per policy and threshold, written as each is done),
`summary.json`, `table.md`, `curve.png` and `transcripts.html`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
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

from agents.files import write_text
from agents.policy import POLICY_FILE, Always, Policy, decision_profile, load_policy
from agents.rollout import Episode, Scheduling, decode
from envs.costs import ALL_COSTS, WRITTEN, FloatArray, Price
from envs.models import ModelPool
from envs.session import Observation
from envs.tasks.task import Example, Task, check_split
from experiments.build import build, program
from experiments.metrics import LEVELS, Sweep, accuracy_at, bootstrap, cost_at, finite, monotone_hull
from experiments.present import markdown, plot_curves, table, transcripts
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
    """

    pool: ModelPool
    task: Task
    examples: Sequence[Example]
    max_new_tokens: int
    scheduling: Scheduling

    def __post_init__(self) -> None:
        self.price = Price(self.pool.profiles)
        self.slm = self.run(Always(slm=True), 0.5, "slm only")
        # LLM-only decoding runs no SLM: of the routed run in which the LLM wrote everything, only its own work counts
        self.llm = [_by_llm_alone(episode) for episode in self.run(Always(slm=False), 0.5, "llm only")]
        self.llm_correct = np.array([episode.correct for episode in self.llm])
        self.llm_costs = self.costs(self.llm)

    def run(self, policy: Policy, threshold: float, label: str) -> list[Episode]:
        """Answer every example."""
        return decode(
            self.pool, self.task, self.examples, policy, threshold, self.max_new_tokens, self.scheduling, label=label
        )

    def costs(self, episodes: Sequence[Episode], policy: Policy | None = None) -> dict[str, FloatArray]:
        """Cost of each episode in every unit, the policy's own decisions included; each value is (examples,)."""
        models = self.price.of(np.stack([episode.ledger for episode in episodes]))
        if policy is None:
            return dict(models)
        decisions = np.stack([episode.decisions for episode in episodes])[:, None]
        own = Price([decision_profile(policy)]).of(decisions)
        return {unit: models[unit] + own[unit] for unit in models}

    def row(self, episodes: Sequence[Episode], policy: Policy | None = None) -> dict[str, Any]:
        """Accuracy, relative cost in every unit, and token shares of one run."""
        costs = {
            f"cost_{unit}": round(float(cost.sum() / self.llm_costs[unit].sum()), 6)
            for unit, cost in self.costs(episodes, policy).items()
        }
        written = np.sum([episode.ledger[:, WRITTEN] for episode in episodes], axis=0)
        return {
            "accuracy": float(np.mean([episode.correct for episode in episodes])),
            "llm_share": round(float(written[1:].sum() / written.sum()), 6),
            "terminated": float(np.mean([episode.terminated for episode in episodes])),
            **costs,
        }

    def sweep(self, runs: Sequence[Sequence[Episode]], policy: Policy, unit: str) -> Sweep:
        """Runs of one policy, between the two ends every policy has: the SLM alone, and LLM-only decoding."""
        correct = [[episode.correct for episode in run] for run in (self.slm, *runs, self.llm)]
        between = [self.costs(run, policy)[unit] for run in runs]
        return Sweep(np.array(correct), np.stack([self.costs(self.slm)[unit], *between, self.llm_costs[unit]]))

    def cost_at(self, sweep: Sweep, unit: str, level: float, weights: FloatArray) -> float:
        """The cost at which a sweep reaches `level` times the LLM's accuracy, examples weighted by `weights`."""
        hull = monotone_hull(sweep.points(weights, self.llm_costs[unit]))
        return cost_at(hull, level * float(self.llm_correct @ weights))


def _by_llm_alone(episode: Episode) -> Episode:
    ledger = episode.ledger.copy()
    ledger[:-1] = 0
    return replace(episode, ledger=ledger)


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
    pool: ModelPool,
    task: Task,
    examples: Sequence[Example],
    policies: Mapping[str, Policy],
    config: DictConfig,
    scheduling: Scheduling,
) -> dict[str, FloatArray]:
    """Thresholds at quantiles of each policy's score on validation problems, so that curves are evenly covered."""
    recorder = _Recorder(policies)
    decode(pool, task, examples, recorder, 0.5, config.max_new_tokens, scheduling, label="thresholds")
    quantiles = np.array(list(config.llm_shares))
    return {
        name: np.unique(np.quantile(torch.cat(s).double().numpy(), quantiles)) for name, s in recorder.scores.items()
    }


def summarize(
    evaluation: Evaluation,
    policies: Mapping[str, Policy],
    runs: Mapping[str, list[list[Episode]]],
    config: DictConfig,
) -> dict[str, Any]:
    """The contents of `summary.json`; differences are to the first policy."""
    count, unit = len(evaluation.examples), config.cost
    even = np.full(count, 1 / count)
    slm, llm = evaluation.row(evaluation.slm), evaluation.row(evaluation.llm)
    sweeps = {
        name: {other: evaluation.sweep(runs[name], policy, other) for other in evaluation.llm_costs}
        for name, policy in policies.items()
    }
    first = next(iter(policies))

    def interval(statistic: Callable[[FloatArray], float]) -> tuple[float | None, float | None]:
        return bootstrap(statistic, count, config.bootstrap, config.seed)

    summaries: dict[str, Any] = {}
    for name, of_unit in sweeps.items():
        cost_for = partial(evaluation.cost_at, of_unit[unit], unit)
        first_cost_for = partial(evaluation.cost_at, sweeps[first][unit], unit)

        def difference(
            weights: FloatArray,
            ours: Callable[[float, FloatArray], float] = cost_for,
            theirs: Callable[[float, FloatArray], float] = first_cost_for,
        ) -> float:
            return ours(0.95, weights) - theirs(0.95, weights)

        hull = monotone_hull(of_unit[unit].points(even, evaluation.llm_costs[unit]))
        summaries[name] = {
            "trained": name in config.saved,
            "cost_at": {f"{level:.2f}": finite(cost_for(level, even)) for level in LEVELS},
            "cost_at_interval": {f"{level:.2f}": interval(partial(cost_for, level)) for level in LEVELS},
            "cost_at_by_unit": {
                other: {f"{level:.2f}": finite(evaluation.cost_at(sweep, other, level, even)) for level in LEVELS}
                for other, sweep in of_unit.items()
            },
            "difference_at_0.95": {"to": first, "cost": finite(difference(even)), "interval": interval(difference)},
            "accuracy_at": {f"{c:.2f}": finite(accuracy_at(hull, c)) for c in (0.25, 0.5)},
            "curve": [[round(float(c), 6), round(float(a), 6)] for c, a in hull],
        }
    return {
        "task": evaluation.task.name,
        "pool": evaluation.pool.names,
        "cost": unit,
        "examples": count,
        "seed": config.seed,
        "models": {
            "slm": {"accuracy": slm["accuracy"], "cost": slm[f"cost_{unit}"]},
            "llm": {"accuracy": llm["accuracy"], "cost": llm[f"cost_{unit}"]},
        },
        "policies": summaries,
    }


def pick_transcripts(evaluation: Evaluation, runs: Sequence[list[Episode]], policy: Policy, cost: str) -> list[Episode]:
    """The cheapest run that reaches 95 % of the LLM's accuracy, or the most accurate one."""
    rows = [evaluation.row(run, policy) for run in runs]
    target = 0.95 * float(evaluation.llm_correct.mean())
    reaching = [i for i, row in enumerate(rows) if row["accuracy"] >= target]
    if reaching:
        return runs[min(reaching, key=lambda i: rows[i][f"cost_{cost}"])]
    return runs[max(range(len(rows)), key=lambda i: rows[i]["accuracy"])]


def evaluate(config: DictConfig, folder: Path, track: Tracker, agents: Mapping[str, Any], task: Task) -> dict[str, Any]:
    """Fit or load the policies, sweep their thresholds, and write everything into `folder`."""
    examples = task.examples(check_split(config.split), config.examples)
    for_thresholds = task.examples("validation", config.threshold_examples)
    scheduling = build(config, "scheduling")
    pool = build(config, "models")
    policies: dict[str, Policy] = {name: load_policy(Path(path), pool) for name, path in config.saved.items()}
    policies |= {name: agent.fit(pool, task, seed=config.seed, track=track) for name, agent in agents.items()}
    thresholds = choose_thresholds(pool, task, for_thresholds, policies, config, scheduling)
    evaluation = Evaluation(pool, task, examples, config.max_new_tokens, scheduling)
    runs: dict[str, list[list[Episode]]] = {}
    with (
        (folder / "results.jsonl").open("w") as results,
        tqdm(total=sum(map(len, thresholds.values())), desc="evaluate", mininterval=0.5) as progress,
    ):

        def record(name: str, threshold: float | None, row: Mapping[str, Any]) -> None:
            row = {"policy": name, "threshold": threshold, "seed": config.seed, **row}
            results.write(json.dumps(row) + "\n")
            results.flush()
            track({"run": name, **{key: value for key, value in row.items() if key != "policy"}})

        record("slm", None, evaluation.row(evaluation.slm))
        record("llm", None, evaluation.row(evaluation.llm))
        for name, policy in policies.items():
            runs[name] = []
            for threshold in thresholds[name]:
                runs[name].append(evaluation.run(policy, float(threshold), name))
                record(name, float(threshold), evaluation.row(runs[name][-1], policy))
                progress.update()
    summary = summarize(evaluation, policies, runs, config)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    plot_curves(summary, folder / "curve.png")
    comparison = table(summary)
    write_text(folder / "table.md", markdown(comparison))
    Console().print(comparison)
    if config.transcripts:
        name = next(iter(policies))
        chosen = pick_transcripts(evaluation, runs[name], policies[name], config.cost)[: config.transcripts]
        write_text(folder / "transcripts.html", transcripts(pool, chosen, f"{task.name}, routed by {name}"))
    print(f"wrote {folder}")
    return summary


def check(config: DictConfig) -> None:
    """Refuse settings that would fail later, before any model is loaded."""
    if not config.saved and not config.agents:
        raise ValueError("nothing to evaluate: name policies (+saved.NAME=FOLDER) or agents (+agent@agents.NAME=...)")
    if config.cost not in [cost.name for cost in ALL_COSTS]:
        raise ValueError(f"unknown cost {config.cost!r}; choose one of {', '.join(cost.name for cost in ALL_COSTS)}")
    if not config.llm_shares or not all(0 < share < 1 for share in config.llm_shares):
        raise ValueError(f"llm_shares must lie between 0 and 1, at least one; they are {list(config.llm_shares)}")
    for key, least in (("examples", 1), ("threshold_examples", 1), ("bootstrap", 1), ("max_new_tokens", 1)):
        if config[key] < least:
            raise ValueError(f"{key} must be at least {least}, is {config[key]}")
    check_split(config.split)
    for name, path in config.saved.items():
        if not (Path(path) / POLICY_FILE).is_file():
            raise ValueError(f"saved.{name}: {path} holds no {POLICY_FILE}; give the policy folder of a training run")


@program("evaluate")
def main(config: DictConfig, folder: Path) -> None:
    """Evaluate `config.saved` policies and `config.agents`."""
    check(config)
    agents = {name: build(config.agents, name) for name in config.agents}
    task, tracking = build(config, "task"), build(config, "track")
    with tracking.open(folder, OmegaConf.to_container(config, resolve=True), "evaluate") as track:
        summary = evaluate(config, folder, track, agents, task)
        track.summary(summary["policies"], {"curve": folder / "curve.png"})


if __name__ == "__main__":
    main()
