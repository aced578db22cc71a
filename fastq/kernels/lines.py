"""Lines: how a kernel over whole arrays walks its operands, and shares them among tasks.

The axes of all operands are joined until four are left, (N0, N1, N2, N3). The last is a line, whose
elements lie side by side in the output; an operand that broadcasts has a stride of 0.

    task = one block of ROWS lines of axis 2, COLUMNS elements each, at one place of axes 0 and 1

A line is computed by vectors of `line_widths` elements, the widest first: nothing beyond it is read
or written, and each step reads its operands before it writes, so that the output may be an operand.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numba import njit

from fastq.kernels import simd
from fastq.kernels.call import View, collapse
from fastq.kernels.isa import target_features
from fastq.kernels.simd import (
    CACHE_LINE,
    Dot,
    add_saturated,
    any_lane,
    between,
    clamp,
    const,
    f32,
    fma,
    i8,
    i16,
    i32,
    i64,
    least,
    shuffle,
    splat,
    vec,
)

(SHAPE_1, SHAPE_2, SHAPE_3, ROWS, COLUMNS, LINES_FIELDS) = range(6)
OPERAND_FIELDS = 4  # address, and the strides of axes 0, 1, 2
BLOCK = 8 * 1024  # elements of a task
LONG = 512  # elements of a line whose beginning and end take little of its time
ELEMENT = {"u8": i8, "s8": i8, "u8x2": i16, "s16": i16, "s32": i32, "f32": f32}


def broadcast(view: View, shape: tuple[int, ...]) -> View:
    """The view with NumPy's broadcasting to a shape: stride 0 along what is repeated."""
    missing = len(shape) - len(view.shape)
    strides = [0] * missing
    for size, stride, wanted in zip(view.shape, view.strides, shape[missing:], strict=True):
        if size not in (1, wanted):
            raise ValueError(f"{view.shape} does not broadcast to {shape}")
        strides.append(stride if size == wanted else 0)
    return replace(view, shape=shape, strides=tuple(strides))


def join_lines(views: Sequence[View]) -> tuple[tuple[int, ...], list[tuple[int, ...]]]:
    """The common shape in four axes and the strides of each; the first view is the output."""
    shape, strides = collapse(views, 4)
    fits = all(s[-1] in (v.item, 0) for s, v in zip(strides, views, strict=True))
    if shape[-1] > 1 and not (fits and strides[0][-1] == views[0].item):
        shape, strides = collapse(views, 4, keep=1)
    if shape[-1] == 1:  # then no stride counts: one kernel for all
        strides = [(*s[:-1], v.item) for s, v in zip(strides, views, strict=True)]
    return shape, strides


def joint_lines(views: Sequence[View]) -> int:
    """How many short lines of axis 2 can be one, if what is the same on each is repeated.

    Such an operand, a vector of channels, keeps the pixels of an image from being one line.
    """
    lines, columns = views[0].shape[2:]
    for view in views:
        step, item = view.strides[2:]
        if step != columns * item and (step, item) != (0, view.item):
            return 1
    fitting = [n for n in range(1, LONG // max(columns, 1) + 1) if lines % n == 0]
    return max(fitting, default=1)


def share_lines(shape: Sequence[int]) -> tuple[int, dict[int, int]]:
    """The number of tasks of a shape in four axes, and the fields that say so."""
    columns = max(min(shape[3], BLOCK), 1)
    rows = max(min(shape[2], BLOCK // columns), 1)
    tasks = shape[0] * shape[1] * -(-shape[2] // rows) * -(-shape[3] // columns)
    values = {SHAPE_1: shape[1], SHAPE_2: shape[2], SHAPE_3: shape[3]}
    return tasks, values | {ROWS: rows, COLUMNS: columns}


@functools.cache
def widest() -> int:
    """Elements of the widest vectors: as bytes they fill a register."""
    return 64 if "avx512bw" in target_features() else 32


def line_widths() -> tuple[int, ...]:
    """The vectors of a line."""
    return (64, 32, 8, 1) if widest() == 64 else (32, 8, 1)


@njit
def task_lines(args, task):  # type: ignore[no-untyped-def]
    """A task: place on axes 0 and 1, range on axis 2, first column and their count."""
    across = (args[SHAPE_3] + args[COLUMNS] - 1) // args[COLUMNS]
    down = (args[SHAPE_2] + args[ROWS] - 1) // args[ROWS]
    column = task % across * args[COLUMNS]
    row = task // across % down * args[ROWS]
    outer = task // (across * down)
    last = min(row + args[ROWS], args[SHAPE_2])
    count = min(args[COLUMNS], args[SHAPE_3] - column)
    return outer // args[SHAPE_1], outer % args[SHAPE_1], row, last, column, count


@njit
def line_address(args, operand, i, j, row):  # type: ignore[no-untyped-def]
    """Where the line (i, j, row) of an operand begins; `operand` is its first field."""
    return args[operand] + i * args[operand + 1] + j * args[operand + 2] + row * args[operand + 3]


def emit_loop(
    b: Any, first: Any, last: Any, step: int, carried: Sequence[Any], body: Callable[..., Any]
) -> tuple[Any, list[Any]]:
    """Emits: for i = first; i + step <= last; i += step: carried = body(i, *carried).

    Returns i and what is carried after the loop.
    """
    entry = b.block
    loop, inside, done = (b.append_basic_block(n) for n in ("loop", "loop.body", "loop.done"))
    b.branch(loop)
    b.position_at_end(loop)
    i = b.phi(i64)
    held = [b.phi(value.type) for value in carried]
    following = b.add(i, i64(step))
    b.cbranch(b.icmp_signed("<=", following, last), inside, done)
    b.position_at_end(inside)
    results = body(i, *held) or []
    end = b.block
    b.branch(loop)
    for phi, before, after in zip(
        [i, *held], [first, *carried], [following, *results], strict=True
    ):
        phi.add_incoming(before, entry)
        phi.add_incoming(after, end)
    b.position_at_end(done)
    return i, held


def emit_line(
    b: Any,
    count: Any,
    body: Callable[[Any, int], None],
    widths: Sequence[int] = (),
    first: Any = None,
) -> None:
    """Emits body(i, width) over the elements from `first`, or 0, to count: the widest vectors
    first, then the rest."""
    i = i64(0) if first is None else first
    for width in widths or line_widths():
        i, _ = emit_loop(b, i, count, width, [], lambda at, width=width: body(at, width))


def emit_aligned_line(
    b: Any, count: Any, out: Any, item: int, body: Callable[[Any, int, bool], None]
) -> None:
    """Emits body(i, width, aligned) over elements 0..count of a line at `out`, `item` bytes each.

    What lies before the first whole vector, or cache line, is in a vector of its own, and the
    following ones are stored from there on, which takes half the time. Elements of both are
    computed twice: `out` must not be an operand.
    """
    width = widest()
    whole = min(CACHE_LINE, width * item)
    start = b.block
    with b.if_then(b.icmp_signed(">=", count, i64(width))):
        before = b.urem(b.neg(b.ptrtoint(out, i64)), i64(whole))
        with b.if_then(b.icmp_unsigned("!=", before, i64(0))):
            body(i64(0), width, False)
        aligned, _ = emit_loop(
            b, b.udiv(before, i64(item)), count, width, [], lambda at: body(at, width, True)
        )
        end = b.block
    i = b.phi(i64)
    i.add_incoming(i64(0), start)
    i.add_incoming(aligned, end)
    emit_line(b, count, lambda at, width: body(at, width, False), first=i)


LARGE = 1024.0  # beyond what is left of a uint8 or int8
WIDE_LARGE = 2.0**17  # the same of an int16
MAX_BOUNDED = 2.0**30  # a value below it goes to int32, zero point and all


def emit_rounded(
    b: Any, value: Any, lo: Any, hi: Any, zero_point: Any, kind: str, bounded: bool
) -> Any:
    """rint(clamp(value, lo, hi)) + zero_point as a kind, ties to even; only value is a vector.

    The saturating packs of x86 do most of the clamp of uint8. `bounded`: |value| <= MAX_BOUNDED is
    known; else, and of wide values, it is clamped before it is an integer.
    """
    width, element = value.type.count, ELEMENT[kind]
    ints, shorts = vec(i32, width), vec(i16, width)
    if not bounded or kind == "s16":
        value = clamp(b, value, splat(b, lo, width), splat(b, hi, width))
    steps = _nearest(b, value)
    if kind == "s16":
        return b.trunc(b.add(steps, splat(b, zero_point, width)), shorts)
    if _packs(kind, width):
        q = _packed(b, _shorts(b, steps), zero_point)
    else:
        steps = between(b, steps, const(ints, -(2**15)), const(ints, 2**15 - 1))
        zero = splat(b, b.trunc(zero_point, i16), width)
        q = add_saturated(b, b.trunc(steps, shorts), zero)
        if element != i16 or not bounded:  # LLVM knows this as one instruction with the truncation
            q = between(b, q, const(shorts, 0), const(shorts, 255))
        q = emit_converted(b, q, element)
    return _clamped(b, q, lo, hi, zero_point) if bounded else q


def emit_quantized(
    b: Any, real: Callable[[bool], Any], lo: Any, hi: Any, zero_point: Any, kind: str, whole: bool
) -> Any:
    """emit_rounded of real(True), which is limited, NaN made 0; real(False) is neither.

    whole: lo and hi are the ends of the kind. On x86 NaN, and what int32 cannot hold, become its
    least integer, packed -32768; all else saturates as it should. So a vector is computed without
    limits, a third of the work, and with them only if -32768 is in it: then it takes longer.
    """
    value = real(False)
    if not _packs(kind, value.type.count):
        return emit_rounded(b, real(True), lo, hi, zero_point, kind, bounded=True)
    pairs = _shorts(b, _nearest(b, value))
    lowest = least(b, *pairs)
    quick = b.block
    with b.if_then(any_lane(b, b.icmp_signed("==", lowest, const(lowest.type, -(2**15)))), False):
        limited = _shorts(b, _nearest(b, real(True)))
        slow = b.block
    for n, ways in enumerate(zip(pairs, limited, strict=True)):
        pairs[n] = b.phi(ways[0].type)
        for way, block in zip(ways, (quick, slow), strict=True):
            pairs[n].add_incoming(way, block)
    q = _packed(b, pairs, zero_point)
    return q if whole else _clamped(b, q, lo, hi, zero_point)


def _clamped(b: Any, q: Any, lo: Any, hi: Any, zero_point: Any) -> Any:
    """q within lo + zero_point and hi + zero_point."""
    kind = q.type
    qmin, qmax = (
        splat(b, b.trunc(b.add(b.fptosi(end, i32), zero_point), kind.element), kind.count)
        for end in (lo, hi)
    )
    return between(b, q, qmin, qmax, signed=kind.element == i16)


def _nearest(b: Any, value: Any) -> Any:
    """int32 of a float32 vector, ties to even."""
    width = value.type.count
    return simd.call(b, f"llvm.lrint.v{width}i32.v{width}f32", vec(i32, width), [value])


def _packs(kind: str, width: int) -> bool:
    """Whether this many int32 become integers of a kind by `_shorts` and `_packed`."""
    return ELEMENT[kind] == i8 and width == widest() and "avx2" in target_features()


def _shorts(b: Any, steps: Any) -> list[Any]:
    """The int16 of `widest` int32, saturated: two registers of four, in the order that packs leave
    and `_packed` undoes.

    Together three packs and one permutation; truncations would take two instructions for each
    register.
    """
    packer = Dot(8 * widest(), native=True)
    lanes = packer.lanes
    parts = [
        shuffle(b, steps, steps, range(i, i + lanes)) for i in range(0, steps.type.count, lanes)
    ]
    return [packer.pack(b, *parts[i : i + 2]) for i in (0, 2)]


def _packed(b: Any, pairs: list[Any], zero_point: Any) -> Any:
    """uint8(shorts + zero_point), saturated, of what `_shorts` gives, in the elements' order."""
    zero = splat(b, b.trunc(zero_point, i16), pairs[0].type.count)
    packed = Dot(8 * widest(), native=True).pack(b, *(add_saturated(b, p, zero) for p in pairs))
    # within 128 bits: 4 of each part
    order = np.arange(widest()).reshape(-1, 4, 4).swapaxes(0, 1).reshape(-1)
    return shuffle(b, packed, packed, [int(i) for i in order])


LEAST_NORMAL, MOST_NORMAL = 2.0**-60, 2.0**60  # of a scale: away from the ends of float32


def emit_divisor(b: Any, scale: Any, kind: str, normal: bool = False) -> tuple[Any, ...]:
    """What `emit_quotient` takes for a float32 scale: once for a line; kind is the integers'.

    With fused multiply-add: a limit of x, and the reciprocal in two parts; and unless the scale is
    known to be normal, a power of two that makes it so, before them.
    """
    if "fma" not in target_features() or kind == "s16":
        return (scale,)

    def parts(scale: Any) -> tuple[Any, Any, Any]:
        reciprocal = b.fdiv(f32(1.0), scale)
        rest = b.fdiv(fma(b, b.fneg(scale), reciprocal, f32(1.0)), scale)
        return b.fmul(scale, f32(LARGE)), reciprocal, rest

    if normal:
        return parts(scale)
    large = b.fcmp_ordered(">", scale, f32(MOST_NORMAL))
    small = b.fcmp_ordered("<", scale, f32(LEAST_NORMAL))
    power = b.select(large, f32(LEAST_NORMAL), f32(1.0))
    power = b.select(small, f32(MOST_NORMAL), power)
    return power, *parts(b.fmul(scale, power))


def emit_quotient(b: Any, x: Any, divisor: tuple[Any, ...], limited: bool = True) -> Any:
    """x / scale of a float32 vector, for rounding: the integer is that of the float32 quotient.

    `limited`: clamped to LARGE or more; NaN gives 0. Else NaN stays, and what is large may become
    infinite or NaN. A division would take longer than all the rest. The product with a reciprocal
    of 48 bits is on the right side of every k + 0.5: all mantissas of a scale were tried, for
    |k| <= 260 and x within 3 ulp of (k + 0.5) * scale. What is far below is not clamped on x86: all
    that it makes of it, and of NaN, is its least integer.
    """
    parts = [splat(b, part, x.type.count) for part in divisor]
    if len(parts) == 1:
        quotient = b.fdiv(x, parts[0])
        return emit_limited(b, quotient, const(x.type, WIDE_LARGE)) if limited else quotient
    *power, most, reciprocal, rest = parts
    for factor in power:
        x = b.fmul(x, factor)
    if limited:
        number = b.fcmp_ordered("ord", x, x)
        x = b.select(b.fcmp_ordered("<", x, most), x, most)
        if "neon" in target_features():  # the sum of two infinities would be 0 there
            lowest = b.fneg(most)
            x = b.select(b.fcmp_ordered(">", x, lowest), x, lowest)
        x = b.select(number, x, const(x.type, 0.0))
    return fma(b, x, reciprocal, b.fmul(x, rest))


def emit_limited(b: Any, x: Any, most: Any = None) -> Any:
    """A float32 vector clamped to `most`, or LARGE, either way; NaN gives 0."""
    most = const(x.type, LARGE) if most is None else most
    number = b.fcmp_ordered("ord", x, x)
    return b.select(number, clamp(b, x, b.fneg(most), most), const(x.type, 0.0))


def emit_converted(b: Any, value: Any, element: Any) -> Any:
    """A vector of uint8 values held in another type of integers; a type of floats stays."""
    kind = vec(element, value.type.count)
    if value.type == kind:
        return value
    return (b.trunc if value.type.element.width > element.width else b.zext)(value, kind)


def emit_triples(b: Any, lines: list[Any]) -> list[Any]:
    """Three vectors of three lines: element 0 of all in order, then element 1, ...

    Each result is two shuffles of two vectors, which is what instruction sets have.
    """
    count = lines[0].type.count
    results = []
    for first in range(0, 3 * count, count):
        places = [divmod(i, 3) for i in range(first, first + count)]
        pair = shuffle(b, lines[0], lines[1], [at + (line == 1) * count for at, line in places])
        lanes = [count + at if line == 2 else i for i, (at, line) in enumerate(places)]
        results.append(shuffle(b, pair, lines[2], lanes))
    return results


def emit_interleaved(b: Any, lines: list[Any]) -> Any:
    """One vector: element 0 of all lines in order, then element 1, ...; a power of two lines."""
    if len(lines) == 1:
        return lines[0]
    first, second = emit_interleaved(b, lines[::2]), emit_interleaved(b, lines[1::2])
    count = first.type.count
    return shuffle(b, first, second, [i // 2 + i % 2 * count for i in range(2 * count)])
