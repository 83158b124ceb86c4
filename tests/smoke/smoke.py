"""The papers' notebooks at the sizes of one GPU, two steps of everything: the path that a
processor never takes otherwise. A file a chapter, so that workers share them evenly."""

from pathlib import Path

from diffkit.core.lab import notebooks, run_one


def pages(chapter: str) -> dict[str, Path]:
    "Slug -> notebook."
    found = {s: p for s, p in notebooks().items() if p.parent.name == chapter}
    return {s: p for s, p in found.items() if p.name[0] in "123456789"}


def run(path: Path) -> None:
    "Fail with the cell that failed."
    row = run_one(path, "smoke", timeout=600)
    assert row["ok"], f"cell {row['cell']}: {row['error']}\n{row['source'][:800]}"
