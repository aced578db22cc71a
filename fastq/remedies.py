"""What wins back accuracy that rounding costs. Each remedy changes a `Prepared`: the first kind the
float network, before its values are observed, to an equal one that is easier to quantize; the
second kind the integer weights, the biases and the grid of the inputs, afterwards.

    cross_layer_equalization   channels of products that are clamped, averaged or pooled at most
    activation_equalization    channels of layer norms, and of batch norms that stand alone
    input_equalization         channels of the network's inputs: each has a grid of its own
    balanced_rounding          rounds weights so that their errors cancel: kernels, outputs
    gptq                       rounds weights one after the other, by least squares
    adaround                   rounds each weight to the side that it learns
    batch_norm                 scales and biases that give the outputs' float mean and variance
    bias_correction            biases that give the outputs' float mean

`calibrate` applies those that are named, in this order. Most of the second kind walk through the
network with the float values and the quantized ones side by side, so that each layer sees what the
layers before it, remedies included, will give it, and makes up for their errors as well.

A batch is the flat arguments of the network, as `Graph.run` takes them. The remedies work on a
sample, the first batches: it is walked as a whole, and bounded in memory.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from fastq.graph import Graph, Node, Values, evaluate, pixels_together, sizes_of, tensors_of
from fastq.lower import FIXED, WEIGHTED, weight_of
from fastq.prepare import Prepared, fake_quantize, grid_ends
from fastq.processes import ALONE, Processes
from fastq.program import NORMS

Batch = Sequence[Any]
Remedies = str | Iterable[str]

DEFAULT = ("input_equalization", "balanced_rounding", "bias_correction")

EQUALIZATIONS = ("input_equalization", "cross_layer_equalization", "activation_equalization")
ROUNDINGS = ("balanced_rounding", "gptq", "adaround")  # the last that is named decides

ENOUGH_VALUES = 2**10  # of a channel: the ends of fewer say little of those to come
SAMPLE_BYTES = 2**26  # of the network's largest value: 32 images for ResNet-50
ROWS_BYTES = 2**27  # of the inputs of a layer's products that its weights are fitted to
MAX_ROWS = 2**15


class Remedy(NamedTuple):
    """apply(prepared, sample, progress); `first`: before the values are observed."""

    apply: Callable[[Prepared, Sequence[Batch], bool], None]
    first: bool = False


def calibrate(
    prepared: Prepared,
    batches: Iterable[Batch],
    remedies: Remedies = DEFAULT,
    *,
    total: int | None = None,
    progress: bool = False,
    processes: Processes = ALONE,
) -> None:
    """Observe the network's values on the batches, which are read once, and apply these remedies, a
    name or several. The progress bar counts to `total` batches.

    Of several processes each observes its own batches; the sample is the first one's, and what is
    done after the values were observed is done there alone.

    Raises TypeError and ValueError for names that are none, ValueError for a value that was never
    finite.
    """
    names = remedy_names(remedies)
    chosen = [REMEDIES[name] for name in names]
    rest = iter(batches)
    progress = progress and processes.rank == 0
    own = take_sample(prepared, rest) if chosen else []
    sample = processes.agree(lambda: own)
    for remedy in chosen:
        if remedy.first:
            remedy.apply(prepared, sample, progress)
    for arguments in bar(itertools.chain(own, rest), "calibrate", progress, total):
        prepared.observe(arguments)
    prepared.merge(processes)
    prepared.check_seen()
    prepared.settle()
    for remedy in chosen if processes.rank == 0 else ():
        if not remedy.first:
            remedy.apply(prepared, sample, progress)


def take_sample(prepared: Prepared, batches: Iterator[Batch]) -> list[Batch]:
    """The next batches, until the network's largest value has SAMPLE_BYTES in them."""
    values = [n.shape for n in prepared.quantized_values() if n.shape and 0 not in n.shape]
    largest = max((math.prod(shape[1:]) for shape in values), default=1)
    sample: list[Batch] = []
    total = 0
    for arguments in batches:
        sample.append(arguments)
        total += 4 * largest * _size(arguments)
        if total >= SAMPLE_BYTES:
            break
    return sample


def _size(arguments: Batch) -> int:
    """The number of images, or the like, in a batch."""
    return next((len(x) for x in arguments if isinstance(x, Tensor) and x.dim()), 1)


def remedy_names(remedies: Remedies) -> tuple[str, ...]:
    """The names, in the order in which they are applied."""
    if not isinstance(remedies, Iterable):
        raise TypeError(f"remedies: got {remedies!r:.80}, wanted names, or () for none")
    given = (remedies,) if isinstance(remedies, str) else tuple(remedies)
    unknown = [name for name in given if name not in REMEDIES]
    if unknown:
        raise ValueError(f"remedies: {unknown[0]!r} is none; there are {', '.join(REMEDIES)}")
    return tuple(name for name in REMEDIES if name in given)


def bar(items: Any, title: str, progress: bool, total: int | None = None) -> Any:
    """A progress bar, if wanted and standard error is a terminal."""
    return tqdm(items, title, total, disable=None if progress else True)


# ------------------------------------------------------------------------------------ equalization


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
        if not readers or seen is None or seen.count < ENOUGH_VALUES:
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
    """The same for the outputs of a layer norm, or of a batch norm that stands alone, whose only
    readers are convolutions and linear layers: the scales go into the norm's own factors.

    Source: G. Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for
    Large Language Models, 2022, arXiv:2211.10438, with its migration strength of 0.5.
    """
    _equalize(prepared, sample, (*NORMS, "affine"), progress)


# Operations after which each channel is still itself, times the same factor.
_CHANNELS_PASS = ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
                  "upsample_nearest2d", "upsample_bilinear2d", "pad", "reshape")  # fmt: skip
_LARGEST_FACTOR = 1e4


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
            seen = _by_channel(node, value).abs().amax(1)
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
                node.tensors = {**node.tensors, name: old / _along(factor, old, 0)}
        for reader in readers:
            old = reader.tensors["weight"]
            if reader.op == "conv2d" and reader.attrs["groups"] > 1:
                new = _grouped(reader, old) * factor.reshape(reader.attrs["groups"], 1, -1, 1, 1)
                new = new.reshape(old.shape)
            else:
                new = old * _along(factor, old, 0 if reader.op == "conv_transpose2d" else 1)
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
                if _channel_axis(user, len(value.shape)) != _channel_axis(node, len(value.shape)):
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
    from_last = len(pad.shape) - 1 - _channel_axis(node, len(pad.shape))
    return any(pad.attrs["pad"][2 * from_last : 2 * from_last + 2])


def _flattens(value: Node, reshape: Node) -> bool:
    """(B, C, 1, 1) into (B, C)."""
    return len(value.shape) == 4 and value.shape[2:] == (1, 1) and len(reshape.shape) == 2


def _by_channel(node: Node, value: Tensor) -> Tensor:
    """(C, all else) of an image, or of features that are the last axis."""
    return value.transpose(0, _channel_axis(node, value.dim())).flatten(1)


def _channel_axis(node: Node, rank: int) -> int:
    return 1 if node.op in ("conv2d", "conv_transpose2d", "affine", "group_norm") else rank - 1


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


def _along(factor: Tensor, tensor: Tensor, axis: int) -> Tensor:
    shape = [1] * max(tensor.dim(), 1)
    shape[axis] = -1
    return factor.reshape(shape)


# ------------------------------------------------------------------------ the network side by side


@dataclass
class Side:
    """One batch at a layer, as it is when the layer's turn has come.

    inputs  its inputs, quantized, as the simulation has them.
    wanted  its output in the float network, before the clamp.
    made    its output in the simulation, before the clamp: a remedy that knows it may put it here,
            and the layer is not run again.
    """

    inputs: list[Tensor]
    wanted: Tensor
    made: Tensor | None = None


def walk(
    prepared: Prepared, batches: Sequence[Batch], *, floats: bool = True
) -> Iterator[tuple[Node, list[Side]]]:
    """Run the float network and the simulated one, an operation at a time, on all batches.

    floats  whether the float network is wanted: without it, `wanted` is empty.

    Gives each layer that becomes integers before it is run; what has been made of the layer by the
    time that the next one is asked for is what the layers after it see.
    """
    graph, layers, quantized = prepared.graph, set(prepared.products()), prepared.quantized_values()
    last = {value: node for node in graph for value in node.inputs}
    reals: list[Values] = [{} for _ in batches] if floats else []
    grids: list[Values] = [{} for _ in batches]
    sizes = [sizes_of(arguments) for arguments in batches]
    for node in graph:
        if node.op == "input":
            place = graph.inputs.index(node)
            given = [pixels_together(tensors_of(arguments)[place]) for arguments in batches]
            for values, value in zip(reals, given, strict=False):
                values[node] = value
            made: list[Any] = given
        else:
            bare = _unclamped(node) if node in layers else node
            for values, size in zip(reals, sizes, strict=False):
                values[node] = evaluate(bare, [values[v] for v in node.inputs], size)
            if node in layers:
                wanted = [values[node] for values in reals] or [torch.empty(0)] * len(batches)
                sides = [
                    Side([grid[v] for v in node.inputs], real)
                    for grid, real in zip(grids, wanted, strict=True)
                ]
                yield node, sides
                if any(side.made is None for side in sides):
                    bare = _simulated(prepared, node)
                made = [
                    evaluate(bare, side.inputs) if side.made is None else side.made
                    for side in sides
                ]
                made = [_clamped(node, value, out=value) for value in made]
                for values in reals:
                    values[node] = _clamped(node, values[node], out=values[node])
            else:
                made = [
                    evaluate(node, [grid[v] for v in node.inputs], size)
                    for grid, size in zip(grids, sizes, strict=True)
                ]
        for grid, value in zip(grids, made, strict=True):
            if node in quantized and isinstance(value, Tensor):
                # a float operator may give 0 / 0, which the way into a program takes as 0
                if node in prepared.reasons:
                    value = value.nan_to_num(0.0, math.inf, -math.inf)
                # a product is new memory, whose pages cost more than what is computed in them
                out = value if node in layers else None
                value = fake_quantize(value, prepared.qparams(node), out=out)
            grid[node] = value
        for taken in set(node.inputs):
            if last[taken] is node:
                for values in (*reals, *grids):
                    del values[taken]


def _unclamped(node: Node) -> Node:
    return replace(node, attrs={k: v for k, v in node.attrs.items() if k != "clamp"})


def _clamped(node: Node, value: Tensor, out: Tensor | None = None) -> Tensor:
    """The value of a node after its clamp; in the memory of `out`, which may be the value's."""
    return torch.clamp(value, *node.attrs["clamp"], out=out) if "clamp" in node.attrs else value


def _simulated(prepared: Prepared, node: Node) -> Node:
    """A layer with its integer weight and without its clamp."""
    tensors = prepared.simulated_tensors(node)
    return replace(
        _unclamped(node), tensors=tensors | {"weight": pixels_together(tensors["weight"])}
    )


# ------------------------------------------------------------------------- biases, means, variances


def bias_correction(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Shift each bias so that each channel of the layer's output, before the clamp, has the mean
    that it has in the float network, whose values are kept to the ranges of the quantized ones:
    an outlier that a range leaves out is not to be made up for.

    Source: M. Nagel et al., 2019, arXiv:1906.04721, section 4.2, on data as in its appendix D.
    """
    count = len(prepared.products())
    wanted, quantized = _Means(prepared.products()), prepared.quantized_values()

    def within(node: Node, value: Any) -> Any:
        if node not in quantized:
            return value
        clamp = value.clamp_ if node.op in WEIGHTED else value.clamp  # a product is new memory
        return clamp(*grid_ends(prepared.qparams(node)))

    with torch.no_grad():
        for arguments in bar(sample, "float means", progress):
            prepared.graph.run(arguments, within, unclamped=wanted)
        means = wanted.result()
        walked = walk(prepared, sample, floats=False)
        for node, sides in bar(walked, "correct biases", progress, count):
            got, simulated = _Means([node]), _simulated(prepared, node)
            for side in sides:
                side.made = evaluate(simulated, side.inputs)
                got(node, side.made)
            shift = (means[node] - got.result()[node]).float()
            shift = torch.where(shift.isfinite(), shift, 0)  # data may have NaN, and infinities
            prepared.biases[node] = _bias(prepared, node) + shift
            for side in sides:
                assert side.made is not None
                side.made += _along(shift, side.made, _channel_axis(node, side.made.dim()))


class _Means:
    """The mean of each channel of these layers' outputs, (N,) float64, over all it is shown."""

    def __init__(self, layers: Iterable[Node]) -> None:
        self._sums = {node: torch.zeros((), dtype=torch.float64) for node in layers}
        self._counts = dict.fromkeys(self._sums, 0)

    def __call__(self, node: Node, value: Tensor) -> None:
        if node in self._sums:
            axis = _channel_axis(node, value.dim())
            others = [i for i in range(value.dim()) if i != axis]
            # in float32, as one batch's: torch is 40 times slower in float64
            count = value.numel() // value.shape[axis]
            self._sums[node] = self._sums[node] + value.mean(others).double() * count
            self._counts[node] += count

    def result(self) -> dict[Node, Tensor]:
        return {node: total / self._counts[node] for node, total in self._sums.items()}


def batch_norm(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Scale each channel of a layer's weight, and shift its bias, so that the layer's output,
    before the clamp, has the mean and the variance that it has in the float network: what
    estimating the statistics of the batch norm anew would do, had it not been folded. The integers
    stay.

    Source: I. Hubara et al., Improving Post Training Neural Quantization: Layer-wise Calibration
    and Integer Programming, 2020, arXiv:2006.10518, section 3.4 (batch normalization tuning).
    """
    count = len(prepared.products())
    with torch.no_grad():
        for node, sides in bar(walk(prepared, sample), "re-estimate", progress, count):
            got, wanted, simulated = [], [], _simulated(prepared, node)
            for side in sides:
                add = side.inputs[1] if len(side.inputs) == 2 else 0.0
                y = evaluate(simulated, side.inputs)
                got.append(_by_channel(node, y - add).double())
                wanted.append(_by_channel(node, side.wanted - add).double())
            y, real = torch.cat(got, 1), torch.cat(wanted, 1)
            spread, wanted_spread = y.std(1, correction=0), real.std(1, correction=0)
            alive = (spread > 0) & (wanted_spread > 0)
            factor = torch.where(alive, wanted_spread / torch.where(alive, spread, 1.0), 1.0)
            integers, scale = prepared.weight(node)
            bias = _bias(prepared, node).double()  # is scaled in y, not by the weight's scale
            prepared.chosen[node] = integers, (scale * factor.numpy()).astype(np.float32)
            prepared.biases[node] = (real.mean(1) - factor * (y.mean(1) - bias)).float()


def _bias(prepared: Prepared, node: Node) -> Tensor:
    """The bias of a layer, (N,) float32; zeros if it has none."""
    bias = prepared.bias(node)
    return torch.zeros(len(prepared.weight(node)[1])) if bias is None else bias


# --------------------------------------------------------------------------------- rounding weights


def balanced_rounding(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Round some weights to the other side, so that the rounding errors in each kernel, then in
    each output, sum to half a step at most.

    Neighbouring pixels have nearly the same value, and channels after a ReLU the same sign: what
    they have in common is multiplied with the sum of their weights. No data are needed.

    Source: C. Guo et al., SQuant: On-the-Fly Data-Free Quantization via Diagonal Hessian
    Approximation, 2022, arXiv:2202.07471, its second and third stage.
    """
    for node in bar(prepared.products(), "balance rounding", progress):
        weight = _float_weight(node)
        scale, qmax = _grid(prepared, node, weight)
        shape = weight_of(node).shape
        steps = (weight / scale[..., None]).reshape(*shape[:2], -1)  # (N, C / G, KH * KW)
        integers = steps.round().clamp(-qmax, qmax)
        rest = steps - integers
        if rest.shape[2] > 1:
            integers += _turned(rest, rest, integers, qmax)
            rest = steps - integers
        side = rest.sum((1, 2), keepdim=True).sign()
        # in each kernel the weight that is nearest to being rounded to the other side
        best = (side * rest).argmax(2, keepdim=True)
        turned = _turned(
            rest.sum(2), rest.gather(2, best)[..., 0], integers.gather(2, best)[..., 0], qmax
        )
        integers.scatter_add_(2, best, turned[..., None])
        data = integers.reshape(shape).to(torch.int8).numpy()
        prepared.chosen[node] = data, scale.flatten().numpy()


def _turned(errors: Tensor, rest: Tensor, integers: Tensor, qmax: int) -> Tensor:
    """What is added to integers (..., K), 0 or one in the direction of their sum of errors, for as
    few as make that sum half a step at most: those of the largest error.

    rest  of the weights, in steps: only one that is on the same side as the sum is turned.
    """
    total = errors.sum(-1, keepdim=True)
    side, count = total.sign(), total.abs().round()
    able = (side * rest > 0) & ((integers + side).abs() <= qmax)
    most = min(int(count.max()), rest.shape[-1])
    size, order = (side * errors).masked_fill(~able, -math.inf).topk(most)
    turned = side * ((torch.arange(most) < count) & size.isfinite())
    return torch.zeros_like(rest).scatter_(-1, order, turned)


@dataclass(frozen=True)
class Rows:
    """What the products of a layer are fitted to: some of its outputs, chosen at random.

    x       (R, G, K) float32: what each group multiplies with its weights, quantized.
    wanted  (R, N): the product that would give the float network's output, with its bias.
    add     (R, N) or None: what is added to the product before the clamp.
    """

    x: Tensor
    wanted: Tensor
    add: Tensor | None


def _rows(node: Node, sides: list[Side]) -> Rows:
    """Random outputs of a layer, the same number from each batch."""
    groups = node.attrs.get("groups", 1)
    k = math.prod(node.tensors["weight"].shape[1:])
    most = min(MAX_ROWS, max(ROWS_BYTES // (4 * groups * k), 64))
    share = -(-most // len(sides))
    generator = torch.Generator().manual_seed(0)
    xs, wanted, added = [], [], []
    for side in sides:
        x, y = side.inputs[0], side.wanted
        count = y.numel() // (y.shape[-1] if node.op == "linear" else y.shape[1])
        picked = torch.randperm(count, generator=generator)[:share]
        if node.op == "linear":
            xs.append(_pixels(node, x, picked)[:, None])
        else:
            xs.append(_patches(node, x, y, picked).reshape(len(picked), groups, k))
        product = _pixels(node, y, picked)
        if len(side.inputs) == 2:
            added.append(_pixels(node, side.inputs[1], picked))
            product = product - added[-1]
        wanted.append(product)
    return Rows(torch.cat(xs), torch.cat(wanted), torch.cat(added) if added else None)


def _pixels(node: Node, value: Tensor, picked: Tensor) -> Tensor:
    """Features (R, C) by their place among all but the axis of the features."""
    return value.movedim(_channel_axis(node, value.dim()), -1).flatten(0, -2)[picked]


def _patches(node: Node, x: Tensor, y: Tensor, picked: Tensor) -> Tensor:
    """What a convolution of x multiplies for these pixels of its output y, (R, C, KH, KW)."""
    a = node.attrs
    h, w = y.shape[2:]
    image, row, column = picked // (h * w), picked // w % h, picked % w
    (top, bottom), (left, right) = a["padding"]
    x = F.pad(x, (left, right, top, bottom))
    kh, kw = node.tensors["weight"].shape[2:]
    (sh, sw), (dh, dw) = a["stride"], a["dilation"]
    rows = row[:, None] * sh + torch.arange(kh) * dh
    columns = column[:, None] * sw + torch.arange(kw) * dw
    index = image[:, None, None], slice(None), rows[:, :, None], columns[:, None, :]
    return x[index].movedim(3, 1)


def _fit(
    prepared: Prepared,
    sample: Sequence[Batch],
    title: str,
    progress: bool,
    choose: Callable[[Prepared, Node, Rows], tuple[Tensor, Tensor]],
) -> None:
    """Let choose(prepared, node, rows) give the integers (G, N / G, K) and scales (G, N / G) of
    each layer, then the scale and the bias that fit them best."""
    count = len(prepared.products())
    with torch.no_grad():
        for node, sides in bar(walk(prepared, sample), title, progress, count):
            if node.op == "conv_transpose2d":
                continue  # its products are no patches of the input
            rows = _rows(node, sides)
            integers, scale = choose(prepared, node, rows)
            shape = node.tensors["weight"].shape
            y = torch.einsum("rgk,gnk->rgn", rows.x, integers * scale[..., None]).flatten(1)
            mean_y, mean = y.mean(0), rows.wanted.mean(0)
            scale = scale.flatten()
            if len(y) >= 1024:  # a scale fitted to few rows fits them alone
                y, t = y - mean_y, rows.wanted - mean
                square = (y * y).sum(0)
                factor = torch.where(square > 0, (y * t).sum(0) / square.clamp_min(1e-30), 1.0)
                factor = factor.clamp(0.9, 1.1)
                scale, mean_y = scale * factor, mean_y * factor
            data = integers.reshape(shape).to(torch.int8).numpy()
            prepared.chosen[node] = data, scale.numpy().astype(np.float32)
            prepared.biases[node] = mean - mean_y


def _grid(prepared: Prepared, node: Node, weight: Tensor) -> tuple[Tensor, int]:
    """(scale (G, N / G), largest integer) for a weight (G, N / G, K), by the layer's QConfig."""
    config = prepared.config(node)
    _, scale = config.quantize_weight(weight.flatten(0, 1).numpy())
    return torch.from_numpy(scale).reshape(weight.shape[:2]), 2 ** (config.weight_bits - 1) - 1


def _float_weight(node: Node) -> Tensor:
    """(G, N / G, K)."""
    weight = weight_of(node).float()
    return weight.reshape(node.attrs.get("groups", 1), -1, math.prod(weight.shape[1:]))


DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ


def _moments(x: Tensor) -> Tensor:
    """The second moments of inputs (R, G, K) about their mean, damped: (G, K, K) float64."""
    x = x - x.mean(0)
    h = torch.einsum("rgk,rgl->gkl", x, x).double() / len(x)
    damp = DAMPING * torch.diagonal(h, dim1=1, dim2=2).mean(1).clamp_min(1e-12)
    return h + damp[:, None, None] * torch.eye(h.shape[-1], dtype=torch.float64)


def gptq(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Round the weights of each output one after the other, and let those that are left make up
    for the error, by least squares over the layer's quantized inputs.

    Source: E. Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers, 2022, arXiv:2210.17323, in the order of the diagonal. The moments
    are about the mean: what is left of it goes into the bias.
    """
    _fit(prepared, sample, "least squares", progress, _gptq)


def _gptq(prepared: Prepared, node: Node, rows: Rows) -> tuple[Tensor, Tensor]:
    h, weight = _moments(rows.x), _float_weight(node)
    scale, qmax = _grid(prepared, node, weight)
    order = torch.diagonal(h, dim1=1, dim2=2).argsort(1, descending=True)  # (G, K)
    groups, n, k = weight.shape
    column = order[:, None].expand(groups, n, k)
    w = weight.double().gather(2, column)
    h = h.gather(1, order[:, :, None].expand(-1, -1, k)).gather(2, order[:, None].expand(-1, k, -1))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    factor = torch.linalg.cholesky(inverse, upper=True)  # (G, K, K)
    step = scale.double()
    q = torch.empty_like(w)
    for i in range(k):
        q[:, :, i] = (w[:, :, i] / step).round().clamp(-qmax, qmax)
        error = (w[:, :, i] - q[:, :, i] * step) / factor[:, None, i, i]
        w[:, :, i + 1 :] -= error[:, :, None] * factor[:, None, i, i + 1 :]
    return torch.empty_like(q).scatter_(2, column, q).float(), scale


ADAROUND_RATE = 0.01
ADAROUND_STEPS = 1000
ADAROUND_SECONDS = 20.0  # for a layer at most
ADAROUND_ROWS = 512  # in a step
ADAROUND_PRESSURE = 0.5  # towards whole steps, beside the error


def adaround(prepared: Prepared, sample: Sequence[Batch], progress: bool = False) -> None:
    """Learn for each weight whether it is rounded up or down, by gradients of the squared error of
    the layer's output, after the clamp, given its quantized inputs.

    ADAROUND_STEPS steps for each layer, fewer where they take longer than ADAROUND_SECONDS: then
    what was learned until then decides.

    Source: M. Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization, 2020,
    arXiv:2004.10568: the rectified sigmoid, and the pressure towards 0 and 1 that grows.
    """
    _fit(prepared, sample, "learn rounding", progress, _adaround)


def _adaround(prepared: Prepared, node: Node, rows: Rows) -> tuple[Tensor, Tensor]:
    weight = _float_weight(node)
    scale, qmax = _grid(prepared, node, weight)
    steps = weight / scale[..., None]
    floor = steps.floor()
    wanted = _clamped(node, rows.wanted if rows.add is None else rows.wanted + rows.add)
    bias = rows.wanted.mean(0) - torch.einsum("gk,gnk->gn", rows.x.mean(0), weight).flatten()
    rest = (steps - floor).clamp(0.01, 0.99)
    share = ((rest + 0.1) / 1.2).logit().requires_grad_()
    optimizer = torch.optim.Adam([share], lr=ADAROUND_RATE)
    generator = torch.Generator().manual_seed(0)
    # the error of rounding to nearest is 1: the pressure means the same for all layers
    nearest = (steps.round() - steps) * scale[..., None]
    unit = torch.einsum("rgk,gnk->rgn", rows.x[:4096], nearest).square().mean().clamp_min(1e-30)
    end = time.monotonic() + ADAROUND_SECONDS
    with torch.enable_grad():
        for i in range(ADAROUND_STEPS):
            done = max(i / ADAROUND_STEPS, 1 - (end - time.monotonic()) / ADAROUND_SECONDS)
            if done >= 1:
                break
            some = torch.randint(len(rows.x), (ADAROUND_ROWS,), generator=generator)
            up = (share.sigmoid() * 1.2 - 0.1).clamp(0, 1)
            rounded = (floor + up).clamp(-qmax, qmax) * scale[..., None]
            y = torch.einsum("rgk,gnk->rgn", rows.x[some], rounded).flatten(1) + bias
            y = _clamped(node, y if rows.add is None else y + rows.add[some])
            loss = (y - wanted[some]).square().mean() / unit
            if done > 0.2:  # the first fifth without pressure
                power = 2 + 18 * (1 - (done - 0.2) / 0.8)
                loss = loss + ADAROUND_PRESSURE * (1 - (2 * up - 1).abs() ** power).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    up = (share.detach().sigmoid() * 1.2 - 0.1).round().clamp(0, 1)
    return (floor + up).clamp(-qmax, qmax), scale


REMEDIES: dict[str, Remedy] = {
    "cross_layer_equalization": Remedy(cross_layer_equalization, first=True),
    "activation_equalization": Remedy(activation_equalization, first=True),
    "input_equalization": Remedy(input_equalization),
    "balanced_rounding": Remedy(balanced_rounding),
    "gptq": Remedy(gptq),
    "adaround": Remedy(adaround),
    "batch_norm": Remedy(batch_norm),
    "bias_correction": Remedy(bias_correction),
}
