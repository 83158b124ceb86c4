"The docs site: what a page must hold, that it stands alone, and (in a browser) that it works."

import base64
import functools
import html
import io
import json
import re
import shutil
import struct
import threading
import zlib
from http.server import ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urljoin

import pytest
import yaml

from diffkit import site as S
from diffkit.site import formulas, packages
from diffkit.site import project as project_room

pytest.importorskip("nbdev", reason="the docs site needs nbdev: pip install diffkit[docs]")
pytest.importorskip("smalldocs", reason="the docs site needs smalldocs: pip install diffkit[docs]")
ROOT = S.ROOT
pytestmark = pytest.mark.xdist_group("site")  # one worker builds the sites once


# ---------------------------------------------------------------- a small project with one of
# everything


def png(color) -> str:
    "A 40x20 picture of one colour."
    chunk = lambda k, d: struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d))
    rows = (b"\0" + bytes(color) * 40) * 20
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 40, 20, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    ).decode()


def md(src):
    return {"cell_type": "markdown", "metadata": {}, "source": src}


def code(src, *outputs):
    return {
        "cell_type": "code",
        "metadata": {},
        "execution_count": None,
        "source": src,
        "outputs": list(outputs),
    }


def shown(**data):
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {k.replace("__", "/"): v for k, v in data.items()},
    }


def notebook(*cells):
    return json.dumps(
        {
            "cells": list(cells),
            "metadata": {
                "kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )


def claim(says, holds, **more):
    c = {
        "says": says,
        "measured": "0.12 ± 0.01 against 0.30",
        "holds": holds,
        "verdict": holds,
        "paper": "Table 2: 3.1",
        "note": "",
        "scale": "quick",
    } | more
    return {
        "output_type": "display_data",
        "metadata": {},
        "data": {S.CLAIM: c, "text/html": "<p>as shown in Jupyter</p>", "text/plain": "claim"},
    }


PLAYER = f"""<div class="dk-player" id="p1">
<label>knob <input type="range" min="0" max="1" value="0"></label>
<img alt="a red square" src="data:image/png;base64,{png((200, 40, 40))}" style="display:block">
<img alt="a blue square" src="data:image/png;base64,{png((40, 40, 200))}" style="display:none">
<script>(function(){{
  var p = document.getElementById("p1"), g = p.querySelectorAll("img");
  p.querySelector("input").addEventListener("input", function (e) {{
    g.forEach(function (x, i) {{ x.style.display = i === +e.target.value ? "block" : "none"; }});
  }});
}})();</script></div>"""

INK = (51, 58, 66)  # of the text in plots


def figure(n, kind, color, width):
    return f"""<figure class="dk-figure {kind}" id="figure-{n}"><div class="dk-row"
style="display:flex;flex-wrap:wrap;justify-content:center">
<img src="data:image/png;base64,{png(color)}" alt="A field." width="{width}"
style="width:{width}px;max-width:100%;height:auto"></div>
<figcaption><b>Figure {n}.</b> What to see of $x_0$.</figcaption></figure>"""


FIGURES = (
    figure(1, "dk-plot", (255, 255, 255), 40),
    figure(2, "dk-plot", INK, 40),
    figure(3, "dk-photo", (255, 255, 255), 760),
)

EXPORT = """#| export
def time_like(process: Process,  # whose times, `Process.alpha` and all; $\\lambda$ too
              steps: int = 10,  # number of steps
              # the comment above its parameter
              rho: float = 7.,
              *, spacing: str = "uniform" if True else "é",  # "uniform" | "log_snr"
                                                   # goes on here
             ) -> list[float]:  # (steps + 1,) decreasing
    "Times of a walk. Source: eq. (7), $t_i = i/n$, like `Process`."
    return []


def one_line(a: int, b: int = 2) -> int:  # the sum
    "Add."
    return a + b


class Process(Base):
    "How data becomes noise."
    t_min: float = 1e-3  # smallest safe time
    def __init__(self,
                 beta: float = .1,  # rate
                ): self.beta = beta
    def alpha(self, t: float,  # time
             ) -> float:  # coefficient
        "Signal coefficient."
    def _hidden(self): "not shown"


def _private(): "not shown"
"""

SAMPLE = notebook(
    md(
        "# A sample\n\n> One of everything, with `code` and $x_0$ in its\n> description.\n\n:::"
        " {.callout-note}\n**Authors**: A. Author.\n\n**Cost**: one evaluation a step, $n+1$ in"
        " all.\n\n**Exports**: `time_like`.\n:::"
    ),
    code("#| default_exp core.sample"),
    code("#| hide\nSECRET_CELL = 1"),
    code("wide = '" + "x" * 91 + "'"),  # 100 characters
    code("#| export\nimport math"),
    md(
        "## Mathematics of $\\hat x_0$\n\nInline $\\mathcal N(0, I)$, $\\mathbb E[\\hat x_0 \\mid"
        " x_t]$ and $a_1 * b_2 * c_3$; a price of 5$ is no formula.\n\n$$\\begin{aligned} x_t &="
        " \\alpha x_0 + \\sigma\\varepsilon \\\\ \\lambda &= \\log\\frac{\\alpha}{\\sigma}"
        " \\end{aligned}$$\n\n$$\nA=\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix},\\qquad"
        " \\sqrt{\\textstyle\\sum_i x_i^2} < 1\n$$\n\n| name | value |\n|---|---|\n| `time_like` |"
        " $\\tfrac12$ |\n\n<details><summary>Answer</summary>\n\nIt is $\\pi^2/6$,"
        " **folded**.\n\n</details>\n\nSee [the paper](../solvers/201_paper.ipynb#the-idea), [a"
        " heading here](#mathematics-of-hat-x_0), `dk.time_like`, `core.sample.time_like`,"
        " `Process.alpha` and `unknown_name`.\n\n::: {.callout-tip}\n## A title\nWith"
        " $e^{i\\pi}=-1$.\n:::"
    ),
    code(EXPORT),
    code(
        "import os\nfrom fastcore.test import test_eq\nraise SystemExit('a docs build must not run"
        " this')"
    ),
    code(
        "print('out')",
        {"output_type": "stream", "name": "stdout", "text": ["stdout & <tag>\n"]},
        {"output_type": "stream", "name": "stderr", "text": ["a progress bar\n"]},
        shown(image__png=png((40, 120, 40)), text__plain="<Figure size 640x480>"),
        {
            "output_type": "display_data",
            "metadata": {},
            "data": {
                "application/vnd.jupyter.widget-view+json": {"model_id": "x"},
                "text/plain": "interactive(children=())",
            },
        },
    ),
    code("#| code-fold: true\nplayer(frames)", shown(text__html=PLAYER, text__plain="Player")),
    code("show_doc(Process.alpha)"),
    md(
        "Numbers: notebook 201, notebooks 201 and 205, notebooks 000 to 201; a method (201), (999),"
        " 201 pixels, see 201. As 201 paper says, papers 201 or 205; (201 to 205), 1,201, 0.201."
    ),
    code(
        '#| code-fold: true\n#| code-summary: "A sentence that says what is folded"\nsay(...)',
        shown(
            text__markdown="The mean is **0.12**, not $\\mu$, said of `time_like`; shown although"
            " folded.",
            text__plain="The mean",
        ),
        *(shown(text__html=f, text__plain="Figure.") for f in FIGURES),
    ),
)

PAPER = notebook(
    md("# A paper\n\n> Its idea in a line."),
    code("#| default_exp solvers.paper"),
    md("## Paper\n\nA heading with the name of a function. See `paper`."),
    md("## The idea\n\nBack to [the sample](../core/000_sample.ipynb) and `Process`."),
    code("#| export\ndef paper(): 'The method.'"),
    code("#| export\ndef _short():\n    return 1"),
    code("#| export\ndef _long():\n" + "    pass\n" * project_room.LONG),
    code(
        "frame",
        shown(
            text__html=(
                "<table class='dataframe'><tr><td>$\\sigma^2$ costs $5 and"
                " $6</td><td><code>$x$</code></td></tr></table>"
            )
        ),
    ),
    code(
        "claim(...)",
        claim("It is *faster* for $\\sigma < 1$ & `time_like`", "yes"),
        claim("It is better", "no", note="The gap is 0."),
        claim("It is <b>stable</b>", "open", verdict="yes"),
        claim("It works on video", "untried", measured="", note="no video model"),
        claim("It is like notebook 000", "yes", paper="000, 201: alike"),
    ),
)

INDEX = notebook(
    md("# Sample project\n\n> What it is."),
    md("A link to [the paper](solvers/201_paper.ipynb), $x_t = \\alpha x_0$. First 000, then 201."),
)


def record(number, slug, chapter, title):
    facts = dict(number=number, slug=slug, chapter=chapter, title=title, short=slug, year=2025)
    facts |= dict(authors=["Ada Author", "Bo Writer"], venue="ICLR 2025", arxiv="2401.00001")
    return facts | dict(doi="", url="", code="", code_note="", keywords=["a synonym"])


BESIDE = {  # what a project has beside its notebooks
    "settings.ini": "[DEFAULT]\nuser = someone\ngit_url = https://github.com/%(user)s/project\n"
    "branch = main\ndoc_baseurl = /project\n",
    "tests/core/test_sample.py": "",
    "records/replication/201_paper.json": json.dumps(
        {
            "notebook": "201_paper",
            "sets": {
                "1": {"code": "old", "verdicts": {"It is better": ["no", "0"]}},
                "2": {"code": "old", "verdicts": {"It is better": ["open", "0"]}},
            },
        }
    ),
    "records/full/201_paper.json": json.dumps(
        {
            "notebook": "201_paper",
            "code": "old",
            "device": "a card",
            "date": "2026-01-02",
            "verdicts": {"It is better": ["yes", "0.2 against 0.3"]},
        }
    ),
    "diffkit/data/papers.json": json.dumps(
        [
            record("201", "paper", "solvers", "The Full Title of a Paper"),
            record("901", "later", "audio", "A Paper Without a Notebook"),
        ]
    ),
}


def project(folder: Path, **files) -> Path:
    "A project with the sample's notebooks; `files` adds or replaces some (None: without)."
    shutil.copy(ROOT / "_quarto.yml", folder.mkdir(parents=True, exist_ok=True) or folder)
    every = {
        "index.ipynb": INDEX,
        "core/000_sample.ipynb": SAMPLE,
        "solvers/201_paper.ipynb": PAPER,
    } | {k.replace("__", "/") + ".ipynb": v for k, v in files.items()}
    for name, text in every.items():
        if text is None:
            continue
        (folder / "nbs" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "nbs" / name).write_text(text, encoding="utf-8")
    for name, text in BESIDE.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    root = project(tmp_path_factory.mktemp("sample"))
    return S.build("_site", root=root, engine="smalldocs")


@pytest.fixture(scope="session")
def repo(tmp_path_factory):
    if not any((ROOT / "nbs").rglob("*.ipynb")):
        pytest.skip("this checkout has no notebooks")
    tmp = tmp_path_factory.mktemp("repo")
    return S.build(tmp / "site", work=tmp / "proc", engine="smalldocs")


@pytest.fixture(params=["sample", "repo"])
def built(request):
    return (
        request.getfixturevalue(request.param),
        (request.getfixturevalue("sample").parent if request.param == "sample" else ROOT) / "nbs",
    )


def text(page: str) -> str:
    "What a reader sees of a page's content: formulas as the TeX they carry."
    main = re.search(r"<main\b.*?</main>", page, re.S).group(0)
    main = re.sub(r"<(script|style)\b.*?</\1>", "", main, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", main)).split())


def read(site: Path, name: str) -> str:
    return (site / name).read_text(encoding="utf-8")


# ---------------------------------------------------------------- the configuration


def test_config_lists_every_chapter():
    cfg = S.read_config(ROOT)
    globs = [c["contents"] for c in cfg["website"]["sidebar"]["contents"] if "section" in c]
    assert all(g.endswith("/*.ipynb") for g in globs), (
        "a chapter's notebooks come from a glob, so that a new one appears by being there"
    )
    assert "cdn" not in (ROOT / "_quarto.yml").read_text().lower()
    folders = {f.parent.name for f in (ROOT / "nbs").glob("*/*.ipynb")}
    assert folders <= {g.split("/")[0] for g in globs}, (
        "a chapter's folder has no section in _quarto.yml"
    )


def test_new_notebooks_appear_in_order_of_number(tmp_path):
    nb = lambda t: notebook(md(f"# {t}"))
    root = project(
        tmp_path,
        solvers__202_b=nb("B"),
        solvers__200_intro=nb("Introduction"),
        solvers__299_compare=nb("Compare"),
        other__901_x=nb("X"),
    )
    pages, _ = S.prepare(root, tmp_path / "proc")
    side = yaml.safe_load((tmp_path / "proc/_quarto.yml").read_text())["website"]["sidebar"][
        "contents"
    ]
    sections = {c["section"]: [x["href"] for x in c["contents"]] for c in side if "section" in c}
    assert sections == {
        "0 · Core": ["core/sample.ipynb"],
        "2 · Solvers": [f"solvers/{x}.ipynb" for x in ("intro", "paper", "b", "compare")],
        "Other": ["other/x.ipynb"],
    }
    assert [p.src for p in pages][0] == "index.ipynb"
    assert [p.stem for p in pages if p.is_paper] == ["solvers/paper", "solvers/b", "other/x"]


# ---------------------------------------------------------------- pages


def test_stands_alone_and_has_no_broken_links(built):
    site, _ = built
    n, problems = S.check(site)
    assert n > 50 and not problems
    for f in [*site.rglob("*.html"), *site.rglob("*.css")]:
        # links may lead away, nothing may be loaded from there
        t = re.sub(r"<a\s[^>]*>", "", f.read_text(encoding="utf-8"))
        away = r"""["']?(?:https?:)?//"""
        loads = rf"(?:src|data-src|srcset)={away}|url\(\s*{away}|@import\s+{away}|cdn\.|googleapis"
        assert not re.search(loads, t), f


def test_every_page_has_title_description_and_formulas(built):
    site, nbs = built
    for p in S.read_pages(nbs):
        page = read(site, p.stem + ".html")
        title = re.search(r'<h1 class="title">(.*?)</h1>', page, re.S)
        plain = lambda s: re.sub(r"[`$*\s]|<[^>]*>", "", html.unescape(s))
        assert title and ("math" in title.group(1) or plain(title.group(1)) == plain(p.title)), (
            p.src
        )
        source = "\n\n".join(
            S.text_of(c["source"]) for c in p.nb["cells"] if c["cell_type"] == "markdown"
        )
        source = re.sub(r"^(```|~~~).*?^\1|`[^`\n]*`", "", source, flags=re.S | re.M)
        wanted = len(re.findall(r"\$\$.+?\$\$", source, re.S))
        drawn = re.findall(
            r'<span class="math (inline|display)">(?:<span class="katex|<math)', page
        )
        assert drawn.count("display") >= wanted, (
            f"{p.src}: {wanted} displayed formulas, {drawn.count('display')} drawn"
        )
        if re.search(r"\$[^\s$][^$]*\$", source):
            assert drawn, p.src
        assert "dk-badmath" not in page and "\\(" not in text(page), p.src


def test_front_matter_callout_and_links(sample):
    page = read(sample, "core/sample.html")
    assert "One of everything, with <code>code</code> and <span" in page
    assert page.count("callout-note") and "callout-tip" in page and "A. Author." in page, (
        "what follows the description in the first cell must stay"
    )
    assert 'href="../solvers/paper.html#the-idea"' in page and ".ipynb" not in re.sub(
        r'<(pre|script)\b.*?</\1>|<p class="dk-links">.*?</p>', "", page, flags=re.S
    )
    assert re.search(
        r'<a href="#time_like"[^>]*><code>dk.time_like</code></a>', page
    ) and re.search(r'<a href="#Process.alpha"[^>]*><code>Process.alpha</code>', page)
    assert "<code>unknown_name</code>" in page
    assert re.search(
        r'<a href="../core/sample.html#Process"[^>]*><code>Process</code>',
        read(sample, "solvers/paper.html"),
    )
    assert re.search(
        r"<details>\s*<summary>Answer</summary>.*?class=\"math"
        r" inline\".*?<strong>folded</strong>.*?</details>",
        page,
        re.S,
    )
    assert "price of 5$ is no formula" in text(page)
    toc = re.search(r'<nav id="TOC".*?</nav>', page, re.S).group(0)
    assert 'class="math inline"' in toc and "time_like" in toc


def test_hidden_cells_and_dead_outputs_are_gone(sample):
    page = read(sample, "core/sample.html")
    for gone in (
        "SECRET_CELL",
        "default_exp",
        "#| ",
        "a progress bar",
        "interactive(children",
        "Figure size",
        "show_doc(",
    ):
        assert gone not in page, gone
    assert (
        "stdout &amp; &lt;tag&gt;" in page
        and 'type="range"' in page
        and page.count("data:image/png") == 6
    )


def test_api_entry_comes_from_signature_and_comments(sample):
    page = read(sample, "core/sample.html")
    rows = lambda name: [
        [
            " ".join(html.unescape(re.sub(r"<[^>]*>", " ", c)).split())
            for c in re.findall(r"<td>(.*?)</td>", r, re.S)
        ]
        for r in re.findall(
            r"<tr.*?</tr>",
            re.search(rf'id="{name}".*?<table class="dk-params">(.*?)</table>', page, re.S).group(
                1
            ),
            re.S,
        )
    ][1:]
    got = rows("time_like")
    assert [r[:3] for r in got] == [
        ["process", "Process", ""],
        ["steps", "int", "10"],
        ["rho", "float", "7."],
        ["spacing", "str", '"uniform" if True else "é"'],
        ["returns", "list[float]", ""],
    ]
    assert [r[3] for r in got[1:]] == [
        "number of steps",
        "the comment above its parameter",
        '"uniform" | "log_snr" goes on here',
        "(steps + 1,) decreasing",
    ]
    assert "Process.alpha" in got[0][3] and rows("one_line") == [
        ["a", "int", "", ""],
        ["b", "int", "2", ""],
        ["returns", "int", "", "the sum"],
    ]
    assert rows("Process") == [["beta", "float", ".1", "rate"]]
    methods = text(
        "<main>" + re.search(r'<dl class="dk-methods">.*?</dl>', page, re.S).group(0) + "</main>"
    )
    assert (
        methods
        == "t_min smallest safe time alpha(t) Signal coefficient. t time returns coefficient"
    )
    assert "_private" not in re.sub(
        r"<details class=\"code-fold\">.*?</details>", "", page, flags=re.S
    )
    assert re.search(
        r'<details class="code-fold">\s*<summary>Source of time_like, one_line,'
        r" Process</summary>.*?_private",
        page,
        re.S,
    ), "the source is there, folded"
    assert "import math" not in text(page)


def test_long_helpers_are_folded_and_short_ones_stand_open(sample):
    page = read(sample, "solvers/paper.html")
    fold = r'<details( open="")? class="code-fold">\s*<summary>Helpers: %s</summary>'
    assert re.search(fold % "_long", page)[1] is None
    assert re.search(fold % "_short", page)[1]


def test_names_shared_with_headings_and_formulas_in_outputs(sample):
    page = read(sample, "solvers/paper.html")
    assert re.search(r'<h3[^>]*data-anchor-id="api-paper"', page) and re.search(
        r'<a href="#api-paper"[^>]*><code>paper</code>', page
    )
    assert (
        "<code>$x$</code>" in page
        and "costs $5 and $6" in page
        and re.search(r"<td><span class=\"math inline\"><(span class=.katex|math)", page)
    )


def test_navigation(sample):
    page = read(sample, "core/sample.html")
    side = re.search(r'<nav id="quarto-sidebar".*?</nav>', page, re.S).group(0)
    assert re.findall(r'menu-text">([^<]*)<', side) == [
        "Start here",
        "All notebooks",
        "Scorecard",
        "All names",
        "0 · Core",
        "000 A sample",
        "2 · Solvers",
        "201 A paper",
    ]
    assert re.search(r'nav-page-previous"><a href="../api.html"', page) and re.search(
        r'nav-page-next"><a href="../solvers/paper.html"', page
    )
    found = [e for e in json.loads(read(sample, "search.json")) if e["section"] == "time_like"]
    assert found and found[0]["href"] == "core/sample.html#time_like"


def test_scorecard(sample):
    page = read(sample, "scorecard.html")
    assert re.findall(r'<tr data-verdict="(\w+)">', page) == ["yes", "no", "yes", "untried", "yes"]
    assert 'href="solvers/paper.html#claim-1"' in page and 'id="claim-3"' in read(
        sample, "solvers/paper.html"
    )
    seen = text(page)
    assert (
        "expected open" in seen
        and "&lt;b&gt;stable" in page
        and "<em>faster</em>" in page
        and "The gap is 0." in seen
        and "Table 2: 3.1" in seen
    )
    totals = "papers, claims, yes, no, open, not tried"
    assert "2 · Solvers 1 4 3 1 0 1" in seen and "All 1 4 3 1 0 1" in seen, totals
    assert re.search(r'<details class="dk-paper"><summary>.*?3 hold, 1 do not, 1 not tried', page)
    assert "Why: no video model" in seen
    notebook_page = read(sample, "solvers/paper.html")
    assert "as shown in Jupyter" not in notebook_page and notebook_page.count("dk-claim ") == 5


def test_other_seeds_and_full_size(sample):
    card = text(read(sample, "scorecard.html"))
    page = text(read(sample, "solvers/paper.html"))
    said = "yes, unlike the quick run: 0.2 against 0.3 (a card, 2026-01-02, older code)"
    assert "1 of 2 (older code)" in card and said in card
    assert "the same verdict on 1 of 2 (older code) sets that nobody chose" in page and said in page
    assert "2 · Solvers 1 4 3 1 0 1 0 of 1" in card  # of the firm verdicts none on all sets


def test_overview(sample):
    page = read(sample, "overview.html")
    row = lambda what: next(r for r in re.findall(r"<tr>.*?</tr>", page, re.S) if what in r)
    core = row("A sample")
    for part in ("diffkit.core.sample", "one evaluation a step", "One of everything"):
        assert part in core, part
    assert 'class="math inline"' in core and 'href="core/sample.html"' in core
    paper = row("The Full Title of a Paper")
    for part in ("Ada Author, Bo Writer", "ICLR 2025", "https://arxiv.org/abs/2401.00001"):
        assert part in paper, part
    assert 'href="solvers/paper.html"' in paper and "4 claims</a>, 3 hold" in paper
    assert "to come" in row("A Paper Without a Notebook") and "9 · Audio" in text(page)


def test_every_page_has_its_ways_out(sample):
    page = read(sample, "core/sample.html")
    links = re.search(r'<p class="dk-links">.*?</p>', page).group(0)
    host = "https://github.com/someone/project/blob/main"
    assert 'href="../notebooks/core/000_sample.ipynb"' in links
    assert (sample / "notebooks/core/000_sample.ipynb").read_text() == SAMPLE
    assert "colab.research.google.com/github/someone/project/blob/main/nbs/core/000_" in links
    assert f'href="{host}/diffkit/core/sample.py"' in links
    assert f'href="{host}/tests/core/test_sample.py"' in links
    assert 'href="../overview.html#core"' in links


def test_numbers_of_notebooks_are_links(sample):
    page = read(sample, "core/sample.html")
    link = '<a href="../solvers/paper.html">201</a>'
    for before in ("notebook ", "notebooks ", "to ", "(", "see ", "As ", "papers "):
        assert before + link in page, before
    assert "(999)" in page and f"({link} to 205)" in page
    for kept in ("201 pixels", "1,201", "0.201"):
        assert kept in text(page) and kept in page, kept
    front = read(sample, "index.html")
    assert ">000</a>, then <a" in front and ">201</a>." in front
    card = re.search(r'id="claim-5".*?</div>', read(sample, "solvers/paper.html"), re.S).group(0)
    assert card.count('<a href="../core/sample.html">000</a>') == 2 and "</a>, 201: alike" in card


def test_sentences_and_figures_of_outputs(sample):
    page = read(sample, "core/sample.html")
    assert re.search(r"The mean is <strong>0.12</strong>.*?class=\"math inline\"", page, re.S)
    assert re.search(r'said of <a href="#time_like"[^>]*><code>time_like</code>', page)
    figure = re.search(r'<figure class="dk-figure.*?</figure>', page, re.S).group(0)
    assert "Figure 1." in figure and "math inline" in figure and 'alt="A field."' in figure
    fold = re.search(r"<details class=\"code-fold\">\s*<summary>A sentence that says", page)
    assert fold and "shown although folded" in text(page)


def test_index_of_names_and_the_page_for_lost_readers(sample):
    page = read(sample, "api.html")
    for name in ("time_like", "one_line", "Process"):
        assert f'href="core/sample.html#{name}"' in page
    assert "Times of a walk" in text(page) and "_private" not in page
    lost = read(sample, "404.html")
    assert "/project/" in lost.split("</head>")[0] and "<base href" in lost
    assert 'href="index.html"' in lost


# ---------------------------------------------------------------- the build


def test_unchanged_notebooks_are_not_prepared_again(tmp_path, monkeypatch):
    root, work = project(tmp_path), tmp_path / "proc"
    done = []
    one = project_room.prepare_one
    monkeypatch.setattr(project_room, "prepare_one", lambda p, i: done.append(p.stem) or one(p, i))
    S.prepare(root, work)
    assert sorted(done) == ["core/sample", "index", "solvers/paper"]
    done.clear()
    S.prepare(root, work)
    assert not done
    (root / "nbs/solvers/201_paper.ipynb").write_text(
        PAPER.replace("Its idea in a line.", "Another idea.")
    )
    S.prepare(root, work)
    assert done == ["index", "solvers/paper"] or done == ["solvers/paper"]
    assert "core/sample" not in done
    done.clear()
    # a name that the paper's page links to goes
    (root / "nbs/core/000_sample.ipynb").write_text(
        SAMPLE.replace("class Process(Base)", "class Method(Base)")
    )
    S.prepare(root, work)
    assert set(done) >= {"core/sample", "solvers/paper"}
    (root / "nbs/solvers/201_paper.ipynb").unlink()
    S.prepare(root, work)
    assert not (work / "solvers/paper.ipynb").exists()


@pytest.mark.parametrize(
    "cells, cause",
    [
        ([md("# T\n\n[x](../core/001_gone.ipynb)")], "gone"),
        ([md("# T\n\n[x](#no-such-heading)")], "no anchor for #no-such-heading"),
        ([md("# T\n\n$\\frac{1}{$")], r"formula \frac{1}{"),
        ([md("# T\n\nlost \\frac{1}{2}")], "mathematics not read as such"),
        (
            [
                md("# T"),
                code(
                    "x",
                    shown(
                        text__html=(
                            '<script src="https://example.org/x.js"></script><img'
                            ' src="https://example.org/x.png">'
                        )
                    ),
                ),
            ],
            "loads https://example.org/x.js",
        ),
        ([md("# T"), code("#| export\ndef f(:")], "an exported cell is not Python"),
    ],
)
def test_fails_with_the_cause(tmp_path, cells, cause):
    root = project(tmp_path, solvers__203_bad=notebook(*cells))
    with pytest.raises(S.SiteError, match=re.escape(cause)):
        S.build("_site", root=root, engine="smalldocs")


def test_refuses_bad_input(tmp_path, capsys):
    root = project(tmp_path)
    with pytest.raises(ValueError, match="engine must be one of .* got 'word'"):
        S.build(root=root, engine="word")
    with pytest.raises(ValueError, match="math must be one of .* got 'word'"):
        S.build(root=root, math="word")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file.txt").write_text("keep")
    with pytest.raises(S.SiteError, match="not a built site"):
        S.build("mine", root=root)
    assert (tmp_path / "mine/file.txt").read_text() == "keep"
    (tmp_path / "nbs/core/002_broken.ipynb").write_text("{")
    with pytest.raises(S.SiteError, match="002_broken.ipynb: not a notebook"):
        S.build(root=root)
    (tmp_path / "nbs/core/002_broken.ipynb").rename(tmp_path / "nbs/core/002_sample.ipynb")
    (tmp_path / "nbs/core/002_sample.ipynb").write_text(SAMPLE)
    with pytest.raises(S.SiteError, match="would both be core/sample.html"):
        S.build(root=root)
    assert S.main(["--dest", str(tmp_path / "mine")]) == 1
    assert (
        capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
        and (tmp_path / "mine/file.txt").exists()
    )


def test_mathml_without_node(tmp_path):
    pytest.importorskip("pypandoc", reason="no pandoc: pip install pypandoc-binary")
    site = S.build("_site", root=project(tmp_path), engine="smalldocs", math="pandoc")
    page = read(site, "core/sample.html")
    assert (
        page.count("<math") >= 10
        and "<mtable" in page
        and 'class="katex' not in page
        and not (site / "site_libs/katex").exists()
    )


def test_a_machine_without_npm(tmp_path, monkeypatch):  # nor what npm fetched before
    pytest.importorskip("pypandoc", reason="no pandoc: pip install pypandoc-binary")
    monkeypatch.setattr(packages, "cache_dir", lambda: tmp_path / "nothing")
    monkeypatch.setenv("PATH", str(tmp_path))
    site = S.build("_site", root=project(tmp_path / "here"), engine="smalldocs")
    assert "<math" in read(site, "core/sample.html") and not (site / "site_libs/katex").exists()
    assert S.check(site)[1] == []


def test_every_formula_of_the_course_can_be_drawn_without_node(repo):
    pytest.importorskip("pypandoc", reason="no pandoc: pip install pypandoc-binary")
    note = re.compile(r'<annotation encoding="application/x-tex">(.*?)</annotation>', re.S)
    found = {html.unescape(t) for f in repo.rglob("*.html") for t in note.findall(f.read_text())}
    jobs = [(t, True) for t in sorted(found)]
    assert len(jobs) > 1000
    assert [t for (t, _), d in zip(jobs, formulas.draw_pandoc(jobs)) if "error" in d] == []


def test_everything_is_found_below_a_base_path(built):
    """As it is published: the top is `/diffkit/`, and nothing of the site lies above it."""
    site, top = built[0], "http://host/diffkit/"
    link = re.compile(r'\b(?:href|src)="([^"#]+)')
    for f in site.rglob("*.html"):
        if f.name == "404.html":  # it is shown anywhere, and says so by its <base>
            continue
        page = re.sub(r"<(script|code|pre)\b[^>]*>.*?</\1>", "", f.read_text(), flags=re.S)
        for to in link.findall(page):
            url = urljoin(top + f.relative_to(site).as_posix(), html.unescape(to))
            if url.startswith("http://host/"):
                below = unquote(url[len(top) :].partition("?")[0])
                assert url.startswith(top), f"{f}: {to}"
                assert (site / below / ("index.html" if below[-1:] in ("", "/") else "")).exists()


def test_katex_is_local(sample):
    if S.find_katex() is None:
        pytest.skip("KaTeX is not to be had: it needs node, and npm to fetch it once")
    css = read(sample, "site_libs/katex/katex.min.css")
    fonts = set(re.findall(r"url\((?:\.?/?)(fonts/[^)]+)\)", css))
    assert fonts and all((sample / "site_libs/katex" / f).is_file() for f in fonts)
    assert 'href="../site_libs/katex/katex.min.css"' in read(sample, "core/sample.html")


@pytest.mark.slow
def test_quarto_makes_the_same_pages(tmp_path, sample):
    if not shutil.which("quarto"):
        pytest.skip("Quarto is not installed")
    site = S.build("_site", root=project(tmp_path), engine="quarto")
    pages = lambda s: {
        f.relative_to(s).as_posix() for f in s.rglob("*.html") if "site_libs" not in f.parts
    }
    assert pages(site) == pages(sample)


# ---------------------------------------------------------------- in a browser


@pytest.fixture(scope="session")
def chromium():
    sync = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install diffkit[dev]"
    )
    exe = next(
        (
            p
            for p in (
                "/usr/bin/chromium",
                "/usr/bin/chromium-browser",
                shutil.which("chromium"),
                shutil.which("google-chrome"),
            )
            if p and Path(p).exists()
        ),
        None,
    )
    if exe is None:
        pytest.skip("no Chromium found (Debian: apt-get install chromium)")
    args = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        " --disable-background-networking --disable-component-update --disable-sync".split()
    )
    with sync.sync_playwright() as p:
        b = p.chromium.launch(executable_path=exe, args=args)
        yield b
        b.close()


class Quiet(S.Handler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *a):
        pass

    def end_headers(self):
        self.send_header("Cache-Control", "max-age=600")
        super().end_headers()


@pytest.fixture
def serve():
    "Folder -> its address on 127.0.0.1."
    servers = []

    def start(folder: Path) -> str:
        handler = functools.partial(Quiet, directory=str(folder))
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def served(built, serve):
    return serve(built[0]), *built


@pytest.fixture
def tab(chromium, served):
    """A page whose console errors, failed requests and requests to elsewhere are kept in
    `tab.wrong`."""
    context = chromium.new_context(viewport={"width": 1400, "height": 900}, color_scheme="light")
    page = context.new_page()
    page.wrong = []
    page.on(
        "console",
        lambda m: (
            page.wrong.append(f"{page.url}: {m.text}") if m.type in ("error", "warning") else None
        ),
    )
    page.on("pageerror", lambda e: page.wrong.append(f"{page.url}: {e}"))
    page.on(
        "request",
        lambda r: (
            page.wrong.append(f"{page.url}: loads {r.url}")
            if not r.url.startswith((served[0], "data:", "blob:"))
            else None
        ),
    )
    page.on(
        "response",
        lambda r: (
            page.wrong.append(f"{page.url}: {r.status} for {r.url}") if r.status >= 400 else None
        ),
    )
    yield page
    context.close()


LUMINANCE = """
  const rgb = (c) => c.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255);
  const lum = (c) => rgb(c).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
  const contrast = (a, b) => (Math.max(lum(a), lum(b)) + .05) / (Math.min(lum(a), lum(b)) + .05);
"""
CAPTIONS = f"""() => {{ {LUMINANCE}
  const page = getComputedStyle(document.body).backgroundColor;
  const captions = [...document.querySelectorAll('.dk-figure figcaption')];
  return Math.min(...captions.map((e) => contrast(getComputedStyle(e).color, page)), 21);
}}"""
SEEN = """() => {
  const all = (what) => [...document.querySelectorAll(what)];
  const drawn = (e) => e.querySelector('.katex, math')
    && (e.getBoundingClientRect().height || !e.offsetParent);
  const told = (e) => e && /^Figure \\d+\\./.test(e.querySelector('figcaption').textContent);
  const figures = all('main .dk-figure').map((e) => e.id);
  return {
    title: document.title, h1: !!document.querySelector('h1'),
    math: all('main .katex, main math').length,
    raw: all('main .math').filter((e) => !drawn(e)).length,
    broken: [...document.images].filter((i) => i.complete && !i.naturalWidth).length,
    mute: all('main img').filter((i) => !i.alt.trim()).length,
    unnumbered: all('main .cell img').filter((i) => !told(i.closest('.dk-figure'))).length,
    twice: figures.length - new Set(figures).size,
    fonts: [...document.fonts].filter((f) => f.status === 'error').length,
  };
}"""
SCROLLS = """[...document.querySelectorAll('main div.sourceCode pre')]
  .filter((e) => !e.closest('details') && e.scrollWidth > e.clientWidth + 1)
  .map((e) => e.textContent.split('\\n').reduce((a, b) => a.length > b.length ? a : b))"""
COVERED = """[...document.querySelectorAll('main .katex-tag')].filter((e) => e.offsetParent
  && Math.max(...[...e.parentElement.querySelectorAll(':scope > .katex-base')]
    .map((b) => b.getBoundingClientRect().right)) > e.getBoundingClientRect().left + 1)
  .map((e) => e.textContent)"""
WIDER = "document.documentElement.scrollWidth - innerWidth"
TOGGLE = "document.querySelector('.quarto-color-scheme-toggle').click()"
FORMULA = re.compile(r"\$[^\s$][^$]*\$")


def has_formulas(page) -> bool:
    texts = [S.text_of(c["source"]) for c in page.nb["cells"] if c["cell_type"] == "markdown"]
    return any(FORMULA.search(re.sub(r"`[^`]*`", "", t)) for t in texts)


@pytest.mark.browser
def test_every_page_in_a_browser(served, tab):
    base, site, nbs = served
    sources = {p.stem + ".html": p for p in S.read_pages(nbs)}
    widths = [400, 1400]
    for f in sorted(site.rglob("*.html")):
        name = f.relative_to(site).as_posix()
        if name == "404.html":
            continue  # its links start at the address where the site is published
        source = sources.get(name)
        widths.reverse()  # pages are loaded at one width and brought to the other
        tab.set_viewport_size({"width": widths[0], "height": 900})
        tab.goto(base + name, wait_until="load")
        seen = tab.evaluate(SEEN)
        assert seen["title"] and seen["h1"] and not seen["twice"], (name, seen)
        assert not seen["raw"] and not seen["broken"] and not seen["fonts"], (name, seen)
        if name != "core/sample.html":  # the sample has a picture of the plain kind
            assert not seen["mute"] and not seen["unnumbered"], (name, seen)
        if source and has_formulas(source):
            assert seen["math"], name
        tab.set_viewport_size({"width": 1000, "height": 900})  # the narrowest column of text
        assert tab.evaluate(COVERED) == [], f"{name}: formulas run into these numbers"
        for width in widths:
            tab.set_viewport_size({"width": width, "height": 900})
            assert tab.evaluate(COVERED) == [], f"{name}: formulas run into these numbers"
            if width == 1400:
                assert tab.evaluate(SCROLLS) == [], f"{name}: these lines do not fit"
            for theme in ("light", "dark"):
                where = f"{name} at {width} pixels, {theme}"
                assert tab.evaluate(WIDER) <= 0, f"{where}: the page scrolls sideways"
                assert tab.evaluate(CAPTIONS) >= 4.5, f"{where}: a pale caption"
                tab.evaluate(TOGGLE)
    assert not tab.wrong


@pytest.mark.browser
def test_figures_in_the_dark_and_on_a_phone(sample, chromium, serve):
    image = pytest.importorskip("PIL.Image")
    tab = chromium.new_page(viewport={"width": 400, "height": 800}, color_scheme="light")
    tab.goto(serve(sample) + "core/sample.html")

    def color(n):  # of the middle of a figure, as drawn
        shot = tab.locator(f"#figure-{n} img").screenshot()
        whole = image.open(io.BytesIO(shot)).convert("RGB")
        return whole.getpixel((whole.width // 2, whole.height // 2))

    assert [color(n) for n in (1, 2, 3)] == [(255,) * 3, INK, (255,) * 3]
    tab.evaluate(TOGGLE)
    ground, ink, photo = map(color, (1, 2, 3))
    page = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    near = [abs(a - int(b)) <= 2 for a, b in zip(ground, re.findall(r"\d+", page))]
    assert all(near), f"a plot's ground {ground} is not the page's {page}"
    seen = tab.evaluate(f"() => {{ {LUMINANCE} return contrast('rgb{ink}', '{page}'); }}")
    assert seen >= 4.5 and photo == (255,) * 3, (seen, photo)
    wide = tab.evaluate(
        "(() => { const f = document.querySelector('#figure-3'), i = f.querySelector('img');"
        " const left = i.getBoundingClientRect().left - f.getBoundingClientRect().left;"
        " return [i.offsetWidth, f.scrollWidth > f.clientWidth, left]; })()"
    )
    assert wide[0] >= 440 and wide[1] and wide[2] >= 0, "a wide picture scrolls in its figure"
    assert tab.evaluate(WIDER) <= 0
    tab.close()


@pytest.mark.browser
@pytest.mark.parametrize("below", ["project/", ""])
def test_the_page_for_lost_readers_works_anywhere(sample, chromium, serve, tmp_path, below):
    root = sample
    if below:  # as it is published: the site in a folder, its 404 for all addresses
        root = tmp_path
        shutil.copytree(sample, tmp_path / "project")
        shutil.copy(sample / "404.html", tmp_path)
    tab = chromium.new_page()
    answer = tab.goto(f"{serve(root)}{below}some/where.html")
    assert answer.status == 404 and "No such page" in tab.inner_text("h1")
    look = "getComputedStyle(document.body).getPropertyValue('--dk-bg').trim()"
    assert tab.evaluate(look), "it has its styles"
    tab.fill("#quarto-search input", "time_like")
    tab.click("#quarto-search .search-result")
    tab.wait_for_url(f"**/{below}core/sample.html#time_like")
    tab.close()


@pytest.mark.browser
def test_dark_mode(served, tab):
    tab.goto(served[0] + "index.html")
    light = lambda: tab.evaluate(
        "(() => { const [r, g, b] ="
        " getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number); return r + g"
        " + b > 380; })()"
    )
    assert light()
    tab.click(".quarto-color-scheme-toggle")
    tab.wait_for_function("document.documentElement.classList.contains('quarto-dark')")
    assert not light()
    tab.goto(served[0] + "scorecard.html")
    assert not light(), "the choice stays on the next page"
    tab.click(".quarto-color-scheme-toggle")
    tab.wait_for_function("!document.documentElement.classList.contains('quarto-dark')")
    assert light() and not tab.wrong


@pytest.mark.browser
def test_player_slider_changes_the_frame(served, tab):
    base, site, _ = served
    names = [
        f.relative_to(site).as_posix()
        for f in sorted(site.rglob("*.html"))
        if 'type="range"' in f.read_text(encoding="utf-8")
    ]
    if not names:
        pytest.skip("no notebook has a player yet")
    for name in names:
        tab.goto(base + name)
        for slider in tab.query_selector_all("main input[type=range]"):
            box = slider.evaluate_handle("e => e.closest('.cell-output-display')")
            frame = lambda b=box: b.evaluate(
                "e => [...e.querySelectorAll('img, svg, canvas, .dk-frame')].map((x) =>"
                " getComputedStyle(x).display + (x.src || '').slice(-200)).join()"
            )
            before = frame()
            slider.evaluate(
                "e => { e.value = +e.value === +e.max ? e.min : e.max; e.dispatchEvent(new"
                " Event('input', {bubbles: true})); }"
            )
            assert frame() != before, f"{name}: a slider changes nothing"
    assert not tab.wrong


@pytest.mark.browser
def test_search_finds_a_function(served, tab):
    base, site, _ = served
    names = {e["section"]: e["href"] for e in json.loads(read(site, "search.json"))}
    want = next((n for n in ("time_grid", "time_like") if n in names), None)
    if want is None:
        pytest.skip("no such function yet")
    tab.goto(base + "overview.html")
    tab.fill("#quarto-search input", want)
    first = tab.wait_for_selector("#quarto-search .search-result")
    assert want in first.inner_text()
    first.click()
    tab.wait_for_url("**/" + names[want])
    assert (
        tab.evaluate("document.getElementById(location.hash.slice(1)).getBoundingClientRect().top")
        < 900
    )
    tab.fill("#quarto-search input", "zzzz nothing zzzz")
    tab.wait_for_selector("#quarto-search .search-none")
    assert not tab.wrong


@pytest.mark.browser
@pytest.mark.parametrize("packed", [True, False])
def test_search_with_and_without_minisearch(tmp_path, monkeypatch, chromium, serve, packed):
    if not packed:
        monkeypatch.setattr("diffkit.site.search.npm_package", lambda *a: None)
    site = S.build("_site", root=project(tmp_path), engine="smalldocs")
    script = read(site, "site_libs/search.js")
    if packed and "MiniSearch 7" not in script:
        pytest.skip("MiniSearch is not to be had: it needs npm to fetch it once")
    assert ("Permission is hereby granted" in script) == packed, "with its licence"
    tab = chromium.new_page()
    tab.goto(serve(site) + "overview.html")
    wanted = [("time_like", "core/sample.html#time_like"), ("a synonym", "solvers/paper.html")]
    wanted += [(q, "solvers/paper.html") for q in ("Writer", "2401.00001", "full title of")]
    for query, page in wanted + [("Autohr", "solvers/paper.html")] * packed:
        tab.fill("#quarto-search input", "")
        tab.fill("#quarto-search input", query)
        first = tab.wait_for_selector(f"#quarto-search .search-result:first-child[href$='{page}']")
        assert first, query
    tab.close()


@pytest.mark.browser
def test_scorecard_filter(served, tab):
    tab.goto(served[0] + "scorecard.html")
    rows = "[...document.querySelectorAll('tr[data-verdict=VERDICT]')]"
    shown = f"{rows}.filter((r) => r.checkVisibility())"
    count = lambda v: tab.evaluate(f"{shown.replace('VERDICT', v)}.length")
    every = lambda v: tab.evaluate(f"document.querySelectorAll('tr[data-verdict={v}]').length")
    assert not count("yes") and every("yes"), "the rows are folded at first"
    tab.click(".dk-filter button[data-show=no]")
    assert count("no") == every("no") > 0 and not count("yes")
    tab.click(".dk-filter button[data-show=all]")
    assert not count("no")
    tab.click("details.dk-paper summary")
    assert count("yes") + count("no") + count("open") + count("untried") and not tab.wrong


@pytest.mark.browser
@pytest.mark.parametrize(
    "query, page",
    [
        ("2211.01095", "solvers/dpm_solver_pp.html"),
        ("Sadat", "guidance/apg.html"),
        ("dpm-sovler", "solvers/dpm_solver_pp.html"),
        ("DPM-Sovler", "solvers/dpm_solver_pp.html"),
        ("adaptve guidance", "guidance/adaptive_guidance.html"),
        ("perturbed-attention guidance", "guidance/pag.html"),
        ("oversaturation", "guidance/apg.html"),
        ("PLMS", "solvers/pndm.html"),
        ("classifier-free guidance", "guidance/basics.html"),
        ("Pseudo Numerical Methods", "solvers/pndm.html"),
        ("ProlificDreamer", "guidance/vsd.html"),
        ("DPMSolverPP", "solvers/dpm_solver_pp.html#DPMSolverPP"),
        ("time_gr", "core/process.html#time_grid"),
    ],
)
def test_search_finds(repo, chromium, serve, query, page):
    tab = chromium.new_page()
    tab.goto(serve(repo) + "overview.html")
    tab.fill("#quarto-search input", query)
    first = tab.wait_for_selector("#quarto-search .search-result")
    assert first.get_attribute("href").endswith(page), first.inner_text()
    tab.close()
