"""Route whole queries among the models of a pool, over many random splits of queries and models.

    python -m experiments.queries experiment=changing_pool
    python -m experiments.queries experiment=two_llms outcomes.path=query_outcomes_two_llms.jsonl

In each split some models are withheld: agents are fitted on what the others made of the training queries, and route the
test queries among the withheld ones, of which they know what these made of the validation queries. Where none is
withheld, they route among the models they were fitted on. What routing itself takes is not counted here, as it is where
agents decode (`experiments.evaluate`). The run's folder receives `config.yaml`, `results.jsonl` (a row per agent and
split), `summary.json`, `table.md`, `curve.png`, and in `splits/` what each agent chose. Started again in the same
folder (`hydra.run.dir=...`), a run goes on after the last split that is done. With `results=FILE` what it has done is
kept as one file in the end, with the table beside it, and a run that finds the file goes on from it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from experiments.common.continuing import Continuing
from experiments.common.program import Begin, program

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from agents.query_routing.learner import QueryLearner

MADE_BY = ("outcomes", "embedding", "agents", "seed", "test_share", "unseen", "validation_queries")
"""Settings that make what agents choose in a split."""


def check(config: DictConfig) -> None:
    """Refuse settings that would fail later, before anything is built."""
    if config.bootstrap < 1:
        raise ValueError(f"bootstrap must be at least 1, is {config.bootstrap}")
    if not config.agents:
        raise ValueError("nothing to compare: name agents (+agent@agents.NAME=...)")
    if config.first not in config.agents:
        raise ValueError(f"first is {config.first!r}, the agents are {', '.join(config.agents)}; choose one of them")


def build_agents(config: DictConfig) -> dict[str, QueryLearner]:
    """The agents that are compared."""
    from agents.query_routing.learner import QueryLearner
    from experiments.common.config import build

    agents = {name: build(config.agents, name) for name in config.agents}
    for name, agent in agents.items():
        if not isinstance(agent, QueryLearner):
            raise ValueError(f"agents.{name}: {type(agent).__name__} does not route whole queries; leave it out")
    return agents


def keep_splits(folder: Path, made_by: Mapping[str, Any], models: Sequence[str]) -> None:
    """Check what made the splits in `folder`, or write it there; choices are columns, so that models' order is of it.

    Raises:
        ValueError: something else made them, or models in an order that was not kept; the error says what to do.
    """
    from envs.storage import check_manifest, write_manifest

    path, about = folder / "manifest.json", {**made_by, "models": list(models)}
    if not path.is_file():
        write_manifest(path, about)
        return
    kept = json.loads(path.read_text())
    if "models" not in kept:
        raise ValueError(
            f"{folder} was written by a version that kept no order of the models, and every second start had another: "
            f"delete {folder}, and start again (what the models answered stays)"
        )
    check_manifest(path, _told(kept), _told(about))


def _told(made_by: Mapping[str, Any]) -> dict[str, Any]:
    """What made splits, without those settings of a pool that are of the machine, or came later."""
    from experiments.evaluation.kept import settings_of_models

    outcomes = made_by["outcomes"]
    if "pool" not in outcomes:
        return dict(made_by)
    return {**made_by, "outcomes": {**outcomes, "pool": settings_of_models(outcomes["pool"])}}


def compare(config: DictConfig, folder: Path, begin: Begin = lambda: None) -> dict[str, Any]:
    """Compare `config.agents` on `config.outcomes`; what is done already in `folder` is not done again."""
    from omegaconf import OmegaConf

    from envs.storage import write_text
    from experiments.common.config import build, build_settings
    from experiments.query_routing.archive import pack, remove, unpack
    from experiments.query_routing.report import flat_measures, write_query_report
    from experiments.query_routing.splits import SplitSettings, check_agents, draw_splits, route_splits
    from experiments.query_routing.summary import QueryResults, summarize_queries

    settings = build_settings(config, SplitSettings)
    check(config)
    agents = build_agents(config)
    embedding, tracking, source = build(config, "embedding"), build(config, "track"), build(config, "outcomes")
    kept = Path(config.results) if config.results else None
    unpacked = kept is not None and kept.is_file() and not (folder / "splits").is_dir()
    plain: Any = OmegaConf.to_container(config, resolve=True)
    try:
        if kept is not None and unpacked:
            unpack(kept, folder)
        outcomes = source.read(folder)
        splits = draw_splits(outcomes, settings)
        check_agents(agents, splits)
        begin()
        keep_splits(folder / "splits", {key: plain[key] for key in MADE_BY}, outcomes.models)
    except ValueError as error:
        if unpacked:
            remove(folder)
            raise ValueError(
                f"{kept} does not go with these settings; say results=null, or another file: {error}"
            ) from error
        raise
    with tracking.open(folder, plain, "queries") as track:
        routed = route_splits(outcomes, splits, embedding, agents, settings.seed, folder / "splits", track)
        results = QueryResults(source.name, outcomes, splits, routed)
        summary = summarize_queries(results, config.first, config.bootstrap, settings.seed)
        write_query_report(summary, results.rows(), folder)
        track.summary(flat_measures(summary), {"curve": folder / "curve.png"})
    if kept is not None:
        table = kept.with_name(f"{kept.name.partition('.')[0]}.md")
        if not kept.is_file():
            pack(folder, kept)
        if not table.is_file():  # other splits, or another bootstrap, would make another one of it
            write_text(table, (folder / "table.md").read_text())
    print(f"wrote {folder}")
    return summary


@program("queries", Continuing(may_differ=("splits", "bootstrap", "first", "results")))
def main(config: DictConfig, folder: Path, begin: Begin) -> None:
    """Compare the agents that were chosen."""
    compare(config, folder, begin)


if __name__ == "__main__":
    main()
