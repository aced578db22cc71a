"""Poolings, and what is one: means and maxima along axes; upsampling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from fastq.graph import Node
from fastq.read.exported import Arguments, first_of, name_of, numbers, takes_indices
from fastq.read.reader import Reader, axis, reads
from fastq.read.spelled import is_part
from fastq.weights import several

# across a line: as if there were no such axis
_WINDOW = {"kernel_size": 1, "stride": 1, "padding": 0, "dilation": 1}


@reads("max_pool1d", "max_pool2d")
def max_pool(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _pooled(reader, node, "max_pool2d", x, a, ceil_mode=bool(a["ceil_mode"]))


@reads("max_pool2d_with_indices")
def max_pool_with_indices(
    reader: Reader, node: fx.Node, x: Node, a: Arguments
) -> list[Node | None] | None:
    """It returns indices as well."""
    return _first_of_two(node, lambda: max_pool(reader, node, x, a))


def _first_of_two(node: fx.Node, read: Callable[[], Node | None]) -> list[Node | None] | None:
    """The value of an operator that returns indices as well, if nobody takes these: in a list, as
    getitem wants."""
    y = None if takes_indices(node) else read()
    return None if y is None else [y, None]


@reads("avg_pool1d", "avg_pool2d")
def avg_pool(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    flags = {key: bool(a[key]) for key in ("ceil_mode", "count_include_pad")}
    divisor = a.get("divisor_override")
    return _pooled(reader, node, "avg_pool2d", x, a, **flags, divisor_override=divisor)


def _pooled(
    reader: Reader, node: fx.Node, op: str, x: Node, a: Arguments, **others: Any
) -> Node | None:
    axes = _axes(node)
    given = {key: a[key] for key in _WINDOW if key in a}
    given["stride"] = given["stride"] or given["kernel_size"]
    window = {key: several(key, numbers(value), axes, 0) for key, value in given.items()}
    if axes == 1:
        window = {key: (_WINDOW[key], *along) for key, along in window.items()}
    return _of_image(reader, node, op, x, {"pool": {**window, **others}})


@reads("adaptive_avg_pool1d", "adaptive_avg_pool2d")
def adaptive_avg_pool(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _adaptive(reader, node, "adaptive_avg_pool2d", x, a)


@reads("adaptive_max_pool1d", "adaptive_max_pool2d")
def adaptive_max_pool(
    reader: Reader, node: fx.Node, x: Node, a: Arguments
) -> list[Node | None] | None:
    return _first_of_two(node, lambda: _adaptive(reader, node, "adaptive_max_pool2d", x, a))


def _adaptive(reader: Reader, node: fx.Node, op: str, x: Node, a: Arguments) -> Node | None:
    """F.adaptive_avg_pool2d(x, (None, 1)) comes with the input's size: None again."""
    axes = _axes(node)
    wanted = several("output_size", numbers(a["output_size"]), axes, 0)
    size = tuple(None if n == m else n for n, m in zip(wanted, x.shape[-axes:], strict=True))
    return _of_image(reader, node, op, x, {"output_size": (None, *size)[-2:]})


def _axes(node: fx.Node) -> int:
    """How many axes the windows of a pooling have."""
    return 1 if "1d" in name_of(node.target) else 2


def _of_image(
    reader: Reader, node: fx.Node, op: str, x: Node, attrs: dict[str, Any]
) -> Node | None:
    """A pooling of images, or of lines as images one line high; not of one without a batch."""
    if _axes(node) == 1:
        return reader.line(node, op, x, attrs)
    if len(x.shape) != 4:
        return None
    shape = tuple(map(int, pytree.tree_leaves(node.meta["val"])[0].shape))
    return reader.add(node, op, [x], attrs=attrs, shape=shape)


@reads("mean")
def mean(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    if a.get("dim") is None:
        return None
    dims = {d % len(x.shape) for d in a["dim"]}
    if len(dims) == 1 and a.get("keepdim") and (is_part(x) or _centers(node)):
        return None
    return _over(reader, node, "adaptive_avg_pool2d", x, dims, bool(a.get("keepdim")))


def _centers(mean: fx.Node) -> bool:
    """Whether it is subtracted from what it is the mean of: a part of a norm."""
    own = mean.args[0], mean
    return any(name_of(user.target) == "sub" and user.args[:2] == own for user in mean.users)


@reads("amax")
def amax(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    dims = {d % len(x.shape) for d in a.get("dim") or range(len(x.shape))}
    return _over(reader, node, "adaptive_max_pool2d", x, dims, bool(a.get("keepdim")))


@reads("max")
def largest(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> list[Node | None] | None:
    """Along one axis: it returns indices as well, as the poolings do."""
    by_axis = a.get("dim") is not None  # else it is a scalar, or the larger of two
    if not by_axis or node.meta["val"][0].dtype is not torch.float32:
        return None
    return _first_of_two(node, lambda: amax(reader, node, x, {**a, "dim": [a["dim"]]}))


def _over(
    reader: Reader, node: fx.Node, op: str, x: Node, dims: set[int], keepdim: bool
) -> Node | None:
    """Over height, width or channels of an image, or one axis of a sequence: pooling."""
    if len(x.shape) == 3 and dims in ({1}, {2}):
        return _over_sequence(reader, node, op, x, dims == {1}, keepdim)
    if len(x.shape) != 4 or not dims or 0 in dims or len(dims) == 3:
        return None
    order = [0, 1, 2, 3]
    if 1 in dims:  # what is kept of height and width, or one of both, are channels meanwhile
        channels = 2 if 3 in dims else 3
        order = [0, channels, 1, 5 - channels]
        x = reader.permute(f"{node.name}_image", x, order)
    size = tuple(1 if d in dims else None for d in order[2:])
    shape = tuple(1 if d in dims else n for d, n in zip(order, x.shape, strict=True))
    attrs = {"output_size": size}
    y = reader.add(node, op, [x], name=f"{node.name}_pool", attrs=attrs, shape=shape)
    if not keepdim:
        left = [n for d, n in zip(order, shape, strict=True) if d not in dims]
        order = [d for d in order if d not in dims]
        name = first_of(node) if order == sorted(order) else f"{node.name}_flat"
        flat = reader.reshape(name, y, left)
        if flat is None:
            return None
        y = flat
    return reader.permute(first_of(node), y, [order.index(d) for d in sorted(order)])


def _over_sequence(
    reader: Reader, node: fx.Node, op: str, x: Node, features_last: bool, keepdim: bool
) -> Node | None:
    """(B, C, L), or (B, L, C), as an image of L x 1 pixels."""
    if features_last:
        x = reader.permute(f"{node.name}_turned", x, (0, 2, 1))
    b, c, length = x.shape
    image = reader.add(f"{node.name}_image", "reshape", [x], shape=(b, c, length, 1),
                       attrs={"groups": (axis(0), axis(1), ((2,), (None, 1)))})  # fmt: skip
    y = reader.add(node, op, [image], name=f"{node.name}_pool",
                   attrs={"output_size": (1, 1)}, shape=(b, c, 1, 1))  # fmt: skip
    groups = (axis(0), ((1, 2, 3), (None,)))
    flat = reader.add(f"{node.name}_flat" if keepdim else first_of(node), "reshape", [y],
                      attrs={"groups": groups}, shape=(b, c))  # fmt: skip
    if not keepdim:
        return flat
    return reader.reshape(first_of(node), flat, (b, 1, c) if features_last else (b, c, 1))


@reads("upsample_nearest2d")
def upsample_nearest(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return reader.add(node, "upsample_nearest2d", [x], attrs={"size": _size(node, a)})


@reads("_upsample_nearest_exact2d")
def upsample_nearest_exact(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    """By whole factors, no other place is nearer."""
    factors = _size(node, a).get("scale_factor", (0.5,))
    whole = all(factor.is_integer() for factor in factors)
    return upsample_nearest(reader, node, x, a) if whole else None


@reads("upsample_bilinear2d")
def upsample_bilinear(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    attrs = {"size": _size(node, a), "align_corners": a["align_corners"]}
    return reader.add(node, "upsample_bilinear2d", [x], attrs=attrs)


@reads("upsample_nearest1d")
def upsample_nearest_line(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    size = _size(node, a)
    # by another factor torch rounds places of sequences otherwise than those of images
    if "scale_factor" in size and not size["scale_factor"][1].is_integer():
        return None
    return reader.line(node, "upsample_nearest2d", x, {"size": size})


@reads("upsample_linear1d")
def upsample_line(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    attrs = {"size": _size(node, a), "align_corners": a["align_corners"]}
    return reader.line(node, "upsample_bilinear2d", x, attrs)


def _size(node: fx.Node, a: Arguments) -> dict[str, Any]:
    """What an image, or a line, is resized to: the scale where one is given, which holds for any
    size."""
    factors = a.get("scale_factors")
    if factors is None and a.get("scales_h") is not None:
        factors = [a["scales_h"], a["scales_w"]]
    if factors is None and a.get("scales") is not None:
        factors = [a["scales"]]
    if factors:
        return {"scale_factor": (1.0, *map(float, factors))[-2:]}
    return {"size": (1, *map(int, node.meta["val"].shape[2:]))[-2:]}
