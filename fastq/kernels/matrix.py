"""The products of gemm.py on tile registers: 16 rows x 16 columns x 64 products at once (AMX).

    out[m, n] = epilogue(sum over steps s, i < depth of  a[row m, OFFSETS[s] + i] * b[n, s, i])

The argument block, the panels and the epilogues are gemm.py's, with three differences:

    rows     come in bands of BAND <= 16, one tile register each: rows of a band lie A_ROW, OUT_ROW
             and ADD_ROW apart. ROW_TABLE has for each band the offsets of its first row in A, OUT
             and ADD, and the row's number; an entry beyond the last is read, not used. M and MC
             count bands. Bands may overlap: a line of 17 pixels is two of 9, and the row they share
             is computed twice, the same.
    K-steps  are `depth` activations long, up to 64: as many as TILE_CONFIG says.
    edges    columns beyond N are not stored: a mask says so.

        NR columns                a K-step: a tile of activations for each band (BAND x depth),
      +-----+-----+  band 0       a tile of weights for each 16 columns (depth / 4 rows of a panel),
      | acc | acc |               and a product for each pair of them.
      +-----+-----+  band 1       Four of the eight registers accumulate, two and two hold operands:
      | acc | acc |               as few loads as there are products. Panels of more columns than
      +-----+-----+               that take several passes over K.

The accumulators begin at the bias (a load of the same row 16 times) and go to the stack; from there
they go row by row through the epilogue, a few rows at a time between products of the next block.

A task is one (image, block of MC bands, group, panel), the last running fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import astuple
from typing import Any, ClassVar

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels import block as f
from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.gemm import Tile, task_place
from fastq.kernels.lines import emit_loop
from fastq.kernels.native import native
from fastq.kernels.requantize import EpilogueEmitter, spelled
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    KR,
    Amx,
    address,
    branch_back,
    copy_bytes,
    emitter,
    fields_of,
    i8,
    i16,
    i32,
    i64,
    least,
    load,
    prefetch,
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
    field = fields_of(b, b.inttoptr(args, ptr))
    simd = emitter(tile.isa)
    assert isinstance(simd, Amx)
    unit = simd if simd.native else _Emulated(b, simd, field(f.TILE_CONFIG, ptr))
    parts = spelled(epilogue)
    kind, added, *_ = parts
    nr = tile.nr
    first_column = b.mul(panel, i64(nr))
    count = b.udiv(b.add(field(f.N), i64(nr - 1)), i64(nr))
    at = b.add(b.mul(group, count), panel)
    weights = address(b, field(f.B, ptr), b.mul(at, field(f.B_PANEL)))
    columns = b.mul(at, i64(4 * nr))
    end = EpilogueEmitter(b, simd, parts, nr // simd.lanes, [columns], field)
    bias = None if kind in ("s32", "f32") else address(b, field(f.BIAS, ptr), columns)
    steps, offsets = field(f.STEPS), field(f.OFFSETS, ptr)
    step_bytes = b.udiv(field(f.B_PANEL), steps)
    valid = b.sub(field(f.N), first_column)
    table, band = field(f.ROW_TABLE, ptr), field(f.BAND)
    row_bytes = 4 * nr
    at_once = tile.mr // ROWS

    def operand(base: int, item: int) -> Any:
        """The address of an operand in this image, group and panel; fields: base, row, image."""
        offset = b.add(b.mul(image, field(base + 2)), b.mul(group, field(base + 3)))
        return address(b, field(base, ptr), b.add(offset, b.mul(first_column, i64(item))))

    a, a_row = operand(f.A, 0), field(f.A_ROW)
    out = operand(f.OUT, ITEM_BYTES[kind]), field(f.OUT_ROW)
    add = (operand(f.ADD, ITEM_BYTES[added]), field(f.ADD_ROW)) if added else None
    waiting = _Waiting(b, end, tile, band, out, add, valid)
    # Rows are stored after the last product of a K-step, so many that all are done in the time of
    # one block. Wide panels are for short sums, where storing takes longer: after each product.
    pauses = -(-nr // simd.lanes * at_once // (1 if tile.wide else ACCUMULATORS))
    pauses = b.mul(steps, i64(pauses))
    share = b.udiv(b.add(b.mul(band, i64(at_once)), b.sub(pauses, i64(1))), pauses)

    def pause(last: bool) -> None:
        if tile.wide or last:
            waiting.emit_rows(share)

    def emit(m: Any, bands: int) -> None:
        """That many bands from m on."""
        entries = [
            address(b, table, b.mul(b.add(m, i64(i)), i64(8 * BAND_FIELDS))) for i in range(bands)
        ]
        a_bands = [address(b, a, load(b, i64, entry)) for entry in entries]
        together = ACCUMULATORS // bands
        vectors = range(nr // simd.lanes)
        for first in vectors[::together]:
            some = vectors[first : first + together]
            accs = [(i, j, i * len(some) + j - first) for i in range(bands) for j in some]
            for _, j, acc in accs:
                if bias is None:
                    unit.tile_zero(b, acc)
                else:
                    unit.tile_load(b, acc, address(b, bias, 4 * simd.lanes * j), i64(0))
            here = address(b, weights, ROW_BYTES * first)
            _emit_k_loop(
                b, unit, a_bands, a_row, here, len(some), KR * nr, offsets, steps, step_bytes,
                pause,
            )  # fmt: skip
            for i, j, acc in accs:
                row = b.mul(band, i64(i * row_bytes))
                target = address(b, waiting.other(), b.add(row, i64(4 * simd.lanes * j)))
                unit.tile_store(b, acc, target, i64(row_bytes))
        waiting.emit_rows(None)
        waiting.take(entries[0], bands)

    m, _ = emit_loop(b, m, m_end, at_once, (), lambda m: emit(m, at_once))
    if at_once > 1:
        emit_loop(b, m, m_end, 1, (), lambda m: emit(m, 1))
    waiting.emit_rows(None)


class _Waiting:
    """Rows of sums that wait for their epilogue while the next block's products are computed.

    The tile unit and the vector units work at the same time then. Sums lie row by row in one of two
    buffers on the stack: rows of several bands follow each other. What changes is held in stack
    slots, which LLVM makes registers.

    left, left_in_band  how many rows wait, and how many of them in this band.
    number, line        the next row's number, and where its sums are.
    target, more        where it is stored, and what is added to it.
    entry, free         the band's entry of ROW_TABLE; the buffer that no rows wait in.
    """

    KINDS: ClassVar[dict[str, Any]] = {
        **dict.fromkeys(("left", "left_in_band", "number"), i64),
        **dict.fromkeys(("line", "target", "more", "entry", "free"), ptr),
    }

    def __init__(
        self, b: Any, end: EpilogueEmitter, tile: Tile, band: Any, out: Any, add: Any, valid: Any
    ) -> None:
        self.b, self.end, self.tile, self.band = b, end, tile, band
        self.out, self.add, self.valid = out, add, valid
        with b.goto_entry_block():
            self.buffers = self._slot(ir.ArrayType(i32, 2 * tile.mr * tile.nr), 64)
            self.slots = {name: self._slot(kind) for name, kind in self.KINDS.items()}
        for name, kind in self.KINDS.items():
            self._set(name, self.buffers if kind is ptr else i64(0))

    def _slot(self, kind: Any, align: int = 8) -> Any:
        slot = self.b.alloca(kind)
        slot.align = align
        slot.type = ptr  # llvmlite gives it a typed pointer, which LLVM no longer knows
        return slot

    def _get(self, name: str) -> Any:
        return self.b.load(self.slots[name], typ=self.KINDS[name])

    def _set(self, name: str, value: Any) -> None:
        self.b.store(value, self.slots[name])

    def other(self) -> Any:
        """The buffer that no rows wait in."""
        return self._get("free")

    def take(self, entry: Any, bands: int) -> None:
        """The rows of `bands` bands from an entry of ROW_TABLE on, in the free buffer."""
        b = self.b
        buffer = self._get("free")
        self._set("line", buffer)
        size = i64(4 * self.tile.mr * self.tile.nr)
        first = b.icmp_unsigned("==", b.ptrtoint(buffer, i64), b.ptrtoint(self.buffers, i64))
        self._set("free", address(b, self.buffers, b.select(first, size, i64(0))))
        self._set("left", b.mul(self.band, i64(bands)))
        self._begin_band(entry)

    def _begin_band(self, entry: Any) -> None:
        b = self.b
        self._set("entry", entry)
        self._set("left_in_band", self.band)
        self._set("number", load(b, i64, entry, 24))
        self._set("target", address(b, self.out[0], load(b, i64, entry, 8)))
        if self.add is not None:
            self._set("more", address(b, self.add[0], load(b, i64, entry, 16)))

    def emit_rows(self, most: Any) -> None:
        """Emits the epilogue of the next `most` rows; None: of all that are left."""
        b, left = self.b, self._get("left")
        if most is None:
            most = left
        most = least(b, most, left)
        emit_loop(b, i64(0), most, 1, (), lambda _: self._emit_row())

    def _emit_row(self) -> None:
        b, lanes, nr = self.b, self.end.simd.lanes, self.tile.nr
        line, target, number = self._get("line"), self._get("target"), self._get("number")
        accs = [load(b, self.end.simd.acc, line, 4 * j) for j in range(0, nr, lanes)]
        more = None
        if self.add is not None:
            more = [self._get("more")]
            if self.tile.wide:  # ask for the lines of the next block, far apart, which it waits for
                for place, stride in ((more[0], self.add[1]), (target, self.out[1])):
                    ahead = b.mul(stride, i64(self.tile.mr))
                    prefetch(b, place, ahead, 1, write=place is target)
        self.end.store([accs], [target], [number], more, self.valid)
        self._set("line", address(b, line, 4 * nr))
        self._set("left", b.sub(self._get("left"), i64(1)))
        self._set("number", b.add(number, i64(1)))
        self._set("target", address(b, target, self.out[1]))
        if self.add is not None:
            self._set("more", address(b, self._get("more"), self.add[1]))
        left = b.sub(self._get("left_in_band"), i64(1))
        self._set("left_in_band", left)
        with b.if_then(b.icmp_signed("==", left, i64(0))):
            self._begin_band(address(b, self._get("entry"), 8 * BAND_FIELDS))


def _emit_k_loop(
    b: Any, unit: Any, a_bands: list[Any], a_row: Any, weights: Any, vectors: int, b_row: int,
    offsets: Any, steps: Any, step_bytes: Any, pause: Callable[[bool], None],
) -> None:  # fmt: skip
    """Bands times `vectors` x 16 columns, into the accumulators, [band][vector].

    pause(last) emits what is done meanwhile after a product, maybe the last of a K-step.
    """
    entry = b.block
    loop, done = b.append_basic_block("k"), b.append_basic_block("k.done")
    b.branch(loop)
    b.position_at_end(loop)
    step, panel = b.phi(i64), b.phi(ptr)
    offset = b.sext(load(b, i32, offsets, b.mul(step, i64(4))), i64)
    held: dict[int, str] = {}  # operand register -> what is in it
    order = _products(len(a_bands), vectors)
    for n, (i, j) in enumerate(order):
        later = {name for i_j in order[n + 1 :] for name in (f"a{i_j[0]}", f"b{i_j[1]}")}
        for name, registers in ((f"a{i}", A_TILES), (f"b{j}", B_TILES)):
            if name not in held.values():
                register = next(r for r in registers if r not in held)
                held[register] = name
                if name == f"a{i}":
                    unit.tile_load(b, register, address(b, a_bands[i], offset), a_row)
                else:
                    unit.tile_load(b, register, address(b, panel, ROW_BYTES * j), i64(b_row))
        a, w = (next(r for r, name in held.items() if name == wanted)
                for wanted in (f"a{i}", f"b{j}"))  # fmt: skip
        unit.tile_dot(b, i * vectors + j, a, w)
        pause(n + 1 == len(order))
        for register, name in list(held.items()):
            if name not in later:  # an empty register leaves the CPU one more to load ahead into
                unit.tile_zero(b, register)
                del held[register]
    following = b.add(step, i64(1))
    next_panel = address(b, panel, step_bytes)
    end = b.block
    branch_back(b, b.icmp_signed("<", following, steps), loop, done)
    step.add_incoming(i64(0), entry)
    step.add_incoming(following, end)
    panel.add_incoming(weights, entry)
    panel.add_incoming(next_panel, end)
    b.position_at_end(done)


def _products(bands: int, vectors: int) -> list[tuple[int, int]]:
    """All pairs, each with an operand of the one before: at most two of a kind are held at once."""
    return [(i, j if i % 2 == 0 else vectors - 1 - j) for i in range(bands) for j in range(vectors)]


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
    width = tile.nr

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        _hold(config, args, 1)
        for task in range(begin, end):
            image, group, panel, m, last = task_place(args, task, width)
            _bands(config, args, image, group, panel, m, last)
        _hold(config, args, 0)

    return kernel
