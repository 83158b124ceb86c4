"""Denoisers as users have them: conditions by row, models that are wrapped, cast or compiled, times
and types, and what is no scale, condition or network."""

import math
import pickle
import threading

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import diffkit as dk
from diffkit.core.denoiser import full_rows, map_rows

GRID = dk.time_grid(dk.VP(), 4)
X = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):  # with nested conditions, as SDXL's network has them
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin, self.calls, self.seen = nn.Linear(3, 3), 0, []

    def forward(self, x, t, text=None, added=None):
        if self.seen is not None:
            self.calls += 1
            self.seen.append(t)
        y = self.lin(x) * (1 + t[:, None].to(x.dtype))
        for v in [text, *(added or {}).values()]:
            if v is not None:
                assert len(v) == len(x)
                y = y + v.to(x.dtype)
        return y


def net(**kw):
    return dk.NetDenoiser(Net(), dk.VP(), **kw)


def run(d, x=X, solver=None, **kw):
    return dk.sample(d, solver or dk.DDIM(), x, GRID, progress=False, **kw)


def rows(n, seed=1):
    g = torch.Generator().manual_seed(seed)
    return dict(
        text=torch.randn(n, 3, generator=g),
        added=dict(pooled=torch.randn(n, 3, generator=g), ids=torch.randn(n, 3, generator=g)),
    )


def pick(cond, i):
    return map_rows(cond, 6, lambda v: v[i])


def test_rows_are_found_in_dicts_lists_and_tuples():
    v = torch.arange(6)
    cond = dict(a=v, b=[v, (v, "text")], c=torch.tensor(1), d=torch.arange(4), e=None)
    out = map_rows(cond, 6, lambda u: u[:2])
    assert [len(w) for w in (out["a"], out["b"][0], out["b"][1][0], out["d"])] == [2, 2, 2, 4]
    assert out["b"][1][1] == "text" and out["e"] is None and out["c"].ndim == 0
    assert full_rows(dict(a=v[:1]), 3)["a"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"cond\['b'\]\[0\] must have one row a sample \(3\)"):
        full_rows(dict(b=[v]), 3)


def test_one_row_holds_for_all_samples():
    d, one = net(), rows(1)
    many = map_rows(one, 1, lambda v: v.repeat(6, 1))
    assert torch.equal(run(d, cond=one), run(d, cond=many))
    null = rows(1, 7)
    g = dk.cfg(d, 3.0, uncond=null)
    full = dk.cfg(d, 3.0, uncond=map_rows(null, 1, lambda v: v.repeat(6, 1)))
    d.net.calls = 0
    assert torch.equal(run(g, cond=one), run(full, cond=many))
    assert d.net.calls == 8  # one doubled call a step, for each of the two runs


GUIDANCE = {
    "cfg": lambda d, u: dk.cfg(d, torch.linspace(1.5, 4, 6), uncond=u),
    "apg": lambda d, u: dk.apg(d, 4.0, uncond=u),
    "adaptive": lambda d, u: dk.adaptive_cfg(d, torch.linspace(1.5, 4, 6), 0.9, uncond=u),
    "interval": lambda d, u: dk.cfg(d, 3.0, uncond=u, interval=(0.2, 0.8)),
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_nested_conditions_are_treated_by_row(name):
    "A batch is its samples, one after the other, and costs one call where all are guided."
    cond, null = rows(6), rows(6, 2)
    d = net()
    whole = run(GUIDANCE[name](d, null), cond=cond)
    one = lambda i: GUIDANCE[name](net(), pick(null, slice(i, i + 1)))

    def alone(i):
        g = one(i)
        if isinstance(g.scale, torch.Tensor):
            g.scale = g.scale[i : i + 1]
        return run(g, X[i : i + 1], cond=pick(cond, slice(i, i + 1)))

    torch.testing.assert_close(whole, torch.cat([alone(i) for i in range(6)]))
    if name in ("cfg", "apg"):
        assert d.net.calls == 4


def test_nested_conditions_in_inversion_and_search():
    cond = rows(6)
    fine, d = dk.time_grid(dk.VP(), 12), net().double()
    noise = dk.invert(d, X.double(), fine, cond=cond, batch=3, generator=torch.Generator())
    torch.testing.assert_close(
        dk.replay(d, noise, cond, progress=False), X.double(), atol=1e-8, rtol=0
    )
    search = dk.SVDD(dk.DDIM(eta=1.0), dk.PosteriorMean(lambda x: x.sum(1)), 3)
    assert run(net(), solver=search, cond=cond, generator=torch.Generator()).shape == X.shape


class Offloaded(nn.Module):  # as offloading hooks do: the weights are elsewhere between calls
    def __init__(self):
        super().__init__()
        self.held = dict(weight=torch.eye(3))
        self.weight = nn.Parameter(torch.empty(3, 3, device="meta"))

    def forward(self, x, t):
        return x @ self.held["weight"]


class Mixed(nn.Module):  # bfloat16 with a norm in float32
    def __init__(self):
        super().__init__()
        self.norm, self.lin = nn.LayerNorm(3), nn.Linear(3, 3).to(torch.bfloat16)

    def forward(self, x, t):
        return self.lin(self.norm(x.float()).to(torch.bfloat16)).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_the_direct_call_can_do_sampling_can(dtype):
    for model in (Offloaded(), Mixed()) if dtype != torch.bfloat16 else (Mixed(),):
        d = dk.NetDenoiser(model, dk.VP(), "x0")
        x = X.to(dtype)
        if isinstance(model, Offloaded):
            model.held["weight"] = torch.eye(3, dtype=dtype)
        d(x, 0.5)  # the direct call
        assert run(d, x).dtype == dtype


def test_offloaded_by_accelerate():
    accelerate = pytest.importorskip("accelerate")
    d = dk.NetDenoiser(Net(), dk.VP())
    want = run(d)
    accelerate.cpu_offload(d.net, torch.device("cpu"))
    assert next(d.parameters()).device.type == "meta"
    assert torch.equal(run(d), want)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6),
    reason="the tracer of these versions fails on a class with __getattr__",
)
def test_compiled_denoisers(monkeypatch):
    monkeypatch.setattr(Net, "seen", property(lambda s: None, lambda s, v: None), raising=False)
    want = run(dk.cfg(net(), 2.0, uncond=rows(1, 2)), cond=rows(6))
    compiled = torch.compile(net(), backend="eager")
    got = run(dk.cfg(compiled, 2.0, uncond=rows(1, 2)), cond=rows(6))
    torch.testing.assert_close(got, want)
    # what remembers is compiled once a run, and the runs stay apart
    guided = dk.apg(net(), 2.0, beta=-0.5, uncond=rows(1, 2))
    want = run(guided, cond=rows(6))
    again = torch.compile(guided, backend="eager")
    torch.testing.assert_close(run(again, cond=rows(6)), want)
    torch.testing.assert_close(run(again, cond=rows(6)), want)
    with pytest.raises(TypeError, match="put it around the network"):
        run(nn.DataParallel(net()))
    parallel = dk.NetDenoiser(nn.DataParallel(Net()), dk.VP())
    torch.testing.assert_close(run(parallel), run(net()))


def test_the_wrong_type_is_said_in_the_users_words():
    with pytest.raises(ValueError, match="x has dtype torch.float64, but the model has torch.flo"):
        run(net(), X.double())


def test_times_keep_their_precision_and_integers_stay_integers():
    D = pytest.importorskip("diffusers")
    process = dk.from_diffusers(nn.Identity(), D.DDIMScheduler()).process
    d = dk.NetDenoiser(Net().to(torch.bfloat16), process)
    run(d, X.to(torch.bfloat16))
    grid = process.net_time(GRID).float()
    assert torch.equal(torch.stack([t[0] for t in d.net.seen]), grid[:-1])
    assert d.net.seen[0].dtype == torch.float32
    whole = lambda t: (1000 * t - 1).round().long()
    d = dk.NetDenoiser(Net(), process, time_input=whole)
    run(d)
    assert [t.dtype for t in d.net.seen] == [torch.int64] * 4
    assert [int(t[0]) for t in d.net.seen] == whole(GRID[:-1]).tolist()
    d = dk.NetDenoiser(Net().double(), dk.VP())
    run(d, X.double())
    assert d.net.seen[1].dtype == torch.float64 and float(d.net.seen[1][0]) == float(GRID[1])


def test_our_own_networks_see_a_time_that_is_not_rounded():
    torch.manual_seed(0)
    model = dk.MLP(3).to(torch.bfloat16)
    x, t = X.to(torch.bfloat16), torch.full((6,), 0.7512)
    rounded = torch.full((6,), float(t[0].bfloat16()))
    assert not torch.equal(model.cond(x, t), model.cond(x, rounded))


class No64(TorchDispatchMode):  # a device that has no float64
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for v in torch.utils._pytree.tree_leaves(out):
            if isinstance(v, torch.Tensor) and v.device.type == "meta" and v.ndim:
                assert v.dtype != torch.float64, func
        return out


@pytest.mark.parametrize(
    "solver",
    [dk.DDIM(), dk.Ancestral(), dk.Heun(), dk.Euler(), dk.DPMSolverPP(2), dk.UniPC(), dk.DEIS()],
    ids=lambda s: type(s).__name__,
)
def test_no_float64_on_devices_that_have_none(solver):
    d = dk.cfg(net().to("meta"), 3.0, uncond=map_rows(rows(1), 1, lambda v: v.to("meta")))
    with No64():
        cond = map_rows(rows(1), 1, lambda v: v.to("meta"))
        x = dk.sample(d, solver, X.to("meta"), GRID, cond=cond, check=False, progress=False)
    assert x.dtype == torch.float32


@pytest.mark.parametrize(
    "solver", [dk.Euler(), dk.EulerMaruyama(), dk.Heun()], ids=lambda s: type(s).__name__
)
def test_inference_mode(solver):
    draw = lambda: torch.Generator().manual_seed(3)
    want = run(net(), solver=solver, generator=draw())
    with torch.inference_mode():
        assert torch.equal(run(net(), solver=solver, generator=draw()), want)
    log_prob = lambda x, t: -(x**2).sum(1)
    with torch.inference_mode():
        got = run(dk.classifier_guidance(net(), log_prob, 0.3))
    torch.testing.assert_close(got, run(dk.classifier_guidance(net(), log_prob, 0.3)))


class Says(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x, t):
        return self.f(x)


class Output(dict):  # as diffusers and transformers have them
    @property
    def sample(self):
        return self["sample"]


def test_networks_that_return_more_than_a_tensor():
    plain = dk.NetDenoiser(Says(lambda x: x / 2), dk.VP())
    for f in (lambda x: (x / 2, "more"), lambda x: [x / 2], lambda x: Output(sample=x / 2)):
        d = dk.NetDenoiser(Says(f), dk.VP())
        assert torch.equal(run(d), run(plain))
        draws = dict(t=torch.full((6,), 0.5), eps=X)
        assert torch.equal(d.loss(X, **draws), plain.loss(X, **draws))
    with pytest.raises(TypeError, match="must return a tensor of the shape of x, .* got dict"):
        run(dk.NetDenoiser(Says(lambda x: {"out": x}), dk.VP()))
    for use in (run, lambda d: d.loss(X)):
        with pytest.raises(ValueError, match=r"shape of x, \(6, 3\), got \(6, 1\)"):
            use(dk.NetDenoiser(Says(lambda x: x[:, :1]), dk.VP()))


MAKERS = dict(
    cfg=lambda **kw: dk.cfg(net(null=rows(1)), **kw),
    apg=lambda **kw: dk.apg(net(null=rows(1)), **kw),
    adaptive=lambda **kw: dk.adaptive_cfg(net(null=rows(1)), **kw),
    contrast=lambda **kw: dk.contrast(net(), net(), **kw),
    classifier=lambda **kw: dk.classifier_guidance(net(), lambda x, t: x.sum(1), **kw),
)


@pytest.mark.parametrize("name", MAKERS)
def test_what_is_no_scale_or_interval(name):
    make = MAKERS[name]
    for bad in ("high", None, float("nan"), float("inf"), True, [1.0, "b"], {"w": 1}):
        with pytest.raises((TypeError, ValueError), match="scale must be a finite number, one num"):
            make(scale=bad)
    assert make(scale=[1.0] * 6).scale.shape == (6,)
    with pytest.raises(ValueError, match=r"scale must be a number or have one entry a sample \(6"):
        run(make(scale=[2.0] * 4))
    for bad in (0.5, (0.2,), (0.8, 0.2), ("a", "b"), None):
        with pytest.raises(ValueError, match=r"interval must be \(low, high\)"):
            make(scale=2.0, interval=bad)


def test_what_is_no_condition():
    with pytest.raises(TypeError, match=r"cond must be a dict .* \{'label': y\}, got Tensor"):
        run(net(), cond=torch.zeros(6))
    with pytest.raises(TypeError, match="uncond must be a dict of conditions by name"):
        dk.cfg(net(), 2.0, uncond=torch.zeros(6))


def test_pickles():
    for d in (net(), dk.from_edm(Net()), dk.cfg(net(), 2.0, uncond={"text": 0})):
        assert type(pickle.loads(pickle.dumps(d))) is type(d)


def test_a_denoiser_serves_two_threads():
    d = dk.apg(net(), 3.0, beta=-0.5, uncond=rows(1, 2))
    xs = [torch.randn(6, 3, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    want = [run(d, x, cond=rows(6)) for x in xs]
    got = [None] * 4

    def work(i):
        got[i] = run(d, xs[i], cond=rows(6))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for a, b in zip(got, want):
        assert torch.equal(a, b)


def test_networks_that_are_called_otherwise():
    with pytest.raises(TypeError, match=r"Linear is called as net\(x, t\), but takes \(input"):
        run(dk.NetDenoiser(nn.Linear(3, 3), dk.VP()))
    with pytest.raises(TypeError, match=r"net\(x, t, lable=\).* unexpected keyword argument 'lab"):
        run(net(), cond={"lable": torch.zeros(6)})

    class Inside(nn.Module):  # its own mistake is not ours to explain
        def forward(self, x, t):
            return x + "a"

    with pytest.raises(TypeError, match="unsupported operand"):
        run(dk.NetDenoiser(Inside(), dk.VP()))


class Seen(torch.nn.Module):  # keeps the conditions that it was called with
    def forward(self, x, t, **cond):
        self.cond = cond
        return torch.zeros_like(x)


def test_null_rate_replaces_whole_rows_of_the_named_conditions():
    n, none = 4000, torch.full((1, 3, 2), -1.0)
    d = dk.NetDenoiser(Seen(), dk.VP(), null={"label": 10, "text": none, "more": {"size": 0.0}})
    cond = dict(
        label=torch.arange(n) % 10,
        text=torch.ones(1, 3, 2),
        more={"size": torch.ones(n, 1)},
        mask=torch.ones(n),
    )
    d.loss(torch.zeros(n, 5), generator=torch.Generator().manual_seed(0), null_rate=0.2, **cond)
    got = d.net.cond
    drop = got["label"] == 10
    assert abs(drop.double().mean() - 0.2) < 4 * (0.16 / n) ** 0.5
    assert torch.equal(got["label"][~drop], cond["label"][~drop])
    assert torch.equal(got["text"], torch.where(drop[:, None, None], -1.0, 1.0).expand(n, 3, 2))
    assert torch.equal(got["more"]["size"], torch.where(drop[:, None], 0.0, 1.0))
    assert torch.equal(got["mask"], cond["mask"])  # null does not name it
    d.loss(torch.zeros(n, 5), **cond)
    assert got is not d.net.cond and torch.equal(d.net.cond["label"], cond["label"])


def test_null_rate_that_cannot_be_is_named():
    d, x, y = dk.NetDenoiser(Seen(), dk.VP(), null={"label": 3}), torch.zeros(2, 1), torch.ones(2)
    for rate in (1.0, -0.1, "a", True):
        with pytest.raises(ValueError, match="null_rate must lie"):
            d.loss(x, label=y, null_rate=rate)
    with pytest.raises(ValueError, match="got no condition"):
        d.loss(x, null_rate=0.1)
    d.null = {"label": None}
    with pytest.raises(TypeError, match="null={'label': None} has none"):
        d.loss(x, label=y, null_rate=0.1)


def test_what_is_put_around_a_denoiser_takes_over_what_it_says_of_itself():
    class Draws(dk.MixtureDenoiser):
        stochastic = True

    inner = Draws(dk.ring(), dk.VP())
    for outer in (dk.Wrapped(inner), dk.clip_x0(inner), dk.threshold(inner), dk.Counter(inner)):
        assert (outer.process, outer.null, outer.stochastic) == (inner.process, inner.null, True)
        assert outer.inner is inner
    with pytest.raises(TypeError, match="NetDenoiser"):
        dk.Counter(nn.Linear(2, 2))


@pytest.mark.parametrize("process", [dk.VP(), dk.HeavyTailed(dk.EDM(), 32.0)])
def test_noise_is_drawn_where_the_generator_is(process):
    g = torch.Generator().manual_seed(0)  # on the processor, whatever the noise is for
    out = process.sample_noise((4, 2), 0.5, g, "meta", torch.float32)
    assert (out.device.type, out.dtype, tuple(out.shape)) == ("meta", torch.float32, (4, 2))
    again = [torch.Generator().manual_seed(1) for _ in range(2)]
    one, two = process.sample_noise((4, 2), generator=again[0]), process.prior((4, 2), again[1])
    assert torch.allclose(two, process.sigma(1.0).to(one.dtype) * one)


class Counts(dk.Wrapped):  # remembers how often each row of the batch was asked for
    def start(self, grid=None):
        super().start(grid)
        self.asked = None

    def forward(self, x, t, **cond):
        self.asked = torch.arange(len(x)) * 0 + 1 if self.asked is None else self.asked + 1
        return self.inner(x, t, **cond)

    def reindex(self, idx):
        super().reindex(idx)
        self.asked = self.asked[idx]


class Many(dk.Denoiser):  # denoisers in whatever container
    def __init__(self, within, members):
        super().__init__()
        self.process, self.within = dk.VP(), within
        self.members = members  # in a list of its own kind, no modules of this one's

    def forward(self, x, t, **cond):
        return [m(x, t, **cond) for m in self.members][0]


@pytest.mark.parametrize(
    "within",
    [
        nn.ModuleList,
        lambda ms: nn.ModuleDict({str(i): m for i, m in enumerate(ms)}),
        lambda ms: nn.ModuleList([nn.ModuleDict({"first": ms[0]}), nn.ModuleList(ms[1:])]),
        lambda ms: nn.ModuleList([*ms, nn.ModuleList(ms)]),  # each of them twice
    ],
    ids=["list", "dict", "nested", "twice"],
)
def test_what_is_in_lists_and_dicts_starts_and_is_resampled_once(within):
    members = [Counts(net()), Counts(net())]
    d = Many(within(members), tuple(members))
    outer = Counts(d)  # and from around it
    for top in (d, outer):
        top.start(GRID)
        assert [m.asked for m in members] == [None, None]
        top(X, 0.9)
        members[1](X, 0.9)
        members[1].asked += torch.arange(6)
        top.reindex(torch.tensor([5, 0, 1, 2, 3, 4]))
        assert members[0].asked.tolist() == [1] * 6
        assert members[1].asked.tolist() == [7, 2, 3, 4, 5, 6]


KINDS_OF_TIMES = ["number", "tensor", "one a sample"]


class Learned(dk.VP):  # its largest rate is to be learnt
    def __init__(self, rate):
        super().__init__()
        self.beta_max = rate


@pytest.mark.parametrize("t", [0.4, torch.tensor(0.4), torch.full((6,), 0.4)], ids=KINDS_OF_TIMES)
def test_a_schedule_can_be_learnt_through_a_prediction(t):
    rate = torch.tensor(20.0, dtype=torch.float64, requires_grad=True)
    x, eps = X.double(), X.double().flip(0)
    t = t.double() if isinstance(t, torch.Tensor) else t
    dk.Prediction.of(x, t, Learned(rate), eps=eps).x0.sum().backward()

    def x0(r):  # (x - sigma eps) / alpha
        alpha = math.exp(-0.4 * (0.4 * (r - 0.1) / 4 + 0.1 / 2))
        return ((x - math.sqrt(1 - alpha**2) * eps) / alpha).sum().item()

    slope = (x0(20 + 1e-4) - x0(20 - 1e-4)) / 2e-4
    assert rate.grad.item() == pytest.approx(slope, rel=1e-7)


def test_coefficients_are_numbers_where_the_time_is_one():
    of = lambda t: dk.Prediction.of(X, t, dk.Flow(), eps=X)
    assert isinstance(of(0.25).alpha, float) and of(0.25).alpha == 0.75
    for t in (torch.tensor(0.25), torch.full((6,), 0.25)):
        # of tensors they stay tensors, whose values are not read
        p = of(t.to("meta") if t.ndim == 0 else t)
        assert isinstance(p.alpha, torch.Tensor) and isinstance(p.sigma, torch.Tensor)
    assert of(torch.full((6,), 0.25)).alpha.shape == (6, 1)


@pytest.mark.parametrize("name", ["nothing", "asked"])
def test_what_neither_a_denoiser_nor_its_run_has_is_named_with_its_class(name):
    d = net()
    for _ in range(2):
        with pytest.raises(AttributeError, match=f"NetDenoiser.* has no attribute '{name}'"):
            getattr(d, name)
        run(d)


@pytest.mark.parametrize(
    "of", [float, torch.tensor, lambda t: torch.full((6,), t)], ids=KINDS_OF_TIMES
)
def test_classifier_guidance_acts_within_its_interval_only(of):
    d, asked = dk.MixtureDenoiser(dk.ring(), dk.VP()), []
    x = X[:, :2].double()

    def log_prob(y, t):
        asked.append(t)
        return (3 * y[:, 0] - y[:, 1]).clone()

    g = dk.classifier_guidance(d, log_prob, 0.7, interval=(0.2, 0.6))
    for t in (0.1, 0.7):
        assert torch.equal(g(x, of(t)).x0, d(x, of(t)).x0) and not asked
    for t in (0.3, 0.5):
        push = torch.tensor([3.0, -1.0], dtype=torch.float64)
        want = d(x, of(t)).score + 0.7 * push
        tol = dict(rtol=1e-5, atol=1e-5) if of is not float else {}  # times in float32
        torch.testing.assert_close(g(x, of(t)).score, want, **tol)
    assert len(asked) == 2
    off = dk.classifier_guidance(d, log_prob, 0.0)
    assert torch.equal(off(x, of(0.5)).x0, d(x, of(0.5)).x0) and len(asked) == 2


def test_classifier_guidance_starts_at_pure_noise():
    "Where the state says nothing of the data, the noise does not say what the data are."
    d = dk.MixtureDenoiser(dk.ring(), dk.Flow())
    x = X[:, :2].double()
    g = dk.classifier_guidance(d, lambda y, t: y[:, 0], 0.5)
    assert torch.equal(g(x, 1.0).x0, d(x, 1.0).x0)
    grid = torch.tensor([1.0, 0.8, 0.6], dtype=torch.float64)
    first = dk.sample(d, dk.DDIM(), x, grid[:2], progress=False)
    want = dk.sample(g, dk.DDIM(), first, grid[1:], progress=False)
    assert torch.equal(dk.sample(g, dk.DDIM(), x, grid, progress=False), want)
