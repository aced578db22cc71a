"""What is known of values before they are quantized: their range, their histogram."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels import histogram as hg
from fastq.kernels.call import At, Call, Calls, Place, address_of
from fastq.kernels.layers import range_call
from fastq.ops.checks import as_float32
from fastq.qparams import HISTOGRAM_KEYS

_range_calls = Calls()
_histogram_calls = Calls()


def dynamic_qparams(x: NDArray[np.float32], *, per_row: bool = True) -> tuple[Any, Any]:
    """The uint8 (scale, zero_point) of x's own range, one per row of x (M, ...) or one for all.

    float32 scale and int32 zero_point, each (M,), or scalars with per_row=False. The range is
    widened to include 0; NaN and infinities do not count; a range of zero width has scale 1.
    Source: ONNX DynamicQuantizeLinear.
    """
    real = as_float32("dynamic_qparams: x", x)
    if per_row and real.ndim == 0:
        raise ValueError("dynamic_qparams: a scalar has no rows; per_row=False takes it whole")
    rows = len(real) if per_row else 1
    source = np.require(real, requirements=["C", "A"]).reshape(rows, real.size // max(rows, 1))
    scale, zero_point = np.ones(rows, np.float32), np.zeros(rows, np.int32)
    if source.size:
        places = (address_of(source), 0, address_of(scale), address_of(zero_point), 0)
        _range_calls.run(range_call, source.shape, *places)
    return (scale, zero_point) if per_row else (scale[0], zero_point[0])


def histogram(x: NDArray[np.float32], bins: NDArray[np.int64], ends: NDArray[np.float32]) -> None:
    """Adds the values of x to a histogram whose bins are the upper 16 of a float32's 32 bits.

    x     real numbers of any shape and strides, taken as float32.
    bins  int64 (lanes, 65536, 2), added to: how many values, and the sum of the integers that
          their lower 16 bits are. Lanes are filled in parallel; only their sum has a meaning.
    ends  float32 (lanes, 2), widened to the smallest and the largest finite value of x, and 0.

    The sum over the lanes is the same for every order of the data. NaN and infinities are counted
    under their own bits. Raises TypeError and ValueError for other dtypes, shapes or layouts.
    """
    real = as_float32("histogram: x", x)
    if not (isinstance(bins, np.ndarray) and isinstance(ends, np.ndarray)):
        given = f"{type(bins).__name__} and {type(ends).__name__}"
        raise TypeError(f"histogram: bins and ends are {given}; wanted NumPy arrays, to add to")
    lanes = len(bins) if bins.ndim else 0
    for name, array, shape, dtype in (
        ("bins", bins, (lanes, HISTOGRAM_KEYS, 2), np.int64),
        ("ends", ends, (lanes, 2), np.float32),
    ):
        if array.shape != shape or array.dtype != dtype or not lanes:
            raise ValueError(
                f"histogram: {name} {array.shape} {array.dtype}; wanted "
                f"({', '.join(['lanes', *map(str, shape[1:])])}) {np.dtype(dtype)}, lanes > 0"
            )
        if not (array.flags.c_contiguous and array.flags.writeable and array.flags.aligned):
            raise ValueError(
                f"histogram: {name} is not C-contiguous, writeable and aligned; wanted an "
                "array as np.zeros gives it"
            )
    if real.size:
        # in memory's order: what fills its memory, whatever the order of its axes, is not copied
        source = np.require(real.ravel(order="K"), requirements=["C", "A"])
        places = (address_of(array) for array in (source, bins, ends))
        _histogram_calls.run(_histogram_call, (source.size, lanes), *places)


def _histogram_call(size: int, lanes: int) -> Call:
    call = Call(3)
    packs = size >= lanes * hg.PAYS
    places: dict[int, Place] = {hg.H_X: At(0), hg.H_BINS: At(1), hg.H_ENDS: At(2)}
    if packs:
        places[hg.H_PACKED] = call.scratch(lanes * hg.PACKED_BYTES)
    call.row(
        hg.histogram_kernel(packs, hg.presses()),
        hg.H_FIELDS,
        lanes,
        {hg.H_SIZE: size, hg.H_LANES: lanes},
        places,
        size * 1.0,  # measured: about a nanosecond a value
    )
    return call
