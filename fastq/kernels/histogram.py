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

Half of what a ReLU gives is 0. Where vectors can be compressed, zeros are told apart sixteen at a
time and only counted; the other values of a block are put side by side first.

A task is a lane: it adds its share of x to its own bins and ends. The lanes' bins add up.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import int64, njit, types
from numba.extending import intrinsic

from fastq.kernels.isa import target_features
from fastq.kernels.lines import emit_loop
from fastq.kernels.native import native
from fastq.kernels.scalar import larger, pointer, smaller, stack_bytes
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import address, call, const, i32, i64, load, ptr, store, vec
from fastq.kernels.stage import finite_range
from fastq.qparams import HISTOGRAM_KEYS

(H_X, H_SIZE, H_LANES, H_BINS, H_ENDS, H_PACKED, H_FIELDS) = range(7)

BLOCK = 4096  # values: read for the ends, then again from the first-level cache for the bins
REST_MASK = 2**16 - 1
COUNT_BITS, REST_BITS = 24, 40  # of a packed number
RESTS_MASK = 2**REST_BITS - 1
MOST = 2 ** (COUNT_BITS - 1)  # values that are packed before they are added to the bins
PACKED_BYTES = 2 * 8 * HISTOGRAM_KEYS  # of a lane
GROUP = 64  # bins that are looked at together
LANES = 16  # values that are compressed at once
BUFFER_BYTES = 4 * (BLOCK + LANES)
PAYS = 4 * HISTOGRAM_KEYS  # values of a lane that are worth the clearing and the adding


@intrinsic
def _nonzero(typingctx: Any, x: Any, count: Any, out: Any) -> Any:
    """Puts those of `count` values of 32 bits at x, a multiple of LANES, that are not 0 side by
    side at out, with room for LANES more; how many they are. Needs avx512f."""

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        x, count, out = values
        x, out = b.inttoptr(x, ptr), b.inttoptr(out, ptr)
        kind = vec(i32, LANES)

        def body(i: Any, found: Any) -> list[Any]:
            value = load(b, kind, x, b.mul(i, i64(4)))
            mask = b.icmp_unsigned("!=", value, const(kind, 0))
            name = f"llvm.x86.avx512.mask.compress.v{LANES}i32"
            pressed = call(b, name, kind, [value, const(kind, 0), mask])
            store(b, pressed, address(b, out, b.mul(found, i64(4))))
            bits = b.bitcast(mask, ir.IntType(LANES))
            many = call(b, f"llvm.ctpop.i{LANES}", ir.IntType(LANES), [bits])
            return [b.add(found, b.zext(many, i64))]

        _, (found,) = emit_loop(b, i64(0), count, LANES, [i64(0)], body)
        return found

    return types.int64(types.int64, types.int64, types.int64), codegen


def presses() -> bool:
    """Whether this CPU compresses vectors."""
    return "avx512f" in target_features()


@functools.cache
def histogram_kernel(packs: bool, presses: bool) -> Any:
    """The histogram of each lane's share; whether it uses H_PACKED, and puts values side by side
    first."""
    config = (packs, presses, sources_digest())

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
                values, found, done = pointer(args[H_X] + 4 * first, "u32"), count, count
                if config[1]:
                    done = count // LANES * LANES
                    buffer = stack_bytes(BUFFER_BYTES)
                    found = _nonzero(args[H_X] + 4 * first, done, buffer)
                    values = pointer(buffer, "u32")
                    bins[0] += done - found
                if config[0]:
                    for i in range(0, found - 1, 2):
                        one, two = int64(values[i]), int64(values[i + 1])
                        even[one >> 16] += (1 << REST_BITS) + (one & REST_MASK)
                        odd[two >> 16] += (1 << REST_BITS) + (two & REST_MASK)
                    if found % 2:
                        one = int64(values[found - 1])
                        even[one >> 16] += (1 << REST_BITS) + (one & REST_MASK)
                    held += done
                else:
                    for i in range(found):
                        _add_value(bins, values[i])
                for i in range(first + done, first + count):
                    _add_value(bins, bits[i])
                if config[0] and (held >= MOST or first + count == last):
                    _add_packed(even, odd, bins)
                    held = 0

    return kernel


@njit
def _add_value(bins, bits):  # type: ignore[no-untyped-def]
    at = 2 * (int64(bits) >> 16)
    bins[at] += 1
    bins[at + 1] += int64(bits) & REST_MASK


@njit
def _add_packed(even, odd, bins):  # type: ignore[no-untyped-def]
    """Moves what is packed to the bins: most are empty, and not even read."""
    for first in range(0, HISTOGRAM_KEYS, GROUP):
        filled = 0
        for key in range(first, first + GROUP):
            filled |= even[key] | odd[key]
        if filled == 0:
            continue
        for key in range(first, first + GROUP):
            one, two = even[key], odd[key]
            bins[2 * key] += (one >> REST_BITS) + (two >> REST_BITS)
            bins[2 * key + 1] += (one & RESTS_MASK) + (two & RESTS_MASK)
            even[key] = odd[key] = 0
