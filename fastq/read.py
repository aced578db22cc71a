"""One exported program into a `Graph`: aten operators into ours.

Each operator that has a name here has a method of the reader, `read_` and its name; one that has
none, or arguments that ours does not take, stays an "aten" node. What is computed of parameters
alone is folded into a constant, and the masks of attention become an operand of its softmax.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Collection, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fastq.graph import POINTWISE_NAMESPACE, PRODUCTS, Graph, Node, Ref, normalization
from fastq.masks import LOWEST, is_low, is_mask, operand, operator_of, possible_values
from fastq.spelled import Norm, is_part, product, quotient
from fastq.weights import explicit_padding, several

_POINTWISE = frozenset([
    "relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max", "hardswish", "hardsigmoid",
    "silu", "gelu", "sigmoid", "tanh", "elu", "leaky_relu", "mish", "softplus", "selu", "celu",
    "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "abs", "neg", "square", "pow", "reciprocal",
    "sin", "cos", "erf", "threshold", "hardshrink", "softshrink", "tanhshrink", "log_sigmoid",
    "softsign", "rsub", "sign", "floor", "ceil", "round", "trunc", "add", "sub", "mul", "div",
    "maximum", "minimum", "fmod", "remainder", "nan_to_num", "logit", "atan2",
])  # fmt: skip
_SAME = frozenset([
    "dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach",
    "lift_fresh_copy", "identity", "to", "_to_copy", "type_as",
])  # fmt: skip
# one of their tensors is of int64
_WITH_INDICES = ("adaptive_max_pool1d", "adaptive_max_pool2d", "max_pool2d_with_indices", "max",
                 "index", "index_select")  # fmt: skip
_EXPANDED = ("expand", "expand_as", "broadcast_to")
_TAKE_BOOL = ("scaled_dot_product_attention", *_EXPANDED)
_GROWING = (*_EXPANDED, "repeat", "tile")  # with the batch, perhaps
MAX_TERMS = 8  # of a sum that is written as additions
# of what it is called on, only the dtype counts
_FILLED = ("zeros", "ones", "full", "arange", "new_zeros", "new_ones", "new_full")


class CannotCapture(Exception):
    """Why there is no graph of a model."""


class Indirect(CannotCapture):
    """What a second pass of torch's may make plain operators of: a tensor that is changed in place
    and read by another name later, or a graph within the graph, as of a region of autocast."""


Folded = dict[str, Tensor]  # operator's name -> its value, of parameters alone


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
        self.used = _used(program.graph)
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
            value, new.shape = node.meta.get("val"), _shape(node)
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
        arguments = _arguments(node, target)
        name = _name(target)
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
        if alone and self.folds(target, leaves):
            args = [filled[a.name] for a in target._schema.arguments[: len(node.args)]]
            with torch.no_grad():
                value = target(*args, **{key: filled[key] for key in node.kwargs})
            if isinstance(value, Tensor):
                self.folded[node.name] = value
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

    def folds(self, target: Any, leaves: list[Any]) -> bool:
        """Whether an operator of parameters, buffers and numbers is computed here and now."""
        name = _name(target)
        fixed = not target._schema.is_mutable and name not in _GROWING
        random = torch.Tag.nondeterministic_seeded in target.tags
        known = name in _FILLED or any(isinstance(v, Tensor) for v in leaves)
        return fixed and not random and known

    def functional(self, target: Any, plain: str) -> Any:
        """The operator that returns what this one writes."""
        packet = getattr(getattr(torch.ops, target.namespace), plain, None)
        if packet is None or target._overloadname not in packet.overloads():
            raise CannotCapture(f"{target} changes its input")
        return getattr(packet, target._overloadname)

    def overwrite(self, node: fx.Node, result: Node) -> None:
        """Who reads the changed value later shall get the new one."""
        changed: Any = node.args[0]
        old, memory, now = self.values[changed], _memory(changed), self.place[node]
        for other in self.values:
            if _memory(other) != memory:
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
        name = f"{target.namespace}.{_name(target)}.{target._overloadname}"
        attrs = {"target": name, "args": tuple(args), "kwargs": kwargs}
        if node in self.whys:
            attrs["why"] = self.whys[node]
        return self.add(node, "aten", inputs, attrs=attrs, tensors=tensors)

    # ------------------------------------------------------------------ one operator each

    def convert(self, node: fx.Node, name: str, target: Any, a: dict[str, Any]) -> Any:
        """The value of an operator that has a name here, or None."""
        values = [v.meta.get("val") for v in (node, *node.all_input_nodes)]
        leaves = [v for v in pytree.tree_leaves(values) if isinstance(v, Tensor)]
        allowed = (torch.float32, *[torch.bool] * (name in _TAKE_BOOL))
        if name not in _WITH_INDICES and any(v.dtype not in allowed for v in leaves):
            return None
        x = a.get("self", a.get("input", a.get("query")))
        if name in _SAME and isinstance(x, Node) and _off(a):
            return x
        if target.namespace == POINTWISE_NAMESPACE:
            return self.pointwise(node, target, a)
        read = getattr(self, f"read_{name}", None)
        if read is not None:
            result = read(node, a)
            if result is not None:
                return result
        if name in _POINTWISE:
            return self.pointwise(node, target, a)
        return None

    def pointwise(self, node: fx.Node, target: Any, a: dict[str, Any]) -> Node | None:
        """An operator of one tensor and numbers."""
        nodes = [v for v in a.values() if isinstance(v, Node)]
        tensors = [v for v in a.values() if isinstance(v, Tensor)]
        if len(nodes) != 1 or any(v.numel() != 1 for v in tensors):
            return None
        if nodes[0].shape != tuple(node.meta["val"].shape):
            return None
        if target._schema.is_mutable:
            target = self.functional(target, _name(target).rstrip("_"))
        schema = {arg.name: arg for arg in target._schema.arguments}
        args, kwargs = [], {}
        for key, value in a.items():
            held = value.item() if isinstance(value, Tensor) else value
            held = Ref(0) if isinstance(value, Node) else held
            if key in schema and schema[key].kwarg_only:
                kwargs[key] = held
            elif key in schema:
                args.append(held)
        name = f"{target.namespace}.{_name(target)}.{target._overloadname}"
        return self.add(node, "pointwise", nodes, attrs={"calls": [(name, tuple(args), kwargs)]})

    def read_conv2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, weight, bias = a["input"], a["weight"], a.get("bias")
        if not isinstance(x, Node) or not isinstance(weight, Tensor) or len(x.shape) != 4:
            return None
        if bias is not None and not isinstance(bias, Tensor):
            return None
        attrs = {**_geometry(a, weight.shape[2:]), "groups": a["groups"]}
        return self.add(node, "conv2d", [x], attrs=attrs, tensors=_tensors(weight, bias))

    def read_conv3d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """No program has volumes: what this operation is there for is that a batch norm folds into
        it, and that it is an int8 layer of its own."""
        weight = a["weight"]
        if not isinstance(weight, Tensor):
            return None
        return self.volume(node, "conv3d", a, _geometry(a, weight.shape[2:]))

    def read_conv_transpose3d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        least = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
        attrs = {name: several(name, _list(a[name]), 3, low) for name, low in least.items()}
        return self.volume(node, "conv_transpose3d", a, attrs)

    def volume(
        self, node: fx.Node, op: str, a: dict[str, Any], attrs: dict[str, Any]
    ) -> Node | None:
        x, weight, bias = a["input"], a["weight"], a.get("bias")
        fits = isinstance(x, Node) and len(x.shape) == 5 and isinstance(weight, Tensor)
        if not fits or not isinstance(bias, Tensor | None):
            return None
        attrs = {**attrs, "groups": a["groups"]}
        return self.add(node, op, [x], attrs=attrs, tensors=_tensors(weight, bias))

    def read_lstm(self, node: fx.Node, a: dict[str, Any]) -> list[Any] | None:
        """[all hidden states, the last ones, None] of a layer that begins with zeros: for each of
        its layers and directions the products with all inputs, and the recurrence."""
        wanted = {use.args[1] for use in node.users if use in self.used}
        why = _not_recurrent(node, a, wanted)
        if why:
            self.whys[node] = why
            return None
        cell = _name(node.target).removeprefix("rnn_")
        x, weights, directions = a["input"], a["params"], 1 + a["bidirectional"]
        of, time, last = 4 if a["has_biases"] else 2, int(a["batch_first"]), []
        for first in range(0, len(weights), of * directions):
            made = []
            for direction in range(directions):
                given = weights[first + of * direction : first + of * (direction + 1)]
                h = self.direction(node, x, given, cell, time, direction == 1)
                made.append(h)
                if 1 in wanted:
                    last.append(self.last_state(node, h, time, direction == 1))
            x = self.joined(node, made, 2)
        return [x, self.joined(node, last, 0) if last else None, None]

    read_gru = read_rnn_tanh = read_rnn_relu = read_lstm

    def direction(
        self, node: fx.Node, x: Node, weights: list[Tensor], cell: str, time: int, reverse: bool
    ) -> Node:
        """One layer in one direction; weights are of inputs and of states, then the biases."""
        (of_x, of_h), (b_x, b_h) = weights[:2], weights[2:] or (None, None)
        gates = self.add(node, "linear", [x], tensors=_tensors(of_x, b_x),
                         name=f"{node.name}_gates", shape=(*x.shape[:2], len(of_x)))  # fmt: skip
        attrs = {"cell": cell, "time": time, "reverse": reverse}
        return self.add(node, "recurrent", [gates], attrs=attrs, tensors=_tensors(of_h, b_h),
                        shape=(*x.shape[:2], of_h.shape[1]))  # fmt: skip

    def last_state(self, node: fx.Node, h: Node, time: int, reverse: bool) -> Node:
        """(1, B, H): of all states the last one that was made."""
        state = self.part(f"{node.name}_last", h, time, *((0, 1) if reverse else (-1, None)))
        if time == 0:
            return state
        b, _, features = state.shape
        return self.add(node, "permute", [state], attrs={"dims": (1, 0, 2)},
                        name=f"{state.name}_first", shape=(1, b, features))  # fmt: skip

    def joined(self, node: fx.Node, parts: list[Node], dim: int) -> Node:
        """Parts of three axes side by side."""
        if len(parts) == 1:
            return parts[0]
        sizes = list(parts[0].shape)
        sizes[dim] = sum(part.shape[dim] for part in parts)
        return self.add(node, "concat", parts, attrs={"dim": dim}, name=f"{node.name}_joined",
                        shape=tuple(sizes))  # fmt: skip

    def read_conv1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, weight, bias = a["input"], a["weight"], a.get("bias")
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            return None
        of_line = _geometry(a, weight.shape[2:])
        of_image = {"stride": (1,), "padding": ((0, 0),), "dilation": (1,)}
        attrs = {name: (*one, *of_line[name]) for name, one in of_image.items()}
        attrs["groups"] = a["groups"]
        tensors = _tensors(weight.unsqueeze(2), bias)
        return self.line(node, "conv2d", x, attrs, tensors)

    def line(
        self, node: fx.Node, op: str, x: Any, attrs: dict[str, Any],
        tensors: dict[str, Tensor] | None = None,
    ) -> Node | None:  # fmt: skip
        """An operation on a sequence (B, C, L), as on an image one line high."""
        if not isinstance(x, Node) or len(x.shape) != 3:
            return None
        b, c, length = x.shape
        image = self.add(f"{node.name}_line", "reshape", [x], shape=(b, c, 1, length),
                         attrs={"groups": (_axis(0), ((1,), (None, 1)), _axis(2))})  # fmt: skip
        out = tuple(map(int, pytree.tree_leaves(node.meta["val"])[0].shape))
        y = self.add(node, op, [image], attrs=attrs, tensors=tensors,
                     shape=(out[0], out[1], 1, out[2]))  # fmt: skip
        return self.add(f"{node.name}_sequence", "reshape", [y], shape=out,
                        attrs={"groups": (_axis(0), ((1, 2), (None,)), _axis(3))})  # fmt: skip

    def read_conv_transpose2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, weight, bias = a["input"], a["weight"], a.get("bias")
        if not isinstance(x, Node) or not isinstance(weight, Tensor) or len(x.shape) != 4:
            return None
        if not isinstance(bias, Tensor | None):
            return None
        attrs = {key: _two(a[key]) for key in ("stride", "padding", "output_padding", "dilation")}
        tensors = _tensors(weight, bias)
        return self.add(node, "conv_transpose2d", [x], attrs={**attrs, "groups": a["groups"]},
                        tensors=tensors)  # fmt: skip

    def read_conv_transpose1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        weight, bias = a["weight"], a.get("bias")
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor | None):
            return None
        along = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
        attrs: dict[str, Any] = {key: (none, _one(a[key])) for key, none in along.items()}
        tensors = _tensors(weight.unsqueeze(2), bias)
        return self.line(node, "conv_transpose2d", a["input"],
                         {**attrs, "groups": a["groups"]}, tensors)  # fmt: skip

    def read_linear(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, weight, bias = a["input"], a["weight"], a.get("bias")
        if not isinstance(x, Node) or not isinstance(weight, Tensor) or weight.dim() != 2:
            return None
        if bias is not None and not isinstance(bias, Tensor):
            return None
        tensors = _tensors(weight, bias)
        return self.linear(node, x, tensors)

    def linear(self, node: fx.Node, x: Node, tensors: dict[str, Tensor]) -> Node:
        """A linear layer of features; of rows that were joined before, as what they were."""
        rows: Any = x.attrs["groups"] if x.op == "reshape" else ()
        joined = len(x.shape) == 2 and len(rows) == 2 and len(rows[0][0]) > 1
        shape = tuple(x.inputs[0].shape[axis] for axis in rows[0][0]) if joined else ()
        made = (*shape, len(tensors["weight"]))
        if not joined or any(_shape(user) != made for user in node.users):  # rows are taken on
            return self.add(node, "linear", [x], tensors=tensors)
        (source,), (leading, _), shape = x.inputs, rows[0], (*shape, x.shape[1])
        if source.shape != shape:  # the features were joined as well
            groups = (*map(_axis, leading), rows[1])
            source = self.add(f"{x.name}_features", "reshape", [source], shape=shape,
                              attrs={"groups": groups})  # fmt: skip
        y = self.add(node, "linear", [source], tensors=tensors, shape=made)
        groups = ((leading, (None,)), _axis(len(leading)))
        return self.add(f"{node.name}_rows", "reshape", [y], attrs={"groups": groups},
                        shape=(prod(made[:-1]), made[-1]))  # fmt: skip

    def read_addmm(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        bias, x, weight = a["self"], a["mat1"], a["mat2"]
        if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1 or not isinstance(x, Node):
            return None
        if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or bias.dim() != 1:
            return None
        return self.linear(node, x, {"weight": weight.t(), "bias": bias})

    def read_batch_norm(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, mean, variance = a["input"], a["running_mean"], a["running_var"]
        if a["training"] or not isinstance(x, Node) or not isinstance(mean, Tensor):
            return None
        if not isinstance(variance, Tensor):
            return None
        origin = {"running_mean": mean, "running_var": variance}
        origin |= {f"norm_{k}": a[k] for k in ("weight", "bias") if isinstance(a.get(k), Tensor)}
        eps, momentum = float(a["eps"]), float(a["momentum"])
        factor, shift = normalization(eps, origin)
        if not bool(factor.isfinite().all() and shift.isfinite().all()):
            return None
        y = self.add(node, "affine", [x], tensors={"factor": factor, "shift": shift}, shape=x.shape,
                     attrs={"norm": {"eps": eps, "momentum": momentum}})  # fmt: skip
        y.origin = origin
        return y

    def read__native_batch_norm_legit_no_training(
        self, node: fx.Node, a: dict[str, Any]
    ) -> list[Any] | None:
        """What a batch norm is called where changes of memory became values."""
        y = self.read_batch_norm(node, {**a, "training": False})
        return None if y is None else [y]

    def read_layer_norm(
        self, node: fx.Node, a: dict[str, Any], op: str = "layer_norm"
    ) -> Node | None:
        x = a["input"]
        if not isinstance(x, Node):
            return None
        count = len(a["normalized_shape"])
        tensors = {k: a[k] for k in ("weight", "bias") if isinstance(a.get(k), Tensor)}
        if count == len(x.shape) or (count > 1 and not tensors):
            return None  # its sizes may follow the input's
        rows = (*x.shape[:-count], prod(x.shape[-count:]))  # several axes are one line
        lines = self.reshape(f"{node.name}_lines", x, rows)
        if lines is None:
            return None
        attrs = {"shape": rows[-1:], "eps": float(a["eps"])}
        y = self.add(node, op, [lines], attrs=attrs, tensors=tensors, shape=rows)
        return self.reshape(f"{node.name}_axes", y, x.shape)

    def read_rms_norm(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        eps = a.get("eps")
        eps = torch.finfo(torch.float32).eps if eps is None else eps
        return self.read_layer_norm(node, {**a, "eps": eps}, "rms_norm")

    def read_group_norm(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.grouped(node, a, a["num_groups"])

    def read_instance_norm(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """Each channel is a group; or a batch norm, if its statistics are known."""
        x = a["input"]
        if not a["use_input_stats"]:
            return self.read_batch_norm(node, {**a, "training": False})
        return self.grouped(node, a, x.shape[1]) if isinstance(x, Node) else None

    def grouped(self, node: fx.Node, a: dict[str, Any], groups: int) -> Node | None:
        x = a["input"]
        tensors = {k: a[k] for k in ("weight", "bias") if a.get(k) is not None}
        if not isinstance(x, Node) or not all(isinstance(t, Tensor) for t in tensors.values()):
            return None
        attrs = {"groups": groups, "eps": float(a["eps"])}
        return self.add(node, "group_norm", [x], attrs=attrs, tensors=tensors)

    def read_add(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.binary(node, "add", a, float(a.get("alpha", 1)))

    def read_sub(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.binary(node, "add", a, -float(a.get("alpha", 1)))

    def read_mul(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        for x, factor in ((a["self"], a["other"]), (a["other"], a["self"])):
            found = self.norm(node, product(x, factor))
            if found is not None:
                return found
        return self.binary(node, "mul", a)

    def norm(self, node: fx.Node, found: Norm | None) -> Node | None:
        """One that is spelled out. Over any axis: it is the last one meanwhile."""
        if found is None or (found.factor != 1 and not self.unrolls):
            return None
        op, x, dim, eps, factor = found
        n, last = x.shape[dim], len(x.shape) - 1
        dims = (*(d for d in range(last + 1) if d != dim), dim)
        x = self.permute(f"{node.name}_last", x, dims)
        name: Any = node if dim == last else f"{node.name}_normed"
        tensors = {} if factor == 1 else {"weight": torch.full((n,), factor)}
        attrs = {"shape": (n,), "eps": eps}
        y = self.add(name, op, [x], attrs=attrs, tensors=tensors, shape=x.shape)
        return self.permute(node, y, [dims.index(d) for d in range(last + 1)])

    def read_div(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, other = a["self"], a["other"]
        if a.get("rounding_mode") is not None:
            return None
        found = self.norm(node, quotient(x, other))
        if found is not None:
            return found
        if isinstance(other, Tensor) and other.numel() > 1:
            return self.binary(node, "mul", {**a, "other": 1 / other})
        return None

    def binary(self, node: fx.Node, op: str, a: dict[str, Any], alpha: float = 1.0) -> Node | None:
        """Of two activations, or of one and a constant tensor."""
        x, y = a["self"], a["other"]
        if not (isinstance(x, Node | Tensor) and isinstance(y, Node | Tensor)):
            return None
        if any(v.numel() == 1 or v.dtype != torch.float32 for v in (x, y) if isinstance(v, Tensor)):
            return None
        rank = max(len(x.shape), len(y.shape))
        sides = []
        for i, value in enumerate((x, y)):
            shape = (1,) * (rank - len(value.shape)) + tuple(value.shape)
            if isinstance(value, Tensor):
                sides.append(self.constant(f"{node.name}_constant", value, shape))
            elif len(value.shape) == rank:
                sides.append(value)
            else:
                groups = reshape_groups(value.shape, shape)
                sides.append(self.add(f"{node.name}_{i}", "reshape", [value], shape=shape,
                                      attrs={"groups": groups}))  # fmt: skip
        if op == "mul":
            for value, constant in (sides, sides[::-1]):
                if constant.op == "constant" and len(value.shape) == rank > 1:
                    scaled = self.scaled(node, value, constant.tensors["value"])
                    if scaled is not None:
                        self.nodes.remove(constant)
                        return scaled
        attrs = {"alpha": alpha} if alpha != 1 else {}
        return self.add(node, op, sides, attrs=attrs)

    def scaled(self, node: fx.Node, x: Node, factor: Tensor) -> Node | None:
        """A product with one factor for each channel."""
        if factor.numel() != factor.shape[1] or factor.shape[1] != x.shape[1]:
            return None
        factor = factor.detach().reshape(-1)
        tensors = {"factor": factor, "shift": torch.zeros_like(factor)}
        return self.add(node, "affine", [x], tensors=tensors)

    def read_relu(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.clamped(node, a["self"], 0.0, None)

    def read_relu6(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.clamped(node, a["self"], 0.0, 6.0)

    def read_hardtanh(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.clamped(node, a["self"], a["min_val"], a["max_val"])

    def read_clamp(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.clamped(node, a["self"], a.get("min"), a.get("max"))

    def read_clamp_min(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.clamped(node, a["self"], a["min"], None)

    def read_clamp_max(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.clamped(node, a["self"], None, a["max"])

    def clamped(self, node: fx.Node, x: Any, lo: Any, hi: Any) -> Node | None:
        """A pointwise function that is a clamp: the product before it can do it."""
        lo, hi = (v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for v in (lo, hi))
        if not isinstance(x, Node) or not all(isinstance(v, int | float | None) for v in (lo, hi)):
            return None
        bounds = (
            -float("inf") if lo is None else float(lo),
            float("inf") if hi is None else float(hi),
        )
        call: Any = ("aten.clamp.default", (Ref(0), lo, hi), {})
        return self.add(node, "pointwise", [x], attrs={"calls": [call], "clamp_only": bounds})

    def read_prelu(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        if not isinstance(a["self"], Node) or not isinstance(a["weight"], Tensor):
            return None
        return self.add(node, "prelu", [a["self"]], tensors={"weight": a["weight"]})

    def read_softmax(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node) or not x.shape:
            return None
        dim = a["dim"] % len(x.shape)
        if dim == len(x.shape) - 1 and x.op == "reshape" and x.shape[-1:] == x.inputs[0].shape[-1:]:
            # windows of an image apart from the batch, where each has a mask of its own
            scores = x.inputs[0]
            if self.without_mask(node, scores) is not None:
                made = self.softmax(node, f"{node.name}_apart", scores, len(scores.shape) - 1)
                return self.add(node, "reshape", [made], attrs=x.attrs)
        return self.softmax(node, node.name, x, dim)

    def softmax(
        self, node: fx.Node, name: str, x: Node, dim: int, masks: Sequence[Node] = ()
    ) -> Node:
        """softmax(x) of what all masks take: these, each 1.0 and 0.0, and those that x has in it.
        Where they take nothing the weights are 0, or the same where the masks are finite: the
        least float32, which most networks have there, takes all of a score."""
        masks, uniform = list(masks), not masks
        while dim == len(x.shape) - 1 and (found := self.without_mask(node, x)) is not None:
            x = found[0]
            masks.append(found[1])
            uniform &= found[2]
        taken = masks[:1]
        for mask in masks[1:]:
            shape = tuple(map(max, taken[0].shape, mask.shape))
            taken = [self.add(f"{node.name}_mask", "aten", [*taken, mask], shape=shape, attrs={
                "target": "aten.mul.Tensor", "args": (Ref(0), Ref(1)), "kwargs": {}})]  # fmt: skip
        attrs = {"dim": dim, "uniform": bool(taken) and uniform}
        return self.add(node, "softmax", [x, *taken], name=name, attrs=attrs, shape=x.shape)

    def without_mask(self, node: fx.Node, x: Node) -> tuple[Node, Node, bool] | None:
        """(scores, mask, whether what it leaves out is finite) if x is scores and a mask."""
        if x.op == "add" and x.attrs.get("alpha", 1) in (1, -1):
            sides = [x.inputs, x.inputs[::-1]]
            if x.attrs.get("alpha") == -1:
                sides = [[x.inputs[0], self.negative(x.inputs[1])]]
            for scores, added in sides:
                if scores.op == "constant" or scores.shape != x.shape:
                    continue
                constant = added.tensors["value"] if added.op == "constant" else None
                if is_mask(added, self.flags):
                    mask = self.mask(node, added if constant is None else constant, x.shape)
                    return None if mask is None else (scores, mask, self.finite(added))
                if constant is None and self.may_mask(added):
                    mask = self.mask(node, added, x.shape)
                    if mask is None:
                        return None
                    rest = [scores, self.without_lowest(added)]
                    return self.add(f"{x.name}_bias", "add", rest, shape=x.shape), mask, True
                if constant is not None and bool((constant <= LOWEST).any()):
                    hidden = constant <= LOWEST  # a bias as well
                    mask = self.mask(node, ~hidden, x.shape)
                    if mask is None:
                        return None
                    bias = self.constant(f"{added.name}_bias", constant.masked_fill(hidden, 0.0))
                    biased = self.add(f"{x.name}_bias", "add", [scores, bias], shape=x.shape)
                    return biased, mask, bool(constant.isfinite().all())
        if x.op == "aten" and operator_of(x) in ("masked_fill", "where"):
            a, b, c = (operand(x, value) for value in x.attrs["args"])
            if operator_of(x) == "masked_fill":
                a, b, c = b, c, a
            if a.dtype is not torch.bool if isinstance(a, Tensor) else a not in self.flags:
                return None
            for scores, low, hides in ((c, b, True), (b, c, False)):  # where(a, b, c)
                if isinstance(scores, Node) and scores.shape == x.shape and is_low(low, self.flags):
                    mask = self.mask(node, a, x.shape, hides)
                    return None if mask is None else (scores, mask, self.finite(low))
        return None

    def negative(self, value: Node) -> Node:
        if value.op == "constant":
            return self.constant(f"{value.name}_negative", -value.tensors["value"])
        attrs = {"target": "aten.neg.default", "args": (Ref(0),), "kwargs": {}}
        return self.add(f"{value.name}_negative", "aten", [value], attrs=attrs, shape=value.shape)

    def may_mask(self, added: Node) -> bool:
        """Whether what is added to scores was not computed by products: it may hold masks."""
        return added not in self.computed and added not in self.biases

    def without_lowest(self, added: Node) -> Node:
        """What is added to scores, with 0 where it is a mask."""
        hidden = self.add(f"{added.name}_hidden", "aten", [added], shape=added.shape, attrs={
            "target": "aten.le.Scalar", "args": (Ref(0), LOWEST), "kwargs": {}})  # fmt: skip
        bias = self.add(f"{added.name}_bias", "aten", [added, hidden], shape=added.shape, attrs={
            "target": "aten.masked_fill.Scalar", "args": (Ref(0), Ref(1), 0.0),
            "kwargs": {}})  # fmt: skip
        self.biases.add(bias)
        return bias

    def finite(self, value: Any) -> bool:
        return -inf not in (possible_values(value, self.flags) or ())

    def mask(
        self, node: fx.Node, value: Any, shape: tuple[int, ...], hides: bool = False
    ) -> Node | None:
        """A mask of scores of this shape as 1.0 and 0.0; `hides`: a bool one says what is left out.
        None for what is no mask."""
        rank, size = len(shape), tuple(value.shape)
        size = (1,) * (rank - len(size)) + size
        if len(size) != rank or size[-1] != shape[-1]:
            return None
        if any(m not in (1, n) for m, n in zip(size, shape, strict=True)):
            return None
        if rank > 4:  # one for each head too, for then all axes but the batch are one
            if not isinstance(value, Tensor) or size[0] != 1:
                return None
            size = (1, *shape[1:])
        key = (value, size, hides)
        if key in self.masks:
            return self.masks[key]
        name = f"{value.name if isinstance(value, Node) else node.name}_mask"
        if isinstance(value, Tensor):
            if value.dtype is not torch.bool:
                value = value > LOWEST
            made = self.constant(name, (value ^ hides).float().expand(size), size)
        else:
            targets: list[tuple[str, tuple[Any, ...]]] = [("aten.to.dtype", (torch.float32,))]
            if value not in self.flags:
                targets.insert(0, ("aten.gt.Scalar", (LOWEST,)))
            if hides:
                targets.insert(0, ("aten.logical_not.default", ()))
            made = value
            for target, args in targets:
                made = self.add(name, "aten", [made], shape=tuple(value.shape), attrs={
                    "target": target, "args": (Ref(0), *args), "kwargs": {}})  # fmt: skip
            if made.shape != size:
                groups = reshape_groups(made.shape, size)
                made = self.add(f"{name}_{rank}", "reshape", [made], shape=size,
                                attrs={"groups": groups})  # fmt: skip
        self.masks[key] = made
        return made

    def read_matmul(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, y = a["self"], a.get("other", a.get("mat2"))
        if isinstance(x, Node) and isinstance(y, Tensor) and y.dim() == 2:
            return self.linear(node, x, {"weight": y.t()})
        if isinstance(x, Tensor) and x.dim() == 2 and isinstance(y, Node) and len(y.shape) == 3:
            return self.weighted(node, y, "bkn", x, "mk", "bmn")
        if not isinstance(x, Node) or not isinstance(y, Node):
            return None
        if len(x.shape) != len(y.shape) or x.shape[:-2] != y.shape[:-2]:
            return None
        return self.add(node, "matmul", [x, y])

    read_bmm = read_mm = read_matmul

    def read_baddbmm(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """Scores and what is added to them: a mask, in nn.MultiheadAttention that gives weights."""
        x, y, factor = a["batch1"], a["batch2"], float(a.get("alpha", 1))
        if not isinstance(x, Node) or not isinstance(y, Node):
            return None
        if a.get("beta", 1) != 1 or not factor > 0:
            return None
        scores = self.add(node, "matmul", [x, y], name=f"{node.name}_scores",
                          attrs={"factor": factor}, shape=(*x.shape[:-1], y.shape[-1]))  # fmt: skip
        return self.binary(node, "add", {"self": scores, "other": a["self"]})

    def read_einsum(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """A product of matrices, however its axes are named and ordered."""
        equation, operands = a["equation"].replace(" ", ""), a["tensors"]
        left, _, out = equation.partition("->")
        names = left.split(",")
        if len(operands) != 2 or not out:
            return None
        if "." in equation or any(len(set(part)) < len(part) for part in (*names, out)):
            return None
        first, second = names
        for (x, have), (weight, those) in itertools.permutations(zip(operands, names, strict=True)):
            if isinstance(x, Node) and isinstance(weight, Tensor):
                return self.weighted(node, x, have, weight, those, out)
        if not all(isinstance(v, Node) for v in operands):
            return None
        batch = [n for n in first if n in second and n in out]
        inner = [n for n in first if n in second and n not in out]
        rows, columns = ([n for n in part if n not in other and n in out]
                         for part, other in ((first, second), (second, first)))  # fmt: skip
        if [*map(len, (inner, rows, columns))] != [1] * 3 or len(first) != len(batch) + 2:
            return None
        if len(second) != len(batch) + 2:
            return None
        sides = []
        for i, (value, have, want) in enumerate((
            (operands[0], first, [*batch, *rows, *inner]),
            (operands[1], second, [*batch, *inner, *columns]),
        )):  # fmt: skip
            dims = tuple(have.index(n) for n in want)
            sides.append(self.permute(f"{node.name}_{i}", value, dims))
        made = [*batch, *rows, *columns]
        dims = tuple(made.index(n) for n in out)
        if dims == tuple(range(len(dims))):
            return self.add(node, "matmul", sides)
        product = self.add(node, "matmul", sides, name=f"{node.name}_product",
                           shape=(*sides[0].shape[:-1], sides[1].shape[-1]))  # fmt: skip
        return self.add(node, "permute", [product], attrs={"dims": dims})

    def weighted(
        self, node: fx.Node, x: Node, have: str, weight: Tensor, names: str, out: str
    ) -> Node | None:
        """einsum("have,names->out") of an activation and a parameter: a linear layer of the axes
        that both have, between moves."""
        inner = [n for n in have if n in names]
        kept = [n for n in have if n not in names]
        columns = [n for n in names if n not in have]
        if not inner or not columns or kept[:1] != [have[0]]:  # the batch stays in its place
            return None
        if sorted(out) != sorted([*kept, *columns]):  # an axis of both stays: many products
            return None
        turned = weight.permute([names.index(n) for n in (*columns, *inner)])
        sizes = turned.shape[: len(columns)]
        matrix = turned.reshape(prod(sizes), -1)
        if matrix.data_ptr() != weight.data_ptr():  # training would not find it in a copy
            return None
        value = self.permute(f"{node.name}_inner", x, [have.index(n) for n in (*kept, *inner)])
        shape = (*value.shape[: len(kept)], matrix.shape[1])
        joined = self.reshape(f"{node.name}_joined", value, shape)
        if joined is None:
            return None
        y = self.add(node, "linear", [joined], name=f"{node.name}_product",
                     tensors={"weight": matrix}, shape=(*shape[:-1], len(matrix)))  # fmt: skip
        apart = self.reshape(f"{node.name}_apart", y, (*y.shape[:-1], *sizes))
        if apart is None:
            return None
        made = [*kept, *columns]
        return self.permute(node, apart, [made.index(n) for n in out])

    def read_scaled_dot_product_attention(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        q, k, v = a["query"], a["key"], a["value"]
        if not all(isinstance(n, Node) for n in (q, k, v)) or a.get("enable_gqa"):
            return None
        scale = q.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
        if a.get("dropout_p") or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or not scale > 0:
            return None
        rank, shape = len(k.shape), (*q.shape[:-1], k.shape[-2])
        mask, masks = a.get("attn_mask"), []
        if isinstance(mask, Tensor) and mask.dtype is torch.bool and bool(mask.all()):
            mask = None
        if a.get("is_causal"):
            masks = [self.causal(node, shape)]
        if mask is not None:
            size = (1,) * (rank - len(mask.shape)) + tuple(mask.shape)
            if any(m not in (1, n) for m, n in zip(size, shape, strict=True)):
                return None
            if size[-1] != shape[-1]:  # of queries alone
                return None
            if mask.dtype is torch.bool if isinstance(mask, Tensor) else mask in self.flags:
                found = self.mask(node, mask, shape)
                if found is None:
                    return None
                masks.append(found)
        dims = (*range(rank - 2), rank - 1, rank - 2)
        turned = self.permute(f"{node.name}_key", k, dims)
        scores = self.add(node, "matmul", [q, turned], name=f"{node.name}_scores", shape=shape,
                          attrs={"factor": float(scale)})  # fmt: skip
        if mask is not None and not masks:
            if isinstance(mask, Tensor):
                mask = self.constant(f"{node.name}_added", mask, size)
            elif tuple(mask.shape) != size:
                groups = reshape_groups(mask.shape, size)
                mask = self.add(f"{node.name}_added", "reshape", [mask], shape=size,
                                attrs={"groups": groups})  # fmt: skip
            scores = self.add(f"{node.name}_masked", "add", [scores, mask], shape=shape)
        weights = self.softmax(node, f"{node.name}_weights", scores, rank - 1, masks)
        return self.add(node, "matmul", [weights, v])

    def causal(self, node: fx.Node, shape: tuple[int, ...]) -> Node:
        """A mask that leaves out the keys behind each query."""
        size = (*(1 for _ in shape[:-2]), *shape[-2:])
        made = self.add(f"{node.name}_ones", "aten", shape=size, attrs={
            "target": "aten.ones.default", "args": (size,), "kwargs": {}})  # fmt: skip
        return self.add(f"{node.name}_causal", "aten", [made], shape=size, attrs={
            "target": "aten.tril.default", "args": (Ref(0), 0), "kwargs": {}})  # fmt: skip

    def read_max_pool2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        if not isinstance(a["self"], Node) or len(a["self"].shape) != 4:
            return None
        pool = {key: _two(a[key]) for key in ("kernel_size", "padding", "dilation")}
        pool["stride"] = _two(a["stride"]) if a.get("stride") else pool["kernel_size"]
        shape = pytree.tree_leaves(node.meta["val"])[0].shape
        return self.add(node, "max_pool2d", [a["self"]], shape=tuple(map(int, shape)),
                        attrs={"pool": {**pool, "ceil_mode": bool(a["ceil_mode"])}})  # fmt: skip

    def read_max_pool2d_with_indices(self, node: fx.Node, a: dict[str, Any]) -> Any:
        y = None if _takes_indices(node) else self.read_max_pool2d(node, a)
        return None if y is None else [y, None]

    def read_avg_pool2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        if not isinstance(a["self"], Node) or len(a["self"].shape) != 4:
            return None
        pool: dict[str, Any] = {key: _two(a[key]) for key in ("kernel_size", "padding")}
        pool["stride"] = _two(a["stride"]) if a.get("stride") else pool["kernel_size"]
        for key in ("ceil_mode", "count_include_pad", "divisor_override"):
            pool[key] = a[key]
        return self.add(node, "avg_pool2d", [a["self"]], attrs={"pool": pool})

    def read_max_pool1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.line(node, "max_pool2d", a["self"], {"pool": {
            **_pool1d(a), "dilation": (1, _one(a["dilation"])), "ceil_mode": bool(a["ceil_mode"])
        }})  # fmt: skip

    def read_avg_pool1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        flags = {key: bool(a[key]) for key in ("ceil_mode", "count_include_pad")}
        return self.line(node, "avg_pool2d", a["self"], {"pool": {
            **_pool1d(a), **flags, "divisor_override": None
        }})  # fmt: skip

    def read_adaptive_avg_pool1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.line(node, "adaptive_avg_pool2d", a["self"], _adaptive1d(a))

    def read_adaptive_max_pool1d(self, node: fx.Node, a: dict[str, Any]) -> Any:
        if _takes_indices(node):
            return None
        y = self.line(node, "adaptive_max_pool2d", a["self"], _adaptive1d(a))
        return None if y is None else [y, None]

    def read_adaptive_avg_pool2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.adaptive(node, "adaptive_avg_pool2d", a)

    def adaptive(self, node: fx.Node, op: str, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node) or len(x.shape) != 4:
            return None
        # F.adaptive_avg_pool2d(x, (None, 1)) comes with the input's size
        size = tuple(
            None if n == m else n for n, m in zip(a["output_size"], x.shape[2:], strict=True)
        )
        shape = pytree.tree_leaves(node.meta["val"])[0].shape
        return self.add(node, op, [x], attrs={"output_size": size}, shape=tuple(map(int, shape)))

    def read_adaptive_max_pool2d(self, node: fx.Node, a: dict[str, Any]) -> Any:
        """It returns indices as well; a list, of which getitem takes the first."""
        x = a["self"]
        if not isinstance(x, Node) or len(x.shape) != 4:
            return None
        if _takes_indices(node):
            return None
        y = self.adaptive(node, "adaptive_max_pool2d", a)
        return None if y is None else [y, None]

    def read_mean(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node) or a.get("dim") is None:
            return None
        dims = {d % len(x.shape) for d in a["dim"]}
        if len(dims) == 1 and a.get("keepdim") and (is_part(x) or _centers(node)):
            return None
        return self.over(node, "adaptive_avg_pool2d", x, dims, bool(a.get("keepdim")))

    def read_amax(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node):
            return None
        dims = {d % len(x.shape) for d in a.get("dim") or range(len(x.shape))}
        return self.over(node, "adaptive_max_pool2d", x, dims, bool(a.get("keepdim")))

    def read_max(self, node: fx.Node, a: dict[str, Any]) -> Any:
        """Along one axis: it returns indices as well, as the poolings do."""
        by_axis = a.get("dim") is not None  # else it is a scalar, or the larger of two
        if not by_axis or node.meta["val"][0].dtype is not torch.float32 or _takes_indices(node):
            return None
        y = self.read_amax(node, {**a, "dim": [a["dim"]]})
        return None if y is None else [y, None]

    def over(self, node: fx.Node, op: str, x: Node, dims: set[int], keepdim: bool) -> Node | None:
        """Over height, width or channels of an image, or one axis of a sequence: pooling."""
        if len(x.shape) == 3 and dims in ({1}, {2}):
            return self.over_sequence(node, op, x, dims == {1}, keepdim)
        if len(x.shape) != 4 or not dims or 0 in dims or len(dims) == 3:
            return None
        order = [0, 1, 2, 3]
        if 1 in dims:  # what is kept of height and width, or one of both, are channels meanwhile
            channels = 2 if 3 in dims else 3
            order = [0, channels, 1, 5 - channels]
            x = self.permute(f"{node.name}_image", x, order)
        size = tuple(1 if d in dims else None for d in order[2:])
        shape = tuple(1 if d in dims else n for d, n in zip(order, x.shape, strict=True))
        attrs = {"output_size": size}
        y = self.add(node, op, [x], name=f"{node.name}_pool", attrs=attrs, shape=shape)
        if not keepdim:
            left = [n for d, n in zip(order, shape, strict=True) if d not in dims]
            order = [d for d in order if d not in dims]
            name = _of_one(node) if order == sorted(order) else f"{node.name}_flat"
            flat = self.reshape(name, y, left)
            if flat is None:
                return None
            y = flat
        return self.permute(_of_one(node), y, [order.index(d) for d in sorted(order)])

    def over_sequence(
        self, node: fx.Node, op: str, x: Node, features_last: bool, keepdim: bool
    ) -> Node | None:
        """(B, C, L), or (B, L, C), as an image of L x 1 pixels."""
        if features_last:
            x = self.permute(f"{node.name}_turned", x, (0, 2, 1))
        b, c, length = x.shape
        image = self.add(f"{node.name}_image", "reshape", [x], shape=(b, c, length, 1),
                         attrs={"groups": (_axis(0), _axis(1), ((2,), (None, 1)))})  # fmt: skip
        y = self.add(node, op, [image], name=f"{node.name}_pool",
                     attrs={"output_size": (1, 1)}, shape=(b, c, 1, 1))  # fmt: skip
        groups = (_axis(0), ((1, 2, 3), (None,)))
        flat = self.add(f"{node.name}_flat" if keepdim else _of_one(node), "reshape", [y],
                        attrs={"groups": groups}, shape=(b, c))  # fmt: skip
        if not keepdim:
            return flat
        return self.reshape(_of_one(node), flat, (b, 1, c) if features_last else (b, c, 1))

    def read_upsample_nearest2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a.get("input", a.get("self"))
        if not isinstance(x, Node):
            return None
        return self.add(node, "upsample_nearest2d", [x], attrs={"size": _size(node, a)})

    def read__upsample_nearest_exact2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """By whole factors, no other place is nearer."""
        factors = _size(node, a).get("scale_factor", (0.5,))
        whole = all(factor.is_integer() for factor in factors)
        return self.read_upsample_nearest2d(node, a) if whole else None

    def read_upsample_bilinear2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a.get("input", a.get("self"))
        if not isinstance(x, Node):
            return None
        attrs = {"size": _size(node, a), "align_corners": a["align_corners"]}
        return self.add(node, "upsample_bilinear2d", [x], attrs=attrs)

    def read_upsample_nearest1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, size = a.get("input", a.get("self")), _size(node, a)
        # by another factor torch rounds places of sequences otherwise than those of images
        if "scale_factor" in size and not size["scale_factor"][1].is_integer():
            return None
        return self.line(node, "upsample_nearest2d", x, {"size": size})

    def read_upsample_linear1d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a.get("input", a.get("self"))
        attrs = {"size": _size(node, a), "align_corners": a["align_corners"]}
        return self.line(node, "upsample_bilinear2d", x, attrs)

    def read_cat(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        parts = a["tensors"]
        if not all(isinstance(v, Node | Tensor) for v in parts):
            return None
        if any(len(v.shape) != len(parts[0].shape) for v in parts):
            return None
        parts = [
            self.constant(f"{node.name}_constant{i}", v) if isinstance(v, Tensor) else v
            for i, v in enumerate(parts)
        ]
        dim = (a.get("dim") or 0) % len(parts[0].shape)
        return parts[0] if len(parts) == 1 else self.add(node, "concat", parts, attrs={"dim": dim})

    read_concat = read_concatenate = read_cat

    def read_stack(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """A concatenation along a new axis."""
        parts = a["tensors"]
        if not all(isinstance(v, Node) and v.shape == parts[0].shape for v in parts):
            return None
        shape = list(parts[0].shape)
        dim = (a.get("dim") or 0) % (len(shape) + 1)
        shape.insert(dim, 1)
        apart = [self.reshape(f"{node.name}_{i}", v, shape) for i, v in enumerate(parts)]
        return self.add(node, "concat", apart, attrs={"dim": dim})  # type: ignore[arg-type]

    def read_glu(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """The first half times the sigmoid of the second."""
        x, dim = a["self"], a.get("dim", -1)
        if not isinstance(x, Node) or not x.shape:
            return None
        dim %= len(x.shape)
        half = x.shape[dim] // 2
        first = self.part(f"{node.name}_first", x, dim, 0, half)
        gate = self.part(f"{node.name}_gate", x, dim, half, 2 * half)
        calls: Any = [("aten.sigmoid.default", (Ref(0),), {})]
        opened = self.add(f"{node.name}_open", "pointwise", [gate], attrs={"calls": calls},
                          shape=gate.shape)  # fmt: skip
        return self.add(node, "mul", [first, opened])

    def read_expand(self, node: fx.Node, a: dict[str, Any]) -> Node | Tensor | None:
        """What is the same along an axis, where all who take it broadcast it themselves: a class
        token or a mask for any batch, factors of channels for any image."""
        x, shape = a["self"], _shape(node)
        if not isinstance(x, Tensor | Node):
            return None
        if node.meta["val"].dtype is torch.bool:
            taken = {_name(user.target) for user in node.users}
            masks = isinstance(x, Tensor) and taken == {"scaled_dot_product_attention"}
            return x if masks else None
        size = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
        grown = [i for i, (n, m) in enumerate(zip(shape, size, strict=True)) if n != m]

        def broadcasts(user: fx.Node) -> bool:
            name = _name(user.target)
            if name not in ("cat", "add", "sub", "mul", "div"):
                return False
            values = [v.meta["val"] for v in user.all_input_nodes]
            if name == "cat" and (
                (_arguments(user, user.target).get("dim") or 0) % len(shape) in grown
                or any(v.dtype != torch.float32 or v.dim() != len(shape) for v in values)
            ):
                return False
            others = (_shape(v) for v in user.all_input_nodes if _name(v.target) not in _GROWING)
            return any(
                len(other) == len(shape) and all(other[i] == shape[i] for i in grown)
                for other in others
            )

        if not all(map(broadcasts, node.users)):
            return None
        if isinstance(x, Tensor):
            return self.constant(node.name, x.reshape(size))
        return self.reshape(f"{node.name}_axes", x, size)

    read_expand_as = read_broadcast_to = read_expand

    def read_repeat(self, node: fx.Node, a: dict[str, Any]) -> Node | Tensor | None:
        """Of axes of size 1 an expansion, of others a concatenation."""
        x, shape = a["self"], _shape(node)
        size = (1,) * (len(shape) - len(x.shape)) + tuple(x.shape)
        times = [n // m if m else 1 for n, m in zip(shape, size, strict=True)]
        if 0 in shape:
            return None
        if all(m == 1 for m, count in zip(size, times, strict=True) if count != 1):
            return self.read_expand(node, a)
        longer = [dim for dim, count in enumerate(times) if count != 1]
        if not isinstance(x, Node) or len(size) != len(x.shape) or longer != longer[:1]:
            return None
        (dim,) = longer
        if dim == 0 or not self.unrolls or times[dim] > MAX_TERMS:
            return None
        return self.add(node, "concat", [x] * times[dim], attrs={"dim": dim})

    read_tile = read_repeat

    def read_repeat_interleave(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """A concatenation along a new axis behind that one, then both are one."""
        x, times, dim = a["self"], a.get("repeats"), a.get("dim")
        if not isinstance(x, Node) or not isinstance(times, int) or dim is None:
            return None
        dim %= len(x.shape)
        if dim == 0 or not self.unrolls or not 1 <= times <= MAX_TERMS:
            return None
        shape = (*x.shape[: dim + 1], 1, *x.shape[dim + 1 :])
        apart = self.reshape(f"{node.name}_apart", x, shape)
        if apart is None:
            return None
        shape = (*x.shape[: dim + 1], times, *x.shape[dim + 1 :])
        together = self.add(f"{node.name}_times", "concat", [apart] * times, shape=shape,
                            attrs={"dim": dim + 1})  # fmt: skip
        alone = ((d,) if d != dim else (dim, dim + 1) for d in range(len(shape)) if d != dim + 1)
        groups = tuple((axes, (None,)) for axes in alone)
        return self.add(node, "reshape", [together], attrs={"groups": groups})

    def read_chunk(self, node: fx.Node, a: dict[str, Any]) -> Any:
        return self.parts(node, a["self"], a.get("dim") or 0)

    read_split = read_split_with_sizes = read_tensor_split = read_chunk

    def read_hsplit(self, node: fx.Node, a: dict[str, Any]) -> Any:
        return self.parts(node, a["self"], 1)

    def parts(self, node: fx.Node, x: Any, dim: int) -> Any:
        """split and chunk are slices, as long as the sizes are those of the example."""
        if not isinstance(x, Node):
            return None
        dim %= len(x.shape)
        found, start = [], 0
        for i, value in enumerate(node.meta["val"]):
            end = start + int(value.shape[dim])
            found.append(self.part(f"{node.name}_{i}", x, dim, start, end))
            start = end
        return found if start == x.shape[dim] else None  # tensor_split by places in any order

    def part(self, name: str, x: Node, dim: int, start: int, end: int | None) -> Node:
        """Some places of an axis."""
        found = _concatenated(x, dim, start, end)
        if found is not None:
            return found
        shape = list(x.shape)
        shape[dim] = len(range(*slice(start, end).indices(shape[dim])))
        attrs = {"dim": dim, "start": start, "end": end, "step": 1}
        return self.add(name, "slice", [x], shape=tuple(shape), attrs=attrs)

    def read_roll(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """The end before the beginning, along each axis."""
        x = a["self"]
        if not isinstance(x, Node) or not a.get("dims"):
            return None
        for i, (shift, dim) in enumerate(zip(a["shifts"], a["dims"], strict=True)):
            dim %= len(x.shape)
            if shift == 0:
                continue
            if abs(shift) >= x.shape[dim]:
                return None
            name = f"{node.name}_{i}"
            ends = [
                self.part(f"{name}_end", x, dim, -shift, None),
                self.part(f"{name}_begin", x, dim, 0, -shift),
            ]
            x = self.add(node, "concat", ends, name=name, attrs={"dim": dim}, shape=x.shape)
        return x

    def read_unbind(self, node: fx.Node, a: dict[str, Any]) -> list[Any] | None:
        x = a["self"]
        if not isinstance(x, Node):
            return None
        dim = (a.get("dim") or 0) % len(x.shape)
        shape = x.shape[:dim] + x.shape[dim + 1 :]
        attrs = {"groups": _without(dim, len(x.shape))}
        found = []
        for i in range(x.shape[dim]):
            part = self.part(f"{node.name}_{i}_part", x, dim, i, i + 1)
            found.append(self.add(f"{node.name}_{i}", "reshape", [part], shape=shape, attrs=attrs))
        return found

    def read_slice(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node):
            return None
        dim = (a.get("dim") or 0) % len(x.shape)
        start, end, step = a.get("start") or 0, a.get("end"), a.get("step") or 1
        if end is not None and (end >= 2**31 or end == x.shape[dim]):
            end = None
        if (start, end, step) == (0, None, 1):
            return x
        found = _concatenated(x, dim, start, end) if step == 1 else None
        attrs = {"dim": dim, "start": start, "end": end, "step": step}
        return self.add(node, "slice", [x], attrs=attrs) if found is None else found

    def read_narrow(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        start, length = a["start"], a["length"]
        if not isinstance(a["self"], Node) or not isinstance(start, int):
            return None
        start %= a["self"].shape[a["dim"]]
        return self.read_slice(node, {**a, "start": start, "end": start + length})

    def read_index_select(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.places(node, a["self"], a["dim"], a["index"])

    def read_index(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        (*before, index), x = a["indices"], a["self"]
        if any(value is not None for value in before):
            return None
        return self.places(node, x, len(before), index)

    def read_flip(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, dims = a["self"], a["dims"]
        if not isinstance(x, Node) or len(dims) != 1:
            return None
        return self.places(node, x, dims[0], torch.arange(x.shape[dims[0]]).flip(0))

    def places(self, node: fx.Node, x: Any, dim: int, index: Any) -> Node | None:
        """Those of an axis that are known, in a few runs: their concatenation."""
        if not isinstance(x, Node) or node.meta["val"].dtype is not torch.float32:
            return None
        if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype is torch.bool:
            return None
        dim %= len(x.shape)
        if dim == 0 or not self.unrolls:
            return None
        n = x.shape[dim]
        runs: list[list[int]] = []  # [begin, end]
        for place in (index % n).tolist() if n else []:
            if runs and runs[-1][1] == place:
                runs[-1][1] += 1
            else:
                runs.append([place, place + 1])
        if not 1 <= len(runs) <= MAX_TERMS:
            return None
        parts = [self.part(f"{node.name}_{i}", x, dim, *run) for i, run in enumerate(runs)]
        return self.add(node, "concat", parts, attrs={"dim": dim})

    def read_select(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node):
            return None
        dim, index = a["dim"] % len(x.shape), a["index"]
        y = self.part(f"{node.name}_slice", x, dim, index, None if index == -1 else index + 1)
        return self.add(node, "reshape", [y], attrs={"groups": _without(dim, len(x.shape))})

    def read_sum(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        """Of a few places on an axis, one added to the other."""
        x, dims = a["self"], a.get("dim")
        if not isinstance(x, Node) or len(dims or ()) != 1 or a.get("dtype") is not None:
            return None
        dim: int = dims[0] % len(x.shape)  # type: ignore[index]
        if dim == 0 or not self.unrolls or not 2 <= x.shape[dim] <= MAX_TERMS:
            return None
        shape = (*x.shape[:dim], *[1] * bool(a.get("keepdim")), *x.shape[dim + 1 :])
        total = None
        for i in range(x.shape[dim]):
            part = self.part(f"{node.name}_{i}", x, dim, i, i + 1)
            term = self.reshape(f"{part.name}_term", part, shape)
            name: Any = node if i == x.shape[dim] - 1 else f"{part.name}_sum"
            total = term if total is None else self.add(name, "add", [total, term], shape=shape)  # type: ignore[list-item]
        return total

    def read_reshape(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        return self.reshape(node, x, node.meta["val"].shape) if isinstance(x, Node) else None

    read_view = read_flatten = read_unflatten = read_squeeze = read_unsqueeze = read_reshape
    read__unsafe_view = read_reshape_as = read_view_as = read_reshape

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

    def read_permute(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        return self.permute(node, x, a["dims"]) if isinstance(x, Node) else None

    def read_transpose(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node):
            return None
        dims = list(range(len(x.shape)))
        i, j = a["dim0"] % len(dims), a["dim1"] % len(dims)
        dims[i], dims[j] = dims[j], dims[i]
        return self.permute(node, x, dims)

    read_swapdims = read_transpose

    def read_swapaxes(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.read_transpose(node, {**a, "dim0": a["axis0"], "dim1": a["axis1"]})

    def read_movedim(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node):
            return None
        rank = len(x.shape)
        source, target = (
            [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]
            for dims in (a["source"], a["destination"])
        )
        dims = [d for d in range(rank) if d not in source]
        for place, d in sorted(zip(target, source, strict=True)):
            dims.insert(place, d)
        return self.permute(node, x, dims)

    read_moveaxis = read_movedim

    def read_t(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node) or len(x.shape) != 2:
            return None
        return self.permute(node, x, (1, 0))

    def read_mT(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.read_transpose(node, {**a, "dim0": -2, "dim1": -1})

    read_adjoint = read_mH = read_mT

    def permute(self, node: fx.Node | str, x: Node, dims: Sequence[int]) -> Node:
        dims = tuple(d % len(dims) for d in dims)
        if dims == tuple(range(len(dims))):
            return x
        shape = tuple(x.shape[d] for d in dims)
        return self.add(node, "permute", [x], attrs={"dims": dims}, shape=shape)

    def read_channel_shuffle(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        groups = a["groups"]
        return self.rearranged(node, a, (groups, None), (0, 2, 1, 3, 4), ((1, 2),))

    def read_pixel_shuffle(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        r = a["upscale_factor"]
        return self.rearranged(node, a, (None, r, r), (0, 1, 4, 2, 5, 3), ((2, 3), (4, 5)))

    def read_pixel_unshuffle(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x, r = a["self"], a["downscale_factor"]
        if not isinstance(x, Node) or len(x.shape) != 4:
            return None
        b, c, h, w = x.shape
        groups = _axis(0), _axis(1), ((2,), (None, r)), ((3,), (None, r))
        split = self.add(f"{node.name}_split", "reshape", [x], attrs={"groups": groups},
                         shape=(b, c, h // r, r, w // r, r))  # fmt: skip
        turned = self.permute(f"{node.name}_turned", split, (0, 1, 3, 5, 2, 4))
        groups = _axis(0), ((1, 2, 3), (None,)), _axis(4), _axis(5)
        return self.add(node, "reshape", [turned], attrs={"groups": groups})

    def rearranged(
        self, node: fx.Node, a: dict[str, Any], parts: tuple[int | None, ...],
        dims: tuple[int, ...], joined: tuple[tuple[int, ...], ...],
    ) -> Node | None:  # fmt: skip
        """Channels of an image split into parts, permuted, and axes joined again."""
        x = a["self"]
        if not isinstance(x, Node) or len(x.shape) != 4:
            return None
        b, c, h, w = x.shape
        known = prod(n for n in parts if n is not None)
        shape = (b, *(c // known if n is None else n for n in parts), h, w)
        attrs = {"groups": (_axis(0), ((1,), parts), _axis(2), _axis(3))}
        split = self.add(f"{node.name}_split", "reshape", [x], shape=shape, attrs=attrs)
        turned = self.permute(f"{node.name}_turned", split, dims)
        alone = {d: (d,) for d in range(len(dims))} | {axes[0]: axes for axes in joined}
        inner = {axes[1] for axes in joined}
        groups = tuple((axes, (None,)) for d, axes in sorted(alone.items()) if d not in inner)
        return self.add(node, "reshape", [turned], attrs={"groups": groups})

    def read_pad(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        x = a["self"]
        if not isinstance(x, Node) or a.get("value"):
            return None
        if not a["pad"]:
            return x
        mode = a.get("mode", "constant")
        return self.add(node, "pad", [x], attrs={"pad": tuple(a["pad"]), "mode": mode})

    def read_reflection_pad2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.read_pad(node, {"self": a["self"], "pad": a["padding"], "mode": "reflect"})

    read_reflection_pad1d = read_reflection_pad2d

    def read_replication_pad2d(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.read_pad(node, {"self": a["self"], "pad": a["padding"], "mode": "replicate"})

    read_replication_pad1d = read_replication_pad2d

    def read_constant_pad_nd(self, node: fx.Node, a: dict[str, Any]) -> Node | None:
        return self.read_pad(node, a)


def _name(target: Any) -> str:
    """An operator's name, without its namespace and its overload; "" of what is none."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else schema.name.split("::")[1]


def _of_one(node: fx.Node) -> fx.Node | str:
    """What `add` names a node's value by: of several, the first one's name."""
    return node if isinstance(node.meta["val"], Tensor) else f"{node.name}_0"


def _centers(mean: fx.Node) -> bool:
    """Whether it is subtracted from what it is the mean of: a part of a norm."""
    own = mean.args[0], mean
    return any(_name(user.target) == "sub" and user.args[:2] == own for user in mean.users)


def _used(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the results depend on."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in used:
            used.update((node, *node.all_input_nodes))
    return used


def _shape(node: fx.Node) -> tuple[int, ...]:
    """Of a node's value, in the example that was traced; () if that is no tensor."""
    value = node.meta.get("val")
    return tuple(map(int, value.shape)) if isinstance(value, Tensor) else ()


def _memory(node: fx.Node) -> int:
    """Of two values that lie in the same memory it is the same."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else 0


def _arguments(node: fx.Node, target: Any) -> dict[str, Any]:
    """All arguments by their names in the operator's schema."""
    given: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            given[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            given[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            given[argument.name] = argument.default_value
    return given


def _not_recurrent(node: fx.Node, a: dict[str, Any], wanted: set[Any]) -> str:
    """Why a recurrent layer, of whose results some are wanted, stays float; "" if it does not."""
    if "batch_sizes" in a:
        return "its sequences are packed"
    weights = a["params"]
    if not isinstance(a["input"], Node) or not all(isinstance(w, Tensor) for w in weights):
        return "its input is a constant, or its weights are computed"
    if len(weights) != a["num_layers"] * (1 + a["bidirectional"]) * (4 if a["has_biases"] else 2):
        return "it has a projection"
    if a["train"] and a["dropout"]:
        return "its dropout is on"
    states: Any = _arguments(node, node.target)["hx"]
    if not all(map(_is_zero, states if isinstance(states, list | tuple) else [states])):
        return "it is given its first state"
    return "its cell is asked for" if 2 in wanted else ""


def _is_zero(state: fx.Node) -> bool:
    """Whether a tensor is made of zeros, whatever its shape; a parameter may become another."""
    name = _name(state.target)
    if name in ("full", "new_full", "full_like"):
        return bool(state.args[-1] == 0)
    moved = name in (*_GROWING, "unsqueeze", "reshape", "view", "to", "_to_copy", *_SAME)
    return name in ("zeros", "new_zeros", "zeros_like") or (moved and _is_zero(state.args[0]))  # type: ignore[arg-type]


def _concatenated(x: Node, dim: int, start: int, end: int | None) -> Node | None:
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


def _tensors(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    """Of a node with a weight and, perhaps, a bias."""
    return {"weight": weight} if bias is None else {"weight": weight, "bias": bias}


def _off(a: dict[str, Any]) -> bool:
    return not a.get("train", a.get("training", False))


def _two(value: Any) -> tuple[int, int]:
    both = [value, value] if isinstance(value, int) else list(value)
    return (both[0], both[-1])


def _geometry(a: dict[str, Any], kernel: Sequence[int]) -> dict[str, Any]:
    """stride, padding (before and after) and dilation of a convolution, axis by axis."""
    axes = len(kernel)
    stride, dilation = (several(key, _list(a[key]), axes, 1) for key in ("stride", "dilation"))
    padding = a["padding"] if isinstance(a["padding"], str) else _list(a["padding"])
    sides = explicit_padding(padding, tuple(kernel), stride, dilation)
    return {"stride": stride, "padding": sides, "dilation": dilation}


def _list(value: Any) -> Any:
    """A number, or all of them: torch takes one for all axes."""
    many = [value] if isinstance(value, int) else list(value)
    return many[0] if len(many) == 1 else many


def _axis(d: int) -> Any:
    """The group of a reshape that leaves an axis alone."""
    return (d,), (None,)


def _without(dim: int, rank: int) -> Any:
    """The groups of a reshape that drops an axis of size 1."""
    return tuple(((d,), ()) if d == dim else _axis(d) for d in range(rank))


def _one(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])


def _takes_indices(node: fx.Node) -> bool:
    """Whether somebody wants to know where a pooling found what it returns."""
    return any(user.users and user.args[1] != 0 for user in node.users)


def _pool1d(a: dict[str, Any]) -> dict[str, Any]:
    """Kernel, stride and padding of a pooling along lines, as of images."""
    kernel = _one(a["kernel_size"])
    stride = _one(a["stride"]) if a.get("stride") else kernel
    return {"kernel_size": (1, kernel), "stride": (1, stride), "padding": (0, _one(a["padding"]))}


def _adaptive1d(a: dict[str, Any]) -> dict[str, Any]:
    """The size of an adaptive pooling along lines; None is the input's own."""
    size = _one(a["output_size"])
    own = isinstance(a["self"], Node) and a["self"].shape[-1:] == (size,)
    return {"output_size": (None, None if own else size)}


def _size(node: fx.Node, a: dict[str, Any]) -> dict[str, Any]:
    """Of an image, or a line: the scale where one is given, for that holds for any size."""
    factors = a.get("scale_factors")
    if factors is None and a.get("scales_h") is not None:
        factors = [a["scales_h"], a["scales_w"]]
    if factors is None and a.get("scales") is not None:
        factors = [a["scales"]]
    if factors:
        return {"scale_factor": (1.0, *map(float, factors))[-2:]}
    return {"size": (1, *map(int, node.meta["val"].shape[2:]))[-2:]}


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
