"""A table of 256 bytes, read by vectors of bytes at once.

avx512vbmi   vpermi2b reads 128 entries by 7 bits; the eighth chooses between two of them
avx2         pshufb reads 16 entries by 4 bits, and gives 0 for an index below 0. Row r holds
             TABLE[16r..] ^ TABLE[16(r-1)..] of its half of the table, and is read by
             x - 16r: the rows up to that of x count, and their xor is the entry.
scalar       one load for each
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from fastq.kernels.simd import address, call, const, i8, i32, i64, load, shuffle, vec


def lookup_widths(method: str) -> tuple[int, ...]:
    """Vector widths that emit_lookup takes, for lines.emit_line."""
    return {"avx512vbmi": (64, 1), "avx2": (32, 16, 1), "scalar": (1,)}[method]


def load_table(b: Any, method: str, table: Any) -> list[Any]:
    """What stays in registers, or close to them, while lines are read."""
    if method == "avx512vbmi":
        return [load(b, vec(i8, 64), table, 64 * i) for i in range(4)]
    if method == "avx2":
        entries = [load(b, vec(i8, 16), table, 16 * i) for i in range(16)]
        rows = [
            b.xor(row, before) for row, before in zip(entries, [entries[0], *entries], strict=False)
        ]
        rows[0], rows[8] = entries[0], entries[8]
        return rows
    return []


def emit_lookup(b: Any, method: str, rows: list[Any], table: Any, x: Any) -> Any:
    """table[x] of a vector of bytes, or of their values in wider elements; the result is bytes."""
    width = x.type.count
    if width == 1:
        entry = b.zext(b.extract_element(x, i32(0)), i64)
        value = load(b, i8, address(b, table, entry))
        return b.insert_element(ir.Constant(vec(i8, 1), ir.Undefined), value, i32(0))
    kind = vec(i8, width)
    if x.type.element != i8:
        x = b.trunc(x, kind)
    if method == "avx512vbmi":
        name = "llvm.x86.avx512.vpermi2var.qi.512"
        low, high = (call(b, name, kind, [rows[i], x, rows[i + 1]]) for i in (0, 2))
        return b.select(b.icmp_signed("<", x, const(kind, 0)), high, low)
    name = "llvm.x86.avx2.pshuf.b" if width == 32 else "llvm.x86.ssse3.pshuf.b.128"
    result = const(kind, 0)
    index = x
    for r, row in enumerate(rows):
        if r == 8:  # the upper half: bytes of 128 and more become 0 to 127, the others stay below 0
            index = b.xor(x, const(kind, -128))
        both = shuffle(b, row, row, [*range(16)] * (width // 16))
        result = b.xor(result, call(b, name, kind, [both, index]))
        if r % 8 < 7:
            index = call(b, f"llvm.ssub.sat.v{width}i8", kind, [index, const(kind, 16)])
    return result
