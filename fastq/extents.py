"""Which size of the network's input an axis of a value follows, by the operations between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastq.graph import Node
from fastq.sizes import Size, sides_of

Change = Callable[[Size], Size | None]  # of an axis' size, by one operation

# operations that leave the sizes of some axes as they are
KEEPING = ("add", "mul", "affine", "prelu", "pointwise", "softmax", "concat", "linear",
           "layer_norm", "rms_norm", "group_norm", "global_response_norm")  # fmt: skip
WHOLE = 2**62  # slices up to here go up to the end


def size_along(inputs: Sequence[Node], node: Node, axis: int) -> Size | None:
    """The size of this axis of a value, by those of the network's inputs; None where it does not
    follow one, or not in a way that a `Size` can say."""
    changes: list[Change] = []
    size: Size | None = None
    while size is None:
        if node.op == "input":
            size = Size(inputs.index(node), axis)
        elif isinstance(given := _given(node, axis), Size):
            size = given
        else:
            before = _before(node, axis)
            if before is None:
                return None
            node, axis, change = before
            changes.append(change)
    for change in reversed(changes):
        size = change(size)
        if size is None:
            return None
    return size


def _given(node: Node, axis: int) -> int | Size | None:
    """What an image is resized to, or an axis split into."""
    if node.op == "reshape":
        sizes = [part for _, parts in node.attrs["groups"] for part in parts]
        return sizes[axis]  # type: ignore[no-any-return]
    sizes = node.attrs.get("size", {}).get("size")
    return None if sizes is None or axis < 2 else sizes[axis - 2]  # type: ignore[no-any-return]


def _before(node: Node, axis: int) -> tuple[Node, int, Change] | None:
    """(value, axis, change): what the axis was, and what the operation makes of its size."""
    if not node.inputs:
        return None
    x, a = node.inputs[0], node.attrs
    change: Change | None = None
    match node.op:
        case "permute":
            return x, a["dims"][axis], _same
        case "reshape":
            found = _unsplit(node, axis)
            return None if found is None else (x, found, _same)
        case "slice":
            change = _same if axis != a["dim"] else _slice(a["start"], a["end"], a["step"])
        case "pad":
            change = _plus(sum(sides_of(a["pad"], len(node.shape))[axis]))
        case "conv2d" if axis >= 2:
            i = axis - 2
            window = node.tensors["weight"].shape[axis], a["stride"][i], sum(a["padding"][i])
            change = _windows(*window, a["dilation"][i])
        case "max_pool2d" | "avg_pool2d" if axis >= 2:
            change = _pool(a["pool"], axis - 2)
        case "conv_transpose2d" if axis >= 2:
            change = _transposed(node, axis)
        case "upsample_nearest2d" | "upsample_bilinear2d" if axis >= 2:
            change = (
                _scaled(a["size"]["scale_factor"][axis - 2]) if not _given(node, axis) else None
            )
        case op if op in KEEPING:
            if (op == "linear" and axis == len(node.shape) - 1) or a.get("dim") == axis:
                return (x, axis, _same) if op == "softmax" else None
            for value in node.inputs:
                if len(value.shape) == len(node.shape) and value.shape[axis] == node.shape[axis]:
                    return value, axis, _same
    return None if change is None else (x, axis, change)


def _same(size: Size) -> Size:
    return size


def _plus(more: int) -> Change:
    return lambda size: size.plus(more)


def _windows(kernel: int, stride: int, padding: int, dilation: int, ceil: bool = False) -> Change:
    """As many as there are windows."""
    more = padding - dilation * (kernel - 1) - 1 + (stride - 1 if ceil else 0)

    def change(size: Size) -> Size | None:
        steps = size.plus(more).over(stride)
        return None if steps is None else steps.plus(1)

    return change


def _pool(pool: dict[str, Any], i: int) -> Change | None:
    kernel, padding = pool["kernel_size"][i], pool["padding"][i]
    stride, dilation = (
        (pool.get("stride") or pool["kernel_size"])[i],
        pool.get("dilation", (1, 1))[i],
    )
    ceil = pool["ceil_mode"]
    if ceil and stride + padding > dilation * (kernel - 1) + 1:
        return None  # a last window outside of the input is left out
    return _windows(kernel, stride, 2 * padding, dilation, ceil)


def _transposed(node: Node, axis: int) -> Change:
    a, i = node.attrs, axis - 2
    more = a["dilation"][i] * (node.tensors["weight"].shape[axis] - 1) + 1
    more += a["output_padding"][i] - 2 * a["padding"][i]
    return lambda size: size.plus(-1).times(a["stride"][i]).plus(more)


def _scaled(factor: float) -> Change | None:
    """Resized by a whole factor, or by one over a whole number."""
    if factor >= 1 and factor.is_integer():
        return lambda size: size.times(int(factor))
    parts = 1 / factor
    return (lambda size: size.over(int(parts))) if parts.is_integer() else None


def _slice(start: int | None, end: int | None, step: int) -> Change | None:
    if (start or 0) < 0 or (end is not None and end < WHOLE):
        return None
    return lambda size: size.plus(step - 1 - (start or 0)).over(step)


def _unsplit(node: Node, axis: int) -> int | None:
    """The axis of a reshape's input that is this one of its output: others that it was joined with,
    or split into, are of size 1."""
    (x,), first = node.inputs, 0
    for axes, parts in node.attrs["groups"]:
        if first <= axis < first + len(parts):
            others = parts[: axis - first] + parts[axis - first + 1 :]
            wide = [i for i in axes if x.shape[i] != 1]
            alone = len(wide) == 1 and all(part == 1 for part in others)
            return wide[0] if alone else None
        first += len(parts)
    return None
