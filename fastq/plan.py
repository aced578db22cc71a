"""A program on this machine: where its values lie, and the rows of kernels that compute them.

Every uint8 or int16 value lies in a storage, a piece of one arena. A storage may be wider than a
value: it has the frame of zero points that convolutions read beyond an image, and values that are
concatenated lie in it side by side, written there by the steps that make them. Reshapes, slices
and permutes are views where strides can say so. Storages that are not needed at the same time
share memory.

A plan holds for one set of input shapes and strides, one tier and one number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastq.kernels import isa
from fastq.kernels.call import (
    ITEM_BYTES,
    At,
    Call,
    Idle,
    View,
    address_of,
    collapse,
    dense_strides,
)
from fastq.kernels.convolution import pack_conv2d
from fastq.kernels.executor import get_num_threads
from fastq.kernels.group_norm import group_norm_row
from fastq.kernels.layers import stage_image
from fastq.kernels.layout import border_row, copy_row, dequantize_row, permuted, quantize_row
from fastq.kernels.lines import broadcast, join_lines
from fastq.kernels.matmul import matmul_row
from fastq.kernels.norms import layer_norm_row, rms_norm_row, softmax_row, softmax_weights_row
from fastq.kernels.pointwise import add_row, affine_row, fill_row, mul_row, table_row
from fastq.kernels.products import ACTIVATIONS, PackedLinear
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
from fastq.program import VIEWS, Program, Step, slice_index
from fastq.weights import Conv2dWeight

Array = NDArray[Any]
Frame = tuple[int, int, int, int]  # top, bottom, left, right
NO_FRAME: Frame = (0, 0, 0, 0)
JOINED = {  # how many axes kernels take, and how many of them do not join: see `collapse`
    "linear": (2, 1), "matmul": (4, 2), "softmax": (4, 1), "softmax_weights": (4, 1),
    "layer_norm": (4, 1), "rms_norm": (4, 1), "add": (4, 0), "mul": (4, 0), "affine": (4, 1),
    "table": (4, 1),
}  # fmt: skip
MAX_PHASES = 2**12  # each has rows and packed weights of its own; FCN-32s has 2**10


PLAIN_ROWS: dict[str, Any] = {
    "affine": affine_row,
    "layer_norm": layer_norm_row,
    "rms_norm": rms_norm_row,
    "group_norm": group_norm_row,
}
IMAGE_ROWS: dict[str, Any] = {
    "max_pool2d": max_pool2d_row,
    "avg_pool2d": avg_pool2d_row,
    "adaptive_avg_pool2d": adaptive_avg_pool2d_row,
    "adaptive_max_pool2d": adaptive_max_pool2d_row,
    "upsample_nearest2d": upsample_nearest2d_row,
    "upsample_bilinear2d": upsample_bilinear2d_row,
}


@dataclass(eq=False)
class Storage:
    """Memory from step `first` to step `last`; the frame is filled with `border`."""

    shape: tuple[int, ...]
    item: int
    frame: Frame
    border: int
    first: int
    last: int
    whole: Array  # a stand-in: its strides and addresses count, nothing is read or written
    place: At = field(default_factory=lambda: At(0))

    @property
    def mold(self) -> Array:
        """The stand-in without the frame."""
        if self.frame == NO_FRAME:
            return self.whole
        top, bottom, left, right = self.frame
        h, w = self.whole.shape[1:3]
        return self.whole[:, top : h - bottom, left : w - right]

    def view(self, mold: Array, kind: str) -> View:
        offset = address_of(mold) - address_of(self.whole)
        return View(self.place + offset, mold.shape, mold.strides, kind)


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
        self._packed: dict[Any, Any] = {}
        self._plans = Idle()

    def __call__(self, *inputs: Array) -> list[Array]:
        """The outputs of `program.reference`, by the kernels: the same bits.

        inputs  float32, any strides, of such shapes as `program.extents` says. NaN counts as 0,
                infinities saturate. Raises TypeError and ValueError for other inputs.
        """
        for x in inputs:
            if not isinstance(x, np.ndarray) or x.dtype != np.float32:
                given = x.dtype if isinstance(x, np.ndarray) else type(x).__name__
                raise TypeError(f"program: an input is {given}; wanted a float32 array")
        inputs = tuple(x if x.flags.aligned else x.copy() for x in inputs)
        key, made = self.take(*inputs)
        outputs = [np.empty(shape, np.float32) for shape in made.outputs]
        made.call.run(*map(address_of, (*inputs, *outputs)))
        self.give(key, made)
        axes = (axes for _, axes in self.program.outputs)
        return [y.transpose(order) for y, order in zip(outputs, axes, strict=True)]

    def take(self, *inputs: Array) -> tuple[Any, Plan]:
        """An idle plan for these inputs, or a new one; and its key, to give it back."""
        shapes, strides = [x.shape for x in inputs], [x.strides for x in inputs]
        tier = isa.current()
        key = (tier, get_num_threads(), *shapes, *strides)
        found: Plan = self._plans.take(key) or plan(
            self.program, shapes, strides, tier, self._packed
        )
        return key, found

    def give(self, key: Any, made: Plan) -> None:
        """Another call may take the plan again."""
        self._plans.give(key, made)

    def __getstate__(self) -> dict[str, Any]:
        return {"program": self.program}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


@dataclass(frozen=True)
class Phase:
    """Every stride-th output of an axis, from `first` on: which taps it takes of which pixels.

    taps    of the kernel.      start   the pixel under the first of them, for the first output.
    count   of outputs.         before, after  pixels that are read beyond the input's ends.
    """

    first: int
    taps: slice
    start: int
    count: int
    before: int
    after: int


def phases_of(
    kernel: int, stride: int, padding: tuple[int, int], outputs: int, pixels: int
) -> list[Phase]:
    """The phases of one axis: output o takes tap k of pixel (o + k - padding) / stride."""
    found = []
    for first in range(stride):
        tap = (padding[0] - first) % stride
        start = (first + tap - padding[0]) // stride
        count, taps = len(range(first, outputs, stride)), max(len(range(tap, kernel, stride)), 1)
        last = start + count - 1 + taps - 1
        found.append(Phase(first, slice(tap, None, stride), start, count, max(0, -start),
                           max(0, last - (pixels - 1))))  # fmt: skip
    return found


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
    isa: str,
    packed: dict[Any, Any],
) -> Plan:
    """The plan for float32 inputs of these shapes and strides; `packed` keeps packed weights."""
    return _Planner(program, shapes, strides, isa, packed).plan()


class _Planner:
    def __init__(
        self,
        program: Program,
        shapes: Sequence[tuple[int, ...]],
        strides: Sequence[tuple[int, ...]],
        isa: str,
        packed: dict[Any, Any],
    ) -> None:
        self.program, self.isa, self.packed = program, isa, packed
        self.narrow = ACTIVATIONS[emitter(isa).a_bytes]  # the kind of what is not wide
        self.kinds = {
            name: {"uint8": self.narrow, "int16": "s16", "float32": "f32"}[dtype]
            for name, dtype in program.dtypes.items()
        }
        self.steps, self.shapes = program.steps, program.shapes(*shapes)
        self.makers = {step.name: step for step in self.steps}
        self.users: dict[str, list[int]] = {name: [] for name in self.shapes}
        for i, step in enumerate(self.steps):
            for name in step.inputs:
                self.users[name].append(i)
        outputs = [name for name, _ in program.outputs]
        self.call = Call(len(shapes) + len(outputs))
        self.floats: dict[str, View] = {}
        for i, (name, shape, steps) in enumerate(zip(program.inputs, shapes, strides, strict=True)):
            self.floats[name] = View(At(i), tuple(shape), tuple(steps), "f32")
        for i, name in enumerate(outputs, len(shapes)):
            shape = self.shapes[name]
            self.floats[name] = View(At(i), shape, dense_strides(shape, 4), "f32")
        self.outputs = tuple(self.shapes[name] for name in outputs)
        self.storages: list[Storage] = []
        self.phases: dict[str, tuple[list[Phase], list[Phase]]] = {}  # of a conv2d, by axis
        self.apart: dict[str, str] = {}  # "dilate" that is not made -> what it is made of
        self.placed: dict[str, tuple[str, int]] = {}  # value -> concatenation, first channel
        self.frames: dict[str, Frame] = {}  # root value -> frame
        self.values: dict[str, tuple[Storage, Array]] = {}
        self.copies: dict[tuple[int, str], tuple[Storage, Array]] = {}  # for one step alone

    def plan(self) -> Plan:
        self.find_phases()
        self.place_concatenations()
        self.find_frames()
        for i, step in enumerate(self.steps):
            if step.name in self.apart:
                continue
            if step.name not in self.floats:
                self.values[step.name] = self.mold(i, step)
            self.copy_inputs(i, step)
        arena = self.lay_out()
        rows: list[int] = []
        for i, step in enumerate(self.steps):
            with self.call.borrowed_scratch():
                try:
                    self.rows_of(i, step)
                except ValueError as error:
                    raise ValueError(f"{step}: {error}") from error
            rows += [i] * (self.call.rows - len(rows))
        return Plan(self.call, self.outputs, arena, tuple(rows))

    def rows_of(self, i: int, step: Step) -> None:
        """Appends the rows of a step: none for a value without elements."""
        if 0 in self.shapes[step.name]:
            return
        self.fill_frames(i, step)
        for (at, name), (storage, mold) in self.copies.items():
            if at == i:
                copy_row(self.call, self.stored(name), storage.view(mold, self.kinds[name]))
        if step.name not in self.apart:
            getattr(self, f"row_{step.op}")(i, step)

    # ------------------------------------------------------------------ transposed convolutions

    def find_phases(self) -> None:
        """A convolution of pixels set apart is one for each place between them, on the pixels as
        they were: the taps that fall on zero points are left out."""
        for i, step in enumerate(self.steps):
            maker = self.makers.get(step.inputs[0]) if step.op == "conv2d" else None
            if maker is None or maker.op != "dilate" or len(self.users[maker.name]) != 1:
                continue
            weight, a = step.arguments["weight"], maker.arguments
            if weight.dilation != (1, 1) or weight.stride != (1, 1) or len(step.inputs) != 1:
                continue
            if weight.padding != ((0, 0), (0, 0)):
                continue
            if a["value"] != step.arguments["x_zero_point"]:
                continue  # what lies between the pixels is no zero
            if prod(a["stride"]) > MAX_PHASES:
                continue
            source = maker.inputs[0]
            axes = zip(
                weight.kernel_size, a["stride"], a["padding"], self.shapes[step.name][1:3],
                self.shapes[source][1:3], strict=True,
            )  # fmt: skip
            self.phases[step.name] = tuple(phases_of(*axis) for axis in axes)  # type: ignore[assignment]
            self.apart[maker.name] = source
            self.users[source].append(i)

    def source(self, step: Step) -> tuple[str, Frame]:
        """The image that a convolution reads, and the frame that it reads around it."""
        if step.name in self.phases:
            sides = [
                max(getattr(phase, side) for phase in axis)
                for axis in self.phases[step.name]
                for side in ("before", "after")
            ]
            return self.apart[step.inputs[0]], (sides[0], sides[1], sides[2], sides[3])
        (top, bottom), (left, right) = step.arguments["weight"].padding
        return step.inputs[0], (top, bottom, left, right)

    # ------------------------------------------------------------------ where values lie

    def place_concatenations(self) -> None:
        """Lets what is concatenated along the last axis be written in its place, from the last
        concatenation on: an earlier one whose parts already lie side by side is there as well."""
        for step in reversed(self.steps):
            if step.op != "concat" or step.arguments["axis"] != len(self.shapes[step.name]) - 1:
                continue
            widths = [self.shapes[name][-1] for name in step.inputs]
            starts = np.cumsum([0, *widths])[:-1]
            homes = [self.placed.get(name) for name in step.inputs]
            first = homes[0]
            if first is not None and step.name not in self.placed:
                wanted = [(first[0], first[1] + int(start)) for start in starts]
                if homes == wanted:
                    self.placed[step.name] = first
                    continue
            for name, start in zip(step.inputs, starts, strict=True):
                maker = self.makers.get(name)
                if (
                    maker is not None
                    and maker.op not in (*VIEWS, "constant")
                    and name not in self.placed
                    and step.inputs.count(name) == 1
                    and self.shapes[name][:-1] == self.shapes[step.name][:-1]
                ):
                    self.placed[name] = (step.name, int(start))

    def root(self, name: str) -> str:
        """The value whose storage, and frame, this one shares as an image."""
        while True:
            if name in self.placed:
                name = self.placed[name][0]
                continue
            step = self.makers[name]
            if not self.shares_frame(step):
                return name
            name = step.inputs[0]

    def shares_frame(self, step: Step) -> bool:
        """Whether a value is some channels of another, or all of it under another name."""
        if len(self.shapes[step.name]) != 4:
            return False
        if step.op == "slice":
            return bool(step.arguments["axis"] == 3)
        return step.op == "reshape" and step.arguments["sizes"] == tuple(
            ((i,), 1) for i in range(4)
        )

    def find_frames(self) -> None:
        for step in self.steps:
            if step.op == "conv2d":
                name, wanted = self.source(step)
                root = self.root(name)
                if not self.takes_frame(root):
                    continue
                have = self.frames.get(root, NO_FRAME)
                self.frames[root] = tuple(map(max, have, wanted))  # type: ignore[assignment]

    def takes_frame(self, root: str) -> bool:
        """Whether an image can be made inside a frame: not by a linear layer, whose rows join."""
        parts = [root, *(name for name in self.placed if self.root(name) == root)]
        return all(self.makers[name].op != "linear" for name in parts)

    def storage(
        self, name: str, shape: tuple[int, ...], frame: Frame, border: int, first: int, last: int
    ) -> Storage:
        """A storage for what is of the kind of a value."""
        whole, item = shape, ITEM_BYTES[self.kinds[name]]
        if frame != NO_FRAME:
            b, h, w, c = shape
            whole = (b, h + frame[0] + frame[1], w + frame[2] + frame[3], c)
        stand_in: Array = np.zeros(1, [None, np.uint8, np.int16][item])
        mold = as_strided(stand_in, whole, dense_strides(whole, item))
        made = Storage(shape, item, frame, border, first, last, mold)
        self.storages.append(made)
        return made

    def mold(self, i: int, step: Step) -> tuple[Storage, Array]:
        """The storage of a value, alive at step i, and the value's place in it."""
        name = step.name
        if name in self.placed:
            parent, start = self.placed[name]
            storage, mold = self.mold_of(parent, i)
            part = mold[..., start : start + self.shapes[name][-1]]
            storage.last = max(storage.last, i, *self.users[name])
            return storage, part
        if step.op in VIEWS and step.inputs[0] in self.values:
            storage, mold = self.values[step.inputs[0]]
            seen = self.seen(step, mold)
            # a frame of its own, where it cannot share: then it is copied
            if seen is not None and (self.shares_frame(step) or self.frames.get(name) is None):
                storage.last = max(storage.last, i, *self.users[name])
                return storage, seen
        storage, mold = self.mold_of(name, i)
        storage.last = max(storage.last, i, *self.users[name])
        return storage, mold

    def mold_of(self, name: str, i: int) -> tuple[Storage, Array]:
        """The same for a value that may be made later: a concatenation, by its first part."""
        if name in self.values:
            storage, mold = self.values[name]
            storage.first = min(storage.first, i)
            return storage, mold
        if name in self.placed:
            parent, start = self.placed[name]
            storage, mold = self.mold_of(parent, i)
            self.values[name] = storage, mold[..., start : start + self.shapes[name][-1]]
        else:
            frame = self.frames.get(name, NO_FRAME)
            storage = self.storage(name, self.shapes[name], frame, self.zero_point(name), i, i)
            self.values[name] = storage, storage.mold
        return self.values[name]

    def seen(self, step: Step, mold: Array) -> Array | None:
        """What a view step sees of its input, or None where strides cannot say it."""
        if step.op == "slice":
            return mold[slice_index(step, mold.ndim)]
        if step.op == "permute":
            return mold.transpose(step.arguments["axes"])
        try:
            return np.reshape(mold, self.shapes[step.name], copy=False)
        except ValueError:
            return None

    def zero_point(self, name: str) -> int:
        """The zero point of an image, as the convolutions that read it know it."""
        pending, found = [name], set()
        while pending:
            value = pending.pop()
            for i in self.users[value]:
                step = self.steps[i]
                if step.op == "conv2d" and self.source(step)[0] == value:
                    return int(step.arguments["x_zero_point"])
                if step.op == "concat" or self.shares_frame(step):
                    pending.append(step.name)
            found.add(value)
            pending += [v for v, (parent, _) in self.placed.items()
                        if parent == value and v not in found]  # fmt: skip
        return 0

    def copy_inputs(self, i: int, step: Step) -> None:
        """Copies inputs whose strides, or whose missing frame, a step's kernels cannot take."""
        inputs = list(step.inputs)
        if step.op == "conv2d":
            inputs[0], _ = self.source(step)
        joined = self.joins(step)
        for k, name in enumerate(inputs):
            if name not in self.values or step.op in VIEWS:
                continue
            storage, mold = self.values[name]
            strides = mold.strides
            fits = mold.shape[-1:] in ((), (1,)) or strides[-1] == storage.item
            fits |= step.op == "concat"
            frame = NO_FRAME
            if step.op == "conv2d" and k == 0:
                _, frame = self.source(step)
                shared = self.root(name) in self.values and (
                    self.values[self.root(name)][0] is storage
                )
                enough = all(map(int.__le__, frame, storage.frame)) and shared
                zeros = storage.border == step.arguments["x_zero_point"]
                fits &= frame == NO_FRAME or (enough and zeros)
                dense = strides[2] == mold.shape[3] * storage.item
                fits &= dense or not any(p.needs_dense_pixels for p in self.layers(step))
            elif not joined:
                fits = strides == dense_strides(mold.shape, storage.item)
            if not fits:
                border = int(step.arguments.get("x_zero_point", 0))
                copy = self.storage(name, mold.shape, frame, border, i, i)
                self.copies[i, name] = copy, copy.mold

    def joins(self, step: Step) -> bool:
        """Whether a step's operands have no more axes that do not join than its kernels take."""
        if step.op not in JOINED:
            return True
        rank, keep = JOINED[step.op]
        leading = self.shapes[step.name][: len(self.shapes[step.name]) - keep]
        molds = [(self.values[v][1], self.kinds[v]) for v in (step.name, *step.inputs)
                 if v in self.values]  # fmt: skip
        views = [View(At(0), mold.shape, mold.strides, kind) for mold, kind in molds]
        try:
            views = [broadcast(v, leading + v.shape[len(v.shape) - keep :]) for v in views]
            collapse(views, rank, keep) if keep else join_lines(views)
        except ValueError:
            return False
        return True

    def lay_out(self) -> int:
        """Gives each storage its place: the largest first, where no other is at the same time."""
        taken: list[tuple[int, int, Storage]] = []
        for storage in sorted(self.storages, key=lambda s: -prod(s.whole.shape) * s.item):
            size = -(-prod(storage.whole.shape) * storage.item // 64) * 64
            offset = 0
            for begin, end, other in sorted(taken, key=lambda t: t[0]):
                apart = other.last < storage.first or storage.last < other.first
                if not apart and begin < offset + size and offset < end:
                    offset = end
            taken.append((offset, offset + size, storage))
            storage.place = At(0, offset)
        total = max((end for _, end, _ in taken), default=0)
        base = self.call.scratch(total)
        for storage in self.storages:
            storage.place = base + storage.place.offset
        return total

    def fill_frames(self, i: int, step: Step) -> None:
        """Writes the zero points around the images that are made from step i on."""
        for storage in self.storages:
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
        """The packed weight of a product, shared by all plans of the program."""
        key = (self.isa, step.name)
        if key not in self.packed:
            a = step.arguments
            pack = pack_conv2d if step.op == "conv2d" else PackedLinear
            zero_point = a.get("x_zero_point", 0)  # packed with a Requant, which not all have
            self.packed[key] = pack(a["weight"], a["epilogue"], zero_point, self.isa)
        return self.packed[key]

    def layers(self, step: Step) -> list[Any]:
        """The packed weights of a convolution: one, or one for each of its phases."""
        if step.name not in self.phases:
            return [self.layer(step)]
        a, found = step.arguments, []
        weight = a["weight"]
        for down in self.phases[step.name][0]:
            for across in self.phases[step.name][1]:
                key = (self.isa, step.name, down.first, across.first)
                if key not in self.packed:
                    part = weight.data[:, :, down.taps][:, :, :, across.taps]
                    if part.size == 0:  # nothing falls here: one tap of 0
                        part = np.zeros((*weight.data.shape[:2], 1, 1), np.int8)
                    taps = Conv2dWeight(part, groups=weight.groups)
                    self.packed[key] = pack_conv2d(taps, a["epilogue"], a["x_zero_point"], self.isa)
                found.append(self.packed[key])
        return found

    def row_conv2d(self, i: int, step: Step) -> None:
        name, _ = self.source(step)
        x, out = self.input(i, name), self.stored(step.name)
        layers = self.layers(step)
        if step.name not in self.phases:
            (top, bottom), (left, right) = step.arguments["weight"].padding
            x = moved(x, -top, -left, x.shape[1] + top + bottom, x.shape[2] + left + right)
            layers[0].rows(self.call, x, out, *self.added(i, step), **self.scales(step))
            return
        rows, columns = self.phases[step.name]
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
        """Of one value, with the step's arguments as they are."""
        x, out = self.input(i, step.inputs[0]), self.stored(step.name)
        PLAIN_ROWS[step.op](self.call, x, out, **step.arguments)

    row_affine = row_layer_norm = row_rms_norm = row_group_norm = row_plain

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
        matmul_row(self.call, a, b, self.stored(step.name), isa=self.isa, **step.arguments)

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
        seen, kind = self.seen(step, source[1]), self.kinds[step.name]
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
        widths, mode = step.arguments["widths"], step.arguments["mode"]
        ends = [(a, n - b) for n, (a, b) in zip(mold.shape, widths, strict=True)]  # of the input
        inside = tuple(slice(*pair) for pair in ends)
        if mode == "constant":
            fill_row(self.call, storage.view(mold, kind), step.arguments["value"])
        target = storage.view(mold[inside], kind)
        copy_row(self.call, self.input(i, step.inputs[0]), target)
        if mode == "constant":
            return
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
