"""Schedules on devices that hold no values, and the grids of training times at their limits."""

import pytest
import torch

import diffkit as dk

TABLE = [0.1, 0.2, 0.05, 0.3, 0.15]
PROCESSES = [dk.VP(), dk.Cosine(), dk.Discrete(TABLE), dk.VE(), dk.EDM(), dk.Flow()]


@pytest.mark.parametrize("process", PROCESSES, ids=lambda p: type(p).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_schedules_follow_the_times_to_their_device(process, dtype):
    t = torch.linspace(0.1, 0.9, 4, dtype=dtype)
    calls = (
        lambda u: (process.alpha(u), process.sigma(u), process.log_snr(u), process.time(u - 0.5)),
        process.sde,
        process.velocity,
    )
    for call in calls:
        want = call(t)
        for there, here in zip(call(t.to("meta")), want, strict=True):
            assert (there.device.type, there.dtype, there.shape) == ("meta", dtype, here.shape)
        for again, here in zip(call(t), want, strict=True):  # and the processor has its own still
            assert torch.equal(again, here)


def even(n):
    return dk.Discrete([0.02] * n)


@pytest.mark.parametrize("n", [1, 2, 7, 30])
def test_as_many_steps_as_training_steps_stop_at_each(n):
    every = torch.arange(n, -1, -1, dtype=torch.float64) / n
    for spacing in ("leading", "trailing"):
        assert torch.equal(dk.time_grid(even(n), n, spacing), every)
        with pytest.raises(ValueError, match=f"steps must be at most {n} "):
            dk.time_grid(even(n), n + 1, spacing)
    if n > 1:  # from the last training step to the first
        assert torch.equal(dk.time_grid(even(n), n - 1, "linspace"), every[:-1])
    with pytest.raises(ValueError, match=f"steps must be at most {n - 1} "):
        dk.time_grid(even(n), n, "linspace")


@pytest.mark.parametrize(
    ("spacing", "steps", "offset", "tenths"),
    [
        ("trailing", 4, 0, [10, 8, 5, 2, 0]),  # 10, 7.5, 5, 2.5, rounded to even
        ("trailing", 3, 0, [10, 7, 3, 0]),
        ("leading", 4, 0, [7, 5, 3, 1, 0]),
        ("leading", 4, 1, [8, 6, 4, 2, 0]),
        ("leading", 3, 0, [7, 4, 1, 0]),
        ("linspace", 4, 0, [10, 8, 5, 3, 1]),
        ("linspace", 3, 0, [10, 7, 4, 1]),
    ],
)
def test_fewer_steps_than_training_steps(spacing, steps, offset, tenths):
    want = torch.tensor(tenths, dtype=torch.float64) / 10
    assert torch.equal(dk.time_grid(even(10), steps, spacing, offset=offset), want)
    want[-1] = 0.03  # an end of one's own
    assert torch.equal(dk.time_grid(even(10), steps, spacing, offset=offset, end=0.03), want)
