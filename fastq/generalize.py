"""What the graphs of two examples have in common: a graph for any size.

A number that is the same in both is the network's, one that follows the examples' sizes becomes a
`Size`; graphs that differ in anything else are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastq.examples import BATCHES
from fastq.extents import size_along
from fastq.graph import Graph, Node
from fastq.layout import Ref
from fastq.read import CannotCapture
from fastq.sizes import Shapes, Size, sized


class Ambiguous(CannotCapture):
    """Two values or more had the size that another is resized to, in both examples."""

    def __init__(self, name: str, sizes: Sequence[Sequence[Any]]) -> None:
        super().__init__(f"{name}: it is resized to the size of one value or of another one")
        self.sizes = sizes

    def told_by(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes tell them apart."""
        numbers = [tuple(sized(size, shapes)) for size in self.sizes]
        return len(set(numbers)) == len(numbers)


# Operations whose arguments may follow the input's size, as float operators of torch: operation ->
# torch's operator, and our attributes that are its arguments, in order. Weights, if there are any,
# have one size.
FOLLOWING = {
    "slice": ("aten.slice.Tensor", ("dim", "start", "end", "step")),
    "rms_norm": ("aten.rms_norm.default", ("shape", "weight", "eps")),
    "layer_norm": ("aten.layer_norm.default", ("shape", "weight", "bias", "eps")),
}


def generalize(first: Graph, second: Graph, shapes: Shapes, shapes_too: Shapes) -> None:
    """In `first`, makes a `Size` of each number that follows the example's sizes. Afterwards it is
    the graph of both.

    shapes, shapes_too  of the inputs of the first and of the second example.
    Raises CannotCapture for any other difference.
    """

    def joined(name: str, one: Any, two: Any) -> Any:
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            return {key: joined(name, one[key], two[key]) for key in one}
        if isinstance(one, list | tuple) and type(one) is type(two) and len(one) == len(two):
            return type(one)(joined(name, a, b) for a, b in zip(one, two, strict=True))
        if type(one) is type(two) and (one == two or one is two):
            return one
        if type(one) is int and type(two) is int:
            size = _followed(one, two, shapes, shapes_too)
            if size is not None:
                return size
        raise CannotCapture(f"{name}: {one} and {two} for two sizes of the input")

    if len(first.nodes) != len(second.nodes):
        raise CannotCapture("the graph depends on the size of the input")
    pairs = dict(zip(first.nodes, second.nodes, strict=True))
    for one, two in pairs.items():
        inputs = [pairs.get(node) for node in one.inputs]
        if one.op != two.op or inputs != two.inputs:
            raise CannotCapture(f"{one.name}: the graph depends on the size of the input")
        if one.op == "reshape":
            groups = (node.attrs["groups"] for node in (one, two))
            one.attrs["groups"] = _joined_groups(one.name, *groups)
        else:
            if "size" in one.attrs:
                size = _size_like(first.inputs, one, two, pairs, shapes, shapes_too)
                one.attrs["size"] = two.attrs["size"] = size
            one.attrs = joined(one.name, one.attrs, two.attrs)
            if one.op in FOLLOWING and _has_size(one.attrs) and not one.tensors:
                target, arguments = FOLLOWING[one.op]
                args = (Ref(0), *(one.attrs.get(key) for key in arguments))
                one.op, one.attrs = "aten", {"target": target, "args": args, "kwargs": {}}
            if one.op != "aten" and _has_size({**one.attrs, "size": None}):
                raise CannotCapture(f"{one.name}: {one.op} depends on the size of the input")
        for key, tensor in one.tensors.items():
            if not equal(tensor, two.tensors[key]):
                raise CannotCapture(f"{one.name}: {key} depends on the size of the input")
    if len(first.outputs) != len(second.outputs):
        raise CannotCapture("the number of outputs depends on the size of the input")
    for i, (one, two) in enumerate(zip(first.outputs, second.outputs, strict=True)):
        if isinstance(one, Node):
            if pairs[one] is not two:
                raise CannotCapture(f"output {i} depends on the size of the input")
        else:
            first.outputs[i] = joined(f"output {i}", one, two)


def _size_like(
    inputs: Sequence[Node],
    one: Node,
    two: Node,
    pairs: dict[Node, Node],
    shapes: Shapes,
    shapes_too: Shapes,
) -> dict[str, Any]:
    """attrs["size"] of what resizes an image to the size of a value before it: one that had that
    size in both examples."""
    size: dict[str, Any] = one.attrs["size"]
    wanted, wanted_too = (node.attrs["size"].get("size") for node in (one, two))
    if wanted == wanted_too:
        return size
    values, ends = [*pairs], [*enumerate(zip(wanted, wanted_too, strict=True), 2)]
    found: list[tuple[int | Size, ...]] = []
    for value in values[: values.index(one)]:
        if value.shape[2:] != wanted or pairs[value].shape[2:] != wanted_too:
            continue
        along = [a if a == b else size_along(inputs, value, axis) for axis, (a, b) in ends]
        sizes = tuple(s for s in along if s is not None)
        told = [tuple(sized(sizes, of)) for of in (shapes, shapes_too)]
        if told == [tuple(wanted), tuple(wanted_too)] and not any(
            _same_sizes(sizes, other) for other in found
        ):
            found.append(sizes)
    if not found:
        raise CannotCapture(f"{one.name}: it is resized to {wanted} and {wanted_too}")
    if len(found) > 1:
        raise Ambiguous(one.name, found)
    return {"size": found[0]}


def _same_sizes(one: Sequence[int | Size], two: Sequence[int | Size]) -> bool:
    """Whether they are the same for whatever input."""
    for a, b in zip(one, two, strict=True):
        if a == b:
            continue
        if isinstance(a, Size) and isinstance(b, Size):
            if (a.input, a.axis) != (b.input, b.axis):
                return False
            shape = [(0,) * a.axis] * a.input
            if any(
                a.of([*shape, (0,) * a.axis + (n,)]) != b.of([*shape, (0,) * a.axis + (n,)])
                for n in range(PERIOD)
            ):
                return False
        elif a != b:
            return False
    return True


# Two formulas are compared for so many sizes. They repeat after as many as their strides, most of
# which divide this.
PERIOD = 2**11


def _joined_groups(name: str, one: Any, two: Any) -> Any:
    """The groups of a reshape: a size that differs becomes None, "what is left" of its group."""
    groups = []
    for (axes, sizes), (axes_too, sizes_too) in zip(one, two, strict=True):
        if axes != axes_too or len(sizes) != len(sizes_too):
            raise CannotCapture(f"{name}: the shape depends on the size of the input")
        parts = tuple(a if a == b else None for a, b in zip(sizes, sizes_too, strict=True))
        if parts.count(None) > 1:
            raise CannotCapture(f"{name}: two sizes that may vary in one group of axes")
        groups.append((axes, parts))
    return tuple(groups)


def _followed(one: int, two: int, shapes: Shapes, shapes_too: Shapes) -> Size | None:
    """What is `one` for an example of the first shapes and `two` for the second; or None."""
    grown = [
        (number, axis, a, b)
        for number, pair in enumerate(zip(shapes, shapes_too, strict=True))
        for axis, (a, b) in enumerate(zip(*pair, strict=True))
        if a != b
    ]
    for number, axis, a, b in grown:
        if one * b == two * a and one % a == 0:
            return Size(number, axis, one // a)
    for number, axis, a, b in grown:
        factor, rest = divmod(two - one, b - a)
        # more would be found for squares as well
        if rest == 0 and factor in (1, 2) and (a, b) != BATCHES:
            return Size(number, axis, factor, one - factor * a)
    return None


def _has_size(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_has_size, value))
    return isinstance(value, Size)


def equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    same = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
    return same or torch.equal(one.nan_to_num(), two.nan_to_num())
