"""AMUD and ADPA: the statistic against numpy, sklearn, closed forms and its exact permutation
law; block models against another generator's numbers; propagation against dense products and
another library's scaling; the network's limits; graphs in every form; errors."""

import itertools
import math
import warnings
from types import SimpleNamespace

import networkx as nx
import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import matthews_corrcoef

from diffkit.adaptive.amud import (
    ADPA,
    NAMES,
    adjacency,
    amud,
    amud_bed,
    connectome,
    cyclic,
    directed_patterns,
    dsbm,
    expected_r,
    fit_adpa,
    normalize,
    path_counts,
    propagate,
    stack,
    to_undirected,
    world,
)

P3 = np.array([[0.02, 0.2, 0.03], [0.03, 0.02, 0.15], [0.1, 0.03, 0.02]])
A, Y = dsbm([30, 25, 20], P3, 1)
D = A.toarray()
N = len(Y)
OFF = ~np.eye(N, dtype=bool)
DENSE = dict(A=D, At=D.T, AA=D @ D, AtAt=D.T @ D.T, AAt=D @ D.T, AtA=D.T @ D)


def rng(seed=0):
    return np.random.default_rng(seed)


def fast(*args, **options):
    return amud(*args, **dict(permutations=0) | options)


# --- the statistic


@pytest.mark.parametrize("mask", [None, np.arange(N) % 3 > 0])
@pytest.mark.parametrize("how", ["joined", "paths"])
def test_r_is_the_correlation_of_all_pairs(mask, how):
    at = np.arange(N) if mask is None else np.flatnonzero(mask)
    off = ~np.eye(len(at), dtype=bool)
    same = (Y[at][:, None] == Y[at])[off]
    got = fast(A, Y, mask=mask, reading=how)
    for k, G in DENSE.items():
        B = G[np.ix_(at, at)][off]
        B = B > 0 if how == "joined" else B
        assert got.r[k] == pytest.approx(np.corrcoef(B, same)[0, 1], abs=1e-12)  # rounding
        assert got.joined[k] == pytest.approx((B > 0).mean(), abs=1e-15)
        if how == "joined":
            assert got.r[k] == pytest.approx(matthews_corrcoef(same, B), abs=1e-12)
    R2 = [got.r[k] ** 2 for k in NAMES[2:]]
    assert got.score == pytest.approx((max(R2) - min(R2)) / max(R2), abs=1e-12)
    assert got.nodes == len(at)


def test_features_in_place_of_labels_and_the_threshold_on_paths():
    X = rng().standard_normal((N, 4))
    X[3] = 0  # no direction: its cosines are 0
    Z = np.divide(X, np.linalg.norm(X, axis=1, keepdims=True), where=X.any(1, keepdims=True),
                  out=np.zeros_like(X))  # fmt: skip
    got, two = fast(A, features=X), fast(A, Y, above=1)
    same = (Y[:, None] == Y)[OFF]
    for k, G in DENSE.items():
        assert got.r[k] == pytest.approx(np.corrcoef(G[OFF] > 0, (Z @ Z.T)[OFF])[0, 1], abs=1e-12)
        if k in NAMES[2:]:
            assert two.r[k] == pytest.approx(np.corrcoef(G[OFF] > 1, same)[0, 1], abs=1e-12)
    assert two.r["A"] == fast(A, Y).r["A"]  # of the products only
    one_hot = fast(A, features=np.eye(3)[Y])
    assert one_hot.r == pytest.approx(fast(A, Y).r, abs=1e-12)


def test_symmetric_graphs_have_score_zero_and_reversal_swaps():
    for seed in range(3):
        U = to_undirected(dsbm([20, 20], [[0.1, 0.3], [0.02, 0.1]], seed)[0])
        got = amud(U, np.repeat([0, 1], 20), permutations=0, redirections=19)
        assert got.score == 0 and not got.directed and got.p_turned == 1
    one, back = fast(A, Y), fast(A.T, Y)
    assert back.r["AAt"] == pytest.approx(one.r["AtA"], abs=1e-15)
    assert back.r["AA"] == pytest.approx(one.r["AtAt"], abs=1e-15) == one.r["AA"]
    assert back.score == pytest.approx(one.score, abs=1e-12) and one.score > 0.5


def test_relabelling_nodes_and_classes_changes_nothing():
    order = rng(3).permutation(N)
    one = fast(A, Y)
    names = np.array(["x", "a", "m"])[Y]
    for other in (fast(D[order][:, order], Y[order]), fast(A, names), fast(A, 7 - 2 * Y)):
        assert other.r == pytest.approx(one.r, abs=1e-12)
        assert other.z == pytest.approx(one.z, rel=1e-9)


def test_complete_circle_of_three_classes():
    for n in (2, 5):
        circle = np.kron(np.roll(np.eye(3), 1, 1), np.ones((n, n)))
        got = fast(circle, np.repeat(range(3), n))
        # AA joins a class to the one before, never to itself
        pairs, alike, joined = 3 * n * (3 * n - 1), 3 * n * (n - 1), 3 * n * n
        room = alike * (pairs - alike) * joined * (pairs - joined)
        assert got.r["AAt"] == pytest.approx(1) == got.r["AtA"]
        assert got.r["AA"] == pytest.approx(-alike * joined / math.sqrt(room))


def test_moments_are_those_of_all_permutations():
    small, y = dsbm([3, 4], [[0.5, 0.6], [0.4, 0.5]], 2)
    G = small.toarray()
    assert (G * G.T).sum() >= 2  # some edges go both ways
    X = rng(1).standard_normal((7, 2))
    Z = X / np.linalg.norm(X, axis=1, keepdims=True)
    for how, data, K in (
        ("joined", dict(labels=y), y[:, None] == y),
        ("paths", dict(labels=y), y[:, None] == y),
        ("paths", dict(features=X), Z @ Z.T),
    ):
        got = fast(small, reading=how, **data)
        for k, B in dict(A=G, AA=G @ G, AAt=G @ G.T, AtA=G.T @ G).items():
            B = np.where(np.eye(7), 0, B > 0 if how == "joined" else B)
            perms = np.array(list(itertools.permutations(range(7))))
            T = sum(B[i, j] * K[perms[:, i], perms[:, j]] for i, j in np.argwhere(B))
            own = (B * K).sum()
            assert got.z[k] == pytest.approx((own - T.mean()) / T.std(), rel=1e-8), (how, k)


def test_p_values_agree_and_hold_their_level():
    flat, y = dsbm([60, 60], np.full((2, 2), 0.03), 5)
    many, moments = amud(flat, y, permutations=999), fast(flat, y)
    assert many.test == "999 permutations" and moments.test.startswith("normal")
    assert many.p_value == amud(flat, y, permutations=999).p_value
    # three patterns by Bonferroni: at most three times too large, up to the normal's error
    assert many.p_value / 3 < moments.p_value < 4 * many.p_value
    hits, turned = [], []
    for s in range(70):
        g, y = dsbm([30, 30], np.full((2, 2), 0.04), 100 + s)
        hits.append(amud(g, y, permutations=19).p_value)
        h, y = dsbm([30, 30], 0.03 + 0.15 * np.eye(2), 100 + s)
        turned.append(fast(h, y, redirections=9, alpha=0.1).p_turned)
    for p in (hits, turned):
        for a in (0.1, 0.5):  # four standard errors of a share of 70
            assert abs(np.mean(np.array(p) <= a + 1e-9) - a) < 4 * math.sqrt(a * (1 - a) / 70)


def test_turned_edges_find_a_direction_and_keep_what_goes_both_ways():
    from diffkit.adaptive.amud import _redirect

    g, y, _, mask = world(0, cyclic(1.0), nodes=200, labelled=0.2)
    got = fast(g, y, mask=mask, redirections=19)
    assert got.p_turned == 0.05 and got.directed
    turned = _redirect(A, rng())
    both = A.multiply(A.T)
    assert (to_undirected(turned) != to_undirected(A)).nnz == 0
    assert (turned.multiply(turned.T) != both).nnz == 0 and turned.nnz == A.nnz
    single = A.nnz - both.nnz
    moved = (A - A.multiply(turned)).sum()
    assert abs(moved - single / 2) < 4 * math.sqrt(single / 4)


def test_the_decision_needs_the_score_and_both_tests():
    kinds = set()
    for s in range(12):
        for P in (0.005 + 0.04 * np.eye(4), np.full((4, 4), 0.015), cyclic(1.0)):
            g, y, _, mask = world(s, P, nodes=200, labelled=0.15)
            plain = fast(g, y, mask=mask)
            both = fast(g, y, mask=mask, redirections=19)
            assert plain.directed == (plain.score > 0.5 and plain.p_value <= 0.05)
            assert both.directed == (plain.directed and both.p_turned <= 0.05)
            assert fast(g, y, mask=mask, alpha=1).directed == (plain.score > 0.5)
            kinds.add((plain.score > 0.5, plain.p_value <= 0.05, both.p_turned <= 0.05))
    assert {(True, True, True), (True, True, False)} <= kinds
    assert any(high and not sure for high, sure, _ in kinds)


def test_labels_outside_the_mask_are_never_read():
    mask = np.arange(N) % 2 == 0
    hidden = Y.astype(float)
    hidden[~mask] = np.nan
    few = dict(redirections=9, permutations=20, alpha=0.1)
    a = amud(A, Y, mask=mask, **few)
    assert a == amud(A, hidden, mask=mask, **few)
    assert a == amud(A, Y, mask=np.flatnonzero(mask), **few)
    flipped = Y.copy()
    flipped[np.flatnonzero(mask)[:9]] = 2
    assert a.r != amud(A, flipped, mask=mask, permutations=20).r


def test_samples_of_a_hub_graph():
    g, y = dsbm([200, 200], [[0.06, 0.02], [0.02, 0.06]], 3)
    whole = fast(g, y)
    some = [fast(g, y, sample=100, seed=s).r["AAt"] for s in range(20)]
    assert whole.r["AAt"] > 0.1 and np.std(some) > 0
    assert abs(np.mean(some) - whole.r["AAt"]) < 4 * np.std(some) / math.sqrt(20)
    assert fast(g, y, sample=5000) == whole and fast(g, y, sample=100).nodes == 100
    star = nx.star_graph(20000)  # 4e8 paths through its middle
    with pytest.raises(ValueError, match="sample=None"):
        fast(star, np.arange(20001) % 2)
    assert fast(star, np.arange(20001) % 2, sample=100).joined["AAt"] > 0.97


def test_a_sample_of_all_but_one_leaves_one_node_out():
    g, y = dsbm([5, 5], [[0.5, 0.2], [0.3, 0.5]], 3)
    without = [fast(g, y, mask=np.arange(10) != k) for k in range(10)]
    for seed in range(5):
        assert fast(g, y, sample=9, seed=seed) in without
    assert fast(g, y, sample=10) == fast(g, y)


def test_path_counts():
    one = np.eye(3)[Y]
    got = path_counts(A, Y)
    for k, counts in got.items():
        assert np.array_equal(counts, one.T @ (DENSE[k] * OFF) @ one)


def test_no_pattern_no_evidence():
    pair = sp.coo_array(([1.0], ([0], [1])), shape=(6, 6))  # no two-edge path
    got = amud(pair, [0, 0, 0, 1, 1, 1])
    assert got.score == 0 and got.p_value == 1 and not got.directed
    assert got.r["AA"] == 0 and got.r["A"] != 0


# --- block models


def test_dsbm_has_the_law_of_another_generator():
    # mean and standard deviation over 60 graphs of torch-geometric-signed-directed 1.2.0:
    # DSBM(120, 4, 0.1, meta_graph_generation("cyclic", 4, 0.1), 1.5), edges by block
    mean = np.array([[27.05, 59.833, 35.433, 9.483], [6.517, 36.05, 71.95, 51.817],
                     [36.95, 8.75, 45.0, 106.3], [83.117, 51.667, 12.433, 73.8]])  # fmt: skip
    sd = np.array([[5.189, 6.828, 5.573, 3.342], [2.39, 6.384, 8.229, 8.286],
                   [6.218, 3.001, 5.966, 9.511], [7.921, 7.769, 3.011, 7.671]])  # fmt: skip
    sizes = [24, 27, 30, 39]
    P = cyclic(0.8, 4, 0.05, 0.0) + 0.04 * (np.roll(np.eye(4), 1, 1) - np.roll(np.eye(4), -1, 1))
    counts = []
    for s in range(60):
        g, y = dsbm(sizes, P, s)
        one = np.eye(4)[y]
        counts.append(one.T @ g @ one)
        assert g.diagonal().sum() == 0 and g.max() == 1
    ours = np.array(counts)
    # four standard errors of the difference of two means of 60
    assert (abs(ours.mean(0) - mean) < 4 * sd * math.sqrt(2 / 60)).all()
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    assert (abs(ours.mean(0) - P * pairs) < 4 * sd / math.sqrt(60)).all()
    ratio = ours.std(0, ddof=1) / np.sqrt(P * (1 - P) * pairs)
    assert (abs(ratio - 1) < 4 / math.sqrt(2 * 59)).all()  # a standard deviation of 60, to 9 %


def test_dsbm_ends():
    full, y = dsbm([3, 2], np.ones((2, 2)), 0)
    assert np.array_equal(full.toarray(), 1 - np.eye(5)) and y.tolist() == [0, 0, 0, 1, 1]
    assert dsbm([1, 4], [[1, 0], [0, 0]], 0)[0].nnz == 0
    a, b, c = (dsbm([50, 50], np.full((2, 2), 0.1), s)[0] for s in (1, 1, 2))
    assert (a != b).nnz == 0 and (a != c).nnz > 0


@pytest.mark.parametrize("direction", [0.0, 0.6, 1.0])
def test_expected_r_is_the_mean(direction):
    sizes, P = [40, 30, 35], cyclic(direction, 3, 0.01, 0.1)
    runs = [fast(*dsbm(sizes, P, s)).r for s in range(40)]
    for k, want in expected_r(sizes, P).items():
        got = np.array([r[k] for r in runs])
        assert abs(got.mean() - want) < 4 * got.std() / math.sqrt(40), k


def test_expected_r_counts_who_can_stand_between():
    # two nodes a class, sure edges: AA of classes 0 -> 1 -> 2 joins 0 to 2 only
    P = np.zeros((3, 3))
    P[0, 1] = P[1, 2] = 1
    g, y = dsbm([2, 2, 2], P, 0)
    assert expected_r([2, 2, 2], P) == pytest.approx(fast(g, y).r, abs=1e-9)
    P = np.zeros((4, 4))  # a class of one node has no edge inside, whatever P says
    P[0, 0] = P[1, 1] = P[0, 1] = P[1, 0] = P[2, 3] = P[3, 2] = 1
    g, y = dsbm([1, 1, 2, 2], P, 0)
    assert expected_r([1, 1, 2, 2], P) == pytest.approx(fast(g, y).r, abs=1e-9)
    thin = lambda d: expected_r([100] * 4, cyclic(d, 4, 1e-6, 1e-4))
    for d in (0.0, 0.3, 1.0):  # the sparse limit on the page
        r = thin(d)
        assert r["AA"] / r["AAt"] == pytest.approx((1 - 2 * d * d) / (1 + 2 * d * d), abs=0.05)


# --- graphs in


def test_every_form_of_a_graph():
    i, j = A.nonzero()
    g = nx.DiGraph()
    g.add_nodes_from(range(N))
    g.add_edges_from(zip(i.tolist(), j.tolist()))
    index = torch.as_tensor(np.stack([i, j]))
    data = SimpleNamespace(edge_index=index, num_nodes=N)
    forms = [A, sp.csc_matrix(A), 3.5 * A, D, D > 0, D.tolist(), torch.tensor(D), g, data]
    for form in forms:
        assert np.array_equal(adjacency(form).toarray(), D)
    for form in (index, np.stack([i, j]), [i.tolist(), j.tolist()]):
        assert np.array_equal(adjacency(form, N).toarray(), D)
        assert np.array_equal(adjacency(form).toarray(), D)
    assert adjacency(index, 90).shape == (90, 90)
    twice = adjacency(torch.cat([index, index], 1), N)
    assert np.array_equal(twice.toarray(), D)
    assert np.array_equal(to_undirected(A).toarray(), np.maximum(D, D.T))
    u = nx.path_graph(4)
    assert np.array_equal(adjacency(u).toarray(), nx.to_numpy_array(u))
    with pytest.warns(UserWarning, match="2 self-loops"):
        assert np.array_equal(adjacency(D + np.diag([1, 2] + [0] * (N - 2))).toarray(), D)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adjacency(A)


def test_sparse_tensors_and_weights_follow_one_rule():
    coo = torch.tensor(D).to_sparse()
    for form in (coo, coo.to_sparse_csr()):
        assert np.array_equal(adjacency(form).toarray(), D)
    g = nx.DiGraph([(0, 1), (1, 2), (2, 0)])
    g.add_edge(0, 2, weight=0.0)
    W = nx.to_scipy_sparse_array(g)
    assert np.array_equal(adjacency(g).toarray(), adjacency(W).toarray())
    assert adjacency(g).nnz == 3 and adjacency(g, 3).shape == (3, 3)
    g.add_edge(1, 0, weight=-1.0)
    for form in (g, nx.to_scipy_sparse_array(g)):
        with pytest.raises(ValueError, match="weights below 0"):
            adjacency(form)


def test_tables_are_put_in_the_order_of_the_nodes():
    pd = pytest.importorskip("pandas")
    names = [f"n{i}" for i in range(N)]
    g = nx.DiGraph()
    g.add_nodes_from(names)
    g.add_edges_from((names[u], names[v]) for u, v in zip(*(w.tolist() for w in A.nonzero())))
    mask, X = np.arange(N) % 3 > 0, rng(2).standard_normal((N, 2))
    order = rng(3).permutation(N)
    table = lambda v: pd.DataFrame(v, index=names).iloc[order]
    y, m = table(Y)[0], table(mask)[0]
    assert not np.array_equal(y.to_numpy(), Y)
    want = fast(A, Y, mask=mask)
    assert fast(g, y, mask=m) == want == fast(g, Y, mask=mask)
    assert fast(g, y, mask=np.flatnonzero(mask)) == want
    assert fast(g, features=table(X)) == fast(A, features=X)
    assert np.array_equal(path_counts(g, y)["AA"], path_counts(A, Y)["AA"])
    assert np.allclose(propagate(g, table(X))["AA"], propagate(A, X)["AA"])
    for other in (y.reset_index(drop=True), y.iloc[1:]):
        with pytest.raises(ValueError, match="labels has an index"):
            amud(g, other)
    edges = pd.DataFrame([("a", "b"), ("b", "c"), ("c", "a")], columns=["from", "to"])
    for table in (edges, edges.assign(weight=1.0), edges[:2]):  # also 3 x 3 and 2 x 2
        with pytest.raises(ValueError, match="from_pandas_edgelist"):
            adjacency(table)
    square = pd.DataFrame(D, index=names, columns=names)
    assert np.array_equal(adjacency(square).toarray(), D)


FIRST = np.arange(N) > 4
SOME = [str(k) for k in Y[5:]]


@pytest.mark.parametrize("none", [-1, math.nan, None, ""])
def test_labels_that_stand_for_none_need_a_mask(none):
    if none in ("", None):
        hidden, known = [none] * 5 + SOME, np.array(["x"] * 5 + SOME)
    else:
        hidden, known = [none] * 5 + Y[5:].tolist(), Y
    kept = np.array(hidden, dtype=object)
    for labels in (hidden, kept):
        with pytest.raises(ValueError, match=f"labels holds 5 of {N} .*give mask="):
            fast(A, labels)
        assert fast(A, labels, mask=FIRST) == fast(A, known, mask=FIRST)
    with pytest.raises(ValueError, match="stand for no label"):
        fast(A, ["b", math.nan, *hidden[2:]], mask=np.arange(N) < 40)


def test_draws_that_cannot_reach_alpha():
    for name in ("permutations", "redirections"):
        with pytest.raises(
            ValueError, match=f"{name}=18: must be 0, or at least 19 for alpha=0.05"
        ):
            amud(A, Y, **{name: 18})
        assert amud(A, Y, **{name: 19}) and amud(A, Y, alpha=0.1, **{name: 9})
    assert amud(A, Y).test == "200 permutations"
    assert amud(A, Y, alpha=0.001).test.startswith("normal")


def test_masks_and_labels_of_the_training():
    known = Y > 0
    one = fit_adpa([PROP], [Y], [known], steps=2)[0](PROP)
    assert torch.equal(one, fit_adpa([PROP], [Y], [np.flatnonzero(known)], steps=2)[0](PROP))
    unread = np.where(known, Y, np.nan)
    assert torch.equal(one, fit_adpa([PROP], [unread], [known], steps=2)[0](PROP))


def test_connectome():
    for side, n, edges, kinds in (
        ("left", 209, 7425, [21, 101, 29, 58]),
        ("right", 213, 7536, [21, 100, 29, 63]),
    ):
        g, y = connectome(side)
        assert g.shape == (n, n) and g.nnz == edges and g.max() == 1
        assert np.bincount(y).tolist() == kinds
        w, _ = connectome(side, synapses=True)
        assert (w > 0).nnz == edges and w.max() in (63, 65)
        e = amud(g, y)
        assert e.directed and e.score > 0.85
    assert amud(*connectome("left")).r["AtA"] == pytest.approx(0.31, abs=0.005)  # card's figure


# --- propagation


def hat(G, r):
    d = G.sum(1)
    power = lambda e: np.where(d > 0, np.maximum(d, 1e-300) ** e, 0)
    return power(r - 1)[:, None] * G * power(-r)


@pytest.mark.parametrize("r", [0.0, 0.427, 1.0])
def test_two_sparse_products_are_the_dense_one(r):
    g, _ = dsbm([12, 13], [[0.05, 0.2], [0.02, 0.05]], 4)
    d = g.toarray()
    d[7] = d[:, 7] = 0  # an isolated node
    eye = np.eye(25)
    full = dict(A=d + eye, At=d.T + eye, AA=d @ d, AtAt=d.T @ d.T, AAt=d @ d.T, AtA=d.T @ d)
    X = rng(2).standard_normal((25, 3))
    got = propagate(d, X, hops=3, r=r)
    assert list(got) == list(NAMES)
    for k, G in full.items():
        want = [X]
        for _ in range(3):
            want.append(hat(G, r) @ want[-1])
        np.testing.assert_allclose(got[k], np.stack(want), atol=1e-12)
        np.testing.assert_allclose(
            normalize(directed_patterns(d)[k], r).matrix().toarray(), hat(G, r), atol=1e-12
        )
    np.testing.assert_allclose(got["A"][:, 7], np.stack([X[7]] * 4))
    assert (got["AAt"][1:, 7] == 0).all()


def test_scaling_is_that_of_gcn():
    # torch_geometric 2.8.1, gcn_norm with self-loops on the edges below, six nodes
    edges = [(0, 1), (1, 2), (2, 3), (0, 3), (3, 4)]
    g = nx.Graph(edges)
    g.add_node(5)
    a, b, c, o = 1 / 3, 0.28867513, 0.35355339, 0.0
    top = [[a, a, o, b, o, o], [a, a, a, o, o, o], [o, a, a, b, o, o]]
    low = [[b, o, b, 0.25, c, o], [o, o, o, c, 0.5, o], [o, o, o, o, o, 1.0]]
    GOLD = np.array(top + low)
    got = normalize(directed_patterns(g)["A"], 0.5).matrix().toarray()
    np.testing.assert_allclose(got, GOLD, atol=1e-7)  # eight digits are stored
    rows = normalize(directed_patterns(A)["A"], 0.0).matrix().sum(1)
    np.testing.assert_allclose(rows, 1)


def test_symmetric_graphs_have_equal_branches_and_forms_are_kept():
    U, X = to_undirected(A), rng().standard_normal((N, 2))
    got = propagate(U, X)
    np.testing.assert_allclose(got["A"], got["At"], atol=1e-14)
    for k in NAMES[3:]:
        np.testing.assert_allclose(got["AA"], got[k], atol=1e-13)
    t = torch.tensor(X, dtype=torch.float32)
    some = propagate(A, t, hops=1, patterns=("AtA", "A"))
    assert list(some) == ["AtA", "A"] and some["A"].shape == (2, N, 2)
    assert some["A"].dtype == torch.float32 and propagate(A, X)["A"].dtype == np.float64
    s = stack(propagate(A, X))
    assert s.shape == (N, 6, 3, 2)
    np.testing.assert_allclose(s.mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(s.square().mean(0), 1, atol=1e-5)
    plain = stack(propagate(A, X), standardize=False)
    np.testing.assert_allclose(plain[4, 2, 1], propagate(A, X)["AA"][1, 4], rtol=1e-6)
    reverse = propagate(A.T, X)
    np.testing.assert_allclose(reverse["AAt"], propagate(A, X)["AtA"])


# --- the network

PROP = stack(propagate(A, rng(5).standard_normal((N, 4))))


def test_hop_weights():
    net = ADPA(4, 3)
    with torch.no_grad():
        net.every.mul_(50)
        net.own.mul_(50)
        w = net.hops(PROP)
        assert w.shape == (N, 6, 3)
        torch.testing.assert_close(w.sum(-1), torch.ones(N, 6))
        low, high = 1 / (1 + 2 * math.e), math.e / (math.e + 2)
        assert low - 1e-6 < w.min() < low + 0.02 and high - 0.02 < w.max() < high + 1e-6
        # by hand, node 3 and pattern 1: the score of a hop from all hops of this node
        e = [(PROP[3, 1] * net.every[1]).sum() + PROP[3, 1, k] @ net.own[1] for k in range(3)]
        want = torch.stack(e).sigmoid().softmax(0)
        torch.testing.assert_close(w[3, 1], want)
        torch.testing.assert_close(net.hops(PROP[3:4])[0], w[3])  # other nodes have no part
        net.every.zero_()
        net.own.zero_()
        torch.testing.assert_close(net.hops(PROP), torch.full((N, 6, 3), 1 / 3))


@pytest.mark.parametrize("kind", ["original", "gate", "jk", "mean"])
def test_branches(kind):
    torch.manual_seed(0)
    net = ADPA(4, 3, hidden=5, attention=kind, dropout=0.0, hop_attention=False)
    x = torch.cat([PROP.mean(2), PROP[:, :1, 0]], 1)
    z = (torch.einsum("nbf,bfh->nbh", x, net.weight) + net.bias).relu()
    if kind == "original":
        folded = net.out.weight * net.scale.repeat_interleave(5)
        want = z.flatten(1) @ folded.T + net.out.bias
    else:
        a = net.branches(z)
        torch.testing.assert_close(a.sum(1), torch.ones(N))
        want = net.out((a[..., None] * z).sum(1))
        if kind == "mean":
            torch.testing.assert_close(a, torch.full((N, 7), 1 / 7))
        else:
            assert a.std() > 1e-3
    torch.testing.assert_close(net(PROP), want)
    assert net(PROP).shape == (N, 3)


def test_dropout_keeps_the_mean_and_dicts_are_taken():
    torch.manual_seed(0)
    net = ADPA(4, 3, dropout=0.3)
    one = PROP[:1].expand(20000, -1, -1, -1)
    free = net.eval()(PROP[:1])
    drawn = net.train()(one)
    room = 4 * drawn.std(0) / math.sqrt(20000)
    assert (abs(drawn.mean(0) - free[0]) < room).all() and drawn.std() > 0.01
    X = rng(5).standard_normal((N, 4))
    torch.testing.assert_close(net.eval()(propagate(A, X)), net(PROP))


def test_training_learns_and_graphs_do_not_mix():
    P = cyclic(1.0, background=0.01, extra=0.15)
    a, b = world(0, P, nodes=120), world(1, P, nodes=120)
    props = [stack(propagate(w[0], w[2])) for w in (a, b)]
    ys, masks = [w[1] for w in (a, b)], [w[3] for w in (a, b)]
    nets = fit_adpa(props, ys, masks)
    for net, p, y, m in zip(nets, props, ys, masks):
        assert not net.training
        fit, test = ((net(p).argmax(1).numpy() == y)[s].mean() for s in (m, ~m))
        assert fit > 0.95 and test > 0.5  # chance is 0.25
    # without dropout, a graph's network does not depend on its neighbour in the batch
    alone = fit_adpa(props[:1], ys[:1], masks[:1], steps=3, dropout=0.0)[0]
    pair = fit_adpa(props, ys, masks, steps=3, dropout=0.0)[0]
    torch.testing.assert_close(alone(props[0]), pair(props[0]), atol=1e-4, rtol=1e-3)
    hidden = [np.where(m, y, 0) for y, m in zip(ys, masks)]  # other labels are not read
    again = fit_adpa(props, hidden, masks, steps=3, dropout=0.0)[0]
    assert torch.equal(again(props[0]), pair(props[0]))


def test_bed_knows_its_oracle():
    got = amud_bed(range(2), labelled=0.5, steps=2, redirections=19)
    assert {len(v) for v in got.values()} == {2}
    means = {k: got[k].mean() for k in ("undirected", "directed", "baseline")}
    assert means["baseline"] == min(means["undirected"], means["directed"])
    one = amud_bed([1], labelled=0.5, steps=2)
    assert "turned" not in one and set(one) | {"turned"} == set(got)
    # with half of the labels the test by turned edges decides as the oracle does
    np.testing.assert_array_equal(got["turned"], got["oracle"])


def test_bed_counts_what_a_trained_network_gets_wrong():
    got = amud_bed([0], labelled=0.5, extra=0.3, steps=10)  # classes that are easy to see
    assert got["directed"][0] < 0.1 and got["undirected"][0] < 0.3  # by chance 0.75


def test_on_a_model_that_is_not_ours():
    g, y, X, mask = world(3, cyclic(1.0))
    graph = nx.from_scipy_sparse_array(g, create_using=nx.DiGraph)
    evidence = amud(graph, y, mask=mask, redirections=19)
    score = {}
    for name, form in (("directed", graph), ("undirected", to_undirected(graph))):
        Z = stack(propagate(form, X)).flatten(1).numpy()
        fitted = LogisticRegression(max_iter=300).fit(Z[mask], y[mask])
        score[name] = fitted.score(Z[~mask], y[~mask])
    assert evidence.directed and score["directed"] > score["undirected"] + 0.1


# --- errors


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: adjacency(np.ones((3, 4))), "shape"),
        (lambda: adjacency(-D), "below 0"),
        (lambda: adjacency(D * np.nan), "not finite"),
        (lambda: adjacency(np.zeros((3, 3))), "no edges"),
        (lambda: adjacency(sp.csr_array((3, 3))), "no edges"),
        (lambda: adjacency("graph"), "graph has shape"),
        (lambda: adjacency(np.ones((2, 2))), "nodes"),
        (lambda: adjacency(np.array([[0, 1, 2], [1, 2, 9]]), 5), "nodes 0 to 9"),
        (lambda: adjacency(np.array([[0, 1, 2.5], [1, 2, 0]]), 5), "integers"),
        (lambda: adjacency(np.array([[0, 1, 2], [1, 2, 0]]), "5"), "nodes='5'"),
        (lambda: adjacency(SimpleNamespace(edge_index=np.eye(2))), "nodes=None"),
        (lambda: amud(A), "labels and features"),
        (lambda: amud(A, Y, np.ones((N, 2))), "labels and features"),
        (lambda: amud(A, Y[:-1]), "labels has shape"),
        (lambda: amud(A, features=Y), "features has shape"),
        (lambda: amud(A, features=np.full((N, 2), np.nan)), "features holds"),
        (lambda: amud(A, np.full(N, np.nan)), "labels holds"),
        (lambda: amud(A, Y, mask=Y == 0), "1 classes"),
        (lambda: amud(A, np.arange(N)), "share a label"),
        (lambda: amud(A, Y, mask=np.ones(3, bool)), "mask has shape"),
        (lambda: amud(A, Y, mask=[0.5, 1.0]), "mask must be"),
        (lambda: amud(A, Y, mask=[1, 1, 2, 3]), "different nodes"),
        (lambda: amud(A, Y, mask=[0, 1, 2, 99]), "mask names"),
        (lambda: amud(A, Y, mask=[0, 1, 2]), "mask holds 3"),
        (lambda: amud(A, Y, threshold=1.5), "threshold=1.5"),
        (lambda: amud(A, Y, alpha="0.05"), "alpha='0.05'"),
        (lambda: amud(A, Y, reading="path"), "reading='path'"),
        (lambda: amud(A, Y, above=-1), "above=-1"),
        (lambda: amud(A, Y, permutations=True), "permutations=True"),
        (lambda: amud(A, Y, redirections=1.5), "redirections=1.5"),
        (lambda: amud(A, Y, sample=2, permutations=0), "sample=2"),
        (lambda: amud(A, Y, seed=None), "seed=None"),
        (lambda: amud(A, Y, shuffles=3), "unexpected keyword"),
        (lambda: path_counts(A, Y[:3]), "labels has shape"),
        (lambda: dsbm([3, 0], np.eye(2)), r"sizes\[1\]=0"),
        (lambda: dsbm([3, 3], np.eye(3)), "P="),
        (lambda: dsbm([3, 3], 2 * np.eye(2)), "P="),
        (lambda: cyclic(1.5), "direction=1.5"),
        (lambda: cyclic(1, 2), "classes=2"),
        (lambda: directed_patterns(A, 3), "order=3"),
        (lambda: normalize(directed_patterns(A)["A"], 2), "r=2"),
        (lambda: propagate(A, np.ones((3, 2))), "X has shape"),
        (lambda: propagate(A, np.full((N, 2), np.inf)), "not finite"),
        (lambda: propagate(A, np.ones((N, 2)), hops=0), "hops=0"),
        (lambda: propagate(A, np.ones((N, 2)), patterns=("A", "AT")), "patterns='AT'"),
        (lambda: propagate(A, np.ones((N, 2)), patterns="AA"), "patterns='AA'"),
        (lambda: ADPA(0, 3), "features=0"),
        (lambda: ADPA(4, 1), "classes=1"),
        (lambda: ADPA(4, 3, dropout=1.0), "dropout=1.0"),
        (lambda: ADPA(4, 3, attention="sum"), "attention='sum'"),
        (lambda: ADPA(4, 3)(PROP[:, :, :2]), "prop has shape"),
        (lambda: fit_adpa([PROP], [Y], [Y > 0], hidde=3), "unexpected keyword"),
        (lambda: fit_adpa([PROP] * 2, [Y] * 2, [Y > 0, Y > 1]), "one size"),
        (lambda: fit_adpa([PROP], [Y], [1 * (Y > 0)]), r"masks\[0\] must be booleans"),
        (lambda: fit_adpa([PROP], [Y], [Y > 9]), r"masks hold \[0\]"),
        (lambda: fit_adpa([PROP], [Y - 1], [Y < 2]), r"labels\[0\] holds -1"),
        (lambda: fit_adpa([PROP], [Y + 0.5], [Y < 2]), "integers from 0"),
        (lambda: fit_adpa([PROP], [Y.astype(str)], [Y < 2]), "integers from 0"),
        (lambda: fit_adpa([PROP], [Y[1:]], [Y < 2]), f"must be {N} integers"),
        (lambda: fit_adpa([], [], []), "at least one"),
        (lambda: amud(A, Y, alpha=0), "alpha=0: must be a number above 0"),
        (lambda: adjacency(A, N + 1), f"nodes={N + 1}: the graph has {N}"),
        (lambda: adjacency(nx.path_graph(3), 4), "nodes=4: the graph has 3"),
        (
            lambda: adjacency(SimpleNamespace(edge_index=np.array([[0], [1]]), num_nodes=3), 2),
            "num_nodes=3",
        ),  # fmt: skip
        (lambda: world(0, cyclic(1), labelled=0), "labelled=0"),
        (lambda: connectome("middle"), "side='middle'"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
