"""From an unmodified nn.Module to a `Graph`, by torch.export.

A capture is of one example and has its sizes in it. To know which of them belong to the network and
which to the example, the network is captured again with another batch size and, for images and
sequences, another extent: what is the same in both is the network's, a number that follows the
example's sizes becomes a `Size`, and a graph that differs in anything else holds for that extent
only. What is computed of parameters alone becomes a constant, where it is the same in both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree

from fastq.extents import size_along
from fastq.graph import Graph, Node, sizes_of
from fastq.layout import Ref
from fastq.read import CannotCapture, Folded, Indirect, Reader
from fastq.sizes import Size, Sizes, sized
from fastq.trace import duplicate, quiet, twin


@dataclass(frozen=True)
class Captured:
    """A graph, how its flat inputs and outputs are arranged, and which extents it holds for.

    arguments           for each leaf of (args, kwargs) its input node, or the leaf itself if it
                        is no tensor. "free" in its attrs are the axes that may have other sizes,
                        "batch" is the one that grows with the batch, if it is not the first;
                        "single" one has one place along its first axis, for a larger batch.
    in_spec, out_spec   pytree specs of (args, kwargs) and of the result.
    extents             the axes of an image that may have other sizes; if any may, sequences of
                        other lengths may go through. The batch size may always differ, of inputs
                        that have a batch.
    """

    graph: Graph
    arguments: tuple[Any, ...]
    in_spec: Any
    out_spec: Any
    extents: tuple[int, ...]

    def __deepcopy__(self, memo: dict[int, Any]) -> Captured:
        graph, arguments = copy.deepcopy((self.graph, self.arguments), memo)
        return replace(self, graph=graph, arguments=arguments)  # specs do not change


def capture(
    model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> Captured:
    """The graph of `model(*args, **kwargs)`, in eval mode, for any batch size.

    Raises CannotCapture when torch.export cannot follow the model, or when the graph depends on
    the batch size in a way that has no name here.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    failed: CannotCapture | None = None
    for way in _ways_of_batches(leaves):
        try:
            captured = _capture(model, way, spec)
            _verify(captured, model, way)
            return captured
        except CannotCapture as error:
            failed = failed or error
        except Exception as error:  # torch.export raises whatever its innards or the model raised
            message = str(error).strip().splitlines() or [""]
            reason = CannotCapture(f"{type(error).__name__}: {message[0]:.160}")
            reason.__cause__ = error
            failed = failed or reason
    raise failed or AssertionError("there is one way at least")


def _verify(captured: Captured, model: nn.Module, way: Leaves) -> None:
    """CannotCapture if the example, of its own sizes but for a large batch, has another result: the
    model branches on a size, or keeps a state that is no buffer."""
    args, kwargs = pytree.tree_unflatten([_few(leaf, way) for leaf in way], captured.in_spec)
    copied = duplicate(model, {id(one): one for one in model.parameters()})
    called = partial(copied, *args, **kwargs)

    def run(seed: int, network: Callable[[], Any]) -> list[Any]:
        plain = torch.autocast("cpu", enabled=False)
        with quiet(), torch.no_grad(), plain, torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return pytree.tree_leaves(network())

    masks = {node.inputs[1] for node in captured.graph if node.op == "softmax" and node.inputs[1:]}
    blind = False

    def watch(node: Node, value: Any) -> None:
        nonlocal blind
        blind |= node in masks and bool((value == 0).all(-1).any())

    once = run(0, called)
    if not _alike(once, run(0, called)):
        raise CannotCapture("the model gives other values when it is called again: it has a state")
    leaves = captured.in_spec.flatten_up_to((args, kwargs))
    if _alike(once, run(0, lambda: captured.graph.run(leaves, watch))):
        return
    random = not _alike(once, run(1, called))
    if not (random or blind):  # of a line that is masked as a whole, each has values of its own
        raise CannotCapture(
            "the model has other values for the example than its graph, which was captured for "
            f"batches of {BATCHES[0]} and {BATCHES[1]}: it may branch on a size"
        )


FEW = 16  # of a batch


def _few(leaf: _Leaf, way: Leaves) -> Any:
    """The first ones of an example of one input."""
    x, axis = leaf.x, 0 if leaf.follows is None else 1
    if not isinstance(x, Tensor) or x.dim() == 0 or leaf.follows == 1 or leaf.like is not None:
        return x
    return x.narrow(axis, 0, FEW) if x.shape[axis] == len(_first(way)) > FEW else x


UNLIKE, TINY = 1e-2, 1e-6  # of results that may only be rounded otherwise


def _alike(one: Sequence[Any], two: Sequence[Any]) -> bool:
    """Whether results are the same but for rounding, in shapes and where the first are finite."""
    if len(one) != len(two):
        return False
    for x, y in zip(one, two, strict=True):
        if not isinstance(x, Tensor):
            if type(x) is not type(y) or x != y:
                return False
        elif not isinstance(y, Tensor) or x.shape != y.shape or x.dtype != y.dtype:
            return False
        elif x.is_floating_point():
            a, b = (value.double()[x.isfinite()] for value in (x, y))
            if not (a - b).norm() <= UNLIKE * a.norm() + TINY:
                return False
    return True


def _capture(model: nn.Module, leaves: Leaves, spec: Any) -> Captured:
    """`capture` of leaves with their batches where they say."""
    exported: dict[Stretch, _Exported] = {(): _export(model, leaves, spec, BATCHES[0], ())}

    def both(way: Way) -> tuple[_Exported, _Exported] | None:
        """The captures of both examples; None if the model does not take these sizes."""
        before, after = way
        try:
            if before not in exported:
                exported[before] = _export(model, leaves, spec, BATCHES[0], before)
            return exported[before], _export(model, leaves, spec, BATCHES[1], after)
        except Exception:
            if way == SAME:
                raise
            return None

    for ways in (*_stretches(leaves), (SAME,)):
        for way in ways:
            before, after = way
            sizes = _sizes(leaves, BATCHES[0], before), _sizes(leaves, BATCHES[1], after)
            too_short = before and sizes[0][1:] == sizes[1][1:]  # to be shortened
            pair = None if too_short else both(way)
            if pair is None:
                continue
            try:
                graph = _general((pair[0], sizes[0]), (pair[1], sizes[1]))
            except CannotCapture:  # another network for each size: it holds for this one
                if way == SAME:
                    raise
                break
            except Exception:  # more positions than the network has
                if way == SAME:
                    raise
                continue
            graph.remove_unused()
            arguments = _arguments(graph, leaves, way)
            extents = {dims: axes for dims, axes, _ in after}.get(4, ())
            return Captured(graph, arguments, spec, pair[0].out_spec, extents)
    raise AssertionError("the last way returns or raises")


def _arguments(graph: Graph, leaves: Sequence[_Leaf], way: Way) -> tuple[Any, ...]:
    """The `arguments` of a Captured: the input nodes know which axes may have other sizes."""
    nodes = iter(graph.inputs)
    arguments = tuple(next(nodes) if isinstance(leaf.x, Tensor) else leaf.x for leaf in leaves)
    for node, leaf in zip(arguments, leaves, strict=True):
        if isinstance(node, Node):
            one, two = (
                _resized(leaf, leaves, batch, stretch).shape
                for batch, stretch in zip(BATCHES, way, strict=True)
            )
            pairs = enumerate(zip(one, two, strict=True))
            node.attrs["real"] = leaf.x.dtype is torch.float32
            node.attrs["free"] = tuple(i for i, (a, b) in pairs if a != b)
            node.attrs["single"] = leaf.x.dim() > 0 and len(leaf.x) == 1 < len(_first(leaves))
            if leaf.follows is not None or leaf.like is not None:
                node.attrs["batch"] = 1 if leaf.follows == 0 else None
    return arguments


class _Leaf(NamedTuple):
    """An example of one input.

    follows  of a state, (layers, B, features), which axis of the first input its axis 1 is as long
             as.
    like     of an input without a batch, for each axis which axis of the first input, but its
             batch, is as long; None: none, or it has a batch.
    """

    x: Any
    follows: int | None = None
    like: tuple[int | None, ...] | None = None


Leaves = list[_Leaf]


def _first(leaves: Sequence[_Leaf]) -> Tensor:
    """The first input that has axes."""
    return next(x for x, *_ in leaves if isinstance(x, Tensor) and x.dim())


def _ways_of_batches(plain: Sequence[Any]) -> list[Leaves]:
    """Which inputs may have a batch, and where: all along their first axis; but for those that have
    another number of places there than the first input; but for first states of recurrent layers,
    whose axis 1 is the batch of (B, ..), or those where it is of (L, B, ..)."""
    tensors = [x for x in plain if isinstance(x, Tensor) and x.dim()]
    ways = [[_Leaf(x) for x in plain]]
    if not tensors:
        return ways
    first = tensors[0]
    others = [x for x in tensors if len(x) != len(first)]  # such as a mask of (T, T)
    if others:
        alone = set(map(id, others))
        ways.append([_Leaf(x, like=_like(x, first) if id(x) in alone else None) for x in plain])
    for axis in range(min(first.dim(), 2)):
        states = [
            _Leaf(x, axis)
            if isinstance(x, Tensor)
            and x is not first
            and x.dim() == 3
            and x.shape[1] == first.shape[axis]
            else _Leaf(x)
            for x in plain
        ]
        ways += [states] * any(leaf.follows is not None for leaf in states)
    return ways


def _like(x: Tensor, first: Tensor) -> tuple[int | None, ...]:
    """`_Leaf.like` of x: the same place where that fits, else the first axis that does."""
    axes = {size: axis for axis, size in reversed([*enumerate(first.shape)]) if axis}
    return tuple(
        i if 0 < i < first.dim() and first.shape[i] == size else axes.get(size)
        for i, size in enumerate(x.shape)
    )


# A size that is k * 5 in one capture and k * 17 in the other follows the batch: it grew by k * 12,
# which none of the numbers in `_stretches` is, nor what strides and upsampling by 2 make of them.
BATCHES = (5, 17)
# (number of axes, the axes that grow, by how much)
Stretch = tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...]
Way = tuple[Stretch, Stretch]  # how the examples of both captures are changed
SAME: Way = ((), ())  # only the batch differs


def _stretches(leaves: Sequence[_Leaf]) -> list[list[Way]]:
    """Ways to change the examples of both captures. Each axis grows by another number, so that it
    is known which one a size follows.

    By an odd number first: a network that pads to even sizes is another one then, and its graph
    holds for one size only. Many networks take multiples of 32 alone, which comes second. Some
    take no longer sequences than the example: shorter ones come last. One that reads the columns of
    an image as a sequence takes any width of one height, or the other way round.
    """
    dims = {leaf.x.dim() for leaf in leaves if isinstance(leaf.x, Tensor)}

    def stretch(
        axis: int, pixels: tuple[int, ...], tokens: tuple[int, ...], of: tuple[int, ...] = (2, 3)
    ) -> Stretch:
        pixels = tuple(pixels[i - 2] for i in of)
        return ((2, (1,), tokens), (3, (axis,), tokens), (4, of, pixels), (5, (2, 3, 4), tokens))

    ways: list[list[Way]] = []
    for axis in (2, 1) if 3 in dims else (2,):  # (B, C, L), then (B, L, C)
        longer = stretch(axis, (65, 67), (7, 11, 13)), stretch(axis, (64, 128), (8, 16, 20))
        ways.append([((), one) for one in longer])
        if dims & {2, 3}:
            shorter = stretch(axis, (1, 2), (-1, -2, -4)), stretch(axis, (65, 67), (-8, -10, -14))
            ways[-1].append(shorter)
    for of in ((3,), (2,)) if 4 in dims else ():
        longer = stretch(2, (65, 67), (7, 11, 13), of), stretch(2, (64, 128), (8, 16, 20), of)
        ways.append([((), one) for one in longer])
    return ways


def _resized(leaf: _Leaf, leaves: Sequence[_Leaf], batch: int, stretch: Stretch) -> Any:
    """An example of another batch size, and of a greater extent."""
    x, follows, like = leaf
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if follows != 1 and like is None:
        axis = 0 if follows is None else 1
        repeats = -(-batch // max(x.shape[axis], 1))
        x = torch.cat([x] * repeats, axis).narrow(axis, 0, batch)
    shown = x if like is None else _first(leaves)
    for dim, axes, more in stretch:
        if dim != shown.dim() or (dim == 2 and shown.is_floating_point()):
            continue
        if follows == 0 or (follows == 1 and axes != (1,)):
            continue
        for axis, count in zip(axes, more, strict=False):
            for own in (axis,) if like is None else [i for i, of in enumerate(like) if of == axis]:
                x = _stretched(x, own, count)
    return x.clone()


def _stretched(x: Tensor, axis: int, count: int) -> Tensor:
    """With so many places more along an axis, or fewer."""
    if count < 0:
        size = x.shape[axis]
        return x.narrow(axis, 0, max(size + count, min(size, 2)))
    return torch.cat([x, x.narrow(axis, 0, 1).expand(*_grown(x.shape, axis, count))], axis)


def _sizes(leaves: Sequence[_Leaf], batch: int, stretch: Stretch) -> Sizes:
    """`sizes_of` an example; 0, which nothing follows, where its inputs have different ones."""
    resized = [
        _resized(leaf, leaves, batch, stretch)
        for leaf in leaves
        if leaf.follows is None and leaf.like is None
    ]
    inputs = [x for x in resized if isinstance(x, Tensor)]
    return tuple(
        size if axis == 0 or all(x.shape[axis] == size for x in inputs if x.dim() > axis) else 0
        for axis, size in enumerate(sizes_of(inputs))
    )


def _grown(shape: Sequence[int], axis: int, more: int) -> list[int]:
    sizes = list(shape)
    sizes[axis] = more
    return sizes


class _Exported:
    """What torch.export made of a model."""

    def __init__(self, model: nn.Module, program: Any) -> None:
        self.model, self.program = model, program
        self.out_spec = program.call_spec.out_spec

    def read(self, live: Collection[str] = (), unrolls: bool = True) -> tuple[Graph, Folded]:
        """The graph, and what was folded in it: all but the operators in `live`."""
        try:
            return self._read(live, unrolls)
        except Indirect:
            with quiet(), torch.no_grad():
                self.program = self.program.run_decompositions({})
            return self._read(live, unrolls)

    def _read(self, live: Collection[str], unrolls: bool) -> tuple[Graph, Folded]:
        reader = Reader(self.model, self.program, live, unrolls)
        return reader.graph(), reader.folded


def _export(
    model: nn.Module, leaves: Sequence[_Leaf], spec: Any, batch: int, stretch: Stretch
) -> _Exported:
    resized = [_resized(leaf, leaves, batch, stretch) for leaf in leaves]
    example = pytree.tree_unflatten(resized, spec)
    with quiet(), torch.no_grad(), _unchecked(), torch.autocast("cpu", enabled=False):
        program = torch.export.export(twin(model), example[0], example[1], strict=False)
    return _Exported(model, program)


@contextmanager
def _unchecked() -> Iterator[None]:
    """torch.distributions does not check its arguments, which branches on values."""
    checks = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)


def _general(first: tuple[_Exported, Sizes], second: tuple[_Exported, Sizes]) -> Graph:
    """The graph of two captures, each with the sizes of its example."""
    try:
        return _read_both(first, second, True)
    except CannotCapture:  # what was unrolled may have other sizes in each
        return _read_both(first, second, False)


def _read_both(
    first: tuple[_Exported, Sizes], second: tuple[_Exported, Sizes], unrolls: bool
) -> Graph:
    (one, folded), (two, folded_too) = (given.read((), unrolls) for given, _ in (first, second))
    live = {
        name
        for name, value in folded.items()
        if name in folded_too and not _equal(value, folded_too[name])
    }
    if live:  # as many positions as the sequence has tokens
        (one, _), (two, _) = (given.read(live, unrolls) for given, _ in (first, second))
    _generalize(one, two, first[1], second[1])
    return one


# Operations that torch has for as many values as the example has: its operator, and the attributes
# that are its arguments.
FOLLOWING = {
    "slice": ("aten.slice.Tensor", ("dim", "start", "end", "step")),
    "rms_norm": ("aten.rms_norm.default", ("shape", "weight", "eps")),
    "layer_norm": ("aten.layer_norm.default", ("shape", "weight", "bias", "eps")),  # without these
}


def _generalize(first: Graph, second: Graph, sizes: Sizes, sizes_too: Sizes) -> None:
    """Turns what differs with the sizes of the example into Size, in `first`.

    Raises CannotCapture for other differences.
    """

    def joined(name: str, one: Any, two: Any) -> Any:
        if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
            return {key: joined(name, one[key], two[key]) for key in one}
        if isinstance(one, list | tuple) and type(one) is type(two) and len(one) == len(two):
            return type(one)(joined(name, a, b) for a, b in zip(one, two, strict=True))
        if type(one) is type(two) and (one == two or one is two):
            return one
        if type(one) is int and type(two) is int:
            size = _followed(one, two, sizes, sizes_too)
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
                size = _size_like(one, two, pairs, sizes, sizes_too)
                one.attrs["size"] = two.attrs["size"] = size
            one.attrs = joined(one.name, one.attrs, two.attrs)
            if one.op in FOLLOWING and _has_size(one.attrs) and not one.tensors:
                target, arguments = FOLLOWING[one.op]
                args = (Ref(0), *(one.attrs.get(key) for key in arguments))
                one.op, one.attrs = "aten", {"target": target, "args": args, "kwargs": {}}
            if one.op != "aten" and _has_size({**one.attrs, "size": None}):
                raise CannotCapture(f"{one.name}: {one.op} depends on the size of the input")
        for key, tensor in one.tensors.items():
            if not _equal(tensor, two.tensors[key]):
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
    one: Node, two: Node, pairs: dict[Node, Node], sizes: Sizes, sizes_too: Sizes
) -> dict[str, Any]:
    """attrs["size"] of what resizes an image to the size of a value before it: the last that had
    that size in both examples."""
    size: dict[str, Any] = one.attrs["size"]
    wanted, wanted_too = (node.attrs["size"].get("size") for node in (one, two))
    if wanted == wanted_too:
        return size
    values = [*pairs]
    for value in reversed(values[: values.index(one)]):
        if value.shape[2:] != wanted or pairs[value].shape[2:] != wanted_too:
            continue
        ends = zip(wanted, wanted_too, strict=True)
        found = [a if a == b else size_along(value, axis) for axis, (a, b) in enumerate(ends, 2)]
        if None not in found and all(
            sized(found, of) == [*ends] for of, ends in ((sizes, wanted), (sizes_too, wanted_too))
        ):
            return {"size": tuple(found)}
    raise CannotCapture(f"{one.name}: it is resized to {wanted} and {wanted_too} for two inputs")


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


def _followed(one: int, two: int, sizes: Sizes, sizes_too: Sizes) -> Size | None:
    """What is `one` for an example of the first sizes and `two` for the second; or None."""
    pairs = enumerate(zip(sizes, sizes_too, strict=True))
    grown = [(axis, a, b) for axis, (a, b) in pairs if a != b]
    for axis, a, b in grown:
        if one * b == two * a and one % a == 0:
            return Size(axis, one // a)
    for axis, a, b in grown[1:]:  # but for the batch
        factor, rest = divmod(two - one, b - a)
        if rest == 0 and factor in (1, 2):  # more would be found for squares as well
            return Size(axis, factor, one - factor * a)
    return None


def _has_size(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return any(map(_has_size, value))
    return isinstance(value, Size)


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    same = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
    return same or torch.equal(one.nan_to_num(), two.nan_to_num())
