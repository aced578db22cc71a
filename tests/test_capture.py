"""Captured graphs: what belongs to the network, what to the example, and what cannot be told."""

from __future__ import annotations

import copy
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import MASKS, Call, Masked, attention_of, call, conv
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from fastq.capture import Captured, capture
from fastq.graph import Node, evaluate, shapes_of
from fastq.read import CannotCapture
from fastq.sizes import Size


def run(captured: Captured, *args: Any, **kwargs: Any) -> Any:
    """The result of the graph, node by node."""
    leaves = pytree.tree_leaves((args, kwargs))
    values: dict[Node, Any] = {}
    for wanted, leaf in zip(captured.arguments, leaves, strict=True):
        if isinstance(wanted, Node):
            values[wanted] = leaf
        else:
            assert wanted == leaf
    shapes = shapes_of(leaves)
    for node in captured.graph:
        if node.op == "constant":
            values[node] = node.tensors["value"]
        elif node not in values:
            values[node] = evaluate(node, [values[v] for v in node.inputs], shapes)
    outputs = [values[v] if isinstance(v, Node) else v for v in captured.graph.outputs]
    return pytree.tree_unflatten(outputs, captured.out_spec)


def same(wanted: Any, found: Any) -> None:
    """The same structure of nearly the same values."""
    (one, spec), (two, spec_too) = map(pytree.tree_flatten, (wanted, found))
    assert spec == spec_too
    for x, y in zip(one, two, strict=True):
        if isinstance(x, Tensor):
            torch.testing.assert_close(y, x, atol=1e-5, rtol=1e-5)
        else:
            assert x == y and type(x) is type(y)


@torch.no_grad()
def check(
    model: nn.Module, *args: Any, batches: tuple[int, ...] = (1, 6), **kwargs: Any
) -> Captured:
    """The graph computes what the model does, for the example and for other batch sizes."""
    captured = capture(model.eval(), args, kwargs)
    for batch in (None, *batches):

        def resized(x: Any, batch: int | None = batch) -> Any:
            whole = isinstance(x, Tensor) and x.dim() and batch is not None
            return torch.cat([x] * 6)[:batch].flip(0) if whole else x

        given, named = pytree.tree_map(resized, (args, kwargs))
        wanted = copy.deepcopy(model)(*copy.deepcopy(given), **copy.deepcopy(named))
        same(wanted, run(captured, *given, **named))
    return captured


def ops(captured: Captured) -> list[str]:
    return [node.op for node in captured.graph if node.op not in ("input", "constant")]


def grows(captured: Captured) -> tuple[int, ...]:
    """The axes of the first input, but for the batch's, that may have other sizes."""
    return tuple(axis for axis in captured.graph.inputs[0].attrs["free"] if axis)


def refused(model: nn.Module, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(CannotCapture) as caught:
        capture(model.eval(), args, kwargs)
    return str(caught.value)


def image(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 7)


A: dict[str, Callable[[], nn.Module]] = {"a": conv(3, 4, 3, padding=1)}


# ------------------------------------------------------------------------- what follows the example


def test_the_extent_is_the_examples_where_nothing_depends_on_it() -> None:
    captured = check(call(lambda net, x: F.relu(net.a(x)).mean((2, 3)), **A)(), image())
    assert grows(captured)
    model = call(lambda net, x: F.relu(net.a(x)).mean((2, 3)), **A)().eval()
    captured, larger = capture(model, (image(),)), torch.randn(3, 3, 12, 30)
    with torch.no_grad():
        same(model(larger), run(captured, larger))


# networks, and the axes that they do not depend on
EXTENTS: dict[str, tuple[Callable[[Call, Tensor], Any], tuple[int, ...]]] = {
    "pads to odd sizes": (lambda net, x: net.a(F.pad(x, (0, 1 - x.shape[3] % 2, 0, 0))), (2,)),
    "a size in the values": (lambda net, x: net.a(x) / x.shape[2], (3,)),
    "a branch": (lambda net, x: net.a(x) if x.shape[2] < 50 else F.relu(net.a(x)), (3,)),
    "a loop": (lambda net, x: sum(net.a(x)[:, :, i] for i in range(x.shape[2])), (3,)),
    "both": (lambda net, x: net.a(x) / (x.shape[2] + x.shape[3]), ()),
    "rows of features": (
        lambda net, x: F.linear(net.a(x).flatten(1), torch.ones(2, 4 * 8 * 7)), ()),
}  # fmt: skip


def test_images_may_have_their_channels_last() -> None:
    model = call(lambda net, x: net.a(x.permute(0, 3, 1, 2)), **A)().eval()
    captured = check(model, torch.randn(2, 8, 7, 3))
    assert grows(captured) == (1, 2)
    with torch.no_grad():
        larger = torch.randn(3, 12, 5, 3)
        same(model(larger), run(captured, larger))


@pytest.mark.parametrize("name", EXTENTS)
def test_a_graph_that_depends_on_the_extent_holds_for_it(name: str) -> None:
    function, free = EXTENTS[name]
    assert grows(check(call(function, **A)(), image())) == free
    if not free:
        return
    model, sizes = call(function, **A)().eval(), list(image().shape)
    captured = capture(model, (image(),))
    sizes[free[0]] += 6
    with torch.no_grad():
        larger = torch.randn(sizes)
        same(model(larger), run(captured, larger))


FOLLOWING: dict[str, Callable[[Call, Tensor], Any]] = {
    "positions": lambda net, x: net.a(x) + torch.arange(x.shape[3]),
    "rows": lambda net, x: net.a(x) * torch.arange(x.shape[2])[:, None],
    "one more": lambda net, x: (
        net.a(x),
        torch.ones(x.shape[2] + 1),
        torch.ones(2 * x.shape[3] - 1),
    ),
    "a part": lambda net, x: net.a(x) + torch.linspace(0, 1, 99)[: x.shape[3]],
    "a part of a parameter": lambda net, x: net.a(x) + net.a.weight.flatten()[: x.shape[2], None],
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_numbers_that_follow_the_extent(name: str) -> None:
    model = call(FOLLOWING[name], **A)()
    captured = check(model, image())
    assert grows(captured)
    for size in ((8, 8), (11, 20), (21, 12)):
        larger = torch.randn(3, 3, *size)
        with torch.no_grad():
            same(model(larger), run(captured, larger))


@pytest.mark.parametrize("name", ["where", "where not", "added zeros", "both"])
def test_a_mask_that_leaves_nothing(name: str) -> None:
    """Of finite numbers the weights are equal; of infinities torch gives NaN, and this 0."""
    model, x = Masked(8, 2, MASKS[name]), torch.randn(3, 6, 8)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[1], padding[2, 4:] = True, True
    captured = capture(model.eval(), (x, padding))
    with torch.no_grad():
        wanted, found = model(x, padding), run(captured, x, padding)
    same(wanted[::2], found[::2])
    if name.startswith("where"):
        same(wanted[1], found[1])
    else:
        assert wanted[1].isnan().any()
        same(found[1, 0], model.out.bias.detach())


def test_what_is_no_mask_is_added() -> None:
    """A float tensor that may hold anything, and a constant of finite numbers."""
    attend = call(
        lambda net, x, bias: attention_of(net, x, attn_mask=bias), a=lambda: nn.Linear(8, 24)
    )
    bias = torch.randn(2, 1, 6, 6)
    bias[:, :, 2:, 4] = -torch.inf
    captured = check(attend(), torch.randn(2, 6, 8), bias)
    (softmax,) = (node for node in captured.graph if node.op == "softmax")
    assert len(softmax.inputs) == 2 and softmax.inputs[0].op == "add"  # it may be both
    model = Masked(8, 2, lambda net, s, padding: s + net.bias[:, :6, :6])
    captured = check(model, torch.randn(2, 6, 8), torch.zeros(2, 6, dtype=torch.bool))
    (softmax,) = (node for node in captured.graph if node.op == "softmax")
    assert len(softmax.inputs) == 1 and softmax.inputs[0].op == "add"


class Squares(nn.Module):
    """A number of positions that is no size, nor near one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        b, n, _ = x.shape
        return self.a(x), torch.arange(n * n) + torch.arange(b * n).sum()


@pytest.mark.parametrize("length", [10, 14, 77])
def test_a_product_of_sizes_follows_none(length: int) -> None:
    assert not grows(check(Squares(), torch.randn(2, length, 4), batches=(1, 6)))


def test_inputs_of_two_lengths() -> None:
    """Each grows by a number of its own: it is known whose a size is, also of equal ones."""

    def forward(net: Call, x: Tensor, y: Tensor) -> Tensor:
        return net.a(y) + torch.arange(y.shape[1])[:, None] + net.a(x).mean(1, keepdim=True)

    model = call(forward, a=lambda: nn.Linear(4, 3))()
    for length in (6, 10):
        captured = check(model, torch.randn(2, 10, 4), torch.randn(2, length, 4))
        assert grows(captured)
        x, y = torch.randn(3, 9, 4), torch.randn(3, 14, 4)
        with torch.no_grad():
            same(model(x, y), run(captured, x, y))


@pytest.mark.parametrize("length", [2, 3])
def test_a_sequence_that_is_too_short_to_be_shortened(length: int) -> None:
    model = call(
        lambda net, x: net.a(x + net.p.weight[: x.shape[1]]),
        a=lambda: nn.Linear(4, 3),
        p=lambda: nn.Embedding(length, 4),
    )()
    assert not grows(check(model, torch.randn(2, length, 4)))


def test_a_sequence_of_one_that_may_not_grow() -> None:
    def forward(net: Call, x: Tensor) -> Tensor:
        if x.shape[1] > 1:
            raise ValueError("one token at a time")
        return net.a(x)

    model = call(forward, a=lambda: nn.Linear(4, 3))()
    assert not grows(check(model, torch.randn(2, 1, 4)))


ROWS: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "joined, and parted": lambda net, h: net.a(h.reshape(-1, 16)).reshape(*h.shape[:2], 8),
    "joined": lambda net, h: F.relu(net.a(h.flatten(0, 1))),
    "of parts": lambda net, h: net.a(h.unsqueeze(2).reshape(-1, 1, 16)),
    "of ones": lambda net, h: net.b(h.reshape(-1, 16, 1)),
}


@pytest.mark.parametrize("name", ROWS)
def test_linear_layers_of_rows(name: str) -> None:
    model = call(ROWS[name], a=lambda: nn.Linear(16, 8), b=lambda: nn.Linear(1, 1))
    captured = check(model(), torch.randn(2, 10, 16))
    if name == "joined, and parted":
        assert grows(captured) and ops(captured) == ["linear"]


def test_a_mask_of_many_layers_is_found_in_time() -> None:
    """Each way through a network of residual layers leads to the scores: there are thousands."""

    class Deep(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                Masked(8, 2, lambda net, s, p: s + torch.zeros_like(s).masked_fill(p, -torch.inf))
                for _ in range(9)
            )

        def forward(self, x: Tensor, padding: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(F.gelu(x) + torch.where(x > 0, x, -x), padding)
            return x

    padding = torch.arange(6) >= torch.tensor([[6], [3]])
    captured = check(Deep(), torch.randn(2, 6, 8), padding)
    masked = [node for node in captured.graph if node.op == "softmax" and len(node.inputs) == 2]
    assert len(masked) == 9


def test_a_mask_of_five_axes_stays_float() -> None:
    def forward(net: Call, x: Tensor, mask: Tensor) -> Tensor:
        scores = x @ x.mT
        return scores.masked_fill(mask[:, :, None], -torch.inf).softmax(-1) @ x

    mask = torch.rand(2, 3, 5, 5) < 0.3
    mask[..., 0] = False
    check(call(forward)(), torch.randn(2, 3, 2, 5, 4), mask)


def test_sizes_that_follow_the_batch() -> None:
    def forward(net: Call, x: Tensor) -> Any:
        y = net.a(x)
        return y.reshape(len(x), -1), y + torch.zeros(len(x), 4, 1, 1), y.reshape(2 * len(x), -1)

    captured = check(call(forward, **A)(), image())
    held = [v for node in captured.graph for v in pytree.tree_leaves(node.attrs)]
    assert Size(0, 0) in held


def test_a_parameter_for_each_of_the_batch() -> None:
    """A class token, in the two ways that it is written."""
    for grow in (lambda t, n: t.expand(n, -1, -1), lambda t, n: t.repeat(n, 1, 1)):

        def forward(net: Call, x: Tensor, grow: Any = grow) -> Tensor:
            return torch.cat([grow(net.a.weight[None, :2], len(x)), x], 1)

        check(call(forward, a=lambda: nn.Linear(6, 4))(), torch.randn(4, 3, 6))


# of a parameter with as many rows as the batch has, each the same: a constant
EXPANSIONS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "scaled": lambda t, n: 30 * t.expand(n, 2, 6),
    "two": lambda t, n: torch.tanh(t.expand(n, -1, -1)) + t[0].expand(n, 2, 6) * t[0, 0],
    "repeated": lambda t, n: F.dropout(t.repeat(n, 1, 1) / 2, training=False).clone(),
    "fewer axes": lambda t, n: t[0, 0].expand(n, 1, 6).to(t.dtype).neg(),
    "permuted": lambda t, n: (t.transpose(0, 1).expand(-1, n, -1) + 1).permute(1, 0, 2),
    "a new axis": lambda t, n: t[0, 0].repeat(n, 1).unsqueeze(1).relu(),
    "of two axes": lambda t, n: t[:, :1].expand(n, 2, 6) - t.expand(n, 2, 6),
}


@pytest.mark.parametrize("name", EXPANSIONS)
def test_what_is_computed_of_an_expanded_parameter_is_a_constant(name: str) -> None:
    grown = EXPANSIONS[name]

    def forward(net: Call, x: Tensor) -> Tensor:
        return torch.cat([grown(net.a.weight[None, :2], len(x)), x], 1)

    captured = check(call(forward, a=lambda: nn.Linear(6, 4))(), torch.randn(4, 3, 6))
    assert [node.op for node in captured.graph] == ["input", "constant", "concat"]


@pytest.mark.parametrize("name", ["clone", "times", "added"])
def test_an_expanded_parameter_that_is_written_later(name: str) -> None:
    def forward(net: Call, x: Tensor) -> Tensor:
        t = net.a.weight[None, :2].expand(len(x), -1, -1)
        t = t.clone() if name == "clone" else 2 * t
        if name == "added":
            t[:, :1] += x[:, 1:2]
        else:
            t[:, 0] = x[:, 0]
        return torch.cat([t, x], 1)

    check(call(forward, a=lambda: nn.Linear(6, 4))(), torch.randn(4, 3, 6))


def test_an_expanded_parameter_that_meets_one_of_its_own_size_or_the_input() -> None:
    """The one is a constant anyway; of the other nothing is."""

    def forward(net: Call, x: Tensor) -> tuple[Tensor, ...]:
        t = net.a.weight[:1].expand(4, 6)
        return x + (t * net.a.weight)[:3], 2 * net.a.weight[0].expand_as(x) * x, t.add(1)

    check(call(forward, a=lambda: nn.Linear(6, 4))(), torch.randn(4, 3, 6))


BATCHES: dict[str, tuple[Callable[[Call, Tensor], Any], str]] = {
    "a branch": (lambda net, x: net.a(x) if len(x) < 6 else F.relu(net.a(x)), "size of the input"),
    "a loop": (lambda net, x: sum(net.a(x)[i] for i in range(len(x))), "size of the input"),
    "a list of images": (lambda net, x: list(net.a(x).unbind(0)), "size of the input"),
    "a value": (lambda net, x: net.a(x) + 3.5 * len(x) ** 2, "two sizes of the input"),
    "a slice": (lambda net, x: net.a(x)[: len(x) // 2], "two sizes of the input"),
    "a constant": (lambda net, x: net.a(x) * torch.full((4, 1, 1), len(x) ** 2), ""),
}


@pytest.mark.parametrize("name", BATCHES)
def test_a_graph_that_depends_on_the_batch_is_refused(name: str) -> None:
    function, reason = BATCHES[name]
    assert reason in refused(call(function, **A)(), image())


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if float(x.sum()) > 0 else x


def test_a_branch_on_the_data_is_refused_with_a_reason() -> None:
    reason = refused(Branch(), torch.randn(4, 6))
    assert "data" in reason.lower() and len(reason) < 300


def test_an_error_of_the_model_is_a_reason() -> None:
    def forward(net: Call, x: Tensor) -> Tensor:
        raise LookupError("no such image\nand more")

    why = refused(call(forward, **A)(), image())
    assert why.startswith("LookupError: no such image (of examples of 5 and of 17, made of")


# ------------------------------------------------------------------------------ arguments, results


def test_arguments_of_every_kind() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.e = nn.Linear(6, 6), nn.Embedding(9, 6)

        def forward(
            self, x: Tensor, rest: Any, mask: Tensor | None = None, *, scale: float = 2.0,
            flag: bool = False,
        ) -> Any:  # fmt: skip
            y = self.a(x) * scale + self.e(rest["ids"][0])
            return y if mask is None else torch.where(mask, y, -y), flag, None

    x, ids = torch.randn(4, 6), torch.randint(0, 9, (4,))
    model = Many()
    check(model, x, {"ids": [ids]})
    captured = check(model, x, rest={"ids": [ids]}, mask=x > 0, scale=0.5, flag=True)
    assert captured.arguments[-2:] == (0.5, True)
    assert [isinstance(v, Node) for v in captured.arguments] == [True, True, True, False, False]


def test_inputs_of_other_dtypes() -> None:
    for dtype in (torch.float64, torch.bool, torch.int64, torch.uint8, torch.bfloat16):
        model = call(lambda net, x: net.a(x.float()), a=lambda: nn.Linear(6, 4))()
        captured = check(model, (torch.randn(4, 6) * 9).to(dtype))
        assert ops(captured) == ["aten", "linear"], dtype
    captured = check(nn.Linear(6, 4).double(), torch.randn(4, 6).double())
    assert ops(captured) == ["aten"]  # no operation of float32


Pair = namedtuple("Pair", ["left", "right"])
RESULTS: dict[str, Callable[[Call, Tensor], Any]] = {
    "none": lambda net, x: (None, net.a(x)),
    "a dict of lists": lambda net, x: {"y": [net.a(x), 3], "z": (x, "text", 2.5)},
    "a named tuple": lambda net, x: Pair(net.a(x), net.a(x) + 1),
    "the input": lambda net, x: (x, net.a(x), x),
    "a view of the input": lambda net, x: (x[:, :2], x.flatten(2), net.a(x)),
    "one value twice": lambda net, x: (lambda y: [y, y, F.relu(y)])(net.a(x)),
    "a parameter": lambda net, x: (net.a(x), net.a.bias),
    "a constant": lambda net, x: (net.a(x), torch.ones(3), 2 * net.a.weight),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_of_every_kind(name: str) -> None:
    with torch.no_grad():
        check(call(RESULTS[name], **A)(), image())


# ------------------------------------------------------------------------------------ the model


def test_shared_modules_are_called_twice() -> None:
    captured = check(
        call(lambda net, x: net.b(F.relu(net.b(net.a(x)))), **A, b=conv(4, 4, 1))(), image()
    )
    layers = [node for node in captured.graph if node.op == "conv2d"]
    assert [node.layer for node in layers] == ["a", "b", "b"]
    assert layers[1].tensors["weight"] is not None
    assert layers[1].tensors["weight"].data_ptr() == layers[2].tensors["weight"].data_ptr()


def test_layers_have_their_names_and_kinds() -> None:
    body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4), nn.GELU()))
    captured = check(body, image())
    nodes = [node for node in captured.graph if node.op != "input"]
    assert [(node.layer, node.kind, node.op) for node in nodes] == [
        ("0", "Conv2d", "conv2d"), ("1.0", "BatchNorm2d", "affine"), ("1.1", "GELU", "pointwise"),
    ]  # fmt: skip


def test_dropout_and_batch_norm_are_those_of_eval_mode() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.9), nn.Dropout2d(), nn.AlphaDropout()
    )
    model[1].running_mean.normal_()
    assert ops(check(model, image())) == ["conv2d", "affine"]


def test_a_batch_norm_without_statistics_stays_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    assert ops(check(model, image(), batches=()))[1:] == ["aten"]


def test_the_model_stays_as_it_is() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm = nn.Linear(6, 6), nn.BatchNorm1d(6)
            self.calls: list[Any] = []

        def forward(self, x: Tensor) -> Tensor:
            self.last = x
            self.calls.append(x.shape)
            return self.norm(self.a(x))

    model = Counts().eval()
    model.norm.train()
    model.a.weight.requires_grad = False
    state, members = copy.deepcopy(model.state_dict()), set(vars(model))
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    with pytest.raises(CannotCapture, match="changes a parameter"):
        capture(model, (torch.randn(4, 6, generator=torch.Generator().manual_seed(1)),))
    model.norm.eval()
    captured = capture(model, (torch.zeros(4, 6),))
    assert [module.training for module in model.modules()][:2] == modes[:2]
    assert set(vars(model)) == members and model.calls == []
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert model.norm.weight.requires_grad and not model.a.weight.requires_grad
    assert torch.equal(random, torch.get_rng_state())
    assert not any(t.requires_grad for node in captured.graph for t in node.tensors.values())


def test_hooks_are_part_of_the_network() -> None:
    model = call(lambda net, x: net.a(x), **A)()
    handle = model.a.register_forward_hook(lambda module, args, y: y * 2)
    model.register_forward_pre_hook(lambda module, args: (F.relu(args[0]),))
    assert ops(check(model, image())) == ["pointwise", "conv2d", "pointwise"]
    handle.remove()
    assert ops(check(model, image())) == ["pointwise", "conv2d"]


# ------------------------------------------------------------------------------------ in place


IN_PLACE: dict[str, Callable[[Call, Tensor], Any]] = {
    "itself": lambda net, x: F.relu_(net.a(x)).add_(1),
    "a copy": lambda net, x: (lambda y: (y.clone().relu_(), y))(net.a(x)),
    "what a view sees": lambda net, x: (lambda y, v: (y.mul_(2), v))(
        *(lambda y: (y, y.flatten(1)))(net.a(x))
    ),
    "through a view": lambda net, x: (lambda y: (y[:, 1:3].zero_(), y)[1])(net.a(x)),
    "after it was read": lambda net, x: (lambda y: (y + 1, y.relu_(), y))(net.a(x)),
    "assigned": lambda net, x: (lambda y: (y.__setitem__((..., 0), 7.0), y)[1])(net.a(x)),
    "a copy of the input": lambda net, x: (lambda y: (y.sub_(1), net.a(y)))(x.clone()),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_changes_in_place_are_seen(name: str) -> None:
    check(call(IN_PLACE[name], **A)(), image())


# of parameters alone: what becomes one constant
OF_CONSTANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "in place": lambda t: (t + 1).relu_().mul_(0.5),
    "other names": lambda t: (t * 4).floor_divide_(torch.tensor(2.0)).abs().pow_(t.abs()),
    "by an operator": lambda t: (lambda y: (y.__ifloordiv__(2), y)[1])(t * 4),
    "dropout": lambda t: F.dropout(F.dropout(t * 2, 0.5, False), 0.5, False, True),
    "a view": lambda t: (lambda y: (y[:2].zero_(), y)[1])(t + 1),
}


@pytest.mark.parametrize("name", OF_CONSTANTS)
def test_changes_in_place_of_what_is_made_of_parameters_are_constants(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.t = nn.Parameter(torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return x + OF_CONSTANTS[name](self.t)

    model = Net()
    before = model.t.detach().clone()
    assert ops(check(model, torch.randn(4, 6))) == ["add"]
    assert torch.equal(model.t, before)


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 6)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        return self.a(x) * self.seen


def test_changes_of_what_is_not_the_graphs_are_refused() -> None:
    model = Buffered()
    assert "chang" in refused(model, torch.randn(4, 6))
    assert model.seen == 0
    assert "chang" in refused(call(lambda net, x: net.a(x.relu_()), **A)(), image())
    assert "chang" in refused(call(lambda net, x: (x[:, 0].zero_(), net.a(x))[1], **A)(), image())


def test_what_nobody_reads_is_left_out() -> None:
    def forward(net: Call, x: Tensor, y: Tensor) -> Tensor:
        net.a(y).sort(1)
        return net.a(x)

    captured = check(call(forward, **A)(), image(), image())
    assert ops(captured) == ["conv2d"]
    assert len(captured.graph.inputs) == 2


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_size_like_those_of_the_batch(batch: int) -> None:
    """Of 160 pixels a network of stride 32 makes 5, of 10 tokens pooling by 2 does: they are as
    many as a batch may have, and follow the image."""

    def places(net: Call, x: Tensor) -> Tensor:
        for _ in range(5):
            x = F.relu(net.b(x))
        return net.c(x.mean(3).transpose(1, 2) + net.d.weight[: x.shape[2]])

    layers = {
        "b": lambda: nn.Conv2d(8, 8, 3, 2, 1),
        "c": lambda: nn.Linear(8, 4),
        "d": lambda: nn.Linear(8, 50),
    }
    for size in (160, 224):
        check(call(places, **layers)().eval(), torch.randn(batch, 8, size, size))

    def tokens(net: Call, x: Tensor) -> Tensor:
        y = F.max_pool1d(net.b(x), 2).transpose(1, 2)
        return net.c(y + net.d.weight[: y.shape[1]])

    layers["b"] = lambda: nn.Conv1d(3, 8, 1)
    check(call(tokens, **layers)().eval(), torch.randn(batch, 3, 10))


def test_tokens_before_the_batch_with_states() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.cell = nn.Embedding(20, 16), nn.LSTM(16, 16)
            self.last = nn.Linear(16, 20)

        def forward(self, tokens: Tensor, h: Tensor, c: Tensor) -> Any:
            y, states = self.cell(self.words(tokens), (h, c))
            return self.last(y), *states

    model = Words().eval()
    captured = capture(model, [torch.randint(20, (9, 4)), *torch.randn(2, 1, 4, 16)])
    assert captured.arguments[0].attrs["free"] == (0, 1)


TUTORIALS: dict[str, Callable[[nn.Module, int], Tensor]] = {
    "square": lambda net, n: nn.Transformer.generate_square_subsequent_mask(n),
    "bool": lambda net, n: torch.triu(torch.ones(n, n, dtype=torch.bool), 1),
    "buffer": lambda net, n: net.mask[:n, :n],  # type: ignore[union-attr, index]
}


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_transformer_encoder_need_not_say_that_its_mask_is_causal(name: str) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(64))

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x, mask=TUTORIALS[name](self, x.shape[1]))

    captured = check(Encoder(), torch.randn(2, 6, 8))
    assert grows(captured) and ops(captured).count("softmax") == 2


# ---------------------------------------------------------------- what is no graph of its model


LINEAR: dict[str, Callable[[], nn.Module]] = {"a": lambda: nn.Linear(8, 8)}


class Adds(nn.Module):
    """Each call adds to what the last one left, in an attribute or a buffer."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.a, self.where = nn.Linear(8, 8), where
        self.last: Any = 0.0
        self.register_buffer("kept", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "attribute":
            self.last = self.a(x) + self.last
            return self.last
        torch.add(self.kept, 1.0, out=self.kept)
        return self.a(x) * self.kept


@pytest.mark.parametrize("where", ["attribute", "buffer"])
def test_a_state_is_no_graph(where: str) -> None:
    model = Adds(where).eval()
    with pytest.raises(CannotCapture, match="it has a state"):
        capture(model, (torch.randn(4, 8),))
    assert model.last == 0.0 and not model.kept.any()


class Keeps(nn.Module):
    """What it stores, it never reads."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.a(x)
        return self.seen


def test_what_is_stored_and_never_read_is_no_state() -> None:
    check(Keeps(), torch.randn(4, 8))
    noisy = call(lambda net, x: net.a(x) + torch.randn(x.shape[0], 8), a=lambda: nn.Linear(8, 8))
    capture(noisy().eval(), (torch.randn(4, 8),))  # other numbers at each call


def test_a_branch_on_the_batch_that_the_example_does_not_take() -> None:
    model = call(lambda net, x: net.a(x) * (1 if x.shape[0] % 2 else -1), **LINEAR)().eval()
    capture(model, (torch.randn(3, 8),))
    with pytest.raises(CannotCapture, match="it may branch on a size"):
        capture(model, (torch.randn(4, 8),))


def test_sizes_that_are_returned_follow_the_input() -> None:
    model = call(lambda net, x: (net.a(x), x.shape[0], {"rows": 2 * x.shape[1]}), **LINEAR)().eval()
    captured = capture(model, (torch.randn(4, 6, 8),))
    for shape in ((3, 6, 8), (4, 9, 8)):
        x = torch.randn(*shape)
        same(
            (shape[0], {"rows": 2 * shape[1]}),
            pytree.tree_unflatten(captured.graph.run([x]), captured.out_spec)[1:],
        )
    with pytest.raises(CannotCapture, match=r"output 1: 5\.0 and 17\.0"):
        capture(call(lambda net, x: (net.a(x), float(len(x))), **LINEAR)(), (torch.randn(4, 8),))


def test_inputs_without_a_batch() -> None:
    """A grid of positions, and a mask of each token for each other."""
    grid = call(
        lambda net, x, grid: net.a(x) + net.b(grid),
        a=lambda: nn.Conv2d(3, 8, 3, padding=1), b=lambda: nn.Conv2d(2, 8, 1),
    )().eval()  # fmt: skip
    captured = capture(grid, (image(), torch.randn(1, 2, *image().shape[2:])))
    for batch, size in ((1, (8, 8)), (3, (11, 20))):
        given = torch.randn(batch, 3, *size), torch.randn(1, 2, *size)
        with torch.no_grad():
            same(grid(*given), run(captured, *given))
    attend = call(
        lambda net, x, mask: attention_of(net, x, attn_mask=mask), a=lambda: nn.Linear(8, 24)
    )().eval()
    captured = capture(attend, (torch.randn(4, 6, 8), torch.zeros(6, 6)))
    for tokens in (6, 9):
        mask = torch.full((tokens, tokens), -torch.inf).triu(1)
        x = torch.randn(2, tokens, 8)
        with torch.no_grad():
            same(attend(x, mask), run(captured, x, mask))


@pytest.mark.parametrize("tokens", [15, 19, 20])
def test_an_example_as_long_as_there_are_positions(tokens: int) -> None:
    model = call(
        lambda net, i: net.o(net.e(i) + net.p(torch.arange(i.shape[1]))),
        e=lambda: nn.Embedding(9, 8), p=lambda: nn.Embedding(20, 8), o=lambda: nn.Linear(8, 4),
    )().eval()  # fmt: skip
    captured = capture(model, (torch.randint(0, 9, (4, tokens)),))
    for length in (7, 20):
        i = torch.randint(0, 9, (3, length))
        with torch.no_grad():
            same(model(i), run(captured, i))


def test_distributions_do_not_check_their_arguments() -> None:
    actor = call(lambda net, x: torch.distributions.Normal(net.a(x), torch.ones(8)).mean, **LINEAR)
    checks = torch.distributions.Distribution._validate_args
    check(actor(), torch.randn(4, 8))
    assert torch.distributions.Distribution._validate_args is checks


def test_autocast_is_left_outside() -> None:
    with torch.autocast("cpu"):
        captured = check(call(lambda net, x: F.relu(net.a(x)), **LINEAR)(), torch.randn(4, 8))
    assert "linear" in ops(captured)


def test_a_norm_whose_weight_is_computed() -> None:
    hyper = call(lambda net, x: F.layer_norm(x, (8,), net.a(x).mean(0)), **LINEAR)
    captured = check(hyper(), torch.randn(4, 8), batches=())
    assert "layer_norm" not in ops(captured)
