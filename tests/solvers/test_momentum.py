"""Momentum: saved configurations, what the notebook's tests leave out, and wrong input."""

from fractions import Fraction

import pytest
import torch

from diffkit.core.adapters import DiffusersScheduler
from diffkit.core.data import four_gaussians
from diffkit.core.denoiser import MixtureDenoiser, cfg
from diffkit.core.process import VP, Flow, time_grid
from diffkit.core.sampling import rms, sample
from diffkit.solvers.basics import stability_interval
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from diffkit.solvers.momentum import GHVB, HeavyBall, ghvb_coefficients, magnitude_score, recursion
from diffkit.solvers.pndm import PLMS, ab_coefficients

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


@pytest.mark.parametrize("beta", [1.0, 0.8, 0.5, 0.1])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("steps", [2, 3, 6, 12])
def test_skip_is_the_releases_rule_around_2m(beta, final, steps):
    """The release's loop: steps of first order are DPM-Solver++'s own and leave the velocity alone;
    the first of second order sets it undamped, the others average."""
    p = VP()
    grid = time_grid(p, steps, end=1e-3)
    lam = p.log_snr(grid)
    alpha, sigma = p.alpha(grid), p.sigma(grid)
    x, v, old = X, None, None
    for i in range(steps):
        m = BED(x, grid[i]).x0
        h = lam[i + 1] - lam[i]
        lowered = final and i == steps - 1
        d = m
        if i > 0 and not lowered:
            g = m + 0.5 * h / (lam[i] - lam[i - 1]) * (m - old)
            v = g if v is None else (1 - beta) * v + beta * g
            d = v
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * d
        old = m
    got = sample(
        BED,
        HeavyBall(DPMSolverPP(2, lower_order_final=final), beta, lower="skip"),
        X,
        grid,
        progress=False,
    )
    torch.testing.assert_close(got, x, rtol=1e-10, atol=1e-10)


def test_average_moves_the_velocity_in_every_step():
    "The recursion by hand, a lowered last step included; it differs from the release's rule."
    p, beta = VP(), 0.6
    grid = time_grid(p, 6, end=1e-3)
    lam, alpha, sigma = p.log_snr(grid), p.alpha(grid), p.sigma(grid)
    x, v, old = X, None, None
    for i in range(6):
        m = BED(x, grid[i]).x0
        h = lam[i + 1] - lam[i]
        lowered = i in (0, 5)
        g = m if lowered else m + 0.5 * h / (lam[i] - lam[i - 1]) * (m - old)
        v = g if v is None else (1 - beta) * v + beta * g
        x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * torch.expm1(-h) * v
        old = m
    run = lambda how: sample(
        BED,
        HeavyBall(DPMSolverPP(2, lower_order_final=True), beta, lower=how),
        X,
        grid,
        progress=False,
    )
    torch.testing.assert_close(run("average"), x, rtol=1e-10, atol=1e-10)
    assert (run("average") - run("skip")).abs().max() > 1e-3


@pytest.mark.parametrize("beta", [1.0, 0.7, 0.1])
def test_weights_of_every_order_meet_their_conditions_exactly(beta):
    for order in range(1, 9):
        w = [Fraction(v) for v in ghvb_coefficients(order, beta)]
        for k in range(order):
            moment = (1 - (1 - Fraction(beta)) * (-1) ** k) / (k + 1)
            got = sum(v * (-j) ** k for j, v in enumerate(w))
            size = sum(abs(v) * j**k for j, v in enumerate(w)) + 1
            assert abs(got - moment) <= size * Fraction(2) ** -52, (order, k)  # rounding of w only
    assert ghvb_coefficients(8, 1.0) == ab_coefficients(8)


@pytest.mark.parametrize("side", [(6, 9), (9, 6), (4, 4), (3, 8)])
@pytest.mark.parametrize("kernel", [1, 2, 3])
@pytest.mark.parametrize("threshold", [0.0, 1.5, 3.0])
def test_the_magnitude_score_by_loops(side, kernel, threshold):
    """The largest deviation of each whole block, over its pixels and channels; those below the
    threshold count as 0; the mean over blocks. Rows and columns that fill no block are left out."""
    x = 2 * torch.randn(
        3, 2, *side, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    H, W = (v // kernel * kernel for v in side)
    for mean, std in ((0.3, 1.5), (torch.tensor([0.5, -1.0]), torch.tensor([1.0, 2.0]))):
        m, s = (torch.as_tensor(v, dtype=torch.float64).expand(2) for v in (mean, std))
        want = []
        for image in x:
            blocks = [
                max(
                    abs(image[c, i + di, j + dj].item() - m[c].item()) / s[c].item()
                    for c in range(2)
                    for di in range(kernel)
                    for dj in range(kernel)
                )
                for i in range(0, H, kernel)
                for j in range(0, W, kernel)
            ]
            want.append(sum(v for v in blocks if v >= threshold) / len(blocks))
        got = magnitude_score(x, mean, std, kernel, threshold)
        torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64))


def test_the_magnitude_score_at_its_edges():
    "A block at the threshold counts; the defaults are blocks of 4 and a threshold of 3."
    x = torch.zeros(1, 1, 8, 8, dtype=torch.float64)
    x[0, 0, 3, 4], x[0, 0, 5, 5], x[0, 0, 0, 0] = 3.0, -7.0, 2.9
    assert magnitude_score(x, 0.0, 1.0).item() == (3.0 + 7.0) / 4
    assert magnitude_score(x.float(), 0.0, 1.0).dtype == torch.float32
    for side in ((4, 9), (9, 4)):
        y = torch.full((2, 3, *side), 5.0, dtype=torch.float64)
        assert magnitude_score(y, 0.0, 1.0).tolist() == [5.0, 5.0]
        with pytest.raises(ValueError, match="at most the image's side 4, got 5"):
            magnitude_score(y, 0.0, 1.0, kernel=5)
    with pytest.raises(ValueError, match=r"\(B, C, H, W\), got \(3, 8, 8\)"):
        magnitude_score(torch.zeros(3, 8, 8), 0.0, 1.0)
