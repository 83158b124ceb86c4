"""Distances of samples against closed forms and against loops over the points, whatever the type
of the numbers."""

import itertools
import math

import pytest
import torch

import diffkit as dk
from diffkit.core.metrics import frechet_gaussian


def points(n, d=2, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("single", range(4), ids=["mean_a", "cov_a", "mean_b", "cov_b"])
def test_frechet_distance_of_gaussians_is_taken_in_double_precision(single):
    args = [[1.0, 0.0], [[2.0, 1.0], [1.0, 2.0]], [0.0, 2.0], [[5.0, 2.0], [2.0, 1.0]]]
    # of two by two matrices: (tr sqrt(A B))^2 = tr(A B) + 2 sqrt(det A det B)
    want = 1 + 4 + 4 + 6 - 2 * math.sqrt(16 + 2 * math.sqrt(3 * 1))
    for others in (torch.float32, torch.float64):
        types = [torch.float32 if i == single else others for i in range(4)]
        got = frechet_gaussian(*(torch.tensor(v, dtype=d) for v, d in zip(args, types)))
        assert abs(got - want) < 1e-13


@pytest.mark.parametrize("bandwidth", [0.5, 1.0, 2.0, None])
def test_mmd_is_the_mean_of_the_kernel_over_pairs(bandwidth):
    x, y = points(5), points(4, seed=1) + 1
    if bandwidth is None:  # the median over the pairs of different points
        pairs = itertools.combinations(torch.cat([x, y]), 2)
        gaps = sorted((a - b).norm().item() for a, b in pairs)
        width = gaps[(len(gaps) - 1) // 2]
    else:
        width = bandwidth
    k = lambda a, b: math.exp(-((a - b).norm().item() ** 2) / (2 * width**2))
    mean = lambda u, v: sum(k(a, b) for a in u for b in v if a is not b) / (len(u) * len(v))
    apart = lambda u: sum(k(a, b) for a, b in itertools.permutations(u, 2)) / len(u) / (len(u) - 1)
    want = apart(list(x)) + apart(list(y)) - 2 * mean(x, y)
    assert abs(dk.mmd(x, y, dk.rbf(bandwidth)) - want) < 1e-12


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
def test_error_of_pairs_is_taken_in_double_precision(dtype):
    # the square of 500 is beyond half precision
    x, y = torch.tensor([[300, 0], [8, 8]], dtype=dtype), torch.tensor([[0, 400], [8, 8]])
    assert dk.expected_error(x, y.to(dtype)) == math.sqrt(500**2 / 2)
    assert dk.expected_error(x[..., None], y[..., None].to(dtype)) == math.sqrt(500**2 / 2)


@pytest.mark.parametrize(
    ("a", "b", "dtype"), [(0, 1, torch.uint8), (-128, 127, torch.int8), (6e4, -6e4, torch.half)]
)
def test_differences_that_a_type_cannot_hold_are_taken_in_one_that_can(a, b, dtype):
    x, y, one = torch.tensor([[a]]).to(dtype), torch.tensor([[b]]).to(dtype), torch.eye(1)
    assert dk.expected_error(x, y) == abs(x.item() - y.item())
    if dtype.is_floating_point:
        assert frechet_gaussian(x[0], one, y[0], one) == (x.item() - y.item()) ** 2


@pytest.mark.parametrize(("n", "m"), [(9, 6), (6, 9), (7, 7)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_precision_and_recall_count_points_in_the_balls_of_the_others(n, m, k):
    real, fake = points(n), 1.5 * points(m, seed=1) + 0.5

    def share(who, support):
        radius = [sorted((a - b).norm().item() for b in support)[k] for a in support]  # [0]: itself
        return sum(any((w - a).norm() <= r for a, r in zip(support, radius)) for w in who) / len(
            who
        )

    want = share(fake, real), share(real, fake)
    assert dk.precision_recall(real, fake, k) == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(("n", "m"), [(9, 6), (6, 9), (7, 7)])
def test_precision_and_recall_need_more_points_than_neighbours(n, m):
    low = min(n, m)
    dk.precision_recall(points(n), points(m), low - 1)
    for k in (0, low, max(n, m), 10):
        with pytest.raises(ValueError, match=rf"k must lie in 1\.\.{low - 1}, got {k}"):
            dk.precision_recall(points(n), points(m), k)
