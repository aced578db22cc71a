"""What is computed of the windows of lines, images and volumes: convolutions, poolings, and the
windows themselves, as columns. Channels are before the axes that windows move along; a batch, as
torch's, may be missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from math import prod
from typing import Any

import numpy as np

from fastq.operators.arithmetic import div
from fastq.operators.dtypes import Array
from fastq.operators.shapes import pad


def _each(numbers: Any, n: int) -> list[int]:
    """A number for each of n axes; one may be given for all."""
    numbers = numbers if isinstance(numbers, list | tuple) else [numbers]
    return [*numbers] * (n if len(numbers) == 1 else 1)


def _windows(
    x: Array, kernel: Sequence[int], stride: Sequence[int], sides: Sequence[tuple[int, int]],
    dilation: Sequence[int],
) -> Array:  # fmt: skip
    """(..., *kernel, *positions) of the last axes, with zeros (before, after) each of them."""
    n = len(kernel)
    x = pad(x, [width for side in reversed(sides) for width in side])
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    view: Any = np.lib.stride_tricks.sliding_window_view(x, reach, tuple(range(-n, 0)))
    view = view[(..., *(slice(None, None, step) for step in (*stride, *dilation)))]
    return np.moveaxis(view, range(-n, 0), range(-2 * n, -n))


def _overlaid(
    windows: Array, size: Sequence[int], stride: Sequence[int], padding: Sequence[int],
    dilation: Sequence[int],
) -> Array:  # fmt: skip
    """(..., *size): the sums of windows (..., *kernel, *positions) where these overlap."""
    n = len(size)
    kernel, positions = windows.shape[-2 * n : -n], windows.shape[-n:]
    whole = [m + 2 * p for m, p in zip(size, padding, strict=True)]
    y: Any = np.zeros((*windows.shape[: -2 * n], *whole), windows.dtype)
    for place in np.ndindex(*kernel):
        steps = zip(place, dilation, positions, stride, strict=True)
        lines = [slice(i * d, i * d + (m - 1) * s + 1, s) for i, d, m, s in steps]
        y[(..., *lines)] += windows[(..., *place, *[slice(None)] * n)]
    return y[(..., *(slice(p, p + m) for p, m in zip(padding, size, strict=True)))]


def convolution(
    x: Array, weight: Array, bias: Any, stride: Any, sides: Sequence[tuple[int, int]],
    dilation: Any, groups: int,
) -> Array:  # fmt: skip
    """sides  the zeros (before, after) each axis."""
    n, outputs = weight.ndim - 2, len(weight)
    windows = _windows(x, weight.shape[2:], _each(stride, n), sides, _each(dilation, n))
    batch, positions = x.shape[: -n - 1], windows.shape[-n:]
    columns = windows.reshape(*batch, groups, weight[0].size, prod(positions))
    y = weight.reshape(groups, outputs // groups, -1) @ columns
    return _biased(y.reshape(*batch, outputs, *positions), bias, n)


def conv_transpose(
    x: Array, weight: Array, bias: Any = None, stride: Any = 1, padding: Any = 0,
    output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
) -> Array:  # fmt: skip
    """Each pixel gives a window of the result."""
    n, inputs = weight.ndim - 2, len(weight)
    kernel, positions, batch = weight.shape[2:], x.shape[-n:], x.shape[: -n - 1]
    stride, padding, more, dilation = (
        _each(numbers, n) for numbers in (stride, padding, output_padding, dilation)
    )
    lines = weight.reshape(groups, inputs // groups, -1).swapaxes(1, 2)
    columns = lines @ x.reshape(*batch, groups, inputs // groups, prod(positions))
    windows = columns.reshape(*batch, groups * weight.shape[1], *kernel, *positions)
    size = [
        (m - 1) * s - 2 * p + d * (k - 1) + 1 + o
        for m, s, p, d, k, o in zip(
            positions, stride, padding, dilation, kernel, more, strict=True)
    ]  # fmt: skip
    return _biased(_overlaid(windows, size, stride, padding, dilation), bias, n)


def _biased(y: Array, bias: Any, n: int) -> Array:
    return y if bias is None else y + bias.reshape(-1, *[1] * n)


def _conv(
    x: Array, weight: Array, bias: Any = None, stride: Any = 1, padding: Any = 0,
    dilation: Any = 1, groups: int = 1,
) -> Array:  # fmt: skip
    """padding  numbers, "valid" for none, or "same" for a result of x's size."""
    n = weight.ndim - 2
    if padding == "same":
        reach = zip(weight.shape[2:], _each(dilation, n), strict=True)
        sides = [(d * (k - 1) // 2, -(-d * (k - 1) // 2)) for k, d in reach]
    else:
        sides = [(p, p) for p in _each(0 if padding == "valid" else padding, n)]
    return convolution(x, weight, bias, stride, sides, dilation, groups)


def _any_conv(
    x: Array, weight: Array, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
    output_padding: Any, groups: int,
) -> Array:  # fmt: skip
    if transposed:
        return conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)
    return _conv(x, weight, bias, stride, padding, dilation, groups)


def _im2col(x: Array, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Array:
    kernel, dilation, padding, stride = (_each(v, 2) for v in (kernel, dilation, padding, stride))
    windows = _windows(x, kernel, stride, [(p, p) for p in padding], dilation)
    *batch, channels = x.shape[:-2]
    return windows.reshape(*batch, channels * prod(kernel), prod(windows.shape[-2:]))


def _col2im(x: Array, size: Any, kernel: Any, dilation: Any, padding: Any, stride: Any) -> Array:
    size, kernel, dilation, padding, stride = (
        _each(numbers, 2) for numbers in (size, kernel, dilation, padding, stride)
    )
    positions = [
        (m + 2 * p - d * (k - 1) - 1) // s + 1
        for m, p, d, k, s in zip(size, padding, dilation, kernel, stride, strict=True)
    ]
    *batch, lines, _ = x.shape
    windows = x.reshape(*batch, lines // prod(kernel), *kernel, *positions)
    return _overlaid(windows, size, stride, padding, dilation)


def _places(n: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> Array:
    """The places of an axis of n that each window has, (positions, kernel); -1 for none."""
    reach = dilation * (kernel - 1) + 1
    count = (n + 2 * padding - reach + (stride - 1) * ceil) // stride + 1
    if ceil and (count - 1) * stride >= n + padding:  # the last would begin in the padding
        count -= 1
    if count < 1:
        raise ValueError(f"windows of {reach} along an axis of {n}, padded by {padding}: too large")
    places = np.arange(count)[:, None] * stride - padding + np.arange(kernel) * dilation
    return np.where(places < n, places, -1).clip(-1)


def _parts(n: int, count: int) -> Array:
    """The same of an axis in so many parts, which overlap where n is no multiple."""
    edges = np.arange(count + 1) * n
    first, end = edges[:-1] // count, -(-edges[1:] // count)
    places = first[:, None] + np.arange((end - first).max())
    return np.where(places < end[:, None], places, -1)


def _moving(
    n: int, x: Array, kernel_size: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil_mode: bool = False,
) -> list[Array]:  # fmt: skip
    """The places of the last n axes that windows of a pooling have."""
    numbers = (_each(v, n) for v in (kernel_size, stride or kernel_size, padding, dilation))
    axes = zip(x.shape[-n:], *numbers, strict=True)
    return [_places(m, k, s, p, d, ceil_mode) for m, k, s, p, d in axes]


def _adaptive(n: int, x: Array, size: Any) -> list[Array]:
    """The same of a pooling to a size, of which None is that of x."""
    axes = zip(x.shape[-n:], _each(size, n), strict=True)
    return [_parts(m, m if count is None else count) for m, count in axes]


def _taken(x: Array, places: Array, axis: int, other: Any) -> tuple[Array, Array]:
    """Windows of an axis, counted from the last, (..., positions, kernel, ...), with another value
    where there is no place; and where there is one."""
    there = (places >= 0).reshape(*places.shape, *[1] * (-1 - axis))
    return np.where(there, x.take(places, axis), x.dtype.type(other)), there


def _least(x: Array) -> Any:
    return -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min


def _largest(x: Array, axes: Sequence[Array]) -> Array:
    """The largest of each window, by the places of the last axes."""
    for axis, places in enumerate(axes, -len(axes)):
        x = _taken(x, places, axis, _least(x))[0].max(axis)
    return x


def _largest_and_where(x: Array, axes: Sequence[Array]) -> tuple[Array, Array]:
    """The same, beside its number in the image: of equal ones the first, of NaN the last."""
    sizes = x.shape[-len(axes) :]
    numbers = np.broadcast_to(np.arange(prod(sizes)).reshape(sizes), x.shape)
    for axis, places in zip(range(-1, -len(axes) - 1, -1), reversed(axes), strict=True):
        values, there = _taken(x, places, axis, _least(x))
        most = values.max(axis, keepdims=True)
        found = there & ((values == most) | np.isnan(values))
        last = places.shape[1] - 1 - np.flip(found, axis).argmax(axis, keepdims=True)
        which = np.where(np.isnan(most), last, found.argmax(axis, keepdims=True))
        x, numbers = (
            np.take_along_axis(windows, which, axis).squeeze(axis)
            for windows in (values, numbers.take(places, axis))
        )
    return x, numbers


def _mean(x: Array, axes: Sequence[Array], sizes: Sequence[Array]) -> Array:
    """The sum of each window, divided by its size, the product of its sizes along the axes."""
    for axis, places in enumerate(axes, -len(axes)):
        x = _taken(x, places, axis, 0)[0].sum(axis, x.dtype)
    mode = None if x.dtype.kind == "f" else "trunc"
    return div(x, reduce(np.multiply.outer, sizes), mode)


def max_pool(n: int, x: Array, *window: Any, **named: Any) -> Array:
    return _largest(x, _moving(n, x, *window, **named))


def _max_pool_with_indices(n: int, x: Array, *window: Any, **named: Any) -> tuple[Array, Array]:
    return _largest_and_where(x, _moving(n, x, *window, **named))


def avg_pool(
    n: int, x: Array, kernel_size: Any, stride: Any = (), padding: Any = 0,
    ceil_mode: bool = False, count_include_pad: bool = True, divisor_override: Any = None,
) -> Array:  # fmt: skip
    """Windows reach into the padding, which counts, but not beyond it."""
    numbers = (_each(v, n) for v in (kernel_size, stride or kernel_size, padding))
    places = _moving(n, x, kernel_size, stride, padding, 1, ceil_mode)
    sizes = _counts(places)
    if count_include_pad:
        for i, (m, k, s, p) in enumerate(zip(x.shape[-n:], *numbers, strict=True)):
            first = np.arange(len(sizes[i])) * s - p
            sizes[i] = np.minimum(first + k, m + p) - first
    return _mean(x, places, [np.array(divisor_override)] if divisor_override else sizes)


def _counts(axes: Sequence[Array]) -> list[Array]:
    return [(places >= 0).sum(1) for places in axes]


def adaptive_max_pool(n: int, x: Array, size: Any) -> Array:
    return _largest(x, _adaptive(n, x, size))


def _adaptive_max_pool_with_indices(n: int, x: Array, size: Any) -> tuple[Array, Array]:
    return _largest_and_where(x, _adaptive(n, x, size))


def adaptive_avg_pool(n: int, x: Array, size: Any) -> Array:
    axes = _adaptive(n, x, size)
    return _mean(x, axes, _counts(axes))


def _of_axes(n: int) -> dict[str, Callable[..., Any]]:
    """The operators whose windows have n axes."""
    return {
        f"conv{n}d.default conv{n}d.padding": _conv,
        f"conv_transpose{n}d.{'default' if n == 1 else 'input'}": conv_transpose,
        f"max_pool{n}d.default": partial(max_pool, n),
        f"max_pool{n}d_with_indices.default": partial(_max_pool_with_indices, n),
        f"avg_pool{n}d.default": partial(avg_pool, n),
        f"adaptive_max_pool{n}d.default": partial(_adaptive_max_pool_with_indices, n),
        f"adaptive_avg_pool{n}d.default": partial(adaptive_avg_pool, n),
    }


OPERATORS: dict[str, Callable[..., Any]] = {
    "convolution.default": _any_conv,
    **_of_axes(1),
    **_of_axes(2),
    **_of_axes(3),
    "im2col.default": _im2col,
    "col2im.default": _col2im,
}
