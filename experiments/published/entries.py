"""What machines read of a leaderboard, and what each agent had for its training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from envs.storage import write_text
from experiments.evaluation.kept import flat
from experiments.reporting.leaderboard_tables import ranked
from experiments.training.many import Run
from experiments.training.run import TRAINED

LEADERBOARD = "leaderboard.json"
SCHEMA = 1


def training_of(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """What each agent had for its training, means over its seeds.

    Args:
        runs: that are complete.

    Returns:
        For each agent: `seeds`, how many; `labels`, what those that ask for the LLM are made of, shares by case and
        kind of token, in the last round; `problems`, `features`, `parameters` of a decision, `llm_tokens` that the LLM
        read or wrote in training, `minutes` of processors; None where there is none of it. Of a seed whose training was
        interrupted the last two are not known, and it is left out of their means.
    """
    told: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        kept = json.loads((run.folder / TRAINED).read_text())
        told.setdefault(run.agent, []).append({**kept["summary"], **dict(flat(kept["made_by"]["agent"]))})
    return {agent: _training(some) for agent, some in told.items()}


def _training(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if known else None

    first = seeds[0]
    read, computed = ([one.get(key) for one in seeds] for key in ("tokens_read", "cpu_seconds"))
    learned = "examples" in first
    return {
        "seeds": len(seeds),
        "labels": _llm_labels([one["composition"] for one in seeds if "composition" in one]),
        "problems": _problems(first),
        "features": _features(first),
        "parameters": first.get("parameters"),
        "llm_tokens": mean([None if one is None else one[-1] for one in read]) if learned else None,
        "minutes": mean([None if one is None else one / 60 for one in computed]) if learned else None,
    }


def _problems(settings: Mapping[str, Any]) -> int | None:
    """Training problems of an agent, the first ones; of one that imitates another those of both."""
    return max((settings[key] for key in ("examples", "start.teacher.examples") if settings.get(key)), default=None)


def _features(settings: Mapping[str, Any]) -> str | None:
    """What an agent sees, by name; a router that another agent's begins with sees what that one saw."""
    features = settings.get(f"{settings.get('start')}.features", settings.get("features", settings.get("sees")))
    return " and ".join(features) if isinstance(features, list) else features


def _llm_labels(seeds: Sequence[Mapping[str, Mapping[str, Mapping[str, int]]]]) -> dict[str, dict[str, float]] | None:
    """Shares of the labels that ask for the LLM, by case and kind of token, means over seeds; None without labels."""
    if not seeds:
        return None
    counts = [
        {(case, kind): labels["llm"] for case, kinds in one.items() for kind, labels in kinds.items() if labels["llm"]}
        for one in seeds
    ]
    shares: dict[str, dict[str, float]] = {}
    for case, kind in sorted({key for one in counts for key in one}):
        mean = np.mean([one.get((case, kind), 0) / max(1, sum(one.values())) for one in counts])
        shares.setdefault(case, {})[kind] = round(float(mean), 6)
    return shares


def entries(
    summary: Mapping[str, Any], training: Mapping[str, Mapping[str, Any]], seconds: Mapping[str, float | None]
) -> list[dict[str, Any]]:
    """The rows of a leaderboard as plain data, cheapest first.

    Args:
        summary: of all runs, as `experiments.report` writes it.
        training: what each agent had, as `training_of` gives it.
        seconds: of each agent over LLM-only decoding's.
    """
    rows = []
    for name in ranked(summary):
        policy = summary["policies"][name]
        rows.append(
            {
                "agent": name,
                "seeds": policy["seeds"],
                "operating_points": policy["operating_points"],
                "hull_cost_at": {
                    level: {"value": cost, "interval": policy["cost_at_interval"][level]}
                    for level, cost in policy["cost_at"].items()
                },
                "hull_cost_at_by_unit": policy["cost_at_by_unit"],
                "aiq": policy["measures"]["aiq"],
                "against": {
                    other: policy[f"against_{other}"]
                    for other in summary["policies"]
                    if f"against_{other}" in policy and other != name
                },
                "seconds_over_llm_only": seconds.get(name),
                "training": training.get(name),
            }
        )
    return rows


def write_leaderboard(folder: Path, track: str, summary: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Put one track's rows into `leaderboard.json`, in place of those that stood there; other tracks stay.

    Args:
        folder: where it lies.
        track: the name of the track.
        summary: of its runs.
        rows: as `entries` gives them.
    """
    path = folder / LEADERBOARD
    board: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {"schema": SCHEMA, "tracks": {}}
    about = {key: summary[key] for key in ("task", "pool", "split", "start", "examples", "max_new_tokens", "cost")}
    board["tracks"][track] = {**about, "models": summary["models"], "limits": _points(summary), "agents": list(rows)}
    write_text(path, json.dumps(board, indent=1, sort_keys=True) + "\n")


def _points(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Costs of the limits, without their curves."""
    return {
        name: {key: value for key, value in limit.items() if key != "curve"}
        for name, limit in summary["limits"].items()
    }
