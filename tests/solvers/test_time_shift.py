"""Time shift: every process and several inner solvers, saved configurations, the pipeline's
door, the paper's rule on its own list of times, and wrong input."""

import warnings

import pytest
import torch

from diffkit.core.adapters import DiffusersScheduler, _from_config
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import MixtureDenoiser, Prediction, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Heun, sample
from diffkit.solvers.dpm_solver_pp import DPMSingle, DPMSolverPP
from diffkit.solvers.pndm import PLMS, PNDM
from diffkit.solvers.time_shift import TimeShift, coupled_time, epsilon_scale, variance_profile

G = torch.Generator().manual_seed(0)
MIX = GaussianMixture(
    0.6 * torch.randn(4, 48, generator=G, dtype=torch.float64), scales=0.2, labels=[0, 0, 1, 1]
)
X = torch.randn(10, 48, generator=G, dtype=torch.float64)
NOISE = torch.randn(9, 10, 48, generator=G, dtype=torch.float64)
PROCESSES = [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()]


def run(d, solver, steps=9, x=X, **kw):
    p = d.process
    return sample(
        d,
        solver,
        x * p.sigma(p.t_max),
        time_grid(p, steps, "uniform", p.t_max, max(p.t_min, 1e-3)),
        progress=False,
        generator=torch.Generator().manual_seed(0),
        **kw,
    )


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize("mode", ["paper", "network", "official"])
@pytest.mark.parametrize(
    "inner",
    [
        DDIM,
        lambda: Ancestral(noise=NOISE),
        Heun,
        lambda: DPMSolverPP(3),
        lambda: DPMSingle(2),
        lambda: PLMS(4),
        lambda: PNDM(4),
    ],
    ids=["DDIM", "Ancestral", "Heun", "3M", "2S", "PLMS4", "F-PNDM"],
)
def test_every_process_mode_and_inner_solver(process, mode, inner):
    d = MixtureDenoiser(MIX, process)
    kw = dict(mode=mode, window=0.2, cutoff=0.1, data_var=0.3 if mode == "official" else None)
    s = TimeShift(inner(), **kw)
    out = run(d, s)
    assert torch.isfinite(out).all() and s.shifts.shape == (9, 10) and s.shifts.abs().max() > 0
    # float32, through a rule that divides by differences of times
    assert (run(d, TimeShift(inner(), **kw), x=X.float()).double() - out).abs().max() < 5e-3 * (
        1 + out.abs().max()
    )
    assert torch.equal(run(d, TimeShift(inner(), **{**kw, "cutoff": 1.0})), run(d, inner()))


def test_neighbours_and_order_do_not_matter_under_guidance():
    d, y = cfg(MixtureDenoiser(MIX, VP()), 2.0), torch.arange(10) % 2
    out = run(d, TimeShift(DPMSolverPP(2)), cond={"label": y})
    torch.testing.assert_close(
        run(d, TimeShift(DPMSolverPP(2)), x=X[2:5], cond={"label": y[2:5]}), out[2:5]
    )
    both, flip = (
        run(d, TimeShift(reduce="batch"), x=x, cond={"label": v})
        for x, v in ((X, y), (X.flip(0), y.flip(0)))
    )
    torch.testing.assert_close(flip, both.flip(0))


def test_the_rule_is_the_papers_on_a_list_of_1000_times():
    "The paper's loop: argmin of |sigma^2 - v| over whole training steps in the window."
    p, w = Discrete(), 40
    var = 1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    for t in (350, 500, 700):
        ours = 1000 * coupled_time(X * 0.9, (t + 1) / 1000, p, w / 1000) - 1
        for x, u in zip(X * 0.9, ours):
            paper = t - w // 2 + (var[t - w // 2 : t + w // 2 + 1] - x.var()).abs().argmin()
            assert abs(u - paper) <= 1


def test_a_saved_configuration_brings_the_solver_back():
    for s in (
        TimeShift(),
        TimeShift(
            DPMSolverPP(2),
            window=0.1,
            cutoff=0.5,
            mode="network",
            data_var="predicted",
            reduce="batch",
        ),
        TimeShift(TimeShift(PLMS(2))),
    ):
        assert repr(_from_config(s.config())) == repr(s)


def test_a_pipeline_that_asks_for_the_coupled_time():
    """A pipeline's own loop, with the network told another time, is mode='network' with one
    time for all."""
    pytest.importorskip("diffusers")
    sch = DiffusersScheduler(DPMSolverPP(2), beta_schedule="linear", beta_start=1e-4, beta_end=0.02)

    class Eps(MixtureDenoiser):
        def forward(self, x, t, label=None):
            return Prediction.of(x, t, self.process, eps=super().forward(x, t, label).eps)

    d, w, cut = Eps(MIX, sch.process), 0.04, 0.3
    sch.set_timesteps(10)
    want = sample(
        d,
        TimeShift(sch.solver, window=w, cutoff=cut, mode="network", reduce="batch"),
        X,
        sch.grid,
        progress=False,
    )
    sch.set_timesteps(10)
    y, told, times = X, 1.0, sch.grid.tolist()
    for i, t in enumerate(sch.timesteps):
        y = sch.step(d(y, told).eps, t, y).prev_sample
        s = times[i + 1]
        told = float(coupled_time(y, s, sch.process, w, reduce="batch")) if s > cut and i < 9 else s
    torch.testing.assert_close(y, want, rtol=1e-6, atol=1e-6)


def test_few_dimensions():
    d = MixtureDenoiser(GaussianMixture(torch.eye(2, dtype=torch.float64), scales=0.2), VP())
    x = X[:, :2]
    with pytest.warns(UserWarning, match="reduce='batch'"):
        run(d, TimeShift(reduce="sample"), x=x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        s = TimeShift()
        run(d, s, x=x)
    assert (s.shifts == s.shifts[:, :1]).all()
    with pytest.raises(ValueError, match="at least 2"):
        run(
            MixtureDenoiser(GaussianMixture(torch.zeros(1, 1), scales=0.2), VP()),
            TimeShift(),
            x=x[:, :1],
        )


def test_the_profile_of_an_exact_sampler_is_flat():
    """Many steps with the exact denoiser: the states have the variance of noised data, within
    the error of 400 samples of 48 values."""
    g = torch.Generator().manual_seed(1)
    clean = MIX.sample(4000, g)[0].double()
    x, p = torch.randn(400, 48, generator=g, dtype=torch.float64), VP()
    forward, got = variance_profile(
        MixtureDenoiser(MIX, p), DPMSolverPP(2), x, time_grid(p, 40), clean
    )
    assert ((got / forward - 1).abs() < 4 * (2 / 48 / 400) ** 0.5 + 0.02).all()


def test_epsilon_scale_is_the_division_of_the_noise():
    for p in PROCESSES:
        d = MixtureDenoiser(MIX, p)
        torch.testing.assert_close(epsilon_scale(d, 0.01)(X, 0.4).eps, d(X, 0.4).eps / 1.01)
    assert (
        epsilon_scale(MixtureDenoiser(MIX, VP()), 0.01)(X.float(), torch.full((10,), 0.4)).x0.dtype
        == torch.float32
    )


@pytest.mark.parametrize(
    "make,error,says",
    [
        (lambda: TimeShift("ddim"), TypeError, "'ddim'"),
        (lambda: TimeShift(window=-1), ValueError, "got -1"),
        (lambda: TimeShift(cutoff=1.2), ValueError, "got 1.2"),
        (lambda: TimeShift(mode="x"), ValueError, "'x'"),
        (lambda: TimeShift(reduce="all"), ValueError, "'all'"),
        (lambda: TimeShift(data_var=-0.1), ValueError, "got -0.1"),
        (lambda: TimeShift(mode="official", data_var="predicted"), ValueError, "must be a number"),
        (
            lambda: run(MixtureDenoiser(MIX, EDM()), TimeShift(data_var=0.0)),
            ValueError,
            "needs data_var",
        ),
        (
            lambda: run(MixtureDenoiser(MIX, Flow()), TimeShift(mode="official")),
            ValueError,
            "needs data_var",
        ),
        (lambda: coupled_time(X, -0.1, VP()), ValueError, "got -0.1"),
        (lambda: coupled_time(X, 0.5, VP(), window=-0.1), ValueError, "got -0.1"),
        (lambda: epsilon_scale(MixtureDenoiser(MIX, VP()), -2.0), ValueError, "got -2.0"),
    ],
)
def test_bad_input(make, error, says):
    with pytest.raises(error, match=says):
        make()


def test_official_is_the_published_loop_with_whole_training_steps():
    """Written after the published sampler: the first step is not shifted, later ones go to the
    step of the table, within half a window of the target, whose variance is nearest to the state's;
    steps up to the cutoff stay. Both ends of the table are met."""
    T, w, cut = 1000, 40, 300
    var = 1 - torch.cumprod(1 - torch.linspace(1e-4, 0.02, T, dtype=torch.float64), 0)
    for times in ([999, 990, 975, 700, 500, 320, 301, 300, 120, 10, 0], list(range(999, -1, -111))):
        d = MixtureDenoiser(MIX, Discrete())
        x = X * torch.linspace(0.6, 1.4, len(X), dtype=torch.float64)[:, None]
        y, moved = x, []
        for n, (i, j) in enumerate(zip(times, times[1:])):
            target = torch.full((len(y),), j)
            if n > 0 and j > cut:
                near = torch.arange(max(j - w // 2, 0), min(j + w // 2, T - 1) + 1)
                target = near[(var[near] - y.var(1, keepdim=True)).abs().argmin(1)]
            a, b = (1 - var[i]), (1 - var[target])[:, None]
            x0 = d(y, (i + 1) / T).x0
            eps = (y - a.sqrt() * x0) / (1 - a).sqrt()
            y = b.sqrt() * x0 + (1 - b).sqrt() * eps
            moved.append((target - j).double() / T)
        kw = dict(window=w / T, cutoff=(cut + 1) / T, mode="official", n_train=T)
        s = TimeShift(**kw)
        grid = (torch.tensor(times, dtype=torch.float64) + 1) / T
        got = sample(d, s, x, grid, progress=False)
        torch.testing.assert_close(s.shifts, torch.stack(moved), rtol=0, atol=1e-12)
        torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-10)
        assert (s.shifts[0] == 0).all() and (s.shifts != 0).any()


def test_times_of_a_history_keep_their_distance():
    "A multistep solver's nodes move by at most 0.4 of the nearest gap of the grid, each way."
    grid = torch.tensor([1.0, 0.9, 0.6, 0.5, 0.45, 0.1, 0.001], dtype=torch.float64)
    low, high = torch.full((2, 20), 1e-6).double(), 9 * torch.randn(2, 20).double()
    for inner, share in ((PLMS(2), 0.4), (DDIM(), None)):
        s = TimeShift(inner, window=2.0, cutoff=0.0)
        s.start(VP(), grid)
        s.times = grid.tolist()
        for i in range(1, 5):
            s.i = i
            up, down = s.times[i - 1] - s.times[i], s.times[i] - s.times[i + 1]
            up, down = (up, down) if share is None else (share * min(up, down),) * 2
            for x, edge in ((low, -down), (high, up)):
                got = s._couple(x, s.times[i]) - s.times[i]
                torch.testing.assert_close(got, torch.full((2,), edge).double())


@pytest.mark.parametrize("n_train", [0, -1, 2.5, "all"])
def test_the_search_over_steps_wants_a_number_of_steps(n_train):
    for make in (
        lambda: TimeShift(n_train=n_train),
        lambda: coupled_time(X, 0.5, VP(), n_train=n_train),
    ):
        with pytest.raises(ValueError, match="n_train must be a whole number from 1 on"):
            make()


def noisy_var(process, tau, v0):  # of data whose pixels have the variance v0
    return process.sigma(tau).square() + process.alpha(tau).square() * v0


def states(var):
    "One state for each variance over its pixels, whatever their mean."
    z = torch.randn(len(var), 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True)
    return z * var.sqrt()[:, None] + torch.linspace(-2, 2, len(var), dtype=torch.float64)[:, None]


V0 = torch.linspace(0.05, 0.5, 12, dtype=torch.float64)
KNOWN = {  # how the variance of clean data may be given, and what it is for each of 12 samples
    "paper": ({}, 0 * V0),
    "number": (dict(data_var=0.3), 0 * V0 + 0.3),
    "each": (dict(data_var=V0), V0),
    "predicted": (dict(x0=states(V0).flip(1)), V0),
}


@pytest.mark.parametrize("process", [VP(), Cosine(), Discrete(), Flow(), EDM()], ids=repr)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("n_train, window", [(1000, 0.04), (1000, 0.0), (40, 0.3), (7, 0.5)])
def test_the_search_over_training_steps_by_loops(process, known, n_train, window):
    """The step within half a window of t, both ends included and cut off at 1 and n_train, whose
    noisy data have the variance nearest to the state's."""
    kw, v0 = KNOWN[known]
    half = int(window / 2 * n_train + 1e-9)
    for middle in (1, n_train // 2, n_train - 3, n_train):
        spread = torch.linspace(-1.3, 1.3, len(v0), dtype=torch.float64) * window / 2
        aim = (middle / n_train + spread).clamp(0.3 / n_train, 1)  # some beyond the window
        var = noisy_var(process, aim, v0)

        def nearest(v, w, middle=middle):
            steps = range(max(middle - half, 1), min(middle + half, n_train) + 1)
            all_vars = noisy_var(process, torch.tensor(steps, dtype=torch.float64) / n_train, w)
            return min(zip((all_vars - v).abs().tolist(), steps))[1] / n_train

        args = states(var), middle / n_train, process, window
        got = coupled_time(*args, n_train=n_train, **kw)
        assert got.tolist() == pytest.approx([nearest(v, w) for v, w in zip(var, v0)], rel=1e-12)
        one = coupled_time(*args, n_train=n_train, reduce="batch", **kw)
        assert one.shape == () and one.item() == pytest.approx(nearest(var.mean(), v0.mean()))


@pytest.mark.parametrize("process", [VP(), VE(), Flow(), EDM()], ids=repr)
@pytest.mark.parametrize("known", KNOWN)
@pytest.mark.parametrize("window", [0.01, 0.04, 0.2])
def test_the_coupled_time_is_the_root_in_all_parts_of_the_window(process, known, window):
    """From the first cell of 256 to the last; the window's own ends where the root lies beyond;
    the ends of the process where they cut the window. In a cell of width h a secant of the variance
    f misses its root by h^2 |f'' / f'| / 8 at most, and |f'' / f'| is below 25 here."""
    kw, v0 = KNOWN[known]
    for t in (0.5, 0.7, 0.995):
        lo = max(t - window / 2, process.t_min)
        hi = min(t + window / 2, max(process.t_max, t))
        cell = (hi - lo) / 256
        inside = [0.3, 0.7, 1.4, 100.2, 128.5, 254.6, 255.1, 255.4, 255.6, 255.9]
        aim = lo + torch.tensor([-3.0, *inside, 259.0], dtype=torch.float64) * cell
        want = aim.clamp(lo, hi)
        var = noisy_var(process, aim.clamp(max=1.0), v0)
        var[-1] += 1e-3  # beyond the end of the process, too
        error = coupled_time(states(var), t, process, window, **kw) - want
        assert error.abs().max() <= 25 * cell**2 / 8 + 1e-12
        # one time for all: that of the mean variances
        for k in inside:
            tau = torch.tensor(lo + k * cell, dtype=torch.float64)
            spread = torch.linspace(0.5, 1.5, 12, dtype=torch.float64)  # of mean 1
            x = states(noisy_var(process, tau, v0.mean()) * spread)
            one = coupled_time(x, t, process, window, reduce="batch", **kw)
            assert one.shape == () and abs(one - tau) <= 25 * cell**2 / 8 + 1e-12


@pytest.mark.parametrize("process", [VP(), Discrete(), Flow()], ids=repr)
@pytest.mark.parametrize("data_var", [0.1, 0.36, 0.6])
def test_official_with_data_of_their_own_variance(process, data_var):
    "The published loop on any process: DDIM whose targets from the second on are searched."
    d, T, w, cut = MixtureDenoiser(MIX, process), 100, 10, 20
    steps = [95, 80, 65, 50, 35, 25, 20, 10, 1]
    x = X * float(process.sigma(0.95))
    y, moved = x, []
    for n, (i, j) in enumerate(zip(steps, steps[1:])):
        target = torch.full((len(y),), j, dtype=torch.float64)
        if n > 0 and j > cut:
            near = torch.arange(j - w // 2, j + w // 2 + 1, dtype=torch.float64)
            gap = noisy_var(process, near / T, data_var) - y.var(1, keepdim=True)
            target = near[gap.abs().argmin(1)]
        p, u = d(y, i / T), target[:, None] / T
        y = process.alpha(u) * p.x0 + process.sigma(u) * p.eps
        moved.append((target - j) / T)
    s = TimeShift(window=w / T, cutoff=cut / T, mode="official", data_var=data_var, n_train=T)
    got = sample(d, s, x, torch.tensor(steps, dtype=torch.float64) / T, progress=False)
    torch.testing.assert_close(s.shifts, torch.stack(moved), rtol=0, atol=1e-12)
    torch.testing.assert_close(got, y, rtol=1e-10, atol=1e-10)
    assert (s.shifts != 0).any()
