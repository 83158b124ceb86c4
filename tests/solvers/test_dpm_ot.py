"""DPM-OT: the semi-discrete solve against POT and against theory, on every source and process,
its bad input, its memory, and the jump in front of every solver."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffkit.core.data import ring
from diffkit.core.denoiser import MixtureDenoiser, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Heun, sample
from diffkit.core.training import load_tensors, save_tensors
from diffkit.solvers import dpm_ot
from diffkit.solvers.deis import DEIS
from diffkit.solvers.dpm_ot import (
    SemiDiscreteOT,
    identity_kept,
    mass_bound,
    mode_mixture,
    noised_targets,
    novelty,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP


def gen(s=0):
    return torch.Generator().manual_seed(s)


Y = 2 * torch.randn(8, 2, generator=gen(0), dtype=torch.float64)


def test_pot_finds_the_same_potential():
    pot = pytest.importorskip("ot").semidiscrete
    ours, rng = SemiDiscreteOT(Y).fit(600, 4096, generator=gen(1)), gen(2)
    g = pot.solve_semidiscrete(
        Y,
        lambda n: torch.randn(n, 2, generator=rng, dtype=torch.float64),
        batch_size=4096,
        max_iter=1500,
        reg=0.0,
        decreasing_reg=False,
        lr0=20.0,
    )
    h = (g - Y.square().sum(1)) / 2
    assert_close(ours.h, h - h.mean(), rtol=0.0, atol=0.02 * ours.h.abs().max().item())
    x = ours.draw(500, gen(3))
    g = 2 * ours.h + Y.square().sum(1)
    assert_close(pot.semidiscrete_ot_map(Y, x, g), ours(x))
    assert_close(pot.semidiscrete_atom_weights(Y, x, g).argmax(1), ours.assign(x))


def test_the_energy_has_the_histogram_as_gradient():
    o, x = SemiDiscreteOT(Y), torch.randn(4000, 2, generator=gen(4), dtype=torch.float64)
    o.h.copy_(torch.randn(8, generator=gen(5), dtype=torch.float64))
    h = o.h.clone().requires_grad_()
    energy = (x @ Y.T + h).amax(1).mean() - (o.weights * h).sum()
    assert_close(
        torch.autograd.grad(energy, h)[0],
        torch.bincount(o.assign(x), minlength=8) / 4000 - o.weights,
    )


def test_weak_duality_holds_for_every_potential():
    o = SemiDiscreteOT(Y).fit(400, 4096, generator=gen(6))
    best = o.cost(50_000, gen(7))[0]
    for s in range(5):
        o.h.copy_(3 * torch.randn(8, generator=gen(s), dtype=torch.float64))
        assert o.cost(50_000, gen(7))[1] < best * 1.01


def test_uneven_weights_and_uniform_source():
    w = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    y = torch.tensor([[0.0], [1.0], [3.0]], dtype=torch.float64)
    o = SemiDiscreteOT(y, w, source="uniform").fit(400, 4096, generator=gen(0))
    # quantiles of the uniform law
    assert_close(
        torch.stack([(o.h[0] - o.h[1]) / 1, (o.h[1] - o.h[2]) / 2]),
        torch.tensor([0.5, 0.8], dtype=torch.float64),
        rtol=0.0,
        atol=5e-3,
    )
    assert_close(o.cell_mass(100_000, gen(1)), w, rtol=0.0, atol=0.01)


def test_sampling_noise_of_the_masses():
    o = SemiDiscreteOT(Y).fit(400, 4096, generator=gen(0))
    norms = torch.stack(
        [(o.cell_mass(1000, gen(s)) - o.weights).square().sum() for s in range(200)]
    )
    assert_close(norms.mean().item(), (1 - 1 / 8) / 1000, rtol=0.2, atol=0.0)


def test_tolerance_stops_and_patience_doubles_the_batch():
    o = SemiDiscreteOT(Y).fit(400, 4096, tol=0.05, average=False, generator=gen(0))
    assert len(o.norms) < 400 and o.norms[-1] < 0.05 <= min(o.norms[:-1])
    h = o.h.clone()
    assert_close(o.fit(400, 4096, tol=10.0, generator=gen(0)).h, h)  # good already: nothing is done
    seen = []

    def source(n, g):
        seen.append(n)
        return torch.randn(n, 2, generator=g, dtype=torch.float64)

    SemiDiscreteOT(Y, source=source).fit(200, 64, patience=10, generator=gen(0))
    assert seen[0] == 64 and seen[-1] == 512 and sorted(set(seen)) == [64, 128, 256, 512]


@pytest.mark.parametrize("patience", [1, 4, 7, None])
@pytest.mark.parametrize("lr", [0.01, 0.003])
def test_every_step_that_is_not_better_counts_for_patience(lr, patience):
    """All source points lie in one cell and stay there, so that the masses' error never changes: an
    equal norm is no better one. The first step is the best so far; `patience` steps later the batch
    doubles and lr falls, three times. h follows by hand: Adam without bias correction on a constant
    gradient."""
    seen, iters = [], 30

    def source(n, g):
        seen.append(n)
        return torch.ones(n, 1, dtype=torch.float64)

    y = torch.tensor([[0.0], [100.0]], dtype=torch.float64)
    o = SemiDiscreteOT(y, source=source)
    o.fit(iters, 4, lr=lr, average=False, patience=patience)
    h, drops = 0.0, []
    for k in range(1, iters + 1):
        drops.append(min(max(k - 2, 0) // patience, 3) if patience else 0)
        first, second = (1 - 0.9**k) / 2, (1 - 0.999**k) / 4
        h += lr * 0.8 ** drops[-1] * first / (second**0.5 + 1e-8)
    assert seen == [4 * 2**d for d in drops]  # one batch a step
    assert o.norms == pytest.approx([0.5**0.5] * iters, rel=1e-15)
    assert_close(o.h, torch.tensor([h, -h], dtype=torch.float64), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("n", [1, 6, 7, 20])
def test_masses_and_cost_are_those_of_n_points_in_blocks(monkeypatch, n):
    "What is drawn is n points, at most 7 at a time, and every one counts once."
    drawn = []

    def source(n, g):
        drawn.append(torch.randn(n, 2, generator=g, dtype=torch.float64))
        return drawn[-1]

    w = torch.arange(1, 9, dtype=torch.float64) / 36
    o = SemiDiscreteOT(Y, w, source=source)
    o.h.copy_(torch.randn(8, generator=gen(5), dtype=torch.float64))
    monkeypatch.setattr(dpm_ot, "_ELEMENTS", 14)  # 7 rows of 2 numbers
    mass, (paid, offer) = o.cell_mass(n, gen(1)), o.cost(n, gen(1))
    sizes = [min(7, n - i) for i in range(0, n, 7)]
    assert [len(x) for x in drawn] == 2 * sizes
    x = torch.cat(drawn[: len(sizes)])
    value, cell = (x @ Y.T + o.h).max(1)
    assert_close(mass, torch.tensor([(cell == i).sum() / n for i in range(8)]).double())
    assert paid == pytest.approx((x - Y[cell]).square().sum(1).mean().item(), rel=1e-12)
    # the dual: mean of min_i |x - y_i|^2 - g_i, and the weighted mean of g
    g = 2 * o.h + Y.square().sum(1)
    dual = (torch.cdist(x, Y).square() - g).amin(1).mean() + (w * g).sum()
    assert offer == pytest.approx(dual.item(), rel=1e-12)


def test_blocks_change_nothing(monkeypatch):
    y, x = torch.randn(70, 5, generator=gen(0)), torch.randn(333, 5, generator=gen(1))
    o = SemiDiscreteOT(y).fit(20, 256, generator=gen(2))
    whole = (
        o.assign(x),
        novelty(x, y),
        mass_bound(y, o.cell_mass(1000, gen(3)), o.weights),
        identity_kept(VP(), y, 0.3, gen(4)),
    )
    monkeypatch.setattr(dpm_ot, "_ELEMENTS", 100)
    assert torch.equal(o.assign(x), whole[0])
    assert_close(novelty(x, y), whole[1])
    assert identity_kept(VP(), y, 0.3, gen(4)) == whole[3]
    assert o.assign(x[:0]).shape == novelty(x[:0], y).shape == (0,)


def test_a_jump_ignores_the_global_state_and_the_dtype_of_noise():
    o = SemiDiscreteOT(Y).fit(20, 256, generator=gen(0))
    torch.manual_seed(1)
    assert torch.equal(SemiDiscreteOT(Y).fit(20, 256, generator=gen(0)).h, o.h)
    x = torch.randn(50, 2, generator=gen(1))
    assert o(x).dtype == torch.float64 and torch.equal(o(x), o(x.double()))
    assert torch.equal(o(x), Y[o.assign(x)])


def test_a_solved_problem_survives_saving(tmp_path):
    o = SemiDiscreteOT(Y).fit(50, 512, generator=gen(0))
    save_tensors(tmp_path / "solved.safetensors", o.state_dict())
    t, _ = load_tensors(tmp_path / "solved.safetensors")
    p = SemiDiscreteOT(t["targets"], t["weights"])
    p.load_state_dict(t)
    x = o.draw(200, gen(1))
    assert torch.equal(p(x), o(x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        SemiDiscreteOT(Y[:5]).load_state_dict(t)


@pytest.mark.parametrize("process", [VP(), Cosine(), Discrete(), VE(), EDM(), Flow()], ids=repr)
def test_the_jump_starts_every_solver_on_every_process(process):
    gm = ring(6)
    d, t = MixtureDenoiser(gm, process), 0.35
    y = noised_targets(process, gm.sample(60, gen(0))[0], t, generator=gen(1))
    o = SemiDiscreteOT(y, source=process).fit(250, 2048, generator=gen(2))
    assert (o.cell_mass(40_000, gen(3)) - o.weights).abs().sum() / 2 < 0.1
    x = process.prior((20, 2), gen(4), dtype=torch.float64)
    for make in (DDIM, Heun, Ancestral, lambda: DPMSolverPP(3), lambda: DEIS(2)):
        out = sample(
            d,
            make(),
            o(x),
            time_grid(process, 6, "log_snr", start=t),
            generator=gen(5),
            progress=False,
        )
        assert out.shape == x.shape and torch.isfinite(out).all()
        assert (out.norm(dim=1) - 1).abs().median() < 0.2  # at the ring
    guided = sample(
        cfg(d, 2.0),
        DDIM(),
        o(x),
        time_grid(process, 6, "log_snr", start=t),
        cond={"label": torch.arange(20) % 6},
        progress=False,
    )
    assert torch.isfinite(guided).all()


def test_law_of_the_jump_is_the_law_of_a_random_target():
    o = SemiDiscreteOT(Y).fit(600, 4096, generator=gen(0))
    count = torch.bincount(o.assign(o.draw(8000, gen(1))), minlength=8)
    chi2 = ((count - 1000).square() / 1000).sum().item()
    assert chi2 < 24.3  # 99.9 % quantile with 7 degrees of freedom


def test_mass_bound_covers_the_exact_distance():
    pot = pytest.importorskip("ot")
    for s in range(10):
        y, (a, b) = (
            torch.randn(12, 3, generator=gen(s), dtype=torch.float64),
            torch.rand(2, 12, generator=gen(s + 50), dtype=torch.float64),
        )
        a, b = a / a.sum(), b / b.sum()
        assert math.sqrt(
            pot.emd2(a.numpy(), b.numpy(), torch.cdist(y, y).square().numpy())
        ) <= mass_bound(y, a, b)


def test_images_keep_their_shape():
    y = torch.randn(30, 1, 4, 4, generator=gen(0))
    o = SemiDiscreteOT(y).fit(20, 256, generator=gen(1))
    x = o.draw(7, gen(2))
    assert x.shape == o(x).shape == (7, 1, 4, 4) and "30 targets" in repr(o)
    flat = SemiDiscreteOT(y.flatten(1))
    flat.h.copy_(o.h)
    assert torch.equal(flat(x.flatten(1)), o(x).flatten(1))


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: SemiDiscreteOT([[1.0], [2.0]]), TypeError, "list"),
        (lambda: SemiDiscreteOT(torch.arange(6).reshape(3, 2)), TypeError, "int64"),
        (lambda: SemiDiscreteOT(torch.randn(3)), ValueError, r"\(3,\)"),
        (lambda: SemiDiscreteOT(torch.tensor([[1.0], [math.nan]])), ValueError, "finite"),
        (lambda: SemiDiscreteOT(torch.tensor([[1.0], [1.0], [2.0]])), ValueError, "1 duplicates"),
        (lambda: SemiDiscreteOT(Y, torch.tensor([1.0])), ValueError, r"\(1,\)"),
        (lambda: SemiDiscreteOT(Y[:2], torch.tensor([1.5, -0.5])), ValueError, "-0.5"),
        (lambda: SemiDiscreteOT(Y[:2], torch.tensor([0.5, 0.6])), ValueError, "sum 1.1$"),
        (lambda: SemiDiscreteOT(Y[:2], torch.tensor([0.5, 0.4])), ValueError, "sum 0.9$"),
        (lambda: SemiDiscreteOT(Y[:2], torch.tensor([1.0, 0.0])), ValueError, "smallest 0, sum 1$"),
        (lambda: SemiDiscreteOT(Y, source="gauss"), ValueError, "'gauss'"),
        (
            lambda: SemiDiscreteOT(Y, source=lambda n, g: torch.randn(n, 3)).fit(2, 8),
            ValueError,
            "what source returns",
        ),
        (lambda: SemiDiscreteOT(Y).fit(0), ValueError, "iters"),
        (lambda: SemiDiscreteOT(Y).fit(2, 0), ValueError, "batch"),
        (lambda: SemiDiscreteOT(Y).fit(2, lr=-1.0), ValueError, "lr"),
        (lambda: SemiDiscreteOT(Y).fit(2, patience=0), ValueError, "patience"),
        (lambda: SemiDiscreteOT(Y).fit(2, 4096, tol=8e-4), ValueError, "sampling noise"),
        (lambda: SemiDiscreteOT(Y).fit(2, points=torch.randn(5, 3)), ValueError, "points"),
        (lambda: SemiDiscreteOT(Y).assign(torch.randn(5, 2, 1)), ValueError, "x must have shape"),
        (
            lambda: SemiDiscreteOT(Y)(torch.tensor([[0.0, 1.0], [math.nan, 0.0]])),
            ValueError,
            "finite",
        ),
        (lambda: SemiDiscreteOT(Y).fit(2, 1), ValueError, "lr must be given"),
        (lambda: SemiDiscreteOT(Y).draw(0), ValueError, "got 0"),
        (lambda: mass_bound(Y, torch.ones(3), torch.ones(8)), ValueError, "mass and weights"),
        (lambda: noised_targets(VP(), Y, 1.5), ValueError, "1.5"),
        (lambda: noised_targets(VP(), Y, 0.5, copies=1.5), ValueError, "copies"),
        (lambda: novelty(Y, Y[:, :1]), ValueError, "event shape"),
        (lambda: identity_kept(Flow(), Y, 1.0), ValueError, "signal"),
        (lambda: mode_mixture(Y, lambda x: x, 2.0), ValueError, "threshold"),
    ],
)
def test_bad_input(make, error, text):
    with pytest.raises(error, match=text):
        make()
