"""DomainStudio: relations against torch's divergence and by loops, wavelets against filters and
PyWavelets, the loss term by term on every kind of network, adaptation, and every error."""

import copy
import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import diffkit.models.domainstudio as module
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import (
    Counter,
    Denoiser,
    MixtureDenoiser,
    NetDenoiser,
    Prediction,
    Wrapped,
    cfg,
)
from diffkit.core.nets import MLP, Stacked, UNet
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, sample
from diffkit.models.domainstudio import (
    DomainStudioLoss,
    adapt,
    copy_distance,
    haar,
    high_frequency,
    intra_cluster_diversity,
    relation_loss,
    relations,
    unhaar,
)

F64 = torch.float64
vp = VP()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=rng(seed), dtype=dtype)


# --- relative distances


def by_loops(x, reference):  # as one would write it down, pair by pair
    def row(v, i):
        cos = [
            F.cosine_similarity(v[i].flatten(), v[j].flatten(), 0) for j in range(len(v)) if j != i
        ]
        return torch.stack(cos).softmax(0)

    total = 0.0
    for i in range(len(x)):
        p, q = row(x, i), row(reference, i)
        total += (q * (q / p).log()).sum()
    return total / len(x)


@pytest.mark.parametrize("n", [3, 4, 7])
def test_the_divergence_by_loops_and_by_torch(n):
    x, y = randn(n, 2, 4, 4), randn(n, 2, 4, 4, seed=1)
    loss = relation_loss(x, y)
    assert_close(loss, by_loops(x, y))
    p, q = relations(x)[0], relations(y)[0]
    assert p.shape == (n, n - 1)
    assert_close(p.exp().sum(1), torch.ones(n, dtype=F64))
    assert_close(loss, F.kl_div(p, q, reduction="batchmean", log_target=True))
    # the official code's unit: a mean over all entries
    entries = F.kl_div(p, q, reduction="none", log_target=True)
    assert_close(loss, (n - 1) * entries.mean())
    # the direction matters
    assert abs(loss / relation_loss(y, x) - 1) > 1e-3


def test_what_is_free():
    x, y = randn(6, 3, 4, 4), randn(6, 3, 4, 4, seed=1)
    loss = relation_loss(x, y)
    scale = torch.rand(6, 1, 1, 1, generator=rng(2), dtype=F64) + 0.1
    assert_close(relation_loss(scale * x, y), loss)
    R = torch.linalg.qr(randn(48, 48, seed=3))[0]
    turned = (x.flatten(1) @ R).view_as(x)
    assert_close(relation_loss(turned, y), loss)
    assert relation_loss(turned, x) < 1e-14  # rounding of float64
    order = torch.randperm(6, generator=rng(4))
    assert_close(relation_loss(x[order], y[order]), loss)
    # an addition is not, unless the mean goes first
    assert relation_loss(x + 2, x) > 1e-3
    assert relation_loss(x + 2, x, centre=True) < 1e-14
    assert relation_loss(x + 2, y, centre=True).item() == pytest.approx(
        relation_loss(x, y, centre=True).item(), rel=1e-9
    )


def test_zero_at_the_reference_and_its_slope():
    x, y = randn(5, 8), randn(5, 8, seed=1)
    leaf = x.clone().requires_grad_()
    loss = relation_loss(leaf, x)
    (slope,) = torch.autograd.grad(loss, leaf)
    assert loss == 0 and slope.abs().max() < 1e-12
    assert torch.autograd.gradcheck(lambda v: relation_loss(v, y), leaf)


def test_the_largest_divergence_of_a_triple():
    x = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]], dtype=F64)
    y = x[[0, 2, 1]]
    # anchor 0 sees (1, -1) against (-1, 1); the others see equal rows up to their order
    p, q = relations(x), relations(y)
    row = (q.exp() * (q - p)).sum(-1)[0, 0]
    assert row.item() == pytest.approx(2 * math.tanh(1), rel=1e-12)


def test_groups_are_neighbours():
    x, y = randn(12, 5), randn(12, 5, seed=1)
    for n in (3, 4, 6):
        own = [relation_loss(a, b) for a, b in zip(x.split(n), y.split(n))]
        assert_close(relation_loss(x, y, group=n), torch.stack(own).mean())
        own = [relation_loss(a, b, centre=True) for a, b in zip(x.split(n), y.split(n))]
        assert_close(relation_loss(x, y, n, centre=True), torch.stack(own).mean())
    # what is alike in a group, but not beyond it
    far = x.clone()
    far[:6] *= -1
    assert relation_loss(far, x, group=6) < 1e-14 < relation_loss(far, x)


# --- wavelets


@pytest.mark.parametrize("shape", [(2, 1, 2, 2), (3, 4, 6, 10), (1, 3, 32, 16)], ids=str)
def test_haar_is_an_orthogonal_map(shape):
    x, y = randn(*shape), randn(*shape, seed=1)
    bands = haar(x)
    assert all(b.shape == (*shape[:2], shape[2] // 2, shape[3] // 2) for b in bands)
    assert_close(unhaar(bands), x)
    # inner products stay
    assert_close(sum((a * b).sum() for a, b in zip(bands, haar(y))), (x * y).sum())
    assert_close(haar(unhaar(haar(y)))[3], haar(y)[3])
    assert_close(high_frequency(x), sum(bands[1:]))
    assert_close(bands[0], 2 * F.avg_pool2d(x, 2))


def test_haar_by_filters_and_what_each_band_sees():
    low, high = (torch.tensor([[s, 1.0]], dtype=F64) / 2**0.5 for s in (1.0, -1.0))
    filters = torch.stack([low.T * low, low.T * high, high.T * low, high.T * high])[:, None]
    x = randn(3, 1, 8, 6)
    assert_close(torch.cat(haar(x), 1), F.conv2d(x, filters, stride=2))
    total = F.conv2d(x, filters[1:].sum(0, keepdim=True), stride=2)
    assert_close(high_frequency(x), total)
    assert_close(filters[1:].sum(0)[0], torch.tensor([[-1.0, -1.0], [-1.0, 3.0]], dtype=F64) / 2)
    right = torch.tensor([[0.0, 1.0], [0.0, 1.0]])[None, None]
    sees = lambda v: [round(b.item(), 6) for b in haar(v)]
    assert sees(right) == [1, 1, 0, 0]
    assert sees(right.mT) == [1, 0, 1, 0]
    assert sees(torch.eye(2)[None, None]) == [1, 0, 0, 1]
    assert high_frequency(torch.full((1, 2, 4, 4), 3.7)).abs().max() < 1e-6


def test_haar_against_pywavelets():
    pywt = pytest.importorskip("pywt")
    x = randn(2, 3, 8, 12)
    ll, (dh, dv, dd) = pywt.dwt2(x.numpy(), "haar", axes=(2, 3))
    # PyWavelets counts differences from the first pixel, and names bands by what they show
    for ours, theirs, sign in zip(haar(x), (ll, dv, dh, dd), (1, -1, -1, 1)):
        assert_close(ours, sign * torch.from_numpy(theirs))


def test_what_the_sum_of_bands_does_not_see():
    v = randn(1, 1, 3, 3)
    x = unhaar((0 * v, v, -v, 0 * v))
    assert x.square().sum() > 1 and high_frequency(x).abs().max() < 1e-14


# --- diversity and copies


def test_diversity_by_hand():
    ref = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 99.0]])
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [10.0, 0.0], [10.0, 1.0], [10.0, 2.0]])
    # clusters of two and three; the third reference has none
    assert intra_cluster_diversity(x, ref) == pytest.approx((5 + 4 / 3) / 2)
    assert_close(copy_distance(x, ref), torch.tensor([0, 5, 0, 1, 2], dtype=F64))
    # a cluster of one counts for nothing
    more = torch.cat([x, torch.tensor([[0.0, 98.0]])])
    assert intra_cluster_diversity(more, ref) == pytest.approx((5 + 4 / 3) / 2)


def test_copies_are_copies_at_any_size():
    ref = 1e3 + randn(10, 1, 8, 8, dtype=torch.float32)
    x = ref.repeat(4, 1, 1, 1)
    assert intra_cluster_diversity(x, ref) == 0
    assert copy_distance(x, ref).abs().max() == 0
    assert copy_distance(x[:3] + 1, ref).min() > 7.9  # the square root of 64 numbers


# --- the loss


def little(kind="v", process=vp, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return NetDenoiser(MLP(16, hidden=8, depth=1), process, kind).to(dtype)


def stirred(model, seed=9):  # the head of an untrained MLP is 0
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model


X = randn(6, 1, 4, 4, dtype=torch.float32)
T = torch.linspace(0.1, 0.9, 6)
EPS = randn(6, 1, 4, 4, seed=5, dtype=torch.float32)
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]


@pytest.mark.parametrize("kind", ["x0", "eps", "v", "score", "flow", "edm"])
def test_without_weights_it_is_the_denoising_loss(kind):
    for process in PROCESSES:
        m = stirred(little(kind, process))
        loss = DomainStudioLoss(little(kind, process, 1), 0, 0, 0)
        a, b = loss(m, X, generator=rng(1)), m.loss(X, generator=rng(1))
        # edm: the error of x0, divided afterwards
        assert_close(a, b, rtol=1e-4 if kind == "edm" else 1e-6, atol=0)
        assert_close(loss(m, X, T, EPS), m.loss(X, T, eps=EPS), rtol=1e-4, atol=0)
        torch.manual_seed(3)
        a = loss(m, X)
        torch.manual_seed(3)
        assert_close(a, m.loss(X), rtol=1e-4, atol=0)


def test_the_terms_by_hand():
    m, source = stirred(little("eps")), stirred(little("eps", seed=1), 8)
    loss = DomainStudioLoss(source, 3.0, 5.0, 7.0)
    x = vp.noise(X, T, EPS)
    mine, theirs = m(x, T).x0, source(x, T).x0
    hf = high_frequency
    cap = (vp.alpha(T) / vp.sigma(T)).square().clamp(max=1)
    want = {
        "denoise": m.loss(X, T, eps=EPS),
        "pair": by_loops(mine, theirs),
        "hf_pair": by_loops(hf(mine), hf(theirs)),
        "hf_mse": (cap.float() * (hf(mine) - hf(X)).square().mean((1, 2, 3))).mean(),
    }
    found = loss.parts(m, X, T, EPS)
    assert list(found) == list(want)
    for k, v in want.items():
        assert_close(found[k], v, rtol=1e-4, atol=1e-7, check_dtype=False)
    total = want["denoise"] + 3 * want["pair"] + 5 * want["hf_pair"] + 7 * want["hf_mse"]
    assert_close(loss(m, X, T, EPS), total, rtol=1e-4, atol=0, check_dtype=False)
    halves = DomainStudioLoss(source, group=3, hf_mse=0.0).parts(m, X, T, EPS)
    own = by_loops(mine[:3], theirs[:3]) / 2 + by_loops(mine[3:], theirs[3:]) / 2
    assert_close(halves["pair"], own, rtol=1e-4, atol=1e-7)
    assert "hf_mse" not in halves
    middle = DomainStudioLoss(source, centre=True).parts(m, X, T, EPS)["pair"]
    assert_close(middle, relation_loss(mine, theirs, centre=True))


@pytest.mark.parametrize("cap", [None, 1.0, 0.1])
def test_the_weight_of_the_high_frequencies(cap):
    # an error of the noise weighs sigma^2 / alpha^2, an error of v weighs sigma^2
    for kind, factor in (("eps", lambda a, s: s / a), ("v", lambda a, s: s)):
        m = stirred(little(kind, dtype=F64))
        for t in (0.05, 0.5, 0.99):
            a, s = float(vp.alpha(t)), float(vp.sigma(t))
            x0, eps, at = X.double(), EPS.double(), torch.full((6,), t, dtype=F64)
            goal = eps if kind == "eps" else a * eps - s * x0
            off = high_frequency(m(vp.noise(x0, at, eps), at).get(kind) - goal).square().mean()
            w = 1.0 if cap is None else min(1.0, cap * (a / s) ** 2)
            found = DomainStudioLoss(m, snr_cap=cap).parts(m, x0, at, eps)["hf_mse"]
            assert_close(found, w * factor(a, s) ** 2 * off, rtol=1e-8, atol=0)


def test_a_model_without_noise_at_the_end_of_the_clock():
    # sigma = 0: the ratio is infinite, the weight 1, the noise irrelevant
    m, t = stirred(little("v", Flow())), torch.zeros(6)
    found = DomainStudioLoss(little("v", Flow(), 1)).parts(m, X, t, EPS)
    assert all(v.isfinite() for v in found.values())
    assert_close(found["hf_mse"], torch.tensor(0.0), rtol=0, atol=1e-12)  # v is known there


def test_the_source_is_a_frozen_copy_in_evaluation_mode():
    net = nn.Sequential(
        nn.Flatten(), nn.Dropout(0.5), nn.Linear(16, 16), nn.Unflatten(1, (1, 4, 4))
    )

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t):
            return self.net(x)

    m = NetDenoiser(Net(), vp, "v").train()
    loss = DomainStudioLoss(m)
    assert not loss.source.training and m.training
    before = copy.deepcopy(loss.source.state_dict())
    m.eval()
    # the model is its own source: no relation has changed
    assert loss.parts(m, X, T, EPS)["pair"] == 0
    opt = torch.optim.SGD(m.parameters(), 1.0)
    for _ in range(3):
        opt.zero_grad()
        loss(m, X).backward()
        opt.step()
    assert all(p.grad is None for p in loss.source.parameters())
    for k, v in loss.source.state_dict().items():
        assert torch.equal(v, before[k])
    assert not torch.equal(m.net.net[2].weight, loss.source.net.net[2].weight)
    assert loss.parts(m, X, T, EPS)["pair"] > 0


def test_one_evaluation_of_each():
    m, source = Counter(stirred(little())), Counter(stirred(little(seed=1)))
    loss = DomainStudioLoss(source)
    loss(m, X)
    assert (m.calls, loss.source.calls) == (1, 1)
    loss = DomainStudioLoss(source, 0.0, 0.0, 1.0)  # nothing to ask the source
    loss(m, X)
    assert (m.calls, loss.source.calls) == (2, 0)


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.seen = UNet(1, 4, (1, 1), classes=3, heads=1), []

    def forward(self, x, t, label):
        self.seen.append(label.tolist())
        return self.net(x, t, label)


def test_conditions_and_prior():
    m = stirred(NetDenoiser(Labelled(), vp, "eps"))
    cond = {"label": torch.tensor([1])}
    loss = DomainStudioLoss(m, prior=2.0, source_cond=cond)
    own = randn(4, 1, 4, 4, seed=7, dtype=torch.float32)
    batch = {"x0": X, "label": torch.full((6,), 2), "prior": own}
    m.net.seen.clear()
    parts = loss.parts(m, batch, T, EPS, generator=rng(2))
    assert m.net.seen == [[2] * 6, [1] * 4]
    assert loss.source.net.seen[-1] == [1] * 6
    assert set(batch) == {"x0", "label", "prior"}  # not taken apart
    label = torch.ones(4, dtype=torch.long)
    assert_close(parts["prior"], m.loss(own, generator=rng(2), label=label))
    total = loss(m, batch, T, EPS, generator=rng(2))
    weighted = sum(parts[k] * w for k, w in dict(pair=2, hf_pair=2, hf_mse=1, prior=2).items())
    assert_close(total, parts["denoise"] + weighted)
    # without a condition of its own, the source has the batch's
    DomainStudioLoss(m).parts(m, {"x0": X, "label": torch.arange(6) % 3}, T, EPS)
    plain = DomainStudioLoss(m)
    plain(m, {"x0": X, "label": torch.arange(6) % 3})
    assert plain.source.net.seen[-1] == [0, 1, 2, 0, 1, 2]


class Half(Wrapped):  # a user's wrapper: its predictions are of x0
    def forward(self, x, t, **cond):
        p = self.inner(x, t, **cond)
        return Prediction.of(x, t, self.process, x0=p.x0 / 2)


class Own(Denoiser):  # a user's denoiser that is no NetDenoiser
    def __init__(self):
        super().__init__()
        self.process, self.scale = Cosine(), nn.Parameter(torch.tensor(0.7))

    def forward(self, x, t):
        return Prediction.of(x, t, self.process, eps=self.scale * x)


def test_any_denoiser():
    exact = MixtureDenoiser(GaussianMixture.kde(randn(20, 1, 4, 4), 0.3), vp)
    inner = stirred(little())
    for m in (exact, Half(inner), cfg(inner, 1.0), Own()):
        parts = DomainStudioLoss(m).parts(m, X, T, EPS)
        assert all(v.isfinite() for v in parts.values())
        assert parts["pair"].abs() < 1e-6
    x = vp.noise(X, T, EPS)
    found = DomainStudioLoss(exact).parts(exact, X, T, EPS)["denoise"]
    assert_close(found, (exact(x, T).x0 - X).square().mean())
    own = Own()
    DomainStudioLoss(own)(own, X).backward()
    assert own.scale.grad.abs() > 0


def test_networks_side_by_side_have_relations_of_their_own():
    nets = [stirred(MLP(16, hidden=8, depth=1), s) for s in (1, 2)]
    both = NetDenoiser(Stacked(nets), vp, "v")
    source = stirred(little(), 3)
    t, eps = T.repeat(2), EPS.repeat(2, 1, 1, 1)
    found = DomainStudioLoss(source, group=6).parts(both, X.repeat(2, 1, 1, 1), t, eps)
    for k in found:
        one = [DomainStudioLoss(source).parts(NetDenoiser(n, vp, "v"), X, T, EPS)[k] for n in nets]
        assert_close(found[k], torch.stack(one).mean(), rtol=1e-4, atol=1e-7)


# --- adaptation


def test_adapt_leaves_the_source_and_brings_the_domain():
    m = stirred(little("x0"))
    before = copy.deepcopy(m.state_dict())
    ten = 0.5 + 0.1 * randn(10, 1, 4, 4, seed=3, dtype=torch.float32)
    fair = dict(progress=False, seed=1)
    run = adapt(m, ten, 150, 1e-2, **fair)
    assert run.step == 150 and run.samples == 1500  # all ten in a step
    for k, v in m.state_dict().items():
        assert torch.equal(v, before[k])
    x = sample(
        run.ema, DDIM(), randn(50, 1, 4, 4, dtype=torch.float32), time_grid(vp, 10), progress=False
    )
    # the mean of the ten is 0.5; the source's samples are anywhere
    assert (x.mean(0) - ten.mean(0)).abs().mean() < 0.1
    again = adapt(m, ten, 150, 1e-2, **fair)
    assert torch.equal(run.losses, again.losses)
    # an averaged model is frozen, and adapts all the same
    assert not any(p.requires_grad for p in run.ema.parameters())
    assert adapt(run.ema, ten, 2, progress=False).step == 2


def test_adapt_trains_what_is_free_and_takes_any_loss():
    m = stirred(little())
    for p in m.net.inp.parameters():
        p.requires_grad_(False)
    run = adapt(m, X, 2, 1e-2, progress=False)
    assert torch.equal(run.model.net.inp.weight, m.net.inp.weight)
    assert not torch.equal(run.model.net.head.weight, m.net.head.weight)
    seen = []

    def loss(model, batch):
        seen.append(len(batch))
        return model.loss(batch)

    adapt(m, randn(40, 1, 4, 4, dtype=torch.float32), 1, loss=loss, progress=False)
    adapt(m, X, 1, loss=loss, progress=False, batch_size=4)
    assert seen[0] == 24 and seen[-1] == 4


def test_vectors_without_rows_and_columns():
    m = stirred(NetDenoiser(MLP(2, hidden=8, depth=1), vp, "v"))
    x = randn(8, 2, dtype=torch.float32)
    run = adapt(m, x, 2, loss=DomainStudioLoss(m, hf_pair=0, hf_mse=0), progress=False)
    assert run.step == 2
    with pytest.raises(ValueError, match="set the weights hf_pair and hf_mse to 0"):
        adapt(m, x, 2, progress=False)


# --- bad input

M = little()
BAD = [
    (lambda: relation_loss(X[:2], X[:2]), ValueError, "3 or more images.*got 2"),
    (lambda: relation_loss(X, X[:3]), ValueError, r"one shape, got \(6, 1, 4, 4\) and \(3, 1"),
    (lambda: relation_loss(X, X, group=4), ValueError, "group=4 must divide.*6 images"),
    (lambda: relations(X, group=2), ValueError, "group must be 3 or more.*got 2"),
    (lambda: relations(X, group=3.0), ValueError, "got 3.0"),
    (lambda: relations(torch.zeros(5)), ValueError, r"shape \(B, ...\), got \(5,\)"),
    (lambda: relations([1, 2, 3]), ValueError, "got list"),
    (lambda: relations(X[:0], group=3), ValueError, "which has 0 images"),
    (lambda: haar(torch.zeros(1, 1, 3, 4)), ValueError, r"even H and W, got \(1, 1, 3, 4\)"),
    (lambda: haar(torch.zeros(4, 4)), ValueError, r"got \(4, 4\)"),
    (lambda: high_frequency(torch.zeros(1, 1, 4, 5)), ValueError, r"got \(1, 1, 4, 5\)"),
    (lambda: unhaar(haar(X)[:3]), ValueError, "bands must be four"),
    (lambda: copy_distance(X, X[..., :2]), ValueError, "got 16 and 8"),
    (lambda: copy_distance(X, torch.zeros(5)), ValueError, r"references.*got \(5,\)"),
    (lambda: copy_distance([1], X), ValueError, "samples.*got list"),
    (lambda: intra_cluster_diversity(X, X), ValueError, "6 samples went to 6 different"),
    (lambda: DomainStudioLoss(M, pair=-1), ValueError, "pair.*got -1"),
    (lambda: DomainStudioLoss(M, hf_pair="2"), ValueError, "hf_pair.*got '2'"),
    (lambda: DomainStudioLoss(M, hf_mse=math.nan), ValueError, "hf_mse.*got nan"),
    (lambda: DomainStudioLoss(M, snr_cap=-0.5), ValueError, "snr_cap.*got -0.5"),
    (lambda: DomainStudioLoss(M, prior=True), ValueError, "prior.*got True"),
    (lambda: DomainStudioLoss(M, group=2), ValueError, "group.*got 2"),
    (lambda: DomainStudioLoss(M, source_cond=3), TypeError, "source_cond.*got int"),
    (lambda: DomainStudioLoss(M, temperature=2), TypeError, "temperature"),
    (lambda: DomainStudioLoss(M)(little(process=Flow()), X), ValueError, "process of the source"),
    (lambda: DomainStudioLoss(M)(M, X[:2]), ValueError, "3 or more images"),
    (lambda: DomainStudioLoss(M, prior=1.0)(M, X), ValueError, "the batch has none"),
    (lambda: DomainStudioLoss(M)(M, {"x0": X, "prior": X}), ValueError, "the batch has one"),
    (lambda: DomainStudioLoss(M)(M, {"images": X}), ValueError, "x0"),
    (lambda: adapt(M, X, 0, progress=False), ValueError, "steps"),
    (lambda: adapt(M, X, 1, epochs=3), TypeError, "epochs"),
]


@pytest.mark.parametrize("call, error, says", BAD, ids=[b[2] for b in BAD])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_every_parameter_is_annotated():
    for name in module.__all__:
        f = getattr(module, name)
        for p in inspect.signature(f).parameters.values():
            if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "images":
                assert p.annotation is not p.empty, (name, p.name)
