"""AdAdaGrad: closed forms and written-out formulas, any split in micro-batches and ranks, the sizer
in `fit` and in a loop, AdaGrad-Norm against torch, the oracle, errors."""

import json
import math
import os
import runpy
import socket
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from diffkit.adaptive.adadagrad import (
    AdaGradNorm,
    AdaptiveBatchSampler,
    BatchSizer,
    adadagrad_bed,
    Stats,
    augmented_test,
    batch_error,
    best_schedule,
    gradient_stats,
    inner_product_test,
    merge,
    merge_ranks,
    norm_test,
    orthogonality_test,
    per_sample_grads,
    without_replacement,
)
from diffkit.core.training import fit

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


GRADS = normal(37, 11) @ normal(11, 11, seed=1) + 0.5  # correlated, not centred


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def data(n=300, dtype=torch.float32, seed=2):
    x = torch.randn(n, 5, generator=rng(seed), dtype=dtype)
    return x, (x[:, 0] + 0.5 * x[:, 1] > 0).long() + (x[:, 2] > 1).long()


def flat(model, value):
    return torch.cat([v.flatten() for v in torch.autograd.grad(value, list(model.parameters()))])


# --- the statistics


def test_stats_are_numpys_mean_and_variance():
    s = gradient_stats(GRADS, inner=True)
    g = GRADS.numpy()
    np.testing.assert_allclose(s.mean, g.mean(0), rtol=1e-12)
    np.testing.assert_allclose(s.m2 / s.dof, g.var(0, ddof=1), rtol=1e-12)
    along = g @ g.mean(0)
    across = g - np.outer(along, g.mean(0)) / (g.mean(0) @ g.mean(0))
    np.testing.assert_allclose(s.along / s.dof, along.var(ddof=1), rtol=1e-12)
    np.testing.assert_allclose(s.across / s.dof, across.var(0, ddof=1).sum(), rtol=1e-11)


@pytest.mark.parametrize("cut", [[37], [1, 36], [5, 12, 20], [1] * 37])
def test_any_split_gives_the_whole(cut):
    whole, parts = gradient_stats(GRADS, inner=True), GRADS.split(cut)
    for got in (
        gradient_stats(parts, inner=True),
        gradient_stats(GRADS, [1] * 37, inner=True),
        merge(*(gradient_stats(p) for p in parts)),
    ):
        assert (got.n, got.dof) == (37, 36)
        for k in ("mean", "m2", "along", "across"):
            if getattr(got, k) is not None:  # merge cannot know what is along a mean to come
                want = torch.as_tensor(getattr(whole, k), dtype=F64)
                value = torch.as_tensor(getattr(got, k), dtype=F64)
                torch.testing.assert_close(value, want, rtol=1e-10, atol=1e-10)


def test_large_rows_are_taken_in_pieces():  # the loop over rows, more than one turn of it
    g = normal(50, 20000)
    s = gradient_stats(g)
    torch.testing.assert_close(s.m2 / 49, g.var(0), rtol=1e-10, atol=0)


def test_micro_batches_estimate_the_variance_without_bias():
    draws, sizes = 1500, [3, 5, 8, 8]
    means = normal(draws, 4, 2, seed=3) / torch.tensor(sizes, dtype=F64).sqrt()[:, None]
    got = [gradient_stats(m, sizes) for m in means]
    assert got[0].n == 24 and got[0].dof == 3
    value = torch.stack([s.m2 / s.dof for s in got]).mean(0)
    # variance 1; a chi-square of 3 degrees over 1500 draws: standard error 0.021
    torch.testing.assert_close(value, torch.ones(2, dtype=F64), rtol=0, atol=0.1)
    want = (torch.tensor(sizes, dtype=F64) @ means[0]) / 24
    torch.testing.assert_close(got[0].mean, want)


# --- the tests


def test_quadratic_in_closed_form():
    a = normal(200, 7, seed=4)
    for far in (1.0, 0.5, 0.25):
        x = a.mean(0) + far
        want = a.var(0).sum() / (0.3**2 * 7 * far**2)
        assert norm_test(gradient_stats(x - a), 0.3) == pytest.approx(float(want), rel=1e-10)


def test_pythagoras_and_scale():
    s = gradient_stats(GRADS, inner=True)
    both = inner_product_test(s, 0.4) + orthogonality_test(s, 0.4)
    assert norm_test(s, 0.4) == pytest.approx(both, rel=1e-10)
    ip, orth = inner_product_test(s, 0.3), orthogonality_test(s, 2.0)
    assert augmented_test(s, 0.3, 2.0) == max(ip, orth)
    assert augmented_test(s, 3.0, 0.2) == orthogonality_test(s, 0.2)
    scaled = gradient_stats(-3 * GRADS, inner=True)
    for f in (norm_test, inner_product_test, orthogonality_test, augmented_test):
        assert f(scaled) == pytest.approx(f(s), rel=1e-10)
    assert norm_test(s, 0.2) == pytest.approx(norm_test(s, 0.4) * 4)
    assert inner_product_test(s, 0.2) == pytest.approx(inner_product_test(s, 0.4) * 4)


def test_parity_with_the_official_sums_over_tensors():
    lengths = [4, 5, 2]
    s = gradient_stats(GRADS, inner=True, per_tensor=lengths)
    along = across = square = 0.0
    for g in GRADS.split(lengths, 1):  # written out, tensor by tensor
        m = g.mean(0)
        p = g @ m
        along += p.var()
        across += (g - p[:, None] * m / m.square().sum()).var(0).sum()
        square += m.square().sum()
    assert inner_product_test(s, 0.1) == pytest.approx(float(along / 0.01 / square**2), rel=1e-10)
    assert orthogonality_test(s, 0.1) == pytest.approx(float(across / 0.01 / square), rel=1e-10)
    plain = gradient_stats(GRADS, inner=True)
    assert norm_test(s) == norm_test(plain)
    assert inner_product_test(s) != pytest.approx(inner_product_test(plain), rel=0.01)


def test_debias_is_the_noise_scale_on_average():
    # |grad F| = 1, trace 20: McCandlish's B = 20; numerator and denominator each without bias
    x = normal(1500, 10, 20, seed=5)
    x[..., 0] += 1
    stats = [gradient_stats(v) for v in x]
    ratio = [norm_test(s, 1.0) for s in stats]
    square = [float(s.mean.square().sum()) for s in stats]
    noise = [r * q for r, q in zip(ratio, square)]
    left = [q - n / 10 for q, n in zip(square, noise)]
    assert np.mean(noise) == pytest.approx(20, rel=0.01)
    assert np.mean(left) == pytest.approx(1, rel=0.12)  # standard error 0.03
    for s, n, v in zip(stats, noise, left):
        want = n / v if v > 0 else math.inf
        assert norm_test(s, 1.0, debias=True) == pytest.approx(want, rel=1e-9)


def test_coordinates():
    s = gradient_stats(GRADS)
    ratio = np.sort((GRADS.var(0) / GRADS.mean(0).square()).numpy()) / 0.25
    assert norm_test(s, coordinate=1.0) == pytest.approx(ratio[-1])
    assert norm_test(s, coordinate=0.5) == pytest.approx(ratio[5])
    assert norm_test(s, coordinate=0.0) == pytest.approx(ratio[0])
    # at least that share passes: the next one up where the quantile falls between two
    assert norm_test(s, coordinate=0.01) == pytest.approx(ratio[1])
    dead = gradient_stats(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))  # no noise, no gradient: passes
    assert norm_test(dead, coordinate=1.0) == 0
    lost = gradient_stats(torch.tensor([[1.0, -1.0], [2.0, 1.0]]))
    assert norm_test(lost, coordinate=1.0) == math.inf
    one = gradient_stats(GRADS[:, :1])  # one coordinate: the plain test
    assert norm_test(one, coordinate=0.7, debias=True) == pytest.approx(norm_test(one, debias=True))


def test_squares_of_single_precision_are_summed_in_double():
    # 2^25 + 1 has no place in single precision
    m2, one = torch.tensor([2.0**25, 1.0]), torch.tensor([1.0, 0.0])
    assert norm_test(Stats(2, one, m2, 1), 1.0) == 2**25 + 1
    g = torch.tensor([2.0**13, 1.0])  # |g|^2 = 2^26 + 1
    assert norm_test(Stats(2, g, m2, 1), 1.0) == (2**25 + 1) / (2**26 + 1)


def test_without_replacement_is_the_exact_variance():
    n, eta = 60, 0.3
    a = normal(n, 3, seed=6)
    mean = a.mean(0)
    size = norm_test(gradient_stats(mean + 0.4 - a), eta)
    b = without_replacement(size, n)
    # the mean of b of n has variance (n - b) / (n - 1) of the population's, over b
    variance = (n - b) / (n - 1) * a.var(0, correction=0).sum() / b
    assert float(variance) == pytest.approx(eta**2 * 3 * 0.16, rel=1e-10)
    assert without_replacement(math.inf, n) == n


def test_no_noise_and_no_gradient():
    assert norm_test(gradient_stats(torch.ones(4, 2))) == 0
    assert norm_test(gradient_stats(torch.zeros(4, 2))) == math.inf
    sizer = BatchSizer(4, 50)
    assert sizer.update(torch.ones(4, 2)) == 4
    with pytest.warns(UserWarning, match="b_max=50"):
        assert sizer.update(torch.tensor([[1.0], [-1.0]])) == 50
    assert not sizer.due


# --- gradients of single samples


@pytest.mark.parametrize("dtype,tol", [(F64, 1e-12), (torch.float32, 1e-5)])
def test_per_sample_grads_are_autograds(dtype, tol):
    model, batch = net(dtype=dtype), data(13, dtype)
    got, values = per_sample_grads(model, loss, batch, values=True)
    assert got.shape == (13, 39) and got.dtype == dtype
    torch.testing.assert_close(got.mean(0), flat(model, loss(model, batch)), rtol=tol, atol=tol)
    for i in (0, 12):
        value = loss(model, tuple(v[i : i + 1] for v in batch))
        torch.testing.assert_close(got[i], flat(model, value), rtol=tol, atol=tol)
        torch.testing.assert_close(values[i], value.detach(), rtol=tol, atol=tol)
    torch.testing.assert_close(per_sample_grads(model, loss, batch, chunk=4), got)


def test_dicts_frozen_parameters_and_buffers():
    model, (x, y) = net(), data(6)
    model[0].requires_grad_(False)
    model.register_buffer("shift", torch.ones(5))
    by_dict = lambda m, b: loss(m, (b["x"] + m.shift, b["y"]))
    got = per_sample_grads(model, by_dict, {"x": x, "y": y})
    assert got.shape == (6, 15)
    value = by_dict(model, {"x": x, "y": y})
    want = torch.autograd.grad(value, list(model[2].parameters()))
    want = torch.cat([v.flatten() for v in want])
    torch.testing.assert_close(got.mean(0), want, rtol=1e-5, atol=1e-6)
    assert all(p.grad is None for p in model.parameters())


# --- the sizer


def test_sizes_never_fall_and_stay_below():
    sizer = BatchSizer(4, 333, every=1, eta=0.8)
    for k in range(60):
        before = sizer.size
        after = sizer.update(normal(6, 9, seed=k) + (0.3 if k < 30 else 3))
        assert before <= after <= 333
        assert isinstance(after, int)
    assert sizer.size > 4 and sizer.history[-1][1] == sizer.size
    want = norm_test(gradient_stats(GRADS), 0.2)
    assert BatchSizer(4, 10**6, eta=0.2).update(GRADS) == math.ceil(want)
    assert BatchSizer(4, 10**6, eta=0.2).update(gradient_stats(GRADS)) == math.ceil(want)
    assert BatchSizer(4, 10**6, eta=0.2, growth=3).update(GRADS) == 12
    assert BatchSizer(8, 8000, eta=0.2, multiple=8).update(GRADS) == 8 * math.ceil(want / 8)
    finite = without_replacement(want, 500)
    assert BatchSizer(4, 400, eta=0.2, population=500).update(GRADS) == math.ceil(finite)
    for test, f in (("inner", inner_product_test), ("augmented", augmented_test)):
        size = BatchSizer(2, 10**6, test=test, theta=0.1, nu=0.1)
        stats = gradient_stats(GRADS, inner=True)
        want = f(stats, 0.1) if test == "inner" else f(stats, 0.1, 0.1)
        assert size.update(GRADS) == math.ceil(want)


@pytest.mark.parametrize("parts", [None, 3])
def test_watch_leaves_value_and_gradient_as_they_are(parts):
    model, batch = net(dtype=F64), data(14, F64)
    want = loss(model, batch)
    sizer = BatchSizer(14, 200, every=2, parts=parts)
    watched = sizer.watch(loss)
    for _ in range(2):  # with a test, and without one
        model.zero_grad()
        value = watched(model, batch)
        (3 * value).backward()
        torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
        got = torch.cat([p.grad.flatten() for p in model.parameters()])
        torch.testing.assert_close(got, 3 * flat(model, loss(model, batch)), rtol=1e-10, atol=1e-12)
    assert sizer.step == 2
    with torch.no_grad():
        watched(model, batch)  # a look at the loss is no step
    assert sizer.step == 2


@pytest.mark.parametrize("parts", [None, 4])
def test_in_fit_and_in_a_loop_it_does_the_same(parts):
    x, y = data(240, F64)
    how = dict(b0=8, b_max=120, every=3, eta=0.9, parts=parts)
    sgd = lambda m: torch.optim.SGD(m.parameters(), 0.3)
    model, sizer, seen = net(dtype=F64), BatchSizer(**how), []

    def watched(m, b, inner=sizer.watch(loss)):
        seen.append(b)
        return inner(m, b)

    grown = []
    sizer.on_growth = lambda old, new: grown.append((old, new))
    run = fit(model, watched, (x, y), 40, batch_size=sizer, optimizer=sgd(model), progress=False)
    at, size = sizer.history[1]  # the new size applies from the step after the test
    assert [len(b[0]) for b in seen][: at + 1] == [8] * at + [size]
    assert run.step == sizer.step == 40 and sizer.size > 8
    assert [n for _, n in grown] == [b for _, b in sizer.history[1:]]
    other, again = net(dtype=F64), BatchSizer(**how)
    opt = sgd(other)
    for b in seen:
        assert len(b[0]) == again.size
        if again.due and parts is None:  # by hand
            again.update(per_sample_grads(other, loss, b))
        elif again.due:
            pieces = list(zip(*(v.tensor_split(parts) for v in b)))
            grads = torch.stack([flat(other, loss(other, p)) for p in pieces])
            again.update(grads, [len(p[0]) for p in pieces])
        again.step += 1
        opt.zero_grad()
        loss(other, b).backward()
        opt.step()
    assert again.history == sizer.history
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-8, atol=1e-10)


def test_a_broken_run_goes_on_bit_for_bit(tmp_path):
    from torch.utils.data import DataLoader, TensorDataset

    def go(steps, file):
        sizer = BatchSizer(6, 90, every=2, eta=0.9)
        rows = TensorDataset(*data(130))
        sampler = AdaptiveBatchSampler(rows, sizer, rng(1))
        model = net()
        loader = DataLoader(rows, batch_sampler=sampler)
        fit(model, sizer.watch(loss), loader, steps, 1e-2, checkpoint=file, progress=False)
        return model, sizer

    whole, sizer = go(30, tmp_path / "whole")
    go(13, tmp_path / "broken")
    model, again = go(30, tmp_path / "broken")
    assert again.history == sizer.history and len(sizer.history) > 1 and sizer.size > 6
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters()))


def test_a_broken_run_goes_on_with_tensors_too(tmp_path):
    def go(steps, file, sizer):
        model = net()
        fit(model, sizer.watch(loss), data(130), steps, batch_size=sizer, progress=False,
            checkpoint=tmp_path / file)  # fmt: skip
        return model, sizer

    sizer = lambda: BatchSizer(6, 90, every=2, eta=0.9)
    whole, want = go(30, "whole", sizer())
    go(13, "broken", sizer())
    model, got = go(30, "broken", sizer())
    assert got.history == want.history and len(want.history) > 1 and want.size > 6
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), model.parameters()))
    with pytest.raises(ValueError, match="batch_size=<function.* has no load_state_dict"):
        fit(net(), loss, data(130), 40, batch_size=lambda step: 64, progress=False,
            checkpoint=tmp_path / "broken")  # fmt: skip


def test_a_new_sizer_does_not_go_on_in_silence():
    sizer = BatchSizer(8, 100, every=2)
    fit(net(), sizer.watch(loss), data(), 5, batch_size=sizer, progress=False)
    with pytest.raises(ValueError, match="asked for step 0, but this sizer stands at step 5"):
        fit(net(), sizer.watch(loss), data(), 5, batch_size=sizer, progress=False)


def test_sampler():
    sizer = BatchSizer(10, 40)
    sampler = AdaptiveBatchSampler(range(43), sizer, rng())
    first = list(sampler)
    assert [len(b) for b in first] == [10, 10, 10, 10, 3]
    assert sorted(sum(first, [])) == list(range(43))
    it = iter(sampler)
    next(it)
    sizer.size = 21
    assert [len(b) for b in it] == [21, 12]
    assert [len(b) for b in AdaptiveBatchSampler(range(41), BatchSizer(10, 40), rng())] == [10] * 4
    shares = [
        AdaptiveBatchSampler(range(41), BatchSizer(9, 39, multiple=3), rng(), rank=r, world=3)
        for r in range(3)
    ]
    shares = [list(s) for s in shares]
    assert [[len(b) for b in s] for s in shares] == [[3] * 4] * 3
    assert len({i for s in shares for b in s for i in b}) == 36


# --- ranks, by accelerate

SCRIPT = """
import json, sys
import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from diffkit.adaptive.adadagrad import *
from diffkit.core.training import fit

acc = Accelerator(cpu=True)
rank, world = acc.process_index, acc.num_processes
out = {"world": world}
g = torch.Generator().manual_seed(0)
grads = torch.randn(37, 11, generator=g, dtype=torch.float64) + 0.5
for name, cut in (("even", [19, 18]), ("uneven", [4, 33])):
    mine = grads.split(cut)[rank] if world > 1 else grads
    s = gradient_stats(mine, inner=True, ranks=world > 1)
    pieces = gradient_stats(mine.split(3), inner=True, ranks=world > 1)
    for k, v in (("", s), (" pieces", pieces)):
        out[name + k] = [v.n, v.dof, norm_test(v), inner_product_test(v), augmented_test(v),
                         orthogonality_test(v), norm_test(v, coordinate=0.5)]
    rows, sizes = grads[:8], [3, 5, 2, 9, 1, 4, 4, 7]
    own = slice(rank * 3, 3 + rank * 5) if world > 1 else slice(None)
    v = gradient_stats(rows[own], sizes[own], inner=True, ranks=world > 1)
    out["weighted"] = [v.n, v.dof, norm_test(v), inner_product_test(v)]
for parts in (None, 2):
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y = (x[:, 0] > 0).long()
    loss = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])
    sizer = BatchSizer(8, 120, every=2, eta=0.9, multiple=2, parts=parts)
    fit(model, sizer.watch(loss), (x, y), 25, batch_size=sizer, progress=False, accelerator=acc,
        optimizer=lambda p: AdaGradNorm(p, 1.0), ema=0)
    out[f"fit {parts}"] = sizer.history
    out[f"weights {parts}"] = torch.cat([p.flatten() for p in model.parameters()]).tolist()
if world > 1:
    both = [None] * world
    dist.all_gather_object(both, [out[f"fit {p}"] for p in (None, 2)])
    assert both[0] == both[1], both
if rank == 0:
    json.dump(out, open(sys.argv[1], "w"))
if world > 1:
    acc.wait_for_everyone()
    dist.destroy_process_group()
"""
# the launcher for several GPUs: `--cpu --num_processes 2` would start one process only
TWO = ["--multi_gpu", "--num_machines", "1", "--num_processes", "2"]
TWO += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port"]


def free_port():  # port 0, "any", never answers in torch 2.4
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return str(s.getsockname()[1])


@pytest.mark.slow
def test_two_processes_test_as_one(tmp_path, monkeypatch):
    (tmp_path / "run.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["run.py", str(tmp_path / "1.json")])
    runpy.run_path(str(tmp_path / "run.py"))  # one process: this one
    cmd = [sys.executable, "-m", "accelerate.commands.launch", *TWO, free_port()]
    env = os.environ | {"ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    cmd += [str(tmp_path / "run.py"), str(tmp_path / "2.json")]
    done = subprocess.run(cmd, capture_output=True, text=True, env=env, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (json.loads((tmp_path / f"{n}.json").read_text()) for n in (1, 2))
    assert (one["world"], two["world"]) == (1, 2)
    for k in ("even", "uneven", "even pieces", "uneven pieces", "weighted"):
        np.testing.assert_allclose(two[k], one[k], rtol=1e-10)
    # by single samples the run is that of one process; micro-batches are cut in each process
    assert two["fit None"] == one["fit None"] and one["fit None"][-1][1] > 8
    np.testing.assert_allclose(two["weights None"], one["weights None"], rtol=1e-7, atol=1e-9)
    assert two["fit 2"][-1][1] > 8


# --- AdaGrad-Norm


def test_one_scalar_is_torchs_adagrad():
    pair = [nn.Parameter(torch.tensor(1.5, dtype=F64)) for _ in range(2)]
    ours = AdaGradNorm(pair[:1], lr=0.3, v0=0.2, weight_decay=0.1)
    how = dict(lr=0.3, initial_accumulator_value=0.2, eps=0, weight_decay=0.1)
    theirs = torch.optim.Adagrad(pair[1:], **how)
    for _ in range(50):
        for p, o in zip(pair, (ours, theirs)):
            o.zero_grad()
            (p.cosh() + p).backward()
            o.step()
        torch.testing.assert_close(pair[0], pair[1], rtol=1e-13, atol=1e-14)
    ours.reset()
    assert float(ours.param_groups[0]["v"]) == 0.2


def test_one_number_for_a_group_and_kept_in_its_state():
    model = net(dtype=F64)
    opt = AdaGradNorm(model.parameters(), 0.5, 0.01)
    v, start = 0.01, torch.cat([p.detach().flatten() for p in model.parameters()])
    for k in range(4):
        value = loss(model, data(20, F64, seed=k))
        opt.zero_grad()
        value.backward()
        g = torch.cat([p.grad.flatten() for p in model.parameters()])
        opt.step()
        v += float(g.square().sum())
        start = start - 0.5 * g / v**0.5
    got = torch.cat([p.detach().flatten() for p in model.parameters()])
    torch.testing.assert_close(got, start, rtol=1e-12, atol=1e-12)
    other = AdaGradNorm(net(dtype=F64).parameters())
    other.load_state_dict(opt.state_dict())
    assert float(other.param_groups[0]["v"]) == pytest.approx(v)


# --- the oracle


@pytest.mark.parametrize(
    "budget,lr,far,noise,least",
    [(30, 0.1, 100, 1, 1), (60, 0.3, 5, 1, 2), (100, 0.2, 30, 2, 1), (45, 0.5, 1, 1, 2),
     (150, 0.05, 1000, 1, 1), (7, 0.3, 1, 3, 2), (1, 0.5, 1, 1, 1)],
)  # fmt: skip
def test_best_schedule_is_the_best_of_all(budget, lr, far, noise, least):
    best = {0: far}  # D is linear in the D before it, so dynamic programming is exact
    for n in range(least, budget + 1):
        ways = [
            (1 - lr) ** 2 * best[n - b] + lr**2 * noise / b
            for b in range(least, n + 1)
            if n - b in best
        ]
        if ways:
            best[n] = min(ways)
    got = best_schedule(budget, lr, far, noise, least)
    assert sum(got) == budget and min(got) >= least
    assert batch_error(got, lr, far, noise) == pytest.approx(best[budget], rel=1e-12)


def test_risk_is_what_sgd_does():
    sizes, lr, runs = [2, 3, 8, 5], 0.3, 20000
    x = torch.ones(runs, 1, dtype=F64) * 2
    for k, b in enumerate(sizes):
        a = normal(runs, b, 1, seed=k)
        x = x - lr * (x - a.mean(1))
    want = batch_error(sizes, lr, 4.0, 1.0)
    assert float(x.square().mean()) == pytest.approx(want, rel=0.03)  # three standard errors


def test_exact_norm_test_is_the_oracle():
    lr, far, n = 0.2, 0.05, 0.0
    d = far
    for _ in range(20):  # in real numbers: sizes by the test with eta^2 = (1 - lr) / lr
        b = 1.0 / (d * (1 - lr) / lr)
        d, n = batch_error([b], lr, d, 1.0), n + b
    assert d == pytest.approx(1 / (1 / far + n), rel=1e-12)  # the best average of start and samples
    # no schedule in whole numbers does better with as many samples
    whole = best_schedule(round(n), lr, far, 1.0)
    assert 1 / (1 / far + round(n)) <= batch_error(whole, lr, far, 1.0) < 1.001 * d


# --- errors

S = gradient_stats(GRADS)
WRONG = ["2", None, [1], float("nan"), float("inf"), True, -1, 0]
sizer = lambda **k: BatchSizer(**dict(b0=4, b_max=20) | k)
batch_norm = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    "call,error,said",
    [
        (lambda: norm_test(gradient_stats(GRADS[:1])), ValueError, "n=1"),
        (lambda: norm_test(GRADS), TypeError, "stats is a Tensor"),
        (lambda: inner_product_test(S), ValueError, "inner=True"),
        (lambda: augmented_test(S), ValueError, "inner=True"),
        (lambda: norm_test(S, coordinate=1.5), ValueError, "coordinate=1.5"),
        (lambda: without_replacement(3.0, 1), ValueError, "population=1"),
        (lambda: merge(), ValueError, "at least one"),
        (lambda: merge_ranks(S), ValueError, "not initialised"),
        (lambda: gradient_stats(GRADS[0]), ValueError, r"\(B, P\)"),
        (lambda: gradient_stats([]), ValueError, "grads must be"),
        (lambda: gradient_stats([GRADS, GRADS[:, :3]]), ValueError, "P must be the same"),
        (lambda: gradient_stats(GRADS, [1] * 36), ValueError, "37 positive"),
        (lambda: gradient_stats(GRADS, [0] * 37), ValueError, "37 positive"),
        (lambda: gradient_stats(GRADS, inner=True, per_tensor=[4]), ValueError, "sum to the 11"),
        (lambda: sizer(b0=1), ValueError, "b0=1"),
        (lambda: sizer(b_max=3), ValueError, "b_max=3"),
        (lambda: sizer(b0=4.0), ValueError, "b0=4.0"),
        (lambda: sizer(test="ip"), ValueError, "test='ip'"),
        (lambda: sizer(multiple=3), ValueError, "multiple=3"),
        (lambda: sizer(growth=1), ValueError, "growth=1"),
        (lambda: sizer(population=10), ValueError, "population=10"),
        (lambda: sizer(test="inner", debias=True), ValueError, "belong to test='norm'"),
        (lambda: sizer(on_growth=3), TypeError, "on_growth=3"),
        (lambda: sizer(step=3), TypeError, "step"),
        (lambda: sizer().update(GRADS * math.nan), FloatingPointError, "step 0"),
        (lambda: sizer()(2), ValueError, "step 2"),
        (lambda: sizer().load_state_dict(dict(size=50)), ValueError, "size=50"),
        (lambda: per_sample_grads(batch_norm, loss, data(4)), ValueError, "GroupNorm"),
        (lambda: per_sample_grads(loss, loss, data(4)), TypeError, "torch module"),
        (lambda: per_sample_grads(net(), lambda m, b: m(b[0]), data(4)), ValueError, "scalar"),
        (lambda: per_sample_grads(net(), loss, (data(4)[0], data(5)[1])), ValueError, "lengths"),
        (lambda: per_sample_grads(net(), loss, (data(4)[0], 3)), ValueError, "int"),
        (lambda: sizer(parts=9).watch(loss)(net(), data(4)), ValueError, "parts=9"),
        (lambda: AdaptiveBatchSampler(range(9), sizer()), ValueError, "b_max=20"),
        (lambda: AdaptiveBatchSampler(range(30), 8), TypeError, "BatchSizer"),
        (lambda: AdaptiveBatchSampler(range(30), sizer(), world=2), ValueError, "world=2"),
        (lambda: best_schedule(3, 0.5, 1.0, 1.0, least=4), ValueError, "budget=3"),
        (lambda: best_schedule(3, 1.5, 1.0, 1.0), ValueError, "lr=1.5"),
    ],
)
def test_bad_input(call, error, said):
    with pytest.raises(error, match=said):
        call()


@pytest.mark.parametrize("bad", WRONG)
def test_numbers_are_checked(bad):
    both = gradient_stats(GRADS, inner=True)
    one = [nn.Parameter(torch.ones(1))]
    calls = {
        "eta": lambda: norm_test(S, bad),
        "theta": lambda: inner_product_test(both, bad),
        "nu": lambda: orthogonality_test(both, bad),
        "every": lambda: sizer(every=bad),
        "lr": lambda: AdaGradNorm(one, lr=bad),
        "v0": lambda: AdaGradNorm(one, v0=bad),
        "noise": lambda: best_schedule(5, 0.1, 1.0, bad),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=name):
            call()


def test_a_loss_that_is_no_mean_is_refused_and_dropout_is_not():
    total = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1], reduction="sum")
    with pytest.raises(ValueError, match="a mean over samples"):
        sizer().watch(total)(net(), data(8))
    noisy = nn.Sequential(nn.Linear(5, 30), nn.Dropout(0.5), nn.Linear(30, 3))
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sizer(b_max=10**6).watch(loss)(noisy, data(8)).backward()


HARD = torch.tensor([1.0, 9.0, 3.0])
ce = nn.functional.cross_entropy
NO_MEANS = dict(
    total=lambda m, b: ce(m(b[0]), b[1], reduction="sum"),
    weighted=lambda m, b: ce(m(b[0]), b[1], weight=HARD),
)


@pytest.mark.parametrize("parts", [None, 3])
@pytest.mark.parametrize("kind", NO_MEANS)
def test_no_mean_is_refused_under_dropout_too(kind, parts):
    torch.manual_seed(0)
    noisy = nn.Sequential(nn.Linear(5, 30), nn.Dropout(0.5), nn.Linear(30, 3))
    watched = sizer(b0=30, b_max=10**6, parts=parts).watch(NO_MEANS[kind])
    with pytest.raises(ValueError, match="a mean over samples, no sum and without class weights"):
        watched(noisy, data(30))
    assert noisy.training and noisy[1].training
    by_hand = lambda m, b: (HARD[b[1]] * ce(m(b[0]), b[1], reduction="none")).mean()
    ok = sizer(b0=30, b_max=10**6, parts=parts)
    ok.watch(by_hand)(noisy, data(30)).backward()
    assert ok._checked and noisy[1].training
    # a loss of the training mode only, and one with chance of its own, are not looked at
    only = lambda m, b: loss(m, b) if m.training else None
    sizer(b0=30, b_max=10**6).watch(only)(noisy, data(30))
    chance = lambda m, b: loss(m, (b[0] + torch.randn_like(b[0]), b[1]))
    sizer(b0=30, b_max=10**6).watch(chance)(noisy, data(30))


def test_a_sample_whose_label_is_ignored_has_no_loss():
    x, y = data(8)
    watched = sizer(b0=8, b_max=10**6, every=1).watch(loss)
    watched(net(), (x, y))
    with pytest.raises(ValueError, match="nan or inf for 1 of 8 samples.*label is ignored"):
        watched(net(), (x, torch.where(torch.arange(8) == 3, -100, y)))
    with pytest.raises(FloatingPointError, match="step 1"):  # all of it is
        watched(net(), (x * math.nan, y))


def test_batches_of_another_size_are_told_once():
    def run(rows, s):
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            watched = s.watch(loss)
            for n in rows:
                watched(net(), data(n))
        return [str(w.message) for w in told]

    still = dict(b0=8, b_max=64, every=1, eta=1e6)  # which never grows
    assert run([8, 8, 8, 8, 3] * 3 + [8, 3] * 8, sizer(**still)) == []
    told = run([16] * 12, sizer(**still))
    assert len(told) == 1 and "the last 16 and not 8: give batch_size=sizer" in told[0]
    with pytest.warns(UserWarning, match="b_max must be at most the samples"):
        s = sizer(b0=8, b_max=64, every=1, eta=1e-3)
        fit(net(), s.watch(loss), data(30), 9, batch_size=s, progress=False)


def test_the_sampler_keeps_its_generator():
    a = AdaptiveBatchSampler(range(43), sizer(), rng(3))
    next(iter(a))
    state = a.state_dict()
    rest = [list(a), list(a)]
    for own in (rng(8), None):
        b = AdaptiveBatchSampler(range(43), sizer(), own)
        b.load_state_dict(state)
        assert [list(b), list(b)] == rest


def test_stats_is_a_tuple_of_its_fields():
    assert Stats._fields == ("n", "mean", "m2", "dof", "along", "across")


def test_half_precision_of_autocast_stays_out_of_the_statistics():
    model, batch = net(), data(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = gradient_stats(GRADS.float(), inner=True)
        sizer(b0=50, b_max=10**5).watch(loss)(model, batch).backward()
        each = per_sample_grads(model, loss, batch)
    want = gradient_stats(GRADS.float(), inner=True)
    assert inner_product_test(s) == inner_product_test(want)
    got = torch.cat([p.grad.flatten() for p in model.parameters()])
    # eight bits in the passes through the network, not in the sums over samples
    torch.testing.assert_close(got, each.mean(0), rtol=1e-5, atol=1e-6)


def test_the_best_schedule_spends_what_is_left_of_a_tie():
    got = best_schedule(10, 1e-9, 1.0, 1.0, least=3)  # weights so equal that sizes rise together
    assert sum(got) == 10 and max(got) - min(got) <= 1


# --- the bed


def test_the_bed_without_growth_is_the_formula():
    how = dict(lr=0.2, distance=4.0, noise=3.0)
    for dim in (1, 5):
        d, steps, sizes = adadagrad_bed(1e9, 4000, 1, budget=81, dim=dim, **how)
        assert (steps == 40).all() and (sizes == 2).all()  # one sample is left over
        want = batch_error([2] * 40, **how)
        assert abs(d.mean() - want) < 4 * d.std() / 4000**0.5  # four standard errors


def test_the_bed_with_the_exact_test_takes_the_batches_of_the_test():
    d, steps, sizes = adadagrad_bed(
        0.5, 3, 2, budget=3000, lr=0.5, distance=1e6, noise=1.0, exact_test=True
    )
    # D falls by (1 - lr)^2 a step as long as noise is small beside it: b = 1 / (0.25 D)
    got, x = [], 1e6
    while 4 / x <= 1.5:
        x, got = x / 4, [*got, 2]
    assert (sizes[: len(got)] == 2).all() and sizes.max() > 100 and (np.diff(sizes) >= 0).all()
    first = adadagrad_bed(0.5, 3, 2, budget=3000, lr=0.5)[0]
    assert (first == adadagrad_bed(0.5, 3, 2, budget=3000, lr=0.5)[0]).all()
    assert (first != adadagrad_bed(0.5, 3, 3, budget=3000, lr=0.5)[0]).all()
    bounded = adadagrad_bed(0.1, 5, 4, budget=5000, growth=2.0)[2]
    assert (bounded[1:] <= 2 * bounded[:-1] + 1).all()


@pytest.mark.parametrize("distance", [0.25, 4.0, 9.0])
def test_the_bed_starts_at_its_distance(distance):
    d, steps, sizes = adadagrad_bed(1.0, 3, budget=1, distance=distance)  # not one batch of 2
    assert d.tolist() == [distance] * 3 and steps.tolist() == [0] * 3 and len(sizes) == 0
