"""What every integer operation of fastq means, in plain NumPy: the specification, slow on purpose.

    real = scale * (q - zero_point)

Weights are int8, symmetric, per output channel; activations uint8, affine, and what layer norms
take may be int16, symmetric. Sums are exact in int32. requantize =
clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax); `rint` rounds ties to even; every
float operation is a float32 operation. The kernels give the same bits, on every instruction set and
for every number of threads: `ops` has the same functions, fast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastq.qparams import (
    GATES,
    HISTOGRAM_KEYS,
    MAX_FACTOR,
    TANH_BELOW,
    TANH_LIMIT,
    TANH_OVER,
    Dequant,
    Epilogue,
    QParams,
    Requant,
    clamp_of,
    exp_table,
    quantized_dtype,
    value_dtype,
    weight_table,
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
    """float32 -> an integer dtype: clip(rint(x / scale) + zero_point), or rint(x * factor).

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


def grid(
    x: NDArray[np.float32],
    factor: NDArray[np.float32],
    shift: NDArray[np.float32],
    *,
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """float32 (B, H, W, C) -> uint8: clip(rint(x * factor + shift), 0, 255), a grid per channel.

    factor and shift (C,) float32. The image is padded before, with real 0, which NaN is as well.
    """
    x = np.pad(np.where(np.isnan(x), F32(0), x), ((0, 0), *padding, (0, 0)))
    with np.errstate(over="ignore"):
        return _into(out, np.clip(np.rint(x * factor + shift), 0, 255).astype(np.uint8))


def dequantize(
    q: NDArray[Any],
    scale: ArrayLike,
    zero_point: ArrayLike = 0,
    *,
    axis: int | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """An integer dtype -> float32: float32(q - zero_point) * scale (ONNX DequantizeLinear)."""
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
    """int32 -> another dtype: clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax)."""
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
    add: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """acc[m, n] = sum_k (x[m, k] - x_zero_point[m]) * weight[n, k], then the epilogue.

    x (M, K) uint8; weight (N, K) int8; result (M, N): int32 without an epilogue, a Requant's dtype,
    float32 with a Dequant. `add`, uint8 or int16 (M, N), is for a Requant with an add_multiplier.
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
    add: NDArray[Any] | None = None,
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
    """y = requantize of (a - a_zero_point) * a_multiplier + (b - b_zero_point) * b_multiplier.

    a and b uint8 or int16, of shapes that broadcast; a_multiplier is a_scale / y_scale, negative to
    subtract. dtype uint8, or int16 with zero_point 0; the clamp is its range by default.
    """
    y = _steps(a, a_zero_point) * F32(a_multiplier) + _steps(b, b_zero_point) * F32(b_multiplier)
    kind = value_dtype("add", dtype)
    low, high = clamp_of("add", kind, qmin, qmax, zero_point)
    return _into(out, _rounded(y, zero_point, low, high).astype(kind))


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
    """y = requantize of (a - a_zero_point) * (b - b_zero_point) * multiplier; the first is exact.

    a and b uint8 of shapes that broadcast; multiplier is a_scale * b_scale / y_scale.
    """
    y = _steps(a, a_zero_point) * _steps(b, b_zero_point) * F32(multiplier)
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


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
    """y = requantize of (x - x_zero_point) * multiplier + shift, scalars or (C,) of the last axis.

    A batch norm: multiplier = weight / sqrt(var + eps) * x_scale / y_scale, shift likewise.
    """
    y = _steps(x, x_zero_point) * np.asarray(multiplier, F32) + np.asarray(shift, F32)
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


def table(
    x: NDArray[np.uint8], values: NDArray[np.uint8], *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """y = values[x]; or y[..., c] = values[c, x[..., c]] for values (C, 256). Any function of x."""
    if values.ndim == 1:
        return _into(out, values[x])
    return _into(out, values[np.arange(len(values)), x])


def max_pool2d(
    x: NDArray[np.uint8],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The largest of each window of x (B, H, W, C), as torch's; each window meets x."""
    windows = [
        _windows(size, k, s, p, d, ceil_mode)
        for size, k, s, p, d in zip(
            x.shape[1:3], *_pool_parameters(kernel_size, stride, padding, dilation), strict=True
        )
    ]
    return _into(out, _pool(x, windows[0], windows[1], _largest))


def avg_pool2d(
    x: NDArray[np.uint8],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = requantize of the sum over each window of (x - x_zero_point), times multiplier / count.

    x (B, H, W, C); windows and count as torch's; multiplier is x_scale / y_scale. The quotient
    is one float32 division.
    """
    parameters = _pool_parameters(kernel_size, stride, padding, 1)
    windows, sizes = [], []
    for size, k, s, p, d in zip(x.shape[1:3], *parameters, strict=True):
        along = _windows(size, k, s, p, d, ceil_mode)
        padded = [min(i * s - p + k, size + p) - (i * s - p) for i in range(len(along))]
        windows.append(along)
        sizes.append(padded if count_include_pad else [len(w) for w in along])
    counts = np.multiply.outer(*sizes) if divisor_override is None else divisor_override
    counts = np.broadcast_to(counts, (len(windows[0]), len(windows[1])))
    sums = _pool(_steps(x, x_zero_point).astype(np.int64), windows[0], windows[1], _total)
    y = sums.astype(F32) * (F32(multiplier) / counts.astype(F32))[..., None]
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


def adaptive_max_pool2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The largest of each window of x (B, H, W, C), as torch's.

    Window i of an axis is floor(i * H / OH) to ceil((i + 1) * H / OH).
    """
    rows, columns = (
        _adaptive_windows(size, n) for size, n in zip(x.shape[1:3], _pair(output_size), strict=True)
    )
    return _into(out, _pool(x, rows, columns, _largest))


def adaptive_avg_pool2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    *,
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The mean of each window, as in `avg_pool2d`; windows as in `adaptive_max_pool2d`.

    output_size 1 is the mean over H and W.
    """
    rows, columns = (
        _adaptive_windows(size, n) for size, n in zip(x.shape[1:3], _pair(output_size), strict=True)
    )
    counts = np.multiply.outer([len(w) for w in rows], [len(w) for w in columns])
    sums = _pool(_steps(x, x_zero_point).astype(np.int64), rows, columns, _total)
    y = sums.astype(F32) * (F32(multiplier) / counts.astype(F32))[..., None]
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


def upsample_nearest2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    scale_factor: tuple[float, float] | None = None,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """x (B, H, W, C) at min(floor(i * scale), H - 1) of each axis, as torch's mode "nearest".

    scale is 1 / scale_factor if given, else H / OH, in float32. Where OH is H or 2 * H it is 1 or
    1/2, whatever scale_factor says: so it is in torch.
    """
    index = []
    for axis, n in enumerate(_pair(output_size)):
        size = x.shape[1 + axis]
        step = F32(1 / scale_factor[axis]) if scale_factor else F32(size) / F32(n)
        if n in (size, 2 * size):
            step = F32(size / n)
        index.append([int(min(np.floor(F32(i) * step), size - 1)) for i in range(n)])
    return _into(out, x[:, index[0]][:, :, index[1]])


def upsample_bilinear2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    align_corners: bool = False,
    scale_factor: tuple[float, float] | None = None,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """x (B, H, W, C) between its pixels, as torch's mode "bilinear"; the quantization stays.

    Position i of an axis is at r = i * (H - 1) / (OH - 1) with align_corners, else at
    max((i + 0.5) * scale - 0.5, 0) with scale 1 / scale_factor if given, else H / OH; at i if OH
    is H. All in float32. With h = floor(r), f = r - h and g = 1 - f:
    y = rint(((x00 * gw + x01 * fw) * gh) + ((x10 * gw + x11 * fw) * fh)).
    """
    first, second, share = [], [], []
    for axis, n in enumerate(_pair(output_size)):
        size = x.shape[1 + axis]
        i = np.arange(n).astype(F32)
        if n == size:
            where = i
        elif align_corners:
            where = i * (F32(size - 1) / F32(n - 1) if n > 1 else F32(0))
        else:
            step = F32(1 / scale_factor[axis]) if scale_factor else F32(size) / F32(n)
            where = np.maximum((i + F32(0.5)) * step - F32(0.5), F32(0))
        low = np.minimum(np.floor(where), size - 1).astype(np.int64)
        first.append(low)
        second.append(np.minimum(low + 1, size - 1))
        share.append(np.clip(where - low.astype(F32), F32(0), F32(1)))
    real, fh, fw = x.astype(F32), share[0][:, None, None], share[1][:, None]

    def across(line: NDArray[np.float32]) -> NDArray[np.float32]:
        return line[:, :, first[1]] * (F32(1) - fw) + line[:, :, second[1]] * fw

    y = across(real[:, first[0]]) * (F32(1) - fh) + across(real[:, second[0]]) * fh
    return _into(out, _to_uint8(y, 0))


def softmax(
    x: NDArray[np.uint8],
    scale: float,
    mask: NDArray[np.uint8] | None = None,
    *,
    uniform: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """softmax of scale * x over the last axis; the result has scale 1 / 255 and zero_point 0.

    e = exp_table(scale)[max(x) - x], y = rint(float32(e) * (255 / float32(sum(e)))), the sum
    exact. 1 / 255, unlike 1 / 256, holds a probability of 1 exactly.

    mask     broadcasts to x; where it is 0, x does not take part and y is 0: attention's mask.
    uniform  what is left of a line whose mask is 0 everywhere: equal weights, as of scores that
             were all replaced by the same number, or else none.
    """
    if x.size == 0:
        return _into(out, x.copy())
    _, e = _below_peak(x, mask, exp_table(scale))
    total = e.sum(axis=-1, keepdims=True, dtype=np.int64)
    if uniform:
        e = np.where(total == 0, 1, e)
        total = np.where(total == 0, x.shape[-1], total)
    total = np.maximum(total, 1)
    return _into(out, _to_uint8(e.astype(F32) * (F32(255) / total.astype(F32)), 0))


def softmax_weights(
    x: NDArray[np.uint8],
    scale: float,
    mask: NDArray[np.uint8] | None = None,
    *,
    uniform: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """softmax of scale * x over the last axis, without the division by the sum of each line.

    y = weight_table(scale)[max(x) - x]: the largest of a line is 255, however many share its sum.
    mask as for `softmax`; a line whose mask is 0 everywhere is 0, or with `uniform` 255 everywhere.
    `matmul` with `mean` is a mean with these weights.
    """
    if x.size == 0:
        return _into(out, x.copy())
    taken, y = _below_peak(x, mask, weight_table(scale))
    if uniform:
        y = np.where(taken.any(axis=-1, keepdims=True), y, 255)
    return _into(out, y.astype(np.uint8))


def _below_peak(x: NDArray[np.uint8], mask: Any, table: Any) -> tuple[Any, Any]:
    """Where a mask takes x, and there table[the largest taken of the line - x], elsewhere 0."""
    taken = np.broadcast_to(True if mask is None else mask != 0, x.shape)
    peak = np.where(taken, x, 0).max(axis=-1, keepdims=True)
    return taken, np.where(taken, table[peak - np.minimum(x, peak)], 0)


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
    """y = requantize of (x - mean) / sqrt(var + epsilon) * multiplier + shift, over the last axis.

    In steps of x, uint8 or int16 (its zero point cancels): epsilon = eps / x_scale**2, multiplier =
    weight / y_scale, shift = bias / y_scale. With N elements, their sum and their squares' sum,
    exact: d = N * x - sum, r = float32(1 / sqrt(N * squares - sum**2 + N**2 * epsilon)) in float64,
    y = ((float32(d) * r) * multiplier) + shift.
    """
    n = x.shape[-1]
    q = x.astype(np.int64)
    total = q.sum(axis=-1, keepdims=True)
    spread = n * (q * q).sum(axis=-1, keepdims=True) - total * total
    factor = (1.0 / np.sqrt(spread.astype(np.float64) + float(n) * float(n) * epsilon)).astype(F32)
    y = (n * q - total).astype(F32) * factor * np.asarray(multiplier, F32) + np.asarray(shift, F32)
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


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
    """y = requantize of x / sqrt(mean(x**2) + epsilon) * multiplier, over the last axis.

    As `layer_norm`, of x - x_zero_point and without its mean: d = N * (x - x_zero_point),
    r = float32(1 / sqrt(N * squares + N**2 * epsilon)), y = (float32(d) * r) * multiplier.
    """
    n = x.shape[-1]
    q = x.astype(np.int64) - x_zero_point
    spread = n * (q * q).sum(axis=-1, keepdims=True)
    factor = (1.0 / np.sqrt(spread.astype(np.float64) + float(n) * float(n) * epsilon)).astype(F32)
    y = (n * q).astype(F32) * factor * np.asarray(multiplier, F32)
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


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
    """y = requantize of (x - mean) / sqrt(var + epsilon) * multiplier + shift, of each group.

    x (B, ..., C), uint8 or int16; mean and variance over the pixels and channels of each of the
    groups, of N values. All in steps of x, as in `layer_norm`, and in float64: r = 1 / sqrt(N *
    squares - sum**2 + N**2 * epsilon), factor = r * multiplier, then y = x * float32(N * factor) +
    float32(shift - sum * factor) in float32.
    """
    images, channels = x.shape[0], x.shape[-1]
    pixels = int(np.prod(x.shape[1:-1]))
    q = x.astype(np.int64).reshape(images, pixels, groups, channels // groups)
    n = float(q.shape[1] * q.shape[3])
    total = q.sum(axis=(1, 3), keepdims=True).astype(np.float64)
    spread = n * (q * q).sum(axis=(1, 3), keepdims=True).astype(np.float64) - total * total
    root = 1.0 / np.sqrt(np.maximum(spread, 0.0) + n * n * epsilon)
    columns = (np.broadcast_to(np.asarray(v, F32), (channels,)) for v in (multiplier, shift))
    weight, bias = (v.astype(np.float64).reshape(groups, -1) for v in columns)
    factor = root * weight
    with np.errstate(over="ignore"):
        a = np.clip(n * factor, -MAX_FACTOR, MAX_FACTOR).astype(F32)
        b = (bias - total * factor).astype(F32)
        y = (q.astype(F32) * a + b).reshape(x.shape)
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


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
    """y = requantize of x * (multiplier * |x| / (mean(|x|) + epsilon) + residual) + shift.

    x (B, ..., C), uint8 or int16, less x_zero_point; |x| of each channel, the root of the exact sum
    of its pixels' squares; the mean over the channels, summed from the first to the last. In steps
    of x: epsilon = eps / x_scale, multiplier = weight * x_scale / y_scale, residual likewise, shift
    = bias / y_scale. In float64: factor = multiplier * (|x| / (mean + epsilon)) + residual, then
    y = x * float32(factor) + shift in float32. Woo et al., "ConvNeXt V2" (2023), algorithm 1.
    """
    q = x.astype(np.int64) - x_zero_point
    images, channels = x.shape[0], x.shape[-1]
    pixels = q.reshape(images, int(np.prod(x.shape[1:-1])), channels)
    sizes = np.sqrt((pixels * pixels).sum(axis=1, keepdims=True).astype(np.float64))
    mean = np.add.accumulate(sizes, axis=-1)[..., -1:] / channels
    weight, bias = (np.broadcast_to(np.asarray(v, F32), (channels,)) for v in (multiplier, shift))
    factor = weight.astype(np.float64) * (sizes / (mean + epsilon)) + residual
    with np.errstate(over="ignore"):
        a = np.clip(factor, -MAX_FACTOR, MAX_FACTOR).astype(F32)
        y = (pixels.astype(F32) * a + bias).reshape(x.shape)
    return _into(out, _to_uint8(y, zero_point, qmin, qmax))


def matmul(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    multiplier: float,
    *,
    a_zero_point: int = 0,
    transpose_b: bool = False,
    mean: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    dtype: DTypeLike = np.uint8,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """y = requantize of sum_k (a[..., m, k] - a_zero_point) * (b[..., k, n] - 128) * multiplier.

    a (..., M, K) uint8; b (..., K, N), or (..., N, K) with transpose_b, uint8 with zero_point 128:
    symmetric. Leading axes broadcast. multiplier is a_scale * b_scale / y_scale.

    mean  divides by the sum of a's row, which has zero point 0: a mean of b's rows with a's as
          weights. The factor is multiplier * (1 / float32(sum)), in float32, and multiplier
          b_scale / y_scale. A row of zeros gives 0.
    dtype uint8, or float32: the product alone, of y_scale 1. Then zero_point and clamp say nothing.
    """
    right = _steps(b.swapaxes(-1, -2) if transpose_b else b, 128).astype(np.float64)
    acc = _steps(a, a_zero_point).astype(np.float64) @ right  # exact
    factor: Any = F32(multiplier)
    if mean:
        total = np.maximum(a.sum(axis=-1, keepdims=True, dtype=np.int64), 1)
        factor = F32(1) / total.astype(F32) * factor
    real = acc.astype(F32) * factor
    if np.dtype(dtype) == F32:
        return _into(out, real + F32(0))  # no zero has a sign
    return _into(out, _to_uint8(real, zero_point, qmin, qmax))


def recurrent(
    x: NDArray[np.int16],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    cell: str,
    x_scale: float,
    multiplier: float,
    axis: int = 1,
    reverse: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The hidden states of a recurrent layer, whose products with its inputs are x.

    x       int16, three axes, one of which, `axis` 0 or 1, are the steps; the last one holds the
            gates of `cell` one after the other, as torch has them: lstm i f g o, gru r z n, tanh,
            relu. Its zero point is 0.
    result  uint8 (.., .., H), in order of x, also where `reverse` begins at the last step.

    At each step hx = linear of the last result, of real zeros at first, with the epilogue; its
    weight is (gates * H, H), its x_scale the result's scale. The gates are float32(x) * x_scale +
    hx, and with c = h = 0 at first

        lstm  c = sigmoid(f) * c + sigmoid(i) * tanh(g);  h = sigmoid(o) * tanh(c)
        gru   m = tanh(xn + sigmoid(r) * hn);  h = m + sigmoid(z) * (h - m)
        tanh, relu  of x * x_scale + hx

        result = clip(rint(h * multiplier) + zero_point, qmin, qmax)

    each operation in float32, also h's and c's. Source: torch.nn.LSTM, GRU and RNN; S. Hochreiter
    and J. Schmidhuber, 1997; K. Cho et al., 2014, arXiv:1406.1078.
    """
    steps = np.moveaxis(x, axis, 0)
    rows, h_size = steps.shape[1], weight.k
    scale, factor = F32(x_scale), F32(multiplier)
    state = np.zeros((rows, h_size), F32)
    hidden = np.full((rows, h_size), zero_point, np.uint8)
    result = np.empty((*x.shape[:2], h_size), np.uint8)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        hx = linear(hidden, weight, epilogue, x_zero_point=zero_point)
        h, state = _cell(cell, steps[t].astype(F32) * scale, hx, state)
        with np.errstate(over="ignore"):
            hidden = _to_uint8(h * factor, zero_point, qmin, qmax)
        np.moveaxis(result, axis, 0)[t] = hidden
    return _into(out, result)


def recurrent_float(
    x: NDArray[np.float32],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    cell: str,
    hidden: NDArray[np.float32] | None = None,
    state: NDArray[np.float32] | None = None,
    axis: int = 1,
    reverse: bool = False,
    x_qparams: QParams | None = None,
    projection: tuple[LinearWeight, Dequant, QParams | None] | None = None,
    out: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The hidden states of a recurrent layer between float layers, and its last state.

    x           float32, the axes and gates of `recurrent`.
    hidden      the first hidden state, float32 (rows, H), or (rows, P) with a projection; state,
                of an lstm, the first c (rows, H). None: zeros.
    projection  the arguments of `linear_float` for weight (P, H): the hidden state is this product
                of what the cell gives.
    result      float32 (.., .., H), or P, in order of x; and the last c of an lstm, the last hidden
                state of the others, (rows, H).

    At each step hx = linear_float(last hidden state, weight, epilogue, x_qparams=x_qparams), and
    the cell is that of `recurrent`. x, hx and the state are clamped to +-2**96 first, NaN is 0.
    """
    steps = np.moveaxis(x, axis, 0)
    zeros = np.zeros((steps.shape[1], weight.n // GATES[cell]), F32)
    width = weight.k
    h = np.zeros((len(zeros), width), F32) if hidden is None else hidden
    state = (zeros if state is None else state) if cell == "lstm" else h
    result = np.empty((*x.shape[:2], width), F32)
    for t in reversed(range(len(steps))) if reverse else range(len(steps)):
        hx = linear_float(h, weight, epilogue, x_qparams=x_qparams)
        h, state = _cell(cell, *map(_limited, (steps[t], hx, state)))
        if projection is not None:
            h = linear_float(h, *projection[:2], x_qparams=projection[2])
        np.moveaxis(result, axis, 0)[t] = h
    return _into(out, result), state


def _cell(
    cell: str, x: NDArray[np.float32], hx: NDArray[np.float32], state: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The hidden state and what is kept beside it, by the products with the input and with the
    last hidden state, and what was kept."""
    xs, hs = np.split(x, GATES[cell], 1), np.split(hx, GATES[cell], 1)
    gates = [a + b for a, b in zip(xs, hs, strict=True)]
    match cell:
        case "lstm":
            i, f, g, o = gates
            c = _sigmoid(f) * state + _sigmoid(i) * _tanh(g)
            return _sigmoid(o) * _tanh(c), c
        case "gru":
            m = _tanh(xs[2] + _sigmoid(gates[0]) * hs[2])
            h = m + _sigmoid(gates[1]) * (state - m)
        case "tanh":
            h = _tanh(gates[0])
        case _:
            h = np.maximum(gates[0], F32(0))
    return h, h


def _limited(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.clip(np.where(np.isnan(x), F32(0), x), F32(-MAX_FACTOR), F32(MAX_FACTOR))


def _tanh(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The hyperbolic tangent by additions, products and one division, which round alike everywhere:
    see TANH_OVER."""
    x = np.clip(x, F32(-TANH_LIMIT), F32(TANH_LIMIT))
    square, parts = x * x, []
    for coefficients in (TANH_OVER, TANH_BELOW):
        value = np.full_like(x, coefficients[0])
        for coefficient in coefficients[1:]:
            value = value * square + F32(coefficient)
        parts.append(value)
    return np.clip(x * parts[0] / parts[1], F32(-1), F32(1))


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / (1 + exp(-x)) as tanh(x / 2) / 2 + 1 / 2."""
    half = F32(0.5)
    return _tanh(x * half) * half + half


def _steps(x: NDArray[Any], zero_point: int) -> NDArray[np.float32]:
    """x - zero_point, exact in float32."""
    return (x.astype(np.int32) - zero_point).astype(F32)


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


def _pool_parameters(kernel_size: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """(kernel, stride, padding, dilation), a pair each."""
    step = kernel_size if stride is None else stride
    return tuple(_pair(value) for value in (kernel_size, step, padding, dilation))


def _windows(
    size: int, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool
) -> list[list[int]]:
    """The positions within an axis of `size` that each window of a pooling reads."""
    span = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (span + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (count - 1) * stride >= size + padding:
        count -= 1  # a window begins in the input or the padding before it
    taps = [[i * stride - padding + k * dilation for k in range(kernel)] for i in range(count)]
    return [[t for t in window if 0 <= t < size] for window in taps]


def _adaptive_windows(size: int, count: int) -> list[list[int]]:
    return [list(range(i * size // count, -(-(i + 1) * size // count))) for i in range(count)]


def _pool(x: NDArray[Any], rows: Any, columns: Any, reduce: Any) -> NDArray[Any]:
    """reduce(window of (B, h, w, C)) for each row and column window."""
    y = np.zeros((x.shape[0], len(rows), len(columns), x.shape[3]), x.dtype)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            y[:, i, j] = reduce(x[:, row][:, :, column])
    return y


def _largest(window: NDArray[Any]) -> NDArray[Any]:
    return window.max(axis=(1, 2))


def _total(window: NDArray[Any]) -> NDArray[Any]:
    return window.sum(axis=(1, 2))


def _with_x_scale(epilogue: Dequant, x_scale: Any) -> Dequant:
    return Dequant(epilogue.scale, x_scale, epilogue.bias, epilogue.fmin, epilogue.fmax)


def _finish(
    acc: NDArray[np.int32], epilogue: Epilogue, add: NDArray[Any] | None = None
) -> NDArray[Any]:
    """acc (..., N) int32 through the epilogue; an x_scale (M,) runs along the rows (M, N)."""
    if epilogue is None:
        return acc
    if isinstance(epilogue, Requant):
        if epilogue.bias is not None:
            acc = acc + epilogue.bias
        with np.errstate(over="ignore"):
            y = acc.astype(F32) * _along(epilogue.multiplier, acc.ndim, -1)
        if add is not None and epilogue.add_multiplier is not None:
            steps = add.astype(np.int32) - epilogue.add_zero_point
            y = y + steps.astype(F32) * epilogue.add_multiplier
        q = _rounded(y, epilogue.zero_point, epilogue.qmin, epilogue.qmax)
        return q.astype(epilogue.dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = _along(epilogue.x_scale, acc.ndim, 0) * epilogue.scale
        y = acc.astype(F32) * scale
        if epilogue.bias is not None:
            y = y + epilogue.bias
    return np.clip(y, F32(epilogue.fmin), F32(epilogue.fmax))


def _to_uint8(
    y: NDArray[np.float32], zero_point: int, qmin: int = 0, qmax: int = 255
) -> NDArray[np.uint8]:
    return _rounded(y, zero_point, qmin, qmax).astype(np.uint8)


def _rounded(y: NDArray[np.float32], zero_point: int, qmin: int, qmax: int) -> NDArray[np.float64]:
    """clip(rint(y) + zero_point, qmin, qmax): the last step of every requantization."""
    return np.clip(np.rint(y).astype(np.float64) + zero_point, qmin, qmax)


def _into(out: NDArray[Any] | None, result: NDArray[Any]) -> NDArray[Any]:
    if out is None:
        return result
    out[...] = result
    return out
