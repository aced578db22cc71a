"""Convolutions as products: where the rows of their inputs and outputs lie.

Of PackedConv2d a row is an output pixel, and K walks its window. Narrow groups share panels, and
the windows of short lines are gathered for matrix tiles. Of PackedDepthwise, with one filter per
channel (depthwise.py), a row is a run of outputs.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import layout, matrix, winograd
from fastq.kernels.call import Call, View
from fastq.kernels.depthwise import choose_fold, pack_depthwise, taps_of
from fastq.kernels.executor import get_num_threads
from fastq.kernels.pack import step_starts
from fastq.kernels.products import (
    ALIGNED,
    Given,
    Layer,
    Packed,
    Rows,
    Walk,
    packed_dots,
    packed_weight,
)
from fastq.kernels.simd import KR, emitter
from fastq.kernels.tiles import GROUPS, dot_pays, group_tiles, tiles_of
from fastq.qparams import Epilogue
from fastq.weights import Conv2dWeight

EPILOGUE = 24  # what the one of a tile costs, in activations of its rows
OWN = 1.5  # what a dot product costs whose column reads its own group's, in others
# a product of matrix tiles, with its loads; a byte of a copy within the cache, and then some
PRODUCT_NANOSECONDS, COPY_NANOSECONDS = 7.0, 0.08


def pack_conv2d(
    weight: Conv2dWeight, epilogue: Epilogue, x_zero_point: int, isa: str
) -> PackedConv2d | PackedDepthwise:
    """The convolution of a weight, for a tier."""
    n, c_group = weight.data.shape[:2]
    if weight.groups > 1 and c_group == 1 and n == weight.groups:
        return PackedDepthwise(weight, epilogue, x_zero_point, isa)
    return PackedConv2d(weight, epilogue, x_zero_point, isa)


class PackedConv2d(Layer):
    """(B, HP, WP, C), padded, -> (B, OH, OW, N); channels lie side by side.

    groups, group        see `_grouping`.
    channels             that are read of a pixel.
    reads_beyond         whether activations beyond the last ones may be read, and not used.
    needs_dense_pixels   whether nothing may lie between the pixels: the K-steps of a kernel line
                         overlap them.
    """

    def __init__(
        self,
        weight: Conv2dWeight,
        epilogue: Epilogue,
        x_zero_point: int,
        isa: str,
        dots: bool = False,
    ) -> None:
        super().__init__(weight.data, epilogue, x_zero_point, isa)
        self.weight, self.kernel_size = weight, weight.kernel_size
        self.groups, self.group = _grouping(weight, isa)
        self.by_lines = self._takes_lines()
        (kh, kw), row = weight.kernel_size, weight.kernel_size[1] if self.by_lines else 1
        self.channels = weight.c if row * weight.c // self.groups >= KR else KR
        if dots:
            packed = packed_dots(weight, isa, self._filters)
        else:
            packed = packed_weight(weight, isa, self._filters, self.group)
            taps, run = kh * kw // row, row * self.channels
            if weight.groups == 1 and dot_pays(isa, weight.n, taps, run):
                given = weight, epilogue, x_zero_point, isa
                self.by_dots = functools.cache(functools.partial(PackedConv2d, *given, dots=True))
        self.pad_operands(packed, self.groups)
        self.reads_beyond = self.packed.over_read > 0 or self.group > 0
        self.needs_dense_pixels = self.by_lines and self.channels % self.packed.depth != 0
        self.by_winograd = (
            not dots
            and weight.kernel_size == (3, 3)
            and (weight.stride, weight.dilation, weight.groups) == ((1, 1), (1, 1), 1)
            and winograd.fits(isa, weight.c, weight.n, self.packed.nr)
            and winograd.is_exact(weight.data)
        )

    @property
    def wants_lines(self) -> bool:
        """Whether unaligned activations are better copied to where they are aligned."""
        return emitter(self.isa).depth > KR and self.reads_often

    def _takes_lines(self) -> bool:
        """Whether a run of K is a line of KW * C contiguous activations, not of C.

        Not where it would take as many K-steps: lines want pixels side by side.
        """
        weight, depth = self.weight, emitter(self.isa).depth
        (_, kw), c = weight.kernel_size, weight.c
        if self.groups > 1 or self.group or weight.dilation[1] > 1:
            return False
        if depth == KR:
            return True  # by pixels it takes the same steps
        return kw * c >= KR and -(-kw * c // depth) < kw * -(-c // depth)

    def _filters(self) -> list[NDArray[np.int8]]:
        """(N / groups, taps, run) for each group."""
        data = self.weight.data
        n, c_group, kh, kw = data.shape
        groups = self.channels // self.group if self.group else self.groups
        merged = self.weight.groups // groups
        c = self.channels // groups
        # groups merged into one hold zeros where they do not meet
        dense = np.zeros((groups, merged, n // self.weight.groups, c, kh, kw), np.int8)
        split = data.reshape(groups, merged, n // self.weight.groups, c_group, kh, kw)
        for i in range(merged):
            dense[:, i, :, i * c_group : (i + 1) * c_group] = split[:, i]
        filters = dense.reshape(n, c, kh, kw).transpose(0, 2, 3, 1)
        shape = (n, kh, kw * c) if self.by_lines else (n, kh * kw, c)
        return np.split(np.ascontiguousarray(filters).reshape(shape), self.groups)

    def append(self, call: Call, views: list[View], given: Given) -> None:
        x, out, *added = views
        if self.append_dots(call, views, given):
            return
        if self.by_winograd:
            threads = get_num_threads()
            split = winograd.Split(self.isa, self.packed.nr, self.channels, out.shape, threads)
            if split.pays:
                columns, add = self.operands | given.scales, added[0] if added else None
                panels, epilogue = self.packed.panels, self.ending(out, add)
                winograd.winograd_row(call, split, x, out, add, panels, epilogue, columns)
                return
        walk = self.walk(views)
        if not self._gathering_pays(walk):
            self.product(call, walk, given)
            return
        with call.borrowed_scratch():
            windows = self._gather(call, x, out)
            dense = [v if v.dense else call.dense(v.shape, v.kind) for v in views[1:]]
            for view, copy in zip(added, dense[1:], strict=True):
                if copy is not view:
                    layout.copy_row(call, view, copy)
            self.product(call, self._windows(windows, dense), given)
            if dense[0] is not out:
                layout.copy_row(call, dense[0], out)

    def _gathering_pays(self, walk: Walk) -> bool:
        """Whether windows are copied side by side first: where lines are much shorter than a matrix
        tile, one that may go on in the next line is fuller than what the copies cost."""
        if emitter(self.isa).depth == KR or walk.line == walk.m:
            return False
        rows, steps = walk.images * walk.m, len(walk.offsets)
        saved = rows // walk.line * -(-walk.line // matrix.ROWS) - -(-rows // matrix.ROWS)
        products = steps * len(self.packed.panels) // self.groups * (self.packed.nr // 16)
        window = math.prod(self.kernel_size) * self.channels
        return saved * products * PRODUCT_NANOSECONDS > rows * window * COPY_NANOSECONDS

    def _gather(self, call: Call, x: View, out: View) -> View:
        """Appends the copy of the window of each output: (B, OH, OW, KH, KW, C)."""
        (kh, kw), (sh, sw), (dh, dw) = self.kernel_size, self.weight.stride, self.weight.dilation
        batch, oh, ow, _ = out.shape
        image, line, pixel, item = x.strides
        c = x.shape[3]
        row = -(-kh * kw * c * item // ALIGNED) * ALIGNED
        place = call.scratch(batch * oh * ow * row)
        shape = (batch, oh, ow, kh, kw, c)
        strides = (image, sh * line, sw * pixel, dh * line, dw * pixel, item)
        to = (oh * ow * row, ow * row, row, kw * c * item, c * item, item)
        windows = View(place, shape, to, x.kind)
        layout.copy_row(call, View(x.place, shape, strides, x.kind), windows)
        return windows

    def _windows(self, windows: View, views: Sequence[View]) -> Walk:
        """A row for each gathered window, of dense outputs."""
        batch, oh, ow, _, _, c = windows.shape
        _, _, row, line, pixel, item = windows.strides
        m, groups, n = batch * oh * ow, self.groups, views[0].shape[3]
        operands = [Rows(windows.place, windows.kind, row, 0, c // groups * item)]
        for v in views:
            operands.append(Rows(v.place, v.kind, v.strides[2], 0, n // groups * v.item))
        return Walk(1, m, m, self._k_offsets(line, pixel, item), operands)

    def walk(self, views: Sequence[View]) -> Walk:
        """A row for each output pixel."""
        weight, groups = self.weight, self.groups
        (sh, sw), (dh, dw) = weight.stride, weight.dilation
        x, out = views[:2]
        batch, oh, ow, n = out.shape
        _, line, pixel, _ = x.strides
        images, m, line_rows = batch, oh * ow, ow
        steps = [(sh * line, sw * pixel), *(v.strides[1:3] for v in views[1:])]
        widths = [x.shape[3] // groups, n // groups, n // groups]
        rows: list[int] = []
        if m == 1:
            m, images = batch, 1
            rows = [v.strides[0] for v in views]
        elif oh == 1 or ow == 1 or all(down == ow * across for down, across in steps):
            rows = [down if ow == 1 else across for down, across in steps]
            if all(v.strides[0] == m * row for v, row in zip(views, rows, strict=True)):
                images, m = 1, batch * m  # pointwise: all images are one
        if rows:
            line_rows = m
        operands = []
        for i, (view, width) in enumerate(zip(views, widths, strict=False)):
            down, across = steps[i]
            row = rows[i] if rows else across
            operand = Rows(view.place, view.kind, row, view.strides[0], width * view.item)
            if not rows:
                operand.offsets = _table(np.arange(oh) * down, np.arange(ow) * across)
            operands.append(operand)
        offsets = self._k_offsets(dh * line, dw * pixel, x.item)
        return Walk(images, m, line_rows, offsets, operands)

    def _k_offsets(self, down: int, across: int, item: int) -> NDArray[np.int64]:
        """Where the K-steps lie in a window, whose taps are `down` and `across` bytes apart."""
        kh, kw = self.kernel_size
        offsets = np.arange(kh) * down
        by_lines = self.by_lines and across == self.channels * item
        if self.needs_dense_pixels and not by_lines:
            raise ValueError(
                f"conv2d: pixels lie {across} bytes apart; wanted {self.channels * item}, "
                "side by side: a K-step of this weight overlaps them"
            )
        if not by_lines:
            offsets = _table(offsets, np.arange(kw) * across)
        run = self.group or (kw if by_lines else 1) * self.channels // self.groups
        return _table(offsets, step_starts(run, self.packed.depth) * item)


class PackedDepthwise(Layer):
    """(B, HP, WP, C), padded, -> (B, OH, OW, C); attributes as of PackedConv2d.

    fold  pixels that are one. A whole panel of channels may be read of the last one.
    """

    wants_lines = False

    def __init__(
        self, weight: Conv2dWeight, epilogue: Epilogue, x_zero_point: int, isa: str, fold: int = 1
    ) -> None:
        super().__init__(weight.data, epilogue, x_zero_point, isa)
        self.weight, self.kernel_size = weight, weight.kernel_size
        self.channels, self.fold = weight.n, fold
        (tile,) = tiles_of(isa, "depthwise")
        self.outputs, self.down = tile.outputs, weight.kernel_size[0] > 1
        apart = (weight.stride[0], 0) if self.down else (0, weight.stride[1])
        self.taps = taps_of(weight.kernel_size, weight.dilation, apart, tile.outputs, isa)
        self.pad_operands(self._packed(tile.nr), 1)
        self.reads_beyond = self.channels % tile.nr > 0
        self._folded = functools.cache(
            functools.partial(PackedDepthwise, weight, epilogue, x_zero_point, isa)
        )

    def _packed(self, nr: int) -> Packed:
        key, weight = ("packed", self.isa, self.fold), self.weight
        packed: Packed | None = weight.panels.get(key)
        if packed is None:
            filters = np.tile(weight.data.reshape(weight.n, -1), (self.fold, 1))
            panels = pack_depthwise(filters, self.taps, self.isa)
            packed = weight.panels[key] = Packed(self.isa, "depthwise", nr, panels)
        return packed

    def append(self, call: Call, views: list[View], given: Given) -> None:
        dense = all(v.strides[2] == v.shape[3] * v.item for v in views)
        fold = 1
        if dense and self.down and self.weight.stride[1] == 1:
            fold = choose_fold(self.channels, views[1].shape[2], self.packed.nr)
        layer = self if fold == self.fold else self._folded(fold)
        layer.product(call, layer.walk(views), given)

    def walk(self, views: Sequence[View]) -> Walk:
        """A row for each run of `outputs` outputs, of `fold` pixels each."""
        x, out = views[:2]
        batch, oh, ow, _ = out.shape
        sizes = (self.outputs, self.fold) if self.down else (1, self.outputs)
        lines, pixels = map(step_starts, (oh, ow), sizes)
        alone = (oh if self.down else ow) < self.outputs
        operands = []
        for view, (sh, sw) in zip(views, (self.weight.stride, (1, 1), (1, 1)), strict=False):
            down, across = view.strides[1] * sh, view.strides[2] * sw
            operand = Rows(view.place, view.kind, across * self.fold, view.strides[0])
            operand.offsets = _table(lines * down, pixels * across)
            operand.neighbour = 0 if alone else down if self.down else across
            operands.append(operand)
        places = self.taps.places * x.strides[1:3]
        if alone:  # what only the next output would read is not there
            places[self.taps.filters[0] < 0] = 0
        m = len(lines) * len(pixels)
        return Walk(batch, m, len(pixels), places.sum(axis=1), operands)


def _table(lines: NDArray[np.int64], pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.outer(lines, pixels).reshape(-1)


def _grouping(weight: Conv2dWeight, isa: str) -> tuple[int, int]:
    """The way that takes the least time: in how many groups, and `group` of the tiles, or 0.

    Few channels a group leave most of a panel empty, and a run of under 4 activations cannot be
    read. Neighbouring groups may be merged into one that holds zeros between them. Or all are one
    product, whose columns read the activations of their own group: of 4 or 8 channels, merged or
    not, with as many outputs. Of two ways as good, the one that merges fewer.
    """
    (n, _, *kernel), c, depth = weight.data.shape, weight.c, emitter(isa).depth
    narrowest, taps = min(tile.nr for tile in tiles_of(isa)), math.prod(kernel)

    def cost(groups: int, group: int) -> float:
        columns = -(-n // groups // narrowest) * narrowest
        run = OWN * group or -(-c // groups // depth) * depth
        return groups * columns * (taps * run + EPILOGUE)

    counts = [g for g in range(weight.groups, 0, -1) if weight.groups % g == 0]
    ways = [(g, 0) for g in counts if g == 1 or c // g >= KR]
    if n == c:
        ways += [(1, c // g) for g in counts if c // g in GROUPS and group_tiles(isa, c // g)]
    return min(ways, key=lambda way: cost(*way))
