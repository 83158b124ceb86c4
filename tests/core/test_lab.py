"""The runner as a user meets it: nothing of Jupyter's own on the terminal, names in any case, a
missing package named with its extra."""

import os
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch

from diffkit.core import lab


def write(path, *cells):
    cells = [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_kernel_writes_nothing_to_the_terminal(tmp_path, capfd):
    said = "import sys; print('out'); print('err', file=sys.stderr)"
    row = lab.run_one(write(tmp_path / "a.ipynb", said), save=tmp_path / "b.ipynb")
    assert row["ok"] and capfd.readouterr() == ("", "")
    cells = nbformat.read(tmp_path / "b.ipynb", 4).cells
    assert [c.source for c in cells] == [said]  # and nothing that the runner asks for itself
    out = cells[0].outputs
    assert [o["text"] for o in out] == ["out\n", "err\n"]  # what the notebook says is kept


@pytest.mark.parametrize("slug", ["pndm", "PNDM", "Pndm", "201_PNDM", "201", "201_Pndm.IPYNB"])
def test_slugs_in_any_case(slug):
    assert lab.find(slug).name == "201_pndm.ipynb"


HIDE = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name == 'ot':
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


@pytest.mark.parametrize("by", [lab._by_kernel, lab._by_script])
def test_a_missing_package_is_named_with_its_extra(tmp_path, by):
    path = write(tmp_path / "a.ipynb", HIDE, "import ot")
    row = by(path, dict(os.environ), None, 60, False)
    assert row["cell"] == 2
    assert row["error"] == (
        "ModuleNotFoundError: No module named 'ot'; pip install 'diffkit[metrics]'"
    )


@pytest.mark.parametrize(
    "as_it_is", [torch.tensor, np.array, float], ids=["torch", "numpy", "float"]
)
def test_values_over_seeds_are_kept_whatever_they_are(as_it_is):
    def value(s):
        v = as_it_is(1.5 * s)
        return v.requires_grad_() if isinstance(v, torch.Tensor) else v

    want = [0.0, 1.5, 3.0, 6.0]
    assert lab.repeat(value, [0, 1, 2, 4]).values.tolist() == want
    both = lab.repeat(lambda s: {"a": value(s), "b": [float(value(s)), 1.0]}, [0, 1, 2, 4])
    assert both["a"].values.tolist() == want
    assert both["b"].values.tolist() == [[v, 1.0] for v in want]
    vectors = lab.repeat(lambda s: torch.tensor([1.0 * s, 2.0]).requires_grad_(), [3, 4])
    assert vectors.values.tolist() == [[3.0, 2.0], [4.0, 2.0]]


YES, NO = [[1.0, 1.1, 0.9], [2.0, 2.2, 1.9]], [[2.0, 2.2, 1.9], [1.0, 1.1, 0.9]]
NEAR = [[1.0, 5.0, 3.0], [3.0, 5.5, 3.0]]  # no difference that stands out, but the first is less
FAR = NEAR[::-1]


@pytest.mark.parametrize(
    ("values", "found", "leans", "holds"),
    [
        (YES, "yes", "yes", {"yes", "open"}),
        (NO, "no", "no", {"no", "open"}),
        (NEAR, "open", "yes", {"open", "yes"}),
        (FAR, "open", "no", {"open", "no"}),
    ],
    ids=["yes", "no", "near", "far"],
)
def test_a_claim_stands_where_the_measurement_does_not_contradict_it(
    monkeypatch, values, found, leans, holds
):
    monkeypatch.delenv("DIFFKIT_SCALE", raising=False)
    monkeypatch.delenv("DIFFKIT_SEED_SET", raising=False)
    check = lab.verdict(*values)
    assert (check, check.leans, check.n) == (found, leans, 3)
    for said in ("yes", "no", "open"):
        claim = lambda said=said: lab.claim("x", "1", said, check=check, paper="p", note="n").row
        if said in holds:
            assert claim() == dict(
                says="x",
                measured="1",
                holds=said,
                verdict=found,
                paper="p",
                note="n",
                basis=check.basis,
                scale="quick",
            )
        else:
            with pytest.raises(AssertionError, match=f"expected '{said}', measured '{found}'"):
                claim()
            monkeypatch.setenv("DIFFKIT_SEED_SET", "1")  # of other seeds it is recorded
            assert claim()["verdict"] == found
            monkeypatch.setenv("DIFFKIT_SEED_SET", "0")


def test_what_is_no_verdict_is_refused():
    for bad in ("maybe", "untried", ""):
        with pytest.raises(ValueError, match=f"check must be a verdict or one of .*'{bad}'"):
            lab.claim("x", "1", "yes", check=bad)
        with pytest.raises(ValueError, match=f"holds must be one of yes, no, open, got '{bad}'"):
            lab.claim("x", "1", bad)


def test_a_statement_that_is_not_tried_says_so_in_every_place(monkeypatch):
    monkeypatch.delenv("DIFFKIT_SCALE", raising=False)
    assert lab.not_tried("It saves a third", "no model fits", paper="Table 2").row == dict(
        says="It saves a third",
        measured="",
        holds="untried",
        verdict="untried",
        paper="Table 2",
        note="no model fits",
        basis="",
        scale="quick",
    )


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    (tmp_path / "here" / "nbs").mkdir(parents=True)
    (tmp_path / "here" / "settings.ini").write_text("")
    monkeypatch.setenv("DIFFKIT_ROOT", str(tmp_path / "here"))
    return tmp_path / "here"


def test_a_result_depends_on_code_scale_and_versions(checkout, monkeypatch):
    path = write(checkout / "nbs" / "a.ipynb", "x = 1")
    key = lambda scale="quick": lab._key(path, scale)
    python = lambda *v: monkeypatch.setattr(lab, "sys", SimpleNamespace(version_info=v))
    python(3, 11, 4)
    first = key()
    assert key("full") != first
    for info, same in (((3, 11, 9), True), ((3, 12, 4), False), ((4, 11, 4), False)):
        python(*info)
        assert (key() == first) == same
    python(3, 11, 4)
    write(path, "x = 2")
    assert key() != first


@pytest.mark.parametrize("scale", ["quick", "full"])
def test_full_runs_of_the_checkouts_own_notebooks_are_recorded(checkout, monkeypatch, scale):
    ran = []

    def run_one(path, scale, save):
        ran.append(path.stem)
        save.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
        row = dict(slug=path.stem, path=str(path), seconds=1.0, ok=path.stem != "broken")
        more = {} if row["ok"] else dict(cell=1, source="", error="")
        return row | more | dict(claims=[], failed=0, machine={"device": "cpu"})

    monkeypatch.setattr(lab, "run_one", run_one)
    paths = [write(checkout / "nbs" / f"{n}.ipynb", "x = 1") for n in ("mine", "broken")]
    paths.append(write(checkout.parent / "theirs.ipynb", "x = 1"))
    how = dict(scale=scale, jobs=1, backend="threading", progress=False)
    rows = lab.run([str(p) for p in paths], **how)
    assert [r["slug"] for r in rows] == ["broken", "mine", "theirs"]
    kept = sorted(p.name for p in (checkout / "records").rglob("*.json"))
    assert kept == (["mine.json"] if scale == "full" else [])
    out = checkout / "_build" / "runs" / scale
    assert sorted(p.stem for p in out.glob("*.ipynb")) == ["broken", "mine", "theirs"]
    again = lab.run([str(p) for p in paths], **how)  # what failed is tried again
    assert ran == ["mine", "broken", "theirs", "broken"]
    assert [bool(r.get("cached")) for r in again] == [False, True, True]
