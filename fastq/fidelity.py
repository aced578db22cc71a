"""How far the values of a quantized network are from the float one's: of each step, and of the
outputs, on the same batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fastq import ops
from fastq.capture import Captured
from fastq.graph import CONVOLUTION_LAYER, MOVES, VOLUMES, Graph, Node, evaluate
from fastq.layerwise import ratio
from fastq.layout import Stage
from fastq.lower import normalized, weight_of
from fastq.nn.model import QuantizedModel, leaves_of
from fastq.observer import HistogramObserver
from fastq.prepare import Prepared, grid_ends
from fastq.qparams import QParams
from fastq.recipe import read_recipe
from fastq.remedies.side_by_side import axis_after, channel_axis, channel_values
from fastq.sizes import Shapes
from fastq.weights import per_output

BINS = 64
_Channels = tuple[Tensor, Tensor]  # factor and shift of each channel, as they broadcast
# A remedy scaled the channels of a value if without their factors less than 20 dB are left, with
# them 6 dB more, and there are enough values in a channel for that not to be chance.
SCALED_SNR, SCALED_GAIN, SCALED_COUNT = 20.0, 6.0, 16


@dataclass(frozen=True)
class Distribution:
    """Values and the integer grid that they are rounded to.

    counts     of BINS intervals of the same width between low and high: all that was seen, and
               the whole grid.
    seen       the smallest and the largest value, 0 included.
    grid       the smallest and the largest value that has a place in the grid.
    scale      the smallest and the largest step of it; they differ where each channel has its own.
    clipped    the share of the values that round to a place outside of the grid, 0 to 1.
    """

    counts: tuple[int, ...]
    low: float
    high: float
    seen: tuple[float, float]
    grid: tuple[float, float]
    scale: tuple[float, float]
    zero_point: int
    clipped: float


@dataclass(frozen=True)
class StepReport:
    """One step of the quantized network, as `fastq.profile` has it.

    name, layer, op, why  as in `StepProfile`: "" is int8, else why it is float.
    snr       10 log10 of the energy of the float network's value over that of the difference, all
              steps before being quantized too; inf for equal values, None where the float network
              has no such value.
    rescaled  a remedy scaled the channels of this value; `snr` is that of what they stand for.
    time      microseconds at the smallest batch size.
    weights   of a product, in steps of each output channel's scale.    values  that it gives.
    """

    name: str
    layer: str
    op: str
    why: str
    snr: float | None
    rescaled: bool
    time: float
    weights: Distribution | None
    values: Distribution | None


@dataclass
class Tally:
    """Energies of a value and of what int8 adds to it."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, real: Tensor, made: Tensor) -> None:
        """Infinities, as of a mask, are left out: they have no energy to compare."""
        error = made - real
        finite = error.isfinite()
        if not bool(finite.all()):
            real, error = real[finite], error[finite]
        self.signal += float(real.square().sum(dtype=torch.float64))
        self.noise += float(error.square().sum(dtype=torch.float64))

    @property
    def snr(self) -> float:
        return ratio(self.signal, self.noise)


@dataclass
class _Value:
    """What is known of one value of the network; channels: if a remedy changed them, how."""

    tally: Tally = field(default_factory=Tally)
    observer: HistogramObserver = field(default_factory=HistogramObserver)
    clipped: int = 0
    count: int = 0
    channels: _Channels | None = None


@dataclass(frozen=True)
class _Made:
    """A value of the quantized network; qparams is None for float32."""

    array: Any
    axes: tuple[int, ...]
    qparams: QParams | None

    def real(self) -> Tensor:
        array = np.require(self.array, requirements="W")  # torch warns of what was expanded
        x = torch.from_numpy(array).permute([self.axes.index(d) for d in range(len(self.axes))])
        if self.qparams is None:
            return x
        return (x.float() - float(self.qparams.zero_point)) * float(self.qparams.scale)


class Comparison:
    """The float graph and the integer programs on the same batches, value by value."""

    def __init__(self, captured: Captured, quantized: QuantizedModel) -> None:
        self.captured, self.quantized = captured, quantized
        self.recipe: Prepared = read_recipe(quantized)
        ours = {node.name: node.op for node in captured.graph}
        self.grids = [node for node in self.recipe.graph if node.op == "grid"]
        for node in self.recipe.graph:
            own = ours.get(node.name)
            alone = own in VOLUMES and node.attrs.get("target") == CONVOLUTION_LAYER
            if node.op != "grid" and own != node.op and not alone:
                raise ValueError(
                    f"report: the quantized network has {node.op} {node.name!r}, the float model "
                    f"has {own or 'nothing'} there; wanted the one that it was made from"
                )
        self.lowered = [self.recipe.lowered(region) for region in self.recipe.regions]
        self.node_of = {name: node.name for low in self.lowered for node, name in low.names.items()}
        self.values: dict[str, _Value] = {}
        self.moved = _moved_channels(captured.graph, self.recipe.graph)

    def add(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compare all values for these arguments; the quantized network's result."""
        made: dict[str, _Made] = {}
        bound = self.quantized._bound()

        def compute(stage: Stage, inputs: list[Any], shapes: Shapes) -> list[Any]:
            if stage.program < 0:
                value = self.quantized.evaluate(stage, inputs, shapes)
                if isinstance(value, Tensor):
                    made[stage.outputs[0]] = _Made(value.numpy(), tuple(range(value.dim())), None)
                return [value]
            low, program = self.lowered[stage.program], bound[stage.program].program
            arrays = self.quantized.arrays(bound[stage.program], stage, inputs)
            values = program.values(*arrays, module=ops)
            for node, name in low.names.items():
                array = normalized(values[name]) if node in low.weights else values[name]
                qparams = self.recipe.qparams(node) if array.dtype != np.float32 else None
                made[node.name] = _Made(array, low.axes[name], qparams)
            return [
                torch.from_numpy(values[name].transpose(axes)) for name, axes in program.outputs
            ]

        result = self.quantized.walk(compute, args, kwargs)

        def watch(node: Node, value: Any) -> None:
            for grid in self.grids:
                if grid.inputs[0].name == node.name:
                    self._compare(grid, evaluate(grid, [value]), made[grid.name])
            other = made.get(node.name)
            if other is not None and isinstance(value, Tensor) and value.is_floating_point():
                self._compare(node, value, other)

        captured, names = self.captured, self.quantized.layout.names
        leaves = leaves_of(
            self.quantized, tuple(args), dict(kwargs), captured.in_spec, captured.arguments, names
        )
        captured.graph.run(leaves, watch)
        return result

    def _compare(self, node: Node, real: Tensor, made: _Made) -> None:
        other = made.real()
        if node.name not in self.values:
            channels = self.moved.get(node.name)
            if channels is None and node.op != "grid":
                factor = _channel_factor(real, other)
                channels = None if factor is None else (factor, torch.zeros(()))
            self.values[node.name] = _Value(channels=channels)
        value = self.values[node.name]
        if node.op == "grid":
            value.tally.add(_off_grid(node, real), _off_grid(node, other))
        elif value.channels is not None:
            factor, shift = value.channels
            value.tally.add(real, (other - shift) / factor)
            real = real * factor + shift
        else:
            value.tally.add(real, other)
        if made.qparams is not None and node.op not in MOVES:
            low, high = grid_ends(made.qparams)
            half = float(made.qparams.scale) / 2
            value.clipped += int(((real < low - half) | (real > high + half)).sum())
            value.count += real.numel()
            value.observer.update(real.numpy())

    def step(self, name: str, layer: str, op: str, why: str, time: float) -> StepReport:
        """What is known of a step of the program."""
        node_name = self.node_of.get(name, name)
        value = self.values.get(node_name)
        node = next((n for n in self.recipe.graph if n.name == node_name), None)
        return StepReport(
            name=name,
            layer=layer,
            op=op,
            why=why,
            snr=value.tally.snr if value else None,
            rescaled=value is not None and value.channels is not None,
            time=time,
            weights=self._weights(node) if node in self.recipe.layers() else None,
            values=self._values(node, value) if node and value and value.count else None,
        )

    def _weights(self, node: Node) -> Distribution:
        data, scale = self.recipe.weight(node)
        given = next(n for n in self.captured.graph if n.name == node.name)
        steps = weight_of(given).numpy() / per_output(scale, data.ndim)
        scaled = node.inputs[0].op == "grid" or np.median(np.abs(steps - data)) > 1
        if scaled:  # by a remedy, its channels: no float twin
            steps = data
        end = 2 ** (self.recipe.config(node).weight_bits - 1) - 1
        seen = float(steps.min(initial=0)), float(steps.max(initial=0))
        shown = min(seen[0], -end), max(seen[1], end)
        counts, _ = np.histogram(steps, BINS, shown)
        scales = float(scale.min()), float(scale.max())
        clipped = float((np.abs(np.rint(steps)) > end).mean())
        return Distribution(tuple(counts.tolist()), *shown, seen, (-end, end), scales, 0, clipped)

    def _values(self, node: Node, value: _Value) -> Distribution:
        qparams = self.recipe.qparams(node)
        bins, scales, unit = value.observer.bins(), [float(qparams.scale)], 1.0
        if node.op == "grid":  # a step is another for each channel
            unit = float(qparams.scale)
            scales = (unit / node.tensors["factor"]).tolist()
        low, high = grid_ends(qparams)
        grid = low / unit, high / unit
        seen = float(value.observer.minimum) / unit, float(value.observer.maximum) / unit
        shown = min(seen[0], grid[0]), max(seen[1], grid[1])
        counts, _ = np.histogram(bins.centers / unit, BINS, shown, weights=bins.counts)
        return Distribution(
            tuple(counts.astype(np.int64).tolist()), *shown, seen, grid, (min(scales), max(scales)),
            int(qparams.zero_point), value.clipped / value.count,
        )  # fmt: skip


def _off_grid(grid: Node, value: Tensor) -> Tensor:
    """What was put on a grid for each channel, in the units of the input."""
    shape = [1, -1] + [1] * (value.dim() - 2)
    return (value - grid.tensors["shift"].reshape(shape)) / grid.tensors["factor"].reshape(shape)


def _moved_channels(given: Graph, made: Graph) -> dict[str, _Channels]:
    """The values of equalized norms, and what moves them, by their nodes' names."""
    float_nodes, users = {node.name: node for node in given}, made.users()
    found: dict[str, _Channels] = {}
    for node in made:
        if "equalized" not in node.attrs:
            continue
        names = ("factor", "shift") if node.op == "affine" else ("weight", "bias")
        (new, new_shift), (old, old_shift) = (
            [channel_values(n, *default) for default in zip(names, (1.0, 0.0), strict=True)]
            for n in (node, float_nodes[node.name])
        )
        factor = torch.where(old == 0, 1.0, new / old)
        shift = new_shift - old_shift * factor
        pending = [(node, channel_axis(node, len(node.shape)))]
        while pending:
            value, axis = pending.pop()
            sides = [-1 if d == axis else 1 for d in range(len(value.shape))]
            found[value.name] = factor.reshape(sides), shift.reshape(sides)
            moves = ((user, axis_after(value, user, axis)) for user in users[value])
            pending += [(user, after) for user, after in moves if after is not None]
    return found


def _channel_factor(real: Tensor, made: Tensor) -> Tensor | None:
    """What equalization multiplied each channel by, by least squares; None if it did not."""
    if real.dim() < 2 or not bool(real.isfinite().all()):
        return None
    axis = 1 if real.dim() == 4 else real.dim() - 1
    plain, fitted = Tally(), Tally()
    plain.add(real, made)
    if plain.snr > SCALED_SNR or real.numel() < SCALED_COUNT * real.shape[axis]:
        return None
    others = [d for d in range(real.dim()) if d != axis]
    energy = real.square().sum(others, keepdim=True, dtype=torch.float64)
    factor = (real * made).sum(others, keepdim=True, dtype=torch.float64) / energy
    factor = torch.where(factor.isfinite() & (factor > 0), factor, 1.0).float()
    fitted.add(real * factor, made)
    return factor if fitted.snr > plain.snr + SCALED_GAIN else None


class Outputs:
    """The results of both networks: predictions, and energies of each output."""

    def __init__(self) -> None:
        self.samples = 0
        self.tallies: list[Tally] = []
        self.predictions: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.classes = 0

    def add(self, real: Any, made: Any, samples: int) -> None:
        pairs = [
            (a, b)
            for a, b in zip(pytree.tree_leaves(real), pytree.tree_leaves(made), strict=True)
            if isinstance(a, Tensor) and a.is_floating_point()
        ]
        self.samples += samples
        self.tallies = self.tallies or [Tally() for _ in pairs]
        for tally, pair in zip(self.tallies, pairs, strict=True):
            tally.add(*pair)
        if pairs and pairs[0][0].dim() >= 2 and pairs[0][0].shape[1] > 1:
            self.classes = pairs[0][0].shape[1]
            for kept, output in zip(self.predictions, pairs[0], strict=True):
                kept.append(output.argmax(1))

    def agreement(self) -> float | None:
        a, b = self.predictions
        if not a:
            return None
        same = sum(int((x == y).sum()) for x, y in zip(a, b, strict=True))
        return same / sum(x.numel() for x in a)

    def accuracy(self, labels: Tensor) -> tuple[float, float]:
        a, b = (torch.cat(kept) if kept else torch.empty(0) for kept in self.predictions)
        if labels.shape != a.shape:
            raise ValueError(
                f"report: labels {tuple(labels.shape)}, predictions {tuple(a.shape)}; wanted a "
                "class for each input, and a first output (n, classes, ...)"
            )
        if not bool(((labels >= 0) & (labels < self.classes)).all()):
            raise ValueError(
                f"report: labels from {int(labels.min())} to {int(labels.max())}; wanted 0 to "
                f"{self.classes - 1}, for a first output of {self.classes} classes"
            )
        return tuple(float((p == labels).double().mean()) for p in (a, b))  # type: ignore[return-value]
