"""DDPM's parts against diffusers: tables, single steps with the same output and noise, a whole
pipeline, autoencoders; and the bound and the exact law on every process."""

import math

import pytest
import torch
from torch import nn

from diffkit.core.adapters import DiffusersScheduler, from_diffusers
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import Denoiser, MixtureDenoiser, NetDenoiser, Prediction, cfg
from diffkit.core.process import EDM, VE, VP, Cosine, Discrete, Flow, time_grid
from diffkit.core.sampling import DDIM, Ancestral, Euler, EulerMaruyama, Heun, sample
from diffkit.guidance.apg import apg
from diffkit.models.ddpm import (
    VAE,
    LatentSpace,
    betas,
    clip_x0,
    ddpm_loss,
    gaussian_law,
    latent_sample,
    vlb,
    zero_terminal_snr,
)
from diffkit.solvers.dc_solver import UniPC
from diffkit.solvers.dpm_solver_pp import DPMSolverPP

F64 = torch.float64
rng = lambda seed=0: torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def df():
    return pytest.importorskip("diffusers")


THEIRS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "quadratic": "scaled_linear",
    "sigmoid": "sigmoid",
    "cosine": "squaredcos_cap_v2",
    "laplace": "laplace",
}


@pytest.mark.parametrize("n", [1000, 50])
@pytest.mark.parametrize("name", THEIRS)
def test_tables(df, name, n):
    ends = dict(beta_start=0.0002, beta_end=0.03)
    try:
        theirs = df.DDPMScheduler(n, beta_schedule=THEIRS[name], **ends)
    except NotImplementedError:
        pytest.skip(f"{name} is not in diffusers {df.__version__}")
    ours = betas(name, n, 0.0002, 0.03)
    assert ours.dtype == F64 and ours.shape == (n,)
    # they count in float32
    torch.testing.assert_close(ours.float(), theirs.betas, rtol=0, atol=1e-6)
    torch.testing.assert_close(
        (1 - ours).cumprod(0).float(), theirs.alphas_cumprod, rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("n", [1, 2, 3])
def test_short_tables(n):
    "Straight lines in beta, in its root and on a logistic curve; the rest from the signal left."
    u, ends = torch.linspace(0, 1, n, dtype=F64), (0.1, 0.4)
    want = {"linear": 0.1 + 0.3 * u, "scaled_linear": (0.1**0.5 + (0.4**0.5 - 0.1**0.5) * u) ** 2}
    want |= {"sigmoid": 0.1 + 0.3 / (1 + (6 - 12 * u).exp())}
    for name, table in want.items():
        torch.testing.assert_close(betas(name, n, *ends), table)
    left = lambda v: 1 - 0.5 * v
    v = torch.linspace(0, 1, n + 1, dtype=F64)
    torch.testing.assert_close((1 - betas(left, n)).cumprod(0), left(v[1:]))
    assert betas("cosine", n)[-1] == 0.999  # no signal is left: the cap


@pytest.mark.parametrize("n", [0, -1, 2.0])
def test_a_table_has_a_whole_positive_number_of_steps(n):
    with pytest.raises(ValueError, match=f"n must be a positive integer, got {n}"):
        betas("linear", n)


@pytest.mark.parametrize("name", THEIRS)
def test_zero_end(df, name):
    from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr

    b = betas(name)
    torch.testing.assert_close(
        zero_terminal_snr(b, 0.0), rescale_zero_terminal_snr(b.clone()), rtol=0, atol=1e-12
    )
    # as a process: pure noise at the end, everything else as it was
    p = Discrete(zero_terminal_snr(b))
    assert 0 < p.alpha(1.0) < 1e-6 and math.isfinite(p.log_snr(1.0))
    assert abs(p.alpha(1e-3) - Discrete(b).alpha(1e-3)) < 1e-12


class Says(Denoiser):  # always the same output
    def __init__(self, out, process, kind="eps", extra=None):
        super().__init__()
        self.out, self.process, self.kind, self.extra = out, process, kind, extra

    def forward(self, x, t):
        return Prediction(x, t, self.process, self.out.to(x.dtype), self.kind, self.extra)


STEPS = [(s, n, clip) for s in ("leading", "trailing") for n in (7, 10) for clip in (True, False)]
KINDS = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def states(n):
    return torch.randn(2, 4, 3, 8, 8, generator=rng(n))


@pytest.mark.parametrize("spacing, n, clip", STEPS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", ["small", "large"])
def test_ancestral_steps_as_DDPMScheduler(df, spacing, n, clip, kind, variance):
    theirs = df.DDPMScheduler(
        variance_type=f"fixed_{variance}",
        clip_sample=clip,
        timestep_spacing=spacing,
        prediction_type=KINDS[kind],
    )
    theirs.set_timesteps(n)
    process = Discrete()
    grid = time_grid(process, n, spacing)
    x, out = states(n)
    noise = torch.randn(x.shape, generator=rng(9))
    den = Says(out, process, kind)
    den = clip_x0(den) if clip else den
    run = Ancestral(variance, noise=noise.expand(n, *noise.shape)).begin(process, grid)
    for i, k in enumerate(theirs.timesteps):
        # they add noise to the last step of "trailing", to clean data: of a variance of 1e-20
        # or, where it is large, of the whole step; ours ends without noise
        if spacing == "trailing" and i == n - 1 and variance == "large":
            continue
        a = theirs.step(out, k, x, generator=rng(9)).prev_sample
        b = run.step(den, x, grid[i].item(), grid[i + 1].item())
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5 * max(1, a.abs().max().item()))


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_learned_variance_as_DDPMScheduler(df, spacing):
    theirs = df.DDPMScheduler(
        variance_type="learned_range", clip_sample=True, timestep_spacing=spacing
    )
    theirs.set_timesteps(10)
    process = Discrete()
    grid = time_grid(process, 10, spacing)
    x, out = states(1)
    v = torch.rand(x.shape, generator=rng(3)) * 2 - 1
    noise = torch.randn(x.shape, generator=rng(9))
    den = clip_x0(Says(out, process, extra={"variance": (v + 1) / 2}))
    run = Ancestral("learned", noise=noise.expand(10, *noise.shape)).begin(process, grid)
    for i, k in enumerate(theirs.timesteps[:-1]):
        a = theirs.step(torch.cat([out, v], 1), k, x, generator=rng(9)).prev_sample
        b = run.step(den, x, grid[i].item(), grid[i + 1].item())
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5 * max(1, a.abs().max().item()))


def ddim_pair(df, spacing, n, clip, eta, kind="eps", seed=0, **more):
    theirs = df.DDIMScheduler(
        clip_sample=clip, timestep_spacing=spacing, prediction_type=KINDS[kind], **more
    )
    theirs.set_timesteps(n)
    process = Discrete()
    x, out = states(n + seed)
    noise = torch.randn(x.shape, generator=rng(9))
    how = dict(eta=eta, variance_noise=noise, use_clipped_model_output=clip)
    given = lambda k: theirs.step(out, k, x, **how).prev_sample
    den = Says(out, process, kind)
    return theirs.timesteps, given, clip_x0(den) if clip else den, x, noise


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing, n, clip", STEPS)
@pytest.mark.parametrize("kind", KINDS)
def test_ddim_steps_as_DDIMScheduler(df, spacing, n, clip, kind, eta):
    if spacing == "trailing" and 1000 % n:
        n = 8  # their trailing times are uneven otherwise, and their steps are not
    times, given, den, x, noise = ddim_pair(df, spacing, n, clip, eta, kind)
    grid = time_grid(den.process, n, spacing)
    run = DDIM(eta, noise=noise.expand(n, *noise.shape)).begin(den.process, grid)
    for i, k in enumerate(times):
        b = run.step(den, x, grid[i].item(), grid[i + 1].item())
        a = given(k)
        torch.testing.assert_close(b, a, rtol=1e-5, atol=2e-5 * max(1, a.abs().max().item()))


def test_the_last_alpha_may_be_that_of_the_first_step(df):  # set_alpha_to_one=False
    more = dict(set_alpha_to_one=False, steps_offset=1)
    times, given, den, x, _ = ddim_pair(df, "leading", 10, False, 0.0, **more)
    grid = time_grid(den.process, 10, "leading", offset=1, end=1 / 1000)
    run = DDIM().begin(den.process, grid)
    for i, k in enumerate(times):
        b = run.step(den, x, grid[i].item(), grid[i + 1].item())
        torch.testing.assert_close(b, given(k), rtol=1e-5, atol=1e-3)


def test_linspace_is_right_here_and_wrong_there(df):
    times, given, den, x, _ = ddim_pair(df, "linspace", 10, False, 0.0)
    process, k, j = den.process, times[0].item(), times[1].item()
    run = DDIM().begin(process, torch.tensor([k + 1, j + 1]) / 1000.0)
    t, s = (k + 1) / 1000, (j + 1) / 1000
    a, b = process.alpha(s), process.sigma(s)
    right = a * (x - process.sigma(t) * den.out) / process.alpha(t) + b * den.out
    ours = run.step(den, x, t, s)
    torch.testing.assert_close(ours, right.float(), rtol=1e-4, atol=1e-3)
    assert (given(times[0]) - right).abs().max() > 0.1


@pytest.fixture(scope="module")
def unet(df):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = df.UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=8,
        )
    return net.eval()


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("variance", ["small", "large"])
def test_a_whole_pipeline(df, unet, spacing, variance):
    how = dict(timestep_spacing=spacing, variance_type=f"fixed_{variance}")
    pipe = df.DDPMPipeline(unet, df.DDPMScheduler(**how))
    pipe.set_progress_bar_config(disable=True)
    theirs = pipe(3, generator=rng(4), num_inference_steps=8, output_type="np").images
    model = from_diffusers(unet, pipe.scheduler)
    g = rng(4)
    x = torch.randn(3, 1, 8, 8, generator=g)
    grid = time_grid(model.process, 8, spacing)
    solver = Ancestral(variance)
    y = sample(clip_x0(model), solver, x, grid, generator=g, progress=False)
    y = (y / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    # their last step of "trailing" adds noise: small is of deviation 1e-10, large is not
    if (spacing, variance) != ("trailing", "large"):
        torch.testing.assert_close(y, torch.from_numpy(theirs), rtol=0, atol=1e-5)
    else:
        assert (y - torch.from_numpy(theirs)).abs().mean() > 0.02
    # the same solver in their pipeline
    pipe.scheduler = DiffusersScheduler(Ancestral(variance), like=df.DDPMScheduler(**how))
    again = pipe(3, generator=rng(4), num_inference_steps=8, output_type="np").images
    torch.testing.assert_close(torch.from_numpy(again), y, rtol=0, atol=1e-5)


def test_training_a_diffusers_network(unet):
    model = from_diffusers(unet, process=Discrete(betas("cosine")), predicts="eps")
    x0 = torch.rand(4, 1, 8, 8, generator=rng()) * 2 - 1
    eps, t = torch.randn(x0.shape, generator=rng(1)), torch.tensor([1, 30, 500, 1000]) / 1000
    loss = ddpm_loss(model, x0, t=t, eps=eps)
    noisy = model.process.noise(x0, t, eps)
    by_hand = (unet(noisy, torch.tensor([0, 29, 499, 999])).sample - eps).square().mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=1e-6)
    loss.backward()
    unet.zero_grad()


class Words(nn.Module):
    def forward(self, x, t, words=None, size=None):
        self.words, self.size = words, size
        return x


def test_conditions_of_any_shape_are_dropped_together():
    net, B = Words(), 4000
    model = NetDenoiser(net, VP(), "v", null={"words": torch.full((5, 3), 7.0), "size": 0})
    words, size = torch.randn(B, 5, 3, generator=rng()), torch.arange(1, B + 1)
    ddpm_loss(model, torch.zeros(B, 2), drop=0.3, words=words, size=size, generator=rng(1))
    gone = net.size == 0
    assert abs(gone.float().mean() - 0.3) < 4 * (0.21 / B) ** 0.5
    assert (net.words[gone] == 7).all() and net.words[~gone].equal(words[~gone])
    # a condition without a null stays
    model.null = {"size": 0}
    ddpm_loss(model, torch.zeros(B, 2), drop=0.3, words=words, size=size, generator=rng(1))
    assert net.words.equal(words) and (net.size == 0).equal(gone)


def test_one_seed_one_loss():
    model = NetDenoiser(Words(), Discrete(), "v", null={"size": 0})
    x = torch.randn(16, 2, generator=rng())
    a, b, c = (ddpm_loss(model, x, size=torch.ones(16), generator=rng(s)) for s in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)
    low = ddpm_loss(model, x.bfloat16(), size=torch.ones(16), generator=rng(1))
    # torch 2.4 draws other noise in half precision from the same seed
    full, half = (torch.randn(32, generator=rng(1), dtype=d) for d in (None, torch.bfloat16))
    if torch.allclose(full, half.float(), atol=0.05):
        assert abs(low - a) < 0.02 * a
    assert low.isfinite()


PROCESSES = [VP(), Cosine(), Discrete(), Discrete(zero_terminal_snr(betas())), VE(), EDM(), Flow()]
M, V = 0.7, 0.3
DATA = GaussianMixture(torch.tensor([[M]], dtype=F64), scales=V**0.5)


def grid_of(p, n):
    return time_grid(p, n, "log_snr" if p.t_max == 1 else "uniform", p.t_max, max(p.t_min, 1e-3))


@pytest.mark.parametrize("process", PROCESSES, ids=repr)
@pytest.mark.parametrize(
    "solver",
    [
        DDIM(),
        DDIM(0.5),
        Ancestral(),
        Ancestral("large"),
        Euler(),
        EulerMaruyama(),
        Heun(),
        DPMSolverPP(3),
        DPMSolverPP(2, sde=True),
        UniPC(2),
    ],
    ids=repr,
)
def test_the_exact_law_is_that_of_samples(process, solver):
    if process.t_max < 1 or (isinstance(process, Flow) and isinstance(solver, EulerMaruyama)):
        grid = time_grid(process, 12, "uniform", 0.9, 0.01)
    else:
        grid = grid_of(process, 12)
    n = 20000
    x = process.prior((n, 1), rng(), dtype=F64, t=grid[0].item())
    y = sample(MixtureDenoiser(DATA, process), solver, x, grid, generator=rng(1), progress=False)
    mean, var = (v[-1] for v in gaussian_law(solver, process, grid, M, V))
    assert abs(y.mean() - mean) < 4 * (var / n) ** 0.5
    assert abs(y.var() / var - 1) < 4 * (2 / n) ** 0.5


def test_the_law_of_many_coordinates():
    m, v = torch.tensor([0.0, 1.0, -2.0]), torch.tensor([0.1, 1.0, 4.0])
    grid = time_grid(VP(), 9)
    many = gaussian_law(DDIM(), VP(), grid, m, v)
    assert many[0].shape == (10, 3)
    for i in range(3):
        one = gaussian_law(DDIM(), VP(), grid, m[i].item(), v[i].item())
        torch.testing.assert_close(torch.stack(many)[..., i], torch.stack(one))
    # an exact flow of point masses: DDIM is exact for constant predictions
    mean, var = gaussian_law(DDIM(), VP(), time_grid(VP(), 3, end=0.0), 0.4, 0.0)
    assert abs(mean[-1] - 0.4) < 1e-12 and var[-1] < 1e-12


@pytest.mark.parametrize("variance", ["small", "large"])
@pytest.mark.parametrize(
    "process", [VP(), Cosine(), Discrete(), Flow(), VE(), EDM()], ids=lambda p: type(p).__name__
)
def test_the_bound_is_above_the_entropy(process, variance):
    start = 1.0 if process.t_max == 1 else 0.98
    body = time_grid(process, 120, "log_snr", start, max(process.t_min, 0.02))
    grid = torch.cat([body, body.new_zeros(1)])
    x = DATA.sample(3000, rng(2))[0]
    got = vlb(
        MixtureDenoiser(DATA, process), x, grid, variance=variance, levels=None, generator=rng(3)
    )
    entropy = 0.5 * math.log2(2 * math.pi * math.e * V)
    assert torch.isfinite(got.steps).all() and got.steps.shape == (120,)
    assert (got.steps > 0).all()
    # from above; 120 steps cost less than a bit; 0.1 is four errors of its own draws
    assert -0.1 < got.total - entropy < 1.0


def test_a_perfect_model_of_pixels_costs_no_bits():
    x = torch.full((20, 1, 2, 2), 0.25)
    point = GaussianMixture(x[:1], scales=0.0)
    grid = time_grid(Discrete(), 10, "leading")
    got = vlb(MixtureDenoiser(point, Discrete()), x, grid, levels=9, generator=rng())
    assert got.total < 1e-3
    wrong = vlb(MixtureDenoiser(point, Discrete()), -x, grid, levels=9, generator=rng())
    assert wrong.total > 5


@pytest.fixture(scope="module")
def their_vae(df):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = df.AutoencoderKL(
            in_channels=1,
            out_channels=1,
            block_out_channels=(8, 8),
            latent_channels=4,
            norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
        )
    return vae.eval()


@pytest.mark.parametrize("by_channel", [False, True])
def test_latents_of_diffusers(df, their_vae, by_channel):
    x = torch.rand(60, 1, 8, 8, generator=rng()) * 2 - 1
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), 25)
    space = LatentSpace(their_vae, by_channel).fit(loader)
    with torch.no_grad():
        law = their_vae.encode(x).latent_dist
        z = torch.cat([space.encode(x, rng(i)) for i in range(40)])
        axes = (0, 2, 3) if by_channel else (0, 1, 2, 3)
        n = z.numel() / (4 if by_channel else 1)
        assert z.mean(axes).abs().max() < 5 / n**0.5
        assert (z.var(axes) - 1).abs().max() < 5 * (2 / n) ** 0.5 * 2
        back = their_vae.decode(z[:5] / space.scale + space.mean).sample
        assert space.decode(z[:5]).equal(back)
        # the mean of the draws is that of the posterior, standardised
        still = (law.mean - space.mean) * space.scale
        assert (z.reshape(40, *still.shape).mean(0) - still).abs().mean() < 0.2
    if not by_channel:
        c = space.config()
        assert set(c) <= set(their_vae.config)
        pixels = ((law.mean - c["shift_factor"]) * c["scaling_factor"]).mean()
        assert abs(pixels) < 1e-4
    new = LatentSpace(their_vae, by_channel)
    new.load_state_dict(space.state_dict())
    assert new.decode(z[:2]).equal(space.decode(z[:2]))


def test_an_autoencoder_without_noise(df):
    tiny = df.AutoencoderTiny(
        in_channels=1,
        out_channels=1,
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    ).eval()
    x = torch.rand(30, 1, 8, 8, generator=rng())
    with torch.no_grad():
        space = LatentSpace(tiny).fit(x, batch_size=7)
        z = space.encode(x)
        assert abs(z.mean()) < 1e-4 and abs(z.std(correction=0) - 1) < 1e-4
        assert space.decode(z).shape == x.shape
    assert not tiny.training


def test_gradients_reach_both_halves_of_a_vae():
    vae = VAE(nn.Linear(6, 4), nn.Linear(2, 6), kl_weight=0.1)
    x = torch.randn(50, 6, generator=rng())
    vae.loss(x, rng(1)).backward()
    assert all(p.grad.abs().sum() > 0 for p in vae.parameters())
    a, b, c = (vae.loss(x, rng(s)).item() for s in (1, 1, 2))
    assert a == b != c


def test_latent_sampling_of_a_scaled_identity_is_exact():
    class Scaled(nn.Module):
        encode = staticmethod(lambda x: (3 * x + 1, torch.full_like(x, -20.0)))
        decode = staticmethod(lambda z: (z - 1) / 3)

    x = DATA.sample(500, rng())[0]
    space = LatentSpace(Scaled()).fit(x)
    m, s = x.mean(), x.std(correction=0)
    torch.testing.assert_close(space.encode(x), (x - m) / s, rtol=0, atol=1e-3)
    # the exact denoiser of the standardised latents gives samples of the data's law
    latents = GaussianMixture(torch.tensor([[0.0]], dtype=F64), scales=1.0)
    z = torch.randn(9, 1, generator=rng(1), dtype=F64)
    grid = time_grid(VP(), 300, end=0.0)
    y = latent_sample(MixtureDenoiser(latents, VP()), space, DDIM(), z, grid, progress=False)
    torch.testing.assert_close(y, m + s * z, rtol=0, atol=0.02)


def test_clipping_around_guidance_that_remembers():
    mix = GaussianMixture(torch.tensor([[-0.9], [0.9]], dtype=F64), scales=0.3, labels=[0, 1])
    guided = clip_x0(apg(MixtureDenoiser(mix, VP()), 4.0, beta=-0.5))
    x, cond = torch.randn(20, 1, generator=rng(), dtype=F64), {"label": torch.arange(20) % 2}
    how = dict(cond=cond, progress=False)
    grid = time_grid(VP(), 12, end=0.0)
    a, b = (sample(guided, DDIM(), x, grid, **how) for _ in range(2))
    assert a.equal(b) and a.abs().max() <= 1
    free = sample(cfg(MixtureDenoiser(mix, VP()), 4.0), DDIM(), x, grid, **how)
    assert free.abs().max() > 1
