"""Recurrent layers: for each step of a sequence the product with what the step before gave, then
the cell, one element of the hidden state at a time.

    lstm    i, f, g, o   c = sigmoid(f) * c + sigmoid(i) * tanh(g)    h = sigmoid(o) * tanh(c)
    gru     r, z, n      m = tanh(xn + sigmoid(r) * hn)               h = m + sigmoid(z) * (h - m)
    tanh, relu                                                        h = tanh(x + h) or relu(x + h)

    gates   = float32(x) * X_SCALE + hx       of each gate, but for n of a gru, which is xn and hn
    out     = int(rint(clamp(h * MULTIPLIER, lo, hi))) + zp

x holds int16, one line of all gates; hx float32, the product of the last out with its epilogue; the
state, c or else h, stays float32 from step to step. out holds uint8 values as the tier's
products read them. Each float operation rounds once, in the order of reference.recurrent. A task is
a block of lines, as in lines.py.

Between float layers (reference.recurrent_float) x, out and hx hold float32: out is h, and a step's
product quantizes the rows of the last one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels import block, executor, stage
from fastq.kernels.call import ITEM_BYTES, At, Call, Place, View, address_of
from fastq.kernels.layers import BoundLinear
from fastq.kernels.lines import (
    COLUMNS,
    ELEMENT,
    LINES_FIELDS,
    MAX_BOUNDED,
    OPERAND_FIELDS,
    ROWS,
    SHAPE_1,
    SHAPE_2,
    SHAPE_3,
    emit_converted,
    emit_limited,
    emit_line,
    emit_rounded,
    line_address,
    task_lines,
)
from fastq.kernels.native import native
from fastq.kernels.products import Layer
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import clamp, const, f32, i16, i32, i64, load, ptr, splat, store, vec
from fastq.qparams import GATES, MAX_FACTOR, TANH_BELOW, TANH_LIMIT, TANH_OVER, Dequant

OUT, X, HX, OLD, NEW, FLOATS = range(
    LINES_FIELDS, LINES_FIELDS + 5 * OPERAND_FIELDS + 1, OPERAND_FIELDS
)
ZERO_POINT, FIELDS = FLOATS + 1, FLOATS + 2
WIDTHS = (32, 8, 1)  # of vectors: a cell has many values in hand at once
GATE_NANOSECONDS = 0.4  # of one element of a gate
BLOCK = 1024  # elements of the state in a task, roughly


def emit_tanh(b: Any, x: Any) -> Any:
    """reference._tanh of a vector."""
    limit = const(x.type, TANH_LIMIT)
    x = clamp(b, x, b.fneg(limit), limit)
    square = b.fmul(x, x)

    def polynomial(coefficients: Sequence[float]) -> Any:
        value = const(x.type, coefficients[0])
        for coefficient in coefficients[1:]:
            value = b.fadd(b.fmul(value, square), const(x.type, coefficient))
        return value

    y = b.fdiv(b.fmul(x, polynomial(TANH_OVER)), polynomial(TANH_BELOW))
    return clamp(b, y, const(x.type, -1.0), const(x.type, 1.0))


def emit_sigmoid(b: Any, x: Any) -> Any:
    """reference._sigmoid of a vector."""
    half = const(x.type, 0.5)
    return b.fadd(b.fmul(emit_tanh(b, b.fmul(x, half)), half), half)


@intrinsic(prefer_literal=True)
def _cell_line(
    typingctx: Any,
    config: Any,
    out: Any,
    x: Any,
    hx: Any,
    old: Any,
    new: Any,
    count: Any,
    features: Any,
    floats: Any,
    zero_point: Any,
) -> Any:
    """`count` elements of one line at these addresses; a gate has `features` of them, and FLOATS
    are lo, hi, MULTIPLIER and X_SCALE. config begins with cell_kernel's arguments."""
    cell, source, kind, bounded = (t.literal_value for t in config.types[:4])
    signature = types.void(config, *[types.int64] * 9)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        out, x, hx, old, new = (b.inttoptr(place, ptr) for place in values[1:6])
        count, features = values[6:8]
        floats, zero_point = (b.inttoptr(place, ptr) for place in values[8:10])
        if kind != "f32":
            lo, hi, multiplier, x_scale = (load(b, f32, floats, 4 * i) for i in range(4))
            zp = load(b, i32, zero_point)

        def body(i: Any, width: int) -> None:
            reals = vec(f32, width)
            at = b.mul(i, i64(4))

            def limited(address: Any, at: Any) -> Any:
                """float32 that may be anything."""
                value = load(b, reals, address, at)
                return emit_limited(b, value, const(reals, MAX_FACTOR))

            def given(gate: int) -> tuple[Any, Any]:
                """A gate's products: with inputs, float32(x) * X_SCALE; with hidden states, hx."""
                place = b.add(i, b.mul(features, i64(gate)))
                real_at = b.mul(place, i64(4))
                if source == "f32":
                    return limited(x, real_at), limited(hx, real_at)
                steps = load(b, vec(i16, width), x, b.mul(place, i64(2)))
                real = b.sitofp(b.sext(steps, vec(i32, width)), reals)
                return b.fmul(real, splat(b, x_scale, width)), load(b, reals, hx, real_at)

            def last() -> Any:
                return limited(old, at) if source == "f32" else load(b, reals, old, at)

            def gate(number: int) -> Any:
                return b.fadd(*given(number))

            match cell:
                case "lstm":
                    into, forget, change, shown = map(gate, range(GATES[cell]))
                    kept = b.fmul(emit_sigmoid(b, forget), last())
                    taken = b.fmul(emit_sigmoid(b, into), emit_tanh(b, change))
                    state = b.fadd(kept, taken)
                    h = b.fmul(emit_sigmoid(b, shown), emit_tanh(b, state))
                case "gru":
                    reset, update = (emit_sigmoid(b, gate(number)) for number in range(2))
                    xn, hn = given(2)
                    made = emit_tanh(b, b.fadd(xn, b.fmul(reset, hn)))
                    change = b.fsub(last(), made)
                    h = state = b.fadd(made, b.fmul(update, change))
                case "tanh":
                    h = state = emit_tanh(b, gate(0))
                case "relu":
                    value = gate(0)
                    zero = const(reals, 0.0)
                    h = state = b.select(b.fcmp_ordered(">", value, zero), value, zero)
            store(b, state, new, at)
            if kind == "f32":
                store(b, h, out, at)
                return
            value = b.fmul(h, splat(b, multiplier, width))
            q = emit_rounded(b, value, lo, hi, zp, kind, bool(bounded))
            store(b, emit_converted(b, q, ELEMENT[kind]), out, b.mul(i, i64(ITEM_BYTES[kind])))

        emit_line(b, count, body, WIDTHS)
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def cell_kernel(cell: str, source: str, kind: str, bounded: bool = True) -> Any:
    """One step of a cell, a key of GATES; source "s16" of x and kind "u8" or "u8x2" of out, or both
    "f32". bounded: see emit_rounded."""
    config = (cell, source, kind, int(bounded), sources_digest())
    x_item, item = ITEM_BYTES[source], ITEM_BYTES[kind]

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            i, j, row, last, column, count = task_lines(args, task)
            for line in range(row, last):
                _cell_line(
                    config,
                    line_address(args, OUT, i, j, line) + column * item,
                    line_address(args, X, i, j, line) + column * x_item,
                    line_address(args, HX, i, j, line) + column * 4,
                    line_address(args, OLD, i, j, line) + column * 4,
                    line_address(args, NEW, i, j, line) + column * 4,
                    count, args[SHAPE_3], args[FLOATS], args[ZERO_POINT],
                )  # fmt: skip

    return kernel


def recurrent_row(
    call: Call,
    x: View,
    out: View,
    layer: Layer,
    *,
    cell: str,
    x_scale: float,
    multiplier: float,
    axis: int,
    reverse: bool,
    zero_point: int,
    qmin: int,
    qmax: int,
) -> None:
    """Appends reference.recurrent: two rows for each step but the first.

    x and out have three axes and side by side features; out is of the tier's kind, in memory of
    which more may be read. layer is the product's, with a Dequant.
    """
    rows, features = out.shape[1 - axis], out.shape[2]
    if 0 in out.shape:
        return
    ends = layer.epilogue
    assert isinstance(ends, Dequant)
    product, state = call.dense((rows, x.shape[2]), "f32"), call.dense((rows, features), "f32")
    first = np.zeros(x.shape[2], np.float32)  # the product of real zeros
    first = first if ends.bias is None else first + ends.bias
    hx, old = (View(place, (rows, len(place)), (0, 4), "f32")
               for place in (first, np.zeros(features, np.float32)))  # fmt: skip
    parameters: dict[int, Place] = {
        FLOATS: np.array([qmin - zero_point, qmax - zero_point, multiplier, x_scale], np.float32),
        ZERO_POINT: np.array([zero_point], np.int32),
    }
    scale = np.array([ends.x_scale], np.float32)
    bounded = cell != "relu" and multiplier <= MAX_BOUNDED
    steps = out.shape[axis]
    begin, ahead = (steps - 1, -1) if reverse else (0, 1)

    def append(now: int, hx: View, old: View) -> None:
        made, given = _step(out, axis, now), _step(x, axis, now)
        _cell_row(call, (made, given, hx, old, state), cell, bounded, parameters)

    append(begin, hx, old)
    if steps > 1:
        before = _step(out, axis, begin)
        layer.rows(call, before, product, scale=scale, zero_point=parameters[ZERO_POINT])
        append(begin + ahead, product, state)
        along = {(0, block.A): out, (1, OUT): out, (1, X): x}
        moves = {place: ahead * view.strides[axis] for place, view in along.items()}
        call.repeat(2, steps - 2, moves)


class BoundRecurrent(BoundLinear):
    """A recurrent layer of its own, float32 in and out, bound to its product with the last hidden
    state: reference.recurrent_float."""

    def recur(
        self,
        cell: str,
        projection: BoundLinear | None,
        axis: int,
        reverse: bool,
        x: NDArray[np.float32],
        out: NDArray[np.float32],
        hidden: NDArray[np.float32],
        state: NDArray[np.float32],
    ) -> None:
        """x and out have three axes and side by side features, hidden and state are contiguous and
        on one row for each of x; the last state is left in `state`."""
        key = (cell, projection, axis, reverse, x.shape, x.strides, out.strides,
               executor.get_num_threads())  # fmt: skip
        self.calls.run(self.recurrence, key, *map(address_of, (x, out, hidden, state)))

    def recurrence(
        self,
        cell: str,
        projection: BoundLinear | None,
        axis: int,
        reverse: bool,
        shape: tuple[int, ...],
        x_strides: tuple[int, ...],
        out_strides: tuple[int, ...],
        threads: int,
    ) -> Call:
        """A call, of those four arguments."""
        call, (steps, rows) = Call(4), (shape[axis], shape[1 - axis])
        width, features = self.layer.k, self.layer.n // GATES[cell]
        x = View(At(0), shape, x_strides, "f32")
        out = View(At(1), (*shape[:2], width), out_strides, "f32")
        hidden, state = (View(At(i), (rows, n), (4 * n, 4), "f32")
                         for i, n in ((2, width), (3, features)))  # fmt: skip
        hx = call.dense((rows, self.layer.n), "f32")
        made = None if projection is None else call.dense((rows, features), "f32")
        begin, ahead = (steps - 1, -1) if reverse else (0, 1)

        def append(now: int, before: View) -> None:
            shown = _step(out, axis, now)
            self.rows(call, before, hx)
            views = made or shown, _step(x, axis, now), hx, state, state
            _cell_row(call, views, cell, True, {})
            if projection is not None and made is not None:
                projection.rows(call, made, shown)

        append(begin, hidden)
        if steps > 1:
            append(begin + ahead, _step(out, axis, begin))
            # rows of a step: the last hidden state's, to integers and multiplied, the cell's, and
            # those of a projection
            along = {(0, stage.R_X): out, (2, X): x, (2, OUT): out}
            if projection is not None:
                along = {(0, stage.R_X): out, (2, X): x, (4, block.OUT): out}
            moves = {place: ahead * view.strides[axis] for place, view in along.items()}
            call.repeat(3 if projection is None else 5, steps - 2, moves)
        return call


def _cell_row(
    call: Call, views: Sequence[View], cell: str, bounded: bool, parameters: dict[int, Place]
) -> None:
    """Appends one step: views are out, x, hx, and the state before and after it."""
    out, x = views[:2]
    rows, features = out.shape
    columns = min(features, BLOCK)
    lines = min(max(BLOCK // columns, 1), rows)
    tasks = -(-rows // lines) * -(-features // columns)
    values = {SHAPE_1: 1, SHAPE_2: rows, SHAPE_3: features, ROWS: lines, COLUMNS: columns}
    places = dict(parameters)
    for field, view in zip((OUT, X, HX, OLD, NEW), views, strict=True):
        places[field] = view.place
        values[field + OPERAND_FIELDS - 1] = view.strides[0]
    kernel = cell_kernel(cell, x.kind, out.kind, bounded)
    time = rows * x.shape[1] * GATE_NANOSECONDS
    call.row(kernel, FIELDS, tasks, values, places, time)


def _step(view: View, axis: int, t: int) -> View:
    """(rows, features) of one step."""
    assert isinstance(view.place, At)
    shape, strides = ((v[1 - axis], v[2]) for v in (view.shape, view.strides))
    return View(view.place + t * view.strides[axis], shape, strides, view.kind)
