"""Parity of diffkit.causal.domain_counterfactuals with the formulas written sample by sample,
properties on random models, bad input."""

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffkit.causal.domain_counterfactuals import (
    ILD,
    LatentSCM,
    LeakyLinear,
    counterfactual_error,
    fit_domains,
    fit_ild,
    free_directions,
    ild_elbo,
    quantile_match,
    simulate_ild,
    take_runs,
    to_canonical,
)


def gen(seed):
    return torch.Generator().manual_seed(seed)


def random_model(
    m=4, D=3, k=2, seed=0, slope=0.5, width=0.1, form="relaxed", runs=None, dtype=torch.float64
):
    model = ILD(
        LeakyLinear(m, slope, width, runs=runs), LatentSCM(m, D, k, form, runs=runs, generator=seed)
    )
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.25 * torch.randn(p.shape, generator=gen(seed + 1)))
    return model.to(dtype).requires_grad_(False)


@pytest.mark.parametrize("form", ["relaxed", "canonical", "dense"])
def test_parity_with_the_structural_equations(form):
    "One sample at a time, one equation after the other, straight from the text."
    m, D, k, a = 4, 3, 2, 0.5
    model = random_model(m, D, m if form == "dense" else k, seed=3, form=form, width=0.0)
    L, log_S, b = (t.numpy() for t in model.scm.mechanisms())
    G, M, c = model.g.G.numpy(), model.g.M.numpy(), model.g.c.numpy()[0]
    eps = np.random.default_rng(0).normal(size=(6, m))
    for d in range(D):
        for e in eps:
            z = np.zeros(m)
            for i in range(m):
                z[i] = (
                    sum(L[d, i, j] * (z[j] - b[d, j]) for j in range(i))
                    + np.exp(log_S[d, i]) * e[i]
                    + b[d, i]
                )
            v = M @ z
            x = G @ np.where(v < 0, a * v, v) + c
            one = torch.tensor(x)[None]
            assert_close(model.decode(torch.tensor(e)[None], d)[0], one[0], rtol=1e-9, atol=1e-9)
            assert_close(model.encode(one, d)[0], torch.tensor(e), rtol=1e-8, atol=1e-8)
            by_hand = (
                -0.5 * (e @ e)
                - m / 2 * np.log(2 * np.pi)
                - log_S[d].sum()
                - np.log(abs(np.linalg.det(G @ M)))
                - np.log(a) * (v < 0).sum()
            )
            assert abs(model.log_prob(one, d).item() - by_hand) < 1e-8


@pytest.mark.parametrize("shift", ["mechanism", "output"])
@pytest.mark.parametrize("I", [(2, 3), (0, 1)])
def test_simulation_against_row_vector_formulas(shift, I):
    "The official generator works with rows, z = leaky(eps (I - A)^{-1} + bias) / sd, x = z G."
    X, d, truth = simulate_ild(4, 3, I, n=3000, shift=shift, generator=2)
    L, _, b = (t.numpy() for t in truth.scm.mechanisms())
    A = L.transpose(0, 2, 1)
    x = truth.sample(2000, 0, gen(0)).numpy()
    eps = truth.encode(torch.tensor(x), 0).numpy()
    z = []
    for k in range(3):
        before = eps @ np.linalg.inv(np.eye(4) - A[k]) + b[k]
        z.append(np.where(before < 0, 0.5 * before, before))
        assert_close(
            truth.counterfactual(torch.tensor(x), 0, k),
            torch.tensor(z[-1] @ truth.g.G.numpy().T),
            rtol=1e-7,
            atol=1e-7,
        )
    others = [i for i in range(4) if i not in I]
    # only the columns in I change
    for k in (1, 2):
        np.testing.assert_array_equal(A[k][:, others], A[0][:, others])
    if shift == "output":
        assert (b[:, others] == 0).all() and np.ptp(b[:, list(I)], axis=1).max() < 1e-12
    assert (
        abs(
            abs(np.linalg.det(truth.g.G.numpy()))
            * np.prod(
                np.concatenate(
                    [
                        np.where(
                            (e := truth.scm(truth.encode(X[d == k].double(), k), k).numpy()) < 0,
                            0.5 * e,
                            e,
                        )
                        for k in range(3)
                    ]
                ).std(0, ddof=1)
            )
            - 1
        )
        < 1e-4
    )


@settings(deadline=None, max_examples=25)
@given(
    m=st.integers(1, 6),
    D=st.integers(2, 4),
    seed=st.integers(0, 10**6),
    slope=st.floats(0.2, 2.0),
    width=st.sampled_from([0.0, 0.05, 1.0]),
    data=st.data(),
)
def test_laws_of_counterfactuals(m, D, seed, slope, width, data):
    k = data.draw(st.integers(1, m))
    form = data.draw(st.sampled_from(["relaxed", "canonical"]))
    model = random_model(m, D, k, seed, slope, width, form)
    # nearly singular: rounding decides
    if min(torch.linalg.svdvals(model.g.G).min(), torch.linalg.svdvals(model.g.M).min()) < 0.05:
        return
    a, b, c = (data.draw(st.integers(0, D - 1)) for _ in range(3))
    x = model.sample(5, a, gen(seed))
    cf = model.counterfactual
    near = dict(rtol=1e-5, atol=1e-5)
    assert_close(cf(x, a, a), x, **near)
    assert_close(cf(cf(x, a, b), b, a), x, **near)
    assert_close(cf(cf(x, a, b), b, c), cf(x, a, c), **near)
    z, w = model.g.inverse(x)[0], model.g.inverse(cf(x, a, b))[0]
    assert_close(z[:, : m - k], w[:, : m - k], **near)
    # batch independence
    one = torch.cat([cf(x[i : i + 1], a, b) for i in range(5)])
    assert_close(one, cf(x, a, b), rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=20)
@given(m=st.integers(2, 5), seed=st.integers(0, 10**6), data=st.data())
def test_canonical_form_is_equivalent(m, seed, data):
    I = sorted(data.draw(st.sets(st.integers(0, m - 1), min_size=1, max_size=m)))
    g = gen(seed)
    fixed = [i for i in range(m) if i not in I]
    A, c, s = (
        torch.randn(3, m, m, generator=g).double(),
        torch.randn(3, m, generator=g).double(),
        (0.3 * torch.randn(3, m, generator=g)).exp().double(),
    )
    for t in (A, c, s):
        t[1:, fixed] = t[0, fixed]
    F = torch.linalg.inv(torch.eye(m) - A.tril(-1)) * s.unsqueeze(-2)
    b = torch.linalg.solve(torch.eye(m) - A.tril(-1), c.unsqueeze(-1)).squeeze(-1)
    Fc, bc, H, h, found = to_canonical(F, b)
    assert found == I
    tol = dict(rtol=1e-6, atol=1e-6 * float(torch.linalg.cond(F).max()))
    k = len(I)
    assert_close(Fc.triu(1), torch.zeros_like(Fc), **tol)
    assert_close(Fc[:, : m - k], torch.eye(m).double()[: m - k].expand(3, m - k, m), **tol)
    assert_close(bc[:, : m - k], torch.zeros(3, m - k).double(), **tol)
    for d in range(3):  # the same map between domains, the same law
        T, t = F[d] @ torch.linalg.inv(F[0]), b[d] - F[d] @ torch.linalg.solve(F[0], b[0])
        assert_close(H @ Fc[d] @ torch.linalg.inv(Fc[0]) @ torch.linalg.inv(H), T, **tol)
        assert_close(H @ Fc[d] @ Fc[d].T @ H.T, F[d] @ F[d].T, **tol)
        assert_close(H @ bc[d] + h, b[d], **tol)
        assert_close(T @ b[0] + t, b[d], **tol)


def test_free_directions_counts_and_ignores_the_basis():
    for m, D, k in ((3, 4, 1), (3, 4, 2), (4, 5, 3), (6, 4, 2), (4, 3, 4)):
        scm = random_model(m, D, k, seed=m * D).scm
        b = scm.mechanisms()[2]
        F = (scm(torch.eye(m).double().expand(D, m, m), None) - b.unsqueeze(-2)).mT
        assert free_directions(F, b, k) == k * (k - 1) // 2
        # a triangular change of basis changes nothing
        H = torch.eye(m).double() + 0.3 * torch.randn(m, m, generator=gen(1)).double().tril(-1)
        assert free_directions(H @ F, b @ H.T, k) == k * (k - 1) // 2


def test_orthogonal_map_of_the_shared_block():
    "g and f turned together: the same density, the same counterfactuals."
    model = random_model(5, 3, 2, seed=8, form="canonical")
    x = model.sample(50, 1, gen(0))
    Q = torch.block_diag(
        torch.linalg.qr(torch.randn(3, 3, generator=gen(4)).double())[0], torch.eye(2).double()
    )
    turned = random_model(5, 3, 2, seed=8, form="relaxed")
    turned.load_state_dict(model.state_dict())
    L, log_S, b = model.scm.mechanisms()
    F = torch.linalg.inv(torch.eye(5) - L) * log_S.exp().unsqueeze(-2)
    F, b = Q @ F @ Q.T, b @ Q.T
    S = F.diagonal(dim1=1, dim2=2)
    turned.scm.L.copy_(torch.eye(5) - S.unsqueeze(-1) * torch.linalg.inv(F))
    turned.scm.log_S.copy_(S.log())
    turned.scm.b.copy_(b)
    turned.g.M.copy_(model.g.M @ Q.T)
    assert_close(turned.log_prob(x, 1), model.log_prob(x, 1))
    assert_close(turned.counterfactual(x, 1, 2), model.counterfactual(x, 1, 2))


def test_runs_equal_single_models():
    many = random_model(4, 3, [1, 2, 4], runs=3, dtype=torch.float32)
    x = torch.randn(3, 20, 4, generator=gen(0))
    lab = torch.randint(0, 3, (20,), generator=gen(1))
    for r, k in enumerate((1, 2, 4)):
        one = ILD(LeakyLinear(4), LatentSCM(4, 3, k))
        one.load_state_dict({n: v[r] if v.ndim else v for n, v in many.state_dict().items()})
        for d in (0, 2, lab):
            assert_close(many.log_prob(x, d)[r], one.log_prob(x[r], d))
            assert_close(many.counterfactual(x, d, 1)[r], one.counterfactual(x[r], d, 1))
            assert_close(many.counterfactual(x[0], d, 1)[r], one.counterfactual(x[0], d, 1))
        kept = take_runs(many, r)
        assert kept.scm.runs == 1
        assert_close(kept.log_prob(x[r], 0)[0], one.log_prob(x[r], 0))
    grouped = torch.randn(3, 3, 7, 4, generator=gen(2))
    assert_close(many.log_prob(grouped, None)[:, 1], many.log_prob(grouped[:, 1], 1))
    assert_close(
        many.counterfactual(grouped, None, 2)[:, 1], many.counterfactual(grouped[:, 1], 1, 2)
    )
    assert_close(many.log_prob(grouped, 1)[:, 2], many.log_prob(grouped[:, 2], 1))
    assert_close(many.log_prob(grouped, torch.ones(7).long()), many.log_prob(grouped, 1))
    with pytest.raises(ValueError, match="1 or 3 runs"):
        many.encode(grouped[:2], None)


def test_fit_is_reproducible_and_gradients_flow():
    X, d, truth = simulate_ild(3, 2, (2,), n=400)
    a, b = (ILD(LeakyLinear(3), LatentSCM(3, 2, 1, generator=0)) for _ in range(2))
    la, lb = (fit_ild(m, X, d, 40, batch=64) for m in (a, b))
    assert torch.equal(la, lb) and la[-5:].mean() < la[0]
    perm = torch.randperm(len(X), generator=gen(0))
    c = ILD(LeakyLinear(3), LatentSCM(3, 2, 1, generator=0))
    full = [
        fit_ild(m, x, e, 30, batch=None)
        for m, x, e in (
            (c, X[perm], d[perm]),
            (ILD(LeakyLinear(3), LatentSCM(3, 2, 1, generator=0)), X, d),
        )
    ]
    start = ILD(LeakyLinear(3), LatentSCM(3, 2, 1, generator=0))
    each = torch.stack([start.log_prob(X[d == k], k).mean() for k in (0, 1)])
    assert_close(full[1][0], -each.mean().detach())  # domains of one size: nats a sample
    assert_close(full[0], full[1], rtol=1e-3, atol=1e-3)  # the order of the rows does not matter
    x = X[:5].clone().requires_grad_()
    a.counterfactual(x, 0, 1).sum().backward()
    assert x.grad.abs().sum() > 0
    assert counterfactual_error(truth, truth, X.double(), d) == 0


def test_gradcheck_of_the_smooth_leaky_relu():
    g = LeakyLinear(3, 0.5, 0.2).double()
    z = torch.randn(4, 3, generator=gen(0)).double().requires_grad_()
    assert torch.autograd.gradcheck(g, (z,)) and torch.autograd.gradcheck(g.inverse, (z,))
    # the largest gap is q * width, at 0
    for w in (1e-2, 1e-4):
        assert (
            LeakyLinear(3, 0.5, w)(z.float()) - LeakyLinear(3, 0.5, 0.0)(z.float())
        ).abs().max() <= 0.25 * w + 1e-6


def test_elbo_is_a_bound_and_tight_for_the_true_posterior():
    "Linear decoder: the exact evidence is known."

    class Pair(torch.nn.Module):
        def __init__(self, W, noise, prior_cov):
            super().__init__()
            self.W, self.noise, self.C = W, noise, prior_cov

        def forward(self, z):
            return z @ self.W.T

        def inverse(self, x):
            return self.posterior(x)[0], None

        def posterior(self, x):
            P = torch.linalg.inv(torch.linalg.inv(self.C) + self.W.T @ self.W / self.noise**2)
            return x @ self.W @ P.T / self.noise**2, P.diagonal().log().expand(*x.shape[:-1], 2)

    # orthogonal columns: the posterior is diagonal
    W = torch.tensor([[1.0, 0.0], [0.0, 2.0], [0.0, 0.0]]).double()
    model = ILD(Pair(W, 0.5, torch.eye(2).double()), LatentSCM(2, 2, 1, init=0.0).double())
    x = torch.randn(1, 3, generator=gen(1)).double()
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(3).double(), W @ W.T + 0.25 * torch.eye(3).double()
    ).log_prob(x)[0]
    draws = ild_elbo(model, x.expand(40000, 3), 0, 0.5, generator=gen(0))
    assert abs(draws.mean() - exact) < 4 * draws.std() / 200
    worse = ILD(Pair(W, 0.8, torch.eye(2).double()), model.scm)
    assert ild_elbo(worse, x.expand(40000, 3), 0, 0.5, generator=gen(0)).mean() < exact - 0.02
    with pytest.raises(TypeError, match="gives no log-determinant"):
        model.log_prob(x, 0)
    with pytest.raises(TypeError, match="must have posterior"):
        ild_elbo(random_model(), torch.zeros(2, 4).double(), 0)


def test_quantile_match_equals_numpy():
    g = np.random.default_rng(0)
    a, b = g.normal(size=2001), g.exponential(size=3001)
    mine = quantile_match(
        torch.tensor(a)[:, None], torch.tensor(a)[:, None], torch.tensor(b)[:, None]
    )[:, 0].numpy()
    ranks = np.argsort(np.argsort(a)) / len(a)
    np.testing.assert_allclose(mine, np.quantile(b, ranks), rtol=1e-9, atol=1e-9)


def test_quantile_match_ends_at_the_ends_of_the_other_domain():
    "Below all source values the smallest target value, above all the largest; shares between."
    source, target = torch.tensor([[2.0], [0.0], [1.0], [3.0]]), torch.tensor([[30.0], [10.0]])
    x = torch.tensor([[-9.0], [0.5], [1.5], [2.5], [3.5], [1e9]])
    mine = quantile_match(x.double(), source.double(), target.double())
    assert mine[:, 0].tolist() == [10.0, 15.0, 20.0, 25.0, 30.0, 30.0]
    alone = quantile_match(x.double(), source.double(), target[:1].double())
    assert alone[:, 0].tolist() == [30.0] * 6  # the only value that there is


def table(seed=0, n=900):
    g = np.random.default_rng(seed)
    u = g.normal(size=(n, 3)) @ np.array([[1, 0.5, 0.2], [0, 1, 0.4], [0, 0, 1]])
    lab = g.permutation(np.arange(n) % 3)
    clean = pd.DataFrame(u, columns=list("abc"))
    bad = clean.copy()
    bad["b"] = (
        clean.b * np.array([1, 1.8, 0.5])[lab] + 0.6 * lab * clean.a + np.array([0, 3.0, -3])[lab]
    )
    return clean, bad.assign(site=np.array(["x", "y", "z"])[lab], note="n")


def test_tables():
    clean, bad = table()
    fit = fit_domains(bad, "site", iters=600, starts=4)
    out = fit(bad, to="x")
    rows = bad.site != "x"
    assert (
        fit.k == 1
        and list(out.columns) == list(bad.columns)
        and (out.site == "x").all()
        and (out.note == "n").all()
    )
    error = ((out - clean)[["a", "b", "c"]][rows] ** 2).mean().mean()
    assert error < 0.02 < 0.5 < ((bad[["a", "b", "c"]] - clean)[rows] ** 2).mean().mean()
    back = fit(out.assign(site="x"), to="y")
    assert_close(
        torch.tensor(back[bad.site == "y"][["a", "b", "c"]].to_numpy()),
        torch.tensor(bad[bad.site == "y"][["a", "b", "c"]].to_numpy()),
        rtol=0,
        atol=1e-3,
    )
    stay = fit(bad[bad.site == "x"], to="x")
    np.testing.assert_allclose(
        stay[["a", "b", "c"]], bad[bad.site == "x"][["a", "b", "c"]], atol=1e-3
    )
    X = bad[["a", "b", "c"]].to_numpy()
    for data in (X, torch.tensor(X), torch.tensor(X).float()):
        f = fit_domains(data, bad.site.to_numpy(), k=1, iters=3, starts=2)
        y = f(data, "z", bad.site)
        assert y.shape == data.shape and type(y) is type(data)
    assert fit(bad.iloc[:1], to="y").shape == (1, 5) and fit(bad.iloc[:0], to="y").shape == (0, 5)


MODEL = random_model(dtype=torch.float32)
X0, D0 = torch.randn(9, 4, generator=gen(0)), torch.arange(9) % 3


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: LatentSCM(0, 2, 1), ValueError, "m must be"),
        (lambda: LatentSCM(4, 1, 1), ValueError, "domains must be"),
        (lambda: LatentSCM(4, 2, 0), ValueError, "k must be"),
        (lambda: LatentSCM(4, 2, 5), ValueError, "k must be in 1..4"),
        (lambda: LatentSCM(4, 2, True), TypeError, "k must be a whole"),
        (lambda: LatentSCM(4, 2, 1.5), TypeError, "k must be a whole"),
        (lambda: LatentSCM(4, 2, "2"), TypeError, "k must be a whole"),
        (lambda: LatentSCM(4, 2), ValueError, "k must be given"),
        (lambda: LatentSCM(4, 2, [1, 2], runs=3), ValueError, "k has 2 values"),
        (lambda: LatentSCM(4, 2, 1, "sparse"), ValueError, "form must be"),
        (lambda: LatentSCM(4, 2, 1, "dense"), ValueError, "means k = m"),
        (lambda: LatentSCM(4, 2, 1, runs=0), ValueError, "runs must be"),
        (lambda: LeakyLinear(4, 0.0), ValueError, "slope must be"),
        (lambda: LeakyLinear(4, width=-1), ValueError, "width must be"),
        (lambda: LeakyLinear(4, inner=[True], runs=2), ValueError, "inner must be"),
        (lambda: ILD(torch.nn.Linear(4, 4), LatentSCM(4, 2, 1)), TypeError, "g must have inverse"),
        (lambda: ILD(LeakyLinear(4, runs=2), LatentSCM(4, 2, 1)), ValueError, "must agree"),
        (lambda: MODEL.encode(X0, 3), ValueError, "d must be in 0..2"),
        (lambda: MODEL.encode(X0, D0 + 1), ValueError, "labels in 0..2"),
        (lambda: MODEL.encode(X0, D0[:3]), ValueError, "one label a sample"),
        (lambda: MODEL.encode(X0, D0.float()), TypeError, "d must be an int"),
        (lambda: MODEL.encode(X0, True), TypeError, "d must be an int"),
        (lambda: MODEL.encode(X0, None), ValueError, "with d=None"),
        (lambda: MODEL.encode(X0[:, :3], 0), ValueError, "x must be"),
        (lambda: MODEL.encode(X0.long(), 0), TypeError, "floating-point"),
        (lambda: MODEL.encode(None, 0), TypeError, "floating-point"),
        (lambda: fit_ild(MODEL, X0, D0 * 0, 1), ValueError, "domain 1 has no samples"),
        (lambda: fit_ild(MODEL, X0 * torch.nan, D0, 1), ValueError, "NaN"),
        (lambda: fit_ild(MODEL, X0, D0, 0), ValueError, "iters must be"),
        (lambda: fit_ild(MODEL, X0[:8], D0[:8], 1, batch=None), ValueError, "domains of one size"),
        (lambda: fit_ild(MODEL, X0[None], D0, 1), ValueError, "X must be"),
        (lambda: fit_ild(MODEL, X0, D0.tolist(), 1), TypeError, "d must be a tensor"),
        (lambda: take_runs(MODEL, 0), ValueError, "no runs"),
        (lambda: take_runs(random_model(k=1, runs=2), [2]), ValueError, "runs must hold"),
        (lambda: simulate_ild(4, 2, (4,)), ValueError, "intervened must be"),
        (lambda: simulate_ild(4, 2, ()), ValueError, "intervened must be"),
        (lambda: simulate_ild(shift="both"), ValueError, "shift must be"),
        (lambda: counterfactual_error(MODEL, MODEL, X0, D0 * 0), ValueError, "at least 2 domains"),
        (
            lambda: to_canonical(torch.ones(2, 3, 3), torch.zeros(2, 3)),
            ValueError,
            "lower triangular",
        ),
        (lambda: to_canonical(torch.eye(3), torch.zeros(3)), ValueError, "F must be"),
        (lambda: fit_domains(table()[1], "where"), ValueError, "must be a column"),
        (lambda: fit_domains(table()[1].assign(a=np.nan), "site"), ValueError, "900 missing"),
        (
            lambda: fit_domains(table()[1].assign(site="x"), "site"),
            ValueError,
            "at least 2 different",
        ),
        (lambda: fit_domains(table()[1].assign(site=None), "site"), ValueError, "missing values"),
        (lambda: fit_domains(table()[1], "site", holdout=1.0), ValueError, "holdout must be"),
        (lambda: fit_domains(np.zeros((4, 2)), list("abab")), ValueError, "constant column"),
        (
            lambda: fit_domains(np.arange(8.0).reshape(4, 2) ** 2, list("abab")),
            ValueError,
            "at least 4",
        ),
        (lambda: fit_domains(table()[1], "site", columns=["note"]), TypeError, "no real numbers"),
        (lambda: fit_domains(table()[1], "site", k=4), ValueError, "k must be in 1..3"),
    ],
)
def test_bad_input(call, kind, words):
    with pytest.raises(kind, match=words):
        call()


def test_singular_function_is_named():
    model = random_model(dtype=torch.float32)
    model.g.M.zero_()
    with pytest.raises(ValueError, match="M is singular"):
        model.encode(X0, 0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    X, d, _ = simulate_ild(4, 3, (2, 3), n=300)
    cpu, gpu = (
        ILD(LeakyLinear(4, runs=2), LatentSCM(4, 3, [2, 4], runs=2, generator=0)).to(where)
        for where in ("cpu", "cuda")
    )
    a, b = fit_ild(cpu, X, d, 30, batch=50), fit_ild(gpu, X.cuda(), d.cuda(), 30, batch=50)
    assert_close(a, b.cpu(), rtol=1e-3, atol=1e-3)
    assert_close(
        cpu.counterfactual(X, d, 1),
        gpu.counterfactual(X.cuda(), d.cuda(), 1).cpu(),
        rtol=1e-2,
        atol=1e-2,
    )


def test_the_k_that_is_chosen_is_the_number_of_mechanisms_that_differ():
    "Two of three mechanisms differ: k = 1 cannot fit, k = 3 need not be taken."
    g = np.random.default_rng(3)
    lab = np.arange(1200) % 3
    u = g.normal(size=(1200, 3)) @ np.array([[1, 0.5, 0.2], [0, 1, 0.4], [0, 0, 1]])
    u[:, 1] = u[:, 1] * np.array([1, 2.5, 0.4])[lab] + np.array([0, 2.0, -2])[lab]
    u[:, 2] = u[:, 2] * np.array([1, 0.4, 1.8])[lab] + np.array([0, -3.0, 1])[lab] * u[:, 0]
    fit = fit_domains(u, lab, iters=500, starts=4)
    assert fit.k == 2 and list(fit.cost) == [1, 2, 3] and fit.model.scm.own.sum() == 2
    assert fit.cost[1] > fit.cost[2] + 0.1 > fit.cost[3] - 0.1


def test_domains_of_unequal_size_count_the_same():
    "One column, a Gaussian a domain: the cost is the mean over domains of their entropies."
    normal = torch.distributions.Normal(0.0, 1.0)
    points = lambda n: normal.icdf((torch.arange(n) + 0.5) / n).double()
    sizes, s = (1800, 200), torch.tensor([1.0, 8.0]).double()
    x = torch.cat([points(n) * c for n, c in zip(sizes, s)])
    lab = np.repeat(["many", "few"], sizes)
    fit = fit_domains(x[:, None], lab, iters=600, starts=2)
    entropy = 0.5 * np.log(2 * np.pi * np.e) + (s / x.std()).log()
    equal = entropy.mean().item()
    by_rows = (entropy * torch.tensor(sizes) / sum(sizes)).sum().item()
    # the rows held out: 50 of the small domain, whose entropy they give to 1 / sqrt(100)
    assert abs(fit.cost[1] - equal) < 0.15 < 0.8 < abs(by_rows - equal)
