"""What is put together, taken apart or chosen along an axis: concatenations and slices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastq.graph import Node
from fastq.read.exported import Arguments, arguments_of, name_of, ranked_shape, shape_of
from fastq.read.reader import GROWING, MAX_TERMS, Reader, concatenated, reads, reads_any, without


@reads_any("cat", "concat", "concatenate")
def cat(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    parts = a["tensors"]
    if not all(isinstance(v, Node | Tensor) for v in parts):
        return None
    if any(len(v.shape) != len(parts[0].shape) for v in parts):
        return None
    parts = [
        reader.constant(f"{node.name}_constant{i}", v) if isinstance(v, Tensor) else v
        for i, v in enumerate(parts)
    ]
    dim = (a.get("dim") or 0) % len(parts[0].shape)
    return parts[0] if len(parts) == 1 else reader.add(node, "concat", parts, attrs={"dim": dim})


@reads_any("copy")
def copy(reader: Reader, node: fx.Node, a: Arguments) -> Node | Tensor | None:
    """What a part that is assigned to has then: all that is assigned."""
    source = a["src"]
    own = source in reader.computed  # memory of its own, and not the caller's
    return source if own and tuple(source.shape) == shape_of(node) else None


@reads_any("stack")
def stack(reader: Reader, node: fx.Node, a: Arguments) -> Node | None:
    """A concatenation along a new axis."""
    parts = a["tensors"]
    if not all(isinstance(v, Node) and v.shape == parts[0].shape for v in parts):
        return None
    shape = list(parts[0].shape)
    dim = (a.get("dim") or 0) % (len(shape) + 1)
    shape.insert(dim, 1)
    apart = [reader.reshape(f"{node.name}_{i}", v, shape) for i, v in enumerate(parts)]
    return reader.add(node, "concat", apart, attrs={"dim": dim})  # type: ignore[arg-type]


@reads_any("expand", "expand_as", "broadcast_to")
def expand(reader: Reader, node: fx.Node, a: Arguments) -> Node | Tensor | None:
    """What is the same along an axis, where all who take it broadcast it themselves: a class
    token or a mask for any batch, factors of channels for any image."""
    x, shape = a["self"], shape_of(node)
    if not isinstance(x, Tensor | Node):
        return None
    if node.meta["val"].dtype is torch.bool:
        taken = {name_of(user.target) for user in node.users}
        masks = isinstance(x, Tensor) and taken == {"scaled_dot_product_attention"}
        return x if masks else None
    size = ranked_shape(x, len(shape))
    grown = [i for i, (n, m) in enumerate(zip(shape, size, strict=True)) if n != m]

    def broadcasts(user: fx.Node) -> bool:
        name = name_of(user.target)
        if name not in ("cat", "add", "sub", "mul", "div"):
            return False
        values = [v.meta["val"] for v in user.all_input_nodes]
        if name == "cat" and (
            (arguments_of(user, user.target).get("dim") or 0) % len(shape) in grown
            or any(v.dtype != torch.float32 or v.dim() != len(shape) for v in values)
        ):
            return False
        others = (shape_of(v) for v in user.all_input_nodes if name_of(v.target) not in GROWING)
        return any(
            len(other) == len(shape) and all(other[i] == shape[i] for i in grown)
            for other in others
        )

    if not all(map(broadcasts, node.users)):
        return None
    if isinstance(x, Tensor):
        return reader.constant(node.name, x.reshape(size))
    return reader.reshape(f"{node.name}_axes", x, size)


@reads_any("repeat", "tile")
def repeat(reader: Reader, node: fx.Node, a: Arguments) -> Node | Tensor | None:
    """An expansion of axes of size 1; a concatenation along any other."""
    x, shape = a["self"], shape_of(node)
    size = ranked_shape(x, len(shape))
    times = [n // m if m else 1 for n, m in zip(shape, size, strict=True)]
    if 0 in shape:
        return None
    if all(m == 1 for m, count in zip(size, times, strict=True) if count != 1):
        return expand(reader, node, a)
    longer = [dim for dim, count in enumerate(times) if count != 1]
    if not isinstance(x, Node) or len(size) != len(x.shape) or longer != longer[:1]:
        return None
    (dim,) = longer
    if dim == 0 or not reader.unrolls or times[dim] > MAX_TERMS:
        return None
    return reader.add(node, "concat", [x] * times[dim], attrs={"dim": dim})


@reads("repeat_interleave")
def repeat_interleave(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    """A concatenation along a new axis behind that one, then both are one."""
    times, dim = a.get("repeats"), a.get("dim")
    if not isinstance(times, int) or dim is None:
        return None
    dim %= len(x.shape)
    if dim == 0 or not reader.unrolls or not 1 <= times <= MAX_TERMS:
        return None
    shape = (*x.shape[: dim + 1], 1, *x.shape[dim + 1 :])
    apart = reader.reshape(f"{node.name}_apart", x, shape)
    if apart is None:
        return None
    shape = (*x.shape[: dim + 1], times, *x.shape[dim + 1 :])
    together = reader.add(f"{node.name}_times", "concat", [apart] * times, shape=shape,
                          attrs={"dim": dim + 1})  # fmt: skip
    alone = ((d,) if d != dim else (dim, dim + 1) for d in range(len(shape)) if d != dim + 1)
    groups = tuple((axes, (None,)) for axes in alone)
    return reader.add(node, "reshape", [together], attrs={"groups": groups})


@reads("chunk", "split", "split_with_sizes", "tensor_split", "hsplit")
def split(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> list[Node] | None:
    """Slices, as long as the sizes are those of the example."""
    dim = a.get("dim", 1 if name_of(node.target) == "hsplit" else 0) % len(x.shape)
    found, start = [], 0
    for i, value in enumerate(node.meta["val"]):
        end = start + int(value.shape[dim])
        found.append(reader.part(f"{node.name}_{i}", x, dim, start, end))
        start = end
    return found if start == x.shape[dim] else None  # tensor_split by places in any order


@reads("roll")
def roll(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    """The end before the beginning, along each axis."""
    if not a.get("dims"):
        return None
    for i, (shift, dim) in enumerate(zip(a["shifts"], a["dims"], strict=True)):
        dim %= len(x.shape)
        if shift == 0:
            continue
        if abs(shift) >= x.shape[dim]:
            return None
        name = f"{node.name}_{i}"
        ends = [
            reader.part(f"{name}_end", x, dim, -shift, None),
            reader.part(f"{name}_begin", x, dim, 0, -shift),
        ]
        x = reader.add(node, "concat", ends, name=name, attrs={"dim": dim}, shape=x.shape)
    return x


@reads("unbind")
def unbind(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> list[Node] | None:
    dim = (a.get("dim") or 0) % len(x.shape)
    shape = x.shape[:dim] + x.shape[dim + 1 :]
    attrs = {"groups": without(dim, len(x.shape))}
    found = []
    for i in range(x.shape[dim]):
        part = reader.part(f"{node.name}_{i}_part", x, dim, i, i + 1)
        found.append(reader.add(f"{node.name}_{i}", "reshape", [part], shape=shape, attrs=attrs))
    return found


@reads("slice")
def sliced(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    dim = (a.get("dim") or 0) % len(x.shape)
    start, end, step = a.get("start") or 0, a.get("end"), a.get("step") or 1
    if end is not None and (end >= 2**31 or end == x.shape[dim]):
        end = None
    if (start, end, step) == (0, None, 1):
        return x
    found = concatenated(x, dim, start, end) if step == 1 else None
    attrs = {"dim": dim, "start": start, "end": end, "step": step}
    return reader.add(node, "slice", [x], attrs=attrs) if found is None else found


@reads("narrow")
def narrow(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    start, length = a["start"], a["length"]
    if not isinstance(start, int):
        return None
    start %= x.shape[a["dim"]]
    return sliced(reader, node, x, {**a, "start": start, "end": start + length})


@reads("index_select")
def index_select(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    return _places(reader, node, x, a["dim"], a["index"])


@reads("index")
def index(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    *before, places = a["indices"]
    if any(value is not None for value in before):
        return None
    return _places(reader, node, x, len(before), places)


@reads("flip")
def flip(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    dims = a["dims"]
    if len(dims) != 1:
        return None
    return _places(reader, node, x, dims[0], torch.arange(x.shape[dims[0]]).flip(0))


def _places(reader: Reader, node: fx.Node, x: Node, dim: int, index: Any) -> Node | None:
    """These places of an axis, if they are known and make a few runs: the runs' concatenation."""
    if node.meta["val"].dtype is not torch.float32:
        return None
    if not isinstance(index, Tensor) or index.dim() != 1 or index.dtype is torch.bool:
        return None
    dim %= len(x.shape)
    if dim == 0 or not reader.unrolls:
        return None
    n = x.shape[dim]
    runs: list[list[int]] = []  # [begin, end]
    for place in (index % n).tolist() if n else []:
        if runs and runs[-1][1] == place:
            runs[-1][1] += 1
        else:
            runs.append([place, place + 1])
    if not 1 <= len(runs) <= MAX_TERMS:
        return None
    parts = [reader.part(f"{node.name}_{i}", x, dim, *run) for i, run in enumerate(runs)]
    return reader.add(node, "concat", parts, attrs={"dim": dim})


@reads("select")
def select(reader: Reader, node: fx.Node, x: Node, a: Arguments) -> Node | None:
    dim, index = a["dim"] % len(x.shape), a["index"]
    y = reader.part(f"{node.name}_slice", x, dim, index, None if index == -1 else index + 1)
    return reader.add(node, "reshape", [y], attrs={"groups": without(dim, len(x.shape))})
