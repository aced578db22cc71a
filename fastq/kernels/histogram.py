"""Counting float32 values by their own bits.

    bits of a value    s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm
                       key: upper 16        rest: lower 16

A key is a bin: 128 to an octave, so a bin is at most 1/128 of its values wide. Of each bin the
histogram keeps how many values fell into it and the sum of their rests, which is their exact mean.
Nothing depends on the data's range, so nothing is ever rescaled: integers are added, and the
result is the same for every order and every division of the data.

NaN and infinities have keys of their own, which a reader leaves out.

x     float32, contiguous, `H_SIZE` values
bins  int64 (lanes, 65536, 2): (count, sum of rests)
ends  float32 (lanes, 2): the smallest and the largest finite value, and 0

A task is a lane: it adds its share of x to its own bins and ends. The lanes' bins add up.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import int64

from fastq.kernels.native import native
from fastq.kernels.scalar import larger, pointer, smaller
from fastq.kernels.signature import sources_digest
from fastq.kernels.stage import finite_range
from fastq.qparams import HISTOGRAM_KEYS

(H_X, H_SIZE, H_LANES, H_BINS, H_ENDS, H_FIELDS) = range(6)

BLOCK = 4096  # values: read for the ends, then again from the first-level cache for the bins


@functools.cache
def histogram_kernel() -> Any:
    """The histogram of each lane's share."""
    config = (sources_digest(),)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        config  # noqa: B018  the digest is part of the cache's key
        bits, ends = pointer(args[H_X], "u32"), pointer(args[H_ENDS], "f32")
        size, lanes = args[H_SIZE], args[H_LANES]
        for lane in range(begin, end):
            bins = pointer(args[H_BINS] + lane * HISTOGRAM_KEYS * 16, "s64")
            last = size * (lane + 1) // lanes
            for first in range(size * lane // lanes, last, BLOCK):
                count = min(BLOCK, last - first)
                lo, hi = finite_range(args[H_X] + 4 * first, count)
                ends[2 * lane] = smaller(ends[2 * lane], lo)
                ends[2 * lane + 1] = larger(ends[2 * lane + 1], hi)
                for i in range(first, first + count):
                    value = int64(bits[i])
                    at = 2 * (value >> 16)
                    bins[at] += 1
                    bins[at + 1] += value & 0xFFFF

    return kernel
