"""u8 x s8 -> s32 matrix product with its epilogue: linear layers and convolutions alike.

    out[m, n] = epilogue(sum over steps s, i < 4 of  a[row m, OFFSETS[s] + i] * b[n, s, i])

A convolution is a product whose K loop walks a padded NHWC image by a table of offsets: no
im2col. A linear layer is one whose offsets are 0, 4, 8, ...

    a     activations, uint8 or int16 as the tier's `a_bytes` says. Row m of image i and group g
          starts at A + i*A_IMAGE + g*A_GROUP + m*A_ROW ("affine") or + ROW_TABLE[m, 0] ("table").
          Four activations are read at each of the STEPS int32 OFFSETS, in bytes; by a tile with a
          `group`, NR are: each `group` columns take the four that begin where theirs do.
    b     int8 panels of NR columns and STEPS steps, B_PANEL bytes each, see pack.py
    out   row m starts at OUT + i*OUT_IMAGE + g*OUT_GROUP + m*OUT_ROW or ROW_TABLE[m, 1]: int32,
          float32, uint8, uint8 values as int16, or int16.
    add   of the output's shape, for an epilogue that ends in "+" and its kind: row m starts at
          ADD + i*ADD_IMAGE + g*ADD_GROUP + m*ADD_ROW or ROW_TABLE[m, 2]. Whole vectors are read.

          NR columns               a K-step of 4 is one row of the panel
        +-----------+  MR rows      a: MR broadcasts, b: NR/cols loads, MR*NR/cols dot products
        |   acc     |               All of acc stays in registers; the epilogue stores it.
        +-----------+
    Edges: rows beyond `mr` repeat the last valid row (same values, same place); columns beyond N
    are masked, or go to a scratch tile of which the valid part is copied.

Depthwise convolutions share all of this but the inner loop, see depthwise.py; there a panel is NR
channels, and up to NR - 1 bytes beyond the last channel of a row may be read. A row is a run of
`outputs` pixels, OUT_PIXEL and ADD_PIXEL apart, "table" their way of finding rows.

So do products of few columns, see dot.py: there NR lanes are a few rows' columns.

A task is one (image, block of MC rows, group, tile's panels), the last running fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastq.kernels import block as f
from fastq.kernels.block import GROUPS, MC, M, N
from fastq.kernels.call import ITEM_BYTES
from fastq.kernels.depthwise import emit_tap_loop
from fastq.kernels.dot import emit_dot_loop
from fastq.kernels.isa import cpu_name
from fastq.kernels.lines import emit_loop
from fastq.kernels.native import native
from fastq.kernels.requantize import EpilogueEmitter, spelled
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    AHEAD,
    KR,
    Field,
    address,
    branch_back,
    copy_bytes,
    emitter,
    fields_of,
    i8,
    i32,
    i64,
    least,
    load,
    prefetch,
    ptr,
)


@dataclass(frozen=True)
class Tile:
    """A register tile for one instruction set: MR rows x (`panels` panels of NR columns).

    A row of a depthwise tile is a run of `outputs` neighbouring pixels. With `group`, so many
    columns side by side read so many activations of their own, of a row that has some for each. Of
    a dot tile it is how many columns a row has, see dot.py.
    """

    isa: str
    mr: int
    nr: int
    kind: str = "gemm"  # or "depthwise", "dot", or "matrix" (matrix.py)
    panels: int = 1
    outputs: int = 1
    group: int = 0

    @property
    def a_bytes(self) -> int:
        """Bytes of one activation as the tile reads it."""
        return emitter(self.isa).a_bytes

    @property
    def fold(self) -> int:
        """How many rows of a dot tile are taken as one."""
        return self.nr // self.group

    @property
    def wide(self) -> bool:
        """Whether it is a tile of matrices for short sums, see tiles.py."""
        return self.kind == "matrix" and self.nr > 32

    def __str__(self) -> str:
        simd = emitter(self.isa)
        if self.kind == "dot":
            return f"u8s8s32_dot_{self.fold}x{self.group}c{simd.operand.count}__{self.isa}"
        kr = {"gemm": KR, "depthwise": simd.taps_at_once, "matrix": simd.depth}[self.kind]
        shape = f"{self.mr * self.outputs}x{self.nr * self.panels}c{kr}"
        return f"u8s8s32_{self.kind}_{shape}{f'g{self.group}' * bool(self.group)}__{self.isa}"


_AVX512 = (
    Tile("avx512_vnni", 6, 64),
    Tile("avx512_vnni", 5, 64),
    Tile("avx512_vnni", 4, 64),
    Tile("avx512_vnni", 3, 64),
    Tile("avx512_vnni", 2, 64),
    Tile("avx512_vnni", 1, 64, panels=2),
    Tile("avx512_vnni", 10, 32),
    Tile("avx512_vnni", 4, 32),
    Tile("avx512_vnni", 1, 32, panels=4),
    Tile("avx512_vnni", 12, 16),
    Tile("avx512_vnni", 4, 16),
    Tile("avx512_vnni", 1, 16, panels=8),
    Tile("avx512_vnni", 2, 64, "depthwise", outputs=2),
)
_NEON = (
    Tile("neon_i8mm", 6, 16),
    Tile("neon_i8mm", 4, 16),
    Tile("neon_i8mm", 2, 16),
    Tile("neon_i8mm", 1, 16, panels=4),
    Tile("neon_i8mm", 8, 8),
    Tile("neon_i8mm", 3, 8),
    Tile("neon_i8mm", 1, 16, "depthwise", outputs=2),
)
# Of one NR packed panels are shared, but for depthwise: MR is chosen at the call.
TILES = (
    Tile("amx_int8", 32, 64, "matrix"),
    Tile("amx_int8", 32, 32, "matrix"),
    Tile("amx_int8", 16, 32, "matrix"),
    Tile("amx_int8", 64, 16, "matrix"),
    *(replace(tile, isa="amx_int8") for tile in _AVX512),
    *_AVX512,
    Tile("avx_vnni", 6, 16),
    Tile("avx_vnni", 3, 16),
    Tile("avx_vnni", 1, 16, panels=4),
    Tile("avx_vnni", 8, 8),
    Tile("avx_vnni", 3, 8),
    Tile("avx_vnni", 1, 32, "depthwise", outputs=2),
    Tile("avx2", 6, 16),
    Tile("avx2", 4, 16),
    Tile("avx2", 1, 16, panels=4),
    Tile("avx2", 6, 8),
    Tile("avx2", 2, 8),
    Tile("avx2", 5, 16, "depthwise"),
    *_NEON,
    *(replace(tile, isa="neon_dotprod") for tile in _NEON),
    Tile("generic", 3, 8),
    Tile("generic", 1, 8, panels=2),
    Tile("generic", 2, 8, "depthwise"),
    Tile("amx_int8-emulated", 32, 64, "matrix"),
    Tile("amx_int8-emulated", 64, 16, "matrix"),
    Tile("amx_int8-emulated", 1, 64, panels=2),
    Tile("amx_int8-emulated", 4, 16),
    Tile("amx_int8-emulated", 2, 64, "depthwise", outputs=2),
    Tile("avx512_vnni-emulated", 6, 64),
    Tile("avx512_vnni-emulated", 1, 64, panels=2),
    Tile("avx512_vnni-emulated", 2, 64, "depthwise", outputs=2),
    Tile("avx_vnni-emulated", 6, 16),
    Tile("avx_vnni-emulated", 3, 16),
    Tile("avx_vnni-emulated", 1, 32, "depthwise", outputs=2),
    Tile("neon_dotprod-emulated", 6, 16),
    Tile("neon_dotprod-emulated", 1, 16, panels=4),
    Tile("neon_dotprod-emulated", 3, 8),
    Tile("neon_dotprod-emulated", 1, 16, "depthwise", outputs=2),
)


def emit_tiles(b: Any, tile: Tile, epilogue: str, rows: str, args: Any, place: Any) -> None:
    """Emits the tiles of rows m to m_end against one panel, or `panels` of them.

    args is the block's address, place is (image, group, panel, m, m_end). Full tiles first; they
    are most of the work, and know their rows. Then those of fewer rows, or columns.
    """
    image, group, panel, m, m_end = place
    field = fields_of(b, b.inttoptr(args, ptr))
    simd = emitter(tile.isa)
    parts = spelled(epilogue)
    out_bytes, width = ITEM_BYTES[parts.kind], tile.nr * tile.panels
    first_column = b.mul(panel, i64(width))
    here = _panels(b, tile, field, group, panel)
    weights = [address(b, field(f.B, ptr), b.mul(index, field(f.B_PANEL))) for index in here]
    offsets, steps = field(f.OFFSETS, ptr), field(f.STEPS)
    columns = [b.mul(index, i64(4 * tile.nr)) for index in here]
    end = EpilogueEmitter(b, simd, parts, tile.nr // simd.lanes, columns, field)

    def operand(base: int, first: Any) -> Rows:
        offset = b.add(b.mul(image, field(base + 2)), b.mul(group, field(base + 3)))
        return _rows(b, tile, rows, field, base, address(b, field(base, ptr), b.add(offset, first)))

    own = tile.kind == "depthwise" or (tile.group and tile.kind == "gemm")
    a_rows = operand(f.A, b.mul(panel, i64(tile.nr * tile.a_bytes)) if own else i64(0))
    out_rows = operand(f.OUT, b.mul(first_column, i64(out_bytes)))
    add_rows = None
    if parts.added:
        add_rows = operand(f.ADD, b.mul(first_column, i64(ITEM_BYTES[parts.added])))
    # of a factor for each row, groups have their own
    place = b.add(b.mul(image, field(f.GROUPS)), group) if parts.by_row else image
    first_row = b.mul(place, field(f.M))
    valid = b.sub(field(f.N), first_column)
    edge = b.icmp_signed("<", valid, i64(width))
    scratch = _scratch_rows(b, tile.mr * tile.outputs, width * out_bytes)

    def emit(m: Any, mr: Any) -> None:
        """One tile; a full one if mr is None."""
        accs = _sums(b, tile, a_rows(m, mr), weights, field, (offsets, steps), end.start)
        targets = rows_out = _pixels(b, tile, out_rows(m, mr), field, f.OUT_PIXEL)
        by_scratch = mr is not None and not simd.masks  # not full in N: to a scratch tile first
        if by_scratch:
            targets = [b.select(edge, s, o) for s, o in zip(scratch, rows_out, strict=True)]
        added_rows = None
        if add_rows is not None:
            added_rows = _pixels(b, tile, add_rows(m, mr), field, f.ADD_PIXEL)
        numbers = [b.add(first_row, b.add(m, i64(i))) for i in range(tile.mr)]
        if mr is not None:
            last = b.sub(b.add(first_row, b.add(m, mr)), i64(1))
            numbers = [least(b, i, last) for i in numbers]
        numbers = [number for number in numbers for _ in range(tile.outputs)]
        end.store(accs, targets, numbers, added_rows, valid if simd.masks else None)
        if by_scratch:
            with b.if_then(edge):
                size = b.mul(valid, i64(out_bytes))
                for row, out_row in zip(scratch, rows_out, strict=True):
                    copy_bytes(b, out_row, row, size)

    full_end = m_end if simd.masks else b.select(edge, m, m_end)
    m, _ = emit_loop(b, m, full_end, tile.mr, (), lambda m: emit(m, None))

    def rest(m: Any) -> None:
        emit(m, least(b, b.sub(m_end, m), i64(tile.mr)))

    emit_loop(b, m, b.add(m_end, i64(tile.mr - 1)), tile.mr, (), rest)


def _panels(b: Any, tile: Tile, field: Field, group: Any, panel: Any) -> list[Any]:
    """The numbers of a tile's panels among those of all groups; beyond the last one of its group it
    is repeated, and what it gives not copied."""
    count = b.udiv(b.add(field(f.N), i64(tile.nr - 1)), i64(tile.nr))
    last = b.sub(count, i64(1))
    first = b.mul(panel, i64(tile.panels))
    here = [first, *(least(b, b.add(first, i64(j)), last) for j in range(1, tile.panels))]
    return [b.add(b.mul(group, count), index) for index in here]


Rows = Callable[[Any, Any], list[Any]]


def _rows(b: Any, tile: Tile, rows: str, field: Field, base: int, start: Any) -> Rows:
    """at(m, mr) -> the addresses of MR rows from m on; those beyond mr repeat the last one.

    base is the operand's first field, start the address of its row 0 (affine).
    """
    stride = field(base + 1)
    table = field(f.ROW_TABLE, ptr) if rows == "table" else None
    column = (f.A, f.OUT, f.ADD).index(base)

    def at(m: Any, mr: Any) -> list[Any]:
        index = [i64(i) for i in range(tile.mr)]
        if mr is not None:
            last = b.sub(mr, i64(1))
            index = [least(b, i, last) for i in index]
        if table is None:
            here = address(b, start, b.mul(m, stride))
            return [address(b, here, b.mul(i, stride)) for i in index]
        entries = address(b, table, b.add(b.mul(m, i64(24)), i64(8 * column)))
        offsets = [load(b, i64, entries, b.mul(i, i64(24))) for i in index]
        return [address(b, start, offset) for offset in offsets]

    return at


def _scratch_rows(b: Any, count: int, size: int) -> list[Any]:
    """The addresses of rows of `size` bytes on the stack."""
    with b.goto_entry_block():
        scratch = b.alloca(ir.ArrayType(i8, count * size))
        scratch.align = 64
        scratch.type = ptr  # llvmlite gives it a typed pointer, which LLVM no longer knows
    return [address(b, scratch, i * size) for i in range(count)]


def _pixels(b: Any, tile: Tile, rows: list[Any], field: Field, pixel: int) -> list[Any]:
    """The addresses of all outputs of some rows, `pixel` (a field) apart, the last one first: where
    a line has a single pixel they lie 0 apart, and what is stored last counts."""
    if tile.outputs == 1:
        return rows
    step, last_first = field(pixel), reversed(range(tile.outputs))
    steps = [b.mul(step, i64(j)) for j in last_first]
    return [address(b, row, offset) for row in rows for offset in steps]


def _sums(
    b: Any,
    tile: Tile,
    rows: list[Any],
    weights: list[Any],
    field: Field,
    taken: tuple[Any, Any],
    start: list[Any],
) -> list[list[Any]]:
    """The accumulators of one tile, [row][vector]; taken is (OFFSETS, STEPS)."""
    offsets, steps = taken
    if tile.kind == "depthwise":
        return emit_tap_loop(b, tile.isa, tile.outputs, rows, weights[0], offsets, steps, start)

    def by_table(step: Any) -> Any:
        return b.sext(load(b, i32, offsets, b.mul(step, i64(4))), i64)

    if tile.kind == "dot":
        (row,) = rows
        return emit_dot_loop(b, tile, row, weights[0], by_table, field, start[0])
    return emit_k_loop(b, tile, rows, weights, by_table, steps, start)


def emit_k_loop(
    b: Any,
    tile: Tile,
    a_rows: list[Any],
    panels: list[Any],
    offset_of: Callable[[Any], Any],
    steps: Any,
    start: list[Any],
    *,
    wide: bool = False,
) -> list[list[Any]]:
    """The K loop; returns the accumulators, a lane for each column, [row][vector].

    They begin at `start`. offset_of(step) is where a row's activations of a K-step lie, in bytes.
    The panels hold int8. If wide, they and the activations hold int16, in pairs.
    """
    simd = emitter(tile.isa)
    if wide:
        simd = simd.of_pairs
    vectors = tile.nr // simd.cols
    count = tile.panels * vectors
    entry = b.block
    loop, done = b.append_basic_block("k"), b.append_basic_block("k.done")
    b.branch(loop)

    b.position_at_end(loop)
    step = b.phi(i64)
    weights = [b.phi(ptr) for _ in panels]
    accs = [[b.phi(simd.acc) for _ in range(count)] for _ in range(tile.mr)]
    offset = offset_of(step)
    sums = [list(row_accs) for row_accs in accs]
    side = simd.side_by_side
    weight_bytes = simd.a_bytes if wide else 1
    if tile.mr == 1 and not cpu_name().startswith("znver"):  # AMD's look ahead better themselves
        for p in weights:
            prefetch(b, p, AHEAD, KR * tile.nr)
    for k in range(0, KR, side):
        starts = [(j * KR + k) * simd.cols for j in range(vectors)]
        if wide:
            w = [load(b, simd.operand, p, simd.a_bytes * at) for p in weights for at in starts]
        else:
            w = [simd.load_b(b, p, at) for p in weights for at in starts]
        for row, row_sums in zip(a_rows, sums, strict=True):
            first = address(b, row, k * simd.a_bytes) if k else row
            if tile.group:
                a = simd.load_own(b, first, offset, tile.nr, tile.group)
            else:
                a = [simd.load_a(b, first, offset)] * count
            row_sums[:] = [simd.dot(b, *operands) for operands in zip(row_sums, a, w, strict=True)]
    next_step = b.add(step, i64(1))
    next_weights = [address(b, p, KR * tile.nr * weight_bytes) for p in weights]
    branch_back(b, b.icmp_signed("<", next_step, steps), loop, done)

    step.add_incoming(i64(0), entry)
    step.add_incoming(next_step, loop)
    for phi, panel, following in zip(weights, panels, next_weights, strict=True):
        phi.add_incoming(panel, entry)
        phi.add_incoming(following, loop)
    for row_accs, row_sums in zip(accs, sums, strict=True):
        for acc, total, first in zip(row_accs, row_sums, start, strict=True):
            acc.add_incoming(first, entry)
            acc.add_incoming(total, loop)
    b.position_at_end(done)
    return sums


@intrinsic(prefer_literal=True)
def _tiles(
    typingctx: Any, config: Any, args: Any, image: Any, group: Any, panel: Any, m: Any, end: Any
) -> Any:
    *tile, epilogue, rows = (t.literal_value for t in config.types[:-1])
    signature = types.void(config, args, *[types.int64] * 5)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        block = builder.ptrtoint(values[1], i64)
        emit_tiles(builder, Tile(*tile), epilogue, rows, block, values[2:])
        return context.get_dummy_value()

    return signature, codegen


@njit
def task_place(args, task, width):  # type: ignore[no-untyped-def]
    """(image, group, panel, first row, end) of a task; a panel is `width` columns."""
    panels = (args[N] + width - 1) // width
    blocks = (args[M] + args[MC] - 1) // args[MC]
    panel, group = task % panels, task // panels % args[GROUPS]
    block = task // (panels * args[GROUPS]) % blocks
    image = task // (panels * args[GROUPS] * blocks)
    m = block * args[MC]
    return image, group, panel, m, min(m + args[MC], args[M])


@functools.cache
def gemm_kernel(tile: Tile, epilogue: str, rows: str) -> Any:
    """The compiled kernel of a tile.

    epilogue as requantize.spelled has it; rows "affine" or "table".
    """
    config = (*astuple(tile), epilogue, rows, sources_digest())
    width = tile.nr * tile.panels

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        for task in range(begin, end):
            # loop 1: m in steps of MR, over a block of MC rows against one panel
            image, group, panel, m, last = task_place(args, task, width)
            _tiles(config, args, image, group, panel, m, last)

    return kernel
