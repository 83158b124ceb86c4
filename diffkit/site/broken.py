"""Links and anchors that lead nowhere, and loads from elsewhere."""

from __future__ import annotations

import html
import posixpath
import re
import urllib.parse
from pathlib import Path

AWAY = r"((?:https?:)?//[^\"')\s]+)"  # an address on another machine
LOADS = (
    rf"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*?\s(?:src|data)=[\"']{AWAY}",
    rf"<link\b[^>]*?\shref=[\"']{AWAY}",
)
IMPORTS = rf"<script\b[^>]*type=.module.[^>]*>(?:(?!</script>).)*?import\b[^;]*?[\"']{AWAY}"
CSS_LOADS = (rf"url\(\s*[\"']?{AWAY}", rf"@import\s+[\"']{AWAY}")
ID = r"(?:\sid|<a\b[^>]*\sname)=[\"']([^\"']+)[\"']"  # <meta name="generator"> is no anchor
LINK = r"<(?:a|link|script|img|source|iframe)\b[^>]*?\s(?:href|src)=[\"']([^\"']*)[\"']"


def loads(name: str, text: str) -> list[str]:
    "What a page would load from another machine."
    found = [f"{name}: loads {url}" for kind in LOADS for url in re.findall(kind, text)]
    imports = re.findall(IMPORTS, text, re.S)
    return found + [f"{name}: a script imports {url}" for url in imports]


def twice(name: str, text: str, ids: list[str]) -> list[str]:
    "Anchors that stand at two places of a page, if a link goes there."
    if len(set(ids)) == len(ids):
        return []
    many = {x for x in ids if ids.count(x) > 1 and f'#{x}"' in text}
    return [f"{name}: two places are called #{x}, and a link goes to it" for x in sorted(many)]


def leads(url: str, name: str, site: Path, ids: dict[str, set]) -> str:
    "What is wrong with a link on the page `name`; empty where it leads somewhere."
    path, _, anchor = url.partition("#")
    path = urllib.parse.unquote(path.partition("?")[0])
    target = posixpath.normpath(posixpath.join(posixpath.dirname(name), path)) if path else name
    if target == "." or path.endswith("/") or (site / target).is_dir():
        target = posixpath.normpath(posixpath.join(target, "index.html"))
    if target not in ids:
        return "" if (site / target).is_file() else f"{name}: broken link {url}"
    known = anchor in ("", "top") or urllib.parse.unquote(anchor) in ids[target]
    return "" if known else f"{name}: no anchor for {url}"


def check(site: Path) -> tuple[int, list[str]]:
    """Links and anchors that lead nowhere, and anything that would be loaded from another
    machine; the number of links looked at."""
    problems, texts, ids, n = [], {}, {}, 0
    for f in sorted(site.rglob("*.html")):
        name, text = f.relative_to(site).as_posix(), f.read_text(encoding="utf-8")
        problems += loads(name, text)
        text = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1</script>", text, flags=re.S)
        found = [html.unescape(x) for x in re.findall(ID, text)]
        problems += twice(name, text, found)
        texts[name], ids[name] = text, set(found)
    for name, text in texts.items():
        urls = {html.unescape(u) for u in re.findall(LINK, text)}
        here = [u for u in urls if u and not re.match(r"[a-zA-Z][\w+.-]*:|//", u)]
        n += len(here)
        problems += filter(None, (leads(u, name, site, ids) for u in here))
    for f in site.rglob("*.css"):
        text = f.read_text(encoding="utf-8")
        found = [url for kind in CSS_LOADS for url in re.findall(kind, text)]
        problems += [f"{f.relative_to(site)}: loads {url}" for url in found]
    return n, sorted(problems)
