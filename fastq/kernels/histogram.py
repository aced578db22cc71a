"""Counting float32 values by their own bits.

    bits of a value    s eeeeeeee mmmmmmm | mmmmmmmmmmmmmmmm
                       key: upper 16        rest: lower 16

A key is a bin: 128 to an octave, so a bin is at most 1/128 of its values wide. Of each bin the
histogram keeps how many values fell into it and the sum of their rests, which is their exact mean.
Nothing depends on the data's range, so nothing is ever rescaled: integers are added, and the
result is the same for every order and every division of the data.

NaN and infinities have keys of their own, which a reader leaves out.

x       float32, contiguous, `H_SIZE` values
bins    int64 (lanes, 65536, 2): (count, sum of rests)
ends    float32 (lanes, 2): the smallest and the largest finite value, and 0
packed  int64 (lanes, 2, 65536), scratch: both sums of a bin in one number, count * 2^40 + rests:
        one addition instead of two. It must wait for one to the same place just before it, so
        neighbours go to different ones of the two. Now and then they are added to the bins.

A task is a lane: it adds its share of x to its own bins and ends. The lanes' bins add up.
"""

from __future__ import annotations

import functools
from typing import Any

from numba import int64, njit

from fastq.kernels.native import native
from fastq.kernels.scalar import larger, pointer, smaller
from fastq.kernels.signature import sources_digest
from fastq.kernels.stage import finite_range
from fastq.qparams import HISTOGRAM_KEYS

(H_X, H_SIZE, H_LANES, H_BINS, H_ENDS, H_PACKED, H_FIELDS) = range(7)

BLOCK = 4096  # values: read for the ends, then again from the first-level cache for the bins
REST_MASK = 2**16 - 1
COUNT_BITS, REST_BITS = 24, 40  # of a packed number
RESTS_MASK = 2**REST_BITS - 1
MOST = 2 ** (COUNT_BITS - 1)  # values that are packed before they are added to the bins
PACKED_BYTES = 2 * 8 * HISTOGRAM_KEYS  # of a lane
PAYS = 8 * HISTOGRAM_KEYS  # values of a lane that are worth the clearing and the adding


@functools.cache
def histogram_kernel(packs: bool) -> Any:
    """The histogram of each lane's share; `packs` says whether it uses H_PACKED."""
    config = (packs, sources_digest())

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        bits, ends = pointer(args[H_X], "u32"), pointer(args[H_ENDS], "f32")
        size, lanes = args[H_SIZE], args[H_LANES]
        for lane in range(begin, end):
            bins = pointer(args[H_BINS] + lane * HISTOGRAM_KEYS * 16, "s64")
            even = pointer(args[H_PACKED] + lane * PACKED_BYTES, "s64")
            odd = pointer(args[H_PACKED] + lane * PACKED_BYTES + PACKED_BYTES // 2, "s64")
            if config[0]:
                for key in range(HISTOGRAM_KEYS):
                    even[key] = odd[key] = 0
            last = size * (lane + 1) // lanes
            held = 0
            for first in range(size * lane // lanes, last, BLOCK):
                count = min(BLOCK, last - first)
                lo, hi = finite_range(args[H_X] + 4 * first, count)
                ends[2 * lane] = smaller(ends[2 * lane], lo)
                ends[2 * lane + 1] = larger(ends[2 * lane + 1], hi)
                paired = 0
                if config[0]:
                    paired = count // 2 * 2
                    for i in range(first, first + paired, 2):
                        one, two = int64(bits[i]), int64(bits[i + 1])
                        even[one >> 16] += (1 << REST_BITS) + (one & REST_MASK)
                        odd[two >> 16] += (1 << REST_BITS) + (two & REST_MASK)
                    held += paired
                for i in range(first + paired, first + count):
                    value = int64(bits[i])
                    at = 2 * (value >> 16)
                    bins[at] += 1
                    bins[at + 1] += value & REST_MASK
                if config[0] and (held >= MOST or first + count == last):
                    _add_packed(even, odd, bins)
                    held = 0

    return kernel


@njit
def _add_packed(even, odd, bins):  # type: ignore[no-untyped-def]
    """Moves what is packed to the bins."""
    for key in range(HISTOGRAM_KEYS):
        one, two = even[key], odd[key]
        bins[2 * key] += (one >> REST_BITS) + (two >> REST_BITS)
        bins[2 * key + 1] += (one & RESTS_MASK) + (two & RESTS_MASK)
        even[key] = odd[key] = 0
