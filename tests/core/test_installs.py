"""`pip install diffkit` alone: without the optional packages every public name still loads, and
what needs one says so."""

import subprocess
import sys

# not among the requirements of settings.ini
OPTIONAL = (
    "diffusers transformers sklearn mlxtend ot networkx pandas nbdev nbclient nbformat ipykernel"
    " IPython ipywidgets jupyterlab execnb smalldocs torchvision dagma castle torchdiffeq"
).split()
HIDE = f"""
import importlib.abc
import sys

class Hide(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Hide())
import diffkit as dk
"""


def run(code):
    return subprocess.run([sys.executable, "-c", HIDE + code], capture_output=True, text=True)


def test_every_public_name_loads_without_the_optional_packages():
    got = run("for name in dk.__all__:\n    getattr(dk, name)\nprint(len(dk.__all__))")
    assert got.returncode == 0, got.stderr[-800:]
    assert int(got.stdout) > 300


def test_the_adapters_that_need_no_diffusers_work():
    got = run(
        "import torch\n"
        "net = lambda x, sigma, **kw: x / (1 + sigma.reshape(-1, 1) ** 2)\n"
        "d = dk.from_edm(net)\n"
        "grid = dk.time_grid(d.process, 4)\n"
        "x = dk.sample(d, dk.DDIM(), torch.ones(2, 3), grid, progress=False)\n"
        "assert torch.isfinite(x).all()"
    )
    assert got.returncode == 0, got.stderr[-800:]


def test_what_needs_diffusers_names_it():
    got = run("dk.DiffusersScheduler(dk.DDIM())")
    assert "ImportError" in got.stderr and "pip install diffusers" in got.stderr


def test_training_again_leaves_what_is_shipped_alone(tmp_path):
    from diffkit.core import zoo

    files = sorted(zoo.FOLDER.iterdir())
    before = {p: p.read_bytes() for p in files}
    call = [sys.executable, "-m", "diffkit", "train", "digits-classifier", "--steps", "2"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-800:]
    assert "wrote zoo/digits-classifier.safetensors" in done.stdout
    assert {p: p.read_bytes() for p in sorted(zoo.FOLDER.iterdir())} == before
    assert sorted(p.suffix for p in (tmp_path / "zoo").iterdir()) == [".json", ".safetensors"]
