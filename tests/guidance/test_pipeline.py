"""Guidance on a real pipeline: `diffusers`' own classes with small random weights and a text
condition, and the same results where the formulas agree."""

import pytest
import torch
from diffkit.core.adapters import (
    DiffusersScheduler,
    from_diffusers,
    guide_pipeline,
    random_pipeline,
)
from diffkit.core.denoiser import cfg, count_evals
from diffkit.core.process import time_grid
from diffkit.core.sampling import DDIM, sample
from diffkit.guidance.adaptive_guidance import adaptive_cfg, policy
from diffkit.guidance.apg import apg
from diffkit.guidance.pag import pag
from diffkit.solvers.dpm_solver_pp import DPMSolverPP
from torch.testing import assert_close

diffusers = pytest.importorskip("diffusers")
STEPS, SCALE = 8, 5.0
# float32 through eight steps at scale 5: their schedule is in float32, ours in float64
TOL = dict(rtol=1e-4, atol=5e-5)  # single precision, times guidance scales up to 5


@pytest.fixture(scope="module")
def pipe():
    return random_pipeline("sd")[0]


G = torch.Generator().manual_seed(1)
PROMPT, NEGATIVE, LATENTS = (
    torch.randn(2, 7, 16, generator=G),
    torch.randn(1, 7, 16, generator=G).expand(2, -1, -1),
    torch.randn(2, 4, 8, 8, generator=G),
)


def theirs(pipe, **kwargs):
    side = 8 * pipe.vae_scale_factor
    return pipe(
        prompt_embeds=PROMPT,
        negative_prompt_embeds=NEGATIVE,
        latents=LATENTS.clone(),
        num_inference_steps=STEPS,
        output_type="latent",
        height=side,
        width=side,
        **{"guidance_scale": SCALE, **kwargs},
    ).images


def model(pipe):
    return from_diffusers(
        pipe.unet,
        pipe.scheduler if hasattr(pipe.scheduler, "betas") else None,
        null={"encoder_hidden_states": NEGATIVE},
    )


def ours(denoiser, solver=None):
    return sample(
        denoiser,
        solver or DDIM(),
        LATENTS,
        time_grid(denoiser.process, STEPS, "trailing"),
        cond={"encoder_hidden_states": PROMPT},
        progress=False,
    )


def test_cfg_is_the_pipelines(pipe):
    assert_close(ours(cfg(model(pipe), SCALE)), theirs(pipe), **TOL)


def test_apg_with_a_whole_parallel_part_is_the_pipelines_cfg(pipe):
    for space in ("x0", "eps"):
        assert_close(ours(apg(model(pipe), SCALE, eta=1.0, space=space)), theirs(pipe), **TOL)


def test_apg_is_diffusers_guider_on_raw_outputs(pipe):
    """Their guider combines network outputs, which is our space='eps'; both loops use their
    DDIM step."""
    guiders = pytest.importorskip("diffusers.guiders.adaptive_projected_guidance")
    d, w, buffer = model(pipe), SCALE, guiders.MomentumBuffer(-0.5)
    x, seen = LATENTS.clone(), []
    sch = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    sch.set_timesteps(STEPS)
    guided = apg(d, w, eta=0.2, r=4.0, beta=-0.5, space="eps")
    with torch.no_grad():
        for t, u in zip(sch.timesteps, time_grid(d.process, STEPS, "trailing").tolist()):
            c, n = (pipe.unet(x, t, encoder_hidden_states=e).sample for e in (PROMPT, NEGATIVE))
            eps = guiders.normalized_guidance(
                c, n, w - 1, buffer, 0.2, 4.0, use_original_formulation=True
            )
            seen.append((guided(x, u, encoder_hidden_states=PROMPT).eps - eps).abs().max().item())
            x = sch.step(eps, t, x).prev_sample
    assert max(seen) < 1e-4, seen  # float32; their projection is in float64 as ours


def test_adaptive_guidance_that_never_stops_is_the_pipelines_cfg(pipe):
    assert_close(ours(adaptive_cfg(model(pipe), SCALE, threshold=1.0)), theirs(pipe), **TOL)


def test_guidance_cut_off_after_some_steps_as_a_pipeline_callback_does(pipe):
    """diffusers' own recipe for dynamic guidance: a callback that sets the scale to 0 and
    halves the prompt after k steps. Here it is a plan."""
    k = 3

    def stop(pipe, i, t, kw):
        if i == k - 1:
            pipe._guidance_scale = 0.0
            kw["prompt_embeds"] = kw["prompt_embeds"].chunk(2)[-1]
        return kw

    d = policy(model(pipe), SCALE, ["cfg"] * k + ["cond"] * (STEPS - k))
    with count_evals(d) as n:
        mine = ours(d)
    assert n.rows == len(LATENTS) * (STEPS + k)
    assert_close(
        mine,
        theirs(
            pipe, callback_on_step_end=stop, callback_on_step_end_tensor_inputs=["prompt_embeds"]
        ),
        **TOL,
    )


@pytest.mark.parametrize("scale", [1.0, SCALE])
@pytest.mark.parametrize("name", ["mid_block.attentions.0", "up_blocks.0.attentions.0"])
def test_pag_is_the_pag_pipelines(pipe, name, scale):
    "The perturbed-attention pipeline: with and without classifier-free guidance."
    other = diffusers.StableDiffusionPAGPipeline(
        pipe.vae,
        None,
        None,
        pipe.unet,
        diffusers.DDIMScheduler.from_config(pipe.scheduler.config),
        None,
        None,
        requires_safety_checker=False,
        pag_applied_layers=[name],
    )
    other.set_progress_bar_config(disable=True)
    before = dict(pipe.unet.attn_processors)
    try:
        want = theirs(other, guidance_scale=scale, pag_scale=2.0)
    finally:
        pipe.unet.set_attn_processor(before)
    d = pag(
        model(pipe),
        2.0,
        layers=[name + ".transformer_blocks.0.attn1"],
        cfg_scale=None if scale == 1.0 else scale,
    )
    assert_close(ours(d), want, **TOL)


def test_every_guidance_under_the_scheduler_of_a_pipeline(pipe):
    """Our multistep solver as the pipeline's scheduler, and the loop with a guided denoiser:
    the same path."""
    own = pipe.scheduler
    try:
        d = model(pipe)
        pipe.scheduler = DiffusersScheduler(DPMSolverPP(order=2), like=own)
        want = theirs(pipe)
    finally:
        pipe.scheduler = own
    for guided in (cfg(d, SCALE), apg(d, SCALE, eta=1.0), adaptive_cfg(d, SCALE, threshold=1.0)):
        assert_close(ours(guided, DPMSolverPP(order=2)), want, **TOL)


# ---- guidance put into the pipeline: prompts, latents and the loop stay the pipeline's ----
GUIDANCES = {
    "cfg": lambda d: cfg(d, SCALE),
    "cfg in an interval": lambda d: cfg(d, SCALE, interval=(0.3, 0.8)),
    "apg": lambda d: apg(d, SCALE, eta=0.0, r=4.0, beta=-0.5),
    "adaptive": lambda d: adaptive_cfg(d, SCALE, threshold=0.99),
    "pag": lambda d: pag(d, 3.0, layers=["mid_block.attentions.0"]),
}


@pytest.mark.parametrize("name", GUIDANCES)
def test_guidance_inside_a_pipeline_is_the_loop(pipe, name):
    make, d = GUIDANCES[name], model(pipe)
    before = theirs(pipe)
    with guide_pipeline(pipe, make):
        got = theirs(pipe, guidance_scale=2.0)  # the number does not matter
        again = theirs(pipe, guidance_scale=9.0)
    assert_close(got, ours(make(d)), **TOL)
    assert_close(again, got, rtol=1e-4, atol=1e-5)
    assert_close(theirs(pipe), before, rtol=0, atol=0)  # nothing stays behind


def test_guidance_inside_a_pipeline_with_our_scheduler(pipe):
    own, make = pipe.scheduler, GUIDANCES["apg"]
    want = ours(make(model(pipe)), DPMSolverPP(2))
    try:
        pipe.scheduler = DiffusersScheduler(DPMSolverPP(2), like=own)
        with guide_pipeline(pipe, make):
            got = theirs(pipe)
    finally:
        pipe.scheduler = own
    assert_close(got, want, **TOL)


def test_a_second_guidance_replaces_the_first_until_it_is_removed(pipe):
    plain = theirs(pipe)
    first = guide_pipeline(pipe, GUIDANCES["apg"])
    one = theirs(pipe)
    with guide_pipeline(pipe, GUIDANCES["cfg"]):
        assert_close(theirs(pipe, guidance_scale=2.0), plain, **TOL)
    assert_close(theirs(pipe), one, rtol=0, atol=0)
    first.remove()
    assert_close(theirs(pipe), plain, rtol=0, atol=0)


def test_guidance_that_needs_a_negative_prompt_says_so(pipe):
    with guide_pipeline(pipe, GUIDANCES["cfg"]), pytest.raises(ValueError, match="negative prompt"):
        theirs(pipe, guidance_scale=1.0)
    with guide_pipeline(pipe, GUIDANCES["pag"]):  # this one needs none
        got = theirs(pipe, guidance_scale=1.0)
    assert_close(got, ours(GUIDANCES["pag"](model(pipe))), **TOL)


def test_what_cannot_be_guided_is_refused(pipe):
    with pytest.raises(TypeError, match="pipe must be a pipeline"):
        guide_pipeline(object(), GUIDANCES["cfg"])
    with guide_pipeline(pipe, lambda d: 3), pytest.raises(TypeError, match="guidance must make"):
        theirs(pipe)


SCALES = {"sdxl": "guidance_scale", "sd3": "guidance_scale", "flux": "true_cfg_scale"}


def shown(p, said, **kw):
    g = torch.Generator().manual_seed(3)
    return p(**said, num_inference_steps=STEPS, generator=g, **kw).images


@pytest.mark.parametrize("name", SCALES)
def test_our_scheduler_in_other_pipelines(name):
    (p, said), scale = random_pipeline(name), SCALES[name]
    own, kw = p.scheduler, {scale: SCALE}
    want = shown(p, said, **kw)
    p.scheduler = DiffusersScheduler(DDIM(), like=own)
    assert_close(shown(p, said, **kw), want, **TOL)


@pytest.mark.parametrize("name", SCALES)
def test_guidance_in_other_pipelines(name):
    (p, said), scale = random_pipeline(name), SCALES[name]
    want = shown(p, said, **{scale: SCALE})
    with guide_pipeline(p, GUIDANCES["cfg"]):
        got = shown(p, said, **{scale: 2.0})
        assert_close(got, want, **TOL)
    with guide_pipeline(p, GUIDANCES["apg"]):
        one = shown(p, said, **{scale: 2.0})
        two = shown(p, said, **{scale: 9.0})
    assert_close(two, one, **TOL)
    assert (one - want).abs().max() > 1e-3
    with guide_pipeline(p, GUIDANCES["cfg"]), pytest.raises(ValueError, match="negative prompt"):
        shown(p, said, **{scale: 1.0})
    assert_close(shown(p, said, **{scale: SCALE}), want, rtol=0, atol=0)
