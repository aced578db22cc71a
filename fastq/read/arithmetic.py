"""Sums, products and clamps of values, of two or of one and a constant."""

from __future__ import annotations

from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from fastq.graph import Node
from fastq.layout import Ref
from fastq.read.exported import Arguments, ranked_shape, shape_of
from fastq.read.norms import global_response_norm, norm
from fastq.read.reader import MAX_TERMS, Reader, reads, reads_any
from fastq.read.spelled import product, quotient, response


@reads_any("add")
def add(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    return binary(reader, node, "add", a["self"], a["other"], float(a.get("alpha", 1)))


@reads_any("sub")
def sub(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    return binary(reader, node, "add", a["self"], a["other"], -float(a.get("alpha", 1)))


@reads_any("mul")
def mul(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    x, y = a["self"], a["other"]
    for factor, other in ((y, x), (x, y)):
        found = norm(reader, node, product(other, factor)) or global_response_norm(
            reader, node, response(other, factor)
        )
        if found is not None:
            return found
    return binary(reader, node, "mul", x, y)


@reads_any("addcmul")
def addcmul(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    x, y, z = a["self"], a["tensor1"], a["tensor2"]
    if torch.broadcast_shapes(y.shape, z.shape) != shape_of(node):
        return None
    product = binary(reader, node, "mul", y, z)
    return product and binary(reader, node, "add", x, product, float(a.get("value", 1)))


@reads_any("div")
def div(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    x, y = a["self"], a["other"]
    if a.get("rounding_mode") is not None:
        return None
    found = norm(reader, node, quotient(x, y))
    if found is None and isinstance(y, Tensor) and y.numel() > 1:
        return binary(reader, node, "mul", x, 1 / y)
    return found


def binary(
    reader: Reader, node: fx.Node, op: str, x: Any, y: Any, alpha: float = 1.0
) -> Node | None:
    """A sum or a product of two activations, or of one and a constant tensor."""
    if not (isinstance(x, Node | Tensor) and isinstance(y, Node | Tensor)):
        return None
    if any(v.numel() == 1 or v.dtype != torch.float32 for v in (x, y) if isinstance(v, Tensor)):
        return None
    rank = max(len(x.shape), len(y.shape))
    if op == "mul":
        for value, factor in ((x, y), (y, x)):
            if isinstance(value, Node) and isinstance(factor, Tensor):
                scaled = _scaled(reader, node, value, factor)
                if scaled is not None:
                    return scaled
    sides = []
    for i, value in enumerate((x, y)):
        if isinstance(value, Tensor):
            shape = ranked_shape(value, rank)
            sides.append(reader.constant(f"{node.name}_constant", value, shape))
        else:
            sides.append(reader.ranked(f"{node.name}_{i}", value, rank))
    attrs = {"alpha": alpha} if alpha != 1 else {}
    return reader.add(node, op, sides, attrs=attrs)


def _scaled(reader: Reader, node: fx.Node, x: Node, factor: Tensor) -> Node | None:
    """A product with one factor for each channel."""
    rank = len(x.shape)
    shape = ranked_shape(factor, rank)
    if not 2 <= rank <= 4 or shape != (1, x.shape[1], *(1 for _ in x.shape[2:])):
        return None
    factor = factor.detach().reshape(-1)
    tensors = {"factor": factor, "shift": torch.zeros_like(factor)}
    return reader.add(node, "affine", [x], tensors=tensors)


@reads("relu")
def relu(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _clamped(reader, node, x, 0.0, None)


@reads("relu6")
def relu6(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _clamped(reader, node, x, 0.0, 6.0)


@reads("hardtanh")
def hardtanh(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _clamped(reader, node, x, a["min_val"], a["max_val"])


@reads("clamp", "clamp_min", "clamp_max")
def clamp(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _clamped(reader, node, x, a.get("min"), a.get("max"))


def _clamped(reader: Reader, node: fx.Node, x: Node, lo: Any, hi: Any) -> Node | None:
    """A pointwise function that is a clamp: the product before it can do it."""
    lo, hi = (v.item() if isinstance(v, Tensor) and v.dim() == 0 else v for v in (lo, hi))
    if not all(isinstance(v, int | float | None) for v in (lo, hi)):
        return None
    bounds = (-inf if lo is None else float(lo), inf if hi is None else float(hi))
    call: Any = ("aten.clamp.default", (Ref(0), lo, hi), {})
    return reader.add(node, "pointwise", [x], attrs={"calls": [call], "clamp_only": bounds})


@reads("prelu")
def prelu(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    if not isinstance(a["weight"], Tensor):
        return None
    return reader.add(node, "prelu", [x], tensors={"weight": a["weight"]})


@reads("glu")
def glu(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    """The first half times the sigmoid of the second."""
    if not x.shape:
        return None
    dim = a.get("dim", -1) % len(x.shape)
    half = x.shape[dim] // 2
    first = reader.part(f"{node.name}_first", x, dim, 0, half)
    gate = reader.part(f"{node.name}_gate", x, dim, half, 2 * half)
    calls: Any = [("aten.sigmoid.default", (Ref(0),), {})]
    opened = reader.add(f"{node.name}_open", "pointwise", [gate], attrs={"calls": calls},
                        shape=gate.shape)  # fmt: skip
    return reader.add(node, "mul", [first, opened])


@reads("sum")
def sum_of_few(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    """A sum over an axis of a few places, as additions one after the other."""
    dims = a.get("dim")
    if len(dims or ()) != 1 or a.get("dtype") is not None:
        return None
    dim: int = dims[0] % len(x.shape)  # type: ignore[index]
    if dim == 0 or not reader.unrolls or not 2 <= x.shape[dim] <= MAX_TERMS:
        return None
    shape = (*x.shape[:dim], *[1] * bool(a.get("keepdim")), *x.shape[dim + 1 :])
    total = None
    for i in range(x.shape[dim]):
        part = reader.part(f"{node.name}_{i}", x, dim, i, i + 1)
        term = reader.reshape(f"{part.name}_term", part, shape)
        name: Any = node if i == x.shape[dim] - 1 else f"{part.name}_sum"
        total = term if total is None else reader.add(name, "add", [total, term], shape=shape)  # type: ignore[list-item]
    return total
