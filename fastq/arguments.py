"""What the arguments of a program's steps may be: checked before a kernel sees them, for a program
may come from a file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from fastq.qparams import Dequant, Requant
from fastq.weights import LARGEST, Conv2dWeight, LinearWeight

Check = Callable[[Any], bool]


def _whole(low: int, high: int) -> Check:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high


def _real(low: float = -math.inf) -> Check:
    return lambda v: isinstance(v, float | np.floating) and bool(np.isfinite(v) and v > low)


def _kind(*kinds: type) -> Check:
    return lambda v: isinstance(v, kinds)


def _array(dtype: Any, *ndims: int) -> Check:
    def check(v: Any) -> bool:
        if not isinstance(v, np.ndarray | np.generic):
            return False
        finite = v.dtype.kind != "f" or bool(np.isfinite(v).all())
        return v.dtype == dtype and v.ndim in ndims and finite

    return check


def _each(check: Check, count: int | None = None) -> Check:
    def every(v: Any) -> bool:
        return isinstance(v, tuple) and count in (None, len(v)) and all(check(x) for x in v)

    return every


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
SCALE = _real(0.0)
REQUANTIZED = {"zero_point": STEP, "qmin": STEP, "qmax": STEP}
POOL = {"kernel_size": PAIR, "stride": PAIR, "padding": SPAN, "ceil_mode": FLAG}
AVERAGE = {"multiplier": SCALE, "x_zero_point": STEP, **REQUANTIZED}
TWO = {"a_zero_point": STEP, "b_zero_point": STEP, **REQUANTIZED}
RESIZE = {"output_size": _maybe(PAIR), "scale_factor": _maybe(_each(SCALE, 2))}
VECTOR = _array(np.float32, 0, 1)
EPILOGUE = _kind(Requant, Dequant)

# operation -> its arguments, all of them; of those in OPTIONAL some may be missing
ARGUMENTS: dict[str, dict[str, Check]] = {
    "quantize": {"scale": SCALE, "zero_point": STEP, "axes": AXES},
    "dequantize": {"scale": SCALE, "zero_point": STEP},
    "constant": {"value": _array(np.uint8, 0, 1, 2, 3, 4)},
    "conv2d": {"weight": _kind(Conv2dWeight), "epilogue": EPILOGUE, "x_zero_point": STEP},
    "linear": {"weight": _kind(LinearWeight), "epilogue": EPILOGUE, "x_zero_point": STEP},
    "matmul": {"multiplier": SCALE, "a_zero_point": STEP, "transpose_b": FLAG, **REQUANTIZED},
    "add": {"a_multiplier": _real(), "b_multiplier": _real(), **TWO},
    "mul": {"multiplier": SCALE, **TWO},
    "affine": {"multiplier": VECTOR, "shift": VECTOR, "x_zero_point": STEP, **REQUANTIZED},
    "table": {"values": _array(np.uint8, 1, 2)},
    "softmax": {"scale": SCALE},
    "layer_norm": {"multiplier": VECTOR, "shift": VECTOR, "epsilon": _real(), **REQUANTIZED},
    "max_pool2d": {**POOL, "dilation": PAIR},
    "avg_pool2d": {**POOL, "count_include_pad": FLAG,
                   "divisor_override": _maybe(_whole(1, 2**31 - 1)), **AVERAGE},
    "adaptive_avg_pool2d": {"output_size": _each(_maybe(_whole(1, LARGEST)), 2), **AVERAGE},
    "adaptive_max_pool2d": {"output_size": _each(_maybe(_whole(1, LARGEST)), 2)},
    "upsample_nearest2d": RESIZE,
    "upsample_bilinear2d": {**RESIZE, "align_corners": FLAG},
    "reshape": {"sizes": _each(_size), "ones": AXES},
    "permute": {"axes": AXES},
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
    if step.op.startswith("upsample") and (given["output_size"] is None) == (
        given["scale_factor"] is None
    ):
        raise ValueError(f"{step.name}: wanted output_size or scale_factor")


def check_channels(step: Any, x: tuple[int, ...]) -> None:
    """ValueError unless what a step has for each channel fits an input of shape x."""
    if step.op in IMAGES and len(x) != 4:
        raise ValueError(f"{step.op} of shape {x}; wanted (B, H, W, C)")
    for name in ("multiplier", "shift", "values"):
        value = step.arguments.get(name)
        if not isinstance(value, np.ndarray):
            continue
        wanted: Any = (x[-1:], ()) if name != "values" else ((256,), (*x[-1:], 256))
        if value.shape not in wanted:
            raise ValueError(f"{step.op}: {name} {value.shape}; wanted one of {wanted}")


IMAGES = ("conv2d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
          "upsample_nearest2d", "upsample_bilinear2d", "dilate")  # fmt: skip
