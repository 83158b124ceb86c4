"""ProDiff: the schedule, the two-step target against the paper's formula and diffusers, perfect
students, variance in closed form, masks and padding, the shipped speech and models, every error."""

import copy
import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.signal import resample_poly
from torch import nn
from torch.testing import assert_close

from diffkit.audio import prodiff
from diffkit.audio.prodiff import (
    SPEECH,
    VOICES,
    WORDS,
    DiffNet,
    MelLoss,
    TinyTTS,
    TwoStep,
    build_speech,
    distill_loss,
    frame_mask,
    gaussian_gain,
    halve,
    length_regulate,
    masked_mse,
    phoneme_ids,
    progressive_distill,
    render_phrases,
    save_speech,
    speech,
    speech_denoiser,
    speech_model,
    ssim,
    step_weight,
    train_speech,
    tts_loss,
    two_step_target,
    vpsde_betas,
)
from diffkit.audio.signal import log_mel
from diffkit.core.data import GaussianMixture, four_gaussians
from diffkit.core.denoiser import MixtureDenoiser, NetDenoiser, Prediction, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow
from diffkit.core.sampling import DDIM, sample

F64 = torch.float64
MIX = four_gaussians()


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def rand(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, generator=gen(seed), dtype=dtype)


def grid(n):
    return torch.linspace(1, 0, n + 1, dtype=F64)


def run(model, x, g, **cond):
    return sample(model, DDIM(), x, g, cond=cond or None, progress=False)


# ---------------------------------------------------------------- the schedule


def test_published_schedule():
    b = vpsde_betas(5)
    a = (1 - b).cumprod(0).sqrt()
    lam = Discrete(b).log_snr(torch.arange(1, 6, dtype=F64) / 5)
    near = lambda v, want, tol: assert_close(v, torch.tensor(want, dtype=F64), atol=tol, rtol=0)
    # the official table, rounded as published
    near(b, [0.5587, 0.9105, 0.9819, 0.9963, 0.9993], 5.1e-5)
    near(a[:4], [0.6643, 0.1987, 0.02676, 0.00162], 5.1e-5)
    assert abs(float(a[4]) - 4.4e-5) < 5e-7
    near(lam, [-0.118, -1.596, -3.621, -6.424, -10.025], 5.1e-4)


@pytest.mark.parametrize("b0,b1", [(0.1, 40.0), (0.1, 10.0), (3.0, 3.0)])
def test_schedule_is_the_continuous_process_cut_exactly(b0, b1):
    for n in (1, 2, 7, 100):
        t = torch.arange(1, n + 1, dtype=F64) / n
        # at t = 1 alpha is 4e-5 and 1 - beta is formed by a subtraction: relative rounding
        cut = Discrete(vpsde_betas(n, b0, b1)).alpha(t)
        assert_close(cut, VP(b0, b1).alpha(t), rtol=1e-8, atol=0)


@pytest.mark.parametrize("bad,text", [
    (dict(steps=0), "steps=0"), (dict(steps=2.0), "steps=2.0"), (dict(steps=4, b0=0.0), "b0=0.0"),
    (dict(steps=4, b0=2.0, b1=1.0), "b1=1.0"),
])  # fmt: skip
def test_schedule_refuses(bad, text):
    with pytest.raises(ValueError, match=text):
        vpsde_betas(**bad)


# ---------------------------------------------------------------- the target


PROCESSES = [VP(), Cosine(), VE(), EDM(), Flow(), Discrete(vpsde_betas(4)), Discrete()]


@pytest.mark.parametrize("p", PROCESSES, ids=lambda p: type(p).__name__)
def test_target_is_the_papers_quotient(p):
    teacher = MixtureDenoiser(MIX, p)
    for i, (t, t1, t2) in enumerate([(0.9, 0.5, 0.2), (0.75, 0.5, 0.25), (0.3, 0.29, 0.1)]):
        x = p.noise(rand(40, 2, seed=i), t, eps=rand(40, 2, seed=9))
        two = run(teacher, x, torch.tensor([t, t1, t2], dtype=F64))
        r = p.sigma(t2) / p.sigma(t)
        quotient = (two - r * x) / (p.alpha(t2) - r * p.alpha(t))
        target = two_step_target(teacher, x, t, t1, t2)
        assert_close(target, quotient, atol=1e-9, rtol=1e-9)  # the quotient cancels digits
        one = r * x + (p.alpha(t2) - r * p.alpha(t)) * target  # one step from the target
        assert_close(one, two, atol=1e-10, rtol=1e-9)
        rho = [float(p.log_snr(v).exp()) for v in (t, t1, t2)]
        w = (rho[1] - rho[0]) / (rho[2] - rho[0])
        assert abs(float(step_weight(p, t, t1, t2)) - w) < 1e-11


def test_target_at_clean_data_is_the_second_prediction():
    teacher = MixtureDenoiser(MIX, Discrete(vpsde_betas(4)))
    x = rand(20, 2)
    assert float(step_weight(teacher.process, 0.5, 0.25, 0.0)) == 0
    x1 = run(teacher, x, torch.tensor([0.5, 0.25], dtype=F64))
    target = two_step_target(teacher, x, 0.5, 0.25, 0.0)
    assert_close(target, teacher(x1, 0.25).x0, atol=1e-13, rtol=0)
    # and it is not the first
    assert (target - teacher(x, 0.5).x0).abs().max() > 0.01


def test_target_from_pure_noise_in_float32():
    # alpha is 4e-5: the quotient has lost half its digits, the mean has not
    teacher = MixtureDenoiser(MIX, Discrete(vpsde_betas(4)))
    x = rand(200, 2)
    wide = two_step_target(teacher, x, 1.0, 0.75, 0.5)
    narrow = two_step_target(teacher, x.float(), 1.0, 0.75, 0.5)
    assert narrow.dtype == torch.float32
    assert_close(narrow.double(), wide, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", ["eps", "v", "score", "flow"])
def test_target_does_not_depend_on_the_parametrisation(kind):
    p = Discrete(vpsde_betas(4, b1=10.0))
    exact = MixtureDenoiser(MIX, p)
    other = NetDenoiser(lambda x, n: exact(x, (n + 1) / 4).get(kind), p, kind)
    x = rand(20, 2)
    a = two_step_target(other, x, 1.0, 0.75, 0.5)
    assert_close(a, two_step_target(exact, x, 1.0, 0.75, 0.5), atol=1e-10, rtol=0)


def test_target_with_a_time_a_sample_and_conditions():
    teacher = MixtureDenoiser(MIX, VP())
    x, label = rand(3, 2), torch.tensor([0, 1, 3])
    t = torch.tensor([[0.9, 0.6, 0.3], [0.7, 0.4, 0.2], [0.5, 0.1, 0.01]], dtype=F64)
    all_ = two_step_target(teacher, x, *t, label=label)
    for i in range(3):
        one = two_step_target(teacher, x[i : i + 1], *t[:, i].tolist(), label=label[i : i + 1])
        assert_close(all_[i : i + 1], one)
    assert (all_ - two_step_target(teacher, x, *t)).abs().max() > 0.01  # the label counts
    guided = two_step_target(cfg(teacher, 2.0), x, 0.7, 0.5, 0.2, label=label)
    assert (guided - two_step_target(teacher, x, 0.7, 0.5, 0.2, label=label)).abs().max() > 1e-3


def test_target_is_differentiable():
    teacher = MixtureDenoiser(MIX, VP())
    x = rand(2, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: two_step_target(teacher, x, 0.8, 0.5, 0.2), (x,))


BACK = [(0.5, 0.5, 0.1), (0.5, 0.2, 0.2), (0.1, 0.3, 0.5), (0.5, 0.7, 0.2)]


@pytest.mark.parametrize("times", BACK)
def test_target_refuses_times_that_do_not_fall(times):
    with pytest.raises(ValueError, match="must decrease"):
        two_step_target(MixtureDenoiser(MIX, VP()), rand(2, 2), *times)
    with pytest.raises(TypeError, match="teacher"):
        two_step_target(nn.Linear(2, 2), rand(2, 2), 0.9, 0.5, 0.1)


@pytest.mark.parametrize("t", [torch.ones(3), torch.ones(2, 1), torch.ones(1, 2)])
def test_target_refuses_times_of_another_shape(t):
    x, teacher = rand(2, 2), MixtureDenoiser(MIX, VP())
    for name, times in (("t", (t, 0.5, 0.1)), ("t1", (0.9, t / 2, 0.1)), ("t2", (0.9, 0.5, 0 * t))):
        with pytest.raises(ValueError, match=rf"^{name} has shape .* must be a number, or .2,."):
            two_step_target(teacher, x, *times)


class Dropping(nn.Module):
    "Half of it is dropped in training; a part is kept in eval mode, as frozen layers are."

    def __init__(self):
        super().__init__()
        self.a, self.drop, self.frozen = nn.Linear(2, 2), nn.Dropout(0.5), nn.Dropout(0.5)
        self.frozen.eval()
        self.modes, self.fails = [], False

    def forward(self, x, t):
        if self.fails:
            raise RuntimeError("stop")
        self.modes.append((self.training, self.drop.training))
        return self.frozen(self.drop(self.a(x)))


def test_a_teacher_in_train_mode_drops_nothing_and_gets_its_mode_back():
    torch.manual_seed(0)
    net, x, g = Dropping().double(), rand(30, 2), grid(4)
    teacher = NetDenoiser(net, Discrete(vpsde_betas(4, b1=10.0)), "x0")
    want = two_step_target(copy.deepcopy(teacher).eval(), x, 1.0, 0.75, 0.5)
    modes = lambda: [m.training for m in teacher.modules()]
    before = modes()
    assert before == [True, True, True, True, False]
    assert torch.equal(two_step_target(teacher, x, 1.0, 0.75, 0.5), want) and modes() == before
    student = TwoStep(teacher, g).train()
    net.frozen.eval()
    assert torch.equal(student(x, 1.0).x0, want) and modes() == before
    zero = NetDenoiser(lambda x, t: 0 * x, teacher.process, "x0")
    how = dict(eps=x, at=torch.zeros(30, dtype=torch.int64))  # alpha x_0 = 0: the state is eps
    states = teacher.process.sigma(torch.tensor(1.0, dtype=F64)) * x
    got = distill_loss(zero, teacher, 0 * x, g, **how)
    assert_close(got, two_step_target(teacher, states, 1.0, 0.75, 0.5).abs().mean())
    assert modes() == before
    net.fails = True
    with pytest.raises(RuntimeError, match="stop"):
        two_step_target(teacher, x, 1.0, 0.75, 0.5)
    assert modes() == before
    net.fails = False
    net.modes.clear()
    progressive_distill(teacher, g, x, 2, student=zero_net(), progress=False)
    assert set(net.modes) == {(False, False)} and modes() == before


def zero_net():
    return NetDenoiser(Dropping().double(), Discrete(vpsde_betas(4, b1=10.0)), "x0")


def test_a_student_still_trains_in_train_mode():
    teacher = zero_net().eval()
    out = progressive_distill(teacher, grid(4), rand(8, 2), 2, progress=False)[0]
    assert (True, True) in out.run.model.net.modes and not teacher.training


def test_noise_says_nothing_of_data_where_alpha_is_0():
    torch.manual_seed(0)
    x0, net = rand(8, 2, dtype=torch.float32), nn.Linear(2, 2)
    for p in (Flow(), Cosine()):
        for kind, word in (("eps", "noise"), ("score", "a score")):
            if kind == "score" and not p.gaussian:
                continue
            teacher = NetDenoiser(lambda x, t: net(x), p, kind)
            says = f"t=1, where alpha is 0 and {word}, which teacher predicts, says nothing of x0"
            for call in (
                lambda m: distill_loss(m, m, x0, grid(4)),
                lambda m: progressive_distill(m, grid(4), x0, 1, student=m),
                lambda m: distill_loss(TwoStep(m, grid(4)), TwoStep(m, grid(4)), x0, grid(2)),
                lambda m: two_step_target(m, x0, 1.0, 0.5, 0.2),
                lambda m: two_step_target(m, x0, torch.tensor([0.9, 1.0] * 4), 0.5, 0.2),
            ):
                with pytest.raises(ValueError, match=says + ": start below, or predict x0"):
                    call(teacher)
            good = MixtureDenoiser(MIX, p)
            with pytest.raises(ValueError, match="grid starts at t=1.*which student predicts"):
                distill_loss(teacher, good, x0, grid(4))
            below = torch.linspace(0.9, 0, 5, dtype=F64)
            assert distill_loss(teacher, good, x0, below).isfinite()
        for kind in ("x0", "v", "flow"):
            m = NetDenoiser(lambda x, t: net(x), p, kind)
            assert distill_loss(m, m, x0, grid(4)).isfinite()
    m = NetDenoiser(lambda x, t: net(x), Discrete(vpsde_betas(4)), "eps")  # alpha is 4e-5
    assert distill_loss(m, m, x0, grid(4)).isfinite()


def test_diffusers_scheduler():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    theirs = diffusers.DDIMScheduler(
        1000, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    theirs.set_timesteps(8)
    p = Discrete()  # the same table of betas
    exact = MixtureDenoiser(MIX, p)
    x = y = rand(30, 2)
    for n in theirs.timesteps[2:4]:
        eps = exact(y, (float(n) + 1) / 1000).eps
        y = theirs.step(eps, int(n), y).prev_sample
    t, t1, t2 = ((float(n) + 1) / 1000 for n in theirs.timesteps[2:5])
    target = two_step_target(exact, x, t, t1, t2)
    r = p.sigma(t2) / p.sigma(t)
    # they accumulate alphas in float32
    assert_close(r * x + (p.alpha(t2) - r * p.alpha(t)) * target, y, atol=2e-5, rtol=0)


# ---------------------------------------------------------------- students


def test_perfect_students_make_the_teachers_samples():
    p = Discrete(vpsde_betas(16))
    model, g, x = MixtureDenoiser(MIX, p), grid(16), rand(50, 2)
    want = run(model, x, g)
    for n in (8, 4, 2, 1):
        model, g = TwoStep(model, g), halve(g)
        assert len(g) == n + 1
        assert_close(run(model, x, g), want, atol=1e-9, rtol=0)  # float64, 16 steps
    assert (run(MixtureDenoiser(MIX, p), x, g) - want).abs().max() > 0.1


def test_perfect_student_on_other_processes_float32_and_rows():
    for p in (VP(), EDM(), Cosine()):
        g = torch.linspace(0.9, 0.1, 5, dtype=F64)
        teacher = MixtureDenoiser(MIX, p)
        x = p.noise(rand(20, 2), 0.9, eps=rand(20, 2, seed=1))
        student = TwoStep(teacher, g)
        assert_close(run(student, x, halve(g)), run(teacher, x, g), atol=1e-9, rtol=1e-9)
        low = run(student, x.float(), halve(g))
        # float32 states of size |x|
        assert_close(low.double(), run(teacher, x, g), atol=1e-4 * float(x.abs().max()), rtol=0)
        t = torch.tensor([0.9, 0.5], dtype=torch.float32)  # 0.9 is not 0.9 in float32
        both = student(x[:2].float(), t).x0
        assert_close(both[1:].double(), student(x[1:2], 0.5).x0, atol=1e-3, rtol=1e-3)


def test_students_refuse():
    teacher = MixtureDenoiser(MIX, VP())
    with pytest.raises(ValueError, match="grid has 3 steps"):
        TwoStep(teacher, grid(3))
    s = TwoStep(teacher, grid(4))
    for t in (0.75, 0.6, 0.0):
        with pytest.raises(ValueError, match="must be one of 1, 0.5"):
            s(rand(2, 2), t)
    assert halve(grid(4)).tolist() == [1.0, 0.5, 0.0]


# ---------------------------------------------------------------- variance

# by hand, for the card: the paper's schedule, exact denoiser of N(m, s^2)
TABLE = [
    (4, 1, 0.182, 0.469), (8, 1, 0.418, 0.714), (64, 1, 0.903, 0.960), (4, 2, 0.024, 0.080),
]  # fmt: skip


@pytest.mark.parametrize("n,skip,small,one", TABLE)
def test_variance_table(n, skip, small, one):
    g, p = grid(n)[::skip], Discrete(vpsde_betas(n))
    got = gaussian_gain(p, g, torch.tensor([0.3, 1.0], dtype=F64))
    assert_close(got, torch.tensor([small, one], dtype=F64), atol=5.1e-4, rtol=0)  # as published
    for s, v in zip((0.3, 1.0), got.tolist()):
        # independent: the sampler's map is a line; its slope times the start's spread
        model = MixtureDenoiser(GaussianMixture([[0.7]], scales=s), p)
        y = run(model, torch.tensor([[0.0], [1.0]], dtype=F64), g)
        start = math.sqrt(float(p.alpha(1.0)) ** 2 * s**2 + float(p.sigma(1.0)) ** 2)
        assert abs(float(y[1] - y[0]) * start / s - v) < 1e-10


def test_cosine_row_of_the_card():
    # alpha = cos(pi t / 2) from t = 0.98: its numbers; the core's Cosine from 1 keeps less
    class Plain(VP):
        def _alpha(self, t):
            return (math.pi / 2 * t).cos()

        def _var(self, t):
            return (math.pi / 2 * t).sin() ** 2

    s = torch.tensor([0.3, 1.0], dtype=F64)
    for n, want in ((4, (0.550, 0.738)), (64, (0.966, 0.982)), (2, (0.283, 0.516))):
        got = gaussian_gain(Plain(), 0.98 * grid(n), s)
        assert_close(got, torch.tensor(want, dtype=F64), atol=5.1e-4, rtol=0)
    # s = 1: each step multiplies by the cosine of its angle
    assert_close(gaussian_gain(Plain(), grid(4), 1.0).item(), math.cos(math.pi / 8) ** 4)


def test_gain_tends_to_one_and_is_refused():
    p = Discrete(vpsde_betas(4))
    assert abs(float(gaussian_gain(p, grid(4), 1e8)) - 1) < 1e-6  # alpha s is 4e3: nothing is lost
    v = VP()
    e = [1 - float(gaussian_gain(v, 0.999 * grid(n) + 0.001, 0.5)) for n in (64, 128, 256)]
    assert 1.9 < e[0] / e[1] < 2.1 and 1.9 < e[1] / e[2] < 2.1  # DDIM is of first order
    with pytest.raises(ValueError, match="sd=0"):
        gaussian_gain(p, grid(4), 0.0)


# ---------------------------------------------------------------- the loss of distillation


def test_loss_is_zero_for_the_perfect_student_only():
    p = Discrete(vpsde_betas(8))
    teacher, x0 = MixtureDenoiser(MIX, p), rand(60, 2)
    loss = lambda s, **k: float(distill_loss(s, teacher, x0, grid(8), generator=gen(1), **k))
    assert loss(TwoStep(teacher, grid(8))) < 1e-12
    assert loss(teacher) > 1e-2
    label = torch.arange(60) % 4
    assert loss(TwoStep(teacher, grid(8)), label=label) < 1e-12  # conditions reach both


def test_loss_is_the_mean_over_the_mask_at_the_steps_asked_for():
    p = Discrete(vpsde_betas(4))
    teacher, x0, eps = MixtureDenoiser(MIX, p), rand(4, 2), rand(4, 2, seed=3)
    zero = NetDenoiser(lambda x, t: 0 * x, p, "x0")
    at = torch.tensor([0, 1, 0, 1])
    want = []
    for i, k in enumerate(at.tolist()):
        t, t1, t2 = grid(4)[2 * k : 2 * k + 3].tolist()
        x = p.noise(x0[i : i + 1], t, eps[i : i + 1])
        want.append(two_step_target(teacher, x, t, t1, t2))
    want = torch.cat(want)
    how = dict(at=at, eps=eps)
    assert_close(distill_loss(zero, teacher, x0, grid(4), **how), want.abs().mean())
    m = torch.tensor([[True, False]] * 3 + [[False, False]])
    got = distill_loss(zero, teacher, x0, grid(4), mask=m, **how)
    assert_close(got, want[:3, 0].abs().mean())
    square = lambda o, y, m: (o - y).square().mean()
    assert_close(distill_loss(zero, teacher, x0, grid(4), loss=square, **how), want.square().mean())


def test_loss_draws_each_step_and_spares_the_teacher():
    p = Discrete(vpsde_betas(4))
    seen = []

    class Spy(NetDenoiser):
        def forward(self, x, t, **cond):
            seen.append(t)
            return super().forward(x, t, **cond)

    net = nn.Linear(2, 2)
    teacher = NetDenoiser(lambda x, t: net(x), p, "x0")
    student = Spy(lambda x, t: 2 * x, p, "x0")
    distill_loss(student, teacher, rand(400, 2, dtype=torch.float32), grid(4), generator=gen())
    share = (seen[0] == 1.0).double().mean()
    assert set(seen[0].tolist()) == {1.0, 0.5} and abs(share - 0.5) < 0.1  # 4 deviations
    assert net.weight.grad is None
    own = NetDenoiser(lambda x, t: net(x), p, "x0")
    distill_loss(own, own, rand(4, 2, dtype=torch.float32), grid(4)).backward()
    through_student = net.weight.grad.clone()
    net.zero_grad()
    torch.manual_seed(0)
    assert through_student.abs().sum() > 0


def test_loss_refuses():
    p = Discrete(vpsde_betas(4))
    teacher, x0 = MixtureDenoiser(MIX, p), rand(4, 2)
    with pytest.raises(ValueError, match="student has VP.*must be the teacher's"):
        distill_loss(MixtureDenoiser(MIX, VP()), teacher, x0, grid(4))
    with pytest.raises(ValueError, match="grid has 3 steps"):
        distill_loss(teacher, teacher, x0, grid(3))
    for at in (torch.tensor([0, 1]), torch.tensor([0, 1, 2, 0]), torch.tensor([0.0, 1, 0, 0])):
        with pytest.raises(ValueError, match="at="):
            distill_loss(teacher, teacher, x0, grid(4), at=at)


@pytest.mark.parametrize("shape", [(5, 7), (5, 5), (7,), (1, 1, 7), (5, 5, 1), (5, 3, 7), ()])
def test_masks_that_would_be_laid_along_the_wrong_axis_are_refused(shape):
    x, m = rand(5, 5, 7), torch.ones(shape, dtype=torch.bool)  # B = bins
    says = r"mask has shape .*: must be \(B, 1, frames\), here \(5, 1, 7\)"
    p = Discrete(vpsde_betas(4))
    zero = NetDenoiser(lambda x, t: 0 * x, p, "x0")
    net = DiffNet(5, 4, 1, 4).double()
    for call in (
        lambda: distill_loss(zero, zero, x, grid(4), mask=m),
        lambda: distill_loss(zero, zero, x, grid(4), mask=m, loss=lambda o, y, m: o.mean()),
        lambda: MelLoss()(x, 2 * x, m),
        lambda: MelLoss(ssim=0)(x, 2 * x, m),
        lambda: masked_mse(x, 2 * x, m),
        lambda: net(x, torch.zeros(5), rand(5, 4, 7), m),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    if shape != (5, 7):
        with pytest.raises(ValueError, match=r"must be \(B, frames\), here \(5, 7\)"):
            ssim(x, 2 * x, mask=m)


def test_masks_of_frames_and_of_everything_are_taken():
    x, y = rand(5, 5, 7), rand(5, 5, 7, seed=1)
    m = torch.arange(7) < torch.tensor([7, 3, 1, 5, 2])[:, None, None]
    kept = lambda v: v[m.expand_as(v)].mean()
    assert_close(masked_mse(x, y, m), kept((x - y).square()))
    assert_close(masked_mse(x, y, m.expand_as(x)), kept((x - y).square()))
    assert_close(MelLoss(1, 0)(x, y, m), kept((x - y).abs()))
    p = Discrete(vpsde_betas(4))
    zero, teacher = (NetDenoiser(lambda x, t, a=a: a * x, p, "x0") for a in (0.0, 0.5))
    how = dict(eps=y, at=torch.zeros(5, dtype=torch.int64))
    a, b = (distill_loss(zero, teacher, x, grid(4), mask=v, **how) for v in (m, m.expand_as(x)))
    assert_close(a, b)
    with pytest.raises(ValueError, match="must be .B, 1, frames., here .5, 1, 7.$"):
        MelLoss()(x, y, m.expand_as(x))  # windows of SSIM see all bins
    with pytest.raises(TypeError, match="mask is list: must be a tensor"):
        distill_loss(zero, teacher, x, grid(4), mask=[True])


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.label = nn.Embedding(4, width)
        self.first, self.last = nn.Linear(3, width), nn.Linear(width, 2)

    def forward(self, x, t, label):
        h = self.first(torch.cat([x, t[:, None].to(x) / 4], 1)) + self.label(label)
        return self.last(torch.tanh(h))


def test_progressive_distillation_learns_its_teacher():
    p = Discrete(vpsde_betas(4, b1=10.0))
    x0, which = MIX.sample(512, gen(2))
    data = dict(x0=x0.float(), label=which)
    teacher = MixtureDenoiser(MIX, p)
    torch.manual_seed(0)
    start = NetDenoiser(Net(), p, "x0")
    before = {k: v.clone() for k, v in start.state_dict().items()}
    how = dict(progress=False, batch_size=128, schedule="cosine", lr=2e-2, seed=3)
    out = progressive_distill(teacher, grid(4), data, 250, rounds=2, student=start, **how)
    assert [len(r.grid) - 1 for r in out] == [2, 1]
    assert all(torch.equal(v, before[k]) for k, v in start.state_dict().items())  # a copy learns
    x = rand(512, 2, dtype=torch.float32, seed=4)
    want = run(teacher, x, grid(4), label=which)
    off = lambda m, g: float((run(m, x, g, label=which) - want).square().mean().sqrt())
    coarse = off(teacher, halve(grid(4)))
    assert off(out[0].student, out[0].grid) < 0.7 * coarse
    assert off(out[1].student, out[1].grid) < 0.7 * off(teacher, grid(1))
    assert not out[0].student.training and not any(
        q.requires_grad for q in out[0].student.parameters()
    )
    again = progressive_distill(teacher, grid(4), data, 3, student=start, **how)[0]
    third = progressive_distill(teacher, grid(4), data, 3, student=start, **how)[0]
    assert torch.equal(again.run.losses, third.run.losses)  # the same seed


def test_frozen_parts_stay_and_the_teacher_too():
    p = Discrete(vpsde_betas(4, b1=10.0))
    x0, which = MIX.sample(64, gen(2))
    torch.manual_seed(0)
    teacher = NetDenoiser(Net(8), p, "x0")
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    r = progressive_distill(
        teacher, grid(4), dict(x0=x0.float(), label=which), 3, freeze=["net.label"], progress=False
    )[0]
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    after = r.student.state_dict()
    assert torch.equal(after["net.label.weight"], before["net.label.weight"])
    assert not torch.equal(after["net.first.weight"], before["net.first.weight"])
    with pytest.raises(ValueError, match="freeze="):
        progressive_distill(teacher, grid(4), x0.float(), 1, freeze=["encoder"])
    one = progressive_distill(  # a string is one beginning, not its letters
        teacher, grid(4), dict(x0=x0.float(), label=which), 3, freeze="net.l", progress=False
    )[0].student.state_dict()
    same = {k for k, v in one.items() if k in before and torch.equal(v, before[k])}
    assert {"net.label.weight", "net.last.weight", "net.last.bias"} <= same
    assert "net.first.weight" not in same


def test_progressive_distillation_refuses():
    teacher = MixtureDenoiser(MIX, VP())
    with pytest.raises(ValueError, match="must divide by 2.rounds = 4"):
        progressive_distill(teacher, grid(6), rand(4, 2), 1, rounds=2)
    with pytest.raises(ValueError, match="student=None"):
        progressive_distill(teacher, grid(4), rand(4, 2), 1)
    net = NetDenoiser(Net(), VP(), "x0")
    with pytest.raises(ValueError, match="must have x0"):
        progressive_distill(net, grid(4), dict(mel=rand(4, 2)), 1)
    for more, says in (
        (dict(loss="l1"), "loss is str: must be a function of .prediction, target, mask"),
        (dict(loss=None), "loss is NoneType"),
        (dict(mask=torch.ones(4, 1)), "mask is Tensor: must be a function of the batch"),
    ):
        with pytest.raises(TypeError, match=says):
            progressive_distill(net, grid(4), rand(4, 2), 1, **more)
    with pytest.raises(TypeError, match="loss is str"):
        distill_loss(teacher, teacher, rand(4, 2), grid(4), loss="l1")
    for freeze in ("", [""], ["net.", ""], [3]):
        with pytest.raises(ValueError, match="freeze=.*beginnings of names, none of them empty"):
            progressive_distill(net, grid(4), rand(4, 2), 1, freeze=freeze)


# ---------------------------------------------------------------- similarity and losses


def test_ssim_against_scipy():
    x, y = rand(1, 30, 40), rand(1, 30, 40, seed=1)
    blur = lambda v: gaussian_filter(v[0].numpy(), 1.5, radius=5, mode="constant")
    inside = blur(torch.ones(1, 30, 40, dtype=F64))
    mean = lambda v: blur(v) / inside  # what is beyond the edge has no weight
    a, b = mean(x), mean(y)
    va, vb, vab = mean(x * x) - a * a, mean(y * y) - b * b, mean(x * y) - a * b
    c1, c2 = (0.01 * 3) ** 2, (0.03 * 3) ** 2
    want = (2 * a * b + c1) * (2 * vab + c2) / ((a * a + b * b + c1) * (va + vb + c2))
    assert abs(float(ssim(x, y, 3.0)) - want.mean()) < 1e-10


def test_ssim_is_one_only_for_equals_and_ignores_padding():
    x, y = rand(3, 20, 30), rand(3, 20, 30, seed=1)
    assert_close(ssim(x, x), torch.ones(3, dtype=F64))
    assert_close(ssim(x, y), ssim(y, x))
    assert (ssim(x, x + 0.3 * y, 4.0) < 0.99).all()
    m = torch.arange(30).expand(3, 30) < torch.tensor([30, 17, 9])[:, None]
    z = torch.where(m[:, None], y, 99.0)  # whatever stands in the padding
    got = ssim(x, z, 4.0, m)
    for i, n in enumerate((30, 17, 9)):
        assert_close(got[i : i + 1], ssim(x[i : i + 1, :, :n], y[i : i + 1, :, :n], 4.0))
    with pytest.raises(ValueError, match="must be equal"):
        ssim(x, y[:2])


def test_mel_loss():
    x, y = rand(2, 12, 20), rand(2, 12, 20, seed=1)
    m = (torch.arange(20) < 15).expand(2, 1, 20)
    for a, b in ((1.0, 0.0), (0.5, 0.5), (0.0, 2.0)):
        want = a * (x - y)[..., :15].abs().mean() + b * (1 - ssim(x, y, 4.0, m[:, 0])).mean()
        assert_close(MelLoss(a, b)(x, y, m), want)
    assert_close(MelLoss(1.0, 0.0)(x, y), (x - y).abs().mean())
    assert_close(masked_mse(x, y, m), (x - y)[..., :15].square().mean())
    with pytest.raises(ValueError, match="l1=-1"):
        MelLoss(-1)


# ---------------------------------------------------------------- the network


def test_length_regulator():
    h = rand(2, 3, 4)
    d = torch.tensor([[2, 0, 3, 1], [1, 1, 0, 0]])
    out, mask, place = length_regulate(h, d)
    assert out.shape == (2, 3, 6) and mask.sum(1).tolist() == [6, 2]
    for row, want in enumerate([[0, 0, 2, 2, 2, 3], [0, 1]]):
        assert torch.equal(out[row, :, : len(want)], h[row][:, want])
    assert out[1, :, 2:].abs().max() == 0
    assert_close(place[0], torch.tensor([1 / 4, 3 / 4, 1 / 6, 1 / 2, 5 / 6, 1 / 2], dtype=F64))
    assert length_regulate(h, d, 9)[0].shape[-1] == 9
    assert frame_mask(d, 7)[:, 0].sum(1).tolist() == [6, 2]
    for bad, text in ((d.float(), "float32"), (-d, "must be integers >= 0"), (d[:, :3], "must be")):
        with pytest.raises(ValueError, match=text):
            length_regulate(h, bad)
    with pytest.raises(ValueError, match="sum to 6 frames: must be at most 5"):
        length_regulate(h, d, 5)
    for same in (d.tolist(), d.numpy(), d.int()):
        assert all(map(torch.equal, length_regulate(h, same), (out, mask, place)))
        assert torch.equal(frame_mask(same, 7), frame_mask(d, 7))
    whole_numbers = torch.arange(24).reshape(2, 3, 4)
    out, _, share = length_regulate(whole_numbers, d)
    assert out.dtype == torch.int64 and out[0, 0].tolist() == [0, 0, 2, 2, 2, 3]
    assert share.dtype == torch.float32
    assert_close(share, place.float())
    for bad in (d > 0, [[1, 2], [1]], "1", None, d + 0j, d[0]):
        with pytest.raises(ValueError, match="durations is .*: must be integers >= 0"):
            length_regulate(h, bad)
        with pytest.raises(ValueError, match="durations is .*: must be integers >= 0"):
            frame_mask(bad, 7)
    for bad, got in (
        (h[0], r"\(3, 4\)"),
        (h[None], r"\(1, 2,"),
        (h[:, :, :0], "2, 3, 0"),
        ([1], "list"),
    ):
        with pytest.raises(ValueError, match=f"h is .*{got}.*: must be a tensor .B, C, phonemes"):
            length_regulate(bad, d)
    with pytest.raises(ValueError, match="frames=0"):
        frame_mask(d, 0)


@pytest.mark.parametrize("cycle", [1, 3])
def test_diffnet_starts_at_zero_and_does_not_see_padding(cycle):
    torch.manual_seed(0)
    net = DiffNet(5, 4, 4, 8, cycle).double()
    x, c, t = rand(2, 5, 24), rand(2, 4, 24, seed=1), torch.tensor([0.0, 3.0])
    assert net(x, t, c).abs().max() == 0
    nn.init.normal_(net.out.weight)
    nn.init.normal_(net.out.bias)
    m = torch.arange(24).expand(2, 1, 24) < torch.tensor([24, 11])[:, None, None]
    y = net(x, t, c, m)
    assert_close(y[1:, :, :11], net(x[1:, :, :11], t[1:], c[1:, :, :11]))
    assert y[1, :, 11:].abs().max() == 0
    junk = torch.where(m, x, 50.0)
    assert_close(net(junk, t, c, m), y)  # inputs in the padding do not matter
    assert (net(x, t + 1, c) - net(x, t, c)).abs().max() > 1e-4
    reach = 2 * sum(2 ** (i % cycle) for i in range(4))  # of four layers, three taps each
    z = x[:1, :, :].repeat(1, 1, 3).requires_grad_()
    cc = c[:1].repeat(1, 1, 3)
    net(z, t[:1], cc)[0, :, 36].sum().backward()
    moved = z.grad[0].abs().sum(0).nonzero().flatten()
    assert moved.min() == 36 - reach // 2 and moved.max() == 36 + reach // 2


def test_diffnet_has_the_published_size_and_refuses():
    n = sum(p.numel() for p in DiffNet().parameters())
    c = 256
    layer = (c * 2 * c * 3 + 2 * c) + (c * 2 * c + 2 * c) * 2 + (c * c + c)
    ends = (80 * c + c) + (c * 4 * c + 4 * c + 4 * c * c + c) + (c * c + c) + (c * 80 + 80)
    assert n == 20 * layer + ends
    for bad in (dict(channels=7), dict(layers=0), dict(bins=0)):
        with pytest.raises(ValueError, match=f"{list(bad)[0]}="):
            DiffNet(**bad)
    with pytest.raises(ValueError, match="must be .B, 80, frames"):
        DiffNet(80, 4, 1, 4)(torch.zeros(1, 3, 5), torch.zeros(1), torch.zeros(1, 4, 5))


def tiny(seed=0, **options):
    torch.manual_seed(seed)
    net = TinyTTS(6, 5, 8, 2, **options)
    nn.init.normal_(net.net.out.weight)
    return net


def test_tts_gives_a_phrase_the_same_in_every_batch():
    net = tiny().double()
    ids, d = torch.tensor([[1, 2, 3], [4, 5, 0]]), torch.tensor([[2, 3, 4], [2, 2, 0]])
    x, t = rand(2, 5, 9), torch.tensor([1.0, 2.0])
    y = net(x, t, ids=ids, durations=d)
    alone = net(x[1:, :, :4], t[1:], ids=ids[1:, :2], durations=d[1:, :2])
    assert_close(y[1:, :, :4], alone)
    assert y[1, :, 4:].abs().max() == 0
    other = ids.clone()
    other[0, 1] = 6
    assert (net(x, t, ids=other, durations=d) - y)[0].abs().max() > 1e-4
    for bad in (ids + 4, -ids):
        with pytest.raises(ValueError, match="must be 1 to 6"):
            net(x, t, ids=bad, durations=d)
    with pytest.raises(ValueError, match="must be integers"):
        net.encode(ids.float())
    late = torch.tensor([[2, 3, 4], [2, 2, 1]])  # a frame of nothing
    with pytest.raises(ValueError, match="durations has 1 above 0 at padding: must be 0 where ids"):
        net(x, t, ids=ids, durations=late)


def test_residual_network_starts_as_the_identity():
    net = TinyTTS(6, 5, 8, 2, residual=True)
    x, d = rand(1, 5, 6, dtype=torch.float32), torch.tensor([[2, 2]])
    y = net(x, torch.zeros(1), torch.tensor([[1, 2]]), d)
    assert torch.equal(y[..., :4], x[..., :4]) and y[..., 4:].abs().max() == 0


def test_durations_are_learned_without_touching_the_encoder():
    net = tiny()
    ids = torch.tensor([[1, 2, 0]])
    net.log_durations(ids).sum().backward()
    assert net.embed.weight.grad is None and net.duration[0].weight.grad is not None
    d = net.predict_durations(ids)
    assert d.dtype == torch.int64 and d[0, 2] == 0 and (d[0, :2] >= 1).all()


def test_predicted_durations_are_rounded_and_at_least_one_frame():
    net, ids = tiny(), torch.tensor([[1, 2, 0]])
    with torch.no_grad():
        net.duration[-1].weight.zero_()
        for frames, want in ((1e-4, 1), (0.4, 1), (1.4, 1), (1.6, 2), (7.2, 7)):
            net.duration[-1].bias.fill_(math.log(frames))
            assert net.predict_durations(ids).tolist() == [[want, want, 0]]


def test_training_loss_by_hand():
    p = Discrete(vpsde_betas(4, b1=10.0))
    batch = dict(x0=rand(8, 5, 6, dtype=torch.float32), ids=torch.tensor([[1, 2]] * 8),
                 durations=torch.tensor([[2, 3]] * 8))  # fmt: skip
    for kind in ("x0", "eps"):
        model = NetDenoiser(TinyTTS(6, 5, 8, 2), p, kind)  # puts out 0
        torch.manual_seed(5)
        got = tts_loss(model, batch, grid(4), masked_mse)
        torch.manual_seed(5)
        g = grid(4)
        t = g[torch.randint(4, (8,))]
        assert (t > 0).all()
        eps = torch.randn(8, 5, 6)
        want = (batch["x0"] if kind == "x0" else eps)[..., :5].square().mean()
        log_d = model.net.log_durations(batch["ids"])
        want = want + 0.1 * (log_d - batch["durations"].log()).square().mean()
        assert_close(got, want)
        for same in (grid(4).tolist(), grid(4).float()):
            torch.manual_seed(5)
            assert torch.equal(tts_loss(model, batch, same, masked_mse), got)
        with pytest.raises(ValueError, match="grid must be strictly decreasing"):
            tts_loss(model, batch, grid(4).flip(0))
        with pytest.raises(TypeError, match="loss is str: must be a function"):
            tts_loss(model, batch, grid(4), "l1")
    with pytest.raises(ValueError, match="predicts='v'"):
        tts_loss(NetDenoiser(TinyTTS(6, 5, 8, 2), p, "v"), batch, grid(4))


# ---------------------------------------------------------------- speech


@pytest.mark.parametrize("split,n", [("train", 300), ("test", 96)])
def test_shipped_phrases(split, n):
    d = speech(split)
    assert d.x0.shape == (n, SPEECH.bins, 64) and d.x0.dtype == torch.float32
    frames = d.durations.sum(1)
    there = frame_mask(d.durations, 64)
    assert (d.x0 * ~there).abs().max() == 0 and (d.x0.abs().sum(1) > 0).sum(1).eq(frames).all()
    assert ((d.durations > 0) <= (d.ids > 0)).all() and int(d.ids.max()) == len(d.names) == 22
    silence = d.names.index("") + 1
    for text, ids in zip(d.texts, d.ids.tolist()):
        spoken = [i for i in ids if i and i != silence]
        assert spoken == [i for w in text.split() for i in d.lexicon[w]]
    assert len(set(d.voice.tolist())) == len(VOICES)
    assert 60 < d.pitch.min() and d.pitch.max() < 400
    # floor and loudest value of log10 magnitudes
    mel = d.log_mel(d.x0)[there.expand_as(d.x0)]
    assert mel.min() > -5.1 and mel.max() < 2
    if split == "train":
        x = d.x0[there.expand_as(d.x0)]
        assert abs(float(x.mean())) < 1e-2 and abs(float(x.std()) - 1) < 1e-2
        assert not set(d.texts) & set(speech("test").texts)


def test_looking_up_text():
    d = speech()
    ids = phoneme_ids("Two six", d)[0].tolist()
    assert [d.names[i - 1] for i in ids] == ["t", "uː", "s", "ɪ", "k", "s", ""]
    assert phoneme_ids("Two, SIX.", d)[0].tolist() == phoneme_ids("two,six", d)[0].tolist() == ids
    part = d.take(torch.tensor([4, 2]))
    assert part.texts == [d.texts[4], d.texts[2]] and torch.equal(part.x0[1], d.x0[2])
    for bad, text in (
        ("ten", "must be one of 'zero'"),
        ("six!", "text='six!': must be one of 'zero'.*did you mean 'six'"),
        ("", "text is empty"),
        (" ., ", "text is empty"),
        (6, "text=6: must be a string"),
    ):
        with pytest.raises(ValueError, match=text):
            phoneme_ids(bad, d)
    with pytest.raises(ValueError, match="split='valid'"):
        speech("valid")


def test_without_espeak_the_error_says_what_to_install(monkeypatch):
    import ctypes

    def missing(name):
        raise OSError("no such file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="apt-get install espeak-ng"):
        render_phrases(["one"], ["en-us"], [50], [170])
    with pytest.raises(ValueError, match="lengths .1, 2, 1, 1."):
        render_phrases(["one"], ["en-us"] * 2, [50], [170])


def has_espeak():
    import ctypes

    try:
        ctypes.CDLL("libespeak-ng.so.1")
    except OSError:
        return False
    return True


@pytest.mark.skipif(not has_espeak(), reason="eSpeak NG is not installed")
def test_rendering(tmp_path):
    a, b = render_phrases(["one two three"] * 2, ["en-us", "en-us+f2"], [50, 60], [170, 170])
    assert a.phonemes[:3] == ["w", "ʌ", "n"] and a.starts == sorted(a.starts)
    assert a.starts[-1] * 22050 < len(a.audio) + 1 and a.audio.abs().max() < 1
    assert len(a.audio) != len(b.audio)
    with pytest.raises(ValueError, match="voices has 'nobody'"):
        render_phrases(["one"], ["nobody"], [50], [170])
    build_speech(tmp_path / "a.npz", 8, 2)
    build_speech(tmp_path / "b.npz", 8, 2)
    with np.load(tmp_path / "a.npz") as f, np.load(tmp_path / "b.npz") as g:
        assert f["train_words"].shape == (8, 3) and f["test_voice"].tolist() == [0, 1, 2, 3] * 2
        for k in ("names", "lexicon", *(f"{s}_{v}" for s in ("train", "test")
                                        for v in ("words", "voice"))):  # fmt: skip
            assert np.array_equal(f[k], g[k])
        # a synthesiser's state runs on from call to call: a boundary may move by a frame
        assert f["train_ids"].shape == g["train_ids"].shape
        total = [v["train_durations"].astype(int).sum(1) for v in (f, g)]
        assert abs(total[0] - total[1]).max() <= 2
    assert all(w in speech().lexicon for w in WORDS)


def hum(texts, voices, pitch, rate):  # in place of eSpeak: two or three hums a word, then silence
    out = []
    for text, voice in zip(texts, voices):
        names, starts, loud, at = [], [], [], 0.0
        for w in text.split():
            if names:  # a pause between words
                names, starts, loud, at = [*names, ""], [*starts, at], [*loud, 0.0], at + 0.03
            for k in ["f", "oː", "ɹ"] if w == "four" else [w[0], w[1:]]:
                names, starts = [*names, k], [*starts, at]
                loud, at = [*loud, 0.1 + 0.02 * len(k)], at + 0.04 + 0.003 * WORDS.index(w)
        names, starts, loud = [*names, "", ""], [*starts, at, at + 0.1], [*loud, 0.0, 0.0]
        t = torch.arange(int((at + 0.2) * 22050), dtype=torch.float64) / 22050
        which = torch.searchsorted(torch.tensor(starts).double(), t, right=True) - 1
        f = 110 + 30 * VOICES.index(voice)
        x = sum(torch.sin(2 * math.pi * k * f * t) / k for k in range(1, 9))
        out.append(prodiff.Spoken((torch.tensor(loud)[which] * x).float(), names, starts))
    return out


def test_a_table_of_phrases_holds_what_was_said(tmp_path, monkeypatch):
    monkeypatch.setattr(prodiff, "render_phrases", hum)
    build_speech(tmp_path / "a.npz", 8, 2, frames=50)
    with np.load(tmp_path / "a.npz") as f:
        names, (scale, middle, mean, sd), every = f["names"].tolist(), f["scale"], []
        top = -math.inf
        for split in ("train", "test"):
            frames = f[f"{split}_durations"].astype(int)
            parts = np.split(f[f"{split}_mel"], frames.sum(1).cumsum()[:-1])
            for i, words in enumerate(f[f"{split}_words"]):
                voice = f[f"{split}_voice"][i]
                said = hum([" ".join(WORDS[w] for w in words if w >= 0)], [VOICES[voice]], 0, 0)[0]
                want, at = said.phonemes[:-1], said.starts[:-1]  # one silence is kept
                end = at[-1] + 0.04
                two = [j for j, k in enumerate(want) if k == "ɹ"]  # "oː" and "ɹ" are one phoneme
                at = [s for j, s in enumerate(at) if j not in two]
                want = ["oːɹ" if k == "oː" else k for j, k in enumerate(want) if j not in two]
                assert [names[k - 1] for k in f[f"{split}_ids"][i] if k] == want
                x = resample_poly(said.audio[: int(end * 22050)].double().numpy(), 320, 441)
                mel = log_mel(torch.from_numpy(x).float(), SPEECH).T.numpy()
                # a frame belongs to the phoneme that sounds at its centre
                time = np.arange(len(mel)) * SPEECH.hop / SPEECH.sr
                count = [((time >= a) & (time < b)).sum() for a, b in zip(at, [*at[1:], math.inf])]
                assert frames[i, : len(count)].tolist() == count and frames[i].sum() == len(mel)
                got = parts[i].cumsum(0, dtype=np.int8) * scale + middle
                assert abs(got - mel).max() < 0.5 * scale + 1e-5  # half a step of 8 bits
                assert f[f"{split}_pitch"][i] == pytest.approx(110 + 30 * voice, rel=0.01)
                top = max(top, mel.max())
                every += [mel] if split == "train" else []
        low = np.concatenate(every).min()  # from it to the top are all steps of 8 bits but one
        assert scale == pytest.approx((top - low) / 254)
        assert middle == pytest.approx((top + low) / 2)
        assert mean == pytest.approx(np.concatenate(every).mean(), abs=1e-5)
        assert sd == pytest.approx(np.concatenate(every).std(), rel=1e-3)
    with pytest.raises(ValueError, match="frames=9: must be at least"):
        build_speech(tmp_path / "b.npz", 8, 2, frames=9)


def test_shipped_models_know_the_words():
    d = speech("test").take(torch.arange(0, 96, 8))
    cond = dict(ids=d.ids, durations=d.durations)
    mask = frame_mask(d.durations, 64)
    teacher = speech_model()
    assert not teacher.training and teacher.process == Discrete(vpsde_betas(4, b1=10.0))
    y = run(teacher, rand(*d.x0.shape, dtype=torch.float32), grid(4), **cond)
    off = lambda a: float(((a - d.x0).abs() * mask).sum() / mask.sum() / 40)
    assert off(y) < 0.55 * off(0 * y)  # the mean spectrogram
    wrong = cond | dict(ids=(d.ids % 22 + 1) * (d.ids > 0))  # each phoneme is another
    z = run(teacher, rand(*d.x0.shape, dtype=torch.float32), grid(4), **wrong)
    assert off(z) > 1.3 * off(y)
    noise = speech_model("eps")
    assert noise.predicts == "eps" and noise.net.residual
    y = run(noise, rand(*d.x0.shape, dtype=torch.float32), grid(10), **cond)
    assert off(y) < 0.8 * off(0 * y)
    guess = teacher.net.predict_durations(d.ids)
    assert float((guess - d.durations).abs().float().mean()) < 1.0  # frames
    with pytest.raises(ValueError, match="predicts='v'"):
        speech_model("v")


@pytest.mark.parametrize("predicts,steps", [("x0", 4), ("eps", 100)])
def test_training_asks_at_the_steps_of_the_process(monkeypatch, predicts, steps):
    class Enough(Exception):
        pass

    def look(model, batch, times, loss):
        assert model.process == Discrete(vpsde_betas(steps, b1=10.0))
        assert torch.equal(times, torch.linspace(1, 0, steps + 1, dtype=F64))
        raise Enough

    monkeypatch.setattr(prodiff, "tts_loss", look)
    with pytest.raises(Enough):
        train_speech(predicts, 1, progress=False)


def test_training_is_repeatable_and_can_be_stored(tmp_path):
    a = train_speech("x0", 2, seed=3, progress=False)
    before = torch.get_rng_state()
    b = train_speech("x0", 2, seed=3, progress=False)
    assert torch.equal(a.losses, b.losses)
    assert all(torch.equal(u, v) for u, v in zip(a.model.parameters(), b.model.parameters()))
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is left alone
    save_speech("eps", tmp_path / "m.safetensors", steps=1, progress=False)
    card = (tmp_path / "m.json").read_text()
    assert '"predicts": "eps"' in card and "Apache" in card
    assert (tmp_path / "m.safetensors").stat().st_size < 300_000
    assert speech_denoiser("eps").process == Discrete(vpsde_betas(100, b1=10.0))
    assert isinstance(speech_denoiser()(torch.zeros(1, 40, 3), 1.0, ids=torch.tensor([[1]]),
                                        durations=torch.tensor([[3]])), Prediction)  # fmt: skip
