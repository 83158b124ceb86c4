"""Grids against torch and brute force, networks on them in their limits, calibration states bit for
bit, groups of times, files that give back what went in, and every error."""

import copy
import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import diffkit as dk
from diffkit.core.denoiser import NetDenoiser
from diffkit.core.sampling import trace
from diffkit.distill.ptq4dm import (
    PerTime,
    Quantizer,
    calibrate,
    calibration_set,
    load_int8,
    quantize,
    sample_times,
    save_int8,
)

F32 = torch.float32


def gen(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def network(seed=0, classes=3):
    torch.manual_seed(seed)
    net = dk.MLP(4, hidden=24, depth=2, classes=classes)
    for p in net.parameters():  # its head starts at 0
        if p.ndim > 1 and not p.any():
            nn.init.normal_(p, std=0.3)
    return net


def denoiser(seed=0):
    return NetDenoiser(network(seed), dk.VP(), "v", null={"label": 3}).eval()


X, T, LABEL = randn(40, 4, seed=1), torch.rand(40, generator=gen(2)), torch.arange(40) % 3
COND = {"label": LABEL}
GRID = dk.time_grid(dk.VP(), 6)


def ask(model, **cond):
    with torch.no_grad():
        return model(X, T, **(cond or COND)).native


# --- the grid


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("per_channel", [True, False])
def test_values_by_hand(bits, symmetric, per_channel):
    v = randn(5, 40, dtype=torch.float64) + 0.3
    q = Quantizer(bits, symmetric=symmetric, per_channel=per_channel).calibrate(v)
    got, codes = q(v), q.codes(v)
    rows = v if per_channel else v.reshape(1, -1)
    for i, row in enumerate(rows):
        delta, zero = q.scale.reshape(-1)[i], q.zero_point.reshape(-1)[i]
        table = delta * (torch.arange(2**bits, dtype=torch.float64) - zero)
        assert table[0] <= 0 <= table[-1] and 0 in table
        if symmetric:
            assert zero == 2 ** (bits - 1)
        near = (row[:, None] - table).abs().min(1).values
        mine = got.reshape(len(rows), -1)[i]
        # the nearest of all values, by brute force; ties have one distance
        assert_close((mine - row).abs(), near, rtol=1e-9, atol=1e-12)
    assert codes.min() >= 0 and codes.max() <= 2**bits - 1
    assert_close(q.values(codes), got)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_is_the_best_of_its_ranges_and_near_the_best_of_all(bits):
    v = randn(1500, dtype=torch.float64) ** 3
    delta_of = lambda theta: 2 * theta / (2**bits - 1)

    def error(theta):
        d = delta_of(theta)
        q = ((v / d).round() + 2 ** (bits - 1)).clamp(0, 2**bits - 1) - 2 ** (bits - 1)
        return (q * d - v).abs().pow(2.4).mean()

    top = v.abs().max()
    q = Quantizer(bits).calibrate(v)
    found = (q(v) - v).abs().pow(2.4).mean()
    assert_close(found, min(error(top * i / 100) for i in range(1, 101)))
    finer = min(error(top * i / 2000) for i in range(1, 2001))
    # the error is flat at its least: a hundredth of the range away it is a few per cent more
    assert finer <= found <= 1.05 * finer
    ends = Quantizer(bits, search="minmax").calibrate(v)
    assert found < (1 if bits == 8 else 0.8) * (ends(v) - v).abs().pow(2.4).mean()


def test_the_drawn_search_sees_the_far_values():
    v = randn(60_000)
    v[7] = 40.0  # one outlier, which a plain draw would miss
    full, drawn = (Quantizer(12, limit=n).calibrate(v) for n in (60_000, 1600))
    error = lambda q: (q(v) - v).abs().pow(2.4).mean().item()
    assert error(drawn) <= 1.05 * error(full)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_drawn_search_is_repeatable_and_the_same_for_the_mirrored_values(bits, symmetric):
    v = randn(300).abs()  # the draw meets the far quarter often
    how = dict(bits=bits, symmetric=symmetric, limit=100, steps=1000)
    found = Quantizer(**how).calibrate(v).scale
    with torch.random.fork_rng(devices=[]):
        for seed in range(5):  # the draw is its own, whatever was drawn before
            torch.manual_seed(seed)
            before = torch.random.get_rng_state()
            assert torch.equal(Quantizer(**how).calibrate(v).scale, found)
            assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(Quantizer(**how).calibrate(-v).scale, found)


def test_channels_are_tensors_alone():
    v = torch.cat([randn(3, 8, 2, 2), 100 * randn(1, 8, 2, 2), torch.zeros(1, 8, 2, 2)])
    rows = Quantizer(5, per_channel=True).calibrate(v)
    for i, row in enumerate(v[:4]):
        assert_close(rows(v)[i], Quantizer(5).calibrate(row)(row))
    assert not rows(v)[4].any() and rows.zero_point.unique().tolist() == [16]
    one = Quantizer(5).calibrate(v)
    assert (rows(v) - v)[:3].square().mean() < 0.01 * (one(v) - v)[:3].square().mean()


def test_percentile_and_one_sign():
    v = randn(10_000).abs()
    q = Quantizer(8, search="percentile", percentile=0.9).calibrate(v)
    assert_close(q.scale * 255, v.sort().values[8999])
    assert q.zero_point == 0
    assert Quantizer(8).calibrate(-v).zero_point == 255


def test_running_means():
    a, b = randn(50), 5 * randn(50, seed=1)
    q = Quantizer(8, search="minmax").calibrate(a).calibrate(b, 0.9)
    # both ends have the same size
    assert_close(q.scale * 255 / 2, 0.9 * a.abs().max() + 0.1 * b.abs().max())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_types_stay(dtype):
    v = randn(40).to(dtype)
    q = Quantizer(8).calibrate(v)
    assert q(v).dtype == dtype and q.scale.dtype != torch.float16


# --- networks


def test_layers_by_hand():
    net = nn.Sequential(nn.Linear(4, 9), nn.SiLU(), nn.Linear(9, 7), nn.SiLU(), nn.Linear(7, 2))
    out = quantize(net, X, weight_bits=4, act_bits=5)
    h = X
    for i, bits in ((0, 8), (2, 4), (4, 8)):
        w = Quantizer(bits, per_channel=True).calibrate(net[i].weight)(net[i].weight)
        assert torch.equal(out[i].weight, w)
        h = nn.functional.linear(h, w, net[i].bias)
        if i < 4:
            h = nn.functional.silu(Quantizer(5).calibrate(h)(h))
    assert_close(out(X), h)
    plain = quantize(net, X, weight_bits=4, act_bits=None, keep8=False)
    assert all(len(r.unique()) <= 16 for i in (0, 2, 4) for r in plain[i].weight)


def test_many_bits_are_the_network_and_more_bits_are_better():
    model = denoiser()
    want, before = ask(model), copy.deepcopy(model.state_dict())
    error = {}
    for bits in (2, 4, 8, 16):
        q = quantize(model, X, T, COND, weight_bits=bits, act_bits=bits)
        error[bits] = ((ask(q) - want).norm() / want.norm()).item()
    assert error[16] < 1e-3 and error[16] < error[8] / 50 < error[4] / 500 < error[2] / 50
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert torch.equal(ask(model), want)


def test_calibration_is_repeatable_and_replaces_what_was_found():
    q = quantize(denoiser(), X, T, COND)
    want = ask(q)
    calibrate(q, 10 * X, T, COND)
    assert not torch.equal(ask(q), want)
    calibrate(q, X, T, COND)
    assert torch.equal(ask(q), want)
    one = calibrate(copy.deepcopy(q), X, T, COND, batch_size=40)
    assert torch.equal(ask(one), want)
    four = calibrate(copy.deepcopy(q), X, T, COND, batch_size=10)
    assert not torch.equal(ask(four), want)


def test_other_bits_and_rules_on_the_same_weights():
    q = quantize(denoiser(), X, T, COND)
    for how in (dict(act_bits=4), dict(search="minmax"), dict(act_bits=5, p=2.0)):
        fresh = quantize(denoiser(), X, T, COND, act_bits=how.get("act_bits", 8))
        calibrate(fresh, X, T, COND, **how)
        assert torch.equal(ask(calibrate(q, X, T, COND, **({"act_bits": 8} | how))), ask(fresh))
    four = quantize(denoiser(), X, T, COND, act_bits=4)
    assert torch.equal(ask(calibrate(q, X, T, COND, act_bits=4)), ask(four))


def test_a_copy_is_a_network_of_its_own():
    q = quantize(denoiser(), X, T, COND)
    other, want = copy.deepcopy(q), ask(q)
    calibrate(other, 20 * X, T, COND)
    assert torch.equal(ask(q), want)


def test_every_solver_and_guidance_takes_it():
    model = denoiser()
    q = quantize(model, X, T, COND, weight_bits=16, act_bits=16)
    net = quantize(model.net, X, T, COND, weight_bits=16, act_bits=16)
    again = NetDenoiser(net, dk.VP(), "v", null={"label": 3})
    for d in (q, again):
        states = list(trace(model, dk.DDIM(), X, GRID, cond=COND))[:-1]
        t = torch.tensor([st.t for st in states]).repeat_interleave(40)
        calibrate(d, torch.cat([st.x for st in states]), t, {"label": LABEL.repeat(6)})
    for solver in (dk.DDIM(), dk.Heun(), dk.DPMSolverPP(order=2)):
        draw = lambda d: dk.sample(d, solver, X, GRID, cond=COND, progress=False)  # noqa: B023
        want = draw(model)
        for d in (q, again):
            assert (draw(d) - want).norm() < 0.02 * want.norm()
    calibrate(dk.cfg(q, 2.0), X, T, COND)
    want = dk.cfg(model, 2.0)(X, T, **COND).native
    assert (dk.cfg(q, 2.0)(X, T, **COND).native - want).norm() < 1e-3 * want.norm()


def test_gradients_pass_where_nothing_is_cut():
    q = quantize(denoiser(), X, T, COND, weight_bits=16, act_bits=16)
    x = X.clone().requires_grad_()
    (got,) = torch.autograd.grad(q(x, T, **COND).native.sum(), x)
    y = X.clone().requires_grad_()
    (want,) = torch.autograd.grad(denoiser()(y, T, **COND).native.sum(), y)
    # a value at an end of its range has no slope: a few rows
    assert ((got - want).norm(dim=1) < 1e-2 * want.norm(dim=1)).float().mean() > 0.5


def test_weights_of_eight_bits_agree_with_torchs_dynamic_int8():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 64), nn.SiLU(), nn.Linear(64, 8)).eval()
    x = randn(200, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            theirs = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
            peer = theirs(x)
        except (AttributeError, RuntimeError) as e:
            pytest.skip(f"no dynamic quantization here: {e}")
    with torch.no_grad():
        want = net(x)
        ours = quantize(net, x)(x)
    error = lambda v: ((v - want).norm() / want.norm()).item()
    # one scale a tensor there, one a row here; inputs there, outputs here
    assert error(ours) < 0.02 and error(ours) < 1.5 * error(peer)


# --- calibration states


def test_times_have_their_law():
    k = sample_times(20_000, 1000, mean=0.3, generator=gen(0)).double()
    # 4 standard errors; rounding adds 1/12 to the variance
    assert abs(k.mean() - 300) < 4 * (500 / 20_000) ** 0.5
    assert abs(k.var() - 500 - 1 / 12) < 4 * 500 * (2 / 20_000) ** 0.5
    u = sample_times(20_000, 10, "uniform", generator=gen(0))
    assert (torch.bincount(u, minlength=10) - 2000).abs().max() < 4 * (2000 * 0.9) ** 0.5
    assert (sample_times(5, 7, "clean") == 0).all() and (sample_times(5, 7, "noisy") == 6).all()
    both = sample_times(999, 3, std=100.0, generator=gen(0))
    assert both.min() == 0 and both.max() == 2


@pytest.mark.parametrize("solver", [dk.DDIM(), dk.Ancestral()])
def test_states_are_those_of_the_sampler_with_their_own_time(solver):
    model = denoiser()
    k = torch.arange(40) % 6
    x, t, cond = calibration_set(model, solver, X, GRID, k, COND, generator=gen(4))
    states = list(trace(model, solver, X, GRID, cond=COND, generator=gen(4)))
    for i in range(40):
        st = states[5 - k[i]]
        assert torch.equal(x[i], st.x[i]) and t[i] == st.t
    assert torch.equal(x[k == 5], X[k == 5])  # pure noise
    assert (t[k == 0] == GRID[-2]).all() and torch.equal(cond["label"], LABEL)


def test_noised_images():
    model, k = denoiser(), torch.arange(40) % 6
    x, t, _ = calibration_set(
        model, dk.DDIM(), X, GRID, k, COND, source="forward", generator=gen(4)
    )
    eps = torch.randn(X.shape, generator=gen(4), dtype=x.dtype)
    want = model.process.alpha(t)[:, None] * X + model.process.sigma(t)[:, None] * eps
    assert_close(x, want.to(x.dtype))


# --- groups of times


class Louder(nn.Module):  # its first layer's outputs grow a hundredfold with the time
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(4, 30), nn.Linear(30, 4)

    def forward(self, x, t):
        size = 100 ** t[:, None]
        return self.b(self.a(x * size) / size)


def test_one_group_is_the_model_and_groups_are_better_where_ranges_grow():
    model = NetDenoiser(Louder(), dk.VP(), "v")
    run = lambda d: d(X, T).native.detach()
    q = quantize(model, X, T, act_bits=6)
    assert torch.equal(run(PerTime(q, X, T, groups=1)), run(q))
    many = PerTime(q, X, T, groups=8)
    assert (run(many) - run(model)).norm() < 0.3 * (run(q) - run(model)).norm()


def test_rows_go_to_the_group_of_their_time():
    q = quantize(denoiser(), X, T, COND, act_bits=4)
    many = PerTime(q, X, T, COND, groups=4)
    which = torch.bucketize(T.double(), many.edges)
    assert which.bincount().tolist() == [10, 10, 10, 10]
    got = ask(many)
    with torch.no_grad():
        for g in range(4):
            i = which == g
            part = quantize(denoiser(), X, T, COND, act_bits=4)
            calibrate(part, X[i], T[i], {"label": LABEL[i]})
            assert_close(got[i], part(X[i], T[i], label=LABEL[i]).native)
        alone = many(X[:3], 0.5, label=LABEL[:3]).native
        rows = many(X[:3], torch.full((3,), 0.5), label=LABEL[:3]).native
    assert_close(alone, rows)
    shared = {p.data_ptr() for p in many.parameters()}
    assert len(shared) == len(list(q.parameters()))
    out = dk.sample(many, dk.DDIM(), X, GRID, cond=COND, progress=False)
    assert out.isfinite().all()


# --- files


@pytest.mark.parametrize(
    "how",
    [
        dict(),
        dict(weight_bits=3, act_bits=6),
        dict(weight_bits=13, act_bits=None),
        dict(symmetric=False, keep8=False, weight_bits=5),
        dict(skip=["net.cond.*"]),
    ],
)
def test_files_give_back_what_went_in(tmp_path, how):
    q = quantize(denoiser(), X, T, COND, **how)
    n = save_int8(tmp_path / "f", q)
    assert n == (tmp_path / "f").stat().st_size
    back = load_int8(tmp_path / "f", denoiser(seed=5))
    assert all(torch.equal(a, b) for a, b in zip(q.parameters(), back.parameters()))
    assert torch.equal(ask(back), ask(q))
    save_int8(tmp_path / "g", back)
    a, b = (dk.load_tensors(tmp_path / f)[0] for f in "fg")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_file_of_eight_bits_is_a_quarter(tmp_path):
    net = nn.Sequential(nn.Linear(512, 512), nn.SiLU(), nn.Linear(512, 512))
    n = save_int8(tmp_path / "f", quantize(net, randn(8, 512)))
    dk.save_tensors(tmp_path / "g", net.state_dict())
    # scales and biases are two of 512 numbers, and stay floats
    assert n < 0.26 * (tmp_path / "g").stat().st_size


def test_double_and_convolutions(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Conv1d(3, 1, 2)).double()
    net(randn(9, 2, 8, dtype=torch.float64))
    x = randn(9, 2, 8, seed=3, dtype=torch.float64)
    q = quantize(net, x)
    save_int8(tmp_path / "f", q)
    back = load_int8(tmp_path / "f", copy.deepcopy(net))
    assert torch.equal(back(x), q(x)) and back(x).dtype == torch.float64


# --- what is refused


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return self.used(x)


NAN = torch.full((4, 4), math.nan)


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: Quantizer(17), "bits must be a whole number from 2 to 16"),
        (lambda: Quantizer(True), "from 2 to 16"),
        (lambda: Quantizer(8, search="best"), "lp, minmax or percentile"),
        (lambda: Quantizer(8, p=0), "p, steps and limit must be positive"),
        (lambda: Quantizer(8, percentile=1.5), "percentile in"),
        (lambda: Quantizer(8, bit=3), "bit"),
        (lambda: Quantizer().calibrate(NAN), "finite"),
        (lambda: Quantizer().calibrate(LABEL), "floating point"),
        (lambda: Quantizer()(X), "call calibrate first"),
        (lambda: quantize(nn.ReLU(), X), "no Linear or Conv layer"),
        (lambda: quantize(nn.Linear(4, 2), X, weight_bits=1), "bits"),
        (lambda: quantize(nn.Linear(4, 2), X, serch="lp"), "serch"),
        (lambda: quantize(Twice(), X), "do not reach \\['unused'\\]"),
        (lambda: quantize(Twice(), X, skip="use"), "no layer is called 'use'"),
        (lambda: quantize(quantize(Twice(), X, skip="unused"), X), "quantized already"),
        (lambda: quantize(denoiser(), X, T, {"label": LABEL[:3]}), "one row a sample"),
        (lambda: quantize(denoiser(), X, T[:3], COND), "t must"),
        (lambda: calibrate(denoiser(), X, T, COND), "call quantize first"),
        (lambda: sample_times(0, 5), "at least 1"),
        (lambda: sample_times(5, 5, "gauss"), "ndtc, uniform, clean or noisy"),
        (lambda: sample_times(5, 5, mean=1.2), "mean must lie"),
        (lambda: sample_times(5, 5, std=-1.0), "std not be negative"),
        (lambda: calibration_set(denoiser(), dk.DDIM(), X, GRID, LABEL + 5, COND), "from 0 to 5"),
        (lambda: calibration_set(denoiser(), dk.DDIM(), X, GRID, LABEL[:9], COND), "40 whole"),
        (
            lambda: calibration_set(denoiser(), dk.DDIM(), X, GRID, LABEL, COND, source="both"),
            "backward or forward",
        ),
        (lambda: PerTime(quantize(denoiser(), X, T, COND), X, T, COND, groups=0), "groups"),
        (lambda: PerTime(quantize(denoiser(), X, T, COND), X, 0.5, COND), "has no state"),
        (lambda: save_int8("f", denoiser()), "call quantize first"),
    ],
)
def test_wrong_calls_are_named(call, said):
    with pytest.raises((ValueError, TypeError, RuntimeError), match=said):
        call()


def test_a_file_of_another_kind_or_shape_is_refused(tmp_path):
    dk.save_tensors(tmp_path / "f", dict(a=X))
    with pytest.raises(ValueError, match="was not written by save_int8"):
        load_int8(tmp_path / "f", denoiser())
    save_int8(tmp_path / "g", quantize(denoiser(), X, T, COND))
    with pytest.raises(ValueError, match="does not fit"):
        load_int8(tmp_path / "g", NetDenoiser(dk.MLP(4, hidden=32, depth=2, classes=3), dk.VP()))
    with pytest.raises(ValueError, match="does not fit"):
        load_int8(tmp_path / "g", network())
