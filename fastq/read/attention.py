"""Softmax and attention: the masks in their scores become an operand of the softmax."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor, fx

from fastq.graph import Node
from fastq.layout import Ref
from fastq.masks import LOWEST, is_low, is_mask, operand, operator_of, possible_values
from fastq.read.exported import Arguments, ranked_shape
from fastq.read.reader import Reader, reads
from fastq.sizes import Shape


@reads("softmax")
def softmax(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    if not x.shape:
        return None
    dim = a["dim"] % len(x.shape)
    if dim == len(x.shape) - 1 and x.op == "reshape" and x.shape[-1:] == x.inputs[0].shape[-1:]:
        # windows of an image apart from the batch, where each has a mask of its own
        scores = x.inputs[0]
        if _without_mask(reader, node, scores) is not None:
            made = _masked(reader, node, f"{node.name}_apart", scores, len(scores.shape) - 1)
            return reader.add(node, "reshape", [made], attrs=x.attrs)
    return _masked(reader, node, node.name, x, dim)


@reads("scaled_dot_product_attention")
def attention(reader: Reader, node: fx.Node, q: Node, a: Arguments) -> Node | None:
    k, v, mask = a["key"], a["value"], a.get("attn_mask")
    if not (isinstance(k, Node) and isinstance(v, Node)) or a.get("enable_gqa"):
        return None
    scale = q.shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]
    if a.get("dropout_p") or not q.shape[:-2] == k.shape[:-2] == v.shape[:-2] or not scale > 0:
        return None
    rank, shape = len(k.shape), (*q.shape[:-1], k.shape[-2])
    masks = [_causal(reader, node, shape)] if a.get("is_causal") else []
    if isinstance(mask, Tensor) and mask.dtype is torch.bool and bool(mask.all()):
        mask = None
    if mask is not None:
        if not _covers(ranked_shape(mask, rank), shape):
            return None
        if _is_bool(reader, mask):
            found = _mask(reader, node, mask, shape)
            if found is None:
                return None
            masks.append(found)
    turned = reader.permute(f"{node.name}_key", k, (*range(rank - 2), rank - 1, rank - 2))
    scores = reader.add(node, "matmul", [q, turned], name=f"{node.name}_scores", shape=shape,
                        attrs={"factor": float(scale)})  # fmt: skip
    if mask is not None and not masks:
        name = f"{node.name}_added"
        if isinstance(mask, Tensor):
            added = reader.constant(name, mask, ranked_shape(mask, rank))
        else:
            added = reader.ranked(name, mask, rank)
        scores = reader.add(f"{node.name}_masked", "add", [scores, added], shape=shape)
    weights = _masked(reader, node, f"{node.name}_weights", scores, rank - 1, masks)
    return reader.add(node, "matmul", [weights, v])


def _masked(
    reader: Reader, node: fx.Node, name: str, x: Node, dim: int, masks: Sequence[Node] = ()
) -> Node:
    """softmax(x) of what all masks take: these, each 1.0 and 0.0, and those that x has in it.
    Where they take nothing the weights are 0, or the same where the masks are finite: the
    least float32, which most networks have there, takes all of a score."""
    masks, uniform = list(masks), not masks
    while dim == len(x.shape) - 1 and (found := _without_mask(reader, node, x)) is not None:
        x = found[0]
        masks.append(found[1])
        uniform &= found[2]
    taken = masks[:1]
    for mask in masks[1:]:
        shape = tuple(map(max, taken[0].shape, mask.shape))
        both = [*taken, mask]
        taken = [reader.aten(f"{node.name}_mask", "mul.Tensor", both, (Ref(0), Ref(1)), shape)]
    attrs = {"dim": dim, "uniform": bool(taken) and uniform}
    return reader.add(node, "softmax", [x, *taken], name=name, attrs=attrs, shape=x.shape)


def _without_mask(reader: Reader, node: fx.Node, x: Node) -> tuple[Node, Node, bool] | None:
    """(scores, mask, whether what it leaves out is finite) if x is scores and a mask."""
    if x.op == "add" and x.attrs.get("alpha", 1) in (1, -1):
        return _without_added(reader, node, x)
    if x.op == "aten" and operator_of(x) in ("masked_fill", "where"):
        return _without_filled(reader, node, x)
    return None


def _without_added(reader: Reader, node: fx.Node, x: Node) -> tuple[Node, Node, bool] | None:
    """x is a sum."""
    sides = [x.inputs, x.inputs[::-1]]
    if x.attrs.get("alpha") == -1:
        sides = [[x.inputs[0], _negative(reader, x.inputs[1])]]
    for scores, added in sides:
        if scores.op == "constant" or scores.shape != x.shape:
            continue
        constant = added.tensors["value"] if added.op == "constant" else None
        if is_mask(added, reader.flags):
            mask = _mask(reader, node, added if constant is None else constant, x.shape)
            return None if mask is None else (scores, mask, _finite(reader, added))
        if constant is None and _may_mask(reader, added):
            mask = _mask(reader, node, added, x.shape)
            if mask is None:
                return None
            bias, finite = _without_lowest(reader, added), True
        elif constant is not None and bool((constant <= LOWEST).any()):
            hidden = constant <= LOWEST  # a bias as well
            mask = _mask(reader, node, ~hidden, x.shape)
            if mask is None:
                return None
            bias = reader.constant(f"{added.name}_bias", constant.masked_fill(hidden, 0.0))
            finite = bool(constant.isfinite().all())
        else:
            continue
        return reader.add(f"{x.name}_bias", "add", [scores, bias], shape=x.shape), mask, finite
    return None


def _without_filled(reader: Reader, node: fx.Node, x: Node) -> tuple[Node, Node, bool] | None:
    """x is what torch.where or masked_fill made."""
    taken, first, second = (operand(x, value) for value in x.attrs["args"])
    if operator_of(x) == "masked_fill":
        taken, first, second = first, second, taken
    if not _is_bool(reader, taken):
        return None
    for scores, low, hides in ((second, first, True), (first, second, False)):
        if isinstance(scores, Node) and scores.shape == x.shape and is_low(low, reader.flags):
            mask = _mask(reader, node, taken, x.shape, hides)
            return None if mask is None else (scores, mask, _finite(reader, low))
    return None


def _is_bool(reader: Reader, value: Node | Tensor) -> bool:
    return value.dtype is torch.bool if isinstance(value, Tensor) else value in reader.flags


def _negative(reader: Reader, value: Node) -> Node:
    name = f"{value.name}_negative"
    if value.op == "constant":
        return reader.constant(name, -value.tensors["value"])
    return reader.aten(name, "neg.default", [value], (Ref(0),), value.shape)


def _may_mask(reader: Reader, added: Node) -> bool:
    """Whether what is added to scores was not computed by products: it may hold masks."""
    return added not in reader.computed and added not in reader.biases


def _without_lowest(reader: Reader, added: Node) -> Node:
    """What is added to scores, with 0 where it is a mask."""
    name, shape = added.name, added.shape
    hidden = reader.aten(f"{name}_hidden", "le.Scalar", [added], (Ref(0), LOWEST), shape)
    bias = reader.aten(f"{name}_bias", "masked_fill.Scalar", [added, hidden],
                       (Ref(0), Ref(1), 0.0), shape)  # fmt: skip
    reader.biases.add(bias)
    return bias


def _finite(reader: Reader, value: Any) -> bool:
    return -inf not in (possible_values(value, reader.flags) or ())


def _covers(size: Shape, shape: Shape) -> bool:
    """Whether a mask of this size is one of scores of this shape, with all of their keys."""
    along = len(size) == len(shape) and size[-1] == shape[-1]
    return along and all(m in (1, n) for m, n in zip(size, shape, strict=True))


def _mask(
    reader: Reader, node: fx.Node, value: Node | Tensor, shape: Shape, hides: bool = False
) -> Node | None:
    """A mask of scores of this shape as 1.0 and 0.0; `hides`: a bool one says what is left out.
    None for what is no mask."""
    rank = len(shape)
    size = ranked_shape(value, rank)
    if not _covers(size, shape):
        return None
    if rank > 4:  # one for each head too, for then all axes but the batch are one
        if not isinstance(value, Tensor) or size[0] != 1:
            return None
        size = (1, *shape[1:])
    key = (value, size, hides)
    if key not in reader.masks:
        reader.masks[key] = _ones_and_zeros(reader, node, value, size, hides)
    return reader.masks[key]


def _ones_and_zeros(
    reader: Reader, node: fx.Node, value: Node | Tensor, size: Shape, hides: bool
) -> Node:
    if isinstance(value, Tensor):
        takes = value if value.dtype is torch.bool else value > LOWEST
        return reader.constant(f"{node.name}_mask", (takes ^ hides).float().expand(size), size)
    calls: list[tuple[str, tuple[Any, ...]]] = [("to.dtype", (torch.float32,))]
    if value not in reader.flags:
        calls.insert(0, ("gt.Scalar", (LOWEST,)))
    if hides:
        calls.insert(0, ("logical_not.default", ()))
    name, made = f"{value.name}_mask", value
    for target, args in calls:
        made = reader.aten(name, target, [made], (Ref(0), *args), value.shape)
    return reader.ranked(f"{name}_{len(size)}", made, len(size))


def _causal(reader: Reader, node: fx.Node, shape: Shape) -> Node:
    """A mask that leaves out the keys behind each query."""
    size = (*(1 for _ in shape[:-2]), *shape[-2:])
    made = reader.aten(f"{node.name}_ones", "ones.default", [], (size,), size)
    made.attrs["kwargs"] = {"dtype": torch.float32}  # torch's default may be another
    return reader.aten(f"{node.name}_causal", "tril.default", [made], (Ref(0), 0), size)
