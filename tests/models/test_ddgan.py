"""DDGAN: the chain against closed forms and diffusers, exactness at any number of steps, the
losses, resumption, solvers and guidance on a stochastic denoiser, members, and every error."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from scipy.stats import kstest, norm
from torch import nn
from torch.testing import assert_close

import diffkit.models.ddgan as module
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import (
    Compiled,
    Counter,
    MixtureDenoiser,
    cfg,
    classifier_guidance,
    contrast,
    count_evals,
)
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, sample, trace
from diffkit.guidance.adaptive_guidance import adaptive_cfg
from diffkit.guidance.apg import apg
from diffkit.models.ddgan import (
    DDGAN,
    Chain,
    LatentDenoiser,
    PosteriorSampler,
    StepMLP,
    ddgan_process,
    fit_ddgan,
)
from diffkit.solvers.dc_solver import UniPC
from diffkit.solvers.deis import DEIS, RhoRK
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP, threshold
from diffkit.solvers.momentum import GHVB, HeavyBall
from diffkit.solvers.pndm import PLMS, PNDM, ClassicalAB, PseudoRK
from diffkit.solvers.time_shift import TimeShift, epsilon_scale

F64 = torch.float64
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def toy(T=4, nz=3, dim=2, members=1, seed=0, **k):
    torch.manual_seed(seed)
    dims = dict(hidden=16, depth=2, members=members)
    g, d = StepMLP(dim + nz, dim, T, **dims), StepMLP(2 * dim, 1, T, **dims)
    return DDGAN(g, d, ddgan_process(T), nz=nz, **k)


# --- the levels and the chain


def test_levels_of_the_official_table():
    # betas as its code makes them, without the 1e-8 that it puts in front
    for T in (1, 2, 4, 8):
        t = torch.arange(T + 1, dtype=F64) / T * (1 - 1e-3) + 1e-3
        var = 1 - torch.exp(2 * (-0.25 * t**2 * (20 - 0.1) - 0.5 * t * 0.1))
        betas = 1 - (1 - var[1:]) / (1 - var[:-1])
        kept = torch.cumprod(1 - betas, 0)
        levels = torch.arange(1, T + 1, dtype=F64) / T
        assert_close(ddgan_process(T).alpha(levels).square(), kept, rtol=1e-9, atol=0.0)
        assert float(ddgan_process(T).sigma(0.0)) == 0


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_pairs_have_the_joint_law_of_the_process(process):
    top = process.t_max
    chain = Chain(process, torch.tensor([top, 0.6, 0.3, 0.05], dtype=F64))
    x0, n = randn(100000, 1, seed=1), 100000
    for k in range(3):
        p, q = chain.pair(x0, torch.full((n,), k), rng(5 + k))
        s, t = chain.grid.flip(0)[k : k + 2]
        (a0, s0), (a1, s1) = ((process.alpha(u), process.sigma(u)) for u in (s, t))
        keep = a1 / a0
        c, zero = torch.stack([torch.ones((), dtype=F64), a0, a1]), torch.zeros((), dtype=F64)
        rows = [[zero] * 3, [zero, s0**2, keep * s0**2], [zero, keep * s0**2, s1**2]]
        want = torch.outer(c, c) + torch.stack([torch.stack(r) for r in rows])
        got = torch.cov(torch.cat([x0, p, q], 1).T)
        # four and a half standard errors, and the float32 of the table
        se = ((want.diag()[:, None] * want.diag() + want**2) / n).sqrt()
        assert ((got - want).abs() < 4.5 * se + 1e-5 * want.abs().max()).all()


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_way_back_is_the_cores_ancestral_step(process):
    chain = Chain(process, torch.tensor([process.t_max, 0.6, 0.3, 0.0], dtype=F64))
    x, x0 = randn(6, 2, seed=1), randn(6, 2, seed=2)
    net = lambda x, k, z: x0
    for i, st in enumerate(
        trace(LatentDenoiser(net, chain, 1), Ancestral(), x, chain.grid, generator=rng(3))
    ):
        if i == 0:
            g = rng(3)
            continue
        x = chain.posterior(x0, x, torch.full((6,), 3 - i), g)
        assert_close(x, st.x, rtol=1e-5, atol=1e-5 * float(process.sigma(process.t_max)))
    if process.sigma(0.0) == 0:
        assert_close(x, x0, rtol=1e-6, atol=0.0)


def test_the_way_back_is_that_of_diffusers():
    process = ddgan_process(4)
    nodes = process.alpha(torch.linspace(0, 1, 5, dtype=F64)).square()
    betas = (1 - nodes[1:] / nodes[:-1]).numpy()
    peer = DDPMScheduler(4, trained_betas=betas, prediction_type="sample", clip_sample=False)
    peer.set_timesteps(4)
    chain, x, x0 = Chain(process), randn(5, 1, 4, 4).float(), randn(5, 1, 4, 4, seed=1).float()
    for k in range(4):
        theirs = peer.step(x0, k, x, generator=rng(7)).prev_sample
        ours = chain.posterior(x0, x, torch.full((5,), k), rng(7))
        # their variance of the last step is 1e-20 and not 0
        assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_steps_of_times():
    chain = Chain(VP(), time_grid(VP(), 3, "log_snr"))
    x = randn(3, 2)
    for i, t in enumerate(chain.grid[:-1].tolist()):
        assert chain.step_of(t, x).tolist() == [2 - i] * 3
    assert chain.step_of(chain.grid[:3], x).tolist() == [2, 1, 0]
    k = chain.draw(3000, rng())
    assert sorted(set(k.tolist())) == [0, 1, 2] and (torch.bincount(k) - 1000).abs().max() < 120
    half = chain.half()  # a table may be of any type; samples keep theirs
    assert half.pair(x, torch.zeros(3, dtype=torch.long))[0].dtype == F64


# --- the exact generator

LINE = GaussianMixture([[-1.2], [0.1], [1.0]], scales=[0.1, 0.3, 0.2], weights=[0.5, 0.2, 0.3])


def cdf(v):  # of LINE
    m, s, w = (u.flatten().tolist() for u in (LINE.means, LINE.vars.sqrt(), LINE.weights))
    return sum(p * norm.cdf((v - c) / d) for c, d, p in zip(m, s, w))


@pytest.mark.parametrize("T", [1, 2, 4, 16])
@pytest.mark.parametrize("solver", [Ancestral("small"), DDIM(), DDIM(eta=0.5)], ids=repr)
def test_posterior_draws_make_any_chain_exact(T, solver):
    p, g = ddgan_process(T), rng(T)
    # from the true noised data: alpha is 0.0066 at the end
    x = p.noise(LINE.sample(4000, g)[0], 1.0, generator=g)
    grid = torch.linspace(1, 0, T + 1, dtype=F64)
    y = sample(PosteriorSampler(LINE, p, g), solver, x, grid, progress=False, generator=g)
    assert kstest(y[:, 0].numpy(), cdf).pvalue > 1e-3
    mean = sample(MixtureDenoiser(LINE, p), Ancestral(), x, grid, progress=False, generator=g)
    if T < 16:
        assert kstest(mean[:, 0].numpy(), cdf).pvalue < 1e-6


def test_large_variance_is_not_exact():
    g, p = rng(1), ddgan_process(4)
    grid, x = torch.linspace(1, 0, 5, dtype=F64), randn(20000, 1)
    run = lambda v: sample(
        PosteriorSampler(LINE, p, g), Ancestral(v), x, grid, progress=False, generator=g
    )
    assert kstest(run("large")[:, 0].numpy(), cdf).pvalue < 1e-4
    assert kstest(run("small")[:, 0].numpy(), cdf).pvalue > 1e-3


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_posterior_moments(process):
    A = randn(4, 3, 3, seed=3)
    full = GaussianMixture(
        randn(4, 3, seed=4), covs=A @ A.mT / 4 + 0.05 * torch.eye(3), labels=[0, 0, 1, 1]
    )
    t, n = 0.3, 40000
    x = process.noise(full.sample(3, rng(5))[0], t, generator=rng(6))
    label = torch.tensor([0, 1, -1])
    draws = PosteriorSampler(full, process, rng(7))(x.repeat(n, 1), t, label=label.repeat(n)).x0
    draws = draws.unflatten(0, (n, 3)).transpose(0, 1)
    # mean: the core's denoiser; covariance: sigma^2 / alpha times its slope (Tweedie)
    exact = MixtureDenoiser(full, process)
    y = x.clone().requires_grad_()
    mean = exact(y, t, label=label).x0
    slope = torch.stack(
        [torch.autograd.grad(c.sum(), y, retain_graph=True)[0] for c in mean.unbind(1)], 1
    )
    cov = process.sigma(t) ** 2 / process.alpha(t) * slope
    sd = cov.diagonal(dim1=1, dim2=2).sqrt()
    assert ((draws.mean(1) - mean).abs() < 4.5 * sd / n**0.5).all()
    got = torch.stack([torch.cov(d.T) for d in draws])
    # a fourth moment of up to 9 in units of the variance
    assert ((got - cov).abs() < 4.5 * 3 * (sd[:, :, None] * sd[:, None]) / n**0.5).all()


def test_posterior_at_the_ends_and_shapes():
    images = GaussianMixture.kde(randn(5, 1, 3, 3), 0.0)
    x = images.means[:4].reshape(4, 1, 3, 3)
    s = PosteriorSampler(images, Flow())
    assert_close(s(x, 0.0).x0, x)  # no noise: nothing to draw
    assert s(x.float(), torch.full((4,), 0.5)).x0.dtype == torch.float32
    away = s(x, 1.0).x0.flatten(1)  # nothing but noise: some data point
    assert (torch.cdist(away, images.means).min(1).values < 1e-9).all()
    one, two = (PosteriorSampler(images, VP(), rng(3))(x, 0.6).x0 for _ in range(2))
    assert one.equal(two)
    wide = GaussianMixture([[0.3]], scales=0.5)
    assert_close(PosteriorSampler(wide, VP())(randn(4, 1), 0.0).x0, randn(4, 1))


# --- the losses


class Affine(nn.Module):  # x0 = c0 x + c1 + c2 z
    def __init__(self, c):
        super().__init__()
        self.c = nn.Parameter(torch.tensor(c, dtype=F64))

    def forward(self, x, k, z):
        return self.c[0] * x + self.c[1] + self.c[2] * z


class Square(nn.Module):  # a judge with a known slope: D = w x_k^2 / 2 + u x_{k+1}
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([0.7, 0.3], dtype=F64))

    def forward(self, x, k, after):
        return (self.w[0] * x.square() / 2 + self.w[1] * after).sum(1)


def affine(T=2, nz=1):
    return DDGAN(Affine([0.3, 0.2, 0.5]), Square(), ddgan_process(T), nz=nz).double()


def test_losses_by_hand():
    model, x0 = affine(), randn(500, 1, seed=1)
    D, G, chain = model.discriminator, model.generator, model.chain
    g = rng(2)
    k = chain.draw(500, g)
    x, after = chain.pair(x0, k, g)
    z = torch.randn(500, 1, generator=g, dtype=F64)
    fake = chain.posterior(G(after, k, z), after, k, g)
    r, f = D(x, k, after), D(fake, k, after)
    plain = -F.logsigmoid(r).mean() - F.logsigmoid(-f).mean()
    assert_close(model.d_loss(x0, 0.0, rng(2)), plain)
    penalty = 0.25 / 2 * (D.w[0] * x).square().mean()
    assert_close(model.d_loss(x0, 0.25, rng(2)), plain + penalty)
    assert_close(model.g_loss(x0, rng(2)), -F.logsigmoid(D(fake, k, after)).mean())


def test_r1_reaches_the_judge_as_a_difference_quotient():
    model, x0 = affine(), randn(300, 1, seed=1)
    (slope,) = torch.autograd.grad(model.d_loss(x0, 0.8, rng(3)), model.discriminator.w)
    w, h = model.discriminator.w.data, 1e-5
    for i in range(2):
        ends = []
        for sign in (1, -1):
            w[i] += sign * h
            ends.append(model.d_loss(x0, 0.8, rng(3)).item())
            w[i] -= sign * h
        assert abs((ends[0] - ends[1]) / (2 * h) - slope[i].item()) < 1e-7


def test_each_loss_moves_one_player():
    model, x0 = toy(), torch.randn(40, 2)
    players = dict(d=model.discriminator, g=model.generator)
    frozen = model.discriminator.biases[0].requires_grad_(False)
    for name, own in players.items():
        model.zero_grad()
        getattr(model, f"{name}_loss")(x0).backward()
        for other, net in players.items():
            grads = [p.grad is not None for p in net.parameters() if p is not frozen]
            assert all(grads) if net is own else not any(grads), (name, other)
    # a judge that was partly frozen stays so
    assert not frozen.requires_grad
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    # also where the judge fails
    model.discriminator.forward = lambda *a: torch.zeros(3)
    with pytest.raises(ValueError, match="one logit a sample"):
        model.g_loss(x0)
    assert all(p.requires_grad for p in model.parameters() if p is not frozen)
    assert not x0.requires_grad


@pytest.mark.parametrize("T", [1, 2])
def test_the_best_judge_measures_jensen_shannon(T):
    m, v, (c0, c1, c2) = 0.4, 0.6, (0.3, 0.2, 0.5)
    model = DDGAN(Affine([c0, c1, c2]), Square(), ddgan_process(T), nz=1).double()
    process = model.process

    def joint(k):  # mean and covariance of (x_k, x_{k+1}), real and fake
        t = torch.tensor([k / T, (k + 1) / T], dtype=F64)
        (a0, a1), (s0, s1) = process.alpha(t), process.sigma(t)
        keep = a1 / a0
        C = torch.stack([a0, a1])
        shared = keep * s0**2
        noise = torch.stack([torch.stack([s0**2, shared]), torch.stack([shared, s1**2])])
        real = C * m, v * torch.outer(C, C) + noise
        gain = 1 - keep**2 * s0**2 / s1**2
        back, var = keep * s0**2 / s1**2, s0**2 * gain + (a0 * gain * c2) ** 2
        r = back + a0 * gain * c0  # x_k = r x_{k+1} + shift + noise
        m1, v1 = a1 * m, a1**2 * v + s1**2
        fake = torch.stack([r * m1 + a0 * gain * c1, m1])
        cov = torch.stack([torch.stack([r * r * v1 + var, r * v1]), torch.stack([r * v1, v1])])
        return [torch.distributions.MultivariateNormal(*p) for p in (real, (fake, cov))]

    laws = [joint(k) for k in range(T)]

    class Best(nn.Module):
        def forward(self, x, k, after):
            at = torch.cat([x, after], 1)
            odds = torch.stack([p.log_prob(at) - q.log_prob(at) for p, q in laws])
            return odds.gather(0, k[None])[0]

    model.discriminator = Best()
    x0 = m + v**0.5 * randn(200000, 1)
    with torch.no_grad():
        got = model.d_loss(x0, 0.0, rng(1)).item()
        u = torch.linspace(-6, 6, 601, dtype=F64)
        at, js = torch.cartesian_prod(u, u), 0.0
        for p, q in laws:
            a, b = p.log_prob(at), q.log_prob(at)
            mix = torch.logaddexp(a, b) - math.log(2)
            js += 0.5 * (a.exp() * (a - mix) + b.exp() * (b - mix)).sum().item() * 0.02**2 / T
    assert js > 0.02
    # the losses spread by about one
    assert abs(got - (2 * math.log(2) - 2 * js)) < 4 * 200000**-0.5


# --- the denoiser in the library


def test_sampling_is_the_published_loop():
    model, x = toy(), torch.randn(30, 2, generator=rng(1))
    g, h = rng(5), rng(5)
    with torch.no_grad():
        y = x
        for k in reversed(range(4)):
            kk = torch.full((30,), k)
            y = model.chain.posterior(
                model.generator(y, kk, torch.randn(30, 3, generator=g)), y, kk, g
            )
    with count_evals(den := model.as_denoiser(h)) as n:
        got = sample(den, Ancestral("small"), x, model.grid, progress=False, generator=h)
    assert_close(got, y, rtol=1e-5, atol=1e-6)
    assert n.calls == 4


FINE = [DDIM(), DDIM(eta=1.0), Ancestral(), Ancestral("large"), Euler(), EulerMaruyama(), PLMS(1)]
FINE += [DPMSolverPP(1)]
COMBINE = [Heun(), DPMSolverPP(2), DPMSolverPP(3), DPMSolverPP(2, sde=True), DPMSingle(2), UniPC()]
COMBINE += [DEIS(), RhoRK(), PLMS(4), PNDM(), PseudoRK(), ClassicalAB(), GHVB(), HeavyBall()]
COMBINE += [TimeShift(DPMSolverPP(2))]


@pytest.mark.filterwarnings("ignore:order")
@pytest.mark.parametrize("solver", FINE + COMBINE, ids=repr)
def test_what_combines_predictions_is_refused(solver):
    model, x = toy(8), torch.randn(5, 2)
    run = lambda: sample(model.as_denoiser(), solver, x, model.grid, progress=False)
    if solver in FINE:
        assert torch.isfinite(run()).all()
    else:
        with pytest.raises(ValueError, match="noise of its own"):
            run()


WRAPPERS = {
    "cfg": lambda d: cfg(d, 2.0, uncond={}),
    "contrast": lambda d: contrast(d, MixtureDenoiser(LINE, d.process), 0.5),
    "classifier": lambda d: classifier_guidance(d, lambda x, t: x[:, 0]),
    "apg": lambda d: apg(d, 2.0, uncond={}),
    "adaptive": lambda d: adaptive_cfg(d, 2.0, uncond={}),
    "threshold": threshold,
    "epsilon_scale": epsilon_scale,
    "Counter": Counter,
    "Compiled": lambda d: Compiled(torch.compile(d, backend="eager")),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_pass_on_that_a_denoiser_is_stochastic(wrap):
    assert wrap(toy().as_denoiser()).stochastic
    assert not wrap(toy(nz=0).as_denoiser()).stochastic


def test_guidance_with_one_latent_for_both_branches():
    class Net(nn.Module):
        def forward(self, x, k, z, label):
            return z + label[:, None]

    chain, x, z = Chain(ddgan_process(4)), torch.zeros(6, 2), torch.randn(6, 2)
    d = LatentDenoiser(Net(), chain, 2)
    g = cfg(d, 3.0, uncond={"label": torch.zeros(6)})
    same = g(x, 1.0, label=torch.ones(6), z=z).x0
    assert_close(same, z + 3)  # the draws cancel
    free = g(x, 1.0, label=torch.ones(6)).x0
    assert (free - free.mean()).std() > 1.5  # each branch draws for itself


def test_without_a_latent_the_model_is_deterministic():
    model = toy(nz=0)
    d, x = model.as_denoiser(), torch.randn(4, 2)
    assert d(x, 0.5).x0.equal(d(x, 0.5).x0) and not d.stochastic
    sample(d, DPMSolverPP(2), x, model.grid, progress=False)
    d = toy().as_denoiser()
    assert not d(x, 0.5).x0.equal(d(x, 0.5).x0)


def test_any_process_and_grid():
    for process in (VP(), Flow(), VE()):
        grid = time_grid(process, 3, end=0.0)
        model = DDGAN(StepMLP(3, 2, 3), StepMLP(4, 1, 3), process, grid, nz=1)
        x = process.prior((7, 2), generator=rng())
        y = sample(model.as_denoiser(), Ancestral(), x.float(), model.grid, progress=False)
        assert y.shape == (7, 2) and torch.isfinite(y).all()
        assert torch.isfinite(model.d_loss(y) + model.g_loss(y))


# --- training


def test_training_resumes_bit_for_bit_and_keeps_the_turn_of_r1(tmp_path, monkeypatch):
    data, seen = torch.randn(300, 2, generator=rng(1)), []
    plain = DDGAN.d_loss
    monkeypatch.setattr(
        DDGAN, "d_loss", lambda self, x0, r1, **k: (seen.append(r1), plain(self, x0, r1, **k))[1]
    )
    options = dict(r1=0.3, lazy=4, batch_size=32, ema=0.9, progress=False, lr_g=1e-3, lr_d=1e-3)
    whole = fit_ddgan(toy(), data, 11, **options)
    assert seen == [0.3, 0, 0, 0] * 2 + [0.3, 0, 0]
    seen.clear()
    file = tmp_path / "run.safetensors"
    fit_ddgan(toy(), data, 6, checkpoint=file, **options)
    rest = fit_ddgan(toy(seed=9), data, 11, checkpoint=file, **options)
    assert seen == [0.3, 0, 0, 0] * 2 + [0.3, 0, 0]
    assert rest.resumed == 6 and set(rest.losses) == {"d", "g"}
    for a, b in zip(whole.model.parameters(), rest.model.parameters()):
        assert a.equal(b)
    for a, b in zip(whole.ema.parameters(), rest.ema.parameters()):
        assert a.equal(b)


def test_without_r1_its_turn_makes_no_difference():
    data, options = randn(20, 2, seed=1).float(), dict(r1=0, batch_size=5, progress=False)
    nets = [fit_ddgan(toy(), data, 3, lazy=k, **options).model for k in (1, 2)]
    for a, b, c in zip(*(net.parameters() for net in (*nets, toy()))):
        assert a.equal(b) and not a.equal(c)


def test_training_is_the_published_alternation(monkeypatch):
    data, model, batches, plain = torch.randn(64, 2), toy(), [], DDGAN.d_loss
    options = dict(lr_g=2e-3, lr_d=1e-3, r1=0.5, lazy=2, ema=None, batch_size=32, progress=False)

    def watch(self, x0, *a, **k):
        batches.append((x0.clone(), torch.get_rng_state()))
        return plain(self, x0, *a, **k)

    monkeypatch.setattr(DDGAN, "d_loss", watch)
    run = fit_ddgan(toy(), data, 3, **options)
    adam = lambda net, lr: torch.optim.Adam(net.parameters(), lr, betas=(0.5, 0.9))
    d, g = adam(model.discriminator, 1e-3), adam(model.generator, 2e-3)
    for (x0, state), r1 in zip(batches, (0.5, 0.0, 0.5)):
        torch.set_rng_state(state)
        d.zero_grad()
        plain(model, x0, r1).backward()
        d.step()
        g.zero_grad()
        model.g_loss(x0).backward()
        g.step()
    for a, b in zip(run.model.parameters(), model.parameters()):
        assert_close(a, b)


def test_conditions_reach_both_players():
    got = []

    class Net(nn.Module):
        def __init__(self, out):
            super().__init__()
            self.f = nn.Linear(2, out)

        def forward(self, x, k, other, label):
            got.append(label.clone())
            return self.f(x)

    model = DDGAN(Net(2), Net(1), nz=1)
    data = {"x0": torch.randn(40, 2), "label": torch.arange(40) % 4}
    fit_ddgan(model, data, 2, batch_size=8, progress=False)
    assert len(got) == 2 * 5 and all(len(v) == 8 for v in got)
    y = torch.arange(6) % 4
    sample(
        model.as_denoiser(),
        Ancestral(),
        torch.randn(6, 2),
        model.grid,
        cond={"label": y},
        progress=False,
    )
    assert got[-1].equal(y)


def test_two_points_are_learned():
    torch.manual_seed(0)
    data = (torch.randint(2, (4000, 1)) * 2 - 1) + 0.1 * torch.randn(4000, 1)
    model = DDGAN(StepMLP(2, 1, 2, 24), StepMLP(2, 1, 2, 24), ddgan_process(2), nz=1)
    before = energy(model, data)
    run = fit_ddgan(model, data, 250, 3e-3, 3e-3, ema=0.95, batch_size=128, progress=False)
    assert energy(run.ema, data) < 0.1 * before


def energy(model, data):
    from diffkit.core.metrics import energy_distance

    x = torch.randn(1000, 1, generator=rng(1))
    y = sample(
        model.as_denoiser(rng(2)), Ancestral(), x, model.grid, progress=False, generator=rng(3)
    )
    return energy_distance(y, data[:1000])


def test_a_loss_that_is_not_finite_stops_with_both_losses():
    model = toy()
    nn.init.constant_(model.generator.biases[-1], float("nan"))
    with pytest.raises(FloatingPointError, match="d = nan, g = .* at step 1"):
        fit_ddgan(model, torch.randn(64, 2), 5, batch_size=64, progress=False)


# --- networks


def test_members_are_networks_of_their_own():
    T, S, B = 4, 3, 5
    torch.manual_seed(0)
    many = StepMLP(4, 2, T, hidden=8, depth=2, members=S)
    x, z, k = torch.randn(S * B, 2), torch.randn(S * B, 2), torch.randint(T, (S * B,))
    out = many(x, k, z)
    for i in range(S):
        one = StepMLP(4, 2, T, hidden=8, depth=2)
        for a, b in zip(one.parameters(), many.parameters()):
            a.data = b.data[i : i + 1]
        rows = slice(i * B, (i + 1) * B)
        assert_close(one(x[rows], k[rows], z[rows]), out[rows])
    # by hand
    h = torch.cat([x, z, F.one_hot(k, T)], 1)[:B]
    for i, (w, b) in enumerate(zip(many.weights, many.biases)):
        h = (F.leaky_relu(h, 0.2) if i else h) @ w[0] + b[0]
    assert_close(h, out[:B])
    # the gradient of a member's rows stays with it
    out[:B].sum().backward()
    assert all((p.grad[1:] == 0).all() and (p.grad[0] != 0).any() for p in many.parameters())
    flat = StepMLP(20, 16, T, bounded=True)
    image = flat(torch.randn(7, 1, 4, 4) * 100, torch.zeros(7).long(), torch.randn(7, 4))
    assert image.shape == (7, 1, 4, 4) and image.abs().max() <= 1
    assert StepMLP(32, 1, T)(
        torch.randn(7, 1, 4, 4), torch.zeros(7).long(), torch.randn(7, 1, 4, 4)
    ).shape == (7, 1)


def test_members_learn_as_each_would_alone():
    """A mean over all members divides each gradient by their number, which Adam undoes, but for
    its epsilon of 1e-8."""
    many, data = toy(members=2), torch.randn(64, 2, generator=rng(2))
    one = toy()
    for a, b in zip(one.parameters(), many.parameters()):
        a.data = b.data[:1].clone()
    both = torch.cat([data, data])
    for model, x in ((many, both), (one, data)):
        opt = torch.optim.Adam(model.discriminator.parameters(), 1e-2)
        k, z = torch.arange(len(x)) % 4, torch.zeros(len(x), 3)
        for _ in range(3):
            opt.zero_grad()
            fake = model.generator(x, k, z).detach()
            (
                F.softplus(model.discriminator(fake, k, x))
                + F.softplus(-model.discriminator(x, k, x))
            ).mean().backward()
            opt.step()
    for a, b in zip(one.discriminator.parameters(), many.discriminator.parameters()):
        assert_close(a, b[:1], rtol=0.0, atol=1e-3)  # three steps of 0.01


# --- bad input


class Heavy(VP):
    gaussian = False


X2 = torch.zeros(4, 2)
BAD = [
    (lambda: ddgan_process(0), ValueError, "steps.*got 0"),
    (lambda: ddgan_process(2.0), ValueError, "steps.*got 2.0"),
    (lambda: ddgan_process(True), ValueError, "steps.*got True"),
    (lambda: ddgan_process(4, first=-0.1), ValueError, "first.*got -0.1"),
    (lambda: ddgan_process(4, beta_min=3.0, beta_max=1.0), ValueError, "beta_min=3.0"),
    (lambda: Chain("vp"), TypeError, "process.*got str"),
    (lambda: Chain(Heavy()), ValueError, "Gaussian kernel"),
    (lambda: Chain(VP()), ValueError, "no levels of its own"),
    (lambda: Chain(VP(), torch.tensor([0.0, 1.0])), ValueError, "decreasing"),
    (lambda: PosteriorSampler(LINE, Heavy()), ValueError, "Gaussian kernel"),
    (lambda: DDGAN(nn.Identity(), nn.Identity(), nz=-1), ValueError, "nz.*got -1"),
    (lambda: DDGAN(nn.Identity(), nn.Identity(), nz=2.5), ValueError, "nz.*got 2.5"),
    (lambda: toy().as_denoiser()(X2, 0.6), ValueError, "t=0.6; this model knows 1, 0.75"),
    (lambda: toy().as_denoiser()(X2, 0.0), ValueError, "t=0;"),
    (lambda: fit_ddgan(nn.Linear(2, 2), X2, 1), TypeError, "model.*got Linear"),
    (lambda: fit_ddgan(toy(), X2, 1, r1=-1.0), ValueError, "r1.*got -1.0"),
    (lambda: fit_ddgan(toy(), X2, 1, lazy=0), ValueError, "lazy.*got 0"),
    (lambda: fit_ddgan(toy(), X2, 0), ValueError, "steps=0"),
    (lambda: fit_ddgan(toy(), X2, 1, epochs=3), TypeError, "epochs"),
    (lambda: StepMLP(0, 2, 4), ValueError, "inp.*got 0"),
    (lambda: StepMLP(2, 2, 4, members=1.5), ValueError, "members.*got 1.5"),
    (lambda: toy(members=3).d_loss(X2), ValueError, "4 rows.*3 members"),
]


@pytest.mark.parametrize("call, error, says", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_networks_of_the_wrong_shape_are_named():
    model = toy()
    model.generator.forward = lambda x, k, z: x[:, :1]
    with pytest.raises(ValueError, match=r"generator must return the shape of x, \(4, 2\)"):
        model.d_loss(X2)
    model = toy()
    model.discriminator.forward = lambda x, k, after: x
    with pytest.raises(ValueError, match=r"one logit a sample \(4\), got shape \(4, 2\)"):
        model.d_loss(X2)


def test_every_parameter_is_annotated():
    for name in module.__all__:
        f = getattr(module, name)
        for p in list(inspect.signature(f).parameters.values()):
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "data":
                assert p.annotation is not p.empty, (name, p.name)
