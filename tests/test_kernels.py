"""The kernels' parts: packing, each simd function, the assembly for CPUs that are not here."""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
import pytest
from llvmlite import binding, ir
from numba.core.registry import cpu_target
from numpy.testing import assert_array_equal

from fastq.kernels import isa, matrix, pack, simd
from fastq.kernels.assembly import assembly_for, k_loops, products_of
from fastq.kernels.depthwise import pack_depthwise, taps_of
from fastq.kernels.executor import get_num_threads
from fastq.kernels.gemm import TILES, Tile
from fastq.kernels.tiles import (
    GROUPS,
    choose_nr,
    choose_tile,
    dot_tiles,
    group_tiles,
    tiles_of,
)


@pytest.mark.parametrize("tier", ["amx_int8", "avx512_vnni", "avx_vnni", "avx2", "generic"])
def test_panels_hold_each_weight_once(tier: str, rng: Any) -> None:
    simd_of = simd.emitter(tier)
    cols, side = simd_of.cols, simd_of.side_by_side
    for n, taps, run, nr in [
        (1, 1, 4, 16),
        (9, 3, 5, 16),
        (64, 1, 7, 64),
        (70, 9, 30, 16),
        (17, 2, 70, 16),
    ]:
        weight = rng.integers(-128, 128, (n, taps, run)).astype(np.int8)
        depth = min(simd_of.depth, -(-run // 4) * 4)
        panels = pack.pack_panels(weight, nr, tier, depth)
        starts = np.add.outer(pack.step_starts(run, depth), np.arange(0, depth, 4)).reshape(-1)
        assert panels.ctypes.data % 64 == 0
        assert panels.shape == (-(-n // nr), taps * len(starts), nr, 4)
        # a vector of columns: the first `side` weights of each, then the next
        vectors = panels.reshape(*panels.shape[:2], nr // cols, 4 // side, cols, side)
        by_lane = vectors.swapaxes(3, 4).reshape(panels.shape)
        by_column = by_lane[:, :, np.argsort(simd_of.columns(nr))]
        found = np.zeros((len(panels) * nr, taps, run + 3), np.int64)
        steps = by_column.reshape(len(panels), taps, -1, nr, 4).astype(np.int64)
        for s, start in enumerate(starts):
            part = steps[:, :, s].transpose(0, 2, 1, 3).reshape(-1, taps, 4)
            found[:, :, start : start + 4] += part
        assert_array_equal(found[:n, :, :run], weight)
        assert not found[:, :, run:].any()
        assert not found[n:].any()
        assert np.count_nonzero(panels) == np.count_nonzero(weight)


@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("apart", [(1, 0), (0, 1), (2, 0), (0, 3)])
@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_depthwise_taps_are_those_of_the_outputs(
    rng: Any, outputs: int, apart: tuple[int, int], dilation: tuple[int, int]
) -> None:
    """Each output has each tap of its filter once, over the pixel that it reads."""
    for tier in ("avx512_vnni", "avx_vnni", "avx2", "generic"):
        for kh, kw in [(3, 3), (1, 1), (2, 5)]:
            taps = taps_of((kh, kw), dilation, apart, outputs, tier)
            assert len(taps.places) % simd.emitter(tier).taps_at_once == 0
            for j, filters in enumerate(taps.filters):
                assert sorted(filters[filters >= 0]) == list(range(kh * kw))
                for place, tap in zip(taps.places, filters, strict=True):
                    y, x = divmod(int(tap), kw)
                    expected = (
                        j * apart[0] + y * dilation[0],
                        j * apart[1] + x * dilation[1],
                    )
                    assert tap < 0 or tuple(place) == expected
            weight = rng.integers(1, 128, (37, kh * kw)).astype(np.int8)
            packed = pack_depthwise(weight, taps, tier)
            assert_array_equal(
                np.sort(packed[packed != 0].ravel()), np.sort(np.tile(weight, outputs).ravel())
            )


def test_interleaved_channels_are_a_permutation() -> None:
    for row in isa.ISAS:
        order = np.ravel(simd.emitter(row.name).interleaved_channels())
        assert_array_equal(np.sort(order), np.arange(order.size))


def compiled(emit: Any, arguments: int) -> Any:
    """A function of arrays whose body is emit(builder, pointers), compiled for Numba's CPU."""
    module = ir.Module()
    kind = ir.FunctionType(ir.VoidType(), [simd.ptr] * arguments)
    function = ir.Function(module, kind, "f")
    builder = ir.IRBuilder(function.append_basic_block())
    emit(builder, function.args)
    builder.ret_void()
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    target = binding.Target.from_triple(triple)
    machine = target.create_target_machine(cpu=cpu, features=features)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(str(module)), machine)
    engine.finalize_object()
    call = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(engine.get_function_address("f"))

    def run(*arrays: np.ndarray) -> None:
        assert engine is not None  # keeps the code alive
        call(*[a.ctypes.data for a in arrays])

    return run


def test_dot_means_what_it_says(isa: str, rng: Any) -> None:
    """acc[c] + sum over `side_by_side` of (a[k] - offset) * w[c, k]: the corners of u8 x s8, and
    random."""
    simd_of = simd.emitter(isa)
    cols, side, vectors = simd_of.cols, simd_of.side_by_side, 2

    def emit(b: Any, args: Any) -> None:
        a = simd_of.load_a(b, args[0], simd.i64(0))
        accs = [simd.const(simd_of.acc, 0)] * vectors
        for _ in range(2):
            accs = [
                simd_of.dot(b, acc, a, simd_of.load_b(b, args[1], j * side * cols))
                for j, acc in enumerate(accs)
            ]
        for j, acc in enumerate(accs):
            simd.store(b, acc, args[2], 4 * cols * j)

    run = compiled(emit, 3)
    for a_value in (0, 1, 255, None):
        for w_value in (-128, -1, 127, None):
            a = rng.integers(0, 256, side) if a_value is None else np.full(side, a_value)
            w = rng.integers(-128, 128, (vectors * cols, side))
            w = w if w_value is None else np.full_like(w, w_value)
            out = np.zeros(vectors * cols, np.int32)
            run(a.astype([None, np.uint8, np.int16][simd_of.a_bytes]), w.astype(np.int8), out)
            assert_array_equal(out, 2 * w @ (a - simd_of.offset))


def test_rint_clamp_and_unpack(rng: Any) -> None:
    def emit(b: Any, args: Any) -> None:
        kind = simd.vec(simd.f32, 8)
        x = simd.load(b, kind, args[0])
        lo, hi = simd.const(kind, -3.0), simd.const(kind, 5.0)
        simd.store(b, simd.rint(b, simd.clamp(b, x, lo, hi)), args[1])
        low, high = simd.unpack(b, *[simd.load(b, simd.vec(simd.i16, 16), args[2])] * 2)
        simd.store(b, low, args[3])
        simd.store(b, high, args[3], 32)

    x = np.array([-9.0, -2.5, -0.5, 0.5, 1.5, 2.5, 4.6, 99.0], np.float32)
    words, got, unpacked = np.arange(16, dtype=np.int16), np.zeros(8, np.int32), np.zeros(32, "i2")
    compiled(emit, 4)(x, got, words, unpacked)
    assert got.tolist() == [-3, -2, 0, 0, 2, 2, 5, 5]
    pairs = [[i, i] for i in (0, 1, 2, 3, 8, 9, 10, 11, 4, 5, 6, 7, 12, 13, 14, 15)]
    assert unpacked.reshape(-1, 2).tolist() == pairs


# A CPU that has the tier
CPUS = {
    "amx_int8": "sapphirerapids",
    "avx512_vnni": "znver4",
    "avx_vnni": "alderlake",
    "avx2": "haswell",
    "neon_i8mm": "apple-m2",
    "neon_dotprod": "neoverse-n1",
    "generic": "x86-64",
}


ALL = [t for t in TILES if t.isa in CPUS]
ALL += [t for tier in CPUS for group in GROUPS for t in group_tiles(tier, group)]
ALL += [t for tier in CPUS for t in dot_tiles(tier)]


@pytest.mark.parametrize("tile", ALL, ids=str)
def test_assembly_of_each_tile(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the K loop: the dot instruction as often as there are accumulators, and no spill."""
    monkeypatch.setattr(simd, "ymm_encoding", lambda: "{vex} ")  # as on that CPU
    emit = products_of(tile, "u8", "table")
    family = "aarch64" if tile.isa.startswith("neon") else "x86_64"
    text = assembly_for(emit, f"{family}-unknown-linux-gnu", CPUS[tile.isa])
    loops = k_loops(text, tile.isa)
    assert loops, text
    emitter = simd.emitter(tile.isa)
    vectors = tile.nr * tile.panels // emitter.cols
    dots = {tile.mr * vectors * simd.KR // emitter.side_by_side}
    if tile.kind == "depthwise":
        dots = {tile.mr * tile.outputs * len(emitter.interleaved_channels())}
    if tile.kind == "dot":
        dots = {tile.fold * tile.group}
    if tile.kind == "matrix":  # several bands at once, and one: four accumulators, or fewer
        bands = tile.mr // matrix.ROWS
        dots = {bands * min(4 // bands, vectors), min(4, vectors)}
    found = {loop.dots for loop in loops}
    if tile.wide:  # a product between two pauses may be there twice, for where nothing is left
        found -= {most + 1 for most in dots}
    assert found == dots
    for loop in loops:
        assert not loop.spills, "\n".join(loop.lines)


def test_dot_products_and_spills_are_counted() -> None:
    text = """
.LBB0_1:
	vpmaddwd	%ymm1, %ymm2, %ymm3
	vpmaddwd	32(%rsp), %ymm2, %ymm4
	vmovdqu	64(%rsp), %ymm5
	vmovdqu	%ymm6, 96(%rsp)
	vmovdqu	%ymm6, 96(%rdi)
	vpmaddwd	%xmm1, %xmm2, %xmm3
	jne	.LBB0_1
	vpmaddwd	%ymm1, %ymm2, %ymm3
.LBB0_2:
	vpaddd	%ymm1, %ymm2, %ymm3
	jne	.LBB0_2
.LBB0_3:
	vpmaddwd	%ymm1, %ymm2, %ymm3
	jmp	.LBB0_1
"""
    (loop,) = k_loops(text, "avx2")
    assert (loop.dots, loop.spills) == (2, 3)  # a load, a store, an operand
    text = """
.LBB0_1:
	sdot	v1.4s, v2.16b, v3.16b
	sdot	v4.4s, v2.16b, v3.4b[0]
	ldr	q5, [sp, #16]
	stp	q6, q7, [sp, #32]
	str	q6, [x1]
	b.lt	.LBB0_1
	sdot	v1.4s, v2.16b, v3.16b
"""
    (loop,) = k_loops(text, "neon_dotprod")
    assert (loop.dots, loop.spills) == (2, 2)


@pytest.mark.parametrize("cpu", ["cortex-a72", "neoverse-v1"])
def test_generic_compiles_for_another_architecture(cpu: str) -> None:
    (first, *_) = tiles_of("generic")
    emit = products_of(first, "u8", "affine")
    assert "ret" in assembly_for(emit, "aarch64-unknown-linux-gnu", cpu)


ARM = {
    "cortex-a72": set(),
    "cortex-a76": {"dotprod"},
    "neoverse-n1": {"dotprod"},
    "apple-m1": {"dotprod"},
    "apple-m2": {"dotprod", "i8mm"},
    "neoverse-v1": {"dotprod", "i8mm"},
}


@pytest.mark.parametrize("cpu, products", ARM.items())
def test_arms_products_of_bytes_are_found(cpu: str, products: set[str]) -> None:
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    target = binding.Target.from_triple("aarch64-unknown-linux-gnu")
    assert isa.arm_features(target.create_target_machine(cpu=cpu)) == {"neon", "fma"} | products
    other = binding.Target.from_triple("x86_64-unknown-linux-gnu").create_target_machine()
    assert not isa.arm_features(other)


BROADCASTING = [t for t in ALL if t.isa.startswith("neon") and t.kind == "gemm" and not t.group]


@pytest.mark.parametrize("tile", BROADCASTING, ids=str)
def test_lanes_are_not_repeated_by_instructions_of_their_own(tile: Tile) -> None:
    """On ARM the products read one lane: a load that repeats it, or a move, takes their place."""
    text = assembly_for(products_of(tile, "u8", "table"), "aarch64-linux-gnu", CPUS[tile.isa])
    for loop in k_loops(text, tile.isa):
        assert not [line for line in loop.lines if re.match(r"ld1r|dup|mov\s+v", line)]


def test_vpdpbusd_is_known_to_this_llvm() -> None:
    assert simd.vnni_operand(16) is not None and simd.vnni_operand(8) is not None


def test_every_tier_has_its_tiles() -> None:
    for row in isa.ISAS:
        assert len(tiles_of(row.name, "depthwise")) == 1
        for n in (1, 15, 16, 17, 33, 64, 1000):
            nr = choose_nr(row.name, n)
            for m in (1, 2, 5, 49, 1000):
                assert choose_tile(row.name, nr, m, 8).nr == nr


def test_forcing_a_tier(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isa, "in_use", None)
    monkeypatch.setenv("FASTQ_ISA", "generic")
    assert isa.current() == "generic"
    monkeypatch.setattr(isa, "in_use", None)
    monkeypatch.setenv("FASTQ_ISA", "mmx")
    with pytest.raises(ValueError, match="wanted one of amx_int8"):
        isa.current()
    monkeypatch.setattr(isa, "target_features", lambda: frozenset())
    monkeypatch.setenv("FASTQ_ISA", "avx2")
    with pytest.raises(RuntimeError, match="this CPU lacks avx2"):
        isa.current()
    assert isa.runnable()[0] == "generic"


def test_amx_needs_the_systems_permission(monkeypatch: pytest.MonkeyPatch) -> None:
    amx = isa.BY_NAME["amx_int8"]
    monkeypatch.setattr(isa, "target_features", lambda: frozenset(amx.features))
    monkeypatch.setattr(isa, "_tiles_permitted", lambda: False)
    assert isa.missing(amx) == ["the operating system's permission to use AMX"]
    assert isa.runnable()[0] == "avx512_vnni"
    monkeypatch.setattr(isa, "_tiles_permitted", lambda: True)
    assert isa.runnable()[0] == "amx_int8"


def test_number_of_threads_is_known() -> None:
    assert get_num_threads() >= 1
