"""reproduce: worker processes, memory, resuming, failures and the report; then every study in its quick version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from experiments import scheduler
from experiments.__main__ import main
from experiments.reproduce import reproduce
from experiments.scheduler import WorkerError, Workers, available_gb, run_tasks
from experiments.studies import STUDIES, Study, Task, load_study
from torch_bilevel.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TOY = """
import os, pathlib, time, torch
from torch_bilevel.errors import SolverError

def square(number, log, seed, data_dir):
    with open(log, "a") as stream:
        stream.write(f"{number}\\n")
    if number < 0:
        raise SolverError(f"no root of {number}")
    return {"square": number**2, "threads": torch.get_num_threads(), "omp": os.environ.get("OMP_NUM_THREADS"),
            "data": data_dir, "records": list(range(number)), "process": os.getpid()}

def sleep(log, data_dir):
    pathlib.Path(log + ".new").write_text(str(os.getpid()))
    os.replace(log + ".new", log)
    time.sleep(120)

def die(data_dir):
    os._exit(9)

def mistake(data_dir):
    raise KeyError("a mistake in the study")
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A module that worker processes can import; returns a maker of its tasks and the log of its calls."""
    (tmp_path / "toy_study.py").write_text(TOY)
    monkeypatch.syspath_prepend(str(tmp_path))
    log = tmp_path / "calls"

    def task(number: int, **options: float) -> Task:
        return Task(f"n{number}", "toy_study:square", {"number": number, "log": str(log), "seed": 3}, **options)

    return task, lambda: sorted(map(int, log.read_text().split())) if log.exists() else []


def test_results_are_kept_and_made_anew_for_other_arguments(toy, tmp_path: Path) -> None:
    task, calls = toy
    folder = tmp_path / "kept"
    with Workers(2) as workers:
        first = run_tasks([task(2), task(-1), task(3)], folder, workers, "DATA")
    assert calls() == [-1, 2, 3]
    assert list(first) == ["n2", "n-1", "n3"]
    assert first["n3"]["result"] | {"process": 0} == {
        "square": 9,
        "threads": 1,
        "omp": "1",
        "data": "DATA",
        "records": [0, 1, 2],
        "process": 0,
    }
    assert first["n-1"]["result"] == {"failed": "SolverError: no root of -1"}

    other = Task("n3", "toy_study:square", {"number": 4, "log": str(tmp_path / "calls"), "seed": 3})
    with Workers(1) as workers:
        second = run_tasks([task(2), task(-1), other], folder, workers, "DATA")
    assert calls() == [-1, 2, 3, 4]
    assert second["n2"] == first["n2"]
    assert second["n3"]["result"]["square"] == 16
    assert json.loads((folder / "n3.json").read_text()) == second["n3"]


def test_dead_worker_keeps_what_was_finished(toy, tmp_path: Path) -> None:
    task, calls = toy
    folder = tmp_path / "kept"
    with pytest.raises(WorkerError, match="dead.*fewer --jobs"), Workers(1) as workers:
        run_tasks([task(2), Task("dead", "toy_study:die")], folder, workers)
    assert calls() == [2]
    assert [path.name for path in folder.iterdir()] == ["n2.json"]


class FakePool:
    """Makes each call in a thread after a moment, and notes how many ran, and what memory they held, at a time."""

    def __init__(self, *_: object, **__: object):
        self._processes: dict[int, object] = {}
        self.running: list[Task] = []
        self.most, self.most_memory = 0, 0.0

    def submit(self, function, task: Task, data_dir: str | None) -> Future:
        future: Future = Future()
        self.running.append(task)
        self.most = max(self.most, len(self.running))
        self.most_memory = max(self.most_memory, sum(t.memory_gb for t in self.running))

        def finish() -> None:
            time.sleep(0.01)
            try:
                result = function(task, data_dir)
            except Exception as error:
                result = None
                future.set_exception(error)
            self.running.remove(task)
            if result is not None:
                future.set_result(result)

        threading.Thread(target=finish).start()
        return future

    def shutdown(self, **_: object) -> None:
        while self.running:
            time.sleep(0.01)


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakePool]:
    """In place of worker processes, which take seconds to start."""
    fake, threads = FakePool(), torch.get_num_threads()
    monkeypatch.setattr(scheduler, "ProcessPoolExecutor", lambda *a, **k: fake)
    yield fake
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("jobs", "memory", "most"), [(4, 100.0, 4), (2, 100.0, 2), (4, 6.0, 2), (4, 0.5, 1)])
def test_memory_and_jobs_limit_what_runs_at_a_time(
    jobs: int, memory: float, most: int, toy, pool: FakePool, tmp_path: Path
) -> None:
    tasks = [toy[0](i, memory_gb=3.0) for i in range(8)]
    with Workers(jobs, memory) as workers:
        records = run_tasks(tasks, tmp_path, workers)
    assert list(records) == [task.key for task in tasks]
    assert pool.most == most
    assert pool.most_memory <= max(memory, 3.0)


def test_killed_command_goes_on_where_it_stopped_and_leaves_no_worker(toy, tmp_path: Path) -> None:
    task, calls = toy
    script = f"""
import sys
sys.path[:0] = {[str(tmp_path), str(ROOT)]!r}
from pathlib import Path
from experiments.scheduler import Workers, run_tasks
from experiments.studies import Task

if __name__ == "__main__":
    tasks = [Task("n2", "toy_study:square", {task(2).arguments!r})]
    tasks += [Task("s", "toy_study:sleep", {{"log": {str(tmp_path / "pid")!r}}})]
    with Workers(1) as workers:
        run_tasks(tasks, Path({str(tmp_path / "kept")!r}), workers)
"""
    (tmp_path / "command.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "command.py")])
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    process.kill()
    process.wait()
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(worker)
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["n2.json"]
    assert run_tasks([task(2)], tmp_path / "kept", Workers(1))["n2"]["result"]["square"] == 4
    assert calls() == [2]


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended but was not waited for does not."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


def test_mistake_keeps_what_was_finished(toy, pool: FakePool, tmp_path: Path) -> None:
    tasks = [toy[0](2), Task("wrong", "toy_study:mistake"), toy[0](3)]
    with pytest.raises(KeyError, match="mistake"), Workers(1) as workers:
        run_tasks(tasks, tmp_path / "kept", workers)
    assert toy[1]() == [2]
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["n2.json"]


def test_available_memory() -> None:
    assert 0.0 < available_gb() <= float("inf")


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Task("a/b", "m:f"), "file name"),
        (lambda: Task("a", "m.f"), "package.module:function"),
        (lambda: Task("a", "m:f", memory_gb=0.0), "memory_gb"),
        (lambda: run_tasks([Task("a", "m:f"), Task("a", "m:g")], Path("unused"), Workers(1)), "twice: a"),
        (lambda: Workers(0), "jobs=0"),
        (lambda: load_study("E77"), "did you mean 'E7'"),
    ],
)
def test_wrong_use(make, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        make()


def test_stages_see_earlier_results_and_the_report_says_what_ran(toy, pool: FakePool, tmp_path: Path) -> None:
    task, calls = toy

    def second(quick, results):
        return [task(results["n2"]["square"] + quick)]

    def report(results, figures, quick):
        (figures / "X1_a.png").write_bytes(b"")
        return f"The squares are {[r.get('square') for r in results.values()]}."

    study = Study("X1", "Squares", (lambda quick, results: [task(2), task(-1)], second), report)
    path = reproduce(study, jobs=1, out=tmp_path / "out", runs_dir=tmp_path / "runs")
    text = path.read_text()
    assert path == tmp_path / "out" / "X1.md"
    for words in (
        "# X1. Squares",
        "python -m experiments reproduce X1",
        "CPU, one thread a run, 1 at a time",
        "Seeds: 3; 3 runs",
        "The squares are [4, None, 16].",
        "Runs that failed (1 of 3)",
        "no root of -1",
    ):
        assert words in text
    numbers = json.loads((tmp_path / "out" / "X1.json").read_text())
    assert numbers["n4"]["result"]["square"] == 16
    assert "records" not in numbers["n4"]["result"]
    assert (tmp_path / "out" / "figures" / "X1_a.png").is_file()

    (tmp_path / "runs" / "reproduce" / "X1" / "n4.json").unlink()
    reproduce(study, out=tmp_path / "out", runs_dir=tmp_path / "runs", so_far=True)
    assert "Not finished: 1 further runs" in path.read_text()
    assert "[4, None]" in path.read_text()
    assert calls() == [-1, 2, 4]
    with pytest.raises(ConfigError, match="nothing of X1 is kept"):
        reproduce(study, out=tmp_path / "out", runs_dir=tmp_path / "none", so_far=True)
    reproduce(study, jobs=1, out=tmp_path / "out", runs_dir=tmp_path / "runs")
    assert "Not finished" not in path.read_text()
    assert calls() == [-1, 2, 4, 4]
    quick = reproduce(study, quick=True, jobs=1, runs_dir=tmp_path / "runs")
    assert calls() == [-1, -1, 2, 2, 4, 4, 5]
    assert "quick version: not a result" in quick.read_text()
    assert quick.parent.parent == tmp_path / "runs" / "reproduce" / "X1-quick"
    reproduce(study, jobs=1, out=tmp_path / "out", runs_dir=tmp_path / "runs", fresh=True)
    assert len(calls()) == 10


def test_command_line_errors(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main(["reproduce", "E9"]) == 2
    assert "known: E1, E2" in capsys.readouterr().err
    needs = Study("X2", "", (lambda quick, results: [],), lambda *a: "", needs=("australian",))
    with pytest.raises(Exception, match="australian.*svmlight"):
        reproduce(needs, data_dir=str(tmp_path), out=tmp_path, runs_dir=tmp_path)


def present() -> list[str]:
    folder = Path(scheduler.__file__).parent / "studies"
    return [name for name in STUDIES if (folder / f"{name.lower()}.py").is_file()]


@pytest.mark.parametrize("name", present())
def test_quick_version_of_every_study(name: str, pool: FakePool, data_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert (
        main(
            [
                "reproduce",
                name,
                "--quick",
                "--jobs",
                "1",
                "--data-dir",
                str(data_dir),
                "--out",
                str(out),
                "--runs-dir",
                str(tmp_path / "runs"),
            ]
        )
        == 0
    )
    text = (out / f"{name}.md").read_text()
    assert "Runs that failed" not in text
    figures = sorted(path.name for path in (out / "figures").glob(f"{name}_*.png"))
    assert figures
    for figure in figures:
        assert f"figures/{figure}" in text
    assert json.loads((out / f"{name}.json").read_text())
