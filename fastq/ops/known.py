"""Calls that were checked before: of short arrays the checks would be most of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastq.kernels.call import Call, address_of
from fastq.ops.checks import output_array

MOST_CHECKED = 64  # kinds of calls that are remembered, of a weight and of whole arrays


class Known(NamedTuple):
    """A call that was checked before: its output, and what runs it.

    size   bytes of the output.   span  of the input: its first and its last byte, from its address.
    idle   calls that nobody uses, or none: then make() makes one. Of `linear` and `conv2d` it holds
           the layer and with it the epilogue: the id in a key stays that object's.
    """

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    size: int
    span: tuple[int, int]
    idle: list[Call]
    make: Callable[[], Call]

    def run(
        self, name: str, x: NDArray[Any], at: int, out: Any, source: int, step: int = 0,
        zero: int = 0,
    ) -> NDArray[Any]:  # fmt: skip
        """Into `out` or a new array. x lies at `at` and is read at source: there, or in a copy."""
        shape, dtype, size, (first, last), idle, make = self
        if out is None:
            out = np.empty(shape, dtype)
            to = address_of(out)
        else:  # as `output_array`, in a third of the time where x is plainly apart from it
            fits = type(out) is np.ndarray and out.shape == shape and out.dtype is dtype
            fits = fits and out.flags.carray
            to = address_of(out) if fits else at
            if not fits or (to + size > at + first and to <= at + last):
                to = address_of(output_array(name, out, shape, dtype, x))
        try:
            call = idle.pop()
        except IndexError:
            call = make()
        call.run(source, to, step, zero, 0)
        idle.append(call)
        return out  # type: ignore[no-any-return]


def span_of(x: NDArray[Any]) -> tuple[int, int]:
    """Where the first and the last byte of an array are, from its address."""
    reach = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    return sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + x.itemsize - 1
