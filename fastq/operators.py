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
KINDS = "b", "iu", "f", "c"  # of dtypes, the widest last
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
    return next(i for i, kinds in enumerate(KINDS) if dtype.kind in kinds)


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


# --------------------------------------------------------------------------------- values and axes


def _to(x: Any, *args: Any, dtype: Any = None, **kwargs: Any) -> Array:
    for value in args:
        dtype = value if isinstance(value, np.dtype) else dtype
    return x if dtype is None else x.astype(dtype)  # type: ignore[no-any-return]


def _arange(*numbers: Any, dtype: Any = None, **kwargs: Any) -> Array:
    whole = all(isinstance(n, int) for n in numbers)
    return np.arange(*numbers, dtype=dtype or (INTEGER if whole else REAL))


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


def _rows(x: Array, index: Array, dim: int = 0) -> Array:
    """What is at these places of an axis; IndexError for one that is not there."""
    if index.dtype.kind not in "iu":
        raise TypeError(f"places are {index.dtype}; wanted integers")
    if index.size and not 0 <= index.min() <= index.max() < x.shape[dim]:
        raise IndexError(
            f"places from {index.min()} to {index.max()} of an axis of {x.shape[dim]}: out of range"
        )
    return x.take(index, dim)


def _index(x: Array, indices: Sequence[Any]) -> Array:
    """x[indices], where None is the whole axis."""
    places = [slice(None) if i is None else i for i in indices]
    for axis, i in enumerate(places):
        if isinstance(i, np.ndarray) and i.dtype.kind in "iu" and i.size:
            size = x.shape[axis]
            if not -size <= i.min() <= i.max() < size:
                raise IndexError(
                    f"places from {i.min()} to {i.max()} of an axis of {size}: out of range"
                )
    return x[tuple(places)]  # type: ignore[no-any-return]


def _gather(x: Array, dim: int, index: Array, **kwargs: Any) -> Array:
    if index.size and not 0 <= index.min() <= index.max() < x.shape[dim]:
        raise IndexError(
            f"places from {index.min()} to {index.max()} of an axis of {x.shape[dim]}: out of range"
        )
    seen = [slice(n) for n in index.shape]
    seen[dim] = slice(None)
    return np.take_along_axis(x[tuple(seen)], index, dim)


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


def _cumsum(x: Array, dim: int, dtype: Any = None) -> Array:
    return x.cumsum(dim, dtype or (INTEGER if x.dtype.kind in "biu" else x.dtype))


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


def _norm(x: Array, ord: float = 2, dim: Any = None, keepdim: bool = False, **rest: Any) -> Array:
    if not 0 < ord < np.inf:
        raise ValueError(f"linalg_vector_norm with ord={ord}; fastq.load runs it with torch")
    y = np.abs(x) ** ord
    return np.asarray(y.sum(_along(dim), keepdims=keepdim) ** (1 / ord)).astype(x.dtype)


def _embedding(weight: Array, tokens: Array, *rest: Any) -> Array:
    return _rows(weight, tokens)


def _int8_rows(tokens: Array, weight: Array, scale: Array) -> Array:
    return _rows(weight, tokens).astype(REAL) * _rows(scale, tokens)[..., None]


# by torch's names; several overloads of one operator share a line
_TABLE: dict[str, Callable[..., Any]] = {
    "add.Tensor add.Scalar": _scaled(np.add),
    "sub.Tensor sub.Scalar": _scaled(np.subtract),
    "rsub.Scalar": lambda x, y, alpha=1: _scaled(np.subtract)(y, x, alpha),
    "mul.Tensor mul.Scalar": _pointwise(np.multiply),
    "div.Tensor div.Scalar": _pointwise(np.divide, real=True),
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
    "bitwise_not.default": np.invert,
    "neg.default": np.negative,
    "abs.default": np.abs,
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
    "clamp.default": _clamp,
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
    "full.default": _full,
    "zeros.default": _filled(0),
    "ones.default": _filled(1),
    "scalar_tensor.default": lambda value, **kwargs: _full((), value, **kwargs),
    "full_like.default": _alike,
    "zeros_like.default": lambda x, **kwargs: _alike(x, 0, **kwargs),
    "ones_like.default": lambda x, **kwargs: _alike(x, 1, **kwargs),
    "new_zeros.default": lambda x, size, dtype=None, **rest: np.zeros(size, dtype or x.dtype),
    "new_ones.default": lambda x, size, dtype=None, **rest: np.ones(size, dtype or x.dtype),
    "unsqueeze.default": lambda x, dim: np.expand_dims(x, dim),
    "squeeze.default squeeze.dim squeeze.dims": _squeeze,
    "expand.default": _expand,
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
    "index.Tensor": _index,
    "index_select.default": lambda x, dim, index: _rows(x, index, dim),
    "gather.default": _gather,
    "cat.default": _cat,
    "stack.default": _stack,
    "tril.default": _triangle(np.tril),
    "triu.default": _triangle(np.triu),
    "constant_pad_nd.default": _pad,
    "sum.default sum.dim_IntList": _sum,
    "mean.default mean.dim": _mean,
    "amax.default": _extreme(np.max),
    "amin.default": _extreme(np.min),
    "any.default any.dim any.dims": _extreme(np.any),
    "all.default all.dim all.dims": _extreme(np.all),
    "argmax.default": _largest(np.argmax),
    "argmin.default": _largest(np.argmin),
    "max.dim": _max,
    "cumsum.default": _cumsum,
    "diff.default": _diff,
    "softmax.int": _softmax,
    "log_softmax.int": _log_softmax,
    "linalg_vector_norm.default": _norm,
    "layer_norm.default": _layer_norm,
    "linear.default": _linear,
    "matmul.default bmm.default": np.matmul,
    "embedding.default": _embedding,
}  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": lambda values, index: values[index],
    "fastq.embedding.default": _int8_rows,
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
