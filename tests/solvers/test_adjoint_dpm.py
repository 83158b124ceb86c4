"""Gradients of AdjointDPM against full backpropagation and torchdiffeq, on all processes, and
what must be refused."""

import copy
import warnings

import pytest
import torch
from diffkit.core.data import four_gaussians, ring
from diffkit.core.denoiser import (
    Denoiser,
    MixtureDenoiser,
    NetDenoiser,
    Prediction,
    cfg,
    classifier_guidance,
    contrast,
)
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Heun, sample
from diffkit.guidance.apg import apg
from diffkit.solvers.adjoint_dpm import (
    METHODS,
    RhoField,
    Tableau,
    adjoint_sample,
    optimize_noise,
    saved_bytes,
)
from torch import nn
from torch.testing import assert_close

F64 = dict(dtype=torch.float64)
PROCESSES = [VP(), Cosine(), Discrete(), Flow(), EDM(), VE()]
RK38 = Tableau(
    (0.0, 1 / 3, 2 / 3, 1.0),
    ((), (1 / 3,), (-1 / 3, 1.0), (1.0, -1.0, 1.0)),
    (1 / 8, 3 / 8, 3 / 8, 1 / 8),
)


class Net(nn.Module):
    def __init__(self, emb=True):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(5 if emb else 3, 16, **F64), nn.Linear(16, 2, **F64)

    def forward(self, x, t, emb=None):
        return self.b(
            torch.tanh(
                self.a(
                    torch.cat([x, *([] if emb is None else [emb]), t[:, None].to(x)], 1).to(
                        self.a.weight.dtype
                    )
                )
            )
        ).to(x.dtype)


def randn(*shape, seed=0, grad=True):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **F64).requires_grad_(
        grad
    )


def model(process=None, scale=2.0):
    return cfg(
        NetDenoiser(Net(), process or VP(), "v", null={"emb": torch.zeros(6, 2, **F64)}), scale
    )


def rel(a, b):
    return ((a - b).norm() / b.norm()).item()


def gradients(d, x, grid, wrt, **kw):
    y = adjoint_sample(d, x, grid, **kw)
    return y, *torch.autograd.grad(y.square().sum(), wrt, allow_unused=True)


# --- exact mode against full backpropagation


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("method", [*METHODS, RK38], ids=[*METHODS, "rk38"])
def test_exact_is_backpropagation(process, method):
    d, x, emb = model(process), randn(6, 2), randn(6, 2, seed=1)
    for grid, last in (
        (time_grid(process, 4), False),
        (time_grid(process, 4), True),
        (time_grid(process, 4, end=0.0), False),
        (torch.tensor([1.0, 0.0]), False),
        (torch.tensor([0.8, 0.3, 0.1]), True),
    ):
        a, b = (
            gradients(
                d,
                float(process.sigma(1.0)) * x,
                grid,
                [x, emb, *d.parameters()],
                cond={"emb": emb},
                method=method,
                gradient=g,
                denoise_last=last,
            )
            for g in ("exact", "backprop")
        )
        for u, v in zip(a, b):
            assert_close(u, v, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_values_are_those_of_sample(process):
    d, x = (
        MixtureDenoiser(four_gaussians(), process),
        float(process.sigma(1.0)) * randn(6, 2, grad=False),
    )
    for grid in (time_grid(process, 7), time_grid(process, 7, end=0.0), torch.tensor([1.0, 0.0])):
        assert_close(
            adjoint_sample(d, x, grid, method="euler"),
            sample(d, DDIM(), x, grid, progress=False),
            rtol=1e-11,
            atol=1e-11,
        )
        assert_close(
            adjoint_sample(d, x, grid, method="heun"),
            sample(d, Heun(), x, grid, progress=False),
            rtol=1e-11,
            atol=1e-11,
        )
        last = float(process.sigma(float(grid[-1]))) > 0
        assert_close(
            adjoint_sample(d, x, grid, method="euler", denoise_last=True),
            sample(d, DDIM(), x, grid, progress=False, denoise_last=last),
            rtol=1e-11,
            atol=1e-11,
        )


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
def test_adjoint_converges_to_backpropagation_with_its_order(process):
    d, x = (
        MixtureDenoiser(four_gaussians(), process),
        float(process.sigma(0.7)) * randn(6, 2, grad=False),
    )
    x.requires_grad_()
    for method, low in (("euler", 0.75), ("heun", 1.8), ("rk4", 3.5)):
        for states in ("stored", "recomputed"):
            if states == "recomputed" and method != "heun":
                continue
            e = [
                rel(
                    *(
                        gradients(
                            d,
                            x,
                            time_grid(process, n, "log_snr", 0.7, 0.1),
                            [x],
                            method=method,
                            **kw,
                        )[1]
                        for kw in ({"states": states}, {"gradient": "backprop"})
                    )
                )
                for n in (
                    (40, 80) if method == "euler" else (20, 40) if method == "heun" else (10, 20)
                )
            ]
            assert e[1] < 1e-10 or torch.tensor(e[0] / e[1]).log2() > low, (method, states, e)


@pytest.mark.parametrize(
    "guided",
    [
        lambda p: cfg(MixtureDenoiser(ring(), p), 3.0),
        lambda p: cfg(MixtureDenoiser(ring(), p), lambda t: 1 + 2 * t),
        lambda p: cfg(MixtureDenoiser(ring(), p), 3.0, interval=(0.2, 0.7)),
        lambda p: contrast(MixtureDenoiser(ring(), p), MixtureDenoiser(ring(scale=0.3), p), 1.0),
        lambda p: apg(MixtureDenoiser(ring(), p), 3.0, beta=0.0),
        lambda p: classifier_guidance(
            MixtureDenoiser(ring(), p), lambda x, t, label: -((x[:, 0] - 1) ** 2), 2.0
        ),
    ],
    ids=["cfg", "cfg-time", "cfg-interval", "contrast", "apg", "classifier"],
)
def test_any_guidance(guided):
    d, x, cond, grid = guided(VP()), randn(8, 2), {"label": torch.arange(8)}, time_grid(VP(), 8)
    want = gradients(d, x, grid, [x], cond=cond, gradient="backprop")
    for u, v in zip(gradients(d, x, grid, [x], cond=cond, gradient="exact"), want):
        assert_close(u, v, rtol=1e-9, atol=1e-10)
    fine = time_grid(VP(), 40, "log_snr")
    assert (
        rel(
            gradients(d, x, fine, [x], cond=cond, method="rk4")[1],
            gradients(d, x, fine, [x], cond=cond, method="rk4", gradient="backprop")[1],
        )
        < 0.2
    )


def test_tensors_anywhere_get_their_gradient():
    x, w, neg, emb = (
        randn(6, 2),
        torch.tensor(1.7, **F64, requires_grad=True),
        randn(6, 2, seed=3),
        randn(6, 2, seed=4),
    )

    class Nested(nn.Module):  # conditions in nests, as diffusers has them
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x, t, emb, extra):
            return self.net(x, t, emb) * extra["size"][0] + extra["shift"]

    shift, size = randn(6, 2, seed=5), torch.tensor(0.5, **F64, requires_grad=True)
    d = cfg(NetDenoiser(Nested(), VP(), "v"), w, uncond={"emb": neg})
    cond = lambda e: {"emb": e, "extra": {"size": [size, None], "shift": shift}}
    ask = [x, w, neg, emb, shift, size, *d.parameters()]
    # w twice: counted once
    a, b = (
        gradients(
            d,
            x,
            time_grid(VP(), 5),
            ask,
            cond=cond(emb * 2),
            params=[w, neg, w, *d.parameters()],
            gradient=g,
        )
        for g in ("exact", "backprop")
    )
    for u, v in zip(a, b):
        assert_close(u, v, rtol=1e-10, atol=1e-12)  # emb * 2 is not a leaf
    with pytest.warns(UserWarning, match="not among params"):
        adjoint_sample(d, x, time_grid(VP(), 5), cond=cond(emb)).sum().backward()


def test_only_what_is_asked_for():
    d, x, emb = model(), randn(6, 2), randn(6, 2, seed=1, grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # the denoiser's own weights may be left out without a warning
        adjoint_sample(d, x, time_grid(VP(), 4), cond={"emb": emb}, params=()).sum().backward()
        assert x.grad is not None and all(p.grad is None for p in d.parameters())
        with torch.no_grad():
            assert not adjoint_sample(d, x, time_grid(VP(), 4), cond={"emb": emb}).requires_grad
        frozen = copy.deepcopy(d).requires_grad_(False)
        assert not adjoint_sample(
            frozen, x.detach(), time_grid(VP(), 4), cond={"emb": emb}
        ).requires_grad
        # nothing in it depends on anything
        constant = NetDenoiser(lambda x, t: torch.ones_like(x), VP(), "eps")
        y = adjoint_sample(constant, x, time_grid(VP(), 4))
        assert_close(
            torch.autograd.grad(y.sum(), x)[0],
            torch.full_like(x, float(VP().alpha(1e-3) / VP().alpha(1.0))),
        )


def test_gradcheck():
    d = model()
    for method in ("euler", "rk4"):
        assert torch.autograd.gradcheck(
            lambda x, e, method=method: adjoint_sample(
                d,
                x,
                time_grid(VP(), 4, "log_snr"),
                cond={"emb": e},
                gradient="exact",
                method=method,
                denoise_last=True,
            ),
            (randn(6, 2), randn(6, 2, seed=1)),
        )


# --- parity with torchdiffeq


@pytest.mark.parametrize("process", [VP(), Discrete(), EDM()], ids=lambda p: type(p).__name__)
@pytest.mark.parametrize(
    "mine,theirs",
    [("euler", "euler"), ("midpoint", "midpoint"), ("heun", "heun2"), (RK38, "rk4")],
    ids=["euler", "midpoint", "heun", "rk38"],
)
@pytest.mark.parametrize("states", ["stored", "recomputed"])
def test_equal_to_torchdiffeq(process, mine, theirs, states):
    odeint_adjoint = pytest.importorskip("torchdiffeq").odeint_adjoint
    d, x, emb, grid = (
        model(process),
        float(process.sigma(1.0)) * randn(6, 2, grad=False),
        randn(6, 2, seed=1, grad=False),
        time_grid(process, 9, "log_snr"),
    )
    x.requires_grad_()
    al, rho = process.alpha(grid), process.sigma(grid) / process.alpha(grid)
    kw = (
        {}
        if states == "stored"
        else dict(
            options={"grid_constructor": lambda f, y, t: rho},
            adjoint_options={"grid_constructor": lambda f, y, t: -rho.flip(0)},
        )
    )
    z = (
        al[-1]
        * odeint_adjoint(
            RhoField(d, {"emb": emb}),
            x / al[0],
            rho if states == "stored" else rho[[0, -1]],
            method=theirs,
            **kw,
        )[-1]
    )
    want = z, *torch.autograd.grad(z.square().sum(), [x, *d.parameters()])
    for u, v in zip(
        gradients(d, x, grid, [x, *d.parameters()], cond={"emb": emb}, method=mine, states=states),
        want,
    ):
        assert_close(u, v, rtol=1e-9, atol=1e-10 * v.detach().abs().max().item() + 1e-14)


# --- memory, precision, devices


def test_memory_of_one_call():
    d, x, emb = model(), randn(6, 2), randn(6, 2, seed=1)

    def peak(n, **kw):
        with saved_bytes([x, emb, *d.parameters()]) as b:
            adjoint_sample(
                d, x, time_grid(VP(), n, "log_snr"), cond={"emb": emb}, **kw
            ).sum().backward()
        assert b.now == 0
        return b.peak

    state = x.numel() * 8
    assert (
        peak(30) - peak(10) == peak(30, gradient="exact") - peak(10, gradient="exact") == 20 * state
    )
    assert peak(30, states="recomputed") == peak(10, states="recomputed")
    assert abs(peak(30, gradient="backprop") / peak(10, gradient="backprop") - 3) < 0.05
    # other hooks may be in force
    with torch.autograd.graph.save_on_cpu():
        adjoint_sample(d, x, time_grid(VP(), 5), cond={"emb": emb}).sum().backward()


@pytest.mark.parametrize("gradient", ["adjoint", "exact"])
def test_half_precision_and_autocast(gradient):
    d, x, emb, grid = model(), randn(6, 2), randn(6, 2, seed=1), time_grid(VP(), 20)
    y, gx, *gw = gradients(d, x, grid, [x, *d.parameters()], cond={"emb": emb}, gradient=gradient)
    half = copy.deepcopy(d).bfloat16()
    half.inner.null = half.null = {"emb": torch.zeros(6, 2, dtype=torch.bfloat16)}
    xb = x.detach().bfloat16().requires_grad_()
    yb, gb, *wb = gradients(
        half,
        xb,
        grid,
        [xb, *half.parameters()],
        cond={"emb": emb.detach().bfloat16()},
        gradient=gradient,
    )
    assert (
        yb.dtype == gb.dtype == wb[0].dtype == torch.bfloat16
        and rel(yb.detach().double(), y.detach()) < 0.05
        and rel(gb.double(), gx) < 0.1
        and all(rel(a.double(), b) < 0.1 for a, b in zip(wb, gw))
    )
    single = copy.deepcopy(d).float()
    single.inner.null = single.null = {"emb": torch.zeros(6, 2)}
    xf = x.detach().float().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ya = adjoint_sample(single, xf, grid, cond={"emb": emb.detach().float()}, gradient=gradient)
    # outside the context: the way back finds it again
    ga, *wa = torch.autograd.grad(ya.square().sum(), [xf, *single.parameters()])
    assert (
        ya.dtype == torch.float32
        and rel(ga.double(), gx) < 0.1
        and all(rel(a.double(), b) < 0.1 for a, b in zip(wa, gw))
    )


@pytest.mark.parametrize("gradient", ["adjoint", "exact", "backprop"])
def test_where_backward_is_called_does_not_matter_under_autocast(gradient):
    """Within the context or after it: the gradients are equal to the bit, since no cast of a weight
    is kept from one call of the network to the next; and the network itself, used in that context
    after a sample was made without gradients, still has its own."""
    d, x, emb = model().float(), randn(6, 2, grad=False).float(), randn(6, 2, seed=1, grad=False)
    d.inner.null = d.null = {"emb": torch.zeros(6, 2)}
    cond, wrt = {"emb": emb.float()}, [x.requires_grad_(), *d.parameters()]
    go = lambda: adjoint_sample(d, x, time_grid(VP(), 8), cond=cond, gradient=gradient)
    back = lambda y: torch.autograd.grad(y.square().sum(), wrt)
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            go()
        y = go()
        inside = back(y)
        own = torch.autograd.grad(d(x, 0.5, **cond).x0.sum(), wrt)
    with torch.autocast("cpu", torch.bfloat16):
        z = go()
        fresh = d(x, 0.5, **cond).x0.sum()
    assert torch.equal(y, z) and not torch.equal(y, go())  # the last one is in single precision
    for u, v in zip((*inside, *own), (*back(z), *torch.autograd.grad(fresh, wrt))):
        assert torch.equal(u, v) and u.abs().sum() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu():
    d, x, emb, grid = model(), randn(6, 2), randn(6, 2, seed=1), time_grid(VP(), 10)
    want, g = (
        gradients(d, x, grid, [x, *d.parameters()], cond={"emb": emb.detach()}),
        copy.deepcopy(d).cuda(),
    )
    g.inner.null = g.null = {"emb": torch.zeros(6, 2, **F64, device="cuda")}
    xg = x.detach().cuda().requires_grad_()
    for u, v in zip(
        gradients(g, xg, grid, [xg, *g.parameters()], cond={"emb": emb.detach().cuda()}), want
    ):
        assert_close(u.cpu(), v, rtol=1e-9, atol=1e-10)


# --- what must be refused


class Noisy(Denoiser):
    process = VP()

    def __init__(self, honest):
        super().__init__()
        self.stochastic = honest

    def forward(self, x, t):
        return Prediction.of(x, t, self.process, eps=x + torch.randn_like(x))


@pytest.mark.parametrize(
    "kw,error,message",
    [
        (dict(method="rk5"), ValueError, "method='rk5': it must be .*euler.* Tableau; .*'rk4'"),
        (dict(method="RK4"), ValueError, "did you mean 'rk4'"),
        (dict(method="dopri5"), ValueError, "rk4, or a Tableau$"),
        (dict(method=Heun()), TypeError, r"method=Heun\(\): a solver of sample.* mean 'heun'"),
        (dict(method=Heun), TypeError, "Heun.*: a solver of sample.* did you mean 'heun'"),
        (dict(method=DDIM(eta=1.0)), TypeError, r"DDIM\(eta=1.0\): a solver of sample.* Tableau$"),
        (dict(method=tuple(METHODS["heun"])), TypeError, "method=.* it must be one of"),
        (dict(method=None), TypeError, "method=None: it must be one of"),
        (dict(gradient="true"), ValueError, "true"),
        (dict(gradient="backward"), ValueError, "did you mean 'backprop'"),
        (
            dict(gradient=True),
            TypeError,
            "gradient=True: it must be one of adjoint, exact, backprop$",
        ),
        (dict(states="kept"), ValueError, "kept"),
        (dict(states="store"), ValueError, "did you mean 'stored'"),
        (dict(gradient="exact", states="recomputed"), ValueError, "gradient='adjoint'"),
        (dict(gradient="backprop", states="recomputed"), ValueError, "gradient='adjoint'"),
        (dict(params=[torch.zeros(3)]), ValueError, r"params\[0\]"),
        (dict(params=["w"]), TypeError, r"params\[0\]"),
        (dict(grid=torch.tensor([0.0, 1.0])), ValueError, "decreasing"),
        (dict(grid=torch.tensor([1.5, 1.0])), ValueError, r"\[0, 1\]"),
        (dict(x=torch.zeros(6, 2, dtype=torch.long)), TypeError, "floating-point"),
        (dict(cond={"emb": torch.zeros(5, 2, **F64)}), ValueError, "emb"),
        (dict(denoiser=lambda x, t: x), TypeError, "Denoiser"),
        (dict(x=torch.full((6, 2), float("nan"), **F64)), FloatingPointError, "not finite"),
        (dict(denoiser=Noisy(True), cond={}), ValueError, "draws noise"),
    ],
)
def test_bad_input(kw, error, message):
    kw = {
        "denoiser": model(),
        "x": randn(6, 2),
        "grid": time_grid(VP(), 5),
        "cond": {"emb": randn(6, 2, seed=1)},
        **kw,
    }
    with pytest.raises(error, match=message):
        adjoint_sample(kw.pop("denoiser"), kw.pop("x"), kw.pop("grid"), **kw)


def test_another_function_on_the_way_back_is_noticed():
    x = randn(6, 2)
    y = adjoint_sample(Noisy(False), x, time_grid(VP(), 5), gradient="exact")
    with pytest.raises(RuntimeError, match="another result on the way back"):
        y.sum().backward()
    d = model()
    y = adjoint_sample(d, x, time_grid(VP(), 5), cond={"emb": randn(6, 2)})
    with torch.no_grad():
        d.inner.net.b.bias += 1
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()
    memory = apg(MixtureDenoiser(ring(), VP()), 3.0, beta=-0.5)
    with pytest.raises(ValueError, match="history"):
        adjoint_sample(memory, x, time_grid(VP(), 8), cond={"label": torch.arange(6)})
    adjoint_sample(
        memory, x, time_grid(VP(), 8), cond={"label": torch.arange(6)}, gradient="backprop"
    ).sum().backward()


def test_no_second_derivatives():
    d, x = model(), randn(6, 2)
    (g,) = torch.autograd.grad(
        adjoint_sample(d, x, time_grid(VP(), 4), cond={"emb": randn(6, 2)}).square().sum(),
        x,
        create_graph=True,
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_rho_field():
    d, z = MixtureDenoiser(four_gaussians(), VP()), randn(6, 2)
    assert_close(RhoField(d)(2.0, z), RhoField(d)(torch.tensor(2.0, **F64, requires_grad=True), z))
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="rho must be positive"):
            RhoField(d)(bad, z)
    # weights are found through the module
    assert [n for n, _ in RhoField(model(), {}).named_parameters()]


def test_optimize_noise_is_reproducible_and_touches_nothing_else():
    d, x, emb = model(), randn(6, 2, grad=False), randn(6, 2, seed=1, grad=False)
    a, b = (
        optimize_noise(
            lambda y: (y - 1).square().sum(),
            d,
            x,
            time_grid(VP(), 5),
            steps=4,
            cond={"emb": emb},
            gradient="exact",
        )
        for _ in range(2)
    )
    assert (
        torch.equal(a[0], b[0])
        and a[1] == b[1]
        and len(a[1]) == 4
        and a[1][-1] < a[1][0]
        and all(p.grad is None for p in d.parameters())
        and not a[0].requires_grad
    )
    kept, _ = optimize_noise(
        lambda y: (y - 1).square().sum(),
        d,
        x,
        time_grid(VP(), 5),
        steps=3,
        lr=0.5,
        keep_norm=True,
        cond={"emb": emb},
    )
    assert_close(kept.norm(dim=1), x.norm(dim=1))
