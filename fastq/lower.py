"""From a region of a fused float graph and the ranges of its values to an integer program.

Torch's axes become the program's (images NHWC), ranges become scales and zero points; batch norms
and activations are already part of the products.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastq.arguments import REQUANTIZED
from fastq.graph import Node, run_calls
from fastq.program import Program
from fastq.qparams import UNCLAMPED, Dequant, QParams, Requant, limits
from fastq.regions import FIXED, Region, bare_weights, gives_floats
from fastq.sizes import Size, sides_of
from fastq.steps import Step
from fastq.weights import MAX_BIAS, Conv2dWeight, LinearWeight, outputs_first, with_room

Weights = Callable[[Node], tuple[Any, Any]]  # a node's (int8 data, float32 scale per output)
Biases = Callable[[Node], Tensor | None]

NHWC = (0, 2, 3, 1)
ANY_ORDER = ("pointwise", "affine", "add", "mul", "pad", "slice", "concat")  # read any order
OF_FEATURES = ("linear", "layer_norm", "rms_norm", "matmul")  # read lines of the last axis
# A norm's epsilon, in squared steps of its input. With the least one a line of equal values gives 0
# and not NaN; next to the most the variance is nothing in float32.
LEAST_EPSILON = 1e-30
MOST_EPSILON = 2.0**96
SUFFIX = {np.dtype(np.uint8): "u8", np.dtype(np.int16): "s16"}  # of names


def normalized(weights: Any) -> Any:
    """What bare weights stand for, float32: each line divided by its sum."""
    return weights / np.maximum(weights.sum(-1, keepdims=True, dtype=np.float32), np.float32(1))


def weight_of(node: Node) -> Tensor:
    """The float weight with its outputs first."""
    return mirrored(node, node.tensors["weight"].detach())


def mirrored(node: Node, weight: Tensor) -> Tensor:
    """A weight with its outputs first. A transposed convolution's kernel is reversed, too: that of
    the convolution which it is, of pixels set apart. And back."""
    if node.op != "conv_transpose2d":
        return weight
    first: Tensor = outputs_first(weight, node.attrs["groups"])
    return first.flip(2, 3).contiguous()


@dataclass(frozen=True)
class Lowered:
    """A program, and where to find the values of the graph in it.

    names    node -> its value: uint8 or int16, or float32 for a product that gives float32 itself.
    axes     value -> the torch axis of each of its axes.
    weights  the softmaxes of which the value is weights: divided by the sum of a line.
    scales   layer -> those of its weight's outputs, in the program.
    """

    program: Program
    names: Mapping[Node, str]
    axes: Mapping[str, tuple[int, ...]]
    weights: Collection[Node]
    scales: Mapping[Node, Any]


def lowered(
    region: Region,
    qparams: Callable[[Node], QParams],
    weights: Weights,
    biases: Biases,
) -> Lowered:
    """A region as a program. qparams(node) is the quantization of a value, uint8 or int16."""
    lowering = _Lowering(region, qparams, weights, biases)
    program = lowering.program()
    return Lowered(program, lowering.names, lowering.axes, lowering.weights_only, lowering.scales)


class _Lowering:
    def __init__(
        self,
        region: Region,
        qparams: Callable[[Node], QParams],
        weights: Weights,
        biases: Biases,
    ) -> None:
        self.region, self.qparams, self.weights, self.biases = region, qparams, weights, biases
        self.steps: list[Step] = []
        self.axes: dict[str, tuple[int, ...]] = {}  # value -> the torch axis of each of its axes
        self.names: dict[Node, str] = {}
        self.scales: dict[Node, Any] = {}
        self.weights_only = bare_weights([region])
        self.users = {
            n: [u for u in region.nodes for v in u.inputs if v is n]
            for n in (*region.inputs, *region.nodes)
        }

    def program(self) -> Program:
        region = self.region
        for node in region.quantized_inputs:
            if node.op == "constant":
                self.constant(node)
                continue
            axes = self.read_first(node)
            q = self.qparams(node)
            self.names[node] = self.emit(
                "quantize", f"{node.name}_{SUFFIX[q.dtype]}", [node.name], axes, node,
                scale=float(q.scale), zero_point=int(q.zero_point), axes=axes, dtype=q.dtype.name,
            )  # fmt: skip
        for node in region.nodes:
            if node.op == "constant":
                self.constant(node)
            else:
                self.names[node] = getattr(self, f"lower_{node.op}", self.lower_unary)(node)
        outputs = []
        for node in region.outputs:
            name = self.names[node]
            if not self.ends_float(node):
                q = self.qparams(node)
                name = self.emit(
                    "dequantize", f"{node.name}_f32", [name], self.axes[name], node,
                    scale=float(q.scale), zero_point=int(q.zero_point),
                )  # fmt: skip
            order = self.axes[name]
            outputs.append((name, tuple(order.index(d) for d in range(len(order)))))
        extents = tuple(self.extent(node) for node in region.given)
        names = tuple(node.name for node in region.given)
        return Program(names, tuple(self.steps), tuple(outputs), extents)

    def read_first(self, node: Node) -> tuple[int, ...]:
        """The order of an input's axes that suits the first who minds it."""
        plain = dims = tuple(range(len(node.shape)))
        user = self.users[node][0]
        while user.op in ("permute", *ANY_ORDER) and self.users[user]:
            if user.op == "permute":
                dims = tuple(dims[d] for d in user.attrs["dims"])
            user = self.users[user][0]
        image = len(node.shape) == 4 and user.op not in OF_FEATURES
        if image and user.op == "reshape":  # else lines of the last axis stay lines
            turned = any(after.op == "permute" for after in self.users[user])
            image = turned and user.shape[-1] != user.inputs[0].shape[-1]
        return tuple(dims[axis] for axis in (NHWC if image else plain))

    def extent(self, node: Node) -> tuple[int | None, ...]:
        """Which sizes of a program's input may vary. Of a value in the network any: where its batch
        and its channels are is not known, but to the steps that take it."""
        return node.extent if node.op == "input" else (None,) * len(node.shape)

    def emit(
        self,
        op: str,
        name: str,
        inputs: Sequence[str],
        axes: tuple[int, ...],
        node: Node,
        /,
        **arguments: Any,
    ) -> str:
        self.steps.append(Step(op, name, tuple(inputs), arguments, node.layer))
        self.axes[name] = axes
        return name

    def constant(self, node: Node) -> None:
        q = self.qparams(node)
        axes = NHWC if len(node.shape) == 4 else tuple(range(len(node.shape)))
        value = node.tensors["value"].detach().permute(axes).numpy()
        steps = np.rint(value / q.scale) + q.zero_point
        data = np.clip(steps, *limits(q.dtype)).astype(q.dtype)
        self.names[node] = self.emit("constant", node.name, [], axes, node, value=data)

    def in_order(self, node: Node, axes: tuple[int, ...], user: Node) -> str:
        """The value of a node with its axes in this order."""
        name = self.names[node]
        have = self.axes[name]
        if have == axes:
            return name
        moved = f"{name}_{''.join(map(str, axes))}"
        if moved not in self.axes:
            self.emit("permute", moved, [name], axes, user,
                      axes=tuple(have.index(d) for d in axes))  # fmt: skip
        return moved

    def image(self, node: Node, user: Node) -> str:
        return self.in_order(node, NHWC, user)

    def features_last(self, node: Node, user: Node, axis: int | None = None) -> str:
        """With the torch axis (default: the last one) at the end; the others stay in order."""
        axis = len(node.shape) - 1 if axis is None else axis
        axes = self.axes[self.names[node]]
        if axes[-1] == axis:
            return self.names[node]
        return self.in_order(node, (*(a for a in axes if a != axis), axis), user)

    def channels_last(self, node: Node) -> str:
        """Its input, with the channels at the end; the other axes stay in order."""
        return self.in_order(node.inputs[0], (0, *range(2, len(node.shape)), 1), node)

    # ------------------------------------------------------------------ arithmetic

    def scale(self, node: Node) -> float:
        return float(self.qparams(node).scale)

    def zero_point(self, node: Node) -> int:
        return int(self.qparams(node).zero_point)

    def requantized(self, node: Node) -> dict[str, int]:
        """The zero point of a node, and its clamp in steps."""
        scale, zero_point = self.scale(node), self.zero_point(node)
        least, most = limits(self.qparams(node).dtype)

        def step(value: float) -> int:
            steps = np.rint(np.clip(value / scale, -1e9, 1e9)) + zero_point
            return int(np.clip(steps, least, most))

        lo, hi = node.attrs.get("clamp", (-math.inf, math.inf))
        return {"zero_point": zero_point, "qmin": step(lo), "qmax": step(hi)}

    def ends_float(self, node: Node) -> bool:
        """Whether a product gives float32 itself: nobody in the region takes its value."""
        return node in self.region.outputs and gives_floats(node) and not self.users[node]

    def product(self, node: Node) -> tuple[Any, Requant | Dequant]:
        """(int8 weight, epilogue) of a convolution or a linear layer."""
        data, scale = self.weights(node)
        bias = self.biases(node)
        real = None if bias is None else bias.detach().numpy()
        x_scale = self.scale(node.inputs[0])
        if self.ends_float(node):
            self.scales[node] = scale
            fmin, fmax = node.attrs.get("clamp", (-math.inf, math.inf))
            return data, Dequant(scale, np.array(x_scale, np.float32), real, fmin, fmax)
        if real is not None:
            data, scale = with_room(data, scale, real, x_scale)
        self.scales[node] = scale
        step = np.float64(x_scale) * scale.astype(np.float64)
        y_scale = self.scale(node)
        clamp: dict[str, Any] = self.requantized(node)
        add: dict[str, Any] = {}
        if len(node.inputs) == 2:
            factor = node.tensors.get("add_factor")
            each = 1.0 if factor is None else factor.detach().double().numpy()
            add["add_multiplier"] = each * self.scale(node.inputs[1]) / y_scale
            add["add_zero_point"] = self.zero_point(node.inputs[1])
        wanted = None
        if real is not None:  # beyond MAX_BIAS where float32 has no scale that is coarse enough
            steps = np.rint(real.astype(np.float64) / step)
            wanted = np.clip(steps, -MAX_BIAS, MAX_BIAS).astype(np.int32)
        multiplier = np.maximum((step / y_scale).astype(np.float32), np.finfo(np.float32).tiny)
        return data, Requant(
            multiplier, bias=wanted, **clamp, **add, dtype=self.qparams(node).dtype
        )

    def lower_grid(self, node: Node) -> str:
        (x,), (left, right, top, bottom) = node.inputs, node.attrs["pad"]
        axes = NHWC if len(node.shape) == 4 else (0, 1)
        scale = float(FIXED["grid"].scale)  # a power of 2: the division is exact
        return self.emit(
            "grid", node.name, [x.name], axes, node, axes=axes,
            padding=((top, bottom), (left, right)),
            **{key: node.tensors[key].float().numpy() / scale for key in ("factor", "shift")},
        )  # fmt: skip

    def lower_conv2d(self, node: Node) -> str:
        data, epilogue = self.product(node)
        a = node.attrs
        weight = Conv2dWeight(data, a["stride"], a["padding"], a["dilation"], a["groups"])
        return self.emit(
            "conv2d", node.name, [self.image(v, node) for v in node.inputs], NHWC, node,
            weight=weight, epilogue=epilogue, x_zero_point=self.zero_point(node.inputs[0]),
        )  # fmt: skip

    def lower_conv_transpose2d(self, node: Node) -> str:
        """A convolution with stride 1 of pixels that are set `stride` apart."""
        data, epilogue = self.product(node)
        a, (x,) = node.attrs, node.inputs
        padding = tuple(
            (d * (k - 1) - p, d * (k - 1) - p + more)
            for d, k, p, more in zip(
                a["dilation"], data.shape[2:], a["padding"], a["output_padding"], strict=True
            )
        )
        zero_point = self.zero_point(x)
        apart = self.emit(
            "dilate", f"{node.name}_apart", [self.image(x, node)], NHWC, node,
            stride=a["stride"], padding=padding, value=zero_point,
        )  # fmt: skip
        weight = Conv2dWeight(data, dilation=a["dilation"], groups=a["groups"])
        return self.emit("conv2d", node.name, [apart], NHWC, node, weight=weight,
                         epilogue=epilogue, x_zero_point=zero_point)  # fmt: skip

    def lower_linear(self, node: Node) -> str:
        data, epilogue = self.product(node)
        inputs = [self.features_last(node.inputs[0], node)]
        axes = self.axes[inputs[0]]
        if len(node.inputs) == 2:
            inputs.append(self.in_order(node.inputs[1], axes, node))
        return self.emit(
            "linear", node.name, inputs, axes, node, weight=LinearWeight(data),
            epilogue=epilogue, x_zero_point=self.zero_point(node.inputs[0]),
        )  # fmt: skip

    def lower_matmul(self, node: Node) -> str:
        a, b = node.inputs
        rank = len(a.shape)
        plain = tuple(range(rank))
        turned = (*plain[:-2], rank - 1, rank - 2)
        # what was transposed is read as it lies
        transposed = self.axes[self.names[b]][-1] == rank - 2
        arguments: dict[str, Any] = {"transpose_b": transposed}
        mean, real = a in self.weights_only, self.ends_float(node)
        factor = node.attrs.get("factor", 1.0) * self.scale(b) / (1.0 if real else self.scale(node))
        result = dict(zip(REQUANTIZED, UNCLAMPED, strict=True)) if real else self.requantized(node)
        inputs = [
            self.in_order(a, plain, node),
            self.in_order(b, turned if transposed else plain, node),
        ]
        return self.emit(
            "matmul", node.name, inputs, plain, node,
            multiplier=factor * (1.0 if mean else self.scale(a)), mean=mean,
            a_zero_point=self.zero_point(a), **arguments, **result,
            dtype="float32" if real else "uint8",
        )  # fmt: skip

    def lower_add(self, node: Node) -> str:
        a, b = node.inputs
        axes = self.axes_of_two(a if a.op != "constant" else b)
        scale = self.scale(node)
        return self.emit(
            "add", node.name, [self.in_order(a, axes, node), self.in_order(b, axes, node)], axes,
            node, a_multiplier=self.scale(a) / scale,
            b_multiplier=self.scale(b) * node.attrs.get("alpha", 1.0) / scale,
            a_zero_point=self.zero_point(a), b_zero_point=self.zero_point(b),
            **self.requantized(node), dtype=self.qparams(node).dtype.name,
        )  # fmt: skip

    def axes_of_two(self, node: Node) -> tuple[int, ...]:
        """The order of the axes of an operation with two operands; of more axes than its kernel
        takes torch's, for which `why_float` knows that they join."""
        axes = self.axes[self.names[node]]
        return axes if len(axes) <= 4 else tuple(range(len(axes)))

    def lower_mul(self, node: Node) -> str:
        a, b = node.inputs
        if a.shape != node.shape:  # the operand that is broadcast comes second
            a, b = b, a
        axes = self.axes_of_two(a)
        return self.emit(
            "mul", node.name, [self.in_order(a, axes, node), self.in_order(b, axes, node)], axes,
            node, multiplier=self.scale(a) * self.scale(b) / self.scale(node),
            a_zero_point=self.zero_point(a), b_zero_point=self.zero_point(b),
            **self.requantized(node),
        )  # fmt: skip

    def lower_affine(self, node: Node) -> str:
        (x,) = node.inputs
        name = self.features_last(x, node, 1)
        factor, shift = (node.tensors[k].double().numpy() for k in ("factor", "shift"))
        scale = self.scale(node)
        return self.emit(
            "affine", node.name, [name], self.axes[name], node,
            multiplier=(factor * self.scale(x) / scale).astype(np.float32),
            shift=(shift / scale).astype(np.float32), x_zero_point=self.zero_point(x),
            **self.requantized(node),
        )  # fmt: skip

    def lower_pointwise(self, node: Node) -> str:
        (x,) = node.inputs
        real = self.grid(x)
        with torch.no_grad():
            y = run_calls(node.attrs["calls"], torch.from_numpy(real)).numpy()
        return self.table(node, self.names[x], self.quantized(node, y))

    def lower_prelu(self, node: Node) -> str:
        (x,) = node.inputs
        real, slope = self.grid(x), node.tensors["weight"].detach().float().numpy()
        y = np.where(real >= 0, real, slope[:, None] * real)
        values = self.quantized(node, y)
        if len(slope) == 1:
            return self.table(node, self.names[x], values[0])
        return self.table(node, self.features_last(x, node, 1), values)

    def grid(self, node: Node) -> Any:
        """The 256 reals that a value can be."""
        steps = np.arange(256, dtype=np.float32) - np.float32(self.zero_point(node))
        return steps * np.float32(self.scale(node))

    def quantized(self, node: Node, real: Any) -> Any:
        y = np.nan_to_num(real.astype(np.float64) / self.scale(node), nan=0.0)
        return np.clip(np.rint(y) + self.zero_point(node), 0, 255).astype(np.uint8)

    def table(self, node: Node, name: str, values: Any) -> str:
        return self.emit("table", node.name, [name], self.axes[name], node, values=values)

    def lower_recurrent(self, node: Node) -> str:
        (x,), (data, scale), bias = node.inputs, self.weights(node), self.biases(node)
        name, own, self.scales[node] = self.features_last(x, node), self.scale(node), scale
        real = None if bias is None else bias.detach().numpy()
        return self.emit(
            "recurrent", node.name, [name], self.axes[name], node, cell=node.attrs["cell"],
            weight=LinearWeight(data), epilogue=Dequant(scale, np.array(own, np.float32), real),
            x_scale=self.scale(x), multiplier=1 / own, reverse=node.attrs["reverse"],
            axis=self.axes[name].index(node.attrs["time"]), **self.requantized(node),
        )  # fmt: skip

    def lower_softmax(self, node: Node) -> str:
        x, *masks = node.inputs
        name = self.features_last(x, node, node.attrs["dim"])
        axes = self.axes[name]
        names = [name, *(self.in_order(mask, axes, node) for mask in masks)]
        op = "softmax_weights" if node in self.weights_only else "softmax"
        return self.emit(op, node.name, names, axes, node, scale=self.scale(x),
                         uniform=node.attrs["uniform"])  # fmt: skip

    def lower_layer_norm(self, node: Node) -> str:
        return self.norm(node, self.features_last(node.inputs[0], node))

    def lower_rms_norm(self, node: Node) -> str:
        (x,) = node.inputs
        return self.norm(node, self.features_last(x, node), x_zero_point=self.zero_point(x))

    def lower_group_norm(self, node: Node) -> str:
        return self.norm(node, self.channels_last(node), groups=node.attrs["groups"])

    def lower_global_response_norm(self, node: Node) -> str:
        name, (x,), scale = self.channels_last(node), node.inputs, self.scale(node)
        epsilon, beyond = in_bounds(node.attrs["eps"] / self.scale(x))
        step = self.scale(x) / scale
        weight, bias = weight_and_bias(node, node.shape[1])
        return self.emit(
            node.op, node.name, [name], self.axes[name], node, epsilon=epsilon,
            multiplier=(weight * step / beyond).astype(np.float32),
            shift=(bias / scale).astype(np.float32),
            residual=node.attrs.get("residual", 0.0) * step, x_zero_point=self.zero_point(x),
            **self.requantized(node),
        )  # fmt: skip

    def norm(self, node: Node, name: str, **arguments: Any) -> str:
        (x,), scale = node.inputs, self.scale(node)
        epsilon, beyond = in_bounds(node.attrs["eps"] / self.scale(x) ** 2)
        weight, bias = weight_and_bias(node, x.shape[self.axes[name][-1]])
        arguments["multiplier"] = (weight / scale / beyond**0.5).astype(np.float32)
        if node.op != "rms_norm":
            arguments["shift"] = (bias / scale).astype(np.float32)
        return self.emit(
            node.op, node.name, [name], self.axes[name], node, **arguments,
            epsilon=epsilon,
            **self.requantized(node),
        )  # fmt: skip

    def lower_avg_pool2d(self, node: Node) -> str:
        return self.average(node, **node.attrs["pool"])

    def lower_adaptive_avg_pool2d(self, node: Node) -> str:
        return self.average(node, output_size=tuple(node.attrs["output_size"]))

    def average(self, node: Node, **arguments: Any) -> str:
        (x,) = node.inputs
        return self.emit(
            node.op, node.name, [self.image(x, node)], NHWC, node, **arguments,
            multiplier=self.scale(x) / self.scale(node), x_zero_point=self.zero_point(x),
            **self.requantized(node),
        )  # fmt: skip

    def own(self, size: Any) -> Any:
        """A size that follows an input of the network, by that input's number in the program."""
        if not isinstance(size, Size):
            return size
        numbers = [node.attrs.get("number") for node in self.region.given]
        return replace(size, input=numbers.index(size.input))

    def lower_unary(self, node: Node) -> str:
        """Pooling and resizing: images, and arguments that are torch's."""
        a, (x,) = node.attrs, node.inputs
        arguments: dict[str, Any] = {}
        match node.op:
            case "max_pool2d":
                arguments = a["pool"]
            case "adaptive_max_pool2d":
                arguments = {"output_size": tuple(a["output_size"])}
            case "upsample_nearest2d" | "upsample_bilinear2d":
                size = a["size"].get("size")
                arguments = {
                    "output_size": None if size is None else tuple(map(self.own, size)),
                    "scale_factor": a["size"].get("scale_factor"),
                }
                if node.op == "upsample_bilinear2d":
                    arguments["align_corners"] = a["align_corners"]
        return self.emit(node.op, node.name, [self.image(x, node)], NHWC, node, **arguments)

    # ------------------------------------------------------------------ moving

    def lower_concat(self, node: Node) -> str:
        made = [value for value in node.inputs if value.op != "constant"] or node.inputs
        axes = self.axes[self.names[made[0]]]
        parts = []
        for i, value in enumerate(node.inputs):
            name = self.in_order(value, axes, node)
            if self.qparams(value) != self.qparams(node):
                name = self.emit(
                    "affine", f"{node.name}_part{i}", [name], axes, node,
                    multiplier=np.array(self.scale(value) / self.scale(node), np.float32),
                    shift=np.zeros((), np.float32), x_zero_point=self.zero_point(value),
                    zero_point=self.zero_point(node), qmin=0, qmax=255,
                )  # fmt: skip
            parts.append(name)
        return self.emit("concat", node.name, parts, axes, node,
                         axis=axes.index(node.attrs["dim"]))  # fmt: skip

    def lower_slice(self, node: Node) -> str:
        name = self.names[node.inputs[0]]
        a = node.attrs
        return self.emit(
            "slice", node.name, [name], self.axes[name], node, axis=self.axes[name].index(a["dim"]),
            start=a["start"], end=a["end"], step=a["step"],
        )  # fmt: skip

    def lower_pad(self, node: Node) -> str:
        name = self.names[node.inputs[0]]
        widths = sides_of(node.attrs["pad"], len(node.shape))
        axes, sizes = self.axes[name], None
        if "size" in node.attrs:
            to = (None, None, *map(self.own, node.attrs["size"]["size"]))
            sizes = tuple(to[d] for d in axes)
        value = 0 if "value" in node.attrs else self.zero_point(node)  # what is given is the lowest
        return self.emit(
            "pad", node.name, [name], axes, node, mode=node.attrs["mode"],
            widths=tuple(widths[d] for d in axes), output_size=sizes, value=value,
        )  # fmt: skip

    def lower_permute(self, node: Node) -> str:
        """No step: only the names of the axes change."""
        name = self.names[node.inputs[0]]
        dims = node.attrs["dims"]
        self.axes[node.name] = tuple(dims.index(d) for d in self.axes[name])
        return self.emit("reshape", node.name, [name], self.axes[node.name], node,
                         sizes=tuple(((i,), 1) for i in range(len(dims))), ones=())  # fmt: skip

    def lower_reshape(self, node: Node) -> str:
        (x,) = node.inputs
        groups = node.attrs["groups"]
        axes = _together(self.axes[self.names[x]], x.shape, [joined for joined, _ in groups])
        name = self.in_order(x, axes, node)
        first = 0
        sizes: dict[int, list[tuple[int, Any]]] = {}
        ones: list[int] = []
        for joined, parts in groups:
            wide = [d for d in joined if x.shape[d] != 1]
            ones += [
                axes.index(d) for d in joined if x.shape[d] == 1 and (len(joined) > 1 or not parts)
            ]
            place = min((axes.index(d) for d in wide or joined), default=len(axes))
            parts = tuple(map(self.own, parts))
            known = prod(p for p in parts if isinstance(p, int))
            others = [p for p in parts if isinstance(p, Size)]
            from_axes = tuple(axes.index(d) for d in joined)
            made = [
                (first + i, part if part is not None else (from_axes, known, *others))
                for i, part in enumerate(parts)
            ]
            sizes.setdefault(place, []).extend(made)
            first += len(parts)
        ordered = [entry for place in sorted(sizes) for entry in sizes[place]]
        return self.emit(
            "reshape", node.name, [name], tuple(d for d, _ in ordered), node,
            sizes=tuple(size for _, size in ordered), ones=tuple(ones),
        )  # fmt: skip


def _together(
    axes: tuple[int, ...], shape: Sequence[int], groups: Iterable[Sequence[int]]
) -> tuple[int, ...]:
    """An order of axes in which those of each group are side by side, where the last of them is.
    Axes of size 1 may be anywhere."""
    order = list(axes)
    for joined in groups:
        wide = [d for d in joined if shape[d] != 1]
        places = [order.index(d) for d in wide]
        if len(wide) > 1 and places != list(range(places[0], places[0] + len(wide))):
            before = order[: max(places)]
            rest = [d for d in order if d not in wide]
            k = sum(d in rest for d in before)
            order = rest[:k] + wide + rest[k:]
    return tuple(order)


def in_bounds(epsilon: float) -> tuple[float, float]:
    """(epsilon, beyond) of a norm: one that a program takes, and by how much it is less. Next to it
    values that vanish are: the norm is a constant factor then."""
    beyond = max(epsilon / MOST_EPSILON, 1.0)
    return max(epsilon, LEAST_EPSILON) / beyond, beyond


def weight_and_bias(node: Node, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Those of a norm of n channels, 1 and 0 if it has none."""
    weight = node.tensors.get("weight", torch.ones(n))
    bias = node.tensors.get("bias", torch.zeros(n))
    return tuple(t.detach().double().flatten().numpy() for t in (weight, bias))  # type: ignore[return-value]
