"""A table of 256 bytes, read by vectors of bytes at once.

avx512vbmi   vpermi2b reads 128 entries by 7 bits; the eighth chooses between two of them
avx2         pshufb reads 16 entries by the lower 4 bits, from each of 16 rows; the upper bits
             choose between rows, one bit after the other
neon         tbl4 reads 64 entries, four times; where a byte is beyond them nothing is changed
scalar       one load for each
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fastq.kernels.simd import address, call, const, i8, i16, i32, i64, load, shuffle, unpack, vec


def lookup_widths(method: str) -> tuple[int, ...]:
    """Vector widths that emit_lookup takes, for lines.emit_line."""
    widths = {"avx512vbmi": (64, 1), "avx2": (32, 16, 1), "neon": (16, 1), "scalar": (1,)}
    return widths[method]


def load_table(b: Any, method: str, table: Any) -> list[Any]:
    """What stays in registers, or close to them, while lines are read."""
    if method == "avx512vbmi":
        return [load(b, vec(i8, 64), table, 64 * i) for i in range(4)]
    if method in ("avx2", "neon"):
        return [load(b, vec(i8, 16), table, 16 * i) for i in range(16)]
    return []


def emit_lookup(b: Any, method: str, rows: list[Any], table: Any, x: Any) -> Any:
    """table[x] of a vector of bytes, or of their values in wider elements; the result is bytes, or
    of 32 values int16 again."""
    width = x.type.count
    if width == 1:
        entry = b.zext(b.extract_element(x, i32(0)), i64)
        value = load(b, i8, address(b, table, entry))
        return b.insert_element(ir.Constant(vec(i8, 1), ir.Undefined), value, i32(0))
    kind = vec(i8, width)
    if method == "avx2" and x.type == vec(i16, 32):
        # packing and unpacking within 128 bits: the order between does not matter
        halves = [shuffle(b, x, x, range(first, first + 16)) for first in (0, 16)]
        packed = call(b, "llvm.x86.avx2.packuswb", kind, halves)
        found = unpack(b, emit_lookup(b, method, rows, table, packed), const(kind, 0))
        low, high = (b.bitcast(half, halves[0].type) for half in found)
        return shuffle(b, low, high, range(32))
    if x.type.element != i8:
        x = b.trunc(x, kind)
    if method == "avx512vbmi":
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        low, high = (call(b, name, kind, [rows[i], x, rows[i + 1]]) for i in (0, 2))
        return b.select(b.icmp_signed("<", x, const(kind, 0)), high, low)
    if method == "neon":
        found = call(b, "llvm.aarch64.neon.tbl4.v16i8", kind, [*rows[:4], x])
        for i in range(4, 16, 4):
            x = b.sub(x, const(kind, 64))
            found = call(b, "llvm.aarch64.neon.tbx4.v16i8", kind, [found, *rows[i : i + 4], x])
        return found
    name = "llvm.x86.avx2.pshuf.b" if width == 32 else "llvm.x86.ssse3.pshuf.b.128"
    blend = "llvm.x86.avx2.pblendvb" if width == 32 else "llvm.x86.sse41.pblendvb"
    low = b.and_(x, const(kind, 15))
    found = []
    for row in rows:
        both = shuffle(b, row, row, [*range(16)] * (width // 16))
        found.append(call(b, name, kind, [both, low]))
    words = vec(i16, width // 2)
    for shift in (3, 2, 1, 0):  # bit 4, then 5, 6, 7 to the place of the sign
        sign = b.bitcast(b.shl(b.bitcast(x, words), const(words, shift)), kind)
        pairs = zip(found[::2], found[1::2], strict=True)
        found = [call(b, blend, kind, [even, odd, sign]) for even, odd in pairs]
    return found[0]
