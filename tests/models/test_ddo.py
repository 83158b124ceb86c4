"""DDO: the loss against peers, stability on a table, the surrogate on every process and kind, the
rounds, loaders and conditions, and every error."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

import diffkit.models.ddo as module
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser
from diffkit.core.nets import MLP, Stacked
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow
from diffkit.core.sampling import DDIM
from diffkit.models.ddo import (
    critical_beta,
    ddo_loss,
    delta,
    diffusion_ddo_loss,
    draw_fakes,
    finetune,
    pointwise_optimum,
)

F64 = torch.float64
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def net(seed=0, classes=None, predicts="v", process=None):
    torch.manual_seed(seed)
    mlp = MLP(2, hidden=16, depth=1, classes=classes)
    nn.init.normal_(mlp.head.weight, std=0.1)
    return NetDenoiser(mlp, process or VP(), predicts=predicts)


# --- the loss


def test_loss_is_dpo_without_pairs():
    # Diffusion-DPO and DPO: -log sigmoid(beta r) of the winner; ours has one for each side
    r, f = randn(50), randn(50, seed=1)
    want = -F.logsigmoid(0.3 * r).mean() - 2 * F.logsigmoid(-0.3 * f).mean()
    assert_close(ddo_loss(r, f, 2.0, 0.3), want)


def test_half_precision_is_widened():
    r = torch.tensor([1.0, -2.0], dtype=torch.bfloat16)
    assert ddo_loss(r, r).dtype == torch.float32


@pytest.mark.parametrize("alpha,beta", [(1.0, 1.0), (2.0, 0.5), (0.5, 3.0)])
def test_pointwise_optimum_is_stationary(alpha, beta):
    d, q = randn(6), randn(6, seed=1)
    best = pointwise_optimum(d, q, alpha, beta).requires_grad_()
    r = best - q
    loss = (d.exp() * F.softplus(-beta * r) + alpha * q.exp() * F.softplus(beta * r)).sum()
    (slope,) = torch.autograd.grad(loss, best)
    assert slope.abs().max() < 1e-12


def test_critical_beta_on_a_table():
    # a table that is the data's law: g = 1, and the Hessian in logits changes sign there
    q = randn(5).softmax(0)
    where = q.log()

    def lowest(alpha, beta):
        def loss(z):
            r = z.log_softmax(0) - where
            return (q * F.softplus(-beta * r)).sum() + alpha * (q * F.softplus(beta * r)).sum()

        # the first value belongs to the constant, which does not matter
        return torch.linalg.eigvalsh(torch.autograd.functional.hessian(loss, where))

    for alpha in (1.5, 4.0):
        beta = critical_beta(alpha)
        assert lowest(alpha, 1.02 * beta).min() > -1e-12
        assert lowest(alpha, 0.98 * beta).min() < -1e-6


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_alpha_and_beta_are_positive(name, value):
    with pytest.raises(ValueError, match=name):
        ddo_loss(randn(3), randn(3), **{name: value})
    with pytest.raises(ValueError, match=name):
        finetune(net(), torch.randn(8, 2), steps=1, **{name: value})


def test_bad_ratios():
    with pytest.raises(ValueError, match="log_ratio_real"):
        ddo_loss(randn(3, 1), randn(3))
    with pytest.raises(ValueError, match="1 of 3"):
        ddo_loss(randn(3), torch.tensor([0.0, math.nan, 1.0]))
    with pytest.raises(ValueError, match="one for each of 3 rows"):
        ddo_loss(randn(3), randn(3), alpha=torch.ones(2))
    with pytest.raises(ValueError, match="g must be"):
        critical_beta(2.0, -1.0)


# --- the surrogate


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("kind", ["x0", "eps", "v", "edm"])
def test_delta_is_a_difference_of_training_losses(process, kind):
    one, two = (net(s, predicts=kind, process=process).double() for s in (1, 2))
    x0, eps = randn(1, 2), randn(1, 2, seed=1)
    t = torch.tensor([0.4], dtype=F64)
    got = delta(one, two, x0, t, eps)
    want = -2 * (one.loss(x0, t, eps=eps) - two.loss(x0, t, eps=eps))
    assert_close(got[0], want, rtol=1e-5, atol=1e-7)
    assert delta(one, copy.deepcopy(one), x0, t, eps).item() == 0


def test_delta_of_another_kind_and_of_exact_denoisers():
    # the reference may predict something else; the error is that of the model's kind
    mix = MixtureDenoiser(GaussianMixture([[0.0, 0.0], [1.0, 1.0]], scales=0.3), VP())
    other = MixtureDenoiser(GaussianMixture([[0.5, 0.0]], scales=0.6), VP())
    x0 = mix.mixture.sample(4000, rng(1))[0]
    # the true denoiser has the smaller error on its data
    assert delta(mix, other, x0, generator=rng(2)).mean() > 0
    assert delta(net().double(), mix, x0[:5], generator=rng(2)).shape == (5,)


def test_gradient_and_reference():
    model, ref = net(0), net(1)
    ref.train()
    before = [p.detach().clone() for p in ref.parameters()]
    loss, stats = diffusion_ddo_loss(model, ref, torch.randn(6, 2), torch.randn(6, 2))
    loss.backward()
    assert not ref.training and all(p.grad is None for p in ref.parameters())
    assert all(a.equal(b) for a, b in zip(before, ref.parameters()))
    assert set(stats) == {"r_real", "r_fake", "accuracy", "alive"}


def test_shared_parameters_are_named():
    model = net()
    with pytest.raises(ValueError, match="net.inp.weight"):
        ref = copy.deepcopy(model)
        ref.net.inp = model.net.inp
        diffusion_ddo_loss(model, ref, torch.randn(4, 2), torch.randn(4, 2))
    # what is frozen may be shared: adapters on one base
    model.net.inp.requires_grad_(False)
    diffusion_ddo_loss(model, ref, torch.randn(4, 2), torch.randn(4, 2))


def test_bad_batches():
    model, ref, x = net(classes=3), net(1, classes=3), torch.randn(4, 2)
    y = torch.zeros(4, dtype=torch.long)
    with pytest.raises(ValueError, match="label"):
        diffusion_ddo_loss(model, ref, {"x0": x, "label": y}, x)
    with pytest.raises(ValueError, match="shape of real"):
        diffusion_ddo_loss(model, ref, x, x[:0])
    with pytest.raises(TypeError, match="real must be"):
        diffusion_ddo_loss(model, ref, {"image": x}, x)
    with pytest.raises(ValueError, match="process"):
        delta(net(), net(process=Cosine()), x)


class Says(nn.Module):  # x0 is thought to be its number plus the label, whatever x is
    def __init__(self, number):
        super().__init__()
        self.number = nn.Parameter(torch.tensor(number, dtype=F64))

    def forward(self, x, t, label):
        return (self.number + label.to(x))[:, None].expand_as(x)


@pytest.mark.parametrize("alpha, beta", [(1.0, 0.05), (2.0, 0.7)])
def test_ratios_of_constant_guesses_by_hand(alpha, beta):
    "Each row meets its label, and the ratio is a difference of squares, the noise without a say."
    model, ref = (NetDenoiser(Says(v), VP(), predicts="x0") for v in (0.8, 0.1))
    label, other = torch.tensor([0, 3, 1]), torch.tensor([5, 2, 7])
    x, z = 0.9 + label[:, None] + 0.1 * randn(3, 2), 0.1 * randn(3, 2, seed=1) + other[:, None]
    gain = lambda v, y: ((v - 0.1 - y[:, None]) ** 2 - (v - 0.8 - y[:, None]) ** 2).sum(1)
    r, f = gain(x, label), gain(z, other)
    real, fake = {"x0": x, "label": label}, {"x0": z, "label": other}
    loss, stats = diffusion_ddo_loss(model, ref, real, fake, alpha, beta)
    assert_close(loss, ddo_loss(r, f, alpha, beta))
    assert_close(stats["r_real"], r.mean())
    assert_close(stats["r_fake"], f.mean())
    assert stats["accuracy"] == 1 and stats["alive"] == 1
    loss, stats = diffusion_ddo_loss(model, ref, fake, real, alpha, beta)
    assert_close(loss, ddo_loss(f, r, alpha, beta))
    assert stats["accuracy"] == 0
    each = torch.tensor([0.05, 2.0, 9.0], dtype=F64)  # one beta a row
    loss, stats = diffusion_ddo_loss(model, ref, real, fake, each * alpha, each)
    want = -F.logsigmoid(each * r) - each * alpha * F.logsigmoid(-each * f)
    assert_close(loss, want.mean())
    # of the ratios those are alive whose sigmoid lies in 0.1 to 0.9
    sides = torch.stack([each * r, each * f]).sigmoid()
    assert_close(stats["alive"], ((sides - 0.5).abs() < 0.4).float().mean())
    assert 0 < stats["alive"] < 1


# --- rounds


def test_every_setting_of_the_loss_reaches_it(monkeypatch):
    seen, plain = [], module.diffusion_ddo_loss

    def spy(model, ref, real, fake, *more, **how):
        assert not more
        seen.append(how)
        return plain(model, ref, real, fake, **how)

    monkeypatch.setattr(module, "diffusion_ddo_loss", spy)
    how = dict(alpha=2.5, beta=0.3, times=lambda n: torch.full((n,), 0.4), weight=torch.sigmoid)
    run = dict(steps=2, solver=DDIM(), progress=False)
    finetune(net(), torch.randn(4, 2, generator=rng()), **run, **how)
    finetune(net(), torch.randn(4, 2, generator=rng()), **run)
    assert seen == [how] * 2 + [dict(alpha=1.0, beta=0.05, times=None, weight=None)] * 2


def test_members_train_as_alone_would():
    # rows of a member: its fakes, its reference; two equal members stay equal only if so
    one = net()
    both = NetDenoiser(Stacked([one.net, net(5).net]), VP(), predicts="v")
    g = rng(3)
    fakes = draw_fakes(both, torch.randn(9, 2), 8, DDIM(), generator=g)["x0"]
    real = torch.randn(8, 2)
    t, eps = torch.rand(8) * 0.9 + 0.05, torch.randn(8, 2)
    ref = NetDenoiser(Stacked([net(6).net, net(7).net]), VP(), predicts="v")
    got = delta(both, ref, real, t, eps)
    want = delta(one, net(6), real[:4], t[:4], eps[:4])
    assert_close(got[:4], want, rtol=1e-4, atol=1e-6)
    assert fakes.shape == (8, 2)


def test_loader_labels_and_best_round():
    x, y = torch.randn(24, 2), torch.arange(24) % 3
    loader = DataLoader(TensorDataset(x, y), 8)
    model = net(classes=3)
    values = iter([1.0, 3.0, 2.0])
    run = finetune(model, loader, steps=2, rounds=2, metric=lambda m: next(values), progress=False)
    assert run.best_round == 0 and len(run.rounds[1].stats["alive"]) == 2
    for a, b in zip(run.best.parameters(), model.parameters()):
        assert a.equal(b)
    assert any(not a.equal(b) for a, b in zip(run.last.parameters(), model.parameters()))
    drawn = draw_fakes(model, loader, 10, DDIM())
    assert drawn["label"].tolist() == y[:10].tolist()


def test_bad_settings():
    x = torch.randn(8, 2)
    with pytest.raises(ValueError, match="rounds"):
        finetune(net(), x, steps=1, rounds=0)
    with pytest.raises(TypeError, match="checkpoint"):
        finetune(net(), x, steps=1, checkpoint="a")
    with pytest.raises(TypeError, match="Denoiser"):
        finetune(nn.Linear(2, 2), x, steps=1)
    with pytest.raises(ValueError, match="finite"):
        finetune(net(), x, steps=1, metric=lambda m: math.nan, progress=False)
    with pytest.raises(ValueError, match="n_fake must be given"):
        finetune(net(), iter([x]), steps=1)
    with pytest.raises(ValueError, match="n must be"):
        draw_fakes(net(), x, 0)
    with pytest.raises(ValueError, match="no batch"):
        draw_fakes(net(), iter([]), 4)
