"""Forward models: exact posteriors by Bayes' rule and in two steps, the perfect network against
projected mixtures, the loss by hand, the rivals where they are exact, and every error."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import Counter, MixtureDenoiser, NetDenoiser, cfg, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, Heun, sample
from diffkit.core.zoo import under
from diffkit.models.forward_models import (
    DPS,
    ExactSignal,
    ForwardDenoiser,
    PiGDM,
    exact_forward,
    exact_posterior,
    linear_view,
    min_snr,
    sample_signal,
)
from diffkit.models.hallucination import watch
from diffkit.solvers.dpm_solver_pp import DPMSolverPP

F64 = torch.float64
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]
THREE = GaussianMixture([[1.0, 0.5], [-1.0, 0.5], [0.0, -1.0]], scales=0.15, labels=[0, 1, 1])
cosine = Cosine()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def mixtures():
    full = randn(3, 4, 4, seed=1)
    return {
        "isotropic": GaussianMixture(randn(3, 4), scales=[0.2, 0.5, 0.9], weights=[1, 2, 5]),
        "diagonal": GaussianMixture(randn(3, 4), scales=[[0.1, 0.3, 0.5, 0.7]] * 3),
        "full": GaussianMixture(randn(3, 2, 2), covs=full @ full.mT / 9, labels=[0, 1, 1]),
    }


# --- the exact posterior


@pytest.mark.parametrize("name", mixtures())
def test_posterior_is_bayes_rule(name):
    m, A, y, noise = mixtures()[name], randn(2, 4, seed=2), randn(2, seed=3), 0.3
    post = exact_posterior(m, A, y, noise)
    x = randn(20, *m.event, seed=4)
    like = -(x.flatten(1) @ A.T - y).square().sum(1) / (2 * noise**2)
    gap = m.log_prob(x) + like - post.log_prob(x)
    assert_close(gap, gap[:1].expand(20), rtol=0, atol=1e-8)  # one number: the evidence
    assert post.event == m.event and (post.labels is None) == (m.labels is None)


@pytest.mark.parametrize("name", mixtures())
def test_posterior_in_two_steps_and_in_limits(name):
    m, A, y = mixtures()[name], randn(3, 4, seed=2), randn(3, seed=3)
    x = randn(20, *m.event, seed=4)
    # one after the other is both at once
    first = exact_posterior(m, A[:1], y[:1], 0.4)
    twice = exact_posterior(first, A[1:], y[1:], 0.4)
    assert_close(twice.log_prob(x), exact_posterior(m, A, y, 0.4).log_prob(x))
    # an observation of noise says nothing
    assert_close(exact_posterior(m, A, y, 1e6).log_prob(x), m.log_prob(x), rtol=0, atol=1e-6)
    # one without noise is kept, and leaves no spread along what it saw
    sure = exact_posterior(m, A, y)
    S, _ = sure.sample(50, rng(5))
    assert_close(S.flatten(1) @ A.T, y.expand(50, 3), rtol=0, atol=1e-6)
    assert (A @ sure.mean_cov()[1] @ A.T).abs().max() < 1e-12
    # all coordinates without noise: a point
    point, _ = exact_posterior(m, torch.eye(4), m.means[0]).sample(3, rng(6))
    assert_close(point.flatten(1), m.means[:1].expand(3, 4), rtol=0, atol=1e-6)


# --- the perfect network


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_without_context_it_is_the_projected_law(process):
    model, A = exact_forward(THREE, process), torch.tensor([[0.6, 0.8]], dtype=F64)
    along = MixtureDenoiser(GaussianMixture(THREE.means @ A.T, scales=0.15), process)
    x = randn(12, 1)
    for t in (0.1, 0.9, torch.linspace(0.1, 0.9, 12, dtype=F64)):
        p = model(x, t, view=A.expand(12, 1, 2))
        assert_close(p.x0, along(x, t).x0, rtol=1e-8, atol=1e-8)
        assert_close(linear_view(p.extra["signal"], A.expand(12, 1, 2)), p.x0)


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_with_context_it_is_the_projected_posterior(noise):
    m = mixtures()["full"]
    A, B = randn(2, 4, seed=7), randn(1, 4, seed=8)
    model, x = exact_forward(m, cosine, noise), randn(5, 2, seed=9)
    values = randn(5, 1, seed=10)
    views = dict(view=A.expand(5, 2, 4), context=values, context_view=B.expand(5, 1, 4))
    for t in (0.2, 0.8):
        got = model(x, t, **views)
        for i in range(5):
            post = exact_posterior(m, B, values[i], noise)
            means = post.means @ A.T
            v = torch.einsum("kde,ke,kfe->kdf", post.basis, post.vars, post.basis)
            law = GaussianMixture(means, covs=A @ v @ A.T, weights=post.weights)
            want = MixtureDenoiser(law, cosine)(x[i : i + 1], t).x0[0]
            assert_close(got.x0[i], want, rtol=1e-6, atol=1e-6)
    # at t = 1 nothing is known but the context
    mean = torch.stack([exact_posterior(m, B, v, noise).mean_cov()[0] for v in values])
    assert_close(model.signal(x, 1.0, **views).flatten(1), mean, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("start", [0, 1])
def test_samples_have_the_posterior_mean_and_covariance(start):
    bell = GaussianMixture([[0.3, -0.2]], covs=[[[0.5, 0.2], [0.2, 0.4]]])
    see = torch.eye(2, dtype=F64)[:, None]
    n, y = 4000, torch.tensor([0.7], dtype=F64)
    cond = dict(view=see[1 - start], context=y[None], context_view=see[start])
    cond = {k: v.expand(n, *v.shape[-2:]) if v.ndim > 2 else v for k, v in cond.items()}
    cond = dict(
        view=see[1 - start].expand(n, 1, 2),
        context=y.expand(n, 1),
        context_view=see[start].expand(n, 1, 2),
    )
    x = randn(n, 1, seed=11)
    S, o = sample_signal(
        exact_forward(bell, cosine), DDIM(), x, time_grid(cosine, 60, end=0.0), cond=cond,
        progress=False,
    )  # fmt: skip
    mean, cov = exact_posterior(bell, see[start], y).mean_cov()
    se = (cov.diagonal() / n).sqrt()
    assert ((S.mean(0) - mean).abs() < 4 * se + 1e-9).all()
    # 60 steps of order one on a Gaussian: 3 percent, and four standard errors of a deviation
    assert (
        abs(S[:, 1 - start].std() / cov[1 - start, 1 - start].sqrt() - 1)
        < 0.03 + 4 / (2 * n) ** 0.5
    )
    assert_close(S[:, start], y.expand(n), rtol=0, atol=1e-9)
    assert_close(linear_view(S, cond["view"]), o, rtol=0, atol=1e-12)  # sigma = 0 at the end


# --- the wrapper


def small(seed=0, dim=2):
    torch.manual_seed(seed)
    layer = nn.Linear(dim + 1, dim).double()
    return layer, lambda x, t, **_: layer(torch.cat([x, t[:, None].to(x)], 1))


def test_identity_is_a_plain_network():
    layer, net = small()
    plain = NetDenoiser(net, cosine, "x0", null={"label": 0})
    inside = ForwardDenoiser(net, lambda s, view: s, cosine, null={"label": 0})
    x, label = randn(32, 2), torch.arange(32) % 3
    assert inside(x, 0.3, view=None).x0.equal(plain(x, 0.3).x0)
    for weight in (None, min_snr):
        for rate in (0.0, 0.1):
            how = dict(weight=weight, null_rate=rate, label=label)
            a = inside.loss(x, generator=rng(1), view=None, **how)
            assert_close(a, plain.loss(x, generator=rng(1), **how))
    a.backward()
    assert layer.weight.grad.abs().max() > 0


def test_the_loss_by_hand():
    _, net = small()
    model = ForwardDenoiser(net, linear_view, cosine)
    S, A, B = randn(8, 2), randn(8, 2, 2, seed=1), randn(8, 1, 2, seed=2)
    o, n, eps = linear_view(S, A), linear_view(S, B), randn(8, 2, seed=3)
    t = torch.linspace(0.05, 0.95, 8, dtype=F64)
    x = cosine.noise(o, t, eps)
    s = net(x, t)
    w = ((cosine.alpha(t) / cosine.sigma(t)) ** 2).clamp(max=5.0)
    assert (w == 5).any() and (w < 5).any()
    target = (linear_view(s, A) - o).square().mean(1)
    other = (linear_view(s, B) - n).square().mean(1)
    got = model.loss(o, t, eps=eps, view=A, novel=n, novel_view=B, novel_weight=0.5)
    assert_close(got, (w * (target + 0.5 * other)).mean())
    assert_close(model.loss(o, t, None, eps=eps, view=A), target.mean())
    assert_close(min_snr(cosine.log_snr(t)), w)
    assert min_snr(torch.tensor([9.0]), gamma=2.0).item() == 2.0


def test_gradients_pass_through_the_forward_model_only():
    S, A = randn(6, 2).requires_grad_(), randn(6, 1, 2, seed=1)
    curve = lambda s, v: linear_view(s.sin() * s, v)
    model = ForwardDenoiser(lambda x, t, view: S, curve, cosine)
    o, t, eps = randn(6, 1, seed=2), torch.full((6,), 0.4, dtype=F64), randn(6, 1, seed=3)
    f = lambda: model.loss(o, t, eps=eps, view=A)
    (grad,) = torch.autograd.grad(f(), S)
    for i, j in ((0, 0), (3, 1)):
        with torch.no_grad():
            values = []
            for h in (1e-5, -1e-5):
                S[i, j] += h
                values.append(f().item())
                S[i, j] -= h
        assert math.isclose(grad[i, j], (values[0] - values[1]) / 2e-5, rel_tol=1e-5, abs_tol=1e-8)
    # linear, target only: nothing along the null space; with another view there is something
    model = ForwardDenoiser(lambda x, t, view: S, linear_view, cosine)
    free = torch.stack([-A[:, 0, 1], A[:, 0, 0]], 1)
    (grad,) = torch.autograd.grad(model.loss(o, view=A), S)
    assert grad.abs().max() > 1e-3 and (grad * free).sum(1).abs().max() < 1e-12
    (grad,) = torch.autograd.grad(model.loss(o, view=A, novel=o, novel_view=A.roll(1, 2)), S)
    assert (grad * free).sum(1).abs().max() > 1e-3


def test_training_never_needs_a_signal():
    # one Gaussian and a linear network: the loss of the perfect network is the smaller one
    bell = GaussianMixture([[0.5, -0.5]], scales=0.5)
    ideal = exact_forward(bell, cosine)
    S = bell.sample(2000, rng(1))[0]
    A = torch.nn.functional.normalize(randn(2000, 3, 2, seed=2), dim=2)
    seen = dict(view=A[:, :1], novel=linear_view(S, A[:, 1:2]), novel_view=A[:, 1:2])
    o = linear_view(S, A[:, :1])
    best = ideal.loss(o, generator=rng(3), **seen)
    for scale, shift in ((0.9, 0.0), (1.1, 0.0), (1.0, 0.1)):
        off = ForwardDenoiser(
            lambda *a, k=scale, b=shift, **c: k * ideal.net(*a, **c) + b, linear_view, cosine,
            time_input=lambda t: t,
        )  # fmt: skip
        assert off.loss(o, generator=rng(3), **seen) > best + 1e-3


# --- wrappers and sampling


class Labelled(nn.Module):
    def forward(self, x, t, view, label):
        return torch.cat([x, x + label[:, None]], 1)


def labelled(process=cosine):
    return ForwardDenoiser(Labelled(), linear_view, process, null={"label": 9})


def test_wrappers_keep_the_signal():
    x, view, label = randn(6, 1), randn(6, 1, 2, seed=1), torch.arange(6)
    cond, model = dict(view=view, label=label), labelled()
    want = model(x, 0.5, **cond).extra["signal"]
    for wrapped in (
        cfg(model, 1.0),
        cfg(model, 3.0),
        Counter(model),
        watch(model),
        under(model, VP()),
    ):
        t = 0.5 if wrapped.process == cosine else float(VP().time(cosine.log_snr(0.5)))
        k = float(wrapped.process.alpha(t) / cosine.alpha(0.5))
        got = wrapped(k * x, t, **cond)
        assert_close(got.extra["signal"], want)
    # guidance moves the observation, and leaves the signal
    three = cfg(model, 3.0)(x, 0.5, **cond).x0
    off = model(x, 0.5, view=view, label=torch.full((6,), 9)).x0
    assert_close(three, 3 * model(x, 0.5, **cond).x0 - 2 * off)
    grid, one = time_grid(cosine, 10), cfg(model, 1.0)
    pair = [sample_signal(m, DDIM(), x, grid, cond=cond, progress=False) for m in (model, one)]
    assert pair[0].signal.equal(pair[1].signal)


@pytest.mark.parametrize("solver", [DDIM(), Heun(), DPMSolverPP(2), Euler(), Ancestral()], ids=repr)
def test_the_signal_casts_the_last_prediction(solver):
    x, view, seen = randn(6, 1), randn(6, 1, 2, seed=1), []
    keep = lambda i, t, x, p: seen.append(p)
    grid = time_grid(cosine, 8, end=0.01)
    options = dict(cond=dict(view=view, label=torch.arange(6)), progress=False)
    S, o = sample_signal(labelled(), solver, x, grid, callback=keep, generator=rng(1), **options)
    assert len(seen) == 8
    assert_close(linear_view(S, view), seen[-1].x0)
    assert o.equal(sample(labelled(), solver, x, grid, generator=rng(1), **options))
    S, o = sample_signal(
        labelled(), solver, x, grid, generator=rng(1), denoise_last=True, **options
    )
    assert_close(linear_view(S, view), o)
    assert_close(
        o, sample(labelled(), solver, x, grid, generator=rng(1), denoise_last=True, **options)
    )


def test_other_shapes_of_signal():
    # a picture behind a strip; conditions with one row for all
    strip = lambda s, view: s.gather(3, view[:, None, None, None].expand(-1, 1, 8, 1)).squeeze(3)
    net = lambda x, t, view: x[..., None].expand(-1, 1, 8, 8) * torch.arange(8)
    model = ForwardDenoiser(net, strip, Flow())
    x = torch.randn(5, 1, 8, generator=rng())
    S, o = sample_signal(
        model, DDIM(), x, time_grid(Flow(), 4), cond={"view": torch.tensor([1])}, progress=False
    )
    assert S.shape == (5, 1, 8, 8) and o.shape == x.shape and S.dtype == x.dtype


# --- the rivals


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("rows", [1, 2])
def test_pigdm_is_exact_for_one_round_gaussian(process, rows):
    bell = GaussianMixture([[0.3, -0.2]], scales=0.7)
    A, y = randn(rows, 2, seed=1), randn(rows, seed=2)
    want = MixtureDenoiser(exact_posterior(bell, A, y, 0.1), process)
    got = PiGDM(MixtureDenoiser(bell, process), linear_view, 0.1, 0.7)
    x, told = randn(6, 2), dict(observed=y.expand(6, rows), view=A.expand(6, rows, 2))
    for t in (0.2, 0.9, torch.linspace(0.2, 0.9, 6, dtype=F64)):
        # the same linear systems, solved in another order
        assert_close(got(x, t, **told).x0, want(x, t).x0, rtol=1e-8, atol=1e-8)
    # rows of length one at right angles: no Jacobian needed
    Q = torch.linalg.qr(randn(2, 2, seed=3))[0][:rows]
    told = dict(observed=y.expand(6, rows), view=Q.expand(6, rows, 2))
    fast = PiGDM(MixtureDenoiser(bell, process), linear_view, 0.1, 0.7, orthonormal=True)
    assert_close(fast(x, 0.4, **told).x0, got(x, 0.4, **told).x0)


def test_against_deepinv():
    # -grad of PiGDMDataFidelity and DPSDataFidelity, deepinv 0.5.0, in float32: alpha = 1
    A = torch.tensor([[1.2, 0.5], [0.3, -0.2]], dtype=F64)
    x = torch.tensor([[0.3, -0.4], [1.1, 0.2]], dtype=F64)
    told = dict(observed=torch.full((2, 2), 0.3, dtype=F64), view=A.expand(2, 2, 2))
    process = VE(0.01, 50.0)
    prior = MixtureDenoiser(GaussianMixture(THREE.means, scales=0.15), process)
    peers = {
        0.5: (
            [[1.2422488, 1.3278880], [-0.5180981, -0.7601880]],
            [[1.0652834, 1.3105108], [-0.1611839, -0.1319358]],
        ),
        2.0: (
            [[0.0866495, -0.0882115], [0.0488962, -0.0901191]],
            [[0.1710378, 0.0357469], [0.0944384, 0.0028564]],
        ),
    }
    for sigma, (pi, dps) in peers.items():
        t = float(process.time(-math.log(sigma)))
        plain = prior(x, t).score
        got = PiGDM(prior, linear_view, 0.1)(x, t, **told).score - plain
        # conjugate gradients and float32 there: four digits
        assert_close(got, torch.tensor(pi, dtype=F64), rtol=2e-4, atol=1e-5)
        got = DPS(prior, linear_view)(x, t, **told).score - plain
        assert_close(got, torch.tensor(dps, dtype=F64), rtol=1e-5, atol=1e-6)


def test_pigdm_of_a_curved_forward_model_uses_its_jacobian():
    prior, x = MixtureDenoiser(THREE, cosine), randn(4, 2)
    curve = lambda s, view: torch.stack([s[:, 0] * s[:, 1], s[:, 0].sin()], 1)
    y, t, n, tau = randn(4, 2, seed=1), 0.4, 0.2, 0.5
    got = PiGDM(prior, curve, n, tau)(x, t, observed=y).x0
    a, s = float(cosine.alpha(t)), float(cosine.sigma(t))
    r2 = (tau * s) ** 2 / ((a * tau) ** 2 + s * s)
    for i in range(4):
        f = lambda z: prior(z[None], t).x0[0]
        z = f(x[i])
        J = torch.autograd.functional.jacobian(lambda s: curve(s[None], None)[0], z)
        D = torch.autograd.functional.jacobian(f, x[i])
        M = r2 * J @ J.T + n * n * torch.eye(2, dtype=F64)
        push = D.T @ J.T @ torch.linalg.solve(M, y[i] - curve(z[None], None)[0])
        assert_close(got[i], z + s * s / a * push, rtol=1e-7, atol=1e-9)


def test_dps_is_the_gradient_of_the_distance():
    prior, x = MixtureDenoiser(THREE, cosine), randn(5, 2)
    far = lambda s: s.reshape(-1, 1, 1, 2).square()  # of another shape than the signal
    y, h = randn(5, 1, 1, 2, seed=1), torch.tensor([0.0, 1e-5], dtype=F64)
    model = DPS(prior, lambda s, view: far(s), scale=torch.arange(1.0, 6.0))
    got = model(x, 0.4, observed=y).score - prior(x, 0.4).score
    f = lambda x: (y - far(prior(x, 0.4).x0)).flatten(1).norm(dim=1)
    want = -torch.arange(1, 6) * (f(x + h) - f(x - h)) / 2e-5
    assert_close(got[:, 1], want, rtol=1e-5, atol=1e-7)
    # at the observation itself there is no direction, and no nan
    exactly = far(prior(x, 0.4).x0)
    assert model(x, 0.4, observed=exactly).x0.equal(prior(x, 0.4).x0)


@pytest.mark.parametrize(
    "make", [DPS, lambda d, f, **k: PiGDM(d, f, 0.1, **k)], ids=["DPS", "PiGDM"]
)
def test_rivals_as_guidance(make):
    prior, x = MixtureDenoiser(THREE, cosine), randn(6, 2)
    told = dict(observed=torch.full((6, 1), 0.2, dtype=F64), view=randn(1, 1, 2).expand(6, 1, 2))
    for off in (make(prior, linear_view, scale=0.0), make(prior, linear_view, interval=(0.0, 0.3))):
        assert off(x, 0.5, **told).x0.equal(prior(x, 0.5).x0)
    model = make(prior, linear_view)
    later = make(prior, linear_view, scale=lambda t: 2.0 * t)
    move = lambda m, t: m(x, t, **told).x0 - prior(x, t).x0
    assert_close(move(later, 0.25), move(model, 0.25) / 2)
    # no signal at the start, with one time or one a sample
    for t in (1.0, torch.tensor([1.0, 0.5] * 3, dtype=F64)):
        for process in (Flow(), cosine):
            at = make(MixtureDenoiser(THREE, process), linear_view)(x, t, **told).x0
            assert at.isfinite().all()
    # one evaluation a call; under no_grad and inference mode; labels pass through
    with count_evals(model) as count, torch.inference_mode():
        a = model(x, 0.5, label=torch.zeros(6, dtype=torch.long), **told)
    assert count.calls == 1 and not a.x0.requires_grad
    # gradients pass, where they are asked for
    z = x.clone().requires_grad_()
    f = lambda z: model(z, 0.5, **told).x0.square().sum()
    (grad,) = torch.autograd.grad(f(z), z)
    step = torch.zeros_like(x)
    step[2, 1] = 1e-5
    want = (f(x + step) - f(x - step)).item() / 2e-5
    assert math.isclose(grad[2, 1], want, rel_tol=1e-4)
    # float32 in, float32 out; a whole trajectory comes nearer to the observation than the prior
    mild = make(prior, linear_view, scale=5.0 if make is DPS else 1.0)
    start, told = (
        randn(200, 2).float(),
        {k: v[:1].expand(200, *v.shape[1:]) for k, v in told.items()},
    )
    S = sample(mild, DDIM(), start, time_grid(cosine, 30), cond=told, progress=False)
    free = sample(prior, DDIM(), start, time_grid(cosine, 30), progress=False)
    miss = lambda s: (linear_view(s.double(), told["view"]) - 0.2).abs().mean()
    assert S.dtype == torch.float32 and miss(S) < 0.5 * miss(free)


# --- errors


def _net(x, t, view=None):
    return x


BAD = {
    "A must be": lambda: exact_posterior(THREE, torch.ones(1, 3), torch.ones(1)),
    "value": lambda: exact_posterior(THREE, torch.ones(1, 2), torch.ones(2)),
    "noise must be a finite number, 0 or more, got -0.1": lambda: exact_posterior(
        THREE, torch.ones(1, 2), torch.ones(1), -0.1
    ),
    "give noise > 0": lambda: exact_posterior(THREE, torch.ones(2, 2), torch.ones(2)),
    "view must be one matrix a sample": lambda: linear_view(randn(3, 2), randn(3, 1, 4)),
    "process must be a Process": lambda: ForwardDenoiser(_net, linear_view, "cosine"),
    "forward_model must be a function": lambda: ForwardDenoiser(_net, None, cosine),
    "forward_model must be a func": lambda: DPS(MixtureDenoiser(THREE), 3),
    r"shape of x, \(4, 1\), got \(4, 2\)": lambda: ForwardDenoiser(
        lambda x, t, view: randn(4, 2), lambda s, view: s, cosine
    )(randn(4, 1), 0.5, view=None),
    "got str": lambda: ForwardDenoiser(_net, lambda s, view: "o", cosine)(
        randn(4, 1), 0.5, view=None
    ),
    "belong together": lambda: labelled().loss(
        randn(4, 1), view=randn(4, 1, 2), novel=randn(4, 1), label=torch.ones(4)
    ),
    "novel_weight belong": lambda: labelled().loss(
        randn(4, 1), view=randn(4, 1, 2), novel_weight=2.0, label=torch.ones(4)
    ),
    "novel_weight must be": lambda: labelled().loss(
        randn(4, 1), view=randn(4, 1, 2), novel=randn(4, 1), novel_view=randn(4, 1, 2),
        novel_weight=-1.0, label=torch.ones(4),
    ),
    "must be differentiable": lambda: ForwardDenoiser(
        small(dim=1)[1], lambda s, view: s.detach(), cosine
    ).loss(randn(4, 1), view=None),
    "be differentiable": lambda: DPS(MixtureDenoiser(THREE), lambda s, view: s.detach())(
        randn(4, 2), 0.5, observed=randn(4, 2)
    ),
    "observed must have the shape": lambda: DPS(MixtureDenoiser(THREE), lambda s, view: s)(
        randn(4, 2), 0.5, observed=randn(4, 1)
    ),
    "keep a signal": lambda: sample_signal(
        MixtureDenoiser(THREE), DDIM(), randn(4, 2), time_grid(VP(), 3), progress=False
    ),
    "required keyword-only argument: 'view'": lambda: labelled()(randn(4, 1), 0.5),
    "required keyword-only argument: 'observed'": lambda: DPS(MixtureDenoiser(THREE), _net)(
        randn(4, 2), 0.5
    ),
    "stps": lambda: sample_signal(
        labelled(), DDIM(), randn(4, 1), time_grid(cosine, 3), stps=3, cond={"view": None}
    ),
    "is called as net": lambda: labelled()(randn(4, 1), 0.5, view=None, labl=torch.ones(4)),
    "noise must be a finite number, positive, got 0": lambda: PiGDM(
        MixtureDenoiser(THREE), linear_view, 0
    ),
    "prior_std must be": lambda: PiGDM(MixtureDenoiser(THREE), linear_view, 0.1, True),
    "scale must be": lambda: DPS(MixtureDenoiser(THREE), linear_view, scale=float("nan")),
    "context and context_view": lambda: exact_forward(THREE, cosine)(
        randn(4, 1), 0.5, view=randn(4, 1, 2), context=randn(4, 1)
    ),
    "noise must be a finite": lambda: ExactSignal(THREE, cosine, float("inf")),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_errors_name_the_argument(message):
    with pytest.raises((ValueError, TypeError), match=message):
        BAD[message]()
