"""Subclasses of torch's layers, said with torch's own."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from fastq.outlook import SWAPS, hooked
from fastq.trace import quiet, twin

# what a subclass may come down to
CALLS: dict[Any, Any] = {
    F.linear: nn.Linear, F.conv1d: nn.Conv1d, F.conv2d: nn.Conv2d, F.conv3d: nn.Conv3d,
}  # fmt: skip
ZERO_PADS: dict[int, Any] = {2: nn.ZeroPad1d, 4: nn.ZeroPad2d, 6: nn.ZeroPad3d}
TRANSPOSED_LINEAR = "transformers.pytorch_utils", "Conv1D"  # GPT-2's, whose weight is (K, N)


def rebuild(module: nn.Module) -> nn.Module | None:
    """A subclass of nn.Linear or of a convolution said with torch's own layers, and the Conv1D of
    transformers, which is an nn.Linear; None for all else."""
    if parametrize.is_parametrized(module) or any(map(hooked, module.modules())):
        return None
    if (type(module).__module__, type(module).__name__) == TRANSPOSED_LINEAR:
        weight, bias = (module.get_parameter(name) for name in ("weight", "bias"))
        linear = nn.Linear(weight.shape[0], weight.shape[1], device="meta")
        linear.weight, linear.bias = nn.Parameter(weight.detach().T.contiguous()), bias
        return linear.train(module.training)
    if not isinstance(module, nn.Linear | _ConvNd) or type(module) in SWAPS:
        return None
    if isinstance(module, LazyModuleMixin | NonDynamicallyQuantizableLinear):
        return None
    return _plain_layer(module)


def _plain_layer(module: nn.Module) -> nn.Module | None:
    """What a subclass of nn.Linear or of a convolution does, said with torch's own layers, or None.

    A plain layer with the same parameters if its forward comes down to one F.linear, F.conv1d, ..
    with them; an nn.Sequential if it also pads with zeros or calls modules before or after that.
    None if it does anything else.
    """
    try:
        with quiet():
            graph = fx.Tracer().trace(twin(module))
    except Exception:  # control flow on sizes, or whatever the module raises
        return None
    chain = [node for node in graph.nodes if node.op != "get_attr"]
    parts: list[Any] = []
    for before, node in itertools.pairwise(chain):
        if not node.args or node.args[0] is not before or len(before.users) != 1:
            return None
        if node.op == "call_module" and node.args == (before,) and not node.kwargs:
            part = module.get_submodule(str(node.target))
            parts += [] if type(part) is nn.Identity else [part]
        elif node.target is F.pad:
            parts.append(_zero_pad(node))
        elif node.target in CALLS:
            parts.append(_plain_call(module, node))
        elif node.op != "output":
            return None
    if sum(node.target in CALLS for node in chain) != 1 or None in parts:
        return None
    match parts:
        case [nn.ZeroPad2d(padding=(left, right, top, bottom)), nn.Conv2d(padding=(0, 0)) as conv]:
            if (left, top) == (right, bottom) and min(left, top) >= 0:
                conv.padding = (top, left)  # the kernel pads without a copy
                return conv
    return parts[0] if len(parts) == 1 else nn.Sequential(*parts)


def _zero_pad(node: fx.Node) -> nn.Module | None:
    """The module for one call of F.pad with zeros."""
    given = dict(zip(("input", "pad", "mode", "value"), node.args, strict=False)) | node.kwargs
    zeros = given.get("mode", "constant") == "constant" and given.get("value") in (None, 0)
    widths = given["pad"]
    if not zeros or not isinstance(widths, tuple | list) or len(widths) not in ZERO_PADS:
        return None
    if not all(isinstance(width, int) for width in widths):
        return None
    made: nn.Module = ZERO_PADS[len(widths)](tuple(widths))
    return made


def _plain_call(module: Any, node: fx.Node) -> nn.Module | None:
    """The layer for one such call, if it takes the module's own parameters."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    del given["input"]
    for name in ("weight", "bias"):
        value = given.pop(name, None)
        own = isinstance(value, fx.Node) and (value.op, value.target) == ("get_attr", name)
        if not own and not (value is None and getattr(module, name) is None):
            return None
    if any(isinstance(value, fx.Node) for value in given.values()):
        return None
    with torch.device("meta"):  # no memory and no random numbers: the parameters are there
        layer: nn.Module
        if node.target is F.linear:
            layer = nn.Linear(module.in_features, module.out_features, module.bias is not None)
        else:
            geometry: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list | tuple) else value
                for name, value in given.items()
            }
            shape = (module.in_channels, module.out_channels, module.kernel_size)
            layer = CALLS[node.target](*shape, bias=module.bias is not None, **geometry)
    if layer.weight.shape != module.weight.shape:
        return None
    layer.weight, layer.bias = module.weight, module.bias
    return layer.train(module.training)
