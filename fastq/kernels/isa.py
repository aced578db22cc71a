"""Instruction sets: which tiers there are, which of them may run here, which one is used.

FASTQ_ISA=<name> forces a tier. An "-emulated" tier has the tile shapes and the data layout of
the real one, with its dot product written in portable LLVM IR: it runs on every CPU and gives the
same bits, slowly. It is there to test a tier on a machine that lacks it.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from llvmlite import binding


@dataclass(frozen=True)
class Isa:
    """One tier: its name, and the LLVM features that its code needs."""

    name: str
    features: tuple[str, ...]


_AVX512 = ("avx512f", "avx512bw", "avx512vl", "avx512vnni")
# fastest first
ISAS = (
    Isa("amx_int8", ("amx-tile", "amx-int8", *_AVX512)),
    Isa("avx512_vnni", _AVX512),
    Isa("avx_vnni", ("avx2", "vpdpbusd ymm")),
    Isa("avx2", ("avx2",)),
    Isa("neon_i8mm", ("i8mm",)),
    Isa("neon_dotprod", ("dotprod",)),
    Isa("generic", ()),
    Isa("amx_int8-emulated", ()),
    Isa("avx512_vnni-emulated", ()),
    Isa("avx_vnni-emulated", ()),
    Isa("neon_dotprod-emulated", ()),
)
BY_NAME = {isa.name: isa for isa in ISAS}


@functools.cache
def target_features() -> frozenset[str]:
    """What Numba compiles for, not what the CPU has: other IR would end the process.

    In LLVM's names; "vpdpbusd ymm" is AVX-VNNI, or AVX512-VNNI's on half of its vectors.
    """
    from numba.core.registry import cpu_target

    codegen = cpu_target.target_context.codegen()
    named = frozenset(f[1:] for f in codegen._tm_features.split(",") if f.startswith("+"))
    # one instruction in two encodings; the compiler takes the one that there is
    if "avxvnni" in named or named >= {"avx512vnni", "avx512vl"}:
        named |= {"vpdpbusd ymm"}
    return named | arm_features(codegen._tm)


def ymm_encoding() -> str:
    """What the assembler wants before `vpdpbusd ymm`: AVX-VNNI's encoding, or AVX512-VNNI's."""
    features = target_features()
    return "" if "avx512vnni" in features and "avxvnni" not in features else "{vex} "


def arm_features(machine: Any) -> frozenset[str]:
    """What a 64-bit ARM target has: all have vectors and their fused products.

    Products of bytes go with the CPU's name, and nothing tells them. So a sum that each of them can
    do is compiled, and its code is looked at.
    """
    if not machine.triple.startswith(("aarch64", "arm64")):
        return frozenset()
    code = """
        declare i32 @llvm.vector.reduce.add.v16i32(<16 x i32>)
        define i32 @sum(<16 x i8> %a, <16 x i8> %b) {
          %x = zext <16 x i8> %a to <16 x i32>
          %y = EXTENDED <16 x i8> %b to <16 x i32>
          %products = mul <16 x i32> %x, %y
          %sum = call i32 @llvm.vector.reduce.add.v16i32(<16 x i32> %products)
          ret i32 %sum
        }"""
    found = {"neon", "fma"}
    for feature, extended, instruction in (("dotprod", "zext", "udot"), ("i8mm", "sext", "usdot")):
        module = binding.parse_assembly(code.replace("EXTENDED", extended))
        if f"\t{instruction}" in machine.emit_assembly(module):
            found.add(feature)
    return frozenset(found)


def cpu_name() -> str:
    """LLVM's name of the CPU that Numba compiles for: its own of this one, or NUMBA_CPU_NAME."""
    from numba.core.registry import cpu_target

    return str(cpu_target.target_context.codegen().magic_tuple()[1])


def missing(isa: Isa) -> list[str]:
    """What the tier needs and Numba's target, or the operating system, does not have."""
    lacking = [f for f in isa.features if f not in target_features()]
    if not lacking and "amx-tile" in isa.features and not _tiles_permitted():
        lacking = ["the operating system's permission to use AMX"]
    return lacking


@functools.cache
def _tiles_permitted() -> bool:
    """Asks Linux for the tile registers: a process has them, in all its threads, once it asked.

    arch_prctl(ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), Documentation/arch/x86/xstate.rst. Other
    systems' ways are not known here: no AMX there.
    """
    if not sys.platform.startswith("linux"):
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None, use_errno=True).syscall(arch_prctl, request, tile_data) == 0  # type: ignore[no-any-return]


def runnable() -> list[str]:
    """Names of the tiers that can run here, the fastest first, the emulated ones last."""
    return [isa.name for isa in ISAS if not missing(isa)]


in_use: str | None = None  # None before `current` was asked


def current() -> str:
    """The tier in use: FASTQ_ISA, or the fastest that runs here."""
    global in_use
    if in_use is None:
        forced = os.environ.get("FASTQ_ISA")
        in_use = _checked(forced) if forced else runnable()[0]
    return in_use


@contextmanager
def using(name: str) -> Iterator[None]:
    """Uses another tier inside a `with` block, in all threads: for tests and benchmarks."""
    global in_use
    before, in_use = current(), _checked(name)
    try:
        yield
    finally:
        in_use = before


def _checked(name: str) -> str:
    if name not in BY_NAME:
        raise ValueError(f"FASTQ_ISA={name!r}: wanted one of {', '.join(BY_NAME)}")
    if lacking := missing(BY_NAME[name]):
        raise RuntimeError(
            f"FASTQ_ISA={name}: this CPU lacks {', '.join(lacking)} (or NUMBA_CPU_FEATURES "
            f"hides it); runnable here: {', '.join(runnable())}"
        )
    return name
