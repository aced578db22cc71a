"""From a model and its calibration data to a QuantizedModel, step by step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastq.alone import make_alone, make_static
from fastq.batches import Batches, arguments_of
from fastq.capture import capture
from fastq.encode import encode_program
from fastq.fuse import fuse
from fastq.graph import Graph, Node
from fastq.layout import Layout, Stage
from fastq.modules import INT8, Config, Selector, choose, listed, module_names
from fastq.nn.model import QuantizedModel, leaves_of, spec_text
from fastq.outlook import leave_fast_path, outlook
from fastq.prepare import Prepared, prepare_graph
from fastq.processes import ALONE, Processes
from fastq.program import extent_text, fits
from fastq.qconfig import DEFAULT
from fastq.read import CannotCapture
from fastq.recipe import write_recipe
from fastq.regions import GIVEN_OUT, Region
from fastq.remedies import Remedies, observe_and_apply
from fastq.summaries import ASKED, QuantizationSummary, Result, Row, keep_summary
from fastq.swap import memory_of
from fastq.trace import Forward, duplicate


class _Called(BaseException):
    """Carries the arguments out of the forward that was interrupted."""


def _called_with(model: nn.Module, batch: Any, forward: Forward) -> tuple[Any, Any]:
    def leave(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise _Called(args, kwargs)

    handle = model.register_forward_pre_hook(leave, with_kwargs=True)
    try:
        forward(model, batch)
    except _Called as call:
        return call.args[0], call.args[1]
    finally:
        handle.remove()
    raise CannotCapture("forward= does not call the model itself")


def call_of(model: nn.Module, batch: Any, forward: Forward | None) -> tuple[Any, Any]:
    """(args, kwargs) with which the model is called for a batch.

    Raises CannotCapture if `forward` does not call the model itself.
    """
    return arguments_of(batch) if forward is None else _called_with(model, batch, forward)


def prepare_model(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any] | None = None,
    *,
    config: Config | None = None,
    skip: Selector | Iterable[Selector] = (),
    alone: bool = False,
) -> tuple[Prepared, nn.Module]:
    """The network of a model, captured and fused, not calibrated yet; and the copy, in eval mode,
    that it was captured from.

    alone  whether operators that no program can have become int8 layers: see alone.py.
    Raises CannotCapture when torch.export cannot follow the model.
    """
    wanted = choose(module_names(model), config, skip, DEFAULT)
    twin = duplicate(model).eval()
    leave_fast_path(twin)
    captured = capture(twin, args, kwargs)
    for part in (captured.in_spec, captured.out_spec):
        spec_text(part)  # refuses what cannot be saved: now, and not after a long calibration
    _find_owners(captured.graph, twin)
    fuse(captured.graph)
    prepared = prepare_graph(captured, lambda node: wanted.get(node.layer, DEFAULT))
    if alone:
        make_alone(prepared)
    return prepared, twin


def _find_owners(graph: Graph, model: nn.Module) -> None:
    """A product with the weight of a layer is that layer, also if the module around it computes it:
    F.linear(x, self.qkv.weight, bias)."""
    names = listed(module_names(model))
    owners: dict[int, tuple[str, str]] = {}
    for module, (name, *_) in names.items():
        weight = module._parameters.get("weight")
        if isinstance(module, nn.Linear | _ConvNd) and weight is not None and weight.numel():
            owners.setdefault(memory_of(weight), (name, type(module).__name__))
    layers = {name for paths in names.values() for name in paths}
    for node in graph:
        found = [owners[m] for m in map(memory_of, node.tensors.values()) if m in owners]
        if found and node.layer not in layers:
            node.layer, node.kind = found[0]


def calibrate(
    prepared: Prepared,
    model: nn.Module,
    batches: Batches,
    forward: Forward | None = None,
    *,
    remedies: Remedies = (),
    progress: bool = True,
    processes: Processes = ALONE,
) -> None:
    """Run the float network on all batches and watch its values; then the remedies."""
    captured, names = prepared.captured, forward_names(model)
    misfits: list[str] = []  # sizes that the graph does not hold for: it may run nevertheless

    def given(batch: Any) -> list[Any]:
        call = call_of(model, batch, forward)
        leaves = leaves_of(model, *call, captured.in_spec, captured.arguments, names)
        misfits.extend(_misfits(captured.arguments, leaves))
        return leaves

    data = map(given, batches)
    try:
        with torch.autocast("cpu", enabled=False):  # the ranges are those of float32
            observe_and_apply(
                prepared, data, remedies, total=batches.total, progress=progress,
                processes=processes,
            )  # fmt: skip
    except Exception as error:
        error.add_note("fastq ran the float network on the calibration data")
        if not misfits:
            raise
        why = f", for {captured.fixed}" if captured.fixed else ""
        raise ValueError(
            "a calibration batch does not fit the network, which was captured from the first one: "
            f"{misfits[0]}. Other sizes make another network of this model{why}. Wanted batches of "
            "one size; or fastq.quantize_layers(model, batches), whose layers take any"
        ) from error


def _misfits(arguments: Iterable[Any], leaves: Iterable[Any]) -> Iterator[str]:
    """What has sizes that the network does not hold for."""
    for node, leaf in zip(arguments, leaves, strict=True):
        if isinstance(node, Node) and isinstance(leaf, Tensor):
            shape, extent = tuple(leaf.shape), node.extent
            if not fits(shape, extent):
                yield f"{node.name} has shape {shape}; wanted {extent_text(extent)}"


def finish(
    prepared: Prepared, model: nn.Module, *, strict: bool = False, processes: Processes = ALONE
) -> QuantizedModel:
    """The integer network of a calibrated one; of several processes that of the first, in all."""
    make_static(prepared)
    report = summarize(prepared, model)
    accepted = (ASKED, GIVEN_OUT)
    if strict and any(row.result == "float" and row.reason not in accepted for row in report.rows):
        raise ValueError(
            "quantize_model: strict=True, and layers stay float; name them in skip= to accept "
            f"that\n{report}"
        )
    return processes.agree(lambda: build(prepared, forward_names(model), report))


def forward_names(model: nn.Module) -> list[str]:
    """The parameters of its forward that may be given by position."""
    return [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]


def build(prepared: Prepared, names: Sequence[str], report: QuantizationSummary) -> QuantizedModel:
    """The integer network with the ranges and weights that `prepared` has.

    names  of the parameters of the float network's forward.
    """
    captured, graph = prepared.captured, prepared.graph
    lowered = [prepared.lowered(region) for region in prepared.regions]
    stages, tensors = _stages(prepared)
    recipe, kept = write_recipe(prepared, lowered)
    tensors |= kept

    def keep(name: str, array: Any) -> str:
        tensors[name] = torch.from_numpy(array.copy())
        return name

    arguments = captured.arguments
    layout = Layout(
        stages=tuple(stages),
        programs=tuple(encode_program(made.program, keep) for made in lowered),
        inputs=tuple(node.name if isinstance(node, Node) else None for node in arguments),
        extents=tuple(node.extent if isinstance(node, Node) else None for node in arguments),
        constants={str(i): v for i, v in enumerate(arguments) if not isinstance(v, Node)},
        outputs=tuple(v.name if isinstance(v, Node) else ("constant", v) for v in graph.outputs),
        specs=(spec_text(captured.in_spec), spec_text(captured.out_spec)),
        names=tuple(names),
        recipe=recipe,
    )
    network = QuantizedModel(layout, tensors)
    keep_summary(network, report)
    return network


def _stages(prepared: Prepared) -> tuple[list[Stage], dict[str, Tensor]]:
    """What the network does, in order; and the tensors of its float operators, as "node.name"."""
    stages, tensors = [], dict[str, Tensor]()
    for item in _in_order(prepared):
        if isinstance(item, Region):
            number = prepared.regions.index(item)
            given = tuple(n.name for n in item.inputs if n.op != "constant")
            made = tuple(n.name for n in item.outputs)
            stages.append(Stage("program", given, made, {}, number))
        else:
            inputs = tuple(n.name for n in item.inputs)
            why = prepared.reasons.get(item, "")
            stages.append(
                Stage(item.op, inputs, (item.name,), item.attrs, layer=item.layer, why=why)
            )
            tensors |= {f"{item.name}.{k}": v.clone() for k, v in item.tensors.items()}
    return stages, tensors


def _in_order(prepared: Prepared) -> list[Any]:
    """Regions and float nodes, each after what it takes."""
    region_of = {node: region for region in prepared.regions for node in region.nodes}
    taken = {v for region in prepared.regions for v in region.inputs}
    order: list[Any] = []
    done: set[Any] = set()

    def visit(item: Any) -> None:
        stack = [(item, False)]
        while stack:
            top, ready = stack.pop()
            if top in done:
                continue
            if ready:
                done.add(top)
                order.append(top)
                continue
            stack.append((top, True))
            for value in reversed(top.inputs):
                needed = region_of.get(value, value)
                if needed is not top and needed not in done:
                    stack.append((needed, False))

    for value in prepared.graph.outputs:
        if isinstance(value, Node):
            visit(region_of.get(value, value))
    inputs = set(prepared.graph.inputs)
    users = prepared.graph.users()
    only_regions = {
        node
        for node in taken
        if node.op == "constant" and all(user in region_of for user in users[node])
    }
    return [x for x in order if x not in inputs and x not in only_regions]


def summarize(prepared: Prepared, model: nn.Module) -> QuantizationSummary:
    """What becomes of each layer."""
    integer = {node.layer for node in prepared.layers()}
    inside = {node.layer for node in prepared.integer_nodes()}
    masks = _masks(prepared)
    floats = {
        node.layer: reason
        for node, reason in prepared.reasons.items()
        if node.op != "input"
        and node.attrs.get("target") != "getitem"
        and node not in masks
        and not (reason == GIVEN_OUT and node.layer in inside)  # how its result is rearranged
    }
    folded: dict[str, dict[str, None]] = {}  # into which layers: a norm may follow several
    for node in prepared.graph:
        for name in node.attrs.get("folded", ()):
            folded.setdefault(name, {})[node.layer] = None
    alone, called = prepared.alone, prepared.captured.called
    known = {*integer, *inside, *floats, *folded, *alone, *called}

    def outcome(module: nn.Module, name: str) -> tuple[Result, str] | None:
        if isinstance(module, INT8):
            return outlook(module)
        if isinstance(module, nn.Embedding) and name not in alone:
            # its rows may be a constant by now, as those of positions are
            return ("float", ASKED) if floats.get(name) == ASKED else None
        if name in folded:
            targets = ", ".join(map(repr, folded[name]))
            if folded[name].keys() <= {*integer, *alone}:
                return "folded", f"into {targets}"
            return "float", f"in {targets}, which stays float"
        if name in alone:
            return alone[name]
        if name in floats:
            return "float", floats[name]
        if name in inside:
            return "int8 static", ""
        if called.get(name) is False:
            return "folded", "into a constant: it is computed of parameters alone"
        return "float", _elsewhere(name, prepared)

    rows = []
    for module, names in listed(module_names(model)).items():
        name = next((n for n in names if n in known), names[0])  # that it is called by
        if found := outcome(module, name):
            rows.append(Row(name, type(module).__name__, *found))
    fixed, held = prepared.captured.fixed, prepared.captured.held
    note = f"for inputs of the {held} of the first batch alone: {fixed}" if fixed else ""
    return QuantizationSummary(tuple(rows), note=note)


def _masks(prepared: Prepared) -> set[Node]:
    """Float nodes that only make masks of attention in the programs."""
    graph, users = prepared.graph, prepared.graph.users()
    kept, found = graph.output_nodes(), set[Node]()
    for node in reversed(graph.nodes):
        masks = (
            user in found or (user.op == "softmax" and node in user.inputs[1:])
            for user in users[node]
        )
        if node in prepared.reasons and node not in kept and users[node] and all(masks):
            found.add(node)
    return found


def _elsewhere(name: str, prepared: Prepared) -> str:
    within = sorted({n.layer for n in prepared.graph if n.layer.startswith(f"{name}.")})
    if within:
        return f"computed by {', '.join(map(repr, within[:3]))}"
    if name in prepared.captured.called:
        return "nothing that the network returns depends on it"
    return "the network does not call it"
