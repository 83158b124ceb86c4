"""DPM-Solver++ against diffusers on the same grid and draws, and properties that hold on every
grid."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkit.core.data import four_gaussians, ring
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, Prediction, cfg, count_evals
from diffkit.core.process import EDM, VP, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, sample
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP, sample_adaptive, threshold
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
