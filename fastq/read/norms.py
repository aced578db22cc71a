"""Batch, layer, RMS, group, instance and global response norms, called or spelled out."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import fx

from fastq.graph import Node, normalization
from fastq.read.exported import Arguments, parameters
from fastq.read.reader import Reader, reads
from fastq.read.spelled import Norm, Response


@reads("batch_norm")
def batch_norm(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    found = parameters(a, "running_mean", "running_var", "weight", "bias")
    if found is None or a["training"] or not {"running_mean", "running_var"} <= found.keys():
        return None
    origin = {
        name if name.startswith("running_") else f"norm_{name}": value
        for name, value in found.items()
    }
    eps, momentum = float(a["eps"]), float(a["momentum"])
    factor, shift = normalization(eps, origin)
    if not bool(factor.isfinite().all() and shift.isfinite().all()):
        return None
    y = reader.add(node, "affine", [x], tensors={"factor": factor, "shift": shift}, shape=x.shape,
                   attrs={"norm": {"eps": eps, "momentum": momentum}})  # fmt: skip
    y.origin = origin
    return y


@reads("_native_batch_norm_legit_no_training")
def native_batch_norm(
    reader: Reader, node: fx.Node, x: Node, a: Arguments
) -> list[Node | None] | None:
    """What a batch norm is called where changes of memory became values."""
    y = batch_norm(reader, node, x, {**a, "training": False})
    return None if y is None else [y]


@reads("layer_norm")
def layer_norm(
    reader: Reader, node: fx.Node, x: Node, a: Arguments, op: str = "layer_norm"
) -> Node | None:
    count, tensors = len(a["normalized_shape"]), parameters(a, "weight", "bias")
    if tensors is None or count == len(x.shape) or (count > 1 and not tensors):
        return None  # its sizes may follow the input's
    rows = (*x.shape[:-count], prod(x.shape[-count:]))  # several axes are one line
    lines = reader.reshape(f"{node.name}_lines", x, rows)
    if lines is None:
        return None
    attrs = {"shape": rows[-1:], "eps": float(a["eps"])}
    y = reader.add(node, op, [lines], attrs=attrs, tensors=tensors, shape=rows)
    return reader.reshape(f"{node.name}_axes", y, x.shape)


@reads("rms_norm")
def rms_norm(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    eps = torch.finfo(torch.float32).eps if a.get("eps") is None else a["eps"]
    return layer_norm(reader, node, x, {**a, "eps": eps}, "rms_norm")


@reads("group_norm")
def group_norm(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _grouped(reader, node, x, a, a["num_groups"])


@reads("instance_norm")
def instance_norm(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    """Each channel is a group; or a batch norm, if its statistics are known."""
    if not a["use_input_stats"]:
        return batch_norm(reader, node, x, {**a, "training": False})
    return _grouped(reader, node, x, a, x.shape[1])


def _grouped(reader: Reader, node: fx.Node, x: Node, a: Arguments, groups: int) -> Node | None:
    tensors = parameters(a, "weight", "bias")
    if tensors is None:
        return None
    attrs = {"groups": groups, "eps": float(a["eps"])}
    return reader.add(node, "group_norm", [x], attrs=attrs, tensors=tensors)


def norm(reader: Reader, node: fx.Node, found: Norm | None) -> Node | None:
    """One that is spelled out. Over any axis: it is the last one meanwhile."""
    if found is None or (found.factor != 1 and not reader.unrolls):
        return None
    op, x, dim, eps, factor = found
    n, last = x.shape[dim], len(x.shape) - 1
    dims = (*(d for d in range(last + 1) if d != dim), dim)
    x = reader.permute(f"{node.name}_last", x, dims)
    name: Any = node if dim == last else f"{node.name}_normed"
    tensors = {} if factor == 1 else {"weight": torch.full((n,), factor, dtype=torch.float32)}
    attrs = {"shape": (n,), "eps": eps}
    y = reader.add(name, op, [x], attrs=attrs, tensors=tensors, shape=x.shape)
    return reader.permute(node, y, [dims.index(d) for d in range(last + 1)])


def global_response_norm(reader: Reader, node: fx.Node, found: Response | None) -> Node | None:
    """One that is spelled out, of channels on any axis: they are the second one meanwhile. Weight,
    bias and what is added are taken in by fuse.py."""
    if found is None:
        return None
    axes = range(len(found.x.shape))
    dims = (0, found.dim, *(d for d in axes if d not in (0, found.dim)))
    x = reader.permute(f"{node.name}_channels", found.x, dims)
    name: Any = node if found.dim == 1 else f"{node.name}_responses"
    y = reader.add(name, "global_response_norm", [x], attrs={"eps": found.eps}, shape=x.shape)
    return reader.permute(node, y, [dims.index(d) for d in axes])
