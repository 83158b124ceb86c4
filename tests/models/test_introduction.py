"""`log_likelihood` against closed forms, on networks that are not the library's, and refused
where it has no meaning."""

import math

import pytest
import torch
from torch.testing import assert_close

import diffkit as dk
from diffkit.models.introduction import log_likelihood


class Gaussian(torch.nn.Module):  # the noise prediction for N(mean, std^2) data under a Flow
    def __init__(self, mean, std):
        super().__init__()
        self.mean, self.std = torch.nn.Parameter(mean), std

    def forward(self, x, t, label=None):
        s, a = t.reshape(-1, *[1] * (x.ndim - 1)), 1 - t.reshape(-1, *[1] * (x.ndim - 1))
        mean = self.mean if label is None else self.mean + label.reshape(-1, 1, 1)
        x0 = mean + a * self.std**2 / (a**2 * self.std**2 + s**2) * (x - a * mean)
        return (x - a * x0) / s


@pytest.mark.parametrize("probes", [0, 3])
@pytest.mark.parametrize("label", [None, torch.tensor([0.0, 1.0, -1.0])])
def test_a_network_of_ones_own(label, probes):
    "Any shape, a condition with a row a sample; a diagonal Jacobian needs no luck with the probes."
    mean, std, t = torch.tensor([[0.3, -0.2]]).double(), 0.7, 0.01
    d = dk.NetDenoiser(Gaussian(mean, std), dk.Flow(), "eps", time_input=lambda t: t)
    x = torch.randn(3, 1, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cond = None if label is None else {"label": label.double()}
    got = log_likelihood(d, x, t=t, probes=probes, cond=cond, tol=1e-7)
    a, var = 1 - t, ((1 - t) * std) ** 2 + t**2
    at = mean if label is None else mean + label.double().reshape(-1, 1, 1)
    want = -((x - a * at) ** 2 / var + math.log(2 * math.pi * var)).flatten(1).sum(1) / 2
    assert_close(got, want, atol=2e-3, rtol=0)  # at the last time a share e^-18 of the data is left
    assert d.net.mean.grad is None


def test_random_probes_are_unbiased_and_repeatable():
    mix = dk.GaussianMixture(
        torch.randn(3, 6, generator=torch.Generator().manual_seed(1)), scales=0.5
    )
    d = dk.MixtureDenoiser(mix, dk.VP())
    x = mix.sample(1, torch.Generator().manual_seed(2))[0]
    run = lambda seed: log_likelihood(
        d,
        x.expand(64, 6),
        t=0.05,
        probes=1,
        tol=1e-3,
        generator=torch.Generator().manual_seed(seed),
    )
    a = run(0)
    assert torch.equal(a, run(0)) and not torch.equal(a, run(1))
    exact = log_likelihood(d, x, t=0.05)
    assert abs(a.mean() - exact) < 4 * a.std() / 8 + 1e-2 and a.std() > 0.05


def test_what_has_no_density_is_refused():
    d, x = dk.MixtureDenoiser(dk.ring(), dk.VP()), torch.zeros(2, 2).double()
    for wrong in (-1, 1.5, True, None):
        with pytest.raises(ValueError, match="probes must be an integer"):
            log_likelihood(d, x, probes=wrong)
    for t in (0.0, 1.0):
        with pytest.raises(ValueError, match="where there is noise and signal"):
            log_likelihood(d, x, t=t)
    with pytest.raises(ValueError, match="cond.*label"):
        log_likelihood(d, x, cond={"label": torch.zeros(3)})
