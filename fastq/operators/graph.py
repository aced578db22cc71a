"""The operations of `graph.OPERATIONS`: run(attrs, *inputs, **tensors)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fastq.arguments import NUMPY_MODES
from fastq.operators.activations import leaky
from fastq.operators.along import softmax
from fastq.operators.arithmetic import add
from fastq.operators.dtypes import Array, promoted
from fastq.operators.products import affine, group_norm, layer_norm, linear, of_channels, rms_norm
from fastq.operators.resampling import resampled
from fastq.operators.shapes import cat, pad, sliced
from fastq.operators.windows import (
    adaptive_avg_pool,
    adaptive_max_pool,
    avg_pool,
    conv_transpose,
    convolution,
    max_pool,
)
from fastq.sizes import padding_to, reshaped, sides_of


def _conv(attrs: Mapping[str, Any], x: Array, weight: Array, bias: Any = None) -> Array:
    return convolution(
        x, weight, bias, attrs["stride"], attrs["padding"], attrs["dilation"], attrs["groups"]
    )


def _conv_transpose(attrs: Mapping[str, Any], x: Array, weight: Array, bias: Any = None) -> Array:
    names = "stride", "padding", "output_padding", "groups", "dilation"
    return conv_transpose(x, weight, bias, *(attrs[name] for name in names))


def _softmax(attrs: Mapping[str, Any], x: Array, *masks: Array) -> Array:
    """Of what the mask is not 0 for; all the same, or all 0, where it is 0 for all."""
    if not masks:
        return softmax(x, attrs["dim"])
    (mask,) = masks
    y = softmax(np.where(mask == 0, np.finfo(x.dtype).min, x), attrs["dim"])
    return y if attrs["uniform"] else y * (mask != 0)


def _layer_norm(attrs: Mapping[str, Any], x: Array, weight: Any = None, bias: Any = None) -> Array:
    return layer_norm(x, attrs["shape"], _line(weight), _line(bias), attrs["eps"])


def _rms_norm(attrs: Mapping[str, Any], x: Array, weight: Any = None) -> Array:
    return rms_norm(x, attrs["shape"], _line(weight), attrs["eps"])


def _line(values: Any) -> Any:
    return None if values is None else values.reshape(-1)


def _group_norm(attrs: Mapping[str, Any], x: Array, weight: Any = None, bias: Any = None) -> Array:
    return group_norm(x, attrs["groups"], weight, bias, attrs["eps"])


def _concat(attrs: Mapping[str, Any], *xs: Array) -> Array:
    """The other axes broadcast."""
    dim = attrs["dim"]
    whole = np.broadcast_shapes(*((*x.shape[:dim], *x.shape[dim + 1 :]) for x in xs))
    shapes = [(*whole[:dim], x.shape[dim], *whole[dim:]) for x in xs]
    return cat([np.broadcast_to(x, shape) for x, shape in zip(xs, shapes, strict=True)], dim)


def _pad(attrs: Mapping[str, Any], x: Array) -> Array:
    """By numbers, or up to sizes."""
    widths = padding_to(attrs["pad"], attrs.get("size", {}).get("size", ()), x.shape)
    if attrs["mode"] == "constant":
        return pad(x, widths, attrs.get("value") or 0)
    return np.pad(x, sides_of(widths, x.ndim), NUMPY_MODES[attrs["mode"]])  # type: ignore[call-overload]


def _upsample(kind: str) -> Callable[..., Array]:
    """The operation of an image that is made larger or smaller, to a size or by a factor."""

    def run(attrs: Mapping[str, Any], x: Array) -> Array:
        size, factors = attrs["size"].get("size"), attrs["size"].get("scale_factor")
        return resampled(x, size, kind, attrs.get("align_corners", False), factors)

    return run


OPERATIONS: dict[str, Callable[..., Any]] = {
    "constant": lambda attrs, value: value,
    "add": lambda attrs, x, y: add(x, y, attrs.get("alpha", 1)),
    "mul": lambda attrs, x, y: np.multiply(*promoted(x, y)),
    "matmul": lambda attrs, x, y: np.matmul(x, y) * np.float32(attrs.get("factor", 1.0)),
    "linear": lambda attrs, x, weight, bias=None: linear(x, weight, bias),
    **dict.fromkeys(("conv2d", "conv3d"), _conv),
    **dict.fromkeys(("conv_transpose2d", "conv_transpose3d"), _conv_transpose),
    "max_pool2d": lambda attrs, x: max_pool(2, x, **attrs["pool"]),
    "avg_pool2d": lambda attrs, x: avg_pool(2, x, **attrs["pool"]),
    "adaptive_avg_pool2d": lambda attrs, x: adaptive_avg_pool(2, x, attrs["output_size"]),
    "adaptive_max_pool2d": lambda attrs, x: adaptive_max_pool(2, x, attrs["output_size"]),
    "softmax": _softmax,
    "prelu": lambda attrs, x, weight: leaky(x, of_channels(weight, x)),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "affine": lambda attrs, x, factor, shift: affine(x, factor, shift),
    "upsample_nearest2d": _upsample("nearest"),
    "upsample_bilinear2d": _upsample("bilinear"),
    "pad": _pad,
    "concat": _concat,
    "reshape": lambda attrs, x: x.reshape(reshaped(x.shape, attrs["groups"])),
    "permute": lambda attrs, x: x.transpose(attrs["dims"]),
    "slice": lambda attrs, x: sliced(x, attrs["dim"], attrs["start"], attrs["end"], attrs["step"]),
}
