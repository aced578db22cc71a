"""Scalar building blocks of the plain-loop kernels; LLVM turns the loops into vector code.

They are LLVM IR where Numba's own operators would add checks (division by zero) or calls (rint).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastq.kernels.simd import call, clamp, const, f32, i8, i32, i64, load, ptr, store, vec
from fastq.qparams import FLT_MAX

KINDS = {
    "f64": types.float64,
    "f32": types.float32,
    "s32": types.int32,
    "s64": types.int64,
    "u32": types.uint32,
    "u8x2": types.int16,
    "s16": types.int16,
    "u8": types.uint8,
    "s8": types.int8,
}


@intrinsic(prefer_literal=True)
def pointer(typingctx: Any, address: Any, kind: Any) -> Any:
    """The address as a typed pointer, to be indexed; kind is a key of KINDS."""
    result = types.CPointer(KINDS[kind.literal_value])

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.inttoptr(values[0], context.get_value_type(result))

    return result(types.int64, kind), codegen


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 whose bits are the lower 32 of an int64."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.bitcast(builder.trunc(values[0], i32), f32)

    return types.float32(types.int64), codegen


def _step(builder: Any, x: Any, lo: Any, hi: Any) -> Any:
    """int32(rint(clamp(x, lo, hi))), ties to even; NaN gives 0."""
    x = builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(f32, 0.0), x)
    return call(builder, "llvm.lrint.i32.f32", i32, [clamp(builder, x, lo, hi)])


@intrinsic
def float_difference(typingctx: Any, x: Any, y: Any) -> Any:
    """float32(x - y) of int32; the difference must fit."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.sitofp(builder.sub(*values), f32)

    return types.float32(types.int32, types.int32), codegen


@intrinsic
def quantize_step(typingctx: Any, x: Any, scale: Any, lo: Any, hi: Any) -> Any:
    """int32(rint(clamp(x / scale, lo, hi))), ties to even; NaN gives 0. lo and hi are integers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, scale, lo, hi = values
        return _step(builder, builder.fdiv(x, scale), lo, hi)

    return types.int32(types.float32, types.float32, types.float32, types.float32), codegen


@intrinsic
def multiply_step(typingctx: Any, x: Any, factor: Any, lo: Any, hi: Any) -> Any:
    """int32(rint(clamp(x * factor, lo, hi))), ties to even; NaN gives 0. lo and hi are integers."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, factor, lo, hi = values
        return _step(builder, builder.fmul(x, factor), lo, hi)

    return types.int32(types.float32, types.float32, types.float32, types.float32), codegen


@intrinsic
def grid_step(typingctx: Any, x: Any, factor: Any, shift: Any) -> Any:
    """int32(rint(clamp(x * factor + shift, 0, 255))), ties to even; of NaN that of 0."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, factor, shift = values
        x = builder.select(builder.fcmp_unordered("uno", x, x), ir.Constant(f32, 0.0), x)
        value = builder.fadd(builder.fmul(x, factor), shift)
        return _step(builder, value, ir.Constant(f32, 0.0), ir.Constant(f32, 255.0))

    return types.int32(types.float32, types.float32, types.float32), codegen


@intrinsic
def rint_f64(typingctx: Any, x: Any) -> Any:
    """rint of a float64, ties to even."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return call(builder, "llvm.rint.f64", ir.DoubleType(), [values[0]])

    return types.float64(types.float64), codegen


@intrinsic
def divide(typingctx: Any, x: Any, y: Any) -> Any:
    """x / y in float32 without Numba's check for zero."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.fdiv(*values)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def smaller(typingctx: Any, x: Any, y: Any) -> Any:
    """The smaller of two float32 numbers (no NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, y = values
        return builder.select(builder.fcmp_ordered("<", x, y), x, y)

    return types.float32(types.float32, types.float32), codegen


@intrinsic
def larger(typingctx: Any, x: Any, y: Any) -> Any:
    """The larger of two float32 numbers (no NaN)."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        x, y = values
        return builder.select(builder.fcmp_ordered(">", x, y), x, y)

    return types.float32(types.float32, types.float32), codegen


RANGE_LANES = 32
RANGE_BYTES = 8 * RANGE_LANES  # the smallest and the largest of each lane


@intrinsic
def range_lanes(typingctx: Any, x: Any, steps: Any, lo: Any, hi: Any) -> Any:
    """Per lane, the smallest and largest finite value, and 0, of steps * RANGE_LANES float32 at x.

    Written to the addresses lo and hi, RANGE_LANES float32 each. Vector code by hand: LLVM does
    not vectorize a minimum that must be exact.
    """

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        x, steps, lo, hi = values
        kind = vec(f32, RANGE_LANES)
        zero = const(kind, 0.0)
        base = b.inttoptr(x, ptr)
        entry = b.block
        loop, body, done = (b.append_basic_block(n) for n in ("range", "range.body", "range.done"))
        b.branch(loop)
        b.position_at_end(loop)
        step, smallest, largest = b.phi(i64), b.phi(kind), b.phi(kind)
        b.cbranch(b.icmp_signed("<", step, steps), body, done)
        b.position_at_end(body)
        v = load(b, kind, base, b.mul(step, i64(4 * RANGE_LANES)))
        finite = b.fcmp_ordered(
            "<=", call(b, f"llvm.fabs.v{RANGE_LANES}f32", kind, [v]), const(kind, FLT_MAX)
        )
        v = b.select(finite, v, zero)
        down = b.select(b.fcmp_ordered("<", v, smallest), v, smallest)
        up = b.select(b.fcmp_ordered(">", v, largest), v, largest)
        following = b.add(step, i64(1))
        b.branch(loop)
        for phi, first, later in (
            (step, i64(0), following),
            (smallest, zero, down),
            (largest, zero, up),
        ):
            phi.add_incoming(first, entry)
            phi.add_incoming(later, body)
        b.position_at_end(done)
        store(b, smallest, b.inttoptr(lo, ptr))
        store(b, largest, b.inttoptr(hi, ptr))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def stack_bytes(typingctx: Any, count: Any) -> Any:
    """The address of `count` (a literal) bytes on the kernel's stack, the same at each use."""
    size = count.literal_value

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        with builder.goto_entry_block():
            buffer = builder.alloca(ir.ArrayType(i8, size))
            buffer.align = 64
        return builder.ptrtoint(buffer, i64)

    return types.int64(count), codegen
