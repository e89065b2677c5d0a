import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from steadynorm.lab.noise import PRIOR_DF, is_below, noise, samples, student_cdf, student_quantile


@given(st.floats(-50, 50), st.integers(1, 60))
def test_the_student_distribution_is_scipys(t, df):
    assert student_cdf(t, df) == pytest.approx(stats.t.cdf(t, df), abs=1e-12)


@given(st.floats(0.6, 0.9999), st.integers(1, 60))
def test_its_quantiles_are_scipys(probability, df):
    assert student_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-6)


def test_the_noise_is_welchs_where_the_variances_are_well_known():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 400), rng.normal(0.2, 3, 400)
    low, high = samples([a.tolist(), b.tolist()])
    welch = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    assert noise(low, high, 1) == pytest.approx((welch.high - welch.low) / 2, rel=0.01)


def test_variances_are_drawn_towards_the_typical_one():
    made = samples([[0.0, 0.0, 0.0], [0.0, 1.0, 2.0], [0.0, 2.0, 4.0]])
    typical = 1.0 / (1 - 2 / 18) ** 3
    for sample, own in zip(made, (0.0, 1.0, 4.0), strict=True):
        assert sample.var == pytest.approx((PRIOR_DF * typical + 2 * own) / (PRIOR_DF + 2))


def test_without_spread_every_difference_counts_and_none_is_none():
    low, same, high = samples([[0.5] * 3, [0.5] * 3, [0.5001] * 3])
    assert is_below(low, high, 6)
    assert not is_below(low, same, 6)
    assert not is_below(high, low, 6)


@pytest.mark.parametrize(
    ("seeds", "spreads", "most"), [(3, [1] * 5, 0.10), (5, [1] * 5, 0.08), (3, [10, 3, 1, 1, 1], 0.20)]
)
def test_it_seldom_sees_a_difference_where_there_is_none(seeds, spreads, most):
    rng = np.random.default_rng(0)
    alarms = 0
    for _ in range(300):
        made = samples([rng.normal(0, spread, seeds).tolist() for spread in spreads])
        best = max(made, key=lambda sample: sample.mean)
        alarms += any(is_below(sample, best, len(made) * (len(made) - 1)) for sample in made)
    assert alarms / 300 < most


def test_it_sees_a_difference_of_five_deviations_with_three_seeds():
    rng = np.random.default_rng(1)
    seen = 0
    for _ in range(100):
        low, *rest = samples([rng.normal(mean, 1, 3).tolist() for mean in (-5, 0, 0, 0, 0)])
        seen += is_below(low, max(rest, key=lambda sample: sample.mean), 20)
    assert seen > 90
