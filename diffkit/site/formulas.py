"""Formulas drawn at build time, and everything a page loads made local."""

from __future__ import annotations

import html
import json
import posixpath
import re
import shutil
import subprocess
from pathlib import Path

from diffkit.site.errors import SiteError
from diffkit.site.packages import npm_package
from diffkit.site.project import ASSETS, write

KATEX = "0.19.1"


OLD_ROMAN = re.compile(r"\{\\rm\s+([^{}]*)\}")  # {\rm x}, which pandoc cannot read
MATH = re.compile(r'<span class="math (inline|display)">(.*?)</span>', re.S)


def tex_of(body: str) -> str:
    t = html.unescape(body).strip()
    return re.sub(r"\A\\[(\[]|\\[)\]]\Z", "", t).strip()


def find_katex() -> Path | None:
    "The unpacked KaTeX package; None where node is missing, or npm to fetch it once."
    return npm_package("katex", KATEX, "dist/katex.js") if shutil.which("node") else None


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
    jobs = [(OLD_ROMAN.sub(r"{\\mathrm{\1}}", tex), display) for tex, display in jobs]
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


def drawn(jobs: list[tuple[str, bool]], work: Path, package: Path | None) -> dict:
    "Formula and display -> what was drawn, or the error; what is known is not drawn again."
    store = work / f".math-{'katex-' + KATEX if package else 'pandoc'}.json"
    try:
        kept = json.loads(store.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        kept = {}
    known = {(k[1:], k[0] == "D"): v for k, v in kept.items()}
    todo = [j for j in jobs if j not in known]
    if todo:
        known |= dict(zip(todo, draw_katex(todo, package) if package else draw_pandoc(todo)))
    keep = {("D" if d else "i") + t: known[t, d] for t, d in jobs}
    store.write_text(json.dumps(keep), encoding="utf-8")
    return known


def add_katex(site: Path, package: Path) -> None:
    "KaTeX's stylesheet, its woff2 fonts and its licence, in the site."
    dest = site / "site_libs" / "katex"
    (dest / "fonts").mkdir(parents=True, exist_ok=True)
    css = (package / "dist/katex.min.css").read_text(encoding="utf-8")
    css = re.sub(r',url\([^)]*\.(?:woff|ttf)\) format\("\w+"\)', "", css)
    write(dest / "katex.min.css", css)
    for f in (package / "dist/fonts").glob("*.woff2"):
        shutil.copy2(f, dest / "fonts")
    shutil.copy2(package / "LICENSE", dest)


def unread(text: str) -> list[str]:
    "TeX that is left in a page's text: formulas that were not read as such."
    main = re.search(r"<main\b.*?</main>", text, re.S)
    rest = MATH.sub(" ", main.group(0) if main else "")
    rest = re.sub(r"<(pre|code|script|style|svg|textarea)\b.*?</\1>", " ", rest, flags=re.S)
    rest = re.sub(r"<[^>]*>", " ", rest)
    dollars = r"\$[^\s$<](?:[^$<]{0,80}[^\s$<])?\$(?!\d)"
    words = "frac|mathcal|mathbb|alpha|sigma|hat|begin|sqrt|partial|log|text"
    found = re.findall(rf"{dollars}|\\(?:{words})\b[^<]{{0,40}}", rest)
    return [" ".join(html.unescape(x).split()) for x in found[:3]]


def toc_formulas(text: str) -> str:
    "Formulas in headings, drawn in the table of contents too."
    heading = r'<h[1-6]\b[^>]*\bdata-anchor-id="([^"]+)"[^>]*>(.*?)</h[1-6]>'
    for name, inner in re.findall(heading, text, re.S):
        if "math inline" in inner:
            plain = re.sub(r"</?a\b[^>]*>", "", inner)
            entry = rf'(<a [^>]*id="toc-{re.escape(name)}"[^>]*>).*?</a>'
            text = re.sub(entry, lambda m, s=plain: f"{m[1]}{s}</a>", text, flags=re.S)
    # an exported name `title` would share the id of the contents' heading
    return re.sub(r'(<a href="#title") id="toc-title"', r"\1", text)


def draw_page(text: str, known: dict) -> tuple[str, int]:
    "A page with its formulas drawn, and how many there were."

    def draw(m):
        d = known[tex_of(m[2]), m[1] == "display"]
        if "html" in d:
            return f'<span class="math {m[1]}">{d["html"]}</span>'
        return f'<code class="dk-badmath">{m[2]}</code>'

    text, n = MATH.subn(draw, text)
    # what Quarto or smalldocs would draw formulas with; any other load from elsewhere is reported
    own = r'"(?:https?:)?//[^"]*(?:katex|mathjax|polyfill)[^"]*"'
    script = rf"<script[^>]*\bsrc={own}[^>]*></script>"
    text = re.sub(rf"{script}|<link\b[^>]*\bhref={own}[^>]*>", "", text, flags=re.I)
    inside = r"(?:(?!</script>).)*"
    return re.sub(
        rf"<script\b[^>]*>{inside}katex\.render\({inside}</script>", "", text, flags=re.S
    ), n


def finish(site: Path, work: Path, math: str = "auto") -> tuple[int, str, list[str]]:
    """Draw the formulas and make everything local; the number of formulas, what drew them, and
    what went wrong."""
    texts = {f: f.read_text(encoding="utf-8") for f in sorted(site.rglob("*.html"))}
    formulas = {(tex_of(b), k == "display") for t in texts.values() for k, b in MATH.findall(t)}
    package = find_katex() if math in ("auto", "katex") else None
    if math == "katex" and package is None:
        raise SiteError("KaTeX is not to be had here: it needs node, and npm to fetch it once")
    known, problems, count = drawn(sorted(formulas), work, package), [], 0
    if package:
        add_katex(site, package)
    for f, text in texts.items():
        where = f.relative_to(site).as_posix()
        up = posixpath.relpath("site_libs/katex/katex.min.css", posixpath.dirname(where) or ".")
        problems += [f"{where}: mathematics not read as such: {x}" for x in unread(text)]
        for kind, body in MATH.findall(text):
            tex = tex_of(body)
            if "error" in (d := known[tex, kind == "display"]):
                problems.append(f"{where}: formula {' '.join(tex.split())[:80]}: {d['error']}")
        text, n = draw_page(toc_formulas(text), known)
        if n and package:
            link = f'<link rel="stylesheet" href="{up}"></head>'
            text = text.replace("</head>", link, 1)
        count += n
        f.write_text(text, encoding="utf-8")
    for f in site.rglob("*.css"):
        text = f.read_text(encoding="utf-8")
        if "@import" in text:
            f.write_text(local_css(text), encoding="utf-8")
    (site / ".nojekyll").touch()
    return count, f"KaTeX {KATEX}" if package else "pandoc's MathML", problems
