"""Adaptive guidance, policies and LinearAG: against a plain loop written by hand, closed forms,
and properties on random input."""

import copy
import warnings

import pytest
import torch
from diffkit.core.data import ring
from diffkit.core.denoiser import (
    MixtureDenoiser,
    NetDenoiser,
    Prediction,
    cfg,
    contrast,
    count_evals,
)
from diffkit.core.process import EDM, VE, VP, Cosine, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Heun, sample
from diffkit.guidance.adaptive_guidance import (
    Alignment,
    LinearAG,
    adaptive_cfg,
    alignment,
    check_plan,
    cosine,
    linear_plan,
    policy,
)
from diffkit.guidance.apg import apg
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

F64 = torch.float64
SOLVERS = [DDIM(), DDIM(0.5), Ancestral(), Heun(), DPMSolverPP(2), DPMSingle(2)]


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(process=None):  # a made-up conditional network with a null label
    return NetDenoiser(
        lambda x, t, label: torch.sin(3 * x + label[:, None]) + t[:, None].to(x),
        process or VP(),
        "v",
        null={"label": 0},
    )


def run(d, solver=None, x=None, label=None, grid=None, n=8, seed=0):
    x = randn(n, 2, seed=seed) if x is None else x
    label = torch.arange(len(x)) if label is None else label
    return sample(
        d,
        solver or DDIM(),
        x,
        time_grid(d.process, 12) if grid is None else grid,
        cond={"label": label},
        generator=torch.Generator().manual_seed(3),
        progress=False,
    )


# --- the cosine


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3),
    st.integers(0, 10**6),
    st.floats(-30, 30),
    st.floats(-30, 30),
)
def test_cosine(shape, seed, a, b):
    x, y = randn(3, *shape, seed=seed), randn(3, *shape, seed=seed + 1)
    c = cosine(10**a * x, 10**b * y)
    assert c.shape == (3,) and (c.abs() <= 1).all()
    assert_close(
        c,
        torch.nn.functional.cosine_similarity(x.reshape(3, -1), y.reshape(3, -1), dim=1, eps=0.0),
        rtol=1e-9,
        atol=1e-9,
    )
    assert (cosine(x, x) > 1 - 1e-12).all() and not (cosine(x, x) > 1).any()


def test_cosine_edges():
    assert cosine(torch.zeros(2, 3), torch.ones(2, 3)).tolist() == [0.0, 0.0]
    assert cosine(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)
    assert cosine(
        torch.full((1, 64), 6e4).half(), torch.full((1, 64), 6e4).half()
    ).item() == pytest.approx(1.0)
    with pytest.raises(ValueError, match="one shape"):
        cosine(randn(2, 3), randn(3, 2))


# --- adaptive guidance


def by_hand(d, w, threshold, space, x, label, grid):
    "The method in a plain loop, one sample at a time."
    out, evals = [], 0
    for i in range(len(x)):
        z, lab, guided = x[i : i + 1], label[i : i + 1], True
        solver = DDIM()
        solver.start(d.process, grid)
        for t, s in zip(grid.tolist(), grid.tolist()[1:]):
            c = d(z, t, label=lab)
            evals += 1
            p = c
            if guided:
                u = d(
                    z,
                    t,
                    **(
                        {"label": None}
                        if isinstance(d, MixtureDenoiser)
                        else {"label": torch.zeros_like(lab)}
                    ),
                )
                evals += 1
                p = Prediction.of(z, t, d.process, x0=w * c.x0 + (1 - w) * u.x0)
                a, b = c.get(space).flatten(), u.get(space).flatten()
                guided = not (a @ b / (a.norm() * b.norm())).item() > threshold
            z = solver.step(lambda *_, p=p: p, z, t, s)
        out.append(z)
    return torch.cat(out), evals / len(x)


@pytest.mark.parametrize("process", [VP(), Cosine(), VE(), EDM(), Flow()], ids=repr)
@pytest.mark.parametrize("space,threshold", [("x0", 0.8), ("x0", 0.99), ("eps", 0.995), ("v", 0.9)])
def test_as_by_hand(process, space, threshold):
    grid = time_grid(process, 9, start=process.t_max)
    for d, label in (
        (MixtureDenoiser(ring(), process), torch.arange(8)),
        (net(process), torch.arange(8) + 1),
    ):
        x = randn(8, 2) * process.sigma(process.t_max)
        want, evals = by_hand(d, 3.0, threshold, space, x, label, grid)
        guided = adaptive_cfg(d, 3.0, threshold, space)
        with count_evals(guided) as n:
            assert_close(run(guided, None, x, label, grid), want, rtol=1e-7, atol=1e-7)
        assert n.rows / 8 == evals


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_threshold_one_is_cfg_to_the_last_bit(solver):
    for d in (MixtureDenoiser(ring(), VP()), net()):
        for kwargs in ({}, dict(space="eps"), dict(batched=False), dict(interval=(0.2, 0.7))):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert torch.equal(
                    run(adaptive_cfg(d, 4.0, 1.0, **kwargs), solver),
                    run(cfg(d, 4.0, **{k: v for k, v in kwargs.items() if k != "space"}), solver),
                )
    assert torch.equal(
        run(adaptive_cfg(net(), lambda t: 1 + 3 * t, 1.0), solver),
        run(cfg(net(), lambda t: 1 + 3 * t), solver),
    )


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_counts_and_memory_under_every_solver(solver):
    d = adaptive_cfg(MixtureDenoiser(ring(), VP()), 4.0, 0.8)
    with warnings.catch_warnings(), count_evals(d) as n:
        warnings.simplefilter("error")  # no time goes up
        first = run(d, solver)
    # sample starts the memory afresh
    assert torch.equal(first, run(d, solver)) and torch.isfinite(first).all()
    on = torch.stack([h[2] for h in d.history])
    assert (on[1:] <= on[:-1]).all() and on[0].all() and not on[-1].all()  # who has left stays away
    times = [float(h[0]) for h in d.history]
    # one entry a time
    assert times == sorted(times, reverse=True) and len(set(times)) == len(times)
    if solver.evals_per_step == 1:
        assert n.rows == 8 * 12 + on.sum().item()
    for (_, c, was), (_, _, then) in zip(d.history, d.history[1:]):
        assert torch.equal(then, was & ~(c > 0.8))


def test_extremes():
    d = net()
    for th, rows in ((-1.0, 13), (1.0, 24)):
        g = adaptive_cfg(d, 4.0, th)
        with count_evals(g) as n:
            run(g)
        assert n.rows == 8 * rows
    g = adaptive_cfg(d, 1.0, -1.0)
    with count_evals(g) as n:
        out = run(g)
    assert torch.equal(out, run(d)) and n.rows == 96 and g.history == []
    g = adaptive_cfg(d, 4.0, -1.0, after=0.5)
    run(g)
    # the first time at or below one half is the last guided one
    assert [bool(h[2].all()) for h in g.history] == [float(h[0]) > 0.5 - 1 / 12 for h in g.history]


@pytest.mark.parametrize("batched", [True, False])
def test_one_call_a_step_while_all_are_guided(batched):
    """One doubled call (or two) while nobody has left, two while some have, one afterwards; an
    own bad denoiser is called by itself."""
    calls = []
    d = NetDenoiser(
        lambda x, t, label: calls.append(len(x)) or torch.sin(3 * x + label[:, None]),
        VP(),
        "v",
        null={"label": 0},
    )
    together = [16] if batched else [8, 8]
    for bad, all_on in ((None, together), (d, [8, 8])):
        g = adaptive_cfg(d, 4.0, 0.4, bad=bad, batched=batched)
        phases = set()
        for i, t in enumerate(time_grid(VP(), 12).tolist()[:-1]):
            calls.clear()
            g(randn(8, 2, seed=i), t, label=torch.arange(8))
            on = int(g.history[-1][2].sum())
            assert calls == ([8] if on == 0 else all_on if on == 8 else [8, on])
            phases.add("all" if on == 8 else "some" if on else "none")
        # a bad denoiser that is the good one: all leave at once
        assert phases == ({"all", "some", "none"} if bad is None else {"all", "none"})


def test_after_per_time():
    "At times above 1 - after nobody leaves, whatever the cosine."
    g = adaptive_cfg(net(), 4.0, -1.0, after=0.5)
    x, label = randn(4, 2), torch.arange(4)
    for t, on in ((0.9, 4), (0.6, 4), (0.5, 4), (0.4, 0)):
        g(x, t, label=label)
        assert g.history[-1][2].sum() == on


def test_scale_per_sample_and_in_time():
    w = torch.tensor([1.0, 3.0, 1.0, 5.0], dtype=F64)
    x, label = randn(4, 2), torch.arange(4) + 1
    out = run(adaptive_cfg(net(), w, 0.8), None, x, label)
    for i in range(4):
        assert_close(
            out[i : i + 1],
            run(adaptive_cfg(net(), w[i].item(), 0.8), None, x[i : i + 1], label[i : i + 1]),
        )
    g = adaptive_cfg(net(), lambda t: 4.0 if t > 0.5 else 1.0, 1.0)
    with count_evals(g) as n:
        assert_close(run(g), run(cfg(net(), lambda t: 4.0 if t > 0.5 else 1.0)))
    assert n.rows == 8 * (12 + (time_grid(VP(), 12)[:-1] > 0.5).sum())
    with pytest.raises(ValueError, match="one entry a sample"):
        adaptive_cfg(net(), w, 0.8)(randn(3, 2), 0.5, label=torch.arange(3))


def test_times_per_sample():
    ts = torch.tensor(
        [[0.9, 0.8, 0.7, 0.95], [0.6, 0.7, 0.7, 0.5], [0.3, 0.2, 0.6, 0.4]], dtype=F64
    )
    x, y = randn(4, 2), torch.arange(4)
    for d in (MixtureDenoiser(ring(), VP()), net()):
        whole, single = adaptive_cfg(d, 4.0, 0.7), [adaptive_cfg(d, 4.0, 0.7) for _ in range(4)]
        for t in ts:
            assert_close(
                whole(x, t, label=y).x0,
                torch.cat(
                    [single[i](x[i : i + 1], t[i].item(), label=y[i : i + 1]).x0 for i in range(4)]
                ),
            )
        assert torch.equal(whole.history[-1][2], torch.cat([s.history[-1][2] for s in single]))


def test_negative_prompt_and_other_conditions():
    d = NetDenoiser(
        lambda x, t, label, text=None, mode="a": (
            torch.sin(3 * x + label[:, None]) + (0 if text is None else text.mean(1)[:, :2])
        ),
        VP(),
        "v",
        null={"label": 0},
    )
    # prompts of different lengths
    x, text, neg = randn(6, 2), randn(6, 5, 3), randn(6, 7, 3, seed=1)
    for th in (1.0, 0.5):
        g = adaptive_cfg(d, 3.0, th, uncond={"text": neg})
        out = sample(
            g,
            DDIM(),
            x,
            time_grid(VP(), 6),
            cond={"label": torch.arange(6), "text": text, "mode": "b"},
            progress=False,
        )
        assert torch.isfinite(out).all()
        if th == 1.0:
            assert torch.equal(
                out,
                sample(
                    cfg(d, 3.0, uncond={"text": neg}),
                    DDIM(),
                    x,
                    time_grid(VP(), 6),
                    cond={"label": torch.arange(6), "text": text, "mode": "b"},
                    progress=False,
                ),
            )
        else:
            assert 0 < torch.stack([h[2] for h in g.history]).float().mean() < 1


def test_away_from_a_bad_denoiser():
    good, bad = MixtureDenoiser(ring(), VP()), MixtureDenoiser(ring(scale=0.4), VP())
    assert_close(run(adaptive_cfg(good, 3.0, 1.0, bad=bad)), run(contrast(good, bad, 2.0)))
    g = adaptive_cfg(good, 3.0, 0.9999, bad=bad)
    with count_evals(g) as n:
        run(g)
    assert n.rows == 96 + torch.stack([h[2] for h in g.history]).sum()


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolverPP(2)], ids=repr)
def test_nested(solver):
    base, y = net(), torch.arange(8) + 1
    inner = lambda b: run(cfg(adaptive_cfg(base, 4.0, 0.8), 2.0, batched=b), solver, None, y)
    assert_close(inner(True), inner(False))
    assert_close(
        run(adaptive_cfg(apg(base, 2.0, 1.0), 3.0, 1.0), solver, None, y),
        run(cfg(cfg(base, 2.0), 3.0), solver, None, y),
    )
    assert torch.isfinite(run(apg(adaptive_cfg(base, 3.0, 0.8), 2.0), solver, None, y)).all()


def test_two_conditions_are_two_trajectories():
    g, x, y, z = (
        adaptive_cfg(net(), 4.0, 0.5),
        randn(4, 2),
        torch.arange(4) + 1,
        torch.arange(4) + 5,
    )
    alone = {k: adaptive_cfg(net(), 4.0, 0.5) for k in "yz"}
    for t in (0.9, 0.7, 0.5):
        assert torch.equal(g(x, t, label=y).x0, alone["y"](x, t, label=y).x0)
        assert torch.equal(g(x, t, label=z.clone()).x0, alone["z"](x, t, label=z).x0)
    assert len(g.memories) == 2
    for k in range(9):
        g(x, 0.4, label=y + k)
    assert len(g.memories) <= 4


@pytest.mark.parametrize(
    "make",
    [lambda: adaptive_cfg(net(), 4.0, 0.7), lambda: policy(net(), 4.0, ["cfg", "hold"] * 3)],
    ids=["adaptive", "policy"],
)
def test_the_memory_follows_a_resampling(make):
    x, y, idx, grid = (
        randn(4, 2),
        torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=F64),
        torch.tensor([3, 3, 0]),
        time_grid(VP(), 6),
    )

    def walk(x, label, swap):
        g, s = make(), DPMSolverPP(2)
        g.start(grid)
        s.start(VP(), grid)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for i, (t, u) in enumerate(zip(grid.tolist(), grid.tolist()[1:])):
                if i == 3 and swap:
                    x, label = x[idx], label[idx]
                    g.reindex(idx)
                    s.reindex(idx)
                x = s.step(lambda z, v, label=label: g(z, v, label=label), x, t, u)
        return x

    assert_close(walk(x, y, True), walk(x[idx], y[idx], False), rtol=1e-12, atol=1e-12)


def test_own_loop_warns_once_and_starts_afresh():
    g, fresh, x, y = (
        adaptive_cfg(net(), 4.0, 0.5),
        adaptive_cfg(net(), 4.0, 0.5),
        randn(8, 2),
        torch.arange(8),
    )
    want = [fresh(x, t, label=y).x0 for t in (0.9, 0.5, 0.1)]
    with pytest.warns(UserWarning, match="time went up") as seen:
        for _ in range(3):
            for t, w in zip((0.9, 0.5, 0.1), want):
                assert torch.equal(g(x, t, label=y).x0, w)
    assert len(seen) == 1 and len(g.history) == 3
    # a condition without rows
    g = adaptive_cfg(
        NetDenoiser(lambda x, t, k=1.0: torch.sin(k * x), VP(), "v"), 4.0, 0.5, uncond={"k": 2.0}
    )
    g(x, 0.9)
    with pytest.warns(UserWarning, match="before it was"):
        g(x[:3], 0.8)


def test_state_is_not_saved_and_is_copied():
    inner = adaptive_cfg(net(), 4.0, 0.5)
    outer = cfg(inner, 2.0)
    outer(randn(4, 2), 0.9, label=torch.arange(4))
    assert inner.memories and inner.state_dict() == outer.state_dict() == {}
    twin = copy.deepcopy(outer)
    outer.start()
    assert not inner.memories and twin.inner.memories


def test_float32_and_gradients_and_empty():
    for d in (adaptive_cfg(net(), 4.0, 0.7), policy(net(), 4.0, ["cfg", "hold", "cond", "cond"])):
        out = run(d, None, randn(5, 2, dtype=torch.float32), None, time_grid(VP(), 4))
        assert out.dtype == torch.float32
        assert_close(
            out,
            run(
                d, None, randn(5, 2, dtype=torch.float32).double(), None, time_grid(VP(), 4)
            ).float(),
            rtol=1e-3,
            atol=1e-3,
        )
        x = randn(5, 2).requires_grad_()
        sample(
            d,
            DDIM(),
            x,
            time_grid(VP(), 4),
            cond={"label": torch.arange(5)},
            grad=True,
            progress=False,
        ).sum().backward()
        assert x.grad.isfinite().all() and x.grad.abs().min() > 0
        assert run(d, None, randn(0, 2), torch.arange(0), time_grid(VP(), 4)).shape == (0, 2)
        assert run(d, None, randn(1, 2), None, time_grid(VP(), 4)).shape == (1, 2)


@pytest.mark.parametrize(
    "kwargs,says",
    [
        (dict(threshold=1.01), "got 1.01"),
        (dict(threshold=float("nan")), "nan"),
        (dict(threshold=None), "None"),
        (dict(threshold=True), "True"),
        (dict(space="pixels"), "'pixels'"),
        (dict(after=1.0), "got 1.0"),
        (dict(after=-0.1), "got -0.1"),
        (dict(interval=(0.5, 0.2)), "interval"),
    ],
)
def test_bad_settings(kwargs, says):
    with pytest.raises(ValueError, match=says):
        adaptive_cfg(net(), 3.0, **kwargs)


def test_bad_models():
    with pytest.raises(TypeError, match="NetDenoiser"):
        adaptive_cfg(torch.nn.Linear(2, 2), 3.0)
    with pytest.raises(TypeError, match="bad must be"):
        adaptive_cfg(net(), 3.0, bad=torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="one process"):
        adaptive_cfg(net(), 3.0, bad=net(Flow()))
    with pytest.raises(ValueError, match="what unconditional means"):
        adaptive_cfg(NetDenoiser(lambda x, t: x, VP()), 3.0)(randn(2, 2), 0.5)


# --- which threshold


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(-1, 1), st.sampled_from([0.0, 0.3, 0.5]))
def test_alignment_by_brute_force(seed, threshold, after):
    a = Alignment(
        torch.linspace(1, 0, 8)[:-1],
        2 * torch.rand(7, 5, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1,
    )
    want = []
    for b in range(5):
        k = 0
        for t, c in zip(a.t.tolist(), a.cos[:, b].tolist()):
            k += 1
            if c > threshold and t <= 1 - after:
                break
        want.append(k)
    assert a.guided(threshold, after).tolist() == want
    assert a.saved(threshold, after) == pytest.approx(1 - (7 * 5 + sum(want)) / (2 * 7 * 5))
    most = a.saved(-1.0, after)
    if most > 0:
        goal = most / 2
        th = a.suggest(goal, after)
        assert a.saved(th, after) >= goal and a.saved(min(th + 3e-12, 1.0), after) <= a.saved(
            th, after
        )
        assert all(a.saved(v.item(), after) < goal for v in a.cos.flatten() if v > th + 1e-11)
    with pytest.raises(ValueError, match="saved must lie"):
        a.suggest(0.6)


@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.8, 0.95, 1.0])
def test_the_forecast_is_exact(threshold):
    d = MixtureDenoiser(ring(), VP())
    a = alignment(d, randn(8, 2), time_grid(VP(), 12), {"label": torch.arange(8)}, 4.0)
    g = adaptive_cfg(d, 4.0, threshold)
    run(g)
    assert torch.stack([h[2] for h in g.history]).sum(0).tolist() == a.guided(threshold).tolist()
    assert "saves" in repr(a)
    # scale 1: the model's own path
    assert (
        alignment(d, randn(8, 2), time_grid(VP(), 12), {"label": torch.arange(8)})
        .cos.isfinite()
        .all()
    )


# --- policies and LinearAG


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_constant_policies(solver):
    d = net()
    for rule, same in (
        ("cfg", cfg(d, 4.0)),
        (2.5, cfg(d, 2.5)),
        ("cond", d),
        (1, d),
        ("uncond", cfg(d, 0.0)),
        (0, cfg(d, 0.0)),
    ):
        assert_close(
            run(policy(d, 4.0, lambda n, rule=rule: [rule] * n), solver), run(same, solver)
        )


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from(["cfg", "cond", "uncond", "hold", 2.0]), min_size=1, max_size=8))
def test_any_plan_or_a_clear_error(plan):
    d = net()
    bad = next(
        (
            i
            for i, p in enumerate(plan)
            if p == "hold" and (i == 0 or plan[i - 1] in ("cond", "uncond"))
        ),
        None,
    )
    if bad is not None:
        with pytest.raises(ValueError, match=rf"plan\[{bad}\]"):
            policy(d, 3.0, plan)
        return
    g = policy(d, 3.0, plan)
    with count_evals(g) as n:
        out = run(g, None, None, None, time_grid(VP(), len(plan)))
    assert torch.isfinite(out).all() and n.rows == 8 * (
        len(plan) + sum(p in ("cfg", 2.0) for p in plan)
    )


def test_hold_by_hand():
    d, x, y = net(), randn(4, 2), torch.arange(4) + 1
    g = policy(d, 3.0, ["cfg", "hold", "hold"])
    g.start(torch.tensor([0.9, 0.6, 0.3, 0.1]))
    eps = lambda t, lab: d(x, t, label=lab).eps
    diff = eps(0.9, torch.zeros(4)) - eps(0.9, y)
    g(x, 0.9, label=y)
    # eps_u = eps_c + diff
    for t in (0.6, 0.6, 0.3):
        assert_close(g(x, t, label=y).eps, eps(t, y) - 2 * diff)


def test_steps_of_times():
    g = policy(net(), 3.0, ["cfg", "cond"])
    g.start(torch.tensor([0.9, 0.5, 0.1]))
    assert [g.step_at(t) for t in (0.9, 0.7, 0.5, 0.3, 0.1)] == [0, 0, 1, 1, 1]
    for t in (0.95, 0.05):
        with pytest.raises(ValueError, match="on the grid"):
            g.step_at(t)
    with pytest.raises(ValueError, match="one time"):
        g(randn(2, 2), torch.tensor([0.5, 0.3]), label=torch.arange(2))
    assert_close(
        g(randn(2, 2), torch.tensor([0.3, 0.3]), label=torch.arange(2)).x0,
        net()(randn(2, 2), 0.3, label=torch.arange(2)).x0,
        rtol=1e-6,
        atol=1e-6,
    )


def test_bad_plans():
    with pytest.raises(RuntimeError, match=r"start\(grid\)"):
        policy(net(), 3.0, ["cfg"])(randn(2, 2), 0.5, label=torch.arange(2))
    for k in (11, 13):
        with pytest.raises(ValueError, match=f"plan has {k} entries, but the grid has 12 steps"):
            run(policy(net(), 3.0, ["cfg"] * k))
    with pytest.raises(ValueError, match="guided"):
        run(policy(net(), 3.0, lambda n: ["guided"] * n))
    with pytest.raises(ValueError, match="LinearAG"):
        run(policy(net(), 3.0, linear_plan))
    for plan in ("cfg", None, 3):
        with pytest.raises(TypeError, match="plan must be"):
            check_plan(plan)
    with pytest.raises(ValueError, match="True"):
        check_plan([True])
    with pytest.raises(ValueError, match="nan"):
        check_plan([float("nan")])


def test_linear_plan():
    assert (
        linear_plan(8) == ["cfg", "linear"] * 2 + ["cond"] * 4
        and linear_plan(1) == ["cond"]
        and linear_plan(4, 1.0) == ["cfg", "linear"] * 2
    )
    for n in range(1, 30):
        check_plan(linear_plan(n))
    for bad in (0, -1, 2.5, True, None):
        with pytest.raises(ValueError, match="steps must be"):
            linear_plan(bad)
    with pytest.raises(ValueError, match="guided"):
        linear_plan(4, 2.0)


class Shifted(MixtureDenoiser):  # N(m_label, h^2 I): one mean with, another without the condition
    null = {"label": 0}

    def __init__(self, means, h, process):
        super().__init__(ring(), process)
        self.m, self.h = means, h

    def forward(self, x, t, label):
        a, s = float(self.process.alpha(t)), float(self.process.sigma(t))
        return Prediction.of(
            x,
            t,
            self.process,
            x0=self.m[label]
            + a * self.h**2 / (a * a * self.h**2 + s * s) * (x - a * self.m[label]),
        )


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(2), Heun(), DPMSingle(2)], ids=repr)
@pytest.mark.parametrize("process", [VP(), Flow(), VE()], ids=repr)
def test_linear_ag_is_exact_on_gaussians(process, solver):
    d, grid, plan = (
        Shifted(randn(2, 5), 0.5, process),
        time_grid(process, 8, start=process.t_max),
        lambda n: ["cfg", "linear"] * (n // 2),
    )
    x = lambda n, seed: randn(n, 5, seed=seed) * process.sigma(process.t_max)
    fitted = LinearAG(d, 3.0, plan).fit(
        x(60, 1), grid, {"label": torch.ones(60, dtype=torch.long)}, solver
    )
    assert max(fitted.misfit.values()) < 1e-10
    one = torch.ones(4, dtype=torch.long)
    assert_close(
        run(fitted, solver, x(4, 2), one, grid),
        run(cfg(d, 3.0), solver, x(4, 2), one, grid),
        rtol=1e-5,
        atol=1e-5,
    )


def test_linear_ag_coefficients_are_ordinary_least_squares():
    import numpy as np

    d, grid, x, y = net(), time_grid(VP(), 5), randn(30, 2), {"label": torch.arange(30) % 7}
    fitted = LinearAG(d, 3.0, lambda n: ["cfg", "cfg", *["linear"] * (n - 2)], history=2).fit(
        x, grid, y
    )
    path, solver, z = [], DDIM(), x
    solver.start(VP(), grid)
    for t, s in zip(grid.tolist(), grid.tolist()[1:]):
        c, u = d(z, t, **y), d(z, t, label=torch.zeros(30))
        path.append((c.eps.flatten().numpy(), u.eps.flatten().numpy()))
        z = solver.step(lambda v, t: cfg(d, 3.0)(v, t, **y), z, t, s)
    for i in (2, 3, 4):
        A = np.stack([path[i][0], *path[i - 1], *path[i - 2]], 1)
        want = np.linalg.lstsq(A, path[i][1] - path[i][0], rcond=None)[0]
        np.testing.assert_allclose(fitted.coefficients[grid[i].item()], want, rtol=1e-6, atol=1e-8)
    lam = 1e-2
    ridge = LinearAG(d, 3.0, history=2, ridge=lam).fit(x, grid, y)
    k = lam * (A**2).sum(0).mean()
    np.testing.assert_allclose(
        ridge.coefficients[grid[4].item()],
        np.linalg.solve(A.T @ A + k * np.eye(5), A.T @ (path[4][1] - path[4][0])),
        rtol=1e-6,
    )


def test_linear_ag_errors():
    d, grid, x, y = net(), time_grid(VP(), 6), randn(20, 2), {"label": torch.arange(20) % 7}
    with pytest.raises(RuntimeError, match="call fit"):
        run(LinearAG(d, 3.0))
    fitted = LinearAG(d, 3.0).fit(x, grid, y)
    assert torch.isfinite(run(fitted, None, None, None, grid)).all()
    with pytest.raises(ValueError, match="fitted on other times"):
        run(fitted)
    # a solver that calls in between
    with pytest.raises(ValueError, match="no coefficients for"):
        run(fitted, DPMSingle(2), None, None, grid)
    for kwargs, says in (
        (dict(history=0), "history"),
        (dict(history=1.5), "history"),
        (dict(ridge=-1.0), "ridge"),
        (dict(ridge=float("inf")), "ridge"),
    ):
        with pytest.raises(ValueError, match=says):
            LinearAG(d, 3.0, **kwargs)
    # plain numbers: they can be kept in a file
    twin = LinearAG(d, 3.0)
    twin.coefficients = dict(fitted.coefficients)
    assert torch.equal(run(twin, None, None, None, grid), run(fitted, None, None, None, grid))


def test_linear_ag_nested_batched_or_not():
    d, grid = net(), time_grid(VP(), 6)
    fitted = LinearAG(d, 3.0).fit(randn(20, 2), grid, {"label": torch.arange(20) % 7})
    assert_close(
        run(cfg(fitted, 2.0, batched=True), None, None, torch.arange(8) + 1, grid),
        run(cfg(fitted, 2.0, batched=False), None, None, torch.arange(8) + 1, grid),
    )


@pytest.mark.parametrize("history", [1, 2, 3, None])
def test_a_linear_step_is_the_combination_of_its_past(history):
    """eps_u - eps_c = a eps_c + sum of b_k eps_c + c_k eps_u, k times ago; what was guessed is
    the past of the next guess."""
    d, grid, y, w = net(), [0.9, 0.7, 0.5, 0.3, 0.1, 0.05], torch.arange(4) + 1, 3.0
    g = LinearAG(d, w, ["cfg", "cfg", "cfg", "linear", "linear"], history=history)
    back = lambda i: min(i, history or i)
    numbers = {i: randn(1 + 2 * back(i), seed=10 + i).tolist() for i in (3, 4)}
    g.coefficients = {grid[i]: numbers[i] for i in numbers}
    g.start(torch.tensor(grid, dtype=F64))
    c, u = [], []
    for i, t in enumerate(grid[:-1]):
        x = randn(4, 2, seed=i)
        out = g(x, t, label=y).eps
        c.append(d(x, t, label=y).eps)
        if i < 3:
            u.append(d(x, t, label=torch.zeros(4)).eps)
        else:
            a, *b = numbers[i]
            guess = (1 + a) * c[i]
            for k in range(1, back(i) + 1):
                guess = guess + b[2 * k - 2] * c[i - k] + b[2 * k - 1] * u[i - k]
            u.append(guess)
        assert_close(out, w * c[i] + (1 - w) * u[i], rtol=1e-9, atol=1e-9)


def test_weights_of_times_that_were_not_fitted():
    "A time is the fitted one up to rounding; with none at all the message is the same."
    g = LinearAG(net(), 3.0)
    with pytest.raises(ValueError, match="no coefficients for t=0.5: fit it"):
        g.weights("linear", 0.5)
    assert g.weights("hold", 0.5) == (0.0, -1.0, 1.0)  # eps_u - eps_c of the time before
    g.coefficients = {0.7: [1.0, 2.0, 3.0], 0.5: [4.0, 5.0, 6.0]}
    for t, want in ((0.7, [1.0, 2.0, 3.0]), (0.5, [4.0, 5.0, 6.0])):
        for shift in (-5e-7, 0.0, 5e-7):
            assert g.weights("linear", t + shift) == want
        for shift in (-1e-5, 1e-5):
            with pytest.raises(ValueError, match="no coefficients for t="):
                g.weights("linear", t + shift)
