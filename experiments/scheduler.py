"""Tasks in parallel worker processes, as many as memory allows, each result kept in a file of its own."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from experiments.report import plain, versions, write_json
from experiments.studies.base import Results, Task
from torch_bilevel.errors import BilevelError, ConfigError

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


class WorkerError(BilevelError):
    """A worker process died, most often for lack of memory. Finished results are kept."""


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_kind() -> str:
    """Such as "2-core x86_64 CPU", with the GPU's name where PyTorch sees one."""
    kind = f"{os.cpu_count()}-core {platform.machine()} CPU"
    return f"{kind}, {torch.cuda.get_device_name()}" if torch.cuda.is_available() else kind


def available_gb() -> float:
    """Memory that can be had without swapping, within the limit of a container; infinite where no one says."""
    found = [float("inf")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        if "MemAvailable" in lines:
            found.append(float(lines["MemAvailable"].split()[0]) / 2**20)
    elif "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.is_file() and used.is_file() and limit.read_text().strip().isdigit():
        found.append((int(limit.read_text()) - int(used.read_text())) / 2**30)
    return max(0.0, min(found))


def call(task: Task, data_dir: str | None) -> dict[str, Any]:
    """The task's record: its result, or {"failed": message} after a BilevelError; seconds, machine and revision."""
    torch.set_num_threads(1)
    module, name = task.function.split(":")
    function = getattr(importlib.import_module(module), name)
    started = time.perf_counter()
    try:
        result = plain(function(**task.arguments, data_dir=data_dir))
    except BilevelError as error:
        result = {"failed": f"{type(error).__name__}: {error}"}
    seconds = time.perf_counter() - started
    return {
        "function": task.function,
        "arguments": plain(task.arguments),
        "result": result,
        "seconds": seconds,
        "machine": machine_kind(),
        "revision": versions()["revision"],
    }


def _end_with_parent() -> None:
    """In a worker: end when the parent is gone, however it ended; otherwise the worker would wait for work for ever."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def kept(folder: Path, task: Task) -> dict[str, Any] | None:
    """The record in folder/key.json if it is of the same function and arguments."""
    path = folder / f"{task.key}.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text(encoding="utf-8"))
    same = (record["function"], record["arguments"]) == (task.function, plain(task.arguments))
    return record if same else None


class Workers:
    """At most `jobs` worker processes, one thread each, started when there is something to do; a context manager.

    Args:
        jobs: default the cores this process may use.
        memory: GB that the tasks running at a time may need together; default `available_gb()`. A task that needs more
            runs alone.

    Raises: ConfigError: jobs < 1.
    """

    def __init__(self, jobs: int | None = None, memory: float | None = None):
        self.jobs = cores() if jobs is None else jobs
        if self.jobs < 1:
            raise ConfigError(f"jobs={jobs} must be at least 1")
        self.memory = available_gb() if memory is None else memory
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._pool is not None:
            if kind is not None:
                for process in list((self._pool._processes or {}).values()):
                    process.terminate()
            self._pool.shutdown(wait=True, cancel_futures=True)

    def run(self, tasks: Sequence[Task], data_dir: str | None) -> Iterator[tuple[Task, dict[str, Any]]]:
        """(task, record) as they finish; the first waiting task that fits in what is left of the memory starts next."""
        waiting, running = list(tasks), {}
        try:
            while waiting or running:
                while len(running) < self.jobs:
                    left = self.memory - sum(task.memory_gb for task in running.values())
                    fits = next((t for t in waiting if t.memory_gb <= left or not running), None)
                    if fits is None:
                        break
                    waiting.remove(fits)
                    running[self._submit(fits, data_dir)] = fits
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running[future], future.result()
                    del running[future]
        except BrokenProcessPool as error:
            names = ", ".join(task.key for task in running.values())
            raise WorkerError(
                f"a worker process died while running {names}, most likely for lack of memory; finished runs are kept: "
                "give the same command again with fewer --jobs"
            ) from error

    def _submit(self, task: Task, data_dir: str | None) -> Future:
        with _one_thread():  # processes start while something is submitted
            if self._pool is None:
                spawn = multiprocessing.get_context("spawn")
                self._pool = ProcessPoolExecutor(self.jobs, mp_context=spawn, initializer=_end_with_parent)
            return self._pool.submit(call, task, data_dir)


def run_tasks(
    tasks: Sequence[Task], folder: Path, workers: Workers, data_dir: str | None = None, progress: str | None = None
) -> dict[str, dict[str, Any]]:
    """Records of `tasks` by key: those in `folder` with equal arguments are taken from there, the others made and kept.

    Args:
        tasks: with distinct keys. folder: of the kept records, made if need be. data_dir: passed on.
        progress: label of a bar; None for none.

    Raises:
        ConfigError: a key twice. WorkerError: a worker died. Whatever a task raises other than a BilevelError (which is
        a result). Records finished before are kept in each case.
    """
    keys = [task.key for task in tasks]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ConfigError(f"task keys must be distinct, got twice: {', '.join(twice)}")
    folder.mkdir(parents=True, exist_ok=True)
    records = {task.key: kept(folder, task) for task in tasks}
    todo = [task for task in tasks if records[task.key] is None]
    with tqdm(
        total=len(tasks), initial=len(tasks) - len(todo), desc=progress, unit="run", disable=progress is None
    ) as bar:
        for task, record in workers.run(todo, data_dir):
            records[task.key] = {**record, "jobs": workers.jobs}
            write_json(folder / f"{task.key}.json", records[task.key])
            bar.set_postfix(last=task.key, refresh=False)
            bar.update(1)
    return records


@contextmanager
def _one_thread() -> Iterator[None]:
    """Worker processes started inside find one thread in their environment."""
    before = {name: os.environ.get(name) for name in _THREADS}
    os.environ.update(dict.fromkeys(_THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def results_of(records: dict[str, dict[str, Any]]) -> Results:
    """The results alone, by key."""
    return {key: record["result"] for key, record in records.items()}
