"""Pages made from data: the overview, the scorecard, the index of names."""

from __future__ import annotations

import html
import json

from diffkit.site.links import Index, inline, raw_html, table
from diffkit.site.pages import Page

VERDICTS = {"yes": "✓", "no": "✗", "open": "?"}
UNTRIED = "untried"  # a statement that is listed and not tested: no verdict, so it is counted apart
KINDS = {"def": "function", "class": "class"}
# methods that people look for and that live in another notebook: name, number, use
ALSO = (
    ("UniPC", "204", "the predictor-corrector that DC-Solver corrects"),
    ("PLMS (iPNDM)", "201", "Adams-Bashforth on noise predictions, no warm-up"),
    ('FlowAB, `DEIS(basis="flow")`', "202", "Adams-Bashforth in the clock of flow matching"),
    ("DPM-Solver (noise form)", "203", 'the multistep solver in noise form, `form="eps"`'),
    ("SDE-DPM-Solver++", "203", "the same solver with fresh noise"),
    ("classifier-free guidance", "300", "the guidance that all others are compared with"),
    ("autoguidance", "300", "a worse model of the same kind as the bad one: `contrast`"),
    ("LinearAG", "301", "the unconditional prediction guessed by regression"),
    ("score distillation (SDS)", "309", "the special case of one particle and no trained score"),
    ("NOTEARS", "600", "the first smooth acyclicity constraint"),
    ("DAGMA", "600", "the log-determinant constraint and its path"),
    ("GOLEM", "600", "the likelihood with soft constraints"),
    ("sort-n-regress", "600", "what the order of the variances alone gives"),
)


def badge(v: str) -> str:
    v = v if v in VERDICTS or v == UNTRIED else "open"
    mark, word = VERDICTS.get(v, "–"), "not tried" if v == UNTRIED else v
    return f'<span class="dk-badge dk-{v}"><span aria-hidden="true">{mark}</span> {word}</span>'


def verdict_of(c: dict) -> str:
    return c.get("verdict") or c.get("holds") or "open"


def other_seeds(c: dict) -> str:
    "On how many other sets of seeds a claim has its verdict; empty where none were run."
    r = c.get("other seeds")
    if not r:
        return ""
    return f"{r['same']} of {r['n']}" + (" (older code)" if r["old"] else "")


def full_size(c: dict) -> str:
    "What a run at full size said, in words; empty where there was none."
    r = c.get("full size")
    if not r:
        return ""
    differs = "" if r["verdict"] == verdict_of(c) else ", unlike the quick run"
    where = f" ({r.get('device', '')}, {r.get('date', '')}{', older code' if r['old'] else ''})"
    return f"{r['verdict']}{differs}: {r['measured']}{where}"


def claim_html(c: dict, n: int, page: Page, index: Index) -> str:
    "A claim on its notebook's page."
    link = lambda text: inline(str(text), page, index)
    note = "Why" if verdict_of(c) == UNTRIED else "Note"
    seeds = other_seeds(c)
    facts = (
        ("Measured", c.get("measured")),
        ("Judged by", c.get("basis")),
        ("Other seeds", seeds and f"the same verdict on {seeds} sets that nobody chose"),
        ("Full size", full_size(c)),
        ("Paper", c.get("paper")),
        (note, c.get("note")),
    )
    rows = "".join(f"<dt>{name}</dt><dd>{link(text)}</dd>" for name, text in facts if text)
    kind = html.escape(verdict_of(c))
    says = link(c.get("says", ""))
    head = f'<div class="dk-claim dk-claim-{kind}" id="claim-{n}">'
    return f"{head}<p>{badge(verdict_of(c))} {says}</p><dl>{rows}</dl></div>"


def chapters(cfg: dict, pages: list[Page], records=()) -> list[tuple[str, str, list[Page]]]:
    """(title, folder, pages in order) of each chapter in the sidebar that has pages or papers to
    come; a folder that the sidebar doesn't name comes last."""
    named = {}
    for c in cfg["website"]["sidebar"]["contents"]:
        if isinstance(c, dict) and "section" in c and isinstance(c.get("contents"), str):
            named[c["contents"].rpartition("/")[0]] = str(c["section"])
    for p in pages:
        named.setdefault(p.folder, p.folder.replace("/", " · ").title())
    planned = {r["chapter"] for r in records}
    found = [(t, f, [p for p in pages if p.folder == f]) for f, t in named.items() if f]
    return [(t, f, ps) for t, f, ps in found if ps or f in planned]


# ---------------------------------------------------------------- the overview


def byline(r: dict) -> str:
    "Authors, venue and link of a paper."
    who = ", ".join(r["authors"][:3]) + (" and others" if len(r["authors"]) > 3 else "")
    text = f"{html.escape(who)}. {html.escape(r['venue'] or str(r['year']))}"
    doi = r["doi"] and f"https://doi.org/{r['doi']}"
    link = f"https://arxiv.org/abs/{r['arxiv']}" if r["arxiv"] else doi or r["url"]
    name = f"arXiv {r['arxiv']}" if r["arxiv"] else "paper"
    return f'{text}, <a href="{html.escape(link)}">{name}</a>' if link else text


def overview_row(p: Page | None, r: dict | None) -> str:
    "A notebook, a paper, or both: what it is, what it is for, module, cost, claims."
    number = p.number if p else r["number"]
    title = inline(r["title"] if r else p.title)
    if p:
        title = f'<a href="{p.stem}.html">{title}</a>'
    if r and r["short"].lower() not in r["title"].lower():
        title = f"<b>{inline(r['short'])}</b> {title}"
    name = f'<div class="dk-idea">{byline(r)}</div>' if r else ""
    idea = inline(p.description) if p else "<em>to come</em>"
    facts = [f"<code>{html.escape(p.module)}</code>"] if p and p.module else []
    if p and p.cost:
        facts.append(f"Cost{'' if p.cost.startswith('of ') else ':'} {inline(p.cost)}")
    tested = [c for c in p.claims if verdict_of(c) != UNTRIED] if p else []
    if tested:
        holds = sum(verdict_of(c) == "yes" for c in tested)
        link = f'<a href="scorecard.html#{p.folder}">{len(tested)} claims</a>'
        facts.append(f"{link}, {holds} hold{'s' if holds == 1 else ''}")
    said = "".join(f"<div>{f}</div>" for f in facts)
    return (
        f'<tr><td class="dk-num">{number}</td><td>{title}{name}<div>{idea}</div></td>'
        f"<td>{said}</td></tr>"
    )


def overview(chaps, records=()) -> str:
    "All notebooks and all papers, chapter by chapter; then names that live in another's notebook."
    head = ["No.", "Paper or notebook, and what it is for", "Module, cost, claims"]
    out, pages = [], {p.number: p for _, _, ps in chaps for p in ps if p.number}
    for title, folder, ps in chaps:
        by_number = {r["number"]: r for r in records if r["chapter"] == folder}
        here = {p.number or p.src: p for p in ps}
        keys = sorted({*here, *by_number}, key=lambda k: (not k[0].isdigit(), k))
        rows = [overview_row(here.get(k), by_number.get(k)) for k in keys]
        out.append(f"## {title} {{#{folder}}}\n\n{raw_html(table('dk-overview', head, rows))}")
    rows = [
        f"<tr><td>{inline(name)}</td><td>{inline(use)}</td>"
        f'<td><a href="{pages[n].stem}.html">{n} {inline(pages[n].title)}</a></td></tr>'
        for name, n, use in ALSO
        if records and n in pages
    ]
    if rows:
        names = table("dk-also", ["Name", "What it is", "Notebook"], rows)
        out.append(f"## Also here\n\nMethods that live in another notebook.\n\n{raw_html(names)}")
    return "\n\n".join(out)


# ---------------------------------------------------------------- the scorecard


def tally(pages: list[Page]) -> list[int]:
    every = [verdict_of(c) for p in pages for c in p.claims]
    return [every.count(v) for v in (*VERDICTS, UNTRIED)]


def totals_row(name: str, pages: list[Page]) -> str:
    n = tally(pages)
    bar = "".join(
        f'<span class="dk-{v}" style="flex:{k}" title="{v}: {k}"></span>'
        for v, k in zip(VERDICTS, n)
        if k
    )
    firm = [c for p in pages for c in p.claims if verdict_of(c) in ("yes", "no")]
    again = [c["other seeds"] for c in firm if "other seeds" in c]
    stand = f"{sum(r['same'] == r['n'] for r in again)} of {len(again)}" if again else "–"
    cells = [name, sum(p.is_paper for p in pages), sum(n[:3]), *n, stand]
    row = "".join(f"<td>{c}</td>" for c in cells)
    return f'<tr>{row}<td class="dk-bar-cell"><div class="dk-bar">{bar}</div></td></tr>'


def claim_row(p: Page, i: int, c: dict) -> str:
    v, idea = verdict_of(c), lambda text: f'<div class="dk-idea">{text}</div>'
    changed = c.get("verdict") and c.get("holds") and c["verdict"] != c["holds"]
    expected = idea(f"expected {html.escape(c['holds'])}") if changed else ""
    scale = (
        "" if c.get("scale") in (None, "", "quick") else idea(f"{html.escape(c['scale'])} scale")
    )
    said = idea(f"Paper: {inline(str(c['paper']))}") if c.get("paper") else ""
    basis = idea(f"Judged by: {html.escape(c['basis'])}") if c.get("basis") else ""
    word = "Why" if v == UNTRIED else "Note"
    note = idea(f"{word}: {inline(str(c['note']))}") if c.get("note") else ""
    where = f'href="{p.stem}.html#claim-{i}" title="where this was measured"'
    return (
        f'<tr data-verdict="{v}"><td>{badge(v)}{expected}</td>'
        f'<td><a class="dk-claim-link" {where}>{inline(str(c.get("says", "")))}</a>{said}</td>'
        f'<td data-label="Measured">{inline(str(c.get("measured", "")))}{scale}{basis}{note}</td>'
        f'<td data-label="Other seeds">{html.escape(other_seeds(c))}</td>'
        f'<td data-label="Full size">{inline(full_size(c))}</td></tr>'
    )


CLAIM_HEAD = ["Holds", "Claim", "Measured here", "Other seeds", "Full size"]


def paper_claims(p: Page) -> str:
    "The claims of one notebook, folded behind its title and its totals."
    yes, no, unsure, left = tally([p])
    words = [(yes, "hold"), (no, "do not"), (unsure, "open"), (left, "not tried")]
    said = ", ".join(f"{n} {w}" for n, w in words if n) or "no claims yet"
    rows = [claim_row(p, i, c) for i, c in enumerate(p.claims, 1)]
    body = table("dk-claims", CLAIM_HEAD, rows) if rows else ""
    link = f'<p><a href="{p.stem}.html">To the notebook</a></p>'
    name = f'<span class="dk-num">{p.number}</span> {inline(p.title)}'
    summary = f'<summary>{name} <span class="dk-idea">{said}</span></summary>'
    return f'<details class="dk-paper">{summary}{link}{body}</details>'


FILTER = """<script>
document.querySelectorAll('.dk-filter button').forEach((b, _, all) => {
  b.addEventListener('click', () => {
    const v = b.dataset.show;
    all.forEach((x) => x.setAttribute('aria-pressed', x === b));
    document.querySelectorAll('tr[data-verdict]').forEach((r) => {
      r.hidden = v !== 'all' && r.dataset.verdict !== v;
    });
    document.querySelectorAll('details.dk-paper').forEach((d) => {
      const left = d.querySelectorAll('tr[data-verdict]:not([hidden])').length;
      d.hidden = v !== 'all' && !left;
      d.open = v !== 'all' && left > 0;
    });
  });
});
</script>"""


def scorecard(chaps) -> str:
    "Every claim of every paper: a summary a chapter first, then the rows, folded."
    shown = [(t, f, [p for p in ps if p.is_paper or p.claims]) for t, f, ps in chaps]
    shown = [(t, f, ps) for t, f, ps in shown if ps]
    every = [p for _, _, ps in shown for p in ps]
    head = ["Chapter", "Papers", "Claims", "Yes", "No", "Open", "Not tried", "Replicate", ""]
    rows = [totals_row(f'<a href="#{f}">{html.escape(t)}</a>', ps) for t, f, ps in shown]
    totals = table("dk-totals", head, rows, totals_row("All", every))
    buttons = "".join(
        f'<button type="button" data-show="{v}" aria-pressed="{str(v == "all").lower()}">'
        f"{'not tried' if v == UNTRIED else v}</button>"
        for v in ("all", *VERDICTS, UNTRIED)
    )
    choose = f'<div class="dk-filter" role="group" aria-label="Show claims">Show {buttons}</div>'
    out = [
        "A claim is a sentence of a paper. Each row says what was measured in the notebook, at the"
        " small scale that the notebooks are saved at, next to the paper's own figure. *Yes*: it"
        " holds here too. *No*: it does not. *Open*: the difference is within the noise of the"
        " measurement. *Not tried*: nothing here can measure it, and the row says why. *Other"
        " seeds*: on how many sets of seeds that nobody chose the verdict is the same;"
        " *Replicate* counts the yes and no that are the same on all of them. *Full size*: the"
        " same on a GPU, where that was run. Open a paper to see its rows, or choose a verdict to"
        " open all that have it.",
        raw_html(f"{totals}\n{choose}"),
    ]
    for title, folder, ps in shown:
        rows = "\n".join(paper_claims(p) for p in ps)
        out.append(f"## {title} {{#{folder}}}\n\n{raw_html(rows)}")
    if not every:
        out.append("No claims yet.")
    return "\n\n".join([*out, raw_html(FILTER)])


# ---------------------------------------------------------------- the index of names


def api_index(pages: list[Page]) -> str:
    "All public names, a table a module: name, first sentence, linked to its entry."
    out = []
    for p in pages:
        if not p.module or not p.entries:
            continue
        rows = [
            f'<tr><td><a href="{p.stem}.html#{p.anchors[e.name]}"><code>{e.name}</code></a></td>'
            f"<td>{KINDS[e.kind]}</td><td>{inline(first_sentence(e.doc))}</td></tr>"
            for e in sorted(p.entries, key=lambda e: e.name.lower())
        ]
        names = table("dk-names", ["Name", "Kind", "What it is"], rows)
        out.append(f"## {p.module} {{#{p.module}}}\n\n{raw_html(names)}")
    return "\n\n".join(out)


def first_sentence(doc: str) -> str:
    text = " ".join(doc.split())
    return text.split(" Source:")[0].split(". ")[0].rstrip(".")


def page_md(title: str, description: str, body: str) -> str:
    toc = "true" if body.count("\n## ") > 1 else "false"
    front = f"title: {json.dumps(title)}\ndescription: {json.dumps(description)}\n"
    return f"---\n{front}page-layout: full\ntoc: {toc}\n---\n\n{body}\n"
