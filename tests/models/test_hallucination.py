"""Hallucination: the smoothed denoiser against closed forms, the streaming variance under all sorts
of solvers, resampling and batches, the filter, the recursion, and every error."""

import math
import warnings

import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score
from torch.testing import assert_close

from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, NetDenoiser, Prediction, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, sample
from diffkit.guidance.fkc import FKC
from diffkit.guidance.svdd import SVDD, PosteriorMean
from diffkit.models.hallucination import (
    FEWEST,
    SmoothedMixtureDenoiser,
    auroc,
    hallucination_score,
    kept_at,
    midpoint_slope,
    noise_level,
    off_support,
    recursive_training,
    renoised_error,
    sample_filtered,
    watch,
    window_times,
)
from diffkit.solvers.deis import RhoRK
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from diffkit.solvers.pndm import PNDM

F64 = torch.float64
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]
THREE = GaussianMixture([[-1.0], [0.0], [1.0]], scales=0.05)
vp = VP()
GRID = time_grid(vp, 40, "log_snr", end=float(vp.time(math.log(100))))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def run(solver=None, n=60, width=0.25, window=0.14, seed=1, grid=GRID, mixture=THREE):
    model = watch(SmoothedMixtureDenoiser(mixture, vp, width), window)
    x = randn(n, *mixture.event, seed=seed)
    y = sample(model, solver or Ancestral(), x, grid, progress=False, generator=rng(2))
    return y, model


# --- the smoothed denoiser


def mixtures():
    g = rng(3)
    full = torch.randn(3, 4, 4, generator=g, dtype=F64)
    covs = full @ full.mT / 20
    return {
        "line": THREE,
        "unequal": GaussianMixture([[-1.0], [0.5]], scales=[0.1, 0.4], weights=[0.2, 0.8]),
        "diagonal": GaussianMixture(randn(3, 2), scales=[[0.1, 0.3]] * 3),
        "full": GaussianMixture(randn(3, 2, 2), covs=covs, labels=[0, 1, 1]),
        "points": GaussianMixture(randn(3, 2), scales=0.0),
    }


@pytest.mark.parametrize("name", mixtures())
@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_width_zero_is_the_exact_denoiser(name, process):
    m = mixtures()[name]
    x = randn(20, *m.event, seed=4)
    label = torch.arange(20) % 2 if m.labels is not None else None
    for t in (0.1, 0.6, torch.linspace(0.1, 0.9, 20, dtype=F64)):
        a = SmoothedMixtureDenoiser(m, process, 0.0)(x, t, label).x0
        # another order of the same sums in float64
        assert_close(a, MixtureDenoiser(m, process)(x, t, label).x0, rtol=1e-9, atol=1e-9)


def test_only_the_responsibilities_are_smoothed():
    # by hand, on unequal components
    m, h = mixtures()["unequal"], 0.3
    x, t = randn(9, 1, seed=5), 0.2
    a, s = float(vp.alpha(t)), float(vp.sigma(t))
    log, own = [], []
    for mean, var, w in zip(m.means[:, 0], m.vars[:, 0], m.weights):
        v, wide = a * a * var + s * s, a * a * (var + h * h) + s * s
        log.append(w.log() - (x - a * mean) ** 2 / (2 * wide) - wide.log() / 2)
        own.append(mean + a * var / v * (x - a * mean))
    r = torch.cat(log, 1).softmax(1)
    want = (r * torch.cat(own, 1)).sum(1, keepdim=True)
    assert_close(SmoothedMixtureDenoiser(m, vp, h)(x, t).x0, want)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_slope_half_way(process):
    two = GaussianMixture([[-0.6], [0.6]], scales=0.1)
    for t in (0.05, 0.3, 0.7):
        a, s = float(process.alpha(t)), float(process.sigma(t))
        found = []
        for h in (0.0, 0.1, 0.5):
            x = torch.zeros(1, 1, dtype=F64, requires_grad=True)
            y = SmoothedMixtureDenoiser(two, process, h)(x, t).x0
            found.append(torch.autograd.grad(y, x)[0].item())
            assert math.isclose(found[-1], midpoint_slope(1.2, 0.1, a, s, h), rel_tol=1e-9)
        assert found == sorted(found, reverse=True)
    # narrow modes, little noise: bounded by the width, unbounded without it
    assert midpoint_slope(1.0, 0.0, 1.0, 1e-4) > 1e7
    assert midpoint_slope(1.0, 0.0, 1.0, 1e-4, 0.25) <= 1 / (4 * 0.25**2)


def test_the_exact_denoiser_makes_none():
    y, _ = run(n=4000, width=0.0)
    assert not off_support(y, THREE).any()
    y, _ = run(n=4000, width=0.3)
    assert 0.005 < off_support(y, THREE).double().mean() < 0.05  # 0.0135 measured


# --- the score


def test_scores_by_hand_and_by_numpy():
    assert hallucination_score(torch.full((7, 3, 2, 2), 1e4)).tolist() == [0, 0, 0]
    swing = torch.tensor([1.0, -1.0] * 4)[:, None, None].expand(8, 5, 3)
    assert_close(hallucination_score(swing), torch.ones(5))
    x = randn(9, 4, 3, 2)
    want = np.var(x.numpy(), axis=0).mean((1, 2))
    assert_close(hallucination_score(x), torch.from_numpy(want))
    assert_close(hallucination_score(x + 5), hallucination_score(x))
    assert_close(hallucination_score(3 * x), 9 * hallucination_score(x))
    assert hallucination_score(x.half()).dtype == torch.float32


ONE_A_STEP = [
    DDIM(), DDIM(eta=1.0), Ancestral(), Ancestral("small"), Euler(), EulerMaruyama(),
    DPMSolverPP(2), DPMSolverPP(3),
]  # fmt: skip


@pytest.mark.parametrize("solver", ONE_A_STEP, ids=repr)
@pytest.mark.parametrize("window", [0.14, (0.1, 1.0)], ids=str)
def test_streaming_is_the_stored_variance(solver, window):
    kept = []
    model = watch(SmoothedMixtureDenoiser(THREE, vp, 0.25), window)
    low, high = (0.0, window) if isinstance(window, float) else window

    def callback(i, t, x, p):
        if low <= noise_level(vp, p.t) <= high:
            kept.append((p.t, p.x0))

    x = randn(50, 1, seed=6)
    sample(model, solver, x, GRID, callback=callback, progress=False, generator=rng(7))
    assert [t for t, _ in kept] == window_times(vp, GRID, window).tolist()
    # the running sums round in another order
    want = hallucination_score(torch.stack([p for _, p in kept]))
    assert_close(model.scores(), want, rtol=1e-8, atol=1e-13)


class Noted(Denoiser):
    "Writes down every call."

    def __init__(self, inner):
        super().__init__()
        self.inner, self.process, self.calls = inner, inner.process, []

    def forward(self, x, t):
        p = self.inner(x, t)
        self.calls.append((float(t), p.x0))
        return p


@pytest.mark.parametrize("solver", [Heun(), DPMSingle(3), RhoRK("3kutta"), PNDM()], ids=repr)
def test_solvers_of_several_stages_count_each_time_once(solver):
    noted = Noted(SmoothedMixtureDenoiser(THREE, vp, 0.25))
    model = watch(noted)
    end = 0.002  # above t_min, so that the last step has all its stages
    grid = time_grid(vp, 30, "log_snr", end=end)
    sample(model, solver, randn(20, 1), grid, progress=False)
    last = {t: x0 for t, x0 in noted.calls if noise_level(vp, t) <= 0.14}
    assert len(noted.calls) > len({t for t, _ in noted.calls}) or isinstance(solver, DPMSingle)
    assert_close(model.scores(), hallucination_score(torch.stack(list(last.values()))))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
def test_the_window_is_exact_at_both_ends(process):
    grid = time_grid(process, 50, "log_snr", end=max(process.t_min, float(process.time(5.0))))
    level = noise_level(process, grid[:-1])
    assert_close(level, process.sigma(grid[:-1]) / process.alpha(grid[:-1]))
    # limits that are levels of the grid: both ends belong to it
    low, high = level[-3].item(), level[-9].item()
    found = window_times(process, grid, (low, high))
    inner = grid[(grid >= grid[-4]) & (grid <= grid[-10])]
    assert set(inner.tolist()[1:-1]) <= set(found.tolist()) <= set(inner.tolist())
    eps = 1e-9
    assert len(window_times(process, grid, (low * (1 - eps), high * (1 + eps)))) == 7
    assert len(window_times(process, grid, (low * (1 + eps), high * (1 - eps)))) == 5
    # the step at which sampling ends makes no prediction
    assert grid[-1] not in window_times(process, grid, level[-5].item() * (1 + eps))


def test_the_papers_window():
    betas = torch.linspace(1e-3, 0.2, 1000, dtype=F64)
    grid = torch.linspace(1, 0, 1001, dtype=F64)
    found = window_times(Discrete(betas), grid)
    assert (found * 1000).round().tolist() == list(range(10, 0, -1))
    noted, kept = Noted(MixtureDenoiser(THREE, Discrete(betas))), []
    model = watch(noted)
    sample(model, Ancestral("large"), randn(8, 1), grid, progress=False, generator=rng())
    # as its code has it: population variance of the last ten of all predictions
    kept = torch.stack([x0 for _, x0 in noted.calls])
    assert len(kept) == 1000
    assert_close(model.scores(), torch.from_numpy(np.var(kept[-10:].numpy(), 0)[:, 0]))


def test_batches_samples_and_runs_are_independent():
    generators = lambda n: [rng(50 + i) for i in range(n)]
    x, model = randn(6, 1), watch(SmoothedMixtureDenoiser(THREE, vp, 0.3))
    go = lambda x, g: sample(model, Ancestral(), x, GRID, progress=False, generator=g)
    go(x, generators(6))
    whole = model.scores()
    go(x[:1], generators(1))
    assert_close(model.scores(), whole[:1])  # one sample; and the second run forgot the first
    go(x[3:], generators(6)[3:])
    assert_close(model.scores(), whole[3:])
    first = model.begin(GRID)
    second = model.begin(GRID)
    first(x, 0.01)
    assert second.last is None  # two trajectories share no memory
    # memory: three numbers a coordinate, however many steps
    assert sum(v.numel() for v in model.latest.sums[1:]) == 2 * 3
    y = randn(0, 1)
    go(y, rng())
    assert model.scores().shape == (0,)


def test_predictions_pass_untouched_and_types_stay():
    inner = SmoothedMixtureDenoiser(THREE, vp, 0.25)
    for dtype in (torch.float32, F64):
        x = randn(20, 1).to(dtype)
        model = watch(inner)
        plain = sample(inner, Ancestral(), x, GRID, progress=False, generator=rng(1))
        seen = sample(model, Ancestral(), x, GRID, progress=False, generator=rng(1))
        assert seen.equal(plain) and seen.dtype == dtype and model.scores().dtype == dtype
    # one more evaluation at the end belongs to no trajectory
    before = model.scores()
    x = randn(20, 1)
    sample(model, Ancestral(), x, GRID, progress=False, generator=rng(1), denoise_last=True)
    assert_close(model.scores(), before.double(), rtol=1e-3, atol=1e-6)


def test_times_of_each_sample():
    # a loop of one's own in which every sample stands at its own time
    inner = SmoothedMixtureDenoiser(THREE, vp, 0.25)
    x, model, kept = randn(3, 1), watch(inner), [[], [], []]
    model.start()
    for shift in torch.linspace(0.06, 0, 30, dtype=F64):
        t = shift + torch.tensor([0.001, 0.01, 0.02], dtype=F64)
        p = model(x, t).x0
        for k in range(3):
            if noise_level(vp, t[k]) <= 0.14:
                kept[k].append(p[k])
    assert len({len(v) for v in kept}) == 3 and min(map(len, kept)) >= FEWEST
    want = [hallucination_score(torch.stack(v)[:, None]) for v in kept]
    assert_close(model.scores(), torch.cat(want), rtol=1e-8, atol=1e-15)


def test_scores_follow_a_resampling():
    inner = SmoothedMixtureDenoiser(THREE, vp, 0.25)
    model, idx = watch(inner).begin(GRID), torch.tensor([2, 2, 0])
    x, kept = randn(3, 1), []
    for k, t in enumerate(torch.linspace(0.03, 0.001, 8, dtype=F64).tolist()):
        kept.append(model(x + k / 50, t).x0)
        if k == 3:
            model.reindex(idx)
            x, kept = x[idx], [p[idx] for p in kept]
    assert_close(model.scores(), hallucination_score(torch.stack(kept)))
    # solvers that resample the batch, or try several candidates a sample
    for solver in (
        FKC(missing="ignore", groups=torch.arange(12) % 3),
        SVDD(DDIM(eta=1.0), PosteriorMean(lambda x: x[:, 0]), M=3),
    ):
        model = watch(inner)
        sample(model, solver, randn(12, 1), GRID, progress=False, generator=rng(3))
        assert model.scores().shape == (12,) and model.scores().isfinite().all()


def test_around_guidance_and_not_inside():
    m = GaussianMixture([[-1.0], [1.0]], scales=0.1, labels=[0, 1])
    base, x = MixtureDenoiser(m, vp), randn(10, 1)
    model = watch(cfg(base, 2.0, uncond={"label": torch.full((10,), -1)}))
    cond = {"label": torch.arange(10) % 2}
    sample(model, Ancestral(), x, GRID, cond=cond, progress=False, generator=rng())
    assert model.scores().shape == (10,) and model.null == base.null

    class Growing(Denoiser):
        process = vp

        def __init__(self):
            super().__init__()
            self.inner = watch(base)

        def forward(self, x, t):
            n = 2 if t < 0.01 else 1
            p = self.inner(x.repeat_interleave(n, 0), t)
            return p.map(lambda v: v[::n])

    with pytest.raises(ValueError, match="saw 10 rows and now 20"):
        sample(Growing(), DDIM(), x, GRID, progress=False)


def test_no_signal_at_the_start():
    # at alpha = 0 a prediction of noise does not determine x_0, and is not asked for it
    process = Flow()

    class Net(Denoiser):
        def __init__(self):
            super().__init__()
            self.process = process

        def forward(self, x, t):
            return Prediction.of(x, t, process, eps=0.1 * x)

    model = watch(Net()).begin()
    model(randn(4, 1), 1.0)
    for k in range(8, 0, -1):
        model(randn(4, 1, seed=k), k / 100)
    assert model.scores().isfinite().all()
    model = watch(Net()).begin()  # and where only one row is there, the others are not spoilt
    for k in range(8, 0, -1):
        model(randn(2, 1, seed=k), torch.tensor([1.0, k / 100], dtype=F64))
    assert model._added(model.last[2])[0].tolist() == [0, 8]
    assert model._added(model.last[2])[2][1].isfinite()


# --- rivals and measures


def test_renoised_error_of_a_gaussian():
    bell, v, level = GaussianMixture([[0.0, 0.0]], scales=0.5), 0.25, 0.3
    t = float(vp.time(-math.log(level)))
    a, s = float(vp.alpha(t)), float(vp.sigma(t))
    gain = a * v / (a * a * v + s * s)
    x = torch.tensor([0.8, -0.3], dtype=F64).expand(40000, 2)
    got = renoised_error(MixtureDenoiser(bell, vp), x, level, 3, generator=rng(5))
    want = (gain * a - 1) ** 2 * (0.64 + 0.09) / 2 + (gain * s) ** 2
    # four standard errors
    assert abs(got.mean().item() - want) < 4 * got.std().item() / 200
    one = renoised_error(MixtureDenoiser(bell, vp), x, level, 1, generator=rng(5))
    # the mean of three draws: a third of the variance, to 5 %
    assert abs(one.var() / got.var() - 3) < 0.15


def test_renoised_error_beats_guessing_under_ddim():
    y, model = run(DDIM(), n=6000, width=0.3)
    bad = off_support(y, THREE)
    redone = renoised_error(model.inner, y, generator=rng(8))
    # measured 0.96; the variance under DDIM 0.82
    assert auroc(redone, bad) > max(0.9, auroc(model.scores(), bad) + 0.05)


def test_auroc_and_kept_against_peers():
    s = torch.randint(0, 7, (500,), generator=rng(0)).double()
    bad = torch.rand(500, generator=rng(1)) < (s + 1) / 14
    assert math.isclose(auroc(s, bad), roc_auc_score(bad, s), abs_tol=1e-12)
    u = mannwhitneyu(s[bad], s[~bad]).statistic / (int(bad.sum()) * int((~bad).sum()))
    assert math.isclose(auroc(s, bad), u, abs_tol=1e-12)
    assert math.isclose(auroc(-s, bad), 1 - auroc(s, bad), abs_tol=1e-12)
    for removed in (0.05, 0.5, 0.95, 1.0):
        kept = kept_at(s, bad, removed)
        best = max(
            (s[~bad] < c).double().mean().item()
            for c in s.unique()
            if (s[bad] >= c).double().mean() >= removed - 1e-12
        )
        assert math.isclose(kept, best, abs_tol=1e-12)


@pytest.mark.parametrize("n", [1, 4, 10])
def test_kept_is_a_count_below_the_threshold(n):
    "Bad scores 1..n, good ones half a step below each, two at each bad one, and one above all."
    bad, steps = torch.arange(1.0, n + 1), torch.arange(1.0, n + 1)
    good = torch.cat([steps - 0.5, steps, steps, torch.tensor([n + 1.0])])
    s, b = torch.cat([bad, good]), torch.arange(n + len(good)) < n
    for gone in range(1, n + 1):
        at = n - gone + 1  # the threshold: this score and those above are `gone` bad ones
        want = (at + 2 * (at - 1)) / (3 * n + 1)
        for removed in (gone / n, (gone - 0.5) / n):  # a part of one asks for the whole
            assert math.isclose(kept_at(s, b, removed), want)


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("t", [-0.1, 1.1, math.nan])
def test_the_smoothed_denoiser_refuses_the_times_that_the_exact_one_refuses(t, process):
    x = randn(2, 1)
    for at in (t, torch.tensor([0.5, t])):
        said = []
        for d in (MixtureDenoiser(THREE, process), SmoothedMixtureDenoiser(THREE, process)):
            with pytest.raises(ValueError) as info:
                d(x, at)
            said.append(str(info.value))
        assert said[0] == said[1]


def test_off_support():
    m = GaussianMixture([[0.0, 0.0], [3.0, 0.0]], scales=[0.1, 0.5])
    x = torch.tensor([[0.59, 0.0], [0.61, 0.0], [3.0, 2.99], [3.0, 3.01]])
    assert off_support(x, m).tolist() == [False, False, False, True]  # 0.61 is near the wide one
    assert off_support(x, m, radius=5.0).tolist() == [False, False, True, True]
    inside = m.sample(100000, rng())[0]
    assert not off_support(inside, m, 7.0).any()


# --- the filter and the recursion


def test_filter_keeps_order_and_what_it_says():
    model = SmoothedMixtureDenoiser(THREE, vp, 0.3)
    x = randn(300, 1)
    go = lambda **k: sample_filtered(
        model, Ancestral(), x, GRID, generator=rng(1), progress=False, **k
    )
    whole = go(keep=1.0)
    plain = sample(model, Ancestral(), x, GRID, progress=False, generator=rng(1))
    assert whole.x.equal(plain) and whole.kept.tolist() == list(range(300))
    assert len(go().x) == 285
    some = go(keep=0.8)
    assert some.x.equal(plain[some.kept]) and (some.kept.diff() > 0).all()
    dropped = torch.ones(300, dtype=torch.bool)
    dropped[some.kept] = False
    assert whole.scores[dropped].min() >= whole.scores[some.kept].max() and dropped.sum() == 60
    assert go(threshold=math.inf).kept.equal(whole.kept) and len(go(threshold=0.0).x) == 0
    assert len(go(keep=1e-6).x) == 1
    # it removes hallucinations
    model, x = SmoothedMixtureDenoiser(THREE, vp, 0.25), randn(4000, 1)
    every, some = go(keep=1.0).x, go(keep=0.9).x
    assert off_support(some, THREE).sum() < off_support(every, THREE).sum() / 2


def test_a_warning_where_no_noise_is_drawn():
    model, x = SmoothedMixtureDenoiser(THREE, vp, 0.25), randn(20, 1)
    for solver in (DDIM(), Heun(), DPMSolverPP(2)):
        for g in (None, rng(), [rng(i) for i in range(20)]):
            with pytest.warns(UserWarning, match="drew no noise"):
                sample_filtered(model, solver, x, GRID, generator=g, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample_filtered(model, DDIM(eta=0.5), x, GRID, progress=False)
        given = Ancestral(noise=randn(40, 20, 1))
        sample_filtered(model, given, x, GRID, progress=False)
        sample_filtered(model, DDIM(), x, GRID, keep=1.0, progress=False)


def chain(select, m=3, n=40, generations=3, extra=0.1):
    lessons = []

    def teach(data, i):
        lessons.append((i, data))
        return SmoothedMixtureDenoiser(THREE, vp, 0.25)

    data = THREE.sample(n * m, rng(2))[0].reshape(n, m, 1)
    out = recursive_training(
        teach, data, Ancestral(), GRID, select, generations, extra, generator=rng(3)
    )
    return data, lessons, out


def test_recursion_hands_on_what_was_kept():
    data, lessons, out = chain(["variance", "random", lambda model, x: -x[:, 0]])
    assert [i for i, _ in lessons] == [0, 1, 2] and lessons[0][1] is data and len(out) == 3
    for gen, (_, nxt) in zip(out, lessons[1:]):
        assert gen.x.shape == (3, 44, 1) and gen.kept.shape == (3, 40)
        for k in range(3):
            assert nxt[:, k].equal(gen.x[k, gen.kept[k]])
            gone = torch.ones(44, dtype=torch.bool)
            gone[gen.kept[k]] = False
            assert gen.scores[k][gone].min() >= gen.scores[k][gen.kept[k]].max()
        assert gen.scores[2].equal(-gen.x[2, :, 0])
    # the control drops without looking: kept rows are not those of the lowest values
    assert out[0].scores[1].min() >= 0 and out[0].scores[1].max() <= 1
    # the scores of "variance" are those of watch, on the rows of its population
    again = watch(SmoothedMixtureDenoiser(THREE, vp, 0.25))
    g = rng(3)
    x = float(vp.sigma(1.0)) * torch.randn(132, 1, generator=g, dtype=F64)
    y = sample(again, Ancestral(), x, GRID, progress=False, generator=g)
    assert y.reshape(3, 44, 1).equal(out[0].x)
    assert again.scores()[:44].equal(out[0].scores[0])


def test_recursion_settings():
    _, _, out = chain("variance", m=1, n=100, generations=1, extra=0.025)
    assert out[0].x.shape == (1, 103, 1)  # 2.5 rounded up
    _, _, out = chain("random", m=2, extra=0.0)
    assert out[0].kept.tolist() == [list(range(40))] * 2
    _, _, out = chain("random", m=1, n=1000, generations=1, extra=1.0)
    # each half of the rows is as likely to be kept: within 4.5 standard deviations of 500
    assert abs((out[0].kept[0] < 1000).sum() - 500) < 4.5 * (2000 * 0.25 * 0.5) ** 0.5


# --- errors


def test_errors_name_the_argument():
    model, x = SmoothedMixtureDenoiser(THREE, vp, 0.25), randn(20, 1)
    for width in (-0.1, math.inf, math.nan, "wide", True):
        with pytest.raises(ValueError, match="width"):
            SmoothedMixtureDenoiser(THREE, vp, width)
    with pytest.raises(TypeError):
        SmoothedMixtureDenoiser(THREE, vp, wide=0.1)
    for window in (0.0, -1.0, (0.2, 0.1), (0.1, 0.1), (-0.1, 1.0), math.nan, "all", None, True):
        with pytest.raises(ValueError, match="window"):
            watch(model, window)
    with pytest.raises(TypeError, match="denoiser must be a Denoiser"):
        watch(lambda x, t: x)
    with pytest.raises(RuntimeError, match="no trajectory yet"):
        watch(model).scores()
    short = watch(model)
    sample(short, Ancestral(), x, GRID[:10], progress=False, generator=rng())
    with pytest.raises(ValueError, match="held 0 predictions"):
        short.scores()
    sample(short, Ancestral(), x, GRID[-4:], progress=False, generator=rng())
    with pytest.raises(ValueError, match="held 3 predictions"):
        short.scores()
    with pytest.raises(ValueError, match="holds 0 of the 9 steps"):
        window_times(vp, GRID[:10])
    for bad in (torch.zeros(3), torch.zeros(0, 2), [1.0, 2.0]):
        with pytest.raises(ValueError, match="trajectory"):
            hallucination_score(bad)
    for k, v in (("level", 0.0), ("level", 1e9), ("level", math.nan), ("draws", 0), ("draws", 1.5)):
        with pytest.raises(ValueError, match=k):
            renoised_error(model, x, **{k: v})
    go = lambda **k: sample_filtered(model, Ancestral(), x, GRID, progress=False, **k)
    for k in ({"keep": 0.0}, {"keep": 1.1}, {"keep": True}, {"threshold": -1.0}):
        with pytest.raises(ValueError, match=next(iter(k))):
            go(**k)
    with pytest.raises(ValueError, match="not both"):
        go(keep=0.5, threshold=0.1)
    with pytest.raises(ValueError, match="window"):
        go(window=1e-3)
    with pytest.raises(TypeError, match="kep"):
        go(kep=0.5)
    for k in ({"radius": 0.0}, {"mixture": mixtures()["full"]}):
        with pytest.raises(ValueError, match=next(iter(k))):
            off_support(**({"x": x, "mixture": THREE} | k))
    scores, bad = randn(20), torch.arange(20) > 15
    for s, b in ((scores, bad[:5]), (scores, bad & ~bad), (scores, bad | ~bad), (scores, scores)):
        with pytest.raises(ValueError):
            auroc(s, b)
    with pytest.raises(ValueError, match="nan"):
        auroc(scores * math.nan, bad)
    for removed in (0.0, 1.01):
        with pytest.raises(ValueError, match="removed"):
            kept_at(scores, bad, removed)
    for k in ({"select": "best"}, {"select": ["random"]}, {"generations": 0}, {"extra": -0.1}):
        with pytest.raises(ValueError, match=next(iter(k))):
            chain(**({"select": "random"} | k))
    with pytest.raises(ValueError, match="data"):
        recursive_training(lambda d, i: model, x, Ancestral(), GRID)
    with pytest.raises(ValueError, match="alpha"):
        midpoint_slope(1.0, 0.1, 0.0, 1.0)


def test_a_network_in_float32():
    net = torch.nn.Linear(1, 1)
    model = watch(NetDenoiser(lambda x, t: net(x), vp))
    y = sample(model, Ancestral(), randn(5, 1).float(), GRID, progress=False, generator=rng())
    assert y.dtype == torch.float32 and not model.scores().requires_grad
