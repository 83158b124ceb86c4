"""A run's state belongs to the run: two at a time, broken off, in threads; and ends are found by
the noise level, not by their position."""

import threading

import diffkit as dk
import pytest
import torch

GM = dk.four_gaussians()
MODEL = dk.MixtureDenoiser(GM, dk.VP())
GRID = dk.time_grid(dk.VP(), 8, end=0.05)
X, Y = torch.randn(2, 32, 2, generator=torch.Generator().manual_seed(0)).double().unbind(0)
SOLVERS = {
    "2M": lambda: dk.DPMSolverPP(2),
    "UniPC": lambda: dk.UniPC(2),
    "DEIS": lambda: dk.DEIS(3, "flow"),
    "PLMS": lambda: dk.PLMS(4),
    "PNDM": lambda: dk.PNDM(),
    "heavy ball": lambda: dk.HeavyBall(dk.DPMSolverPP(2), 0.8),
    "time shift": lambda: dk.TimeShift(dk.DPMSolverPP(2)),
}


def ends(solver, x, denoiser=MODEL):
    return dk.sample(denoiser, solver, x, GRID, progress=False)


@pytest.mark.parametrize("name", SOLVERS)
def test_two_runs_of_one_solver_do_not_mix(name):
    make = SOLVERS[name]
    want = ends(make(), X), ends(make(), Y)
    one = make()
    a, b = (dk.trace(MODEL, one, v, GRID) for v in (X, Y))
    for s, u in zip(a, b):  # in turns
        last = s.x, u.x
    torch.testing.assert_close(last, want, rtol=0, atol=0)
    out = [None, None]

    def work(k, x):
        out[k] = ends(one, x)

    threads = [threading.Thread(target=work, args=(k, x)) for k, x in enumerate((X, Y))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    torch.testing.assert_close(tuple(out), want, rtol=0, atol=0)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_run_that_is_broken_off_leaves_nothing_behind(name):
    one = SOLVERS[name]()
    before = dict(one.__dict__)
    for i, _ in enumerate(dk.trace(MODEL, one, X, GRID)):
        if i == 3:
            break
    assert one.__dict__ == before
    torch.testing.assert_close(ends(one, X), ends(SOLVERS[name](), X), rtol=0, atol=0)


@pytest.mark.parametrize("solver", [dk.Ancestral(), dk.EulerMaruyama(), dk.DDIM(eta=1.0)])
def test_a_run_that_stops_at_noise_has_the_variance_of_that_time(solver):
    # data N(0, 1): the standard deviation is 1 at all times
    d = dk.MixtureDenoiser(dk.GaussianMixture(torch.zeros(1, 1).double(), scales=1.0), dk.VP())
    g = torch.Generator().manual_seed(0)
    x, grid = torch.randn(100_000, 1, generator=g).double(), dk.time_grid(dk.VP(), 100)
    half = dk.sample(d, solver, x, grid[:51], generator=g, progress=False)
    # Euler's error in 100 steps is about a hundredth
    assert half.std().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("make", [dk.Ancestral, dk.EulerMaruyama, lambda: dk.DDIM(eta=1.0)])
def test_a_split_run_is_the_unsplit_one(make):
    g = lambda: torch.Generator().manual_seed(1)
    whole = dk.sample(MODEL, make(), X, GRID, generator=g(), progress=False)
    one = g()
    first = dk.sample(MODEL, make(), X, GRID[:5], generator=one, progress=False)
    both = dk.sample(MODEL, make(), first, GRID[4:], generator=one, progress=False)
    torch.testing.assert_close(both, whole, rtol=1e-12, atol=1e-12)


def test_one_generator_a_sample_does_not_depend_on_the_batch():
    gens = lambda ks: [torch.Generator().manual_seed(k) for k in ks]
    run = lambda x, ks: dk.sample(
        MODEL, dk.Ancestral(), x, GRID, generator=gens(ks), progress=False
    )
    torch.testing.assert_close(run(X[:4], range(4))[2:3], run(X[2:3], [2]))
    with pytest.raises(ValueError, match="generator has 2 entries"):
        run(X[:4], [0, 1])


def test_guidances_that_remember_keep_their_runs_apart():
    null = dict(label=torch.full((1,), -1))
    labels = torch.arange(32) % 4

    class Null(dk.Denoiser):  # the mixture's law of a class, or of all
        def __init__(self):
            super().__init__()
            self.inner, self.process, self.null = MODEL, MODEL.process, null

        def forward(self, x, t, label=None):
            return self.inner(x, t, label=None if (label < 0).all() else label)

    d = dk.apg(Null(), 3.0, beta=-0.5)
    cond = dict(label=labels)
    solo = lambda x: dk.sample(d, dk.DDIM(), x, GRID, cond=cond, progress=False)
    want = solo(X), solo(Y)
    for s, u in zip(*(dk.trace(d, dk.DDIM(), v, GRID, cond=cond) for v in (X, Y))):
        last = s.x, u.x
    torch.testing.assert_close(last, want, rtol=0, atol=0)


def test_what_a_run_found_is_read_from_the_solver():
    s = dk.TimeShift(dk.DDIM())
    with pytest.raises(AttributeError, match="shifts|_shifts"):
        s.shifts  # noqa: B018
    ends(s, X)
    assert len(s.shifts) == 8
    d = dk.stitch([MODEL, MODEL], 0.5)
    ends(dk.DDIM(), X, d)
    assert d.outcome.calls == [4, 4]


class Drawing(dk.MixtureDenoiser):  # a model that draws noise of its own
    stochastic = True


def test_what_draws_is_refused_by_what_remembers():
    "A guidance by a model that draws draws; momentum remembers at order 1, too."
    mix = dk.GaussianMixture(torch.zeros(1, 2), scales=0.5)
    good, bad = dk.MixtureDenoiser(mix, dk.VP()), Drawing(mix, dk.VP())
    x, grid = torch.randn(4, 2), dk.time_grid(dk.VP(), 4)
    for d in (bad, dk.contrast(good, bad, 1.0), dk.contrast(bad, good, 1.0)):
        for solver in (dk.GHVB(1, 0.5), dk.HeavyBall(dk.DDIM(), 0.5)):
            with pytest.raises(ValueError, match="combines several"):
                dk.sample(d, solver, x, grid, progress=False)
        for solver in (dk.GHVB(1, 1.0), dk.HeavyBall(dk.DDIM(), 1.0), dk.DDIM()):
            dk.sample(d, solver, x, grid, progress=False)


@pytest.mark.parametrize("solver", [dk.Ancestral(), dk.EulerMaruyama(), dk.DDIM(eta=0.5)], ids=repr)
def test_noise_of_another_law_is_refused_before_any_evaluation(solver):
    "PFGM++'s noise is Student's: a solver that adds Gaussian noise does not begin."
    process = dk.HeavyTailed(dk.VP(), 8)
    mix = dk.GaussianMixture(torch.zeros(1, 2), scales=0.5)
    d = dk.Counter(dk.FieldDenoiser(mix, process))
    x, grid = torch.randn(4, 2), dk.time_grid(process, 4)
    with pytest.raises(ValueError, match="Gaussian"):
        dk.sample(d, solver, x, grid, progress=False)
    assert d.calls == 0
    dk.sample(d, dk.DDIM(), x, grid, progress=False)
    assert d.calls == 4
    with pytest.raises(ValueError, match="FieldDenoiser"):  # the exact denoiser is another one
        dk.MixtureDenoiser(mix, process)


@pytest.mark.parametrize("solver", [dk.Euler(), dk.DDIM(), dk.DPMSolverPP(2)], ids=repr)
@pytest.mark.parametrize("process", [dk.Discrete(), dk.VP()], ids=repr)
def test_a_grid_in_float32_is_the_grid(solver, process):
    """Its times are read as the decimals that they print as. Rounded to float32 they would lie just
    below or above the training steps of a table, where its slope jumps."""
    d = dk.MixtureDenoiser(GM, process)
    grid = torch.tensor([1.0, 0.75, 0.543, 0.3, 0.101, 0.01], dtype=torch.float64)
    go = lambda g: dk.sample(d, solver, X, g, progress=False)
    assert torch.equal(go(grid.float()), go(grid))
    assert torch.equal(go(grid.float().numpy()), go(grid.tolist()))
