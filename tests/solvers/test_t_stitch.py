"""T-Stitch: every solver and guidance around it, resampling, gradients, and the adapters that
do not announce a grid."""

import pytest
import torch

from diffkit.core.adapters import as_k_diffusion
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import MixtureDenoiser, cfg
from diffkit.core.process import EDM, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Heun, sample
from diffkit.solvers.deis import DEIS, RhoRK
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from diffkit.solvers.pndm import PNDM
from diffkit.solvers.t_stitch import StitchSolver, stitch

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pair(process):
    gm = ring(6)
    return [
        MixtureDenoiser(GaussianMixture(gm.means, scales=0.5, labels=gm.labels), process),
        MixtureDenoiser(gm, process),
    ]


@pytest.mark.parametrize("process", [VP(), Cosine(), Discrete(), EDM(), Flow()], ids=repr)
@pytest.mark.parametrize(
    "make",
    [DDIM, Heun, lambda: DPMSolverPP(3), lambda: DPMSingle(2), lambda: DEIS(3, "flow")],
    ids=["DDIM", "Heun", "3M", "2S", "DEIS"],
)
def test_ends_are_the_single_models_everywhere(process, make):
    grid, x = time_grid(process, 8, start=process.t_max), X * process.sigma(process.t_max)
    small, large = pair(process)
    for r, alone in ((0.0, large), (1.0, small)):
        assert torch.equal(
            sample(stitch([small, large], r), make(), x, grid, progress=False),
            sample(alone, make(), x, grid, progress=False),
        )
        d = stitch([small, large], r)
        assert torch.equal(
            sample(d, StitchSolver(make(), d), x, grid, progress=False),
            sample(alone, make(), x, grid, progress=False),
        )


@pytest.mark.parametrize(
    "make",
    [Heun, lambda: DPMSingle(3), lambda: RhoRK("4rk"), lambda: PNDM(4)],
    ids=["Heun", "3S", "RK4", "PNDM"],
)
def test_all_stages_of_a_step_by_one_model(make):
    d = stitch(pair(VP()), 0.5)
    s = StitchSolver(make(), d)
    sample(d, s, X, time_grid(VP(), 8, "log_snr"), progress=False)
    assert sum(d.calls) == s.evals(8) == make().evals(8)
    assert (
        d.calls[0] == make().evals(8) - make().evals(4)
        if isinstance(make(), PNDM) is False
        else d.calls[0] == 4 + 9
    )


def test_an_error_inside_a_step_releases_the_model():
    d = stitch(pair(VP()), 0.5)

    class Bad(DDIM):
        def step(self, denoise, x, t, s):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        sample(d, StitchSolver(Bad(), d), X, time_grid(VP(), 4), progress=False)
    assert d.forced is None


def test_gradient_goes_through_both_models():
    d, x = stitch(pair(VP()), 0.5), X.clone().requires_grad_()
    sample(d, DPMSolverPP(2), x, time_grid(VP(), 6), grad=True, progress=False).sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_a_caller_that_does_not_announce_the_grid():
    small, large = pair(EDM())
    grid = time_grid(EDM(), 8)
    with pytest.raises(ValueError, match="grid=grid"):
        as_k_diffusion(stitch([small, large], 0.5))(X, torch.full((6,), 3.0, dtype=torch.float64))
    f = as_k_diffusion(stitch([small, large], 0.5, grid=grid))
    for sigma, alone in (
        (float(EDM().sigma(grid[1])), small),
        (float(EDM().sigma(grid[6])), large),
    ):
        torch.testing.assert_close(
            f(X * sigma, torch.full((6,), sigma, dtype=torch.float64)),
            as_k_diffusion(alone)(X * sigma, torch.full((6,), sigma, dtype=torch.float64)),
        )


def test_guidance_around_and_inside_agree_under_conditions():
    y = {"label": torch.arange(6)}
    around, inside = (
        cfg(stitch(pair(VP()), 0.3), 4.0),
        stitch([cfg(m, 4.0) for m in pair(VP())], 0.3),
    )
    for s in (DDIM(), DPMSolverPP(3)):
        torch.testing.assert_close(
            sample(around, s, X, time_grid(VP(), 9), cond=y, progress=False),
            sample(inside, s, X, time_grid(VP(), 9), cond=y, progress=False),
        )
