"""The same work on CUDA: its share of the memory bandwidth or of the matrix products' rate, and CPU against GPU.

    python -m benchmarks.gpu [--json FILE]

Without a CUDA device it says so and ends. Bandwidth and rate are measured in the same run, by copying and multiplying
large arrays. A single product of a softmax layer reads its inputs twice, so its floor is 2 n d numbers over the
bandwidth; blocks, g_yy and its factor are bound by matrix products. CG is timed on the default stream, launched step by
step, and on a stream of its own, where its steps are replayed as a CUDA graph (as ``minimize`` does it). TF32 is left as
PyTorch has it (off). Whole runs: ``benchmarks.whole_run --device cuda`` and ``experiments reproduce E2_GPU``.
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
from torch_bilevel.linalg import CholeskyFactor, LinearOperator, cg, own_stream
from torch_bilevel.linalg.replay import Replay
from torch_bilevel.lower import LowerSystems

BLOCK = 64
CG_STEPS = 200


def bandwidth(numbers: int = 2**28, repeats: int = 10) -> float:
    """Bytes read plus written per second by copying a large float32 array on the GPU: the best of some."""
    source = torch.empty(numbers, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 8 * numbers / min(once(lambda: target.copy_(source))[0] for _ in range(repeats))


def at_solution(setting: Setting, compiled: bool = False):
    """The recorded lower gradient."""
    return Objective(setting.problem(compile=compiled), lower=1.0, counts=OracleCounts()).linearise(setting.x, setting.y, "y")


def products(setting: Setting, args) -> dict:
    """Single products, blocks, CG and what a factor takes on the GPU, with the share of their floors."""
    gpu = setting.to(device="cuda")
    device = gpu.x.device
    w = torch.randn(gpu.dy, BLOCK, generator=torch.Generator().manual_seed(0)).to(gpu.x)
    v = w[:, 0].contiguous()
    systems = LowerSystems(solver="cg")
    at = at_solution(gpu)
    default = systems.operator(at)
    with own_stream(device):
        own = systems.operator(at_solution(gpu))  # recorded on the stream where it is to be replayed
        out, place = torch.empty_like(v), v.clone()
        replay = Replay.make(lambda: out.copy_(own.matvec(place)), device)
        fused = systems.operator(at_solution(gpu, compiled=True))
        fused.matvec(v)  # compiles
        replay_fused = Replay.make(lambda: out.copy_(fused.matvec(place)), device)
    outputs = systems.outputs(at_solution(gpu))

    def iterations(operator: LinearOperator, reorthogonalise: bool) -> Callable[[], object]:
        return lambda: cg(operator, v, tol=1e-30, max_iterations=CG_STEPS, reorthogonalise=reorthogonalise)

    def replayed(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with own_stream(device):
                return function()

        return run

    n, (features, classes) = len(gpu.train[1]), gpu.sizes
    size, speed, rate = w.element_size(), bandwidth(), matmul_rate(w.dtype, "cuda")
    reads = 2 * n * features * size / speed
    multiplies = 4 * n * features * classes * BLOCK / rate
    dense = n * features**2 * classes * (classes + 1) / rate
    plain, kept = iterations(default, False), iterations(default, True)
    runs: dict[str, tuple[Callable[[], object], float]] = {
        "single product": (lambda: at.yy(v), reads),
        "single product, replayed": (replayed(replay), reads),
        "single product, compiled": (replayed(lambda: fused.matvec(v)), reads),
        "single product, compiled and replayed": (replayed(replay_fused), reads),
        f"block of {BLOCK}": (lambda: at.yy(w), max(reads, multiplies)),
        f"{CG_STEPS} CG iterations": (plain, CG_STEPS * reads),
        f"{CG_STEPS} CG iterations, replayed": (replayed(iterations(own, False)), CG_STEPS * reads),
        f"{CG_STEPS} CG iterations, compiled and replayed": (replayed(iterations(fused, False)), CG_STEPS * reads),
        f"{CG_STEPS} CG iterations, reorthogonalised": (kept, CG_STEPS * reads),
        f"{CG_STEPS} CG iterations, reorthogonalised, replayed": (replayed(iterations(own, True)), CG_STEPS * reads),
    }
    if outputs is not None:
        H = outputs.dense_yy()
        runs["g_yy from the outputs"] = (outputs.dense_yy, dense)
        runs["its Cholesky factor"] = (lambda: torch.linalg.cholesky_ex(H), gpu.dy**3 / 3 / rate)
        factor = CholeskyFactor(H)
        inverse = factor.preconditioner()
        runs["two triangular solves"] = (lambda: factor.solve(v), gpu.dy**2 * size / speed)
        runs["a product with its inverse"] = (lambda: inverse(v), gpu.dy**2 * size / speed)
    times = interleaved({name: run for name, (run, _) in runs.items()}, args.repeats, warmup=3, max_seconds=args.max_seconds)
    rows = []
    for name, spread in times.items():
        run, floor = runs[name]
        memory, _ = cuda_peak_memory(run)
        rows.append([name, spread, floor * 1e3, f"{100 * floor / spread.median:.0f} %", memory])
    print(f"\n## {setting.name}: products on the GPU ({speed / 1e12:.2f} TB/s, {rate / 1e12:.1f} TFLOP/s)\n")
    print(markdown(["what", "ms", "floor, ms", "share of the floor's rate", "peak MB"], rows), flush=True)
    return {"seconds": times, "floors": {name: floor for name, (_, floor) in runs.items()}, "bandwidth": speed, "rate": rate}


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
    record: dict = {}
    for setting in [softmax(True)] if args.quick else [softmax(), softmax(n=50_000)]:
        record[f"products, {setting.name}"] = products(setting, args)
        finish(args, record)
    small, middle = (40, 4, 3), (1000, 8, 10)
    for sizes in (small,) if args.quick else (middle, (5000, 28, 10)):
        setting = solved(synthetic_cleaning(*sizes))
        record[setting.name] = both_devices(setting, args)
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
