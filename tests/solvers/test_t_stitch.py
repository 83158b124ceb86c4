"""T-Stitch: every solver and guidance around it, resampling, gradients, and the adapters that
do not announce a grid."""

import pytest
import torch
from torch import nn

from diffkit.core.adapters import as_k_diffusion
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg
from diffkit.core.process import EDM, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Heun, sample
from diffkit.guidance.apg import apg
from diffkit.solvers.deis import DEIS, RhoRK
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from diffkit.solvers.pndm import PNDM
from diffkit.solvers.t_stitch import StitchSolver, stitch, sweep

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


@pytest.mark.parametrize("prices", [(1.0, 4.0), (0.25, 1.0), (30.0, 10.0), (0.0, 7.0)])
def test_a_sweep_reports_value_and_cost_of_each_share(prices):
    "The cost is that of one call on average, in units of a call of the large model."
    small, large = pair(VP())
    grid, metric = time_grid(VP(), 10, end=1e-3), lambda y: y.square().sum()
    rows = sweep([small, large], DDIM, X, grid, metric, (0.0, 0.3, 1.0), prices)
    assert [r["fraction"] for r in rows] == [0.0, 0.3, 1.0]
    for r, k in zip(rows, (0, 3, 10)):  # steps of the small model
        y = sample(small, DDIM(), X, grid[: k + 1], progress=False) if k else X
        y = sample(large, DDIM(), y, grid[k:], progress=False) if k < 10 else y
        assert r["value"] == pytest.approx(metric(y).item(), rel=1e-12)
        want = (k * prices[0] + (10 - k) * prices[1]) / (10 * prices[1])
        assert r["cost"] == pytest.approx(want, rel=1e-12)
    # with two calls a step the ends are the same
    rows = sweep([small, large], lambda: DPMSingle(2), X, grid, metric, (0.0, 1.0), prices)
    assert [r["cost"] for r in rows] == pytest.approx([1.0, prices[0] / prices[1]], rel=1e-12)


def test_the_price_of_a_call_is_by_default_the_number_of_parameters():
    class Net(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(width, dtype=torch.float64))

        def forward(self, x, t):
            return x * self.w.sum()

    nets = [NetDenoiser(Net(k), VP(), "eps") for k in (3, 12)]
    rows = sweep(nets, DDIM, X, time_grid(VP(), 4), lambda y: y.sum(), fractions=(0.0, 0.5, 1.0))
    assert [r["cost"] for r in rows] == [1.0, (1 + 0.25) / 2, 0.25]
    assert len(sweep(nets, DDIM, X, time_grid(VP(), 4), lambda y: y.sum())) == 6
    for prices in (None, [1.0, 0.0]):
        with pytest.raises(ValueError, match="prices are needed for models without parameters"):
            sweep(pair(VP()), DDIM, X, time_grid(VP(), 4), lambda y: y.sum(), prices=prices)


@pytest.mark.parametrize("scale, each", [(1.0, 1), (2.0, 2)])
def test_start_forgets_the_last_run_and_takes_the_grid(scale, each):
    """For loops of one's own: the calls of a run by `sample` are gone, and the switch is where the
    new grid has it."""
    d = stitch(pair(VP()), 0.5)
    # guidance calls twice
    model, cond = cfg(d, scale) if scale > 1 else d, {"label": torch.arange(6)}
    sample(model, DDIM(), X, time_grid(VP(), 6), cond=cond, progress=False)
    assert d.calls == [3 * each, 3 * each] and d.cost([1.0, 10.0]) == 33.0 * each
    for grid, want in (([1.0, 0.9, 0.2, 0.1, 0.0], [2, 2]), ([1.0, 0.3, 0.2, 0.0], [2, 1])):
        model.start(torch.tensor(grid, dtype=torch.float64))
        assert d.calls == [0, 0] and d.cost([1.0, 10.0]) == 0.0
        for t in grid[:-1]:
            model(X, t, **cond)
        assert d.calls == [k * each for k in want]
        assert d.cost([1.0, 10.0]) == each * (want[0] + 10 * want[1])
    given = stitch(pair(VP()), 0.5, grid=torch.tensor([1.0, 0.9, 0.8, 0.0]))
    given.start(torch.tensor([1.0, 0.5, 0.0]))  # a grid that was given stays
    assert [int(given.which(t)) for t in (1.0, 0.86, 0.84, 0.5)] == [0, 0, 1, 1]


@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_models_that_remember_are_resampled_and_start_anew(fraction):
    """Momentum of guidance inside of the stitch: a run whose batch was permuted in the middle ends
    where its rows would have ended, and a second run in a loop of one's own begins like a first."""
    remember = lambda: [apg(m, 4.0, beta=-0.5) for m in pair(VP())]
    grid, y = time_grid(VP(), 6), {"label": torch.zeros(6, dtype=torch.long)}
    order = torch.tensor([3, 1, 0, 5, 4, 2])

    def run(at=None):
        d, s, x = stitch(remember(), fraction).begin(grid), DDIM().begin(VP(), grid), X
        for i in range(6):
            if i == at:
                x = x[order]
                d.reindex(order)
                s.reindex(order)
            x = s.step(lambda z, t: d(z, t, **y), x, grid[i], grid[i + 1])
        return x

    want = run()
    assert not torch.equal(want[order], want)
    for at in range(6):
        torch.testing.assert_close(run(at), want[order], rtol=1e-12, atol=1e-12)
    d, fresh = stitch(remember(), fraction), stitch(remember(), fraction)
    d.start(grid)
    d(X, 0.9, **y)
    for model in (d, fresh):
        model.start(grid)
    assert torch.equal(d(X, 0.8, **y).x0, fresh(X, 0.8, **y).x0)
