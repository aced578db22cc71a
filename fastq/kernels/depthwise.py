"""The inner loop of depthwise convolutions: one filter per channel.

There is no sum over channels, so a lane is a channel and the taps take the place of K: the
same dot product as in gemm.py, with its activations interleaved instead of broadcast.

    tap 0   | a0 b0 c0 ... |                  | a0 a1 a2 a3 | b0 b1 b2 b3 | ...   activations
    tap 1   | a1 b1 c1 ... |   interleave ->
    tap 2 3 | ...          |                  | w0 w1 w2 w3 | w0 w1 w2 w3 | ...   weights

Interleaving costs more than the products, so `outputs` neighbours share it: four pixels serve the
output over the first three with weights w0 w1 w2 0, and the next one with 0 w0 w1 w2. The taps of a
tile are all pixels that one of its outputs reads, line by line, four (`taps_at_once`) at a time.

    a       uint8, NHWC, all channels of a pixel side by side; row m is a run of `outputs` outputs
    weights (panels, tap groups, outputs, vectors, lanes, taps_at_once), int8 (vpdpbusd) or int16
            (vpmaddwd), lanes in the order that `interleave` leaves; 0 where a tap is not taken
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastq.kernels.pack import aligned_empty
from fastq.kernels.simd import address, branch_back, emitter, i32, i64, load


def emit_tap_loop(
    b: Any,
    isa: str,
    outputs: int,
    a_rows: list[Any],
    weights: Any,
    taps: Any,
    n_taps: Any,
    start: list[Any],
) -> list[list[Any]]:
    """Emits the loop over groups of taps; returns accumulators, a list of vectors for each
    row and output, the last output of a row first.

    They begin at `start`, in the order of simd.columns. taps are int32 byte offsets, their number a
    multiple of taps_at_once.
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
    accs = [[b.phi(simd.acc) for _ in range(vectors)] for _ in range(len(a_rows) * outputs)]
    offsets = [
        b.sext(load(b, i32, taps, b.mul(b.add(tap, i64(t)), i64(4))), i64) for t in range(group)
    ]
    here = address(b, weights, b.mul(tap, i64(outputs * vectors * vector_bytes // group)))
    w = [
        [load(b, kind, here, (j * vectors + v) * vector_bytes) for v in range(vectors)]
        for j in reversed(range(outputs))
    ]
    summed: list[list[Any]] = []
    for base in a_rows:
        channels = [simd.load_channels(b, address(b, base, offset)) for offset in offsets]
        a = simd.interleave(b, channels)
        for filters in w:
            held = zip(accs[len(summed)], a, filters, strict=True)
            summed.append([simd.dot(b, acc, x, y) for acc, x, y in held])
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


class Taps(NamedTuple):
    """The taps of a tile: `places` (T, 2), line and pixel of each, in the steps of the input;
    `filters` (outputs, T), which tap of its filter each output takes there, or -1."""

    places: NDArray[np.int64]
    filters: NDArray[np.int64]


def taps_of(
    kernel_size: tuple[int, int], stride: int, dilation: tuple[int, int], outputs: int, isa: str
) -> Taps:
    """The taps of so many neighbouring outputs, `stride` pixels apart, in whole groups."""
    kh, kw = kernel_size
    pixels = sorted({j * stride + k * dilation[1] for j in range(outputs) for k in range(kw)})
    places = [(y * dilation[0], x) for y in range(kh) for x in pixels]
    places += places[:1] * (-len(places) % emitter(isa).taps_at_once)
    filters = np.full((outputs, len(places)), -1)
    for at, (y, x) in enumerate(places[: kh * len(pixels)]):
        for j in range(outputs):
            k, between = divmod(x - j * stride, dilation[1])
            if not between and 0 <= k < kw:
                filters[j, at] = y // dilation[0] * kw + k
    return Taps(np.array(places), filters)


def pack_depthwise(weight: NDArray[np.int8], taps: Taps, isa: str) -> NDArray[Any]:
    """(C, KH * KW) int8 as depthwise panels (P, groups, outputs, vectors, lanes, taps_at_once)."""
    simd = emitter(isa)
    group = simd.taps_at_once
    order = np.array(simd.interleaved_channels())  # (vectors, lanes)
    panels, (outputs, count) = -(-len(weight) // order.size), taps.filters.shape
    padded = np.zeros((panels * order.size, outputs, count), np.int8)
    padded[: len(weight)] = np.where(taps.filters < 0, np.int8(0), weight[:, taps.filters])
    by_tap = padded.reshape(panels, order.size, outputs, count // group, group)
    packed = aligned_empty(
        (panels, count // group, outputs, *order.shape, group), np.int8 if group == 4 else np.int16
    )
    packed[:] = by_tap.transpose(0, 3, 2, 1, 4)[:, :, :, order]
    return packed
