"""The same work on CUDA: its share of the memory bandwidth or of the matrix products' rate, and CPU against GPU.

    python -m benchmarks.gpu [--data-dir DATA] [--json FILE]

Without a CUDA device it says so and ends. Bandwidth and rate are measured in the same run, by copying and multiplying
large arrays. A single product of a softmax layer reads its inputs twice, so its floor is 2 n d numbers over the
bandwidth; a block of 64 is bound by matrix products. TF32 is left as PyTorch has it (off).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

import torch_bilevel as tb
from benchmarks.common import begin, cuda_peak_memory, finish, interleaved, markdown, once, parser_of
from benchmarks.floors import matmul_rate
from benchmarks.problems import Setting, softmax, solved, synthetic_cleaning
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.linalg import FunctionOperator, cg

BLOCK = 64
CG_STEPS = 20


def bandwidth(numbers: int = 2**28, repeats: int = 10) -> float:
    """Bytes read plus written per second by copying a large float32 array on the GPU: the best of some."""
    source = torch.empty(numbers, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 8 * numbers / min(once(lambda: target.copy_(source))[0] for _ in range(repeats))


def at_solution(setting: Setting):
    """The recorded lower gradient."""
    return Objective(setting.problem(), lower=1.0, counts=OracleCounts()).linearise(setting.x, setting.y, "y")


def products(setting: Setting, args) -> dict:
    """A single product, a block and CG iterations on the GPU, with the share of their floors."""
    gpu = setting.to(device="cuda")
    at = at_solution(gpu)
    gen = torch.Generator().manual_seed(0)
    V = torch.randn(gpu.dy, BLOCK, generator=gen).to(gpu.x)
    w = V[:, 0].contiguous()
    operator = FunctionOperator(gpu.dy, at.yy, at.yy, dtype=w.dtype, device=w.device)
    runs: dict[str, Callable[[], object]] = {
        "single product": lambda: at.yy(w),
        f"block of {BLOCK}": lambda: at.yy(V),
        f"{CG_STEPS} CG iterations": lambda: cg(operator, w, tol=1e-30, max_iterations=CG_STEPS),
        f"{CG_STEPS} CG iterations, reorthogonalised": lambda: cg(
            operator, w, tol=1e-30, max_iterations=CG_STEPS, reorthogonalise=True
        ),
    }
    n, (features, classes) = len(gpu.train[1]), gpu.sizes
    reads = 2 * n * features * w.element_size() / bandwidth()
    multiplies = 4 * n * features * classes * BLOCK / matmul_rate(w.dtype, "cuda")
    floors = dict(zip(runs, (reads, max(reads, multiplies), (CG_STEPS + 1) * reads, (CG_STEPS + 1) * reads)))
    times = interleaved(runs, args.repeats, warmup=3, max_seconds=args.max_seconds)
    rows = []
    for name, spread in times.items():
        memory, _ = cuda_peak_memory(runs[name])
        rows.append([name, spread, floors[name] * 1e3, f"{100 * floors[name] / spread.median:.0f} %", memory])
    print(f"\n## {setting.name}: products on the GPU\n")
    print(markdown(["what", "ms", "floor, ms", "share of the floor's rate", "peak MB"], rows), flush=True)
    return {"seconds": times, "floors": floors}


def both_devices(setting: Setting, args) -> dict:
    """Hypergradient, dense hyper-Hessian and ten L-BFGS steps, CPU and GPU in turns, and whether they agree."""
    runs: dict[str, dict[str, Callable[[], torch.Tensor]]] = {}
    for device in ("cpu", "cuda"):
        there = setting.to(device=device)

        def hypergradient(s: Setting = there) -> torch.Tensor:
            return tb.ImplicitOracle(s.problem()).at_point(s.x, s.y).gradient

        def dense(s: Setting = there) -> torch.Tensor:
            return tb.ImplicitOracle(s.problem()).at_point(s.x, s.y).hessian.to_dense()

        def run(s: Setting = there) -> torch.Tensor:
            return tb.minimize(s.problem(), "lbfgs", max_steps=10, gradient_tol=0.0).x

        runs[device] = {"hypergradient": hypergradient, "dense hyper-Hessian": dense, "ten L-BFGS steps": run}
    record, rows = {}, []
    for name in runs["cpu"]:
        a, b = (runs[device][name]().double().cpu() for device in ("cpu", "cuda"))
        times = interleaved({device: runs[device][name] for device in runs}, args.repeats, max_seconds=args.max_seconds)
        speed = times["cpu"].median / times["cuda"].median
        difference = float((a - b).norm() / a.norm())
        rows.append([name, times["cpu"], times["cuda"], f"{speed:.2f}", f"{difference:.1e}"])
        record[name] = {"seconds": times, "difference": difference}
    print(f"\n## {setting.name}: CPU against GPU, float{torch.finfo(setting.x.dtype).bits}\n")
    print(markdown(["what", "CPU, ms", "GPU, ms", "CPU / GPU", "relative difference"], rows), flush=True)
    return record


def main(argv: list[str] | None = None) -> dict:
    args = begin(parser_of(__doc__), argv)
    if not torch.cuda.is_available():
        print("no CUDA device is visible to this PyTorch: nothing to measure here")
        finish(args, {"skipped": "no CUDA device"})
        return {}
    large = softmax(args.quick)
    record: dict = {"products": products(large, args)}
    finish(args, record)
    small, middle = (40, 4, 3), (1000, 8, 10)
    for sizes in (small,) if args.quick else (middle, (5000, 28, 10)):
        setting = solved(synthetic_cleaning(*sizes))
        record[setting.name] = both_devices(setting, args)
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
