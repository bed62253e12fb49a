"""Means with 95 % intervals, by Student's t distribution, and what they show."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

LEVEL = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean, and the interval around it where there is more than one value."""

    mean: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def around(cls, mean: float, standard_error: float, degrees_of_freedom: float) -> Estimate:
        half = float(stdtrit(degrees_of_freedom, (1 + LEVEL) / 2)) * standard_error
        return cls(mean, mean - half, mean + half)

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.4g} (no interval)"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_of(values: Sequence[float]) -> Estimate:
    """Of independent values, one a seed for example."""
    mean = statistics.fmean(values)
    if len(values) == 1:
        return Estimate(mean)
    return Estimate.around(mean, statistics.stdev(values) / math.sqrt(len(values)), len(values) - 1)


def welch(values: Sequence[float], baseline: Sequence[float]) -> Estimate:
    """Mean of values less that of the baseline's, independent of them and of another variance (Welch, 1947)."""
    mean = statistics.fmean(values) - statistics.fmean(baseline)
    if min(len(values), len(baseline)) == 1:
        return Estimate(mean)
    first, second = (statistics.variance(group) / len(group) for group in (values, baseline))
    if first + second == 0:
        return Estimate(mean, mean, mean)
    freedom = (first + second) ** 2 / (first**2 / (len(values) - 1) + second**2 / (len(baseline) - 1))
    return Estimate.around(mean, math.sqrt(first + second), freedom)


def verdict(difference: Estimate) -> str:
    """What a difference to the baseline shows."""
    if difference.low is None or difference.high is None:
        return "one seed: no interval"
    if difference.low <= 0 <= difference.high:
        return "no difference shown"
    return "higher" if difference.low > 0 else "lower"
