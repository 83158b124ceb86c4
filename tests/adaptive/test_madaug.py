"""MADAug: operations against scipy, drawing, mixing, the virtual step and the meta-gradient against
exact answers, modes and buffers, state, `fit`, and every error."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import affine_transform
from torch import nn
from torch.testing import assert_close

from diffkit.adaptive.madaug import (
    OPS,
    AugmentBed,
    MADAug,
    Op,
    Policy,
    affine,
    augment,
    classic_ops,
    curriculum,
    mix,
    virtual_step,
)
from diffkit.core.training import fit

F64 = torch.float64
SOME = {k: OPS[k] for k in ("identity", "rotate", "zoom", "blur")}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0):
    return torch.rand(*shape, generator=rng(seed), dtype=F64) * 2 - 1


# --- operations


@pytest.mark.parametrize("name", OPS)
def test_strength_zero_changes_nothing_and_one_does(name):
    x = pictures(3, 2, 9, 7)
    assert_close(OPS[name].fn(x, torch.zeros(3, dtype=F64)), x, rtol=0, atol=1e-12)  # rounding
    for v in (1.0, -1.0) if OPS[name].signed else (1.0,):
        y = OPS[name].fn(x, torch.full((3,), v, dtype=F64))
        assert y.shape == x.shape and y.min() >= -1 and y.max() <= 1
        assert name == "identity" or (y - x).abs().max() > 0.1


def matrices(v):  # of scipy, (down, right)
    a, s = math.radians(30 * v), 0.3 * v
    return {
        "rotate": ([[math.cos(a), -math.sin(a)], [math.sin(a), math.cos(a)]], (0, 0)),
        "shear x": ([[1, 0], [s, 1]], (0, 0)),
        "shear y": ([[1, s], [0, 1]], (0, 0)),
        "shift x": (np.eye(2), (0, -0.2 * 21 * v)),
        "shift y": (np.eye(2), (-0.2 * 24 * v, 0)),
        "zoom": (np.eye(2) * math.exp(-0.3 * v), (0, 0)),
    }


@pytest.mark.parametrize("name", matrices(0.0))
@pytest.mark.parametrize("by_hand", [False, True])
def test_geometry_against_scipy(name, by_hand):
    # a border of 6 keeps the picture away from where scipy treats the border in its own way
    x, v = F.pad(pictures(4, 1, 12, 9), (6, 6, 6, 6), value=-1.0), [0.3, -1.0, 0.7, 1.0]
    strength = torch.tensor(v, dtype=F64, requires_grad=by_hand)
    got = OPS[name].fn(x, strength).detach()
    mid = np.array([11.5, 10.0])
    for i in range(4):
        A, b = matrices(v[i])[name]
        A = np.array(A, dtype=float)
        how = dict(offset=mid + b - A @ mid, order=1, mode="constant", cval=-1.0)
        want = torch.from_numpy(affine_transform(x[i, 0].numpy(), A, **how))
        assert_close(got[i, 0], want, rtol=0, atol=1e-9)  # two float64 interpolations


def test_both_ways_to_sample_agree_at_the_border():
    x, A = pictures(3, 2, 5, 7), torch.randn(3, 2, 3, generator=rng(1), dtype=F64)
    assert_close(affine(x, A.clone().requires_grad_()).detach(), affine(x, A), rtol=0, atol=1e-9)


def test_a_buffer_that_counts_calls_is_left_alone():
    class Counts(nn.Identity):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.tensor(0))

        def forward(self, x):
            self.calls += 1  # in eval mode, too
            return x

    aug, data = case()
    aug.model.drop = Counts()
    aug.meta_loss(*data)
    assert int(aug.model.drop.calls) == 0


def test_a_whole_shift_is_a_roll_and_the_border_is_dark():
    x = pictures(2, 1, 5, 10)
    y = OPS["shift x"].fn(x, torch.tensor([1.0, -1.0], dtype=F64))  # 0.2 of 10: two pixels
    assert_close(y[0, :, :, 2:], x[0, :, :, :-2])
    assert_close(y[1, :, :, :-2], x[1, :, :, 2:])
    assert (y[0, :, :, :2] == -1).all()
    low = classic_ops(0.0, 1.0)["shift x"].fn((x + 1) / 2, torch.ones(2, dtype=F64))
    assert low[..., :2].abs().max() < 1e-12 and low.min() > -1e-12


def test_brightness_contrast_and_blur_by_hand():
    x, half = 0.2 * pictures(2, 3, 4, 4), torch.tensor([0.5, -0.5], dtype=F64)
    by = torch.tensor([1.45, 0.55], dtype=F64).view(2, 1, 1, 1)
    assert_close(OPS["brightness"].fn(x, half), ((x + 1) * by - 1).clamp(-1, 1))
    mean = x.mean((1, 2, 3), keepdim=True)
    assert_close(OPS["contrast"].fn(x, half), mean + (x - mean) * by)
    flat = torch.full((1, 1, 5, 5), 0.3, dtype=F64)
    assert_close(OPS["blur"].fn(flat, torch.ones(1, dtype=F64)), flat)
    dot = torch.zeros(1, 1, 5, 5, dtype=F64)
    dot[0, 0, 2, 2] = 9
    assert_close(
        OPS["blur"].fn(dot, torch.ones(1, dtype=F64))[0, 0, 1:4, 1:4], torch.ones(3, 3).double()
    )


@pytest.mark.parametrize("name", ["rotate", "shear x", "shift y", "zoom", "blur", "contrast"])
def test_slopes_and_their_slopes_by_finite_differences(name):
    x = 0.5 * pictures(1, 1, 5, 5)
    f = lambda v, x: OPS[name].fn(x, v)
    v = torch.tensor([0.37], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (v, x))
    assert torch.autograd.gradgradcheck(f, (v, x))


# --- drawing and mixing


def test_draws_follow_p_without_replacement_and_in_order():
    add = {f"{j}": (lambda x, m, j=j: 10 * x + j + 1) for j in range(3)}  # digits: what was done
    x, p = torch.zeros(6000, 1, 1, 1), torch.tensor([0.5, 0.3, 0.2]).expand(6000, 3)
    y = augment(x, p, torch.zeros(6000, 3), add, k=2, generator=rng(1)).flatten().long()
    for i in range(3):
        for j in range(3):
            share = (y == 10 * (i + 1) + j + 1).float().mean().item()
            want = 0.0 if i == j else p[0, i].item() * p[0, j].item() / (1 - p[0, i].item())
            assert share == pytest.approx(want, abs=0.027)  # four standard errors


def test_jitter_stays_within_its_bounds_and_signs_are_fair():
    shade, seen = torch.zeros(4000, 1, 1, 1), []
    ops = {"a": Op(lambda x, v: seen.append(v) or x, signed=True)}
    augment(shade, torch.ones(4000, 1), torch.full((4000, 1), 0.9), ops, 1, 0.3, rng(2))
    v = seen[0]
    assert v.abs().min() >= 0.6 - 1e-6 and v.abs().max() <= 1 and v.abs().min() < 0.61
    assert (v < 0).float().mean().item() == pytest.approx(0.5, abs=0.032)  # four standard errors
    assert (v.abs() == 1).float().mean().item() == pytest.approx(1 / 3, abs=0.03)


def test_identity_alone_and_the_seed():
    x, one = pictures(5, 1, 4, 4), torch.ones(5, 1, dtype=F64)
    assert torch.equal(augment(x, one, one, {"identity": OPS["identity"]}, k=1), x)
    p, m = torch.full((5, 10), 0.1, dtype=F64), torch.full((5, 10), 0.5, dtype=F64)
    a, b, c = (augment(x, p, m, generator=rng(s)) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c) and torch.equal(x, pictures(5, 1, 4, 4))
    assert len(augment(x[:0], p[:0], m[:0])) == 0


@pytest.mark.parametrize("grad", ["ste", "true"])
def test_mix_is_linear_in_p(grad):
    x, m = pictures(4, 2, 5, 5), torch.rand(4, 10, generator=rng(1), dtype=F64)
    p, q = (torch.rand(4, 10, generator=rng(s), dtype=F64) for s in (2, 3))
    f = lambda p: mix(x, p, m, grad=grad, generator=rng(4))
    assert_close(f(0.3 * p + 0.7 * q), 0.3 * f(p) + 0.7 * f(q))
    only = F.one_hot(torch.zeros(4, dtype=torch.long), 10).double()
    assert_close(f(only), x)


def test_both_slopes_in_m():
    x = pictures(3, 1, 4, 4)
    m = torch.full((3, 2), 0.4, dtype=F64, requires_grad=True)
    p, ops = torch.tensor([[0.3, 0.7]] * 3, dtype=F64), {"a": lambda x, m: x, "b": OPS["blur"]}
    (ste,) = torch.autograd.grad(mix(x, p, m, ops).sum(), m)
    assert_close(ste, 16 * p)  # one a pixel, 16 pixels
    (true,) = torch.autograd.grad(mix(x, p, m, ops, "true").sum(), m)
    soft = OPS["blur"].fn(x, torch.ones(3, dtype=F64)) - x
    assert_close(true, torch.stack([torch.zeros(3).double(), 0.7 * soft.sum((1, 2, 3))], 1))


def test_policy_and_curriculum():
    for hidden in (None, 7):
        p, m = Policy(4, 3, hidden)(torch.randn(5, 4, generator=rng(1)))
        assert_close(p, torch.full((5, 3), 1 / 3)) and (m == 0.5).all()
    policy, f = Policy(4, 3), torch.randn(5, 4, generator=rng(1))
    nn.init.normal_(policy.net[0].weight)
    h = policy.net[0](f)
    p, m = policy(f, 3.0)
    assert_close(p, (h[:, 3:] / 3).softmax(1))
    assert_close(m, h[:, :3].sigmoid())
    tau = [curriculum(e / 2) for e in range(600)]
    assert tau[0] == 0.01 and tau[80] == pytest.approx(math.tanh(1) + 0.01) and tau[-1] == 1
    assert round(tau[80], 4) == 0.7716 and all(a <= b for a, b in zip(tau, tau[1:]))


# --- the virtual step and the meta-gradient


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(weight_decay=0.2),
        dict(momentum=0.9, weight_decay=0.1),
        dict(momentum=0.9, nesterov=True),
        dict(momentum=0.5, dampening=0.3, maximize=True, weight_decay=0.1),
    ],
)
def test_the_virtual_step_is_the_step(how):
    q, r = nn.Parameter(torch.arange(3.0)), nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([{"params": [q], "lr": 0.1}, {"params": [r], "lr": 0.3}], **how)
    for k in range(3):
        g = {"q": torch.tensor([1.0, -2.0, 0.5]) * (k + 1), "r": None if k == 1 else torch.ones(2)}
        ahead = virtual_step(opt, {"q": q, "r": r}, g)
        ahead = {n: v.detach().clone() for n, v in ahead.items()}
        q.grad, r.grad = g["q"].clone(), None if g["r"] is None else g["r"].clone()
        opt.step()
        assert_close(ahead["q"], q.detach())
        assert_close(ahead["r"], r.detach())


class Small(nn.Module):
    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(25, 8), norm(8), nn.Tanh())
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.drop(self.body(x)))


def case(grad="true", norm=nn.BatchNorm1d, dtype=F64, **how):
    torch.manual_seed(0)
    net, policy = Small(norm).to(dtype), Policy(8, 4).to(dtype)
    for q in policy.parameters():
        nn.init.normal_(q, std=0.5)
    opt = torch.optim.SGD(net.parameters(), 0.5, momentum=0.9, weight_decay=0.1)
    x, xv = (pictures(6, 1, 5, 5, seed=s).to(dtype) for s in (1, 2))
    y, yv = (torch.randint(3, (6,), generator=rng(s)) for s in (3, 4))
    F.cross_entropy(net(x), y).backward()
    opt.step()
    popt = torch.optim.Adam(policy.parameters(), 0.05)
    settings = dict(ops=SOME, grad=grad, generator=rng(5), epoch_size=6, valid=(xv, yv)) | how
    return MADAug(net, policy, lambda v: net.body(v), opt, popt, **settings), (x, y, xv, yv)


def slope_of(aug, data, seed=6):
    aug.generator.manual_seed(seed)  # the same coins
    return torch.autograd.grad(aug.meta_loss(*data), list(aug.policy.parameters()))


@pytest.mark.parametrize("relax", ["images", "losses"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, lambda d: nn.GroupNorm(2, d)])
def test_the_meta_gradient_by_finite_differences(relax, norm):
    aug, data = case(norm=norm, relax=relax)
    w, (slope, _) = aug.policy.net[0].weight, slope_of(aug, data)
    for i, j in ((0, 0), (1, 3), (2, 5), (3, 6), (5, 1), (6, 2), (7, 7)):
        ends = []
        for h in (1e-5, -2e-5):
            with torch.no_grad():
                w[i, j] += h
            aug.generator.manual_seed(6)
            ends.append(aug.meta_loss(*data).item())
        with torch.no_grad():
            w[i, j] += 1e-5
        # an error of h^2 = 1e-10, and rounding of 1e-16 / h = 1e-11
        assert abs((ends[0] - ends[1]) / 2e-5 - slope[i, j].item()) < 1e-5 * slope.abs().max()


def test_the_losses_are_the_mean_over_the_draw():
    aug, (x, y, xv, yv) = case(relax="losses")
    aug.opt = torch.optim.SGD(aug.model.parameters(), 0.5)
    aug.generator.manual_seed(6)
    got = aug.meta_loss(x, y, xv, yv)
    aug.model.eval()
    p, m = aug.choose(x)
    coin, total = torch.rand(6, 4, generator=rng(6), dtype=F64) < 0.5, 0
    for j, op in enumerate(SOME.values()):
        v = torch.where(coin[:, j], -m[:, j], m[:, j]) if op.signed else m[:, j]
        each = F.cross_entropy(aug.model(op.fn(x, v)), y, reduction="none")
        total = total + (p[:, j] * each).mean()
    grads = torch.autograd.grad(total, list(aug.model.parameters()))
    with torch.no_grad():
        for w, g in zip(aug.model.parameters(), grads):
            w -= 0.5 * g
    assert_close(got, F.cross_entropy(aug.model(xv), yv))


@pytest.mark.parametrize("cut", [False, True])
def test_the_closed_form_of_a_line(cut):
    a, c, x, y, xv, yv, eta = 0.7, 0.9, 1.3, 0.4, 0.8, 1.1, 0.3
    net = nn.Sequential(nn.Flatten(), nn.Linear(1, 1, bias=False)).double()
    nn.init.constant_(net[1].weight, a)

    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.c = nn.Parameter(torch.tensor(c, dtype=F64))

        def forward(self, f, temperature=1.0):
            return torch.ones_like(f), (self.c * f).sigmoid()

    policy, one = Told(), lambda v: torch.tensor([[[[v]]]], dtype=F64)
    aug = MADAug(net, policy, net, torch.optim.SGD(net.parameters(), eta), None, k=1, grad="true",
                 ops={"scale": lambda x, v: (1 + v.view(-1, 1, 1, 1)) * x}, detach_features=cut,
                 loss=lambda out, t: 0.5 * (out - t).square().mean())  # fmt: skip
    M = aug.meta_loss(one(x), one(y)[0, 0], one(xv), one(yv)[0, 0])
    (got,) = torch.autograd.grad(M, policy.c)
    m = 1 / (1 + math.exp(-c * a * x))
    s = m * (1 - m)  # the logistic function's slope; its own slope is s (1 - 2 m)
    r, dm_dw = a * (1 + m) * x - y, 0.0 if cut else s * c * x
    d_m = s * a * x  # dm / dc
    d_dm_dw = 0.0 if cut else s * (1 - 2 * m) * a * x * c * x + s * x
    lever = (1 + m) * x + a * x * dm_dw
    g, d_g = r * lever, a * x * d_m * lever + r * (x * d_m + a * x * d_dm_dw)
    want = ((a - eta * g) * xv - yv) * xv * -eta * d_g
    assert got.item() == pytest.approx(want, rel=1e-12)


def test_the_second_path_is_kept_unless_cut_and_no_rate_is_no_lesson():
    aug, data = case()
    full = torch.cat([g.flatten() for g in slope_of(aug, data)])
    aug.detach_features = True
    cut = torch.cat([g.flatten() for g in slope_of(aug, data)])
    assert (full - cut).norm() > 0.02 * full.norm()
    aug.opt.param_groups[0]["lr"] = 0.0
    assert all(g.abs().max() == 0 for g in slope_of(aug, data))


# --- what is left as it was


def test_a_lesson_changes_the_policy_and_nothing_else():
    aug, data = case()
    aug.model.body[2].eval()  # a module with a mode of its own
    before = copy.deepcopy(aug.model.state_dict())
    momentum = [aug.opt.state[p]["momentum_buffer"].clone() for p in aug.model.parameters()]
    grads, policy = (
        [p.grad.clone() for p in aug.model.parameters()],
        aug.policy.net[0].weight.clone(),
    )
    value = aug.explore_step(*data)
    assert value.item() > 0 and not torch.equal(policy, aug.policy.net[0].weight)
    assert all(torch.equal(v, before[k]) for k, v in aug.model.state_dict().items())
    assert aug.model.training and aug.model.drop.training and not aug.model.body[2].training
    for p, g, v in zip(aug.model.parameters(), grads, momentum):
        assert torch.equal(p.grad, g) and torch.equal(aug.opt.state[p]["momentum_buffer"], v)


def test_lessons_lower_the_validation_loss_ahead():
    aug, data = case()
    values = []
    for _ in range(40):
        aug.generator.manual_seed(6)
        values.append(aug.explore_step(*data).item())
    assert values[-1] < values[0] - 0.01


def test_the_harm_on_a_line_is_unlearned():
    turn = {"identity": lambda x, v: x, "half turn": lambda x, v: -x}
    x = torch.randn(80, 1, 1, 2, generator=rng(1), dtype=F64)
    y = x[:, 0, 0, :1]
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 1, bias=False)).double()
    nn.init.zeros_(net[1].weight)
    policy = Policy(1, 2).double()
    aug = MADAug(net, policy, lambda v: torch.ones(len(v), 1, dtype=F64),
                 torch.optim.SGD(net.parameters(), 0.02),
                 torch.optim.Adam(policy.parameters(), 0.1), (x[40:], y[40:]), ops=turn,
                 loss=F.mse_loss, relax="losses", k=1, every=1,
                 temperature=1.0, generator=rng(2))  # fmt: skip
    for _ in range(60):
        aug.train_step(x[:40], y[:40], epoch=1e3)
    assert aug.choose(x[:1])[0][0, 1] < 0.05


def test_every_and_the_share_that_is_augmented():
    aug, (x, y, _, _) = case(ops={"zero": lambda x, m: 0 * x}, k=1, every=3, tau=2.0)
    aug.policy = Policy(8, 1).double()
    aug.policy_opt = torch.optim.SGD(aug.policy.parameters(), 0.1)
    lessons, seen = [], []
    aug.explore_step = lambda *a: lessons.append(int(aug.steps)) or torch.tensor(0.0)
    aug.transform = lambda v: seen.append(int((v == 0).all(1).all(1).all(1).sum())) or v
    for _ in range(8):
        aug.train_step(x, y)
    assert lessons == [0, 3, 6] and int(aug.seen) == 48
    assert seen == [int(6 * curriculum(e, 2.0)) for e in range(8)]
    aug.clip = 1e-3
    aug.train_step(x, y, epoch=100)
    norm = sum(p.grad.square().sum() for p in aug.model.parameters()).sqrt()
    assert seen[-1] == 6 and norm <= 1.001e-3


# --- state, fit, loaders


def test_in_fit_it_is_resumed_bit_for_bit(tmp_path):
    def run(steps, file, features=None):
        aug, (x, y, _, _) = case(generator=None, dtype=torch.float32)
        aug.features = (aug.model.body,)  # a submodule: must not be held twice
        fit(aug, data=(x, y), steps=steps, step=lambda a, b: a.train_step(*b), batch_size=4,
            optimizer=[aug.opt, aug.policy_opt], checkpoint=file, progress=False)  # fmt: skip
        return aug

    whole = run(8, tmp_path / "a")
    run(5, tmp_path / "b")
    again = run(8, tmp_path / "b")
    assert int(again.steps) == 8 and not any("features" in k for k in again.state_dict())
    for k, v in whole.state_dict().items():
        assert torch.equal(v, again.state_dict()[k]), k


def test_state_is_saved_and_loaded_and_copied():
    aug, (x, y, xv, yv) = case(valid=[], generator=None)
    aug.valid = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(xv, yv), 3)
    for _ in range(7):  # more batches than the loader has
        aug.train_step(x, y)
    other, _ = case()
    other.load_state_dict(aug.state_dict())
    assert int(other.steps) == 7 and torch.equal(other.choose(x)[0], aug.choose(x)[0])
    assert torch.equal(copy.deepcopy(aug)(x[:0]), aug(x[:0]))


def test_an_untrained_policy_stays():
    aug, (x, y, _, _) = case()
    aug.policy_opt, before = None, aug.policy.net[0].weight.clone()
    aug.train_step(x, y)
    assert torch.equal(before, aug.policy.net[0].weight)


def test_another_optimizer_is_told():
    aug, data = case()
    adam = torch.optim.Adam(aug.model.parameters(), 0.1)
    with pytest.warns(UserWarning, match="Adam: the virtual step is plain SGD"):
        MADAug(aug.model, aug.policy, aug.model.body, adam, aug.policy_opt, data[2:])
    w, g = torch.ones(2), torch.tensor([1.0, 2.0])
    adam = torch.optim.Adam([w], 0.1, weight_decay=0.5)
    assert_close(virtual_step(adam, {"w": w}, {"w": g})["w"], torch.tensor([0.9, 0.8]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        case()


def made(**how):
    return case(**how)[0]


def swapped(name):  # an optimizer of something else
    net, policy = Small(), Policy(8)
    given = {k: torch.optim.SGD(v.parameters(), 0.1) for k, v in
             dict(opt=net, policy_opt=policy).items()}  # fmt: skip
    given[name] = torch.optim.SGD(Small().parameters(), 0.1)
    return MADAug(net, policy, net.body, **given, valid=(X, P))


X, P = torch.zeros(2, 1, 4, 4), torch.full((2, 10), 0.1)
NAN = float("nan")


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: augment(X, P, P, k=11), "k=11: must be at most"),
        (lambda: augment(X, P, P, k=True), "k=True"),
        (lambda: augment(X, P, P, jitter="a"), "jitter='a'"),
        (lambda: augment(X, P, P, jitter=2.0), "jitter=2.0"),
        (lambda: augment(X, P, P + 1), r"m must lie in \[0, 1\]"),
        (lambda: augment(X, P - 1, P), r"p must lie in \[0, 1\]"),
        (lambda: augment(X, P[:1], P), r"p must be \(2, 10\)"),
        (lambda: augment(X * NAN, P, P), "x must be finite"),
        (lambda: augment(X[0], P, P), "x must be finite images"),
        (lambda: augment(X, P, P, {}), "ops="),
        (lambda: augment(X, P, P, [1]), "ops="),
        (lambda: mix(X, P, P, grad="none"), "grad='none'"),
        (lambda: mix(X, P[:, :1], P[:, :1], {"crop": lambda x, m: x[..., 1:]}), r"ops\['crop'\]"),
        (lambda: mix(X, P[:, :1], P[:, :1], {"none": lambda x, m: None}), "NoneType"),
        (
            lambda: mix(X, P[:, :1], P[:, :1], {"bad": lambda x, m: x * NAN}),
            r"ops\['bad'\] gave nan",
        ),
        (lambda: affine(X, torch.zeros(1, 2, 3)), r"matrix \(B, 2, 3\)"),
        (lambda: classic_ops(1.0, 0.0), "low=1.0"),
        (lambda: classic_ops(shift=None), "shift=None"),
        (lambda: curriculum(-1), "epoch=-1"),
        (lambda: curriculum(1, tau=0), "tau=0"),
        (lambda: curriculum(1, floor=[1]), r"floor=\[1\]"),
        (lambda: Policy(0), "features_dim=0"),
        (lambda: Policy(3, hidden=0), "hidden=0"),
        (lambda: Policy(3, n_ops=2.0), "n_ops=2.0"),
        (lambda: made(valid=None), "valid=None"),
        (lambda: made(valid=[{"x": X, "y": P}]).train_step(*case()[1][:2]), "batch of type dict"),
        (lambda: made(valid={"x": X, "y": P}).train_step(*case()[1][:2]), "batch of type str"),
        (lambda: swapped("opt"), "opt holds no parameter of model"),
        (lambda: swapped("policy_opt"), "policy_opt holds no parameter of policy"),
        (lambda: made(relax="losses", loss=lambda a, b: (a - b).mean()), "needs one with `redu"),
        (lambda: made(relax="pictures"), "relax='pictures'"),
        (lambda: made(grad="gumbel"), "grad='gumbel'"),
        (lambda: made(every=0), "every=0"),
        (lambda: made(temperature=0), "temperature=0"),
        (lambda: made(tau=NAN), "tau=nan"),
        (lambda: made(k=5), "k=5"),
        (lambda: made(jitter=-1), "jitter=-1"),
        (lambda: made(clip=0), "clip=0"),
        (lambda: made(epoch_size=0), "epoch_size=0"),
        (lambda: made(unknown=1), "unexpected keyword"),
        (lambda: made(epoch_size=None).train_step(X, P), "epoch=None"),
        (lambda: made(valid=(X, P[:1])), "valid has 2 images and 1 labels"),
        (lambda: made(valid=(X[:0], P[:0])), "valid has 0 images"),
        (lambda: made(valid=[]).train_step(*case()[1][:2]), "valid gave no batch"),
        (lambda: MADAug(Small(), Policy(8), None, None, None), "features=None"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_a_module_is_a_loss_too():
    for kind in (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.1)):
        as_function = lambda out, y, reduction="mean", k=kind: F.cross_entropy(
            out, y, reduction=reduction, label_smoothing=k.label_smoothing
        )
        for relax in ("images", "losses"):
            a, data = case(relax=relax, loss=kind)
            b, _ = case(relax=relax, loss=as_function)
            for g, h in zip(slope_of(a, data), slope_of(b, data)):
                assert torch.equal(g, h) and g.abs().max() > 0
        assert kind.reduction == "mean"


@pytest.mark.parametrize("grad", ["ste", "true"])
def test_operations_may_work_in_place(grad):
    copies = {"half": lambda x, v: x * (1 - v / 2).view(-1, 1, 1, 1), "none": lambda x, v: x}
    ops = copies | {"half": lambda x, v: x.mul_((1 - v / 2).view(-1, 1, 1, 1))}
    x, p, m = pictures(2, 1, 4, 4), torch.full((2, 2), 0.5).double(), torch.ones(2, 2).double()
    kept = x.clone()
    assert torch.equal(mix(x, p, m, ops, grad), mix(kept, p, m, copies, grad))
    augment(x, p, m, ops)
    assert torch.equal(x, kept)


def test_images_outside_of_the_range_are_told_once():
    aug, (x, y, *_) = case()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aug.train_step(x, y)  # within -1 to 1
    aug, _ = case()
    with pytest.warns(UserWarning, match=r"x lies in .*from -1 to 1: give ops=classic_ops"):
        aug.train_step(3 * x, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aug.train_step(3 * x, y)
        wide = {k: classic_ops(-3.0, 3.0)[k] for k in SOME}
        case(ops=wide)[0].train_step(3 * x, y)


def test_features_must_be_rows():
    aug, data = case()
    aug.features = (lambda v: v,)
    with pytest.raises(ValueError, match=r"features gave \(6, 1, 5, 5\): must be \(6, d\)"):
        aug.choose(data[0])
    assert aug.model.training and aug.model.drop.training


# --- the bed


def test_the_bed_of_digits():
    flip = Op(lambda x, v: x.flip(2, 3))
    bed = AugmentBed([3, 4], {"turn": flip}, labelled=40, batch=10, hidden=8)
    assert len(bed.ops) == 6 and bed.good == 5 and bed.x.shape == (40, 2, 1, 8, 8)
    n = len(bed.test[1]) + 40
    # every picture once, in the training set or in the test set, in two orders
    one, two = torch.cat([bed.x, bed.test[0]]).double().sum((2, 3, 4)).unbind(1)
    assert len(one) == n and not torch.equal(one, two)
    assert_close(one.sort().values, two.sort().values, rtol=0, atol=0)
    by_class, net = bed.fixed(3, ("none", "oracle"))
    assert by_class["none"].shape == (2, 10)
    x, y = bed.test
    with torch.no_grad():  # member s * 2 + a
        out = net(x.repeat_interleave(2, 1).flatten(0, 1)).unflatten(0, (len(x), 2, 2))
    right = (out.argmax(-1) == y[:, :, None]).double().mean(0)  # (S, A)
    for a, arm in enumerate(("none", "oracle")):
        np.testing.assert_allclose(bed.overall(by_class[arm]), right[:, a], atol=1e-6)


@pytest.mark.parametrize("arms", [1, 2])
def test_the_networks_of_the_bed_stand_apart(arms):
    bed = AugmentBed([3, 4, 5], {"turn": OPS["rotate"]}, labelled=40, hidden=8)
    net, _ = bed._nets(arms)
    x = torch.randn(7, 3 * arms, 1, 8, 8, generator=rng(1))
    with torch.no_grad():
        got = net(x.flatten(0, 1)).unflatten(0, (7, 3 * arms))
        features = net.features(x.flatten(0, 1)).unflatten(0, (7, 3 * arms))
        for k in range(3 * arms):  # the rows of a picture: one for each network, in turn
            h = x[:, k].flatten(1)
            for i in range(3):
                h = (h.relu() if i else h) @ net.w[i][k] + net.b[i][k]
                if i == 1:
                    assert_close(features[:, k], h.relu(), atol=1e-5, rtol=1e-5)
            assert_close(got[:, k], h, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("relax,pictures", [("images", 1), ("losses", 6)])
def test_the_bed_counts_passes(relax, pictures):
    bed = AugmentBed([0], {"turn": Op(lambda x, v: x.flip(2, 3))}, labelled=40, hidden=8)
    seen = []
    look = lambda run, aug, draw: seen.append((run.step, next(draw())[0].shape))
    by_class, passes = bed.learned(relax, 6, look=look)
    assert by_class.shape == (1, 10) and len(seen) == 6 and seen[0][1] == (20, 1, 8, 8)
    # a step: features, training; each third step: features, augmented pictures, validation
    assert passes == pytest.approx(2 + (1 + pictures + 1) / 3)
    held = bed.learned(relax, 3, held=10)[0]
    assert held.shape == (1, 10)
    with pytest.raises(ValueError, match="labelled=99999"):
        AugmentBed([0], {"turn": OPS["rotate"]}, labelled=99999)
