"""Which tile serves which shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from fastq.kernels.gemm import TILES, Tile

# Share of the peak that a tile with this many accumulator registers can reach: few rows or columns
# leave loads, not dot products, as the limit.
_EFFICIENCY = {64: 1.0, 32: 0.97, 16: 0.9, 8: 0.9, 4: 0.8}


_offered = TILES


@contextmanager
def only(*tiles: Tile) -> Iterator[None]:
    """Offers no other tiles inside the `with` block, to weights that were not packed before."""
    global _offered
    before = _offered
    _offered = tiles
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
    widths = {t.nr for t in tiles_of(isa)}
    return min(widths, key=lambda nr: (-(-n // nr) * nr / _EFFICIENCY[nr], nr))


@functools.cache
def choose_tile(isa: str, nr: int, m: int, kind: str = "gemm") -> Tile:
    """The tile for m rows of panels NR wide: the least rows computed, then the tallest."""
    tiles = [t for t in tiles_of(isa, kind) if t.nr == nr]
    return min(tiles, key=lambda t: (_row_cost(t, m), -t.mr))


def _row_cost(tile: Tile, m: int) -> float:
    # loading a panel row costs about as much as two rows of dot products
    return -(-m // tile.mr) * (tile.mr + 2.0)


# Multiply-adds that a core does in a nanosecond, roughly: whether threads pay depends on it.
_MACS_PER_NANOSECOND = {"avx512_vnni": 400.0, "avx_vnni": 150.0, "avx2": 60.0}
BYTES_PER_NANOSECOND = 8.0  # that a plain loop reads


def nanoseconds(isa: str, macs: int) -> float:
    """An estimate of what this many multiply-adds take one thread."""
    return macs / _MACS_PER_NANOSECOND.get(isa, 20.0)
