"""Matrix products, and the norms of layers and of vectors; distances are such norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from fastq.operators.along import axes_of, over
from fastq.operators.dtypes import Array, promoted


def linear(x: Array, weight: Array, bias: Any = None) -> Array:
    """x @ weight.T + bias."""
    y = x @ weight.T
    return y if bias is None else y + bias


def _bilinear(x: Array, y: Array, weight: Array, bias: Any = None) -> Array:
    z = np.einsum("...i,oij,...j->...o", x, weight, y, optimize=True)
    return z if bias is None else z + bias


def _addmm(x: Array, a: Array, b: Array, beta: Any = 1, alpha: Any = 1) -> Array:
    """What is multiplied by 0 may be anything."""
    product = np.matmul(a, b) * a.dtype.type(alpha)
    return product + x * x.dtype.type(beta) if beta else product


def layer_norm(
    x: Array, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *rest: Any,
) -> Array:  # fmt: skip
    """Over the last axes, which are of this shape."""
    axes = tuple(range(-len(shape), 0))
    x = x - x.mean(axes, keepdims=True)
    y = rms_norm(x, shape, weight, eps)
    return y if bias is None else y + bias


def rms_norm(x: Array, shape: Sequence[int], weight: Any = None, eps: Any = None) -> Array:
    """Over the last axes, which are of this shape."""
    eps = np.finfo(x.dtype).eps if eps is None else x.dtype.type(eps)
    y = x / np.sqrt((x * x).mean(tuple(range(-len(shape), 0)), keepdims=True) + eps)
    return y if weight is None else y * weight


def group_norm(
    x: Array, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Array:
    """Over groups of channels, axis 1, and all that is in them."""
    parts = x.reshape(len(x), groups, prod(x.shape[1:]) // groups)
    y = layer_norm(parts, parts.shape[2:], eps=eps).reshape(x.shape)
    return affine(y, weight, bias)


def _batch_norm(
    x: Array, weight: Any, bias: Any, mean: Array, var: Array, training: bool, momentum: float,
    eps: float, *rest: Any,
) -> Array:  # fmt: skip
    """By the statistics that it was trained with: a saved network does not train."""
    if training:
        raise ValueError("batch_norm in training; fastq.load runs it with torch")
    y = (x - of_channels(mean, x)) / of_channels(np.sqrt(var + var.dtype.type(eps)), x)
    return affine(y, weight, bias)


def _instance_norm(
    x: Array, weight: Any, bias: Any, mean: Any, var: Any, use_input_stats: bool, momentum: float,
    eps: float, *rest: Any,
) -> Array:  # fmt: skip
    """Of each channel of each image, unless statistics are given for all."""
    if use_input_stats:
        return group_norm(x, x.shape[1], weight, bias, eps)
    return _batch_norm(x, weight, bias, mean, var, False, momentum, eps)


def affine(x: Array, factor: Any, shift: Any) -> Array:
    """x * factor + shift, a number for each channel; None for none."""
    y = x if factor is None else x * of_channels(factor, x)
    return y if shift is None else y + of_channels(shift, x)


def of_channels(numbers: Array, x: Array) -> Array:
    """A number for each place of x on axis 1, in its dtype."""
    return numbers.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 2))


def _norm(x: Array, ord: float = 2, dim: Any = None, keepdim: bool = False, **rest: Any) -> Array:
    if abs(ord) == np.inf:
        return over(np.max if ord > 0 else np.min)(np.abs(x), dim, keepdim)
    if ord == 0:
        return (x != 0).sum(axes_of(dim), keepdims=keepdim).astype(x.dtype)
    y = np.abs(x) ** ord
    return (y.sum(axes_of(dim), keepdims=keepdim) ** (1 / ord)).astype(x.dtype)


def _cosine(x: Array, y: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    x, y = np.broadcast_arrays(*promoted(x, y))
    x, y = (v / np.maximum(_norm(v, 2, dim, True), v.dtype.type(eps)) for v in (x, y))
    return (x * y).sum(dim)


def _distance(x: Array, y: Array, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> Array:
    return _norm(x - y + x.dtype.type(eps), p, -1, keepdim)


OPERATORS: dict[str, Callable[..., Any]] = {
    "linear.default": linear,
    "bilinear.default": _bilinear,
    "matmul.default bmm.default mm.default mv.default dot.default": np.matmul,
    "addmm.default baddbmm.default": _addmm,
    "outer.default": np.outer,
    "einsum.default":
        lambda equation, values, **rest: np.einsum(equation, *values, optimize=True),
    "layer_norm.default": layer_norm,
    "rms_norm.default": rms_norm,
    "group_norm.default": group_norm,
    "batch_norm.default": _batch_norm,
    "instance_norm.default": _instance_norm,
    "linalg_vector_norm.default": _norm,
    "cosine_similarity.default": _cosine,
    "pairwise_distance.default": _distance,
    "cdist.default":
        lambda x, y, p=2.0, *rest: _norm(x[..., :, None, :] - y[..., None, :, :], p, -1),
}  # fmt: skip
