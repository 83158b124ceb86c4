"""What a page must be for its reader: tests and plumbing folded behind a sentence, figures with a
number and words, no measured number typed by hand, and no longer than one sitting."""

import ast
import json
import re
from pathlib import Path

import pytest

from diffkit.core.lab import CLAIM_MIME

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = {
    p.stem: p
    for p in sorted((ROOT / "nbs").rglob("*.ipynb"))
    if ".ipynb_checkpoints" not in p.relative_to(ROOT).parts
}
PAPERS = [s for s in NOTEBOOKS if re.match(r"[1-9]\d\d_", s) and s[1:3] not in ("00", "99")]
WALL = 20  # lines of a cell that may stand open between the text and its figure
EXPORT = 130  # lines of an exported cell of several names; one class may have more
WORDS = 5500  # of the main line: what is open on the page

# numbers in a text that no output shows: settings of a paper, constants, dates
ALLOWED = {"*": {"10", "100", "1000", "1,000"}}

# seeds that no set moves
FIXED = re.compile(r"manual_seed\(\d|default_rng\(\d|RandomState|(?<!for _ in )range\(pick\(")
# cells with such a seed that no claim rests on, by notebook: first tries and checks
GIVEN = {
    "204_dc_solver": {"095cc0bf"},
    "207_adjoint_dpm": {"66b61974"},
    "209_t_stitch": {"f62665fc", "6ea949e6"},
    "299_compare": {"fa1739c8"},
    "benchmarks": {"45a0e876"},
}


class Page:
    "A notebook as its reader meets it."

    def __init__(self, stem):
        self.stem, self.path = stem, NOTEBOOKS[stem]
        self.cells = json.loads(self.path.read_text())["cells"]

    def source(self, cell):
        return "".join(cell["source"])

    def kind(self, cell):  # text, export, hidden, folded or open
        if cell["cell_type"] != "code":
            return "text"
        src = self.source(cell)
        if re.search(r"^#\|\s*(export|exporti|exports|default_exp)\b", src, re.M):
            return "export"
        if re.search(r"^#\|\s*(hide|include: false)\b", src, re.M):
            return "hidden"
        return "folded" if re.search(r"^#\| code-fold: true$", src, re.M) else "open"

    def lines(self, cell):
        return [x for x in self.source(cell).split("\n") if x.strip() and not x.startswith("#|")]

    def outputs(self, kinds=("text/html", "text/markdown", "text/plain")):
        for c in self.cells:
            for o in c.get("outputs", []):
                data = o.get("data", {})
                yield from ("".join(data[k]) for k in kinds if k in data)
                if "text" in o and kinds != ("text/html",):
                    yield "".join(o["text"])

    def prose(self, start=0):  # the main line's text: nothing folded, no appendix
        text = "\n\n".join(self.source(c) for c in self.cells[start:] if self.kind(c) == "text")
        text = re.split(r"^#+ Appendix", text, flags=re.M)[0]
        return re.sub(r"<details>.*?</details>", " ", text, flags=re.S)


@pytest.fixture(params=sorted(NOTEBOOKS))
def page(request):
    return Page(request.param)


def test_links_to_notebooks_lead_somewhere(page):
    """The site refuses a broken link; here it is found in a second."""
    text = "\n".join(page.source(c) for c in page.cells)
    for link in re.findall(r"\]\((?!https?:)([^)\s#]+\.ipynb)", text):
        assert (page.path.parent / link).is_file(), f"a link to {link}"


def test_what_is_long_is_folded_behind_a_sentence(page):
    for c in page.cells:
        n, first = len(page.lines(c)), page.source(c)[:80]
        if page.kind(c) == "open":
            assert n <= WALL, f"an open cell of {n} lines: {first}"
        if page.kind(c) == "export":
            names = re.findall(r"^(?:class|def) ", page.source(c), re.M)
            limit = 2 * EXPORT if len(names) < 2 else EXPORT
            assert n <= limit, f"an exported cell of {n} lines, with no word between: {first}"
        if page.kind(c) == "folded":
            said = re.search(r'^#\| code-summary: "(.+)"$', page.source(c), re.M)
            assert said and len(said[1].split()) > 2, f"folded without a sentence: {first}"
            assert "`" not in said[1], f"a backtick ends the fence that the site makes: {first}"


def test_figures_have_numbers_captions_and_texts(page):
    assert not any(
        "image/png" in o.get("data", {}) for c in page.cells for o in c.get("outputs", [])
    )
    html = "\n".join(page.outputs(("text/html",)))
    for img in re.findall(r"<img\b[^>]*>", html):
        alt = re.search(r'\balt="([^"]*)"', img)
        assert alt and len(alt[1].split()) > 2, img[:40]
    numbers = [int(n) for n in re.findall(r"<figcaption[^>]*><b>Figure (\d+)\.</b> \w", html)]
    assert numbers == list(range(1, len(numbers) + 1))
    named = [int(n) for n in re.findall(r"\b[Ff]igures? (\d+)", page.prose())]
    paper = [int(n) for n in re.findall(r"(?:paper's|their) [Ff]igures? (\d+)", page.prose())]
    assert all(n in numbers or n in paper for n in named), (
        "the text names a figure that is not there"
    )


def test_measured_numbers_are_not_typed(page):
    if page.stem not in PAPERS and page.stem[1:3] != "99":
        return
    text = page.prose(len(page.cells) // 3)
    text = re.sub(r"^## What the paper reports.*?(?=^## |\Z)", " ", text, flags=re.S | re.M)
    text = re.sub(r"^\*\*(References|Exercises).*?(?=^## |\Z)", " ", text, flags=re.S | re.M)
    text = re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)|arXiv:? ?[\d.]+|\b(19|20)\d\d\b", " ", text)
    shown = " ".join(page.source(c) for c in page.cells if c["cell_type"] == "code")
    shown += " ".join(page.outputs())
    shown = re.sub(r"base64,[A-Za-z0-9+/=]+", " ", shown)
    known = {s[:3] for s in NOTEBOOKS} | ALLOWED["*"] | ALLOWED.get(page.stem, set())
    found = re.findall(r"(?<![\w.])\d*\.\d+|(?<![\w.])\d{2,}(?!\w)", text)
    typed = {n for n in found if n not in known and n not in shown and n.lstrip("0") not in shown}
    assert not typed, f"numbers in the text that no output and no code shows: {sorted(typed)}"


def test_the_main_line_is_one_sitting(page):
    code = " ".join(page.source(c) for c in page.cells if page.kind(c) == "open")
    words = len(page.prose().split()) + len(code.split())
    assert words <= WORDS, f"{words} words in the main line: fold or move to an appendix"


def test_a_paper_is_introduced(page):
    if page.stem not in PAPERS:
        return
    code = [page.source(c) for c in page.cells if c["cell_type"] == "code"]
    assert any("paper_box(" in s for s in code), "no paper box"
    assert re.search(r"^## What the paper reports$", page.prose(), re.M)
    assert "notation.ipynb" in page.prose(), "no link to the page of notation and terms"


def calls(source, name):  # the calls of a function in a cell
    lines = [x for x in source.split("\n") if not x.lstrip().startswith(("%", "!"))]
    tree = ast.parse("\n".join(lines))
    every = [n for n in ast.walk(tree) if isinstance(n, ast.Call)]
    return [n for n in every if isinstance(n.func, ast.Name) and n.func.id == name]


def test_every_claim_is_checked(page):
    if page.path.parent.name == "core":
        return
    for c in page.cells:
        if c["cell_type"] != "code" or "claim(" not in page.source(c):
            continue
        if page.kind(c) == "export":
            continue
        for call in calls(page.source(c), "claim"):
            given = {k.arg: k.value for k in call.keywords}
            says = ast.unparse(call.args[0])
            assert "check" in given, f"no check: {says}"


def test_the_published_verdict_is_the_expected_one(page):
    # a run elsewhere may find "open" for "yes" (see lab.claim); what is published may not
    for cell in page.cells:
        for out in cell.get("outputs", []):
            if row := out.get("data", {}).get(CLAIM_MIME):
                assert row["verdict"] == row["holds"], row["says"]


def test_what_a_claim_rests_on_moves_with_the_seeds(page):
    code = [c for c in page.cells if c["cell_type"] == "code"]
    has = [re.search(r"^\s*claim\(", page.source(c), re.M) is not None for c in code]
    if not any(has) or page.path.parent.name == "core":
        return
    last = max(i for i, h in enumerate(has) if h)
    for c in code[:last]:
        src = page.source(c)
        if page.kind(c) == "export" or 'code-summary: "Test' in src:
            continue
        if c["id"] not in GIVEN.get(page.stem, ()):
            found = FIXED.findall(src)
            assert not found, f"cell {c['id']}: {found}; use seeds, generator, shifted"
