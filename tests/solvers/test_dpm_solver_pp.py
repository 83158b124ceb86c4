"""DPM-Solver++ against diffusers on the same grid and draws, and properties that hold on every
grid."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkit.core.data import four_gaussians, ring
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, Prediction, cfg, count_evals
from diffkit.core.process import EDM, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, sample
from diffkit.solvers.dpm_solver_pp import (
    DPMSingle,
    DPMSolverPP,
    sample_adaptive,
    single_step,
    singlestep_plan,
    threshold,
)
from resampled import resampled

P = Discrete()
BED = MixtureDenoiser(four_gaussians(), P)
X = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def peer(n, x, noise=None, **options):
    from diffusers import DPMSolverMultistepScheduler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = DPMSolverMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, final_sigmas_type="sigma_min", **options
        )
    s.set_timesteps(n)
    grid = time_grid(P, n, "linspace")
    # the same grid to all digits: theirs is a float32 product of a thousand factors
    s.sigmas = P.sigma(grid) / P.alpha(grid)
    y = x[..., None, None]
    for i, t in enumerate(s.timesteps):
        extra = {} if noise is None else {"variance_noise": noise[i][..., None, None]}
        y = s.step(
            BED(y[..., 0, 0], (t.item() + 1) / 1000).eps[..., None, None], t, y, **extra
        ).prev_sample
    return y[..., 0, 0]


@pytest.mark.parametrize("n", [5, 8, 14, 20, 50])
@pytest.mark.parametrize(
    "mine,theirs",
    [
        (dict(order=1), dict(solver_order=1)),
        (dict(order=2, lower_order_final=False), dict(lower_order_final=False)),
        (dict(order=2, lower_order_final=True), dict(lower_order_final=True)),
        (
            dict(order=2, rule="taylor", lower_order_final=False),
            dict(solver_type="heun", lower_order_final=False),
        ),
        (
            dict(order=3, official=True, lower_order_final=False),
            dict(solver_order=3, lower_order_final=False),
        ),
        (
            dict(order=2, form="eps", lower_order_final=False),
            dict(algorithm_type="dpmsolver", lower_order_final=False),
        ),
    ],
)
def test_equal_to_diffusers(mine, theirs, n):
    # diffusers lowers below 15 steps only
    if theirs.get("lower_order_final") is True and n >= 15:
        mine = {**mine, "lower_order_final": False}
    y = sample(BED, DPMSolverPP(**mine), X, time_grid(P, n, "linspace"), progress=False)
    torch.testing.assert_close(y, peer(n, X, **theirs).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", [1, 2])
def test_sde_equal_to_diffusers_on_the_same_draws(order):
    n = 12
    z = torch.randn(n, 16, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    y = sample(
        BED,
        DPMSolverPP(order, sde=True, noise=z, lower_order_final=False),
        X,
        time_grid(P, n, "linspace"),
        progress=False,
    )
    torch.testing.assert_close(
        y,
        peer(
            n, X, z, algorithm_type="sde-dpmsolver++", solver_order=order, lower_order_final=False
        ).double(),
        rtol=1e-5,
        atol=2e-5,
    )


class Poly(Denoiser):
    def __init__(self, coef, process):
        super().__init__()
        self.coef, self.process = coef, process

    def forward(self, x, t):
        lam = self.process.log_snr(t)
        return Prediction.of(
            x,
            t,
            self.process,
            x0=sum(c * lam**k for k, c in enumerate(self.coef)) * torch.ones_like(x),
        )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.02, 0.98), min_size=5, max_size=5, unique=True),
    st.sampled_from([VP(), Flow(), EDM()]),
)
def test_third_order_is_exact_for_quadratics_on_any_grid(times, process):
    ts = torch.tensor(sorted(times, reverse=True), dtype=torch.float64)
    # divided differences over tiny gaps lose digits, which is not what is tested
    if (-ts.diff()).min() < 0.01:
        return
    d, coef = Poly([0.7, -0.4, 0.3], process), [0.7, -0.4, 0.3]
    lam = process.log_snr(ts)
    # x / sigma = F(lambda) with F' = e^lambda p(lambda): F = e^lambda (p - p' + p'')
    F = lambda u: (
        u.exp() * (coef[0] + coef[1] * u + coef[2] * u**2 - coef[1] - 2 * coef[2] * u + 2 * coef[2])
    )
    exact = process.sigma(ts) * F(lam)
    s = DPMSolverPP(3, lower_order_final=False)
    s.start(process, ts)
    for i in range(4):
        y = s.step(lambda x, t: d(x, t), exact[i].reshape(1, 1), ts[i].item(), ts[i + 1].item())
    torch.testing.assert_close(
        y.squeeze(), exact[-1], rtol=1e-8, atol=1e-8 * float(exact.abs().max())
    )


def test_cost_is_what_evals_says():
    for s in (
        DPMSolverPP(2),
        DPMSolverPP(3),
        DPMSolverPP(3, start="singlestep"),
        DPMSolverPP(2, start="singlestep"),
        DPMSingle(2),
        DPMSingle(3),
    ):
        with count_evals(BED) as n:
            sample(BED, s, X, time_grid(P, 7), progress=False)
        assert n.calls == s.evals(7), s


def test_a_solver_can_be_used_twice_and_reindexed():
    s, grid = DPMSolverPP(3), time_grid(P, 9)
    a, b = (sample(BED, s, X, grid, progress=False) for _ in range(2))
    assert torch.equal(a, b)  # nothing of the first trajectory is left
    idx = torch.tensor([3, 3, 0])
    torch.testing.assert_close(resampled(s, BED, X, grid, 4, idx), a[idx])


def test_threshold_composes_with_guidance_and_solvers():
    model = cfg(MixtureDenoiser(ring(), VP()), 12.0)
    x, y = (
        torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        torch.arange(16) % 8,
    )
    for s in (DDIM(), DPMSolverPP(2), DPMSingle(3)):
        out = sample(
            threshold(model), s, x, time_grid(VP(), 20, end=0.0), cond={"label": y}, progress=False
        )
        assert (
            out.abs().max() <= 1 + 1e-9
            and sample(model, s, x, time_grid(VP(), 20, end=0.0), cond={"label": y}, progress=False)
            .abs()
            .max()
            > 1
        )


def test_adaptive_meets_its_tolerance_under_guidance():
    model = cfg(MixtureDenoiser(ring(), VP()), 3.0)
    x, cond = (
        torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
        {"label": torch.arange(8)},
    )
    fine, many = sample_adaptive(model, x, atol=1e-6, rtol=1e-6, cond=cond)
    rough, few = sample_adaptive(model, x, atol=1e-3, rtol=1e-3, cond=cond)
    assert (fine - rough).abs().max() < 2e-2 and few < many / 2


def test_half_precision_stays_finite():
    y = sample(BED, DPMSolverPP(2), X.bfloat16(), time_grid(P, 20), progress=False)
    assert (
        y.dtype == torch.bfloat16
        and torch.isfinite(y).all()
        and (y.double() - sample(BED, DPMSolverPP(2), X, time_grid(P, 20), progress=False))
        .abs()
        .max()
        < 0.2
    )


def by_the_paper(d, x, t, s, order, form, r1, r2, rule):
    """One singlestep update with the published phi functions: algorithms 1 and 2 of arXiv
    2206.00927, their data form, and the rule that takes all inner points."""
    p, sign = d.process, 1 if form == "eps" else -1
    t, s = torch.tensor([t, s], dtype=torch.float64)
    lam, h = p.log_snr(t), p.log_snr(s) - p.log_snr(t)
    part = p.alpha if form == "eps" else p.sigma  # what the state keeps
    size = p.sigma if form == "eps" else p.alpha
    model = lambda y, u: getattr(d(y, u), form)
    phi1 = lambda r: torch.expm1(sign * r * h)
    phi2 = lambda r: phi1(r) / (r * h) - sign

    def moved(u, r, slope=0.0):
        out = part(u) / part(t) * x - size(u) * phi1(r) * m0
        return out - sign * size(u) * phi2(r) * slope

    s1, s2 = (p.time(lam + r * h) for r in (r1, r2))
    m0 = model(x, t)
    d0 = (model(moved(s1, r1), s1) - m0) / r1
    if order == 2:
        half = size(s) * phi1(1) / 2
        return moved(s, 1) - half * d0 if rule == "midpoint" else moved(s, 1, sign * sign * d0)
    d1 = (model(moved(s2, r2, r2 * d0), s2) - m0) / r2
    if rule == "midpoint":
        return moved(s, 1, d1)
    slope, bend = (r2 * d0 - r1 * d1) / (r2 - r1), 2 * (d1 - d0) / (r2 - r1)
    return moved(s, 1, slope) - size(s) * (phi2(1) / h - 0.5) * bend


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("rule", ["midpoint", "taylor"])
@pytest.mark.parametrize("order, r1, r2", [(2, 0.5, 0.5), (2, 0.3, 0.5), (3, 1 / 3, 2 / 3),
                                           (3, 0.2, 0.9), (3, 0.7, 0.4)])  # fmt: skip
@pytest.mark.parametrize("process", [VP(), Cosine()], ids=repr)
def test_single_steps_are_the_papers(form, rule, order, r1, r2, process):
    d = MixtureDenoiser(four_gaussians(), process)
    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    points = dict(r1=r1) | (dict(r2=r2) if order == 3 else {})
    for t, s in ((0.9, 0.6), (0.3, 0.05)):
        got = single_step(d, x, t, s, process, order, form, rule=rule, **points)
        want = by_the_paper(d, x, t, s, order, form, r1, r2, rule)
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        grid = torch.tensor([t, s], dtype=torch.float64)
        solver = DPMSingle(order, form, rule=rule, **points)
        torch.testing.assert_close(sample(d, solver, x, grid, progress=False), want)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("spacing", ["uniform", "log_snr"])
def test_mixed_orders_spend_what_is_given(order, spacing):
    d = MixtureDenoiser(four_gaussians(), VP())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for nfe in range(1, 12):
        grid, orders = singlestep_plan(VP(), nfe, order, spacing, end=1e-3)
        assert sum(orders) == nfe == DPMSingle(orders).evals(len(orders))
        assert len(grid) == len(orders) + 1 and grid[0] == 1 and abs(grid[-1] - 1e-3) < 1e-12
        full = time_grid(VP(), nfe, end=1e-3)
        y = x
        with count_evals(d) as e:
            got = sample(d, DPMSingle(orders), x, grid, progress=False)
        assert e.calls == nfe
        at = 0
        for k, t, s in zip(orders, grid[:-1].tolist(), grid[1:].tolist()):
            y = single_step(d, y, t, s, VP(), k)
            at += k
            if spacing == "uniform":
                assert s == full[at]
        torch.testing.assert_close(got, y)
    # the published lists
    lists = {7: [3, 3, 1], 8: [3, 3, 2], 9: [3, 3, 2, 1]}
    for nfe, want in lists.items():
        assert singlestep_plan(VP(), nfe)[1] == want
    assert singlestep_plan(VP(), 7, 2)[1] == [2, 2, 2, 1]


def test_threshold_keeps_double_precision():
    "The bound is the quantile of the values as they are, not of values rounded to float32."
    x0 = torch.randn(3, 400, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2

    class Says(Denoiser):
        process = VP()

        def forward(self, x, t):
            return Prediction.of(x, t, self.process, x0=x0.to(x.dtype))

    got = threshold(Says(), 0.9)(x0, 0.5).x0
    bound = x0.abs().quantile(0.9, 1, keepdim=True)
    torch.testing.assert_close(got, x0.clamp(-bound, bound) / bound, rtol=1e-15, atol=1e-15)
    assert threshold(Says(), 0.9)(x0.bfloat16(), 0.5).x0.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: DPMSingle(2, r2=0.5), "r2 belongs to order 3"),
        (lambda: DPMSingle(3, r1=1.0), "r1=1.0, order=3"),
        (lambda: DPMSingle(3, r1=0.4, r2=0.4), "must differ, got 0.4 twice"),
        (lambda: DPMSingle(3, r1=2 / 3), "must differ"),
        (lambda: DPMSingle(3, rule="heun"), "got 'heun'"),
        (lambda: DPMSingle([3, 4]), "got 4 in it"),
        (lambda: DPMSingle([]), r"got \[\]"),
        (lambda: DPMSingle([3, 2], r1=0.4), "belong to a single order"),
        (lambda: DPMSingle([3, 2, 1]).evals(4), "lists 3 steps, the grid has 4"),
        (lambda: DPMSingle([3, 2]).begin(VP(), time_grid(VP(), 3)), "the grid has 3"),
        (lambda: singlestep_plan(VP(), 0), "got 0"),
        (lambda: singlestep_plan(VP(), 5, order=1), "got 1"),
        (lambda: single_step(None, None, 0.5, 0.4, VP(), 2, r2=0.3), "r2=0.3, order=2"),
    ],
)
def test_what_singlesteps_refuse(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("form", ["x0", "eps"])
@pytest.mark.parametrize("order", [2, 3])
def test_a_singlestep_from_alpha_zero_is_first_order(form, order):
    d = MixtureDenoiser(four_gaussians(), Flow())
    x = torch.randn(4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first = torch.tensor([1.0, 0.7], dtype=torch.float64)
    go = lambda s: sample(d, s, x, first, progress=False)
    torch.testing.assert_close(go(DPMSingle(order, form)), go(DDIM()))
