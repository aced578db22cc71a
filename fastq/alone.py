"""Int8 layers of their own: float operators of a captured network that no program can have, and
`fastq.nn` has as layers. They compute between the programs, float32 in and out.

    recurrent layers and cells, whose states are given or asked for     as QLSTM, QLSTMCell, ...
    convolutions of volumes, transposed or not                          as QConv3d, ...
    embeddings, and bags of them                                        as QEmbedding, ...
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fastq.graph import (
    BAG_LAYER,
    CELL_LAYER,
    CONVOLUTION_LAYER,
    EMBEDDING_LAYER,
    RECURRENT_LAYER,
    VOLUMES,
    Node,
)
from fastq.layout import Ref
from fastq.masks import operator_of
from fastq.nn.convolve import products
from fastq.nn.embedding import LEAST_ROW
from fastq.nn.layer import STATE
from fastq.observer import qparams_of
from fastq.prepare import Prepared
from fastq.qconfig import QConfig
from fastq.qparams import MAX_K
from fastq.summaries import ASKED
from fastq.weights import outputs_first

# torch's recurrent operators: cells, and layers of sequences that are not packed
CELLS = ("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
RECURRENCES = tuple(f"aten.{cell.removesuffix('_cell')}.input" for cell in CELLS)


def make_alone(prepared: Prepared) -> None:
    """Makes such operators int8, but those that were asked to stay float.

    They are named as before; `prepared.alone` has their modules, and why no program has them.
    """
    for node in prepared.graph:
        reason = prepared.reasons.get(node, "")
        if node.op not in ("aten", *VOLUMES) or reason == ASKED:
            continue
        name = operator_of(node) if node.op == "aten" else node.op
        if name in LOOKUPS and _fits(node, LEAST_ROW):
            LOOKUPS[name](node, prepared.config(node))
            prepared.alone[node.layer], reason = ("int8 weight", ""), ""
        elif node.op in VOLUMES and _fits(node) and _sums(node) <= MAX_K:
            _convolution(node, prepared.config(node))
            prepared.alone[node.layer] = "int8 dynamic", reason  # until a range was seen
            prepared.entries.add(node.inputs[0])
        elif (name in CELLS or node.attrs.get("target") in RECURRENCES) and _fits(node):
            _recurrent(node, prepared.config(node))
            reason = "its state is given to it" if name in CELLS else reason
            prepared.alone[node.layer] = "int8 dynamic", reason
        else:
            continue
        prepared.reasons[node] = f"an int8 layer of its own{reason and f': {reason}'}"


def make_static(prepared: Prepared) -> None:
    """Gives convolutions the ranges of their inputs that calibration saw."""
    for node in prepared.graph:
        seen = prepared.seen.get(node.inputs[0]) if node.inputs else None
        if node.attrs.get("target") != CONVOLUTION_LAYER or seen is None or not seen.count:
            continue
        found = qparams_of(seen, node.layer or node.name)
        node.tensors["input_scale"] = torch.tensor(found.scale.item(), dtype=torch.float32)
        node.tensors["input_zero_point"] = torch.tensor(found.zero_point.item(), dtype=torch.int32)
        given = node.attrs["args"]
        node.attrs["args"] = (*given[:4], "%input_scale", "%input_zero_point", *given[6:])
        prepared.alone[node.layer] = "int8 static", prepared.alone[node.layer][1]


def _fits(node: Node, least: int = 0) -> bool:
    """Whether its weights can be int8, and have so many values in a row."""
    weights = list(node.tensors.values())
    return bool(weights) and all(
        w.dtype is torch.float32
        and w.device.type == "cpu"
        and bool(w.isfinite().all())
        and least <= w.shape[-1] <= MAX_K
        for w in weights
    )


def _quantized(weight: Tensor, config: QConfig) -> tuple[Tensor, Tensor]:
    real = weight.detach().numpy()
    data, scale = config.quantize_weight(real)
    return torch.from_numpy(data), torch.tensor(np.asarray(scale, np.float32))


def _embedding(node: Node, config: QConfig) -> None:
    (weight,), (_, tokens, *_) = node.tensors.values(), node.attrs["args"]
    node.tensors = dict(zip(("weight", "weight_scale"), _quantized(weight, config), strict=True))
    args = tokens, "%weight", "%weight_scale"
    node.attrs = {"target": EMBEDDING_LAYER, "args": args, "kwargs": {}}


def _embedding_bag(node: Node, config: QConfig) -> None:
    weight = next(iter(node.tensors.values()))  # per_sample_weights are an input
    names = ("tokens", "offsets", "", "mode", "", "per_sample", "last", "padding")
    given = dict(zip(names, (*node.attrs["args"][1:], None), strict=False))
    node.tensors = dict(zip(("weight", "weight_scale"), _quantized(weight, config), strict=True))
    args = (
        given["tokens"], "%weight", "%weight_scale", given["offsets"], given["mode"],
        given["per_sample"], given["last"], given["padding"],
    )  # fmt: skip
    node.attrs = {"target": BAG_LAYER, "args": args, "kwargs": {}}


LOOKUPS = {"embedding": _embedding, "embedding_bag": _embedding_bag}


def _sums(node: Node) -> int:
    """How many products a convolution sums."""
    shape, a = node.tensors["weight"].shape, node.attrs
    transposed = node.op == "conv_transpose3d"
    return products(shape, a["stride"], a["dilation"], transposed, a["groups"])


def _convolution(node: Node, config: QConfig) -> None:
    a, transposed = node.attrs, node.op == "conv_transpose3d"
    weight, groups = node.tensors["weight"].detach(), a["groups"]
    first = outputs_first(weight, groups) if transposed else weight
    data, scale = _quantized(first, config)
    data = outputs_first(data, groups) if transposed else data
    tensors = {"weight": data, "weight_scale": scale}
    if "bias" in node.tensors:
        tensors["bias"] = node.tensors["bias"].detach()
    sides = [(p, p) for p in a["padding"]] if transposed else a["padding"]
    padding = [side for pair in sides for side in pair]
    args = (
        Ref(0), "%weight", "%weight_scale", "%bias" if "bias" in tensors else None, None, None,
        list(a["stride"]), padding, list(a["dilation"]), transposed, groups,
        list(a.get("output_padding", (0, 0, 0))),
    )  # fmt: skip
    node.op, node.tensors = "aten", tensors
    node.attrs = {"target": CONVOLUTION_LAYER, "args": args, "kwargs": {}}
    if "folded" in a:
        node.attrs["folded"] = a["folded"]


def _recurrent(node: Node, config: QConfig) -> None:
    name, args = operator_of(node), node.attrs["args"]
    cell = name.removesuffix("_cell").removeprefix("rnn_")
    if name in CELLS:
        x, hx, *given = args
        parameters = [p for p in given if p is not None]
        biases, count = len(parameters) == 4, 1
    else:
        x, hx, parameters, biases, layers, _, _, both, time = args
        count = layers * (1 + both)
    states = list(hx) if cell == "lstm" else [hx]
    each = len(parameters) // count
    projected = each == 3 + 2 * biases
    tensors = {"absent": torch.empty(0)}

    def product(weight: str, bias: str | None) -> list[str]:
        data, scale = _quantized(node.tensors[weight[1:]], config)
        made = {"weight": data, "weight_scale": scale}
        if bias is not None:
            made["bias"] = node.tensors[bias[1:]].detach()
        number = len(tensors)
        tensors.update({f"{key}_{number}": value for key, value in made.items()})
        return [f"%{key}_{number}" if key in made else "%absent" for key in STATE]

    linears: list[str] = []
    for first in range(0, len(parameters), each):
        ih, hh, *more = parameters[first : first + each]
        b_ih, b_hh = more[:2] if biases else (None, None)
        linears += product(ih, b_ih) + product(hh, b_hh)
        linears += product(more[-1], None) if projected else []
    for state in states:  # of the network, not of an input
        if isinstance(state, str):
            tensors[state[1:]] = node.tensors[state[1:]]
    node.tensors = tensors
    if name in CELLS:
        target, args = CELL_LAYER, (x, states, linears, cell)
    else:
        target = RECURRENT_LAYER
        args = x, states, linears, projected, cell, [], int(time), bool(both), 0.0
    node.attrs = {"target": target, "args": args, "kwargs": {}}
