"""Parity of diffkit.causal.topo with the official loop written from its description, and
properties on random input."""

import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkit.causal.colide import colide_profile
from diffkit.causal.dag import (
    DagFit,
    covariance,
    fit_given_order,
    is_dag,
    notears,
    random_dag,
    random_weights,
    residual_variances,
    simulate,
)
from diffkit.causal.topo import (
    CovarianceScore,
    NodeScore,
    bic_given_order,
    kkt_gap,
    linear_nodes,
    search_orders,
    swap_candidates,
    swap_ratios,
    topo,
    walk_sums,
)


def problem(d=10, seed=0, n=400, k=2):
    W = random_weights(random_dag(d, k * d, generator=seed), generator=seed).numpy()
    return W, simulate(W, n, generator=seed)


def official(X, order, small, large, large_searches, tol=1e-8):
    """The published loop: a regression on the data for every node of every candidate, ranked by
    the walk sums, greedy disjoint swaps."""
    X, d, order = X - X.mean(0), X.shape[1], list(order)

    def fit(order, W=None, lo=0, hi=d):
        W = np.zeros((d, d)) if W is None else W.copy()
        for k in range(lo, hi):
            W[:, order[k]] = 0
            if k:
                W[order[:k], order[k]] = np.linalg.lstsq(
                    X[:, order[:k]], X[:, order[k]], rcond=None
                )[0]
        return W

    value = lambda W: ((X - X @ W) ** 2).sum() / len(X) / 2
    W = fit(order)
    f, trace = value(W), []
    while True:
        trace.append(f)
        G = np.linalg.inv(np.eye(d) - np.abs(W)).T
        ranked = sorted(
            ((order[b], order[a]) for a in range(d) for b in range(a + 1, d)), key=lambda p: G[p]
        )
        for kind, cand in (("small", ranked[:small]), ("large", ranked[small:large])):
            if kind == "large" and not large_searches:
                return order, trace
            pos, new = {v: k for k, v in enumerate(order)}, []
            for i, j in cand:
                o = list(order)
                o[pos[i]], o[pos[j]] = j, i
                new.append(value(fit(o, W, pos[j], pos[i] + 1)))
            if new and min(new) < f - tol * f:
                large_searches -= kind == "large"
                break
        else:
            return order, trace
        taken = []
        for _, (i, j) in sorted((g, c) for g, c in zip(new, cand) if g < f - tol * f):
            a, b = pos[j], pos[i]
            if all(b < lo or a > hi for lo, hi in taken):
                taken.append((a, b))
                order[a], order[b] = i, j
        W = fit(order)
        f = value(W)


@pytest.mark.parametrize("sizes", [(10, 20, 1), (45, 45, 0), (5, 45, 3)])
@pytest.mark.parametrize("seed", range(3))
def test_parity_with_the_official_loop(seed, sizes):
    _, X = problem(seed=seed)
    order = np.random.default_rng(seed).permutation(10).tolist()
    end, trace = official(X, order, *sizes)
    mine, history, _ = search_orders(
        CovarianceScore(covariance(X)),
        order,
        small=sizes[0],
        large=sizes[1],
        large_searches=sizes[2],
    )
    assert mine == end
    np.testing.assert_allclose([h["score"] for h in history[:-1]], trace, rtol=1e-8)


def test_parity_with_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    _, X = problem(seed=1)
    X = X - X.mean(0)
    fit = topo(X)
    order = fit.history[-1]["order"]
    for k in range(1, 10):
        m = linear_model.LinearRegression(fit_intercept=False).fit(X[:, order[:k]], X[:, order[k]])
        np.testing.assert_allclose(fit.raw[order[:k], order[k]], m.coef_, atol=1e-9)
    lasso = linear_model.Lasso(alpha=0.1, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(
        X[:, order[:9]], X[:, order[9]]
    )
    p = np.sort(order[:9])
    np.testing.assert_allclose(
        linear_nodes(covariance(X), 0.1)(order[9], p)[0][np.argsort(np.argsort(order[:9]))],
        lasso.coef_,
        atol=1e-7,
    )


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(0, 10_000), st.sampled_from(["ls", "colide_nv"]))
def test_gains_are_those_of_a_fresh_factorisation(d, seed, f):
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(d + 3, d))
    C = A.T @ A / d
    o = torch.as_tensor(rng.permutation(d))
    a, b = sorted(rng.choice(d, 2, replace=False))
    q = o.clone()
    q[[a, b]] = q[[b, a]]
    s = CovarianceScore(C, f)
    pair = torch.tensor([[a, b]])
    assert (
        abs(s.gains(o, pair).item() - (s.costs(q) - s.costs(o)).sum().item())
        < 1e-9 * s.costs(o).sum()
    )
    L = torch.linalg.cholesky(torch.as_tensor(C)[o][:, o])
    np.testing.assert_allclose(
        (swap_ratios(L, pair)[0] * L.diagonal() ** 2).numpy(),
        residual_variances(C, q.tolist())[q],
        rtol=1e-8,
    )


def test_many_pieces_equal_one():
    "200 nodes: the pairs are scored in pieces, and each piece touches other columns."
    _, X = problem(d=120, n=600)
    C = covariance(X)
    o = torch.randperm(120, generator=torch.Generator().manual_seed(0))
    s = CovarianceScore(C)
    pairs = torch.triu_indices(120, 120, 1).T
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(1))]
    g = s.gains(o, pairs)
    for i in range(0, len(pairs), 500):
        q = o.clone()
        a, b = pairs[i].tolist()
        q[[a, b]] = q[[b, a]]
        assert abs(g[i] - (s.costs(q) - s.costs(o)).sum()) < 1e-8 * s.costs(o).sum()
    assert s.gains(o, pairs[:0]).shape == (0,)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9), st.integers(0, 1000))
def test_falls_strictly_terminates_is_optimal(d, seed):
    _, X = problem(d=d, seed=seed, n=100, k=0.5)
    o = np.random.default_rng(seed).permutation(d).tolist()
    s = CovarianceScore(covariance(X))
    end, history, ok = search_orders(s, o)
    f = [h["score"] for h in history[:-1]]
    assert ok and (np.diff(f) < 0).all() and sorted(end) == list(range(d))
    assert (s.gains(torch.tensor(end), torch.triu_indices(d, d, 1).T) >= -1e-8 * f[-1]).all()


def test_relabelled_nodes_give_the_relabelled_graph():
    _, X = problem(seed=3)
    p = np.random.default_rng(0).permutation(10)
    a, b = topo(X), topo(X[:, p])
    np.testing.assert_allclose(b.raw, a.raw[np.ix_(p, p)], atol=1e-9)


@pytest.mark.parametrize("score", ["ls", "colide_nv"])
def test_polishing_never_scores_worse(score):
    W, X = problem(seed=4)
    C = covariance(X)
    start = notears(C, 0.1, h_tol=1e-3)
    fit = topo(X, init=start, score=score)
    q = lambda W: (
        colide_profile(W, C, "unequal")
        if score == "colide_nv"
        else np.trace((np.eye(10) - W).T @ C @ (np.eye(10) - W)) / 2
    )
    assert (
        fit.objective <= q(start.W) and abs(fit.objective - q(fit.raw)) < 1e-9 and is_dag(fit.raw)
    )
    np.testing.assert_allclose(topo(X, init=start.W, score=score).raw, fit.raw)
    assert isinstance(fit, DagFit)


def test_penalised_score_beats_notears_at_its_own_objective():
    _, X = problem(d=7, seed=2)
    C = covariance(X)
    theirs = notears(C, 0.1)
    Wd = np.where(theirs.W != 0, theirs.raw, 0)  # a feasible point: thresholded, acyclic
    q = np.trace((np.eye(7) - Wd).T @ C @ (np.eye(7) - Wd)) / 2 + 0.1 * np.abs(Wd).sum()
    fit = topo(cov=C, init=theirs, score=NodeScore(linear_nodes(C, l1=0.1)))
    assert fit.objective <= q + 1e-9
    # with l1 the free gradient is at most the penalty
    assert kkt_gap(fit.raw, -C @ (np.eye(7) - fit.raw)) <= 0.1 + 1e-6


def test_kinds_of_input():
    _, X = problem(d=6, seed=5)
    base = topo(X)
    frame = pd.DataFrame(X, columns=list("abcdef"), index=[f"r{i}" for i in range(len(X))])
    for other in (
        topo(X.tolist()),
        topo(frame),
        topo(torch.tensor(X)),
        topo(torch.tensor(X).float()),
        topo(cov=torch.tensor(covariance(X))),
    ):
        np.testing.assert_allclose(np.asarray(other.raw), base.raw, atol=1e-4)
    batch = topo(np.stack([X, -X, X * 2]))
    assert (
        batch.W.shape == (3, 6, 6)
        and len(batch) == 3
        and batch.converged.all()
        and {h["graph"] for h in batch.history} == {0, 1, 2}
    )
    np.testing.assert_allclose(batch[1].raw, base.raw, atol=1e-9)
    np.testing.assert_allclose(batch.objective, base.objective * np.array([1, 1, 4]))
    again = topo(np.stack([X, -X, X * 2]), init=batch)
    np.testing.assert_allclose(again.objective, batch.objective)
    assert topo(cov=np.ones((1, 1))).B.sum() == 0
    with pytest.warns(UserWarning, match="5 rows for 6 columns"):
        one = topo(X[:5], lam=0.1)
    assert one.converged and np.isfinite(one.raw).all()
    assert (
        topo(X, max_rounds=0, order=[5, 4, 3, 2, 1, 0]).history[-1]["order"] == [5, 4, 3, 2, 1, 0]
        and not topo(X, max_rounds=0, order=[5, 4, 3, 2, 1, 0]).converged
    )
    seen = []
    topo(X, order=[5, 4, 3, 2, 1, 0], callback=lambda n, o, f: seen.append((n, f)))
    assert [n for n, _ in seen] == list(range(1, len(seen) + 1)) and all(
        b < a for (_, a), (_, b) in zip(seen, seen[1:])
    )
    w = walk_sums(base.W)
    assert isinstance(w, np.ndarray) and (np.diag(w) == 1).all()


def test_constant_scores_warn_and_others_do_not():
    _, X = problem(seed=6)
    with pytest.warns(UserWarning, match="same for every order"):
        topo(X, score=torch.log)
    with pytest.warns(UserWarning, match="same for every order"):
        topo(cov=np.diag([1.0, 2.0, 3.0]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topo(X)
        topo(X, score="colide_nv")
        topo(X * 1e-6)
        topo(X * 1e6)


BAD = [
    (dict(), "got neither"),
    (dict(X=1, cov=2), "got both"),
    (dict(order=[0, 0, 1, 2, 3, 4]), "order must be a permutation"),
    (dict(order=range(5)), "order must be a permutation"),
    (dict(init=np.ones((6, 6)) - np.eye(6)), "init has a cycle"),
    (dict(init=np.zeros((5, 5))), "init must have a shape"),
    (dict(order=range(6), init=np.zeros((6, 6))), "either order or init"),
    (dict(score="bge"), "score must be one of"),
    (dict(score=None), "score must be one of"),
    (dict(score=lambda v: 3.0), "same shape"),
    (dict(lam=-1.0), "lam must be"),
    (dict(lam="x"), "lam must be"),
    (dict(small=-1), "small must be at least"),
    (dict(large=True), "large must be a whole"),
    (dict(large_searches=0.5), "large_searches must be a whole"),
    (dict(tol=-1.0), "tol must be"),
    (dict(max_rounds=-1), "max_rounds must be"),
    (dict(threshold=None), "threshold must be"),
    (dict(names="abcdef"), "names must have 6"),
    (dict(init="graph"), "init must be numeric"),
]


@pytest.mark.parametrize(("kw", "match"), BAD)
def test_bad_input(kw, match):
    _, X = problem(d=6)
    if match in ("got neither", "got both"):
        kw = {k: X for k in kw}
    else:
        kw = {"X": X} | kw
    with pytest.raises((ValueError, TypeError), match=match):
        topo(**kw)


def test_bad_nodes():
    _, X = problem(d=6)
    C = covariance(X)
    for fit, match in (
        (lambda j, p: (np.zeros(len(p) + 1), 1.0), "coefficients and a finite loss"),
        (lambda j, p: (np.zeros(len(p)), np.nan), "coefficients and a finite loss"),
    ):
        with pytest.raises(ValueError, match=match):
            topo(X, score=NodeScore(fit))
    with pytest.raises(ValueError, match="allowed must be a mask"):
        linear_nodes(C, allowed=np.ones((3, 3)))
    with pytest.raises(ValueError, match="l1 must be"):
        linear_nodes(C, l1=-1)
    with pytest.raises(ValueError, match="use lam > 0"):
        topo(cov=np.ones((3, 3)))
    with pytest.raises(ValueError, match="use lam > 0"):
        topo(np.c_[X, X[:, 0]])
    with pytest.raises(ValueError, match="no graph"):
        topo(cov=np.zeros((0, 3, 3)))
    with pytest.warns(UserWarning, match="columns 0 and 6"):
        assert topo(np.c_[X, X[:, 0]], lam=0.1).converged
    with pytest.raises(ValueError, match="edges from earlier to later"):
        swap_candidates(fit_given_order(C, range(6)), [5, 4, 3, 2, 1, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    _, X = problem(d=30)
    for kw in ({}, dict(small=40)):
        gpu = topo(torch.tensor(X).cuda(), **kw)
        assert gpu.W.is_cuda and np.abs(gpu.raw.cpu().numpy() - topo(X, **kw).raw).max() < 1e-8


def parents_by_bic(X, order, j, gamma):
    "Forward and backward extended BIC for one node, a regression on the data for every set."
    X = X - X.mean(0)
    (n, d), before = X.shape, list(order[: list(order).index(j)])
    price = np.log(n) + 2 * gamma * np.log(d - 1)

    def rss(S):
        fit = X[:, S] @ np.linalg.lstsq(X[:, S], X[:, j], rcond=None)[0] if S else 0
        return ((X[:, j] - fit) ** 2).mean()

    S = []
    while rest := [i for i in before if i not in S]:
        i = min(rest, key=lambda i: rss([*S, i]))
        if n * np.log(rss(S) / rss([*S, i])) <= price:
            break
        S.append(i)
    while S:
        i = min(S, key=lambda i: rss([s for s in S if s != i]))
        if n * np.log(rss([s for s in S if s != i]) / rss(S)) >= price:
            break
        S.remove(i)
    w = np.zeros(d)
    if S:
        w[S] = np.linalg.lstsq(X[:, S], X[:, j], rcond=None)[0]
    return w


@pytest.mark.parametrize("gamma", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(4))
def test_bic_parents_equal_one_regression_a_set(seed, gamma):
    _, X = problem(12, seed, n=60, k=3)
    order = np.random.default_rng(seed).permutation(12)  # a wrong order: parents come and go
    W = bic_given_order(covariance(X), order.tolist(), len(X), gamma)
    slow = np.stack([parents_by_bic(X, order, j, gamma) for j in range(12)], 1)
    np.testing.assert_allclose(W, slow, atol=1e-9)
    assert (W != 0).sum() == (slow != 0).sum() > 5


def test_bic_parents_units_kinds_and_limits():
    _, X = problem(10, 1, n=80)
    C, order = covariance(X), list(range(10))
    W, s = bic_given_order(C, order, 80), np.geomspace(0.01, 100, 10)
    scaled = bic_given_order(C * s * s[:, None], order, 80)
    np.testing.assert_allclose(scaled, W * s / s[:, None], rtol=1e-7)  # BIC has no unit
    assert torch.equal(bic_given_order(torch.tensor(C), order, 80), torch.tensor(W))
    assert (bic_given_order(C, order, 80, most=1) != 0).sum(0).max() == 1
    assert not bic_given_order(C, order, 80, most=0).any()
    # fewer rows than columns: a choice all the same, on columns that determine one another, too
    few = bic_given_order(covariance(X[:6]), order, 6)
    assert np.isfinite(few).all() and (few != 0).sum(0).max() <= 3
    g = np.random.default_rng(0)  # a sum of two columns beside them, and a node of all three
    twin = g.normal(size=(80, 2))
    twin = np.concatenate([twin, twin @ [[0.37], [1.91]], twin @ [[2.0], [-3.0]]], 1)
    twin[:, 3] += 0.1 * g.normal(size=80)
    found = bic_given_order(covariance(twin), range(4), 80)
    assert (found[:, 3] != 0).sum() == 2 == (found[:, 2] != 0).sum() and np.abs(found).max() < 20
    with pytest.raises(ValueError, match="n must be"):
        bic_given_order(C, order, 1)
    with pytest.raises(ValueError, match="gamma must be"):
        bic_given_order(C, order, 80, -0.1)
    with pytest.raises(ValueError, match="order must be"):
        bic_given_order(C, order[:-1], 80)


def test_a_rule_of_ones_own_is_asked_whatever_the_sizes():
    """Its pairs are the only ones that are tried: none of them, and the order stays; the one that
    helps, and it is swapped; all of them in any sequence, and the end is that of the default."""
    W, X = problem(5)
    score, start = CovarianceScore(covariance(X)), [4, 3, 2, 1, 0]
    asked = []

    def rule(pairs):
        def candidates(weights, order, size):
            asked.append(size)
            return torch.tensor(pairs, dtype=torch.long).reshape(-1, 2)

        return candidates

    order, history, _ = search_orders(score, start, candidates=rule([]))
    assert order == start and asked and history[-1]["swaps"] == 0
    for pair in ((0, 4), (1, 2)):
        swapped = list(start)
        swapped[pair[0]], swapped[pair[1]] = start[pair[1]], start[pair[0]]
        better = score.costs(torch.tensor(swapped)).sum() < score.costs(torch.tensor(start)).sum()
        order, _, _ = search_orders(score, start, candidates=rule([pair]))
        assert order == (swapped if better else start)
    every = torch.triu_indices(5, 5, 1).T.tolist()
    assert search_orders(score, start, candidates=rule(every))[0] == search_orders(score, start)[0]
