"""What is computed along axes: sums, extremes, spreads, orders, softmax, Fourier
transforms."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fastq.operators.dtypes import INTEGER, Array, promoted, summed
from fastq.operators.shapes import sliced


def axes_of(dim: Any) -> Any:
    """torch's axes as NumPy's: all, where there are none."""
    return (tuple(dim) or None) if isinstance(dim, list | tuple) else dim


def over(function: Callable[..., Any]) -> Callable[..., Array]:
    """The operator of a function over axes, such as max, any or argmax."""
    return lambda x, dim=None, keepdim=False: function(x, axes_of(dim), keepdims=keepdim)


def _total(function: Callable[..., Any]) -> Callable[..., Array]:
    """The operator of sum, mean or prod, which may be asked for a dtype."""

    def run(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
        return function(x, axes_of(dim), dtype or summed(x), keepdims=keepdim)

    return run


_sum, _mean = _total(np.sum), _total(np.mean)


def _and_where(function: Callable[..., Any], where: Callable[..., Any]) -> Callable[..., Any]:
    """The operator of max or min, beside its place."""
    return lambda *args, **kwargs: (over(function)(*args, **kwargs), over(where)(*args, **kwargs))


def _spread(*, root: bool, mean: bool) -> Callable[..., Any]:
    """The operator of var or std, beside the mean, if that is wanted, too."""

    def run(
        x: Array, dim: Any = None, correction: Any = None, keepdim: bool = False,
        unbiased: bool | None = None,
    ) -> Any:  # fmt: skip
        """Squares' sum / (n - correction), which is 1, or "unbiased": also in the axes' place."""
        if isinstance(dim, bool):
            dim, unbiased = None, dim
        correction = correction if unbiased is None else unbiased
        y = _sum((x - x.mean(axes_of(dim), keepdims=True)) ** 2, dim, keepdim)
        n = x.size // max(y.size, 1) - (1 if correction is None else correction)
        y = y / y.dtype.type(max(n, 0))
        y = np.sqrt(y) if root else y
        return (y, _mean(x, dim, keepdim)) if mean else y

    return run


def _cumulative(function: Callable[..., Any]) -> Callable[..., Array]:
    """The operator of cumsum or cumprod."""
    return lambda x, dim, dtype=None: function(x, dim, dtype or summed(x))


def _diff(x: Array, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Array:
    more = {"prepend": prepend, "append": append}
    given = {name: value for name, value in more.items() if value is not None}
    return np.diff(x, n, dim, **given)


def _argsort(x: Array, dim: int = -1, descending: bool = False, **kwargs: Any) -> Array:
    """Equal values stay in their order; NaN is the largest."""
    if not descending:
        return x.argsort(dim, kind="stable")
    last = x.shape[dim] - 1
    return last - np.flip(np.flip(x, dim).argsort(dim, kind="stable"), dim)


def _sort(x: Array, *args: Any, dim: int = -1, **kwargs: Any) -> tuple[Array, Array]:
    dim = args[0] if args else dim
    order = _argsort(x, dim, *args[1:], **kwargs)
    return np.take_along_axis(x, order, dim), order


def _topk(
    x: Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Array, Array]:
    """Sorted always; of equal values the first, where torch may take others."""
    values, order = _sort(x, dim, largest)
    return sliced(values, dim, 0, k), sliced(order, dim, 0, k)


def _kthvalue(x: Array, k: Any, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The k-th smallest, from 1 on, and its place; k may be an array, of each line. NaN is the
    largest. Of equal values' places the one by a stable sort, where torch may take others."""
    values, order = _sort(x, dim)
    shape = [1 if axis == dim % x.ndim else n for axis, n in enumerate(x.shape)]
    at = np.broadcast_to(np.asarray(k) - 1, shape)
    found = [np.take_along_axis(y, at, dim) for y in (values, order)]
    value, place = found if keepdim else (y.squeeze(dim) for y in found)
    return value, place


def _median(*, ignore_nan: bool) -> Callable[..., Any]:
    """The operator of median or nanmedian: of two in the middle the lower. NaN if there is one, but
    for nanmedian."""

    def run(x: Array, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            return run(x.reshape(-1), 0)[0] if x.size else np.array(np.nan).astype(x.dtype)
        n, nans = x.shape[dim], np.isnan(x).sum(dim, keepdims=True)
        if ignore_nan:
            k = np.maximum(n - nans + 1, 2) // 2
        else:
            k = np.where(nans > 0, n - nans + 1, (n + 1) // 2)
        return _kthvalue(x, k, dim, keepdim)

    return run


def _mode(x: Array, dim: int = -1, keepdim: bool = False) -> tuple[Array, Array]:
    """The value that is there most often, the smallest of these, and its last place. Not of NaN,
    which torch does not order here."""
    values = np.sort(x, dim)
    number = _numbers(x, dim)
    begins = np.insert(np.diff(values, axis=dim) != 0, 0, True, dim)
    length = number - np.maximum.accumulate(np.where(begins, number, 0), dim)
    k = length.argmax(dim, keepdims=True) + 1
    return _kthvalue(x, k, dim, keepdim)


def _numbers(x: Array, dim: int) -> Array:
    """0, 1, ... along an axis, to be broadcast."""
    return np.arange(x.shape[dim]).reshape(-1, *[1] * (x.ndim - 1 - dim % x.ndim))


def _and_last(function: Any) -> Callable[..., tuple[Array, Array]]:
    """The operator of cummax or cummin, beside the last place of each; NaN stays."""

    def run(x: Array, dim: int) -> tuple[Array, Array]:
        y = function.accumulate(x, dim)
        found = np.where((x == y) | np.isnan(x), _numbers(x, dim), 0)
        return y, np.maximum.accumulate(found, dim)

    return run


def _searchsorted(
    ends: Array, x: Any, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: Any = None,
) -> Array:  # fmt: skip
    """Where values would stand among the ends: those of their own line, if these have lines.
    The sorter is the order of the ends."""
    ends, x = promoted(ends, x)
    ends = ends if sorter is None else np.take_along_axis(ends, sorter, -1)
    side = side or ("right" if right else "left")
    found = np.empty(x.shape, np.int32 if out_int32 else INTEGER)
    for line in np.ndindex(ends.shape[:-1]):
        found[line] = np.searchsorted(ends[line], x[line], side)  # type: ignore[call-overload]
    return found


def softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    """Shares of 1 along an axis."""
    x = x.astype(dtype or x.dtype)
    y = np.exp(x - x.max(dim, keepdims=True))
    return y / y.sum(dim, keepdims=True)


def _log_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    x = x.astype(dtype or x.dtype)
    x = x - x.max(dim, keepdims=True)
    return x - np.log(np.exp(x).sum(dim, keepdims=True))


def _logsumexp(x: Array, dim: Any, keepdim: bool = False) -> Array:
    most = x.max(axes_of(dim), keepdims=True)
    most = np.where(np.isfinite(most), most, most.dtype.type(0))
    y = np.log(np.exp(x - most).sum(axes_of(dim), keepdims=True)) + most
    return y if keepdim else y.squeeze(axes_of(dim))


OPERATORS: dict[str, Callable[..., Any]] = {
    "sum.default sum.dim_IntList": _sum,
    "mean.default mean.dim": _mean,
    "prod.default prod.dim_int": _total(np.prod),
    "count_nonzero.default count_nonzero.dim_IntList": lambda x, dim=None: _sum(x != 0, dim),
    "amax.default max.default": over(np.max),
    "amin.default min.default": over(np.min),
    "any.default any.dim any.dims": over(np.any),
    "all.default all.dim all.dims": over(np.all),
    "argmax.default": over(np.argmax),
    "argmin.default": over(np.argmin),
    "max.dim": _and_where(np.max, np.argmax),
    "min.dim": _and_where(np.min, np.argmin),
    **{f"{name}{also}.{overload}": _spread(root=name == "std", mean=bool(also))
       for name in ("var", "std") for also in ("", "_mean")
       for overload in ("default", "dim", "correction")},
    "cumsum.default": _cumulative(np.cumsum),
    "cumprod.default": _cumulative(np.cumprod),
    "diff.default": _diff,
    "sort.default sort.stable": _sort,
    "argsort.default argsort.stable": _argsort,
    "topk.default": _topk,
    "kthvalue.default": _kthvalue,
    "median.default median.dim": _median(ignore_nan=False),
    "nanmedian.default nanmedian.dim": _median(ignore_nan=True),
    "mode.default": _mode,
    "cummax.default": _and_last(np.maximum),
    "cummin.default": _and_last(np.minimum),
    "searchsorted.Tensor searchsorted.Scalar": _searchsorted,
    "bucketize.Tensor bucketize.Scalar": lambda x, ends, **rest: _searchsorted(ends, x, **rest),
    "softmax.int": softmax,
    "log_softmax.int": _log_softmax,
    "logsumexp.default": _logsumexp,
    **{f"fft_{name}.default": getattr(np.fft, name) for name in (
        "fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2")},
}  # fmt: skip
