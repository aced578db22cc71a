"""Convolutions of one to three axes, transposed or not.

A sequence is an image one line high. No program has volumes: what these operations are there for is
that a batch norm folds into them, and that each is an int8 layer of its own.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fastq.graph import Node
from fastq.read.exported import Arguments, geometry, numbers, parameters
from fastq.read.reader import Reader, reads
from fastq.weights import several

# across a line: as if there were no such axis
_ACROSS = {"stride": 1, "padding": (0, 0), "dilation": 1}
# also the least that each may be
_ACROSS_TRANSPOSED = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}


@reads("conv1d", "conv2d", "conv3d")
def convolution(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    tensors = parameters(a, "weight", "bias")
    if tensors is None:
        return None
    attrs = geometry(a, tensors["weight"].shape[2:])
    return _of_axes(reader, node, "conv", x, a, attrs, _ACROSS, tensors)


@reads("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    tensors = parameters(a, "weight", "bias")
    if tensors is None:
        return None
    axes = tensors["weight"].dim() - 2
    attrs = {
        name: several(name, numbers(a[name]), axes, least)
        for name, least in _ACROSS_TRANSPOSED.items()
    }
    return _of_axes(reader, node, "conv_transpose", x, a, attrs, _ACROSS_TRANSPOSED, tensors)


def _of_axes(
    reader: Reader, node: fx.Node, op: str, x: Node, a: Arguments, attrs: dict[str, Any],
    across: dict[str, Any], tensors: dict[str, Tensor],
) -> Node | None:  # fmt: skip
    """attrs: stride, padding, ... of each axis."""
    weight = tensors["weight"]
    if len(x.shape) != weight.dim():  # without a batch
        return None
    axes, groups = weight.dim() - 2, a["groups"]
    if axes > 1:
        attrs = {**attrs, "groups": groups}
        return reader.add(node, f"{op}{axes}d", [x], attrs=attrs, tensors=tensors)
    attrs = {name: (across[name], *along) for name, along in attrs.items()}
    tensors = {**tensors, "weight": weight.unsqueeze(2)}
    return reader.line(node, f"{op}2d", x, {**attrs, "groups": groups}, tensors)
