"""Parity of diffkit.causal.dag with peers, and properties too heavy for the notebook."""

import contextlib
import io
import itertools
import logging
import warnings

import numpy as np
import pytest
import torch

from diffkit.causal.dag import (
    FAST,
    cpdag,
    covariance,
    dagma,
    fit_given_order,
    follow_path,
    h_exp,
    h_logdet,
    h_poly,
    is_dag,
    lasso_given_order,
    notears,
    plot_dag,
    random_dag,
    random_weights,
    residual_variances,
    sachs,
    scores,
    sem_covariance,
    shd_cpdag,
    sid,
    simulate,
    sort_n_regress,
    to_dag,
    topological_order,
    varsortability,
    warn_table,
)


def problem(d=20, k=2, seed=0, n=1000):
    W = random_weights(random_dag(d, k * d, generator=seed), generator=seed).numpy()
    return W, simulate(W, n, generator=seed)


@pytest.mark.parametrize("s", [(1.0, 0.9, 0.8, 0.7), (1.0, 1.0)])
def test_dagma_parity(s):
    linear = pytest.importorskip("dagma.linear")
    W, X = problem()
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = linear.DagmaLinear("l2").fit(
            X.copy(),
            lambda1=0.05,
            w_threshold=0.0,
            T=len(s),
            s=list(s),
            warm_iter=200 // len(s),
            max_iter=200 // len(s),
            lr=3e-4,
        )
    ours = dagma(
        covariance(X),
        iters=(200 // len(s),) * len(s),
        s=s,
        mu=[0.1**k for k in range(len(s))],
        allowed=np.ones((20, 20)),
    ).raw
    assert np.abs(theirs - ours).max() < 1e-6


def test_dagma_parity_out_of_domain():
    "Long steps: the domain is left, steps are halved and stages restarted in the same way."
    linear = pytest.importorskip("dagma.linear")
    W, X = problem(seed=3)
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = linear.DagmaLinear("l2").fit(
            X.copy(),
            lambda1=0.05,
            w_threshold=0.0,
            T=2,
            s=[1.0, 0.7],
            warm_iter=120,
            max_iter=120,
            lr=0.03,
        )
    ours = dagma(
        covariance(X),
        iters=(120, 120),
        s=(1.0, 0.7),
        mu=(1.0, 0.1),
        lr=0.03,
        allowed=np.ones((20, 20)),
    ).raw
    assert np.abs(theirs - ours).max() < 1e-4


def test_dagma_exclude_edges_parity():
    linear = pytest.importorskip("dagma.linear")
    W, X = problem(d=8)
    no = np.ones((8, 8))
    no[0, 1] = no[3, 2] = 0
    with contextlib.redirect_stderr(io.StringIO()):
        theirs = linear.DagmaLinear("l2").fit(
            X.copy(),
            lambda1=0.05,
            w_threshold=0.0,
            T=2,
            s=[1.0, 0.9],
            warm_iter=100,
            max_iter=100,
            exclude_edges=((0, 1), (3, 2)),
        )
    ours = dagma(covariance(X), iters=(100, 100), s=(1.0, 0.9), mu=(1.0, 0.1), allowed=no).raw
    assert np.abs(theirs - ours).max() < 1e-6


@pytest.mark.slow
def test_notears_parity():
    castle = pytest.importorskip("castle.algorithms")
    logging.disable(logging.CRITICAL)
    W, X = problem(d=8, k=1, seed=1)
    m = castle.Notears(lambda1=0.1)
    m.learn(X)
    ours = notears(covariance(X), 0.1)
    assert np.array_equal(np.asarray(m.causal_matrix), ours.B)
    # both stop L-BFGS-B at its default tolerance
    assert np.abs(np.asarray(m.weight_causal_matrix) - ours.raw).max() < 0.02


@pytest.mark.parametrize("d,edges", [(5, 4), (8, 12), (12, 20), (15, 60)])
def test_sid_against_gadjid(d, edges):
    pytest.importorskip("gadjid")
    for seed in range(25):
        a, b = random_dag(d, edges, generator=seed), random_dag(d, edges, generator=seed + 1000)
        assert sid(a, b, exact=True) == sid(a, b)


def test_shd_against_gadjid():
    gadjid = pytest.importorskip("gadjid")
    for seed in range(50):
        a, b = random_dag(10, 15, generator=seed), random_dag(10, 15, generator=seed + 1000)
        assert (
            scores(a, b)["shd"]
            == gadjid.shd(a.numpy().astype(np.int8), b.numpy().astype(np.int8))[1]
        )
        ca, cb = (np.asarray(cpdag(x)) for x in (a, b))
        # gadjid: 2 marks an undirected edge, once
        code = lambda c: np.where(c * c.T, np.triu(2 * np.ones_like(c)), c).astype(np.int8)
        assert shd_cpdag(a, b) == gadjid.shd(code(ca), code(cb))[1]


def test_cpdag_five_nodes():
    "Same class, same CPDAG; and covered-edge reversals stay in the class (Chickering)."
    for seed in range(60):
        B = random_dag(5, 6, generator=seed).numpy()
        for i, j in zip(*np.nonzero(B)):
            pa_i, pa_j = set(np.flatnonzero(B[:, i])), set(np.flatnonzero(B[:, j])) - {i}
            R = B.copy()
            R[i, j], R[j, i] = 0, 1
            if not is_dag(R):
                continue
            assert (shd_cpdag(B, R) == 0) == (pa_i == pa_j)


def test_acyclicity_values_agree_with_eigenvalues():
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        W = torch.randn(7, 7, generator=g).double() * 0.45
        A = W * W
        rho = torch.linalg.eigvals(A).abs().max().item()
        lam = torch.linalg.eigvals(A)
        assert abs(h_exp(W)[0] - (lam.exp().sum().real - 7)) < 1e-8
        assert abs(h_poly(W)[0] - ((1 + lam / 7) ** 7).sum().real + 7) < 1e-8
        assert (h_logdet(W)[0] == torch.inf) == (rho >= 1)
        if rho < 1:
            assert abs(h_logdet(W)[0] + (1 - lam).log().sum().real) < 1e-6


@pytest.mark.parametrize("h", [h_exp, h_poly, h_logdet])
def test_arrays_give_arrays_and_the_gradient_is_that_of_the_value(h):
    W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0)).double().numpy() * 0.3
    value, grad = h(W)
    assert type(value) is type(grad) is np.ndarray and grad.shape == (4, 4)
    step = 1e-5 * np.eye(16).reshape(16, 4, 4)
    slope = (h(W + step)[0] - h(W - step)[0]).reshape(4, 4) / 2e-5
    np.testing.assert_allclose(grad, slope, atol=1e-8)  # central differences: error 1e-10
    tensors = h(torch.as_tensor(W))
    assert all(torch.is_tensor(x) for x in tensors) and np.array_equal(tensors[1], grad)


def test_log_determinant_is_the_same_for_all_orders():
    W, X = problem(d=5, k=1)
    C = covariance(X)
    sums = [np.log(residual_variances(C, o)).sum() for o in itertools.permutations(range(5))]
    assert np.ptp(sums) < 1e-9


def test_lasso_against_sklearn():
    lm = pytest.importorskip("sklearn.linear_model")
    W, X = problem(d=8, seed=2)
    order = topological_order(W)
    L = lasso_given_order(covariance(X), order, 0.1, tol=1e-10)
    Xc = X - X.mean(0)
    for k in range(1, 8):
        j, pa = order[k], order[:k]
        assert np.allclose(
            lm.Lasso(alpha=0.1, fit_intercept=False, tol=1e-10, max_iter=100_000)
            .fit(Xc[:, pa], Xc[:, j])
            .coef_,
            L[pa, j],
            atol=1e-5,
        )


def test_torch_loop_equals_numpy_loop():
    C = np.stack([covariance(problem(d=6, k=1, seed=s)[1]) for s in range(3)])
    kw = dict(iters=(50, 50), s=(1.0, 0.9), mu=(1.0, 0.1), lr=5e-2)
    a, b = follow_path(C, **kw), follow_path(torch.as_tensor(C), **kw)
    assert np.abs(a[0] - b[0].numpy()).max() < 1e-8 and np.array_equal(a[3], b[3])


def one_stage(C, W0, lr, n, s, lam=0.05):
    """DAGMA's stage for one graph from its description: a step out of the domain is halved until
    it is inside and then counts once; at the first step, or with s <= 0.9, the stage begins again
    with s + 0.1. Both halve lr."""
    eye, t, restarts, halvings, path = np.eye(len(C)), 0, 0, 0, []
    W, m, v, step = W0.copy(), 0, 0, 0
    while t < n:
        M = np.linalg.inv(s * eye - W * W)
        if M.min() < -1e-6:
            if t == 0 or s <= 0.9 + 1e-9:
                W, m, v, t, s, restarts = W0.copy(), 0, 0, 0, s + 0.1, restarts + 1
            else:
                W, halvings = W + step * lr / 2, halvings + 1
            lr /= 2
            continue
        G = (1 - eye) * (-C @ (eye - W) + 2 * W * M.T + lam * np.sign(W))
        t += 1
        m, v = 0.99 * m + 0.01 * G, 0.999 * v + 0.001 * G * G
        step = m / (1 - 0.99**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        W = W - lr * step
        path.append((t, round(s, 9), lr, restarts, halvings))
    return W, path


@pytest.mark.parametrize(
    "s, lr, start", [(1.0, 2.0, 0), (0.9, 1.0, 0), (0.7, 0.8, 0), (0.5, 0.1, 0.35)]
)
def test_a_stage_that_leaves_the_domain_is_that_of_the_plain_loop(s, lr, start):
    C, d, n = covariance(problem(d=6, k=1)[1]), 6, 80
    W0 = start * (1 - np.eye(d))
    W, path = one_stage(C, W0, lr, n, s)
    end, _, history, _ = follow_path(
        C[None], s=(s,), mu=(1.0,), iters=(n,), lr=lr, tol=0.0, checkpoint=1, init=W0[None]
    )
    keys = ("iteration", "s", "lr", "restarts", "halvings")
    seen = [tuple(round(h[k], 9) if k == "s" else h[k] for k in keys) for h in history]
    assert seen == path and seen[-1][0] == n and seen[-1][3] + seen[-1][4] > 0
    np.testing.assert_allclose(end[0], W, atol=1e-9)


def test_to_dag_always_gives_a_dag():
    rng = np.random.default_rng(0)
    W = rng.normal(size=(20, 9, 9))
    D = to_dag(W, 0.1)
    assert is_dag(D).all() and ((D == 0) | (D == W)).all()
    assert (to_dag(D, 0.1) == D).all()


def test_varsortability_peer_formula():
    "The reference formula (Reisach et al.), written with boolean matrix powers."
    for seed in range(10):
        W, X = problem(d=10, seed=seed)
        C = covariance(X)
        E = W != 0
        v = np.diag(C)
        n = up = 0
        P = E.copy()
        for _ in range(9):
            n += P.sum()
            up += (P & (v[None] > v[:, None])).sum()
            P = P @ E
        assert abs(varsortability(C, W) - up / n) < 1e-12


def test_sachs_is_the_file_of_cdt():
    import importlib.util
    from pathlib import Path

    spec = importlib.util.find_spec("cdt")
    if spec is None:
        pytest.skip("cdt is not installed")
    theirs = np.loadtxt(
        Path(next(iter(spec.submodule_search_locations))) / "data/resources/cyto_full_data.csv",
        delimiter=",",
        skiprows=1,
    )
    X, names, B = sachs()
    assert (
        np.array_equal(X, theirs)
        and is_dag(B)
        and B.sum() == 17
        and np.allclose(sachs(log=True)[0], np.log(X))
    )


def test_result_and_plot():
    import matplotlib

    matplotlib.use("agg")
    W, X = problem(d=6, k=1)
    fit = sort_n_regress(covariance(X), names=list("abcdef"))
    assert set(fit.to_networkx()) == set("abcdef") and fit.plot(truth=W != 0) is not None
    with pytest.raises(ValueError, match="names and truth"):
        plot_dag(W, ["a"])
    assert np.allclose(fit_given_order(sem_covariance(W), topological_order(W)), W)


def test_fast_schedule_finds_a_sparse_graph():
    W, X = problem(d=10, k=1, seed=1)
    assert scores((W != 0) * 1.0, dagma(covariance(X), **FAST).B)["shd"] <= 1


def test_objective_outside_the_domain_is_infinite():
    """The last step of a stage is not followed by a domain test inside the loop; the finite
    log-determinant there must not be reported."""
    _, X = problem(d=6, k=1)
    fit = dagma(covariance(X), iters=(1,), s=(1.0,), mu=(1.0,), lr=5.0)
    assert h_logdet(fit.raw)[0] == np.inf and fit.objective == np.inf and not fit.converged
    assert is_dag(fit.W)


def test_whole_numbers_are_numbers():
    "A domain or a rate given as an int: a restart and a halved rate are no whole numbers any more."
    C, start = np.eye(3) + 0.5, np.full((3, 3), 0.9)
    made = [
        dagma(C, s=(s,), mu=(1.0,), iters=(20,), lr=lr, init=start)
        for s in (1, 1.0)
        for lr in (1, 1.0)
    ]
    assert all(np.array_equal(m.W, made[0].W) for m in made)
    assert np.isfinite(made[0].W).all()


def test_a_covariance_with_a_constant_node_is_refused():
    for use in (lambda C: varsortability(C, np.zeros((3, 3))), dagma):
        with pytest.raises(ValueError, match="zero variance at node 1"):
            use(np.diag([1.0, 0.0, 2.0]))


def test_one_column_has_no_units_to_compare():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_table(torch.eye(1), torch.zeros(1, 1), 100)
    with pytest.warns(UserWarning, match="all columns have the same variance"):
        warn_table(torch.eye(2), torch.zeros(2, 2), 100)
