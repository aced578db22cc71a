"""A saved network on a machine without torch."""

from __future__ import annotations

import json
import os
from pathlib import Path

import safetensors
import safetensors.numpy

from fastq.encode import decode_program, read_header
from fastq.plan import BoundProgram


def load_program(path: str | os.PathLike[str]) -> BoundProgram:
    """The network that `fastq.save` wrote, as one function of NumPy arrays; torch is not loaded.

        run = fastq.load_program("resnet.safetensors")
        (logits,) = run(images)     # float32 (B, 3, H, W), any batch size

    It takes and returns float32 arrays, and gives the same bits as `fastq.load(path)`. Of
    `run.program`, inputs and outputs say their names and order.

    Raises ValueError for a file that is truncated, altered, of another version or not from
    fastq; and for a network that is more than one integer program: one with float operators,
    whose results are no plain tensors, or of int8 layers. OSError if it cannot be read.
    """
    where = f"load_program: {os.fspath(path)}"
    data = Path(path).read_bytes()
    try:
        arrays = safetensors.numpy.load(data)
        size = int.from_bytes(data[:8], "little")
        metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
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
        floats = [
            f"{stage['outputs'][0]} ({stage['why']})"
            for stage in network["stages"]
            if stage["program"] < 0
        ]
        if floats or len(network["stages"]) != 1:
            raise ValueError(f"it has float operators: {', '.join(floats)}")
        (stage,), (program,) = network["stages"], network["programs"]
        bound = BoundProgram(decode_program(program, arrays))
        given = [name for name in network["inputs"] if name is not None]  # no constants
        if given != stage["inputs"] or network["outputs"] != stage["outputs"]:
            raise ValueError("its arguments or results are not those of its program")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where} is not one integer program, which is what runs without torch: {error}; "
            "fastq.load runs it with torch"
        ) from error
    return bound
