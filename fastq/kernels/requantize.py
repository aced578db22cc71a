"""From int32 accumulators to the output: the one place that rounds and clamps them.

    s32   acc - row_zero_point * col_sum
    f32   clamp(float32(that) * (row_scale * scale) + bias, lo, hi)
    u8    int32(rint(clamp(float32(acc + bias) * scale [+ r], lo, hi))) + out_zero_point
    s16   the same, stored as int16
    r     float32(add - add_zero_point) * add_scale, where something of the output's shape is added

For u8, bias already holds -x_zero_point * col_sum, and accumulators begin at it. (lo, hi) =
(qmin, qmax) - out_zero_point: clamping between integers before rounding equals clamping after it,
and keeps the conversion in range. No operation may be contracted or reordered: the bits are part of
the contract.

Where a tier packs accumulators in pairs (simd.pack), they come in the order that this undoes; the
other epilogues restore the order themselves.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastq.kernels import block
from fastq.kernels.simd import (
    address,
    at_most,
    clamp,
    const,
    f32,
    i8,
    i16,
    i32,
    i64,
    larger,
    load,
    ptr,
    rint,
    shuffle,
    splat,
    store,
    unpack,
    vec,
)


class Epilogue:
    """The epilogue of some columns: what it needs of the argument block is read here, once.

    kind     "s32", "f32", "u8" or "s16".
    columns  byte offsets into the per-column arrays, one for each panel of `vectors` vectors.
    field    field(index, type) reads the argument block.
    start    what the accumulators of a row begin at, [vector].
    """

    def __init__(
        self, b: Any, simd: Any, kind: str, vectors: int, columns: list[Any], field: Any, adds: bool
    ) -> None:
        self.b, self.simd, self.kind, self.field = b, simd, kind, field
        self.ints, self.floats = simd.acc, vec(f32, simd.lanes)
        self.paired = simd.packs and vectors % 2 == 0
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
        if self.paired:
            least = b.add(b.fptosi(lowest, i32), zero_point)
            self.least = splat(b, b.trunc(least, i16), 2 * simd.lanes)
            self.zero_point = splat(b, b.trunc(zero_point, i16), 2 * simd.lanes)
        else:
            self.zero_point = splat(b, zero_point, simd.lanes)
        if adds:
            self.add_scale = self._scalar(block.ADD_SCALE, f32)
            self.add_zero_point = self._scalar(block.ADD_ZERO_POINT, i32)

    def _per_column(self, index: int, kind: Any) -> list[Any]:
        base, size = self.field(index, ptr), 4 * kind.count
        panels = [address(self.b, base, offset) for offset in self.columns]
        return [load(self.b, kind, p, size * j) for p in panels for j in range(self.vectors)]

    def _scalar(self, index: int, kind: Any, element: int = 0) -> Any:
        value = load(self.b, kind, self.field(index, ptr), 4 * element)
        return splat(self.b, value, self.simd.lanes)

    def store(
        self,
        accs: list[list[Any]],
        targets: list[Any],
        rows: list[Any],
        add_rows: list[Any] | None = None,
    ) -> None:
        """Stores accs[i], vectors that cover the columns as simd.columns says, at targets[i].

        rows[i] is the index into the per-row arrays, add_rows[i] the address of what is added.
        """
        for i, (acc_row, target) in enumerate(zip(accs, targets, strict=True)):
            if self.kind in ("u8", "s16"):
                self._store_rounded(acc_row, target, add_rows[i] if add_rows else None)
            else:
                self._store_wide(acc_row, target, rows[i])

    def _store_rounded(self, accs: list[Any], target: Any, add: Any) -> None:
        b, simd = self.b, self.simd
        item = i8 if self.kind == "u8" else i16
        together = 2 if self.paired else 1
        stored = vec(item, together * simd.lanes)
        for j in range(0, len(accs), together):
            offset = j * simd.lanes * item.width // 8
            pairs = zip(accs[j : j + together], self.scale[j : j + together], strict=True)
            group = [b.fmul(b.sitofp(acc, self.floats), scale) for acc, scale in pairs]
            if add is not None:
                r = self._added(load(b, stored, add, offset))
                group = [b.fadd(value, more) for value, more in zip(group, r, strict=True)]
            if self.paired:  # what is too small saturates, and is clamped at the end
                q = [simd.rint_down(b, at_most(b, value, self.hi)) for value in group]
                q = larger(b, b.add(simd.pack(b, *q), self.zero_point), self.least)
            else:
                q = b.add(rint(b, clamp(b, group[0], self.lo, self.hi)), self.zero_point)
            store(b, q if q.type == stored else b.trunc(q, stored), target, offset)

    def _added(self, r: Any) -> list[Any]:
        """r of the formula, as the accumulators lie."""
        b = self.b
        if self.paired:
            wide = r if r.type.element is i16 else b.zext(r, vec(i16, r.type.count))
            parts = [b.bitcast(half, self.ints) for half in unpack(b, wide, const(wide.type, 0))]
        else:
            parts = [b.zext(r, self.ints)]
        moved = [b.sub(part, self.add_zero_point) for part in parts]
        return [b.fmul(b.sitofp(part, self.floats), self.add_scale) for part in moved]

    def _store_wide(self, accs: list[Any], target: Any, row: Any) -> None:
        b, simd = self.b, self.simd
        offset = b.mul(b.mul(row, self.field(block.ROW_STEP)), i64(4))

        def per_row(index: int, kind: Any) -> Any:
            return splat(b, load(b, kind, self.field(index, ptr), offset), simd.lanes)

        zero_point = per_row(block.ROW_ZERO_POINT, i32)
        values = [b.sub(a, b.mul(zero_point, s)) for a, s in zip(accs, self.col_sums, strict=True)]
        if self.kind == "f32":
            row_scale = per_row(block.ROW_SCALE, f32)
            for j, value in enumerate(values):
                real = b.fmul(b.sitofp(value, self.floats), b.fmul(row_scale, self.scale[j]))
                values[j] = clamp(b, b.fadd(real, self.bias[j]), self.lo, self.hi)
        if self.paired:
            place = np.argsort(simd.columns(2 * simd.lanes)).reshape(2, simd.lanes)
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [shuffle(b, x, y, half.tolist()) for x, y in pairs for half in place]
        for j, value in enumerate(values):
            store(b, value, target, 4 * simd.lanes * j)
