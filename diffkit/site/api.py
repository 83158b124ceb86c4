"""API entries, read from the source of exported cells: nothing is imported, nothing is run."""

from __future__ import annotations

import ast
import functools
import html
import io
import re
import textwrap
import tokenize
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from diffkit.site.errors import SiteError
from diffkit.site.links import Index, inline, link_names, raw_html, table

if TYPE_CHECKING:
    from diffkit.site.pages import Page


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


# griffe reads signatures too, but does not tell the lines of parameters, on which comments hang
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
    said = any(c for *_, c in e.params) or bool(e.returns[1])
    out = [
        f"### {e.name} {{#{page.anchors.get(e.name, e.name)} .api-name}}",
        f"```python\n{signature(e, not said)}\n```",
        link_names(e.doc, page, index),
    ]
    show = lambda s: inline(s, page, index)
    code = lambda s: show(f"`{s}`") if s and "`" not in s else html.escape(s)
    if said:
        cells = lambda *texts: "".join(f"<td>{t}</td>" for t in texts)
        name = lambda n: f"<code>{html.escape(n)}</code>"
        rows = [(name(n), code(a), code(d), show(c)) for n, a, d, c in e.params if n != "*"]
        rows = [f"<tr>{cells(*row)}</tr>" for row in rows]
        kind, said = e.returns
        if kind and kind != "None" or said:
            back = cells("returns", code(kind), "", show(said))
            rows.append(f'<tr class="dk-returns">{back}</tr>')
        out.append(raw_html(table("dk-params", ["Parameter", "Type", "Default", "Meaning"], rows)))
    if e.methods:
        rows = []
        for m in e.methods:
            known = [(n, c) for n, _, _, c in m.params if c] + (
                [("returns", m.returns[1])] if m.returns[1] else []
            )
            more = "".join(f"<li><code>{html.escape(n)}</code> {show(c)}</li>" for n, c in known)
            sig = html.escape(m.name if m.kind == "attribute" else signature(m, False))
            full = f"{e.name}.{m.name}"
            more = f"<ul>{more}</ul>" if more else ""
            anchor = page.anchors.get(full, full)
            rows.append(f'<dt id="{anchor}"><code>{sig}</code></dt><dd>{show(m.doc)}{more}</dd>')
        out.append(raw_html(f'<dl class="dk-methods">{"".join(rows)}</dl>'))
    return "\n\n".join(x for x in out if x)
