"""SD-DARTS: the linear model against closed forms and the class itself; kept outputs and copies;
the measures; the search; errors."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from diffkit.core.data import mnist1d
from diffkit.nas.rarts import rarts
from diffkit.nas.sd_darts import (
    SelfDistillation,
    discretisation_gap,
    hessian_top,
    pulled_path,
    sd_darts,
    sharpness,
    speed_limit,
)
from diffkit.nas.supernet import (
    CellNet,
    CellSpace,
    MixedOp,
    Supernet,
    classification,
    evaluate,
    search,
    second_order,
)

F64 = torch.float64
X, Y = mnist1d("train")
HALVES = (X[:200], Y[:200]), (X[200:400], Y[200:400])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def supernet(seed=0, cells=1):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Supernet(CellNet(CellSpace(), cells=cells))


def small(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(40, 10)).double()


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def batch(n=60, start=0):
    return X[start : start + n].double(), Y[start : start + n], torch.arange(start, start + n)


# ---- the linear model


@pytest.mark.parametrize("lam, M", [(0.3, 1), (1.0, 2), (1.0, 3), (3.0, 3), (0.1, 5)])
def test_the_limit_is_the_largest_root(lam, M):
    roots = np.roots([M * (1 + lam) / lam, *[-1.0] * M])
    assert abs(speed_limit(lam, M) - max(abs(roots))) < 1e-12  # bisection to 2^-60
    path = pulled_path([20.0], lam, M, rate=0.02, each=50, epochs=80, copies=True)
    assert abs(float(path[-1] / path[-51]) - speed_limit(lam, M)) < 1e-3  # other roots die out


def test_the_limit_grows_with_strength_and_teachers():
    values = [[speed_limit(lam, M) for M in (1, 2, 5)] for lam in (0.0, 0.1, 1.0, 10.0)]
    assert values[0] == [0, 0, 0]
    assert all(a < b for row in values[1:] for a, b in zip(row, row[1:]))
    assert all(a < b for col in zip(*values) for a, b in zip(col, col[1:]))
    assert speed_limit(1e6) > 1 - 2e-6


@pytest.mark.parametrize("lam, rate, each", [(0.3, 0.1, 3), (1.0, 0.02, 20), (3.0, 0.4, 7)])
def test_one_copy_is_a_proximal_point_method(lam, rate, each):
    path = pulled_path([1.0, 0.1], lam, rate=rate, each=each, epochs=9, copies=True)[each::each]
    a = torch.tensor([1.0, 0.1], dtype=F64)
    factor = (lam + (1 - rate * a * (1 + lam)) ** each) / (1 + lam)
    torch.testing.assert_close(path[1:] / path[:-1], factor.expand(8, 2))


def test_the_first_epoch_has_no_teacher():
    for copies in (False, True):
        path = pulled_path([0.5], 2.0, 3, rate=0.1, each=7, epochs=2, copies=copies)[:, 0]
        torch.testing.assert_close(path[:8], 0.95 ** torch.arange(8, dtype=F64))
        assert path[9] != path[8] * 0.95


def test_no_tie_is_plain_descent():
    path = pulled_path([0.5, 2.0], 0.0, 3, rate=0.1, each=5, epochs=4)
    a = torch.tensor([0.5, 2.0], dtype=F64)
    torch.testing.assert_close(path, (1 - 0.1 * a) ** torch.arange(21)[:, None])


def test_kept_outputs_need_smaller_steps():
    end = lambda a, **k: float(pulled_path([a], 3.0, rate=1.0, each=9, epochs=80, **k)[-1].abs())
    assert end(0.24) < 1e-3 and end(2 / 7 - 0.01) < 1e-3  # rate a (1 + 2 lam) < 2
    assert end(0.45) > 1 and end(0.45, copies=True) < 1e-3  # rate a (1 + lam) < 2


class Diagonal(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.w = nn.Parameter(torch.ones(n, dtype=F64))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("M", [1, 3])
def test_the_class_walks_the_path(copies, M):
    a = torch.tensor([0.2, 1.0, 4.0], dtype=F64)
    x, y, row = torch.diag((3 * a).sqrt()), torch.zeros(3, dtype=F64), torch.arange(3)
    squared = lambda z, q: (z - q).square() / 2
    tie = SelfDistillation(
        1.5,
        M,
        size=None if copies else 3,
        target=lambda z: z,
        loss=lambda z, y: squared(z, y).mean(),
        distance=squared,
    )
    net, each = Diagonal(3), 4 if copies else 1
    opt, trace = torch.optim.SGD(net.parameters(), 0.1), [net.w.detach().clone()]
    for _ in range(8):
        for _ in range(each):
            opt.zero_grad()
            tie(net, (x, y) if copies else (x, y, row)).backward()
            opt.step()
            trace.append(net.w.detach().clone())
        tie.end_epoch(net)
    want = pulled_path(a, 1.5, M, rate=0.1, each=each, epochs=8, copies=copies)
    torch.testing.assert_close(torch.stack(trace), want, rtol=1e-12, atol=1e-12)  # rounding


# ---- the tie


def loss_and_grad(f, net, b):
    value = f(net, b)
    return value.detach(), torch.cat(
        [g.flatten() for g in torch.autograd.grad(value, list(net.parameters()))]
    )


@pytest.mark.parametrize("size", [None, 60])
def test_a_teacher_that_is_the_student_does_not_pull(size):
    net, b = small(), batch() if size else batch()[:2]
    tie = SelfDistillation(5.0, 2, size=size)
    for _ in range(2):
        tie(net, b)
        tie.end_epoch(net)
    got, want = loss_and_grad(tie, net, b), loss_and_grad(classification, net, b)
    for u, v in zip(got, want):
        torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("T, lam, M", [(1.0, 1.0, 1), (2.0, 0.7, 3)])
def test_the_loss_is_equation_5(T, lam, M):
    b, nets = batch(), [small(i) for i in range(5)]
    tie = SelfDistillation(lam, M, T, size=60)
    for net in nets[:4]:  # more than fit: the oldest leaves
        tie(net, b)
        tie.end_epoch(net)
    with torch.no_grad():
        q = torch.stack([(n(b[0]) / T).softmax(-1) for n in nets[4 - M : 4]]).mean(0)
    torch.testing.assert_close(tie.vote(b[0], b[2]), q)
    z = nets[4](b[0])
    p = (z / T).softmax(-1)
    want = F.cross_entropy(z, b[1]) + lam * T**2 * (q * (q / p).log()).sum(-1).mean()
    torch.testing.assert_close(tie(nets[4], b), want)


def test_kept_outputs_and_copies_agree_where_the_net_rests():
    b, nets = batch(), [small(i) for i in range(3)]
    kept, copies = SelfDistillation(1.3, 2, size=60), SelfDistillation(1.3, 2)
    for net in nets[:2]:
        kept(net, b)
        kept.end_epoch(net)
        copies.end_epoch(net)
    torch.testing.assert_close(kept(nets[2], b), copies(nets[2], b[:2]))


def test_probabilities_are_averaged_not_logits():
    tie = SelfDistillation(1.0, 2, 1.0, size=1)
    said = torch.tensor([[4.0, 0, 0], [0, 0, 1.0]], dtype=F64)
    one = torch.tensor([0])
    for z in said:
        tie(lambda _, z=z: z[None], (None, one, one))
        tie.end_epoch(None)
    torch.testing.assert_close(tie.vote(None, one)[0], said.softmax(-1).mean(0))
    assert (said.softmax(-1).mean(0) - said.mean(0).softmax(-1)).abs().max() > 0.1


def test_outputs_come_to_their_rows():
    net, b = small(), batch()
    order = torch.randperm(60, generator=rng(1))
    whole, parts = SelfDistillation(1.0, 1, size=60), SelfDistillation(1.0, 1, size=60)
    whole(net, b)
    for rows in order.split(17):
        parts(net, tuple(v[rows] for v in b))
    for tie in (whole, parts):
        tie.end_epoch(net)
    some = order[:9]
    torch.testing.assert_close(whole.vote(None, some), parts.vote(None, some))
    torch.testing.assert_close(whole.kept[0], parts.kept[0])


def test_rows_without_a_teacher_are_not_pulled():
    b, tie = batch(), SelfDistillation(2.0, 2, size=60)
    tie(small(0), tuple(v[:20] for v in b))
    tie.end_epoch(None)
    tie(small(1), tuple(v[10:40] for v in b))
    tie.end_epoch(None)
    q = tie.vote(None, b[2])
    assert q.isnan().all(-1).tolist() == [i >= 40 for i in range(60)]
    torch.testing.assert_close(q[:10], (small(0)(b[0][:10]) / 2).softmax(-1))
    last = tuple(v[40:] for v in b)
    net = small(2)
    for u, v in zip(loss_and_grad(tie, net, last), loss_and_grad(classification, net, last)):
        torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-12)
    squares = lambda z, q: (z - q).square().mean(-1)
    tie = SelfDistillation(2.0, 2, size=60, target=lambda z: z, distance=squares)
    tie(small(0), tuple(v[:20] for v in b))
    tie.end_epoch(None)
    for u, v in zip(loss_and_grad(tie, net, last), loss_and_grad(classification, net, last)):
        torch.testing.assert_close(u, v, rtol=1e-12, atol=1e-12)


def test_copies_are_copies():
    net, b = supernet().double(), batch()
    tie = SelfDistillation(1.0, 1)
    tie.end_epoch(net)
    before = tie.vote(b[0])
    with torch.no_grad():
        for p in net.parameters():  # alpha too
            p.add_(0.3 * torch.randn(p.shape, generator=rng(), dtype=F64))
    assert torch.equal(before, tie.vote(b[0]))
    assert not any(p.requires_grad for p in tie.kept[0].parameters())
    assert (before - tie.target(net(b[0]))).abs().max() > 1e-3


def test_no_gradient_reaches_the_teachers():
    b, teacher, net = batch(), small(0), small(1)
    tie = SelfDistillation(1.0, 1, size=60)
    tie(teacher, b).backward()
    teacher.zero_grad()
    tie.end_epoch(teacher)
    tie(net, b).backward()
    assert all(p.grad is None or not p.grad.any() for p in teacher.parameters())
    assert not tie.kept[0].requires_grad


def test_an_epoch_without_batches_changes_nothing():
    tie = SelfDistillation(1.0, 2, size=60)
    tie.end_epoch(None)
    assert len(tie.kept) == 0


# ---- measures


class Bowl(nn.Module):
    def __init__(self, w):
        super().__init__()
        self.a, self.b = nn.Parameter(w[:2].clone()), nn.Parameter(w[2:].clone())

    def forward(self):
        return torch.cat([self.a, self.b])


def bowl(seed=1):
    S = torch.randn(6, 6, generator=rng(seed), dtype=F64)
    w = torch.randn(6, generator=rng(seed + 1), dtype=F64)
    A = S @ S.T
    return Bowl(w), A, w, lambda net, _: net() @ A @ net() / 2


@pytest.mark.parametrize("rho", [0.05, 0.7])
def test_sharpness_of_a_quadratic(rho):
    net, A, w, loss = bowl()
    g = A @ w
    rise, value = sharpness(net, (), rho, loss=loss)
    assert math.isclose(value, float(w @ g / 2))
    assert math.isclose(rise, float(rho * g.norm() + rho**2 / 2 * (g @ A @ g) / (g @ g)))
    torch.testing.assert_close(net().detach(), w, rtol=0, atol=0)
    size = torch.cat(
        [torch.full((n,), float(v.norm()), dtype=F64) for n, v in ((2, w[:2]), (4, w[2:]))]
    )
    step = rho * size**2 * g / (size * g).norm()
    assert math.isclose((step / size).norm(), rho)
    want = (w + step) @ A @ (w + step) / 2 - w @ g / 2
    assert math.isclose(sharpness(net, (), rho, relative=True, loss=loss)[0], float(want))


@pytest.mark.parametrize("relative", [False, True])
def test_a_weight_the_loss_does_not_see_changes_no_sharpness(relative):
    net, _, _, loss = bowl()
    alone = sharpness(net, (), relative=relative, loss=loss)
    net.idle = nn.Parameter(torch.ones(3, dtype=F64))
    assert sharpness(net, (), relative=relative, loss=loss) == alone
    assert net.idle.eq(1).all()


def test_what_the_loss_does_not_see_or_sees_straight_has_no_curvature():
    net, A, _, loss = bowl()
    want = hessian_top(net, (), iterations=500, loss=loss, generator=rng())
    net.idle = nn.Parameter(torch.ones(3, dtype=F64))
    for seen in (loss, lambda n, b: loss(n, b) + n.idle.sum()):
        got = hessian_top(net, (), iterations=500, loss=seen, generator=rng())
        assert math.isclose(got, want, rel_tol=1e-9)
    assert hessian_top(net, (), loss=lambda n, b: n().sum() + n.idle.sum()) == 0.0
    # of a supernet's path: the weights of others are not seen, nor is alpha
    cells = Supernet(CellNet(CellSpace(), cells=1))
    path = lambda n, b: F.cross_entropy(n(b[0], arch=(1,) * 6), b[1])
    assert hessian_top(cells, (X[:16], Y[:16]), iterations=3, loss=path) != 0.0
    assert hessian_top(cells, (X[:16], Y[:16]), "alpha", iterations=3, loss=path) == 0.0


def test_no_direction_of_the_ball_rises_more_at_first_order():
    net, A, w, loss = bowl(5)
    rho = 1e-5
    most = [sharpness(net, (), rho, relative=r, loss=loss)[0] for r in (False, True)]
    sizes = [w[:2].norm(), w[2:].norm()]
    for seed in range(50):
        v = torch.randn(6, generator=rng(seed), dtype=F64)
        v = rho * v / v.norm()
        scaled = torch.cat([v[:2] * sizes[0], v[2:] * sizes[1]])
        for d, top in ((v, most[0]), (scaled, most[1])):
            assert (w + d) @ A @ (w + d) / 2 - w @ A @ w / 2 <= top + 1e-8 * rho


def test_relative_sharpness_does_not_see_the_scale_before_a_normalisation():
    found = {}
    for factor in (0.1, 10.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            conv = nn.Conv1d(1, 4, 3, bias=False)
            norm = nn.BatchNorm1d(4, affine=False, eps=1e-12)
            net = nn.Sequential(conv, norm, nn.Flatten(), nn.Linear(152, 10)).double()
        with torch.no_grad():
            conv.weight.mul_(factor)
        b = X[:50].double().reshape(50, 1, 40), Y[:50]
        found[factor] = [sharpness(net, b, 0.02, relative=r)[0] for r in (False, True)]
    assert math.isclose(found[0.1][1], found[10.0][1], rel_tol=1e-6)
    assert abs(found[0.1][0] / found[10.0][0] - 1) > 0.1
    assert torch.equal(norm.running_mean, torch.zeros(4, dtype=F64))  # statistics untouched


def test_sharpness_restores_after_an_error():
    net, calls = small(), []

    def loss(net, b):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("stop")
        return classification(net, b)

    before = flat(net)
    with pytest.raises(RuntimeError, match="stop"):
        sharpness(net, batch()[:2], loss=loss)
    assert torch.equal(before, flat(net))


def test_the_largest_eigenvalue():
    net, A, w, loss = bowl()
    top = hessian_top(net, (), iterations=500, loss=loss, generator=rng())
    assert math.isclose(top, float(torch.linalg.eigvalsh(A).max()), rel_tol=1e-9)
    down = lambda net, b: -3 * loss(net, b)  # largest in size, not the largest
    least = hessian_top(net, (), iterations=500, loss=down, generator=rng())
    assert math.isclose(least, -3 * top, rel_tol=1e-9)


def test_the_curvature_of_alpha():
    net, b = supernet().double(), batch()[:2]
    shape = net.alpha.shape

    def of_alpha(a):
        p = a.reshape(shape).softmax(-1)
        return F.cross_entropy(net(b[0], weights=p), b[1])

    H = torch.autograd.functional.hessian(of_alpha, net.alpha.detach().flatten())
    values = torch.linalg.eigvalsh(H)
    want = values[values.abs().argmax()]
    got = hessian_top(net, b, "alpha", iterations=300, generator=rng())
    assert math.isclose(got, float(want), rel_tol=1e-4)  # the ratio of the two largest rules


def test_the_gap():
    net = supernet(3)
    gap = discretisation_gap(net, HALVES[1])
    assert gap == evaluate(net, HALVES[1]).acc - evaluate(net, HALVES[1], arch=net.argmax()).acc
    arch = (2,) * 6
    with torch.no_grad():
        net.alpha[:, 2] = 50.0  # already one candidate an edge
    assert discretisation_gap(net, HALVES[1], arch) == 0


# ---- the search


def test_no_tie_is_darts_to_the_bit():
    ends = []
    for f, more in ((search, {}), (sd_darts, dict(lam=0.0)), (sd_darts, dict(lam=1.0))):
        net = supernet(2)
        found = f(net, *HALVES, epochs=1, batch_size=50, seed=4, **more)
        ends.append((flat(net), found.weights))
    for other in ends[1:]:  # the first epoch has no teacher
        assert torch.equal(ends[0][0], other[0]) and torch.equal(ends[0][1], other[1])


def test_the_tie_acts_from_the_second_epoch_and_is_reported():
    seen, ends = [], []
    for lam in (0.0, 3.0):
        net = supernet(2)
        note = lambda net, epoch: seen.append(epoch)
        run = sd_darts(net, *HALVES, epochs=2, lam=lam, batch_size=50, seed=4, on_epoch=note).run
        ends.append(torch.as_tensor(run.losses))
    assert seen == [1, 2, 1, 2]
    assert torch.equal(ends[0][:4], ends[1][:4]) and not torch.equal(ends[0][4:], ends[1][4:])


def test_the_search_takes_second_order_copies_and_is_repeatable():
    ends = []
    for _ in range(2):
        net = supernet(2)
        sd_darts(net, *HALVES, epochs=2, copies=True, batch_size=100, arch_step=second_order(0.01))
        ends.append(flat(net))
    assert torch.equal(*ends)


def test_it_goes_with_another_search():
    rows = torch.arange(200)
    tie = SelfDistillation(1.0, 2, size=200)
    net = supernet(2)
    found = rarts(
        net,
        (*HALVES[0], rows),
        HALVES[1],
        epochs=2,
        train_loss=tie,
        on_epoch=lambda net, epoch: tie.end_epoch(net),
    )
    assert len(tie.kept) == 2 and len(found.arch) == 6


def test_on_a_network_of_ones_own():
    pair = {"conv": nn.Conv1d(1, 4, 3, padding=1), "wide": nn.Conv1d(1, 4, 7, padding=3)}
    pool = {"max": nn.MaxPool1d(4), "mean": nn.AvgPool1d(4), "stride": nn.Conv1d(4, 4, 4, 4)}
    net = Supernet(
        nn.Sequential(MixedOp(pair), nn.ReLU(), MixedOp(pool), nn.Flatten(), nn.Linear(40, 10))
    )
    found = sd_darts(net, *HALVES, epochs=2, teachers=1)
    assert len(net.names(found.arch)) == 2
    assert isinstance(discretisation_gap(net, HALVES[1]), float)


# ---- errors


@pytest.mark.parametrize(
    "settings, words",
    [
        (dict(lam=-1.0), "lam=-1.0"),
        (dict(lam=math.nan), "lam=nan"),
        (dict(lam="1"), "lam='1'"),
        (dict(teachers=0), "teachers=0"),
        (dict(teachers=1.5), "teachers=1.5"),
        (dict(temperature=0.0), "temperature=0.0"),
    ],
)
def test_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        SelfDistillation(**settings)
    with pytest.raises(ValueError, match=words):
        sd_darts(supernet(), *HALVES, **settings)


def test_wrong_batches_and_data():
    with pytest.raises(ValueError, match="size=0"):
        SelfDistillation(size=0)
    with pytest.raises(ValueError, match="belong together"):
        SelfDistillation(distance=lambda z, q: z)
    net, tie, b = small(), SelfDistillation(size=50), batch()
    with pytest.raises(ValueError, match=r"\(x, class, row\)"):
        tie(net, b[:2])
    with pytest.raises(ValueError, match=r"\(x, class, row\)"):
        tie(net, (*b[:2], b[2].double()))
    with pytest.raises(ValueError, match="row is from 0 to 59: must be from 0 to 49"):
        tie(net, b)
    with pytest.raises(ValueError, match="row is from -1"):
        tie(net, (*b[:2], b[2] - 1))
    with pytest.raises(ValueError, match=r"train must be a tuple \(x, class\)"):
        sd_darts(supernet(), HALVES[0][0], HALVES[1])
    with pytest.raises(TypeError, match="unexpected keyword argument 'epoch'"):
        sd_darts(supernet(), *HALVES, epoch=3)


def test_wrong_settings_of_the_measures():
    net, *_, loss = bowl()
    with pytest.raises(ValueError, match="rho=0"):
        sharpness(net, (), 0, loss=loss)
    with pytest.raises(ValueError, match="of='w'"):
        hessian_top(net, (), of="w", loss=loss)
    with pytest.raises(ValueError, match="iterations=0"):
        hessian_top(net, (), iterations=0, loss=loss)
    with pytest.raises(ValueError, match="rate=0"):
        pulled_path([1.0], 1.0, rate=0, each=1, epochs=1)
    with pytest.raises(ValueError, match="each=0"):
        pulled_path([1.0], 1.0, rate=0.1, each=0, epochs=1)
    with pytest.raises(ValueError, match="teachers=0"):
        speed_limit(1.0, 0)


def test_settings_are_checked_before_any_work():
    net = supernet()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="temperature=-1"):
        sd_darts(net, *HALVES, temperature=-1)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- on networks of others


def test_copies_follow_the_mode_of_the_student():
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    net = nn.Sequential(net, nn.Linear(8, 10)).double()
    for _ in range(3):
        net(X[:50].double())
    tie, b = SelfDistillation(), batch()[:2]
    tie.end_epoch(net)
    assert torch.equal(tie.vote(b[0]), tie.vote(b[0]))  # no dropout in the teachers
    net.eval()
    want = classification(net, b)
    torch.testing.assert_close(tie(net, b), want, rtol=1e-12, atol=1e-12)
    assert tie(net, tuple(v[:1] for v in b)).isfinite()


def test_validation_leaves_the_teachers_alone():
    net, tie, b = small(), SelfDistillation(size=60), batch()
    tie(net, b)
    with torch.no_grad():
        tie(small(1), b)
    tie.end_epoch(net)
    torch.testing.assert_close(tie.kept[0], tie.target(net(b[0]).detach()))


def test_outputs_of_more_axes_need_their_own_vote():
    net = nn.Conv1d(1, 4, 1)
    with pytest.raises(ValueError, match="give target and distance"):
        SelfDistillation()(net, (torch.zeros(2, 1, 5), torch.zeros(2, 5, dtype=torch.long)))


def test_measures_leave_everything_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(40, 8), nn.BatchNorm1d(8, momentum=None))
    net = nn.Sequential(net, nn.Dropout(0.5), nn.Linear(8, 10))
    b = X[:60], Y[:60]
    net(b[0])
    before, state = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    first = sharpness(net, b, 1e-4)
    assert torch.equal(state, torch.get_rng_state())
    assert first == sharpness(net, b, 1e-4) and first[0] > 0  # the same dropout in both passes
    with torch.no_grad():
        hessian_top(net, b, iterations=2, generator=rng())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


# ---- a run that is stopped


def epochs(tie, net, n, rate=0.05):  # whole passes over 60 samples in batches of 20
    opt = torch.optim.SGD(net.parameters(), rate)
    for _ in range(n):
        for i in (0, 20, 40):
            opt.zero_grad()
            tie(net, batch(20, i)[: 2 if tie.size is None else 3]).backward()
            opt.step()
        tie.end_epoch(net)


@pytest.mark.parametrize("size", [None, 60])
@pytest.mark.parametrize("how", ["state", "pickle"])
def test_a_run_resumes(size, how, tmp_path):
    whole, a, b = SelfDistillation(1.5, 2, size=size), small(), small()
    epochs(whole, a, 5)
    tie = SelfDistillation(1.5, 2, size=size)
    epochs(tie, b, 3)
    if size:  # in the middle of an epoch
        tie(b, batch(20, 0))
    if how == "pickle":
        again = pickle.loads(pickle.dumps(tie))
    else:
        save_file(tie.state_dict(), tmp_path / "tie.safetensors")
        again = SelfDistillation(1.5, 2, size=size)
        again.load_state_dict(load_file(tmp_path / "tie.safetensors"), net=small(seed=4))
    assert again.state_dict().keys() == tie.state_dict().keys()
    assert any("now" in k for k in again.state_dict()) == bool(size)
    epochs(again, b, 2)
    assert torch.equal(flat(a), flat(b))


def test_before_the_first_epoch_there_is_nothing_to_save():
    tie, net = SelfDistillation(size=60), small()
    assert SelfDistillation().state_dict() == tie.state_dict() == {}
    epochs(tie, net, 1)
    tie.load_state_dict({})
    assert tie.vote(None, torch.tensor([0])) is None


def test_states_of_another_form_are_refused_by_name():
    nets, outputs, net = SelfDistillation(), SelfDistillation(size=60), small()
    epochs(nets, net, 2)
    epochs(outputs, net, 2)
    for tie, state, words in [
        (SelfDistillation(size=60), nets.state_dict(), "kept.0.*kept outputs"),
        (SelfDistillation(), outputs.state_dict(), "kept.0.*copies of the network"),
        (SelfDistillation(), nets.state_dict(), "net is None"),
        (SelfDistillation(size=50), outputs.state_dict(), "60 outputs: size=50"),
        (SelfDistillation(teachers=1, size=60), outputs.state_dict(), "2 teachers: teachers=1"),
        (SelfDistillation(), {"lam": torch.ones(())}, "'lam'"),
    ]:
        with pytest.raises(ValueError, match=words):
            tie.load_state_dict(state)


@pytest.mark.parametrize("wrong", [torch.zeros(3, 40), (torch.zeros(3, 40),), {"x": 1}])
def test_a_batch_of_another_form_is_refused_by_name(wrong):
    with pytest.raises(ValueError, match=r"batch is a .* must be \(x, class\)"):
        SelfDistillation()(small(), wrong)
