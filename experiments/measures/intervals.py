"""95 % intervals over problems and training seeds, for one policy and for two that are compared.

Problems are resampled, the same ones for all policies: comparisons are paired. There are too few training seeds to
resample (a percentile bootstrap of three covers 75 % where 95 % are said); theirs is a t interval. For one policy both
half-widths are added in quadrature (MOVER, Zou and Donner 2008), those of costs and of their ratios in logarithms; for
two, where that is too wide, both variances are, and the degrees of freedom are Satterthwaite's, as in Welch's test. The
problems' part stays as skewed as it is. What a seed does to some problems and not to others is in the differences
between seeds already, and is taken out of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from envs.arrays import FloatArray
from experiments.measures.metrics import finite

TAIL, NORMAL = 0.025, 1.959964
"""Share of draws beyond each end of an interval, and the quantile of the normal distribution there."""
Interval = tuple[float | None, float | None]


def resampled(examples: int, samples: int, seed: int) -> FloatArray:
    """Weights of examples, (1 + samples, examples): all alike first, then as resampling draws them.

    The same `seed` draws the same examples, so that what is measured with them is paired.
    """
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(examples, np.full(examples, 1 / examples), size=samples) / examples
    return np.concatenate([np.full((1, examples), 1 / examples), drawn])


@dataclass(frozen=True)
class Estimate:
    """A measure of one policy.

    Attributes:
        values: of each training seed, on all examples first and then on resampled ones, (seeds, 1 + samples).
    """

    values: FloatArray

    @property
    def value(self) -> float:
        """Its mean over training seeds, on all examples."""
        return float(self.values[:, 0].mean())

    @property
    def resampled(self) -> FloatArray:
        """The same on resampled examples, (samples,)."""
        return np.asarray(self.values[:, 1:].mean(0))

    @property
    def seed_variance(self) -> float:
        """The variance of the mean that is due to training seeds; 0 where there is one."""
        count = len(self.values)
        return float(self.values[:, 0].var(ddof=1) / count) if count > 1 else 0.0

    @property
    def interaction(self) -> float:
        """The part of `seed_variance` that another set of problems would change, as far as resampling shows it."""
        count = len(self.values)
        if count < 2:
            return 0.0
        apart = self.values[:, 1:] - self.resampled
        return float(apart.var(axis=1).mean() / (count - 1))

    def interval(self) -> Interval:
        """Its 95 % interval; None where it has no value."""
        return _interval(self.value, self.resampled, self)

    def described(self) -> dict[str, Any]:
        """The value and its interval, as summaries hold them."""
        return described(self.value, self.interval())

    def share_interval(self, examples: int) -> Interval:
        """The 95 % interval of a share of examples, within 0 and 1.

        Where all examples are alike, resampling shows no spread; there it is that of Clopper and Pearson (1934).

        Args:
            examples: how many there are.
        """
        low, high = self.interval()
        if low is None or high is None:
            return low, high
        extreme = TAIL ** (1 / examples)
        if np.isclose(self.value, 1):
            low = min(low, extreme)
        elif np.isclose(self.value, 0):
            high = max(high, 1 - extreme)
        return max(low, 0.0), min(high, 1.0)

    def cost_interval(self) -> Interval:
        """The 95 % interval of a cost: symmetric in logarithms as far as seeds go, so that it never reaches 0.

        Where it is 0 on some problems there is no logarithm, and the interval ends at 0.
        """
        if not (self.values > 0).all():
            low, high = self.interval()
            return None if low is None else max(low, 0.0), high
        low, high = _interval(float(np.log(self.value)), np.log(self.resampled), Estimate(self.values / self.value))
        return _exponential(low), _exponential(high)

    def less(self, other: Estimate) -> tuple[float, Interval]:
        """The difference from another policy's, and its 95 % interval."""
        difference = self.value - other.value
        return difference, _interval(difference, self.resampled - other.resampled, self, other)

    def over(self, other: Estimate) -> tuple[float, Interval]:
        """The ratio to another policy's, and its 95 % interval, which is symmetric in logarithms as far as seeds go."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ours, theirs = (Estimate(one.values / one.value) for one in (self, other))
            ratio = self.value / other.value
            logarithm = float(np.log(ratio))
            low, high = _interval(logarithm, np.log(self.resampled / other.resampled), ours, theirs)
        return ratio, (_exponential(low), _exponential(high))


def estimates(seeds: Sequence[Mapping[str, FloatArray]]) -> dict[str, Estimate]:
    """Each measure of a policy, by name, from what each training seed has: arrays (1 + samples,)."""
    return {name: Estimate(np.stack([one[name] for one in seeds])) for name in seeds[0]}


def _interval(value: float, drawn: FloatArray, *estimates: Estimate) -> Interval:
    """Around `value`: what resampling says below and above its own median, and the part of the seeds.

    Args:
        value: of a function of all estimates.
        drawn: the same on resampled examples, (samples,).
        estimates: in the unit of `value`, of policies whose seeds were drawn apart.
    """
    if not np.isfinite(value) or not len(drawn) or not np.isfinite(drawn).all():
        return None, None
    low, middle, high = np.quantile(drawn, (TAIL, 0.5, 1 - TAIL))
    whole, counted = float(drawn.var()), sum(one.interaction for one in estimates)
    problems = max(0.0, whole - counted)
    left = np.sqrt(problems / whole) if whole > 0 else 0.0
    if len(estimates) == 1:
        widened, seeds = 1.0, _quantile(0.0, estimates) * np.sqrt(estimates[0].seed_variance)
    else:
        widened = _quantile(problems, estimates) / NORMAL
        seeds = NORMAL * np.sqrt(sum(one.seed_variance for one in estimates))
    below, above = (widened * np.hypot(left * side, seeds) for side in (middle - low, high - middle))
    return finite(value - below), finite(value + above)


def _exponential(end: float | None) -> float | None:
    """Of an end of an interval in logarithms."""
    return None if end is None else finite(np.exp(end))


def _quantile(problems: float, estimates: Sequence[Estimate]) -> float:
    """The quantile of the t distribution with the degrees of freedom that a sum of variances has (Satterthwaite).

    Args:
        problems: the variance that is due to problems, of which there are many.
        estimates: whose seeds' variances are added, each of few degrees of freedom.
    """
    from scipy.special import stdtrit

    variances = [one.seed_variance for one in estimates]
    few = sum(v**2 / (len(one.values) - 1) for v, one in zip(variances, estimates, strict=True) if v > 0)
    return float(stdtrit((problems + sum(variances)) ** 2 / few, 1 - TAIL)) if few > 0 else NORMAL


def described(value: float, interval: Interval) -> dict[str, Any]:
    """A number with its interval, as summaries hold them."""
    return {"value": finite(value), "interval": interval}
