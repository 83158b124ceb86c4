"""Quarto or smalldocs makes the pages of prepared notebooks."""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
from pathlib import Path

from diffkit.site.errors import SiteError


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
