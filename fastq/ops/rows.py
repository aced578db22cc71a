"""Operations of one row: the kernel's row on arrays, kept for the next call alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels.call import At, Call, Calls, View, address_of
from fastq.kernels.executor import get_num_threads
from fastq.ops.checks import KIND

_calls: dict[str, Calls] = defaultdict(Calls)


def run_row(row: Callable[..., None], arrays: list[NDArray[Any]], *parameters: Any) -> NDArray[Any]:
    """Runs row(call, *views, *parameters) on arrays of which the last is the result."""
    result = arrays[-1]
    if result.size:
        if result.ndim > 4:  # then their axes must join
            arrays = [*map(np.ascontiguousarray, np.broadcast_arrays(*arrays[:-1])), result]
        layouts = tuple((a.shape, a.strides, KIND[a.dtype]) for a in arrays)
        key = (row, layouts, parameters, get_num_threads())
        _calls[row.__name__].run(_row_call, key, *map(address_of, arrays))
    return result


def _row_call(row: Callable[..., None], layouts: Any, parameters: Any, threads: int) -> Call:
    call = Call(len(layouts))
    views = [View(At(i), *layout) for i, layout in enumerate(layouts)]
    row(call, *views, *parameters)
    return call
