"""Remedies of the float network: channels whose ranges are even."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fastq.graph import MOVES, Graph, Node
from fastq.prepare import Prepared, grid_ends
from fastq.program import NORMS
from fastq.progress import bar
from fastq.regions import FIXED, WEIGHTED
from fastq.remedies.side_by_side import (
    Batch,
    along,
    axis_after,
    by_channel,
    channel_axis,
    channel_values,
)

ENOUGH_VALUES = 2**10  # of a channel: the ends of fewer say little of those to come
ENOUGH_ROWS = 2**8  # the same of the mean and the spread
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
    _add_bias(reader, _of_constant(reader, weight, low))
    if reader.op == "conv2d":
        reader.attrs = {**reader.attrs, "padding": ((0, 0), (0, 0))}
        made = _grouped(reader, weight) * unit.reshape(reader.attrs["groups"], 1, -1, 1, 1)
        weight = made.reshape(weight.shape)
    else:
        weight = weight * unit
    reader.tensors = {**reader.tensors, "weight": weight.float()}


def cross_layer_equalization(
    prepared: Prepared, sample: Sequence[Batch], progress: bool = False
) -> None:
    """Divide the channels of a convolution's or linear layer's output, and multiply the weights of
    the layers that read them, so that all channels use the range that they share.

    The channels may pass pooling, padding and moves, and clamps: below at 0 (ReLU) as
    they are; above (ReLU6), a channel that reached the bound on the data is left alone, and none
    is made to reach it, so the network is the same as long as the channels keep to the range
    that they had. Outputs that a residual addition reads or made are left alone.

    Source: M. Nagel, M. van Baalen, T. Blankevoort, M. Welling, Data-Free Quantization Through
    Weight Equalization and Bias Correction, 2019, arXiv:1906.04721. Weights have a scale for each
    output here, so the channel's range over the data stands for its row of weights.
    """
    readers = {
        node: found
        for node in prepared.graph.nodes
        if node.op in ("conv2d", "linear") and len(node.inputs) == 1
        if (found := _readers(prepared.graph, node)) and not found.sums
    }
    for node, seen in _seen(prepared, readers, _Peak, sample, progress).items():
        factor = _factors(node, seen.peak, readers[node].products, 0.5)
        _rescale(node, readers[node], factor, torch.zeros_like(factor))


def activation_equalization(
    prepared: Prepared, sample: Sequence[Batch], progress: bool = False
) -> None:
    """Shift and scale the channels of the outputs of norms, and of batch norms that stand alone, so
    that all use the range that they share; the norm's own parameters take it, and those of the
    products that read them make up for it. Products that add them, as the layers of a transformer
    do whose norms come last, have a factor for each channel of what they add.

    Left alone are norms that anything else reads, that are clamped above, as by ReLU6, and those of
    which too little was seen; where one is clamped below, or padded later, its channels are scaled,
    and not shifted.

    Sources: G. Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models, 2022, arXiv:2211.10438, with a migration strength of 0.75 for weights of
    8 bits, and less for fewer; X. Wei et al.,
    Outlier Suppression+: Accurate quantization of large language models by equivalent and optimal
    shifting and scaling, 2023, arXiv:2304.09145.
    """
    readers = {
        node: found
        for node in prepared.graph.nodes
        if node.op in (*NORMS, "affine") and _bound(node) == math.inf
        if (found := _readers(prepared.graph, node))
    }
    for node, seen in _seen(prepared, readers, _Moments, sample, progress).items():
        if seen.rows < ENOUGH_ROWS:
            continue
        found, middle = readers[node], torch.zeros_like(seen.mean())
        if node.op != "rms_norm" and found.take_shifts and "clamp" not in node.attrs:
            middle = seen.mean()
        bits = min(prepared.config(reader).weight_bits for reader in found.products)
        strength = max(0.15 * (bits - 3), 0)  # coarser weights have no room for what is uneven
        factor = _factors(node, seen.spread(middle), found.products, strength)
        _rescale(node, found, factor, middle)
        node.attrs = {**node.attrs, "equalized": True}


class _Seen:
    """What was seen of each channel of a value.

    channels  how many.   count  values of each.   rows  those of what has a range of its own, at
              least.
    """

    def __init__(self) -> None:
        self.channels = self.count = self.rows = 0

    def update(self, values: Tensor) -> None:
        """values (C, n)."""
        self.channels = len(values)
        self.count += values.shape[1]


class _Peak(_Seen):
    """The largest magnitudes: peak, float32 (C,)."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = torch.zeros(())

    def update(self, values: Tensor) -> None:
        super().update(values)
        if values.shape[1]:
            self.peak = torch.maximum(self.peak, values.abs().amax(1))


class _Moments(_Seen):
    """The sums of the first four powers: sums, float64 (4, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = torch.zeros((), dtype=torch.float64)

    def update(self, values: Tensor) -> None:
        super().update(values)
        wide = values.double()
        square = wide.square()
        powers = (wide, square, square * wide, square.square())
        self.sums = self.sums + torch.stack([power.sum(1) for power in powers])

    def mean(self) -> Tensor:
        return (self.sums[0] / self.count).float()

    def spread(self, middle: Tensor) -> Tensor:
        """The fourth root of the mean fourth power of value - middle: outliers count, and a few
        samples tell it, which they do not of the largest value."""
        m, (one, two, three, four) = middle.double(), self.sums / self.count
        mean = four - 4 * m * three + 6 * m**2 * two - 4 * m**3 * one + m**4
        return mean.clamp(min=0).pow(0.25).float()


S = TypeVar("S", bound=_Seen)


def _seen(
    prepared: Prepared, nodes: Mapping[Node, Readers], what: type[S], sample: Sequence[Batch],
    progress: bool,
) -> dict[Node, S]:  # fmt: skip
    """`what` of the channels of these nodes' values; what was seen of the graph's is dropped."""
    found = {node: what() for node in nodes}
    sizes = {value: 0 for readers in nodes.values() for value in readers.ranged}

    def watch(node: Node, value: Any) -> None:
        if node in found:
            finite = value.nan_to_num(0.0, 0.0, 0.0)  # as an observer takes it
            found[node].update(by_channel(node, finite))
        if node in sizes:
            sizes[node] += value.numel()

    if found:
        with torch.no_grad():
            for arguments in bar(sample, "equalize", progress):
                prepared.graph.run(arguments, watch)
        prepared.forget()
    for node, seen in found.items():
        least = min(sizes[value] for value in nodes[node].ranged)
        seen.rows = least // max(seen.channels, 1)
    return {node: seen for node, seen in found.items() if seen.count}


def _bound(node: Node) -> float:
    """What a node's value is clamped to, above."""
    return float(node.attrs.get("clamp", (-math.inf, math.inf))[1])


def _factors(node: Node, peak: Tensor, readers: Sequence[Node], strength: float) -> Tensor:
    """What each channel of a node's value is divided by, (C,). peak is its largest magnitude, or,
    without a bound, any measure of its size; strength is the share of the unevenness that the
    weights of the readers take, 0 to 1."""
    bound = _bound(node)
    weight = torch.stack([_channel_weights(reader) for reader in readers]).amax(0)
    alive = (peak > 0) & (weight > 0)
    peak, weight = torch.where(alive, peak, 1.0), torch.where(alive, weight, 1.0)
    if all(reader.attrs.get("groups", 1) == len(peak) for reader in readers):
        factor = peak  # depthwise: a scale of its own for each channel's weights
    else:
        factor = peak**strength / weight ** (1 - strength)
    if alive.any():  # the largest channel stays as large as it was
        factor = factor * (peak / factor)[alive].amax() / peak[alive].amax()
    if math.isfinite(bound):
        factor = torch.maximum(factor, peak / bound)
        alive &= peak < bound
    factor = factor.clamp(1 / _LARGEST_FACTOR, _LARGEST_FACTOR)
    return torch.where(alive, factor, 1.0)


def _rescale(node: Node, readers: Readers, factor: Tensor, middle: Tensor) -> None:
    """Let a node give (value - middle) / factor, channel by channel, and its readers take it.

    Each layer changes what the next one is scaled by: ranges stay valid, weights are read anew.
    """
    shifts = bool(middle.any())
    scale, offset = ("factor", "shift") if node.op == "affine" else ("weight", "bias")
    if node.op in WEIGHTED:
        old = node.tensors[scale]
        node.tensors = {**node.tensors, scale: old / along(factor, old, 0)}
    else:
        node.tensors = {**node.tensors, scale: channel_values(node, scale, 1.0) / factor}
    if offset in node.tensors or shifts:
        moved = channel_values(node, offset, 0.0) - middle
        node.tensors = {**node.tensors, offset: moved / factor}
    for reader in readers.products:
        old = reader.tensors["weight"]
        if reader.op == "conv2d" and reader.attrs["groups"] > 1:
            new = _grouped(reader, old) * factor.reshape(reader.attrs["groups"], 1, -1, 1, 1)
            new = new.reshape(old.shape)
        else:
            new = old * along(factor, old, 0 if reader.op == "conv_transpose2d" else 1)
        reader.tensors = {**reader.tensors, "weight": new}
        if shifts:
            _add_bias(reader, _of_constant(reader, old.double(), middle.double()))
    for reader in readers.sums:
        reader.tensors = {**reader.tensors, "add_factor": factor}
        if shifts:
            _add_bias(reader, middle)


def _add_bias(reader: Node, more: Tensor) -> None:
    bias = reader.tensors.get("bias", torch.zeros(())).double() + more
    reader.tensors = {**reader.tensors, "bias": bias.float()}


def _of_constant(reader: Node, weight: Tensor, values: Tensor) -> Tensor:
    """What a product with this weight, float64, gives for one value for each channel, (N,)."""
    if reader.op == "linear":
        return weight @ values
    constant = values.reshape(1, -1, 1, 1).expand(1, -1, *weight.shape[2:])
    return F.conv2d(constant, weight, groups=reader.attrs["groups"]).flatten()


class Readers(NamedTuple):
    """All who take the channels of a node's value.

    products     multiply them.
    sums         products that add them to theirs.
    ranged       values on the way that have a range of their own: the node's, and means of it.
    take_shifts  whether a channel may be shifted: none is padded on the way, or transposed.
    """

    products: list[Node]
    sums: list[Node]
    ranged: list[Node]
    take_shifts: bool


def _readers(graph: Graph, node: Node) -> Readers | None:
    """Those who read a node; None if they take anything but its channels, or no product does."""
    low, _ = node.attrs.get("clamp", (-math.inf, math.inf))
    if low not in (0, -math.inf):
        return None
    users, ends, shifts = graph.users(), set(graph.output_nodes()), True
    products, sums, ranged = list[Node](), list[Node](), [node]
    pending = [(node, channel_axis(node, len(node.shape)))]
    while pending:
        value, axis = pending.pop()
        if value in ends:
            return None
        for user in dict.fromkeys(users[value]):
            if user.op in WEIGHTED and axis == channel_axis(user, len(value.shape)):
                first, *more = user.inputs
                if value in more:
                    if "add_factor" in user.tensors:
                        return None
                    sums.append(user)
                if first is value:
                    products.append(user)
                    shifts &= user.op != "conv_transpose2d" and not _pads(user)
                continue
            after = axis_after(value, user, axis)
            filled = user.attrs.get("value") if user.op == "pad" else None
            if after is None or "clamp" in user.attrs or filled not in (None, 0, -math.inf):
                return None
            if user.op not in MOVES:
                ranged.append(user)
            shifts &= user.op not in ("pad", "avg_pool2d")
            pending.append((user, after))
    return Readers(products, sums, ranged, shifts) if products else None


def _pads(reader: Node) -> bool:
    """Whether a product multiplies zeros around an image."""
    return reader.op == "conv2d" and any(map(any, reader.attrs["padding"]))


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
