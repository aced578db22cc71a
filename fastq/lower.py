"""From a fused float graph and the ranges of its values to integer programs.

The nodes that have an integer form make up regions, as large as the network allows; what lies
between them stays float. A region becomes one `Program`: torch's axes become the program's (images
NHWC), ranges become scales and zero points, batch norms and activations are already part of
the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastq.arguments import LINES, REQUANTIZED
from fastq.graph import POINTWISE_NAMESPACE, PRODUCTS, VOLUMES, Graph, Node, pointwise
from fastq.program import NORMS, RECURRENT, WIDE, Program, Step
from fastq.qparams import (
    MAX_FACTOR,
    MAX_K,
    MAX_WIDE_FEATURES,
    UNCLAMPED,
    Dequant,
    QParams,
    Requant,
    limits,
)
from fastq.sizes import Size
from fastq.weights import MAX_BIAS, Conv2dWeight, LinearWeight, outputs_first, with_room

Weights = Callable[[Node], tuple[Any, Any]]  # a node's (int8 data, float32 scale per output)
Biases = Callable[[Node], Tensor | None]

NHWC = (0, 2, 3, 1)
# Values that keep the quantization of what they are made from.
MOVES = ("reshape", "permute", "slice", "pad", "concat", "max_pool2d", "adaptive_max_pool2d",
         "upsample_nearest2d", "upsample_bilinear2d")  # fmt: skip
# Operations whose values have a quantization of their own. A grid's run from 0 to almost 1, as a
# picture's do: weights that read it, and their gradients, are then of a usual size.
FIXED = {
    "softmax": QParams(np.array(1 / 255, np.float32)),
    "grid": QParams(np.array(1 / 256, np.float32)),
}
MASK = QParams(np.array(1.0, np.float32))  # of what softmax takes as its mask: 1.0 and 0.0
MOST_SHARES = 64  # of a softmax that others read than products: 4 steps each, were they equal
LEAST_EPSILON = 1e-30  # of a norm, in steps: an even line gives 0, not NaN
MOST_EPSILON = 2.0**96  # of a norm, in steps: next to it the variance is nothing in float32
SUFFIX = {np.dtype(np.uint8): "u8", np.dtype(np.int16): "s16"}  # of names
SUMS = ("add", "linear", "conv2d", "conv_transpose2d")  # make values that may be int16
WEIGHTED = ("conv2d", "linear", "conv_transpose2d")  # products with int8 weights
REARRANGED = ("reshape", "permute", "slice", "concat")
ACTIVATIONS = ("softmax", "pointwise", "prelu")
GIVEN_OUT = "given out as float32, which is finer than 255 steps"  # the reason of such values


def why_float(node: Node) -> str:
    """Why a node has no integer form; "" if it has one."""
    if node.op == "input":
        return "an input"
    if node.op == "aten":
        return node.attrs.get("why") or f"{node.attrs['target']} has no integer form"
    if node.op in VOLUMES:
        return "of volumes, which no program has"
    if node.op in (*WEIGHTED, *RECURRENT):
        weight = node.tensors["weight"]
        if weight.dtype is not torch.float32 or weight.device.type != "cpu":
            return f"weight is {weight.dtype} on {weight.device}, wanted float32 on the CPU"
        if not all(bool(t.isfinite().all()) for t in node.tensors.values()):
            return "weight or bias has NaN or infinite values"
        if node.op in RECURRENT and any(bool((t.abs() > MAX_FACTOR).any()) for t in
                                        node.tensors.values()):  # fmt: skip
            return "weight or bias is beyond 2**96"
        k = weight[:, 0].numel() if node.op == "conv_transpose2d" else weight[0].numel()
        if k > MAX_K:
            return f"sums {k} products, and int32 is exact up to {MAX_K}"
    if node.op == "conv_transpose2d":
        for size, p, d in zip(weight.shape[2:], node.attrs["padding"], node.attrs["dilation"],
                              strict=True):  # fmt: skip
            if p > d * (size - 1):
                return "its padding crops the input"
    if node.op in NORMS and not node.attrs["eps"] >= 0:
        return f"its epsilon is {node.attrs['eps']}"
    if node.op == "matmul" and node.inputs[0].shape[-1] > MAX_K:
        return f"sums {node.inputs[0].shape[-1]} products, and int32 is exact up to {MAX_K}"
    if node.op in ("add", "mul"):
        x, y = (n.shape for n in node.inputs)
        if len(x) != len(y):
            return "its operands have different numbers of axes"
        if len(x) > 4 and broadcast_runs(x, y) > 4:
            return "its operands are broadcast along axes that do not join to 4"
        constants = [n.tensors["value"] for n in node.inputs if n.op == "constant"]
        if node.op == "mul" and not all(map(fits_bytes, constants)):
            return "multiplies by a constant tensor that 8 bits do not hold"
    if node.op == "pad" and (len(node.attrs["pad"]) % 2 or min(node.attrs["pad"]) < 0):
        return "its padding is negative"
    if node.op in ("affine", "prelu", "group_norm") and not 2 <= len(node.shape) <= 4:
        return f"has {len(node.shape)} axes, wanted 2 to 4"
    if len(node.shape) > 6:
        return f"has {len(node.shape)} axes, wanted at most 6"
    return ""


def gives_floats(node: Node) -> bool:
    """Whether its sums can be given as float32."""
    return node.op == "matmul" or (node.op in WEIGHTED and len(node.inputs) == 1)


def fits_bytes(value: Tensor) -> bool:
    """Whether the noise of 255 steps over a constant's range is 30 dB below each of its lines."""
    if value.numel() == 0:
        return True
    step = (value.max().clamp(min=0) - value.min().clamp(max=0)) / 255
    power = value.square().mean(-1)
    return bool(((power == 0) | (power >= 1e3 * step.square() / 12)).all())


def broadcast_runs(x: Sequence[int], y: Sequence[int]) -> int:
    """How many axes are left when neighbours that are broadcast alike become one."""
    kinds = [(a == 1, b == 1) for a, b in zip(x, y, strict=True) if max(a, b) != 1]
    return sum(a != b for a, b in zip(kinds, [None, *kinds], strict=False))


@dataclass(eq=False)
class Region:
    """Nodes that become one program; `inputs` are the float values that it takes."""

    nodes: list[Node]
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)

    @property
    def given(self) -> list[Node]:
        """The inputs of the program."""
        return [node for node in self.inputs if node.op != "constant"]

    @property
    def quantized_inputs(self) -> list[Node]:
        """All but those that grids alone take, which quantize them themselves, and those of which
        only the size is asked."""
        taken = {value for node in self.nodes if node.op != "grid" for value in node.inputs}
        return [value for value in self.inputs if value in taken]


def find_regions(
    graph: Graph, keep_float: Mapping[Node, str]
) -> tuple[list[Region], dict[Node, str]]:
    """The regions, and why each of the other nodes stays float.

    keep_float gives reasons for nodes that have an integer form and shall not take it.
    """
    reasons = {node: keep_float.get(node) or why_float(node) for node in graph.nodes}
    computed: set[Node] = set()  # what products made, or was made of that
    for node in graph.nodes:
        if node.op in PRODUCTS or any(value in computed for value in node.inputs):
            computed.add(node)
        elif not reasons[node] and _periodic(node):
            reasons[node] = "of an input as it comes, which may have more periods than 8 bits hold"
    users, kept = graph.users(), graph.output_nodes()
    for node in graph.nodes:
        if node.op == "softmax" and not reasons[node] and node not in kept:
            axis = node.attrs["dim"]
            if node.shape[axis] > MOST_SHARES and not _only_weights(node, axis, users, kept):
                reasons[node] = f"shares of {node.shape[axis]} values, in steps of 1/255"
    for node in graph.nodes:
        if not all(x.attrs.get("real", True) for x in _measured(graph, node)):
            reasons[node] = "resized to the size of an input that is not float32"
    _give_out(graph, reasons, users, kept)
    _join_floats(graph, reasons, users, kept)
    for node in graph.nodes:  # a constant is taken along where it is used
        if node.op == "constant" and len(node.shape) > 4:
            reasons[node] = "a constant of more than 4 axes"
    while True:
        depth = _depths(graph, reasons)
        members: dict[int, list[Node]] = {}
        for node in graph.nodes:
            if not reasons[node]:
                members.setdefault(depth[node], []).append(node)
        idle = [n for nodes in members.values() for n in _without_product(nodes)]
        if not idle:
            break
        for node in idle:
            reasons[node] = "no product near it to share integers with"
    # as they are given and returned: one program alone is then the network
    places = {node: i for i, node in enumerate([*graph.inputs, *graph.nodes])}
    returned = {node: i for i, node in reversed([*enumerate(graph.outputs)])}
    regions = []
    for key in sorted(members):
        nodes = members[key]
        inside = set(nodes)
        inputs = dict.fromkeys(v for n in nodes for v in n.inputs if v not in inside)
        inputs |= dict.fromkeys(v for n in nodes for v in _measured(graph, n))
        outputs = [n for n in nodes if n in kept or any(u not in inside for u in users[n])]
        outputs.sort(key=lambda node: returned.get(node, len(returned)))
        regions.append(Region(nodes, sorted(inputs, key=lambda node: places[node]), outputs))
    return regions, {node: reason for node, reason in reasons.items() if reason}


def _give_out(
    graph: Graph, reasons: dict[Node, str], users: Mapping[Node, list[Node]], kept: set[Node]
) -> None:
    """The last activations of a network stay float, and how a last product is rearranged: its sums
    are given out as they are. Probabilities, prices and places are narrow, or next to a bound, in a
    range that has 0 in it: 255 steps of it are too few. A user's own functions stay int8."""
    last: set[Node] = set()  # only outputs take them, or what is made of them
    for node in reversed(graph.nodes):
        given = node in kept or bool(users[node])
        passes = node.op in (*REARRANGED, *ACTIVATIONS, "add", "mul")
        if given and passes and all(user in last for user in users[node]):
            last.add(node)

    def given_out(value: Node) -> bool:
        """Whether a value that is rearranged is there in float32."""
        if reasons[value]:
            return value.op not in ("input", "constant")
        return gives_floats(value) and all(user in last for user in users[value])

    for node in graph.nodes:
        if node in last and not reasons[node]:
            calls = node.attrs.get("calls", ())
            own = any(target.startswith(f"{POINTWISE_NAMESPACE}.") for target, *_ in calls)
            activation = node.op in ACTIVATIONS and not own
            if activation or (node.op in REARRANGED and any(map(given_out, node.inputs))):
                reasons[node] = GIVEN_OUT


def _join_floats(
    graph: Graph, reasons: dict[Node, str], users: Mapping[Node, list[Node]], kept: set[Node]
) -> None:
    """Sums and products with what torch computes stay with it where all else they take, or all that
    takes them, is float: a series less its mean has another range than the series."""

    def floats(node: Node) -> int:
        """How many of the two are float, if torch computes one of them."""
        if node.op not in ("add", "mul") or reasons[node]:
            return 0
        found = [value for value in node.inputs if reasons[value] and value.op != "constant"]
        return len(found) if any(value.op != "input" for value in found) else 0

    for node in graph.nodes:
        if floats(node) == 2:
            reasons[node] = "of float values alone"
    for node in reversed(graph.nodes):
        read = node in kept or bool(users[node])
        if read and floats(node) and all(reasons[user] for user in users[node]):
            reasons[node] = "with a float value, for float values alone"


def _measured(graph: Graph, node: Node) -> list[Node]:
    """The inputs of the network whose sizes an image is resized to."""
    sizes = node.attrs.get("size", {}).get("size", ())
    return [graph.inputs[n.input] for n in sizes if isinstance(n, Size)]


def _periodic(node: Node) -> bool:
    """Whether a function has a sine or a cosine in it, as embeddings of times and places do."""
    names = {target.split(".")[1] for target, *_ in node.attrs.get("calls", ())}
    return node.op == "pointwise" and not names.isdisjoint(("sin", "cos"))


def _without_product(nodes: Sequence[Node]) -> list[Node]:
    """Those that no way through these nodes leads to a product."""
    inside = set(nodes)
    near = {node for node in nodes if node.op in PRODUCTS}
    while True:
        more = {v for node in near for v in node.inputs if v in inside}
        more |= {node for node in nodes if any(v in near for v in node.inputs)}
        if more <= near:
            return [node for node in nodes if node not in near]
        near |= more


def _depths(graph: Graph, reasons: Mapping[Node, str]) -> dict[Node, int]:
    """How often the way to a node has changed between float and integer: no way leads from a
    region back into it."""
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        depth[node] = max(
            (depth[v] + (bool(reasons[v]) != bool(reasons[node])) for v in node.inputs),
            default=0 if reasons[node] else 1,
        )
    return depth


def bare_weights(regions: Sequence[Region]) -> set[Node]:
    """The softmaxes that only give weights, and what moves them: all who take them are products,
    which divide by their sum. A line's largest weight has 255 steps then, even where many keys
    share the attention."""
    found: set[Node] = set()
    for region in regions:
        users: dict[Node, list[Node]] = {node: [] for node in region.nodes}
        for node in region.nodes:
            for value in users.keys() & node.inputs:
                users[value].append(node)
        for node in region.nodes:
            if node.op == "softmax":
                found |= _only_weights(node, node.attrs["dim"], users, region.outputs) or set()
    return found


def _only_weights(
    node: Node, axis: int, users: Mapping[Node, Sequence[Node]], ends: Collection[Node]
) -> set[Node] | None:
    """The node and its moves, if all that takes them are products that sum over this axis."""
    last = axis == len(node.shape) - 1
    found = {node}
    for user in users[node]:
        moved: set[Node] | None = None
        if user.op == "matmul" and last and node not in user.inputs[1:]:
            moved = set()
        elif user.op == "permute":
            moved = _only_weights(user, user.attrs["dims"].index(axis), users, ends)
        elif user.op == "reshape" and last and user.attrs["groups"][-1] == ((axis,), (None,)):
            moved = _only_weights(user, len(user.shape) - 1, users, ends)
        if moved is None:
            return None
        found |= moved
    return found if users[node] and node not in ends else None


def normalized(weights: Any) -> Any:
    """What bare weights stand for, float32: each line divided by its sum."""
    return weights / np.maximum(weights.sum(-1, keepdims=True, dtype=np.float32), np.float32(1))


class Ranges:
    """Which values of the regions share one quantization, and which have a fixed one.

    symmetric, wide  nodes that stand for a range: with zero_point 128, and of int16.
    joined           whether a concatenation and its parts share one.
    """

    def __init__(self, regions: Sequence[Region], *, joined: bool = True) -> None:
        self.parent: dict[Node, Node] = {}
        self.fixed: dict[Node, QParams] = {}
        self.symmetric: set[Node] = set()
        self.moved = {  # what has its input's values, and no others
            n for region in regions for n in region.nodes if n.op in MOVES and n.op != "concat"
        }
        for region in regions:
            for node in (*region.quantized_inputs, *region.nodes):
                self.parent.setdefault(node, node)
        for region in regions:
            for node in region.nodes:
                if node.op in FIXED:
                    self.fixed[node] = FIXED[node.op]
                if node.op == "softmax":
                    self.fixed |= dict.fromkeys(node.inputs[1:], MASK)
                if node.op in MOVES and (joined or node.op != "concat"):
                    for value in node.inputs:
                        if value.op != "softmax" or node.op != "concat":
                            self._join(value, node)
        for region in regions:
            for node in region.nodes:
                if node.op == "matmul":
                    self.symmetric.add(self.find(node.inputs[1]))
        for node, qparams in list(self.fixed.items()):
            self.fixed[self.find(node)] = qparams
        self.wide = self._wide(regions)

    def _wide(self, regions: Sequence[Region]) -> set[Node]:
        """Sums, and what norms and recurrent layers take, where all can read int16."""
        nodes = [node for region in regions for node in region.nodes]
        sums = [node for node in nodes if node.op in SUMS and len(node.inputs) == 2]
        read = [node.inputs[0] for node in nodes if node.op in (*NORMS, *RECURRENT)]
        found = set(map(self.find, sums + read))
        for node in nodes:
            if node.op in LINES and node.shape[-1] > MAX_WIDE_FEATURES:
                found.discard(self.find(node.inputs[0]))
            for i, value in enumerate(node.inputs):
                if i not in WIDE.get(node.op, ()) and node.op != "grid":
                    found.discard(self.find(value))
            # with a softmax, which has a range of its own, all parts of a concatenation are uint8
            one = node.op != "concat" or {self.find(v) for v in node.inputs} == {self.find(node)}
            if node.op not in (*MOVES, *SUMS, "constant") or not one:
                found.discard(self.find(node))
        return found - self.fixed.keys()

    def dtype(self, node: Node) -> np.dtype[Any]:
        """Of a value between operations."""
        return np.dtype(np.int16 if self.find(node) in self.wide else np.uint8)

    def find(self, node: Node) -> Node:
        while self.parent[node] is not node:
            node = self.parent[node]
        return node

    def _join(self, x: Node, y: Node) -> None:
        self.parent[self.find(x)] = self.find(y)

    def watched(self) -> dict[Node, Node]:
        """Each node whose values say something about a range -> the node that stands for it."""
        return {
            node: self.find(node)
            for node in self.parent
            if self.find(node) not in self.fixed and node not in self.moved
        }


def weight_of(node: Node) -> Tensor:
    """The float weight with its outputs first."""
    return turned(node, node.tensors["weight"].detach())


def turned(node: Node, weight: Tensor) -> Tensor:
    """A transposed convolution's weight as the convolution's that it is on pixels set apart; and
    back."""
    if node.op != "conv_transpose2d":
        return weight
    first: Tensor = outputs_first(weight, node.attrs["groups"])
    return first.flip(2, 3).contiguous()


@dataclass(frozen=True)
class Lowered:
    """A program, and where to find the values of the graph in it.

    names    node -> its value: uint8 or int16, or float32 for a product that gives float32 itself.
    axes     value -> the torch axis of each of its axes.
    weights  the softmaxes of which the value is weights: divided by the sum of a line.
    scales   layer -> those of its weight's outputs, in the program.
    """

    program: Program
    names: Mapping[Node, str]
    axes: Mapping[str, tuple[int, ...]]
    weights: Collection[Node]
    scales: Mapping[Node, Any]


def lowered(
    region: Region,
    qparams: Callable[[Node], QParams],
    weights: Weights,
    extents: Sequence[int],
    biases: Biases,
) -> Lowered:
    """A region as a program. qparams(node) is the quantization of a value, uint8 or int16."""
    lowering = _Lowering(region, qparams, weights, extents, biases)
    program = lowering.program()
    return Lowered(program, lowering.names, lowering.axes, lowering.weights_only, lowering.scales)


class _Lowering:
    def __init__(
        self,
        region: Region,
        qparams: Callable[[Node], QParams],
        weights: Weights,
        extents: Sequence[int],
        biases: Biases,
    ) -> None:
        self.region, self.qparams, self.weights, self.biases = region, qparams, weights, biases
        self.extents = extents
        self.steps: list[Step] = []
        self.axes: dict[str, tuple[int, ...]] = {}  # value -> the torch axis of each of its axes
        self.names: dict[Node, str] = {}
        self.scales: dict[Node, Any] = {}
        self.weights_only = bare_weights([region])
        self.users = {
            n: [u for u in region.nodes for v in u.inputs if v is n] for n in region.nodes
        }

    def program(self) -> Program:
        region = self.region
        for node in region.quantized_inputs:
            if node.op == "constant":
                self.constant(node)
                continue
            axes = NHWC if len(node.shape) == 4 else tuple(range(len(node.shape)))
            q = self.qparams(node)
            self.names[node] = self.emit(
                "quantize", f"{node.name}_{SUFFIX[q.dtype]}", [node.name], axes, node,
                scale=float(q.scale), zero_point=int(q.zero_point), axes=axes, dtype=q.dtype.name,
            )  # fmt: skip
        for node in region.nodes:
            if node.op == "constant":
                self.constant(node)
            else:
                self.names[node] = getattr(self, f"lower_{node.op}", self.lower_unary)(node)
        outputs = []
        for node in region.outputs:
            name = self.names[node]
            if not self.ends_float(node):
                q = self.qparams(node)
                name = self.emit(
                    "dequantize", f"{node.name}_f32", [name], self.axes[name], node,
                    scale=float(q.scale), zero_point=int(q.zero_point),
                )  # fmt: skip
            order = self.axes[name]
            outputs.append((name, tuple(order.index(d) for d in range(len(order)))))
        extents = tuple(self.extent(node) for node in region.given)
        names = tuple(node.name for node in region.given)
        return Program(names, tuple(self.steps), tuple(outputs), extents)

    def extent(self, node: Node) -> tuple[int | None, ...]:
        """Which sizes of a program's input may vary. Of a value in the network any: where its batch
        and its channels are is not known, but to the steps that take it."""
        return node.extent if node.op == "input" else (None,) * len(node.shape)

    def emit(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        axes: tuple[int, ...],
        node: Node,
        /,
        **arguments: Any,
    ) -> str:
        self.steps.append(Step(op, name, tuple(inputs), arguments, node.layer))
        self.axes[name] = axes
        return name

    def constant(self, node: Node) -> None:
        q = self.qparams(node)
        axes = NHWC if len(node.shape) == 4 else tuple(range(len(node.shape)))
        value = node.tensors["value"].detach().permute(axes).numpy()
        steps = np.rint(value / q.scale) + q.zero_point
        data = np.clip(steps, *limits(q.dtype)).astype(q.dtype)
        self.names[node] = self.emit("constant", node.name, [], axes, node, value=data)

    def in_order(self, node: Node, axes: tuple[int, ...], user: Node) -> str:
        """The value of a node with its axes in this order."""
        name = self.names[node]
        have = self.axes[name]
        if have == axes:
            return name
        moved = f"{name}_{''.join(map(str, axes))}"
        if moved not in self.axes:
            self.emit("permute", moved, [name], axes, user,
                      axes=tuple(have.index(d) for d in axes))  # fmt: skip
        return moved

    def image(self, node: Node, user: Node) -> str:
        return self.in_order(node, NHWC, user)

    def features_last(self, node: Node, user: Node, axis: int | None = None) -> str:
        """With the torch axis (default: the last one) at the end; the others stay in order."""
        axis = len(node.shape) - 1 if axis is None else axis
        axes = self.axes[self.names[node]]
        if axes[-1] == axis:
            return self.names[node]
        return self.in_order(node, (*(a for a in axes if a != axis), axis), user)

    # ------------------------------------------------------------------ arithmetic

    def scale(self, node: Node) -> float:
        return float(self.qparams(node).scale)

    def zero_point(self, node: Node) -> int:
        return int(self.qparams(node).zero_point)

    def limits(self, node: Node) -> dict[str, int]:
        """qmin and qmax of a node: its clamp in steps."""
        lo, hi = node.attrs.get("clamp", (-math.inf, math.inf))
        scale, zero_point = self.scale(node), self.zero_point(node)

        least, most = limits(self.qparams(node).dtype)

        def step(value: float) -> int:
            return int(
                np.clip(np.rint(np.clip(value / scale, -1e9, 1e9)) + zero_point, least, most)
            )

        return {"qmin": step(lo), "qmax": step(hi)}

    def requantized(self, node: Node) -> dict[str, int]:
        return {"zero_point": self.zero_point(node), **self.limits(node)}

    def ends_float(self, node: Node) -> bool:
        """Whether a product gives float32 itself: nobody in the region takes its value."""
        return node in self.region.outputs and gives_floats(node) and not self.users[node]

    def product(self, node: Node) -> tuple[Any, Requant | Dequant]:
        """(int8 weight, epilogue) of a convolution or a linear layer."""
        data, scale = self.weights(node)
        bias = self.biases(node)
        real = None if bias is None else bias.detach().numpy()
        x_scale = self.scale(node.inputs[0])
        if self.ends_float(node):
            self.scales[node] = scale
            fmin, fmax = node.attrs.get("clamp", (-math.inf, math.inf))
            return data, Dequant(scale, np.array(x_scale, np.float32), real, fmin, fmax)
        if real is not None:
            data, scale = with_room(data, scale, real, x_scale)
        self.scales[node] = scale
        step = np.float64(x_scale) * scale.astype(np.float64)
        y_scale = self.scale(node)
        clamp = self.requantized(node)
        add: dict[str, Any] = {}
        if len(node.inputs) == 2:
            add["add_multiplier"] = self.scale(node.inputs[1]) / y_scale
            add["add_zero_point"] = self.zero_point(node.inputs[1])
        wanted = None
        if real is not None:  # beyond MAX_BIAS where float32 has no scale that is coarse enough
            steps = np.rint(real.astype(np.float64) / step)
            wanted = np.clip(steps, -MAX_BIAS, MAX_BIAS).astype(np.int32)
        multiplier = np.maximum((step / y_scale).astype(np.float32), np.finfo(np.float32).tiny)
        return data, Requant(
            multiplier, bias=wanted, **clamp, **add, dtype=self.qparams(node).dtype
        )

    def lower_grid(self, node: Node) -> str:
        (x,), (left, right, top, bottom) = node.inputs, node.attrs["pad"]
        axes = NHWC if len(node.shape) == 4 else (0, 1)
        scale = float(FIXED["grid"].scale)  # a power of 2: the division is exact
        return self.emit(
            "grid", node.name, [x.name], axes, node, axes=axes,
            padding=((top, bottom), (left, right)),
            **{key: node.tensors[key].float().numpy() / scale for key in ("factor", "shift")},
        )  # fmt: skip

    def lower_conv2d(self, node: Node) -> str:
        data, epilogue = self.product(node)
        a = node.attrs
        weight = Conv2dWeight(data, a["stride"], a["padding"], a["dilation"], a["groups"])
        return self.emit(
            "conv2d", node.name, [self.image(v, node) for v in node.inputs], NHWC, node,
            weight=weight, epilogue=epilogue, x_zero_point=self.zero_point(node.inputs[0]),
        )  # fmt: skip

    def lower_conv_transpose2d(self, node: Node) -> str:
        """A convolution with stride 1 of pixels that are set `stride` apart."""
        data, epilogue = self.product(node)
        a, (x,) = node.attrs, node.inputs
        padding = tuple(
            (d * (k - 1) - p, d * (k - 1) - p + more)
            for d, k, p, more in zip(
                a["dilation"], data.shape[2:], a["padding"], a["output_padding"], strict=True
            )
        )
        zero_point = self.zero_point(x)
        apart = self.emit(
            "dilate", f"{node.name}_apart", [self.image(x, node)], NHWC, node,
            stride=a["stride"], padding=padding, value=zero_point,
        )  # fmt: skip
        weight = Conv2dWeight(data, dilation=a["dilation"], groups=a["groups"])
        return self.emit("conv2d", node.name, [apart], NHWC, node, weight=weight,
                         epilogue=epilogue, x_zero_point=zero_point)  # fmt: skip

    def lower_linear(self, node: Node) -> str:
        data, epilogue = self.product(node)
        inputs = [self.features_last(node.inputs[0], node)]
        axes = self.axes[inputs[0]]
        if len(node.inputs) == 2:
            inputs.append(self.in_order(node.inputs[1], axes, node))
        return self.emit(
            "linear", node.name, inputs, axes, node, weight=LinearWeight(data),
            epilogue=epilogue, x_zero_point=self.zero_point(node.inputs[0]),
        )  # fmt: skip

    def lower_matmul(self, node: Node) -> str:
        a, b = node.inputs
        rank = len(a.shape)
        plain = tuple(range(rank))
        turned = (*plain[:-2], rank - 1, rank - 2)
        # what was transposed is read as it lies
        transposed = self.axes[self.names[b]][-1] == rank - 2
        arguments: dict[str, Any] = {"transpose_b": transposed}
        mean, real = a in self.weights_only, self.ends_float(node)
        factor = node.attrs.get("factor", 1.0) * self.scale(b) / (1.0 if real else self.scale(node))
        result = dict(zip(REQUANTIZED, UNCLAMPED, strict=True)) if real else self.requantized(node)
        inputs = [
            self.in_order(a, plain, node),
            self.in_order(b, turned if transposed else plain, node),
        ]
        return self.emit(
            "matmul", node.name, inputs, plain, node,
            multiplier=factor * (1.0 if mean else self.scale(a)), mean=mean,
            a_zero_point=self.zero_point(a), **arguments, **result,
            dtype="float32" if real else "uint8",
        )  # fmt: skip

    def lower_add(self, node: Node) -> str:
        a, b = node.inputs
        axes = self.axes_of_two(a if a.op != "constant" else b)
        scale = self.scale(node)
        return self.emit(
            "add", node.name, [self.in_order(a, axes, node), self.in_order(b, axes, node)], axes,
            node, a_multiplier=self.scale(a) / scale,
            b_multiplier=self.scale(b) * node.attrs.get("alpha", 1.0) / scale,
            a_zero_point=self.zero_point(a), b_zero_point=self.zero_point(b),
            **self.requantized(node), dtype=self.qparams(node).dtype.name,
        )  # fmt: skip

    def axes_of_two(self, node: Node) -> tuple[int, ...]:
        """The order of the axes of an operation with two operands; of more axes than its kernel
        takes torch's, for which `why_float` knows that they join."""
        axes = self.axes[self.names[node]]
        return axes if len(axes) <= 4 else tuple(range(len(axes)))

    def lower_mul(self, node: Node) -> str:
        a, b = node.inputs
        if a.shape != node.shape:  # the operand that is broadcast comes second
            a, b = b, a
        axes = self.axes_of_two(a)
        return self.emit(
            "mul", node.name, [self.in_order(a, axes, node), self.in_order(b, axes, node)], axes,
            node, multiplier=self.scale(a) * self.scale(b) / self.scale(node),
            a_zero_point=self.zero_point(a), b_zero_point=self.zero_point(b),
            **self.requantized(node),
        )  # fmt: skip

    def lower_affine(self, node: Node) -> str:
        (x,) = node.inputs
        name = self.features_last(x, node, 1)
        factor, shift = (node.tensors[k].double().numpy() for k in ("factor", "shift"))
        scale = self.scale(node)
        return self.emit(
            "affine", node.name, [name], self.axes[name], node,
            multiplier=(factor * self.scale(x) / scale).astype(np.float32),
            shift=(shift / scale).astype(np.float32), x_zero_point=self.zero_point(x),
            **self.requantized(node),
        )  # fmt: skip

    def lower_pointwise(self, node: Node) -> str:
        (x,) = node.inputs
        real = self.grid(x)
        with torch.no_grad():
            y = pointwise(node.attrs["calls"], torch.from_numpy(real)).numpy()
        return self.table(node, self.names[x], self.quantized(node, y))

    def lower_prelu(self, node: Node) -> str:
        (x,) = node.inputs
        real, slope = self.grid(x), node.tensors["weight"].detach().float().numpy()
        y = np.where(real >= 0, real, slope[:, None] * real)
        values = self.quantized(node, y)
        if len(slope) == 1:
            return self.table(node, self.names[x], values[0])
        return self.table(node, self.features_last(x, node, 1), values)

    def grid(self, node: Node) -> Any:
        """The 256 reals that a value can be."""
        steps = np.arange(256, dtype=np.float32) - np.float32(self.zero_point(node))
        return steps * np.float32(self.scale(node))

    def quantized(self, node: Node, real: Any) -> Any:
        y = np.nan_to_num(real.astype(np.float64) / self.scale(node), nan=0.0)
        return np.clip(np.rint(y) + self.zero_point(node), 0, 255).astype(np.uint8)

    def table(self, node: Node, name: str, values: Any) -> str:
        return self.emit("table", node.name, [name], self.axes[name], node, values=values)

    def lower_recurrent(self, node: Node) -> str:
        (x,), (data, scale), bias = node.inputs, self.weights(node), self.biases(node)
        name, own, self.scales[node] = self.features_last(x, node), self.scale(node), scale
        real = None if bias is None else bias.detach().numpy()
        return self.emit(
            "recurrent", node.name, [name], self.axes[name], node, cell=node.attrs["cell"],
            weight=LinearWeight(data), epilogue=Dequant(scale, np.array(own, np.float32), real),
            x_scale=self.scale(x), multiplier=1 / own, reverse=node.attrs["reverse"],
            axis=self.axes[name].index(node.attrs["time"]), **self.requantized(node),
        )  # fmt: skip

    def lower_softmax(self, node: Node) -> str:
        x, *masks = node.inputs
        name = self.features_last(x, node, node.attrs["dim"])
        axes = self.axes[name]
        names = [name, *(self.in_order(mask, axes, node) for mask in masks)]
        op = "softmax_weights" if node in self.weights_only else "softmax"
        return self.emit(op, node.name, names, axes, node, scale=self.scale(x),
                         uniform=node.attrs["uniform"])  # fmt: skip

    def lower_layer_norm(self, node: Node) -> str:
        return self.norm(node, self.features_last(node.inputs[0], node))

    def lower_rms_norm(self, node: Node) -> str:
        (x,) = node.inputs
        return self.norm(node, self.features_last(x, node), x_zero_point=self.zero_point(x))

    def lower_group_norm(self, node: Node) -> str:
        rank = len(node.shape)
        name = self.in_order(node.inputs[0], (0, *range(2, rank), 1), node)
        return self.norm(node, name, groups=node.attrs["groups"])

    def norm(self, node: Node, name: str, **arguments: Any) -> str:
        (x,), scale = node.inputs, self.scale(node)
        epsilon = max(node.attrs["eps"] / self.scale(x) ** 2, LEAST_EPSILON)
        beyond = max(epsilon / MOST_EPSILON, 1.0)  # of values that vanish: a constant factor
        n = x.shape[self.axes[name][-1]]
        weight = node.tensors.get("weight", torch.ones(n)).detach().double().flatten().numpy()
        arguments["multiplier"] = (weight / scale / beyond**0.5).astype(np.float32)
        if node.op != "rms_norm":
            bias = node.tensors.get("bias", torch.zeros(n)).detach().double().flatten().numpy()
            arguments["shift"] = (bias / scale).astype(np.float32)
        return self.emit(
            node.op, node.name, [name], self.axes[name], node, **arguments,
            epsilon=epsilon / beyond,
            **self.requantized(node),
        )  # fmt: skip

    def lower_avg_pool2d(self, node: Node) -> str:
        return self.average(node, **node.attrs["pool"])

    def lower_adaptive_avg_pool2d(self, node: Node) -> str:
        return self.average(node, output_size=tuple(node.attrs["output_size"]))

    def average(self, node: Node, **arguments: Any) -> str:
        (x,) = node.inputs
        return self.emit(
            node.op, node.name, [self.image(x, node)], NHWC, node, **arguments,
            multiplier=self.scale(x) / self.scale(node), x_zero_point=self.zero_point(x),
            **self.requantized(node),
        )  # fmt: skip

    def own(self, size: int | Size) -> int | Size:
        """A size that follows an input of the network, by that input's number in the program."""
        if not isinstance(size, Size):
            return size
        numbers = [node.attrs.get("number") for node in self.region.given]
        return replace(size, input=numbers.index(size.input))

    def lower_unary(self, node: Node) -> str:
        """Pooling and resizing: images, and arguments that are torch's."""
        a, (x,) = node.attrs, node.inputs
        arguments: dict[str, Any] = {}
        match node.op:
            case "max_pool2d":
                arguments = a["pool"]
            case "adaptive_max_pool2d":
                arguments = {"output_size": tuple(a["output_size"])}
            case "upsample_nearest2d" | "upsample_bilinear2d":
                size = a["size"].get("size")
                arguments = {
                    "output_size": None if size is None else tuple(map(self.own, size)),
                    "scale_factor": a["size"].get("scale_factor"),
                }
                if node.op == "upsample_bilinear2d":
                    arguments["align_corners"] = a["align_corners"]
        return self.emit(node.op, node.name, [self.image(x, node)], NHWC, node, **arguments)

    # ------------------------------------------------------------------ moving

    def lower_concat(self, node: Node) -> str:
        made = [value for value in node.inputs if value.op != "constant"] or node.inputs
        axes = self.axes[self.names[made[0]]]
        parts = []
        for i, value in enumerate(node.inputs):
            name = self.in_order(value, axes, node)
            if self.qparams(value) != self.qparams(node):
                name = self.emit(
                    "affine", f"{node.name}_part{i}", [name], axes, node,
                    multiplier=np.array(self.scale(value) / self.scale(node), np.float32),
                    shift=np.zeros((), np.float32), x_zero_point=self.zero_point(value),
                    zero_point=self.zero_point(node), qmin=0, qmax=255,
                )  # fmt: skip
            parts.append(name)
        return self.emit("concat", node.name, parts, axes, node,
                         axis=axes.index(node.attrs["dim"]))  # fmt: skip

    def lower_slice(self, node: Node) -> str:
        name = self.names[node.inputs[0]]
        a = node.attrs
        return self.emit(
            "slice", node.name, [name], self.axes[name], node, axis=self.axes[name].index(a["dim"]),
            start=a["start"], end=a["end"], step=a["step"],
        )  # fmt: skip

    def lower_pad(self, node: Node) -> str:
        name = self.names[node.inputs[0]]
        pad = node.attrs["pad"]
        rank = len(node.shape)
        widths = [(0, 0)] * rank
        for i in range(len(pad) // 2):
            widths[rank - 1 - i] = (pad[2 * i], pad[2 * i + 1])
        axes = self.axes[name]
        return self.emit(
            "pad", node.name, [name], axes, node, mode=node.attrs["mode"],
            widths=tuple(widths[d] for d in axes), value=self.zero_point(node),
        )  # fmt: skip

    def lower_permute(self, node: Node) -> str:
        """No step: only the names of the axes change."""
        name = self.names[node.inputs[0]]
        dims = node.attrs["dims"]
        self.axes[node.name] = tuple(dims.index(d) for d in self.axes[name])
        return self.emit("reshape", node.name, [name], self.axes[node.name], node,
                         sizes=tuple(((i,), 1) for i in range(len(dims))), ones=())  # fmt: skip

    def lower_reshape(self, node: Node) -> str:
        (x,) = node.inputs
        groups = node.attrs["groups"]
        axes = list(self.axes[self.names[x]])
        for joined, _ in groups:  # the axes of a group side by side, where the last of them is
            wide = [d for d in joined if x.shape[d] != 1]
            places = [axes.index(d) for d in wide]
            if len(wide) > 1 and places != list(range(places[0], places[0] + len(wide))):
                at = axes[max(places)]
                rest = [d for d in axes if d not in wide]
                before = axes[: axes.index(at)]
                k = sum(d in rest for d in before)
                axes = rest[:k] + wide + rest[k:]
        name = self.in_order(x, tuple(axes), node)
        first = 0
        sizes: dict[int, list[tuple[int, Any]]] = {}
        ones: list[int] = []
        for joined, parts in groups:
            wide = [d for d in joined if x.shape[d] != 1]
            ones += [
                axes.index(d) for d in joined if x.shape[d] == 1 and (len(joined) > 1 or not parts)
            ]
            place = min((axes.index(d) for d in wide or joined), default=len(axes))
            known = prod(p for p in parts if p is not None)
            from_axes = tuple(axes.index(d) for d in joined)
            made = [
                (first + i, part if part is not None else (from_axes, known))
                for i, part in enumerate(parts)
            ]
            sizes.setdefault(place, []).extend(made)
            first += len(parts)
        ordered = [entry for place in sorted(sizes) for entry in sizes[place]]
        return self.emit(
            "reshape", node.name, [name], tuple(d for d, _ in ordered), node,
            sizes=tuple(size for _, size in ordered), ones=tuple(ones),
        )  # fmt: skip
