"""The notebooks as they are: titles, claims, exported names, numbers and addresses of pages."""

from __future__ import annotations

import hashlib
import json
import posixpath
import re
from dataclasses import dataclass, field
from pathlib import Path

from diffkit.site.api import entries
from diffkit.site.errors import SiteError

CLAIM = "application/vnd.diffkit.claim+json"


@dataclass
class Page:
    "One notebook and its page."

    src: str  # path below nbs/, such as solvers/202_deis.ipynb
    nb: dict = field(repr=False)  # the notebook as saved
    digest: str = ""  # hash of its bytes
    title: str = ""
    description: str = ""
    module: str = ""  # diffkit.solvers.deis, or empty
    cost: str = ""  # from `**Cost**: ...` in the first callout
    anchors: dict = field(default_factory=dict)  # exported name -> anchor on the page
    claims: list = field(default_factory=list)
    entries: list = field(default_factory=list)  # what the docs say of each exported name

    @property
    def folder(self):
        return posixpath.dirname(self.src)

    @property
    def number(self):
        m = re.match(r"(\d+)[a-z]*_", posixpath.basename(self.src))
        return m.group(1) if m else ""

    @property
    def stem(self):  # number taken off, as nbdev does
        name = posixpath.join(
            self.folder,
            re.sub(r"^\d+[a-zA-Z0-9]*_", "", posixpath.basename(self.src).removesuffix(".ipynb")),
        )
        return name

    @property
    def is_paper(self):
        return (
            len(self.number) == 3 and self.number[0] != "0" and self.number[1:] not in ("00", "99")
        )

    def link(self, start: str = "", ext: str = ".html") -> str:
        "The link to this page from a page in the folder `start`."
        return posixpath.relpath(self.stem + ext, start or ".")


def text_of(x) -> str:
    return "".join(x) if isinstance(x, list) else x or ""


def directives(src: str) -> dict[str, str]:
    "nbdev's directives of a cell: `#| export` -> {'export': ''}."
    out = {}
    for line in src.splitlines():
        if not line.strip():
            continue
        m = re.match(r"\s*#\s*\|\s*([\w-]+):?\s*(.*?)\s*$", line)
        if not m:
            break
        out[m.group(1)] = m.group(2)
    return out


def split_title(src: str) -> tuple[str, str, str]:
    """(title, description, rest) of a first cell `# Title` / `> description` / anything else;
    nbdev's own reader would lose the rest."""
    m = re.match(r"\s*#\s+(\S.*?)\s*(?:\n|\Z)", src)
    if not m:
        return "", "", src
    rest = src[m.end() :]
    d = re.match(r"\s*((?:>[^\n]*(?:\n|\Z))+)", rest)
    desc = " ".join(x.lstrip("> ").strip() for x in d.group(1).strip().splitlines()) if d else ""
    return m.group(1), desc, (rest[d.end() :] if d else rest).strip("\n")


def heading_id(text: str) -> str:
    "The id that pandoc gives a heading."
    text = "-".join(
        "".join(c for c in text.lower() if c.isalnum() or c.isspace() or c in "_-.").split()
    )
    return re.sub(r"\A[^a-z]+", "", text)


def find_cost(src: str) -> str:
    m = re.search(r"^:{3,}\s*\{?\.?callout[^\n]*\n(.*?)^:{3,}\s*$", src, re.S | re.M)
    m = m and re.search(
        r"\*\*Cost:?\*\*:?\s*(.+?)(?=\n\s*\n|\n\s*[-*]\s|\n\s*\*\*|\Z)", m.group(1), re.S
    )
    return " ".join(m.group(1).split()) if m else ""


def read_page(path: Path, nbs: Path) -> Page:
    raw = path.read_bytes()
    try:
        nb = json.loads(raw)
    except ValueError as e:
        raise SiteError(f"{path}: not a notebook: {e}") from e
    p = Page(path.relative_to(nbs).as_posix(), nb, hashlib.sha256(raw).hexdigest())
    for cell in nb.get("cells", []):
        src = text_of(cell.get("source"))
        if cell["cell_type"] == "markdown":
            if not p.title:
                p.title, p.description, src = split_title(src)
            if not p.cost and "callout" in src:
                p.cost = find_cost(src)
        elif cell["cell_type"] == "code":
            d = directives(src)
            if d.get("default_exp"):
                p.module = f"diffkit.{d['default_exp']}"
            if {"export", "exports"} & d.keys() and "hide" not in d:
                p.entries += entries(src, f"{p.src}: ")
            for o in cell.get("outputs", []):
                c = o.get("data", {}).get(CLAIM)
                if c is not None:
                    p.claims.append(json.loads(text_of(c)) if isinstance(c, str | list) else c)
    headings = {
        heading_id(h)
        for c in nb.get("cells", [])
        if c["cell_type"] == "markdown"
        for h in re.findall(r"^#+\s+(.+?)\s*$", text_of(c["source"]), re.M)
    }
    names = [n for e in p.entries for n in e.names]
    p.anchors = {n: f"api-{n}" if n in headings else n for n in names}
    if not p.title:
        p.title = p.stem.rpartition("/")[2].replace("_", " ")
    return p


def with_records(p: Page, root: Path) -> Page:
    "Say of each claim what other seeds and a run at full size said, where that was kept."
    name = posixpath.basename(p.src).removesuffix(".ipynb")
    kept = {}
    for kind in ("replication", "full"):
        file = root / "records" / kind / f"{name}.json"
        if p.claims and file.is_file():
            kept[kind] = json.loads(file.read_text(encoding="utf-8"))
    if not kept:
        return p
    from diffkit.core.records import code_key

    code = code_key(root / "nbs" / p.src)
    for c in p.claims:
        says = c.get("says")
        sets = [r for r in kept.get("replication", {}).get("sets", {}).values()]
        sets = [r for r in sets if says in r["verdicts"]]
        if sets and c.get("verdict") != "untried":
            found = [r["verdicts"][says][0] for r in sets]
            old = any(r["code"] != code for r in sets)
            c["other seeds"] = dict(n=len(sets), same=found.count(c.get("verdict")), old=old)
        full = kept.get("full", {})
        if says in full.get("verdicts", {}):
            verdict, measured = full["verdicts"][says]
            where = {k: full[k] for k in ("device", "date", "seconds") if k in full}
            c["full size"] = dict(verdict=verdict, measured=measured, old=full["code"] != code)
            c["full size"] |= where
    return p


def read_pages(nbs: Path) -> list[Page]:
    "Every notebook below `nbs`, index first, then by number."
    files = [
        f
        for f in sorted(nbs.rglob("*.ipynb"))
        if not any(x.startswith((".", "_")) for x in f.relative_to(nbs).parts)
    ]
    pages = sorted(
        (with_records(read_page(f, nbs), nbs.parent) for f in files),
        key=lambda p: (p.src != "index.ipynb", p.number or "999", p.src),
    )
    made = {"overview": "all notebooks", "scorecard": "the scorecard", "api": "all names"}
    seen = {name: f"the page of {what}" for name, what in made.items()} | {"404": "the page 404"}
    for p in pages:
        if p.stem in seen:
            raise SiteError(f"{p.src} and {seen[p.stem]} would both be {p.stem}.html: rename one")
        seen[p.stem] = p.src
    return pages


def read_records(root: Path) -> list[dict]:
    "One record a paper, from the package's data; none where a project has no such file."
    file = root / "diffkit" / "data" / "papers.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
