"""One element at a time: out[i] = f(x[i], y[i], z[i]) over views, in place if wanted.

    add         ((x - zx) * m0) + ((y - zy) * m1)          requantized
    multiply    ((x - zx) * (y - zy)) * m0                 requantized
    affine      ((x - zx) * y) + z                         requantized; y and z are float32
    normalize   (((x * zx - zy) * m0) * y) + z             requantized; y and z are float32
    scale       x * m0                                     requantized; x is int32
    quantize    x / m0                                     requantized; x is float32, NaN gives 0
    dequantize  float32(x - zx) * m0
    copy        x
    fill        zp
    table       TABLE[x]
    tables      y[x]                                       y is the address of a table of 256

    requantized(v) = int(rint(clamp(v, lo, hi))) + zp, with (lo, hi) = (qmin, qmax) - zp

Differences are exact in float32; each further operation rounds once, in the order written. "u8" is
uint8, "u8x2" holds uint8 values, "s16" those of int16. The parameters are float32 FLOATS = lo, hi,
m0, m1 and int32 INTS = zp, zx, zy. Which element meets which: lines.py.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastq.kernels.call import ITEM_BYTES, Call, Place, View, dense_strides
from fastq.kernels.isa import target_features
from fastq.kernels.lines import (
    ELEMENT,
    LINES_FIELDS,
    MAX_BOUNDED,
    OPERAND_FIELDS,
    broadcast,
    emit_converted,
    emit_divisor,
    emit_line,
    emit_quantized,
    emit_quotient,
    emit_rounded,
    join_lines,
    joint_lines,
    line_address,
    share_lines,
    task_lines,
)
from fastq.kernels.lookup import emit_lookup, load_table, lookup_widths
from fastq.kernels.native import native
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    address,
    f32,
    i8,
    i32,
    i64,
    load,
    ptr,
    splat,
    store,
    vec,
)
from fastq.kernels.tiles import BYTES_PER_NANOSECOND

OUT, X, Y, Z, FLOATS = range(LINES_FIELDS, LINES_FIELDS + 4 * OPERAND_FIELDS + 1, OPERAND_FIELDS)
REQUANTIZED = ("add", "multiply", "affine", "normalize", "scale")  # and "quantize", in its own way
INTS, TABLE, FIELDS = FLOATS + 1, FLOATS + 2, FLOATS + 3


def emit_pointwise(
    b: Any,
    operation: str,
    kinds: Sequence[str],
    steps: Sequence[int],
    lookup: str,
    bounded: bool,
    places: Sequence[Any],
    count: Any,
    floats: Any,
    ints: Any,
    table: Any,
) -> None:
    """Emits one line of `count` elements; kinds, steps (bytes), places (pointers): out first."""
    lo, hi, *factors = (load(b, f32, floats, 4 * i) for i in range(4))
    zp, *zeros = (load(b, i32, ints, 4 * i) for i in range(3))
    once = [
        load(b, ELEMENT[kind], place) if step == 0 else None
        for kind, step, place in zip(kinds, steps, places, strict=True)
    ]
    divisor = emit_divisor(b, factors[0], kinds[0]) if operation == "quantize" else ()
    rows = load_table(b, lookup, table) if operation == "table" else []
    element = ELEMENT[kinds[0]]

    def body(i: Any, width: int) -> None:
        ints_of, floats_of = vec(i32, width), vec(f32, width)

        def operand(n: int) -> Any:
            kind = ELEMENT[kinds[n]]
            if once[n] is not None:
                return splat(b, once[n], width)
            return load(b, vec(kind, width), places[n], b.mul(i, i64(steps[n])))

        def same(scalar: Any) -> Any:
            return splat(b, scalar, width)

        def whole(n: int) -> Any:
            value = operand(n)
            if value.type.element == i32:
                return value
            return (b.sext if kinds[n] == "s16" else b.zext)(value, ints_of)

        def real(value: Any) -> Any:
            return b.sitofp(value, floats_of)

        def difference(n: int) -> Any:
            return real(b.sub(whole(n), same(zeros[n - 1])))

        match operation:
            case "add":
                terms = [b.fmul(difference(n), same(factors[n - 1])) for n in (1, 2)]
                value = b.fadd(*terms)
            case "multiply":  # exact before the factor: under 2**16
                value = b.fmul(b.fmul(difference(1), difference(2)), same(factors[0]))
            case "affine":
                value = b.fadd(b.fmul(difference(1), operand(2)), operand(3))
            case "normalize":
                spread = b.sub(b.mul(whole(1), same(zeros[0])), same(zeros[1]))
                value = b.fmul(real(spread), same(factors[0]))
                value = b.fadd(b.fmul(value, operand(2)), operand(3))
            case "scale":
                value = b.fmul(real(whole(1)), same(factors[0]))
            case "quantize":
                quotient = partial(emit_quotient, b, operand(1), divisor)
                value = emit_quantized(b, quotient, lo, hi, zp, kinds[0], whole=False)
            case "dequantize":
                store(b, b.fmul(difference(1), same(factors[0])), places[0], b.mul(i, i64(4)))
                return
            case "copy":
                value = operand(1)
            case "fill":
                value = same(zp)
            case "table":
                value = emit_lookup(b, lookup, rows, table, operand(1))
            case "tables":
                entry = b.zext(b.extract_element(operand(1), i32(0)), i64)
                own = address(b, places[2], b.mul(i, i64(steps[2])))
                value = splat(b, load(b, i8, own, entry), 1)
        if operation in REQUANTIZED:
            value = emit_rounded(b, value, lo, hi, zp, kinds[0], bounded)
        value = emit_converted(b, value, element)
        store(b, value, places[0], b.mul(i, i64(ITEM_BYTES[kinds[0]])))

    if operation == "tables":
        emit_line(b, count, body, (1,))
    elif operation == "table":
        emit_line(b, count, body, lookup_widths(lookup))
    else:
        emit_line(b, count, body)


@intrinsic(prefer_literal=True)
def pointwise_line(
    typingctx: Any,
    config: Any,
    out: Any,
    x: Any,
    y: Any,
    z: Any,
    count: Any,
    floats: Any,
    ints: Any,
    table: Any,
) -> Any:
    """One line at these addresses. config is `line_config`'s."""
    operation, lookup, bounded, *operands = (t.literal_value for t in config.types)
    kinds, steps = operands[:4], operands[4:8]
    signature = types.void(config, *[types.int64] * 8)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        places = [b.inttoptr(v, ptr) for v in values[1:5]]
        used = sum(kind != "" for kind in kinds)
        parameters = [b.inttoptr(v, ptr) for v in values[6:9]]
        emit_pointwise(
            b, operation, kinds[:used], steps[:used], lookup, bool(bounded), places[:used],
            values[5], *parameters,
        )  # fmt: skip
        return context.get_dummy_value()

    return signature, codegen


def line_config(
    operation: str, kinds: Sequence[str], steps: Sequence[int], bounded: bool = True
) -> tuple[Any, ...]:
    """The config of `pointwise_line`: what it is compiled for.

    kinds and steps (bytes) are the operands', the output first. bounded: see emit_rounded.
    """
    lookup = choose_lookup() if operation == "table" else ""
    operands = (*kinds, *[""] * (4 - len(kinds)), *steps, *[0] * (4 - len(steps)))
    return (operation, lookup, int(bounded), *operands, sources_digest())


def choose_lookup() -> str:
    """How a table of 256 bytes is read on the CPU that Numba compiles for."""
    for feature in ("avx512vbmi", "avx2", "neon"):
        if feature in target_features():
            return feature
    return "scalar"


@functools.cache
def pointwise_kernel(
    operation: str, kinds: tuple[str, ...], steps: tuple[int, ...], bounded: bool
) -> Any:
    """kinds are the operands', the output first; steps their strides along a line in bytes."""
    config = line_config(operation, kinds, steps, bounded)
    out_step, x_step, y_step, z_step = config[7:11]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            i, j, row, last, column, count = task_lines(args, task)
            out = line_address(args, OUT, i, j, row) + column * out_step
            x = line_address(args, X, i, j, row) + column * x_step
            y = line_address(args, Y, i, j, row) + column * y_step
            z = line_address(args, Z, i, j, row) + column * z_step
            for _ in range(row, last):
                pointwise_line(config, out, x, y, z, count, args[FLOATS], args[INTS], args[TABLE])
                out += args[OUT + 3]
                x += args[X + 3]
                y += args[Y + 3]
                z += args[Z + 3]

    return kernel


def float_parameters(zero_point: int, qmin: int, qmax: int, *factors: float) -> NDArray[np.float32]:
    """FLOATS of a requantizing operation."""
    return np.array([qmin - zero_point, qmax - zero_point, *factors, 0, 0][:4], np.float32)


def int_parameters(zero_point: int, *others: int) -> NDArray[np.int32]:
    """INTS."""
    return np.array([zero_point, *others, 0, 0][:3], np.int32)


NO_FLOATS, NO_INTS = np.zeros(4, np.float32), np.zeros(3, np.int32)


def pointwise_row(
    call: Call,
    operation: str,
    views: Sequence[View],
    floats: NDArray[np.float32] = NO_FLOATS,
    ints: NDArray[np.int32] = NO_INTS,
    table: Place | None = None,
    largest: float = 0.0,
    constants: int = 0,
) -> None:
    """Appends the row of an operation; the views broadcast to the first, the output.

    largest is what no value exceeds before it is rounded; the arrays of the last `constants` views
    do not change.
    """
    views = [broadcast(view, views[0].shape) for view in views]
    shape, strides = join_lines(views)
    views = [replace(v, shape=shape, strides=s) for v, s in zip(views, strides, strict=True)]
    if operation != "copy":
        views = _lengthened(call, views, constants)
    shape, strides = views[0].shape, [view.strides for view in views]
    tasks, values = share_lines(shape)
    if tasks == 0:
        return
    kinds = tuple(view.kind for view in views)
    steps_along = tuple(s[-1] for s in strides)
    kernel = pointwise_kernel(operation, kinds, steps_along, largest <= MAX_BOUNDED)
    places: dict[int, Place] = {FLOATS: floats, INTS: ints}
    if table is not None:
        places[TABLE] = table
    for field, view, steps in zip((OUT, X, Y, Z), views, strides, strict=False):
        places[field] = view.place
        values |= {field + 1 + axis: steps[axis] for axis in range(3)}
    bytes_a_step = sum(view.item for view in views)
    time = float(np.prod(shape)) * bytes_a_step / BYTES_PER_NANOSECOND
    call.row(kernel, FIELDS, tasks, values, places, time)


def _lengthened(call: Call, views: list[View], constants: int) -> list[View]:
    """The views with `joint_lines` of their lines as one: vectors of channels are repeated."""
    together = joint_lines(views)
    if together == 1:
        return views
    results = []
    for n, view in enumerate(views):
        (*outer, lines, columns), (*steps, step, item) = view.shape, view.strides
        place = view.place
        if step == 0 and item:  # the same on all lines
            sizes = [size if step else 1 for size, step in zip(outer, steps, strict=True)]
            once = replace(view, shape=(*sizes, together, columns))
            dense = dense_strides(once.shape, view.item)
            if n >= len(views) - constants and isinstance(place, np.ndarray):
                place = np.array(as_strided(place, once.shape, once.strides), order="C")
            else:
                repeated = call.dense(once.shape, view.kind)
                place = repeated.place
                pointwise_row(call, "copy", [repeated, once])
            steps = [new if old else 0 for new, old in zip(dense, steps, strict=False)]
        shape = (*outer, lines // together, together * columns)
        results.append(View(place, shape, (*steps, step * together, item), view.kind))
    return results


def add_row(
    call: Call,
    x: View,
    y: View,
    out: View,
    multipliers: tuple[float, float],
    zero_points: tuple[int, int],
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.add; x and y broadcast to out. out may be x or y, if of its kind."""
    floats = float_parameters(zero_point, qmin, qmax, *multipliers)
    ints = int_parameters(zero_point, *zero_points)
    largest = 2.0**16 * sum(abs(m) for m in multipliers)
    pointwise_row(call, "add", [out, x, y], floats, ints, largest=largest)


def mul_row(
    call: Call,
    x: View,
    y: View,
    out: View,
    multiplier: float,
    zero_points: tuple[int, int],
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.mul; x and y broadcast to out. out may be x or y."""
    floats = float_parameters(zero_point, qmin, qmax, multiplier)
    ints = int_parameters(zero_point, *zero_points)
    largest = 255.0**2 * abs(multiplier)
    pointwise_row(call, "multiply", [out, x, y], floats, ints, largest=largest)


def affine_row(
    call: Call,
    x: View,
    out: View,
    multiplier: NDArray[np.float32],
    shift: NDArray[np.float32],
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends reference.affine; multiplier and shift are scalars or (C,). out may be x."""
    floats = float_parameters(zero_point, qmin, qmax)
    columns = [float_view(values) for values in (multiplier, shift)]
    ints = int_parameters(zero_point, x_zero_point)
    largest = 255.0 * _magnitude(multiplier) + _magnitude(shift)
    pointwise_row(call, "affine", [out, x, *columns], floats, ints, largest=largest, constants=2)


def _magnitude(values: Any) -> float:
    return float(np.abs(np.asarray(values, np.float64)).max(initial=0.0))


def float_view(values: Any) -> View:
    """A copy of a scalar or (C,) as a float32 operand."""
    array = np.array(values, np.float32, order="C")
    return View(array, array.shape, array.strides, "f32")


def table_row(call: Call, x: View, out: View, table: NDArray[np.uint8]) -> None:
    """Appends reference.table; table is (256,) or (C, 256). out may be x."""
    values = np.array(table, np.uint8, order="C")
    if values.ndim == 1:
        pointwise_row(call, "table", [out, x], table=values)
    else:
        own = View(values, values.shape[:1], values.strides[:1], "u8")
        pointwise_row(call, "tables", [out, x, own])


def fill_row(call: Call, out: View, value: int) -> None:
    """Appends: all of out = value."""
    pointwise_row(call, "fill", [out], ints=int_parameters(value))
