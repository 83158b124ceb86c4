"""PFGM++: the law against SciPy and the official route, exact denoisers in every form, every
process as a base, all deterministic solvers, who refuses, and training."""

import copy
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from scipy import stats
from torch.testing import assert_close

from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, NetDenoiser, Prediction, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, exact_flow, sample
from diffkit.models.pfgmpp import (
    FieldDenoiser,
    HeavyTailed,
    InjectError,
    align,
    inferred_sigma,
    log_kernel,
    perturb_radius,
    poisson_field,
    training_times,
)
from diffkit.solvers.deis import DEIS
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from diffkit.solvers.pndm import PLMS, PNDM

BASES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]
MIX = GaussianMixture(ring(6).means, scales=0.25, labels=[0, 0, 1, 1, 2, 2])


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


@pytest.mark.parametrize("D", [0.5, 1, 3, 64, 2048.0])
@pytest.mark.parametrize("N", [1, 2, 64])
def test_the_radius_is_beta_prime(N, D):
    z = HeavyTailed(EDM(), D).sample_noise((20_000, N), generator=gen(1), dtype=torch.float64)
    r2 = z.square().sum(1) / D
    law = stats.betaprime(N / 2, D / 2)
    # one fixed draw: a p-value that cannot change
    assert stats.kstest(r2.numpy(), law.cdf).pvalue > 1e-3
    theirs = perturb_radius(N, D, 1.0, 20_000, gen(2)).square()
    assert stats.kstest(theirs.numpy(), law.cdf).pvalue > 1e-3
    if N > 1:  # the direction is uniform: its first coordinate squared is a Beta variable
        first = (z[:, 0] / z.norm(dim=1)).square()
        assert stats.kstest(first.numpy(), stats.beta(0.5, (N - 1) / 2).cdf).pvalue > 1e-3


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_every_base(base):
    p, t = HeavyTailed(base, 6.0), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    for f in ("alpha", "sigma", "log_snr", "net_time"):
        assert_close(getattr(p, f)(t), getattr(base, f)(t))
    assert_close(p.time(base.log_snr(t)), base.time(base.log_snr(t)))
    assert (p.t_min, p.t_max, p.n_train) == (base.t_min, base.t_max, base.n_train)
    assert torch.equal(time_grid(p, 8), time_grid(base, 8))
    assert not p.gaussian and HeavyTailed(base, math.inf).gaussian and base.gaussian
    # the flow of the exact denoiser carries the law at t to the law at s: the prior becomes data
    x = p.noise(MIX.sample(1000, gen(3))[0], 0.8, generator=gen(4))
    d = FieldDenoiser(MIX, p)
    y = sample(d, Heun(), x, time_grid(p, 40, "log_snr", 0.8, max(p.t_min, 1e-3)), progress=False)
    near = torch.cdist(y, MIX.means).min(1)
    share = torch.bincount(near.indices, minlength=6).double() / len(y)
    assert (share - 1 / 6).abs().max() < 4 * (5 / 36 / 1000) ** 0.5  # 4 standard errors
    # mean square distance of a two-dimensional Gaussian: 2 * 0.25^2; a few stragglers by the median
    assert abs(near.values.median() / (0.25 * (2 * math.log(2)) ** 0.5) - 1) < 0.12


def test_at_infinity_it_is_the_base():
    p = HeavyTailed(VP(), math.inf)
    draw = lambda p: p.sample_noise((5, 2), generator=gen(3), dtype=torch.float64)
    assert torch.equal(draw(p), draw(VP())) and torch.isfinite(draw(p)).all()
    assert p.noise_std == 1 and p.sde(0.5) == VP().sde(0.5)


def test_copies_compare_and_pickle():
    p = HeavyTailed(VP(), 8)
    for q in (copy.deepcopy(p), pickle.loads(pickle.dumps(p)), HeavyTailed(VP(), 8.0)):
        assert q == p and hash(q) == hash(p)
    assert p != HeavyTailed(VP(), 9) and p != HeavyTailed(EDM(), 8) and p != VP()


def test_samples_do_not_depend_on_precision_or_on_neighbours():
    p = HeavyTailed(EDM(), 5.0)
    d = FieldDenoiser(MIX, p)
    x = p.noise(MIX.sample(50, gen(5))[0], 0.5, generator=gen(6))
    x0 = d(x, 0.5).x0
    assert_close(d(x.flip(0), 0.5).x0.flip(0), x0)
    assert_close(d(x[7:9], 0.5).x0, x0[7:9])
    single = d(x.float(), 0.5).x0
    assert single.dtype == torch.float32
    assert_close(single.double(), x0, rtol=1e-4, atol=1e-4)
    label = torch.arange(50) % 3
    for k in range(3):
        one = [d(x[i : i + 1], 0.5, label=k).x0[0] for i in range(k, 50, 3)]
        assert_close(d(x, 0.5, label=label).x0[k::3], torch.stack(one))
    # rows are cut where tables would be large: the same numbers
    big = FieldDenoiser(GaussianMixture(randn(3000, 2), scales=0.1), p)
    assert 2**18 // (64 * 3000) < 50
    assert_close(big(x, 0.5).x0[40:], big(x[40:], 0.5).x0)


@pytest.mark.parametrize("D", [1, 8.0, 1e6])
def test_points_are_weighted_by_the_kernel(D):
    p, pts, x = HeavyTailed(VP(), D), randn(20, 3), randn(7, 3, seed=1)
    m = GaussianMixture(pts, scales=0.0, weights=torch.arange(1, 21), labels=torch.arange(20) % 2)
    a, s = float(p.alpha(0.4)), float(p.sigma(0.4))
    log = torch.stack([log_kernel(x, a * y[None], s, D) for y in pts], 1)
    log = log + torch.arange(1, 21).double().log()
    assert_close(FieldDenoiser(m, p)(x, 0.4).x0, log.softmax(1) @ pts, rtol=1e-6, atol=1e-8)
    odd = log[:, 1::2].softmax(1) @ pts[1::2]
    assert_close(FieldDenoiser(m, p)(x, 0.4, label=1).x0, odd, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("D,tol", [(1, 2e-6), (8.0, 1e-9), (1e6, 1e-9), (1e9, 1e-9)])
def test_the_nodes_find_their_place(D, tol):
    p, x = HeavyTailed(EDM(), D), 10 ** torch.linspace(-3, 3, 40).double()[:, None] * randn(40, 2)
    for t in (0.05, 0.3, 0.9):
        few, many = (FieldDenoiser(MIX, p, nodes=k)(x, t).x0 for k in (64, 1024))
        assert_close(few, many, rtol=tol, atol=tol)


@pytest.mark.parametrize("D", [2, 16.0, 500])
def test_far_inputs_are_explained_by_large_noise(D):
    "For one Gaussian the posterior is of one number u: a fine rule by SciPy's quadrature."
    from scipy.integrate import quad

    m, p = GaussianMixture(torch.zeros(1, 3), scales=0.5), HeavyTailed(EDM(), D)
    s = float(p.sigma(0.3))
    var = lambda ell: 0.25 + s * s * math.exp(-ell)  # ell = log(u / D)

    def log(ell, r):
        v = var(ell)
        return D / 2 * (ell - math.expm1(ell)) - 1.5 * math.log(v) - r * r / (2 * v)

    for r in (0.01, 1.0, 30.0, 1000.0):
        ells = np.linspace(-40, 4, 4001)
        logs = [log(v, r) for v in ells]
        top, at = max(logs), ells[int(np.argmax(logs))]
        f = lambda ell, k, r=r, top=top: math.exp(log(ell, r) - top) * (0.25 / var(ell)) ** k
        a, b = (quad(f, at - 30, at + 5, args=(k,), limit=500, points=[at])[0] for k in (1, 0))
        x = torch.tensor([[r, 0, 0]], dtype=torch.float64)
        found = FieldDenoiser(m, p, nodes=128)(x, 0.3).x0[0, 0]
        assert abs(found / (r * a / b) - 1) < 1e-6


def test_without_noise_there_is_nothing_to_remove():
    p, x = HeavyTailed(Flow(), 5.0), randn(10, 2)
    assert_close(FieldDenoiser(MIX, p)(x, 0.0).x0, x)
    # between points a heavy tail never decides: weights distance^-(N + D), whatever the noise
    w = torch.cdist(x, MIX.means) ** -7.0
    want = w / w.sum(1, keepdim=True) @ MIX.means
    for t in (0.0, 1e-5):
        assert_close(FieldDenoiser(MIX.means, p)(x, t).x0, want, rtol=1e-5, atol=1e-5)
    assert_close(FieldDenoiser(MIX.means, p)(MIX.means, 0.0).x0, MIX.means)


def test_without_noise_every_point_is_its_own_answer():
    "However large its coordinates: no rounding of a distance of 0 makes the answer nan."
    pts = 100 * randn(40, 5)
    for D in (0.5, 5.0, 1e4):
        d = FieldDenoiser(pts, HeavyTailed(Flow(), D))
        for t in (0.0, 1e-12):
            assert_close(d((1 - t) * pts, t).x0, pts)


def test_the_limit_is_diffusion():
    x = randn(100, 2)
    for m in (MIX, GaussianMixture(MIX.means, covs=torch.diag(torch.tensor([0.2, 0.01])))):
        want = MixtureDenoiser(m, VP())(x, 0.4).x0
        gap = [
            (FieldDenoiser(m, HeavyTailed(VP(), D))(x, 0.4).x0 - want).abs().max().item()
            for D in (1e4, 1e5, 1e6)
        ]
        slope = np.polyfit(np.log([1e4, 1e5, 1e6]), np.log(gap), 1)[0]
        assert abs(slope + 1) < 0.05 and gap[-1] < 1e-4
        assert_close(FieldDenoiser(m, HeavyTailed(VP(), math.inf))(x, 0.4).x0, want)


class Squash(Denoiser):
    def __init__(self, process):
        super().__init__()
        self.process = process

    def forward(self, x, t):
        return Prediction.of(x, t, self.process, x0=x.tanh())


QUIET = [DDIM, Euler, Heun, lambda: DPMSolverPP(2), lambda: DPMSolverPP(3), lambda: DPMSingle(2)]
QUIET += [DEIS, lambda: PLMS(4), lambda: PNDM(4), lambda: InjectError(Heun(), 0.0)]
NOISY = [Ancestral, lambda: DDIM(eta=1.0), EulerMaruyama, lambda: DPMSolverPP(2, sde=True)]


@pytest.mark.parametrize("base", [EDM(), VP()], ids=repr)
def test_solvers(base):
    p, x = HeavyTailed(base, 4.0), randn(10, 3)
    grid = time_grid(base, 12, "log_snr", base.t_max, max(base.t_min, 1e-3))
    run = lambda p, s: sample(Squash(p), s, x, grid, progress=False, generator=gen())
    for make in QUIET:
        assert torch.equal(run(p, make()), run(base, make()))
    for make in NOISY:
        run(base, make())
        with pytest.raises(ValueError, match="HeavyTailed"):
            run(p, make())
        assert torch.equal(run(HeavyTailed(base, math.inf), make()), run(base, make()))


def test_solvers_converge_on_the_exact_flow():
    p = HeavyTailed(VP(), 6.0)
    d = FieldDenoiser(MIX, p)
    x = 0.9 * randn(20, 2)
    want = exact_flow(d, None, x, 0.9, 0.05, rtol=1e-10, atol=1e-11)
    err = []
    for n in (20, 40, 80):
        y = sample(d, Heun(), x, time_grid(p, n, "log_snr", 0.9, 0.05), progress=False)
        err.append((y - want).square().mean().sqrt().item())
    assert 1.7 < math.log2(err[1] / err[2]) < 2.4


def test_guidance_runs_and_the_score_is_refused():
    p = HeavyTailed(EDM(), 8.0)
    d, label = FieldDenoiser(MIX, p), torch.arange(12) % 3
    x = p.prior((12, 2), gen(), dtype=torch.float64)
    g = time_grid(p, 17)
    y = sample(cfg(d, 3.0), Heun(), x, g, cond={"label": label}, progress=False, denoise_last=True)
    near = torch.cdist(y, MIX.means).argmin(1)
    assert (MIX.labels[near] == label).all()
    with pytest.raises(ValueError, match="Gaussian"):
        d(x, 0.5).score  # noqa: B018 - asking is what is tested
    with pytest.raises(ValueError, match="SDE"):
        p.sde(0.5)


def test_the_loss_draws_student_noise():
    "A network that returns nothing has the mean square of its target: the noise's variance."
    p = HeavyTailed(VP(), 12.0)
    model = NetDenoiser(lambda x, t: torch.zeros_like(x), p)
    x0 = torch.zeros(40_000, 4)
    loss = model.loss(x0, generator=gen())
    # variance of a mean of 4 squares with one chi-square number: below 5 in all
    assert abs(loss - 12 / 10) < 4 * 5**0.5 / 200
    assert abs(p.noise_std - 1.2**0.5) < 1e-12 and HeavyTailed(VP(), 2).noise_std == math.inf


def test_a_trained_network_is_the_posterior_mean():
    "The best affine denoiser of one Gaussian: its slope is v / (v + sigma^2 D / (D - 2))."
    D, s = 10.0, 1.0
    p = HeavyTailed(EDM(), D)
    x0 = 0.5 * randn(200_000, 1)
    eps = p.sample_noise(x0.shape, generator=gen(1), dtype=torch.float64)
    x = p.noise(x0, p.time(-math.log(s)), eps)
    slope = (x * x0).mean() / x.square().mean()
    want = 0.25 / (0.25 + s * s * D / (D - 2))
    assert abs(slope / want - 1) < 0.03


def test_injected_errors():
    x, grid = randn(6, 2), time_grid(VP(), 5, "log_snr", 0.9, 0.05)
    z = randn(5, 6, 2, seed=9)
    d = Squash(VP())
    y = x
    for i, (t, s) in enumerate(zip(grid.tolist(), grid.tolist()[1:])):
        y = y + 0.2 * VP().sigma(t) * z[i]
        y = sample(d, DDIM(), y, torch.tensor([t, s], dtype=torch.float64), progress=False)
    run = lambda s, **k: sample(d, s, x, grid, progress=False, **k)
    assert_close(run(InjectError(DDIM(), 0.2, noise=z)), y)
    a, b, c = (run(InjectError(DDIM(), 0.2), generator=gen(k)) for k in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    # a multistep history goes on inside, and a resampled batch keeps its rows
    s = InjectError(DPMSolverPP(2), 0.0)
    assert torch.equal(run(s), run(DPMSolverPP(2)))
    r = s.begin(VP(), grid)
    r.step(d, x, *grid[:2].tolist())
    r.reindex(torch.tensor([3, 3]))
    assert len(r.solver.history[-1].x) == 2


def test_formulas():
    assert align(math.inf, 9, 2.0) == 6.0 and align(9, math.inf, 6.0) == 2.0
    assert abs(align(4, 100, 1.0) - 5) < 1e-12
    R = torch.tensor([0.0, 3.0])
    assert_close(inferred_sigma(R, 2.0, 9, 3).square(), torch.tensor([1.0, 1.75]))
    x, y = randn(20, 2, 3), randn(20, 2, 3, seed=1)
    law = stats.multivariate_t(df=4, shape=0.49 * np.eye(6))
    want = law.logpdf((x - y).flatten(1).numpy())
    assert_close(log_kernel(x, y, 0.7, 4), torch.from_numpy(want), rtol=1e-10, atol=1e-10)
    # the field of one charge points away from it, whatever D
    for D in (0.5, 1, 7.0):
        ex, er = poisson_field(x, 0.5, y[:1], D)
        away = torch.cat([(x - y[:1]).flatten(1), torch.full((20, 1), 0.5).double()], 1)
        away = away / away.norm(dim=1, keepdim=True)
        assert_close(torch.cat([ex.flatten(1), er[:, None]], 1), away)


def test_training_times():
    for base in (EDM(), VP()):
        p = HeavyTailed(base, 64)
        t = training_times(p, 5000, -0.5, 0.8, gen())
        assert_close((-p.log_snr(t)).mean().item(), -0.5, atol=4 * 0.8 / 5000**0.5, rtol=0)
        assert torch.equal(t, training_times(base, 5000, -0.5, 0.8, gen()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        training_times(HeavyTailed(EDM(), 2.01), 4)
        with pytest.raises(UserWarning, match="dof > 2"):
            training_times(HeavyTailed(EDM(), 2.0), 4)


@pytest.mark.parametrize("bad", [0, -1.0, math.nan, True, "8", None])
def test_bad_dof(bad):
    x = torch.zeros(2, 3)
    for f in (
        lambda: HeavyTailed(EDM(), bad),
        lambda: align(bad, 2, 1.0),
        lambda: align(2, bad, 1.0),
        lambda: log_kernel(x, x, 1.0, bad),
        lambda: poisson_field(x, 1.0, x, bad),
        lambda: perturb_radius(3, bad, 1.0, 5),
        lambda: inferred_sigma(x, 1.0, 3, bad),
    ):
        with pytest.raises(ValueError, match=r"positive number or inf, got"):
            f()


def test_bad_input():
    from diffkit.guidance.basics import MaskedProcess

    p, x = HeavyTailed(EDM(), 8), torch.zeros(2, 3)
    for f, kind, said in (
        (lambda: HeavyTailed(EDM, 8), TypeError, "base must be a Process"),
        (lambda: HeavyTailed(p, 8), ValueError, "Gaussian kernel"),
        (lambda: FieldDenoiser(x, MaskedProcess(4)), ValueError, "HeavyTailed or Gaussian"),
        (lambda: FieldDenoiser(x, p, nodes=15), ValueError, "got 15"),
        (lambda: FieldDenoiser(x, p, nodes=32.0), ValueError, "got 32.0"),
        (lambda: FieldDenoiser(x, p)(x.double(), -0.1), ValueError, "-0.1"),
        (lambda: FieldDenoiser(x, p)(x.double(), 0.5, label=1), ValueError, "no labels"),
        (lambda: log_kernel(x, x, -1.0, 8), ValueError, "-1.0"),
        (lambda: poisson_field(x, -1.0, x, 8), ValueError, "r=-1.0"),
        (lambda: training_times(p, 0), ValueError, "n=0"),
        (lambda: InjectError(Heun, 0.1), TypeError, "DDIM()"),
        (lambda: InjectError(Heun(), math.nan), ValueError, "nan"),
    ):
        with pytest.raises(kind, match=said.replace("(", r"\(").replace(")", r"\)")):
            f()
