"""The docs site: notebooks prepared by nbdev's processors, pages made by Quarto or smalldocs,
mathematics drawn at build time, nothing loaded from another machine.

`build` runs these steps: `read_pages` (what is in the notebooks), `prepare` (one Quarto project
in `_proc/`, unchanged notebooks from a cache), `render` (Quarto or smalldocs), `finish` (KaTeX
or MathML, local files only), `check` (links, anchors, loads from elsewhere, mathematics that was
not read). Notebooks are never executed and the package is never imported: API entries are read
from the source of the exported cells."""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import html
import io
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
import time
import tokenize
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path

ROOT, ASSETS = Path(__file__).resolve().parent.parent, Path(__file__).resolve().parent / "assets"
KATEX = "0.19.1"
CLAIM = "application/vnd.diffkit.claim+json"
VERDICTS = {"yes": "✓", "no": "✗", "open": "?"}
STYLE_VERSION = "1"  # part of the cache key, with this file's own text


class SiteError(Exception):
    "A site that cannot be built, with the cause."


# ---------------------------------------------------------------- what is in the notebooks


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
                for e in entries(src, f"{p.src}: "):
                    p.anchors |= {n: n for n in e.names}
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
    p.anchors = {n: f"api-{n}" if n in headings else n for n in p.anchors}
    if not p.title:
        p.title = p.stem.rpartition("/")[2].replace("_", " ")
    return p


def read_pages(nbs: Path) -> list[Page]:
    "Every notebook below `nbs`, index first, then by number."
    files = [
        f
        for f in sorted(nbs.rglob("*.ipynb"))
        if not any(x.startswith((".", "_")) for x in f.relative_to(nbs).parts)
    ]
    pages = sorted(
        (read_page(f, nbs) for f in files),
        key=lambda p: (p.src != "index.ipynb", p.number or "999", p.src),
    )
    seen: dict[str, str] = {"overview": "the page of all notebooks", "scorecard": "the scorecard"}
    for p in pages:
        if p.stem in seen:
            raise SiteError(f"{p.src} and {seen[p.stem]} would both be {p.stem}.html: rename one")
        seen[p.stem] = p.src
    return pages


# ---------------------------------------------------------------- API entries, read from source


@dataclass
class Entry:
    "What the docs say of one exported function or class."

    name: str
    kind: str  # def or class
    params: list  # (name, annotation, default, comment)
    returns: tuple  # (annotation, comment)
    doc: str
    bases: list = field(default_factory=list)
    methods: list = field(default_factory=list)  # Entry of each public method with a docstring

    @property
    def names(self):
        return [self.name, *(f"{self.name}.{m.name}" for m in self.methods)]


def comments_of(src: str) -> tuple[dict[int, str], dict[int, tuple[int, str]]]:
    "(comment after code on a line, (column, comment) of a line that is only a comment), by line."
    after, alone, code = {}, {}, set()
    for t in tokenize.generate_tokens(io.StringIO(src).readline):
        if t.type == tokenize.COMMENT:
            text = t.string.lstrip("# ").rstrip()
            if t.start[0] in code:
                after[t.start[0]] = text
            else:
                alone[t.start[0]] = (t.start[1], text)
        elif t.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT):
            code.update(range(t.start[0], t.end[0] + 1))
    return after, alone


def entry_of(node, src: str, comments) -> Entry:
    "The entry of one `def` or `class`."
    after, alone = comments
    # ast counts columns in bytes; ast.get_source_segment splits the source anew at each call
    lines = [x.encode() for x in src.split("\n")]

    def seg(n):
        if n is None:
            return ""
        part = lines[n.lineno - 1 : n.end_lineno]
        part[-1] = part[-1][: n.end_col_offset]
        part[0] = part[0][n.col_offset :]
        return " ".join(b"\n".join(part).decode().split())

    doc = textwrap.dedent(ast.get_docstring(node) or "")

    def rows(items, end, skip=0):
        # items: (name, annotation node, default node, first line, last line, column); `skip`: the
        # line whose comment is the return value's
        last = {it[4]: it[0] for it in items}  # a comment belongs to the last parameter on its line
        out = []
        for i, (name, ann, default, lo, hi, _) in enumerate(items):
            c = [after[hi]] if hi in after and last[hi] == name and hi != skip else []
            if not c:  # else to the parameter under it
                k = lo - 1
                while k in alone and (i == 0 or alone[k][0] <= items[i][5]):
                    c.insert(0, alone[k][1])
                    k -= 1
            else:
                # a comment goes on in the lines below when they are indented further than the
                # parameters
                k = hi + 1
                while k in alone and alone[k][0] > items[i][5] and k < end:
                    c.append(alone[k][1])
                    k += 1
            out.append((name, seg(ann), seg(default), " ".join(c)))
        return out

    def params(f, method):
        a = f.args
        pos = [*a.posonlyargs, *a.args]
        pairs = [*zip(pos, [None] * (len(pos) - len(a.defaults)) + list(a.defaults))]
        static = any(getattr(d, "id", "") == "staticmethod" for d in f.decorator_list)
        if method and pairs and not static:
            pairs = pairs[1:]
        items = [(x.arg, x, d) for x, d in pairs] + (
            [("*" + a.vararg.arg, a.vararg, None)] if a.vararg else []
        )
        items += [("*", None, None)] if a.kwonlyargs and not a.vararg else []
        items += [(x.arg, x, d) for x, d in zip(a.kwonlyargs, a.kw_defaults)] + (
            [("**" + a.kwarg.arg, a.kwarg, None)] if a.kwarg else []
        )
        rs = [
            (
                n,
                x.annotation if x else None,
                d,
                x.lineno if x else 0,
                (d or x).end_lineno if x else 0,
                x.col_offset if x else 0,
            )
            for n, x, d in items
        ]
        ret = (seg(f.returns), after.get(f.returns.end_lineno, "") if f.returns is not None else "")
        table = rows(rs, f.body[0].lineno, f.returns.end_lineno if f.returns is not None else 0)
        return table, ret

    if not isinstance(node, ast.ClassDef):
        ps, ret = params(node, False)
        patched = node.args.args and any(
            getattr(d, "id", "") in ("patch", "patch_to") for d in node.decorator_list
        )
        name = node.name
        if patched:
            name, ps = f"{seg(node.args.args[0].annotation)}.{name}", ps[1:]
        return Entry(name, "def", ps, ret, doc)
    methods, ps = [], []
    data = any("dataclass" in seg(d) for d in node.decorator_list)
    for f in node.body:
        name = getattr(getattr(f, "target", None), "id", "")
        if (
            isinstance(f, ast.AnnAssign)
            and not data
            and name
            and name[0] != "_"
            and f.end_lineno in after
        ):
            methods.append(Entry(name, "attribute", [], ("", ""), after[f.end_lineno]))
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef):
            if f.name == "__init__":
                ps = params(f, True)[0]
            elif (not f.name.startswith("_") or f.name == "__call__") and ast.get_docstring(f):
                mp, ret = params(f, True)
                prop = any(
                    getattr(d, "id", getattr(d, "attr", "")) in ("property", "cached_property")
                    for d in f.decorator_list
                )
                methods.append(
                    Entry(
                        f.name,
                        "attribute" if prop else "def",
                        mp,
                        ret,
                        " ".join((ast.get_docstring(f) or "").split()),
                    )
                )
    if not ps and data:
        fields = [
            f for f in node.body if isinstance(f, ast.AnnAssign) and isinstance(f.target, ast.Name)
        ]
        ps = rows(
            [
                (f.target.id, f.annotation, f.value, f.lineno, f.end_lineno, f.col_offset)
                for f in fields
            ],
            node.end_lineno,
        )
    return Entry(node.name, "class", ps, ("", ""), doc, [seg(b) for b in node.bases], methods)


def entries(src: str, where: str = "") -> tuple[Entry, ...]:
    "The entries of the public functions and classes that a cell defines."
    try:
        return parse_entries(re.sub(r"\A(?:\s*#\s*\|[^\n]*\n)+", "", src).strip())
    except SyntaxError as e:
        raise SiteError(
            f"{where}an exported cell is not Python: {e.msg} in line {e.lineno}:"
            f" {(e.text or '').strip()}"
        ) from e


@functools.lru_cache(4096)
def parse_entries(src: str) -> tuple[Entry, ...]:
    tree = ast.parse(src)
    nodes = [
        n
        for n in tree.body
        if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not n.name.startswith("_")
    ]
    comments = comments_of(src) if nodes else None
    return tuple(entry_of(n, src, comments) for n in nodes)


class Index:
    "Which page and anchor a name in backticks means, and which page a link to a notebook means."

    def __init__(self, pages: list[Page]):
        self.pages = {p.src: p for p in pages}
        self.names: dict[str, list[Page]] = {}
        for p in pages:
            for n in p.anchors:
                self.names.setdefault(n, []).append(p)
        self.modules = {p.module: p for p in pages if p.module}

    def find(self, name: str, here: Page | None = None) -> tuple[Page, str] | None:
        """The page and anchor of a name such as `sample`, `Process.noise`, `dk.sample` or
        `diffkit.core.process.VP`; None when it is unknown or means several things."""
        if name in self.modules:
            return self.modules[name], ""
        mod = next(
            (
                m
                for m in sorted(self.modules, key=len, reverse=True)
                if name.startswith(m + ".") or name.startswith(m.removeprefix("diffkit.") + ".")
            ),
            None,
        )
        if mod:
            rest = name.removeprefix("diffkit.").removeprefix(mod.removeprefix("diffkit.") + ".")
            return (
                (self.modules[mod], self.modules[mod].anchors[rest])
                if rest in self.modules[mod].anchors
                else None
            )
        name = re.sub(r"^(dk|diffkit)\.", "", name)
        found = self.names.get(name, [])
        page = here if here in found else found[0] if len(found) == 1 else None
        return (page, page.anchors[name]) if page else None

    def href(self, name: str, here: Page, ext: str) -> str | None:
        hit = self.find(name, here)
        if hit is None:
            return None
        path = "" if hit[0] is here else hit[0].link(here.folder, ext)
        return path + (f"#{hit[1]}" if hit[1] else "") or None


NAME = r"[A-Za-z_]\w*(?:\.\w+)*"
CODE_NAME = re.compile(rf"(?<![`\[\\\w$])`({NAME})(\(\))?`(?![`\]\w])")
NB_LINK = re.compile(r"(\]\(|href=[\"'])([^)\s\"'#:]+\.ipynb)(#[^)\s\"']*)?")


def link_names(md: str, page: Page, index: Index) -> str:
    """Link names in backticks to their entries, in text only: not in code, headings, formulas,
    raw HTML or links."""
    out, fence = [], ""
    for line in md.split("\n"):
        m = re.match(r"\s*(`{3,}|~{3,}|\$\$)", line)
        if m and (not fence or m.group(1).startswith(fence)):
            closed = m.group(1) == "$$" and line.count("$$") == 2
            fence = "" if fence or closed else m.group(1)
        elif not fence and not re.match(r"\s*(#|<|    )", line) and "](" not in line[:0]:
            parts = re.split(r"(\[[^\]]*\]\([^)]*\))", line)  # leave links alone
            parts[::2] = [
                CODE_NAME.sub(
                    lambda m: (
                        f"[{m.group(0)}]({h})"
                        if (h := index.href(m.group(1), page, ".ipynb"))
                        else m.group(0)
                    ),
                    x,
                )
                for x in parts[::2]
            ]
            line = "".join(parts)
        out.append(line)
    return "\n".join(out)


def link_notebooks(text: str, page: Page, index: Index, ext: str = ".ipynb") -> str:
    """Links between notebooks, as they work in Jupyter, made links between prepared notebooks
    (whose names have no number)."""

    def sub(m):
        target = index.pages.get(
            posixpath.normpath(posixpath.join(page.folder, urllib.parse.unquote(m.group(2))))
        )
        return (
            f"{m.group(1)}{target.link(page.folder, ext)}{m.group(3) or ''}"
            if target
            else m.group(0)
        )

    return NB_LINK.sub(sub, text)


def inline(text: str, page: Page | None = None, index: Index | None = None) -> str:
    """One line of text with `code`, **bold**, *emphasis*, $formulas$ and [links](x) as HTML;
    names in backticks become links."""

    def code(m):
        body = html.escape(m.group(1))
        href = (
            index.href(m.group(1).removesuffix("()"), page, ".html")
            if index and page and re.fullmatch(NAME + r"(\(\))?", m.group(1))
            else None
        )
        return f'<a href="{href}"><code>{body}</code></a>' if href else f"<code>{body}</code>"

    out = []
    for part in re.split(r"(`[^`]+`|\$[^\s$](?:[^$]*[^\s$])?\$(?!\d))", text):
        if part[:1] == "`" and len(part) > 2:
            out.append(code(re.match(r"`([^`]+)`", part)))
        elif part[:1] == "$" and len(part) > 2:
            out.append(f'<span class="math inline">\\({html.escape(part[1:-1])}\\)</span>')
        else:
            part = re.sub(
                r"\*\*(\S(?:.*?\S)?)\*\*", r"<strong>\1</strong>", html.escape(part, quote=False)
            )
            part = re.sub(r"(?<![\w*])\*(\S(?:.*?\S)?)\*(?![\w*])", r"<em>\1</em>", part)
            out.append(re.sub(r"\[([^\]]+)\]\((https?://[^)\s]+)\)", r'<a href="\2">\1</a>', part))
    return "".join(out)


def math_in_html(body: str) -> str:
    """Formulas between dollars in the text of an HTML output, which Jupyter draws, marked for
    drawing here too."""
    parts = re.split(
        r"(<(?:script|style|pre|code|svg|textarea)\b.*?</(?:script|style|pre|code|svg|textarea)>|<!--.*?-->|<[^>]*>)",
        body,
        flags=re.S | re.I,
    )
    parts[::2] = [
        re.sub(r"\$\$(.+?)\$\$", r'<span class="math display">\\[\1\\]</span>', x, flags=re.S)
        for x in parts[::2]
    ]
    parts[::2] = [
        re.sub(
            r"(?<![\\$])\$([^\s$](?:[^$]*[^\s$])?)\$(?![\d$])",
            r'<span class="math inline">\\(\1\\)</span>',
            x,
        )
        for x in parts[::2]
    ]
    return "".join(parts)


def raw_html(body: str) -> str:
    "HTML that Quarto and smalldocs pass on untouched."
    fence = "`" * max(3, 1 + max((len(x) for x in re.findall(r"`+", body)), default=0))
    return f"{fence}{{=html}}\n{body}\n{fence}"


def signature(e: Entry, types: bool) -> str:
    "The signature as code, on one line where it fits."
    ps = [
        n + (f": {a}" if types and a else "") + (f"{' = ' if types and a else '='}{d}" if d else "")
        for n, a, d, _ in e.params
    ]
    head, tail = (
        f"{e.kind} {e.name}" if e.kind == "class" else e.name,
        (f" -> {e.returns[0]}" if types and e.returns[0] else ""),
    )
    if e.kind == "class" and e.bases:
        tail = f"  # a {', '.join(e.bases)}"
    if e.kind == "class" and not ps:
        return head + tail
    line = f"{head}({', '.join(ps)}){tail}"
    return (
        line if len(line) <= 96 else f"{head}(\n" + "".join(f"    {p},\n" for p in ps) + f"){tail}"
    )


def api_markdown(e: Entry, page: Page, index: Index) -> str:
    "The API entry: heading, signature, docstring, table of parameters, methods."
    table = any(c for *_, c in e.params) or bool(e.returns[1])
    out = [
        f"### {e.name} {{#{page.anchors.get(e.name, e.name)} .api-name}}",
        f"```python\n{signature(e, not table)}\n```",
        link_names(e.doc, page, index),
    ]
    show = lambda s: inline(s, page, index)
    code = lambda s: show(f"`{s}`") if s and "`" not in s else html.escape(s)
    if table:
        rows = [
            f"<tr><td><code>{html.escape(n)}</code></td><td>{code(a)}</td><td>{code(d)}</td><td>{show(c)}</td></tr>"
            for n, a, d, c in e.params
            if n != "*"
        ]
        if e.returns[0] and e.returns[0] != "None" or e.returns[1]:
            rows.append(
                f'<tr class="dk-returns"><td>returns</td><td>{code(e.returns[0])}</td><td></td><td>{show(e.returns[1])}</td></tr>'
            )
        head = "<thead><tr><th>Parameter</th><th>Type</th><th>Default</th><th>Meaning</th></tr></thead>"
        out.append(
            raw_html(
                '<div class="dk-table"><table'
                f' class="dk-params">{head}<tbody>{"".join(rows)}</tbody></table></div>'
            )
        )
    if e.methods:
        rows = []
        for m in e.methods:
            known = [(n, c) for n, _, _, c in m.params if c] + (
                [("returns", m.returns[1])] if m.returns[1] else []
            )
            more = "".join(f"<li><code>{html.escape(n)}</code> {show(c)}</li>" for n, c in known)
            sig = html.escape(m.name if m.kind == "attribute" else signature(m, False))
            rows.append(
                f'<dt id="{page.anchors.get(f"{e.name}.{m.name}", f"{e.name}.{m.name}")}"><code>{sig}</code></dt><dd>{show(m.doc)}{f"<ul>{more}</ul>" if more else ""}</dd>'
            )
        out.append(raw_html(f'<dl class="dk-methods">{"".join(rows)}</dl>'))
    return "\n\n".join(x for x in out if x)


# ---------------------------------------------------------------- nbdev's processors, with ours
# among them


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
            i = next(
                (
                    i
                    for i, c in enumerate(cells)
                    if c.cell_type == "markdown" and split_title(c.source)[0]
                ),
                None,
            )
            self.nb.frontmatter_ = {"title": page.title} | (
                {"description": page.description} if page.description else {}
            )
            if i is None:
                return
            rest = split_title(cells[i].source)[2]
            cells[i : i + 1] = [mk_cell(rest, "markdown")] if rest else []

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
                    found = [
                        e
                        for c in (hit[0].nb["cells"] if hit else [])
                        if "export" in directives(text_of(c["source"]))
                        for e in entries(text_of(c["source"]))
                        if e.name == m.group(1)
                    ]
                    out += [mk_cell(api_markdown(e, page, index), "markdown") for e in found]
                elif {"exporti", "default_exp"} & d.keys() and not {"export", "exports"} & d.keys():
                    continue
                elif {"export", "exports"} & d.keys() and "hide" not in d:
                    n += 1
                    es = entries(cell.source)
                    out += [mk_cell(api_markdown(e, page, index), "markdown") for e in es]
                    if all(
                        isinstance(x, ast.Import | ast.ImportFrom)
                        for x in ast.parse(cell.source).body
                    ):
                        continue
                    label = "Source of " + ", ".join(e.name for e in es) if es else "Source"
                    if "code-fold" not in d:
                        cell.source = (
                            f"#| code-fold: {'true' if es else 'show'}\n#| code-summary:"
                            f' "{label}"\n{cell.source.strip()}'
                        )
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
                    if o.get("name") == "stderr":
                        continue
                    if (
                        "application/vnd.jupyter.widget-view+json" in data
                        and "text/html" not in data
                    ):
                        continue
                    if set(data) == {"text/plain"} and re.match(
                        r"<Figure size|<IPython|<Axes|\[?<matplotlib", text_of(data["text/plain"])
                    ):
                        continue
                    if CLAIM in data:
                        data["text/html"] = claim_html(page.claims[n], n + 1)
                        n += 1
                        del data[CLAIM]
                    elif "text/html" in data:
                        data["text/html"] = math_in_html(
                            link_notebooks(text_of(data["text/html"]), page, index, ".html")
                        )
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
    "Changes when the notebook, the names and pages that it refers to, or this file change."
    text = json.dumps(page.nb)
    names = sorted(set(re.findall(rf"`({NAME})", text)) | {x for n in page.anchors for x in [n]})
    words = set(
        re.findall(
            r"\b[A-Za-z_]\w*\b",
            " ".join(
                text_of(c["source"])
                for c in page.nb["cells"]
                if c["cell_type"] == "code" and "export" in text_of(c["source"])[:40]
            ),
        )
    )
    links = [
        (n, index.href(n, page, ""))
        for n in sorted({*names, *words})
        if n in index.names or "." in n or n in index.modules
    ]
    notebooks = [link_notebooks(m.group(0), page, index) for m in NB_LINK.finditer(text)]
    return hashlib.sha256(
        json.dumps([own, page.src, page.digest, links, notebooks]).encode()
    ).hexdigest()


# ---------------------------------------------------------------- the pages of tables


def badge(v: str) -> str:
    v = v if v in VERDICTS else "open"
    return f'<span class="dk-badge dk-{v}"><span aria-hidden="true">{VERDICTS[v]}</span> {v}</span>'


def verdict_of(c: dict) -> str:
    return c.get("verdict") or c.get("holds") or "open"


def claim_html(c: dict, n: int) -> str:
    "A claim on its notebook's page."
    rows = "".join(
        f"<dt>{k}</dt><dd>{inline(str(v))}</dd>"
        for k, v in (
            ("Measured", c.get("measured")),
            ("Paper", c.get("paper")),
            ("Note", c.get("note")),
        )
        if v
    )
    return (
        f'<div class="dk-claim dk-claim-{html.escape(verdict_of(c))}"'
        f' id="claim-{n}"><p>{badge(verdict_of(c))}'
        f" {inline(str(c.get('says', '')))}</p><dl>{rows}</dl></div>"
    )


def chapters(cfg: dict, pages: list[Page]) -> list[tuple[str, str, list[Page]]]:
    """(title, folder, pages in order) of each chapter in the sidebar that has pages; a folder
    that the sidebar doesn't name comes last."""
    named = {}
    for c in cfg["website"]["sidebar"]["contents"]:
        if isinstance(c, dict) and "section" in c and isinstance(c.get("contents"), str):
            named[c["contents"].rpartition("/")[0]] = str(c["section"])
    for p in pages:
        named.setdefault(p.folder, p.folder.replace("/", " · ").title())
    return [
        (title, folder, ps)
        for folder, title in named.items()
        if folder and (ps := [p for p in pages if p.folder == folder])
    ]


def overview(chaps, index: Index) -> str:
    "The table of all notebooks: what each is about, its module, what it costs."
    out = []
    for title, folder, ps in chaps:
        rows = []
        for p in ps:
            module = f"<code>{html.escape(p.module)}</code>" if p.module else ""
            rows.append(
                f'<tr><td class="dk-num">{p.number}</td><td><a'
                f' href="{p.stem}.html">{inline(p.title)}</a><div'
                f' class="dk-idea">{inline(p.description)}</div></td><td>{module}</td><td'
                f' data-label="Cost">{inline(p.cost)}</td></tr>'
            )
        head = (
            "<thead><tr><th>No.</th><th>Notebook and"
            " idea</th><th>Module</th><th>Cost</th></tr></thead>"
        )
        out.append(
            f"## {title} {{#{folder}}}\n\n"
            + raw_html(
                '<div class="dk-table"><table'
                f' class="dk-overview">{head}<tbody>{"".join(rows)}</tbody></table></div>'
            )
        )
    return "\n\n".join(out)


def scorecard(chaps) -> str:
    "Every claim of every paper: totals first, then one table a chapter."
    tally = lambda ps: [sum(verdict_of(c) == v for p in ps for c in p.claims) for v in VERDICTS]
    shown = [(t, f, [p for p in ps if p.is_paper or p.claims]) for t, f, ps in chaps]
    shown = [(t, f, ps) for t, f, ps in shown if ps]

    def row(name, ps):
        n = tally(ps)
        bar = "".join(
            f'<span class="dk-{v}" style="flex:{k}" title="{v}: {k}"></span>'
            for v, k in zip(VERDICTS, n)
            if k
        )
        return (
            f"<tr><td>{name}</td><td>{sum(p.is_paper for p in ps)}</td><td>{sum(n)}</td>"
            + "".join(f"<td>{k}</td>" for k in n)
            + f'<td class="dk-bar-cell"><div class="dk-bar">{bar}</div></td></tr>'
        )

    every = [p for _, _, ps in shown for p in ps]
    head = "<thead><tr><th>Chapter</th><th>Papers</th><th>Claims</th><th>Yes</th><th>No</th><th>Open</th><th></th></tr></thead>"
    totals = "".join(row(f'<a href="#{f}">{html.escape(t)}</a>', ps) for t, f, ps in shown)
    out = [
        (
            "A claim is a sentence of a paper. Each row says what was measured in the notebook, at"
            " the small scale that the notebooks are saved at, next to the paper's own figure."
            " *Yes*: it holds here too. *No*: it does not. *Open*: the difference is within the"
            " noise of the measurement."
        ),
        raw_html(
            '<div class="dk-table"><table'
            f' class="dk-totals">{head}<tbody>{totals}</tbody><tfoot>{row("All", every)}</tfoot></table></div>\n<div'
            ' class="dk-filter" role="group" aria-label="Show claims">Show '
            + "".join(
                f'<button type="button" data-show="{v}"'
                f' aria-pressed="{str(v == "all").lower()}">{v}</button>'
                for v in ("all", *VERDICTS)
            )
            + "</div>"
        ),
    ]
    for title, folder, ps in shown:
        rows = []
        for p in ps:
            name = f'<a href="{p.stem}.html">{inline(p.title)}</a>'
            rows.append(
                '<tr class="dk-paper"><th colspan="3" scope="rowgroup"><span'
                f' class="dk-num">{p.number}</span>'
                f" {name}{'' if p.claims else ' <em>(no claims yet)</em>'}</th></tr>"
            )
            for i, c in enumerate(p.claims, 1):
                v = verdict_of(c)
                expected = (
                    f'<div class="dk-idea">expected {html.escape(c["holds"])}</div>'
                    if c.get("verdict") and c.get("holds") and c["verdict"] != c["holds"]
                    else ""
                )
                scale = (
                    f'<div class="dk-idea">{html.escape(c["scale"])} scale</div>'
                    if c.get("scale") not in (None, "", "quick")
                    else ""
                )
                said, note = (
                    (
                        ""
                        if not c.get(k)
                        else f'<div class="dk-idea">{label} {inline(str(c[k]))}</div>'
                    )
                    for k, label in (("paper", "Paper:"), ("note", "Note:"))
                )
                rows.append(
                    f'<tr data-verdict="{v}"><td>{badge(v)}{expected}</td><td><a'
                    f' class="dk-claim-link" href="{p.stem}.html#claim-{i}" title="where this was'
                    f' measured">{inline(str(c.get("says", "")))}</a>{said}</td>'
                    f'<td data-label="Measured">{inline(str(c.get("measured", "")))}{scale}{note}</td></tr>'
                )
        head = "<thead><tr><th>Holds</th><th>Claim</th><th>Measured here</th></tr></thead>"
        out.append(
            f"## {title} {{#{folder}}}\n\n"
            + raw_html(
                '<div class="dk-table"><table'
                f' class="dk-claims">{head}<tbody>{"".join(rows)}</tbody></table></div>'
            )
        )
    if not every:
        out.append("No claims yet.")
    script = (
        "<script>document.querySelectorAll('.dk-filter button').forEach((b, _, all) =>"
        " b.addEventListener('click', () => { const v = b.dataset.show;all.forEach((x) =>"
        " x.setAttribute('aria-pressed', x ==="
        " b));document.querySelectorAll('tr[data-verdict]').forEach((r) => { r.hidden = v !== 'all'"
        " && r.dataset.verdict !== v; }); }));</script>"
    )
    return "\n\n".join([*out, raw_html(script)])


def page_md(title: str, description: str, body: str) -> str:
    return (
        f"---\ntitle: {json.dumps(title)}\ndescription: {json.dumps(description)}\npage-layout:"
        f" full\ntoc: {'true' if body.count(chr(10) + '## ') > 1 else 'false'}\n---\n\n{body}\n"
    )


# ---------------------------------------------------------------- the steps


def yaml_load(text: str):
    import yaml

    return yaml.safe_load(text)


def read_config(root: Path) -> dict:
    f = root / "_quarto.yml"
    if not f.is_file():
        raise SiteError(f"no {f}")
    try:
        return yaml_load(f.read_text(encoding="utf-8"))
    except Exception as e:
        raise SiteError(f"{f}: {e}") from e


def staged_config(cfg: dict, chaps) -> str:
    """`_quarto.yml` with the globs of its sidebar replaced by the chapters that have pages, in
    number order."""
    import yaml

    cfg = json.loads(json.dumps(cfg))
    side = cfg["website"]["sidebar"]
    fixed = [c for c in side["contents"] if not (isinstance(c, dict) and "section" in c)]
    label = lambda p: f"{p.number} {p.title}".strip()
    side["contents"] = fixed + [
        {"section": t, "contents": [{"text": label(p), "href": p.stem + ".ipynb"} for p in ps]}
        for t, _, ps in chaps
    ]
    return yaml.safe_dump(cfg, sort_keys=False, allow_unicode=True, width=1000)


def write(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def prepare(root: Path, work: Path) -> tuple[list[Page], int]:
    """Write the Quarto project of prepared notebooks to `work`; the pages, and how many came
    from the cache."""
    cfg, nbs = read_config(root), root / "nbs"
    pages = read_pages(nbs)
    if not pages:
        raise SiteError(f"no notebooks in {nbs}")
    index, chaps = Index(pages), chapters(cfg, pages)
    work.mkdir(parents=True, exist_ok=True)
    keys_file = work / ".keys.json"
    try:
        keys = json.loads(keys_file.read_text())
    except (OSError, ValueError):
        keys = {}
    own = hashlib.sha256(Path(__file__).read_bytes() + STYLE_VERSION.encode()).hexdigest()
    new, cached, tables = {}, 0, overview(chaps, index)
    for p in pages:
        out, key = work / (p.stem + ".ipynb"), cache_key(p, index, own)
        if p.src == "index.ipynb":
            key += hashlib.sha256(tables.encode()).hexdigest()
        if keys.get(p.stem) == key and out.is_file():
            cached += 1
        else:
            try:
                text = prepare_one(p, index)
            except SiteError:
                raise
            except Exception as e:
                raise SiteError(
                    f"nbs/{p.src} could not be prepared: {type(e).__name__}: {e}"
                ) from e
            write(out, text)
        new[p.stem] = key
    if "index" not in new:
        title, about = cfg["website"]["title"], cfg["website"].get("description", "")
        write(
            work / "index.ipynb",
            json.dumps(
                {
                    "cells": [
                        {
                            "cell_type": "raw",
                            "metadata": {},
                            "source": (
                                f"---\ntitle: {title}\ndescription: {json.dumps(about)}\n---\n"
                            ),
                        },
                        {"cell_type": "markdown", "metadata": {}, "source": tables},
                    ],
                    "metadata": {},
                    "nbformat": 4,
                    "nbformat_minor": 5,
                }
            ),
        )
    write(
        work / "overview.qmd",
        page_md("All notebooks", "One notebook a paper, and what each chapter stands on.", tables),
    )
    write(
        work / "scorecard.qmd",
        page_md(
            "Scorecard", "What the papers claim, and what was measured here.", scorecard(chaps)
        ),
    )
    write(work / "_quarto.yml", staged_config(cfg, chaps))
    shutil.copytree(
        ASSETS,
        work / "assets",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("katex_render.js", "search.js"),
    )
    for f in nbs.rglob("*"):  # pictures that notebooks refer to
        if f.suffix.lower() in (".png", ".svg", ".jpg", ".jpeg", ".gif", ".webp"):
            (work / f.relative_to(nbs)).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(f, work / f.relative_to(nbs))
    for f in work.rglob("*.ipynb"):  # notebooks that are gone
        stem = f.relative_to(work).as_posix().removesuffix(".ipynb")
        if stem not in new and stem != "index" and "_site" not in f.parts:
            f.unlink()
    keys_file.write_text(json.dumps(new))
    return pages, cached


def render(work: Path, engine: str) -> Path:
    "Let Quarto or smalldocs make the pages; where they are."
    out = work / "_site"
    if engine == "quarto":
        r = subprocess.run(
            ["quarto", "render", str(work), "--no-execute"], capture_output=True, text=True
        )
        if r.returncode:
            raise SiteError("quarto: " + (r.stderr.strip().splitlines() or ["failed"])[-1])
        return out
    try:
        from smalldocs.config import BuildError, ConfigError
    except ImportError as e:
        raise SiteError(
            "neither Quarto nor smalldocs is installed: pip install diffkit[docs]"
        ) from e
    from smalldocs import highlight as hl
    from smalldocs import markdown as md
    from smalldocs.site import build as small

    # colouring code is most of its time: keep what is coloured
    store, plain, css_class = work / ".code.json", md.highlight, hl.css_class
    try:
        known = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    used = {}

    def highlight(code, lang):
        k = hashlib.sha256(f"{lang}\n{code}".encode()).hexdigest()
        used[k] = known[k] if k in known else plain(code, lang)
        return used[k]

    md.highlight, hl.css_class = highlight, functools.lru_cache(None)(css_class)
    try:
        site = small(work, quiet=True)
    except (BuildError, ConfigError) as e:
        raise SiteError(f"smalldocs: {e}") from e
    finally:
        md.highlight, hl.css_class = plain, css_class
    store.write_text(json.dumps(used), encoding="utf-8")
    for w in site.warnings:
        if "html-math-method" not in w:
            print(f"  smalldocs: {w}")
    return out


MATH = re.compile(r'<span class="math (inline|display)">(.*?)</span>', re.S)


def tex_of(body: str) -> str:
    t = html.unescape(body).strip()
    return re.sub(r"\A\\[(\[]|\\[)\]]\Z", "", t).strip()


def cache_dir() -> Path:
    "Where KaTeX is kept: in the virtual environment, else in the user's cache."
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "share" / "diffkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffkit"


def find_katex() -> Path | None:
    """The unpacked KaTeX package, fetched once with `npm pack`; None where node or npm is
    missing or npm has no network."""
    home = cache_dir() / f"katex-{KATEX}"
    if not shutil.which("node"):
        return None
    if (home / "package/dist/katex.js").is_file():
        return home / "package"
    if not shutil.which("npm"):
        return None
    tmp = home.with_name(f"{home.name}.{os.getpid()}")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        r = subprocess.run(
            ["npm", "pack", f"katex@{KATEX}", "--silent"],
            cwd=tmp,
            capture_output=True,
            text=True,
            timeout=120,
        )
        packed = list(tmp.glob("*.tgz"))
        if r.returncode or not packed:
            return None
        with tarfile.open(packed[0]) as t:
            t.extractall(tmp, filter="data")
        if not (home / "package").is_dir():
            shutil.rmtree(home, ignore_errors=True)
            tmp.rename(home)
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return home / "package"


def draw_katex(jobs: list[tuple[str, bool]], package: Path) -> list[dict]:
    r = subprocess.run(
        ["node", str(ASSETS / "katex_render.js"), str(package)],
        input=json.dumps(jobs),
        capture_output=True,
        text=True,
    )
    if r.returncode:
        raise SiteError("KaTeX: " + (r.stderr.strip().splitlines() or ["node failed"])[-1])
    return json.loads(r.stdout)


def draw_pandoc(jobs: list[tuple[str, bool]]) -> list[dict]:
    "MathML by pandoc, all formulas in one run."
    try:
        import pypandoc
    except ImportError as e:
        raise SiteError(
            "mathematics needs node with npm (KaTeX), or pandoc: pip install pypandoc-binary"
        ) from e
    block = lambda i, tex, display: {
        "t": "Div",
        "c": [
            [f"f{i}", [], []],
            [
                {
                    "t": "Plain",
                    "c": [
                        {"t": "Math", "c": [{"t": "DisplayMath" if display else "InlineMath"}, tex]}
                    ],
                }
            ],
        ],
    }
    doc = {
        "pandoc-api-version": [1, 23, 1],
        "meta": {},
        "blocks": [block(i, *j) for i, j in enumerate(jobs)],
    }
    got = pypandoc.convert_text(
        json.dumps(doc), "html", format="json", extra_args=["--mathml", "--wrap=none"]
    )
    found = {
        int(i): body.strip() for i, body in re.findall(r'<div id="f(\d+)">(.*?)</div>', got, re.S)
    }
    return [
        {"html": found[i]} if "<math" in found.get(i, "") else {"error": "pandoc cannot read it"}
        for i in range(len(jobs))
    ]


def local_css(text: str) -> str:
    "A stylesheet that loads nothing from elsewhere: imports of web fonts are dropped."
    return re.sub(r"@import\s+(?:url\()?\s*[\"']?(?:https?:)?//[^;]*;", "", text)


def finish(site: Path, work: Path, math: str = "auto") -> tuple[int, str, list[str]]:
    """Draw the formulas and make everything local; the number of formulas, what drew them, and
    what went wrong."""
    pages = sorted(site.rglob("*.html"))
    texts = {f: f.read_text(encoding="utf-8") for f in pages}
    jobs = sorted(
        {(tex_of(b), kind == "display") for t in texts.values() for kind, b in MATH.findall(t)}
    )
    package = find_katex() if math in ("auto", "katex") else None
    if math == "katex" and package is None:
        raise SiteError("KaTeX is not to be had here: it needs node, and npm to fetch it once")
    how = f"KaTeX {KATEX}" if package else "pandoc's MathML"
    store = work / f".math-{'katex-' + KATEX if package else 'pandoc'}.json"
    try:
        known = {
            (k[1:], k[0] == "D"): v
            for k, v in json.loads(store.read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError):
        known = {}
    todo = [j for j in jobs if j not in known]
    if todo:
        known |= dict(zip(todo, draw_katex(todo, package) if package else draw_pandoc(todo)))
    store.write_text(
        json.dumps({("D" if d else "i") + t: known[t, d] for t, d in jobs}), encoding="utf-8"
    )
    problems, count = [], 0
    search = site / "site_libs" / "fuse" / "fuse.min.js"
    if search.is_file():
        shutil.copy(ASSETS / "search.js", site / "site_libs" / "search.js")
        shutil.rmtree(search.parent)
    if package:
        dest = site / "site_libs" / "katex"
        (dest / "fonts").mkdir(parents=True, exist_ok=True)
        css = (package / "dist/katex.min.css").read_text(encoding="utf-8")
        write(
            dest / "katex.min.css", re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", css)
        )
        for f in (package / "dist/fonts").glob("*.woff2"):
            shutil.copy2(f, dest / "fonts")
        shutil.copy2(package / "LICENSE", dest)
    for f, t in texts.items():
        where, up = (
            f.relative_to(site).as_posix(),
            posixpath.relpath(".", f.relative_to(site).parent.as_posix()),
        )
        rest = re.sub(
            r"<(pre|code|script|style|svg|textarea)\b.*?</\1>",
            " ",
            MATH.sub(" ", (re.search(r"<main\b.*?</main>", t, re.S) or re.match("", "")).group(0)),
            flags=re.S,
        )
        for bad in re.findall(
            r"\$[^\s$<](?:[^$<]{0,80}[^\s$<])?\$(?!\d)|\\(?:frac|mathcal|mathbb|alpha|sigma|hat|begin|sqrt|partial|log|text)\b[^<]{0,40}",
            re.sub(r"<[^>]*>", " ", rest),
        )[:3]:
            problems.append(
                f"{where}: mathematics not read as such: {' '.join(html.unescape(bad).split())}"
            )
        errors = {
            tex_of(b): known[tex_of(b), k == "display"]["error"]
            for k, b in MATH.findall(t)
            if "error" in known[tex_of(b), k == "display"]
        }
        problems += [f"{where}: formula {' '.join(x.split())[:80]}: {e}" for x, e in errors.items()]
        # formulas in the table of contents
        for hid, inner in re.findall(
            r'<h[1-6]\b[^>]*\bdata-anchor-id="([^"]+)"[^>]*>(.*?)</h[1-6]>', t, re.S
        ):
            if "math inline" in inner:
                t = re.sub(
                    rf'(<a [^>]*id="toc-{re.escape(hid)}"[^>]*>).*?</a>',
                    lambda m, s=inner: m.group(1) + re.sub(r"</?a\b[^>]*>", "", s) + "</a>",
                    t,
                    flags=re.S,
                )
        # an exported name `title` would share the id of the contents' heading
        t = re.sub(r'(<a href="#title") id="toc-title"', r"\1", t)
        n = 0

        def draw(m):
            nonlocal n
            n += 1
            d = known[tex_of(m.group(2)), m.group(1) == "display"]
            return (
                f'<span class="math {m.group(1)}">{d["html"]}</span>'
                if "html" in d
                else f'<code class="dk-badmath">{m.group(2)}</code>'
            )

        t = MATH.sub(draw, t)
        count += n
        # what Quarto or smalldocs would draw formulas with; any other load from elsewhere is
        # reported by `check`
        own = r'"(?:https?:)?//[^"]*(?:katex|mathjax|polyfill)[^"]*"'
        t = re.sub(
            rf"<script[^>]*\bsrc={own}[^>]*></script>|<link\b[^>]*\bhref={own}[^>]*>",
            "",
            t,
            flags=re.I,
        )
        # Quarto's own drawing of formulas
        t = re.sub(
            r"<script\b[^>]*>(?:(?!</script>).)*katex\.render\((?:(?!</script>).)*</script>",
            "",
            t,
            flags=re.S,
        )
        t = t.replace("site_libs/fuse/fuse.min.js", "site_libs/search.js")
        if n and package:
            t = t.replace(
                "</head>",
                '<link rel="stylesheet"'
                f' href="{"" if up == "." else up + "/"}site_libs/katex/katex.min.css"></head>',
                1,
            )
        f.write_text(t, encoding="utf-8")
    for f in site.rglob("*.css"):
        text = f.read_text(encoding="utf-8")
        if "@import" in text:
            f.write_text(local_css(text), encoding="utf-8")
    (site / ".nojekyll").touch()
    return count, how, problems


def check(site: Path) -> tuple[int, list[str]]:
    """Links and anchors that lead nowhere, and anything that would be loaded from another
    machine; the number of links looked at."""
    bodies = {
        f.relative_to(site).as_posix(): f.read_text(encoding="utf-8")
        for f in sorted(site.rglob("*.html"))
    }
    ids, problems, n = {}, [], 0
    quiet = {}
    for name, t in bodies.items():
        for tag in re.findall(
            r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|data)=[\"']((?:https?:)?//[^\"']+)|<link\b[^>]*?\shref=[\"']((?:https?:)?//[^\"']+)",
            t,
        ):
            problems.append(f"{name}: loads {tag[0] or tag[1]}")
        problems += [
            f"{name}: a script imports {u}"
            for u in re.findall(
                r"<script\b[^>]*type=.module.[^>]*>(?:(?!</script>).)*?import\b[^;]*?[\"']((?:https?:)?//[^\"']+)",
                t,
                re.S,
            )
        ]
        quiet[name] = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1</script>", t, flags=re.S)
        found = [
            html.unescape(x) for x in re.findall(r"""\s(?:id|name)=["']([^"']+)["']""", quiet[name])
        ]
        ids[name], twice = (
            set(found),
            ({x for x in found if found.count(x) > 1} if len(set(found)) < len(found) else set()),
        )
        problems += [
            f"{name}: two places are called #{x}, and a link goes to it"
            for x in sorted(twice)
            if f'#{x}"' in quiet[name]
        ]
    for name, t in quiet.items():
        for url in {
            html.unescape(u)
            for u in re.findall(
                r"""<(?:a|link|script|img|source|iframe)\b[^>]*?\s(?:href|src)=["']([^"']*)["']""",
                t,
            )
        }:
            if not url or re.match(r"[a-zA-Z][\w+.-]*:|//", url):
                continue
            n += 1
            path, _, anchor = url.partition("#")
            path = urllib.parse.unquote(path.partition("?")[0])
            target = (
                posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
            )
            if target == "." or path.endswith("/") or (site / target).is_dir():
                target = posixpath.normpath(posixpath.join(target, "index.html"))
            if target not in bodies and not (site / target).is_file():
                problems.append(f"{name}: broken link {url}")
            elif (
                anchor
                and target in bodies
                and urllib.parse.unquote(anchor) not in ids[target]
                and anchor not in ("", "top")
            ):
                problems.append(f"{name}: no anchor for {url}")
    for f in site.rglob("*.css"):
        for u in re.findall(
            r"url\(\s*[\"']?((?:https?:)?//[^)\"']+)|@import\s+[\"']((?:https?:)?//[^\"']+)",
            f.read_text(encoding="utf-8"),
        ):
            problems.append(f"{f.relative_to(site)}: loads {u[0] or u[1]}")
    return n, sorted(problems)


def build(
    dest: str | Path = "_site",  # where the site goes; relative to the repository
    serve: bool = False,  # show it on 127.0.0.1 afterwards, until interrupted
    *,
    root: str | Path = ROOT,  # the folder with _quarto.yml and nbs/
    work: str | Path | None = None,  # the prepared notebooks and caches; default root/_proc
    engine: str = "auto",  # quarto | smalldocs | auto: Quarto where it is installed
    math: str = "auto",  # katex | pandoc | auto: KaTeX where node and npm are
    port: int = 8000,
) -> Path:  # the built site
    "Build the docs site from the notebooks' saved outputs."
    for name, value, allowed in (
        ("engine", engine, ("auto", "quarto", "smalldocs")),
        ("math", math, ("auto", "katex", "pandoc")),
    ):
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    t0, root = time.perf_counter(), Path(root).resolve()
    dest, work = root / dest, Path(work).resolve() if work else root / "_proc"
    if dest.exists() and (
        not dest.is_dir() or any(dest.iterdir()) and not (dest / "site_libs").is_dir()
    ):
        raise SiteError(
            f"{dest} is not a built site (it has no site_libs) and would be replaced: give another"
            " folder"
        )
    if engine == "auto":
        engine = "quarto" if shutil.which("quarto") else "smalldocs"
    pages, cached = prepare(root, work)
    print(
        f"site: {len(pages)} notebooks, {len(pages) - cached} prepared, {cached} unchanged"
        f" ({time.perf_counter() - t0:.1f} s)",
        flush=True,
    )
    t1 = time.perf_counter()
    site = render(work, engine)
    print(f"site: pages rendered by {engine} ({time.perf_counter() - t1:.1f} s)", flush=True)
    t1 = time.perf_counter()
    count, how, problems = finish(site, work, math)
    links, broken = check(site)
    print(
        f"site: {count} formulas drawn by {how}, {links} links checked"
        f" ({time.perf_counter() - t1:.1f} s)",
        flush=True,
    )
    if dest.exists():
        shutil.rmtree(dest)
    dest.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(site, dest)
    problems += broken
    if problems:
        for p in problems:
            print(f"  {p}")
        raise SiteError(
            f"{len(problems)} problem{'s' * (len(problems) > 1)} in the site, the first:"
            f" {problems[0]}"
        )
    print(f"site: {dest / 'index.html'} ({time.perf_counter() - t0:.1f} s)", flush=True)
    if serve:
        serve_site(dest, port)
    return dest


def serve_site(dest: Path, port: int = 8000):
    "Serve a folder on this machine only, until interrupted."
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    with ThreadingHTTPServer(
        ("127.0.0.1", port), functools.partial(SimpleHTTPRequestHandler, directory=str(dest))
    ) as server:
        print(f"site: http://127.0.0.1:{server.server_address[1]}/ (Ctrl-C stops)", flush=True)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()


def main(argv: list[str] | None = None) -> int:
    "`python -m diffkit.site`."
    ap = argparse.ArgumentParser(
        prog="python -m diffkit.site",
        description="Build the docs site from the notebooks' saved outputs.",
    )
    ap.add_argument("--dest", default="_site", help="where the site goes (default _site)")
    ap.add_argument("--serve", action="store_true", help="show it on 127.0.0.1 afterwards")
    ap.add_argument("--port", type=int, default=8000)
    ap.add_argument("--engine", default="auto", choices=["auto", "quarto", "smalldocs"])
    ap.add_argument("--math", default="auto", choices=["auto", "katex", "pandoc"])
    ap.add_argument(
        "--prepare",
        action="store_true",
        help="only write the Quarto project of prepared notebooks to _proc/",
    )
    a = ap.parse_args(argv)
    try:
        if a.prepare:
            pages, cached = prepare(ROOT, ROOT / "_proc")
            print(f"site: {len(pages)} notebooks in {ROOT / '_proc'}, {cached} unchanged")
        else:
            build(a.dest, a.serve, engine=a.engine, math=a.math, port=a.port)
    except (SiteError, OSError) as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
