"""A float network as a list of nodes: what `capture` makes of a module, and what everything that
thinks about a whole network works on: fusing, calibration, remedies, training, lowering.

Operations have torch's names and torch's meaning and order of axes (NCHW). What has no name here is
an "aten" node: any other torch operator, which stays float.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastq.layout import filled
from fastq.qparams import GATES
from fastq.sizes import Shapes, has_size, padding_to, reshaped, sized
from fastq.weights import scale_outputs

Values = dict["Node", Any]
POINTWISE_NAMESPACE = "fastq_pointwise"  # of operators made by `fastq.pointwise`


def shapes_of(arguments: Iterable[Any]) -> Shapes:
    """What a `Size` counts from: the shapes of the tensors among a network's arguments."""
    return [tuple(x.shape) for x in tensors_of(arguments)]


@dataclass(eq=False)
class Node:
    """One operation.

    op       a key of OPERATIONS, "input", "constant" or "aten".
    inputs   the nodes whose values it takes.
    attrs    the operation's arguments that are no tensors, by torch's names.
    tensors  its parameters: "weight", "bias", and so on; the float network's own memory.
    origin   what `tensors` were computed from, if they are not the network's own: a batch norm's
             "norm_weight", "norm_bias", "running_mean" and "running_var", where it has them, and
             "weight" and "bias" of the product that it was folded into. attrs["norm"] has its eps
             and momentum. "factor" and "shift" are constants that were folded into it.
    layer    the module that computes it, by its name in the model; "" is the model itself.
    kind     the module's class.
    shape    of its value for the example that was traced; () if that is no tensor.
    """

    name: str
    op: str
    inputs: list[Node] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, Tensor] = field(default_factory=dict)
    layer: str = ""
    kind: str = ""
    shape: tuple[int, ...] = ()

    @property
    def extent(self) -> tuple[int | None, ...]:
        """An input's sizes, None for those that may be other ones."""
        free = self.attrs.get("free", (0,))
        return tuple(None if i in free else n for i, n in enumerate(self.shape))

    def __repr__(self) -> str:
        inputs = ", ".join(node.name for node in self.inputs)
        return f"{self.name} = {self.op}({inputs})"


@dataclass(eq=False)
class Graph:
    """Nodes in an order in which each comes after its inputs.

    inputs   the "input" nodes, in the order of the flattened arguments.
    outputs  what the flattened result is made of: nodes, and constants that are no tensors.
    """

    nodes: list[Node]
    inputs: list[Node]
    outputs: list[Any]

    def users(self) -> dict[Node, list[Node]]:
        """Node -> the nodes that take its value, once for each time."""
        users: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for value in node.inputs:
                users[value].append(node)
        return users

    def output_nodes(self) -> set[Node]:
        return {value for value in self.outputs if isinstance(value, Node)}

    def remove_unused(self) -> None:
        """Drop the nodes that no output depends on; inputs stay."""
        needed = self.output_nodes() | set(self.inputs)
        for node in reversed(self.nodes):
            if node in needed:
                needed.update(node.inputs)
        self.nodes = [node for node in self.nodes if node in needed]

    def replace(self, old: Node, new: Node) -> None:
        """Let all users of `old`, and the outputs, take `new` instead."""
        for node in self.nodes:
            node.inputs = [new if value is old else value for value in node.inputs]
        self.outputs = [new if value is old else value for value in self.outputs]

    def run(
        self,
        arguments: Iterable[Any],
        watch: Callable[[Node, Any], Any] | None = None,
        tensors: Mapping[Node, dict[str, Tensor]] | None = None,
        unclamped: Callable[[Node, Tensor], None] | None = None,
    ) -> list[Any]:
        """The network in float, of the leaves of its arguments.

        watch      watch(node, value) sees each value, and may return another.
        tensors    parameters to take instead of a node's own.
        unclamped  unclamped(node, value) sees each operation's value before its clamp.
        """
        given = tensors_of(arguments)
        shapes = shapes_of(given)
        last = {value: node for node in self.nodes for value in node.inputs}
        kept = self.output_nodes()
        values: Values = {}
        for node in self.nodes:
            if node.op == "input":
                value = pixels_together(given[self.inputs.index(node)])
            else:
                own = (tensors or {}).get(node)
                stand_in = node if own is None else replace(node, tensors=own)
                value = evaluate(stand_in, [values[v] for v in node.inputs], shapes, unclamped)
            if watch is not None:
                changed = watch(node, value)
                value = value if changed is None else changed
            values[node] = value
            for taken in set(node.inputs):  # its memory is free as soon as nobody waits for it
                if last[taken] is node and taken not in kept:
                    del values[taken]
        return [values[v] if isinstance(v, Node) else sized(v, shapes) for v in self.outputs]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes)

    def __str__(self) -> str:
        return "\n".join(map(repr, self.nodes))


def tensors_of(arguments: Iterable[Any]) -> list[Tensor]:
    """The values of a graph's inputs, among the leaves of its arguments."""
    return [x for x in arguments if isinstance(x, Tensor)]


def pixels_together(x: Any) -> Any:
    """The same value, with all channels of a pixel side by side in memory, if it has four axes.

    What is made of it has that order too, and oneDNN's convolutions need not reorder it: measured,
    a float pass takes 0.8 of the time for ResNet-50 and 0.4 for MobileNetV2.
    """
    if isinstance(x, Tensor) and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def evaluate(
    node: Node,
    inputs: list[Any],
    shapes: Shapes = (),
    unclamped: Callable[[Node, Tensor], None] | None = None,
) -> Any:
    """The value of a node, in float; unclamped(node, value) sees it before its clamp.

    shapes  of the inputs of the network; of a node without a `Size` none will do, and is faster.
    """
    if node.op == "constant":
        return node.tensors["value"]
    if node.op == "aten":  # some, as view, ask for the order that the network's own values have
        plain = [x.contiguous() if isinstance(x, Tensor) else x for x in inputs]
        fill = partial(filled, inputs=plain, tensors=node.tensors, shapes=shapes)
        return _target(node.attrs["target"])(
            *map(fill, node.attrs["args"]), **{k: fill(v) for k, v in node.attrs["kwargs"].items()}
        )
    sizes = node.attrs.get("size") or node.attrs.get("groups")  # of an image, or of axes
    if shapes and has_size(sizes):
        node = replace(node, attrs=sized(node.attrs, shapes))
    y = OPERATIONS[node.op](node, *inputs)
    if unclamped is not None:
        unclamped(node, y)
    if "clamp" in node.attrs:
        # a product's value is new memory, so it may be clamped where it is
        y = (y.clamp_ if node.op in PRODUCTS else y.clamp)(*node.attrs["clamp"])
    return y


def normalization(eps: float, origin: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(factor, shift) of a batch norm's x * factor + shift.

    In float64: folded into a product, it is rounded once.
    """
    factor = 1 / (origin["running_var"].double() + eps).sqrt()
    if "norm_weight" in origin:
        factor = factor * origin["norm_weight"].double()
    shift = -origin["running_mean"].double() * factor
    if "norm_bias" in origin:
        shift = shift + origin["norm_bias"].double()
    return factor, shift


def scaled(
    weight: Tensor | None,
    bias: Tensor | None,
    factor: Tensor | None,
    shift: Tensor | None,
    groups: int = 0,
) -> dict[str, Tensor]:
    """Weight and bias, float32, of what is then multiplied and shifted per output: weight * factor
    and bias * factor + shift, each rounded once. Where it has none, they are the factor and the
    shift themselves.

    groups  of a transposed convolution, whose weight has its outputs second.
    """
    if factor is not None:
        factor = factor.double()
        weight = factor if weight is None else scale_outputs(weight.double(), factor, groups)
        bias = None if bias is None else bias.double().flatten() * factor
    if shift is not None:
        bias = shift if bias is None else bias.double().flatten() + shift.double()
    made = {"weight": weight, "bias": bias}
    return {name: tensor.float() for name, tensor in made.items() if tensor is not None}


@functools.cache
def _target(name: str) -> Any:
    """The function of an "aten" node: one of FUNCTIONS, or an operator by
    "namespace.name.overload"."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, packet, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload)


# those that are called past torch's dispatcher, which takes as long as a small layer, or has no
# gradient of them
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": lambda values, index: values[index],
    "aten.copy.default": lambda x, source, *_, **__: source.to(x.dtype).expand_as(x).clone(),
}


def check_target(name: Any) -> None:
    """ValueError unless this names an operator that only computes: a file may have named it."""
    parts = name.split(".") if isinstance(name, str) else []
    if parts and name in FUNCTIONS:
        return
    known = parts[:1] in (["aten"], [POINTWISE_NAMESPACE]) or name in INT8_OPERATORS
    if len(parts) == 3 and known and parts[1] not in TOUCH_FILES:
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        if isinstance(packet, torch._ops.OpOverloadPacket) and parts[2] in packet.overloads():
            return
    raise ValueError(
        f"{name!r:.80} is no operator of torch that only computes, and no function made with "
        "fastq.pointwise before"
    )


TOUCH_FILES = ("from_file",)
RECURRENT_LAYER = "fastq.recurrent.default"
CELL_LAYER, CONVOLUTION_LAYER = "fastq.recurrent_cell.default", "fastq.convolution.default"
EMBEDDING_LAYER, BAG_LAYER = "fastq.embedding.default", "fastq.embedding_bag.default"
INT8_OPERATORS = (
    "fastq.linear.default", CONVOLUTION_LAYER, RECURRENT_LAYER, CELL_LAYER, EMBEDDING_LAYER,
    BAG_LAYER,
)  # fmt: skip


def run_calls(calls: list[Any], x: Tensor) -> Tensor:
    """A chain of (target, args, kwargs): Ref(0) is x, Ref(i) the result of call i."""
    values = [x]
    for target, args, kwargs in calls:
        fill = partial(filled, inputs=values, tensors={})
        given = [
            torch.tensor(v) if tensor and isinstance(v, int | float) else fill(v)
            for v, tensor in zip(args, _take_tensors(target), strict=False)
        ]
        values.append(_target(target)(*given, **{k: fill(v) for k, v in kwargs.items()}))
    return values[-1]


@functools.cache
def _take_tensors(target: str) -> list[bool]:
    """Which arguments of a function are tensors: a number among them was one, of one element."""
    arguments = _target(target)._schema.arguments
    return [str(a.type) in ("Tensor", "Optional[Tensor]") for a in arguments]


def _conv2d(node: Node, x: Tensor, *add: Tensor) -> Tensor:
    a = node.attrs
    (top, bottom), (left, right) = a["padding"]
    if (top, left) == (bottom, right):
        padding = (top, left)
    else:
        x, padding = F.pad(x, (left, right, top, bottom)), (0, 0)
    y = F.conv2d(
        x, node.tensors["weight"], node.tensors.get("bias"), a["stride"], padding, a["dilation"],
        a["groups"],
    )  # fmt: skip
    return _sum(node, y, *add)


def _linear(node: Node, x: Tensor, *add: Tensor) -> Tensor:
    return _sum(node, F.linear(x, node.tensors["weight"], node.tensors.get("bias")), *add)


def _sum(node: Node, product: Tensor, *add: Tensor) -> Tensor:
    """The product, which is new memory, and what is added to it."""
    for x in add:
        x = added(node, x)
        product = product.add_(x) if product.dtype == x.dtype else product + x
    return product


def added(node: Node, x: Tensor) -> Tensor:
    """What a product adds, of its second input: a remedy may have scaled the channels of that."""
    factor = node.tensors.get("add_factor")
    if factor is None:
        return x
    return x * (factor.to(x.dtype) if node.op == "linear" else along_channels(factor, x))


def _conv3d(node: Node, x: Tensor) -> Tensor:
    a = node.attrs
    x = F.pad(x, [side for sides in reversed(a["padding"]) for side in sides])
    return F.conv3d(
        x, node.tensors["weight"], node.tensors.get("bias"), a["stride"], 0, a["dilation"],
        a["groups"],
    )  # fmt: skip


def _conv_transpose(node: Node, x: Tensor) -> Tensor:
    a = node.attrs
    function = F.conv_transpose3d if node.op == "conv_transpose3d" else F.conv_transpose2d
    return function(
        x, node.tensors["weight"], node.tensors.get("bias"), a["stride"], a["padding"],
        a["output_padding"], a["groups"], a["dilation"],
    )  # fmt: skip


def _affine(node: Node, x: Tensor) -> Tensor:
    """x * factor + shift along axis 1."""
    factor, shift = (along_channels(node.tensors[name], x) for name in ("factor", "shift"))
    return x * factor + shift


def along_channels(values: Tensor, x: Tensor) -> Tensor:
    """One for each place on axis 1 of x, to be broadcast."""
    return values.to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))


def _grid(node: Node, x: Tensor) -> Tensor:
    """x, padded with 0, * factor + shift along axis 1: what a grid rounds, 0 to 255/256."""
    return _affine(node, F.pad(x, node.attrs["pad"]))


def _recurrent(node: Node, x: Tensor) -> Tensor:
    """The hidden states of a cell, by its products with the inputs; torch's order of gates."""
    cell, time = node.attrs["cell"], node.attrs["time"]
    weight, bias = node.tensors["weight"], node.tensors.get("bias")
    steps = x.unbind(time)
    h = c = x.new_zeros(x.shape[1 - time], weight.shape[1])
    states = []
    for given in reversed(steps) if node.attrs["reverse"] else steps:
        xs = given.chunk(GATES[cell], -1)
        hs = F.linear(h, weight, bias).chunk(GATES[cell], -1)
        gates = [a + b for a, b in zip(xs, hs, strict=True)]
        match cell:
            case "lstm":
                i, f, g, o = gates
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            case "gru":
                made = (xs[2] + gates[0].sigmoid() * hs[2]).tanh()
                h = made + gates[1].sigmoid() * (h - made)
            case _:
                h = gates[0].tanh() if cell == "tanh" else gates[0].relu()
        states.append(h)
    return torch.stack(states[::-1] if node.attrs["reverse"] else states, time)


def _softmax(node: Node, x: Tensor, *masks: Tensor) -> Tensor:
    """softmax over what the mask is not 0 for. A line whose mask is 0 everywhere gets equal
    weights, if `uniform`, or none."""
    if not masks:
        return torch.softmax(x, node.attrs["dim"])
    (mask,) = masks
    y = torch.softmax(x.masked_fill(mask == 0, torch.finfo(x.dtype).min), node.attrs["dim"])
    return y if node.attrs["uniform"] else y * (mask != 0)


def _prelu(node: Node, x: Tensor) -> Tensor:
    return F.prelu(x, node.tensors["weight"])


def _reshape(node: Node, x: Tensor) -> Tensor:
    return x.reshape(reshaped(x.shape, node.attrs["groups"]))


def _concat(node: Node, *xs: Tensor) -> Tensor:
    """The others' axes broadcast: a constant is the same for all images."""
    dim = node.attrs["dim"]
    whole = torch.broadcast_shapes(*(x.narrow(dim, 0, 0).shape for x in xs))
    return torch.cat([x.expand(*whole[:dim], x.shape[dim], *whole[dim + 1 :]) for x in xs], dim)


def _pad(node: Node, x: Tensor) -> Tensor:
    """By numbers; or up to the sizes of attrs["size"], in parts that the numbers are shares of."""
    a = node.attrs
    widths = padding_to(a["pad"], a.get("size", {}).get("size", ()), x.shape)
    return F.pad(x, widths, a["mode"], a.get("value"))


def _slice(node: Node, x: Tensor) -> Tensor:
    a = node.attrs
    index = [slice(None)] * x.dim()
    index[a["dim"]] = slice(a["start"], a["end"], a["step"])
    return x[tuple(index)]


def _global_response_norm(node: Node, x: Tensor) -> Tensor:
    """ConvNeXt V2's, of (B, C, ...): x * (weight * |x| / (mean(|x|) + eps) + residual) + bias, |x|
    that of each channel."""
    size = torch.linalg.vector_norm(x, dim=tuple(range(2, x.dim())), keepdim=True)
    response = size / (size.mean(1, keepdim=True) + node.attrs["eps"])
    weight, bias = (node.tensors.get(name) for name in ("weight", "bias"))
    if weight is not None:
        response = response * along_channels(weight, x)
    y = x * (response + node.attrs.get("residual", 0.0))
    return y if bias is None else y + along_channels(bias, x)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "conv2d": _conv2d,
    "linear": _linear,
    "conv_transpose2d": _conv_transpose,
    "conv3d": _conv3d,
    "conv_transpose3d": _conv_transpose,
    "affine": _affine,
    "grid": _grid,
    "prelu": _prelu,
    "pointwise": lambda node, x: run_calls(node.attrs["calls"], x),
    "add": lambda node, x, y: torch.add(x, y, alpha=node.attrs.get("alpha", 1)),
    "mul": lambda node, x, y: x * y,
    "matmul": lambda node, x, y: torch.matmul(x, y) * node.attrs.get("factor", 1.0),
    "recurrent": _recurrent,
    "softmax": _softmax,
    "layer_norm": lambda node, x: F.layer_norm(
        x, node.attrs["shape"], eps=node.attrs["eps"],
        **{name: tensor.flatten() for name, tensor in node.tensors.items()},
    ),
    "rms_norm": lambda node, x: F.rms_norm(
        x, node.attrs["shape"], eps=node.attrs["eps"],
        **{name: tensor.flatten() for name, tensor in node.tensors.items()},
    ),
    "group_norm": lambda node, x: F.group_norm(
        x, node.attrs["groups"], eps=node.attrs["eps"], **node.tensors
    ),
    "global_response_norm": _global_response_norm,
    "max_pool2d": lambda node, x: F.max_pool2d(x, **node.attrs["pool"]),
    "avg_pool2d": lambda node, x: F.avg_pool2d(x, **node.attrs["pool"]),
    "adaptive_avg_pool2d": lambda node, x: F.adaptive_avg_pool2d(x, node.attrs["output_size"]),
    "adaptive_max_pool2d": lambda node, x: F.adaptive_max_pool2d(x, node.attrs["output_size"]),
    "upsample_nearest2d": lambda node, x: F.interpolate(x, **node.attrs["size"], mode="nearest"),
    "upsample_bilinear2d": lambda node, x: F.interpolate(
        x, **node.attrs["size"], mode="bilinear", align_corners=node.attrs["align_corners"]
    ),
    "concat": _concat,
    "reshape": _reshape,
    "permute": lambda node, x: x.permute(node.attrs["dims"]),
    "slice": _slice,
    "pad": _pad,
}  # fmt: skip

VOLUMES = ("conv3d", "conv_transpose3d")  # of volumes, which no program has
# Operations that compute with weights: what int8 wins most on.
PRODUCTS = ("conv2d", "linear", "conv_transpose2d", "matmul")
# Operations, no products, whose parameters are those of the channels: the second axis.
BY_CHANNEL = ("affine", "prelu", "group_norm", "global_response_norm")
# Values that keep the quantization of what they are made from.
MOVES = ("reshape", "permute", "slice", "pad", "concat", "max_pool2d", "adaptive_max_pool2d",
         "upsample_nearest2d", "upsample_bilinear2d")  # fmt: skip


def are_shares(value: Node) -> bool:
    """Whether a value is a softmax's, moved perhaps: its quantization is its own."""
    while value.op in MOVES and value.op != "concat":
        value = value.inputs[0]
    return value.op == "softmax"
