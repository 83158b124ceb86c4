"""No page is left out."""

from pathlib import Path

from diffkit.core.lab import notebooks
from smoke import pages


def test_every_chapter_has_a_file():
    papers = {s for s, p in notebooks().items() if p.name[0] in "123456789"}
    named = {p.stem.removeprefix("test_smoke_") for p in Path(__file__).parent.glob("test_*.py")}
    assert papers and papers == set().union(*(pages(c) for c in named - {"all"}))
