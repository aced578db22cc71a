"""What each of torch's layers may become in int8, as far as is known without running the model."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from fastq.modules import INT8, TABLES
from fastq.nn import LAYERS, QMultiheadAttention
from fastq.nn.convolve import products
from fastq.nn.embedding import QTable
from fastq.nn.layer import QLayer
from fastq.nn.recurrent import Recurrent
from fastq.qparams import MAX_K
from fastq.summaries import Result

SWAPS: dict[type[nn.Module], Any] = {kind.FLOAT: kind for kind in LAYERS}
# layers of which not all inputs can be seen from outside, and why
DYNAMIC = {
    Recurrent: "a recurrent layer makes half of its inputs itself",
    QMultiheadAttention: "attention makes the input of its last product itself",
}


def outlook(module: nn.Module) -> tuple[Result, str]:
    """What a layer can become as far as it is known without running the model, and why."""
    if isinstance(module, QTable):
        return "int8 weight", "int8 already"
    if isinstance(module, INT8):
        static = isinstance(module, QLayer) and module.input_qparams is not None
        return ("int8 static" if static else "int8 dynamic"), "int8 already"
    kind = type(module)
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        return "float", "not initialised: call the model on a batch once before"
    if parametrize.is_parametrized(module):
        return "float", (
            "parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
        )
    if hooked(module):
        return "float", (
            "has forward hooks, which an int8 layer would lose (weight_norm and pruning are hooks "
            "too, and can be removed)"
        )
    if isinstance(module, _BatchNorm):
        return "float", ""  # until the graph is known
    if kind not in SWAPS:
        if isinstance(module, NonDynamicallyQuantizableLinear):
            return "float", "nn.MultiheadAttention computes with its weight itself"
        for parent in SWAPS:
            if isinstance(module, parent):
                return "float", (
                    f"a subclass of nn.{parent.__name__} that computes something else, or may"
                )
        return "float", "no int8 form"
    for weight in module.parameters():
        if weight.dtype is not torch.float32 or weight.device.type != "cpu":
            on = f"{weight.dtype} on {weight.device}"
            return "float", f"weight is {on}, wanted float32 on the CPU: model.float().cpu() is so"
        sums = prod(weight.shape[1:])
        if isinstance(module, _ConvNd) and weight is module.weight:
            geometry = module.stride, module.dilation, module.transposed, module.groups
            sums = products(weight.shape, *geometry)
        if sums > MAX_K:
            return "float", f"sums {sums} products, and int32 is exact up to {MAX_K}"
        if not bool(weight.isfinite().all()):
            return "float", "weight or bias has NaN or infinite values"
    if kind in TABLES:
        return "int8 weight", ""
    for family, reason in DYNAMIC.items():
        if issubclass(SWAPS[kind], family):
            return "int8 dynamic", reason
    return "int8 static", ""


def hooked(module: nn.Module) -> bool:
    """Whether something else than its forward happens when it is called, or another forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def leave_fast_path(model: nn.Module) -> None:
    """Make transformer encoders call their linear layers.

    In eval mode nn.TransformerEncoderLayer hands its weights to one fused float operator, which
    int8 layers do not have. That nn.TransformerEncoder turns padded input into nested tensors
    stays: it decides what is in the padded positions of its output.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            module.activation_relu_or_gelu = 0
