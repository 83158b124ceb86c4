"""PromptGen: the flow against autograd, known targets, moment constraints against scipy, a
diffusion model as a generator, and wrong input."""

import math

import numpy as np
import pytest
import torch
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg
from diffkit.core.process import EDM, VP, time_grid
from diffkit.core.sampling import DDIM, Ancestral, sample
from diffkit.guidance.promptgen import (
    LatentFlow,
    PromptGen,
    class_energy,
    distance_energy,
    fit_moment,
    moment_energy,
    ode_generator,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn
from torch.testing import assert_close

F64 = torch.float64


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def shaken(flow, seed=1):
    g = gen(seed)
    for p in flow.parameters():
        p.data += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
    return flow


@settings(max_examples=20, deadline=None)
@given(
    dim=st.integers(2, 7), blocks=st.integers(1, 4), code=st.integers(0, 2), seed=st.integers(0, 50)
)
def test_flow_inverse_and_determinant(dim, blocks, code, seed):
    torch.set_default_dtype(F64)
    try:
        flow = shaken(LatentFlow(dim, blocks, 8, cond_dim=code, seed=seed), seed)
    finally:
        torch.set_default_dtype(torch.float32)
    x, c = randn(3, dim, seed=seed), randn(3, code, seed=seed + 1) if code else None
    z, ld = flow(x, c)
    back, ld2 = flow.inverse(z, c)
    assert_close(back, x, rtol=1e-9, atol=1e-9)
    assert_close(ld2, -ld)
    J = torch.autograd.functional.jacobian(
        lambda e: flow(e[None], None if c is None else c[:1])[0][0], x[0]
    )
    assert_close(ld[0], torch.linalg.slogdet(J)[1])


def test_flow_draws_its_own_start_and_leaves_the_global_seed_alone():
    torch.manual_seed(7)
    a = torch.rand(1)
    torch.manual_seed(7)
    LatentFlow(4, seed=3)
    assert torch.equal(torch.rand(1), a)


@pytest.mark.parametrize("k", [2, 5])
def test_moments_as_scipy_finds_them(k):
    g, mu = randn(3000, k, seed=k).tanh(), torch.linspace(-0.2, 0.3, k, dtype=F64)
    ref = minimize(
        lambda b: np.log(np.exp(g.numpy() @ b).mean()) - b @ mu.numpy(),
        np.zeros(k),
        method="BFGS",
        options={"gtol": 1e-9},
    ).x
    assert_close(fit_moment(g, mu), torch.from_numpy(ref), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 200), k=st.integers(2, 6))
def test_constraint_holds_on_probabilities(seed, k):
    s = (2 * randn(2000, k, seed=seed)).softmax(1)
    mu = (s[:50].mean(0) + 1 / k) / 2  # between a local mean and uniform: certainly reachable
    b = fit_moment(s, mu)
    # the search ends where the dual's gain, about slope^2, is lost in rounding: the slope is then
    # about sqrt(eps) = 1.5e-8
    assert ((s @ b).softmax(0) @ s - mu).abs().max() < 1e-7 and abs(b.sum()) < 1e-8


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_shares_in_any_unit_are_shares(scale):
    """Shares of a total of `scale`, in single precision: centred multipliers in the inverse unit,
    and wanted means that add up to something else are refused."""
    s = (scale * (2 * randn(500, 4)).softmax(1)).float()
    mu = (s[:50].double().mean(0) + scale / 4) / 2
    b = fit_moment(s, mu)
    assert_close(b, fit_moment(s.double() / scale, mu / scale) / scale, rtol=1e-6, atol=1e-8)
    assert b.dtype == F64 and abs(b.sum()) < 1e-8 * b.abs().max()
    with pytest.raises(ValueError, match=f"mu must add up to {scale:g}, as the statistics do, got"):
        fit_moment(s, 0.8 * mu)


@pytest.mark.parametrize("digits", [5, 6, 8])
def test_multipliers_of_rounded_shares_are_centred(digits):
    "Shares as a file keeps them add up to 1 but for their last digit, and count as shares."
    s = (2 * randn(2000, 4)).softmax(1).mul(10**digits).round() / 10**digits
    assert 0 < (s.sum(1) - 1).abs().max() < 5 * 10**-digits
    mu = (s[:50].mean(0) + 0.25) / 2
    b = fit_moment(s, mu)
    assert abs(b.sum()) < 1e-9 and b.abs().max() > 0.1
    assert ((s @ b).softmax(0) @ s - mu).abs().max() < 5 * 10**-digits


def test_a_statistic_that_is_constant_has_no_other_mean():
    "Its only value may be asked for, and needs no multiplier; no other one is reached."
    g, m = randn(2000, 2).tanh(), torch.tensor([0.1, -0.2], dtype=F64)
    both = torch.cat([g, torch.full((2000, 1), 0.7, dtype=F64)], 1)
    b = fit_moment(both, [*m.tolist(), 0.7])
    assert_close(b[:2], fit_moment(g, m), rtol=1e-6, atol=1e-6)
    assert abs(b[2]) < 1e-6  # the shortest
    for last in (0.699, 0.701):
        for method in ("newton", "paper"):
            with pytest.raises(ValueError, match=r"cannot be reached: entries \[2\] lie outside"):
                fit_moment(both, [*m.tolist(), last], method, gen(1))


@pytest.mark.parametrize("shares", [True, False])
def test_the_papers_search_comes_near_the_dual(shares):
    """Adam on random parts of the pool: the means up to the parts' own error; centred where the
    statistics are shares, and as they are elsewhere."""
    g = (2 * randn(4000, 3)).softmax(1) if shares else randn(4000, 3).tanh()
    mu = (g[:50].mean(0) + 1 / 3) / 2 if shares else torch.tensor([0.2, 0.1, -0.3], dtype=F64)
    exact, b = fit_moment(g, mu), fit_moment(g, mu, "paper", gen(2))
    # a mean of 1024 draws of spread 0.6 at most is off by 0.02; three of these
    assert ((g @ b).softmax(0) @ g - mu).abs().max() < 0.06
    assert_close(b, exact, rtol=0, atol=0.15)  # 0.06 for four seeds
    assert (abs(b.sum()) < 1e-12) == shares and exact.abs().max() > 0.3


def test_energies_add_up_and_reach_the_latent_only():
    clf = nn.Linear(3, 4)
    p = PromptGen(
        lambda z: z,
        [
            class_energy(clf, 2),
            distance_energy(lambda x: x, torch.ones(3)),
            moment_energy(lambda x: clf(x).softmax(1), torch.arange(4.0)),
        ],
        3,
        [1.0, 0.5, 2.0],
        LatentFlow(3, 2, 8),
    )
    z = randn(5, 3, dtype=torch.float32)
    prob = clf(z).softmax(1)
    assert_close(
        p.energy(z),
        -(prob[:, 2] + 1e-8).log() + 0.5 * (z - 1).square().sum(1) - 2 * prob @ torch.arange(4.0),
    )
    p.fit(3, 8, progress=False)
    assert all(q.grad is None for q in clf.parameters()) and all(
        k.startswith("flow.") for k in p.state_dict()
    )


def test_one_control_after_another_is_both_at_once():
    "Two linear energies on a Gaussian: stacked or together, the mean moves by the sum."
    a, b = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, -0.7, 0.4])
    one = PromptGen(lambda z: z, lambda x: -x @ a, 3, flow=LatentFlow(3, 3, 16)).fit(
        200, 128, 1e-2, generator=gen(1), progress=False
    )
    two = PromptGen(one.as_generator(), lambda x: -x @ b, 3, flow=LatentFlow(3, 3, 16, seed=1)).fit(
        200, 128, 1e-2, generator=gen(2), progress=False
    )
    # one flow is off by 0.03 after so few steps, the second inherits it
    assert (two.sample(20_000, gen(3)).mean(0) - a - b).abs().max() < 0.08
    assert two.ess(generator=gen(4)) > 0.9


def test_importance_weights_are_right_for_any_flow():
    "An untrained, shaken flow: the weighted mean is still that of the target."
    torch.set_default_dtype(F64)
    try:
        p = PromptGen(lambda z: z, lambda x: -x[:, 0], 2, flow=shaken(LatentFlow(2, 1, 8)))
    finally:
        torch.set_default_dtype(torch.float32)
    e = randn(200_000, 2)
    with torch.no_grad():
        lw, z = p.log_weight(e), p.flow(e)[0]
    assert abs(torch.logsumexp(lw, 0) - math.log(len(e)) - 0.5) < 0.05  # Z = e^(1/2)
    assert (
        (lw.softmax(0)[:, None] * z).sum(0) - torch.tensor([1.0, 0.0], dtype=F64)
    ).abs().max() < 0.05


class Affine(nn.Module):
    """z = scale * eps + shift with its log-determinant: a flow whose answers are known."""

    def __init__(self, scale=1.0, shift=(0.0, 0.0)):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(float(scale), dtype=F64))
        self.shift = nn.Parameter(torch.tensor(shift, dtype=F64))

    def forward(self, eps):
        z = self.scale * eps + self.shift
        return z, z.shape[1] * self.scale.abs().log().expand(len(z))


@pytest.mark.parametrize("k,a", [(0.0, (1.0, -0.5)), (3.0, (0.0, 0.0)), (1.5, (2.0, 0.3))])
def test_the_perfect_flow_has_one_weight_which_is_z(k, a):
    """Energy k|z|^2/2 - a.z on a standard normal: N(a/(1+k), I/(1+k)) and
    log Z = |a|^2/(2(1+k)) - (d/2) log(1+k). Its own affine flow weighs every sample by Z."""
    a = torch.tensor(a, dtype=F64)
    p = PromptGen(
        lambda z: z,
        lambda x: 0.5 * k * x.square().sum(1) - x @ a,
        2,
        flow=Affine((1 + k) ** -0.5, (a / (1 + k)).tolist()),
    )
    log_z = a.square().sum() / (2 * (1 + k)) - math.log(1 + k)
    assert_close(p.log_weight(randn(50, 2)), log_z.expand(50), rtol=1e-10, atol=1e-10)
    assert p.ess(50, gen(1)) == pytest.approx(1, abs=1e-10)
    by_flow, by_prior = p.log_z(200_000, gen(2))
    # the flow's is exact for any number of samples; five standard errors for the prior's: the
    # weights' relative variance is Z(2E) / Z^2 - 1, in closed form, too
    assert by_flow == pytest.approx(float(log_z), abs=1e-10)
    two = (2 * a).square().sum() / (2 * (1 + 2 * k)) - math.log(1 + 2 * k)
    error = math.sqrt((math.exp(two - 2 * log_z) - 1) / 200_000)
    assert by_prior == pytest.approx(float(log_z), abs=5 * error)


def test_log_z_by_hand():
    "Both values from the same draws, on a flow that is not the target's."
    p = PromptGen(lambda z: z, lambda x: x.square().sum(1), 2, flow=Affine(0.6, (0.2, -0.3)))
    g = gen(4)
    e, z = (torch.randn(30, 2, generator=g, dtype=F64) for _ in range(2))
    x = 0.6 * e + torch.tensor([0.2, -0.3], dtype=F64)
    lw = -1.5 * x.square().sum(1) + 0.5 * e.square().sum(1) + 2 * math.log(0.6)
    want = [v.exp().mean().log().item() for v in (lw, -z.square().sum(1))]
    assert p.log_z(30, gen(4)) == pytest.approx(tuple(want), abs=1e-10)


@pytest.mark.parametrize("low", [0.0, 1.0, 3.0, 40.0])
def test_ess_of_two_weights(low):
    "k samples of weight 1 and n - k of weight w: (k + (n-k) w)^2 / (n (k + (n-k) w^2))."
    p = PromptGen(lambda z: z, lambda x: low * (x[:, 0] > 0), 2, flow=Affine())
    n, w = 64, math.exp(-low)
    k = int((torch.randn(n, 2, generator=gen(5), dtype=F64)[:, 0] <= 0).sum())
    want = (k + (n - k) * w) ** 2 / (n * (k + (n - k) * w * w))
    assert p.ess(n, gen(5)) == pytest.approx(want, rel=1e-10)


def test_ess_of_a_shift_in_closed_form():
    "An untrained flow and a linear energy: lognormal weights, whose ESS is exp(-|a|^2)."
    p = PromptGen(lambda z: z, lambda x: -0.5 * x[:, 0] - 0.5 * x[:, 1], 2, flow=Affine())
    # the deviation of this estimate is 0.003 (two hundred repeats)
    assert p.ess(200_000, gen(6)) == pytest.approx(math.exp(-0.5), abs=0.015)


@pytest.mark.parametrize("anneal,steps", [(0.0, 6), (1 / 3, 9), (0.5, 8), (1.0, 5)])
def test_the_energys_weight_grows_as_it_says(anneal, steps):
    """At learning rate 0 the flow stays, so each loss is the weight of that iteration times
    a constant energy, plus a known rest."""
    flow = Affine(0.7, (0.3, -0.2))
    p = PromptGen(lambda z: z, lambda x: 5 + 0 * x[:, 0], 2, flow=flow)
    got, g = [], gen(8)
    p.fit(steps, 7, 0.0, anneal, None, gen(8), False, lambda i, loss: got.append(loss))
    for i, loss in enumerate(got):
        e = torch.randn(7, 2, generator=g, dtype=F64)
        z = 0.7 * e + torch.tensor([0.3, -0.2], dtype=F64)
        rest = 0.5 * z.square().sum(1).mean().item() - 2 * math.log(0.7)
        want = 1.0 if i + 1 >= anneal * steps else (i + 1) / (anneal * steps)
        assert (loss - rest) / 5 == pytest.approx(want, abs=1e-10)
    assert len(got) == steps


def test_a_likeness_in_closed_form():
    """Squared distance to a reference on a linear generator: N(2t/3, I/3), log Z =
    -(d/2) log 3 - |t|^2 / 3; the cosine's energy looks at the direction only."""
    t = torch.tensor([0.9, -1.4], dtype=F64)
    p = PromptGen(
        lambda z: z, distance_energy(lambda x: x, t), 2, flow=Affine(3**-0.5, (2 * t / 3).tolist())
    )
    log_z = -math.log(3) - t.square().sum() / 3
    assert_close(p.log_weight(randn(20, 2)), log_z.expand(20), rtol=1e-10, atol=1e-10)
    cosine = distance_energy(lambda x: x, t, "cosine")
    assert_close(cosine(torch.stack([t, 5 * t, -t])), torch.tensor([0.0, 0.0, 2.0], dtype=F64))


def test_a_likeness_is_kept_while_a_code_turns_the_rest():
    """Two numbers are the identity, held near a reference; the third is a pose that a code names:
    one network for all codes, against the Gaussians that the targets are."""
    ref, near = (
        torch.tensor([1.0, -0.5]),
        distance_energy(lambda x: x[:, :2], torch.tensor([1.0, -0.5])),
    )
    p = PromptGen(
        lambda z: z,
        [lambda x, code: near(x), lambda x, code: (x[:, 2] - code[:, 0]).square()],
        3,
        flow=LatentFlow(3, 4, 32, cond_dim=1),
    )
    g = gen(3)
    codes = lambda n: 4 * torch.rand(n, 1, generator=g) - 2
    p.fit(400, 256, 1e-2, codes=codes, generator=gen(1), progress=False)
    for c in (-1.5, 0.0, 1.5):
        x = p.sample(20_000, gen(2), torch.full((20_000, 1), c))
        want = torch.cat([2 * ref / 3, torch.tensor([2 * c / 3])])
        # standard error 0.004 and 1 % from the draws; the rest is the network's
        assert (x.mean(0) - want).abs().max() < 0.06
        assert (3 * x.var(0) - 1).abs().max() < 0.12


def test_same_seed_same_result_and_interruption_leaves_a_usable_flow():
    make = lambda: PromptGen(lambda z: z, lambda x: x.square().sum(1), 2, flow=LatentFlow(2, 2, 8))
    a, b = (
        make().fit(20, 16, generator=gen(5), progress=False).sample(9, gen(6)) for _ in range(2)
    )
    assert torch.equal(a, b)

    def stop(i, loss):
        if i == 5:
            raise KeyboardInterrupt

    p = make()
    with pytest.raises(KeyboardInterrupt):
        p.fit(20, 16, generator=gen(5), progress=False, callback=stop)
    assert torch.isfinite(p.sample(4, gen(6))).all()


@pytest.mark.parametrize("process", [VP(), EDM()], ids=["VP", "EDM"])
def test_a_diffusion_model_as_a_generator(process):
    d, grid = MixtureDenoiser(ring(), process), time_grid(process, 6, "log_snr")
    G, z = (
        ode_generator(cfg(d, 2.0), DPMSolverPP(order=2), grid, (2,), {"label": 3}),
        randn(5, 2).requires_grad_(),
    )
    want = sample(
        cfg(d, 2.0),
        DPMSolverPP(order=2),
        z.detach() * process.sigma(grid[0]).item(),
        grid,
        cond={"label": torch.full((5,), 3)},
        progress=False,
    )
    assert_close(G(z), want)
    assert torch.autograd.grad(G(z).sum(), z)[0].abs().sum() > 0
    assert G(torch.zeros(0, 2, dtype=F64)).shape == (0, 2)
    for solver in (DDIM(1.0), Ancestral(), DPMSolverPP(order=2, sde=True)):
        with pytest.raises(ValueError, match="deterministic"):
            ode_generator(d, solver, grid, (2,))


@pytest.mark.parametrize(
    "f,error,says",
    [
        (lambda: LatentFlow(1), ValueError, "dim must be"),
        (lambda: LatentFlow(3, clamp=0.0), ValueError, "clamp"),
        (lambda: LatentFlow(3)(torch.zeros(2, 4)), ValueError, r"\(B, 3\)"),
        (lambda: LatentFlow(3)(torch.zeros(3)), ValueError, r"\(B, 3\)"),
        (lambda: PromptGen(lambda z: z, [], 3), ValueError, "at least one"),
        (
            lambda: PromptGen(lambda z: z, lambda x: x.sum(), 3).fit(1, progress=False),
            ValueError,
            "one number a sample",
        ),
        (
            lambda: PromptGen(lambda z: z, lambda x: (x * float("nan")).sum(1), 3).fit(
                1, progress=False
            ),
            FloatingPointError,
            "not finite",
        ),
        (lambda: PromptGen(lambda z: z, lambda x: x.sum(1), 3).fit(-1), ValueError, "negative"),
        (lambda: fit_moment(torch.zeros(5), [0.0]), ValueError, "gamma must have"),
        (lambda: fit_moment(torch.eye(3), [0.5, 0.5]), ValueError, "mu must have"),
        (lambda: fit_moment(torch.eye(3).double(), [0.2, 0.2, 0.2]), ValueError, "add up"),
        (
            lambda: fit_moment(torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.2, 0.3]]), [0.9, 0.1]),
            ValueError,
            "cannot be reached",
        ),
        (lambda: fit_moment(torch.full((3, 2), float("nan")), [0.0, 0.0]), ValueError, "finite"),
        (
            lambda: ode_generator(
                NetDenoiser(lambda x, t: x, VP()), DDIM(), time_grid(VP(), 3), (2, 2)
            )(torch.zeros(2, 3)),
            ValueError,
            "4 numbers",
        ),
    ],
)
def test_wrong_input(f, error, says):
    with pytest.raises(error, match=says):
        f()


def test_a_mixture_generator_in_single_precision():
    d = MixtureDenoiser(GaussianMixture([[0.0, 0.0]], scales=1.0), VP())
    assert (
        ode_generator(d, DDIM(), time_grid(VP(), 4), (2,))(torch.zeros(3, 2)).dtype == torch.float32
    )
