"""quantize, dequantize, requantize and grid."""

from __future__ import annotations

import functools
import struct
import sys
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastq.kernels import elementwise as ew
from fastq.kernels.call import ITEM_BYTES, Call, Calls, address_of
from fastq.kernels.layers import ARGUMENTS, OUT, SCALE, ZERO_POINT, X, grid_call
from fastq.kernels.tiles import BYTES_PER_NANOSECOND
from fastq.ops.checks import (
    FLOAT32,
    FLOATS,
    INT8,
    KIND,
    UINT8,
    as_factors,
    as_float32,
    as_scale,
    as_zero_points,
    output_array,
    pack_float,
    typed_array,
)
from fastq.ops.known import MOST_CHECKED, Known, span_of
from fastq.qparams import (
    FLT_MAX,
    FLT_MIN,
    Requant,
    as_array,
    check_axis,
    check_dense,
    limits,
    quantized_dtype,
)
from fastq.weights import pair

_ELEMENTWISE_BLOCK = 16 * 1024  # values per task
_CACHE_BYTES = 16 << 20  # a larger output would not be found there again: it is streamed
_grid_calls = Calls()
_walks: dict[tuple[Any, ...], _Walk] = {}
_unpack_bits = struct.Struct("i").unpack
_INTEGERS = int, np.integer
_NO_TENSOR = np.ndarray, float, int, type(None)


def quantize(
    x: ArrayLike,
    quantize_factor: float | None = None,
    *,
    scale: ArrayLike | None = None,
    zero_point: ArrayLike = 0,
    axis: int | None = None,
    dtype: DTypeLike | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """float32 -> uint8 / int8 / int16 / int32, rounding half to even, saturating.

    quantize(x, scale=s, zero_point=z)  clip(rint(x / s) + z); dtype uint8 unless given.
    quantize(x, factor)                 the textbook form clip(rint(x * factor)); dtype int8
                                        unless given, no zero point.

    x           any shape, taken as float32: a NumPy array or a torch tensor on the CPU of floats
                (the result is of the same kind), or nested lists of numbers.
    scale       finite, > 0: a scalar, or (n,) along `axis`.
    zero_point  integer in the range of dtype: a scalar, or (n,) along `axis`.
    dtype       NumPy's or torch's.
    out         written and returned if given: shape of x, the dtype, C-contiguous.

    NaN becomes zero_point (real 0); infinities saturate. Raises TypeError and ValueError for
    arguments outside of this. Source: ONNX QuantizeLinear.
    """
    if (quantize_factor is None) == (scale is None):
        raise TypeError(
            "quantize: wanted a quantize_factor (x * factor) or scale= (x / scale + zero_point), "
            f"got {'neither' if scale is None else 'both'}"
        )
    by_scale = quantize_factor is None
    asked = "quantize", by_scale, dtype
    again = _again(asked, x, scale, zero_point, axis, out) if by_scale else None
    if again is not None:
        return again
    if _is_tensor(x):
        if not x.is_floating_point():
            hint = "" if x.is_complex() else ": x.float() is so"
            raise TypeError(f"quantize: x {tuple(x.shape)} {x.dtype}; wanted float32{hint}")
        return _through_numpy(quantize, out, x=x, quantize_factor=quantize_factor, scale=scale,
                              zero_point=zero_point, axis=axis, dtype=dtype)  # fmt: skip
    real = as_float32("quantize: x", x)
    if by_scale:
        operation, steps = "divide", as_scale("quantize: scale", scale)
        kind = UINT8 if dtype is None else quantized_dtype(dtype)
    else:
        operation, steps = "multiply", as_scale("quantize: quantize_factor", quantize_factor)
        kind = INT8 if dtype is None else quantized_dtype(dtype)
        if zero_point if isinstance(zero_point, int) else np.any(zero_point):
            raise ValueError(
                "quantize: a quantize_factor has no zero_point; "
                "scale=1/quantize_factor with zero_point= is the affine form"
            )
    ends = limits(kind)
    zeros = as_zero_points("quantize: zero_point", zero_point, kind, ends)
    return _elementwise(asked, operation, real, kind, steps, zeros, axis, ends, out)


def grid(
    x: NDArray[np.float32],
    factor: ArrayLike,
    shift: ArrayLike,
    *,
    padding: tuple[tuple[int, int], tuple[int, int]] = ((0, 0), (0, 0)),
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """float32 (B, H, W, C) -> uint8: clip(rint(x * factor + shift), 0, 255), a grid per channel.

    x        any strides: an NCHW array seen as NHWC is read as it lies.
    factor   (C,), taken as float32, > 0, up to 2**96: 1 / the channel's step.
    shift    (C,), taken as float32, magnitude up to 2**96: where the channel's 0 lies.
    padding  ((top, bottom), (left, right)): pixels of 0, before they are put on the grid.
    out      written and returned if given: uint8 of the padded shape, C-contiguous.

    A picture's integers, normalized by a mean and a deviation for each channel, come back exactly:
    `quantize` cannot give that, for its zero point is an integer. NaN counts as 0, infinities
    saturate. Raises TypeError and ValueError for other dtypes, shapes or values.
    """
    x = typed_array("grid: x", x, FLOAT32, 4)
    batch, h, w, c = x.shape
    factors, shifts = (
        np.frombuffer(as_factors(f"grid: {name}", values, x), np.float32)
        for name, values in (("factor", factor), ("shift", shift))
    )
    if factors.shape != (c,) or shifts.shape != (c,) or not (factors > 0).all():
        raise ValueError(
            f"grid: factor {np.shape(factor)}, shift {np.shape(shift)} for {c} channels; wanted "
            f"({c},) of both, each factor > 0"
        )
    if not isinstance(padding, tuple | list) or len(padding) != 2:
        raise ValueError(f"grid: padding={padding!r}; wanted ((top, bottom), (left, right))")
    sides = tuple(pair("grid: padding", both, 0) for both in padding)
    result = output_array("grid", out, (batch, h + sum(sides[0]), w + sum(sides[1]), c), UINT8, x)
    if result.size:
        if not x.flags.aligned:
            x = x.copy()
        places = (address_of(v) for v in (x, result, factors, shifts))
        _grid_calls.run(grid_call, (x.shape, x.strides, sides), *places, 0)
    return result


def dequantize(
    q: NDArray[Any],
    scale: ArrayLike,
    zero_point: ArrayLike = 0,
    *,
    axis: int | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """uint8 / int8 / int16 / int32 -> float32: float32(q - zero_point) * scale.

    q may be a NumPy array or a torch tensor on the CPU; scale and zero_point as in `quantize`.
    Raises TypeError and ValueError for other dtypes, shapes or values.
    Source: ONNX DequantizeLinear.
    """
    asked = ("dequantize",)
    again = _again(asked, q, scale, zero_point, axis, out)
    if again is not None:
        return again
    if _is_tensor(q):
        return _through_numpy(dequantize, out, q=q, scale=scale, zero_point=zero_point, axis=axis)
    integers = as_array("dequantize: q", q)
    kind = _integer("dequantize: q", integers)
    steps = as_scale("dequantize: scale", scale)
    ends = limits(kind)
    zeros = as_zero_points("dequantize: zero_point", zero_point, kind, ends)
    return _elementwise(asked, "dequantize", integers, FLOAT32, steps, zeros, axis, ends, out)


def requantize(
    acc: NDArray[np.int32],
    multiplier: ArrayLike,
    zero_point: int = 0,
    *,
    axis: int | None = None,
    dtype: DTypeLike = np.uint8,
    qmin: int | None = None,
    qmax: int | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """int32 -> uint8 / int8 / int16 / int32.

    y = clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax), ties to even.

    acc         int32, any shape; a NumPy array or a torch tensor on the CPU, as in `quantize`.
    multiplier  finite, > 0: a scalar, or (n,) along `axis`: x_scale * weight_scale / y_scale.
    qmin, qmax  the clamp, within the range of dtype, which is the default.

    Raises TypeError and ValueError for arguments outside of this.
    Source: ONNX QLinearMatMul and QLinearConv.
    """
    asked = "requantize", dtype, qmin, qmax, type(qmin), type(qmax)
    again = _again(asked, acc, multiplier, zero_point, axis, out)
    if again is not None:
        return again
    if isinstance(multiplier, Requant):
        raise TypeError(
            "requantize: multiplier is a Requant, which fastq.linear and fastq.conv2d take; wanted "
            "its parts: requantize(acc, r.multiplier, r.zero_point, qmin=r.qmin, qmax=r.qmax)"
        )
    if _is_tensor(acc):
        return _through_numpy(requantize, out, acc=acc, multiplier=multiplier,
                              zero_point=zero_point, axis=axis, dtype=dtype, qmin=qmin,
                              qmax=qmax)  # fmt: skip
    integers = as_array("requantize: acc", acc)
    if integers.dtype != np.int32:
        raise TypeError(f"requantize: acc {integers.shape} {integers.dtype}; wanted int32")
    kind = quantized_dtype(dtype)
    least, most = limits(kind)
    low = least if qmin is None else qmin
    high = most if qmax is None else qmax
    if not (isinstance(low, _INTEGERS) and isinstance(high, _INTEGERS)):
        raise TypeError(f"requantize: qmin={qmin!r}, qmax={qmax!r}; wanted integers")
    if not least <= low <= high <= most:
        raise ValueError(
            f"requantize: qmin={qmin}, qmax={qmax}; wanted {least} <= qmin <= qmax "
            f"<= {most} for {kind}"
        )
    steps = as_scale("requantize: multiplier", multiplier)
    zeros = as_zero_points("requantize: zero_point", zero_point, kind, (least, most))
    ends = int(low), int(high)
    return _elementwise(asked, "multiply", integers, kind, steps, zeros, axis, ends, out)


class _Walk(NamedTuple):
    """How arrays of one dtype, shape and strides are walked.

    known   what runs it.
    ends    qmin and qmax of the result; of `dequantize` the least and the most integer.
    params  how many scales and zero points there are along the axis.
    dense   whether as they lie; else a copy of them.
    """

    known: Known
    ends: tuple[int, int]
    params: int
    dense: bool

    def run(
        self, name: str, x: NDArray[Any], step: int, zero: int, out: NDArray[Any] | None
    ) -> NDArray[Any]:
        """step and zero are a float32's bits and an integer, or the addresses of arrays."""
        source = at = address_of(x)
        if not self.dense or at % x.itemsize:
            copy = np.require(x, requirements=["C", "A"])
            source = address_of(copy)
        return self.known.run(name, x, at, out, source, step, zero)


def _again(
    asked: tuple[Any, ...], x: Any, scale: Any, zero_point: Any, axis: Any, out: Any
) -> NDArray[Any] | None:
    """The result of a call with one scale and zero point, if an array like x was walked before.

    asked is the function's name, and what else of its arguments counts. Of short arrays the checks
    and conversions, which would come to the same again, are most of the time.
    """
    one = isinstance(scale, FLOATS) and type(zero_point) is int and axis is None
    if not one or type(x) is not np.ndarray or not FLT_MIN <= (step := float(scale)) <= FLT_MAX:
        return None
    try:
        walk = _walks[asked, axis, x.dtype, x.shape, x.strides]
    except (KeyError, TypeError):  # a new one, or what is asked for is no dtype
        return None
    least, most = walk.ends
    if not least <= zero_point <= most:
        return None
    return walk.run(asked[0], x, _float_bits(step), zero_point, out)


def _elementwise(
    asked: tuple[Any, ...],
    operation: str,
    x: NDArray[Any],
    dtype: np.dtype[Any],
    scale: float | NDArray[np.float32],
    zero_point: int | NDArray[np.int32],
    axis: int | None,
    ends: tuple[int, int],
    out: NDArray[Any] | None,
) -> NDArray[Any]:
    """asked as of `_again`, dtype and ends as of a `_Walk`. Arrays of scales and zero points are
    copies: `out` may lie over what the caller gave."""
    name = asked[0]
    if axis is not None:
        check_axis(name, axis, x.shape)
    key: tuple[Any, ...] = asked, axis, x.dtype, x.shape, x.strides
    try:
        walk = _walks.get(key)
    except TypeError:  # what was given for a dtype cannot be hashed: not remembered
        key, walk = (), None
    if walk is None:
        walk = _walk(operation, x, dtype, axis, ends)
        if len(_walks) >= MOST_CHECKED:
            _walks.clear()
        if key:
            _walks[key] = walk
    if axis is None:
        if not (isinstance(scale, float) and isinstance(zero_point, int)):
            raise ValueError(
                f"{name}: scale {np.shape(scale)}, zero_point {np.shape(zero_point)} without "
                "axis=; wanted scalars, or the axis that they run along"
            )
        return walk.run(name, x, _float_bits(scale), zero_point, out)
    params = walk.params
    if any(np.shape(p) not in ((), (params,)) for p in (scale, zero_point)):
        raise ValueError(
            f"{name}: scale {np.shape(scale)}, zero_point {np.shape(zero_point)} along axis "
            f"{axis} of {x.shape}; wanted ({params},) or scalars"
        )
    scales, zeros = np.full(params, scale, np.float32), np.full(params, zero_point, np.int32)
    return walk.run(name, x, address_of(scales), address_of(zeros), out)


def _walk(
    operation: str,
    x: NDArray[Any],
    dtype: np.dtype[Any],
    axis: int | None,
    ends: tuple[int, int],
) -> _Walk:
    layout, rows, columns, params = "tensor", 1, x.size, 1
    if axis is not None:
        axis %= x.ndim
        params = x.shape[axis]
        columns = int(np.prod(x.shape[axis + 1 :]))
        layout = "row"
        if columns == 1:
            layout, columns = "column", params
        rows = x.size // max(columns, 1)
    make = partial(
        _elementwise_call, operation, KIND[x.dtype], KIND[dtype], layout, rows, columns, params,
        *ends,
    )  # fmt: skip
    known = Known(x.shape, dtype, x.size * dtype.itemsize, span_of(x), [], make)
    return _Walk(known, ends, params, x.flags.c_contiguous)


@functools.lru_cache
def _float_bits(value: float) -> int:
    """The bits of a float32."""
    return _unpack_bits(pack_float(value))[0]  # type: ignore[no-any-return]


def _elementwise_call(
    operation: str,
    source: str,
    target: str,
    layout: str,
    rows: int,
    columns: int,
    params: int,
    qmin: int,
    qmax: int,
) -> Call:
    call = Call(ARGUMENTS)
    out_bytes = rows * columns * ITEM_BYTES[target]
    call.row(
        ew.elementwise_kernel(
            operation, source, target, "streamed" if out_bytes > _CACHE_BYTES else "cached", layout
        ),
        ew.A_FIELDS,
        rows * -(-columns // _ELEMENTWISE_BLOCK),
        {
            ew.A_COLUMNS: columns,
            ew.A_BLOCK: _ELEMENTWISE_BLOCK,
            ew.A_PARAMS: params,
            ew.A_QMIN: qmin,
            ew.A_QMAX: qmax,
        },
        {ew.A_X: X, ew.A_OUT: OUT, ew.A_SCALE: SCALE, ew.A_ZERO_POINT: ZERO_POINT},
        rows * columns * 4 / BYTES_PER_NANOSECOND,
    )
    return call


def _is_tensor(x: Any) -> TypeGuard[Any]:
    if isinstance(x, _NO_TENSOR):  # the most usual, and soon told
        return False
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _through_numpy(function: Any, out: Any, **given: Any) -> Any:
    """Calls function on a torch tensor's memory, the first that is given; scale and zero_point may
    be tensors as well."""
    torch, name = sys.modules["torch"], function.__name__
    first, x = next(iter(given.items()))
    if x.requires_grad:
        raise ValueError(f"{name}: {first} requires grad; {first}.detach() has no gradient")

    for what, value in given.items():
        if _is_tensor(value):
            check_dense(f"{name}: {what}", value)
            if value.dtype is torch.bfloat16:  # NumPy has none
                value = value.float()
            given[what] = value.numpy(force=True)
    written = out
    if _is_tensor(out):
        check_dense(f"{name}: out", out)
        written = out.numpy()  # not forced: a copy of out would be written, and lost
    result = function(**given, out=written)
    return out if out is not None else torch.from_numpy(result)


def _integer(what: str, x: NDArray[Any]) -> np.dtype[Any]:
    if x.dtype not in KIND or x.dtype == np.float32:
        raise TypeError(f"{what} {x.shape} {x.dtype}; wanted uint8, int8, int16 or int32")
    return x.dtype
