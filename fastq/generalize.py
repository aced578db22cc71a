"""What the graphs of two examples have in common: a graph for any size.

A number that is the same in both is the network's, one that follows the examples' sizes becomes a
`Size`; graphs that differ in anything else are refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastq.followed import TwoExamples
from fastq.graph import Graph, Node
from fastq.layout import Ref
from fastq.paddings import padded_to
from fastq.read import CannotCapture
from fastq.sizes import Shapes, Size, has_size

# Operations whose arguments may follow the input's size, as float operators of torch: operation ->
# torch's operator, and our attributes that are its arguments, in order. Weights, if there are any,
# have one size.
FOLLOWING = {
    "slice": ("aten.slice.Tensor", ("dim", "start", "end", "step")),
    "rms_norm": ("aten.rms_norm.default", ("shape", "weight", "eps")),
    "layer_norm": ("aten.layer_norm.default", ("shape", "weight", "bias", "eps")),
}


# of the whole image: "F.max_pool1d(x, x.size(2))"
WHOLE = {"max_pool2d": "adaptive_max_pool2d", "avg_pool2d": "adaptive_avg_pool2d"}


def generalize(first: Graph, second: Graph, shapes: Shapes, shapes_too: Shapes) -> None:
    """In `first`, makes a `Size` of each number that follows the example's sizes. Afterwards it is
    the graph of both.

    shapes, shapes_too  of the inputs of the first and of the second example.
    Raises CannotCapture for any other difference.
    """
    if len(first.nodes) != len(second.nodes):
        raise CannotCapture("the graph depends on the size of the input")
    examples = TwoExamples(first, (shapes, shapes_too))
    pairs = dict(zip(first.nodes, second.nodes, strict=True))
    for one, two in pairs.items():
        inputs = [pairs.get(node) for node in one.inputs]
        if one.op != two.op or inputs != two.inputs:
            raise CannotCapture(f"{one.name}: the graph depends on the size of the input")
        _join(examples, one, two)
        for key, tensor in one.tensors.items():
            if not equal(tensor, two.tensors[key]):
                raise CannotCapture(f"{one.name}: {key} depends on the size of the input")
        examples.earlier.append((one, two))
    if len(first.outputs) != len(second.outputs):
        raise CannotCapture("the number of outputs depends on the size of the input")
    for i, (out, out_too) in enumerate(zip(first.outputs, second.outputs, strict=True)):
        if isinstance(out, Node):
            if pairs[out] is not out_too:
                raise CannotCapture(f"output {i} depends on the size of the input")
        else:
            first.outputs[i] = _joined(examples, f"output {i}", out, out_too)


def _join(examples: TwoExamples, one: Node, two: Node) -> None:
    """Makes the attributes of the first node those of both."""
    if one.op in WHOLE and one.attrs != two.attrs and _is_whole(one) and _is_whole(two):
        one.op, one.attrs = WHOLE[one.op], {"output_size": (1, 1)}
        return
    if one.op == "reshape":
        one.attrs["groups"] = _joined_groups(examples, one, two)
        return
    if one.op in WHOLE.values():
        one.attrs, two.attrs = _pooled_to(one, two), _pooled_to(two, one)
    elif one.op == "pad":
        found = padded_to(examples, one, two)
        one.attrs, two.attrs = found or one.attrs, found or two.attrs
    elif "size" in one.attrs:
        one.attrs["size"] = two.attrs["size"] = _size_like(examples, one, two)
    one.attrs = _joined(examples, one.name, one.attrs, two.attrs)
    if one.op in FOLLOWING and has_size(one.attrs) and not one.tensors:
        target, arguments = FOLLOWING[one.op]
        args = (Ref(0), *(one.attrs.get(key) for key in arguments))
        one.op, one.attrs = "aten", {"target": target, "args": args, "kwargs": {}}
    if one.op != "aten" and has_size({**one.attrs, "size": None}):
        raise CannotCapture(f"{one.name}: {one.op} depends on the size of the input")


def _joined(examples: TwoExamples, name: str, one: Any, two: Any) -> Any:
    """What is `one` in the first example and `two` in the second."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: _joined(examples, name, one[key], two[key]) for key in one}
    if isinstance(one, list | tuple) and type(one) is type(two) and len(one) == len(two):
        return type(one)(_joined(examples, name, a, b) for a, b in zip(one, two, strict=True))
    if type(one) is type(two) and (one == two or one is two):
        return one
    if type(one) is int and type(two) is int:
        size = examples.followed(one, two) or examples.like_before(name, one, two)
        if size is not None:
            return size
    raise CannotCapture(f"{name}: {one} and {two} for two sizes of the input")


def _is_whole(node: Node) -> bool:
    """Whether a pooling has one window, which is all of its image."""
    pool = node.attrs["pool"]
    window = pool["kernel_size"] == node.inputs[0].shape[2:]
    return bool(window and not any(pool["padding"]) and pool.get("divisor_override") is None)


def _pooled_to(node: Node, other: Node) -> dict[str, Any]:
    """The attributes of an adaptive pooling: a size that is the input's in this example, None, but
    not in the other one, is a number that the input had by chance."""
    sizes = zip(node.attrs["output_size"], other.attrs["output_size"], node.inputs[0].shape[2:],
                strict=True)  # fmt: skip
    return {
        **node.attrs,
        "output_size": tuple(n if a is None and b == n else a for a, b, n in sizes),
    }


def _size_like(examples: TwoExamples, one: Node, two: Node) -> dict[str, Any]:
    """attrs["size"] of what resizes an image to the size of a value before it: one that had that
    size in both examples."""
    size: dict[str, Any] = one.attrs["size"]
    wanted, wanted_too = (node.attrs["size"].get("size") for node in (one, two))
    if wanted == wanted_too:
        return size
    return {"size": examples.image_before(one.name, (wanted, wanted_too))}


def _joined_groups(examples: TwoExamples, one: Node, two: Node) -> Any:
    """The groups of a reshape: a size that differs becomes None, "what is left" of its group. Where
    several differ, as the height and width that tokens become again, the first does, and the others
    follow the input."""
    name, groups = one.name, []
    for (axes, sizes), (axes_too, sizes_too) in zip(
        *(node.attrs["groups"] for node in (one, two)), strict=True
    ):
        if axes != axes_too or len(sizes) != len(sizes_too):
            raise CannotCapture(f"{name}: the shape depends on the size of the input")
        parts: list[int | Size | None] = []
        for a, b in zip(sizes, sizes_too, strict=True):
            if a == b:
                parts.append(a)
            elif None not in parts:
                parts.append(None)
            else:
                size = examples.like_before(name, a, b) or examples.followed(a, b)
                if size is None:
                    raise CannotCapture(f"{name}: two sizes that may vary in one group of axes")
                parts.append(size)
        groups.append((axes, tuple(parts)))
    return tuple(groups)


def equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    same = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
    return same or torch.equal(one.nan_to_num(), two.nan_to_num())
