"""Few levels: the rounding against torch and brute force, training in its limits and side by side,
levels that move, files that give back what went in, and every error."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import diffkit as dk
from diffkit.core.nets import Stacked
from diffkit.core.training import fit
from diffkit.distill.quantized_distillation import (
    LearnedPoints,
    assign_levels,
    distillation_loss,
    fit_quantized,
    load_quantized,
    nearest_quantize,
    quantized,
    quantized_weights,
    save_quantized,
    uniform_quantize,
)

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def perceptron(seed=0, hidden=12):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, 3))


def flat(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


X = randn(120, 6, dtype=torch.float32)
Y = (X[:, 0] > 0).long() + (X[:, 1] > 0).long()
QUIET = dict(progress=False, ema=None, seed=0, batch_size=30)


def cross(net, batch):
    return F.cross_entropy(net(batch[0]), batch[1])


# --- the rounding


@pytest.mark.parametrize("bits", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("bucket", [1, 7, 64, None, 10_000])
def test_rounding_by_hand(bits, bucket):
    v = randn(5, 26)
    parts = v.flatten().split(bucket or 130)
    want = []
    for part in parts:
        low, width = part.min(), part.max() - part.min()
        if width == 0:
            want.append(part)
            continue
        levels = low + width * torch.arange(2**bits, dtype=F64) / (2**bits - 1)
        near = torch.bucketize(part, (levels[1:] + levels[:-1]) / 2)
        want.append(levels[near])
    # ends by another order of the same operations: rounding of float64
    assert_close(
        uniform_quantize(v, bits, bucket), torch.cat(want).view_as(v), rtol=1e-12, atol=1e-14
    )


def test_rounding_is_torchs_where_the_ends_are():
    v = torch.cat([randn(500, dtype=torch.float32).abs(), torch.zeros(1)])
    peer = torch.fake_quantize_per_tensor_affine(v, v.max().item() / 255, 0, 0, 255)
    # float32: a scale that was rounded once more
    assert_close(uniform_quantize(v, 8, None), peer, rtol=1e-5, atol=1e-6)


def test_rows_side_by_side_are_rows_alone():
    v, bits = randn(4, 9, 5), torch.tensor([1, 2, 3, 16])
    got = uniform_quantize(v, bits, 8, batch_dims=1)
    for row, b, q in zip(v, bits.tolist(), got):
        assert_close(q, uniform_quantize(row, b, 8), rtol=1e-12, atol=1e-14)
    points = torch.rand(4, 6, dtype=F64)
    got = nearest_quantize(v, points, 8, batch_dims=1)
    for row, p, q in zip(v, points, got):
        assert torch.equal(q, nearest_quantize(row, p, 8))


def test_drawn_rounding_lands_on_a_neighbour_and_repeats():
    v = randn(300)
    g = lambda: torch.Generator().manual_seed(3)
    one, two = (uniform_quantize(v, 3, None, stochastic=True, generator=g()) for _ in range(2))
    assert torch.equal(one, two)
    level = (v.max() - v.min()) / 7
    assert ((one - v).abs() <= level * (1 + 1e-12)).all()
    code = (one - v.min()) / level
    assert_close(code, code.round(), rtol=0.0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_stay(dtype):
    v = randn(40).to(dtype)
    assert uniform_quantize(v, 4).dtype == dtype
    assert nearest_quantize(v, torch.linspace(0, 1, 4, dtype=dtype)).dtype == dtype


# --- training


def test_many_bits_are_plain_training():
    plain, few = perceptron(), perceptron()
    fit(plain, cross, (X, Y), 40, 1e-2, optimizer=torch.optim.Adam, **QUIET)
    fit_quantized(few, cross, (X, Y), 40, 1e-2, bits=16, **QUIET)
    # levels are a 65,535th of a range of about 1 apart; forty steps of Adam at most double that
    assert_close(flat(few), flat(plain), rtol=0.0, atol=2e-3)


def test_a_step_is_the_gradient_at_the_levels_applied_to_the_shadow():
    net, lr = perceptron(), 0.3
    shadow = flat(net).clone()
    few = functools.partial(uniform_quantize, bits=2, bucket=16)
    at = quantized(net, few)
    cross(at, (X, Y)).backward()
    grad = torch.cat([p.grad.flatten() for p in at.parameters()])
    sgd = functools.partial(torch.optim.SGD)
    fit_quantized(
        net, cross, (X, Y), 1, lr, bits=2, bucket=16, optimizer=sgd, **QUIET | dict(batch_size=120)
    )
    want = copy.deepcopy(at)
    with torch.no_grad():
        nn.utils.vector_to_parameters(shadow - lr * grad, want.parameters())
    assert_close(flat(net), flat(quantized(want, few)))


def test_two_steps_use_the_shadow_and_not_the_levels():
    net = perceptron()
    few = functools.partial(uniform_quantize, bits=1)
    opt = torch.optim.SGD(net.parameters(), 1e-4)
    start = flat(net).clone()
    for _ in range(5):
        opt.zero_grad()
        with quantized_weights(net, few):
            cross(net, (X, Y)).backward()
        opt.step()
    # small steps add up instead of being rounded away, and nothing jumps to a level
    assert 0 < (flat(net) - start).abs().max() < 1e-2


def test_networks_side_by_side_train_as_alone():
    nets = [perceptron(s) for s in range(3)]
    bits = torch.tensor([1, 2, 4])
    stacked = Stacked(copy.deepcopy(nets))
    both = lambda net, b: 3 * F.cross_entropy(net(b[0].repeat(3, 1)), b[1].repeat(3))
    how = dict(lr=1e-2, bucket=10, **QUIET)
    fit_quantized(stacked, both, (X, Y), 25, bits=bits, batch_dims=1, **how)
    for net, b, got in zip(nets, bits.tolist(), stacked.split()):
        fit_quantized(net, cross, (X, Y), 25, bits=b, **how)
        # the same sums in another order, 25 steps long
        assert_close(flat(got), flat(net), rtol=1e-3, atol=1e-4)


def test_a_run_is_resumed_from_its_shadow(tmp_path):
    whole, broken = perceptron(), perceptron()
    how = dict(bits=2, **QUIET)
    fit_quantized(whole, cross, (X, Y), 20, 1e-2, **how)

    def stop(run):
        if run.step == 10:
            raise KeyError("broken off")

    file = dict(checkpoint=tmp_path / "run", every=5)
    with pytest.raises(KeyError):
        fit_quantized(broken, cross, (X, Y), 20, 1e-2, callback=stop, **file, **how)
    other = perceptron()
    fit_quantized(other, cross, (X, Y), 20, 1e-2, **file, **how)
    assert torch.equal(flat(other), flat(whole))


def test_average_and_model_end_on_levels():
    run = fit_quantized(perceptron(), cross, (X, Y), 20, 1e-2, bits=2, **QUIET | dict(ema=0.9))
    for net in (run.model, run.ema):
        for p in net.parameters():
            assert len(p.unique()) <= 4
    assert not torch.equal(flat(run.model), flat(run.ema))


def test_what_is_skipped_learns_in_full_precision():
    net = perceptron()
    fit_quantized(net, cross, (X, Y), 20, 1e-2, bits=1, skip=["*.bias"], **QUIET)
    assert len(net[0].weight.unique()) == 2 and len(net[0].bias.unique()) == 12


def test_a_denoiser_learns_on_levels():
    data = dk.ring().sample(400, torch.Generator().manual_seed(0))[0].float()
    torch.manual_seed(0)
    model = dk.NetDenoiser(dk.MLP(2, hidden=16), dk.VP())
    fit_quantized(model, lambda d, x: d.loss(x), data, 30, 1e-2, bits=4, **QUIET)
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(1))
    out = dk.sample(model, dk.DDIM(), x, dk.time_grid(dk.VP(), 4), progress=False)
    assert out.isfinite().all()
    assert all(len(p.unique()) <= 16 * -(-p.numel() // 256) for p in model.parameters())


def test_the_context_survives_an_error_in_the_quantizer():
    net, before = perceptron(), flat(perceptron())

    def broken(v):
        if v.ndim == 1:
            raise RuntimeError("no")
        return v * 0

    with pytest.raises(RuntimeError), quantized_weights(net, broken):
        pass
    assert torch.equal(flat(net), before)


# --- the loss


def test_the_loss_per_row_and_its_slope():
    s, t = randn(8, 5).requires_grad_(), randn(8, 5, seed=1).requires_grad_()
    rows = distillation_loss(
        s, t, torch.arange(8) % 5, 3.0, torch.linspace(0, 1, 8), reduction="none"
    )
    assert rows.shape == (8,)
    one = distillation_loss(s, t, torch.arange(8) % 5, 3.0, torch.linspace(0, 1, 8))
    assert_close(one, rows.mean())
    (slope,) = torch.autograd.grad(distillation_loss(s, t, None, 3.0, 1.0), s)
    # by hand: T (softmax(s / T) - softmax(t / T)) / B
    assert_close(slope, 3 * ((s / 3).softmax(-1) - (t / 3).softmax(-1)).detach() / 8)
    distillation_loss(s, t).backward()
    assert t.grad is None


# --- levels that move


def test_points_fit_what_they_can_reach():
    # weights on three values: three levels learn to hit them exactly
    torch.manual_seed(0)
    net = nn.Linear(40, 1, bias=False)
    values = torch.tensor([-1.0, 0.1, 0.6])
    with torch.no_grad():
        net.weight.copy_(values[torch.randint(0, 3, (1, 40))])
    model = LearnedPoints(net, 3, init="uniform")
    x = randn(400, 40, dtype=torch.float32)
    loss = lambda m, b: (m(b) - net(b)).square().mean()
    fit(model, loss, x, 400, 1e-2, **QUIET)
    assert_close(flat(model.finish()), flat(net), rtol=0.0, atol=1e-3)


def test_only_points_learn_and_the_network_is_a_copy():
    net = perceptron()
    before = flat(net)
    model = LearnedPoints(net, 4)
    fit(model, cross, (X, Y), 20, 1e-3, **QUIET)
    assert torch.equal(flat(net), before) and torch.equal(flat(model.model), before)
    assert all(p.requires_grad for p in model.finish().parameters())
    assert model.points[0].shape == (4,)


def test_quantiles_put_as_many_weights_on_each_level():
    net = nn.Linear(90, 90, bias=False)
    with torch.no_grad():
        net.weight.copy_(randn(90, 90).exp())
    model = LearnedPoints(net, 9, None, init="quantile")
    p = model.points[0].detach()
    u = (net.weight - net.weight.min()) / (net.weight.max() - net.weight.min())
    share = torch.stack([(u <= q).float().mean() for q in p])
    # ranks are rounded to one of 8,100
    assert_close(share, torch.linspace(0, 1, 9), rtol=0.0, atol=3e-4)


def test_levels_are_shared_out_by_the_norms():
    assert assign_levels(dict(a=1.0, b=1.0), 8) == dict(a=8, b=8)
    got = assign_levels(dict(a=5.0, b=0.0, c=1.0), 8)
    assert got["b"] == 4 and sum(got.values()) == 24 and got["a"] > got["c"] > 4


@pytest.mark.parametrize(
    "norms, levels, want",
    [
        # 4 each, and 12 in the ratio of the norms, 2.4, 3.6 and 6, of which 2, 3 and 6 are whole
        (dict(a=2.0, b=3.0, c=5.0), 8, dict(a=6, b=7, c=11)),
        # 2 each, and 8 in that ratio, 0.9, 1.8, 2.7 and 2.7: three are left for the largest three
        (dict(a=1.0, b=2.0, c=3.0, d=3.0), 4, dict(a=2, b=4, c=5, d=5)),
    ],
)
def test_what_rounding_leaves_goes_to_the_largest_norms(norms, levels, want):
    assert assign_levels(norms, levels) == want


# --- files


@pytest.mark.parametrize("bits", [1, 3, 8, 13])
@pytest.mark.parametrize("bucket", [5, 256, None])
def test_files_give_back_what_went_in(tmp_path, bits, bucket):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(20, 7))
    net(torch.randn(4, 3, 4, 4))  # the running statistics are not those of the start
    few = functools.partial(uniform_quantize, bits=bits, bucket=bucket)
    save_quantized(tmp_path / "f", net, bits, bucket)
    back = load_quantized(tmp_path / "f", copy.deepcopy(net))
    assert torch.equal(flat(back), flat(quantized(net, few)))
    for (n, a), (_, b) in zip(net.named_buffers(), back.named_buffers()):
        assert torch.equal(a, b), n
    # written again the levels are found again; the upper end is low + width, rounded once
    save_quantized(tmp_path / "g", back, bits, bucket)
    one, two = (dk.load_tensors(tmp_path / f)[0] for f in "fg")
    assert all(torch.equal(one[n], two[n]) for n in one if n.endswith(":codes"))


def test_files_of_learned_levels_and_of_float64(tmp_path):
    net = perceptron().double()
    model = LearnedPoints(net, {"0.weight": 3, "0.bias": 2, "2.weight": 17, "2.bias": 4}, 20)
    save_quantized(tmp_path / "f", model)
    assert torch.equal(flat(load_quantized(tmp_path / "f", net)), flat(model.finish()))
    save_quantized(tmp_path / "g", net, 3)
    few = functools.partial(uniform_quantize, bits=3)
    assert torch.equal(flat(load_quantized(tmp_path / "g", net)), flat(quantized(net, few)))


# --- what is refused


@pytest.mark.parametrize(
    "call, said",
    [
        (lambda: uniform_quantize(X, 17), "from 1 to 16"),
        (lambda: uniform_quantize(X, True), "from 1 to 16"),
        (lambda: uniform_quantize(X, 4, 2.0), "bucket must be a whole number"),
        (lambda: uniform_quantize(X, 4, -1), "bucket must be at least 1"),
        (lambda: uniform_quantize(X[:0]), "none is left"),
        (lambda: uniform_quantize(X, 4, batch_dims=3), "batch_dims=3"),
        (lambda: uniform_quantize(X, bitts=4), "bitts"),
        (lambda: nearest_quantize(X, torch.rand(120, 4)), "points must have shape"),
        (lambda: distillation_loss(X, X[:5]), "one shape"),
        (lambda: distillation_loss(X, X, weight=-0.1), "weight must lie"),
        (lambda: distillation_loss(X, X, temperature=0), "temperature"),
        (lambda: distillation_loss(X, X, reduction="sum"), "mean or none"),
        (lambda: fit_quantized(perceptron(), cross, (X, Y), 2, bits=0, **QUIET), "bits"),
        (lambda: fit_quantized(perceptron(), cross, (X, Y), 2, skip=["x"], **QUIET), "'x'"),
        (lambda: fit_quantized(perceptron(), cross, (X, Y), 2, bit=3, **QUIET), "bit"),
        (lambda: quantized(nn.Tanh()), "no parameter left"),
        (lambda: LearnedPoints(perceptron(), {"0.weight": 4}), "levels must be"),
        (lambda: LearnedPoints(perceptron(), 4, init="grid"), "init must be"),
        (lambda: assign_levels(dict(a=1.0), 3), "even and at least 4"),
        (lambda: assign_levels(dict(a=float("nan"))), "norms must be finite"),
        (
            lambda: save_quantized("f", LearnedPoints(Stacked([perceptron()]), 4, batch_dims=1)),
            "side",
        ),
    ],
)
def test_wrong_calls_are_named(call, said):
    with pytest.raises((ValueError, TypeError), match=said):
        call()


def test_a_file_of_another_kind_or_shape_is_refused(tmp_path):
    dk.save_tensors(tmp_path / "f", dict(a=X))
    with pytest.raises(ValueError, match="was not written by save_quantized"):
        load_quantized(tmp_path / "f", perceptron())
    save_quantized(tmp_path / "g", perceptron(hidden=60))
    with pytest.raises(ValueError, match="does not fit"):
        load_quantized(tmp_path / "g", perceptron(hidden=200))
