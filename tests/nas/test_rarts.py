"""RARTS: the solvable model against iteration, linear algebra and notebook 500; the two copies of
any network; the search; errors."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from diffkit.core.data import mnist1d
from diffkit.nas.rarts import (
    RARTSStep,
    looseness,
    rarts,
    solvable_field,
    solvable_fixed_point,
    solvable_map,
    solvable_path,
)
from diffkit.nas.supernet import (
    CellNet,
    CellSpace,
    MixedOp,
    Supernet,
    classification,
    second_order,
    weight_parameters,
)

F64 = torch.float64
X, Y = mnist1d("train")
PAIRS = [(10.0, 10.0), (100.0, 100.0), (1.0, 1.0), (1.0, 10.0), (0.5, 3.0), (2.0, 0.7)]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def batch(n=100, start=0):
    return X[start : start + n], Y[start : start + n]


class Two(nn.Module):  # the two numbers, as a network
    def __init__(self):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor([[2.0]], dtype=F64))
        self.w = nn.Parameter(torch.tensor(-2.0, dtype=F64))


def valid(net, batch=None):
    return net.alpha.sum() * net.w - 2 * net.alpha.sum() + 1


def train(net, batch=None, pull=0.0):
    return (net.w - net.alpha.sum()).square() + pull * (net.alpha.sum() - 3).square()


def objective(z, lam, beta, pull=0.0):  # written out, not by the matrix
    a, w, y = z.unbind(-1)
    t = (w - a) ** 2 + pull * (a - 3) ** 2
    return a * y - 2 * a + 1 + lam * t + beta / 2 * (y - w) ** 2


def sgd(step, rate):
    return [torch.optim.SGD(v, rate) for v in (step.w, step.y, step.alpha)]


def repeated(M, m, z, doublings):  # 2^doublings steps
    for _ in range(doublings):
        M, m = M @ M, M @ m + m
    return M @ z + m


START = torch.tensor([2.0, -2.0, -2.0], dtype=F64)


# --- the solvable model


@pytest.mark.parametrize("lam,beta", PAIRS)
@pytest.mark.parametrize("newest", [True, False])
def test_closed_form_is_where_the_iteration_ends(lam, beta, newest):
    want = solvable_fixed_point(lam=lam, beta=beta)
    M, m = solvable_map(lam=lam, beta=beta, newest=newest)
    torch.testing.assert_close(repeated(M, m, START, 20), want, rtol=0, atol=1e-8)
    # the stationary system of (4), from its slopes at 0 and at the unit vectors
    zero = torch.zeros(3, dtype=F64)
    slope = torch.func.grad(lambda z: objective(z, lam, beta))
    b = slope(zero).numpy()
    A = np.stack([slope(e).numpy() - b for e in torch.eye(3, dtype=F64)], 1)
    np.testing.assert_allclose(scipy.linalg.solve(A, -b), want.numpy(), rtol=1e-10, atol=1e-12)


def test_values_by_hand():
    at = lambda lam, beta: solvable_fixed_point(lam=lam, beta=beta).tolist()
    assert at(1.0, 1.0) == pytest.approx([4, 2, -2])
    assert at(1.0, 10.0) == pytest.approx([10 / 7, 5 / 7, 4 / 7])
    assert at(10.0, 10.0) == pytest.approx([1.08108108, 1.02702703, 0.91891892])
    assert solvable_path(3, eta=1e-12, lam=1.0, beta=1.0)[0].tolist() == [2, -2, -2]
    assert solvable_path(0, xi=0.1).tolist() == [[2, -2]]


@pytest.mark.parametrize(
    "settings, row",
    [
        (dict(xi=0.0), 4.0),  # 1 and 4
        (dict(xi=1.5), 8.0),  # 8 and 4
        (dict(lam=1.0, beta=1.0), 6.0),  # 5, 6 and 3
        (dict(lam=0.1, beta=5.0), 11.0),  # 1.4, 10.4 and 11
        (dict(lam=0.1, beta=0.1), 1.4),  # 1.4, 0.6 and 1.2
        (dict(lam=0.5, beta=0.5, pull=2.0), 5.0),  # 5, 3 and 2
    ],
)
def test_the_rate_is_a_fifth_of_the_largest_row_sum(settings, row):
    got, want = solvable_map(**settings), solvable_map(eta=0.2 / row, **settings)
    torch.testing.assert_close(got, want, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("xi", [0.0, 0.1, 0.5, 2.0])
def test_unrolled_darts_is_that_of_500(xi):
    want = solvable_path(30, eta=0.05, xi=xi)
    toy, by = Two(), second_order(xi)
    for k in range(30):
        assert [toy.alpha.item(), toy.w.item()] == pytest.approx(want[k].tolist(), abs=1e-12)
        by(toy, lambda net, b: (valid if b == "v" else train)(net), "t", "v")
        with torch.no_grad():
            toy.alpha -= 0.05 * toy.alpha.grad
            toy.w -= 0.05 * 2 * (toy.w - toy.alpha.sum())
    end = solvable_fixed_point(xi=xi)
    assert end.tolist() == pytest.approx([2 / (1 + 2 * xi)] * 2)
    far = repeated(*solvable_map(xi=xi), START[:2], 16)
    torch.testing.assert_close(far, end, rtol=0, atol=1e-8)


def test_it_converges_exactly_if_r_is_below_two():
    drawn = (10 ** (3 * torch.rand(400, 2, generator=rng(1), dtype=F64) - 1)).tolist()
    kept = [p for p in drawn if abs(looseness(*p) - 2) > 0.02][:200]
    assert len(kept) == 200
    said = [looseness(*p) < 2 for p in kept]
    assert 40 < sum(said) < 160  # both kinds
    for share in (0.1, 0.5, 0.95):  # of what Ostrowski and Reich allow
        for (lam, beta), stable in zip(kept, said):
            top = max(2 * lam, 2 * lam + beta, beta)
            M, m = solvable_map(eta=share * 2 / top, lam=lam, beta=beta)
            assert (torch.linalg.eigvals(M).abs().max() < 1) == stable
            if share == 0.5:
                z = repeated(M, m, START, 22)  # slowest: |r - 2| = .02 at the stiffest springs
                if stable:
                    want = solvable_fixed_point(lam=lam, beta=beta)
                    torch.testing.assert_close(z, want, rtol=1e-6, atol=1e-6)
                else:
                    assert not z.isfinite().all() or z.abs().max() > 1e6


def test_gradient_descent_has_its_own_limit():
    for lam, beta in PAIRS:
        A, _ = solvable_field(lam=lam, beta=beta)
        limit = 2 / torch.linalg.eigvalsh(A).max().item()
        for share, stable in ((0.999, True), (1.001, False)):
            M, _ = solvable_map(eta=share * limit, newest=False, lam=lam, beta=beta)
            assert (torch.linalg.eigvals(M).abs().max() < 1) == stable


@pytest.mark.parametrize("lam,beta", [*PAIRS, (1.0, 0.6), (0.2, 1.0)])
def test_the_objective_falls_by_a_known_amount(lam, beta):
    eta = 0.2 / max(4 * lam + beta, 2 * beta, 1)
    path = solvable_path(200, eta=eta, lam=lam, beta=beta)
    L = objective(path, lam, beta)
    # to rounding; where it diverges, too: it falls without end
    assert (L.diff() <= 1e-12 * L.abs()[1:].clamp(min=1)).all()
    A, _ = solvable_field(lam=lam, beta=beta)
    fall = ((1 / eta - A.diagonal() / 2) * path.diff(dim=0).square()).sum(1)
    torch.testing.assert_close(-L.diff(), fall, rtol=1e-6, atol=1e-10)


def test_bias_and_the_dictionary():
    for lam, beta in [*PAIRS, (3.0, 40.0), (1e4, 1e3)]:
        r = looseness(lam, beta)
        a, w, y = solvable_fixed_point(lam=lam, beta=beta).tolist()
        assert a - 1 == pytest.approx(r / (2 - r))
        if r < 1.5:  # beyond, the remainder r^2 / (2 (2 - r)) is larger
            assert abs(a - 1 - r / 2) < r * r
        if r <= 1:
            assert a == pytest.approx(solvable_fixed_point(xi=(1 - r) / 2)[0].item())
        assert a + y == pytest.approx(2)
        assert y == pytest.approx(a * (1 - r)) and w == pytest.approx(y + a / beta)
    assert solvable_fixed_point(lam=1e9, beta=1e9).tolist() == pytest.approx([1, 1, 1])
    assert looseness(1.0, 2 / 3) == pytest.approx(2)


@pytest.mark.parametrize("pull", [0.0, 0.03, 0.3])
def test_a_pull_of_the_training_loss(pull):
    lam, beta = 4.0, 8.0
    z = torch.randn(3, generator=rng(2), dtype=F64)
    A, b = solvable_field(lam=lam, beta=beta, pull=pull)
    torch.testing.assert_close(
        A @ z + b, torch.func.grad(lambda v: objective(v, lam, beta, pull))(z)
    )
    far = repeated(*solvable_map(lam=lam, beta=beta, pull=pull), START, 20)
    want = solvable_fixed_point(lam=lam, beta=beta, pull=pull)
    torch.testing.assert_close(far, want, rtol=0, atol=1e-8)
    # DARTS does not notice
    assert torch.equal(solvable_path(9, xi=0.1, pull=pull), solvable_path(9, xi=0.1))
    if pull:  # the training loss decides in the end
        assert solvable_fixed_point(lam=1e9, beta=1e9, pull=pull)[0].item() == pytest.approx(3)
        # and it can hold what would run away
        assert solvable_fixed_point(lam=1.0, beta=1 / 1.5, pull=pull)[0] > 0


def test_the_general_bias_is_exact_where_the_validation_loss_is_linear():
    normal = lambda *s: torch.randn(*s, generator=rng(3), dtype=F64)
    S, m, g, v, lam, beta = normal(5, 7), normal(5), normal(5).flip(0), 0.7, 0.8, 1.7
    H, eye = S @ S.T + torch.eye(5, dtype=F64), torch.eye(5, dtype=F64)
    K = torch.cat(
        [torch.cat([lam * H + beta * eye, -beta * eye], 1), torch.cat([-beta * eye, beta * eye], 1)]
    )
    w, y = torch.linalg.solve(K, torch.cat([lam * H @ m, -g])).split(5)
    least = g @ y + lam * ((w - m) @ H @ (w - m) / 2 + v) + beta / 2 * (y - w).square().sum()
    want = g @ m + lam * v - g @ (torch.linalg.inv(lam * H) + eye / beta) @ g / 2
    torch.testing.assert_close(least, want)


# --- two copies of a network


@pytest.mark.parametrize("newest", [True, False])
def test_the_class_walks_the_path_of_the_model(newest):
    pulled = lambda net, b: train(net, pull=0.1)
    both = RARTSStep(Two(), 3.0, 2.0, loss=valid, train_loss=pulled, newest=newest)
    opts = sgd(both, 0.05)
    path = solvable_path(25, eta=0.05, newest=newest, lam=3.0, beta=2.0, pull=0.1)
    for z in path:
        got = torch.stack([both.alpha[0].sum(), both.w[0], both.y[0]]).detach()
        torch.testing.assert_close(got, z, rtol=1e-11, atol=1e-11)
        assert both.objective(None, None).item() == pytest.approx(
            objective(z, 3.0, 2.0, 0.1).item(), abs=1e-10
        )
        both.step(None, None, opts)


def cells(seed=0, double=True, **how):
    torch.manual_seed(seed)
    net = Supernet(CellNet(CellSpace(), channels=4, cells=1))
    return RARTSStep(net.double() if double else net, **how)


def double(b):
    return b[0].double(), b[1]


def test_a_rigid_tie_is_one_network_on_both_losses():
    both = cells(lam=0.7, beta=1e6)
    bt, bv = double(batch(40)), double(batch(40, 2000))
    opts = [torch.optim.SGD(v, 4e-7) for v in (both.w, both.y)]
    with torch.no_grad():
        for p in both.y:  # apart; the tie brings them together, the losses hardly move them
            p.add_(0.01 * torch.randn(p.shape, generator=rng(1), dtype=F64))
    for _ in range(40):
        both.step(bt, bv, [*opts, None])
    one = copy.deepcopy(both.net)
    single = classification(one, bv) + 0.7 * classification(one, bt)
    (want,) = torch.autograd.grad(single, one.alpha)
    (got,) = both.gradients(bt, bv, ["alpha"])["alpha"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    loose = cells(lam=0.7, beta=1.0)
    with torch.no_grad():
        for p in loose.y:
            p.add_(0.3 * torch.randn(p.shape, generator=rng(1), dtype=F64))
    (far,) = loose.gradients(bt, bv, ["alpha"])["alpha"]
    assert (far - want).abs().max() > 1e-3


def test_all_brackets_are_slopes_of_the_objective():
    both = cells(lam=0.7, beta=3.0)
    bt, bv = double(batch(30)), double(batch(30, 2000))
    with torch.no_grad():
        for p in both.y:
            p.add_(0.1)
    params = both.w + both.y + both.alpha
    want = torch.autograd.grad(both.objective(bt, bv), params, allow_unused=True)
    got = both.gradients(bt, bv)
    for g, w in zip(got["w"] + got["y"] + got["alpha"], want):
        torch.testing.assert_close(g, w)
    tie = torch.autograd.grad(both.penalty(), both.y + both.w)
    for g, y, w in zip(tie, both.y + both.w, both.w + both.y):
        torch.testing.assert_close(g, 3.0 * (y - w).detach())
    assert both.penalty().item() == pytest.approx(1.5 * 0.01 * sum(p.numel() for p in both.y))


class Slope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, g):
        return 2 * x * g

    @staticmethod
    def backward(ctx, g):
        raise RuntimeError("no second derivative")


class NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, g):
        return Slope.apply(*ctx.saved_tensors, g)


def test_no_second_derivative_is_asked_for():
    hard = lambda net, b: NoSecond.apply(net.w - net.alpha.sum()) if b == "t" else valid(net)
    for newest in (True, False):
        both = RARTSStep(Two(), 3.0, 2.0, loss=hard, newest=newest)
        for _ in range(5):
            both.step("t", "v", sgd(both, 0.05))
        want = solvable_path(5, eta=0.05, newest=newest, lam=3.0, beta=2.0)[-1]
        assert both.alpha[0].item() == pytest.approx(want[0].item())
    with pytest.raises(RuntimeError, match="no second derivative"):
        second_order(0.1)(Two(), hard, "t", "v")


def test_a_critical_point_of_a_smooth_network():
    class Smooth(nn.Module):
        def __init__(self):
            super().__init__()
            g = rng(4)
            self.alpha = nn.Parameter(torch.zeros(1, 2, dtype=F64))
            self.register_buffer("a", torch.randn(2, 4, generator=g, dtype=F64))
            self.b = nn.Parameter(torch.randn(4, generator=g, dtype=F64))
            self.c = nn.Parameter(torch.randn(4, generator=g, dtype=F64))

        def forward(self, x):
            p, h = self.alpha.softmax(-1)[0], x @ self.a
            return p[0] * h.tanh() @ self.b + p[1] * h.sin() @ self.c

    def loss(net, b):
        some = sum(p.square().sum() for p in net.parameters())
        return (net(b[0]) - b[1]).square().mean() + 0.1 * some

    x = torch.randn(80, 2, generator=rng(5), dtype=F64)
    data = x, (2 * x[:, 0]).sin() + 0.3 * x[:, 1]
    t, v = ([d[i] for d in data] for i in (slice(40), slice(40, 80)))
    for newest in (True, False):
        both, last = RARTSStep(Smooth(), 2.0, 2.0, loss=loss, newest=newest), math.inf
        opts = sgd(both, 0.15)
        for k in range(300):
            if k % 50 == 0:
                now = both.objective(t, v).item()
                assert now <= last
                last = now
            both.step(t, v, opts)
        # the three equations, by hand
        y, w, a = ([p.detach() for p in ps] for ps in (both.y, both.w, both.alpha))
        gy, gw = (
            torch.autograd.grad(loss(n, d), [*list(p), *both.alpha])
            for n, d, p in ((both.net, v, both.y), (both.twin, t, both.w))
        )
        for i in range(2):
            assert (2 * gw[i] + 2 * (w[i] - y[i])).abs().max() < 1e-4
            assert (gy[i] + 2 * (y[i] - w[i])).abs().max() < 1e-4
        assert (2 * gw[2] + gy[2]).abs().max() < 1e-4
        assert (y[0] - w[0]).abs().max() > 1e-3 and a[0].abs().max() > 1e-3  # no trivial point


def test_passes():
    calls = []

    def counted(net, b):
        calls.append(net)
        return valid(net) if net is both.net else train(net)

    for newest, count in ((True, 4), (False, 2)):
        both = RARTSStep(Two(), loss=counted, newest=newest)
        calls.clear()
        both.step(None, None, sgd(both, 0.01))
        assert len(calls) == count
        calls.clear()
        both.step(None, None, [*sgd(both, 0.01)[:2], None])  # alpha rests
        assert len(calls) == 2 and set(both.losses) == {"train", "valid"}


def test_what_is_shared_and_what_is_not():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.zeros(1, 2))
            self.norm, self.body = nn.BatchNorm1d(40), nn.Linear(40, 10)
            self.frozen = nn.Parameter(torch.ones(10), requires_grad=False)

        def forward(self, x):
            return self.alpha.softmax(-1)[0, 0] * self.body(self.norm(x.flatten(1))) + self.frozen

    net = Own()
    both = RARTSStep(net, beta=2.0)
    assert both.twin.alpha is net.alpha and both.twin is not net
    assert not {id(p) for p in both.w} & {id(p) for p in both.y}
    assert len(both.w) == len(both.y) == 4  # without the frozen one
    both.step(batch(50), batch(50, 2000), sgd(both, 0.1))
    assert not torch.equal(net.norm.running_mean, both.twin.norm.running_mean)
    assert not torch.equal(net.body.weight, both.twin.body.weight)
    assert torch.equal(both.twin.frozen, torch.ones(10))


def test_clip_is_per_copy_and_in_units_of_its_own_loss():
    for lam in (1.0, 50.0):
        both = RARTSStep(Two(), lam, 0.0, loss=valid, train_loss=train, newest=False, clip=0.5)
        both.step(None, None, sgd(both, 0.0))
        # slopes 2 (the validation loss) and -8 lam (the training loss), both too long
        assert both.y[0].grad.item() == pytest.approx(0.5, rel=1e-4)
        assert both.w[0].grad.item() == pytest.approx(-0.5 * lam, rel=1e-4)


# --- the search


def test_a_search_finds_a_planted_answer_and_returns_both_copies():
    class Shuffle(nn.Module):
        def forward(self, x):
            return x[:, :, torch.randperm(x.shape[-1])]

    torch.manual_seed(0)
    inner = nn.Sequential(
        MixedOp({"noise": Shuffle(), "skip": nn.Identity(), "none": Shuffle()}),
        MixedOp({"tanh": nn.Tanh(), "skip": nn.Identity()}),  # fewer candidates
        nn.Flatten(),
        nn.Linear(40, 10),
    )
    net = Supernet(inner)
    seen = []
    got = rarts(net, (X[:2000], Y[:2000]), (X[2000:], Y[2000:]), epochs=3, arch_lr=0.05,
                on_epoch=lambda n, k: seen.append((n is net, k)))  # fmt: skip
    assert net.names(got.arch)[0] == "skip" and got.weights[-1][0, 1] > 0.6
    assert got.weights.shape == (4, 2, 3) and (got.weights[:, 1, 2] == 0).all()
    assert seen == [(True, 1), (True, 2), (True, 3)]
    y, w = got.run.model["y"], got.run.model["w"]
    assert y is net and w.alpha is net.alpha and got.active.all()
    assert not torch.equal(y.net[-1].weight, w.net[-1].weight)
    assert set(got.run.names) == {"train", "valid"}


def test_a_search_is_repeatable_and_alpha_rests_while_warming_up():
    def once(seed, **how):
        torch.manual_seed(5)
        net = Supernet(CellNet(CellSpace(), channels=4, cells=1))
        return rarts(net, batch(100), batch(100, 2000), epochs=2, batch_size=50, seed=seed, **how)

    a, b = once(1), once(1)
    assert torch.equal(a.weights, b.weights) and not torch.equal(a.weights, once(2).weights)
    late = once(1, warmup=0.5, newest=False)
    assert late.active.tolist() == [False, True]
    assert torch.equal(late.weights[0], late.weights[1])
    assert not torch.equal(late.weights[1], late.weights[2])


def test_beta_ties_the_copies():
    def apart(beta):
        torch.manual_seed(5)
        net = Supernet(nn.Sequential(
            MixedOp({"a": nn.Tanh(), "b": nn.Identity()}), nn.Flatten(), nn.Linear(40, 10)
        ))  # fmt: skip
        got = rarts(net, batch(500), batch(500, 2000), epochs=3, beta=beta, newest=False)
        pairs = zip(*(weight_parameters(got.run.model[k]) for k in "yw"))
        return sum(float((y - w).detach().square().sum()) for y, w in pairs)

    assert apart(10.0) < 0.3 * apart(0.0)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: looseness(0.0, 1.0), "lam=0.0: must be a number above 0"),
        (lambda: looseness(1.0, True), "beta=True"),
        (lambda: looseness(math.nan, 1.0), "lam=nan"),
        (lambda: solvable_field(), "give xi alone"),
        (lambda: solvable_field(xi=0.1, beta=1.0), "give xi alone"),
        (lambda: solvable_field(beta=1.0), "lam=None"),
        (lambda: solvable_field(xi=-0.1), "xi=-0.1: must be a number of at least 0"),
        (lambda: solvable_field(xi=0.1, pull=-1.0), "pull=-1.0"),
        (lambda: solvable_fixed_point(lam=0.2, beta=1.0), "= 3.5 must be below 2"),
        (lambda: solvable_fixed_point(lam=0.5, beta=1.0), "= 2 must be below 2"),
        (lambda: solvable_map(eta=-1.0, xi=0.1), "eta=-1.0"),
        (lambda: solvable_path(method="rarts"), "unexpected keyword"),
        (lambda: RARTSStep(Two(), lam=0), "lam=0"),
        (lambda: RARTSStep(Two(), beta=-1), "beta=-1"),
        (lambda: RARTSStep(Two(), clip=0), "clip=0"),
        (lambda: RARTSStep(nn.Linear(2, 2)), "no parameter `alpha`"),
        (lambda: RARTSStep(Two(), loss=valid).step(None, None, [None]), "shorter|longer"),
        (lambda: rarts(Two(), batch(), batch(), epochs=0), "epochs=0"),
        (lambda: rarts(Two(), batch(), batch(), warmup=2), "warmup=2"),
        (lambda: rarts(Two(), X, batch()), "tuple of tensors"),
        (lambda: rarts(Two(), batch(), (X, Y[:5])), "equally many"),
        (lambda: rarts(Two(), batch(), batch(), lam=-1.0), "lam=-1.0"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()
