"""What the graphs of two examples have in common: a graph for any size.

A number that is the same in both is the network's, one that follows the examples' sizes becomes a
`Size`; graphs that differ in anything else are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastq.examples import BATCHES
from fastq.extents import size_along
from fastq.graph import Graph, Node
from fastq.layout import Ref
from fastq.read import CannotCapture
from fastq.sizes import Shape, Shapes, Size, sized


class Ambiguous(CannotCapture):
    """Two values or more had the size that another is given, in both examples."""

    def __init__(self, name: str, sizes: Sequence[Sequence[Any]]) -> None:
        super().__init__(f"{name}: it has the size of one value or of another one")
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
            size = _followed(one, two, shapes, shapes_too) or like_before(name, one, two)
            if size is not None:
                return size
        raise CannotCapture(f"{name}: {one} and {two} for two sizes of the input")

    def like_before(name: str, one: int, two: int) -> Size | None:
        return _size_of(first.inputs, (one, two), earlier, (shapes, shapes_too), name)

    if len(first.nodes) != len(second.nodes):
        raise CannotCapture("the graph depends on the size of the input")
    pairs = dict(zip(first.nodes, second.nodes, strict=True))
    earlier: list[tuple[Node, Node]] = []
    for one, two in pairs.items():
        inputs = [pairs.get(node) for node in one.inputs]
        if one.op != two.op or inputs != two.inputs:
            raise CannotCapture(f"{one.name}: the graph depends on the size of the input")
        if one.op in WHOLE and one.attrs != two.attrs and _is_whole(one) and _is_whole(two):
            one.op, one.attrs = WHOLE[one.op], {"output_size": (1, 1)}
        elif one.op == "reshape":
            one.attrs["groups"] = _joined_groups(one, two, like_before, (shapes, shapes_too))
        else:
            if one.op in WHOLE.values():
                one.attrs, two.attrs = _pooled_to(one, two), _pooled_to(two, one)
            if "size" in one.attrs:
                size = _size_like(first.inputs, one, two, pairs, shapes, shapes_too)
                one.attrs["size"] = two.attrs["size"] = size
            elif one.op == "pad":
                found = _padded_to(first, one, two, pairs, shapes, shapes_too)
                one.attrs, two.attrs = found or one.attrs, found or two.attrs
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
        earlier.append((one, two))
    if len(first.outputs) != len(second.outputs):
        raise CannotCapture("the number of outputs depends on the size of the input")
    for i, (one, two) in enumerate(zip(first.outputs, second.outputs, strict=True)):
        if isinstance(one, Node):
            if pairs[one] is not two:
                raise CannotCapture(f"output {i} depends on the size of the input")
        else:
            first.outputs[i] = joined(f"output {i}", one, two)


# of the whole image: "F.max_pool1d(x, x.size(2))"
WHOLE = {"max_pool2d": "adaptive_max_pool2d", "avg_pool2d": "adaptive_avg_pool2d"}


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
    found = _sizes_before(inputs, one, pairs, (wanted, wanted_too), (shapes, shapes_too))
    return {"size": found}


def _sizes_before(
    inputs: Sequence[Node],
    one: Node,
    pairs: dict[Node, Node],
    sizes: tuple[Shape, Shape],
    examples: tuple[Shapes, Shapes],
    but: Sequence[int | Size | None] = (),
) -> tuple[int | Size, ...]:
    """The sizes of a value before this one, along its axes from 2 on, other than `but`: one that
    had these sizes in both examples. Raises CannotCapture where there is none, Ambiguous where
    there are others."""
    wanted, wanted_too = sizes
    values, ends = [*pairs], [*enumerate(zip(wanted, wanted_too, strict=True), 2)]
    found: list[tuple[int | Size, ...]] = []
    for value in values[: values.index(one)]:
        if value.shape[2:] != wanted or pairs[value].shape[2:] != wanted_too:
            continue
        along = [a if a == b else size_along(inputs, value, axis) for axis, (a, b) in ends]
        known = tuple(s for s in along if s is not None)
        told = [tuple(sized(known, of)) for of in examples]
        if told == [tuple(wanted), tuple(wanted_too)] and not any(
            _same_sizes(known, other, examples) for other in (*found, but)
        ):
            found.append(known)
    if not found:
        raise CannotCapture(f"{one.name}: it is resized to {wanted} and {wanted_too}")
    if len(found) > 1:
        raise Ambiguous(one.name, found)
    return found[0]


SHARES = (1, 1), (0, 1), (1, 0)  # of what is put before and after, see steps.pad_widths
MULTIPLES = range(2, 129)  # that a size may be padded to


def _padded_to(
    first: Graph, one: Node, two: Node, pairs: dict[Node, Node], shapes: Shapes, shapes_too: Shapes
) -> dict[str, Any] | None:
    """The attributes of what is padded up to a size: that of a value before it, as a U-Net's
    decoder does where an odd size was halved, or a multiple of a number. None if it is padded by
    numbers; CannotCapture, Ambiguous where that is not known."""
    (x,), rank, same = one.inputs, len(one.shape), one.attrs == two.attrs
    given, given_too = one.attrs["pad"], two.attrs["pad"]
    if len(given) != len(given_too) or len(given) > 2 * (rank - 2):
        return None
    wanted, examples = (one.shape[2:], two.shape[2:]), (shapes, shapes_too)
    own = [size_along(first.inputs, x, axis) for axis in range(2, rank)]
    widths = [0] * (rank - 2 - len(given) // 2) + [sum(given[i : i + 2]) for i in
                                                   range(len(given) - 2, -1, -2)]  # fmt: skip
    by_numbers = [s if s is None else s.plus(n) for s, n in zip(own, widths, strict=True)]
    sizes = None if same else _windowed(first, one, own, wanted, examples)
    try:
        sizes = sizes or _sizes_before(
            first.inputs, one, pairs, wanted, examples, by_numbers if same else ()
        )
    except Ambiguous:
        raise
    except CannotCapture:
        if same:
            return None
        sizes = _multiples(one, own, wanted, examples)
    if same and any(given):  # to the size of a value, by chance by numbers; or the other way round
        raise Ambiguous(one.name, [sizes, [s for s in by_numbers if s is not None]])
    pad: list[int] = []
    to: list[int | Size | None] = [None] * (rank - 2)
    for at in range(0, len(given), 2):
        axis = rank - 1 - at // 2
        sides, sides_too = given[at : at + 2], given_too[at : at + 2]
        if one.shape[axis] == two.shape[axis] and sides == sides_too:
            pad += sides
            continue
        shares = [
            (before, after)
            for before, after in SHARES
            if all(a == (a + b) * before // (before + after) for a, b in (sides, sides_too))
        ]
        if not shares:
            raise CannotCapture(f"{one.name}: padding {sides} and {sides_too} for two sizes")
        pad += shares[0]
        to[axis - 2] = sizes[axis - 2]
    return {**one.attrs, "pad": tuple(pad), "size": {"size": tuple(to)}}


Sizes = tuple[int | Size, ...]


def _rounded_up(
    own: Sequence[Size | None],
    steps: Sequence[int],
    more: Sequence[int],
    wanted: tuple[Shape, Shape],
    examples: tuple[Shapes, Shapes],
) -> Sizes | None:
    """own rounded up to multiples of `steps`, and `more`; None unless that is what is wanted."""
    sizes: list[int | Size] = []
    for size, step, add, a, b in zip(own, steps, more, *wanted, strict=True):
        over = None if size is None else size.plus(step - 1).over(step)
        if a != b and over is None:
            return None
        sizes.append(a if over is None else over.times(step).plus(add))
    told = [tuple(sized(tuple(sizes), of)) for of in examples]
    return tuple(sizes) if told == [tuple(w) for w in wanted] else None


def _windowed(
    graph: Graph,
    one: Node,
    own: Sequence[Size | None],
    wanted: tuple[Shape, Shape],
    examples: tuple[Shapes, Shapes],
) -> Sizes | None:
    """What TensorFlow's "same" pads to: as many windows with a stride as there are strides."""
    takers = [node for node in graph.nodes if one in node.inputs]
    if len(takers) != 1:
        return None
    (taker,) = takers
    if taker.op == "conv2d":
        a, kernel = taker.attrs, taker.tensors["weight"].shape[2:]
    elif taker.op in ("max_pool2d", "avg_pool2d"):
        a = taker.attrs["pool"]
        kernel = a["kernel_size"]
    else:
        return None
    strides, dilation = a.get("stride") or kernel, a.get("dilation", (1, 1))
    if max(strides) == 1:
        return None
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    more = [span - stride for span, stride in zip(spans, strides, strict=True)]
    return _rounded_up(own, strides, more, wanted, examples)


def _multiples(
    one: Node,
    own: Sequence[Size | None],
    wanted: tuple[Shape, Shape],
    examples: tuple[Shapes, Shapes],
) -> Sizes:
    """The next multiple of a number, along all axes."""
    none = [0] * len(own)
    rounded = (_rounded_up(own, [m] * len(own), none, wanted, examples) for m in MULTIPLES)
    found = [sizes for sizes in rounded if sizes is not None]
    if not found:
        raise CannotCapture(f"{one.name}: it is padded to {wanted[0]} and {wanted[1]}")
    if len(found) > 1:
        raise Ambiguous(one.name, found)
    return found[0]


def _of_first(size: Size, shapes: tuple[Shapes, Shapes]) -> Size:
    """The same of the first input that has as many places there in both examples."""
    counts = [of[size.input][size.axis] for of in shapes]
    for number, pair in enumerate(zip(*shapes, strict=True)):
        for axis, both in enumerate(zip(*pair, strict=True)):
            if [*both] == counts and axis == size.axis:
                return replace(size, input=number)
    return size


def _same_sizes(
    one: Sequence[int | Size | None],
    two: Sequence[int | Size | None],
    shapes: tuple[Shapes, Shapes],
) -> bool:
    """Whether they are the same for whatever input; of examples of multiples of 32, which are tried
    where the network takes no others, for multiples of 32."""
    if len(one) != len(two):
        return False
    for a, b in zip(one, two, strict=True):
        if a == b:
            continue
        if isinstance(a, Size) and isinstance(b, Size):
            if (a.input, a.axis) != (b.input, b.axis):
                return False
            shape = [(0,) * a.axis] * a.input
            whole = all(of[a.input][a.axis] % MULTIPLE == 0 for of in shapes)
            if any(
                a.of([*shape, (0,) * a.axis + (n,)]) != b.of([*shape, (0,) * a.axis + (n,)])
                for n in range(0, PERIOD, MULTIPLE if whole else 1)
            ):
                return False
        elif a != b:
            return False
    return True


# Two formulas are compared for so many sizes. They repeat after as many as their strides, most of
# which divide this.
PERIOD = 2**11
MULTIPLE = 32


def _joined_groups(
    one: Node,
    two: Node,
    like_before: Callable[[str, int, int], Size | None],
    shapes: tuple[Shapes, Shapes],
) -> Any:
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
                size = like_before(name, a, b) or _followed(a, b, *shapes)
                if size is None:
                    raise CannotCapture(f"{name}: two sizes that may vary in one group of axes")
                parts.append(size)
        groups.append((axes, tuple(parts)))
    return tuple(groups)


def _size_of(
    inputs: Sequence[Node],
    wanted: tuple[int, int],
    earlier: Sequence[tuple[Node, Node]],
    shapes: tuple[Shapes, Shapes],
    name: str,
) -> Size | None:
    """The size that an axis of a value before had in both examples, by those of the inputs; None if
    there is none. Inputs of the same sizes in both, as tokens and their mask, are as one."""
    found: list[Size] = []
    for value, other in earlier:
        for axis, pair in enumerate(zip(value.shape, other.shape, strict=True)):
            size = size_along(inputs, value, axis) if pair == wanted else None
            if size is None or tuple(map(size.of, shapes)) != wanted:
                continue
            size = _of_first(size, shapes)
            if not any(_same_sizes([size], [one], shapes) for one in found):
                found.append(size)
    if len(found) > 1:
        raise Ambiguous(name, [[size] for size in found])
    return found[0] if found else None


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
