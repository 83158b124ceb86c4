"""The runner as a user meets it: nothing of Jupyter's own on the terminal, names in any case, a
missing package named with its extra."""

import os

import nbformat
import pytest

from diffkit.core import lab


def write(path, *cells):
    cells = [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_kernel_writes_nothing_to_the_terminal(tmp_path, capfd):
    said = "import sys; print('out'); print('err', file=sys.stderr)"
    row = lab.run_one(write(tmp_path / "a.ipynb", said), save=tmp_path / "b.ipynb")
    assert row["ok"] and capfd.readouterr() == ("", "")
    out = nbformat.read(tmp_path / "b.ipynb", 4).cells[0].outputs
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
