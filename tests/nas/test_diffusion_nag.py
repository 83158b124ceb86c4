"""DiffusionNAG: the exact denoiser and the exact tilt against enumeration, the sampler against
closed forms, the mask against networkx, the searches, errors."""

import itertools
import math

import networkx as nx
import pytest
import torch
from scipy.stats import chi2
from torch import nn

from diffkit.core.data import GaussianMixture, mnist1d
from diffkit.core.denoiser import Counter, EmpiricalDenoiser, MixtureDenoiser, NetDenoiser
from diffkit.core.process import VE, VP, Flow, time_grid
from diffkit.core.sampling import Ancestral, EulerMaruyama, sample
from diffkit.nas.diffusion_nag import (
    ArchNet,
    ArchPredictor,
    OneHotSpace,
    PredictorCorrector,
    SpaceDenoiser,
    arch_metrics,
    closure,
    decode,
    encode,
    evolution,
    exact_value,
    expected_improvement,
    fit_predictor,
    generate,
    guided_candidates,
    line_graph,
    local_search,
    nag_search,
    predictor_guidance,
)
from diffkit.nas.supernet import CellSpace, MixedOp, Supernet, Table, evaluate

F64 = torch.float64
TABLE = Table()
SPACE, VE5 = TABLE.space, VE(0.1, 5.0)
EVERY = list(SPACE)
ACC = torch.tensor([TABLE.acc(a) for a in EVERY], dtype=F64)
V = (ACC - ACC.mean()) / ACC.std()
POINTS = encode(SPACE, EVERY).double()
RAGGED = OneHotSpace([3, 5, 2, 1])


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def noisy(t, n=60, process=VE5, seed=1):
    rows = torch.randint(len(POINTS), (n,), generator=rng(seed))
    return process.noise(POINTS[rows], t, generator=rng(seed + 1))


def index(archs):
    return torch.tensor([SPACE.index(a) for a in archs])


# --- the space


def test_one_hot_space_is_the_product_and_speaks_as_a_cell_space():
    assert list(RAGGED) == list(itertools.product(range(3), range(5), range(2), range(1)))
    assert len(RAGGED) == 30 and RAGGED.onehot(RAGGED).sum((1, 2)).eq(4).all()
    near = RAGGED.neighbours((0, 4, 1, 0))
    assert len(near) == len(set(near)) == 2 + 4 + 1
    assert all(sum(i != j for i, j in zip(a, (0, 4, 1, 0))) == 1 for a in near)
    drawn = RAGGED.random(3000, rng())
    assert set(drawn) == set(RAGGED)
    same = OneHotSpace([3] * 6)
    assert list(same) == EVERY and torch.equal(same.onehot(EVERY), SPACE.onehot(EVERY))
    assert set(same.neighbours(EVERY[77])) == set(SPACE.neighbours(EVERY[77]))


@pytest.mark.parametrize("space", [SPACE, RAGGED])
def test_decoding(space):
    every = list(space)
    x = encode(space, every)
    assert set(x.unique().tolist()) == {-1.0, 1.0}
    for shake, right in ((0.99, True), (1.5, False)):  # below 1 no sign can change
        noise = shake * (2 * torch.rand(x.shape, generator=rng()) - 1)
        archs, valid = decode(space, x + noise)
        assert (archs == every) == bool(valid.all()) == right
    bad = x[:3].clone()
    bad[0, 0] = 0.5  # all positive
    bad[1, -1] = -0.1  # none
    assert decode(space, bad)[1].tolist() == [False, False, True]


def test_an_option_that_is_not_there_is_never_chosen_and_makes_invalid():
    x = encode(RAGGED, [(2, 4, 1, 0)] * 2)
    x[1, 3, 2] = 9.0
    archs, valid = decode(RAGGED, x)
    assert archs == [(2, 4, 1, 0)] * 2 and valid.tolist() == [True, False]


def test_metrics_and_no_valid_sample():
    archs = [(0,), (0,), (1,), (2,)]
    got = arch_metrics(archs, torch.tensor([1, 1, 1, 0]).bool(), [(1,)])
    assert got == pytest.approx((0.75, 2 / 3, 2 / 3))
    assert arch_metrics(archs) == pytest.approx((1, 0.75, 1))
    with pytest.warns(UserWarning, match="none of 4 samples is valid"):
        none = arch_metrics(archs, torch.zeros(4))
    assert none.validity == 0 and math.isnan(none.uniqueness) and math.isnan(none.novelty)


# --- exact denoiser and exact tilt


@pytest.mark.parametrize("process", [VE5, VP(), Flow()])
@pytest.mark.parametrize("t", [0.01, 0.4, 0.9])
def test_denoiser_is_that_of_all_points(process, t):
    d, x = SpaceDenoiser(SPACE, process), noisy(t, process=process)
    a, s = float(process.alpha(t)), float(process.sigma(t))
    # equal norms: the quadratic term cancels; rounding of float64 on logits of up to 1e5
    r = (a * torch.einsum("bek,nek->bn", x, POINTS) / s**2).softmax(1)
    want = torch.einsum("bn,nek->bek", r, POINTS)
    torch.testing.assert_close(d(x, t).x0, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(EmpiricalDenoiser(POINTS, process)(x, t).x0, want, rtol=0, atol=1e-9)
    p = d(x, t)  # conversions
    torch.testing.assert_close(p.score, (a * want - x) / s**2)
    torch.testing.assert_close(p.eps, (x - a * want) / s)
    times = torch.full((len(x),), t, dtype=F64)
    torch.testing.assert_close(d(x, times).x0, p.x0)


def test_marginals_and_ragged_spaces():
    m = torch.rand(4, 5, generator=rng(3), dtype=F64)
    m[1, 2] = 0.0  # never
    d = SpaceDenoiser(RAGGED, VE5, m)
    points = encode(RAGGED, RAGGED).double()
    weights = (RAGGED.onehot(RAGGED) * m).sum(-1).prod(1)
    mixture = GaussianMixture(points, scales=0.0, weights=weights)
    x = VE5.noise(points, 0.6, generator=rng(4))
    want = MixtureDenoiser(mixture, VE5)(x, 0.6).x0
    torch.testing.assert_close(d(x, 0.6).x0, want, rtol=0, atol=1e-9)
    assert (d.probs(x, 0.6)[:, 1, 2] == 0).all() and (d(x, 0.6).x0[:, 3, 1:] == -1).all()
    values = torch.randn(30, generator=rng(5), dtype=F64)
    r = mixture.responsibilities(x, 1.0, VE5.sigma(0.6))
    torch.testing.assert_close(exact_value(d, values)(x, 0.6), r @ values)


@pytest.mark.parametrize("row, options", [(0, 3), (1, 5), (3, 1)])
def test_every_choice_needs_an_option_that_may_be_taken(row, options):
    m = torch.ones(4, 5)
    m[row, :options] = 0.0  # what is left in the row, if anything, are options that are not there
    with pytest.raises(ValueError, match="some positive in each row"):
        SpaceDenoiser(RAGGED, VE5, m)
    m[row, options - 1] = 1e-3  # one is enough, and then it is certain
    p = SpaceDenoiser(RAGGED, VE5, m).probs(torch.zeros(1, 4, 5, dtype=F64), 0.5)
    want = torch.eye(5, dtype=F64)[options - 1]
    torch.testing.assert_close(p[0, row], want, rtol=0, atol=0)


@pytest.mark.parametrize("k", [-2.0, 0.3, 3.0, 30.0])
@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_exact_value_is_the_score_of_the_tilted_law(k, t):
    d, x = SpaceDenoiser(SPACE), noisy(t)
    tilted = GaussianMixture(POINTS, scales=0.0, weights=(k * V).softmax(0))
    want = MixtureDenoiser(tilted, VE5)(x, t)
    got = predictor_guidance(d, exact_value(d, V, k), k)(x, t)
    torch.testing.assert_close(got.x0, want.x0, rtol=0, atol=1e-7)
    if t == 0.5:  # and what the paper's guidance has is something else
        other = predictor_guidance(d, exact_value(d, V), k)(x, t)
        assert (other.x0 - want.x0).abs().max() > 1e-3


def test_exact_value_at_small_k_by_the_expansion():
    d, x, t = SpaceDenoiser(SPACE), noisy(0.6), 0.6
    mean, square = exact_value(d, V)(x, t), exact_value(d, V.square())(x, t)
    k = 1e-3  # the next term is of the order k^2 times the third moment
    got = (exact_value(d, V, k)(x, t) - mean) / (k / 2)
    torch.testing.assert_close(got, square - mean.square(), rtol=0, atol=0.02)


def test_unguided_samples_are_valid_and_uniform():
    archs, valid = generate(SpaceDenoiser(SPACE), SPACE, 1500, steps=30, generator=rng(6))
    assert valid.all()
    counts = SPACE.onehot(archs).sum(0)
    # 6 edges with 2 degrees of freedom each; one in ten thousand is beyond
    assert ((counts - 500) ** 2 / 500).sum().item() < chi2.ppf(0.9999, 12)


def test_tilted_samples():
    d, k = SpaceDenoiser(SPACE), 1.0
    law = (k * V).softmax(0)
    want = float((law * V).sum())
    sd = float((law * V.square()).sum() - want**2) ** 0.5
    guided = predictor_guidance(d, exact_value(d, V, k), k)
    archs, valid = generate(guided, SPACE, 1000, steps=60, generator=rng(7))
    # four standard errors, and 0.02 for the steps
    assert valid.all() and abs(V[index(archs)].mean() - want) < 4 * sd / 1000**0.5 + 0.02


@pytest.mark.parametrize("k", [0.5, 3.0])
def test_gaussian_data_where_the_papers_guidance_is_exact(k):
    m, S = torch.tensor([0.3, -0.2]).double(), torch.tensor([[0.5, 0.2], [0.2, 0.4]]).double()
    a = torch.tensor([1.0, -2.0], dtype=F64)
    make = lambda mean: MixtureDenoiser(GaussianMixture(mean[None], covs=S), VE5)
    d, moved = make(m), make(m + k * S @ a)
    f = lambda x, t: d(x, t).x0 @ a
    x = torch.randn(40, 2, generator=rng(8), dtype=F64)
    for t in (0.05, 0.5, 0.95):
        guided = predictor_guidance(d, f, k)(x, t)
        torch.testing.assert_close(guided.score, moved(x, t).score)


def test_scale_zero_is_a_no_op_and_guidance_costs_no_pass():
    d = Counter(SpaceDenoiser(SPACE))
    x = noisy(0.5)
    f = exact_value(d.inner, V)
    assert torch.equal(predictor_guidance(d, f, 0.0)(x, 0.5).eps, d(x, 0.5).eps)
    d.reset()
    generate(predictor_guidance(d, f, 3.0), SPACE, 10, steps=7, generator=rng())
    assert d.calls == PredictorCorrector().evals(7) == 14


# --- the sampler


def test_without_corrector_it_is_euler_maruyama_without_the_last_noise():
    d, x = SpaceDenoiser(SPACE), VE5.prior((50, 6, 3), rng(9), dtype=F64)
    grid = time_grid(VE5, 8, "uniform", 1.0, 0.0)
    noise = torch.randn(16, 50, 6, 3, generator=rng(10), dtype=F64)
    run = lambda solver: sample(d, solver, x, grid, progress=False)
    quiet = torch.cat([noise[:7], torch.zeros_like(noise[:1])])
    for first in (True, False):
        got = run(PredictorCorrector(0.0, first, noise=noise))
        torch.testing.assert_close(got, run(EulerMaruyama(noise=quiet)))


@pytest.mark.parametrize("first", [True, False])
def test_the_loop_by_hand(first):
    d, x, r = SpaceDenoiser(SPACE), VE5.prior((50, 6, 3), rng(9), dtype=F64), 0.16
    grid = time_grid(VE5, 3, "uniform", 1.0, 0.0)
    noise = torch.randn(6, 50, 6, 3, generator=rng(10), dtype=F64)
    got = sample(d, PredictorCorrector(r, first, noise), x, grid, progress=False)
    size = lambda v: v.reshape(50, -1).square().sum(1).sqrt().mean()

    def langevin(x, t, z):
        score = d(x, t).score
        eta = 2 * (r * size(z) / size(score)) ** 2
        return x + eta * score + (2 * eta).sqrt() * z

    for i in range(3):
        t, s = grid[i].item(), grid[i + 1].item()
        x = langevin(x, t, noise[3 + i]) if first else x
        g2 = 2 * 0.01 * 50 ** (2 * t) * math.log(50)  # d sigma^2 / dt
        x = x + (t - s) * g2 * d(x, t).score + (g2 * (t - s)) ** 0.5 * noise[i] * (i < 2)
        x = x if first else langevin(x, s, noise[3 + i])
    torch.testing.assert_close(got, x)


def test_the_published_setting_and_other_solvers():
    d = SpaceDenoiser(SPACE)
    archs, valid = generate(d, SPACE, 4, steps=1000, generator=rng(11))
    assert valid.all()
    for process in (VP(), VE5):
        _, valid = generate(SpaceDenoiser(SPACE, process), SPACE, 100, steps=60,
                            solver=Ancestral(), generator=rng(12))  # fmt: skip
        assert valid.all()
    pc, norms = PredictorCorrector(), []
    z = torch.randn(1, 500, 6, 3, generator=rng(13), dtype=F64)
    # on pure noise the Langevin step is r^2 times twice the variance
    wide = MixtureDenoiser(GaussianMixture(torch.zeros(1, 6, 3), scales=0.0), VE5)
    pc.start(VE5, time_grid(VE5, 1, "uniform", 1.0, 0.0))
    pc.noise = torch.cat([z, z])
    x = 5 * torch.randn(500, 6, 3, generator=rng(14), dtype=F64)
    eta = 2 * (0.16 * 5) ** 2
    want = x * (1 - eta / 25) + (2 * eta) ** 0.5 * z[0]
    norms = (pc.langevin(wide, x, 1.0, 0) - want).abs().max()
    assert norms < 0.05 * want.std()  # norms of 500 samples of 18 numbers


# --- networks


def test_mask():
    graph = line_graph(SPACE)
    for i, j in itertools.product(range(6), repeat=2):
        assert graph[i, j] == (SPACE.edges[i][1] == SPACE.edges[j][0])
    pairs = {(SPACE.edges[i], SPACE.edges[j]) for i, j in graph.nonzero().tolist()}
    assert pairs == {((0, 1), (1, 2)), ((0, 1), (1, 3)), ((0, 2), (2, 3)), ((1, 2), (2, 3))}
    for nodes in (3, 4, 5):
        g = line_graph(CellSpace(nodes=nodes))
        theirs = nx.transitive_closure(nx.from_numpy_array(g.numpy(), create_using=nx.DiGraph))
        assert torch.equal(closure(g), torch.from_numpy(nx.to_numpy_array(theirs) > 0))
    assert closure(graph).sum() == graph.sum() + 1  # (0, 1) reaches (2, 3)


def test_what_a_token_sees():
    graph = line_graph(SPACE)
    for mask, layers, sees in (
        (graph, 1, graph),
        (graph, 2, closure(graph)),
        (closure(graph), 1, closure(graph)),
        (None, 1, torch.ones(6, 6).bool()),
    ):
        torch.manual_seed(0)
        net = ArchNet(SPACE, 16, layers, 2, mask)
        x = torch.randn(1, 6, 3)
        assert (net(x, torch.zeros(1)) == 0).all()  # a fresh one predicts 0
        nn.init.normal_(net.head.weight)
        f = lambda x: net(x, torch.zeros(1))[0].sum(-1)  # noqa: B023
        J = torch.autograd.functional.jacobian(f, x)[:, 0].abs().sum(-1) > 0
        assert torch.equal(J, sees | torch.eye(6).bool())


def test_places_and_ragged_network():
    torch.manual_seed(0)
    net = ArchNet(RAGGED, 16, 1, 2)
    nn.init.normal_(net.head.weight)
    x, t = torch.randn(3, 4, 5), torch.zeros(3)
    order = torch.tensor([2, 0, 1, 3])
    assert not torch.allclose(net(x[:, order], t), net(x, t)[:, order], atol=1e-3)
    with torch.no_grad():  # without places and mask it is equivariant
        net.place.zero_()
    torch.testing.assert_close(net(x[:, order], t), net(x, t)[:, order])
    model = NetDenoiser(net, VE5, "eps", time_input=VE5.log_snr)
    assert model(x, 0.5).x0.shape == (3, 4, 5)


def test_predictor_learns_a_sum_and_knows_the_noise():
    value = lambda a: 5.0 + 2.0 * sum(k == 2 for k in a)
    f = fit_predictor(SPACE, EVERY, [value(a) for a in EVERY], steps=200, seed=0)
    y = torch.tensor([value(a) for a in EVERY])
    with torch.no_grad():
        clean, blind = f(POINTS.float(), 0.0), f(5 * torch.randn(729, 6, 3, generator=rng()), 1.0)
        exact = exact_value(SpaceDenoiser(SPACE), y)(x := noisy(0.6, 300), 0.6)
        rough = f(x.float(), torch.full((300,), 0.6))
    assert (clean - y).square().mean() < 0.05 * y.var()
    assert abs(blind.mean() - y.mean()) < 0.5 and blind.var() < 0.3 * y.var()
    # least squares on noised architectures is the posterior mean
    # (perceptron, short training)
    assert (rough - exact).square().mean() < 0.3 * exact.var()
    again = fit_predictor(SPACE, EVERY[:9], y[:9], steps=5, seed=3)
    state = torch.random.get_rng_state()
    other = fit_predictor(SPACE, EVERY[:9], y[:9], steps=5, seed=3)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), other.parameters()))


# --- the searches


@pytest.mark.parametrize("search", [nag_search, local_search, evolution])
@pytest.mark.parametrize("budget", [1, 2, 13])
def test_budgets_and_paths(search, budget):
    calls = []
    score = lambda a: calls.append(a) or float(-sum(a))
    some = dict(steps=3, rounds=2) if search is nag_search else {}
    path = search(score, RAGGED, budget, generator=rng(15), **some)
    assert len(path) == len(calls) == budget
    best = [min(map(sum, calls[: i + 1])) for i in range(budget)]
    assert [sum(a) for a in path] == best and path[0] == calls[0]
    first = list(calls)
    calls.clear()
    assert search(score, RAGGED, budget, generator=rng(15), **some) == path and calls == first


def test_nag_search_scores_each_once_up_to_the_whole_space():
    calls = []
    nag_search(lambda a: calls.append(a) or float(a[1]), RAGGED, 30, steps=3, rounds=2,
               generator=rng(16))  # fmt: skip
    assert sorted(calls) == list(RAGGED)


def test_what_the_parts_of_nag_search_are_given():
    told = []

    def surrogate(archs, y, seed):
        told.append((len(archs), float(y.mean()), float(y.std())))
        return lambda x, t: x[:, 1, 4]  # likes option 4 of choice 1

    asked = []

    def candidates(f, n, seen, g):
        asked.append((n, len(seen)))
        return list(RAGGED)

    seen = []
    nag_search(lambda a: seen.append(a) or float(sum(a)), RAGGED, 14, start=2, pool=3.0,
               surrogate=surrogate, candidates=candidates, generator=rng(17))  # fmt: skip
    assert [n for n, _, _ in told] == [2, 4, 8] and asked == [(6, 2), (12, 4), (18, 8)]
    for _, mean, sd in told:
        assert abs(mean) < 1e-6 and abs(sd - 1) < 1e-5
    fours = sum(a[1] == 4 for a in seen[:2])
    assert sum(a[1] == 4 for a in seen[2:]) == min(12, 6 - fours)  # all six of them
    assert all(a[1] == 4 for a in seen[2:8][: 6 - fours])


def test_candidates_are_new_different_and_good():
    f = lambda x, t: x[:, 0, 2] + x[:, 1, 3]
    seen = [(2, 3, 0, 0)]
    got = guided_candidates(SpaceDenoiser(RAGGED), RAGGED, f, 5, seen, scale=0.7, steps=20,
                            generator=rng(18))  # fmt: skip
    assert len(got) == len(set(got)) == 5 and seen[0] not in got
    assert (2, 3, 1, 0) in got
    few = guided_candidates(SpaceDenoiser(RAGGED), RAGGED, f, 99, fall=0.5, rounds=8, steps=20,
                            generator=rng(19))  # fmt: skip
    assert set(few) == set(RAGGED)  # the scale falls to 0, and all come


def test_local_search_climbs_a_sum():
    score = lambda a: float(sum(a))
    assert local_search(score, RAGGED, 60, rng(20))[-1] == (2, 4, 1, 0)
    # no local optimum but the top: at most 7 neighbours for each of 7 steps up
    trap = lambda a: float(a == (2, 4, 1, 0)) - 0.1 * (a == (2, 4, 0, 0))
    assert local_search(trap, RAGGED, 400, rng(21))[-1] == (2, 4, 1, 0)  # starts anew


def test_evolution_lets_the_oldest_die():
    asked = []

    def score(a):  # the first ones are the best: only age removes them
        asked.append(a)
        return -float(len(asked))

    evolution(score, SPACE, 60, population=4, tournament=200, generator=rng(22))
    # with a tournament of all, each child comes from the best alive, which is the oldest
    for i in range(4, 60):
        assert asked[i] in SPACE.neighbours(asked[i - 4])


def test_expected_improvement():
    d = SpaceDenoiser(RAGGED)
    value = lambda a: a[0] - 0.5 * abs(a[1] - 2) + a[2]
    every = list(RAGGED)
    told = every[::3]
    y = torch.tensor([value(a) for a in told], dtype=F64)
    y = (y - y.mean()) / y.std()
    from sklearn.gaussian_process import GaussianProcessRegressor
    from sklearn.gaussian_process.kernels import RBF, WhiteKernel

    code = lambda a: RAGGED.onehot(a).flatten(1).double().numpy()
    kernel = 1.0 * RBF(2.0) + WhiteKernel(0.01)
    gp = GaussianProcessRegressor(kernel, optimizer=None).fit(code(told), y.numpy())
    mean, sd = (torch.as_tensor(v) for v in gp.predict(code(every), return_std=True))
    draws = mean + sd * torch.randn(200_000, 30, generator=rng(23), dtype=F64)
    by_chance = (draws - y.max()).clamp(min=0).mean(0)
    f = expected_improvement(d, told, y, optimizer=None)
    # at clean points the posterior is sure to 1e-80; 200,000 draws: 1 % of the largest
    got = f(encode(RAGGED, every).double(), 0.0).exp()
    torch.testing.assert_close(got, by_chance, rtol=0.02, atol=0.01 * float(by_chance.max()))


# --- on one's own


def test_choices_of_different_size_of_a_network():
    torch.manual_seed(0)
    convs = {f"c{w}": nn.Conv1d(1, 4, w, padding=w // 2) for w in (3, 5, 7)}
    pools = {"max": nn.MaxPool1d(4), "mean": nn.AvgPool1d(4)}
    net = Supernet(nn.Sequential(MixedOp(convs), MixedOp(pools), nn.Flatten(), nn.Linear(40, 10)))
    paths, data = OneHotSpace([len(n) for n in net.ops]), mnist1d("test")
    score = lambda a: evaluate(net, data, arch=a).acc
    got = nag_search(score, paths, 6, steps=3, rounds=2, generator=rng(24))
    assert score(got[-1]) == max(map(score, paths))


def test_guided_generation_on_hyperparameters():
    like = lambda a: -abs(a[1] - 3) + (a[0] == 1) + 0.5 * a[2]
    told = RAGGED.random(30, rng(25))
    f = fit_predictor(RAGGED, told, [like(a) for a in told])
    guided = predictor_guidance(SpaceDenoiser(RAGGED), f, 5.0)
    archs, valid = generate(guided, RAGGED, 60, steps=25, generator=rng(26))
    assert valid.double().mean() > 0.95
    mean = lambda some: sum(map(like, some)) / len(some)
    assert mean(archs) > mean(RAGGED) + 0.7  # of a standard deviation of 1.3


F = lambda x, t: x.sum((1, 2))


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: OneHotSpace([]), "cards="),
        (lambda: OneHotSpace([3, 0]), r"cards=\[3, 0\]"),
        (lambda: OneHotSpace([3, 2.0]), "must be integers"),
        (lambda: RAGGED.check((0, 0, 0)), "has 3 entries, there are 4"),
        (lambda: RAGGED.check((0, 5, 0, 0)), "choice 1 has options 0 to 4, got 5"),
        (lambda: RAGGED.from_onehot(torch.zeros(2, 4, 3)), r"expected \(N, 4, 5\)"),
        (lambda: decode(SPACE, torch.zeros(2, 3, 6)), r"expected \(N, 6, 3\)"),
        (lambda: arch_metrics([(0,)], torch.ones(2)), "valid has 2 entries"),
        (lambda: SpaceDenoiser(RAGGED, VE5, torch.ones(4, 3)), r"marginals must be \(4, 5\)"),
        (lambda: SpaceDenoiser(RAGGED, VE5, -torch.ones(4, 5)), "at least 0"),
        (lambda: SpaceDenoiser(SPACE)(torch.zeros(2, 4, 5), 0.5), r"expected \(B, 6, 3\)"),
        (lambda: SpaceDenoiser(SPACE)(torch.zeros(2, 6, 3), 1.5), "must lie in"),
        (lambda: exact_value(SpaceDenoiser(SPACE), V[:5]), "values must be 729"),
        (lambda: exact_value(SpaceDenoiser(SPACE), V, math.nan), "k=nan"),
        (lambda: predictor_guidance(SpaceDenoiser(SPACE), F, math.nan), "finite"),
        (lambda: predictor_guidance(SpaceDenoiser(SPACE), 1.0), "must be a function"),
        (lambda: predictor_guidance(nn.Linear(2, 2), F), "must be a Denoiser"),
        (
            lambda: predictor_guidance(SpaceDenoiser(SPACE), lambda x, t: x)(noisy(0.5), 0.5),
            r"must return shape \(60,\), got \(60, 6, 3\)",
        ),
        (lambda: PredictorCorrector(-0.1), "snr=-0.1"),
        (lambda: closure(torch.ones(2, 3)), "must be square"),
        (lambda: ArchNet(SPACE, 30), "heads=4 does not divide width=30"),
        (lambda: ArchNet(SPACE, mask=torch.ones(5, 5)), r"mask must have shape \(6, 6\)"),
        (lambda: fit_predictor(SPACE, EVERY[:3], [1.0, 2.0]), "y must be 3 finite"),
        (lambda: fit_predictor(SPACE, EVERY[:2], [1.0, math.nan]), "finite"),
        (lambda: nag_search(sum, RAGGED, 31), "budget=31 is more than the 30"),
        (lambda: nag_search(sum, RAGGED, 9, start=1), "start=1"),
        (lambda: nag_search(sum, RAGGED, 9, pool=0.5), "pool=0.5"),
        (lambda: nag_search(sum, RAGGED, 9, scales=1.0), "'scales' is none of scale"),
        (lambda: nag_search(sum, RAGGED, 9, candidates=print, scale=1.0), "'scale'"),
        (lambda: nag_search(lambda a: math.nan, RAGGED, 9), "must be finite"),
        (lambda: local_search(sum, RAGGED, 0), "budget=0"),
        (lambda: evolution(sum, RAGGED, 9, population=0), "population=0"),
        (lambda: evolution(sum, RAGGED, 9, tournament=True), "tournament=True"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_predictor_takes_times_a_sample():
    f = ArchPredictor(SPACE, VE5)
    x, t = noisy(0.5).float(), torch.linspace(0, 1, 60)
    rows = torch.cat([f(x[i : i + 1], t[i]) for i in range(60)])
    torch.testing.assert_close(f(x, t), rows, rtol=1e-4, atol=1e-5)


def test_local_search_climbs_from_where_it_stands():
    space = OneHotSpace([3, 4, 2, 3])
    value = {a: float(v) for a, v in zip(space, torch.randperm(len(space), generator=rng(3)))}
    asked = []
    local_search(lambda a: asked.append(a) or value[a], space, 300, rng(4))
    here, left = None, set()
    for a in asked:  # replayed: a new start only where no neighbour is better
        if not left:
            here, left = a, set(space.neighbours(a))
        else:
            assert a in left
            left.remove(a)
            if value[a] > value[here]:
                here, left = a, set(space.neighbours(a))


def test_a_space_that_nobody_can_list():
    space = OneHotSpace([2] * 70)
    path = nag_search(lambda a: float(sum(a)), space, 4, steps=2, rounds=1, draws=4)
    assert len(path) == 4


def test_no_valid_sample_is_said():
    denoiser = SpaceDenoiser(OneHotSpace([3, 5, 2, 4]))
    flat = lambda x, t: x.sum((1, 2))
    with pytest.warns(UserWarning, match="more than steps=2"):
        guided_candidates(denoiser, denoiser.space, flat, 3, steps=2, rounds=2)
    with pytest.raises(ValueError, match="differentiable in x"):
        stuck = lambda x, t: x.detach().sum((1, 2))
        guided_candidates(denoiser, denoiser.space, stuck, 3, steps=2, rounds=1)


def test_designs_as_tensors_are_designs():
    space = OneHotSpace([2, 2])
    asked = []
    every = torch.tensor(list(space))
    nag_search(
        lambda a: asked.append(a) or float(sum(a)),
        space,
        4,
        start=2,
        surrogate=lambda a, y, seed: lambda x, t: x.sum((1, 2)),
        candidates=lambda f, n, seen, g: every,
    )
    assert sorted(asked) == sorted(space)


def test_nothing_to_search_and_nothing_to_draw():
    one = CellSpace(("skip",), nodes=2)
    with pytest.raises(ValueError, match="holds one architecture"):
        evolution(lambda a: 1.0, one, 12, population=2)
    space = CellSpace(nodes=2)
    with pytest.raises(ValueError, match="n=0"):
        generate(SpaceDenoiser(space), space, 0)
