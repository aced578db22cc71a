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
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
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
from fastq.followed import Ambiguous
from fastq.generalize import equal, generalize
from fastq.graph import Graph, Node
from fastq.read import CannotCapture, Folded, Indirect, Reader
from fastq.read.expansions import sink_expansions
from fastq.sizes import Shapes
from fastq.trace import duplicate, quiet, twin


@dataclass(frozen=True)
class Captured:
    """A graph, how its flat inputs and outputs are arranged, and which sizes it holds for.

    arguments           for each leaf of (args, kwargs) its input node, or the leaf itself if it
                        is no tensor. In the node's attrs "free" are the axes that may have other
                        sizes; "batch", if it is there, is the axis of the batch, None if there is
                        none; "single" says that the first axis is 1 though the batch is larger.
    in_spec, out_spec   pytree specs of (args, kwargs) and of the result.
    fixed               why it holds for some sizes of its example alone; "" if it does not, or if
                        the model takes no others.
    held                which these are.
    called              the modules that the example called, by their names: whether anything that
                        they compute is computed of inputs, not of parameters alone.
    """

    graph: Graph
    arguments: tuple[Any, ...]
    in_spec: Any
    out_spec: Any
    fixed: str = ""
    held: str = "sizes"
    called: Mapping[str, bool] = field(default_factory=dict)

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
    """CannotCapture unless the graph has the model's result for the example that was given, a large
    batch cut to FEW: a model may branch on a size, or keep a state that is no buffer."""
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
    """Whether the graph has the model's results for further extents, too: a number that was the
    same in both captures by chance, such as a padding of 0, may be another one there."""
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
    # a line that is masked as a whole may have any values, and a random model has others each time
    free = blind or not _alike(wanted, _results(called, seed=1))
    shapes = ([getattr(x, "shape", None) for x in results] for results in (wanted, found))
    return free and next(shapes) == next(shapes)


def _results(network: Callable[[], Any], seed: int = 0) -> list[Any]:
    plain = torch.autocast("cpu", enabled=False)
    with quiet(), torch.no_grad(), plain, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return pytree.tree_leaves(network())


FEW = 16  # samples of a batch are enough to compare


def _few(leaf: Leaf, way: Leaves) -> Any:
    """An input's example, of a large batch the first FEW."""
    x, axis = leaf.x, 0 if leaf.follows is None else 1
    if not isinstance(x, Tensor) or x.dim() == 0 or leaf.follows == 1 or leaf.like is not None:
        return x
    if x.shape[axis] == len(first_of(way)) > FEW:
        for one in (axis, *leaf.also):
            x = x.narrow(one, 0, FEW)
    return x


# Results that were only rounded otherwise differ by less: in norm, as a share and absolutely.
UNLIKE, TINY = 1e-2, 1e-6


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
            if found is None:
                continue
            way, graph, out_spec = found
            captured = examples.captured(graph, way, out_spec)
            _verify(captured, model, leaves)
        except CannotCapture as error:  # another network for each size
            why = why or str(error)
            continue
        if _holds(captured, model, leaves, way):
            held = _held(way)
            return replace(captured, fixed=why, held=held) if held else captured
        why = why or "with others the model computes something else, as padding to a multiple"
    graph, out_spec = examples.graph(SAME)
    captured = examples.captured(graph, SAME, out_spec)
    _verify(captured, model, leaves)
    return replace(captured, fixed=why)


def _held(way: Way) -> str:
    """Which sizes of the example a graph holds for alone, where others may differ; "" for none."""
    grown = {dims: axes for dims, axes, _ in way[1].parts}
    if grown.keys() == {2}:
        return "sizes, but for the number of tokens,"
    axes = grown.get(4, ())
    return "height" if axes == (3,) else "width" if axes == (2,) else ""


class _Examples:
    """What torch.export makes of a model for examples of other sizes."""

    def __init__(self, model: nn.Module, leaves: Leaves, spec: Any) -> None:
        self.model, self.leaves, self.spec = model, leaves, spec
        # those of the first batch size, which several ways share; an error here is the model's own
        self.exported = {Stretch(): self._export(BATCHES[0], Stretch())}

    def first_graph(self, ways: Sequence[Way]) -> tuple[Way, Graph, Any] | None:
        """The first of these ways whose sizes the model takes, and its `graph`; None if there is
        none. CannotCapture if the graphs of its examples differ."""
        retries, unclear = RETRIES, list[Ambiguous]()
        waiting = list(ways)
        while waiting:
            way = waiting.pop(0)
            if self._too_short(way):
                continue
            try:
                return way, *self.graph(way)
            except Ambiguous as error:
                unclear.append(error)
                told = (
                    w
                    for w in regrown(way)
                    if all(one.told_by(_shapes(self.leaves, w)[1]) for one in unclear)
                )
                waiting[:0] = itertools.islice(told, int(retries > 0))
                retries -= 1
                if not waiting:
                    raise
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

    def captured(self, graph: Graph, way: Way, out_spec: Any) -> Captured:
        """A graph, of the examples of a way, without what nobody reads; with what is known of
        it."""
        graph.remove_unused()
        arguments = _arguments(graph, self.leaves, _shapes(self.leaves, way))
        called = self.exported[Stretch()].called
        return Captured(graph, arguments, self.spec, out_spec, called=called)

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


RETRIES = 3  # with other sizes, where two values had the same size by chance


def _shapes(leaves: Leaves, way: Way) -> tuple[Shapes, Shapes]:
    """The shapes of the inputs of both examples."""
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
        self.called = _called(program)

    def read(self, live: Collection[str] = (), unrolls: bool = True) -> tuple[Graph, Folded]:
        """The graph, and what was folded in it: all but the operators in `live`."""
        try:
            return self._read(live, unrolls)
        except Indirect:
            with quiet(), torch.no_grad():
                self.program = self.program.run_decompositions({})
            return self._read(live, unrolls)

    def _read(self, live: Collection[str], unrolls: bool) -> tuple[Graph, Folded]:
        sink_expansions(self.program)
        reader = Reader(self.model, self.program, live, unrolls)
        return reader.graph(), reader.folded


def _called(program: Any) -> dict[str, bool]:
    """`Captured.called` of what torch.export made."""
    inputs, called = set(program.graph_signature.user_inputs), dict[str, bool]()
    moved = set[Any]()  # what is computed of inputs
    for node in program.graph.nodes:
        if node.name in inputs or moved & {*node.all_input_nodes}:
            moved.add(node)
        for path, _ in (node.meta.get("nn_module_stack") or {}).values():
            called[path] = called.get(path, False) or node in moved
    return called


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
        if name in folded_too and not equal(value, folded_too[name])
    }
    if live:  # as many positions as the sequence has tokens
        (one, _), (two, _) = (given.read(live, unrolls) for given, _ in (first, second))
    generalize(one, two, first[1], second[1])
    return one
