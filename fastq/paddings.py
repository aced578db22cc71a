"""Paddings that follow a network's input: up to the size of another value, or to a multiple."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastq.followed import Ambiguous, Sizes, TwoExamples
from fastq.graph import Node
from fastq.read import CannotCapture
from fastq.sizes import Shape, Size, parted, sides_of

SHARES = (1, 1), (0, 1), (1, 0)  # of what is put before and after, see `parted`
MULTIPLES = range(2, 129)  # that a size may be padded to


def padded_to(examples: TwoExamples, one: Node, two: Node) -> dict[str, Any] | None:
    """The attributes of what is padded up to a size: that of a value before it, as a U-Net's
    decoder does where an odd size was halved, or a multiple of a number. None if it is padded by
    numbers; CannotCapture, Ambiguous where that is not known."""
    given, given_too = (_by_axis(node) for node in (one, two))
    if given.keys() != given_too.keys() or min(given, default=2) < 2:
        return None
    (x,), same, axes = one.inputs, given == given_too, range(2, len(one.shape))
    wanted = one.shape[2:], two.shape[2:]
    own = [examples.along(x, axis) for axis in axes]
    # the same numbers in both may be the network's own, or those of a value's size by chance
    by_numbers = [
        size and size.plus(sum(given.get(axis, (0, 0))))
        for axis, size in zip(axes, own, strict=True)
    ]
    sizes = None if same else _windowed(examples, one, own, wanted)
    try:
        but = by_numbers if same else ()
        sizes = sizes or examples.image_before(one.name, wanted, but)
    except Ambiguous:
        raise
    except CannotCapture:
        if same:
            return None
        padded = [any((*given.get(a, ()), *given_too.get(a, ()))) for a in axes]
        sizes = _multiples(examples, one.name, own, padded, wanted)
    if same and any(map(any, given.values())):
        raise Ambiguous(one.name, [sizes, [size for size in by_numbers if size is not None]])
    to: list[int | Size | None] = [None] * len(axes)
    for axis, sides in given.items():
        if one.shape[axis] != two.shape[axis] or sides != given_too[axis]:
            given[axis] = _shares(one.name, sides, given_too[axis])
            to[axis - 2] = sizes[axis - 2]
    pad = tuple(side for axis in sorted(given, reverse=True) for side in given[axis])
    return {**one.attrs, "pad": pad, "size": {"size": tuple(to)}}


def _by_axis(node: Node) -> dict[int, tuple[int, int]]:
    """Axis -> what is put before and after it."""
    pad, rank = node.attrs["pad"], len(node.shape)
    first = rank - len(pad) // 2
    return dict(enumerate(sides_of(pad, rank)[first:], first))


def _shares(name: str, *sides: tuple[int, int]) -> tuple[int, int]:
    """How what an axis lacks was put before and after it, in both examples."""
    for shares in SHARES:
        if all(parted(sum(one), shares) == one for one in sides):
            return shares
    raise CannotCapture(f"{name}: padding {sides[0]} and {sides[1]} for two sizes")


def _rounded_up(
    examples: TwoExamples,
    own: Sequence[Size | None],
    steps: Sequence[int],
    more: Sequence[int],
    wanted: tuple[Shape, Shape],
) -> Sizes | None:
    """own rounded up to multiples of `steps`, and `more`; None unless that is what is wanted."""
    sizes: list[int | Size] = []
    for size, step, add, a, b in zip(own, steps, more, *wanted, strict=True):
        over = None if size is None else size.plus(step - 1).over(step)
        if a != b and over is None:
            return None
        sizes.append(a if over is None else over.times(step).plus(add))
    return tuple(sizes) if examples.tell(sizes, wanted) else None


def _windowed(
    examples: TwoExamples, one: Node, own: Sequence[Size | None], wanted: tuple[Shape, Shape]
) -> Sizes | None:
    """What TensorFlow's "same" pads to: as many windows with a stride as there are strides."""
    takers = [node for node in examples.graph.nodes if one in node.inputs]
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
    return _rounded_up(examples, own, strides, more, wanted)


def _multiples(
    examples: TwoExamples,
    name: str,
    own: Sequence[Size | None],
    padded: Sequence[bool],
    wanted: tuple[Shape, Shape],
) -> Sizes:
    """The next multiple of one number, along the axes that are padded."""
    none = [0] * len(own)
    steps = ([m if more else 1 for more in padded] for m in MULTIPLES)
    rounded = (_rounded_up(examples, own, step, none, wanted) for step in steps)
    found = [sizes for sizes in rounded if sizes is not None]
    if not found:
        raise CannotCapture(f"{name}: it is padded to {wanted[0]} and {wanted[1]}")
    if len(found) > 1:
        raise Ambiguous(name, found)
    return found[0]
