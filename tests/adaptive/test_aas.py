"""AAS: the exact adversary against closed forms and its optimality conditions; the flow as a
density; samplers; residuals of exact solutions; training; the bed; errors."""

import math
import sys

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import nn

from diffkit.adaptive.aas import (
    AAS,
    PDE,
    PINN,
    RAD,
    RAR,
    BoxFlow,
    Domain,
    LinearBed,
    Peak,
    Uniform,
    aas_bed,
    best_density,
    laplacian,
    objective,
    solve,
)

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def cells(n):
    return (2 * np.arange(n) + 1) / n - 1


def shaken(domain, size=0.5, seed=0, **options):
    flow, g = BoxFlow(domain, **options), rng(seed)
    with torch.no_grad():
        for p in flow.parameters():
            p += size * torch.randn(p.shape, generator=g)
    return flow


# --- the exact adversary


def hill(x, beta):  # the answer to 1 + cos(pi x), by (5) to (7)
    if beta >= 1 / (2 * np.pi**2):
        return 1 + np.cos(np.pi * x) / (2 * beta * np.pi**2)
    width = lambda a: (
        2 * np.sin(np.pi * a) / np.pi**3
        - 2 * a * np.cos(np.pi * a) / np.pi**2
        - 2 * a * a * np.sin(np.pi * a) / (3 * np.pi)
    )
    a = brentq(lambda a: width(a) - 4 * beta, 1e-4, 1)
    rho = np.sin(np.pi * a) / (np.pi * a) * (x * x - a * a) / 2
    rho += (np.cos(np.pi * x) - np.cos(np.pi * a)) / np.pi**2
    return np.where(np.abs(x) <= a, rho, 0) / (2 * beta)


@pytest.mark.parametrize("beta", [2.0, 0.0507, 0.0506, 0.03, 1e-3])
@pytest.mark.parametrize("factor", [1.0, 1e-8])  # r^2 is divided by its mean
def test_adversary_by_formula(beta, factor):
    x = cells(400)
    got, want = best_density(factor * (1 + np.cos(np.pi * x)), beta), hill(x, beta)
    # second order in the width 0.005 of a cell, and an edge that is cut to a cell
    assert np.abs(got - want).max() < 1e-3 * want.max()


def test_adversary_in_two_dimensions():
    x = cells(40)
    wave = np.cos(np.pi * x)[:, None] * np.cos(np.pi * x)  # (4): divided by 2 beta 2 pi^2
    want = 1 + wave / (2 * 0.1 * 2 * np.pi**2)
    assert np.abs(best_density(1 + wave, 0.1) - want).max() < 1e-3
    alone = np.broadcast_to((1 + np.cos(np.pi * x))[:, None], (40, 30))
    got = best_density(alone, 0.02)
    assert np.abs(got - best_density(alone[:, 0], 0.02)[:, None]).max() < 1e-9


@pytest.mark.parametrize("beta", [1e-4, 3e-3, 0.3])
def test_adversary_meets_the_conditions_of_the_optimum(beta):
    r = np.random.default_rng(1).uniform(0, 1, (11, 8)) ** 5
    rho, lap = best_density(r, beta), np.zeros((11, 8))
    for axis, n in enumerate(r.shape):
        step = np.diff(rho, axis=axis) * (n / 2) ** 2
        pad = [(0, 0), (0, 0)]
        pad[axis] = (1, 1)
        lap += np.diff(np.pad(step, pad), axis=axis)
    level = 2 * beta * lap + r / r.mean()
    on = rho > 0
    assert rho.min() >= 0 and rho.mean() == pytest.approx(1, abs=1e-9)
    assert np.ptp(level[on]) < 1e-6 and (level[~on] <= level[on].mean() + 1e-6).all()
    assert on.all() == (beta == 0.3)


def test_adversary_at_its_limits():
    r = np.random.default_rng(2).uniform(0, 1, 50)
    assert np.abs(best_density(r, 1e7) - 1).max() < 1e-4
    point = best_density(r, 1e-12)
    assert point.argmax() == r.argmax() and point.max() == pytest.approx(50, rel=1e-6)
    for bad in (0, -1, math.nan, "a", None, True):
        with pytest.raises(ValueError, match="beta="):
            best_density(r, bad)
    for bad in (-r, r * np.nan, 0 * r, [1.0]):
        with pytest.raises(ValueError, match="r2"):
            best_density(bad, 0.1)


# --- the flow


@pytest.mark.parametrize("dim", [1, 2, 3, 10])
def test_flow_starts_uniform(dim):
    domain = Domain(dim, -3.0, 1.0)
    flow = BoxFlow(domain)
    x = flow.sample(200, rng())
    assert (x >= -3).all() and (x <= 1).all() and x.std(0).mean() == pytest.approx(1.155, abs=0.1)
    assert (flow.log_prob(x) + dim * math.log(4)).abs().max() < 1e-5


@pytest.mark.parametrize("dim", [2, 3, 4, 7])
def test_couplings_in_pairs_change_every_coordinate_once(dim):
    masks = BoxFlow(Domain(dim), couplings=4, hidden=2, bins=2).masks  # True: given
    for first, second in (masks[:2], masks[2:]):
        assert torch.equal(first, ~second)
        assert int(first.sum()) == math.ceil(dim / 2)  # the larger half is given first
    assert len(BoxFlow(Domain(1), couplings=4).masks) == 0  # no others to depend on


def test_sizes_of_the_flow_are_checked():
    for name, bad in (("bins", 1), ("bins", 2.5), ("hidden", 0), ("couplings", -1)):
        with pytest.raises(ValueError, match=f"{name}={bad}"):
            BoxFlow(Domain(2), **{name: bad})


def test_every_side_of_a_box_has_a_length():
    for lo, hi in (([0, 1], [1, 1]), ([2, 0], [1, 1]), (1, 1)):
        with pytest.raises(ValueError, match="lo=.*: must be below hi="):
            Domain(2, lo, hi)


def test_flow_is_a_density():
    flow = shaken(Domain(2, [0, -1], [2, 5]))
    t = torch.tensor(cells(300), dtype=torch.float32)
    x = flow.domain.box(torch.cartesian_prod(t, t))
    rho = flow.log_ratio(x).exp().detach()
    assert rho.std() > 0.3 and rho.mean().item() == pytest.approx(1, abs=2e-3)
    drawn = flow.domain.unit(flow.sample(20000, rng(1)))
    at = ((drawn + 1) * 2.5).long().clamp(0, 4) @ torch.tensor([5, 1])
    want = rho.view(5, 60, 5, 60).mean((1, 3)).flatten() * 800
    chi = ((torch.bincount(at, minlength=25) - want) ** 2 / want).sum()
    assert chi < 51  # the 0.999 quantile with 24 degrees of freedom


@pytest.mark.parametrize("dim", [1, 2, 7])
def test_flow_inverse_and_determinant(dim):
    flow = shaken(Domain(dim), copies=2).double()
    y = 2 * torch.rand(2, 30, dim, generator=rng(), dtype=F64) - 1
    z = flow.transform().inv(y)
    assert (flow.transform()(z) - y).abs().max() < 1e-9
    J = torch.autograd.functional.jacobian(flow.transform(), z[:, :1])
    for s in (0, 1):
        want = torch.linalg.slogdet(J[s, 0, :, s, 0])[1]
        got = flow.transform().call_and_ladj(z)[1][s, 0]
        assert got.item() == pytest.approx(want.item(), abs=1e-8)


def test_objective_against_quadrature():
    flow, by = shaken(Domain(2), 0.2, seed=5), shaken(Domain(2), 0.3, seed=6)
    t = torch.tensor(cells(300), dtype=torch.float32)
    plane = torch.cartesian_prod(t, t)
    r2 = lambda v: 7 * ((1 + v[:, 0]) ** 2 + v[:, 1] ** 2)
    rho = flow.log_ratio(plane).exp().detach().view(300, 300).numpy()
    slope = sum((np.diff(rho, axis=a) ** 2).mean() * 150**2 for a in (0, 1))
    r = r2(plane).numpy()
    pull = (r * rho.ravel()).mean() / r.mean()
    x = by.sample(40000, rng(2))
    ratio = by.log_ratio(x).exp().detach()
    a, b = (objective(flow, x, r2(x), ratio, beta).item() for beta in (0.0, 1.0))
    assert a == pytest.approx(pull, abs=0.03)  # three to four standard errors
    assert a - b == pytest.approx(slope, rel=0.1)
    wide = shaken(Domain(2, -3, 3), 0.2, seed=5)  # scaled coordinates: the box is no matter
    again = objective(wide, 3 * x, r2(x), ratio, 1.0).item()
    assert again == pytest.approx(b, rel=1e-3)


def test_zuko_is_named_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "zuko", None)
    with pytest.raises(ImportError, match=r"diffkit\[adaptive\]"):
        BoxFlow(Domain(2))


# --- samplers


def test_flow_finds_the_exact_density():
    sampler = AAS(Domain(1), 0.1, lr=0.03, seed=1)
    for _ in range(40):
        x = sampler.points(300)
        sampler.update(x, 3 * (1 + torch.cos(math.pi * x[:, 0])))
    t = torch.tensor(cells(200), dtype=torch.float32)[None, :, None]
    got = sampler.flow.log_ratio(t)[0].exp().detach().numpy()
    # noise of 300 points: 5 % or so; uniform points would be off by 36 %
    assert np.sqrt(np.mean((got - hill(cells(200), 0.1)) ** 2)) < 0.12


def test_large_beta_keeps_the_flow_uniform():
    x = (sampler := AAS(Domain(2), 1e4, mix=0.0)).points(200)
    for _ in range(5):
        sampler.update(x, (x[:, 0] > 0.5).float())
        x = sampler.points(200)
    small = AAS(Domain(2), 1e-3, mix=0.0)
    for _ in range(5):
        x = small.points(200)
        small.update(x, (x[:, 0] > 0.5).float())
    spread = lambda s: s.flow.log_ratio(s.domain.uniform_points[None]).std()
    for s in (sampler, small):
        s.domain.uniform_points = 2 * torch.rand(300, 2, generator=rng()) - 1
    assert spread(sampler) < 0.2 * spread(small)


def test_guard_holds_the_weights():
    def end(guard):
        sampler = AAS(Domain(2), 0.0, lr=0.3, ascents=20, mix=0.0, guard=guard)
        x = sampler.points(50)
        before = sampler.flow.log_ratio(x[None])
        sampler.update(x, (-50 * (x - x[0]).square().sum(1)).exp())
        w = (sampler.flow.log_ratio(x[None]) - before)[0].exp()
        return (w.sum() ** 2 / w.square().sum() / 50).item()

    assert end(0.5) > 0.5 > end(0.0)


def test_weights_on_a_disc_and_with_a_uniform_share():
    disc = Domain(2, distance=lambda v: v.norm(dim=-1) - 1)
    sampler = AAS(disc, mix=0.3, copies=2, seed=2)
    with torch.no_grad():
        sampler.flow.each += 0.4 * torch.randn(sampler.flow.each.shape, generator=rng(1))
    x = sampler.points(5000)
    assert x.shape == (2, 5000, 2) and (x.norm(dim=-1) <= 1).all()
    assert (sampler.ok.sum(-1) == 5000).all() and (sampler.ratio >= 0.3 * 0.7).all()
    # means over the box of 1 and of the disc; standard errors below 0.015
    assert (1 / sampler.ratio).mean(-1).numpy() == pytest.approx(1, abs=0.05)
    assert (sampler.ok / sampler.ratio).mean(-1).numpy() == pytest.approx(math.pi / 4, abs=0.05)
    sampler.update(x, torch.ones(2, 5000))
    x = Uniform(disc, seed=1).points(4000)
    assert x.square().sum(-1).mean().item() == pytest.approx(0.5, abs=0.02)


def test_rad_draws_by_the_residual():
    for k, c, want in ((1.0, 0.0, 1 / 3), (2.0, 0.0, 1 / 2), (1.0, 1.0, 1 / 6), (0.0, 0.0, 0.0)):
        sampler = RAD(Domain(1), k, c, times=50, seed=3)
        x = sampler.pool(1000)
        sampler.update(x, (1 + x[:, 0]) ** 2)  # |r| = 1 + x
        assert sampler.points(1000).mean().item() == pytest.approx(want, abs=0.06)


def test_rar_takes_the_largest():
    sampler = RAR(Domain(2), copies=2)
    x = sampler.pool(10)
    sampler.update(x, x[..., 0].exp())
    assert x.shape == (2, 100, 2)
    assert torch.equal(sampler.points(7)[..., 0], x[..., 0].sort(descending=True)[0][:, :7])


@pytest.mark.parametrize("kind", [Uniform, RAD, RAR, AAS])
def test_copies_seeds_and_shapes(kind):
    for copies, shape in ((None, (8, 3)), (2, (2, 8, 3))):
        a, b = (kind(Domain(3, 0, 4), copies=copies, seed=5) for _ in range(2))
        for s in (a, b):
            s.points(8)
            p = s.pool(8)
            if p is not None:
                s.update(p, p.sum(-1))
        x = a.points(8)
        assert x.shape == shape and torch.equal(x, b.points(8))
        assert (x >= 0).all() and (x <= 4).all()


def test_bad_input_of_samplers():
    D = Domain(2)
    for name, bad in (("beta", -1), ("lr", 0), ("ascents", 0), ("mix", 1.5), ("guard", 2)):
        for value in (bad, "a", None, math.nan, [1]):
            with pytest.raises(ValueError, match=f"{name}="):
                AAS(D, **{name: value})
    for name, bad in (("k", -1), ("c", -1), ("times", 0)):
        with pytest.raises(ValueError, match=f"{name}="):
            RAD(D, **{name: bad})
    with pytest.raises(TypeError, match="domain="):
        Uniform("box")
    with pytest.raises(TypeError, match="unexpected keyword"):
        AAS(D, betta=1.0)
    sampler = AAS(D)
    x = sampler.points(5)
    for r2 in (torch.ones(4), torch.ones(5, 1), -torch.ones(5), torch.full((5,), math.nan)):
        with pytest.raises(ValueError, match="r2"):
            sampler.update(x, r2)
    with pytest.raises(ValueError, match="pool"):
        sampler.update(x + 0.01 * (x < 0), torch.ones(5))
    with pytest.raises(ValueError, match="x: must lie in the box"):
        sampler.flow.log_ratio(torch.full((1, 3, 2), 1.5))
    disc = Domain(2, distance=lambda v: v.norm(dim=-1) - 0.5)
    with pytest.raises(ValueError, match="outside"):
        Uniform(disc).update(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(ValueError, match="distance"):
        Uniform(Domain(2, distance=lambda v: v.norm(dim=-1) + 1)).points(4)
    with pytest.raises(ValueError, match="lo="):
        Domain(2, 1, 1)
    with pytest.raises(ValueError, match="hi="):
        Domain(2, -1, [1, 1, 1])
    with pytest.raises(ValueError, match="dim="):
        Domain(0)


# --- networks and equations


@pytest.mark.parametrize("dim,depth", [(1, 1), (2, 2), (5, 3)])
def test_laplacian_in_one_pass(dim, depth):
    net = PINN(dim, 8, depth, seed=2).double()
    x = 2 * torch.rand(6, dim, generator=rng(), dtype=F64) - 1

    class Foreign(nn.Module):
        def forward(self, v):
            return net(v)[:, None]

    for got, want in zip(net.with_laplacian(x), laplacian(Foreign(), x)):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dim,K,cubic", [(2, 60.0, False), (2, 20.0, True), (10, 1.0, True)])
def test_exact_solution_leaves_no_residual(dim, K, cubic):
    pde = Peak(dim, K, 0.2, cubic)
    x = 2 * torch.rand(30, dim, generator=rng(), dtype=F64) - 1
    assert pde.residual(*laplacian(pde.exact, x), x).abs().max() < 1e-8
    assert pde.residual(*laplacian(lambda v: 1.1 * pde.exact(v), x), x).abs().max() > 1e-4
    assert pde.error(pde.exact).item() == 0
    assert pde.error(lambda v: 0.9 * pde.exact(v)).item() == pytest.approx(0.1, rel=1e-4)
    at, value = pde.edge(50, rng())
    assert (at.abs().amax(-1) == 1).all() and torch.equal(value, pde.exact(at))


def test_error_is_over_the_box():
    pde = Peak(2, 20.0)
    t = torch.tensor(cells(400), dtype=torch.float32)
    x = torch.cartesian_prod(t, t)
    one = lambda v: pde.exact(v) + 0.1 * v[:, 0]
    want = (0.1 * x[:, 0]).square().mean() / pde.exact(x).square().mean()
    assert pde.error(one, 40000).item() == pytest.approx(want.sqrt().item(), rel=0.05)


# --- training


class Still(Uniform):  # the same points for all
    def points(self, n):
        x = 2 * torch.rand(n, self.domain.dim, generator=rng(n)) - 1
        return x if self.copies is None else x.expand(self.copies, -1, -1)


def test_copies_train_as_if_alone():
    both = PINN(2, 6, copies=2, seed=1)
    alone = PINN(2, 6)
    for mine, all_ in zip(alone.parameters(), both.parameters()):
        mine.data.copy_(all_.data[1:])
    pde = Peak()
    solve(both, pde, Still(pde.domain, copies=2), 10)
    solve(alone, pde, Still(pde.domain), 10)
    for mine, all_ in zip(alone.parameters(), both.parameters()):
        torch.testing.assert_close(mine, all_[1:], rtol=1e-4, atol=1e-5)


def test_books_of_solve():
    pde = Peak()
    run = lambda s: solve(PINN(2, 4), pde, s, 10, points=8, resample=4)
    h = run(Uniform(pde.domain))
    assert h.evaluations == 80 and len(h.stages) == 3 and h.steps == [4, 8, 10]
    assert run(RAD(pde.domain)).evaluations == 80 + 2 * 80
    assert run(AAS(pde.domain)).evaluations == 80 + 2 * 8
    grown = run(RAR(pde.domain))
    assert [len(v) for v in grown.stages] == [4, 6, 8]
    assert grown.evaluations == 4 * 4 + 4 * 6 + 2 * 8 + 2 * 20


def test_a_network_and_an_equation_of_ones_own():
    right = lambda u, grad, lap, x: -lap - math.pi**2 * torch.sin(math.pi * x[:, 0])
    pde = PDE(Domain(1), right, lambda x: 0 * x[:, 0], scale=10.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    h = solve(net, pde, AAS(pde.domain, 0.1), 250, points=32, resample=50, boundary=4)
    x = torch.linspace(-1, 1, 50)[:, None]
    assert h.errors == []
    assert (net(x)[:, 0] - torch.sin(math.pi * x[:, 0])).square().mean() < 0.05  # of u = 0: 0.5


def test_a_disc():
    disc = Domain(2, distance=lambda x: x.norm(dim=-1) - 1)

    def circle(n, g):
        t = math.tau * torch.rand(n, generator=g)
        return torch.stack([t.cos(), t.sin()], -1)

    pde = PDE(disc, lambda u, grad, lap, x: -lap - 1, lambda x: 0 * x[:, 0], circle)
    h = solve(PINN(2, spread=1.0), pde, AAS(disc), 150)
    x = Uniform(disc).points(300)
    u = (1 - x.square().sum(-1)) / 4
    assert (h.net(x) - u).square().mean() < 0.05 * u.square().mean()
    with pytest.raises(ValueError, match="boundary=None"):
        PDE(disc, pde.residual, pde.value)
    with pytest.raises(TypeError, match="value="):
        PDE(Domain(2), pde.residual, 0.0)


def test_solve_refuses():
    pde = Peak()

    class Wide(Peak):
        def residual(self, u, grad, lap, x):
            return u[:, None]

    class Nan(Peak):
        def residual(self, u, grad, lap, x):
            return u * math.nan

    with pytest.raises(ValueError, match="residual has shape"):
        solve(PINN(2), Wide(), Uniform(pde.domain), 2)
    with pytest.raises(ValueError, match="not finite"):
        solve(PINN(2), Nan(), Uniform(pde.domain), 2)
    with pytest.raises(ValueError, match="copies"):
        solve(PINN(2, copies=2), pde, Uniform(pde.domain), 2)
    for name in ("steps", "points", "resample"):
        for bad in (0, 1.5, "a", None):
            with pytest.raises(ValueError, match=f"{name}="):
                solve(PINN(2), pde, Uniform(pde.domain), **{name: bad})
    with pytest.raises(TypeError, match="unexpected keyword"):
        solve(PINN(2), pde, Uniform(pde.domain), stepz=3)


column = lambda x: x[:, :1]  # (n, 1), which would be spread to (n, n)
plain = lambda u, grad, lap, x: -lap


class Column(Peak):
    def exact(self, x):
        return super().exact(x)[..., None]


D2 = Domain(2)


@pytest.mark.parametrize(
    "call,error,says",
    [
        (lambda: solve(PINN(2), PDE(D2, plain, column), Uniform(D2), 2), ValueError, "value has"),
        (
            lambda: solve(PINN(2), PDE(D2, plain, lambda x: 0.0), Uniform(D2), 2),
            ValueError,
            r"value has shape float: must be \(50,\)",
        ),
        (
            lambda: PDE(D2, plain, column, lambda n, g: torch.ones(n)).edge(3, rng()),
            ValueError,
            "boundary has",
        ),  # fmt: skip
        (lambda: Column().error(PINN(2)), ValueError, "exact has shape"),
        (lambda: Domain(2, distance=lambda x: x.norm(dim=-1) < 1), TypeError, "gave truth values"),
        (lambda: Domain(2, distance=lambda x: 0.0), TypeError, "distance gave float"),
        (lambda: Domain(2, distance=lambda x: x), ValueError, "distance has shape"),
        (lambda: solve(PINN(2), Peak(), Uniform(Domain(2, 0))), ValueError, "sampler.domain"),
        (lambda: solve(PINN(2), Peak(), Uniform(Domain(3))), ValueError, "sampler.domain"),
        (lambda: solve(PINN(3), Peak(), Uniform(D2)), ValueError, "net takes 3 coordinates"),
        (lambda: solve(PINN, Peak(), Uniform(D2)), TypeError, "net=the class PINN"),
        (lambda: solve(PINN(2), Peak, Uniform(D2)), TypeError, "pde=the class Peak"),
        (lambda: solve(PINN(2), Peak(), AAS), TypeError, "sampler=the class AAS"),
        (lambda: PDE(Domain), TypeError, "domain=the class Domain"),
    ],
)
def test_shapes_and_domains_that_do_not_fit(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("kind", [AAS, RAD, RAR])
def test_a_residual_may_take_derivatives_itself(kind):
    net, own = (PINN(2, copies=2, seed=1) for _ in range(2))

    def bend(u, grad, lap, x):  # the Laplacian of u = net(x), by autograd
        assert not x.requires_grad
        x = x.requires_grad_()
        first = torch.autograd.grad(own(x).sum(), x, create_graph=True)[0]
        each = [torch.autograd.grad(first[..., i].sum(), x, create_graph=True)[0][..., i]
                for i in (0, 1)]  # fmt: skip
        return -sum(each) - 1

    def run(net, residual):
        pde = PDE(D2, residual, lambda x: 0 * x[:, 0])
        return solve(net, pde, kind(D2, copies=2), 6, points=8, resample=2, boundary=4)

    a, b = run(own, bend), run(net, lambda u, grad, lap, x: -lap - 1)
    assert not a.x.requires_grad and a.x.shape == b.x.shape
    assert (a.x - b.x).abs().max() < 1e-4  # rounding alone tells the two Laplacians apart
    x = torch.rand(2, 5, 2)
    assert (own(x) - net(x)).abs().max() < 1e-3


# --- the bed


def test_bed_operator_and_error():
    b = LinearBed(2, [0, 1])
    x = torch.rand(2, 4, 2, generator=rng(), dtype=F64) - 0.5
    one = lambda v: torch.exp(-b.K * (v - b.centers[1, 7]).square().sum(-1))
    u, _, lap = laplacian(one, x[1])
    torch.testing.assert_close(b.operator(x, b.centers)[1, :, 7], (u - lap) / b.K)
    assert b.error(torch.zeros(2, 196, 1, dtype=F64)) == pytest.approx(1)
    w = b.fit(x, 1e-3)
    assert (b.error(w) > b.best()).all()
    b.truth = b.centers[:, 50:51]
    assert b.best().max() < 1e-3
    some = b.r2(x, torch.eye(196, dtype=F64)[None, :, 50:51].expand(2, -1, -1))
    assert some.max() < 1e-20


def test_bed_orders_its_methods():
    found = aas_bed(2, range(70, 76))
    assert set(found) == {"uniform", "RAD", "RAR", "AAS", "oracle"}
    for name in ("uniform", "RAD", "RAR", "AAS"):
        assert (found[name] > found["oracle"]).all()
    assert found["AAS"].mean() < 0.9 * found["uniform"].mean()
    with pytest.raises(ValueError, match="dim=3"):
        aas_bed(3, [0])
