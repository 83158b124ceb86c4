"""Batches against batches: kernels and estimator against closed forms and scikit-learn, a gradient
by hand, finetuning alone and side by side, and every error."""

import copy
import functools
import math

import pytest
import torch
from sklearn.metrics import pairwise
from torch import nn
from torch.testing import assert_close

import diffkit as dk
from diffkit.core.nets import MLP, Stacked
from diffkit.distill.mmd_ddm import mmd2, mmd_finetune, polynomial_kernel, rbf_kernel, standardized

F64 = torch.float64
CLOSE = dict(rtol=1e-10, atol=1e-10)  # float64: sums of a thousand numbers of order one


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- kernels and estimator


@pytest.mark.parametrize("degree, gamma, coef0", [(1, None, 1.0), (3, None, 1.0), (4, 0.3, 0.5)])
def test_polynomial_kernel_is_scikit_learns(degree, gamma, coef0):
    a, b = randn(20, 6), randn(31, 6, seed=1)
    want = pairwise.polynomial_kernel(a.numpy(), b.numpy(), degree, gamma, coef0)
    assert_close(polynomial_kernel(a, b, degree, gamma, coef0), torch.from_numpy(want), **CLOSE)


@pytest.mark.parametrize("gamma", [None, 0.01, 3.0])
def test_gaussian_kernel_is_scikit_learns_far_from_zero(gamma):
    a, b = randn(20, 6), randn(31, 6, seed=1)
    want = pairwise.rbf_kernel(a.numpy(), b.numpy(), gamma)
    # 10,000 has a rounding error of 1e-12; its square, without the centring, one of 1e-8
    far = rbf_kernel(a + 1e4, b + 1e4, gamma)
    assert_close(far, torch.from_numpy(want), rtol=0.0, atol=1e-10)


def test_estimator_by_loops():
    u, v = randn(7, 3), 1 + randn(5, 3, seed=1)
    k = lambda a, b: (sum(x * y for x, y in zip(a.tolist(), b.tolist())) / 3 + 1) ** 3
    mean = lambda values: sum(values) / len(values)
    uu = mean([k(a, b) for i, a in enumerate(u) for j, b in enumerate(u) if i != j])
    vv = mean([k(a, b) for i, a in enumerate(v) for j, b in enumerate(v) if i != j])
    uv = mean([k(a, b) for a in u for b in v])
    assert abs(mmd2(u, v).item() - (uu + vv - 2 * uv)) < 1e-10


def test_linear_kernel_compares_means_only():
    u, v = randn(50, 4), 0.5 + 2 * randn(50, 4, seed=1)
    traces = u.var(0).sum() + v.var(0).sum()
    want = ((u.mean(0) - v.mean(0)).square().sum() - traces / 50) / 4
    assert_close(mmd2(u, v, "linear"), want, **CLOSE)


def test_gaussians_have_a_closed_form():
    gamma, (mx, sx), (my, sy) = 0.7, (0.0, 1.0), (0.8, 1.5)

    def mean(m, s2):  # E k of a difference N(m, s2)
        w = 1 + 2 * gamma * s2
        return math.exp(-gamma * m * m / w) / w**0.5

    want = mean(0, 2 * sx**2) + mean(0, 2 * sy**2) - 2 * mean(mx - my, sx**2 + sy**2)
    u, v = mx + sx * randn(400, 50, 1), my + sy * randn(400, 50, 1, seed=1)
    found = mmd2(u, v, functools.partial(rbf_kernel, gamma=gamma))
    assert abs(found.mean() - want) < 4 * found.std() / 400**0.5


@pytest.mark.parametrize("kernel", ["cubic", "linear", "rbf"])
def test_without_bias_and_with(kernel):
    u, v = randn(2, 2000, 6, 2)
    fair, biased = mmd2(u, v, kernel), mmd2(u, v, kernel, unbiased=False)
    assert abs(fair.mean()) < 4 * fair.std() / 2000**0.5
    assert (biased >= -1e-12).all() and biased.mean() > 10 * biased.std() / 2000**0.5


def test_the_order_in_a_batch_is_nothing_and_half_precision_is_widened():
    u, v = randn(30, 4), randn(30, 4, seed=1)
    i = torch.randperm(30, generator=torch.Generator().manual_seed(2))
    assert_close(mmd2(u[i], v), mmd2(u, v), **CLOSE)
    assert mmd2(u, u.clone()) < 0
    assert mmd2(u.half(), v.half()).dtype == F64


@pytest.mark.parametrize("kernel", ["cubic", "linear", "rbf"])
def test_gradient_of_the_estimator(kernel):
    u, v = randn(5, 3).requires_grad_(), randn(6, 3, seed=1)
    assert torch.autograd.gradcheck(lambda u: mmd2(u, v, kernel), u)


# --- features


def test_features_get_mean_zero_and_deviation_one():
    x = randn(200, 3, 2) * torch.tensor([[1.0, 20.0], [3.0, 0.5], [2.0, 7.0]]) + 5
    f = standardized(None, x, floor=1e-6)
    assert_close(f(x).mean(0), torch.zeros(6, dtype=F64), rtol=0.0, atol=1e-12)
    assert_close(f(x).std(0), torch.ones(6, dtype=F64))


def test_a_constant_feature_is_not_blown_up():
    x = randn(200, 2)
    x[:, 1] = 3.0
    f = standardized(None, x)
    root = (x[:, 0].var() / 2).sqrt()
    assert_close(f(torch.tensor([[0.0, 4.0]], dtype=F64))[0, 1], 1 / (0.1 * root))


# --- the finetuning


class Shift(nn.Module):  # one step of a flow with it gives mu + noise
    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, t):
        return x + self.mu


ONE = torch.tensor([1.0, 0.0])
QUIET = dict(progress=False, seed=0)


def test_one_step_of_gradient_descent_by_hand():
    data, seen = 2 + randn(40, 1), {}
    source = dk.NetDenoiser(Shift(), dk.Flow(), "x0")

    def features(x):  # remembers what it was shown: data first
        seen.setdefault("real" if not x.requires_grad else "fake", x.detach().clone())
        return x

    how = dict(grid=ONE, kernel="linear", standardize=False, batch_size=40, clip=None)
    sgd = functools.partial(torch.optim.SGD, lr=0.1)
    run = mmd_finetune(source, data, features, 1, optimizer=sgd, **how, **QUIET)
    want = -0.1 * 2 * (seen["fake"].mean() - seen["real"].mean())
    assert_close(run.model.net.mu.detach(), want.reshape(1), **CLOSE)
    assert source.net.mu.item() == 0.0


def test_the_mean_is_found():
    data = 2 + randn(4000, 1)
    source = dk.NetDenoiser(Shift(), dk.Flow(), "x0")
    how = dict(grid=ONE, kernel="linear", batch_size=200, schedule="cosine", clip=None)
    run = mmd_finetune(source, data, None, 150, 0.1, **how, **QUIET)
    # the mean of 4,000 is off by .016, the average over noise of the last iterations by less
    assert abs(run.model.net.mu.item() - 2) < 0.1


def small(seed=0, **how):
    torch.manual_seed(seed)
    net = MLP(2, hidden=16, depth=1, **how)
    nn.init.normal_(net.head.weight, std=0.3)
    return dk.NetDenoiser(net, dk.VP(), "x0", null={"label": 3} if how else None)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


CLOUD = randn(300, 2, dtype=torch.float32)
GRID = dk.time_grid(dk.VP(), 3)
HOW = dict(grid=GRID, batch_size=60, clip=None, **QUIET)


@pytest.mark.parametrize("solver", [dk.DDIM(), dk.DPMSolverPP(2), dk.Heun()])
def test_less_memory_gives_the_same(solver):
    one, two = (
        mmd_finetune(small(), CLOUD, None, 3, 1e-3, solver=solver, save_memory=s, **HOW)
        for s in (False, True)
    )
    # the same sums in float32
    assert_close(torch.tensor(one.values), torch.tensor(two.values), rtol=1e-4, atol=1e-5)
    assert_close(flat(one.model), flat(two.model), rtol=1e-3, atol=1e-4)


def test_gradient_reaches_the_first_step():
    # with the first of two calls cut off the gradient is another one
    model, z = small(), randn(60, 2, dtype=torch.float32)
    grid = dk.time_grid(dk.VP(), 2, "quadratic")
    whole = mmd2(dk.sample(model, dk.DDIM(), z, grid, progress=False, grad=True), CLOUD[:60])
    middle = dk.sample(model, dk.DDIM(), z, grid[:2], progress=False)
    last = mmd2(
        dk.sample(model, dk.DDIM(), middle, grid[1:], progress=False, grad=True), CLOUD[:60]
    )
    a, b = (
        torch.autograd.grad(v, list(model.parameters()), allow_unused=True) for v in (whole, last)
    )
    assert_close(whole, last)
    assert not torch.allclose(a[-1], b[-1], rtol=1e-2)


def test_the_loss_falls_and_the_source_stays():
    source = small()
    before = flat(source)
    run = mmd_finetune(source, CLOUD, None, 60, 3e-3, kernel="rbf", **HOW)
    values = torch.tensor(run.values).flatten()
    assert values[-10:].mean() < 0.5 * values[:5].mean()
    assert torch.equal(flat(source), before)
    assert not torch.equal(flat(run.model), before)


def test_side_by_side_is_alone():
    nets = [small(s) for s in range(2)]
    both = dk.NetDenoiser(Stacked([d.net for d in nets]), dk.VP(), "x0")
    fixed = randn(120, 2, seed=5, dtype=torch.float32)

    class Fixed(dk.VP):  # the same noise for everyone who asks for so many rows
        def sample_noise(self, shape, *args, **how):
            return fixed[:60] if shape[0] == 60 else torch.cat([fixed[:60], fixed[:60]])

    data = CLOUD[:60]
    how = dict(grid=GRID, clip=None, standardize=CLOUD, **QUIET)
    for d in (*nets, both):
        d.process = Fixed()
    forever = lambda v: iter([v] * 20)
    run = mmd_finetune(both, forever(data.repeat(2, 1)), None, 20, 1e-3, groups=2, **how)
    for d, got in zip(nets, run.model.net.split()):
        alone = mmd_finetune(d, forever(data), None, 20, 1e-3, **how)
        # the same sums in another order, twenty steps of Adam long
        assert_close(flat(got), flat(alone.model.net), rtol=1e-3, atol=1e-4)


def test_labels_go_with_their_batch_and_null_without():
    labels, seen = torch.arange(300) % 3, []
    model = small(classes=3)

    class Spy(MLP):
        def forward(self, x, t, label=None):
            seen.append(label)
            return super().forward(x, t, label)

    model.net.__class__ = Spy
    mmd_finetune(model, (CLOUD, labels), None, 1, **HOW)
    assert all(len(v) == 60 and set(v.tolist()) == {0, 1, 2} for v in seen)
    seen.clear()
    mmd_finetune(model, CLOUD, None, 1, **HOW)
    assert set(torch.as_tensor(seen[0]).flatten().tolist()) == {3}


def test_features_stay_as_they_are():
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Dropout(0.5))
    before = copy.deepcopy(critic.state_dict())
    for features in (critic, critic.forward):
        mmd_finetune(small(), CLOUD, features, 2, **HOW)
        assert critic.training and all(p.requires_grad for p in critic.parameters())
        assert all(p.grad is None for p in critic.parameters())
    assert all(torch.equal(v, before[k]) for k, v in critic.state_dict().items())


def test_dropout_is_off_and_only_what_requires_a_gradient_moves():
    model = small()
    model.net.act = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    for p in model.net.cond.parameters():
        p.requires_grad_(False)
    before, seen = copy.deepcopy(model.state_dict()), []
    watch = lambda run: seen.append(run.model.training)
    after = mmd_finetune(model, CLOUD, None, 2, callback=watch, **HOW).model.state_dict()
    assert seen == [False, False]
    frozen = {k: torch.equal(v, before[k]) for k, v in after.items()}
    assert all(same for k, same in frozen.items() if k.startswith("net.cond"))
    assert not frozen["net.head.weight"]


def test_the_official_grid_begins_below_one():
    process = dk.Discrete(torch.linspace(1e-4, 0.02, 1000))
    grid = dk.time_grid(process, 5, "leading")
    assert grid[0] < 0.81
    net = MLP(2, hidden=8, depth=1)
    nn.init.normal_(net.head.weight, std=0.1)
    run = mmd_finetune(dk.NetDenoiser(net, process), CLOUD, None, 2, **HOW | dict(grid=grid))
    assert math.isfinite(run.values[-1][0])


# --- what is refused


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: mmd2(CLOUD[:1], CLOUD), "n >= 2"),
        (lambda: mmd2(CLOUD, CLOUD[:, :1]), "agree but for their sizes"),
        (lambda: mmd2(CLOUD, [1.0]), "floating-point"),
        (lambda: mmd2(CLOUD, CLOUD, "gauss"), "cubic, linear, rbf"),
        (lambda: mmd2(CLOUD, CLOUD, lambda a, b: a @ b.mT[:, :3]), "kernel must give"),
        (lambda: polynomial_kernel(CLOUD, CLOUD, 1.5), "degree"),
        (lambda: rbf_kernel(CLOUD, CLOUD, 0.0), "gamma must be positive"),
        (lambda: rbf_kernel(CLOUD, CLOUD, ()), "gamma must be positive"),
        (lambda: standardized(None, CLOUD[:1]), "two samples"),
        (lambda: standardized(None, CLOUD, 0), "floor must be positive"),
        (lambda: standardized(None, torch.ones(5, 2)), "constant"),
        (lambda: standardized(lambda x: x.sum(), CLOUD), "features must give"),
        (lambda: mmd_finetune(small(), CLOUD, lambda x: x[:3], 1, **HOW), "features must give"),
        (lambda: mmd_finetune(small(), CLOUD, None, 1, **HOW | dict(batch_size=1)), "two samples"),
        (lambda: mmd_finetune(small(), CLOUD, None, 1, groups=0, **HOW), "groups must be"),
        (lambda: mmd_finetune(small(), CLOUD, None, 1, groups=7, **HOW), "each of 7 groups"),
        (lambda: mmd_finetune(small(), CLOUD, None, 1, kernel=3, **HOW), "kernel must be"),
        (lambda: mmd_finetune(small(), CLOUD, None, 1, kernle=3, **HOW), "kernle"),
        (lambda: mmd_finetune(small(), iter([CLOUD]), None, 1, **HOW), "tensor of samples"),
        (lambda: mmd_finetune(small().requires_grad_(False), CLOUD, None, 1, **HOW), "no weight"),
        (
            lambda: mmd_finetune(small(), CLOUD, None, 1, **HOW | dict(grid=ONE.flip(0))),
            "decreasing",
        ),
        (lambda: mmd_finetune(small(), CLOUD, None, 1, solver="ddim", **HOW), "Solver"),
    ],
)
def test_wrong_calls_are_named(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()
