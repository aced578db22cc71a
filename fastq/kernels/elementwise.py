"""quantize, dequantize, requantize of whole arrays: lines of vectors, or plain loops over blocks.

An array is seen as (rows, columns). The parameters are one for all ("tensor"; A_SCALE holds the
scale's bits and A_ZERO_POINT the integer, elsewhere they hold addresses), one per row, repeating
after `A_PARAMS` rows ("row"), or one per column ("column").

A task is one block of `A_BLOCK` columns of one row. Dequantizing reads, and quantizing writes,
uint8, int8, int16 ("s16") or int32.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import float32, float64, int32, int64, types
from numba.extending import intrinsic

from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.lines import (
    ELEMENT,
    LARGE,
    LEAST_NORMAL,
    MOST_NORMAL,
    WIDE_LARGE,
    emit_aligned_line,
    emit_divisor,
    emit_limited,
    emit_quantized,
    emit_quotient,
)
from fastq.kernels.native import native
from fastq.kernels.scalar import (
    divide,
    float_difference,
    float_of,
    multiply_step,
    pointer,
    quantize_step,
    rint_f64,
)
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    AHEAD,
    CACHE_LINE,
    const,
    f32,
    i32,
    i64,
    load,
    prefetch,
    ptr,
    splat,
    store,
    stream,
    vec,
)

(
    A_X, A_OUT, A_ROWS, A_COLUMNS, A_BLOCK, A_PARAMS, A_SCALE, A_ZERO_POINT, A_QMIN, A_QMAX,
    A_FIELDS,
) = range(11)  # fmt: skip


def has_lines(operation: str, source: str, target: str) -> bool:
    """Whether `elementwise_line` computes it."""
    return source != "s32" if operation == "dequantize" else target != "s32"


@intrinsic(prefer_literal=True)
def elementwise_line(
    typingctx: Any,
    config: Any,
    x: Any,
    out: Any,
    count: Any,
    step: Any,
    zero_point: Any,
    lo: Any,
    hi: Any,
) -> Any:
    """`count` elements with one scale and zero point; config begins with elementwise_kernel's
    operation, source, target and stores.

    lo and hi are qmin and qmax less the zero point. To divide, step is within LEAST_NORMAL and
    MOST_NORMAL.
    """
    operation, source, target, stores = (t.literal_value for t in config.types[:4])
    numbers = [types.float32, types.int32, types.float32, types.float32]
    signature = types.void(config, *[types.int64] * 3, *numbers)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        x, out, count, step, zero_point, lo, hi = values[1:]
        x, out = (b.inttoptr(place, ptr) for place in (x, out))
        divisor = emit_divisor(b, step, target, normal=True) if operation == "divide" else ()
        signed = source in ("s8", "s16")
        most = WIDE_LARGE if target == "s16" else LARGE
        if target == "s8":  # uint8 with the upper half of the range turned round
            zero_point = b.add(zero_point, i32(128))

        def put(value: Any, i: Any, item: int, aligned: bool) -> None:
            align = min(CACHE_LINE, value.type.count * item) if aligned else 1
            stored = store(b, value, out, b.mul(i, i64(item)), align)
            if aligned and stores == "streamed":
                stream(b, stored)

        def body(i: Any, width: int, aligned: bool) -> None:
            floats_of, ints_of = vec(f32, width), vec(i32, width)
            at = b.mul(i, i64(ITEM_BYTES[source]))
            if aligned:
                prefetch(b, x, b.add(at, i64(AHEAD)), width * ITEM_BYTES[source])
            value = load(b, vec(ELEMENT[source], width), x, at)
            if operation == "dequantize":
                value = (b.sext if signed else b.zext)(value, ints_of)
                value = b.sub(value, splat(b, zero_point, width))
                value = b.fmul(b.sitofp(value, floats_of), splat(b, step, width))
                put(value, i, 4, aligned)
                return
            value = b.sitofp(value, floats_of) if source == "s32" else value

            def real(limited: bool) -> Any:
                if operation == "divide":
                    return emit_quotient(b, value, divisor, limited)
                product = b.fmul(value, splat(b, step, width))
                return emit_limited(b, product, const(product.type, most)) if limited else product

            whole = operation == "divide"  # to multiply may be to requantize, which has a clamp
            q = emit_quantized(b, real, lo, hi, zero_point, target, whole)
            if target == "s8":
                q = b.xor(q, const(q.type, -128))
            put(q, i, ITEM_BYTES[target], aligned)

        emit_aligned_line(b, count, out, ITEM_BYTES[target], body)
        if stores == "streamed":
            b.fence("seq_cst")
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def elementwise_kernel(operation: str, source: str, target: str, stores: str, layout: str) -> Any:
    """operation "divide" (quantize), "multiply" (quantize by a factor, requantize), "dequantize".

    source and target are keys of scalar.KINDS; stores "cached", or "streamed" for an output
    that the cache cannot hold; layout "tensor", "row" or "column".
    """
    config = (operation, source, target, stores, layout, sources_digest())
    lines = layout != "column" and has_lines(operation, source, target)
    source_item, target_item = ITEM_BYTES[source], ITEM_BYTES[target]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        columns = args[A_COLUMNS]
        blocks = (columns + args[A_BLOCK] - 1) // args[A_BLOCK]
        x, out = pointer(args[A_X], config[1]), pointer(args[A_OUT], config[2])
        scale, zero_point = pointer(args[A_SCALE], "f32"), pointer(args[A_ZERO_POINT], "s32")
        qmin, qmax = args[A_QMIN], args[A_QMAX]
        for task in range(begin, end):
            row = task // blocks
            first = task % blocks * args[A_BLOCK]
            last = min(first + args[A_BLOCK], columns)
            at = row * columns
            p = 0
            if config[4] == "row":
                p = row % args[A_PARAMS]
            if config[4] == "tensor":
                step, zp = float_of(args[A_SCALE]), int32(args[A_ZERO_POINT])
            else:
                step, zp = scale[p], zero_point[p]
            lo, hi = float_difference(qmin, zp), float_difference(qmax, zp)
            if lines and (config[0] != "divide" or LEAST_NORMAL <= step <= MOST_NORMAL):
                elementwise_line(
                    config, args[A_X] + (at + first) * source_item,
                    args[A_OUT] + (at + first) * target_item, last - first, step, zp, lo, hi,
                )  # fmt: skip
                continue
            for i in range(first, last):
                if config[4] == "column":
                    step, zp = scale[i], zero_point[i]
                    lo, hi = float_difference(qmin, zp), float_difference(qmax, zp)
                if config[0] == "dequantize":
                    if config[1] == "s32":
                        out[at + i] = float32(int64(x[at + i]) - zp) * step
                    else:
                        out[at + i] = float_difference(x[at + i], zp) * step
                elif config[2] == "s32":  # beyond float32's integers: round in float64
                    if config[0] == "divide":
                        real = float64(divide(x[at + i], step))
                    else:
                        real = float64(float32(x[at + i]) * step)
                    if real != real:
                        real = 0.0
                    real = rint_f64(real)
                    out[at + i] = int64(max(min(real, float64(qmax - zp)), float64(qmin - zp))) + zp
                elif config[0] == "divide":
                    out[at + i] = quantize_step(x[at + i], step, lo, hi) + zp
                else:
                    out[at + i] = multiply_step(float32(x[at + i]), step, lo, hi) + zp

    return kernel
