"""Strength, selection by perturbation, and the closed form of two outputs on one edge."""

import copy
import math

import pytest
import torch
from torch import nn

from diffkit.core.data import mnist1d
from diffkit.nas.darts_pt import (
    edge_strength,
    operation_strength,
    perturb_select,
    skip_conv_optimum,
)
from diffkit.nas.supernet import CellNet, CellSpace, MixedOp, Supernet, evaluate, search

X, Y = mnist1d("train")
TRAIN, VALID = (X[:200], Y[:200]), (X[2000:2200], Y[2000:2200])
g = torch.Generator().manual_seed(0)
SIGNS = torch.randint(2, (100,), generator=g)
OBS = (1 - 2.0 * SIGNS)[:, None].double()


class Scales(nn.Module):
    "Two logits (c x, -c x) with c the sum of p_k a_k over all choices."

    def __init__(self, a, alpha):
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.alpha = nn.Parameter(torch.tensor(alpha, dtype=torch.float64))

    def forward(self, x, weights=None):
        w = self.alpha.softmax(-1) if weights is None else weights
        c = (w * self.a).sum()
        return torch.cat([c * x, -c * x], 1)


def loss_at(c):  # cross-entropy at a margin of 2 c
    return math.log1p(math.exp(-2 * float(c)))


WRONG = [[0.1, 3.0, 0.5], [2.0, 0.2, -1.0]], [[2.0, 0.0, 0.0], [0.0, 2.0, 0.0]]


def test_strength_is_the_loss_without_less_that_with():
    net = Scales(*WRONG)
    parts = (net.alpha.softmax(-1) * net.a).detach()
    whole = loss_at(parts.sum())
    for e in (0, 1):
        want = [loss_at(parts.sum() - parts[e, k]) - whole for k in range(3)]
        assert operation_strength(net, (OBS, SIGNS), e).tolist() == pytest.approx(want, abs=1e-12)
    want = [loss_at(parts.sum() - parts[e].sum()) - whole for e in (0, 1)]
    assert edge_strength(net, (OBS, SIGNS), [0, 1]).tolist() == pytest.approx(want, abs=1e-12)


def test_strength_by_accuracy():
    net = Scales([[1.0, -3.0]], [[0.0, 0.0]])  # c = -1: all wrong; without the second, all right
    assert operation_strength(net, (OBS, SIGNS), 0, crit="acc").tolist() == [0.0, -1.0]


def test_selection_follows_contributions_not_weights():
    net = Scales(*WRONG)
    arch, way = perturb_select(net, (OBS, SIGNS), (OBS, SIGNS), tune_epochs=0, order=(1, 0))
    assert arch == (1, 0) and tuple(net.alpha.argmax(1).tolist()) == (0, 1)
    assert [s.edge for s in way] == [1, 0] and all(s.tuned is None for s in way)
    # the second decision sees the first: choice 1 is a corner by then
    parts = (net.alpha.softmax(-1) * net.a).detach()
    c = parts[0].sum() + net.a[1, 0].item()
    want = [loss_at(c - parts[0, k]) - loss_at(c) for k in range(3)]
    assert way[1].strength.tolist() == pytest.approx(want, abs=1e-12)


def test_ties_go_to_the_first():
    net = Scales([[1.0, 1.0, 1.0]], [[0.0, 0.0, 0.0]])
    for crit in ("loss", "acc"):
        got = perturb_select(net, (OBS, SIGNS), (OBS, SIGNS), tune_epochs=0, crit=crit)
        assert got[0] == (0,)


def test_the_order_is_random_and_fixed_by_the_seed():
    net = Scales([[1.0, 2.0]] * 6, [[0.0, 0.0]] * 6)
    how = dict(tune_epochs=0)
    order = lambda seed: [
        s.edge for s in perturb_select(net, (OBS, SIGNS), (OBS, SIGNS), seed=seed, **how)[1]
    ]
    assert order(1) == order(1) and len({tuple(order(s)) for s in range(8)}) > 4
    assert sorted(order(3)) == list(range(6))


def test_none_has_no_strength_and_nothing_moves_without_tuning():
    torch.manual_seed(0)
    net = Supernet(CellNet(CellSpace()))
    for e in range(6):
        assert operation_strength(net, VALID, e)[0].item() == 0.0
    before = copy.deepcopy(net.state_dict())
    perturb_select(net, TRAIN, VALID, tune_epochs=0)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


def test_decided_choices_stay_corners_and_their_alpha_rests():
    torch.manual_seed(0)
    net = Supernet(CellNet(CellSpace()))
    alphas = [net.alpha.detach().clone()]
    arch, way = perturb_select(net, TRAIN, VALID, tune_epochs=1, order=range(6))
    for i, s in enumerate(way):
        w = s.tuned.weights[-1]
        assert w.shape == (6, 3)
        for e in range(i + 1):
            assert w[e].argmax() == arch[e] and w[e].max() == 1 and w[e].sum() == 1
        if i < 5:  # the others move
            assert not torch.equal(s.tuned.weights[0][i + 1 :], w[i + 1 :])
    # the first decided one was moved by weight decay at most: 10 steps of 1e-3 of 1e-3
    assert (net.alpha[0] - alphas[0][0]).abs().max() < 0.2
    still = copy.deepcopy(net)
    perturb_select(still, TRAIN, VALID, tune_epochs=1, fixed_alpha=True)
    assert torch.equal(still.alpha, net.alpha)


def test_the_end_is_the_single_path():
    torch.manual_seed(0)
    net = Supernet(CellNet(CellSpace()))
    arch, way = perturb_select(net, TRAIN, VALID, tune_epochs=0)
    hot = CellSpace().onehot([arch])[0]
    a, b = evaluate(net, VALID, arch=arch), evaluate(net, VALID, weights=hot)
    assert a.acc == b.acc and a.nll == pytest.approx(b.nll, abs=1e-6)


def test_choices_of_different_size():
    torch.manual_seed(0)
    net = Supernet(
        nn.Sequential(
            MixedOp({"a": nn.Identity(), "b": nn.Tanh(), "c": nn.Sigmoid()}),
            nn.Flatten(),
            MixedOp({"wide": nn.Linear(40, 10), "blind": nn.Sequential(nn.Linear(40, 10))}),
        )
    )
    search(net, (X[:1000], Y[:1000]), VALID, epochs=2)
    with torch.no_grad():
        net.net[2].ops["blind"][0].weight.zero_()  # it sees nothing
        net.net[2].ops["blind"][0].bias.zero_()
    s = operation_strength(net, VALID, 1)
    assert s[2].isnan() and s[1] == 0 and s[0] != 0
    arch, _ = perturb_select(net, TRAIN, VALID, tune_epochs=1)
    assert net.names(arch)[1] == "wide"


def test_no_two_runs_of_training_take_the_same_batches():
    """The order of the batches in a tuning comes from the seed and the number of decisions before:
    it is another one in each, and another than in a search of that seed, which is likely to be what
    trained the net."""
    x = torch.arange(1.0, 17.0, dtype=torch.float64)[:, None]
    y, seen = (x[:, 0] > 8).long(), []

    def loss(net, batch):
        seen.append(batch[0].flatten().tolist())
        return nn.functional.cross_entropy(net(batch[0]), batch[1])

    def runs(seed):  # three tunings and a search, of one epoch of 4 batches each
        seen.clear()
        net = Scales([[1.0, 2.0]] * 3, [[0.0, 0.0]] * 3)
        how = dict(batch_size=4, loss=loss, seed=seed)
        once = dict(tune_epochs=1, fixed_alpha=True, order=range(3))
        perturb_select(net, (x, y), (x, y), **once, **how)
        search(net, (x, y), (x, y), epochs=1, warmup=1.0, **how)
        assert len(seen) == 16  # alpha rests: one call of loss a step
        return [sum(seen[i : i + 4], []) for i in range(0, 16, 4)]

    got = runs(0)
    assert all(sorted(r) == x.flatten().tolist() for r in got)
    assert len({tuple(r) for r in got}) == 4
    assert runs(0) == got and all(u != v for u, v in zip(got, runs(5)))


@pytest.mark.parametrize("seed", range(6))
def test_two_outputs_on_one_edge(seed):
    h = torch.Generator().manual_seed(seed)
    e1, e2, m = torch.randn(3, 300, generator=h, dtype=torch.float64)
    x, o = m + 0.4 * (1 + seed % 3) * e1, m + 0.8 * e2 + 0.2 * seed * e1
    theta, gap = skip_conv_optimum(x, o, m)
    u, v = x - m, o - m
    spread = lambda t: (t * v + (1 - t) * u).var().item()
    step = 1e-4
    if 0 < theta < 1:  # a parabola: symmetric around its lowest point
        assert spread(theta + step) == pytest.approx(spread(theta - step), rel=1e-12)
        assert gap == pytest.approx(math.log((1 - theta) / theta), rel=1e-12)
        assert (gap > 0) == (u.var() < v.var()).item()
    else:
        assert spread(theta) < spread(abs(theta - step))
    assert spread(theta) <= min(spread(0.0), spread(1.0)) + 1e-12
    # a constant on top of an output changes nothing
    assert skip_conv_optimum(x + 3, o - 1, m)[0] == pytest.approx(theta, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_two_outputs_are_compared_in_double_precision(dtype):
    "Whatever the type of the feature maps, their values are used as they are, to the bit."
    h = torch.Generator().manual_seed(0)
    e1, e2, m = 9 * torch.randn(3, 300, generator=h, dtype=torch.float64)
    maps = [v.to(dtype) for v in (m + e1 + 500, m + 2 * e2 - 300, m + 100)]
    got = skip_conv_optimum(*maps)
    assert got == skip_conv_optimum(*(v.double() for v in maps))
    x, o, m = (torch.tensor(v.tolist(), dtype=torch.float64) for v in maps)
    mixed = lambda t: (t * o + (1 - t) * x - m).var().item()
    assert mixed(got[0]) < min(mixed(got[0] - 1e-4), mixed(got[0] + 1e-4))
    image = [v.reshape(3, 1, 10, 10) for v in maps]  # the shape doesn't count
    assert skip_conv_optimum(*image) == got


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda n: operation_strength(n, VALID, 6), "from 0 to 5"),
        (lambda n: operation_strength(n, VALID, True), "edge=True"),
        (lambda n: operation_strength(n, VALID, 0, crit="f1"), "loss, acc"),
        (lambda n: operation_strength(n, (X[:0], Y[:0]), 0), "at least one"),
        (lambda n: edge_strength(n, VALID, [0], crit="x"), "loss, acc"),
        (lambda n: perturb_select(n, TRAIN, VALID, order=(0, 0, 1, 2, 3, 4)), "each choice"),
        (lambda n: perturb_select(n, TRAIN, VALID, tune_epochs=1.5), "tune_epochs=1.5"),
        (lambda n: skip_conv_optimum(torch.ones(3), torch.ones(2), torch.ones(3)), "3, 2, 3"),
        (lambda n: skip_conv_optimum(torch.ones(3), torch.ones(3), torch.ones(3)), "constant"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call(Supernet(CellNet(CellSpace())))
