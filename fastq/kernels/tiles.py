"""Which tile serves which shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from fastq.kernels.gemm import TILES, Tile
from fastq.kernels.simd import emitter

# What a load from the first cache costs in the K loop, beside a dot product of 1. With VNNI, from
# the shares of the peak that NR 64, 32 and 16 reach (100, 97, 90 %); else, where a dot product is
# two instructions, fitted on AVX2 with `fastq bench --tiles`.
_LOAD = {"avx512_vnni": 0.2, "avx_vnni": 0.2}
_LOAD_OTHERWISE = 0.5
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
    cost = {
        nr: -(-n // nr) * nr * _column_cost(choose_tile(isa, nr, _MANY_ROWS), _MANY_ROWS)
        for nr in sorted({t.nr for t in tiles_of(isa)})
    }
    return min(cost, key=cost.__getitem__)


@functools.cache
def choose_tile(isa: str, nr: int, m: int, kind: str = "gemm", *, one_panel: bool = False) -> Tile:
    """The tile for m rows of panels NR wide, or of one panel: the least time, then the tallest."""
    tiles = [t for t in tiles_of(isa, kind) if t.nr == nr and (t.panels == 1 or not one_panel)]
    return min(tiles, key=lambda t: (_column_cost(t, m), -t.mr))


def _column_cost(tile: Tile, m: int) -> float:
    """Time of one K-step of one column with m rows, in dot products."""
    simd, width = emitter(tile.isa), tile.nr * tile.panels
    depthwise = tile.kind == "depthwise"
    vectors = width // (simd.lanes if depthwise else simd.cols)
    loads = tile.mr * (simd.taps_at_once if depthwise else 1) + vectors
    load = _LOAD.get(tile.isa.removesuffix("-emulated"), _LOAD_OTHERWISE)
    return -(-m // tile.mr) * (tile.mr * vectors + load * loads) / width


# Multiply-adds that a core does in a nanosecond, roughly: whether threads pay depends on it.
_MACS_PER_NANOSECOND = {"avx512_vnni": 400.0, "avx_vnni": 150.0, "avx2": 60.0}
BYTES_PER_NANOSECOND = 8.0  # that a plain loop reads


def nanoseconds(isa: str, macs: int) -> float:
    """An estimate of what this many multiply-adds take one thread."""
    return macs / _MACS_PER_NANOSECOND.get(isa, 20.0)
