"""A loss with its gradient and its products as one graph of operations, cut into programs that are compiled.

What does not depend on the direction of a product is a first program, run once at a point; it hands over what the second
program of each kind of product takes from the point.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager

import torch
from torch import Tensor, fx

from ..errors import BilevelError, ProblemError
from ..folding import opaque_products
from .graph import Recorded

#: a kind of product: the names of what has a direction, and of the parts that are wanted, of x and y: (("y",), ("y",), None) is
#: h_yy w; or also of z0, z1 ..., the outputs of the linear calls of a ``Phi``, with the number of directions in a stack
Kind = tuple[tuple[str, ...], tuple[str, ...], "int | None"]

#: made again where they are needed, for nothing is computed
VIEWS = frozenset((
    "alias", "detach", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
))  # fmt: skip


class Trace:
    """h(x, y, *data), its gradient, and products of some kinds, compiled where they are first asked for.

    Args:
        record: (x, y, *data) -> what a point of h is recorded as. inputs: x, y, data: an example; shapes must stay.
        kinds: of products, with an example of their directions. what: how messages name h. known: what other traces of h have
            compiled, by ``_signature``; it is used again and added to.

    Tensors that the loss takes from elsewhere are read anew at every run; what is not a tensor is as it was here.

    Raises:
        ProblemError: the loss makes Python depend on values or draws random numbers; or, where it is first run, cannot be
            compiled on this machine.
    """

    def __init__(
        self, record: Callable[..., Recorded], inputs: list[Tensor], kinds: dict[Kind, list[Tensor]], what: str,
        known: dict[tuple, Callable],
    ):  # fmt: skip
        from torch.fx.experimental.proxy_tensor import make_fx  # a second, for those who want it

        self.kinds, self.what, self._known = tuple(kinds), what, known
        labels: list[object] = []
        given = [v.detach() for directions in kinds.values() for v in directions]  # each a tensor of its own

        def everything(*arguments: Tensor) -> list[Tensor]:
            rest = iter(arguments)
            directions = {kind: [next(rest) for _ in examples] for kind, examples in kinds.items()}
            at = record(*rest)
            found = {"h": at.value, "x": at.gx, "y": at.gy}
            for kind in kinds:
                found |= {(kind, name): part for name, part in zip(kind[1], _product(at, kind, directions[kind]))}
            labels[:] = [label for label, value in found.items() if value is not None]
            return [found[label] for label in labels]

        with self._explained("traced"), opaque_products(), torch.compiler.set_stance("force_eager"):
            arguments = [*given, *(t.detach() for t in inputs)]
            whole, self.constants = _lifted(make_fx(everything)(*arguments))
            self._whole = make_fx(torch.func.functionalize(whole))(*arguments, *self.constants)
        places = [node for node in self._whole.graph.nodes if node.op == "placeholder"]
        rest = iter(places)
        self._directions = {kind: [next(rest) for _ in examples] for kind, examples in kinds.items()}
        self._sources = list(rest)
        self._outputs = dict(zip(labels, self._whole.graph.output_node().args[0]))
        self._free = self._independent(places[: len(given)])
        self._needed = {kind: self._taken(self._of(kind)) for kind in self.kinds}
        self._kept = list(dict.fromkeys(n for nodes in self._needed.values() for n in nodes if n.op != "placeholder"))
        self._compiled: dict[object, Callable] = {}

    def gradient(self, inputs: list[Tensor], wrt: str) -> list[Tensor]:
        """h and those parts of its gradient that ``wrt`` names."""
        return self._run(("h", *wrt), self._sources, [self._outputs[part] for part in ("h", *wrt)], [*inputs, *self.constants])

    def begin(self, inputs: list[Tensor], wrt: str) -> tuple[list[Tensor], dict[fx.Node, Tensor]]:
        """The same, and what products take from this point."""
        outputs = [self._outputs[part] for part in ("h", *wrt)]
        arguments = [*inputs, *self.constants]
        found = self._run(("begin", *wrt), self._sources, outputs + self._kept, arguments)
        return found[: len(outputs)], dict(zip(self._sources, arguments)) | dict(zip(self._kept, found[len(outputs) :]))

    def product(self, kind: Kind, point: dict[fx.Node, Tensor], directions: list[Tensor]) -> list[Tensor | None]:
        """Hess h times the directions of this kind, part by part, at a point where it began; None stands for zero."""
        needed = self._needed[kind]
        arguments = [*(point[node] for node in needed), *directions]
        found = iter(self._run(kind, needed + self._directions[kind], self._of(kind), arguments))
        return [next(found) if (kind, name) in self._outputs else None for name in kind[1]]

    def _of(self, kind: Kind) -> list[fx.Node]:
        return [self._outputs[kind, name] for name in kind[1] if (kind, name) in self._outputs]

    def _run(self, key: object, inputs: list[fx.Node], outputs: list[fx.Node], arguments: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            if key not in self._compiled:
                module = self._module(inputs, outputs)
                signature = _signature(module.graph, arguments)
                if signature not in self._known:
                    with self._explained("compiled"):
                        self._known[signature] = compiled(module, arguments)
                self._compiled[key] = self._known[signature]
            return list(self._compiled[key](*arguments))

    def _independent(self, directions: list[fx.Node]) -> set[fx.Node]:
        """The nodes that no direction reaches."""
        free: set[fx.Node] = set()
        for node in self._whole.graph.nodes:
            if node not in directions and all(parent in free for parent in node.all_input_nodes):
                free.add(node)
                if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                    raise ProblemError(f"compile: {self.what} draws random numbers ({node.target}); pass compile=False")
        return free

    def _taken(self, outputs: list[fx.Node]) -> list[fx.Node]:
        """What these outputs take from a point: nodes that no direction reaches, but for views."""
        found, seen, stack = [], set(), list(outputs)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self._free and not _is_view(node):
                found.append(node)
            else:
                stack.extend(node.all_input_nodes)
        return found

    def _module(self, inputs: list[fx.Node], outputs: list[fx.Node]) -> fx.GraphModule:
        """The operations between these."""
        needed, stack = set(inputs), list(outputs)
        while stack:
            node = stack.pop()
            if node not in needed:
                needed.add(node)
                stack.extend(node.all_input_nodes)
        graph = fx.Graph()
        copies = {node: graph.placeholder(node.name) for node in inputs}
        for node in self._whole.graph.nodes:
            if node in needed and node not in copies:
                copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output([copies[node] for node in outputs])
        return fx.GraphModule(self._whole, graph)

    @contextmanager
    def _explained(self, what: str):
        try:
            yield
        except BilevelError:
            raise
        except Exception as error:
            text = (str(error).strip() or "no message").splitlines()[0]
            raise ProblemError(
                f"compile: {self.what} cannot be {what} ({type(error).__name__}: {text}); take decisions of Python that depend on"
                " values of tensors out of it, or pass compile=False"
            ) from error


def _product(at: Recorded, kind: Kind, directions: list[Tensor]) -> list[Tensor | None]:
    given, wanted, columns = kind
    along = dict(zip(given, directions))
    if columns is None:
        parts = dict(zip("xy", at.apply(along.get("x"), along.get("y"), "".join(wanted))))
        return [parts[name] for name in wanted]
    leaves = {"x": at.x, "y": at.y} | {f"z{i}": z for i, z in enumerate(at.zs)}
    return at.second({leaves[name]: v for name, v in along.items()}, [leaves[name] for name in wanted], batched=True)


def compiled(module: fx.GraphModule, arguments: list[Tensor]) -> Callable[..., Iterable[Tensor]]:
    """By the compiler behind ``torch.compile``; what it makes is kept on disk, for the next process."""
    import torch._inductor

    return torch._inductor.compile(module, arguments)


def _signature(graph: fx.Graph, arguments: list[Tensor]) -> tuple:
    """Equal for graphs of the same operations on arguments of the same kind, whatever their nodes are called.

    One with tensors or modules of its own is equal to none: they go by names, which mean others in another trace.
    """
    if any(node.op in ("get_attr", "call_module") for node in graph.nodes):
        return (object(),)
    places = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    operations = []
    for node in graph.nodes:
        arguments_of = fx.node.map_arg((node.args, node.kwargs), places.get)
        operations.append((node.op, "" if node.op == "placeholder" else str(node.target), repr(arguments_of)))
    return tuple(operations), tuple((t.shape, t.stride(), t.dtype, t.device) for t in arguments)


def _is_view(node: fx.Node) -> bool:
    return getattr(getattr(node.target, "overloadpacket", None), "__name__", "") in VIEWS


def _lifted(module: fx.GraphModule) -> tuple[fx.GraphModule, list[Tensor]]:
    """Tensors that are part of a module as further arguments, so that it reads what they hold when it is run."""
    graph, constants, places = module.graph, [], {}
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    for node in [node for node in graph.nodes if node.op == "get_attr"]:
        tensor = getattr(module, node.target)
        if id(tensor) not in places:
            with graph.inserting_after(last):
                last = places[id(tensor)] = graph.placeholder(f"constant_{len(constants)}")
            constants.append(tensor.detach())
        node.replace_all_uses_with(places[id(tensor)])
        graph.erase_node(node)
    module.recompile()
    return module, constants
