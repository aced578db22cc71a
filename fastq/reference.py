"""What every integer operation of fastq means, in plain NumPy: the specification, slow on purpose.

    real = scale * (q - zero_point)

Weights are int8, symmetric, per output channel; activations uint8, affine. Sums are exact in
int32. requantize = clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax); `rint` rounds
ties to even; every float operation is a float32 operation. The kernels give the same bits, on
every instruction set and for every number of threads: `ops` has the same functions, fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastq.qparams import (
    HISTOGRAM_KEYS,
    Dequant,
    Epilogue,
    QParams,
    Requant,
    quantized_dtype,
)
from fastq.weights import Conv2dWeight, LinearWeight

F32 = np.float32


def _along(value: ArrayLike, ndim: int, axis: int | None) -> NDArray[Any]:
    """A scalar, or (n,) shaped to broadcast along `axis` of an array with ndim axes."""
    array = np.asarray(value)
    if axis is None or array.ndim == 0:
        return array
    shape = [1] * ndim
    shape[axis] = -1
    return array.reshape(shape)


def quantize(
    x: NDArray[np.float32],
    quantize_factor: float | None = None,
    *,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike = 0,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """float32 -> uint8 / int8 / int32: clip(rint(x / scale) + zero_point), or rint(x * factor).

    NaN becomes zero_point (real 0); infinities saturate. Source: ONNX QuantizeLinear.
    """
    x = np.asarray(x, F32)
    affine = quantize_factor is None
    dtype = quantized_dtype(dtype if dtype is not None else np.uint8 if affine else np.int8)
    info = np.iinfo(dtype)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if affine:
            steps = np.rint(x / _along(np.asarray(scale, F32), x.ndim, axis))
        else:
            steps = np.rint(x * F32(quantize_factor))
    # float64 holds every int32 and the sum exactly
    q = np.nan_to_num(steps.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    q = np.clip(q + _along(zero_point, x.ndim, axis), info.min, info.max).astype(dtype)
    return _into(out, q)


def dequantize(
    q: NDArray[Any],
    scale: ArrayLike,
    zero_point: ArrayLike = 0,
    *,
    axis: int | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """uint8 / int8 / int32 -> float32: float32(q - zero_point) * scale (ONNX DequantizeLinear)."""
    steps = q.astype(np.int64) - _along(zero_point, q.ndim, axis).astype(np.int64)
    with np.errstate(over="ignore"):
        return _into(out, steps.astype(F32) * _along(np.asarray(scale, F32), q.ndim, axis))


def requantize(
    acc: NDArray[np.int32],
    multiplier: ArrayLike,
    zero_point: int = 0,
    *,
    axis: int | None = None,
    dtype: DTypeLike = np.uint8,
    qmin: int | None = None,
    qmax: int | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """int32 -> uint8 / int8: clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax)."""
    info = np.iinfo(quantized_dtype(dtype))
    with np.errstate(over="ignore"):
        steps = np.rint(acc.astype(F32) * _along(np.asarray(multiplier, F32), acc.ndim, axis))
    q = steps.astype(np.float64) + zero_point
    q = np.clip(q, info.min if qmin is None else qmin, info.max if qmax is None else qmax)
    return _into(out, q.astype(dtype))


def dynamic_qparams(x: NDArray[np.float32], *, per_row: bool = True) -> tuple[Any, Any]:
    """The uint8 (scale, zero_point) of x's own range, one per row of x (M, K) or one for all.

    float32 scale and int32 zero_point, (M,) or scalar. NaN and infinities do not count.
    Source: ONNX DynamicQuantizeLinear.
    """
    x = np.asarray(x, F32)
    rows = x.reshape(len(x), int(np.prod(x.shape[1:]))) if per_row else x.reshape(1, x.size)
    finite = np.where(np.isfinite(rows), rows, F32(0))
    lo = finite.min(axis=1, initial=0)
    hi = finite.max(axis=1, initial=0)
    tiny, huge = np.finfo(F32).tiny, np.finfo(F32).max
    with np.errstate(over="ignore"):
        width = hi - lo
        scale = np.maximum(np.minimum(width, huge) / F32(255), tiny)
        scale = np.where(width == 0, F32(1), scale).astype(F32)
        zero_point = np.clip(np.rint(-lo / scale), 0, 255).astype(np.int32)
    return (scale, zero_point) if per_row else (scale[0], zero_point[0])


def histogram(x: NDArray[np.float32], bins: NDArray[np.int64], ends: NDArray[np.float32]) -> None:
    """Adds the values of x to a histogram whose bins are the upper 16 of a float32's 32 bits.

    bins  int64 (lanes, 65536, 2): how many values, and the sum of the integers that their lower
          16 bits are. Lanes add up; this function adds to the first.
    ends  float32 (lanes, 2): the smallest and the largest finite value, and 0.
    """
    x = np.asarray(x, F32).ravel()
    bits = x.view(np.uint32)
    key, rest = bits >> 16, bits & 0xFFFF
    bins[0, :, 0] += np.bincount(key, minlength=HISTOGRAM_KEYS)
    bins[0, :, 1] += np.bincount(key, rest, HISTOGRAM_KEYS).astype(np.int64)  # exact below 2**53
    finite = np.where(np.isfinite(x), x, F32(0))
    ends[0, 0] = finite.min(initial=ends[0, 0])
    ends[0, 1] = finite.max(initial=ends[0, 1])


def linear(
    x: NDArray[np.uint8],
    weight: LinearWeight,
    epilogue: Epilogue = None,
    *,
    x_zero_point: ArrayLike = 0,
    add: NDArray[np.uint8] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """acc[m, n] = sum_k (x[m, k] - x_zero_point[m]) * weight[n, k], then the epilogue.

    x (M, K) uint8; weight (N, K) int8; result (M, N): int32 without an epilogue, uint8 with a
    Requant, float32 with a Dequant. `add`, uint8 (M, N), is for a Requant with an add_multiplier.
    """
    steps = x.astype(np.float64) - np.reshape(x_zero_point, (-1, 1))
    acc = steps @ weight.data.T.astype(np.float64)  # exact: |acc| < 2**31 < 2**53
    return _into(out, _finish(acc.astype(np.int32), epilogue, add))


def conv2d(
    x: NDArray[np.uint8],
    weight: Conv2dWeight,
    epilogue: Epilogue = None,
    *,
    x_zero_point: int = 0,
    add: NDArray[np.uint8] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """2-D cross-correlation of x (B, H, W, C) uint8; result (B, OH, OW, N) as in `linear`.

    acc[b, i, j, n] = sum over (kh, kw, c) of w[n, c, kh, kw]
                      * (x[b, i*sh + kh*dh - top, j*sw + kw*dw - left, c] - x_zero_point)
    over the channels c of n's group; outside of x, x equals x_zero_point (real 0).
    """
    batch, h, w, _ = x.shape
    oh, ow = weight.output_size(h, w)
    (sh, sw), (dh, dw), groups = weight.stride, weight.dilation, weight.groups
    steps = np.pad(x.astype(np.float64) - x_zero_point, ((0, 0), *weight.padding, (0, 0)))
    n, c_group, kh, kw = weight.data.shape
    grouped = steps.reshape(*steps.shape[:3], groups, c_group)
    filters = weight.data.reshape(groups, n // groups, c_group, kh, kw).astype(np.float64)
    acc = np.zeros((batch, oh, ow, groups, n // groups))
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dh, i * dh + sh * (oh - 1) + 1, sh)
            cols = slice(j * dw, j * dw + sw * (ow - 1) + 1, sw)
            tap = filters[..., i, j].transpose(0, 2, 1)  # (groups, C/groups, N/groups)
            acc += np.matmul(grouped[:, rows, cols, :, None, :], tap)[..., 0, :]
    return _into(out, _finish(acc.reshape(batch, oh, ow, n).astype(np.int32), epilogue, add))


def linear_float(
    x: NDArray[np.float32],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    x_qparams: QParams | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32 (M, K) -> float32 (M, N): quantize x, multiply in integers, dequantize.

    x_qparams None quantizes dynamically, each row of x by its own range. `epilogue.x_scale` is
    replaced by the scale of x.
    """
    if x_qparams is None:
        scale, zero_point = dynamic_qparams(x)
    else:
        scale, zero_point = x_qparams.scale, x_qparams.zero_point
    q = quantize(x, scale=scale, zero_point=zero_point, axis=None if x_qparams else 0)
    return linear(q, weight, _with_x_scale(epilogue, scale), x_zero_point=zero_point, out=out)


def conv2d_float(
    x: NDArray[np.float32],
    weight: Conv2dWeight,
    epilogue: Dequant,
    *,
    x_qparams: QParams | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32 (B, H, W, C) -> float32 (B, OH, OW, N): quantize x, convolve in integers, dequantize.

    x_qparams None quantizes dynamically, all of x by its range. `epilogue.x_scale` is replaced
    by the scale of x.
    """
    if x_qparams is None:
        scale, zero_point = dynamic_qparams(x, per_row=False)
    else:
        scale, zero_point = x_qparams.scale, x_qparams.zero_point
    q = quantize(x, scale=scale, zero_point=zero_point)
    epilogue = _with_x_scale(epilogue, scale)
    return conv2d(q, weight, epilogue, x_zero_point=int(zero_point), out=out)


def _with_x_scale(epilogue: Dequant, x_scale: Any) -> Dequant:
    return Dequant(epilogue.scale, x_scale, epilogue.bias, epilogue.fmin, epilogue.fmax)


def _finish(
    acc: NDArray[np.int32], epilogue: Epilogue, add: NDArray[np.uint8] | None = None
) -> NDArray[Any]:
    """acc (..., N) int32 through the epilogue; an x_scale (M,) runs along the rows (M, N)."""
    if epilogue is None:
        return acc
    if isinstance(epilogue, Requant):
        if epilogue.bias is not None:
            acc = acc + epilogue.bias
        with np.errstate(over="ignore"):
            y = acc.astype(F32) * _along(epilogue.multiplier, acc.ndim, -1)
        if add is not None:
            steps = add.astype(np.int32) - epilogue.add_zero_point
            y = y + steps.astype(F32) * F32(epilogue.add_multiplier)
        return to_uint8(y, epilogue.zero_point, epilogue.qmin, epilogue.qmax)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = _along(epilogue.x_scale, acc.ndim, 0) * epilogue.scale
        y = acc.astype(F32) * scale
        if epilogue.bias is not None:
            y = y + epilogue.bias
    return np.clip(y, F32(epilogue.fmin), F32(epilogue.fmax))


def to_uint8(
    y: NDArray[np.float32], zero_point: int, qmin: int = 0, qmax: int = 255
) -> NDArray[np.uint8]:
    """clip(rint(y) + zero_point, qmin, qmax): the last step of every requantization."""
    return np.clip(np.rint(y).astype(np.float64) + zero_point, qmin, qmax).astype(np.uint8)


def _into(out: NDArray[Any] | None, result: NDArray[Any]) -> NDArray[Any]:
    if out is None:
        return result
    out[...] = result
    return out
