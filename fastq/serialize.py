"""One file for a quantized model: tensors as safetensors, and a JSON header that says what they
belong to. No pickle, and nothing from the file is run but torch's own operators by name.

The metadata of the safetensors file has one entry, "fastq", which is the header. That of a whole
network is complete; `load` needs nothing else:

    sha256, format, version, summary   as below
    note, rebuilt                      see QuantizationSummary
    network  the Layout of a QuantizedModel: its programs (encode.py), and what is between them

That of a model with int8 layers says which layers of a float model they replace:

    sha256   the digest, see below
    format   "fastq"            version  encode.VERSION
    layers   {name: {"type": "QLinear", or another of TYPES, and the arguments it was built with}}
    folded   [names of batch norms that were folded away]
    rebuilt  [names of layers rebuilt from torch's own, see QuantizationSummary]
    tied     {name: the tensor in the file that has its values}
    summary  [[name, kind, result, reason], ...]

The digest is that of the rest of the header, then of each tensor in the order of the names: name,
dtype, shape and bytes. It finds damage; everything is checked besides, since a file made to
deceive has the right digest as well. The same model gives the same file, byte for byte.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastq.encode import VERSION, Parts, digest, metadata_of, read_header
from fastq.layout import decode_layout, encode_layout
from fastq.modules import INT8, listed, module_names, replace
from fastq.nn import LAYERS, QuantizedModel
from fastq.nn.model import NAMED, check_operator
from fastq.outlook import leave_fast_path
from fastq.qat import QATModel
from fastq.rebuild import rebuild
from fastq.summaries import QuantizationSummary, Result, Row, keep_summary
from fastq.trace import duplicate

TYPES: dict[str, Any] = {kind.__name__: kind for kind in LAYERS}

HEADER = {
    "format": str,
    "version": int,
    "layers": dict,
    "folded": list,
    "rebuilt": list,
    "tied": dict,
    "summary": list,
}
NETWORK_HEADER = {
    "format": str,
    "version": int,
    "network": dict,
    "rebuilt": list,
    "summary": list,
    "note": str,
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model's tensors and a header to one safetensors file.

    The file is complete or not there: it is written beside `path`, then moved, so that an older
    file is never lost; the new one has its mode. Raises TypeError unless `model` is a module,
    ValueError if it has no int8 layer, an operator that is neither torch's nor fastq's, or a
    state_dict with anything but tensors, OSError if the file cannot be written: FileNotFoundError
    if its folder is missing, IsADirectoryError or FileExistsError for what is there and no regular
    file.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"save: got {type(model).__name__}, wanted the model, then the path")
    report = getattr(model, "_fastq_summary", QuantizationSummary(()))
    if isinstance(model, QuantizedModel):
        _save_network(model, report, path)
        return
    layers = {
        names[0]: _arguments(module)
        for module, names in listed(module_names(model)).items()
        if isinstance(module, INT8)
    }
    inside = [name for name, part in model.named_modules() if isinstance(part, QuantizedModel)]
    if inside:
        raise ValueError(
            f"save: this {type(model).__name__} is around a network of fastq.quantize_model; "
            f"wanted that one: fastq.save(model.get_submodule({inside[0]!r}), path)"
        )
    if isinstance(model, QATModel):
        raise ValueError(
            "save: this model is in training; wanted its integer network: "
            "fastq.save(fastq.convert(model), path)"
        )
    if not layers:
        raise ValueError(
            f"save: this {type(model).__name__} has no int8 layer; wanted what "
            "fastq.quantize_model returned. torch.save(model.state_dict()) saves a float model"
        )
    tensors, tied = _distinct(model.state_dict())
    folded = [row.name for row in report.rows if row.result == "folded"]
    _write_file(path, tensors, report, {"layers": layers, "folded": folded, "tied": tied})


def load(path: str | os.PathLike[str], model: nn.Module | None = None) -> nn.Module:
    """The quantized model that `save` wrote.

    model  not needed for a whole network, which is complete in its file. For a model with int8
           layers: an instance of the class that was quantized, such as Net(), with any weights.
           It stays as it is; what is returned is a copy of it with the file's layers, in eval
           mode and with requires_grad=False throughout.

    Raises ValueError for a file that is truncated, altered, of another version or not from
    fastq, and for a model whose layers or tensors differ from the file's; TypeError unless
    `model` is a module; OSError if the file cannot be read.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"load: got {type(model).__name__}, wanted the path, then a float model such as Net()"
        )
    where = f"load: {os.fspath(path)}"
    header, tensors = _read(where, path)
    if "network" in header:
        return _load_network(where, header, tensors)
    if model is None:
        raise TypeError(
            f"{where} has int8 layers without the network around them; wanted a float model of "
            "its architecture as well: load(path, Net())"
        )
    result = duplicate(model).eval()
    leave_fast_path(result)
    for name in header["rebuilt"]:
        module, names = _find(where, result, name)
        plain = rebuild(module)
        if plain is None:
            raise _mismatch(where, name, module, "a subclass of nn.Linear or of a convolution")
        result = replace(result, names, plain)
    for name in header["folded"]:
        module, names = _find(where, result, name)
        if not isinstance(module, _BatchNorm):
            raise _mismatch(where, name, module, "a batch norm")
        result = replace(result, names, nn.Identity())
    for name, arguments in header["layers"].items():
        module, names = _find(where, result, name)
        result = replace(result, names, _empty_layer(where, name, module, arguments))
    _fill(where, result, tensors, header["tied"])
    for parameter in result.parameters():
        parameter.requires_grad = False
    keep_summary(result, _summary(where, header))
    return result


def _save_network(
    model: QuantizedModel, report: QuantizationSummary, path: str | os.PathLike[str]
) -> None:
    for stage in model.layout.stages:
        try:
            if stage.program < 0:
                check_operator(stage)
        except ValueError as error:  # `load` would say so, when the model is gone
            raise ValueError(
                f"save: {stage.outputs[0]}: {error}, which no file may name; "
                "the int8 layers of fastq.quantize_layers can be saved"
            ) from error
    tensors, _ = _distinct({name: t.clone() for name, t in model.state_dict().items()})
    _write_file(path, tensors, report, {"network": encode_layout(model.layout, NAMED)})


def _write_file(
    path: str | os.PathLike[str],
    tensors: dict[str, Tensor],
    report: QuantizationSummary,
    own: dict[str, Any],
) -> None:
    """Tensors and a header: what each file has there, and its own entries."""
    header = {
        "format": "fastq",
        "version": VERSION,
        **own,
        "rebuilt": report.rebuilt,
        "note": report.note,
        "summary": [[row.name, row.kind, row.result, row.reason] for row in report.rows],
    }
    text = json.dumps({"sha256": digest(header, _parts(tensors)), **header})
    _write(path, safetensors.torch.save(tensors, {"fastq": text}))


def _load_network(where: str, header: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedModel:
    try:
        layout = decode_layout(header["network"], NAMED, check_operator, tensors)
        result = QuantizedModel(layout, tensors)
    except ValueError as error:
        raise ValueError(f"{where} holds no network in order: {error}") from error
    keep_summary(result, _summary(where, header))
    return result


def _arguments(module: Any) -> dict[str, Any]:
    """The header's entry of an int8 layer, or of a float one as if it were int8."""
    for name, kind in TYPES.items():
        if isinstance(module, kind.FLOAT | kind):
            entry = {"type": name, **kind.made_with(module)}
            result: dict[str, Any] = json.loads(json.dumps(entry))  # tuples are lists there
            return result
    raise ValueError(f"save: {type(module).__name__} has no place in a file; {', '.join(TYPES)} do")


def _distinct(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state_dict with memory of their own, and name -> name for the tied rest."""
    first: dict[Any, str] = {}
    tensors: dict[str, Tensor] = {}
    tied = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided:
            raise ValueError(
                f"save: state_dict has {name!r}, a {type(tensor).__name__}; wanted dense tensors"
            )
        view = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
        if tensor.numel() and first.setdefault(view, name) != name:
            tied[name] = first[view]
            continue
        tensor = tensor.detach().cpu().contiguous()
        whole = tensor.untyped_storage().nbytes() == tensor.nbytes
        tensors[name] = tensor if whole else tensor.clone()
    return tensors, tied


def _parts(tensors: Mapping[str, Tensor]) -> Parts:
    return {
        name: (str(t.dtype), list(t.shape), t.reshape(-1).view(torch.uint8).numpy().data)
        for name, t in tensors.items()
    }


def _write(given: str | os.PathLike[str], data: bytes) -> None:
    path = Path(os.path.realpath(given))
    if not path.parent.is_dir():
        raise FileNotFoundError(
            errno.ENOENT, f"save: there is no folder {path.parent}; make it first", str(path)
        )
    old = path.exists()
    if old and not path.is_file():  # a folder, a device, a pipe
        raise OSError(
            errno.EISDIR if path.is_dir() else errno.EEXIST,
            "save: this is there and no regular file; wanted the name of a file",
            os.fspath(given),
        )
    beside = path.with_name(f".fastq-{uuid.uuid4().hex}")  # as short for a long name
    try:
        with open(beside, "xb") as file:
            if old:
                shutil.copymode(path, beside)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    with contextlib.suppress(OSError):  # the name reaches the disk too, where folders can sync
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _read(where: str, path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of a file, both of the right kind and undamaged."""
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        metadata = metadata_of(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{where} is no safetensors file, or is truncated ({error}); save it again"
        ) from error
    header = read_header(where, metadata, _parts(tensors))
    for key, kind in (NETWORK_HEADER if "network" in header else HEADER).items():
        if not isinstance(header.get(key), kind):
            raise ValueError(
                f"{where}: header's {key} is {header.get(key)!r:.80}, wanted {kind.__name__}"
            )
    texts = [*header.get("folded", ()), *header["rebuilt"], *header.get("tied", {}).values()]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{where}: header's folded, rebuilt and tied want names as strings")
    return header, tensors


def _find(where: str, model: nn.Module, name: str) -> tuple[nn.Module, list[str]]:
    """The module of this name, and all of its names."""
    for module, names in module_names(model).items():
        if name in names:
            return module, names
    raise ValueError(
        f"{where} has a layer {name!r}, but this {type(model).__name__} has no module of that "
        "name; wanted a float instance of the architecture that was saved"
    )


def _mismatch(where: str, name: str, module: nn.Module, wanted: str) -> ValueError:
    return ValueError(
        f"{where}: '{name}' is {module} in this model, wanted {wanted}; load wants a float "
        "instance of the architecture that was saved, such as Net()"
    )


def _empty_layer(where: str, name: str, module: nn.Module, arguments: Any) -> nn.Module:
    """The int8 layer for a float layer. The geometry is the model's; the file has to agree."""
    name_of_kind = arguments.get("type") if isinstance(arguments, dict) else None
    if not isinstance(name_of_kind, str) or name_of_kind not in TYPES:
        raise ValueError(
            f"{where}: layer '{name}' is {arguments!r:.80}; wanted one of {', '.join(TYPES)} and "
            "its arguments"
        )
    kind = TYPES[name_of_kind]
    if type(module) is not kind.FLOAT:
        raise _mismatch(where, name, module, f"nn.{kind.FLOAT.__name__}")
    wanted = _arguments(module)
    may_differ = {"bias"} & set(wanted)  # folding gives one to layers that had none
    own = {name: arguments.get(name) for name in may_differ}
    fits = all(isinstance(value, bool) for value in own.values())
    if not fits or arguments != {**wanted, **own}:
        raise _mismatch(where, name, module, f"{arguments!r:.300}")
    made: nn.Module = kind(**{**kind.made_with(module), **own})
    return made.train(module.training)  # dropout is off


def _fill(
    where: str, model: nn.Module, tensors: dict[str, Tensor], tied: Mapping[str, str]
) -> None:
    """Load the tensors, all of them and no other, in their own dtypes."""
    missing = set(tied.values()) - set(tensors)
    if missing:
        raise ValueError(f"{where}: header ties to {sorted(missing)}, which the file has not")
    state = {**tensors, **{name: tensors[source] for name, source in tied.items()}}
    for name, tensor in model.state_dict().items():
        if name in state and isinstance(tensor, Tensor) and state[name].dtype != tensor.dtype:
            raise ValueError(
                f"{where}: {name} is {state[name].dtype}, this model wants {tensor.dtype}"
            )
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise ValueError(f"{where} does not fit this model: {error}") from error


def _summary(where: str, header: dict[str, Any]) -> QuantizationSummary:
    rows = []
    for row in header["summary"]:
        texts = isinstance(row, list) and len(row) == 4 and all(isinstance(x, str) for x in row)
        if not texts or row[2] not in get_args(Result):
            raise ValueError(
                f"{where}: header's summary has {row!r:.80}, wanted name, kind, result, reason"
            )
        rows.append(Row(*row))
    return QuantizationSummary(tuple(rows), tuple(header["rebuilt"]), header.get("note", ""))
