"""The product of two activations: b is packed when the call runs, then multiplied as a weight is.

    b        uint8 values with zero point 128, (..., K, N), or (..., N, K) "transposed"
    panels   as pack.py's, of b - 128, for each matrix: (P, steps, NR, 4) int8
    bias     -(a_zero_point - offset) * sum_k (b[k, n] - 128), int32, padded to whole panels; the
             offset of the tier's dot product (simd.Dot)

A task of the packing is one panel of one matrix. Columns of a panel beyond N hold what lies behind
b or repeat its last column: the product drops them. Up to NR - 1 elements behind b may be read.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from fastq.kernels import block, gemm
from fastq.kernels.call import ITEM_BYTES, Call, Place, View, collapse
from fastq.kernels.layout import copy_row
from fastq.kernels.lines import (
    ELEMENT,
    MAX_BOUNDED,
    broadcast,
    emit_converted,
    emit_interleaved,
    emit_loop,
)
from fastq.kernels.native import native
from fastq.kernels.norms import inverse_sums_row
from fastq.kernels.pack import step_starts
from fastq.kernels.pointwise import fill_row
from fastq.kernels.products import ACTIVATIONS, block_rows
from fastq.kernels.requantize import spell
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    KR,
    address,
    const,
    emitter,
    i8,
    i16,
    i32,
    i64,
    least,
    load,
    ptr,
    shuffle,
    splat,
    store,
    vec,
)
from fastq.kernels.tiles import BYTES_PER_NANOSECOND, choose_nr, choose_tile, nanoseconds

(
    B, B_0, B_1, B_ROW, K, N, GROUPS, PANELS, STEPS, PANEL_BYTES, OUT, BIAS, A_ZERO_POINT, FIELDS,
) = range(14)  # fmt: skip


def emit_pack_rows(b: Any, kind: str, nr: int, isa: str, field: Any, place: Any) -> None:
    """Emits the packing of one panel of (K, N). place is (first column, panel, bias)."""
    source, out, bias = place
    last = b.sub(field(K), i64(1))

    def pack(step: Any, sums: Any, edge: bool) -> list[Any]:
        start, counted = _step_start(b, step, field(K))
        lines, total = [], const(vec(i16, nr), -KR * 128)
        for i in range(KR):
            k = b.add(start, i64(i))
            row = least(b, k, last) if edge else k
            line = load(b, vec(ELEMENT[kind], nr), source, b.mul(row, field(B_ROW)))
            if edge:
                new = b.and_(b.icmp_signed(">=", k, counted), b.icmp_signed("<=", k, last))
                line = b.select(new, line, const(line.type, 128))
            total = b.add(total, emit_converted(b, line, i16))
            lines.append(emit_converted(b, line, i8))
        quads = b.xor(emit_interleaved(b, lines), const(vec(i8, KR * nr), -128))
        quads = shuffle(b, quads, quads, panel_order(isa, nr))
        store(b, quads, out, b.mul(step, i64(KR * nr)))
        return [b.add(sums, b.sext(total, sums.type))]

    whole = b.sdiv(field(K), i64(KR))
    step, (sums,) = emit_loop(
        b, i64(0), whole, 1, [const(vec(i32, nr), 0)], lambda s, t: pack(s, t, False)
    )
    _, (sums,) = emit_loop(b, step, field(STEPS), 1, [sums], lambda s, t: pack(s, t, True))
    factor = splat(b, b.trunc(b.neg(field(A_ZERO_POINT)), i32), nr)
    sums = shuffle(b, sums, sums, emitter(isa).columns(nr))
    store(b, b.mul(sums, factor), bias)


def emit_pack_columns(b: Any, kind: str, nr: int, isa: str, field: Any, place: Any) -> None:
    """Emits the packing of one panel of (N, K). place is (matrix, panel, bias, first column)."""
    source, out, bias, first = place
    item, last = ITEM_BYTES[kind], b.sub(field(N), i64(1))
    simd, lanes = emitter(isa), vec(i64, KR)
    cols, side = i64(simd.cols), simd.side_by_side
    iota = lanes([0, 1, 2, 3])
    order = ir.Constant(vec(i64, nr), simd.columns(nr))

    def column(j: Any) -> None:
        n = b.add(first, b.extract_element(order, j))
        n = least(b, n, last)
        line = address(b, source, b.mul(n, field(B_ROW)))
        # of its vector of columns the first `side` weights of each, then the next
        vector, lane = b.udiv(j, cols), b.urem(j, cols)
        at = b.add(b.mul(vector, b.mul(cols, i64(KR))), b.mul(lane, i64(side)))
        target = address(b, out, at)

        def pack(step: Any, sums: Any, edge: bool) -> list[Any]:
            start, counted = _step_start(b, step, field(K))
            quad = load(b, vec(ELEMENT[kind], KR), line, b.mul(start, i64(item)))
            if edge:
                k = b.add(splat(b, start, KR), iota)
                old = b.icmp_signed("<", k, splat(b, counted, KR))
                beyond = b.icmp_signed(">=", k, splat(b, field(K), KR))
                quad = b.select(b.or_(old, beyond), const(quad.type, 128), quad)
            moved = b.xor(emit_converted(b, quad, i8), const(vec(i8, KR), -128))
            for k in range(0, KR, side):
                part = shuffle(b, moved, moved, list(range(k, k + side)))
                store(b, part, target, b.add(b.mul(step, i64(KR * nr)), i64(k * simd.cols)))
            return [b.add(sums, b.sext(moved, sums.type))]

        whole = b.sdiv(field(K), i64(KR))
        step, (sums,) = emit_loop(
            b, i64(0), whole, 1, [const(vec(i32, KR), 0)], lambda s, t: pack(s, t, False)
        )
        _, (sums,) = emit_loop(b, step, field(STEPS), 1, [sums], lambda s, t: pack(s, t, True))
        pairs = b.add(shuffle(b, sums, sums, [0, 1]), shuffle(b, sums, sums, [2, 3]))
        total = b.add(*(b.extract_element(pairs, i32(i)) for i in range(2)))
        factor = b.trunc(b.neg(field(A_ZERO_POINT)), i32)
        store(b, b.mul(total, factor), bias, b.mul(j, i64(4)))

    emit_loop(b, i64(0), i64(nr), 1, [], column)


def panel_order(isa: str, nr: int) -> list[int]:
    """Where the weights of a K-step, column by column, go in a panel (pack.pack_panels)."""
    simd = emitter(isa)
    side = simd.side_by_side
    index = np.arange(nr * KR).reshape(nr, KR)[simd.columns(nr)]
    index = index.reshape(nr // simd.cols, simd.cols, KR // side, side)
    return [int(i) for i in index.swapaxes(1, 2).reshape(-1)]


def _step_start(b: Any, step: Any, k: Any) -> tuple[Any, Any]:
    """Where a K-step begins (pack.step_starts), and the first k that no step before counts."""
    counted = b.mul(step, i64(KR))
    end = b.sub(k, i64(KR))
    start = least(b, counted, end)
    return b.select(b.icmp_signed("<", start, i64(0)), i64(0), start), counted


@intrinsic(prefer_literal=True)
def _pack_panel(
    typingctx: Any, config: Any, args: Any, matrix: Any, panel: Any, out: Any, bias: Any
) -> Any:
    kind, nr, transposed, isa = (t.literal_value for t in config.types[:4])
    signature = types.void(config, args, *[types.int64] * 4)

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        fields = b.inttoptr(b.ptrtoint(values[1], i64), ptr)
        matrix, out, bias = (b.inttoptr(values[i], ptr) for i in (2, 4, 5))
        first = b.mul(values[3], i64(nr))

        def field(index: int) -> Any:
            return load(b, i64, fields, 8 * index)

        if transposed:
            emit_pack_columns(b, kind, nr, isa, field, (matrix, out, bias, first))
        else:
            start = address(b, matrix, b.mul(first, i64(ITEM_BYTES[kind])))
            emit_pack_rows(b, kind, nr, isa, field, (start, out, bias))
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def pack_kernel(kind: str, nr: int, transposed: bool, isa: str) -> Any:
    """kind "u8" or "u8x2", of b."""
    config = (kind, nr, int(transposed), isa, sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            panel, matrix = task % args[PANELS], task // args[PANELS]
            b = args[B] + matrix // args[GROUPS] * args[B_0] + matrix % args[GROUPS] * args[B_1]
            out = args[OUT] + task * args[PANEL_BYTES]
            _pack_panel(config, args, b, panel, out, args[BIAS] + 4 * nr * task)

    return kernel


def matmul_row(
    call: Call,
    a: View,
    b: View,
    out: View,
    multiplier: float,
    isa: str,
    a_zero_point: int = 0,
    transpose_b: bool = False,
    mean: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
) -> None:
    """Appends the rows of reference.matmul for a tier.

    a (..., M, K), b (..., K, N) or (..., N, K) and out (..., M, N) of the tier's kind; out may be
    float32. The last axes have unit stride, the leading ones broadcast to out's and join to at most
    two. Where they do not join to one, a and out lie at offsets (At), and there is a product for
    each place of the first. Of a row of a, 4 values are read at least.
    """
    m, n = out.shape[-2:]
    k = a.shape[-1]
    leading = out.shape[:-2]
    if not np.prod(out.shape):
        return
    real = out.kind == "f32"
    if k == 0:
        whole = View(out.place, (*out.shape[:-1], n * out.item), (*out.strides[:-1], 1), "u8")
        fill_row(call, whole if real else out, min(max(zero_point, qmin), qmax))
        return
    wide = [broadcast(v, (*leading, *v.shape[-2:])) for v in (out, a, b)]
    (outer, groups, _, _), (out_steps, a_steps, b_steps) = collapse(wide, 4, keep=2)
    nr = choose_nr(isa, n)
    starts = step_starts(max(k, KR))
    tile = choose_tile(isa, nr, m, len(starts))
    panels = -(-n // nr)
    panel_bytes = len(starts) * nr * KR
    packed = call.scratch(outer * groups * panels * panel_bytes)
    bias = call.scratch(outer * groups * panels * nr * 4)
    call.row(
        pack_kernel(b.kind, nr, transpose_b, isa),
        FIELDS,
        outer * groups * panels,
        {
            B_0: b_steps[0],
            B_1: b_steps[1],
            B_ROW: b_steps[2],
            K: k,
            N: n,
            GROUPS: groups,
            PANELS: panels,
            STEPS: len(starts),
            PANEL_BYTES: panel_bytes,
            A_ZERO_POINT: a_zero_point - emitter(isa).offset,
        },
        {B: b.place, OUT: packed, BIAS: bias},
        outer * groups * k * n * 2 / BYTES_PER_NANOSECOND,
    )
    tasks = groups * -(-panels // tile.panels)
    mc = block_rows(tile, m, a_steps[2], tasks)
    scale = np.full(groups * panels * nr, multiplier, np.float32)
    places: dict[int, Place] = {
        block.OFFSETS: (starts * a.item).astype(np.int32),
        block.SCALE: scale,
    }
    if real:  # its acc - (row_zero_point - offset) * col_sums is acc + bias, which was packed
        epilogue = spell("f32", "rows" * mean, bounded=True)
        rows = groups * m if mean else 1
        places |= {
            block.CLAMP: np.array([-np.inf, np.inf], np.float32),
            block.ROW_SCALE: np.ones(1, np.float32),
            block.ROW_ZERO_POINT: np.full(rows, emitter(isa).offset - 1, np.int32),
        }
    else:
        largest = 255.0 * abs(multiplier) * (1 if mean else 255 * k)
        epilogue = spell(out.kind, "rows" * mean, largest <= MAX_BOUNDED)
        places |= {
            block.CLAMP: np.array([qmin - zero_point, qmax - zero_point], np.float32),
            block.OUT_ZERO_POINT: np.array([zero_point], np.int32),
        }
    if mean:
        sums = call.dense((outer, groups, m), "f32")
        wide_a = View(a.place, (outer, groups, m, k), (*a_steps[:3], a.item), a.kind)
        inverse_sums_row(call, wide_a, sums)
    for i in range(outer):
        if mean:
            places[block.ROW_SCALE] = sums.place + i * sums.strides[0]
        shared = bias + i * groups * panels * nr * 4
        call.row(
            gemm.gemm_kernel(tile, epilogue, "affine"),
            block.FIELDS,
            tasks * -(-m // mc),
            {
                block.A_ROW: a_steps[2],
                block.A_GROUP: a_steps[1],
                block.B_PANEL: panel_bytes,
                block.STEPS: len(starts),
                block.OUT_ROW: out_steps[2],
                block.OUT_GROUP: out_steps[1],
                block.GROUPS: groups,
                block.M: m,
                block.MC: mc,
                block.N: n,
                block.ROW_STEP: int(mean),
            },
            {
                block.A: _moved(a, i * a_steps[0]),
                block.B: packed + i * groups * panels * panel_bytes,
                block.OUT: _moved(out, i * out_steps[0]),
                block.BIAS: np.zeros(scale.size, np.float32) if real else shared,
                block.COL_SUMS: shared,
                **places,
            },
            nanoseconds(isa, groups * m * n * len(starts) * KR),
        )


def matmul_array_row(call: Call, a: View, b: View, out: View, isa: str, *parameters: Any) -> None:
    """matmul_row of dense uint8 arrays, beyond which nothing may be read."""
    *_, k = a.shape
    kind = ACTIVATIONS[emitter(isa).a_bytes]
    transpose_b = parameters[2]
    if kind != a.kind or k < KR:
        a = _staged(call, a, kind)
    if k < KR or (not transpose_b and out.shape[-1] % choose_nr(isa, out.shape[-1])):
        b = _staged(call, b, b.kind)
    multiplier, *rest = parameters
    matmul_row(call, a, b, out, multiplier, isa, *rest)


def _staged(call: Call, x: View, kind: str) -> View:
    """A dense copy in the workspace."""
    copy = call.dense(x.shape, kind)
    copy_row(call, x, copy)
    return copy


def _moved(view: View, size: int) -> Place:
    return view.place + size if size else view.place
