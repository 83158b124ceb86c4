"""PC-DARTS: the partial mixture, its bytes, the weights of edges, the choice at the end."""

import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffkit.core.data import mnist1d
from diffkit.nas.pc_darts import (
    EdgeNormalised,
    PartialMixed,
    channel_shuffle,
    derive,
    pc_darts,
    pc_supernet,
    thin,
)
from diffkit.nas.supernet import (
    CANDIDATES,
    CellNet,
    CellSpace,
    MixedOp,
    Supernet,
    Zero,
    classification,
    evaluate,
    first_order,
    saved_bytes,
    second_order,
    single_path,
)

SPACE = CellSpace()
X, Y = mnist1d("train")
close = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


def halves(n=200):
    return (X[:n], Y[:n]), (X[-n:], Y[-n:])


def layer(k, w, reorder="shuffle", channels=8, **how):
    make = thin(CANDIDATES, k)
    out = PartialMixed({o: make[o](channels) for o in SPACE.ops}, k, reorder=reorder, **how)
    out.choice = w
    return out.double()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("shape", [(2, 12), (2, 12, 5), (2, 12, 5, 4), (2, 12, 3, 2, 2)])
@pytest.mark.parametrize("groups", [1, 2, 3, 4, 6, 12])
def test_the_shuffle_is_torchs_and_its_inverse_is_one_too(shape, groups):
    x = draw(*shape)
    y = channel_shuffle(x, groups)
    if x.ndim > 2:  # torch's wants a place beside the channels
        assert torch.equal(y, F.channel_shuffle(x, groups))
    n = 12 // groups
    assert all(torch.equal(y[:, c * groups + g], x[:, g * n + c])
               for g in range(groups) for c in range(n))  # fmt: skip
    assert torch.equal(channel_shuffle(y, n), x)


def test_with_k_one_it_is_darts():
    nets = []
    for mixed in (partial(PartialMixed, k=1), None):
        torch.manual_seed(0)
        nets.append(Supernet(CellNet(SPACE, mixed=mixed)))
    a, b = (net(X[:32]) for net in nets)
    assert torch.equal(a, b)
    # and with equal weights of edges each node is divided by its inputs: 1, 2, 3
    normed = EdgeNormalised(nets[1].net)
    normed.load_state_dict(nets[1].state_dict() | {"beta": torch.zeros(6)})
    share = 1 / torch.tensor([1.0, 2, 2, 3, 3, 3])
    torch.testing.assert_close(normed(X[:32]), nets[1](X[:32], share[:, None] * nets[1].weights()))


@pytest.mark.parametrize("k", [2, 4, 8])
@pytest.mark.parametrize("reorder", ["shuffle", "roll", None])
def test_the_equation_by_hand(k, reorder):
    q, p = 0.4, torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    m, x, n = layer(k, q * p, reorder), draw(5, 8, 20), 8 // k
    mask = torch.zeros(8, 1, dtype=torch.float64)
    mask[:n] = 1
    conv = m.ops["conv3"](x[:, :n])
    mixed = F.pad(p[1] * x[:, :n] + p[2] * conv, (0, 0, 0, 8 - n))
    expected = q * (mixed + (1 - mask) * x)  # (1), times the weight of the edge
    back = {"shuffle": channel_shuffle(m(x), n), "roll": m(x).roll(n, 1), None: m(x)}
    close(back[reorder], expected)


@pytest.mark.parametrize("shape", [(3, 8), (3, 8, 5), (3, 8, 5, 4)])
@pytest.mark.parametrize("reorder", ["shuffle", "roll", None])
def test_identities_leave_every_channel(shape, reorder):
    m = PartialMixed({"a": nn.Identity(), "b": nn.Identity()}, 4, reorder=reorder)
    m.choice, x = torch.tensor([0.25, 0.75]), draw(*shape)
    y = m(x)
    close(y.sort(1).values, x.sort(1).values)
    assert torch.equal(y, x) == (reorder is None)


def test_none_cuts_the_part_only():
    m, x = layer(4, torch.tensor([1.0, 0, 0]).double(), None), draw(2, 8, 6)
    y = m(x)
    assert not y[:, :2].any() and torch.equal(y[:, 2:], x[:, 2:])


class Mark(nn.Module):
    def forward(self, x):
        return x + 1


def seen(channels, k, reorder, edges):
    m = PartialMixed({"mark": Mark()}, k, reorder=reorder)
    m.choice, x = 0, 1000.0 * torch.arange(channels)[None, :, None]
    for _ in range(edges):
        x = m(x)
    return sorted(int(v) // 1000 for v in x.flatten() if v % 1000)


@pytest.mark.parametrize("channels,k", [(16, 4), (8, 4), (32, 4), (12, 3), (10, 2)])
def test_whose_turn_it_is(channels, k):
    n = channels // k
    assert seen(channels, k, None, 9) == [*range(n)]
    for edges in range(1, k + 1):
        assert seen(channels, k, "roll", edges) == [*range(n * edges)]
    # multiplication by k modulo C - 1, equation (4), run backwards from the first places
    reach, at = set(range(n)), [*range(n)]
    for edges in range(1, 6):
        assert seen(channels, k, "shuffle", edges) == sorted(reach)
        at = [next(s for s in range(channels - 1) if k * s % (channels - 1) == a) for a in at]
        reach |= set(at)
    assert channels - 1 not in seen(channels, k, "shuffle", 50)


def test_sampled_channels():
    torch.manual_seed(0)
    m = PartialMixed({"mark": Mark()}, 4, random=True, reorder=None)
    m.choice, x = 0, draw(1, 8, 3)
    counts = torch.zeros(8)
    for _ in range(600):
        moved = (m(x) - x).mean((0, 2))
        assert sorted(moved.round().tolist()) == [0] * 6 + [1] * 2
        counts += moved.round()
    # 600 draws of share 1/4: standard error .018, so five of them
    assert (counts / 600 - 0.25).abs().max() < 0.09
    assert [(m.eval()(x) - x).round()[0, c, 0].item() for c in range(8)] == [1, 1] + [0] * 6


@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_bytes_of_one_layer(k):
    w = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    m, x = layer(k, w, channels=16), draw(8, 16, 400).requires_grad_()
    kept = saved_bytes(lambda: m(x)) / (8 * x.numel())
    # beside: two numbers a channel and k weights, against 8 * 400 numbers a channel
    assert kept == pytest.approx(1 + 3 / k, abs=2e-3)


def test_candidates_that_halve_need_a_bypass_that_does():
    ops = lambda: {"conv": nn.Conv2d(2, 2, 3, 2, 1), "max": nn.MaxPool2d(2)}
    x = draw(3, 8, 6, 6).float()
    good = PartialMixed(ops(), 4, bypass=nn.MaxPool2d(2), reorder=None)
    good.choice = torch.tensor([0.0, 1.0])
    torch.testing.assert_close(good(x), F.max_pool2d(x, 2))
    bad = PartialMixed(ops(), 4)
    bad.choice = good.choice
    with pytest.raises(ValueError, match=r"the bypass, \(6, 6\)"):
        bad(x)


def test_a_path_is_a_corner():
    torch.manual_seed(0)
    for net in (pc_supernet(SPACE, 4), pc_supernet(SPACE, 2, edge_norm=False, reorder="roll")):
        for arch in SPACE.random(5, torch.Generator().manual_seed(0)):
            by_weights = net(X[:32], weights=SPACE.onehot([arch])[0])
            torch.testing.assert_close(net(X[:32], arch=arch), by_weights)
        torch.testing.assert_close(net(X[:32]), net(X[:32], weights=net.weights()))


def random_net(seed, **how):
    g = torch.Generator().manual_seed(seed)
    net = pc_supernet(SPACE, 4, generator=g, **how).double()
    for v in net.arch_parameters():
        v.data.copy_(torch.randn(v.shape, generator=g, dtype=torch.float64))
    return net


def test_edge_weights():
    net = random_net(0)
    q, group = net.edge_weights(), torch.tensor([0, 1, 1, 2, 2, 2])
    assert torch.equal(net.group, group)
    for rows in ([0], [1, 2], [3, 4, 5]):
        close(q[rows], net.beta[rows].softmax(0))
    assert q[0] == 1
    # dq_i / dbeta_j = q_i (1[i = j] - q_j) within a group, else 0
    rows = [torch.autograd.grad(net.edge_weights()[e], net.beta)[0] for e in range(6)]
    slope = torch.stack(rows)
    same = (group[:, None] == group).double()
    close(slope, same * (torch.diag(q) - torch.outer(q, q)))
    close(net.weights(), q[:, None] * net.alpha.softmax(-1))
    assert {id(p) for p in net.arch_parameters()} == {id(net.alpha), id(net.beta)}


@pytest.mark.parametrize("how", [first_order, second_order(0.05)])
def test_gradients_of_alpha_and_beta(how):
    torch.manual_seed(0)
    net = random_net(1)
    t, v = ((x[:60].double(), y[:60]) for x, y in halves())
    how(net, classification, t, v)
    assert net.beta.grad[0] == 0  # alone at its node
    w, xi = net.weight_parameters(), getattr(how, "xi", 0)

    def value():
        kept = [p.detach().clone() for p in w]
        if xi:
            for p, g in zip(w, torch.autograd.grad(classification(net, t), w)):
                p.data.sub_(xi * g)
        out = classification(net, v).item()
        for p, k in zip(w, kept):
            p.data.copy_(k)
        return out

    for p, at in ((net.beta, (1,)), (net.beta, (4,)), (net.alpha, (3, 2)), (net.alpha, (1, 0))):
        sides = []
        for h in (1e-5, -2e-5):
            p.data[at] += h
            sides.append(value())
        p.data[at] += 1e-5
        # a central difference: error h^2, and rounding of 1e-16 / h
        assert p.grad[at].item() == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("top", [1, 2])
def test_the_choice_is_the_best_of_all(top):
    changed = 0
    for seed in range(12):
        net = random_net(seed)
        w = net.weights().detach()
        expected = []
        for j in (1, 2, 3):
            edges = [e for e, (_, to) in enumerate(SPACE.edges) if to == j]
            worth = lambda part, w=w: sum(w[e, 1:].max().item() for e in part)
            stay = max(itertools.combinations(edges, min(top, len(edges))), key=worth)
            expected += [1 + int(w[e, 1:].argmax()) if e in stay else 0 for e in edges]
        assert derive(net, top=top) == tuple(expected)
        plain = Supernet(net.net)
        plain.alpha = net.alpha
        assert derive(plain) == derive(net)  # q decides between edges, not on them
        changed += derive(plain, top=top) != derive(net, top=top)
    assert changed >= 3


def test_the_warm_up_rests_and_says_so():
    torch.manual_seed(0)
    net = pc_supernet(SPACE, 2)
    w = [p.detach().clone() for p in net.weight_parameters()]
    first = [p.detach().clone() for p in net.arch_parameters()]
    rested = []
    note = lambda n, e: rested.append(
        all(torch.equal(a, b) for a, b in zip(first, n.arch_parameters()))
    )
    found = pc_darts(net, *halves(), epochs=3, warmup=0.34, on_epoch=note, top=2)
    assert found.active.tolist() == [False, True, True] and rested == [True, False, False]
    assert torch.equal(found.weights[0], found.weights[1])
    assert not torch.equal(net.beta[1:], first[1][1:])
    assert any(not torch.equal(a, b) for a, b in zip(w, net.weight_parameters()))
    assert found.arch == derive(net, top=2) and found.arch[3:].count(0) == 1
    # the paper's share of 15 in 50
    short = lambda: pc_darts(pc_supernet(SPACE), *halves(100), epochs=10)
    assert short().active.tolist() == [False] * 3 + [True] * 7


def test_the_informative_edge_gets_the_weight():
    class Noise(nn.Module):
        def forward(self, x):
            return torch.randn_like(x)

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.noise = PartialMixed({"noise": Noise()}, 1)
            self.signal = PartialMixed({"skip": nn.Identity()}, 1)
            self.head = nn.Linear(40, 10)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.noise(x) + self.signal(x))

    torch.manual_seed(0)
    net = EdgeNormalised(Sum(), ["here", "here"])
    data = (X[:2000], Y[:2000]), (X[2000:], Y[2000:])
    pc_darts(net, *data, epochs=4, arch_lr=0.05, warmup=0.25)
    assert net.edge_weights()[1] > 0.7


def test_a_network_of_your_own():
    class Yours(nn.Module):
        def __init__(self):
            super().__init__()
            conv = lambda w: nn.Conv2d(2, 2, w, padding=w // 2)
            two, three = (1, 3), (1, 3, 5)
            self.stem, self.head = nn.Conv2d(1, 8, 3), nn.Linear(8, 10)
            self.a = PartialMixed({f"conv{w}": conv(w) for w in three}, 4)
            self.b = PartialMixed({f"conv{w}": conv(w) for w in two}, 4, random=True)
            self.c = MixedOp({"none": Zero(), "skip": nn.Identity()})

        def forward(self, x):
            h = self.stem(x.unflatten(-1, (5, 8)))
            return self.head((self.a(h) + self.b(h) + self.c(h)).relu().mean((2, 3)))

    torch.manual_seed(0)
    net = EdgeNormalised(Yours(), ["sum"] * 3)
    found = pc_darts(net, *halves(), epochs=2, warmup=0.5)
    assert found.weights.shape == (3, 3, 3) and found.weights[-1][1, 2] == 0
    assert net.weights().sum().item() == pytest.approx(1, abs=1e-6)
    assert net.names(found.arch)[2] == "skip"
    single_path(net, halves()[0], epochs=1)
    assert 0 <= evaluate(net, halves()[1], arch=found.arch).acc <= 1
    copy = EdgeNormalised(Yours(), ["sum"] * 3)
    copy.load_state_dict(net.state_dict())
    x = X[:4]
    torch.testing.assert_close(copy.eval()(x), net.eval()(x))


X8 = torch.zeros(2, 8, 4)


def mixture(k=4, channels=None, **how):
    c = 8 // k if channels is None else channels
    m = PartialMixed({"conv": nn.Conv1d(c, c, 3, padding=1)}, k, **how)
    m.choice = torch.ones(1)
    return m


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: channel_shuffle(X8, 3), "groups=3 does not divide the 8"),
        (lambda: channel_shuffle(X8, 0), "groups=0"),
        (lambda: thin(CANDIDATES, 0), "k=0"),
        (lambda: mixture(1.5, 2), "k=1.5"),
        (lambda: PartialMixed({}, 2), "ops is empty"),
        (lambda: mixture(reorder="rotate"), "reorder='rotate'"),
        (lambda: mixture(3)(X8), "k=3 does not divide the 8 channels"),
        (lambda: mixture(4, 8)(X8), "refuses 2 of 8 channels: with k=4"),
        (lambda: pc_supernet(SPACE, 3), "k=3 does not divide channels=8"),
        (lambda: pc_supernet(SPACE, wide=2), "wide"),
        (lambda: EdgeNormalised(nn.Sequential(mixture())), "groups=None needs a CellNet"),
        (lambda: EdgeNormalised(CellNet(SPACE), [1, 2]), "has 2 entries, one a choice: 6"),
        (lambda: derive(pc_supernet(SPACE), top=0), "top=0"),
        (lambda: derive(pc_supernet(SPACE), top=2, drop="cut"), "no candidate 'cut'"),
        (lambda: derive(Supernet(nn.Sequential(mixture())), top=1), "groups=None"),
        (lambda: pc_darts(pc_supernet(SPACE), *halves(), epoch=1), "epoch"),
        (lambda: pc_darts(pc_supernet(SPACE), *halves(), warmup=2), "warmup=2"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_a_candidate_that_changes_the_channels():
    m = PartialMixed({"conv": nn.Conv1d(2, 4, 1)}, 4)
    m.choice = torch.ones(1)
    with pytest.raises(ValueError, match=r"give \(2, 4, 4\), expected 2 of 8 channels"):
        m(X8)


def test_an_error_of_a_candidate_that_is_not_about_size_comes_through():
    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("out of memory")

    m = PartialMixed({"broken": Broken()}, 4)
    m.choice = torch.ones(1)
    with pytest.raises(RuntimeError, match="^out of memory$"):
        m(X8)


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.Conv1d(8, 8, 1), id="convolution"),
        pytest.param(lambda: nn.BatchNorm1d(8), id="normalisation"),
        pytest.param(lambda: nn.Sequential(nn.Flatten(), nn.Linear(32, 8)), id="linear"),
    ],
)
def test_a_candidate_built_for_all_channels_is_named(make):
    m = PartialMixed({"whole": make()}, 4)
    m.choice = torch.ones(1)
    with pytest.raises(ValueError, match="refuses 2 of 8 channels: with k=4 build it for 2"):
        m(X8)
