"""One exported program into a `Graph`: aten operators into ours.

Each operator that has a name here has a function that reads it, in one of the files beside this
one; one that has none, or arguments that ours does not take, stays an "aten" node. What is computed
of parameters alone is folded into a constant, and the masks of attention become an operand of its
softmax.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastq.graph import POINTWISE_NAMESPACE, PRODUCTS, Graph, Node
from fastq.layout import Ref
from fastq.read.exported import (
    Arguments,
    arguments_of,
    is_off,
    memory_of,
    name_of,
    ranked_shape,
    shape_of,
    used_of,
)

POINTWISE = frozenset([
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "hardswish", "hardsigmoid",
    "silu", "gelu", "sigmoid", "tanh", "elu", "leaky_relu", "mish", "softplus", "selu", "celu",
    "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "abs", "neg", "square", "pow", "reciprocal",
    "sin", "cos", "erf", "threshold", "hardshrink", "softshrink", "tanhshrink", "log_sigmoid",
    "softsign", "rsub", "sign", "floor", "ceil", "round", "trunc", "add", "sub", "mul", "div",
    "maximum", "minimum", "fmod", "remainder", "nan_to_num", "logit", "atan2", "rrelu", "exp2",
    "log2", "log10", "atan", "tan", "asin", "acos", "sinh", "cosh", "asinh", "acosh", "atanh",
    "erfc", "frac",
])  # fmt: skip
SAME = frozenset([
    "dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach",
    "lift_fresh_copy", "identity", "to", "_to_copy", "type_as",
])  # fmt: skip
# one of their tensors is of int64
_WITH_INDICES = ("adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool2d_with_indices", "max",
                 "index", "index_select")  # fmt: skip
EXPANDED = ("expand", "expand_as", "broadcast_to")
GROWING = (*EXPANDED, "repeat", "tile")  # with the batch, perhaps
_TAKE_BOOL = ("scaled_dot_product_attention", *EXPANDED)
MAX_TERMS = 8  # of a sum, or parts of a concatenation, that are written one by one
# of what it is called on, only the dtype counts
_FILLED = ("zeros", "ones", "full", "arange", "new_zeros", "new_ones", "new_full")


class CannotCapture(Exception):
    """Why there is no graph of a model."""


class Indirect(CannotCapture):
    """What a second pass of torch's may make plain operators of: a tensor that is changed in place
    and read by another name later, or a graph within the graph, as of a region of autocast."""


Folded = dict[str, Tensor]  # operator's name -> its value, of parameters alone
Read = Callable[["Reader", fx.Node, Arguments], Any]
F = TypeVar("F", bound=Callable[..., Any])

READERS: dict[str, Read] = {}  # operator's name -> what makes a node of it, or None


def reads_any(*names: str) -> Callable[[F], F]:
    """Registers f(reader, node, arguments) for operators of these names."""

    def register(read: F) -> F:
        READERS.update(dict.fromkeys(names, read))
        return read

    return register


def reads(*names: str) -> Callable[[F], F]:
    """Registers f(reader, node, x, arguments) for operators of these names where the first operand,
    x, is a value of the graph."""

    def register(read: F) -> F:
        def read_value(reader: Reader, node: fx.Node, a: Arguments) -> Any:
            x = _first(a)
            return read(reader, node, x, a) if isinstance(x, Node) else None

        reads_any(*names)(read_value)
        return read

    return register


def _first(a: Arguments) -> Any:
    return a.get("self", a.get("input", a.get("query")))


class Reader:
    """One exported program into a Graph."""

    def __init__(
        self, model: nn.Module, program: Any, live: Collection[str] = (), unrolls: bool = True
    ) -> None:
        """live: operators that are not folded; unrolls: some may become as many nodes, or have such
        numbers, as the sizes of this example say."""
        self.model, self.program, self.live, self.unrolls = model, program, live, unrolls
        self.folded: Folded = {}
        self.values: dict[fx.Node, Any] = {}
        self.nodes: list[Node] = []
        self.names: set[str] = set()
        self.flags: set[Node] = set()  # whose values are bool
        self.masks: dict[Any, Node] = {}  # what masks attention -> 1.0 and 0.0 instead
        self.biases: set[Node] = set()  # that masks were taken out of
        self.computed: set[Node] = set()  # what products made, or was made of that
        self.place = {node: i for i, node in enumerate(program.graph.nodes)}
        self.used = used_of(program.graph)
        self.whys: dict[fx.Node, str] = {}  # why an operator that has a name here stays float

    def graph(self) -> Graph:
        signature = self.program.graph_signature
        tensors = {**dict(self.model.named_parameters(remove_duplicate=False)),
                   **dict(self.model.named_buffers(remove_duplicate=False))}  # fmt: skip
        given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        constants = signature.inputs_to_lifted_tensor_constants
        inputs = []
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                if node.name in given:
                    self.values[node] = tensors[given[node.name]].detach()
                elif node.name in constants:
                    self.values[node] = self.program.constants[constants[node.name]]
                elif not isinstance(node.meta.get("val"), Tensor):
                    self.values[node] = node.meta.get("val")  # a number or None: a constant
                else:
                    value = self.add(node, "input")
                    self.values[node] = value
                    inputs.append(value)
            elif node.op == "output":
                flat = node.args[0]
                outputs = [self.values[v] if isinstance(v, fx.Node) else v for v in flat]
            elif node.op == "call_function":
                self.values[node] = self.call(node)
            else:
                raise Indirect(f"{node.name}: {node.op}")
        if signature.buffers_to_mutate or signature.user_inputs_to_mutate:
            raise CannotCapture("the model changes its buffers or its inputs when it is called")
        outputs = [
            self.constant(f"output_{i}", v) if isinstance(v, Tensor) else v
            for i, v in enumerate(outputs)
        ]
        return Graph(self.nodes, inputs, outputs)

    def add(
        self,
        node: fx.Node | str,
        op: str,
        inputs: Sequence[Node] = (),
        *,
        name: str = "",
        attrs: dict[str, Any] | None = None,
        tensors: dict[str, Tensor] | None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Node:
        """A new node. That of an operator is in its layer, and has its name and shape unless others
        are given; one that is a name alone is in no layer."""
        name = name or (node if isinstance(node, str) else node.name)
        while name in self.names:
            name += "_"
        self.names.add(name)
        new = Node(name, op, list(inputs), attrs or {}, tensors or {})
        if isinstance(node, fx.Node):
            stack = list((node.meta.get("nn_module_stack") or {}).values())
            if stack:
                path, kind = stack[-1]
                new.layer = path
                new.kind = (kind if isinstance(kind, str) else kind.__name__).rpartition(".")[2]
            value, new.shape = node.meta.get("val"), shape_of(node)
            if isinstance(value, Tensor) and value.dtype is torch.bool:
                self.flags.add(new)
        if shape is not None:
            new.shape = shape
        if op in PRODUCTS or any(v in self.computed for v in new.inputs):
            self.computed.add(new)
        self.nodes.append(new)
        return new

    def constant(self, name: str, value: Tensor, shape: tuple[int, ...] | None = None) -> Node:
        """A constant, perhaps in another shape: of more than 4 axes it is a view of one of 3."""
        shape = tuple(value.shape) if shape is None else shape
        held = (prod(shape[:-2]), *shape[-2:]) if len(shape) > 4 else shape
        made = self.add(name, "constant", tensors={"value": value.reshape(held)}, shape=held)
        if held == shape:
            return made
        return self.add(f"{name}_{len(shape)}", "reshape", [made], shape=shape,
                        attrs={"groups": reshape_groups(held, shape)})  # fmt: skip

    def call(self, node: fx.Node) -> Any:
        target: Any = node.target
        if not isinstance(target, torch._ops.OpOverload):
            if target is operator.getitem:
                source, index = (self.look_up(value) for value in node.args)
                if isinstance(source, list | tuple):
                    return source[index]
                return self.add(node, "aten", [source], attrs={
                    "target": "getitem", "args": (Ref(0), index), "kwargs": {}})  # fmt: skip
            raise CannotCapture(f"{node.name}: {target}")
        arguments = arguments_of(node, target)
        name = name_of(target)
        if name.startswith("_assert"):
            return None
        if name == "detach_":
            return self.look_up(node.args[0])
        in_place = name.endswith("_") and not name.startswith("_")
        plain = name.rstrip("_") if in_place else name
        given = {key: self.look_up(value) for key, value in arguments.items()}
        filled = dict(given)
        if name in _FILLED and isinstance(given.get("self"), Node):
            filled["self"] = torch.empty(0, dtype=node.all_input_nodes[0].meta["val"].dtype)
        leaves = pytree.tree_leaves(list(filled.values()))
        alone = not any(isinstance(v, Node) for v in leaves) and node.name not in self.live
        writes = self.functional(target, plain) if in_place and alone else target
        if alone and self.folds(writes, given, leaves):
            args = [filled[a.name] for a in target._schema.arguments[: len(node.args)]]
            with torch.no_grad():
                value = writes(*args, **{key: filled[key] for key in node.kwargs})
            if isinstance(value, Tensor):
                self.folded[node.name] = value
            if in_place:
                self.overwrite(node, value)
            return value
        result: Any = None
        if target.namespace in ("aten", POINTWISE_NAMESPACE) and node.meta.get("val") is not None:
            result = self.convert(node, plain, target, given)
        if result is None:
            if in_place:
                target = self.functional(target, plain)
            result = self.other(node, target, arguments)
        if in_place:
            self.overwrite(node, result)
        return result

    def folds(self, target: Any, a: Arguments, leaves: list[Any]) -> bool:
        """Whether an operator of parameters, buffers and numbers is computed here and now."""
        name = name_of(target)
        fixed = not target._schema.is_mutable and name not in GROWING
        off = name in SAME and is_off(a)  # as a dropout is
        random = torch.Tag.nondeterministic_seeded in target.tags and not off
        known = name in _FILLED or any(isinstance(v, Tensor) for v in leaves)
        return fixed and not random and known

    def functional(self, target: Any, plain: str) -> Any:
        """The operator that returns what this one writes."""
        packet = getattr(getattr(torch.ops, target.namespace), plain, None)
        arguments = _argument_types(target)
        for overload in packet.overloads() if packet is not None else ():  # names may differ
            if _argument_types(getattr(packet, overload)) == arguments:
                return getattr(packet, overload)
        raise CannotCapture(f"{target} changes its input")

    def overwrite(self, node: fx.Node, result: Node | Tensor) -> None:
        """Who reads the changed value later shall get the new one."""
        changed: Any = node.args[0]
        old, memory, now = self.values[changed], memory_of(changed), self.place[node]
        for other in self.values:
            if memory_of(other) != memory:
                continue
            if other.op == "placeholder":
                taken = isinstance(self.values[other], Node)
                kind = "an input" if taken else "a parameter or buffer"
                raise CannotCapture(f"{node.name} changes {kind}")
            if self.values[other] is old:
                self.values[other] = result
            elif other is not node and any(self.place[user] > now for user in other.users):
                raise Indirect(f"{node.name} changes what {other.name} reads")

    def look_up(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.values[value]
        if isinstance(value, list | tuple):
            return [self.look_up(v) for v in value]
        if isinstance(value, dict):
            return {key: self.look_up(v) for key, v in value.items()}
        return value

    def other(self, node: fx.Node, target: Any, arguments: dict[str, Any]) -> Node:
        """Any operator that stays float."""
        inputs: list[Node] = []
        tensors: dict[str, Tensor] = {}

        def hold(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [hold(v) for v in value]
            if isinstance(value, Node):
                if value not in inputs:
                    inputs.append(value)
                return Ref(inputs.index(value))
            if isinstance(value, Tensor):
                tensors[f"t{len(tensors)}"] = value
                return f"%t{len(tensors) - 1}"
            return value

        schema = {a.name: a for a in target._schema.arguments}
        args, kwargs = [], {}
        for key, value in arguments.items():
            held = hold(self.look_up(value))
            if schema[key].kwarg_only:
                kwargs[key] = held
            else:
                args.append(held)
        name = f"{target.namespace}.{name_of(target)}.{target._overloadname}"
        attrs = {"target": name, "args": tuple(args), "kwargs": kwargs}
        if node in self.whys:
            attrs["why"] = self.whys[node]
        return self.add(node, "aten", inputs, attrs=attrs, tensors=tensors)

    def convert(self, node: fx.Node, name: str, target: Any, a: Arguments) -> Any:
        """The value of an operator that has a name here, or None."""
        values = [v.meta.get("val") for v in (node, *node.all_input_nodes)]
        leaves = [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)]
        allowed = (torch.float32, *[torch.bool] * (name in _TAKE_BOOL))
        if name not in _WITH_INDICES and any(v.dtype not in allowed for v in leaves):
            return None
        if name in SAME and isinstance(_first(a), Node) and is_off(a):
            return _first(a)
        if target.namespace == POINTWISE_NAMESPACE:
            return self.pointwise(node, target, a)
        result = READERS[name](self, node, a) if name in READERS else None
        if result is None and name in POINTWISE:
            return self.pointwise(node, target, a)
        return result

    def pointwise(self, node: fx.Node, target: Any, a: Arguments) -> Node | None:
        """An operator of one tensor and numbers."""
        nodes = [v for v in a.values() if isinstance(v, Node)]
        tensors = [v for v in a.values() if isinstance(v, Tensor)]
        if len(nodes) != 1 or any(v.numel() != 1 for v in tensors):
            return None
        if nodes[0].shape != tuple(node.meta["val"].shape):
            return None
        if target._schema.is_mutable:
            target = self.functional(target, name_of(target).rstrip("_"))
        schema = {arg.name: arg for arg in target._schema.arguments}
        args, kwargs = [], {}
        for key, value in a.items():
            held = value.item() if isinstance(value, Tensor) else value
            held = Ref(0) if isinstance(value, Node) else held
            if key in schema and schema[key].kwarg_only:
                kwargs[key] = held
            elif key in schema:
                args.append(held)
        name = f"{target.namespace}.{name_of(target)}.{target._overloadname}"
        return self.add(node, "pointwise", nodes, attrs={"calls": [(name, tuple(args), kwargs)]})

    # ------------------------------------------------------------------ what several need

    def aten(
        self, name: str, target: str, inputs: Sequence[Node], args: tuple[Any, ...],
        shape: tuple[int, ...],
    ) -> Node:  # fmt: skip
        """One of torch's operators as it is: `target` without its namespace."""
        attrs = {"target": f"aten.{target}", "args": args, "kwargs": {}}
        return self.add(name, "aten", inputs, attrs=attrs, shape=shape)

    def line(
        self, node: fx.Node, op: str, x: Node, attrs: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
    ) -> Node | None:  # fmt: skip
        """An operation on a sequence (B, C, L), as on an image one line high."""
        if len(x.shape) != 3:
            return None
        b, c, length = x.shape
        image = self.add(f"{node.name}_line", "reshape", [x], shape=(b, c, 1, length),
                         attrs={"groups": (axis(0), ((1,), (None, 1)), axis(2))})  # fmt: skip
        out = tuple(map(int, pytree.tree_leaves(node.meta["val"])[0].shape))
        y = self.add(node, op, [image], attrs=attrs, tensors=tensors,
                     shape=(out[0], out[1], 1, out[2]))  # fmt: skip
        return self.add(f"{node.name}_sequence", "reshape", [y], shape=out,
                        attrs={"groups": (axis(0), ((1, 2), (None,)), axis(3))})  # fmt: skip

    def reshape(self, node: fx.Node | str, x: Node, shape: Sequence[int]) -> Node | None:
        if x.op == "reshape" and x.inputs[0].shape == tuple(shape):
            return x.inputs[0]  # there and back
        groups = reshape_groups(x.shape, [int(n) for n in shape])
        if groups is None:
            return None
        if all(len(axes) == 1 and len(sizes) == 1 for axes, sizes in groups):
            return x
        shown = tuple(shape) if isinstance(node, str) else None
        return self.add(node, "reshape", [x], attrs={"groups": groups}, shape=shown)

    def permute(self, node: fx.Node | str, x: Node, dims: Sequence[int]) -> Node:
        dims = tuple(d % len(dims) for d in dims)
        if dims == tuple(range(len(dims))):
            return x
        shape = tuple(x.shape[d] for d in dims)
        return self.add(node, "permute", [x], attrs={"dims": dims}, shape=shape)

    def ranked(self, name: str, x: Node, rank: int) -> Node:
        """With as many axes, those that it lacks before its own."""
        shape = ranked_shape(x, rank)
        if shape == x.shape:
            return x
        groups = reshape_groups(x.shape, shape)
        return self.add(name, "reshape", [x], attrs={"groups": groups}, shape=shape)

    def part(self, name: str, x: Node, dim: int, start: int, end: int | None) -> Node:
        """Some places of an axis."""
        found = concatenated(x, dim, start, end)
        if found is not None:
            return found
        shape = list(x.shape)
        shape[dim] = len(range(*slice(start, end).indices(shape[dim])))
        attrs = {"dim": dim, "start": start, "end": end, "step": 1}
        return self.add(name, "slice", [x], shape=tuple(shape), attrs=attrs)


def _argument_types(target: Any) -> list[tuple[str, str]]:
    """The first one is the tensor itself, by whatever name."""
    return [(a.name if i else "", str(a.type)) for i, a in enumerate(target._schema.arguments)]


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> Any:
    """A reshape as groups: (axes that are joined, the sizes they become); None if there is none.

    A size is None, "what is left", where it is the only one of its group.
    """
    groups: list[tuple[tuple[int, ...], tuple[int | None, ...]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        axes, sizes = [], []
        have = want = 1
        if i < len(old):
            axes, have, i = [i], old[i], i + 1
        if j < len(new):
            sizes, want, j = [new[j]], new[j], j + 1
        while have != want:
            if have < want and i < len(old):
                axes.append(i)
                have, i = have * old[i], i + 1
            elif want < have and j < len(new):
                sizes.append(new[j])
                want, j = want * new[j], j + 1
            else:
                return None
        # ones that follow belong to this group, unless both sides have one
        while i < len(old) and old[i] == 1 and not (j < len(new) and new[j] == 1):
            axes.append(i)
            i += 1
        while j < len(new) and new[j] == 1 and not (i < len(old) and old[i] == 1):
            sizes.append(1)
            j += 1
        groups.append((tuple(axes), tuple(sizes)))
    return tuple((axes, (None,) if len(sizes) == 1 and axes else sizes) for axes, sizes in groups)


def axis(d: int) -> Any:
    """The group of a reshape that leaves an axis alone."""
    return (d,), (None,)


def without(dim: int, rank: int) -> Any:
    """The groups of a reshape that drops an axis of size 1."""
    return tuple(((d,), ()) if d == dim else axis(d) for d in range(rank))


def concatenated(x: Node, dim: int, start: int, end: int | None) -> Node | None:
    """What was concatenated to be just these places of an axis: it need not share its range with
    its neighbours."""
    if x.op != "concat" or x.attrs["dim"] != dim:
        return None
    ends, place = slice(start, end).indices(x.shape[dim])[:2], 0
    for value in x.inputs:
        size = value.shape[dim]
        fits = value.shape == (*x.shape[:dim], size, *x.shape[dim + 1 :])
        if ends == (place, place + size) and fits:
            return value
        place += size
    return None
