"""What every test may rely on; and `--changed`, which leaves out what nothing has changed for."""

import functools
import hashlib
import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
STATE = ROOT / "_build" / "tests.json"  # test -> what it depended on when it passed
WHOLE = ("test_site.py", "test_pages.py", "test_package.py")  # they look at all notebooks


@pytest.fixture(autouse=True)
def single_precision():
    """Some peers change torch's default precision when they are imported; no test shall depend
    on which were imported before."""
    torch.set_default_dtype(torch.float32)
    yield
    torch.set_default_dtype(torch.float32)


def pytest_addoption(parser):
    parser.addoption(
        "--changed",
        action="store_true",
        help="leave out tests that passed with the same code, modules and versions",
    )


@functools.cache
def versions() -> str:
    out = [sys.version]
    for name in ("torch", "numpy", "scipy", "diffusers", "dagma", "torchdiffeq", "pytest"):
        try:
            out.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            out.append(f"no {name}")
    return "\n".join([*out, Path(__file__).read_text()])


@functools.cache
def file_key(file: str) -> str:  # of a test file: its code, the modules it imports, versions
    from diffkit.core.records import code_key

    path = ROOT / file
    h = hashlib.sha256((code_key(path) + versions()).encode())
    if path.name in WHOLE:
        parts = ("nbs", "records", "diffkit", "tests", ".")
        kinds = {".ipynb", ".json", ".py", ".css", ".js", ".html", ".yml", ".ini", ".md", ".txt"}
        for part in parts:
            found = (ROOT / part).glob("*") if part == "." else (ROOT / part).rglob("*")
            for p in sorted(p for p in found if p.suffix in kinds and p.is_file()):
                if "_build" not in p.parts and "__pycache__" not in p.parts:
                    h.update(p.read_bytes())
    return h.hexdigest()[:16]


@functools.cache
def test_key(nodeid: str) -> str:
    from diffkit.core.lab import find
    from diffkit.core.records import code_key

    file, _, rest = nodeid.partition("::")
    key = file_key(file)
    if "/test_smoke_" in file and "[" in rest:  # one notebook each
        key += code_key(find(rest.partition("[")[2].rstrip("]")))
    return key


test_key.__test__ = False  # pytest takes functions by their names


def read_state() -> dict:
    return json.loads(STATE.read_text()) if STATE.is_file() else {}


def pytest_collection_modifyitems(config, items):
    # a name with an address is another one in each process, and tests cannot be shared out
    if bad := [i.nodeid for i in items if " at 0x" in i.nodeid]:
        raise pytest.UsageError(f"the name of a test holds an address, give ids: {bad[0]}")
    if not config.getoption("--changed"):
        return
    state = read_state()
    same = [i for i in items if state.get(i.nodeid) == test_key(i.nodeid)]
    config.hook.pytest_deselected(items=same)
    known = {i.nodeid for i in same}
    items[:] = [i for i in items if i.nodeid not in known]


passed, failed = set(), set()


def pytest_runtest_logreport(report):
    if report.failed:
        failed.add(report.nodeid)
    elif report.when == "call" and report.passed:
        passed.add(report.nodeid)


def pytest_sessionfinish(session):
    if hasattr(session.config, "workerinput"):  # the one that started the workers keeps the book
        return
    state = read_state() | {n: test_key(n) for n in passed - failed}
    for n in failed:
        state.pop(n, None)
    STATE.parent.mkdir(exist_ok=True)
    STATE.write_text(json.dumps(state, indent=0))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--changed") and not (passed or failed):
        terminalreporter.write_line("nothing has changed for these tests since they passed")
