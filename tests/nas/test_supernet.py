"""The space of cells, the mixed network, both orders of the gradient, and the shipped table."""

import itertools
import math
import time
from collections import Counter

import pytest
import torch
from torch import nn

from diffkit.core.data import mnist1d
from diffkit.nas.supernet import (
    CANDIDATES,
    CellNet,
    CellSpace,
    MixedOp,
    Supernet,
    Table,
    build_table,
    classification,
    current_weights,
    evaluate,
    fair_paths,
    first_order,
    kendall_tau,
    random_search,
    saved_bytes,
    search,
    second_order,
    single_path,
    train_arch,
    uniform_paths,
    weight_parameters,
)

SPACE = CellSpace()
X, Y = mnist1d("train")


@pytest.fixture(scope="module")
def truth():
    return Table()


def batch(n=40, at=0):
    return X[at : at + n], Y[at : at + n]


def test_all_cells_and_their_functions():
    forms = Counter(SPACE.canonical(a) for a in SPACE)
    assert (len(SPACE), len(forms), forms[()]) == (729, 99, 67)
    # cut off: no path without a "none" from node 0 to node 3
    assert all(SPACE.connected(a) == _reaches(a) for a in SPACE)


def _reaches(arch):
    at = {0}
    for (i, j), k in zip(SPACE.edges, arch):
        if k and i in at:
            at.add(j)
    return 3 in at


def test_numbers_of_larger_spaces():
    wide = CellSpace(("skip", "pool", "conv3"))
    assert len({wide.canonical(a) for a in wide}) == 420
    layer = CellSpace(wide.ops, free=())  # as if pooling had weights
    assert len({layer.canonical(a) for a in layer}) == 483


def test_a_normalised_layer_forgets_a_factor_of_its_input():
    free = {a: SPACE.canonical(a, scale_free=True) for a in SPACE}
    assert len(set(free.values())) == 93
    of_sum = {}
    for a, form in free.items():  # coarser than the sums: one form each
        assert of_sum.setdefault(SPACE.canonical(a), form) == form
    twice, once = (1, 1, 1, 0, 0, 2), (0, 1, 0, 0, 0, 2)  # C(2 h) and C(h)
    assert SPACE.canonical(twice) != SPACE.canonical(once)
    assert free[twice] == free[once]
    x = X[:5].double()
    nets = []
    for arch in (twice, once):
        torch.manual_seed(0)  # one convolution a cell, so the same weights
        nets.append(CellNet(SPACE, arch).double().train())
    for m in [m for net in nets for m in net.modules() if isinstance(m, torch.nn.BatchNorm1d)]:
        m.eps = 1e-14  # else it is not quite blind to a factor
    torch.testing.assert_close(nets[0](x), nets[1](x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("nodes", [2, 3, 5])
def test_numbers_and_strings_go_there_and_back(nodes):
    space = CellSpace(("none", "skip", "conv3"), nodes)
    for i in range(0, len(space), max(1, len(space) // 300)):
        arch = space.arch(i)
        assert space.index(arch) == i
        assert space.parse(space.string(arch)) == arch
    assert list(itertools.islice(space, 3)) == [space.arch(i) for i in range(3)]


def _copy_by_class(a, b):
    "Networks of two architectures of one class; the weights of the first in the second."
    torch.manual_seed(0)
    one, two = CellNet(SPACE, a).double(), CellNet(SPACE, b).double()
    two.stem, two.norm, two.head = one.stem, one.norm, one.head
    edges = [e for e, k in enumerate(a) if k == 2], [e for e, k in enumerate(b) if k == 2]
    x = X[:32].double()
    for order in itertools.permutations(edges[1]):
        for c1, c2 in zip(one.cells, two.cells):
            for e1, e2 in zip(edges[0], order):
                c2.layers[e2].load_state_dict(c1.layers[e1].state_dict())
        if torch.allclose(one(x), two(x), atol=1e-9):
            return True
    return False


def test_equal_form_is_equal_function_and_different_is_not():
    by = {}
    for a in SPACE:
        by.setdefault((SPACE.canonical(a), a.count(2)), []).append(a)
    groups = [g for (form, _), g in by.items() if form != () and 2 <= g[0].count(2) <= 4]
    some = [g for g in groups if len(g) > 1][::5]
    assert len(some) >= 5
    for g in some:
        assert _copy_by_class(g[0], g[-1])
    # as many convolutions, another form: no numbering makes them equal
    firsts = [g[0] for g in groups if g[0].count(2) == 3][:6]
    for a, b in itertools.combinations(firsts, 2):
        assert SPACE.canonical(a) == SPACE.canonical(b) or not _copy_by_class(a, b)


def test_a_path_is_a_corner_of_the_mixture_and_runs_only_its_layers():
    torch.manual_seed(0)
    net = Supernet(CellNet(SPACE))
    calls = Counter()
    for m in net.modules():
        if isinstance(m, nn.Conv1d):
            m.register_forward_hook(lambda m, *_: calls.update([id(m)]))
    for arch in SPACE.random(10, torch.Generator().manual_seed(0)):
        calls.clear()
        path = net(X[:32], arch=arch)
        assert sum(calls.values()) == 1 + 2 * arch.count(2)  # the stem, and two cells
        torch.testing.assert_close(path, net(X[:32], weights=SPACE.onehot([arch])[0]))
    assert all(m.choice is None for m in net.modules() if isinstance(m, MixedOp))


def test_an_error_inside_leaves_no_choice_behind():
    net = Supernet(CellNet(SPACE))
    with pytest.raises(RuntimeError):
        net(torch.zeros(2, 3, 40))  # three channels
    assert all(m.choice is None for m in net.modules() if isinstance(m, MixedOp))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([[2.0]], dtype=torch.float64))
        self.w = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))


def two_losses(toy, which):
    a, w = toy.alpha.sum(), toy.w
    return a * w - 2 * a + 1 if which == "v" else (w - a).square()


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("xi", [0.0, 0.1, 0.3, 0.5])
def test_the_problem_with_two_numbers(xi, exact):
    toy = Two()
    for _ in range(1500):
        second_order(xi, exact)(toy, two_losses, "t", "v")
        (g,) = torch.autograd.grad(two_losses(toy, "t"), toy.w)
        with torch.no_grad():
            toy.alpha -= 0.1 * toy.alpha.grad
            toy.w -= 0.1 * g
    # quadratic, so that the finite difference is exact up to rounding
    assert toy.alpha.item() == pytest.approx(2 / (1 + 2 * xi), abs=1e-8)
    assert toy.w.item() == pytest.approx(2 / (1 + 2 * xi), abs=1e-8)


def test_the_step_has_the_momentum_and_the_decay_of_its_optimizer():
    toy = Two()
    sgd = torch.optim.SGD([toy.w], 0.1, momentum=0.9, weight_decay=0.3)
    two_losses(toy, "t").backward()
    sgd.step()
    sgd.zero_grad()
    toy.alpha.grad = None
    a, w, m = toy.alpha.item(), toy.w.item(), sgd.state[toy.w]["momentum_buffer"].item()
    xi = 0.2
    second_order(xi, optimizer=sgd)(toy, two_losses, "t", "v")
    moved = w - xi * (0.9 * m + 2 * (w - a) + 0.3 * w)
    # d/da of a w' - 2 a + 1 with dw'/da = 2 xi
    assert toy.alpha.grad.item() == pytest.approx(moved - 2 + a * 2 * xi, abs=1e-12)


def test_the_hypergradient_of_a_network():
    torch.manual_seed(0)
    net, xi = Supernet(CellNet(SPACE)).double(), 0.05
    t, v = ((x.double(), y) for x, y in (batch(40), batch(40, 2000)))
    second_order(xi)(net, classification, t, v)
    found, w = net.alpha.grad.clone(), weight_parameters(net)

    def nested(alpha):  # the validation loss after one step of the weights
        net.alpha.data.copy_(alpha)
        kept = [p.detach().clone() for p in w]
        for p, g in zip(w, torch.autograd.grad(classification(net, t), w)):
            p.data.sub_(xi * g)
        loss = classification(net, v).item()
        for p, q in zip(w, kept):
            p.data.copy_(q)
        return loss

    alpha, h = net.alpha.detach().clone(), 1e-5
    for e, k in ((0, 1), (2, 2), (5, 0)):
        d = torch.zeros_like(alpha)
        d[e, k] = h
        # central difference: an error of h^2, and rounding of 1e-16 / h
        slope = (nested(alpha + d) - nested(alpha - d)) / (2 * h)
        assert found[e, k].item() == pytest.approx(slope, rel=1e-5, abs=1e-9)
    net.alpha.data.copy_(alpha)
    second_order(xi, exact=False, epsilon=1e-5)(net, classification, t, v)
    first = net.alpha.grad.clone()
    torch.testing.assert_close(first, found, rtol=1e-6, atol=1e-9)  # no kink on so short a way
    first_order(net, classification, t, v)
    assert (net.alpha.grad - found).norm() > 0.1 * found.norm()  # the second term is not small


@pytest.mark.parametrize("exact", [True, False])
def test_an_error_in_the_loss_leaves_the_weights_as_they_were(exact):
    net, calls = Supernet(CellNet(SPACE)), []
    before = [p.detach().clone() for p in weight_parameters(net)]

    def loss(n, b):
        calls.append(1)
        if len(calls) > (1 if exact else 2):
            raise RuntimeError("broken off")
        return classification(n, b)

    with pytest.raises(RuntimeError, match="broken off"):
        second_order(0.1, exact)(net, loss, batch(), batch(40, 2000))
    assert all(torch.equal(a, b) for a, b in zip(before, weight_parameters(net)))


def test_the_network_around_a_skip():
    torch.manual_seed(0)
    net = CellNet(SPACE, (0, 0, 0, 1, 0, 0))
    x = net.stem(X[:20])
    x = net.norm(torch.nn.functional.avg_pool1d(x, 2)).relu().mean(-1)
    torch.testing.assert_close(net(X[:20]), net.head(x))


@pytest.mark.parametrize("length", [40, 10])
def test_the_stem_halves_the_length_around_its_centre(length):
    net = CellNet(SPACE, (0, 0, 0, 1, 0, 0), channels=2)
    conv = net.stem[0]
    torch.nn.init.constant_(conv.weight, 1.0)
    impulses = torch.eye(length)[:, None]
    near = (torch.arange(length)[:, None] - torch.arange(0, length, 2)).abs() <= 2
    torch.testing.assert_close(conv(impulses), near[:, None].float().expand(-1, 2, -1))


def test_the_steps_touch_what_is_theirs():
    net = Supernet(CellNet(SPACE))
    seen = {}

    def watched(n, loss, bt, bv):
        assert all(p.grad is None or not p.grad.isnan().any() for p in weight_parameters(n))
        value = first_order(n, loss, bt, bv)
        seen["weights"] = [None if p.grad is None else p.grad.clone() for p in weight_parameters(n)]
        return value

    before = net.alpha.detach().clone()
    got = search(net, batch(200), batch(200, 2000), epochs=2, arch_step=watched, warmup=0.5)
    assert got.active.tolist() == [False, True]
    torch.testing.assert_close(got.weights[0], got.weights[1], rtol=0, atol=0)  # it rested
    torch.testing.assert_close(got.weights[0], before.softmax(-1), rtol=0, atol=0)
    assert not torch.equal(got.weights[1], got.weights[2])
    assert got.weights.shape == (3, 6, 3)


def test_alpha_sees_validation_data_and_the_weights_training_data():
    net, seen = Supernet(CellNet(SPACE)), []
    marked = torch.full((60, 1, 40), 7.0) + X[:60], Y[:60]

    def watched(n, loss, bt, bv):
        seen.append((bt[0].mean() < 3, bv[0].mean() > 3, len(bv[0]) == len(bt[0])))
        return first_order(n, loss, bt, bv)

    trained = []

    def on_weights(n, b):
        trained.append(b[0].mean() < 3)
        return classification(n, b)

    search(net, batch(200), marked, epochs=1, arch_step=watched, train_loss=on_weights)
    assert len(seen) == 2 and all(map(all, seen)) and all(trained)


def test_a_search_is_repeatable():
    def once(seed):
        torch.manual_seed(5)
        net = Supernet(CellNet(SPACE))
        return search(net, batch(200), batch(200, 2000), epochs=1, seed=seed)

    assert torch.equal(once(1).weights, once(1).weights)
    assert not torch.equal(once(1).weights, once(2).weights)


def test_a_search_finds_a_planted_answer():
    "A choice between the identity and noise: only the identity carries the class."

    class Shuffle(nn.Module):
        def forward(self, x):
            return x[:, :, torch.randperm(x.shape[-1])]

    torch.manual_seed(0)
    inner = nn.Sequential(
        MixedOp({"noise": Shuffle(), "skip": nn.Identity()}), nn.Flatten(), nn.Linear(40, 10)
    )
    net = Supernet(inner)
    got = search(net, (X[:2000], Y[:2000]), (X[2000:], Y[2000:]), epochs=3, arch_lr=0.05)
    assert net.names(got.arch) == ("skip",)
    assert got.weights[-1][0, 1] > 0.6


def test_paths():
    torch.manual_seed(0)
    net = Supernet(CellNet(SPACE))
    drawn = torch.tensor([uniform_paths(net)[0] for _ in range(600)])
    # 600 draws of three: a share has standard error .019, so five of them
    share = torch.nn.functional.one_hot(drawn, 3).float().mean(0)
    assert (share - 1 / 3).abs().max() < 0.1
    for _ in range(5):
        paths = torch.tensor(fair_paths(net))
        assert torch.equal(paths.sort(0).values, torch.arange(3)[:, None].expand(3, 6))
    before = net.alpha.detach().clone()
    w = [p.detach().clone() for p in weight_parameters(net)]
    single_path(net, batch(200), epochs=1)
    assert torch.equal(net.alpha, before)
    assert any(not torch.equal(a, b) for a, b in zip(w, weight_parameters(net)))


def test_evaluation_leaves_running_statistics_alone():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(40), nn.Linear(40, 10))
    kept = net[1].running_mean.clone(), net[1].num_batches_tracked.clone()
    a = evaluate(net, batch(500))
    assert torch.equal(net[1].running_mean, kept[0])
    assert torch.equal(net[1].num_batches_tracked, kept[1])
    assert a != evaluate(net, batch(500), batch_stats=False)
    assert net.training


def test_table(truth):
    assert (len(truth.rows), len(truth.classes), truth.seeds) == (729, 98, 5)
    by = {}
    for a in SPACE:
        by.setdefault(SPACE.canonical(a), set()).add((truth.acc(a), truth.nll(a), truth.params(a)))
    assert all(len(v) == 1 for v in by.values())  # a row of a class is the class
    assert next(iter(by[()])) == pytest.approx((0.1, 2.3026, 0))
    assert truth.regret(truth.best) == 0 and truth.rank(truth.best) == 1
    assert truth.tau(truth.acc) == pytest.approx(1)
    assert truth.tau(lambda a: -truth.acc(a)) == pytest.approx(-1)
    assert sum(truth.rank(a) == 1 for a in truth.classes) == 1
    # stem 40 + 16, norm 16, head 90, and 192 for each convolution that is used, in two cells
    assert truth.params((2,) * 6) == 40 + 16 + 16 + 90 + 12 * 192


@pytest.mark.parametrize("pick", [11, 60])
def test_two_rows_of_the_table_trained_again(truth, pick):
    arch = truth.classes[pick]
    score, _ = train_arch(SPACE, arch, seed=0)
    # the same seed on another processor: sums are rounded in another order, and 160 steps carry it
    assert abs(score.acc - truth.acc(arch, 0)) < 0.05
    assert abs(score.nll - truth.nll(arch, 0)) < 0.15


def test_build_goes_on_where_it_was(tmp_path):
    small = CellSpace(("none", "conv3"), nodes=2)
    how = dict(space=small, seeds=2, progress=False, epochs=1)
    how |= dict(data=batch(200), test=batch(100, 3000))
    build_table(tmp_path / "t.csv", **how)
    first = (tmp_path / "t.csv").read_text()
    stamp = time.time()
    build_table(tmp_path / "t.csv", **how)  # nothing to do
    assert time.time() - stamp < 2 and (tmp_path / "t.csv").read_text() == first
    (tmp_path / "t.csv").write_text("\n".join(first.splitlines()[:2]) + "\n")
    build_table(tmp_path / "t.csv", **how)
    assert (tmp_path / "t.csv").read_text() == first
    table = Table(tmp_path / "t.csv", small)
    assert table.best == (1,) and table.seeds == 2


def test_kendall_and_random_search(truth):
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (3 * 2) ** 0.5)  # tau-b
    g = torch.Generator().manual_seed(0)
    best = random_search(truth.acc, SPACE, 40, g)
    drawn = SPACE.random(40, torch.Generator().manual_seed(0))
    for i in (0, 7, 39):
        assert truth.acc(best[i]) == max(map(truth.acc, drawn[: i + 1]))


def test_saved_bytes():
    x = torch.randn(10, 10, requires_grad=True)
    y = torch.randn(10, 10)
    assert saved_bytes(lambda: x.exp()) == 400  # its own output
    assert saved_bytes(lambda: x * y) == 400  # y, as only x needs a gradient
    assert saved_bytes(lambda: (x * y) * y) == 400  # counted once
    layer = nn.Linear(10, 10)
    assert saved_bytes(lambda: layer(y)) == 400  # the input
    assert saved_bytes(lambda: layer(x)) == 400  # the input; weights are there anyway


def test_choices_of_different_size_and_shared_rows():
    torch.manual_seed(0)
    three = {"a": nn.Linear(4, 4), "b": nn.Identity(), "c": nn.Tanh()}
    two = {"a": nn.Linear(4, 4), "b": nn.Identity()}
    net = Supernet(nn.Sequential(MixedOp(three), MixedOp(two)))
    w = net.weights()
    assert w.shape == (2, 3) and w[1, 2] == 0
    net(torch.randn(5, 4)).square().sum().backward()
    assert net.alpha.grad[1, 2] == 0 and net.alpha.grad[0].any()
    with pytest.raises(ValueError, match="2 is none of a, b"):
        net(torch.randn(5, 4), arch=(0, 2))
    shared = Supernet(nn.Sequential(MixedOp(three, key="x"), MixedOp(copy_of(three), key="x")))
    assert shared.alpha.shape == (1, 3)
    with pytest.raises(ValueError, match="different candidates"):
        Supernet(nn.Sequential(MixedOp(three, key="x"), MixedOp(two, key="x")))


def copy_of(ops):
    import copy

    return {k: copy.deepcopy(v) for k, v in ops.items()}


def test_any_module_with_alpha_can_be_searched():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.zeros(1, 2))
            self.a, self.b = nn.Linear(40, 10), nn.Linear(40, 10)

        def forward(self, x, weights=None):
            w = self.alpha.softmax(-1) if weights is None else weights
            return w[0, 0] * self.a(x.flatten(1)) + w[0, 1] * self.b(0 * x.flatten(1))

    torch.manual_seed(0)
    got = search(Own(), batch(1000), batch(1000, 2000), epochs=3, arch_lr=0.05)
    assert got.arch == (0,)  # the other sees nothing


def test_current_weights_of_a_module_with_alpha_and_of_a_supernet():
    own = nn.Module()
    own.alpha = nn.Parameter(torch.tensor([[0.0, 1.0, 2.0], [3.0, 3.0, 3.0]]).log1p())
    want = torch.tensor([[1 / 6, 2 / 6, 3 / 6], [1 / 3, 1 / 3, 1 / 3]])
    torch.testing.assert_close(current_weights(own), want)
    net = Supernet(CellNet(SPACE), relax=lambda a: 2 * a)
    assert torch.equal(current_weights(net), 2 * net.alpha)


@pytest.mark.parametrize("epochs,n", [(1, 100), (4, 100), (12, 200)])
def test_a_weight_that_sees_nothing_only_decays(epochs, n):
    data = torch.zeros(n, 1, 40), torch.arange(n) % 10
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        start = CellNet(SPACE, (0, 0, 0, 1, 0, 0), 2).stem[0].weight.detach()
    _, net = train_arch(
        SPACE, (0, 0, 0, 1, 0, 0), 3, data=data, test=data, epochs=epochs, channels=2
    )
    # AdamW: each step takes 1e-3 of the rate, which is 0.06 times a rise and half a cosine
    kept, steps = 1.0, epochs * n // 100
    for i in range(steps):
        rise = min(1.0, (i + 1) / max(1, steps * 15 // 100))
        kept *= 1 - 1e-3 * 0.06 * rise * (1 + math.cos(math.pi * i / steps)) / 2
    # single precision rounds once a step
    torch.testing.assert_close(net.stem[0].weight.detach(), kept * start, rtol=2e-6, atol=0.0)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: CellSpace(()), "at least one"),
        (lambda: CellSpace(nodes=1), "nodes=1"),
        (lambda: SPACE.arch(729), "from 0 to 728"),
        (lambda: SPACE.canonical((0, 0)), "has 2 entries"),
        (lambda: SPACE.parse("|none~0|+|none~0|"), "not the edges"),
        (lambda: SPACE.from_onehot(torch.ones(2, 3, 6)), r"expected \(N, 6, 3\)"),
        (lambda: MixedOp({}), "ops is empty"),
        (lambda: CellNet(SPACE, (0, 1)), "has 2 entries"),
        (lambda: Supernet(CellNet(SPACE)).argmax(SPACE.ops), "leaves none"),
        (lambda: search(Supernet(CellNet(SPACE)), batch(), batch(), epochs=0), "epochs=0"),
        (lambda: search(Supernet(CellNet(SPACE)), batch(), batch(), warmup=2), "warmup=2"),
        (lambda: search(Supernet(CellNet(SPACE)), X, batch()), "tuple of tensors"),
        (lambda: second_order("1"), "xi='1'"),
        (lambda: second_order(1.0, optimizer=torch.optim.Adam([torch.ones(1)])), "must be SGD"),
        (lambda: Table(space=CellSpace(("none", "skip"))), "none of none, skip"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_zero_candidates_are_not_computed():
    op = MixedOp({o: CANDIDATES[o](4) for o in ("none", "skip")})
    op.choice = torch.tensor([0.3, 0.7])
    x = torch.randn(2, 4, 6)
    torch.testing.assert_close(op(x), 0.7 * x)
    alone = MixedOp({"none": CANDIDATES["none"](4)})
    alone.choice = torch.tensor([1.0])
    assert not alone(x).any()
