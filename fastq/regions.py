"""Which nodes of a fused float graph become programs, and which of their values share one
quantization.

The nodes that have an integer form make up regions, as large as the network allows; what lies
between them stays float. A region becomes one program, see `lower`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastq.arguments import LINES
from fastq.graph import (
    BY_CHANNEL,
    MOVES,
    POINTWISE_NAMESPACE,
    PRODUCTS,
    VOLUMES,
    Graph,
    Node,
    are_shares,
)
from fastq.program import NORMS, RECURRENT, WIDE
from fastq.qparams import MAX_FACTOR, MAX_K, MAX_WIDE_FEATURES, QParams
from fastq.sizes import Size

# Operations whose values have a fixed quantization. A grid's values run from 0 to almost 1, as a
# picture's do: weights that read it, and their gradients, then have a usual size.
FIXED = {
    "softmax": QParams(np.array(1 / 255, np.float32)),
    "grid": QParams(np.array(1 / 256, np.float32)),
}
MASK = QParams(np.array(1.0, np.float32))  # of what softmax takes as its mask: 1.0 and 0.0
# Of so many values the equal shares of a softmax are 4 steps of 1/255 each. Where others read it
# than products, which divide by the sum themselves, a softmax of more values stays float.
MOST_SHARES = 64
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
    return _why_weight(node) or _why_operands(node) or _why_arguments(node)


def _why_weight(node: Node) -> str:
    """Why a layer's weight or bias, or the number of products that it sums, has no integer form."""
    if node.op not in (*WEIGHTED, *RECURRENT):
        return ""
    weight = node.tensors["weight"]
    if weight.dtype is not torch.float32 or weight.device.type != "cpu":
        return f"weight is {weight.dtype} on {weight.device}, wanted float32 on the CPU"
    if not all(bool(t.isfinite().all()) for t in node.tensors.values()):
        return "weight or bias has NaN or infinite values"
    largest = [t.abs().max() for t in node.tensors.values() if t.numel()]
    if node.op in RECURRENT and any(bool(peak > MAX_FACTOR) for peak in largest):
        return "weight or bias is beyond 2**96"
    k = weight[:, 0].numel() if node.op == "conv_transpose2d" else weight[0].numel()
    return f"sums {k} products, and int32 is exact up to {MAX_K}" if k > MAX_K else ""


def _why_operands(node: Node) -> str:
    """Why an operation of two values has none of these operands."""
    if node.op == "matmul" and node.inputs[0].shape[-1] > MAX_K:
        return f"sums {node.inputs[0].shape[-1]} products, and int32 is exact up to {MAX_K}"
    if node.op not in ("add", "mul"):
        return ""
    x, y = (n.shape for n in node.inputs)
    if len(x) != len(y):
        return "its operands have different numbers of axes"
    if len(x) > 4 and broadcast_runs(x, y) > 4:
        return "its operands are broadcast along axes that do not join to 4"
    constants = [n.tensors["value"] for n in node.inputs if n.op == "constant"]
    if node.op == "mul" and not all(map(fits_bytes, constants)):
        return "multiplies by a constant tensor that 8 bits do not hold"
    return ""


def _why_arguments(node: Node) -> str:
    """Why an operation has none with these arguments, or of so many axes."""
    if node.op == "conv_transpose2d":
        sizes = node.tensors["weight"].shape[2:]
        axes = zip(sizes, node.attrs["padding"], node.attrs["dilation"], strict=True)
        if any(p > d * (size - 1) for size, p, d in axes):
            return "its padding crops the input"
    if "eps" in node.attrs and not node.attrs["eps"] >= 0:
        return f"its epsilon is {node.attrs['eps']}"
    if node.op == "pad" and node.attrs["mode"] != "constant" and min(node.attrs["pad"]) < 0:
        return f"its padding is negative, with mode {node.attrs['mode']!r}"
    if node.op in BY_CHANNEL and not 2 <= len(node.shape) <= 4:
        return f"has {len(node.shape)} axes, wanted 2 to 4"
    return f"has {len(node.shape)} axes, wanted at most 6" if len(node.shape) > 6 else ""


def gives_floats(node: Node) -> bool:
    """Whether its sums can be given as float32."""
    return node.op == "matmul" or (node.op in WEIGHTED and len(node.inputs) == 1)


def fits_bytes(value: Tensor) -> bool:
    """Whether a constant survives 8 bits: the noise of 255 steps over its range is 30 dB below each
    of its lines."""
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
        """The inputs that are quantized on their way in: not those that only grids take, which
        quantize them themselves, nor those of which only the size is asked."""
        taken = {value for node in self.nodes if node.op != "grid" for value in node.inputs}
        return [value for value in self.inputs if value in taken]


def find_regions(
    graph: Graph, keep_float: Mapping[Node, str]
) -> tuple[list[Region], dict[Node, str]]:
    """The regions, and why each of the other nodes stays float.

    keep_float gives reasons for nodes that have an integer form and shall not take it.
    """
    users, kept = graph.users(), graph.output_nodes()
    reasons = {node: keep_float.get(node) or why_float(node) for node in graph.nodes}
    _leave_poor(graph, reasons, users, kept)
    _give_out(graph, reasons, users, kept)
    _join_floats(graph, reasons, users, kept)
    for node in graph.nodes:  # a constant is taken along where it is used
        if node.op == "constant" and len(node.shape) > 4:
            reasons[node] = "a constant of more than 4 axes"
    members = _members(graph, reasons)
    # as they are given and returned: one program alone is then the network
    places = {node: i for i, node in enumerate([*graph.inputs, *graph.nodes])}
    returned = {node: i for i, node in reversed([*enumerate(graph.outputs)])}
    regions = []
    for nodes in members:
        inside = set(nodes)
        inputs = dict.fromkeys(v for n in nodes for v in n.inputs if v not in inside)
        inputs |= dict.fromkeys(v for n in nodes for v in _measured(graph, n))
        outputs = [n for n in nodes if n in kept or any(u not in inside for u in users[n])]
        outputs.sort(key=lambda node: returned.get(node, len(returned)))
        regions.append(Region(nodes, sorted(inputs, key=lambda node: places[node]), outputs))
    return regions, {node: reason for node, reason in reasons.items() if reason}


def _leave_poor(
    graph: Graph, reasons: dict[Node, str], users: Mapping[Node, list[Node]], kept: set[Node]
) -> None:
    """Leaves float what 8 bits hold too little of, though it has an integer form; and what needs a
    size that no program knows."""
    computed: set[Node] = set()  # what products made, or was made of that
    for node in graph.nodes:
        if node.op in PRODUCTS or any(value in computed for value in node.inputs):
            computed.add(node)
        elif not reasons[node] and _periodic(node):
            reasons[node] = "of an input as it comes, which may have more periods than 8 bits hold"
    for node in graph.nodes:
        if node.op == "softmax" and not reasons[node] and node not in kept:
            axis = node.attrs["dim"]
            if node.shape[axis] > MOST_SHARES and not _only_weights(node, axis, users, kept):
                reasons[node] = f"shares of {node.shape[axis]} values, in steps of 1/255"
        if not all(x.attrs.get("real", True) for x in _measured(graph, node)):
            reasons[node] = "has the size of an input that is not float32"


def _members(graph: Graph, reasons: dict[Node, str]) -> list[list[Node]]:
    """The nodes of each region, in the order in which they run. Those that are near no product are
    in none: `reasons` says so then, which may part others from their product."""
    while True:
        depth = _depths(graph, reasons)
        members: dict[int, list[Node]] = {}
        for node in graph.nodes:
            if not reasons[node]:
                members.setdefault(depth[node], []).append(node)
        idle = [n for nodes in members.values() for n in _without_product(nodes)]
        if not idle:
            return [members[key] for key in sorted(members)]
        for node in idle:
            reasons[node] = "no product near it to share integers with"


def _give_out(
    graph: Graph, reasons: dict[Node, str], users: Mapping[Node, list[Node]], kept: set[Node]
) -> None:
    """The last activations before a result stay float, or before an operator of torch's, and how
    last products are rearranged, added and multiplied: their sums are given out as they are.
    Probabilities, prices and places are narrow, or next to a bound, in a range that has 0 in it:
    255 steps of it are too few. A user's own functions stay int8."""
    last: set[Node] = set()  # only outputs and float operators take them, or what is made of them
    for node in reversed(graph.nodes):
        given = node in kept or bool(users[node])
        passes = node.op in (*REARRANGED, *ACTIVATIONS, "add", "mul")
        if given and passes and all(reasons[user] or user in last for user in users[node]):
            last.add(node)

    def given_out(value: Node) -> bool:
        """Whether a value that is rearranged is there in float32."""
        if reasons[value]:
            return value.op not in ("input", "constant")
        return gives_floats(value) and all(reasons[u] or u in last for u in users[value])

    for node in graph.nodes:
        if node in last and not reasons[node]:
            calls = node.attrs.get("calls", ())
            own = any(target.startswith(f"{POINTWISE_NAMESPACE}.") for target, *_ in calls)
            there = [given_out(value) for value in node.inputs if value.op != "constant"]
            if (
                (node.op in ACTIVATIONS and not own)
                or (node.op in REARRANGED and any(there))
                or (node.op in ("add", "mul") and there and all(there))
            ):
                reasons[node] = GIVEN_OUT


def _join_floats(
    graph: Graph, reasons: dict[Node, str], users: Mapping[Node, list[Node]], kept: set[Node]
) -> None:
    """Leaves sums and products of what torch computes float where all else they take, or all that
    takes them, is float. A series less its mean, say, has another range than the series."""

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
    """The inputs of the network whose sizes an image is resized to, or axes are split into."""
    sizes = node.attrs.get("size", {}).get("size") or ()
    if node.op == "reshape":
        sizes = [part for _, parts in node.attrs["groups"] for part in parts]
    return [graph.inputs[n.input] for n in sizes if isinstance(n, Size)]


def _periodic(node: Node) -> bool:
    """Whether a function has a sine or a cosine in it, as embeddings of times and places do."""
    names = {target.split(".")[1] for target, *_ in node.attrs.get("calls", ())}
    return node.op == "pointwise" and not names.isdisjoint(("sin", "cos"))


def _without_product(nodes: Sequence[Node]) -> list[Node]:
    """Those from which no way through these nodes leads to a product."""
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


class Ranges:
    """Which values of the regions share one quantization, and which have a fixed one.

    symmetric  the nodes that stand for a range whose zero_point is 128.
    wide       those that stand for a range of int16.
    joined     whether a concatenation and its parts share one.
    """

    def __init__(self, regions: Sequence[Region], *, joined: bool = True) -> None:
        self.parent: dict[Node, Node] = {}
        self.fixed: dict[Node, QParams] = {}
        nodes = [node for region in regions for node in region.nodes]
        # what has its input's values, and no others
        self.moved = {n for n in nodes if n.op in MOVES and n.op != "concat"}
        for region in regions:
            for node in (*region.quantized_inputs, *region.nodes):
                self.parent.setdefault(node, node)
        for node in nodes:
            if node.op in FIXED:
                self.fixed[node] = FIXED[node.op]
            if node.op == "softmax":
                self.fixed |= dict.fromkeys(node.inputs[1:], MASK)
            if node.op in MOVES and (joined or node.op != "concat"):
                for value in node.inputs:
                    if node.op != "concat" or not are_shares(value):
                        self._join(value, node)
        self.symmetric = {self.find(node.inputs[1]) for node in nodes if node.op == "matmul"}
        for node, qparams in list(self.fixed.items()):
            self.fixed[self.find(node)] = qparams
        self.wide = self._wide(nodes)

    def _wide(self, nodes: Sequence[Node]) -> set[Node]:
        """The ranges of int16: those of sums, of what norms and recurrent layers take, and of class
        tokens, where all who read such values can take int16 and all who make them can give it."""
        sums = [node for node in nodes if node.op in SUMS and len(node.inputs) == 2]
        read = [node.inputs[0] for node in nodes if node.op in (*NORMS, *RECURRENT)]
        # a class token beside the patches, which may be far larger
        read += [n for n in nodes if n.op == "concat" and any(v.op == "constant" for v in n.inputs)]
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
        """The dtype of a value between operations: uint8 or int16."""
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
