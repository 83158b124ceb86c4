"""The accounts of notebook 800 against dp-accounting, opacus, brute force and an attacker."""

import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import logsumexp

from diffkit.privacy import accounting
from diffkit.privacy.accounting import (
    METHODS,
    ORDERS,
    RELATIONS,
    Budget,
    BudgetExceeded,
    dp_to_zcdp,
    dpsgd_eps,
    dpsgd_noise,
    gaussian_delta,
    gaussian_eps,
    gaussian_mechanism,
    gaussian_sigma,
    noisy_max,
    rdp_gaussian,
    rdp_subsampled_gaussian,
    rdp_to_dp,
    zcdp_delta,
    zcdp_to_dp,
)

few = settings(max_examples=40, deadline=None, derandomize=True)
deltas = st.floats(-30, -1).map(math.exp)  # 1e-13 to 0.37
rhos = st.floats(-12, 4).map(math.exp)
# eps, delta; rho tight, naive, exact: from dp-accounting and by brute force, to eight digits
PAIRS = [
    (0.1, 1e-9, 0.00017714, 0.00012035, 0.00019833),
    (1.0, 1e-5, 0.03055660, 0.02081994, 0.03592570),
    (3.0, 1e-6, 0.18506984, 0.14726389, 0.20977483),
    (10.0, 1e-5, 1.78269562, 1.55035523, 2.00089134),
]


@pytest.mark.parametrize("eps, delta, tight, naive, exact", PAIRS)
def test_published_pairs(eps, delta, tight, naive, exact):
    assert abs(dp_to_zcdp(eps, delta) - tight) < 1e-8
    assert abs(0.5 / gaussian_sigma(1, eps=eps, delta=delta) ** 2 - exact) < 1e-8
    root = math.sqrt(math.log(1 / delta))
    assert abs((math.sqrt(root**2 + eps) - root) ** 2 - naive) < 1e-8
    assert naive < dp_to_zcdp(eps, delta) < exact


@few
@given(rhos, deltas)
def test_tight_is_between_exact_and_naive(rho, delta):
    eps = zcdp_to_dp(rho, delta)
    assert gaussian_eps(math.sqrt(2 * rho), delta) <= eps + 1e-12
    assert eps <= rho + 2 * math.sqrt(rho * math.log(1 / delta))
    assert gaussian_delta(math.sqrt(2 * rho), eps) <= zcdp_delta(rho, eps) * (1 + 1e-9)


@few
@given(st.floats(1e-3, 40), deltas)
def test_there_and_back(eps, delta):  # 1e-9: bisections stop at the last bits, delta near 1 less
    rho = dp_to_zcdp(eps, delta)
    assert math.isclose(zcdp_to_dp(rho, delta), eps, rel_tol=1e-9)
    assert math.isclose(zcdp_delta(rho, eps), delta, rel_tol=1e-8)
    mu = 1 / gaussian_sigma(1, eps=eps, delta=delta)
    assert math.isclose(gaussian_delta(mu, eps), delta, rel_tol=1e-8)
    assert math.isclose(gaussian_eps(mu, delta), eps, rel_tol=1e-9)


@few
@given(rhos, st.floats(0, 30))
def test_delta_is_the_least_over_orders(rho, eps):
    u = np.geomspace(1e-6, 1e8, 20001)
    brute = u * ((1 + u) * rho - eps) + u * np.log(u) - (1 + u) * np.log1p(u)
    # the grid's steps are 1.6e-3 in log u: the least is below the grid's by their square
    got = math.log(zcdp_delta(rho, eps) or 5e-324)
    assert got <= brute.min() + 1e-9 or brute.min() < -700
    assert got >= min(brute.min(), 0) - 1e-4 * max(1, abs(brute.min())) - 1e-3


def test_arrays_are_elementwise():
    eps, delta = np.array([[0.1], [1.0], [7.0]]), np.array([1e-9, 1e-3])
    for f in (dp_to_zcdp, zcdp_to_dp, gaussian_eps):
        want = [[f(float(e), float(d)) for d in delta] for e in eps[:, 0]]
        assert np.allclose(f(eps, delta), want, rtol=1e-12)
        assert isinstance(f(1.0, 1e-5), float)
    assert np.allclose(zcdp_delta(torch.tensor([0.1, 1.0]), [1, 2]), zcdp_delta([0.1, 1.0], [1, 2]))
    sigma = gaussian_sigma(2.0, eps=[1.0, 2.0], delta=1e-5)
    assert np.allclose(sigma, [gaussian_sigma(2.0, eps=e, delta=1e-5) for e in (1.0, 2.0)])


@few
@given(st.floats(-4, 3).map(math.exp), st.floats(0, 20))
def test_gaussian_delta_against_the_definition(mu, eps):
    # 40 digits where doubles cancel
    mp = pytest.importorskip("mpmath")
    with mp.workdps(60):
        m, e = mp.mpf(mu), mp.mpf(eps)
        want = mp.ncdf(m / 2 - e / m) - mp.exp(e) * mp.ncdf(-m / 2 - e / m)
        assume(want > 1e-300)
        # a relative error of the argument in the exponent, eps / mu squared, times 2e-16
        assert abs(gaussian_delta(mu, eps) / want - 1) < 1e-11 + 1e-15 * (eps / mu) ** 2


def test_gaussian_against_dp_accounting():
    pytest.importorskip("dp_accounting")
    from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss

    g = np.random.default_rng(0)
    for _ in range(20):
        s, eps = g.uniform(0.3, 5), g.uniform(0, 4)
        peer = GaussianPrivacyLoss(standard_deviation=s).get_delta_for_epsilon(eps)
        assert abs(gaussian_delta(1 / s, eps) - peer) < 1e-12


@few
@given(st.floats(0.001, 0.9), st.floats(0.5, 8), st.integers(1, 3000), deltas)
def test_subsampled_rdp_against_both_libraries(rate, noise, steps, delta):
    rdp = pytest.importorskip("opacus.accountants.analysis.rdp")
    orders = [*range(2, 30), 64, 256]
    mine = steps * rdp_subsampled_gaussian(rate, noise, orders)
    peer = rdp.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    assert np.allclose(mine, peer, rtol=1e-6, atol=1e-9)  # they lose digits where q is small
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want, _ = rdp.get_privacy_spent(orders=orders, rdp=peer, delta=delta)
        got = rdp_to_dp(mine, delta, orders)
    assert math.isclose(got, max(want, 0), rel_tol=1e-6, abs_tol=1e-6)
    dp = pytest.importorskip("dp_accounting")
    accountant = dp.rdp.RdpAccountant(orders, dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp.PoissonSampledDpEvent(rate, dp.GaussianDpEvent(noise)), steps)
    # it has one more way to say eps = 0 for tiny divergences
    assert math.isclose(got, other := accountant.get_epsilon(delta), rel_tol=1e-6) or other < got


@pytest.mark.parametrize(
    "noise, rate, steps, rdp, prv, pld",
    [(1.1, 0.01, 1000, 1.71177, 1.5255, 1.5154), (5.0, 1.0, 10, 2.81365, 2.59438, 2.59438)],
)
def test_dpsgd_table(noise, rate, steps, rdp, prv, pld):
    ours = dpsgd_eps(noise, rate, steps, 1e-5, "rdp")
    assert rdp <= ours < 1.01 * rdp  # whole orders only
    pytest.importorskip("opacus")
    assert abs(dpsgd_eps(noise, rate, steps, 1e-5) - prv) < 1e-4
    pytest.importorskip("dp_accounting")
    assert abs(dpsgd_eps(noise, rate, steps, 1e-5, "pld") - pld) < 1e-4


@few
@given(st.floats(0.005, 0.5), st.floats(0.4, 4))
def test_subsampled_grows_and_has_its_ends(rate, noise):
    a = np.array(ORDERS)
    r = rdp_subsampled_gaussian(rate, noise)
    assert (np.diff(r) > 0).all() and (r <= a / (2 * noise**2)).all()
    assert (rdp_subsampled_gaussian(rate * 1.1, noise) > r).all()
    # the sum itself at order 2: 1 + q^2 (e^(1/s^2) - 1)
    assert math.isclose(r[0], math.log1p(rate**2 * math.expm1(noise**-2)), rel_tol=1e-12)
    assert (rdp_subsampled_gaussian(1e-12, noise, [2, 3]) < 1e-20).all()


def test_gaussian_rdp_is_zcdp():
    fine = 1 + np.geomspace(1e-2, 1e3, 4001)
    for mu in (0.1, 1.0, 3.0):
        got = rdp_to_dp(rdp_gaussian(mu, fine), 1e-5, fine)
        assert 0 <= got - zcdp_to_dp(mu**2 / 2, 1e-5) < 1e-5 * got  # steps of 0.3 % in the order
    with pytest.warns(UserWarning, match="the best order is 5, an end.*orders above"):
        rdp_to_dp(rdp_gaussian(0.1, [2, 5]), 1e-5, [2, 5])
    with pytest.warns(UserWarning, match="orders below"):
        rdp_to_dp(rdp_gaussian(9.0, [2, 5]), 1e-5, [2, 5])


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_the_inverse_and_on_the_safe_side(method):
    pytest.importorskip({"prv": "opacus", "pld": "dp_accounting"}.get(method, "scipy"))
    s = dpsgd_noise(0.3, 0.05, 100, 1e-5, method, tol=0.01)
    assert dpsgd_eps(s, 0.05, 100, 1e-5, method) <= 0.3
    assert dpsgd_eps(0.98 * s, 0.05, 100, 1e-5, method) > 0.3
    full = dpsgd_noise(2.0, 1, 10, 1e-5, method)  # no sampling: 10 releases are one
    if method != "rdp":
        exact = math.sqrt(10) * gaussian_sigma(1, eps=2, delta=1e-5)
        assert exact <= full < 1.002 * exact


def test_rdp_at_small_and_large_promises():
    for eps in (0.05, 30.0):
        s = dpsgd_noise(eps, 0.01, 100, 1e-5, "rdp")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert 0.95 * eps < dpsgd_eps(s, 0.01, 100, 1e-5, "rdp") <= eps
    with pytest.raises(ValueError, match="eps=1e-05: method 'rdp' does not reach it"):
        dpsgd_noise(1e-5, 0.01, 100, 1e-5, "rdp")


def test_opacus_and_dp_accounting_are_lazy_and_named_where_missing():
    code = (
        "import sys; from diffkit.privacy.accounting import *;"
        "dpsgd_eps(1.0, 0.1, 10, 1e-5, 'rdp'); dpsgd_eps(1.0, 1, 10, 1e-5, 'pld');"
        "assert not {'opacus', 'dp_accounting'} & set(sys.modules);"
        "sys.modules['opacus'] = sys.modules['dp_accounting'] = None\n"
        "for m in ('prv', 'pld'):\n"
        "    try: dpsgd_eps(1.0, 0.1, 10, 1e-5, m)\n"
        "    except ImportError as e: print(e)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "method='prv' needs opacus: pip install 'diffkit[privacy]'" in out.stdout
    assert "method='pld' needs dp-accounting: pip install dp-accounting" in out.stdout


def one(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noisy_max_is_a_softmax():
    u, n, rho, d = torch.tensor([0.0, 1.0, 3.0, -2.0]), 200_000, 0.1, 0.7
    tau = d / math.sqrt(2 * rho)
    want = torch.softmax(u.double() / tau, 0).numpy() * n
    got = noisy_max(u.repeat(n, 1), d, rho, relation="replace-one", generator=one())
    assert got.shape == (n, 1)
    assert stats.chisquare(got[:, 0].bincount(minlength=4).numpy(), want).pvalue > 1e-3
    # all of them, in order: the law of Plackett and Luce, at the price of four draws
    got = noisy_max(u.repeat(n, 1), d, 4 * rho, 4, relation="replace-one", generator=one(1))
    w, count = want / n, {}
    for row in map(tuple, got.tolist()):
        count[row] = count.get(row, 0) + 1
    law = {}
    for row in count:
        left, p = 1.0, 1.0
        for i in row:
            p, left = p * w[i] / left, left - w[i]
        law[row] = p * n
    assert len(law) == 24 and math.isclose(sum(law.values()), n, rel_tol=1e-9)
    assert stats.chisquare([count[r] for r in law], list(law.values())).pvalue > 1e-3


def test_the_noise_of_a_maximum_is_the_generators():
    how = dict(sensitivity=1.0, rho=0.1, k=20, relation="replace-one")
    a, b, c = (noisy_max(torch.zeros(99), **how, generator=one(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    rows = noisy_max(torch.zeros(2, 99), **how, generator=one())
    assert not torch.equal(rows[0], rows[1])


@few
@given(st.integers(0, 9999), st.floats(1.01, 60))
def test_the_price_of_a_softmax(seed, alpha):
    g = np.random.default_rng(seed)
    rho = g.uniform(0.01, 3)
    tau, a = math.sqrt(1 / (2 * rho)), g.normal(size=4) * 3
    p, q = (v - logsumexp(v) for v in (a / tau, (a + g.uniform(-1, 1, 4)) / tau))
    assert logsumexp(alpha * p + (1 - alpha) * q) / (alpha - 1) <= alpha * rho * (1 + 1e-12)


def test_the_price_of_a_softmax_is_reached():  # two candidates alike, small steps
    rho = 1e-4
    tau = math.sqrt(1 / (2 * rho))
    p, q = (v - logsumexp(v) for v in (np.array([0.5, -0.5]) / tau, np.array([-0.5, 0.5]) / tau))
    assert math.isclose(logsumexp(2 * p - q), 2 * rho, rel_tol=1e-3)


def test_gaussian_mechanism():
    x = torch.arange(200_000, dtype=torch.float32).reshape(2, -1)
    y = gaussian_mechanism(x, 3.0, 2.0, relation="add/remove-one", generator=one())
    assert y.shape == x.shape and y.dtype == torch.float64
    z = ((y - x) / 1.5).flatten().numpy()  # 3 / sqrt(2 * 2)
    assert stats.kstest(z, "norm").pvalue > 1e-3
    again = gaussian_mechanism(x.numpy(), 3.0, 2.0, relation="add/remove-one", generator=one())
    assert torch.equal(y, again)


@few
@given(st.lists(st.floats(1e-6, 1), min_size=1, max_size=30))
def test_spending_in_parts_is_spending_the_sum(parts):
    total = math.fsum(parts)
    b, whole_ = (Budget(rho=total, delta=1e-6, relation="replace-one") for _ in range(2))
    for j, r in enumerate(parts):
        assert b.spend(r, f"part {j}", relation="replace-one") == r
    whole_.spend(total, "all", relation="replace-one")
    assert abs(b.spent - whole_.spent) <= 1e-12 * total
    assert b.remaining <= 1e-12 * total
    with pytest.raises(BudgetExceeded):
        b.spend(1e-6 * total, "more", relation="replace-one")
    assert len(b.entries) == len(parts)


def test_shares_may_round_up():
    b = Budget(rho=0.7, relation="replace-one")
    for _ in range(7):  # seven doubles 0.1 are one bit more than the double 0.7
        b.spend(0.1, "tenth", relation="replace-one")
    assert b.spent > b.rho and b.remaining == 0
    for w in (3, 7, 45, 1000):
        b = Budget(eps=1.0, delta=1e-5, relation="add/remove-one")
        for _ in range(w):
            b.spend(b.rho / w, "share", relation="add/remove-one")
        assert abs(b.spent / b.rho - 1) < 1e-12


@pytest.mark.parametrize("mine, other", [RELATIONS, RELATIONS[::-1]])
def test_relations_are_not_mixed(mine, other):
    b = Budget(rho=1.0, relation=mine)
    assert b.relation == mine
    g, x = one(), torch.zeros(3)
    before = g.get_state()
    for f in (
        lambda: b.spend(0.1, "x", relation=other),
        lambda: gaussian_mechanism(x, 1, 0.1, relation=other, budget=b, generator=g),
        lambda: noisy_max(x, 1, 0.1, relation=other, budget=b, generator=g),
    ):
        with pytest.raises(ValueError, match=f"this budget is {mine}"):
            f()
    assert torch.equal(before, g.get_state()) and not b.entries
    with pytest.raises(TypeError, match="relation"):
        b.spend(0.1, "x")
    with pytest.raises(TypeError, match="relation"):
        noisy_max(x, 1, 0.1)


def test_a_refusal_comes_before_the_noise():
    b, g = Budget(rho=0.5, relation="replace-one"), one()
    before = g.get_state()
    how = dict(relation="replace-one", budget=b, generator=g)
    with pytest.raises(BudgetExceeded, match="'ages' costs rho=0.6, left are 0.5 of 0.5"):
        gaussian_mechanism(torch.zeros(3), 1.0, 0.6, what="ages", **how)
    with pytest.raises(BudgetExceeded, match="costs rho=0.6"):  # a row of scores is a release
        noisy_max(torch.zeros(3, 5), 1.0, 0.2, **how)
    # and bad input costs nothing
    for f in (
        lambda: noisy_max(torch.zeros(3), 1.0, 0.2, 4, **how),
        lambda: gaussian_mechanism(torch.tensor([math.nan]), 1.0, 0.2, **how),
        lambda: gaussian_mechanism(torch.zeros(3), -1.0, 0.2, **how),
    ):
        with pytest.raises(ValueError):
            f()
    assert torch.equal(before, g.get_state()) and b.spent == 0
    gaussian_mechanism(torch.zeros(3), 1.0, 0.5, what="ages", **how)
    assert b.remaining == 0 and not torch.equal(before, g.get_state())


def test_report():
    b = Budget(eps=1.0, delta=1e-5, relation="replace-one", rows=1000)
    assert "spent" in b.report()  # nothing yet
    b.spend(0.01, "a long name of a release", relation="replace-one")
    b.spend(0.02, "ages", relation="replace-one")
    text = b.report()
    assert text.startswith("replace-one, rho = 0.0305566, eps = 1 at delta = 1e-05\n")
    rows = {line[:24].strip(): line[24:].split() for line in text.split("\n")[2:]}
    assert rows["a long name of a release"][0] == "0.010000"
    assert float(rows["ages"][2]) == pytest.approx(zcdp_to_dp(0.02, 1e-5), abs=1e-4)
    assert float(rows["spent"][0]) == pytest.approx(0.03)
    assert float(rows["remaining"][0]) == pytest.approx(0.000557, abs=1e-6)
    plain = Budget(rho=1.0, relation="replace-one").report()
    assert "eps" not in plain and "delta" not in plain


def attack(shift, eps, n, seed):  # delta of the best test on normal noise, and its standard error
    g = np.random.default_rng(seed)
    inside, outside = (shift * g.normal(m, 1, n) - shift**2 / 2 for m in (shift, 0))
    a, b = (inside > eps).mean(), (outside > eps).mean()
    error = math.sqrt((a * (1 - a) + math.exp(2 * eps) * b * (1 - b)) / n)
    return a - math.exp(eps) * b, error


@pytest.mark.parametrize("mu, eps", [(0.5, 0.5), (1.0, 1.0), (2.0, 2.0)])
def test_an_attack_never_beats_the_stated_delta(mu, eps):
    got, error = attack(mu, eps, 400_000, 0)
    assert abs(got - gaussian_delta(mu, eps)) < 4 * error  # four standard errors
    assert got + 4 * error < zcdp_delta(mu**2 / 2, eps)


def test_an_attack_beats_the_wrong_relation():
    rho = dp_to_zcdp(1.0, 1e-3)
    sigma = gaussian_sigma(1.0, rho=rho)  # of add/remove-one; replacing a row moves sqrt(2)
    got, error = attack(math.sqrt(2) / sigma, 1.0, 400_000, 1)
    assert got - 4 * error > 1e-3


BAD = {
    "mu=0": lambda: gaussian_delta(0, 1.0),
    "eps=-1": lambda: gaussian_delta(1, -1.0),
    "mu='1'": lambda: gaussian_eps("1", 1e-5),
    "delta=0": lambda: gaussian_eps(1, 0.0),
    "delta=1.0: must be below 1": lambda: zcdp_to_dp(1, 1.0),
    "delta=None": lambda: zcdp_to_dp(1, None),
    "rho=nan": lambda: zcdp_to_dp(math.nan, 1e-5),
    "rho=-1": lambda: zcdp_delta([1, -1], 1.0),
    "rho=True": lambda: zcdp_delta(True, 1.0),
    "an array of numbers": lambda: zcdp_delta([True, False], 1.0),
    "eps=0": lambda: dp_to_zcdp(0, 1e-5),
    "rho alone, or eps and delta": lambda: gaussian_sigma(1, rho=1, delta=1e-5),
    "sensitivity=0": lambda: gaussian_sigma(0, rho=1),
    "noise=-1": lambda: rdp_subsampled_gaussian(0.1, -1),
    "rate=0": lambda: rdp_subsampled_gaussian(0, 1),
    "rate=1.5": lambda: dpsgd_eps(1, 1.5, 10, 1e-5),
    "rate=[0-9.]+.*": lambda: dpsgd_eps(1, 2, 10, 1e-5, "rdp"),
    "whole numbers": lambda: rdp_subsampled_gaussian(0.1, 1, [2.5]),
    "orders=1": lambda: rdp_gaussian(1, [1, 2]),
    "numbers above 1 that increase": lambda: rdp_gaussian(1, [2, 3, 3]),
    "above 1 that increase": lambda: rdp_gaussian(1, [3, 2]),
    "orders=5: must be": lambda: rdp_gaussian(1, 5),
    "rdp has shape": lambda: rdp_to_dp([1, 2], 1e-5),
    "steps=1.5": lambda: dpsgd_eps(1, 0.1, 1.5, 1e-5),
    "method='gdp'": lambda: dpsgd_eps(1, 0.1, 10, 1e-5, "gdp"),
    "eps_error=0": lambda: dpsgd_eps(1, 0.1, 10, 1e-5, eps_error=0),
    "above eps_error": lambda: dpsgd_noise(0.01, 0.1, 10, 1e-5),
    "tol=0": lambda: dpsgd_noise(1, 0.1, 10, 1e-5, tol=0),
    "relation='both'": lambda: Budget(rho=1, relation="both"),
    "must be rho, or eps": lambda: Budget(relation="replace-one"),
    "must be rho, or eps and": lambda: Budget(eps=1, relation="replace-one"),
    "below 1 / rows = 0.001": lambda: Budget(eps=1, delta=0.001, rows=1000, relation="replace-one"),
    "rho=0": lambda: Budget(rho=0, relation="replace-one"),
    "what=''": lambda: Budget(rho=1, relation="replace-one").spend(1, "", relation="replace-one"),
    "rho=0: must be": lambda: noisy_max([1.0, 2.0], 1, 0, relation="replace-one"),
    "rho=-1: must be": lambda: gaussian_mechanism([1.0], 1, -1, relation="replace-one"),
    "k=4": lambda: noisy_max([1.0, 2.0, 3.0], 1, 1, 4, relation="replace-one"),
    "scores must be finite": lambda: noisy_max([1.0, math.nan], 1, 1, relation="replace-one"),
    "scores has shape": lambda: noisy_max(3.0, 1, 1, relation="replace-one"),
    "values must be finite": lambda: gaussian_mechanism([True], 1, 1, relation="replace-one"),
    "relation='replace'": lambda: gaussian_mechanism([1.0], 1, 1, relation="replace"),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input(said):
    with pytest.raises(ValueError, match=said):
        BAD[said]()


def test_every_function_names_its_relation():
    for name in accounting.__all__:
        f = getattr(accounting, name)
        if callable(f) and not (isinstance(f, type) and issubclass(f, Exception | tuple)):
            assert "replace-one" in f.__doc__ or "add/remove-one" in f.__doc__, name


def test_noise_without_a_generator_is_nobody_elses():
    # torch's own generator begins every process with one seed: whoever knows it knows the noise
    code = (
        "import torch\n"
        "from diffkit.privacy.accounting import gaussian_mechanism, noisy_max\n"
        "how = dict(relation='replace-one')\n"
        "print(gaussian_mechanism(torch.zeros(3), 1.0, 0.5, **how).tolist(),"
        " noisy_max(torch.zeros(1000), 1.0, 0.5, 5, **how).tolist())"
    )
    said = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
            for _ in range(2)}  # fmt: skip
    assert len(said) == 2 and all(said), said
    torch.manual_seed(0)
    one = gaussian_mechanism(torch.zeros(3), 1.0, 0.5, relation="replace-one")
    torch.manual_seed(0)
    assert not torch.equal(
        one, gaussian_mechanism(torch.zeros(3), 1.0, 0.5, relation="replace-one")
    )
