"""torch's float operators in NumPy: what a saved network has between its programs, without torch.

Arguments, dtypes and results are those of the operator of the same name in torch (its "aten" and
overload); float results may differ in their last bits. What is not here needs torch.

Each room has `OPERATORS`, a function for torch's names, where several overloads of one operator
share a line; graph.py has the operations of `graph.OPERATIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from fastq.layout import Stage, filled
from fastq.operators import (
    activations,
    along,
    arithmetic,
    dtypes,
    places,
    products,
    resampling,
    shapes,
    windows,
)
from fastq.operators.arithmetic import clamp
from fastq.operators.dtypes import NAMED, Array
from fastq.operators.graph import OPERATIONS
from fastq.sizes import Shapes, sized

__all__ = ["FUNCTIONS", "NAMED", "OPERATIONS", "ROOMS", "check_operator", "evaluate"]

ROOMS = (
    dtypes, arithmetic, activations, shapes, places, along, products, windows, resampling
)  # fmt: skip
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "getitem": lambda values, index: values[index],
    **places.OURS,
    **{
        f"aten.{name}": function
        for room in ROOMS
        for names, function in room.OPERATORS.items()
        for name in names.split()
    },
}
# operations that call these: their (target, args, kwargs), one after the other
CHAINS: dict[str, Callable[[Mapping[str, Any]], Sequence[Any]]] = {
    "aten": lambda attrs: [(attrs["target"], attrs.get("args", ()), attrs.get("kwargs", {}))],
    "pointwise": lambda attrs: attrs["calls"],
}


def evaluate(
    stage: Stage, inputs: Sequence[Array], tensors: Mapping[str, Array], shapes: Shapes
) -> Any:
    """The value of a float stage; shapes are those of the network's inputs."""
    attrs = stage.attrs
    with np.errstate(all="ignore"):  # as torch: infinities and NaN are values
        if stage.op in CHAINS:
            values: list[Any] = [*inputs]  # those of the calls follow
            fill = partial(filled, inputs=values, tensors=tensors, shapes=shapes)
            for target, args, kwargs in CHAINS[stage.op](attrs):
                named = {name: fill(value) for name, value in kwargs.items()}
                values.append(_arrays(FUNCTIONS[target](*map(fill, args), **named)))
            y = values[-1]
        else:
            y = OPERATIONS[stage.op](sized(attrs, shapes), *inputs, **tensors)
        return _arrays(clamp(y, *attrs["clamp"]) if "clamp" in attrs else y)


def check_operator(stage: Stage) -> None:
    """ValueError unless a float stage is of what is here."""
    if stage.op in CHAINS:
        missing = [name for name, _, _ in CHAINS[stage.op](stage.attrs) if name not in FUNCTIONS]
    else:
        missing = [stage.op] * (stage.op not in OPERATIONS)
    if missing:
        raise ValueError(f"{stage.outputs[0]} takes {missing[0]}, which is torch's ({stage.why})")


def _arrays(value: Any) -> Any:
    """Arrays without axes where NumPy gives numbers."""
    if isinstance(value, list | tuple):
        return type(value)(map(_arrays, value))
    return np.asarray(value) if isinstance(value, np.generic) else value
