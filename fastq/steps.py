"""What the steps of a program compute, on `reference` or on `ops`, and the shapes of their values.

Values are NumPy arrays, images NHWC. An operation, a key of OPERATIONS, is called as its function
in `reference` and `ops`. Those that only move values have none: they are NumPy's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.arguments import MAX_AXES, NUMPY_MODES
from fastq.qparams import MAX_K
from fastq.sizes import Shape, Shapes, Size, parted, sized

Array = NDArray[Any]
MAX_VALUES = 2**44  # of one array: addresses stay within int64
MAX_TAPS = 2**24  # of all windows along an axis: pooling lists them


@dataclass(frozen=True, eq=False)
class Step:
    """name = op(*inputs, **arguments).

    op         a key of OPERATIONS.
    arguments  by the names of the function of `reference`: plain values, arrays, weights and
               epilogues. Read-only: a program checks them once.
    layer      the float network's module that this is, for reports.
    """

    op: str
    name: str
    inputs: tuple[str, ...]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    layer: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "arguments", MappingProxyType(dict(self.arguments)))

    def __reduce__(self) -> Any:  # of a MappingProxyType there is no copy and no pickle
        return Step, (self.op, self.name, self.inputs, dict(self.arguments), self.layer)

    def sized(self, shapes: Shapes) -> Step:
        """With the numbers that its `Size` arguments are, for inputs of these shapes."""
        given = self.arguments.get("output_size") or self.arguments.get("sizes") or ()
        if not any(isinstance(size, Size) for size in given):
            return self
        return replace(self, arguments=sized(dict(self.arguments), shapes))

    def __str__(self) -> str:
        shown = ", ".join([*self.inputs, *(f"{k}={_short(v)}" for k, v in self.arguments.items())])
        return f"{self.name} = {self.op}({shown})"


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    data = getattr(value, "data", None)
    if isinstance(data, np.ndarray):
        return f"s8{list(data.shape)}"
    if hasattr(value, "multiplier"):
        kind = "u8" if value.dtype == np.uint8 else "s16"
        return f"{kind}(zero_point={value.zero_point}, {value.qmin}..{value.qmax})"
    if hasattr(value, "fmin"):
        return "f32"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, eq=False)
class Operation:
    """What a step of this kind computes, and the shape of its value.

    run    function(module, step, *arrays): module is `reference` or `ops`, which has it fast.
    shape  function(step, *shapes) -> shape; raises ValueError for shapes that do not fit.
    """

    run: Callable[..., Array]
    shape: Callable[..., Shape]


def check_size(shape: Shape) -> None:
    """ValueError for an array that cannot be, even where one of its axes is empty."""
    if len(shape) > MAX_AXES or prod(max(n, 1) for n in shape) > MAX_VALUES:
        raise ValueError(f"shape {shape}; wanted up to {MAX_AXES} axes, {MAX_VALUES} values")


def _plain(module: Any, step: Step, *arrays: Array) -> Array:
    """The function of this name."""
    return getattr(module, step.op)(*arrays, **step.arguments)  # type: ignore[no-any-return]


def _product(module: Any, step: Step, x: Array, *add: Array) -> Array:
    """conv2d, and linear of any number of leading axes."""
    arguments = dict(step.arguments)
    weight, epilogue = arguments.pop("weight"), arguments.pop("epilogue")
    if step.op == "conv2d":
        extra = {"add": add[0]} if add else {}
        return module.conv2d(x, weight, epilogue, **arguments, **extra)  # type: ignore[no-any-return]
    extra = {"add": add[0].reshape(prod(x.shape[:-1]), weight.n)} if add else {}
    rows = x.reshape(prod(x.shape[:-1]), x.shape[-1])
    y = module.linear(rows, weight, epilogue, **arguments, **extra)
    return y.reshape(*x.shape[:-1], weight.n)  # type: ignore[no-any-return]


def _quantize(module: Any, step: Step, x: Array) -> Array:
    a = step.arguments
    x = x.transpose(a["axes"]).copy()
    parameters = {name: a[name] for name in ("scale", "zero_point", "dtype")}
    return module.quantize(x, **parameters)  # type: ignore[no-any-return]


def _grid(module: Any, step: Step, x: Array) -> Array:
    a = step.arguments
    shape = _gridded(step, x.shape)
    x = x.transpose(a["axes"]).copy()
    x = x.reshape(len(x), *((1, 1), x.shape[1:3])[x.ndim == 4], x.shape[-1])
    y = module.grid(x, a["factor"], a["shift"], padding=a["padding"])
    return y.reshape(shape)  # type: ignore[no-any-return]


def _softmax(module: Any, step: Step, x: Array, *mask: Array) -> Array:
    a = step.arguments
    function = getattr(module, step.op)
    return function(x, a["scale"], *mask, uniform=a["uniform"])  # type: ignore[no-any-return]


def _adaptive_pool(module: Any, step: Step, x: Array) -> Array:
    arguments = {**step.arguments, "output_size": _adaptive(step, x.shape)[1:3]}
    return getattr(module, step.op)(x, **arguments)  # type: ignore[no-any-return]


def _upsample(module: Any, step: Step, x: Array) -> Array:
    arguments = {**step.arguments, "output_size": _upsampled(step, x.shape)[1:3]}
    return getattr(module, step.op)(x, **arguments)  # type: ignore[no-any-return]


def _reshape(module: Any, step: Step, x: Array) -> Array:
    return x.reshape(_reshaped(step, x.shape))


def _permute(module: Any, step: Step, x: Array) -> Array:
    return x.transpose(step.arguments["axes"]).copy()


def _slice(module: Any, step: Step, x: Array) -> Array:
    return np.ascontiguousarray(x[slice_index(step, x.ndim)])


def slice_index(step: Step, rank: int) -> tuple[slice, ...]:
    """The index that a slice takes."""
    a = step.arguments
    index = [slice(None)] * rank
    index[a["axis"]] = slice(a["start"], a["end"], a["step"])
    return tuple(index)


def _concat(module: Any, step: Step, *arrays: Array) -> Array:
    axis = step.arguments["axis"]
    whole = _concatenated(step, *(x.shape for x in arrays))
    parts = [np.broadcast_to(x, (*whole[:axis], x.shape[axis], *whole[axis + 1 :])) for x in arrays]
    return np.concatenate(parts, axis)


def _pad(module: Any, step: Step, x: Array) -> Array:
    widths, mode = pad_widths(step, x.shape), NUMPY_MODES[step.arguments["mode"]]
    inside, _ = kept_places(widths, x.shape)
    more = [(max(before, 0), max(after, 0)) for before, after in widths]
    value = {"constant_values": step.arguments["value"]} if mode == "constant" else {}
    return np.pad(x[inside], more, mode, **value)  # type: ignore[call-overload, no-any-return]


def pad_widths(step: Step, shape: Shape) -> tuple[tuple[int, int], ...]:
    """How many places are put before and after each axis; cut off, where that is below 0.

    An axis that is to have an `output_size` gets what it lacks; its widths are shares of that then.
    """
    widths, sizes = step.arguments["widths"], step.arguments["output_size"]
    if sizes is None:
        return widths  # type: ignore[no-any-return]
    return tuple(
        sides if size is None else parted(size - n, sides)
        for n, sides, size in zip(shape, widths, sizes, strict=True)
    )


def kept_places(
    widths: Sequence[tuple[int, int]], shape: Shape
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Which places of a value are kept, and where they are in what it is padded to."""
    sides = [*zip(shape, widths, strict=True)]
    kept = tuple(slice(max(-a, 0), n - max(-b, 0)) for n, (a, b) in sides)
    places = tuple(slice(max(a, 0), n + a + b - max(b, 0)) for n, (a, b) in sides)
    return kept, places


def _dilate(module: Any, step: Step, x: Array) -> Array:
    """Pixels apart: what a transposed convolution reads."""
    a = step.arguments
    y = np.full(_dilated(step, x.shape), a["value"], np.uint8)
    (top, _), (left, _) = a["padding"]
    sh, sw = a["stride"]
    h, w = (x.shape[1] - 1) * sh + 1, (x.shape[2] - 1) * sw + 1
    y[:, top : top + h : sh, left : left + w : sw] = x
    return y


# ----------------------------------------------------------------------- the shapes of their values


def _recurrent(step: Step, x: Shape) -> Shape:
    weight = step.arguments["weight"]
    if len(x) != 3 or x[2] != weight.n:
        raise ValueError(f"recurrent: x {x}, wanted (.., .., {weight.n})")
    if x[step.arguments["axis"]] == 0:
        raise ValueError(f"recurrent: x {x}; wanted a sequence of one step or more")
    return (*x[:2], weight.k)


def _same(step: Step, x: Shape, *others: Shape) -> Shape:
    return x


def _broadcast(step: Step, x: Shape, y: Shape) -> Shape:
    return np.broadcast_shapes(x, y)


def _conv2d(step: Step, x: Shape, *add: Shape) -> Shape:
    weight = step.arguments["weight"]
    if len(x) != 4 or x[3] != weight.c:
        raise ValueError(f"conv2d: x {x}, wanted (B, H, W, {weight.c})")
    padded = (n + sum(sides) for n, sides in zip(x[1:3], weight.padding, strict=True))
    check_size((x[0], *padded, x[3]))
    y = (x[0], *weight.output_size(*x[1:3]), weight.n)
    if add and add[0] != y:
        raise ValueError(f"conv2d: add {add[0]}, wanted {y}")
    return y


def _linear(step: Step, x: Shape, *add: Shape) -> Shape:
    weight = step.arguments["weight"]
    if not x or x[-1] != weight.k:
        raise ValueError(f"linear: x {x}, wanted (..., {weight.k})")
    y = (*x[:-1], weight.n)
    if add and add[0] != y:
        raise ValueError(f"linear: add {add[0]}, wanted {y}")
    return y


def _pooled(step: Step, x: Shape) -> Shape:
    """A pixel for each window."""
    a = step.arguments
    stride = a.get("stride") or a["kernel_size"]
    sizes = []
    for axis in range(2):
        k, s, p = a["kernel_size"][axis], stride[axis], a["padding"][axis]
        d = a.get("dilation", (1, 1))[axis]
        span = x[1 + axis] + 2 * p - d * (k - 1) - 1
        count = (span + (s - 1 if a["ceil_mode"] else 0)) // s + 1
        if a["ceil_mode"] and (count - 1) * s >= x[1 + axis] + p:
            count -= 1
        if count < 1:
            raise ValueError(f"{step.op}: input {x} is smaller than the window {a['kernel_size']}")
        if count * k > MAX_TAPS:
            raise ValueError(f"{step.op}: {count} windows of {k}; wanted up to {MAX_TAPS} taps")
        sizes.append(count)
    return (x[0], *sizes, x[3])


def _adaptive(step: Step, x: Shape) -> Shape:
    size = step.arguments["output_size"]
    return (x[0], *(n if n is not None else m for n, m in zip(size, x[1:3], strict=True)), x[3])


def _upsampled(step: Step, x: Shape) -> Shape:
    a = step.arguments
    if a.get("output_size"):
        if min(a["output_size"]) < 1:
            raise ValueError(f"{step.op}: to {a['output_size']}; wanted a pixel at least")
        return (x[0], *a["output_size"], x[3])
    sizes = [int(n * f) for n, f in zip(x[1:3], a["scale_factor"], strict=True)]
    return (x[0], *sizes, x[3])


def _masked(step: Step, x: Shape, *mask: Shape) -> Shape:
    for m in mask:
        if len(m) != len(x) or m[-1] != x[-1] or np.broadcast_shapes(x, m) != x:
            raise ValueError(f"{step.op}: mask {m} of {x}; wanted the other axes as x's or 1")
    return x


def _grouped(step: Step, x: Shape) -> Shape:
    groups = step.arguments.get("groups", 1)
    if not 2 <= len(x) <= 4 or 0 in x[1:] or x[-1] % groups:
        raise ValueError(f"{step.op}: x {x}; wanted (B, ..., C) of 2 to 4 axes, {groups} groups")
    return x


def _matmul(step: Step, a: Shape, b: Shape) -> Shape:
    if min(len(a), len(b)) < 2:
        raise ValueError(f"matmul: {a} by {b}; wanted two axes or more")
    k, n = b[-2:][:: -1 if step.arguments.get("transpose_b") else 1]
    if a[-1] != k or k > MAX_K:
        raise ValueError(f"matmul: {a} by {b}; the sums are exact up to K={MAX_K}")
    return (*np.broadcast_shapes(a[:-2], b[:-2]), a[-2], n)


def _reshaped(step: Step, x: Shape) -> Shape:
    a = step.arguments
    if any(x[axis] != 1 for axis in a["ones"]):
        raise ValueError(f"reshape: {x}, wanted size 1 on the axes {a['ones']}")
    shape = tuple(
        n if isinstance(n, int) else prod(x[i] for i in n[0]) // max(prod(n[1:]), 1)
        for n in a["sizes"]
    )
    if prod(shape) != prod(x) or min(shape, default=0) < 0:
        raise ValueError(f"reshape: {x} into {shape}")
    return shape


def _permuted(step: Step, x: Shape) -> Shape:
    axes = step.arguments["axes"]
    if len(axes) != len(x):
        raise ValueError(f"{step.op}: {x} by axes {axes}; wanted all axes")
    return tuple(x[axis] for axis in axes)


def _gridded(step: Step, x: Shape) -> Shape:
    """An image is padded; of rows each feature is a channel."""
    a = step.arguments
    (*outer, channels), padding = _permuted(step, x), a["padding"]
    if a["factor"].shape != (channels,) or a["shift"].shape != (channels,):
        raise ValueError(f"grid: {a['factor'].shape}, {a['shift'].shape} for {channels} channels")
    if len(outer) == 1 and padding == ((0, 0), (0, 0)):
        return (*outer, channels)
    if len(outer) != 3:
        raise ValueError(f"grid: {x}; wanted rows, not padded, or images")
    sizes = (n + sum(sides) for n, sides in zip(outer[1:], padding, strict=True))
    return (outer[0], *sizes, channels)


def _sliced(step: Step, x: Shape) -> Shape:
    index = slice_index(step, len(x))
    return tuple(len(range(*s.indices(n))) for s, n in zip(index, x, strict=True))


def _concatenated(step: Step, *xs: Shape) -> Shape:
    """The other axes broadcast."""
    axis = step.arguments["axis"]
    others = [(*x[:axis], *x[axis + 1 :]) for x in xs]
    try:
        whole = np.broadcast_shapes(*others)
    except ValueError:
        whole = ()
    if any(len(x) != 1 + len(whole) for x in xs):
        raise ValueError(f"concat: {', '.join(map(str, xs))} along axis {axis}")
    return (*whole[:axis], sum(x[axis] for x in xs), *whole[axis:])


def _padded(step: Step, x: Shape) -> Shape:
    mode = step.arguments["mode"]
    if not x:
        raise ValueError("pad: a value without axes; wanted one at least")
    if len(x) != len(step.arguments["widths"]):
        raise ValueError(f"pad: {x} by {step.arguments['widths']}; wanted as many axes")
    padded = pad_widths(step, x)
    for n, widths in zip(x, padded, strict=True):
        most = {"reflect": max(n - 1, 0), "circular": n}.get(mode, max(widths) if n else 0)
        if mode != "constant" and not 0 <= min(widths) <= max(widths) <= most:
            raise ValueError(f"pad: {mode} by {widths} of an axis of {n}; wanted 0 up to {most}")
        if n + sum(min(width, 0) for width in widths) < 0:
            raise ValueError(f"pad: by {widths} of an axis of {n}, of which nothing is left")
    return tuple(n + sum(widths) for n, widths in zip(x, padded, strict=True))


def _dilated(step: Step, x: Shape) -> Shape:
    a = step.arguments
    sizes = [
        (n - 1) * s + 1 + sum(p) for n, s, p in zip(x[1:3], a["stride"], a["padding"], strict=True)
    ]
    return (x[0], *sizes, x[3])


OPERATIONS: dict[str, Operation] = {
    "quantize": Operation(_quantize, _permuted),
    "grid": Operation(_grid, _gridded),
    "dequantize": Operation(_plain, _same),
    "constant": Operation(
        lambda module, step: step.arguments["value"], lambda step: step.arguments["value"].shape
    ),
    "conv2d": Operation(_product, _conv2d),
    "linear": Operation(_product, _linear),
    "matmul": Operation(_plain, _matmul),
    "add": Operation(_plain, _broadcast),
    "mul": Operation(_plain, _broadcast),
    "affine": Operation(_plain, _same),
    "table": Operation(_plain, _same),
    "recurrent": Operation(_plain, _recurrent),
    "softmax": Operation(_softmax, _masked),
    "softmax_weights": Operation(_softmax, _masked),
    "layer_norm": Operation(_plain, _same),
    "rms_norm": Operation(_plain, _same),
    "group_norm": Operation(_plain, _grouped),
    "global_response_norm": Operation(_plain, _grouped),
    "max_pool2d": Operation(_plain, _pooled),
    "avg_pool2d": Operation(_plain, _pooled),
    "adaptive_avg_pool2d": Operation(_adaptive_pool, _adaptive),
    "adaptive_max_pool2d": Operation(_adaptive_pool, _adaptive),
    "upsample_nearest2d": Operation(_upsample, _upsampled),
    "upsample_bilinear2d": Operation(_upsample, _upsampled),
    "reshape": Operation(_reshape, _reshaped),
    "permute": Operation(_permute, _permuted),
    "slice": Operation(_slice, _sliced),
    "concat": Operation(_concat, _concatenated),
    "pad": Operation(_pad, _padded),
    "dilate": Operation(_dilate, _dilated),
}
