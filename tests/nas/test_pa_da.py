"""PA&DA: variances and biases by enumeration, both samplers against histories by hand and the
published schedule, the training against the old loop bit for bit, ranking, errors."""

import itertools
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from diffkit.core.data import mnist1d
from diffkit.core.training import fit
from diffkit.nas.pa_da import (
    ImportanceSampler,
    Numbered,
    PathSampler,
    draw_moments,
    draw_paths,
    grad_norm_proxy,
    gradient_variance,
    optimal_probabilities,
    pa_da,
    path_gradients,
    rank_paths,
    weight_spread,
    weighted_loss,
)
from diffkit.nas.supernet import (
    CellNet,
    CellSpace,
    MixedOp,
    Supernet,
    Table,
    classification,
    evaluate,
    single_path,
    weight_parameters,
)

F64 = torch.float64
X, Y = mnist1d("train")
SMALL = CellSpace(nodes=3)
EVERY = list(SMALL)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cells(seed=0, space=SMALL, **how):
    torch.manual_seed(seed)
    return Supernet(CellNet(space, **{"channels": 4, "cells": 1, **how}))


def mixed_sizes():  # choices with 3 and 2 candidates, the second without weights
    torch.manual_seed(0)
    layers = {"conv3": nn.Conv1d(4, 4, 3, padding=1), "conv7": nn.Conv1d(4, 4, 7, padding=3)}
    return Supernet(nn.Sequential(
        nn.Conv1d(1, 4, 5, 2, 2),
        MixedOp(layers | {"skip": nn.Identity()}),
        MixedOp({"max": nn.MaxPool1d(2), "mean": nn.AvgPool1d(2)}),
        nn.Flatten(),
        nn.Linear(40, 10),
    ))  # fmt: skip


def same(a, b):
    return all(torch.equal(u, v) for u, v in zip(a.parameters(), b.parameters(), strict=True))


def logistic(n=50, seed=0):  # a gradient a row, by a loop
    g = rng(seed)
    net = nn.Linear(4, 3).double()
    x, y = torch.randn(n, 4, generator=g, dtype=F64), torch.randint(3, (n,), generator=g)
    rows = []
    for i in range(n):
        grads = torch.autograd.grad(
            F.cross_entropy(net(x[i : i + 1]), y[i : i + 1]), net.parameters()
        )
        rows.append(torch.cat([v.flatten() for v in grads]))
    return net, x, y, torch.stack(rows)


# --- moments of a draw


@pytest.mark.parametrize("reweight", [True, False])
def test_moments_are_those_of_all_draws(reweight):
    _, _, _, rows = logistic()
    p = torch.rand(50, generator=rng(1), dtype=F64)
    p /= p.sum()
    draws = [r / (50 * c) if reweight else r for r, c in zip(rows, p)]
    mean = sum(c * d for c, d in zip(p, draws))
    want = sum(float(c * (d - mean).square().sum()) for c, d in zip(p, draws))
    got = draw_moments(rows, p, reweight)
    # sums of 50 numbers of order one in float64
    assert got.variance == pytest.approx(want, abs=1e-12)
    assert got.second == pytest.approx(sum(float(c * d.square().sum()) for c, d in zip(p, draws)))
    assert got.bias == pytest.approx(float((mean - rows.mean(0)).norm()), abs=1e-12)
    assert (got.bias < 1e-12) == reweight


def test_no_probabilities_are_better_than_the_norms():
    _, _, _, rows = logistic(seed=2)
    norms = rows.norm(dim=1)
    best = optimal_probabilities(norms)
    least = draw_moments(rows, best).variance
    assert least == pytest.approx(float(norms.mean() ** 2 - rows.mean(0).square().sum()), abs=1e-12)
    # the slope at the best point along the simplex is 0: all sum p_i d/dp_i are equal there
    slope = torch.func.grad(lambda p: (norms.square() / p).sum())(best)
    assert float(slope.std() / slope.mean().abs()) < 1e-12
    for k in range(300):
        p = best * torch.exp(10 ** (-3 + k / 100) * torch.randn(50, generator=rng(k), dtype=F64))
        assert draw_moments(rows, p / p.sum()).variance >= least * (1 - 1e-12)


def test_plain_draws_by_norms_never_lower_the_second_moment():
    for k in range(100):
        rows = torch.randn(12, 3, generator=rng(k)) * torch.rand(12, 1, generator=rng(k + 1)) ** 3
        flat = torch.full((12,), 1 / 12, dtype=F64)
        plain = draw_moments(rows, optimal_probabilities(rows.norm(dim=1)), reweight=False)
        assert plain.second > draw_moments(rows, flat).second


def test_equal_norms_and_no_norms_are_uniform():
    assert torch.equal(optimal_probabilities(torch.ones(4)), torch.full((4,), 0.25, dtype=F64))
    with pytest.warns(UserWarning, match="all norms are 0"):
        assert torch.equal(optimal_probabilities(torch.zeros(4)), torch.full((4,), 0.25, dtype=F64))


# --- data


def test_the_proxy_is_the_slope_at_the_logits():
    z = (3 * torch.randn(60, 7, generator=rng(), dtype=F64)).requires_grad_()
    t = torch.randint(7, (60,), generator=rng(1))
    (slope,) = torch.autograd.grad(F.cross_entropy(z, t, reduction="sum"), z)
    torch.testing.assert_close(grad_norm_proxy(z, t), slope.norm(dim=1), rtol=0, atol=1e-12)
    assert not grad_norm_proxy(z, t).requires_grad
    sure = torch.tensor([[60.0, 0.0], [0.0, 60.0]])
    got = grad_norm_proxy(sure, torch.tensor([0, 0]))
    torch.testing.assert_close(got, torch.tensor([0.0, 2**0.5]))


def test_an_epoch_is_halved_in_the_order_of_the_draws():
    n, g = 30, rng(4)
    rows = torch.randint(n - 3, (200,), generator=g)
    norms = torch.rand(200, generator=g, dtype=F64) + 0.1
    s = ImportanceSampler(n, epochs=2, schedule=lambda v: 1.0)
    for a, b in zip(rows.split(32), norms.split(32)):
        s.observe(a, b)
    s.update()
    want = torch.zeros(n, dtype=F64)
    for i, v in zip(rows.tolist(), norms.tolist()):  # one after the other
        want[i] = (want[i] + v) / 2 if want[i] else v
    torch.testing.assert_close(s.q, want / want.sum(), rtol=1e-12, atol=0)
    assert (s.q[-3:] == 0).all()  # not seen


def test_tau_acts_an_epoch_later():
    E, s = 250, ImportanceSampler(2, epochs=250)  # the published number of epochs
    used = []
    for _ in range(E):
        used.append(2 * float(s.q[0]) - 1)
        s.observe(torch.tensor([0]), torch.ones(1))
        s.update()
    assert used[0] == used[1] == 0 and used[2] == pytest.approx(1 / E)
    assert used[-1] == pytest.approx((E - 2) / E)
    assert 2 * float(s.q[0]) - 1 == pytest.approx((E - 1) / E)


def test_draws_follow_q():
    s = ImportanceSampler(5, epochs=2, generator=rng(5))
    assert sorted(s) == list(range(5))  # each once in the first epoch
    s.q, s.epoch = torch.tensor([0.5, 0.3, 0.2, 0.0, 0.0], dtype=F64), 1
    got = torch.cat([s.draw() for _ in range(4000)]).bincount(minlength=5) / 20000
    # standard error below 0.0036
    torch.testing.assert_close(got.double(), s.q, rtol=0, atol=0.018)
    assert got[3] == got[4] == 0


def test_the_weighted_loss_is_unbiased_over_all_draws():
    net, x, y, rows = logistic(seed=3)
    s = ImportanceSampler(50, epochs=3)
    s.observe(torch.arange(50), grad_norm_proxy(net(x), y))
    s.update()
    s.observe(torch.arange(50), grad_norm_proxy(net(x), y))
    s.update()
    assert s.q.std() > 1e-3
    for reweight, limit in ((True, 1e-10), (False, math.inf)):
        total = 0
        watched = ImportanceSampler(50, 3)
        watched.q = s.q
        loss = weighted_loss(watched, reweight)
        for i in range(50):
            r = torch.tensor([i])
            grads = torch.autograd.grad(loss(net, (r, x[r], y[r])), list(net.parameters()))
            total = total + s.q[i] * torch.cat([v.flatten() for v in grads])
        off = float((total - rows.mean(0)).norm())
        assert off < limit and (reweight or off > 1e-3)


@pytest.mark.parametrize("workers", [0, 1])
def test_any_dataloader_any_classifier(workers):
    data = Numbered(TensorDataset(X[:120], Y[:120]))
    assert len(data) == 120 and data[7][0] == 7 and torch.equal(data[7][1], X[7])
    s = ImportanceSampler(120, epochs=4, generator=rng(6))
    loader = DataLoader(data, batch_size=50, sampler=s, num_workers=workers)
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, 10))
    seen, inner = [], weighted_loss(s)

    def loss(model, batch):
        seen.append(batch[0])
        assert torch.equal(batch[1], X[batch[0]]) and torch.equal(batch[2], Y[batch[0]])
        return inner(model, batch)

    fit(net, loss, loader, 12, progress=False)  # four passes of three batches
    epochs = [torch.cat(seen[i : i + 3]) for i in range(0, 12, 3)]
    assert sorted(epochs[0].tolist()) == list(range(120)) and s.epoch == 3
    assert len(set(epochs[1].tolist())) < 120 and float(s.q.std()) > 0
    assert s.q.sum() == pytest.approx(1)


# --- paths


def test_three_steps_by_hand():
    net = cells()
    conv = [next(m.ops["conv3"].parameters()) for m in net.net.cells[0].layers]
    walk = PathSampler(net, each=3, epochs=4, schedule=lambda v: 0.25)
    for arch, sizes in [((2, 2, 1), (3.0, 1.0, 7.0)), ((1, 0, 2), (7.0, 7.0, 5.0)),
                        ((2, 0, 0), (0.0, 7.0, 7.0)), ((2, 0, 0), (None, 7.0, 7.0))]:  # fmt: skip
        for p, size in zip(conv, sizes):  # the 7s are old gradients, not on the path
            p.grad = None if size is None else torch.full_like(p, size / p.numel() ** 0.5)
        walk.arch = arch
        walk.observe()
    # (3 + 1) / 2 = 2, halved: 1; (1 + 5) / 2 = 3; a gradient of 0, and none, do not count
    assert float(walk.norms["conv3"]) == pytest.approx(3.0, rel=1e-6)
    walk.update()
    want = torch.tensor([[0.25, 0.25, 0.5]] * 3, dtype=F64)
    torch.testing.assert_close(walk.p, want)
    assert walk.norms == {"none": 0.0, "skip": 0.0, "conv3": 0.0} and walk.epoch == 1


@pytest.mark.parametrize("each", [1, 3])
def test_steps_and_epochs_are_counted(each):
    net = cells()
    walk = PathSampler(net, each=each, epochs=4, generator=rng())
    seen = [(walk.count, walk.epoch)]
    for _ in range(2 * each + 1):
        walk(net)
        seen.append((walk.count, walk.epoch))
    # an epoch is closed when the first step after it begins
    assert seen == [(n, max(n - 1, 0) // each) for n in range(2 * each + 2)]


def test_two_kinds_with_weights_share_by_their_norms():
    net = mixed_sizes()
    walk = PathSampler(net, each=4, epochs=2, schedule=lambda v: 1.0)
    for arch, size in (((0, 1), 3.0), ((1, 0), 1.0), ((2, 0), None)):
        for name in ("conv3", "conv7"):
            conv = net.net[1].ops[name]
            on = net.ops[0][arch[0]] == name
            conv.weight.grad = torch.full_like(
                conv.weight, (size or 0) / conv.weight.numel() ** 0.5
            )
            conv.bias.grad = torch.full_like(conv.bias, 0.5 if on else 9.0)  # norm 1: it is added
        walk.arch = arch
        walk.observe()
    walk.update()
    # (3 + 1) / 2 against (1 + 1) / 2; skip has nothing; pools stay uniform
    want = torch.tensor([[2 / 3, 1 / 3, 0.0], [0.5, 0.5, 0.0]], dtype=F64)
    torch.testing.assert_close(walk.p, want, rtol=1e-6, atol=1e-12)


def test_no_value_is_read_in_a_step():
    class Count(TorchDispatchMode):
        reads = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.reads += "_local_scalar_dense" in str(func)
            return func(*args, **(kwargs or {}))

    net, s = cells(), ImportanceSampler(100, epochs=2)
    walk = PathSampler(net, each=100, epochs=2)
    walk(net)
    grads = torch.autograd.grad(
        classification(lambda x: net(x, arch=(2, 2, 2)), (X[:50], Y[:50])), weight_parameters(net),
        allow_unused=True,
    )  # fmt: skip
    for p, g in zip(weight_parameters(net), grads):
        p.grad = g
    walk.arch = (2, 2, 2)
    with Count() as count:
        walk.observe()
        s.observe(torch.arange(50), grad_norm_proxy(net(X[:50], arch=(2, 1, 2)), Y[:50]))
    assert count.reads == 0 and float(walk.norms["conv3"]) > 0
    with count:
        walk.update()
    assert count.reads > 0  # the counter can count


def test_draws_and_weights():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.4, 0.6, 0.0]], dtype=F64)
    paths = draw_paths(p, 20000, rng(7))
    for path in itertools.product(range(3), range(2)):
        want = float(p[0, path[0]] * p[1, path[1]])
        # five standard errors, below 0.018
        assert abs(paths.count(path) / 20000 - want) < 5 * (want / 20000) ** 0.5
    walk = PathSampler(mixed_sizes(), each=1, epochs=1)
    walk.p = p
    chances = {a: float(p[0, a[0]] * p[1, a[1]]) for a in itertools.product(range(3), range(2))}
    weights = {a: walk.weight(a) for a in chances}
    for a in chances:
        assert weights[a] * chances[a] == pytest.approx(1 / 6)
    assert sum(chances[a] * weights[a] ** 2 for a in chances) == pytest.approx(weight_spread(p))
    assert weight_spread(torch.full((6, 3), 1 / 3, dtype=F64)) == pytest.approx(1)


def test_a_net_without_weights_in_its_choices_is_warned_about():
    net = Supernet(nn.Sequential(
        MixedOp({"a": nn.Tanh(), "b": nn.Identity()}), nn.Flatten(), nn.Linear(40, 10)
    ))  # fmt: skip
    with pytest.warns(UserWarning, match="no candidate has weights"):
        got = pa_da(net, (X[:100], Y[:100]), epochs=3, batch_size=50)
    assert (got.p == 0.5).all()


# --- training


def trained(f, net=None, **how):
    net = net or cells()
    return net, f(net, (X[:200], Y[:200]), epochs=4, batch_size=50, seed=1, **how)


def test_without_both_it_is_the_old_loop_bit_for_bit():
    (a, old), (b, new) = trained(single_path), trained(pa_da, path=False, data=False)
    assert same(a, b) and torch.equal(old.losses, new.run.losses)
    assert (new.q == 1 / 200).all() and (new.p == new.p[0]).all()
    for how in ({}, {"data": False}, {"path": False}):
        assert not same(a, trained(pa_da, **how)[0])


def test_in_this_space_the_path_half_is_a_ramp_without_measurement():
    (a, got), (b, ramp) = (
        trained(pa_da, data=False),
        trained(pa_da, data=False, target={"none": 0.0, "skip": 0.0, "conv3": 5.0}),
    )
    assert same(a, b) and torch.equal(got.p, ramp.p)
    tau = [0, 0, 1 / 4, 2 / 4]
    want = torch.tensor([[(1 - t) / 3, (1 - t) / 3, (1 - t) / 3 + t] for t in tau], dtype=F64)
    torch.testing.assert_close(got.p, want[:, None].expand(4, 3, 3))
    c, fixed = trained(pa_da, data=False, target={"none": 1.0, "skip": 1.0, "conv3": 2.0},
                       schedule=lambda v: 1.0)  # fmt: skip
    want = torch.tensor([0.25, 0.25, 0.5], dtype=F64).expand(4, 3, 3)
    torch.testing.assert_close(fixed.p, want)


def test_on_epoch_sees_what_is_drawn():
    seen = []
    _, got = trained(pa_da, on_epoch=lambda net, e, p, q: seen.append((e, p, q)))
    assert [e for e, _, _ in seen] == [0, 1, 2, 3]
    assert torch.equal(torch.stack([p for _, p, _ in seen]), got.p)
    assert torch.equal(torch.stack([q for _, _, q in seen]), got.q)
    torch.testing.assert_close(got.q.sum(1), torch.ones(4, dtype=F64))
    assert (got.q[:2] == 1 / 200).all() and got.q[3].std() > 0


def test_rows_that_are_drawn_are_those_that_are_observed():
    losses = []

    def criterion(z, t, reduction="mean"):
        losses.append(len(t))
        return F.cross_entropy(z, t, reduction=reduction)

    trained(pa_da, criterion=criterion)
    assert losses == [50] * 16
    # one row has all the norm: with tau = 1 only that one is drawn after the first epoch
    x, y = X[:200], torch.zeros(200, dtype=torch.long)
    y[17] = 1
    seen = []
    pa_da(cells(), (x, y), epochs=3, batch_size=50, path=False, schedule=lambda v: 1.0,
          proxy=lambda z, t: (seen.append(t), (t == 1).double())[1])  # fmt: skip
    assert sum(int(t.sum()) for t in seen[:4]) == 1 and all((t == 1).all() for t in seen[4:])


def test_the_reweighted_step_has_the_full_gradient_as_its_mean():
    net = cells().double()
    data = X[:20].double(), Y[:20]
    walk = PathSampler(net, each=1, epochs=1, target={"none": 1, "skip": 2, "conv3": 3},
                       schedule=lambda v: 1.0)  # fmt: skip
    rows = path_gradients(net, [(a, data) for a in EVERY])
    chance = [math.prod(float(walk.p[e, k]) for e, k in enumerate(a)) for a in EVERY]
    got = sum(c * walk.weight(a) * r for c, a, r in zip(chance, EVERY, rows))
    assert float((got - rows.mean(0)).norm()) < 1e-10
    # and the loss that pa_da trains on has that weight: a single step from equal weights
    plain, heavy = [], []
    for reweight, kept in ((False, plain), (True, heavy)):

        def criterion(z, t, reduction="mean", kept=kept):
            return F.cross_entropy(z, t, reduction=reduction)

        how = dict(target={"none": 1, "skip": 2, "conv3": 3}, schedule=lambda v: 1.0)
        run = pa_da(cells(), (X[:50], Y[:50]), epochs=1, batch_size=50, data=False,
                    reweight=reweight, **how).run  # fmt: skip
        kept.append(float(run.losses[0]))
    torch.manual_seed(0)
    first = draw_paths(walk.p, 1)[0]  # `fit` seeds with 0
    assert heavy[0] == pytest.approx(plain[0] * walk.weight(first), rel=1e-5)


def test_reweighted_norms_are_those_of_the_path_itself():
    net = cells()
    target = {"none": 1.0, "skip": 1.0, "conv3": 2.0}
    a, b = (PathSampler(net, 9, 2, reweight=r, target=target, schedule=lambda v: 1.0)
            for r in (False, True))  # fmt: skip
    w = weight_parameters(net)
    for scale, walk in ((1.0, a), (b.weight((2, 0, 2)), b)):
        value = scale * classification(lambda x: net(x, arch=(2, 0, 2)), (X[:50], Y[:50]))
        for p, g in zip(w, torch.autograd.grad(value, w, allow_unused=True)):
            p.grad = g
        walk.arch = (2, 0, 2)
        walk.observe()
    assert float(a.norms["conv3"]) == pytest.approx(float(b.norms["conv3"]), rel=1e-5)


def test_any_supernet():
    net = mixed_sizes()
    for how in ({}, {"reweight": True}):
        got = trained(pa_da, net=net, **how)[1]
        assert got.p.shape == (4, 2, 3) and (got.p[:, 1, 2] == 0).all()
        assert (got.p[:, 1, :2] == 0.5).all() and got.p[-1, 0, 2] < got.p[-1, 0, :2].min()
        torch.testing.assert_close(got.p.sum(-1), torch.ones(4, 2, dtype=F64))


# --- measures


def test_path_gradients_and_their_variance():
    net = cells()
    batch = X[:40], Y[:40]
    rows = path_gradients(net, [((2, 1, 2), batch), ([(2, 1, 2), (1, 1, 1)], batch)])
    one = path_gradients(net, [((1, 1, 1), batch)])[0]
    torch.testing.assert_close(rows[1], rows[0] + one, rtol=1e-4, atol=1e-6)  # float32
    assert all(p.grad is None for p in net.parameters())
    short = path_gradients(net, [((2, 1, 2), batch)], clip=1e-3)[0]
    torch.testing.assert_close(short, rows[0] * (1e-3 / rows[0].norm()))
    long = path_gradients(net, [((2, 1, 2), batch)], clip=1e3)[0]
    torch.testing.assert_close(long, rows[0])
    g = rng(8)
    tries = [gradient_variance(3 + torch.randn(6, 4, generator=g)) for _ in range(4000)]
    trace, square = np.mean(tries, 0)
    # without bias: 4 coordinates of variance 1 and mean 3; five standard errors
    assert abs(trace - 4) < 5 * 0.02 and abs(square - 36) < 5 * 0.08


def test_ranking_is_that_of_evaluate_and_runs_equal_parts_once():
    space, table = CellSpace(), Table()
    net = cells(space=space, channels=8, cells=2)
    data = X[:100], Y[:100]
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    hooks = [m.register_forward_hook(count) for m in net.modules() if isinstance(m, nn.Conv1d)]
    got = rank_paths(net, table.classes, data)
    few, calls = calls, 0
    for a in table.classes[::7]:
        want = evaluate(net, data, arch=a)
        # the same logits; means of float64 in another order
        assert got[a].acc == want.acc and got[a].nll == pytest.approx(want.nll, abs=1e-12)
    assert list(got) == table.classes and net.training
    assert rank_paths(net, table.classes[:9], data, reuse=False) == {
        a: got[a] for a in table.classes[:9]
    }
    assert few < 0.5 * calls * len(table.classes) / len(table.classes[::7])
    for h in hooks:
        h.remove()
    assert all("forward" not in m.__dict__ for m in net.modules())
    other = mixed_sizes()
    archs = [(i, j) for i in range(3) for j in range(2)]
    scores = rank_paths(other, archs, data)
    assert scores[(1, 1)].nll == pytest.approx(evaluate(other, data, arch=(1, 1)).nll, abs=1e-12)
    with pytest.raises(ValueError, match="must have 2 entries"):
        rank_paths(other, [(0,)], data)
    assert all("forward" not in m.__dict__ for m in other.modules()) and other.training


def test_ranking_tells_tensors_of_equal_sum_apart():
    class Flip(nn.Module):
        def forward(self, x):
            return x.flip(-1)

    torch.manual_seed(0)
    net = Supernet(nn.Sequential(
        MixedOp({"as it is": nn.Identity(), "flipped": Flip()}), nn.Flatten(), nn.Linear(8, 3)
    ))  # fmt: skip
    x = torch.arange(24.0).square().reshape(3, 1, 8)  # whole numbers: the sums are equal exactly
    data = x, torch.tensor([0, 1, 2])
    got = rank_paths(net, [(0,), (1,)], data)
    assert got[(1,)].nll == pytest.approx(evaluate(net, data, arch=(1,)).nll)
    assert got[(1,)].nll != pytest.approx(got[(0,)].nll)


def test_ranking_takes_a_layer_that_is_given_whole_numbers():
    class Ids(nn.Module):
        def forward(self, x):
            return x.long()

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Supernet(nn.Sequential(
            Ids(), nn.Embedding(7, 4), MixedOp({"as it is": nn.Identity(), "tanh": nn.Tanh()}),
            nn.Flatten(), nn.Linear(20, 3),
        ))  # fmt: skip
    data = torch.arange(30).reshape(6, 5) % 7, torch.arange(6) % 3
    got = rank_paths(net, [(0,), (1,)], data)
    for arch, score in got.items():
        assert score.nll == pytest.approx(evaluate(net, data, arch=arch).nll, abs=1e-12)


def test_tau_of_a_ranking_is_that_of_its_order():
    table = Table()
    score = {a: table.nll(a) for a in table.classes}
    assert table.tau(score) == pytest.approx(
        table.tau({a: math.exp(3 * v) for a, v in score.items()})
    )


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: optimal_probabilities([1.0, -1.0]), "at least 0"),
        (lambda: optimal_probabilities([1.0, math.nan]), "finite"),
        (lambda: draw_moments(torch.ones(2, 3), [0.5, 0.6]), "sum to 1"),
        (lambda: draw_moments(torch.ones(2, 3), [1.5, -0.5]), "sum to 1"),
        (lambda: draw_moments(torch.ones(2, 3), [0.5, 0.25, 0.25]), "p holds 3"),
        (lambda: draw_moments(torch.ones(2, 3), [1.0, 0.0]), "p is 0 at 1 places"),
        (lambda: ImportanceSampler(0, 1), "n=0: must be a positive integer"),
        (lambda: ImportanceSampler(5, True), "epochs=True"),
        (lambda: ImportanceSampler(5, 1).update(), "no norms in this epoch"),
        (lambda: ImportanceSampler(5, 1).observe(torch.zeros(2), torch.zeros(3)), r"shape \(B,\)"),
        (lambda: observed(5), "rows go from 5 to 5: must be from 0 to 4"),
        (lambda: observed(-1), "rows go from -1"),
        (lambda: observed(1, lambda v: 1.5), "schedule gave 1.5"),
        (lambda: PathSampler(nn.Linear(2, 2), 1, 1), "net is a Linear"),
        (lambda: PathSampler(cells(), 0, 1), "each=0"),
        (lambda: PathSampler(cells(), 1, 1, target={"conv3": 1.0}), "of none, skip, conv3"),
        (lambda: PathSampler(cells(), 1, 1, target={"none": -1, "skip": 0, "conv3": 1}), ">= 0"),
        (lambda: trained(pa_da, path=False, target={}), "needs path=True"),
        (lambda: trained(pa_da, schedule=lambda v: -1.0), "schedule gave -1.0"),
        (lambda: trained(pa_da, speed=2), "unexpected keyword"),
        (lambda: pa_da(cells(), X), "pair of tensors"),
        (lambda: pa_da(cells(), (X, Y[:5])), "rows: must be equally many"),
        (lambda: gradient_variance(torch.zeros(1, 2)), "n of at least 2"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says):
        call()


def observed(row, schedule=lambda v: v):
    s = ImportanceSampler(5, 2, schedule)
    s.observe(torch.tensor([row]), torch.ones(1))
    s.update()


def test_good_input_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trained(pa_da)


def test_ranking_sees_what_is_changed_in_place():
    torch.manual_seed(0)
    pair = {"skip": nn.Identity(), "conv": nn.Conv1d(6, 6, 3, padding=1)}
    own = {"a": nn.Sequential(nn.ReLU(inplace=True), nn.Conv1d(6, 6, 1)), "b": nn.Conv1d(6, 6, 1)}
    net = nn.Sequential(nn.Conv1d(1, 6, 3, padding=1), MixedOp(pair), nn.ReLU(inplace=True))
    net = Supernet(nn.Sequential(net, MixedOp(own), nn.Flatten(), nn.Linear(240, 10)))
    x, y = mnist1d("train")
    x, y = x[:100].reshape(100, 1, 40), y[:100]
    archs = [(0, 0), (1, 0), (0, 1), (1, 1), (0, 0)]
    for order in (archs, archs[::-1]):
        assert rank_paths(net, order, (x, y)) == rank_paths(net, order, (x, y), reuse=False)
    assert (1, 0) in rank_paths(net, torch.tensor(archs), (x, y, y))
    with pytest.raises(ValueError, match="at least one path"):
        rank_paths(net, [], (x, y))


def test_a_pass_that_is_broken_off_closes_no_epoch():
    rows = ImportanceSampler(20, 3)
    walk = iter(rows)
    some = torch.tensor([next(walk) for _ in range(5)])
    rows.observe(some, torch.ones(5))
    with pytest.warns(UserWarning, match="broken off"):
        order = list(rows)
    assert rows.epoch == 0 and len(set(order)) == 20 and float(rows.q.max()) == 1 / 20
    rows.observe(torch.arange(20), torch.arange(20.0))
    list(rows)
    assert rows.epoch == 1


def test_what_does_not_fit_is_refused():
    with pytest.raises(TypeError, match="samples must be tuples"):
        Numbered([{"x": 1}])[0]
    assert Numbered([(5,), (6,)])[-1] == (1, 6)
    net, data = Supernet(CellNet(CellSpace(), cells=1)), tuple(v[:50] for v in mnist1d("train"))
    for name in ("loss", "sampler"):
        with pytest.raises(TypeError, match=name):
            pa_da(net, data, **{name: None})
    with pytest.raises(TypeError, match="x is torch.float64, the model is torch.float32"):
        pa_da(net, (data[0].double(), data[1]))
    with pytest.raises(ValueError, match="batch_size=0"):
        pa_da(net, data, batch_size=0)


def test_validation_is_not_observed():
    rows = ImportanceSampler(20, 3)
    loss, net = weighted_loss(rows), nn.Linear(4, 3)
    batch = torch.arange(20), torch.zeros(20, 4), torch.zeros(20, dtype=torch.long)
    with torch.no_grad():
        loss(net, batch)
    assert not rows.seen
    loss(net, batch)
    assert len(rows.seen) == 1


@pytest.mark.parametrize("reweight", [False, True])
def test_a_loss_of_torch_as_a_module(reweight):
    g = torch.Generator().manual_seed(0)
    net, x = nn.Linear(3, 4), torch.randn(6, 3, generator=g)
    batch = torch.arange(6), x, torch.tensor([0, 1, 2, 3, 0, 1])
    rows = ImportanceSampler(6, 2)
    rows.q = torch.tensor([0.1, 0.3, 0.1, 0.2, 0.2, 0.1], dtype=torch.float64)
    weight = torch.tensor([1.0, 2.0, 0.5, 1.0])
    module = nn.CrossEntropyLoss(weight)
    want = F.cross_entropy(net(x), batch[2], weight)
    if reweight:
        each = F.cross_entropy(net(x), batch[2], weight, reduction="none")
        want = (each * rows.weights(batch[0]).float()).mean()
    got = weighted_loss(rows, reweight, module)(net, batch)
    torch.testing.assert_close(got, want)
    assert module.reduction == "mean"  # the user's own is left as it was


def test_a_pass_after_one_that_went_wrong_starts_afresh():
    rows = ImportanceSampler(4, 2)
    rows.observe(torch.arange(4), torch.tensor([1.0, math.nan, 1.0, 1.0]))
    with pytest.raises(ValueError, match="nan"):
        rows.update()
    rows.observe(torch.arange(4), torch.ones(4))
    rows.update()
    assert rows.epoch == 1
