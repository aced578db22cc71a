"""From an unmodified nn.Module to a `Graph`, by torch.export.

A capture is of one example and has its sizes in it. To know which of them belong to the network and
which to the example, the network is captured again with another batch size and, for images and
sequences, another extent: what is the same in both is the network's, a number that follows the
example's sizes becomes a `Size`, and a graph that differs in anything else holds for that extent
only. What is computed of parameters alone becomes a constant, where it is the same in both.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn.modules import transformer
from torch.utils import _pytree as pytree

from fastq.examples import (
    BATCHES,
    SAME,
    Leaf,
    Leaves,
    Stretch,
    Way,
    example_shapes,
    first_of,
    other_extents,
    regrown,
    resized,
    stretches,
    ways_of_batches,
)
from fastq.extents import size_along
from fastq.graph import Graph, Node
from fastq.layout import Ref
from fastq.read import CannotCapture, Folded, Indirect, Reader
from fastq.sizes import Shapes, Size, sized
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
    fixed               why it holds for the sizes of its example alone; "" if it does not.
    """

    graph: Graph
    arguments: tuple[Any, ...]
    in_spec: Any
    out_spec: Any
    extents: tuple[int, ...]
    fixed: str = ""

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
    given, spec = pytree.tree_flatten((tuple(args), dict(kwargs or {})))
    failed: CannotCapture | None = None
    for leaves in ways_of_batches(given):
        try:
            return _capture(model, leaves, spec)
        except CannotCapture as error:
            failed = failed or error
        except Exception as error:  # torch.export raises whatever its innards or the model raised
            message = str(error).strip().splitlines() or [""]
            reason = CannotCapture(
                f"{type(error).__name__}: {message[0]:.160} (of examples of {BATCHES[0]} and of "
                f"{BATCHES[1]}, made of the first batch)"
            )
            reason.__cause__ = error
            failed = failed or reason
    raise failed or AssertionError("there is one way at least")


def _verify(captured: Captured, model: nn.Module, leaves: Leaves) -> None:
    """CannotCapture if the example, of its own sizes but for a large batch, has another result: the
    model branches on a size, or keeps a state that is no buffer."""
    copied = _copied(model)
    few = [_few(leaf, leaves) for leaf in leaves]
    args, kwargs = pytree.tree_unflatten(few, captured.in_spec)
    once, again = (_results(partial(copied, *args, **kwargs)) for _ in range(2))
    if not _alike(once, again):
        raise CannotCapture("the model gives other values when it is called again: it has a state")
    if not _is_the_model(captured, copied, few):
        raise CannotCapture(
            "the model has other values for the example than its graph, which was captured for "
            f"batches of {BATCHES[0]} and {BATCHES[1]}: it may branch on a size"
        )


def _holds(captured: Captured, model: nn.Module, leaves: Leaves, way: Way) -> bool:
    """Whether the graph is the model for other extents, too. What both captures had by chance, as
    no padding, is another number there."""
    copied = _copied(model)
    for stretch in other_extents(leaves, way):
        example = [resized(leaf, leaves, 2, stretch) for leaf in leaves]
        try:
            if not _is_the_model(captured, copied, example):
                return False
        except Exception:  # the model does not take it
            continue
    return True


def _copied(model: nn.Module) -> nn.Module:
    """The model with its own parameters, to be run: what it stores stays in the copy."""
    return duplicate(model, {id(one): one for one in model.parameters()})


def _is_the_model(captured: Captured, copied: nn.Module, values: Sequence[Any]) -> bool:
    """Whether the graph has the model's results for an example; raises what the model raises."""
    args, kwargs = pytree.tree_unflatten(values, captured.in_spec)
    called = partial(copied, *args, **kwargs)
    masks = {node.inputs[1] for node in captured.graph if node.op == "softmax" and node.inputs[1:]}
    blind = False

    def watch(node: Node, value: Any) -> None:
        nonlocal blind
        blind |= node in masks and bool((value == 0).all(-1).any())

    wanted = _results(called)
    try:
        found = _results(lambda: captured.graph.run(values, watch))
    except Exception:  # shapes that do not fit, or whatever torch's operators say of them
        return False
    if _alike(wanted, found):
        return True
    # of a line that is masked as a whole, each has values of its own; or the model is random
    free = blind or not _alike(wanted, _results(called, seed=1))
    shapes = ([getattr(x, "shape", None) for x in results] for results in (wanted, found))
    return free and next(shapes) == next(shapes)


def _results(network: Callable[[], Any], seed: int = 0) -> list[Any]:
    plain = torch.autocast("cpu", enabled=False)
    with quiet(), torch.no_grad(), plain, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pytree.tree_leaves(network())


FEW = 16  # of a batch


def _few(leaf: Leaf, way: Leaves) -> Any:
    """The first ones of an example of one input."""
    x, axis = leaf.x, 0 if leaf.follows is None else 1
    if not isinstance(x, Tensor) or x.dim() == 0 or leaf.follows == 1 or leaf.like is not None:
        return x
    if x.shape[axis] == len(first_of(way)) > FEW:
        for one in (axis, *leaf.also):
            x = x.narrow(one, 0, FEW)
    return x


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
    """`capture` of leaves with their batches where they say: of the first stretches with which the
    graph is the model's for other extents, too; else of the extents of the example alone."""
    examples = _Examples(model, leaves, spec)
    why = ""  # there is no graph for other extents
    for ways in stretches(leaves):
        try:
            found = examples.first_graph(ways)
        except CannotCapture as error:  # another network for each size
            why = why or str(error)
            continue
        if found is None:
            continue
        way, graph, out_spec = found
        captured = _captured(graph, leaves, way, spec, out_spec)
        _verify(captured, model, leaves)
        if _holds(captured, model, leaves, way):
            return captured
        why = why or "with others the model computes something else, as padding to a multiple"
    graph, out_spec = examples.graph(SAME)
    captured = _captured(graph, leaves, SAME, spec, out_spec)
    _verify(captured, model, leaves)
    return replace(captured, fixed=why)


def _captured(graph: Graph, leaves: Leaves, way: Way, spec: Any, out_spec: Any) -> Captured:
    """A graph, of the examples of a way, without what nobody reads; with what is known of it."""
    graph.remove_unused()
    arguments = _arguments(graph, leaves, _shapes(leaves, way))
    _, after = way
    extents = {dims: axes for dims, axes, _ in after.parts}.get(4, ())
    return Captured(graph, arguments, spec, out_spec, extents)


class _Examples:
    """What torch.export makes of a model for examples of other sizes."""

    def __init__(self, model: nn.Module, leaves: Leaves, spec: Any) -> None:
        self.model, self.leaves, self.spec = model, leaves, spec
        # those of the first batch size, which several ways share; an error here is the model's own
        self.exported = {Stretch(): self._export(BATCHES[0], Stretch())}

    def first_graph(self, ways: Sequence[Way]) -> tuple[Way, Graph, Any] | None:
        """The first of these ways whose sizes the model takes, and its `graph`; None if there is
        none. CannotCapture if the graphs of its examples differ."""
        retries = RETRIES
        waiting = list(ways)
        while waiting:
            way = waiting.pop(0)
            if self._too_short(way):
                continue
            try:
                return way, *self.graph(way)
            except Ambiguous as error:
                told = (w for w in regrown(way) if error.told_by(_shapes(self.leaves, w)[1]))
                waiting[:0] = itertools.islice(told, int(retries > 0))
                retries -= 1
            except CannotCapture:
                raise
            except Exception:  # torch.export's or the model's, as of more positions than it has
                continue
        return None

    def graph(self, way: Way) -> tuple[Graph, Any]:
        """The graph of both examples of a way, and the pytree spec of its result. Raises what the
        model raises for these sizes; CannotCapture if the graphs differ."""
        before, after = way
        if before not in self.exported:
            self.exported[before] = self._export(BATCHES[0], before)
        one, two = self.exported[before], self._export(BATCHES[1], after)
        shapes, shapes_too = _shapes(self.leaves, way)
        return _general((one, shapes), (two, shapes_too)), one.out_spec

    def _too_short(self, way: Way) -> bool:
        """Whether the example is too short for both to be of different extents."""
        before, after = way
        shapes = example_shapes(self.leaves, BATCHES[0], after)
        return bool(before.parts) and shapes == _shapes(self.leaves, way)[0]

    def _export(self, batch: int, stretch: Stretch) -> _Exported:
        values = [resized(leaf, self.leaves, batch, stretch) for leaf in self.leaves]
        args, kwargs = pytree.tree_unflatten(values, self.spec)
        with quiet(), torch.no_grad(), _unchecked(), torch.autocast("cpu", enabled=False):
            program = torch.export.export(twin(self.model), args, kwargs, strict=False)
        return _Exported(self.model, program)


RETRIES = 3  # with other sizes, where some values had the same by chance


class Ambiguous(CannotCapture):
    """Two values or more had the size that another is resized to, in both examples."""

    def __init__(self, name: str, sizes: Sequence[Sequence[Any]]) -> None:
        super().__init__(f"{name}: it is resized to the size of one value or of another one")
        self.sizes = sizes

    def told_by(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes tell them apart."""
        numbers = [tuple(sized(size, shapes)) for size in self.sizes]
        return len(set(numbers)) == len(numbers)


def _shapes(leaves: Leaves, way: Way) -> tuple[Shapes, Shapes]:
    """Those of both examples."""
    one, two = (example_shapes(leaves, b, s) for b, s in zip(BATCHES, way, strict=True))
    return one, two


def _arguments(graph: Graph, leaves: Leaves, shapes: tuple[Shapes, Shapes]) -> tuple[Any, ...]:
    """The `arguments` of a Captured: the input nodes know which axes may have other sizes."""
    nodes = iter(graph.inputs)
    arguments = tuple(next(nodes) if isinstance(leaf.x, Tensor) else leaf.x for leaf in leaves)
    for node, leaf in zip(arguments, leaves, strict=True):
        if isinstance(node, Node):
            number = node.attrs["number"] = graph.inputs.index(node)
            pairs = enumerate(zip(*(example[number] for example in shapes), strict=True))
            node.attrs["real"] = leaf.x.dtype is torch.float32
            node.attrs["free"] = tuple(i for i, (a, b) in pairs if a != b)
            node.attrs["single"] = leaf.x.dim() > 0 and len(leaf.x) == 1 < len(first_of(leaves))
            if leaf.follows is not None or leaf.like is not None:
                node.attrs["batch"] = 1 if leaf.follows == 0 else None
    return arguments


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


@contextmanager
def _unchecked() -> Iterator[None]:
    """Where torch itself would branch on values: torch.distributions checks its arguments, and
    nn.TransformerEncoder looks whether a mask is the causal one, to say so to faster kernels."""
    checks, is_causal = Distribution._validate_args, transformer._detect_is_causal_mask
    Distribution.set_default_validate_args(False)
    transformer._detect_is_causal_mask = lambda mask, is_causal=None, size=None: bool(is_causal)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(checks)
        transformer._detect_is_causal_mask = is_causal


def _general(first: tuple[_Exported, Shapes], second: tuple[_Exported, Shapes]) -> Graph:
    """The graph of two captures, each with the shapes of its example."""
    try:
        return _read_both(first, second, True)
    except CannotCapture:  # what was unrolled may have other sizes in each
        return _read_both(first, second, False)


def _read_both(
    first: tuple[_Exported, Shapes], second: tuple[_Exported, Shapes], unrolls: bool
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


def _generalize(first: Graph, second: Graph, shapes: Shapes, shapes_too: Shapes) -> None:
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


PERIOD = 2**11  # of sizes that tell formulas apart: a multiple of most strides


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


def _equal(one: Tensor, two: Tensor) -> bool:
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    same = one.data_ptr() == two.data_ptr() and one.stride() == two.stride()
    return same or torch.equal(one.nan_to_num(), two.nan_to_num())
