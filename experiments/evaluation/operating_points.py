"""Operating points: thresholds that are chosen on validation problems, and what they do on others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from envs.arrays import FloatArray
from experiments.evaluation.answers import Answered, Answers, sweep
from experiments.evaluation.baselines import Baselines
from experiments.measures.intervals import Estimate, estimates, resampled
from experiments.measures.metrics import LEVELS, Hull

SHARES = np.linspace(0, 1, 1001)
"""Quantiles of a score that thresholds are looked up in."""
SAMPLES = 200
"""Resamplings behind the interval that a gap is compared with."""


def cheapest_reaching(runs: Sequence[Answers], accuracy: float, unit: str) -> int:
    """The number of the cheapest run that is right on at least this share of its problems; the last one if none is."""
    reaching = [number for number, run in enumerate(runs) if run.correct.mean() >= accuracy]
    return min(reaching, key=lambda number: runs[number].costs[unit].sum(), default=len(runs) - 1)


def threshold_to_use(runs: Sequence[Answers], llm: Answers, unit: str, level: float = 0.95) -> int | None:
    """The number of the cheapest run that reaches a share of the LLM's accuracy; None where none does.

    Args:
        runs: of one policy, on validation problems.
        llm: the LLM's answers to them.
        unit: of costs.
        level: the share.
    """
    number = cheapest_reaching([*runs, llm], level * float(llm.correct.mean()), unit)
    return None if number == len(runs) else number


def operating_points(
    baselines: Baselines,
    answers: Answered,
    validated: Answered,
    thresholds: Sequence[Sequence[float]] | None,
    unit: str,
    weights: FloatArray,
) -> dict[str, dict[str, Any]]:
    """For each share of the LLM's accuracy: the threshold that validation chooses, and what it does on the problems.

    For each training seed it is the cheapest that reaches the share on validation problems; where that is one of the
    models alone, it is named.

    Args:
        baselines: of the problems, with those of the validation problems.
        answers: of a policy to the problems.
        validated: the same to the validation problems.
        thresholds: of each seed; None where they are not said.
        unit: of costs.
        weights: of the problems, as `resampled` gives them.
    """
    assert baselines.validation is not None
    ends, llm = baselines.validation, baselines.llm
    of_llm = weights @ llm.correct
    points = {}
    for level in LEVELS:
        rows, chosen = [], []
        for seed, (tested, tried) in enumerate(zip(answers, validated, strict=True)):
            number = cheapest_reaching([ends[0], *tried, ends[1]], level * float(ends[1].correct.mean()), unit)
            run = [baselines.slm, *tested, llm][number]
            alone = {0: "slm", len(tried) + 1: "llm"}.get(number)
            chosen.append(alone or (thresholds and thresholds[seed][number - 1]))
            accuracy = weights @ run.correct
            costs = {key: (weights @ run.costs[key]) / (weights @ llm.costs[key]) for key in baselines.slm.costs}
            rows.append(
                {
                    "accuracy": accuracy,
                    "share_of_llm": np.divide(accuracy, of_llm, out=np.full_like(accuracy, np.nan), where=of_llm > 0),
                    **{f"cost_{key}": cost for key, cost in costs.items()},
                }
            )
        measured = {key: one.described() for key, one in estimates(rows).items()}
        points[f"{level:.2f}"] = {"thresholds": chosen, **measured}
    return points


def finer_thresholds(
    thresholds: Sequence[float],
    runs: Sequence[Answers],
    ends: tuple[Answers, Answers],
    quantiles: Sequence[float],
    unit: str,
) -> list[float]:
    """Thresholds between two neighbours that a level lies between, where these are further apart than can be measured.

    Args:
        thresholds: that were tried.
        runs: the answers at each of them.
        ends: the SLM's and the LLM's answers to the same problems.
        quantiles: of the score, at SHARES.
        unit: of costs.

    Returns:
        New ones, by rising LLM share; none where every gap is narrower than the interval of the cost at its level.
    """
    order = np.argsort(thresholds, kind="stable")
    steps = [ends[0], *(runs[number] for number in order), ends[1]]
    at = [0.0, *np.interp(np.array(thresholds)[order], quantiles, SHARES), 1.0]
    points = sweep(steps[1:-1], *ends, unit).points(resampled(len(ends[0].correct), SAMPLES, seed=0))
    hull = Hull.of(points)
    found = set()
    for level in LEVELS:
        wanted = level * points[:, -1, 1]
        low, high = Estimate(hull.cost_at(wanted)[None]).interval()
        reaching = cheapest_reaching(steps, float(wanted[0]), unit)
        if reaching == 0 or low is None or high is None:
            continue
        if points[0, reaching, 0] - points[0, reaching - 1, 0] > high - low:
            share = (at[reaching] + at[reaching - 1]) / 2
            found.add(float(np.interp(share, SHARES, quantiles)))
    return sorted(found - set(thresholds))
