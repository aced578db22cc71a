"""A program on this machine: the rows of kernels that compute its values, where they lie.

A plan holds for one set of input shapes and strides, one tier and one number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import isa
from fastq.kernels.call import (
    At,
    Call,
    Idle,
    View,
    address_of,
    collapse,
    dense_strides,
)
from fastq.kernels.executor import get_num_threads
from fastq.kernels.group_norm import global_response_norm_row, group_norm_row
from fastq.kernels.layers import stage_image
from fastq.kernels.layout import border_row, copy_row, dequantize_row, permuted, quantize_row
from fastq.kernels.lines import broadcast
from fastq.kernels.matmul import matmul_row
from fastq.kernels.norms import layer_norm_row, rms_norm_row, softmax_row, softmax_weights_row
from fastq.kernels.pointwise import add_row, affine_row, fill_row, mul_row, table_row
from fastq.kernels.products import ACTIVATIONS
from fastq.kernels.recurrent import recurrent_row
from fastq.kernels.simd import emitter
from fastq.kernels.windows import (
    adaptive_avg_pool2d_row,
    adaptive_max_pool2d_row,
    avg_pool2d_row,
    max_pool2d_row,
    upsample_bilinear2d_row,
    upsample_nearest2d_row,
)
from fastq.packed import PackedWeights
from fastq.placement import NO_FRAME, Placement
from fastq.program import Program
from fastq.steps import Step, kept_places, pad_widths

Array = NDArray[Any]

PLAIN_ROWS: dict[str, Any] = {
    "affine": affine_row,
    "layer_norm": layer_norm_row,
    "rms_norm": rms_norm_row,
    "group_norm": group_norm_row,
    "global_response_norm": global_response_norm_row,
}
IMAGE_ROWS: dict[str, Any] = {
    "max_pool2d": max_pool2d_row,
    "avg_pool2d": avg_pool2d_row,
    "adaptive_avg_pool2d": adaptive_avg_pool2d_row,
    "adaptive_max_pool2d": adaptive_max_pool2d_row,
    "upsample_nearest2d": upsample_nearest2d_row,
    "upsample_bilinear2d": upsample_bilinear2d_row,
}


@dataclass(frozen=True)
class Plan:
    """A call that runs a program on the addresses of its inputs and outputs.

    outputs  shapes of the float32 outputs, each C-contiguous, before they are transposed.
    arena    bytes that all values take.
    steps    for each row of the call the step that it belongs to.
    """

    call: Call
    outputs: tuple[tuple[int, ...], ...]
    arena: int
    steps: tuple[int, ...]


class BoundProgram:
    """A program on this machine: its packed weights, and a plan for each kind of input.

    Several threads may call it: each runs a plan of its own, on its own memory.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self._packed = PackedWeights()
        self._plans = Idle()
        self._axes = [
            None if axes == tuple(range(len(axes))) else axes for _, axes in program.outputs
        ]

    def __call__(self, *inputs: Array) -> list[Array]:
        """The outputs of `program.reference`, by the kernels: the same bits.

        inputs  float32, any strides, of such shapes as `program.extents` says. NaN counts as 0,
                infinities saturate. Raises TypeError and ValueError for other inputs.
        """
        aligned = True
        for x in inputs:
            if not isinstance(x, np.ndarray) or x.dtype != np.float32:
                given = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
                raise TypeError(f"program: an input is {given}; wanted a float32 array")
            aligned = aligned and x.flags.aligned
        if not aligned:
            inputs = tuple(x.copy() for x in inputs)
        key, made = self.take(*inputs)
        outputs = [np.empty(shape, np.float32) for shape in made.outputs]
        made.call.run(*[address_of(array) for array in (*inputs, *outputs)])
        self.give(key, made)
        arranged = zip(outputs, self._axes, strict=True)
        return [y if axes is None else y.transpose(axes) for y, axes in arranged]

    def take(self, *inputs: Array) -> tuple[Any, Plan]:
        """An idle plan for these inputs, or a new one; and its key, to give it back."""
        tier = isa.current()
        key = (tier, get_num_threads(), *[(x.shape, x.strides) for x in inputs])
        made = self._plans.take(key)
        if made is None:
            shapes, strides = [x.shape for x in inputs], [x.strides for x in inputs]
            made = plan(self.program, shapes, strides, tier, self._packed)
        return key, made

    def give(self, key: Any, made: Plan) -> None:
        """Another call may take the plan again."""
        self._plans.give(key, made)

    def __getstate__(self) -> dict[str, Any]:
        return {"program": self.program}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def moved(view: View, down: int, across: int, height: int, width: int) -> View:
    """An image's view from another pixel on, of another size."""
    assert isinstance(view.place, At)
    place = view.place + (down * view.strides[1] + across * view.strides[2])
    return View(place, (view.shape[0], height, width, view.shape[3]), view.strides, view.kind)


def _borders(padded: Array, first: int, last: int, mode: str) -> list[tuple[Array, Array]]:
    """What lies before and after first:last of axis 0, each with what it is a copy of."""
    before, after = padded[:first], padded[last:]
    match mode:
        case "reflect":
            sources = (
                padded[first + 1 : 2 * first + 1][::-1],
                padded[last - 1 - len(after) : last - 1][::-1],
            )
        case "circular":
            sources = padded[last - first : last], padded[first : first + len(after)]
        case _:  # "replicate"
            sources = (
                np.broadcast_to(padded[first : first + 1], before.shape),
                np.broadcast_to(padded[last - 1 : last], after.shape),
            )
    return [(before, sources[0]), (after, sources[1])]


def as_image(view: View) -> View:
    """Rows (M, F) as images of one pixel; an image as it is."""
    if len(view.shape) == 4:
        return view
    (rows, features), (row, feature) = view.shape, view.strides
    return View(view.place, (rows, 1, 1, features), (row, row, row, feature), view.kind)


def plan(
    program: Program,
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    tier: str,
    packed: PackedWeights,
) -> Plan:
    """The plan for float32 inputs of these shapes and strides."""
    return _Planner(program, shapes, strides, tier, packed).plan()


class _Planner:
    def __init__(
        self,
        program: Program,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[tuple[int, ...]],
        tier: str,
        packed: PackedWeights,
    ) -> None:
        self.steps = [step.sized(shapes) for step in program.steps]
        self.shapes, self.tier = program.shapes(*shapes), tier
        self.narrow = ACTIVATIONS[emitter(tier).a_bytes]  # the kind of what is not wide
        self.kinds = {
            name: {"uint8": self.narrow, "int16": "s16", "float32": "f32"}[dtype]
            for name, dtype in program.dtypes.items()
        }
        outputs = [name for name, _ in program.outputs]
        self.call = Call(len(shapes) + len(outputs))
        self.floats: dict[str, View] = {}
        for i, (name, shape, steps) in enumerate(zip(program.inputs, shapes, strides, strict=True)):
            self.floats[name] = View(At(i), tuple(shape), tuple(steps), "f32")
        for i, name in enumerate(outputs, len(shapes)):
            shape = self.shapes[name]
            self.floats[name] = View(At(i), shape, dense_strides(shape, 4), "f32")
        self.outputs = tuple(self.shapes[name] for name in outputs)
        self.placement = Placement(program, self.shapes, self.kinds, self.floats, tier, packed)
        self.values, self.copies = self.placement.values, self.placement.copies

    def plan(self) -> Plan:
        self.placement.settle(self.call.scratch(self.placement.arena))
        rows: list[int] = []
        for i, step in enumerate(self.steps):
            with self.call.borrowed_scratch():
                try:
                    self.rows_of(i, step)
                except ValueError as error:
                    raise ValueError(f"{step}: {error}") from error
            rows += [i] * (self.call.rows - len(rows))
        return Plan(self.call, self.outputs, self.placement.arena, tuple(rows))

    def rows_of(self, i: int, step: Step) -> None:
        """Appends the rows of a step: none for a value without elements."""
        if 0 in self.shapes[step.name]:
            return
        self.fill_frames(i, step)
        for (at, name), (storage, mold) in self.copies.items():
            if at == i:
                copy_row(self.call, self.stored(name), storage.view(mold, self.kinds[name]))
        if step.name not in self.placement.apart:
            getattr(self, f"row_{step.op}")(i, step)

    def fill_frames(self, i: int, step: Step) -> None:
        """Writes the zero points around the images that are made from step i on."""
        for storage in self.placement.storages:
            if storage.first != i or storage.frame == NO_FRAME:
                continue
            if step.op == "quantize" and self.is_staged(step):
                continue  # writes its frame as well
            whole = storage.view(storage.whole, self.narrow)
            border_row(self.call, whole, *storage.frame, storage.border)

    # ------------------------------------------------------------------ rows

    def stored(self, name: str) -> View:
        """A value's view, float32 or in the arena."""
        if name in self.floats:
            return self.floats[name]
        storage, mold = self.values[name]
        return storage.view(mold, self.kinds[name])

    def input(self, i: int, name: str) -> View:
        """The view that step i reads: of the value, or of its copy."""
        if (i, name) in self.copies:
            storage, mold = self.copies[i, name]
            return storage.view(mold, self.kinds[name])
        return self.stored(name)

    def layer(self, step: Step) -> Any:
        """The packed weight of a product."""
        (layer,) = self.placement.layers(step)
        return layer

    def row_conv2d(self, i: int, step: Step) -> None:
        name, _ = self.placement.source(step)
        x, out = self.input(i, name), self.stored(step.name)
        layers = self.placement.layers(step)
        if step.name not in self.placement.phases:
            (top, bottom), (left, right) = step.arguments["weight"].padding
            x = moved(x, -top, -left, x.shape[1] + top + bottom, x.shape[2] + left + right)
            layers[0].rows(self.call, x, out, *self.added(i, step), **self.scales(step))
            return
        rows, columns = self.placement.phases[step.name]
        places = [(down, across) for down in rows for across in columns]
        for layer, (down, across) in zip(layers, places, strict=True):
            if not (down.count and across.count):
                continue
            (sh, sw), (kh, kw) = (len(rows), len(columns)), layer.weight.kernel_size
            seen = moved(x, down.start, across.start, down.count + kh - 1, across.count + kw - 1)
            b, _, _, n = out.shape
            steps = (out.strides[0], sh * out.strides[1], sw * out.strides[2], out.strides[3])
            corner = moved(out, down.first, across.first, 0, 0).place
            target = View(corner, (b, down.count, across.count, n), steps, out.kind)
            layer.rows(self.call, seen, target, **self.scales(step))

    def added(self, i: int, step: Step) -> list[View]:
        return [self.input(i, name) for name in step.inputs[1:]]

    def scales(self, step: Step) -> dict[str, Any]:
        """What a Dequant reads of the input."""
        a = step.arguments
        if not hasattr(a["epilogue"], "x_scale"):
            return {}
        return {
            "scale": np.array([a["epilogue"].x_scale], np.float32),
            "zero_point": np.array([a["x_zero_point"]], np.int32),
        }

    def row_linear(self, i: int, step: Step) -> None:
        views = [self.input(i, step.inputs[0]), self.stored(step.name), *self.added(i, step)]
        shape, strides = collapse(views, 2, keep=1)
        flat = [
            View(view.place, (shape[0], view.shape[-1]), steps, view.kind)
            for view, steps in zip(views, strides, strict=True)
        ]
        self.layer(step).rows(self.call, *flat, **self.scales(step))

    def row_recurrent(self, i: int, step: Step) -> None:
        rest = {k: v for k, v in step.arguments.items() if k not in ("weight", "epilogue")}
        x, out = self.input(i, step.inputs[0]), self.stored(step.name)
        recurrent_row(self.call, x, out, self.layer(step), **rest)

    def is_staged(self, step: Step) -> bool:
        """Whether an input is quantized as an image, with its frame, into a storage of its own."""
        storage, mold = self.values[step.name]
        zeros = storage.frame == NO_FRAME or storage.border == step.arguments["zero_point"]
        narrow = self.kinds[step.name] != "s16"
        return narrow and mold.ndim == 4 and mold.shape == storage.shape and zeros

    def row_quantize(self, i: int, step: Step) -> None:
        a = step.arguments
        x = permuted(self.floats[step.inputs[0]], a["axes"])
        if self.is_staged(step):
            storage, _ = self.values[step.name]
            scale = np.array([a["scale"]], np.float32)
            zero_point = np.array([a["zero_point"]], np.int32)
            whole = storage.view(storage.whole, self.narrow)
            stage_image(self.call, x, whole, storage.frame[::2], scale, zero_point)
        else:
            quantize_row(self.call, x, self.stored(step.name), a["scale"], a["zero_point"])

    def row_grid(self, i: int, step: Step) -> None:
        a = step.arguments
        x, out = as_image(permuted(self.floats[step.inputs[0]], a["axes"])), self.stored(step.name)
        whole = as_image(out)
        made = whole if whole.dense else self.call.dense(whole.shape, self.narrow)
        (top, _), (left, _) = a["padding"]
        stage_image(self.call, x, made, (top, left), a["factor"], a["shift"], grid=True)
        if made is not whole:
            copy_row(self.call, made, whole)

    def row_dequantize(self, i: int, step: Step) -> None:
        a = step.arguments
        x, out = self.input(i, step.inputs[0]), self.stored(step.name)
        dequantize_row(self.call, x, out, a["scale"], a["zero_point"])

    def row_constant(self, i: int, step: Step) -> None:
        value = np.array(step.arguments["value"], order="C")
        kind = "u8" if value.dtype == np.uint8 else "s16"
        source = View(value, value.shape, value.strides, kind)
        copy_row(self.call, source, self.stored(step.name))

    def row_add(self, i: int, step: Step) -> None:
        a, b = (self.input(i, name) for name in step.inputs)
        p = step.arguments
        add_row(
            self.call, a, b, self.stored(step.name), (p["a_multiplier"], p["b_multiplier"]),
            (p["a_zero_point"], p["b_zero_point"]), p["zero_point"], p["qmin"], p["qmax"],
        )  # fmt: skip

    def row_mul(self, i: int, step: Step) -> None:
        a, b = (self.input(i, name) for name in step.inputs)
        p = step.arguments
        mul_row(
            self.call, a, b, self.stored(step.name), p["multiplier"],
            (p["a_zero_point"], p["b_zero_point"]), p["zero_point"], p["qmin"], p["qmax"],
        )  # fmt: skip

    def row_plain(self, i: int, step: Step) -> None:
        """The row of an operation of one value, with the step's arguments as they are."""
        x, out = self.input(i, step.inputs[0]), self.stored(step.name)
        PLAIN_ROWS[step.op](self.call, x, out, **step.arguments)

    row_affine = row_layer_norm = row_rms_norm = row_group_norm = row_plain
    row_global_response_norm = row_plain

    def row_table(self, i: int, step: Step) -> None:
        x, out = self.input(i, step.inputs[0]), self.stored(step.name)
        table_row(self.call, x, out, step.arguments["values"])

    def row_softmax(self, i: int, step: Step) -> None:
        x, *masks = (self.input(i, name) for name in step.inputs)
        mask = masks[0] if masks else None
        row = {"softmax": softmax_row, "softmax_weights": softmax_weights_row}[step.op]
        row(self.call, x, self.stored(step.name), **step.arguments, mask=mask)

    row_softmax_weights = row_softmax

    def row_matmul(self, i: int, step: Step) -> None:
        a, b = (self.input(i, name) for name in step.inputs)
        arguments = {k: v for k, v in step.arguments.items() if k != "dtype"}  # the output has it
        matmul_row(self.call, a, b, self.stored(step.name), isa=self.tier, **arguments)

    def row_image(self, i: int, step: Step) -> None:
        """Pooling and resizing, to the size of the output."""
        arguments = {k: v for k, v in step.arguments.items() if k != "output_size"}
        x, out = self.input(i, step.inputs[0]), self.stored(step.name)
        IMAGE_ROWS[step.op](self.call, x, out, **arguments)

    row_max_pool2d = row_avg_pool2d = row_adaptive_avg_pool2d = row_adaptive_max_pool2d = row_image
    row_upsample_nearest2d = row_upsample_bilinear2d = row_image

    def row_slice(self, i: int, step: Step) -> None:
        """A row only where the value is not a view of its input."""
        source, target = self.values[step.inputs[0]], self.values[step.name]
        if source[0] is target[0]:
            return
        seen, kind = self.placement.seen(step, source[1]), self.kinds[step.name]
        out = target[0].view(target[1], kind)
        if seen is not None:
            copy_row(self.call, source[0].view(seen, kind), out)
            return
        # a reshape: through the input's shape, in the output's memory if that is dense: it is not
        # in a frame, or in its place among what is concatenated
        shape, apart = self.shapes[step.inputs[0]], not out.dense
        via = self.call.dense(shape, kind) if apart else replace(
            out, shape=shape, strides=dense_strides(shape, out.item)
        )  # fmt: skip
        copy_row(self.call, source[0].view(source[1], kind), via)
        if apart:
            dense = dense_strides(out.shape, out.item)
            copy_row(self.call, replace(via, shape=out.shape, strides=dense), out)

    row_reshape = row_permute = row_slice

    def row_concat(self, i: int, step: Step) -> None:
        """Rows for the parts that were not written in their place."""
        storage, mold = self.values[step.name]
        axis, start = step.arguments["axis"], 0
        for name in step.inputs:
            end = start + self.shapes[name][axis]
            index = [slice(None)] * mold.ndim
            index[axis] = slice(start, end)
            target = storage.view(mold[tuple(index)], self.kinds[step.name])
            source = self.input(i, name)
            if source.place != target.place:
                copy_row(self.call, broadcast(source, target.shape), target)
            start = end

    def row_pad(self, i: int, step: Step) -> None:
        storage, mold = self.values[step.name]
        kind = self.kinds[step.name]
        x, mode = self.input(i, step.inputs[0]), step.arguments["mode"]
        kept, inside = kept_places(pad_widths(step, x.shape), x.shape)
        if mode == "constant":
            fill_row(self.call, storage.view(mold, kind), step.arguments["value"])
        assert isinstance(x.place, At)
        start = sum(s.start * stride for s, stride in zip(kept, x.strides, strict=True))
        sizes = tuple(s.stop - s.start for s in kept)
        if 0 not in sizes:
            seen = View(x.place + start, sizes, x.strides, x.kind)
            copy_row(self.call, seen, storage.view(mold[inside], kind))
        if mode == "constant":
            return
        ends = [(s.start, s.stop) for s in inside]
        for axis in range(mold.ndim):  # the axes before it are whole by now
            here = mold[(slice(None),) * (axis + 1) + inside[axis + 1 :]]
            for pair in _borders(np.moveaxis(here, axis, 0), *ends[axis], mode):
                border, source = (storage.view(part, kind) for part in pair)
                copy_row(self.call, source, border)

    def row_dilate(self, i: int, step: Step) -> None:
        a = step.arguments
        storage, mold = self.values[step.name]
        x = self.input(i, step.inputs[0])
        fill_row(self.call, storage.view(mold, self.narrow), a["value"])
        (top, _), (left, _) = a["padding"]
        sh, sw = a["stride"]
        h, w = (x.shape[1] - 1) * sh + 1, (x.shape[2] - 1) * sw + 1
        target = storage.view(mold[:, top : top + h : sh, left : left + w : sw], self.narrow)
        copy_row(self.call, x, target)
