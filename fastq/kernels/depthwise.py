"""The inner loop of depthwise convolutions: one filter per channel.

There is no sum over channels, so a lane is a channel and the taps take the place of K: the
same dot product as in gemm.py, with its activations interleaved instead of broadcast.

    tap 0   | a0 b0 c0 ... |                  | a0 a1 a2 a3 | b0 b1 b2 b3 | ...   activations
    tap 1   | a1 b1 c1 ... |   interleave ->
    tap 2 3 | ...          |                  | w0 w1 w2 w3 | w0 w1 w2 w3 | ...   weights

    a       uint8, NHWC, all channels of a pixel side by side
    weights (panels, tap groups, vectors, lanes, taps_at_once), int8 (vpdpbusd) or int16 (vpmaddwd),
            lanes in the order that `interleave` leaves; missing taps have weight 0 and offset 0
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels.pack import aligned_empty
from fastq.kernels.simd import address, branch_back, emitter, i32, i64, load


def emit_tap_loop(
    b: Any, isa: str, a_rows: list[Any], weights: Any, taps: Any, n_taps: Any, start: list[Any]
) -> list[list[Any]]:
    """Emits the loop over groups of taps; returns accumulators, [row][vector].

    They begin at `start`, in the order of simd.columns. taps are int32 byte offsets, their
    number a multiple of taps_at_once.
    """
    simd = emitter(isa)
    group = simd.taps_at_once
    kind = simd.operand
    vector_bytes = kind.count * kind.element.width // 8
    vectors = len(simd.interleaved_channels())

    entry = b.block
    loop, done = b.append_basic_block("taps"), b.append_basic_block("taps.done")
    b.branch(loop)
    b.position_at_end(loop)
    tap = b.phi(i64)
    accs = [[b.phi(simd.acc) for _ in range(vectors)] for _ in a_rows]
    offsets = [
        b.sext(load(b, i32, taps, b.mul(b.add(tap, i64(t)), i64(4))), i64) for t in range(group)
    ]
    here = address(b, weights, b.mul(tap, i64(vectors * vector_bytes // group)))
    w = [load(b, kind, here, v * vector_bytes) for v in range(vectors)]
    summed = []
    for row, row_accs in zip(a_rows, accs, strict=True):
        channels = [simd.load_channels(b, address(b, row, offset)) for offset in offsets]
        a = simd.interleave(b, channels)
        summed.append([simd.dot(b, row_accs[v], a[v], w[v]) for v in range(vectors)])
    following = b.add(tap, i64(group))
    branch_back(b, b.icmp_signed("<", following, n_taps), loop, done)
    tap.add_incoming(i64(0), entry)
    tap.add_incoming(following, loop)
    for row_accs, row_sums in zip(accs, summed, strict=True):
        for acc, total, first in zip(row_accs, row_sums, start, strict=True):
            acc.add_incoming(first, entry)
            acc.add_incoming(total, loop)
    b.position_at_end(done)
    return summed


def pack_depthwise(weight: NDArray[np.int8], isa: str) -> NDArray[Any]:
    """(C, taps) int8 as depthwise panels (P, tap groups, vectors, lanes, taps_at_once)."""
    simd = emitter(isa)
    group = simd.taps_at_once
    order = np.array(simd.interleaved_channels())  # (vectors, lanes)
    c, taps = weight.shape
    panels, groups = -(-c // order.size), -(-taps // group)
    padded = np.zeros((panels * order.size, groups * group), np.int8)
    padded[:c, :taps] = weight
    by_tap = padded.reshape(panels, order.size, groups, group).swapaxes(1, 2)
    packed = aligned_empty(
        (panels, groups, *order.shape, group), np.int8 if group == 4 else np.int16
    )
    packed[:] = by_tap[:, :, order]
    return packed
