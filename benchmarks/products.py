"""The cost of a product with the lower Hessian: single, and per vector in blocks, against closed forms; and its memory.

    python -m benchmarks.products --data-dir DATA --threads 2 [--json FILE]

Products come from one recorded gradient (``Linearisation.yy``), as every solver of the library takes them. Floors: for
a softmax layer the closed form, two matrix products a block; for the MLP its matrix products alone, six a layer and
four less at the ends. Before that, thin float64 products filled up or not, cross entropies, and float32 products by MKL and by
oneDNN.
Memory: the rise of the resident set while a block is multiplied; 'recorded' is what the recorded graph holds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import torch_bilevel as tb
from benchmarks.common import begin, finish, interleaved, markdown, number, parser_of, peak_memory
from benchmarks.floors import closed_form, mlp_matmuls
from benchmarks.problems import Setting, images
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective
from torch_bilevel.folding import has_onednn, mkl_is_held_back, onednn, turn_over
from torch_bilevel.recorded import losses as fast

BLOCKS = (1, 4, 16, 64, 256)


@dataclass
class Case:
    """One lower level; ``floor(k)`` makes the function that computes a block of k by hand, None where there is none."""

    name: str
    problem: tb.BilevelProblem
    floor: Callable[[int], Callable[[], object]] | None = None
    blocks: tuple[int, ...] = BLOCKS


def layered(name: str, n: int, side: int, hidden: tuple[int, ...], classes: int, dtype: torch.dtype) -> Case:
    """A softmax layer or a tanh MLP on n synthetic images, one L2 weight per feature."""
    inputs, labels = images(n, side, classes, 0)
    sizes = (side * side, *hidden, classes)
    data = (inputs.to(dtype), labels)
    x = torch.full((side * side,), -6.0, dtype=dtype)
    setting = Setting(name, sizes, not hidden, "log_l2", 1e-3, data, data, x)
    setting.y = 0.05 * torch.randn(setting.dy, generator=torch.Generator().manual_seed(0)).to(dtype)
    by_hand = closed_form(setting)
    if by_hand is None:
        return Case(name, setting.problem(), lambda k: mlp_matmuls(data[0], sizes, k), BLOCKS[:4])
    point = by_hand.at(setting.x)

    def floor(k: int) -> Callable[[], Tensor]:
        V = torch.randn(k, classes, point.X.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
        return lambda: point.block(V)

    return Case(name, setting.problem(), floor)


def conv(n: int, side: int = 28) -> Case:
    """Two strided convolutions and a linear layer on n synthetic images, one weight per sample; float32."""
    inputs, labels = images(n, side, 10, 0)
    inputs = inputs.float().view(n, 1, side, side)
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 8, 3, stride=2), nn.Tanh(), nn.Conv2d(8, 16, 3, stride=2), nn.Tanh(), nn.Flatten()]
    width = nn.Sequential(*body)(inputs[:1]).shape[1]
    learner = nn.Sequential(*body, nn.Linear(width, 10))

    def lower(learner: nn.Module, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        losses = cross_entropy(learner(batch[0]), batch[1], reduction="none")
        return (x.sigmoid() * losses).mean() + 1e-2 * sum(p.square().sum() for p in learner.parameters())

    def upper(learner: nn.Module, x: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(learner(batch[0]), batch[1])

    data = (inputs, labels)
    problem = tb.BilevelProblem(learner, torch.zeros(n), lower, upper, data, data)
    return Case(f"conv, {n} images", problem, None, BLOCKS[:4])


def measure(case: Case, args) -> dict:
    """Milliseconds per vector and memory for every block size, the library's and the floor's in turns."""
    problem = case.problem
    record: dict = {"dy": problem.dy}
    h = Objective(problem, lower=1.0, counts=OracleCounts())
    h.linearise(problem.x, problem.y, "y")  # what PyTorch loads on first use is not the graph's
    recorded, at = peak_memory(lambda: h.linearise(problem.x, problem.y, "y"))
    rows = []
    for k in case.blocks:
        V = torch.randn(problem.dy, k, generator=torch.Generator().manual_seed(2)).to(problem.dtype)
        right = V[:, 0].contiguous() if k == 1 else V
        runs: dict[str, Callable[[], object]] = {"ours": lambda right=right: at.yy(right)}
        if case.floor is not None:
            runs["floor"] = case.floor(k)
        times = interleaved(runs, args.repeats, max_seconds=args.max_seconds / len(case.blocks))
        memory, _ = peak_memory(runs["ours"])
        ours, floor = times["ours"], times.get("floor")
        low, high = ours.quartiles
        rows.append([k, f"{number(ours.median * 1e3 / k)} ({number(low * 1e3 / k)}-{number(high * 1e3 / k)})",
                     None if floor is None else floor.median * 1e3 / k,
                     None if floor is None else ours.median / floor.median, memory])  # fmt: skip
        record[str(k)] = {"seconds": times, "peak_mb": memory}
    print(f"\n## {case.name}: dy = {problem.dy}, {str(problem.dtype)[6:]}; recorded {number(recorded)} MB\n")
    print(markdown(["block", "ours, ms a vector", "floor, ms a vector", "ours / floor", "peak MB"], rows), flush=True)
    return {**record, "recorded_mb": recorded}


def cases(quick: bool) -> list[Callable[[], Case]]:
    """Makers, so that only one is in memory."""
    if quick:
        return [lambda: layered("softmax 50 x 9 x 2", 50, 3, (), 2, torch.float64),
                lambda: layered("MLP 16-8-3", 30, 4, (8,), 3, torch.float32), lambda: conv(6, 12)]  # fmt: skip
    return [
        lambda: layered("softmax 478 x 9 x 2", 478, 3, (), 2, torch.float64),
        lambda: layered("softmax 5000 x 784 x 10", 5000, 28, (), 10, torch.float32),
        lambda: layered("MLP 784-256-128-10, 1000 images", 1000, 28, (256, 128), 10, torch.float32),
        lambda: conv(200),
    ]


def libraries(args) -> dict:
    """float32 products by MKL, thin ones in their better order, and by oneDNN, in turns; see ``folding.multiply``."""
    n, d, K, size = (200, 30, 10, 100) if args.quick else (5000, 784, 10, 2000)
    gen = torch.Generator().manual_seed(0)
    A, X, V, Z = (torch.randn(*shape, generator=gen) for shape in ((size, size), (n, d), (d, K), (n, K)))
    part = torch.randn(size // 4, size // 4 + 3, generator=gen)[:, 3:]
    small = torch.randn(size // 4, size // 4, generator=gen)
    runs = {
        f"{size}^3": (lambda: A @ A, lambda: onednn(A, A.mT)),
        f"X V, X ({n}, {d}), V ({d}, {K})": (lambda: turn_over(X, V), lambda: onednn(X, V.mT)),
        f"X' Z, Z ({n}, {K})": (lambda: turn_over(X.mT, Z), lambda: onednn(Z.mT, X.mT).mT.contiguous()),
        f"({size // 4})^3, the second a part of a matrix, not copied": (
            lambda: small @ part.mT, lambda: torch.ops.mkldnn._linear_pointwise(small, part, None, "none", [], "")),
    }  # fmt: skip
    rows, found = [], {}
    for name, (mkl, dnn) in runs.items():
        found[name] = interleaved({"MKL": mkl, "oneDNN": dnn}, args.repeats, max_seconds=args.max_seconds)
        rows.append([name, found[name]["MKL"], found[name]["oneDNN"]])
    print("\n## Which library multiplies\n\nMKL is" + ("" if mkl_is_held_back() else " not") + " held back on this processor.\n")
    print(markdown(["float32 product", "MKL, ms", "oneDNN, ms"], rows))
    return found


def filled(args) -> dict:
    """Thin float64 products as they are and filled up to a multiple of four columns, in turns; see ``folding.turn_over``."""
    n, d, K = (2000, 60, 10) if args.quick else (5000, 784, 10)
    gen = torch.Generator().manual_seed(0)
    X, V, Z = (torch.randn(*shape, generator=gen, dtype=torch.float64) for shape in ((n, d), (d, K), (n, K)))
    rows, found = [], {}
    for name, a, b in ((f"X V, X ({n}, {d}), V ({d}, {K})", X, V), (f"X' Z, Z ({n}, {K})", X.mT, Z)):
        runs = {"as it is": lambda a=a, b=b: (b.mT @ a.mT).mT.contiguous(), "filled": lambda a=a, b=b: turn_over(a, b)}
        found[name] = interleaved(runs, args.repeats, max_seconds=args.max_seconds)
        rows.append([name, found[name]["as it is"], found[name]["filled"]])
    print("\n## Thin float64 products, turned over\n")
    print(markdown(["product", "as it is, ms", "filled up, ms"], rows))
    return found


def losses(args) -> dict:
    """Cross entropies of ten classes by PyTorch's kernels and by ``outputs.losses``, in turns: a recorded gradient, a product."""
    n, K = (500, 10) if args.quick else (5000, 10)
    rows, found = [], {}
    for dtype in (torch.float32, torch.float64):
        gen = torch.Generator().manual_seed(0)
        z, v = (torch.randn(n, K, generator=gen, dtype=dtype) for _ in range(2))
        z, labels = z.requires_grad_(True), torch.randint(K, (n,), generator=gen)

        def recorded(loss: Callable, z: torch.Tensor = z, labels: torch.Tensor = labels) -> torch.Tensor:
            return torch.autograd.grad(loss(z, labels), z, create_graph=True)[0]

        both = {"PyTorch": cross_entropy, "ours": fast.cross_entropy}
        for name in ("gradient, recorded", "product"):
            if name == "product":
                graphs = {who: recorded(loss) for who, loss in both.items()}
                runs = {who: lambda g=g, z=z, v=v: torch.autograd.grad(g, z, v, retain_graph=True) for who, g in graphs.items()}
            else:
                runs = {who: lambda loss=loss, recorded=recorded: recorded(loss) for who, loss in both.items()}
            times = interleaved(runs, 3 * args.repeats, max_seconds=args.max_seconds)
            label = f"{name}, {str(dtype)[6:]}"
            found[label] = times
            rows.append([label, times["PyTorch"], times["ours"]])
    print(f"\n## Cross entropy of {n} samples, {K} classes\n")
    print(markdown(["", "PyTorch's, ms", "ours, ms"], rows))
    return found


def main(argv: list[str] | None = None) -> dict:
    parser = parser_of(__doc__)
    args = begin(parser, argv)
    record: dict = {"filled": filled(args), "losses": losses(args)}
    if has_onednn():
        record["libraries"] = libraries(args)
        finish(args, record)
    for make in cases(args.quick):
        case = make()
        record[case.name] = measure(case, args)
        finish(args, record)
    return record


if __name__ == "__main__":
    main()
