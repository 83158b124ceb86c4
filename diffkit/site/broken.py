"""Links and anchors that lead nowhere, and loads from elsewhere."""

from __future__ import annotations

import html
import posixpath
import re
import urllib.parse
from pathlib import Path


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
