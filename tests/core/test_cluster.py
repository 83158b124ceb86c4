"""Notebooks on a cluster: a real one of two workers on this machine, one of which is lost."""

import importlib
import os
import signal
import threading
import time

import nbformat
import pytest

from diffkit import cli
from diffkit.core import lab, records


def write(path, *cells):
    cells = [nbformat.v4.new_code_cell(c) for c in cells]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip(
        "distributed", reason="no distributed: pip install 'diffkit[cluster]'"
    )
    how = dict(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50)
    with distributed.LocalCluster(**how) as made, distributed.Client(made) as client:
        yield client


@pytest.fixture
def address(cluster):
    return cluster.scheduler.address


@pytest.mark.slow
def test_a_cluster_gives_what_this_machine_gives(tmp_path, address, capsys):
    made = [write(tmp_path / f"{n}.ipynb", f"print({n})") for n in range(2)]
    bad = write(tmp_path / "bad.ipynb", "1 / 0")
    here = lab.run([*made, bad], out=tmp_path / "here", progress=False)
    there = [*made, bad, "--backend", "dask", "--address", address, "--out", tmp_path / "there"]
    with pytest.raises(SystemExit):
        cli.main(["run", *map(str, there)])
    assert "2 of 3 notebooks passed" in capsys.readouterr().out
    files = lambda d: sorted(p.name for p in (tmp_path / d).iterdir())
    assert files("here") == files("there")  # executed copies, and the rows of those that passed
    assert "'output_type': 'stream'" in str(nbformat.read(tmp_path / "there" / "1.ipynb", 4))
    again = lab.run([*made, bad], out=tmp_path / "there", progress=False)
    keep = ("slug", "ok", "error")
    assert [[r.get(k) for k in keep] for r in again] == [[r.get(k) for k in keep] for r in here]
    assert [r.get("cached", False) for r in again] == [True, True, False]


@pytest.mark.slow
def test_a_lost_worker_costs_one_notebook_run_again(tmp_path, cluster, address):
    log = tmp_path / "log"
    cell = f"import os, time\nopen({str(log)!r}, 'a').write('%s\\n')\ntime.sleep(4)"
    made = [write(tmp_path / f"{n}.ipynb", cell % n) for n in range(4)]
    rows = []
    how = dict(backend="dask", address=address, out=tmp_path / "out", progress=False)
    work = threading.Thread(target=lambda: rows.extend(lab.run(made, **how)))
    work.start()
    started = lambda: log.read_text().split() if log.is_file() else []
    end = time.monotonic() + 60
    while len(started()) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    first = next(iter(cluster.run(os.getpid).values()))
    os.kill(first, signal.SIGKILL)
    work.join(120)
    assert [r["ok"] for r in rows] == [True] * 4
    assert sorted(set(started())) == ["0", "1", "2", "3"]
    assert len(started()) == 4 + 1  # the one that the lost worker ran


def test_a_worker_with_other_code_says_so_and_runs_nothing(tmp_path):
    path = write(tmp_path / "a.ipynb", "1")
    for key, file, said in (("other", path, "other code"), ("k", tmp_path / "b.ipynb", "has no")):
        row = lab._task(file, "quick", key)
        assert not row["ok"] and said in row["error"] and row["notebook"] is None


@pytest.mark.slow
def test_replicate_runs_there_too(tmp_path, cluster, address, monkeypatch):
    cell = "import os\nfrom diffkit.core.lab import claim, exact\n"
    cell += "claim(os.environ['DIFFKIT_SEED_SET'], str(os.getppid()), 'yes', check=exact(True))"
    path = write(tmp_path / "a.ipynb", cell)
    monkeypatch.setattr(records, "_record", lambda kind, p: tmp_path / f"{kind}.json")
    monkeypatch.setattr(records, "find", lambda s: path)
    monkeypatch.setattr(lab, "find", lambda s: path)
    cli.main(["replicate", "a", "--sets", "2", "--backend", "dask", "--address", address])
    sets = records.read_record("replication", path)["sets"]
    verdicts = {says: v for s in sets.values() for says, v in s["verdicts"].items()}
    assert {says: v for says, (v, _) in verdicts.items()} == {"1": "yes", "2": "yes"}
    # the parent of each kernel was a worker
    assert {int(pid) for _, pid in verdicts.values()} <= set(cluster.run(os.getpid).values())


@pytest.mark.slow
def test_no_cluster_at_the_address(capsys):
    pytest.importorskip("distributed", reason="no distributed: pip install 'diffkit[cluster]'")
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(ValueError, match=f"at address '{address}'"):
            lab.run(["papers"], backend="dask", address=address, progress=False)


@pytest.mark.parametrize("backend,how", [("dask", "diffkit[cluster]"), ("ray", "install ray")])
def test_a_missing_package_is_named_with_its_extra(backend, how, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    hide = lambda n: None if n in ("distributed", "ray") else find_spec(n)
    monkeypatch.setattr(lab, "find_spec", hide)
    with pytest.raises(SystemExit) as stop:
        cli.main(["run", "papers", "--backend", backend])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and how in said and len(said.strip().splitlines()) == 1


@pytest.mark.slow
def test_ray(tmp_path):
    pytest.importorskip("ray", reason="no ray: pip install ray")
    made = [write(tmp_path / f"{n}.ipynb", f"print({n})") for n in range(2)]
    rows = lab.run(made, backend="ray", out=tmp_path / "out", progress=False)
    assert [r["ok"] for r in rows] == [True, True]
