"""DiffuseVAE: the official update rules, every solver and process under both formulations, exact
stages by other routes, foreign autoencoders, training, and bad input."""

import copy
import inspect
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import diffkit.models.diffusevae as module
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, sample
from diffkit.core.training import fit
from diffkit.models.ddpm import VAE, LatentSpace, clip_x0
from diffkit.models.diffusevae import (
    Beside,
    DiffuseVAE,
    MixtureRefiner,
    ShiftedProcess,
    centred,
    fit_prior,
    official_grid,
    ppca,
    refiner,
)
from diffkit.models.pfgmpp import HeavyTailed
from diffkit.solvers.dpm_solver_pp import DPMSolverPP

F64 = torch.float64
BASES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]
COV = torch.tensor([[1.0, 0.4, 0.1], [0.4, 0.8, 0.2], [0.1, 0.2, 0.5]], dtype=F64)
MEAN = torch.tensor([0.3, -0.2, 0.1], dtype=F64)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=F64)


class Net(nn.Module):  # any function of the stacked input and of the time
    def __init__(self, dim=3):
        super().__init__()
        torch.manual_seed(0)
        self.f = nn.Linear(2 * dim, dim).double()

    def forward(self, x, t):
        return self.f(x.flatten(1)).tanh() * (1 + 0.1 * t[:, None].to(x.dtype)).rsqrt()


def model(form=1, process=None, unit=False):
    return DiffuseVAE(ppca(MEAN, COV, 2), refiner(Net(), process or VP()), form, unit)


# --- the linear VAE


def test_no_linear_vae_has_a_smaller_loss():
    """The expected loss in closed form; random moves of all weights never lower it."""
    vae = ppca(MEAN, COV, 2)
    w = vae.kl_weight

    def loss(A, b, C, c, logv):
        # E |x - C z - c|^2 / 2 + w KL, over Gaussian data and z
        gap, R = MEAN - C @ (A @ MEAN + b) - c, torch.eye(3, dtype=F64) - C @ A
        square = gap @ gap + (R @ COV @ R.T).trace() + (C.square() @ logv.exp()).sum()
        m = A @ MEAN + b
        kl = 0.5 * (logv.exp() - 1 - logv + m**2 + (A @ COV @ A.T).diag()).sum()
        return 0.5 * square + w * kl

    e, d = vae.encoder[1], vae.decoder[0]
    at = [e.weight[:2], e.bias[:2], d.weight, d.bias, e.bias[2:]]
    at = [v.detach().clone().requires_grad_() for v in at]
    best = loss(*at)
    for g in torch.autograd.grad(best, at):
        assert g.abs().max() < 1e-10
    for i in range(200):
        moved = [v + 0.1 * randn(*v.shape, seed=10 * i + j) for j, v in enumerate(at)]
        assert loss(*moved) > best
    # and VAE.loss is that, to 4 standard errors of 200,000 draws
    x = torch.distributions.MultivariateNormal(MEAN, COV)
    torch.manual_seed(3)
    drawn = vae.loss(x.sample((200_000,)), gen(4)).item() * 3
    assert abs(drawn - best.item()) < 4 * 1.5 / 200_000**0.5


def test_a_large_weight_switches_latents_off_and_a_small_one_keeps_the_image():
    lam = torch.linalg.eigvalsh(COV)
    dead = ppca(MEAN, COV, 2, float(lam.max()) + 0.1)
    z = dead.encode(randn(5, 3))
    assert z[0].abs().max() == 0 and z[1].abs().max() == 0
    assert_close(dead.decode(randn(5, 2)), MEAN.expand(5, 3))
    keep = ppca(MEAN, COV, 2, 1e-9)
    axes = torch.linalg.eigh(COV)[1][:, 1:]
    x = MEAN + randn(5, 2) @ axes.T
    assert_close(keep.decode(keep.encode(x)[0]), x, atol=1e-6, rtol=0)


# --- the exact refiner


def test_exact_refiner_is_gaussian_conditioning():
    "One Gaussian: x_0 given x_t and the latent, from the joint law of all three."
    vae, p = ppca(MEAN, COV, 2), Discrete()
    d = MixtureRefiner(GaussianMixture(MEAN[None], covs=COV), vae, p)
    e, dec = vae.encoder[1], vae.decoder[0]
    A, V = e.weight[:2].detach(), e.bias[2:].detach().exp().diag()
    z, x = randn(6, 2), randn(6, 3, seed=1)
    with torch.no_grad():
        guess = dec(z)
    for t in (0.02, 0.5, 1.0):
        a, s = float(p.alpha(t)), float(p.sigma(t))
        H = torch.cat([a * torch.eye(3, dtype=F64), A])
        N = torch.block_diag(s * s * torch.eye(3, dtype=F64), V)
        gain = COV @ H.T @ torch.linalg.inv(H @ COV @ H.T + N)
        seen = torch.cat([x, z], 1) - torch.cat([a * MEAN, torch.zeros(2, dtype=F64)])
        assert_close(d(x, t, guess=guess).x0, MEAN + seen @ gain.T)
    times = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.8, 1.0], dtype=F64)
    each = torch.cat(
        [d(x[i : i + 1], float(u), guess=guess[i : i + 1]).x0 for i, u in enumerate(times)]
    )
    assert_close(d(x, times, guess=guess).x0, each)
    assert d(x.float(), 0.5, guess=guess.float()).x0.dtype == torch.float32


def test_both_exact_stages_give_the_data_back():
    "Mean and covariance within 4.5 standard errors plus DDIM's error of 200 steps, 0.5 %."
    mix = GaussianMixture([[-1.0, 0.0, 0.5], [1.0, 0.4, -0.5]], covs=0.2 * COV, weights=[0.4, 0.6])
    mean, cov = mix.mean_cov()
    vae = ppca(mean, cov, 1)
    m = DiffuseVAE(vae, MixtureRefiner(mix, vae, VP()))
    n = 20_000
    z = m.encode(mix.sample(n, gen(1))[0], gen(2))
    y, _ = m.sample(z, DPMSolverPP(2), time_grid(VP(), 40, "log_snr", end=1e-3), generator=gen(3))
    se = (cov.diag() / n).sqrt()
    assert ((y.mean(0) - mean).abs() < 4.5 * se + 5e-3).all()
    tol = (
        4.5 * ((torch.outer(cov.diag(), cov.diag()) + cov**2) / n).sqrt() + 5e-3 * cov.diag().max()
    )
    assert ((torch.cov(y.T) - cov).abs() < tol).all()


def test_a_guess_makes_few_steps_better():
    mix = GaussianMixture(MEAN[None], covs=COV)
    vae, p = ppca(MEAN, COV, 2), Discrete()
    m, grid = DiffuseVAE(vae, MixtureRefiner(mix, vae, p)), time_grid(p, 5, "trailing")
    x, z = randn(20_000, 3), randn(20_000, 2, seed=1)
    two, _ = m.sample(z, DDIM(), grid, x=x)
    one = sample(MixtureDenoiser(mix, p), DDIM(), x, grid, progress=False)
    error = lambda y: (torch.cov(y.T) - COV).norm()
    assert error(two) < 0.7 * error(one)


# --- formulation 2


def official_form2(net, p, hat, start, grid, draws, eta):
    "The official loop (spaced_diff_form2.py), its terms in its order; eta None is DDPM."
    x = hat + start
    for i, (t, s) in enumerate(zip(grid.tolist(), grid.tolist()[1:])):
        bar, prev = float(p.alpha(t)) ** 2, float(p.alpha(s)) ** 2
        beta = 1 - bar / prev
        eps = net(x, None, hat)
        x0 = (x - hat - (1 - bar) ** 0.5 * eps) / bar**0.5
        if eta is None:
            c1 = beta * prev**0.5 / (1 - bar)
            c2 = (1 - beta) ** 0.5 * (1 - prev) / (1 - bar)
            mean, sd = c1 * x0 + c2 * x + (1 - c2) * hat, (beta * (1 - prev) / (1 - bar)) ** 0.5
        else:
            sd = eta * ((1 - prev) / (1 - bar)) ** 0.5 * (1 - bar / prev) ** 0.5
            rest = max(1 - prev - sd**2, 0.0) ** 0.5
            coeff = 1 - rest / (1 - bar) ** 0.5
            mean = prev**0.5 * x0 + rest * (eps + hat / (1 - bar) ** 0.5) + coeff * hat
        x = mean + (sd * draws[i] if s > 0 else 0)
    return x - hat


@pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])
def test_formulation_2_is_the_official_loop(eta):
    p, n = Discrete(), 7
    grid, hat, start, draws = (
        time_grid(p, n, "trailing"),
        randn(4, 3),
        randn(4, 3, seed=1),
        randn(n, 4, 3),
    )
    net = lambda x, t, guess: 0.6 * x.tanh() - 0.3 * guess.sin() + 0.1
    solver = Ancestral(noise=draws) if eta is None else DDIM(eta, draws) if eta else DDIM()
    got = sample(
        centred(NetDenoiser(net, p)), solver, start, grid, cond={"guess": hat}, progress=False
    )
    assert_close(got, official_form2(net, p, hat, start, grid, draws, eta), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("base", BASES, ids=repr)
@pytest.mark.parametrize(
    "solver", [DDIM(), Ancestral(), Euler(), EulerMaruyama(), Heun(), DPMSolverPP(2)], ids=repr
)
def test_every_solver_and_process_runs_formulation_2(solver, base):
    "The same as formulation 1 with a network that adds the guess to its state."
    net = Net()
    plus = lambda x, t, guess: net(torch.cat([x + guess, guess], 1), t)
    one = NetDenoiser(plus, base, "x0")
    two = centred(refiner(net, base, "x0"))
    grid, hat = time_grid(base, 5, "uniform", base.t_max, max(base.t_min, 1e-3)), randn(4, 3)
    x = base.prior((4, 3), gen(2), dtype=F64)
    run = lambda d: sample(
        d, solver, x, grid, cond={"guess": hat}, progress=False, generator=gen(3)
    )
    assert_close(run(two), run(one))


@pytest.mark.parametrize("base", [*BASES, HeavyTailed(EDM(), 8.0)], ids=repr)
def test_a_shifted_process_is_its_base_moved(base):
    hat, x0, eps = randn(4, 3), randn(4, 3, seed=1), randn(4, 3, seed=2)
    p, t = ShiftedProcess(base, hat), 0.37
    assert (p.alpha(t), p.sigma(t), p.log_snr(t)) == (base.alpha(t), base.sigma(t), base.log_snr(t))
    assert_close(p.time(p.log_snr(t)), torch.tensor(t, dtype=F64))
    assert_close(p.noise(x0, t, eps), base.noise(x0, t, eps) + hat)
    assert_close(
        p.prior((4, 3), gen(1), dtype=F64, t=0.8),
        base.prior((4, 3), gen(1), dtype=F64, t=0.8) + hat,
    )
    assert p.n_train == base.n_train and p.gaussian == base.gaussian
    assert p.net_time(t) == base.net_time(t) and (p.t_min, p.t_max) == (base.t_min, base.t_max)
    assert (
        p == ShiftedProcess(base, hat.clone()) and p != ShiftedProcess(base, hat + 1) and p != base
    )
    assert hash(p) == hash(ShiftedProcess(base, hat.clone()))
    if base.gaussian:
        assert_close(p.sde(t), base.sde(t))
    else:
        with pytest.raises(ValueError, match="Gaussian increments"):
            p.sde(t)
    q = ShiftedProcess(base, 0.5)
    assert_close(q.noise(x0, t, eps), base.noise(x0, t, eps) + 0.5)
    assert "shift=0.5" in repr(q) and "(4, 3)" in repr(p)


def test_every_native_output_is_centred():
    "x_0 and noise that a network means do not depend on what it puts out."
    p, hat, y, t = VP(), randn(5, 3), randn(5, 3, seed=1), 0.4
    a, s = float(p.alpha(t)), float(p.sigma(t))
    x0 = lambda x: (0.3 * x + 0.1).sin()  # what the network would say of x_0, seeing x
    eps = lambda x, h: (x - h - a * x0(x)) / s
    out = {
        "x0": lambda x, u, guess: x0(x),
        "eps": lambda x, u, guess: eps(x, guess),
        "v": lambda x, u, guess: a * eps(x, guess) - s * x0(x),
        "flow": lambda x, u, guess: eps(x, guess) - x0(x),
        "score": lambda x, u, guess: -eps(x, guess) / s,
    }
    for kind, f in out.items():
        pred = centred(NetDenoiser(f, p, kind))(y, t, guess=hat)
        assert_close(pred.x0, x0(y + hat))
        assert_close(pred.eps, eps(y + hat, hat))
    # without a guess nothing is moved
    plain = NetDenoiser(lambda x, u: x0(x), p, "x0")
    assert centred(plain)(y, t).x0.equal(plain(y, t).x0)


# --- both stages together


@pytest.mark.parametrize("form", [1, 2])
def test_loss_and_sampling_agree(form):
    """At the states of the loss, the sampler's denoiser makes the error that the loss reports."""
    m, x0, eps, t = (
        model(form),
        randn(6, 3),
        randn(6, 3, seed=1),
        torch.linspace(0.1, 1, 6).double(),
    )
    got = m.loss(x0, t=t, eps=eps, generator=gen(5))
    guess = m.guess(m.encode(x0, gen(5)))
    said = m.denoiser(m.process.noise(x0, t, eps), t, guess=guess).eps
    assert_close(got, (said - eps).square().mean())


def test_a_coin_for_each_image():
    seen = []

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones((), dtype=F64))

        def forward(self, x, t):
            seen.append(x[:, 3:])
            return self.w * x[:, :3]

    m = DiffuseVAE(ppca(MEAN, COV, 2), refiner(Spy(), VP()))
    m.loss(randn(4000, 3), drop=0.3, generator=gen(1))
    gone = (seen[0] == 0).all(1).double().mean().item()
    assert abs(gone - 0.3) < 4.5 * (0.3 * 0.7 / 4000) ** 0.5
    m.loss(randn(100, 3), generator=gen(1))
    assert not (seen[1] == 0).any()


def test_guesses_are_fresh_draws_and_never_trained():
    m, x = model(), randn(8, 3)
    assert not m.guess(m.encode(x)).equal(m.guess(m.encode(x)))
    weights = [p.clone() for p in m.space.parameters()]
    before = [p.clone() for p in m.refiner.parameters()]
    run = fit(m, lambda m, x: m.loss(x, drop=0.1), x, 5, 1e-2, batch_size=8, progress=False)
    assert all(a.equal(b) for a, b in zip(weights, run.model.space.parameters()))
    assert all(a.equal(b) for a, b in zip(weights, run.ema.space.parameters()))
    assert not all(a.equal(b) for a, b in zip(before, run.model.refiner.parameters()))
    m.space.vae.encoder.append(nn.Dropout(0.5))
    m.train()
    assert m.training and not m.space.training and not m.space.vae.encoder[-1].training


@pytest.mark.parametrize("form", [1, 2])
def test_solvers_guidance_and_clipping_compose(form):
    m, z = model(form), randn(5, 2)
    grid = time_grid(VP(), 6, end=0.0)
    for solver in (DDIM(), Ancestral(), DPMSolverPP(2)):
        wrap = lambda d: clip_x0(cfg(d, 2.0))
        y, guess = m.sample(z, solver, grid, wrap=wrap, generator=gen(1))
        assert y.shape == guess.shape == (5, 3) and y.abs().max() <= 1
        again = m.sample(z, solver, grid, wrap=wrap, generator=gen(1))[0]
        assert y.equal(again)
    x = randn(1, 3)
    warm, cold = (m.sample(z, DDIM(), grid, x=x, temp=c)[0] for c in (1.0, 0.5))
    assert_close(cold, m.sample(z, DDIM(), grid, x=0.5 * x)[0])
    assert not warm.equal(cold)


def test_starts_have_the_scale_of_their_time():
    p = VE(0.01, 30.0)
    m, z = model(process=p), randn(4000, 2)
    got = []
    grid = time_grid(p, 2, start=0.6)
    m.sample(z, DDIM(), grid, generator=gen(1), wrap=lambda d: Peek(d, got))
    assert abs(got[0].std() / float(p.sigma(0.6)) - 1) < 4.5 / (2 * 12_000) ** 0.5


def Peek(d, got):
    old = d.forward

    def forward(x, t, **c):
        got.append(x.clone())
        return old(x, t, **c)

    new = copy.copy(d)
    new.forward = forward
    return new


def test_a_standardised_latent_space_and_unit_images():
    vae = VAE(nn.Linear(3, 4).double(), nn.Linear(2, 3).double())
    space = LatentSpace(vae).fit(randn(500, 3))
    m = DiffuseVAE(space, refiner(Net(), VP()))
    z = m.encode(randn(20_000, 3, seed=1), gen(1))
    assert abs(z.std() - 1) < 0.05
    assert_close(m.guess(z[:5]), space.decode(z[:5]))

    class Unit(nn.Module):
        def encode(self, x):
            assert x.min() >= 0 and x.max() <= 1
            return x[:, :2]

        def decode(self, z):
            return torch.cat([z, z[:, :1]], 1)

    m = DiffuseVAE(Unit(), refiner(Net(), VP()), unit=True)
    x = randn(9, 3).tanh()
    assert_close(m.guess(m.encode(x)), torch.cat([x[:, :2], x[:, :1]], 1))


def test_an_autoencoder_and_a_unet_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=2,
    )  # fmt: skip
    net = diffusers.UNet2DModel(
        sample_size=8, in_channels=2, out_channels=1, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        layers_per_block=1,
    )  # fmt: skip
    m, x = DiffuseVAE(vae, refiner(net, Discrete()), form=2), torch.randn(3, 1, 8, 8)
    m.loss(x, drop=0.5).backward()
    assert all(p.grad is None for p in vae.parameters())
    assert any(p.grad is not None for p in net.parameters())
    z = m.encode(x)
    assert z.shape == (3, 2, 4, 4)
    y, guess = m.sample(z, DPMSolverPP(2), time_grid(Discrete(), 3, "trailing"))
    assert y.shape == x.shape and torch.isfinite(y).all()
    with torch.no_grad():
        assert_close(guess, vae.decode(z).sample)


def test_a_state_dict_comes_back():
    a, b = model(), model()
    with torch.no_grad():
        for p in a.refiner.parameters():
            p.add_(1)
    b.load_state_dict(a.state_dict())
    z, grid = randn(3, 2), time_grid(VP(), 3)
    x = randn(3, 3, seed=1)
    assert a.sample(z, DDIM(), grid, x=x)[0].equal(b.sample(z, DDIM(), grid, x=x)[0])


# --- the prior and the grids


def test_the_fitted_prior():
    z = torch.cat([randn(500, 2) * 0.3 - 2, randn(1500, 2, seed=1) * 0.5 + 1])
    p = fit_prior(z, 2, seed=1)
    assert_close(p.weights.sort().values, torch.tensor([0.25, 0.75], dtype=F64), atol=0.02, rtol=0)
    mean, cov = p.mean_cov()  # EM keeps both moments, but for its ridge of 1e-6
    assert_close(mean, z.mean(0), atol=1e-4, rtol=0)
    assert_close(cov, torch.cov(z.T, correction=0), atol=1e-4, rtol=0)
    one = fit_prior(z.float(), 1)
    assert one.sample(3)[0].dtype == F64


@pytest.mark.parametrize("n", [1, 2, 5, 10, 25, 50, 100, 250, 500, 1000])
@pytest.mark.parametrize("spacing", ["uniform", "quad"])
def test_official_grids(n, spacing):
    p = Discrete()
    if spacing == "uniform":
        theirs = next(r for i in range(1, 1001) if len(r := range(0, 1000, i)) == n)
    else:
        theirs = {int(v + 1e-9) for v in (torch.linspace(0, math.sqrt(800), n, dtype=F64) ** 2)}
    want = [(k + 1) / 1000 for k in sorted(theirs, reverse=True)] + [0.0]
    assert_close(official_grid(p, n, spacing), torch.tensor(want, dtype=F64))


# --- bad input


X = torch.zeros(4, 3, dtype=F64)
GRID = torch.tensor([1.0, 0.5, 0.1])
BAD = [
    (lambda: ppca(MEAN, COV[:2], 1), ValueError, r"cov.*\(3, 3\).*got \(2, 3\)"),
    (lambda: ppca(MEAN, COV, 3), ValueError, "dim.*1 to 2, got 3"),
    (lambda: ppca(MEAN, COV, True), ValueError, "dim.*got True"),
    (lambda: ppca(MEAN, COV, 1, 0.0), ValueError, "kl_weight.*got 0.0"),
    (lambda: ShiftedProcess("vp"), TypeError, "base.*got str"),
    (lambda: ShiftedProcess(VP(), "x"), TypeError, "shift.*got str"),
    (
        lambda: ShiftedProcess(VP(), X).noise(X[:2], 0.5),
        ValueError,
        r"shift.*\(2, 3\), got \(4, 3\)",
    ),
    (lambda: centred(nn.Identity()), TypeError, "denoiser.*Identity"),
    (lambda: Beside(Net())(X, X[:, 0], X[:2]), ValueError, r"guess.*\(4, 3\), got \(2, 3\)"),
    (lambda: Beside(lambda x, t: x)(X, X[:, 0], X), ValueError, r"net must return.*got \(4, 6\)"),
    (lambda: model(3), ValueError, "form.*got 3"),
    (lambda: model(True), ValueError, "form.*got True"),
    (lambda: DiffuseVAE(nn.Identity(), refiner(Net(), VP())), TypeError, "vae.*got Identity"),
    (lambda: DiffuseVAE(ppca(MEAN, COV, 1), Net()), TypeError, "refiner.*got Net"),
    (
        lambda: DiffuseVAE(LatentSpace(ppca(MEAN, COV, 1)), refiner(Net(), VP())).encode(X),
        RuntimeError,
        "fit",
    ),
    (lambda: model().loss(X, drop=1.0), ValueError, "drop.*got 1.0"),
    (lambda: model().sample(X[:, :2], DDIM(), GRID, x=X[:3]), ValueError, r"x must.*got \(3, 3\)"),
    (lambda: model().sample(X[:, :2], DDIM(), GRID.flip(0)), ValueError, "decreasing"),
    (lambda: fit_prior(X[0]), ValueError, r"latents.*got \(3,\)"),
    (lambda: fit_prior(X, 0), ValueError, "components.*got 0"),
    (lambda: fit_prior(X, 3), ValueError, "half.*4, got 3"),
    (lambda: official_grid(VP(), 5), ValueError, "process.*VP"),
    (lambda: official_grid(Discrete(), 0), ValueError, "n must.*got 0"),
    (lambda: official_grid(Discrete(), 300), ValueError, "stride.*got 300"),
    (lambda: official_grid(Discrete(), 5, "cosine"), ValueError, "spacing.*got 'cosine'"),
]


@pytest.mark.parametrize("call, error, says", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_the_exact_refiner_moves_with_its_mixture_which_keeps_its_precision():
    def new():
        return MixtureRefiner(GaussianMixture(MEAN[None], covs=COV), ppca(MEAN, COV, 2), VP())

    d = new().float()
    assert d.mixture.means.dtype == F64
    assert_close(d(X, 0.5).x0, new()(X, 0.5).x0, rtol=0, atol=0)
    far = new().to("meta")
    parts = (far.mixture.means, far.mixture.vars, far.mixture.basis, far.gain, far.chol)
    assert all(p.device.type == "meta" for p in parts)


def test_what_has_no_exact_refiner_is_refused():
    mix, vae = GaussianMixture(MEAN[None], covs=COV), ppca(MEAN, COV, 2)
    with pytest.raises(ValueError, match="Gaussian kernel"):
        MixtureRefiner(mix, vae, HeavyTailed(EDM(), 8.0))
    bent = VAE(nn.Sequential(vae.encoder, nn.Tanh()), vae.decoder)
    with pytest.raises(ValueError, match="linear"):
        MixtureRefiner(mix, bent, VP())
    with pytest.raises(ValueError, match="guess"):
        MixtureRefiner(mix, vae, VP())(X, 0.5, guess=X[:1])


def test_every_parameter_is_annotated():
    for name in module.__all__:
        for p in inspect.signature(getattr(module, name)).parameters.values():
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL):
                assert p.annotation is not p.empty, (name, p.name)
