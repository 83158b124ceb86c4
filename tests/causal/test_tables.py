"""Tables as people have them: units, labels, kinds of columns, too few rows. Each is right, or
refused in the user's words."""

import datetime as dt
import json
import time
import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest
import torch

from diffkit.causal import dag
from diffkit.causal.colide import colide
from diffkit.causal.dag import (
    covariance,
    dagma,
    fit_given_order,
    golem,
    noise_scale,
    notears,
    plot_dag,
    random_dag,
    random_weights,
    sem_covariance,
    sort_n_regress,
    tied_columns,
)
from diffkit.causal.domain_counterfactuals import fit_domains
from diffkit.causal.topo import linear_nodes, topo

SHORT = dict(iters=(150, 150, 150, 400), lr=2e-2, decay=True)
BRIEF = dict(iters=(2,) * 4)  # where the graph does not matter
FITS = {"colide": lambda x, **kw: colide(x, **SHORT, **kw), "topo": topo}


def table(n=500):
    rng = np.random.default_rng(0)
    a = rng.normal(size=n)
    b = 1.5 * a + rng.normal(size=n)
    c = -1.2 * b + 0.8 * a + rng.normal(size=n)
    return pd.DataFrame(dict(a=a, b=b, c=c, d=rng.normal(size=n)))


def quiet(f, *args, **kw):  # the result, and what was warned
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        out = f(*args, **kw)
    return out, [str(w.message) for w in said]


# units


@pytest.mark.parametrize("variance", ["equal", "unequal"])
@pytest.mark.parametrize("unit", [1e-9, 1e-3, 1e9])
def test_a_common_unit_changes_nothing_in_colide(unit, variance):
    kw = dict(variance=variance, **SHORT)
    one, other = (quiet(colide, table() * c, **kw)[0] for c in (1.0, unit))
    assert len(one.edges()) == 3
    np.testing.assert_allclose(other.raw, one.raw, atol=1e-6)
    np.testing.assert_allclose(other.sigma, unit * one.sigma, rtol=1e-6)
    C = covariance(table().to_numpy())
    np.testing.assert_allclose(colide(cov=C * unit**2, **kw).raw, one.raw, atol=1e-6)
    both = colide(cov=np.stack([C, C * unit**2]), **kw)  # each graph of a batch has its own unit
    np.testing.assert_allclose(both.raw[1], one.raw, atol=1e-6)
    np.testing.assert_allclose(both.sigma[1], unit * one.sigma, rtol=1e-6)


def test_the_unit_can_be_left_alone():
    "As in the paper: then a unit decides. Where the noise has size 1 it is the same."
    kw = dict(normalize=False, **SHORT)
    counts = [len(quiet(colide, table() * c, **kw)[0].edges()) for c in (1e-9, 1.0)]
    assert counts == [0, 3]
    W = random_weights(random_dag(6, 8, generator=0), generator=0)
    S = sem_covariance(W)
    np.testing.assert_allclose(
        colide(cov=S, **kw).raw, colide(cov=S, **SHORT).raw, rtol=0, atol=1e-8
    )


@pytest.mark.parametrize("lam", [0.0, 0.5])
def test_a_common_unit_changes_nothing_in_topo(lam):
    one, *others = (quiet(topo, table() * c, lam=lam)[0] for c in (1.0, 1e-9, 1e9))
    for other in others:
        np.testing.assert_allclose(other.raw, one.raw, rtol=1e-6)


def test_noise_scale_is_that_of_the_noise():
    for seed in range(10):
        W = random_weights(random_dag(9, 20, generator=seed), generator=seed)
        v = torch.rand(9, generator=torch.Generator().manual_seed(seed)).double() + 0.1
        S = sem_covariance(W, v)
        assert abs(noise_scale(S) / v.log().mean().exp().sqrt() - 1) < 1e-9
        assert abs(noise_scale(1e-18 * S) / noise_scale(S) - 1e-9) < 1e-16


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("factor", [1e-6, 1e3])
def test_one_column_in_another_unit_is_said_once_with_numbers(fit, factor):
    df = table()
    df["d"] *= factor
    _, said = quiet(FITS[fit], df)
    assert len(said) == 1 and "the standard deviations go from" in said[0]
    for j in (df.std(ddof=0).idxmin(), df.std(ddof=0).idxmax()):
        assert f"{df[j].std(ddof=0):.2g} ({j!r})" in said[0]


def test_warnings_point_to_the_line_of_the_caller():
    df = table()
    calls = [
        lambda: colide(df, **SHORT),
        lambda: colide(df.assign(e=df.a), **BRIEF),
        lambda: topo(df),
        lambda: topo(df.assign(e=df.a), lam=0.1),
        lambda: dagma(1e9 * covariance(df), **BRIEF),
        lambda: dag.warn_table(covariance(df), np.zeros((4, 4)), 3),
        lambda: dag.warn_table(covariance(df / df.std()), np.zeros((4, 4)), 9),
    ]
    for call in calls:
        with pytest.warns(UserWarning) as said:
            call()
        assert {w.filename for w in said} == {__file__}


def test_peers_that_have_a_unit_say_so():
    C = covariance(table().to_numpy())
    for f in (lambda c: dagma(c, **BRIEF), lambda c: notears(c, max_iter=1)):
        assert quiet(f, C)[1] == []
        for unit in (1e-9, 1e9):
            said = quiet(f, C * unit**2)[1]
            assert len(said) == 1 and f"{noise_scale(C) * unit:.2g}" in said[0]
    for variance in ("equal", "unequal"):  # GOLEM has none
        a, b = (golem(C * u, variance, iters=50) for u in (1.0, 1e-18))
        np.testing.assert_allclose(a.raw, b.raw, atol=1e-6)


def test_asymmetry_is_seen_in_any_unit():
    C = np.triu(np.ones((3, 3)))
    for unit in (1e-18, 1.0, 1e18):
        with pytest.raises(ValueError, match="cov must be symmetric"):
            colide(cov=C * unit, **BRIEF)


# labels

LABELS = {
    "ints": range(4),
    "tuples": [("x", 1), ("x", 2), ("y", 1), ("y", 2)],
    "levels": pd.MultiIndex.from_product([["x", "y"], [1, 2]]),
    "mixed": ["a", 1, 2.5, ("b", 3)],
    "numpy": np.array(["p", "q", "r", "s"]),
    "days": pd.date_range("2020", periods=4),
}


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_nodes_are_the_labels_of_the_frame(labels, fit):
    df = table().set_axis(labels, axis=1)
    found, _ = quiet(FITS[fit], df)
    base, _ = quiet(FITS[fit], table())
    assert found.names == list(df.columns) and list(found.to_networkx()) == list(df.columns)
    at = dict(zip("abcd", df.columns))
    assert found.edges() == [(at[p], at[q], w) for p, q, w in base.edges()]
    for cause, effect, _ in found.edges():
        assert df[cause].shape == df[effect].shape == (500,)
        assert type(cause) in (type(c) for c in df.columns)


@pytest.mark.parametrize("fit", FITS)
def test_nodes_of_an_array_are_plain_numbers(fit):
    X = table().to_numpy()
    for x in (X, torch.tensor(X), X.tolist()):
        found = FITS[fit](x)
        assert {(p, q) for p, q, _ in found.edges()} == {(0, 1), (0, 2), (1, 2)}
        assert all(type(v) is int for p, q, _ in found.edges() for v in (p, q))
        assert json.dumps(found.edges()) and list(found.to_networkx()) == [0, 1, 2, 3]


def test_names_may_be_an_index_or_an_array():
    X = table()
    for names in (X.columns, np.array(list("abcd")), tuple("abcd")):
        for f in (
            lambda n: topo(X.to_numpy(), names=n),
            lambda n: colide(X.to_numpy(), names=n, **BRIEF),
            lambda n: sort_n_regress(covariance(X.to_numpy()), names=n),
        ):
            assert f(names).names == list("abcd") and type(f(names).names[0]) is str
    with pytest.raises(ValueError, match="names must have 4 different"):
        topo(X, names=list("abca"))


# columns that determine one another

TIED = {
    "a copy": (lambda t: t.a, "ae"),
    "in another unit": (lambda t: -3.7e6 * t.a + 2, "ae"),
    "a copy but for rounding": (lambda t: t.a.astype("float32").astype(float), "ae"),
    "a combination": (lambda t: t.a + 2 * t.b - t.c, "abce"),
    "a small part": (lambda t: t.d + 1e-2 * t.a, "ade"),
}


@pytest.mark.parametrize("make, named", TIED.values(), ids=TIED)
@pytest.mark.parametrize("shift", [0.0, 1e6])
def test_tied_columns_are_named(make, named, shift):
    df = table()
    df = df.assign(e=make(df)) + shift
    for columns in ("abcde", "edcba", "cebad"):
        t = df[list(columns)] * 1e-7
        (group,) = tied_columns(covariance(t))
        names = [columns[j] for j in group]
        assert sorted(names) == list(named)
        told = ", ".join(map(repr, names[:-1])) + f" and {names[-1]!r} determine one another"
        with pytest.raises(ValueError, match=told):
            topo(t)
        assert any(told in m for m in quiet(colide, t, **BRIEF)[1])
        assert any(told in m for m in quiet(topo, t, lam=0.1)[1])
        with pytest.raises(ValueError, match=told):
            fit_domains(t.assign(lab=np.arange(len(t)) % 2), "lab", iters=1)


def test_tied_columns_of_arrays_and_covariances_are_numbered():
    X = table().to_numpy()
    X = np.c_[X, X[:, 1]]
    C = covariance(X)
    told = "columns 1 and 4 determine one another"
    for f in (
        lambda: topo(X),
        lambda: topo(cov=C),
        lambda: topo(np.stack([np.random.default_rng(0).normal(size=X.shape), X])),
        lambda: fit_given_order(C, [4, 3, 2, 1, 0]),
        lambda: linear_nodes(C),
    ):
        with pytest.raises(ValueError, match=told):
            f()
    for kw in (dict(X=X), dict(cov=C), dict(X=np.stack([X[:, ::-1], X]))):
        said = quiet(colide, **kw, **BRIEF)[1]
        assert len(said) == 1 and "determine one another" in said[0]
    for seed in range(20):  # whatever sign the rounding of a pivot has
        x = np.random.default_rng(seed).normal(size=(50, 4))
        c = covariance(np.c_[x, (1 + seed) * x[:, 0] + x[:, 1] / 3])
        with pytest.raises(ValueError, match="determine one another"):
            fit_given_order(c, np.random.default_rng(seed).permutation(5))
    assert linear_nodes(C, l1=0.1) and tied_columns(covariance(X[:, :4])) == []
    many = X[:, :1] * np.arange(1, 9)
    with pytest.raises(ValueError, match="columns 0, 1, 2, 3, 4 and 3 more"):
        topo(many)


def test_strong_dependence_is_no_tie():
    "Dense graphs leave little of a variance; that is no rounding."
    for seed in range(3):
        W = random_weights(random_dag(60, 240, generator=seed), generator=seed)
        assert tied_columns(sem_covariance(W)) == []


# kinds of columns

FINE = {
    "bool": lambda d: d > 0,
    "integers": lambda d: (10 * d).astype("int8"),
    "nullable, nothing missing": lambda d: (10 * d).round().astype("Int64"),
    "numbers as objects": lambda d: d.astype(object),
    "decimals": lambda d: d.map(lambda v: Decimal(f"{v:.5f}")),
    "sparse": lambda d: d.astype(pd.SparseDtype(float)),
    "single precision": lambda d: d.astype("float32"),
}
days = pd.date_range("2020-01-01", periods=500)
REFUSED = {  # what: (column, words)
    "Int64 with missing": (pd.array([1, None] * 250, dtype="Int64"), "Int64.*250 missing"),
    "Float64 with missing": (pd.array([1.5, None] * 250, dtype="Float64"), "Float64.*250 missing"),
    "boolean with missing": (pd.array([True, None] * 250, dtype="boolean"), "boolean.*250 missing"),
    "objects with missing": (np.array([1.0, None] * 250, object), "object.*250 missing"),
    "NaN": ([0.5, np.nan] * 250, "float64.*250 missing values: drop"),
    "one NaN": ([np.nan] + [0.5, 1.5] * 249 + [2.0], "1 missing value:"),
    "infinite": ([0.5, np.inf] * 250, "float64.*250 infinite"),
    "dates": (days, "datetime64.*'2020-01-01.*days since the first"),
    "dates with a zone": (days.tz_localize("UTC"), "datetime64.*UTC.*'2020-01-01"),
    "dates as objects": (np.array([dt.date(2020, 1, 1)] * 500, object), "object.*'2020-01-01'"),
    "durations": (days - days[0], "timedelta64.*no real numbers"),
    "periods": (days.to_period("D"), "period.*'2020-01-01'"),
    "text": (["x", "y"] * 250, "dtype.*'x'.*to_numeric"),
    "digits as text": (["1.5", "2.5"] * 250, "dtype.*'1.5'.*to_numeric"),
    "categories": (pd.Categorical(["x", "y"] * 250), "category.*'x'.*get_dummies"),
    "numbers as categories": (pd.Categorical([1, 2] * 250), "category.*'1'"),
    "complex": (np.arange(500) * 1j, "complex128"),
    "one word among numbers": (np.array([1.0] * 499 + ["x"], object), "object.*'x'"),
}
READERS = FITS | {
    "covariance": covariance,
    "fit_domains": lambda t: fit_domains(
        t, np.arange(len(t)) % 2, columns=list(t.columns), k=1, starts=1, iters=1
    ),
}


@pytest.mark.parametrize("make", FINE.values(), ids=FINE)
@pytest.mark.parametrize("fit", READERS)
def test_columns_of_numbers(fit, make):
    df = table()
    df["d"] = make(df.d)
    out, _ = quiet(READERS[fit], df)
    if fit == "topo":
        plain, _ = quiet(topo, df.astype(float))
        np.testing.assert_allclose(out.raw, plain.raw, rtol=1e-5)


@pytest.mark.parametrize("column, words", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("fit", READERS)
def test_columns_that_are_no_numbers_are_refused_by_name(fit, column, words):
    df = table().assign(d=column)
    with pytest.raises((ValueError, TypeError), match="column 'd'.*" + words) as e:
        READERS[fit](df)
    assert "float()" not in str(e.value) and "NAType" not in str(e.value)


def test_arrays_of_objects_and_masked_arrays():
    X = table().to_numpy()
    objects = X.astype(object)
    np.testing.assert_allclose(covariance(objects), covariance(X), rtol=1e-12)
    objects[2, 1] = pd.NA
    with pytest.raises(ValueError, match="column 1, holds 1 missing value"):
        covariance(objects)
    objects[2, 1] = "x"
    with pytest.raises(TypeError, match="column 1, has dtype object.*'x'"):
        covariance(objects)
    with pytest.raises(ValueError, match="column 3, holds 1 missing"):
        covariance(np.ma.array(X, mask=np.arange(X.size).reshape(X.shape) == 7))


# tables that are none

NONE = {
    "no columns": (lambda t: t[[]], "no columns"),
    "nothing": (lambda t: pd.DataFrame(), "no columns"),
    "an array without columns": (lambda t: np.zeros((5, 0)), "no columns"),
    "one column": (lambda t: t[["a"]], "one column, 'a'"),
    "one column of an array": (lambda t: t[["a"]].to_numpy(), "one column, 0"),
    "no rows": (lambda t: t[:0], "0 rows"),
    "one row": (lambda t: t[:1], "1 row:"),
    "a constant column": (lambda t: t.assign(c=7.0), "constant column: 'c'"),
    "constant but for rounding": (
        lambda t: t.assign(c=np.where(t.a > 0, 0.1 + 0.2, 0.3)),
        "constant column: 'c'",
    ),
    "twice the same name": (
        lambda t: t.set_axis(list("abca"), axis=1),
        "2 columns of the name 'a'",
    ),
    "twice the same number": (
        lambda t: t.set_axis([1, 2, 2, 2], axis=1),
        "3 columns of the name 2",
    ),
    "a column": (lambda t: t.a, "table of rows and columns"),
    "a number": (lambda t: 3.0, "table of rows and columns"),
    "a dict": (lambda t: dict(t), "pd.DataFrame"),
    "text": (lambda t: "table.csv", "numeric, got str"),
    "rows of two lengths": (lambda t: [[1.0, 2.0], [3.0]], "rows differ in length"),
    "too large a unit": (lambda t: t * [1, 1, 1e200, 1], "column 'c'.*another unit"),
    "too small a unit": (lambda t: t * [1, 1, 1, 1e-200], "column 'd'.*another unit"),
}


@pytest.mark.parametrize("make, words", NONE.values(), ids=NONE)
@pytest.mark.parametrize("fit", FITS)
def test_tables_that_are_none_are_refused_before_any_work(fit, make, words, monkeypatch):
    for work in ("follow_path", "_fit"):
        monkeypatch.setattr(dag, work, None)
    with pytest.raises((ValueError, TypeError), match=words):
        FITS[fit](make(table()))


# more columns than rows


@pytest.mark.parametrize("fit", FITS)
def test_a_transposed_table_comes_back_at_once(fit):
    df = table(1000).assign(e=np.arange(1000.0)).T
    start = time.monotonic()
    with pytest.raises(ValueError, match="5 rows for 1000 columns.*lam > 0.*transpose"):
        FITS[fit](df)
    assert time.monotonic() - start < 5


def test_few_rows_and_a_penalty_of_ones_own():
    X = table().to_numpy()[:4]
    with pytest.raises(ValueError, match="4 rows for 4 columns"):
        colide(X, lam=0.0)
    began = []
    kw = dict(iters=(2,) * 4, checkpoint=1, callback=lambda *a: began.append(len(said)))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        colide(X, lam=0.5, **kw)
    assert "4 rows for 4 columns" in str(said[0].message) and began[0] == 1  # before the work
    assert "4 rows for 4 columns" in quiet(topo, X, lam=0.1)[1][0]


# bars


class Clock:
    "A second for every look."

    def __init__(self, step):
        self.now, self.step = 0.0, step

    def __call__(self):
        self.now += self.step
        return self.now


RUNS = {
    "colide": lambda **kw: colide(table().to_numpy(), **BRIEF, **kw),
    "dagma": lambda **kw: dagma(covariance(table().to_numpy()), **BRIEF, **kw),
    "golem": lambda **kw: golem(covariance(table().to_numpy()), iters=10, **kw),
    "notears": lambda **kw: notears(covariance(table().to_numpy()), max_iter=1, **kw),
    "topo": lambda **kw: topo(table().to_numpy(), order=[3, 2, 1, 0], **kw),
    "fit_domains": lambda **kw: fit_domains(
        table().to_numpy(), np.arange(500) % 2, k=1, starts=1, iters=10, **kw
    ),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize(
    "seconds, progress, shows",
    [(0.0, None, False), (10.0, None, True), (10.0, False, False), (0.0, True, True)],
)
def test_long_runs_show_a_bar(run, seconds, progress, shows, monkeypatch, capsys):
    monkeypatch.setattr(dag.time, "monotonic", Clock(seconds))
    RUNS[run](progress=progress)
    assert ("it/s" in capsys.readouterr().err) == shows


def test_a_bar_by_an_estimate(monkeypatch, capsys):
    "After half a second, and only where the whole would take more than five."
    clock = Clock(0.0)
    monkeypatch.setattr(dag.time, "monotonic", clock)
    for total, shows in ((1000, True), (50, False)):
        bar, clock.now = dag._Bar(total, None, "run"), clock.now + 0.6
        bar.to(10)
        assert (bar.bar is not None) == shows
        bar.to(20)
        bar.close()
    assert "20/1000" in capsys.readouterr().err or shows is False


# drawing


def test_weights_stand_in_the_drawing():
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    W = np.array([[0, 1.5, -0.25], [0, 0, 12.345], [0, 0, 0]])
    words = lambda ax: [t.get_text() for t in ax.texts]
    ax = plot_dag(W, names=[0, ("b", 1), "c"])
    assert {"1.5", "-0.25", "12", "0", "('b', 1)", "c"} == {w for w in words(ax) if w}
    for label, want in (("1.5", 0.5), ("-0.25", 0.5)):  # at its arrow, not at a node
        t = next(t for t in ax.texts if t.get_text() == label)
        (x, y), nodes = t.get_position(), [u.get_position() for u in ax.texts if u.get_bbox_patch()]
        assert min(np.hypot(x - p, y - q) for p, q in nodes) > 0.1 * want
    assert {w for w in words(plot_dag((W != 0) * 1.0, list("abc"))) if w} == set("abc")
    drawn = topo(table().to_numpy()).plot()
    assert any(w.startswith("-1.2") for w in words(drawn))
    plt.close("all")


# domains


def test_fit_domains_reads_labels_and_refuses_by_name():
    df = table(90).assign(site=np.array(list("xyz"))[np.arange(90) % 3])
    kw = dict(k=1, starts=1, iters=2)
    for labels in (range(5), [("m", 1), ("m", 2), ("m", 3), ("m", 4), ("s", 0)]):
        t = df.set_axis(labels, axis=1)
        fit = fit_domains(t, t.columns[-1], **kw)
        assert fit.columns == list(t.columns[:-1]) and fit.by == t.columns[-1]
        assert list(fit(t, "x").columns) == list(t.columns)
    fit = fit_domains(df, "site", **kw)
    X = df[list("abcd")].to_numpy()
    for values in (np.arange(90) % 3, torch.arange(90) % 3):
        assert [type(v) for v in fit_domains(X, values, **kw).domains] == [int] * 3
    refusals = [
        (lambda: fit_domains(df, 7, **kw), "domain must be a column of the table, got 7"),
        (lambda: fit_domains(X, "site", **kw), "domain must have one value a row"),
        (lambda: fit_domains(df[["site"]], "site", **kw), "no columns of numbers"),
        (lambda: fit_domains(df, "site", columns=["q"], **kw), "no column 'q'"),
        (
            lambda: fit_domains(df.set_axis(list("abcc") + ["site"], axis=1), "site", **kw),
            "2 columns of the name 'c'",
        ),
        (lambda: fit_domains(X[:4].T[:, :4], list("abab"), **kw), "4 rows for 4 columns"),
        (
            lambda: fit_domains(df.assign(site=pd.array(["x", None, "y"] * 30)), "site", **kw),
            "30 missing",
        ),
        (
            lambda: fit_domains(df.assign(b=df.b.where(df.site != "y", 2.0)), "site", **kw),
            "column 'b' is constant in domain 'y'",
        ),
        (lambda: fit(df[["a", "b", "c", "site"]], "x"), "no column 'd'"),
        (lambda: fit(df[list("abcd")], "x"), "domain must be given.*'site'"),
        (lambda: fit(X[:, :3], "x", df.site), "must have the 4 columns"),
        (lambda: fit(df.assign(a=pd.array([1, None] * 45, dtype="Int64")), "x"), "column 'a'.*45"),
    ]
    for call, words in refusals:
        with pytest.raises((ValueError, TypeError), match=words):
            call()
