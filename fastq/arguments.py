"""What the arguments of a program's steps may be: checked before a kernel sees them, for a program
may come from a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastq.qparams import FLT_MAX, MAX_FEATURES, Dequant, Requant
from fastq.weights import LARGEST, Conv2dWeight, LinearWeight

Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _real(v: Any) -> bool:
    return isinstance(v, float | np.floating) and math.isfinite(v)


def _scale(v: Any) -> bool:
    """What is divided by in float32."""
    return _real(v) and 0 < v <= FLT_MAX and float(np.float32(v)) > 0


def _factor(v: Any) -> bool:
    return _real(v) and abs(v) <= LARGEST_FACTOR


def _multiplier(v: Any) -> bool:
    return _factor(v) and v > 0


def _epsilon(v: Any) -> bool:
    return _real(v) and v > 0


def _kind(*kinds: type) -> Check:
    return lambda v: isinstance(v, kinds)


def _array(dtype: Any, *ndims: int) -> Check:
    def check(v: Any) -> bool:
        if not isinstance(v, np.ndarray | np.generic):
            return False
        small = v.dtype.kind != "f" or bool((np.abs(v) <= LARGEST_FACTOR).all())
        return v.dtype == dtype and v.ndim in ndims and small

    return check


def _each(check: Check, count: int | None = None) -> Check:
    def every(v: Any) -> bool:
        return isinstance(v, tuple) and count in (None, len(v)) and all(check(x) for x in v)

    return every


def _order(v: Any) -> bool:
    """Of all axes."""
    return isinstance(v, tuple) and all(map(_whole(0, 63), v)) and sorted(v) == list(range(len(v)))


def _maybe(check: Check) -> Check:
    return lambda v: v is None or check(v)


def _size(v: Any) -> bool:
    """Of a reshape: a number, or (axes, divisor)."""
    if isinstance(v, tuple):
        return len(v) == 2 and AXES(v[0]) and _whole(1, LARGEST)(v[1])
    return COUNT(v)


STEP = _whole(0, 255)
COUNT = _whole(0, 2**40)
AXES = _each(_whole(0, 63))
PAIR = _each(_whole(1, LARGEST), 2)
SPAN = _each(_whole(0, LARGEST), 2)
FLAG = _kind(bool)
LARGEST_FACTOR = 2.0**96  # a product with it stays finite in float32
REQUANTIZED = {"zero_point": STEP, "qmin": STEP, "qmax": STEP}
POOL = {"kernel_size": PAIR, "stride": PAIR, "padding": SPAN, "ceil_mode": FLAG}
AVERAGE = {"multiplier": _multiplier, "x_zero_point": STEP, **REQUANTIZED}
TWO = {"a_zero_point": STEP, "b_zero_point": STEP, **REQUANTIZED}
RESIZE = {"output_size": _maybe(PAIR), "scale_factor": _maybe(_each(_scale, 2))}
VECTOR = _array(np.float32, 0, 1)
EPILOGUE = _kind(Requant, Dequant)

# operation -> its arguments, all of them; of those in OPTIONAL some may be missing
ARGUMENTS: dict[str, dict[str, Check]] = {
    "quantize": {"scale": _scale, "zero_point": STEP, "axes": _order},
    "dequantize": {"scale": _scale, "zero_point": STEP},
    "constant": {"value": _array(np.uint8, 0, 1, 2, 3, 4)},
    "conv2d": {"weight": _kind(Conv2dWeight), "epilogue": EPILOGUE, "x_zero_point": STEP},
    "linear": {"weight": _kind(LinearWeight), "epilogue": EPILOGUE, "x_zero_point": STEP},
    "matmul": {"multiplier": _multiplier, "a_zero_point": STEP, "transpose_b": FLAG, **REQUANTIZED},
    "add": {"a_multiplier": _factor, "b_multiplier": _factor, **TWO},
    "mul": {"multiplier": _multiplier, **TWO},
    "affine": {"multiplier": VECTOR, "shift": VECTOR, "x_zero_point": STEP, **REQUANTIZED},
    "table": {"values": _array(np.uint8, 1, 2)},
    "softmax": {"scale": _scale},
    "layer_norm": {"multiplier": VECTOR, "shift": VECTOR, "epsilon": _epsilon, **REQUANTIZED},
    "max_pool2d": {**POOL, "dilation": PAIR},
    "avg_pool2d": {**POOL, "count_include_pad": FLAG,
                   "divisor_override": _maybe(_whole(1, 2**31 - 1)), **AVERAGE},
    "adaptive_avg_pool2d": {"output_size": _each(_maybe(_whole(1, LARGEST)), 2), **AVERAGE},
    "adaptive_max_pool2d": {"output_size": _each(_maybe(_whole(1, LARGEST)), 2)},
    "upsample_nearest2d": RESIZE,
    "upsample_bilinear2d": {**RESIZE, "align_corners": FLAG},
    "reshape": {"sizes": _each(_size), "ones": AXES},
    "permute": {"axes": _order},
    "slice": {"axis": _whole(0, 63), "start": _whole(-LARGEST, LARGEST),
              "end": _maybe(_whole(-LARGEST, LARGEST)), "step": _whole(1, LARGEST)},
    "concat": {"axis": _whole(0, 63)},
    "pad": {"widths": _each(_each(_whole(0, LARGEST), 2)), "value": STEP},
    "dilate": {"stride": PAIR, "padding": _each(SPAN, 2), "value": STEP},
}  # fmt: skip
OPERANDS = {"constant": 0, "matmul": 2, "add": 2, "mul": 2}  # 1 for all others
TWO_OPERANDS_ARE_FINE = ("conv2d", "linear")


def check_arguments(step: Any) -> None:
    """ValueError unless a step has its operation's inputs and arguments, each of its kind."""
    count, wanted = len(step.inputs), OPERANDS.get(step.op, 1)
    epilogue = step.arguments.get("epilogue")
    if step.op in TWO_OPERANDS_ARE_FINE and getattr(epilogue, "add_multiplier", None) is not None:
        wanted = 2
    if count != wanted if step.op != "concat" else count == 0:
        raise ValueError(f"{step.name}: {step.op} of {count} inputs; wanted {wanted}")
    checks = ARGUMENTS[step.op]
    given = step.arguments
    if given.keys() != checks.keys():
        raise ValueError(f"{step.name}: {step.op} with {sorted(given)}; wanted {sorted(checks)}")
    for name, check in checks.items():
        if not check(given[name]):
            raise ValueError(f"{step.name}: {step.op} with {name}={given[name]!r:.80}")
    if given.get("qmin", 0) > given.get("qmax", 255):
        raise ValueError(f"{step.name}: qmin={given['qmin']} over qmax={given['qmax']}")
    if isinstance(epilogue, Dequant) and epilogue.x_scale.ndim:
        raise ValueError(f"{step.name}: Dequant.x_scale {epilogue.x_scale.shape}; wanted a scalar")
    if "padding" in given and "kernel_size" in given:
        sides = zip(given["padding"], given["kernel_size"], strict=True)
        if any(2 * before > kernel for before, kernel in sides):
            raise ValueError(
                f"{step.name}: {step.op} with padding={given['padding']} for "
                f"kernel_size={given['kernel_size']}; wanted up to half"
            )
    if step.op.startswith("upsample") and (given["output_size"] is None) == (
        given["scale_factor"] is None
    ):
        raise ValueError(f"{step.name}: wanted output_size or scale_factor")


def check_channels(step: Any, x: tuple[int, ...]) -> None:
    """ValueError unless what a step has for each channel fits an input of shape x."""
    if step.op in IMAGES and (len(x) != 4 or 0 in x[1:3]):
        raise ValueError(f"{step.op} of shape {x}; wanted (B, H, W, C) with H, W > 0")
    if step.op in LINES and not (x and 0 < x[-1] <= MAX_FEATURES):
        raise ValueError(f"{step.op} of shape {x}; wanted (..., N), 0 < N <= {MAX_FEATURES}")
    for name in ("multiplier", "shift", "values"):
        value = step.arguments.get(name)
        if not isinstance(value, np.ndarray):
            continue
        wanted: Any = (x[-1:], ()) if name != "values" else ((256,), (*x[-1:], 256))
        if value.shape not in wanted:
            raise ValueError(f"{step.op}: {name} {value.shape}; wanted one of {wanted}")


LINES = ("softmax", "layer_norm")
IMAGES = ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "upsample_nearest2d", "upsample_bilinear2d", "dilate")  # fmt: skip
