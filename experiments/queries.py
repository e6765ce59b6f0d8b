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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from safetensors.torch import load_file
from tqdm import tqdm

from agents.query_routing.learner import QueryLearner
from envs.storage import keep_manifest, write_tensors, write_text
from experiments.common.config import build, program
from experiments.evaluation.metrics import finite
from experiments.query_routing.splits import Routed, Split, check_split, route_split
from experiments.query_routing.summary import measured, summarize_queries
from experiments.reporting.figures import plot_curves
from experiments.reporting.tables import markdown, query_table

AXIS = "cost, from the cheapest model's (0) to the most accurate one's (1)"


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
    keep_manifest(folder / "splits" / "manifest.json", about)
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
