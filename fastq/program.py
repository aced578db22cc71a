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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from numpy.typing import NDArray

from fastq import reference
from fastq.arguments import check_arguments, check_channels
from fastq.qparams import Dequant, Requant
from fastq.sizes import Shape
from fastq.steps import OPERATIONS, Step, check_size

Array = NDArray[Any]
WAYS_IN = ("quantize", "grid")
VIEWS = ("reshape", "permute", "slice")  # mostly have their input's memory
MOVED = (*VIEWS, "concat", "pad")  # have the dtype of their inputs, which is one
NORMS = ("layer_norm", "rms_norm", "group_norm")
RECURRENT = ("recurrent",)  # take int16 alone
ANY = range(2**31)  # of how many inputs there are
# operation -> which of its inputs may be int16
WIDE = {"dequantize": (0,), **dict.fromkeys((*NORMS, "global_response_norm"), (0,)),
        "add": (0, 1), "conv2d": (1,), "linear": (1,),
        **dict.fromkeys((*MOVED, *RECURRENT), ANY)}  # fmt: skip
FIXED = (  # ends an error on a shape
    "Sizes that are fixed are part of the network, as it was captured; fastq.summary says why, if "
    "the model takes others"
)


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
            taken = _taken(step, dtypes)
            check_arguments(step)
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
                check_size(shapes[step.name])
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


def _taken(step: Step, dtypes: Mapping[str, str]) -> list[str]:
    """The dtypes of a step's inputs, of those of all values before it; ValueError for a value that
    is not there, or of a dtype that the step does not take."""
    taken = [dtypes.get(name, "unknown") for name in step.inputs]
    for i, (name, found) in enumerate(zip(step.inputs, taken, strict=True)):
        narrow = ["uint8"] * (step.op not in RECURRENT)
        wanted = ["float32"] if step.op in WAYS_IN else narrow
        wanted += ["int16"] * (i in WIDE.get(step.op, ()))
        if found not in wanted:
            raise ValueError(
                f"Program: {step.name} takes {name}, which is {found}; wanted a "
                f"{' or '.join(wanted)} value that a step before it makes"
            )
    if step.op == "concat" and len(set(taken)) > 1:
        raise ValueError(f"Program: {step.name} concatenates {taken}; wanted one dtype")
    return taken


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
