"""Singular distributions: the density of a polygon against quadrature and its invariances, linear
models against closed forms, models side by side against each alone, and every error."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffkit.core.nets import Stacked
from diffkit.models.ddpm import VAE
from diffkit.models.singular import (
    LatentModel,
    choose_std,
    chord_log_prob,
    expected_log_prob,
    fit_perturbed,
    perturb,
    fit_ppca,
)

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=rng(seed), dtype=F64)


def nets(k, i=1, o=2, hidden=8):
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(i, hidden), nn.ReLU(), nn.Linear(hidden, o)) for _ in range(k)]


# --- the density of a polygon


@pytest.mark.parametrize("D", [1, 2, 5])
@pytest.mark.parametrize("sigma", [0.03, 0.5, 20.0])
def test_the_density_is_that_of_a_numerical_integral(D, sigma):
    a, b = randn(2, D, seed=1)
    x = a + (b - a) * torch.linspace(-0.2, 1.2, 8, dtype=F64)[:, None] + sigma * randn(8, D)
    v = torch.linspace(0, 1, 20001, dtype=F64)
    log = -0.5 * (torch.cdist(x, a + v[:, None] * (b - a)) / sigma).square()
    want = torch.trapezoid(log.exp(), v) / (2 * math.pi * sigma**2) ** (D / 2)
    got = chord_log_prob(x, torch.stack([a, b]), torch.ones(1, dtype=F64), sigma)
    # a short chord's error is (length / sigma)^2 / 24, at most 1e-4, times (t / sigma)^2 - 1
    assert_close(got.exp(), want, rtol=1e-3, atol=0.0)


def test_the_density_of_the_plane_sums_to_one():
    u = torch.linspace(-3, 3, 401, dtype=F64)
    nodes = torch.tensor([[-1.0, 0.0], [0.0, 1.0], [0.5, -0.5]], dtype=F64)
    p = chord_log_prob(torch.cartesian_prod(u, u), nodes, torch.tensor([0.3, 0.7], dtype=F64), 0.2)
    assert abs(p.exp().sum().item() * (u[1] - u[0]).item() ** 2 - 1) < 1e-6


def test_the_density_moves_turns_and_scales_with_the_data():
    x, nodes, w = randn(9, 3), randn(5, 3, seed=1), torch.full((4,), 0.25, dtype=F64)
    q = torch.linalg.qr(randn(3, 3, seed=2))[0]
    base = chord_log_prob(x, nodes, w, 0.2)
    assert_close(chord_log_prob(x @ q + 1, nodes @ q + 1, w, 0.2), base, rtol=1e-8, atol=1e-8)
    assert_close(chord_log_prob(3 * x, 3 * nodes, w, 0.6), base - 3 * math.log(3))
    turned = chord_log_prob(x, nodes.flip(0), w, 0.2)  # the way along the curve does not matter
    assert_close(turned, base, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_number_overflows(dtype):
    nodes = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1e-9, 0.0], [1.0, 0.0]], dtype=dtype)
    nodes.requires_grad_()
    x = torch.tensor([[0.0, 0.0], [1e3, 0.0], [-1e3, 5.0], [0.5, 0.0]], dtype=dtype)
    w = torch.full((3,), 1 / 3, dtype=dtype)
    for sigma in (1e-3, 1.0, 1e3):
        log = chord_log_prob(x, nodes, w, sigma)
        assert log.isfinite().all()
        (slope,) = torch.autograd.grad(log.sum(), nodes)
        assert slope.isfinite().all()


def test_the_slope_is_precise_in_float32():
    for far in (2.0, 60.0, 1e3, 1e5):  # in units of sigma, beyond the end of the chord
        slopes = []
        for dtype in (torch.float32, F64):
            x = torch.tensor([[far, 0.0]], dtype=dtype, requires_grad=True)
            line = torch.tensor([[-3.0, 0.0], [0.0, 0.0]], dtype=dtype)
            log = chord_log_prob(x, line, torch.ones(1, dtype=dtype), 1.0)
            slopes.append(torch.autograd.grad(log.sum(), x)[0][0, 0].double())
        assert_close(slopes[0], slopes[1], rtol=1e-3, atol=0.0)


def test_one_call_for_many_curves():
    x, nodes = randn(3, 6, 2), randn(3, 5, 2, seed=1)
    w, s = torch.rand(3, 4, generator=rng(2), dtype=F64), torch.tensor([0.1, 0.5, 2.0], dtype=F64)
    w = w / w.sum(1, keepdim=True)
    many = chord_log_prob(x, nodes, w, s)
    for i in range(3):
        assert_close(many[i], chord_log_prob(x[i], nodes[i], w[i], s[i]))


# --- linear models


def test_ppca_is_the_maximum_of_the_expected_log_prob():
    x = randn(200, 6) @ randn(6, 6, seed=1)
    mean, W, sigma = fit_ppca(x, 2)
    moments = x.mean(0), torch.cov(x.T, correction=0)
    W, s = W.clone().requires_grad_(), torch.tensor(sigma, dtype=F64, requires_grad=True)
    b = mean.clone().requires_grad_()
    for slope in torch.autograd.grad(expected_log_prob(*moments, W, b, s), (W, b, s)):
        assert slope.abs().max() < 1e-8


def test_ppca_is_that_of_scikit_learn():
    from sklearn.decomposition import PCA

    x = randn(100, 5) @ randn(5, 5, seed=1)
    mean, W, sigma = fit_ppca(x, 2)
    peer = PCA(2).fit(x.numpy())
    grown = 100 / 99  # its covariance has the divisor n - 1
    cov = W @ W.T + sigma**2 * torch.eye(5, dtype=F64)
    assert_close(grown * cov, torch.from_numpy(peer.get_covariance()), rtol=1e-8, atol=1e-8)


def test_fixed_noise_costs_the_plane_and_fresh_noise_does_not():
    flat = randn(400, 2) @ randn(2, 8, seed=1)
    W0, W1 = fit_ppca(flat, 2)[1], fit_ppca(flat, 2, 0.5)[1]
    assert_close(W0, W1, rtol=1e-9, atol=1e-9)
    moved = fit_ppca(perturb(flat, 0.5, rng(3)), 2)[1]
    off = moved - W0 @ torch.linalg.lstsq(W0, moved).solution
    assert 1e-3 < off.norm() / moved.norm() < 0.3


def test_the_perturbation_is_its_noise_times_its_size():
    x, std = torch.randn(2, 5, 3), torch.tensor([0.5, 2.0])
    noise = torch.randn(2, 5, 3, generator=rng(1))
    assert_close(perturb(x, std, rng(1)), x + std[:, None, None] * noise)
    assert_close(perturb(x, 0.3, rng(1)), x + 0.3 * noise)


# --- models


def test_side_by_side_is_each_alone():
    members = nets(3)
    model = LatentModel(Stacked(members), sigma_min=torch.tensor([0.01, 0.1, 0.2]), sigma=0.3)
    x = torch.randn(3, 7, 2, generator=rng(1))
    both = model.log_prob(x, jitter=False)
    for i, net in enumerate(members):
        alone = LatentModel(net, sigma_min=[0.01, 0.1, 0.2][i], sigma=0.3)
        assert_close(both[i], alone.log_prob(x[i], jitter=False), rtol=1e-5, atol=1e-5)
        assert alone.log_prob(x[i]).shape == (7,)
    assert_close(model.log_prob(x[0], jitter=False)[0], both[0])
    assert model.sample(5).shape == (3, 5, 2)


def test_chords_and_points_agree_where_the_noise_is_large():
    net = nets(1)[0]
    model = LatentModel(net, sigma=0.4).eval()
    x = torch.randn(20, 2, generator=rng(1))
    a, b = (model.log_prob(x, 2000, rule=r, jitter=False) for r in ("chords", "points"))
    assert_close(a, b, rtol=1e-3, atol=1e-3)
    coarse = model.log_prob(x, 400, jitter=False)  # a ReLU network is a polygon
    assert_close(coarse, a, rtol=1e-3, atol=1e-3)


def test_a_sum_over_too_few_points_is_told():
    model = LatentModel(nn.Linear(1, 2), sigma=0.01, sigma_min=1e-3).eval()
    with pytest.warns(UserWarning, match="sigma apart; take"):
        model.log_prob(torch.zeros(3, 2), 8, rule="points")
    with warnings.catch_warnings():  # not in training, where it would come in every step
        warnings.simplefilter("error")
        model.train().log_prob(torch.zeros(3, 2), 8, rule="points")


def test_the_bound_with_one_draw_is_that_of_the_vae():
    torch.manual_seed(0)
    enc, dec = nn.Linear(4, 4), nn.Linear(2, 4)
    model = LatentModel(dec, 2, "normal", enc, sigma=0.7)
    x = torch.randn(6, 4, generator=rng(1))
    s = model.sigma.item()
    torch.manual_seed(5)
    draws = torch.stack([model.iwae(x, 1).mean() for _ in range(4000)])
    vae = VAE(enc, dec, kl_weight=s**2)
    g = rng(6)
    theirs = torch.stack([vae.loss(x, g) for _ in range(4000)]) * 4 / s**2
    theirs = -theirs - 2 * math.log(2 * math.pi * s * s)
    se = (draws.var() / 4000 + theirs.var() / 4000).sqrt()
    assert (draws.mean() - theirs.mean()).abs() < 4.5 * se


def test_the_bound_is_exact_with_the_posterior():
    dec, enc = nn.Linear(1, 3), nn.Linear(3, 2)
    model = LatentModel(dec, 1, "normal", enc, sigma=0.5)
    w, b = dec.weight.data, dec.bias.data
    precision = 1 + (w.T @ w).item() / 0.25  # of z given x
    enc.weight.data = torch.cat([w.T / 0.25 / precision, torch.zeros(1, 3)])
    mean = -(w.T @ b).item() / 0.25 / precision
    enc.bias.data = torch.tensor([mean, -math.log(precision)])
    x = torch.randn(8, 3, generator=rng(1))
    law = torch.distributions.MultivariateNormal(b, w @ w.T + 0.25 * torch.eye(3))
    for m in (1, 6):
        assert_close(model.iwae(x, m), law.log_prob(x), rtol=1e-4, atol=1e-4)


def test_even_samples_have_the_law_of_random_ones():
    model = LatentModel(nn.Linear(1, 2), prior="normal")
    even, random = model.sample(20000, even=True), model.sample(20000, generator=rng(1))
    assert_close(even.mean(0), random.mean(0), rtol=0.0, atol=0.03)
    assert_close(even.var(0), random.var(0), rtol=0.05, atol=1e-3)


# --- training


def test_training_is_seeded_and_fixed_noise_is_fixed():
    x = torch.randn(64, 2, generator=rng(1))
    out = []
    for fresh, seed in ((True, 1), (True, 1), (False, 1), (True, 2)):
        model = LatentModel(nets(1)[0])
        fit_perturbed(model, x, 0.2, 3, fresh=fresh, seed=seed, progress=False)
        out.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert out[0].equal(out[1]) and not out[0].equal(out[2]) and not out[0].equal(out[3])
    # without a perturbation, fresh and fixed are the same
    ends = []
    for fresh in (True, False):
        model = LatentModel(nets(1)[0])
        fit_perturbed(model, x, 0.0, 1, fresh=fresh, batch=64, progress=False)
        ends.append(model.free.item())
    assert abs(ends[0] - ends[1]) < 0.02


def test_a_noise_that_is_not_learned_stays():
    model = LatentModel(nets(1)[0], sigma=0.25, learn_sigma=False)
    fit_perturbed(model, torch.randn(50, 2), 0.1, 3, progress=False)
    assert abs(model.sigma.item() - 0.25) < 1e-6


def test_the_noise_stays_above_its_floor():
    floor = torch.tensor([0.05, 0.2])
    model = LatentModel(Stacked([nn.Linear(1, 2) for _ in range(2)]), sigma_min=floor)
    z = 2 * torch.rand(500, 1, generator=rng(2)) - 1
    fit_perturbed(model, z @ torch.tensor([[1.0, 0.3]]), 0.0, 200, lr=2e-2, progress=False)
    assert (model.sigma >= floor).all() and (model.sigma < 1.3 * floor).all()


def test_the_choice_of_the_perturbation():
    x = torch.randn(60, 2, generator=rng(1))
    make = lambda k: LatentModel(Stacked(nets(k)))
    best, found = choose_std(make, x, (0.0, 0.3), 3, folds=2, progress=False, draws=200)
    assert best in (0.0, 0.3) and found.shape == (2, 2)
    # the smallest mean distance wins
    seen = []

    def metric(y, held):
        seen.append(len(held))
        return [3.0, 3.0, 1.0, 2.0][len(seen) - 1]

    best, found = choose_std(make, x, (0.0, 0.3), 2, folds=2, metric=metric, progress=False)
    assert best == 0.3 and found.tolist() == [[3, 3], [1, 2]] and seen == [30] * 4


# --- bad input

NET = nn.Linear(1, 2)
BAD = {
    "latent_dim must be": lambda: LatentModel(NET, 0),
    "prior must be": lambda: LatentModel(NET, prior="beta"),
    "sigma_min must be above 0": lambda: LatentModel(NET, sigma_min=0.0),
    "sigma must be above sigma_min": lambda: LatentModel(NET, sigma=1e-4),
    "x must have shape": lambda: LatentModel(NET).log_prob(torch.zeros(3, 1, 2)),
    "beyond 2 give an encoder": lambda: LatentModel(NET, 3).log_prob(torch.zeros(3, 2)),
    "rule must be": lambda: LatentModel(nn.Linear(2, 2), 2).log_prob(
        torch.zeros(3, 2), rule="chords"
    ),
    "points must be at least": lambda: LatentModel(NET).log_prob(torch.zeros(3, 2), 1),
    "iwae needs an encoder": lambda: LatentModel(NET).iwae(torch.zeros(3, 2)),
    "samples must be at least 1": lambda: LatentModel(NET, 1, "normal", nn.Linear(2, 2)).iwae(
        torch.zeros(3, 2), 0
    ),
    "the encoder must give": lambda: LatentModel(NET, 1, "normal", nn.Linear(2, 3)).iwae(
        torch.zeros(3, 2)
    ),
    "even must be False": lambda: LatentModel(nn.Linear(2, 2), 2).sample(3, even=True),
    "x must be finite": lambda: fit_perturbed(
        LatentModel(NET), torch.full((9, 2), math.nan), 0.1, 2
    ),
    "std must be at least 0": lambda: fit_perturbed(LatentModel(NET), torch.zeros(9, 2), -1.0, 2),
    "grid must hold": lambda: choose_std(lambda k: None, torch.zeros(9, 2), [], 2),
    "folds must lie in": lambda: choose_std(lambda k: None, torch.zeros(9, 2), [0.1], 2, folds=1),
    "make_model must give": lambda: choose_std(
        lambda k: LatentModel(NET), torch.zeros(9, 2), [0.1], 2
    ),
}


@pytest.mark.parametrize("said", BAD)
def test_bad_input(said):
    with pytest.raises(ValueError, match=said):
        BAD[said]()
