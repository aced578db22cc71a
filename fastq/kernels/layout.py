"""Copies between any two strided arrays, frames around images, and the float borders of a program.

A copy whose elements lie side by side on both sides is a pointwise row. In a transposing one x's
elements lie side by side along P, out's along Q, with up to four more axes around them:

    x    Q lines of P elements        TQ lines of TP elements are interleaved in registers (pairs,
    out  P lines of Q elements        then pairs of pairs) into TP groups of TQ, and stored

The last TP of P are done again where P is not a multiple. Other strides go element by element.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from fastq.kernels.call import ITEM_BYTES, Call, View, collapse, dense_strides
from fastq.kernels.lines import (
    ELEMENT,
    LARGE,
    emit_converted,
    emit_interleaved,
    emit_line,
    join_lines,
)
from fastq.kernels.native import native
from fastq.kernels.pointwise import (
    float_parameters,
    int_parameters,
    line_config,
    pointwise_line,
    pointwise_row,
)
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import address, i64, load, ptr, shuffle, store, vec
from fastq.kernels.tiles import BYTES_PER_NANOSECOND
from fastq.qparams import limits

# (address, strides of axes 0 to 3, P, Q) of x and out; sizes of axes 1 to 3, P, Q
X, OUT, SIZES, ROWS, BLOCK, C_FIELDS = 0, 7, 14, 19, 20, 21
(
    B_OUT, B_IMAGE, B_LINE, B_PIXEL, B_HEIGHT, B_WIDTH, B_CHANNELS,
    B_TOP, B_BOTTOM, B_LEFT, B_RIGHT, B_VALUE, B_FIELDS,
) = range(13)  # fmt: skip
TP, TQ = 16, (16, 8, 4, 2, 1)
P_BLOCK = 64  # of P in a task, at least
BLOCK_ELEMENTS = 8 * 1024  # of a task, roughly
ELEMENT_NANOSECONDS = 0.5  # of an element copied by itself


@intrinsic(prefer_literal=True)
def _tile(typingctx: Any, config: Any, x: Any, x_q: Any, out: Any, out_p: Any, size_q: Any) -> Any:
    """TP elements of P at x, times all of Q."""
    source, target, *widths = (t.literal_value for t in config.types[:-1])
    signature = types.void(config, *[types.int64] * 5)
    item = ITEM_BYTES[target]

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        x, out = (b.inttoptr(values[i], ptr) for i in (1, 3))
        x_q, out_p, size_q = values[2], values[4], values[5]

        def body(q: Any, width: int) -> None:
            lines = [
                load(b, vec(ELEMENT[source], TP), x, b.mul(b.add(q, i64(i)), x_q))
                for i in range(width)
            ]
            groups = emit_interleaved(
                b, [emit_converted(b, line, ELEMENT[target]) for line in lines]
            )
            start = address(b, out, b.mul(q, i64(item)))
            dense = b.icmp_signed("==", out_p, i64(width * item))
            with b.if_else(dense) as (whole, parts):
                with whole:
                    store(b, groups, start)
                with parts:
                    for p in range(TP):
                        lanes = range(p * width, (p + 1) * width)
                        store(b, shuffle(b, groups, groups, lanes), start, b.mul(out_p, i64(p)))

        emit_line(b, size_q, body, widths)
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def copy_kernel(source: str, target: str, way: str, widths: tuple[int, ...]) -> Any:
    """A task is ROWS places of axis 3, of BLOCK elements of P each, at one of axes 0 to 2.

    way "lines": unit stride along Q in both; "tiles": in x along P, which is at least TP, and in
    out along Q, which is done by these widths; "elements": any strides.
    """
    config = (source, target, way, sources_digest())
    tile = (source, target, *widths, sources_digest())
    line = line_config("copy", (target, source), (ITEM_BYTES[target], ITEM_BYTES[source]))
    item = ITEM_BYTES[source]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        size_p, size_q = args[SIZES + 3], args[SIZES + 4]
        across = (size_p + args[BLOCK] - 1) // args[BLOCK]
        down = (args[SIZES + 2] + args[ROWS] - 1) // args[ROWS]
        x_p, x_q, out_p, out_q = args[X + 5], args[X + 6], args[OUT + 5], args[OUT + 6]
        for task in range(begin, end):
            first = task % across * args[BLOCK]
            last = min(first + args[BLOCK], size_p)
            row = task // across % down * args[ROWS]
            rows = min(args[ROWS], args[SIZES + 2] - row)
            place = task // across // down
            k, place = place % args[SIZES + 1], place // args[SIZES + 1]
            j, i = place % args[SIZES], place // args[SIZES]
            x = args[X] + i * args[X + 1] + j * args[X + 2] + k * args[X + 3] + row * args[X + 4]
            out = args[OUT] + i * args[OUT + 1] + j * args[OUT + 2] + k * args[OUT + 3]
            out += row * args[OUT + 4]
            for _ in range(rows):
                if config[2] == "tiles":
                    p = first
                    while p < last:
                        at = min(p, size_p - TP)
                        _tile(tile, x + at * item, x_q, out + at * out_p, out_p, size_q)
                        p += TP
                elif config[2] == "lines":
                    for p in range(first, last):
                        start = x + p * x_p
                        pointwise_line(line, out + p * out_p, start, 0, 0, size_q, x, x, x)
                else:
                    for p in range(first, last):
                        source, target = x + p * x_p, out + p * out_p
                        for _ in range(size_q):
                            pointer(target, config[1])[0] = pointer(source, config[0])[0]
                            source += x_q
                            target += out_q
                x += args[X + 4]
                out += args[OUT + 4]

    return kernel


@functools.cache
def border_kernel(kind: str) -> Any:
    """A task is one line of one image; the frame of it is filled."""
    config = (kind, sources_digest())
    item = ITEM_BYTES[kind]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        height, width, channels = args[B_HEIGHT], args[B_WIDTH], args[B_CHANNELS]
        value = args[B_VALUE]
        for task in range(begin, end):
            image, y = task // height, task % height
            line = args[B_OUT] + image * args[B_IMAGE] + y * args[B_LINE]
            left, right = args[B_LEFT], args[B_RIGHT]
            if y < args[B_TOP] or y >= height - args[B_BOTTOM]:
                left, right = width, 0
            for first, last in ((0, left), (width - right, width)):
                start = line + first * args[B_PIXEL]
                pixels, run = last - first, channels
                if args[B_PIXEL] == channels * item:  # nothing lies between the pixels
                    pixels, run = min(pixels, 1), pixels * channels
                for _ in range(pixels):
                    out = pointer(start, config[0])
                    for c in range(run):
                        out[c] = value
                    start += args[B_PIXEL]

    return kernel


def border_row(
    call: Call,
    whole: View,
    top: int,
    bottom: int,
    left: int,
    right: int,
    value: int,
) -> None:
    """Appends: the frame of whole (B, HP, WP, C), so many lines and columns wide, = value."""
    images, height, width, channels = whole.shape
    if not images * height * width * channels or not top + bottom + left + right:
        return
    size = images * (height * width - (height - top - bottom) * (width - left - right)) * channels
    sizes = (height, width, channels, top, bottom, left, right, value)
    values = dict(zip(range(B_IMAGE, B_FIELDS), (*whole.strides[:3], *sizes), strict=True))
    time = size * whole.item / BYTES_PER_NANOSECOND
    call.row(
        border_kernel(whole.kind), B_FIELDS, images * height, values, {B_OUT: whole.place}, time,
    )  # fmt: skip


def permuted(view: View, order: Sequence[int]) -> View:
    """The view with its axes in another order."""
    shape, strides = (tuple(values[i] for i in order) for values in (view.shape, view.strides))
    return replace(view, shape=shape, strides=strides)


def _by_stride(view: View) -> list[int]:
    """The axes, the widest stride first; those of size 1 in front."""
    return sorted(
        range(len(view.shape)), key=lambda a: (view.shape[a] > 1, -abs(view.strides[a])),
    )  # fmt: skip


def copy_row(call: Call, x: View, out: View) -> None:
    """Appends out = x: the same shape, any strides, up to 6 axes that do not join.

    The kinds may be two of "u8" and "u8x2", or the same. x and out must not overlap.
    """
    size = int(np.prod(out.shape))
    if size == 0:
        return
    order = _by_stride(out)
    views = [permuted(out, order), permuted(x, order)]
    shape, (out_steps, x_steps) = collapse(views, 6)
    along = x_steps[-1] == x.item and out_steps[-1] == out.item
    if shape[-1] == 1 or (along and shape[:2] == (1, 1)):
        pointwise_row(call, "copy", views)
        return
    # P is where x's elements lie side by side
    p = next((a for a in range(5) if shape[a] > 1 and x_steps[a] == x.item), 4)
    axes = [*(a for a in range(5) if a != p), p, 5]
    sizes = [shape[a] for a in axes]
    way = "elements"
    if along:
        way = "lines"
    elif x_steps[p] == x.item and out_steps[5] == out.item and shape[p] >= TP:
        way = "tiles"
    values = {X + 1 + i: x_steps[a] for i, a in enumerate(axes)}
    values |= {OUT + 1 + i: out_steps[a] for i, a in enumerate(axes)}
    values |= {SIZES + i: n for i, n in enumerate(sizes[1:])}
    values[BLOCK] = min(max(P_BLOCK, BLOCK_ELEMENTS // sizes[5] // TP * TP), sizes[4])
    values[ROWS] = max(min(BLOCK_ELEMENTS // (values[BLOCK] * sizes[5]), sizes[3]), 1)
    time = size * (x.item + out.item) / BYTES_PER_NANOSECOND
    if way == "elements":
        time = size * ELEMENT_NANOSECONDS
    call.row(
        copy_kernel(x.kind, out.kind, way, widths(sizes[5]) if way == "tiles" else ()),
        C_FIELDS,
        int(np.prod(sizes[:3])) * -(-sizes[3] // values[ROWS]) * -(-sizes[4] // values[BLOCK]),
        values,
        {X: x.place, OUT: out.place},
        time,
    )


def widths(size: int) -> tuple[int, ...]:
    """The widths of TQ that fill the size, the widest first."""
    used = []
    for width in TQ:
        if size >= width:
            used.append(width)
            size %= width
    return tuple(used)


def quantize_row(call: Call, x: View, out: View, scale: float, zero_point: int) -> None:
    """Appends out = reference.quantize(x): float32 of any strides into uint8 values of any, or
    int16 where out is wide."""
    ends = limits(np.dtype(np.int16 if out.kind == "s16" else np.uint8))
    floats = float_parameters(zero_point, *ends, scale)
    ints = int_parameters(zero_point)
    if _lines_match([out, x]):
        pointwise_row(call, "quantize", [out, x], floats, ints, largest=LARGE)
        return
    if not _has_lines(x):
        dense = _scratch(call, x, "f32")
        copy_row(call, x, dense)
        x = dense
    held, order = _scratch(call, x, out.kind), _by_stride(x)
    views = [permuted(held, order), permuted(x, order)]
    pointwise_row(call, "quantize", views, floats, ints, largest=LARGE)
    copy_row(call, held, out)


def dequantize_row(call: Call, x: View, out: View, scale: float, zero_point: int) -> None:
    """Appends out = reference.dequantize(x): uint8 or int16 of any strides into float32 of any."""
    parameters = np.array([0, 0, scale, 0], np.float32), int_parameters(0, zero_point)
    if _lines_match([out, x]):
        pointwise_row(call, "dequantize", [out, x], *parameters)
        return
    held = _scratch(call, out, x.kind)
    copy_row(call, x, held)
    dense = out if _has_lines(out) else _scratch(call, out, "f32")
    order = _by_stride(out)
    pointwise_row(call, "dequantize", [permuted(dense, order), permuted(held, order)], *parameters)
    if dense is not out:
        copy_row(call, dense, out)


def _has_lines(view: View) -> bool:
    """Whether elements lie side by side along some axis, and the others join to three."""
    try:
        collapse([permuted(view, _by_stride(view))], 4)
    except ValueError:
        return False
    return all(n == 1 for n in view.shape) or any(
        n > 1 and stride == view.item for n, stride in zip(view.shape, view.strides, strict=True)
    )


def _lines_match(views: Sequence[View]) -> bool:
    """Whether a pointwise row takes the views as they are."""
    try:
        _, strides = join_lines(views)
    except ValueError:
        return False
    return all(s[-1] == v.item for s, v in zip(strides, views, strict=True))


def _scratch(call: Call, like: View, kind: str) -> View:
    """A dense view in the workspace, its axes in memory in the order of those of `like`."""
    order = _by_stride(like)
    shape = tuple(like.shape[a] for a in order)
    steps = dense_strides(shape, ITEM_BYTES[kind])
    strides = [0] * len(order)
    for axis, step in zip(order, steps, strict=True):
        strides[axis] = step
    place = call.scratch(int(np.prod(shape)) * ITEM_BYTES[kind])
    return View(place, like.shape, tuple(strides), kind)
