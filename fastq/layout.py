"""How a saved network is put together: programs, and float operators between them. As JSON, and
back. It needs no torch; torch's own kinds of values have names here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from fastq.sizes import Shapes, Size, sized

# kind -> name -> value: "dtype", "layout", "memory_format" and "device"
Named = Mapping[str, Mapping[str, Any]]
NOTES = ("folded", "norm", "why")  # among a node's attributes, not needed to run it


@dataclass(frozen=True)
class Ref:
    """In the arguments of a float operator: its input number `index`."""

    index: int


def filled(
    value: Any, inputs: Sequence[Any], tensors: Mapping[str, Any], shapes: Shapes = ()
) -> Any:
    """An argument of a float operator as it is called with: an input for a Ref, a tensor for the
    text "%name", a number for a Size; in lists and tuples too.

    shapes  those of the network's inputs, which a Size counts from.
    """
    if isinstance(value, Ref):
        return inputs[value.index]
    if isinstance(value, str) and value.startswith("%"):
        return tensors[value[1:]]
    if isinstance(value, list | tuple):
        return type(value)(filled(v, inputs, tensors, shapes) for v in value)
    return sized(value, shapes)


@dataclass(frozen=True)
class Stage:
    """One thing to do: run program number `program`, or evaluate a float node.

    inputs, outputs  names of values.      attrs  of an "aten" node or an operation of `graph`.
    layer, why       of a float node, for reports: its module, and why it has no integer form.
    """

    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attrs: Mapping[str, Any]
    program: int = -1
    layer: str = ""
    why: str = ""


@dataclass(frozen=True)
class Layout:
    """How a network is put together; with the tensors of its state it is all of it.

    inputs    a name for each leaf of (args, kwargs); None for one that is no tensor.
    extents   the sizes that each input must have, None for any; None for one that is no tensor.
    constants the leaves that are no tensors, by their place.
    outputs   for each leaf of the result a name, or ("constant", value).
    specs     of (args, kwargs) and of the result, as pytree's JSON.
    names     of the parameters of the float network's forward.
    recipe    what the programs were made from, as JSON (recipe.py): not needed to run them.
    """

    stages: tuple[Stage, ...]
    programs: tuple[Mapping[str, Any], ...]
    inputs: tuple[str | None, ...]
    extents: tuple[tuple[int | None, ...] | None, ...]
    constants: Mapping[str, Any]
    outputs: tuple[Any, ...]
    specs: tuple[str, str]
    names: tuple[str, ...]
    recipe: Mapping[str, Any]


def encode_layout(layout: Layout, named: Named) -> dict[str, Any]:
    """A layout as JSON; TypeError for an operator's argument that has no form there."""
    stages = [
        {
            "op": stage.op,
            "inputs": list(stage.inputs),
            "outputs": list(stage.outputs),
            "attrs": {k: encode_value(v, named) for k, v in stage.attrs.items() if k not in NOTES},
            "program": stage.program,
            "layer": stage.layer,
            "why": stage.why,
        }
        for stage in layout.stages
    ]
    return {
        "stages": stages,
        "programs": list(layout.programs),
        "inputs": list(layout.inputs),
        "extents": [None if e is None else list(e) for e in layout.extents],
        "constants": {k: encode_value(v, named) for k, v in layout.constants.items()},
        "outputs": [
            out if isinstance(out, str) else [encode_value(out[1], named)] for out in layout.outputs
        ],
        "specs": list(layout.specs),
        "names": list(layout.names),
        "recipe": layout.recipe,
    }


def decode_layout(
    given: Any, named: Named, check: Callable[[Stage], None], tensors: Container[str]
) -> Layout:
    """The layout again; ValueError for what `encode_layout` does not write.

    check(stage) raises ValueError for a float operator that may not run. tensors: names of those
    that are there.
    """
    try:
        stages = tuple(
            Stage(
                s["op"],
                tuple(s["inputs"]),
                tuple(s["outputs"]),
                {k: decode_value(v, named) for k, v in s["attrs"].items()},
                s["program"],
                s["layer"],
                s["why"],
            )
            for s in given["stages"]
        )
        layout = Layout(
            stages,
            tuple(given["programs"]),
            tuple(given["inputs"]),
            tuple(None if e is None else tuple(e) for e in given["extents"]),
            {k: decode_value(v, named) for k, v in given["constants"].items()},
            tuple(
                out if isinstance(out, str) else ("constant", decode_value(out[0], named))
                for out in given["outputs"]
            ),
            (given["specs"][0], given["specs"][1]),
            tuple(given["names"]),
            given["recipe"],
        )
        _check(layout, check, tensors)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"a layout is not in order: {type(error).__name__}: {error}") from error
    return layout


def encode_value(value: Any, named: Named) -> Any:
    """An attribute of a node as JSON; TypeError for what has no form there."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [encode_value(v, named) for v in value]}
    if isinstance(value, dict):
        return {"dict": {str(k): encode_value(v, named) for k, v in value.items()}}
    if isinstance(value, Ref):
        return {"ref": value.index}
    if isinstance(value, Size):
        return {"size": list(astuple(value))}
    for kind, names in named.items():
        for name, known in names.items():
            if type(value) is type(known) and value == known:
                return {kind: name}
    raise TypeError(f"an operator takes {value!r:.80}, which has no form in a file")


def decode_value(given: Any, named: Named) -> Any:
    """The attribute again; ValueError for what `encode_value` does not write."""
    if not isinstance(given, dict):
        if isinstance(given, list):
            raise ValueError(f"wanted an object, got {given!r:.80}")
        return given
    ((kind, content),) = given.items()
    match kind:
        case "float" if content in ("inf", "-inf", "nan"):
            return float(content)
        case "list" | "tuple":
            values = [decode_value(v, named) for v in content]
            return values if kind == "list" else tuple(values)
        case "dict":
            return {k: decode_value(v, named) for k, v in content.items()}
        case "ref" if type(content) is int and content >= 0:
            return Ref(content)
        case "size" if isinstance(content, list):
            return Size(*content)
        case _ if content in named.get(kind, {}):
            return named[kind][content]
    raise ValueError(f"{given!r:.80} is no value of an operator")


def _check(layout: Layout, check: Callable[[Stage], None], tensors: Container[str]) -> None:
    """ValueError unless each stage takes what is there, and check(stage) lets it run."""
    known = {name for name in layout.inputs if name is not None}
    texts = [*layout.specs, *layout.names, *known]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("names and specs are strings")
    fits = len(layout.extents) == len(layout.inputs) and all(
        (name is None) == (extent is None)
        and all(n is None or type(n) is int for n in extent or ())
        for name, extent in zip(layout.inputs, layout.extents, strict=True)
    )
    if not fits:
        raise ValueError(f"extents {layout.extents!r:.80} for inputs {layout.inputs}")
    wanted = {str(i) for i, name in enumerate(layout.inputs) if name is None}
    if wanted != layout.constants.keys():
        raise ValueError(f"constants {sorted(layout.constants)} for inputs {layout.inputs}")
    for stage in layout.stages:
        texts = [*stage.inputs, *stage.outputs, stage.layer, stage.why]
        if not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{stage!r:.80}: names are strings")
        if missing := [name for name in stage.inputs if name not in known]:
            raise ValueError(f"{stage.outputs} takes {missing}, which no stage before it makes")
        known.update(stage.outputs)
        if stage.op == "program":
            programs = layout.programs
            if type(stage.program) is not int or not 0 <= stage.program < len(programs):
                raise ValueError(f"there is no program {stage.program!r}")
            taken, made = programs[stage.program]["inputs"], programs[stage.program]["outputs"]
            if len(taken) != len(stage.inputs) or len(made) != len(stage.outputs):
                raise ValueError(f"{stage.outputs}: another number of inputs or outputs")
        else:
            check(stage)
            if stage.program != -1 or len(stage.outputs) != 1:
                raise ValueError(f"{stage.outputs}: a float operator has one output")
            _check_arguments(stage, tensors)
    ends = [out for out in layout.outputs if isinstance(out, str)]
    if missing := [name for name in ends if name not in known]:
        raise ValueError(f"no stage makes the outputs {missing}")


def _check_arguments(stage: Stage, tensors: Container[str]) -> None:
    """ValueError unless each input and tensor that a float operator names is there; in a chain of
    calls, the results of those before it are inputs, too."""
    attrs = dict(stage.attrs)
    calls = attrs.pop("calls", ())
    operators = [(attrs.get("target", stage.op), attrs), *((call[0], call) for call in calls)]
    for i, (name, arguments) in enumerate(operators):
        count = len(stage.inputs) + max(i - 1, 0)
        for leaf in _leaves(arguments):
            if isinstance(leaf, Ref) and leaf.index >= count:
                raise ValueError(
                    f"{stage.outputs}: {name} takes input {leaf.index}, but has {count}, counted "
                    "from 0"
                )
            named = isinstance(leaf, str) and leaf.startswith("%")
            if named and f"{stage.outputs[0]}.{leaf[1:]}" not in tensors:
                raise ValueError(
                    f"{stage.outputs}: {name} takes tensor {leaf[1:]!r}, which the file has not"
                )


def _leaves(value: Any) -> Iterator[Any]:
    """What is no tuple, list or dict, in all of these."""
    if isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _leaves(part)
    else:
        yield value
