"""The docs site: notebooks prepared by nbdev's processors, pages made by Quarto or smalldocs,
mathematics drawn at build time, nothing loaded from another machine.

The rooms: `pages` reads notebooks, `api` their exported source, `links` makes links, `tables` the
pages that are made from data, `project` writes one Quarto project (unchanged notebooks from a
cache), `engines` lets Quarto or smalldocs make pages, `formulas` draws KaTeX or MathML, `search`
adds what finds a page, `broken` looks for what leads nowhere. Notebooks are never executed and the
package is never imported."""

from __future__ import annotations

import argparse
import functools
import json
import shutil
import sys
import time
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from diffkit.site.broken import check
from diffkit.site.errors import SiteError
from diffkit.site.formulas import find_katex, finish
from diffkit.site.pages import CLAIM, read_pages, read_records, text_of
from diffkit.site.project import prepare, read_config, read_repo
from diffkit.site.engines import render
from diffkit.site.search import add_search

ROOT = Path(__file__).resolve().parents[2]
__all__ = [
    "CLAIM",
    "ROOT",
    "Handler",
    "SiteError",
    "build",
    "check",
    "find_katex",
    "main",
    "prepare",
]
__all__ += ["read_config", "read_pages", "text_of"]


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
    finder = add_search(site, pages, read_records(root))
    shutil.copytree(root / "nbs", site / "notebooks", dirs_exist_ok=True, ignore=not_notebooks)
    find_itself(site / "404.html", root)
    links, broken = check(site)
    print(
        f"site: {count} formulas drawn by {how}, search by {finder}, {links} links checked"
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


def not_notebooks(folder: str, names: list[str]) -> set[str]:
    "What is not copied beside the pages for readers to download."
    keep = {n for n in names if n.endswith(".ipynb") or (Path(folder) / n).is_dir()}
    return set(names) - keep | {".ipynb_checkpoints"}


def find_itself(page: Path, root: Path) -> None:
    """The page for lost readers is shown at any address: its links start at the site's own root,
    which is below `doc_baseurl` where the site is published and at the top where it is tried."""
    if page.is_file():
        base = json.dumps(read_repo(root).get("doc_baseurl", "").rstrip("/") + "/")
        script = f"if (!location.pathname.startsWith({base}))"
        script += ' document.querySelector("base").href = "/";'
        head = f"<head><base href={base}><script>{script}</script>"
        text = page.read_text(encoding="utf-8").replace("<head>", head, 1)
        page.write_text(text, encoding="utf-8")


class Handler(SimpleHTTPRequestHandler):
    "Files of a site; the page for lost readers where there is none."

    def send_error(self, code, message=None, explain=None):
        lost = Path(self.directory) / "404.html"
        if code != 404 or not lost.is_file():
            return super().send_error(code, message, explain)
        body = lost.read_bytes()
        self.send_response(code)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def serve_site(dest: Path, port: int = 8000):
    "Serve a folder on this machine only, until interrupted."
    handler = functools.partial(Handler, directory=str(dest))
    with ThreadingHTTPServer(("127.0.0.1", port), handler) as server:
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
