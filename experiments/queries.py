"""Route whole queries among the models of a pool, over many random splits of queries and models.

    python -m experiments.queries experiment=changing_pool
    python -m experiments.queries experiment=two_llms outcomes.path=query_outcomes_two_llms.jsonl

In each split some models are withheld: agents are fitted on what the others made of the training queries, and route the
test queries among the withheld ones, of which they know what these made of the validation queries. Where none is
withheld, they route among the models they were fitted on. What routing itself takes is not counted here, as it is where
agents decode (`experiments.evaluate`). The run's folder receives `config.yaml`, `results.jsonl` (a row per agent and
split), `summary.json`, `table.md`, `curve.png`, and in `splits/` what each agent chose. Started again in the same
folder (`hydra.run.dir=...`), a run goes on after the last split that is done.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from agents.embeddings import Embedding
from agents.policy import Track
from agents.query import EmbeddedQueries, QueryLearner, choose
from envs.cache import IntArray
from envs.costs import FloatArray
from envs.files import write_tensors, write_text
from envs.manifest import check_manifest
from envs.queries import QueryOutcomes
from experiments.build import build, program
from experiments.metrics import Sweep, area, bootstrap, finite, measures, over_seeds
from experiments.present import markdown, plot_curves, query_table
from experiments.summary import BAND_SAMPLES, band, mean_curve

SWEEP = 64
"""Cost weights on a curve."""
AXIS = "cost, from the cheapest model's (0) to the most accurate one's (1)"


@dataclass(frozen=True)
class Split:
    """One random split.

    Attributes:
        train: queries agents are fitted on, (a,).
        known: queries of the validation pass, (b,); the training queries where no model is withheld.
        test: queries that are routed, (c,).
        seen: the training models.
        routed: the models to route among.
    """

    train: IntArray
    known: IntArray
    test: IntArray
    seen: tuple[str, ...]
    routed: tuple[str, ...]

    @classmethod
    def draw(cls, outcomes: QueryOutcomes, settings: DictConfig, number: int) -> Split:
        """Split `number`: a function of the seed and the number alone."""
        rng = np.random.default_rng([settings.seed, number])
        order = rng.permutation(len(outcomes))
        test, rest = np.split(order, [round(settings.test_share * len(order))])
        models = outcomes.models
        if not settings.unseen:
            return cls(np.sort(rest), np.sort(rest), np.sort(test), models, models)
        unseen = set(rng.permutation(len(models))[: settings.unseen].tolist())
        known, train = np.split(rest, [settings.validation_queries])
        return cls(
            np.sort(train), np.sort(known), np.sort(test),
            tuple(model for number, model in enumerate(models) if number not in unseen),
            tuple(model for number, model in enumerate(models) if number in unseen),
        )  # fmt: skip


@dataclass(frozen=True)
class Routed:
    """What one agent chose in one split.

    Attributes:
        choices: the model chosen for each test query at each cost weight, (SWEEP, queries).
    """

    choices: npt.NDArray[np.int8]

    def sweep(self, test: QueryOutcomes) -> Sweep:
        """Its curve, between the cheapest model alone and the most accurate one, which every agent can fall back on."""
        best = int(test.correct.mean(0).argmax())
        queries = np.arange(len(test))
        choices = np.concatenate(
            [np.zeros((1, len(test)), dtype=np.int64), self.choices, np.full((1, len(test)), best)], dtype=np.int64
        )
        return Sweep(test.correct[queries, choices], test.costs[queries, choices])

    def calls(self, test: QueryOutcomes) -> Sweep | None:
        """The same between two models, a call of the dearer one counted as 1; None where there are more."""
        if len(test.models) > 2:
            return None
        priced = np.broadcast_to([1e-12, 1.0], test.costs.shape)
        return self.sweep(replace(test, costs=priced))


def cost_weights(errors: Tensor, costs: FloatArray) -> FloatArray:
    """Cost weights that cover a curve evenly, (SWEEP,): quantiles of those at which a choice between two models turns.

    Args:
        errors: estimated for some queries, (n, models).
        costs: of an answer by each model, (models,).
    """
    estimated = errors.double().numpy()
    first, second = np.triu_indices(len(costs), 1)
    # models that cost all but the same are told apart by their errors, whatever a unit of cost is worth
    apart = costs[second] - costs[first] > 0.01 * costs.max()
    first, second = first[apart], second[apart]
    turns = (estimated[:, first] - estimated[:, second]) / (costs[second] - costs[first])
    return np.quantile(turns, np.linspace(0, 1, SWEEP)) if turns.size else np.zeros(SWEEP)


def route(errors: Tensor, costs: FloatArray) -> npt.NDArray[np.int8]:
    """Choices at every cost weight, (SWEEP, n)."""
    relative = costs / costs.max()
    weights = cost_weights(errors, relative)
    return np.stack([choose(errors, relative, float(weight)) for weight in weights]).astype(np.int8)


def embedded(outcomes: QueryOutcomes, embeddings: Tensor, rows: IntArray, models: Sequence[str]) -> EmbeddedQueries:
    """Some queries and models, as agents see them."""
    part = outcomes.of(models).rows(rows)
    return EmbeddedQueries.of_outcomes(part, embeddings[torch.from_numpy(rows)])


def route_split(
    outcomes: QueryOutcomes,
    split: Split,
    embedding: Embedding,
    agents: Mapping[str, QueryLearner],
    seed: int,
    track: Track,
) -> dict[str, Routed]:
    """What every agent, and the oracle that knows the outcomes, chooses in one split."""
    embedder = embedding.fit([outcomes.prompts[i] for i in split.train], seed)
    embeddings = embedder.embed(outcomes.prompts)
    train = embedded(outcomes, embeddings, split.train, split.seen)
    known = embedded(outcomes, embeddings, split.known, split.routed)
    test = embedded(outcomes, embeddings, split.test, split.routed)
    found = {}
    for name, agent in agents.items():
        router = agent.fit_queries(train, known, seed, track)
        found[name] = Routed(route(router.errors(test.embeddings), known.costs))
    found["oracle"] = Routed(route(torch.from_numpy(1.0 - test.correct), known.costs))
    return found


def measured(sweep: Sweep, calls: Sweep | None, weights: FloatArray) -> dict[str, float]:
    """`experiments.metrics.measures` of one agent in one split.

    Also area_above_random: of the deferral curve above the line between the two ends. peak_accuracy: the best the agent
    itself reaches at any cost weight.
    """
    points = sweep.points(weights)
    found = measures(sweep, calls, weights)
    low, high = points[0][0], points[-1][0]
    line = area(points[[0, -1]], low, high) if high > low else float("nan")
    found["area_above_random"] = (found["deferral_area"] - line) / (high - low) if high > low else float("nan")
    found["peak_accuracy"] = float(points[1:-1, 1].max())
    return found


def summarize_queries(
    name: str,
    outcomes: QueryOutcomes,
    splits: Sequence[Split],
    routed: Mapping[str, Sequence[Routed]],
    first: str,
    samples: int,
    seed: int,
) -> dict[str, Any]:
    """The contents of `summary.json`: measures with 95 % intervals over splits and test queries, and comparisons."""
    tests = [outcomes.of(split.routed).rows(split.test) for split in splits]
    count = len(tests[0])
    even = np.full(count, 1 / count)
    sweeps = {key: [one.sweep(test) for one, test in zip(some, tests, strict=True)] for key, some in routed.items()}
    calls = {key: [one.calls(test) for one, test in zip(some, tests, strict=True)] for key, some in routed.items()}

    def statistic(number: int, weights: FloatArray) -> dict[str, float]:
        found = {key: measured(sweeps[key][number], calls[key][number], weights) for key in routed}
        own = {f"{key} {measure}": value for key in routed for measure, value in found[key].items()}
        less = {
            f"{key} less {measure}": value - found[first][measure]
            for key in routed
            for measure, value in found[key].items()
        }
        return own | less

    values = over_seeds(statistic, range(len(splits)), even)
    # one resampling for all: what is compared is paired
    intervals = bootstrap(statistic, len(splits), count, samples, seed)

    def named(prefix: str) -> dict[str, dict[str, Any]]:
        measures_of = [name.removeprefix(prefix) for name in values if name.startswith(prefix)]
        return {
            measure: {"value": finite(values[prefix + measure]), "interval": intervals[prefix + measure]}
            for measure in measures_of
            if " " not in measure
        }

    # the pools of the splits cost differently: their curves are laid over each other by their ends
    above_cheapest = {
        key: [replace(sweep, costs=sweep.costs - sweep.costs[0]) for sweep in some] for key, some in sweeps.items()
    }
    policies = {
        key: {
            "trained": True,
            "measures": named(f"{key} "),
            f"less_{first}": named(f"{key} less "),
            "curve": mean_curve(above_cheapest[key], even),
            "band": band(above_cheapest[key], min(samples, BAND_SAMPLES), seed),
        }
        for key in routed
    }
    accuracies = np.mean([sweep.points(even)[[0, -1], 1] for sweep in sweeps[first]], axis=0)
    return {
        "task": name,
        "pool": list(outcomes.models),
        "accuracy": dict(zip(outcomes.models, outcomes.correct.mean(0).tolist(), strict=True)),
        "price": dict(zip(outcomes.models, outcomes.costs.mean(0).tolist(), strict=True)),
        "split": "test",
        "splits": len(splits),
        "examples": count,
        "first": first,
        "models": {
            key: {"cost": cost, "accuracy": float(accuracy)}
            for key, cost, accuracy in zip(("slm", "llm"), (0.0, 1.0), accuracies, strict=True)
        },
        "limits": {"oracle": {"curve": policies["oracle"]["curve"]}},
        "policies": policies,
    }


def check(config: DictConfig) -> None:
    """Refuse settings that would fail later, before any model is loaded."""
    for key, least in (("splits", 1), ("unseen", 0), ("validation_queries", 1), ("bootstrap", 1)):
        if config[key] < least:
            raise ValueError(f"{key} must be at least {least}, is {config[key]}")
    if not 0 < config.test_share < 1:
        raise ValueError(f"test_share must be in (0, 1), is {config.test_share}")
    if not config.agents:
        raise ValueError("nothing to compare: name agents (+agent@agents.NAME=...)")
    if config.first not in config.agents:
        raise ValueError(f"first is {config.first!r}, the agents are {', '.join(config.agents)}; choose one of them")


def check_split(outcomes: QueryOutcomes, config: DictConfig) -> None:
    """Refuse splits that leave too few models or queries."""
    models = len(outcomes.models)
    if config.unseen and not 2 <= config.unseen <= models - 2:
        raise ValueError(
            f"unseen must be 0, or leave at least two models on either side; it is {config.unseen} of {models} "
            f"({', '.join(outcomes.models)})"
        )
    left = len(outcomes) - round(config.test_share * len(outcomes)) - bool(config.unseen) * config.validation_queries
    if left < 2 or round(config.test_share * len(outcomes)) < 1:
        raise ValueError(
            f"of {len(outcomes)} queries, a test_share of {config.test_share} and {config.validation_queries} "
            f"validation_queries leave {left} to train on; lower them"
        )


def compare(config: DictConfig, folder: Path) -> dict[str, Any]:
    """Compare `config.agents` on `config.outcomes`; what is done already in `folder` is not done again."""
    check(config)
    agents = {name: build(config.agents, name) for name in config.agents}
    for name, agent in agents.items():
        if not isinstance(agent, QueryLearner):
            raise ValueError(f"agents.{name}: {type(agent).__name__} does not route whole queries; leave it out")
    embedding, tracking = build(config, "embedding"), build(config, "track")
    source = build(config, "outcomes")
    outcomes = source.read(folder)
    check_split(outcomes, config)
    keys = ("outcomes", "embedding", "agents", "seed", "test_share", "unseen", "validation_queries")
    plain = OmegaConf.to_container(config, resolve=True)
    about = {key: plain[key] for key in keys}  # type: ignore[call-overload,index]
    manifest = folder / "splits" / "manifest.json"
    if manifest.is_file():
        check_manifest(manifest, json.loads(manifest.read_text()), about)
    else:
        write_text(manifest, json.dumps(about, indent=1) + "\n")
    splits = [Split.draw(outcomes, config, number) for number in range(config.splits)]
    for agent in agents.values():
        agent.check(splits[0].routed, len(splits[0].known))
    routed: dict[str, list[Routed]] = {name: [] for name in (*agents, "oracle")}
    rows: list[dict[str, Any]] = []
    with tracking.open(folder, plain, "queries") as track:
        for number, split in enumerate(tqdm(splits, desc="splits", leave=False)):
            path = folder / "splits" / f"{number:03d}.safetensors"
            if not path.is_file():
                made = route_split(outcomes, split, embedding, agents, config.seed + number, track)
                write_tensors(path, {name: torch.from_numpy(one.choices) for name, one in made.items()})
            test = outcomes.of(split.routed).rows(split.test)
            even = np.full(len(test), 1 / len(test))
            for name, choices in load_file(path).items():
                routed[name].append(Routed(choices.numpy()))
                sweep, calls = routed[name][-1].sweep(test), routed[name][-1].calls(test)
                found = {key: finite(value) for key, value in measured(sweep, calls, even).items()}
                rows.append({"policy": name, "split": number, "models": list(split.routed), **found})
        summary = summarize_queries(source.name, outcomes, splits, routed, config.first, config.bootstrap, config.seed)
        write_text(folder / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        drawn = {name: policy for name, policy in summary["policies"].items() if name not in summary["limits"]}
        plot_curves(
            {**summary, "policies": drawn}, folder / "curve.png", AXIS, ("cheapest model", "most accurate model")
        )
        table = query_table(summary)
        write_text(folder / "table.md", markdown(table))
        Console(width=max(150, Console().width)).print(table)
        told = {
            f"{name}/{measure}": found["value"]
            for name, policy in summary["policies"].items()
            for measure, found in policy["measures"].items()
        }
        track.summary(told, {"curve": folder / "curve.png"})
    print(f"wrote {folder}")
    return summary


@program("queries")
def main(config: DictConfig, folder: Path) -> None:
    """Compare the agents that were chosen."""
    compare(config, folder)


if __name__ == "__main__":
    main()
