"""Bringing activations into the form that the tiles read: quantized, padded, widened, NHWC.

    stage_rows    (M, K) float32 or uint8            -> (M, max(K, 4)) uint8 or int16
    stage_image   (B, H, W, C) float32 or uint8, any strides
                                                     -> (B, HP, WP, CP) uint8 or int16, padded
    range_parts   the smallest and the largest finite value of blocks of float32 rows
    range_qparams these -> a row's scale and zero point (ONNX DynamicQuantizeLinear)

The type of the result is that of the tile (`Tile.a_bytes`). Padding is filled with the zero point,
which stands for real 0; columns and channels added to reach 4 meet weights of 0.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import njit

from fastq.kernels.native import native
from fastq.kernels.scalar import (
    RANGE_BYTES,
    RANGE_LANES,
    divide,
    float_difference,
    larger,
    pointer,
    quantize_step,
    range_lanes,
    smaller,
    stack_bytes,
)
from fastq.kernels.signature import sources_digest
from fastq.qparams import FLT_MAX, FLT_MIN

# the argument blocks; strides in bytes
(R_X, R_ROW, R_K, R_OUT, R_OUT_K, R_SCALE, R_ZERO_POINT, R_FIELDS) = range(8)
(
    I_X, I_XB, I_XH, I_XW, I_XC, I_H, I_W, I_C, I_TOP, I_LEFT,
    I_OUT, I_HP, I_WP, I_CP, I_SCALE, I_ZERO_POINT, I_FIELDS,
) = range(17)  # fmt: skip
(P_X, P_COLUMNS, P_BLOCK, P_PARTS, P_PARTS_A_ROW, P_SCALE, P_ZERO_POINT, P_FIELDS) = range(8)

STRIP = 512  # pixels of a strip that is quantized before it is spread over the channels


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


@functools.cache
def stage_rows_kernel(source: str, target: str) -> Any:
    """source "dynamic" or "static" (float32), or "u8"; target "u8" or "s16". A task is a row.

    "dynamic" also writes the row's scale and zero point; "static" reads one of each.
    """
    config = (source, target, sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        k, out_k = args[R_K], args[R_OUT_K]
        scale, zero_point = pointer(args[R_SCALE], "f32"), pointer(args[R_ZERO_POINT], "s32")
        out = pointer(args[R_OUT], config[1])
        for m in range(begin, end):
            row = args[R_X] + m * args[R_ROW]
            at = m * out_k
            if config[0] == "u8":
                q = pointer(row, "u8")
                for i in range(k):
                    out[at + i] = q[i]
            else:
                x = pointer(row, "f32")
                s = 0
                if config[0] == "dynamic":
                    lo, hi = finite_range(row, k)
                    _range_to_qparams(lo, hi, scale, zero_point, m)
                    s = m
                step, zp = scale[s], zero_point[s]
                lo, hi = float_difference(0, zp), float_difference(255, zp)
                for i in range(k):
                    out[at + i] = quantize_step(x[i], step, lo, hi) + zp
            for i in range(k, out_k):
                out[at + i] = 0

    return kernel


@functools.cache
def stage_image_kernel(source: str, target: str) -> Any:
    """source "f32" or "u8", target "u8" or "s16". A task is one padded line of one image."""
    config = (source, target, sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        height, width, channels = args[I_H], args[I_W], args[I_C]
        line_pixels, line_channels = args[I_WP], args[I_CP]
        zp = pointer(args[I_ZERO_POINT], "s32")[0]
        step = pointer(args[I_SCALE], "f32")[0]
        lo, hi = float_difference(0, zp), float_difference(255, zp)
        out = pointer(args[I_OUT], config[1])
        strip = pointer(stack_bytes(STRIP), "u8")
        for task in range(begin, end):
            image, y = task // args[I_HP], task % args[I_HP] - args[I_TOP]
            line = task * line_pixels * line_channels
            left, right = args[I_LEFT], args[I_LEFT] + width
            if y < 0 or y >= height:
                left = right = line_pixels
            for i in range(line, line + left * line_channels):
                out[i] = zp
            for i in range(line + right * line_channels, line + line_pixels * line_channels):
                out[i] = zp
            if left == right:
                continue
            source_line = args[I_X] + image * args[I_XB] + y * args[I_XH]
            first = line + left * line_channels
            if config[0] == "f32" and args[I_XC] != 4 and args[I_XW] == 4:
                # planes (NCHW): quantize a strip of one channel, then spread it
                for c in range(channels):
                    for w0 in range(0, width, STRIP):
                        count = min(STRIP, width - w0)
                        x = pointer(source_line + c * args[I_XC] + w0 * 4, "f32")
                        for w in range(count):
                            strip[w] = quantize_step(x[w], step, lo, hi) + zp
                        at = first + w0 * line_channels + c
                        for w in range(count):
                            out[at + w * line_channels] = strip[w]
            else:
                pixels, run = width, channels
                if args[I_XW] == channels * args[I_XC] and line_channels == channels:
                    pixels, run = 1, width * channels  # nothing lies between the pixels
                for w in range(pixels):
                    pixel = source_line + w * args[I_XW]
                    at = first + w * line_channels
                    if config[0] == "u8":
                        if args[I_XC] == 1:
                            q = pointer(pixel, "u8")
                            for c in range(run):
                                out[at + c] = q[c]
                        else:
                            for c in range(run):
                                out[at + c] = pointer(pixel + c * args[I_XC], "u8")[0]
                    elif args[I_XC] == 4:
                        x = pointer(pixel, "f32")
                        for c in range(run):
                            out[at + c] = quantize_step(x[c], step, lo, hi) + zp
                    else:
                        for c in range(run):
                            value = pointer(pixel + c * args[I_XC], "f32")[0]
                            out[at + c] = quantize_step(value, step, lo, hi) + zp
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
