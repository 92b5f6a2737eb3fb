"""SparseMatrix against dense products to third order, in batches, under vmap, in checkpoints; its errors."""

from __future__ import annotations

import io

import pytest
import torch
from torch.func import grad, hessian, jacfwd, jacrev, vmap

import torch_bilevel as tb
from torch_bilevel import folding
from torch_bilevel.derivatives import Objective
from torch_bilevel.problem import is_loader
from torch_bilevel.sparse import samples

DTYPES = [torch.float32, torch.float64]
TARGETS = torch.randn(15, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def dense(n: int = 15, d: int = 7, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(n, d, generator=generator, dtype=torch.float64)
    keep = torch.rand(n, d, generator=generator) < 0.3
    keep[3] = False  # an empty row
    keep[:, 2] = False  # a feature that never occurs
    return (X * keep).to(dtype)


def loss_of(A):
    """A function of W (d, 2) whose third derivatives mix all of its entries."""
    return lambda W: (A @ W).sin().square().sum() * W.pow(3).sum() + (A @ W[:, 0]).pow(4).sum()


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_keep_dtype_and_agree_with_dense(dtype: torch.dtype) -> None:
    D = dense(dtype=dtype)
    X = tb.SparseMatrix(D)
    W = torch.randn(7, 4, dtype=dtype)
    assert (X.shape, X.dtype, X.device, X.nnz, len(X)) == ((15, 7), dtype, D.device, int((D != 0).sum()), 15)
    for product, expected in (
        (X @ W, D @ W),
        (X @ W[:, 1], D @ W[:, 1]),
        (X.T @ D, D.T @ D),
        (X @ W.T.clone().T, D @ W),
    ):
        assert product.dtype == dtype
        torch.testing.assert_close(product, expected)
    assert torch.equal(X.to_dense(), D)
    assert torch.equal(X.to_sparse_csr().to_dense(), D)
    assert X.T.T is X


@pytest.mark.parametrize(
    "derivative", [grad, hessian, lambda f: jacrev(hessian(f)), lambda f: jacfwd(jacrev(jacrev(f)))]
)
def test_derivatives_to_third_order_agree_with_dense(derivative) -> None:
    D = dense()
    W = torch.randn(7, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(
        derivative(loss_of(tb.SparseMatrix(D)))(W), derivative(loss_of(D))(W), rtol=1e-12, atol=1e-12)  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap_is_one_product_of_blocks(dtype: torch.dtype, in_dim: int) -> None:
    D = dense(dtype=dtype)
    X = tb.SparseMatrix(D)
    block = torch.randn(5, 7, 3, dtype=dtype).movedim(0, in_dim)
    torch.testing.assert_close(vmap(lambda W: X @ W, in_dim)(block), vmap(lambda W: D @ W, in_dim)(block))
    torch.testing.assert_close(
        vmap(grad(lambda w: (X @ w).pow(3).sum()))(D), vmap(grad(lambda w: (D @ w).pow(3).sum()))(D))  # fmt: skip
    W = block.movedim(in_dim, 0)[0]  # the matrix of all columns constant, another argument batched
    torch.testing.assert_close(
        vmap(lambda a: a * (X @ W))(torch.arange(2.0, dtype=dtype)), torch.stack([0 * (D @ W), D @ W])
    )


def test_linear_layers_take_it() -> None:
    D = dense(dtype=torch.float32)
    for layer in (torch.nn.Linear(7, 3), torch.nn.Linear(7, 3, bias=False)):
        torch.testing.assert_close(layer(tb.SparseMatrix(D)), layer(D))
    torch.testing.assert_close(torch.matmul(tb.SparseMatrix(D), D.T), D @ D.T)


def test_rows_are_mini_batches() -> None:
    D = dense()
    X = tb.SparseMatrix(D)
    for index in ([4, 4, 3, 0], [], [14]):
        index = torch.tensor(index, dtype=torch.int64)
        assert torch.equal(X.rows(index).to_dense(), D[index])
        torch.testing.assert_close(X.rows(index).T @ D[index], D[index].T @ D[index])


def sources():
    scipy = pytest.importorskip("scipy.sparse")
    D = dense()
    repeated = scipy.coo_matrix(([1.0, 2.0], ([0, 0], [1, 1])), shape=(15, 7))
    yield from ((D.numpy(), D), (D.to_sparse(), D), (D.to_sparse_csc(), D), (scipy.csr_matrix(D.numpy()), D))
    yield from (
        (scipy.csc_array(D.numpy()), D),
        (repeated, torch.from_numpy(repeated.toarray())),
        (tb.SparseMatrix(D), D),
    )


def test_made_from_scipy_torch_and_numpy() -> None:
    for source, expected in sources():
        X = tb.SparseMatrix(source)
        assert X.dtype == torch.float64
        assert torch.equal(X.to_dense(), expected)
    counts = tb.SparseMatrix((dense() != 0).to(torch.int64))
    assert counts.dtype == torch.float32


def test_errors_say_what_fits() -> None:
    X = tb.SparseMatrix(dense())
    with pytest.raises(tb.ShapeError, match=r"expected \(7,\) or \(7, k\), got \(15, 2\)"):
        X @ torch.zeros(15, 2, dtype=torch.float64)
    with pytest.raises(tb.ShapeError, match="float64 on cpu, the tensor torch.float32"):
        X @ torch.zeros(7)
    with pytest.raises(tb.ShapeError, match=r"matrix \(n, d\), got shape \(3,\)"):
        tb.SparseMatrix(torch.zeros(3))
    with pytest.raises(tb.ShapeError, match="within 0..14"):
        X.rows(torch.tensor([15]))
    wrong = (lambda: tb.SparseMatrix("counts"), lambda: X.to(torch.half), lambda: tb.SparseMatrix(X, dtype=torch.int64))
    for call in wrong:
        with pytest.raises(tb.ProblemError, match="expected"):
            call()
    for call in (lambda: torch.relu(X), lambda: torch.zeros(2, 15, dtype=torch.float64) @ X):
        with pytest.raises(tb.ProblemError, match="not among its operations"):
            call()
    with pytest.raises(TypeError):
        X @ [1.0]


def regression(batch, dtype=torch.float64, **options):
    learner = torch.nn.Linear(7, 2, dtype=dtype)
    torch.nn.init.zeros_(learner.weight)

    def lower(learner, hyper, batch):
        inputs, targets = batch
        penalty = (hyper.exp() * learner.weight.square()).sum() + learner.bias.square().sum()
        return (learner(inputs) - targets).square().mean() + penalty

    def upper(learner, hyper, batch):
        return torch.nn.functional.cross_entropy(learner(batch[0]), batch[1].softmax(1))

    return tb.BilevelProblem(learner, torch.zeros(7, dtype=dtype), lower, upper, batch, batch, **options)


def test_bilevel_problem_has_the_hypergradient_and_hessian_of_dense_data() -> None:
    D, targets = dense(), TARGETS
    sparse, plain = (tb.ImplicitOracle(regression((X, targets))).evaluate() for X in (tb.SparseMatrix(D), D))
    torch.testing.assert_close(sparse.gradient, plain.gradient, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(sparse.hessian.to_dense(), plain.hessian.to_dense(), rtol=1e-8, atol=1e-11)


def test_loader_of_sparse_chunks_weighs_them_by_their_rows() -> None:
    D, targets = dense(), TARGETS
    X = tb.SparseMatrix(D)
    cuts = [torch.arange(0, 4), torch.arange(4, 15)]
    chunked = regression((X, targets)).at(Loader([(X.rows(i), targets[i]) for i in cuts]))
    whole = regression((X, targets))
    for problem in (chunked, whole):
        problem.ev = tb.ImplicitOracle(problem).evaluate()
    torch.testing.assert_close(chunked.ev.gradient, whole.ev.gradient, rtol=1e-8, atol=1e-11)
    assert not is_loader(X)
    assert samples({"ids": None, "X": X, "t": targets[:3]}) == 15
    assert samples((torch.tensor(1.0), "text")) is None


class Loader:
    def __init__(self, chunks):
        self.chunks = chunks

    def __iter__(self):
        return iter(self.chunks)


def test_batch_is_moved_with_the_problem() -> None:
    X = tb.SparseMatrix(dense())
    problem = regression((X, TARGETS))
    problem.device = torch.device("meta")  # a device that is at hand everywhere
    moved = problem._place({"docs": (X, "name")})
    assert moved["docs"][0].device.type == "meta"
    assert moved["docs"][0].shape == X.shape
    assert moved["docs"][1] == "name"
    assert X.to("cpu") is X
    half = X.to(torch.float32)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.T @ torch.ones(15), X.to_dense().sum(0).float())


def test_optimizer_state_holds_it_and_resumes() -> None:
    D, targets = dense(), TARGETS

    def optimizer():
        problem = regression((tb.SparseMatrix(D), targets))
        return tb.BilevelOptimizer(problem.learner, problem.hyper, lower_loss=problem._losses["lower"],
                                   upper_loss=problem._losses["upper"], method="lfsba", hessian="krylov",
                                   solver="cg")  # fmt: skip

    first, batch = optimizer(), (tb.SparseMatrix(D), targets)
    for _ in range(2):
        first.step(batch, batch)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second = optimizer()
    second.load_state_dict(torch.load(stream, weights_only=True))
    expected, got = first.step(batch, batch), second.step((tb.SparseMatrix(D), targets), (tb.SparseMatrix(D), targets))
    assert got.value == expected.value
    assert torch.equal(first.problem.x, second.problem.x)


@pytest.mark.gpu
def test_on_cuda() -> None:
    D = dense(dtype=torch.float32).cuda()
    X = tb.SparseMatrix(D)
    assert X.device.type == "cuda"
    torch.testing.assert_close(hessian(loss_of(X))(D.new_ones(7, 2)), hessian(loss_of(D))(D.new_ones(7, 2)))


def test_blocks_of_recorded_products_agree_with_single_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "SMALL", 0)  # as for larger problems, whose blocks fold products
    problem = regression((tb.SparseMatrix(dense()), TARGETS))
    at = Objective(problem, lower=1.0, counts=tb.OracleCounts()).linearise(problem.x, problem.y + 0.1)
    block = torch.randn(problem.dy, 5, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for together, alone in zip(at.to_x(block), zip(*(at.to_x(column) for column in block.T))):
        torch.testing.assert_close(together, torch.stack(alone, 1), rtol=1e-12, atol=1e-12)
    assert at._graph._has_vmap
