"""Attention's masks, however a float network spells them.

Where a mask is bool it says which keys take part. Most networks make a float tensor of it, which is
added to the scores: 0 where a key takes part, and elsewhere so far below 0 that the softmax gives
no weight. In integers there is no such number, but there is `softmax`'s mask. So it has to be known
that a tensor has no other values than these: `possible_values` follows how it was made.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from fastq.graph import Node, evaluate
from fastq.layout import Ref

LOWEST = -100.0  # added to a score, this or less leaves nothing of its weight
MARK = -1e4  # in the place of a value, this or less is none
MOST = 8  # values that are followed

# aten operators whose value has the values of their first operand, and no others
_MOVES = frozenset([
    "expand", "view", "reshape", "unsqueeze", "squeeze", "slice", "select", "clone", "contiguous",
    "alias", "detach", "to", "_to_copy", "permute", "transpose", "index", "repeat", "expand_as",
])  # fmt: skip
_FILLS = {"zeros": 0.0, "zeros_like": 0.0, "new_zeros": 0.0,
          "ones": 1.0, "ones_like": 1.0, "new_ones": 1.0}  # fmt: skip
# of each element alone
_ELEMENTWISE = frozenset(["add", "sub", "rsub", "mul", "neg", "div"])


def operator_of(node: Node) -> str:
    """The name of the operator of an "aten" node, without its namespace and its overload."""
    return str(node.attrs["target"].split(".")[1]) if "." in node.attrs["target"] else ""


def operand(node: Node, value: Any) -> Any:
    """An argument of an "aten" node: a Node, a tensor or what it is."""
    if isinstance(value, Ref):
        return node.inputs[value.index]
    if isinstance(value, str) and value.startswith("%"):
        return node.tensors[value[1:]]
    return value


Values = frozenset[float] | None


def possible_values(
    value: Any, flags: Collection[Node], known: dict[Node, Values] | None = None
) -> Values:
    """The values that elements of a number, a tensor or a node's value may have; None if these are
    not known, or more than a few.

    flags  the nodes whose values are bool.    known  what was found of nodes already.
    """
    known = {} if known is None else known
    if isinstance(value, Node) and value in known:
        return known[value]
    found = _possible(value, flags, known)
    found = found if found is not None and len(found) <= MOST else None
    if isinstance(value, Node):
        known[value] = found
    return found


def _possible(value: Any, flags: Collection[Node], known: dict[Node, Values]) -> Values:
    if isinstance(value, bool | int | float):
        return frozenset([float(value)])
    if isinstance(value, Tensor):
        return _few(value)
    if not isinstance(value, Node):
        return None
    if value in flags:
        return frozenset([0.0, 1.0])
    if value.op == "constant":
        return _few(value.tensors["value"])
    if value.op in ("reshape", "permute", "slice"):
        return possible_values(value.inputs[0], flags, known)
    if value.op in ("add", "mul", "pointwise"):
        return _combined(value, flags, known)
    if value.op != "aten":
        return None
    name, args = operator_of(value), [operand(value, v) for v in value.attrs["args"]]
    if name in _FILLS:
        return frozenset([_FILLS[name]])
    if name in _MOVES:
        return possible_values(args[0], flags, known)
    if name in ("full", "full_like", "new_full", "scalar_tensor"):
        return possible_values(args[0 if name == "scalar_tensor" else -1], flags, known)
    if name in ("where", "masked_fill") and len(args) == 3:
        parts = args[1:] if name == "where" else args[::2]
        sets = [possible_values(v, flags, known) for v in parts]
        return None if None in sets else frozenset().union(*sets)  # type: ignore[arg-type]
    if name in ("triu", "tril"):
        found = possible_values(args[0], flags, known)
        return None if found is None else found | {0.0}
    plain = all(v.numel() == 1 for v in value.tensors.values())
    return _combined(value, flags, known) if name in _ELEMENTWISE and plain else None


def _few(tensor: Tensor) -> Values:
    found = tensor.unique() if tensor.numel() else tensor
    return frozenset(map(float, found.tolist())) if found.numel() <= MOST else None


def _combined(node: Node, flags: Collection[Node], known: dict[Node, Values]) -> Values:
    """What an operator of each element makes of all combinations of its operands."""
    inputs = [possible_values(v, flags, known) for v in node.inputs]
    if not inputs or any(values is None for values in inputs):
        return None
    columns = zip(*itertools.product(*(sorted(v) for v in inputs if v is not None)), strict=True)
    made = evaluate(node, [torch.tensor(column) for column in columns])
    return None if bool(made.isnan().any()) else _few(made)


def is_mask(value: Any, flags: Collection[Node]) -> bool:
    """Whether what is added to scores, a node or a tensor, does nothing but leave some out."""
    found = possible_values(value, flags)
    return found is not None and all(v == 0 or v <= LOWEST for v in found)


def fills_low(node: Node) -> bool:
    """Whether a float operator puts a number so far below all others in some places that it marks
    them, as before a maximum."""
    if node.op != "aten" or operator_of(node) not in ("masked_fill", "where"):
        return False
    found = [possible_values(operand(node, v), ()) for v in node.attrs["args"]]
    return any(values and max(values) <= MARK for values in found)


def is_low(value: Any, flags: Collection[Node]) -> bool:
    """Whether what is put in the place of scores leaves them out."""
    found = possible_values(value, flags)
    return found is not None and all(v <= LOWEST for v in found)
