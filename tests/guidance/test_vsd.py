"""VSD: SDS by hand and as published, exact limits on random input, composition with guidance,
interruption, and every error."""

import copy
import warnings

import pytest
import torch
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, Prediction, cfg, count_evals
from diffkit.core.nets import MLP, UNet
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, Process, time_grid
from diffkit.core.sampling import DDIM, Heun, sample
from diffkit.guidance.apg import apg
from diffkit.guidance.vsd import (
    ImageScene,
    LearnedScore,
    ParticleDenoiser,
    VoxelScene,
    score_distill,
    distill_loss,
    lora,
    score_distill_grad,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

F64 = torch.float64
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


def net(dtype=torch.float32, dim=2, **k):  # a small conditional network with a null label
    torch.manual_seed(0)
    d = NetDenoiser(MLP(dim, hidden=16, depth=1, classes=3, **k), VP(), "v", null={"label": 3})
    nn.init.normal_(d.net.head.weight, std=0.3)
    for block in d.net.blocks:  # zero at the start: else neither time nor label would act
        nn.init.normal_(block.fc2.weight, std=0.3, generator=rng())
    return d.to(dtype)


def quiet(prior, z, *a, seed=1, **k):
    return score_distill(prior, z, *a, generator=rng(seed), progress=False, **{"steps": 6, **k})


# --- the gradient


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.03, 0.97), st.integers(1, 4))
def test_one_particle_is_sds_on_every_process(process, seed, t, dim):
    prior = MixtureDenoiser(GaussianMixture(randn(5, dim, seed=seed), scales=0.3), process)
    x, e = randn(1, dim, seed=seed + 1), randn(1, dim, seed=seed + 2)
    sds, one = (
        score_distill_grad(prior, x, t, e),
        score_distill_grad(prior, x, t, e, ParticleDenoiser(x, process)),
    )
    # the particle's noise is had back as (x_t - alpha x) / sigma: a rounding of x_t counts 1 /
    # sigma times
    s = float(process.sigma(t))
    assert_close(sds, one, rtol=1e-6, atol=1e-10 * max(1, s * s) / min(1, s))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_zero_at_q_equals_p(process):
    prior = MixtureDenoiser(ring(), process)
    x, e, t = randn(8, 2), randn(8, 2, seed=1), torch.linspace(0.1, 0.9, 8, dtype=F64)
    assert score_distill_grad(prior, x, t, e, MixtureDenoiser(ring(), process)).abs().max() == 0


@pytest.mark.parametrize("weight", ["sigma2", "one", "alpha_sigma", lambda a, s: s**3])
def test_weights_and_the_published_formula(weight):
    """SDS as its official code writes it: w(t) (eps_uncond + w (eps_text - eps_uncond) -
    noise), with w(t) = 1 - alpha_bar."""
    d, x, e, t, y = (
        net(F64),
        randn(6, 2),
        randn(6, 2, seed=1),
        torch.linspace(0.05, 0.95, 6, dtype=F64),
        torch.arange(6) % 3,
    )
    a, s = (f(t)[:, None] for f in (VP().alpha, VP().sigma))
    xt = a * x + s * e
    c, u = d(xt, t, label=y).eps, d(xt, t, label=torch.full((6,), 3)).eps
    omega = (
        {"sigma2": 1 - a**2, "one": 1 + 0 * a, "alpha_sigma": a * s}.get(weight, s**3)
        if isinstance(weight, str)
        else s**3
    )
    assert_close(
        score_distill_grad(cfg(d, 100.0), x, t, e, weight=weight, cond={"label": y}),
        omega * (u + 100 * (c - u) - e),
    )


def test_batch_independence_and_times():
    d, x, e, y = net(F64), randn(5, 2), randn(5, 2, seed=1), torch.arange(5) % 3
    t = torch.linspace(0.1, 0.9, 5, dtype=F64)
    whole = score_distill_grad(cfg(d, 3.0), x, t, e, d, cond={"label": y}, q_cond={"label": y})
    for i in range(5):
        k = slice(i, i + 1)
        assert_close(
            score_distill_grad(
                cfg(d, 3.0),
                x[k],
                t[i].item(),
                e[k],
                d,
                cond={"label": y[k]},
                q_cond={"label": y[k]},
            ),
            whole[k],
        )


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_dtype_is_kept(dtype):
    x, e = randn(4, 2, dtype=dtype), randn(4, 2, seed=1, dtype=dtype)
    for q in (None, ParticleDenoiser(x), net(dtype)):
        for t in (0.3, torch.full((4,), 0.3, dtype=F64)):
            assert score_distill_grad(MixtureDenoiser(ring(), VP()), x, t, e, q).dtype == dtype


@pytest.mark.parametrize(
    "wrap",
    [
        lambda d: cfg(d, 3.0),
        lambda d: cfg(d, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
        lambda d: apg(d, 3.0, beta=-0.5),
        lambda d: cfg(apg(d, 3.0), 2.0),
    ],
)
def test_any_guidance_is_a_prior(wrap):
    """Times come in no order: a guidance with a memory starts afresh at every call, without a
    warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = quiet(
            wrap(net()),
            randn(6, 2, dtype=torch.float32),
            views=[{"label": torch.arange(6) % 3}],
            q="exact",
        )
    assert out.isfinite().all() and out.dtype == torch.float32


def test_prior_may_differentiate_inside():
    from diffkit.core.denoiser import classifier_guidance

    prior = classifier_guidance(MixtureDenoiser(ring(), VP()), lambda x, t: -x.square().sum(1), 1.0)
    assert quiet(prior, randn(3, 2), method="sds").isfinite().all()


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(2), Heun()], ids=repr)
def test_particles_and_learned_scores_are_denoisers(solver):
    """Sampling from the exact q of particles returns particles; both go inside guidance and
    under every solver."""
    z = randn(5, 2)
    out = sample(
        ParticleDenoiser(z), solver, randn(40, 2, seed=2), time_grid(VP(), 40), progress=False
    )
    assert torch.cdist(out, z).min(1)[0].median() < 0.05
    q = LearnedScore(net(), generator=rng())
    assert (
        sample(
            cfg(q, 2.0),
            solver,
            randn(4, 2, dtype=torch.float32),
            time_grid(VP(), 5),
            cond={"label": torch.arange(4) % 3},
            progress=False,
        )
        .isfinite()
        .all()
    )


# --- the loss and the loop


def test_loss_pulls_back_and_reaches_no_network():
    d, q, th = net(F64), net(F64), randn(4, 2).requires_grad_()
    x = torch.tanh(th @ randn(2, 2, seed=5))
    g = score_distill_grad(d, x, 0.4, randn(4, 2, seed=1), q)
    distill_loss(x, g).backward()
    assert_close(th.grad, torch.autograd.grad(torch.tanh(th @ randn(2, 2, seed=5)), th, g)[0])
    assert all(p.grad is None for m in (d, q) for p in m.parameters())


def test_gradient_of_one_particle_does_not_depend_on_their_number():
    z = randn(1, 2)
    kw = dict(method="sds", optimizer=torch.optim.SGD, lr=0.1, steps=1, seed=3)
    one, many = quiet(MixtureDenoiser(ring(), VP()), z, **kw), None
    moved = []

    def keep(i, p, grad):
        moved.append((p.clone(), grad))

    many = quiet(MixtureDenoiser(ring(), VP()), randn(7, 2), callback=keep, **kw)
    assert_close(many, randn(7, 2) - 0.1 * moved[0][1])
    assert one.shape == (1, 2)


@pytest.mark.parametrize("q", ["exact", "learned", "object"])
def test_same_seed_same_result_and_the_input_is_not_touched(q):
    z = randn(5, 2, dtype=torch.float32)
    keep = z.clone()

    def make():
        return LearnedScore(copy.deepcopy(net()), lr=1e-2, generator=rng(7)) if q == "object" else q

    runs = [quiet(net(), z, q=make(), views=[{"label": 1}]) for _ in range(2)]
    assert (
        torch.equal(*runs)
        and torch.equal(z, keep)
        and not runs[0].requires_grad
        and (runs[0] - z).abs().max() > 0
    )


@pytest.mark.parametrize("inner,warmup", [(1, 0), (3, 2)])
def test_a_learned_score_is_trained_in_every_step(inner, warmup):
    """The whole algorithm by hand: the particles' step, then `inner` training steps of q on the
    pictures before that step, every time; `warmup` rounds before the first."""
    z, prior, kw = randn(5, 2), net(F64), dict(lr=1e-2, steps=inner)
    q = LearnedScore(net(F64), generator=rng(7), **kw)
    made = quiet(prior, z, q=q, warmup=warmup, steps=5, anneal_at=0.4, views=[{"label": 1}])
    own, mine, g, gq = net(F64), z.clone(), rng(1), rng(7)
    learn, label = torch.optim.AdamW(own.parameters(), 1e-2), torch.full((5,), 1)

    def train(x):
        for _ in range(inner):
            t = VP().t_min + (1 - VP().t_min) * torch.rand(5, generator=gq, dtype=F64)
            e = torch.randn(5, 2, generator=gq, dtype=F64)
            learn.zero_grad()
            own.loss(x, t, eps=e, label=label).backward()
            learn.step()

    for _ in range(warmup):
        train(mine)
    mine.requires_grad_()
    adam = torch.optim.Adam([mine], 0.03)
    for i in range(5):
        x = mine.detach().clone()
        t = 0.02 + (0.96 if i < 2 else 0.48) * torch.rand(5, generator=g, dtype=F64)
        xt = VP().noise(x, t, torch.randn(5, 2, generator=g, dtype=F64))
        with torch.no_grad():
            gap = prior(xt, t, label=label).eps - own(xt, t, label=label).eps
        mine.grad = VP().sigma(t)[:, None] ** 2 * gap
        adam.step()
        train(x)
    assert_close(made, mine.detach(), rtol=1e-9, atol=1e-9)
    for a, b in zip(q.inner.parameters(), own.parameters()):
        assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("scale", [0.0, 0.4, 2.0])
def test_the_kernel_of_the_exact_score(scale):
    "Particles of width `scale`: a mixture of Gaussians of variance alpha^2 scale^2 + sigma^2."
    prior, z, seen = MixtureDenoiser(ring(), VP()), randn(6, 2), []
    quiet(prior, z, q="exact", scale=scale, steps=1, callback=lambda i, p, g: seen.append(g))
    g = rng(1)
    t = 0.02 + 0.96 * torch.rand(6, generator=g, dtype=F64)
    e = torch.randn(6, 2, generator=g, dtype=F64)
    a, s = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
    xt, var = a * z + s * e, (a * scale) ** 2 + s**2
    r = (-(xt[:, None] - a[:, None] * z).square().sum(2) / (2 * var)).softmax(1)
    score = -(xt - a * (r @ z)) / var
    assert_close(seen[0], s**2 * (prior(xt, t).eps + s * score), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("method", ["sds", "vsd"])
@pytest.mark.parametrize("own", [True, False])
def test_each_view_has_its_conditions(method, own):
    """The prior gets those of `views` and q those of `q_views`, or the prior's where none are
    given: some steps of gradient descent by hand."""
    prior, q, z, got, g = net(F64), net(F64), randn(5, 2), [], rng(1)
    nn.init.normal_(q.net.head.weight, std=0.5, generator=rng(3))
    views = [{"label": 0}, {"label": torch.tensor([2, 1, 0, 3, 2])}, {"label": 1}]
    q_views = [{"label": 2}, {"label": 0}, {"label": torch.tensor([0, 3, 1, 2, 0])}]
    kw = dict(q_views=q_views) if own else {}
    kw |= dict(steps=7, anneal_at=1.0, optimizer=torch.optim.SGD, lr=0.1)
    made = quiet(
        prior, z, method=method, q=q, views=views, callback=lambda i, p, d: got.append(d), **kw
    )
    row = lambda c: torch.as_tensor(c["label"]).expand(5)
    for i in range(7):
        t = 0.02 + 0.96 * torch.rand(5, generator=g, dtype=F64)
        e = torch.randn(5, 2, generator=g, dtype=F64)
        a, s = VP().alpha(t)[:, None], VP().sigma(t)[:, None]
        xt = a * z + s * e
        with torch.no_grad():
            other = q(xt, t, label=row((q_views if own else views)[i % 3])).eps
            gap = prior(xt, t, label=row(views[i % 3])).eps - (e if method == "sds" else other)
        assert_close(got[i], s**2 * gap, rtol=1e-9, atol=1e-10)
        z = z - 0.1 * got[i]
    assert_close(made, z)


@pytest.mark.parametrize("views", [1, 2, 3])
def test_a_refusal_is_explained_in_the_first_round_of_views_only(views):
    "Later, pictures and conditions have been taken before: the error stays as it is."

    class Fails(MixtureDenoiser):
        left = 0

        def forward(self, x, t, label=None):
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("out of memory")
            return super().forward(x, t)

    for good in range(views + 2):
        prior = Fails(ring(), VP())
        prior.left = good
        error = ValueError if good < views else RuntimeError
        with pytest.raises(error) as e:
            quiet(prior, randn(4, 2), method="sds", views=[{"label": k} for k in range(views)])
        if good < views:
            says = r"refuses pictures of shape \(4, 2\), torch.float64, .*: out of memory"
            assert e.match(says) and str(e.value.__cause__) == "out of memory"
        else:
            assert str(e.value) == "out of memory"


def test_scenes_start_as_faint_noise():
    for shape in ((3, 4), (1, 5, 5)):
        assert torch.equal(
            ImageScene().init(6, shape, rng(4)), 0.5 * torch.randn(6, *shape, generator=rng(4))
        )
    assert torch.equal(
        VoxelScene(3).init(6, rng(4)), -2 + 0.5 * torch.randn(6, 3, 3, 3, generator=rng(4))
    )


@pytest.mark.parametrize(
    "group,alone",
    [
        (None, False),
        ([3, 3, 3, 3], False),
        ([0, 0, 1, 1], False),
        ([1, 7, 7, 1], False),
        ([0, 0, 0, 7], True),
        ([5, 2, 2, 2], True),
        ([0, 1, 2, 3], True),
    ],
)
def test_a_particle_that_is_alone_in_its_group_is_told_so(group, alone):
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        quiet(MIX, randn(4, 2), q="exact", group=group, steps=1)
    assert ["is SDS" in str(w.message) for w in seen] == [True] * alone


def test_every_particle_has_a_time_of_its_own():
    "In the particles' step and in the training of a learned q, and anew in each step."
    sigmas, times = [], []
    q = LearnedScore(net(F64), generator=rng(7), steps=2)
    loss = q.inner.loss
    q.inner.loss = lambda x, t, **k: times.append(t) or loss(x, t, **k)
    seen = dict(weight=lambda a, s: sigmas.append(s) or s * s, views=[{"label": 1}])
    quiet(net(F64), randn(9, 2), q=q, steps=4, **seen)
    assert len(sigmas) == 4 and len(times) == 8
    for v, n in ((torch.cat(sigmas), 36), (torch.cat(times), 72)):
        assert len(v.flatten().unique()) == n


def test_groups_are_separate_runs():
    "With the same noises, two groups in one run move as each by itself."
    prior, z = MixtureDenoiser(ring(), VP()), randn(6, 2)
    g = torch.tensor([0, 0, 0, 1, 1, 1])
    grads = {}
    quiet(
        prior, z, q="exact", group=g, steps=1, callback=lambda i, p, grad: grads.update(both=grad)
    )
    gen = rng(1)
    t = 0.02 + 0.96 * torch.rand(6, generator=gen, dtype=F64)
    e = torch.randn(6, 2, generator=gen, dtype=F64)
    for k in (slice(0, 3), slice(3, 6)):
        assert_close(
            grads["both"][k], score_distill_grad(prior, z[k], t[k], e[k], ParticleDenoiser(z[k]))
        )


def test_evaluations():
    d = net()
    kw = dict(views=[{"label": 1}], steps=5)
    for prior, method, q, rows in (
        (d, "sds", "exact", 1),
        (cfg(d, 3.0), "sds", "exact", 2),
        (cfg(d, 3.0), "vsd", "exact", 2),
    ):
        with count_evals(prior) as n:
            quiet(prior, randn(4, 2, dtype=torch.float32), method=method, q=q, **kw)
        assert n.rows == 4 * rows * 5


def test_views_take_turns_and_annealing_bounds_the_times():
    seen, sigmas = [], []

    def render(p, view):
        seen.append(view)
        return p * (1 + view)

    quiet(
        MixtureDenoiser(ring(), VP()),
        randn(50, 2),
        render,
        method="sds",
        views=3,
        steps=20,
        anneal_at=0.5,
        t_max_late=0.3,
        weight=lambda a, s: sigmas.append(s.max()) or s * s,
    )
    assert seen[1:7] == [0, 1, 2, 0, 1, 2]
    assert max(sigmas[:10]) > VP().sigma(0.8) and max(sigmas[10:]) < VP().sigma(0.3)


def test_cooldown_ends_at_a_small_step():
    last = []
    quiet(
        MixtureDenoiser(ring(), VP()),
        randn(5, 2),
        method="sds",
        steps=40,
        cooldown=0.5,
        callback=lambda i, p, g: last.append(p.clone()),
    )
    steps = [float((b - a).abs().max()) for a, b in zip(last, last[1:])]
    assert steps[-1] < 0.1 * max(steps[:15])


def test_module_scenes_and_a_frozen_parameter():
    class Scene(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(randn(4, 2))
            self.b = nn.Parameter(torch.ones(4, 2, dtype=F64), requires_grad=False)

    s = Scene()
    a0 = s.a.detach().clone()
    assert quiet(MixtureDenoiser(ring(), VP()), s, lambda m, v: m.a * m.b, q="exact") is s
    assert (s.a - a0).abs().max() > 0 and torch.equal(s.b, torch.ones(4, 2, dtype=F64))


def test_interrupted():
    def stop(i, p, grad):
        if i == 3:
            raise KeyboardInterrupt

    z = randn(4, 2)
    with pytest.warns(UserWarning, match="step 3 of 6"):
        out = quiet(MixtureDenoiser(ring(), VP()), z, method="sds", callback=stop)
    assert_close(
        out,
        quiet(MixtureDenoiser(ring(), VP()), z, method="sds", steps=3, anneal_at=1.0),
        rtol=0,
        atol=0.05,
    )
    assert (out - z).abs().max() > 0.03


def test_works_inside_no_grad():
    with torch.no_grad():
        out = quiet(net(), randn(4, 2, dtype=torch.float32), views=[{"label": 0}])
    assert out.isfinite().all()


def test_right_shares_where_sds_has_not():
    prior, z = (
        MixtureDenoiser(
            GaussianMixture(
                [[2.0, 2], [-2, 2], [-2, -2], [2, -2]], scales=0.3, weights=[0.4, 0.3, 0.2, 0.1]
            ),
            VP(),
        ),
        1.5 * randn(48, 2),
    )
    share = lambda x: (
        torch.bincount(torch.cdist(x, prior.mixture.means).argmin(1), minlength=4) / len(x)
    )
    got = {
        m: share(quiet(prior, z, method=m, q="exact", steps=500, anneal_at=0.5))
        for m in ("sds", "vsd")
    }
    tv = {m: 0.5 * (p - prior.mixture.weights).abs().sum() for m, p in got.items()}
    # 48 independent samples have about .09
    assert (got["vsd"] > 0).all() and tv["vsd"] < 0.1 and tv["sds"] > 0.2


# --- learned scores and scenes


def test_lora_on_a_unet():
    d = NetDenoiser(UNet(width=8, levels=(1, 2), classes=3), VP(), "v", null={"label": 3})
    nn.init.normal_(next(m for m in reversed(list(d.modules())) if isinstance(m, nn.Conv2d)).weight)
    low, x, y = (
        lora(copy.deepcopy(d), 2, rng()),
        randn(3, 1, 8, 8, dtype=torch.float32),
        torch.arange(3),
    )
    assert_close(low(x, 0.5, label=y).eps, d(x, 0.5, label=y).eps)
    q = LearnedScore(low, lr=1e-2, steps=3, generator=rng())
    frozen = {k: p.clone() for k, p in low.named_parameters() if not p.requires_grad}
    assert (
        q.update(x, label=y) > 0
        and (q(x, 0.5, label=y).eps - d(x, 0.5, label=y).eps).abs().max() > 1e-4
    )
    assert all(torch.equal(dict(low.named_parameters())[k], v) for k, v in frozen.items())
    twin = copy.deepcopy(q)
    assert_close(twin(x, 0.5, label=y).eps, q(x, 0.5, label=y).eps)
    with pytest.raises(ValueError, match="already"):
        lora(low)


def test_lora_update_has_the_rank():
    m = lora(nn.Sequential(nn.Linear(6, 5), nn.Conv2d(2, 4, 3)).double(), 2, rng())
    for layer in m:
        p = layer.parametrizations.weight
        nn.init.normal_(p[0].up)
        assert torch.linalg.matrix_rank((layer.weight - p.original).flatten(1)) == 2


def test_learned_score_takes_a_plain_network():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3, 2)

        def forward(self, x, t):
            return self.l(torch.cat([x, t[:, None]], 1))

    q = LearnedScore(Plain(), VP())
    assert isinstance(q.update(randn(4, 2, dtype=torch.float32)), float)
    with pytest.raises(FloatingPointError, match="denoising loss"):
        q.update(torch.full((4, 2), torch.inf))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.01, 5), st.integers(0, 1000))
def test_voxels(size, n, kappa, seed):
    s, z = VoxelScene(size, kappa), randn(n, size, size, size, seed=seed)
    for view in range(3):
        x = s(z, view)
        assert x.shape == (n, 1, size, size) and (x.abs() <= 1).all()
        assert (s(z + 1, view) >= x).all()  # more matter, darker shadow
        assert_close(s(z.flip(1 + view), view), x)  # a shadow does not know what is in front
    assert s.init(2, rng()).shape == (2, size, size, size) and ImageScene().init(
        2, (3, 4)
    ).shape == (2, 3, 4)


# --- bad input

MIX = MixtureDenoiser(ring(), VP())


@pytest.mark.parametrize(
    "kwargs,error,says",
    [
        (dict(method="ism"), ValueError, "'ism'"),
        (dict(steps=0), ValueError, "steps"),
        (dict(steps=2.0), ValueError, "steps"),
        (dict(t_range=(0.0, 0.9)), ValueError, "t_range"),
        (dict(t_range=(0.5, 1.0)), ValueError, "t_range"),
        (dict(t_range=(0.9, 0.2)), ValueError, "t_range"),
        (dict(t_max_late=1.0), ValueError, "t_max_late"),
        (dict(anneal_at=2.0), ValueError, "anneal_at"),
        (dict(cooldown=-1.0), ValueError, "cooldown"),
        (dict(lr=0.0), ValueError, "lr"),
        (dict(q="exat"), ValueError, "'exat'"),
        (dict(q=None), ValueError, "None"),
        (dict(q="learned"), ValueError, "copies the prior's network"),
        (dict(views=0), ValueError, "at least one"),
        (dict(views=[3]), TypeError, "dict"),
        (dict(views=2, q_views=[{}]), ValueError, "same views"),
        (dict(views=[{"label": torch.arange(3)}]), ValueError, r"\(4\), got shape \(3,\)"),
        (dict(group=[0, 1]), ValueError, "group"),
        (dict(warmup=3), ValueError, "warmup"),
        (dict(weight="sigma"), ValueError, "'sigma'"),
        (dict(q=MixtureDenoiser(ring(), VE())), ValueError, "one process"),
    ],
)
def test_bad_settings(kwargs, error, says):
    with pytest.raises(error, match=says):
        quiet(MIX, randn(4, 2), **{"q": "exact", **kwargs})


def test_bad_particles_and_renderers():
    with pytest.raises(TypeError, match="NetDenoiser"):
        quiet(nn.Linear(2, 2), randn(4, 2))
    with pytest.raises(TypeError, match="floating-point"):
        quiet(MIX, torch.zeros(4, 2, dtype=torch.long), q="exact")
    with pytest.raises(TypeError, match="list"):
        quiet(MIX, [[1.0, 2.0]], q="exact")
    with pytest.raises(ValueError, match="no parameter"):
        quiet(MIX, nn.ReLU(), lambda m, v: randn(2, 2), q="exact")
    with pytest.raises(ValueError, match="one picture a particle"):
        quiet(MIX, randn(0, 2), q="exact")
    with pytest.raises(ValueError, match="4 particles"):
        quiet(MIX, randn(4, 2), lambda p, v: p[:2], q="exact")
    with pytest.raises(ValueError, match="one picture a particle"):
        quiet(MIX, randn(4, 2), lambda p, v: p.sum(1), q="exact")
    with pytest.raises(ValueError, match="no gradient"):
        quiet(MIX, randn(4, 2), lambda p, v: p.detach(), q="exact")
    with pytest.raises(ValueError, match=r"\(4, 3\)"):
        quiet(MIX, randn(4, 3), q="exact")
    with pytest.raises(ValueError, match=r"float64"):
        quiet(net(), randn(4, 2), q="exact")
    with pytest.raises(ValueError, match="label"):
        quiet(cfg(net(), 7.5), randn(4, 2, dtype=torch.float32))
    quiet(
        cfg(net(), 1.0), randn(4, 2, dtype=torch.float32), steps=1
    )  # at scale 1 nothing is guided
    for group in (None, [0, 0, 1]):
        with pytest.warns(UserWarning, match="is SDS"):
            quiet(MIX, randn(3 if group else 1, 2), q="exact", group=group, steps=1)


def test_not_finite_says_when():
    class Hole(MixtureDenoiser):
        def forward(self, x, t, label=None):
            return Prediction.of(x, t, self.process, x0=torch.where(t[:, None] > 0.5, torch.nan, x))

    with pytest.raises(
        FloatingPointError,
        match=r"not finite at step \d+, view 0, t=0\.[5-9]\d*; its picture is finite",
    ):
        quiet(Hole(ring()), randn(4, 2), method="sds", steps=50, anneal_at=1.0)
    with pytest.raises(FloatingPointError, match="not finite, either"):
        quiet(MIX, randn(4, 2), lambda p, v: p / 0.0, method="sds")


def test_bad_gradients_and_scores():
    class Heavy(Process):
        gaussian = False

    x = randn(3, 2)
    with pytest.raises(ValueError, match="Gaussian kernel"):
        score_distill_grad(NetDenoiser(lambda x, t: x, Heavy()), x, 0.5, x)
    with pytest.raises(ValueError, match="one process"):
        score_distill_grad(MIX, x, 0.5, x, ParticleDenoiser(x, Flow()))
    with pytest.raises(TypeError, match="q must be"):
        score_distill_grad(MIX, x, 0.5, x, x)
    with pytest.raises(ValueError, match="eps"):
        score_distill_grad(MIX, x, 0.5, x[:2])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        score_distill_grad(MIX, x, 1.5, x)
    with pytest.raises(ValueError, match="one shape"):
        distill_loss(x, x[:2])
    with pytest.raises(ValueError, match="rank"):
        lora(nn.Linear(2, 2), 0)
    with pytest.raises(ValueError, match="no linear"):
        lora(nn.ReLU())
    with pytest.raises(ValueError, match="requires a gradient"):
        LearnedScore(nn.ReLU(), VP())
    with pytest.raises(TypeError, match="no loss"):
        LearnedScore(MIX)
    with pytest.raises(TypeError, match="process"):
        LearnedScore(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="steps"):
        LearnedScore(net(), steps=0)
    with pytest.raises(ValueError, match="size"):
        VoxelScene(0)
    with pytest.raises(ValueError, match="axis"):
        VoxelScene(2)(randn(1, 2, 2, 2), 3)
    with pytest.raises(ValueError, match="particles"):
        VoxelScene(2)(randn(1, 2, 2, 3))
