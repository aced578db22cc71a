"""The physical limits of this machine, measured: dot products on registers, and reading memory.

A loop of volatile inline assembly: LLVM may not fold, hoist or strength-reduce it, so the
instructions counted are the instructions executed. 1 MAC = 2 operations.

The limit that a fastq kernel is held to is the best *exact* row of the tier in use: `tdpbusd`
where the CPU has AMX, `vpdpbusd` where it has VNNI, else `vpmaddwd` + `vpaddd` on values widened to
int16. `vpmaddubsw` saturates at int16; it is what the peers use without VNNI, and measured beside.
Operations are those of the direct sum: winograd.py does with fewer, and can be beyond the limit.
"""

from __future__ import annotations

import functools
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from fastq.kernels import isa
from fastq.kernels.isa import target_features
from fastq.kernels.matrix import A_TILES, B_TILES, ROWS, tile_config
from fastq.kernels.simd import Amx, emitter, i64, ptr

SECONDS = 0.02  # of one measurement; the best of REPEATS is the limit
REPEATS = 20


class Instruction(NamedTuple):
    """One way to multiply and accumulate. In `asm` (x86: AT&T order) $0 is the accumulator, $1 a
    scratch register, $2 the operand; of tile registers simd.Amx says it, not `asm`. `accumulators`
    hide the latency and fit the registers."""

    name: str
    feature: str
    element: str
    bits: int
    macs: int
    accumulators: int
    exact: bool
    asm: str


INSTRUCTIONS = (
    Instruction("tdpbusd tmm", "amx-int8", "tile", 8192, 16 * 16 * 64, 4, True, ""),
    Instruction("vpdpbusd zmm", "avx512vnni", "i32", 512, 64, 24, True, "vpdpbusd $2, $2, $0"),
    Instruction(
        "vpdpbusd ymm", "vpdpbusd ymm", "i32", 256, 32, 12, True, "{vex} vpdpbusd $2, $2, $0",
    ),
    Instruction(
        "vpmaddwd + vpaddd ymm", "avx2", "i32", 256, 16, 12, True,
        "vpmaddwd $2, $2, $1; vpaddd $1, $0, $0",
    ),
    Instruction(
        "vpmaddubsw + vpmaddwd + vpaddd ymm", "avx2", "i32", 256, 32, 12, False,
        "vpmaddubsw $2, $2, $1; vpmaddwd $2, $1, $1; vpaddd $1, $0, $0",
    ),
    Instruction("usdot", "i8mm", "i32", 128, 16, 24, True, "usdot $0.4s, $2.16b, $2.16b"),
    Instruction("sdot", "dotprod", "i32", 128, 16, 24, True, "sdot $0.4s, $2.16b, $2.16b"),
    Instruction("float32 fmla", "neon", "f32", 128, 4, 24, False, "fmla $0.4s, $2.4s, $2.4s"),
    Instruction("float32 fma zmm", "avx512f", "f32", 512, 16, 24, False, "vfmadd231ps $2, $2, $0"),
    Instruction("float32 fma ymm", "avx2", "f32", 256, 8, 12, False, "vfmadd231ps $2, $2, $0"),
)  # fmt: skip


def available() -> list[Instruction]:
    """The rows that Numba's target can assemble; any other would end the process."""
    tiles = "amx_int8" in isa.runnable()  # the operating system has a say, too
    return [
        dot
        for dot in INSTRUCTIONS
        if dot.feature in target_features() and (tiles or dot.element != "tile")
    ]


def exact() -> list[Instruction]:
    """The exact rows of the tier in use; of one that names none, all of this machine's."""
    rows = [dot for dot in available() if dot.exact]
    return [dot for dot in rows if dot.feature in isa.BY_NAME[isa.current()].features] or rows


def _loop(builder: ir.IRBuilder, n: ir.Value, state: list[ir.Value], body: Any) -> list[ir.Value]:
    """Do `state = body(i, state)` for i in range(max(n, 1)); the last state."""
    before = builder.block
    loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
    builder.branch(loop)
    builder.position_at_end(loop)
    i = builder.phi(n.type)
    phis = [builder.phi(value.type) for value in state]
    new = body(i, phis)
    following = builder.add(i, n.type(1))
    builder.cbranch(builder.icmp_signed("<", following, n), loop, done)
    for phi, first, last in zip([i, *phis], [n.type(0), *state], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, loop)
    builder.position_at_end(done)
    return new


@intrinsic(prefer_literal=True)
def _dots(typingctx: Any, row: Any, n: Any) -> Any:
    """n rounds of row `row` of INSTRUCTIONS on each of its accumulators."""
    dot = INSTRUCTIONS[row.literal_value]

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        if dot.element == "tile":
            _tile_dots(builder, dot, args[1])
            return context.get_dummy_value()
        element = ir.FloatType() if dot.element == "f32" else ir.IntType(32)
        vector = ir.VectorType(element, dot.bits // 32)
        zero = ir.Constant(vector, [0] * vector.count)
        # not zero: a multiplier that idles lets the clock rise
        operand = ir.Constant(vector, [0.5 if dot.element == "f32" else 0x03050307] * vector.count)
        # v: any of the 32 AVX-512 registers; the scratch $1 must not share the operand's register
        register = {512: "v", 256: "x", 128: "w"}[dot.bits]
        both = ir.LiteralStructType([vector, vector])
        asm = ir.InlineAsm(
            ir.FunctionType(both, [vector, vector]),
            dot.asm.replace("{vex} ", isa.ymm_encoding()),
            f"={register},=&{register},{register},0",
            side_effect=True,
        )

        def body(i: ir.Value, accumulators: list[ir.Value]) -> list[ir.Value]:
            return [
                builder.extract_value(builder.call(asm, [operand, acc]), 0) for acc in accumulators
            ]

        _loop(builder, args[1], [zero] * dot.accumulators, body)
        return context.get_dummy_value()

    return types.void(row, types.int64), codegen


def _tile_dots(builder: ir.IRBuilder, dot: Instruction, n: ir.Value) -> None:
    simd = emitter("amx_int8")
    assert isinstance(simd, Amx)

    def constant(values: Any) -> ir.Value:
        kind = ir.ArrayType(ir.IntType(8), len(values))
        memory = builder.alloca(kind)
        builder.store(ir.Constant(kind, [int(value) for value in values]), memory)
        memory.type = ptr  # llvmlite gives it a typed pointer, which LLVM no longer knows
        return memory

    simd.configure(builder, constant(tile_config(ROWS, Amx.depth)))
    operand = constant([7, 3, 5, 3] * 256)
    for register in (*A_TILES, *B_TILES):
        simd.tile_load(builder, register, operand, i64(64))
    for register in range(dot.accumulators):
        simd.tile_zero(builder, register)

    def body(i: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
        for j in range(dot.accumulators):
            simd.tile_dot(builder, j, A_TILES[j // 2], B_TILES[j % 2])
        return []

    _loop(builder, n, [], body)
    simd.release(builder)


@functools.cache
def _dots_kernel(row: int) -> Any:
    @njit(types.void(types.int64), nogil=True)
    def kernel(n: int) -> None:
        _dots(row, n)  # type: ignore[call-arg]  # Numba adds the typing context

    return kernel


def _fastest(work: Any, threads: int, repeats: int) -> float:
    """Seconds that one unit of work(n) takes when `threads` threads do n units each, at best."""
    n = 1
    while True:
        start = time.perf_counter()
        work(0, n)
        seconds = time.perf_counter() - start
        if seconds > SECONDS / 4:
            break
        n *= 2
    n = max(1, int(n * SECONDS / seconds))
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = time.perf_counter()
            list(pool.map(work, range(threads), [n] * threads))
            best = min(best, time.perf_counter() - start)
    return best / n


_best_gops: dict[tuple[Instruction, int], float] = {}


def gops(dot: Instruction, threads: int) -> float:
    """10^9 operations per second of one row, all threads together: the best seen so far."""
    if (dot, threads) not in _best_gops:
        _measure(dot, threads, REPEATS)
    return _best_gops[dot, threads]


def _measure(dot: Instruction, threads: int, repeats: int) -> None:
    kernel = _dots_kernel(INSTRUCTIONS.index(dot))
    seconds = _fastest(lambda _, n: kernel(n), threads, repeats)
    found = 2 * dot.macs * dot.accumulators * threads / seconds / 1e9
    _best_gops[dot, threads] = max(found, _best_gops.get((dot, threads), 0.0))


def measure_again(threads: int) -> None:
    """Once more, shortly: a moment when the machine was busy must not lower the limit."""
    for dot in exact():
        _measure(dot, threads, REPEATS // 4)


def compute_peak(threads: int) -> float:
    """GOP/s of the best exact integer row; NaN where no row is known for this CPU."""
    return max((gops(dot, threads) for dot in exact()), default=float("nan"))


def vpdpbusd(threads: int) -> float:
    """GOP/s of the widest `vpdpbusd` of this machine; NaN without VNNI."""
    rows = [gops(dot, threads) for dot in available() if dot.name.startswith("vpdpbusd")]
    return max(rows, default=float("nan"))


@intrinsic
def _read(typingctx: Any, address: Any, blocks: Any) -> Any:
    """Load blocks * 256 bytes from `address` into registers."""

    def codegen(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        pointer = ir.IntType(64)
        loads = [f"vmovdqu {32 * j}($0), %ymm{j}" for j in range(8)]
        registers = [f"ymm{j}" for j in range(8)]
        if "neon" in target_features():
            loads = [f"ldp q{j}, q{j + 1}, [$0, #{16 * j}]" for j in range(0, 16, 2)]
            registers = [f"q{j}" for j in range(16)]
        asm = ir.InlineAsm(
            ir.FunctionType(ir.VoidType(), [pointer]),
            "; ".join(loads),
            ",".join(["r", *(f"~{{{name}}}" for name in registers), "~{memory}"]),
            side_effect=True,
        )

        def body(i: ir.Value, state: list[ir.Value]) -> list[ir.Value]:
            builder.call(asm, [builder.add(args[0], builder.mul(i, pointer(256)))])
            return []

        _loop(builder, args[1], [], body)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


@functools.cache
def _read_kernel() -> Any:
    @njit(types.void(types.int64, types.int64, types.int64), nogil=True)
    def kernel(address: int, blocks: int, n: int) -> None:
        for _ in range(n):
            _read(address, blocks)  # type: ignore[call-arg]

    return kernel


@functools.cache
def _bandwidth(size: int, threads: int) -> float:
    if not target_features() & {"avx", "neon"}:
        return float("nan")
    data = np.ones(size, np.uint8)  # written, so that its pages are its own
    blocks = max(1, size // threads // 256)
    kernel, start, part = _read_kernel(), data.ctypes.data, size // threads
    seconds = _fastest(lambda t, n: kernel(start + t * part, blocks, n), threads, REPEATS)
    return blocks * 256 * threads / seconds / 1e9


def read_bandwidth(size: int, threads: int) -> float:
    """GB/s of reading `size` bytes again and again, shared by the threads.

    Small sizes stay in a cache, which is what a warm kernel of that size reads from. Measured at
    powers of two from 16 KiB to 512 MiB; `size` takes the nearest.
    """
    power = min(max(round(np.log2(max(size, 1))), 14), 29)
    return _bandwidth(1 << power, threads)


def limits(macs: int, size: int, threads: int) -> tuple[float, float]:
    """The roofline in seconds: what `macs` dot products take, and reading `size` bytes."""
    compute = 2 * macs / compute_peak(threads) / 1e9
    return compute, size / read_bandwidth(size, threads) / 1e9


def limit_seconds(macs: int, size: int, threads: int) -> float:
    """No kernel that does `macs` and touches `size` bytes can be faster."""
    return max(limits(macs, size, threads))


def report(threads: int) -> str:
    """What was measured, a line each."""
    lines = [f"{gops(dot, threads):8.0f} GOP/s  {dot.name}" for dot in available()]
    for power in (15, 18, 22, 29):
        size = f"{1 << power - 10} KiB" if power < 20 else f"{1 << power - 20} MiB"
        lines.append(f"{read_bandwidth(1 << power, threads):8.1f} GB/s   read {size}")
    return "\n".join(lines)
