"""Bootstrap against SciPy."""

import numpy as np
import pytest
from scipy import stats

from nemo_mtbi.evaluation.statistics import Bootstrap, Sums

pytestmark = pytest.mark.unit


def test_bootstrap_equals_scipy_and_pairs_utterances():
    rng = np.random.default_rng(1)
    tokens = rng.integers(5, 30, 60)
    agreed = rng.binomial(tokens, 0.7)
    ids = [f"u{i:02d}" for i in range(60)]
    sums = Sums.of({i: (float(a), float(t)) for i, a, t in zip(ids, agreed, tokens, strict=True)})
    assert sums.value == pytest.approx(agreed.sum() / tokens.sum())
    bootstrap = Bootstrap(ids, 4000)
    low, high = bootstrap.interval(sums)
    reference = stats.bootstrap(
        (agreed, tokens),
        lambda a, t, axis: a.sum(axis) / t.sum(axis),
        paired=True,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert (low, high) == pytest.approx((reference.low, reference.high), abs=0.006)
    better = Sums(sums.ids, sums.values + [1, 0])  # better on every utterance
    test = bootstrap.compare(better, sums)
    assert test["difference"] == pytest.approx(60 / tokens.sum()) and test["low"] > 0 and test["p"] <= 1 / 2000
    assert bootstrap.compare(sums, sums)["p"] == 1.0
    assert Bootstrap(ids, 4000).interval(sums) == (low, high)  # the seed decides


@pytest.mark.parametrize("units", [1, 2, 5, 9])
def test_few_units_have_no_interval_and_no_p(units):
    sums = Sums.of({f"s{i}": (80.0 + i, 100.0) for i in range(units)})
    better, bootstrap = Sums(sums.ids, sums.values + [1, 0]), Bootstrap(sums.ids, 200)
    assert np.isnan(bootstrap.interval(sums)).all()
    test = bootstrap.compare(better, sums)
    assert test["difference"] == pytest.approx(0.01) and all(np.isnan(test[k]) for k in ("low", "high", "p"))


def test_the_smallest_p_is_that_of_the_resamples():
    sums = Sums.of({f"s{i}": (80.0 + i, 100.0) for i in range(12)})
    test = Bootstrap(sums.ids, 99).compare(Sums(sums.ids, sums.values + [1, 0]), sums)
    assert test["p"] == pytest.approx(2 / 100)
