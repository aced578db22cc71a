"""What is made of sizes alone, and what only moves elements: other shapes, parts, joined ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np

from fastq.operators.dtypes import INTEGER, REAL, Array, promoted
from fastq.sizes import sides_of
from fastq.steps import kept_places


def _arange(*numbers: Any, dtype: Any = None, **kwargs: Any) -> Array:
    whole = all(isinstance(n, int) for n in numbers)
    return np.arange(*numbers, dtype=dtype or (INTEGER if whole else REAL))


def _linspace(start: Any, end: Any, steps: int, dtype: Any = None, **kwargs: Any) -> Array:
    dtype = np.dtype(dtype or REAL)
    y = np.linspace(start, end, steps)
    return (np.trunc(y) if dtype.kind in "iu" else y).astype(dtype)


def _eye(n: int, m: int | None = None, dtype: Any = None, **kwargs: Any) -> Array:
    return np.eye(n, m, dtype=dtype or REAL)


def _full(size: Sequence[int], value: Any, dtype: Any = None, **kwargs: Any) -> Array:
    return np.full(size, value, dtype or promoted(value)[0].dtype)


def _new(x: Array, size: Sequence[int], value: Any, dtype: Any = None, **kwargs: Any) -> Array:
    return np.full(size, value, dtype or x.dtype)


def _expand(x: Array, size: Sequence[int], **kwargs: Any) -> Array:
    own = (1,) * (len(size) - x.ndim) + x.shape
    return np.broadcast_to(x, [n if m == -1 else m for n, m in zip(own, size, strict=True)])


def _squeeze(x: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return x.squeeze(tuple(d for d in dims if x.ndim and x.shape[d] == 1))


def _flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return x.reshape(*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def sliced(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    """x[start:end:step] of an axis."""
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def _split(x: Array, size: int | Sequence[int], dim: int = 0) -> list[Array]:
    sizes = [size] * -(-x.shape[dim] // size) if isinstance(size, int) else size
    ends = np.cumsum(sizes)
    return [sliced(x, dim, end - n, end) for n, end in zip(sizes, ends.tolist(), strict=True)]


def _chunk(x: Array, chunks: int, dim: int = 0) -> list[Array]:
    return _split(x, max(-(-x.shape[dim] // chunks), 1), dim)


def _unfold(x: Array, dim: int, size: int, step: int) -> Array:
    """Windows of an axis, what is in one on a new last axis."""
    return sliced(np.lib.stride_tricks.sliding_window_view(x, size, dim), dim % x.ndim, step=step)


def cat(values: Sequence[Array], dim: int = 0) -> Array:
    """All in one, along an axis that is there."""
    some = [v for v in promoted(*values) if v.shape != (0,)]  # torch leaves these out
    return np.concatenate(some or [np.asarray(values[0])], dim)


def pad(x: Array, pad: Sequence[int], value: Any = 0) -> Array:
    """With the value at its sides, (before, after) of the last axis first; without some places of
    a side whose number is below 0."""
    sides = sides_of(pad, x.ndim)
    kept, _ = kept_places(sides, x.shape)
    more = [(max(a, 0), max(b, 0)) for a, b in sides]
    return np.pad(x[kept], more, constant_values=np.asarray(value, x.dtype))


OPERATORS: dict[str, Callable[..., Any]] = {
    "arange.default arange.start arange.start_step": _arange,
    "linspace.default linspace.Tensor_Tensor": _linspace,
    "eye.default eye.m": _eye,
    "full.default": _full,
    "zeros.default": lambda size, dtype=None, **rest: np.zeros(size, dtype or REAL),
    "ones.default": lambda size, dtype=None, **rest: np.ones(size, dtype or REAL),
    "scalar_tensor.default": lambda value, **rest: _full((), value, **rest),
    "new_full.default": _new,
    "new_zeros.default": lambda x, size, **rest: _new(x, size, 0, **rest),
    "new_ones.default": lambda x, size, **rest: _new(x, size, 1, **rest),
    "full_like.default fill.Scalar": lambda x, value, **rest: _new(x, x.shape, value, **rest),
    "zeros_like.default": lambda x, **rest: _new(x, x.shape, 0, **rest),
    "ones_like.default": lambda x, **rest: _new(x, x.shape, 1, **rest),
    "meshgrid.default meshgrid.indexing":
        lambda values, indexing="ij": list(np.meshgrid(*values, indexing=indexing)),
    "unsqueeze.default": lambda x, dim: np.expand_dims(x, dim),
    "squeeze.default squeeze.dim squeeze.dims": _squeeze,
    "expand.default broadcast_to.default": _expand,
    "expand_as.default": lambda x, other: np.broadcast_to(x, other.shape),
    "broadcast_tensors.default": lambda values: list(np.broadcast_arrays(*values)),
    "view.default reshape.default _unsafe_view.default": lambda x, size: x.reshape(size),
    "flatten.using_ints": _flatten,
    "permute.default": lambda x, dims: x.transpose(dims),
    "transpose.int": np.swapaxes,
    "t.default numpy_T.default": lambda x: x.T,
    "repeat.default": lambda x, repeats: np.tile(x, repeats),
    "flip.default": lambda x, dims: np.flip(x, tuple(dims)),
    "slice.Tensor": sliced,
    "select.int": lambda x, dim, index: x.take(index, dim),
    "split.Tensor split_with_sizes.default": _split,
    "chunk.default": _chunk,
    "unbind.int": lambda x, dim=0: [x.take(i, dim) for i in range(x.shape[dim])],
    "unfold.default": _unfold,
    "diagonal.default": np.diagonal,
    "diag.default": np.diag,
    "tril.default": lambda x, diagonal=0: np.tril(x, diagonal),
    "triu.default": lambda x, diagonal=0: np.triu(x, diagonal),
    "cat.default": cat,
    "stack.default": lambda values, dim=0: np.stack(promoted(*values), dim),
    "hstack.default": lambda values: np.hstack(promoted(*values)),
    "vstack.default": lambda values: np.vstack(promoted(*values)),
    "constant_pad_nd.default": pad,
}  # fmt: skip
