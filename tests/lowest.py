"""Run the tests on the lowest versions that settings.ini promises, in a virtual environment of its
own (.venv-lowest).

Every `name>=x` of the runtime requirements and of the extras that the notebooks use becomes
`name==x`; the tools that only developers need keep their tested pins."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-lowest"


def lowest() -> list[str]:
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    lines = [
        o.strip()
        for k in (
            "requirements",
            "data_requirements",
            "metrics_requirements",
            "causal_requirements",
        )
        for o in cfg[k].splitlines()
        if o.strip()
    ]
    return [re.sub(r">=([\w.]+).*", r"==\1", o) for o in lines]


def main() -> int:
    pins = lowest()
    python = VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    # the tested pins of everything else, less what the lowest versions pull along themselves
    rest = [
        p
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if (p := line.strip())
        and not p.startswith("#")
        and re.split(r"[=<>]", p)[0].lower().replace("_", "-")
        in (
            "pytest",
            "hypothesis",
            "diffusers",
            "ipython",
            "ipykernel",
            "nbclient",
            "nbformat",
            "execnb",
        )
    ]
    print("== lowest versions:", ", ".join(pins))
    if subprocess.run(
        [python, "-m", "pip", "install", "-q", "--disable-pip-version-check", *pins, *rest]
    ).returncode:
        print("the lowest versions cannot be installed together: see the lines above")
        return 1
    subprocess.run(
        [
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "-e",
            str(ROOT),
        ],
        check=True,
    )
    # these two test tools of the newest versions
    keep = [
        str(p)
        for p in sorted((ROOT / "tests").rglob("test_*.py"))
        if p.name not in ("test_site.py", "test_overhead.py")
    ]
    return subprocess.run(
        [
            python,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow and not browser",
            *keep,
            *sys.argv[1:],
        ],
        cwd=ROOT,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
