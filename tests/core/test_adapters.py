"""The scheduler beside those of diffusers: timetables, options, flows, configs, trajectories."""

import inspect
import json
import pickle

import numpy as np
import pytest
import torch
from torch import nn

D = pytest.importorskip("diffusers")

import diffkit as dk  # noqa: E402
from diffkit.core.adapters import (  # noqa: E402
    DiffusersScheduler,
    from_diffusers,
    from_edm,
    process_of,
    random_pipeline,
)

F64 = torch.float64
SD = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
TRAILING = SD | dict(timestep_spacing="trailing")
FLOWS = {
    "plain": {},
    "shift 3": dict(shift=3.0),
    "shift to a terminal": dict(shift=3.0, shift_terminal=0.02),
    "karras": dict(use_karras_sigmas=True),
    "exponential": dict(use_exponential_sigmas=True),
    "beta": dict(use_beta_sigmas=True),
}
VPS = {  # class, options
    "ddim": (D.DDIMScheduler, dict(clip_sample=False)),
    "ddim leading": (
        D.DDIMScheduler,
        dict(timestep_spacing="leading", steps_offset=1, clip_sample=False),
    ),
    "ddim to the first step": (D.DDIMScheduler, dict(set_alpha_to_one=False, clip_sample=False)),
    "karras": (D.DPMSolverMultistepScheduler, dict(use_karras_sigmas=True)),
    "exponential": (D.DPMSolverMultistepScheduler, dict(use_exponential_sigmas=True)),
    "beta": (D.DPMSolverMultistepScheduler, dict(use_beta_sigmas=True)),
    "lu": (D.DPMSolverMultistepScheduler, dict(use_lu_lambdas=True)),
    "sigma_min": (D.DPMSolverMultistepScheduler, dict(final_sigmas_type="sigma_min")),
    "linspace": (D.DPMSolverMultistepScheduler, dict(timestep_spacing="linspace")),
    "unipc": (D.UniPCMultistepScheduler, dict(use_karras_sigmas=True)),
    "euler": (D.EulerDiscreteScheduler, dict(timestep_spacing="leading", steps_offset=1)),
    "euler linspace": (D.EulerDiscreteScheduler, dict(timestep_spacing="linspace")),
}


class Net(nn.Module):  # anything smooth
    def forward(self, x, t):
        return torch.tanh(x) * (0.5 + float(torch.as_tensor(t).reshape(-1)[0]) / 2000)


def run(scheduler, steps=8, x=None, how=None, net=None):  # as a pipeline does
    scheduler.set_timesteps(**({"num_inference_steps": steps} if how is None else how))
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)) if x is None else x
    net = net or Net()
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t), t, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_a_flow_is_taken_over_exactly(name, steps):
    theirs = D.FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    if steps == 1 and name not in ("plain", "shift 3"):
        return  # theirs divides by the number of gaps
    want, got = run(theirs, steps), run(ours, steps)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_custom_sigmas_and_the_dynamic_shift_are_taken_over():
    theirs = D.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    how = dict(sigmas=np.linspace(1.0, 1 / 6, 6), mu=0.8)
    torch.testing.assert_close(run(ours, how=how), run(theirs, how=how), rtol=1e-4, atol=1e-5)
    theirs = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    how = dict(sigmas=[1.0, 0.9, 0.7, 0.1])
    torch.testing.assert_close(run(ours, how=how), run(theirs, how=how), rtol=1e-4, atol=1e-5)
    # what pipelines ask for before they pass sigmas
    assert {"sigmas", "timesteps", "mu"} <= set(inspect.signature(ours.set_timesteps).parameters)
    with pytest.raises(ValueError, match="mu="):
        DiffusersScheduler(dk.DDIM(), prediction_type="flow_prediction").set_timesteps(4, mu=1.0)


def test_a_flow_of_our_own_shifts():
    ours = DiffusersScheduler(dk.DDIM(), prediction_type="flow_prediction", shift=3.0)
    ours.set_timesteps(4)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25])
    torch.testing.assert_close(ours.timesteps, 1000 * 3 * t / (1 + 2 * t))
    ours.set_timesteps(sigmas=[1.0, 0.5])
    torch.testing.assert_close(ours.sigmas, torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize(
    "kind", [D.UniPCMultistepScheduler, D.DPMSolverMultistepScheduler, D.DEISMultistepScheduler]
)
def test_flows_of_multistep_schedulers(kind):
    like = kind(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    process, predicts = process_of(like)
    assert isinstance(process, dk.Flow) and predicts == "flow"
    ours = DiffusersScheduler(dk.DDIM(), like=like)
    ours.set_timesteps(8)
    like.set_timesteps(8)
    assert torch.equal(ours.timesteps, like.timesteps)
    torch.testing.assert_close(ours.sigmas, like.sigmas)


def test_image_to_image_on_a_flow():
    theirs = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    x, n = torch.randn(2, 2, 4, 8, 8).unbind(0)
    for s in (ours, theirs):
        s.set_timesteps(10)
        s.set_begin_index(4)
    t = theirs.timesteps[4:5]
    torch.testing.assert_close(ours.scale_noise(x, t, n), theirs.scale_noise(x, t, n))
    a = b = ours.scale_noise(x, t, n)
    for t in theirs.timesteps[4:]:
        a = ours.step(Net()(a, t), t, a).prev_sample
        b = theirs.step(Net()(b, t), t, b).prev_sample
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", VPS)
@pytest.mark.parametrize("steps", [1, 4, 9])
def test_a_timetable_is_taken_over(name, steps):
    kind, options = VPS[name]
    like = kind(**(TRAILING | options))
    try:
        like.set_timesteps(steps)
    except (ValueError, IndexError, ZeroDivisionError):
        return  # theirs cannot do so few steps on this grid
    ours = DiffusersScheduler(dk.DPMSolverPP(2), like=like)
    ours.set_timesteps(steps)
    assert torch.equal(ours.timesteps, torch.as_tensor(like.timesteps))
    if hasattr(like, "sigmas"):
        want = torch.as_tensor(like.sigmas)
        torch.testing.assert_close(ours.sigmas, want.float(), rtol=2e-4, atol=1e-5)
    assert torch.isfinite(run(ours, steps)).all()


@pytest.mark.parametrize("options", [{}, dict(use_karras_sigmas=True), dict(use_lu_lambdas=True)])
def test_the_same_rule_on_their_grid_gives_their_samples(options):
    theirs = D.DPMSolverMultistepScheduler(**TRAILING, **options, lower_order_final=False)
    ours = DiffusersScheduler(dk.DPMSolverPP(2), like=theirs)
    torch.testing.assert_close(run(ours), run(theirs), rtol=2e-3, atol=2e-3)


def test_clipping_is_taken_over():
    for options in (dict(clip_sample=True), dict(clip_sample=False, thresholding=True)):
        theirs = D.DDIMScheduler(**TRAILING, **options)
        ours = DiffusersScheduler(dk.DDIM(), like=theirs)
        theirs.set_timesteps(8)
        ours.set_timesteps(8)
        x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        for t in theirs.timesteps:
            y = ours.step(3 * y, t, y).prev_sample
            # the noise follows from the clipped image, as it must
            x = theirs.step(3 * x, t, x, use_clipped_model_output=True).prev_sample
            torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)
        assert x.abs().max() <= 1 + 1e-6


@pytest.mark.parametrize("name", ["CogVideoXDDIMScheduler", "TCDScheduler"])
def test_a_scheduler_that_only_says_that_it_clips_is_not_clipped(name):
    like = getattr(D, name)(clip_sample=True)
    ours = DiffusersScheduler(dk.DDIM(), like=like, timestep_spacing="trailing")
    ours.set_timesteps(4)
    x = 5 * torch.ones(1, 4, 2, 2)
    out = ours.step(torch.zeros_like(x), ours.timesteps[0], x)
    assert out.pred_original_sample.abs().max() > 1


def test_a_scheduler_whose_betas_are_something_else_is_refused():
    with pytest.raises(ValueError, match="IPNDMScheduler has neither DDPM's table"):
        process_of(D.IPNDMScheduler())


def test_zero_terminal_snr():
    options = TRAILING | dict(rescale_betas_zero_snr=True, clip_sample=False)
    for kind in ("v_prediction", "sample"):
        theirs = D.DDIMScheduler(**options, prediction_type=kind)
        ours = DiffusersScheduler(dk.DDIM(), like=theirs)
        torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-4)
        assert float(DiffusersScheduler.from_config(theirs.config).process.alpha(1.0)) < 1e-6
    with pytest.raises(ValueError, match="zero terminal SNR"):
        DiffusersScheduler(dk.DDIM(), like=D.DDIMScheduler(**options))


def test_what_is_said_beside_like_wins():
    ddim = D.DDIMScheduler(**TRAILING, clip_sample=False)
    assert DiffusersScheduler(dk.DDIM(), like=ddim, prediction_type="v_prediction").kind == "v"
    s = DiffusersScheduler(dk.DDIM(), like=D.FlowMatchEulerDiscreteScheduler(), shift=3.0)
    assert s.config.shift == 3.0
    s = DiffusersScheduler(dk.DDIM(), like=ddim, timestep_spacing="karras")
    s.set_timesteps(8)
    k = D.DPMSolverMultistepScheduler(**TRAILING, use_karras_sigmas=True)
    k.set_timesteps(8)
    torch.testing.assert_close(s.sigmas[:-2], k.sigmas[:-2], rtol=0.02, atol=0)
    s = DiffusersScheduler(dk.DDIM(), like=ddim, final="sigma_min")
    s.set_timesteps(5)
    assert float(s.grid[-1]) == pytest.approx(1 / 1000)


def test_unknown_arguments_are_refused_by_name():
    ddim = D.DDIMScheduler(**TRAILING)
    with pytest.raises(TypeError, match="did you mean prediction_type"):
        DiffusersScheduler(dk.DDIM(), predicton_type="sample")
    with pytest.raises(TypeError, match="use_karras_sigmas"):
        DiffusersScheduler(dk.DDIM(), like=ddim, use_karras_sigmas=True)
    with pytest.raises(ValueError, match="takes no sigmas="):
        DiffusersScheduler(dk.DDIM(), like=ddim).set_timesteps(sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="between the nodes"):
        DiffusersScheduler(dk.DDIM(), like=D.KDPM2DiscreteScheduler(**SD))
    with pytest.raises(ValueError, match="3 entries"):
        DiffusersScheduler(dk.DDIM(), trained_betas=[0.1, 0.2, 0.3], num_train_timesteps=1000)
    assert len(DiffusersScheduler(dk.DDIM(), trained_betas=[0.1, 0.2, 0.3])) == 3
    with pytest.raises(ValueError, match="num_inference_steps"):
        DiffusersScheduler(dk.DDIM()).set_timesteps(2.5)
    with pytest.raises(ValueError, match="steps_offset=1"):
        s = DiffusersScheduler(dk.DDIM(), timestep_spacing="leading", steps_offset=1)
        s.set_timesteps(1000)
    DiffusersScheduler(dk.DDIM()).set_timesteps(np.int64(20))
    with pytest.raises(ValueError, match="shift=3.0 belongs to a flow"):
        DiffusersScheduler(dk.DDIM(), shift=3.0)
    with pytest.raises(ValueError, match="shift must be a positive number"):
        DiffusersScheduler(dk.DDIM(), prediction_type="flow_prediction", shift="3")
    s = DiffusersScheduler(dk.DDIM())
    for bad in ([], "karras", [float("nan"), 0.5]):
        with pytest.raises(ValueError, match="sigmas must be a list of finite numbers"):
            s.set_timesteps(sigmas=bad)
    with pytest.raises(ValueError, match="must decrease"):
        s.set_timesteps(sigmas=[0.1, 0.5])
    s.set_timesteps(4)
    for bad in (-1, 4, 0.5):
        with pytest.raises(ValueError, match="begin_index must lie in 0 to 3"):
            s.set_begin_index(bad)


def test_pndm_is_read_without_the_nodes_of_its_own_rule():
    for skip in (True, False):
        ours = DiffusersScheduler(dk.DDIM(), like=D.PNDMScheduler(**SD, skip_prk_steps=skip))
        ours.set_timesteps(4)
        assert ours.timesteps.tolist() == [750, 500, 250, 0]


def test_a_schedule_that_was_moved_after_its_betas_is_taken_over():
    how = dict(timestep_spacing="trailing", prediction_type="v_prediction")
    theirs = D.CogVideoXDDIMScheduler(**how)
    assert theirs.config.snr_shift_scale == 3 and theirs.config.clip_sample  # ... and never does
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    torch.testing.assert_close(ours.alphas_cumprod.double(), theirs.alphas_cumprod.double())
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-3, atol=1e-4)


def test_our_scheduler_is_read_like_any_other():
    k = D.DPMSolverMultistepScheduler(**TRAILING, use_karras_sigmas=True)
    one = DiffusersScheduler(dk.DDIM(), like=k)
    two = DiffusersScheduler(dk.DPMSolverPP(2), like=one)
    three = DiffusersScheduler(dk.DPMSolverPP(2), like=DiffusersScheduler(dk.DDIM(), **SD))
    for s in (two, three):
        s.set_timesteps(8)
    k.set_timesteps(8)
    assert torch.equal(two.timesteps, k.timesteps)
    assert from_diffusers(Net(), one).process == one.process
    back = D.DPMSolverMultistepScheduler.from_config(two.config)
    assert back.config.use_karras_sigmas
    torch.testing.assert_close(two.betas, k.betas)
    torch.testing.assert_close(two.alphas_cumprod, k.alphas_cumprod)
    flow = DiffusersScheduler(dk.DDIM(), like=D.FlowMatchEulerDiscreteScheduler(shift=3.0))
    assert D.FlowMatchEulerDiscreteScheduler.from_config(flow.config).config.shift == 3.0


@pytest.mark.parametrize(
    "like",
    [
        None,
        D.DDIMScheduler(**TRAILING, clip_sample=False),
        D.DPMSolverMultistepScheduler(**TRAILING, use_karras_sigmas=True),
        D.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_a_saved_config_gives_the_same_scheduler(like, tmp_path):
    one = DiffusersScheduler(dk.DPMSolverPP(3, form="x0"), like=like)
    two = DiffusersScheduler.from_config(json.loads(one.to_json_string()))
    one.save_pretrained(tmp_path)
    for again in (two, DiffusersScheduler.from_pretrained(tmp_path)):
        assert repr(again.solver) == repr(one.solver)
        torch.testing.assert_close(run(again), run(one), rtol=0, atol=0)
    if like is not None:  # straight from the config of theirs
        again = DiffusersScheduler.from_config(like.config, solver=one.solver)
        torch.testing.assert_close(run(again), run(one), rtol=0, atol=0)


def test_a_trajectory_leaves_nothing_behind():
    s = DiffusersScheduler(dk.DPMSolverPP(2), like=D.DDIMScheduler(**TRAILING, clip_sample=False))
    want = run(s)
    s.set_timesteps(10)
    s.set_begin_index(5)
    s.set_timesteps(10)
    x = torch.zeros(1, 4, 8, 8)
    s.step(x, s.timesteps[0], x)
    assert s.step_index == 1 and s.begin_index is None
    torch.testing.assert_close(run(s), want, rtol=0, atol=0)
    # two schedulers with one solver, in turns
    solver = dk.DPMSolverPP(2)
    a, b = (DiffusersScheduler(solver) for _ in range(2))
    alone = run(DiffusersScheduler(dk.DPMSolverPP(2)))
    a.set_timesteps(8)
    b.set_timesteps(8)
    x = y = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in a.timesteps:
        x = a.step(Net()(x, t), t, x).prev_sample
        y = b.step(Net()(y, t), t, y).prev_sample
    torch.testing.assert_close(x, alone, rtol=0, atol=0)
    torch.testing.assert_close(y, alone, rtol=0, atol=0)


def test_a_step_tells_the_clean_data():
    theirs = D.DDIMScheduler(**TRAILING, clip_sample=False)
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    x = torch.randn(2, 4, 8, 8)
    for s in (ours, theirs):
        s.set_timesteps(5)
    t = ours.timesteps[0]
    a, b = (s.step(torch.tanh(x), t, x) for s in (ours, theirs))
    torch.testing.assert_close(a.pred_original_sample, b.pred_original_sample, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(a[0], b.prev_sample, rtol=1e-4, atol=1e-5)


def test_noising_without_times_changes_nothing():
    s = DiffusersScheduler(dk.DDIM())
    x = torch.randn(2, 4, 8, 8)
    assert torch.equal(s.add_noise(x, x, torch.zeros(0)), x)


def flux():
    return random_pipeline("flux")[0].transformer


def sd3():
    return random_pipeline("sd3")[0].transformer


def test_flow_models_are_called_as_their_pipelines_do():
    like = D.FlowMatchEulerDiscreteScheduler(shift=3.0)
    g = torch.Generator().manual_seed(1)
    draw = lambda *n: torch.randn(*n, generator=g)
    cases = {
        "flux": (
            flux(),
            draw(2, 9, 16),
            dict(
                encoder_hidden_states=draw(2, 3, 16),
                pooled_projections=draw(2, 8),
                img_ids=torch.arange(27.0).reshape(1, 9, 3),  # one row for all
                txt_ids=torch.zeros(1, 3, 3),
            ),
            1.0,
        ),
        "sd3": (
            sd3(),
            draw(2, 4, 8, 8),
            dict(encoder_hidden_states=draw(2, 3, 16), pooled_projections=draw(2, 8)),
            1000.0,
        ),
    }
    for model, x, cond, times in cases.values():
        like.set_timesteps(6)
        want = x
        with torch.no_grad():
            for t in like.timesteps:
                fed = (t * times / 1000).expand(2)
                one = {k: v[0] if k.endswith("_ids") else v for k, v in cond.items()}
                out = model(hidden_states=want, timestep=fed, return_dict=False, **one)[0]
                want = like.step(out, t, want, return_dict=False)[0]
        ours = DiffusersScheduler(dk.DDIM(), like=like)
        ours.set_timesteps(6)
        d = from_diffusers(model, like)
        got = dk.sample(d, dk.DDIM(), x, ours.grid, cond=cond, progress=False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_high_order_solvers_beat_euler_on_flows(kind, shift):
    "At ten steps, on the pipelines' own timetables, nearer to 400 steps of Euler."
    g = torch.Generator().manual_seed(5)
    draw = lambda *n: torch.randn(*n, generator=g)
    cond = dict(encoder_hidden_states=draw(2, 3, 16), pooled_projections=draw(2, 8))
    if kind == "flux":
        cond |= dict(img_ids=torch.zeros(1, 9, 3), txt_ids=torch.zeros(1, 3, 3))
    model, x = (sd3(), draw(2, 4, 8, 8)) if kind == "sd3" else (flux(), draw(2, 9, 16))
    like = D.FlowMatchEulerDiscreteScheduler(shift=shift)
    net = from_diffusers(model, like).net
    fed = 1000.0 if kind == "flux" else 1.0
    ask = lambda y, t: net(y, (t / fed).expand(2), **cond)
    with torch.no_grad():
        end = lambda solver, n: run(DiffusersScheduler(solver, like=like), n, x, net=ask)
        fine = end(dk.DDIM(), 400)
        off = lambda solver: dk.rms(end(solver, 10), fine)
        euler = off(dk.DDIM())
        for solver in (dk.DPMSolverPP(2), dk.UniPC(), dk.DEIS()):
            assert off(solver) < 0.8 * euler, solver


def test_times_and_signs_by_class():
    flow = D.FlowMatchEulerDiscreteScheduler()
    d = from_diffusers(flux(), flow)
    assert float(d.time_input(torch.tensor(0.5))) == 0.5 and d.net.sign == 1
    assert float(from_diffusers(sd3(), flow).time_input(torch.tensor(0.5))) == 500
    for name, time, sign in (
        ("Lumina2Transformer2DModel", 0.75, -1),
        ("ZImageTransformer2DModel", 0.75, -1),
        ("MochiTransformer3DModel", 750.0, -1),
        ("HiDreamImageTransformer2DModel", 250.0, -1),
        ("WanTransformer3DModel", 250.0, 1),
        ("QwenImageTransformer2DModel", 0.25, 1),
    ):
        if not hasattr(D, name):  # a class that this version of diffusers does not have yet
            continue
        kind = getattr(D, name)
        model = kind.__new__(kind)
        nn.Module.__init__(model)
        d = from_diffusers(model, flow)
        assert float(d.time_input(torch.tensor(0.25))) == time, name
        assert d.net.sign == sign, name
    with pytest.raises(ValueError, match="time_input="):
        from_diffusers(Net(), flow)


def test_a_model_with_inverted_sigmas():  # Mochi: the time runs from the noise to the data
    theirs = D.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    ours = DiffusersScheduler(dk.DDIM(), like=theirs)
    torch.testing.assert_close(run(ours), run(theirs), rtol=1e-4, atol=1e-5)


def test_adapters_can_be_pickled():
    d = from_edm(Net())
    again = pickle.loads(pickle.dumps(d))
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(again(x, 0.5).x0, d(x, 0.5).x0)
    pickle.loads(pickle.dumps(from_diffusers(sd3(), D.FlowMatchEulerDiscreteScheduler())))


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
def test_a_list_of_noise_levels_may_end_with_its_zero(kind):
    "As the `sigmas` of every scheduler of diffusers do, ours too."
    s = DiffusersScheduler(dk.DDIM(), prediction_type=kind)
    levels = [0.9, 0.5, 0.25] if kind == "flow_prediction" else [14.0, 2.0, 0.3]
    s.set_timesteps(sigmas=levels)
    want, fed, out = s.grid, s.timesteps, run(s, how=dict(sigmas=levels))
    assert len(fed) == 3 and want[-1] == 0
    torch.testing.assert_close(s.sigmas, torch.tensor([*levels, 0.0]), rtol=1e-6, atol=0)
    for closed in ([*levels, 0], np.array([*levels, 0.0]), torch.tensor([*levels, 0.0], dtype=F64)):
        assert torch.equal(run(s, how=dict(sigmas=closed)), out)
        assert torch.equal(s.grid, want) and torch.equal(s.timesteps, fed)
    s.set_timesteps(sigmas=s.sigmas)  # its own
    torch.testing.assert_close(s.grid, want)
