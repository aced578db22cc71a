"""Linear layers and products of two activations, however their axes are named and ordered."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor, fx

from fastq.graph import Node
from fastq.read.arithmetic import binary
from fastq.read.exported import Arguments, parameters, shape_of
from fastq.read.reader import Reader, axis, reads, reads_any


@reads("linear")
def linear(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    tensors = parameters(a, "weight", "bias")
    if tensors is None or tensors["weight"].dim() != 2:
        return None
    return _linear(reader, node, x, tensors)


def _linear(reader: Reader, node: fx.Node, x: Node, tensors: dict[str, Tensor]) -> Node:
    """A linear layer of features; of rows that were joined before, as what they were."""
    rows: Any = x.attrs["groups"] if x.op == "reshape" else ()
    joined = len(x.shape) == 2 and len(rows) == 2 and len(rows[0][0]) > 1
    shape = tuple(x.inputs[0].shape[d] for d in rows[0][0]) if joined else ()
    made = (*shape, len(tensors["weight"]))
    if not joined or any(shape_of(user) != made for user in node.users):  # rows are taken on
        return reader.add(node, "linear", [x], tensors=tensors)
    (source,), (leading, _), shape = x.inputs, rows[0], (*shape, x.shape[1])
    if source.shape != shape:  # the features were joined as well
        groups = (*map(axis, leading), rows[1])
        source = reader.add(f"{x.name}_features", "reshape", [source], shape=shape,
                            attrs={"groups": groups})  # fmt: skip
    y = reader.add(node, "linear", [source], tensors=tensors, shape=made)
    groups = ((leading, (None,)), axis(len(leading)))
    return reader.add(f"{node.name}_rows", "reshape", [y], attrs={"groups": groups},
                      shape=(prod(made[:-1]), made[-1]))  # fmt: skip


@reads_any("addmm")
def addmm(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    bias, x, weight = a["self"], a["mat1"], a["mat2"]
    if a.get("beta", 1) != 1 or a.get("alpha", 1) != 1 or not isinstance(x, Node):
        return None
    if not isinstance(weight, Tensor) or not isinstance(bias, Tensor) or bias.dim() != 1:
        return None
    return _linear(reader, node, x, {"weight": weight.t(), "bias": bias})


@reads_any("matmul", "bmm", "mm")
def matmul(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    x, y = a["self"], a.get("other", a.get("mat2"))
    if isinstance(x, Node) and isinstance(y, Tensor) and y.dim() == 2:
        return _linear(reader, node, x, {"weight": y.t()})
    if isinstance(x, Tensor) and x.dim() == 2 and isinstance(y, Node) and len(y.shape) == 3:
        return _weighted(reader, node, y, "bkn", x, "mk", "bmn")
    if not isinstance(x, Node) or not isinstance(y, Node):
        return None
    if len(x.shape) != len(y.shape) or x.shape[:-2] != y.shape[:-2]:
        return None
    return reader.add(node, "matmul", [x, y])


@reads_any("baddbmm")
def baddbmm(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    """Scores and what is added to them: a mask, in nn.MultiheadAttention that gives weights."""
    x, y, factor = a["batch1"], a["batch2"], float(a.get("alpha", 1))
    if not isinstance(x, Node) or not isinstance(y, Node):
        return None
    if a.get("beta", 1) != 1 or not factor > 0:
        return None
    scores = reader.add(node, "matmul", [x, y], name=f"{node.name}_scores",
                        attrs={"factor": factor}, shape=(*x.shape[:-1], y.shape[-1]))  # fmt: skip
    return binary(reader, node, "add", scores, a["self"])


@reads_any("einsum")
def einsum(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    """A product of matrices, however its axes are named and ordered."""
    equation, operands = a["equation"].replace(" ", ""), a["tensors"]
    left, _, out = equation.partition("->")
    names = left.split(",")
    if len(operands) != 2 or not out or "." in equation:
        return None
    if any(len(set(part)) < len(part) for part in (*names, out)):
        return None
    for (x, have), (weight, those) in itertools.permutations(zip(operands, names, strict=True)):
        if isinstance(x, Node) and isinstance(weight, Tensor):
            return _weighted(reader, node, x, have, weight, those, out)
    if not all(isinstance(v, Node) for v in operands):
        return None
    return _of_matrices(reader, node, operands, names, out)


def _of_matrices(
    reader: Reader, node: fx.Node, operands: Sequence[Node], names: Sequence[str], out: str
) -> Node | None:
    """einsum("first,second->out") of two activations: matmul, if each has one axis of its own and
    one that is summed over."""
    first, second = names
    batch = [n for n in first if n in second and n in out]
    inner = [n for n in first if n in second and n not in out]
    rows, columns = ([n for n in part if n not in other and n in out]
                     for part, other in ((first, second), (second, first)))  # fmt: skip
    if [*map(len, (inner, rows, columns))] != [1] * 3:
        return None
    if not len(first) == len(second) == len(batch) + 2:
        return None
    wanted = ([*batch, *rows, *inner], [*batch, *inner, *columns])
    x, y = (
        reader.permute(f"{node.name}_{i}", value, [have.index(n) for n in want])
        for i, (value, have, want) in enumerate(zip(operands, names, wanted, strict=True))
    )
    made = [*batch, *rows, *columns]
    dims = [made.index(n) for n in out]
    if dims == sorted(dims):
        return reader.add(node, "matmul", [x, y])
    product = reader.add(node, "matmul", [x, y], name=f"{node.name}_product",
                         shape=(*x.shape[:-1], y.shape[-1]))  # fmt: skip
    return reader.permute(node, product, dims)


def _weighted(
    reader: Reader, node: fx.Node, x: Node, have: str, weight: Tensor, names: str, out: str
) -> Node | None:
    """einsum("have,names->out") of an activation and a parameter: a linear layer of the axes that
    both have, between moves."""
    inner = [n for n in have if n in names]
    kept = [n for n in have if n not in names]
    columns = [n for n in names if n not in have]
    if not inner or not columns or kept[:1] != [have[0]]:  # the batch stays in its place
        return None
    if sorted(out) != sorted([*kept, *columns]):  # an axis of both stays: many products
        return None
    turned = weight.permute([names.index(n) for n in (*columns, *inner)])
    sizes = turned.shape[: len(columns)]
    matrix = turned.reshape(prod(sizes), -1)
    if matrix.data_ptr() != weight.data_ptr():  # training would not find it in a copy
        return None
    value = reader.permute(f"{node.name}_inner", x, [have.index(n) for n in (*kept, *inner)])
    shape = (*value.shape[: len(kept)], matrix.shape[1])
    joined = reader.reshape(f"{node.name}_joined", value, shape)
    if joined is None:
        return None
    y = reader.add(node, "linear", [joined], name=f"{node.name}_product",
                   tensors={"weight": matrix}, shape=(*shape[:-1], len(matrix)))  # fmt: skip
    apart = reader.reshape(f"{node.name}_apart", y, (*y.shape[:-1], *sizes))
    if apart is None:
        return None
    made = [*kept, *columns]
    return reader.permute(node, apart, [made.index(n) for n in out])
