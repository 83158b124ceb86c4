"""The package as a whole: names, costs of importing, command line, what ships."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import diffkit
from diffkit._lazy import public_names


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


def test_importing_the_package_is_cheap():
    r = python(
        "import diffkit, sys; print([m for m in ('torch', 'numpy', 'matplotlib', 'scipy',"
        " 'fastcore') if m in sys.modules])"
    )
    assert r.stdout.strip() == "[]", r.stdout + r.stderr


def test_short_names_reach_what_the_long_path_holds():
    import importlib

    for module, names in public_names("diffkit").items():
        for n in names:
            assert getattr(diffkit, n) is getattr(
                importlib.import_module(f"diffkit.{module}"), n
            ), n
    assert (
        diffkit.sample
        and diffkit.cfg
        and diffkit.DPMSolverPP
        and diffkit.solvers.DPMSolverPP is diffkit.DPMSolverPP
    )


@pytest.mark.parametrize(
    "package,name,near",
    [
        ("diffkit", "DPMSolverPlusPlus", "DPMSolverPP"),
        ("diffkit.solvers", "DPMSolverPlusPlus", "DPMSolverPP"),
        ("diffkit", "dpmsolverpp", "DPMSolverPP"),
        ("diffkit", "mixture_denoiser", "MixtureDenoiser"),
        ("diffkit.guidance", "PAGs", "pag"),
        ("diffkit", "solver", "Solver"),
        ("diffkit", "zzzz", None),
        ("diffkit", "_sample", None),
    ],
)
def test_a_name_that_nearly_exists_gets_a_suggestion(package, name, near):
    import importlib

    with pytest.raises(AttributeError) as e:
        getattr(importlib.import_module(package), name)
    more = f"; did you mean {near!r}?" if near else ""
    assert str(e.value) == f"module {package!r} has no attribute {name!r}{more}"


def test_core_names_are_unique():  # a short name that two core modules share would be a trap
    from diffkit._modidx import d

    seen = {}
    for m, syms in d["syms"].items():
        if not m.startswith("diffkit.core."):
            continue
        for k in syms:
            n = k[len(m) + 1 :]
            if "." in n or n.startswith("_"):
                continue
            assert n not in seen, f"{n} is in {seen[n]} and in {m}"
            seen[n] = m


def test_no_pickle_in_the_package():
    for p in Path(diffkit.__file__).parent.rglob("*.py"):
        text = p.read_text()
        assert (
            "import pickle" not in text
            and "torch.load(" not in text
            and "allow_pickle=True" not in text
        ), p


def test_command_line_reports_in_one_line():
    r = subprocess.run([sys.executable, "-m", "diffkit.cli"], capture_output=True, text=True)
    r = python("from diffkit.cli import main; main(['run', 'dpm_solver'])")
    assert r.returncode == 2 and "dpm_solver_pp" in r.stderr and "Traceback" not in r.stderr


def test_a_failing_notebook_is_named_with_its_cell_and_stops_nothing():
    with tempfile.TemporaryDirectory() as tmp:
        cell = lambda s: {
            "cell_type": "code",
            "metadata": {},
            "source": s,
            "outputs": [],
            "execution_count": None,
            "id": str(abs(hash(s)))[:8],
        }
        for name, cells in {
            "900_good": ["1 + 1"],
            "901_bad": ["x = 1", "raise ValueError('no such wind')"],
        }.items():
            Path(tmp, f"{name}.ipynb").write_text(
                json.dumps(
                    {
                        "cells": [cell(s) for s in cells],
                        "metadata": {
                            "kernelspec": {
                                "name": "python3",
                                "display_name": "python3",
                                "language": "python",
                            }
                        },
                        "nbformat": 4,
                        "nbformat_minor": 5,
                    }
                )
            )
        r = python(
            f"from diffkit.cli import main; main(['run', r'{tmp}/901_bad.ipynb',"
            f" r'{tmp}/900_good.ipynb', '--jobs', '1', '--out', r'{tmp}/out'])"
        )
        assert (
            r.returncode == 1
            and "901_bad (cell 2: ValueError: no such wind)" in r.stdout
            and "1 of 2 notebooks passed" in r.stdout
        ), r.stdout + r.stderr


def test_help_lists_every_parameter_with_its_comment():
    r = python("import diffkit as dk; help(dk.apg); help(dk.TimeShift); help(dk.stitch)")
    assert r.returncode == 0, r.stderr
    text = " ".join(r.stdout.split())
    # one with its default, one of a class's __init__, one whose comment stands above it
    for said in (
        "eta : float, default 0.0 weight of the parallel part; 1 is cfg's, 0 the paper's",
        "window : float",
        "share of the path of the first of two models, or one share a model",
    ):
        assert said in text, said


def test_pins_leave_older_pythons_alone():
    "A pin of a release that asks for a newer Python than the library says so itself."
    from importlib.metadata import PackageNotFoundError, metadata

    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    pins = [
        o
        for o in (Path(__file__).parents[1] / "constraints.txt").read_text().splitlines()
        if "==" in o
    ]
    assert len(pins) > 100
    checked = 0
    for pin in map(Requirement, pins):
        try:
            about = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if about["Version"].split("+")[0] not in pin.specifier:
            continue  # another release than the pinned one
        checked += 1
        asks = SpecifierSet(about["Requires-Python"] or "")
        for python in ("3.10.0", "3.11.2", "3.12.0"):
            holds = pin.marker is None or pin.marker.evaluate({"python_full_version": python})
            assert not holds or asks.contains(python), f"{pin} on Python {python} asks for {asks}"
    assert checked > 50


def test_of_two_modules_with_one_name_the_earlier_chapter_keeps_it():
    "A new chapter takes no name away; its own is reached by the long path."
    import diffkit
    from diffkit.adaptive import drm, madaug

    for name, home, other in (
        ("calibrate", "diffkit.distill.ptq4dm", drm),
        ("Policy", "diffkit.guidance.adaptive_guidance", madaug),
        ("saved_bytes", "diffkit.solvers.adjoint_dpm", None),
    ):
        assert getattr(diffkit, name).__module__ == home
        assert other is None or getattr(other, name).__module__ == other.__name__


def test_every_chapter_has_a_place_in_the_order():
    from diffkit._lazy import CHAPTERS

    nbs = Path(__file__).parents[1] / "nbs"
    folders = {p.parent.name for p in nbs.glob("*/*.ipynb")}
    assert folders - {"benchmarks"} <= set(CHAPTERS)


def test_every_test_file_has_a_name_of_its_own():
    # pytest imports a file by its name below the last folder without an __init__.py
    from collections import Counter

    tests = Path(__file__).parent

    def name(path):
        parts = [path.stem]
        folder = path.parent
        while (folder / "__init__.py").is_file():
            parts.append(folder.name)
            folder = folder.parent
        return ".".join(reversed(parts))

    counts = Counter(name(p) for p in tests.rglob("test_*.py"))
    assert len(counts) > 50
    assert not [n for n, k in counts.items() if k > 1]
