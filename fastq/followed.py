"""Which size of a network's inputs a number follows, told by two examples of other sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fastq.examples import BATCHES
from fastq.extents import size_along
from fastq.graph import Graph, Node
from fastq.read import CannotCapture
from fastq.sizes import Shape, Shapes, Size, sized

Sizes = tuple[int | Size, ...]
# Two formulas are compared for so many sizes. They repeat after as many as their strides, most of
# which divide this.
PERIOD = 2**11
MULTIPLE = 32


class Ambiguous(CannotCapture):
    """Two values or more had the size that another is given, in both examples."""

    def __init__(self, name: str, sizes: Sequence[Sequence[Any]]) -> None:
        super().__init__(f"{name}: it has the size of one value or of another one")
        self.sizes = sizes

    def told_by(self, shapes: Shapes) -> bool:
        """Whether inputs of these shapes tell them apart."""
        numbers = [tuple(sized(size, shapes)) for size in self.sizes]
        return len(set(numbers)) == len(numbers)


@dataclass
class TwoExamples:
    """The graph of the first of two examples, and what is known of both.

    shapes   of their inputs.
    earlier  the nodes that are one by now, of the first example and of the second.
    """

    graph: Graph
    shapes: tuple[Shapes, Shapes]
    earlier: list[tuple[Node, Node]] = field(default_factory=list)

    def along(self, node: Node, axis: int) -> Size | None:
        """The size of this axis by those of the inputs, if it follows one."""
        return size_along(self.graph.inputs, node, axis)

    def tell(self, sizes: Sequence[int | Size], wanted: tuple[Shape, Shape]) -> bool:
        """Whether the sizes are these numbers in the first and in the second example."""
        return [tuple(sized(tuple(sizes), of)) for of in self.shapes] == [*map(tuple, wanted)]

    def followed(self, one: int, two: int) -> Size | None:
        """What is `one` in the first example and `two` in the second: a multiple of an input's
        size, or that much more; or None."""
        grown = [
            (number, axis, a, b)
            for number, pair in enumerate(zip(*self.shapes, strict=True))
            for axis, (a, b) in enumerate(zip(*pair, strict=True))
            if a != b
        ]
        for number, axis, a, b in grown:
            if one * b == two * a and one % a == 0:
                return Size(number, axis, one // a)
        for number, axis, a, b in grown:
            factor, rest = divmod(two - one, b - a)
            # more would be found for squares as well
            if rest == 0 and factor in (1, 2) and (a, b) != BATCHES:
                return Size(number, axis, factor, one - factor * a)
        return None

    def like_before(self, name: str, one: int, two: int) -> Size | None:
        """The size that an axis of an earlier value had in both examples; None if there is none.
        Inputs of the same sizes in both, as tokens and their mask, are as one."""
        found: list[Size] = []
        for values in self.earlier:
            for axis, pair in enumerate(zip(*(value.shape for value in values), strict=True)):
                size = self.along(values[0], axis) if pair == (one, two) else None
                if size is None or not self.tell([size], ((one,), (two,))):
                    continue
                size = self._of_first_input(size)
                if not any(self.same([size], [other]) for other in found):
                    found.append(size)
        if len(found) > 1:
            raise Ambiguous(name, [[size] for size in found])
        return found[0] if found else None

    def _of_first_input(self, size: Size) -> Size:
        """The same of the first input that has as many places there in both examples."""
        counts = [of[size.input][size.axis] for of in self.shapes]
        for number, pair in enumerate(zip(*self.shapes, strict=True)):
            for axis, both in enumerate(zip(*pair, strict=True)):
                if [*both] == counts and axis == size.axis:
                    return replace(size, input=number)
        return size

    def image_before(
        self, name: str, wanted: tuple[Shape, Shape], but: Sequence[int | Size | None] = ()
    ) -> Sizes:
        """The sizes of an earlier value along its axes from 2 on, other than `but`: one that had
        the wanted ones in both examples. Raises CannotCapture where there is none, Ambiguous where
        there are others."""
        ends = [*enumerate(zip(*wanted, strict=True), 2)]
        found: list[Sizes] = []
        for one, two in self.earlier:
            if (one.shape[2:], two.shape[2:]) != wanted:
                continue
            along = [a if a == b else self.along(one, axis) for axis, (a, b) in ends]
            known = tuple(s for s in along if s is not None)
            if self.tell(known, wanted) and not any(self.same(known, o) for o in (*found, but)):
                found.append(known)
        if not found:
            raise CannotCapture(f"{name}: it gets the sizes {wanted[0]} and {wanted[1]}")
        if len(found) > 1:
            raise Ambiguous(name, found)
        return found[0]

    def same(self, one: Sequence[int | Size | None], two: Sequence[int | Size | None]) -> bool:
        """Whether these are the same for whatever input; of examples of multiples of 32, which are
        tried where the network takes no others, for multiples of 32."""
        return len(one) == len(two) and all(map(self._same, one, two))

    def _same(self, a: int | Size | None, b: int | Size | None) -> bool:
        if not (isinstance(a, Size) and isinstance(b, Size)) or a == b:
            return a == b
        if (a.input, a.axis) != (b.input, b.axis):
            return False
        before, rest = [(0,) * a.axis] * a.input, (0,) * a.axis
        multiples = all(of[a.input][a.axis] % MULTIPLE == 0 for of in self.shapes)
        return all(
            a.of([*before, (*rest, n)]) == b.of([*before, (*rest, n)])
            for n in range(0, PERIOD, MULTIPLE if multiples else 1)
        )
