"""Notebooks and package agree: exporting changes nothing, the saved notebooks are clean, have outputs and no errors. Prints what to do."""
import filecmp
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def notebooks(): return sorted(p for p in (ROOT / "nbs").rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)


def exported_differs() -> list[str]:  # files of the package that an export would change
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp) / "repo"
        copy.mkdir()
        for name in ("settings.ini", "README.md"): shutil.copy(ROOT / name, copy / name)
        shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
        shutil.copytree(ROOT / "diffkit", copy / "diffkit", ignore=shutil.ignore_patterns("__pycache__", "data"))
        subprocess.run([Path(sys.executable).with_name("nbdev_export")], cwd=copy, check=True)
        return [str(p.relative_to(copy)) for p in sorted((copy / "diffkit").rglob("*.py"))
                if not (ROOT / p.relative_to(copy)).is_file() or not filecmp.cmp(p, ROOT / p.relative_to(copy), shallow=False)]


def unclean(path: Path) -> list[str]:  # what is wrong with a saved notebook
    nb, bad = json.loads(path.read_text(encoding="utf-8")), []
    code = [c for c in nb["cells"] if c["cell_type"] == "code" and "".join(c["source"]).strip()]
    if any(set(c["metadata"]) for c in nb["cells"]): bad.append("cell metadata (run nbdev_clean)")
    if any(o["output_type"] == "error" for c in code for o in c["outputs"]): bad.append("an output holds an error")
    if not any(c["outputs"] for c in code): bad.append("saved without outputs")
    if (size := path.stat().st_size) > 1_000_000: bad.append(f"{size / 1e6:.1f} MB, at most 1 MB")
    text = path.read_text(encoding="utf-8")
    if m := re.search(r"/(?:root|home|work)/[\w./-]+|C:\\\\Users", text): bad.append(f"a path of one machine: {m[0]}")
    return bad


def readme() -> str:  # the front page as Markdown
    out = []
    for c in json.loads((ROOT / "nbs" / "index.ipynb").read_text(encoding="utf-8"))["cells"]:
        src = "".join(c["source"]).strip()
        if c["cell_type"] == "markdown": out.append(src)
        elif src and not src.startswith("#|") and not any("image/png" in o.get("data", {}) for o in c["outputs"]):
            out.append(f"```python\n{src}\n```")
            if text := "".join("".join(o["text"]) for o in c["outputs"] if o["output_type"] == "stream" and o["name"] == "stdout").strip(): out.append(f"```text\n{text}\n```")
    return "\n\n".join(out) + "\n"


def main() -> int:
    if "--write" in sys.argv: (ROOT / "README.md").write_text(readme(), encoding="utf-8"); print("README.md written"); return 0
    wrong = [f"{p.relative_to(ROOT)}: {w}" for p in notebooks() for w in unclean(p)]
    wrong += [f"{p}: differs from its notebook (run nbdev_export)" for p in exported_differs()]
    if (ROOT / "README.md").read_text(encoding="utf-8") != readme(): wrong.append("README.md: differs from nbs/index.ipynb (run make export)")
    for w in wrong: print(w)
    print(f"{len(notebooks())} notebooks looked at, {len(wrong)} problems")
    return bool(wrong)


if __name__ == "__main__": sys.exit(main())
