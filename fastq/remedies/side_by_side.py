"""The sample that remedies work on, and the float network and the simulated one side by side."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastq.graph import (
    BY_CHANNEL,
    Node,
    Values,
    along_channels,
    evaluate,
    pixels_together,
    shapes_of,
    tensors_of,
)
from fastq.prepare import Prepared, fake_quantize, grid_ends

Batch = Sequence[Any]

# operations on images after which each channel is still itself, times the same factor
_POOLS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "upsample_nearest2d", "upsample_bilinear2d")  # fmt: skip
SAMPLE_BYTES = 2**26  # of the network's largest value: 32 images for ResNet-50


def take_sample(prepared: Prepared, batches: Iterator[Batch]) -> list[Batch]:
    """The next batches, until the network's largest value has SAMPLE_BYTES in them."""
    values = [n.shape for n in prepared.quantized_values() if n.shape and 0 not in n.shape]
    largest = max((math.prod(shape[1:]) for shape in values), default=1)
    sample: list[Batch] = []
    total = 0
    for arguments in batches:
        sample.append(arguments)
        total += 4 * largest * _size(arguments)
        if total >= SAMPLE_BYTES:
            break
    return sample


def _size(arguments: Batch) -> int:
    """The number of images, or the like, in a batch."""
    return next((len(x) for x in arguments if isinstance(x, Tensor) and x.dim()), 1)


@dataclass
class Side:
    """One batch at a layer, as it is when the layer's turn has come.

    inputs  its inputs, quantized, as the simulation has them.
    wanted  its output in the float network, before the clamp.
    made    its output in the simulation, before the clamp: a remedy that knows it may put it here,
            and the layer is not run again.
    """

    inputs: list[Tensor]
    wanted: Tensor
    made: Tensor | None = None


def walk(
    prepared: Prepared, batches: Sequence[Batch], *, floats: bool = True
) -> Iterator[tuple[Node, list[Side]]]:
    """Run the float network and the simulated one, an operation at a time, on all batches.

    floats  whether the float network is wanted: without it, `wanted` is empty.

    Gives each layer that becomes integers before it is run; what has been made of the layer by the
    time that the next one is asked for is what the layers after it see.
    """
    graph, layers, quantized = prepared.graph, set(prepared.products()), prepared.quantized_values()
    last = {value: node for node in graph for value in node.inputs}
    reals: list[Values] = [{} for _ in batches] if floats else []
    grids: list[Values] = [{} for _ in batches]
    shapes = [shapes_of(arguments) for arguments in batches]
    for node in graph:
        made: list[Any]
        if node.op == "input":
            place = graph.inputs.index(node)
            made = [pixels_together(tensors_of(arguments)[place]) for arguments in batches]
            for values, value in zip(reals, made, strict=False):
                values[node] = value
        elif node in layers:
            made = yield from _at_layer(prepared, node, reals, grids)
        else:
            for values, sizes in zip(reals, shapes, strict=False):
                values[node] = evaluate(node, [values[v] for v in node.inputs], sizes)
            made = [
                evaluate(node, [grid[v] for v in node.inputs], sizes)
                for grid, sizes in zip(grids, shapes, strict=True)
            ]
        if node in quantized:
            for values in reals:
                values[node] = entering(prepared, node, values[node])
        for grid, value in zip(grids, made, strict=True):
            if node in quantized and isinstance(value, Tensor):
                value = entering(prepared, node, value)
                # a product is new memory, whose pages cost more than what is computed in them
                out = value if node in layers else None
                value = fake_quantize(value, prepared.qparams(node), out=out)
            grid[node] = value
        for taken in set(node.inputs):
            if last[taken] is node:
                for values in (*reals, *grids):
                    del values[taken]


def _at_layer(
    prepared: Prepared, node: Node, reals: Sequence[Values], grids: Sequence[Values]
) -> Generator[tuple[Node, list[Side]], None, list[Tensor]]:
    """Gives a layer and its sides; returns what it makes of them then, clamped, in the simulation,
    and puts what the float network makes into `reals`."""
    bare = _unclamped(node)
    for values in reals:
        values[node] = evaluate(bare, [values[v] for v in node.inputs])
    wanted = [values[node] for values in reals] or [torch.empty(0)] * len(grids)
    sides = [
        Side([grid[v] for v in node.inputs], real) for grid, real in zip(grids, wanted, strict=True)
    ]
    yield node, sides
    if any(side.made is None for side in sides):
        bare = simulation(prepared, node)
    made = [evaluate(bare, side.inputs) if side.made is None else side.made for side in sides]
    for values in reals:
        values[node] = clamped(node, values[node], out=values[node])
    return [clamped(node, value, out=value) for value in made]


def entering(prepared: Prepared, node: Node, value: Any) -> Any:
    """A quantized value without what is not finite, which only data and float operators have: the
    way into a program takes NaN as 0, as of 0 / 0, and infinities as the ends of the range."""
    if not isinstance(value, Tensor) or (node not in prepared.reasons and node.op != "grid"):
        return value
    if node.op == "grid":  # whose 0 is its shift
        value = torch.where(value.isnan(), along_channels(node.tensors["shift"], value), value)
    low, high = grid_ends(prepared.qparams(node))
    return value.nan_to_num(0.0, high, low)


def _unclamped(node: Node) -> Node:
    return replace(node, attrs={k: v for k, v in node.attrs.items() if k != "clamp"})


def clamped(node: Node, value: Tensor, out: Tensor | None = None) -> Tensor:
    """The value of a node after its clamp; in the memory of `out`, which may be the value's."""
    return torch.clamp(value, *node.attrs["clamp"], out=out) if "clamp" in node.attrs else value


def simulation(prepared: Prepared, node: Node) -> Node:
    """A layer with its integer weight and without its clamp."""
    tensors = prepared.simulated_tensors(node)
    return replace(
        _unclamped(node), tensors=tensors | {"weight": pixels_together(tensors["weight"])}
    )


def by_channel(node: Node, value: Tensor) -> Tensor:
    """(C, all else) of an image, or of features that are the last axis."""
    return value.transpose(0, channel_axis(node, value.dim())).flatten(1)


def channel_axis(node: Node, rank: int) -> int:
    """Which axis of a node's value, of so many, is that of its channels."""
    return 1 if node.op in ("conv2d", "conv_transpose2d", *BY_CHANNEL) else rank - 1


def channel_values(node: Node, name: str, default: float) -> Tensor:
    """A tensor that a norm, or a bias, has of its channels, (C,), or of all of them, (1,)."""
    return torch.as_tensor(node.tensors.get(name, default)).flatten()


def axis_after(value: Node, user: Node, axis: int) -> int | None:
    """Where an axis of a value is in what is made of it; None if that has something else there."""
    match user.op:
        case "permute":
            return int(user.attrs["dims"].index(axis))
        case "slice":
            return axis if user.attrs["dim"] != axis else None
        case "pad":
            from_last = len(user.shape) - 1 - axis
            return None if any(user.attrs["pad"][2 * from_last : 2 * from_last + 2]) else axis
        case "reshape":
            place = 0
            for axes, sizes in user.attrs["groups"]:
                if axis in axes:  # alone but for axes of size 1
                    others = [value.shape[other] for other in axes if other != axis]
                    kept = [i for i, size in enumerate(sizes) if size != 1]
                    return place + kept[0] if {1}.issuperset(others) and len(kept) == 1 else None
                place += len(sizes)
            return None
        case _:
            return axis if user.op in _POOLS and axis == 1 else None


def along(factor: Tensor, tensor: Tensor, axis: int) -> Tensor:
    """A factor (C,) in a shape that broadcasts along an axis of a tensor."""
    shape = [1] * max(tensor.dim(), 1)
    shape[axis] = -1
    return factor.reshape(shape)
