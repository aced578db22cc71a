"""Group and global response norm: what each channel of each image is multiplied by, from exact
sums, then `affine`.

    sums    SUMS[image, part] = sum(x), sum(low(x * x)), sum(high(x * x)) of each channel, int32
    scales  total, squares = those of all pixels and channels of the group, N elements
            r = 1 / sqrt(max(N * squares - total * total, 0) + EPSILON)      in float64
            A[image, c] = float32(clip(N * (r * Y[c]), +-MAX_FACTOR))
            B[image, c] = float32(Z[c] - total * (r * Y[c]))
    affine  out = requantized((x * A) + B)                                   pointwise.py's

    A response's factors are of the sizes of all channels, and its affine has x - x_zero_point:

            size[c] = sqrt(squares - 2 * x_zero_point * total + N * x_zero_point**2)
            A[image, c] = float32(clip(Y[c] * (size[c] / (mean(size) + EPSILON)) + RESIDUAL))

A part is what one task sums: up to PART_PIXELS pixels, so that a channel's sums stay in int32. The
square of an int16 is summed in two halves of 16 bits; of a uint8 there is no high one.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from math import prod
from typing import Any

import numpy as np
from numba import float32, float64, int64, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels.call import ITEM_BYTES, Call, View, collapse
from fastq.kernels.lines import (
    BLOCK,
    COLUMNS,
    ELEMENT,
    LINES_FIELDS,
    OPERAND_FIELDS,
    ROWS,
    SHAPE_1,
    SHAPE_2,
    SHAPE_3,
    emit_line,
    emit_loop,
    line_address,
    task_lines,
    widest,
)
from fastq.kernels.native import native
from fastq.kernels.norms import NORM_NANOSECONDS, inverse_root
from fastq.kernels.pointwise import (
    float_parameters,
    float_view,
    int_parameters,
    pointwise_row,
)
from fastq.kernels.scalar import pointer
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import address, const, i32, i64, load, ptr, store, vec
from fastq.qparams import MAX_FACTOR

SUMS = LINES_FIELDS
X = SUMS + 1
SUMS_FIELDS = X + OPERAND_FIELDS
(SUMS_OF_PARTS, A, B, Y, Z, EPSILON, PARTS, CHANNELS, GROUPS, COUNT, SCALES_FIELDS) = range(11)
(
    RESPONSE_SUMS,
    FACTORS,
    WEIGHT,
    SIZES,
    NUMBERS,
    RESPONSE_PARTS,
    RESPONSE_CHANNELS,
    RESPONSE_COUNT,
    RESPONSE_ZERO,
    RESPONSE_FIELDS,
) = range(10)  # NUMBERS: EPSILON and RESIDUAL
KINDS_OF_SUMS = 3
PART_PIXELS, FEW_PIXELS = 2**15, 64  # at most, and mostly at least: sums are wider than pixels
SUMS_NANOSECONDS = 0.03  # an element


@intrinsic(prefer_literal=True)
def _channel_sums(
    typingctx: Any, kind: Any, out: Any, x: Any, step: Any, pixels: Any, channels: Any
) -> Any:
    """The sums of `channels` values at x over pixels that lie `step` bytes apart."""
    wide = kind.literal_value == "s16"
    element, item = ELEMENT[kind.literal_value], i64(ITEM_BYTES[kind.literal_value])

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        out, x = (b.inttoptr(v, ptr) for v in values[1:3])
        step, pixels, channels = values[3:]

        def body(c: Any, width: int) -> None:
            ints, first = vec(i32, width), address(b, x, b.mul(c, item))

            def add(pixel: Any, total: Any, low: Any, high: Any) -> list[Any]:
                value = load(b, vec(element, width), first, b.mul(pixel, step))
                value = (b.sext if wide else b.zext)(value, ints)
                square = b.mul(value, value)
                if not wide:
                    return [b.add(total, value), b.add(low, square), high]
                halves = b.and_(square, const(ints, 2**16 - 1)), b.lshr(square, const(ints, 16))
                return [b.add(total, value), *map(b.add, (low, high), halves)]

            _, sums = emit_loop(b, i64(0), pixels, 1, [const(ints, 0)] * KINDS_OF_SUMS, add)
            for n, value in enumerate(sums):
                line = b.add(c, b.mul(channels, i64(n)))
                store(b, value, out, b.mul(line, i64(4)))

        emit_line(b, channels, body, (widest(), 8, 1))
        return context.get_dummy_value()

    return types.void(kind, *[types.int64] * 5), codegen


@functools.cache
def channel_sums_kernel(kind: str) -> Any:
    """kind "u8", "u8x2" or "s16", of x. A task sums the lines of `task_lines`."""
    config = (kind, sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            i, j, row, last, _, count = task_lines(args, task)
            x = line_address(args, X, i, j, row)
            out = args[SUMS] + task * KINDS_OF_SUMS * 4 * count
            _channel_sums(config[0], out, x, args[X + 3], last - row, count)

    return kernel


@functools.cache
def group_scales_kernel() -> Any:
    """A task is one group of one image."""
    config = ("f32", sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        channels, groups, parts = args[CHANNELS], args[GROUPS], args[PARTS]
        width = channels // groups
        y, z = pointer(args[Y], config[0]), pointer(args[Z], config[0])
        n, epsilon = float64(args[COUNT]), pointer(args[EPSILON], "f64")[0]
        for task in range(begin, end):
            image, first = task // groups, task % groups * width
            total, squares = int64(0), int64(0)
            for part in range(image * parts, (image + 1) * parts):
                at = args[SUMS_OF_PARTS] + part * KINDS_OF_SUMS * 4 * channels
                sums = pointer(at, "s32")
                for c in range(first, first + width):
                    total += sums[c]
                    squares += sums[channels + c] + (int64(sums[2 * channels + c]) << 16)
            spread = n * float64(squares) - float64(total) * float64(total)
            root = inverse_root(max(spread, 0.0), epsilon)
            a = pointer(args[A] + 4 * image * channels, config[0])
            b = pointer(args[B] + 4 * image * channels, config[0])
            for c in range(first, first + width):
                factor = root * float64(y[c])
                a[c] = float32(max(min(n * factor, MAX_FACTOR), -MAX_FACTOR))
                b[c] = float32(float64(z[c]) - float64(total) * factor)

    return kernel


@functools.cache
def response_scales_kernel() -> Any:
    """A task is one image."""
    config = ("f32", sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        channels, parts = args[RESPONSE_CHANNELS], args[RESPONSE_PARTS]
        count, zero = args[RESPONSE_COUNT], args[RESPONSE_ZERO]
        numbers, weight = pointer(args[NUMBERS], "f64"), pointer(args[WEIGHT], config[0])
        for image in range(begin, end):
            sizes = pointer(args[SIZES] + 8 * image * channels, "f64")
            whole = 0.0
            for c in range(channels):
                total, squares = int64(0), int64(0)
                for part in range(image * parts, (image + 1) * parts):
                    sums = pointer(args[RESPONSE_SUMS] + part * KINDS_OF_SUMS * 4 * channels, "s32")
                    total += sums[c]
                    squares += sums[channels + c] + (int64(sums[2 * channels + c]) << 16)
                sizes[c] = math.sqrt(float64(squares - 2 * zero * total + count * zero * zero))
                whole += sizes[c]
            mean = whole / float64(channels) + numbers[0]
            factors = pointer(args[FACTORS] + 4 * image * channels, config[0])
            for c in range(channels):
                factor = float64(weight[c]) * (sizes[c] / mean) + numbers[1]
                factors[c] = float32(max(min(factor, MAX_FACTOR), -MAX_FACTOR))

    return kernel


def group_norm_row(
    call: Call,
    x: View,
    out: View,
    groups: int,
    multiplier: NDArray[np.float32],
    shift: NDArray[np.float32],
    epsilon: float,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.group_norm; multiplier and shift are scalars or (C,). out may be x, if of
    its kind. Up to two axes of x between the first and the last may lie apart."""
    size, images = prod(x.shape), x.shape[0]
    if size == 0:
        return
    sums, parts, channels = _sums_row(call, x)
    columns = _columns(channels, multiplier, shift)
    factors = [call.dense((images, *[1] * (len(x.shape) - 2), channels), "f32") for _ in columns]
    count = size // images // groups
    n = float(count)
    call.row(
        group_scales_kernel(), SCALES_FIELDS, images * groups,
        {PARTS: parts, CHANNELS: channels, GROUPS: groups, COUNT: count},
        {SUMS_OF_PARTS: sums.place, A: factors[0].place, B: factors[1].place, Y: columns[0],
         Z: columns[1], EPSILON: np.array([n * n * epsilon])},
        images * parts * channels * NORM_NANOSECONDS,
    )  # fmt: skip
    # a value is under the root of N deviations from the mean, up to the rounding of x * A
    factor, offset = (float(np.abs(column).max()) for column in columns)
    largest = 2 * n**0.5 * factor + factor / epsilon**0.5 / 64 + 2 * offset
    pointwise_row(call, "affine", [out, x, *factors], float_parameters(zero_point, qmin, qmax),
                  int_parameters(zero_point), largest=largest)  # fmt: skip


def global_response_norm_row(
    call: Call,
    x: View,
    out: View,
    multiplier: NDArray[np.float32],
    shift: NDArray[np.float32],
    epsilon: float,
    residual: float = 0.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.global_response_norm; the others as in `group_norm_row`."""
    size, images = prod(x.shape), x.shape[0]
    if size == 0:
        return
    sums, parts, channels = _sums_row(call, x)
    weight, bias = _columns(channels, multiplier, shift)
    factors = call.dense((images, *[1] * (len(x.shape) - 2), channels), "f32")
    sizes = call.dense((images, 2 * channels), "f32")  # float64
    call.row(
        response_scales_kernel(), RESPONSE_FIELDS, images,
        {RESPONSE_PARTS: parts, RESPONSE_CHANNELS: channels, RESPONSE_ZERO: x_zero_point,
         RESPONSE_COUNT: size // images // channels},
        {RESPONSE_SUMS: sums.place, FACTORS: factors.place, WEIGHT: weight, SIZES: sizes.place,
         NUMBERS: np.array([epsilon, residual])},
        images * parts * channels * NORM_NANOSECONDS,
    )  # fmt: skip
    # no channel's share of the mean is over their number
    steps = 2.0 ** (8 if x.kind == "u8" else 16)
    largest = 2 * steps * (channels * float(np.abs(weight).max()) + abs(residual))
    largest += float(np.abs(bias).max())
    ints = int_parameters(zero_point, x_zero_point)
    pointwise_row(call, "affine", [out, x, factors, float_view(bias)],
                  float_parameters(zero_point, qmin, qmax), ints, largest=largest,
                  constants=1)  # fmt: skip


def _sums_row(call: Call, x: View) -> tuple[View, int, int]:
    """The sums of each part, in how many parts each image is summed, and its channels."""
    images = x.shape[0]
    one = replace(x, shape=x.shape[1:], strides=x.strides[1:])
    (rows, pixels, channels), ((row, pixel, _),) = collapse([one], 3, keep=1)
    block = min(max(BLOCK // channels, FEW_PIXELS), pixels, PART_PIXELS)
    parts = rows * -(-pixels // block)
    sums = call.dense((images, parts, KINDS_OF_SUMS, channels), "s32")
    call.row(
        channel_sums_kernel(x.kind), SUMS_FIELDS, images * parts,
        {SHAPE_1: rows, SHAPE_2: pixels, SHAPE_3: channels, ROWS: block, COLUMNS: channels,
         X + 1: x.strides[0], X + 2: row, X + 3: pixel},
        {SUMS: sums.place, X: x.place}, prod(x.shape) * SUMS_NANOSECONDS,
    )  # fmt: skip
    return sums, parts, channels


def _columns(channels: int, *values: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Scalars or (C,) as float32 of each channel, in memory of their own."""
    return [np.array(np.broadcast_to(v, (channels,)), np.float32) for v in values]
