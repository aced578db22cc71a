"""From int32 accumulators to the output: the one place that rounds and clamps them.

    s32   acc - row_zero_point * col_sum
    f32   clamp(float32(that) * (row_scale * scale) + bias, lo, hi)
    u8    int32(rint(clamp(float32(acc + bias) * scale [+ r], lo, hi))) + out_zero_point
    s16   the same, stored as int16
    r     float32(add - add_zero_point) * add_scale, where something of the output's shape is added

For u8, bias already holds -x_zero_point * col_sum, and (lo, hi) = (qmin, qmax) - out_zero_point:
clamping between integers before rounding equals clamping after it, and keeps the conversion
in range. No operation may be contracted or reordered: the bits are part of the contract.
"""

from __future__ import annotations

from typing import Any

from fastq.kernels import block
from fastq.kernels.simd import (
    address,
    clamp,
    f32,
    i8,
    i16,
    i32,
    i64,
    load,
    ptr,
    rint,
    splat,
    store,
    vec,
)


def emit_epilogue(
    b: Any,
    epilogue: str,
    accs: list[list[Any]],
    targets: list[Any],
    columns: list[Any],
    rows: list[Any],
    field: Any,
    add_rows: list[Any] | None = None,
) -> None:
    """Stores accs[i] (vectors that cover the tile's columns in order) at targets[i].

    columns are the panels' byte offsets into the per-column arrays, rows[i] is the index into the
    per-row arrays; field(index, kind) reads the argument block. add_rows are the addresses of what
    is added.
    """
    lanes = accs[0][0].type.count
    ints, floats = vec(i32, lanes), vec(f32, lanes)
    vectors = len(accs[0]) // len(columns)

    def per_column(index: int, kind: Any) -> list[Any]:
        base = field(index, ptr)
        panels = [address(b, base, offset) for offset in columns]
        return [load(b, kind, p, 4 * lanes * j) for p in panels for j in range(vectors)]

    def scalar(index: int, kind: Any, element: int = 0) -> Any:
        return splat(b, load(b, kind, field(index, ptr), 4 * element), lanes)

    def per_row(index: int, kind: Any, row: Any) -> Any:
        offset = b.mul(b.mul(row, field(block.ROW_STEP)), i64(4))
        return splat(b, load(b, kind, field(index, ptr), offset), lanes)

    if epilogue in ("u8", "s16"):
        stored = i8 if epilogue == "u8" else i16
        bias, scale = per_column(block.BIAS, ints), per_column(block.SCALE, floats)
        lo, hi = scalar(block.CLAMP, f32), scalar(block.CLAMP, f32, 1)
        zero_point = scalar(block.OUT_ZERO_POINT, i32)
        if add_rows:
            add_scale, add_zero = scalar(block.ADD_SCALE, f32), scalar(block.ADD_ZERO_POINT, i32)
        for i, (acc_row, target) in enumerate(zip(accs, targets, strict=True)):
            for j, acc in enumerate(acc_row):
                at = stored.width // 8 * lanes * j
                value = b.fmul(b.sitofp(b.add(acc, bias[j]), floats), scale[j])
                if add_rows:
                    r = b.zext(load(b, vec(stored, lanes), add_rows[i], at), ints)
                    value = b.fadd(value, b.fmul(b.sitofp(b.sub(r, add_zero), floats), add_scale))
                q = b.add(rint(b, clamp(b, value, lo, hi)), zero_point)
                store(b, b.trunc(q, vec(stored, lanes)), target, at)
        return

    col_sums = per_column(block.COL_SUMS, ints)
    if epilogue == "f32":
        bias, scale = per_column(block.BIAS, floats), per_column(block.SCALE, floats)
        lo, hi = scalar(block.CLAMP, f32), scalar(block.CLAMP, f32, 1)
    for acc_row, target, row in zip(accs, targets, rows, strict=True):
        zero_point = per_row(block.ROW_ZERO_POINT, i32, row)
        if epilogue == "f32":
            row_scale = per_row(block.ROW_SCALE, f32, row)
        for j, acc in enumerate(acc_row):
            value = b.sub(acc, b.mul(zero_point, col_sums[j]))
            if epilogue == "f32":
                real = b.fmul(b.sitofp(value, floats), b.fmul(row_scale, scale[j]))
                value = clamp(b, b.fadd(real, bias[j]), lo, hi)
            store(b, value, target, 4 * lanes * j)
