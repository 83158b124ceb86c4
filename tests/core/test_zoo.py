"""The shipped models: they load, their cards are true, bad files are refused."""

import json
import sys
import types

import pytest
import torch
from diffkit.core import zoo
from diffkit.core.data import GaussianMixture
from diffkit.core.denoiser import Denoiser, MixtureDenoiser
from diffkit.core.process import EDM, VP, Flow
from diffkit.core.training import load_tensors, save_tensors


@pytest.mark.parametrize("name", zoo.available())
def test_loads_with_a_card_that_fits(name):
    model, c = zoo.load(name), zoo.card(name)
    assert (
        not model.training
        and c["name"] == name
        and c["retrain"] == f"diffkit train {name}"
        and c["licence"]
        and c["data"]
        and c["training"]["seed"] == zoo._recipe(name).seed
    )
    net = model.net if isinstance(model, Denoiser) else model
    assert (
        sum(p.numel() for p in net.parameters()) == c["parameters"]
        and json.loads(json.dumps(zoo._recipe(name).config)) == c["config"]
    )
    if isinstance(model, Denoiser):
        assert model.process == VP() and model.predicts == "v" and model.null == c["null"]
        shape = (3, 1, 8, 8) if name.startswith("digits") else (3, 2)
        x, null = torch.randn(shape), torch.full((3,), model.null["label"])
        with torch.no_grad():
            assert torch.equal(model(x, 0.5).x0, model(x, 0.5, label=null).x0) and not torch.equal(
                model(x, 0.5, label=null * 0).x0, model(x, 0.5).x0
            )


@pytest.mark.parametrize(
    "name",
    [n for n in zoo.available() if "unet" not in n]
    + [pytest.param(n, marks=pytest.mark.slow) for n in zoo.available() if "unet" in n],
)
def test_card_is_true(name):
    said = zoo._recipe(name).setting.format(n=100, steps=15)
    old, new = zoo.card(name)["quality"][said], zoo.measure(name)
    assert old.keys() == new.keys()
    for k, v in old.items():
        assert abs(new[k] - v) <= (
            0.02 if k.startswith(("accuracy", "own", "right")) else 0.05 * abs(v)
        ), k


def test_all_files_are_small_safetensors_and_json():
    files = list(zoo.FOLDER.iterdir())
    assert {f.name for f in files} == {
        f"{n}.{e}" for n in zoo.available() for e in ("json", "safetensors")
    }
    assert sum(f.stat().st_size for f in files) < 8_000_000


def test_features_are_64_numbers_and_the_two_classifiers_differ():
    x = torch.randn(5, 1, 8, 8)
    a, b = zoo.load("digits-classifier"), zoo.load("digits-classifier-2")
    assert (
        a.features(x).shape == b.features(x).shape == (5, 64)
        and a(x).shape == (5, 10)
        and not torch.equal(a.features(x), b.features(x))
    )


@pytest.mark.parametrize("target", [Flow(), EDM(), VP(0.2, 12.0)], ids=repr)
@pytest.mark.parametrize("t", [0.05, 0.5, 0.95])
def test_a_moved_exact_denoiser_is_the_exact_denoiser(target, t):
    mix = GaussianMixture([[1.0, 0.0], [-1.0, 0.5]], scales=0.3, labels=[0, 1])
    x = target.noise(torch.randn(32, 2, generator=torch.Generator().manual_seed(0)), t)
    a, b = zoo.under(MixtureDenoiser(mix, VP()), target), MixtureDenoiser(mix, target)
    torch.testing.assert_close(a(x, t).x0, b(x, t).x0, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        a(x, torch.full((32,), t), label=0).x0, b(x, t, label=0).x0, atol=1e-4, rtol=1e-4
    )


def test_bad_names_and_files_are_named(tmp_path):
    for name, near in (
        ("digits_unet", "digits-unet"),
        ("ring", "ring-mlp"),
        ("moon-mlp", "moons-mlp"),
    ):
        for f in (zoo.load, zoo.card, zoo.train, zoo.measure):
            with pytest.raises(ValueError, match=f"did you mean .*'{near}'"):
                f(name)
    with pytest.raises(FileNotFoundError, match="diffkit train ring-mlp"):
        zoo.load("ring-mlp", folder=tmp_path)
    with pytest.raises(ValueError, match="has no process"):
        zoo.load("digits-classifier", VP())
    path, whole = (
        tmp_path / "ring-mlp.safetensors",
        (zoo.FOLDER / "ring-mlp.safetensors").read_bytes(),
    )
    for at in range(0, len(whole), len(whole) // 10):
        bad = bytearray(whole)
        bad[at] ^= 2
        path.write_bytes(bad)
        with pytest.raises(ValueError, match="ring-mlp.safetensors"):
            zoo.load("ring-mlp", folder=tmp_path)
    weights, _ = load_tensors(zoo.FOLDER / "ring-mlp.safetensors")
    for broken, says in (
        ({**weights, "inp.bias": weights["inp.bias"][:3]}, r"inp.bias is \(3,\), not \(128,\)"),
        ({**weights, "more": torch.zeros(1)}, "more does not belong"),
        ({**weights, "inp.bias": weights["inp.bias"] + float("inf")}, "not finite"),
    ):
        save_tensors(path, broken)
        with pytest.raises(ValueError, match=says):
            zoo.load("ring-mlp", folder=tmp_path)
    (tmp_path / "ring-mlp.json").write_text("{")
    with pytest.raises(ValueError, match="ring-mlp.json is damaged"):
        zoo.card("ring-mlp", folder=tmp_path)


def test_training_is_reproducible_and_writes_weights_and_card(tmp_path):
    a, b = (
        zoo.train("ring-mlp", folder=tmp_path / k, steps=3, full=0, progress=False) for k in "ab"
    )
    # not the files' bytes: the format writes the entries of its header in any order
    (ta, ma), (tb, mb) = (load_tensors(tmp_path / k / "ring-mlp.safetensors") for k in "ab")
    assert (
        a["quality"] == b["quality"]
        and ma == mb
        and ta.keys() == tb.keys()
        and all(torch.equal(v, tb[k]) for k, v in ta.items())
    )
    assert zoo.card("ring-mlp", folder=tmp_path / "a") == a and set(a) == set(zoo.card("ring-mlp"))


def test_a_chapter_adds_recipes_of_its_own(tmp_path, monkeypatch):
    class Line(zoo.Recipe):
        fixed = ("test_loss",)

        def points(self):
            x = torch.linspace(-1, 1, 64)[:, None]
            return x, 2 * x

        def loss(self, model, batch):
            return (model(batch[0]) - batch[1]).square().mean()

        def measure(self, model, n, steps, seed, folder):
            return {"test_loss": self.loss(model, self.points()).item()}

    kind = dict(in_features=1, out_features=1)
    module = types.ModuleType("diffkit.models.zoo")
    module.RECIPES = {"line": Line("A line.", "64 points", torch.nn.Linear, kind, 300, 64, 0.05)}
    monkeypatch.setattr(zoo, "find_spec", lambda name: name == module.__name__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert zoo.available()[-1] == "line"
    c = zoo.train("line", folder=tmp_path, progress=False, full=0)
    line = zoo.load("line", folder=tmp_path)
    assert abs(line.weight.item() - 2) < 0.01 and not line.training
    assert c["quality"]["before rounding to float16"]["test_loss"] < 1e-4
    assert c["process"] is None and c["null"] is None and c == zoo.card("line", folder=tmp_path)
    with pytest.raises(ValueError, match="line is no denoiser"):
        zoo.load("line", VP(), folder=tmp_path)
    with pytest.raises(ValueError, match="did you mean 'line'"):
        zoo.load("lime")
