"""What a kernel was compiled to: its name, its assembly, the loop that its time is spent in.

The disk cache keeps no assembly, so a kernel is compiled once more.
"""

from __future__ import annotations

import functools
import gc
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from llvmlite import binding, ir

from fastq.kernels import gemm, isa, matrix, simd
from fastq.kernels.gemm import Tile
from fastq.kernels.native import Kernel, compile_library

# A tier's dot product, and the registers that its tiles fill. LLVM writes vpdpwssd for vpmaddwd and
# vpaddd on some CPUs that have it, whatever the tier.
DOT = {
    "amx_int8": ("(?:tdpbusd|vpdpbusd)", "[tz]mm"),
    "avx512_vnni": ("(?:vpdpbusd|vpdpwssd)", "zmm"),
    "avx_vnni": ("(?:vpdpbusd|vpdpwssd)", "ymm"),
    "avx2": ("(?:vpmaddwd|vpdpwssd)", "ymm"),
    "neon_i8mm": ("(?:us|su)dot", "v"),
    "neon_dotprod": ("sdot", "v"),
    "generic": ("(?:pmaddwd|vpdpwssd)", "xmm"),
}
_TILE_FIELDS = len(fields(Tile))


def kernel_at(address: int) -> Kernel:
    """The living kernel whose code is at this address, as the executor's table names it."""
    for kernel in gc.get_objects():
        if type(kernel) is Kernel and kernel.address == address:
            return kernel
    raise LookupError(f"no kernel is at address {address:#x}")


def config_of(kernel: Kernel) -> tuple[Any, ...]:
    """What its factory closed it over, but for the digest."""
    config: tuple[Any, ...] = inspect.getclosurevars(kernel.function).nonlocals["config"]
    return config[:-1]


def name(factory: str, arguments: tuple[Any, ...]) -> str:
    """`u8s8s32_gemm_6x8c4__avx2 u8 affine` of a tile; the factory and its arguments of others."""
    words = (factory.removesuffix("_kernel"), *arguments)
    return " ".join(map(str, words)).removeprefix("gemm ").removeprefix("matrix ")


def name_of(kernel: Kernel) -> str:
    """The `name` of a compiled kernel."""
    factory, config = kernel.function.__qualname__.partition(".")[0], config_of(kernel)
    if factory in ("gemm_kernel", "matrix_kernel", "winograd_kernel"):
        config = (Tile(*config[:_TILE_FIELDS]), *config[_TILE_FIELDS:])
    return name(factory, config)


@functools.cache
def assembly_of(kernel: Kernel) -> str:
    """The kernel's assembly for this machine, from a compilation of its own."""
    text: str = compile_library(kernel.function).get_asm_str()
    return text


Emit = Callable[[Any, Any, list[Any]], None]


def products_of(tile: Tile, epilogue: str, rows: str) -> Emit:
    """What `assembly_for` takes, of a tile of products."""
    if tile.kind == "matrix":
        return lambda b, block, place: matrix.emit_bands(b, tile, epilogue, block, place)
    return lambda b, block, place: gemm.emit_tiles(b, tile, epilogue, rows, block, place)


def assembly_for(emit: Emit, triple: str, cpu: str) -> str:
    """The code of emit(builder, block, place) for a CPU by LLVM's name for it, whatever this one
    is: block and the five of place are int64 values."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = ir.Module()
    module.triple = triple
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [simd.i64] * 6), "tile")
    builder = ir.IRBuilder(function.append_basic_block("entry"))
    body = builder.append_basic_block("body")
    builder.branch(body)
    builder.position_at_end(body)
    block, *place = function.args
    emit(builder, block, place)
    builder.ret_void()
    parsed = binding.parse_assembly(str(module))
    machine = binding.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    options = binding.create_pipeline_tuning_options(speed_level=3)
    passes = binding.create_pass_builder(machine, options)
    passes.getModulePassManager().run(parsed, passes)
    text: str = machine.emit_assembly(parsed)
    return text


@dataclass(frozen=True)
class Loop:
    """One innermost loop with dot products: how many, and how many vectors it spills."""

    lines: tuple[str, ...]
    dots: int
    spills: int


def k_loops(text: str, tier: str) -> list[Loop]:
    """The innermost loops (label to backward jump) that hold the tier's dot product."""
    instruction, register = DOT[tier.removesuffix("-emulated")]
    dot = re.compile(rf"{instruction}\s.*\b{register}")
    spill = re.compile(rf"\(%rsp\), %{register}|%{register}\d+, -?\d*\(%rsp\)|\bq\d+, .*\[sp")
    lines = [line.strip() for line in text.splitlines()]
    labels: dict[str, int] = {}
    loops: dict[tuple[int, int], Loop] = {}
    for end, line in enumerate(lines):
        if match := re.match(r"(\.?LBB\w+):", line):
            labels[match[1]] = end + 1
        jump = re.match(r"(?:j\w+|b\.\w+|t?bn?z .*,)\s+(\S+)$", line)
        if jump is None or jump[1] not in labels:
            continue
        begin = labels[jump[1]]
        if any(begin <= inner for inner, _ in loops):
            continue  # it is around a loop that is there already
        body = tuple(lines[begin : end + 1])
        dots, spills = (sum(bool(p.search(row)) for row in body) for p in (dot, spill))
        if dots:
            loops[begin, end] = Loop(body, dots, spills)
    return list(loops.values())


def k_loop_of(kernel: Kernel) -> Loop | None:
    """The K loop of a kernel made for one tier; None of a plain loop or an emulated tier."""
    for word in config_of(kernel):
        if word in isa.BY_NAME:
            return next(iter(k_loops(assembly_of(kernel), word)), None)
    return None
