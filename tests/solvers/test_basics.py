"""The bed of the solvers' chapter: its exact paths, its guided model, and stability regions that
are known in closed form."""

import numpy as np
import pytest
import torch

from diffkit.core.data import four_gaussians
from diffkit.core.denoiser import MixtureDenoiser, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Flow, time_grid
from diffkit.core.sampling import DDIM, Heun, rms, sample
from diffkit.solvers.basics import (
    guided_bed,
    local_errors,
    reference_trajectory,
    spectral_radius,
    stability_interval,
)
from diffkit.solvers.pndm import ab_coefficients

X = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
PROCESSES = [VP(), Cosine(), Flow(), EDM(), VE()]


@pytest.mark.parametrize("substeps", [1, 2, 5])
@pytest.mark.parametrize("process", [VP(), Flow()], ids=repr)
def test_the_reference_makes_so_many_heun_steps_an_interval(process, substeps):
    """Even in log_snr within each interval; where it is infinite, at an end of the path, it counts
    as 15 in size."""
    d = MixtureDenoiser(four_gaussians(), process)
    full = lambda v: torch.tensor(v, dtype=torch.float64)
    for ends in ([0.9, 0.5, 0.1, 0.02], [1.0, 0.4, 0.0]):
        with count_evals(d) as n:
            got = reference_trajectory(d, X, full(ends), substeps=substeps)
        want = [X]
        for t, s in zip(ends, ends[1:]):
            a, b = (process.log_snr(full(v)).clamp(-15, 15) for v in (t, s))
            inner = [float(process.time(a + (b - a) * k / substeps)) for k in range(1, substeps)]
            want.append(sample(d, Heun(), want[-1], full([t, *inner, s]), progress=False))
        torch.testing.assert_close(got, torch.stack(want), rtol=1e-10, atol=1e-10)
        if ends[0] < 1:  # a step of infinite length has one evaluation
            assert n.calls == 2 * substeps * (len(ends) - 1)


def test_the_reference_converges_to_the_exact_path():
    "Second order in the number of steps, every state of it; from one step an interval on."
    d, grid = MixtureDenoiser(four_gaussians(), VP()), time_grid(VP(), 2, "log_snr", end=1e-2)
    exact = reference_trajectory(d, X, grid, rtol=1e-8)
    assert torch.equal(exact[0], X) and exact.shape == (3, 6, 2)
    error = [rms(reference_trajectory(d, X, grid, substeps=k), exact) for k in (1, 8, 16, 32)]
    assert error[1] < error[0] / 8
    assert all(3 < a / b < 5.5 for a, b in zip(error[1:], error[2:]))  # 4 in the limit
    for k in (0, -1):
        with pytest.raises(ValueError, match=f"substeps must be at least 1 or None, got {k}"):
            reference_trajectory(d, X, grid, substeps=k)


def test_local_errors_start_every_step_on_the_exact_path():
    d, grid = MixtureDenoiser(four_gaussians(), VP()), time_grid(VP(), 5)
    truth = reference_trajectory(d, X, grid, substeps=4)
    for solver in (DDIM(), Heun()):
        step = lambda i, s=solver: sample(d, s, truth[i], grid[i : i + 2], progress=False)
        want = [rms(step(i), truth[i + 1]) for i in range(5)]
        got = local_errors(solver, d, truth, grid)  # in single precision
        assert got.tolist() == pytest.approx(want, rel=1e-6)
    with pytest.raises(ValueError, match=r"one state a time \(6\), got 5"):
        local_errors(DDIM(), d, truth[1:], grid)


@pytest.mark.parametrize("a_b", [([1.0], [1.0]), ([1.2, -0.2], [1.5]), ([0.5], [2.0, -1.0, 0.3])])
def test_the_spectral_radius_is_that_of_the_recursions_polynomial(a_b):
    a, b = a_b
    k = max(len(a), len(b))
    u, v = (np.array([*w, *[0.0] * (k - len(w))]) for w in a_b)
    z = torch.complex(*torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).double())
    want = [[max(abs(np.roots([1.0, *-(u + w * v)]))) for w in row] for row in z.tolist()]
    torch.testing.assert_close(spectral_radius(a, b, z), torch.tensor(want, dtype=torch.float64))
    assert spectral_radius(a, b, -0.3).shape == ()
    with pytest.raises(ValueError, match="at least one weight"):
        spectral_radius([], [], z)


@pytest.mark.parametrize("order, end", [(1, -2.0), (2, -1.0), (3, -6 / 11), (4, -3 / 10)])
def test_stability_of_adams_bashforth_ends_where_theory_says(order, end):
    "The tolerance of the end, plus growth by as much, which counts as none."
    for tol in (1e-4, 1e-6, 1e-8):
        got = stability_interval([1.0], ab_coefficients(order), tol=tol)
        assert abs(got - end) < 4 * tol
    assert stability_interval([1.0], ab_coefficients(order), lowest=end / 2) == end / 2


def test_a_method_that_never_grows_is_stable_as_far_as_one_looks():
    assert stability_interval([0.5], [0.0]) == -50.0
    assert stability_interval([0.5], [0.0], lowest=-7.0) == -7.0
    assert abs(stability_interval([1.0], [-1.0])) < 1e-5  # grows at once


def test_the_starts_of_the_bed_are_one_noise_in_every_process():
    "Up to its size, the root of alpha^2 + sigma^2 at t = 1."
    noise = []
    for p in PROCESSES:
        size = (p.alpha(1.0).square() + p.sigma(1.0).square()).sqrt()
        noise.append(guided_bed(3.0, 50, 40, process=p)[1] / size)
        assert noise[-1].dtype == torch.float64 and noise[-1].shape == (50, 40)
        torch.testing.assert_close(noise[-1], noise[0], rtol=1e-14, atol=0)
    z = noise[0].flatten()  # 2000 numbers: within four standard errors of a standard normal
    assert abs(z.mean()) < 4 / 2000**0.5 and abs(z.var() - 1) < 4 * (2 / 2000) ** 0.5


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("process", [VP(), EDM()], ids=repr)
def test_the_bed_is_guidance_between_two_exact_mixtures(process, scale):
    """30 Gaussians of width 0.3 around points of the cube from -1 to 1, equally likely; the class
    is the first three. Bayes by hand."""
    means = guided_bed(process=process)[0].mixture.means
    assert means.shape == (30, 64) and means.abs().max() <= 1
    assert means.min() < -0.99 and means.max() > 0.99
    # 1920 uniform numbers: four standard errors
    assert abs(means.mean()) < 4 / (3 * 1920) ** 0.5
    assert abs(means.square().mean() - 1 / 3) < 4 * (4 / 45 / 1920) ** 0.5
    d, x, cond = guided_bed(scale, 5, process=process)
    assert cond["label"].tolist() == [0] * 5

    def noise(t, some):
        a, s = process.alpha(t), process.sigma(t)
        var, off = a.square() * 0.09 + s.square(), x[:, None] - a * some
        p = (-off.square().sum(-1) / (2 * var)).softmax(1)
        return (p[..., None] * s * off / var).sum(1)

    for t in (1.0, 0.6, 0.3):
        inside, all_of_them = noise(t, means[:3]), noise(t, means)
        want = all_of_them + scale * (inside - all_of_them)
        torch.testing.assert_close(d(x, t, **cond).eps, want, rtol=1e-9, atol=1e-9)


def test_the_seed_of_the_bed_is_its_own():
    state = torch.get_rng_state()
    a, b, c = (guided_bed(seed=s) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(a[1], b[1]) and torch.equal(a[0].mixture.means, b[0].mixture.means)
    assert not torch.equal(a[1], c[1]) and not torch.equal(a[0].mixture.means, c[0].mixture.means)
    assert a[1].shape == (12, 64)
