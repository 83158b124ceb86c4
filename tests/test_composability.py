"""Guidance x solver x process x {float32, float64}: finite, and better with more evaluations.
Every two of them meet, in a Latin square; with DIFFKIT_ALL=1 every three do (half an hour).

Methods are found by themselves: every `Solver` subclass and every function that takes `denoiser`
first and returns a `Denoiser` in any exported module of the core and of the chapters on diffusion
enters by being there. A class or function that needs more than its defaults says so in
`ARGUMENTS`; what cannot be built fails the test and says what to add."""

import importlib
import inspect
import os
import typing
import warnings
from contextlib import contextmanager

import pytest
import torch

import diffkit.core.process as P
from diffkit._modidx import d as index
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, Prediction, cfg, count_evals
from diffkit.core.metrics import energy_distance
from diffkit.core.sampling import DDIM, AroundSolver, MultistepSolver, Solver, exact_flow, sample
from diffkit.guidance.minority import mixture_classifier
from diffkit.guidance.svdd import PosteriorMean
from diffkit.models.pfgmpp import FieldDenoiser
from diffkit.solvers.t_stitch import stitch

MODULES = [
    importlib.import_module(m)
    for m in index["syms"]
    if m.split(".")[1] in ("core", "models", "solvers", "guidance", "distill")
    and not m.endswith(("adapters", "show", "lab", "zoo", "training"))
]
# two components a class, so that the conditional flow bends, too
MIX = GaussianMixture(ring(6).means, scales=0.25, labels=[0, 0, 1, 1, 2, 2])
WIDE = GaussianMixture(MIX.means, scales=0.4, labels=MIX.labels)
# what a process without defaults gets, by name: one that wraps another, and its noise
WRAPPED = {"base": P.EDM(), "dof": 8.0}


def _processes():
    for m in MODULES:
        for name, c in vars(m).items():
            found = isinstance(c, type) and issubclass(c, P.Process) and c.__module__ == m.__name__
            if not found or c in (P.Process, P.Around) or name in TOKENS:
                continue
            needs = inspect.signature(c).parameters.values()
            needs = [p.name for p in needs if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
            if missing := [k for k in needs if k not in WRAPPED]:
                raise TypeError(f"{m.__name__}.{name} needs {missing}: add them to WRAPPED")
            yield name, c(**{k: WRAPPED[k] for k in needs})


ERRORS = ("InjectError",)  # their noise is no part of the process's law
TOKENS = ("MaskedProcess",)  # no states in a vector space: its own tests hold (notebook 300)
PROCESSES = dict(_processes())


def exact(mixture, process):
    if process.gaussian:
        return MixtureDenoiser(mixture, process)
    return FieldDenoiser(mixture, process, nodes=16)


def bad(process):
    return exact(WIDE, process)


def log_prob(process):
    def f(x, t, label=None):
        return MIX.log_prob(x, process.alpha(t), process.sigma(t), label) - MIX.log_prob(
            x, process.alpha(t), process.sigma(t)
        )

    return f


@contextmanager
def widened(module):  # a model that is worse inside the block, as one with damaged attention is
    leaf = next(m for m in module.modules() if hasattr(m, "mixture"))
    good, leaf.mixture = leaf.mixture, WIDE
    try:
        yield
    finally:
        leaf.mixture = good


def levels(process):
    f = mixture_classifier(MIX, process)
    return lambda x, t, label=None: f(x, t)


# what a parameter without a default gets, by name; `steps` is the number of steps of the grid
ARGUMENTS = {
    "scale": lambda p, steps: 1.5,
    "bad": lambda p, steps: bad(p),
    "log_prob": lambda p, steps: log_prob(p),
    "solver": lambda p, steps: DDIM(),
    "layers": lambda p, steps: widened,
    "classifier": lambda p, steps: levels(p),
    "plan": lambda p, steps: lambda n: ["cfg"] * n,
    "beta": lambda p, steps: 1.2,
    "reward": lambda p, steps: lambda x: 0.3 * x[:, 0],
    "stitched": lambda p, steps: stitch([bad(p), exact(MIX, p)], 0.5),
}
# a threshold below 1 has an error of its own, however many the steps
GIVEN = {"adaptive_cfg": {"threshold": 1.0}}
# they decide by the steps of a grid, which an adaptive integrator does not have; so set, both are
# cfg
PATHLESS = ("adaptive_cfg", "policy")
VARIANTS = {
    "FKC": [
        {"missing": "ignore", "groups": torch.arange(36) % 3},
        {"missing": "ignore", "resample": None, "zeta": 2.0},
    ],
    "SVDD": [
        {"solver": DDIM(eta=1.0), "value": PosteriorMean(lambda x: x[:, 0]), "M": 4, "alpha": 2.0}
    ],
    "RewardSMC": [
        {
            "solver": DDIM(eta=1.0),
            "value": PosteriorMean(lambda x: x[:, 0]),
            "alpha": 3.0,
            "groups": 36,
        }
    ],
    "DDIM": [{}, {"eta": 1.0}],
    "Ancestral": [{}, {"variance": "large"}],
    "DPMSolverPP": [{"order": 1}, {"order": 2}, {"order": 3}, {"sde": True}],
    "DPMSingle": [{"order": 2}, {"order": 3}],
}


def fill(f, process, given, steps=10):  # arguments without a default
    out = dict(given)
    for name, p in inspect.signature(f).parameters.items():
        if name in out or p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL) or p.default is not p.empty:
            continue
        if name not in ARGUMENTS:
            pytest.fail(
                f"{f.__module__}.{f.__name__} needs {name}=: add it to ARGUMENTS in"
                " tests/test_composability.py"
            )
        out[name] = ARGUMENTS[name](process, steps)
    return out


def solvers() -> list:
    return list(_solvers())


def guidances() -> list:
    return list(_guidances())


def _solvers():
    for m in MODULES:
        for name, c in vars(m).items():
            if (
                isinstance(c, type)
                and issubclass(c, Solver)
                and c.__module__ == m.__name__
                and c not in (Solver, AroundSolver, MultistepSolver)
                and not name.startswith("_")
                and not getattr(c, "discrete", False)
            ):
                for v in VARIANTS.get(name, [{}]):
                    plain = {k: x for k, x in v.items() if isinstance(x, (str, bool, int, float))}
                    label = name + "".join(f"-{k}={x}" for k, x in plain.items())
                    yield pytest.param(c, v, id=label)


def _guidances():
    yield pytest.param(None, id="none")
    for m in MODULES:
        for name, f in vars(m).items():
            if not inspect.isfunction(f) or f.__module__ != m.__name__ or name.startswith("_"):
                continue
            try:
                returns = typing.get_type_hints(f).get("return")
            except Exception:
                continue  # annotations that only a type checker can read
            if (
                isinstance(returns, type)
                and issubclass(returns, Denoiser)
                and next(iter(inspect.signature(f).parameters), "") == "denoiser"
            ):
                yield pytest.param(f, id=name)


def model(guidance, process, dtype=torch.float64):
    d = exact(MIX, process)
    return (
        d
        if guidance is None
        else guidance(
            **fill(guidance, process, {"denoiser": d, **GIVEN.get(guidance.__name__, {})})
        )
    )


G = torch.Generator().manual_seed(0)
X, LABEL = torch.randn(36, 2, generator=G, dtype=torch.float64), torch.arange(36) % 3
_truth = {}


def truth(guidance, process):
    key = (guidance, process)
    if key not in _truth:
        _truth[key] = exact_flow(
            model(cfg if guidance and guidance.__name__ in PATHLESS else guidance, process),
            None,
            X * process.sigma(process.t_max),
            process.t_max,
            max(process.t_min, 1e-3),
            rtol=1e-6,
            atol=1e-8,
            label=LABEL,
        )
    return _truth[key]


def test_the_search_finds_what_is_known():
    found = {p.values[0].__name__ for p in solvers()}
    assert {
        "DDIM",
        "Ancestral",
        "Euler",
        "Heun",
        "EulerMaruyama",
        "DPMSolverPP",
        "DPMSingle",
        "FKC",
        "SVDD",
        "RewardSMC",
    } <= found
    assert {
        "cfg",
        "contrast",
        "classifier_guidance",
        "threshold",
        "apg",
        "adaptive_cfg",
        "policy",
        "pag",
        "minority",
        "anneal",
        "tilt",
        "clip_x0",
    } <= {p.values[0].__name__ for p in guidances() if p.values[0]}
    assert {"VP", "Cosine", "Discrete", "VE", "EDM", "Flow", "HeavyTailed"} <= set(PROCESSES)
    assert [k for k, p in PROCESSES.items() if not p.gaussian] == ["HeavyTailed"]


def square(rows, columns, symbols, everything):
    """The triples (row, column, symbol) in which every two meet, if there are no more symbols than
    rows and than columns; or all triples."""
    for i, r in enumerate(rows):
        for j, c in enumerate(columns):
            for k, s in enumerate(symbols):
                if everything or k == (i + j) % len(symbols):
                    yield r, c, s


def combinations():
    everything = os.environ.get("DIFFKIT_ALL", "") not in ("", "0")
    for s, g, name in square(solvers(), guidances(), PROCESSES, everything):
        values = (*s.values, *g.values, PROCESSES[name])
        yield pytest.param(*values, id=f"{s.id}-{g.id}-{name}")


def test_every_two_meet():
    for n in ((30, 17, 8), (8, 9, 8)):
        found = list(square(*map(range, n), False))
        assert len(found) == n[0] * n[1]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert len({(t[a], t[b]) for t in found}) == n[a] * n[b]
    assert len(list(square(range(3), range(4), range(2), True))) == 24
    assert len(PROCESSES) <= min(len(solvers()), len(guidances()))


@pytest.mark.parametrize("solver,options,guidance,process", combinations())
def test_every_combination(solver, options, guidance, process):
    start, end = process.t_max, max(process.t_min, 1e-3)
    x = X * process.sigma(start)

    def run(steps, dtype=torch.float64, seed=0):
        s = solver(**fill(solver, process, options))
        return sample(
            model(guidance, process),
            s,
            x.to(dtype),
            P.time_grid(process, steps, "log_snr", start, end),
            cond={"label": LABEL},
            generator=torch.Generator().manual_seed(seed),
            progress=False,
        )

    if not process.gaussian:
        try:
            few = run(7)
        except ValueError as e:
            assert "Gaussian" in str(e)
            return
        # what draws Gaussian noise on its way is wrong here, and must not get this far
        assert solver.__name__ in ERRORS or torch.equal(few, run(7, seed=1))
    few, many, single = run(7), run(32), run(7, torch.float32)
    for y in (few, many, single):
        assert torch.isfinite(y).all()
    assert single.dtype == torch.float32
    random = not torch.equal(few, run(7, seed=1))
    if random:  # no path to compare: the distribution against that of a fine run
        fine = run(48, seed=2)
        # two samples of 36 points of one law differ by less than 0.16 in energy distance in 99 of
        # 100 cases (measured on this mixture): that much is luck
        assert energy_distance(many, fine) < max(energy_distance(few, fine), 0) + 0.16
    else:
        t = truth(guidance, process)
        rms = lambda y: (y.double() - t).square().mean().sqrt().item()
        assert rms(many) < rms(few)
        assert (single.double() - few).abs().max() < 1e-3 * (1 + few.abs().max())


MULTISTEP = [
    p
    for p in solvers()
    if issubclass(p.values[0], MultistepSolver) and p.values[0].__name__ != "EulerMaruyama"
]


@pytest.mark.parametrize("solver,options", MULTISTEP)
@pytest.mark.parametrize("door", ["epsilon", "v_prediction", "flow_prediction"])
def test_both_doors(solver, options, door):
    """A pipeline's loop with the solver as its scheduler, and `sample` on the same grid, step
    the same; the scheduler survives being saved."""
    pytest.importorskip("diffusers")
    from diffkit.core.adapters import DiffusersScheduler

    kind = {"epsilon": "eps", "v_prediction": "v", "flow_prediction": "flow"}[door]
    sch = DiffusersScheduler(solver(**fill(solver, None, options)), prediction_type=door)
    sch = DiffusersScheduler.from_config(sch.config)
    sch.set_timesteps(9)

    class Says(MixtureDenoiser):  # the same knowledge, put out as the pipeline's model puts it
        def forward(self, x, t, label=None):
            return Prediction.of(
                x, t, self.process, **{kind: super().forward(x, t, label).get(kind)}
            )

    d, x = Says(MIX, sch.process), X.float()
    try:
        want = sample(
            d,
            sch.solver,
            x,
            sch.grid,
            cond={"label": LABEL},
            generator=torch.Generator().manual_seed(0),
            progress=False,
        )
    except ValueError as e:
        # noise forms cannot start at alpha = 0: the pipeline must be told the same
        assert door == "flow_prediction" and "alpha" in str(e) or "start below 1" in str(e)
        with pytest.raises(ValueError):
            sch.set_timesteps(9)
            sch.step(x, sch.timesteps[0], x)
        return
    g, y = torch.Generator().manual_seed(0), x
    sch.set_timesteps(9)
    for t, u in zip(sch.timesteps, sch.grid.tolist()):
        y = sch.step(d(y, u, label=LABEL).get(kind), t, y, generator=g).prev_sample
    # the same sums of the same numbers; rounding alone
    assert (y - want).abs().max() < 1e-5 * max(1, want.abs().max())


@pytest.mark.parametrize("process", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("solver,options", solvers())
def test_a_grid_may_end_at_exactly_zero_and_be_short(solver, options, process):
    """At t = 0 there is no noise. Every solver gets there, or says before the first evaluation
    that it cannot; and one step is enough for those without a warm-up."""
    # from where alpha is small, but not so small that Runge-Kutta's look ahead is multiplied a
    # thousandfold (notebook 201)
    x = X * process.sigma(0.9)
    for steps in (12, 2, 1):
        grid = P.time_grid(process, steps, "uniform", 0.9, 0.0)
        s, d = solver(**fill(solver, process, options)), exact(MIX, process)
        with count_evals(d) as n, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the order that is lowered
            try:
                y = sample(
                    d,
                    s,
                    x,
                    grid,
                    cond={"label": LABEL},
                    generator=torch.Generator().manual_seed(0),
                    progress=False,
                )
            except ValueError as e:
                if not process.gaussian and "Gaussian" in str(e):  # said when noise is drawn
                    continue
                assert n.calls == 0 and any(
                    w in str(e) for w in ("cannot end", "at least", "end above 0", "infinite")
                ), e
                continue
        assert torch.isfinite(y).all()
        if steps == 12:
            assert (y.norm(dim=1) - 1).abs().median() < 0.5  # near the ring


class Worse(Denoiser):  # the same network, a little off
    def __init__(self, d):
        super().__init__()
        self.inner, self.process, self.null = d, d.process, d.null

    def forward(self, x, t, **cond):
        return Prediction.of(x, t, self.process, x0=0.9 * self.inner(x, t, **cond).x0)


def pull(x, t, **cond):  # a classifier that likes small numbers
    return -x.flatten(1).square().mean(1)


SCORES = ("anneal", "tilt")  # powers of densities: no prediction of data at pure noise
IN_A_PIPELINE = {  # what a parameter gets there, where a mixture's own would not do
    "bad": lambda d, kind: Worse(d),
    "log_prob": lambda d, kind: pull,
    "layers": lambda d, kind: "mid_block" if kind == "sd" else "transformer_blocks.0",
    "classifier": lambda d, kind: lambda x, t, **c: torch.stack([pull(x, t), 0 * pull(x, t)], 1),
    "reward": lambda d, kind: lambda x: 0.3 * x.flatten(1).mean(1),
}


@pytest.mark.parametrize("kind", ["sd", "sd3"])
@pytest.mark.parametrize("guidance", [p for p in guidances() if p.values[0]])
def test_every_guidance_in_a_pipeline(guidance, kind):
    "The same as the library's own loop around the pipeline's network."
    pytest.importorskip("diffusers")
    from diffkit.core.adapters import (
        DiffusersScheduler,
        from_diffusers,
        guide_pipeline,
        random_pipeline,
    )

    pipe, call = random_pipeline(kind)
    theirs = pipe.scheduler
    pipe.scheduler = DiffusersScheduler(DDIM(), like=theirs)
    shape = (len(call["prompt_embeds"]), 4, 8, 8)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))

    def make(d):
        given = {k: f(d, kind) for k, f in IN_A_PIPELINE.items()}
        given = {k: v for k, v in given.items() if k in inspect.signature(guidance).parameters}
        return guidance(**fill(guidance, d.process, {"denoiser": d, **given}))

    ask = lambda: pipe(**call, latents=x, num_inference_steps=5, guidance_scale=3.0).images
    if kind == "sd3" and guidance.__name__ in SCORES:
        with guide_pipeline(pipe, make), pytest.raises(ValueError, match="alpha=0"):
            ask()
        return
    with guide_pipeline(pipe, make):
        got = ask()
    names = {"prompt_embeds": "encoder_hidden_states"}
    if kind == "sd3":
        names["pooled_prompt_embeds"] = "pooled_projections"
    cond = {to: call[k] for k, to in names.items()}
    null = {to: call[f"negative_{k}"] for k, to in names.items()}
    d = from_diffusers(pipe.unet if kind == "sd" else pipe.transformer, theirs, null=null)
    grid = pipe.scheduler.grid
    want = sample(make(d), DDIM(), x, grid, cond=cond, progress=False)
    assert (got - want).abs().max() < 1e-4 * max(1, want.abs().max())
