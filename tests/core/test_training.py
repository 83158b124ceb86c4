"""The training loop: bit-for-bit resumption after a kill, atomic files, refusals, several
processes."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tqdm.auto
from diffkit.core import training
from diffkit.core.denoiser import NetDenoiser
from diffkit.core.nets import MLP
from diffkit.core.process import VP, Cosine, time_grid
from diffkit.core.sampling import DDIM, sample
from diffkit.core.training import Run, descend, fit, load_tensors, pack, save_tensors, unpack
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
Y = X @ torch.tensor([[1.0], [-2.0], [3.0]]) + 0.5
QUIET = dict(progress=False, seed=5)


@pytest.fixture(autouse=True)
def interruptible():
    # a process started in the background ignores Ctrl-C; these tests are about one that does not
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def linear():
    torch.manual_seed(4)
    return nn.Linear(3, 1)


def denoiser(process=None, predicts="v", hidden=8):
    torch.manual_seed(2)
    net = MLP(dim=3, hidden=hidden, depth=1)
    return NetDenoiser(net, process or VP(), predicts=predicts)


def mse(m, batch):
    return (m(batch[0]) - batch[1]).square().mean()


def noisy(m, batch):
    return (m(batch[0] + torch.randn_like(batch[0])) - batch[1]).square().mean() * (
        1 + 0.1 * np.random.rand()
    )


def same(a, b):
    return all(
        torch.equal(p, q)
        for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    )


def state(file):
    tensors, skeleton = load_tensors(file)
    skeleton.pop("seconds")
    return tensors, skeleton


def assert_same_checkpoint(a, b):
    (ta, sa), (tb, sb) = state(a), state(b)
    assert sa == sb and ta.keys() == tb.keys()
    assert [k for k in ta if not torch.equal(ta[k], tb[k])] == []


SCRIPT = """
import os, random, signal, sys, numpy as np, torch
from torch import nn
from diffkit.core.training import fit
file, kill, kind = sys.argv[1], int(sys.argv[2]), sys.argv[3]
torch.manual_seed(1)
net = nn.Sequential(
    nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(.2), nn.Linear(16, 4))
x = torch.randn(37, 4)
def stream():
    g = torch.Generator().manual_seed(8)
    while True: yield x[torch.randint(0, 37, (8,), generator=g)] + torch.randn(8, 4)
own = torch.Generator().manual_seed(9)
loader = lambda **more: torch.utils.data.DataLoader(x, batch_size=8, shuffle=True, **more)
data = {"tensor": lambda: x, "tuple": lambda: (x,), "stream": stream, "loader": loader,
        "own": lambda: loader(generator=own, drop_last=True)}[kind]()
def loss(m, b):
    b = b[0] if isinstance(b, tuple) else b
    return (m(b + torch.randn(4)) - random.random() * np.random.rand()).square().mean()
def bomb(run):
    print(run.step, flush=True)
    if run.step == kill: os.kill(os.getpid(), signal.SIGKILL)
fit(net, loss, data, 24, 1e-2, seed=3, batch_size=8, checkpoint=file, every=4, callback=bomb,
    schedule='cosine', progress=False, optimizer=lambda p: torch.optim.AdamW(p, 1e-2))
"""


def launch(tmp_path, file, kill, kind, **kw):
    (tmp_path / "train.py").write_text(SCRIPT)
    return subprocess.run(
        [sys.executable, str(tmp_path / "train.py"), str(tmp_path / file), str(kill), kind],
        capture_output=True,
        text=True,
        **kw,
    )


@pytest.mark.parametrize("kind", ["loader", "tuple"])
def test_killed_and_resumed_ends_bit_for_bit(tmp_path, kind):
    assert launch(tmp_path, "one", 0, kind).returncode == 0
    assert launch(tmp_path, "two", 14, kind).returncode == -signal.SIGKILL
    again = launch(tmp_path, "two", 0, kind)
    # it went on after step 12, it did not begin again
    assert again.returncode == 0 and again.stdout.split()[0] == "13"
    assert_same_checkpoint(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("kind", ["tensor", "tuple", "stream", "loader", "own"])
def test_interrupted_and_resumed_ends_bit_for_bit(tmp_path, kind):
    """The same in one process, for every kind of data, at a step that ends an epoch and at one
    that does not."""

    class Stop(Exception):
        pass

    def run(file, stop=0):
        torch.manual_seed(1)
        net = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.SiLU(), nn.Dropout(0.2), nn.Linear(16, 4)
        )
        x, own = torch.randn(37, 4), torch.Generator().manual_seed(9)

        def stream():
            g = torch.Generator().manual_seed(8)
            while True:
                yield x[torch.randint(0, 37, (8,), generator=g)] + torch.randn(8, 4)

        data = {
            "tensor": lambda: x,
            "tuple": lambda: (x, x),
            "stream": stream,
            "loader": lambda: torch.utils.data.DataLoader(x, batch_size=8, shuffle=True),
            "own": lambda: torch.utils.data.DataLoader(
                x, batch_size=8, shuffle=True, generator=own
            ),
        }[kind]()

        def loss(m, b):
            return (
                (
                    m((b if isinstance(b, torch.Tensor) else b[0]) + torch.randn(4))
                    - np.random.rand()
                )
                .square()
                .mean()
            )

        def callback(r):
            if r.step == stop:
                raise Stop

        torch.rand(stop)  # the state of the generators before the call must not matter
        return fit(
            net,
            loss,
            data,
            20,
            1e-2,
            checkpoint=file,
            every=1,
            callback=callback,
            batch_size=8,
            **QUIET,
        )

    whole = run(tmp_path / "whole")
    for stop in (6, 11):
        file = tmp_path / f"cut{stop}"
        with pytest.raises(Stop):
            run(file, stop)
        again = run(file)
        assert (
            again.resumed == stop - 1
            and same(again.model, whole.model)
            and same(again.ema, whole.ema)
            and torch.equal(again.losses, whole.losses)
        )
        assert_same_checkpoint(tmp_path / "whole", file)


@pytest.mark.slow
def test_killed_at_any_moment_the_checkpoint_is_whole(tmp_path):
    """Kill a run that writes at every step, after a random delay, again and again: what is
    there can always be read, and the end is the same."""
    (tmp_path / "train.py").write_text(
        SCRIPT.replace("every=4", "every=1").replace("24, 1e-2", "150, 1e-2")
    )
    args = lambda f: [sys.executable, str(tmp_path / "train.py"), str(tmp_path / f), "0", "tensor"]
    rng, file = np.random.default_rng(0), tmp_path / "two"
    for _ in range(4):
        p = subprocess.Popen(args("two"), stdout=subprocess.PIPE, text=True)
        p.stdout.readline()
        time.sleep(rng.uniform(0, 0.4))
        p.kill()
        p.wait()
        if file.exists():
            load_tensors(file)
    assert (
        subprocess.run(args("two"), capture_output=True).returncode == 0
        and subprocess.run(args("one"), capture_output=True).returncode == 0
    )
    assert_same_checkpoint(tmp_path / "one", file)
    # no litter of killed writes
    assert sorted(f.name for f in tmp_path.iterdir()) == ["one", "train.py", "two"]


def test_nan_names_the_step_and_leaves_the_last_good_checkpoint(tmp_path):
    file, calls = tmp_path / "ck", []

    def poisoned(m, batch):
        calls.append(1)
        return mse(m, batch) * (float("inf") if len(calls) == 13 else 1)

    with pytest.raises(FloatingPointError, match="loss = inf at step 13.*ck"):
        fit(linear(), poisoned, (X, Y), 30, checkpoint=file, every=5, **QUIET)
    assert state(file)[1]["step"] == 10
    assert same(
        fit(linear(), mse, (X, Y), 30, checkpoint=file, **QUIET).model,
        fit(linear(), mse, (X, Y), 30, **QUIET).model,
    )
    with pytest.raises(FloatingPointError, match="a = 1.0, b = nan at step 1; no checkpoint"):
        fit(
            linear(),
            None,
            (X, Y),
            3,
            step=lambda m, b: {"a": 1.0, "b": torch.tensor(float("nan"))},
            **QUIET,
        )


@pytest.mark.parametrize("where", ["callback", "loss", "signal"])
def test_ctrl_c_saves_and_is_passed_on(tmp_path, where):
    file, calls = tmp_path / "ck", []

    def loss(m, batch):
        calls.append(1)
        if len(calls) == 8 and where == "loss":
            torch.rand(3)
            raise KeyboardInterrupt
        if len(calls) == 7 and where == "signal":
            os.kill(os.getpid(), signal.SIGINT)
        return noisy(m, batch)

    def callback(run):
        if run.step == 7 and where == "callback":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(linear(), loss, (X, Y), 20, checkpoint=file, callback=callback, **QUIET)
    assert state(file)[1]["step"] == 7
    again = fit(linear(), noisy, (X, Y), 20, checkpoint=file, **QUIET)
    whole = fit(linear(), noisy, (X, Y), 20, checkpoint=tmp_path / "whole", **QUIET)
    assert again.resumed == 7 and same(again.model, whole.model) and same(again.ema, whole.ema)
    assert_same_checkpoint(file, tmp_path / "whole")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "ck"
    fit(linear(), mse, (X, Y), 10, checkpoint=file, **QUIET)
    old = file.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(training.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        fit(linear(), mse, (X, Y), 20, checkpoint=file, **QUIET)
    assert file.read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ["ck"]


def test_damaged_or_foreign_checkpoints_are_named_and_refused(tmp_path):
    file = tmp_path / "ck"
    fit(linear(), mse, (X, Y), 10, checkpoint=file, **QUIET)
    good = file.read_bytes()
    go = lambda **kw: fit(
        **{**dict(model=linear(), loss=mse, data=(X, Y), steps=20, checkpoint=file), **QUIET, **kw}
    )
    for at in range(0, len(good), max(1, len(good) // 40)):
        bad = bytearray(good)
        bad[at] ^= 4
        file.write_bytes(bad)
        with pytest.raises(ValueError, match="ck"):
            go()
        assert file.read_bytes() == bytes(bad)
    for keep in (0, 7, 100, len(good) - 1):
        file.write_bytes(good[:keep])
        with pytest.raises(ValueError, match="ck is not a whole safetensors file"):
            go()
    file.write_bytes(good)
    with pytest.raises(ValueError, match="seed=5, this run has seed=6"):
        go(seed=6)
    with pytest.raises(ValueError, match="batch_size=128, this run has batch_size=7"):
        go(batch_size=7)
    with pytest.raises(ValueError, match="does not fit this run"):
        go(model=nn.Linear(3, 2))
    with pytest.raises(ValueError, match="optimizers"):
        go(step=lambda m, b: 0.0, loss=None)
    save_tensors(file, {"w": torch.zeros(1)}, {"other": 1})
    with pytest.raises(ValueError, match="is not a checkpoint of fit"):
        go()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        go(checkpoint=tmp_path / "no" / "ck")


class Rows(torch.utils.data.Dataset):
    "A dataset of one's own."

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


SPOILT = X.clone()
SPOILT[[7, 9]] = torch.tensor([[float("nan")], [float("inf")]])


@pytest.mark.parametrize(
    "bad,says",
    [
        (dict(steps=None), "give the budget in one"),
        (dict(samples=10), "give the budget in one"),
        (dict(steps=-1), "steps=-1"),
        (dict(steps=2.5), "steps=2.5"),
        (dict(lr=-1.0), "lr=-1.0"),
        (dict(lr=float("nan")), "lr=nan"),
        (dict(ema=1.0), "ema=1.0"),
        (dict(schedule="cos"), "'cos'"),
        (dict(schedule=["constant", "cos"]), "'cos'"),
        (dict(schedule=["constant", "cosine"]), "2 entries, there are 1 optimizers"),
        (dict(batch_size=0), "batch_size=0"),
        (dict(every=0), "every=0"),
        (dict(loss=None), "one of them"),
        (dict(step=mse), "one of them"),
        (dict(data=None), "data is missing"),
        (dict(data=(X, Y[:9])), r"\[50, 9\]"),
        (dict(data=X[:0]), r"data has shape \(0, 3\)"),
        (dict(data=torch.tensor(3.0)), r"data has shape \(\)"),
        (dict(data=[]), "data gave no batch"),
        (dict(data=()), r"lengths \[\]"),
        (dict(data=(X, np.arange(50), list(range(49)))), r"lengths \[50, 50, 49\]"),
        (dict(data=TensorDataset(X[:0])), r"data\[0\] has shape \(0, 3\)"),
        (dict(data=Rows([])), "data is a Rows without a sample"),
        (dict(data=DataLoader(Rows([]))), "data gave no batch"),
        (dict(data=DataLoader(X, 99, drop_last=True)), "drop_last=True"),
        (dict(data=Rows([X[0], X[1, :2]])), "the samples of data have different shapes"),
        (dict(data=DataLoader(Rows([X[0], X[1, :2]]), 2)), "collate_fn"),
        (dict(data=Rows(X), batch_size=lambda k: 3), "for a Dataset it must be an integer"),
        (dict(data=(X, torch.where(Y > 2, Y, torch.nan))), r"data\[1\] holds nan or inf in \d+ of"),
        (dict(data=SPOILT), "data holds nan or inf in 2 of 50 rows, the first is row 7"),
        (dict(steps=0), "steps=0: must be a positive integer"),
        (dict(steps=True), "steps=True"),
        (dict(steps="5"), "steps='5'"),
        (dict(steps=None, samples=-3), "samples=-3"),
        (dict(lr=0), "lr=0: must be a positive"),
        (dict(lr=True), "lr=True"),
        (dict(lr="1e-3"), "lr='1e-3'"),
        (dict(ema="no"), "ema='no'"),
        (dict(seed=1.5), "seed=1.5"),
        (dict(clip=0), "clip=0"),
        (dict(warmup=-1), "warmup=-1"),
        (dict(schedule="cosin"), "did you mean cosine"),
        (dict(model=linear().requires_grad_(False)), "a Linear without a parameter that requires"),
        (dict(model=NetDenoiser(MLP, VP())), "a class that was not called"),
        (dict(optimizer=torch.optim.SGD([torch.zeros(1)], 1.0)), "none of the parameters of model"),
        (dict(checkpoint="."), "checkpoint=. is a folder: name a file in it"),
        (dict(loss=lambda m, b: b[0].sum()), "does not depend"),
    ],
)
def test_bad_arguments(bad, says):
    with pytest.raises(ValueError, match=says):
        fit(**{**dict(model=linear(), loss=mse, data=(X, Y), steps=5), **QUIET, **bad})


@pytest.mark.parametrize(
    "bad,says",
    [
        (dict(model=lambda x: x), "model is a function: it must be a torch module"),
        (dict(model=nn.Linear), "model is the class Linear"),
        (dict(loss=X, data=mse), r"loss is a Tensor: .* fit\(model, loss, data, steps\)"),
        (dict(loss=(m := denoiser()).loss, model=m), "loss is a method of the model"),
        (dict(loss=nn.MSELoss()), "loss is a MSELoss"),
        (dict(loss=nn.functional.mse_loss), "loss is mse_loss"),
        (dict(loss=lambda b: b), r"loss must take \(model, batch\).*too many positional"),
        (dict(loss=lambda m, b: m(b[0])), r"got shape \(50, 1\): take its mean"),
        (dict(data=lambda: X), "data is a function"),
        (dict(data="images/"), "data is 'images/', the name of a file or folder"),
        (dict(data=(X, (1, 2))), r"data\[1\] is a tuple: a tensor or an array is needed"),
        (dict(data=(["a"] * 50, Y)), r"data\[0\] is a list that does not hold numbers"),
        (dict(data=([X[0], X[1, :2]], Y[:2])), r"data\[0\] is a list .* rows of one shape"),
        (
            dict(data=np.array([[1, 2], [3]], object)),
            "data is a ndarray that does not hold numbers",
        ),
        (dict(data=X.tolist()), "data was iterated over, and gave .*no tensor"),
        (dict(data=X, loss=lambda m, b: m.weight * b.mean()), "scalar tensor"),
        (dict(loss=lambda m, b: m(b).mean()), r"a tuple of data\[0\], data\[1\].*take it apart"),
        (dict(data={"x": X}, loss=lambda m, b: m(b).mean()), r"a dict of data\['x'\]"),
        (dict(data=((X * 9).byte(), Y)), r"data\[0\] is torch.uint8;.*data / 127.5 - 1"),
        (dict(data=(X.double(), Y)), r"data\[0\] is torch.float64, the model is torch.float32"),
        (dict(data=(X.double(), Y.half())), r"data\[0\] is torch.float64"),
        (dict(optimizer="adam"), "optimizer='adam': must be a class, e.g. torch.optim.AdamW"),
        (dict(callback=3), "callback=3"),
        (dict(checkpoint=True), "checkpoint=True: must be the name of a file"),
        (dict(batchsize=3), "no argument batchsize; did you mean batch_size"),
        (dict(epochs=3), r"no argument epochs.*samples=epochs \* len\(data\)"),
        (dict(device="cuda"), "no argument device.*accelerator"),
        (dict(xyz=1), "no argument xyz; it has model, loss, data"),
    ],
)
def test_what_is_not_what_it_should_be(bad, says):
    "Whoever calls it for the first time reads what to write; nothing was trained until then."
    call = {**dict(model=linear(), loss=mse, data=(X, Y), steps=5), **QUIET, **bad}
    call["callback"] = bad.get("callback", lambda run: pytest.fail("a step was made"))
    with pytest.raises(TypeError, match=says):
        fit(**call)


def test_an_error_of_the_loss_itself_is_passed_on():
    def broken(m, batch):
        raise RuntimeError("size mismatch")

    with pytest.raises(RuntimeError, match="^size mismatch$"):
        fit(linear(), broken, (X, Y), 5, **QUIET)


def test_data_of_every_natural_kind_trains_alike():
    go = lambda data, loss=mse, **kw: fit(linear(), loss, data, 12, **{**QUIET, **kw}).losses
    usual, by_name = go((X, Y)), lambda m, b: mse(m, (b["x"], b["y"]))
    x = X.double().numpy()  # as NumPy makes them
    for data in (
        (x, Y.numpy()),
        (np.asfortranarray(x), Y.flip(0).numpy()[::-1]),
        (x.astype(">f8"), Y.tolist()),
        TensorDataset(X, Y),
    ):
        assert torch.equal(go(data), usual)
    assert torch.equal(go({"x": X, "y": Y.numpy()}, by_name), usual)
    assert torch.equal(go((X, Y), batch_size=np.int64(1000)), usual)  # of all samples
    # a dataset is shuffled, in an order that the seed decides
    rows = Rows(list(zip(X, Y)))
    a, b = go(rows, batch_size=16), go(rows, batch_size=16)
    assert torch.equal(a, b) and not torch.equal(a, go(rows, batch_size=16, seed=6))
    assert fit(linear(), mse, rows, 4, batch_size=16, **QUIET).samples == 50
    whole = go(rows, batch_size=50, lr=1e-9)
    torch.testing.assert_close(whole, go((X, Y), lr=1e-9), atol=1e-6, rtol=0)
    stream = lambda: ((x, Y.numpy()) for _ in range(20))
    assert torch.equal(go(stream()), go([(X, Y)]))


def test_pixels_that_nobody_scaled_are_noticed():
    loss = lambda m, b: m.loss(b)
    go = lambda data, loss=loss: fit(denoiser(), loss, data, 2, **QUIET)
    pixels = torch.arange(150.0).reshape(50, 3)
    with pytest.warns(UserWarning, match="whole numbers from 0 to 149.*data / 127.5 - 1"):
        go(pixels)
    with pytest.raises(TypeError, match="data is torch.uint8.*data / 127.5 - 1"):
        go(pixels.byte())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for fine in (X, 9 * X.abs(), (pixels > 70).float(), pixels - 75):
            go(fine)
        go(pixels.byte(), lambda m, b: m.loss(b / 127.5 - 1))
        fit(linear(), mse, (pixels, Y), 2, **QUIET)  # no diffusion model


@pytest.mark.parametrize(
    "out,says",
    [
        (lambda y: (y, y[:, :1]), None),
        (lambda y: SimpleNamespace(sample=y), None),  # as in diffusers
        (lambda y: y[:, :1], r"shape of x, \(50, 3\), got \(50, 1\)"),
        (lambda y: y.sum(1), r"shape of x, \(50, 3\), got \(50,\)"),
        (lambda y: None, "got NoneType"),
    ],
)
def test_what_networks_return(out, says):
    class Net(MLP):
        def forward(self, x, t):
            return out(super().forward(x, t))

    def go(kind):
        torch.manual_seed(2)
        model = NetDenoiser(kind(dim=3, hidden=8, depth=1), VP(), predicts="v")
        return fit(model, lambda m, b: m.loss(b), X, 3, **QUIET).losses

    if says is None:
        assert torch.equal(go(Net), go(MLP))
    else:
        with pytest.raises((ValueError, TypeError), match=says):
            go(Net)


def test_an_optimizer_class_gets_the_learning_rate():
    go = lambda lr, o: fit(linear(), mse, (X, Y), 5, lr, optimizer=o, **QUIET).losses
    usual = go(0.1, lambda p: torch.optim.SGD(p, 0.1))
    assert torch.equal(go(0.1, torch.optim.SGD), usual)
    assert not torch.equal(go(0.2, torch.optim.SGD), usual)


def test_nan_in_a_stream_is_named_by_its_place():
    with pytest.raises(FloatingPointError, match=r"step 1 \(data\[0\] of this batch holds nan"):
        fit(linear(), mse, DataLoader(TensorDataset(SPOILT, Y), 50), 3, **QUIET)


@pytest.mark.parametrize(
    "change,says",
    [
        (dict(model=denoiser(predicts="eps")), "with predicts=v, this run has predicts=eps"),
        (dict(model=denoiser(Cosine())), r"process=VP\(.*\), this run has process=Cosine\(s=0.008"),
        (dict(model=denoiser(VP(beta_max=19.0))), r"beta_max=20.0\), .* beta_max=19.0\)"),
        (dict(model=denoiser(hidden=9)), r"does not fit this run: net\..* is \(8.* there and \(9"),
        (dict(model=denoiser().double()), "torch.float32 there and .* torch.float64 here"),
        (dict(model=MLP(dim=3, hidden=8, depth=1)), "process="),
        (dict(optimizer=torch.optim.SGD), r"optimizers=\['Adam'\], this run has .*\['SGD'\]"),
        (dict(ema=0), "ema=0.999, this run has ema=0"),
        (dict(data=X[:40]), r"data=data \(50, 3\), this run has data=data \(40, 3\)"),
        (dict(data=(X,)), r"data\[0\] \(50, 3\)"),
        (dict(data=DataLoader(X, 16)), "data=DataLoader of 50 samples, 16 a batch"),
        (dict(batch_size=8), "batch_size=16, this run has batch_size=8"),
        (dict(seed=6), "seed=5, this run has seed=6"),
    ],
)
def test_another_run_is_not_resumed(tmp_path, change, says):
    def loss(m, b):
        return m.loss(b[0] if isinstance(b, tuple) else b)

    call = dict(model=denoiser(), loss=loss, data=X, steps=6, batch_size=16, **QUIET)
    file = tmp_path / "ck"
    fit(**call, checkpoint=file)
    before, call = file.read_bytes(), {**call, "steps": 9, **change}
    weights = [p.clone() for p in call["model"].state_dict().values()]
    with pytest.raises(ValueError, match=says):
        fit(**call, checkpoint=file)
    # neither the file nor the model was touched
    assert file.read_bytes() == before
    assert all(torch.equal(p, q) for p, q in zip(weights, call["model"].state_dict().values()))


def test_what_may_change_when_a_run_goes_on(tmp_path):
    file, place = tmp_path / "ck", tmp_path / "elsewhere"
    call = dict(loss=lambda m, b: m.loss(b), data=X, **QUIET)
    fit(denoiser(), steps=6, checkpoint=file, **call)
    place.write_bytes(file.read_bytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        longer = fit(denoiser(), steps=9, checkpoint=place, **call)
        changes = dict(lr=0.1, schedule="cosine", warmup=2, clip=1.0, every=3, callback=print)
        other = fit(denoiser(), steps=9, checkpoint=file, **{**call, **changes, "progress": True})
    assert longer.resumed == other.resumed == 6
    assert torch.equal(longer.losses, fit(denoiser(), steps=9, **call).losses)
    assert not torch.equal(longer.losses, other.losses)


def test_each_optimizer_has_its_schedule():
    model, seen = linear(), []
    halves = [torch.optim.SGD([p], 1.0) for p in model.parameters()]

    def step(m, batch):
        seen.append([o.param_groups[0]["lr"] for o in halves])
        return m.weight.sum().detach()

    how = dict(data=X, step=step, optimizer=halves, **QUIET)
    fit(model, steps=4, schedule=["constant", lambda p: 1 - p], **how)
    assert seen == [[1.0, 1.0], [1.0, 0.75], [1.0, 0.5], [1.0, 0.25]]
    seen.clear()
    for o in halves:
        o.param_groups[0]["lr"] = 1.0
    fit(model, steps=2, schedule="cosine", **how)  # one for all
    assert seen == [[1.0, 1.0], [0.5, 0.5]]


def test_an_old_checkpoint_is_resumed_with_one_warning(tmp_path):
    file, call = tmp_path / "ck", dict(loss=mse, data=(X, Y), checkpoint=tmp_path / "ck", **QUIET)
    fit(linear(), steps=6, **call)
    tensors, skeleton = load_tensors(file)
    kept = ("seed", "ema", "batch_size", "processes")
    skeleton["setting"] = {"dict": [p for p in skeleton["setting"]["dict"] if p[0] in kept]}
    save_tensors(file, tensors, skeleton)
    with pytest.raises(ValueError, match="seed=5"), pytest.warns(UserWarning, match="older than"):
        fit(linear(), steps=9, **{**call, "seed": 6})
    with pytest.warns(UserWarning, match="is older than the record of data, optimizers") as w:
        again = fit(linear(), steps=9, **call)
    assert len(w) == 1 and again.resumed == 6
    assert torch.equal(again.losses, fit(linear(), mse, (X, Y), 9, **QUIET).losses)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(linear(), steps=12, **call)  # the next one has the record


OWN = """
import os, signal, sys, numpy as np, torch
import diffkit as dk
from diffkit.core.training import fit, load_tensors, save_tensors
stop, folder = sys.argv[1], sys.argv[2]
points = np.random.default_rng(0).normal(size=(60, 2)) * [.3, .1] + [1., -1.]  # own data
torch.manual_seed(0)
model = dk.NetDenoiser(dk.MLP(dim=2, hidden=16, depth=1), dk.VP(), predicts='v')
def callback(run):
    if stop != 'no' and run.step == 23: os.kill(os.getpid(), getattr(signal, stop))
signal.signal(signal.SIGINT, signal.default_int_handler)
run = fit(model, lambda m, x: m.loss(x), points, 60, 5e-3, checkpoint=f'{folder}/run.safetensors',
          every=10, batch_size=32, schedule='cosine', callback=callback, progress=False)
save_tensors(f'{folder}/model.safetensors', run.ema.state_dict())
print(run.resumed)
"""


def test_train_your_own(tmp_path):
    "Own data; killed or stopped by Ctrl-C, and run again; saved, loaded elsewhere, sampled from."
    (tmp_path / "train.py").write_text(OWN)
    found = {}
    for stop, resumed in ("no", 0), ("SIGKILL", 20), ("SIGINT", 23):
        folder = tmp_path / stop
        folder.mkdir()
        call = lambda stop, folder: subprocess.run(
            [sys.executable, tmp_path / "train.py", stop, folder], capture_output=True, text=True
        )
        if stop != "no":
            assert call(stop, folder).returncode != 0
        last = call("no", folder)
        assert last.returncode == 0 and int(last.stdout) == resumed, last.stderr
        found[stop] = load_tensors(folder / "model.safetensors")[0]
        assert_same_checkpoint(folder / "run.safetensors", tmp_path / "no" / "run.safetensors")
    for k in found["no"]:
        assert torch.equal(found["SIGKILL"][k], found["no"][k])
        assert torch.equal(found["SIGINT"][k], found["no"][k])
    model = NetDenoiser(MLP(dim=2, hidden=16, depth=1), VP(), predicts="v")
    model.load_state_dict(found["no"])
    x = sample(model, DDIM(), torch.randn(200, 2), time_grid(VP(), 10, "log_snr"), progress=False)
    assert x.shape == (200, 2) and torch.isfinite(x).all()


def test_the_callers_generators_and_mode_are_left_alone():
    m, before = linear().eval(), torch.get_rng_state()
    fit(m, noisy, (X, Y), 3, **QUIET)
    assert torch.equal(before, torch.get_rng_state()) and not m.training
    a, b = fit(linear(), noisy, (X, Y), 9, **QUIET), fit(linear(), noisy, (X, Y), 9, **QUIET)
    c = fit(linear(), noisy, (X, Y), 9, **{**QUIET, "seed": 6})
    assert torch.equal(a.losses, b.losses) and not torch.equal(a.losses, c.losses)


def test_a_loader_whose_batch_size_changes_counts_its_samples(tmp_path):
    class Growing:
        "Batches of 1, 2, 3, ... indices; its place can be saved."

        k = 0

        def __iter__(self):
            while True:
                self.k += 1
                yield [(self.k * 7 + i) % 50 for i in range(self.k)]

        def state_dict(self):
            return {"k": self.k}

        def load_state_dict(self, s):
            self.k = s["k"]

    def go(**kw):
        return fit(
            linear(),
            mse,
            torch.utils.data.DataLoader(
                torch.utils.data.TensorDataset(X, Y), batch_sampler=Growing()
            ),
            samples=50,
            **QUIET,
            **kw,
        )

    run = go()
    assert run.step == 10 and run.samples == 55

    def stop(r):
        if r.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        go(checkpoint=tmp_path / "ck", callback=stop)
    assert torch.equal(go(checkpoint=tmp_path / "ck").losses, run.losses)
    assert fit(linear(), mse, (X, Y), samples=50, batch_size=lambda k: k + 1, **QUIET).step == 10


def test_two_optimizers_survive_a_stop(tmp_path):
    def go(stop=0, **kw):
        torch.manual_seed(0)
        m = nn.ModuleDict({"g": nn.Linear(3, 3), "d": nn.Linear(3, 1)})
        opts = [
            torch.optim.Adam(m["g"].parameters(), 1e-2),
            torch.optim.RMSprop(m["d"].parameters(), 1e-2),
        ]

        def step(m, x):
            fake = m["g"](torch.randn_like(x))
            d = (m["d"](fake.detach()) - m["d"](x)).mean() + m["d"].weight.square().sum()
            opts[1].zero_grad()
            d.backward()
            opts[1].step()
            g = -m["d"](fake).mean()
            opts[0].zero_grad()
            g.backward()
            opts[0].step()
            return {"d": d, "g": g}

        def callback(r):
            if r.step == stop:
                raise KeyboardInterrupt

        return fit(m, None, X, 12, step=step, optimizer=opts, callback=callback, **QUIET, **kw)

    whole = go()
    with pytest.raises(KeyboardInterrupt):
        go(5, checkpoint=tmp_path / "ck")
    again = go(checkpoint=tmp_path / "ck")
    assert (
        again.resumed == 5
        and same(again.model, whole.model)
        and all(torch.equal(again.losses[k], whole.losses[k]) for k in "dg")
    )


def test_pack_is_exact_and_holds_no_code(tmp_path):
    nest = {
        "a": {1: (1, [2.5, None, True], "x"), "t": torch.arange(3)},
        "f": [0.1 + 0.2, float("inf"), 1e-320],
        "n": np.arange(3, dtype=np.uint32),
        "a.t": torch.ones(2),
    }
    tensors = {}
    back = unpack(json.loads(json.dumps(pack(nest, "", tensors))), tensors)
    assert (
        back["a"][1] == nest["a"][1]
        and back["f"] == nest["f"]
        and torch.equal(back["a"]["t"], nest["a"]["t"])
        and torch.equal(back["a.t"], nest["a.t"])
    )
    assert back["n"].dtype == np.uint32 and (back["n"] == nest["n"]).all()
    with pytest.raises(TypeError, match="x.f"):
        pack({"f": print}, "x", {})
    fit(linear(), mse, (X, Y), 2, checkpoint=tmp_path / "ck", **QUIET)
    content = (tmp_path / "ck").read_bytes()  # the length of a JSON header, the header, numbers
    assert b"pickle" not in content and content[8:10] == b'{"'


@pytest.mark.slow
def test_two_processes_train_as_one(tmp_path):
    """`torchrun` with two processes on the processor: each takes half of every batch, and the
    weights agree with those of one process."""
    (tmp_path / "train.py").write_text("""
import sys, torch
from torch import nn
from diffkit.core.training import fit, save_tensors
torch.manual_seed(4)
m, x = nn.Linear(3, 1), torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
y = x.sum(1, keepdim=True)
run = fit(m, lambda m, b: (m(b[0]) - b[1]).square().mean(), (x, y), int(sys.argv[2]), batch_size=16,
          progress=False, checkpoint=sys.argv[1], every=10)
""")

    def go(file, steps, n):
        cmd = (
            [sys.executable, str(tmp_path / "train.py")]
            if n == 1
            else [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                str(n),
                str(tmp_path / "train.py"),
            ]
        )
        p = subprocess.run(
            [*cmd, str(tmp_path / file), str(steps)],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "1"},
            timeout=200,
        )
        assert p.returncode == 0, p.stderr[-3000:]
        return load_tensors(tmp_path / file)

    one, two = go("one", 20, 1), go("two", 20, 2)
    assert one[1]["samples"] == two[1]["samples"] == 320 and two[1]["setting"] == {
        "dict": [
            ["data", "data[0] (50, 3), data[1] (50, 1)"],
            ["optimizers", {"list": ["Adam"]}],
            ["seed", 0],
            ["ema", 0.999],
            ["batch_size", 16],
            ["processes", 2],
        ]
    }
    for k in one[0]:
        if k.startswith(("model", "ema")) or k == "values":
            torch.testing.assert_close(one[0][k], two[0][k], atol=1e-5, rtol=1e-4)
    go("cut", 10, 2)
    cut = go("cut", 20, 2)  # stopped and resumed on two processes: bit for bit
    assert all(torch.equal(cut[0][k], two[0][k]) for k in two[0])


def test_a_run_of_no_steps_has_no_losses():
    none = Run(torch.nn.Linear(1, 1))
    assert none.losses.shape == (0,)
    none.names = ["a", "b"]
    assert {k: tuple(v.shape) for k, v in none.losses.items()} == {"a": (0,), "b": (0,)}
    none.values = [[1.0, 2.0], [3.0, 4.0]]
    assert none.losses["b"].tolist() == [2.0, 4.0]


def test_descend_is_one_step_of_the_optimizer():
    w = torch.nn.Parameter(torch.tensor([2.0, -1.0]))
    w.grad = torch.tensor([100.0, 100.0])  # left over; it must not count
    opt = torch.optim.SGD([w], lr=0.25)
    loss = w.square().sum()
    assert descend(opt, loss) is loss
    assert w.tolist() == [1.0, -0.5]  # w - 0.25 * 2 w


@pytest.mark.parametrize(
    "make",
    [lambda p: torch.optim.AdamW(p, 0.1), lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1)],
    ids=["AdamW", "SGD"],
)
@pytest.mark.parametrize("own", [False, True], ids=["loss", "step"])
def test_gradients_from_before_a_run_play_no_part_in_it(make, own):
    "What the loss does not use stays as it is: its optimizer sees no gradient, not one of zero."

    def go(stale):
        model = nn.ModuleDict(dict(used=linear(), idle=linear()))
        for p in model.parameters():
            p.grad = torch.full_like(p, stale) if stale else None
        opt = make(model.parameters())

        def step(m, batch):
            value = mse(m["used"], batch)
            value.backward()
            opt.step()
            opt.zero_grad()
            return value.detach()

        ask = dict(step=step) if own else dict(loss=lambda m, b: mse(m["used"], b))
        run = fit(model, data=(X, Y), steps=3, optimizer=opt, **ask, **QUIET)
        assert all(p.grad is None for p in model.parameters())  # nor are any left
        return run.losses, model

    (losses, clean), (again, soiled) = go(None), go(1e3)
    assert torch.equal(losses, again) and same(clean, soiled)
    assert same(soiled["idle"], linear()) and not same(soiled["used"], linear())


def test_the_bar_is_closed_whatever_becomes_of_the_run(monkeypatch):
    bars = []

    class Bar(tqdm.auto.tqdm):
        ends = 0

        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            bars.append(self)

        def close(self):
            self.ends += 1
            super().close()

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    fit(linear(), mse, (X, Y), 3, seed=5)
    with pytest.raises(ZeroDivisionError):
        fit(linear(), lambda m, b: 1 / 0, (X, Y), 3, seed=5)
    assert [b.ends for b in bars] == [1, 1]


def test_a_step_that_clears_no_gradients_leaves_none_behind():
    def step(m, batch):
        value = mse(m, batch)
        value.backward()
        return value.detach()

    model = linear()
    opt = torch.optim.SGD(model.parameters(), 0.1)
    fit(model, data=(X, Y), steps=2, step=step, optimizer=opt, **QUIET)
    assert all(p.grad is None for p in model.parameters())
