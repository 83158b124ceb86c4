"""The papers' notebooks at the sizes of one GPU, two steps of everything: the path that a
processor never takes otherwise."""

import pytest

from diffkit.core.lab import notebooks, run_one

PAPERS = {s: p for s, p in notebooks().items() if p.name[0] in "123456789"}


@pytest.mark.parametrize("slug", PAPERS)
def test_smoke(slug):
    row = run_one(PAPERS[slug], "smoke", timeout=600)
    assert row["ok"], f"cell {row['cell']}: {row['error']}\n{row['source'][:800]}"
