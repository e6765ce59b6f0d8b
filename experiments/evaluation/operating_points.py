"""Operating points: thresholds that are chosen on validation problems, and what they do on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from agents.common.curves import Hull
from envs.arrays import FloatArray
from experiments.evaluation.answers import Answered, Answers, sweep
from experiments.evaluation.baselines import Baselines
from experiments.measures.intervals import Estimate, described, estimates, resampled
from experiments.measures.metrics import LEVELS

SHARES = np.linspace(0, 1, 1001)
"""Quantiles of a score that thresholds are looked up in."""
WORTH = 0.01
"""The share of a cost that another threshold must save, or it is not worth answering all problems at."""
SAMPLES = 200
"""Resamplings behind the interval that a gap is compared with."""


Tried = Sequence[Answers | None]
"""Of one policy: the answers at each threshold, None where it was not tried."""
Around = tuple[int, int, list[Answers | None], list[int]]
"""The two steps that a share lies between, all steps and the numbers of their thresholds, see `_in_order`."""


def cheapest_reaching(runs: Tried, accuracy: float, unit: str) -> int:
    """The number of the cheapest run that is right on at least this share of its problems; the last one if none is."""
    costs = {
        number: run.costs[unit].sum()
        for number, run in enumerate(runs)
        if run is not None and run.correct.mean() >= accuracy
    }
    return min(costs, key=lambda number: float(costs[number]), default=len(runs) - 1)


def threshold_to_use(runs: Tried, llm: Answers, unit: str, level: float = 0.95) -> int | None:
    """The number of the cheapest threshold that reaches a share of the LLM's accuracy; None where none does.

    Args:
        runs: of one policy, on validation problems.
        llm: the LLM's answers to them.
        unit: of costs.
        level: the share.
    """
    number = cheapest_reaching([*runs, llm], level * float(llm.correct.mean()), unit)
    return None if number == len(runs) else number


@dataclass(frozen=True)
class ThresholdSearch:
    """Looks for thresholds at which a policy reaches shares of the LLM's accuracy, LEVELS.

    Attributes:
        ends: the SLM's and the LLM's answers to the same problems.
        quantiles: of the score, at SHARES; needed where others may be put between those that are there.
        unit: of costs.
        refine: how many are put between for each share, at most.
    """

    ends: tuple[Answers, Answers]
    quantiles: Sequence[float]
    unit: str
    refine: int

    def try_few(
        self, thresholds: Sequence[float], answers: Callable[[float, int], Answers]
    ) -> tuple[list[float], list[Answers | None]]:
        """Find where validation problems reach each share, by bisection, to choose an operating point.

        The dearer a threshold the more accurate it is taken to be, so that few are tried. Where the two that a share
        lies between are further apart in cost than the interval of the cost there, another is put between them.

        Args:
            thresholds: to choose among.
            answers: at a threshold with a number.

        Returns:
            All thresholds, those that were put between last, and the answers at those that were tried.
        """
        all_of_them, tried = list(thresholds), list[Answers | None]([None] * len(thresholds))
        for level in LEVELS:
            left = self.refine
            while True:
                low, high, steps, order = around = self._around(level, all_of_them, tried)
                untried = (low + high) // 2
                if steps[untried] is None:
                    number = order[untried - 1]
                    tried[number] = answers(all_of_them[number], number)
                    continue
                between = self._between_wide(level, all_of_them, around) if left else None
                if between is None:
                    break
                all_of_them.append(between)
                tried.append(None)
                left -= 1
        return all_of_them, tried

    def try_all(
        self, thresholds: Sequence[float], answers: Callable[[float, int], Answers]
    ) -> tuple[list[float], list[Answers | None]]:
        """The same for a policy that checks drafts, whose cost need not rise with the threshold.

        What is drafted behind a token that does not stand is thrown away, and a later call throws away more. So all
        thresholds are tried, and others beside the cheapest that reaches a share, on that side where the next one is
        further away, until two of them bring less than WORTH.
        """
        all_of_them: list[float] = list(thresholds)
        tried: list[Answers | None] = [answers(threshold, number) for number, threshold in enumerate(all_of_them)]
        settled: set[float | None] = set()
        for level in LEVELS:
            wanted, in_vain = self._wanted(level), 0
            for _ in range(self.refine):
                stands, steps, _ = _in_order(all_of_them, tried, self.ends)
                step = cheapest_reaching(steps, wanted, self.unit)
                cheapest = steps[step]
                threshold = stands[step - 1] if 0 < step <= len(stands) else None
                between = _between(stands, *_wider_side(stands, step, self.quantiles), self.quantiles)
                if threshold in settled or between is None or between in all_of_them:
                    break
                found = answers(between, len(tried))
                all_of_them.append(between)
                tried.append(found)
                assert cheapest is not None
                reaches = found.correct.mean() >= wanted
                better = reaches and found.costs[self.unit].sum() < (1 - WORTH) * cheapest.costs[self.unit].sum()
                in_vain = 0 if better else in_vain + 1
                if in_vain == 2:
                    settled.add(threshold)
                    break
        return all_of_them, tried

    def sweep(
        self, thresholds: Sequence[float], answers: Callable[[float, int], Answers]
    ) -> tuple[list[float], list[Answers]]:
        """Answer at every threshold, and at others wherever the cost of a share would be read off a wide gap.

        A curve of few points lies below the one that a policy has. What is put between chooses no operating point.

        Returns:
            All thresholds, those that were put between last, and the answers at each.
        """
        all_of_them = list(thresholds)
        runs = [answers(threshold, number) for number, threshold in enumerate(thresholds)]
        left, in_vain = dict.fromkeys(LEVELS, self.refine), dict.fromkeys(LEVELS, 0)
        while True:
            for level in LEVELS:  # what is put between for one share says more of the others too
                low, high, steps, _ = around = self._around(level, all_of_them, runs)
                more = left[level] > 0 and in_vain[level] < 2
                between = self._between_wide(level, all_of_them, around) if more else None
                if between is not None:
                    break
            else:
                return all_of_them, runs
            found = answers(between, len(runs))
            all_of_them.append(between)
            runs.append(found)
            left[level] -= 1
            # a score of few values has nothing between them
            in_vain[level] = in_vain[level] + 1 if any(_same(found, steps[at], self.unit) for at in (low, high)) else 0

    def _wanted(self, level: float) -> float:
        """The accuracy at a share of the LLM's."""
        return level * float(self.ends[1].correct.mean())

    def _around(self, level: float, thresholds: Sequence[float], tried: Tried) -> Around:
        """Where a share of the LLM's accuracy lies, as far as thresholds were tried."""
        _, steps, order = _in_order(thresholds, tried, self.ends)
        return *_bracket(steps, self._wanted(level)), steps, order

    def _between_wide(self, level: float, thresholds: Sequence[float], around: Around) -> float | None:
        """A threshold between the two that a share lies between; None where they are close, or nothing lies there."""
        low, high, steps, order = around
        between = _between([thresholds[number] for number in order], low, high, self.quantiles)
        if between is None or between in thresholds or not _wide(steps, low, high, self._wanted(level), self.unit):
            return None
        return between


def _in_order(
    thresholds: Sequence[float], tried: Tried, ends: tuple[Answers, Answers]
) -> tuple[list[float], list[Answers | None], list[int]]:
    """Thresholds by rising LLM share, the answers with those of the SLM and of the LLM alone around, their numbers."""
    order = [int(number) for number in np.argsort(thresholds, kind="stable")]
    return [thresholds[number] for number in order], [ends[0], *(tried[number] for number in order), ends[1]], order


def _bracket(steps: Tried, accuracy: float) -> tuple[int, int]:
    """The last step below `accuracy` and the first that reaches it, as far as the steps between were tried.

    Args:
        steps: by rising LLM share; the SLM alone and the LLM alone are the ends.
        accuracy: to reach; the LLM alone always counts as reaching it.
    """
    low, high = 0, len(steps) - 1
    if steps[0] is not None and steps[0].correct.mean() >= accuracy:
        return 0, 0
    while high - low > 1:
        middle = (low + high) // 2
        run = steps[middle]
        if run is None:
            break
        low, high = (low, middle) if run.correct.mean() >= accuracy else (middle, high)
    return low, high


def _shares(thresholds: Sequence[float], quantiles: Sequence[float]) -> list[float]:
    """The share of decisions that goes to the LLM at each step: the SLM alone, rising thresholds, the LLM alone."""
    return [0.0, *np.interp(thresholds, quantiles, SHARES), 1.0]


def _between(thresholds: Sequence[float], low: int, high: int, quantiles: Sequence[float]) -> float | None:
    """A threshold halfway between two steps, by the share of decisions that goes to the LLM; None for one step."""
    if low == high:
        return None
    at = _shares(thresholds, quantiles)
    return float(np.interp((at[low] + at[high]) / 2, SHARES, quantiles))


def _wider_side(thresholds: Sequence[float], step: int, quantiles: Sequence[float]) -> tuple[int, int]:
    """A step and that of its neighbours which is further from it, in rising order; none is beyond the two ends."""
    at = _shares(thresholds, quantiles)
    sides = [(low, low + 1) for low in (step - 1, step) if 0 <= low < len(at) - 1]
    return max(sides, key=lambda side: at[side[1]] - at[side[0]])


def _same(one: Answers, other: Answers | None, unit: str) -> bool:
    """Whether two thresholds gave the same answers, as far as they are measured."""
    return (
        other is not None
        and np.array_equal(one.correct, other.correct)
        and np.array_equal(one.costs[unit], other.costs[unit])
    )


def _wide(steps: Tried, low: int, high: int, accuracy: float, unit: str) -> bool:
    """Whether two steps are further apart in cost than the interval of the cost at `accuracy`."""
    known = [run for run in steps if run is not None]
    weights = resampled(len(known[0].correct), SAMPLES, seed=0)
    points = sweep(known[1:-1], known[0], known[-1], unit).points(weights)
    level = accuracy / points[0, -1, 1]
    interval = Estimate(Hull.of(points).cost_at(level * points[:, -1, 1])[None]).interval()
    costs = [run.costs[unit].sum() for run in (steps[low], steps[high]) if run is not None]
    gap = float((costs[1] - costs[0]) / known[-1].costs[unit].sum())
    return interval[0] is not None and interval[1] is not None and gap > interval[1] - interval[0]


class OperatingPoint(NamedTuple):
    """A threshold that validation problems choose, and what it does on the problems.

    Attributes:
        thresholds: of each training seed; the name of a model where it answers alone.
        measured: `accuracy`, `share_of_llm`, and `cost_` in every unit.
        problems: how many they are.
    """

    thresholds: list[Any]
    measured: dict[str, Estimate]
    problems: int

    def described(self) -> dict[str, Any]:
        """As a summary has it; the interval of an accuracy stays within what a share can be, that of a cost above 0."""
        share = self.measured["accuracy"]
        known = {
            key: described(one.value, one.cost_interval()) if key.startswith("cost_") else one.described()
            for key, one in self.measured.items()
        }
        known["accuracy"] = described(share.value, share.share_interval(self.problems))
        return {"thresholds": self.thresholds, **known}


def operating_points(
    baselines: Baselines,
    answers: Answered,
    validated: Sequence[Tried],
    thresholds: Sequence[Sequence[float]] | None,
    unit: str,
    weights: FloatArray,
) -> dict[str, OperatingPoint]:
    """For each share of the LLM's accuracy: the threshold that validation chooses, and what it does on the problems.

    For each training seed it is the cheapest that reaches the share on validation problems; where that is one of the
    models alone, it is named.

    Args:
        baselines: of the problems, with those of the validation problems.
        answers: of a policy to the problems.
        validated: the same to the validation problems, at the thresholds that were tried.
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
        points[f"{level:.2f}"] = OperatingPoint(chosen, estimates(rows), weights.shape[1])
    return points
