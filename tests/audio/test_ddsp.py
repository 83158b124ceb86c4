"""DDSP: oscillators against closed forms, aliasing, noise spectra, the room, gradients by finite
differences, the model's parts, training and transfer, a user's wav, and every error."""

import math

import numpy as np
import pytest
import torch
from scipy.io import wavfile
from scipy.signal import fftconvolve
from torch import nn
from torch.autograd import gradcheck
from torch.testing import assert_close

from diffkit.audio.ddsp import (
    DDSP,
    Reverb,
    RnnFcDecoder,
    audible,
    controls_of,
    exp_sigmoid,
    filtered_noise,
    fit_ddsp,
    harmonic_synth,
    oscillator_bank,
    timbre_transfer,
    to_midi,
)
from diffkit.audio.signal import loudness, notes, spectral_loss, upsample, yin

SR = 16000
F64 = torch.float64


def rand(*shape, seed=0, dtype=F64):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def const(v, frames=100, dtype=torch.float32):
    return torch.full((frames,), float(v), dtype=dtype)


# ---------------------------------------------------------------- sines


def test_exp_sigmoid():
    x = torch.tensor([-200.0, -12.0, -11.0, 0.0, 40.0], dtype=F64)
    y = exp_sigmoid(x)
    assert_close(y[3].item(), 2 * 0.5 ** math.log(10) + 1e-7)
    assert abs(y[3].item() - 0.4054) < 1e-4  # the published value at 0
    assert y[0].item() == 1e-7 and abs(y[4].item() - 2) < 2e-7
    # a tenth for each unit down; exact for x -> -inf, here sigmoid(x) = e^x (1 - 2e-5)
    assert abs((y[1] - 1e-7) / (y[2] - 1e-7) - 0.1).item() < 1e-4


def test_constant_pitch_is_the_closed_form_for_four_seconds():
    k = torch.arange(1, 61, dtype=F64)[:, None]
    dist = (1 / k).expand(60, 1000).float()
    x = harmonic_synth(const(100, 1000), const(0.5, 1000), dist, 4 * SR, SR)
    t = torch.arange(1, 4 * SR + 1, dtype=F64) / SR  # inclusive: sample 0 has turned once
    c = (1 / k) / (1 / k).sum()
    want = 0.5 * (c * torch.sin(2 * math.pi * 100 * k * t)).sum(0)
    # phases in float32 after whole turns are dropped: 60 * 2 pi * 3e-8 at worst
    assert (x - want).abs().max() < 1e-5
    late = 0.5 * (c * torch.sin(2 * math.pi * 100 * k * (t - 1 / SR))).sum(0)
    assert (x - late).abs().max() > 0.05  # exclusive sums are another sound


def test_a_minute_of_phase():
    n = 60 * SR
    x = harmonic_synth(const(997, 6000), const(1, 6000), torch.ones(8, 6000), n, SR)[-SR:]
    t = torch.arange(n - SR + 1, n + 1, dtype=F64) / SR
    k = torch.arange(1, 9, dtype=F64)[:, None]
    want = torch.sin(2 * math.pi * 997 * k * t).mean(0)
    assert (x - want).abs().max() < 1e-4  # float32 sums are off by more than 0.1


def test_chirp_integrates_the_pitch():
    frames, hop = 500, 32
    f = torch.linspace(100, 900, frames, dtype=F64)
    x = harmonic_synth(f, const(1, frames, F64), torch.ones(1, frames, dtype=F64), hop * frames, SR)
    # linear between frames: the sum of an arithmetic series, 1 <= i + 1 samples
    slope = 800 / (frames - 1) / hop
    i = torch.arange(hop * (frames - 1), dtype=F64)  # the last frame is held
    turns = ((i + 1) * 100 + slope * i * (i + 1) / 2) / SR
    # the phase is float64 throughout
    assert_close(x[: len(i)], torch.sin(2 * math.pi * turns), atol=1e-9, rtol=0)


@pytest.mark.parametrize("K", [1, 7, 60])
def test_equal_to_free_oscillators(K):
    f, a = 80 + 900 * rand(2, 20, seed=1), rand(2, 20, seed=2)
    c, k = rand(2, K, 20, seed=3), torch.arange(1, K + 1, dtype=F64)[:, None]
    x = harmonic_synth(f, a, c, 1280, SR)
    amps = upsample(a[:, None] * audible(f, c, SR), 1280, "hann")
    y = oscillator_bank(k * upsample(f, 1280)[:, None], amps, SR)
    assert_close(x, y, atol=1e-9, rtol=0)  # the same sums in another order, float64
    assert_close(harmonic_synth(f[1], a[1], c[1], 1280, SR), x[1])  # no batch needed
    assert (x.abs() <= upsample(a, 1280, "hann") + 1e-9).all()  # bounded by A


def test_partials_above_the_limit_are_silent_and_their_share_goes_to_the_others():
    x = harmonic_synth(const(1500), const(1.0), torch.ones(60, 100), SR, SR).double()
    power = torch.fft.rfft(x).abs().square()
    tones = torch.zeros(len(power), dtype=torch.bool)
    tones[[1500 * k for k in range(1, 6)]] = True
    assert power[~tones].sum() < 1e-6 * power.sum()
    # five sines of amplitude 1/5: power of each is (n / 2 / 5)^2
    assert_close(power[tones], torch.full((5,), (SR / 10) ** 2, dtype=F64), rtol=1e-3, atol=0)
    c = audible(const(4000, 1), torch.tensor([[0.2], [0.8]]), SR)
    assert c.flatten().tolist() == [1, 0]  # exactly sr / 2 is not audible
    assert audible(const(3999.9, 1), torch.ones(2, 1), SR).flatten().tolist() == [0.5, 0.5]
    # a glide through the limit: silent from there on, sample by sample
    f = torch.linspace(3000, 5000, 100, dtype=F64)
    two = oscillator_bank(
        torch.stack([upsample(f, SR)] * 2) * torch.tensor([[1.0], [2.0]]), torch.ones(2, SR), SR
    )
    one = oscillator_bank(upsample(f, SR)[None], torch.ones(1, SR), SR)
    over = 2 * upsample(f, SR) >= SR / 2
    assert_close(two[over], one[over]) and (two - one)[~over].abs().max() > 0.9


def test_gradients_by_finite_differences():
    f, a, c = 200 + 100 * rand(1, 4, seed=4), rand(1, 4, seed=5) + 0.1, rand(1, 3, 4, seed=6) + 0.1
    for v in (f, a, c):
        v.requires_grad_()
    synth = lambda *v: harmonic_synth(*v, 16, SR)
    assert gradcheck(synth, (f, a, c), atol=1e-6)  # its step is 1e-6, float64
    synth(f, a, c).square().sum().backward()
    assert all((v.grad.abs() > 0).all() for v in (f, a, c))
    m, noise = (rand(1, 5, 4, seed=7) + 0.1).requires_grad_(), rand(1, 32, seed=8)
    assert gradcheck(lambda m: filtered_noise(m, 32, noise=noise), (m,), atol=1e-6)
    for kind in ("free", "exp"):
        room = Reverb(8, kind).double()
        room(rand(1, 20, seed=9)).square().sum().backward()
        for p in room.parameters():
            assert p.grad.abs().max() > 0


def test_torchsynth():
    synth = pytest.importorskip("torchsynth.module", reason="torchsynth is not installed")
    from torchsynth.config import SynthConfig

    config = SynthConfig(2, SR, 1.0, reproducible=False, no_grad=True)
    vco = synth.SineVCO(config)
    for name, v in (("tuning", 0.0), ("mod_depth", 0.0), ("initial_phase", -math.pi / 2)):
        vco.set_parameter(name, torch.full((2,), v))
    theirs = vco(to_midi(torch.tensor([200.0, 400.0])), torch.zeros(2, SR))
    theirs = theirs.as_subclass(torch.Tensor).mean(0)
    ours = harmonic_synth(const(200), const(1), torch.ones(2, 100), SR, SR)
    # its phase is added up in float32
    assert_close(theirs, ours, atol=5e-3, rtol=0)


# ---------------------------------------------------------------- noise


def test_gains_of_one_are_the_identity():
    x = 2 * rand(3, 640) - 1
    y = filtered_noise(torch.ones(3, 65, 10, dtype=F64), 640, noise=x)
    assert_close(y, x, atol=1e-12, rtol=0)
    # also with frames shorter and longer than the filters, and with a shorter window
    for frames in (1, 4, 320):
        for window in (0, 10, 32):
            y = filtered_noise(torch.ones(3, 17, frames, dtype=F64), 640, window, noise=x)
            assert_close(y, x, atol=1e-12, rtol=0)


def test_one_filter_is_a_convolution():
    gains, x = rand(17, seed=1), 2 * rand(400, seed=2) - 1
    ir = np.fft.irfft(gains.numpy(), 32)
    ir = np.roll(ir, 16) * torch.hann_window(32, dtype=F64).numpy()
    want = fftconvolve(x.numpy(), ir)[16:416]
    got = filtered_noise(gains[:, None].expand(17, 8), 400, noise=x)
    assert_close(got.numpy(), want, atol=1e-10, rtol=0)


def test_each_frame_has_its_own_filter():
    x, gains = 2 * rand(40, seed=3) - 1, rand(5, 4, seed=4)
    want = np.zeros(60)
    w = torch.hann_window(8, dtype=F64).numpy()
    for j in range(4):
        ir = np.roll(np.fft.irfft(gains[:, j].numpy(), 8), 4) * w
        want[10 * j : 10 * j + 17] += np.convolve(x[10 * j : 10 * j + 10].numpy(), ir)
    got = filtered_noise(gains, 40, noise=x).numpy()
    assert_close(got, want[4:44], atol=1e-12, rtol=0)


def test_spectrum_follows_the_gains():
    gains = 0.05 + torch.exp(-(((torch.arange(65) - 20) / 9.0) ** 2))
    g = torch.Generator().manual_seed(0)
    x = filtered_noise(gains[:, None].expand(100, 65, 64), 4096, generator=g)
    w = torch.hann_window(2048)
    power = torch.fft.rfft(x[:, 1024:3072] * w).abs().square().mean(0) / w.square().sum()
    got = (3 * power[8:-8].unfold(0, 17, 16).mean(1)).sqrt()  # uniform noise: variance 1/3
    off = 20 * torch.log10(got / gains[1 : 1 + len(got)])
    assert off.abs().max() < 1  # 100 draws of 17 values: 0.15 dB; the filters' window: 0.3 dB
    again = filtered_noise(
        gains[:, None].expand(100, 65, 64), 4096, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(x, again)


# ---------------------------------------------------------------- the room


def test_reverb():
    x = rand(2, 500, seed=1)
    room = Reverb(100).double()
    assert (room(x) - x).abs().max() < 1e-3  # starts nearly dry
    with torch.no_grad():
        room.taps.zero_()
        assert_close(room(x), x, atol=1e-12, rtol=0)
        room.taps[0] = 5.0  # the first tap is never heard
        assert_close(room(x), x, atol=1e-12, rtol=0)
        room.taps[37] = 0.5
    y = room(x)
    assert_close(y[:, 37:], x[:, 37:] + 0.5 * x[:, :-37], atol=1e-12, rtol=0)
    assert_close(y[:, :37], x[:, :37], atol=1e-12, rtol=0)


def test_exponential_reverb_falls_as_it_says():
    room = Reverb(4000, "exp", seed=3)
    with torch.no_grad():
        room.gain.fill_(0.0)
        room.decay.fill_(1.5)
    h = room.ir()
    t = torch.arange(4000) / 4000
    want = 0.40541 * torch.exp(-(2 + math.exp(1.5)) * t) * room.noise
    assert_close(h[1:], want[1:], rtol=1e-3, atol=1e-7)
    assert h[0] == 0 and len(list(room.parameters())) == 2 and Reverb(9).taps.std() < 1e-5


# ---------------------------------------------------------------- analysis by synthesis


def test_shares_are_found_from_the_sound():
    true = rand(6, 1, seed=5, dtype=torch.float32) + 0.5  # no share is below a third of another
    true = true / true.sum()
    f = const(330, 8)
    y = harmonic_synth(f, const(0.4, 8), true.expand(6, 8), 2048, SR)
    z = torch.zeros(7, 1, requires_grad=True)
    adam = torch.optim.Adam([z], 0.1)
    for i in range(120):
        adam.param_groups[0]["lr"] = 0.1 * 0.97**i
        v = exp_sigmoid(z).expand(7, 8)
        loss = spectral_loss(harmonic_synth(f, v[0], v[1:], 2048, SR), y, (512, 128))
        adam.zero_grad()
        loss.backward()
        adam.step()
    c = exp_sigmoid(z.detach()[1:])
    assert (c / c.sum() - true).abs().max() < 0.02  # as the notebook claims


# ---------------------------------------------------------------- the model


def test_decoder_is_the_papers():
    net = RnnFcDecoder(126)  # the published sizes, counted by hand
    stack = lambda i: i * 512 + 512 + 2 * (512 * 512 + 512) + 3 * 2 * 512
    gru = 3 * (1024 * 512 + 512 * 512 + 2 * 512)
    want = 2 * stack(1) + gru + stack(1536) + 512 * 126 + 126
    assert sum(p.numel() for p in net.parameters()) == want
    assert net(torch.rand(2, 5, 2)).shape == (2, 5, 126)
    tiny = RnnFcDecoder(126, (1, 1), 256, 0)
    assert abs(sum(p.numel() for p in tiny.parameters()) - 0.24e6) < 0.01e6  # the published one
    z = RnnFcDecoder(10, (1, 1, 4), 8, 1)
    x = torch.rand(2, 5, 6)
    early, late = z(x)[:, :3], z(torch.cat([x[:, :3], torch.rand(2, 2, 6)], 1))[:, :3]
    assert_close(early, late)  # causal


def small(harmonics=5, bands=9, reverb=None, standardize=False):
    torch.manual_seed(0)
    decoder = RnnFcDecoder((harmonics > 0) + harmonics + bands, (1, 1), 16, 1)
    return DDSP(decoder, harmonics, bands, reverb, SR, 128, standardize=standardize)


def test_parts_of_the_model():
    f, loud = torch.full((2, 20), 300.0), torch.full((2, 20), -20.0)
    g = lambda: torch.Generator().manual_seed(3)
    room = Reverb(300)
    torch.nn.init.normal_(room.taps)
    out = small(reverb=room)(f, loud, generator=g())
    assert_close(out["dry"], out["harmonic"] + out["noise"])
    assert_close(out["audio"], room(out["dry"]))
    assert_close(out["dist"].sum(1), torch.ones(2, 20))
    tone = harmonic_synth(f, out["amp"], out["dist"], 2560, SR)
    assert_close(out["harmonic"], tone)
    assert_close(out["noise"], filtered_noise(out["mags"], 2560, generator=g()))
    alone = small(bands=0)(f, loud)
    assert torch.equal(alone["audio"], alone["harmonic"]) and "mags" not in alone
    hiss = small(harmonics=0)(f, loud, generator=g())
    assert torch.equal(hiss["audio"], hiss["noise"]) and "amp" not in hiss
    # the paper's scaling of the inputs
    seen = []
    model = DDSP(nn.Linear(2, 15), 5, 9, None, SR, 128)
    model.decoder.register_forward_hook(lambda m, i, o: seen.append(i[0]))
    model(torch.full((1, 3), 440.0), torch.full((1, 3), -20.0))
    assert_close(seen[0], torch.tensor([69 / 127, 0.75]).expand(1, 3, 2))


@pytest.fixture(scope="module")
def trained():
    audio, _, sr = notes("flute")
    x = audio[[1, 4, 7], :8192]
    model = small(8, 9, standardize=True)
    run = fit_ddsp(model, x, steps=25, lr=2e-2, length=4096, sizes=(512, 128), batch_size=4,
                   sr=sr, progress=False)  # fmt: skip
    return model, x, run


def test_training_and_transfer(trained):
    model, x, _ = trained
    found = controls_of(x, SR, 128)
    with torch.no_grad():
        y = model(*found)["audio"]
    # silence: the bar that everything passes once it has learned the level
    assert spectral_loss(y, x) < 0.4 * spectral_loss(0 * x, x)
    assert_close(model.seen[1, 0], found.loudness[found.loudness > -60].mean())
    assert_close(model.seen[0, 0], to_midi(found.f0[found.loudness > -60]).mean())
    violin = notes("violin")[0][:2, :8192]
    heard = controls_of(violin, SR, 128)
    g = lambda: torch.Generator().manual_seed(1)
    for shift, factor in ((12, 2.0), (-12.0, 0.5), (0, 1.0)):
        out = timbre_transfer(model, violin, shift=shift, loudness="keep", generator=g())
        want = model(heard.f0 * factor, heard.loudness, generator=g())
        assert_close(out["audio"], want["audio"])
    calls = []
    hook = model.decoder.register_forward_hook(lambda m, i, o: calls.append(i[0]))
    timbre_transfer(model, violin)
    hook.remove()
    used = calls[0][..., 1][heard.loudness > -60]  # standardised: mean 0, spread 1 by the match
    assert abs(used.mean()) < 1e-4 and abs(used.std() - 1) < 1e-4
    low = heard.f0 / 4
    a = timbre_transfer(model, violin, low, "octave", generator=g())["audio"]
    b = timbre_transfer(model, violin, low, 36, generator=g())["audio"]  # keys 37 to 69
    assert torch.equal(a, b)


def test_training_is_repeatable(trained):
    model, x, _ = trained
    again = small(8, 9, standardize=True)
    fit_ddsp(again, x, steps=25, lr=2e-2, length=4096, sizes=(512, 128), batch_size=4,
             progress=False)  # fmt: skip
    for p, q in zip(model.parameters(), again.parameters()):
        assert torch.equal(p, q)


def test_controls_hold_the_nearest_trusted_pitch():
    t = torch.arange(SR) / SR
    x = 0.3 * torch.sin(2 * math.pi * 330 * t)
    x[:4096] = 0
    x[-4096:] = 0
    f0, loud = controls_of(x, SR, 64)
    assert (1200 * torch.log2(f0 / 330)).abs().max() < 30  # the edges see half a tone
    raw = yin(x, SR, 250)
    sure = (raw.aperiodicity < 0.3) & (loud > loud.max() - 25)
    assert torch.equal(f0[sure], raw.f0[sure]) and not sure[:50].any()
    assert_close(f0[:50], f0[sure][0].expand(50))
    assert torch.equal(loud, loudness(x, SR, 250.0))
    assert torch.equal(controls_of(0 * x, SR, 64).f0, yin(0 * x, SR, 250).f0)  # nothing to hold
    mid = torch.sin(2 * math.pi * torch.where(t < 0.5, 330.0, 550.0) * t)
    ramp = torch.linspace(1, 0, 800)  # a sudden end would ring
    mid[6000:10000] = 0  # a gap is shared by its neighbours
    mid[5200:6000] *= ramp
    mid[10000:10800] *= ramp.flip(0)
    f = controls_of(mid, SR, 64).f0
    assert (f[60:123] - 330).abs().max() < 15 and (f[127:190] - 550).abs().max() < 25


def test_a_users_wav_and_a_users_module(tmp_path, trained):
    wavfile.write(tmp_path / "mine.wav", SR, (notes("violin")[0][3].numpy() * 32767).astype("<i2"))
    rate, pcm = wavfile.read(tmp_path / "mine.wav")
    mine = torch.from_numpy(pcm / 32768).float()[None]
    f0, loud = controls_of(mine, rate, 128)
    y = timbre_transfer(trained[0], mine, f0, sr=rate)["audio"]
    assert y.shape == mine.shape and y.isfinite().all() and y.abs().max() > 0.01

    class Theirs(nn.Module):  # any network that gives controls
        def __init__(self):
            super().__init__()
            self.net = nn.Conv1d(40, 21, 3, padding=1)

        def forward(self, mel, f0):
            y = exp_sigmoid(self.net(mel))
            return harmonic_synth(f0, y[:, 0], y[:, 1:], f0.shape[-1] * 64, SR)

    head = Theirs()
    out = head(torch.randn(2, 40, 50), torch.full((2, 50), 220.0))
    assert out.shape == (2, 3200)
    out.square().mean().backward()
    assert head.net.weight.grad.abs().max() > 0
    own = DDSP(nn.Linear(2, 15), 5, 9, None, SR, 128)  # and any decoder
    assert fit_ddsp(own, mine, f0, 2, progress=False, batch_size=1).model is not None


# ---------------------------------------------------------------- bad input


def wrong_outputs():
    return DDSP(nn.Linear(2, 7), 2, 3, None, SR, 128)(f[None], a[None])


def unscaled():
    model = DDSP(nn.Linear(2, 6), 2, 3, None, SR, 128, scale=None)
    nn.init.constant_(model.decoder.bias, -99.0)
    return model


def spoilt(value):
    audio = torch.rand(3, 6400)
    audio[2, 5] = value
    return audio


def mute():
    audio = 0.1 * rand(4, 6400, dtype=torch.float32)
    audio[[1, 3]] = 0
    return audio


f, a, c = const(200), const(1), torch.ones(3, 100)
nan = const(math.nan)
BAD = {
    "silent pitch": (lambda: harmonic_synth(0 * f, a, c, 6400, SR), "f0 has 100 .*hold the last"),
    "nan pitch": (lambda: harmonic_synth(nan, a, c, 6400, SR), "f0 has 100 .*not finite"),
    "list": (lambda: harmonic_synth([200.0], a, c, 6400, SR), "f0 is list: must be a tensor"),
    "integers": (lambda: harmonic_synth(f.long(), a, c, 6400, SR), "f0 is torch.int64"),
    "beyond": (lambda: harmonic_synth(50 * f, a, c, 6400, SR), "nowhere below sr / 2 = 8000"),
    "negative amp": (lambda: harmonic_synth(f, -a, c, 6400, SR), "amp has 100"),
    "negative share": (lambda: harmonic_synth(f, a, -c, 6400, SR), "dist has 300"),
    "shapes": (lambda: harmonic_synth(f, a[:50], c, 6400, SR), r"have shapes \(100,\), \(50,\)"),
    "frames": (lambda: harmonic_synth(f, a, c, 6401, SR), "n=6401: must be a multiple of the 100"),
    "n": (lambda: harmonic_synth(f, a, c, 64.0, SR), "n=64.0: must be"),
    "sr": (lambda: harmonic_synth(f, a, c, 6400, True), "sr=True"),
    "bank": (lambda: oscillator_bank(c, c[:2], SR), "must be equal"),
    "gains": (lambda: filtered_noise(-c, 6400), "mags has 300"),
    "one band": (lambda: filtered_noise(c[:1], 6400), "bands"),
    "noise frames": (lambda: filtered_noise(c, 6401), "n=6401"),
    "window": (lambda: filtered_noise(c, 6400, 5), "window=5"),
    "odd": (lambda: filtered_noise(torch.ones(65, 100), 6400, 9), "window=9: must be even"),
    "noise length": (lambda: filtered_noise(c, 6400, noise=torch.ones(5)), "noise has 5 samples"),
    "kind": (lambda: Reverb(10, "Free"), "did you mean 'free'"),
    "length": (lambda: Reverb(1), "length=1"),
    "splits": (lambda: RnnFcDecoder(5, (1, 0)), "splits"),
    "channels": (lambda: RnnFcDecoder(5, channels="8"), "channels='8'"),
    "no parts": (lambda: DDSP(nn.Identity(), 0, 0), "bands=0"),
    "bands": (lambda: DDSP(nn.Identity(), 5, 1), "bands=1"),
    "outputs": (wrong_outputs, "7 outputs a frame: must"),
    "untrained": (lambda: small(standardize=True)(f[None], a[None]), "must be trained"),
    "loudness": (lambda: small()(f[None], a[None, :5]), "loudness has shape"),
    "scale": (lambda: unscaled()(f[None], a[None]), "amp has"),
    "hop": (lambda: controls_of(torch.zeros(1, 100), SR, 64), "divide by hop=64"),
    "trust": (lambda: controls_of(torch.zeros(1, 6400), SR, 64, 0), "trust=0"),
    "rate": (lambda: fit_ddsp(small(), torch.zeros(1, 6400), sr=44100), "sr=44100: must be the"),
    "1-D": (lambda: fit_ddsp(small(), torch.zeros(6400)), "audio is"),
    "windows": (lambda: fit_ddsp(small(), torch.zeros(1, 6400), length=200), "multiple of hop"),
    "no model": (
        lambda: fit_ddsp(nn.Linear(2, 2), torch.rand(1, 6400)),
        "model is a Linear without .* DDSP",
    ),
    "no audio": (lambda: fit_ddsp(small(), [[0.1]]), "audio is list: must be a tensor"),
    "one clip": (lambda: fit_ddsp(small(), torch.rand(6400)), r"for one clip audio\[None\]"),
    "stereo": (lambda: fit_ddsp(small(), torch.rand(6400, 2)), r"\(6400, 2\): must .*mix them"),
    "short": (lambda: fit_ddsp(small(), torch.rand(3, 100)), r"\(3, 100\): .* hop=128 samples$"),
    "int16": (lambda: fit_ddsp(small(), torch.ones(1, 6400).short()), "int16: must be .*32768"),
    "int64": (lambda: fit_ddsp(small(), torch.ones(1, 6400).long()), r"int64.*\[-1, 1\]$"),
    "cast": (lambda: fit_ddsp(small(), 9e3 * torch.ones(2, 6400)), "audio reaches 9000: .*32768"),
    "below": (lambda: fit_ddsp(small(), -5 * torch.ones(2, 6400)), "audio reaches 5: must be in"),
    "nan": (lambda: fit_ddsp(small(), spoilt(math.nan)), "audio has 1 values .* first in row 2"),
    "inf": (lambda: fit_ddsp(small(), spoilt(math.inf)), "audio has 1 values .* first in row 2"),
    "mute row": (lambda: fit_ddsp(small(), mute()), "audio is silent in row 1, 3 of 4.*leave it"),
    "pitch": (lambda: fit_ddsp(small(), torch.rand(1, 6400), f[None]), "f0 has shape"),
    "silence": (lambda: fit_ddsp(small(), torch.zeros(1, 12800), f[None]), "audio is silent"),
    "keyword": (lambda: fit_ddsp(small(), torch.rand(1, 12800), f[None], 1, epochs=3), "epochs"),
    "match": (lambda: timbre_transfer(small(), torch.rand(1, 6400)), "has not been trained"),
    "shift": (lambda: timbre_transfer(small(), torch.rand(1, 6400), shift="8"), "shift='8'"),
    "shift nan": (lambda: timbre_transfer(small(), c, shift=math.nan), "shift=nan"),
    "way": (lambda: timbre_transfer(small(), c, loudness="same"), "loudness='same'"),
    "rate 2": (lambda: timbre_transfer(small(), c, sr=8000), "sr=8000"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, words = BAD[name]
    with pytest.raises((ValueError, TypeError), match=words):
        call()


def test_audio_of_another_precision_is_converted():
    x = notes("flute")[0][[1, 4], :4096].half().float()  # exact in all three types
    f0 = torch.full((2, 32), 440.0)
    fits = []
    for kind in (torch.float32, torch.float64, torch.float16):
        torch.manual_seed(0)
        model = small(4, 5)
        pitch = f0 if kind == torch.float16 else f0.to(kind)
        run = fit_ddsp(model, x.to(kind), pitch, 3, sizes=(128,), batch_size=2, progress=False)
        fits.append(run.losses)
        assert model.seen.dtype == torch.float32
    assert torch.equal(fits[0], fits[1]) and torch.equal(fits[0], fits[2])
    loud = 1.5 * x / x.abs().max()  # a mix that overshoots is no mistake
    assert fit_ddsp(small(4, 5), loud, f0, 1, sizes=(128,), progress=False).losses.isfinite().all()


def test_silence_cannot_be_played():
    model = DDSP(RnnFcDecoder(1 + 4 + 3, channels=4, layers=1), 4, 3)
    model.seen.copy_(torch.tensor([[70.0, 2.0], [-20.0, 3.0]]))
    for how in ({}, {"loudness": "keep"}, {"shift": "octave"}):
        with pytest.raises(ValueError, match="audio is silent"):
            timbre_transfer(model, torch.zeros(1, 6400), **how)
