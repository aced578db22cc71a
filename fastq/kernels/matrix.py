"""The products of gemm.py on tile registers: 16 rows x 16 columns x 64 products at once (AMX).

    out[m, n] = epilogue(sum over steps s, i < depth of  a[row m, OFFSETS[s] + i] * b[n, s, i])

The argument block, the panels and the epilogues are gemm.py's, with three differences:

    rows     come in bands of BAND <= 16, one tile register each: rows of a band lie A_ROW, OUT_ROW
             and ADD_ROW apart. ROW_TABLE has for each band the offsets of its first row in A, OUT
             and ADD, and the row's number. M and MC count bands. Bands may overlap: a line of 17
             pixels is two of 9, and the row they share is computed twice, the same.
    K-steps  are `depth` activations long, up to 64: as many as TILE_CONFIG says.
    edges    columns beyond N are not stored: a mask says so.

        NR columns                a K-step: a tile of activations for each band (BAND x depth),
      +-----+-----+  band 0       a tile of weights for each 16 columns (depth / 4 rows of a panel),
      | acc | acc |               and a product for each pair of them.
      +-----+-----+  band 1       Four of the eight registers accumulate, two and two hold operands:
      | acc | acc |               as few loads as there are products. Panels of more columns than
      +-----+-----+               that take several passes over K.

The accumulators begin at the bias (a load of the same row 16 times), go to the stack, and from
there row by row through the epilogue.

A task is one (image, block of MC bands, group, panel), the last running fastest.
"""

from __future__ import annotations

import functools
from dataclasses import astuple
from typing import Any

import numpy as np
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels import block as f
from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.gemm import Tile
from fastq.kernels.lines import emit_loop
from fastq.kernels.requantize import Epilogue
from fastq.kernels.signature import SIGNATURE, sources_digest
from fastq.kernels.simd import (
    KR,
    Amx,
    address,
    branch_back,
    copy_bytes,
    emitter,
    i8,
    i16,
    i32,
    i64,
    load,
    ptr,
    store,
)

ROWS, ROW_BYTES = 16, 64  # of a tile register
ACCUMULATORS = 4  # registers 0 to 3
A_TILES, B_TILES = (4, 5), (6, 7)
BAND_FIELDS = 4  # of ROW_TABLE


def tile_config(band: int, depth: int) -> NDArray[np.uint8]:
    """The 64 bytes that say how many rows and bytes each register has (palette 1)."""
    config = np.zeros(64, np.uint8)
    config[0] = 1
    row_bytes, rows = config[16:48].view(np.uint16), config[48:64]
    row_bytes[:8], rows[:8] = ROW_BYTES, band
    row_bytes[list(A_TILES)] = depth
    rows[list(B_TILES)] = depth // KR
    return config


def bands_of(m: int, line: int) -> tuple[int, NDArray[np.int64]]:
    """The rows of a band, and the first ones of the bands that cover m rows, line by line."""
    count = -(-line // ROWS)
    band = -(-line // count)
    firsts = np.minimum(np.arange(count) * band, line - band)
    return band, np.add.outer(np.arange(0, m, line), firsts).reshape(-1)


class _Emulated:
    """Tile registers in memory, with Amx's methods, in portable IR."""

    def __init__(self, b: Any, simd: Amx, config: Any) -> None:
        self.simd, self.config = simd, config
        with b.goto_entry_block():
            memory = b.alloca(ir.ArrayType(i8, 8 * ROWS * ROW_BYTES))
            memory.align = 64
            memory.type = ptr
        self.memory = memory

    def _row(self, b: Any, tile: int, row: Any) -> Any:
        return address(b, self.memory, b.add(b.mul(row, i64(ROW_BYTES)), i64(tile * 1024)))

    def _rows(self, b: Any, tile: int) -> Any:
        return b.zext(load(b, i8, self.config, 48 + tile), i64)

    def _bytes(self, b: Any, tile: int) -> Any:
        return b.zext(load(b, i16, self.config, 16 + 2 * tile), i64)

    def tile_zero(self, b: Any, tile: int) -> None:
        for row in range(ROWS):
            store(b, self.simd.acc([0] * self.simd.lanes), self._row(b, tile, i64(row)))

    def tile_load(self, b: Any, tile: int, base: Any, stride: Any) -> None:
        def row(r: Any) -> None:
            source = address(b, base, b.mul(r, stride))
            copy_bytes(b, self._row(b, tile, r), source, self._bytes(b, tile))

        emit_loop(b, i64(0), self._rows(b, tile), 1, (), row)

    def tile_store(self, b: Any, tile: int, base: Any, stride: Any) -> None:
        def row(r: Any) -> None:
            target = address(b, base, b.mul(r, stride))
            copy_bytes(b, target, self._row(b, tile, r), self._bytes(b, tile))

        emit_loop(b, i64(0), self._rows(b, tile), 1, (), row)

    def tile_dot(self, b: Any, acc: int, a: int, w: int) -> None:
        simd = self.simd

        def row(r: Any) -> None:
            sums, activations = self._row(b, acc, r), self._row(b, a, r)

            def quad(q: Any, total: Any) -> list[Any]:
                x = simd.load_a(b, activations, b.mul(q, i64(KR)))
                return [simd.dot(b, total, x, simd.load_b(b, self._row(b, w, q), 0))]

            start = [load(b, simd.acc, sums)]
            _, (total,) = emit_loop(b, i64(0), self._rows(b, w), 1, start, quad)
            store(b, total, sums)

        emit_loop(b, i64(0), self._rows(b, acc), 1, (), row)


def emit_bands(b: Any, tile: Tile, epilogue: str, args: Any, place: Any) -> None:
    """Emits bands m to m_end against one panel; place is (image, group, panel, m, m_end)."""
    image, group, panel, m, m_end = place
    fields = b.inttoptr(args, ptr)

    def field(index: int, kind: Any = i64) -> Any:
        return load(b, kind, fields, 8 * index)

    simd = emitter(tile.isa)
    assert isinstance(simd, Amx)
    unit = simd if simd.native else _Emulated(b, simd, field(f.TILE_CONFIG, ptr))
    kind, _, added = epilogue.partition("+")
    nr = tile.nr
    first_column = b.mul(panel, i64(nr))
    count = b.udiv(b.add(field(f.N), i64(nr - 1)), i64(nr))
    at = b.add(b.mul(group, count), panel)
    weights = address(b, field(f.B, ptr), b.mul(at, field(f.B_PANEL)))
    columns = b.mul(at, i64(4 * nr))
    end = Epilogue(b, simd, kind, nr // simd.lanes, [columns], field, bool(added))
    bias = None if kind in ("s32", "f32") else address(b, field(f.BIAS, ptr), columns)
    steps, offsets = field(f.STEPS), field(f.OFFSETS, ptr)
    step_bytes = b.udiv(field(f.B_PANEL), steps)
    valid = b.sub(field(f.N), first_column)
    table, band = field(f.ROW_TABLE, ptr), field(f.BAND)
    with b.goto_entry_block():
        sums = b.alloca(ir.ArrayType(i32, tile.mr * nr))
        sums.align = 64
        sums.type = ptr  # llvmlite gives it a typed pointer, which LLVM no longer knows

    def operand(base: int, item: int) -> Any:
        """The address of an operand in this image, group and panel; fields: base, row, image."""
        offset = b.add(b.mul(image, field(base + 2)), b.mul(group, field(base + 3)))
        return address(b, field(base, ptr), b.add(offset, b.mul(first_column, i64(item))))

    a, out = operand(f.A, 0), operand(f.OUT, ITEM_BYTES[kind])
    add = operand(f.ADD, ITEM_BYTES[kind]) if added else None
    a_row, out_row = field(f.A_ROW), field(f.OUT_ROW)

    def emit(m: Any, bands: int) -> None:
        """That many bands from m on."""
        entries = [
            address(b, table, b.mul(b.add(m, i64(i)), i64(8 * BAND_FIELDS))) for i in range(bands)
        ]
        a_bands = [address(b, a, load(b, i64, entry)) for entry in entries]
        at_once = ACCUMULATORS // bands
        vectors = range(nr // simd.lanes)
        for first in vectors[::at_once]:
            some = list(vectors[first : first + at_once])
            for i in range(bands):
                for j in some:
                    acc = i * len(some) + j - first
                    if bias is None:
                        unit.tile_zero(b, acc)
                    else:
                        unit.tile_load(b, acc, address(b, bias, 4 * simd.lanes * j), i64(0))
            here = address(b, weights, ROW_BYTES * first)
            _emit_k_loop(
                b, unit, a_bands, a_row, here, len(some), KR * nr, offsets, steps, step_bytes
            )
            for i in range(bands):
                for j in some:
                    target = address(b, sums, 4 * (i * ROWS * nr + j * simd.lanes))
                    unit.tile_store(b, i * len(some) + j - first, target, i64(4 * nr))
        for i, entry in enumerate(entries):
            target = address(b, out, load(b, i64, entry, 8))
            more = None if add is None else address(b, add, load(b, i64, entry, 16))
            number = load(b, i64, entry, 24)

            def row(r: Any, i=i, target=target, more=more, number=number) -> None:  # type: ignore[no-untyped-def]
                line = address(b, sums, b.mul(b.add(r, i64(i * ROWS)), i64(4 * nr)))
                accs = [load(b, simd.acc, line, 4 * simd.lanes * j) for j in vectors]
                added_row = None if more is None else [address(b, more, b.mul(r, field(f.ADD_ROW)))]
                end.store(
                    [accs], [address(b, target, b.mul(r, out_row))], [b.add(number, r)],
                    added_row, valid,
                )  # fmt: skip

            emit_loop(b, i64(0), band, 1, (), row)

    bands = tile.mr // ROWS
    m, _ = emit_loop(b, m, m_end, bands, (), lambda m: emit(m, bands))
    emit_loop(b, m, m_end, 1, (), lambda m: emit(m, 1))


def _emit_k_loop(
    b: Any, unit: Any, a_bands: list[Any], a_row: Any, weights: Any, vectors: int, b_row: int,
    offsets: Any, steps: Any, step_bytes: Any,
) -> None:  # fmt: skip
    """Bands times `vectors` x 16 columns, into the accumulators, [band][vector]."""
    entry = b.block
    loop, done = b.append_basic_block("k"), b.append_basic_block("k.done")
    b.branch(loop)
    b.position_at_end(loop)
    step, panel = b.phi(i64), b.phi(ptr)
    offset = b.sext(load(b, i32, offsets, b.mul(step, i64(4))), i64)
    for j in range(vectors):
        w = B_TILES[j % 2]
        unit.tile_load(b, w, address(b, panel, ROW_BYTES * j), i64(b_row))
        for i, band in enumerate(a_bands):
            if j == 0 or len(a_bands) > len(A_TILES):
                unit.tile_load(b, A_TILES[i % 2], address(b, band, offset), a_row)
            unit.tile_dot(b, i * vectors + j, A_TILES[i % 2], w)
    following = b.add(step, i64(1))
    next_panel = address(b, panel, step_bytes)
    last = b.block  # not `loop` where the registers are emulated
    branch_back(b, b.icmp_signed("<", following, steps), loop, done)
    step.add_incoming(i64(0), entry)
    step.add_incoming(following, last)
    panel.add_incoming(weights, entry)
    panel.add_incoming(next_panel, last)
    b.position_at_end(done)


@intrinsic(prefer_literal=True)
def _bands(
    typingctx: Any, config: Any, args: Any, image: Any, group: Any, panel: Any, m: Any, end: Any
) -> Any:
    *tile, epilogue = (t.literal_value for t in config.types[:-1])
    signature = types.void(config, args, *[types.int64] * 5)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        fields = builder.ptrtoint(values[1], i64)
        emit_bands(builder, Tile(*tile), epilogue, fields, values[2:])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic(prefer_literal=True)
def _hold(typingctx: Any, config: Any, args: Any, begins: Any) -> Any:
    """Configures the tile registers of this thread, or lets them go."""

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        simd = emitter(config.types[0].literal_value)
        assert isinstance(simd, Amx)
        if simd.native and begins.literal_value:
            fields = b.inttoptr(b.ptrtoint(values[1], i64), ptr)
            simd.configure(b, load(b, ptr, fields, 8 * f.TILE_CONFIG))
        elif simd.native:
            simd.release(b)
        return context.get_dummy_value()

    return types.void(config, args, begins), codegen


@functools.cache
def matrix_kernel(tile: Tile, epilogue: str) -> Any:
    """The compiled kernel of a tile; epilogues as of gemm_kernel."""
    config = (*astuple(tile), epilogue, sources_digest())
    M, MC, N, GROUPS = f.M, f.MC, f.N, f.GROUPS
    nr = tile.nr

    @cfunc(SIGNATURE, cache=True)
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        panels = (args[N] + nr - 1) // nr
        blocks = (args[M] + args[MC] - 1) // args[MC]
        _hold(config, args, 1)
        for task in range(begin, end):
            panel = task % panels
            group = task // panels % args[GROUPS]
            block = task // (panels * args[GROUPS]) % blocks
            image = task // (panels * args[GROUPS] * blocks)
            m = block * args[MC]
            _bands(config, args, image, group, panel, m, min(m + args[MC], args[M]))
        _hold(config, args, 0)

    return kernel
