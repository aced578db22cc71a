"""Where the values of a program lie: in storages, pieces of one arena.

A storage may be wider than a value: it has the frame of zero points that convolutions read beyond
an image, and values that are concatenated lie in it side by side, written there by the steps that
make them. Reshapes, slices and permutes are views where strides can say so. Storages that are not
needed at the same time share memory.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from fastq.kernels.call import ITEM_BYTES, At, View, address_of, collapse, dense_strides
from fastq.kernels.lines import broadcast, join_lines
from fastq.packed import Axes, PackedWeights
from fastq.phases import MAX_PHASES, phases_of
from fastq.program import VIEWS, Program
from fastq.steps import Step, slice_index

Array = NDArray[Any]
Frame = tuple[int, int, int, int]  # top, bottom, left, right
NO_FRAME: Frame = (0, 0, 0, 0)
JOINED = {  # how many axes kernels take, and how many of them do not join: see `collapse`
    "linear": (2, 1), "matmul": (4, 2), "softmax": (4, 1), "softmax_weights": (4, 1),
    "layer_norm": (4, 1), "rms_norm": (4, 1), "add": (4, 0), "mul": (4, 0), "affine": (4, 1),
    "table": (4, 1),
}  # fmt: skip


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


class Placement:
    """Where a program's values lie, for inputs of known shapes: its `values` and, where a step
    cannot read one as it lies, `copies`, each as a storage and the mold of the value in it."""

    def __init__(
        self,
        program: Program,
        shapes: dict[str, tuple[int, ...]],
        kinds: dict[str, str],
        floats: Collection[str],
        tier: str,
        packed: PackedWeights,
    ) -> None:
        """shapes, kinds  of all values; `floats` of them are the caller's memory."""
        self.steps, self.shapes, self.kinds = program.steps, shapes, kinds
        self.tier, self.packed = tier, packed
        self.makers = {step.name: step for step in self.steps}
        self.users: dict[str, list[int]] = {name: [] for name in shapes}
        for i, step in enumerate(self.steps):
            for name in step.inputs:
                self.users[name].append(i)
        self.storages: list[Storage] = []
        self.phases: dict[str, Axes] = {}  # of a conv2d
        self.apart: dict[str, str] = {}  # "dilate" that is not made -> what it is made of
        self.placed: dict[str, tuple[str, int]] = {}  # value -> concatenation, first channel
        self.frames: dict[str, Frame] = {}  # root value -> frame
        self.values: dict[str, tuple[Storage, Array]] = {}
        self.copies: dict[tuple[int, str], tuple[Storage, Array]] = {}  # for one step alone
        self._find_phases()
        self._place_concatenations()
        self._find_frames()
        for i, step in enumerate(self.steps):
            if step.name in self.apart:
                continue
            if step.name not in floats:
                self.values[step.name] = self._mold(i, step)
            self._copy_inputs(i, step)
        self.arena = self._lay_out()  # bytes

    def settle(self, base: At) -> None:
        """Says where the arena begins."""
        for storage in self.storages:
            storage.place = base + storage.place.offset

    def layers(self, step: Step) -> list[Any]:
        """The packed weights of a product: one, or one for each of its phases."""
        if step.name in self.phases:
            return self.packed.of_phases(step, self.tier, self.phases[step.name])
        return [self.packed.of(step, self.tier)]

    def _find_phases(self) -> None:
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

    def _place_concatenations(self) -> None:
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

    def _root(self, name: str) -> str:
        """The value whose storage, and frame, this one shares as an image."""
        while True:
            if name in self.placed:
                name = self.placed[name][0]
                continue
            step = self.makers[name]
            if not self._shares_frame(step):
                return name
            name = step.inputs[0]

    def _shares_frame(self, step: Step) -> bool:
        """Whether a value is some channels of another, or all of it under another name."""
        if len(self.shapes[step.name]) != 4:
            return False
        if step.op == "slice":
            return bool(step.arguments["axis"] == 3)
        return step.op == "reshape" and step.arguments["sizes"] == tuple(
            ((i,), 1) for i in range(4)
        )

    def _find_frames(self) -> None:
        for step in self.steps:
            if step.op == "conv2d":
                name, wanted = self.source(step)
                root = self._root(name)
                if not self._takes_frame(root):
                    continue
                have = self.frames.get(root, NO_FRAME)
                self.frames[root] = tuple(map(max, have, wanted))  # type: ignore[assignment]

    def _takes_frame(self, root: str) -> bool:
        """Whether an image can be made inside a frame: not by a linear layer, whose rows join."""
        parts = [root, *(name for name in self.placed if self._root(name) == root)]
        return all(self.makers[name].op != "linear" for name in parts)

    def _storage(
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

    def _mold(self, i: int, step: Step) -> tuple[Storage, Array]:
        """The storage of a value, alive at step i, and the value's place in it."""
        storage, mold = self._seen_by(step) or self._mold_of(step.name, i)
        storage.last = max(storage.last, i, *self.users[step.name])
        return storage, mold

    def _seen_by(self, step: Step) -> tuple[Storage, Array] | None:
        """The place of a value that is a view of its input's, or None."""
        if step.op not in VIEWS or step.inputs[0] not in self.values:
            return None
        storage, mold = self.values[step.inputs[0]]
        seen = self.seen(step, mold)
        # a frame of its own, where it cannot share: then it is copied
        own_frame = step.name in self.frames and not self._shares_frame(step)
        return None if seen is None or own_frame else (storage, seen)

    def _mold_of(self, name: str, i: int) -> tuple[Storage, Array]:
        """The storage and the place of a value that may be made later, as a concatenation is."""
        if name in self.values:
            storage, mold = self.values[name]
            storage.first = min(storage.first, i)
            return storage, mold
        if name in self.placed:
            parent, start = self.placed[name]
            storage, mold = self._mold_of(parent, i)
            self.values[name] = storage, mold[..., start : start + self.shapes[name][-1]]
        else:
            frame = self.frames.get(name, NO_FRAME)
            storage = self._storage(name, self.shapes[name], frame, self._zero_point(name), i, i)
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

    def _zero_point(self, name: str) -> int:
        """The zero point of an image, as the convolutions that read it know it."""
        pending, found = [name], set()
        while pending:
            value = pending.pop()
            for i in self.users[value]:
                step = self.steps[i]
                if step.op == "conv2d" and self.source(step)[0] == value:
                    return int(step.arguments["x_zero_point"])
                if step.op == "concat" or self._shares_frame(step):
                    pending.append(step.name)
            found.add(value)
            pending += [v for v, (parent, _) in self.placed.items()
                        if parent == value and v not in found]  # fmt: skip
        return 0

    def _copy_inputs(self, i: int, step: Step) -> None:
        """Copies inputs whose strides, or whose missing frame, a step's kernels cannot take."""
        inputs = list(step.inputs)
        if step.op == "conv2d":
            inputs[0], _ = self.source(step)
        joined = self._joins(step)
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
                shared = self._root(name) in self.values and (
                    self.values[self._root(name)][0] is storage
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
                copy = self._storage(name, mold.shape, frame, border, i, i)
                self.copies[i, name] = copy, copy.mold

    def _joins(self, step: Step) -> bool:
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

    def _lay_out(self) -> int:
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
        return max((end for _, end, _ in taken), default=0)
