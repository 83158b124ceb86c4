"""sharpDARTS: Max-W and its gradient, the grid and its best path, the block, the schedule; against
closed forms, brute force, networkx and torch's own schedulers."""

import copy
import io
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffkit.core.data import mnist1d
from diffkit.core.training import fit
from diffkit.nas.rarts import rarts
from diffkit.nas.sharp_darts import (
    CosinePower,
    GridLayer,
    HyperCuboid,
    SharpSepConv,
    cosine_power,
    max_w,
    max_w_gradient,
)
from diffkit.nas.supernet import (
    CellNet,
    CellSpace,
    MixedOp,
    Supernet,
    Zero,
    classification,
    evaluate,
    first_order,
    search,
    single_path,
)

F64 = torch.float64
X, Y = mnist1d("train")
BATCH = X[:64], Y[:64]
close = torch.testing.assert_close
schedulers = torch.optim.lr_scheduler


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


# --- Max-W


@pytest.mark.parametrize("K", [1, 2, 3, 8, 32])
@pytest.mark.parametrize("detach", [False, True])
def test_weights_of_max_w(K, detach):
    w = draw(40, K).softmax(-1)
    v, top = max_w(w, detach), w.max(-1).values
    assert (v.max(-1).values == 1).all()
    assert torch.equal(v.argsort(-1), w.argsort(-1))
    close(v.sum(-1), 1 + K * (1 - top))  # (3)
    close(v - w, (1 - top)[:, None].expand(-1, K))
    hot = F.one_hot(w.argmax(-1), K).to(F64)
    assert torch.equal(max_w(hot, detach), hot)
    close((v - hot).abs().sum(-1), K * (1 - top))
    close(max_w(torch.full((K,), 1 / K, dtype=F64)), torch.ones(K, dtype=F64))


def test_slopes_by_hand():
    z = torch.tensor([0.7, -0.2, 0.4], dtype=F64)  # of the sum of w~ z, the leader is the second
    for detach, want in ((False, [0.7, -0.7 - 0.4, 0.4]), (True, z.tolist())):
        w = torch.tensor([0.2, 0.5, 0.3], dtype=F64, requires_grad=True)
        (max_w(w, detach) * z).sum().backward()
        assert w.grad.tolist() == pytest.approx(want)


@pytest.mark.parametrize("K", [1, 2, 3, 8])
def test_closed_form_is_the_automatic_gradient(K):
    alpha = draw(30, K).requires_grad_()
    g, w = draw(30, K, seed=1), alpha.softmax(-1)
    for detach in (False, True):
        (auto,) = torch.autograd.grad((max_w(w, detach) * g).sum(), alpha, retain_graph=True)
        close(max_w_gradient(w, g, detach), auto)
        close(auto.sum(-1), torch.zeros(30, dtype=F64), rtol=0, atol=1e-12)
    # central differences of (2) itself; their error is h^2, and rounding over h
    h, value = 1e-5, lambda a: (max_w(a.softmax(-1)) * g).sum(-1)
    for k in range(K):
        e = h * F.one_hot(torch.tensor(k), K)
        slope = (value(alpha.detach() + e) - value(alpha.detach() - e)) / (2 * h)
        close(max_w_gradient(w, g)[:, k].detach(), slope, rtol=1e-6, atol=1e-8)


def test_several_leaders_share():
    alpha = torch.tensor([[1.0, 1.0, 0.0]], dtype=F64, requires_grad=True)
    g, w = torch.tensor([[0.3, -0.5, 0.9]], dtype=F64), alpha.softmax(-1)
    (auto,) = torch.autograd.grad((max_w(w) * g).sum(), alpha)
    close(max_w_gradient(w, g), auto)


@pytest.mark.parametrize("detach", [False, True])
def test_in_a_supernet(detach):
    torch.manual_seed(0)
    relax = lambda a: max_w(a.softmax(-1), detach)
    net = Supernet(CellNet(CellSpace()), relax).double()
    net.alpha.data = draw(6, 3)
    batch = X[:64].double(), Y[:64]
    weights = net.weights().detach().requires_grad_()
    loss = F.cross_entropy(net(batch[0], weights=weights), batch[1])
    (g,) = torch.autograd.grad(loss, weights)
    first_order(net, classification, None, batch)
    close(net.alpha.grad, max_w_gradient(net.alpha.softmax(-1), g, detach))
    # choices of different size: what is not there has weight 0 in the softmax
    two = nn.Sequential(
        nn.Flatten(),
        nn.Linear(40, 10),
        MixedOp({"skip": nn.Identity(), "none": Zero()}),
        MixedOp({"a": nn.Identity(), "b": nn.Tanh(), "c": nn.ReLU()}),
    )
    mixed = Supernet(two, relax)
    found = search(mixed, BATCH, BATCH, epochs=2, batch_size=32)
    assert (found.weights.max(-1).values == 1).all() and found.arch[0] == 0
    close(found.weights.isfinite().all(), torch.tensor(True))


# --- the grid


def layer(cin, cout, act="relu", scale=1.0, stride=1):
    return nn.Sequential({"relu": nn.ReLU(), "tanh": nn.Tanh()}[act], nn.Linear(cin, cout))


def cuboid(widths=(4, 8, 16), layers=3, axes=None, **how):
    ends = dict(stem=lambda c: nn.Linear(40, c), head=lambda c: nn.Linear(c, 10, bias=False))
    axes = {"act": ["relu", "tanh"]} if axes is None else axes
    return HyperCuboid(widths, layer, axes, layers=layers, before=nn.Flatten(), **ends | how)


def length(net, path, w):
    return sum(w[e, k].item() for e, k in enumerate(path))


@pytest.mark.parametrize("seed", range(3))
def test_best_path_is_the_best_of_all(seed):
    net = cuboid(layers=2)
    every = list(net.paths())
    assert len(every) == len(set(every)) == 3 * 6 * 6
    for e in range(20):
        net.alpha.data = 3 * draw(2, 18, seed=20 * seed + e).float()
        w = net.weights().detach().double()
        for by, v in (("sum", w), ("product", w.log())):
            best = net.best_path(by)
            assert best in every
            assert length(net, best, v) == pytest.approx(max(length(net, p, v) for p in every))
        assert net.argmax() == net.best_path("sum")
        assert net.best_path(weights=max_w(w)) == net.best_path()


def test_sum_and_product_may_differ():
    net = cuboid((4, 8), 2, axes={})
    # over width 4: .9 and .001; over width 8: .3 and .4
    w = torch.tensor([[0.9, 0.3, 0.0, 0.0], [0.001, 0.0, 0.4, 0.0]])
    assert net.best_path(weights=w) == (0, 0)
    assert net.best_path("product", weights=w) == (1, 2)
    # Max-W lifts the small ones, and the product changes its mind; the sum does not
    assert net.best_path("product", weights=max_w(w)) == (0, 0) == net.best_path(weights=max_w(w))


def test_best_path_is_that_of_networkx():
    nx = pytest.importorskip("networkx")
    net = cuboid((4, 8, 16), 4, relax=lambda a: max_w(a.softmax(-1)))
    for seed in range(5):
        net.alpha.data = 2 * draw(4, 18, seed=seed).float()
        graph, w = nx.DiGraph(), net.weights().detach().double()
        for i in range(3):
            graph.add_edge("in", (0, i), weight=1)
            graph.add_edge((4, i), "out", weight=1)
        for e, grid in enumerate(net.net.layers):
            for k, (i, j) in enumerate(grid.ends):
                graph.add_edge((e, i), (e, k, "layer"), weight=1)
                graph.add_edge((e, k, "layer"), (e + 1, j), weight=w[e, k].item())
        nodes = nx.dag_longest_path(graph)
        assert net.best_path() == tuple(n[1] for n in nodes if len(n) == 3 and n[2] == "layer")


def test_one_path_three_ways():
    torch.manual_seed(0)
    net = cuboid(layers=3)
    x = X[:16]
    for seed in range(4):
        p = net.random_path(rng(seed))
        corner = torch.stack([F.one_hot(torch.tensor(k), 18).float() for k in p])
        close(net(x, arch=p), net(x, weights=corner))
        close(net(x, arch=p), net.plain(p, inherit=True)(x))
        new = net.plain(p)
        count = lambda m: sum(v.numel() for v in m.parameters())
        assert new(x).shape == (16, 10) and count(new) == count(net.plain(p, inherit=True))
        assert [m[1].out_features for m in new[2:5]] == [c["cout"] for c in net.choices(p)]
    close(net(x), net(x, weights=net.weights()))


@pytest.mark.parametrize("layers", [1, 3])
def test_a_grid_of_one_is_the_plain_network(layers):
    net = HyperCuboid([6], layer, {"act": ["tanh"]}, layers=layers)
    plain = nn.Sequential(*(copy.deepcopy(g.ops)["6 to 6, act tanh"] for g in net.net.layers))
    x = torch.randn(5, 6)
    close(net(x), plain(x))
    assert list(net.paths()) == [(0,) * layers] and net.weights().tolist() == [[1.0]] * layers


def test_the_mixture_by_hand():
    # two widths, one layer: (5) written out
    net = HyperCuboid([[3], [2, 4]], layer, head=lambda c: nn.Linear(c, 1)).double()
    x, w = draw(7, 3), net.weights()[0]
    a, b = net.net.layers[0].ops.values()
    close(net(x), net.net.heads[0](w[0] * a(x)) + net.net.heads[1](w[1] * b(x)))
    close(w.sum(), torch.ones((), dtype=F64))
    assert net.ops == (("3 to 2", "3 to 4"),)


def test_random_paths_are_equally_likely():
    net, n = cuboid((4, 8), 2, axes={}), 4000
    g = rng()
    counts = {p: 0 for p in net.paths()}
    for _ in range(n):
        counts[net.random_path(g)] += 1
    # 8 paths; five standard errors of a share of 1/8
    assert max(abs(c / n - 1 / 8) for c in counts.values()) < 5 * math.sqrt(7 / 64 / n)


def test_strides_dimensions_and_values_with_dots():
    conv = lambda cin, cout, stride, mid: SharpSepConv(cin, cout, stride=stride, mid=mid, dims=1)
    net = HyperCuboid(
        [[1], [4, 8], [4, 8]],
        conv,
        {"mid": [0.5, 1.0]},
        each=[{"stride": 1}, {"stride": 2}],
        head=lambda c: SharpSepConv(c, 6, dims=1),
        after=nn.Sequential(nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 10)),
        relax=lambda a: max_w(a.softmax(-1)),
    )
    assert net(X[:8]).shape == (8, 10)
    assert net.ops[0][0] == "1 to 4, mid 0_5" and [len(v) for v in net.grid] == [4, 8]
    p = net.random_path(rng())
    assert net.plain(p)(X[:8]).shape == (8, 10)
    assert [m[1].stride for m in net.plain(p)[2:4]] == [(1,), (2,)]
    half = net.best_path(exclude=["1.0"])
    assert [c["mid"] for c in net.choices(half)] == [0.5, 0.5]


def test_searches_of_the_chapter_run_on_it():
    torch.manual_seed(0)
    net = cuboid((4, 8), 2, relax=lambda a: max_w(a.softmax(-1)))
    found = search(net, BATCH, BATCH, epochs=2, batch_size=32, arch_lr=0.1)
    assert found.arch == net.best_path() and found.weights.shape == (3, 2, 8)
    assert not torch.equal(found.weights[0], found.weights[-1])
    assert 0 <= evaluate(net, BATCH, arch=found.arch).acc <= 1
    rarts(net, BATCH, BATCH, epochs=1, batch_size=32)
    single_path(net, BATCH, epochs=1, batch_size=32, sampler=lambda n: [n.random_path()])
    with pytest.raises(ValueError, match=r"take random_path\(\)"):
        single_path(net, BATCH, epochs=4, batch_size=8)
    other = cuboid((4, 8), 2, relax=net.relax)
    other.load_state_dict(net.state_dict())
    close(other(X[:4]), net(X[:4]))


def test_the_search_finds_the_only_layer_that_works():
    class Broken(nn.Module):
        def __init__(self, cout):
            super().__init__()
            self.cout = cout

        def forward(self, x):
            return torch.zeros(len(x), self.cout)

    make = lambda cin, cout, kind: (
        nn.Sequential(nn.Tanh(), nn.Linear(cin, cout)) if kind == "good" else Broken(cout)
    )
    torch.manual_seed(0)
    net = HyperCuboid(
        [[40], [4, 16]],
        make,
        {"kind": ["bad", "good"]},
        head=lambda c: nn.Linear(c, 10),
        before=nn.Flatten(),
    )
    found = search(net, (X[:1000], Y[:1000]), (X[1000:2000], Y[1000:2000]), epochs=3, arch_lr=0.1)
    assert net.choices(found.arch)[0]["kind"] == "good"


# --- the block


@pytest.mark.parametrize(
    "dims,cin,cout,k,mid,choke",
    [
        (2, 16, 16, 3, 1.0, None),
        (2, 16, 32, 5, 4.0, None),
        (2, 64, 48, 3, 1.0, 32),
        (1, 8, 4, 7, 2.0, None),
        (3, 4, 6, 3, 0.5, None),
    ],
)
def test_counts_and_shapes_of_the_block(dims, cin, cout, k, mid, choke):
    m = choke or int(mid * cout)
    for stride, dilation in itertools.product((1, 2), (1, 2)):
        block = SharpSepConv(cin, cout, k, stride, dilation, mid, dims, choke=choke)
        convs = [c for c in block if hasattr(c, "kernel_size")]
        count = sum(p.numel() for c in convs for p in c.parameters())
        assert count == k**dims * cin + cin * m + k**dims * m + m * cout  # (7)
        norms = sum(p.numel() for p in block.parameters()) - count
        assert norms == 2 * m + 2 * cout
        assert [c.dilation[0] for c in convs] == [dilation, 1, 1, 1]
        assert [c.stride[0] for c in convs] == [stride, 1, 1, 1]
        n = 16 if dims < 3 else 8
        y = block(torch.randn(2, cin, *[n] * dims))
        assert y.shape == (2, cout, *[n // stride] * dims)


def test_the_block_by_functions():
    block = SharpSepConv(3, 5, 3, 2, 2, 2.0, 1, norm=lambda c: nn.Identity()).double()
    a, b, c, d = (m.weight for m in block if hasattr(m, "weight"))
    x = draw(2, 3, 12)
    h = F.conv1d(F.conv1d(x.relu(), a, stride=2, padding=2, dilation=2, groups=3), b)
    close(block(x), F.conv1d(F.conv1d(h.relu(), c, padding=1, groups=10), d))


# --- the schedule


def optimizer(*rates):
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": r} for r in rates or (0.1, 0.02)]
    return torch.optim.SGD(groups)


def rates(scheduler, n):
    out, opt = [], scheduler.optimizer
    for _ in range(n):
        out.append([g["lr"] for g in opt.param_groups])
        opt.step()
        scheduler.step()
    return torch.tensor(out, dtype=F64)


def test_order_one_is_the_cosine_of_torch():
    ours = rates(CosinePower(optimizer(), 20, 1, 1e-3), 21)
    torchs = rates(schedulers.CosineAnnealingLR(optimizer(), 20, 1e-3), 21)
    close(ours, torchs, rtol=0, atol=1e-12)
    ours = rates(CosinePower(optimizer(), 20, 1, 1e-3, restart=True), 65)
    torchs = rates(schedulers.CosineAnnealingWarmRestarts(optimizer(), 20, eta_min=1e-3), 65)
    close(ours, torchs, rtol=0, atol=1e-12)
    t = torch.arange(101)
    near = cosine_power(t, 100, 1 + 1e-6) - cosine_power(t, 100, 1)
    assert 0 < near.abs().max() < 2e-7  # u (1 - u) / 2 times 1e-6


@pytest.mark.parametrize("order", [1, 1 + 1e-12, 2, 10, 1e6, 1e200])
def test_ends_falls_and_the_formula(order):
    t = torch.arange(101)
    s = cosine_power(t, 100, order)
    assert s[0] == 1 and s[-1] == 0 and (s.diff() <= 0).all() and s.dtype == F64
    assert (cosine_power(t, 100, 2 * order)[1:-1] < s[1:-1]).all()
    u = (1 + torch.cos(math.pi * t.double() / 100)) / 2
    if 1 < order < 1e10 and order != 1 + 1e-12:  # as the paper writes it
        c = order
        close(s, (c ** (u + 1) - c) / (c**2 - c), rtol=0, atol=1e-9)
        # s = c^(u - 1) up to 1 / (c - 1)
        assert (s - c ** (u - 1)).abs().max() < 1 / (c - 1)


def test_numbers_arrays_and_fits_progress():
    s = cosine_power(np.arange(11), 10, 3)
    assert isinstance(cosine_power(5, 10, 9), float)
    assert cosine_power(5, 10, 9) == pytest.approx(0.25)
    assert [cosine_power(k, 10, 3) for k in range(11)] == pytest.approx(s.tolist())
    assert cosine_power(torch.tensor([[0.0, 0.5], [1.0, 2.0]]), 1.0, 9).tolist() == [
        [1, pytest.approx(0.25)],
        [0, 0],
    ]
    seen = []
    opt = torch.optim.SGD([p := nn.Parameter(torch.zeros(1))], 0.1)
    model = nn.ParameterList([p])
    fit(
        model,
        lambda m, b: (m[0] - b).square().mean(),
        torch.zeros(8, 1),
        steps=6,
        optimizer=opt,
        schedule=lambda progress: cosine_power(progress, 1.0, 10),
        callback=lambda run: seen.append(opt.param_groups[0]["lr"]),
        progress=False,
    )
    assert seen == pytest.approx([0.1 * cosine_power(k, 6, 10) for k in range(6)])


@pytest.mark.parametrize(
    "T,order,warmup",
    [(50, 2, 5), (120, 2, 5), (2000, 2, 5), (300, 10, 5), (300, 10, 0), (12, 1, 3), (2, 2, 0)],
)
def test_the_values_of_the_official_code(T, order, warmup):
    epoch = np.arange(1, T + 1)  # that counts from 1, and scales to the largest and the smallest
    u = (1 + np.cos(np.pi * (epoch - warmup) / (T - warmup))) / 2
    v = u if order == 1 else order ** (u + 1)
    v = (v - v.min()) / (v - v.min()).max()
    if warmup:
        v[: warmup + 1] = np.arange(1, warmup + 2) / (warmup + 1)
    got = cosine_power(torch.arange(T), T, order, warmup, official=True)
    close(got, torch.tensor(v), rtol=0, atol=1e-12)
    if warmup:  # one epoch ahead of (8)
        ours = cosine_power(torch.arange(T + 1), T, order, warmup)
        close(got[warmup + 1 :], ours[warmup + 2 :], rtol=0, atol=1e-12)


def test_warm_up():
    s = cosine_power(torch.arange(21), 20, 2, warmup=5)
    assert s[:6].tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    close(s[5:], cosine_power(torch.arange(16), 15, 2))
    again = CosinePower(optimizer(1.0), 20, 2, 0.0, warmup=5, restart=True)
    r = rates(again, 55)[:, 0]
    close(r[:20], s[:20])
    close(r[20:35], s[5:20])  # without another warm-up
    close(r[35:50], s[5:20])


@pytest.mark.parametrize("at", [0, 3, 7, 20, 24])
@pytest.mark.parametrize("how", [{}, {"restart": True}, {"official": True}, {"warmup": 4}])
def test_resume_in_the_middle(at, how):
    make = lambda: CosinePower(optimizer(), 20, 10, 1e-3, **how)
    whole = rates(make(), 30)
    first = make()
    rates(first, at)
    file = io.BytesIO()
    torch.save({"s": first.state_dict(), "o": first.optimizer.state_dict()}, file)
    file.seek(0)
    kept = torch.load(file, weights_only=True)  # plain numbers, no table
    assert not any(isinstance(v, torch.Tensor) for v in kept["s"].values())
    second = CosinePower(optimizer(), 33, 2, 0.0)  # another curve: the state brings its own
    second.load_state_dict(kept["s"])
    second.optimizer.load_state_dict(kept["o"])
    close(rates(second, 30 - at), whole[at:])
    # or torch's way, by last_epoch
    if at:
        opt = optimizer()
        opt.load_state_dict(kept["o"])
        third = CosinePower(opt, 20, 10, 1e-3, last_epoch=at - 1, **how)
        close(rates(third, 30 - at), whole[at:])


def test_it_stays_at_the_end():
    r = rates(CosinePower(optimizer(), 10, 2, 1e-3), 15)
    assert (r[10:] == 1e-3).all() and r[9].min() > 1e-3
    one = rates(CosinePower(optimizer(), 1, 2, 1e-3), 3)
    assert one[:, 0].tolist() == pytest.approx([0.1, 1e-3, 1e-3])


# --- errors

TWO = lambda: optimizer(0.1)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: cosine_power(0, 10, 0.9), "order=0.9"),
        (lambda: cosine_power(0, 10, math.inf), "order=inf"),
        (lambda: cosine_power(0, 0), "total=0"),
        (lambda: cosine_power(0, 10, 2, 10), "warmup=10: must be below total=10"),
        (lambda: cosine_power(-1, 10), "t=-1"),
        (lambda: cosine_power(0, 6, 2, 5, True), "two epochs after the warm-up"),
        (lambda: CosinePower(TWO(), 0), "total=0: must be an integer of at least 1"),
        (lambda: CosinePower(TWO(), 1.5), "total=1.5"),
        (lambda: CosinePower(TWO(), 10, 0.5), "order=0.5"),
        (lambda: CosinePower(TWO(), 10, warmup=-1), "warmup=-1"),
        (lambda: CosinePower(TWO(), 10, eta_min=0.2), "eta_min=0.2 is above the rate 0.1"),
        (lambda: CosinePower(TWO(), 10, restarts=True), "restarts"),
        (lambda: SharpSepConv(4, 4, k=4), "k=4: must be odd"),
        (lambda: SharpSepConv(4, 4, dims=4), "dims=4"),
        (lambda: SharpSepConv(4, 4, mid=0), "mid=0"),
        (lambda: SharpSepConv(4, 4, mid=0.1), r"mid \* cout=0"),
        (lambda: SharpSepConv(4, 4, choke=0), "choke=0"),
        (lambda: SharpSepConv(4, 4, stride=0), "stride=0"),
        (lambda: HyperCuboid([4, 8], layer), "layers=None"),
        (lambda: HyperCuboid([[4], [8]], layer, layers=1), "layers=1"),
        (lambda: HyperCuboid([4], layer, layers=0), "at least one layer"),
        (lambda: HyperCuboid([[4], []], layer), r"widths=\[\]"),
        (lambda: HyperCuboid([[4], [8, 8]], layer), r"widths=\[8, 8\]"),
        (lambda: HyperCuboid([[4], [0]], layer), r"widths=\[0\]"),
        (lambda: cuboid(axes={"act": []}), "'act' is empty"),
        (lambda: cuboid(axes={"cin": [1]}), "'cin' is given already"),
        (lambda: cuboid(layers=1, each=[{"act": "relu"}]), "'act' is given already"),
        (lambda: cuboid(each=[{}]), "each has 1 entries, one a layer: 3"),
        (lambda: cuboid(stem=None), "stem=None needs one width"),
        (lambda: cuboid(head=None), "head=None needs one width"),
        (lambda: cuboid(depth=3), "depth"),
        (lambda: cuboid().best_path("mean"), "by='mean'"),
        (lambda: cuboid().best_path(exclude=["relu", "tanh"]), "leaves no path"),
        (lambda: cuboid().plain((0, 0)), "must be 3 numbers below"),
        (lambda: cuboid()(X[:2], arch=(0, 0, 18)), "must be 3 numbers below"),
        (lambda: cuboid()(X[:2], arch=(0, 17, 0)), "layer 0 ends with width 4, layer 1 starts"),
        (lambda: GridLayer({"a": nn.Identity()}, [(0, 0)], 1)([X]), "inside a Supernet"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=says):
        call()


def test_a_network_built_new_is_new():
    torch.manual_seed(0)
    layer = lambda cin, cout: nn.Linear(cin, cout)
    cube = HyperCuboid([[4], [3, 5], [2]], layer, before=nn.Linear(40, 4), after=nn.Linear(2, 10))
    given = cube.net.before.weight.detach().clone()
    with torch.no_grad():
        for p in cube.net.parameters():
            p.add_(1.0)
    path = cube.argmax()
    new, kept = cube.plain(path), cube.plain(path, inherit=True)
    assert torch.equal(new[0].weight, given)
    assert torch.equal(kept[0].weight, cube.net.before.weight)
    assert not torch.equal(new[-1].weight, cube.net.after.weight)


def test_best_path_refuses_what_does_not_fit():
    cube = HyperCuboid([[4], [3, 5], [2]], lambda cin, cout: nn.Linear(cin, cout))
    with pytest.raises(ValueError, match="weights has shape"):
        cube.best_path(weights=torch.rand(1, 2))
    with pytest.raises(TypeError, match="sequence of names"):
        cube.best_path(exclude="none")
    assert cube.choices(cube.best_path(exclude=(5,)))[0]["cout"] == 3
    assert cube.choices(cube.best_path(exclude=("3",)))[0]["cout"] == 5


def test_what_is_not_there_has_no_weight():
    pair = {"a": nn.Identity(), "b": nn.Identity()}
    net = nn.Sequential(MixedOp(pair), MixedOp(pair | {"c": nn.Identity()}))
    w = Supernet(net, relax=lambda a: max_w(a.softmax(-1))).weights()
    assert w[0, 2] == 0 and (w[0, :2] > 0.9).all() and (w[1] > 0.9).all()
