"""Adaptive projected guidance against diffusers' implementation, and properties on random input."""

import copy
import warnings

import pytest
import torch
from diffkit.core.data import ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, Prediction, cfg, count_evals, guide
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Heun, sample, trace
from diffkit.guidance.apg import APG, ProjectedGuidance, apg, clip_norm, project, update_norms
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def net(process=None):  # a made-up conditional network with a null label
    return NetDenoiser(
        lambda x, t, label: torch.sin(3 * x + label[:, None]) + t[:, None].to(x),
        process or VP(),
        "v",
        null={"label": 0},
    )


# --- parity with diffusers

guiders = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")


@pytest.mark.parametrize("eta", [0.0, 0.2, 1.0, 1.5])
@pytest.mark.parametrize("r", [None, 0.5, 5.0, 1e6])
@pytest.mark.parametrize("beta", [0.0, -0.5, -0.75, 0.3])
def test_six_steps_as_in_diffusers(eta, r, beta):
    mine, buffer, w = APG(eta, r, beta), guiders.MomentumBuffer(beta), 7.5
    for i, t in enumerate(torch.linspace(1, 0, 6).tolist()):
        c, u = randn(2, 4, 3, 8, 8, seed=i)
        theirs = guiders.normalized_guidance(
            c, u, w - 1, buffer, eta, r or 0.0, use_original_formulation=True
        )
        assert_close(c + (w - 1) * mine(c - u, c, t), theirs, rtol=1e-12, atol=1e-12)


def test_float32_as_in_diffusers():
    mine, buffer = APG(0.2, 5.0, -0.5), guiders.MomentumBuffer(-0.5)
    for i, t in enumerate(torch.linspace(1, 0, 6).tolist()):
        c, u = randn(2, 4, 3, 8, 8, seed=i, dtype=torch.float32)
        assert_close(
            c + 6.5 * mine(c - u, c, t),
            guiders.normalized_guidance(c, u, 6.5, buffer, 0.2, 5.0, use_original_formulation=True),
            rtol=1e-5,
            atol=1e-5,
        )


def test_norm_dim_as_in_diffusers():
    c, u = randn(2, 2, 4, 5, 8, 8)  # (B, C, T, H, W): a norm for each frame
    assert_close(
        c + 3 * APG(0.0, 2.0, dims=(1, 3, 4))(c - u, c, 0.5),
        guiders.normalized_guidance(
            c, u, 3.0, None, 0.0, 2.0, use_original_formulation=True, norm_dim=(-4, -2, -1)
        ),
    )


@pytest.mark.parametrize("space", ["x0", "eps", "v"])
def test_guider_class_on_a_whole_trajectory(space):
    "Drive diffusers' guider by hand on the predictions in the space, through twelve DDIM steps."
    w, d, y = 6.0, MixtureDenoiser(ring(), VP()), torch.arange(8)
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=w - 1,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=0.4,
        eta=0.1,
        use_original_formulation=True,
    )
    guider.momentum_buffer = guiders.MomentumBuffer(-0.5)
    x, grid = randn(8, 2), time_grid(VP(), 12)
    mine = [
        s.x
        for s in trace(apg(d, w, 0.1, 0.4, -0.5, space=space), DDIM(), x, grid, cond={"label": y})
    ]
    solver = DDIM()
    solver.start(VP(), grid)
    for i, (t, s) in enumerate(zip(grid.tolist(), grid.tolist()[1:])):

        def theirs(x, t):
            c, u = d(x, t, label=y).get(space), d(x, t).get(space)
            return Prediction.of(x, t, VP(), **{space: guider.forward(c, u).pred})

        x = solver.step(theirs, x, t, s)
        assert_close(mine[i + 1], x, rtol=1e-9, atol=1e-9)


def test_where_diffusers_differs():
    c, u = randn(2, 4, 3, 8, 8)
    native = lambda w, eta, r=0.0: guiders.normalized_guidance(c, u, w, None, eta, r)
    assert_close(native(7.0, 1.0), u + 7 * (c - u))  # eta 1: plain CFG, whatever the anchor
    # eta 0: another method
    assert (native(7.0, 0.0) - (c + 6 * APG()(c - u, c, 0.5))).abs().max() > 0.1
    # by exactly the parallel part of one step
    assert_close(native(7.0, 0.0) - (c + 6 * APG()(c - u, c, 0.5)), -project(c - u, c)[0])
    default = guiders.AdaptiveProjectedGuidance()
    assert (
        default.eta,
        default.adaptive_projected_guidance_momentum,
        default.use_original_formulation,
    ) == (1.0, None, False)


# --- project and clip on random input

shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10**6), st.floats(-6, 6), st.floats(-6, 6))
def test_project(shape, seed, a, b):
    d, onto = 10**a * randn(3, *shape, seed=seed), 10**b * randn(3, *shape, seed=seed + 1)
    par, orth = project(d, onto)
    assert_close(par + orth, d, rtol=1e-10, atol=0.1**14 * 10**a)
    inner = (orth * onto).flatten(1).sum(1) / (
        onto.flatten(1).norm(dim=1) * d.flatten(1).norm(dim=1)
    )
    assert inner.abs().max() < 1e-12
    again = project(par, onto)
    assert_close(again[0], par, rtol=1e-9, atol=1e-14 * 10**a)  # a projection: twice is once
    assert (par.flatten(1).norm(dim=1) <= d.flatten(1).norm(dim=1) * (1 + 1e-12)).all()


@pytest.mark.parametrize(
    "back,front", [(-1, 2), ((-1,), (2,)), ((-2, -1), (1, 2)), ((1, -1), None)]
)
def test_dimensions_may_be_counted_from_the_end(back, front):
    d, onto = randn(3, 4, 5), randn(3, 4, 5, seed=1)
    for part, same in zip(project(d, onto, back), project(d, onto, front)):
        assert torch.equal(part, same)
    assert torch.equal(clip_norm(d, 0.5, back), clip_norm(d, 0.5, front))
    assert torch.equal(
        APG(0.3, 0.5, dims=back)(d, onto, 0.5), APG(0.3, 0.5, dims=front)(d, onto, 0.5)
    )


@pytest.mark.parametrize("dims", [-3, -4, 0, 3, (1, -3), (-1, 3), ()])
def test_dimensions_outside_of_a_sample_are_refused(dims):
    "-3 is the batch of three dimensions, -4 and 3 lie outside on either side."
    for f in (
        lambda: project(randn(3, 4, 5), randn(3, 4, 5), dims),
        lambda: clip_norm(randn(3, 4, 5), 1.0, dims),
    ):
        with pytest.raises(ValueError, match=r"dimensions of a sample, 1\.\.2 .*shape \(3, 4, 5\)"):
            f()


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(0, 10**6), st.floats(-3, 3))
def test_clip(shape, seed, a):
    d, r = randn(3, *shape, seed=seed), 10**a
    out, norm = clip_norm(d, r), d.flatten(1).norm(dim=1)
    assert (out.flatten(1).norm(dim=1) <= r * (1 + 1e-12)).all()
    assert torch.equal(out[norm <= r], d[norm <= r])
    assert_close(clip_norm(out, r), out, rtol=1e-14, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_is_rounded_once(dtype):
    d, onto = randn(4, 4, 64, 64, dtype=F64), randn(4, 4, 64, 64, seed=1)
    # squares of these overflow in float16
    lo, lo_onto = (100 * d).to(dtype), (100 * onto).to(dtype)
    par, orth = project(lo, lo_onto)
    want = project(lo.double(), lo_onto.double())
    assert par.dtype == orth.dtype == dtype
    assert torch.equal(par, want[0].to(dtype)) and torch.equal(orth, want[1].to(dtype))
    zero = torch.zeros(2, 8, dtype=dtype)
    assert APG(0.0, 1e-3)(zero, zero, 0.5).isfinite().all()


def test_gradients_pass_through():
    d, onto = randn(2, 6).requires_grad_(), randn(2, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: APG(0.3, 1.0)(a, b, 0.5), (d, onto))
    x = randn(3, 2).requires_grad_()
    sample(
        apg(MixtureDenoiser(ring(), VP()), 3.0, 0.0, 0.5, -0.5),
        DDIM(),
        x,
        time_grid(VP(), 4),
        cond={"label": torch.arange(3)},
        grad=True,
        progress=False,
    ).sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().min() > 0
    z = torch.zeros(2, 3, dtype=F64, requires_grad=True)
    APG(0.0, 0.1)(z, z, 0.5).sum().backward()
    assert z.grad.isfinite().all()


# --- limits, composition, memory


@pytest.mark.parametrize("process", [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()], ids=repr)
def test_eta_one_is_cfg_on_every_process(process):
    x, y = randn(8, 2), torch.arange(8)
    for d, lab in ((MixtureDenoiser(ring(), process), y), (net(process), y + 1)):
        for space in ("x0", "eps", "v"):
            assert_close(
                apg(d, 5.0, 1.0, space=space)(x, 0.5, label=lab).x0,
                cfg(d, 5.0)(x, 0.5, label=lab).x0,
                rtol=1e-8,
                atol=1e-8,
            )


@pytest.mark.parametrize(
    "solver",
    [
        DDIM(),
        DDIM(0.5),
        Ancestral(),
        Heun(),
        DPMSolverPP(2),
        DPMSolverPP(3),
        DPMSolverPP(2, start="singlestep"),
        DPMSingle(2),
        DPMSingle(3),
    ],
    ids=repr,
)
def test_under_every_solver(solver):
    x, grid, y, gen = (
        randn(8, 2),
        time_grid(VP(), 7),
        torch.arange(8),
        lambda: torch.Generator().manual_seed(3),
    )
    run = lambda d: sample(d, solver, x, grid, cond={"label": y}, generator=gen(), progress=False)
    d = MixtureDenoiser(ring(), VP())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no time goes up, no memory is restarted
        full = apg(d, 4.0, 0.0, 0.3, -0.5)
        first = run(full)
        assert torch.equal(first, run(full)) and torch.isfinite(first).all()
    assert_close(run(apg(d, 4.0, 1.0)), run(cfg(d, 4.0)))
    with count_evals(full) as n:
        run(full)
    with count_evals(d) as one:
        run(d)
    assert n.rows == 2 * one.rows


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolverPP(2)], ids=repr)
def test_nested_in_cfg_batched_or_not(solver):
    """The outer guidance calls the inner one with two conditions at each time; each has a
    momentum of its own."""
    x, grid, y = randn(8, 2), time_grid(VP(), 7), torch.arange(8) + 1
    run = lambda b: sample(
        cfg(apg(net(), 4.0, 0.0, 0.5, -0.5), 2.0, batched=b),
        solver,
        x,
        grid,
        cond={"label": y},
        progress=False,
    )
    assert_close(run(True), run(False))


def test_nested_memory_is_that_of_separate_trajectories():
    base = net()
    inner, x, y, z = (
        apg(base, 4.0, 0.0, None, -0.5),
        randn(4, 2),
        torch.arange(4) + 1,
        torch.arange(4) + 5,
    )
    alone = {k: apg(base, 4.0, 0.0, None, -0.5) for k in "yz"}
    for t in (0.9, 0.7, 0.5, 0.3):
        assert_close(inner(x, t, label=y).x0, alone["y"](x, t, label=y).x0)
        # equal conditions are the same one, also as another object
        assert_close(inner(x, t, label=z.clone()).x0, alone["z"](x, t, label=z).x0)
    inner.start()
    assert inner.memories == []
    for t in (0.9, 0.8):
        for k in range(9):
            inner(x, t, label=y + k)
    # a loop that changes its condition all the time does not fill the memory
    assert len(inner.memories) <= 4


def test_conditions_that_are_no_tensors_have_trajectories_of_their_own():
    "Equal numbers are one condition, also as other objects; a number is never a tensor."
    d = NetDenoiser(
        lambda x, t, label, k=1.0: torch.sin(k * x + label[:, None]), VP(), "v", null={"label": 0}
    )
    make = lambda: apg(d, 4.0, 0.0, None, -0.5)
    conds = {
        "low": lambda: float("1.5"),
        "high": lambda: float("2.5"),
        "rows": lambda: torch.tensor([[1.5], [2.0], [2.5], [3.0]], dtype=F64),
    }
    inner, alone, x, y = make(), {k: make() for k in conds}, randn(4, 2), torch.arange(4) + 1
    for t in (0.9, 0.7, 0.5):
        for name, k in conds.items():
            out = inner(x, t, label=y, k=k()).x0
            assert_close(out, alone[name](x, t, label=y, k=k()).x0, rtol=0, atol=0)
    assert len(inner.memories) == 3 and all(len(a.memories) == 1 for a in alone.values())


def test_start_reaches_the_memory_through_wrappers_and_nothing_is_saved():
    inner = apg(net(), 4.0, 0.0, None, -0.5)
    outer, x = cfg(inner, 2.0), randn(4, 2)
    outer(x, 0.9, label=torch.arange(4))
    assert inner.memories
    assert inner.state_dict() == outer.state_dict() == {}
    twin = copy.deepcopy(outer)
    outer.start()
    assert not inner.memories and twin.inner.memories
    module = ProjectedGuidance(
        NetDenoiser(torch.nn.Linear(2, 2), VP(), null={"label": 0}), 3.0, APG(beta=-0.5)
    )
    assert set(module.state_dict()) == {"inner.net.weight", "inner.net.bias"}


def test_own_loop_without_start_warns_once_and_starts_afresh():
    d, x, y = MixtureDenoiser(ring(), VP()), randn(8, 2), torch.arange(8)
    guided, fresh = apg(d, 4.0, 0.0, None, -0.5), apg(d, 4.0, 0.0, None, -0.5)
    for t in (0.9, 0.5, 0.1):
        want = fresh(x, t, label=y).x0
    with pytest.warns(UserWarning, match="time went up") as seen:
        for _ in range(3):
            for t in (0.9, 0.5, 0.1):
                out = guided(x, t, label=y).x0
            assert_close(out, want, rtol=0, atol=0)
    assert len(seen) == 1


def test_dtype_change_starts_afresh():
    m, one = APG(1.0, None, -0.5), torch.ones(2, 3)
    m(one, one, 0.9)
    with pytest.warns(UserWarning, match="float64"):
        assert torch.equal(m(one.double(), one.double(), 0.5), one.double())


def test_times_per_sample_equal_runs_one_by_one():
    d, y = MixtureDenoiser(ring(), VP()), torch.arange(4)
    x, ts = (
        randn(4, 2),
        torch.tensor(
            [[0.9, 0.8, 0.7, 0.95], [0.6, 0.7, 0.7, 0.5], [0.3, 0.2, 0.6, 0.4]], dtype=F64
        ),
    )
    whole, single = apg(d, 4.0, 0.0, 0.5, -0.5), [apg(d, 4.0, 0.0, 0.5, -0.5) for _ in range(4)]
    for t in ts:
        assert_close(
            whole(x, t, label=y).x0,
            torch.cat(
                [single[i](x[i : i + 1], t[i].item(), label=y[i : i + 1]).x0 for i in range(4)]
            ),
        )


def test_interval_leaves_the_memory_alone():
    d, x, y = MixtureDenoiser(ring(), VP()), randn(8, 2), torch.arange(8)
    part, whole = apg(d, 4.0, 0.0, None, -0.5, interval=(0.0, 0.6)), apg(d, 4.0, 0.0, None, -0.5)
    for t in (0.9, 0.7):
        assert torch.equal(part(x, t, label=y).x0, d(x, t, label=y).x0)
    for t in (0.6, 0.3):
        assert_close(part(x, t, label=y).x0, whole(x, t, label=y).x0)


def test_as_a_shaper_of_any_direction():
    x, y = randn(8, 2), torch.arange(8)
    good, bad = (
        MixtureDenoiser(ring(), VP())(x, 0.4, label=y),
        MixtureDenoiser(ring(scale=0.3), VP())(x, 0.4, label=y),
    )
    out = guide(good, [((good, bad), 2.0, APG(0.0, 0.1))])
    _, orth = project(clip_norm(good.x0 - bad.x0, 0.1), good.x0)
    assert_close(out.x0, good.x0 + 2 * orth)


# --- the report, and bad input


def test_update_norms():
    d, x, y = MixtureDenoiser(ring(), VP()), randn(64, 2), torch.arange(64) % 8
    grid = time_grid(VP(), 6)
    n = update_norms(d, x, grid, {"label": y})
    # scale 1: the model's own path
    states = [s.x for s in trace(d, DDIM(), x, grid, cond={"label": y})][:-1]
    for i, (t, s) in enumerate(zip(grid.tolist(), states)):
        c, u = d(s, t, label=y).x0, d(s, t).x0
        assert_close(n.delta[i], (c - u).norm(dim=1))
        assert_close(n.good[i], c.norm(dim=1))
        assert_close(n.parallel[i], ((c - u) * c).sum(1) / c.norm(dim=1), rtol=1e-6, atol=1e-9)
    assert n.t.tolist() == grid.tolist()[:-1] and "medians" in repr(n)
    assert abs(n.binds(n.suggest(0.25)) - 0.25) < 0.01
    assert len(update_norms(d, x, grid, {"label": y}, scale=3.0, solver=Heun()).t) == 12
    frames = update_norms(
        NetDenoiser(
            lambda x, t, label: x * (1 + label[:, None, None]), VP(), "x0", null={"label": 0}
        ),
        randn(5, 3, 4),
        grid,
        {"label": torch.arange(5)},
        dims=2,
    )
    assert frames.delta.shape == (6, 5)


def test_norms_of_an_unknown_space_are_refused_before_any_evaluation():
    d = net()
    with count_evals(d) as n, pytest.raises(ValueError, match="space must be one of .*'pixels'"):
        update_norms(d, randn(4, 2), time_grid(VP(), 3), {"label": torch.arange(4)}, space="pixels")
    assert n.calls == 0
    sizes = {}
    for space in ("x0", "eps", "v"):
        found = update_norms(
            d, randn(4, 2), time_grid(VP(), 3), {"label": torch.arange(4)}, space=space
        )
        c, u = (
            d(randn(4, 2), found.t[0].item(), label=k) for k in (torch.arange(4), torch.zeros(4))
        )
        sizes[space] = (c.get(space) - u.get(space)).norm(dim=1)
        assert_close(found.delta[0], sizes[space], rtol=1e-9, atol=1e-9)
    assert (sizes["x0"] - sizes["eps"]).abs().max() > 0.01


@pytest.mark.parametrize(
    "kwargs,says",
    [
        (dict(r=0.0), "got 0.0"),
        (dict(r=-2), "got -2"),
        (dict(r=float("nan")), "nan"),
        (dict(beta=1.0), "diverges"),
        (dict(beta=-1.5), "got -1.5"),
        (dict(space="pixels"), "'pixels'"),
        (dict(eta=float("inf")), "inf"),
        (dict(dims=(0, 1)), "batch"),
        (dict(interval=(0.5, 0.2)), "interval"),
    ],
)
def test_bad_settings(kwargs, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        apg(net(), 3.0, **kwargs)


def test_bad_input():
    with pytest.raises(TypeError, match="NetDenoiser"):
        apg(torch.nn.Linear(2, 2), 3.0)
    with pytest.raises(ValueError, match="what unconditional means"):
        apg(NetDenoiser(lambda x, t: x, VP()), 3.0)(randn(2, 2), 0.5)
    with pytest.raises(ValueError, match="one shape"):
        project(randn(2, 3), randn(2, 4))
    with pytest.raises(ValueError, match="dims"):
        project(randn(2, 3), randn(2, 3), dims=2)
    # no dimension but the batch
    with pytest.raises(ValueError, match="dims"):
        project(randn(4), randn(4))
    with pytest.raises(ValueError, match="one space"):
        guide(
            *(lambda p: (p, [((p, p), 1.0, APG()), ((p, p), 1.0, APG(space="eps"))]))(
                Prediction.of(randn(2, 2), 0.5, VP(), x0=randn(2, 2))
            )
        )


@pytest.mark.parametrize("beta", [0.0, -0.5])
def test_the_memory_follows_a_resampling(beta):
    "Resample in the middle of a path: the same as if the chosen rows had gone all the way twice."
    d, idx, grid = net(), torch.tensor([3, 3, 0, 1]), time_grid(VP(), 6)
    x, y = randn(4, 2), torch.tensor([0.5, 1.0, -1.0, 2.0], dtype=F64)

    def run(x, label, swap):
        g, s = apg(d, 3.0, beta=beta), DPMSolverPP(2)
        g.start(grid)
        s.start(VP(), grid)
        for i, (t, u) in enumerate(zip(grid.tolist(), grid.tolist()[1:])):
            if i == 3 and swap:
                x, label = x[idx], label[idx]
                g.reindex(idx)
                s.reindex(idx)
            x = s.step(lambda z, v, label=label: g(z, v, label=label), x, t, u)
        return x

    assert_close(run(x, y, True), run(x[idx], y[idx], False), rtol=1e-12, atol=1e-12)
