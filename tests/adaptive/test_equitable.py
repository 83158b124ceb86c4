"""Equitable sampling: allocations against closed forms, scipy and every allocation; fits against
scipy and known curves; the collector's books, strategies and stops; the beds; errors."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import least_squares, minimize
from sklearn.linear_model import LinearRegression

from diffkit.adaptive.equitable import (
    BED,
    STRATEGIES,
    AdaptiveCollector,
    Ancestry,
    PowerLaw,
    allocate,
    equitable_bed,
    fit_curve,
    greedy_allocate,
    utility,
)

THREE = list(BED)
COSTS = [1, 1, 2]


def rng(seed=0):
    return np.random.default_rng(seed)


def curves_of(r, groups=3):
    draw = lambda: PowerLaw(r.uniform(0, 0.3), r.uniform(0.5, 4), r.uniform(0.2, 1.4))
    return [draw() for _ in range(groups)]


def losses(curves, n):
    return np.stack([np.asarray(f(np.asarray(n)[..., g])) for g, f in enumerate(curves)], -1)


def best_of_all(curves, budget, costs, util, start, block=1):  # the best utility, by trial
    costs, start = np.asarray(costs, float), np.asarray(start)
    most = [int((budget - costs @ start) / (c * block) + 1e-9) for c in costs]
    n = start + block * np.array(list(itertools.product(*(range(m + 1) for m in most))))
    return util(losses(curves, n[n @ costs <= budget + 1e-9])).max()


# --- curves and utilities


def test_a_power_law_its_slope_and_its_inverse():
    f, n = PowerLaw(0.2, 3.0, 0.6), np.array([5.0, 70, 900])
    np.testing.assert_allclose(f(n), 0.2 + 3 / n**0.6)
    by_difference = (f(n * (1 + 1e-6)) - f(n * (1 - 1e-6))) / (2e-6 * n)
    np.testing.assert_allclose(f.slope(n), by_difference, rtol=1e-6)
    np.testing.assert_allclose(f.inverse(f(n)), n)
    assert np.isinf(f.inverse([0.2, 0.1])).all() and np.isinf(f(0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # infinite is an answer, not an accident
        assert np.isinf(f.inverse(0.2)) and np.isinf(f(0))
    flat = PowerLaw(0.5, 0.0, 1.0)
    assert flat(0) == flat(9) == 0.5 and flat.slope(4) == 0


def test_utilities_from_the_mean_to_the_worst():
    L, w = np.array([[0.2, 0.5, 0.4], [1.0, 0.1, 0.3]]), np.array([1.0, 2, 5])
    np.testing.assert_allclose(utility("mean", w)(L), -(L @ w) / 8)
    np.testing.assert_allclose(utility(0.0, w)(L), utility("mean", w)(L))
    np.testing.assert_allclose(utility(1.5, w)(L), -(((L**2.5 @ w) / 8) ** (1 / 2.5)))
    np.testing.assert_allclose(utility("worst")(L), -L.max(1))
    # (1/8)^(1/201) = 0.9897, and the weight of the worst is at least 1/8
    np.testing.assert_allclose(utility(200.0, w)(L), -L.max(1), rtol=0.0104)
    assert utility("worst", [1, 0, 1])(L[0]) == -0.4
    assert np.isinf(utility("mean")([np.inf, 1.0])) and utility(3)([0.0, 0.0]) == 0


def test_the_gain_in_logarithms():
    for p in (1.0, 2.5):
        got = utility(p - 1).log_gain(0.7, 0.3, 0.4)
        assert got == pytest.approx(math.log(0.4 * (0.7**p - 0.3**p)))
    u = utility(500.0)  # 0.01^501 is not a number that floats have
    assert u.log_gain(0.011, 0.010, 1.0) > u.log_gain(0.010, 0.001, 1.0) > -math.inf
    assert u.log_gain(0.3, 0.3, 1.0) == u.log_gain(0.3, 0.4, 1.0) == -math.inf
    assert utility().log_gain(0.3, 0.1, 0.0) == -math.inf


# --- the exact allocation


def test_square_root_rule():
    r = rng(1)
    b, c, w = r.uniform(1, 9, 6), r.uniform(1, 4, 6), r.uniform(1, 4, 6)
    rule = np.sqrt(w * b / c)
    got = allocate([PowerLaw(r.uniform(), v, 1.0) for v in b], 700, c, utility("mean", w))
    np.testing.assert_allclose(got, 700 * rule / (c @ rule), rtol=1e-8)


@pytest.mark.parametrize("eps", [0.0, 1.0, 6.5])
def test_conditions_of_the_optimum_and_scipy(eps):
    r = rng(2)
    curves, c, w = curves_of(r, 4), r.uniform(1, 3, 4), r.uniform(1, 4, 4)
    start = np.array([10.0, 10, 10, 1500])  # the last one holds too much already
    u = utility(eps, w)
    n = allocate(curves, 8000, c, u, start)
    free = n > start
    assert n @ c == pytest.approx(8000, rel=1e-9) and free.sum() >= 2
    slope = np.array([f.slope(m) for f, m in zip(curves, n)])
    price = w * losses(curves, n) ** eps * -slope / c
    np.testing.assert_allclose(price[free], price[free][0], rtol=1e-6)
    assert (price[~free] < price[free][0]).all()
    value = lambda z: -float(u(losses(curves, np.exp(z))))
    spend = dict(type="eq", fun=lambda z: np.exp(z) @ c / 8000 - 1)
    low = [(math.log(s), None) for s in start]
    by_scipy = minimize(value, np.log(n + 50), bounds=low, constraints=spend, tol=1e-12)
    best = value(np.log(n))
    # SLSQP meets the constraint to 1e-12 or so, and stops at 1e-12 of the value
    assert by_scipy.success and best - 1e-6 < by_scipy.fun + 1e-9 and best <= by_scipy.fun + 1e-9
    assert by_scipy.fun - best < 1e-6


def test_the_worst_group_is_levelled():
    n = allocate(THREE, 3000, COSTS, "worst", start=1)
    assert np.ptp(losses(THREE, n)) < 1e-6 and n @ COSTS == pytest.approx(3000)
    floor = [PowerLaw(0.9, 0.5, 0.5), *THREE]  # a floor above all others
    L = losses(floor, allocate(floor, 3000, 1.0, "worst"))
    assert np.ptp(L) < 1e-6 and L[0] > 0.9


def test_who_gets_nothing_and_who_keeps_all():
    held = allocate([*THREE, THREE[2]], 3000, utility=utility("mean", [1, 1, 1, 0]), start=50)
    assert held[3] == 50
    np.testing.assert_allclose(held[:3], allocate(THREE, 2950, start=50), rtol=1e-9)
    flat = [PowerLaw(0.3, 0.0, 1.0)] * 2
    assert allocate(flat, 100, start=5).tolist() == [5, 5]
    assert greedy_allocate(flat, 100, start=5).tolist() == [5, 5]


# --- greedy


@pytest.mark.parametrize("kind,block", [(0.0, 1), (4.0, 1), ("worst", 1), (0.0, 3)])
def test_greedy_is_exact_at_equal_costs(kind, block):
    r = rng(3)
    for _ in range(50):
        curves, u = curves_of(r), utility(kind, r.uniform(0.2, 1, 3))
        n = greedy_allocate(curves, 3 + 14 * block, 1.0, u, 1, block)
        best = best_of_all(curves, 3 + 14 * block, [1] * 3, u, [1] * 3, block)
        assert float(u(losses(curves, n))) == pytest.approx(best, abs=1e-12)
        assert n.sum() == 3 + 14 * block


def test_greedy_is_exact_for_the_worst_group_at_any_cost_and_any_falling_curve():
    r = rng(4)
    for _ in range(50):
        falls = [np.sort(r.uniform(0.1, 3, 40))[::-1] for _ in range(3)]  # not convex
        curves = [lambda n, v=v: v[np.asarray(n, int)] for v in falls]
        c = r.uniform(1, 4, 3)
        n = greedy_allocate(curves, 24, c, "worst")
        best = best_of_all(curves, 24, c, utility("worst"), [0] * 3)
        assert float(utility("worst")(losses(curves, n))) == best


def test_greedy_with_costs_is_within_one_block():
    r, inexact = rng(5), 0
    for _ in range(60):
        curves, c, u = curves_of(r), r.uniform(1, 4, 3), utility("mean", r.uniform(0.2, 1, 3))
        n = greedy_allocate(curves, 24, c, u, 1)
        mine, best = float(u(losses(curves, n))), best_of_all(curves, 24, c, u, [1] * 3)
        one_more = max(float(u(losses(curves, n + e))) for e in np.eye(3, dtype=int))
        assert mine <= best + 1e-12 and best <= one_more + 1e-12
        assert n @ c <= 24 and 24 - n @ c < c.min()
        inexact += best - mine > 1e-9
    assert inexact > 5  # else the bound says nothing


def test_greedy_with_costs_near_the_continuous_optimum():
    n = greedy_allocate(THREE, 3000, COSTS)
    assert n.tolist() == [163, 681, 1078]
    u = utility()
    gap = float(u(losses(THREE, allocate(THREE, 3000, COSTS))) - u(losses(THREE, n)))
    assert 0 <= gap < 1e-6


def test_joint_curves():
    apart = lambda n: losses(THREE, n)
    for kind in ("mean", "worst", 2.0):
        a = greedy_allocate(apart, 70, COSTS, kind, [1, 1, 1], 2)
        assert a.tolist() == greedy_allocate(THREE, 70, COSTS, kind, 1, 2).tolist()
    mix = np.array([[1, 0, 0.45], [0, 1, 0.45], [0, 0, 1]])
    n = greedy_allocate(lambda n: 1 / (0.1 + n @ mix.T), 2, 1.0, utility(0, [1, 1, 0]), [0, 0, 0])
    assert n.tolist() == [0, 0, 2]  # two of the helper, although one each is better


# --- fits


def test_noise_free_curves_are_recovered():
    for f in (*THREE, PowerLaw(2.0, 30.0, 1.2), PowerLaw(0.4, 0.3, 0.15)):
        n = [20, 40, 90, 200, 900]
        got = fit_curve(n, f(n))
        back = got.curve
        np.testing.assert_allclose([back.a, back.b, back.rho], [f.a, f.b, f.rho], rtol=1e-4)
        assert got.noise < 1e-6


def test_the_fit_is_the_least_squares_of_scipy():
    r = rng(6)
    for _ in range(20):
        f = curves_of(r)[0]
        n = np.repeat([60.0, 120, 200, 400], r.integers(2, 8))
        y = f(n) * np.exp(r.choice([0.02, 0.1]) * r.standard_normal(len(n)))
        w = r.uniform(0.5, 2, len(n))
        w /= w.mean()
        c = fit_curve(n, y, weights=w).curve

        def model(t, n=n, y=y, w=w):
            return np.sqrt(w) * (np.log(np.exp(t[0]) + np.exp(t[1]) * n ** -t[2]) - np.log(y))

        box = [np.log(y.min()) - 12, -8, 0.1], [np.log(y.max()), 25, 1.5]
        rivals = [least_squares(model, [-3, 0, s], bounds=box).cost for s in (0.2, 0.6, 1.2)]
        # scipy stops where a step gains 1e-8 of the cost
        assert c.b == 0 or (w * np.log(c(n) / y) ** 2).sum() <= 2 * min(rivals) * (1 + 1e-5)


def test_the_spread_is_that_of_repeated_data():
    r, n, at = rng(7), np.repeat([60.0, 120, 240, 480], 8), np.array([60.0, 300, 900])
    truth = THREE[2](at)
    fits = [fit_curve(n, THREE[2](n) * np.exp(0.03 * r.standard_normal(32))) for _ in range(80)]
    off = np.array([np.log(f(at) / truth) for f in fits])
    # 80 fits know a standard deviation to 8 %; the rest is the curvature of the model
    np.testing.assert_allclose(off.std(0) / np.mean([f.sd(at) for f in fits], 0), 1, atol=0.3)
    np.testing.assert_allclose(np.mean([f.noise for f in fits]), 0.03, rtol=0.06)
    bands = np.array([f.band(at) for f in fits])
    inside = ((bands[:, 0] < truth) & (truth < bands[:, 1])).mean()
    assert 0.89 < inside < 0.99
    # the bootstrap and the random draws of one fit have the width that (9) says
    f = fits[0]
    for some in (f.bootstrap(r, 80), [f.draw(r) for _ in range(80)]):
        width = np.log([g(at) for g in some]).std(0)
        np.testing.assert_allclose(width[:2] / f.sd(at)[:2], 1, atol=0.35)


def test_bands_shrink_with_the_square_root_of_the_points():
    sides = lambda n: np.where(np.arange(len(n)) % 2, 0.05, -0.05)
    few, lot = (np.repeat([50.0, 100, 200, 400], k) for k in (4, 64))
    a, b = (fit_curve(n, THREE[1](n) * np.exp(sides(n))).sd(150.0) for n in (few, lot))
    # 16 times the points; the noise is divided by N - 3
    assert a / b == pytest.approx(4 * math.sqrt(16 / 13 * 253 / 256), rel=0.05)


@pytest.mark.parametrize("n", [[60, 120, 240, 480, 960], [400, 430, 460, 490, 520]])
def test_the_covariance_is_that_of_gauss_newton_with_wide_priors(n):
    n, w = np.repeat(np.array(n, float), 2), np.tile([0.5, 1.5], 5)
    y = THREE[2](n) * np.exp(0.02 * rng(11).standard_normal(10))
    got = fit_curve(n, y, weights=w)
    f, fall = got.curve, got.curve.b * n**-got.curve.rho
    assert got.noise**2 == pytest.approx((w * np.log(f(n) / y) ** 2).sum() / 7, rel=1e-6)
    J = np.stack([f.a + 0 * n, fall, -fall * np.log(n)], 1) / f(n)[:, None]
    # standard deviations 3, 10 and 1 of log a, of log b at the middle size, and of rho
    middle = np.array([[1, 0, 0], [0, 1, -np.log(n).mean()], [0, 0, 1]])
    prior = middle.T @ np.diag([1 / 9, 1 / 100, 1]) @ middle
    want = np.linalg.inv((J.T * w) @ J / got.noise**2 + prior)
    np.testing.assert_allclose(got.cov, want, rtol=1e-5)


def test_a_prior_weighs_against_the_noise_of_the_data():
    # steeper than allowed: a = 0 and rho = 0.8, and only b is left to find
    n = np.array([50.0, 100, 150, 200, 300, 400])
    y, x = 3 / n, n**-0.8
    b = (x / y).sum() / ((x / y) ** 2).sum()  # the least relative squares
    noise2 = ((b * x / y - 1) ** 2).sum() / (len(n) - 3)
    for mean, sd in ((0.5, 0.1), (0.5, 1.0), (1.0, 0.1)):
        f = fit_curve(n, y, prior={"log_b": (mean, sd)}, bounds=(0.1, 0.8)).curve
        want = (np.log(y / x).sum() / noise2 + mean / sd**2) / (len(n) / noise2 + 1 / sd**2)
        assert f.rho == pytest.approx(0.8, abs=1e-6) and f.a < 1e-4 * y.min()
        assert math.log(f.b) == pytest.approx(want, abs=1e-4)  # a is not quite 0


def test_the_bootstrap_draws_residuals_without_mean_as_wide_as_the_noise():
    n = np.repeat([60.0, 120, 240], 2)
    got, seen = fit_curve(n, THREE[1](n) * np.exp([0.1, -0.1, 0.05, 0.02, -0.1, 0.0])), []

    class Keep:
        def choice(self, values, count):
            seen.append(values)
            return values

    assert len(got.bootstrap(Keep(), 2)) == 2 == len(seen) and len(seen[0]) == 6
    rest = np.log(got.loss / got(n))
    # three of six degrees of freedom are left
    np.testing.assert_allclose(seen[0], math.sqrt(2) * (rest - rest.mean()), rtol=1e-9)


def test_prior_and_flat_curves():
    n = np.array([50.0, 100, 200])
    tight = fit_curve(n[:2], THREE[1](n[:2]), prior={"rho": (0.5, 1e-4)}).curve
    assert tight.rho == pytest.approx(0.5, abs=1e-3)
    with pytest.warns(UserWarning, match="do not fall"):
        flat = fit_curve(n, [1.0, 1.1, 1.2])
    assert flat.curve.b == 0 and flat(9) == pytest.approx((1.0 * 1.1 * 1.2) ** (1 / 3))
    assert np.isfinite(flat.band(100.0)).all()
    # residuals drawn anew may fall: a flat curve is not flat for ever
    assert any(f.b > 0 for f in flat.bootstrap(rng(), 20))


# --- the collector

FALLS = dict(a=PowerLaw(0.1, 2, 0.5), b=PowerLaw(0.1, 6, 0.4))


def true_loss(data):
    return {g: float(f(len(data[g]))) for g, f in FALLS.items()}


def toy(**options):
    given = dict(evaluate=true_loss, groups=["a", "b"], budget=2000, pilot=60, block=40)
    return AdaptiveCollector(**(dict(draw=lambda g, k: np.zeros(k)) | given | options))


def ran(**options):
    c = toy(**options)
    c.run(progress=False)
    return c


@pytest.mark.parametrize("kind", ["mean", 2.0, "worst"])
def test_with_exact_losses_it_is_greedy_on_the_true_curves(kind):
    c = ran(utility=kind, costs=[1, 2])
    want = greedy_allocate(list(FALLS.values()), 2000, [1, 2], kind, 60, 40)
    assert np.abs(c.n - want).max() <= 40  # the last block may be a part
    assert c.spent == c.n @ [1, 2] == c.history.spent[-1] and 1998 < c.spent <= 2000
    f = c.fits["b"].curve
    np.testing.assert_allclose([f.a, f.b, f.rho], [0.1, 6, 0.4], rtol=1e-3)


def test_heuristics():
    assert np.abs(ran(strategy="equal", costs=[1, 4]).n - 400).max() <= 40
    n = ran(strategy="spend", costs=[1, 4]).n
    assert abs(n[0] - 4 * n[1]) <= 160 and n @ [1, 4] > 1995
    n = ran(strategy="proportional", shares=[3, 1]).n
    assert np.abs(n - [1500, 500]).max() <= 40
    c = ran(strategy="worst")
    assert c.n[0] == 60 and c.fits is None  # b is never better than a
    a, b, again = (ran(strategy="random", seed=s).n for s in (1, 2, 1))
    assert not np.array_equal(a, b) and np.array_equal(a, again)


def test_stopped_and_continued_is_the_same():
    a, b, picks = toy(thompson=True), toy(thompson=True), []
    while (g := a.step()) is not None:
        picks.append(g)
        assert a.history.picks[-1] == g and len(a.data[g]) == a.n[a.groups.index(g)]
    b.step()
    b.step()
    book = b.run(progress=False)
    assert np.array_equal(a.history.n, book.n) and book.picks == [None, *picks]
    assert np.array_equal(book.spent, np.sum(book.n, 1))
    assert a.step() is None and np.isfinite(book.losses[-1]).all()


def test_what_was_bought_is_kept_when_an_evaluation_fails():
    broken = []

    def evaluate(data):
        if len(data["a"]) + len(data["b"]) == 160 and not broken:
            broken.append(1)
            raise KeyboardInterrupt
        return true_loss(data)

    c = toy(evaluate=evaluate)
    with pytest.raises(KeyboardInterrupt):
        c.run(progress=False)
    assert c.n.sum() == 160 and c.spent == 160
    c.run(progress=False)
    assert c.spent == 2000 and np.array_equal(c.n, ran().n)


def test_refit_reserve_and_fractions():
    calls = []

    def evaluate(data):
        calls.append(sum(map(len, data.values())))
        return true_loss(data)

    c = ran(evaluate=evaluate, budget=600, reserve=200, fractions=(0.5, 0.75), refit=3)
    assert c.spent == 600 and c.n.sum() == 400
    assert calls[:4] == [120, 60, 90, 240] and len(calls) % 3 == 0
    assert {30.0, 45.0, 60.0} <= set(c.fits["a"].n)
    late = ran(budget=600, refit=10**6).history.curves  # one plan, from the pilot
    assert [f is not None for f in late] == [True] + [False] * (len(late) - 2) + [True]


def test_whole_curves_and_any_family():
    asked = []

    class Family:
        def __init__(self, n, y):
            asked.append((list(n), list(y)))

        def __call__(self, n):
            return 1 / n

    whole = lambda d: {g: ([10, 20, 30], [0.9, 0.8, 0.7]) for g in d}
    c = ran(evaluate=whole, fit=Family, budget=200, utility=utility("mean", [1, 0]))
    assert c.n.tolist() == [140, 60] and asked[0] == ([10, 20, 30], [0.9, 0.8, 0.7])
    assert c.history.losses[0].tolist() == [0.7, 0.7]


def test_nobody_gains_is_equal_split():
    flat = lambda d: {g: 0.5 for g in d}
    c = ran(evaluate=flat, fit=lambda n, y: PowerLaw(0.5, 0.0, 1.0), budget=400)
    assert abs(c.n[0] - c.n[1]) <= 40 and c.n.sum() == 400


def test_with_a_model_of_sklearn_the_noisy_group_gets_more():
    r, weight, noise = rng(8), rng(9).standard_normal(6), dict(left=0.3, right=2.0)

    def draw(g, k):
        x = r.standard_normal((k, 6))
        return x, x @ weight + noise[g] * r.standard_normal(k)

    tests = {g: draw(g, 2000) for g in noise}

    def evaluate(data):
        fits = {g: LinearRegression().fit(*xy) for g, xy in data.items()}
        return {g: np.square(m.predict(tests[g][0]) - tests[g][1]).mean() for g, m in fits.items()}

    c = AdaptiveCollector(draw, evaluate, list(noise), 700, pilot=60, block=50)
    c.run(progress=False)
    assert c.n[1] > 2 * c.n[0] and c.data["left"][0].shape == (c.n[0], 6)


def test_with_a_torch_network_and_dicts_of_tensors():
    g = torch.Generator().manual_seed(0)

    def draw(group, k):
        x = torch.randn(k, 3, generator=g)
        noise = torch.randn(k, generator=g)
        return {"x": x, "y": x.sum(1) + (0.2 if group else 1.5) * noise}

    held = {k: draw(k, 500) for k in (0, 1)}

    def evaluate(data):
        out = {}
        for k, v in data.items():
            torch.manual_seed(0)
            net = torch.nn.Linear(3, 1)
            opt = torch.optim.Adam(net.parameters(), 0.1)
            for _ in range(40):
                opt.zero_grad()
                (net(v["x"])[:, 0] - v["y"]).square().mean().backward()
                opt.step()
            with torch.no_grad():
                out[k] = (net(held[k]["x"])[:, 0] - held[k]["y"]).square().mean()  # a tensor
        return out

    c = AdaptiveCollector(draw, evaluate, [0, 1], 160, strategy="worst", pilot=40, block=40)
    c.run(progress=False)
    assert c.n.tolist() == [120, 40]  # group 0 is the noisy one
    assert len(c.data[0]["x"]) == 120 == len(c.data[0]["y"])


@pytest.mark.parametrize("supply", [60, 75, 180, 205])  # the pilot, in a block, after a block
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_group_that_has_no_more_is_left_alone(strategy, supply):
    left, asked = dict(a=10**6, b=supply), []

    def draw(g, k):
        asked.append(g)
        got = min(k, left[g])
        left[g] -= got
        return (np.full(got, left[g]), [g] * got)

    measure = lambda d: {g: float(f(len(d[g][0]))) for g, f in FALLS.items()}
    how = dict(draw=draw, evaluate=measure, strategy=strategy, shares=dict(b=1, a=1))
    c = ran(**how, costs=dict(b=1, a=2), budget=1001, seed=3)
    assert len(c.data["b"][1]) == len(c.data["b"][0]) == c.n[1] == supply
    assert c.exhausted == {"b"} and c.spent == c.n @ [2, 1] == 1001 - (1001 - supply) % 2
    assert left["b"] == 0 and 10**6 - left["a"] == c.n[0]
    short = max(i for i, g in enumerate(asked) if g == "b")
    assert "b" not in asked[short + 1 :] and None in c.history.picks
    assert all(np.diff(c.history.spent) > 0) and c.step() is None


def test_all_supply_can_end_before_the_budget():
    left = dict(a=100, b=90)

    def draw(g, k):
        got = min(k, left[g])
        left[g] -= got
        return [0] * got

    c = ran(draw=draw)
    assert c.n.tolist() == [100, 90] and c.spent == 190 and c.exhausted == {"a", "b"}


def test_names_order_costs_and_shares():
    by_name = ran(costs=dict(b=4, a=1), strategy="spend")
    assert np.array_equal(by_name.n, ran(costs=[1, 4], strategy="spend").n)
    assert by_name.costs.tolist() == [1, 4]


class Table:
    def to_numpy(self):
        return np.zeros(60)


def test_lists_and_parts_of_them():
    seen = []
    keep = lambda d: (seen.append(d), true_loss(d))[1]
    c = ran(draw=lambda g, k: [g] * k, evaluate=keep, budget=300)
    assert c.data["a"] == ["a"] * c.n[0] and isinstance(seen[1]["b"], list)
    assert len(seen[1]["b"]) == 24 and set(seen[1]["b"]) == {"b"}


# --- beds


def test_balding_nichols_has_its_moments():
    many = Ancestry(20000, 20000, fst=(0.1, 0.3), seed=1)
    p = Ancestry(20000, 20000, fst=(1e-7,), seed=1).frequency[0]  # the same start, no drift
    for F, q in zip((0.1, 0.3), many.frequency):
        z = (q - p) / np.sqrt(p * (1 - p))
        assert abs(z.mean()) < 4 * math.sqrt(F / 20000)
        assert z.var() == pytest.approx(F, rel=0.06)  # four standard errors of a variance
    room = 4 * (1 - 0.8**2) / math.sqrt(20000)
    assert np.corrcoef(many.effect)[0, 1] == pytest.approx(0.8, abs=room)
    # the genetic variance is h2 before the drift, and (1 - F) h2 after it
    genetic = (many.variance * many.effect**2).sum(1)
    np.testing.assert_allclose(genetic, [0.45, 0.35], rtol=0.06)
    pop = Ancestry(30, 10, seed=2)
    x, y = pop.draw(1, 40000, rng(1))
    np.testing.assert_allclose(x.var(0), pop.variance[1], atol=0.02)
    assert (y - x @ pop.effect[1]).var() == pytest.approx(0.5, rel=0.03)
    assert (pop.effect[:, 10:] == 0).all() and pop.risk(1, pop.effect[1]) == 0


@pytest.mark.parametrize("n,penalty", [(60, 2.0), (300, 0.5)])
def test_the_expected_risk_is_that_of_trained_scores(n, penalty):
    pop, r, found = Ancestry(40, 24, seed=3), rng(10), []
    for _ in range(200):
        x, y = pop.draw(2, n, r)
        found.append(pop.risk(2, np.linalg.solve(x.T @ x + penalty * np.eye(40), x.T @ y)))
    room = 3 * np.std(found) / 200**0.5 + 2 / n * np.mean(found)  # (11) leaves out 1 / n
    assert abs(np.mean(found) - pop.expected_risk(2, n, penalty)) < room


def test_bed_knows_its_oracle():
    got = equitable_bed(3, noise=0.0, budget=1500)
    assert set(got) == {*STRATEGIES, "oracle"}
    assert got["adaptive"] == pytest.approx(got["oracle"], rel=1e-3)
    assert all(v <= got["oracle"] + 1e-12 for v in got.values())
    assert equitable_bed(4, ["adaptive"], budget=900) == equitable_bed(4, ["adaptive"], budget=900)


# --- errors


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: PowerLaw(-1.0, 1, 1), "a=-1.0"),
        (lambda: PowerLaw(0.1, "2", 1), "b='2'"),
        (lambda: PowerLaw(0.1, 1, 0), "rho=0"),
        (lambda: PowerLaw(0.1, True, 1), "b=True"),
        (lambda: utility("median"), "utility='median'"),
        (lambda: utility(-0.1), "utility=-0.1"),
        (lambda: utility(math.nan), "utility=nan"),
        (lambda: utility(None), "utility=None"),
        (lambda: utility("mean", [1, -1]), r"weights\[1\]=-1"),
        (lambda: utility("mean", [0, 0])([1, 1]), "weights"),
        (lambda: utility("mean")([-1.0, 1.0]), "at least 0"),
        (lambda: allocate(THREE, 100, utility=utility("mean", [1, 1])), "weights has 2 entries"),
        (lambda: allocate(THREE, 100, [1, 1]), "costs has 2 entries"),
        (lambda: allocate(THREE, 100, [1, 0, 1]), r"costs\[1\]=0"),
        (lambda: allocate(THREE, 100, "1"), "costs='1'"),
        (lambda: allocate(THREE, 100, start=50), "budget=100"),
        (lambda: allocate(THREE, None), "budget=None"),
        (lambda: allocate([], 100), "curves"),
        (lambda: allocate([lambda n: 1 / n], 100), "PowerLaw"),
        (lambda: allocate(THREE, 100, cost=1), "unexpected keyword"),
        (lambda: greedy_allocate(THREE, 100, block=0), "block=0"),
        (lambda: greedy_allocate(THREE, 100, block=True), "block=True"),
        (lambda: greedy_allocate(THREE, 100, start=0.5), "start=0.5"),
        (lambda: greedy_allocate(lambda n: n, 100), "start=0"),
        (lambda: fit_curve([1, 2, 2], [3, 2, 1]), "2 different sizes"),
        (lambda: fit_curve([1, 2, 3], [3, 2]), "loss has 2 entries"),
        (lambda: fit_curve([1, 2, 3], [3, 2, -1]), "above 0"),
        (lambda: fit_curve([1, 2, 3], [3, 2, math.nan]), "finite"),
        (lambda: fit_curve([1, 2, 3], [3, 2, 1], prior={"c": (0, 1)}), "'c'"),
        (lambda: fit_curve([1, 2, 3], [3, 2, 1], prior={"rho": (0, 0)}), "prior"),
        (lambda: fit_curve([1, 2, 3], [3, 2, 1], bounds=(1.0, 0.5)), "bounds"),
        (lambda: fit_curve([1, 2, 3, 4], [3, 2, 1, 0.9]).band(5, level=1.5), "level=1.5"),
        (lambda: toy(budget=100), "budget=100"),
        (lambda: toy(budget=200, reserve=100), "pilot and reserve"),
        (lambda: toy(costs=0), "costs=0"),
        (lambda: toy(block="9"), "block='9'"),
        (lambda: toy(pilot=0), "pilot=0"),
        (lambda: toy(groups="ab"), "groups='ab'"),
        (lambda: toy(groups=["a", "a"]), "different names"),
        (lambda: toy(strategy="best"), "strategy='best'"),
        (lambda: toy(strategy="proportional"), "shares=None"),
        (lambda: toy(fractions=(0.5, 1.2)), "fractions=1.2"),
        (lambda: toy(draw=None), "draw=None"),
        (lambda: toy(rounds=3), "unexpected keyword"),
        (lambda: toy(evaluate=lambda d: {"a": 1.0}).step(), "must have 'b'"),
        (lambda: toy(evaluate=lambda d: [1.0, 2.0]).step(), "evaluate returned"),
        (lambda: toy(evaluate=lambda d: dict(a=1.0, b=math.nan)).step(), "for 'b'"),
        (lambda: toy(evaluate=lambda d: dict(a=0.0, b=1.0)).step(), "for 'a'"),
        (lambda: toy(draw=lambda g, k: [0] * (k + 1)).step(), "returned 61 samples"),
        (lambda: toy(draw=lambda g, k: []).step(), "returned 0 samples: must be 1 to 60"),
        (lambda: toy(draw=lambda g, k: Table()).step(), "returned Table.*give its .to_numpy"),
        (lambda: toy(groups={"a", "b"}), "must be a list of different names"),
        (lambda: toy(costs={"a": 1, "c": 2}), r"costs has \['a', 'c'\]: must be the groups"),
        (lambda: toy(costs={"a": 1, "b": 0}), r"costs\[1\]=0"),
        (lambda: toy(pilot=2), r"pilot=2.*sizes \[1, 2\], must be at least 3"),
        (lambda: toy(fractions=(0.5,)), r"fractions=\(0.5,\).*sizes \[30, 60\]"),
        (lambda: allocate([fit_curve([1, 2, 4, 8], [4, 3, 2.5, 2])], 9), r"give its \.curve"),
        (lambda: toy(draw=lambda g, k: "x" * k).step(), "returned str"),
        (lambda: toy(draw=lambda g, k: ([0] * k, [0])).step(), "parts of"),
        (lambda: Ancestry(causal=300), "causal=300"),
        (lambda: Ancestry(fst=(0.1, 1.0)), "fst"),
        (lambda: Ancestry(h2=1.5), "h2=1.5"),
        (lambda: Ancestry().expected_risk(0, 0, 1.0), "n=0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
