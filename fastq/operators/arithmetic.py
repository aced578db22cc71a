"""Sums, products, comparisons and functions of each element."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastq.operators.dtypes import Array, pointwise, pointwise_real, promoted, real


def _scaled(function: Callable[..., Any]) -> Callable[..., Array]:
    """add and sub, whose second operand has a factor."""

    def run(x: Any, y: Any, alpha: float = 1) -> Array:
        x, y = promoted(x, y)
        return function(x, y if alpha == 1 else y * y.dtype.type(alpha))

    return run


add, _sub = _scaled(np.add), _scaled(np.subtract)


def div(x: Any, y: Any, rounding_mode: str | None = None) -> Array:
    """The quotient may be rounded down or towards zero, in its own dtype then."""
    x, y = promoted(x, y)
    if rounding_mode is None:
        return real(x) / real(y)
    if rounding_mode == "floor":
        return np.floor_divide(x, y)
    return (x - np.fmod(x, y)) // y if x.dtype.kind in "iu" else np.trunc(x / y)


def clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    """No less and no more than these, numbers or arrays; None is no bound."""
    for bound, function in ((min, np.maximum), (max, np.minimum)):
        x = x if bound is None else function(*promoted(x, bound))
    return x


OPERATORS: dict[str, Callable[..., Any]] = {
    "add.Tensor add.Scalar": add,
    "sub.Tensor sub.Scalar subtract.Tensor": _sub,
    "rsub.Scalar rsub.Tensor": lambda x, y, alpha=1: _sub(y, x, alpha),
    "mul.Tensor mul.Scalar multiply.Tensor": pointwise(np.multiply),
    "div.Tensor div.Scalar true_divide.Tensor div.Tensor_mode div.Scalar_mode": div,
    "floor_divide.default floor_divide.Scalar": lambda x, y: div(x, y, "floor"),
    "fmod.Scalar fmod.Tensor": pointwise(np.fmod),
    "remainder.Scalar remainder.Tensor": pointwise(np.remainder),
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar": pointwise(np.power),
    "addcmul.default": lambda x, y, z, value=1: x + y * z * y.dtype.type(value),
    "addcdiv.default": lambda x, y, z, value=1: x + y / z * y.dtype.type(value),
    "lerp.Scalar lerp.Tensor": lambda x, end, weight: x + (end - x) * weight,
    "maximum.default max.other": pointwise(np.maximum),
    "minimum.default min.other": pointwise(np.minimum),
    "clamp.default clamp.Tensor clip.default clip.Tensor": clamp,
    "clamp_min.default": lambda x, min: clamp(x, min),
    "clamp_max.default": lambda x, max: clamp(x, None, max),
    "eq.Scalar eq.Tensor": pointwise(np.equal),
    "ne.Scalar ne.Tensor": pointwise(np.not_equal),
    "lt.Scalar lt.Tensor": pointwise(np.less),
    "le.Scalar le.Tensor": pointwise(np.less_equal),
    "gt.Scalar gt.Tensor": pointwise(np.greater),
    "ge.Scalar ge.Tensor": pointwise(np.greater_equal),
    "where.self where.ScalarOther where.ScalarSelf where.Scalar":
        lambda condition, x, y: np.where(condition, *promoted(x, y)),
    "masked_fill.Scalar masked_fill.Tensor":
        lambda x, mask, value: np.where(mask, np.asarray(value, x.dtype), x),
    "bitwise_and.Tensor __and__.Tensor": pointwise(np.bitwise_and),
    "bitwise_or.Tensor __or__.Tensor": pointwise(np.bitwise_or),
    "bitwise_xor.Tensor __xor__.Tensor": pointwise(np.bitwise_xor),
    "bitwise_not.default": np.invert,
    **{f"{name}.default": getattr(np, name) for name in (
        "logical_and", "logical_or", "logical_xor", "logical_not", "isnan", "isinf", "isfinite",
        "sign", "square", "floor", "ceil", "trunc")},
    "neg.default": np.negative,
    "abs.default absolute.default": np.abs,
    "round.default": np.rint,
    "round.decimals": lambda x, decimals: np.round(x, decimals),
    "frac.default": lambda x: x - np.trunc(x),
    "nan_to_num.default": lambda x, nan=None, posinf=None, neginf=None: np.nan_to_num(
        x, nan=nan or 0.0, posinf=posinf, neginf=neginf),
    **{f"{name}.default": pointwise_real(getattr(np, name)) for name in (
        "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "sin", "cos", "tan",
        "sinh", "cosh", "tanh")},
    **{f"{name}.default": pointwise_real(getattr(np, name.replace("a", "arc", 1))) for name in (
        "asin", "acos", "atan", "asinh", "acosh", "atanh", "atan2")},
    "rsqrt.default": pointwise_real(lambda x: 1 / np.sqrt(x)),
    "reciprocal.default": pointwise_real(lambda x: 1 / x),
    "logaddexp.default": pointwise(np.logaddexp),
    "hypot.default": pointwise(np.hypot),
    "polar.default": lambda size, angle: size * np.exp(1j * angle),
    "real.default": np.real,
    "imag.default": np.imag,
    "view_as_complex.default": lambda x: x[..., 0] + 1j * x[..., 1],
    "view_as_real.default": lambda x: np.stack([x.real, x.imag], -1),
}  # fmt: skip
