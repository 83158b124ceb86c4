"""Spectrograms, loudness, upsampling, convolution, pitch and the way back: against librosa, scipy
and closed forms; the player in a browser."""

import base64
import io
import math
import re
import shutil
import wave
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.signal import fftconvolve
from torch.autograd import gradcheck
from torch.testing import assert_close

from diffkit.audio.signal import (
    MelSpec,
    a_weighting,
    fft_convolve,
    griffin_lim,
    log_mel,
    loudness,
    mel_filterbank,
    mel_to_linear,
    notes,
    play,
    plot_mel,
    rms_db,
    spectral_loss,
    stft_mag,
    upsample,
    yin,
)
from diffkit.core.show import figure

SR = 16000
SPEC = MelSpec(SR, 512, 128, 400, 40, 60, 7600)  # a window shorter than the transform
T = torch.arange(SR, dtype=torch.float64) / SR


def rand(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g, dtype=torch.float64) / 4


def sine(f, phase=0.0):
    return torch.sin(2 * math.pi * torch.as_tensor(f)[..., None] * T + phase)


# ---------------------------------------------------------------- librosa's numbers


def test_equal_to_librosa():
    librosa = pytest.importorskip("librosa", reason="pip install diffkit[dev]")
    x = rand(2, 5001)
    # double precision: both sum the same products, in another order
    for size, overlap in ((512, 0.75), (64, 0.5), (400, 0.0)):
        want = librosa.stft(x.numpy(), n_fft=size, hop_length=round(size * (1 - overlap)))
        got = stft_mag(x, size, overlap, center=True)
        assert_close(got.numpy(), np.abs(want), atol=1e-11, rtol=0)
        want = librosa.stft(
            x.numpy(), n_fft=size, hop_length=round(size * (1 - overlap)), center=False
        )
        got = stft_mag(x, size, overlap, pad_end=False)
        assert_close(got.numpy(), np.abs(want), atol=1e-11, rtol=0)
    for htk in (False, True):
        for norm in (None, "slaney"):
            for bins, fft, sr, fmin, fmax in (
                (80, 1024, 22050, 80, 7600),
                (24, 512, 16000, 0, None),
            ):
                how = dict(norm=norm, htk=htk)
                want = librosa.filters.mel(
                    sr=sr, n_fft=fft, n_mels=bins, fmin=fmin, fmax=fmax, dtype=np.float64, **how
                )
                got = mel_filterbank(bins, fft, sr, fmin, fmax, **how)
                assert_close(got.numpy(), want, atol=1e-12, rtol=0)
    f = np.linspace(10, 20000, 300)  # librosa cuts at -80 dB, which these do not reach
    assert_close(a_weighting(f).numpy(), librosa.A_weighting(f), atol=1e-9, rtol=0)
    assert a_weighting(0.0) == -math.inf
    rms = librosa.feature.rms(y=x.numpy(), frame_length=512, hop_length=64)[:, 0, :79]
    assert_close(
        rms_db(x, SR).numpy(), 20 * np.log10(rms.astype(float)), atol=1e-4, rtol=0
    )  # librosa: float32


def test_log_mel_is_that_of_librosa():
    librosa = pytest.importorskip("librosa", reason="pip install diffkit[dev]")
    x = rand(4000)
    x[:1500] = 0  # frames at the floor
    for spec in (SPEC, MelSpec(log="ln", floor=1e-3, norm=None, htk=True)):
        S = librosa.feature.melspectrogram(
            y=x.numpy(), sr=spec.sr, n_fft=spec.fft, hop_length=spec.hop, win_length=spec.win,
            n_mels=spec.bins, fmin=spec.fmin, fmax=spec.fmax, power=1.0, norm=spec.norm,
            htk=spec.htk,
        )  # fmt: skip
        log = np.log if spec.log == "ln" else np.log10
        got = log_mel(x, spec, spec.sr)
        assert_close(got.numpy(), log(np.maximum(S, spec.floor)), atol=1e-4, rtol=0)  # float32 mel
        assert got.shape == (spec.bins, spec.frames(4000))
        assert float(got.min()) == pytest.approx(log(spec.floor))


# ---------------------------------------------------------------- the transform


def test_parseval_for_one_frame():
    x = rand(256)
    S = stft_mag(x, 256, pad_end=False)[:, 0].square()
    w = torch.hann_window(256, dtype=torch.float64)
    assert_close(S[0] + 2 * S[1:-1].sum() + S[-1], 256 * (w * x).square().sum())


def test_frames_begin_where_they_should_and_all_samples_are_seen():
    x = torch.zeros(1000, dtype=torch.float64)
    for at in (0, 500, 999):
        hit = stft_mag(x.index_fill(0, torch.tensor([at]), 1.0), 100, 0.5)
        w = torch.hann_window(100, dtype=torch.float64)
        for m in range(hit.shape[1]):  # frame m holds samples 50 m to 50 m + 99
            want = w[at - 50 * m] if 0 <= at - 50 * m < 100 else 0.0
            assert_close(hit[:, m], torch.full((51,), float(want), dtype=torch.float64))
        assert hit.shape[1] == 20
    assert stft_mag(rand(1001), 100, 0.5).shape == (51, 21)
    assert stft_mag(rand(100), 100, 0.5, pad_end=False).shape == (51, 1)


def test_leading_dimensions():
    x = rand(2, 3, 2048)
    spec = SPEC
    for f in (
        lambda x: stft_mag(x, 256),
        lambda x: log_mel(x, spec),
        lambda x: loudness(x, SR),
        lambda x: rms_db(x, SR),
        lambda x: upsample(x, 4096, "hann"),
        lambda x: fft_convolve(x, x[..., :50]),
        lambda x: yin(x, SR, fmin=100).f0,
        lambda x: griffin_lim(log_mel(x, spec), spec, 0, n=2048).isfinite(),
    ):
        assert_close(f(x)[1, 2], f(x[1, 2]))
    assert_close(
        spectral_loss(x, x.flip(-1)),
        torch.stack([spectral_loss(a, a.flip(-1)) for a in x.reshape(6, -1)]).mean(),
    )


# ---------------------------------------------------------------- the loss


def test_spectral_loss_by_hand_and_its_terms():
    x, y = rand(600), rand(600, seed=1)
    total = {"mean": 0.0, "sum": 0.0}
    for size in (64, 32):
        hop, w = size // 4, torch.hann_window(size, dtype=torch.float64)
        frames = -(-600 // hop)
        end = torch.zeros(size, dtype=torch.float64)
        S, R = (
            torch.stack([torch.fft.rfft(w * torch.cat([v, end])[m * hop : m * hop + size]).abs()
                         for m in range(frames)])
            for v in (x, y)
        )  # fmt: skip
        d = 0.5 * (S - R).abs() + 2 * (S.clamp(min=1e-2).log() - R.clamp(min=1e-2).log()).abs()
        total["mean"] += d.mean()
        total["sum"] += d.sum()
    for reduce, want in total.items():
        got = spectral_loss(x, y, (64, 32), 0.5, 2.0, reduce, floor=1e-2)
        assert_close(got, want)
    assert spectral_loss(x, x, (64,)) == 0 == spectral_loss(x, -x, (64,))
    assert_close(spectral_loss(x, y, (64,)), spectral_loss(y, x, (64,)))
    assert spectral_loss(x, y, (64,), mag=0, log=0) == 0


def test_gradients():
    y = rand(2, 2048).float()
    for start in (torch.zeros(2, 2048), y, 1e-6 * y):
        x = start.clone().requires_grad_()
        spectral_loss(x, y).backward()
        assert x.grad.isfinite().all()
    x = rand(300).requires_grad_()
    small = MelSpec(8000, 64, 16, 64, 8, 50, None)
    for f in (
        lambda x: spectral_loss(x, rand(300, seed=2), (64, 32)),
        lambda x: log_mel(x, small),
        lambda x: loudness(x, 8000, 500, 64),
        lambda x: rms_db(x, 8000, 500, 64),
        lambda x: upsample(x[:10], 40, "hann"),
        lambda x: upsample(x[:10], 37),
        lambda x: fft_convolve(x[:100], x[200:240], "center"),
    ):
        assert gradcheck(f, x, fast_mode=True)
    z = torch.zeros(1024, requires_grad=True)
    (loudness(z, SR).sum() + rms_db(z, SR).sum() + log_mel(z, SPEC).sum()).backward()
    assert z.grad.isfinite().all()


# ---------------------------------------------------------------- loudness


def test_loudness_of_a_tone_is_its_level_plus_the_curve():
    f = torch.tensor([250.0, 1000, 3000, 6000], dtype=torch.float64)
    x = 0.1 * sine(f)
    inner = slice(20, 220)
    level = 20 * math.log10(0.1) - 10 * math.log10(2)
    # frames of a whole number of periods: exact; the curve is not flat over a window's width
    assert_close(rms_db(x, SR)[:, inner], torch.full((4, 200), level).double(), atol=1e-3, rtol=0)
    got = (loudness(x, SR) - rms_db(x, SR))[:, inner]
    assert_close(got, a_weighting(f)[:, None].expand(4, 200), atol=0.02, rtol=0)
    assert abs(float(a_weighting(1000.0))) < 0.01
    # the frame's length is no part of the level, and ten times the sound is 20 dB more
    assert_close(loudness(x, SR, fft=1024)[:, 100], loudness(x, SR)[:, 100], atol=0.02, rtol=0)
    assert_close(loudness(10 * x, SR)[:, inner], loudness(x, SR)[:, inner] + 20)
    assert loudness(x, SR).shape == (4, 250)
    assert (loudness(0 * x, SR, range_db=60) == -60).all()


# ---------------------------------------------------------------- upsampling, convolution


def test_upsampling_at_frames_and_between():
    ramp = torch.arange(10, dtype=torch.float64)
    for n in (640, 37, 10):  # a multiple, none, the frames themselves
        want = (torch.arange(n, dtype=torch.float64) * 10 / n).clamp(max=9)
        assert_close(upsample(ramp, n), want)
    x, hop = rand(3, 10), 32
    for method in ("linear", "hann"):
        y = upsample(x, 10 * hop, method)
        assert_close(y[:, ::hop], x)
        assert_close(y[:, 9 * hop :], x[:, 9:].expand(3, hop))  # the last one is held
        assert_close(upsample(torch.full((7,), 0.3), 70, method), torch.full((70,), 0.3))
    # overlapping windows of two hops; the held frame is one frame more
    w = torch.hann_window(2 * hop, dtype=torch.float64)
    want = torch.zeros(3, 12 * hop, dtype=torch.float64)
    for j, v in enumerate([*x.T, x[:, -1]]):
        want[:, j * hop : (j + 2) * hop] += v[:, None] * w
    assert_close(upsample(x, 10 * hop, "hann"), want[:, hop : 11 * hop])


def test_long_clips_do_not_drift():
    n, frames = 3 * 10**6, 46875  # 64 samples a frame, where i / 64 is no longer exact in float32
    y = upsample(torch.arange(frames) % 2 * 1.0, n)  # ends with 1, 0
    assert_close(y[-128:], torch.cat([1 - torch.arange(64) / 64, torch.zeros(64)]))


@pytest.mark.parametrize("taps", [1, 2, 127, 128, 700])
def test_convolution(taps):
    x, h = rand(3, 500), rand(taps, seed=1)
    want = torch.from_numpy(fftconvolve(x.numpy(), h.numpy()[None], axes=1))
    want = torch.cat([want, torch.zeros(3, taps)], 1)
    for delay, cut in (("none", 0), ("center", taps // 2), (taps - 1, taps - 1)):
        assert_close(fft_convolve(x, h, delay), want[:, cut : cut + 500])
    delta = torch.zeros(taps, dtype=torch.float64)
    delta[taps // 2] = 1
    assert_close(fft_convolve(x, delta, "center"), x)
    rows = rand(3, taps, seed=2)  # an impulse response a row
    assert_close(fft_convolve(x, rows)[1], fft_convolve(x[1], rows[1]))


# ---------------------------------------------------------------- pitch


@pytest.mark.parametrize("sr", [16000, 22050])
def test_yin_on_tones(sr):
    t = torch.arange(sr // 2, dtype=torch.float64) / sr
    g = torch.Generator().manual_seed(3)
    f0 = 70 * 2 ** (torch.rand(20, generator=g, dtype=torch.float64) * 4.5)
    x = torch.zeros(20, len(t), dtype=torch.float64)
    for k in range(1, 16):
        r = torch.rand(2, 20, 1, generator=g, dtype=torch.float64)
        audible = (k * f0[:, None] < 0.48 * sr).double()
        x += audible * r[0] / k * torch.sin(2 * math.pi * (k * f0[:, None] * t + r[1]))
    found = yin(x.float(), sr, rate=50)
    cents = 1200 * torch.log2(found.f0.double() / f0[:, None])[:, 2:-2]
    assert cents.abs().max() < 0.5  # ten times better than what is asked for
    assert found.aperiodicity[:, 2:-2].max() < 0.02
    assert found.f0.shape == (20, 25) and found.f0.dtype == torch.float32
    quieter = yin(1e-3 * x.float(), sr, rate=50)
    assert_close(quieter.f0, found.f0, rtol=1e-4, atol=0)


def test_yin_follows_and_knows_where_frames_are():
    f = torch.where(T < 0.5, 200.0, 300.0).double()
    x = torch.sin(2 * math.pi * torch.cumsum(f, 0) / SR)
    f0 = yin(x, SR).f0
    # frame 125 lies around the step; a frame is two periods of 65 Hz, so four frames to each side
    assert_close(f0[10:120], torch.full((110,), 200.0, dtype=torch.float64), rtol=1e-3, atol=0)
    assert_close(f0[130:240], torch.full((110,), 300.0, dtype=torch.float64), rtol=1e-3, atol=0)
    silent = yin(torch.zeros(4000), SR)
    assert silent.f0.isfinite().all() and (silent.aperiodicity == 1).all()
    assert yin(rand(8000), SR).aperiodicity.median() > 0.5


def test_yin_has_no_delay():
    f = 110 * 2 ** (0.5 / 12 * torch.sin(2 * math.pi * 6 * T))  # a vibrato of ±50 cents
    f0 = yin(torch.sin(2 * math.pi * f.cumsum(0) / SR), SR).f0
    cents = 1200 * torch.log2(f0 / f[::64])[10:-10]
    assert cents.abs().max() < 3  # one-sided frames are half a period off: 8.8 cents


def test_yin_takes_the_first_dip():
    x = torch.sin(2 * math.pi * 220 * T) + 0.3 * torch.sin(2 * math.pi * 440 * T)
    assert_close(yin(x, SR).f0[30:200], torch.full((170,), 220.0).double(), rtol=1e-4, atol=0)
    # forced to look below, it must find two periods
    low = yin(x, SR, fmax=150.0).f0[30:200]
    assert_close(low, torch.full((170,), 110.0).double(), rtol=1e-4, atol=0)


@pytest.mark.parametrize("low, high", [(150.0, 400.0), (300.0, 2000.0), (1000.0, 1100.0)])
def test_yin_stays_in_its_range(low, high):
    sounds = [sine(f)[:4000] for f in (31.0, 90.0, 140.0, 290.0, 470.0, 1300.0)]
    f0 = yin(torch.stack([*sounds, *rand(2, 4000)]), SR, 100, low, high).f0
    # the lags are quarters of a sample; a parabola may go one of them beyond the last
    longest, shortest = math.ceil(4 * SR / low) + 1, math.floor(4 * SR / high) - 1
    assert (f0 >= 4 * SR / longest).all() and (f0 <= 4 * SR / shortest).all()


# ---------------------------------------------------------------- back to sound


def test_mel_to_linear_keeps_the_mel():
    x = notes("flute")[0][3].double()
    mel = log_mel(x, SPEC)
    S = mel_to_linear(mel, SPEC, 100)
    got = (SPEC.filters() @ S).clamp(min=SPEC.floor)
    assert (got - 10**mel).norm() / (10**mel).norm() < 0.02 and (S >= 0).all()
    errors = [(SPEC.filters() @ mel_to_linear(mel, SPEC, i) - 10**mel).norm() for i in range(5)]
    assert all(b < a for a, b in zip(errors, errors[1:]))  # Lee and Seung's theorem
    natural = MelSpec(SR, 512, 128, 400, 40, 60, 7600, log="ln")
    assert_close(mel_to_linear(log_mel(x, natural), natural), S)


def test_griffin_lim_falls_and_is_a_sound_of_this_mel():
    x, seen = notes("violin")[0][4, :6000].double(), []
    mel = log_mel(x, SPEC)
    S = mel_to_linear(mel, SPEC)
    keep = lambda i, X: seen.append(float((X.abs() - S).norm()))
    g = lambda: torch.Generator().manual_seed(0)
    y = griffin_lim(mel, SPEC, 20, momentum=0.0, n=6000, generator=g(), callback=keep)
    assert len(seen) == 20 and all(b < a for a, b in zip(seen, seen[1:]))
    assert y.shape == x.shape
    assert_close(griffin_lim(mel, SPEC, 20, 0.0, 6000, g()), y, rtol=0, atol=0)
    fast = griffin_lim(mel, SPEC, 60, n=6000, generator=g())
    griffin_lim(mel, SPEC, 20, n=6000, generator=g(), callback=keep)
    assert seen[-1] < seen[19]  # the momentum steps ahead, not back
    gap = lambda y: (log_mel(y, SPEC) - mel).abs().mean()
    assert gap(fast) < gap(griffin_lim(mel, SPEC, 0, n=6000, generator=g())) / 2
    f0 = yin(fast, SR).f0[20:70]
    assert (1200 * torch.log2(f0 / 440)).median().abs() < 20  # key 69, with its vibrato
    assert griffin_lim(mel, SPEC, 1).shape == (46 * 128,)  # without n: (frames - 1) hop


# ---------------------------------------------------------------- the notes, the player


def test_notes_are_what_they_say():
    for name in ("flute", "violin"):
        x, keys, sr = notes(name)
        assert x.shape == (10, 16000) and x.dtype == torch.float32 and sr == SR
        assert 0.5 < x.abs().max() <= 0.91 and keys.tolist()[4] == 69
        f = 440 * 2 ** ((keys.double() - 69) / 12)
        cents = 1200 * torch.log2(yin(x, sr, rate=50).f0.double() / f[:, None])[:, 10:40]
        assert cents.median(1).values.abs().max() < 15  # the font's own tuning
        assert x[:, -1].abs().max() == 0 and x[:, 4000:12000].square().mean(1).min() > 0.01
    assert not torch.equal(notes("flute")[0], notes("violin")[0])


def sounds(shown):  # the WAV files of a page
    found = re.findall(r'src="data:audio/wav;base64,([^"]+)"', shown.bundle["text/html"])
    out = []
    for data in found:
        with wave.open(io.BytesIO(base64.b64decode(data))) as f:
            pcm = np.frombuffer(f.readframes(f.getnframes()), "<i2")
            out.append((f.getframerate(), f.getnchannels(), f.getsampwidth(), pcm))
    return out


def test_play_writes_what_it_was_given():
    x = 0.5 * sine(torch.tensor([440.0, 1000.0]))[:, :3000]
    shown = play({"low <b>": x[0], "high": 3 * x[1].float()}, SR, "Two tones, one each.",
                 normalize=True, spectrogram=True)  # fmt: skip
    html = shown.bundle["text/html"]
    rows = sounds(shown)
    assert [r[:3] for r in rows] == [(SR, 1, 2)] * 2
    for (*_, pcm), want in zip(rows, x):
        assert np.abs(pcm / 32767 - (want / want.abs().max()).numpy()).max() < 0.51 / 32767 + 1e-6
    assert html.count("<audio controls") == 2 == html.count("<img ")
    assert 'aria-label="low &lt;b&gt;, 0.19 seconds"' in html and "<b>, " not in html
    assert re.search(r"<figcaption[^>]*><b>Figure \d+\.</b> Two tones, one each\.", html)
    ((rate, _, _, pcm),) = sounds(play(x[0], 8000, "One tone at half speed."))
    assert rate == 8000 and np.abs(pcm / 32767 - x[0].numpy()).max() < 0.51 / 32767
    assert sounds(play(torch.ones(10), SR, "All at the very top."))[0][3].max() == 32767


def test_plot_mel_has_the_right_axes():
    _, ax = figure(1, 1)
    plot_mel(ax, sine(1000.0)[:8000].float(), SR)
    image = ax.images[0]
    left, right, low, high = image.get_extent()
    row = int(np.asarray(image.get_array()).mean(1).argmax())
    mel = low + (row + 0.5) / image.get_array().shape[0] * (high - low)
    assert (left, right) == (0, 0.5) and abs(mel - 15) < (high - low) / 64  # 1 kHz is 15 mel


@pytest.mark.browser
def test_a_browser_plays_it(tmp_path):
    sync = pytest.importorskip("playwright.sync_api", reason="pip install diffkit[dev]")
    names = ("/usr/bin/chromium", "/usr/bin/chromium-browser")
    found = [p for p in names if Path(p).exists()]
    exe = next(iter(found), None) or shutil.which("chromium") or shutil.which("google-chrome")
    if exe is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    page = tmp_path / "page.html"
    clips = {"long": notes("flute")[0][0], "short": notes("violin")[0][1, :8000]}
    shown = play(clips, SR, "Two clips of two lengths.")
    page.write_text(f"<!doctype html><meta charset=utf-8>{shown.bundle['text/html']}")
    args = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio"]
    with sync.sync_playwright() as p:
        browser = p.chromium.launch(
            executable_path=exe, args=[*args, "--autoplay-policy=no-user-gesture-required"]
        )
        tab = browser.new_page()
        tab.goto(page.as_uri())
        seen = tab.evaluate(
            """async () => Promise.all([...document.querySelectorAll('audio')].map(async (a) => {
              if (a.readyState < 4) await new Promise((done) => {
                a.oncanplaythrough = done; a.onerror = done; setTimeout(done, 5000); });
              const failed = await a.play().then(() => '', String);
              await new Promise((done) => setTimeout(done, 400));
              return [a.duration, a.error && a.error.code, failed, a.currentTime];
            }))"""
        )
        names = [e.get_attribute("aria-label") for e in tab.query_selector_all("audio")]
        browser.close()
    for (duration, error, failed, at), want in zip(seen, (1.0, 0.5)):
        assert duration == pytest.approx(want, rel=0.01), seen
        assert error is None and not failed and at > 0, seen
    assert names == ["long, 1 seconds", "short, 0.5 seconds"]


# ---------------------------------------------------------------- bad input

X = torch.zeros(4096)
BAD = {
    "integers": (lambda: log_mel((X * 9).short()), "x is torch.int16.*x / 32768"),
    "a number": (lambda: rms_db(torch.tensor(0.5), SR), r"x has shape \(\).*\(\.\.\., samples\)"),
    "nothing": (lambda: stft_mag(torch.zeros(2, 0), 64), r"x has shape \(2, 0\)"),
    "frame too long": (lambda: stft_mag(X[:50], 64), "size=64: must be at most the 50 samples"),
    "loss too long": (lambda: spectral_loss(X[:999], X[:999]), "size=2048"),
    "no hop": (lambda: stft_mag(X, 64, 0.99), "overlap=0.99.*whole hop"),
    "all overlap": (lambda: stft_mag(X, 64, 1.0), "overlap=1.0"),
    "a size of text": (lambda: stft_mag(X, "64"), "size='64'"),
    "shapes": (lambda: spectral_loss(X, X[None]), r"y has shape \(1, 4096\)"),
    "no sizes": (lambda: spectral_loss(X, X, ()), "sizes"),
    "reduce": (lambda: spectral_loss(X, X, reduce="avg"), "reduce='avg'"),
    "weight": (lambda: spectral_loss(X, X, mag=-1), "mag=-1"),
    "fmax": (lambda: mel_filterbank(40, 512, 16000, 0, 9000), "fmax=9000.*8000"),
    "fmin": (lambda: mel_filterbank(40, 512, 16000, 5000, 4000), "fmin=5000"),
    "empty bands": (lambda: mel_filterbank(128, 256, 16000), "bins=128: filter .* larger fft"),
    "norm": (lambda: mel_filterbank(40, 512, 16000, norm="slany"), "did you mean 'slaney'"),
    "window": (lambda: MelSpec(win=2048), "win=2048.*1024"),
    "transform": (lambda: MelSpec(fft=1, win=1), "fft=1: must be"),
    "log": (lambda: MelSpec(log="log2"), "log='log2'"),
    "floor": (lambda: MelSpec(floor=0.0), "floor=0.0"),
    "mel rate": (lambda: log_mel(X, MelSpec(), 16000), "sr=16000.*sr=22050"),
    "rate": (lambda: loudness(X, 16000, 300), "rate=300: must divide sr=16000"),
    "no sr": (lambda: loudness(X, None), "sr=None"),
    "range": (lambda: loudness(X, SR, range_db=0), "range_db=0"),
    "no multiple": (lambda: upsample(X[:10], 64, "hann"), "n=64.*multiple of the 10"),
    "fewer": (lambda: upsample(X[:10], 9), "n=9: must be at least 10"),
    "method": (lambda: upsample(X[:10], 20, "cubic"), "method='cubic'"),
    "late": (lambda: fft_convolve(X, X[:10], 10), "delay=10.*0 to 9"),
    "delay": (lambda: fft_convolve(X, X[:10], "centre"), "did you mean 'center'"),
    "ir": (lambda: fft_convolve(X, X[:10].long()), "ir is torch.int64"),
    "pitch NaN": (lambda: yin(X * math.nan, SR), "finite"),
    "pitch range": (lambda: yin(X, SR, fmin=900, fmax=800), "fmin=900"),
    "pitch high": (lambda: yin(X, SR, fmax=9000), "fmax=9000"),
    "pitch short": (lambda: yin(X[:300], SR), "two of its periods"),
    "bins": (lambda: griffin_lim(torch.zeros(40, 9)), r"mel has shape \(40, 9\).*80 bins"),
    "mel shape": (lambda: griffin_lim(torch.zeros(80)), r"\(\.\.\., bins, frames\)"),
    "momentum": (lambda: griffin_lim(torch.zeros(80, 9), momentum=-0.1), "momentum=-0.1"),
    "wrong n": (lambda: griffin_lim(torch.zeros(80, 9), n=99), "n=99.*9 frames"),
    "instrument": (lambda: notes("flut"), "did you mean 'flute'"),
    "play NaN": (lambda: play(X / 0, SR, "a clip of nothing"), "x has 4096 values that are NaN"),
    "play integers": (lambda: play(X.short(), SR, "a clip of integers"), "32768"),
    "play loud": (lambda: play(X + 1.5, SR, "a clip too loud"), "reaches 1.5.*normalize=True"),
    "play stereo": (lambda: play(X.view(2, -1), SR, "a clip in stereo"), "'left': x\\[0\\]"),
    "play named": (lambda: play({"a": X, "b": X + 2}, SR, "two clips here"), r"x\['b'\] reaches 2"),
    "play none": (lambda: play({}, SR, "no clips at all"), "at least one"),
    "play kHz": (lambda: play(X, 16, "a clip at sixteen"), "sr=16: must be an integer from 3000"),
    "play unnamed": (lambda: play(X, SR, "hm"), "caption"),
    "plot batch": (lambda: plot_mel(None, X[None], SR), "one clip"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name):
    call, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        call()
