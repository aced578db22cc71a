"""Which tile serves which shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import groupby

from fastq.kernels.gemm import TILES, Tile
from fastq.kernels.matrix import ROWS
from fastq.kernels.simd import KR, Amx, emitter

# What a load from the first cache costs in the K loop, beside a dot product of 1. With VNNI, from
# the shares of the peak that NR 64, 32 and 16 reach (100, 97, 90 %); else, where a dot product is
# two instructions, fitted on AVX2 with `fastq bench --tiles`.
_LOAD = {"amx_int8": 0.2, "avx512_vnni": 0.2, "avx_vnni": 0.2}
_LOAD_OTHERWISE = 0.5
# A product of tile registers takes as long as 32 dot products, for 16 columns and 16 K-steps of 4.
DEPTH = Amx.depth
_BAND = 32 / (16 * DEPTH / KR)
_BANDS = _BAND / 2  # to configure the registers, and to fetch the first panel
_MANY_ROWS = 1000  # what a weight is packed for

_offered: tuple[Tile, ...] = TILES


@contextmanager
def only(*tiles: Tile) -> Iterator[None]:
    """Offers no other tiles of their tier and kind inside the `with` block.

    For weights that were not packed before: of one that was, NR is settled.
    """
    global _offered
    before, replaced = _offered, {(t.isa, t.kind) for t in tiles}
    _offered = *tiles, *(t for t in TILES if (t.isa, t.kind) not in replaced)
    _forget()
    try:
        yield
    finally:
        _offered = before
        _forget()


def _forget() -> None:
    for function in tiles_of, choose_nr, choose_tile:
        function.cache_clear()


@functools.cache
def tiles_of(isa: str, kind: str = "gemm") -> tuple[Tile, ...]:
    """The tiles of a tier, in the order of the table."""
    return tuple(t for t in _offered if t.isa == isa and t.kind == kind)


@functools.cache
def choose_nr(isa: str, n: int) -> int:
    """The panel width for n columns: the least time over whole panels."""
    many = _MANY_ROWS
    cost = {
        nr: -(-n // nr) * nr * min(_column_cost(tile, many, many // ROWS) for tile in tiles)
        for nr, tiles in _by_nr(isa).items()
    }
    return min(cost, key=cost.__getitem__)


def _by_nr(isa: str) -> dict[int, list[Tile]]:
    """The tiles of products by their NR, the narrowest first."""
    tiles = sorted((*tiles_of(isa), *tiles_of(isa, "matrix")), key=lambda t: t.nr)
    return {nr: list(some) for nr, some in groupby(tiles, key=lambda t: t.nr)}


@functools.cache
def choose_tile(
    isa: str,
    nr: int,
    m: int,
    kind: str = "gemm",
    *,
    one_panel: bool = False,
    bands: int | None = None,
    depth: int = KR,
) -> Tile:
    """The tile for m rows of panels NR wide, or of one panel: the least time, then the tallest.

    If they are so many `bands` of K-steps `depth` deep, it may be one of matrices, too.
    """
    tiles = tiles_of(isa, kind)
    if bands is not None and kind == "gemm":
        tiles += tiles_of(isa, "matrix")
    fitting = [t for t in tiles if t.nr == nr and (t.panels == 1 or not one_panel)]
    return min(fitting, key=lambda t: (_column_cost(t, m, bands or 0, depth), -t.mr))


def _column_cost(tile: Tile, m: int, bands: int, depth: int = DEPTH) -> float:
    """Time of one K-step of 4 of one column with m rows, or bands of them, in dot products."""
    if tile.kind == "matrix":
        return (_BANDS + bands * _BAND) * DEPTH / depth
    simd, width = emitter(tile.isa), tile.nr * tile.panels
    depthwise = tile.kind == "depthwise"
    vectors = width // (simd.lanes if depthwise else simd.cols)
    loads = tile.mr * (simd.taps_at_once if depthwise else 1) + vectors
    load = _LOAD.get(tile.isa.removesuffix("-emulated"), _LOAD_OTHERWISE)
    return -(-m // tile.mr) * (tile.mr * vectors + load * loads) / width


# Multiply-adds that a core does in a nanosecond, roughly: whether threads pay depends on it.
_MACS_PER_NANOSECOND = {"amx_int8": 1500.0, "avx512_vnni": 400.0, "avx_vnni": 150.0, "avx2": 60.0}
BYTES_PER_NANOSECOND = 8.0  # that a plain loop reads


def nanoseconds(isa: str, macs: int) -> float:
    """An estimate of what this many multiply-adds take one thread."""
    return macs / _MACS_PER_NANOSECOND.get(isa, 20.0)
