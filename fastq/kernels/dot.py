"""The inner loop of products with few columns: a vector holds activations of one row.

Panels of NR columns would be mostly empty. Here K lies along the vector, and `fold` rows side by
side are one, as many as fill a vector with their sums:

    rows    fold, A_PIXEL bytes apart; of a convolution neighbouring pixels
    acc     one for each row and column, whose lanes are summed at the end (simd.lane_sums)
    out     | r0: c0 c1 | r1: c0 c1 | ...  contiguous; to the epilogue one row of fold * N columns
    panel   (steps, N, depth) int8: a K-step is a vector of activations, `depth` bytes

The last K-step of a run overlaps the one before, as pack.py has it; of a run that is shorter than a
vector RUN bytes are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastq.kernels import block
from fastq.kernels.simd import (
    address,
    branch_back,
    const,
    emitter,
    i64,
    lane_sums,
    load,
    load_valid,
)


def emit_dot_loop(
    b: Any,
    tile: Any,
    row: Any,
    panel: Any,
    offset_of: Callable[[Any], Any],
    field: Callable[[int], Any],
    start: Any,
) -> list[list[Any]]:
    """The K loop over rows from `row` on; returns their sums and `start`, in one vector."""
    simd = emitter(tile.isa)
    kind, size = simd.operand, simd.operand.count
    pixel, steps, run = field(block.A_PIXEL), field(block.STEPS), field(block.RUN)
    entry = b.block
    loop, done = b.append_basic_block("k"), b.append_basic_block("k.done")
    b.branch(loop)
    b.position_at_end(loop)
    step = b.phi(i64)
    accs = [b.phi(simd.acc) for _ in range(tile.fold * tile.group)]
    weights = address(b, panel, b.mul(step, i64(tile.group * size)))
    filters = [load(b, kind, weights, n * size) for n in range(tile.group)]
    here, sums = address(b, row, offset_of(step)), []
    for i in range(0, len(accs), tile.group):
        # a mask costs nothing where there is one
        a = load_valid(b, kind, here, run) if simd.masks else load(b, kind, here)
        sums += [simd.dot(b, acc, a, w) for acc, w in zip(accs[i:], filters, strict=False)]
        here = address(b, here, pixel)
    following = b.add(step, i64(1))
    branch_back(b, b.icmp_signed("<", following, steps), loop, done)
    step.add_incoming(i64(0), entry)
    step.add_incoming(following, loop)
    for acc, total in zip(accs, sums, strict=True):
        acc.add_incoming(const(simd.acc, 0), entry)
        acc.add_incoming(total, loop)
    b.position_at_end(done)
    unused = [const(simd.acc, 0)] * (simd.lanes - len(sums))
    return [[b.add(start, lane_sums(b, [*sums, *unused]))]]
