"""Theory, run: data on a plane under solvers and guidance, the network that finds the plane, a
number as condition, the loop of optimisation, and every error."""

import math
import warnings

import pytest
import torch
from torch.testing import assert_close

import diffkit as dk
from diffkit.core.nets import MLP, Stacked
from diffkit.models.overview import (
    LinearReward,
    SubspaceDenoiser,
    SubspaceNet,
    WithValue,
    conditional_gaussian,
    off_ratio,
    optimise,
    pseudo_label,
    score_error,
    subspace_error,
)

F64 = torch.float64
P = dk.VP()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


A = torch.linalg.qr(randn(6, 2))[0]
LATENT = dk.GaussianMixture(randn(4, 2, seed=1), scales=0.3, labels=[0, 0, 1, 1])
FLAT = SubspaceDenoiser(dk.MixtureDenoiser(LATENT, P), A)


@pytest.mark.parametrize("solver", [dk.DDIM(), dk.Heun(), dk.DPMSolverPP(2)], ids=repr)
def test_a_run_in_space_is_the_run_in_the_plane(solver):
    "With noise off the plane that decays by itself: A^T x follows the latent sampler, guided too."
    x, grid, cond = randn(8, 6, seed=2), dk.time_grid(P, 12, end=0.0), torch.arange(8) % 2
    for scale in (1.0, 3.0):
        run = lambda d, v, scale=scale: dk.sample(
            dk.cfg(d, scale), solver, v, grid, cond={"label": cond}, progress=False
        )
        y = run(FLAT, x)
        assert off_ratio(y, A).max() < 1e-12
        assert_close(y @ A, run(FLAT.inner, x @ A), rtol=1e-9, atol=1e-9)


def test_images_keep_their_shape_and_guidance_memory_passes():
    d = SubspaceDenoiser(dk.MixtureDenoiser(LATENT, P), A)
    x = randn(5, 1, 2, 3)
    assert_close(d(x, 0.4).x0.flatten(1), d(x.flatten(1), 0.4).x0)
    d.inner.stochastic = True
    assert SubspaceDenoiser(d.inner, A).stochastic


def test_heavy_tails_are_refused():
    "Student's noise off the plane tells of its level, so (1) does not hold."
    with pytest.raises(ValueError, match="only if it is Gaussian"):
        SubspaceDenoiser(dk.FieldDenoiser(LATENT, dk.HeavyTailed(P, 4)), A)


def test_score_error_is_that_of_a_known_shift():
    "Two Gaussians that differ in their mean: eps differs by a known vector at every state."
    a, b = (dk.GaussianMixture(torch.tensor([[m, 0.0]], dtype=F64), scales=1.0) for m in (0, 1))
    al, s = float(P.alpha(0.4)), float(P.sigma(0.4))
    got = score_error(*(dk.MixtureDenoiser(m, P) for m in (a, b)), randn(9, 2), 0.4, gen())
    # eps = sigma (x - alpha m) / (alpha^2 + sigma^2)
    assert_close(got, torch.full((9,), (s * al / (al * al + s * s)) ** 2, dtype=F64))


def test_the_plane_is_found_by_its_gradient():
    "Data on a line in five dimensions: from a random start V comes to it."
    torch.manual_seed(0)
    line = torch.nn.functional.normalize(torch.randn(5, 1), dim=0)
    data = torch.randn(512, 1, generator=gen(3)) @ line.T
    net = SubspaceNet(dk.NetDenoiser(MLP(1, hidden=16, depth=1), P, "v"), dim=5, latent_dim=1)
    model = dk.NetDenoiser(net, P, "x0")
    before = subspace_error(net.basis.detach(), line)
    opt = torch.optim.Adam(model.parameters(), lr=2e-2)
    for k in range(150):
        loss = model.loss(data, generator=gen(k))
        opt.zero_grad()
        loss.backward()
        opt.step()
    after = subspace_error(net.basis.detach(), line)
    assert before > 0.3 and after < 0.02


def test_values_by_row_side_by_side_and_alone():
    nets = [WithValue(MLP(5, hidden=8, depth=1)) for _ in range(2)]
    for net in nets:
        torch.nn.init.normal_(list(net.parameters())[-2])
    x, v = torch.randn(6, 3, generator=gen()), torch.tensor([0.1, math.nan, 2, -1, math.nan, 0])
    t = torch.full((6,), 0.3)
    both = Stacked(nets)(x, t, value=v)
    alone = torch.cat([n(x[i : i + 3], t[:3], v[i : i + 3]) for i, n in zip((0, 3), nets)])
    assert_close(both, alone, rtol=1e-5, atol=1e-6)
    net = nets[0]
    assert_close(net(x, t, math.nan), net(x, t))
    assert not torch.equal(net(x, t, 0.0), net(x, t))


class Shift(torch.nn.Module):  # designs N(value, 0.1^2), whatever x is asked
    def forward(self, x, t, value):
        law = dk.GaussianMixture(torch.zeros(1, 1), scales=0.1)
        a = P.alpha(t)[:, None].to(x)
        return dk.MixtureDenoiser(law, P)(x - a * value[:, None], t).x0 + value[:, None]


def loop(**k):
    x = torch.linspace(-1, 1, 20)[:, None]
    seen = []

    def make(x, y):
        seen.append((len(x), y.mean().item(), y.std().item()))
        return dk.NetDenoiser(Shift(), P, "x0")

    run = dict(rounds=3, batch=5, steps=8, generator=gen(4)) | k
    return optimise(lambda v: v[:, 0], x, x[:, 0], make, **run), seen


def test_the_loop_asks_measures_and_appends():
    out, seen = loop(ask=0.5)
    assert [n for n, _, _ in seen] == [20, 25, 30]
    for _, mean, std in seen:  # values come standardised
        assert abs(mean) < 1e-6 and abs(std - 1) < 1e-6
    assert_close(out.y, out.x[:, 0])
    first = out.y[:20]
    assert abs(out.asked[0] - (1 + 0.5 * first.std().item())) < 1e-6
    assert torch.equal(out.y[:20], torch.linspace(-1, 1, 20))
    again, _ = loop(ask=0.5)
    assert torch.equal(out.x, again.x)


def test_far_questions_warn_and_bad_ones_are_named():
    with pytest.warns(UserWarning, match="standard deviations from the mean"):
        loop(ask=lambda y: 1e3, rounds=1)
    x = torch.rand(6, 2)
    cases = (
        (lambda: loop(batch=0), "batch must be"),
        (lambda: loop(steps=True), "steps must be"),
        (lambda: optimise(None, x[:1], x[:1, 0], None), "at least two"),
        (lambda: optimise(None, x, x[:, 0] * math.nan, None), "finite value"),
        (lambda: pseudo_label(LinearReward.fit(x, x[:, 0]), x, -1.0), "noise must be positive"),
        (lambda: LinearReward.fit(x, x[:3, 0]), "one a design"),
        (lambda: SubspaceNet(FLAT.inner, dim=4), "without basis"),
        (lambda: SubspaceNet(FLAT.inner, torch.ones(4, 2)), "orthonormal"),
        (lambda: off_ratio(randn(3, 6), randn(6, 2)), "orthonormal"),
        (lambda: subspace_error(A, randn(6, 2)), "orthonormal"),
    )
    for f, why in cases:
        with pytest.raises(ValueError, match=why):
            f()


def test_eight_standard_deviations_are_far_on_both_sides_and_less_is_not():
    x = torch.tensor([[-1.0], [0.0], [1.0]], dtype=F64)  # mean 0, deviation 1: exactly
    make = lambda x, y: dk.NetDenoiser(Shift(), P, "x0")
    for z in (-8.0, -7.99, 0.0, 7.99, 8.0):
        ask = dict(ask=lambda y, z=z: z, rounds=1, batch=1, steps=1, generator=gen())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            out = optimise(lambda v: v[:, 0], x, x[:, 0], make, **ask)
        assert out.asked == [z]
        assert sum(f"{z:.1f} standard" in str(w.message) for w in said) == (abs(z) >= 8)


@pytest.mark.parametrize("ridge", [0, 0.5, 3.0])
def test_the_reward_is_ridge_regression_around_the_mean(ridge):
    "That is least squares with `sqrt(ridge) I` as further rows; without a ridge, least squares."
    x, y = randn(12, 3) + 5, randn(12, seed=1) - 2
    f = LinearReward.fit(x, y, ridge)
    rows = torch.cat([x - x.mean(0), ridge**0.5 * torch.eye(3, dtype=F64)])
    want = torch.linalg.lstsq(rows, torch.cat([y - y.mean(), torch.zeros(3, dtype=F64)])[:, None])
    assert_close(f.theta, want.solution[:, 0])
    assert_close(f(x).mean(), y.mean())
    if not ridge:
        with pytest.raises(ValueError, match="3 designs do not determine 3 coefficients"):
            LinearReward.fit(x[:3], y[:3], 0)
    with pytest.raises(ValueError, match="ridge must not be negative, got -0.1"):
        LinearReward.fit(x, y, -0.1)


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e6])
def test_the_conditional_law_does_not_hang_on_the_unit_of_the_reward(unit):
    m, C, theta = randn(4), torch.diag(randn(4, seed=5).square() + 0.2), randn(4, seed=6)
    law = lambda u: conditional_gaussian(m, C, LinearReward(u * theta, m.sum() * u), 0.7 * u, u)
    for a, b in zip(law(unit), law(1.0)):
        assert_close(a, b)
    with pytest.raises(ValueError, match="the reward does not vary"):
        conditional_gaussian(m, C, LinearReward(0 * theta, m.sum()), 0.0, 1.0)


def test_the_conditional_law_is_unbiased_in_what_is_asked():
    "E[f | a] = f(m) + share (a - f(m)), with share = signal variance over all variance."
    m, C = randn(4), torch.diag(randn(4, seed=5).square() + 0.2)
    f = LinearReward(randn(4, seed=6), torch.tensor(0.5, dtype=F64))
    mean, cov = conditional_gaussian(m, C, f, 0.7, 3.0)
    signal = f.theta @ C @ f.theta
    share = signal / (signal + 0.49)
    at = f(m[None])[0]
    assert_close(f(mean[None])[0], at + share * (3.0 - at))
    assert_close(f.theta @ cov @ f.theta, signal * (1 - share))
    assert (torch.linalg.eigvalsh(cov) > -1e-12).all()
