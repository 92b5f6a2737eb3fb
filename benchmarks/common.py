"""What the benchmarks share: interleaved timing, quartiles, peak memory, tables, the line that names the machine."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from experiments.report import plain, versions
from torch_bilevel.derivatives import load_torch_func


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of seconds, kept with all of them."""

    all: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.all)

    @property
    def quartiles(self) -> tuple[float, float]:
        if len(self.all) < 2:
            return self.all[0], self.all[0]
        low, _, high = statistics.quantiles(self.all, n=4, method="inclusive")
        return low, high

    def text(self, unit: float = 1e3) -> str:
        """'median (lower quartile-upper quartile)' in 1/unit seconds; milliseconds by default."""
        low, high = self.quartiles
        return f"{number(self.median * unit)} ({number(low * unit)}-{number(high * unit)})"

    def as_dict(self) -> dict[str, Any]:
        return {"median": self.median, "quartiles": list(self.quartiles), "repeats": len(self.all)}


def synchronise() -> None:
    """Wait for the GPU, if there is one in use."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def once(function: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, what it returned)."""
    synchronise()
    start = time.perf_counter()
    value = function()
    synchronise()
    return time.perf_counter() - start, value


def interleaved(
    contestants: Mapping[str, Callable[[], Any]], repeats: int, warmup: int = 1, max_seconds: float = float("inf")
) -> dict[str, Spread]:
    """Seconds of every contestant, measured in turns A B C A B C ..., so that a noisy machine hits all alike.

    Ends early, after a whole round, once ``max_seconds`` are spent (at least three rounds are made).
    """
    load_torch_func()
    for function in contestants.values():
        for _ in range(warmup):
            function()
    found: dict[str, list[float]] = {name: [] for name in contestants}
    gc.disable()
    begun = time.perf_counter()
    try:
        for turn in range(repeats):
            for name, function in contestants.items():
                found[name].append(once(function)[0])
            if turn >= 2 and time.perf_counter() - begun > max_seconds:
                break
    finally:
        gc.enable()
    return {name: Spread(tuple(seconds)) for name, seconds in found.items()}


def peak_memory(function: Callable[[], Any]) -> tuple[float | None, Any]:
    """(MB by which the resident memory rose at most while it ran, what it returned); None where that is unknown.

    On Linux by the kernel's own high-water mark, reset before; on CUDA (tensors there) use ``cuda_peak_memory``.
    """
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None, function()
    value = function()
    return max(0.0, (_status("VmHWM") - before) / 1024), value


def _status(key: str) -> float:
    """A line of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return float(dict(line.split(":", 1) for line in lines)[key].split()[0])


def cuda_peak_memory(function: Callable[[], Any]) -> tuple[float, Any]:
    """(MB allocated at most on the GPU while it ran, beyond what was there before; what it returned)."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    value = function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20, value


def number(value: float | None) -> str:
    """Three digits, without an exponent from 0.001 to 99999; '-' for None."""
    if value is None:
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(0, 2 - len(str(int(abs(value)))) + (1 if abs(value) >= 1 else 1 + _zeros(value)))
        return f"{value:.{digits}f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{value:.2g}"


def _zeros(value: float) -> int:
    """Zeros after the point of 0 < |value| < 1."""
    zeros, value = 0, abs(value)
    while value and value < 0.1:
        zeros, value = zeros + 1, value * 10
    return zeros


def markdown(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table; floats with three digits, None as '-'."""

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if isinstance(value, Spread):
            return value.text()
        return number(value) if isinstance(value, float) else str(value)

    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def machine() -> str:
    """'2-core x86_64 CPU, torch 2.14.1, 2 threads'."""
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    cores, threads = os.cpu_count(), torch.get_num_threads()
    return f"{cores}-core {platform.machine()} CPU{gpu}, torch {torch.__version__}, {threads} thread(s)"


def parser_of(doc: str, repeats: int = 15) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=doc.strip().splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, not a measurement")
    parser.add_argument("--threads", type=int, help="of PyTorch; default: what OMP_NUM_THREADS or PyTorch says")
    parser.add_argument("--data-dir", help="folder with MNIST and libsvm (see experiments.data)")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--repeats", type=int, default=repeats, help=f"interleaved rounds; default {repeats}")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where it runs, of those that ask; default cpu")
    parser.add_argument("--max-seconds", type=float, default=120.0, help="of one table's timing, after three rounds")
    return parser


def begin(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse, set the threads, print the machine."""
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if args.quick:
        args.repeats = min(args.repeats, 3)
    torch.manual_seed(0)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this PyTorch sees no CUDA device")
    print(machine() + ("; --quick: not a measurement" if args.quick else ""), flush=True)
    return args


def hold_to_cores(count: int) -> None:
    """From now on this process, with what threads it starts, has so many cores: XLA's threads are not PyTorch's to count.

    Does nothing where the system has no such call (macOS, Windows), and says so.
    """
    if not hasattr(os, "sched_setaffinity"):
        print("this system does not hold a process to cores: jaxopt may use more than the others")
        return
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def finish(args: argparse.Namespace, record: Mapping[str, Any]) -> None:
    """Write the JSON that was asked for."""
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        full = {"machine": machine(), "versions": versions(), "quick": args.quick, **record}
        args.json.write_text(json.dumps(plain(full), indent=1) + "\n", encoding="utf-8")


class Skip(Exception):
    """Something that a benchmark needs is not here; the message says what."""
