"""Bringing activations into the form that the tiles read: quantized, padded, widened, NHWC.

    stage_rows    (M, K) float32 or uint8            -> (M, max(K, 4)) uint8 or int16
    stage_image   (B, H, W, C) float32 or uint8, any strides
                                                     -> (B, HP, WP, CP) uint8 or int16, padded
                  float32 of one scale, or each channel on a grid of its own (reference.grid)
    range_parts   the smallest and the largest finite value of blocks of float32 rows
    range_qparams these -> a row's scale and zero point (ONNX DynamicQuantizeLinear)

Where x's pixels lie side by side (planes: NCHW), vectors of pixels of a few channels are quantized
and interleaved in registers.

The type of the result is that of the tile (`Tile.a_bytes`). Padding is filled with the zero point,
which stands for real 0; columns and channels added to reach 4 meet weights of 0.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

from numba import njit, types
from numba.extending import intrinsic

from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.elementwise import elementwise_line
from fastq.kernels.isa import target_features
from fastq.kernels.lines import (
    ELEMENT,
    LEAST_NORMAL,
    MOST_NORMAL,
    emit_converted,
    emit_divisor,
    emit_interleaved,
    emit_limited,
    emit_line,
    emit_loop,
    emit_quantized,
    emit_quotient,
    emit_triples,
    widest,
)
from fastq.kernels.native import native
from fastq.kernels.scalar import (
    RANGE_BYTES,
    RANGE_LANES,
    divide,
    float_difference,
    grid_step,
    larger,
    pointer,
    quantize_step,
    range_lanes,
    smaller,
    stack_bytes,
)
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    address,
    const,
    f32,
    i8,
    i32,
    i64,
    least,
    load,
    load_valid,
    ptr,
    shuffle,
    splat,
    store,
    store_valid,
    vec,
)
from fastq.qparams import FLT_MAX, FLT_MIN

# the argument blocks; strides in bytes
(R_X, R_ROW, R_K, R_OUT, R_OUT_K, R_SCALE, R_ZERO_POINT, R_FIELDS) = range(8)
(
    I_X, I_XB, I_XH, I_XW, I_XC, I_H, I_W, I_C, I_TOP, I_LEFT,
    I_OUT, I_HP, I_WP, I_CP, I_SCALE, I_ZERO_POINT, I_FIELDS,
) = range(17)  # fmt: skip
(P_X, P_COLUMNS, P_BLOCK, P_PARTS, P_PARTS_A_ROW, P_SCALE, P_ZERO_POINT, P_FIELDS) = range(8)

MANY = 5  # planes whose channels are done group by group
GROUPS, GROUP_PIXELS = (16, 4, 1), 16  # of so many planes at once, and their pixels
SHORT = 8  # elements of a run that is worth a line of vectors
NARROW = (4, 1)  # pixels at once of a line that has fewer than a vector


@njit
def finite_range(address, count):  # type: ignore[no-untyped-def]
    """Smallest and largest of the finite ones of `count` float32 at `address`, and 0."""
    buffer = stack_bytes(RANGE_BYTES)
    steps = count // RANGE_LANES
    range_lanes(address, steps, buffer, buffer + 4 * RANGE_LANES)
    x, lanes = pointer(address, "f32"), pointer(buffer, "f32")
    lo, hi = lanes[0], lanes[RANGE_LANES]
    for i in range(1, RANGE_LANES):
        lo = smaller(lo, lanes[i])
        hi = larger(hi, lanes[RANGE_LANES + i])
    for i in range(steps * RANGE_LANES, count):
        if abs(x[i]) <= FLT_MAX:
            lo = smaller(lo, x[i])
            hi = larger(hi, x[i])
    return lo, hi


@intrinsic(prefer_literal=True)
def _padded_copy(typingctx: Any, target: Any, x: Any, count: Any, out: Any, whole: Any) -> Any:
    """`count` uint8 at x, then zeros, as `whole` elements of the target at out."""
    element, item = ELEMENT[target.literal_value], ITEM_BYTES[target.literal_value]

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        _, x, count, out, whole = values
        x, out = (b.inttoptr(place, ptr) for place in (x, out))
        width = widest()

        def copy(i: Any, width: int) -> None:
            value = emit_converted(b, load(b, vec(i8, width), x, i), element)
            store(b, value, out, b.mul(i, i64(item)))

        def zero(i: Any) -> None:
            store(b, const(element, 0), out, b.mul(i, i64(item)))

        def rest(i: Any) -> None:
            value = load_valid(b, vec(i8, width), address(b, x, i), b.sub(count, i))
            place = address(b, out, b.mul(i, i64(item)))
            store_valid(b, emit_converted(b, value, element), place, b.sub(whole, i))

        if "avx512bw" in target_features():  # has masks: no loop over single elements
            i, _ = emit_loop(b, i64(0), count, width, [], lambda i: copy(i, width))
            emit_loop(b, i, b.add(whole, i64(width - 1)), width, [], rest)
        else:
            emit_line(b, count, copy)
            emit_loop(b, count, whole, 1, [], zero)
        return context.get_dummy_value()

    return types.void(target, *[types.int64] * 4), codegen


@njit
def _range_to_qparams(lo, hi, scale, zero_point, at):  # type: ignore[no-untyped-def]
    """Writes scale[at] and zero_point[at] of the uint8 range [lo, hi] with lo <= 0 <= hi."""
    width = hi - lo
    if width == 0:
        step = divide(1.0, 1.0)
    else:
        step = larger(divide(smaller(width, FLT_MAX), 255.0), FLT_MIN)
    scale[at] = step
    zero_point[at] = quantize_step(-lo, step, 0.0, 255.0)


@njit(inline="always")
def _fill(out, first, last, step, value):  # type: ignore[no-untyped-def]
    for i in range(first, last, step):
        out[i] = value


@functools.cache
def stage_rows_kernel(source: str, target: str) -> Any:
    """source "dynamic" or "static" (float32), or "u8"; target "u8" or "u8x2". A task is a row.

    "dynamic" also writes the row's scale and zero point; "static" reads one of each.
    """
    config = (source, target, sources_digest())
    line, item = ("divide", "f32", target, "cached"), ITEM_BYTES[target]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        k, out_k = args[R_K], args[R_OUT_K]
        scale, zero_point = pointer(args[R_SCALE], "f32"), pointer(args[R_ZERO_POINT], "s32")
        out = pointer(args[R_OUT], config[1])
        for m in range(begin, end):
            row = args[R_X] + m * args[R_ROW]
            at = m * out_k
            if config[0] == "u8":
                _padded_copy(config[1], row, k, args[R_OUT] + at * item, out_k)
            else:
                s = 0
                if config[0] == "dynamic":
                    lo, hi = finite_range(row, k)
                    _range_to_qparams(lo, hi, scale, zero_point, m)
                    s = m
                step, zp = scale[s], zero_point[s]
                lo, hi = float_difference(0, zp), float_difference(255, zp)
                if LEAST_NORMAL <= step <= MOST_NORMAL:
                    elementwise_line(line, row, args[R_OUT] + at * item, k, step, zp, lo, hi)
                else:
                    x = pointer(row, "f32")
                    for i in range(k):
                        out[at + i] = quantize_step(x[i], step, lo, hi) + zp
                _fill(out, at + k, at + out_k, 1, 0)

    return kernel


@intrinsic(prefer_literal=True)
def _planes(
    typingctx: Any,
    config: Any,
    x: Any,
    x_c: Any,
    width: Any,
    out: Any,
    channels: Any,
    line_channels: Any,
    scales: Any,
    zeros: Any,
) -> Any:
    """`width` pixels of planes at x: quantized and interleaved. config is the kernel's."""
    source, target, planes, whole, _ = (t.literal_value for t in config.types)
    signature = types.void(config, *[types.int64] * 8)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        _, x, x_c, width, out, channels, line_channels, scales, zeros = values
        x, out, scales, zeros = (b.inttoptr(place, ptr) for place in (x, out, scales, zeros))
        item = ITEM_BYTES[target]
        step = b.mul(line_channels, i64(item))
        divisor, zero_point = (), i32(0)
        if source == "f32":
            divisor, zero_point = emit_divisor(b, load(b, f32, scales), target), load(b, i32, zeros)
        lo, hi = (b.sitofp(b.sub(i32(end), zero_point), f32) for end in (0, 255))

        def on_grid(x: Any, channel: Any, limited: bool) -> Any:
            factor, shift = (
                splat(b, load(b, f32, place, b.mul(channel, i64(4))), x.type.count)
                for place in (scales, zeros)
            )
            if limited:
                number = b.fcmp_ordered("ord", x, x)
                x = b.select(number, x, const(x.type, 0.0))
            value = b.fadd(b.fmul(x, factor), shift)
            return emit_limited(b, value) if limited else value

        def quantized(channel: Any, i: Any, count: int) -> Any:
            plane = address(b, x, b.mul(channel, x_c))
            value = load(b, vec(f32, count), plane, b.mul(i, i64(4)))
            quotient = partial(emit_quotient, b, value, divisor)
            real = quotient if divisor else partial(on_grid, value, channel)
            return emit_quantized(b, real, lo, hi, zero_point, target, whole=True)

        def pixels(i: Any, channel: Any, group: int, count: int) -> None:
            """`count` pixels of `group` channels."""
            lines = [quantized(b.add(channel, i64(c)), i, count) for c in range(group)]
            place = address(b, out, b.add(b.mul(i, step), b.mul(channel, i64(item))))
            if planes < MANY:
                lines += [const(lines[0].type, 0)] * (whole - group)
                parts = emit_triples(b, lines) if whole == 3 else [emit_interleaved(b, lines)]
                for n, part in enumerate(parts):
                    store(b, part, place, n * count * item)
            else:
                all_lines = emit_interleaved(b, lines)
                for p in range(count):
                    part = shuffle(b, all_lines, all_lines, range(p * group, (p + 1) * group))
                    store(b, part, place, b.mul(step, i64(p)))

        def line(channel: Any, group: int, count: int) -> None:
            def last_again(i: Any) -> None:
                """The pixels from i on, or the last ones of the line."""
                last = b.sub(width, i64(count))
                pixels(least(b, i, last), channel, group, count)

            with b.if_else(b.icmp_signed("<", width, i64(count))) as (narrow, wide):
                with narrow:
                    emit_line(b, width, lambda i, n: pixels(i, channel, group, n), NARROW)
                with wide:
                    emit_loop(b, i64(0), b.add(width, i64(count - 1)), count, [], last_again)

        if 0 < planes < MANY:
            line(i64(0), planes, widest())
        elif planes:
            emit_line(b, channels, lambda c, group: line(c, group, GROUP_PIXELS), GROUPS)
        return context.get_dummy_value()

    return signature, codegen


def interleaved_planes(
    source: str, strides: Sequence[int], channels: int, whole: int
) -> tuple[int, int]:
    """The planes and whole of `stage_image_kernel` for an image of these strides in bytes."""
    if source == "u8" or strides[2] != 4 or strides[3] == 4:
        return 0, 0
    return (channels, whole) if whole < MANY else (MANY, 0)


@functools.cache
def stage_image_kernel(source: str, target: str, planes: int = 0, whole: int = 0) -> Any:
    """source "f32", "u8" or "grid", target "u8" or "u8x2". A task is one padded line of one image.

    "grid" is float32 with a factor and a shift for each channel, instead of one scale and one zero
    point; the padding is what 0 becomes.
    planes, of float32 whose pixels lie side by side: how many channels are interleaved to `whole`
    ones, or MANY and 0.
    """
    config = (source, target, planes, whole, sources_digest())
    line, item = ("divide", "f32", target, "cached"), ITEM_BYTES[target]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        height, width, channels = args[I_H], args[I_W], args[I_C]
        line_pixels, line_channels = args[I_WP], args[I_CP]
        factors, shifts = pointer(args[I_SCALE], "f32"), pointer(args[I_ZERO_POINT], "f32")
        step, zp = factors[0], pointer(args[I_ZERO_POINT], "s32")[0]
        lo, hi = float_difference(0, zp), float_difference(255, zp)
        out = pointer(args[I_OUT], config[1])
        for task in range(begin, end):
            image, y = task // args[I_HP], task % args[I_HP] - args[I_TOP]
            start = task * line_pixels * line_channels
            left, right = args[I_LEFT], args[I_LEFT] + width
            if y < 0 or y >= height:
                left = right = line_pixels
            first, last = start + left * line_channels, start + right * line_channels
            stop = start + line_pixels * line_channels
            if config[0] == "grid":
                for c in range(channels):
                    zero = grid_step(0.0, factors[c], shifts[c])
                    _fill(out, start + c, first, line_channels, zero)
                    _fill(out, last + c, stop, line_channels, zero)
            else:
                _fill(out, start, first, 1, zp)
                _fill(out, last, stop, 1, zp)
            if left == right:
                continue
            source_line = args[I_X] + image * args[I_XB] + y * args[I_XH]
            pixels, run = width, channels
            together = args[I_XW] == channels * args[I_XC] and line_channels == channels
            if config[2]:
                _planes(
                    config, source_line, args[I_XC], width, args[I_OUT] + first * item, channels,
                    line_channels, args[I_SCALE], args[I_ZERO_POINT],
                )  # fmt: skip
                pixels = 0  # they are done
            elif together and config[0] != "grid":
                pixels, run = 1, width * channels  # nothing lies between the pixels
            for w in range(pixels):
                pixel, at = source_line + w * args[I_XW], first + w * line_channels
                if config[0] == "grid":
                    for c in range(run):
                        value = pointer(pixel + c * args[I_XC], "f32")[0]
                        out[at + c] = grid_step(value, factors[c], shifts[c])
                elif config[0] == "u8" and args[I_XC] == 1:
                    _padded_copy(config[1], pixel, run, args[I_OUT] + at * item, run)
                elif config[0] == "u8":
                    for c in range(run):
                        out[at + c] = pointer(pixel + c * args[I_XC], "u8")[0]
                elif args[I_XC] == 4 and run >= SHORT and LEAST_NORMAL <= step <= MOST_NORMAL:
                    place = args[I_OUT] + at * item
                    elementwise_line(line, pixel, place, run, step, zp, lo, hi)
                else:
                    for c in range(run):
                        value = pointer(pixel + c * args[I_XC], "f32")[0]
                        out[at + c] = quantize_step(value, step, lo, hi) + zp
            if channels < line_channels and config[3] == 0:
                for w in range(width):
                    for c in range(channels, line_channels):
                        out[first + w * line_channels + c] = 0

    return kernel


@functools.cache
def range_parts_kernel() -> Any:
    """A task is one block of P_BLOCK values of a row: its smallest and largest, and 0."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018  the digest is part of the cache's key
        parts = pointer(args[P_PARTS], "f32")
        for task in range(begin, end):
            row, part = task // args[P_PARTS_A_ROW], task % args[P_PARTS_A_ROW]
            first = part * args[P_BLOCK]
            count = min(args[P_BLOCK], args[P_COLUMNS] - first)
            address = args[P_X] + 4 * (row * args[P_COLUMNS] + first)
            parts[2 * task], parts[2 * task + 1] = finite_range(address, count)

    return kernel


@functools.cache
def range_qparams_kernel() -> Any:
    """A task is one row: its parts into one scale and zero point."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018  the digest is part of the cache's key
        scale, zero_point = pointer(args[P_SCALE], "f32"), pointer(args[P_ZERO_POINT], "s32")
        values = 2 * args[P_PARTS_A_ROW]
        for row in range(begin, end):
            lo, hi = finite_range(args[P_PARTS] + 4 * row * values, values)
            _range_to_qparams(lo, hi, scale, zero_point, row)

    return kernel
