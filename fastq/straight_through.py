"""Values of a grid with a gradient: what training puts in the place of the float ones.

The integers are those of the program; the gradient is that of the value which was rounded to them,
and zero where it was clipped: the straight-through estimator (Bengio et al., 2013).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastq import ops
from fastq.graph import Node
from fastq.lower import normalized
from fastq.nn.model import as_input
from fastq.prepare import HEADROOM, Prepared, grid_ends, symmetric, wide
from fastq.qparams import QParams, choose_qparams
from fastq.regions import Region
from fastq.sizes import Shapes
from fastq.steps import OPERATIONS

# A learned scale is taken as at least this, should a step of training make it 0 or negative: the
# program's factors stay finite, and the next gradient can widen the range again.
NARROWEST = 2.0**-64
AVERAGING = 0.01  # a training batch's share in a range: torch's averaging_constant for training


class RegionIntegers:
    """The integers of one region, computed as they are asked for.

    values  of its nodes and of what it takes, as training sees them.
    """

    def __init__(self, prepared: Prepared, region: Region, shapes: Shapes) -> None:
        self.prepared, self.region = prepared, region
        self.lowered = prepared.lowered(region)
        # of what the program takes; of values in the network nobody asks for the size
        places = {node.name: i for i, node in enumerate(prepared.graph.inputs)}
        names = self.lowered.program.inputs
        self.shapes = [shapes[places[name]] if name in places else () for name in names]
        self.steps = {step.name: step for step in self.lowered.program.steps}
        self.arrays: dict[str, Any] = {}
        self.values: dict[Node, Any] = {}

    def take(self, node: Node, x: Any) -> None:
        """The float value of an input."""
        if node.op != "constant":
            program = self.lowered.program
            extent = program.extents[program.inputs.index(node.name)]
            given = x.detach() if isinstance(x, Tensor) else x
            self.arrays[node.name] = as_input(f"QATModel: {node.name}", given, extent)

    def array(self, name: str) -> Any:
        if name not in self.arrays:
            step = self.steps[name]
            inputs = map(self.array, step.inputs)
            self.arrays[name] = OPERATIONS[step.op].run(ops, step.sized(self.shapes), *inputs)
        return self.arrays[name]

    def ends_float(self, node: Node) -> bool:
        """Whether the program has this value in float32: nobody in it takes it."""
        return bool(self.array(self.lowered.names[node]).dtype == np.float32)

    def real(self, node: Node) -> Tensor:
        """The value of a node, its axes as torch has them: scale * (q - zero_point)."""
        name = self.lowered.names[node]
        axes = self.lowered.axes[name]
        array = self.array(name)
        if node in self.lowered.weights:
            array = normalized(array)
        steps = torch.from_numpy(array)
        steps = steps.permute([axes.index(d) for d in range(len(axes))])
        if steps.dtype == torch.float32:
            return steps
        qparams = self.prepared.qparams(node)
        return (steps.float() - float(qparams.zero_point)) * float(qparams.scale)


class _OnGrid(torch.autograd.Function):
    """real(), a tensor of the grid, instead of x that was rounded to it: the gradient is x's where
    x is within the grid, from `low` to `high` steps of width `step`, and 0 beyond.

    scale  the step as a parameter, or None; its gradient is LSQ's (equations 3 and 5), scaled by
           1 / sqrt(count * (steps on the longer side of 0)), with `count` values that share it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, real: Callable[[], Tensor],
        step: Any, low: float, high: float, count: int,
    ) -> Tensor:  # fmt: skip
        steps = x.float() / step
        inside = (steps >= low - 0.5) & (steps <= high + 0.5)  # what rounds to a step of the grid
        if scale is not None and ctx.needs_input_grad[1]:
            slope = torch.where(inside, steps.round() - steps, steps.clamp(low, high))
            slope = slope.nan_to_num_(0.0)  # NaN counts as 0, which no scale moves
            ctx.save_for_backward(inside, slope)
            ctx.share, ctx.shape = (max(count, 1) * max(high, -low)) ** -0.5, scale.shape
        else:
            ctx.save_for_backward(inside)
        return real()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        inside, *slope = ctx.saved_tensors
        learned = None
        if slope:
            learned = (grad * slope[0] * ctx.share).reshape(*ctx.shape, -1).sum(-1)
        return grad * inside, learned, None, None, None, None, None


def on_grid(
    x: Tensor, scale: Tensor | None, real: Callable[[], Tensor],
    step: Any, low: float, high: float, count: int,
) -> Tensor:  # fmt: skip
    """See _OnGrid."""
    result: Tensor = _OnGrid.apply(x, scale, real, step, low, high, count)  # type: ignore[no-untyped-call]
    return result


class TrainedRange(nn.Module):
    """The scale and zero point of a value; learned, or following the values of training.

    ends  the smallest and the largest value, float32. The average moves these: a zero point, an
          integer, would stay where it is.
    """

    scale: Tensor
    zero_point: Tensor
    ends: Tensor

    def __init__(self, qparams: QParams, centered: bool, learned: bool) -> None:
        super().__init__()
        scale, zero_point = float(qparams.scale), int(qparams.zero_point)
        self.centered, self.dtype = centered, qparams.dtype
        # An optimizer's steps would be far too long for those of int16, which nothing depends on:
        # their range is twice what was seen.
        self.learned = learned and not self.wide
        if self.learned:
            self.scale = nn.Parameter(torch.tensor(scale, dtype=torch.float32))
        else:
            self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(zero_point, dtype=torch.int32))
        ends = torch.tensor(grid_ends(qparams), dtype=torch.float32)
        self.register_buffer("ends", ends / HEADROOM if self.wide else ends)

    def qparams(self) -> QParams:
        scale = self.scale.detach().clamp(min=NARROWEST)
        return QParams(scale.numpy(), self.zero_point.numpy(), self.dtype)

    @property
    def wide(self) -> bool:
        return bool(self.dtype == np.int16)

    def follow(self, ends: Tensor) -> None:
        """Take a batch into account: (n, 2), the ends of each of its values."""
        ends = torch.stack([ends[:, 0].min(), ends[:, 1].max()])
        if bool(ends.isfinite().all()):
            self.ends.lerp_(ends, AVERAGING)
            found = choose_qparams(*self.ends.numpy())
            found = symmetric(found) if self.centered else wide(found) if self.wide else found
            self.scale.fill_(float(found.scale))
            self.zero_point.fill_(int(found.zero_point))


class TrainedSteps(nn.Module):
    """The scale of a layer's weight, per output: a parameter, or what a quantized model had."""

    scale: Tensor

    def __init__(self, scale: Tensor, learned: bool) -> None:
        super().__init__()
        if learned:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale)
