"""Fewer, larger operations: what an integer kernel does in one step becomes one node.

    x @ softmax                  -> the same with all three transposed: shares belong on the left
    pad by 0, conv2d             -> conv2d with that padding
    reshape, affine | pointwise  -> affine | pointwise, reshape    (after a 1-D convolution)
    conv2d | linear, affine | mul | add by a constant of one axis -> conv2d | linear
                                    (batch norm, layer scale; with permutes between, too)
    norm, the same               -> norm with a weight, and a bias
    response norm of x, add x    -> response norm with a residual
    mul by a constant of one axis -> affine
    pointwise, pointwise         -> pointwise                      (x * sigmoid(x) too)
    torch's operators of the elements of one value -> pointwise    (where(x > 0, x, 0.1 * x))
    conv2d | linear, add         -> conv2d | linear with a second input (with permutes, too)
    ... , clamp                  -> ... with attrs["clamp"]        (ReLU, ReLU6; with permutes, too)

A fused node computes what its parts did; only float rounding differs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastq.graph import VOLUMES, Graph, Node, are_shares, run_calls, scaled
from fastq.layout import Ref
from fastq.masks import operator_of

CLAMPING = ("conv2d", "linear", "conv_transpose2d", "add", "mul", "affine", "layer_norm",
            "rms_norm", "group_norm", "global_response_norm", "avg_pool2d",
            "adaptive_avg_pool2d")  # fmt: skip
IMAGES = ("conv2d", "conv_transpose2d", *VOLUMES)  # products whose outputs are channels
# operators that compute each element of a value from the same element of others; of those that have
# other forms, too, the shapes tell
ELEMENTWISE = frozenset([
    "where", "maximum", "minimum", "max", "min", "add", "sub", "mul", "div", "pow", "gt", "ge",
    "lt", "le", "eq", "ne", "logical_and", "logical_or", "logical_xor", "logical_not",
    "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__", "masked_fill", "clamp",
    "clamp_min", "clamp_max", "to", "_to_copy", "zeros_like", "ones_like", "full_like", "abs",
    "sign", "atan2", "fmod", "remainder", "copysign", "hypot", "lerp", "addcmul", "addcdiv",
])  # fmt: skip
MAX_NODES = 16  # that become one function
GAP, STEEPEST = 2.0**-8, 24.0  # between the numbers at which it is looked at, and its slope there
LAST_AXIS = ("layer_norm", "rms_norm")  # norms whose weights are those of features
RESPONSE = "global_response_norm"


def fuse(graph: Graph) -> None:
    """All of the above, in the graph itself."""
    for fuse_one in (
        _turn,
        _pad,
        _line,
        _affine,
        _residual,
        _factors,
        _pointwise,
        _of_one_value,
        _add,
        _clamp,
    ):
        fuse_one(graph)
        graph.remove_unused()


def _only_user(graph: Graph, users: dict[Node, list[Node]], node: Node) -> Node | None:
    """The one node that takes this one's value."""
    if len(users[node]) != 1 or node in graph.output_nodes():
        return None
    return users[node][0]


def _turn(graph: Graph) -> None:
    """Products with a softmax on the right: on the left it need not be symmetric, and its lines may
    be divided by their sums then."""
    for node in list(graph.nodes):
        if node.op != "matmul" or not are_shares(node.inputs[1]) or are_shares(node.inputs[0]):
            continue
        rank = len(node.shape)
        dims = (*range(rank - 2), rank - 1, rank - 2)
        y, x = (
            Node(f"{node.name}_{i}_turned", "permute", [v], {"dims": dims}, layer=node.layer,
                 kind=node.kind, shape=tuple(v.shape[d] for d in dims))
            for i, v in enumerate(node.inputs)
        )  # fmt: skip
        product = replace(node, name=f"{node.name}_turned", inputs=[x, y],
                          shape=tuple(node.shape[d] for d in dims))  # fmt: skip
        back = Node(node.name, "permute", [product], {"dims": dims}, layer=node.layer,
                    kind=node.kind, shape=node.shape)  # fmt: skip
        at = graph.nodes.index(node)
        graph.nodes[at : at + 1] = [y, x, product, back]
        graph.replace(node, back)


def _pad(graph: Graph) -> None:
    users = graph.users()
    for node in graph.nodes:
        follower = _only_user(graph, users, node) if node.op == "pad" else None
        if follower is None or follower.op != "conv2d" or len(node.attrs["pad"]) > 4:
            continue
        if node.attrs["mode"] != "constant" or "size" in node.attrs:
            continue
        left, right, top, bottom = (*node.attrs["pad"], 0, 0, 0, 0)[:4]
        if min(left, right, top, bottom) < 0:
            continue
        (t, b), (l, r) = follower.attrs["padding"]
        follower.attrs["padding"] = ((t + top, b + bottom), (l + left, r + right))
        follower.inputs[0] = node.inputs[0]


def _line(graph: Graph) -> None:
    """After a 1-D convolution, what follows works on its image, one line high."""
    for node in list(graph.nodes):
        if node.op not in ("affine", "pointwise", "reshape") or node.inputs[0].op != "reshape":
            continue
        sequence = node.inputs[0]
        (image,) = sequence.inputs
        if len(sequence.shape) != 3 or image.shape != (*sequence.shape[:2], 1, sequence.shape[2]):
            continue
        if node.op == "reshape":
            if node.shape == image.shape:
                graph.replace(node, image)
        elif _only_user(graph, graph.users(), sequence) is node:
            graph.replace(node, sequence)
            node.inputs, node.shape, sequence.inputs = [image], image.shape, [node]
            graph.nodes.remove(sequence)
            graph.nodes.insert(graph.nodes.index(node) + 1, sequence)


def _affine(graph: Graph) -> None:
    for node in list(graph.nodes):
        found = _scaled(graph, node)
        if found is None:
            continue
        source, layer, factor, shift = found
        tensors = fold(layer, layer.tensors, factor, shift)
        if not all(bool(t.isfinite().all()) for t in tensors.values()):
            continue
        parameters = {"factor": factor, "shift": shift}
        more = {name: tensor for name, tensor in parameters.items() if tensor is not None}
        if "norm" in node.attrs and "folded" not in layer.attrs:
            layer.origin = {**layer.tensors, **node.origin}
            layer.attrs["norm"] = node.attrs["norm"]
        elif "norm" in layer.attrs or "norm" in node.attrs or set(layer.origin) & {"shift", *more}:
            layer.origin = {}  # what is left is a product with parameters of its own
            layer.attrs.pop("norm", None)
        else:
            layer.origin = {**(layer.origin or layer.tensors), **more}
        layer.tensors = tensors
        layer.attrs["folded"] = (*layer.attrs.get("folded", ()), node.layer)
        graph.replace(node, source)
        graph.nodes.remove(node)


def _residual(graph: Graph) -> None:
    """A response and what it is of."""
    for node in list(graph.nodes):
        if node.op != "add" or node.attrs.get("alpha", 1) != 1:
            continue
        for response, x in (node.inputs, node.inputs[::-1]):
            norm, dims = _maker(graph, response, node)
            if norm is None or norm.op != RESPONSE or "residual" in norm.attrs:
                continue
            (source,) = norm.inputs
            if source is not x and source.op == "permute":
                dims = tuple(source.attrs["dims"][d] for d in dims)
                (source,) = source.inputs
            if source is x and dims == tuple(range(len(dims))):
                norm.attrs["residual"] = 1.0
                graph.replace(node, response)
                graph.nodes.remove(node)
                break


def _factors(graph: Graph) -> None:
    """What is multiplied by one constant for each place on an axis: an affine."""
    for node in list(graph.nodes):
        found = _constant(node) if node.op == "mul" and 2 <= len(node.shape) <= 4 else None
        if found is None:
            continue
        x, axis, factor = found
        dims = [d for d in range(len(x.shape)) if d != axis]
        dims.insert(1, axis)  # where an affine has its channels
        moved = Node(f"{node.name}_channels", "permute", [x], {"dims": tuple(dims)},
                     shape=tuple(x.shape[d] for d in dims))  # fmt: skip
        scaled = Node(f"{node.name}_scaled", "affine", [moved], layer=node.layer, kind=node.kind,
                      tensors={"factor": factor, "shift": torch.zeros_like(factor)},
                      shape=moved.shape)  # fmt: skip
        order = tuple(dims.index(d) for d in range(len(dims)))
        back = Node(node.name, "permute", [scaled], {"dims": order}, layer=node.layer,
                    kind=node.kind, shape=x.shape)  # fmt: skip
        at = graph.nodes.index(node)
        graph.nodes[at : at + 1] = [moved, scaled, back]
        graph.replace(node, back)


def _constant(node: Node) -> tuple[Node, int, Tensor] | None:
    """(value, axis, constants) of a value and a constant that varies along one axis. The constants
    are no copy: training knows a parameter by its memory."""
    for x, constant in (node.inputs, node.inputs[::-1]):
        if constant.op == "constant" and x.op != "constant" and x.shape == node.shape:
            value = constant.tensors["value"].detach()
            axes = [d for d, size in enumerate(value.shape) if size > 1]
            if len(axes) == 1 and value.shape[axes[0]] == x.shape[axes[0]]:
                return x, axes[0], value.flatten()
    return None


def _scaled(graph: Graph, node: Node) -> tuple[Node, Node, Tensor | None, Tensor | None] | None:
    """(value, layer, factor, shift): what this node multiplies and shifts, the product or the norm
    that makes it, perhaps with its axes in another order, and by what; None: not at all."""
    factor: Tensor | None = None
    shift: Tensor | None = None
    if node.op == "affine":
        (source,), axis = node.inputs, 1
        factor, shift = node.tensors["factor"], node.tensors["shift"]
        if "norm" not in node.attrs and not shift.any():
            shift = None
    elif node.op in ("mul", "add") and node.attrs.get("alpha", 1) == 1:
        found = _constant(node)
        if found is None:
            return None
        source, axis, value = found
        factor, shift = (value, None) if node.op == "mul" else (None, value)
    else:
        return None
    layer, dims = _maker(graph, source, node)
    if layer is None:
        return None
    axis = dims[axis]
    takes = layer.op in ("linear", "layer_norm") or (layer.op == "rms_norm" and shift is None)
    by_channel = layer.op in (*IMAGES, RESPONSE) and "residual" not in layer.attrs
    fits = axis == len(layer.shape) - 1 if takes else by_channel and axis == 1
    if "norm" in node.attrs and (axis != 1 or layer.op in (*LAST_AXIS, RESPONSE)):
        fits = False  # its statistics are those of a product's channels
    return (source, layer, factor, shift) if fits else None


def _maker(graph: Graph, value: Node, taker: Node) -> tuple[Node | None, tuple[int, ...]]:
    """(what makes the value for this taker alone, dims), the value its result permuted by them;
    (None, ()) where others take it, too."""
    users, dims = graph.users(), tuple(range(len(value.shape)))
    while _only_user(graph, users, value) is taker:
        if value.op != "permute":
            return value, dims
        dims, taker = tuple(value.attrs["dims"][d] for d in dims), value
        (value,) = value.inputs
    return None, ()


def fold(
    layer: Node, tensors: Mapping[str, Tensor], factor: Tensor | None, shift: Tensor | None
) -> dict[str, Tensor]:
    """Weight and bias of a product or a norm whose result is then multiplied and shifted, per
    output."""
    weight, bias = tensors.get("weight"), tensors.get("bias")
    if layer.op in LAST_AXIS and weight is not None:
        weight = weight.flatten()
    groups = layer.attrs["groups"] if layer.op.startswith("conv_transpose") else 0
    return scaled(weight, bias, factor, shift, groups)


def _pointwise(graph: Graph) -> None:
    """A chain becomes one function of its first input; so does a product of two functions of it."""
    for node in list(graph.nodes):
        users = graph.users()
        if node.op == "pointwise":
            (before,) = node.inputs
            if before.op == "pointwise" and _only_user(graph, users, before) is node:
                calls = list(before.attrs["calls"])
                _append(calls, node.attrs["calls"], [len(calls)])
                first, then = (n.attrs.get("clamp_only") for n in (before, node))
                node.attrs = {"calls": calls}
                if first and then:  # both are clamps
                    low, high = then
                    node.attrs["clamp_only"] = tuple(min(max(v, low), high) for v in first)
                node.inputs = list(before.inputs)
        elif node.op in ("add", "mul") and node.attrs.get("alpha", 1) == 1:
            x, y = node.inputs
            name = f"aten.{node.op}.Tensor"
            for function, root in ((x, y), (y, x)):
                if (
                    function.op == "pointwise"
                    and function.inputs[0] is root
                    and _only_user(graph, users, function) is node
                ):
                    calls = function.attrs["calls"]
                    node.op, node.inputs = "pointwise", [root]
                    node.attrs = {"calls": [*calls, (name, (Ref(0), Ref(len(calls))), {})]}
                    break


def _of_one_value(graph: Graph) -> None:
    """What torch computes of the elements of one value, by comparisons, choices or quotients. A
    function that jumps stays with torch, which knows better than 256 steps on which side it is."""
    places = {value: i for i, value in enumerate(graph.nodes)}
    numbers = torch.arange(-8, 8, GAP)
    for node in list(graph.nodes):
        found = _function(places, node) if node.op == "aten" else None
        if found is None:
            continue
        root, calls = found
        try:
            made = run_calls(calls, numbers)
        except RuntimeError:  # it needs other dtypes
            continue
        plain = made.shape == numbers.shape and made.dtype is torch.float32
        if plain and bool((made.diff().abs() < STEEPEST * GAP).all()):
            node.op, node.inputs, node.attrs, node.tensors = "pointwise", [root], {}, {}
            node.attrs["calls"] = calls


def _function(places: Mapping[Node, int], node: Node) -> tuple[Node, list[Any]] | None:
    """(x, calls) of a node whose elements are a function of those of x, the nearest such value."""
    if not _is_elementwise(node):
        return None
    inside, frontier = [node], {*node.inputs}
    while len(frontier) > 1:
        last = max(frontier, key=places.__getitem__)
        if not _is_elementwise(last) or len(inside) >= MAX_NODES:
            return None
        frontier = (frontier - {last}) | {*last.inputs}
        inside.append(last)
    (root,) = frontier or {node}
    source = root
    while source.op in ("reshape", "permute", "slice"):
        (source,) = source.inputs
    if source.op in ("aten", "input", "constant") or root.shape != node.shape:  # of any dtype
        return None
    calls: list[Any] = []
    made = {root: 0}  # value -> its Ref
    for value in reversed(inside):
        _append(calls, _calls(value), [made[v] for v in value.inputs])
        made[value] = len(calls)
    return root, calls


def _is_elementwise(node: Node) -> bool:
    """Whether its elements are functions of those of its inputs, place by place."""
    known = node.op in ("pointwise", "add", "mul") or (
        # a tensor may be a parameter, to be trained
        node.op == "aten" and operator_of(node) in ELEMENTWISE and not node.tensors
    )
    return known and all(value.shape == node.shape for value in node.inputs)


def _calls(node: Node) -> list[Any]:
    """As `run_calls` takes them; of one with several inputs, Ref(i) is input i."""
    if node.op == "pointwise":
        return node.attrs["calls"]  # type: ignore[no-any-return]
    if node.op in ("add", "mul"):
        return [(f"aten.{node.op}.Tensor", (Ref(0), Ref(1)), dict(node.attrs))]
    return [(node.attrs["target"], node.attrs["args"], node.attrs["kwargs"])]


def _append(calls: list[Any], more: list[Any], refs: list[int]) -> None:
    """Adds calls whose inputs are what these Refs are in the longer chain."""
    refs = list(refs)

    def moved(value: Any) -> Any:
        return Ref(refs[value.index]) if isinstance(value, Ref) else value

    for target, args, kwargs in more:
        named = {key: moved(value) for key, value in kwargs.items()}
        calls.append((target, tuple(map(moved, args)), named))
        refs.append(len(calls))


def _add(graph: Graph) -> None:
    """The later of two products takes the sum: the earlier one's result is there by then. Where
    permutes follow the product, what is added is permuted back."""
    batch = _of_the_batch(graph)
    for node in list(graph.nodes):
        if node.op != "add" or node.attrs.get("alpha", 1) != 1:
            continue
        candidates = []
        for value, other in (node.inputs, node.inputs[::-1]):
            layer, dims = _maker(graph, value, node)
            if (
                layer is not None
                and layer.op in ("conv2d", "linear")
                and len(layer.inputs) == 1
                and value.shape == other.shape
                and (value in batch) == (other in batch)  # else one may be broadcast
                and other.op != "constant"
            ):
                candidates.append((layer, dims, value, other))
        if not candidates:
            continue
        layer, dims, value, other = max(candidates, key=lambda found: graph.nodes.index(found[0]))
        chain = [value]
        while chain[-1] is not layer:
            chain += chain[-1].inputs
        if len(chain) > 1:
            back = tuple(dims.index(axis) for axis in range(len(dims)))
            other = Node(f"{other.name}_in_{node.name}", "permute", [other], {"dims": back},
                         layer=node.layer, kind=node.kind, shape=layer.shape)  # fmt: skip
            chain.append(other)
        layer.inputs.append(other)
        graph.nodes = [n for n in graph.nodes if n not in chain]
        place = graph.nodes.index(node)
        graph.nodes[place : place + 1] = chain[::-1]
        graph.replace(node, value)


def _of_the_batch(graph: Graph) -> set[Node]:
    """The nodes whose values have as many places along their first axis as the batch: they depend
    on an input that has."""
    found: set[Node] = set()
    for node in graph.nodes:
        has_one = node.op == "input" and not node.attrs.get("single")
        if has_one or not found.isdisjoint(node.inputs):
            found.add(node)
    return found


def _clamp(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op != "pointwise" or "clamp_only" not in node.attrs:
            continue
        before, _ = _maker(graph, node.inputs[0], node)
        if before is None or before.op not in CLAMPING:
            continue
        lo, hi = node.attrs["clamp_only"]
        low, high = before.attrs.get("clamp", (-math.inf, math.inf))
        if max(low, lo) > min(high, hi):
            continue
        before.attrs["clamp"] = (max(low, lo), min(high, hi))
        graph.replace(node, node.inputs[0])
