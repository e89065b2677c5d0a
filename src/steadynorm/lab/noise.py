"""Is one mean below another, or is that the noise of the seeds?"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median, variance

# A typical cell's variance counts as much as this many seeds more. With three seeds a cell's own variance is too
# rough to test with, and one variance for all would drown steady cells in a noisy neighbour's. Simulated with normal
# noise, 3 seeds and 5 batch sizes between which nothing differs: some size is called worse than the best in 7 % of the
# runs, in 13 % if the smallest size is ten times as noisy as the others (5 seeds: 4 % and 7 %).
PRIOR_DF = 4
ALPHA = 0.05


@dataclass(frozen=True)
class Sample:
    """The results of one cell over its seeds; `var` is the variance to test with, `df` how well it is known."""

    values: tuple[float, ...]
    var: float
    df: float

    @property
    def mean(self) -> float:
        """The mean over the seeds."""
        return fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over the seeds; None of a single one."""
        return math.sqrt(variance(self.values)) if len(self.values) > 1 else None


def samples(cells: Sequence[Sequence[float]]) -> list[Sample]:
    """The cells with moderated variances: s²ᵢ' = (d₀ s₀² + dᵢ s²ᵢ) / (d₀ + dᵢ), dᵢ the number of seeds less one.

    s₀² is the median of the s²ᵢ, divided by what the median of such a variance is in the mean, and d₀ is `PRIOR_DF`.

    Source: Smyth, Linear models and empirical Bayes methods (2004), section 3, moderated t; Wilson & Hilferty (1931)
    for the median of χ².
    """
    own = [(variance(values), len(values) - 1) for values in cells if len(values) > 1]
    if not own:
        return [Sample(tuple(values), math.nan, 0) for values in cells]
    typical = median(var / (1 - 2 / (9 * df)) ** 3 for var, df in own)
    moderated = []
    for values in cells:
        df = len(values) - 1
        var = variance(values) if df else 0.0
        moderated.append(Sample(tuple(values), (PRIOR_DF * typical + df * var) / (PRIOR_DF + df), PRIOR_DF + df))
    return moderated


def is_below(low: Sample, high: Sample, comparisons: int) -> bool:
    """Whether the mean of `low` is below that of `high` by more than noise: Welch's t, one-sided, 5 %.

    Args:
        comparisons: how many such questions are asked together; Bonferroni's share of the 5 % falls to each. Below
            the best of k means: k (k − 1), since each could have come out best by luck.

    Source: Welch (1947), with the variances of `samples`.
    """
    difference = high.mean - low.mean
    return difference > noise(low, high, comparisons) and not math.isclose(low.mean, high.mean, rel_tol=1e-12)


def noise(a: Sample, b: Sample, comparisons: int) -> float:
    """The largest difference of two means that the seeds alone explain, in the unit of the metric; see `is_below`."""
    shares = [a.var / len(a.values), b.var / len(b.values)]
    total = sum(shares)
    if total == 0:
        return 0.0
    df = total**2 / sum(share**2 / sample.df for share, sample in zip(shares, (a, b), strict=True))
    return student_quantile(1 - ALPHA / max(1, comparisons), int(df)) * math.sqrt(total)


def student_quantile(probability: float, df: int) -> float:
    """The t that a Student variable with `df` degrees of freedom stays below with `probability`, at least 0.5."""
    low, high = 0.0, 1.0
    while student_cdf(high, df) < probability:
        low, high = high, 2 * high
    while high - low > 1e-9 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, df) < probability else (low, middle)
    return high


def student_cdf(t: float, df: int) -> float:
    """Probability that a Student variable with a whole number of degrees of freedom is below `t`.

    Source: Abramowitz & Stegun, Handbook of Mathematical Functions, 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(df))
    cos2 = math.cos(angle) ** 2
    term, total = (math.sin(angle) * math.cos(angle), 0.0) if df % 2 else (math.sin(angle), 0.0)
    for k in range(2 + df % 2, df + 1, 2):
        total += term
        term *= cos2 * (k - 1) / k
    inside = 2 / math.pi * (angle + total) if df % 2 else total
    return 0.5 + inside / 2
