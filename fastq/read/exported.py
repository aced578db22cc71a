"""What is known of an operator of an exported program, and how its arguments are spelled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, fx

from fastq.weights import explicit_padding, several

Arguments = dict[str, Any]  # of an operator, by the names in its schema


def name_of(target: Any) -> str:
    """An operator's name, without its namespace and its overload; "" of what is none."""
    schema = getattr(target, "_schema", None)
    return "" if schema is None else schema.name.split("::")[1]


def first_of(node: fx.Node) -> fx.Node | str:
    """What `add` names a node's value by: of several, the first one's name."""
    return node if isinstance(node.meta["val"], Tensor) else f"{node.name}_0"


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's value in the example that was traced; () if it is no tensor."""
    value = node.meta.get("val")
    return tuple(map(int, value.shape)) if isinstance(value, Tensor) else ()


def ranked_shape(value: Any, rank: int) -> tuple[int, ...]:
    """Its shape, with axes of size 1 before, up to that many."""
    return (1,) * (rank - len(value.shape)) + tuple(value.shape)


def memory_of(node: fx.Node) -> int:
    """A number for the memory that a node's value lies in: equal for values that share it."""
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else 0


def used_of(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that the results depend on."""
    used: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node.op == "output" or node in used:
            used.update((node, *node.all_input_nodes))
    return used


def arguments_of(node: fx.Node, target: Any) -> Arguments:
    """All arguments by their names in the operator's schema."""
    given: dict[str, Any] = {}
    for i, argument in enumerate(target._schema.arguments):
        if i < len(node.args):
            given[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            given[argument.name] = node.kwargs[argument.name]
        elif argument.has_default_value():
            given[argument.name] = argument.default_value
    return given


def takes_indices(node: fx.Node) -> bool:
    """Whether somebody wants to know where a pooling found what it returns."""
    return any(user.users and user.args[1] != 0 for user in node.users)


def is_off(a: Arguments) -> bool:
    """Whether a dropout, or the like, does nothing: it is not in training mode."""
    return not a.get("train", a.get("training", False))


def one(value: Any) -> int:
    return value if isinstance(value, int) else int(value[0])


def two(value: Any) -> tuple[int, int]:
    both = [value, value] if isinstance(value, int) else list(value)
    return (both[0], both[-1])


def numbers(value: Any) -> Any:
    """A number, or all of them: torch takes one for all axes."""
    many = [value] if isinstance(value, int) else list(value)
    return many[0] if len(many) == 1 else many


def geometry(a: Arguments, kernel: Sequence[int]) -> dict[str, Any]:
    """stride, padding (before and after) and dilation of a convolution, axis by axis."""
    axes = len(kernel)
    stride, dilation = (several(key, numbers(a[key]), axes, 1) for key in ("stride", "dilation"))
    padding = a["padding"] if isinstance(a["padding"], str) else numbers(a["padding"])
    sides = explicit_padding(padding, tuple(kernel), stride, dilation)
    return {"stride": stride, "padding": sides, "dilation": dilation}


def parameters(a: Arguments, *names: str) -> dict[str, Tensor] | None:
    """The given ones of the arguments of these names; None if the network computes one of them."""
    found = {name: a[name] for name in names if a.get(name) is not None}
    return found if all(isinstance(value, Tensor) for value in found.values()) else None
