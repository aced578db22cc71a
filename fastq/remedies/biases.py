"""Remedies of the biases: outputs whose mean, and variance, are those of the float network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastq.graph import Node, added, evaluate
from fastq.prepare import Prepared, grid_ends
from fastq.progress import bar
from fastq.regions import WEIGHTED
from fastq.remedies.side_by_side import (
    Batch,
    along,
    by_channel,
    channel_axis,
    entering,
    simulation,
    walk,
)


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
        value = entering(prepared, node, value)
        clamp = value.clamp_ if node.op in WEIGHTED else value.clamp  # a product is new memory
        return clamp(*grid_ends(prepared.qparams(node)))

    with torch.no_grad():
        for arguments in bar(sample, "float means", progress):
            prepared.graph.run(arguments, within, unclamped=wanted)
        means = wanted.result()
        walked = walk(prepared, sample, floats=False)
        for node, sides in bar(walked, "correct biases", progress, count):
            got, simulated = _Means([node]), simulation(prepared, node)
            for side in sides:
                side.made = evaluate(simulated, side.inputs)
                got(node, side.made)
            shift = (means[node] - got.result()[node]).float()
            shift = torch.where(shift.isfinite(), shift, 0)  # where no value was seen is no mean
            prepared.biases[node] = _bias(prepared, node) + shift
            for side in sides:
                assert side.made is not None
                side.made += along(shift, side.made, channel_axis(node, side.made.dim()))


class _Means:
    """The mean of each channel of these layers' outputs, (N,) float64, over all it is shown."""

    def __init__(self, layers: Iterable[Node]) -> None:
        self._sums = {node: torch.zeros((), dtype=torch.float64) for node in layers}
        self._counts = dict.fromkeys(self._sums, 0)

    def __call__(self, node: Node, value: Tensor) -> None:
        if node in self._sums:
            axis = channel_axis(node, value.dim())
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
            got, wanted, simulated = [], [], simulation(prepared, node)
            for side in sides:
                add = added(node, side.inputs[1]) if len(side.inputs) == 2 else 0.0
                y = evaluate(simulated, side.inputs)
                got.append(by_channel(node, y - add).double())
                wanted.append(by_channel(node, side.wanted - add).double())
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
