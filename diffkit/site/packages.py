"""Packages from npm that a site carries along: fetched once, kept, never loaded from elsewhere."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path


def cache_dir() -> Path:
    "Where packages are kept: in the virtual environment, else in the user's cache."
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        return Path(sys.prefix) / "share" / "diffkit"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffkit"


def npm_package(
    name: str,  # on the npm registry
    version: str,  # exactly this one
    file: str,  # a file in it by which a complete copy is known
) -> Path | None:  # its folder
    "An unpacked npm package, fetched once with `npm pack`; None where npm or a network is missing."
    home = cache_dir() / f"{name}-{version}"
    if (home / "package" / file).is_file():
        return home / "package"
    if not shutil.which("npm"):
        return None
    tmp = home.with_name(f"{home.name}.{os.getpid()}")
    tmp.mkdir(parents=True, exist_ok=True)
    try:
        pack = ["npm", "pack", f"{name}@{version}", "--silent"]
        r = subprocess.run(pack, cwd=tmp, capture_output=True, text=True, timeout=120)
        packed = list(tmp.glob("*.tgz"))
        if r.returncode or not packed:
            return None
        with tarfile.open(packed[0]) as t:
            # early releases of Python 3.10 and 3.11 know no filter: files below tmp, nothing else
            inside = lambda name: not name.startswith("/") and ".." not in Path(name).parts
            files = [m for m in t.getmembers() if m.isfile() and inside(m.name)]
            t.extractall(
                tmp, files, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {})
            )
        if not (home / "package").is_dir():
            shutil.rmtree(home, ignore_errors=True)
            tmp.rename(home)
    except (OSError, subprocess.TimeoutExpired):
        return None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return home / "package"
