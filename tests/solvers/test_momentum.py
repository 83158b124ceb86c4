"""Momentum: saved configurations, what the notebook's tests leave out, and wrong input."""

import pytest
import torch

from diffkit.core.adapters import DiffusersScheduler
from diffkit.core.data import four_gaussians
from diffkit.core.denoiser import MixtureDenoiser, cfg
from diffkit.core.process import VP, Flow, time_grid
from diffkit.core.sampling import rms, sample
from diffkit.solvers.basics import stability_interval
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from diffkit.solvers.momentum import GHVB, HeavyBall, ghvb_coefficients, recursion
from diffkit.solvers.pndm import PLMS

X = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
BED = MixtureDenoiser(four_gaussians(), VP())


@pytest.mark.parametrize(
    "solver",
    [
        GHVB(3, 0.5),
        HeavyBall(),
        HeavyBall(PLMS(2), 0.3, nesterov=True),
        HeavyBall(DPMSolverPP(3, rule="taylor"), 0.9),
    ],
    ids=repr,
)
def test_a_saved_configuration_brings_the_solver_back(solver):
    pytest.importorskip("diffusers")
    sch = DiffusersScheduler.from_config(DiffusersScheduler(solver).config)
    assert repr(sch.solver) == repr(solver)


@pytest.mark.parametrize("order", range(1, 9))
def test_order_conditions(order):
    """The recursion is exact for polynomials up to its order: put x = u^(k+1) / (k+1), e = u^k
    into it."""
    for beta in (0.05, 0.3, 1.0):
        a, c = recursion("ghvb", order, beta)
        for k in range(order):
            past = sum(w * (-j) ** (k + 1) / (k + 1) for j, w in enumerate(a)) + sum(
                w * (-float(j)) ** k for j, w in enumerate(c)
            )
            assert past == pytest.approx(1 / (k + 1), abs=1e-8), (beta, k)


def test_float32_and_guidance_keep_the_history_of_the_guided_noise():
    d, y = cfg(MixtureDenoiser(four_gaussians(), Flow()), 2.0), torch.arange(16) % 4
    out = sample(d, GHVB(3, 0.5), X, time_grid(Flow(), 20), cond={"label": y}, progress=False)
    assert (
        rms(
            sample(
                d, GHVB(3, 0.5), X.float(), time_grid(Flow(), 20), cond={"label": y}, progress=False
            ),
            out,
        )
        < 1e-4
    )


def test_more_damping_never_shrinks_the_interval():
    for method, order in (("ghvb", 2), ("ghvb", 4), ("hb", 4), ("nt", 2)):
        ends = [stability_interval(*recursion(method, order, b)) for b in (1.0, 0.9, 0.7, 0.5, 0.3)]
        assert all(u >= v - 1e-6 for u, v in zip(ends, ends[1:])), (method, order, ends)


@pytest.mark.parametrize(
    "make,error,says",
    [
        (lambda: GHVB(9), ValueError, "1 to 8, got 9"),
        (lambda: GHVB(0), ValueError, "got 0"),
        (lambda: GHVB(2, 0.0), ValueError, "got 0.0"),
        (lambda: GHVB(2, 1.1), ValueError, "got 1.1"),
        (lambda: GHVB.named(0), ValueError, "got 0"),
        (lambda: HeavyBall(GHVB(2)), TypeError, "nothing but a table"),
        (lambda: ghvb_coefficients(2.5, 0.5), ValueError, "got 2.5"),
        (
            lambda: sample(
                BED, HeavyBall(DPMSolverPP(2, sde=True)), X, time_grid(VP(), 4), progress=False
            ),
            ValueError,
            "adds noise",
        ),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()
