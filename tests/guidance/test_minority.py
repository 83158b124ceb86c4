"""Minority guidance: the exact classifier is classifier-free guidance, under every kind of
solver and process; scores and bins on random input; wrong input."""

import numpy as np
import pytest
import torch
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg, count_evals
from diffkit.core.nets import MLP
from diffkit.core.process import EDM, VP, Cosine, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Heun, sample
from diffkit.guidance.minority import (
    BinClassifier,
    minority,
    minority_score,
    mixture_classifier,
    quantile_labels,
    train_bin_classifier,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

F64 = torch.float64
MIX = GaussianMixture(
    ring(6).means, scales=0.25, weights=[0.3, 0.2, 0.2, 0.1, 0.1, 0.1], labels=[0, 0, 1, 1, 2, 2]
)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


@pytest.mark.parametrize("process", [VP(), EDM(), Cosine(), Flow()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "solver", [DDIM(), Heun(), DPMSolverPP(2), Ancestral()], ids=lambda s: type(s).__name__
)
def test_the_exact_classifier_is_classifier_free_guidance(process, solver):
    start = min(process.t_max, 0.97)
    x, level, grid = (
        randn(12, 2) * process.sigma(start),
        torch.arange(12) % 3,
        time_grid(process, 10, "log_snr", start),
    )
    d = MixtureDenoiser(MIX, process)
    run = lambda d, **c: sample(d, solver, x, grid, cond=c, generator=gen(1), progress=False)
    for w in (0.0, 1.0, 2.5):
        assert_close(
            run(minority(d, mixture_classifier(MIX, process), level, w)),
            run(cfg(d, w), label=level),
            rtol=1e-6,
            atol=1e-7,
        )


def test_composes_with_other_guidance():
    """Inside cfg the classifier's gradient enters both branches, so it cancels in the direction
    and stays once."""
    d, x, y = MixtureDenoiser(MIX, VP()), randn(12, 2), torch.arange(12) % 3
    clf = lambda x, t, label=None: mixture_classifier(MIX, VP())(x, t)
    a = cfg(minority(d, clf, 2, 1.5), 3.0)(x, 0.4, label=y).eps
    assert_close(a, minority(cfg(d, 3.0), clf, 2, 1.5)(x, 0.4, label=y).eps, rtol=1e-9, atol=1e-9)
    with count_evals(d) as n:
        minority(cfg(d, 3.0), clf, 2)(x, 0.4, label=y)
    assert n.rows == 24
    assert torch.equal(
        minority(d, clf, 2, 3.0, interval=(0.5, 1.0))(x, 0.4, label=y).eps, d(x, 0.4, label=y).eps
    )


def test_batch_independence_single_precision_and_gradients():
    d, clf, x = MixtureDenoiser(MIX, VP()), mixture_classifier(MIX, VP()), randn(12, 2)
    whole = minority(d, clf, torch.arange(12) % 3, 2.0)(x, 0.3).x0
    assert_close(
        whole,
        torch.cat([minority(d, clf, i % 3, 2.0)(x[i : i + 1], 0.3).x0 for i in range(12)]),
        rtol=1e-9,
        atol=1e-9,
    )
    low = minority(d, clf, 1, 2.0)(x.float(), 0.3).x0
    assert low.dtype == torch.float32
    assert_close(low.double(), minority(d, clf, 1, 2.0)(x, 0.3).x0, rtol=1e-3, atol=1e-4)
    z = x.clone().requires_grad_()
    minority(d, clf, 1, 2.0)(z, 0.3).x0.sum().backward()
    h = torch.zeros_like(x)
    h[3, 1] = 1e-6
    with torch.no_grad():
        num = (
            minority(d, clf, 1, 2.0)(x + h, 0.3).x0.sum()
            - minority(d, clf, 1, 2.0)(x - h, 0.3).x0.sum()
        ) / 2e-6
    assert_close(z.grad[3, 1], num, rtol=1e-5, atol=1e-6)
    assert minority(d, clf)(x[:0], 0.3).x0.shape == (0, 2)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 60), bins=st.integers(2, 8), seed=st.integers(0, 99), ties=st.booleans())
def test_bins_are_equal_and_ordered(n, bins, seed, ties):
    s = randn(n, seed=seed)
    if ties:
        s = s.round()
    if bins > n:
        with pytest.raises(ValueError, match="bins must lie"):
            quantile_labels(s, bins)
        return
    b, edges = quantile_labels(s, bins)
    size = b.bincount(minlength=bins)
    assert size.max() - size.min() <= 1 and edges.shape == (1, bins - 1)
    assert all(s[b == k].max() <= s[b == k + 1].min() for k in range(bins - 1))
    assert (edges[0].diff() >= 0).all()


def test_bins_as_quantiles_of_numpy():
    s = randn(100, seed=3)
    b, _ = quantile_labels(s, 4)
    # no ties: the same cuts
    assert (
        b.numpy() == np.searchsorted(np.quantile(s.numpy(), [0.25, 0.5, 0.75]), s.numpy())
    ).all()


def test_score_in_batches_with_labels_and_a_feature_distance():
    d, x, y = MixtureDenoiser(MIX, VP()), MIX.sample(50, gen(2))[0], torch.arange(50) % 3
    a = minority_score(d, x, 0.3, 5, generator=gen(1), label=y)
    assert_close(a, minority_score(d, x, 0.3, 5, generator=gen(1), label=y, batch=8))
    assert a.shape == (50,) and (a > 0).all()
    f = lambda u, v: (u.sin() - v.sin()).abs().sum(1)
    assert minority_score(d, x, 0.3, 2, distance=f, generator=gen(1)).shape == (50,)
    assert minority_score(d, x[:0], 0.3).shape == (0,)
    assert minority_score(MixtureDenoiser(MIX, VP()), x.float(), 0.3, 2).dtype in (
        torch.float32,
        F64,
    )


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 4096])
@pytest.mark.parametrize("process", [VP(), EDM(), Flow()], ids=lambda p: type(p).__name__)
def test_score_of_given_noise_by_hand(process, batch):
    d, x, y = MixtureDenoiser(MIX, process), MIX.sample(7, gen(2))[0], torch.arange(7) % 3
    noise = randn(4, 7, 2, seed=9)
    want = torch.zeros(7, dtype=F64)
    for e in noise:
        for i in range(7):
            state = process.alpha(0.3) * x[i] + process.sigma(0.3) * e[i]
            guess = d(state[None], 0.3, label=y[i : i + 1]).x0[0]
            want[i] += (guess - x[i]).square().sum() / 4
    assert_close(minority_score(d, x, 0.3, noise=noise, batch=batch, label=y), want)
    assert_close(minority_score(d, x, 0.3, 4, noise=noise, batch=batch, label=y), want)
    one = minority_score(d, x, 0.3, noise=noise[:1], distance=lambda a, b: a[:, 0] - b[:, 0])
    state = process.alpha(0.3) * x + process.sigma(0.3) * noise[0]
    assert_close(one, x[:, 0] - d(state, 0.3).x0[:, 0])  # clean first, then denoised


def test_score_at_the_latest_time():
    "At t = 1, which is allowed, VP has all but forgotten the sample: the guess is the mean."
    x = MIX.sample(40, gen(2))[0]
    got = minority_score(MixtureDenoiser(MIX, VP()), x, 1, 4, generator=gen(1))
    mean = MIX.weights @ MIX.means
    assert_close(got, (x - mean).square().sum(1), rtol=0.05, atol=0.05)


def test_score_of_drawn_noise_is_that_of_the_same_draws():
    d, x, g = MixtureDenoiser(MIX, VP()), MIX.sample(7, gen(2))[0], gen(5)
    noise = torch.stack([torch.randn(7, 2, generator=g, dtype=x.dtype) for _ in range(16)])
    drawn = minority_score(d, x, 0.3, generator=gen(5))  # 16 draws where nothing is said
    assert_close(drawn, minority_score(d, x, 0.3, noise=noise))
    for batch in (1, 20):
        assert_close(minority_score(d, x, 0.3, batch=batch, generator=gen(5)), drawn)


class Seen(torch.nn.Module):  # logits without weights that matter; keeps what it is asked
    def __init__(self):
        super().__init__()
        self.w, self.asked = torch.nn.Parameter(torch.zeros(2)), []

    def forward(self, x, t, label=None):
        self.asked.append((x.detach().clone(), t.clone(), label))
        return self.w.expand(len(x), 2)


@pytest.mark.parametrize("t_max", [1.0, 0.3])
def test_training_states_are_noised_each_at_its_own_time(t_max):
    """What the network is shown, sample by sample, from the same draws in the same order."""
    x0, y = MIX.sample(30, gen(4))[0], torch.arange(30) % 3
    net, g, process = Seen(), gen(5), VP()
    labels = torch.arange(30) % 2
    train_bin_classifier(
        net, x0, labels, process, steps=3, batch=8, t_max=t_max, generator=gen(5), label=y
    )
    assert len(net.asked) == 3
    for x, t, label in net.asked:
        i = torch.randint(0, 30, (8,), generator=g)
        times = process.t_min + (t_max - process.t_min) * torch.rand(8, generator=g)
        e = torch.randn(8, 2, generator=g, dtype=x0.dtype)
        assert len(times.unique()) == 8 and torch.equal(label, y[i])
        assert_close(t, times.to(t.dtype))
        for k in range(8):
            state = process.alpha(times[k]) * x0[i[k]] + process.sigma(times[k]) * e[k]
            assert_close(x[k], state, check_dtype=False)


def test_training_takes_the_step_of_cross_entropy():
    "One step of AdamW on logits that are the weights: against the gradient by hand."
    x0, labels, net, g = MIX.sample(30, gen(4))[0], torch.arange(30) % 2, Seen(), gen(5)
    net.w.data = torch.tensor([0.3, -0.2])
    before = net.w.detach().clone()
    train_bin_classifier(net, x0, labels, VP(), steps=1, batch=9, lr=0.01, generator=gen(5))
    share = labels[torch.randint(0, 30, (9,), generator=g)].bincount(minlength=2) / 9
    slope = before.softmax(0) - share
    # the first step of Adam is lr in the direction of the sign; weight decay 0.01 comes before
    assert_close(
        net.w.detach(), before * (1 - 0.01 * 0.01) - 0.01 * slope.sign(), rtol=0, atol=1e-6
    )


def shift_of_a_step(solver, grid):
    d, clf, x, y = MixtureDenoiser(MIX, VP()), mixture_classifier(MIX, VP()), randn(9, 2), 2
    go = lambda d: sample(d, solver, x, grid, progress=False)
    z = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(clf(z, float(grid[0])).log_softmax(1)[:, y].sum(), z)
    return go(minority(d, clf, y, 3.5)) - go(d), 3.5 * g


def test_an_ode_step_moves_by_half_of_the_official_shift():
    """w Sigma grad log p is the shift of the official code: to first order that of a step of the
    SDE, twice that of a step of the ODE."""
    errors = []
    for h in (1e-2, 1e-3):
        grid = torch.tensor([0.5, 0.5 - h], dtype=F64)
        (a, a2), (s, s2) = VP().alpha(grid), VP().sigma(grid)
        Sigma = s**2 * (1 - (a * s2 / (a2 * s)) ** 2)
        noise = randn(1, 9, 2, seed=3)
        both = ((Ancestral("large", noise), 1.0), (Ancestral("small", noise), 1.0), (DDIM(), 0.5))
        for solver, part in both:
            moved, g = shift_of_a_step(solver, grid)
            errors.append(((moved / (Sigma * g)) - part).abs().max().item())
    assert max(errors[:3]) < 0.2 and max(errors[3:]) < 0.02  # first order: a tenth of the step
    assert all(5 < a / b < 20 for a, b in zip(errors[:3], errors[3:]))


def test_training_is_reproducible_and_leaves_the_data_alone():
    x, b = MIX.sample(80, gen(4))[0].float(), torch.arange(80) % 2
    before, out = x.clone(), []
    for _ in range(2):
        torch.manual_seed(0)
        c = train_bin_classifier(
            MLP(2, out=2, hidden=16, depth=1), x, b, VP(), steps=5, generator=gen(5)
        )
        out.append(c(x, 0.3))
    assert (
        isinstance(c, BinClassifier)
        and not c.training
        and torch.equal(*out)
        and torch.equal(x, before)
    )
    assert torch.isfinite(
        minority(NetDenoiser(lambda x, t: x, VP(), "v"), c, 1, 2.0)(x, 0.5).x0
    ).all()


D, CLF = MixtureDenoiser(MIX, VP()), mixture_classifier(MIX, VP())


@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_levels_count_from_both_ends(scale):
    "Three bins are 0, 1, 2 or -3, -2, -1, for all samples or each of its own."
    x = randn(6, 2)
    go = lambda level: minority(D, CLF, level, scale)(x, 0.5).x0
    for k in (0, 1, 2):
        assert torch.equal(go(k - 3), go(k))
    each = torch.tensor([-3, 0, -2, 1, -1, 2])
    assert torch.equal(go(each), go(torch.tensor([0, 0, 1, 1, 2, 2])))
    assert_close(go(each), torch.stack([go(k)[i] for i, k in enumerate([0, 0, 1, 1, 2, 2])]))
    assert torch.equal(minority(D, CLF, scale=scale)(x, 0.5).x0, go(2))  # the rarest by default


@pytest.mark.parametrize(
    "f,error,says",
    [
        (lambda x: minority(D, CLF, 3)(x, 0.5), ValueError, r"-3\.\.2"),
        (lambda x: minority(D, CLF, -4)(x, 0.5), ValueError, "level must lie"),
        (lambda x: minority(D, CLF, True), TypeError, "integer"),
        (lambda x: minority(D, None), TypeError, "classifier must be"),
        (lambda x: minority(lambda x, t: x, CLF), TypeError, "Denoiser"),
        (
            lambda x: minority(D, lambda x, t: CLF(x.detach(), t))(x, 0.5),
            ValueError,
            "differentiable",
        ),
        (
            lambda x: minority(D, CLF, torch.zeros(5, dtype=torch.long))(x, 0.5),
            ValueError,
            "one entry a sample",
        ),
        (lambda x: minority(D, CLF, torch.zeros(6))(x, 0.5), TypeError, "integer"),
        (lambda x: minority(D, CLF, scale=torch.ones(4))(x, 0.5), ValueError, "scale must be"),
        (lambda x: minority_score(D, x, torch.tensor([0.1, 0.2])), ValueError, "one time"),
        (lambda x: minority_score(D, x, 0), ValueError, r"\(0, 1\]"),
        (lambda x: minority_score(D, x, -0.1), ValueError, r"one time in \(0, 1\], got -0.1"),
        (lambda x: minority_score(D, x, 1.001), ValueError, r"one time in \(0, 1\], got 1.001"),
        (
            lambda x: minority_score(D, x, float("nan")),
            ValueError,
            r"one time in \(0, 1\], got nan",
        ),
        (lambda x: minority_score(D, x, n=0), ValueError, "at least 1"),
        (lambda x: minority_score(D, x, n=True), ValueError, "got True"),
        (lambda x: minority_score(D, x, noise=randn(0, 6, 2)), ValueError, "at least 1"),
        (lambda x: minority_score(D, x, noise=randn(2, 5, 2)), ValueError, r"\(2, 6, 2\), got"),
        (lambda x: minority_score(D, x, n=3, noise=randn(2, 6, 2)), ValueError, r"\(3, 6, 2\)"),
        (
            lambda x: minority_score(D, x, noise=randn(2, 6, 2), generator=gen()),
            ValueError,
            "not both",
        ),
        (
            lambda x: mixture_classifier(
                GaussianMixture([[0.0], [1.0]], scales=1.0, labels=[1, 2]), VP()
            ),
            ValueError,
            "labels must be 0",
        ),
        (
            lambda x: train_bin_classifier(
                MLP(2, out=2), x.float(), torch.zeros(3, dtype=torch.long), VP()
            ),
            ValueError,
            "labels must have",
        ),
        (
            lambda x: quantile_labels(torch.zeros(4), 2, torch.zeros(3)),
            ValueError,
            "groups must have",
        ),
    ],
)
def test_wrong_input(f, error, says):
    with pytest.raises(error, match=says):
        f(randn(6, 2))
