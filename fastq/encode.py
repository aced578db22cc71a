"""Programs as JSON and arrays, and back, and a file's header: what of a file needs no torch.

What is not a plain JSON value is an object with one key that names its kind:

    {"array": name}     an array, kept apart under this name
    {"float": "inf"}    a float that JSON has no word for
    {"dict": {...}}     a dict
    {"Requant": {...}}  one of CLASSES by its fields; its constructor checks them, and makes a dtype
                        of its name

Decoding builds these classes and no other, and runs nothing from the file.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from fastq.program import Program
from fastq.qparams import Dequant, Requant
from fastq.sizes import Size
from fastq.steps import Step
from fastq.weights import Conv2dWeight, LinearWeight

CLASSES: dict[str, Any] = {
    c.__name__: c for c in (Requant, Dequant, LinearWeight, Conv2dWeight, Size)
}
DERIVED = ("panels",)  # fields that are a cache
VERSION = 11  # of the files
Parts = dict[str, tuple[str, list[int], Any]]  # a tensor's name -> dtype as torch's, shape, bytes
DTYPES = (np.uint8, np.int8, np.int16, np.int32, np.float32)


def encode(value: Any, keep: Callable[[str, Any], str], name: str = "") -> Any:
    """A value as JSON; keep(name, array) stores an array and returns the name it is known by."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        number = float(value)
        return number if math.isfinite(number) else {"float": str(number)}
    if isinstance(value, np.dtype):
        return value.name
    if isinstance(value, np.ndarray):
        return {"array": keep(name, value)}
    if isinstance(value, tuple | list):
        return [encode(v, keep, f"{name}_{i}" if name else str(i)) for i, v in enumerate(value)]
    if isinstance(value, Mapping):
        return {"dict": {str(k): encode(v, keep, str(k)) for k, v in value.items()}}
    kind = type(value).__name__
    if CLASSES.get(kind) is not type(value):
        raise TypeError(f"encode: {name} is a {kind}, which has no form in a file")
    parts = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in DERIVED}
    named = {"data": name}  # a weight's array is called as the weight
    return {kind: {k: encode(v, keep, named.get(k, k)) for k, v in parts.items()}}


def decode(given: Any, arrays: Mapping[str, Any]) -> Any:
    """The value again; lists are tuples. ValueError for what `encode` does not write."""
    if isinstance(given, int) and abs(given) >= 2**63:
        raise ValueError("an integer is beyond 64 bits")
    if given is None or isinstance(given, bool | int | float | str):
        return given
    if isinstance(given, list):
        return tuple(decode(v, arrays) for v in given)
    if not isinstance(given, dict) or len(given) != 1:
        raise ValueError(f"wanted an object with one key, got {given!r:.80}")
    ((kind, content),) = given.items()
    if kind == "array":
        if not isinstance(content, str) or content not in arrays:
            raise ValueError(f"there is no array {content!r:.80}")
        array = np.asarray(arrays[content])
        if array.dtype not in DTYPES:
            raise ValueError(
                f"{content} is {array.dtype}; wanted uint8, int8, int16, int32 or float32"
            )
        if array.flags.writeable:
            array = array.view()
            array.flags.writeable = False
        return array
    if kind == "float" and content in ("inf", "-inf", "nan"):
        return float(content)
    if kind == "dict" and isinstance(content, dict):
        return {k: decode(v, arrays) for k, v in content.items()}
    if kind in CLASSES and isinstance(content, dict):
        try:
            return CLASSES[kind](**{k: decode(v, arrays) for k, v in content.items()})
        except TypeError as error:
            raise ValueError(f"{kind}: {error}") from error
    raise ValueError(f"{kind!r:.80} is no kind of value")


def encode_program(program: Program, keep: Callable[[str, Any], str]) -> dict[str, Any]:
    """A program as JSON; arrays are kept as "step.argument"."""

    def step(s: Step) -> dict[str, Any]:
        arguments = {
            k: encode(v, lambda name, array: keep(f"{s.name}.{name}", array), k)
            for k, v in s.arguments.items()
        }
        return {"op": s.op, "name": s.name, "inputs": list(s.inputs), "layer": s.layer,
                "arguments": arguments}  # fmt: skip

    return {
        "inputs": list(program.inputs),
        "steps": [step(s) for s in program.steps],
        "outputs": [[name, list(axes)] for name, axes in program.outputs],
        "extents": [list(extent) for extent in program.extents],
    }


def decode_program(given: Any, arrays: Mapping[str, Any]) -> Program:
    """The program again; ValueError for anything that `encode_program` does not write."""
    try:
        steps = tuple(
            Step(
                _text(s["op"]),
                _text(s["name"]),
                tuple(_text(name) for name in s["inputs"]),
                {_text(k): decode(v, arrays) for k, v in s["arguments"].items()},
                _text(s["layer"]),
            )
            for s in given["steps"]
        )
        outputs = tuple((_text(name), tuple(axes)) for name, axes in given["outputs"])
        inputs = tuple(_text(name) for name in given["inputs"])
        return Program(inputs, steps, outputs, tuple(tuple(e) for e in given["extents"]))
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"a program is not in order: {type(error).__name__}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"wanted a string, got {value!r:.80}")
    return value


def digest(header: Mapping[str, Any], parts: Parts) -> str:
    """sha256 of a header without it, and of each tensor in the order of the names."""
    found = hashlib.sha256(json.dumps(header).encode())
    for name in sorted(parts):
        dtype, shape, data = parts[name]
        found.update(f"\0{name}\0{dtype}\0{shape}\0".encode())
        found.update(data)
    return found.hexdigest()


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file, whose library hands out the tensors alone."""
    size = int.from_bytes(data[:8], "little")
    found: dict[str, str] | None = json.loads(data[8 : 8 + size]).get("__metadata__")
    return found or {}


def read_header(where: str, metadata: Mapping[str, str], parts: Parts) -> dict[str, Any]:
    """The header from a file's metadata; ValueError unless it is fastq's, and undamaged."""
    if "fastq" not in metadata:
        raise ValueError(
            f"{where} is a safetensors file without fastq's header; wanted one from fastq.save"
        )
    try:
        header = json.loads(metadata["fastq"])
        json.dumps(header)  # as the digest will: nested too deep, it is refused here
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} has a header that is not JSON: {error}") from error
    if not isinstance(header, dict) or header.get("format") != "fastq":
        raise ValueError(f"{where} has a header of another format; wanted one from fastq.save")
    if header.get("version") != VERSION:
        raise ValueError(
            f"{where} has version {header.get('version')!r}, this fastq reads {VERSION}; "
            "use the fastq that wrote it, or quantize the model again"
        )
    if header.pop("sha256", None) != digest(header, parts):
        raise ValueError(f"{where} was altered: its digest is not that of its content")
    return header
