"""The search of the static site: what it finds a paper by, and the script that finds it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from diffkit.site.packages import npm_package
from diffkit.site.pages import Page
from diffkit.site.project import ASSETS
from diffkit.site.tables import ALSO

MINISEARCH = "7.2.0"


def words_of(record: dict) -> list[str]:
    "Everything under which somebody would look for a paper."
    names = [record["title"], record["short"], *record["authors"], record["arxiv"]]
    return [w for w in (*names, record["venue"], *record["keywords"]) if w]


def add_search(site: Path, pages: list[Page], records=()) -> str:  # what finds words
    "Exchange the search of smalldocs or Quarto for ours, and add the papers' words to its index."
    libs, file = site / "site_libs", site / "search.json"
    old = libs / "fuse" / "fuse.min.js"
    if not old.is_file() or not file.is_file():
        return "the engine's own search"
    by_number = {r["number"]: r for r in records}
    found = {
        f"{p.stem}.html": words_of(by_number[p.number]) for p in pages if p.number in by_number
    }
    also = {n: [name for name, k, _ in ALSO if k == n] for _, n, _ in ALSO}
    for p in pages:  # methods that live in another notebook
        if records and p.number in also:
            found.setdefault(f"{p.stem}.html", []).extend(also[p.number])
    index = [e for e in json.loads(file.read_text(encoding="utf-8")) if e["href"] != "404.html"]
    tops = {e["href"]: e for e in index if not e.get("section")}
    titles = {f"{p.stem}.html": (p.title, p.description) for p in pages}
    for href, words in found.items():
        if href not in tops:  # a page that begins with a heading
            title, text = titles[href]
            tops[href] = dict(objectID=href, href=href, title=title, section="", text=text)
            index.append(tops[href])
        tops[href]["keywords"] = words
    file.write_text(json.dumps(index, ensure_ascii=False), encoding="utf-8")
    package = npm_package("minisearch", MINISEARCH, "dist/umd/index.js")
    script = (ASSETS / "search.js").read_text(encoding="utf-8")
    if package:
        licence = (package / "LICENSE.txt").read_text(encoding="utf-8")
        mini = (package / "dist/umd/index.js").read_text(encoding="utf-8")
        mini = mini.split("//# sourceMappingURL")[0]
        script = f"/*! MiniSearch {MINISEARCH}\n{licence.replace('*/', '')}*/\n{mini}\n{script}"
    (libs / "search.js").write_text(script, encoding="utf-8")
    shutil.rmtree(old.parent)
    for f in site.rglob("*.html"):
        text = f.read_text(encoding="utf-8")
        f.write_text(text.replace("site_libs/fuse/fuse.min.js", "site_libs/search.js"), "utf-8")
    return f"MiniSearch {MINISEARCH}" if package else "whole words"
