"""Activations, each of one element, and what they are made of: sigmoid, erf, softplus."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastq.operators.arithmetic import clamp
from fastq.operators.dtypes import Array, pointwise_real, promoted

_ERF = np.vectorize(math.erf, otypes=[float])  # NumPy has none


def _erf(x: Array) -> Array:
    return _ERF(x).astype(x.dtype)


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _hard_sigmoid(x: Array) -> Array:
    return clamp(x + 3, 0, 6) / 6


def _logit(x: Array, eps: float | None = None) -> Array:
    x = x if eps is None else clamp(x, eps, 1 - eps)
    return np.log(x / (1 - x))


def _softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    """log(1 + exp(beta * x)) / beta, and x where that is beyond the threshold."""
    return np.where(beta * x > threshold, x, np.logaddexp(0, beta * x) / beta)


def _elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    """Of celu and selu, too."""
    below = alpha * np.expm1(np.minimum(x, 0) * input_scale)
    return scale * np.where(x > 0, x, below)


def _gelu(x: Array, approximate: str = "none") -> Array:
    """x times the normal distribution's share below it, or its approximation by tanh."""
    if approximate == "none":
        return 0.5 * x * (1 + _erf(x * 0.5**0.5))
    return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))


def leaky(x: Array, slope: Any = 0.01) -> Array:
    """x, times the slope where it is below 0."""
    return np.where(x > 0, x, x * slope)


def _rrelu(x: Array, lower: float = 1 / 8, upper: float = 1 / 3, *training: Any) -> Array:
    """The mean of its slopes: a saved network does not train."""
    return leaky(x, (lower + upper) / 2)


OPERATORS: dict[str, Callable[..., Any]] = {
    "sigmoid.default": pointwise_real(_sigmoid),
    "logit.default": _logit,
    "erf.default": pointwise_real(_erf),
    "erfc.default": pointwise_real(lambda x: 1 - _erf(x)),
    "relu.default": lambda x: np.maximum(x, x.dtype.type(0)),
    "relu6.default": lambda x: clamp(x, 0, 6),
    "hardtanh.default": lambda x, least=-1, most=1: clamp(x, least, most),
    "hardsigmoid.default": _hard_sigmoid,
    "hardswish.default": lambda x: x * _hard_sigmoid(x),
    "hardshrink.default": lambda x, lambd=0.5: np.where(abs(x) > lambd, *promoted(x, 0)),
    "softshrink.default": lambda x, lambd=0.5: x - clamp(x, -lambd, lambd),
    "threshold.default": lambda x, threshold, value: np.where(x > threshold, *promoted(x, value)),
    "leaky_relu.default": leaky,
    "rrelu.default": _rrelu,
    "elu.default": _elu,
    "celu.default": lambda x, alpha=1: _elu(x, alpha, 1, 1 / alpha),
    "selu.default": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    "silu.default": lambda x: x * _sigmoid(x),
    "gelu.default": _gelu,
    "mish.default": lambda x: x * np.tanh(_softplus(x)),
    "softplus.default": _softplus,
    "log_sigmoid.default": lambda x: -_softplus(-x, 1, np.inf),
}
