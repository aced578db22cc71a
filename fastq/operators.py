"""torch's float operators in NumPy: what a saved network has between its programs, without torch.

Arguments, dtypes and results are those of the operator of the same name in torch (its "aten" and
overload); float results may differ in their last bits. What is not here needs torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.arguments import NUMPY_MODES
from fastq.layout import Named, Stage, filled
from fastq.resampling import EDGES, KINDS, grid_sampled, resampled
from fastq.sizes import Shapes, padding_to, reshaped, sides_of, sized
from fastq.steps import kept_places

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


# ------------------------------------------------------------------------------------------ dtypes


def promoted(*values: Any) -> list[Array]:
    """All in the dtype that torch computes them in: that of the arrays with axes, unless those
    without, or numbers, are of a wider kind; bool, then integers, then float."""
    numbers = [v for v in values if not isinstance(v, np.ndarray)]
    arrays = [v for v in values if isinstance(v, np.ndarray)]
    found: np.dtype[Any] | None = None
    for group in (
        [a.dtype for a in arrays if a.ndim],
        [a.dtype for a in arrays if not a.ndim],
        [np.dtype(bool) if isinstance(v, bool) else INTEGER if isinstance(v, int) else REAL
         for v in numbers],
    ):  # fmt: skip
        if group:
            widest = max(map(_width, group))
            dtype = np.result_type(*[d for d in group if _width(d) == widest])
            found = dtype if found is None or widest > _width(found) else found
    return [np.asarray(v, found) for v in values]


def _width(dtype: np.dtype[Any]) -> int:
    """How wide a kind of dtype is, to be promoted to: bool, integers, float, complex."""
    return next(i for i, kinds in enumerate(WIDTHS) if dtype.kind in kinds)


def _real(x: Any) -> Array:
    """x as float32, unless it is float or complex."""
    x = np.asarray(x)
    return x if x.dtype.kind in "fc" else x.astype(REAL)


def _pointwise(function: Callable[..., Any], *, real: bool = False) -> Callable[..., Array]:
    """An operator of the function: its arguments are promoted first, with `real` to float."""

    def run(*values: Any) -> Array:
        arrays = promoted(*values)
        return np.asarray(function(*(map(_real, arrays) if real else arrays)))

    return run


def _scaled(function: Callable[..., Any]) -> Callable[..., Array]:
    """add and sub, whose second operand has a factor."""

    def run(x: Any, y: Any, alpha: float = 1) -> Array:
        x, y = promoted(x, y)
        return np.asarray(function(x, y if alpha == 1 else y * y.dtype.type(alpha)))

    return run


def _divided(x: Any, y: Any, rounding_mode: str | None = None) -> Array:
    """div, whose quotient may be rounded down or towards zero, in its own dtype then."""
    x, y = promoted(x, y)
    if rounding_mode is None:
        return np.asarray(_real(x) / _real(y))
    if rounding_mode == "floor":
        return np.asarray(np.floor_divide(x, y))
    return np.asarray((x - np.fmod(x, y)) // y if x.dtype.kind in "iu" else np.trunc(x / y))


# --------------------------------------------------------------------------------- values and axes


def _to(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Array:
    for value in args:
        dtype = value if isinstance(value, np.dtype) else dtype
    return x if dtype is None else x.astype(dtype)  # type: ignore[no-any-return]


def _arange(*numbers: Any, dtype: Any = None, **kwargs: Any) -> Array:
    whole = all(isinstance(n, int) for n in numbers)
    return np.arange(*numbers, dtype=dtype or (INTEGER if whole else REAL))


def _linspace(start: Any, end: Any, steps: int, dtype: Any = None, **kwargs: Any) -> Array:
    dtype = np.dtype(dtype or REAL)
    y = np.linspace(start, end, steps)
    return (np.trunc(y) if dtype.kind in "iu" else y).astype(dtype)


def _eye(n: int, m: int | None = None, dtype: Any = None, **kwargs: Any) -> Array:
    return np.eye(n, m, dtype=dtype or REAL)


def _meshgrid(values: Sequence[Array], indexing: Any = "ij") -> list[Array]:
    return list(np.meshgrid(*values, indexing=indexing))


def _full(size: Sequence[int], value: Any, dtype: Any = None, **kwargs: Any) -> Array:
    return np.full(size, value, dtype or promoted(value)[0].dtype)


def _filled(value: int) -> Callable[..., Array]:
    return lambda size, dtype=None, **kwargs: np.full(size, value, dtype or REAL)


def _alike(x: Array, value: Any, dtype: Any = None, **kwargs: Any) -> Array:
    return np.full(x.shape, value, dtype or x.dtype)


def _expand(x: Array, size: Sequence[int], **kwargs: Any) -> Array:
    own = (1,) * (len(size) - x.ndim) + x.shape
    return np.broadcast_to(x, [n if m == -1 else m for n, m in zip(own, size, strict=True)])


def _squeeze(x: Array, dim: int | Sequence[int] | None = None) -> Array:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    return x.squeeze(tuple(d for d in dims if x.ndim and x.shape[d] == 1))


def _flatten(x: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    start, end = start_dim % max(x.ndim, 1), end_dim % max(x.ndim, 1)
    return x.reshape(*x.shape[:start], prod(x.shape[start : end + 1]), *x.shape[end + 1 :])


def _slice(x: Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Array:
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def _split(x: Array, size: int | Sequence[int], dim: int = 0) -> list[Array]:
    sizes = [size] * -(-x.shape[dim] // size) if isinstance(size, int) else size
    ends = np.cumsum(sizes)
    return [_slice(x, dim, end - n, end) for n, end in zip(sizes, ends.tolist(), strict=True)]


def _chunk(x: Array, chunks: int, dim: int = 0) -> list[Array]:
    return _split(x, max(-(-x.shape[dim] // chunks), 1), dim)


def _unbind(x: Array, dim: int = 0) -> list[Array]:
    return [x.take(i, dim) for i in range(x.shape[dim])]


def _windows(x: Array, dim: int, size: int, step: int) -> Array:
    """unfold: windows of an axis, what is in one on a new last axis."""
    return _slice(np.lib.stride_tricks.sliding_window_view(x, size, dim), dim % x.ndim, step=step)


def _check_places(index: Array, size: int, least: int = 0) -> None:
    """IndexError unless an axis of this size has all of these places."""
    if index.size and not least <= index.min() <= index.max() < size:
        raise IndexError(
            f"places from {index.min()} to {index.max()} of an axis of {size}: out of range"
        )


def _rows(x: Array, index: Array, dim: int = 0) -> Array:
    """What is at these places of an axis; IndexError for one that is not there."""
    if index.dtype.kind not in "iu":
        raise TypeError(f"places are {index.dtype}; wanted integers")
    _check_places(index, x.shape[dim])
    return x.take(index, dim)


def _checked(x: Array, indices: Sequence[Any]) -> tuple[Any, ...]:
    """Indices of each axis, as NumPy's; None is the whole one."""
    places = [slice(None) if i is None else i for i in indices]
    for axis, i in enumerate(places):
        if isinstance(i, np.ndarray) and i.dtype.kind in "iu":
            _check_places(i, x.shape[axis], -x.shape[axis])
    return tuple(places)


def _index(x: Array, indices: Sequence[Any]) -> Array:
    """x[indices], where None is the whole axis."""
    return x[_checked(x, indices)]  # type: ignore[no-any-return]


def _index_put(x: Array, indices: Sequence[Any], value: Array, accumulate: bool = False) -> Array:
    return _stored(x, _checked(x, indices), value, accumulate)


def _index_add(x: Array, dim: int, index: Array, source: Array, alpha: Any = 1) -> Array:
    _check_places(index, x.shape[dim])
    places = (*[slice(None)] * (dim % x.ndim), index)
    return _stored(x, places, source * source.dtype.type(alpha), True)


def _stored(x: Array, places: tuple[Any, ...], value: Any, add: bool = False) -> Array:
    """A copy of x with other values there, or with these added, as often as a place is named."""
    y = x.copy()
    if add:
        np.add.at(y, places, value)
    else:
        y[places] = value
    return y


def _along_axis(x: Array, dim: int, index: Array) -> tuple[Any, ...]:
    """The places of gather and scatter: those of the index, but on one axis what it says."""
    _check_places(index, x.shape[dim])
    places: list[Array] = list(np.indices(index.shape, sparse=True))
    places[dim] = index
    return tuple(places)


def _gather(x: Array, dim: int, index: Array, **kwargs: Any) -> Array:
    return x[_along_axis(x, dim, index)]  # type: ignore[no-any-return]


def _scatter(add: bool) -> Callable[..., Array]:
    """The operator scatter, or scatter_add."""

    def run(x: Array, dim: int, index: Array, src: Any) -> Array:
        if isinstance(src, np.ndarray) and src.ndim:
            src = src[tuple(map(slice, index.shape))]
        return _stored(x, _along_axis(x, dim, index), src, add)

    return run


def _take_along(x: Array, indices: Array, dim: int | None = None) -> Array:
    if dim is None:
        x, indices, dim = x.reshape(-1), indices.reshape(-1), 0
    _check_places(indices, x.shape[dim])
    return np.take_along_axis(x, indices, dim)


def _one_hot(tokens: Array, num_classes: int = -1) -> Array:
    count = int(tokens.max()) + 1 if num_classes == -1 else num_classes
    return _rows(np.eye(count, dtype=INTEGER), tokens)


def _cat(values: Sequence[Array], dim: int = 0) -> Array:
    some = [v for v in promoted(*values) if v.shape != (0,)]  # torch leaves these out
    return np.concatenate(some or [np.asarray(values[0])], dim)


def _stack(values: Sequence[Array], dim: int = 0) -> Array:
    return np.stack(promoted(*values), dim)


def _triangle(function: Callable[..., Any]) -> Callable[..., Array]:
    return lambda x, diagonal=0: function(x, diagonal)


def _masked(x: Array, mask: Array, value: Any) -> Array:
    return np.where(mask, np.asarray(value, x.dtype), x)


def _clamp(x: Array, min: Any = None, max: Any = None) -> Array:
    for bound, function in ((min, np.maximum), (max, np.minimum)):
        x = x if bound is None else function(*promoted(x, bound))
    return x


def _pad(x: Array, pad: Sequence[int], value: Any = 0) -> Array:
    sides = sides_of(pad, x.ndim)
    kept, _ = kept_places(sides, x.shape)
    more = [(max(a, 0), max(b, 0)) for a, b in sides]
    return np.pad(x[kept], more, constant_values=np.asarray(value, x.dtype))


# ------------------------------------------------------------------------------- along axes, sums


def _along(dim: Any) -> Any:
    """torch's axes as NumPy's: all, where there are none."""
    return (tuple(dim) or None) if isinstance(dim, list | tuple) else dim


def _sum(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
    dtype = dtype or (INTEGER if x.dtype.kind in "biu" else x.dtype)
    return np.asarray(x.sum(_along(dim), dtype, keepdims=keepdim))


def _mean(x: Array, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Array:
    return np.asarray(x.mean(_along(dim), dtype or x.dtype, keepdims=keepdim))


def _extreme(function: Callable[..., Any]) -> Callable[..., Array]:
    """The operator of a function over axes: amax, amin, any and all."""
    return lambda x, dim=None, keepdim=False: np.asarray(function(x, _along(dim), keepdims=keepdim))


def _largest(function: Callable[..., Any]) -> Callable[..., Array]:
    """The operator of argmax or argmin."""

    def run(x: Array, dim: int | None = None, keepdim: bool = False) -> Array:
        return np.asarray(function(x, dim, keepdims=keepdim))

    return run


def _max(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return _extreme(np.max)(x, dim, keepdim), _largest(np.argmax)(x, dim, keepdim)


def _min(x: Array, dim: int, keepdim: bool = False) -> tuple[Array, Array]:
    return _extreme(np.min)(x, dim, keepdim), _largest(np.argmin)(x, dim, keepdim)


def _prod(x: Array, dim: int | None = None, keepdim: bool = False, dtype: Any = None) -> Array:
    dtype = dtype or (INTEGER if x.dtype.kind in "biu" else x.dtype)
    return np.asarray(x.prod(dim, dtype, keepdims=keepdim))


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
        below = x - x.mean(_along(dim), keepdims=True)
        y = np.asarray((below * below).sum(_along(dim), keepdims=keepdim))
        n = x.size // max(y.size, 1) - (1 if correction is None else correction)
        y = np.asarray(y / y.dtype.type(max(n, 0)))
        y = np.asarray(np.sqrt(y)) if root else y
        return (y, _mean(x, dim, keepdim)) if mean else y

    return run


def _logsumexp(x: Array, dim: Any, keepdim: bool = False) -> Array:
    most = x.max(_along(dim), keepdims=True)
    most = np.where(np.isfinite(most), most, most.dtype.type(0))
    y = np.log(np.exp(x - most).sum(_along(dim), keepdims=True)) + most
    return np.asarray(y if keepdim else y.squeeze(_along(dim)))


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
    return _slice(values, dim, 0, k), _slice(order, dim, 0, k)


def _cumulative(function: Callable[..., Any]) -> Callable[..., Array]:
    """The operator of cumsum or cumprod."""

    def run(x: Array, dim: int, dtype: Any = None) -> Array:
        dtype = dtype or (INTEGER if x.dtype.kind in "biu" else x.dtype)
        return np.asarray(function(x, dim, dtype))

    return run


def _diff(x: Array, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Array:
    more = {"prepend": prepend, "append": append}
    given = {name: value for name, value in more.items() if value is not None}
    return np.diff(x, n, dim, **given)


def _softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    x = x.astype(dtype or x.dtype)
    y = np.exp(x - x.max(dim, keepdims=True))
    return y / y.sum(dim, keepdims=True)  # type: ignore[no-any-return]


def _log_softmax(x: Array, dim: int, dtype: Any = None) -> Array:
    x = x.astype(dtype or x.dtype)
    x = x - x.max(dim, keepdims=True)
    return x - np.log(np.exp(x).sum(dim, keepdims=True))  # type: ignore[no-any-return]


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))  # type: ignore[no-any-return]


# --------------------------------------------------------------------------------- activations


def _elu(x: Array, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Array:
    """Of celu and selu, too."""
    below = alpha * np.expm1(np.minimum(x, 0) * input_scale)
    return scale * np.where(x > 0, x, below)


def _softplus(x: Array, beta: float = 1, threshold: float = 20) -> Array:
    """log(1 + exp(beta * x)) / beta, and x where that is beyond the threshold."""
    return np.where(beta * x > threshold, x, np.logaddexp(0, beta * x) / beta)


_erf = np.vectorize(math.erf, otypes=[REAL])  # NumPy has none


def _gelu(x: Array, approximate: str = "none") -> Array:
    """x times the normal distribution's share below it, or its approximation by tanh."""
    if approximate == "none":
        return 0.5 * x * (1 + _erf(x * 0.5**0.5))  # type: ignore[no-any-return]
    return 0.5 * x * (1 + np.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))  # type: ignore[no-any-return]


def _rrelu(x: Array, lower: float = 1 / 8, upper: float = 1 / 3, *training: Any) -> Array:
    """The mean of its slopes: a saved network does not train."""
    return np.where(x > 0, x, x * ((lower + upper) / 2))


def _logit(x: Array, eps: float | None = None) -> Array:
    x = x if eps is None else _clamp(x, eps, 1 - eps)
    return np.log(x / (1 - x))  # type: ignore[no-any-return]


def _nan_to_num(x: Array, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Array:
    return np.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


def _hard_sigmoid(x: Array) -> Array:
    return _clamp(x + 3, 0, 6) / 6  # type: ignore[no-any-return]


def _layer_norm(
    x: Array, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *rest: Any,
) -> Array:  # fmt: skip
    axes = tuple(range(-len(shape), 0))
    x = x - x.mean(axes, keepdims=True)
    y = x / np.sqrt((x * x).mean(axes, keepdims=True) + x.dtype.type(eps))
    y = y if weight is None else y * weight
    return y if bias is None else y + bias  # type: ignore[no-any-return]


def _linear(x: Array, weight: Array, bias: Any = None) -> Array:
    y = x @ weight.T
    return y if bias is None else y + bias  # type: ignore[no-any-return]


def _rms_norm(x: Array, shape: Sequence[int], weight: Any = None, eps: Any = None) -> Array:
    eps = np.finfo(x.dtype).eps if eps is None else x.dtype.type(eps)
    y = x / np.sqrt((x * x).mean(tuple(range(-len(shape), 0)), keepdims=True) + eps)
    return y if weight is None else y * weight  # type: ignore[no-any-return]


def _group_norm(
    x: Array, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *rest: Any
) -> Array:
    parts = x.reshape(len(x), groups, -1)
    y = _layer_norm(parts, parts.shape[2:], eps=eps).reshape(x.shape)
    return _shifted(y, weight, bias)


def _shifted(x: Array, factor: Any, shift: Any) -> Array:
    """x * factor + shift along axis 1."""
    shape = -1, *[1] * (x.ndim - 2)
    y = x if factor is None else x * factor.astype(x.dtype).reshape(shape)
    return y if shift is None else y + shift.astype(x.dtype).reshape(shape)  # type: ignore[no-any-return]


def _bilinear(x: Array, y: Array, weight: Array, bias: Any = None) -> Array:
    z = np.einsum("...i,oij,...j->...o", x, weight, y, optimize=True)
    return z if bias is None else z + bias  # type: ignore[no-any-return]


def _added(x: Array, a: Array, b: Array, beta: Any = 1, alpha: Any = 1) -> Array:
    """addmm and baddbmm; what is multiplied by 0 may be anything."""
    product = np.matmul(a, b) * a.dtype.type(alpha)
    return product + x * x.dtype.type(beta) if beta else product


def _einsum(equation: str, values: Sequence[Array], **kwargs: Any) -> Array:
    return np.asarray(np.einsum(equation, *values, optimize=True))


def _norm(x: Array, ord: float = 2, dim: Any = None, keepdim: bool = False, **rest: Any) -> Array:
    if abs(ord) == np.inf:
        return _extreme(np.max if ord > 0 else np.min)(np.abs(x), dim, keepdim)
    if ord == 0:
        return np.asarray((x != 0).sum(_along(dim), keepdims=keepdim)).astype(x.dtype)
    y = np.abs(x) ** ord
    return np.asarray(y.sum(_along(dim), keepdims=keepdim) ** (1 / ord)).astype(x.dtype)


def _cosine(x: Array, y: Array, dim: int = 1, eps: float = 1e-8) -> Array:
    x, y = np.broadcast_arrays(*promoted(x, y))
    x, y = (v / np.maximum(_norm(v, 2, dim, True), v.dtype.type(eps)) for v in (x, y))
    return np.asarray((x * y).sum(dim))


def _distance(x: Array, y: Array, p: float = 2, eps: float = 1e-6, keepdim: bool = False) -> Array:
    return _norm(x - y + x.dtype.type(eps), p, -1, keepdim)


def _bags(
    rows: Array, tokens: Array, offsets: Array, mode: int, shares: Any, last: bool, padding: Any
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
    return _bags(rows, tokens, offsets, mode, shares, bool(last), padding)


def _bicubic(x: Array, size: Any, align_corners: bool, factors: Any = None, *rest: Any) -> Array:
    return resampled(x, size, "bicubic", align_corners, (factors, *rest) if rest else factors)


def _grid_sampler(x: Array, grid: Array, kind: int, edges: int, align_corners: bool) -> Array:
    if x.ndim != 4:
        raise ValueError(f"grid_sampler of {x.shape}; fastq.load runs it with torch")
    return grid_sampled(x, grid, KINDS[kind], EDGES[edges], align_corners)


def _embedding(weight: Array, tokens: Array, *rest: Any) -> Array:
    return _rows(weight, tokens)


def _int8_rows(tokens: Array, weight: Array, scale: Array) -> Array:
    return _rows(weight, tokens).astype(REAL) * _rows(scale, tokens)[..., None]


# by torch's names; several overloads of one operator share a line
_TABLE: dict[str, Callable[..., Any]] = {
    "add.Tensor add.Scalar": _scaled(np.add),
    "sub.Tensor sub.Scalar subtract.Tensor": _scaled(np.subtract),
    "rsub.Scalar rsub.Tensor": lambda x, y, alpha=1: _scaled(np.subtract)(y, x, alpha),
    "mul.Tensor mul.Scalar multiply.Tensor": _pointwise(np.multiply),
    "div.Tensor div.Scalar true_divide.Tensor div.Tensor_mode div.Scalar_mode": _divided,
    "floor_divide.default floor_divide.Scalar": lambda x, y: _divided(x, y, "floor"),
    "pow.Tensor_Scalar pow.Tensor_Tensor pow.Scalar": _pointwise(np.power),
    "maximum.default max.other": _pointwise(np.maximum),
    "minimum.default min.other": _pointwise(np.minimum),
    "eq.Scalar eq.Tensor": _pointwise(np.equal),
    "ne.Scalar ne.Tensor": _pointwise(np.not_equal),
    "lt.Scalar lt.Tensor": _pointwise(np.less),
    "le.Scalar le.Tensor": _pointwise(np.less_equal),
    "gt.Scalar gt.Tensor": _pointwise(np.greater),
    "ge.Scalar ge.Tensor": _pointwise(np.greater_equal),
    "logical_and.default": np.logical_and,
    "logical_or.default": np.logical_or,
    "logical_xor.default": np.logical_xor,
    "logical_not.default": np.logical_not,
    "bitwise_and.Tensor __and__.Tensor": _pointwise(np.bitwise_and),
    "bitwise_or.Tensor __or__.Tensor": _pointwise(np.bitwise_or),
    "bitwise_xor.Tensor __xor__.Tensor": _pointwise(np.bitwise_xor),
    "bitwise_not.default": np.invert,
    **{f"{name}.default": getattr(np, name) for name in ("isnan", "isinf", "isfinite")},
    "addcmul.default": lambda x, y, z, value=1: x + y * z * y.dtype.type(value),
    "addcdiv.default": lambda x, y, z, value=1: x + y / z * y.dtype.type(value),
    "lerp.Scalar lerp.Tensor": lambda x, end, weight: x + (end - x) * weight,
    "logaddexp.default": _pointwise(np.logaddexp),
    "hypot.default": _pointwise(np.hypot),
    "neg.default": np.negative,
    "abs.default absolute.default": np.abs,
    "sign.default": np.sign,
    "square.default": np.square,
    "exp.default": _pointwise(np.exp, real=True),
    "log.default": _pointwise(np.log, real=True),
    "sqrt.default": _pointwise(np.sqrt, real=True),
    "rsqrt.default": _pointwise(lambda x: 1 / np.sqrt(x), real=True),
    "reciprocal.default": _pointwise(lambda x: 1 / x, real=True),
    "sin.default": _pointwise(np.sin, real=True),
    "cos.default": _pointwise(np.cos, real=True),
    "tanh.default": _pointwise(np.tanh, real=True),
    "sigmoid.default": _pointwise(_sigmoid, real=True),
    "silu.default": lambda x: x * _sigmoid(x),
    **{
        f"{torch_name}.default": _pointwise(getattr(np, name), real=True)
        for torch_name, name in {
            **{name: name for name in (
                "exp2", "expm1", "log2", "log10", "log1p", "tan", "sinh", "cosh")},
            **{name: name.replace("a", "arc", 1) for name in (
                "asin", "acos", "atan", "asinh", "acosh", "atanh")},
        }.items()
    },
    **{f"{name}.default": getattr(np, name) for name in ("floor", "ceil", "trunc")},
    "round.default": np.rint,
    "round.decimals": lambda x, decimals: np.round(x, decimals),
    "frac.default": lambda x: x - np.trunc(x),
    "atan2.default": _pointwise(np.arctan2, real=True),
    "fmod.Scalar fmod.Tensor": _pointwise(np.fmod),
    "remainder.Scalar remainder.Tensor": _pointwise(np.remainder),
    "erf.default": _pointwise(_erf, real=True),
    "erfc.default": _pointwise(lambda x: 1 - _erf(x), real=True),
    "nan_to_num.default": _nan_to_num,
    "logit.default": _logit,
    "relu.default": lambda x: np.maximum(x, x.dtype.type(0)),
    "relu6.default": lambda x: _clamp(x, 0, 6),
    "hardtanh.default": lambda x, least=-1, most=1: _clamp(x, least, most),
    "hardsigmoid.default": _hard_sigmoid,
    "hardswish.default": lambda x: x * _hard_sigmoid(x),
    "threshold.default": lambda x, threshold, value: np.where(x > threshold, *promoted(x, value)),
    "leaky_relu.default": lambda x, slope=0.01: np.where(x > 0, x, x * slope),
    "rrelu.default": _rrelu,
    "elu.default": _elu,
    "celu.default": lambda x, alpha=1: _elu(x, alpha, 1, 1 / alpha),
    "selu.default": lambda x: _elu(x, 1.6732632423543772, 1.0507009873554805),
    "softplus.default": _softplus,
    "log_sigmoid.default": lambda x: -_softplus(-x, 1, np.inf),
    "mish.default": lambda x: x * np.tanh(_softplus(x)),
    "gelu.default": _gelu,
    "hardshrink.default": lambda x, lambd=0.5: np.where(abs(x) > lambd, *promoted(x, 0)),
    "softshrink.default": lambda x, lambd=0.5: x - _clamp(x, -lambd, lambd),
    "clamp.default clamp.Tensor clip.default clip.Tensor": _clamp,
    "clamp_min.default": lambda x, min: _clamp(x, min),
    "clamp_max.default": lambda x, max: _clamp(x, None, max),
    "where.self where.ScalarOther where.ScalarSelf where.Scalar":
        lambda condition, x, y: np.where(condition, *promoted(x, y)),
    "masked_fill.Scalar masked_fill.Tensor": _masked,
    "to.dtype to.dtype_layout to.device _to_copy.default": _to,
    "type_as.default": lambda x, other: x.astype(other.dtype),
    "contiguous.default clone.default alias.default detach.default lift_fresh_copy.default "
    "dropout.default": lambda x, *args, **kwargs: x,
    "arange.default arange.start arange.start_step": _arange,
    "linspace.default linspace.Tensor_Tensor": _linspace,
    "eye.default eye.m": _eye,
    "meshgrid.default meshgrid.indexing": _meshgrid,
    "full.default": _full,
    "zeros.default": _filled(0),
    "ones.default": _filled(1),
    "scalar_tensor.default": lambda value, **kwargs: _full((), value, **kwargs),
    "full_like.default fill.Scalar": _alike,
    "zeros_like.default": lambda x, **kwargs: _alike(x, 0, **kwargs),
    "ones_like.default": lambda x, **kwargs: _alike(x, 1, **kwargs),
    "new_zeros.default": lambda x, size, dtype=None, **rest: np.zeros(size, dtype or x.dtype),
    "new_ones.default": lambda x, size, dtype=None, **rest: np.ones(size, dtype or x.dtype),
    "new_full.default":
        lambda x, size, value, dtype=None, **rest: np.full(size, value, dtype or x.dtype),
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
    "slice.Tensor": _slice,
    "select.int": lambda x, dim, index: x.take(index, dim),
    "split.Tensor split_with_sizes.default": _split,
    "chunk.default": _chunk,
    "unbind.int": _unbind,
    "unfold.default": _windows,
    "diagonal.default": np.diagonal,
    "diag.default": np.diag,
    "index.Tensor": _index,
    "index_put.default": _index_put,
    "index_add.default": _index_add,
    "index_select.default": lambda x, dim, index: _rows(x, index, dim),
    "gather.default": _gather,
    "take_along_dim.default": _take_along,
    "scatter.value scatter.src": _scatter(False),
    "scatter_add.default": _scatter(True),
    "one_hot.default": _one_hot,
    "bucketize.Tensor": lambda x, ends, out_int32=False, right=False: np.searchsorted(
        ends, x, "right" if right else "left").astype(np.int32 if out_int32 else INTEGER),
    "cat.default": _cat,
    "stack.default": _stack,
    "hstack.default": lambda values: np.hstack(promoted(*values)),
    "vstack.default": lambda values: np.vstack(promoted(*values)),
    "tril.default": _triangle(np.tril),
    "triu.default": _triangle(np.triu),
    "constant_pad_nd.default": _pad,
    "sum.default sum.dim_IntList": _sum,
    "mean.default mean.dim": _mean,
    "prod.default prod.dim_int": _prod,
    **{f"{name}{also}.{overload}": _spread(root=name == "std", mean=bool(also))
       for name in ("var", "std") for also in ("", "_mean")
       for overload in ("default", "dim", "correction")},
    "count_nonzero.default count_nonzero.dim_IntList":
        lambda x, dim=None: np.asarray(np.count_nonzero(x, _along(dim)), INTEGER),
    "amax.default max.default": _extreme(np.max),
    "amin.default min.default": _extreme(np.min),
    "any.default any.dim any.dims": _extreme(np.any),
    "all.default all.dim all.dims": _extreme(np.all),
    "argmax.default": _largest(np.argmax),
    "argmin.default": _largest(np.argmin),
    "max.dim": _max,
    "min.dim": _min,
    "sort.default sort.stable": _sort,
    "argsort.default argsort.stable": _argsort,
    "topk.default": _topk,
    "cumsum.default": _cumulative(np.cumsum),
    "cumprod.default": _cumulative(np.cumprod),
    "logsumexp.default": _logsumexp,
    "diff.default": _diff,
    "softmax.int": _softmax,
    "log_softmax.int": _log_softmax,
    "linalg_vector_norm.default": _norm,
    "cosine_similarity.default": _cosine,
    "pairwise_distance.default": _distance,
    "cdist.default":
        lambda x, y, p=2.0, *rest: _norm(x[..., :, None, :] - y[..., None, :, :], p, -1),
    "layer_norm.default": _layer_norm,
    "rms_norm.default": _rms_norm,
    "group_norm.default": _group_norm,
    "linear.default": _linear,
    "bilinear.default": _bilinear,
    "matmul.default bmm.default mm.default mv.default": np.matmul,
    "dot.default": lambda x, y: np.asarray(x @ y),
    "addmm.default baddbmm.default": _added,
    "outer.default": np.outer,
    "einsum.default": _einsum,
    "polar.default": lambda size, angle: size * np.exp(1j * angle),
    "view_as_complex.default": lambda x: x[..., 0] + 1j * x[..., 1],
    "view_as_real.default": lambda x: np.stack([x.real, x.imag], -1),
    "real.default": np.real,
    "imag.default": np.imag,
    **{f"fft_{name}.default": getattr(np.fft, name) for name in (
        "fft", "ifft", "rfft", "irfft", "fft2", "ifft2", "rfft2", "irfft2")},
    "upsample_bicubic2d.vec upsample_bicubic2d.default": _bicubic,
    "grid_sampler.default": _grid_sampler,
    "embedding.default": _embedding,
    "embedding_bag.default embedding_bag.padding_idx": _embedding_bag,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": lambda values, index: values[index],
    "fastq.embedding.default": _int8_rows,
    "fastq.embedding_bag.default": _int8_bags,
    **{f"aten.{name}": run for names, run in _TABLE.items() for name in names.split()},
}


# ------------------------------------------------------------------- operations of graph.OPERATIONS


def _calls(calls: Sequence[Any], x: Array) -> Array:
    """A chain of (target, args, kwargs): Ref(0) is x, Ref(i) the result of call i."""
    values = [x]
    for target, args, kwargs in calls:
        values.append(_call(target, args, kwargs, values, {}, ()))
    return values[-1]


def _parts(attrs: Mapping[str, Any], *xs: Array) -> Array:
    """The other axes broadcast."""
    dim = attrs["dim"]
    whole = np.broadcast_shapes(*((*x.shape[:dim], *x.shape[dim + 1 :]) for x in xs))
    shapes = [(*whole[:dim], x.shape[dim], *whole[dim:]) for x in xs]
    return _cat([np.broadcast_to(x, shape) for x, shape in zip(xs, shapes, strict=True)], dim)


def _normed(attrs: Mapping[str, Any], x: Array, weight: Any = None, bias: Any = None) -> Array:
    weight, bias = (None if v is None else v.reshape(-1) for v in (weight, bias))
    return _layer_norm(x, attrs["shape"], weight, bias, attrs["eps"])


def _masked_softmax(attrs: Mapping[str, Any], x: Array, *masks: Array) -> Array:
    """Of what the mask is not 0 for; all the same, or all 0, where it is 0 for all."""
    if not masks:
        return _softmax(x, attrs["dim"])
    (mask,) = masks
    y = _softmax(np.where(mask == 0, np.finfo(x.dtype).min, x), attrs["dim"])
    return y if attrs["uniform"] else y * (mask != 0)  # type: ignore[no-any-return]


def _padded(attrs: Mapping[str, Any], x: Array) -> Array:
    """By numbers, or up to sizes."""
    widths = padding_to(attrs["pad"], attrs.get("size", {}).get("size", ()), x.shape)
    if attrs["mode"] == "constant":
        return _pad(x, widths, attrs.get("value") or 0)
    sides = sides_of(widths, x.ndim)
    return np.pad(x, sides, NUMPY_MODES[attrs["mode"]])  # type: ignore[call-overload, no-any-return]


def _sloped(attrs: Mapping[str, Any], x: Array, weight: Array) -> Array:
    """prelu: a slope for each place on axis 1, or one."""
    slope = weight.reshape(-1, *[1] * (x.ndim - 2))
    return np.where(x > 0, x, x * slope)


def _other_size(kind: str) -> Callable[..., Array]:
    """The operation of an image that is made larger or smaller, to a size or by a factor."""

    def run(attrs: Mapping[str, Any], x: Array) -> Array:
        size, factors = attrs["size"].get("size"), attrs["size"].get("scale_factor")
        return resampled(x, size, kind, attrs.get("align_corners", False), factors)

    return run


# of `graph.OPERATIONS`: run(attrs, *inputs, **tensors)
OPERATIONS: dict[str, Callable[..., Any]] = {
    "constant": lambda attrs, value: value,
    "pointwise": lambda attrs, x: _calls(attrs["calls"], x),
    "add": lambda attrs, x, y: _scaled(np.add)(x, y, attrs.get("alpha", 1)),
    "mul": lambda attrs, x, y: _pointwise(np.multiply)(x, y),
    "matmul": lambda attrs, x, y: np.matmul(x, y) * np.float32(attrs.get("factor", 1.0)),
    "linear": lambda attrs, x, weight, bias=None: _linear(x, weight, bias),
    "softmax": _masked_softmax,
    "prelu": _sloped,
    "layer_norm": _normed,
    "rms_norm": lambda attrs, x, weight=None: _rms_norm(
        x, attrs["shape"], None if weight is None else weight.reshape(-1), attrs["eps"]
    ),
    "group_norm": lambda attrs, x, weight=None, bias=None: _group_norm(
        x, attrs["groups"], weight, bias, attrs["eps"]
    ),
    "affine": lambda attrs, x, factor, shift: _shifted(x, factor, shift),
    "upsample_nearest2d": _other_size("nearest"),
    "upsample_bilinear2d": _other_size("bilinear"),
    "pad": _padded,
    "concat": _parts,
    "reshape": lambda attrs, x: x.reshape(reshaped(x.shape, attrs["groups"])),
    "permute": lambda attrs, x: x.transpose(attrs["dims"]),
    "slice": lambda attrs, x: _slice(x, attrs["dim"], attrs["start"], attrs["end"], attrs["step"]),
}


def evaluate(
    stage: Stage, inputs: Sequence[Array], tensors: Mapping[str, Array], shapes: Shapes
) -> Any:
    """The value of a float stage; shapes are those of the network's inputs."""
    attrs = stage.attrs
    with np.errstate(all="ignore"):  # as torch: infinities and NaN are values
        if stage.op == "aten":
            return _call(attrs["target"], attrs["args"], attrs["kwargs"], inputs, tensors, shapes)
        y = OPERATIONS[stage.op](sized(attrs, shapes), *inputs, **tensors)
        return _clamp(y, *attrs["clamp"]) if "clamp" in attrs else y


def check_operator(stage: Stage) -> None:
    """ValueError unless a float stage is of what is here."""
    targets = [stage.attrs["target"]] if stage.op == "aten" else []
    if stage.op == "pointwise":
        targets = [target for target, _, _ in stage.attrs["calls"]]
    known = stage.op == "aten" or stage.op in OPERATIONS
    if missing := [name for name in targets if name not in FUNCTIONS] or [stage.op] * (not known):
        raise ValueError(f"{stage.outputs[0]} takes {missing[0]}, which is torch's ({stage.why})")


def _call(
    target: str,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    inputs: Sequence[Any],
    tensors: Mapping[str, Array],
    shapes: Shapes,
) -> Any:
    fill = partial(filled, inputs=inputs, tensors=tensors, shapes=shapes)
    return FUNCTIONS[target](*map(fill, args), **{k: fill(v) for k, v in kwargs.items()})
