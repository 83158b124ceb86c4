"""UniPC against diffusers on the same grid; both doors; every process; the search and its
limits."""

import json
import math
import warnings

import pytest
import torch

from diffkit.core.adapters import DiffusersScheduler
from diffkit.core.data import four_gaussians
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, Prediction, cfg, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, rms, sample
from diffkit.solvers.basics import guided_bed, reference_trajectory
from diffkit.solvers.dc_solver import (
    DCSolver,
    UniPC,
    best_ratio,
    cpr_fit,
    cpr_predict,
    search_ratios,
    unipc_row,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from resampled import resampled

P = Discrete()
BED = MixtureDenoiser(four_gaussians(), P)
X = torch.randn(16, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
R8 = [1.0, 1.0, 0.9, 1.1, 0.8, 1.2, 1.1, 1.4]


def peer(n, **options):
    from diffusers import UniPCMultistepScheduler

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = UniPCMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, final_sigmas_type="sigma_min", **options
        )
    s.set_timesteps(n)
    grid = time_grid(P, n, "linspace")
    # theirs is a float32 product of a thousand factors
    s.sigmas = (P.sigma(grid) / P.alpha(grid)).float()
    y = X.float()[..., None, None]  # its linear solve wants float32
    for t in s.timesteps:
        y = s.step(
            BED(y[..., 0, 0].double(), (t.item() + 1) / 1000).eps.float()[..., None, None], t, y
        ).prev_sample
    return y[..., 0, 0].double()


@pytest.mark.parametrize("n", [5, 8, 20])
@pytest.mark.parametrize(
    "mine,theirs",
    [
        (dict(order=1), dict(solver_order=1)),
        (dict(order=2), dict(solver_order=2)),
        (dict(order=3), dict(solver_order=3)),
        (dict(order=2, variant="bh1"), dict(solver_order=2, solver_type="bh1")),
        (dict(order=3, variant="bh1"), dict(solver_order=3, solver_type="bh1")),
        (dict(order=2, skip_corrector=(0, 2)), dict(solver_order=2, disable_corrector=[0, 2])),
        (dict(order=3, lower_order_final=False), dict(solver_order=3, lower_order_final=False)),
    ],
)
def test_equal_to_diffusers(mine, theirs, n):
    y = sample(
        BED,
        UniPC(**{"lower_order_final": True, **mine}),
        X,
        time_grid(P, n, "linspace"),
        progress=False,
    )
    scale = max(1.0, y.abs().max().item())
    # the peer works in float32
    torch.testing.assert_close(y, peer(n, **theirs), rtol=0, atol=3e-5 * scale)


@pytest.mark.parametrize(
    "solver",
    [
        UniPC(3),
        UniPC(2, "bh1", skip_corrector=[0]),
        DCSolver(R8),
        DCSolver(R8, axis="log_snr", dc_order=1),
        DCSolver(R8, order=3, dc_order=3, corrector=False),
    ],
    ids=repr,
)
@pytest.mark.parametrize("final", ["zero", "sigma_min"])
def test_both_doors_lead_to_the_same_room(solver, final):
    pytest.importorskip("diffusers")
    sch = DiffusersScheduler(
        solver, num_train_timesteps=1000, final=final, timestep_spacing="trailing"
    )
    # ratios come back
    sch = DiffusersScheduler.from_config(json.loads(json.dumps(dict(sch.config))))
    assert repr(sch.solver) == repr(solver)
    sch.set_timesteps(8)
    d, y = MixtureDenoiser(four_gaussians(), sch.process), X
    for i, t in enumerate(sch.timesteps):
        y = sch.step(d(y, sch.grid[i].item()).eps, t, y).prev_sample
    torch.testing.assert_close(y, sample(d, solver, X, sch.grid, progress=False), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "process", [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()], ids=lambda p: type(p).__name__
)
@pytest.mark.parametrize("end", [0.0, None])
def test_every_process_and_clean_ends(process, end):
    d, x = MixtureDenoiser(four_gaussians(), process), X * process.sigma(1.0)
    for s in (
        UniPC(3),
        UniPC(3, "bh1"),
        UniPC(2, lower_order_final=True),
        UniPC(2, lower_order_final=False),
        DCSolver(R8),
        DCSolver(R8, axis="log_snr", order=3),
    ):
        assert torch.isfinite(
            sample(d, s, x, time_grid(process, 8, end=end), progress=False)
        ).all(), s
    errors = [
        rms(
            sample(
                d,
                UniPC(2),
                x,
                time_grid(process, n, "log_snr", process.t_max, max(process.t_min, 1e-3)),
                progress=False,
            ),
            sample(
                d,
                DPMSolverPP(3),
                x,
                time_grid(process, 600, "log_snr", process.t_max, max(process.t_min, 1e-3)),
                progress=False,
            ),
        )
        for n in (15, 60)
    ]
    assert errors[1] < errors[0] / 8  # third order would be 64, second 16


def test_one_sample_one_time():
    """Times that differ within a batch take the path without a table; it must lead to the same
    place."""
    grid = time_grid(VP(), 8)
    d = MixtureDenoiser(four_gaussians(), VP())
    for make in (
        lambda: UniPC(3, lower_order_final=False),
        lambda: DCSolver(R8, lower_order_final=False),
    ):
        a, b = make(), make()
        a.start(VP(), grid)
        b.start(VP(), grid)
        x = y = X
        for t, s in zip(grid.tolist(), grid.tolist()[1:]):
            x = a.step(d, x, t, s)
            y = b.step(
                d,
                y,
                torch.full((16,), t, dtype=torch.float64),
                torch.full((16,), s, dtype=torch.float64),
            )
        torch.testing.assert_close(x, y, rtol=0, atol=1e-9)


def test_used_twice_reindexed_and_float32():
    for s in (UniPC(3), DCSolver(R8)):
        grid = time_grid(P, 8)
        a, b = (sample(BED, s, X, grid, progress=False) for _ in range(2))
        assert torch.equal(a, b)
        idx = torch.tensor([3, 3, 0])
        torch.testing.assert_close(resampled(s, BED, X, grid, 4, idx), a[idx])
        f = sample(BED, s, X.float(), grid, progress=False)
        assert f.dtype == torch.float32 and rms(f, a) < 1e-4
        h = sample(BED, s, X.bfloat16(), grid, progress=False)
        assert h.dtype == torch.bfloat16 and rms(h, a) < 0.1


def test_order_above_the_steps_is_lowered():
    for n in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.isfinite(
                sample(BED, DCSolver([1.3] * n, order=3), X, time_grid(P, n), progress=False)
            ).all()
    with pytest.warns(UserWarning, match="order 4"):
        UniPC(4)


class Quadratic(Denoiser):
    process = VP()

    def forward(self, x, t):
        return Prediction.of(x, t, self.process, x0=torch.full_like(x, 3 * t**2 - 2 * t + 0.5))


def test_compensation_reads_a_quadratic_off_exactly():
    "The first compensated step uses m(t'); first order, so that nothing else enters."
    grid, s = time_grid(VP(), 8), DCSolver(R8, order=1, corrector=False)
    s.start(VP(), grid)
    d, x = Quadratic(), X
    for i in range(3):
        last, x = x, s.step(d, x, grid[i].item(), grid[i + 1].item())
    t = (R8[2] * grid[2] + (1 - R8[2]) * grid[1]).item()
    from diffkit.core.sampling import Node, first_order

    r = first_order(Node.at(VP(), grid[2]), Node.at(VP(), grid[3]))
    torch.testing.assert_close(
        x, r.a * last + r.b[0] * (3 * t**2 - 2 * t + 0.5), rtol=0, atol=1e-10
    )


def test_closed_form_is_not_worse_than_adamw():
    d, x, cond = guided_bed(3.0, 10)
    grid = time_grid(VP(), 6)
    ref = reference_trajectory(d, x, grid, substeps=6, **cond)
    log, s = {}, DCSolver(corrector=False)
    ratios = search_ratios(d, s, x, grid, ref, verbose=log, **cond)
    # the third step by AdamW, by hand
    eta = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    opt, best, best_eta = torch.optim.AdamW([eta], lr=0.1), float("inf"), 1.0
    s = DCSolver([1.0] * 6, corrector=False)
    s.start(VP(), grid)
    y = x
    with torch.no_grad():
        for i in range(2):
            y = s.step(lambda a, t: d(a, t, **cond), y, grid[i].item(), grid[i + 1].item())
        new = d(y, grid[2].item(), **cond)
    import copy

    for _ in range(150):
        trial = copy.copy(s)
        trial.compensations = [None, None, s.weights_at(2, eta), None, None, None]
        loss = (trial.advance(new, y, grid[3].item()) - ref[3]).square().mean()
        if loss.item() < best:
            best, best_eta = loss.item(), eta.item()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert log["after"][2] <= best + 1e-12
    # AdamW then sits in the other minimum
    if abs(best_eta - ratios[2]) > 0.05:
        assert log["after"][2] < best


def test_search_with_a_callable_reference_and_held_out_gain():
    d, x, cond = guided_bed(1.0, 30)
    grid = time_grid(VP(), 8)
    ref = reference_trajectory(d, x, grid, substeps=6, **cond)
    half = {"label": cond["label"][:10]}
    table = dict(zip(grid.tolist(), ref[:, :10]))
    r = search_ratios(d, DCSolver(), x[:10], grid, lambda t: table[t], iters=2, **half)
    assert r == search_ratios(d, DCSolver(), x[:10], grid, ref[:, :10], iters=2, **half)
    rest = {"label": cond["label"][10:]}
    error = lambda s: rms(sample(d, s, x[10:], grid, cond=rest, progress=False), ref[-1, 10:])
    assert error(DCSolver().tuned(r, grid)) < 0.8 * error(UniPC(2))
    assert all(p.grad is None for p in d.parameters())


def test_cost():
    for s in (UniPC(1), UniPC(3), DCSolver(R8)):
        with count_evals(BED) as n:
            sample(BED, s, X, time_grid(P, 8), progress=False)
        assert n.calls == s.evals(8) == 8


def test_guidance_and_corrected_history():
    d = cfg(MixtureDenoiser(four_gaussians(), Flow()), 1.0)
    assert torch.isfinite(
        sample(d, DCSolver(R8), X, time_grid(Flow(), 8, end=0.0), progress=False)
    ).all()


def test_best_ratio_respects_bounds():
    pts = torch.stack([torch.full((4,), (r - 5.0) ** 2) for r in (0.0, 1.0, 2.0)])  # minimum at 5
    assert best_ratio(pts, [0.0, 1.0, 2.0], torch.zeros(4)) == pytest.approx(5.0, abs=1e-3)
    assert best_ratio(pts, [0.0, 1.0, 2.0], torch.zeros(4), bounds=(0.0, 3.0)) == 3.0
    with pytest.raises(ValueError, match="finite"):
        best_ratio(pts * float("nan"), [0.0, 1.0, 2.0], torch.zeros(4))


def test_rows_are_batched():
    from diffkit.core.sampling import Node

    table = Node.at(VP(), torch.linspace(0.9, 0.1, 9, dtype=torch.float64))
    at = torch.tensor([2, 3, 4, 5])
    rows = unipc_row([table.take(at - k) for k in range(3)], table.take(at + 1), True)
    for j, i in enumerate(at.tolist()):
        one = unipc_row(
            [Node(*(c[i - k] for c in table)) for k in range(3)],
            Node(*(c[i + 1] for c in table)),
            True,
        )
        for u, v in zip(rows.b, one.b):
            torch.testing.assert_close(u[j], v)


@pytest.fixture
def double():  # the peer's linear solve takes the default precision
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("n", [5, 8, 20])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("form", ["eps", "x0"])
def test_both_forms_are_diffusers_in_double_precision(double, n, order, variant, final, form):
    from diffusers import UniPCMultistepScheduler

    grid = time_grid(P, n, "linspace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        s = UniPCMultistepScheduler(
            beta_start=1e-4, beta_end=0.02, final_sigmas_type="sigma_min", solver_order=order,
            solver_type=variant, lower_order_final=final, predict_x0=form == "x0",
        )  # fmt: skip
    s.set_timesteps(n)
    s.sigmas = P.sigma(grid) / P.alpha(grid)
    z = X[..., None, None]
    for t in s.timesteps:
        z = s.step(BED(z[..., 0, 0], (t.item() + 1) / 1000).eps[..., None, None], t, z).prev_sample
    mine = UniPC(order, variant, lower_order_final=final, form=form)
    y = sample(BED, mine, X, grid, progress=False)
    torch.testing.assert_close(y, z[..., 0, 0], rtol=1e-8, atol=1e-8)


def test_the_noise_form_without_a_corrector_is_dpm_solver_and_ddim():
    grid = time_grid(VP(), 7, end=1e-3)
    d, no = MixtureDenoiser(four_gaussians(), VP()), dict(lower_order_final=False)
    go = lambda s: sample(d, s, X, grid, progress=False)
    unip = lambda k: UniPC(k, corrector=False, form="eps", **no)
    torch.testing.assert_close(go(unip(1)), go(DDIM()))
    # bh2 and the midpoint rule are one for two predictions
    torch.testing.assert_close(go(unip(2)), go(DPMSolverPP(2, form="eps", **no)))
    assert (go(unip(2)) - go(UniPC(2, corrector=False, **no))).abs().max() > 1e-3


def test_the_noise_form_says_where_it_cannot_go():
    with pytest.raises(ValueError, match="got 'noise'"):
        UniPC(form="noise")
    with pytest.raises(ValueError, match="form='eps' cannot end at t=0"):
        UniPC(form="eps").begin(VP(), time_grid(VP(), 4, end=0.0))
    with pytest.raises(ValueError, match="no finite update for step 0"):
        UniPC(form="eps").begin(Flow(), time_grid(Flow(), 4, end=0.1))


@pytest.mark.parametrize("corrector", [True, False])
@pytest.mark.parametrize("axis", ["time", "log_snr"])
@pytest.mark.parametrize("order, dc_order", [(1, 1), (2, 2), (3, 1), (2, 4)])
def test_ratios_act_from_the_first_step_with_enough_predictions(order, dc_order, axis, corrector):
    """Without ratios, or with 1 everywhere, the solver is UniPC; a ratio counts from step dc_order
    on, where dc_order + 1 predictions are stored, and to the last step."""
    kw, n = dict(order=order, corrector=corrector), 8
    go = lambda s: sample(BED, s, X, time_grid(P, n), progress=False)
    own = dict(dc_order=dc_order, axis=axis, **kw)
    plain = go(UniPC(**kw))
    assert torch.equal(go(DCSolver(**own)), plain)
    for i in range(n):
        ratios = [1.0] * n
        assert torch.equal(go(DCSolver(ratios, **own)), plain)
        ratios[i] = 1.3
        assert torch.equal(go(DCSolver(ratios, **own)), plain) == (i < dc_order), i


@pytest.mark.parametrize("n", [1, 7, 9])
def test_ratios_belong_to_one_number_of_steps_and_one_grid(n):
    grid, ratios = time_grid(P, 8), [1.0] * n
    with pytest.raises(ValueError, match=rf"one number a step \(8\), got {n}: they belong"):
        DCSolver(ratios).begin(P, grid)
    tuned = DCSolver().tuned([1.0] * 8, grid)
    tuned.begin(P, grid)
    for solver in (tuned, DCSolver(times=time_grid(P, n).tolist())):
        with pytest.raises(ValueError, match="but grid is .* search again or use cpr_predict"):
            solver.begin(P, time_grid(P, 8, "log_snr"))


def cubic(coef, nfe, scale):
    """The cascade by loops: a cubic in n / N, its coefficients quadratic in the guidance scale over
    12, theirs quadratic in N / 50."""
    total = lambda terms: sum(terms, 0.0)
    inner = lambda i, j: total(coef[i][j][k] * (nfe / 50) ** k for k in range(3))
    outer = lambda i: total(inner(i, j) * (scale / 12) ** j for j in range(3))
    return [total(outer(i) * (n / nfe) ** i for i in range(4)) for n in range(1, nfe + 1)]


def test_the_regression_finds_the_coefficients_of_exact_ratios():
    """To the rounding of double precision, of which the conditioning of the 36 unknowns, 1e5, costs
    some digits. The first two ratios of a run are not read, and 1."""
    coef = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = lambda nfe, scale: cubic(coef.tolist(), nfe, scale)
    table = {(N, w): exact(N, w) for N in (25, 50, 99) for w in (1.5, 7.0, 12.0)}
    spoiled = {k: [math.nan, -math.inf, *r[2:]] for k, r in table.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all coefficients are determined
        found = cpr_fit(spoiled)
    torch.testing.assert_close(found, coef, rtol=0, atol=1e-9)
    for nfe, scale in ((25, 1.5), (75, 3.0), (50, 9.0), (11, 4.0), (40, 9.9)):
        for c in (coef, coef.float()):
            got, want = cpr_predict(c, nfe, scale), cubic(c.tolist(), nfe, scale)
            assert got == pytest.approx([1.0, 1.0, *want[2:]], rel=0, abs=1e-12)
    assert [cpr_predict(coef, k, 1.5) for k in (1, 2)] == [[1.0], [1.0, 1.0]]


def test_the_regression_needs_as_many_ratios_as_coefficients():
    "35 are refused; 36 are taken, with a warning where they do not determine everything."
    ones = lambda *settings: {(n, w): [1.0] * n for n, w in settings}
    rest = [(6, 1.0), (8, 2.0), (10, 3.0), (6, 2.0), (8, 3.0)]  # 28 of them
    for last, count in ((3, 29), (9, 35)):
        with pytest.raises(
            ValueError, match=f"36 coefficients need at least 36 ratios, got {count}"
        ):
            cpr_fit(ones(*rest, (last, 1.0)))
    with pytest.warns(UserWarning, match="does not determine all coefficients"):
        few = cpr_fit(ones(*rest, (10, 1.0)))
    runs = ones(*[(n, w) for n in (25, 50) for w in (1.0, 2.0, 3.0)], (6, 2.0), (6, 3.0))
    with pytest.warns(UserWarning, match="does not determine all coefficients"):
        cpr_fit({**runs, **ones((5, 1.0))})  # one less than the four that a cubic needs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpr_fit({**runs, **ones((6, 1.0))})
    for n, w in rest:
        assert cpr_predict(few, n, w) == pytest.approx([1.0] * n, rel=0, abs=1e-9)
    with pytest.raises(ValueError, match=r"table\[6, ...\] must have 6 ratios, got 5"):
        cpr_fit({**ones(*rest), (6, 1.0): [1.0] * 5})
    for lack in ([(9, 1.0), (9, 2.0), (9, 3.0)] * 2, [(9, 1.0), (10, 2.0), (11, 1.0)]):
        with pytest.raises(ValueError, match="at least 3 numbers of steps and 3 guidance scales"):
            cpr_fit(ones(*lack))
    with pytest.raises(ValueError, match=r"coef must have shape \(4, 3, 3\), got \(36,\)"):
        cpr_predict(few.flatten(), 8, 1.0)
