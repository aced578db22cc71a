"""3x3 convolutions of stride 1 with a quarter of the multiplications: Winograd F(4x4, 3x3), exact.

    y = A [ sum over channels of (G g G') * (B d B') ] A'         Lavin, Gray 2015, arXiv 1509.09308

    d   6 x 6 activations of a channel     36 products in place of 144 for
    g   3 x 3 weights                      y, 4 x 4 outputs

G has fractions of 4, 6 and 24. Here its rows are multiplied by 24, 6, 6, 24, 24, 6, and A's columns
by 24 over these, so that all is in integers, and y comes out 24 * 24 = 9 * 64 times too large:

    B d B'    of uint8 values: within 68 * 255, an int16
    G g G'    of int8 weights: within 49 * 128, an int16
    products  int16 x int16 -> int32 (vpmaddwd); their sums wrap, modulo 2**32
    y         times 1/9 modulo 2**32, then shifted right by 6: exact where |y| < 2**25 (`is_exact`)

The products are of int16, two a dot product. Where the direct sum has no more, a quarter of the
multiplications remains; where it takes four bytes at once (VNNI), half of the instructions.

A tile of which the image has two outputs or less, down or across, is short there: F(2, 3), which
has no positions 3 and 4. It is the same B and A: of activations 0, 1, 2, 1, 2, 3 these two are 0,
and its outputs are the first and the last of four.

A task works through units, one after the other, each a block of MB tiles of 4 x 4 outputs against
a panel of NR filters. All that it needs between is in its own scratch:

    once a block   B d B' of each tile                           [36][tile][C] int16
    once a unit    for each two of the six lines of 6 positions
                     G g G' of the panel                         [12][C / 4][NR][4] int16
                     12 products of MB tiles by NR columns       [36][MB][NR] int32
                   y of each tile, and the epilogue

The filters stay int8 in memory, in the panels of the direct sum: G g G' takes eight times as much.
Positions lie in the order of PAIRS: of two lines G has the same sums.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic
from numpy.typing import NDArray

from fastq.kernels import block as f
from fastq.kernels.call import ITEM_BYTES, Call, Place, Slots, View
from fastq.kernels.gemm import Tile, emit_k_loop
from fastq.kernels.lines import emit_loop
from fastq.kernels.native import native
from fastq.kernels.requantize import EpilogueEmitter, spelled
from fastq.kernels.scalar import pointer, stack_bytes
from fastq.kernels.signature import sources_digest
from fastq.kernels.simd import (
    KR,
    Field,
    address,
    const,
    emitter,
    fields_of,
    i8,
    i16,
    i32,
    i64,
    least,
    load,
    ptr,
    store,
    vec,
)
from fastq.kernels.tiles import choose_tile, nanoseconds, tiles_of

OUT = 4  # outputs of a tile, down and across
IN = OUT + 2
POSITIONS = IN * IN
PAIRS = (0, 5), (1, 2), (3, 4)
ORDER = [IN * line + x for pair in PAIRS for line in pair for x in range(IN)]
AT_ONCE = 2 * IN  # positions
SHORT = 2  # outputs of a short tile
LEFT_OUT = PAIRS[2]  # lines and pixels of positions that it does not have
SHORT_IN = 0, 1, 2, 1, 2, 3  # which activations are its six
BEYOND = 2**31  # no output
SHORT_OUT = 0, BEYOND, BEYOND, 1  # where its four outputs are
PAD = 128  # bytes between what is written side by side: else all would lie in one set of a cache
TAPS = 9
BLOCK_BYTES = 512 * 1024  # of transformed activations: half of the second cache
# of a block, for each of which filters are transformed anew; less, to give each thread one
LEAST_TILES = 48
INVERSE_OF_9 = pow(9, -1, 2**32)

# beyond the fields of the products: strides in bytes, sizes of the padded image and of the output
(
    LINE, PIXEL, HEIGHT, WIDTH, C,
    OUT_LINE, OUT_PIXEL, OUT_HEIGHT, OUT_WIDTH, ADD_LINE, ADD_PIXEL,
    TALL, WIDE, LOW, WHOLE, SIDE, TILES, MB, PANELS, TASKS, SCRATCH, SLOT, FILTERS, SUMS,
    POSITION, FILTER, SUM, FIELDS,
) = range(f.FIELDS, f.FIELDS + 28)  # fmt: skip


def is_exact(weight: NDArray[np.int8]) -> bool:
    """Whether no uint8 input can take an output of these filters (N, ...) out of 26 bits."""
    filters = weight.reshape(len(weight), -1).astype(np.int64)
    positive, negative = (np.maximum(s * filters, 0).sum(axis=1) for s in (1, -1))
    return bool(255 * np.maximum(positive, negative).max(initial=0) < 2**25)


def fits(isa: str, c: int, n: int, nr: int) -> bool:
    """Whether a tier's kernel takes C channels and N filters in panels NR wide."""
    pairs = emitter(isa).of_pairs
    return bool(tiles(isa)) and c % KR == 0 and c >= pairs.operand.count and n % nr == 0


def tiles(isa: str) -> list[Tile]:
    """The register tiles that serve here, too: none where a tier has tiles of matrices, or no fast
    products of int16."""
    simd = emitter(isa)
    if simd.depth != KR or not simd.fast_pairs:
        return []
    return [tile for tile in tiles_of(isa) if tile.panels == 1]


class Split:
    """How the tiles of B images of H x W outputs are shared out: blocks of MB tiles.

    cost, span  what all of it takes, and what the thread with most units takes, in multiply-adds of
                the direct sum for each channel and filter.    direct  what that sum takes.
    tall, wide  how many of an image are not short, down and across.
    ends        where each kind ends: short down alone, not short, short across alone, the rest. So
                all that have a position follow each other, in each block.
    """

    def __init__(self, isa: str, nr: int, c: int, out_shape: tuple[int, ...], threads: int) -> None:
        batch, height, width, n = out_shape
        self.tall, self.wide = ((size + OUT - SHORT - 1) // OUT for size in (height, width))
        low, side = (
            int(OUT * whole < size) for whole, size in ((self.tall, height), (self.wide, width))
        )
        kinds = low * self.wide, self.tall * self.wide, self.tall * side, low * side
        self.ends = tuple(np.cumsum([batch * kind for kind in kinds]).tolist())
        self.tiles = self.ends[-1]
        self.panels, self.threads = n // nr, threads
        share = (1 - low / (self.tall + low) / 3) * (1 - side / (self.wide + side) / 3)
        at_once = emitter(isa).side_by_side // 2  # products that the direct sum has for each here

        def parted(blocks: int) -> tuple[Tile, int, int]:
            """The products' tile, MB, and how many blocks there are: no more than so many."""
            count = -(-self.tiles // blocks)
            tile = choose_tile(isa, nr, count, c // KR, one_panel=True)
            mb = max(-(-count // tile.mr), 1) * tile.mr
            return tile, mb, max(-(-self.tiles // mb), 1)

        def cost(wanted: int, threads: int) -> float:
            """Of the thread with most units, of so many threads. Fitted on AVX2 and AVX512-VNNI:
            the products, and the transforms as if they were products."""
            _, mb, blocks = parted(wanted)
            units, count = -(-blocks * self.panels // threads), self.tiles / blocks
            unit = 34 * share * mb + 650 / c * count + 160
            read = -(-units // self.panels) * count * 350 / n
            return at_once * (units * unit / self.panels + read)

        most = max(BLOCK_BYTES // (POSITIONS * c * 2), LEAST_TILES)
        least = max(-(-self.tiles // most), 1)
        # more blocks than must be, where threads would have nothing to do
        best = min(range(least, least + threads), key=lambda blocks: cost(blocks, threads))
        self.tile, self.mb, self.blocks = parted(best)
        self.cost, self.span = cost(best, 1), cost(best, threads)
        self.direct = 10 * batch * height * width / threads
        self.position = c * 2 * self.mb + PAD  # bytes of activations, and so on
        self.activations = POSITIONS * self.position  # of a task's scratch, and so on
        self.filter = c * 2 * nr + PAD
        self.sum = 4 * (self.mb + self.tile.mr) * nr + PAD  # a tile of products may begin anywhere
        self.filters, self.sums = AT_ONCE * self.filter, POSITIONS * self.sum

    @property
    def pays(self) -> bool:
        """Whether it is faster than the direct sum."""
        return self.span < self.direct


def winograd_row(
    call: Call,
    split: Split,
    x: View,
    out: View,
    add: View | None,
    packed: NDArray[np.int8],
    epilogue: str,
    operands: dict[int, Place],
) -> None:
    """Appends the convolution of x (B, HP, WP, C), padded, with packed filters to out (B, H, W, N).

    operands are the epilogue's, as the products have them.
    """
    c = x.shape[3]
    tasks = min(split.threads, split.blocks * split.panels)
    values = {
        f.A_IMAGE: x.strides[0],
        LINE: x.strides[1],
        PIXEL: x.strides[2],
        HEIGHT: x.shape[1],
        WIDTH: x.shape[2],
        C: c,
        f.B_PANEL: packed[:1].nbytes,
        f.OUT_IMAGE: out.strides[0],
        OUT_LINE: out.strides[1],
        OUT_PIXEL: out.strides[2],
        OUT_HEIGHT: out.shape[1],
        OUT_WIDTH: out.shape[2],
        TALL: split.tall,
        WIDE: split.wide,
        **dict(zip((LOW, WHOLE, SIDE, TILES), split.ends, strict=True)),
        MB: split.mb,
        PANELS: split.panels,
        TASKS: tasks,
        FILTERS: split.activations,
        SUMS: split.activations + split.filters,
        POSITION: split.position,
        FILTER: split.filter,
        SUM: split.sum,
    }
    places: dict[int, Place | Slots] = {
        f.A: x.place,
        f.B: packed,
        f.OUT: out.place,
        SCRATCH: Slots(split.activations + split.filters + split.sums),
        **operands,
    }
    if add is not None:
        values |= {f.ADD_IMAGE: add.strides[0], ADD_LINE: add.strides[1], ADD_PIXEL: add.strides[2]}
        places[f.ADD] = add.place
    call.row(
        winograd_kernel(split.tile, epilogue),
        FIELDS,
        tasks,
        values,
        places,
        nanoseconds(split.tile.isa, int(split.cost * c * out.shape[3])),
    )


def _activation_line(b: Any, d: list[Any]) -> list[Any]:
    """B times six values."""
    four, five = const(d[0].type, 4), const(d[0].type, 5)
    p, q = b.sub(d[4], b.mul(d[2], four)), b.sub(d[3], b.mul(d[1], four))
    r, s = b.sub(d[4], d[2]), b.sub(d[3], d[1])
    s = b.add(s, s)
    return [
        b.add(b.sub(b.mul(d[0], four), b.mul(d[2], five)), d[4]),
        b.add(p, q),
        b.sub(p, q),
        b.add(r, s),
        b.sub(r, s),
        b.add(b.sub(b.mul(d[1], four), b.mul(d[3], five)), d[5]),
    ]


def _filter_line(b: Any, g: list[Any]) -> list[Any]:
    """G, its rows made integer, times three weights."""
    near, far = b.add(g[0], g[2]), b.add(g[0], b.mul(g[2], const(g[0].type, 4)))
    twice = b.add(g[1], g[1])
    minus, six = b.neg(near), const(g[0].type, 6)
    return [
        b.mul(g[0], six),
        b.sub(minus, g[1]),
        b.add(minus, g[1]),
        b.add(far, twice),
        b.sub(far, twice),
        b.mul(g[2], six),
    ]


def _output_line(b: Any, m: list[Any]) -> list[Any]:
    """24 A, with the rows of G undone, times six sums."""

    p, q, r, s = (
        b.add(m[1], m[2]), b.sub(m[1], m[2]), b.add(m[3], m[4]), b.sub(m[3], m[4]),
    )  # fmt: skip
    four, s = const(p.type, 4), b.add(s, s)
    return [
        b.add(b.add(m[0], b.mul(p, four)), r),
        b.add(b.mul(q, four), s),
        b.mul(b.add(p, r), four),
        b.mul(b.add(b.add(q, s), m[5]), four),
    ]


def _both_ways(
    b: Any, line: Callable[[Any, list[Any]], list[Any]], square: list[list[Any]]
) -> list[Any]:
    """`line` along the columns of a square, then along the rows, which follow each other."""
    columns = [line(b, list(column)) for column in zip(*square, strict=True)]
    return [value for row in zip(*columns, strict=True) for value in line(b, list(row))]


def _is_short(b: Any, tile: Any, full: Any) -> Any:
    """Whether a tile is beyond the full ones, down or across."""
    return b.icmp_signed(">=", tile, full)


def _either(b: Any, is_short: Any, full: Sequence[int], short: Sequence[int]) -> list[Any]:
    """The numbers of a tile that is short, or full."""
    return [b.select(is_short, i64(s), i64(n)) for n, s in zip(full, short, strict=True)]


def _emit_read(b: Any, tile: Tile, field: Field, place: list[Any]) -> None:
    """B d B' of the tile at (image, down, across), to the address `target`: [36][..][C] int16.

    What lies beyond the image is read as its last line and pixel: no valid output depends on it.
    """
    image, down, across, target = place
    simd = emitter(tile.isa)
    kind = simd.of_pairs.operand
    start = address(b, field(f.A, ptr), b.mul(image, field(f.A_IMAGE)))

    def offsets(tile: Any, full: Any, size: Any, stride: Any) -> list[Any]:
        first, last = b.mul(tile, i64(OUT)), b.sub(size, i64(1))
        order = _either(b, _is_short(b, tile, full), range(IN), SHORT_IN)
        index = [b.add(first, i) for i in order]
        return [b.mul(least(b, i, last), stride) for i in index]

    lines = [address(b, start, at) for at in offsets(down, field(TALL), field(HEIGHT), field(LINE))]
    pixels = offsets(across, field(WIDE), field(WIDTH), field(PIXEL))
    channels = field(C)
    out = b.inttoptr(target, ptr)

    def activations(line: Any, pixel: Any) -> Any:
        if simd.a_bytes == 2:
            return load(b, kind, line, pixel)
        return b.zext(load(b, vec(i8, kind.count), line, pixel), kind)

    last = b.sub(channels, i64(kind.count))

    def channel(c: Any) -> None:
        c = least(b, c, last)  # the last ones again, if they are fewer
        at = b.mul(c, i64(2))
        here = [address(b, line, b.mul(c, i64(simd.a_bytes))) for line in lines]
        d = [[activations(line, pixel) for pixel in pixels] for line in here]
        values = _both_ways(b, _activation_line, d)
        for i, position in enumerate(ORDER):
            store(b, values[position], out, b.add(b.mul(field(POSITION), i64(i)), at))

    emit_loop(b, i64(0), b.add(channels, i64(kind.count - 1)), kind.count, (), channel)


def emit_multiply(b: Any, tile: Tile, field: Field, place: list[Any]) -> None:
    """The products of tiles begin..end at `block` and the filters of a pair of lines, to `target`.

    Those from `narrow` on are short across.
    """
    pair, block, filters, begin, end, narrow, target = place
    channels, position = field(C), field(POSITION)
    tile_bytes, filter_bytes, sums_bytes = b.mul(channels, i64(2)), field(FILTER), field(SUM)
    first = b.mul(pair, i64(AT_ONCE))
    activations = address(b, b.inttoptr(block, ptr), b.mul(first, position))
    sums = address(b, b.inttoptr(target, ptr), b.mul(first, sums_bytes))
    simd = emitter(tile.isa)
    zeros = [const(simd.acc, 0)] * (tile.nr // simd.lanes)

    def products(q: Any) -> None:
        here = address(b, activations, b.mul(q, position))
        panel = address(b, b.inttoptr(filters, ptr), b.mul(q, filter_bytes))
        out = address(b, sums, b.mul(q, sums_bytes))
        pixel = b.urem(q, i64(IN))
        left_out = b.or_(*(b.icmp_signed("==", pixel, i64(x)) for x in LEFT_OUT))
        stop = b.select(left_out, least(b, narrow, end), end)
        last = b.sub(stop, i64(1))

        def tiles(m: Any) -> None:
            rows = []
            for i in range(tile.mr):  # of fewer tiles, the last is repeated
                index = b.add(m, i64(i))
                index = least(b, index, last)
                rows.append(address(b, here, b.mul(index, tile_bytes)))
            found = emit_k_loop(
                b, tile, rows, [panel], lambda step: b.mul(step, i64(8)),
                b.udiv(channels, i64(KR)), zeros, wide=True,
            )  # fmt: skip
            at = b.mul(m, i64(4 * tile.nr))
            for i, row in enumerate(found):
                for j, value in enumerate(row):
                    store(b, value, out, b.add(at, i64(4 * (i * tile.nr + j * simd.lanes))))

        emit_loop(b, begin, b.add(stop, i64(tile.mr - 1)), tile.mr, (), tiles)

    # a position's filters stay in the first cache while the tiles pass
    emit_loop(b, i64(0), i64(AT_ONCE), 1, (), products)


def _emit_filters(b: Any, tile: Tile, field: Field, place: list[Any]) -> None:
    """Two lines of G g G' of a panel: [12][C / 4][NR][4] int16, ordered for dots of two (pack.py).

    No more at once, so that they stay in the second cache, with all else.
    """
    pair, panel, filters = place
    weights = address(b, field(f.B, ptr), b.mul(panel, field(f.B_PANEL)))
    tap, filter_bytes = b.mul(field(C), i64(tile.nr)), field(FILTER)  # weights of one tap
    out = b.inttoptr(filters, ptr)
    simd = emitter(tile.isa)
    kind = simd.of_pairs.operand
    parts = simd.side_by_side // 2  # a vector of four weights for each column is one of each two

    def chunk(at: Any, pair: tuple[int, int]) -> None:
        taps = [address(b, weights, b.add(b.mul(tap, i64(t)), at)) for t in range(TAPS)]
        for part in range(parts):
            g = [load(b, vec(i8, parts * kind.count), p) for p in taps]
            if parts > 1:
                g = [_two_of_four(b, fours, part) for fours in g]
            g = [b.sext(weights, kind) for weights in g]
            columns = [_filter_line(b, g[x::3]) for x in range(3)]  # what is not used is dropped
            lines = [_filter_line(b, [column[line] for column in columns]) for line in pair]
            for j, value in enumerate(value for line in lines for value in line):
                place = b.add(b.mul(filter_bytes, i64(j)), b.mul(at, i64(2)))
                store(b, value, out, b.add(place, i64(2 * part * kind.count)))

    for i, lines in enumerate(PAIRS):
        with b.if_then(b.icmp_signed("==", pair, i64(i))):
            emit_loop(b, i64(0), tap, parts * kind.count, (), functools.partial(chunk, pair=lines))


def _two_of_four(b: Any, fours: Any, part: int) -> Any:
    """The first two or the last two of each four weights."""
    count = fours.type.count // KR
    fours = b.bitcast(fours, vec(i32, count))
    twos = b.trunc(b.lshr(fours, const(fours.type, 16 * part)), vec(i16, count))
    return b.bitcast(twos, vec(i8, 2 * count))


def _emit_write(b: Any, tile: Tile, epilogue: str, field: Field, place: list[Any]) -> None:
    """y of the tile at (image, down, across), the i-th of those at `source`, and its epilogue."""
    image, down, across, panel, source, i, beyond, zeros = place
    parts = spelled(epilogue)
    kind, added, *_ = parts
    simd, out_bytes = emitter(tile.isa), ITEM_BYTES[kind]
    width = simd.together(tile.nr) * simd.lanes  # columns at once: what the epilogue packs together
    sums = address(b, b.inttoptr(source, ptr), b.mul(i, i64(4 * tile.nr)))
    position = field(SUM)
    inverse, six = const(simd.acc, INVERSE_OF_9), const(simd.acc, 6)
    column = b.mul(panel, i64(tile.nr))
    low, side = _is_short(b, down, field(TALL)), _is_short(b, across, field(WIDE))

    def pixels(base: int, item: int, line: int, otherwise: Any) -> list[list[Any]]:
        """Addresses of the 4 x 4 pixels; `otherwise` of those beyond the image."""
        start = address(b, field(base, ptr), b.mul(image, field(base + 2)))
        start = address(b, start, b.mul(column, i64(item)))
        if otherwise is None:
            otherwise = start
        found: list[list[Any]] = []
        for k in _either(b, low, range(OUT), SHORT_OUT):
            y = b.add(b.mul(down, i64(OUT)), k)
            inside_y = b.icmp_signed("<", y, field(OUT_HEIGHT))
            found.append([])
            for j in _either(b, side, range(OUT), SHORT_OUT):
                x = b.add(b.mul(across, i64(OUT)), j)
                inside = b.and_(inside_y, b.icmp_signed("<", x, field(OUT_WIDTH)))
                offset = b.add(b.mul(y, field(line)), b.mul(x, field(line + 1)))
                found[-1].append(b.select(inside, address(b, start, offset), otherwise))
        return found

    targets = pixels(f.OUT, out_bytes, OUT_LINE, b.inttoptr(beyond, ptr))
    add_rows = pixels(f.ADD, ITEM_BYTES[added], ADD_LINE, None) if added else None

    def places(v: Any, count: int) -> list[Any]:
        """Where the first `count` sums of the columns from v on lie."""
        at = b.mul(v, i64(4))
        return [address(b, sums, b.add(at, b.mul(position, i64(i)))) for i in range(count)]

    nothing = b.inttoptr(zeros, ptr)

    def there(position: int, place: Any, v: Any) -> Any:
        """Where a sum lies, or zeros in place of those that a short tile does not have."""
        for short, at in ((low, position // IN), (side, position % IN)):
            if at in LEFT_OUT:
                place = b.select(short, address(b, nothing, b.mul(v, i64(4))), place)
        return place

    def outputs(v: Any) -> None:
        """4 x 4 vectors of the columns from v on, in the place of the first of their 6 x 6 sums:
        all that the epilogue packs together would be more than there are registers."""
        here = places(v, POSITIONS)
        m = {p: load(b, simd.acc, there(p, here[i], v)) for i, p in enumerate(ORDER)}
        square = [[m[IN * y + x] for x in range(IN)] for y in range(IN)]
        for value, place in zip(_both_ways(b, _output_line, square), here, strict=False):
            store(b, b.ashr(b.mul(value, inverse), six), place)

    def columns(v: Any) -> None:
        here = [b.mul(b.add(column, v), i64(4))]
        end = EpilogueEmitter(b, simd, parts, width // simd.lanes, here, field)
        vectors = [places(b.add(v, i64(at)), OUT * OUT) for at in range(0, width, simd.lanes)]

        def moved(row: list[Any], item: int) -> list[Any]:
            return [address(b, pixel, b.mul(v, i64(item))) for pixel in row]

        for k in range(OUT):
            accs = [
                [
                    b.add(load(b, simd.acc, vector[OUT * k + j]), first)
                    for vector, first in zip(vectors, end.start, strict=True)
                ]
                for j in range(OUT)
            ]
            adds = moved(add_rows[k], ITEM_BYTES[added]) if add_rows else None
            end.store(accs, moved(targets[k], out_bytes), [i64(0)] * OUT, adds)

    emit_loop(b, i64(0), i64(tile.nr), simd.lanes, (), outputs)
    emit_loop(b, i64(0), i64(tile.nr), width, (), columns)


_EMITTERS = {"read": _emit_read, "filters": _emit_filters, "multiply": emit_multiply}


@intrinsic(prefer_literal=True)
def _do(typingctx: Any, config: Any, stage: Any, args: Any, place: Any) -> Any:
    """Emits a stage, by its name; config is the kernel's, place its integers."""

    def codegen(context: Any, b: Any, signature: Any, values: Any) -> Any:
        *words, epilogue = (t.literal_value for t in config.types[:-1])
        tile, field = Tile(*words), fields_of(b, b.bitcast(values[2], ptr))
        integers = [b.extract_value(values[3], i) for i in range(place.count)]
        if stage.literal_value == "write":
            _emit_write(b, tile, epilogue, field, integers)
        else:
            _EMITTERS[stage.literal_value](b, tile, field, integers)
        return context.get_dummy_value()

    return types.void(config, stage, args, place), codegen


@njit
def _place(args, tile):  # type: ignore[no-untyped-def]
    """A tile's image, and where it is in it, down and across."""
    tall, wide = args[TALL], args[WIDE]
    if tile < args[LOW]:
        return tile // wide, tall, tile % wide
    if tile < args[WHOLE]:
        at = tile - args[LOW]
        return at // (tall * wide), at // wide % tall, at % wide
    if tile < args[SIDE]:
        at = tile - args[WHOLE]
        return at // tall, at % tall, wide
    return tile - args[SIDE], tall, wide


@functools.cache
def winograd_kernel(tile: Tile, epilogue: str) -> Any:
    """The kernel of a tile, one of the products' own; epilogues are theirs."""
    config = (*astuple(tile), epilogue, sources_digest())
    beyond_bytes, pairs = 4 * tile.nr, len(PAIRS)

    @native
    def kernel(args, begin, end):  # type: ignore[no-untyped-def]
        tiles, mb, channels, panels = args[TILES], args[MB], args[C], args[PANELS]
        units = (tiles + mb - 1) // mb * panels
        beyond, zeros = stack_bytes(beyond_bytes), stack_bytes(beyond_bytes)
        for i in range(beyond_bytes // 4):
            pointer(zeros, "s32")[i] = 0
        for task in range(begin, end):
            activations = args[SCRATCH] + task * args[SLOT]
            filters = activations + args[FILTERS]
            sums = activations + args[SUMS]
            block = -1
            for unit in range(units * task // args[TASKS], units * (task + 1) // args[TASKS]):
                first = unit // panels * mb
                count = min(mb, tiles - first)
                if block != first:
                    block = first
                    for i in range(count):
                        target = activations + i * 2 * channels
                        _do(config, "read", args, (*_place(args, first + i), target))
                panel = unit % panels
                full, narrow = args[LOW] - first, args[WHOLE] - first
                for pair in range(pairs):
                    start, stop = 0, count
                    if pair == pairs - 1:  # not of tiles short down, which come first and last
                        start, stop = max(full, 0), min(args[SIDE] - first, count)
                    _do(config, "filters", args, (pair, panel, filters))
                    multiplied = pair, activations, filters, start, stop, narrow, sums
                    _do(config, "multiply", args, multiplied)
                for i in range(count):
                    place = _place(args, first + i)
                    _do(config, "write", args, (*place, panel, sums, i, beyond, zeros))

    return kernel
