"""What integer programs were made from, kept beside them: the graph, the quantization of its
values, and the float parameters that the programs hold only rounded. With the int8 weights of the
programs it is a network that can be trained, or lowered again.

    recipe   nodes    [{name, op, inputs, attrs, layer, kind, shape, tensors: their keys}, ...]
             outputs  as those of a graph
             regions  [{nodes, inputs, outputs}, ...]: by name, one for each program
             values   {name: [scale, zero_point, dtype]}, for the nodes that stand for a range
             bits     {layer: bits of its weight}
    tensors  "node.real_scale" of a layer's weight, "node.real_bias", "node.real_factor", ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastq.capture import Captured
from fastq.graph import OPERATIONS, Graph, Node, check_target
from fastq.layout import NOTES, decode_value, encode_value
from fastq.lower import Lowered, mirrored
from fastq.nn.model import NAMED, QuantizedModel
from fastq.prepare import LAYERS, Prepared
from fastq.qconfig import QConfig
from fastq.qparams import QParams, clamp_of, value_dtype
from fastq.regions import Ranges, Region
from fastq.weights import per_output

KINDS = {*OPERATIONS, "input", "constant", "aten"}


def write_recipe(
    prepared: Prepared, lowered: Sequence[Lowered]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The recipe of a network, and of its regions' programs, as JSON; and its tensors."""
    scales = {node: scale for one in lowered for node, scale in one.scales.items()}
    layers = set(prepared.layers())
    constants = [n for region in prepared.regions for n in region.inputs if n.op == "constant"]
    tensors: dict[str, Tensor] = {}
    keys = {node: set(node.tensors) for node in prepared.graph}
    for node in {*prepared.integer_nodes(), *constants}:
        own = dict(node.tensors)
        if node in layers:
            own.pop("weight")
            own["scale"] = torch.from_numpy(scales[node])
            bias = prepared.bias(node)
            if bias is not None:
                own["bias"] = bias
                keys[node].add("bias")
        tensors |= {f"{node.name}.real_{key}": tensor.clone() for key, tensor in own.items()}
    values = {node.name: prepared.qparams(node) for node in prepared.stand_ins()}
    recipe = {
        "nodes": [
            {
                "name": node.name,
                "op": node.op,
                "inputs": [v.name for v in node.inputs],
                "attrs": {
                    k: encode_value(v, NAMED) for k, v in node.attrs.items() if k not in NOTES
                },
                "layer": node.layer,
                "kind": node.kind,
                "shape": list(node.shape),
                "tensors": sorted(keys[node]),
            }
            for node in prepared.graph
        ],
        "outputs": [
            v.name if isinstance(v, Node) else [encode_value(v, NAMED)]
            for v in prepared.graph.outputs
        ],
        "regions": [
            {
                part: [n.name for n in getattr(region, part)]
                for part in ("nodes", "inputs", "outputs")
            }
            for region in prepared.regions
        ],
        "values": {
            name: [float(q.scale), int(q.zero_point), q.dtype.name] for name, q in values.items()
        },
        "bits": {node.name: prepared.config(node).weight_bits for node in layers},
    }
    return recipe, tensors


def read_recipe(network: QuantizedModel) -> Prepared:
    """What the network was made from: lowered, it gives the network's programs.

    Weights are those of the programs, on their grid. Raises ValueError for a recipe that
    `write_recipe` does not write, as from a damaged file.
    """
    layout = network.layout
    try:
        return _Reader(layout.recipe, dict(network.state_dict())).prepared(network)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a recipe is not in order: {type(error).__name__}: {error}") from error


class _Reader:
    def __init__(self, recipe: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
        self.recipe, self.state = recipe, state
        self.nodes: dict[str, Node] = {}

    def prepared(self, network: QuantizedModel) -> Prepared:
        recipe, layout = self.recipe, network.layout
        members = {name for region in recipe["regions"] for name in region["nodes"]}
        for given in recipe["nodes"]:
            self.nodes[given["name"]] = self.node(given, given["name"] in members)
        nodes = list(self.nodes.values())
        outputs = [
            self.nodes[v] if isinstance(v, str) else decode_value(v[0], NAMED)
            for v in recipe["outputs"]
        ]
        graph = Graph(nodes, [node for node in nodes if node.op == "input"], outputs)
        arguments = tuple(
            layout.constants[str(i)] if name is None else self.nodes[name]
            for i, name in enumerate(layout.inputs)
        )
        captured = Captured(graph, arguments, network.in_spec, network.out_spec)
        regions = [
            Region(*([self.nodes[n] for n in given[k]] for k in ("nodes", "inputs", "outputs")))
            for given in recipe["regions"]
        ]
        bits = {self.nodes[name]: QConfig(weight_bits=n) for name, n in recipe["bits"].items()}
        prepared = Prepared(captured, regions, {}, Ranges(regions), bits)
        prepared.ranges.wide.clear()  # the file says which, should another version choose others
        for name, (scale, zero_point, of) in recipe["values"].items():
            node, dtype = self.nodes[name], value_dtype(name, of)
            clamp_of(name, dtype, None, None, zero_point)
            if dtype == np.int16:
                prepared.ranges.wide.add(prepared.ranges.find(node))
            qparams = QParams(np.array(scale, np.float32), np.array(zero_point, np.int32), dtype)
            prepared.set_qparams(node, qparams)
        steps = {step.name: step for program in network.programs for step in program.steps}
        for node in prepared.layers():
            data = steps[node.name].arguments["weight"].data
            scale = self.state[f"{node.name}.real_scale"].numpy()
            prepared.chosen[node] = data, scale
            real = torch.from_numpy(data * per_output(scale, data.ndim))
            node.tensors["weight"] = mirrored(node, real)
        return prepared

    def node(self, given: Mapping[str, Any], member: bool) -> Node:
        name, op = given["name"], given["op"]
        if op not in KINDS:
            raise ValueError(f"{name} is a {op!r:.80}, which is no operation")
        attrs = {key: decode_value(value, NAMED) for key, value in given["attrs"].items()}
        for target in [attrs["target"]] if op == "aten" else [c[0] for c in attrs.get("calls", ())]:
            check_target(target)
        keys = [
            key for key in given["tensors"] if not (member and op in LAYERS and key == "weight")
        ]
        tensors = {key: self.tensor(name, key) for key in keys}
        return Node(
            name, op, [self.nodes[v] for v in given["inputs"]], attrs, tensors,
            layer=given["layer"], kind=given["kind"], shape=tuple(given["shape"]),
        )  # fmt: skip

    def tensor(self, name: str, key: str) -> Tensor:
        """A float tensor of a node in a program, or of one between programs."""
        real = self.state.get(f"{name}.real_{key}")
        return (self.state[f"{name}.{key}"] if real is None else real).clone()
