"""Linear layers and convolutions of their own, outside of a program, as calls.

Such a layer brings its input into form first, and keeps a call for each input shape:

    float32 input   [range_parts, range_qparams]  stage  product   (the first two: dynamic conv)
    uint8 input     [stage]  product                               (stage: where the tile needs it)
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import executor, stage
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
from fastq.kernels.convolution import pack_conv2d
from fastq.kernels.layout import copy_row
from fastq.kernels.products import ACTIVATIONS, ALIGNED, Layer, PackedLinear
from fastq.kernels.simd import KR, emitter
from fastq.kernels.tiles import BYTES_PER_NANOSECOND
from fastq.qparams import Dequant, Epilogue, QParams
from fastq.weights import Conv2dWeight, LinearWeight

RANGE_BLOCK = 32 * 1024  # values per task when a range is searched

Source = Literal["u8", "static", "dynamic"]
X, OUT, SCALE, ZERO_POINT, ADD = (At(i) for i in range(5))  # the arguments of a layer's call
ARGUMENTS = 5


def _output(layer: Layer, added: str, *shape: int) -> tuple[View, View | None]:
    """What a layer's call writes, and what its epilogue adds, if anything."""

    def dense(place: At, kind: str) -> View:
        return View(place, shape, dense_strides(shape, ITEM_BYTES[kind]), kind)

    return dense(OUT, layer.kind), dense(ADD, added) if added else None


class BoundLinear:
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
        self.layer = PackedLinear(weight, epilogue, x_zero_point, isa)
        self.source, self.x_qparams, self.calls = source, x_qparams, Calls()

    def __call__(
        self,
        m: int,
        row_stride: int,
        x: int,
        out: int,
        zero_point: NDArray[np.int32] | int = 0,
        add: int = 0,
        added: str = "",
    ) -> None:
        """x (M, K) with unit stride along K, out and add (M, N), contiguous, at these addresses.

        row_stride in bytes; zero_point, of a "u8" source, one or (M,). `added` is the kind of add,
        "" without one; SLACK bytes beyond its end may be read.
        """
        key = self.key(m, row_stride, x, zero_point, added)
        if isinstance(zero_point, int):
            self.calls.run(self.call, key, x, out, 0, 0, add)
        else:
            self.call(*key).run(x, out, 0, 0, add)

    def key(
        self, m: int, row_stride: int, x: int, zero_point: Any, added: str = ""
    ) -> tuple[Any, ...]:
        """What a call depends on: the arguments of `call`."""
        aligned = (x | row_stride) % ALIGNED == 0
        return m, row_stride, aligned, zero_point, executor.get_num_threads(), added

    def call(
        self, m: int, row_stride: int, aligned: bool, zero_point: Any, threads: int,
        added: str = "",
    ) -> Call:  # fmt: skip
        """A call for m rows, of the layer's five arguments."""
        call = Call(ARGUMENTS)
        x = View(X, (m, self.layer.k), (row_stride, 1), "u8" if self.source == "u8" else "f32")
        out, add = _output(self.layer, added, m, self.layer.n)
        self.rows(call, x, out, add, aligned, zero_point)
        return call

    def rows(
        self,
        call: Call,
        x: View,
        out: View,
        add: View | None = None,
        aligned: bool = True,
        zero_point: Any = 0,
    ) -> None:
        """Appends the rows of a call; of a float32 source there are two."""
        layer, (m, k), row_stride = self.layer, x.shape, x.strides[0]
        epilogue, given = layer.epilogue, x.place
        x_scales = getattr(epilogue, "x_scale", np.ones(()))
        per_row = self.source == "dynamic" or bool(np.ndim(zero_point) or np.ndim(x_scales))
        rows = m if per_row else 1
        scale, zero = x_operands(call, epilogue, self.source, self.x_qparams, rows, zero_point)
        kind = ACTIVATIONS[emitter(layer.isa).a_bytes]
        item = ITEM_BYTES[kind]
        by_matrix = layer.tile(m, m, -(-k // layer.packed.depth)).kind == "matrix"
        fits = k >= KR and not layer.packed.over_read
        fits = fits and (aligned or not by_matrix or not layer.reads_often)
        if self.source != "u8" or kind != "u8" or not fits:
            width = layer.run_length
            if by_matrix:
                width = -(-width // ALIGNED) * ALIGNED
            row = width * item
            x = View(call.scratch(m * row), (m, k), (row, item), kind)
            call.row(
                stage.stage_rows_kernel(self.source, kind),
                stage.R_FIELDS,
                m,
                {
                    stage.R_ROW: row_stride,
                    stage.R_K: k,
                    stage.R_OUT_K: width,
                },
                {
                    stage.R_X: given,
                    stage.R_OUT: x.place,
                    stage.R_SCALE: scale,
                    stage.R_ZERO_POINT: zero,
                },
                m * k * 4 / BYTES_PER_NANOSECOND,
            )
        layer.rows(call, x, out, add, scale=scale, zero_point=zero, per_row=per_row)


class BoundConv2d:
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
        self.weight, self.layer = weight, pack_conv2d(weight, epilogue, x_zero_point, isa)
        self.source, self.x_qparams, self.calls = source, x_qparams, Calls()

    def __call__(
        self, x: NDArray[Any], out: NDArray[Any], zero_point: int = 0, add: int = 0,
        added: str = "",
    ) -> None:  # fmt: skip
        """x (B, H, W, C) with any strides; out (B, OH, OW, N) contiguous; add as in BoundLinear."""
        key = self.key(x, zero_point, added)
        self.calls.run(self.call, key, address_of(x), address_of(out), 0, 0, add)

    def key(self, x: NDArray[Any], zero_point: int, added: str = "") -> tuple[Any, ...]:
        """What a call depends on: the arguments of `call`."""
        aligned = address_of(x) % ALIGNED == 0
        return x.shape, x.strides, aligned, zero_point, executor.get_num_threads(), added

    def call(
        self, shape: tuple[int, ...], strides: tuple[int, ...], aligned: bool, zero_point: int,
        threads: int, added: str = "", planes: bool = False,
    ) -> Call:  # fmt: skip
        """A call for x of this shape and these strides, of the layer's five arguments.

        With `planes` out is (B, N, OH, OW) in memory.
        """
        batch, h, w, c = shape
        (top, bottom), (left, right) = self.weight.padding
        call, layer = Call(ARGUMENTS), self.layer
        padded = (batch, h + top + bottom, w + left + right, layer.channels)
        scale, zero = x_operands(call, layer.epilogue, self.source, self.x_qparams, 1, zero_point)
        if self.source == "dynamic":
            _range_rows(call, 1, batch * h * w * c, scale, zero)
        kind = ACTIVATIONS[emitter(layer.isa).a_bytes]
        x = View(X, shape, strides, "u8" if self.source == "u8" else "f32")
        fits = x.kind == kind and x.shape == padded and x.dense and not layer.reads_beyond
        if not fits or (layer.wants_lines and not aligned):
            staged = dense_strides(padded, ITEM_BYTES[kind])
            size = batch * staged[0] + layer.packed.nr * ITEM_BYTES[kind]
            place = call.scratch(size)
            stage_image(call, x, View(place, padded, staged, kind), (top, left), scale, zero)
            x = View(place, padded, staged, kind)
        out, add = _output(layer, added, batch, *self.weight.output_size(h, w), self.weight.n)
        made = call.dense(out.shape, out.kind) if planes else out
        layer.rows(call, x, made, add, scale=scale, zero_point=zero)
        if planes:
            _, oh, ow, n = out.shape
            image, plane, line, value = dense_strides((batch, n, oh, ow), out.item)
            copy_row(call, made, replace(out, strides=(image, line, value, plane)))
        return call


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


def stage_image(
    call: Call, x: View, out: View, corner: tuple[int, int], scale: Place, zero_point: Place,
    grid: bool = False,
) -> None:  # fmt: skip
    """Appends: x (B, H, W, C) into out (B, HP, WP, CP), dense, from (top, left) on.

    float32 is quantized, uint8 copied; the rest of out is filled with the zero point. With `grid`
    each channel has a factor and a shift, float32 (C,), instead of scale and zero point.
    """
    batch, h, w, c = x.shape
    _, hp, wp, cp = out.shape
    source = "grid" if grid else x.kind
    planes = stage.interleaved_planes(source, x.strides, c, cp)
    call.row(
        stage.stage_image_kernel(source, out.kind, *planes),
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
    )


def grid_call(
    shape: tuple[int, ...], strides: tuple[int, ...], padding: tuple[tuple[int, int], ...]
) -> Call:
    """A call that puts float32 images of this shape on a grid per channel: reference.grid. Its
    arguments are x, out, and the factors and the shifts, float32 (C,)."""
    call, (b, h, w, c) = Call(ARGUMENTS), shape
    whole = (b, h + sum(padding[0]), w + sum(padding[1]), c)
    out = View(OUT, whole, dense_strides(whole, ITEM_BYTES["u8"]), "u8")
    corner = padding[0][0], padding[1][0]
    stage_image(call, View(X, shape, strides, "f32"), out, corner, SCALE, ZERO_POINT, grid=True)
    return call


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
