"""The dtypes that torch computes in, and what gives a value another one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.layout import Named

Array = NDArray[Any]

# torch's kinds of values, as its operators are given them here; NumPy has no bfloat16
NAMED: Named = {
    "dtype": {name: np.dtype(name) for name in (
        "float64", "float32", "float16", "bool", "uint8", "int8", "int16", "int32", "int64",
        "complex64", "complex128")},
    "layout": {"strided": "strided"},
    "memory_format": {name: name for name in (
        "contiguous_format", "channels_last", "preserve_format")},
    "device": {"cpu": "cpu"},
}  # fmt: skip
WIDTHS = "b", "iu", "f", "c"  # of dtypes, the widest last
INTEGER, REAL = np.dtype(np.int64), np.dtype(np.float32)  # torch's defaults


def promoted(*values: Any) -> list[Array]:
    """All in the dtype that torch computes them in: that of the arrays with axes, unless those
    without, or numbers, are of a wider kind; bool, then integers, then float."""
    groups: tuple[list[np.dtype[Any]], ...] = [], [], []  # with axes, without, numbers
    for v in values:
        if isinstance(v, np.ndarray | np.generic):  # NumPy's numbers are arrays without axes
            groups[v.ndim == 0].append(v.dtype)
        else:
            kinds = (bool, np.dtype(bool)), (int, INTEGER), (object, REAL)
            groups[2].append(next(dtype for kind, dtype in kinds if isinstance(v, kind)))
    found: np.dtype[Any] | None = None
    for dtypes in filter(None, groups):
        widest = max(map(_width, dtypes))
        if found is None or widest > _width(found):
            found = np.result_type(*(d for d in dtypes if _width(d) == widest))
    return [np.asarray(v, found) for v in values]


def _width(dtype: np.dtype[Any]) -> int:
    """How wide a kind of dtype is, to be promoted to: bool, integers, float, complex."""
    return next(i for i, kinds in enumerate(WIDTHS) if dtype.kind in kinds)


def real(x: Array) -> Array:
    """x as float32, unless it is float or complex."""
    return x if x.dtype.kind in "fc" else x.astype(REAL)


def summed(x: Array) -> np.dtype[Any]:
    """The dtype of sums and products of x's elements."""
    return INTEGER if x.dtype.kind in "biu" else x.dtype


def pointwise(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of the function: its arguments are promoted first."""
    return lambda *values: function(*promoted(*values))


def pointwise_real(function: Callable[..., Any]) -> Callable[..., Any]:
    """An operator of the function: its arguments are promoted first, to float at least."""
    return lambda *values: function(*map(real, promoted(*values)))


def _to(x: Array, *args: Any, dtype: Any = None, **kwargs: Any) -> Array:
    for value in args:
        dtype = value if isinstance(value, np.dtype) else dtype
    return x if dtype is None else x.astype(dtype)


OPERATORS: dict[str, Callable[..., Any]] = {
    "to.dtype to.dtype_layout to.device _to_copy.default": _to,
    "type_as.default": lambda x, other: x.astype(other.dtype),
    "contiguous.default clone.default alias.default detach.default lift_fresh_copy.default "
    "dropout.default": lambda x, *args, **kwargs: x,
}
