"""Norms that networks spell out: what the nodes of such a chain are recognized by.

rms_norm    x / sqrt(mean(x^2) + eps); times rsqrt(...), times (...) ** -0.5
layer_norm  the same of x - mean(x), its mean square perhaps as var(x);
            (x - mean(x)) / (std(x) + eps)
length      x / max(norm(x), eps), as in F.normalize: an RMS norm by sqrt(n)
response    x * (size / (mean(size) + eps)), size that of each channel: the norm of its pixels
"""

from __future__ import annotations

from math import inf, sqrt
from typing import Any, NamedTuple

from fastq.graph import Node
from fastq.masks import operator_of

MAX_EPS = 1e-5  # outside of the root: a vector that short is none


class Norm(NamedTuple):
    """factor * op(x) over one axis, without weights."""

    op: str
    x: Node
    dim: int
    eps: float
    factor: float = 1.0


class Response(NamedTuple):
    """The global response of x, whose channels are axis dim."""

    x: Node
    dim: int
    eps: float


def product(x: Any, factor: Any) -> Norm | None:
    """The norm that x * factor is."""
    return _by_root(x, _root(factor, "rsqrt", -0.5))


def quotient(x: Any, divisor: Any) -> Norm | None:
    """The norm that x / divisor is."""
    return _by_root(x, _root(divisor, "sqrt", 0.5)) or _by_size(x, divisor)


def response(x: Any, factor: Any) -> Response | None:
    """The global response that x * factor is."""
    if not (isinstance(x, Node) and isinstance(factor, Node) and factor.op == "aten"):
        return None
    if operator_of(factor) != "div" or factor.attrs["kwargs"] or len(factor.inputs) != 2:
        return None
    size, total = factor.inputs
    _, eps, *_ = _called(total, "add") or (None, None)
    if not isinstance(eps, float) or not 0 <= eps < inf:
        return None
    mean = _mean_of(total.inputs[0])
    if mean is None or mean[0] is not size or not _is_size(size) or size.inputs[0] is not x:
        return None
    _, _, dims, *_ = size.attrs["args"]
    pixels = {d % len(x.shape) for d in dims or ()}
    if not pixels or sorted([0, mean[1], *pixels]) != [*range(len(x.shape))]:
        return None
    return Response(x, mean[1], eps)


def is_part(x: Any) -> bool:
    """Whether the mean of x is one of a norm: x is a square, or the size of each channel."""
    return _squared(x) is not None or _is_size(x)


def _by_root(x: Any, total: Node | None) -> Norm | None:
    """x / sqrt(total): total is a mean square, or a variance, and eps."""
    if not isinstance(x, Node) or total is None:
        return None
    _, eps, *_ = _called(total, "add") or (None, None)
    if not isinstance(eps, float | int) or not 0 <= eps < inf:
        return None
    (value,) = total.inputs
    mean = _mean_of(value)
    square = _squared(mean[0]) if mean is not None else None
    if mean is not None and square is x and mean[1] > 0:
        centered = _centered(x)
        if centered is None or centered[1] != mean[1]:
            return Norm("rms_norm", x, mean[1], float(eps))
    return _of_deviations(x, value, float(eps))


def _of_deviations(x: Node, variance: Node, eps: float) -> Norm | None:
    """x / sqrt(variance + eps), x the deviations from a mean."""
    centered, mean = _centered(x), _mean_of(variance)
    if centered is None or centered[1] == 0:
        return None
    if mean is not None:
        square = _squared(mean[0])
        same = _centered(square) if square is not None else None
        fits = same is not None and same[0] is centered[0] and same[1] == centered[1] == mean[1]
        return Norm("layer_norm", *centered, eps) if fits else None
    ratio = _of_all(variance, "var", *centered)
    return None if ratio is None else Norm("layer_norm", *centered, eps * ratio, sqrt(ratio))


def _by_size(x: Any, divisor: Any) -> Norm | None:
    """x / (std(x) + eps), or x / max(norm(x), eps)."""
    _, eps, *_ = _called(divisor, "add") or (None, None)
    if isinstance(eps, float) and 0 < eps <= MAX_EPS:
        centered = _centered(x)
        ratio = None if centered is None else _of_all(divisor.inputs[0], "std", *centered)
        if centered is None or ratio is None or centered[1] == 0:
            return None
        return Norm("layer_norm", *centered, eps**2 * ratio, sqrt(ratio))
    _, eps, most = _called(divisor, "clamp") or (None, None, None)
    if not isinstance(eps, float) or most is not None or not 0 < eps <= MAX_EPS:
        return None
    (norm,) = divisor.inputs
    dim = _one_axis(norm, "linalg_vector_norm", 2)
    if not dim or norm.inputs[0] is not x or norm.attrs["args"][1] != 2:
        return None
    n = x.shape[dim]
    return Norm("rms_norm", x, dim, eps**2 / n, n**-0.5)


def _root(value: Any, name: str, power: float) -> Node | None:
    """What `value` is the root of, or the inverse root."""
    to_power = _called(value, "pow")
    if _called(value, name) is None and (to_power is None or to_power[1] != power):
        return None
    return value.inputs[0]  # type: ignore[no-any-return]


def _squared(square: Node) -> Node | None:
    """What it is the square of; None if it is none."""
    to_power = _called(square, "pow")
    if square.op == "mul":
        return square.inputs[0] if square.inputs[0] is square.inputs[1] else None
    if _called(square, "square") is None and (to_power is None or to_power[1] != 2):
        return None
    return square.inputs[0]


def _mean_of(mean: Node) -> tuple[Node, int] | None:
    """(value, dim) of a mean that keeps its axis."""
    pooled = mean.attrs.get("output_size") if mean.op == "adaptive_avg_pool2d" else None
    dim = 3 if pooled == (None, 1) else _one_axis(mean, "mean", 1)
    return None if dim is None else (mean.inputs[0], dim)


def _is_size(value: Node) -> bool:
    """Whether it is the root of a sum of squares, over axes that it keeps."""
    if value.op != "aten" or operator_of(value) != "linalg_vector_norm":
        return False
    _, order, _, keepdim, *_ = value.attrs["args"]
    return bool(order == 2 and keepdim)


def _centered(value: Node) -> tuple[Node, int] | None:
    """(x, dim) of x - mean(x)."""
    if value.op != "add" or value.attrs.get("alpha") != -1:
        return None
    x, mean = value.inputs
    found = _mean_of(mean)
    return found if found is not None and found[0] is x else None


def _of_all(node: Node, operator: str, x: Node, dim: int) -> float | None:
    """The variance over all n values, by that which `node` has of x: over n - correction."""
    n = x.shape[dim]
    if node.op != "aten" or node.inputs[0] is not x or operator_of(node) != operator:
        return None
    _, dims, correction, keepdim = (*node.attrs["args"], None, None, None)[:4]
    named = node.attrs["kwargs"]
    correction, keepdim = named.get("correction", correction), named.get("keepdim", keepdim)
    correction = 1 if correction is None else int(correction)
    if not keepdim or _axis(dims, len(x.shape)) != dim or n <= correction:
        return None
    return (n - correction) / n


def _one_axis(node: Node, operator: str, place: int) -> int | None:
    """The axis that an "aten" operator reduces to 1; its arguments `place` and the next say so."""
    if node.op != "aten" or operator_of(node) != operator:
        return None
    dims, keepdim = (*node.attrs["args"][place : place + 2], None, None)[:2]
    return _axis(dims, len(node.inputs[0].shape)) if keepdim else None


def _axis(dims: Any, rank: int) -> int | None:
    """The only one of dims."""
    one = isinstance(dims, list | tuple) and len(dims) == 1
    return dims[0] % rank if one else None  # type: ignore[no-any-return]


def _called(value: Any, name: str) -> tuple[Any, ...] | None:
    """The arguments of a pointwise function of this name, if it alone makes the value."""
    if not isinstance(value, Node) or value.op != "pointwise" or len(value.attrs["calls"]) != 1:
        return None
    target, args, kwargs = value.attrs["calls"][0]
    plain = target.split(".")[1] == name and kwargs in ({}, {"alpha": 1})
    return args if plain else None  # type: ignore[no-any-return]
