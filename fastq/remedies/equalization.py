"""Remedies of the float network: channels whose ranges are even."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastq.graph import Graph, Node
from fastq.prepare import Prepared, grid_ends
from fastq.program import NORMS
from fastq.progress import bar
from fastq.regions import FIXED, WEIGHTED
from fastq.remedies.side_by_side import (
    Batch,
    along,
    by_channel,
    channel_axis,
)

ENOUGH_VALUES = 2**10  # of a channel: the ends of fewer say little of those to come
# operations after which each channel is still itself, times the same factor
_CHANNELS_PASS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
                  "upsample_nearest2d", "upsample_bilinear2d", "pad", "reshape")  # fmt: skip
_LARGEST_FACTOR = 1e4


def input_equalization(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Let each channel of a picture, or each feature of a row, run from 0 to 255 over the
    calibration data; the products that read it take the steps and shifts into their weights and
    biases.

    A picture's channel of 256 values, normalized by a mean and a deviation of its own, keeps all
    of them; on a grid that the channels share it does not. A channel whose own steps would be
    wider than the shared ones, for its observer leaves outliers out, and one that never changes
    keep the shared grid. Inputs that not only convolutions of the same padding read, or not only
    linear layers of rows, are left alone, and those of which too little was seen.
    """
    for x in prepared.graph.inputs:
        readers, seen = _input_readers(prepared, x), prepared.channels.get(x)
        if not readers or seen is None or seen.uneven or seen.count < ENOUGH_VALUES:
            continue
        shared = float(prepared.qparams(x).scale)
        low, high = seen.low.double().clamp(max=0), seen.high.double().clamp(min=0)
        step = (high - low) / 255
        own = (seen.low < seen.high) & (step <= shared * (1 + 2**-20))
        low = torch.where(own, low, grid_ends(prepared.qparams(x))[0])
        _insert_grids(prepared, x, readers, low, torch.where(own, step, shared))
    prepared.regroup()


def _insert_grids(
    prepared: Prepared, x: Node, readers: Sequence[Node], low: Tensor, step: Tensor
) -> None:
    """Let these products take (x - low) / step / 256, padded before, instead of x."""
    unit = step / float(FIXED["grid"].scale)
    (top, bottom), (left, right) = readers[0].attrs.get("padding", ((0, 0), (0, 0)))
    shape = x.shape
    if len(shape) == 4:
        shape = (*shape[:2], shape[2] + top + bottom, shape[3] + left + right)
    for number, region in enumerate(prepared.regions):
        own = [reader for reader in readers if reader in region.nodes]
        if not own:
            continue
        grid = Node(
            f"{x.name}_grid{number or ''}", "grid", [x], {"pad": (left, right, top, bottom)},
            {"factor": (1 / unit).float(), "shift": (-low / unit).float()},
            layer=x.name, kind="Grid", shape=shape,
        )  # fmt: skip
        region.nodes.insert(0, grid)
        prepared.graph.nodes.insert(prepared.graph.nodes.index(x) + 1, grid)
        for reader in own:
            _take_grid(reader, grid, low, unit)


def _input_readers(prepared: Prepared, x: Node) -> list[Node]:
    """The integer products that alone read a network's input, all in the same way; or []."""
    users = prepared.graph.users()[x]
    layers = set(prepared.products())
    if x in prepared.graph.output_nodes() or not users or len(x.shape) not in (2, 4):
        return []
    op = "conv2d" if len(x.shape) == 4 else "linear"
    alike = all(
        user in layers
        and user.op == op
        and x not in user.inputs[1:]
        and user.attrs.get("padding") == users[0].attrs.get("padding")
        for user in users
    )
    return users if alike else []


def _take_grid(reader: Node, grid: Node, low: Tensor, unit: Tensor) -> None:
    """Let a product of x take grid = (x - low) / unit."""
    weight = reader.tensors["weight"].double()
    reader.inputs[0] = grid
    if reader.op == "conv2d":
        constant = low.reshape(1, -1, 1, 1).expand(1, -1, *weight.shape[2:])
        shift = F.conv2d(constant, weight, groups=reader.attrs["groups"]).flatten()
        reader.attrs = {**reader.attrs, "padding": ((0, 0), (0, 0))}
        weight = _grouped(reader, weight) * unit.reshape(reader.attrs["groups"], 1, -1, 1, 1)
    else:
        shift, weight = weight @ low, weight * unit
    bias = reader.tensors.get("bias", torch.zeros(())).double() + shift
    weight = weight.reshape(reader.tensors["weight"].shape)
    reader.tensors = {**reader.tensors, "weight": weight.float(), "bias": bias.float()}


def cross_layer_equalization(
    prepared: Prepared, sample: Sequence[Batch], progress: bool = False
) -> None:
    """Divide the channels of a convolution's or linear layer's output, and multiply the weights of
    the layers that read them, so that all channels use the range that they share.

    The channels may pass pooling, padding and flattening, and clamps: below at 0 (ReLU) as
    they are; above (ReLU6), a channel that reached the bound on the data is left alone, and none
    is made to reach it, so the network is the same as long as the channels keep to the range
    that they had. Outputs that a residual addition reads or made are left alone.

    Source: M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, Data-Free Quantization Through
    Weight Equalization and Bias Correction, 2019, arXiv:1906.04721. Weights have a scale for each
    output here, so the channel's range over the data stands for its row of weights.
    """
    _equalize(prepared, sample, ("conv2d", "linear"), progress)


def activation_equalization(
    prepared: Prepared, sample: Sequence[Batch], progress: bool = False
) -> None:
    """`cross_layer_equalization` of the outputs of a layer norm, or of a batch norm that stands
    alone, whose only readers are convolutions and linear layers: the scales go into the norm's own
    factors.

    Source: G. Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models, 2022, arXiv:2211.10438, with its migration strength of 0.5.
    """
    _equalize(prepared, sample, (*NORMS, "affine"), progress)


def _equalize(
    prepared: Prepared, sample: Sequence[Batch], makers: Sequence[str], progress: bool
) -> None:
    graph = prepared.graph
    pairs = {
        node: readers
        for node in graph.nodes
        if node.op in makers and len(node.inputs) == 1 and (readers := _readers(graph, node))
    }
    peaks: dict[Node, Tensor] = {}

    def watch(node: Node, value: Any) -> None:
        if node in pairs:
            finite = value.nan_to_num(0.0, 0.0, 0.0)  # as an observer takes it
            seen = by_channel(node, finite).abs().amax(1)
            peaks[node] = torch.maximum(peaks.get(node, seen), seen)

    with torch.no_grad():
        for arguments in bar(sample, "equalize", progress):
            graph.run(arguments, watch)
    for node, readers in pairs.items():
        factor = _factors(peaks[node], readers, node.attrs.get("clamp", (-math.inf, math.inf))[1])
        # each layer changes what the next one is scaled by: peaks stay valid, weights are read anew
        for name in ("weight", "bias", "factor", "shift"):
            if name in node.tensors or (node.op in NORMS and name == "weight"):
                old = node.tensors.get(name, torch.ones(()))
                node.tensors = {**node.tensors, name: old / along(factor, old, 0)}
        for reader in readers:
            old = reader.tensors["weight"]
            if reader.op == "conv2d" and reader.attrs["groups"] > 1:
                new = _grouped(reader, old) * factor.reshape(reader.attrs["groups"], 1, -1, 1, 1)
                new = new.reshape(old.shape)
            else:
                new = old * along(factor, old, 0 if reader.op == "conv_transpose2d" else 1)
            reader.tensors = {**reader.tensors, "weight": new}
    prepared.forget()


def _factors(peak: Tensor, readers: Sequence[Node], bound: float) -> Tensor:
    """What each channel is divided by (C,): peak is its largest magnitude, bound its clamp."""
    weight = torch.stack([_channel_weights(reader) for reader in readers]).amax(0)
    alive = (peak > 0) & (weight > 0)
    peak, weight = torch.where(alive, peak, 1.0), torch.where(alive, weight, 1.0)
    if all(reader.attrs.get("groups", 1) == len(peak) for reader in readers):
        factor = peak  # depthwise: a scale of its own for each channel's weights
    else:
        factor = (peak / weight).sqrt()
    if alive.any():  # the largest channel stays as large as it was
        factor = factor * (peak / factor)[alive].amax() / peak[alive].amax()
    if math.isfinite(bound):
        factor = torch.maximum(factor, peak / bound)
        alive &= peak < bound
    factor = factor.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    return torch.where(alive, factor, 1.0)


def _readers(graph: Graph, node: Node) -> list[Node]:
    """The products that take the channels of a node, or [] if anyone else does."""
    low, _ = node.attrs.get("clamp", (-math.inf, math.inf))
    if low not in (0, -math.inf) or node in graph.output_nodes():
        return []
    users, found = graph.users(), []
    pending = [node]
    while pending:
        value = pending.pop()
        for user in users[value]:
            if user.op in WEIGHTED and user.inputs[0] is value and value not in user.inputs[1:]:
                if channel_axis(user, len(value.shape)) != channel_axis(node, len(value.shape)):
                    return []
                found.append(user)
            elif (
                user.op in _CHANNELS_PASS
                and "clamp" not in user.attrs
                and user not in graph.output_nodes()
                and (user.op != "reshape" or _flattens(value, user))
                and (user.op != "pad" or not _pads_channels(node, user))
            ):
                pending.append(user)
            else:
                return []
    return found


def _pads_channels(node: Node, pad: Node) -> bool:
    """Whether a pad changes the axis of the node's channels."""
    from_last = len(pad.shape) - 1 - channel_axis(node, len(pad.shape))
    return any(pad.attrs["pad"][2 * from_last : 2 * from_last + 2])


def _flattens(value: Node, reshape: Node) -> bool:
    """(B, C, 1, 1) into (B, C)."""
    return len(value.shape) == 4 and value.shape[2:] == (1, 1) and len(reshape.shape) == 2


def _grouped(node: Node, weight: Tensor) -> Tensor:
    """(groups, N / groups, C / groups, KH, KW) of a convolution's weight."""
    return weight.reshape(node.attrs["groups"], -1, *weight.shape[1:])


def _channel_weights(reader: Node) -> Tensor:
    """The largest magnitude of the weights that read each input channel, (C,)."""
    weight = reader.tensors["weight"].abs()
    if reader.op == "conv2d":
        return _grouped(reader, weight).amax((1, 3, 4)).flatten()
    if reader.op == "conv_transpose2d":
        return weight.flatten(1).amax(1)
    return weight.amax(0)
