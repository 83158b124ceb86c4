"""MaM: exact tables against brute force, the product rule as an identity, samples and Gibbs steps
by frequency, the losses against expectations over all states and orders, training, members, and
every error."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chisquare
from torch import nn
from torch.testing import assert_close

from diffkit.core.nets import Stacked
from diffkit.core.training import fit
from diffkit.models.mam import (
    AnyOrder,
    InducedConditional,
    Ising,
    MaM,
    MarginalTable,
    PersistentSampler,
    SubsetMLP,
    exact_mam,
    fit_conditional,
    fit_energy,
    fit_marginal,
    marginal_table,
)

F64 = torch.float64


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def law(dim=4, classes=3, seed=0):  # random log-probabilities of all states
    return torch.randn(classes**dim, generator=rng(seed), dtype=F64).log_softmax(0)


def rows(dim, values):  # all rows of these values, the last variable fastest
    return torch.cartesian_prod(*[torch.tensor(values)] * dim).reshape(-1, dim)


def net(dim=4, classes=3, members=1, seed=0, trained=True, **k):
    torch.manual_seed(seed)
    nets = [SubsetMLP(dim, classes, s, 16, 2, members) for s in (False, True)]
    if trained:  # the last layers begin at zero
        for n in nets:
            n.weights[-1].data.normal_()
    return MaM(*nets, dim=dim, classes=classes, members=members, **k)


def index(x, classes):
    return ((x - 1) * classes ** torch.arange(x.shape[1] - 1, -1, -1)).sum(1)


def fits(x, p, classes):  # p-value of the frequencies
    count = torch.bincount(index(x, classes), minlength=len(p))
    return chisquare(count.numpy(), (p / p.sum() * len(x)).numpy()).pvalue


# --- the lattice


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("periodic", [True, False])
def test_log_z_and_bonds(n, periodic):
    lattice = Ising(n, 0.23, -0.4, periodic)
    x = rows(n * n, [1, 2])
    A = torch.zeros(n * n, n * n, dtype=F64)  # adjacency, with double bonds where there are
    for r, c in itertools.product(range(n), repeat=2):
        for r2, c2 in ((r, c + 1), (r + 1, c)):
            if periodic or (r2 < n and c2 < n):
                i, j = r * n + c, r2 % n * n + c2 % n
                A[i, j] += 1
                A[j, i] += 1
    s = 2.0 * x.double() - 3
    want = 0.23 * torch.einsum("bi,ij,bj->b", s, A, s) - 0.4 * s.sum(1)
    assert_close(lattice.log_f(x), want)
    assert abs(lattice.log_z() - want.logsumexp(0).item()) < 1e-9
    states, log_p = lattice.enumerate()
    assert states.equal(x)
    assert_close(log_p, want - want.logsumexp(0))


def test_lattice_of_the_paper():
    lattice = Ising(3)  # coupling 0.1, bias 0.2
    states, log_p = lattice.enumerate()
    assert abs(lattice.log_z() - 7.115373) < 1e-6
    assert abs(-(log_p.exp() * log_p).sum().item() - 4.875039) < 1e-6
    # an independent lattice without coupling is a product
    assert abs(Ising(10, 0.0, 0.2).log_z() - 100 * math.log(2 * math.cosh(0.2))) < 1e-9
    # Onsager's free energy of the square lattice: bonds of strength 2c, side 11 is near enough
    k = 2 * 0.1
    u = (torch.arange(4000, dtype=F64) + 0.5) * math.pi / 4000
    kappa = 2 * math.sinh(2 * k) / math.cosh(2 * k) ** 2
    part = torch.log((1 + torch.sqrt(1 - (kappa * u.sin()) ** 2)) / 2).mean() / 2
    onsager = math.log(2 * math.cosh(2 * k)) + part.item()
    assert abs(Ising(11, 0.1, 0.0).log_z() / 121 - onsager) < 1e-6
    # the paper's Table 4, -77.77 and -78.63, is above minus log Z
    assert 78.63 < Ising(10).log_z() < 78.63 + 0.1


# --- exact tables


@pytest.mark.parametrize("dim, classes", [(1, 2), (4, 3), (6, 2), (3, 5)])
def test_all_marginals_by_brute_force(dim, classes):
    log_p = law(dim, classes)
    states, every = rows(dim, range(1, classes + 1)), rows(dim, range(classes + 1))
    got = MarginalTable(marginal_table(log_p, dim, classes))(every)
    agree = ((every[:, None] == states) | (every[:, None] == 0)).all(2)
    want = torch.where(agree, log_p, -math.inf).logsumexp(1)
    assert_close(got, want, atol=1e-12, rtol=0)
    model = exact_mam(log_p, dim, classes)
    assert_close(model.log_prob(every), want, atol=1e-12, rtol=0)
    assert_close(model.chain_log_prob(every, generator=rng(1)), want, atol=1e-12, rtol=0)
    assert_close(model.chain_log_prob(every, orders=3, generator=rng(1)), want)
    cond = model.conditional(every)
    assert_close(cond.exp().sum(2), torch.ones(cond.shape[:2], dtype=F64))
    for i in range(dim):  # where i is unknown: a ratio of marginals
        free = every[:, i] == 0
        for k in range(classes):
            row = every[free].clone()
            row[:, i] = k + 1
            assert_close(cond[free, i, k], model.log_prob(row) - want[free])


def test_exact_tables_have_no_loss_for_any_order_and_place():
    log_p = law()
    model, x = exact_mam(log_p, 4, 3), rows(4, [1, 2, 3])
    for order in itertools.permutations(range(4)):
        order = torch.tensor(order)
        for d in range(1, 5):
            assert model.consistency(x, order, torch.tensor(d)).max() < 1e-24
        assert_close(model.chain_log_prob(x, order), log_p)
    # what is wrong in one place only is seen where that place is used
    table = marginal_table(log_p, 4, 3).clone()
    table[1, 2, 0, 0] += 0.5
    off = MaM(model.conditional_net, MarginalTable(table), dim=4, classes=3, anchor=0.0)
    x = torch.tensor([[1, 2, 1, 1], [2, 2, 1, 1]])
    order = torch.arange(4)
    got = torch.stack([off.consistency(x, order, torch.tensor(d)) for d in range(1, 5)])
    assert_close(got[:, 0], torch.tensor([0, 0.25, 0.25, 0], dtype=F64))
    assert got[:, 1].max() < 1e-24
    other = torch.tensor([0, 2, 1, 3])
    assert max(off.consistency(x, other, torch.tensor(d)).max() for d in range(1, 5)) < 1e-24


def test_first_variables_of_the_order_come_first():
    model = net()
    x = torch.tensor([[1, 2, 3, 1]])
    order = torch.tensor([2, 0, 3, 1])
    seen, total = torch.zeros(1, 4).long(), 0.0
    for i in order.tolist():
        total += model.conditional(seen)[0, i, x[0, i] - 1]
        seen[0, i] = x[0, i]
    assert_close(model.chain_log_prob(x, order)[0], total)
    # a part: the same order without the unknown ones
    part = torch.tensor([[0, 2, 3, 0]])
    two = model.conditional(torch.zeros(1, 4).long())[0, 2, 2]
    two = two + model.conditional(torch.tensor([[0, 0, 3, 0]]))[0, 1, 1]
    assert_close(model.chain_log_prob(part, order)[0], two)
    assert model.chain_log_prob(torch.zeros(2, 4).long()).tolist() == [0.0, 0.0]
    # averaging orders is an average of probabilities
    g, h = rng(3), rng(3)
    some = torch.stack([model.chain_log_prob(x, generator=g) for _ in range(4)])
    want = some.exp().mean(0).log()
    assert_close(model.chain_log_prob(x, orders=4, generator=h), want)


# --- samples

N = 30000


@pytest.mark.parametrize("order", [None, [3, 1, 0, 2]])
def test_samples_have_the_law(order):
    log_p = law()
    model = exact_mam(log_p, 4, 3)
    order = None if order is None else torch.tensor(order)
    assert fits(model.sample(N, order, generator=rng(1)), log_p.exp(), 3) > 1e-4
    assert fits(model.sample(N, order, generator=rng(1)), log_p.flip(0).exp(), 3) < 1e-9


def test_samples_of_a_network_have_the_law_of_its_chain():
    model, x = net(), rows(4, [1, 2, 3])
    order = torch.tensor([2, 0, 3, 1])
    with torch.no_grad():
        p = model.chain_log_prob(x, order).double().exp()
        q = model.chain_log_prob(x, order.flip(0)).double().exp()
    assert_close(p.sum(), torch.ones((), dtype=F64), atol=1e-5, rtol=0)
    y = model.sample(N, order, generator=rng(2))
    assert fits(y, p, 3) > 1e-4 and fits(y, q, 3) < 1e-9
    # an order for each sample
    both = torch.cat([order.expand(N, 4), order.flip(0).expand(N, 4)])
    y = model.sample(2 * N, both, generator=rng(3))
    assert fits(y[:N], p, 3) > 1e-4 and fits(y[N:], q, 3) > 1e-4


def test_conditional_samples():
    log_p = law()
    model, x = exact_mam(log_p, 4, 3), rows(4, [1, 2, 3])
    given = torch.tensor([[0, 3, 0, 1]])
    y = model.sample(N, given=given, generator=rng(1))
    agree = ((x == given) | (given == 0)).all(1)
    assert (y[:, 1] == 3).all() and (y[:, 3] == 1).all()
    count = torch.bincount(index(y, 3), minlength=81)[agree]
    want = log_p[agree].softmax(0) * N
    assert chisquare(count.numpy(), want.numpy()).pvalue > 1e-4
    # rows with different numbers of known values, nothing to draw, and nothing known
    some = torch.tensor([[0, 0, 0, 0], [1, 2, 3, 1], [0, 2, 0, 0]])
    y = model.sample(3, given=some, generator=rng(2))
    assert (y > 0).all() and y[1].equal(some[1]) and y[2, 1] == 2
    assert some[0].sum() == 0  # what is given stays as it was


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_gibbs_leaves_the_law(steps):
    log_p = law()
    model, x = exact_mam(log_p, 4, 3), rows(4, [1, 2, 3])
    start = x[torch.multinomial(log_p.exp(), N, True, generator=rng(1))]
    y = model.gibbs(start, steps, rng(2))
    assert fits(y, log_p.exp(), 3) > 1e-4
    assert (y != start).sum(1).max() <= steps
    far = model.gibbs(torch.ones(N, 4).long(), steps, rng(3))
    assert (fits(far, log_p.exp(), 3) > 1e-4) == (steps == 4)
    changed = (far != 1).float().mean(0)
    assert (changed > 0).all()  # every variable can be forgotten


# --- losses


def test_any_order_loss_is_the_mean_of_the_chain():
    model = net()
    x = torch.tensor([[1, 2, 3, 1]])
    with torch.no_grad():
        orders = [torch.tensor(o) for o in itertools.permutations(range(4))]
        want = -torch.stack([model.chain_log_prob(x, o)[0] for o in orders]).mean().item()
        values = [model.loss_conditional(x.expand(2000, 4), rng(s)).item() for s in range(60)]
    values = torch.tensor(values)
    # four and a half standard errors
    assert abs(values.mean().item() - want) < 4.5 * values.std().item() / 60**0.5
    assert values.std() / 60**0.5 < 0.01 * abs(want)


def test_consistency_is_uniform_over_orders_and_places():
    model, x = net(), torch.tensor([[1, 2, 3, 1]])
    with torch.no_grad():
        want = torch.stack(
            [
                model.consistency(x, torch.tensor(o), torch.tensor(d))[0]
                for o in itertools.permutations(range(4))
                for d in range(1, 5)
            ]
        )
        got = model.consistency(x.expand(40000, 4), generator=rng(1))
    assert abs(got.mean() - want.mean()) < 4.5 * want.std() / 40000**0.5
    # d = D compares with the complete row
    d, order = torch.tensor(4), torch.arange(4)
    before = torch.tensor([[1, 2, 3, 0]])
    m = model.marginal_net
    by_hand = m(before) + model.conditional(before)[:, 3, 0] - m(x)
    assert_close(model.consistency(x, order, d), by_hand.square())
    d = torch.tensor(1)
    empty = torch.zeros(1, 4).long()
    by_hand = m(empty) + model.conditional(empty)[:, 0, 0] - m(torch.tensor([[1, 0, 0, 0]]))
    assert_close(model.consistency(x, order, d), by_hand.square())


@pytest.mark.parametrize("anchor", [None, 1.5])
@pytest.mark.parametrize("n", [1, 7])
def test_loss_of_the_marginals_is_a_mean_over_rows_times_the_variables(n, anchor):
    model = net(anchor=anchor)
    x = rows(4, [1, 2, 3])[:: 81 // n][:n]
    gap = model.consistency(x, generator=rng(1))
    empty = model.log_prob(torch.zeros(1, 4, dtype=torch.long), normalise=False)
    off = empty - (4 * math.log(3) if anchor is None else anchor)
    want = 4 * gap.sum() / n + off.square().sum()
    assert_close(model.loss_marginal(x, rng(1)), want)


def test_a_constant_changes_the_anchor_only():
    model, x = net(anchor=0.0), rows(4, [1, 2, 3])
    before = [model.log_prob(x), model.consistency(x, generator=rng(1))]
    m0 = model.marginal_net(torch.zeros(1, 4).long())[0].item()
    loss = model.loss_marginal(x, rng(2)).item()
    model.marginal_net.biases[-1].data += 1.5
    after = [model.log_prob(x), model.consistency(x, generator=rng(1))]
    assert_close(before, after, atol=2e-5, rtol=1e-4)
    change = model.loss_marginal(x, rng(2)).item() - loss
    assert abs(change - ((m0 + 1.5) ** 2 - m0**2)) < 1e-3
    # without the anchor the gradient along the constant is zero
    f = lambda x: (x == 2).sum(1).float()
    for norm, small in ((0.0, True), (1.0, False)):
        model.zero_grad()
        model.loss_energy(f, x, norm=norm, generator=rng(3)).backward()
        assert (abs(model.marginal_net.biases[-1].grad.item()) < 1e-4) == small
    assert model.log_prob(x, normalise=False).mean() - model.log_prob(x).mean() > 0.5


@pytest.mark.parametrize("members", [1, 2])
def test_energy_gradient_is_that_of_the_divergence(members):
    # laws of eighths: rows in proportion to p are the expectation, without chance
    counts = [torch.tensor([4, 2, 1, 1]), torch.tensor([1, 1, 5, 1])][:members]
    free = torch.stack([(c / 8.0).double().log() for c in counts]).requires_grad_()
    log_f = torch.tensor([0.3, -1.0, 0.5, 2.0], dtype=F64)
    x = rows(2, [1, 2])
    tables = lambda: [marginal_table(f.log_softmax(0), 2, 2) for f in free]

    class Soft(nn.Module):
        def forward(self, x):
            parts = x.unflatten(0, (members, -1))
            return torch.cat([MarginalTable(t)(p) for t, p in zip(tables(), parts)])

    model = MaM(InducedConditional(Soft(), 2), Soft(), dim=2, classes=2, members=members)
    model.anchor = 0.0
    batch = torch.cat([x.repeat_interleave(c, 0) for c in counts])
    target = lambda x: log_f[index(x, 2)]
    # the conditionals are those of the marginals, so the product rule costs nothing
    loss = model.loss_energy(target, batch, alpha=1.0)
    (got,) = torch.autograd.grad(loss, free)
    q = free.log_softmax(1)
    (want,) = torch.autograd.grad((q.exp() * (q - log_f)).sum(), free)
    for a, b, qm in zip(got, want, q.detach()):
        w = qm - log_f
        std = (qm.exp() * (w - (qm.exp() * w).sum()).square()).sum().sqrt()
        assert F.cosine_similarity(a, b, 0) > 1 - 1e-9
        assert_close(a * members * (std + 1e-3), b, rtol=1e-6, atol=1e-9)


def test_energy_of_a_perfect_model_pulls_nowhere():
    lattice = Ising(2)
    states, log_p = lattice.enumerate()
    model = exact_mam(log_p, 4, 2)
    model.marginal_net.flat.requires_grad_()
    loss = model.loss_energy(lattice.log_f, states)
    (g,) = torch.autograd.grad(loss, model.marginal_net.flat)
    assert g.abs().max() < 1e-9


def test_who_gets_a_gradient():
    x = rows(4, [1, 2, 3])
    f = lambda x: x.sum(1).float()
    for name, use, both in (
        ("conditional", lambda m: m.loss_conditional(x), False),
        ("marginal", lambda m: m.loss_marginal(x), False),
        ("energy", lambda m: m.loss_energy(f, x), True),
    ):
        model = net()
        use(model).backward()
        moved = {
            k: any(p.grad is not None for p in n.parameters())
            for k, n in (("conditional", model.conditional_net), ("marginal", model.marginal_net))
        }
        want = {"conditional": both or name == "conditional", "marginal": name != "conditional"}
        assert moved == want, name
    # alpha = 0 leaves only the first term, and no gradient for the conditionals
    model = net()
    model.loss_energy(f, x, alpha=0.0).backward()
    assert all(
        (p.grad is None) or p.grad.abs().max() == 0 for p in model.conditional_net.parameters()
    )


def test_relabelled_values():
    log_p = law(3, 3)
    swap = torch.tensor([2, 0, 1])
    table = log_p.view(3, 3, 3)[swap][:, swap][:, :, swap].reshape(-1)
    a, b = exact_mam(log_p, 3, 3), exact_mam(table, 3, 3)
    x = rows(3, [0, 1, 2, 3])
    there = torch.cat([torch.zeros(1).long(), swap + 1])[x]
    assert_close(b.log_prob(x), a.log_prob(there))
    assert_close(b.conditional(x), a.conditional(there)[:, :, swap])


# --- networks and members


def test_a_fresh_network_is_uniform_and_consistent():
    model, every = net(trained=False), rows(4, range(4))
    known = (every > 0).sum(1)
    assert_close(model.log_prob(every), -known * math.log(3), atol=1e-6, rtol=0)
    assert_close(model.conditional(every).exp(), torch.full((256, 4, 3), 1 / 3))
    assert model.consistency(rows(4, [1, 2, 3])).max() < 1e-10
    assert model.loss_marginal(rows(4, [1, 2, 3])) < 1e-9


def test_members_are_separate_networks():
    model, x = net(members=2), rows(4, [1, 2, 3])
    singles = []
    for i in range(2):
        one = net(members=1)
        for a, b in zip(one.parameters(), model.parameters()):
            a.data = b.data[i : i + 1].clone()
        singles.append(one)
    both = x.repeat(2, 1)
    order = torch.tensor([2, 0, 3, 1])
    for use in (lambda m, x: m.log_prob(x), lambda m, x: m.chain_log_prob(x, order)):
        assert_close(use(model, both), torch.cat([use(m, x) for m in singles]))
    # the empty set of each member
    f = lambda x: (x == 2).sum(1).float()
    loss = lambda m, x: m.loss_energy(f, x, alpha=0.0)
    loss(model, both).backward()
    for i, one in enumerate(singles):
        loss(one, x).backward()
        for a, b in zip(one.marginal_net.parameters(), model.marginal_net.parameters()):
            assert_close(b.grad[i : i + 1] * 2, a.grad, atol=1e-6, rtol=1e-4)
    # the anchor of one member only
    model.zero_grad()
    model.loss_energy(f, both, norm=torch.tensor([1.0, 0.0])).backward()
    bias = model.marginal_net.biases[-1].grad.flatten()
    assert abs(bias[0]) > 1e-2 and abs(bias[1]) < 1e-4


def test_the_cores_stacked_networks_are_members():
    torch.manual_seed(1)
    nets = [[SubsetMLP(4, 3, s, 8) for _ in range(2)] for s in (False, True)]
    model = MaM(*(Stacked(n) for n in nets), dim=4, classes=3, members=2)
    run = fit_energy(model, lambda x: x.sum(1).float(), 3, chains=8, progress=False)
    assert run.model is model and len(run.losses) == 3


# --- sampler and training


def calls(model, work):
    seen = []
    hooks = [
        n.register_forward_pre_hook(lambda n, a, k=k: seen.append((k, len(a[0]))))
        for k, n in (("c", model.conditional_net), ("m", model.marginal_net))
    ]
    work()
    for h in hooks:
        h.remove()
    return seen


@pytest.mark.parametrize("dim", [4, 9])
def test_passes_are_as_said(dim):
    model = net(dim=dim, trained=False)
    x = model.sample(6)
    sampler = PersistentSampler(model, 6, steps=3, restart_every=2)
    assert calls(model, sampler.next) == [("c", 6)] * dim
    assert calls(model, sampler.next) == [("c", 6)] * 3
    assert calls(model, sampler.next) == [("c", 6)] * dim
    f = lambda x: x.sum(1).float()
    step = calls(model, lambda: model.loss_energy(f, x))
    assert sorted(step) == [("c", 6), ("m", 1), ("m", 6), ("m", 6), ("m", 6)]
    assert calls(model, lambda: model.log_prob(x)) == [("m", 6), ("m", 1)]
    assert calls(model, lambda: model.log_prob(x, normalise=False)) == [("m", 6)]
    assert calls(model, lambda: model.chain_log_prob(x)) == [("c", 6)] * dim
    x[:, 1:] = 0
    assert calls(model, lambda: model.chain_log_prob(x)) == [("c", 6)]
    assert len(calls(model, lambda: model.sample(6, given=x))) == dim - 1


def test_sampler_moves_its_chains():
    sampler = PersistentSampler(net(), 50, steps=1)
    a = sampler.next(rng(1)).clone()
    b = sampler.next(rng(2))
    assert (a != b).sum(1).max() == 1 and (a > 0).all()


def test_training_finds_the_law():
    log_p = law(3, 2, seed=4)
    truth, every = exact_mam(log_p, 3, 2), rows(3, [0, 1, 2])
    f = lambda x: log_p[index(x, 2)] + 7.0  # a constant does not matter
    adam = lambda p: torch.optim.Adam(p, 1e-2)
    how = dict(optimizer=adam, schedule="cosine", progress=False)
    model = net(3, 2, trained=False)
    model = fit_energy(model, f, 500, chains=128, gibbs=3, alpha=1.0, **how).ema
    off = lambda m: (m.log_prob(every) - truth.log_prob(every)).abs().mean()
    assert off(net(3, 2, trained=False)) > 0.2
    assert off(model) < 0.08  # the rarest state errs most
    data = truth.sample(20000, generator=rng(5))
    model = net(3, 2, trained=False, seed=1)
    model = fit_conditional(model, data, 300, **how).ema.requires_grad_()
    fixed = [p.clone() for p in model.conditional_net.parameters()]
    model = fit_marginal(model, data, 400, gibbs=3, **how).ema
    assert off(model) < 0.08
    assert all(a.equal(b) for a, b in zip(fixed, model.conditional_net.parameters()))


def test_training_resumes_with_its_chains(tmp_path):
    f = lambda x: x.sum(1).float()
    path = tmp_path / "run.safetensors"
    how = dict(chains=10, restart_every=4, progress=False)
    whole = fit_energy(net(), f, 9, **how).model
    fit_energy(net(), f, 5, checkpoint=path, **how)
    again = fit_energy(net(), f, 9, checkpoint=path, **how).model
    assert all(a.equal(b) for a, b in zip(whole.parameters(), again.parameters()))


def test_any_order_model_alone():
    torch.manual_seed(0)
    model = AnyOrder(SubsetMLP(4, 3), dim=4, classes=3)
    data = rows(4, [1, 2, 3])
    run = fit_conditional(model, data, 3, batch_size=16, progress=False)
    assert len(run.losses) == 3
    with pytest.raises(TypeError, match="model must be a MaM"):
        fit_energy(model, lambda x: x.sum(1), 1)
    with pytest.raises(TypeError, match="model must be a AnyOrder"):
        fit_conditional(nn.Linear(1, 1), data, 1)


def test_double_precision_and_generators():
    model, x = net().double(), rows(4, [1, 2, 3])
    assert model.log_prob(x).dtype == F64 and model.chain_log_prob(x).dtype == F64
    for use in (
        lambda g: model.sample(9, generator=g),
        lambda g: model.gibbs(x, 2, g),
        lambda g: model.consistency(x, generator=g),
        lambda g: model.chain_log_prob(x, generator=g),
        lambda g: model.loss_conditional(x, g),
        lambda g: model.loss_energy(lambda x: x.sum(1), x, generator=g),
    ):
        torch.manual_seed(1)
        a = use(rng(5))
        torch.manual_seed(2)
        assert a.equal(use(rng(5)))


# --- wrong input

X = torch.ones(4, 4).long()


class Wrong(nn.Module):
    def forward(self, x):
        return torch.zeros(len(x), 2)


def exact4():
    return exact_mam(law(), 4, 3)


@pytest.mark.parametrize(
    "work, kind, said",
    [
        (lambda: exact4().log_prob(X.float()), TypeError, "float32"),
        (lambda: exact4().log_prob([[1, 2]]), TypeError, "list"),
        (lambda: exact4().log_prob(X[:, :3]), ValueError, r"\(B, 4\), got \(4, 3\)"),
        (lambda: exact4().log_prob(4 * X), ValueError, "0 to 3 .* got values from 4 to 4"),
        (lambda: exact4().log_prob(-X), ValueError, "from -1 to -1"),
        (lambda: exact4().gibbs(0 * X), ValueError, "complete: no 0"),
        (lambda: exact4().gibbs(X, 5), ValueError, "steps=5: must be an integer from 1 to 4"),
        (lambda: exact4().gibbs(X, 0), ValueError, "=0: must"),
        (lambda: exact4().sample(0), ValueError, "n="),
        (lambda: exact4().sample(3, given=X), ValueError, "1 or n=3 rows, got 4"),
        (lambda: exact4().sample(3, order=torch.arange(3)), ValueError, "permutations"),
        (lambda: exact4().chain_log_prob(X, torch.zeros(4).long()), ValueError, "permutations"),
        (lambda: exact4().chain_log_prob(X, torch.arange(4), 2), ValueError, "orders=2"),
        (lambda: exact4().consistency(X, d=torch.tensor(0)), ValueError, "1 to 4"),
        (lambda: exact4().consistency(X, d=torch.tensor(5)), ValueError, "1 to 4"),
        (lambda: exact4().loss_conditional(0 * X), ValueError, "complete"),
        (lambda: exact4().loss_energy(lambda x: x, X), ValueError, r"log_f must return \(4,\)"),
        (lambda: exact4().loss_energy(lambda x: 1.0, X), ValueError, "float"),
        (lambda: exact4().loss_energy(lambda x: x.sum(1), X, alpha=-1.0), ValueError, "alpha"),
        (lambda: MaM(Wrong(), Wrong(), dim=4, classes=3).log_prob(X), ValueError, r"\(4, 2\)"),
        (lambda: AnyOrder(Wrong(), dim=4, classes=3).conditional(X), ValueError, r"\(4, 4, 3\)"),
        (lambda: AnyOrder(lambda x: x, dim=4, classes=3), TypeError, "conditional must be"),
        (lambda: MaM(Wrong(), None, dim=4, classes=3), TypeError, "marginal must be"),
        (lambda: MaM(Wrong(), Wrong(), dim=0, classes=3), ValueError, "dim="),
        (lambda: net(members=3).log_prob(X), ValueError, "4 rows cannot be shared out among 3"),
        (lambda: net(members=3).sample(4), ValueError, "shared out"),
        (lambda: SubsetMLP(4, 3, members=3)(X), ValueError, "4 rows"),
        (lambda: SubsetMLP(4, 3, hidden=0), ValueError, "hidden"),
        (lambda: PersistentSampler(Wrong(), 4), TypeError, "AnyOrder or a MaM"),
        (lambda: PersistentSampler(net(members=2), 5), ValueError, "divide by 2"),
        (lambda: PersistentSampler(net(), 5, steps=5), ValueError, "1 to 4"),
        (lambda: PersistentSampler(net(), 5, restart_every=0), ValueError, "restart_every"),
        (lambda: fit_energy(net(), lambda x: x, 1, chian=3), TypeError, "chian"),
        (lambda: marginal_table(law(), 4, 2), ValueError, r"\(16,\), got \(81,\)"),
        (lambda: marginal_table(law(), 15, 2), ValueError, "dim 14 for 2 classes"),
        (lambda: Ising(0), ValueError, "n="),
        (lambda: Ising(3, math.nan), ValueError, "coupling"),
        (lambda: Ising(5).enumerate(), ValueError, "at most 4"),
        (lambda: Ising(12).log_z(), ValueError, "at most 11"),
        (lambda: Ising(2).log_f(0 * X), ValueError, "0, the unknown"),
        (lambda: Ising(2).log_f(X.float()), TypeError, "float32"),
    ],
)
def test_wrong_input(work, kind, said):
    with pytest.raises(kind, match=said):
        work()


def test_fit_is_the_only_loop():
    x = rows(3, [1, 2])
    run = fit(net(3, 2), lambda m, b: m.loss_conditional(b), x, 2, batch_size=4, progress=False)
    assert run.step == 2
