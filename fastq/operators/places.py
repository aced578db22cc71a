"""What is read from, or stored at, places that arrays name: indices, gathers, scatters, rows of
tables, and bags of these. A place that is not there is an IndexError."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from fastq.operators.dtypes import INTEGER, REAL, Array


def _check_places(index: Array, size: int, least: int = 0) -> None:
    """IndexError unless an axis of this size has all of these places."""
    if index.size and not least <= index.min() <= index.max() < size:
        raise IndexError(
            f"places from {index.min()} to {index.max()} of an axis of {size}: out of range"
        )


def _checked(x: Array, indices: Sequence[Any]) -> tuple[Any, ...]:
    """Indices of each axis, as NumPy's; None is the whole one."""
    places = [slice(None) if i is None else i for i in indices]
    for axis, i in enumerate(places):
        if isinstance(i, np.ndarray) and i.dtype.kind in "iu":
            _check_places(i, x.shape[axis], -x.shape[axis])
    return tuple(places)


def _along_axis(x: Array, dim: int, index: Array) -> tuple[Any, ...]:
    """The places of gather and scatter: those of the index, but on one axis what it says."""
    _check_places(index, x.shape[dim])
    places: list[Array] = list(np.indices(index.shape, sparse=True))
    places[dim] = index
    return tuple(places)


def _stored(x: Array, places: tuple[Any, ...], value: Any, add: bool = False) -> Array:
    """A copy of x with other values there, or with these added, as often as a place is named."""
    y = x.copy()
    if add:
        np.add.at(y, places, value)
    else:
        y[places] = value
    return y


def _index_add(x: Array, dim: int, index: Array, source: Array, alpha: Any = 1) -> Array:
    _check_places(index, x.shape[dim])
    places = (*[slice(None)] * (dim % x.ndim), index)
    return _stored(x, places, source * source.dtype.type(alpha), True)


def _reduced(
    x: Array, places: tuple[Any, ...], value: Any, reduce: str, include_self: bool = True
) -> Array:
    """A copy of x where these are one with what is there, or with each other alone."""
    y, (function, start) = x.copy(), REDUCTIONS[reduce]
    if not include_self:
        y[places] = value if start is None else start
    function.at(y, places, value)
    if reduce != "mean":
        return y
    count = np.full(x.shape, int(include_self))
    np.add.at(count, places, 1)
    count = np.maximum(count, 1).astype(x.dtype)
    return y / count if x.dtype.kind == "f" else y // count


# what makes one of two values, and what it begins with; None: with any of them
REDUCTIONS: dict[str, tuple[Any, int | None]] = {
    **dict.fromkeys(("sum", "add", "mean"), (np.add, 0)),
    **dict.fromkeys(("prod", "multiply"), (np.multiply, 1)),
    "amax": (np.maximum, None),
    "amin": (np.minimum, None),
}


def _index_reduce(
    x: Array, dim: int, index: Array, source: Array, reduce: str, include_self: bool = True
) -> Array:
    _check_places(index, x.shape[dim])
    places = (*[slice(None)] * (dim % x.ndim), index)
    return _reduced(x, places, source, reduce, include_self)


def _scatter(
    x: Array, dim: int, index: Array, src: Any, reduce: str | None = None, include_self: bool = True
) -> Array:
    places = _along_axis(x, dim, index)
    if isinstance(src, np.ndarray) and src.ndim:
        src = src[tuple(map(slice, index.shape))]
    if reduce is None:
        return _stored(x, places, src)
    return _reduced(x, places, src, reduce, include_self)


def _max_unpool(x: Array, index: Array, size: Sequence[int], *rest: Any) -> Array:
    """Images of this size, 0 but where a pooling found x: at the index, in each image's pixels."""
    batch = x.shape[: -len(size)]
    flat = (*batch, prod(x.shape[-len(size) :]))
    y = np.zeros((*batch, prod(size)), x.dtype)
    return _scatter(y, -1, index.reshape(flat), x.reshape(flat)).reshape(*batch, *size)


def _take_along(x: Array, indices: Array, dim: int | None = None) -> Array:
    if dim is None:
        x, indices, dim = x.reshape(-1), indices.reshape(-1), 0
    _check_places(indices, x.shape[dim])
    return np.take_along_axis(x, indices, dim)


def _rows(x: Array, index: Array, dim: int = 0) -> Array:
    """What is at these places of an axis."""
    if index.dtype.kind not in "iu":
        raise TypeError(f"places are {index.dtype}; wanted integers")
    _check_places(index, x.shape[dim])
    return x.take(index, dim)


def _one_hot(tokens: Array, num_classes: int = -1) -> Array:
    count = int(tokens.max()) + 1 if num_classes == -1 else num_classes
    return _rows(np.eye(count, dtype=INTEGER), tokens)


def _int8_rows(tokens: Array, weight: Array, scale: Array) -> Array:
    return _rows(weight, tokens).astype(REAL) * _rows(scale, tokens)[..., None]


def _bags(
    rows: Array, tokens: Array, offsets: Array, mode: int, shares: Any, last: Any, padding: Any
) -> tuple[Array]:
    """embedding_bag of the rows that are looked up: the first of torch's results, for the others
    are its gradient's. mode 0 is the sum, 1 the mean, 2 the largest."""
    count = len(offsets) - bool(last)
    bag = np.searchsorted(offsets[:count], np.arange(len(tokens)), "right") - 1
    if padding is not None and padding >= 0:
        bag, rows = bag[tokens != padding], rows[tokens != padding]
        shares = None if shares is None else shares[tokens != padding]
    rows = rows if shares is None else rows * shares[:, None]
    y = np.full((count, rows.shape[1]), -np.inf if mode == 2 else 0, rows.dtype)
    (np.maximum if mode == 2 else np.add).at(y, bag, rows)
    size = np.bincount(bag, minlength=count)[:, None]
    if mode == 1:
        y /= np.maximum(size, 1).astype(y.dtype)
    return (np.where(size == 0, y.dtype.type(0), y),)


def _embedding_bag(
    weight: Array, tokens: Array, offsets: Array, scale_grad: bool = False, mode: int = 0,
    sparse: bool = False, shares: Any = None, last: bool = False, padding: Any = None,
) -> tuple[Array]:  # fmt: skip
    return _bags(_rows(weight, tokens), tokens, offsets, mode, shares, last, padding)


def _int8_bags(
    tokens: Array, weight: Array, scale: Array, offsets: Array, mode: int, shares: Any = None,
    last: bool = False, padding: Any = None,
) -> tuple[Array]:  # fmt: skip
    rows = _int8_rows(tokens, weight, scale)
    return _bags(rows, tokens, offsets, mode, shares, last, padding)


OPERATORS: dict[str, Callable[..., Any]] = {
    "index.Tensor": lambda x, indices: x[_checked(x, indices)],
    "index_put.default": lambda x, indices, value, accumulate=False: _stored(
        x, _checked(x, indices), value, accumulate),
    "index_add.default": _index_add,
    "index_select.default": lambda x, dim, index: _rows(x, index, dim),
    "gather.default": lambda x, dim, index, **rest: x[_along_axis(x, dim, index)],
    "take_along_dim.default": _take_along,
    "scatter.value scatter.src": _scatter,
    "scatter_add.default": lambda x, dim, index, src: _scatter(x, dim, index, src, "sum"),
    "scatter.reduce scatter.value_reduce scatter_reduce.two": _scatter,
    "index_reduce.default": _index_reduce,
    "max_unpool2d.default max_unpool3d.default": _max_unpool,
    "one_hot.default": _one_hot,
    "embedding.default": lambda weight, tokens, *rest: _rows(weight, tokens),
    "embedding_bag.default embedding_bag.padding_idx": _embedding_bag,
}  # fmt: skip
OURS: dict[str, Callable[..., Any]] = {
    "fastq.embedding.default": _int8_rows,
    "fastq.embedding_bag.default": _int8_bags,
}
