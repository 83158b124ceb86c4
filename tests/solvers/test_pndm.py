"""PNDM against diffusers on the same grid and network values, on every process, through both
doors, and with bad input."""

import warnings
from functools import cache

import pytest
import torch

from diffkit.core.data import four_gaussians, ring
from diffkit.core.denoiser import MixtureDenoiser, cfg, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, exact_flow, rms, sample
from diffkit.solvers.pndm import PLMS, PNDM, ClassicalAB, PseudoRK, ab_coefficients, transfer
from resampled import resampled

P = Discrete()
BED = MixtureDenoiser(four_gaussians(), P)
X = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
PROCESSES = [VP(), Cosine(), Discrete(), Flow(), EDM(), VE()]
SOLVERS = [
    PLMS(),
    PLMS(2),
    PNDM(),
    PNDM(2),
    PNDM(3),
    PNDM(4, "euler"),
    PNDM(4, middle="rho"),
    PseudoRK(),
    PseudoRK(2),
    PseudoRK(4, "rho"),
    ClassicalAB(),
    ClassicalAB(2),
]


def run(solver, grid, d=BED, x=X, **kw):
    return sample(d, solver, x, grid, progress=False, **kw)


def peer(n, x, exact=True, **options):
    from diffusers import PNDMScheduler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = PNDMScheduler(beta_start=1e-4, beta_end=0.02, **options)
    if exact:  # the same table to all digits: theirs is a float32 product of a thousand factors
        s.alphas_cumprod = P.alpha((torch.arange(1000) + 1.0).double() / 1000) ** 2
        s.final_alpha_cumprod = (
            torch.tensor(1.0, dtype=torch.float64)
            if options.get("set_alpha_to_one")
            else s.alphas_cumprod[0]
        )
    s.set_timesteps(n)
    y = x[..., None, None]
    for t in s.timesteps:
        y = s.step(BED(y[..., 0, 0], (t.item() + 1) / 1000).eps[..., None, None], t, y).prev_sample
    return y[..., 0, 0], len(s.timesteps)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("n", [5, 10, 25])
def test_equal_to_diffusers(n, skip, to_one):
    mine, grid = (
        PNDM(4, "euler" if skip else "rk"),
        time_grid(P, n, "leading", offset=1, end=0.0 if to_one else 1e-3),
    )
    y, calls = peer(n, X, skip_prk_steps=skip, steps_offset=1, set_alpha_to_one=to_one)
    torch.testing.assert_close(y, run(mine, grid), rtol=0, atol=1e-12)
    assert calls == mine.evals(n)
    # as it comes
    rough, _ = peer(
        n, X.float(), exact=False, skip_prk_steps=skip, steps_offset=1, set_alpha_to_one=to_one
    )
    torch.testing.assert_close(
        rough.double(), run(mine, grid, x=X.float()).double(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("n", [8])
def test_odd_stride_differs_by_the_rounded_middle_only(n):
    grid = time_grid(P, n, "leading", offset=1, end=1e-3)
    gap = lambda skip: (
        (
            peer(n, X, skip_prk_steps=skip, steps_offset=1)[0]
            - run(PNDM(4, "euler" if skip else "rk"), grid)
        )
        .abs()
        .max()
        .item()
    )
    assert gap(True) < 1e-12 < gap(False) < 2e-3


def test_last_evaluation_of_the_peers_default_changes_nothing():
    y, calls = peer(10, X)
    torch.testing.assert_close(y, run(PNDM(), time_grid(P, 10, "leading")[:-1]), rtol=0, atol=1e-12)
    assert calls == PNDM().evals(9) + 1


@cache
def problem(process):
    d, end = MixtureDenoiser(four_gaussians(), process), max(process.t_min, 1e-3)
    # Runge-Kutta looks far ahead: not from where alpha is nearly 0
    start = 0.9 if process.t_max < 1 else 1.0
    x = process.sigma(start) * X
    return d, start, end, x, exact_flow(d, None, x, start, end, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_converges_on_every_process(solver, process):
    d, start, end, x, truth = problem(process)
    err = [
        rms(run(solver, time_grid(process, n, "log_snr", start, end), d, x), truth) for n in (8, 28)
    ]
    assert (
        err[0] > 2 * err[1]
        and err[1] < (0.3 if isinstance(solver, ClassicalAB) else 0.04)
        and torch.isfinite(
            run(solver, time_grid(process, 10, "log_snr", start, end), d, x.float())
        ).all()
    )


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_plms_runs_from_pure_noise_to_clean_data(order):
    for p in PROCESSES:
        d = MixtureDenoiser(four_gaussians(), p)
        # the loop looks at every state
        for n in (4, 9):
            assert torch.isfinite(
                y := run(PLMS(order), time_grid(p, n, end=0.0), d, p.sigma(1.0) * X)
            ).all()
        if order == 1:
            torch.testing.assert_close(
                y, run(DDIM(), time_grid(p, 9, end=0.0), d, p.sigma(1.0) * X), rtol=0, atol=1e-14
            )


def test_full_order_at_clean_data_pays():
    d = MixtureDenoiser(four_gaussians(), VP())
    truth = exact_flow(d, None, X, 1.0, 0.0, rtol=1e-5, atol=1e-7)
    lowered = run(PLMS(), (g := time_grid(VP(), 40, end=0.0))[:-1], d)
    # the last step as DDIM would take it
    lowered = transfer(VP(), lowered, g[-2].item(), 0.0, d(lowered, g[-2].item()).eps)
    assert rms(run(PLMS(), g, d), truth) < 0.6 * rms(lowered, truth)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_both_doors(order, final):
    from diffkit.core.adapters import DiffusersScheduler

    s = DiffusersScheduler(
        PLMS(order),
        trained_betas=torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).tolist(),
        final=final,
    )
    for _ in range(2):  # a second trajectory begins from nothing
        s.set_timesteps(12)
        y = X
        for t in s.timesteps:
            y = s.step(BED(y, (t.item() + 1) / 1000).eps, t, y).prev_sample
        torch.testing.assert_close(y, run(PLMS(order), s.grid), rtol=1e-9, atol=1e-9)
    assert len(s.timesteps) == 12  # no repeated time
    for other in (PNDM(), PseudoRK(), ClassicalAB()):
        with pytest.raises(TypeError, match="MultistepSolver"):
            DiffusersScheduler(other)


def test_config_goes_around_the_world():
    from diffkit.core.adapters import DiffusersScheduler

    again = DiffusersScheduler.from_config(DiffusersScheduler(PLMS(3)).config)
    assert isinstance(again.solver, PLMS) and again.solver.order == 3


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_used_twice_and_reindexed(solver):
    grid = time_grid(P, 9, end=0.01)
    a, b = (run(solver, grid) for _ in range(2))
    assert torch.equal(a, b)  # nothing of the first trajectory is left
    idx = torch.tensor([3, 3, 0])
    y = resampled(solver, BED, X, grid, 2, idx)  # in the middle of the warm-up, too
    torch.testing.assert_close(y, a[idx], rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_a_time_a_sample(solver):
    grid = time_grid(VP(), 7, start=0.9, end=0.1)
    d, times = (
        MixtureDenoiser(four_gaussians(), VP()),
        torch.linspace(0.8, 1.0, 16, dtype=torch.float64),
    )
    solver.start(VP(), grid)
    y = X
    for t, s in zip(grid, grid[1:]):
        y = solver.step(lambda x, t: d(x, t), y, times * t, times * s)
    for row in (0, 15):
        torch.testing.assert_close(
            y[row : row + 1],
            run(solver, times[row] * grid, d, X[row : row + 1]),
            rtol=1e-9,
            atol=1e-9,
        )


def test_evaluations_are_what_evals_says():
    for s in SOLVERS:
        for n in (5, 12):
            with count_evals(BED) as c:
                run(s, time_grid(P, n))
            assert c.calls == s.evals(n) and c.rows == 16 * c.calls, s


def test_history_is_the_guided_one():
    model = cfg(MixtureDenoiser(ring(), VP()), 2.0)
    y, grid = torch.arange(16) % 8, time_grid(VP(), 10)
    whole = run(PLMS(), grid, model, cond={"label": y})
    x, eps, b = X, [], {k: ab_coefficients(k) for k in (1, 2, 3, 4)}
    for t, s in zip(grid.tolist(), grid.tolist()[1:]):  # the method by hand
        eps = [model(x, t, label=y).eps, *eps][:4]
        x = transfer(VP(), x, t, s, sum(w * e for w, e in zip(b[len(eps)], eps)))
    torch.testing.assert_close(whole, x, rtol=1e-10, atol=1e-10)


def test_gradients_go_through():
    x = X.clone().requires_grad_()
    for s in (PLMS(), PNDM(), PseudoRK(), ClassicalAB()):
        run(s, time_grid(P, 5), x=x, grad=True).square().sum().backward()
        assert torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0


def test_half_precision_stays_finite():
    for s in (PLMS(), PNDM(2), PNDM()):
        y = run(s, time_grid(P, 20), x=X.bfloat16())
        # the median: a start near a ridge may end elsewhere
        assert (
            y.dtype == torch.bfloat16
            and torch.isfinite(y).all()
            and (y.double() - run(s, time_grid(P, 20))).abs().median() < 0.05
        )


def test_weights_of_high_order_are_the_integrals():
    import numpy as np

    for k in (5, 8, 12):
        nodes, u = -np.arange(k), (np.polynomial.legendre.leggauss(20)[0] + 1) / 2
        w = np.polynomial.legendre.leggauss(20)[1] / 2
        basis = (
            np.linalg.solve(
                np.vander(nodes, increasing=True).astype(float).T,
                np.vander(u, k, increasing=True).T,
            )
            if k <= 8
            else None
        )
        if basis is not None:
            assert np.allclose(basis @ w, ab_coefficients(k), rtol=1e-6)
        assert abs(sum(ab_coefficients(k)) - 1) < 1e-9


@pytest.mark.parametrize(
    "make,names",
    [
        (lambda: PLMS(0), "got 0"),
        (lambda: PLMS(2.5), "got 2.5"),
        (lambda: PLMS("4"), "got '4'"),
        (lambda: PNDM(5), "got 5"),
        (lambda: PNDM(4, "low"), "got 'low'"),
        (lambda: PNDM(4, middle="log_snr"), "got 'log_snr'"),
        (lambda: PseudoRK(1), "got 1"),
        (lambda: PseudoRK(4, "t"), "got 't'"),
        (lambda: ClassicalAB(-1), "got -1"),
        (lambda: ab_coefficients(0), "got 0"),
        (lambda: ab_coefficients(3.0), "got 3.0"),
        (lambda: ab_coefficients(True), "got True"),
        (lambda: run(PNDM(), time_grid(P, 3)), "at least 4 steps, got 3"),
        (lambda: run(PNDM(2), time_grid(P, 1)), "at least 2 steps, got 1"),
        (lambda: run(PNDM(4, "euler"), time_grid(P, 1)), "at least 2 steps"),
        (lambda: run(ClassicalAB(), time_grid(P, 3)), "at least 4 steps, got 3"),
        (
            lambda: run(PNDM(), time_grid(Flow(), 6), MixtureDenoiser(four_gaussians(), Flow())),
            "alpha is 0",
        ),
        (
            lambda: run(
                PseudoRK(), time_grid(Cosine(), 6), MixtureDenoiser(four_gaussians(), Cosine())
            ),
            "alpha is 0",
        ),
        (lambda: run(PseudoRK(), time_grid(P, 6, end=0.0)), "sigma is 0"),
        (lambda: transfer(Flow(), X, 1.0, 0.5, X), "alpha(t) > 0"),
        (lambda: run(PLMS(), torch.tensor([0.9, 0.5, 0.5, 0.1])), "strictly decreasing"),
        (lambda: run(PNDM(), torch.tensor([0.1, 0.5, 0.6, 0.7, 0.9])), "strictly decreasing"),
    ],
)
def test_bad_input_is_refused(make, names):
    with count_evals(BED) as c, pytest.raises(ValueError) as e:
        make()
    assert names in str(e.value) and c.calls == 0
