"""Domain heads: limits, exact beds, peers, what does not depend on what, and wrong input."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from torch import nn
from torch.nn.functional import cross_entropy, nll_loss
from torch.utils.data import DataLoader, TensorDataset

from diffkit.adaptive.drm import (
    DRM,
    HOW,
    STEERINGS,
    T3A,
    OnlineDRM,
    adaptivity_gap,
    best_mixture,
    calibrate,
    choose,
    discriminator,
    domain_batches,
    drm_bed,
    fit_heads,
    prototypes,
    ring,
    ring_accuracy,
    steer,
    weigh,
)
from diffkit.core.training import fit

QUARTER = torch.arange(4, dtype=torch.float64) * math.pi / 2


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=gen(seed), dtype=torch.float64)


P = (2 * rand(4, 40, 3)).softmax(-1)
GIVEN = dict(
    features=rand(40, 5, seed=1),
    prototypes=rand(3, 5, seed=2),
    domain=rand(40, 3, seed=3).softmax(-1),
)


def model(K=3, C=3, D=5, seed=0):
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DRM(nn.Sequential(nn.Linear(4, D), nn.Tanh()), D, C, K).double()


def data(K=3, n=30, C=3, seed=4):
    x = rand(K, n, 4, seed=seed)
    y = torch.randint(C, (K, n), generator=gen(seed))
    y[:, :C] = torch.arange(C)
    return [(x[k], y[k]) for k in range(K)]


def ready(**options):
    m, sets = model(**options), data()
    prototypes(m, sets)
    discriminator(m, sets)
    return m


def params(m):
    return [p.detach().clone() for p in m.parameters()]


def equal(a, b):
    return all(torch.equal(u, v) for u, v in zip(a, b))


# --- the rule and the scores


def test_the_rule_by_hand_and_its_limits():
    gap = torch.tensor([[1.0, 2.0, 3.0], [2.0, 2.0, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(weigh(gap, 2)[:, 0], torch.tensor([4 / 5, 1 / 5]).double())
    assert weigh(gap).tolist() == [[1, 0.5, 0], [0, 0.5, 1]]  # a tie is shared
    torch.testing.assert_close(weigh(gap, 0), torch.full_like(gap, 0.5))
    torch.testing.assert_close(weigh(gap, 200), weigh(gap), atol=1e-6, rtol=0)  # 2^-200
    zero = torch.tensor([[0.0], [1.0], [math.inf]], dtype=torch.float64)
    torch.testing.assert_close(weigh(zero, 1)[:, 0], torch.tensor([1.0, 0, 0]).double())
    assert torch.isfinite(weigh(zero, 0)).all()


def test_scores_are_what_they_say():
    entropy = -(P * P.log()).sum(-1)
    torch.testing.assert_close(steer(P, gamma=1), (1 / entropy) / (1 / entropy).sum(0))
    d = torch.tensor(
        [[math.dist(f, m) for f in GIVEN["features"]] for m in GIVEN["prototypes"]]
    ).double()
    want = d**-1.5 / (d**-1.5).sum(0)
    torch.testing.assert_close(steer(P, "prototype", 1.5, **GIVEN)[:3], want)
    like = torch.cosine_similarity(GIVEN["features"][:, None], GIVEN["prototypes"][None], dim=-1)
    near = steer(P, "prototype", metric="cosine", **GIVEN)
    assert torch.equal(near.argmax(0), like.argmax(1))  # the largest similarity, not the least
    torch.testing.assert_close(steer(P, "discriminator", 1, **GIVEN)[:3], GIVEN["domain"].T)
    assert torch.equal(steer(P, "joint")[-1], torch.ones(40).double())
    assert steer(P, "uniform", include_joint=False)[:, 0].tolist() == pytest.approx(
        [1 / 3] * 3 + [0]
    )


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("gamma", [None, 1.7])
def test_order_company_and_equal_heads(how, gamma):
    w = steer(P, how, gamma, **GIVEN)
    torch.testing.assert_close(w.sum(0), torch.ones(40).double())
    order = torch.tensor([2, 0, 1])
    moved = GIVEN | dict(prototypes=GIVEN["prototypes"][order], domain=GIVEN["domain"][:, order])
    swapped = steer(P[[2, 0, 1, 3]], how, gamma, **moved)
    torch.testing.assert_close(swapped, w[[2, 0, 1, 3]])
    alone = GIVEN | dict(features=GIVEN["features"][5:6], domain=GIVEN["domain"][5:6])
    torch.testing.assert_close(steer(P[:, 5:6], how, gamma, **alone), w[:, 5:6])
    same = P[:1].expand(4, -1, -1)
    mixed = (steer(same, how, gamma, **GIVEN)[..., None] * same).sum(0)
    torch.testing.assert_close(mixed, P[0])
    if how in ("entropy", "uniform"):
        assert (steer(P, how, gamma, include_joint=False)[-1] == 0).all()


def test_per_batch_is_one_choice_by_the_mean_entropy():
    entropy = -(P * P.log()).sum(-1).mean(1)
    w = steer(P, per="batch")
    assert (w == w[:, :1]).all() and w[:, 0].argmax() == entropy.argmin()
    alone = torch.cat([steer(P[:, i : i + 1], per="batch") for i in range(40)], 1)
    assert torch.equal(alone, steer(P)) and not torch.equal(alone, w)  # the company matters
    p = torch.tensor([[0.99, 0.99, 0.99, 0.5], [0.9] * 4, [0.5] * 4], dtype=torch.float64)
    w = steer(torch.stack([p, 1 - p], -1), per="batch")  # by the mean: not by the least sure
    assert w[:, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("gamma", [None, 0, 0.5, 1, 5, 40])
def test_between_two_heads_and_two_classes_entropy_is_the_average(gamma):
    z = 4 * rand(3, 20_000, seed=6)
    p = torch.stack([z.sigmoid(), (-z).sigmoid()], -1)
    w = steer(p, gamma=gamma, include_joint=False)
    assert torch.equal((w[..., None] * p).sum(0).argmax(-1), p[:2].mean(0).argmax(-1))
    w = steer(p)  # with a third head it is not
    assert not torch.equal((w[..., None] * p).sum(0).argmax(-1), p.mean(0).argmax(-1))


# --- mixtures


def test_mixtures_are_convex_and_the_best_is_the_best():
    y = torch.randint(3, (40,), generator=gen(7))
    true = P.gather(-1, y.expand(4, 40)[..., None])[..., 0]
    each = -true.log().mean(1)
    for seed in range(20):
        a = rand(4, seed=seed).softmax(0)
        mixed = nll_loss(torch.einsum("k,kbc->bc", a, P).log(), y)
        assert mixed <= a @ each + 1e-12
    a, least = best_mixture(true)
    assert least <= each.min() + 1e-12 and abs(a.sum() - 1) < 1e-9
    cost = lambda z: -np.log(np.exp(z) / np.exp(z).sum() @ true.numpy()).mean()
    starts = np.random.default_rng(0).normal(size=(4, 4))
    peer = min(minimize(cost, z, tol=1e-12).fun for z in starts)
    assert least == pytest.approx(peer, abs=1e-5)  # EM stops after 500 rounds


def test_the_gap_is_between_the_steering_and_the_oracle():
    m = ready()
    x, y = (torch.cat(v) for v in zip(*data(seed=9)))
    g = adaptivity_gap(m, x, y, how="joint")
    assert g.chosen == pytest.approx(g.joint) and g.gap == pytest.approx(g.chosen - g.mixture)
    p = m(x, "joint").detach()
    assert g.joint == pytest.approx(float(nll_loss(p.log(), y)))
    assert g.mixture <= min(g.head, g.joint) and 0 <= g.which < 3
    mixed = torch.einsum("k,kbc->bc", g.weights, m.probs(m.features(x)))
    assert g.mixture == pytest.approx(float(nll_loss(mixed.detach().log(), y)))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_head_of_the_gap_is_found_by_trying_all(seed):
    m = ready(seed=seed)
    x, y = data(seed=9)[0]
    each = [float(nll_loss(p.log(), y)) for p in m.probs(m.features(x)).detach()]
    g = adaptivity_gap(m, x, y)
    assert g.head == pytest.approx(min(each[:-1])) and g.which == each.index(min(each[:-1]))
    assert g.joint == pytest.approx(each[-1])  # never a candidate


# --- training


def test_one_domain_is_erm():
    with pytest.warns(UserWarning, match="domains=1"):
        DRM(nn.Identity(), 4, 2, 1)
    m = model(K=1)
    m.heads[1].load_state_dict(m.heads[0].state_dict())
    erm = copy.deepcopy(nn.Sequential(m.encoder, m.heads[0]))
    x, y = data(K=1)[0]
    a, b = (torch.optim.Adam(net.parameters()) for net in (m, erm))
    for _ in range(20):
        for opt, cost in ((a, lambda: m.loss([(x, y)])), (b, lambda: cross_entropy(erm(x), y))):
            opt.zero_grad()
            cost().backward()
            opt.step()
    assert torch.equal(m.heads[0].weight, m.heads[1].weight)
    # Adam sees half the gradient of a head; only its 1e-8 beside the root tells
    torch.testing.assert_close(m(x), erm(x).softmax(-1), atol=1e-5, rtol=0)


def test_the_loss_by_hand_with_unequal_batches():
    m, sets = model(), data()
    sets = [(x[: 4 + 3 * k], y[: 4 + 3 * k]) for k, (x, y) in enumerate(sets)]
    want = 0
    for k, (x, y) in enumerate(sets):
        f = m.encoder(x)
        want += (cross_entropy(m.heads[k](f), y) + cross_entropy(m.heads[3](f), y)) / 6
    torch.testing.assert_close(m.loss(sets), want)
    m.loss(sets[:1] * 3).backward()
    grads = [h.weight.grad for h in m.heads]
    assert all(g.abs().sum() > 0 for g in grads)
    torch.testing.assert_close(m.logits(sets[0][0]).shape, torch.Size([4, 4, 3]))


def test_batches_of_the_domains():
    sets = [(torch.full((9, 1), float(k)), torch.arange(9) % 3) for k in range(2)]
    stream = domain_batches(sets, 5, gen(1))
    seen = [next(stream) for _ in range(8)]
    assert all((x == k).all() and len(y) == 5 for b in seen for k, (x, y) in enumerate(b))
    again = next(domain_batches(sets, 5, gen(1)))
    assert torch.equal(again[1][1], seen[0][1][1])


# --- what is computed afterwards


def test_the_discriminator_is_that_of_sklearn_and_prototypes_are_means():
    m, sets = model(), data(n=200)
    W = discriminator(m, sets, 0.02)
    F = torch.cat([m.features(x) for x, _ in sets]).detach()
    k = np.repeat(np.arange(3), 200)
    peer = LogisticRegression(C=1 / (0.02 * 600), tol=1e-12, max_iter=5000).fit(F, k)
    # ours stops at 1e-12 of the cost; the module keeps float64 here
    np.testing.assert_allclose(W[:, :-1], peer.coef_, atol=1e-4)
    x = sets[1][0][:5]
    want = peer.predict_proba(m.features(x).detach())
    np.testing.assert_allclose(m.weights(x, "discriminator", 1).detach()[:3].T, want, atol=1e-4)
    loaders = [DataLoader(TensorDataset(*s), 64) for s in sets]
    torch.testing.assert_close(prototypes(m, loaders)[2], m.features(sets[2][0]).mean(0))


def test_heads_are_those_of_sklearn():
    m, sets = model(), data(n=100)
    before = params(m.encoder)
    fit_heads(m, sets, 0.05)
    assert equal(params(m.encoder), before)
    for k, (x, y) in enumerate([*sets, tuple(torch.cat(v) for v in zip(*sets))]):
        f = m.features(x).detach()
        peer = LogisticRegression(C=1 / (0.05 * len(y)), tol=1e-12, max_iter=5000).fit(f, y)
        np.testing.assert_allclose(m.heads[k].weight.detach(), peer.coef_, atol=1e-4)


def test_temperatures_are_recovered_and_change_no_hard_answer_of_one_head():
    m = model(C=3)
    sets = []
    for k in range(3):  # labels drawn from head k at temperature 1; then the head is sharpened
        x = rand(8000, 4, seed=20 + k)
        told = torch.multinomial((3 * m.logits(x)[k]).softmax(-1), 1, generator=gen(k))[:, 0]
        sets.append((x, told))
    x = sets[0][0][:50]
    plain = m(x, "joint").argmax(-1)
    with torch.no_grad():
        for h in m.heads[:3]:
            h.weight *= 6
            h.bias *= 6
    T = calibrate(m, sets)
    np.testing.assert_allclose(T[:3], 2, rtol=0.12)  # 8000 labels, a signal of one nat or less
    assert torch.equal(m(x, "joint").argmax(-1), plain)
    beta = 1 / T[0]
    z = m.heads[0](m.features(sets[0][0])).detach()
    costs = [cross_entropy(b * z, sets[0][1]) for b in (0.97 * beta, beta, 1.03 * beta)]
    assert costs[1] < costs[0] and costs[1] < costs[2]


def test_all_of_it_is_in_the_state_dict():
    m = ready()
    calibrate(m, data(seed=8))
    again = model(seed=5)
    again.load_state_dict(m.state_dict())
    x = data(seed=9)[0][0]
    for how in HOW:
        assert torch.equal(again(x, how, 1.5), m(x, how, 1.5))


def test_forward_is_steer_and_needs_no_company():
    m = ready()
    x = data(seed=9)[1][0]
    for one in STEERINGS:
        p = m(x, **one)
        torch.testing.assert_close(p.sum(-1), torch.ones(30).double())
        torch.testing.assert_close(m(x[3:4], **one), p[3:4], atol=1e-9, rtol=0)


def test_choose_takes_the_best_on_the_sources():
    m, held = ready(), data(seed=10)
    x, y = (torch.cat(v) for v in zip(*held))
    best = choose(m, held)
    right = lambda one: (m(x, **one).argmax(-1) == y).double().mean()
    assert right(best) == max(right(one) for one in STEERINGS)
    assert choose(m, held, [dict(how="joint")]) == {"how": "joint"}


# --- the stream


@pytest.mark.parametrize("labels", ["mixture", "own", "joint", "uniform"])
def test_answers_come_first_and_the_source_stays(labels):
    m = ready()
    before, x = params(m), data(seed=11)[0][0]
    o = OnlineDRM(m, 0.1, 0.3, labels=labels, how="prototype")
    assert m.training and not o.model.training  # a copy
    assert torch.equal(o.predict(x), m(x, "prototype"))
    assert not equal(params(o.model.heads), params(m.heads))
    assert equal(params(o.model.encoder), params(m.encoder)) and equal(params(m), before)
    assert not torch.equal(o.predict(x), m(x, "prototype"))
    o.restart()
    assert torch.equal(o.predict(x), m(x, "prototype"))


def test_above_one_nothing_is_learned_and_the_threshold_is_on_the_probability():
    m = ready()
    x = data(seed=11)[0][0]
    o = OnlineDRM(m, 0.1, 1.0000001)
    for _ in range(3):
        o.predict(x)
    assert equal(params(o.model), params(m))
    top = float(m(x).max())
    for beta, moved in ((top + 1e-6, False), (top - 1e-6, True)):
        o = OnlineDRM(m, 0.1, beta)
        o.predict(x)
        assert equal(params(o.model), params(m)) != moved
    assert top > math.e / (math.e + 2) - 0.2  # a second softmax could be at most 0.576 here
    assert float(m(x).softmax(-1).max()) <= math.e / (math.e + 2)


def test_one_step_by_hand():
    m = ready()
    x = data(seed=11)[0][0]
    beta = float(m(x, "uniform").max(-1).values.median())
    o = OnlineDRM(m, 0.05, beta, how="uniform")
    p = o.predict(x)
    keep = p.max(-1).values >= beta
    assert 0 < keep.sum() < len(x)
    hand = copy.deepcopy(m)
    opt = torch.optim.Adam(hand.heads.parameters(), 0.05)
    z = hand.logits(x[keep])
    sum(cross_entropy(a, p[keep].argmax(-1)) for a in z).backward()
    opt.step()
    for a, b in zip(params(hand), params(o.model)):
        torch.testing.assert_close(a, b)
    two = OnlineDRM(m, 0.05, beta, 2, how="uniform")
    two.predict(x)
    assert not equal(params(two.model), params(o.model))


def test_reset_forgets_and_learns_before_it_answers():
    m = ready()
    x = data(seed=11)[0][0]
    o = OnlineDRM(m, 0.1, 0.3, reset=True)
    first = o.predict(x)
    o.predict(-x)
    assert torch.equal(o.predict(x), first) and not torch.equal(first, m(x))
    whole = OnlineDRM(m, 0.1, 0.3, encoder=True)
    whole.predict(x)
    assert not equal(params(whole.model.encoder), params(m.encoder))


# --- the baseline


def test_t3a_against_a_slow_version():
    head, f = nn.Linear(6, 3).double(), rand(50, 6, seed=12)
    W = head.weight.detach()
    for keep in (1, 4, None):
        fast = T3A(head, keep)
        got = torch.cat([fast.predict(part) for part in f.split(7)])
        unsure = lambda q: float(torch.special.entr(q).sum())
        sets = {c: [(unsure((W[c] @ W.T).softmax(-1)), W[c])] for c in range(3)}
        want = []
        for part in f.split(7):
            for v in part:
                q = (v @ W.T).softmax(-1)
                sets[int(q.argmax())].append((unsure(q), v))
            mean = []
            for c in range(3):
                best = sorted(sets[c], key=lambda s: s[0])[:keep]
                mean.append(sum(v / v.norm() for _, v in best))
            want.append(part @ torch.stack([v / v.norm() for v in mean]).T)
        torch.testing.assert_close(got, torch.cat(want))


# --- the bed


@pytest.mark.parametrize("t", [0.0, 0.5, math.pi / 4, 2.0])
def test_the_closed_form_against_draws(t):
    x, y = ring(torch.full((100_000,), t), 1.3, 1.7, gen(13))
    e = torch.stack([QUARTER.cos(), QUARTER.sin()], 1)
    head = (x[:, :2] @ e.T).argmax(1)
    hit = ((x[:, 2:] * e[head]).sum(1) > 0) == (y == 1)
    room = 4 * 0.5 / 100_000**0.5  # four standard errors
    exact = ring_accuracy(t, 1.3, 1.7)
    assert abs(hit.double().mean() - exact["nearest"]) < room
    direct = (x[:, 2] * math.cos(t) + x[:, 3] * math.sin(t) > 0) == (y == 1)
    assert abs(direct.double().mean() - exact["bayes"]) < room


def test_the_bed_comes_near_its_closed_forms():
    a = drm_bed(3, n=1500, test=20_000)
    share = 2 * norm.cdf(2 / 2**0.5) - 1
    # 0.003 from the test, the rest from prototypes that are estimated
    assert a["prototype"] == pytest.approx(0.5 + share * (norm.cdf(2) - 0.5), abs=0.015)
    assert a["oracle"] == pytest.approx(norm.cdf(2), abs=0.008)
    assert a["random head"] == pytest.approx(0.5, abs=0.02)
    assert a["chosen on sources"] > a["joint"] + 0.2
    b = drm_bed(3, target=45.0, n=1500, test=20_000)
    assert b["best single head"] == pytest.approx(norm.cdf(2**0.5), abs=0.015)
    assert b["oracle"] > b["best single head"] + 0.02
    small = drm_bed(5, n=20, test=500)
    assert small == drm_bed(5, n=20, test=500) and set(small) == set(a)


def test_on_a_transformer_encoder_with_loaders():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.up, self.body = nn.Linear(1, 8), nn.TransformerEncoder(layer, 1)

        def forward(self, x):
            return self.body(self.up(x[..., None])).mean(1)

    torch.manual_seed(0)
    sets = [ring(QUARTER[k].repeat(60), generator=gen(k)) for k in (0, 1)]
    loaders = [DataLoader(TensorDataset(x.float(), y), 20) for x, y in sets]

    def rounds():
        while True:
            yield from zip(*loaders)

    m = DRM(Encoder(), 8, 2, 2)
    run = fit(m, lambda m, b: m.loss(b), rounds(), 40, 1e-2, ema=None, progress=False)
    values = [float(v[0]) for v in run.values]
    assert np.mean(values[-5:]) < np.mean(values[:5])
    was = m.training
    prototypes(m, loaders), discriminator(m, loaders)
    assert m.training == was and torch.isfinite(m.prototypes).all()
    m.eval()
    assert OnlineDRM(m, 1e-3, how="prototype").predict(sets[0][0][:1].float()).shape == (1, 2)


# --- modes, loaders, streams that others hold


def noisy(seed=0):  # dropout, and a norm layer that is meant to stay as it is
    torch.manual_seed(seed)
    body = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.BatchNorm1d(5))
    m = DRM(body, 5, 3, 3).double().train()
    body[2].eval()
    return m, body


def test_what_evaluates_is_in_eval_mode_and_leaves_modes_alone():
    (m, body), held = noisy(), data(seed=10)
    prototypes(m, held), discriminator(m, held)
    x, y = held[0]
    found = choose(m, held), adaptivity_gap(m, x, y), calibrate(m, held).clone()
    assert m.training and body[1].training and not body[2].training
    with pytest.raises(RuntimeError):
        prototypes(m, [(x[:, :1], y)] * 3)
    assert m.training and body[1].training and not body[2].training
    m.temperature.fill_(1.0)
    m.eval()
    assert choose(m, held) == found[0] and torch.equal(calibrate(m, held), found[2])
    m.temperature.fill_(1.0)
    again = adaptivity_gap(m, x, y)
    assert again[:5] == found[1][:5] and torch.equal(again.weights, found[1].weights)


def test_choose_takes_loaders():
    m, held = ready(), data(seed=10)
    loaders = [DataLoader(TensorDataset(*s), 7) for s in held]
    assert choose(m, loaders) == choose(m, held)


def test_labels_are_not_asked_where_they_are_not_used():
    m, sets = model(), data()
    want = prototypes(m, sets).clone(), discriminator(m, sets).clone()
    none = [(x, torch.full((len(x),), -1.0)) for x, _ in sets]
    assert torch.equal(prototypes(m, none), want[0])
    assert torch.equal(discriminator(m, none), want[1])


def test_a_temperature_at_its_bound_is_told():
    m = model(C=3)
    for h in m.heads[1:]:
        h.load_state_dict(m.heads[0].state_dict())
    draw = lambda x: torch.multinomial((3 * m.logits(x)[0]).softmax(-1), 1, generator=gen())[:, 0]
    sets = [(x, draw(x)) for x in rand(3, 400, 4, seed=20)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibrate(m, sets)
    sets[1] = (sets[1][0], m.logits(sets[1][0])[1].argmax(-1))  # always right
    with pytest.warns(UserWarning, match=r"heads at a bound of the temperatures \(1: 0.05\)"):
        calibrate(m, sets)


@pytest.mark.parametrize("reset", [True, False])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_stream_learns_where_its_caller_does_not(mode, reset):
    parts = data(seed=11)[0][0].split(10)
    how = dict(lr=0.1, beta=0.3, reset=reset, encoder=True)
    a = OnlineDRM(ready(), **how)
    want = [a.predict(x) for x in parts]
    with mode():
        b = OnlineDRM(ready(), **how)
        got = [b.predict(x.clone()) for x in parts]
    assert equal(got, want) and equal(params(a.model), params(b.model))
    assert not equal(params(a.model), params(a.source))


def test_a_stream_goes_on_from_its_state():
    first, second = data(seed=11)[0][0].split(15)
    a, b = (OnlineDRM(ready(), 0.1, 0.3) for _ in range(2))
    a.predict(first)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for x in (second, first):
        assert torch.equal(a.predict(x), b.predict(x))
    b.restart()
    assert equal(params(b.model), params(b.source))


# --- errors


LOADER = DataLoader(TensorDataset(*data()[0]), 7)


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: steer(P, "entropi"), "how='entropi'.*did you mean 'entropy'"),
        (lambda: steer(P, gamma="2"), "gamma='2'"),
        (lambda: steer(P, gamma=-1.0), "gamma=-1.0"),
        (lambda: steer(P, gamma=math.nan), "gamma=nan"),
        (lambda: steer(P, gamma=[1]), r"gamma=\[1\]"),
        (lambda: steer(P, gamma=True), "gamma=True"),
        (lambda: steer(P, per="all"), "per='all'"),
        (lambda: steer(P, metric="l1"), "metric='l1'"),
        (lambda: steer(P, "prototype"), "prototypes are absent"),
        (lambda: steer(P, "discriminator"), "domain is absent"),
        (lambda: steer(P, "prototype", include_joint=True, **GIVEN), "include_joint=True"),
        (lambda: steer(P, "joint", include_joint=False), "include_joint=False"),
        (lambda: steer(P, include_joint="no"), "include_joint='no'"),
        (lambda: steer(P + 0.1), "sum to 1"),
        (lambda: steer(P * math.nan), "sum to 1"),
        (lambda: steer(P[0]), "shape"),
        (lambda: steer(P, temperature=2), "temperature"),
        (lambda: model()(data()[0][0], "prototype"), "prototypes are absent"),
        (lambda: model()(data()[0][0], "discriminator"), "domain is absent"),
        (lambda: model()(data()[0][0], "disc"), "how='disc'"),
        (lambda: model()(data()[0][0], gama=1), "gama"),
        (lambda: DRM(nn.Identity(), 4, 1, 3), "classes=1"),
        (lambda: DRM(nn.Identity(), 4, 2, 0), "domains=0"),
        (lambda: DRM(nn.Identity(), 4.0, 2, 3), "features_dim=4.0"),
        (lambda: DRM(lambda x: x, 4, 2, 3), "encoder="),
        (lambda: DRM(nn.Identity(), 5, 2, 3).logits(torch.zeros(2, 4)), "features_dim=5"),
        (lambda: model().loss(data()[:2]), "holds 2 pairs"),
        (lambda: model().loss([*data()[:2], (torch.zeros(0, 4), torch.zeros(0))]), r"batches\[2\]"),
        (lambda: model(C=2).loss(data()), "labels from 0 to 2"),
        (lambda: domain_batches([(rand(2, 4), torch.tensor([0, 1])), data()[0]]), r"\[2\]"),
        (lambda: domain_batches(data(), 0), "size=0"),
        (lambda: domain_batches([LOADER] * 3), r"sets\[0\] is a DataLoader: must be \(x, y\)"),
        (lambda: model().loss([(x, y.int()) for x, y in data()]), "int32.*must be an int64"),
        (lambda: model().loss([(x, y[:, None]) for x, y in data()]), r"\(30, 1\).*int64 tensor"),
        (lambda: model().loss([(x, y.tolist()) for x, y in data()]), "labels of list"),
        (lambda: fit_heads(model(), [(x, y.double()) for x, y in data()]), r"sets\[0\].*float64"),
        (lambda: calibrate(model(), [(x, y - 1) for x, y in data()]), "labels from -1 to 1"),
        (lambda: choose(model(), [(x, y + 1) for x, y in data()]), "labels from 1 to 3"),
        (lambda: choose(model(), data()[:2]), "sets holds 2"),
        (lambda: adaptivity_gap(model(), data()[0][0], data()[0][1] - 1), "y has labels from -1"),
        (lambda: model()(math.nan * data()[0][0]), "x gave nan"),
        (lambda: prototypes(model(), [(x / 0, y) for x, y in data()]), r"sets\[0\]: x gave"),
        (lambda: prototypes(model(), data()[:2]), "sets holds 2"),
        (lambda: discriminator(model(), data(), -1), "penalty=-1"),
        (lambda: fit_heads(DRM(nn.Identity(), 4, 3, 3, nn.Bilinear), data()), "argument"),
        (lambda: best_mixture(torch.zeros(3)), "shape"),
        (lambda: best_mixture(P[..., 0], 0), "rounds=0"),
        (lambda: T3A(nn.Identity()), "Identity"),
        (lambda: T3A(nn.Linear(2, 2), 0), "keep=0"),
        (lambda: OnlineDRM(nn.Identity(), 0.1), "model=Identity"),
        (lambda: OnlineDRM(model(), "0.1"), "lr='0.1'"),
        (lambda: OnlineDRM(model(), 0.1, math.nan), "beta=nan"),
        (lambda: OnlineDRM(model(), 0.1, steps=1.5), "steps=1.5"),
        (lambda: OnlineDRM(model(), 0.1, reset="yes"), "reset='yes'"),
        (lambda: OnlineDRM(model(), 0.1, labels="drm"), "labels='drm'"),
        (lambda: OnlineDRM(model(), 0.1, how="entropi"), "how='entropi'"),
        (lambda: OnlineDRM(model(), 0.1, tau=1), "tau"),
        (lambda: drm_bed(0, n=3), "n=3"),
        (lambda: drm_bed(0, target=math.inf), "target=inf"),
        (lambda: ring_accuracy("0"), "angle='0'"),
    ],
)
def test_bad_input(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_heads_that_are_not_linear_are_not_fitted():
    head = lambda d, c: nn.Sequential(nn.Linear(d, c))
    with pytest.raises(TypeError, match="nn.Linear"):
        fit_heads(DRM(nn.Identity(), 4, 3, 3, head).double(), data())
