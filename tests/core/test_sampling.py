"""What the steps of the solvers are: Gaussian posteriors with the noise that was given, orders that
end as they are told to, and an exact flow in double precision."""

import math

import pytest
import torch

import diffkit as dk
from diffkit.core.sampling import MultistepSolver, first_order

X = torch.randn(5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Z = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


class Says(dk.Denoiser):  # the same clean data at every state, and a fraction of the variance
    def __init__(self, process, x0, fraction=None):
        super().__init__()
        self.process, self.x0 = process, x0
        self.extra = {} if fraction is None else {"variance": torch.full_like(x0, fraction)}

    def forward(self, x, t, **cond):
        return dk.Prediction.of(x, t, self.process, x0=self.x0, extra=self.extra)


def posterior(process, x, x0, t, s):
    "Mean and variance of x_s given x_t and x_0, and the variance of x_t given x_s."
    (a, v), (b, w) = (
        (process.alpha(u).item(), process.sigma(u).item() ** 2) for u in (float(t), float(s))
    )
    r = a / b  # x_t = r x_s + noise of variance q
    q = v - r * r * w
    if w == 0:
        return b * x0, 0.0, q
    var = 1 / (1 / w + r * r / q)
    return var * (b * x0 / w + r * x / q), var, q


PROCESSES = [dk.VP(), dk.Cosine(), dk.VE(), dk.EDM(), dk.Flow(), dk.Discrete([0.1] * 20)]
each_process = pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)


@each_process
@pytest.mark.parametrize("end", [0.0, 0.25])
@pytest.mark.parametrize(
    ("make", "fraction"),
    [
        (lambda z: dk.Ancestral(noise=z), None),
        (lambda z: dk.DDIM(1.0, noise=z), None),
        (lambda z: dk.Ancestral("large", noise=z), 1.0),
        (lambda z: dk.Ancestral("learned", noise=z), 0.0),
        (lambda z: dk.Ancestral("learned", noise=z), 0.3),
        (lambda z: dk.Ancestral("learned", noise=z), 1.0),
    ],
    ids=["small", "ddim", "large", "learned-0", "learned-0.3", "learned-1"],
)
def test_ancestral_steps_draw_from_the_posterior(process, end, make, fraction):
    grid, x0 = torch.tensor([0.9, 0.7, 0.4, end], dtype=torch.float64), X.flip(0)
    got = dk.sample(Says(process, x0, fraction), make(Z), X, grid, progress=False)
    want = X
    for z, t, s in zip(Z, grid, grid[1:]):
        mean, var, q = posterior(process, want, x0, t, s)
        # a fraction of the logarithm, from the posterior's variance to the forward step's
        std = math.sqrt(var ** (1 - (fraction or 0)) * q ** (fraction or 0)) if var else 0.0
        want = mean + std * z
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@each_process
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_trades_old_noise_for_fresh_noise(process, eta):
    grid, x0 = torch.tensor([0.9, 0.7, 0.4, 0.25], dtype=torch.float64), X.flip(0)
    got = dk.sample(Says(process, x0), dk.DDIM(eta, noise=Z), X, grid, progress=False)
    want = X
    for z, t, s in zip(Z, grid.tolist(), grid[1:].tolist()):
        eps = (want - process.alpha(t) * x0) / process.sigma(t)
        var = posterior(process, want, x0, t, s)[1]
        fresh = eta * math.sqrt(var)
        old = math.sqrt(process.sigma(s).item() ** 2 - fresh**2)
        want = process.alpha(s) * x0 + old * eps + fresh * z
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


class Third(MultistepSolver):  # three predictions, of which it uses the newest
    order = 3

    def __init__(self, lower):
        self.lower_order_final = lower

    def row(self, nodes, target, i, n):
        first = first_order(nodes[0], target)
        return first._replace(b=(first.b[0], *[0.0] * (len(nodes) - 1)))


@pytest.mark.parametrize(
    ("lower", "times", "orders"),
    [
        (False, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1, 2, 3, 3, 3, 3]),
        (True, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1, 2, 3, 3, 2, 1]),
        ("auto", [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4], [1, 2, 3, 3, 3, 3]),
        # the fourth step is four times as long as the third
        (False, [1, 0.9, 0.8, 0.75, 0.55, 0.45, 0.4], [1, 2, 3, 3, 3, 3]),
        (True, [1, 0.9, 0.8, 0.75, 0.55, 0.45, 0.4], [1, 2, 3, 3, 2, 1]),
        ("auto", [1, 0.9, 0.8, 0.75, 0.55, 0.45, 0.4], [1, 2, 2, 1, 3, 3]),
        ("auto", [1, 0.9, 0.8, 0.61, 0.5, 0.4, 0.1], [1, 2, 3, 3, 2, 1]),  # 1.9 times, and 3 times
        (True, [1, 0.5], [1]),
        ("auto", [1, 0.5], [1]),
    ],
)
def test_orders_are_lowered_where_that_is_asked_for(lower, times, orders):
    # of VE the logarithm of the signal-to-noise ratio is linear in time
    run = Third(lower).begin(dk.VE(), torch.tensor(times, dtype=torch.float64))
    assert run.orders == orders and [len(r.b) for r in run.rows] == orders
    with pytest.raises(ValueError, match="lower_order_final must be True, False or 'auto'"):
        Third("no").begin(dk.VE(), torch.tensor(times, dtype=torch.float64))


@pytest.mark.parametrize("name", ["nothing", "history"])
def test_what_neither_a_solver_nor_its_run_has_is_named_with_its_class(name):
    solver = dk.Heun()  # no multistep solver: without a history
    for _ in range(2):
        with pytest.raises(AttributeError, match=f"^Heun has no attribute '{name}'$"):
            getattr(solver, name)
        grid = torch.tensor([0.9, 0.5], dtype=torch.float64)
        dk.sample(Says(dk.VP(), X), solver, X, grid, progress=False)


@pytest.mark.parametrize(("t", "s"), [(0.9, 0.2), (1.0, 0.3), (0.2, 0.9)])
@pytest.mark.parametrize("process", [dk.VP(), dk.Flow()], ids=lambda p: type(p).__name__)
def test_the_exact_flow_is_integrated_in_double_precision(process, t, s):
    x = X[:, :2].float()
    got = dk.exact_flow(dk.four_gaussians(), process, x, t, s)
    want = dk.exact_flow(dk.four_gaussians(), process, x.double(), t, s)
    assert got.dtype == torch.float32 and torch.equal(got, want.float())
