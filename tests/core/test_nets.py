"""Networks: shapes, conditioning, equivariance, learning, errors."""

import math

import pytest
import torch
from diffkit.core.denoiser import NetDenoiser, cfg
from diffkit.core.nets import (
    MLP,
    DiT,
    DiTBlock,
    FourierEmbedding,
    ResBlock,
    SelfAttention,
    Stacked,
    UNet,
)
from diffkit.core.process import VP
from torch import nn


def shaken(net, seed=0, size=0.1):
    "Replace the zeros of the initialisation, so that a property of the network can be seen."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p += size * torch.randn(p.shape, generator=g)
    return net.eval()


NETS = {
    "mlp": (lambda classes=None: MLP(2, hidden=32, classes=classes), (2,)),
    "mlp-image": (lambda classes=None: MLP(64, hidden=32, classes=classes), (1, 8, 8)),
    "unet": (lambda classes=None: UNet(width=8, classes=classes), (1, 8, 8)),
    "unet-deep": (
        lambda classes=None: UNet(
            3,
            width=8,
            levels=(1, 2, 2),
            attention=(True, False, True),
            blocks=2,
            heads=2,
            classes=classes,
        ),
        (3, 8, 12),
    ),
    "dit": (lambda classes=None: DiT(width=32, depth=2, classes=classes), (1, 8, 8)),
}
each = pytest.mark.parametrize("make,shape", NETS.values(), ids=NETS.keys())


@each
def test_output_is_zero_at_the_start_and_has_the_shape_of_x(make, shape):
    x, t = torch.randn(5, *shape), torch.rand(5)
    out = make(classes=10)(x, t, torch.arange(5))
    assert out.shape == x.shape and not out.any()


@each
def test_time_and_label_matter_and_none_is_the_null_class(make, shape):
    net, x, t, y = shaken(make(classes=10)), torch.randn(5, *shape), torch.rand(5), torch.arange(5)
    with torch.no_grad():
        out = net(x, t, y)
        gap = lambda other: (other - out).flatten(1).norm(dim=1).min() / out.norm()
        assert (
            gap(net(x, t + 0.1, y)) > 1e-4
            and gap(net(x, t, y + 1)) > 1e-4
            and gap(net(x, t)) > 1e-4
        )
        assert torch.equal(net(x, t), net(x, t, torch.full((5,), 10)))
        assert torch.equal(net(x, 0.3, 2), net(x, torch.full((5,), 0.3), torch.full((5,), 2)))


@each
def test_samples_do_not_see_each_other(make, shape):
    net, x, t, y = shaken(make(classes=10)), torch.randn(5, *shape), torch.rand(5), torch.arange(5)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        torch.testing.assert_close(
            net(x[order], t[order], y[order]), net(x, t, y)[order], atol=1e-5, rtol=1e-4
        )


@each
def test_every_parameter_gets_a_gradient_in_float64(make, shape):
    net = shaken(make()).double()
    net(torch.randn(5, *shape).double(), torch.rand(5).double()).square().sum().backward()
    assert [
        k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ] == []


@each
def test_overfits_one_batch(make, shape):
    g = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    net, t, y = make(classes=4), torch.linspace(0.1, 0.9, 4), torch.arange(4)
    # one image at four times with four labels: only these tell the answers apart
    x = torch.randn(1, *shape, generator=g).expand(4, *shape)
    target, opt = torch.randn(4, *shape, generator=g), torch.optim.Adam(net.parameters(), 6e-3)
    for _ in range(80):
        loss = (net(x, t, y) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 0.1


@each
def test_errors_name_the_argument(make, shape):
    net, x, t = make(classes=10), torch.zeros(4, *shape), torch.rand(4)
    for label in (torch.tensor([0, 1, 2, 11]), torch.tensor([0, -1, 2, 3])):
        with pytest.raises(ValueError, match="10 for the null class"):
            net(x, t, label)
    with pytest.raises(ValueError, match=r"label has shape \(3,\)"):
        net(x, t, torch.zeros(3, dtype=torch.long))
    with pytest.raises(TypeError, match="float32"):
        net(x, t, torch.zeros(4))
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        net(x, torch.rand(3))
    with pytest.raises(ValueError, match="without classes"):
        make()(x, t, torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="x has shape"):
        net(torch.zeros(4, 7), t)


@pytest.mark.parametrize(
    "size,levels", [(8, (1,)), (8, (1, 2)), (8, (1, 1, 2, 2)), (32, (1, 1, 2)), (64, (1, 1, 2, 2))]
)
def test_unet_takes_every_size_it_promises(size, levels):
    with torch.no_grad():
        assert UNet(width=8, levels=levels, heads=2)(torch.zeros(1, 1, size, size), 0.5).shape == (
            1,
            1,
            size,
            size,
        )


def test_sizes_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match="9x8.*divisible by 2"):
        UNet(width=8)(torch.zeros(1, 1, 9, 8), 0.5)
    with pytest.raises(ValueError, match="8x12.*divisible by 8"):
        UNet(width=8, levels=(1, 1, 1, 1))(torch.zeros(1, 1, 8, 12), 0.5)
    with pytest.raises(ValueError, match="10x8.*divisible by 4"):
        DiT(patch=4)(torch.zeros(1, 1, 10, 8), 0.5)


def test_attention_is_equivariant_and_can_be_taken_apart():
    torch.manual_seed(0)
    att, x, order = SelfAttention(16, 4), torch.randn(2, 9, 16), torch.randperm(9)
    torch.testing.assert_close(att(x[:, order]), att(x)[:, order], atol=1e-6, rtol=1e-5)
    ref = nn.MultiheadAttention(16, 4, batch_first=True)  # the same weights in torch's own module
    with torch.no_grad():
        ref.in_proj_weight.copy_(torch.cat([f.weight for f in (att.to_q, att.to_k, att.to_v)]))
        ref.in_proj_bias.copy_(torch.cat([f.bias for f in (att.to_q, att.to_k, att.to_v)]))
        ref.out_proj.weight.copy_(att.to_out.weight)
        ref.out_proj.bias.copy_(att.to_out.bias)
    torch.testing.assert_close(att(x), ref(x, x, x)[0], atol=1e-6, rtol=1e-5)
    names = [
        k
        for k, m in UNet(classes=10, attention=(True, True)).named_modules()
        if isinstance(m, SelfAttention)
    ]
    assert sorted(names) == [
        "down.0.att.attn",
        "down.2.att.attn",
        "mid.att.attn",
        "up.0.att.attn",
        "up.2.att.attn",
    ]


@pytest.mark.parametrize("positions", [False, True])
def test_dit_without_positions_sees_a_set_of_patches(positions):
    import torch.nn.functional as F

    net, x, order = (
        shaken(DiT(width=32, depth=2, positions=positions)),
        torch.randn(2, 1, 8, 8),
        torch.randperm(16, generator=torch.Generator().manual_seed(0)),
    )
    mix = lambda a: F.fold(F.unfold(a, 2, stride=2)[:, :, order], (8, 8), 2, stride=2)
    gap = (net(mix(x), 0.5) - mix(net(x, 0.5))).abs().max()
    assert gap > 0.01 if positions else gap < 1e-4


@pytest.mark.parametrize(
    "make",
    [
        lambda: UNet(heads=5),
        lambda: UNet(attention=(True,)),
        lambda: UNet(levels=()),
        lambda: DiT(width=30),
        lambda: DiT(width=32, heads=3),
        lambda: MLP(0),
        lambda: MLP(2, classes=0),
    ],
)
def test_bad_configurations_are_refused(make):
    with pytest.raises(ValueError):
        make()


# ------------------------------------------------------------------ networks side by side
def test_stacked_networks_take_labels_and_times_and_guidance():
    "Whatever a network does by itself it does in its block of rows, under guidance too."
    nets = [shaken(MLP(2, hidden=16, classes=3), s) for s in range(3)]
    g = torch.Generator().manual_seed(0)
    x, label = torch.randn(12, 2, generator=g), torch.arange(12) % 3
    t = torch.rand(12, generator=g)
    null = {"label": 3}
    make = lambda net: cfg(NetDenoiser(net, VP(), "v", null=null), 2.5)
    side = make(Stacked(nets))(x, t, label=label).x0
    alone = torch.cat(
        [
            make(n)(*(v[4 * i : 4 * i + 4] for v in (x, t)), label=label[4 * i : 4 * i + 4]).x0
            for i, n in enumerate(nets)
        ]
    )
    torch.testing.assert_close(side, alone, rtol=1e-5, atol=1e-5)


def test_times_are_looked_at_only_where_that_is_allowed():
    "A schedule can be asked inside `vmap`; outside a time beyond [0, 1] is refused."
    t = torch.linspace(0, 1, 6).reshape(2, 3)
    torch.testing.assert_close(torch.func.vmap(VP().alpha)(t), VP().alpha(t))
    with pytest.raises(ValueError, match="must lie in"):
        VP().alpha(t + 0.1)


@pytest.mark.parametrize(("lowest", "highest"), [(0.5, 100.0), (0.1, 2.0), (2.0, 3.0)])
@pytest.mark.parametrize("dim", [4, 10])
def test_frequencies_are_geometric_from_the_lowest_to_the_highest(dim, lowest, highest):
    half, t = dim // 2, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64)
    freqs = [lowest * (highest / lowest) ** (k / (half - 1)) for k in range(half)]
    want = torch.tensor(
        [[f(w * u) for f in (math.sin, math.cos) for w in freqs] for u in t.tolist()]
    )
    # the frequencies are kept in single precision
    got = FourierEmbedding(dim, lowest, highest)(t)
    torch.testing.assert_close(got, want.double(), rtol=0, atol=1e-4)


# A conditioning (scale, shift) takes features h to h (1 + scale) + shift: with the scale -1 nothing
# of them is left but the shift, and what follows can be written down.
def says(linear, *parts):
    "Let a conditioning say the same whatever the time is: numbers, or vectors, one a part."
    n = linear.out_features // len(parts)
    with torch.no_grad():
        linear.weight.zero_()
        linear.bias.copy_(torch.cat([torch.as_tensor(p).expand(n) for p in parts]))


def test_a_residual_block_is_scaled_and_shifted():
    g = torch.Generator().manual_seed(0)
    block = shaken(ResBlock(4, 4, 6)).double()
    h, c = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((2, 4, 5, 5), (2, 6)))
    shift = torch.randn(4, generator=g, dtype=torch.float64)
    said = lambda v: h + block.conv2(block.act(v))
    says(block.cond, -1.0, shift)
    torch.testing.assert_close(block(h, c), said(shift[:, None, None].expand_as(h)))
    normed = block.norm2(block.conv1(block.act(block.norm1(h))))
    for scale in (0.0, 1.0, -0.5):
        says(block.cond, scale, shift)
        want = said((1 + scale) * normed + shift[:, None, None])
        torch.testing.assert_close(block(h, c), want)


def test_a_transformer_block_is_scaled_shifted_and_gated():
    g = torch.Generator().manual_seed(0)
    block, r = shaken(DiTBlock(8, 2)).double(), lambda *s: torch.randn(*s, generator=g).double()
    h, c, b1, b2 = r(2, 5, 8), r(2, 8), r(8), r(8)
    att = block.attn.to_out(block.attn.to_v(b1))  # equal tokens attend to what they all are
    for g1, g2 in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-0.5, 2.0)):
        says(block.mod[1], b1, -1.0, g1, b2, -1.0, g2)
        torch.testing.assert_close(block(h, c), h + g1 * att + g2 * block.mlp(b2))
    norm = lambda v: (v - v.mean(-1, True)) / (v.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    for scale in (0.0, 1.0, -0.5):
        says(block.mod[1], b1, scale, 1.0, 0.0, 0.0, 0.0)
        torch.testing.assert_close(block(h, c), h + block.attn(norm(h) * (1 + scale) + b1))
        says(block.mod[1], 0.0, 0.0, 0.0, b2, scale, 1.0)
        torch.testing.assert_close(block(h, c), h + block.mlp(norm(h) * (1 + scale) + b2))


def test_the_last_tokens_of_a_transformer_are_scaled_and_shifted():
    g = torch.Generator().manual_seed(0)
    net = shaken(DiT(2, width=8, depth=1, patch=2, heads=2, out=3)).double()
    x = torch.randn(2, 2, 4, 6, generator=g).double()
    shift = torch.randn(8, generator=g).double()
    says(net.mod[1], shift, -1.0)
    patch = net.head(shift).reshape(3, 2, 2)  # the same one everywhere
    torch.testing.assert_close(net(x, 0.5), patch.repeat(1, 2, 3).expand(2, -1, -1, -1))
    outs = []
    for scale in (-1.0, 0.0, 1.0, -0.5):
        says(net.mod[1], shift, scale)
        outs.append(net(x, 0.5) - patch.repeat(1, 2, 3))
    torch.testing.assert_close(outs[2], 2 * outs[1])
    torch.testing.assert_close(outs[3], 0.5 * outs[1])


@pytest.mark.parametrize("bad", [0, -1])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda **kw: MLP(**{"dim": 2, **kw}), ("dim", "hidden", "depth")),
        (UNet, ("channels", "width", "blocks")),
        (DiT, ("channels", "width", "depth", "patch")),
    ],
    ids=["mlp", "unet", "dit"],
)
def test_sizes_below_one_are_refused_by_name(make, names, bad):
    for name in names:
        with pytest.raises(ValueError, match=f"^{name}={bad}: must be at least 1$"):
            make(**{name: bad})
