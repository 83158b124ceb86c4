"""`pip install diffkit` alone: without the optional packages every public name still loads, and
what needs one says so."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diffkit
from diffkit.core.lab import extra_of, notebooks, root
from diffkit.core.records import notebook_code

# not among the requirements of settings.ini
OPTIONAL = (
    "diffusers transformers sklearn mlxtend ot networkx pandas zuko nbdev nbclient nbformat"
    " ipykernel IPython ipywidgets jupyterlab execnb smalldocs torchvision dagma castle torchdiffeq"
    " opacus dp_accounting librosa soundfile"
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


@pytest.mark.parametrize(
    "code,how",
    [
        (
            "dk.sliced_wasserstein(torch.ones(2, 1), torch.ones(2, 1))",
            "POT: pip install 'diffkit[metrics]'",
        ),
        (
            "dk.DagFit(torch.ones(2, 2).triu(1)).to_networkx()",
            "networkx: pip install 'diffkit[causal]'",
        ),
    ],
)
def test_what_needs_an_extra_names_it(code, how):
    got = run("import torch\n" + code)
    assert "ImportError" in got.stderr and how in got.stderr, got.stderr[-800:]


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


def copy_of_the_project(folder):  # what an install reads, so that nothing is built in the checkout
    folder.mkdir()
    for name in ("setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md"):
        shutil.copy(root() / name, folder)
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root() / "diffkit", folder / "diffkit", ignore=skip)
    return folder


def without_the_checkout(code, cwd, *path):  # in a process that finds the package by `path` only
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    first = f"import os, sys\nsys.path[1:1] = {[str(p) for p in path]}\nsys.path[:] = [\n"
    first += (
        f"    p for p in sys.path if not p or os.path.realpath(p) != {str(root().resolve())!r}]\n"
    )
    first += "sys.meta_path = [\n"
    first += "    f for f in sys.meta_path if 'editable' not in str(f)]\n"
    call = [sys.executable, "-c", first + code]
    return subprocess.run(call, cwd=cwd, env=env, capture_output=True, text=True)


def pip(*args):
    pytest.importorskip("setuptools", reason="no setuptools: pip install setuptools")
    call = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, args)]
    done = subprocess.run(call, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_editable_install_works_from_the_parent_folder(tmp_path):
    """There a folder is called like the package: an empty namespace package to Python, unless the
    checkout is a plain entry of `sys.path`."""
    clone = copy_of_the_project(tmp_path / "diffkit")
    site = tmp_path / "site"
    pip("install", "-q", "--no-deps", "--no-build-isolation", "--target", site, "-e", clone)
    code = f"import site; site.addsitedir({str(site)!r}); import diffkit; print(diffkit.__file__)"
    for folder in (tmp_path, clone, tmp_path / "site"):
        got = without_the_checkout(code, folder)
        assert got.stdout.strip() == str(clone / "diffkit" / "__init__.py"), got.stderr[-800:]


@pytest.mark.slow
def test_the_wheel_of_the_source_archive_holds_everything(tmp_path):
    pytest.importorskip("build", reason="no build: pip install build")
    clone = copy_of_the_project(tmp_path / "clone")
    call = [sys.executable, "-m", "build", "--no-isolation", "-o", tmp_path / "dist", clone]
    done = subprocess.run(call, capture_output=True, text=True)  # the wheel is built from the sdist
    assert done.returncode == 0, done.stdout[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    package = Path(diffkit.__file__).parent
    there = {p.relative_to(package) for p in package.rglob("*") if p.is_file()}
    there = {p for p in there if "__pycache__" not in p.parts}
    site = tmp_path / "site" / "diffkit"
    assert {p.relative_to(site) for p in site.rglob("*") if p.is_file()} == there
    got = without_the_checkout(
        HIDE
        + "for name in dk.__all__:\n    getattr(dk, name)\n"
        + "import torch\n"
        + "assert [dk.load(k) for k in dk.available()] and len(dk.papers()) > 10\n"
        + "print(dk.__file__)",
        tmp_path,
        tmp_path / "site",
    )
    assert got.stdout.strip() == str(site / "__init__.py"), got.stderr[-800:]


def needed(tree):  # modules imported, where no `try` or `if` comes first
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (a.name.split(".")[0] for a in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]
        elif not isinstance(node, ast.Try | ast.If):
            yield from needed(node)


def test_the_extra_all_is_all_that_the_notebooks_need():
    found = {}
    for p in notebooks().values():
        code = notebook_code(p)
        # where a notebook asks what there is, the names that it asks for are in quotes
        asks = re.search(r'find_spec\((?!"diffkit")', code)
        must = {m for m in needed(ast.parse(code)) if not (asks and f'"{m}"' in code)}
        found |= {m: p.stem for m in must if p.parent.name != "benchmarks"}
    come_along = {"PIL", "IPython"}  # with matplotlib and ipykernel
    setup = (root() / "setup.py").read_text(encoding="utf-8")
    apart = ast.literal_eval(re.search(r"^apart = (\(.*?\))", setup, re.M)[1])  # not in `all`
    assert {"dev", "docs"} <= set(apart)
    for m in found.keys() - {"diffkit", *sys.stdlib_module_names, *come_along}:
        extra = extra_of(m).partition("[")[2].partition("]")[0]
        where = f"{found[m]} needs {m}, which is in the extra {extra!r}"
        assert extra not in apart, where
    assert extra_of("torchdiffeq").endswith("'diffkit[peers]'") and not extra_of("torch")
    assert {"torch", "diffusers", "torchdiffeq", "sklearn"} <= set(found)
