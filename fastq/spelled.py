"""RMS norms that networks spell out: what the nodes of such a chain are recognized by."""

from __future__ import annotations

from math import inf
from typing import Any

from fastq.graph import Node
from fastq.masks import operator_of

MAX_EPS = 1e-6  # of a length: a vector that short is none


def inverse_rms(x: Any, factor: Any) -> tuple[int, float] | None:
    """(dim, eps) if a factor of x is rsqrt(mean(x**2, dim, keepdim=True) + eps)."""
    if not isinstance(x, Node) or called(factor, "rsqrt") is None:
        return None
    (total,) = factor.inputs
    _, eps, *_ = called(total, "add") or (None, None)
    if not isinstance(eps, float | int) or not 0 <= eps < inf or not total.inputs[0].inputs:
        return None
    mean = total.inputs[0]
    square = mean.inputs[0]
    if mean.op == "adaptive_avg_pool2d" and mean.attrs["output_size"] == (None, 1):
        dim: int | None = 3
    else:
        dim = _one_axis(mean, "mean", 1, len(x.shape))
    to_power = called(square, "pow")
    squared = (
        square.op == "mul"
        or called(square, "square") is not None
        or (to_power is not None and to_power[1] == 2)
    )
    if dim is None or not squared or any(value is not x for value in square.inputs):
        return None
    return dim, float(eps)


def length(x: Node, divisor: Any) -> tuple[int, float] | None:
    """(dim, eps) if a divisor of x is its length along dim, or eps, as in F.normalize."""
    _, eps, most = called(divisor, "clamp") or (None, None, None)
    if eps is None or most is not None or not 0 < eps < MAX_EPS:
        return None
    (norm,) = divisor.inputs
    dim = _one_axis(norm, "linalg_vector_norm", 2, len(x.shape))
    if dim is None or norm.inputs[0] is not x or norm.attrs["args"][1] != 2:
        return None
    return dim, float(eps)


def called(value: Any, name: str) -> tuple[Any, ...] | None:
    """The arguments of a pointwise function of this name, if it alone makes the value."""
    if not isinstance(value, Node) or value.op != "pointwise" or len(value.attrs["calls"]) != 1:
        return None
    target, args, kwargs = value.attrs["calls"][0]
    plain = target.split(".")[1] == name and kwargs in ({}, {"alpha": 1})
    return args if plain else None  # type: ignore[no-any-return]


def _one_axis(node: Node, operator: str, place: int, rank: int) -> int | None:
    """The axis that an "aten" operator reduces to 1; its arguments `place` and the next say so."""
    if node.op != "aten" or operator_of(node) != operator:
        return None
    dims, keepdim = (*node.attrs["args"][place : place + 2], None, None)[:2]
    if not keepdim or not isinstance(dims, list | tuple) or len(dims) != 1:
        return None
    return dims[0] % rank  # type: ignore[no-any-return]
