"""Examples of other batches and extents, made of the one that a network is captured with."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastq.sizes import Shape, Shapes


class Leaf(NamedTuple):
    """An example of one input.

    follows  of a state, (layers, B, features), which axis of the first input its axis 1 is as long
             as.
    like     of an input without a batch, for each axis which axis of the first input, but its
             batch, is as long; None: none, or it has a batch.
    also     further axes that are as long as the batch: of a graph's adjacency matrix.
    cached   beside a cache of past keys and values, for each axis what it counts: NEW tokens, PAST
             ones, both in sum, as a mask's, or 0: neither. () where there is no such cache.
    """

    x: Any
    follows: int | None = None
    like: tuple[int | None, ...] | None = None
    also: tuple[int, ...] = ()
    cached: tuple[int, ...] = ()

    @property
    def counts(self) -> bool:
        """Whether its sizes are its own: those of its batch, and those that may grow."""
        return isinstance(self.x, Tensor) and self.follows is None and self.like is None


Leaves = Sequence[Leaf]
NEW, PAST = 1, 2


def first_of(leaves: Leaves) -> Tensor:
    """The first input that has axes."""
    return next(x for x, *_ in leaves if isinstance(x, Tensor) and x.dim())


def ways_of_batches(plain: Sequence[Any]) -> list[list[Leaf]]:
    """Which inputs may have a batch, and where: all along their first axis; but for those that have
    another number of places there than the first input; but for first states of recurrent layers,
    whose axis 1 is the batch of (B, ..), or those where it is of (L, B, ..); but for the adjacency
    of a graph's nodes, which are the batch then."""
    tensors = [x for x in plain if isinstance(x, Tensor) and x.dim()]
    if not tensors:
        return [[Leaf(x) for x in plain]]
    first = tensors[0]
    ways = [[Leaf(x, cached=_cached(x, first, tensors)) for x in plain]]
    others = [x for x in tensors if len(x) != len(first)]  # such as a mask of (T, T)
    if others:
        alone = set(map(id, others))
        ways.append([Leaf(x, like=_like(x, first) if id(x) in alone else None) for x in plain])
    for axis in range(min(first.dim(), 2)):
        states = [
            Leaf(x, axis)
            if isinstance(x, Tensor)
            and x is not first
            and x.dim() == 3
            and x.shape[1] == first.shape[axis]
            else Leaf(x)
            for x in plain
        ]
        ways += [states] * any(leaf.follows is not None for leaf in states)
    square = [Leaf(x, also=() if x is first else _as_long(x, len(first))) for x in plain]
    return ways + [square] * any(leaf.also for leaf in square)


def _cached(x: Any, first: Tensor, tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """`Leaf.cached` of x. The first input has T tokens, (B, T) or (B, T, features); a mask ends
    with T + P places; what else has four axes is the cache, (B, heads, P, features) or (B, P,
    heads, features). () if that is not so, or not for one P alone."""
    if not isinstance(x, Tensor) or x.dim() < 2 or first.dim() not in (2, 3):
        return ()
    new = first.shape[1]
    ends = {one.shape[-1] for one in tensors if one is not first and one.dim() > 1}
    pasts = {
        (axis, one.shape[axis])
        for one in tensors
        for axis in (2, 1)
        if one.dim() == 4 and one.shape[axis] and new + one.shape[axis] in ends - {one.shape[-1]}
    }
    if len(pasts) != 1:
        return ()
    ((axis, past),) = pasts
    counts = [0] * x.dim()
    if x is not first and x.shape[-1] == new + past:
        counts[-1] = NEW | PAST
        counts[-2] = NEW if x.dim() > 2 and x.shape[-2] == new else 0
    elif x.dim() == 4 and x.shape[axis] == past:
        counts[axis] = PAST
    elif x.shape[1] == new and x.dim() < 4:  # the tokens, or their positions
        counts[1] = NEW
    return tuple(counts)


def _as_long(x: Any, count: int) -> tuple[int, ...]:
    """The axes after the first that have as many places as it has."""
    if not isinstance(x, Tensor) or x.dim() < 2 or len(x) != count:
        return ()
    return tuple(axis for axis in range(1, x.dim()) if x.shape[axis] == count)


def _like(x: Tensor, first: Tensor) -> tuple[int | None, ...]:
    """`Leaf.like` of x: the same place where that fits, else the first axis that does."""
    axes = {size: axis for axis, size in reversed([*enumerate(first.shape)]) if axis}
    return tuple(
        i if 0 < i < first.dim() and first.shape[i] == size else axes.get(size)
        for i, size in enumerate(x.shape)
    )


# A size that is k * 5 in one capture and k * 17 in the other follows the batch: it grew by k * 12,
# which none of the numbers in `stretches` is, nor what strides and upsampling by 2 make of them.
BATCHES = (5, 17)


class Stretch(NamedTuple):
    """How the extent of an example is changed.

    parts  (number of axes of an input, which of them grow, by how much); (CACHED, (NEW, PAST),
           by how much) of all that is beside a cache.
    apart  by how much more those of each further input grow, so that it is known which input a size
           follows.
    series whether real numbers in a row, (B, L), are samples of a sequence, so that there may be
           more: elsewhere they are features.
    """

    parts: tuple[tuple[int, tuple[int, ...], tuple[int, ...]], ...] = ()
    apart: int = 0
    series: bool = False


CACHED = 0  # in the place of a number of axes
Way = tuple[Stretch, Stretch]  # how the examples of both captures are changed
SAME: Way = (Stretch(), Stretch())  # only the batch differs


def stretches(leaves: Leaves) -> list[list[Way]]:
    """Ways to change the examples of both captures. Each axis grows by another number, so that it
    is known which one a size follows.

    By an odd number first: a network that pads to even sizes is another one then, and its graph
    holds for one size only. Many networks take multiples of 32 alone, which comes second. Some take
    no longer sequences than the example: shorter ones come last. One that pads images, and cuts off
    what it padded, does neither for some sizes: both examples get odd ones. One may take images
    with their channels last. One that reads the columns of an image as a sequence takes any width
    of one height, or the other way round; one that reads tokens beside an image or a sound takes
    any number of tokens with one of these. Of several inputs each grows by a number of its own, if
    the network takes that. Rows of real numbers grow where nothing else does, or where all else
    does not grow alone: long ones by an eighth, as what hears a sound has large strides.
    """
    if any(leaf.cached for leaf in leaves):
        longer_cache = Stretch(), Stretch(((CACHED, (NEW, PAST), (7, 13)),))
        return [[longer_cache], *stretches([leaf._replace(cached=()) for leaf in leaves])]
    tensors = [leaf.x for leaf in leaves if isinstance(leaf.x, Tensor)]
    dims = {x.dim() for x in tensors}
    several = sum(leaf.counts and leaf.x.dim() > 1 for leaf in leaves) > 1
    rows = [x for x in tensors if _is_row(x)]

    def stretch(
        axis: int, pixels: tuple[int, ...], tokens: tuple[int, ...], of: tuple[int, ...] = (2, 3)
    ) -> Stretch:
        pixels = tuple(pixels[i - 2] for i in of)
        return Stretch(
            ((2, (1,), tokens), (3, (axis,), tokens), (4, of, pixels), (5, (2, 3, 4), tokens))
        )

    def longer(axis: int, of: tuple[int, ...] = (2, 3), more: int = 0) -> list[Way]:
        odd = stretch(axis, (65, 67), (more + 7, more + 11, more + 13), of)
        even = stretch(axis, (64, 128), (more + 8, more + 16, more + 20), of)
        each = [(odd._replace(apart=16), odd), (even._replace(apart=192), even)]
        return [(Stretch(), one) for pair in each for one in pair[0 if several else 1 :]]

    lines = (2, 1) if 3 in dims else (2,)  # (B, C, L), then (B, L, C)
    more = max((x.shape[1] // 64 * 8 for x in rows), default=0)
    series = [
        [(before, after._replace(series=True)) for before, after in longer(axis, more=more)]
        for axis in (lines if rows else ())
    ]
    if rows and not any(x.dim() > 1 and not _is_row(x) for x in tensors):
        return series
    ways: list[list[Way]] = []
    for axis in lines:
        ways.append(longer(axis))
        if dims & {2, 3}:
            shorter = stretch(axis, (1, 2), (-1, -2, -4)), stretch(axis, (65, 67), (-8, -10, -14))
            ways[-1].append(shorter)
    if 4 in dims:
        height, width = next(x.shape[2:] for x in tensors if x.dim() == 4)
        few = stretch(2, ((27 - height) % 32, (21 - width) % 32), (1, 2, 3))
        many = stretch(2, (64 + (13 - height) % 32, 64 + (7 - width) % 32), (7, 11, 13))
        ways += [[(few, many)], longer(2, (1, 2)), longer(2, (3,)), longer(2, (2,))]
    if dims & {3, 4, 5} and any(x.dim() == 2 and not _is_row(x) for x in tensors):
        ways.append([(one, two._replace(parts=two.parts[:1])) for one, two in longer(2)])
    return ways + series


def _is_row(x: Tensor) -> bool:
    return x.dim() == 2 and x.is_floating_point()


def regrown(way: Way) -> Iterator[Way]:
    """The same axes, by other numbers: of the same multiples of 2, as the network may ask for."""
    before, after = way
    whole = all(n % 4 == 0 for *_, more in after.parts for n in more)
    first, step = (32, 64) if whole else (17, 2)
    for n in range(first, first + 64 * step, step):
        parts = tuple(
            (dim, axes, tuple(n + step * i for i in range(len(more))))
            for dim, axes, more in after.parts
        )
        yield before, after._replace(parts=parts)


# sizes modulo 64 of up to three axes: what is floored is odd at each stride in one of them, what is
# rounded up in another; some are even, or multiples of 32
RESIDUES = (63, 33, 62), (33, 62, 63), (62, 63, 33), (32, 64, 96)
FEWER = (3, 2, 1)
LARGE = 128  # a size that is not enlarged, but a sound's: what shows there shows in less


def other_extents(leaves: Leaves, way: Way) -> Iterator[Stretch]:
    """Some more examples of the axes that grew, of up to LARGE places, or some more."""
    _, after = way
    for residues in (*RESIDUES, None):
        parts = []
        for dim, axes, _ in after.parts:
            x = next((leaf.x for leaf in leaves if leaf.counts and leaf.x.dim() == dim), None)
            if dim == CACHED:
                x = first_of(leaves)
                sizes = [_places(leaves, count) for count in axes]
            elif x is not None:
                sizes = [x.shape[axis] for axis in axes]
            if x is not None:
                if residues is not None:
                    small = not (after.series and _is_row(x))
                    starts = [64 if n >= LARGE and small else n // 64 * 64 for n in sizes]
                    wanted = [n + r for n, r in zip(starts, residues, strict=False)]
                else:
                    wanted = [max(min(n, LARGE) - k, 1) for n, k in zip(sizes, FEWER, strict=False)]
                more = tuple(a - b for a, b in zip(wanted, sizes, strict=True))
                parts.append((dim, axes, more))
        yield Stretch(tuple(parts), 2 if after.apart else 0, after.series)


def resized(leaf: Leaf, leaves: Leaves, batch: int, stretch: Stretch) -> Any:
    """An example of another batch size, and of another extent."""
    x, follows, like, also, cached = leaf
    if not isinstance(x, Tensor) or x.dim() == 0:
        return x
    if follows != 1 and like is None:
        for axis in (0 if follows is None else 1, *also):
            repeats = -(-batch // max(x.shape[axis], 1))
            x = torch.cat([x] * repeats, axis).narrow(axis, 0, batch)
    shown = x if like is None else first_of(leaves)
    before = itertools.takewhile(lambda one: one is not leaf, leaves)
    number = sum(one.counts for one in before) if leaf.counts else 0
    for dim, axes, more in stretch.parts:
        if dim == CACHED:
            for axis, counts in enumerate(cached):
                x = _stretched(
                    x, axis, sum(n for of, n in zip(axes, more, strict=True) if of & counts)
                )
        if dim != shown.dim() or (_is_row(shown) and not stretch.series):
            continue
        if follows == 0 or (follows == 1 and axes != (1,)):
            continue
        for axis, count in zip(axes, more, strict=False):
            if axis in also:
                continue
            count += stretch.apart * number
            for own in (axis,) if like is None else [i for i, of in enumerate(like) if of == axis]:
                x = _stretched(x, own, count)
    return x.clone()


def _places(leaves: Leaves, count: int) -> int:
    """How many tokens are NEW, or PAST."""
    return next(
        n
        for leaf in leaves
        for n, of in zip(leaf.x.shape if leaf.cached else (), leaf.cached, strict=True)
        if of == count
    )


def _stretched(x: Tensor, axis: int, count: int) -> Tensor:
    """With so many places more along an axis, or fewer."""
    if count < 0:
        size = x.shape[axis]
        return x.narrow(axis, 0, max(size + count, min(size, 2)))
    sizes = list(x.shape)
    sizes[axis] = count
    return torch.cat([x, x.narrow(axis, 0, 1).expand(*sizes)], axis)


def example_shapes(leaves: Leaves, batch: int, stretch: Stretch) -> Shapes:
    """The shapes of an example's tensors."""
    without_memory = [
        leaf._replace(x=leaf.x.to("meta")) if isinstance(leaf.x, Tensor) else leaf
        for leaf in leaves
    ]
    made = (resized(leaf, without_memory, batch, stretch) for leaf in without_memory)
    shapes: list[Shape] = [tuple(x.shape) for x in made if isinstance(x, Tensor)]
    return shapes
