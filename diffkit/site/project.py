"""Prepared notebooks: one Quarto project in a folder, by nbdev's processors and ours."""

from __future__ import annotations

import ast
import hashlib
import html
import json
import posixpath
import re
import shutil
from configparser import ConfigParser
from pathlib import Path

from diffkit.site.api import api_markdown, entries
from diffkit.site.errors import SiteError
from diffkit.site.links import (
    NAME,
    NB_LINK,
    Index,
    link_names,
    link_notebooks,
    math_in_html,
    raw_html,
)
from diffkit.site.pages import CLAIM, Page, read_pages, read_records, split_title, text_of
from diffkit.site.tables import api_index, chapters, claim_html, overview, page_md, scorecard

ASSETS = Path(__file__).resolve().parent.parent / "assets"
PICTURES = {".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"}
LONG = 15  # lines of helpers that stand open on a page; longer ones are folded
LOST = """The page may have moved: a notebook's address is its chapter and its name.

- [The front page](index.ipynb)
- [All notebooks](overview.qmd)
- [All names](api.qmd)

Or search for it: the field above finds papers by title, author, arXiv number and method.
"""


def processors(nb, page: Page, index: Index) -> list:
    """nbdev's processors for a docs page, less those that run code. `exec_show_docs` executes
    every cell with an import; here the entry of an exported cell is read from its source
    instead. And nbdev drops exported cells; here they are shown, folded, under their entry."""
    from execnb.nbio import mk_cell
    from nbdev import processors as P
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import Processor

    class Title(Processor):
        """What follows title and description in the first cell moves to a cell of its own,
        which nbdev's reader of titles would drop."""

        def begin(self):
            cells = self.nb.cells
            titled = lambda c: c.cell_type == "markdown" and split_title(c.source)[0]
            i = next((i for i, c in enumerate(cells) if titled(c)), None)
            about = {"description": page.description} if page.description else {}
            self.nb.frontmatter_ = {"title": page.title} | about
            ways = [mk_cell(raw_html(w), "markdown")] if (w := page_links(page, index)) else []
            if i is None:
                return
            rest = split_title(cells[i].source)[2]
            cells[i : i + 1] = ways + ([mk_cell(rest, "markdown")] if rest else [])

    class Api(Processor):
        "Entries for exported cells (and for explicit `show_doc` calls), then their source, folded."

        def begin(self):
            out, n = [], 0
            for cell in self.nb.cells:
                d = cell.get("directives_", {})
                if cell.cell_type != "code":
                    out.append(cell)
                    continue
                m = re.fullmatch(rf"\s*show_doc\(\s*({NAME})\s*(,.*)?\)\s*", cell.source)
                if m:
                    hit = index.find(m.group(1), page)
                    found = [e for e in (hit[0].entries if hit else []) if e.name == m.group(1)]
                    out += [mk_cell(api_markdown(e, page, index), "markdown") for e in found]
                elif {"exporti", "default_exp"} & d.keys() and not {"export", "exports"} & d.keys():
                    continue
                elif {"export", "exports"} & d.keys() and "hide" not in d:
                    n += 1
                    es = entries(cell.source)
                    out += [mk_cell(api_markdown(e, page, index), "markdown") for e in es]
                    body = ast.parse(cell.source).body
                    if all(isinstance(x, ast.Import | ast.ImportFrom) for x in body):
                        continue
                    own = [x.name for x in body if isinstance(x, ast.FunctionDef | ast.ClassDef)]
                    label = "Helpers: " + ", ".join(own) if own else "Source"
                    if es:
                        label = "Source of " + ", ".join(e.name for e in es)
                    if "code-fold" not in d:  # a method's few lines beside the text stay open
                        long = len(cell.source.strip().splitlines()) > LONG
                        fold = "true" if es or long else "show"
                        head = f'#| code-fold: {fold}\n#| code-summary: "{label}"\n'
                        cell.source = head + cell.source.strip()
                    out.append(cell)
                else:
                    out.append(cell)
            self.nb.cells = out

    class Text(Processor):
        def cell(self, cell):
            if cell.cell_type == "markdown":
                cell.source = link_notebooks(link_names(cell.source, page, index), page, index)

    class Outputs(Processor):
        """What a static page can show: no widgets that need a kernel, no standard error, claims
        in our own dress."""

        def begin(self):
            n = 0
            for cell in self.nb.cells:
                keep = []
                for o in cell.get("outputs", []):
                    data = o.get("data", {})
                    widget = "application/vnd.jupyter.widget-view+json" in data
                    plain = text_of(data["text/plain"]) if set(data) == {"text/plain"} else ""
                    if o.get("name") == "stderr" or widget and "text/html" not in data:
                        continue
                    if re.match(r"<Figure size|<IPython|<Axes|\[?<matplotlib", plain):
                        continue
                    if CLAIM in data:
                        data["text/html"] = claim_html(page.claims[n], n + 1, page, index)
                        n += 1
                        del data[CLAIM]
                    elif "text/html" in data:
                        body = link_notebooks(text_of(data["text/html"]), page, index, ".html")
                        data["text/html"] = math_in_html(mark_wide(body))
                    elif "text/markdown" in data:
                        said = link_names(text_of(data["text/markdown"]), page, index)
                        data["text/markdown"] = link_notebooks(said, page, index)
                    keep.append(o)
                if "outputs" in cell:
                    cell.outputs = keep

    class NoFile(Processor):
        def begin(self):  # the prepared notebook has the page's name already
            front = self.nb.cells[0]
            front.source = re.sub(r"^output-file:.*\n", "", front.source, flags=re.M)

    return [
        Title(nb),
        FrontmatterProc,
        P.populate_language,
        Outputs(nb),
        P.strip_ansi,
        P.hide_line,
        P.filter_stream_,
        P.rm_header_dash,
        Api(nb),
        P.ai_magics,
        P.clean_magics,
        P.hide_,
        Text(nb),
        P.strip_hidden_metadata,
        NoFile(nb),
    ]


def mark_wide(body: str) -> str:
    "Pictures too wide for a phone get a class, for CSS cannot compare a width."
    wide = lambda m: m[0].replace("<img", '<img class="dk-wide"') if int(m[1]) > 440 else m[0]
    return re.sub(r'<img [^>]*?\bwidth="(\d+)"', wide, body)


def prepare_one(page: Page, index: Index) -> str:
    "The prepared notebook, as JSON."
    from execnb.nbio import dict2nb, nb2str
    from nbdev.process import NBProcessor

    nb = dict2nb(json.loads(json.dumps(page.nb)))
    for c in nb.cells:
        for o in c.get("outputs", []):
            if "text" in o and isinstance(o.text, str):
                o.text = [o.text]
    nb.path_ = page.src
    NBProcessor(nb=nb, procs=processors(nb, page, index), process=True)
    for c in nb.cells:
        c.pop("directives_", None)
    return nb2str(nb)


def cache_key(page: Page, index: Index, own: str) -> str:
    "Changes when the notebook, the names and pages that it refers to, or this package change."
    text = json.dumps(page.nb)
    code = [text_of(c["source"]) for c in page.nb["cells"] if c["cell_type"] == "code"]
    words = re.findall(r"\b[A-Za-z_]\w*\b", " ".join(c for c in code if "export" in c[:40]))
    names = {*re.findall(rf"`({NAME})", text), *page.anchors, *words}
    known = (n for n in sorted(names) if n in index.names or "." in n or n in index.modules)
    links = [(n, index.href(n, page, "")) for n in known]
    notebooks = [link_notebooks(m.group(0), page, index) for m in NB_LINK.finditer(text)]
    numbers = [(n, p.stem, p.title) for n, p in sorted(index.numbers.items())]
    key = [
        own,
        page.src,
        page.digest,
        page.claims,
        links,
        notebooks,
        page_links(page, index),
        numbers,
    ]
    key = json.dumps(key)
    return hashlib.sha256(key.encode()).hexdigest()


def page_links(page: Page, index: Index) -> str:
    "The line under a title: download, Colab, module, tests, and back to the chapter."
    repo, up = index.repo, posixpath.relpath(".", page.folder or ".")
    links = [(f"{up}/notebooks/{page.src}", "Download the notebook")]
    if hosted := repo.get("git_url", "").removeprefix("https://github.com/"):
        where = f"{hosted}/blob/{repo['branch']}"
        colab = "https://colab.research.google.com/github"
        links.append((f"{colab}/{where}/nbs/{page.src}", "Open in Colab"))
        source = f"https://github.com/{where}"
        if page.module:
            links.append((f"{source}/{page.module.replace('.', '/')}.py", "Module"))
        links += [(f"{source}/{t}", "Tests") for t in index.tests.get(page.stem, ())]
    if page.folder:
        links.append((f"{up}/overview.html#{page.folder}", "Chapter"))
    made = (f'<a href="{html.escape(url)}">{text}</a>' for url, text in links)
    return f'<p class="dk-links">{" · ".join(made)}</p>'


def yaml_load(text: str):
    import yaml

    return yaml.safe_load(text)


def read_config(root: Path) -> dict:
    f = root / "_quarto.yml"
    if not f.is_file():
        raise SiteError(f"no {f}: the docs site is built in a checkout of the project")
    try:
        return yaml_load(f.read_text(encoding="utf-8"))
    except Exception as e:
        raise SiteError(f"{f}: {e}") from e


def staged_config(cfg: dict, chaps, pages: list[Page]) -> str:
    """`_quarto.yml` with the globs of its sidebar replaced by the chapters that have pages, in
    number order, and without links to notebooks that this project lacks."""
    import yaml

    cfg = json.loads(json.dumps(cfg))
    have = {f"{p.stem}.ipynb" for p in pages} | {"index.ipynb"}
    here = lambda c: not c.get("href", "").endswith(".ipynb") or c["href"] in have
    bar, side = cfg["website"]["navbar"], cfg["website"]["sidebar"]
    bar["left"] = [c for c in bar["left"] if here(c)]
    fixed = [c for c in side["contents"] if "section" not in c and here(c)]
    label = lambda p: f"{p.number} {p.title}".strip()
    entry = lambda p: {"text": label(p), "href": p.stem + ".ipynb"}
    sections = [{"section": t, "contents": [entry(p) for p in ps]} for t, _, ps in chaps if ps]
    side["contents"] = fixed + sections
    return yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True, width=1000)


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def own_hash() -> str:
    "Changes when a room of this package does."
    rooms = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in rooms)).hexdigest()


def read_repo(root: Path) -> dict:
    "Where the code is hosted, from settings.ini; empty where a project has none."
    cfg = ConfigParser(delimiters=["="])
    cfg.read(root / "settings.ini", encoding="utf-8")
    found = cfg["DEFAULT"]
    return {k: found[k] for k in ("git_url", "branch", "doc_baseurl") if k in found}


def find_tests(root: Path) -> dict[str, list[str]]:
    "Page -> its test files, by their names."
    files = [f.relative_to(root).as_posix() for f in (root / "tests").glob("*/test_*.py")]
    return {re.sub(r"^tests/(\w+)/test_(\w+)\.py$", r"\1/\2", f): [f] for f in sorted(files)}


def prepare_all(pages: list[Page], index: Index, work: Path, extra: str) -> tuple[dict, int]:
    "Write each prepared notebook whose key has changed; the keys, and how many had not."
    keys_file, own, new, cached = work / ".keys.json", own_hash(), {}, 0
    try:
        keys = json.loads(keys_file.read_text())
    except (OSError, ValueError):
        keys = {}
    for p in pages:
        out, key = work / (p.stem + ".ipynb"), cache_key(p, index, own)
        if p.src == "index.ipynb":
            key += hashlib.sha256(extra.encode()).hexdigest()
        if keys.get(p.stem) == key and out.is_file():
            cached += 1
        else:
            write(out, prepared(p, index))
        new[p.stem] = key
    keys_file.write_text(json.dumps(new))
    return new, cached


def prepared(page: Page, index: Index) -> str:
    "The prepared notebook; whatever goes wrong names the notebook."
    try:
        return prepare_one(page, index)
    except SiteError:
        raise
    except Exception as e:
        cause = f"{type(e).__name__}: {e}"
        raise SiteError(f"nbs/{page.src} could not be prepared: {cause}") from e


def front_page(cfg: dict, tables: str) -> str:
    "A front page for a project that has none: the overview."
    title, about = cfg["website"]["title"], cfg["website"].get("description", "")
    head = f"---\ntitle: {title}\ndescription: {json.dumps(about)}\n---\n"
    cells = [
        {"cell_type": "raw", "metadata": {}, "source": head},
        {"cell_type": "markdown", "metadata": {}, "source": tables},
    ]
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5})


def prepare(root: Path, work: Path) -> tuple[list[Page], int]:
    """Write the Quarto project of prepared notebooks to `work`; the pages, and how many came
    from the cache."""
    cfg, nbs, records = read_config(root), root / "nbs", read_records(root)
    pages = read_pages(nbs)
    if not pages:
        raise SiteError(f"no notebooks in {nbs}")
    index, chaps = Index(pages), chapters(cfg, pages, records)
    index.repo, index.tests = read_repo(root), find_tests(root)
    work.mkdir(parents=True, exist_ok=True)
    tables = overview(chaps, records)
    new, cached = prepare_all(pages, index, work, tables)
    if "index" not in new:
        write(work / "index.ipynb", front_page(cfg, tables))
    for name, title, about, body in (
        ("overview", "All notebooks", "Every paper, chapter by chapter.", tables),
        ("scorecard", "Scorecard", "What the papers claim, and what was measured here.",
         scorecard(chaps)),
        ("api", "All names", "Every public function and class.", api_index(pages)),
        ("404", "No such page", "The address leads nowhere.", LOST),
    ):  # fmt: skip
        write(work / f"{name}.qmd", page_md(title, about, body))
    write(work / "_quarto.yml", staged_config(cfg, chaps, pages))
    skip = shutil.ignore_patterns("katex_render.js", "search.js")
    shutil.copytree(ASSETS, work / "assets", dirs_exist_ok=True, ignore=skip)
    for f in nbs.rglob("*"):  # pictures that notebooks refer to
        if f.suffix.lower() in PICTURES:
            (work / f.relative_to(nbs)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, work / f.relative_to(nbs))
    for f in work.rglob("*.ipynb"):  # notebooks that are gone
        stem = f.relative_to(work).as_posix().removesuffix(".ipynb")
        if stem not in new and stem != "index" and "_site" not in f.parts:
            f.unlink()
    return pages, cached
