"""3x3 convolutions with a quarter of the multiplications: the same bits as the direct sum."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from conftest import host_isas
from test_ops import EPILOGUES, assert_same, epilogues, s8, u8

from fastq import ops, reference
from fastq.kernels import assembly, executor, simd, winograd
from fastq.kernels import isa as isa_room
from fastq.kernels.simd import emitter, fields_of, ptr
from fastq.qparams import Requant
from fastq.weights import Conv2dWeight


def rows_of(run: Any) -> list[str]:
    """The kernels that a call takes."""
    run()
    with executor.recording() as runs:
        run()
    return [
        assembly.name_of(assembly.kernel_at(int(row[executor.KERNEL])))
        for recorded in runs
        for row in recorded.table.rows
    ]


TIERS = [row for row in host_isas() if winograd.tiles(row.values[0])]  # type: ignore[attr-defined]


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Each instruction set that has it; there it is taken whether it pays or not."""
    monkeypatch.setattr(winograd.Split, "pays", True)
    with isa_room.using(request.param):
        yield request.param


# B, H, W, C, N, padding: images of less than a tile, tiles cut off or short on every side, blocks
SHAPES = [
    (1, 1, 1, 32, 16, 1), (1, 3, 3, 32, 16, 0), (1, 4, 4, 32, 32, 1), (2, 5, 9, 32, 16, 1),
    (3, 13, 6, 36, 48, 0), (1, 8, 8, 112, 16, 1), (1, 40, 24, 64, 16, 1), (9, 7, 7, 48, 16, 1),
    (1, 6, 6, 44, 64, ((2, 0), (1, 3))), (1, 20, 9, 32, 128, 1), (5, 14, 14, 112, 16, 1),
    (3, 2, 70, 112, 16, 1), (60, 10, 1, 32, 16, 1),
]  # fmt: skip


def whole_panels(tier: str, n: int) -> int:
    """At least n filters: emulated tiers have wide panels only."""
    narrowest = min(tile.nr for tile in winograd.tiles(tier))
    return -(-n // narrowest) * narrowest


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("b, h, w, c, n, padding", SHAPES)
def test_conv2d(
    tier: str, rng: Any, b: int, h: int, w: int, c: int, n: int, padding: Any, epilogue: str
) -> None:
    n = whole_panels(tier, n)
    x, weight = u8(rng, b, h, w, c), Conv2dWeight(s8(rng, n, c, 3, 3), padding=padding)
    last = epilogues(rng, n)[epilogue]
    got = ops.conv2d(x, weight, last, x_zero_point=9)
    assert_same(got, reference.conv2d(x, weight, last, x_zero_point=9))
    run = rows_of(lambda: ops.conv2d(x, weight, last, x_zero_point=9))
    assert any("winograd" in name for name in run)


def test_conv2d_that_adds(tier: str, rng: Any) -> None:
    for b, h, w, c, n in [(1, 4, 4, 32, 16), (2, 7, 9, 48, 48), (1, 9, 9, 32, 64)]:
        n = whole_panels(tier, n)
        x, weight = u8(rng, b, h, w, c), Conv2dWeight(s8(rng, n, c, 3, 3), padding=1)
        multiplier = (rng.random(n) * 1e-3).astype(np.float32)
        last = Requant(multiplier, 100, add_multiplier=rng.random(n), add_zero_point=31)
        add = u8(rng, b, h, w, n)
        got = ops.conv2d(x, weight, last, add=add)
        assert_same(got, reference.conv2d(x, weight, last, add=add))


@pytest.mark.parametrize("value", [0, 127, -128])
def test_the_corners_of_the_range(tier: str, value: int) -> None:
    """The largest operands everywhere, with as many channels as 26 bits allow, and more."""
    for c in (112, 128):
        weight = Conv2dWeight(np.full((16, c, 3, 3), value, np.int8), padding=1)
        assert winograd.is_exact(weight.data) == (value == 0 or 255 * 9 * c * abs(value) < 2**25)
        for x in (np.full((1, 9, 9, c), 255, np.uint8), np.zeros((1, 4, 4, c), np.uint8)):
            got = ops.conv2d(x, weight, x_zero_point=255)
            assert_same(got, reference.conv2d(x, weight, x_zero_point=255))


def test_alternating_extremes(tier: str, rng: Any) -> None:
    """0 and 255 in turns take the transformed activations to their own extremes."""
    weight = Conv2dWeight(s8(rng, 16, 32, 3, 3), padding=1)
    for pattern in ((0, 255), (255, 0), (255, 255, 0), (0, 0, 255, 255)):
        x = np.resize(np.array(pattern, np.uint8), (1, 10, 11, 32))
        for image in (x, x.swapaxes(1, 2), np.resize(np.array(pattern, np.uint8), (1, 32, 9, 11)).transpose(0, 2, 3, 1)):  # fmt: skip # noqa: E501
            assert_same(ops.conv2d(image, weight), reference.conv2d(image, weight))


def test_threads_share_it(tier: str, threads: int, rng: Any) -> None:
    x, weight = u8(rng, 2, 30, 30, 64), Conv2dWeight(s8(rng, 32, 64, 3, 3), padding=1)
    assert_same(ops.conv2d(x, weight), reference.conv2d(x, weight))


def test_only_what_it_is_for(isa: str, rng: Any) -> None:
    """Strides, dilations, groups, other windows and odd channels go the direct way."""
    x = u8(rng, 1, 24, 24, 32)
    for options in ({"stride": 2}, {"dilation": 2}, {"groups": 2}):
        weight = Conv2dWeight(s8(rng, 32, 32 // options.get("groups", 1), 3, 3), **options)
        assert not any("winograd" in name for name in rows_of(lambda: ops.conv2d(x, weight)))  # noqa: B023
    for c, kernel in ((32, 5), (22, 3)):
        weight = Conv2dWeight(s8(rng, 32, c, kernel, kernel))
        run = rows_of(lambda: ops.conv2d(x[..., :c].copy(), weight))  # noqa: B023
        assert not any("winograd" in name for name in run)


def test_it_is_taken_where_it_pays(isa: str, rng: Any) -> None:
    x, weight = u8(rng, 1, 28, 28, 64), Conv2dWeight(s8(rng, 64, 64, 3, 3) // 4, padding=1)
    names = rows_of(lambda: ops.conv2d(x, weight))
    assert any("winograd" in name for name in names) == bool(winograd.tiles(isa))
    small = rows_of(lambda: ops.conv2d(x[:, :3, :3].copy(), weight))
    assert not any("winograd" in name for name in small)


def test_no_vector_is_spilled_in_the_k_loop(tier: str) -> None:
    for tile in winograd.tiles(tier):
        loop = assembly.k_loop_of(winograd.winograd_kernel(tile, "u8"))
        assert loop is not None
        assert loop.dots % (tile.mr * tile.nr // emitter(tier).cols) == 0
        assert not loop.spills, "\n".join(loop.lines)


@pytest.mark.parametrize(
    "cpu, isa",
    [("icelake-server", "avx512_vnni"), ("sapphirerapids", "avx512_vnni"),
     ("znver5", "avx512_vnni"), ("alderlake", "avx_vnni"), ("haswell", "avx2")],
)  # fmt: skip
def test_dot_products_of_pairs_are_one_instruction(
    cpu: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With VNNI, also where LLVM would rather have two; no vector is spilled."""
    monkeypatch.setattr(simd, "ymm_encoding", lambda: "{vex} ")  # as on that CPU
    for tile in winograd.tiles(isa):

        def emit(b: Any, block: Any, place: list[Any], tile: Any = tile) -> None:
            field = fields_of(b, b.inttoptr(block, ptr))
            winograd.emit_multiply(b, tile, field, [*place, *place[:2]])

        text = assembly.assembly_for(emit, "x86_64-unknown-linux-gnu", cpu)
        (loop,) = assembly.k_loops(text, isa)
        one, two = ("vpmaddwd", "vpdpwssd") if isa == "avx2" else ("vpdpwssd", "vpmaddwd")
        assert sum(one in line for line in loop.lines) == loop.dots and two not in text
        assert loop.dots == 2 * tile.mr * tile.nr // emitter(isa).cols
        assert not loop.spills, "\n".join(loop.lines)


def test_each_thread_has_a_unit() -> None:
    """Blocks are as large as they may be, and smaller where threads would have nothing to do."""
    blocks = {}
    for threads in (1, 2, 8, 64):
        split = winograd.Split("avx512_vnni", 64, 64, (1, 56, 56, 64), threads)
        blocks[threads] = split.blocks
    assert blocks[1] == blocks[2] == 2 and blocks[8] == 8
    for threads, size, n in product((1, 3, 8), (1, 7, 14, 30, 56), (64, 192)):
        split = winograd.Split("avx512_vnni", 64, 64, (1, size, size, n), threads)
        assert split.blocks == -(-split.tiles // split.mb)
    alone, many = (winograd.Split("avx512_vnni", 64, 256, (1, 14, 14, 256), n) for n in (1, 8))
    assert alone.pays and alone.blocks == 1
    assert not many.pays or many.blocks > 1
