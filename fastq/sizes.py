"""Sizes that follow a network's input: what an image is resized to, or how many tokens there are.

What convolutions and pooling leave of n places, one after another, is floor((n + a) / s) + b again:
floor(floor(x / s) / t) is floor(x / (s * t)). So one `Size` is a size however deep in the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

LARGEST = 2**31 - 1  # of a Size's numbers

Shape = tuple[int, ...]
Shapes = Sequence[Shape]  # of the inputs, those that are tensors


@dataclass(frozen=True)
class Size:
    """factor * ((n + before) // stride) + more, where n is a size of an input.

    input, axis  whose size it is: the number of the input among those that are tensors.
    """

    input: int
    axis: int
    factor: int = 1
    more: int = 0
    stride: int = 1
    before: int = 0

    def __post_init__(self) -> None:
        numbers = [getattr(self, f.name) for f in fields(self)]
        whole = all(type(n) is int and abs(n) <= LARGEST for n in numbers)
        if not whole or min(self.input, self.axis) < 0 or self.stride < 1:
            raise ValueError(
                f"{self}: wanted integers within 31 bits, input and axis >= 0, stride >= 1"
            )

    def of(self, shapes: Shapes) -> int:
        """The number for inputs of these shapes; ValueError where there is no such axis."""
        if self.input >= len(shapes) or self.axis >= len(shapes[self.input]):
            raise ValueError(
                f"a size that follows axis {self.axis} of input {self.input}, of {shapes}"
            )
        n = shapes[self.input][self.axis]
        return self.factor * ((n + self.before) // self.stride) + self.more

    def plus(self, more: int) -> Size:
        return replace(self, more=self.more + more)

    def times(self, factor: int) -> Size:
        return replace(self, factor=self.factor * factor, more=self.more * factor)

    def over(self, divisor: int) -> Size | None:
        """Divided and rounded down; None where that has not this form."""
        if divisor == 1:
            return self
        if self.factor == 1:
            before = self.before + self.more * self.stride
            return Size(self.input, self.axis, stride=self.stride * divisor, before=before)
        if self.factor % divisor == 0:
            return replace(self, factor=self.factor // divisor, more=self.more // divisor)
        return None


def has_size(value: Any) -> bool:
    """Whether there is a `Size` in it, in tuples, lists and dicts too."""
    if type(value) is Size:
        return True
    if type(value) is dict:
        return any(map(has_size, value.values()))
    return type(value) in (tuple, list) and any(map(has_size, value))


def sized(value: Any, shapes: Shapes) -> Any:
    """With each `Size` in it, in tuples, lists and dicts too, as the number that it is."""
    if isinstance(value, Size):
        return value.of(shapes)
    if isinstance(value, list | tuple):
        return type(value)(sized(v, shapes) for v in value)
    if isinstance(value, dict):
        return {key: sized(v, shapes) for key, v in value.items()}
    return value


def sides_of(pad: Sequence[int], rank: int) -> list[tuple[int, int]]:
    """Before and after each axis, of torch's numbers of a padding, which begin at the last one."""
    sides = [(0, 0)] * rank
    for i in range(len(pad) // 2):
        sides[rank - 1 - i] = (pad[2 * i], pad[2 * i + 1])
    return sides


def parted(lack: int, shares: tuple[int, int]) -> tuple[int, int]:
    """What an axis lacks, before and after it: of shares (1, 1) half of it before, rounded down, of
    (0, 1) all after, of (1, 0) all before."""
    before = lack * shares[0] // sum(shares)
    return before, lack - before


def padding_to(pad: Sequence[int], sizes: Sequence[int | None], shape: Sequence[int]) -> list[int]:
    """torch's numbers of a padding, from the last axis on. An axis that is to have a size, of
    `sizes` from axis 2 on, gets what it lacks, by the shares that `pad` has."""
    widths = list(pad)
    for axis, size in enumerate(sizes, 2):
        if size is not None:
            at = 2 * (len(shape) - 1 - axis)
            widths[at : at + 2] = parted(size - shape[axis], (widths[at], widths[at + 1]))
    return widths


def reshaped(shape: Iterable[int], groups: Any) -> list[int]:
    """The new shape: `groups` are pairs (axes that are joined, sizes that they are split into).

    At most one of the sizes is None: what is left of the group.
    """
    sizes = list(shape)
    result: list[int] = []
    for axes, parts in groups:
        total = 1
        for axis in axes:
            total *= sizes[axis]
        known = 1
        for part in parts:
            known *= 1 if part is None else part
        result += [total // known if part is None else part for part in parts]
    return result
