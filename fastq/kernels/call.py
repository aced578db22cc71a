"""A call: rows of the executor's table, with argument blocks that wait for a few addresses.

Kernels read their operands from views: strided arrays whose place is an array that is kept, or an
offset from a base that is known when the call runs: the thread's workspace, or an argument.
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import executor
from fastq.kernels.pack import aligned_empty

MAX_SHAPES = 512  # input shapes whose calls are kept
SLACK = 256  # bytes beyond the workspace that a kernel's vector loads may touch
# "u8x2" are uint8 values held as int16, as some tiers want them; "s16" has all of int16
ITEM_BYTES = {"u8": 1, "s8": 1, "u8x2": 2, "s16": 2, "s32": 4, "f32": 4}


@dataclass(frozen=True)
class At:
    """`offset` bytes from a base: SCRATCH, or the call's argument 0, 1, ..."""

    base: int
    offset: int = 0

    def __add__(self, size: int) -> At:
        return At(self.base, self.offset + size)


SCRATCH = -1  # the base that stands for the thread's workspace: bases[0] of the executor's


@dataclass(frozen=True)
class Slots:
    """`size` bytes of the workspace for each task of a row: the field has the first one's address,
    the next field how far they are apart.

    These are the same for all rows: in a core's cache would else be what another one writes next.
    """

    size: int


Place = NDArray[Any] | At


@dataclass(frozen=True)
class View:
    """A strided operand. kind is a key of ITEM_BYTES; strides in bytes."""

    place: Place
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: str

    @property
    def item(self) -> int:
        return ITEM_BYTES[self.kind]

    @property
    def dense(self) -> bool:
        """Whether it is C-contiguous."""
        return self.strides == dense_strides(self.shape, self.item)


def dense_strides(shape: Sequence[int], item: int) -> tuple[int, ...]:
    """Strides in bytes of a C-contiguous array."""
    strides = [item]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * size)
    return tuple(reversed(strides)) if shape else ()


def collapse(views: Sequence[View], rank: int, keep: int = 0) -> tuple[Any, list[tuple[int, ...]]]:
    """The views' common shape in exactly `rank` axes, and the strides of each.

    Axes that lie one in the other in every view become one, size 1 is dropped, and 1 is put in
    front; the last `keep` axes stay as they are. ValueError if more than `rank` are left.
    """
    shape = views[0].shape
    middle = len(shape) - keep
    sizes: list[int] = []
    strides: list[list[int]] = [[] for _ in views]
    for axis in range(middle):
        size, steps = shape[axis], [view.strides[axis] for view in views]
        if size == 1:
            continue
        if sizes and all(s[-1] == size * step for s, step in zip(strides, steps, strict=True)):
            sizes[-1] *= size
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            sizes.append(size)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    missing = rank - keep - len(sizes)
    if missing < 0:
        raise ValueError(f"{len(sizes) + keep} axes that do not join, wanted at most {rank}")
    joined = [(0,) * missing + tuple(s) for s in strides]
    return (1,) * missing + tuple(sizes) + tuple(shape[middle:]), [
        j + tuple(v.strides[middle:]) for j, v in zip(joined, views, strict=True)
    ]


# An array's object begins with CPython's head, then the address of its data: NumPy's binary
# interface (ndarraytypes.h: PyArrayObject_fields), which compiled extensions have built in.
_HEAD = object.__basicsize__
_word_at = ctypes.c_size_t.from_address


def address_of(array: NDArray[Any]) -> int:
    """Address of an array's first element; `array` must be one."""
    return _word_at(id(array) + _HEAD).value  # a tenth of the time of array.ctypes.data


NOTHING: tuple[Any, int, int] = (None, 0, 0)  # buffer, address, size of a workspace


class _Workspace(threading.local):
    """Scratch memory of one thread, grown to what its largest call needs."""

    # to be held while it is used: a signal handler may call fastq meanwhile
    held = NOTHING

    def grow(self, size: int) -> tuple[Any, int, int]:
        """New memory of this size."""
        buffer = aligned_empty((size + SLACK,), np.uint8)
        held = self.held = (buffer, address_of(buffer), size)
        return held


_workspace = _Workspace()


class Call:
    """A table for one input shape, and the patches for the addresses that it waits for."""

    def __init__(self, arguments: int) -> None:
        self.nanoseconds = 0.0  # that it takes one thread, roughly
        self.rows = 0
        self._rows: list[NDArray[np.int64]] = []
        self._blocks: list[tuple[NDArray[np.int64], float]] = []  # of `row`s, with nanoseconds
        self._patches: list[NDArray[np.int64]] = []
        self._arguments = arguments
        self._built: tuple[executor.Table, int] | None = None  # see `_build`
        self._kept: list[Any] = []  # what the table and the blocks point to
        self._scratch_taken = self._scratch_most = 0  # bytes of the workspace: now, at most at once
        # (block, field, tasks, size) of each Slots
        self._slotted: list[tuple[NDArray[np.int64], int, int, int]] = []

    def scratch(self, size: int) -> At:
        """`size` fresh bytes of the workspace, 64-byte aligned."""
        offset = self._scratch_taken
        self._scratch_taken += -(-size // 64) * 64
        self._scratch_most = max(self._scratch_most, self._scratch_taken)
        return At(SCRATCH, offset)

    def dense(self, shape: tuple[int, ...], kind: str) -> View:
        """A dense view of fresh bytes of the workspace."""
        strides = dense_strides(shape, ITEM_BYTES[kind])
        return View(self.scratch(math.prod(shape) * ITEM_BYTES[kind]), shape, strides, kind)

    @contextmanager
    def borrowed_scratch(self) -> Iterator[None]:
        """What is taken inside the `with` block serves its rows only: later rows take it again."""
        taken = self._scratch_taken
        yield
        self._scratch_taken = taken

    def row(
        self,
        kernel: Any,
        fields: int,
        tasks: int,
        values: dict[int, int],
        places: Mapping[int, Place | Slots],
        nanoseconds: float = 0.0,
    ) -> None:
        """Appends a kernel with its argument block; nanoseconds is what it takes one thread."""
        block = np.zeros(fields, np.int64)
        for field, value in values.items():
            block[field] = value
        for field, place in places.items():
            if isinstance(place, At):
                base = place.base - SCRATCH
                patch = address_of(block) + 8 * field, base, place.offset
                self._patches.append(np.array([patch], np.int64))
            elif isinstance(place, Slots):
                self._slotted.append((block, field, tasks, place.size))
            else:
                block[field] = address_of(place)
                self._kept.append(place)
        self._kept += [kernel, block]
        threads = 1 if nanoseconds < executor.PARALLEL_ROW_NANOSECONDS else tasks
        row = kernel.address, address_of(block), tasks, threads
        self._rows.append(np.array([row], np.int64))
        self.rows += 1
        self._blocks.append((block, nanoseconds))
        self.nanoseconds += nanoseconds
        self._built = None

    def repeat(self, count: int, times: int, moves: Mapping[tuple[int, int], int]) -> None:
        """Appends the last `count` rows `times` times more, for the next steps of a sequence.

        moves  (row, field) -> by how many bytes an operand moves on each time; none in Slots.
        """
        if times <= 0:
            return
        rows = np.tile(np.concatenate(self._rows[-count:]), (times, 1, 1))
        patches = np.concatenate(self._patches)
        further = np.arange(1, times + 1)[:, None]
        for number, (block, nanoseconds) in enumerate(self._blocks[-count:]):
            copies = np.tile(block, (times, 1))
            addresses = address_of(copies) + block.nbytes * np.arange(times)
            rows[:, number, executor.ARGS] = addresses
            at = patches[:, executor.FIELD] - address_of(block)
            inside = (at >= 0) & (at < block.nbytes)
            own, fields = patches[inside], at[inside]
            steps = np.array([moves.get((number, field // 8), 0) for field in fields.tolist()])
            more = np.tile(own, (times, 1, 1))
            more[:, :, executor.FIELD] = addresses[:, None] + fields
            more[:, :, executor.OFFSET] += further * steps
            self._patches.append(more.reshape(-1, executor.PATCH_COLUMNS))
            self._kept.append(copies)
            self.nanoseconds += times * nanoseconds
        self._rows.append(rows.reshape(-1, executor.COLUMNS))
        self.rows += count * times
        self._built = None

    def _build(self) -> tuple[executor.Table, int]:
        """The table, and the bytes of the workspace that it needs. Slots lie behind all else."""
        patches = [np.zeros((0, executor.PATCH_COLUMNS), np.int64), *self._patches]
        slot_bytes = max((-(-size // 64) * 64 for *_, size in self._slotted), default=0)
        for block, field, _, _ in self._slotted:
            patch = address_of(block) + 8 * field, 0, self._scratch_most
            patches.append(np.array([patch], np.int64))
            block[field + 1] = slot_bytes
        slots = max((tasks for _, _, tasks, _ in self._slotted), default=0)
        rows = np.concatenate([np.zeros((0, executor.COLUMNS), np.int64), *self._rows])
        table = executor.Table(rows, np.concatenate(patches), 1 + self._arguments, self.nanoseconds)
        self._built = table, self._scratch_most + slots * slot_bytes
        return self._built

    @property
    def scratch_bytes(self) -> int:
        """What it needs of the workspace."""
        return (self._built or self._build())[1]

    def run(self, *addresses: int) -> None:
        """Runs it on arguments at these addresses; one that it does not use is 0."""
        table, scratch_bytes = self._built or self._build()
        held = NOTHING
        if scratch_bytes:
            held = _workspace.held
            if scratch_bytes > held[2]:
                held = _workspace.grow(scratch_bytes)
        executor.run(table, (held[1], *addresses))


class Idle:
    """What was made for a key and is not in use, of MAX_SHAPES keys; threads may share it.

    Of more keys, one that is drawn goes: were it the oldest, as many sizes and one more, each in
    its turn, would all be made anew each time.
    """

    def __init__(self) -> None:
        self._lists: dict[Any, list[Any]] = {}

    def take(self, key: Any) -> Any:
        """One that nobody uses, or None."""
        try:
            return self._lists[key].pop()
        except IndexError:  # all are in use
            return None
        except KeyError:
            while len(self._lists) >= MAX_SHAPES:
                self._lists.pop(random.choice([*self._lists]), None)
            self._lists.setdefault(key, [])
            return None

    def idle(self, key: Any) -> list[Any]:
        """The list of a key's idle ones, to take from and to give back to."""
        return self._lists.get(key, [])

    def give(self, key: Any, made: Any) -> None:
        """It may be taken again."""
        kept = self._lists.get(key)
        if kept is not None:
            kept.append(made)

    def __len__(self) -> int:
        return len(self._lists)


class Calls(Idle):
    """Idle calls by key: what their tables were built for."""

    def run(self, make: Callable[..., Call], key: tuple[Any, ...], *addresses: int) -> None:
        """Runs an idle call of this key, or a new one from make(*key), on arrays there."""
        try:  # as `take` and `give`, in a third of their time
            kept = self._lists[key]
            call = kept.pop()
        except LookupError:
            call = self.take(key) or make(*key)
            kept = self.idle(key)
        call.run(*addresses)
        kept.append(call)
