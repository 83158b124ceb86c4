"""Names in backticks, notebooks and formulas made links and marks: text on its way to a page."""

from __future__ import annotations

import html
import posixpath
import re
import urllib.parse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffkit.site.pages import Page


class Index:
    "Which page and anchor a name in backticks means, and which page a link to a notebook means."

    def __init__(self, pages: list[Page]):
        self.pages = {p.src: p for p in pages}
        self.names: dict[str, list[Page]] = {}
        for p in pages:
            for n in p.anchors:
                self.names.setdefault(n, []).append(p)
        self.modules = {p.module: p for p in pages if p.module}
        self.numbers = {p.number: p for p in pages if p.number}
        self.repo: dict[str, str] = {}  # where the code is hosted: git_url, branch
        self.tests: dict[str, list[str]] = {}  # page -> its test files

    def find(self, name: str, here: Page | None = None) -> tuple[Page, str] | None:
        """The page and anchor of a name such as `sample`, `Process.noise`, `dk.sample` or
        `diffkit.core.process.VP`; None when it is unknown or means several things."""
        if name in self.modules:
            return self.modules[name], ""
        longest = sorted(self.modules, key=len, reverse=True)
        short = lambda m: m.removeprefix("diffkit.")
        mod = next((m for m in longest if short(name).startswith(short(m) + ".")), None)
        if mod:
            anchors, rest = self.modules[mod].anchors, short(name).removeprefix(short(mod) + ".")
            return (self.modules[mod], anchors[rest]) if rest in anchors else None
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

# pieces of a line that are left alone: links, code, formulas, tags
PIECES = re.compile(r"(\[[^\]]*\]\([^)]*\)|`[^`]*`(?:\]\([^)]*\))?|\$[^$]*\$|<[^>]*>)")
# three digits mean a notebook after such a word, or alone in parentheses
SERIES = r"\d{3}\b(?:(?:, and |, | and | or | to )\d{3}\b)*"
WORDS = "[Nn]otebooks?|[Pp]apers?(?: of)?|[Ee]xercises of|[Ss]olvers of"
MEANT = (
    re.compile(rf"(\b(?:{WORDS}) )({SERIES})(?![.,]\d)"),
    re.compile(rf"(\b[Ss]ee )({SERIES})(?=[.,;:)]|$)"),
    re.compile(rf"(\(|^)({SERIES})(?=\)|:)"),
)
# on pages that speak of nothing but notebooks: wherever three digits stand alone
ALONE = (re.compile(r"((?<![\w.,/-]))(\d{3})(?![\w%-]|[.,]\d)"),)
NAMED = re.compile(r"\b(\d{3})(?= \(?([A-Za-z][\w-]{2,}))")


def link_numbers(text: str, page: Page, index: Index, ext: str = ".ipynb") -> str:
    "Numbers of notebooks made links: notebook 203, notebooks 000 to 003, (202, 204), 302 APG."

    def one(m):
        target = index.numbers.get(m[0])
        known = target and target is not page
        return f"[{m[0]}]({target.link(page.folder, ext)})" if known else m[0]

    def named(m):
        target, plain = index.numbers.get(m[1]), lambda s: re.sub(r"[\W_]", "", s).lower()
        if not target:
            return m[1]
        stem = target.stem.rpartition("/")[2]
        own = {plain(x) for x in (stem, stem.split("_")[0], target.title.split()[0])}
        return one(m) if plain(m[2]) in own else m[1]

    for pattern in MEANT if page.folder else ALONE:
        text = pattern.sub(lambda m: m[1] + re.sub(r"\d{3}", one, m[2]), text)
    return NAMED.sub(named, text) if page.folder else text


def link_line(line: str, page: Page, index: Index) -> str:
    "One line of text with names in backticks and numbers of notebooks linked."

    def name(part):
        m = CODE_NAME.fullmatch(part)
        href = m and index.href(m[1], page, ".ipynb")
        return f"[{part}]({href})" if href else part

    parts = PIECES.split(line)
    parts[::2] = [link_numbers(x, page, index) for x in parts[::2]]
    parts[1::2] = [name(x) for x in parts[1::2]]
    return "".join(parts)


def link_names(md: str, page: Page, index: Index) -> str:
    """Link names in backticks to their entries and numbers to their notebooks, in text only: not
    in code, headings, formulas, raw HTML or links."""
    out, fence = [], ""
    for line in md.split("\n"):
        m = re.match(r"\s*(`{3,}|~{3,}|\$\$)", line)
        if m and (not fence or m[1].startswith(fence)):
            closed = m[1] == "$$" and line.count("$$") == 2
            fence = "" if fence or closed else m[1]
        elif not fence and not re.match(r"\s*(#|<|    )", line):
            line = link_line(line, page, index)
        out.append(line)
    return "\n".join(out)


def link_notebooks(text: str, page: Page, index: Index, ext: str = ".ipynb") -> str:
    """Links between notebooks, as they work in Jupyter, made links between prepared notebooks
    (whose names have no number)."""

    def sub(m):
        path = posixpath.join(page.folder, urllib.parse.unquote(m[2]))
        target = index.pages.get(posixpath.normpath(path))
        return f"{m[1]}{target.link(page.folder, ext)}{m[3] or ''}" if target else m[0]

    return NB_LINK.sub(sub, text)


def inline(text: str, page: Page | None = None, index: Index | None = None) -> str:
    """One line of text with `code`, **bold**, *emphasis*, $formulas$ and [links](x) as HTML;
    names in backticks and numbers of notebooks become links."""

    def code(m):
        body, name = html.escape(m[1]), m[1].removesuffix("()")
        known = index and page and re.fullmatch(NAME, name)
        href = index.href(name, page, ".html") if known else None
        return f'<a href="{href}"><code>{body}</code></a>' if href else f"<code>{body}</code>"

    out = []
    for part in re.split(r"(`[^`]+`|\$[^\s$](?:[^$]*[^\s$])?\$(?!\d))", text):
        if m := re.fullmatch(r"`([^`]+)`", part):
            out.append(code(m))
        elif part[:1] == "$" and len(part) > 2:
            out.append(f'<span class="math inline">\\({html.escape(part[1:-1])}\\)</span>')
        else:
            part = link_numbers(part, page, index, ".html") if index and page else part
            part = html.escape(part, quote=False)
            part = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"<strong>\1</strong>", part)
            part = re.sub(r"(?<![\w*])\*(\S(?:.*?\S)?)\*(?![\w*])", r"<em>\1</em>", part)
            link = r"\[([^\]]+)\]\((https?://[^)\s]+|[\w./-]+\.html)\)"
            out.append(re.sub(link, r'<a href="\2">\1</a>', part))
    return "".join(out)


def math_in_html(body: str) -> str:
    """Formulas between dollars in the text of an HTML output, which Jupyter draws, marked for
    drawing here too."""
    kinds = "script|style|pre|code|svg|textarea"
    alone = rf"(<(?:{kinds})\b.*?</(?:{kinds})>|<!--.*?-->|<[^>]*>)"
    display = r'<span class="math display">\\[\1\\]</span>'
    short = r'<span class="math inline">\\(\1\\)</span>'
    parts = re.split(alone, body, flags=re.S | re.I)
    for i in range(0, len(parts), 2):
        text = re.sub(r"\$\$(.+?)\$\$", display, parts[i], flags=re.S)
        parts[i] = re.sub(r"(?<![\\$])\$([^\s$](?:[^$]*[^\s$])?)\$(?![\d$])", short, text)
    return "".join(parts)


def raw_html(body: str) -> str:
    "HTML that Quarto and smalldocs pass on untouched."
    fence = "`" * max(3, 1 + max((len(x) for x in re.findall(r"`+", body)), default=0))
    return f"{fence}{{=html}}\n{body}\n{fence}"


def table(kind: str, head: list[str], rows: list[str], foot: str = "") -> str:
    "A table in raw HTML that scrolls in its own box."
    top = "".join(f"<th>{h}</th>" for h in head)
    foot = f"<tfoot>{foot}</tfoot>" if foot else ""
    body = f"<thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody>{foot}"
    return f'<div class="dk-table"><table class="{kind}">{body}</table></div>'
