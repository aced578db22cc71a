"""Softmax; layer, RMS, group and global response norms."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastq.arguments import EPSILON, FACTOR
from fastq.kernels import norms
from fastq.kernels.call import Call, View
from fastq.kernels.group_norm import global_response_norm_row, group_norm_row
from fastq.ops.checks import (
    UINT8,
    as_byte,
    as_clamp,
    as_factors,
    as_lines,
    as_uint8,
    as_values,
    check_argument,
    output_array,
)
from fastq.ops.rows import run_row
from fastq.qparams import MAX_FEATURES, MAX_WIDE_FEATURES, check_scale


def softmax(
    x: NDArray[np.uint8],
    scale: float,
    mask: NDArray[np.uint8] | NDArray[np.bool_] | None = None,
    *,
    uniform: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """softmax of scale * x over the last axis; the result has scale 1 / 255 and zero_point 0.

    x        uint8, any shape (..., N), N > 0; its zero point cancels.
    scale    finite, > 0, float32.
    mask     uint8 or bool, its last axis N, the others broadcast to x's: where it is 0, x does not
             take part and the result is 0.
    uniform  whether a line whose mask is 0 everywhere has equal weights, and not none.

    The sum of the exponentials is exact, see reference.softmax. Raises TypeError and ValueError for
    other dtypes, shapes or values.
    """
    return _softmax("softmax", norms.softmax_row, norms.masked_softmax_row,
                    x, scale, mask, uniform, out)  # fmt: skip


def softmax_weights(
    x: NDArray[np.uint8],
    scale: float,
    mask: NDArray[np.uint8] | NDArray[np.bool_] | None = None,
    *,
    uniform: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """softmax of scale * x over the last axis, without the division by the sum of each line: the
    largest of a line is 255, see reference.softmax_weights. matmul(..., mean=True) divides.

    A line whose mask is 0 everywhere is 0, or with `uniform` 255 everywhere. Other arguments and
    errors as in `softmax`.
    """
    return _softmax("softmax_weights", norms.softmax_weights_row, norms.masked_softmax_weights_row,
                    x, scale, mask, uniform, out)  # fmt: skip


def _softmax(
    name: str, row: Any, masked_row: Any, x: Any, scale: Any, mask: Any, uniform: bool, out: Any
) -> NDArray[np.uint8]:
    x = as_lines(name, x)
    steps = check_scale(f"{name}: scale", scale)
    if steps.ndim:
        raise ValueError(f"{name}: scale {steps.shape}; wanted one number")
    result = output_array(name, out, x.shape, UINT8, x)
    if mask is None:
        return run_row(row, [x, result], float(steps))
    seen = _mask(name, mask, x)
    output_array(name, result, x.shape, UINT8, seen)
    return run_row(masked_row, [x, seen, result], float(steps), bool(uniform))


def _mask(name: str, mask: Any, x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A softmax's mask as uint8, of x's number of axes."""
    if not isinstance(mask, np.ndarray) or mask.dtype not in (np.bool_, np.uint8):
        given = f"{mask.dtype} array" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"{name}: mask is a {given}; wanted a bool or uint8 array")
    missing = x.ndim - mask.ndim
    sizes = zip(mask.shape, x.shape[max(missing, 0) :], strict=False)
    if missing < 0 or mask.shape[-1:] != x.shape[-1:] or any(m not in (1, n) for m, n in sizes):
        raise ValueError(
            f"{name}: mask {mask.shape} for x {x.shape}; wanted (..., {x.shape[-1]}), the other "
            "axes as x's or 1"
        )
    same = mask.astype(np.uint8, copy=False).reshape((1,) * missing + mask.shape)
    return as_uint8(f"{name}: mask", same)


def layer_norm(
    x: NDArray[Any],
    multiplier: ArrayLike,
    shift: ArrayLike,
    epsilon: float,
    *,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((x - mean) / sqrt(var + epsilon) * multiplier + shift) + zero_point, ...).

    Mean and variance, exact, over the last axis of x (..., N), uint8 with 0 < N <= 2**19 or int16
    with N <= 2**14; x's zero point cancels. With torch's eps, weight and bias: epsilon =
    eps / x_scale**2 > 0, multiplier = weight / y_scale and shift = bias / y_scale, scalars or (N,)
    as in `affine`. The order of the float operations is that of reference.layer_norm. Errors as in
    `affine`.
    """
    x = _normed("layer_norm", x)
    columns, epsilon, clamp = _norm(
        "layer_norm", x, multiplier, shift, epsilon, zero_point, qmin, qmax
    )
    result = output_array("layer_norm", out, x.shape, UINT8, x)
    return run_row(_layer_norm_row, [x, result], *columns, epsilon, *clamp)


def _layer_norm_row(
    call: Call, x: View, out: View, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    scale, offset = (np.frombuffer(values, np.float32) for values in (multiplier, shift))
    norms.layer_norm_row(call, x, out, scale, offset, *rest)


def rms_norm(
    x: NDArray[Any],
    multiplier: ArrayLike,
    epsilon: float,
    *,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint(x / sqrt(mean(x**2) + epsilon) * multiplier) + zero_point, ...).

    The mean, exact, over the last axis of x (..., N) as in `layer_norm`; x_zero_point is that of
    uint8. With torch's eps and weight: epsilon = eps / x_scale**2 > 0, multiplier =
    weight / y_scale. Errors as in `layer_norm`. Source: B. Zhang and R. Sennrich, Root Mean Square
    Layer Normalization, 2019, arXiv:1910.07467.
    """
    x = _normed("rms_norm", x)
    zero = as_byte("rms_norm: x_zero_point", x_zero_point)
    if zero and x.dtype != UINT8:
        raise ValueError(f"rms_norm: x_zero_point={x_zero_point} of int16; wanted 0")
    columns, epsilon, clamp = _norm("rms_norm", x, multiplier, 0.0, epsilon, zero_point, qmin, qmax)
    result = output_array("rms_norm", out, x.shape, UINT8, x)
    return run_row(_rms_norm_row, [x, result], columns[0], epsilon, zero, *clamp)


def _rms_norm_row(call: Call, x: View, out: View, multiplier: bytes, *rest: Any) -> None:
    norms.rms_norm_row(call, x, out, np.frombuffer(multiplier, np.float32), *rest)


def _normed(name: str, x: Any) -> NDArray[Any]:
    """x (..., N) of as many features as the sums of a norm are exact for."""
    x = as_lines(name, x, as_values)
    most = MAX_FEATURES if x.dtype == UINT8 else MAX_WIDE_FEATURES
    if x.shape[-1] > most:
        raise ValueError(f"{name}: x {x.shape} {x.dtype}; exact up to {most} features")
    return x


def group_norm(
    x: NDArray[Any],
    groups: int,
    multiplier: ArrayLike,
    shift: ArrayLike,
    epsilon: float,
    *,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((x - mean) / sqrt(var + epsilon) * multiplier + shift) + zero_point, ...).

    Mean and variance over all pixels of x (B, ..., C), uint8 or int16, and the C / groups channels
    of each group; groups=C is torch's instance norm. The others, scalars or (C,), and the errors
    are as in `layer_norm`; the order of the float operations is that of reference.group_norm.
    """
    x = _images("group_norm", x)
    if type(groups) is not int or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"group_norm: groups={groups!r}; wanted a divisor of {x.shape[-1]}")
    columns, epsilon, clamp = _norm(
        "group_norm", x, multiplier, shift, epsilon, zero_point, qmin, qmax
    )
    result = output_array("group_norm", out, x.shape, UINT8, x)
    return run_row(_group_norm_row, [x, result], groups, *columns, epsilon, *clamp)


def global_response_norm(
    x: NDArray[Any],
    multiplier: ArrayLike,
    shift: ArrayLike,
    epsilon: float,
    *,
    residual: float = 0.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint(x * (multiplier * |x| / (mean(|x|) + epsilon) + residual) + shift) + ..., ...).

    x (B, ..., C), uint8 or int16, less x_zero_point (0..255); |x| of each channel is the root of
    the sum of its pixels' squares, and their mean that of the C channels. residual: a finite float
    in steps of y, 1 in ConvNeXt V2's norm. The others, scalars or (C,), and the errors are as in
    `layer_norm`; the order of the float operations is that of reference.global_response_norm.
    """
    name = "global_response_norm"
    x = _images(name, x)
    columns, epsilon, clamp = _norm(name, x, multiplier, shift, epsilon, zero_point, qmin, qmax)
    if isinstance(residual, int | np.integer):
        residual = float(residual)
    check_argument(f"{name}: residual", residual, FACTOR)
    center = as_byte(f"{name}: x_zero_point", x_zero_point)
    result = output_array(name, out, x.shape, UINT8, x)
    numbers = epsilon, float(residual), center
    return run_row(_global_response_norm_row, [x, result], *columns, *numbers, *clamp)


def _images(name: str, x: Any) -> NDArray[Any]:
    """x (B, ..., C) of pixels and channels."""
    x = as_values(f"{name}: x", x)
    if x.ndim < 2 or (not x[:1].size and x.shape[0]):
        raise ValueError(f"{name}: x {x.shape}; wanted (B, ..., C), all but B over 0")
    return x


def _norm(
    name: str, x: NDArray[Any], multiplier: Any, shift: Any, epsilon: Any, *clamp: Any
) -> tuple[list[bytes], float, tuple[int, int, int]]:
    """A norm's multiplier and shift, its epsilon and its clamp, checked."""
    columns = [
        as_factors(f"{name}: {what}", values, x)
        for what, values in (("multiplier", multiplier), ("shift", shift))
    ]
    if isinstance(epsilon, int | np.integer):
        epsilon = float(epsilon)
    check_argument(f"{name}: epsilon", epsilon, EPSILON)
    return columns, float(epsilon), as_clamp(name, *clamp)


def _group_norm_row(
    call: Call, x: View, out: View, groups: int, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    scale, offset = (np.frombuffer(values, np.float32) for values in (multiplier, shift))
    group_norm_row(call, x, out, groups, scale, offset, *rest)


def _global_response_norm_row(
    call: Call, x: View, out: View, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    scale, offset = (np.frombuffer(values, np.float32) for values in (multiplier, shift))
    global_response_norm_row(call, x, out, scale, offset, *rest)
