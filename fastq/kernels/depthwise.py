"""The inner loop of depthwise convolutions: one filter per channel.

There is no sum over channels, so a lane is a channel and the taps take the place of K: the
same dot product as in gemm.py, with its activations interleaved instead of broadcast.

    tap 0   | a0 b0 c0 ... |                  | a0 a1 a2 a3 | b0 b1 b2 b3 | ...   activations
    tap 1   | a1 b1 c1 ... |   interleave ->
    tap 2 3 | ...          |                  | w0 w1 w2 w3 | w0 w1 w2 w3 | ...   weights

Interleaving costs more than the products, so `outputs` neighbours share it, one below the other (or
side by side, where a filter has a single line): four lines serve the output over the first three
with weights w0 w1 w2 0, and the next one with 0 w0 w1 w2. The taps of a tile are all pixels that
one of its outputs reads, four (`taps_at_once`) at a time.

    a       uint8, NHWC, all channels of a pixel side by side; row m is a run of `outputs` outputs
    weights (panels, tap groups, outputs, vectors, lanes, taps_at_once), int8 (vpdpbusd) or int16
            (vpmaddwd), lanes in the order that `interleave` leaves; 0 where a tap is not taken

Few channels would leave most lanes of a panel empty. Where pixels lie side by side, and outputs are
a pixel apart, `fold` of them are taken for one of as many more channels: 4 pixels of 16 are one of
64, with each filter four times. The taps stay as far apart as they are.
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


FOLDS = (1, 2, 4, 8)


class Taps(NamedTuple):
    """The taps of a tile: `places` (T, 2), the line and pixel of each; `filters` (outputs, T), the
    tap of its filter that each output takes there, or -1."""

    places: NDArray[np.int64]
    filters: NDArray[np.int64]


def taps_of(
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    apart: tuple[int, int],
    outputs: int,
    isa: str,
) -> Taps:
    """The taps of so many outputs, whose inputs are lines and pixels `apart`; in whole groups."""
    kh, kw = kernel_size
    read = [
        {
            (j * apart[0] + y * dilation[0], j * apart[1] + x * dilation[1]): y * kw + x
            for y in range(kh)
            for x in range(kw)
        }
        for j in range(outputs)
    ]
    places = sorted(set().union(*read))
    filters = np.array([[taps.get(place, -1) for place in places] for taps in read])
    more = -len(places) % emitter(isa).taps_at_once
    return Taps(
        np.array(places + places[:1] * more),
        np.pad(filters, ((0, 0), (0, more)), constant_values=-1),
    )


def choose_fold(channels: int, pixels: int, nr: int) -> int:
    """How many pixels are one: the fewest panels over a line of so many, then the fewest."""
    return min(
        (fold for fold in FOLDS if fold <= pixels),
        key=lambda fold: (-(-channels * fold // nr) * -(-pixels // fold), fold),
    )


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
