"""From int32 accumulators to the output: the one place that rounds and clamps them.

    s32   acc - (row_zero_point - offset) * col_sum
    f32   clamp(float32(that) * (row_scale * scale) + bias, lo, hi)
    u8    int32(rint(clamp(float32(acc + bias) * scale [+ r], lo, hi))) + out_zero_point
    u8x2  the same, stored as int16
    s16   the same, and beyond uint8: all of int16
    r     float32(add - add_zero_point) * add_scale, where something of the output's shape is added;
          as scale is, add_scale is another for each column

These three may have a factor for each row: row_scale * scale instead of scale. "rows" says so; of
f32 it says that each group has rows of its own.

For them, bias already holds -(x_zero_point - offset) * col_sum, and accumulators begin at it. The
offset is what the tier's dot product takes off each activation (simd.Dot). (lo, hi) =
(qmin, qmax) - out_zero_point: clamping between integers before rounding equals clamping after it.
Where no input takes the value out of int32, it is clamped last, as bytes: the packs saturate. No
operation may be contracted or reordered: the bits are part of the contract.

Accumulators that are packed together (simd.pack) come in the order that packing undoes; the
other epilogues restore the order themselves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastq.kernels import block
from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.lines import ELEMENT
from fastq.kernels.simd import (
    add_saturated,
    address,
    between,
    clamp,
    const,
    f32,
    i8,
    i16,
    i32,
    i64,
    load,
    ptr,
    rint,
    shuffle,
    splat,
    store,
    store_valid,
    unpack,
    vec,
)


class Spelled(NamedTuple):
    """What an epilogue's name says: "u8+s16+unbounded".

    kind     "s32", "f32", "u8", "u8x2" or "s16".
    added    the kind of what is added, or "".
    by_row   "rows": whether there is a factor for each row.
    bounded  without "unbounded": no value before rounding is beyond lines.MAX_BOUNDED.
    """

    kind: str
    added: str
    by_row: bool
    bounded: bool


def spelled(epilogue: str) -> Spelled:
    """The parts of a name: a kind, and after "+" what else there is."""
    kind, *more = epilogue.split("+")
    added = "".join(word for word in more if word in ITEM_BYTES)
    return Spelled(kind, added, "rows" in more, "unbounded" not in more)


def spell(kind: str, more: str, bounded: bool) -> str:
    """The name; more is the kind of what is added, "rows" or ""."""
    return kind + f"+{more}" * bool(more) + "+unbounded" * (not bounded)


class EpilogueEmitter:
    """The epilogue of some columns: what it needs of the argument block is read here, once.

    parts    as `spelled` has them.
    columns  byte offsets into the per-column arrays, one for each panel of `vectors` vectors.
    field    field(index, type) reads the argument block.
    start    what the accumulators of a row begin at, [vector].
    """

    def __init__(
        self, b: Any, simd: Any, parts: Spelled, vectors: int, columns: list[Any], field: Any
    ) -> None:
        kind, self.added, self.by_row, self.bounded = parts
        self.b, self.simd, self.kind, self.field = b, simd, kind, field
        self.ints, self.floats = simd.acc, vec(f32, simd.lanes)
        self.together = simd.together(vectors * simd.lanes)
        self.columns, self.vectors = columns, vectors
        self.start = [const(simd.acc, 0)] * (vectors * len(columns))
        if kind == "s32":
            self.col_sums = self._per_column(block.COL_SUMS, self.ints)
            return
        self.scale = self._per_column(block.SCALE, self.floats)
        lowest = load(b, f32, field(block.CLAMP, ptr))
        self.lo = splat(b, lowest, simd.lanes)
        self.hi = self._scalar(block.CLAMP, f32, 1)
        if kind == "f32":
            self.col_sums = self._per_column(block.COL_SUMS, self.ints)
            self.bias = self._per_column(block.BIAS, self.floats)
            return
        self.start = self._per_column(block.BIAS, self.ints)
        zero_point = load(b, i32, field(block.OUT_ZERO_POINT, ptr))
        if self.together == 1:
            self.zero_point = splat(b, zero_point, simd.lanes)
        else:
            packed = i8 if self.together == 4 and kind == "u8" else i16
            count = (4 if packed is i8 else 2) * simd.lanes
            highest = load(b, f32, field(block.CLAMP, ptr), 4)
            self.least, self.most = (
                splat(b, b.trunc(b.add(b.fptosi(end, i32), zero_point), packed), count)
                for end in (lowest, highest)
            )
            self.zero_point = splat(b, b.trunc(zero_point, i16), 2 * simd.lanes)
        if self.added:
            self.add_scale = self._per_column(block.ADD_SCALE, self.floats)
            zero = b.sitofp(load(b, i32, field(block.ADD_ZERO_POINT, ptr)), f32)
            if self.together > 1:  # what `_added` has in it
                zero = b.fadd(zero, f32(2.0**23 + (2.0**15 if self.added == "s16" else 0)))
            self.add_zero_point = splat(b, zero, simd.lanes)

    def _per_column(self, index: int, kind: Any) -> list[Any]:
        base, size = self.field(index, ptr), 4 * kind.count
        panels = [address(self.b, base, offset) for offset in self.columns]
        return [load(self.b, kind, p, size * j) for p in panels for j in range(self.vectors)]

    def _per_row(self, index: int, kind: Any, row: Any) -> Any:
        offset = self.b.mul(self.b.mul(row, self.field(block.ROW_STEP)), i64(4))
        return splat(self.b, load(self.b, kind, self.field(index, ptr), offset), self.simd.lanes)

    def _scalar(self, index: int, kind: Any, element: int = 0) -> Any:
        value = load(self.b, kind, self.field(index, ptr), 4 * element)
        return splat(self.b, value, self.simd.lanes)

    def store(
        self,
        accs: list[list[Any]],
        targets: list[Any],
        rows: list[Any],
        add_rows: list[Any] | None = None,
        valid: Any = None,
    ) -> None:
        """Stores accs[i], vectors that cover the columns as simd.columns says, at targets[i].

        rows[i] is the index into the per-row arrays, add_rows[i] the address of what is added. Of
        the columns the first `valid` are stored; None: all.
        """
        self.valid = valid
        for i, (acc_row, target) in enumerate(zip(accs, targets, strict=True)):
            if self.kind in ("u8", "u8x2", "s16"):
                self._store_rounded(acc_row, target, rows[i], add_rows[i] if add_rows else None)
            else:
                self._store_unrounded(acc_row, target, rows[i])

    def _store_rounded(self, accs: list[Any], target: Any, row: Any, add: Any) -> None:
        b, simd, together = self.b, self.simd, self.together
        scales = self.scale
        if self.by_row:
            factor = self._per_row(block.ROW_SCALE, f32, row)
            scales = [b.fmul(factor, scale) for scale in scales]
        stored = vec(ELEMENT[self.kind], together * simd.lanes)
        for j in range(0, len(accs), together):
            column = j * simd.lanes
            pairs = zip(accs[j : j + together], scales[j : j + together], strict=True)
            group = [b.fmul(b.sitofp(acc, self.floats), scale) for acc, scale in pairs]
            if add is not None:
                kind = vec(ELEMENT[self.added], together * simd.lanes)
                factors = self.add_scale[j : j + together]
                r = self._added(load(b, kind, add, column * ITEM_BYTES[self.added]), factors)
                group = [b.fadd(value, more) for value, more in zip(group, r, strict=True)]
            q = self._rounded(group)
            q = q if q.type == stored else b.trunc(q, stored)
            self._put(q, target, column * ITEM_BYTES[self.kind], column)

    def _rounded(self, group: list[Any]) -> Any:
        """float32 vectors as integers in one."""
        b, simd = self.b, self.simd
        if self.together == 1 or not self.bounded:
            group = [clamp(b, value, self.lo, self.hi) for value in group]
        q = [rint(b, value) for value in group]
        if self.together == 1:
            return b.add(q[0], self.zero_point)
        shorts = [add_saturated(b, simd.pack(b, *pair), self.zero_point) for pair in batched(q, 2)]
        if self.together == 2:
            return between(b, shorts[0], self.least, self.most)
        if self.kind == "s16":
            low, high = (between(b, x, self.least, self.most) for x in shorts)
            return shuffle(b, low, high, self._halves())
        signed = self.kind != "u8"
        return between(b, simd.pack(b, *shorts), self.least, self.most, signed)

    def _halves(self) -> list[int]:
        """Where each column of a group is in two vectors of int16, packed from two accumulators
        each: 8 columns of the first, 8 of the second, and so on."""
        lanes = np.arange(4 * self.simd.lanes).reshape(2, -1, 8)
        return [int(lane) for lane in lanes.swapaxes(0, 1).reshape(-1)]

    def _added(self, r: Any, factors: Sequence[Any]) -> list[Any]:
        """r of the formula, as the accumulators lie: unpacked in the order that packing undoes.

        An integer i < 2^16 below the bits 0x4B00 is the float32 2^23 + i, exactly; those of int16
        are made positive for it by 2^15.
        """
        b, wide = self.b, self.added == "s16"
        if self.together == 1:
            reals = [b.sitofp((b.sext if wide else b.zext)(r, self.ints), self.floats)]
        else:
            parts = [r]
            if self.together == 4 and r.type.element is i8:
                half = vec(i16, r.type.count // 2)
                parts = [b.bitcast(x, half) for x in unpack(b, r, const(r.type, 0))]
            elif self.together == 4:
                order = np.argsort(self._halves()).reshape(2, -1).tolist()
                parts = [shuffle(b, r, r, lanes) for lanes in order]
            elif r.type.element is i8:
                parts = [b.zext(r, vec(i16, r.type.count))]
            if wide:
                parts = [b.xor(x, const(x.type, -(2**15))) for x in parts]
            exponent = const(parts[0].type, 0x4B00)
            reals = [b.bitcast(x, self.floats) for p in parts for x in unpack(b, p, exponent)]
        pairs = zip(reals, factors, strict=True)
        return [b.fmul(b.fsub(x, self.add_zero_point), factor) for x, factor in pairs]

    def _store_unrounded(self, accs: list[Any], target: Any, row: Any) -> None:
        b, simd = self.b, self.simd
        zero_point = self._per_row(block.ROW_ZERO_POINT, i32, row)
        if simd.offset:
            zero_point = b.sub(zero_point, const(zero_point.type, simd.offset))
        values = [b.sub(a, b.mul(zero_point, s)) for a, s in zip(accs, self.col_sums, strict=True)]
        if self.kind == "f32":
            row_scale = self._per_row(block.ROW_SCALE, f32, row)
            for j, value in enumerate(values):
                real = b.fmul(b.sitofp(value, self.floats), b.fmul(row_scale, self.scale[j]))
                values[j] = clamp(b, b.fadd(real, self.bias[j]), self.lo, self.hi)
        values = self._in_order(values)
        for j, value in enumerate(values):
            self._put(value, target, 4 * simd.lanes * j, j * simd.lanes)

    def _put(self, value: Any, target: Any, offset: int, column: int) -> None:
        if self.valid is None:
            store(self.b, value, target, offset)
        else:
            valid = self.b.sub(self.valid, i64(column))
            store_valid(self.b, value, address(self.b, target, offset), valid)

    def _in_order(self, values: list[Any]) -> list[Any]:
        """Vectors of columns in order, of the accumulators as they lie."""
        together, lanes = self.together, self.simd.lanes
        if together == 1:
            return values
        place = np.argsort(self.simd.columns(together * lanes)).reshape(together, lanes)
        ordered = []
        for group in batched(values, together):
            joined = list(group)
            while len(joined) > 1:  # LLVM turns the joins and the slices into a few shuffles
                joined = [
                    shuffle(self.b, x, y, range(2 * x.type.count)) for x, y in batched(joined, 2)
                ]
            ordered += [shuffle(self.b, joined[0], joined[0], part.tolist()) for part in place]
        return ordered


def batched(values: Sequence[Any], count: int) -> Iterator[Sequence[Any]]:
    """`count` at a time (itertools has it from Python 3.12 on)."""
    return (values[i : i + count] for i in range(0, len(values), count))
