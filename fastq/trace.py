"""What one forward pass says about the layers of a model that gets int8 layers in their place."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import itertools
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from fastq.source import products_in_source, reads_in_source

Forward = Callable[[nn.Module, Any], Any]

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_aten = torch.ops.aten
_LAYERS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.Linear: (_aten.linear.default,),
    nn.Conv1d: (_aten.conv1d.default, _aten.conv1d.padding),
    nn.Conv2d: (_aten.conv2d.default, _aten.conv2d.padding),
    nn.Conv3d: (_aten.conv3d.default, _aten.conv3d.padding),
    nn.ConvTranspose1d: (_aten.conv_transpose1d.default,),
    nn.ConvTranspose2d: (_aten.conv_transpose2d.input,),
    nn.ConvTranspose3d: (_aten.conv_transpose3d.input,),
}
_OPS = {
    **_LAYERS,
    **dict.fromkeys(BATCH_NORMS, (_aten.batch_norm.default,)),
}


@dataclass(frozen=True)
class Trace:
    """Facts about the modules of a model, each by its first name in `named_modules()`.

    batch_norms  batch norm -> the linear or convolution layer before it. In every call the batch
                 norm takes the layer's output, and nothing else does. Whether the batch norm's
                 channels are the layer's outputs also depends on the number of axes: 4 after
                 nn.Conv2d, 2 after nn.Linear.
    readers      layer -> the module that computes with the layer's parameters itself instead of
                 calling it ('' is the model).
    casters      layer -> the module whose source converts to the dtype of the layer's weight.
    products     module -> its own parameters that a source multiplies by, as one of experts does;
                 a layer's are none of them.
    reason       why there is no graph; '' when there is one. With neither a graph nor an example,
                 readers are those whose source says so.
    """

    batch_norms: dict[str, str] = field(default_factory=dict)
    readers: dict[str, str] = field(default_factory=dict)
    casters: dict[str, str] = field(default_factory=dict)
    products: dict[str, set[str]] = field(default_factory=dict)
    reason: str = ""


def trace(
    model: nn.Module,
    args: tuple[Any, ...] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    forward: Forward | None = None,
) -> Trace:
    """Follow `model(*args, **kwargs)`, or `forward(model, *args)`, through the graph.

    torch.export is asked first: it follows the example as it runs. What it cannot take, such as
    control flow that depends on the data's values, may still pass torch.fx, which is also what
    is left without an example (args=None). The model is in eval mode and stays as it is.
    """
    found = _followed(model, args, kwargs, forward)
    readers, casters = reads_in_source(model)
    if found.reason and args is None:  # else what runs is watched
        found = replace(found, readers=readers)
    return replace(found, casters=casters, products=products_in_source(model))


def _followed(
    model: nn.Module,
    args: tuple[Any, ...] | None,
    kwargs: Mapping[str, Any] | None,
    forward: Forward | None,
) -> Trace:
    captures = [("torch.export", _by_export), ("torch.fx", _by_fx)]
    failures = []
    for name, capture in captures[args is None :]:
        try:
            copied = twin(model)
            root = copied if forward is None else _Forward(copied, forward)
            names = {module: name for name, module in copied.named_modules()}
            with quiet(), torch.no_grad():
                return capture(root, names, args, dict(kwargs or {}))
        except Exception as error:  # both raise whatever their innards or the model raised
            message = str(error).strip().splitlines() or [""]
            failures.append(f"{name}: {type(error).__name__}: {message[0]:.120}")
    return Trace(reason="; ".join(failures))


def twin(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters and buffers, to trace.

    A forward may store what it computes on its module, and while tracing that is no real tensor.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    return duplicate(model, {id(tensor): tensor for tensor in tensors})


def duplicate(model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """copy.deepcopy of a model. What a module computed of its parameters, as a weight norm does,
    has no history in the copy."""
    memo = {} if memo is None else memo
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


class _Forward(nn.Module):
    """forward(model, batch) as a module."""

    def __init__(self, model: nn.Module, call: Forward) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, batch: Any) -> Any:
        return self.call(self.model, batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No warnings: a failed capture is a reason in a summary, not a page on the terminal."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


_Names = dict[nn.Module, str]


def _by_export(
    root: nn.Module, names: _Names, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> Trace:
    program = torch.export.export(root, args or (), kwargs, strict=False)
    modules = dict(root.named_modules(remove_duplicate=False))

    def module_of(node: fx.Node) -> nn.Module:
        stack = node.meta.get("nn_module_stack") or {"": ("", None)}
        return modules[list(stack.values())[-1][0]]

    calls = {
        node: module
        for node in program.graph.nodes
        if node.target in _OPS.get(type(module := module_of(node)), ())
    }
    owners = _owners(names)
    parameters = {
        name: root.get_parameter(path)
        for name, path in program.graph_signature.inputs_to_parameters.items()
    }
    readers: dict[str, str] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        parameter = parameters.get(node.name)
        for user in node.users:
            if module_of(user) not in owners[parameter]:
                readers |= {names[m]: names.get(module_of(user), "") for m in owners[parameter]}
    return Trace(_batch_norms(calls, names), readers)


def _by_fx(
    root: nn.Module, names: _Names, args: tuple[Any, ...] | None, kwargs: dict[str, Any]
) -> Trace:
    signature = inspect.signature(root.forward)
    given = signature.bind_partial(*args or (), **kwargs)
    given.apply_defaults()
    # `if mask is None` shall see the example's None and not a symbol
    fixed = {name: v for name, v in given.arguments.items() if v is None or isinstance(v, bool)}
    tracer = fx.Tracer()
    graph = tracer.trace(root, concrete_args=fixed)
    modules = dict(root.named_modules(remove_duplicate=False))
    calls = {node: modules[str(node.target)] for node in graph.find_nodes(op="call_module")}
    owners = _owners(names)
    readers: dict[str, str] = {}
    for node in graph.find_nodes(op="get_attr"):
        module, _, attribute = str(node.target).rpartition(".")
        parameter = getattr(modules[module], attribute)
        if tracer.is_leaf_module(modules[module], module) and modules[module] is not root:
            readers |= {names[m]: "" for m in owners[parameter]}
    return Trace(_batch_norms(calls, names), readers)


def _owners(names: _Names) -> dict[Any, set[nn.Module]]:
    """Parameter -> the modules that hold it."""
    owners = defaultdict(set)
    for module in names:
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(module)
    return owners


def _batch_norms(calls: dict[fx.Node, nn.Module], names: _Names) -> dict[str, str]:
    """`Trace.batch_norms` from the nodes that call a module."""
    nodes: dict[nn.Module, list[fx.Node]] = defaultdict(list)
    for node, module in calls.items():
        nodes[module].append(node)
    pairs = {}
    for module in set(calls.values()):
        if type(module) not in BATCH_NORMS:
            continue
        inputs = [node.all_input_nodes[0] for node in nodes[module]]
        layer = calls.get(inputs[0])
        if (
            layer is not None
            and type(layer) in _LAYERS
            and set(nodes[layer]) == set(inputs)
            and all(len(node.users) == 1 for node in inputs)
        ):
            pairs[names[module]] = names[layer]
    return pairs
