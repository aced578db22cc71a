"""What the arguments of a program's steps may be: checked before a kernel sees them, for a program
may come from a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastq.qparams import (
    FLT_MAX,
    GATES,
    MAX_FACTOR,
    MAX_FEATURES,
    MAX_WIDE_FEATURES,
    UNCLAMPED,
    Dequant,
    Requant,
    clamp_of,
)
from fastq.sizes import Size
from fastq.weights import LARGEST, Conv2dWeight, LinearWeight


@dataclass(frozen=True)
class Check:
    """What an argument has to be, and whether a value is that."""

    wanted: str
    fits: Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    def fits(v: Any) -> bool:
        return isinstance(v, int) and not isinstance(v, bool) and low <= v <= high

    return Check(f"an int from {low} to {high}", fits)


def _real(low: float, high: float) -> Check:
    def fits(v: Any) -> bool:
        return isinstance(v, float | np.floating) and low <= float(v) <= high

    return Check(f"a float from {low:.3g} to {high:.3g}", fits)


def _kind(*kinds: type) -> Check:
    return Check(" or ".join(kind.__name__ for kind in kinds), lambda v: isinstance(v, kinds))


def _array(dtype: Any, *ndims: int) -> Check:
    def fits(v: Any) -> bool:
        if not isinstance(v, np.ndarray | np.generic):
            return False
        small = v.dtype.kind != "f" or bool((np.abs(v) <= MAX_FACTOR).all())
        return v.dtype == dtype and v.ndim in ndims and small

    most = f", each up to {MAX_FACTOR:.3g}" if dtype is np.float32 else ""
    return Check(f"{np.dtype(dtype)} of {' or '.join(map(str, ndims))} axes{most}", fits)


def _is_value(v: Any) -> bool:
    return isinstance(v, np.ndarray) and v.dtype in (np.uint8, np.int16) and v.ndim <= 4


def _is_factor(v: Any) -> bool:
    return VECTORS.fits(v) and bool((v > 0).all())


def _each(check: Check, count: int | None = None) -> Check:
    def fits(v: Any) -> bool:
        return isinstance(v, tuple) and count in (None, len(v)) and all(map(check.fits, v))

    many = "of any length" if count is None else f"of {count}"
    return Check(f"a tuple {many}, each {check.wanted}", fits)


def _maybe(check: Check) -> Check:
    return Check(f"None or {check.wanted}", lambda v: v is None or check.fits(v))


def _or_size(check: Check) -> Check:
    return Check(f"{check.wanted}, or a Size", lambda v: isinstance(v, Size) or check.fits(v))


def _is_order(v: Any) -> bool:
    return AXES.fits(v) and sorted(v) == list(range(len(v)))


def _is_size(v: Any) -> bool:
    if isinstance(v, tuple):
        return len(v) >= 2 and AXES.fits(v[0]) and all(map(_or_size(DIVISOR).fits, v[1:]))
    return _or_size(COUNT).fits(v)


def _is_mode(v: Any) -> bool:
    return isinstance(v, str) and v in NUMPY_MODES


# torch's name of what lies around a value that is padded -> NumPy's
NUMPY_MODES = {"constant": "constant", "reflect": "reflect", "replicate": "edge",
               "circular": "wrap"}  # fmt: skip
MAX_AXES = 32  # of a value
BYTE = _whole(0, 255)
COUNT = _whole(0, 2**40)
DIVISOR = _whole(1, LARGEST)
AXES = _each(_whole(0, MAX_AXES - 1))
ORDER = Check("a tuple of all axes, each once", _is_order)
SIZE = Check(f"{COUNT.wanted}, a Size, or (axes, divisor, ...)", _is_size)
PAIR = _each(_whole(1, LARGEST), 2)
SPAN = _each(_whole(0, LARGEST), 2)
FLAG = _kind(bool)
DTYPE = Check("'uint8' or 'int16'", lambda v: isinstance(v, str) and v in ("uint8", "int16"))
RESULT = Check("'uint8' or 'float32'", lambda v: isinstance(v, str) and v in ("uint8", "float32"))
SCALE = _real(float(np.finfo(np.float32).smallest_subnormal), FLT_MAX)  # a divisor in float32
FACTOR = _real(-MAX_FACTOR, MAX_FACTOR)
EPSILON = _real(1e-70, FLT_MAX)  # its root's inverse stays finite in float32
MULTIPLIER = _real(float(np.finfo(np.float64).smallest_subnormal), MAX_FACTOR)
REQUANTIZED = {"zero_point": BYTE, "qmin": BYTE, "qmax": BYTE}
END = _whole(-(2**15), 2**15 - 1)  # of a clamp; within the dtype, see `clamp_of`
POOL = {"kernel_size": PAIR, "stride": PAIR, "padding": SPAN, "ceil_mode": FLAG}
OVERRIDE = _whole(1, 2**31 - 1)
AVERAGE = {"multiplier": MULTIPLIER, "x_zero_point": BYTE, **REQUANTIZED}
TWO = {"a_zero_point": BYTE, "b_zero_point": BYTE, **REQUANTIZED}
RESIZED = _each(_real(2.0**-64, 2.0**64), 2)  # so that positions in the input stay finite
RESIZE = {
    "output_size": _maybe(_each(_or_size(_whole(1, LARGEST)), 2)),
    "scale_factor": _maybe(RESIZED),
}
VECTOR, VECTORS = _array(np.float32, 0, 1), _array(np.float32, 1)
NORM = {"multiplier": VECTOR, "shift": VECTOR, "epsilon": EPSILON, **REQUANTIZED}
FACTORS = Check(f"{VECTORS.wanted}, over 0", _is_factor)
EPILOGUE = _kind(Requant, Dequant)

GAIN = _real(float(np.finfo(np.float32).smallest_subnormal), MAX_FACTOR)
CELL = Check(f"one of {', '.join(GATES)}", lambda v: isinstance(v, str) and v in GATES)

# operation -> its arguments, all of them
ARGUMENTS: dict[str, dict[str, Check]] = {
    "quantize": {"scale": SCALE, "zero_point": BYTE, "axes": ORDER, "dtype": DTYPE},
    "grid": {"factor": FACTORS, "shift": VECTORS, "padding": _each(SPAN, 2), "axes": ORDER},
    "dequantize": {"scale": SCALE, "zero_point": BYTE},
    "constant": {"value": Check("uint8 or int16 of up to 4 axes", _is_value)},
    "conv2d": {"weight": _kind(Conv2dWeight), "epilogue": EPILOGUE, "x_zero_point": BYTE},
    "linear": {"weight": _kind(LinearWeight), "epilogue": EPILOGUE, "x_zero_point": BYTE},
    "matmul": {"multiplier": MULTIPLIER, "a_zero_point": BYTE, "transpose_b": FLAG, "mean": FLAG,
               **REQUANTIZED, "dtype": RESULT},
    "add": {"a_multiplier": FACTOR, "b_multiplier": FACTOR, **TWO, "qmin": END, "qmax": END,
            "dtype": DTYPE},
    "mul": {"multiplier": MULTIPLIER, **TWO},
    "affine": {"multiplier": VECTOR, "shift": VECTOR, "x_zero_point": BYTE, **REQUANTIZED},
    "table": {"values": _array(np.uint8, 1, 2)},
    "recurrent": {"cell": CELL, "weight": _kind(LinearWeight), "epilogue": _kind(Dequant),
                  "x_scale": GAIN, "multiplier": SCALE, "axis": _whole(0, 1), "reverse": FLAG,
                  **REQUANTIZED},
    "softmax": {"scale": SCALE, "uniform": FLAG},
    "softmax_weights": {"scale": SCALE, "uniform": FLAG},
    "layer_norm": NORM,
    "rms_norm": {"multiplier": VECTOR, "epsilon": EPSILON, "x_zero_point": BYTE, **REQUANTIZED},
    "group_norm": {"groups": _whole(1, LARGEST), **NORM},
    "global_response_norm": {"residual": FACTOR, "x_zero_point": BYTE, **NORM},
    "max_pool2d": {**POOL, "dilation": PAIR},
    "avg_pool2d": {**POOL, "count_include_pad": FLAG,
                   "divisor_override": _maybe(OVERRIDE), **AVERAGE},
    "adaptive_avg_pool2d": {"output_size": _each(_maybe(_whole(1, LARGEST)), 2), **AVERAGE},
    "adaptive_max_pool2d": {"output_size": _each(_maybe(_whole(1, LARGEST)), 2)},
    "upsample_nearest2d": RESIZE,
    "upsample_bilinear2d": {**RESIZE, "align_corners": FLAG},
    "reshape": {"sizes": _each(SIZE), "ones": AXES},
    "permute": {"axes": ORDER},
    "slice": {"axis": _whole(0, MAX_AXES - 1), "start": _whole(-LARGEST, LARGEST),
              "end": _maybe(_whole(-LARGEST, LARGEST)), "step": _whole(1, LARGEST)},
    "concat": {"axis": _whole(0, MAX_AXES - 1)},
    "pad": {"widths": _each(_each(_whole(-LARGEST, LARGEST), 2)), "value": BYTE,
            "output_size": _maybe(_each(_maybe(_or_size(_whole(0, LARGEST))))),
            "mode": Check(f"one of {', '.join(NUMPY_MODES)}", _is_mode)},
    "dilate": {"stride": PAIR, "padding": _each(SPAN, 2), "value": BYTE},
}  # fmt: skip
OPERANDS = {"constant": 0, "matmul": 2, "add": 2, "mul": 2}  # 1 for all others
ADDING = ("conv2d", "linear")  # take a second one where their epilogue adds it
MASKED = ("softmax", "softmax_weights")  # take a second one, their mask, or not


def check_arguments(step: Any) -> None:
    """ValueError unless a step has its operation's inputs and arguments, each of its kind."""
    count, wanted = len(step.inputs), OPERANDS.get(step.op, 1)
    epilogue = step.arguments.get("epilogue")
    if step.op in ADDING and getattr(epilogue, "add_multiplier", None) is not None:
        wanted = 2
    if step.op in MASKED and count == 2:
        wanted = 2
    if count != wanted if step.op != "concat" else count == 0:
        raise ValueError(f"{step.name}: {step.op} of {count} inputs; wanted {wanted}")
    checks = ARGUMENTS[step.op]
    given = step.arguments
    if given.keys() != checks.keys():
        raise ValueError(f"{step.name}: {step.op} with {sorted(given)}; wanted {sorted(checks)}")
    for name, check in checks.items():
        if not check.fits(given[name]):
            raise ValueError(
                f"{step.name}: {step.op} with {name}={given[name]!r:.80}; wanted {check.wanted}"
            )
    if given.get("dtype") == "float32":
        clamp = given["zero_point"], given["qmin"], given["qmax"]
        if clamp != UNCLAMPED:
            raise ValueError(
                f"{step.name}: zero_point, qmin and qmax {clamp} of float32; wanted {UNCLAMPED}"
            )
    elif "qmin" in given or "dtype" in given:
        dtype = np.dtype(given.get("dtype", "uint8"))
        clamp_of(step.name, dtype, given.get("qmin"), given.get("qmax"), given["zero_point"])
    if given.get("mean") and given["a_zero_point"]:
        raise ValueError(f"{step.name}: a mean with a_zero_point={given['a_zero_point']}; wanted 0")
    _check_epilogue(step.name, epilogue)
    if step.op == "recurrent":
        check_cell(step.name, given["cell"], given["weight"], epilogue)
    if "padding" in given and "kernel_size" in given:
        sides = zip(given["padding"], given["kernel_size"], strict=True)
        if any(2 * before > kernel for before, kernel in sides):
            raise ValueError(
                f"{step.name}: {step.op} with padding={given['padding']} for "
                f"kernel_size={given['kernel_size']}; wanted up to half"
            )
    if step.op == "pad":
        _check_padding(step.name, given)
    if step.op.startswith("upsample") and (given["output_size"] is None) == (
        given["scale_factor"] is None
    ):
        raise ValueError(f"{step.name}: wanted output_size or scale_factor")


def _check_padding(name: str, given: Any) -> None:
    """ValueError for a padding whose numbers do not go together."""
    widths, sizes = given["widths"], given["output_size"] or (None,) * len(given["widths"])
    if len(sizes) != len(widths):
        raise ValueError(f"{name}: pad of {len(widths)} axes to {sizes}; wanted as many sizes")
    for sides, size in zip(widths, sizes, strict=True):
        if size is not None and (min(sides) < 0 or not 0 < sum(sides) <= 2):
            raise ValueError(f"{name}: pad with shares {sides} of an axis that is to have {size}")
    least = min((side for sides in widths for side in sides), default=0)
    if given["mode"] != "constant" and least < 0:
        raise ValueError(f"{name}: pad {given['mode']} by {widths}; wanted widths >= 0")


def check_cell(name: str, cell: str, weight: LinearWeight, epilogue: Dequant) -> None:
    """ValueError unless a recurrent layer's weight and epilogue are of its cell's gates, and all
    that they give is finite: 0 times infinity is NaN."""
    gates, features = GATES[cell], weight.k
    if weight.n != gates * features or not features:
        raise ValueError(
            f"{name}: weight {weight.data.shape} of a cell {cell!r}; wanted ({gates} * H, H), H > 0"
        )
    _check_epilogue(name, epilogue)
    for what, value in (("scale", epilogue.scale), ("bias", epilogue.bias)):
        if value is not None and value.shape not in ((), (weight.n,)):
            raise ValueError(f"{name}: Dequant.{what} {value.shape}; wanted ({weight.n},)")
    if epilogue.bias is not None and np.abs(epilogue.bias).max() > MAX_FACTOR:
        raise ValueError(f"{name}: Dequant.bias beyond {MAX_FACTOR:.3g}")
    if (epilogue.fmin, epilogue.fmax) != (-np.inf, np.inf):
        raise ValueError(
            f"{name}: Dequant from {epilogue.fmin} to {epilogue.fmax}; wanted no clamp"
        )


def _check_epilogue(name: str, epilogue: Any) -> None:
    """ValueError for one per row, and for factors that make NaN of infinities."""
    match epilogue:
        case Dequant(scale, x_scale):
            if x_scale.ndim:
                raise ValueError(f"{name}: Dequant.x_scale {x_scale.shape}; wanted a scalar")
            factors = [scale.astype(np.float64) * x_scale]
        case Requant(multiplier):
            factors = [multiplier.astype(np.float64)]
            if epilogue.add_multiplier is not None:
                factors.append(np.abs(epilogue.add_multiplier.astype(np.float64)))
        case _:
            return
    largest = max(float(np.max(factor, initial=0.0)) for factor in factors)
    if largest > MAX_FACTOR:
        raise ValueError(
            f"{name}: an epilogue with a factor of {largest:.3g}; wanted up to {MAX_FACTOR:.3g}"
        )


def check_channels(step: Any, x: tuple[int, ...], dtype: str) -> None:
    """ValueError unless what a step has for each channel fits an input of shape x."""
    if step.op in IMAGES and (len(x) != 4 or 0 in x[1:3]):
        raise ValueError(f"{step.op} of shape {x}; wanted (B, H, W, C) with H, W > 0")
    most = MAX_WIDE_FEATURES if dtype == "int16" else MAX_FEATURES
    if step.op in LINES and not (x and 0 < x[-1] <= most):
        raise ValueError(f"{step.op} of {dtype} of shape {x}; wanted (..., N), 0 < N, up to {most}")
    for name in ("multiplier", "shift", "values") if step.op != "grid" else ():
        value = step.arguments.get(name)
        if not isinstance(value, np.ndarray):
            continue
        wanted: Any = (x[-1:], ()) if name != "values" else ((256,), (*x[-1:], 256))
        if value.shape not in wanted:
            raise ValueError(f"{step.op}: {name} {value.shape}; wanted one of {wanted}")


LINES = (*MASKED, "layer_norm", "rms_norm")
IMAGES = ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "upsample_nearest2d", "upsample_bilinear2d", "dilate")  # fmt: skip
