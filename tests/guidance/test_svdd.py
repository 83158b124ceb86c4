"""Soft value-based decoding: exact laws, properties on random input, composition, bad input."""

import functools
import math
import operator
import warnings

import numpy as np
import pytest
import torch
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg, count_evals
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, Solver, sample, trace
from diffkit.guidance.apg import apg
from diffkit.guidance.basics import CategoricalPrediction, TableDenoiser, Unmask
from diffkit.guidance.svdd import (
    SVDD,
    MonteCarloValue,
    PosteriorMean,
    RewardSMC,
    SoftValue,
    choose_candidate,
    per_sample,
    soft_best_of,
    soft_mean,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from diffkit.solvers.time_shift import TimeShift
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

F64 = torch.float64
MIX = GaussianMixture(
    3 * torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=F64),
    scales=0.5,
    labels=[0, 0, 1, 1],
)
JOINT = (lambda p: p / p.sum())(
    torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(1), dtype=F64) ** 2
)
TABLE, SHORT, MASK = TableDenoiser(JOINT), torch.linspace(1, 0, 4, dtype=F64), 3
INNER = [
    DDIM(eta=1.0),
    DDIM(eta=0.5),
    Ancestral(),
    Ancestral("large"),
    EulerMaruyama(),
    DPMSolverPP(1, sde=True),
]


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def first(x):
    return x[:, 0]


PM = PosteriorMean(first)


def count(x):
    return (x == 1).sum(1).double() + 2.0 * (x[:, 0] == x[:, -1])


def hidden(n):
    return torch.full((n, 3), MASK)


def run(denoiser, solver, x, grid, seed=0, **kw):
    return sample(
        denoiser,
        solver,
        x,
        grid,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
        **kw,
    )


class OneByOne(Solver):  # one token a step at a random place: the model's steps are then exact
    discrete = True

    def step(self, denoise, x, t, s):
        p, masked = denoise(x, t), x == self.process.mask
        at = (
            torch.rand(x.shape, generator=self.generator, dtype=F64)
            .masked_fill(~masked, -1.0)
            .argmax(1, keepdim=True)
        )
        return x.scatter(1, at, p.draw(self.generator).gather(1, at))


# --- the tilted law


def soft_value(alpha):  # by brute force over the 27 sequences, another way than the notebook's
    def v(x, t=None):
        fits = ((x[:, None] == TABLE.states) | (x[:, None] == MASK)).all(-1) * TABLE.p
        return alpha * ((fits * (count(TABLE.states) / alpha).exp()).sum(1) / fits.sum(1)).log()

    return v


def law(x):
    return torch.bincount((x * torch.tensor([9, 3, 1])).sum(1), minlength=27).double() / len(x)


# best of 60 is no match for weights that differ by exp(5 / 0.5)
@pytest.mark.parametrize(
    "method,alpha",
    [
        ("svdd", 0.5),
        ("svdd", 1.0),
        ("svdd", 3.0),
        ("smc", 0.5),
        ("smc", 1.0),
        ("smc", 3.0),
        ("best", 3.0),
    ],
)
def test_whole_law_and_not_only_its_rewards(method, alpha):
    n, want = 3000, TABLE.p * (count(TABLE.states) / alpha).exp()
    want = want / want.sum()
    if method == "svdd":
        x = run(TABLE, SVDD(OneByOne(), soft_value(alpha), M=60, alpha=alpha), hidden(n), SHORT)
    elif method == "smc":
        x = run(TABLE, RewardSMC(OneByOne(), soft_value(alpha), alpha), hidden(n), SHORT)
    else:
        x = soft_best_of(
            run(TABLE, OneByOne(), hidden(n * 60), SHORT),
            count,
            60,
            alpha,
            torch.Generator().manual_seed(1),
        )
    tv = lambda p: 0.5 * (p - want).abs().sum().item()
    exact = [
        tv(
            law(
                TABLE.states[
                    torch.multinomial(
                        want, n, replacement=True, generator=torch.Generator().manual_seed(s)
                    )
                ]
            )
        )
        for s in range(40)
    ]
    # 0.02: the bias at M = 60 and the relatives of one SMC run
    assert tv(law(x)) < np.mean(exact) + 4 * np.std(exact) + 0.02
    assert tv(TABLE.p) > 0.1 or alpha == 3.0  # so that the test can fail


def test_log_weights_accumulate_between_resamplings():
    "Without any resampling but the last, all increments must count."

    # half of what is known at each step: increments of every step matter, and the reward at the end
    class Slow(SoftValue):
        reward = staticmethod(count)

        def __call__(self, x, t, prediction=None):
            return 0.5 * soft_value(1.0)(x)

    want = TABLE.p * count(TABLE.states).exp()
    x = run(TABLE, RewardSMC(OneByOne(), Slow(), ess=0.0), hidden(6000), SHORT)
    assert abs(count(x).mean() - (want * count(TABLE.states)).sum() / want.sum()) < 0.08
    assert abs(count(x).mean() - TABLE.p @ count(TABLE.states)) > 0.3


class Still(Solver):  # stays where it is, though it draws: values are then what they are set to
    def step(self, denoise, x, t, s):
        torch.rand(1, generator=self.generator)
        denoise(x, t)
        return x


def test_a_group_that_did_not_resample_keeps_its_weights():
    """Two groups of four; the first resamples in the first step, the second does not. After the
    second step the first group has earned nothing, and the second what it earned in both."""
    grid = torch.tensor([0.9, 0.7, 0.5, 0.3], dtype=F64)
    mild = torch.arange(4.0, dtype=F64)
    x = torch.zeros(8, 2, dtype=F64)
    x[:2, 0], x[4:, 0], x[4:, 1] = torch.tensor([50.0, 50.5], dtype=F64), mild / 2, 3 * mild / 2

    def value(y, t):  # large ones stay as they are; else the first column, then the second
        return torch.where(y[:, 0] > 40, y[:, 0], y[:, 0] * (t > 0.6) + y[:, 1] * (t < 0.6))

    smc = RewardSMC(Still(), value, ess=0.5, groups=2)
    out = run(MixtureDenoiser(MIX, VP()), smc, x, grid)
    size = lambda log_w: (log_w.exp().sum() ** 2 / (2 * log_w).exp().sum()).item()
    one, two, _ = (v.tolist() for v in smc.sizes)
    assert_close(one, [size(mild[:2] / 2), size(mild / 2)], rtol=1e-9, atol=0)
    # so that the test can fail: below and above half of four, with one step's weights and with both
    assert one[0] < 2 < one[1] and size(3 * mild / 2) < 2 < size(mild)
    assert_close(two, [4.0, size(3 * mild / 2)], rtol=1e-9, atol=0)
    assert set(out[:4, 0].tolist()) == {50.0, 50.5}


@pytest.mark.parametrize("process", [VP(), Cosine()], ids=lambda p: type(p).__name__)
def test_exact_steps_give_mean_b_and_variance_one(process):
    """x_0 ~ N(0, 1), r = b x: with the larger ancestral variance the model's steps are exact, and
    the tilted law N(b, 1) comes out of a few of them."""
    d, b, n = MixtureDenoiser(GaussianMixture(torch.zeros(1, 1), scales=1.0), process), 1.5, 3000
    x = process.sigma(process.t_max) * randn(n, 1, seed=1)
    grid = time_grid(process, 12, "log_snr", process.t_max, max(process.t_min, 1e-3))
    y = run(d, SVDD(Ancestral("large"), PosteriorMean(lambda x: b * x[:, 0]), M=64), x, grid)[:, 0]
    # three standard errors, and 0.03 for M = 64
    assert abs(y.mean() - b) < 0.03 + 3 / n**0.5
    assert abs(y.var() - 1.0) < 0.03 + 3 * (2 / n) ** 0.5


@pytest.mark.parametrize(
    "process",
    [VP(), Cosine(), Flow(), Discrete(), VE(0.01, 20.0), EDM()],
    ids=lambda p: type(p).__name__,
)
def test_gaussian_closed_form_under_every_process(process):
    """x_0 ~ N(0, 1) and r = x: the tilted law is N(1, 1), and PM is off by a constant only.
    Many steps, since DDIM is first order."""
    d = MixtureDenoiser(GaussianMixture(torch.zeros(1, 1), scales=1.0), process)
    x = process.sigma(process.t_max) * randn(400, 1, seed=1)
    grid = time_grid(process, 150, "log_snr", process.t_max, max(process.t_min, 1e-3))
    y = run(d, SVDD(DDIM(eta=1.0), PosteriorMean(first), M=24), x, grid)[:, 0]
    z = run(d, DDIM(eta=1.0), x, grid)[:, 0]
    # standard errors 0.05 and 0.07, and the bias of M = 24 and of the steps
    assert abs(y.mean() - z.mean() - 1.0) < 0.2 and abs(y.var() / z.var() - 1.0) < 0.25


# --- properties


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.05, 20.0), st.integers(0, 1000))
def test_soft_mean_properties(b, n, alpha, seed):
    r = 3 * randn(b, n, seed=seed)
    s = soft_mean(r, alpha)
    assert (s <= r.amax(1) + 1e-9).all() and (s >= r.mean(1) - 1e-9).all()
    assert_close(soft_mean(r + 2.0, alpha), s + 2.0)
    assert_close(soft_mean(2 * r, 2 * alpha), 2 * s)
    assert (soft_mean(r, 2 * alpha) <= s + 1e-9).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.floats(0.0, 20.0), st.integers(0, 1000))
def test_choice_is_legal_and_ignores_constants(b, m, alpha, seed):
    v = randn(b, m, seed=seed)
    v[randn(b, m, seed=seed + 1) > 0] = -math.inf
    v[:, 0] = 0.0
    k = choose_candidate(v, alpha, torch.Generator().manual_seed(seed))
    assert k.shape == (b,) and (v.gather(1, k[:, None]) > -math.inf).all()
    assert torch.equal(k, choose_candidate(v + 4.0, alpha, torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("inner", INNER, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_one_candidate_is_the_inner_solver(inner, dtype):
    d, x, grid = MixtureDenoiser(MIX, VP()), randn(7, 2, dtype=dtype), time_grid(VP(), 6)
    y = run(d, inner, x, grid)
    assert torch.equal(run(d, SVDD(inner, PosteriorMean(first), M=1), x, grid), y)
    assert torch.equal(run(d, RewardSMC(inner, PosteriorMean(first), groups=7), x, grid), y)
    many = run(d, SVDD(inner, PosteriorMean(first), M=5, alpha=0.1), x, grid)
    assert many.dtype == dtype and first(many).mean() > first(y).mean()


@pytest.mark.parametrize("inner", INNER, ids=repr)
def test_cost_is_what_it_says(inner):
    d, x, grid = MixtureDenoiser(MIX, VP()), randn(5, 2), time_grid(VP(), 6)
    for solver, want in (
        (SVDD(inner, PosteriorMean(first), M=4), 1 + 4 * 5),
        (SVDD(inner, lambda x, t: first(x), M=4), 6),
        (SVDD(inner, PosteriorMean(first), M=1), 6),
        (RewardSMC(inner, PosteriorMean(first)), 6),
    ):
        with count_evals(d) as n:
            run(d, solver, x, grid)
        assert n.rows / 5 == want == solver.evals(6)


def test_equal_candidates_leave_everything_as_it_was():
    """The noise is given, and the same for all candidates: whatever is chosen, the run is the
    plain one. Guidance, momentum and conditions included."""
    x, y, grid, noise = randn(6, 2), torch.arange(6) % 2, time_grid(VP(), 8), randn(8, 6, 2, seed=4)
    d = MixtureDenoiser(MIX, VP())
    for den in (
        d,
        cfg(d, 2.0),
        apg(d, 3.0, r=0.5, beta=-0.5),
        cfg(apg(d, 3.0, beta=-0.5), 2.0),
        apg(cfg(d, 2.0), 2.0, beta=-0.5),
    ):
        for value in (PosteriorMean(first), lambda x, t: first(x)):
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                want = run(den, DDIM(eta=1.0, noise=noise), x, grid, cond={"label": y})
                got = run(
                    den,
                    SVDD(DDIM(eta=1.0, noise=noise.repeat_interleave(3, 1)), value, M=3),
                    x,
                    grid,
                    cond={"label": y},
                )
            assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_a_time_shifted_inner_solver_keeps_its_times():
    d, x, grid, noise = (
        MixtureDenoiser(GaussianMixture(torch.zeros(1, 16, dtype=F64), scales=0.7), VP()),
        randn(5, 16),
        time_grid(VP(), 8),
        randn(8, 5, 16, seed=4),
    )
    want = run(d, TimeShift(DDIM(eta=1.0, noise=noise)), x, grid)
    assert_close(
        run(d, SVDD(TimeShift(DDIM(eta=1.0)), lambda x, t: first(x), M=1), x, grid),
        run(d, TimeShift(DDIM(eta=1.0)), x, grid),
    )

    # draws one number, so that the probe sees a stochastic solver; the noise is the given one
    class Given(TimeShift):
        def step(self, denoise, x, t, s):
            torch.rand(1, generator=self.generator)
            if x.shape[0] == 1:
                self.solver.noise = noise[:, :1]
            else:
                self.solver.noise = noise.repeat_interleave(3, 1)
            return super().step(denoise, x, t, s)

    for value in (lambda x, t: first(x), PosteriorMean(first)):
        assert_close(run(d, SVDD(Given(DDIM(eta=1.0, noise=noise)), value, M=3), x, grid), want)


def test_samples_do_not_meet():
    d, grid = MixtureDenoiser(MIX, VP()), time_grid(VP(), 6)
    for value in (PosteriorMean(first), lambda x, t: x[:, 1]):
        x = randn(8, 2)
        y = x.clone()
        y[2] += 3.0
        a, b = (run(d, SVDD(DDIM(eta=1.0), value, M=4), v, grid) for v in (x, y))
        keep = torch.arange(8) != 2
        assert torch.equal(a[keep], b[keep]) and not torch.equal(a[2], b[2])


def test_the_batch_may_be_permuted():
    "With the draws given and argmax, permuting the samples permutes the results."
    d, x, y, grid, noise, perm = (
        MixtureDenoiser(MIX, VP()),
        randn(6, 2),
        torch.arange(6) % 2,
        time_grid(VP(), 6),
        randn(6, 6, 4, 2, seed=2),
        torch.tensor([3, 1, 5, 0, 2, 4]),
    )
    f = lambda idx: run(
        d,
        SVDD(
            DDIM(eta=1.0, noise=noise[:, idx].flatten(1, 2)),
            PosteriorMean(first),
            M=4,
            select="argmax",
        ),
        x[idx],
        grid,
        cond={"label": y[idx]},
    )
    assert_close(f(perm), f(torch.arange(6))[perm])


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_chunks_change_nothing_but_the_calls(chunk):
    d, grid, sizes = MixtureDenoiser(MIX, VP()), time_grid(VP(), 4), []

    def reward(x):
        sizes.append(len(x))
        return first(x)

    for make in (
        lambda **k: SVDD(DDIM(eta=1.0), PosteriorMean(reward), M=4, **k),
        lambda **k: RewardSMC(DDIM(eta=1.0), PosteriorMean(reward), **k),
    ):
        want = run(d, make(), randn(5, 2), grid)
        sizes.clear()
        assert torch.equal(run(d, make(chunk=chunk), randn(5, 2), grid), want)
        assert max(sizes) <= chunk


def test_any_black_box():
    d, grid, x = MixtureDenoiser(MIX, VP()), time_grid(VP(), 5), randn(5, 2)
    want = run(d, SVDD(DDIM(eta=1.0), PosteriorMean(first), M=4), x, grid)
    for reward in (
        lambda x: x[:, 0].numpy(),
        lambda x: x[:, 0].tolist(),
        per_sample(lambda v: v[0]),
        lambda x: x[:, 0].clone().requires_grad_(),
    ):
        assert torch.equal(run(d, SVDD(DDIM(eta=1.0), PosteriorMean(reward), M=4), x, grid), want)
    y = run(
        d,
        SVDD(DDIM(eta=1.0), PosteriorMean(lambda x: (x[:, 0] > 0).int()), M=4, alpha=0.1),
        x,
        grid,
    )
    assert torch.isfinite(y).all()


def test_tokens_and_hard_conditions():
    allowed = lambda x: torch.where(x[:, 0] == 2, 0.0, -math.inf)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # all candidates of a sample may break it
        x = run(
            TABLE,
            SVDD(Unmask(), PosteriorMean(allowed), M=30),
            hidden(200),
            torch.linspace(1, 0, 11, dtype=F64),
        )
    assert (x < MASK).all() and (x[:, 0] == 2).double().mean() > 0.95
    with pytest.warns(UserWarning, match="all 3 candidates of 4 of 4"):
        run(
            TABLE,
            SVDD(Unmask(), lambda x, t: torch.full((len(x),), -math.inf), M=3),
            hidden(4),
            SHORT,
        )


def test_completions():
    x = torch.tensor([[MASK, 1, 0], [2, MASK, 2]])
    p, v = TABLE(x, 0.5), PosteriorMean(count, completions=5000)
    v.start(TABLE.process, 0.7, torch.Generator().manual_seed(0))
    assert_close(v(x, 0.5, p), soft_value(0.7)(x), rtol=0, atol=0.1)
    assert isinstance(p, CategoricalPrediction)
    y = run(
        TABLE,
        SVDD(Unmask(), PosteriorMean(count, 4), M=4),
        hidden(30),
        torch.linspace(1, 0, 9, dtype=F64),
    )
    assert (
        count(y).mean()
        > count(run(TABLE, Unmask(), hidden(30), torch.linspace(1, 0, 9, dtype=F64))).mean()
    )


def test_a_grid_that_ends_early_is_judged_by_predictions():
    d, seen = MixtureDenoiser(MIX, VP()), []
    solver = SVDD(DDIM(eta=1.0), PosteriorMean(lambda x: seen.append(len(x)) or first(x)), M=4)
    with count_evals(d) as n:
        run(d, solver, randn(5, 2), time_grid(VP(), 6, "uniform", 1.0, 0.2))
    assert n.rows / 5 == 1 + 4 * 6 == solver.evals(6) and len(seen) == 6
    x = run(
        TABLE,
        SVDD(Unmask(), PosteriorMean(count), M=4),
        hidden(20),
        torch.linspace(1, 0.3, 4, dtype=F64),
    )
    # masks that are left are completed by the value and never shown to the reward
    assert (x == MASK).any()


def test_reused_and_restarted():
    "One solver object for many runs, batches and processes."
    solver, grid = SVDD(DDIM(eta=1.0), PosteriorMean(first), M=3), time_grid(VP(), 5)
    d = MixtureDenoiser(MIX, VP())
    a = run(d, solver, randn(4, 2), grid)
    run(
        MixtureDenoiser(MIX, Flow()),
        solver,
        0.9 * randn(9, 2),
        time_grid(Flow(), 4, "uniform", 0.9),
    )
    assert torch.equal(run(d, solver, randn(4, 2), grid), a)
    assert run(d, solver, randn(0, 2), grid).shape == (0, 2) and run(
        d, solver, randn(1, 2), grid
    ).shape == (1, 2)
    assert run(TABLE, SVDD(Unmask(), PosteriorMean(count), M=3), hidden(0), SHORT).shape == (
        0,
        3,
    ) and run(d, RewardSMC(DDIM(eta=1.0), PosteriorMean(first)), randn(0, 2), grid).shape == (0, 2)
    assert "SVDD(solver=DDIM(eta=1.0)" in repr(solver)


def test_a_single_step():
    d, grid = MixtureDenoiser(MIX, VP()), torch.tensor([0.9, 0.0], dtype=F64)
    # no noise in the only step: nothing to choose
    assert_close(
        run(d, SVDD(DDIM(eta=1.0), PosteriorMean(first), M=3), randn(4, 2), grid),
        run(d, DDIM(eta=1.0), randn(4, 2), grid),
    )
    with pytest.raises(ValueError, match="stochastic"):
        run(d, SVDD(DDIM(), PosteriorMean(first), M=3), randn(4, 2), grid)


def test_two_rewards_one_inside_the_other():
    d, grid = MixtureDenoiser(MIX, VP()), time_grid(VP(), 10)
    y = run(
        d,
        SVDD(
            SVDD(DDIM(eta=1.0), lambda x, t: 2 * x[:, 0], M=6),
            PosteriorMean(lambda x: 2 * x[:, 1]),
            M=6,
        ),
        randn(100, 2),
        grid,
    )
    z = run(d, DDIM(eta=1.0), randn(100, 2), grid)
    assert (y.mean(0) > z.mean(0)).all()


def test_smc_groups_and_conditions():
    d, grid, x, y = (
        MixtureDenoiser(MIX, VP()),
        time_grid(VP(), 8),
        randn(12, 2),
        torch.arange(12) // 6,
    )
    smc = RewardSMC(DDIM(eta=1.0), PosteriorMean(lambda x: 3 * x[:, 0]), groups=2)
    a = run(d, smc, x, grid, cond={"label": y})
    assert len(smc.sizes) == 8 and all(
        1 <= v <= 6 + 1e-9 for v in torch.stack(smc.sizes).flatten().tolist()
    )
    for k in (0, 1):
        assert (
            torch.cdist(a[y == k], MIX.means[torch.as_tensor(MIX.labels) == k].to(a)).amin(1) < 2.5
        ).all()
    with pytest.raises(ValueError, match="another condition"):
        run(d, smc, x, grid, cond={"label": torch.arange(12) % 2})


def test_gradients_reach_through_the_chosen_candidates():
    d, x = MixtureDenoiser(MIX, VP()), randn(3, 2).requires_grad_()
    y = run(d, SVDD(DDIM(eta=1.0), PosteriorMean(first), M=3), x, time_grid(VP(), 4), grad=True)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.isfinite(g).all() and (g != 0).all()


def test_monte_carlo_value_learns_and_guides():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 32), nn.SiLU(), nn.Linear(32, 1))

        def forward(self, x, t):
            return self.net(torch.cat([x, t[:, None]], 1))[:, 0]

    d, grid = MixtureDenoiser(MIX, VP()), time_grid(VP(), 8)
    for exp in (False, True):
        torch.manual_seed(0)
        v = MonteCarloValue(Net(), exp, 2.0).fit(
            d,
            DDIM(eta=1.0),
            randn(500, 2, dtype=torch.float32),
            grid,
            first,
            200,
            1e-2,
            generator=torch.Generator().manual_seed(0),
            ema=None,
            progress=False,
        )
        x = randn(60, 2, dtype=torch.float32)
        y, z = (
            run(d, SVDD(DDIM(eta=1.0), v, M=8, alpha=2.0), x, grid),
            run(d, DDIM(eta=1.0), x, grid),
        )
        assert first(y).mean() > first(z).mean() + 0.3
        with count_evals(d) as n:
            run(d, SVDD(DDIM(eta=1.0), v, M=8, alpha=2.0), x, grid)
        assert n.rows / 60 == 8
    with pytest.warns(UserWarning, match="alpha=2.0, and is used at alpha=1.0"):
        run(d, SVDD(DDIM(eta=1.0), v, M=2), x, grid)
    with pytest.raises(ValueError, match="not finite"):
        v.fit(d, DDIM(eta=1.0), x, grid, lambda x: torch.full((len(x),), -math.inf), 1)


# --- bad input


@pytest.mark.parametrize(
    "inner,word",
    [
        (DDIM(), "stochastic"),
        (Euler(), "stochastic"),
        (DPMSolverPP(2), "no memory"),
        (DPMSolverPP(2, sde=True), "no memory"),
        (Heun(), "no memory"),
        (TimeShift(DDIM()), "stochastic"),
    ],
)
@pytest.mark.parametrize(
    "make",
    [lambda s: SVDD(s, PosteriorMean(first), M=2), lambda s: RewardSMC(s, PosteriorMean(first))],
    ids=["svdd", "smc"],
)
def test_refused_solvers_cost_nothing(inner, word, make):
    d = MixtureDenoiser(GaussianMixture(torch.zeros(1, 16, dtype=F64), scales=0.7), VP())
    with count_evals(d) as n, pytest.raises(ValueError, match=word):
        run(d, make(inner), randn(3, 16), time_grid(VP(), 4))
    assert n.calls == 0


@pytest.mark.parametrize(
    "make,error,word",
    [
        (lambda: SVDD(DDIM(eta=1.0), PM, M=0), ValueError, "got 0"),
        (lambda: SVDD(DDIM(eta=1.0), PM, M=True), ValueError, "got True"),
        (lambda: SVDD(DDIM(eta=1.0), PM, M=2.0), ValueError, "got 2.0"),
        (lambda: SVDD(DDIM(eta=1.0), PM, alpha=-1.0), ValueError, "got -1.0"),
        (lambda: SVDD(DDIM(eta=1.0), PM, alpha=math.nan), ValueError, "got nan"),
        (lambda: SVDD(DDIM(eta=1.0), PM, alpha="1"), ValueError, "got '1'"),
        (lambda: SVDD(DDIM(eta=1.0), PM, select="best"), ValueError, "'best'"),
        (lambda: SVDD(DDIM(eta=1.0), PM, chunk=0), ValueError, "got 0"),
        (lambda: SVDD(DDIM, PM), TypeError, "Solver instance"),
        (lambda: SVDD(DDIM(eta=1.0), None), TypeError, "got None"),
        (lambda: SVDD(DDIM(eta=1.0), first), TypeError, r"becomes one by PosteriorMean\(reward\)"),
        (lambda: RewardSMC(DDIM(eta=1.0), nn.Linear(2, 1)), TypeError, r"PosteriorMean\(reward\)"),
        (lambda: SVDD(DDIM(eta=1.0), PosteriorMean), TypeError, "class .*PosteriorMean"),
        (lambda: SVDD(DDIM(eta=1.0), MonteCarloValue), TypeError, "class .*MonteCarloValue"),
        (lambda: SVDD(DDIM(eta=1.0), reward=first), TypeError, r"SVDD\(solver, PosteriorMean"),
        (lambda: RewardSMC(DDIM(eta=1.0), reward=first), TypeError, r"RewardSMC\(solver, Post"),
        (lambda: PosteriorMean(None), TypeError, "NoneType"),
        (lambda: PosteriorMean(lambda x, t: x), TypeError, "clean samples .* alone"),
        (lambda: PosteriorMean(nn.Identity), TypeError, "class .*Identity"),
        (lambda: PosteriorMean(PM), TypeError, "clean samples"),
        (lambda: soft_best_of(randn(6, 1), lambda x, t: x, 3), TypeError, "clean samples"),
        (lambda: PosteriorMean(first, -1), ValueError, "got -1"),
        (lambda: PosteriorMean(first, True), ValueError, "got True"),
        (lambda: MonteCarloValue(first), TypeError, "torch module"),
        (lambda: MonteCarloValue(nn.Linear(1, 1), alpha=0.0), ValueError, "got 0.0"),
        (lambda: RewardSMC(DDIM(eta=1.0), PM, alpha=0.0), ValueError, "positive"),
        (lambda: RewardSMC(DDIM(eta=1.0), PM, ess=2.0), ValueError, "got 2.0"),
        (lambda: RewardSMC(DDIM(eta=1.0), PM, groups=0), ValueError, "got 0"),
        (lambda: soft_best_of(randn(6, 1), first, 4), ValueError, "divides"),
        (lambda: soft_best_of(randn(6, 1), first, 0), ValueError, "got 0"),
        (lambda: choose_candidate(randn(4), 1.0), ValueError, "B, M"),
        (lambda: choose_candidate(randn(4, 2), math.inf), ValueError, "got inf"),
        (lambda: soft_mean(randn(3), -1.0), ValueError, "got -1.0"),
        (lambda: PosteriorMean(first)(randn(2, 2), 0.5), ValueError, "prediction at"),
    ],
)
def test_bad_arguments(make, error, word):
    with pytest.raises(error, match=word):
        make()


@pytest.mark.parametrize(
    "reward,word",
    [
        (lambda x: x, r"got \(9, 2\)"),
        (lambda x: x.sum(), r"got \(\): per_sample\(f\)"),
        (lambda x: x[:, :1], r"got \(9, 1\): take \[:, 0\]"),
        (lambda x: None, "got NoneType"),
        (lambda x: (x, x[0]), "got tuple"),
        (lambda x: "good", "got str"),
        (lambda x: first(x) * math.nan, "nan for 9 of 9"),
        (lambda x: first(x) * 0 + math.inf, "inf for 9 of 9"),
        (lambda x: first(x)[:2], r"got \(2,\)"),
    ],
)
def test_bad_rewards(reward, word):
    d = MixtureDenoiser(MIX, VP())
    for value in (PosteriorMean(reward), lambda x, t: reward(x)):
        with pytest.raises((ValueError, TypeError), match="reward or value .*" + word):
            run(d, SVDD(DDIM(eta=1.0), value, M=3), randn(3, 2), time_grid(VP(), 4))
    with pytest.raises((ValueError, TypeError), match=word.replace("9", "6")):
        soft_best_of(randn(6, 2), reward, 3)


def test_a_regression_asks_for_the_reward_before_it_samples():
    d, critic = MixtureDenoiser(MIX, VP()), MonteCarloValue(nn.Linear(2, 1))
    with count_evals(d) as n, pytest.raises(TypeError, match="clean samples"):
        critic.fit(d, DDIM(eta=1.0), randn(3, 2), time_grid(VP(), 4), lambda x, t: first(x))
    assert n.calls == 0


class Module(nn.Module):
    def forward(self, x, t=None):
        return x[:, 0]


class Late(nn.Module):
    def forward(self, x, t):
        return x[:, 0]


def test_whatever_can_be_called_is_a_reward_or_a_value():
    d, grid = MixtureDenoiser(MIX, VP()), time_grid(VP(), 4)
    go = lambda value: run(d, SVDD(DDIM(eta=1.0), value, M=3), randn(3, 2), grid)
    part = functools.partial(torch.select, dim=1, index=0)
    bare = operator.itemgetter((slice(None), 0))  # Python knows no signature of it
    for f in (part, bare, Module(), lambda x: x[:, 0].tolist()):
        assert torch.equal(go(PosteriorMean(f)), go(PM))
    for f in (Late(), Module(), lambda x, *more: x[:, 0]):
        assert torch.equal(go(f), go(lambda x, t: x[:, 0]))

    def looks(x, t, prediction):
        return prediction.x0[:, 0]

    looks.needs_prediction, looks.reward = True, first
    assert torch.equal(go(looks), go(PM))


def test_more_bad_input():
    d, grid = MixtureDenoiser(MIX, VP()), time_grid(VP(), 4)
    with pytest.raises(ValueError, match="completions=3"):
        run(d, SVDD(DDIM(eta=1.0), PosteriorMean(first, 3), M=2), randn(3, 2), grid)
    with pytest.raises(ValueError, match="groups=2"):
        run(d, RewardSMC(DDIM(eta=1.0), PosteriorMean(first), groups=2), randn(3, 2), grid)
    with pytest.raises(ValueError, match="MaskedProcess"):
        run(d, SVDD(Unmask(), PosteriorMean(first), M=2), randn(3, 2), grid)
    with pytest.raises(ValueError, match=r"0\.\.3"):
        run(TABLE, SVDD(Unmask(), PosteriorMean(count), M=2), hidden(2) + 1, SHORT)


def test_under_a_network_in_float32():
    net = NetDenoiser(
        lambda x, t, label: torch.sin(3 * x + label[:, None]) + t[:, None],
        VP(),
        "v",
        null={"label": 0},
    )
    x, y = randn(6, 2, dtype=torch.float32), torch.arange(6)
    states = list(
        trace(
            cfg(net, 2.0),
            SVDD(DDIM(eta=1.0), PosteriorMean(first), M=4),
            x,
            time_grid(VP(), 5),
            cond={"label": y},
            generator=torch.Generator().manual_seed(0),
        )
    )
    assert states[-1].x.dtype == torch.float32 and torch.isfinite(states[-1].x).all()
