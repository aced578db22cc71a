"""A graph's tensors as the parameters of a module: made of them, or found again where they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastq.graph import Graph, Node


def parameters_of(graph: Graph) -> nn.Module:
    """The parameters of a graph as a module, under the names of the layers that they are of.

    The tensors of constants, grids and torch's other operators are no parameters.
    """
    root = nn.Module()
    for node in graph:
        if not node.tensors or node.op in ("constant", "aten", "grid"):
            continue
        part = _submodule(root, node.layer or node.name)
        same = part._parameters.keys() & node.tensors.keys()
        if any(not torch.equal(part.get_parameter(key), node.tensors[key]) for key in same):
            part = _submodule(root, node.name)  # the module has several weights of its own
            same = set()
        for key, tensor in node.tensors.items():
            if key == "add_factor":  # as a grid's
                continue
            if key not in same:
                part.register_parameter(key, nn.Parameter(tensor))
            node.tensors[key] = part.get_parameter(key).detach()  # one of a layer called twice
    return root


def _submodule(root: nn.Module, path: str) -> nn.Module:
    """The submodule of this name, made if there is none."""
    for name in path.split("."):
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    return root


@dataclass(frozen=True)
class Place:
    """Where a node's tensor is: a parameter or buffer, or a view of it with these strides.

    held, dtype, order  the shape, dtype and strides that the parameter or buffer had.
    """

    name: str
    held: tuple[int, ...]
    dtype: torch.dtype
    order: tuple[int, ...]
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def find(self, named: Mapping[str, Tensor]) -> Tensor:
        tensor = named.get(self.name)
        if tensor is None or tensor.shape != self.held or tensor.dtype != self.dtype:
            now = "gone" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(
                f"QATModel: {self.name} is {now}; wanted {self.held} {self.dtype}, which the graph "
                "was made with. Layers are changed in the float model, before fastq.prepare_qat"
            )
        if (self.shape, self.strides) == (self.held, self.order):
            return tensor
        if tensor.stride() != self.order:  # as after .to(memory_format=torch.channels_last)
            given, tensor = tensor, torch.empty_strided(self.held, self.order, dtype=self.dtype)
            tensor.copy_(given)
        return tensor.as_strided(self.shape, self.strides)


def places_of(node: Node, named: Mapping[str, Tensor]) -> dict[str, Place | Tensor]:
    """The place of each of a node's tensors that is the network's own; others as they are."""
    at = {
        (own.data_ptr(), own.numel()): (name, tuple(own.shape), own.dtype, own.stride())
        for name, own in named.items()
        if own.numel()
    }
    return {
        key: Place(*at[place], tuple(tensor.shape), tensor.stride())
        if (place := (tensor.data_ptr(), tensor.numel())) in at
        else tensor
        for key, tensor in (node.origin or node.tensors).items()
    }
