"""softmax, layer norm and RMS norm over the last axis, in integers up to one float32 factor a line.

    softmax      e = TABLE[peak - x], int32, or 0 where MASK is 0; total = sum(e), int64
                 out = requantized(float32(e) * (255 / float32(total))); EMPTY if total is 0
    weights      out = TABLE[peak - x], uint8, or 0 where MASK is 0; EMPTY if it is 0 everywhere
    inverse sum  out = 1 / float32(max(sum(x), 1)), one float32 for a line
    layer_norm   total = sum(x), squares = sum(x * x); d = N * x - total
                 r = float32(1 / sqrt(float64(N * squares - total**2) + EPSILON))
                 out = requantized(((float32(d) * r) * Y) + Z)
    rms_norm     d = N * (x - X_ZERO_POINT); squares = sum((x - X_ZERO_POINT)**2)
                 r = float32(1 / sqrt(float64(N * squares) + EPSILON)); out as above

x and out hold uint8 values as uint8 or int16, the norms' x may hold any of int16; out may be x,
if of its kind. A task is a block of lines, as in lines.py, each of them whole.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import float32, float64, int32, int64, njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels import simd
from fastq.kernels.call import ITEM_BYTES, Call, Place, View, collapse
from fastq.kernels.lines import (
    COLUMNS,
    ELEMENT,
    LINES_FIELDS,
    MAX_BOUNDED,
    OPERAND_FIELDS,
    ROWS,
    broadcast,
    emit_loop,
    line_address,
    share_lines,
    task_lines,
)
from fastq.kernels.native import native
from fastq.kernels.pointwise import line_config, pointwise_line
from fastq.kernels.scalar import divide, pointer, stack_bytes
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import address, const, i32, i64, load, ptr, shuffle, store, vec
from fastq.qparams import MAX_FEATURES, MAX_WIDE_FEATURES, exp_table, weight_table

OUT, X = LINES_FIELDS, LINES_FIELDS + OPERAND_FIELDS
MASK = X + OPERAND_FIELDS
(TABLE, Y, Z, EPSILON, CLAMP, ZERO_POINT, X_ZERO_POINT, EMPTY, FIELDS) = range(
    MASK + OPERAND_FIELDS, MASK + OPERAND_FIELDS + 9
)
LINE_BLOCK = 4 * 1024  # elements of a task, roughly
CHUNK = 1024  # elements of a softmax whose exponentials are held
CHUNK_BYTES = 4 * CHUNK
LANES = 16
SOFTMAX_NANOSECONDS, WEIGHTS_NANOSECONDS, NORM_NANOSECONDS = 0.8, 0.1, 0.3  # an element


def _reduced(b: Any, value: Any, combine: Any) -> Any:
    """The elements of a vector, halved until one is left."""
    while value.type.count > 1:
        half = value.type.count // 2
        parts = (shuffle(b, value, value, range(i * half, (i + 1) * half)) for i in (0, 1))
        value = combine(*parts)
    return b.extract_element(value, i32(0))


@intrinsic(prefer_literal=True)
def _peak(typingctx: Any, kind: Any, masked: Any, x: Any, mask: Any, count: Any) -> Any:
    """The largest of `count` values at x, or of those whose mask is not 0; or 0."""
    element = ELEMENT[kind.literal_value]
    item = i64(ITEM_BYTES[kind.literal_value])

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        x, mask, count = b.inttoptr(values[2], ptr), b.inttoptr(values[3], ptr), values[4]

        def larger(a: Any, c: Any) -> Any:
            return b.select(b.icmp_unsigned(">", a, c), a, c)

        def step(width: int) -> Any:
            kind = vec(element, width)

            def body(i: Any, held: Any) -> list[Any]:
                value = load(b, kind, x, b.mul(i, item))
                if masked.literal_value:
                    taken = b.icmp_unsigned(
                        "!=", load(b, kind, mask, b.mul(i, item)), const(kind, 0)
                    )
                    value = b.select(taken, value, const(kind, 0))
                return [larger(held, value)]

            return body

        i, (held,) = emit_loop(b, i64(0), count, 32, [const(vec(element, 32), 0)], step(32))
        one = b.insert_element(
            ir.Constant(vec(element, 1), ir.Undefined), _reduced(b, held, larger), i32(0)
        )
        _, (held,) = emit_loop(b, i, count, 1, [one], step(1))
        return b.zext(b.extract_element(held, i32(0)), i64)

    return types.int64(kind, masked, types.int64, types.int64, types.int64), codegen


@intrinsic(prefer_literal=True)
def _hide(typingctx: Any, kind: Any, y: Any, mask: Any, count: Any) -> Any:
    """Writes 0 over those of `count` values at y whose mask is 0; not 0 if some were left."""
    element = ELEMENT[kind.literal_value]
    item = i64(ITEM_BYTES[kind.literal_value])

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        y, mask, count = b.inttoptr(values[1], ptr), b.inttoptr(values[2], ptr), values[3]

        def step(width: int) -> Any:
            kind = vec(element, width)

            def body(i: Any, some: Any) -> list[Any]:
                place, offset = address(b, y, b.mul(i, item)), b.mul(i, item)
                taken = load(b, kind, mask, offset)
                hidden = b.icmp_unsigned("==", taken, const(kind, 0))
                store(b, b.select(hidden, const(kind, 0), load(b, kind, place)), place)
                return [b.or_(some, taken)]

            return body

        i, (held,) = emit_loop(b, i64(0), count, 32, [const(vec(element, 32), 0)], step(32))
        some = b.insert_element(
            ir.Constant(vec(element, 1), ir.Undefined), _reduced(b, held, b.or_), i32(0)
        )
        _, (some,) = emit_loop(b, i, count, 1, [some], step(1))
        return b.zext(b.extract_element(some, i32(0)), i64)

    return types.int64(kind, types.int64, types.int64, types.int64), codegen


@njit
def _exponential(masked, table, q, mask, peak, n):  # type: ignore[no-untyped-def]
    """table[peak - q[n]], or 0 where the mask is."""
    if masked:
        value = pointer(table + 4 * (peak - min(peak, int64(q[n]))), "s32")[0]
        return value if mask[n] != 0 else int32(0)
    return pointer(table + 4 * (peak - q[n]), "s32")[0]


@intrinsic(prefer_literal=True)
def _sums(typingctx: Any, kind: Any, x: Any, count: Any) -> Any:
    """The sum of `count` values at x, and that of their squares; up to MAX_FEATURES of them, or
    MAX_WIDE_FEATURES. A square of an int16 is summed in two parts: both sums stay in int32."""
    element, wide = ELEMENT[kind.literal_value], kind.literal_value == "s16"
    item = i64(ITEM_BYTES[kind.literal_value])
    parts = 2 if wide else 1
    result = types.UniTuple(types.int64, 2)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        x, count = b.inttoptr(values[1], ptr), values[2]

        def step(width: int) -> Any:
            ints = vec(i32, width)

            def add(i: Any, total: Any, *squares: Any) -> list[Any]:
                stored = load(b, vec(element, width), x, b.mul(i, item))
                value = (b.sext if wide else b.zext)(stored, ints)
                square = [b.mul(value, value)]
                if wide:
                    low = b.and_(square[0], const(ints, 2**16 - 1))
                    square = [low, b.lshr(square[0], const(ints, 16))]
                return [b.add(total, value), *map(b.add, squares, square)]

            return add

        zeros = [const(vec(i32, LANES), 0)] * (1 + parts)
        i, sums = emit_loop(b, i64(0), count, LANES, zeros, step(LANES))
        zeros = [const(vec(i32, 1), 0)] * (1 + parts)
        _, rest = emit_loop(b, i, count, 1, zeros, step(1))
        totals = []
        for vector, last in zip(sums, rest, strict=True):
            whole = _reduced(b, b.sext(vector, vec(i64, LANES)), b.add)
            totals.append(b.add(whole, b.sext(b.extract_element(last, i32(0)), i64)))
        total, squares, *high = totals
        for part in high:
            squares = b.add(squares, b.shl(part, i64(16)))
        return context.make_tuple(b, result, [total, squares])

    return result(kind, types.int64, types.int64), codegen


@intrinsic
def inverse_root(typingctx: Any, spread: Any, epsilon: Any) -> Any:
    """1 / sqrt(spread + epsilon), each step in float64."""

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        double = ir.DoubleType()
        root = simd.call(b, "llvm.sqrt.f64", double, [b.fadd(*values)])
        return b.fdiv(ir.Constant(double, 1.0), root)

    return types.float64(types.float64, types.float64), codegen


@functools.cache
def softmax_kernel(kind: str, masked: bool) -> Any:
    """kind "u8" or "u8x2", of x, out and, if there is one, the mask."""
    config = (kind, int(masked), sources_digest())
    item = ITEM_BYTES[kind]
    scaled = line_config("scale", (kind, "s32"), (item, 4))

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        count = args[COLUMNS]
        held = stack_bytes(CHUNK_BYTES)
        floats, ints = stack_bytes(16), args[ZERO_POINT]
        e, clamp, factors = (
            pointer(held, "s32"),
            pointer(args[CLAMP], "f32"),
            pointer(floats, "f32"),
        )
        factors[0], factors[1] = clamp[0], clamp[1]
        for task in range(begin, end):
            i, j, row, last, _, _ = task_lines(args, task)
            for line in range(row, last):
                x = line_address(args, X, i, j, line)
                out = line_address(args, OUT, i, j, line)
                hidden = line_address(args, MASK, i, j, line)
                q, mask, table = pointer(x, config[0]), pointer(hidden, config[0]), args[TABLE]
                peak = _peak(config[0], config[1], x, hidden, count)
                total = 0
                for n in range(min(count, CHUNK)):
                    value = _exponential(config[1], table, q, mask, peak, n)
                    e[n] = value
                    total += value
                for n in range(CHUNK, count):
                    total += _exponential(config[1], table, q, mask, peak, n)
                if config[1] and total == 0:
                    values = pointer(out, config[0])
                    for n in range(count):
                        values[n] = args[EMPTY]
                    continue
                factors[2] = divide(255.0, float32(total))
                for first in range(0, count, CHUNK):
                    size = min(CHUNK, count - first)
                    if first:
                        for n in range(size):
                            e[n] = _exponential(config[1], table, q, mask, peak, first + n)
                    to = out + first * item
                    pointwise_line(scaled, to, held, 0, 0, size, floats, ints, ints)

    return kernel


@functools.cache
def weights_kernel(kind: str, masked: bool) -> Any:
    """kind "u8" or "u8x2", of x, out and, if there is one, the mask."""
    config = (kind, int(masked), sources_digest())
    looked_up = line_config("table", (kind, kind), (ITEM_BYTES[kind],) * 2)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        count, floats, ints = args[COLUMNS], stack_bytes(16), args[ZERO_POINT]
        for task in range(begin, end):
            i, j, row, last, _, _ = task_lines(args, task)
            for line in range(row, last):
                x = line_address(args, X, i, j, line)
                out = line_address(args, OUT, i, j, line)
                hidden = line_address(args, MASK, i, j, line)
                peak = _peak(config[0], config[1], x, hidden, count)
                # TABLE runs up to 255 for the largest and stays there
                table = args[TABLE] + 255 - peak
                pointwise_line(looked_up, out, x, 0, 0, count, floats, ints, table)
                if config[1] and _hide(config[0], out, hidden, count) == 0:
                    y = pointer(out, config[0])
                    for n in range(count):
                        y[n] = args[EMPTY]

    return kernel


@functools.cache
def inverse_sums_kernel(kind: str) -> Any:
    """kind "u8" or "u8x2", of x. A line of out is one float32."""
    config = (kind, sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            i, j, row, last, _, _ = task_lines(args, task)
            for line in range(row, last):
                x = line_address(args, X, i, j, line)
                total, _ = _sums(config[0], x, args[COLUMNS])
                out = pointer(line_address(args, OUT, i, j, line), "f32")
                out[0] = divide(1.0, float32(max(total, 1)))

    return kernel


@functools.cache
def layer_norm_kernel(kind: str, target: str, bounded: bool, centered: bool) -> Any:
    """kind of x "u8", "u8x2" or "s16", target of out "u8" or "u8x2"; not centered: rms_norm."""
    config = (kind, int(centered), sources_digest())
    kinds = (target, kind, "f32", "f32")
    steps = tuple(ITEM_BYTES[k] for k in kinds)
    normalized = line_config("normalize", kinds, steps, bounded)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        count, epsilon = args[COLUMNS], pointer(args[EPSILON], "f64")[0]
        floats, ints = stack_bytes(16), stack_bytes(16)
        clamp, factors = pointer(args[CLAMP], "f32"), pointer(floats, "f32")
        zeros = pointer(ints, "s32")
        factors[0], factors[1] = clamp[0], clamp[1]
        zeros[0], zeros[1] = pointer(args[ZERO_POINT], "s32")[0], count
        for task in range(begin, end):
            i, j, row, last, _, _ = task_lines(args, task)
            for line in range(row, last):
                x = line_address(args, X, i, j, line)
                out = line_address(args, OUT, i, j, line)
                total, squares = _sums(config[0], x, count)
                if config[1]:
                    spread = float64(count * squares - total * total)
                else:
                    zero = args[X_ZERO_POINT]
                    squares += zero * (count * zero - 2 * total)
                    spread, total = float64(count * squares), count * zero
                factors[2] = float32(inverse_root(spread, epsilon))
                zeros[2] = total
                pointwise_line(normalized, out, x, args[Y], args[Z], count, floats, ints, ints)

    return kernel


def softmax_row(
    call: Call,
    x: View,
    out: View,
    scale: float,
    uniform: bool = False,
    *,
    mask: View | None = None,
) -> None:
    """Appends reference.softmax; the mask, of x's kind, broadcasts to x. out may be x."""
    places: dict[int, Place] = {TABLE: exp_table(scale)}
    count = x.shape[-1]
    empty = int(np.rint(np.float32(255) / np.float32(count))) if uniform and count else 0
    kernel = softmax_kernel(x.kind, mask is not None)
    _line_row(call, kernel, x, out, places, (0, 0, 255), SOFTMAX_NANOSECONDS,
              mask, {EMPTY: empty})  # fmt: skip


def softmax_weights_row(
    call: Call,
    x: View,
    out: View,
    scale: float,
    uniform: bool = False,
    *,
    mask: View | None = None,
) -> None:
    """Appends reference.softmax_weights; mask and out as for `softmax_row`."""
    rising = weight_table(scale)[::-1]
    places: dict[int, Place] = {TABLE: np.append(rising, np.full(255, 255, np.uint8))}
    kernel = weights_kernel(x.kind, mask is not None)
    _line_row(call, kernel, x, out, places, (0, 0, 255), WEIGHTS_NANOSECONDS,
              mask, {EMPTY: 255 * uniform})  # fmt: skip


def inverse_sums_row(call: Call, x: View, out: View) -> None:
    """Appends out = 1 / float32(max(sum, 1)) of each line of x; out is float32, of the others."""
    per_line = View(out.place, (*out.shape, x.shape[-1]), (*out.strides, 0), out.kind)
    _line_row(call, inverse_sums_kernel(x.kind), x, per_line, {}, (0, 0, 0), WEIGHTS_NANOSECONDS)


def masked_softmax_row(
    call: Call, x: View, mask: View, out: View, scale: float, uniform: bool
) -> None:
    """`softmax_row`, with its views in the order of `ops`."""
    softmax_row(call, x, out, scale, uniform, mask=mask)


def masked_softmax_weights_row(
    call: Call, x: View, mask: View, out: View, scale: float, uniform: bool
) -> None:
    softmax_weights_row(call, x, out, scale, uniform, mask=mask)


def layer_norm_row(
    call: Call,
    x: View,
    out: View,
    multiplier: NDArray[np.float32],
    shift: NDArray[np.float32],
    epsilon: float,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.layer_norm; multiplier and shift are scalars or (N,). out may be x, if of
    its kind."""
    _norm_row(call, x, out, multiplier, shift, epsilon, (zero_point, qmin, qmax))


def rms_norm_row(
    call: Call,
    x: View,
    out: View,
    multiplier: NDArray[np.float32],
    epsilon: float,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.rms_norm; else as `layer_norm_row`."""
    shift = np.zeros((), np.float32)
    clamp = zero_point, qmin, qmax
    _norm_row(call, x, out, multiplier, shift, epsilon, clamp, False, x_zero_point)


def _norm_row(
    call: Call,
    x: View,
    out: View,
    multiplier: NDArray[np.float32],
    shift: NDArray[np.float32],
    epsilon: float,
    clamp: tuple[int, int, int],
    centered: bool = True,
    x_zero_point: int = 0,
) -> None:
    """A layer norm, or what is not centered: an RMS norm."""
    n, name = x.shape[-1], "layer_norm" if centered else "rms_norm"
    if n == 0:
        return
    most = MAX_WIDE_FEATURES if x.kind == "s16" else MAX_FEATURES
    if n > most:
        raise ValueError(f"{name}: {n} features; exact up to {most}")
    columns = [np.array(np.broadcast_to(v, (n,)), np.float32) for v in (multiplier, shift)]
    places: dict[int, Place] = {
        Y: columns[0],
        Z: columns[1],
        EPSILON: np.array([float(n) * float(n) * epsilon]),
    }
    # |d * r| is under the root of N, up to rounding
    largest = 2 * n**0.5 * np.abs(columns[0]).max() + np.abs(columns[1]).max()
    kernel = layer_norm_kernel(x.kind, out.kind, bool(largest <= MAX_BOUNDED), centered)
    _line_row(call, kernel, x, out, places, clamp, NORM_NANOSECONDS,
              values={X_ZERO_POINT: x_zero_point})  # fmt: skip


def _line_row(
    call: Call,
    kernel: Any,
    x: View,
    out: View,
    places: dict[int, Place],
    clamp: tuple[int, int, int],
    nanoseconds: float,
    mask: View | None = None,
    values: dict[int, int] | None = None,
) -> None:
    """Appends a kernel that takes whole lines; clamp is (zero_point, qmin, qmax), and `values` are
    fields of its own."""
    views = [out, x, *([] if mask is None else [broadcast(mask, x.shape)])]
    shape, steps = collapse(views, 4, keep=1)
    size = int(np.prod(shape))
    if size == 0:
        return
    zero_point, qmin, qmax = clamp
    values = share_lines(shape)[1] | {COLUMNS: shape[3]} | (values or {})
    values[ROWS] = min(max(LINE_BLOCK // shape[3], 1), shape[2])
    for operand, view, along in zip((OUT, X, MASK), views, steps, strict=False):
        places[operand] = view.place
        values |= {operand + 1 + axis: along[axis] for axis in range(3)}
    places |= {
        CLAMP: np.array([qmin - zero_point, qmax - zero_point], np.float32),
        ZERO_POINT: np.array([zero_point, 0, 0], np.int32),
    }
    tasks = shape[0] * shape[1] * -(-shape[2] // values[ROWS])
    call.row(kernel, FIELDS, tasks, values, places, size * nanoseconds)
