"""Parity of diffkit.causal.colide with a plain loop written from the paper, and properties too
heavy for the notebook."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch

from diffkit.causal.colide import colide, colide_score, colide_sigma
from diffkit.causal.dag import (
    covariance,
    dagma,
    follow_path,
    is_dag,
    random_dag,
    random_weights,
    sem_covariance,
    simulate,
)


def problem(d=12, seed=0, n=600):
    W = random_weights(random_dag(d, 2 * d, generator=seed), generator=seed).numpy()
    return W, simulate(W, n, variance=np.linspace(0.5, 6, d), generator=seed)


def plain(C, equal, lam, n, lr, mu=1.0, s=1.0):
    "One stage for one graph, straight from the formulas: gradient, Adam, closed form."
    d = len(C)
    W, I = np.zeros((d, d)), np.eye(d)
    m = v = 0
    sd = np.sqrt(np.diag(C))
    sigma = np.full(d, sd.min()) if equal else sd
    for t in range(1, n + 1):
        g = (
            mu * (-C @ (I - W) @ np.diag(1 / sigma) + lam * np.sign(W))
            + 2 * W * np.linalg.inv(s * I - W * W).T
        )
        m, v = 0.99 * m + 0.01 * g, 0.999 * v + 0.001 * g**2
        W = W - lr * (m / (1 - 0.99**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        r = np.diag((I - W).T @ C @ (I - W))
        sigma = np.full(d, np.sqrt(r.mean())) if equal else np.sqrt(r)
    return W, sigma


@pytest.mark.parametrize("variance", ["equal", "unequal"])
def test_parity_with_the_formulas(variance):
    _, X = problem()
    C = covariance(X)
    W, sigma = plain(C, variance == "equal", 0.05, 200, 3e-4)
    kw = dict(iters=(200,), s=(1.0,), mu=(1.0,), allowed=np.ones((12, 12)), normalize=False)
    fit = colide(X, variance=variance, **kw)
    assert np.abs(fit.raw - W).max() < 1e-9 and np.abs(fit.sigma - sigma).max() < 1e-9


def test_frozen_sigma_is_dagma():
    """The loop with a rule that keeps sigma at 1 gives DAGMA (and test_dag compares that with
    the package)."""
    _, X = problem()
    C = covariance(X)[None]
    kw = dict(iters=(200,), s=(1.0,), mu=(1.0,), allowed=np.ones((12, 12)))
    assert (
        np.abs(follow_path(C, lambda r, run: 1 + 0 * r, **kw)[0][0] - dagma(C[0], **kw).raw).max()
        < 1e-12
    )
    linear = pytest.importorskip("dagma.linear")
    theirs = linear.DagmaLinear("l2").fit(
        X.copy(), lambda1=0.05, w_threshold=0.0, T=1, s=[1.0], max_iter=200
    )
    assert np.abs(follow_path(C, lambda r, run: 1 + 0 * r, **kw)[0][0] - theirs).max() < 1e-6


def test_equal_residuals_make_ev_and_nv_agree():
    W = random_weights(random_dag(7, 9, generator=0), generator=0)
    C = sem_covariance(W, 3.0)
    a, b = (colide_score(W, C, colide_sigma(W, C, k), 0.05) for k in ("equal", "unequal"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


def test_batch_with_different_fates():
    """Graphs of one batch leave the domain, restart and converge at different times, and none
    disturbs another."""
    C = np.stack(
        [covariance(problem(d=8, seed=s)[1]) * f for s, f in ((0, 1.0), (1, 50.0), (2, 0.01))]
    )
    kw = dict(
        variance="unequal",
        iters=(150, 150),
        s=(1.0, 0.7),
        mu=(1.0, 0.1),
        lr=0.05,
        checkpoint=50,
        tol=1e-3,
    )
    many = colide(cov=C, **kw)
    for i in range(3):
        one = colide(cov=C[i], **kw)
        np.testing.assert_allclose(many[i].raw, one.raw, atol=1e-8)
        np.testing.assert_allclose(many[i].sigma, one.sigma, atol=1e-8)
        assert is_dag(one.W) and bool(many.converged[i]) == one.converged


def test_torch_tensor_path_equals_numpy_path():
    C = np.stack([covariance(problem(d=6, seed=s)[1]) for s in range(2)])
    scale = {np: lambda r, run: np.sqrt(r), torch: lambda r, run: torch.sqrt(r)}
    a = follow_path(C, scale[np], np.ones((2, 6)), iters=(60,), s=(1.0,), mu=(1.0,), lr=1e-2)
    b = follow_path(
        torch.as_tensor(C),
        scale[torch],
        torch.ones(2, 6).double(),
        iters=(60,),
        s=(1.0,),
        mu=(1.0,),
        lr=1e-2,
    )
    assert np.abs(a[0] - b[0].numpy()).max() < 1e-9 and np.abs(a[1] - b[1].numpy()).max() < 1e-9


def test_second_fit_equals_first():
    "The official code keeps a changed default argument between fits."
    _, X = problem(d=8)
    kw = dict(iters=(80, 80), s=(1.0, 0.7), mu=(1.0, 0.1), lr=0.05)
    assert np.array_equal(colide(X, **kw).raw, colide(X, **kw).raw)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    C = np.stack([covariance(problem(seed=s)[1]) for s in range(4)])
    kw = dict(variance="unequal", iters=(200, 200), s=(1.0, 0.9), mu=(1.0, 0.1))
    gpu = colide(cov=torch.as_tensor(C).cuda(), **kw)
    assert gpu.W.is_cuda and np.abs(gpu.raw.cpu().numpy() - colide(cov=C, **kw).raw).max() < 1e-8


def test_history_tells_s_lr_and_abandoned_attempts():
    """A calm stage keeps its s and lr. A start outside the domain: each restart adds a tenth to s
    and halves lr, and so does each step that is taken back halve lr; the record says how many."""
    C = covariance(problem(d=8)[1])
    calm = colide(cov=C, iters=(40, 40), s=(1.0, 0.9), mu=(1.0, 0.1), lr=1e-3, checkpoint=20)
    assert [(h["s"], h["lr"]) for h in calm.history] == [(1.0, 1e-3)] * 2 + [(0.9, 1e-3)] * 2
    assert all(h["restarts"] == h["halvings"] == 0 for h in calm.history)
    wild = colide(
        cov=C, iters=(50,), s=(0.5,), mu=(1.0,), lr=0.1, checkpoint=10, init=np.full((8, 8), 0.3)
    )
    for h in wild.history:
        assert h["restarts"] > 0
        assert abs(h["s"] - (0.5 + 0.1 * h["restarts"])) < 1e-12
        assert h["lr"] == 0.1 * 0.5 ** (h["restarts"] + h["halvings"])
    steep = colide(cov=C, iters=(150,), s=(1.0,), mu=(1.0,), lr=0.5, checkpoint=10)
    last = steep.history[-1]
    assert last["halvings"] + last["restarts"] > 0
    assert last["lr"] == 0.5 * 0.5 ** (last["restarts"] + last["halvings"])


@pytest.mark.parametrize("kind", [np.asarray, torch.as_tensor])
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_the_callback_sees_what_the_caller_gave(kind, batch):
    "One graph has no batch axis; tensors come as tensors; the last call is the raw result."
    C = np.broadcast_to(covariance(problem(d=5)[1]), (*batch, 5, 5)).copy()
    seen = []
    fit = colide(
        cov=kind(C), iters=(20,), s=(1.0,), mu=(1.0,), checkpoint=10, normalize=False,
        callback=lambda k, i, W: seen.append((k, i, W)),
    )  # fmt: skip
    assert [v[:2] for v in seen] == [(0, 10), (0, 20)]
    for _, _, W in seen:
        assert W.shape == C.shape and isinstance(W, type(kind(C)))
    np.testing.assert_allclose(np.asarray(seen[-1][2]), np.asarray(fit.raw))


SHORT = dict(iters=(2,), s=(1.0,), mu=(1.0,))


@pytest.mark.parametrize("n", [3, 4])
def test_a_table_without_more_rows_than_columns_needs_a_penalty(n):
    X = np.random.default_rng(0).normal(size=(n, 4))
    for lam in (None, 0.0):
        with pytest.raises(ValueError, match=f"X has {n} rows for 4 columns.*choose lam > 0"):
            colide(X, lam=lam, **SHORT)
    with pytest.raises(ValueError, match="choose lam > 0"):  # one graph of two without
        colide(np.stack([X, X]), lam=[0.5, 0.0], **SHORT)
    with pytest.warns(UserWarning, match=f"{n} rows for 4 columns: the covariance is singular"):
        assert colide(X, lam=0.5, **SHORT).raw.shape == (4, 4)
    more = np.random.default_rng(0).normal(size=(5, 4))
    for lam in (None, 0.0):
        assert np.isfinite(colide(more, lam=lam, **SHORT).raw).all()


def test_what_the_data_hide_is_said_for_one_graph_and_a_batch_of_covariances_is_trusted():
    "A sum of columns is tied to them; equal variances are news in a table with named columns only."
    X = np.random.default_rng(0).normal(size=(50, 4))
    X = (X - X.mean(0)) / X.std(0)
    tied = covariance(np.c_[X[:, :2], X[:, 0] + X[:, 1]])
    with pytest.warns(UserWarning, match="the data cannot tell which"):
        colide(cov=tied, **SHORT)
    with pytest.warns(UserWarning, match="all columns have the same variance"):
        colide(pd.DataFrame(X, columns=list("abcd")), **SHORT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        colide(cov=np.stack([tied, tied]), **SHORT)
        colide(X, **SHORT)
        colide(np.stack([X, X]), **SHORT)
