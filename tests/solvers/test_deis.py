"""DEIS against diffusers and azula on the same grids, as a diffusers scheduler, on every
process, and bad input."""

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffkit.core.adapters import DiffusersScheduler
from diffkit.core.data import four_gaussians
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, Prediction, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Node, exact_flow, rms, sample
from diffkit.solvers.deis import (
    CLOCKS,
    FORMS,
    TABLEAUX,
    DEIS,
    RhoRK,
    deis_coefficients,
    lagrange_integrals,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from resampled import resampled

# from diffusers
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")
P = Discrete()
BED = MixtureDenoiser(four_gaussians(), P)
X = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PROCESSES = {type(p).__name__: p for p in (VP(), Cosine(), Discrete(), Flow(), EDM(), VE())}


def run(solver, grid, d=BED, x=X, **kw):
    return sample(d, solver, x, grid, progress=False, **kw)


@pytest.mark.parametrize("n", [8, 14, 20, 50])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_equal_to_diffusers(order, n):
    from diffusers import DEISMultistepScheduler

    for low in (False, True):
        s = DEISMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, solver_order=order, lower_order_final=low
        )
        s.set_timesteps(n)
        grid = time_grid(P, n, "linspace")
        # the same grid to all digits: theirs is a float32 product of a thousand factors
        s.sigmas = P.sigma(grid) / P.alpha(grid)
        y = X[..., None, None]
        for t in s.timesteps:
            y = s.step(
                BED(y[..., 0, 0], (t.item() + 1) / 1000).eps[..., None, None], t, y
            ).prev_sample
        # diffusers lowers below 15 steps only
        mine = DEIS(order, "log_rho", lower_order_final=low and n < 15)
        torch.testing.assert_close(run(mine, grid), y[..., 0, 0].double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["log_snr", "quadratic", "uniform"])
@pytest.mark.parametrize("order", [2, 3, 4])
@pytest.mark.parametrize(
    "name,basis,form",
    [
        ("zAB", "rho", "eps"),
        ("vAB", "flow", "flow"),
        ("zEAB", "log_rho", "eps"),
        ("xEAB", "log_rho", "x0"),
    ],
)
def test_equal_to_azula(name, basis, form, order, spacing):
    denoise, samplers = (pytest.importorskip("azula." + m) for m in ("denoise", "sample"))

    class Net(denoise.Denoiser):
        def __init__(self):
            super().__init__()
            self.schedule = lambda t: (P.alpha(t), P.sigma(t))

        def forward(self, x, t, **kwargs):
            return denoise.DiracPosterior(mean=BED(x, t.item()).x0)

    grid = time_grid(P, 10, spacing)
    peer = type(
        name, (getattr(samplers, name + "Sampler"),), {"timesteps": property(lambda self: grid)}
    )(Net(), steps=10, silent=True, order=order)
    y = run(DEIS(order, basis, form, max_gain=None), grid)
    # its Vandermonde systems lose some digits
    torch.testing.assert_close(y, peer(X), rtol=1e-7, atol=1e-7 * max(1.0, y.abs().max().item()))


@pytest.mark.parametrize("basis", CLOCKS)
def test_both_doors(basis):
    for like in ({}, {"final": "sigma_min"}):
        s = DiffusersScheduler(
            DEIS(4, basis),
            beta_start=1e-4,
            beta_end=0.02,
            beta_schedule="linear",
            timestep_spacing="linspace",
            **like,
        )
        s.set_timesteps(12)
        y = X
        for t in s.timesteps:
            y = s.step(BED(y, (t.item() + 1) / 1000).eps, t, y).prev_sample
        torch.testing.assert_close(y, run(DEIS(4, basis), s.grid), rtol=1e-5, atol=1e-5)
        assert s.from_config(s.config).solver.config() == DEIS(4, basis).config()


@pytest.mark.parametrize("name", PROCESSES)
@pytest.mark.parametrize("basis", CLOCKS)
def test_converges_on_every_process(basis, name):
    p = PROCESSES[name]
    d, x, end = MixtureDenoiser(four_gaussians(), p), p.sigma(p.t_max) * X, max(p.t_min, 1e-3)
    truth = exact_flow(d, None, x, p.t_max, end, rtol=1e-8, atol=1e-10)
    e = [
        rms(run(DEIS(3, basis), time_grid(p, n, "log_snr", p.t_max, end), d, x), truth)
        for n in (30, 60)
    ]
    # order 3 divides by 8, less where the regime is not reached
    assert e[1] < e[0] / 3.5 and e[1] < 0.03, e


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(0.02, 0.98), min_size=6, max_size=6, unique=True),
    st.sampled_from(sorted(PROCESSES)),
    st.sampled_from(sorted(CLOCKS)),
    st.sampled_from(sorted(FORMS)),
    st.integers(1, 4),
)
def test_polynomials_are_integrated_on_any_grid(times, name, basis, form, k):
    ts = sorted(times, reverse=True)
    # nodes that nearly coincide lose digits, which is not what is tested
    if min(a - b for a, b in zip(ts, ts[1:])) < 0.02:
        return
    p, f = PROCESSES[name], FORMS[form]
    nodes, target = (
        ([Node.at(p, t) for t in ts[4 : 4 - k : -1]] if k > 1 else [Node.at(p, ts[4])]),
        Node.at(p, ts[5]),
    )
    c = lagrange_integrals(p, nodes, target, basis, form)
    u = lambda lam: CLOCKS[basis](lam, p)
    # tested against adaptive quadrature in the notebook: 60 points don't see its kinks
    if basis == "t" and p.n_train:
        return
    z, w = (torch.from_numpy(v) for v in np.polynomial.legendre.leggauss(60))
    lam = nodes[0].lam + (z + 1) / 2 * (target.lam - nodes[0].lam)
    for n in range(k):  # the integral of u^n, centred and scaled
        mid, scale = u(nodes[0].lam), u(target.lam) - u(nodes[0].lam)
        want = (
            w / 2 * (target.lam - nodes[0].lam) * f.rate(lam) * ((u(lam) - mid) / scale) ** n
        ).sum()
        got = sum(cj * ((u(v.lam) - mid) / scale) ** n for cj, v in zip(c, nodes))
        size = (
            sum((cj * ((u(v.lam) - mid) / scale) ** n).abs() for cj, v in zip(c, nodes))
            + want.abs()
        )
        assert abs(got - want) <= 1e-9 * size


def test_closed_form_of_two_nodes_in_log_rho():
    a, b, s = (Node.at(VP(), t) for t in (0.4, 0.5, 0.3))
    rho, l = (lambda v: v.sigma / v.alpha), (lambda v: -v.lam)
    G = lambda r, l0, l1: r * (r.log() - l1 - 1) / (l0 - l1)
    want = torch.stack(
        [
            G(rho(s), l(a), l(b)) - G(rho(a), l(a), l(b)),
            G(rho(s), l(b), l(a)) - G(rho(a), l(b), l(a)),
        ]
    )
    torch.testing.assert_close(
        lagrange_integrals(VP(), [a, b], s, "log_rho"), want, rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("form", ["eps", "x0"])
@pytest.mark.parametrize(
    "lams",
    [
        (59.0, 58.0, 61.5),
        (60.0, 58.0, 62.0),
        (63.0, 61.0, 64.0),
        (-58.5, -59.5, 59.5),
        (-61.0, -63.0, -58.0),
        (-64.0, -65.0, -63.0),
    ],
)
def test_the_closed_form_holds_at_any_log_snr(lams, form):
    """All in one call and each alone: two nodes, the clock log rho, and steps that begin or end
    beyond log_snr 60 in size, where exp is still far from its limits."""
    sign = 1 if form == "x0" else -1  # then q is exp(sign log_snr)
    node = lambda v: Node(v, torch.sigmoid(2 * v).sqrt(), torch.sigmoid(-2 * v).sqrt(), v)
    for at in (lams, (lams, (1.0, 0.5, 1.5))):
        at = torch.tensor(at, dtype=torch.float64)
        u, v, end = sign * at[..., 0], sign * at[..., 1], sign * at[..., 2]
        G = lambda r, l0, l1: r.exp() * (r - l1 - 1) / (l0 - l1)
        want = torch.stack([G(end, u, v) - G(u, u, v), G(end, v, u) - G(u, v, u)], -1)
        a, b, s = map(node, at.unbind(-1))
        got = lagrange_integrals(VP(), [a, b], s, "log_rho", form)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)


def test_equal_steps_in_rho_are_adams_bashforth():
    p = EDM()
    grid = p.time(-torch.linspace(8.0, 1.0, 8, dtype=torch.float64).log())
    c = deis_coefficients(p, grid, 4, "rho")
    torch.testing.assert_close(
        c[3:],
        -torch.tensor([55.0, -59.0, 37.0, -9.0], dtype=torch.float64).expand(4, 4) / 24,
        rtol=1e-10,
        atol=1e-10,
    )


def test_coefficients_agree_with_the_solver():
    grid = time_grid(VP(), 9, "quadratic")
    for basis in CLOCKS:
        s = DEIS(3, basis, max_gain=None)
        s.start(VP(), grid)
        c, S = deis_coefficients(VP(), grid, 3, basis), FORMS[s.kind].S(Node.at(VP(), grid[1:]))
        for i, r in enumerate(s.rows):
            torch.testing.assert_close(
                torch.tensor(r.b, dtype=torch.float64), c[i, : len(r.b)] * S[i]
            )


def test_one_gaussian_is_solved():
    one = MixtureDenoiser(type(four_gaussians())([[0.5, -1.0]], scales=0.4), VP())
    v = lambda t: VP().alpha(t) ** 2 * 0.16 + VP().sigma(t) ** 2
    want = VP().alpha(1e-3) * torch.tensor([0.5, -1.0], dtype=torch.float64) + (
        v(1e-3) / v(1.0)
    ).sqrt() * (X - VP().alpha(1.0) * torch.tensor([0.5, -1.0], dtype=torch.float64))
    for basis in CLOCKS:
        assert rms(run(DEIS(4, basis), time_grid(VP(), 60, "quadratic"), one), want) < 1e-4


def test_cost_is_what_evals_says():
    for s in [DEIS(4, b) for b in CLOCKS] + [RhoRK(t) for t in TABLEAUX]:
        with count_evals(BED) as n:
            run(s, time_grid(P, 7))
        assert n.calls == s.evals(7), s


def test_times_of_their_own_per_sample():
    grid = torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=torch.float64)
    for basis in CLOCKS:
        s = DEIS(3, basis)
        want = run(s, grid)
        s.start(P, grid)
        y = X
        for t, u in zip(grid.tolist(), grid.tolist()[1:]):
            y = s.step(
                lambda x, t: BED(x, t),
                y,
                torch.full((16,), t, dtype=torch.float64),
                torch.full((16,), u, dtype=torch.float64),
            )
        torch.testing.assert_close(y, want, rtol=1e-9, atol=1e-9)


def test_a_solver_can_be_used_twice_and_reindexed():
    grid = time_grid(P, 9)
    for s in (DEIS(4), DEIS(3, "flow", max_gain=4.0)):
        a, b = (run(s, grid) for _ in range(2))
        assert torch.equal(a, b)  # nothing of the first trajectory is left
        run(s, time_grid(P, 5, "log_snr"))
        assert torch.equal(run(s, grid), a)  # nor of another grid
        idx = torch.tensor([3, 3, 0])
        torch.testing.assert_close(resampled(s, BED, X, grid, 4, idx), a[idx])


class Rough(Denoiser):
    "Predictions that are 0 but for one step, where they are 1: what a row does to an error."

    def __init__(self, at):
        super().__init__()
        self.process, self.at, self.calls = VP(), at, 0

    def forward(self, x, t):
        self.calls += 1
        return Prediction.of(
            x, t, self.process, eps=torch.full_like(x, float(self.calls - 1 == self.at))
        )


def test_the_gain_limits_what_an_error_does():
    # uniform in time: log rho of order 4 extrapolates far in the last step
    grid = time_grid(VP(), 10)
    rho = VP().sigma(grid) / VP().alpha(grid)
    for cap in (None, 3.0, 1.0):
        out = (
            torch.stack(
                [
                    run(
                        DEIS(4, "log_rho", max_gain=cap),
                        grid,
                        Rough(i),
                        torch.zeros(1, 1, dtype=torch.float64),
                    )
                    for i in range(6, 10)
                ]
            )
            .abs()
            .sum()
        )
        bound = VP().alpha(1e-3) * (rho[6] - rho[-1])  # what DDIM makes of it, at most
        if cap is None:
            assert out > 5 * bound
        if cap == 1:
            assert out <= bound + 1e-12
        if cap == 3:
            assert out <= 3 * bound


def test_the_default_leaves_sound_rows_alone_and_catches_wild_ones():
    gain = lambda s: max(sum(map(abs, r.b)) / abs(sum(r.b)) for r in s.rows)
    for p in PROCESSES.values():
        for spacing in ("uniform", "quadratic", "log_snr"):
            for n in (5, 10, 20, 50):
                for basis in CLOCKS:
                    s, free, grid = (
                        DEIS(4, basis),
                        DEIS(4, basis, max_gain=None),
                        time_grid(p, n, spacing, p.t_max, max(p.t_min, 1e-3)),
                    )
                    s.start(p, grid)
                    free.start(p, grid)
                    assert gain(s) <= 30 * (1 + 1e-6)
                    # the paper's method on its own grids
                    if basis == "t" and spacing in ("uniform", "quadratic"):
                        assert s.rows == free.rows
    wild = DEIS(4, max_gain=None)
    wild.start(Flow(), time_grid(Flow(), 10, "log_snr", 0.999))
    assert gain(wild) > 500
    p = EDM()
    even = p.time(-torch.linspace(12.0, 1.0, 12, dtype=torch.float64).log())
    for order, want in ((2, 2), (3, 44 / 12), (4, 160 / 24), (5, 8816 / 720), (6, 32832 / 1440)):
        s = DEIS(order, "rho")
        s.start(p, even)
        # Adams-Bashforth
        assert s.orders[-1] == order and math.isclose(
            sum(map(abs, s.rows[-1].b)) / abs(sum(s.rows[-1].b)), want, rel_tol=1e-6
        )


def test_dtype_and_half_precision():
    for s in (DEIS(4), DEIS(3, "flow"), RhoRK("3kutta")):
        exact = run(s, time_grid(P, 20))
        assert (run(s, time_grid(P, 20), x=X.float()).double() - exact).abs().max() < 1e-4
        y = run(s, time_grid(P, 20), x=X.bfloat16())
        assert y.dtype == torch.bfloat16 and (y.double() - exact).abs().max() < 0.2


def test_gradients_flow():
    x = X.clone().requires_grad_()
    (g,) = torch.autograd.grad(run(DEIS(3, "flow"), time_grid(P, 6), x=x, grad=True).sum(), x)
    d = torch.randn(X.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-6
    fd = (
        run(DEIS(3, "flow"), time_grid(P, 6), x=X + h * d).sum()
        - run(DEIS(3, "flow"), time_grid(P, 6), x=X - h * d).sum()
    ) / (2 * h)
    assert math.isclose((g * d).sum().item(), fd.item(), rel_tol=1e-5)


def test_exact_ends():
    for name, p in PROCESSES.items():
        if p.sigma(0.0) > 0:
            continue
        d = MixtureDenoiser(four_gaussians(), p)
        for s in [DEIS(4, b, f) for b in CLOCKS for f in FORMS] + [
            RhoRK(t, f) for t in ("2heun", "4rk") for f in FORMS
        ]:
            assert torch.isfinite(run(s, time_grid(p, 6, end=0.0, start=p.t_max), d)).all(), (
                name,
                s,
            )
    d = MixtureDenoiser(four_gaussians(), Flow())
    # alpha = 0 at the start
    for s in (
        DEIS(4, "flow"),
        DEIS(4, "t", "flow"),
        DEIS(4, "t", "x0"),
        RhoRK("4rk", "flow"),
        RhoRK(),
    ):
        assert torch.isfinite(run(s, time_grid(Flow(), 6), d)).all()
    for basis, form in (
        ("t", "eps"),
        ("rho", "eps"),
        ("log_rho", "eps"),
        ("log_rho", "flow"),
        ("rho", "x0"),
    ):
        with pytest.raises(ValueError, match="use basis='flow'"):
            run(DEIS(2, basis, form), time_grid(Flow(), 6), d)


def test_limits():
    grid = time_grid(P, 12, "quadratic")
    for f in FORMS:
        torch.testing.assert_close(run(DEIS(4, "t", f, max_gain=1.0), grid), run(DDIM(), grid))
        torch.testing.assert_close(run(DEIS(1, "rho", f), grid), run(DDIM(), grid))
    torch.testing.assert_close(
        run(DEIS(3, "log_rho", "x0"), grid),
        run(DPMSolverPP(3, "taylor", lower_order_final=False), grid),
        rtol=1e-9,
        atol=1e-9,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # fewer steps than the order
        for n in (1, 2, 3):
            torch.testing.assert_close(run(DEIS(6), time_grid(P, n)), run(DEIS(n), time_grid(P, n)))


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: DEIS(7), "from 1 to 6"),
        (lambda: DEIS(0), "got 0"),
        (lambda: DEIS("4"), "got '4'"),
        (lambda: DEIS(True), "got True"),
        (lambda: DEIS(2.5), "got 2.5"),
        (lambda: DEIS(2.0), "got 2.0"),
        (lambda: DEIS(basis="logrho"), "t, rho, log_rho, flow"),
        (lambda: DEIS(form="score"), "eps, flow, x0"),
        (lambda: DEIS(lower_order_final="end"), "'end'"),
        (lambda: DEIS(max_gain=0.0), "got 0.0"),
        (lambda: DEIS(max_gain=math.nan), "nan"),
        (lambda: RhoRK("rk4"), "2heun"),
        (lambda: RhoRK(form="rho"), "'rho'"),
        (lambda: deis_coefficients(P, [0.9, 0.5, 0.5]), "strictly decreasing"),
        (lambda: deis_coefficients(P, [1.5, 0.5]), "[0, 1]"),
        (lambda: deis_coefficients(P, [[0.9, 0.5]]), "one-dimensional"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError) as e:
        make()
    assert message in str(e.value)


@pytest.mark.parametrize("form", ["eps", "x0", "flow"])
def test_one_stage_is_ddim(form):
    d = MixtureDenoiser(four_gaussians(), VP())
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = time_grid(VP(), 7)
    go = lambda s: sample(d, s, x, grid, progress=False)
    torch.testing.assert_close(go(RhoRK("1euler", form)), go(DDIM()))
    assert RhoRK("1euler").evals(7) == 7
