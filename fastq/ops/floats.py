"""linear and conv2d of float32: quantized, multiplied in integers, dequantized in one call."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import isa
from fastq.kernels.call import Call, Calls, address_of
from fastq.kernels.executor import get_num_threads
from fastq.kernels.layers import BoundConv2d, BoundLinear, Source
from fastq.ops.checks import FLOAT32, check_float_product, output_array, typed_array
from fastq.ops.products import bound_layer, conv_output
from fastq.qparams import Dequant, QParams
from fastq.weights import Conv2dWeight, LinearWeight


def linear_float(
    x: NDArray[np.float32],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    x_qparams: QParams | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32 (M, K) -> float32 (M, N): quantize x, multiply in integers, dequantize.

    x_qparams  uint8, per tensor; None quantizes dynamically, each row of x by its own range.
    epilogue   a Dequant, whose x_scale is replaced by the scale of x.

    NaN in x counts as 0, infinities saturate. Re-use weight, epilogue and x_qparams between
    calls: what is derived from them is kept with the weight. Errors as in `linear`.
    """
    x = typed_array("linear_float: x", x, FLOAT32, 2)
    m, k = x.shape
    check_float_product("linear_float", weight, LinearWeight, epilogue, x_qparams)
    if k != weight.k:
        raise ValueError(
            f"linear_float: x has {k} features, weight wants {weight.k}; "
            f"x {x.shape} f32, weight {weight.data.shape} s8"
        )
    result = output_array("linear_float", out, (m, weight.n), FLOAT32, x)
    if result.size == 0:
        return result
    if x.strides[1] != 4 or not x.flags.aligned:
        x = np.array(x, order="C")
    source: Source = "dynamic" if x_qparams is None else "static"
    layer = bound_layer(BoundLinear, weight, epilogue, source, x_qparams, 0)
    layer(m, x.strides[0], address_of(x), address_of(result))
    return result


class Operands:
    """What `linear_float` or `conv2d_float` is called with again and again, checked by the caller.

    For modules, where the address of a tensor is had for less than a NumPy view of it.
    name: whose they are, for errors.
    """

    def __init__(
        self, weight: Any, epilogue: Dequant, x_qparams: QParams | None, name: str
    ) -> None:
        self.weight, self.epilogue, self.x_qparams, self.name = weight, epilogue, x_qparams, name
        self._source: Source = "dynamic" if x_qparams is None else "static"
        self._calls = Calls()

    def linear(self, m: int, row_stride: int, x: int, out: int) -> None:
        """`linear_float` on memory: x and out are addresses.

        x is float32 (m, K) with row_stride bytes between rows, out float32 (m, N), m and N > 0.
        """
        key = m, row_stride, isa.current(), get_num_threads()
        self._calls.run(self._linear_call, key, x, out, 0, 0, 0)

    def _linear_call(self, m: int, row_stride: int, tier: str, threads: int) -> Call:
        # floats are staged, aligned or not
        return self._layer(BoundLinear).call(m, row_stride, True, 0, threads)  # type: ignore[no-any-return]

    def conv2d(
        self, shape: tuple[int, ...], strides: tuple[int, ...], planes: bool, x: int, out: int
    ) -> None:
        """`conv2d_float` on memory: x and out are addresses.

        x is float32 (B, C, H, W), dense in some order of its axes, strides in elements; out
        float32 (B, OH, OW, N), or (B, N, OH, OW) with `planes`, contiguous and not empty.
        """
        key = shape, strides, planes, isa.current(), get_num_threads()
        self._calls.run(self._conv2d_call, key, x, out, 0, 0, 0)

    def _conv2d_call(
        self, shape: tuple[int, ...], strides: tuple[int, ...], planes: bool, tier: str,
        threads: int,
    ) -> Call:  # fmt: skip
        (b, c, h, w), (sb, sc, sh, sw) = shape, (4 * stride for stride in strides)
        layer = self._layer(BoundConv2d)
        return layer.call(  # type: ignore[no-any-return]
            (b, h, w, c), (sb, sh, sw, sc), True, 0, threads, planes=planes
        )

    def _layer(self, kind: Any) -> Any:
        return bound_layer(kind, self.weight, self.epilogue, self._source, self.x_qparams, 0)


def conv2d_float(
    x: NDArray[np.float32],
    weight: Conv2dWeight,
    epilogue: Dequant,
    *,
    x_qparams: QParams | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32 (B, H, W, C) -> float32 (B, OH, OW, N): quantize x, convolve in integers, dequantize.

    x may have any strides: an NCHW array seen as NHWC is read as it lies. x_qparams None
    quantizes dynamically, all of x by its range. Otherwise as `linear_float` and `conv2d`.
    """
    x = typed_array("conv2d_float: x", x, FLOAT32, 4)
    check_float_product("conv2d_float", weight, Conv2dWeight, epilogue, x_qparams)
    result = conv_output("conv2d_float", x, weight, FLOAT32, out)
    if result.size == 0:
        return result
    # a range is searched in memory order: x must fill its memory, in any order of the axes
    if not x.flags.aligned or (x_qparams is None and not _fills_its_memory(x)):
        x = np.array(x, order="C")
    source: Source = "dynamic" if x_qparams is None else "static"
    bound_layer(BoundConv2d, weight, epilogue, source, x_qparams, 0)(x, result)
    return result


def _fills_its_memory(x: NDArray[Any]) -> bool:
    """Whether x is contiguous after reordering its axes."""
    step = x.itemsize
    for stride, extent in sorted(zip(x.strides, x.shape, strict=True)):
        if extent > 1:
            if stride != step:
                return False
            step *= extent
    return True
