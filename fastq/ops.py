"""The integer operations on NumPy arrays: the functions of `reference`, checked and fast.

Arguments are checked here, once; the kernels trust them. Results have the same bits on every
instruction set and for every number of threads. No function needs torch.
"""

from __future__ import annotations

import functools
import struct
import sys
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from fastq.arguments import EPSILON, OVERRIDE, RESIZED, Check, check_cell
from fastq.kernels import elementwise as ew
from fastq.kernels import histogram as hg
from fastq.kernels import isa, norms, pointwise, windows
from fastq.kernels import matmul as products
from fastq.kernels.call import ITEM_BYTES, SLACK, At, Call, Calls, Place, View, address_of
from fastq.kernels.executor import get_num_threads, set_num_threads
from fastq.kernels.group_norm import group_norm_row
from fastq.kernels.layers import (
    ARGUMENTS,
    OUT,
    SCALE,
    ZERO_POINT,
    BoundConv2d,
    BoundLinear,
    Source,
    X,
    grid_call,
    range_call,
)
from fastq.kernels.layout import copy_row
from fastq.kernels.products import ACTIVATIONS, ALIGNED, PackedLinear
from fastq.kernels.recurrent import BoundRecurrent, recurrent_row
from fastq.kernels.simd import emitter
from fastq.kernels.tiles import BYTES_PER_NANOSECOND
from fastq.kernels.workers import team
from fastq.qparams import (
    FLT_MAX,
    FLT_MIN,
    GATES,
    HISTOGRAM_KEYS,
    MAX_FACTOR,
    MAX_FEATURES,
    MAX_K,
    MAX_WIDE_FEATURES,
    Dequant,
    Epilogue,
    QParams,
    Requant,
    check_scale,
    check_zero_point,
    clamp_of,
    limits,
    quantized_dtype,
    value_dtype,
)
from fastq.weights import Conv2dWeight, LinearWeight, pair

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "add",
    "affine",
    "avg_pool2d",
    "conv2d",
    "conv2d_float",
    "dequantize",
    "dynamic_qparams",
    "get_num_threads",
    "grid",
    "group_norm",
    "histogram",
    "layer_norm",
    "linear",
    "linear_float",
    "matmul",
    "max_pool2d",
    "mul",
    "quantize",
    "recurrent",
    "recurrent_float",
    "requantize",
    "rms_norm",
    "set_num_threads",
    "softmax",
    "softmax_weights",
    "table",
    "upsample_bilinear2d",
    "upsample_nearest2d",
]

_UINT8, _INT8, _INT16, _INT32, _FLOAT32 = map(
    np.dtype, ("uint8", "int8", "int16", "int32", "float32")
)
_KIND = {
    _FLOAT32: "f32",
    _UINT8: "u8",
    _INT8: "s8",
    _INT16: "s16",
    _INT32: "s32",
}
_BOUND_LAYERS = 8  # that a weight keeps: pairs of epilogue and input parameters


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

    x           real numbers of any shape, taken as float32; a NumPy array or a torch tensor on
                the CPU (the result is of the same kind), or nested lists.
    scale       finite, > 0: a scalar, or (n,) along `axis`.
    zero_point  integer in the range of dtype: a scalar, or (n,) along `axis`.
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
        return _through_numpy(quantize, x, quantize_factor, out, scale=scale,
                              zero_point=zero_point, axis=axis, dtype=dtype)  # fmt: skip
    real = _real("quantize: x", x)
    if by_scale:
        operation, steps = "divide", _scale("quantize: scale", scale)
        kind = _UINT8 if dtype is None else quantized_dtype(dtype)
    else:
        operation, steps = "multiply", _scale("quantize: quantize_factor", quantize_factor)
        kind = _INT8 if dtype is None else quantized_dtype(dtype)
        if zero_point if isinstance(zero_point, int) else np.any(zero_point):
            raise ValueError(
                "quantize: a quantize_factor has no zero_point; "
                "scale=1/quantize_factor with zero_point= is the affine form"
            )
    ends = limits(kind)
    zeros = _zeros("quantize: zero_point", zero_point, kind, ends)
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
    x = _array("grid: x", x, _FLOAT32, 4)
    batch, h, w, c = x.shape
    factors, shifts = (
        np.frombuffer(_factors(f"grid: {name}", values, x), np.float32)
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
    result = _output("grid", out, (batch, h + sum(sides[0]), w + sum(sides[1]), c), _UINT8, x)
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
        return _through_numpy(dequantize, q, scale, out, zero_point=zero_point, axis=axis)
    integers = np.asarray(q)
    kind = _integer("dequantize: q", integers)
    steps = _scale("dequantize: scale", scale)
    ends = limits(kind)
    zeros = _zeros("dequantize: zero_point", zero_point, kind, ends)
    return _elementwise(asked, "dequantize", integers, _FLOAT32, steps, zeros, axis, ends, out)


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

    acc         int32, any shape.
    multiplier  finite, > 0: a scalar, or (n,) along `axis`: x_scale * weight_scale / y_scale.
    qmin, qmax  the clamp, within the range of dtype, which is the default.

    Raises TypeError and ValueError for arguments outside of this.
    Source: ONNX QLinearMatMul and QLinearConv.
    """
    asked = "requantize", dtype, qmin, qmax, type(qmin), type(qmax)
    again = _again(asked, acc, multiplier, zero_point, axis, out)
    if again is not None:
        return again
    integers = np.asarray(acc)
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
    steps = _scale("requantize: multiplier", multiplier)
    zeros = _zeros("requantize: zero_point", zero_point, kind, (least, most))
    ends = int(low), int(high)
    return _elementwise(asked, "multiply", integers, kind, steps, zeros, axis, ends, out)


_ELEMENTWISE_BLOCK = 16 * 1024  # values per task
_CACHE_BYTES = 16 << 20  # a larger output would not be found there again: it is streamed
_range_calls = Calls()
_grid_calls = Calls()
_histogram_calls = Calls()
_MOST_CHECKED = 64  # kinds of calls that are remembered, of a weight and of whole arrays


class _Known(NamedTuple):
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
        else:  # as `_output`, in a third of the time where x is plainly apart from it
            fits = type(out) is np.ndarray and out.shape == shape and out.dtype is dtype
            fits = fits and out.flags.carray
            to = address_of(out) if fits else at
            if not fits or (to + size > at + first and to <= at + last):
                to = address_of(_output(name, out, shape, dtype, x))
        try:
            call = idle.pop()
        except IndexError:
            call = make()
        call.run(source, to, step, zero, 0)
        idle.append(call)
        return out  # type: ignore[no-any-return]


class _Walk(NamedTuple):
    """How arrays of one dtype, shape and strides are walked.

    known   what runs it.
    ends    qmin and qmax of the result; of `dequantize` the least and the most integer.
    params  how many scales and zero points there are along the axis.
    dense   whether as they lie; else a copy of them.
    """

    known: _Known
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


_walks: dict[tuple[Any, ...], _Walk] = {}


def _again(
    asked: tuple[Any, ...], x: Any, scale: Any, zero_point: Any, axis: Any, out: Any
) -> NDArray[Any] | None:
    """The result of a call with one scale and zero point, if an array like x was walked before.

    asked is the function's name, and what else of its arguments counts. Of short arrays the checks
    and conversions, which would come to the same again, are most of the time.
    """
    one = isinstance(scale, _FLOATS) and type(zero_point) is int and axis is None
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
    if axis is not None and not isinstance(axis, _INTEGERS):
        raise TypeError(f"{name}: axis={axis!r}; wanted an int")
    key: tuple[Any, ...] = asked, axis, x.dtype, x.shape, x.strides
    try:
        walk = _walks.get(key)
    except TypeError:  # what was given for a dtype cannot be hashed: not remembered
        key, walk = (), None
    if walk is None:
        walk = _walk(name, operation, x, dtype, axis, ends)
        if len(_walks) >= _MOST_CHECKED:
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
    name: str,
    operation: str,
    x: NDArray[Any],
    dtype: np.dtype[Any],
    axis: int | None,
    ends: tuple[int, int],
) -> _Walk:
    layout, rows, columns, params = "tensor", 1, x.size, 1
    if axis is not None:
        if not -x.ndim <= axis < x.ndim:
            raise ValueError(f"{name}: axis={axis} for an array of shape {x.shape}")
        axis %= x.ndim
        params = x.shape[axis]
        columns = int(np.prod(x.shape[axis + 1 :]))
        layout = "row"
        if columns == 1:
            layout, columns = "column", params
        rows = x.size // max(columns, 1)
    make = partial(
        _elementwise_call, operation, _KIND[x.dtype], _KIND[dtype], layout, rows, columns, params,
        *ends,
    )  # fmt: skip
    known = _Known(x.shape, dtype, x.size * dtype.itemsize, _span(x), [], make)
    return _Walk(known, ends, params, x.flags.c_contiguous)


_pack_float, _unpack_float = struct.Struct("f").pack, struct.Struct("f").unpack
_unpack_bits = struct.Struct("i").unpack


@functools.lru_cache
def _float_bits(value: float) -> int:
    """The bits of a float32."""
    return _unpack_bits(_pack_float(value))[0]  # type: ignore[no-any-return]


_FLOATS, _INTEGERS = (float, np.float32), (int, np.integer)


def _scale(name: str, scale: ArrayLike | None) -> float | NDArray[np.float32]:
    """What `check_scale` lets pass: one number, to be rounded to float32, or an array."""
    if isinstance(scale, _FLOATS) and FLT_MIN <= (number := float(scale)) <= FLT_MAX:
        return number
    array = check_scale(name, scale)  # type: ignore[arg-type]
    return array if array.ndim else float(array)


def _zeros(
    name: str, zero_point: ArrayLike, dtype: np.dtype[Any], ends: tuple[int, int]
) -> int | NDArray[np.int32]:
    """What `check_zero_point` lets pass: one integer or an array. ends are the dtype's."""
    least, most = ends
    if type(zero_point) in (int, np.int32) and least <= (integer := int(zero_point)) <= most:  # type: ignore[arg-type]
        return integer
    array = check_zero_point(name, zero_point, dtype)
    return array if array.ndim else int(array)


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


def dynamic_qparams(x: NDArray[np.float32], *, per_row: bool = True) -> tuple[Any, Any]:
    """The uint8 (scale, zero_point) of x's own range, one per row of x (M, ...) or one for all.

    float32 scale and int32 zero_point, each (M,), or scalars with per_row=False. The range is
    widened to include 0; NaN and infinities do not count; a range of zero width has scale 1.
    Source: ONNX DynamicQuantizeLinear.
    """
    real = _real("dynamic_qparams: x", x)
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
    real = _real("histogram: x", x)
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
            raise ValueError(f"histogram: {name} must be C-contiguous, writeable and aligned")
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
        hg.histogram_kernel(packs),
        hg.H_FIELDS,
        lanes,
        {hg.H_SIZE: size, hg.H_LANES: lanes},
        places,
        size * 1.0,  # measured: about a nanosecond a value
    )
    return call


def _repeat(
    name: str, kind: type, x: Any, weight: Any, epilogue: Any, zero_point: Any, add: Any, out: Any
) -> tuple[NDArray[Any] | None, Any]:
    """The result of a call that was checked before, or None; and a key of all that its checks
    looked at, or None where there is no such key. For small products it is most of the time."""
    plain = type(x) is np.ndarray and type(weight) is kind and type(zero_point) is int
    if not plain or add is not None or not (x.dtype is _UINT8 or x.dtype == _UINT8):
        return None, None
    at = address_of(x)
    key = (x.shape, x.strides, id(epilogue), zero_point, at % ALIGNED == 0, isa.in_use,
           team.threads)  # fmt: skip
    known = weight.checked.get(key)
    if known is None:
        return None, key
    return known.run(name, x, at, out, at), key


def _remember(
    weight: Any, key: Any, layer: Any, call: tuple[Any, ...], x: NDArray[Any], out: NDArray[Any]
) -> None:
    if len(weight.checked) >= _MOST_CHECKED:
        weight.checked.clear()
    weight.checked[key] = _Known(
        out.shape, out.dtype, out.nbytes, _span(x), layer.calls.idle(call),
        partial(layer.call, *call),
    )  # fmt: skip


def _span(x: NDArray[Any]) -> tuple[int, int]:
    """Where the first and the last byte of an array are, from its address."""
    reach = [(n - 1) * step for n, step in zip(x.shape, x.strides, strict=True)]
    return sum(min(r, 0) for r in reach), sum(max(r, 0) for r in reach) + x.itemsize - 1


def linear(
    x: NDArray[np.uint8],
    weight: LinearWeight,
    epilogue: Epilogue = None,
    *,
    x_zero_point: ArrayLike = 0,
    add: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """acc[m, n] = sum_k (x[m, k] - x_zero_point[m]) * weight[n, k], exact, then the epilogue.

    x             uint8 (M, K), any strides.
    weight        LinearWeight (N, K); its panels are packed at the first call.
    epilogue      None: int32. Requant: its dtype. Dequant: float32. Re-use the object between
                  calls.
    x_zero_point  0 to 255: a scalar, or (M,) where the epilogue is not a Requant.
    add           uint8 or int16 (M, N), summed in by a Requant that has an add_multiplier.
    out           written and returned if given: (M, N) of the epilogue's dtype, C-contiguous.

    Raises TypeError and ValueError for other dtypes, shapes or values.
    Source: ONNX MatMulInteger and QLinearMatMul.
    """
    given = x, weight, epilogue, x_zero_point, add, out
    repeated, key = _repeat("linear", LinearWeight, *given)
    if repeated is not None:
        return repeated
    x = _array("linear: x", x, _UINT8, 2)
    _check_weight("linear", weight, LinearWeight, epilogue)
    m, k = x.shape
    if k != weight.k:
        raise ValueError(
            f"linear: x has {k} features, weight wants {weight.k}; "
            f"x {x.shape} u8, weight {weight.data.shape} s8"
        )
    zeros: Any = _zero_point("linear", x_zero_point)
    if not isinstance(zeros, int):
        if zeros.shape != (m,):
            raise ValueError(f"linear: x_zero_point {zeros.shape} for {m} rows; wanted ({m},)")
        if isinstance(epilogue, Requant):
            raise ValueError("linear: x_zero_point per row with a Requant; wanted one integer")
    if isinstance(epilogue, Dequant) and epilogue.x_scale.shape not in ((), (m,)):
        given = epilogue.x_scale.shape
        raise ValueError(f"linear: Dequant.x_scale {given} for {m} rows; wanted ({m},)")
    result = _output("linear", out, (m, weight.n), _out_dtype(epilogue), x)
    added, at = _added("linear", epilogue, add, result)
    if result.size == 0:
        return result
    layer = _bound(BoundLinear, weight, epilogue, "u8", None, zeros)
    lines = x.strides[1] == 1
    x = x if lines else np.ascontiguousarray(x)
    layer(m, x.strides[0], address_of(x), address_of(result), zeros, *at)
    if key is not None and lines:
        call = layer.key(m, x.strides[0], address_of(x), zeros)
        _remember(weight, key, layer, call, x, result)
    del added  # held until here
    return result


def conv2d(
    x: NDArray[np.uint8],
    weight: Conv2dWeight,
    epilogue: Epilogue = None,
    *,
    x_zero_point: int = 0,
    add: NDArray[Any] | None = None,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """2-D cross-correlation of x (B, H, W, C) uint8, exact in int32, then the epilogue.

    acc[b, i, j, n] = sum over (kh, kw, c) of w[n, c, kh, kw]
                      * (x[b, i*sh + kh*dh - top, j*sw + kw*dw - left, c] - x_zero_point)

    x             uint8 NHWC, any strides.
    weight        Conv2dWeight (N, C/groups, KH, KW) with its stride, padding, dilation, groups.
    epilogue      None: int32. Requant: its dtype. Dequant (one x_scale): float32.
    x_zero_point  0 to 255; padding has this value, which stands for real 0.
    add           uint8 or int16 of the output's shape, summed in by a Requant that has an
                  add_multiplier.
    out           written and returned if given: (B, OH, OW, N), C-contiguous.

    Raises TypeError and ValueError for other dtypes, shapes or values.
    Source: ONNX ConvInteger and QLinearConv.
    """
    given = x, weight, epilogue, x_zero_point, add, out
    repeated, key = _repeat("conv2d", Conv2dWeight, *given)
    if repeated is not None:
        return repeated
    x = _array("conv2d: x", x, _UINT8, 4)
    _check_weight("conv2d", weight, Conv2dWeight, epilogue)
    zero_point: Any = _zero_point("conv2d", x_zero_point)
    if not isinstance(zero_point, int):
        raise ValueError(f"conv2d: x_zero_point {zero_point.shape}; wanted one integer")
    if isinstance(epilogue, Dequant) and epilogue.x_scale.ndim:
        raise ValueError(f"conv2d: Dequant.x_scale {epilogue.x_scale.shape}; wanted a scalar")
    result = _conv_output("conv2d", x, weight, _out_dtype(epilogue), out)
    added, at = _added("conv2d", epilogue, add, result)
    if result.size:
        layer = _bound(BoundConv2d, weight, epilogue, "u8", None, zero_point)
        layer(x, result, zero_point, *at)
        if key is not None:
            _remember(weight, key, layer, layer.key(x, zero_point), x, result)
    del added  # held until here
    return result


def linear_float(
    x: NDArray[np.float32],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    x_qparams: QParams | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32 (M, K) -> float32 (M, N): quantize x, multiply in integers, dequantize.

    x_qparams  uint8, per tensor; None quantizes dynamically, each row of x by its own range.
    epilogue   a Dequant, whose x_scale is replaced by the scale of x.

    NaN in x counts as 0, infinities saturate. Re-use weight, epilogue and x_qparams between
    calls: what is derived from them is kept with the weight. Errors as in `linear`.
    """
    x = _array("linear_float: x", x, _FLOAT32, 2)
    m, k = x.shape
    _check_float("linear_float", weight, LinearWeight, epilogue, x_qparams)
    if k != weight.k:
        raise ValueError(
            f"linear_float: x has {k} features, weight wants {weight.k}; "
            f"x {x.shape} f32, weight {weight.data.shape} s8"
        )
    result = _output("linear_float", out, (m, weight.n), _FLOAT32, x)
    if result.size == 0:
        return result
    if x.strides[1] != 4 or not x.flags.aligned:
        x = np.array(x, order="C")
    source: Source = "dynamic" if x_qparams is None else "static"
    layer = _bound(BoundLinear, weight, epilogue, source, x_qparams, 0)
    layer(m, x.strides[0], address_of(x), address_of(result))
    return result


class Operands:
    """What `linear_float` or `conv2d_float` is called with again and again, checked by the caller.

    For modules, where the address of a tensor is had for less than a NumPy view of it.
    """

    def __init__(self, weight: Any, epilogue: Dequant, x_qparams: QParams | None) -> None:
        self.weight, self.epilogue, self.x_qparams = weight, epilogue, x_qparams
        self._source: Source = "dynamic" if x_qparams is None else "static"
        self._calls = Calls()

    def linear(self, m: int, row_stride: int, x: int, out: int) -> None:
        """`linear_float` on memory: x and out are addresses.

        x is float32 (m, K) with row_stride bytes between rows, out float32 (m, N), m and N > 0.
        """
        key = m, row_stride, isa.current(), get_num_threads()
        self._calls.run(self._linear_call, key, x, out, 0, 0, 0)

    def _linear_call(self, m: int, row_stride: int, tier: str, threads: int) -> Call:
        # floats are staged, aligned or not
        return self._bound(BoundLinear).call(m, row_stride, True, 0, threads)  # type: ignore[no-any-return]

    def conv2d(
        self, shape: tuple[int, ...], strides: tuple[int, ...], planes: bool, x: int, out: int
    ) -> None:
        """`conv2d_float` on memory: x and out are addresses.

        x is float32 (B, C, H, W), dense in some order of its axes, strides in elements; out
        float32 (B, OH, OW, N), or (B, N, OH, OW) with `planes`, contiguous and not empty.
        """
        key = shape, strides, planes, isa.current(), get_num_threads()
        self._calls.run(self._conv2d_call, key, x, out, 0, 0, 0)

    def _conv2d_call(
        self, shape: tuple[int, ...], strides: tuple[int, ...], planes: bool, tier: str,
        threads: int,
    ) -> Call:  # fmt: skip
        (b, c, h, w), (sb, sc, sh, sw) = shape, (4 * stride for stride in strides)
        layer = self._bound(BoundConv2d)
        return layer.call(  # type: ignore[no-any-return]
            (b, h, w, c), (sb, sh, sw, sc), True, 0, threads, planes=planes
        )

    def _bound(self, kind: Any) -> Any:
        return _bound(kind, self.weight, self.epilogue, self._source, self.x_qparams, 0)


def conv2d_float(
    x: NDArray[np.float32],
    weight: Conv2dWeight,
    epilogue: Dequant,
    *,
    x_qparams: QParams | None = None,
    out: NDArray[np.float32] | None = None,
) -> NDArray[np.float32]:
    """float32 (B, H, W, C) -> float32 (B, OH, OW, N): quantize x, convolve in integers, dequantize.

    x may have any strides: an NCHW array seen as NHWC is read as it lies. x_qparams None
    quantizes dynamically, all of x by its range. Otherwise as `linear_float` and `conv2d`.
    """
    x = _array("conv2d_float: x", x, _FLOAT32, 4)
    _check_float("conv2d_float", weight, Conv2dWeight, epilogue, x_qparams)
    result = _conv_output("conv2d_float", x, weight, _FLOAT32, out)
    if result.size == 0:
        return result
    # a range is searched in memory order: x must fill its memory, in any order of the axes
    if not x.flags.aligned or (x_qparams is None and not _fills_its_memory(x)):
        x = np.array(x, order="C")
    source: Source = "dynamic" if x_qparams is None else "static"
    _bound(BoundConv2d, weight, epilogue, source, x_qparams, 0)(x, result)
    return result


_calls: dict[str, Calls] = defaultdict(Calls)


def add(
    a: NDArray[Any],
    b: NDArray[Any],
    a_multiplier: float,
    b_multiplier: float,
    *,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int | None = None,
    qmax: int | None = None,
    dtype: DTypeLike = np.uint8,
    out: NDArray[Any] | None = None,
) -> NDArray[Any]:
    """y = clip(rint((a - za) * a_multiplier + (b - zb) * b_multiplier) + zero_point, qmin, qmax).

    a, b          uint8 or int16, of shapes that broadcast as NumPy's.
    multipliers   a_scale / y_scale and b_scale / y_scale, each product rounded to float32; a
                  negative one subtracts. Finite, magnitude up to 2**96.
    zero points   0 to 255; of an int16 result 0.
    qmin, qmax    the clamp, within the range of dtype, which is the default.
    dtype         uint8, or int16, which is symmetric.
    out           written and returned if given: dtype of the broadcast shape, C-contiguous.

    Raises TypeError and ValueError for other dtypes, shapes or values.
    """
    left, right = _values("add: a", a), _values("add: b", b)
    kind = value_dtype("add", dtype)
    multipliers = (
        _factor("add: a_multiplier", a_multiplier),
        _factor("add: b_multiplier", b_multiplier),
    )
    zeros = _byte("add: a_zero_point", a_zero_point), _byte("add: b_zero_point", b_zero_point)
    clamp = _clamp("add", zero_point, qmin, qmax, kind)
    result = _broadcast_output("add", left, right, out, kind)
    return _run(pointwise.add_row, [left, right, result], multipliers, zeros, *clamp)


def mul(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    multiplier: float,
    *,
    a_zero_point: int = 0,
    b_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((a - za) * (b - zb) * multiplier) + zero_point, qmin, qmax).

    multiplier is a_scale * b_scale / y_scale; the product before it is exact. Otherwise as `add`:
    squeeze-and-excitation is (N, 1, 1, C) times (N, H, W, C).
    """
    left, right = _bytes("mul: a", a), _bytes("mul: b", b)
    factor = _factor("mul: multiplier", multiplier)
    zeros = _byte("mul: a_zero_point", a_zero_point), _byte("mul: b_zero_point", b_zero_point)
    clamp = _clamp("mul", zero_point, qmin, qmax)
    result = _broadcast_output("mul", left, right, out)
    return _run(pointwise.mul_row, [left, right, result], factor, zeros, *clamp)


def affine(
    x: NDArray[np.uint8],
    multiplier: ArrayLike,
    shift: ArrayLike = 0.0,
    *,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((x - x_zero_point) * multiplier + shift) + zero_point, qmin, qmax).

    x           uint8, any shape (..., C).
    multiplier  a scalar or (C,), float32, finite, magnitude up to 2**96; shift likewise.

    A batch norm without a convolution, or another scale: multiplier = x_scale / y_scale. Other
    arguments and errors as in `add`.
    """
    x = _bytes("affine: x", x)
    columns = [
        _factors(f"affine: {name}", values, x)
        for name, values in (("multiplier", multiplier), ("shift", shift))
    ]
    zero = _byte("affine: x_zero_point", x_zero_point)
    clamp = _clamp("affine", zero_point, qmin, qmax)
    result = _output("affine", out, x.shape, _UINT8, x)
    return _run(_affine_row, [x, result], *columns, zero, *clamp)


def _affine_row(
    call: Call, x: View, out: View, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    axis = (-1,)[: len(x.shape)]
    scale, offset = (np.frombuffer(v, np.float32).reshape(axis) for v in (multiplier, shift))
    pointwise.affine_row(call, x, out, scale, offset, *rest)


def table(
    x: NDArray[np.uint8], values: NDArray[np.uint8], *, out: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """y = values[x]; or y[..., c] = values[c, x[..., c]], a table for each channel.

    x uint8, any shape (..., C); values uint8 (256,) or (C, 256). Any function of one quantized
    value is such a table. Raises TypeError and ValueError for other dtypes or shapes.
    """
    x, values = _bytes("table: x", x), _bytes("table: values", values)
    if values.shape not in ((256,), (*x.shape[-1:], 256)):
        raise ValueError(
            f"table: values {values.shape} for x {x.shape}; wanted (256,), or (C, 256) for the C "
            "of x's last axis"
        )
    result = _output("table", out, x.shape, _UINT8, x)
    return _run(_table_row, [x, result], values.tobytes())


def _table_row(call: Call, x: View, out: View, values: bytes) -> None:
    tables = np.frombuffer(values, np.uint8).reshape(-1, 256)
    pointwise.table_row(call, x, out, tables[0] if len(tables) == 1 else tables)


def max_pool2d(
    x: NDArray[np.uint8],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    dilation: int | tuple[int, int] = 1,
    ceil_mode: bool = False,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The largest of each window of x (B, H, W, C) uint8; scale and zero point stay.

    kernel_size, stride (kernel_size unless given), padding (up to half of the kernel), dilation,
    ceil_mode as in torch.nn.functional.max_pool2d. out as in `conv2d`. Raises TypeError and
    ValueError for other dtypes, shapes or values.
    """
    x = _image("max_pool2d", x)
    along = _pooling("max_pool2d", x, kernel_size, stride, padding, dilation, bool(ceil_mode))
    result = _pooled("max_pool2d", x, along, out)
    parameters = tuple(tuple(p[i] for p in along) for i in range(4))
    return _run(windows.max_pool2d_row, [x, result], *parameters, bool(ceil_mode))


def avg_pool2d(
    x: NDArray[np.uint8],
    kernel_size: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint(sum * (multiplier / count)) + zero_point, qmin, qmax) for each window.

    sum is that of (x - x_zero_point), exact, over a window of x (B, H, W, C) uint8; padding is real
    0. The windows, and what counts, as in torch.nn.functional.avg_pool2d. multiplier is
    x_scale / y_scale. Otherwise as `max_pool2d` and `add`.
    """
    x = _image("avg_pool2d", x)
    along = _pooling("avg_pool2d", x, kernel_size, stride, padding, 1, bool(ceil_mode))
    if isinstance(divisor_override, np.integer):
        divisor_override = int(divisor_override)
    if divisor_override is not None:
        _checked("avg_pool2d: divisor_override", divisor_override, OVERRIDE)
    requantized = _requantized("avg_pool2d", multiplier, x_zero_point, zero_point, qmin, qmax)
    result = _pooled("avg_pool2d", x, along, out)
    parameters = tuple(tuple(p[i] for p in along) for i in range(3))
    counting = bool(ceil_mode), bool(count_include_pad), divisor_override
    return _run(windows.avg_pool2d_row, [x, result], *parameters, *counting, *requantized)


def adaptive_max_pool2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The largest of each of output_size windows of x (B, H, W, C) uint8, as torch's.

    Window i of an axis is floor(i * H / OH) to ceil((i + 1) * H / OH). Errors as `max_pool2d`.
    """
    x = _image("adaptive_max_pool2d", x)
    result = _resized("adaptive_max_pool2d", x, output_size, out)
    return _run(windows.adaptive_max_pool2d_row, [x, result])


def adaptive_avg_pool2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    *,
    multiplier: float = 1.0,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The mean of each window, requantized as in `avg_pool2d`; windows of `adaptive_max_pool2d`.

    output_size 1 is the mean over H and W. Arguments and errors as there.
    """
    x = _image("adaptive_avg_pool2d", x)
    requantized = _requantized(
        "adaptive_avg_pool2d", multiplier, x_zero_point, zero_point, qmin, qmax
    )
    result = _resized("adaptive_avg_pool2d", x, output_size, out)
    return _run(windows.adaptive_avg_pool2d_row, [x, result], *requantized)


def upsample_nearest2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    scale_factor: tuple[float, float] | None = None,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """x (B, H, W, C) uint8 at min(floor(i * scale), H - 1) of each axis; scale and zero point stay.

    scale is 1 / scale_factor if given, else H / OH, in float32: torch's mode "nearest". Raises
    TypeError and ValueError for other dtypes, shapes or values.
    """
    x = _image("upsample_nearest2d", x)
    factors = _scale_factor("upsample_nearest2d", scale_factor)
    result = _resized("upsample_nearest2d", x, output_size, out)
    return _run(windows.upsample_nearest2d_row, [x, result], factors)


def upsample_bilinear2d(
    x: NDArray[np.uint8],
    output_size: int | tuple[int, int],
    align_corners: bool = False,
    scale_factor: tuple[float, float] | None = None,
    *,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """x (B, H, W, C) uint8 between its pixels; scale and zero point stay.

    Positions and shares as in torch's mode "bilinear", in float32; rounded half to even; see
    reference.upsample_bilinear2d. Errors as `upsample_nearest2d`.
    """
    x = _image("upsample_bilinear2d", x)
    factors = _scale_factor("upsample_bilinear2d", scale_factor)
    result = _resized("upsample_bilinear2d", x, output_size, out)
    return _run(windows.upsample_bilinear2d_row, [x, result], bool(align_corners), factors)


def softmax(
    x: NDArray[np.uint8],
    scale: float,
    mask: NDArray[np.uint8] | NDArray[np.bool_] | None = None,
    *,
    uniform: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """softmax of scale * x over the last axis; the result has scale 1 / 255 and zero_point 0.

    x        uint8, any shape (..., N), N > 0; its zero point cancels.
    scale    finite, > 0, float32.
    mask     uint8 or bool, its last axis N, the others broadcast to x's: where it is 0, x does not
             take part and the result is 0.
    uniform  whether a line whose mask is 0 everywhere has equal weights, and not none.

    The sum of the exponentials is exact, see reference.softmax. Raises TypeError and ValueError for
    other dtypes, shapes or values.
    """
    return _softmax("softmax", norms.softmax_row, norms.masked_softmax_row,
                    x, scale, mask, uniform, out)  # fmt: skip


def softmax_weights(
    x: NDArray[np.uint8],
    scale: float,
    mask: NDArray[np.uint8] | NDArray[np.bool_] | None = None,
    *,
    uniform: bool = False,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """softmax of scale * x over the last axis, without the division by the sum of each line: the
    largest of a line is 255, see reference.softmax_weights. matmul(..., mean=True) divides.

    A line whose mask is 0 everywhere is 0, or with `uniform` 255 everywhere. Other arguments and
    errors as in `softmax`.
    """
    return _softmax("softmax_weights", norms.softmax_weights_row, norms.masked_softmax_weights_row,
                    x, scale, mask, uniform, out)  # fmt: skip


def _softmax(
    name: str, row: Any, masked_row: Any, x: Any, scale: Any, mask: Any, uniform: bool, out: Any
) -> NDArray[np.uint8]:
    x = _lines(name, x)
    steps = check_scale(f"{name}: scale", scale)
    if steps.ndim:
        raise ValueError(f"{name}: scale {steps.shape}; wanted one number")
    result = _output(name, out, x.shape, _UINT8, x)
    if mask is None:
        return _run(row, [x, result], float(steps))
    seen = _mask(name, mask, x)
    _output(name, result, x.shape, _UINT8, seen)
    return _run(masked_row, [x, seen, result], float(steps), bool(uniform))


def _mask(name: str, mask: Any, x: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A softmax's mask as uint8, of x's number of axes."""
    if not isinstance(mask, np.ndarray) or mask.dtype not in (np.bool_, np.uint8):
        given = f"{mask.dtype} array" if isinstance(mask, np.ndarray) else type(mask).__name__
        raise TypeError(f"{name}: mask is a {given}; wanted a bool or uint8 array")
    missing = x.ndim - mask.ndim
    sizes = zip(mask.shape, x.shape[max(missing, 0) :], strict=False)
    if missing < 0 or mask.shape[-1:] != x.shape[-1:] or any(m not in (1, n) for m, n in sizes):
        raise ValueError(
            f"{name}: mask {mask.shape} for x {x.shape}; wanted (..., {x.shape[-1]}), the other "
            "axes as x's or 1"
        )
    same = mask.astype(np.uint8, copy=False).reshape((1,) * missing + mask.shape)
    return _bytes(f"{name}: mask", same)


def layer_norm(
    x: NDArray[Any],
    multiplier: ArrayLike,
    shift: ArrayLike,
    epsilon: float,
    *,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((x - mean) / sqrt(var + epsilon) * multiplier + shift) + zero_point, ...).

    Mean and variance, exact, over the last axis of x (..., N), uint8 with 0 < N <= 2**19 or int16
    with N <= 2**14; x's zero point cancels. With torch's eps, weight and bias: epsilon =
    eps / x_scale**2 > 0, multiplier = weight / y_scale and shift = bias / y_scale, scalars or (N,)
    as in `affine`. The order of the float operations is that of reference.layer_norm. Errors as in
    `affine`.
    """
    x = _normed("layer_norm", x)
    columns, epsilon, clamp = _norm(
        "layer_norm", x, multiplier, shift, epsilon, zero_point, qmin, qmax
    )
    result = _output("layer_norm", out, x.shape, _UINT8, x)
    return _run(_layer_norm_row, [x, result], *columns, epsilon, *clamp)


def _layer_norm_row(
    call: Call, x: View, out: View, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    scale, offset = (np.frombuffer(values, np.float32) for values in (multiplier, shift))
    norms.layer_norm_row(call, x, out, scale, offset, *rest)


def rms_norm(
    x: NDArray[Any],
    multiplier: ArrayLike,
    epsilon: float,
    *,
    x_zero_point: int = 0,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint(x / sqrt(mean(x**2) + epsilon) * multiplier) + zero_point, ...).

    The mean, exact, over the last axis of x (..., N) as in `layer_norm`; x_zero_point is that of
    uint8. With torch's eps and weight: epsilon = eps / x_scale**2 > 0, multiplier =
    weight / y_scale. Errors as in `layer_norm`. Source: B. Zhang and R. Sennrich, Root Mean Square
    Layer Normalization, 2019, arXiv:1910.07467.
    """
    x = _normed("rms_norm", x)
    zero = _byte("rms_norm: x_zero_point", x_zero_point)
    if zero and x.dtype != _UINT8:
        raise ValueError(f"rms_norm: x_zero_point={x_zero_point} of int16; wanted 0")
    columns, epsilon, clamp = _norm("rms_norm", x, multiplier, 0.0, epsilon, zero_point, qmin, qmax)
    result = _output("rms_norm", out, x.shape, _UINT8, x)
    return _run(_rms_norm_row, [x, result], columns[0], epsilon, zero, *clamp)


def _rms_norm_row(call: Call, x: View, out: View, multiplier: bytes, *rest: Any) -> None:
    norms.rms_norm_row(call, x, out, np.frombuffer(multiplier, np.float32), *rest)


def _normed(name: str, x: Any) -> NDArray[Any]:
    """x (..., N) of as many features as the sums of a norm are exact for."""
    x = _lines(name, x, _values)
    most = MAX_FEATURES if x.dtype == _UINT8 else MAX_WIDE_FEATURES
    if x.shape[-1] > most:
        raise ValueError(f"{name}: x {x.shape} {x.dtype}; exact up to {most} features")
    return x


def group_norm(
    x: NDArray[Any],
    groups: int,
    multiplier: ArrayLike,
    shift: ArrayLike,
    epsilon: float,
    *,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint((x - mean) / sqrt(var + epsilon) * multiplier + shift) + zero_point, ...).

    Mean and variance over all pixels of x (B, ..., C), uint8 or int16, and the C / groups channels
    of each group; groups=C is torch's instance norm. The others, scalars or (C,), and the errors
    are as in `layer_norm`; the order of the float operations is that of reference.group_norm.
    """
    x = _values("group_norm: x", x)
    if x.ndim < 2 or (not x[:1].size and x.shape[0]):
        raise ValueError(f"group_norm: x {x.shape}; wanted (B, ..., C), all but B over 0")
    if type(groups) is not int or groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"group_norm: groups={groups!r}; wanted a divisor of {x.shape[-1]}")
    columns, epsilon, clamp = _norm(
        "group_norm", x, multiplier, shift, epsilon, zero_point, qmin, qmax
    )
    result = _output("group_norm", out, x.shape, _UINT8, x)
    return _run(_group_norm_row, [x, result], groups, *columns, epsilon, *clamp)


def _norm(
    name: str, x: NDArray[Any], multiplier: Any, shift: Any, epsilon: Any, *clamp: Any
) -> tuple[list[bytes], float, tuple[int, int, int]]:
    """A norm's multiplier and shift, its epsilon and its clamp, checked."""
    columns = [
        _factors(f"{name}: {what}", values, x)
        for what, values in (("multiplier", multiplier), ("shift", shift))
    ]
    if isinstance(epsilon, int | np.integer):
        epsilon = float(epsilon)
    _checked(f"{name}: epsilon", epsilon, EPSILON)
    return columns, float(epsilon), _clamp(name, *clamp)


def _group_norm_row(
    call: Call, x: View, out: View, groups: int, multiplier: bytes, shift: bytes, *rest: Any
) -> None:
    scale, offset = (np.frombuffer(values, np.float32) for values in (multiplier, shift))
    group_norm_row(call, x, out, groups, scale, offset, *rest)


def matmul(
    a: NDArray[np.uint8],
    b: NDArray[np.uint8],
    multiplier: float,
    *,
    a_zero_point: int = 0,
    transpose_b: bool = False,
    mean: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """y = clip(rint(float32(acc) * multiplier) + zero_point, qmin, qmax) of two activations.

    acc[..., m, n] = sum_k (a[..., m, k] - a_zero_point) * (b[..., k, n] - 128), exact in int32.

    a     uint8 (..., M, K).
    b     uint8 (..., K, N), or (..., N, K) with transpose_b; quantized symmetrically: its zero
          point is 128. The leading axes of a and b broadcast. K up to MAX_K.

    mean  divides by the sum of a's row: a mean of b's rows with the weights a, whose zero point is
          0; a row of zeros gives 0. multiplier is then b_scale / y_scale.

    multiplier is a_scale * b_scale / y_scale. Other arguments and errors as in `add`.
    """
    left, right = _bytes("matmul: a", a), _bytes("matmul: b", b)
    if left.ndim < 2 or right.ndim < 2 or left.shape[-1] != right.shape[-1 if transpose_b else -2]:
        raise ValueError(
            f"matmul: a {left.shape} and b {right.shape} with transpose_b={bool(transpose_b)}; "
            "wanted (..., M, K) and (..., K, N), or (..., N, K) with transpose_b"
        )
    if left.shape[-1] > MAX_K:
        raise ValueError(f"matmul: K={left.shape[-1]}; the sums are exact up to K={MAX_K}")
    try:
        leading = np.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except ValueError:
        raise ValueError(
            f"matmul: leading axes of a {left.shape} and b {right.shape} do not broadcast"
        ) from None
    factor = _factor("matmul: multiplier", multiplier)
    zero = _byte("matmul: a_zero_point", a_zero_point)
    if mean and zero:
        raise ValueError(f"matmul: a_zero_point={zero} with mean=True; weights have zero point 0")
    clamp = _clamp("matmul", zero_point, qmin, qmax)
    shape = (*leading, left.shape[-2], right.shape[-2 if transpose_b else -1])
    if out is not None:
        _output("matmul", out, shape, _UINT8, left)
    result = _output("matmul", out, shape, _UINT8, right)
    if result.size == 0:
        return result
    target = result
    if len(leading) > 2:  # then they must join
        left, right = (
            np.broadcast_to(x, (*leading, *x.shape[-2:])).reshape(-1, *x.shape[-2:])
            for x in (left, right)
        )
        target = result.reshape(-1, *shape[-2:])
    parameters = factor, zero, bool(transpose_b), bool(mean), *clamp
    _run(products.matmul_array_row, [left, right, target], isa.current(), *parameters)
    return result


def recurrent(
    x: NDArray[np.int16],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    cell: str,
    x_scale: float,
    multiplier: float,
    axis: int = 1,
    reverse: bool = False,
    zero_point: int = 0,
    qmin: int = 0,
    qmax: int = 255,
    out: NDArray[np.uint8] | None = None,
) -> NDArray[np.uint8]:
    """The hidden states of an LSTM, a GRU or a plain recurrent layer, (.., .., H) uint8.

    x           int16 (.., .., gates * H): the layer's products with its inputs, for each gate of
                the cell, with zero_point 0. Of the first two axes `axis` is the sequence.
    weight      LinearWeight (gates * H, H), of the hidden state; gates in torch's order.
    epilogue    Dequant of that product, without a clamp; its x_scale is that of the result.
    cell        "lstm", "gru", "tanh" or "relu".
    x_scale     of x; finite, > 0, up to 2**96.
    multiplier  1 / scale of the result; finite, > 0.
    reverse     whether it begins at the last step. The result is in order of x.

    Products are exact in int32, the cell is float32 in the order of reference.recurrent, the same
    bits on every CPU. Raises TypeError and ValueError for other dtypes, shapes or values.
    """
    _check_sequence("recurrent", x, _INT16, cell, axis)
    if not isinstance(weight, LinearWeight) or not isinstance(epilogue, Dequant):
        kinds = f"{type(weight).__name__}, {type(epilogue).__name__}"
        raise TypeError(f"recurrent: weight, epilogue are {kinds}; wanted LinearWeight, Dequant")
    check_cell("recurrent", cell, weight, epilogue)
    if x.shape[2] != weight.n:
        raise ValueError(f"recurrent: x {x.shape}; wanted (.., .., {weight.n}), as the weight has")
    factors = _scale("recurrent: x_scale", x_scale), _scale("recurrent: multiplier", multiplier)
    if not all(isinstance(factor, float) for factor in factors) or x_scale > MAX_FACTOR:
        raise ValueError(
            f"recurrent: x_scale={x_scale}, multiplier={multiplier}; wanted numbers, x_scale up "
            "to 2**96"
        )
    clamp = _clamp("recurrent", zero_point, qmin, qmax)
    x = _values("recurrent: x", x)
    result = _output("recurrent", out, (*x.shape[:2], weight.k), _UINT8, x)
    return _run(_recurrent_row, [x, result], weight, epilogue, isa.current(), cell, *factors,
                int(axis), bool(reverse), *clamp)  # fmt: skip


def _recurrent_row(
    call: Call, x: View, out: View, weight: LinearWeight, epilogue: Dequant, tier: str, cell: str,
    x_scale: float, multiplier: float, axis: int, reverse: bool, zero_point: int, qmin: int,
    qmax: int,
) -> None:  # fmt: skip
    layer = PackedLinear(weight, epilogue, 0, tier)
    # products read beyond the end of a line
    made = call.dense(out.shape, ACTIVATIONS[emitter(tier).a_bytes])
    recurrent_row(
        call, x, made, layer, cell=cell, x_scale=x_scale, multiplier=multiplier, axis=axis,
        reverse=reverse, zero_point=zero_point, qmin=qmin, qmax=qmax,
    )  # fmt: skip
    copy_row(call, made, out)


def recurrent_float(
    x: NDArray[np.float32],
    weight: LinearWeight,
    epilogue: Dequant,
    *,
    cell: str,
    hidden: NDArray[np.float32] | None = None,
    state: NDArray[np.float32] | None = None,
    axis: int = 1,
    reverse: bool = False,
    x_qparams: QParams | None = None,
    projection: tuple[LinearWeight, Dequant, QParams | None] | None = None,
    out: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The hidden states of a recurrent layer between float layers, and its last state.

    x           float32 (.., .., gates * H): the layer's products with its inputs, for each gate of
                the cell. Of the first two axes `axis` is the sequence, the other one has rows.
    weight      LinearWeight (gates * H, H), of the hidden state; gates in torch's order.
    epilogue    Dequant of that product; its x_scale is replaced by the scale of the hidden state.
    cell        "lstm", "gru", "tanh" or "relu".
    hidden      the first hidden state, float32 (rows, H); None: zeros.
    state       of an lstm the first c, float32 (rows, H); None: zeros.
    reverse     whether it begins at the last step. The result is in order of x.
    x_qparams   uint8, per tensor, of the hidden state; None quantizes each of its rows by its own
                range, at each step.
    projection  of an lstm: weight (P, H), Dequant and qparams, as linear_float takes them. The
                hidden state is this product, (rows, P), and `weight` is (gates * H, P).

    Returns the hidden states, float32 (.., .., H or P), and the state after the last step, (rows,
    H): c of an lstm, the hidden state of the others. A sequence in parts, each begun with what the
    one before gave, has the same bits as the whole, as has each of its rows alone. NaN in x and the
    states counts as 0, infinities as 2**96. Raises TypeError and ValueError for other dtypes or
    shapes.
    """
    name = "recurrent_float"
    _check_sequence(name, x, _FLOAT32, cell, axis)
    _check_float(name, weight, LinearWeight, epilogue, x_qparams)
    rows, features = x.shape[1 - axis], weight.n // GATES[cell]
    width, projected = features, None
    if projection is not None:
        if cell != "lstm":
            raise ValueError(f"{name}: a projection of a cell {cell!r}; wanted an lstm's")
        p_weight, p_epilogue, p_qparams = projection
        _check_float(f"{name}: projection", p_weight, LinearWeight, p_epilogue, p_qparams)
        if p_weight.k != features:
            raise ValueError(f"{name}: projection of {p_weight.k} features; wanted {features}")
        width = p_weight.n
        source: Source = "dynamic" if p_qparams is None else "static"
        projected = _bound(BoundLinear, p_weight, p_epilogue, source, p_qparams, 0)
    if weight.data.shape != (GATES[cell] * features, width) or not width:
        raise ValueError(
            f"{name}: weight {weight.data.shape} of a cell {cell!r}; wanted "
            f"({GATES[cell]} * H, {'H' if projection is None else width}), H > 0"
        )
    if x.shape[2] != weight.n:
        raise ValueError(f"{name}: x {x.shape}; wanted (.., .., {weight.n}), as the weight has")
    if state is not None and cell != "lstm":
        raise ValueError(f"{name}: state of a cell {cell!r}; wanted its first hidden state alone")
    first = _first_state(f"{name}: hidden", hidden, (rows, width))
    last = _first_state(f"{name}: state", state, (rows, features)) if cell == "lstm" else first
    last = last.copy() if last is first or last is state else last  # written at each step
    if x.strides[2] != 4 or not x.flags.aligned:
        x = np.array(x, order="C")
    result = _output(name, out, (*x.shape[:2], width), _FLOAT32, x)
    if result.size:
        source = "dynamic" if x_qparams is None else "static"
        layer = _bound(BoundRecurrent, weight, epilogue, source, x_qparams, 0)
        layer.recur(cell, projected, int(axis), bool(reverse), x, result, first, last)
    return result, last


def _check_sequence(name: str, x: Any, dtype: np.dtype[Any], cell: Any, axis: Any) -> None:
    """TypeError or ValueError for anything but gates of a cell, whose sequence is an axis."""
    if not isinstance(x, np.ndarray) or x.dtype != dtype or x.ndim != 3:
        given = f"{x.shape} {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{name}: x is {given}; wanted a NumPy array of {dtype} of three axes")
    if not isinstance(cell, str) or cell not in GATES:
        raise ValueError(f"{name}: cell={cell!r}; wanted one of {', '.join(GATES)}")
    if axis not in (0, 1):
        raise ValueError(f"{name}: axis={axis!r}; wanted 0 or 1")


def _first_state(what: str, given: Any, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """A contiguous array of this shape: the one given, or zeros."""
    if given is None:
        return np.zeros(shape, np.float32)
    if not isinstance(given, np.ndarray) or given.dtype != _FLOAT32 or given.shape != shape:
        found = f"{given.shape} {given.dtype}" if isinstance(given, np.ndarray) else given
        raise ValueError(f"{what} is {found!r:.60}; wanted None or float32 {shape}")
    flags = given.flags
    return given if flags.c_contiguous and flags.aligned else np.array(given, order="C")


def _run(row: Callable[..., None], arrays: list[NDArray[Any]], *parameters: Any) -> NDArray[Any]:
    """Runs row(call, *views, *parameters) on arrays of which the last is the result."""
    result = arrays[-1]
    if result.size:
        if result.ndim > 4:  # then their axes must join
            arrays = [*map(np.ascontiguousarray, np.broadcast_arrays(*arrays[:-1])), result]
        layouts = tuple((a.shape, a.strides, _KIND[a.dtype]) for a in arrays)
        key = (row, layouts, parameters, get_num_threads())
        _calls[row.__name__].run(_row_call, key, *map(address_of, arrays))
    return result


def _row_call(row: Callable[..., None], layouts: Any, parameters: Any, threads: int) -> Call:
    call = Call(len(layouts))
    views = [View(At(i), *layout) for i, layout in enumerate(layouts)]
    row(call, *views, *parameters)
    return call


def _added(
    name: str, epilogue: Epilogue, add: Any, out: NDArray[Any]
) -> tuple[NDArray[Any] | None, tuple[int, str]]:
    """What the epilogue adds, copied to where reading beyond its end is safe; its address and
    kind."""
    wanted = isinstance(epilogue, Requant) and epilogue.add_multiplier is not None
    if not wanted and add is None:
        return None, (0, "")
    if wanted != (add is not None):
        raise ValueError(
            f"{name}: got {'no add=' if wanted else 'add='}; it goes with a Requant that has an "
            "add_multiplier"
        )
    fits = isinstance(add, np.ndarray) and add.dtype in (_UINT8, _INT16)
    if not fits or add.shape != out.shape:
        given = f"{add.shape} {add.dtype}" if isinstance(add, np.ndarray) else type(add).__name__
        raise ValueError(f"{name}: add is {given}; wanted {out.shape}, uint8 or int16")
    copy = np.empty(add.size + SLACK, add.dtype)
    copy[: add.size] = add.reshape(-1)
    return copy, (address_of(copy), _KIND[add.dtype])


def _out_dtype(epilogue: Epilogue) -> np.dtype[Any]:
    if epilogue is None:
        return _INT32
    return epilogue.dtype if isinstance(epilogue, Requant) else _FLOAT32


def _bound(
    kind: Any,
    weight: Any,
    epilogue: Epilogue,
    source: Source,
    x_qparams: QParams | None,
    zero_point: Any,
) -> Any:
    """The layer bound to these, kept with the weight; it holds them, so their ids stay theirs."""
    folded = zero_point if isinstance(epilogue, Requant) else 0
    tier = isa.current()
    key = (kind, source, tier, id(epilogue), id(x_qparams), folded)
    layer = weight.panels.get(key)
    if layer is None:
        layer = kind(weight, epilogue, source, x_qparams, folded, tier)
        bound = [k for k, v in list(weight.panels.items()) if isinstance(v, kind)]
        if len(bound) >= _BOUND_LAYERS:
            weight.panels.pop(bound[0], None)
            weight.checked.clear()
        weight.panels[key] = layer
    return layer


_NO_TENSOR = np.ndarray, float, int, type(None)


def _is_tensor(x: Any) -> bool:
    if isinstance(x, _NO_TENSOR):  # the most usual, and soon told
        return False
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _through_numpy(function: Any, x: Any, parameter: Any, out: Any, **named: Any) -> Any:
    """Calls function on a torch tensor's memory; scale and zero_point may be tensors as well."""
    torch = sys.modules["torch"]
    if x.requires_grad:
        raise ValueError(f"{function.__name__}: x requires grad; x.detach() has no gradient")

    def array(value: Any) -> Any:
        return value.numpy(force=True) if _is_tensor(value) else value

    for key, value in named.items():
        named[key] = array(value)
    # not forced: a copy of out would be written, and lost
    result = function(
        array(x), array(parameter), out=out.numpy() if _is_tensor(out) else out, **named
    )
    return out if out is not None else torch.from_numpy(result)


def _real(what: str, x: ArrayLike) -> NDArray[np.float32]:
    if type(x) is np.ndarray and x.dtype is _FLOAT32:
        return x
    array = np.asarray(x)
    if array.dtype == _FLOAT32:
        return array
    if array.dtype.kind != "f" and (isinstance(x, np.ndarray) or array.dtype.kind not in "iu"):
        raise TypeError(f"{what} {array.shape} {array.dtype}; wanted float32")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _bytes(what: str, x: Any) -> NDArray[np.uint8]:
    """x, with elements of the last axis side by side; TypeError unless it is a uint8 array."""
    if type(x) is not np.ndarray or x.dtype != _UINT8:
        given = f"{x.shape} {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__
        raise TypeError(f"{what} is {given}; wanted a NumPy array of uint8")
    return x if not x.ndim or x.shape[-1] == 1 or x.strides[-1] == 1 else np.ascontiguousarray(x)


def _values(what: str, x: Any) -> NDArray[Any]:
    """The same of an array of uint8 or int16."""
    if type(x) is not np.ndarray or x.dtype != _INT16:
        if isinstance(x, np.ndarray) and x.dtype != _UINT8:
            raise TypeError(f"{what} is {x.shape} {x.dtype}; wanted uint8 or int16")
        return _bytes(what, x)
    lines = not x.ndim or x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    return x if lines and x.flags.aligned else np.require(x, requirements=["C", "A"])


def _lines(name: str, x: Any, taken: Callable[[str, Any], NDArray[Any]] = _bytes) -> NDArray[Any]:
    """x (..., N), N > 0."""
    x = taken(f"{name}: x", x)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{name}: x {x.shape}; wanted (..., N) with N > 0")
    return x


def _byte(what: str, value: Any) -> int:
    if type(value) is int and 0 <= value <= 255:
        return value
    zero = check_zero_point(what, value, np.uint8)
    if zero.ndim:
        raise ValueError(f"{what} {zero.shape}; wanted one integer")
    return int(zero)


def _factor(what: str, value: Any) -> float:
    """The value rounded to float32."""
    if type(value) is float and abs(value) <= MAX_FACTOR:
        return _unpack_float(_pack_float(value))[0]  # type: ignore[no-any-return]
    with np.errstate(over="ignore"):
        factors = np.asarray(value, np.float32)
    if factors.ndim or not abs(factors) <= MAX_FACTOR:
        raise ValueError(f"{what}={value!r}; wanted one finite number, magnitude up to 2**96")
    return float(factors)


def _factors(what: str, values: ArrayLike, x: NDArray[Any]) -> bytes:
    """A scalar or one float32 for each of x's last axis."""
    with np.errstate(over="ignore"):
        factors = np.asarray(values, np.float32)
    if factors.shape not in ((), x.shape[-1:]):
        raise ValueError(
            f"{what} {factors.shape} for x {x.shape}; wanted a scalar or one per channel"
        )
    if not (np.abs(factors) <= MAX_FACTOR).all():
        raise ValueError(f"{what}: wanted finite numbers, magnitude up to 2**96, got {values!r}")
    return factors.tobytes()


def _requantized(
    name: str, multiplier: Any, x_zero_point: Any, zero_point: Any, qmin: Any, qmax: Any
) -> tuple[float, int, int, int, int]:
    factor = _factor(f"{name}: multiplier", multiplier)
    zero = _byte(f"{name}: x_zero_point", x_zero_point)
    return factor, zero, *_clamp(name, zero_point, qmin, qmax)


def _image(name: str, x: Any) -> NDArray[np.uint8]:
    x = _bytes(f"{name}: x", x)
    if x.ndim != 4 or not (x.shape[1] and x.shape[2]):
        raise ValueError(f"{name}: x {x.shape}; wanted (B, H, W, C) with H, W > 0")
    return x


def _checked(what: str, value: Any, check: Check) -> None:
    """ValueError unless the value is what a program's step may have, too."""
    if not check.fits(value):
        raise ValueError(f"{what}={value!r}; wanted {check.wanted}")


def _pooling(
    name: str, x: NDArray[Any], kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool
) -> list[tuple[int, int, int, int, int]]:
    """(kernel, stride, padding, dilation, output size) of each axis."""
    kernels = pair(f"{name}: kernel_size", kernel, 1)
    strides = kernels if stride is None else pair(f"{name}: stride", stride, 1)
    paddings = pair(f"{name}: padding", padding, 0)
    dilations = pair(f"{name}: dilation", dilation, 1)
    if any(2 * p > k for p, k in zip(paddings, kernels, strict=True)):
        raise ValueError(f"{name}: padding={padding} for kernel_size={kernel}; wanted up to half")
    along = []
    for i, size in enumerate(x.shape[1:3]):
        one = kernels[i], strides[i], paddings[i], dilations[i]
        count = windows.pool_size(size, *one, ceil)
        if count < 1:
            raise ValueError(
                f"{name}: x {x.shape} is smaller than the window; kernel_size={kernel}, "
                f"padding={padding}, dilation={dilation}"
            )
        along.append((*one, count))
    return along


def _pooled(name: str, x: NDArray[Any], along: Any, out: Any) -> NDArray[Any]:
    shape = (x.shape[0], along[0][-1], along[1][-1], x.shape[3])
    return _output(name, out, shape, _UINT8, x)


def _resized(name: str, x: NDArray[Any], output_size: Any, out: Any) -> NDArray[Any]:
    size = pair(f"{name}: output_size", output_size, 1)
    return _output(name, out, (x.shape[0], *size, x.shape[3]), _UINT8, x)


def _scale_factor(name: str, value: Any) -> tuple[float, float] | None:
    if value is None:
        return None
    if isinstance(value, tuple | list):
        value = tuple(float(v) if isinstance(v, int | np.integer) else v for v in value)
    _checked(f"{name}: scale_factor", value, RESIZED)
    return float(value[0]), float(value[1])


def _clamp(
    name: str, zero_point: Any, qmin: Any, qmax: Any, dtype: np.dtype[Any] = _UINT8
) -> tuple[int, int, int]:
    """(zero_point, qmin, qmax), checked."""
    zero = _byte(f"{name}: zero_point", zero_point)
    return zero, *clamp_of(name, dtype, qmin, qmax, zero)


def _broadcast_output(
    name: str, a: NDArray[Any], b: NDArray[Any], out: Any, dtype: np.dtype[Any] = _UINT8
) -> NDArray[Any]:
    shape = a.shape
    if b.shape != shape:
        try:
            shape = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise ValueError(f"{name}: a {a.shape} and b {b.shape} do not broadcast") from None
    if out is not None:
        _output(name, out, shape, dtype, a)
    return _output(name, out, shape, dtype, b)


def _integer(what: str, x: NDArray[Any]) -> np.dtype[Any]:
    if x.dtype not in _KIND or x.dtype == np.float32:
        raise TypeError(f"{what} {x.shape} {x.dtype}; wanted uint8, int8, int16 or int32")
    return x.dtype


def _array(what: str, x: Any, dtype: np.dtype[Any], ndim: int) -> NDArray[Any]:
    if type(x) is not np.ndarray and (
        not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray)
    ):
        raise TypeError(
            f"{what} is a {type(x).__name__}; wanted a NumPy array (tensor.numpy() shares memory)"
        )
    if x.dtype != dtype or x.ndim != ndim:
        axes = {2: "(M, K)", 4: "(B, H, W, C)"}[ndim]
        raise (TypeError if x.dtype != dtype else ValueError)(
            f"{what} {x.shape} {x.dtype}; wanted {axes} {dtype}"
        )
    return x


def _output(
    name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], x: NDArray[Any]
) -> NDArray[Any]:
    """The array to write: `out` if it fits, else a new one."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype:
        given = f"{out.shape} {out.dtype}" if isinstance(out, np.ndarray) else type(out).__name__
        raise ValueError(f"{name}: out is {given}; wanted {shape} {dtype}")
    if not out.flags.carray:
        raise ValueError(f"{name}: out must be C-contiguous, writeable and aligned")
    at, to = address_of(x), address_of(out)
    apart = x.flags.c_contiguous and (to + out.nbytes <= at or at + x.nbytes <= to)
    if not apart and np.may_share_memory(out, x):  # which takes its time
        raise ValueError(f"{name}: out overlaps x; wanted memory of its own")
    return out


def _zero_point(name: str, value: ArrayLike) -> Any:
    """A Python int, or an int32 array with one value per row."""
    if type(value) is int and 0 <= value <= 255:
        return value
    zeros = check_zero_point(f"{name}: x_zero_point", value, np.uint8)
    return zeros if zeros.ndim else int(zeros)


_EPILOGUES = Requant, Dequant  # `isinstance` of a tuple takes a third of that of a union


def _check_weight(name: str, weight: Any, kind: type, epilogue: Any) -> None:
    if not isinstance(weight, kind):
        raise TypeError(
            f"{name}: weight is a {type(weight).__name__}; wanted a {kind.__name__}, made once "
            f"from the int8 array: {kind.__name__}(array)"
        )
    if epilogue is not None and not isinstance(epilogue, _EPILOGUES):
        raise TypeError(
            f"{name}: epilogue is a {type(epilogue).__name__}; wanted None, Requant or Dequant"
        )


def _check_float(
    name: str, weight: Any, kind: type, epilogue: Any, x_qparams: QParams | None
) -> None:
    if not isinstance(epilogue, Dequant):
        raise TypeError(f"{name}: epilogue is a {type(epilogue).__name__}; wanted a Dequant")
    _check_weight(name, weight, kind, epilogue)
    if x_qparams is not None and not isinstance(x_qparams, QParams):
        raise TypeError(f"{name}: x_qparams is a {type(x_qparams).__name__}; wanted a QParams")
    if x_qparams is not None and (x_qparams.dtype != np.uint8 or x_qparams.axis is not None):
        raise ValueError(
            f"{name}: x_qparams are {x_qparams.dtype}, axis {x_qparams.axis}; "
            "wanted uint8 per tensor (axis None)"
        )


def _conv_output(
    name: str, x: NDArray[Any], weight: Conv2dWeight, dtype: np.dtype[Any], out: Any
) -> NDArray[Any]:
    batch, h, w, c = x.shape
    if c != weight.c:
        raise ValueError(
            f"{name}: x has {c} channels, weight wants {weight.c}; x {x.shape} (B, H, W, C), "
            f"weight {weight.data.shape} with groups={weight.groups}"
        )
    return _output(name, out, (batch, *weight.output_size(h, w), weight.n), dtype, x)


def _fills_its_memory(x: NDArray[Any]) -> bool:
    """Whether x is contiguous after reordering its axes."""
    step = x.itemsize
    for stride, extent in sorted(zip(x.strides, x.shape, strict=True)):
        if extent > 1:
            if stride != step:
                return False
            step *= extent
    return True
