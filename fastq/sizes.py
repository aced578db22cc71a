"""Sizes that follow a network's input: what an image is resized to, or how many tokens there are.

What convolutions and pooling leave of n places, one after another, is floor((n + a) / s) + b again:
floor(floor(x / s) / t) is floor(x / (s * t)). So one `Size` is a size however deep in the network.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

LARGEST = 2**31 - 1  # of a Size's numbers

Sizes = tuple[int, ...]  # of an example: of each axis, in the first input that has it


@dataclass(frozen=True)
class Size:
    """factor * ((n + before) // stride) + more, where n is a size of the example.

    axis  of the network's first input that has it; 0 is the batch.
    """

    axis: int
    factor: int = 1
    more: int = 0
    stride: int = 1
    before: int = 0

    def __post_init__(self) -> None:
        numbers = [getattr(self, f.name) for f in fields(self)]
        whole = all(type(n) is int and abs(n) <= LARGEST for n in numbers)
        if not whole or self.axis < 0 or self.stride < 1:
            raise ValueError(f"{self}: wanted integers within 31 bits, axis >= 0, stride >= 1")

    def of(self, sizes: Sizes) -> int:
        """The number for an example of these sizes; ValueError where it has no such axis."""
        if self.axis >= len(sizes):
            raise ValueError(f"a size that follows axis {self.axis} of inputs of {sizes}")
        return self.factor * ((sizes[self.axis] + self.before) // self.stride) + self.more

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
            return Size(self.axis, stride=self.stride * divisor, before=before)
        if self.factor % divisor == 0:
            return replace(self, factor=self.factor // divisor, more=self.more // divisor)
        return None


def sizes_of_shapes(shapes: Iterable[Sequence[int]]) -> Sizes:
    """The sizes that `Size` counts from, of the shapes of a network's inputs."""
    sizes: list[int] = []
    for shape in shapes:
        sizes += shape[len(sizes) :]
    return tuple(sizes) or (1,)


def sized(value: Any, sizes: Sizes) -> Any:
    """With each `Size` in it, in tuples, lists and dicts too, as the number that it is."""
    if isinstance(value, Size):
        return value.of(sizes)
    if isinstance(value, list | tuple):
        return type(value)(sized(v, sizes) for v in value)
    if isinstance(value, dict):
        return {key: sized(v, sizes) for key, v in value.items()}
    return value


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
