"""Run the tests on the lowest versions that settings.ini promises, in a virtual environment of its
own (.venv-lowest).

Every `name>=x` of the library and of its extras becomes `name==x`; the tools that run the tests are
as new as they come."""

import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv-lowest"
EXTRAS = ("data", "metrics", "causal", "adaptive", "privacy", "peers", "cluster")
TOOLS = ("pytest", "pytest-xdist", "hypothesis")


def lowest() -> list[str]:
    cfg = ConfigParser(delimiters=["="])
    cfg.read(ROOT / "settings.ini", encoding="utf-8")
    cfg = cfg["DEFAULT"]
    lines = lambda key: [o for o in cfg[key].split() if o]
    named = lambda key, names: [o for o in lines(key) if re.split("[>=<]", o)[0] in names]
    promised = lines("requirements") + [o for k in EXTRAS for o in lines(f"{k}_requirements")]
    # jupyterlab is for people; these run notebooks
    promised += named("notebook_requirements", ("ipykernel", "nbformat", "nbclient", "ipywidgets"))
    promised += named("dev_requirements", ("transformers",))  # pipelines of diffusers need it
    return [re.sub(r">=([\w.]+).*", r"==\1", o) for o in promised]


def main() -> int:
    pins, python = lowest(), VENV / "bin" / "python"
    pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
        subprocess.run([*pip, "-U", "pip>=25"])  # older ones take long to find the versions
    print("== lowest versions:", ", ".join(pins))
    if subprocess.run([*pip, *pins, *TOOLS]).returncode:
        print("the lowest versions cannot be installed together: see the lines above")
        return 1
    subprocess.run([*pip, "--no-deps", "-e", str(ROOT)], check=True)
    # the docs site and the measurements of time are tested on the newest versions
    tests = sorted(p for p in (ROOT / "tests").rglob("test_*.py"))
    tests = [p for p in tests if p.name not in ("test_site.py", "test_overhead.py")]
    run = [python, "-m", "pytest", "-q", "-n", "2", "-m", "not slow and not browser"]
    return subprocess.run([*run, *tests, *sys.argv[1:]], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
