"""add, mul, affine and table."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastq.kernels import pointwise
from fastq.kernels.call import Call, View
from fastq.ops.checks import (
    UINT8,
    as_byte,
    as_clamp,
    as_factor,
    as_factors,
    as_uint8,
    as_values,
    broadcast_output,
    output_array,
)
from fastq.ops.rows import run_row
from fastq.qparams import value_dtype


def add(
    a: NDArray[Any],
    b: NDArray[Any],
    a_multiplier: float,
    b_multiplier: float,
    *,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int | None = None,
    qmax: int | None = None,
    dtype: DTypeLike = np.uint8,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """y = clip(rint((a - za) * a_multiplier + (b - zb) * b_multiplier) + zero_point, qmin, qmax).

    a, b          uint8 or int16, of shapes that broadcast as NumPy's.
    multipliers   a_scale / y_scale and b_scale / y_scale, each product rounded to float32; a
                  negative one subtracts. Finite, magnitude up to 2**96.
    zero points   0 to 255; of an int16 result 0.
    qmin, qmax    the clamp, within the range of dtype, which is the default.
    dtype         uint8, or int16, which is symmetric.
    out           written and returned if given: dtype of the broadcast shape, C-contiguous.

    Raises TypeError and ValueError for other dtypes, shapes or values.
    """
    left, right = as_values("add: a", a), as_values("add: b", b)
    kind = value_dtype("add", dtype)
    multipliers = (
        as_factor("add: a_multiplier", a_multiplier),
        as_factor("add: b_multiplier", b_multiplier),
    )
    zeros = as_byte("add: a_zero_point", a_zero_point), as_byte("add: b_zero_point", b_zero_point)
    clamp = as_clamp("add", zero_point, qmin, qmax, kind)
    result = broadcast_output("add", left, right, out, kind)
    return run_row(pointwise.add_row, [left, right, result], multipliers, zeros, *clamp)


def mul(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    multiplier: float,
    *,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((a - za) * (b - zb) * multiplier) + zero_point, qmin, qmax).

    multiplier is a_scale * b_scale / y_scale; the product before it is exact. Otherwise as `add`:
    squeeze-and-excitation is (N, 1, 1, C) times (N, H, W, C).
    """
    left, right = as_uint8("mul: a", a), as_uint8("mul: b", b)
    factor = as_factor("mul: multiplier", multiplier)
    zeros = as_byte("mul: a_zero_point", a_zero_point), as_byte("mul: b_zero_point", b_zero_point)
    clamp = as_clamp("mul", zero_point, qmin, qmax)
    result = broadcast_output("mul", left, right, out)
    return run_row(pointwise.mul_row, [left, right, result], factor, zeros, *clamp)


def affine(
    x: NDArray[np.uint8],
    multiplier: ArrayLike,
    shift: ArrayLike = 0.0,
    *,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((x - x_zero_point) * multiplier + shift) + zero_point, qmin, qmax).

    x           uint8, any shape (..., C).
    multiplier  a scalar or (C,), float32, finite, magnitude up to 2**96; shift likewise.

    A batch norm without a convolution, or another scale: multiplier = x_scale / y_scale. Other
    arguments and errors as in `add`.
    """
    x = as_uint8("affine: x", x)
    columns = [
        as_factors(f"affine: {name}", values, x)
        for name, values in (("multiplier", multiplier), ("shift", shift))
    ]
    zero = as_byte("affine: x_zero_point", x_zero_point)
    clamp = as_clamp("affine", zero_point, qmin, qmax)
    result = output_array("affine", out, x.shape, UINT8, x)
    return run_row(_affine_row, [x, result], *columns, zero, *clamp)


def _affine_row(
    call: Call, x: View, out: View, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    axis = (-1,)[: len(x.shape)]
    scale, offset = (np.frombuffer(v, np.float32).reshape(axis) for v in (multiplier, shift))
    pointwise.affine_row(call, x, out, scale, offset, *rest)


def table(
    x: NDArray[np.uint8], values: NDArray[np.uint8], *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """y = values[x]; or y[..., c] = values[c, x[..., c]], a table for each channel.

    x uint8, any shape (..., C); values uint8 (256,) or (C, 256). Any function of one quantized
    value is such a table. Raises TypeError and ValueError for other dtypes or shapes.
    """
    x, values = as_uint8("table: x", x), as_uint8("table: values", values)
    if values.shape not in ((256,), (*x.shape[-1:], 256)):
        raise ValueError(
            f"table: values {values.shape} for x {x.shape}; wanted (256,), or (C, 256) for the C "
            "of x's last axis"
        )
    result = output_array("table", out, x.shape, UINT8, x)
    return run_row(_table_row, [x, result], values.tobytes())


def _table_row(call: Call, x: View, out: View, values: bytes) -> None:
    tables = np.frombuffer(values, np.uint8).reshape(-1, 256)
    pointwise.table_row(call, x, out, tables[0] if len(tables) == 1 else tables)
