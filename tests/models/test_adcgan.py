"""ADC-GAN: the losses against cross-entropies and against the official lines, the identities of the
optimal judge, the exact game, a classifier trained to its closed form, and the training loop."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import diffkit.models.adcgan as module
from diffkit.core.nets import Stacked
from diffkit.core.training import fit
from diffkit.models.adcgan import (
    AuxLoss,
    ConditionalGAN,
    Objective,
    fit_gan,
    gan_loss,
    optimal_judge,
    tabular_game,
    tabular_objective,
)

F64 = torch.float64
KINDS = ("none", "ac", "tac", "adc", "am", "projection")
GANS = ("hinge", "ns", "ls", None)
PAIRS = [(a, g) for a in KINDS for g in GANS if g or a not in ("none", "projection")]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def joint(n=7, K=3, seed=0):
    t = torch.rand(n, K, generator=rng(seed), dtype=F64) + 0.05
    return t / t.sum()


def kl(q, p):
    return (q * (q / p).log()).sum().item()


P, Q = joint(seed=1), joint(seed=2)
p, q = P.sum(1, keepdim=True), Q.sum(1, keepdim=True)


class G(nn.Module):  # generator(z, y)
    def __init__(self, nz=3, out=2, classes=4):
        super().__init__()
        self.label, self.body = nn.Embedding(classes, nz), nn.Linear(nz, out)

    def forward(self, z, y):
        return self.body(torch.tanh(z + self.label(y)))


def toy(aux="adc", gan="hinge", weight=1.0, seed=0, nz=3, **k):
    torch.manual_seed(seed)
    o = Objective(4, aux, gan, weight)
    return ConditionalGAN(
        G(nz), nn.Sequential(nn.Linear(2, 8), nn.SELU(), nn.Linear(8, o.outputs)), o, nz, **k
    )


X, Y = torch.randn(60, 2, generator=rng(8)), torch.arange(60) % 4


# --- the losses


def test_losses_are_the_official_cross_entropies():
    """Its layout is real and fake in turns, label 2y and 2y + 1; re-derived from its lines."""
    K, y, z = 5, torch.arange(40) % 5, (torch.arange(40) * 3) % 5
    ce = F.cross_entropy
    r, f = randn(40, 2 * K, seed=1), randn(40, 2 * K, seed=2)
    turns = lambda c: torch.stack([c[:, :K], c[:, K:]], 2).flatten(1)
    adc = AuxLoss("adc", K)
    assert_close(adc.critic(r, y, f, z), ce(turns(r), 2 * y) + ce(turns(f), 2 * z + 1))
    # a difference of two logits: rounding only
    want = ce(turns(f), 2 * z) - ce(turns(f), 2 * z + 1)
    assert_close(adc.generator(f, z), want, rtol=1e-12, atol=1e-12)
    twin = AuxLoss("tac", K)
    assert_close(twin.critic(r, y, f, z), ce(r[:, :K], y) + ce(f[:, K:], z))
    assert_close(twin.generator(f, z), ce(f[:, :K], z) - ce(f[:, K:], z))
    ac, am = AuxLoss("ac", K), AuxLoss("am", K)
    assert_close(ac.critic(r[:, :K], y, f[:, :K], z), ce(r[:, :K], y))
    assert_close(ac.generator(f[:, :K], z), ce(f[:, :K], z))
    m = K + 1
    fake = torch.full_like(z, K)
    assert_close(am.critic(r[:, :m], y, f[:, :m], z), ce(r[:, :m], y) + ce(f[:, :m], fake))
    assert_close(am.generator(f[:, :m], z), ce(f[:, :m], z))


def test_the_multi_class_hinge_has_the_same_generator_up_to_a_factor():
    K, c, y = 4, randn(30, 8, seed=3), torch.arange(30) % 4

    def linear_hinge(label):  # mean over the other logits of (other - own)
        own = c.gather(1, label[:, None])
        return ((c - own).sum(1) / (2 * K - 1)).mean()

    want = 2 * K / (2 * K - 1) * AuxLoss("adc", K).generator(c, y)
    assert_close(linear_hinge(y) - linear_hinge(K + y), want)


@pytest.mark.parametrize("kind", KINDS)
def test_reductions_and_sizes(kind):
    aux, y = AuxLoss(kind, 4), torch.arange(12) % 4
    c = randn(12, aux.outputs, seed=4)
    assert_close(aux.generator(c, y, "none").mean(), aux.generator(c, y))
    assert aux.generator(c, y, "none").shape == (12,)
    # two means: the sizes of real and fake batches do not matter
    many, ym = torch.cat([c, c, c]), torch.cat([y, y, y])
    assert_close(aux.critic(c, y, many, ym), aux.critic(c, y, c, y))
    assert aux.outputs == dict(none=0, ac=4, tac=8, adc=8, am=5, projection=4)[kind]


def test_gan_losses_by_hand():
    r, f = randn(50, seed=5), randn(50, seed=6)
    d, g = gan_loss("hinge")
    assert_close(d(r, f), (1 - r).clamp(min=0).mean() + (1 + f).clamp(min=0).mean())
    assert_close(g(f), -f)
    d, g = gan_loss("ns")
    assert_close(d(r, f), -(r.sigmoid().log().mean() + (1 - f.sigmoid()).log().mean()))
    assert_close(g(f), -f.sigmoid().log())
    d, g = gan_loss("ls")
    assert_close(d(r, f), 0.5 * ((r - 1) ** 2).mean() + 0.5 * (f**2).mean())
    assert_close(g(f), 0.5 * (f - 1) ** 2)
    d, g = gan_loss(None)
    assert d(r, f) == 0 and (g(f) == 0).all()


def test_projection_is_a_discriminator_of_pairs():
    o, out, y = Objective(4, "projection", "ns"), randn(20, 5, seed=7), torch.arange(20) % 4
    d = out[:, 0] + (out[:, 1:] * F.one_hot(y, 4)).sum(1)
    assert_close(o.generator(out, y, "none"), F.softplus(-d))
    # another label, another logit
    assert not torch.allclose(o.generator(out, y, "none"), o.generator(out, (y + 1) % 4, "none"))


# --- the optimal judge


@pytest.mark.parametrize("aux, gan", PAIRS, ids=str)
def test_the_judge_is_optimal(aux, gan):
    """The expectation of the critic's loss over tables, by rows repeated in proportion."""
    n, K = P.shape
    cell, label = torch.arange(n).repeat_interleave(K), torch.arange(K).repeat(n)
    count = [torch.round(300 * T).long().flatten().clamp(min=1) for T in (P, Q)]
    P0, Q0 = (c.view(n, K).double() / c.sum() for c in count)
    i, j = (torch.repeat_interleave(torch.arange(n * K), c) for c in count)
    o = Objective(K, aux, gan)
    J = optimal_judge(P0, Q0, o)
    assert J.shape == (n, o.outputs) and J.dtype == F64
    risk = lambda J: o.critic(J[cell[i]], label[i], J[cell[j]], label[j]).item()
    least = risk(J)
    for s in range(20):
        assert risk(J + 0.2 * randn(n, o.outputs, seed=s)) > least - 1e-12
    # and no first-order way down, where it is smooth
    if gan != "hinge":
        J.requires_grad_()
        o.critic(J[cell[i]], label[i], J[cell[j]], label[j]).backward()
        assert J.grad.abs().max() < 1e-12


def test_identities():
    value = lambda aux, gan=None, w=1.0: tabular_objective(P, Q, Objective(3, aux, gan, w))
    entropy = -(Q * (Q / q).log()).sum().item()
    ns = (Q * (1 + q / p).log()).sum().item()
    M = (p + q) / 2
    joint_kl, marginal = kl(Q, P), kl(q, p)
    # rounding in float64
    near = dict(rel=0, abs=1e-12)
    assert value("adc") == pytest.approx(joint_kl, **near)
    assert value("tac") == pytest.approx(joint_kl - marginal, **near)
    assert value("ac") == pytest.approx(joint_kl - marginal + entropy, **near)
    assert value("am") == pytest.approx(joint_kl + entropy - kl(q, M) + math.log(2), **near)
    assert value("am") == pytest.approx(value("ac", "ns"), **near)
    assert value("none", "ns") == pytest.approx(ns, **near)
    assert value("adc", "ns", 0.7) == pytest.approx(ns + 0.7 * joint_kl, **near)
    tv = lambda a, b: (b * (b - a).sign()).sum().item()
    assert value("none", "hinge") == pytest.approx(tv(p, q), **near)
    assert value("none", "ls") == pytest.approx((q * (q / (p + q)) ** 2).sum().item() / 2, **near)
    assert value("projection", "ns") == pytest.approx((Q * (1 + Q / P).log()).sum().item(), **near)
    assert value("projection", "hinge") == pytest.approx(tv(P, Q), **near)


def test_a_divergence_is_zero_at_the_data_and_takes_empty_cells():
    adc = Objective(3, "adc", None)
    assert abs(tabular_objective(P, P, adc)) < 1e-12
    hole = Q.clone()
    hole[0, 0] = 0
    hole = hole / hole.sum()
    keep = hole > 0
    want = (hole[keep] * (hole[keep] / P[keep]).log()).sum().item()
    assert tabular_objective(P, hole, adc) == pytest.approx(want, abs=1e-12)


def test_a_trained_classifier_finds_the_closed_form():
    """2K logits, linear in features that hold the truth, on samples of two Gaussian mixtures."""
    mean = torch.tensor([[-1.0, 1.0], [-0.3, 1.6]])  # real, fake; class 0, 1
    n, y = 20000, torch.arange(20000) % 2
    draw = lambda i: (mean[i][y] + torch.randn(n, generator=rng(i)))[:, None]
    real, fake = draw(0), draw(1)
    net, aux = nn.Linear(2, 4), AuxLoss("adc", 2)
    feature = lambda x: torch.cat([x, x**2], 1)

    def loss(net, batch):
        r, f, k = batch
        return aux.critic(net(feature(r)), k, net(feature(f)), k)

    run = fit(net, loss, (real, fake, y), 1500, 1e-2, batch_size=1000, ema=0.99, progress=False)
    x = torch.linspace(-3, 3, 61)[:, None]
    density = (-0.5 * (x - mean.flatten()) ** 2).exp()  # real 0, real 1, fake 0, fake 1
    want = density / density.sum(1, keepdim=True)
    got = run.ema(feature(x)).softmax(1)
    # total variation; 20,000 samples leave about 0.01
    assert (0.5 * (got - want).abs().sum(1)).max() < 0.05


# --- the game


def conditional(T):
    return T / T.sum(0)


@pytest.mark.parametrize("weight", [0.05, 1.0, 8.0])
def test_adc_ends_at_the_data(weight):
    for gan in (None, "ns"):
        end = tabular_game(P, Objective(3, "adc", gan, weight))
        assert (end - P).abs().sum() / 2 < 1e-9
    one = tabular_game(P, Objective(3, "adc", None, weight), steps=1, rate=1 / weight, start=Q)
    assert_close(one, P, rtol=1e-9, atol=1e-12)  # log Q - log (Q / P) = log P


def test_gradient_descent_on_logits_ends_there_too():
    """The published dynamics, Adam on logits with the judge held fixed, not only eq. (7)."""
    ends = {}
    for aux in ("adc", "ac"):
        theta = torch.zeros(7, 3, dtype=F64, requires_grad=True)
        opt, o = torch.optim.Adam([theta], 0.05), Objective(3, aux, None)
        y = torch.arange(3).repeat(7)
        for _ in range(1500):
            T = theta.softmax(0) * P.sum(0)
            rows = optimal_judge(P, T.detach(), o).repeat_interleave(3, 0)
            opt.zero_grad()
            (T * o.generator(rows, y, "none").view(7, 3)).sum().backward()
            opt.step()
        ends[aux] = T.detach()
    assert (ends["adc"] - P).abs().sum() / 2 < 1e-3
    c = conditional(ends["ac"])
    assert c.argmax(0).equal((P / p).argmax(0)) and c.max(0).values.min() > 0.9  # on its way


def test_ac_without_a_discriminator_collapses_as_powers():
    got = conditional(tabular_game(P, Objective(3, "ac", None), steps=6, rate=0.5, start=Q))
    assert_close(got, (conditional(Q).log() + 3 * (P / p).log()).softmax(0))


def test_am_is_ac_with_a_discriminator():
    for steps in (1, 10, 200):
        am = tabular_game(P, Objective(3, "am", None), steps=steps, rate=0.4)
        assert_close(am, tabular_game(P, Objective(3, "ac", "ns"), steps=steps, rate=0.4))


def test_tac_needs_the_discriminator():
    alone, both = Objective(3, "tac", None), Objective(3, "tac", "ns")
    ends = [tabular_game(P, alone, start=s, steps=3000) for s in (None, Q)]
    for T in ends:
        assert_close(T / T.sum(1, keepdim=True), P / p, atol=1e-6, rtol=0.0)
    assert (ends[0] - ends[1]).abs().sum() > 1e-3
    assert_close(tabular_game(P, both, steps=1500), P, atol=1e-8, rtol=0.0)


def test_fixed_points_have_equal_losses_within_a_class():
    o = Objective(3, "adc", "ns", 0.5)
    skew = tabular_game(P, o, [0.6, 0.3, 0.1], steps=3000)
    assert_close(skew.sum(0), torch.tensor([0.6, 0.3, 0.1], dtype=F64))
    rows = optimal_judge(P, skew, o).repeat_interleave(3, 0)
    cost = o.generator(rows, torch.arange(3).repeat(7), "none").view(7, 3)
    assert (cost.max(0).values - cost.min(0).values).max() < 1e-9
    # with D the classes are bent, without they are not
    assert (conditional(skew) - conditional(P)).abs().max() > 1e-2
    free = tabular_game(P, Objective(3, "adc", None, 0.5), [0.6, 0.3, 0.1])
    assert_close(conditional(free), conditional(P), atol=1e-9, rtol=0.0)


@pytest.mark.parametrize("aux, gan", [x for x in PAIRS if x[1] != "hinge"], ids=str)
def test_names_of_classes_do_not_matter(aux, gan):
    perm, o = torch.tensor([2, 0, 1]), Objective(3, aux, gan, 0.8)
    a = tabular_game(P, o, steps=40, start=Q)[:, perm]
    assert_close(a, tabular_game(P[:, perm], o, steps=40, start=Q[:, perm]))
    assert tabular_game(P, o, steps=0, start=Q).sum(0).allclose(P.sum(0))


# --- the model


def test_each_loss_moves_one_player():
    model = toy()
    frozen = model.judge[0].weight.requires_grad_(False)
    for loss, own in (
        (model.critic_loss(X, Y), model.judge),
        (model.generator_loss(Y), model.generator),
    ):
        model.zero_grad()
        loss.backward()
        for net in (model.judge, model.generator):
            grads = [v.grad is not None for v in net.parameters() if v is not frozen]
            assert all(grads) if net is own else not any(grads)
    assert not frozen.requires_grad  # what was frozen stays so
    model.judge.forward = lambda x: x
    with pytest.raises(ValueError, match="needs 9 outputs"):
        model.generator_loss(Y)
    assert all(v.requires_grad for v in model.parameters() if v is not frozen)


def test_losses_by_hand():
    model, z = toy(gan="ns", weight=0.3), torch.randn(60, 3, generator=rng(4))
    fake = model.generator(z, Y)
    r, f = model.judge(X), model.judge(fake)
    ce = F.cross_entropy
    want = F.softplus(-r[:, 0]).mean() + F.softplus(f[:, 0]).mean()
    want = want + 0.3 * (ce(r[:, 1:], Y) + ce(f[:, 1:], 4 + Y))
    assert_close(model.critic_loss(X, Y, rng(4)), want)
    want = F.softplus(-f[:, 0]).mean() + 0.3 * (ce(f[:, 1:], Y) - ce(f[:, 1:], 4 + Y))
    assert_close(model.generator_loss(Y, rng(4)), want)


class TwoHeads(nn.Module):
    def __init__(self, more):
        super().__init__()
        self.trunk, self.head = nn.Linear(2, 6), nn.Linear(6, 1)
        self.more = nn.Linear(6, more) if more else None

    def forward(self, x):
        h = self.trunk(x)
        return torch.cat([self.head(h), self.more(h)], 1) if self.more else self.head(h)


def test_weight_zero_is_the_plain_gan():
    grads = []
    for aux, weight in (("adc", 0.0), ("none", 1.0)):
        torch.manual_seed(3)
        g, o = G(), Objective(4, aux, "hinge", weight)
        judge = TwoHeads(o.outputs - 1)
        loss = ConditionalGAN(g, judge, o, nz=3).critic_loss(X, Y, rng(1))
        own = [*judge.trunk.parameters(), *judge.head.parameters()]
        grads.append(torch.autograd.grad(loss, own))
    assert all(a.equal(b) for a, b in zip(*grads))


def test_labels_asked_for():
    assert toy().ask(Y) is Y
    model, n = toy(class_probs=[3.0, 1.0, 0.0, 0.0]), 4000
    asked = model.ask(torch.zeros(n, dtype=torch.long), rng(1))
    share = torch.bincount(asked, minlength=4) / n
    # four and a half standard errors
    assert (share[:2] - torch.tensor([0.75, 0.25])).abs().max() < 4.5 * (0.1875 / n) ** 0.5
    assert (share[2:] == 0).all() and asked.dtype == torch.long
    seen = []
    model.generator.forward = lambda z, y: (seen.append(y), z[:, :2])[1]
    # generator and classifier get what was asked, not the data's labels
    plain = model.objective.critic
    model.objective.critic = lambda *args: (seen.extend(args), plain(*args))[1]
    model.critic_loss(X, Y, rng(2))
    asked, _, y_real, _, y_fake = seen
    assert (asked < 2).all() and y_fake.equal(asked) and y_real.equal(Y)


def test_samples_follow_the_labels_latents_and_seeds():
    model = toy()
    z = torch.randn(60, 3, generator=rng(5))
    assert model.sample(Y, z).equal(model.generator(z, Y))
    assert model.sample(Y, generator=rng(6)).equal(model.sample(Y, generator=rng(6)))
    assert not model.sample(Y).requires_grad and model.fake(Y).requires_grad
    # permuted names of classes permute the samples
    perm = torch.tensor([2, 0, 3, 1])
    other = toy()
    other.generator.label.weight.data[perm] = model.generator.label.weight.data.clone()
    assert other.sample(perm[Y], z).equal(model.sample(Y, z))


# --- training


@pytest.mark.parametrize("critic_steps", [1, 3])
def test_training_is_the_published_alternation(critic_steps, monkeypatch):
    batches, plain = [], ConditionalGAN.critic_loss

    def watch(self, x, y, *a):
        batches.append((x.clone(), y.clone(), torch.get_rng_state()))
        return plain(self, x, y, *a)

    monkeypatch.setattr(ConditionalGAN, "critic_loss", watch)
    options = dict(critic_steps=critic_steps, batch_size=10, ema=None, progress=False)
    run = fit_gan(toy(), (X, Y), 4, 2e-3, 1e-3, **options)
    assert len(batches) == 4 * critic_steps and all(len(b[0]) == 10 for b in batches)
    model = toy()
    adam = lambda net, lr: torch.optim.Adam(net.parameters(), lr, betas=(0.0, 0.999))
    d, g = adam(model.judge, 1e-3), adam(model.generator, 2e-3)
    for i, (x, y, state) in enumerate(batches):
        torch.set_rng_state(state)
        d.zero_grad()
        plain(model, x, y).backward()
        d.step()
        if (i + 1) % critic_steps == 0:
            g.zero_grad()
            model.generator_loss(y).backward()
            g.step()
    for a, b in zip(run.model.parameters(), model.parameters()):
        assert_close(a, b)
    assert set(run.losses) == {"critic", "generator"}


def test_training_resumes_bit_for_bit(tmp_path):
    options = dict(batch_size=10, critic_steps=2, ema=0.9, progress=False)
    whole = fit_gan(toy(), (X, Y), 9, **options)
    file = tmp_path / "run.safetensors"
    fit_gan(toy(), (X, Y), 5, checkpoint=file, **options)
    rest = fit_gan(toy(seed=7), (X, Y), 9, checkpoint=file, **options)
    assert rest.resumed == 5
    for a, b in zip(whole.ema.parameters(), rest.ema.parameters()):
        assert a.equal(b)


@pytest.mark.parametrize("aux, gan", [("adc", None), ("adc", "ns"), ("ac", "ns")], ids=str)
def test_networks_end_where_the_exact_game_does(aux, gan):
    """Classes N(-1/2, 1) and N(1/2, 1): AC makes them too narrow, ADC does not. Three networks."""
    torch.manual_seed(0)
    y = torch.arange(6000) % 2
    x = (y - 0.5 + torch.randn(6000))[:, None]
    act = nn.LeakyReLU(0.2)
    body = lambda i, o: [nn.Linear(i, 24), act, nn.Linear(24, 24), act, nn.Linear(24, o)]

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Sequential(*body(4, 1))

        def forward(self, z, y):
            return self.f(torch.cat([z, F.one_hot(y, 2).to(z.dtype)], 1))

    o = Objective(2, aux, gan)
    judges = [nn.Sequential(*body(1, o.outputs)) for _ in range(3)]
    model = ConditionalGAN(Stacked([Wide() for _ in range(3)]), Stacked(judges), o, nz=2)
    options = dict(betas=(0.5, 0.999), batch_size=300, ema=0.98, progress=False)
    run = fit_gan(model, (x, y), 400, 2e-3, 5e-3, **options)
    asked = (torch.arange(3000) % 2).repeat(3)
    width = run.ema.sample(asked, generator=rng(1)).view(3, -1, 2).std(1).mean().item()
    at = torch.linspace(-5, 5, 101, dtype=F64)[:, None]
    truth = (-0.5 * (at - torch.tensor([-0.5, 0.5])) ** 2).exp()
    end = conditional(tabular_game(truth / truth.sum(), o))
    exact = ((end * at**2).sum(0) - (end * at).sum(0) ** 2).sqrt().mean().item()
    assert exact < 0.72 if aux == "ac" else abs(exact - 1) < 1e-3
    # a short training; the two ends are 0.29 apart
    assert abs(width - exact) < 0.14, (width, exact)


# --- bad input

C8, Y4 = torch.zeros(4, 8), torch.arange(4)
BAD = [
    (lambda: AuxLoss("acgan", 4), ValueError, "kind must be one of none, ac.*got 'acgan'"),
    (lambda: AuxLoss("adc", 1), ValueError, "num_classes.*got 1"),
    (lambda: AuxLoss("adc", 2.0), ValueError, "num_classes.*got 2.0"),
    (lambda: AuxLoss("adc", 4).generator(C8[:, :4], Y4), ValueError, "'adc' with 4.*needs 8.*4, 4"),
    (lambda: AuxLoss("adc", 4).generator(C8, Y4 + 1), ValueError, r"\[0, 4\), got 4"),
    (lambda: AuxLoss("adc", 4).generator(C8, Y4 - 1), ValueError, r"\[0, 4\), got -1"),
    (lambda: AuxLoss("adc", 4).generator(C8, Y4.float()), TypeError, "integers, got torch.float32"),
    (lambda: AuxLoss("adc", 4).generator(C8, Y4[:3]), ValueError, r"shape \(4,\), got \(3,\)"),
    (lambda: AuxLoss("adc", 4).generator(C8, Y4, "sum"), ValueError, "reduction.*got 'sum'"),
    (lambda: gan_loss("wgan"), ValueError, "hinge, ns, ls, None, got 'wgan'"),
    (lambda: Objective(4, "adc", "wgan"), ValueError, "got 'wgan'"),
    (lambda: Objective(4, weight=-1.0), ValueError, "weight.*got -1.0"),
    (lambda: Objective(4, weight=math.nan), ValueError, "weight.*got nan"),
    (lambda: Objective(4, "projection", None), ValueError, "nothing is left"),
    (lambda: Objective(4, "adc", None, 0.0), ValueError, "nothing is left"),
    (lambda: Objective(4).generator(C8, Y4), ValueError, r"needs 9 outputs.*\(4, 8\)"),
    (lambda: optimal_judge(P, Q[:3], Objective(3)), ValueError, "Q must be a table"),
    (lambda: optimal_judge(P, 2 * Q, Objective(3)), ValueError, "Q must be non-negative.*got 2"),
    (lambda: optimal_judge(torch.eye(3) / 3, P[:3], Objective(3)), ValueError, "Q|positive"),
    (lambda: tabular_game(torch.eye(3) / 3, Objective(3)), ValueError, "P must be positive"),
    (lambda: tabular_game(P, Objective(3), [0.5, 0.5]), ValueError, "class_probs must be 3"),
    (lambda: tabular_game(P, Objective(3), steps=1.5), ValueError, "steps.*got 1.5"),
    (lambda: tabular_game(P, Objective(3), rate=0.0), ValueError, "rate.*got 0.0"),
    (lambda: tabular_game(P, Objective(3), start=0 * P), ValueError, "start must be a positive"),
    (lambda: ConditionalGAN(G(), G(), Objective(4), nz=0), ValueError, "nz.*got 0"),
    (lambda: toy(class_probs=[-1.0, 2.0]), ValueError, "class_probs"),
    (lambda: toy(class_probs=[1.0, 2.0]), ValueError, "class_probs must be 4"),
    (lambda: toy().critic_loss(X[:, :1], Y), ValueError, r"samples of shape \(1,\), got \(2,\)"),
    (lambda: toy().critic_loss(X, Y + 1), ValueError, "labels.*got 4"),
    (lambda: fit_gan(nn.Linear(2, 2), (X, Y), 1), TypeError, "model.*got Linear"),
    (lambda: fit_gan(toy(), X, 1), TypeError, "pairs"),
    (lambda: fit_gan(toy(), (X, Y), 1, critic_steps=0), ValueError, "critic_steps.*got 0"),
    (lambda: fit_gan(toy(), (X, Y), 1, batch_size=2.5), ValueError, "batch_size.*got 2.5"),
    (lambda: fit_gan(toy(), (X, Y), 1, epochs=3), TypeError, "epochs"),
]


@pytest.mark.parametrize("call, error, says", BAD, ids=[str(i) for i in range(len(BAD))])
def test_bad_input(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_every_parameter_is_annotated():
    for name in module.__all__:
        f = getattr(module, name)
        for v in list(inspect.signature(f).parameters.values()):
            if v.kind not in (v.VAR_KEYWORD, v.VAR_POSITIONAL) and v.name != "data":
                assert v.annotation is not v.empty, (name, v.name)
