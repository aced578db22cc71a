"""What the operations accept: each check says what was given and what was wanted."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastq.arguments import Check
from fastq.kernels.call import address_of
from fastq.qparams import (
    FLT_MAX,
    FLT_MIN,
    MAX_FACTOR,
    Dequant,
    QParams,
    Requant,
    as_array,
    check_scale,
    check_zero_point,
    clamp_of,
)

UINT8, INT8, INT16, INT32, FLOAT32 = map(np.dtype, ("uint8", "int8", "int16", "int32", "float32"))
KIND = {
    FLOAT32: "f32",
    UINT8: "u8",
    INT8: "s8",
    INT16: "s16",
    INT32: "s32",
}
pack_float, unpack_float = struct.Struct("f").pack, struct.Struct("f").unpack
FLOATS = float, np.float32
_EPILOGUES = Requant, Dequant  # `isinstance` of a tuple takes a third of that of a union


def as_float32(what: str, x: ArrayLike) -> NDArray[np.float32]:
    if type(x) is np.ndarray and x.dtype is FLOAT32:
        return x
    array = as_array(what, x)
    if array.dtype == FLOAT32:
        return array
    if array.dtype.kind != "f" and (isinstance(x, np.ndarray) or array.dtype.kind not in "iu"):
        hint = ": x.astype(np.float32) is so" if array.dtype.kind in "biu" else ""
        raise TypeError(f"{what} {array.shape} {array.dtype}; wanted float32{hint}")
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def plain_array(what: str, x: Any) -> NDArray[Any]:
    """x as no subclass, as np.memmap is; TypeError unless it is an array, and one without a mask,
    which nothing here would heed."""
    if type(x) is np.ndarray:
        return x
    if not isinstance(x, np.ndarray) or isinstance(x, np.ma.MaskedArray):
        raise TypeError(
            f"{what} is a {type(x).__name__}; wanted a NumPy array (tensor.numpy() shares memory)"
        )
    return np.asarray(x)


def described(x: Any) -> str:
    """What was given, for an error."""
    return f"{x.shape} {x.dtype}" if isinstance(x, np.ndarray) else type(x).__name__


def as_uint8(what: str, x: Any) -> NDArray[np.uint8]:
    """x, with elements of the last axis side by side; TypeError unless it is a uint8 array."""
    x = plain_array(what, x)
    if x.dtype != UINT8:
        raise TypeError(f"{what} is {described(x)}; wanted uint8")
    return x if not x.ndim or x.shape[-1] == 1 or x.strides[-1] == 1 else np.ascontiguousarray(x)


def as_values(what: str, x: Any) -> NDArray[Any]:
    """x, with elements of the last axis side by side; TypeError unless it is uint8 or int16."""
    x = plain_array(what, x)
    if x.dtype == UINT8:
        return as_uint8(what, x)
    if x.dtype != INT16:
        raise TypeError(f"{what} is {described(x)}; wanted uint8 or int16")
    lines = not x.ndim or x.shape[-1] == 1 or x.strides[-1] == x.itemsize
    return x if lines and x.flags.aligned else np.require(x, requirements=["C", "A"])


def as_lines(
    name: str, x: Any, taken: Callable[[str, Any], NDArray[Any]] = as_uint8
) -> NDArray[Any]:
    """x (..., N), N > 0."""
    x = taken(f"{name}: x", x)
    if not x.ndim or not x.shape[-1]:
        raise ValueError(f"{name}: x {x.shape}; wanted (..., N) with N > 0")
    return x


def as_scale(name: str, scale: ArrayLike | None) -> float | NDArray[np.float32]:
    """What `check_scale` lets pass: one number, to be rounded to float32, or an array."""
    if isinstance(scale, FLOATS) and FLT_MIN <= (number := float(scale)) <= FLT_MAX:
        return number
    array = check_scale(name, scale)  # type: ignore[arg-type]
    return array if array.ndim else float(array)


def as_byte(what: str, value: Any) -> int:
    if type(value) is int and 0 <= value <= 255:
        return value
    zero = check_zero_point(what, value, np.uint8)
    if zero.ndim:
        raise ValueError(f"{what} {zero.shape}; wanted one integer")
    return int(zero)


def as_factor(what: str, value: Any) -> float:
    """The value rounded to float32."""
    if type(value) is float and abs(value) <= MAX_FACTOR:
        return unpack_float(pack_float(value))[0]  # type: ignore[no-any-return]
    with np.errstate(over="ignore"):
        factors = np.asarray(value, np.float32)
    if factors.ndim or not abs(factors) <= MAX_FACTOR:
        raise ValueError(f"{what}={value!r}; wanted one finite number, magnitude up to 2**96")
    return float(factors)


def as_factors(what: str, values: ArrayLike, x: NDArray[Any]) -> bytes:
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


def as_requantized(
    name: str, multiplier: Any, x_zero_point: Any, zero_point: Any, qmin: Any, qmax: Any
) -> tuple[float, int, int, int, int]:
    factor = as_factor(f"{name}: multiplier", multiplier)
    zero = as_byte(f"{name}: x_zero_point", x_zero_point)
    return factor, zero, *as_clamp(name, zero_point, qmin, qmax)


def check_argument(what: str, value: Any, check: Check) -> None:
    """ValueError unless the value is what a program's step may have, too."""
    if not check.fits(value):
        raise ValueError(f"{what}={value!r}; wanted {check.wanted}")


def as_clamp(
    name: str, zero_point: Any, qmin: Any, qmax: Any, dtype: np.dtype[Any] = UINT8
) -> tuple[int, int, int]:
    """(zero_point, qmin, qmax), checked."""
    zero = as_byte(f"{name}: zero_point", zero_point)
    return zero, *clamp_of(name, dtype, qmin, qmax, zero)


def broadcast_output(
    name: str, a: NDArray[Any], b: NDArray[Any], out: Any, dtype: np.dtype[Any] = UINT8
) -> NDArray[Any]:
    shape = a.shape
    if b.shape != shape:
        try:
            shape = np.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise ValueError(f"{name}: a {a.shape} and b {b.shape} do not broadcast") from None
    if out is not None:
        output_array(name, out, shape, dtype, a)
    return output_array(name, out, shape, dtype, b)


def typed_array(what: str, x: Any, dtype: np.dtype[Any], ndim: int) -> NDArray[Any]:
    """x; TypeError unless it is an array of this dtype, ValueError for another number of axes."""
    x = plain_array(what, x)
    if x.dtype != dtype or x.ndim != ndim:
        axes = {2: "(M, K)", 3: "(.., .., N)", 4: "(B, H, W, C)"}[ndim]
        raise (TypeError if x.dtype != dtype else ValueError)(
            f"{what} {x.shape} {x.dtype}; wanted {axes} {dtype}"
        )
    return x


def output_array(
    name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype[Any], x: NDArray[Any]
) -> NDArray[Any]:
    """The array to write: `out` if it fits, else a new one."""
    if out is None:
        return np.empty(shape, dtype)
    if not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != dtype:
        raise ValueError(f"{name}: out is {described(out)}; wanted {shape} {dtype}")
    if not out.flags.carray:
        raise ValueError(
            f"{name}: out {out.shape} is not C-contiguous, writeable and aligned; "
            f"np.empty({shape}, np.{dtype}) is"
        )
    at, to = address_of(x), address_of(out)
    apart = x.flags.c_contiguous and (to + out.nbytes <= at or at + x.nbytes <= to)
    if not apart and np.may_share_memory(out, x):  # which takes its time
        raise ValueError(f"{name}: out overlaps x; wanted memory of its own")
    return out


def as_zero_points(
    what: str,
    value: ArrayLike,
    dtype: np.dtype[Any] = UINT8,
    ends: tuple[int, int] = (0, 255),
) -> int | NDArray[np.int32]:
    """What `check_zero_point` lets pass: one integer or an array. ends are the dtype's."""
    least, most = ends
    if type(value) in (int, np.int32) and least <= (integer := int(value)) <= most:  # type: ignore[arg-type]
        return integer
    array = check_zero_point(what, value, dtype)
    return array if array.ndim else int(array)


def check_weight(name: str, weight: Any, kind: Any, epilogue: Any) -> None:
    if not isinstance(weight, kind):
        raise TypeError(
            f"{name}: weight is a {type(weight).__name__}; wanted a {kind.__name__}, made once "
            f"from the int8 array: {kind.__name__}(array)"
        )
    if epilogue is None:
        return
    if not isinstance(epilogue, _EPILOGUES):
        raise TypeError(
            f"{name}: epilogue is a {type(epilogue).__name__}; wanted None, Requant or Dequant"
        )
    n = weight.n
    requantizes = isinstance(epilogue, Requant)
    for what in ("multiplier", "add_multiplier") if requantizes else ("scale",):
        factors = getattr(epilogue, what)
        if factors is not None and factors.ndim and factors.shape != (n,):
            raise ValueError(
                f"{name}: {type(epilogue).__name__}.{what} {factors.shape} for {n} outputs; wanted "
                f"({n},) or a scalar"
            )
    bias = epilogue.bias
    if bias is not None and bias.shape != (n,):
        raise ValueError(
            f"{name}: {type(epilogue).__name__}.bias {bias.shape} for {n} outputs; wanted ({n},) "
            "or None"
        )


def check_float_product(
    name: str, weight: Any, kind: type, epilogue: Any, x_qparams: QParams | None
) -> None:
    """TypeError or ValueError unless these are what `linear_float` and `conv2d_float` take."""
    if not isinstance(epilogue, Dequant):
        raise TypeError(f"{name}: epilogue is a {type(epilogue).__name__}; wanted a Dequant")
    check_weight(name, weight, kind, epilogue)
    if x_qparams is not None and not isinstance(x_qparams, QParams):
        raise TypeError(f"{name}: x_qparams is a {type(x_qparams).__name__}; wanted a QParams")
    if x_qparams is not None and (x_qparams.dtype != np.uint8 or x_qparams.axis is not None):
        raise ValueError(
            f"{name}: x_qparams are {x_qparams.dtype}, axis {x_qparams.axis}; "
            "wanted uint8 per tensor (axis None)"
        )
