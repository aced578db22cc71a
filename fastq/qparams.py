"""What a quantized number means: scales, zero points, and how an accumulator becomes an output.

    real = scale * (q - zero_point)

Activations are uint8 and affine; weights are int8, symmetric, one scale per output channel. Sums
that neither products nor tables take are int16, symmetric.
This room is plain NumPy; every other room imports it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
UInt8 = NDArray[np.uint8]

QUANTIZED_DTYPES = tuple(np.dtype(t) for t in (np.uint8, np.int8, np.int16, np.int32))
VALUE_DTYPES = np.dtype(np.uint8), np.dtype(np.int16)  # of values between operations
FLT_MIN = float(np.finfo(np.float32).tiny)  # smallest normal float32, the floor of every scale
FLT_MAX = float(np.finfo(np.float32).max)

HISTOGRAM_KEYS = 1 << 16  # bins of a histogram: one for each upper half of a float32

# |x - zero_point| <= 255 and |w| <= 128: beyond this K an int32 accumulator could overflow.
MAX_K = (2**31 - 1) // (255 * 128)
MAX_FACTOR = 2.0**96  # of a multiplier or shift: nothing overflows float32 before the clamp
MAX_FEATURES = 2**19  # of a layer norm: the squares of 16 values at a time stay in int32
MAX_WIDE_FEATURES = 2**14  # of one of int16: N * x - sum(x) stays in int32


def quantized_dtype(dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype, torch's too, as a NumPy dtype; ValueError, or TypeError for what is no dtype,
    unless it is uint8, int8, int16 or int32."""
    given: Any = dtype
    if type(dtype).__module__ == "torch":
        given = str(dtype).removeprefix("torch.")
    try:
        result = np.dtype(given)
    except TypeError:
        raise TypeError(f"dtype: got {given!r}, wanted uint8, int8, int16 or int32") from None
    if result not in QUANTIZED_DTYPES:
        raise ValueError(f"dtype: got {result}, wanted uint8, int8, int16 or int32")
    return result


def as_array(what: str, x: Any) -> NDArray[Any]:
    """x as an array; TypeError for one with a mask, which nothing here would heed, and for what
    has no values, ValueError for lists that are no array."""
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{what} is a {type(x).__name__}; wanted an array: x.filled(0) is one")
    if not isinstance(x, np.ndarray) and hasattr(x, "is_meta"):  # torch's
        check_dense(what, x)
    try:
        return np.asarray(x)
    except ValueError:
        if not isinstance(x, list | tuple):
            raise
        raise ValueError(
            f"{what} is a {type(x).__name__} whose parts differ in size; wanted an array, a "
            "number, or lists of equal lengths"
        ) from None


def check_dense(what: str, tensor: Any) -> None:
    """TypeError unless a torch tensor has all its values in memory."""
    if tensor.is_meta:
        raise TypeError(f"{what} is on meta, without values; wanted a tensor on the CPU")
    if str(tensor.layout) != "torch.strided":
        raise TypeError(f"{what} is {tensor.layout}; wanted a dense tensor: .to_dense() gives one")


def check_axis(name: str, axis: Any, shape: tuple[int, ...] | None = None) -> None:
    """TypeError unless it is an int, ValueError unless an array of this shape has such an axis."""
    if not isinstance(axis, int | np.integer):
        raise TypeError(f"{name}: axis={axis!r}; wanted an int")
    if shape is not None and not -len(shape) <= axis < len(shape):
        raise ValueError(
            f"{name}: axis={axis} for an array of shape {shape}; wanted {-len(shape)} to "
            f"{len(shape) - 1}"
        )


@functools.cache
def limits(dtype: np.dtype[Any]) -> tuple[int, int]:
    """The smallest and the largest integer of a dtype; np.iinfo takes its time."""
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)


def value_dtype(name: str, dtype: DTypeLike) -> np.dtype[Any]:
    """The dtype of a value between operations; ValueError unless it is uint8 or int16."""
    given = np.dtype(dtype)
    for known in VALUE_DTYPES:
        if given == known and given.fields is None:  # one with fields is equal, and another key
            return known
    raise ValueError(f"{name}: dtype {given}; wanted uint8 or int16")


UNCLAMPED = 0, 0, 255  # zero_point, qmin and qmax of what is not requantized


def clamp_of(
    name: str, dtype: np.dtype[Any], qmin: int | None, qmax: int | None, zero_point: int
) -> tuple[int, int]:
    """qmin and qmax of a value between operations, which are the ends of its dtype if None.

    ValueError unless they are within it and in order, and int16 has zero_point 0: then nothing but
    the clamp can take a sum beyond int16.
    """
    least, most = limits(dtype)
    low, high = least if qmin is None else int(qmin), most if qmax is None else int(qmax)
    if not least <= low <= high <= most:
        raise ValueError(
            f"{name}: qmin={low}, qmax={high}; wanted {least} <= qmin <= qmax <= {most}"
        )
    if dtype == np.int16 and zero_point:
        raise ValueError(f"{name}: zero_point={zero_point} of int16; wanted 0: it is symmetric")
    return low, high


def check_scale(name: str, scale: ArrayLike) -> Float32:
    """A read-only float32 copy; ValueError unless all of it is finite and greater than 0."""
    given = as_array(name, scale)
    if given.dtype.kind not in "fiu":
        what = f"dtype {given.dtype}" if given.dtype != object else type(scale).__name__
        raise TypeError(f"{name}: got {what}, wanted a real number, or an array of them")
    if not given.ndim and 0 < given.item() <= FLT_MAX:
        array = np.array(given, dtype=np.float32)
    else:
        with np.errstate(over="ignore"):
            array = np.array(given, dtype=np.float32)
    array.flags.writeable = False
    if array.ndim > 1:
        raise ValueError(f"{name}: shape {array.shape}; wanted a scalar or one axis")
    if not array.ndim:
        valid = 0 < array.item() < np.inf
    else:
        valid = bool(np.isfinite(array).all() and (array > 0).all())
    if not valid:
        raise ValueError(
            f"{name}: wanted finite values greater than 0 in float32, got {_span(given)}"
        )
    return array


def _span(values: NDArray[Any]) -> str:
    """What was given, for an error."""
    return f"values from {values.min()} to {values.max()}" if values.ndim else str(values)


def check_zero_point(name: str, zero_point: ArrayLike, dtype: DTypeLike) -> Int32:
    """`zero_point` as int32; ValueError unless integral and within the range of `dtype`."""
    least, most = limits(quantized_dtype(dtype))
    array = as_array(name, zero_point)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name}: got dtype {array.dtype}, wanted integers")
    if not array.ndim:
        valid = least <= array.item() <= most
    else:
        valid = not array.size or (int(array.min()) >= least and int(array.max()) <= most)
    if not valid:
        raise ValueError(
            f"{name}: got {_span(array)}, wanted {least} to {most} for {np.dtype(dtype)}"
        )
    return array.astype(np.int32)


@dataclass(frozen=True, eq=False)
class QParams:
    """How to read one quantized array: real = scale * (q - zero_point).

    scale       float32, a scalar (per tensor) or shape (n,) along `axis`; finite, > 0.
    zero_point  int32, same shape as scale, within the range of dtype.
    dtype       uint8, int8, int16 or int32.
    axis        the axis that scale and zero_point run along, or None for per tensor.
    """

    scale: Float32
    zero_point: Int32 = field(default_factory=lambda: np.zeros((), np.int32))
    dtype: np.dtype[Any] = np.dtype(np.uint8)
    axis: int | None = None

    def __post_init__(self) -> None:
        dtype = quantized_dtype(self.dtype)
        scale = check_scale("QParams: scale", self.scale)
        zero_point = check_zero_point("QParams: zero_point", self.zero_point, dtype)
        if self.axis is not None:
            check_axis("QParams", self.axis)
        if self.axis is None and (scale.ndim or zero_point.ndim):
            raise ValueError(
                f"QParams: scale {scale.shape} and zero_point {zero_point.shape} "
                "without an axis; wanted scalars, or axis="
            )
        if self.axis is not None and (scale.ndim != 1 or zero_point.shape not in ((), scale.shape)):
            raise ValueError(
                f"QParams: scale {scale.shape} and zero_point {zero_point.shape} with "
                f"axis={self.axis}; wanted (n,) each, or one zero_point"
            )
        zero_point = np.broadcast_to(zero_point, scale.shape).astype(np.int32)
        zero_point.flags.writeable = False
        object.__setattr__(self, "dtype", dtype)
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero_point)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QParams):
            return NotImplemented
        return (
            self.dtype == other.dtype
            and self.axis == other.axis
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
        )


def choose_qparams(
    minimum: ArrayLike,
    maximum: ArrayLike,
    dtype: DTypeLike = np.uint8,
    symmetric: bool = False,
    axis: int | None = None,
) -> QParams:
    """The QParams that cover [minimum, maximum] and represent 0 exactly.

    minimum, maximum  scalars, or (n,) along `axis`. The range is widened to include 0.
    symmetric         zero_point 0 and scale = max|x| / qmax (weights); else affine.

    Affine, in float32 throughout: scale = (max - min) / (qmax - qmin), or the difference of both
    quotients where that of the ends overflows; zero_point = clip(rint(qmin - min / scale)).
    Source: ONNX DynamicQuantizeLinear. A range of zero width has scale 1.0.
    Raises ValueError for NaN, infinities or min > max.
    """
    dtype = quantized_dtype(dtype)
    with np.errstate(over="ignore"):
        lo, hi = np.asarray(minimum, np.float32), np.asarray(maximum, np.float32)
    if not (np.isfinite(lo).all() and np.isfinite(hi).all() and (lo <= hi).all()):
        raise ValueError(
            "choose_qparams: wanted finite minimum <= maximum in float32, got "
            f"{minimum!r} and {maximum!r}"
        )
    info = np.iinfo(dtype)
    lo, hi = np.minimum(lo, np.float32(0)), np.maximum(hi, np.float32(0))
    if symmetric:
        scale = _safe_scale(np.maximum(-lo, hi), info.max)
        return QParams(scale, np.zeros(scale.shape, np.int32), dtype, axis)
    if dtype.itemsize > 1:
        raise ValueError(f"choose_qparams: affine {dtype} is not supported; use symmetric=True")
    steps = info.max - info.min
    with np.errstate(over="ignore"):
        width = hi - lo
    scale = np.where(np.isinf(width), hi / steps - lo / steps, _safe_scale(width, steps))
    zero_point = np.clip(np.rint(np.float32(info.min) - lo / scale), info.min, info.max)
    return QParams(scale, zero_point.astype(np.int32), dtype, axis)


def _safe_scale(width: NDArray[Any], steps: int) -> Float32:
    """width / steps in float32, never 0, never infinite; 1.0 where the width is 0."""
    scale = np.minimum(width, np.float32(FLT_MAX)) / np.float32(steps)
    scale = np.maximum(scale, np.float32(FLT_MIN))
    return np.asarray(np.where(width == 0, np.float32(1), scale), np.float32)


WeightRange = Literal["max", "mse"]


def check_weight_range(name: str, value: object) -> None:
    """ValueError unless it says how the range of weights is found."""
    if value not in get_args(WeightRange):
        raise ValueError(f"{name}={value!r}; wanted 'max' or 'mse'")


def check_weight_bits(name: str, value: object) -> None:
    """TypeError or ValueError unless it is a number of bits that int8 data can have."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}; wanted an int from 2 to 8")
    if not 2 <= value <= 8:
        raise ValueError(f"{name}={value}; wanted 2 to 8: the data are stored as int8")


def quantize_weight(
    weight: ArrayLike, axis: int = 0, *, range: WeightRange = "max", bits: int = 8
) -> tuple[NDArray[np.int8], Float32]:
    """A float32 weight as (int8 data, float32 scale per slice along `axis`), symmetric.

    data = clip(rint(w / scale), -qmax, qmax) with qmax = 2**(bits - 1) - 1, 2 <= bits <= 8: fewer
    bits use less of int8, in the same kernels.

    range  "max": scale = max|w| / qmax, nothing is clipped.
           "mse": of the scales of 1, 0.99, ... 0.3 times the largest weight, the one of least
           squared error, for each slice; of equals the largest.

    The weight may be a torch tensor, also one that requires grad.
    Raises ValueError for non-finite weights, other ranges and bits, and an axis that is none.
    """
    check_weight_range("quantize_weight: range", range)
    check_weight_bits("quantize_weight: bits", bits)
    given: Any = weight
    if hasattr(given, "detach"):  # torch's
        given = given.detach().float()
    w = as_array("quantize_weight: weight", given).astype(np.float32, copy=False)
    check_axis("quantize_weight", axis, w.shape)
    if not np.isfinite(w).all():
        raise ValueError(
            "quantize_weight: the weight has NaN or infinite values; wanted finite ones"
        )
    slices = np.moveaxis(w, axis, 0)
    slices = slices.reshape(len(slices), int(np.prod(slices.shape[1:])))
    qmax = 2 ** (bits - 1) - 1
    peak = np.abs(slices).max(axis=1, initial=0)
    scale = _safe_scale(peak, qmax)
    if range == "mse":
        scale = _least_error_scale(slices, peak, qmax)
    shape = [1] * w.ndim
    shape[axis] = -1
    data = np.clip(np.rint(w / scale.reshape(shape)), -qmax, qmax).astype(np.int8)
    return data, scale


def _least_error_scale(slices: Float32, peak: Float32, qmax: int) -> Float32:
    """The scale (n,) of least squared error for each row of slices (n, k)."""
    best = _safe_scale(peak, qmax)
    least = np.full(len(slices), np.inf)
    error = np.empty_like(slices)
    for percent in np.arange(100, 29, -1):
        scale = _safe_scale(peak * np.float32(percent / 100), qmax)
        column = scale[:, None]
        np.rint(np.divide(slices, column, out=error), out=error)
        np.clip(error, -qmax, qmax, out=error)
        error *= column
        error -= slices
        squares = np.einsum("nk,nk->n", error, error, dtype=np.float64)
        best = np.where(squares < least, scale, best)
        least = np.minimum(squares, least)
    return best


# of a recurrent layer: how many products of the hidden state each cell takes
GATES = {"lstm": 4, "gru": 3, "tanh": 1, "relu": 1}
# tanh(x) as x * over(x**2) / below(x**2), from the highest power down: the ninth convergent of
# Lambert's continued fraction x / (1 + x**2 / (3 + x**2 / (5 + ...))), 7e-6 off at most.
TANH_LIMIT = 8.0  # of x: it is 1 from 6.4 on, and the polynomials do not overflow
TANH_OVER = 1.0, 990.0, 135135.0, 4729725.0, 34459425.0
TANH_BELOW = 45.0, 13860.0, 945945.0, 16216200.0, 34459425.0


def exp_table(scale: float) -> Int32:
    """exp(-scale * d) for d = 0..255 as int32, 1.0 being 2**23: what `softmax` sums, exactly."""
    steps = np.exp(-np.float64(np.float32(scale)) * np.arange(256))
    return np.rint(steps * 2.0**23).astype(np.int32)


def weight_table(scale: float) -> UInt8:
    """255 * exp(-scale * d) for d = 0..255, rounded: what `softmax_weights` gives."""
    steps = np.exp(-np.float64(np.float32(scale)) * np.arange(256))
    return np.rint(steps * 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Requant:
    """int32 accumulator -> quantized output, the ONNX QLinearMatMul / QLinearConv rule.

    y = clip(rint(float32(acc + bias) * multiplier) + zero_point, qmin, qmax), ties to even.

    With an add_multiplier, `add`, a uint8 or int16 array of the output's shape, is summed in before
    rounding: ... * multiplier + float32(add - add_zero_point) * add_multiplier ...

    multiplier  float32, scalar or (N,): x_scale * weight_scale / y_scale; finite, > 0.
    zero_point  int of the output, within [0, 255]; 0 for int16.
    bias        int32 (N,) or None: rint(bias / (x_scale * weight_scale)).
    qmin, qmax  the clamp, within the range of dtype, which is the default. ReLU is
                qmin = zero_point.
    add_multiplier  float32, scalar or (N,), finite: add_scale / y_scale; or None: nothing is added.
    add_zero_point  int of what is added, within [0, 255].
    dtype       of the output: uint8, or int16, which is symmetric.
    """

    multiplier: Float32
    zero_point: int = 0
    bias: Int32 | None = None
    qmin: int = None  # type: ignore[assignment]  # the constructor makes it an int
    qmax: int = None  # type: ignore[assignment]
    add_multiplier: Float32 | None = None
    add_zero_point: int = 0
    dtype: np.dtype[Any] = np.dtype(np.uint8)

    def __post_init__(self) -> None:
        object.__setattr__(self, "multiplier", check_scale("Requant: multiplier", self.multiplier))
        object.__setattr__(self, "bias", _check_bias("Requant", self.bias, np.int32))
        for name in ("zero_point", "add_zero_point"):
            zero_point = check_zero_point(f"Requant: {name}", getattr(self, name), np.uint8)
            if zero_point.ndim:
                raise ValueError(f"Requant: {name} {zero_point.shape}; wanted one integer")
            object.__setattr__(self, name, int(zero_point))
        if self.add_multiplier is not None:
            factors = _check_finite("Requant: add_multiplier", self.add_multiplier)
            object.__setattr__(self, "add_multiplier", factors)
        dtype = value_dtype("Requant", self.dtype)
        object.__setattr__(self, "dtype", dtype)
        for name in ("qmin", "qmax"):
            if not isinstance(getattr(self, name), int | np.integer | None):
                raise TypeError(f"Requant: {name}={getattr(self, name)!r}; wanted an int")
        qmin, qmax = clamp_of("Requant", dtype, self.qmin, self.qmax, self.zero_point)
        object.__setattr__(self, "qmin", qmin)
        object.__setattr__(self, "qmax", qmax)


@dataclass(frozen=True, eq=False)
class Dequant:
    """int32 accumulator -> float32 output.

    y = clip(float32(acc) * (x_scale * scale) + bias, fmin, fmax), each operation in float32.

    scale    float32, scalar or (N,): the weight's scale; finite, > 0.
    x_scale  float32, scalar or one value per row (M,): the activation's scale.
    bias     float32 (N,) or None.
    fmin, fmax  the clamp; ReLU is fmin = 0.
    """

    scale: Float32
    x_scale: Float32 = field(default_factory=lambda: np.ones((), np.float32))
    bias: Float32 | None = None
    fmin: float = float("-inf")
    fmax: float = float("inf")

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", check_scale("Dequant: scale", self.scale))
        object.__setattr__(self, "x_scale", check_scale("Dequant: x_scale", self.x_scale))
        object.__setattr__(self, "bias", _check_bias("Dequant", self.bias, np.float32))
        for name in ("fmin", "fmax"):
            object.__setattr__(self, name, float(getattr(self, name)))
        if not self.fmin <= self.fmax:
            raise ValueError(f"Dequant: fmin={self.fmin}, fmax={self.fmax}; wanted fmin <= fmax")


Epilogue = Requant | Dequant | None


def _check_finite(name: str, values: Any) -> Float32:
    """A read-only float32 copy of finite numbers, one or (N,)."""
    given = as_array(name, values)
    if given.dtype.kind not in "fiu" or given.ndim > 1:
        raise ValueError(f"{name} {given.shape} {given.dtype}; wanted numbers, one or (N,)")
    with np.errstate(over="ignore"):
        array = np.array(given, np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name}: got {_span(given)}; wanted finite values in float32")
    array.flags.writeable = False
    return array


def _check_bias(where: str, bias: Any, dtype: Any) -> Any:
    if bias is None:
        return None
    array = np.asarray(bias)
    if array.ndim != 1 or (dtype is np.int32 and array.dtype != np.int32):
        raise ValueError(
            f"{where}: bias {array.shape} {array.dtype}; wanted (N,) {np.dtype(dtype)}"
        )
    array = array.astype(dtype)
    array.flags.writeable = False
    if dtype is np.float32 and not np.isfinite(array).all():
        raise ValueError(f"{where}: bias has NaN or infinite values; wanted finite ones")
    return array
