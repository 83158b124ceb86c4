"""The closed forms of notebook 700, on random settings."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkit.adaptive.introduction import (
    batch_error,
    best_batches,
    expected_best,
    restricted_risk,
    share_of_gain,
    vote_accuracy,
)

few = settings(max_examples=40, deadline=None, derandomize=True)


@few
@given(
    st.integers(1, 12),
    st.floats(0.02, 0.9),
    st.floats(0.1, 9),
    st.floats(0.1, 9),
    st.integers(0, 99),
)
def test_no_other_batches_beat_the_best(steps, lr, noise, start, seed):
    best = batch_error(best_batches(100, steps, lr), lr, start, noise)
    other = np.random.default_rng(seed).dirichlet(np.ones(steps)) * 100 + 1e-6
    # each of the others has 1e-6 samples more
    assert best <= batch_error(other, lr, start, noise) * (1 + 1e-6)
    assert 1 / best <= 1 / start + 100 / noise + 1e-9  # precisions: nobody does better


def test_batches_against_a_simulation():
    rng = np.random.default_rng(0)
    b, x = [2, 5, 9], np.full(200_000, 3.0)  # one coordinate
    for size in b:
        x += 0.4 * (rng.normal(size=x.shape) * math.sqrt(4 / size) - x)
    want = batch_error(b, 0.4, 9.0, 4.0)
    assert abs((x**2).mean() - want) < 4 * (x**2).std() / len(x) ** 0.5  # four standard errors


@few
@given(st.integers(0, 999))
def test_fieller_is_where_student_stops(seed):
    g = np.random.default_rng(seed)
    b = np.zeros(7)
    m, o = -g.normal(1, 0.4, 7), -g.normal(3, 0.4, 7)
    s = share_of_gain(b, m, o)
    for end in s.interval:  # the differences at an end are exactly on the edge of a t-test
        D = -m + end * o
        t = D.mean() / (D.std(ddof=1) / 7**0.5)
        assert abs(abs(t) - 2.4469118511449692) < 1e-6  # the quantile for 6 degrees of freedom
    assert s.interval[0] < s.share < s.interval[1]


def test_share_signs_and_one_number():
    b, m = [3.0, 4.0, 5.0], [2.0, 3.5, 3.0]
    s = share_of_gain(b, m, 1.0)
    assert (s.gain, s.possible, s.share) == pytest.approx((3.5 / 3, 3.0, 3.5 / 9))
    worse = share_of_gain(b, [6.0, 6.1, 6.2], 1.0)
    assert worse.share < 0
    assert math.isnan(share_of_gain(b, m, b).share)  # nothing to win: no share


def test_share_without_a_clear_gain_has_no_bounds():
    everything = (-math.inf, math.inf)
    unclear = share_of_gain([0.0, 0, 0], [-1.0, 0, -1], [-5.0, 4, -2])  # 1 +- 3 to be won
    assert (unclear.share, unclear.interval) == (pytest.approx(2 / 3), everything)
    lost = share_of_gain([0.0, 0, 0], [-1.0, 0, -1], [1.0, 1.1, 0.9])  # the oracle is worse
    assert math.isnan(lost.share) and lost.interval == everything
    assert lost.possible == pytest.approx(-1)
    clear = share_of_gain([0.0, 0, 0], [-1.0, 0, -1], [-1.0, -1.1, -0.9])
    assert all(map(math.isfinite, clear.interval))


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: share_of_gain([1, 2], [1, 2, 3], 0), "must be as many"),
        (lambda: share_of_gain([[1, 2]], [1, 2], 0), "baseline must be finite numbers"),
        (lambda: share_of_gain([1, 2], [1, 2], 0, level=True), "level=True"),
        (lambda: batch_error([1, -1], 0.1, 1, 1), "batches must be positive"),
        (lambda: batch_error([1], True, 1, 1), "lr=True"),
        (lambda: batch_error([1], 0.1, 1, math.nan), "noise=nan"),
        (lambda: best_batches(10, 2.5, 0.1), "steps=2.5"),
        (lambda: restricted_risk(0.0, 1.0, 2, 9), "noise=0.0"),
        (lambda: vote_accuracy([0.5, 0.5], 1), "rows that sum to 1"),
        (lambda: expected_best(2.0), "m=2.0"),
    ],
)
def test_wrong_input_is_named(call, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        call()


def test_votes_against_draws():
    P = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8]])
    g = np.random.default_rng(0)
    y = g.integers(3, size=60_000)
    counts = np.stack([g.multinomial(4, P[c]) for c in range(3) for _ in range(20_000)])
    y = np.repeat(np.arange(3), 20_000)
    right = (counts @ np.log(P).T).argmax(1) == y
    want = vote_accuracy(P, 4)
    assert abs(right.mean() - want) < 4 * math.sqrt(want * (1 - want) / len(y))


def test_risk_of_least_squares_against_draws():
    g, w = np.random.default_rng(1), np.array([1.0, -0.5, 0.7])
    errors = []
    for _ in range(3000):
        X = g.normal(size=(12, 3))
        y = X @ w + 0.5 * g.normal(size=12)
        v = np.zeros(3)
        v[:2] = np.linalg.lstsq(X[:, :2], y, rcond=None)[0]  # the third is missed
        errors.append(((v - w) ** 2).sum())
    want = restricted_risk(0.25, 0.49, 2, 12)
    assert abs(np.mean(errors) - want) < 4 * np.std(errors) / 3000**0.5


@pytest.mark.parametrize("dim", [0, 1, 5])
def test_risk_of_least_squares_needs_two_rows_more_than_unknowns(dim):
    assert restricted_risk(2.0, 1.0, dim, dim + 2) == 1 + 3 * dim  # n - dim - 1 = 1
    for n in (dim, dim + 1):
        with pytest.raises(ValueError, match=rf"n={n}: must be above dim \+ 1 = {dim + 1},"):
            restricted_risk(2.0, 1.0, dim, n)


def test_best_of_many_grows_like_the_square_root_of_a_logarithm():
    got = [expected_best(m) for m in (1, 2, 10, 100, 10_000)]
    assert got == sorted(got)
    # tables of order statistics (Harter 1961): 10 and 100
    assert got[2:4] == pytest.approx([1.53875, 2.50759], abs=1e-5)
    assert got[4] < math.sqrt(2 * math.log(10_000))
