"""LSTM, GRU and plain recurrent layers: products with all inputs, and the recurrence."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from fastq.graph import Node
from fastq.read.exported import Arguments, arguments_of, name_of
from fastq.read.reader import GROWING, SAME, Reader, reads_any


@reads_any("lstm", "gru", "rnn_tanh", "rnn_relu")
def layers(reader: Reader, node: fx.Node, a: Arguments) -> list[Node | None] | None:
    """[all hidden states, the last ones, None] of layers that begin with zeros."""
    wanted = {use.args[1] for use in node.users if use in reader.used}
    why = _why_float(node, a, wanted)
    if why:
        reader.whys[node] = why
        return None
    x, weights, directions = a["input"], a["params"], 1 + a["bidirectional"]
    of, time, last = 4 if a["has_biases"] else 2, int(a["batch_first"]), []
    for first in range(0, len(weights), of * directions):
        made = []
        for reverse in (False, True)[:directions]:
            begin = first + of * reverse
            h = _direction(reader, node, x, weights[begin : begin + of], time, reverse)
            made.append(h)
            if 1 in wanted:
                last.append(_last_state(reader, node, h, time, reverse))
        x = _joined(reader, node, made, 2)
    return [x, _joined(reader, node, last, 0) if last else None, None]


def _why_float(node: fx.Node, a: Arguments, wanted: set[Any]) -> str:
    """Why a recurrent layer, of whose results some are wanted, stays float; "" if it does not."""
    if "batch_sizes" in a:
        return "its sequences are packed"
    weights = a["params"]
    if not isinstance(a["input"], Node) or not all(isinstance(w, Tensor) for w in weights):
        return "its input is a constant, or its weights are computed"
    if len(weights) != a["num_layers"] * (1 + a["bidirectional"]) * (4 if a["has_biases"] else 2):
        return "it has a projection"
    if a["train"] and a["dropout"]:
        return "its dropout is on"
    states: Any = arguments_of(node, node.target)["hx"]
    if not all(map(_is_zero, states if isinstance(states, list | tuple) else [states])):
        return "it is given its first state"
    return "its cell is asked for" if 2 in wanted else ""


def _is_zero(state: fx.Node) -> bool:
    """Whether a tensor is made of zeros, whatever its shape; a parameter may become another."""
    name = name_of(state.target)
    if name in ("full", "new_full", "full_like"):
        return bool(state.args[-1] == 0)
    moved = name in (*GROWING, "unsqueeze", "reshape", "view", "to", "_to_copy", *SAME)
    return name in ("zeros", "new_zeros", "zeros_like") or (moved and _is_zero(state.args[0]))  # type: ignore[arg-type]


def _direction(
    reader: Reader, node: fx.Node, x: Node, weights: list[Tensor], time: int, reverse: bool
) -> Node:
    """One layer in one direction; weights are of inputs and of states, then the biases."""
    inputs, states = (
        dict(zip(("weight", "bias"), weights[of::2], strict=False)) for of in range(2)
    )
    rows, features = x.shape[:2], states["weight"].shape[1]
    gates = reader.add(node, "linear", [x], tensors=inputs, name=f"{node.name}_gates",
                       shape=(*rows, len(inputs["weight"])))  # fmt: skip
    cell = name_of(node.target).removeprefix("rnn_")
    attrs = {"cell": cell, "time": time, "reverse": reverse}
    return reader.add(node, "recurrent", [gates], attrs=attrs, tensors=states,
                      shape=(*rows, features))  # fmt: skip


def _last_state(reader: Reader, node: fx.Node, h: Node, time: int, reverse: bool) -> Node:
    """(1, B, H): of all states the last one that was made."""
    state = reader.part(f"{node.name}_last", h, time, *((0, 1) if reverse else (-1, None)))
    return state if time == 0 else reader.permute(f"{state.name}_first", state, (1, 0, 2))


def _joined(reader: Reader, node: fx.Node, parts: list[Node], dim: int) -> Node:
    """Parts of three axes side by side."""
    if len(parts) == 1:
        return parts[0]
    sizes = list(parts[0].shape)
    sizes[dim] = sum(part.shape[dim] for part in parts)
    return reader.add(node, "concat", parts, attrs={"dim": dim}, name=f"{node.name}_joined",
                      shape=tuple(sizes))  # fmt: skip
