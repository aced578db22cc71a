"""The order and the sizes of axes, and padding."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf, prod

import torch
from torch import fx

from fastq.graph import Node
from fastq.read.exported import Arguments, arguments_of, name_of, takes_indices, two
from fastq.read.reader import Reader, axis, reads

LOWEST = torch.finfo(torch.float32).min  # no infinity: training subtracts a value from itself


@reads(
    "reshape",
    "view",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "_unsafe_view",
    "reshape_as",
    "view_as",
)
def reshape(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return reader.reshape(node, x, node.meta["val"].shape)


@reads("permute")
def permute(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return reader.permute(node, x, a["dims"])


@reads("transpose", "swapdims")
def transpose(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    dims = list(range(len(x.shape)))
    i, j = a["dim0"] % len(dims), a["dim1"] % len(dims)
    dims[i], dims[j] = dims[j], dims[i]
    return reader.permute(node, x, dims)


@reads("swapaxes")
def swapaxes(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return transpose(reader, node, x, {**a, "dim0": a["axis0"], "dim1": a["axis1"]})


@reads("movedim", "moveaxis")
def movedim(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    rank = len(x.shape)
    source, target = (
        [d % rank for d in (dims if isinstance(dims, list | tuple) else [dims])]
        for dims in (a["source"], a["destination"])
    )
    dims = [d for d in range(rank) if d not in source]
    for place, d in sorted(zip(target, source, strict=True)):
        dims.insert(place, d)
    return reader.permute(node, x, dims)


@reads("t", "numpy_T", "matrix_H")
def turned(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return reader.permute(node, x, range(len(x.shape))[::-1])


@reads("mT", "adjoint", "mH")
def matrices_turned(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return transpose(reader, node, x, {**a, "dim0": -2, "dim1": -1})


@reads("channel_shuffle")
def channel_shuffle(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    groups = a["groups"]
    return _rearranged(reader, node, x, (groups, None), (0, 2, 1, 3, 4), ((1, 2),))


@reads("pixel_shuffle")
def pixel_shuffle(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    r = a["upscale_factor"]
    return _rearranged(reader, node, x, (None, r, r), (0, 1, 4, 2, 5, 3), ((2, 3), (4, 5)))


@reads("pixel_unshuffle")
def pixel_unshuffle(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    r = a["downscale_factor"]
    if len(x.shape) != 4:
        return None
    b, c, h, w = x.shape
    groups = axis(0), axis(1), ((2,), (None, r)), ((3,), (None, r))
    split = reader.add(f"{node.name}_split", "reshape", [x], attrs={"groups": groups},
                       shape=(b, c, h // r, r, w // r, r))  # fmt: skip
    turned = reader.permute(f"{node.name}_turned", split, (0, 1, 3, 5, 2, 4))
    groups = axis(0), ((1, 2, 3), (None,)), axis(4), axis(5)
    return reader.add(node, "reshape", [turned], attrs={"groups": groups})


def _rearranged(
    reader: Reader, node: fx.Node, x: Node, parts: tuple[int | None, ...],
    dims: tuple[int, ...], joined: tuple[tuple[int, ...], ...],
) -> Node | None:  # fmt: skip
    """Channels of an image split into parts, permuted, and axes joined again."""
    if len(x.shape) != 4:
        return None
    b, c, h, w = x.shape
    known = prod(n for n in parts if n is not None)
    shape = (b, *(c // known if n is None else n for n in parts), h, w)
    attrs = {"groups": (axis(0), ((1,), parts), axis(2), axis(3))}
    split = reader.add(f"{node.name}_split", "reshape", [x], shape=shape, attrs=attrs)
    turned = reader.permute(f"{node.name}_turned", split, dims)
    alone = {d: (d,) for d in range(len(dims))} | {axes[0]: axes for axes in joined}
    inner = {axes[1] for axes in joined}
    groups = tuple((axes, (None,)) for d, axes in sorted(alone.items()) if d not in inner)
    return reader.add(node, "reshape", [turned], attrs={"groups": groups})


@reads("pad", "constant_pad_nd")
def pad(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    sides, value = a["pad"], a.get("value")
    if value == -inf and _under_maxima(node, sides):
        lowest = {"pad": tuple(sides), "mode": "constant", "value": LOWEST}
        return reader.add(node, "pad", [x], attrs=lowest)
    return None if value else _padded(reader, node, x, sides, a.get("mode", "constant"))


def _under_maxima(node: fx.Node, sides: Sequence[int]) -> bool:
    """Whether only maximum poolings take it, and each of their windows reaches beyond the padding:
    then any value that is no more than all others will do for -inf."""

    def reaches(user: fx.Node) -> bool:
        name = name_of(user.target)
        if name != "max_pool2d" and (name != "max_pool2d_with_indices" or takes_indices(user)):
            return False
        a = arguments_of(user, user.target)
        plain = two(a["padding"]) == (0, 0) and two(a["dilation"]) == (1, 1) and not a["ceil_mode"]
        height, width = two(a["kernel_size"])
        return plain and max(sides[:2]) < width and max(sides[2:], default=0) < height

    return len(sides) in (2, 4) and min(sides) >= 0 and all(map(reaches, node.users))


@reads("reflection_pad1d", "reflection_pad2d")
def reflection_pad(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _padded(reader, node, x, a["padding"], "reflect")


@reads("replication_pad1d", "replication_pad2d")
def replication_pad(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _padded(reader, node, x, a["padding"], "replicate")


def _padded(reader: Reader, node: fx.Node, x: Node, sides: Sequence[int], mode: str) -> Node:
    if not sides:
        return x
    return reader.add(node, "pad", [x], attrs={"pad": tuple(sides), "mode": mode})
