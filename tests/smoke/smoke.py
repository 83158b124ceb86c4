"""The papers' notebooks at the sizes of one GPU, two steps of everything: the path that a
processor never takes otherwise. A file a chapter, so that workers share them evenly."""

import os
from pathlib import Path

import pytest

from diffkit.core.lab import notebooks, run_one
from diffkit.core.records import due


def pages(chapter: str) -> dict[str, Path]:
    "Slug -> notebook."
    found = {s: p for s, p in notebooks().items() if p.parent.name == chapter}
    return {s: p for s, p in found.items() if p.name[0] in "123456789"}


def run(path: Path) -> None:
    "Fail with the cell that failed; what has run as it stands is skipped, but for a third of it."
    if not os.environ.get("DIFFKIT_ALL") and not due([path], "smoke"):
        pytest.skip("has run at smoke as it stands: records/runs.json")
    row = run_one(path, "smoke", timeout=600)
    assert row["ok"], f"cell {row['cell']}: {row['error']}\n{row['source'][:800]}"
