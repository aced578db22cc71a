"""Parameters that are expanded along the batch: what is computed of them element by element is
computed before they are, so that it is a constant, as `scale * token.expand(B, -1, -1)` is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fastq.read.exported import arguments_of, is_off, memory_of, name_of, ranked_shape, shape_of
from fastq.read.reader import GROWING, POINTWISE, SAME

_MOVES = ("permute", "transpose", "unsqueeze")


def sink_expansions(program: Any) -> None:
    """Moves expansions of parameters, in an exported program, behind the operators that may as well
    come first."""
    signature, graph = program.graph_signature, program.graph
    given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers,
             **signature.inputs_to_lifted_tensor_constants}  # fmt: skip
    fixed: set[fx.Node] = set()  # of parameters and numbers alone, but for their expansions
    written = {memory_of(value) for node in graph.nodes for value in _written(node)}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            alone = node.name in given
        else:
            alone = node.op == "call_function" and fixed.issuperset(node.all_input_nodes)
        if not alone:
            continue
        fixed.add(node)
        if _sinks(node) and memory_of(node) not in written:
            fixed.update(_sink(graph, node))


def _sinks(node: fx.Node) -> bool:
    """Whether an operator of constants gives the same before one or more of them are expanded, by
    sizes that none of the others has."""
    name = name_of(node.target)
    if name not in (*POINTWISE, *SAME, *_MOVES) or not isinstance(node.meta.get("val"), Tensor):
        return False
    if name in SAME and not is_off(arguments_of(node, node.target)):
        return False
    if any(user.op == "output" for user in node.users):
        return False
    values = node.all_input_nodes
    before = [_source_shape(value) if _grows(value) else shape_of(value) for value in values]
    return any(map(_grows, values)) and torch.broadcast_shapes(*before) != torch.broadcast_shapes(
        *map(shape_of, values)
    )


def _written(node: fx.Node) -> list[fx.Node]:
    """The values whose memory an operator writes."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or not schema.is_mutable:
        return []
    given = arguments_of(node, node.target)
    marked = [a.name for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    leaves = pytree.tree_leaves([given.get(name) for name in marked])
    return [value for value in leaves if isinstance(value, fx.Node)]


def _grows(node: fx.Node) -> bool:
    """Whether it expands axes of size 1."""
    if name_of(node.target) not in GROWING:
        return False
    pairs = zip(_source_shape(node), shape_of(node), strict=True)
    return all(before in (1, after) for before, after in pairs)


def _source_shape(node: fx.Node) -> tuple[int, ...]:
    return ranked_shape(node.all_input_nodes[0].meta["val"], len(shape_of(node)))


def _sink(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    """Makes it the expansion of the same operator on what was expanded: the nodes before it."""
    aten, made = torch.ops.aten, list[fx.Node]()

    def add(target: Any, args: Any, kwargs: Any, value: Tensor) -> fx.Node:
        new = graph.call_function(target, args, kwargs)
        new.meta = {**node.meta, "val": value}
        made.append(new)
        return new

    def source(value: fx.Node) -> fx.Node:
        if not _grows(value):
            return value
        before, shape = value.all_input_nodes[0], _source_shape(value)
        return add(aten.reshape.default, (before, shape), {}, before.meta["val"].new_empty(shape))

    with graph.inserting_before(node):
        args, kwargs = fx.map_arg((node.args, node.kwargs), source)
        values, named = fx.map_arg((args, kwargs), lambda value: value.meta["val"])
        small = add(node.target, args, kwargs, node.target(*values, **named))  # type: ignore[operator]
    node.target, node.args, node.kwargs = aten.expand.default, (small, shape_of(node)), {}
    return made
