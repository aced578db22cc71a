"""A float model in, an integer network out: what users call."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fastq.batches import Batches, arguments_of
from fastq.capture import CannotCapture, capture
from fastq.convert import (
    ASKED,
    LISTED,
    QuantizationSummary,
    Row,
    Selector,
    leave_fast_path,
    module_names,
    quantize_layers,
    select,
    summary,
)
from fastq.fuse import fuse
from fastq.graph import Node
from fastq.lower import Region
from fastq.nn.network import QuantizedModel, Stage, assemble
from fastq.prepare import Prepared, prepare_graph
from fastq.qconfig import QConfig
from fastq.trace import Forward

Config = QConfig | Mapping[Selector, QConfig | None]


def quantize_model(
    model: nn.Module,
    calibration_data: Any = None,
    *,
    forward: Forward | None = None,
    config: Config | None = None,
    skip: Selector | Iterable[Selector] = (),
    strict: bool = False,
    progress: bool = True,
) -> nn.Module:
    """The model as integer programs: called like it, in eval mode, for inference.

    The network is captured with torch.export as it runs on the first batch; batch norm is folded,
    activations and residual additions become part of the products before them; the calibration
    data fix the ranges of the values between operations. What has an integer form is computed in
    integers, in one native call without Python between the layers; what has none stays a float
    operator between two programs. `fastq.summary(result)` says for each layer what it became and
    why. A model that torch.export cannot follow gets int8 layers in its place instead:
    `quantize_layers`, which is also what is used without calibration data.

    calibration_data  one batch (a tensor or a dict), or an iterable of batches, such as a
        DataLoader. A batch is a tensor: model(batch); a dict: model(**batch); or a tuple or list
        whose first element is one of these, and the input: most data sets give
        (images, labels). One batch is held at a time.
    forward   forward(model, batch) runs the model on a batch of any other kind.
    config    a `QConfig` for all layers, or a dict from name, pattern or class of modules to a
        QConfig, or to None: float. Of several that match, the last one holds.
    skip      layers to keep float: a name ('features.0'), a pattern ('*.attn.*'), a class, or
        several of these. What holds for a module holds for all within it.
    strict    raise ValueError if a layer stays float and neither skip nor config asks for it.
    progress  show a progress bar if standard error is a terminal.

    Raises TypeError for a model, data or batch of a wrong kind; ValueError for empty data, for
    a name that matches nothing, and if nothing can become int8. An error that the model
    raises passes through, with a note.
    """
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"quantize_model: got {type(model).__name__}, wanted a torch.nn.Module, not scripted"
        )
    if calibration_data is None:
        return quantize_layers(model, skip=skip, strict=strict, progress=progress)
    prepared, why = None, ""
    batches = Batches(calibration_data)
    try:
        args, kwargs = call_of(model, batches.first(), forward)
        prepared = prepare_model(model, args, kwargs, config=config, skip=skip)
    except CannotCapture as error:
        why = str(error)
    if prepared is None or not prepared.regions:
        result = quantize_layers(
            model, batches, forward=forward, skip=skip, strict=strict, progress=progress
        )
        note = f"int8 layers, not one network: {why or 'no product has an integer form'}"
        result._fastq_summary = replace(summary(result), note=note)  # type: ignore[assignment]
        return result
    calibrate(prepared, model, batches, forward, progress=progress)
    return finish(prepared, model, strict=strict)


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
) -> Prepared:
    """The network of a model, captured and fused, not calibrated yet.

    Raises CannotCapture when torch.export cannot follow the model.
    """
    wanted = choose(model, config, skip)
    twin = copy.deepcopy(model).eval()
    leave_fast_path(twin)
    captured = capture(twin, args, kwargs)
    fuse(captured.graph)
    return prepare_graph(captured, lambda node: wanted.get(node.layer, QConfig()))


def choose(
    model: nn.Module, config: Config | None, skip: Selector | Iterable[Selector]
) -> dict[str, QConfig | None]:
    """The configuration of each module by its name; None is float."""
    names = module_names(model)
    base = config if isinstance(config, QConfig) else QConfig()
    chosen: dict[str, QConfig | None] = {n: base for paths in names.values() for n in paths}
    rules = list(config.items()) if isinstance(config, Mapping) else []
    for selector, one in [*rules, (skip, None)]:
        if one is not None and not isinstance(one, QConfig):
            raise TypeError(
                f"quantize_model: config has {type(one).__name__} for {selector!r}; wanted a "
                "fastq.QConfig, or None to keep it float"
            )
        for module in select(names, selector, "skip" if selector is skip else "config"):
            for name in names[module]:
                chosen[name] = one
    return chosen


def calibrate(
    prepared: Prepared,
    model: nn.Module,
    batches: Iterable[Any],
    forward: Forward | None = None,
    *,
    progress: bool = True,
) -> None:
    """Run the float network on all batches and watch its values."""
    total = getattr(batches, "total", None)
    bar = tqdm(batches, "calibrate", unit="batch", total=total, disable=None if progress else True)
    with bar:
        for number, batch in enumerate(bar):
            call = call_of(model, batch, forward)
            try:
                prepared.observe(pytree.tree_leaves(call))
            except Exception as error:
                error.add_note(
                    f"quantize_model ran the float network on calibration batch {number}"
                )
                raise


def finish(prepared: Prepared, model: nn.Module, *, strict: bool = False) -> QuantizedModel:
    """The integer network of a calibrated one."""
    unseen = [
        node
        for node, stands in prepared.ranges.watched().items()
        if stands not in prepared.observers or not prepared.observers[stands].count
    ]
    if unseen:
        raise ValueError(
            f"quantize_model: the calibration data gave '{unseen[0].layer or unseen[0].name}' no "
            "finite value, so there is no range"
        )
    report = summarize(prepared, model)
    if strict and any(row.result == "float" and row.reason != ASKED for row in report.rows):
        raise ValueError(
            "quantize_model: strict=True, and layers stay float; name them in skip= to accept "
            f"that\n{report}"
        )
    captured, graph = prepared.captured, prepared.graph
    tensors: dict[str, Tensor] = {}
    stages = []
    for item in _in_order(prepared):
        if isinstance(item, Region):
            number = prepared.regions.index(item)
            given = tuple(n.name for n in item.inputs if n.op != "constant")
            made = tuple(n.name for n in item.outputs)
            stages.append(Stage("program", given, made, {}, number))
        else:
            inputs = tuple(n.name for n in item.inputs)
            stages.append(Stage(item.op, inputs, (item.name,), item.attrs))
            tensors |= {f"{item.name}.{k}": v.clone() for k, v in item.tensors.items()}
    arguments = [node.name if isinstance(node, Node) else None for node in captured.arguments]
    outputs = [v.name if isinstance(v, Node) else ("constant", v) for v in graph.outputs]
    constants = {
        str(i): leaf for i, leaf in enumerate(captured.arguments) if not isinstance(leaf, Node)
    }
    names = [
        p.name
        for p in inspect.signature(model.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    network = assemble(
        stages, prepared.programs(), tensors, arguments, constants, outputs,
        (captured.in_spec, captured.out_spec), names,
    )  # fmt: skip
    network._fastq_summary = report  # type: ignore[assignment]
    return network


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
            before = top.inputs if isinstance(top, Node) else list(top.inputs)
            for value in reversed(before):
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
    floats = {node.layer: reason for node, reason in prepared.reasons.items() if node.op != "input"}
    folded = {name: node.layer for node in prepared.graph for name in node.attrs.get("folded", ())}
    inside = {node.layer for node in prepared.integer_nodes()}
    rows = []
    for module, (name, *_) in module_names(model).items():
        if not isinstance(module, LISTED):
            continue
        kind = type(module).__name__
        if name in folded:
            target = folded[name]
            if target in integer:
                rows.append(Row(name, kind, "folded", f"into '{target}'"))
            else:
                rows.append(Row(name, kind, "float", f"in '{target}', which stays float"))
        elif name in integer and name not in floats:
            rows.append(Row(name, kind, "int8 static"))
        elif name in floats:
            rows.append(Row(name, kind, "float", floats[name]))
        elif name in inside:
            rows.append(Row(name, kind, "int8 static"))
        else:
            rows.append(Row(name, kind, "float", _elsewhere(name, prepared)))
    return QuantizationSummary(tuple(rows))


def _elsewhere(name: str, prepared: Prepared) -> str:
    within = sorted({n.layer for n in prepared.graph if n.layer.startswith(f"{name}.")})
    if within:
        return f"computed by {', '.join(map(repr, within[:3]))}"
    return "the network does not call it"
