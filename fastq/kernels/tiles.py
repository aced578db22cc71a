"""Which tile serves which shape."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

from fastq.kernels.gemm import TILES, Tile
from fastq.kernels.isa import cpu_name
from fastq.kernels.matrix import ROWS
from fastq.kernels.simd import KR, emitter


class Costs(NamedTuple):
    """What a tile of vectors takes, in dot products.

    load    of one in the K loop, from the first cache.
    second  of a vector of weights, from the second cache, beside which its products are free.
    ends    beside what all tiles need for an output: times the square of the accumulators. Only few
            of them are stored while the next tile's products are done.
    own     of a shuffle within 128 bits, where columns read activations of their own.
    """

    load: float
    second: float = 0.0
    ends: float = 0.0
    own: float = 0.4


# With VNNI on Intel's CPUs, which do two dot products in a cycle: from the shares of the peak that
# NR 64, 32 and 16 reach (100, 97, 90 %). The others are fitted with `fastq bench --tiles`: on
# Zen 4, which does one of 512 bits, and on AVX2, where a dot product is two instructions.
_VNNI, _ZEN4, _OTHERWISE = Costs(0.2), Costs(0.075, 2.0, 0.12), Costs(0.5)


def _costs(isa: str) -> Costs:
    if isa.startswith("avx512_vnni") and cpu_name() == "znver4":
        return _ZEN4
    return _VNNI if emitter(isa).side_by_side == KR else _OTHERWISE


_LANE_SUMS = 2.5  # what it costs to sum the lanes of an accumulator, in dot products

# What matrix tiles cost, in dot products of 16 columns, (a K-step of one band, the ends), by MR and
# NR. A product takes as long as 32. Two passes over K read activations twice, and with a single
# column of registers an operand serves one product only; few registers in use leave the CPU some to
# load ahead into. The ends: the accumulators' way to the output is shorter the more of them are
# packed at once.
_MATRIX = {(32, 64): (38, 40), (32, 32): (32, 72), (16, 32): (33.4, 60), (64, 16): (44, 90)}
_MANY_ROWS, _MANY_STEPS = 1000, 4  # what a weight is packed for, if nothing else is known

_offered: tuple[Tile, ...] = TILES


@contextmanager
def only(tile: Tile) -> Iterator[None]:
    """Offers no other tile of its tier for what it serves inside the `with` block.

    For weights that were not packed before: of one that was, NR is settled.
    """
    global _offered
    before = _offered
    _offered = tile, *(t for t in TILES if (t.isa, t.kind) != (tile.isa, tile.kind))
    _forget()
    try:
        yield
    finally:
        _offered = before
        _forget()


def _forget() -> None:
    for function in (tiles_of, group_tiles, dot_pays, product_tiles, choose_nr, choose_tile,
                     choose_product_tile):  # fmt: skip
        function.cache_clear()


@functools.cache
def tiles_of(isa: str, kind: str = "gemm") -> tuple[Tile, ...]:
    """The tiles of a tier, in the order of the table."""
    return tuple(t for t in _offered if t.isa == isa and t.kind == kind)


GROUPS = 4, 8  # channels, of the convolutions whose columns read their own group's


@functools.cache
def group_tiles(isa: str, group: int) -> tuple[Tile, ...]:
    """The tiles of one panel, for groups of so many channels, whose K loop needs no more registers
    than there are: none where a tier has tiles of matrices."""
    simd, tiles = emitter(isa), []
    for tile in tiles_of(isa) if simd.depth == KR else ():
        vectors = tile.nr // simd.cols
        activations = 1 + len(_shuffles(isa, tile.nr, group))  # what is read of a row, and of that
        if tile.panels == 1 and (tile.mr + 1) * vectors + activations <= simd.registers:
            tiles.append(replace(tile, group=group))
    return tuple(tiles)


def _shuffles(isa: str, nr: int, group: int) -> list[list[int]]:
    """The different shuffles of a row in a K-step, by the words that they take."""
    words = emitter(isa).own_words(nr, group)
    return [lanes for i, lanes in enumerate(words) if lanes not in words[:i]]


def dot_tile(isa: str, n: int) -> Tile:
    """The tile of so few columns, see dot.py."""
    return Tile(isa, 1, emitter(isa).lanes, "dot", group=n)


def dot_tiles(isa: str) -> tuple[Tile, ...]:
    """A tier's dot tiles: none without products of bytes, or where there are tiles of matrices."""
    simd = emitter(isa)
    if simd.side_by_side != KR or simd.depth != KR:
        return ()
    return tuple(dot_tile(isa, n) for n in range(1, simd.lanes // 2 + 1))


@functools.cache
def dot_pays(isa: str, n: int, taps: int, run: int) -> bool:
    """Whether many rows of so many runs take less time with the tile of so few columns, and a run
    can be read: without masks it must fill a vector."""
    simd = emitter(isa)
    size = simd.operand.count
    tile = next((tile for tile in dot_tiles(isa) if tile.group == n), None)
    if tile is None or _offered is not TILES or not (simd.masks or run >= size):
        return False
    steps = taps * -(-run // KR)
    nr = choose_nr(isa, n, steps)
    work = Work(_MANY_ROWS, 0, steps, KR)
    panel = nr * _column_cost(choose_tile(isa, nr, _MANY_ROWS, steps), work)
    step = max(tile.fold * n, tile.fold + n)
    whole = taps * -(-run // size) * step + _LANE_SUMS * tile.nr
    return _MANY_ROWS / tile.fold * whole < panel


@functools.cache
def product_tiles(isa: str) -> tuple[Tile, ...]:
    """The tiles of a tier that layers may take: of vectors, and of matrices."""
    alone = _offered[0] if _offered is not TILES else None
    if alone is not None and alone.isa == isa and alone.kind != "depthwise":
        return (alone,)
    return (*tiles_of(isa), *tiles_of(isa, "matrix"))


@functools.cache
def choose_nr(isa: str, n: int, steps: int = _MANY_STEPS, group: int = 0) -> int:
    """The panel width for n columns and so many K-steps: the least time over whole panels, then
    the widest. What the ends of a sum cost depends on the height, which is chosen later."""
    work = Work(_MANY_ROWS, _MANY_ROWS // ROWS, steps, emitter(isa).depth)
    tiles = group_tiles(isa, group) if group else product_tiles(isa)

    def cost(nr: int) -> float:
        least = min(_column_cost(tile, work, ends=False) for tile in tiles if tile.nr == nr)
        return -(-n // nr) * nr * least

    return min({tile.nr for tile in tiles}, key=lambda nr: (cost(nr), -nr))


class Work(NamedTuple):
    """m rows, which are so many bands of matrix tiles, times `steps` K-steps of `depth`."""

    m: int
    bands: int
    steps: int
    depth: int


@functools.cache
def choose_tile(
    isa: str, nr: int, m: int, steps: int, kind: str = "gemm", *, one_panel: bool = False,
    group: int = 0,
) -> Tile:  # fmt: skip
    """The tile for m rows and K-steps of 4, of panels NR wide, or of one panel: the least time,
    then the tallest."""
    tiles = group_tiles(isa, group) if group else tiles_of(isa, kind)
    fitting = [t for t in tiles if t.nr == nr and (t.panels == 1 or not one_panel)]
    return _least(fitting, Work(m, 0, steps, KR))


@functools.cache
def choose_product_tile(isa: str, nr: int, work: Work) -> Tile:
    """The tile of a layer, vectors or matrices; its panels are NR wide."""
    return _least([t for t in product_tiles(isa) if t.nr == nr], work)


def _least(tiles: list[Tile], work: Work) -> Tile:
    return min(tiles, key=lambda tile: (_column_cost(tile, work), -tile.mr))


def _column_cost(tile: Tile, work: Work, *, ends: bool = True) -> float:
    """Time of one column, in dot products."""
    m, bands, steps, depth = work
    if tile.kind == "matrix":
        step, last = _MATRIX[tile.mr, tile.nr]
        return bands * (steps * step + last) / ROWS
    simd, width = emitter(tile.isa), tile.nr * tile.panels
    depthwise = tile.kind == "depthwise"
    vectors = width // (simd.lanes if depthwise else simd.cols)
    loads = tile.mr * (simd.taps_at_once if depthwise else 1) + vectors
    costs, dots = _costs(tile.isa), tile.mr * vectors
    step = max(dots, costs.second * vectors) + costs.load * loads
    if tile.group:
        shuffles = _shuffles(tile.isa, tile.nr, tile.group)
        step += costs.own * tile.mr * sum(1 if _within_128_bits(words) else 2 for words in shuffles)
    whole = steps * depth / KR * step + (costs.ends * dots**2 if ends else 0.0)
    return -(-m // tile.mr) * whole / width


def _within_128_bits(words: list[int]) -> bool:
    return all(word // 4 == lane // 4 for lane, word in enumerate(words))


# Multiply-adds that a core does in a nanosecond, roughly: whether threads pay depends on it.
_MACS_PER_NANOSECOND = {
    "amx_int8": 400.0, "avx512_vnni": 400.0, "avx_vnni": 150.0, "avx2": 60.0,
    "neon_i8mm": 80.0, "neon_dotprod": 70.0,
}  # fmt: skip
_RATES = {"gemm": 1.0, "matrix": 1.25, "depthwise": 0.1, "dot": 0.45}  # of that
BYTES_PER_NANOSECOND = 24.0  # that a plain loop reads, in the cache
_WEIGHT_BYTES_PER_NANOSECOND = 80.0  # that products of few rows read: they wait for their weights


def nanoseconds(isa: str, macs: int, kind: str = "gemm", weight_bytes: int = 0) -> float:
    """An estimate of what this many multiply-adds take one thread, in tiles of a kind."""
    computed = macs / (_RATES[kind] * _MACS_PER_NANOSECOND.get(isa, 20.0))
    return max(computed, weight_bytes / _WEIGHT_BYTES_PER_NANOSECOND)
