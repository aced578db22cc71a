"""An integer program: the steps of a network, or a part of one, from float inputs to outputs.

A step is a function of `reference` with its arguments: the specification in NumPy and the fast
kernels run the same steps, and give the same bits. Values are NumPy arrays, images NHWC. A
program needs no torch.

    quantize    float32 -> uint8 or int16, the way in   (one for each input that is used)
    grid        float32 -> uint8, padded and with a grid for each channel
    ...         uint8 -> uint8
    dequantize  back to float32, the way out; conv2d and linear may end in float32 themselves

Sums are int16 where all who take them can read it, as norms do: their values differ by
orders of magnitude, and what a network adds to layer by layer would lose a little each time. So are
the products that a recurrent layer takes, which its state sums up over a sequence.
quantize, constant, add, conv2d and linear make int16; WIDE says who takes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq import reference
from fastq.arguments import MAX_AXES, PADDING_MODES, check_arguments, check_channels
from fastq.qparams import MAX_K, Dequant, Requant
from fastq.sizes import Shape, Shapes, sized

Array = NDArray[Any]
WAYS_IN = ("quantize", "grid")
VIEWS = ("reshape", "permute", "slice")  # mostly have their input's memory
MOVED = (*VIEWS, "concat", "pad")  # have the dtype of their inputs, which is one
NORMS = ("layer_norm", "rms_norm", "group_norm")
RECURRENT = ("recurrent",)  # take int16 alone
ANY = range(2**31)  # of how many inputs there are
# operation -> which of its inputs may be int16
WIDE = {"dequantize": (0,), **dict.fromkeys(NORMS, (0,)), "add": (0, 1),
        "conv2d": (1,), "linear": (1,), **dict.fromkeys((*MOVED, *RECURRENT), ANY)}  # fmt: skip
FIXED = (  # ends an error on a shape
    "Sizes that are fixed are part of the network, as it was captured; fastq.summary says why, if "
    "the model takes others"
)
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
        if not isinstance(self.arguments.get("output_size"), tuple):
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


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in an order in which each comes after its inputs.

    inputs   the names of the float32 inputs, in order.
    outputs  for each output its name and `axes`: the result is its value transposed by them. They
             are all float32 values of the steps, in any order.
    extents  the inputs' shapes that it was made for, where other ones may not be given: sizes
             that are None may differ. One tuple for each input. A `Size` among the arguments of a
             step counts from the inputs' shapes.
    dtypes   of each value: "float32", "uint8" or "int16".
    """

    inputs: tuple[str, ...]
    steps: tuple[Step, ...]
    outputs: tuple[tuple[str, tuple[int, ...]], ...]
    extents: tuple[tuple[int | None, ...], ...]
    dtypes: Mapping[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("inputs", "steps", "outputs", "extents"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        dtypes = dict.fromkeys(self.inputs, "float32")
        for step in self.steps:
            if step.op not in OPERATIONS:
                raise ValueError(f"Program: {step.name} is a {step.op!r}, which is no operation")
            if step.name in dtypes:
                raise ValueError(f"Program: two values are called {step.name}")
            for i, name in enumerate(step.inputs):
                narrow = ["uint8"] * (step.op not in RECURRENT)
                wanted = ["float32"] if step.op in WAYS_IN else narrow
                wanted += ["int16"] * (i in WIDE.get(step.op, ()))
                if dtypes.get(name) not in wanted:
                    found = dtypes.get(name, "unknown")
                    raise ValueError(
                        f"Program: {step.name} takes {name}, which is {found}; wanted a "
                        f"{' or '.join(wanted)} value that a step before it makes"
                    )
            check_arguments(step)
            taken = [dtypes[name] for name in step.inputs]
            if step.op == "concat" and len(set(taken)) > 1:
                raise ValueError(f"Program: {step.name} concatenates {taken}; wanted one dtype")
            dtypes[step.name] = _dtype(step, *taken)
        object.__setattr__(self, "dtypes", MappingProxyType(dtypes))
        names = [name for name, _ in self.outputs]
        floats = {n for n, dtype in dtypes.items() if dtype == "float32"} - set(self.inputs)
        if len(set(names)) != len(names) or set(names) != floats:
            raise ValueError(
                f"Program: outputs {names}; wanted each float32 value of a step once: "
                f"{sorted(floats)}"
            )
        if not all(type(axis) is int for _, axes in self.outputs for axis in axes):
            raise ValueError(f"Program: outputs {self.outputs}; wanted axes as integers")
        if len(self.extents) != len(self.inputs) or not all(
            n is None or (isinstance(n, int) and n >= 0) for e in self.extents for n in e
        ):
            raise ValueError(f"Program: extents {self.extents} for inputs {self.inputs}")

    def __reduce__(self) -> Any:  # of a MappingProxyType there is no copy and no pickle
        return Program, (self.inputs, self.steps, self.outputs, self.extents)

    def shapes(self, *inputs: Shape) -> dict[str, Shape]:
        """The shape of every value; ValueError for inputs that do not fit."""
        self.check(inputs)
        shapes = dict(zip(self.inputs, map(tuple, inputs), strict=True))
        for step in self.steps:
            shape = OPERATIONS[step.op].shape
            try:
                made = shape(step.sized(inputs), *(shapes[i] for i in step.inputs))
                shapes[step.name] = tuple(map(int, made))
                if step.inputs:
                    check_channels(step, shapes[step.inputs[0]], self.dtypes[step.inputs[0]])
                _check_size(shapes[step.name])
            except (ValueError, IndexError) as error:
                raise ValueError(
                    f"{step.name}: {error}; inputs of the program: {', '.join(map(str, inputs))}"
                ) from error
        for name, axes in self.outputs:
            if sorted(axes) != list(range(len(shapes[name]))):
                raise ValueError(f"{name}: axes {axes} for a value of shape {shapes[name]}")
        return shapes

    def check(self, inputs: Sequence[Shape]) -> None:
        """ValueError unless the inputs have these shapes."""
        fit = len(inputs) == len(self.extents) and all(map(fits, inputs, self.extents))
        if not fit:
            wanted = ", ".join(map(extent_text, self.extents))
            raise ValueError(
                f"program: inputs {', '.join(map(str, inputs))}; wanted {wanted}. {FIXED}"
            )

    def values(self, *inputs: Array, module: Any = reference) -> dict[str, Array]:
        """Every value of the program, by the specification."""
        given = [x.shape for x in inputs]
        self.check(given)
        values = dict(zip(self.inputs, inputs, strict=True))
        for step in self.steps:
            run, taken = OPERATIONS[step.op].run, (values[name] for name in step.inputs)
            values[step.name] = run(module, step.sized(given), *taken)
        return values

    def reference(self, *inputs: Array, module: Any = reference) -> list[Array]:
        """The outputs by the specification, step by step; or with `module=ops` by its functions."""
        values = self.values(*inputs, module=module)
        return [values[name].transpose(axes) for name, axes in self.outputs]

    def __str__(self) -> str:
        lines = [f"program({', '.join(self.inputs)})", *(f"  {step}" for step in self.steps)]
        return "\n".join([*lines, f"  return {', '.join(name for name, _ in self.outputs)}"])


def fits(shape: Sequence[int], extent: Sequence[int | None]) -> bool:
    """Whether a shape has the sizes of an extent, of which None is any."""
    return len(shape) == len(extent) and all(
        e is None or n == e for n, e in zip(shape, extent, strict=True)
    )


def check_extent(name: str, shape: Sequence[int], extent: Sequence[int | None]) -> None:
    """ValueError unless an input has these sizes, None being any."""
    if not fits(shape, extent):
        raise ValueError(f"{name} has shape {tuple(shape)}; wanted {extent_text(extent)}. {FIXED}")


def extent_text(extent: Sequence[int | None]) -> str:
    """An extent as an error shows it."""
    return "(" + ", ".join("any" if n is None else str(n) for n in extent) + ")"


def _dtype(step: Step, *inputs: str) -> str:
    """The dtype of a step's value, by those of its inputs."""
    if step.op in RECURRENT:
        return "uint8"
    epilogue = step.arguments.get("epilogue")
    if step.op == "dequantize" or isinstance(epilogue, Dequant):
        return "float32"
    if isinstance(epilogue, Requant):
        return epilogue.dtype.name
    if step.op in MOVED:
        return inputs[0]
    if step.op == "constant":
        return str(step.arguments["value"].dtype)
    return str(step.arguments.get("dtype", "uint8"))


def _check_size(shape: Shape) -> None:
    """ValueError for an array that cannot be, even where one of its axes is empty."""
    if len(shape) > MAX_AXES or prod(max(n, 1) for n in shape) > MAX_VALUES:
        raise ValueError(f"shape {shape}; wanted up to {MAX_AXES} axes, {MAX_VALUES} values")


# ------------------------------------------------------------------------------ what steps compute


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
    widths, mode = step.arguments["widths"], PADDING_MODES[step.arguments["mode"]]
    value = {"constant_values": step.arguments["value"]} if mode == "constant" else {}
    return np.pad(x, widths, mode, **value)  # type: ignore[call-overload, no-any-return]


def _dilate(module: Any, step: Step, x: Array) -> Array:
    """Pixels apart: what a transposed convolution reads."""
    a = step.arguments
    y = np.full(_dilated(step, x.shape), a["value"], np.uint8)
    (top, _), (left, _) = a["padding"]
    sh, sw = a["stride"]
    h, w = (x.shape[1] - 1) * sh + 1, (x.shape[2] - 1) * sw + 1
    y[:, top : top + h : sh, left : left + w : sw] = x
    return y


# ---------------------------------------------------------------------------------- and the shapes


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
    _check_size((x[0], *padded, x[3]))
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
    """As many as there are windows."""
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
    groups = step.arguments["groups"]
    if not 2 <= len(x) <= 4 or 0 in x[1:] or x[-1] % groups:
        raise ValueError(f"group_norm: x {x}; wanted (B, ..., C) of 2 to 4 axes, {groups} groups")
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
    shape = tuple(n if isinstance(n, int) else prod(x[i] for i in n[0]) // n[1] for n in a["sizes"])
    if prod(shape) != prod(x):
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
    for n, widths in zip(x, step.arguments["widths"], strict=True):
        most = {"reflect": max(n - 1, 0), "circular": n}.get(mode, max(widths) if n else 0)
        if mode != "constant" and max(widths) > most:
            raise ValueError(f"pad: {mode} by {widths} of an axis of {n}; wanted up to {most}")
    return tuple(n + sum(w) for n, w in zip(x, step.arguments["widths"], strict=True))


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
