"""Linear layers and convolutions as rows of a call.

A layer is bound once to its weight, its epilogue and a tier: panels are packed, the per-column
operands padded. `rows` appends the product to a call. A layer of its own, outside of a program,
brings its input into form first, and keeps a call for each input shape:

    float32 input   [range_parts, range_qparams]  stage  gemm      (the first two: dynamic conv)
    uint8 input     [stage]  gemm                                  (stage: where the tile needs it)
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import block, executor, gemm, layout, matrix, stage, winograd
from fastq.kernels.call import (
    ITEM_BYTES,
    At,
    Call,
    Calls,
    Place,
    View,
    address_of,
    dense_strides,
)
from fastq.kernels.depthwise import Taps, choose_fold, pack_depthwise, taps_of
from fastq.kernels.gemm import Tile
from fastq.kernels.pack import aligned_empty, pack_panels, pad_columns, step_starts
from fastq.kernels.simd import KR, emitter
from fastq.kernels.tiles import (
    BYTES_PER_NANOSECOND,
    Work,
    choose_nr,
    choose_product_tile,
    choose_tile,
    nanoseconds,
    tiles_of,
)
from fastq.qparams import Dequant, Epilogue, QParams, Requant
from fastq.weights import Conv2dWeight, LinearWeight

A_BLOCK_BYTES = 128 * 1024  # of activations that a block of MC rows works on, to stay in L2
TASKS_A_THREAD = 8
# a product of matrix tiles, with its loads; a byte of a copy within the cache, and then some
PRODUCT_NANOSECONDS, COPY_NANOSECONDS = 7.0, 0.08
RANGE_BLOCK = 32 * 1024  # values per task when a range is searched

Source = Literal["u8", "static", "dynamic"]
X, OUT, SCALE, ZERO_POINT, ADD = (At(i) for i in range(5))  # the arguments of a layer's call
ARGUMENTS = 5


class _Layer:
    """The operands of an epilogue, and the product's row."""

    kernel_size = 1, 1  # of a convolution
    fold = 1  # pixels whose channels are the columns of a row: see depthwise.py

    def __init__(
        self, weight: NDArray[np.int8], epilogue: Epilogue, x_zero_point: int, isa: str
    ) -> None:
        self.epilogue, self.isa = epilogue, isa
        self.x_zero_point = x_zero_point  # folded into the bias of a Requant
        self.kind = "f32" if isinstance(epilogue, Dequant) else "u8" if epilogue else "s32"
        filters = weight.reshape(len(weight), -1)
        self.col_sums = filters.sum(axis=1, dtype=np.int64)
        n = len(weight)
        if epilogue is not None:
            scale = epilogue.scale if isinstance(epilogue, Dequant) else epilogue.multiplier
            bias = epilogue.bias
            if scale.shape not in ((), (n,)) or (bias is not None and bias.shape != (n,)):
                raise ValueError(
                    f"epilogue: scale {scale.shape} and bias {None if bias is None else bias.shape}"
                    f" for {n} outputs; wanted ({n},) each, or a scalar scale, or no bias"
                )
        if isinstance(epilogue, Requant) and epilogue.bias is not None:
            self._check_bias(filters, epilogue.bias)

    def _check_bias(self, filters: NDArray[np.int8], bias: NDArray[np.int32]) -> None:
        """ValueError if some input could take accumulator + bias out of int32."""
        positive = np.maximum(filters, 0).sum(axis=1, dtype=np.int64)
        negative = self.col_sums - positive
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

    def pad_operands(self, packed: _Packed, groups: int) -> None:
        """Keeps the packed weight, and the per-column operands padded to whole panels."""
        self.packed, self.groups = packed, groups
        n = len(self.col_sums)
        scale: Any = np.float32(1)
        bias: NDArray[Any] = np.zeros(n, np.int32)
        clamp, zero_point, add = (0.0, 0.0), 0, (0.0, 0)
        match self.epilogue:
            case Requant(multiplier, zero_point, given, qmin, qmax, add_multiplier, add_zero_point):
                scale = multiplier
                folded = (0 if given is None else given) - self.x_zero_point * self.col_sums
                bias = folded.astype(np.int32)  # modulo 2**32: its sum with acc is in range
                clamp = (qmin - zero_point, qmax - zero_point)
                add = (add_multiplier or 0.0, add_zero_point)
            case Dequant(scale, _, given, fmin, fmax):
                # without a bias -0.0 is added: y + -0.0 is y, and -0.0 for y = -0.0
                bias = np.full(n, -0.0, np.float32) if given is None else given
                clamp = (fmin, fmax)

        def columns(values: NDArray[Any]) -> NDArray[Any]:
            return pad_columns(np.tile(values, self.fold), groups, packed.nr, packed.isa)

        self.operands: dict[int, Place] = {
            block.COL_SUMS: columns(self.col_sums.astype(np.int32)),
            block.SCALE: columns(np.broadcast_to(scale, (n,)).astype(np.float32)),
            block.BIAS: columns(bias),
            block.CLAMP: np.array(clamp, np.float32),
            block.OUT_ZERO_POINT: np.array([zero_point], np.int32),
            block.ADD_SCALE: np.array(add[:1], np.float32),
            block.ADD_ZERO_POINT: np.array(add[1:], np.int32),
        }

    def added(self, out: View) -> View | None:
        """What the epilogue adds, as the argument ADD of a call of this layer alone."""
        if isinstance(self.epilogue, Requant) and self.epilogue.add_multiplier is not None:
            return View(ADD, out.shape, out.strides, out.kind)
        return None

    def reads(self) -> int:
        """How often a product loads an activation: in each of its windows, for each panel."""
        return len(self.packed.panels) // self.groups * math.prod(self.kernel_size)

    def tile(self, m: int, line: int, steps: int) -> Tile:
        """The tile for m rows, in lines of so many, and so many K-steps."""
        packed = self.packed
        if packed.kind == "depthwise":
            return choose_tile(packed.isa, packed.nr, m, packed.kind)
        bands = m // line * -(-line // matrix.ROWS)
        return choose_product_tile(packed.isa, packed.nr, Work(m, bands, steps, packed.depth))

    def product(
        self,
        call: Call,
        walk: _Walk,
        scale: Place | None,
        zero_point: Place | None,
        *,
        per_row: bool = False,
        label: str = "",
    ) -> None:
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
            block.ROW_STEP: int(per_row),
        }
        places: dict[int, Place] = {
            block.A: x.place,
            block.B: packed.panels,
            block.OUT: out.place,
            **self.operands,
        }
        places |= _scales(scale, zero_point)
        kind = out.kind
        if add is not None:
            kind += "+add"
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
            rows.append(_Rows(x.place, x.kind, 1))  # the row's number
            kernel, by_table = matrix.matrix_kernel(tile, kind), True
        else:
            if tile.kind == "gemm":  # which takes a K-step by fours
                quads = np.arange(0, packed.depth, KR) * ITEM_BYTES[x.kind]
                offsets = np.add.outer(offsets, quads).reshape(-1)
            else:
                values |= {block.OUT_PIXEL: out.neighbour, block.ADD_PIXEL: rows[2].neighbour}
            kernel = gemm.gemm_kernel(tile, kind, "table" if by_table else "affine")
        if by_table:
            places[block.ROW_TABLE] = np.stack([r.at(firsts) for r in rows], axis=1)
        mc = block_rows(tile, m * of, row_bytes, images * groups * panels) // of
        values |= {block.M: m, block.MC: mc, block.STEPS: len(offsets)}
        places[block.OFFSETS] = offsets.astype(np.int32)
        call.row(
            kernel,
            block.FIELDS,
            images * -(-m // mc) * groups * panels,
            values,
            places,
            nanoseconds(tile.isa, macs, tile.kind),
            label or str(tile),
        )


def bands_of(m: int, line: int, most: int) -> tuple[int, NDArray[np.int64]]:
    """The rows of a band, and the first ones of the bands that cover m rows, line by line.

    The last band of a line may overlap the one before.
    """
    count = -(-line // most)
    band = -(-line // count)
    firsts = np.minimum(np.arange(count) * band, line - band)
    return band, np.add.outer(np.arange(0, m, line), firsts).reshape(-1)


@dataclass
class _Rows:
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


class _Walk(NamedTuple):
    """The rows of a product: `images` times m of them, of x, out and what is added, if anything.

    Of `line` rows each lies as far from the one before; m is a multiple of it. offsets are in
    bytes, one for each K-step.
    """

    images: int
    m: int
    line: int
    offsets: NDArray[np.int64]
    operands: list[_Rows]


def block_rows(tile: Tile, m: int, row_bytes: int, other_tasks: int) -> int:
    """MC: rows that share a panel while it is in L1, and their activations in L2."""
    blocks = -(-m // max(A_BLOCK_BYTES // max(row_bytes, 1), 8 * tile.mr))
    threads = executor.get_num_threads()
    if threads > 1:  # TASKS_A_THREAD or more, all of a size, so that the threads end together
        wanted = -(-TASKS_A_THREAD * threads // max(other_tasks, 1))
        blocks = max(blocks, min(wanted, m // (2 * tile.mr)))
    return max(-(-m // max(blocks, 1) // tile.mr) * tile.mr, 1)


class PackedLinear(_Layer):
    """(M, K) -> (M, N)."""

    def __init__(
        self, weight: LinearWeight, epilogue: Epilogue, x_zero_point: int, isa: str
    ) -> None:
        super().__init__(weight.data, epilogue, x_zero_point, isa)
        self.n, self.k = weight.n, weight.k
        self.run_length = max(weight.k, KR)
        self.pad_operands(_packed(weight, isa, lambda: [self._filters(weight)]), 1)

    def _filters(self, weight: LinearWeight) -> NDArray[np.int8]:
        data = np.zeros((self.n, 1, self.run_length), np.int8)
        data[:, 0, : self.k] = weight.data
        return data

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
        label: str = "",
    ) -> None:
        """x (M, K) of the tier's kind, out and add (M, N); unit stride along K and N.

        Of x, run_length values are read in each row. scale and zero_point, for other epilogues
        than Requant, are one float32 and one int32, or per_row (M,).
        """

        def along(view: View) -> _Rows:
            return _Rows(view.place, view.kind, view.strides[0])

        m, steps = x.shape[0], step_starts(self.run_length, self.packed.depth) * x.item
        walk = _Walk(1, m, m, steps, [along(v) for v in (x, out, add) if v is not None])
        self.product(call, walk, scale, zero_point, per_row=per_row, label=label)


class PackedConv2d(_Layer):
    """(B, HP, WP, C), padded, -> (B, OH, OW, N)."""

    def __init__(
        self, weight: Conv2dWeight, epilogue: Epilogue, x_zero_point: int, isa: str
    ) -> None:
        super().__init__(weight.data, epilogue, x_zero_point, isa)
        self.weight, self.kernel_size = weight, weight.kernel_size
        n, c_group = weight.data.shape[:2]
        if weight.groups > 1 and c_group == 1 and n == weight.groups:
            self.channels = n
            (tile,) = tiles_of(isa, "depthwise")
            self.outputs, self.down = tile.outputs, weight.kernel_size[0] > 1
            apart = (weight.stride[0], 0) if self.down else (0, weight.stride[1])
            self.taps = taps_of(weight.kernel_size, weight.dilation, apart, tile.outputs, isa)
            self.folds: dict[int, PackedConv2d] = {}
            self._pack_depthwise()
        else:
            groups = self.groups = _merged_groups(weight, min(t.nr for t in tiles_of(isa)))
            self.by_lines = self._takes_lines()
            row = weight.kernel_size[1] if self.by_lines else 1
            self.channels = weight.c if row * weight.c // groups >= KR else KR
            self.pad_operands(_packed(weight, isa, self._filters), groups)
        self.by_winograd = (
            weight.kernel_size == (3, 3)
            and (weight.stride, weight.dilation, weight.groups) == ((1, 1), (1, 1), 1)
            and winograd.fits(isa, weight.c, n, self.packed.nr)
            and winograd.is_exact(weight.data)
        )

    def _pack_depthwise(self) -> None:
        packed = _packed_depthwise(self.weight, self.taps, self.fold, self.isa)
        self.pad_operands(packed, 1)

    def folded(self, views: Sequence[View]) -> PackedConv2d:
        """This depthwise layer with as many pixels in one as pay for these operands."""
        pixels = views[1].shape[2]
        fits = self.down and self.weight.stride[1] == 1
        fits = fits and all(v.strides[2] == v.shape[3] * v.item for v in views)
        fold = choose_fold(self.channels, pixels, self.packed.nr) if fits else 1
        if fold == self.fold:
            return self
        if fold not in self.folds:
            layer = self.folds[fold] = copy.copy(self)
            layer.fold = fold
            layer._pack_depthwise()
        return self.folds[fold]

    @property
    def depthwise(self) -> bool:
        return self.packed.kind == "depthwise"

    def _takes_lines(self) -> bool:
        """Whether a run of K is a line of KW * C contiguous activations, not of C.

        Not where it would take as many K-steps: lines want pixels side by side.
        """
        weight, depth = self.weight, emitter(self.isa).depth
        (_, kw), c = weight.kernel_size, weight.c
        if self.groups > 1 or weight.dilation[1] > 1:
            return False
        if depth == KR:
            return True  # by pixels it takes the same steps
        return kw * c >= KR and -(-kw * c // depth) < kw * -(-c // depth)

    def needs_dense_pixels(self) -> bool:
        """Whether nothing may lie between the pixels: the steps of a kernel line overlap them."""
        return not self.depthwise and self.by_lines and self.channels % self.packed.depth != 0

    def _filters(self) -> list[NDArray[np.int8]]:
        """(N / groups, taps, run) for each group."""
        data, groups = self.weight.data, self.groups
        n, c_group, kh, kw = data.shape
        merged = self.weight.groups // groups
        c = self.channels // groups
        # groups merged into one hold zeros where they do not meet
        dense = np.zeros((groups, merged, n // self.weight.groups, c, kh, kw), np.int8)
        split = data.reshape(groups, merged, n // self.weight.groups, c_group, kh, kw)
        for i in range(merged):
            dense[:, i, :, i * c_group : (i + 1) * c_group] = split[:, i]
        filters = dense.reshape(n, c, kh, kw).transpose(0, 2, 3, 1)
        shape = (n, kh, kw * c) if self.by_lines else (n, kh * kw, c)
        return np.split(np.ascontiguousarray(filters).reshape(shape), groups)

    def rows(
        self,
        call: Call,
        x: View,
        out: View,
        add: View | None = None,
        *,
        scale: Place | None = None,
        zero_point: Place | None = None,
        label: str = "",
    ) -> None:
        """x (B, HP, WP, C) of the tier's kind, padded; out and add (B, OH, OW, N).

        The channels lie side by side. Of a pixel, `channels` may be read, and by depthwise tiles
        a whole panel. scale and zero_point as in PackedLinear, one each.
        """
        if self.by_winograd:
            split = winograd.Split(self.isa, self.packed.nr, self.channels, out.shape)
            if split.pays:
                columns = self.operands | _scales(scale, zero_point)
                panels = self.packed.panels
                winograd.winograd_row(call, split, x, out, add, panels, columns, label)
                return
        views = [x, out] if add is None else [x, out, add]
        if self.depthwise:
            layer = self.folded(views)
            layer.product(call, layer._runs(views), scale, zero_point, label=label)
            return
        walk = self._pixels(views)
        if not self._gathering_pays(walk):
            self.product(call, walk, scale, zero_point, label=label)
            return
        with call.borrowed_scratch():
            windows = self._gather(call, x, out)
            dense = [v if v.dense else _dense(call, v) for v in views[1:]]
            if add is not None and dense[1] is not add:
                layout.copy_row(call, add, dense[1])
            walk = self._windows(windows, dense)
            self.product(call, walk, scale, zero_point, label=label)
            if dense[0] is not out:
                layout.copy_row(call, dense[0], out)

    def _gathering_pays(self, walk: _Walk) -> bool:
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
        """Appends the copy of the window of each output: (B, OH, OW, KH, KW * C)."""
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

    def _windows(self, windows: View, views: Sequence[View]) -> _Walk:
        """A row for each gathered window, of dense outputs."""
        batch, oh, ow, _, _, c = windows.shape
        _, _, row, line, pixel, item = windows.strides
        m, groups, n = batch * oh * ow, self.groups, views[0].shape[3]
        operands = [_Rows(windows.place, windows.kind, row, 0, c // groups * item)]
        for v in views:
            operands.append(_Rows(v.place, v.kind, v.strides[2], 0, n // groups * v.item))
        return _Walk(1, m, m, self._k_offsets(line, pixel, item), operands)

    def _pixels(self, views: Sequence[View]) -> _Walk:
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
            operand = _Rows(view.place, view.kind, row, view.strides[0], width * view.item)
            if not rows:
                operand.offsets = _table(np.arange(oh) * down, np.arange(ow) * across)
            operands.append(operand)
        offsets = self._k_offsets(dh * line, dw * pixel, x.item)
        return _Walk(images, m, line_rows, offsets, operands)

    def _k_offsets(self, down: int, across: int, item: int) -> NDArray[np.int64]:
        """Where the K-steps lie in a window, whose taps are `down` and `across` bytes apart."""
        kh, kw = self.kernel_size
        offsets = np.arange(kh) * down
        by_lines = self.by_lines and across == self.channels * item
        if self.needs_dense_pixels() and not by_lines:
            raise ValueError(
                f"conv2d: pixels lie {across} bytes apart; wanted {self.channels * item}, "
                "side by side: a K-step of this weight overlaps them"
            )
        if not by_lines:
            offsets = _table(offsets, np.arange(kw) * across)
        run = (kw if by_lines else 1) * self.channels // self.groups
        return _table(offsets, step_starts(run, self.packed.depth) * item)

    def _runs(self, views: Sequence[View]) -> _Walk:
        """Depthwise: a row for each run of `outputs` outputs, of `fold` pixels each."""
        x, out = views[:2]
        batch, oh, ow, _ = out.shape
        sizes = (self.outputs, self.fold) if self.down else (1, self.outputs)
        lines, pixels = (
            np.minimum(np.arange(0, total, size), max(total - size, 0))
            for total, size in zip((oh, ow), sizes, strict=True)
        )
        alone = (oh if self.down else ow) < self.outputs
        operands = []
        for view, (sh, sw) in zip(views, (self.weight.stride, (1, 1), (1, 1)), strict=False):
            down, across = view.strides[1] * sh, view.strides[2] * sw
            operand = _Rows(view.place, view.kind, across * self.fold, view.strides[0])
            operand.offsets = _table(lines * down, pixels * across)
            operand.neighbour = 0 if alone else down if self.down else across
            operands.append(operand)
        places = self.taps.places * x.strides[1:3]
        if alone:  # what only the next output would read is not there
            places[self.taps.filters[0] < 0] = 0
        m = len(lines) * len(pixels)
        return _Walk(batch, m, len(pixels), places.sum(axis=1), operands)


def _dense(call: Call, view: View) -> View:
    """A place in the workspace for what a view has."""
    place = call.scratch(math.prod(view.shape) * view.item)
    return View(place, view.shape, dense_strides(view.shape, view.item), view.kind)


def _table(lines: NDArray[np.int64], pixels: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.add.outer(lines, pixels).reshape(-1)


def _scales(scale: Place | None, zero_point: Place | None) -> dict[int, Place]:
    if scale is None or zero_point is None:
        return {}
    return {block.ROW_SCALE: scale, block.ROW_ZERO_POINT: zero_point}


def x_operands(
    call: Call, epilogue: Epilogue, source: Source, x_qparams: QParams | None, rows: int, zero: Any
) -> tuple[Place, Place]:
    """The places of the input's scale and zero point: one each, or one per row."""
    if source == "dynamic":
        return call.scratch(4 * rows), call.scratch(4 * rows)
    scale: Any = 1.0
    if x_qparams is not None:
        scale, zero = x_qparams.scale, x_qparams.zero_point
    elif isinstance(epilogue, Dequant):
        scale = epilogue.x_scale
    return (
        np.broadcast_to(np.asarray(scale, np.float32), (rows,)).copy(),
        np.broadcast_to(np.asarray(zero, np.int32), (rows,)).copy(),
    )


class BoundLinear(PackedLinear):
    """A linear layer of its own: input of a source, output a dense array."""

    def __init__(
        self,
        weight: LinearWeight,
        epilogue: Epilogue,
        source: Source,
        x_qparams: QParams | None,
        x_zero_point: int,
        isa: str,
    ) -> None:
        super().__init__(weight, epilogue, x_zero_point, isa)
        self.source, self.x_qparams, self.calls = source, x_qparams, Calls()

    def __call__(
        self,
        m: int,
        row_stride: int,
        x: int,
        out: int,
        zero_point: NDArray[np.int32] | int = 0,
        add: int = 0,
    ) -> None:
        """x (M, K) with unit stride along K, out and add (M, N), contiguous, at these addresses.

        row_stride in bytes; zero_point, of a "u8" source, one or (M,). Of add, SLACK bytes
        beyond its end may be read.
        """
        aligned = (x | row_stride) % ALIGNED == 0
        key = (m, row_stride, aligned, zero_point, executor.get_num_threads())
        if isinstance(zero_point, int):
            self.calls.run(self.call, key, x, out, 0, 0, add)
        else:
            self.call(*key).run(x, out, 0, 0, add)

    def call(self, m: int, row_stride: int, aligned: bool, zero_point: Any, threads: int) -> Call:
        """A call for m rows, of the layer's five arguments."""
        call = Call(ARGUMENTS)
        x_scales = getattr(self.epilogue, "x_scale", np.ones(()))
        per_row = self.source == "dynamic" or bool(np.ndim(zero_point) or np.ndim(x_scales))
        rows = m if per_row else 1
        scale, zero = x_operands(call, self.epilogue, self.source, self.x_qparams, rows, zero_point)
        kind = ACTIVATIONS[emitter(self.isa).a_bytes]
        item = ITEM_BYTES[kind]
        x = View(X, (m, self.k), (row_stride, 1), "u8")
        by_matrix = self.tile(m, m, -(-self.k // self.packed.depth)).kind == "matrix"
        fits = self.k >= KR and not self.packed.over_read
        fits = fits and (aligned or not by_matrix or self.reads() <= READS)
        if self.source != "u8" or kind != "u8" or not fits:
            width = self.run_length
            if by_matrix:
                width = -(-width // ALIGNED) * ALIGNED
            row = width * item
            x = View(call.scratch(m * row), (m, self.k), (row, item), kind)
            call.row(
                stage.stage_rows_kernel(self.source, kind),
                stage.R_FIELDS,
                m,
                {
                    stage.R_ROW: row_stride,
                    stage.R_K: self.k,
                    stage.R_OUT_K: width,
                },
                {
                    stage.R_X: X,
                    stage.R_OUT: x.place,
                    stage.R_SCALE: scale,
                    stage.R_ZERO_POINT: zero,
                },
                m * self.k * 4 / BYTES_PER_NANOSECOND,
            )
        shape = (m, self.n)
        out = View(OUT, shape, dense_strides(shape, ITEM_BYTES[self.kind]), self.kind)
        self.rows(call, x, out, self.added(out), scale=scale, zero_point=zero, per_row=per_row)
        return call


# Matrix tiles load lines of 64 bytes: six times slower where one lies across two of the cache's.
# An activation that is loaded more often than READS is copied to where none does.
ALIGNED, READS = 64, 2
# how a tier holds activations, by its a_bytes
ACTIVATIONS = {1: "u8", 2: "s16"}


class BoundConv2d(PackedConv2d):
    """A convolution of its own: input of a source, output a dense array."""

    def __init__(
        self,
        weight: Conv2dWeight,
        epilogue: Epilogue,
        source: Source,
        x_qparams: QParams | None,
        x_zero_point: int,
        isa: str,
    ) -> None:
        super().__init__(weight, epilogue, x_zero_point, isa)
        self.source, self.x_qparams, self.calls = source, x_qparams, Calls()

    def __call__(
        self, x: NDArray[Any], out: NDArray[Any], zero_point: int = 0, add: int = 0
    ) -> None:
        """x (B, H, W, C) with any strides; out (B, OH, OW, N) contiguous; add as in BoundLinear."""
        at = address_of(x)
        key = (x.shape, x.strides, at % ALIGNED == 0, zero_point, executor.get_num_threads())
        self.calls.run(self.call, key, at, address_of(out), 0, 0, add)

    def call(
        self, shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool, zero_point: int,
        threads: int,
    ) -> Call:  # fmt: skip
        """A call for x of this shape and these strides, of the layer's five arguments."""
        batch, h, w, c = shape
        (top, bottom), (left, right) = self.weight.padding
        padded = (batch, h + top + bottom, w + left + right, self.channels)
        call = Call(ARGUMENTS)
        scale, zero = x_operands(call, self.epilogue, self.source, self.x_qparams, 1, zero_point)
        if self.source == "dynamic":
            _range_rows(call, 1, batch * h * w * c, scale, zero)
        kind = ACTIVATIONS[emitter(self.isa).a_bytes]
        x = View(X, shape, strides, "u8" if self.source == "u8" else "f32")
        over_read = c % self.packed.nr > 0 if self.depthwise else self.packed.over_read > 0
        by_matrix = emitter(self.isa).depth > KR and not self.depthwise
        slow = by_matrix and not aligned and self.reads() > READS
        if x.kind != kind or x.shape != padded or over_read or slow or not x.dense:
            staged = dense_strides(padded, ITEM_BYTES[kind])
            size = batch * staged[0] + self.packed.nr * ITEM_BYTES[kind]
            place = call.scratch(size)
            stage_image(call, x, View(place, padded, staged, kind), (top, left), scale, zero)
            x = View(place, padded, staged, kind)
        out_shape = (batch, *self.weight.output_size(h, w), self.weight.n)
        out = View(OUT, out_shape, dense_strides(out_shape, ITEM_BYTES[self.kind]), self.kind)
        self.rows(call, x, out, self.added(out), scale=scale, zero_point=zero)
        return call


def stage_image(
    call: Call, x: View, out: View, corner: tuple[int, int], scale: Place, zero_point: Place
) -> None:
    """Appends: x (B, H, W, C) into out (B, HP, WP, CP), dense, from (top, left) on.

    float32 is quantized, uint8 copied; the rest of out is filled with the zero point.
    """
    batch, h, w, c = x.shape
    _, hp, wp, cp = out.shape
    call.row(
        stage.stage_image_kernel(
            x.kind, out.kind, *stage.interleaved_planes(x.kind, x.strides, c, cp)
        ),
        stage.I_FIELDS,
        batch * hp,
        {
            stage.I_XB: x.strides[0],
            stage.I_XH: x.strides[1],
            stage.I_XW: x.strides[2],
            stage.I_XC: x.strides[3],
            stage.I_H: h,
            stage.I_W: w,
            stage.I_C: c,
            stage.I_TOP: corner[0],
            stage.I_LEFT: corner[1],
            stage.I_HP: hp,
            stage.I_WP: wp,
            stage.I_CP: cp,
        },
        {
            stage.I_X: x.place,
            stage.I_OUT: out.place,
            stage.I_SCALE: scale,
            stage.I_ZERO_POINT: zero_point,
        },
        batch * hp * wp * cp * (x.item + out.item) / BYTES_PER_NANOSECOND,
        f"stage_image_{x.kind}_{out.kind}",
    )


def range_call(rows: int, columns: int) -> Call:
    """A call that finds scale and zero point, (rows,) each, of x (rows, columns) float32."""
    call = Call(ARGUMENTS)
    _range_rows(call, rows, columns, SCALE, ZERO_POINT)
    return call


def _range_rows(call: Call, rows: int, columns: int, scale: Place, zero: Place) -> None:
    parts = -(-columns // RANGE_BLOCK)
    found = call.scratch(8 * rows * parts)
    values = {
        stage.P_COLUMNS: columns,
        stage.P_BLOCK: RANGE_BLOCK,
        stage.P_PARTS_A_ROW: parts,
    }
    places: dict[int, Place] = {stage.P_X: X, stage.P_PARTS: found}
    time = rows * columns * 4 / BYTES_PER_NANOSECOND
    call.row(stage.range_parts_kernel(), stage.P_FIELDS, rows * parts, values, places, time)
    places = {stage.P_PARTS: found, stage.P_SCALE: scale, stage.P_ZERO_POINT: zero}
    call.row(stage.range_qparams_kernel(), stage.P_FIELDS, rows, values, places)


@dataclass(frozen=True, eq=False)
class _Packed:
    """Packed weights, and the tiles that they are for.

    depth      activations of a K-step.
    over_read  of which the last may be beyond the run.
    """

    isa: str
    kind: str
    nr: int
    panels: NDArray[Any]
    depth: int = 1
    over_read: int = 0


def _packed(weight: Any, isa: str, filters: Callable[[], list[NDArray[np.int8]]]) -> _Packed:
    """The weight packed for a tier, at the first use; filters() is (N, taps, run) a group."""
    packed = weight.panels.get(("packed", isa))
    if packed is None:
        parts = filters()
        n, taps, run = parts[0].shape
        depth = min(emitter(isa).depth, -(-run // KR) * KR)
        nr = choose_nr(isa, n, taps * -(-run // depth))
        groups = [pack_panels(part, nr, isa, depth) for part in parts]
        panels = aligned_empty((len(groups) * len(groups[0]), *groups[0].shape[1:]), np.int8)
        np.concatenate(groups, out=panels)
        packed = _Packed(isa, "gemm", nr, panels, depth, max(depth - run, 0))
        weight.panels["packed", isa] = packed
    return packed  # type: ignore[no-any-return]


def _packed_depthwise(weight: Conv2dWeight, taps: Taps, fold: int, isa: str) -> _Packed:
    packed = weight.panels.get(("packed", isa, fold))
    if packed is None:
        (tile,) = tiles_of(isa, "depthwise")
        panels = pack_depthwise(np.tile(weight.data.reshape(weight.n, -1), (fold, 1)), taps, isa)
        packed = weight.panels["packed", isa, fold] = _Packed(isa, "depthwise", tile.nr, panels)
    return packed  # type: ignore[no-any-return]


def _merged_groups(weight: Conv2dWeight, narrowest: int) -> int:
    """Into how many groups a grouped convolution is computed.

    Few channels a group would leave most of a panel empty, and a run of under 4 activations
    cannot be read: neighbouring groups are merged into one that holds zeros between them.
    """
    n, c_group = weight.data.shape[:2]
    for groups in range(weight.groups, 1, -1):
        merged, rest = divmod(weight.groups, groups)
        if not rest and c_group * merged >= KR and n // groups >= narrowest:
            return groups
    return 1
