"""A saved network on a machine without torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
from numpy.typing import NDArray

from fastq import operators
from fastq.encode import decode_program, metadata_of, read_header
from fastq.layout import Layout, decode_layout
from fastq.plan import BoundProgram
from fastq.program import Program, check_extent
from fastq.sizes import sized

Array = NDArray[Any]


class SavedNetwork:
    """A network as a function of NumPy arrays: programs, and float operators between them.

    `load_program` makes it. Several threads may call it at the same time.

    inputs    the names of its inputs, in the order in which it takes them.
    programs  the integer programs, in the order in which they run; printed, one is readable.
    """

    def __init__(self, layout: Layout, arrays: Mapping[str, Array]) -> None:
        self._layout = layout
        self._bound = [BoundProgram(decode_program(one, arrays)) for one in layout.programs]
        self._tensors: dict[str, dict[str, Array]] = {}  # of float stages, by their name
        for name, array in arrays.items():
            stage, _, part = name.rpartition(".")
            self._tensors.setdefault(stage, {})[part] = array
        given = zip(layout.inputs, layout.extents, strict=True)
        self._extents = {name: extent for name, extent in given if name and extent is not None}
        self.inputs = tuple(self._extents)

    @property
    def programs(self) -> list[Program]:
        return [bound.program for bound in self._bound]

    @property
    def program(self) -> Program:
        """The one integer program of the network; ValueError if there are several."""
        if len(self._bound) != 1:
            raise ValueError(f"this network has {len(self._bound)} programs: see .programs")
        return self._bound[0].program

    def __call__(self, *inputs: Array, **named: Array) -> list[Any]:
        """The results, in the order in which the float network gave them.

        inputs, named  by position or by name, arrays of the dtypes of the float network: float32,
                or int64 of tokens. Raises TypeError and ValueError for other ones.
        """
        inputs = self._in_order(inputs, named)
        values: dict[str, Any] = dict(zip(self.inputs, inputs, strict=True))
        shapes = [x.shape for x in inputs]
        for stage in self._layout.stages:
            taken = [values[name] for name in stage.inputs]
            if stage.program < 0:
                (name,) = stage.outputs
                tensors = self._tensors.get(name, {})
                values[name] = operators.evaluate(stage, taken, tensors, shapes)
            else:
                made = self._bound[stage.program](*taken)
                values.update(zip(stage.outputs, made, strict=True))
        return [
            values[out] if isinstance(out, str) else sized(out[1], shapes)
            for out in self._layout.outputs
        ]

    def _in_order(self, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, ...]:
        """The inputs in the order of their names, each checked."""
        if {*self.inputs[len(inputs) :]} != named.keys() or len(inputs) > len(self.inputs):
            by_name = "".join(f", {name}=" for name in named)
            raise TypeError(f"got {len(inputs)} inputs{by_name}; wanted {', '.join(self.inputs)}")
        inputs += tuple(named[name] for name in self.inputs[len(inputs) :])
        for (name, extent), x in zip(self._extents.items(), inputs, strict=True):
            if not isinstance(x, np.ndarray):
                raise TypeError(f"{name} is a {type(x).__name__}; wanted an array")
            check_extent(name, x.shape, extent)
        return inputs


def load_program(path: str | os.PathLike[str]) -> SavedNetwork:
    """The network that `fastq.save` wrote, as one function of NumPy arrays; torch is not loaded.

        run = fastq.load_program("resnet.safetensors")
        (logits,) = run(images)     # float32 (B, 3, H, W), any batch size

    Programs give the same bits as those of `fastq.load(path)`; float operators between them are
    NumPy's, whose last bits may be others. `run.inputs` are the names of what it takes, in order.

    Raises ValueError for a file that is truncated, altered, of another version or not from
    fastq; and for a network with float operators that `fastq.operators` has not, or of int8
    layers in a float model. OSError if it cannot be read.
    """
    where = f"load_program: {os.fspath(path)}"
    data = Path(path).read_bytes()
    try:
        arrays = safetensors.numpy.load(data)
        metadata = metadata_of(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{where} is no safetensors file, or is truncated, or has tensors that NumPy has not "
            f"({error})"
        ) from error
    parts = {k: (f"torch.{v.dtype}", list(v.shape), v.tobytes()) for k, v in arrays.items()}
    header = read_header(where, metadata, parts)
    network = header.get("network")
    try:
        if not isinstance(network, dict):
            raise ValueError("it has int8 layers in a float model")
        layout = decode_layout(network, operators.NAMED, operators.check_operator, arrays)
        return SavedNetwork(layout, arrays)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} does not run without torch: {error}; fastq.load runs it with torch"
        ) from error
