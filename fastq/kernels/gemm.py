"""u8 x s8 -> s32 matrix product with its epilogue: linear layers and convolutions alike.

    out[m, n] = epilogue(sum over taps t, k < RUN of  a[row m, tap t, k] * b[n, t, k])

A convolution is a product whose K loop walks taps of contiguous activations in a padded NHWC
image: no im2col. A linear layer has one tap of K activations.

    a     activations, uint8 or int16 as the tier's `a_bytes` says. Row m of image i and group g
          starts at A + i*A_IMAGE + g*A_GROUP + m*A_ROW ("affine") or + ROW_TABLE[m] ("table");
          tap t lies TAPS[t] further. RUN >= 4 elements each, and nothing beyond them is read.
    b     int8 panels of NR columns, see pack.py; the panel's last K-step overlaps the one
          before where RUN is no multiple of 4, with zero weights in the overlap.
    out   row m starts at OUT + i*OUT_IMAGE + g*OUT_GROUP + m*OUT_ROW: int32, uint8 or float32.

          NR columns               K-steps of 4, one panel row each
        +-----------+  MR rows      a: MR broadcasts, b: NR/cols loads, MR*NR/cols dot products
        |   acc     |               All of acc stays in registers; the epilogue stores it.
        +-----------+
    Edges: rows beyond `mr` repeat the last valid row (same values, same place); columns beyond N
    go to a scratch tile, of which the valid part is copied.

Depthwise convolutions share all of this but the inner loop, see depthwise.py; there a panel is NR
channels, and up to NR - 1 bytes beyond the last channel of a row may be read.

A task is one (image, block of MC rows, group, panel), the panel running fastest.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic

from fastq.kernels.depthwise import emit_tap_loop
from fastq.kernels.requantize import emit_epilogue
from fastq.kernels.signature import SIGNATURE, sources_digest
from fastq.kernels.simd import KR, address, branch_back, const, emitter, i1, i8, i64, load, ptr

# the argument block
(
    A, A_ROW, A_IMAGE, A_GROUP, ROW_TABLE, TAPS, N_TAPS, RUN,
    B, B_PANEL,
    OUT, OUT_ROW, OUT_IMAGE, OUT_GROUP,
    IMAGES, GROUPS, M, MC, N,
    COL_SUMS, ROW_ZERO_POINT, ROW_SCALE, ROW_STEP, SCALE, BIAS, CLAMP, OUT_ZERO_POINT,
    FIELDS,
) = range(28)  # fmt: skip

OUT_BYTES = {"s32": 4, "u8": 1, "f32": 4}


@dataclass(frozen=True)
class Tile:
    """A register tile: MR rows x NR columns of accumulators for one instruction set."""

    isa: str
    mr: int
    nr: int
    depthwise: bool = False

    @property
    def a_bytes(self) -> int:
        """Bytes of one activation as the tile reads it."""
        return 1 if self.depthwise else emitter(self.isa).a_bytes

    def __str__(self) -> str:
        kind = "depthwise" if self.depthwise else "gemm"
        kr = emitter(self.isa).taps_at_once if self.depthwise else KR
        return f"u8s8s32_{kind}_{self.mr}x{self.nr}c{kr}__{self.isa}"


# Of one instruction set and NR, packed panels are shared: MR is chosen at the call.
TILES = (
    Tile("avx512_vnni", 6, 64),
    Tile("avx512_vnni", 2, 64),
    Tile("avx512_vnni", 12, 32),
    Tile("avx512_vnni", 4, 32),
    Tile("avx512_vnni", 12, 16),
    Tile("avx512_vnni", 4, 16),
    Tile("avx_vnni", 6, 16),
    Tile("avx_vnni", 2, 16),
    Tile("avx_vnni", 12, 8),
    Tile("avx_vnni", 4, 8),
    Tile("avx2", 6, 8),
    Tile("avx2", 2, 8),
    Tile("avx2", 1, 8),
    Tile("generic", 4, 4),
    Tile("generic", 1, 4),
    Tile("avx512_vnni-emulated", 6, 64),
    Tile("avx512_vnni-emulated", 2, 64),
    Tile("avx_vnni-emulated", 6, 16),
    Tile("avx512_vnni", 4, 64, depthwise=True),
    Tile("avx_vnni", 1, 32, depthwise=True),
    Tile("avx2", 4, 16, depthwise=True),
    Tile("generic", 2, 8, depthwise=True),
    Tile("avx512_vnni-emulated", 4, 64, depthwise=True),
    Tile("avx_vnni-emulated", 1, 32, depthwise=True),
)


def emit_tile(b: Any, tile: Tile, epilogue: str, rows: str, args: Any, place: Any) -> None:
    """Emits one tile. `args` is the block's address, `place` is (image, group, panel, m, mr)."""
    image, group, panel, m, mr = place
    block = b.inttoptr(args, ptr)

    def field(index: int, kind: Any = i64) -> Any:
        return load(b, kind, block, 8 * index)

    def at(index: int, offset: Any) -> Any:
        return address(b, field(index, ptr), offset)

    # rows of the tile: their index in the image, their address in a
    a_base = at(A, b.add(b.mul(image, field(A_IMAGE)), b.mul(group, field(A_GROUP))))
    row_index: list[Any] = []
    a_rows: list[Any] = []
    for i in range(tile.mr):
        index = b.add(m, i64(i))
        if i:
            index = b.select(b.icmp_signed("<", i64(i), mr), index, row_index[-1])
        row_index.append(index)
        if rows == "affine":
            offset = b.mul(index, field(A_ROW))
        else:
            offset = load(b, i64, field(ROW_TABLE, ptr), b.mul(index, i64(8)))
        a_rows.append(address(b, a_base, offset))

    panels = b.udiv(b.add(field(N), i64(tile.nr - 1)), i64(tile.nr))
    column_panel = b.add(b.mul(group, panels), panel)
    weights = at(B, b.mul(column_panel, field(B_PANEL)))
    if tile.depthwise:
        a_rows = [address(b, row, b.mul(panel, i64(tile.nr))) for row in a_rows]
        accs = emit_tap_loop(b, tile.isa, a_rows, weights, field(TAPS, ptr), field(N_TAPS))
    else:
        accs = _emit_k_loops(b, tile, a_rows, weights, field)

    # the edge: a tile that is not full in N goes to a scratch tile first
    out_bytes = OUT_BYTES[epilogue]
    with b.goto_entry_block():
        scratch = b.alloca(ir.ArrayType(i8, tile.mr * tile.nr * out_bytes))
        scratch.align = 64
        scratch.type = ptr  # llvmlite gives it a typed pointer, which LLVM no longer knows
    scratch_rows = [address(b, scratch, i * tile.nr * out_bytes) for i in range(tile.mr)]
    first = b.mul(panel, i64(tile.nr))
    valid = b.sub(field(N), first)
    edge = b.icmp_signed("<", valid, i64(tile.nr))
    offset = b.add(b.mul(image, field(OUT_IMAGE)), b.mul(group, field(OUT_GROUP)))
    out_base = at(OUT, b.add(offset, b.mul(first, i64(out_bytes))))
    out_rows = [address(b, out_base, b.mul(index, field(OUT_ROW))) for index in row_index]
    targets = [b.select(edge, s, o) for s, o in zip(scratch_rows, out_rows, strict=True)]
    absolute = [b.add(b.mul(image, field(M)), index) for index in row_index]
    emit_epilogue(b, epilogue, accs, targets, column_panel, absolute, tile.nr, field)
    with b.if_then(edge):
        size = b.mul(valid, i64(out_bytes))
        for scratch_row, out_row in zip(scratch_rows, out_rows, strict=True):
            _memcpy(b, out_row, scratch_row, size)


def _emit_k_loops(b: Any, tile: Tile, a_rows: list[Any], panel: Any, field: Any) -> list[list[Any]]:
    """The two K loops; returns the accumulators in column order, [row][vector]."""
    simd = emitter(tile.isa)
    vectors = tile.nr // simd.cols
    count = tile.mr * vectors
    taps, n_taps = field(TAPS, ptr), field(N_TAPS)
    step_bytes = KR * simd.a_bytes
    last = b.mul(b.sub(field(RUN), i64(KR)), i64(simd.a_bytes))  # byte offset of a run's last step

    entry = b.block
    tap_loop, k_loop, tap_end, done = (
        b.append_basic_block(name) for name in ("tap", "k", "tap.end", "k.done")
    )
    b.branch(tap_loop)

    b.position_at_end(tap_loop)
    tap, tap_weights = b.phi(i64), b.phi(ptr)
    tap_accs = [b.phi(simd.acc) for _ in range(count)]
    tap_offset = load(b, i64, taps, b.mul(tap, i64(8)))
    starts = [address(b, row, tap_offset) for row in a_rows]
    b.branch(k_loop)

    b.position_at_end(k_loop)
    k, weights = b.phi(i64), b.phi(ptr)
    k_accs = [b.phi(simd.acc) for _ in range(count)]
    w = [simd.load_b(b, weights, j * KR * simd.cols) for j in range(vectors)]
    accs = []
    for i in range(tile.mr):
        a = simd.load_a(b, starts[i], k)
        accs += [simd.dot(b, k_accs[i * vectors + j], a, w[j]) for j in range(vectors)]
    next_weights = address(b, weights, KR * tile.nr)
    stepped = b.add(k, i64(step_bytes))
    next_k = b.select(b.icmp_signed("<", stepped, last), stepped, last)
    branch_back(b, b.icmp_signed("<", k, last), k_loop, tap_end)

    b.position_at_end(tap_end)
    next_tap = b.add(tap, i64(1))
    branch_back(b, b.icmp_signed("<", next_tap, n_taps), tap_loop, done)

    tap.add_incoming(i64(0), entry)
    tap.add_incoming(next_tap, tap_end)
    tap_weights.add_incoming(panel, entry)
    tap_weights.add_incoming(next_weights, tap_end)
    k.add_incoming(i64(0), tap_loop)
    k.add_incoming(next_k, k_loop)
    weights.add_incoming(tap_weights, tap_loop)
    weights.add_incoming(next_weights, k_loop)
    for tap_acc, k_acc, acc in zip(tap_accs, k_accs, accs, strict=True):
        tap_acc.add_incoming(const(simd.acc, 0), entry)
        tap_acc.add_incoming(acc, tap_end)
        k_acc.add_incoming(tap_acc, tap_loop)
        k_acc.add_incoming(acc, k_loop)
    b.position_at_end(done)
    return [simd.columns(b, accs[i * vectors : (i + 1) * vectors]) for i in range(tile.mr)]


def _memcpy(b: Any, target: Any, source: Any, size: Any) -> None:
    kind = ir.FunctionType(ir.VoidType(), [ptr, ptr, i64, i1])
    name = "llvm.memcpy.p0.p0.i64"
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    b.call(function, [target, source, size, i1(0)])


@intrinsic(prefer_literal=True)
def _gemm_tile(
    typingctx: Any, config: Any, args: Any, image: Any, group: Any, panel: Any, m: Any, mr: Any
) -> Any:
    *tile, epilogue, rows = (t.literal_value for t in config.types[:6])
    signature = types.void(config, args, *[types.int64] * 5)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        block = builder.ptrtoint(values[1], i64)
        emit_tile(builder, Tile(*tile), epilogue, rows, block, values[2:])
        return context.get_dummy_value()

    return signature, codegen


@functools.cache
def gemm_kernel(tile: Tile, epilogue: str, rows: str) -> Any:
    """The compiled kernel of a tile. epilogue "s32", "u8" or "f32"; rows "affine" or "table"."""
    config = (tile.isa, tile.mr, tile.nr, int(tile.depthwise), epilogue, rows, sources_digest())
    mr_max = tile.mr
    nr = tile.nr

    @cfunc(SIGNATURE, cache=True)
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        panels = (args[N] + nr - 1) // nr
        blocks = (args[M] + args[MC] - 1) // args[MC]
        for task in range(begin, end):
            panel = task % panels
            group = task // panels % args[GROUPS]
            block = task // (panels * args[GROUPS]) % blocks
            image = task // (panels * args[GROUPS] * blocks)
            # loop 1: m in steps of MR, over a block of MC rows against one panel
            m = block * args[MC]
            m_end = min(m + args[MC], args[M])
            while m < m_end:
                mr = min(mr_max, m_end - m)
                _gemm_tile(config, args, image, group, panel, m, mr)
                m += mr

    return kernel


def tasks(block: Any, nr: int) -> int:
    """Number of tasks of an argument block."""
    panels = -(-int(block[N]) // nr)
    blocks = -(-int(block[M]) // int(block[MC]))
    return int(block[IMAGES] * block[GROUPS]) * panels * blocks
