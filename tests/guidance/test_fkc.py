"""Feynman-Kac correctors: the Fokker-Planck residual on random input, resampling against
independent implementations, composition, refusals."""

import math
import random
import warnings
from importlib.util import find_spec

import pytest
import torch
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import (
    MixtureDenoiser,
    NetDenoiser,
    Prediction,
    cfg,
    contrast,
    count_evals,
)
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, Heun, sample
from diffkit.guidance.apg import apg
from diffkit.guidance.fkc import (
    FKC,
    anneal,
    drift,
    ess,
    fkc_prior,
    flatten_parts,
    geometric,
    log_z_prior,
    product,
    systematic,
    tilt,
    weight_rate,
    weight_terms,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

F64 = torch.float64
MIX = GaussianMixture(ring(6).means, scales=0.25, labels=[0, 0, 1, 1, 2, 2])
PROCESSES = [VP(), Cosine(), Discrete(), VE(0.1, 5.0), EDM(0.1, 5.0), Flow()]


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def exact(process=None):
    return MixtureDenoiser(MIX, process or VP())


# --- the mathematics


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([p for p in PROCESSES if not isinstance(p, Discrete)]),
    st.lists(st.floats(-2, 3), min_size=1, max_size=3),
    st.floats(0.3, 3),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_fokker_planck_residual(process, gammas, zeta, matched, rewarded, seed):
    """The weighted SDE solves the equation of the unnormalised target, with the densities known
    and all derivatives by autograd."""
    if sum(gammas) < 0.2:
        gammas = [*gammas, 0.5 - sum(gammas)]
    g = gen(seed)
    D = 2
    models = [
        GaussianMixture(torch.randn(3, D, generator=g), scales=0.3 + torch.rand(3, generator=g))
        for _ in gammas
    ]
    match = (
        (torch.randn(D, generator=g, dtype=F64), 0.3 + torch.rand((), generator=g).item())
        if matched
        else None
    )
    reward = lambda x: torch.cos(x[:, 0]) + x[:, 0] * x[:, 1]
    den = geometric([MixtureDenoiser(m, process) for m in models], gammas)
    if rewarded:
        den = tilt(den, reward, lambda t: (1 - t) ** 2)
    t0 = 0.2 + 0.6 * torch.rand((), generator=g, dtype=F64).item()
    t = torch.tensor(t0, dtype=F64, requires_grad=True)
    x = (
        process.alpha(t0) * torch.randn(1, D, generator=g, dtype=F64)
        + process.sigma(t0) * torch.randn(1, D, generator=g, dtype=F64)
    ).requires_grad_()
    log_p = sum(
        w * m.log_prob(x, process.alpha(t), process.sigma(t)) for w, m in zip(gammas, models)
    ) + ((1 - t) ** 2 * reward(x) if rewarded else 0.0)
    dt, s = torch.autograd.grad(log_p.sum(), (t, x), create_graph=True)
    div = lambda v: sum(
        torch.autograd.grad(v[0, k], x, retain_graph=True)[0][0, k] for k in range(D)
    )
    c, g2 = process.sde(t0)
    speed = g2 / (2 * process.sigma(t0) ** 2)
    p = den(x, t0)
    terms = weight_terms(p, match)
    b = drift(p, zeta, match) * speed - c * x
    rate = (
        terms.lam * speed
        - terms.log_alpha * c
        + sum(m * r * 2 * (1 - t0) for m, _, r in terms.rewards)
    )
    size = (
        1
        + abs(dt.item())
        + abs(div(b).item())
        + abs((b * s).sum().item())
        + zeta**2 * g2.item() * (abs(div(s).item()) + s.square().sum().item())
    )
    # rounding of the largest term
    assert (
        abs(
            (
                -dt + div(b) + (b * s).sum() - zeta**2 * g2 / 2 * (div(s) + s.square().sum()) - rate
            ).item()
        )
        < 1e-10 * size
    )


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(-3, 3), min_size=1, max_size=4), st.integers(1, 5), st.integers(0, 10**6))
def test_weight_rate_is_the_difference_of_squares(gammas, batch, seed):
    eps = [randn(batch, 3, seed=seed + i) for i in range(len(gammas))]
    x = randn(batch, 3, seed=seed + 9)
    ps = [Prediction.of(x, 0.5, VP(), eps=e) for e in eps]
    mean = sum(w * e for w, e in zip(gammas, eps))
    p = Prediction.of(x, 0.5, VP(), eps=mean, parts=tuple(zip(gammas, ps)))
    assert_close(
        weight_rate(p),
        mean.square().sum(1) - sum(w * e.square().sum(1) for w, e in zip(gammas, eps)),
        rtol=1e-9,
        atol=1e-9,
    )
    assert weight_rate(p).dtype == F64


def test_rate_times_per_sample():
    p = anneal(exact(), 2.0)(randn(3, 2), torch.tensor([0.2, 0.5, 0.8], dtype=F64))
    for match in (None, (0.0, 0.7)):
        terms, b = weight_terms(p, match), drift(p, 1.0, match)
        for i, t in enumerate((0.2, 0.5, 0.8)):
            q = anneal(exact(), 2.0)(randn(3, 2)[i : i + 1], t)
            assert_close(weight_terms(q, match).lam, terms.lam[i : i + 1])
            assert_close(drift(q, 1.0, match), b[i : i + 1])


def test_differentiable():
    x = randn(4, 2).requires_grad_()
    p = tilt(anneal(cfg(exact(), 2.0), 1.5), lambda v: v.square().sum(1))(
        x, 0.4, label=torch.tensor([0, 1, 2, 0])
    )
    assert torch.isfinite(torch.autograd.grad(weight_rate(p).sum() + p.x0.sum(), x)[0]).all()
    with torch.no_grad():
        assert not tilt(exact(), lambda v: v.sum(1))(x, 0.4).eps.requires_grad


# --- resampling


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-30, 5), min_size=1, max_size=40), st.floats(0, 0.999999), st.integers(1, 60)
)
def test_systematic_against_a_loop(lw, u, n):
    lw = torch.tensor(lw, dtype=F64)
    w = lw.softmax(0)
    idx = systematic(lw, n, u=torch.tensor([u], dtype=F64))
    count = torch.bincount(idx, minlength=len(lw))
    assert ((count >= (n * w).floor() - 1e-6) & (count <= (n * w).ceil() + 1e-6)).all() or (
        n * w - (n * w).round()
    ).abs().min() < 1e-9
    j, c = 0, w[0].item()
    for i in range(n):
        while (u + i) / n >= c and j < len(w) - 1:
            j += 1
            c += w[j].item()
        assert abs(int(idx[i]) - j) <= (0 if abs((u + i) / n - c) > 1e-12 else 1)


@pytest.mark.skipif(not find_spec("particles"), reason="the package particles is not installed")
def test_systematic_as_in_particles():
    import numpy as np
    from particles import resampling

    W = torch.rand(50, generator=gen(), dtype=F64)
    W = W / W.sum()
    for u in (0.01, 0.5, 0.99):
        assert (
            resampling.inverse_cdf((u + np.arange(50)) / 50, W.numpy())
            == systematic(W.log(), u=u).numpy()
        ).all()


def test_ess_and_shapes():
    assert_close(ess(torch.zeros(3, 5)), torch.full((3,), 5.0))
    assert systematic(torch.zeros(2, 3, 4), 7, generator=gen()).shape == (2, 3, 7)
    assert systematic(torch.tensor([-math.inf, 0.0, -math.inf]), 9, generator=gen()).eq(1).all()


@pytest.mark.parametrize("resample", ["systematic", "multinomial", "birth_death"])
def test_groups_are_independent_targets(resample):
    """Unequal, interleaved groups: each resamples within itself, and one group's weights don't
    touch another's."""
    labels = torch.tensor(random.Random(0).sample([0] * 40 + [1] * 9 + [2] * 1, 50))
    den, s = cfg(exact(), 3.0), FKC(groups=labels, resample=resample, ess=1.0)
    sample(
        den,
        s,
        randn(50, 2),
        time_grid(VP(), 10, "log_snr"),
        cond={"label": labels},
        generator=gen(),
        progress=False,
    )
    assert (
        torch.equal(labels[s.ancestors], labels)
        and s.log_z.shape == (3,)
        and s.ess_history.shape == (10, 3)
    )
    assert (s.ess_history <= torch.tensor([40, 9, 1]) + 1e-6).all() and (s.log_weight == 0).all()
    assert s.ancestors[labels == 2] == (labels == 2).nonzero()[0]


def test_importance_weights_do_not_depend_on_grouping():
    den, labels, x = cfg(exact(), 3.0), torch.arange(30) % 3, randn(30, 2)
    logs = []
    for groups in (None, 3, labels):
        s = FKC(groups=groups, resample=None)
        sample(
            den,
            s,
            x,
            time_grid(VP(), 10, "log_snr"),
            cond={"label": labels},
            generator=gen(),
            progress=False,
        )
        logs.append(s.log_weight)
    assert torch.equal(logs[0], logs[1]) and torch.equal(logs[0], logs[2])


def test_final_false_leaves_weights_and_the_same_evidence():
    den, out = anneal(exact(), 1.3), []
    for final in (True, False):
        s = FKC(ess=0.01, final=final)
        sample(
            den,
            s,
            fkc_prior(VP(), (400, 2), 1.3, gen(), dtype=F64),
            time_grid(VP(), 20, "log_snr"),
            generator=gen(),
            progress=False,
        )
        out.append(s)
    assert (out[0].log_weight == 0).all() and out[1].log_weight.std() > 0
    assert_close(out[0].log_z, out[1].log_z)


def test_reindex_from_outside():
    s = FKC(resample=None)
    x, grid, den = (
        randn(6, 2),
        time_grid(VP(), 5, "log_snr"),
        tilt(anneal(exact(), 2.0), lambda v: v.sum(1)),
    )
    s.start(VP(), grid, gen())
    x = s.step(den, x, *grid[:2].tolist())
    x = s.step(den, x, *grid[1:3].tolist())
    idx, w = torch.tensor([0, 0, 3, 3, 5, 5]), s.log_weight.clone()
    s.reindex(idx)
    assert torch.equal(s.log_weight, w[idx]) and torch.equal(s.ancestors, idx)
    x = s.step(den, x[idx], *grid[2:4].tolist())
    assert torch.isfinite(x).all()


# --- limits and laws


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_one_diffusion_is_ddim(process):
    den, grid, x = (
        exact(process),
        time_grid(process, 9, "log_snr", process.t_max),
        randn(20, 2) * process.sigma(process.t_max),
    )
    s = FKC()
    assert_close(
        sample(geometric([den], [1.0]), s, x, grid, generator=gen(), progress=False),
        sample(den, DDIM(eta=1.0), x, grid, generator=gen(), progress=False),
        rtol=1e-9,
        atol=1e-9,
    )
    assert (s.log_weight == 0).all()


@pytest.mark.parametrize("process", [VP(), VE(0.01, 20.0), Flow()], ids=lambda p: type(p).__name__)
def test_matched_gaussian_has_equal_weights(process):
    one = MixtureDenoiser(GaussianMixture([[1.0, -0.5]], scales=0.6), process)
    for den, total in ((anneal(one, 3.0), 3.0), (product(one, one, beta=0.3), 0.6)):
        s = FKC(match=(torch.tensor([1.0, -0.5]), 0.6), groups=2)
        sample(
            den,
            s,
            fkc_prior(process, (100, 2), total, gen(), dtype=F64),
            time_grid(process, 30, "log_snr", process.t_max),
            generator=gen(),
            progress=False,
        )
        assert s.ess_history.min() > 49.99


def test_evidence_of_an_annealed_gaussian():
    one, v, beta = MixtureDenoiser(GaussianMixture([[1.0]], scales=0.3**0.5), VP()), 0.3, 2.0
    s = FKC(2.0, groups=8, std=0.5, match=(0.0, 1.0))
    sample(
        anneal(one, beta),
        s,
        fkc_prior(VP(), (4000, 1), beta, gen(), dtype=F64),
        time_grid(VP(), 150, "log_snr"),
        generator=gen(1),
        progress=False,
    )
    want = 0.5 * ((1 - beta) * math.log(2 * math.pi * v) - math.log(beta))
    z = s.log_z + log_z_prior(VP(), 1, beta)
    assert abs(z.mean().item() - want) < 3 * z.std().item() / 8**0.5 + 0.02  # plus the step error


def test_proportions_of_two_modes():
    "q^3 of two bumps: 80 % on the narrow one; plain mixing gets 54 %."
    q = GaussianMixture([[-3.0], [3.0]], scales=[0.5, 1.0])
    x, grid, den = (
        fkc_prior(VP(), (8000, 1), 3.0, gen(), dtype=F64),
        time_grid(VP(), 200, "log_snr"),
        anneal(MixtureDenoiser(q, VP()), 3.0),
    )
    left = lambda s: (
        (sample(den, s, x, grid, generator=gen(1), progress=False).view(8, -1) < 0).double().mean(1)
    )
    on, off = (
        left(FKC(2.0, groups=8, match=(0.0, 3.1), std=0.3)),
        left(FKC(resample=None, active=(0.0, 0.0))),
    )
    assert abs(on.mean() - 0.8) < 0.04 and abs(off.mean() - 0.54) < 0.03


def test_weights_without_clip_and_active():
    den, grid, x = anneal(exact(), 2.0), time_grid(VP(), 10, "log_snr"), randn(64, 2) / 2**0.5
    run = lambda **k: (
        (s := FKC(resample=None, **k), sample(den, s, x, grid, generator=gen(), progress=False))[
            0
        ].log_weight
    )
    full = run()
    assert_close(run(clip=1e9), full)
    assert (run(active=(0.0, 0.0)) == 0).all()
    assert run(clip=0.01).std() < full.std() and not torch.equal(run(active=(0.0, 0.5)), full)


# --- the start


def from_start(den, x, process, t, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grid = time_grid(process, 2, "log_snr", t)
        sample(den, FKC(**kw), x, grid, generator=gen(), progress=False)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("shape,big", [((600, 2), 3.0), ((8, 2), 9.0), ((3, 1, 4, 4), 9.0)])
def test_a_start_that_is_not_the_mixtures_is_named(process, shape, big):
    kde = MixtureDenoiser(GaussianMixture.kde(randn(20, *shape[1:]), 0.4), process)
    t, start = process.t_max, lambda total: fkc_prior(process, shape, total, gen(1), dtype=F64)
    for den in (
        anneal(kde, big),
        product(kde, kde, kde, beta=big / 3),
        geometric([kde, kde], [big + 1, -1.0]),
        tilt(anneal(kde, big), lambda x: 30 * x.flatten(1).sum(1), lambda t: 1.0),
    ):
        from_start(den, start(big), process, t)
        said = rf"FKC: x at the start, t=.* too far out .* fkc_prior\(process, shape, {big:g}\)$"
        with pytest.raises(UserWarning, match=said):
            from_start(den, start(1.0), process, t)
    from_start(geometric([kde, kde], [3.0, -2.0]), start(1.0), process, t)  # guidance
    from_start(anneal(kde, 1 / big), start(1 / big), process, t)
    if shape[0] == 600:  # enough numbers to say so
        with pytest.raises(UserWarning, match="too far in .*: 0.3[0-9]+, must be 1"):
            from_start(anneal(kde, 1 / big), start(1.0), process, t)


def test_what_the_start_should_have_been_is_said():
    with pytest.raises(UserWarning, match=r"take x = fkc_prior\(process, shape, 3\)$"):
        from_start(anneal(exact(), 3.0), randn(50, 2), VP(), 1.0)
    # of several groups' own sums, the first
    sums = torch.tensor([2.0, 4.0]).repeat_interleave(25)
    each = anneal(exact(), sums)
    with pytest.raises(UserWarning, match=r"fkc_prior\(process, shape, 2\)$"):
        from_start(each, randn(50, 2), VP(), 1.0, groups=2)
    from_start(each, randn(50, 2) / sums[:, None] ** 0.5, VP(), 1.0, groups=2)
    # a prior of another time than the grid's
    with pytest.raises(UserWarning, match="too far out"):
        from_start(anneal(exact(VE()), 1.0), 50 * randn(50, 2), VE(), 0.7)


def test_a_later_start_must_be_a_sample():
    wide = MixtureDenoiser(GaussianMixture(torch.zeros(1, 2), scales=2.0), VP())
    t = 0.5
    a, s = float(VP().alpha(t)), float(VP().sigma(t))
    for total in (1.0, 3.0):
        den, exactly = anneal(wide, total), ((4 * a * a + s * s) / total) ** 0.5 * randn(4000, 2)
        from_start(den, exactly, VP(), t)
        with pytest.raises(
            UserWarning, match="too far in .* drawn from the mixture itself; fkc_pri"
        ):
            from_start(den, fkc_prior(VP(), (4000, 2), total, gen(), dtype=F64, t=t), VP(), t)
    few = [randn(20, 2, seed=k) * (4 * a * a + s * s) ** 0.5 for k in range(100)]
    for x in few:  # by chance one is wider than the law
        from_start(anneal(wide, 1.0), x, VP(), t)
    with pytest.raises(UserWarning, match="take x = fkc_prior"):  # late, but noise is all there is
        from_start(anneal(exact(), 9.0), randn(8, 2), VP(), 0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of a plain model that is only moved, nothing is asked
        grid = time_grid(VP(), 2, "log_snr")
        sample(wide, FKC(missing="ignore"), 3 * randn(50, 2), grid, progress=False)


@pytest.mark.parametrize("n,dim", [(1, 1), (2, 1), (4, 2), (16, 2), (400, 1), (2, 64)])
def test_no_false_alarm_for_right_starts(n, dim):
    den = anneal(MixtureDenoiser(GaussianMixture(torch.zeros(1, dim), scales=1.0), VP()), 2.0)
    alarms = 0
    for seed in range(100):
        try:
            from_start(den, fkc_prior(VP(), (n, dim), 2.0, gen(seed), dtype=F64), VP(), 1.0)
        except UserWarning:
            alarms += 1
    assert alarms <= 1
    x = torch.full((500, dim), 0.75**0.5, dtype=F64)  # 1.5 instead of 1; but copies of one
    from_start(den, x, VP(), 1.0)


# --- composition


def test_nested_parts_flatten():
    den = cfg(product(exact(), anneal(exact(), 0.5), beta=2.0), 3.0)
    p = den(randn(3, 2), 0.4, label=torch.tensor([0, 1, 2]))
    every = flatten_parts(p)
    assert sorted(w for w, _ in every) == [-4.0, -2.0, 3.0, 6.0]
    assert_close(sum(w * q.score for w, q in every), p.score)


@pytest.mark.parametrize(
    "solver",
    [
        DDIM(),
        DPMSolverPP(2),
        Heun(),
        Euler(),
        Ancestral(),
        FKC(groups=3),
        FKC(2.0, resample="birth_death", groups=3),
    ],
    ids=repr,
)
@pytest.mark.parametrize("process", [VP(), VE(), Flow()], ids=lambda p: type(p).__name__)
def test_wrappers_under_solvers(solver, process):
    y = torch.arange(30) // 10
    for den in (
        cfg(anneal(exact(process), 1.2), 1.5),
        anneal(cfg(exact(process), 1.5), 0.8),
        product(cfg(exact(process), 2.0), exact(process), beta=0.6),
        tilt(cfg(exact(process), 2.0), lambda v: -0.1 * v.square().sum(1)),
        contrast(anneal(exact(process), 1.1), anneal(exact(process), 0.8), 0.5),
    ):
        for dtype in (F64, torch.float32):
            x = sample(
                den,
                solver,
                (randn(30, 2) * process.sigma(process.t_max)).to(dtype),
                time_grid(process, 12, "log_snr", process.t_max, max(process.t_min, 1e-3)),
                cond={"label": y},
                generator=gen(),
                progress=False,
            )
            assert x.dtype == dtype and torch.isfinite(x).all()


def test_float32_weights_are_double():
    net = NetDenoiser(
        lambda x, t, label: torch.sin(3 * x + label[:, None]), VP(), "v", null={"label": 0}
    )
    s = FKC(groups=2)
    x = sample(
        cfg(net, 4.0),
        s,
        randn(20, 2, dtype=torch.float32),
        time_grid(VP(), 6, "log_snr"),
        cond={"label": torch.arange(20) // 10 + 1},
        generator=gen(),
        progress=False,
    )
    assert x.dtype == torch.float32 and s.log_weight.dtype == F64


def test_same_seed_same_result_and_no_global_noise():
    den = anneal(exact(), 2.0)
    run = lambda: sample(
        den,
        FKC(groups=2),
        randn(20, 2),
        time_grid(VP(), 8, "log_snr"),
        generator=gen(3),
        progress=False,
    )
    a = run()
    torch.manual_seed(99)
    b = run()
    assert torch.equal(a, b)


def test_a_grid_may_end_at_zero_and_have_one_step():
    for steps in (1, 2, 7):
        s = FKC(2.0, match=(0.0, 1.0))
        x = sample(
            anneal(exact(Flow()), 2.0),
            s,
            randn(20, 2),
            time_grid(Flow(), steps, "uniform", 0.9, 0.0),
            generator=gen(),
            progress=False,
        )
        assert torch.isfinite(x).all() and torch.isfinite(s.log_z).all()


def test_per_sample_exponents_across_groups():
    beta = torch.tensor([0.5, 0.5, 0.5, 2.0, 2.0, 2.0])
    s = FKC(groups=2)
    x = sample(
        anneal(exact(), beta),
        s,
        randn(6, 2),
        time_grid(VP(), 8, "log_snr"),
        generator=gen(),
        progress=False,
    )
    assert torch.isfinite(x).all()
    with pytest.raises(ValueError, match="same exponents"):
        sample(
            anneal(exact(), beta), FKC(), randn(6, 2), time_grid(VP(), 8, "log_snr"), progress=False
        )


def test_batch_of_one_and_images():
    s = FKC()
    assert sample(
        anneal(exact(), 2.0), s, randn(1, 2), time_grid(VP(), 5, "log_snr"), progress=False
    ).shape == (1, 2)
    assert s.ess_history.eq(1).all()
    kde = MixtureDenoiser(GaussianMixture.kde(randn(20, 1, 4, 4), 0.4), VP())
    assert sample(
        product(kde, kde),
        FKC(groups=2, match=(torch.zeros(1, 4, 4), 1.0)),
        randn(8, 1, 4, 4) / 2**0.5,
        time_grid(VP(), 5, "log_snr"),
        progress=False,
    ).shape == (8, 1, 4, 4)


def test_cost_is_that_of_guidance():
    den = cfg(exact(), 3.0)
    with count_evals(den) as n:
        sample(
            den,
            FKC(groups=2),
            randn(10, 2),
            time_grid(VP(), 7, "log_snr"),
            cond={"label": torch.arange(10) // 5},
            progress=False,
        )
    assert n.rows == 2 * 10 * 7


def test_tilt_moves_a_gaussian():
    one = MixtureDenoiser(GaussianMixture([[0.0]], scales=1.0), VP())
    s = FKC(groups=4, std=1.0)
    x = sample(
        tilt(one, lambda v: v[:, 0]),
        s,
        randn(4000, 1),
        time_grid(VP(), 60, "log_snr"),
        generator=gen(1),
        progress=False,
    )
    assert abs(x.mean() - 1) < 0.1 and abs(s.log_z.mean() - 0.5) < 0.06


# --- refusals


def run(den, s=None, x=None, **cond):
    return sample(
        den,
        s or FKC(),
        randn(12, 2) if x is None else x,
        time_grid(VP(), 5, "log_snr"),
        cond=cond,
        progress=False,
    )


@pytest.mark.parametrize(
    "make,match",
    [
        (lambda: FKC(0.0), "zeta must be positive"),
        (lambda: FKC(-1.0), "zeta"),
        (lambda: FKC(None), "zeta"),
        (lambda: FKC(math.nan), "zeta"),
        (lambda: FKC(resample="best"), "'best'"),
        (lambda: FKC(ess=1.5), "ess"),
        (lambda: FKC(groups=0), "groups"),
        (lambda: FKC(groups=True), "groups"),
        (lambda: FKC(groups=torch.zeros(3)), "groups"),
        (lambda: FKC(match=1.0), "match"),
        (lambda: FKC(match=(0.0, 0.0)), "match"),
        (lambda: FKC(active=(0.6, 0.5)), "active"),
        (lambda: FKC(clip=-1.0), "clip"),
        (lambda: FKC(std=-0.1), "std"),
        (lambda: FKC(missing="zero"), "missing"),
        (lambda: geometric([exact()], [1.0, 1.0]), "one exponent"),
        (lambda: geometric([], []), "0 denoisers"),
        (lambda: geometric([exact()], [1.0], [{}, {}]), "2 conds"),
        (lambda: product(exact(), exact(VE())), "VE"),
        (lambda: anneal(exact(), -1.0), "positive sum"),
        (lambda: anneal(exact(), math.inf), "inf"),
        (lambda: anneal(exact(), True), "True"),
        (lambda: tilt(exact(), "r"), "str"),
        (lambda: tilt(exact(), lambda x: x.sum(1), math.nan), "nan"),
        (lambda: systematic(torch.tensor([math.nan, 0.0])), "nan"),
        (lambda: systematic(torch.zeros(3), True), "True"),
        (lambda: fkc_prior(VP(), (2, 1), 0.0), "positive"),
        (lambda: log_z_prior(VP(), 2, [1.0, -1.0]), "positive"),
    ],
)
def test_bad_arguments(make, match):
    with pytest.raises((ValueError, TypeError), match=match):
        make()


@pytest.mark.parametrize("resample", ["systematic", "multinomial", "birth_death", None])
@pytest.mark.parametrize("level", [-math.inf, math.inf, math.nan])
def test_weights_that_are_not_finite_are_refused_with_their_group(resample, level):
    """A particle of weight 0 is legal, and has no descendants, as long as its group has another;
    one of infinite weight, or of none, never is."""
    grid = torch.tensor([0.9, 0.5, 0.1], dtype=F64)

    def step(bad):  # one step of three groups of four; the bad rows have a reward of `level`
        offset = torch.zeros(12, dtype=F64)
        offset[bad] = level
        s = FKC(resample=resample, ess=1.0, groups=3).begin(VP(), grid, gen())
        return s, s.step(tilt(exact(), lambda x: 0 * x.sum(1) + offset), randn(12, 2), 0.9, 0.5)

    says = "weights of group 1 are not finite at step 0, t=0.9"
    with pytest.raises(FloatingPointError, match=says):
        step([4, 5, 6, 7])
    if level != -math.inf:
        with pytest.raises(FloatingPointError, match=says):
            step([5])
    elif resample != "birth_death":
        s, y = step([5, 6])
        assert torch.isfinite(y).all() and s.ess_history[0].tolist() == pytest.approx([4, 2, 4])
        if resample:
            assert not {5, 6} & set(s.ancestors.tolist())


def test_bad_runs():
    y = torch.arange(12) % 3
    for den in (exact(), apg(exact(), 3.0), cfg(exact(), 1.0)):
        with pytest.raises(ValueError, match="without parts"):
            run(den, label=y)
        assert torch.isfinite(run(den, FKC(missing="ignore"), label=y)).all()
    with pytest.raises(ValueError, match="change in time"):
        run(cfg(exact(), lambda t: 1 + t), label=y)
    with pytest.raises(ValueError, match="change in time"):
        run(cfg(exact(), 2.0, interval=(0.1, 0.5)), FKC(missing="ignore"), label=y)
    with pytest.raises(ValueError, match="batch of 12"):
        run(anneal(exact(), 2.0), FKC(groups=5))
    with pytest.raises(ValueError, match=r"\(12\), got 3"):
        run(anneal(exact(), 2.0), FKC(groups=torch.arange(3)))
    with pytest.raises(ValueError, match="positive sum"):
        run(contrast(anneal(exact(), 1.0), anneal(exact(), 3.0), 1.0))
    with pytest.raises(ValueError, match="empty batch"):
        run(anneal(exact(), 2.0), x=randn(0, 2))
    with pytest.raises(ValueError, match="start below 1"):
        sample(anneal(exact(Flow()), 2.0), FKC(), randn(4, 2), time_grid(Flow(), 5), progress=False)
    with pytest.raises(ValueError, match="one time"):
        s = FKC()
        s.start(VP(), torch.tensor([1.0, 0.5]))
        s.step(anneal(exact(), 2.0), randn(2, 2), torch.tensor([1.0, 0.9]), 0.5)
    with pytest.raises(FloatingPointError, match="weights of group 0"):
        run(tilt(exact(), lambda x: x.sum(1) * math.inf))
