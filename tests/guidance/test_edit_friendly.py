"""Edit-friendly inversion: exact reconstruction for random models, samplers and processes,
LEDITS++'s parity, batching, guidance, and wrong input."""

import pytest
import torch
from diffkit.core.data import ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, sample
from diffkit.guidance.apg import apg
from diffkit.guidance.edit_friendly import ddim_invert, edit, invert, noisy_path, replay
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def net(process=None, predicts="v"):  # a made-up conditional network with a null label
    return NetDenoiser(
        lambda x, t, label: torch.sin(3 * x + label[:, None].to(x)) + t[:, None].to(x),
        process or VP(),
        predicts,
        null={"label": 0},
    )


def labels(k, n=6):
    return {"label": torch.full((n,), k)}


@settings(max_examples=30, deadline=None)
@given(
    process=st.sampled_from(
        [VP(), Cosine(), Discrete(torch.linspace(1e-4, 0.02, 1000)), VE(), EDM(), Flow()]
    ),
    steps=st.integers(3, 12),
    eta=st.floats(0.05, 1.0),
    seed=st.integers(0, 1000),
    chain=st.sampled_from(["independent", "forward"]),
    zero=st.booleans(),
)
def test_any_model_any_process_comes_back(process, steps, eta, seed, chain, zero):
    start = min(process.t_max, 0.97)
    grid = time_grid(process, steps, "uniform", start, 0.0 if zero else max(process.t_min, 1e-3))
    x = randn(6, 2, seed=seed)
    for solver in (DDIM(eta), Ancestral(), EulerMaruyama(), DPMSolverPP(order=2, sde=True)):
        n = invert(net(process), x, grid, solver, labels(1), chain, generator=gen(seed))
        # VE starts at 100: one unit of rounding there is a hundred at the image
        scale = max(1.0, n.x.abs().max().item())
        assert_close(
            replay(net(process), n, labels(1), progress=False), x, rtol=0, atol=1e-12 * scale
        )
        assert n.x.shape == (steps + 1, 6, 2) and n.z.shape == (steps, 6, 2)


def test_the_callers_solver_is_left_alone():
    s = DDIM(1.0)
    invert(net(), randn(6, 2), time_grid(VP(), 5), s, labels(1))
    assert s.noise is None and not hasattr(s, "rows")


def test_noises_of_a_sampler_are_found_again():
    """Sample with known noise, hand the path's states over: the noises that come out are those
    that went in."""
    d, grid, z = net(), time_grid(VP(), 9), randn(9, 6, 2, seed=5)
    states = [randn(6, 2, seed=1)]
    out = sample(
        d,
        DDIM(1.0, noise=z),
        states[0],
        grid,
        cond=labels(2),
        callback=lambda i, t, x, p: states.append(x),
        progress=False,
    )
    # as an "independent" path with just these noises
    eps = torch.stack(
        [(x - VP().alpha(t) * out) / VP().sigma(t) for x, t in zip(states, grid.tolist())][:-1]
    )
    n = invert(d, out, grid, DDIM(1.0), labels(2), eps=eps)
    assert_close(n.z, z, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "solver", [DDIM(1.0), DPMSolverPP(order=2, sde=True)], ids=["first order", "second order"]
)
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_batched_is_sequential(batch, solver):
    d, x, grid = net(), randn(6, 2), time_grid(VP(), 10)
    one, many = (
        invert(d, x, grid, solver, labels(1), batch=b, generator=gen()) for b in (None, batch)
    )
    assert_close(one.z, many.z, rtol=1e-8, atol=1e-8)
    calls = []

    class Spy(NetDenoiser):
        def forward(self, x, t, **c):
            calls.append(len(x))
            return super().forward(x, t, **c)

    invert(
        Spy(d.net, VP(), "v", null={"label": 0}),
        x,
        grid,
        solver,
        labels(1),
        batch=batch,
        generator=gen(),
    )
    assert len(calls) == -(-10 // batch) and sum(calls) == 60


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_conditions_of_any_shape_keep_their_rows_in_a_batch(batch):
    "Numbers, vectors, matrices and nested ones, another for each image: as one step at a time."

    def net(x, t, label, text, more, gain):
        away = text.mean(1) + more["map"].sum((1, 2))[:, None] * more["flags"][:, None]
        return torch.sin(gain * x + label[:, None] + away[:, :2]) + t[:, None].to(x)

    d, x, grid = NetDenoiser(net, VP(), "v"), randn(6, 2), time_grid(VP(), 8)
    cond = {
        "label": randn(6, seed=1),
        "text": randn(6, 5, 3, seed=2),
        "more": {"map": randn(6, 1, 4, seed=3), "flags": randn(6, seed=4)},
        "gain": 2.0,
    }
    one, many = (invert(d, x, grid, None, cond, batch=b, generator=gen()) for b in (None, batch))
    assert_close(many.z, one.z, rtol=1e-8, atol=1e-8)
    # row by row: nothing of another image
    for i in (0, 5):
        own = {k: v[i : i + 1] for k, v in cond.items() if k in ("label", "text")}
        own |= {"more": {k: v[i : i + 1] for k, v in cond["more"].items()}, "gain": 2.0}
        eps = torch.stack([(y - VP().alpha(t) * x) / VP().sigma(t) for y, t in zip(one.x, grid)])
        alone = invert(d, x[i : i + 1], grid, None, own, batch=batch, eps=eps[:-1, i : i + 1])
        assert_close(alone.z, one.z[:, i : i + 1], rtol=1e-7, atol=1e-7)


def test_under_guidance_and_inside_other_guidance():
    x, grid = randn(6, 2), time_grid(VP(), 12)
    for make in (
        lambda d: cfg(d, 3.0),
        lambda d: apg(d, 3.0, beta=-0.5),
        lambda d: cfg(apg(d, 2.0), 2.0),
    ):
        d = make(net())
        assert_close(
            replay(
                d, invert(d, x, grid, cond=labels(1), generator=gen()), labels(1), progress=False
            ),
            x,
            rtol=0,
            atol=1e-11,
        )
    d = net()
    with count_evals(d) as n:
        edit(
            d,
            x,
            grid,
            labels(1),
            labels(2),
            scale=(1.0, 3.0),
            skip=0.25,
            generator=gen(),
            progress=False,
        )
    assert n.rows == 6 * 9 * (1 + 2)  # nine steps are left: one evaluation to invert, two to replay


def test_ledits_is_the_second_order_inversion():
    """diffusers' LEDITS++ inverts with its SDE-DPM-Solver++; on one grid the noise-free means
    agree, so do the noises."""
    diffusers = pytest.importorskip("diffusers")
    sch = diffusers.DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        algorithm_type="sde-dpmsolver++",
        solver_order=2,
        timestep_spacing="trailing",
        final_sigmas_type="zero",
        euler_at_final=False,
        lower_order_final=True,
    )
    sch.set_timesteps(20)
    process = Discrete(sch.betas.double())
    grid = time_grid(process, 20, "trailing")
    d, x = net(process, "eps"), randn(4, 2)
    n = invert(
        d,
        x,
        grid,
        DPMSolverPP(order=2, sde=True, lower_order_final=True),
        labels(1, 4),
        generator=gen(),
    )
    y = n.x[0]
    for t, u, z in zip(sch.timesteps, grid.tolist(), n.z):
        y = sch.step(d(y, u, **labels(1, 4)).eps, t, y, variance_noise=z).prev_sample
    # their schedule is a float32 product, off by up to 1e-4 relatively; noises of size 10 multiply
    # that. The last step is without noise: the residual
    assert_close(y + n.z[-1], x, rtol=0, atol=2e-2)


def test_single_precision_and_a_batch_of_one_or_none():
    grid, d = time_grid(VP(), 8), net()
    for n in (0, 1, 5):
        x = randn(n, 2, dtype=torch.float32)
        back = replay(
            d, invert(d, x, grid, cond=labels(1, n), generator=gen()), labels(1, n), progress=False
        )
        assert back.dtype == torch.float32 and back.shape == x.shape
        if n:
            assert_close(back, x, rtol=0, atol=2e-6)


def test_same_seed_same_edit():
    d, x, grid = net(), randn(6, 2), time_grid(VP(), 8)
    f = lambda s: edit(d, x, grid, labels(1), labels(2), generator=gen(s), progress=False)
    assert torch.equal(f(0), f(0)) and not torch.equal(f(0), f(1))


def test_ddim_inversion_on_a_point_is_exact():
    """A model that is sure of the image predicts the same noise everywhere: then the wrong end
    of the step does not matter."""
    from diffkit.core.data import GaussianMixture

    d = MixtureDenoiser(GaussianMixture([[0.5, -1.0]], scales=0.0), VP())
    x, grid = torch.tensor([[0.5, -1.0]], dtype=F64) + 0.01 * randn(1, 2), time_grid(VP(), 15)
    assert_close(
        sample(d, DDIM(), ddim_invert(d, x, grid), grid, progress=False), x, rtol=0, atol=1e-10
    )


def test_the_network_may_be_told_the_upper_time():
    "By hand: the noise predicted at the lower state under the upper time, and a DDIM step up."
    d, p = net(predicts="eps"), VP()
    x, grid, c = randn(6, 2) / 3, time_grid(VP(), 5), labels(1)
    y = x
    for s, t in zip(grid.flip(0), grid.flip(0)[1:]):  # from s up to t
        e = d(y, t.item(), **c).eps
        y = p.alpha(t) / p.alpha(s) * (y - p.sigma(s) * e) + p.sigma(t) * e
    assert_close(ddim_invert(d, x, grid, c, told="upper"), y)
    assert not torch.allclose(ddim_invert(d, x, grid, c), y)
    with pytest.raises(ValueError, match="told must be lower or upper, got 'next'"):
        ddim_invert(d, x, grid, c, told="next")


def test_an_edit_takes_its_draws():
    d, grid = net(), time_grid(VP(), 8)
    x, eps = randn(6, 2) / 3, randn(5, 6, 2, seed=3)  # 36 % of 8 steps are left out: three
    go = lambda **k: edit(d, x, grid, labels(1), labels(2), progress=False, **k)
    assert torch.equal(go(eps=eps), go(eps=eps)) and not torch.equal(go(eps=eps), go(eps=-eps))
    by_hand = invert(d, x, grid[3:], cond=labels(1), eps=eps)
    assert_close(go(eps=eps, scale=(1.0, 1.0)), replay(d, by_hand, labels(2), progress=False))
    with pytest.raises(ValueError, match="eps"):
        go(eps=eps[1:])


@pytest.mark.parametrize(
    "change,error,says",
    [
        (dict(solver=DDIM(0.0)), ValueError, "eta > 0"),
        (dict(solver=DPMSolverPP(order=2)), ValueError, "adds no noise"),
        (dict(solver=Heun()), TypeError, "draws noise"),
        (dict(solver=Euler()), TypeError, "draws noise"),
        (dict(solver=Ancestral("learned")), ValueError, "learned"),
        (dict(grid=torch.tensor([0.9, 0.5])), ValueError, "near the data"),
        (dict(grid=torch.tensor([0.1, 0.5])), ValueError, "strictly decreasing"),
        (dict(batch=0), ValueError, "batch must be"),
        (dict(chain="both"), ValueError, "chain must be"),
        (dict(cond=labels(1, 5)), ValueError, "one row a sample"),
        (dict(denoiser=lambda x, t: x), TypeError, "Denoiser"),
        (dict(eps=torch.zeros(3, 6, 2)), ValueError, "eps must have shape"),
        (dict(x0=None), TypeError, "x must be a tensor"),
    ],
)
def test_wrong_input_to_invert(change, error, says):
    with pytest.raises(error, match=says):
        invert(
            **{
                "denoiser": net(),
                "x0": randn(6, 2),
                "grid": time_grid(VP(), 6),
                "cond": labels(1),
                **change,
            }
        )


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(skip=1.0), "skip"),
        (dict(skip=-0.5), "skip"),
        (dict(scale=3.0), "two numbers"),
        (dict(scale=(1.0, 2.0, 3.0)), "two numbers"),
    ],
)
def test_wrong_input_to_edit(change, says):
    with pytest.raises((ValueError, TypeError), match=says):
        edit(
            **{
                "denoiser": net(),
                "x0": randn(6, 2),
                "grid": time_grid(VP(), 6),
                "source": labels(1),
                "target": labels(2),
                **change,
            }
        )


def test_a_forward_path_needs_gaussian_increments():
    class Heavy(VP):
        gaussian = False

    with pytest.raises(ValueError, match="Gaussian"):
        noisy_path(Heavy(), randn(2, 2), time_grid(VP(), 4), "forward")
    assert MixtureDenoiser(ring(), VP()).process.gaussian
