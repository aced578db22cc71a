"""Pooling and upsampling."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.arguments import OVERRIDE, RESIZED
from fastq.kernels import windows
from fastq.ops.checks import UINT8, as_requantized, as_uint8, check_argument, output_array
from fastq.ops.rows import run_row
from fastq.weights import pair


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
    """The largest of each window of x (B, H, W, C) uint8; scale and zero point stay.

    kernel_size, stride (kernel_size unless given), padding (up to half of the kernel), dilation,
    ceil_mode as in torch.nn.functional.max_pool2d. out as in `conv2d`. Raises TypeError and
    ValueError for other dtypes, shapes or values.
    """
    x = _image("max_pool2d", x)
    along = _pooling("max_pool2d", x, kernel_size, stride, padding, dilation, bool(ceil_mode))
    result = _pooled("max_pool2d", x, along, out)
    parameters = tuple(tuple(p[i] for p in along) for i in range(4))
    return run_row(windows.max_pool2d_row, [x, result], *parameters, bool(ceil_mode))


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
    """y = clip(rint(sum * (multiplier / count)) + zero_point, qmin, qmax) for each window.

    sum is that of (x - x_zero_point), exact, over a window of x (B, H, W, C) uint8; padding is real
    0. The windows, and what counts, as in torch.nn.functional.avg_pool2d. multiplier is
    x_scale / y_scale. Otherwise as `max_pool2d` and `add`.
    """
    x = _image("avg_pool2d", x)
    along = _pooling("avg_pool2d", x, kernel_size, stride, padding, 1, bool(ceil_mode))
    if isinstance(divisor_override, np.integer):
        divisor_override = int(divisor_override)
    if divisor_override is not None:
        check_argument("avg_pool2d: divisor_override", divisor_override, OVERRIDE)
    requantized = as_requantized("avg_pool2d", multiplier, x_zero_point, zero_point, qmin, qmax)
    result = _pooled("avg_pool2d", x, along, out)
    parameters = tuple(tuple(p[i] for p in along) for i in range(3))
    counting = bool(ceil_mode), bool(count_include_pad), divisor_override
    return run_row(windows.avg_pool2d_row, [x, result], *parameters, *counting, *requantized)


def adaptive_max_pool2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The largest of each of output_size windows of x (B, H, W, C) uint8, as torch's.

    Window i of an axis is floor(i * H / OH) to ceil((i + 1) * H / OH). Errors as `max_pool2d`.
    """
    x = _image("adaptive_max_pool2d", x)
    result = _resized("adaptive_max_pool2d", x, output_size, out)
    return run_row(windows.adaptive_max_pool2d_row, [x, result])


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
    """The mean of each window, requantized as in `avg_pool2d`; windows of `adaptive_max_pool2d`.

    output_size 1 is the mean over H and W. Arguments and errors as there.
    """
    x = _image("adaptive_avg_pool2d", x)
    requantized = as_requantized(
        "adaptive_avg_pool2d", multiplier, x_zero_point, zero_point, qmin, qmax
    )
    result = _resized("adaptive_avg_pool2d", x, output_size, out)
    return run_row(windows.adaptive_avg_pool2d_row, [x, result], *requantized)


def upsample_nearest2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    scale_factor: tuple[float, float] | None = None,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """x (B, H, W, C) uint8 at min(floor(i * scale), H - 1) of each axis; scale and zero point stay.

    scale is 1 / scale_factor if given, else H / OH, in float32: torch's mode "nearest". Raises
    TypeError and ValueError for other dtypes, shapes or values.
    """
    x = _image("upsample_nearest2d", x)
    factors = _scale_factor("upsample_nearest2d", scale_factor)
    result = _resized("upsample_nearest2d", x, output_size, out)
    return run_row(windows.upsample_nearest2d_row, [x, result], factors)


def upsample_bilinear2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    align_corners: bool = False,
    scale_factor: tuple[float, float] | None = None,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """x (B, H, W, C) uint8 between its pixels; scale and zero point stay.

    Positions and shares as in torch's mode "bilinear", in float32; rounded half to even; see
    reference.upsample_bilinear2d. Errors as `upsample_nearest2d`.
    """
    x = _image("upsample_bilinear2d", x)
    factors = _scale_factor("upsample_bilinear2d", scale_factor)
    result = _resized("upsample_bilinear2d", x, output_size, out)
    return run_row(windows.upsample_bilinear2d_row, [x, result], bool(align_corners), factors)


def _image(name: str, x: Any) -> NDArray[np.uint8]:
    x = as_uint8(f"{name}: x", x)
    if x.ndim != 4 or not (x.shape[1] and x.shape[2]):
        raise ValueError(f"{name}: x {x.shape}; wanted (B, H, W, C) with H, W > 0")
    return x


def _pooling(
    name: str, x: NDArray[Any], kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> list[tuple[int, int, int, int, int]]:
    """(kernel, stride, padding, dilation, output size) of each axis."""
    kernels = pair(f"{name}: kernel_size", kernel, 1)
    strides = kernels if stride is None else pair(f"{name}: stride", stride, 1)
    paddings = pair(f"{name}: padding", padding, 0)
    dilations = pair(f"{name}: dilation", dilation, 1)
    if any(2 * p > k for p, k in zip(paddings, kernels, strict=True)):
        raise ValueError(f"{name}: padding={padding} for kernel_size={kernel}; wanted up to half")
    along = []
    for i, size in enumerate(x.shape[1:3]):
        one = kernels[i], strides[i], paddings[i], dilations[i]
        count = windows.pool_size(size, *one, ceil)
        if count < 1:
            raise ValueError(
                f"{name}: x {x.shape} is smaller than the window; kernel_size={kernel}, "
                f"padding={padding}, dilation={dilation}"
            )
        along.append((*one, count))
    return along


def _pooled(name: str, x: NDArray[Any], along: Any, out: Any) -> NDArray[Any]:
    shape = (x.shape[0], along[0][-1], along[1][-1], x.shape[3])
    return output_array(name, out, shape, UINT8, x)


def _resized(name: str, x: NDArray[Any], output_size: Any, out: Any) -> NDArray[Any]:
    size = pair(f"{name}: output_size", output_size, 1)
    return output_array(name, out, (x.shape[0], *size, x.shape[3]), UINT8, x)


def _scale_factor(name: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, tuple | list):
        value = tuple(float(v) if isinstance(v, int | np.integer) else v for v in value)
    check_argument(f"{name}: scale_factor", value, RESIZED)
    return float(value[0]), float(value[1])
