"""Guidance in the pipelines of today: joint attention, flows, video, modular pipelines, networks
that put out a variance, on small random models. The truth is the pipeline itself, or the same
guidance in a pipeline of another form. And the family of tokens, against sums over all
sequences."""

from itertools import product

import pytest
import torch
from diffkit import adaptive_cfg, apg, cfg, pag, perturb_attention
from diffkit.core.adapters import guide_pipeline, random_pipeline
from diffkit.core.denoiser import CFG, Prediction
from diffkit.guidance.basics import MaskedDenoiser, MaskedProcess, TableDenoiser
from torch.testing import assert_close

df = pytest.importorskip("diffusers")
TOL = dict(rtol=1e-4, atol=1e-4)
SCALE = 5.0


def seed():
    return torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def latents(pipe, call, **more):
    out = pipe(**call, num_inference_steps=4, output_type="latent", generator=seed(), **more)
    return out.frames if hasattr(out, "frames") else out.images


def guided(pipe, call, guidance, **more):
    with guide_pipeline(pipe, guidance):
        return latents(pipe, call, **more)


def wan():
    vae = df.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **norm(4)).eval()
    net = df.WanTransformer3DModel(
        (1, 2, 2), 2, 12, 4, 4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2
    ).eval()
    flow = df.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = df.WanPipeline(None, None, vae, flow, net)
    sizes = dict(height=16, width=16, num_frames=5)
    prompts = dict(prompt_embeds=draw(1, 6, 16), negative_prompt_embeds=draw(1, 6, 16) - 1)
    return pipe, sizes | prompts, "guidance_scale"


def qwen():
    vae = df.AutoencoderKLQwenImage(base_dim=8, z_dim=4, num_res_blocks=1, **norm(4)).eval()
    net = df.QwenImageTransformer2DModel(2, 16, 4, 2, 16, 2, 16, axes_dims_rope=(4, 6, 6)).eval()
    flow = df.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = df.QwenImagePipeline(flow, vae, None, None, net)
    mask = torch.ones(1, 6, dtype=torch.int64)
    sizes = dict(height=32, width=32, prompt_embeds_mask=mask, negative_prompt_embeds_mask=mask)
    prompts = dict(prompt_embeds=draw(1, 6, 16), negative_prompt_embeds=draw(1, 6, 16) - 1)
    return pipe, sizes | prompts, "true_cfg_scale"


def pixart():  # its network puts out a variance beside the noise
    vae = df.AutoencoderKL(norm_num_groups=8, block_out_channels=(8,)).eval()
    net = df.PixArtTransformer2DModel(
        2, 8, 4, 8, 2, cross_attention_dim=16, sample_size=8, caption_channels=16
    ).eval()
    schedule = df.DPMSolverMultistepScheduler()
    pipe = df.PixArtAlphaPipeline(None, None, vae, net, schedule)
    mask = torch.ones(1, 6)
    sizes = dict(height=8, width=8, prompt_attention_mask=mask, use_resolution_binning=False)
    prompts = dict(prompt_embeds=draw(1, 6, 16), negative_prompt_embeds=draw(1, 6, 16) - 1)
    more = dict(negative_prompt_attention_mask=mask, negative_prompt=None)
    return pipe, sizes | prompts | more, "guidance_scale"


def norm(n):  # of the latents
    return dict(latents_mean=[0.0] * n, latents_std=[1.0] * n)


@pytest.fixture(scope="module", params=[wan, qwen, pixart], ids=lambda f: f.__name__)
def family(request):
    torch.manual_seed(0)
    try:
        pipe, call, name = request.param()
    except (AttributeError, RuntimeError) as e:
        pytest.skip(f"this diffusers has no such pipeline: {e}")
    pipe.set_progress_bar_config(disable=True)
    return pipe, call, {name: SCALE}


class Normed(CFG):  # Qwen's own: guided as far as the norm of the conditional output
    def forward(self, x, t, **cond):
        c, u = self.branch(x, t, cond, self.null_cond(cond))
        v = u.flow + self.scale * (c.flow - u.flow)
        v = v * c.flow.norm(dim=-1, keepdim=True) / v.norm(dim=-1, keepdim=True)
        return Prediction.of(x, t, self.process, flow=v)


def test_cfg_is_the_pipelines_own(family):
    pipe, call, scale = family
    own = latents(pipe, call, **scale)
    make = Normed if "true_cfg_scale" in scale else cfg
    assert_close(guided(pipe, call, lambda d: make(d, SCALE), **scale), own, **TOL)
    # whatever the pipeline's own scale
    (name,) = scale
    assert_close(guided(pipe, call, lambda d: make(d, SCALE), **{name: 2.0}), own, **TOL)
    assert not torch.allclose(guided(pipe, call, lambda d: cfg(d, 2.0), **scale), own, **TOL)
    assert torch.equal(latents(pipe, call, **scale), own)  # nothing is left


@pytest.mark.parametrize(
    "guidance",
    [
        lambda d: apg(d, SCALE, beta=-0.5),
        lambda d: adaptive_cfg(d, SCALE, 0.99),
        lambda d: cfg(d, SCALE, interval=(0.4, 0.9)),
    ],
    ids=["apg", "adaptive", "interval"],
)
def test_other_guidance_runs_and_differs(family, guidance):
    pipe, call, scale = family
    out = guided(pipe, call, guidance, **scale)
    assert torch.isfinite(out).all()
    assert not torch.allclose(out, latents(pipe, call, **scale), **TOL)
    assert torch.equal(guided(pipe, call, guidance, **scale), out)


def test_guidance_that_is_off_is_the_conditional_model(family):
    "Outside of its interval a guidance asks for no negative prompt, and the pipeline adds none."
    pipe, call, scale = family
    (name,) = scale
    off = guided(pipe, call, lambda d: cfg(d, SCALE, interval=(0.0, 0.0)), **scale)
    assert_close(off, latents(pipe, call, **{name: 1.0}), **TOL)


def test_one_step_runs_do_not_see_each_other(family):
    pipe, call, scale = family
    if isinstance(pipe, df.PixArtAlphaPipeline):
        pytest.skip("its pipeline takes one step of an LCM scheduler only")
    make = Normed if "true_cfg_scale" in scale else cfg
    other = {**call, "prompt_embeds": call["prompt_embeds"] + 1}
    run = lambda c: pipe(
        **c, num_inference_steps=1, output_type="latent", generator=seed(), **scale
    )[0]
    want = [run(call), run(other)]
    with guide_pipeline(pipe, lambda d: make(d, SCALE)):
        assert_close([run(call), run(other)], want, **TOL)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_pag_on_joint_attention_is_the_pag_pipelines(scale):
    pipe, call = random_pipeline("sd3")
    parts = {k: v for k, v in pipe.components.items() if k not in ("image_encoder",)}
    parts = {k: v for k, v in parts.items() if k != "feature_extractor"}
    theirs = df.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["transformer_blocks.0"])
    call |= dict(num_inference_steps=4, output_type="latent", guidance_scale=scale)
    want = theirs(**call, pag_scale=3.0, generator=seed()).images
    plain = type(pipe.transformer.transformer_blocks[1].attn.processor)
    theirs.transformer.set_attn_processor(plain())
    beside = None if scale == 1 else scale
    with guide_pipeline(pipe, lambda d: pag(d, 3.0, "transformer_blocks.0", cfg_scale=beside)):
        got = pipe(**call, generator=seed()).images
    assert_close(got, want, **TOL)
    assert not torch.allclose(pipe(**call, generator=seed()).images, want, **TOL)


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_an_image_token_sees_of_the_image_only_itself(kind):
    layer = random_pipeline(kind)[0].transformer.transformer_blocks[0].attn
    dim = layer.to_q.in_features
    image, text = draw(2, 5, dim), draw(2, 3, dim)
    moved = image.clone()
    moved[:, 3] += 1.0
    ask = lambda x: layer(hidden_states=x, encoder_hidden_states=text)
    with torch.no_grad(), perturb_attention(layer.requires_grad_(False), "*") as reached:
        (a, ta), (b, tb) = ask(image), ask(moved)
    assert reached == {""}
    others = [0, 1, 2, 4]
    assert torch.equal(a[:, others], b[:, others]) and not torch.allclose(a[:, 3], b[:, 3])
    assert not torch.allclose(ta, tb)  # the text keeps its map
    with torch.no_grad():
        (free, _), (then, _) = ask(image), ask(moved)
    assert not torch.allclose(free[:, others], then[:, others])
    with pytest.raises(ValueError, match="knows the mode 'identity' only, not 'zero'"):
        with perturb_attention(layer, "*", mode="zero"):
            ask(image)


def test_layers_of_one_stream_are_named():
    flux = random_pipeline("flux")[0].transformer
    with pytest.raises(
        ValueError, match=r"single_transformer_blocks\.0\.attn \((Flux)?Attention\)"
    ):
        pag_layers(flux, "single_transformer_blocks")


def pag_layers(model, layers):
    from diffkit import attention_layers

    return attention_layers(model, layers)


@pytest.mark.parametrize(
    "guidance",
    [
        lambda d: cfg(d, SCALE),
        lambda d: cfg(d, SCALE, interval=(0.3, 0.8)),
        lambda d: apg(d, SCALE, beta=-0.5),
        lambda d: adaptive_cfg(d, SCALE),
        lambda d: pag(d, 3.0, "mid_block", cfg_scale=SCALE),
    ],
    ids=["cfg", "interval", "apg", "adaptive", "pag"],
)
def test_modular_pipelines(guidance):
    "They ask for each prompt in turn; the classic pipeline asks for both at once."
    modular = pytest.importorskip("diffusers.modular_pipelines")
    guiders = pytest.importorskip("diffusers.guiders")
    pipe, call = random_pipeline("sdxl")
    blocks = modular.StableDiffusionXLAutoBlocks()
    for name in ("text_encoder", "ip_adapter", "vae_encoder"):
        blocks.sub_blocks.pop(name)
    new = blocks.init_pipeline()
    parts = {k: v for k, v in pipe.components.items() if v is not None}
    guider = guiders.ClassifierFreeGuidance(guidance_scale=SCALE)
    new.update_components(**{k: parts[k] for k in ("unet", "vae", "scheduler")}, guider=guider)
    call |= dict(num_inference_steps=4, output_type="latent")
    run = lambda: new(**call, generator=seed(), output="latents")
    classic = lambda: pipe(**call, guidance_scale=SCALE, generator=seed()).images
    assert_close(run(), classic(), **TOL)
    with guide_pipeline(new, guidance):
        got = run()
    with guide_pipeline(pipe, guidance):
        assert_close(got, classic(), **TOL)


# ---- masked tokens ----


def test_a_vocabulary_has_at_least_two_tokens():
    assert [(MaskedProcess(v).vocab, MaskedProcess(v).mask) for v in (2, 3)] == [(2, 2), (3, 3)]
    for bad in (1, 0, -3, True, 2.0, "3", None):
        with pytest.raises(
            ValueError, match=f"vocab must be an integer of at least 2, got {bad!r}"
        ):
            MaskedProcess(bad)


def table(V, L):  # a joint distribution in which some sequences are impossible
    p = torch.rand((V,) * L, generator=seed(), dtype=torch.float64)
    p = torch.where(p < 0.4, 0.0, p)
    return p / p.sum()


@pytest.mark.parametrize("V,L", [(2, 1), (2, 3), (3, 2), (3, 3)])
def test_a_tables_predictions_are_sums_over_its_sequences(V, L):
    "For all states: visible tokens are certain, and where no sequence fits it is said."
    joint, impossible = table(V, L), 0
    d = TableDenoiser(joint)
    for x in product(range(V + 1), repeat=L):
        want = torch.zeros(L, V, dtype=torch.float64)
        for state in product(range(V), repeat=L):
            if all(a in (V, b) for a, b in zip(x, state)):
                for i, b in enumerate(state):
                    want[i, b] += joint[state]
        rows = torch.tensor([x, [V] * L])  # beside a row in which everything is possible
        if want.sum() > 0:
            got = d(rows, 0.5).probs
            assert_close(got[0], want / want.sum(1, keepdim=True))
            assert_close(got.sum(-1), torch.ones(2, L, dtype=torch.float64))
        else:
            impossible += 1
            with pytest.raises(ValueError, match="to which the table gives probability 0"):
                d(rows, 0.5)
    assert impossible == 0 if L == 1 else impossible > 0


@pytest.mark.parametrize(
    "joint,says",
    [
        ([[0.5, 0.5], [0.5, -0.5]], "probability table, got a sum of 1"),
        ([[0.5, 0.5], [0.5, 0.5]], "probability table, got a sum of 2"),
        ([0.5, 0.4], "probability table, got a sum of 0.9"),
        ([0.5, 0.500002], "probability table, got a sum of 1"),
        ([float("nan"), 1.0], "probability table"),
        ([[0.2, 0.2, 0.1], [0.2, 0.2, 0.1]], r"one length V, got shape \(2, 3\)"),
        (1.0, r"got shape \(\)"),
        ([1.0], "vocab must be an integer of at least 2, got 1"),
    ],
)
def test_what_is_no_table_of_probabilities_is_refused(joint, says):
    with pytest.raises(ValueError, match=says):
        TableDenoiser(torch.tensor(joint, dtype=torch.float64))


def test_a_table_may_be_off_by_rounding():
    assert TableDenoiser(torch.tensor([0.5, 0.5000005], dtype=torch.float64)).length == 1


@pytest.mark.parametrize("t", [None, 1.0, 0.3, 0.0015, 0.001, 0.0])
def test_the_loss_of_masked_tokens_by_hand(t):
    """1/t times the cross-entropy of the masked tokens, by the same draws; at times below 0.001
    it is that of 0.001, and without times they are spread evenly."""
    B, L, V = 4, 3000, 3
    logits = torch.randn(V + 1, V, generator=seed(), dtype=torch.float64)
    d, g = MaskedDenoiser(lambda x: logits[x], MaskedProcess(V)), seed()
    x0 = torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(1))
    times = None if t is None else torch.full((B,), t, dtype=torch.float64)
    got = d.loss(x0, times, seed())
    if t is None:
        times = (torch.arange(B) + torch.rand(B, generator=g)) / B
    floor = times.double().clamp(min=0.001)
    hidden = torch.rand(B, L, generator=g, dtype=torch.float64) < floor[:, None]
    cost = -logits[V].log_softmax(0)[x0]
    want = [(cost[i][hidden[i]].sum() / floor[i]).item() for i in range(B)]
    assert hidden.any()
    # times that the loss draws are of single precision
    assert got.item() == pytest.approx(sum(want) / B, rel=1e-9 if t is not None else 1e-5)
