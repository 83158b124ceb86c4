"""Perturbed-attention guidance against diffusers' processors and pipelines' formula, and
properties of the hooks."""

import copy
import threading
from contextlib import contextmanager

import pytest
import torch
from diffkit.core.data import GaussianMixture, ring
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, cfg, contrast, count_evals
from diffkit.core.nets import DiT, SelfAttention, UNet
from diffkit.core.process import VP, Flow, time_grid
from diffkit.core.sampling import DDIM, Heun, sample
from diffkit.guidance.apg import APG, project
from diffkit.guidance.pag import (
    MODES,
    PAG,
    attention_layers,
    pag,
    perturb_attention,
    register_attention,
)
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

F64 = torch.float64


def randn(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def shake(module, seed=0):  # random weights everywhere, so that layers which start at zero act, too
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=g))
    return module.eval()


def unet(dtype=F64, process=None):
    return NetDenoiser(
        shake(UNet(width=8, levels=(1, 2), heads=2, classes=3)).to(dtype),
        process or VP(),
        "v",
        null={"label": 3},
    )


class Tokens(nn.Module):  # torch's attention, batch second or first
    def __init__(self, first=True, **kwargs):
        super().__init__()
        self.first, self.inp, self.attn, self.out = (
            first,
            nn.Linear(1, 8),
            nn.MultiheadAttention(8, 2, batch_first=first, **kwargs),
            nn.Linear(8, 1),
        )

    def forward(self, x, t, label=None):
        h = self.inp(x[..., None]) + t[:, None, None]
        h = h if self.first else h.transpose(0, 1)
        a = self.attn(h, h, h)[0]
        return self.out(a if self.first else a.transpose(0, 1))[..., 0]


Y = {"label": torch.arange(4) % 3}
X = randn(4, 1, 8, 8)


# --- parity with diffusers

diffusers = pytest.importorskip("diffusers")
ap = pytest.importorskip("diffusers.models.attention_processor")


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(bias=True),
        dict(residual_connection=True, norm_num_groups=4, rescale_output_factor=2.0),
        dict(out_bias=False),
        dict(dropout=0.1),
    ],
)
@pytest.mark.parametrize("image", [False, True])
def test_one_layer_as_in_diffusers(options, image):
    layer = shake(ap.Attention(query_dim=16, heads=2, dim_head=8, **options)).double()
    x = randn(3, 16, 4, 4) if image else randn(3, 7, 16)
    with perturb_attention(layer) as reached:
        mine = layer(x)
    plain = layer(x)
    layer.set_processor(ap.PAGIdentitySelfAttnProcessor2_0())
    good, bad = layer(torch.cat([x, x])).chunk(2)
    assert reached == {""}
    assert_close(mine, bad, rtol=1e-12, atol=1e-12)
    assert_close(plain, good, rtol=1e-12, atol=1e-12)
    assert (mine - plain).abs().max() > 1e-3


def their_unet():
    torch.manual_seed(0)
    return (
        diffusers.UNet2DConditionModel(
            sample_size=8,
            in_channels=2,
            out_channels=2,
            block_out_channels=(16, 32),
            layers_per_block=1,
            cross_attention_dim=12,
            attention_head_dim=4,
            norm_num_groups=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        )
        .double()
        .eval()
    )


@pytest.mark.parametrize(
    "layers", ["mid_block", "attn1", ["mid_block", "up_blocks.0.attentions.1"]]
)
@pytest.mark.parametrize("w", [None, 5.0])
def test_unet_and_the_formula_of_the_pipelines(layers, w):
    net, s = their_unet(), 3.0
    x, text, empty = randn(2, 2, 8, 8), randn(2, 5, 12), randn(2, 5, 12, seed=1)

    class Call(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x, t, prompt):
            return self.net(x, 500, encoder_hidden_states=prompt).sample

    d = NetDenoiser(Call(), VP(), "eps")
    guided = pag(d, s, layers, cfg_scale=w, uncond={"prompt": empty} if w else None)
    with torch.no_grad():
        mine = guided(x, 0.5, prompt=text).eps
        names, old = (
            {n.removeprefix("net.net.") for n in attention_layers(d, layers)},
            net.attn_processors,
        )
        make = ap.PAGCFGIdentitySelfAttnProcessor2_0 if w else ap.PAGIdentitySelfAttnProcessor2_0
        net.set_attn_processor(
            {k: make() if k.removesuffix(".processor") in names else p for k, p in old.items()}
        )
        many = 3 if w else 2
        prompts = torch.cat([empty, text, text] if w else [text, text])
        out = net(x.repeat(many, 1, 1, 1), 500, encoder_hidden_states=prompts).sample.chunk(many)
        theirs = (
            out[0] + w * (out[1] - out[0]) + s * (out[1] - out[2])
            if w
            else out[0] + s * (out[0] - out[1])
        )
    assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert not any("attn2" in n for n in names)


def test_cross_attention_is_no_candidate():
    net = their_unet()
    assert (
        all(n.endswith("attn1") for n in attention_layers(net)) and len(attention_layers(net)) == 4
    )
    with pytest.raises(ValueError, match="attn1"):
        attention_layers(net, "attn2")


# --- one layer against its value path


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 10**6),
    st.booleans(),
)
def test_layers_of_all_sizes(B, N, heads, seed, first):
    h = randn(B, N, 8, seed=seed)
    own, torchs = (
        shake(SelfAttention(8, heads), seed).double(),
        shake(nn.MultiheadAttention(8, heads, batch_first=first), seed).double(),
    )
    turn = (lambda z: z) if first else (lambda z: z.transpose(0, 1))
    for mode, f in MODES.items():
        with perturb_attention(own, mode=mode):
            assert_close(own(h), own.to_out(f(own.to_v(h))), rtol=1e-12, atol=1e-12)
        q = turn(h)
        with perturb_attention(torchs, mode=mode):
            out, weights = torchs(q, q, q)
        v = nn.functional.linear(h, torchs.in_proj_weight[16:], torchs.in_proj_bias[16:])
        assert weights is None
        assert_close(turn(out), torchs.out_proj(f(v)), rtol=1e-12, atol=1e-12)


def test_torch_layer_in_its_other_shapes():
    h = randn(2, 5, 8)
    # separate projections, values of another width
    sep = shake(nn.MultiheadAttention(8, 2, batch_first=True, kdim=8, vdim=6)).double()
    value = randn(2, 5, 6)
    with perturb_attention(sep):
        out = sep(h, h, value)[0]
    assert_close(
        out, sep.out_proj(nn.functional.linear(value, sep.v_proj_weight, sep.in_proj_bias[16:]))
    )
    plain = shake(nn.MultiheadAttention(8, 2, bias=False)).double()
    with perturb_attention(plain):
        out = plain(h[0], h[0], h[0])[0]  # no batch
    assert_close(out, plain.out_proj(nn.functional.linear(h[0], plain.in_proj_weight[16:])))
    causal = torch.ones(5, 5, dtype=torch.bool).triu(1)
    m = shake(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    with perturb_attention(m):
        assert_close(
            m(h, h.clone(), h, attn_mask=causal)[0],
            m.out_proj(nn.functional.linear(h, m.in_proj_weight[16:], m.in_proj_bias[16:])),
        )
    hidden = torch.ones(2, 5, dtype=torch.bool)
    # all tokens masked: the layer itself gives nan, a token that sees itself doesn't
    m = shake(nn.MultiheadAttention(8, 2, batch_first=True)).double()
    with perturb_attention(m):
        assert m(h, h, h, key_padding_mask=hidden)[0].isfinite().all()
    for bad in (
        nn.MultiheadAttention(8, 2, add_bias_kv=True),
        nn.MultiheadAttention(8, 2, add_zero_attn=True),
    ):
        with pytest.raises(ValueError, match="tokens of its own"), perturb_attention(bad):
            bad(h[0].float(), h[0].float(), h[0].float())


class Joint(nn.Module):  # attention over image and text in one sequence
    added_kv_proj_dim = 8

    def __init__(self, image_first=True, image_asks=False):
        super().__init__()
        self.image_first, self.image_asks = image_first, image_asks
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))
        self.text = nn.Linear(8, 24)

    def sequence(self, image, text):  # queries, keys and values (B, heads, N, D)
        ours = [self.to_q(image), self.to_k(image), self.to_v(image)]
        both = [
            torch.cat([a, b] if self.image_first else [b, a], 1)
            for a, b in zip(ours, self.text(text).chunk(3, -1))
        ]
        q, k, v = (z.unflatten(-1, (2, 4)).transpose(1, 2) for z in both)
        if self.image_asks:
            q = self.of_image(q, image)
        return q, k, v

    def of_image(self, z, image):  # its part of a sequence (..., N, D)
        n = image.shape[1]
        return z[..., :n, :] if self.image_first else z[..., -n:, :]

    def out(self, o, image):
        o = o.transpose(1, 2).flatten(2)
        rest = o[:, image.shape[1] :] if self.image_first else o[:, : -image.shape[1]]
        return (self.to_out(o if self.image_asks else self.of_image(o, image)), rest)

    def attend(self, q, k, v, mask):
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def forward(self, hidden_states, text, mask=None):
        q, k, v = self.sequence(hidden_states, text)
        return self.out(self.attend(q, k, v, mask), hidden_states)


@pytest.mark.parametrize("image_first", [True, False], ids=["image first", "text first"])
@pytest.mark.parametrize("image_asks", [False, True], ids=["all ask", "the image asks"])
@pytest.mark.parametrize("given", [None, "bool", "float", "keys"])
def test_joint_attention_by_hand(image_first, image_asks, given):
    "An image token sees itself and the text, as its layer's mask allows; the text sees all."
    m = shake(Joint(image_first, image_asks)).double()
    image, text = randn(2, 5, 8), randn(2, 3, 8, seed=1)
    ours = [i if image_first else i + 3 for i in range(5)]  # where the image stands
    asks = ours if image_asks else list(range(8))
    mask, scores_of = None, torch.zeros(2, 1, len(asks), 8, dtype=F64)
    if given == "bool":  # each sees itself in any case
        mask = (randn(len(asks), 8, seed=2) > 0) | (torch.tensor(asks)[:, None] == torch.arange(8))
    elif given == "keys":  # a text of the second sample is shorter
        mask = torch.ones(2, 1, 1, 8, dtype=torch.bool)
        mask[1, 0, 0, next(i for i in range(8) if i not in ours)] = False
    elif given == "float":
        mask = randn(len(asks), 8, seed=2)
    if given:
        added = mask if given == "float" else torch.where(mask, 0.0, float("-inf")).double()
        scores_of = scores_of + added
    q, k, v = m.sequence(image, text)
    plain = q @ k.transpose(-1, -2) / 2 + scores_of
    assert_close(m(image, text, mask)[0], m.out(plain.softmax(-1) @ v, image)[0])
    cut = plain.clone()
    for row, i in enumerate(asks):
        for j in ours:
            if i in ours and j != i:
                cut[..., row, j] = float("-inf")
    want = m.out(cut.softmax(-1) @ v, image)
    with perturb_attention(m) as reached:
        for _ in range(2):  # the place of the image is known the second time
            got = m(image, text, mask)
            assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert reached == {""} and (got[0] - m(image, text, mask)[0]).abs().max() > 1e-3


def test_joint_attention_that_cannot_be_cut_is_refused():
    class ByHand(Joint):
        def attend(self, q, k, v, mask):
            return (q @ k.transpose(-1, -2)).softmax(-1) @ v

    class Scaled(Joint):  # the values are no longer those of to_v
        def attend(self, q, k, v, mask):
            return super().attend(q, k, 1.1 * v, mask)

    image, text = randn(2, 5, 8), randn(2, 3, 8, seed=1)
    for kind, says in (
        (ByHand, "it does not use torch's scaled_dot_product_attention"),
        (Scaled, "its value tokens are not those of to_v"),
    ):
        m = shake(kind()).double()
        with pytest.raises(ValueError, match=f"cannot be perturbed: {says}"), perturb_attention(m):
            m(image, text)
    for mode in ("uniform", "zero"):
        m = shake(Joint()).double()
        with pytest.raises(ValueError, match=f"'identity' only, not '{mode}'"):
            with perturb_attention(m, mode=mode):
                m(image, text)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision(dtype):
    for m in (SelfAttention(32, 4), nn.MultiheadAttention(32, 4, batch_first=True)):
        m, h = shake(m).to(dtype), randn(2, 9, 32).to(dtype)
        f = m if isinstance(m, SelfAttention) else (lambda q, m=m: m(q, q, q)[0])
        with perturb_attention(m):
            assert f(h).dtype == dtype


@pytest.mark.parametrize(
    "net", [UNet(width=8, heads=2), DiT(width=16, depth=3, heads=2, patch=4)], ids=["unet", "dit"]
)
def test_nothing_is_left_behind(net):
    d = NetDenoiser(shake(net).double(), VP(), "v")
    want, state, hooks = (
        d(X, 0.5).x0,
        copy.deepcopy(d.state_dict()),
        {n: (m._forward_hooks.copy(), m.__dict__.keys()) for n, m in d.named_modules()},
    )
    with pytest.raises(KeyboardInterrupt), perturb_attention(d):
        d(X, 0.5)
        raise KeyboardInterrupt
    guided = pag(d, 2.0, "*")
    guided(X, 0.5)
    with pytest.raises(ValueError):
        guided(X[:, :, :3], 0.5)
    assert torch.equal(d(X, 0.5).x0, want)
    assert d.state_dict().keys() == state.keys() and all(
        torch.equal(v, state[k]) for k, v in d.state_dict().items()
    )
    assert {k.removeprefix("inner.") for k in guided.state_dict()} == set(state)
    assert all(not m._forward_hooks for m in d.modules()) and all(
        m.__dict__.keys() == hooks[n][1] for n, m in d.named_modules()
    )


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("old", [True, False], ids=["older torch", "newer torch"])
def test_the_fast_path_of_encoder_layers_is_off_only_inside(monkeypatch, old, fast):
    """A fused encoder layer of older torch goes past the hooks of its attention: there it is not
    fused inside of the block. Afterwards the setting is the caller's, also after an error."""
    source = "return fused(x)" if old else "if self has hooks: return plain(x)"
    monkeypatch.setattr("inspect.getsource", lambda f: source)
    m, before = nn.MultiheadAttention(8, 2), torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(fast)
    try:
        with perturb_attention(m):
            assert torch.backends.mha.get_fastpath_enabled() is (fast and not old)
        assert torch.backends.mha.get_fastpath_enabled() is fast
        with pytest.raises(KeyboardInterrupt), perturb_attention(m):
            raise KeyboardInterrupt
        assert torch.backends.mha.get_fastpath_enabled() is fast
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def test_an_error_inside_the_damaged_call_restores_the_network():
    d, calls = unet(), []

    def fail(v):
        calls.append(1)
        raise FloatingPointError("inside")

    want = d(X, 0.5, **Y).x0
    with pytest.raises(FloatingPointError, match="inside"):
        pag(d, 2.0, "mid", mode=fail)(X, 0.5, **Y)
    assert calls and torch.equal(d(X, 0.5, **Y).x0, want)


def test_nested_and_in_other_threads():
    d, out = unet(), {}
    want, zero = d(X, 0.5, **Y).x0, None
    with perturb_attention(d, "mid", "zero"):
        zero = d(X, 0.5, **Y).x0
    with perturb_attention(d, "mid"):
        with perturb_attention(d, "mid", "zero"):
            assert_close(d(X, 0.5, **Y).x0, zero)
        worker = threading.Thread(target=lambda: out.update(x=d(X, 0.5, **Y).x0))
        worker.start()
        worker.join()
    assert torch.equal(out["x"], want)
    guided = pag(d, 2.0, "mid")
    alone, many = guided(X, 0.5, **Y).x0, []
    pool = [threading.Thread(target=lambda: many.append(guided(X, 0.5, **Y).x0)) for _ in range(4)]
    for p in pool:
        p.start()
    for p in pool:
        p.join()
    assert len(many) == 4 and all(torch.equal(m, alone) for m in many)


def test_strength_mixes_maps():
    d = unet()
    with perturb_attention(d, strength=0.0):
        assert_close(d(X, 0.5, **Y).x0, unet()(X, 0.5, **Y).x0, rtol=0, atol=0)
    layer, h = shake(SelfAttention(8, 2)).double(), randn(2, 5, 8)
    with perturb_attention(layer, strength=0.25):
        assert_close(
            layer(h),
            0.75 * shake(SelfAttention(8, 2)).double()(h) + 0.25 * layer.to_out(layer.to_v(h)),
        )


def test_a_compiled_network_is_refused_and_not_left_unguided():
    d = unet(torch.float32)
    d.net = torch.compile(d.net, backend="eager")
    guided = pag(d, 2.0, "mid")
    try:
        out = guided(X.float(), 0.5, **Y).x0
    except RuntimeError as e:
        assert "compiled" in str(e)
    else:
        assert_close(
            out, pag(unet(torch.float32), 2.0, "mid")(X.float(), 0.5, **Y).x0, rtol=1e-4, atol=1e-4
        )


# --- guidance


@pytest.mark.parametrize("process", [VP(), Flow()], ids=repr)
def test_hand_formula_and_counts(process):
    d = unet(process=process)
    c, u = d(X, 0.5, **Y), d(X, 0.5, label=torch.full((4,), 3))
    with perturb_attention(d, "mid"):
        b, bu = d(X, 0.5, **Y), d(X, 0.5, label=torch.full((4,), 3))

    def check(g, want, rows):
        with count_evals(g) as n:
            out = g(X, 0.5, **Y).x0
        assert_close(out, want, rtol=1e-9, atol=1e-9)
        assert n.rows == 4 * rows

    check(pag(d, 2.0, "mid"), c.x0 + 2 * (c.x0 - b.x0), 2)
    check(pag(d, 0.0, "mid"), c.x0, 1)
    check(pag(d, 0, "mid", cfg_scale=3), u.x0 + 3 * (c.x0 - u.x0), 2)
    check(pag(d, 2.0, "mid", cfg_scale=1), c.x0 + 2 * (c.x0 - b.x0), 2)
    check(pag(d, 2.0, "mid", interval=(0.0, 0.3)), c.x0, 1)
    check(pag(d, 2.0, "mid", cfg_scale=3.0, interval=(0.0, 0.3)), u.x0 + 3 * (c.x0 - u.x0), 2)
    for batched in (True, False):
        check(
            pag(d, 2.0, "mid", cfg_scale=3.0, batched=batched),
            u.x0 + 3 * (c.x0 - u.x0) + 2 * (c.x0 - b.x0),
            3,
        )
    check(
        pag(d, 2.0, "mid", cfg_scale=3.0, uncond={"label": 3}),
        u.x0 + 3 * (c.x0 - u.x0) + 2 * (c.x0 - b.x0),
        3,
    )
    check(
        pag(d, torch.arange(4.0), "mid", cfg_scale=torch.full((4,), 3.0)),
        u.x0 + 3 * (c.x0 - u.x0) + torch.arange(4.0)[:, None, None, None] * (c.x0 - b.x0),
        3,
    )
    both = u.x0 + 3 * (c.x0 - u.x0) + 2 * (3 * (c.x0 - b.x0) - 2 * (u.x0 - bu.x0))
    for nested in (pag(cfg(d, 3.0), 2.0, "mid"), cfg(pag(d, 2.0, "mid"), 3.0)):
        check(nested, both, 4)
    check(pag(d, 2.0, "mid", shaper=APG()), c.x0 + 2 * project(c.x0 - b.x0, c.x0)[1], 2)
    check(
        pag(d, 2.0, "mid", cfg_scale=3.0, shaper=APG()),
        u.x0 + 3 * (c.x0 - u.x0) + 2 * project(c.x0 - b.x0, c.x0)[1],
        3,
    )


@pytest.mark.parametrize("solver", [DDIM(), DPMSolverPP(2), Heun()], ids=repr)
def test_under_solvers_inside_and_outside_of_cfg(solver):
    d, grid = unet(), time_grid(VP(), 4)
    run = lambda g: sample(g, solver, X, grid, cond=Y, progress=False)
    assert_close(run(pag(d, 0.0, "mid")), run(d), rtol=0, atol=0)
    assert_close(
        run(cfg(pag(d, 0.5, "mid"), 2.0)), run(pag(cfg(d, 2.0), 0.5, "mid")), rtol=1e-7, atol=1e-7
    )
    with_memory = pag(d, 0.5, "mid", shaper=APG(beta=-0.5))
    assert torch.equal(run(with_memory), run(with_memory))
    assert_close(
        run(cfg(with_memory, 2.0, batched=True)),
        run(cfg(with_memory, 2.0, batched=False)),
        rtol=1e-7,
        atol=1e-7,
    )


def test_rows_are_independent_and_float32_agrees():
    g = pag(unet(), 1.5, "*", cfg_scale=2.0)
    whole = g(X, 0.5, **Y).x0
    assert_close(
        whole,
        torch.cat([g(X[i : i + 1], 0.5, label=Y["label"][i : i + 1]).x0 for i in range(4)]),
        rtol=1e-9,
        atol=1e-9,
    )
    assert_close(
        pag(unet(torch.float32), 1.5, "*", cfg_scale=2.0)(X.float(), 0.5, **Y).x0.double(),
        whole,
        rtol=1e-3,
        atol=1e-3,
    )
    assert_close(g(X, torch.full((4,), 0.5, dtype=F64), **Y).x0, whole, rtol=1e-6, atol=1e-6)
    assert g(X[:0], 0.5, label=Y["label"][:0]).x0.shape == (0, 1, 8, 8)


@pytest.mark.parametrize("first", [True, False])
def test_torch_tokens(first):
    d = NetDenoiser(shake(Tokens(first)).double(), VP(), "eps")
    x = randn(3, 5)
    with perturb_attention(d):
        bad = d(x, 0.5).eps
    assert_close(pag(d, 2.0, "attn")(x, 0.5).eps, 3 * d(x, 0.5).eps - 2 * bad)


def test_gradients_pass_through():
    x = X.clone().requires_grad_()
    pag(unet(), 2.0, "mid", cfg_scale=2.0)(x, 0.5, **Y).x0.sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().max() > 0


@contextmanager
def wider(d):  # a damage of one's own, on the exact model
    good = d.mixture
    d.mixture = GaussianMixture(good.means, scales=0.4, labels=good.labels)
    try:
        yield
    finally:
        d.mixture = good


def test_own_damage_is_contrast():
    d, bad, x = (
        MixtureDenoiser(ring(), VP()),
        MixtureDenoiser(GaussianMixture(ring().means, scales=0.4, labels=ring().labels), VP()),
        randn(8, 2),
    )
    y = {"label": torch.arange(8)}
    assert_close(pag(d, 2.0, wider)(x, 0.5, **y).x0, contrast(d, bad, 2.0)(x, 0.5, **y).x0)
    assert_close(
        pag(d, 2.0, wider, cfg_scale=3.0)(x, 0.5, **y).x0,
        cfg(d, 3.0)(x, 0.5, **y).x0 + 2 * (d(x, 0.5, **y).x0 - bad(x, 0.5, **y).x0),
    )
    assert d.mixture.vars.max() < 0.4**2


def test_copies_and_moves():
    g = pag(unet(), 2.0, "mid")
    twin = copy.deepcopy(g)
    assert isinstance(twin, PAG) and twin.inner is not g.inner
    assert torch.equal(twin(X, 0.5, **Y).x0, g(X, 0.5, **Y).x0)
    assert g.float()(X.float(), 0.5, **Y).x0.dtype == torch.float32


# --- names, registration, bad input


def test_names():
    net = DiT(width=16, depth=12, heads=2)
    assert attention_layers(net, "blocks.1") == ["blocks.1.attn"]
    assert attention_layers(net, "blocks.1*") == [
        "blocks.1.attn",
        "blocks.10.attn",
        "blocks.11.attn",
    ]
    assert attention_layers(net, ["11", "blocks.0.attn"]) == ["blocks.0.attn", "blocks.11.attn"]
    assert len(attention_layers(net)) == 12 and attention_layers(
        NetDenoiser(net, VP()), "blocks.3"
    ) == ["net.blocks.3.attn"]
    with pytest.raises(
        ValueError, match=r"'blocks.12' picks no self-attention; there is blocks.0.attn, "
    ):
        attention_layers(net, ["blocks.1", "blocks.12"])
    for bad in ([], "", [3], [""], None, 3):
        with pytest.raises(ValueError, match="layers"):
            attention_layers(net, bad)


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 24), nn.Linear(8, 8)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class FusedAttention(Fused):
    pass


def test_registration():
    m, h = shake(FusedAttention()).double(), randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"FusedAttention\); see register_attention"):
        attention_layers(nn.Sequential(m))
    # holds for subclasses
    register_attention(Fused, lambda m, x: (m.qkv(x).chunk(3, -1)[2], m.proj))
    with perturb_attention(m):
        assert_close(m(h), m.proj(m.qkv(h)[..., 16:]))

    class Wrong(Fused):
        pass

    # the query is not the value
    register_attention(Wrong, lambda m, x: (m.qkv(x).chunk(3, -1)[0], m.proj))
    w = shake(Wrong()).double()
    with pytest.raises(ValueError, match="register_attention"), perturb_attention(w):
        w(h)
    for bad in (m, int, "Attention", None):
        with pytest.raises(TypeError, match="cls must be a class of modules, got"):
            register_attention(bad, lambda m, x: x)
    with pytest.raises(TypeError, match="function"):
        register_attention(Fused, 3)


def test_bad_input():
    d = unet()
    with pytest.raises(TypeError, match="NetDenoiser"):
        pag(d.net, 2.0, "mid")
    with pytest.raises(ValueError, match="plain function"):
        pag(NetDenoiser(lambda x, t: x, VP()), 2.0, "mid")
    with pytest.raises(ValueError, match="net.mid.att.attn"):
        pag(d, 2.0, "middle")
    with pytest.raises(ValueError, match="what unconditional means"):
        pag(NetDenoiser(d.net, VP()), 2.0, "mid", cfg_scale=2.0)
    with pytest.raises(ValueError, match="'blur'"):
        pag(d, 2.0, "mid", mode="blur")
    with pytest.raises(ValueError, match="strength"):
        pag(d, 2.0, "mid", strength=-1.0)
    with pytest.raises(ValueError, match="interval"):
        pag(d, 2.0, "mid", interval=(0.5, 0.2))
    with pytest.raises(TypeError, match="scale must be a finite number"):
        pag(d, None, "mid")
    with pytest.raises(TypeError, match="cfg_scale must be a finite number"):
        pag(d, 1.0, "mid", cfg_scale="3")
    with pytest.raises(ValueError, match="finite"):
        pag(d, float("nan"), "mid")
    with pytest.raises(ValueError, match="one entry a sample"):
        pag(d, torch.ones(3), "mid")(X, 0.5, **Y)
    with pytest.warns(UserWarning, match="negative scale"):
        pag(d, -1.0, "mid")
    m, h = nn.MultiheadAttention(8, 2, batch_first=True), randn(2, 5, 8, dtype=torch.float32)
    with pytest.raises(ValueError, match="cross-attention"), perturb_attention(m):
        m(h, h[:, :3], h[:, :3])
    with pytest.raises(ValueError, match="cross-attention"), perturb_attention(m):
        m(h, h + 1, h)
    with pytest.raises(TypeError, match="nn.Module"):
        perturb_attention(lambda x: x)
