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

#: which directions a product is given, and which parts of it are wanted: ("y", "y") is h_yy w, ("xy", "xy") all of it
Kind = tuple[str, str]

#: made again where they are needed, for nothing is computed
VIEWS = frozenset((
    "alias", "detach", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "slice", "select", "unsqueeze", "squeeze",
))  # fmt: skip


class Trace:
    """h(x, y, *data), its gradient, and products of some kinds, compiled where they are first asked for.

    Args:
        record: (x, y, *data) -> what a point of h is recorded as. inputs: x, y, data: an example; shapes must stay.
        kinds: of products. what: how messages name h.

    Tensors that the loss takes from elsewhere are read anew at every run; what is not a tensor is as it was here.

    Raises:
        ProblemError: the loss makes Python depend on values or draws random numbers; or, where it is first run, cannot be
            compiled on this machine.
    """

    def __init__(self, record: Callable[..., Recorded], inputs: list[Tensor], kinds: Iterable[Kind], what: str):
        from torch.fx.experimental.proxy_tensor import make_fx  # a second, for those who want it

        self.kinds, self.what = tuple(kinds), what
        x, y, *data = (t.detach() for t in inputs)
        labels: list[str | Kind] = []

        def everything(x: Tensor, y: Tensor, u: Tensor, w: Tensor, *data: Tensor) -> list[Tensor]:
            at = record(x, y, *data)
            found = [("h", at.value), ("x", at.gx), ("y", at.gy)]
            for given, wanted in self.kinds:
                parts = at.apply(u if "x" in given else None, w if "y" in given else None, wanted)
                found += [((given, letter), parts["xy".index(letter)]) for letter in wanted]
            labels[:] = [label for label, _ in found]
            return [value for _, value in found]

        with self._explained("traced"), opaque_products(), torch.compiler.set_stance("force_eager"):
            arguments = [x, y, torch.ones_like(x), torch.ones_like(y), *data]
            whole, self.constants = _lifted(make_fx(everything)(*arguments))
            self._whole = make_fx(torch.func.functionalize(whole))(*arguments, *self.constants)
        places = [node for node in self._whole.graph.nodes if node.op == "placeholder"]
        self._directions = dict(zip("xy", places[2:4]))
        self._sources = places[:2] + places[4:]
        self._outputs = dict(zip(labels, self._whole.graph.output_node().args[0]))
        self._free = self._independent()
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

    def product(self, kind: Kind, point: dict[fx.Node, Tensor], directions: list[Tensor]) -> list[Tensor]:
        """Hess h times the directions, letter by letter of ``kind``, at a point where it began."""
        needed = self._needed[kind]
        inputs = needed + [self._directions[letter] for letter in kind[0]]
        return self._run(kind, inputs, self._of(kind), [*(point[node] for node in needed), *directions])

    def _of(self, kind: Kind) -> list[fx.Node]:
        given, wanted = kind
        return [self._outputs[given, letter] for letter in wanted]

    def _run(self, key: object, inputs: list[fx.Node], outputs: list[fx.Node], arguments: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            if key not in self._compiled:
                with self._explained("compiled"):
                    self._compiled[key] = compiled(self._module(inputs, outputs), arguments)
            return list(self._compiled[key](*arguments))

    def _independent(self) -> set[fx.Node]:
        """The nodes that no direction reaches."""
        free: set[fx.Node] = set()
        for node in self._whole.graph.nodes:
            if node not in self._directions.values() and all(parent in free for parent in node.all_input_nodes):
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
            elif node not in self._directions.values():
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


def compiled(module: fx.GraphModule, arguments: list[Tensor]) -> Callable[..., Iterable[Tensor]]:
    """By the compiler behind ``torch.compile``; what it makes is kept on disk, for the next process."""
    import torch._inductor

    return torch._inductor.compile(module, arguments)


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
