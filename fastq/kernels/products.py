"""Products with int8 weights as rows of a call: what linear layers and convolutions share.

A Layer is bound once to its weight, its epilogue and a tier: panels are packed, the per-column
operands padded. A Walk says where the rows of a product lie. Both together give a tile, its
argument block and its tasks, which `Layer.product` appends to a call.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import block, executor, gemm, matrix
from fastq.kernels.call import ITEM_BYTES, Call, Place, View
from fastq.kernels.gemm import Tile
from fastq.kernels.lines import MAX_BOUNDED
from fastq.kernels.pack import aligned_empty, pack_dots, pack_panels, pad_columns, step_starts
from fastq.kernels.requantize import spell
from fastq.kernels.simd import KR, emitter
from fastq.kernels.tiles import (
    Work,
    choose_nr,
    choose_product_tile,
    choose_tile,
    dot_pays,
    dot_tile,
    nanoseconds,
)
from fastq.qparams import Dequant, Epilogue, Requant
from fastq.weights import LinearWeight

# how a tier holds activations, by its a_bytes
ACTIVATIONS = {1: "u8", 2: "u8x2"}
# of a product of its own, by the dtype of its Requant
KINDS = {np.dtype(np.uint8): "u8", np.dtype(np.int16): "s16"}
# Bytes of activations that a block of MC rows works on, to stay in the second cache. Weights that
# are not in a cache before they are needed are read for as many rows as can be.
A_BLOCK_BYTES, LONG_A_BLOCK_BYTES, LARGE_WEIGHT_BYTES = 128 << 10, 512 << 10, 8 << 20
TASKS_A_THREAD = 8
# Matrix tiles load lines of 64 bytes: six times slower where one lies across two of the cache's.
# An activation that is loaded more often than READS is copied to where none does.
ALIGNED, READS = 64, 2


class Layer:
    """The operands of an epilogue, and the product's row.

    bounded  whether what is rounded stays within MAX_BOUNDED, whatever the input.
    """

    kernel_size = 1, 1  # of a convolution
    channels: int  # and of its input
    needs_dense_pixels = False
    group = 0  # as in a Tile
    by_dots: Callable[[], Layer] | None = None  # the same for dot.py, where it takes less time
    fold = 1  # pixels, or rows, whose columns are those of one: see depthwise.py and dot.py

    def __init__(
        self, weight: NDArray[np.int8], epilogue: Epilogue, x_zero_point: int, isa: str
    ) -> None:
        self.epilogue, self.isa = epilogue, isa
        self.x_zero_point = x_zero_point  # folded into the bias of a Requant
        self.kind = "f32" if isinstance(epilogue, Dequant) else "s32"
        if isinstance(epilogue, Requant):
            self.kind = KINDS[epilogue.dtype]
        filters = weight.reshape(len(weight), -1)
        self.col_sums = filters.sum(axis=1, dtype=np.int64)
        n = len(weight)
        if epilogue is not None:
            scale = epilogue.scale if isinstance(epilogue, Dequant) else epilogue.multiplier
            more = getattr(epilogue, "add_multiplier", None)
            factors = [scale.shape] if more is None else [scale.shape, more.shape]
            bias = None if epilogue.bias is None else epilogue.bias.shape
            if not {*factors} <= {(), (n,)} or bias not in (None, (n,)):
                raise ValueError(
                    f"epilogue: factors {factors} and bias {bias} for {n} outputs; wanted ({n},) "
                    "each, or scalar factors, or no bias"
                )
        self.bounded = True
        if isinstance(epilogue, Requant):
            self.bounded = self._largest(filters, epilogue) <= MAX_BOUNDED

    def _largest(self, filters: NDArray[np.int8], epilogue: Requant) -> float:
        """The largest magnitude before it is rounded; ValueError if some input could take
        accumulator + bias out of int32."""
        positive = np.maximum(filters, 0).sum(axis=1, dtype=np.int64)
        negative = self.col_sums - positive
        bias = np.zeros_like(positive) if epilogue.bias is None else epilogue.bias
        zp, top = self.x_zero_point, 255 - self.x_zero_point
        highest = bias + positive * top - negative * zp
        lowest = bias + negative * top - positive * zp
        wrong = (highest >= 2**31) | (lowest < -(2**31))
        if wrong.any():
            n = int(np.argmax(wrong))
            raise ValueError(
                f"Requant: bias[{n}] = {bias[n]} can take the accumulator out of int32; "
                "a larger weight scale for this output makes its bias smaller"
            )
        values = np.maximum(np.abs(highest), np.abs(lowest)) * epilogue.multiplier.astype(float)
        if epilogue.add_multiplier is not None:
            values = values + 2.0**16 * np.abs(epilogue.add_multiplier.astype(float))
        return float(values.max(initial=0.0))

    def pad_operands(self, packed: Packed, groups: int) -> None:
        """Keeps the packed weight, and the per-column operands padded to whole panels."""
        self.packed, self.groups = packed, groups
        n = len(self.col_sums)
        if packed.kind == "dot":
            self.fold = packed.nr // n
        scale: Any = np.float32(1)
        bias: NDArray[Any] = np.zeros(n, np.int32)
        clamp, zero_point, add_zero_point = (0.0, 0.0), 0, 0
        factor: Any = np.float32(0)  # of what is added
        match self.epilogue:
            case Requant() as end:
                scale, zero_point = end.multiplier, end.zero_point
                taken_off = self.x_zero_point - emitter(self.isa).offset
                folded = (0 if end.bias is None else end.bias) - taken_off * self.col_sums
                bias = folded.astype(np.int32)  # modulo 2**32: its sum with acc is in range
                clamp = (end.qmin - zero_point, end.qmax - zero_point)
                add_zero_point = end.add_zero_point
                if end.add_multiplier is not None:
                    factor = end.add_multiplier
            case Dequant() as end:
                scale = end.scale
                # without a bias -0.0 is added: y + -0.0 is y, and -0.0 for y = -0.0
                bias = np.full(n, -0.0, np.float32) if end.bias is None else end.bias
                clamp = (end.fmin, end.fmax)

        def columns(values: NDArray[Any]) -> NDArray[Any]:
            return pad_columns(np.tile(values, self.fold), groups, packed.nr, packed.isa)

        self.operands: dict[int, Place] = {
            block.COL_SUMS: columns(self.col_sums.astype(np.int32)),
            block.SCALE: columns(np.broadcast_to(scale, (n,)).astype(np.float32)),
            block.ADD_SCALE: columns(np.broadcast_to(factor, (n,)).astype(np.float32)),
            block.BIAS: columns(bias),
            block.CLAMP: np.array(clamp, np.float32),
            block.OUT_ZERO_POINT: np.array([zero_point], np.int32),
            block.ADD_ZERO_POINT: np.array([add_zero_point], np.int32),
        }

    def ending(self, out: View | Rows, add: View | Rows | None) -> str:
        """The name of the epilogue that writes `out` and adds `add`, if anything."""
        return spell(out.kind, add.kind if add else "", self.bounded)

    @property
    def reads_often(self) -> bool:
        """Whether activations are loaded so often, for each panel and in each of their windows,
        that they should lie where that is fast."""
        return len(self.packed.panels) // self.groups * math.prod(self.kernel_size) > READS

    def tile(self, m: int, line: int, steps: int) -> Tile:
        """The tile for m rows, in lines of so many, and so many K-steps."""
        packed = self.packed
        if packed.kind == "dot":
            return dot_tile(packed.isa, len(self.col_sums))
        if packed.kind == "depthwise":
            return choose_tile(packed.isa, packed.nr, m, steps, packed.kind)
        if self.group:
            return choose_tile(packed.isa, packed.nr, m, steps, group=self.group)
        bands = m // line * -(-line // matrix.ROWS)
        return choose_product_tile(packed.isa, packed.nr, Work(m, bands, steps, packed.depth))

    def rows(
        self,
        call: Call,
        x: View,
        out: View,
        add: View | None = None,
        *,
        scale: Place | None = None,
        zero_point: Place | None = None,
        per_row: bool = False,
    ) -> None:
        """Appends out = the layer of x, whose shapes and strides the layer's class says.

        x is of the tier's kind. add is what a Requant with an add_multiplier adds, of out's shape.
        scale and zero_point of x, for other epilogues than Requant, are one float32 and one int32,
        or per_row (M,).
        """
        scales: dict[int, Place] = {}
        if scale is not None and zero_point is not None:
            scales = {block.ROW_SCALE: scale, block.ROW_ZERO_POINT: zero_point}
        views = [x, out] if add is None else [x, out, add]
        self.append(call, views, Given(scales, per_row))

    def append(self, call: Call, views: list[View], given: Given) -> None:
        """The rows of x, out and what is added, if anything."""
        raise NotImplementedError

    def walk(self, views: list[View]) -> Walk:
        """Where the rows of these lie, for a product of them."""
        raise NotImplementedError

    def append_dots(self, call: Call, views: list[View], given: Given) -> bool:
        """Appends the product that dot.py makes of few columns, if it can and takes less time."""
        if self.by_dots is None or given.per_row:
            return False
        layer, x = self.by_dots(), views[0]
        if layer.needs_dense_pixels and x.strides[-2] != layer.channels * x.item:
            return False
        walk = layer.walk(views)
        if not walk.folds(layer.fold, len(self.col_sums)):
            return False
        layer.product(call, walk.folded(layer.fold), given)
        return True

    def product(self, call: Call, walk: Walk, given: Given) -> None:
        """Appends the product."""
        images, m, line, offsets, (x, out, *added) = walk
        add = added[0] if added else None
        packed, groups = self.packed, self.groups
        if offsets.max() >= 2**31:
            raise ValueError(
                f"conv2d: one kernel window spans {offsets.max()} bytes of the input; "
                "wanted under 2 GiB: split the image"
            )
        tile = self.tile(m, line, len(offsets))
        n = len(self.col_sums) * self.fold // groups
        macs = images * m * len(offsets) * packed.depth * groups * n
        row_bytes = x.row if x.offsets is None else x.offsets.max() // m
        panels = -(-len(packed.panels) // groups // tile.panels)
        values = {
            block.A_ROW: x.row,
            block.A_IMAGE: x.image,
            block.A_GROUP: x.group,
            block.B_PANEL: packed.panels[:1].nbytes,
            block.OUT_ROW: out.row,
            block.OUT_IMAGE: out.image,
            block.OUT_GROUP: out.group,
            block.GROUPS: groups,
            block.N: n,
            block.ROW_STEP: int(given.per_row),
        }
        places: dict[int, Place] = {
            block.A: x.place,
            block.B: packed.panels,
            block.OUT: out.place,
            **self.operands,
            **given.scales,
        }
        epilogue = self.ending(out, add)
        if add is not None:
            values |= {block.ADD_ROW: add.row, block.ADD_IMAGE: add.image}
            values[block.ADD_GROUP] = add.group
            places[block.ADD] = add.place
        kernel: Any
        rows = [x, out, add or out]
        by_table = x.offsets is not None
        of = matrix.ROWS if tile.kind == "matrix" else 1
        band, firsts = bands_of(m, line, of)
        m = len(firsts)
        if tile.kind == "matrix":
            values[block.BAND] = band
            places[block.TILE_CONFIG] = matrix.tile_config(band, packed.depth)
            firsts = np.append(firsts, firsts[-1])  # one more is read, and not used
            rows.append(Rows(x.place, x.kind, 1))  # the row's number
            kernel, by_table = matrix.matrix_kernel(tile, epilogue), True
        else:
            if tile.kind == "gemm":  # which takes a K-step by fours
                quads = np.arange(0, packed.depth, KR) * ITEM_BYTES[x.kind]
                offsets = np.add.outer(offsets, quads).reshape(-1)
            elif tile.kind == "dot":
                values |= {block.A_PIXEL: x.neighbour, block.RUN: packed.run}
            else:
                values |= {block.OUT_PIXEL: out.neighbour, block.ADD_PIXEL: rows[2].neighbour}
            kernel = gemm.gemm_kernel(tile, epilogue, "table" if by_table else "affine")
        if by_table:
            places[block.ROW_TABLE] = np.stack([r.at(firsts) for r in rows], axis=1)
        tasks = images * groups * panels
        mc = block_rows(tile, m * of, row_bytes, tasks, packed.panels.nbytes) // of
        values |= {block.M: m, block.MC: mc, block.STEPS: len(offsets)}
        places[block.OFFSETS] = offsets.astype(np.int32)
        call.row(
            kernel,
            block.FIELDS,
            tasks * -(-m // mc),
            values,
            places,
            nanoseconds(tile.isa, macs, tile.kind, packed.panels.nbytes),
        )


class Given(NamedTuple):
    """What a product's epilogue is told by a call."""

    scales: dict[int, Place]
    per_row: bool


def bands_of(m: int, line: int, most: int) -> tuple[int, NDArray[np.int64]]:
    """The rows of a band, and the first ones of the bands that cover m rows, line by line.

    The last band of a line may overlap the one before.
    """
    count = -(-line // most)
    band = -(-line // count)
    return band, np.add.outer(np.arange(0, m, line), step_starts(line, band)).reshape(-1)


@dataclass
class Rows:
    """Where the rows of an operand lie: place + image * i + group * g + (row * m or offsets[m]).

    Where offsets say it, `row` is still how far two of a line are apart; `neighbour` is how far two
    outputs of a run are, 0 where there is only one.
    """

    place: Place
    kind: str
    row: int
    image: int = 0
    group: int = 0
    offsets: NDArray[np.int64] | None = None
    neighbour: int = 0

    def at(self, m: NDArray[np.int64]) -> NDArray[np.int64]:
        """Offsets of these rows."""
        return m * self.row if self.offsets is None else self.offsets[m]


class Walk(NamedTuple):
    """The rows of a product: `images` times m of them, of x, out and what is added, if anything.

    Of `line` rows each lies as far from the one before; m is a multiple of it. offsets are in
    bytes, one for each K-step.
    """

    images: int
    m: int
    line: int
    offsets: NDArray[np.int64]
    operands: list[Rows]

    def folds(self, fold: int, n: int) -> bool:
        """Whether so many rows of n columns can be one: what is written lies side by side."""
        _, *written = self.operands
        return self.line >= fold and all(r.row == n * ITEM_BYTES[r.kind] for r in written)

    def folded(self, fold: int) -> Walk:
        """The walk with `fold` rows of a line as one; a line's last may overlap the one before."""
        runs = step_starts(self.line, fold)
        firsts = np.add.outer(np.arange(0, self.m, self.line), runs).reshape(-1)
        operands = [
            replace(r, row=r.row * fold, offsets=r.at(firsts), neighbour=r.row)
            for r in self.operands
        ]
        return Walk(self.images, len(firsts), len(runs), self.offsets, operands)


def block_rows(tile: Tile, m: int, row_bytes: int, other_tasks: int, weight_bytes: int = 0) -> int:
    """MC: rows that share a panel while it is in L1, and their activations in L2."""
    block_bytes = A_BLOCK_BYTES if weight_bytes < LARGE_WEIGHT_BYTES else LONG_A_BLOCK_BYTES
    blocks = -(-m // max(block_bytes // max(row_bytes, 1), 8 * tile.mr))
    threads = executor.get_num_threads()
    if threads > 1:  # TASKS_A_THREAD or more, all of a size, so that the threads end together
        wanted = -(-TASKS_A_THREAD * threads // max(other_tasks, 1))
        blocks = max(blocks, min(wanted, m // (2 * tile.mr)))
    return max(-(-m // max(blocks, 1) // tile.mr) * tile.mr, 1)


@dataclass(frozen=True, eq=False)
class Packed:
    """Packed weights, and the tiles that they are for.

    depth      activations of a K-step.
    over_read  of which the last may be beyond the run.
    run        that a K-step of dot.py reads, if it is shorter.
    """

    isa: str
    kind: str
    nr: int
    panels: NDArray[Any]
    depth: int = 1
    over_read: int = 0
    run: int = 0


def packed_dots(weight: Any, isa: str, filters: Callable[[], list[NDArray[np.int8]]]) -> Packed:
    """The weight packed for dot.py, at the first use; filters() as of `packed_weight`."""
    packed = weight.panels.get(("dots", isa))
    if packed is None:
        (part,) = filters()
        simd = emitter(isa)
        depth = simd.operand.count
        run = min(part.shape[2], depth)
        packed = Packed(isa, "dot", simd.lanes, pack_dots(part, depth), depth, run=run)
        weight.panels["dots", isa] = packed
    return packed  # type: ignore[no-any-return]


def packed_weight(
    weight: Any, isa: str, filters: Callable[[], list[NDArray[np.int8]]], group: int = 0
) -> Packed:
    """The weight packed for a tier, at the first use; filters() is (N, taps, run) a group of the
    product, `group` that of its tiles."""
    packed = weight.panels.get(("packed", isa))
    if packed is None:
        parts = filters()
        n, taps, run = parts[0].shape
        depth = min(emitter(isa).depth, -(-run // KR) * KR)
        nr = choose_nr(isa, n, taps * -(-run // depth), group)
        groups = [pack_panels(part, nr, isa, depth) for part in parts]
        panels = aligned_empty((len(groups) * len(groups[0]), *groups[0].shape[1:]), np.int8)
        np.concatenate(groups, out=panels)
        packed = Packed(isa, "gemm", nr, panels, depth, max(depth - run, 0))
        weight.panels["packed", isa] = packed
    return packed  # type: ignore[no-any-return]


class PackedLinear(Layer):
    """(M, K) -> (M, N), with unit stride along K and N. Of each row run_length values are read."""

    def __init__(
        self,
        weight: LinearWeight,
        epilogue: Epilogue,
        x_zero_point: int,
        isa: str,
        dots: bool = False,
    ) -> None:
        super().__init__(weight.data, epilogue, x_zero_point, isa)
        self.n, self.k = weight.n, weight.k
        self.run_length = max(weight.k, KR)
        pack = packed_dots if dots else packed_weight
        packed = pack(weight, isa, lambda: [self._filters(weight)])
        if not dots and dot_pays(isa, self.n, 1, self.run_length):
            given = weight, epilogue, x_zero_point, isa
            self.by_dots = functools.cache(functools.partial(PackedLinear, *given, dots=True))
        self.pad_operands(packed, 1)

    def _filters(self, weight: LinearWeight) -> NDArray[np.int8]:
        data = np.zeros((self.n, 1, self.run_length), np.int8)
        data[:, 0, : self.k] = weight.data
        return data

    def append(self, call: Call, views: list[View], given: Given) -> None:
        if not self.append_dots(call, views, given):
            self.product(call, self.walk(views), given)

    def walk(self, views: list[View]) -> Walk:
        x = views[0]
        m, steps = x.shape[0], step_starts(self.run_length, self.packed.depth) * x.item
        operands = [Rows(view.place, view.kind, view.strides[0]) for view in views]
        return Walk(1, m, m, steps, operands)
