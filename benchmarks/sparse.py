"""SparseMatrix against PyTorch's own sparse products and against dense ones, on 20 Newsgroups or a made-up like of it.

    OMP_NUM_THREADS=1 python -m benchmarks.sparse [--data-dir DIR]

X is 5657 x 130,107 with 0.9 million entries, W has 20 columns, float32; median of the repetitions, in milliseconds.
`torch.sparse.mm` is run outside torch.func: inside, CSR raises and COO has no vmap rule. The last rows are one gradient
of the softmax loss and one product with its recorded Hessian, which PyTorch's own products cannot give there.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import torch_bilevel as tb
from torch_bilevel.counting import OracleCounts
from torch_bilevel.derivatives import Objective, load_torch_func

ROWS, FEATURES, CLASSES, ENTRIES = 5657, 130_107, 20, 901_498


def data(data_dir: str | None) -> tb.SparseMatrix:
    """TF-IDF of 20 Newsgroups, or random entries of the same number where no folder is given."""
    if data_dir is not None:
        from experiments.newsgroups import load

        return load(data_dir).train.inputs
    generator = torch.Generator().manual_seed(0)
    popular = torch.rand(ENTRIES, generator=generator).pow(6)  # a few features have most of the entries
    places = torch.stack([torch.randint(ROWS, (ENTRIES,), generator=generator), (popular * FEATURES).long()])
    return tb.SparseMatrix(
        torch.sparse_coo_tensor(places, torch.rand(ENTRIES, generator=generator) / 10, (ROWS, FEATURES))
    )


def milliseconds(call: Callable[[], object], repetitions: int) -> float:
    call()
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def measure(X: tb.SparseMatrix, repetitions: int = 15) -> dict[str, float]:
    """Label -> milliseconds."""
    generator = torch.Generator().manual_seed(1)
    n, d = X.shape
    W, V = torch.randn(d, CLASSES, generator=generator), torch.randn(n, CLASSES, generator=generator)
    csr = X.to_sparse_csr()
    coo = csr.to_sparse_coo()
    labels = torch.arange(n) % CLASSES

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        W = w.reshape(d, CLASSES)
        return torch.nn.functional.cross_entropy(X @ W, labels) + (x.exp() * W.square().sum(1)).mean()

    load_torch_func()
    problem = tb.BilevelProblem.from_functions(loss, loss, torch.zeros(d), torch.zeros(d * CLASSES))
    g = Objective(problem, lower=1.0, counts=OracleCounts())
    x, w = problem.x, problem.y
    at = g.linearise(x, w, "y")
    calls = {
        "X W, SparseMatrix": lambda: X @ W,
        "X W, torch.sparse.mm, CSR": lambda: torch.sparse.mm(csr, W),
        "X W, torch.sparse.mm, COO": lambda: torch.sparse.mm(coo, W),
        "X'V, SparseMatrix": lambda: X.T @ V,
        "X'V, torch.sparse.mm, COO": lambda: torch.sparse.mm(coo.t(), V),
        "gradient": lambda: g.gradient(x, w, "y"),
        "Hessian product": lambda: at.yy(w + 1),
    }
    return {label: milliseconds(call, repetitions) for label, call in calls.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", help="folder with 20news; default: made-up entries")
    X = data(parser.parse_args().data_dir)
    print(X)
    for label, ms in measure(X).items():
        print(f"{label:28s} {ms:8.1f} ms")


if __name__ == "__main__":
    main()
