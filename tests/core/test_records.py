"""What a result's key depends on, and what is kept of runs, in a package and a checkout that are
made for the purpose."""

import datetime
import hashlib
import json
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import nbformat
import pytest
import torch

from diffkit.core import records

BASE = """"Of a module."
LIMIT = 3


def used(x):
    "Füllt auf."
    return helper(x)  # one more


def helper(x):
    return x + LIMIT


def unused(x):
    return x - 7
"""
FILES = {
    "core/__init__.py": "",
    "core/base.py": BASE,
    "core/top.py": "from .base import used\n\n\ndef f(x):\n    return used(x)\n\n\ng = 'é'\n",
    "core/lab.py": "def claim(x):\n    from .records import keep\n\n    return keep(x)\n",
    "core/records.py": "def keep(x):\n    return x + 11\n",
    "data/points.txt": "1 2 3",
}
SOURCE = "from diffkit.core.top import f\n\nassert f(1) > 0, 'é'\n"


@pytest.fixture
def package(tmp_path, monkeypatch):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.setattr(records, "_package", lambda: tmp_path)
    return tmp_path


def notebook(path, *cells):
    cells = [nbformat.v4.new_code_cell(c) for c in cells]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def key(path):  # a file may change twice within one tick of its clock
    records._parts.cache_clear()
    records._imports.cache_clear()
    return records.code_key(path)


@pytest.mark.parametrize("kind", ["py", "ipynb"])
@pytest.mark.parametrize(
    ("file", "old", "new", "matters"),
    [
        ("core/top.py", "return used(x)", "return used(x) + 1", True),
        ("core/base.py", "return helper(x)", "return helper(2 * x)", True),  # through another
        ("core/base.py", "x + LIMIT", "x - LIMIT", True),
        ("core/base.py", "LIMIT = 3", "LIMIT = 4", True),
        ("core/base.py", "x - 7", "x - 8", False),  # what nothing here calls
        ("core/top.py", "g = 'é'", "g = 'e'", False),
        ("core/base.py", "Füllt auf.", "Adds.", False),
        ("core/base.py", "one more", "another", False),
        ("core/base.py", "LIMIT = 3\n", "LIMIT = 3\n\n\n", False),
        ("core/base.py", "LIMIT = 3\n", "LIMIT = 3\nprint()\n", True),  # acts by being run
        ("core/lab.py", "return keep(x)", "return keep(2 * x)", False),  # another module
        ("data/points.txt", "1 2 3", "1 2 4", False),
    ],
    ids=range(12),
)
def test_a_key_changes_with_what_the_code_reaches(package, kind, file, old, new, matters):
    path = package / f"one.{kind}"
    notebook(path, SOURCE) if kind == "ipynb" else path.write_text(SOURCE, encoding="utf-8")
    before = key(path)
    (package / file).write_text(FILES[file].replace(old, new), encoding="utf-8")
    assert (key(path) != before) == matters
    (package / file).write_text(FILES[file], encoding="utf-8")
    assert key(path) == before


@pytest.mark.parametrize(
    ("source", "kind", "matters"),
    [
        ("from diffkit.core.lab import claim\nclaim(1)", "ipynb", False),  # it keeps what was said
        ("from diffkit.core.lab import claim\nclaim(1)", "py", True),
        ("from diffkit.core.records import keep\nkeep(1)", "ipynb", True),
    ],
    ids=["page", "script", "page of records"],
)
def test_the_keeper_of_records_is_no_part_of_a_page_that_only_claims(
    package, source, kind, matters
):
    path = package / f"one.{kind}"
    notebook(path, source) if kind == "ipynb" else path.write_text(source)
    before = key(path)
    (package / "core/records.py").write_text("def keep(x):\n    return x + 12\n")
    assert (key(path) != before) == matters


@pytest.mark.parametrize("word", ["points", "points.txt", "p"])
def test_data_belong_to_a_key_where_they_are_named(package, word):
    path = package / "one.py"
    path.write_text(f"print({word!r})")
    before = key(path)
    (package / "data/points.txt").write_text("1 2 4")
    assert (key(path) != before) == (word != "p")


def test_sources_are_read_in_their_own_encoding_on_every_system(package, monkeypatch):
    script = package / "one.py"
    script.write_text(SOURCE, encoding="utf-8")
    page = notebook(package / "two.ipynb", SOURCE)
    before, read = [key(script), key(page)], Path.read_text
    elsewhere = lambda p, encoding="utf-16", errors=None: read(p, encoding, errors)
    monkeypatch.setattr(Path, "read_text", elsewhere)
    assert [key(script), key(page)] == before


CLAIMS = "from diffkit.core.lab import claim\nclaim('small', 'made up', 'yes')"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFKIT_ROOT", str(tmp_path))
    (tmp_path / "settings.ini").write_text("")
    pages = {
        "solvers/201_one": CLAIMS,
        "solvers/202_two": CLAIMS,
        "guidance/303_three": CLAIMS,
        "guidance/304_four": "x = 1",  # these claim nothing, or belong to no chapter
        "core/001_five": CLAIMS,
        "benchmarks/901_six": CLAIMS,
        "index": CLAIMS,
    }
    for name, source in pages.items():
        notebook(tmp_path / "nbs" / f"{name}.ipynb", source)
    return tmp_path


def row(seconds, verdict="yes"):
    said = [dict(says="small", verdict=verdict, measured="0.1")]
    return dict(claims=said, seconds=seconds, failed=0, machine={"device": "cpu"})


def planned(*args, **kw):
    return [(p.stem, s) for p, s in records.plan(*args, **kw)]


def test_a_plan_takes_the_notebooks_with_claims_shortest_first(checkout):
    quick = {"201_one": 5.0, "202_two": 2.0}
    every = [("202_two", 20.0), ("201_one", 50.0), ("303_three", 300.0)]  # ten times, or 30 s
    assert planned(10, quick=quick) == every
    assert planned(370 / 60, quick=quick) == every
    assert planned(1.17, quick=quick) == every[:2]
    assert planned(0.5, quick=quick) == every[:1]
    assert planned(0.1, quick=quick) == []
    assert planned(10, quick={}) == [(n, 300.0) for n in ("201_one", "202_two")]
    assert planned(10, ["304", "two"], quick) == [("202_two", 20.0), ("304_four", 300.0)]
    for bad in (0, -1, float("nan")):
        with pytest.raises(ValueError, match=f"minutes must be positive, got {bad}"):
            records.plan(bad)


def test_a_plan_knows_the_times_of_the_runs_that_are_kept(checkout):
    kept = checkout / "_build" / "runs" / "quick"
    kept.mkdir(parents=True)
    for slug, seconds in (("303_three", 1.5), ("201_one", 3.0)):
        (kept / f"{slug}-key.json").write_text(json.dumps(dict(slug=slug, seconds=seconds)))
    assert planned(1) == [("303_three", 15.0), ("201_one", 30.0)]
    assert planned(1, quick={}) == []


def test_a_full_run_is_kept_and_leaves_the_plan_until_the_code_changes(checkout):
    page = checkout / "nbs" / "solvers" / "201_one.ipynb"
    said = records.keep_full(page, row(7.0))
    assert (
        said
        == records.read_record("full", page)
        == json.loads((checkout / "records" / "full" / "201_one.json").read_text(encoding="utf-8"))
    )
    assert said == dict(
        notebook="201_one",
        code=records.code_key(page),
        verdicts={"small": ["yes", "0.1"]},
        seconds=7.0,
        date=f"{datetime.date.today()}",
        device="cpu",
    )
    assert planned(60, ["201", "202"]) == [("202_two", 300.0)]
    notebook(page, CLAIMS + "\nx = 1")
    assert planned(60, ["201", "202"]) == [("202_two", 300.0), ("201_one", 7.0)]  # new ones first
    assert records.read_record("full", checkout / "nbs" / "solvers" / "202_two.ipynb") == {}


@pytest.mark.parametrize("slugs", [None, ["304", "two"]])
def test_replication_runs_what_is_named_or_all_that_claims(checkout, monkeypatch, slugs):
    ran = []

    def run_one(path, seed_set):
        ran.append((path.stem, seed_set))
        return row(1.0, "yes" if seed_set == 1 else "no")

    monkeypatch.setattr(records, "run_one", run_one)
    how = dict(sets=2, jobs=1, progress=False, backend="threading")
    got = records.replicate(slugs, **how)
    names = {"304_four", "202_two"} if slugs else {"201_one", "202_two", "303_three"}
    assert set(got) == names and set(ran) == {(n, s) for n in names for s in (1, 2)}
    assert len(ran) == 2 * len(names)
    page = checkout / "nbs" / "solvers" / "202_two.ipynb"
    assert got["202_two"] == records.read_record("replication", page)
    assert records.replicated(page, "small", "yes") == (1, 2, False)
    assert records.replicate(slugs, **how) == got and len(ran) == 2 * len(names)  # nothing to do
    notebook(page, CLAIMS + "\nx = 1")
    assert records.replicated(page, "small", "no") == (1, 2, True)
    records.replicate(slugs, **how)
    assert ran[2 * len(names) :] == [("202_two", 1), ("202_two", 2)]


def test_a_share_is_drawn_by_the_commit_or_by_the_day(checkout):
    pages = [notebook(checkout / "nbs" / "x" / f"{200 + i}_n.ipynb", f"x = {i}") for i in range(20)]
    for p in pages:
        records.keep_run(p)
    assert records.due(pages, share=None) == [] and records.due(pages, "smoke", None) == pages

    def drawn(turn, share):
        digest = lambda p: hashlib.sha256(f"{turn} {p.stem}".encode()).digest()
        return [p for p in pages if digest(p)[0] % share == 0]

    for share in (1, 3):
        assert records.due(pages, share=share) == drawn(datetime.date.today(), share)
    git = ["git", "-C", str(checkout), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for call in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*git, *call], check=True, capture_output=True)
    said = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
    assert records.due(pages, share=3) == drawn(said.stdout.strip(), 3)


def test_a_machine_is_told_by_its_device_versions_and_memory(monkeypatch):
    def version(name):
        if name == "numpy":
            raise PackageNotFoundError(name)
        return f"{name} 9"

    monkeypatch.setattr(records, "version", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = records.machine()
    assert (said["torch"], said["numpy"]) == ("torch 9", None)
    assert (said["device"], said["peak MiB"]) == ("cpu", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 1024 * 1024 + 5)
    assert records.machine() == said | {"device": "a card", "peak MiB": 3}
