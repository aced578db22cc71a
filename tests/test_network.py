"""Whole networks: what goes in and comes out, in every form that a module may have."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import (
    CASES,
    Apply,
    Call,
    Case,
    LayerScale,
    SpelledLayerNorm,
    attention_of,
    between,
    call,
    conv,
    images,
    noise_ratio,
    rows,
)
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fastq
from fastq.kernels.call import address_of
from fastq.nn.model import QuantizedModel
from fastq.qparams import FLT_MIN
from fastq.remedies import DEFAULT
from fastq.weights import MAX_BIAS, with_room


def quantized(model: nn.Module, *batches: object, **kwargs: object) -> nn.Module:
    """Calibrated with its arguments: each batch is a tuple, or a dict of keyword arguments."""

    def forward(network: nn.Module, given: object) -> object:
        return network(**given) if isinstance(given, dict) else network(*given)

    arguments = {"config": fastq.QConfig(observer="minmax"), "progress": False, **kwargs}
    return fastq.quantize_model(model.eval(), batches, forward=forward, **arguments)


def check(model: nn.Module, *args: object, decibels: float = 25.0, **kwargs: object) -> nn.Module:
    """Quantized with these arguments, it gives the same structure of nearly the same values."""
    q = quantized(model, (*args,)) if not kwargs else quantized(model, kwargs)
    assert isinstance(q, QuantizedModel), fastq.summary(q).note
    with torch.no_grad():
        wanted, spec = pytree.tree_flatten(model(*args, **kwargs))
    found, spec_too = pytree.tree_flatten(q(*args, **kwargs))
    assert spec == spec_too
    for x, y in zip(wanted, found, strict=True):
        if isinstance(x, Tensor):
            assert x.shape == y.shape and x.dtype == y.dtype
            assert noise_ratio(x, y) > decibels
        else:
            assert x == y
    return q


@cache
def small() -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, its integers, and an input."""
    case = CASES["residual"]
    network = case.network()
    return network, case.quantized(network), case.arguments(4)[0]


def test_batch_norm_and_activation_join_a_1d_convolution():
    case = CASES["separable conv1d"]
    q = case.quantized()
    kinds = [row.result for row in fastq.summary(q).rows]
    assert kinds.count("folded") == 2 and kinds.count("int8 static") == 3
    ops = [step.op for step in q.program.steps]
    assert not {"affine", "clamp", "permute"} & set(ops[ops.index("conv2d") + 1 :])
    assert ops.count("reshape") == 1  # of the network's input; its output is float32 by then


def test_a_layer_scale_joins_its_product():
    q = CASES["layer scale"].quantized()
    assert [step.op for step in q.program.steps].count("linear") == 2
    assert "0 float operator" in repr(q)


def test_a_layer_scale_of_a_value_that_is_used_twice_stays():
    class Twice(LayerScale):
        def forward(self, x: Tensor) -> Tensor:
            y = self.down(self.up(x))
            return y + self.gamma * y

    check(Twice(5, 9), torch.randn(4, 7, 5))


# ------------------------------------------------------------------------- arguments and results


class Structured(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(2, 4, 3)

    def forward(
        self,
        x: Tensor,
        others: dict[str, list[Tensor]],
        scale: float = 1.0,
        extra: object = None,
        double: bool = False,
    ) -> dict[str, object]:
        y = self.a(x) + self.b(others["image"][0])
        if double:
            y = y * 2
        return {
            "sum": y * scale,
            "pair": (F.relu(y), [y.mean((2, 3))]),
            "none": extra,
            "flag": double,
        }


def test_nested_arguments_and_results():
    x, z = torch.randn(4, 3, 8, 9), torch.randn(4, 2, 8, 9)
    q = check(Structured(), x, {"image": [z]})
    assert q(x, {"image": [z]})["none"] is None
    by_name = q(others={"image": [z]}, x=x)
    assert torch.equal(by_name["sum"], q(x, {"image": [z]})["sum"])


def test_keyword_arguments_flags_and_none():
    x, z = torch.randn(4, 3, 8, 9), torch.randn(4, 2, 8, 9)
    model = Structured()
    q = check(model, x=x, others={"image": [z]}, scale=0.5, extra=None, double=True)
    given = {"others": {"image": [z]}, "scale": 0.5, "extra": None, "double": True}
    assert torch.equal(q(x, **given)["sum"], q(x=x, **given)["sum"])
    with pytest.raises(ValueError, match="captured with True"):
        q(x=x, **{**given, "double": False})
    with pytest.raises(TypeError, match="as in the calibration data"):
        q(x)
    with pytest.raises(TypeError, match="as in the calibration data"):
        q(x, **given, surprise=1)
    with pytest.raises(ValueError, match="captured with None"):
        q(x=x, **{**given, "extra": x})
    for wrong in (x, x.numpy(), torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"captured with 0\.5"):
            q(x=x, **{**given, "scale": wrong})
    with pytest.raises(TypeError, match="wanted a float32 tensor"):
        q(x=3, **given)


def test_what_a_float_operator_takes_is_a_tensor():
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 4)

        def forward(self, x, counts):
            return self.linear(x) + counts.float().cumsum(-1)

    x, counts = torch.randn(8, 8), torch.ones(8, 4, dtype=torch.int64)
    q = fastq.quantize_model(Counted(), {"x": x, "counts": counts}, progress=False)
    assert q(x, counts).shape == (8, 4)
    for wrong, name in ((3, "int"), (None, "NoneType"), (counts.numpy(), "ndarray")):
        with pytest.raises(TypeError, match=f"counts is a {name}; wanted a tensor"):
            q(x, wrong)


def test_named_tuples_and_two_inputs():
    Pair = namedtuple("Pair", ["left", "right"])
    model = call(
        lambda net, x, y: Pair(net.a(x), net.b(y) + net.a(x)), a=conv(3, 4, 1), b=conv(2, 4, 1)
    )()
    q = check(model, torch.randn(4, 3, 5, 6), torch.randn(4, 2, 5, 6))
    assert isinstance(q(torch.randn(2, 3, 5, 6), torch.randn(2, 2, 5, 6)), Pair)


def test_an_unused_input_and_an_input_returned_unchanged():
    model = call(lambda net, x, y, z: (net.a(x), y), a=conv(3, 4, 1))()
    args = torch.randn(4, 3, 5, 6), torch.randn(4, 2), torch.randn(4, 7)
    q = check(model, *args)
    assert q(*args)[1] is args[1]


def test_integer_inputs():
    model = call(
        lambda net, i: net.b(net.a(i)), a=lambda: nn.Embedding(20, 8), b=lambda: nn.Linear(8, 5)
    )()
    ids = torch.randint(0, 20, (8, 6))
    q = check(model, ids)
    assert q(ids[:3]).shape == (3, 6, 5) and q(ids[:, :4]).shape == (8, 4, 5)


def test_results_that_are_one_value():
    model = call(lambda net, x: (lambda y: (y, y, F.relu(y)))(net.a(x)), a=conv(3, 4, 1))()
    check(model, torch.randn(4, 3, 5, 6))


def test_an_output_that_is_used_inside():
    model = call(
        lambda net, x: (lambda y: (y, net.b(y), net.b(F.relu(y))))(net.a(x)),
        a=conv(3, 4, 3),
        b=conv(4, 4, 3),
    )()
    check(model, torch.randn(4, 3, 9, 8))


def test_outputs_and_inputs_of_any_layout():
    _, q, x = small()
    wanted = q(x)
    for given in (
        x.to(memory_format=torch.channels_last),
        torch.cat([x, x], 1)[:, :3],
        x.transpose(2, 3).contiguous().transpose(2, 3),
        x.flip(0).flip(0),
        x.repeat_interleave(2, 3)[..., ::2],
        x[:1].expand(4, -1, -1, -1),
    ):
        assert torch.equal(q(given), q(given.clone().contiguous()))
    assert torch.equal(q(x), wanted)


def test_a_batch_of_any_size_and_its_images_one_by_one():
    _, q, x = small()
    wanted = q(x)
    for i in range(4):
        assert torch.equal(q(x[i : i + 1]), wanted[i : i + 1])
    assert torch.equal(q(x.flip(0)), wanted.flip(0))
    assert q(x[:0]).shape == (0, *wanted.shape[1:])


def test_gradients_are_refused():
    _, q, x = small()
    given = x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="no_grad"):
        q(given)
    with torch.no_grad():
        assert torch.equal(q(given), q(x))


def test_inputs_that_do_not_fit():
    _, q, x = small()
    for given in (x[0], x[:, :2], torch.zeros(1, 3, 2, 2, 2)):
        with pytest.raises(ValueError, match="wanted"):
            q(given)
    with pytest.raises(TypeError, match="float32"):
        q(x.double())
    with pytest.raises(TypeError, match="float32"):
        q(x.half())


def test_nothing_is_left_of_other_networks_and_threads():
    _, q, x = small()
    other = CASES["u-net"].quantized()
    wanted, wanted_too = q(x), other(torch.full((2, 1, 12, 12), 9.0))
    for size in (12, 40):
        other(torch.full((2, 1, size, size), 1e9))
        assert torch.equal(q(x), wanted)
    wrong: list[str] = []

    def run(network: nn.Module, given: Tensor, result: Tensor) -> None:
        for _ in range(20):
            if not torch.equal(network(given), result):
                wrong.append("differs")

    pairs = [
        (q, x, wanted),
        (q, x[:1], wanted[:1]),
        (other, torch.full((2, 1, 12, 12), 9.0), wanted_too),
    ]
    threads = [threading.Thread(target=run, args=pair) for pair in pairs * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_nan_and_infinity():
    _, q, x = small()
    with torch.no_grad():
        odd = x.clone()
        odd[0, 0, 0, 0], odd[1, 0, 0, 0], odd[2, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
        plain = x.clone()
        plain[0, 0, 0, 0], plain[1, 0, 0, 0], plain[2, 0, 0, 0] = 0, 1e30, -1e30
    assert torch.equal(q(odd), q(plain))


# ------------------------------------------------------------------------------- as on any module


@pytest.mark.parametrize(
    "twin", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q)), copy.copy]
)
def test_copies_give_the_same(twin: Callable[[nn.Module], nn.Module]):
    _, q, x = small()
    wanted = q(x)
    again = twin(q)
    assert torch.equal(again(x), wanted)
    assert str(fastq.summary(again)) == str(fastq.summary(q))


def test_a_copy_has_its_own_state():
    _, q, x = small()
    wanted, again = q(x), copy.deepcopy(q)
    for tensor in again.buffers():
        if tensor.dtype == torch.int8:
            tensor.zero_()
    assert not torch.equal(again(x), wanted)
    assert torch.equal(q(x), wanted)
    again.load_state_dict(q.state_dict())
    assert torch.equal(again(x), wanted)


def test_save_and_load(tmp_path):
    _, q, x = small()
    fastq.save(q, tmp_path / "q")
    fastq.save(fastq.load(tmp_path / "q"), tmp_path / "again")
    assert (tmp_path / "q").read_bytes() == (tmp_path / "again").read_bytes()
    again = fastq.load(tmp_path / "again")
    assert torch.equal(again(x), q(x)) and str(fastq.summary(again)) == str(fastq.summary(q))


def test_modes_and_contexts():
    _, q, x = small()
    wanted = q(x)
    with torch.inference_mode():
        y = q(x)
        assert torch.equal(y, wanted) and torch.equal(q(x.clone()), wanted)
        made_inside = CASES["one conv"].quantized()
    assert not wanted.requires_grad
    assert made_inside(torch.zeros(1, 3, 8, 8)).shape == (1, 4, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(q(x), wanted)
    assert not q.training and not list(q.parameters())
    assert torch.equal(q.train()(x), wanted)
    q.eval()


def test_hooks_see_it_from_outside():
    _, q, x = small()
    seen: list[str] = []
    before = q.register_forward_pre_hook(lambda module, args: seen.append("before"))
    after = q.register_forward_hook(lambda module, args, y: y * 0)
    assert not q(x).any() and seen == ["before"]
    before.remove()
    after.remove()


def test_dtypes_and_devices_stay():
    _, q, x = small()
    wanted, again = q(x), copy.deepcopy(q)
    assert torch.equal(again.half()(x), wanted)
    assert torch.equal(again.double()(x), wanted)
    assert torch.equal(again.to(torch.bfloat16)(x), wanted)
    assert torch.equal(again.to("cpu")(x), wanted)
    with pytest.raises(RuntimeError, match="cannot move to meta"):
        again.to("meta")


def test_a_network_in_a_network():
    _, q, x = small()
    whole = nn.Sequential(q, nn.Flatten())
    assert torch.equal(whole(x), q(x).flatten(1))
    assert "integer program" in repr(whole)


def test_float_operators_are_shown():
    def floats(self: Call, x: Tensor) -> Tensor:
        return self.b(torch.erfinv(self.a(x).clamp(-0.9, 0.9)))

    q = quantized(
        call(floats, a=lambda: nn.Linear(3, 4), b=lambda: nn.Linear(4, 2))(), (torch.randn(4, 3),)
    )
    assert repr(q).split("\n")[1:] == [
        "  2 integer program(s) of 4 steps, 1 float operator(s)",
        "  erfinv: aten.erfinv.default has no integer form",
        ")",
    ]


def test_programs_can_be_read():
    _, q, _ = small()
    assert str(q.program).count(" = conv2d(") == 8
    assert "add" not in [step.op for step in q.program.steps]  # sums are part of the products


def test_sums_behind_permutes_are_part_of_the_products() -> None:
    q = CASES["sums behind permutes"].quantized()
    assert "add" not in [step.op for step in q.program.steps]
    assert [len(step.inputs) for step in q.program.steps if step.op in ("linear", "conv2d")] == [
        2, 2, 2, 1,
    ]  # fmt: skip


AXES: dict[str, Callable[[Call, Tensor], object]] = {
    "a linear layer, and a convolution around it": lambda net, x: net.conv(
        net.a(net.first(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    ),
    "attention along one axis of an image": lambda net, x: (
        lambda y: y @ F.relu(y).transpose(-1, -2)
    )(net.a(net.first(x).permute(0, 2, 3, 1)).unflatten(3, (2, 2)).permute(0, 3, 1, 2, 4)),
}


@pytest.mark.parametrize("name", AXES)
def test_values_whose_axes_do_not_join(name: str):
    torch.manual_seed(0)
    layers = {"first": conv(3, 4, 1), "a": lambda: nn.Linear(4, 4)}
    check(call(AXES[name], **layers, conv=conv(4, 5, 3, padding=1))(), torch.randn(6, 3, 5, 7))


def test_strided_inputs_of_many_axes():
    x = torch.randn(4, 2, 3, 4, 6)
    q = check(nn.Linear(6, 3), x)
    given = torch.randn(8, 4, 6, 8, 12).permute(0, 3, 2, 1, 4)[::2, ::4, ::2, :, ::2]
    assert given.shape == x.shape
    assert torch.equal(q(given), q(given.clone()))


# --------------------------------------------------------------------------- shared, tied, changed


def test_tied_parameters_and_buffers():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight
            self.register_buffer("mean", torch.randn(6))

        def forward(self, x: Tensor) -> Tensor:
            return self.b(F.relu(self.a(x - self.mean))) + F.linear(x, self.a.weight)

    q = check(Tied(), torch.randn(16, 6))
    assert q.program


def test_parametrized_weights():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    nn.utils.parametrizations.weight_norm(model[0])
    q = check(model, torch.randn(4, 3, 8, 8))
    assert [step.op for step in q.program.steps] == ["quantize", "conv2d"]


IN_PLACE: dict[str, Callable[[Call, Tensor], object]] = {
    "relu": lambda net, x: F.relu_(net.a(x)),
    "add": lambda net, x: net.a(x).add_(x),
    "a copy": lambda net, x: (lambda y: y.clone().relu_() + y)(net.a(x)),
    "the original": lambda net, x: (lambda y, z: (y.relu_(), z + y)[1])(
        *(lambda y: (y, y.clone()))(net.a(x))
    ),
    "with a view": lambda net, x: (lambda y, v: (y.relu_(), v + 1)[1])(
        *(lambda y: (y, y.flatten(1)))(net.a(x))
    ),
    "a view": lambda net, x: (lambda y: (y[:, :1].mul_(3), y)[1])(net.a(x)),
    "a view of a view": lambda net, x: (lambda y: (y.flatten(2)[:, 1:].relu_(), y)[1])(net.a(x)),
    "chunks": lambda net, x: (lambda y: (y.unbind(1)[0].zero_(), net.b(y))[1])(net.a(x)),
    "before it is read": lambda net, x: (lambda y: (net.b(y), y.relu_(), y)[::2])(net.a(x)),
    "assigned": lambda net, x: (lambda y: (y.__setitem__((slice(None), 0), 0.5), net.b(y))[1])(
        net.a(x)
    ),
    "clamp, mul": lambda net, x: net.b(net.a(x).clamp_(-1, 1).mul_(2).add_(0.5)),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_operations(name: str):
    torch.manual_seed(0)
    model = call(IN_PLACE[name], a=conv(3, 3, 3, padding=1), b=conv(3, 2, 1))()
    with torch.no_grad():
        check(model, torch.randn(4, 3, 6, 7))


# ------------------------------------------------------------------------------- floats in between


ISLANDS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sort": (lambda x: x.sort(2)[0], "sort"),
    "fft": (lambda x: torch.fft.rfft2(x).abs()[..., : x.shape[-1]], "fft"),
    "einsum": (lambda x: torch.einsum("bchw,bdhw->bcd", x, x)[..., None], ""),
    "grid_sample": (
        lambda x: F.grid_sample(
            x,
            F.affine_grid(
                torch.eye(2, 3)[None].expand(len(x), -1, -1) * 0.7, [len(x), 5, 6, 6], False
            ),
            align_corners=False,
        ),
        "grid",
    ),
    "cumsum": (lambda x: x.cumsum(3) / 4, "cumsum"),
    "where": (lambda x: torch.where(x > 0, x, x.flip(2)), "where"),
    "topk": (lambda x: x.topk(3, -1).values, "topk"),
    "norm": (lambda x: x / (x.norm(dim=1, keepdim=True) + 1), "norm"),
    "batch size": (lambda x: x + torch.arange(len(x))[:, None, None, None] / 10, "arange"),
}


@pytest.mark.parametrize("name", ISLANDS)
def test_float_islands(name: str, tmp_path):
    torch.manual_seed(0)
    function, operator = ISLANDS[name]
    model = between(function, 5)()
    x = torch.randn(6, 3, 8, 8)
    q = check(model, x)
    targets = [str(stage.attrs.get("target", "")) for stage in q.layout.stages]
    assert any(operator in target for target in targets)
    assert noise_ratio(model(x[:2]).detach(), q(x[:2])) > 20
    fastq.save(q, tmp_path / "q")
    assert torch.equal(fastq.load(tmp_path / "q")(x), q(x))


def test_skipped_layers_stay_float():
    _, _, x = small()
    network = CASES["residual"].network()
    q = quantized(network, (x,), skip="1.conv2")
    rows = {row.name: (row.result, row.reason) for row in fastq.summary(q).rows}
    assert rows["1.conv2"] == ("float", "as asked") and rows["0.conv1"][0] == "int8 static"
    assert noise_ratio(network(x).detach(), q(x)) > 25


class ApartBias(nn.Module):
    """BEiT's attention, EVA's: the bias of a layer that has none is put together at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 12, bias=False)
        self.conv = nn.Conv1d(12, 6, 1)
        self.q_bias, self.v_bias = (nn.Parameter(torch.randn(4)) for _ in "qv")
        self.register_buffer("k_bias", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat([self.q_bias, self.k_bias, self.v_bias])
        y = F.linear(x, self.qkv.weight, bias).transpose(1, 2)
        return F.conv1d(y, self.conv.weight, self.conv.bias)


def test_layers_whose_weights_the_module_around_them_takes():
    model, x = nn.Sequential(nn.Linear(6, 6), ApartBias()), torch.randn(4, 5, 6)
    q = quantized(model, (x,), strict=True)
    assert {r.name: (r.kind, r.result) for r in fastq.summary(q).rows} == {
        "0": ("Linear", "int8 static"),
        "1.qkv": ("Linear", "int8 static"),
        "1.conv": ("Conv1d", "int8 static"),
    }
    q = quantized(model, (x,), skip="*.qkv")
    assert [r.result for r in fastq.summary(q).rows] == ["int8 static", "float", "int8 static"]
    assert fastq.summary(q).rows[1].reason == "as asked" and len(q.programs) == 2


# --------------------------------------------------------------------------------- no whole network


def test_a_network_without_products_has_no_integers():
    with pytest.raises(ValueError, match="int8"):
        quantized(nn.Sequential(nn.ReLU(), nn.MaxPool2d(2)), (torch.randn(2, 3, 8, 8),))


def test_a_model_that_cannot_be_captured_gets_int8_layers():
    class Data(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) if float(x.sum()) > 0 else self.b(x)

    model, x = Data().eval(), torch.randn(8, 6)
    remedies = ("gptq",)
    with pytest.warns(UserWarning, match=r"not one network: .*; remedies=\('gptq',\) want a"):
        q = quantized(model, (x,), (-x,), remedies=remedies)
    assert "int8 layers, not one network" in fastq.summary(q).note
    assert isinstance(q.a, fastq.QLinear)
    assert noise_ratio(model(x).detach(), q(x)) > 25


def test_a_graph_that_depends_on_the_size_holds_for_that_size():
    class Scaled(nn.Module):
        """By a number that is computed of both sizes."""

        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 2, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) / (x.shape[2] * x.shape[3])

    model = Scaled().eval()
    q = quantized(model, (torch.randn(4, 3, 8, 8),))
    assert q(torch.randn(1, 3, 8, 8)).shape == (1, 4, 4, 4)
    with pytest.raises(ValueError, match=r"wanted \(any, 3, 8, 8\)"):
        q(torch.randn(1, 3, 9, 9))


def test_channels_may_be_last_between_float_operators_and_programs():
    def floats(self: Call, x: Tensor) -> Tensor:
        y = torch.erfinv(self.a(x).permute(0, 2, 3, 1).clamp(-0.9, 0.9))
        return self.b(y).permute(0, 3, 1, 2)

    model = call(floats, a=conv(3, 4, 3), b=lambda: nn.Linear(4, 2))()
    q = quantized(model, (torch.rand(4, 3, 8, 8),))
    x = torch.rand(2, 3, 11, 9)
    with torch.no_grad():
        assert noise_ratio(model(x), q(x)) > 25


def test_a_float_operator_says_where_a_size_does_not_fit():
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.head = nn.Embedding(9, 4), nn.Linear(4, 2)
            self.register_buffer("positions", torch.randn(16, 4))

        def forward(self, ids: Tensor) -> Tensor:
            x = self.tokens(ids) + self.positions[: ids.shape[1]]
            return self.head(x.cumsum(1) / 8)

    q = quantized(Positions(), (torch.randint(0, 9, (2, 8)),))
    assert q(torch.randint(0, 9, (3, 16))).shape == (3, 16, 2)
    with pytest.raises(RuntimeError) as info:
        q(torch.randint(0, 9, (2, 17)))
    assert "other sizes than the calibration data's" in info.value.__notes__[0]


def test_constants_that_bytes_do_not_hold():
    """Factors of one axis are exact; those of two are bytes, if bytes are near enough to them."""
    x, even = torch.randn(6, 3, 8, 8), torch.rand(5, 8, 8) + 0.5
    spread = even.clone()
    spread[2, 3, 4] = 100
    decay = torch.cat([even[:, :1], even[:, 1:] / 500], 1)
    for factor, floats in (
        (spread, True), (decay, True), (even, False), (spread[2, :, 4:5], False)
    ):  # fmt: skip
        model = between(lambda y, factor=factor: y * factor, 5)()
        q = check(model, x)
        reasons = [stage.why for stage in q.layout.stages if "constant tensor that" in stage.why]
        assert bool(reasons) == floats
        assert noise_ratio(model(x).detach(), q(x)) > 25


FOLLOWING = {
    "sum": (lambda x: x.sum(3, keepdim=True) / 8 + x, "sum"),
    "length": (lambda x: F.normalize(x, dim=2), "linalg_vector_norm"),
    "repeat": (lambda x: x.repeat(1, 1, x.shape[3], 1), "repeat"),
    "repeat none": (lambda x: torch.cat([x.repeat(1, 1, 0, 1), x], 2), "repeat"),
    "rounded quotient": (
        lambda x: torch.div(x, x.norm(dim=1, keepdim=True).clamp(min=1e-9), rounding_mode="trunc"),
        "div",
    ),
    "epsilon": (lambda x: F.normalize(x / 3000, eps=9e-4), "linalg_vector_norm"),
}


@pytest.mark.parametrize("name", FOLLOWING)
def test_what_only_looks_like_an_integer_operation(name: str):
    """Some would have the sizes of the example in them, others are none: they stay torch's."""
    torch.manual_seed(0)
    function, operator = FOLLOWING[name]
    model, x = between(function, 5)(), torch.randn(6, 3, 8, 8)
    q = check(model, x)
    assert any(operator in str(stage.attrs.get("target", "")) for stage in q.layout.stages)
    for given in (x, torch.randn(2, 3, 9, 9)):
        with torch.no_grad():
            assert noise_ratio(model(given), q(given)) > 25


def test_an_embedding_of_times_is_float():
    """On a grid of 256 steps from 0 to 1000 all periods of a sine would be lost; behind a product
    its argument is as good as any other value."""

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 4)
            self.register_buffer("frequencies", torch.logspace(0, -3, 8))

        def forward(self, times: Tensor) -> Tensor:
            angles = times[:, None] * self.frequencies
            return self.last(self.first(torch.cat([angles.sin(), angles.cos()], 1)).sin())

    model, times = Timed().eval(), 1000 * torch.rand(64)
    q = check(model, times)
    assert [step.op for step in q.programs[-1].steps].count("table") == 1
    assert noise_ratio(model(times).detach(), q(times)) > 30


def test_control_flow_on_the_batch_size():
    class Few(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x)[: len(x)].reshape(len(x), -1)

    q = check(Few(), torch.randn(4, 3, 8, 8))
    assert q(torch.randn(1, 3, 8, 8)).shape == (1, 256)


def test_any_parameters_of_the_model_stay_as_they_are():
    model = CASES["dense"].network()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    CASES["dense"].quantized(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(Case(conv(3, 4, 1), images(3)).quantized(), QuantizedModel)
    assert isinstance(Case(lambda: nn.Linear(3, 2), rows(3)).quantized(), QuantizedModel)
    assert isinstance(Apply(F.relu)(torch.ones(1)), Tensor)


def test_attention_leaves_no_layer_float():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(4, 5, 8)
    q = fastq.quantize_model(model, x, strict=True, progress=False)
    rows = {row.name: row.result for row in fastq.summary(q).rows}
    assert rows == dict.fromkeys(("self_attn", "linear1", "linear2"), "int8 static")


def test_calibration_holds_one_batch() -> None:
    seen: list[weakref.ref[Tensor]] = []
    alive = []

    def data() -> Iterator[Tensor]:
        for _ in range(5):
            gc.collect()
            alive.append(sum(batch() is not None for batch in seen))
            batch = torch.rand(2, 3, 8, 8)
            seen.append(weakref.ref(batch))
            yield batch
            del batch

    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    fastq.quantize_model(model, data(), remedies=(), progress=False)
    assert max(alive) == 1, alive


@pytest.mark.parametrize("name", ["pooled", "sorted"])
def test_a_float_operator_that_moves_values_has_a_range_of_its_own(name: str) -> None:
    """Integer ones share their input's; these were once not watched."""

    middle = nn.MaxPool2d(2) if name == "pooled" else Apply(lambda x: x.sort(-1).values)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), middle, nn.Conv2d(6, 4, 3)).eval()
    x = torch.randn(8, 3, 12, 12)
    int8 = fastq.quantize_model(model, x, skip=nn.MaxPool2d if name == "pooled" else ())
    assert len(int8.programs) == 2
    with torch.no_grad():
        error = int8(x) - model(x)
        assert error.square().sum() < 1e-3 * model(x).square().sum()


MAXIMA: dict[str, tuple[int, Callable[[Tensor], Tensor]]] = {
    "amax": (4, lambda x: x.amax((2, 3))),
    "amax, axes kept": (4, lambda x: x.amax((-1, -2), keepdim=True).flatten(1)),
    "max of max": (4, lambda x: x.max(dim=3)[0].max(dim=2).values),
    "max of max, axes kept": (4, lambda x: x.max(2, True)[0].max(3, True)[0].flatten(1)),
    "features last": (4, lambda x: x.permute(0, 2, 3, 1).amax((1, 2))),
    "of a sequence": (3, lambda x: x.max(2)[0]),
    "of a sequence, its axis kept": (3, lambda x: torch.max(x, 2, keepdim=True)[0].view(-1, 16)),
    "of a sequence, features last": (3, lambda x: x.transpose(1, 2).amax(1)),
    "features last, kept": (3, lambda x: x.transpose(1, 2).max(1, keepdim=True)[0].squeeze(1)),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_the_largest_is_a_pooling(name: str) -> None:
    """However it is spelled, it becomes the program of adaptive max pooling."""
    axes, largest = MAXIMA[name]
    pooling = nn.AdaptiveMaxPool1d(1) if axes == 3 else nn.AdaptiveMaxPool2d(1)

    class Net(nn.Module):
        def __init__(self, reduce: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.first = nn.Conv1d(3, 16, 1) if axes == 3 else nn.Conv2d(3, 16, 3)
            self.reduce, self.last = reduce, nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.reduce(self.first(x)))
            return y

    model = Net(largest).eval()
    other = Net(lambda x: pooling(x).flatten(1)).eval()
    other.load_state_dict(model.state_dict())
    x = torch.rand(8, 3, *[12, 10][: axes - 2])
    int8, want = (fastq.quantize_model(m, x, progress=False, strict=True) for m in (model, other))
    assert len(int8.programs) == 1
    assert torch.equal(int8(x[:3]), want(x[:3]))


ORDER = torch.tensor([5, 6, 7, 0, -6])

MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "movedim": lambda x: x.movedim(1, -1),
    "movedim of two": lambda x: x.movedim((1, 3), (-1, -2)),
    "moveaxis": lambda x: torch.moveaxis(x, -1, 1),
    "adjoint": lambda x: x.adjoint(),
    "narrow": lambda x: x.narrow(1, 2, 3),
    "narrow from the end": lambda x: x.narrow(-3, -3, 2),
    "tensor_split": lambda x: x.tensor_split(3, 1)[1],
    "hsplit": lambda x: x.hsplit(2)[1],
    "tile": lambda x: x.tile(1, 3, 1, 1),
    "repeat_interleave": lambda x: x.repeat_interleave(3, 1),
    "repeat_interleave of lines": lambda x: x.repeat_interleave(2, -2),
    "concatenate": lambda x: torch.concatenate([x, x[:, 1:]], 1),
    "index": lambda x: x[:, [5, 1, 2, 3, 0]],
    "index of a buffer": lambda x: x[:, ORDER],
    "index_select": lambda x: x.index_select(1, torch.tensor([3, 1])),
    "flip": lambda x: x.flip(1),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
    "nearest exact": lambda x: F.interpolate(x, scale_factor=(2, 3), mode="nearest-exact"),
    "pooled, places unused": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
}


@pytest.mark.parametrize("name", MOVES)
def test_moves_move_integers(name: str) -> None:
    move, first = MOVES[name], nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.MaxPool2d(1))
    x = torch.randn(4, 3, 6, 8)
    turned = quantized(nn.Sequential(first, Apply(lambda x: x.permute(0, 2, 3, 1))), (x,))
    int8 = quantized(nn.Sequential(first, Apply(move)), (x,), strict=True)
    assert len(int8.programs) == 1 and "0 float operator" in repr(int8)
    for y in (x, torch.randn(2, 3, 6, 8)):
        assert torch.equal(int8(y), move(turned(y).permute(0, 3, 1, 2)))


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places, self.scores = nn.Conv2d(32, 4, 3, padding=1), nn.Conv2d(32, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        places, scores = 100 + 20 * self.places(x), self.scores(x).sigmoid()
        return torch.cat([places, scores], 1).flatten(2).mT


class Scores(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys = nn.Linear(32, 48), nn.Linear(32, 48)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(2).mT
        return self.queries(x) @ self.keys(x[:, ::2]).relu().mT


def around(value: float, outputs: int = 1) -> nn.Module:
    """Outputs that are all near a value."""
    head = nn.Linear(32, outputs)
    nn.init.constant_(head.bias, value)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


# what networks end with, after a convolution
ENDS: dict[str, Callable[[], nn.Module]] = {
    "many classes": lambda: nn.Sequential(around(0.0, 1000), nn.Softmax(1)),
    "two classes": lambda: nn.Sequential(around(0.0, 2), Apply(lambda x: x.softmax(1)[:, 1])),
    "a probability": lambda: nn.Sequential(around(2.0), nn.Sigmoid()),
    "a price": lambda: nn.Sequential(around(20.0), Apply(lambda x: x.squeeze(-1))),
    "many prices": lambda: nn.Sequential(around(20.0, 12), nn.Unflatten(1, (3, 4))),
    "a wide range": lambda: nn.Sequential(around(-3.0, 9), Apply(lambda x: (8 * x).exp())),
    "pixels": lambda: nn.Sequential(nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh()),
    "a mask": lambda: nn.Sequential(nn.Conv2d(32, 1, 1), nn.Upsample(scale_factor=2), nn.Sigmoid()),
    "a shuffle": lambda: nn.Sequential(nn.Conv2d(32, 12, 3), nn.PixelShuffle(2)),
    "a gate": lambda: Apply(lambda x: x[:, :16].tanh() * x[:, 16:].sigmoid()),
    "slopes": lambda: nn.Sequential(nn.Conv2d(32, 6, 1), nn.PReLU(6)),
    "two heads": TwoHeads,
    "products of activations": Scores,
}


@pytest.mark.parametrize("name", ENDS)
def test_what_is_given_out_is_finer_than_255_steps(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 32, 3, 2, 1))
    model = nn.Sequential(first, nn.Hardtanh(-2, 2), ENDS[name]()).eval()
    x = torch.randn(64, 3, 16, 16) * torch.rand(64, 3, 1, 1)
    int8 = quantized(model, (x,), strict=True)  # which takes no offence at a float32 end
    with torch.no_grad():
        wanted, found = model(x), int8(x)
    assert noise_ratio(wanted - wanted.mean(0), found - wanted.mean(0)) > 26
    assert len(int8.programs) == 1
    trained = fastq.convert(fastq.prepare_qat(int8))
    assert torch.equal(trained(x), found)
    fastq.save(int8, tmp_path / "q")
    (alone,) = fastq.load_program(tmp_path / "q")(x.numpy())
    torch.testing.assert_close(torch.from_numpy(np.array(alone)), found, rtol=1e-4, atol=1e-6)


# what torch's operators take, which have no integer form
TAKEN: dict[str, Callable[[Tensor], Tensor]] = {
    "rearranged": lambda x: torch.fft.rfft(x.unflatten(1, (4, 8))).abs(),
    "an activation": lambda x: x.sigmoid().cumsum(-1),
    "halves": lambda x: x[:, :16].cumsum(-1) / (0.1 + (8 * x[:, 16:]).exp()),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_float_operators_take_is_finer_than_255_steps(name: str) -> None:
    torch.manual_seed(0)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 32))
    model = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), head, Apply(TAKEN[name])).eval()
    x = torch.randn(64, 3, 16, 16) * torch.rand(64, 3, 1, 1)
    int8 = quantized(model, (x,))
    with torch.no_grad():
        wanted, found = model(x), int8(x)
    assert noise_ratio(wanted - wanted.mean(0), found - wanted.mean(0)) > 30
    assert len(int8.programs) == 1


# of two products: what a network gives out
OF_TWO: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "their product": lambda x, y: x * y,
    "similarities": lambda x, y: (x * y).sum(-1),
    "rearranged": lambda x, y: (x * y).unflatten(1, (2, 4)).flip(2),
}


@pytest.mark.parametrize("name", OF_TWO)
def test_what_last_products_make_is_finer_than_255_steps(name: str) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU())
            self.one, self.two = nn.Linear(32, 8), nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            return OF_TWO[name](self.one(y), self.two(y))

    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(256, 16)
    int8 = quantized(model, (x,))
    with torch.no_grad():
        wanted, found = model(x), int8(x)
    assert noise_ratio(wanted - wanted.mean(0), found - wanted.mean(0)) > 33
    assert len(int8.programs) == 1


def test_a_layer_whose_result_is_rearranged_is_int8() -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).squeeze(-1)

    int8 = quantized(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), Head(16, 1)), (torch.randn(9, 8),))
    assert {row.result for row in fastq.summary(int8).rows} == {"int8 static"}


JOINED: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, ...]]] = {
    "with much larger values, and returned": lambda y, large: (torch.cat([y, large], 1), y),
    "a part of it, another returned": lambda y, large: (torch.cat([y[:, 2:], large], 1), y[:, :2]),
    "a part of it, another read": lambda y, large: (torch.cat([y[:, 2:], large], 1), y[:, :2] * 2),
    "stacked, and read": lambda y, large: (torch.stack([y[:, :2], large], 1), y.tanh()),
    "twice": lambda y, large: (torch.cat([y, large], 1), torch.cat([large, y], 1), y.tanh()),
    "with a part that grew": lambda y, large: (torch.cat([y[:, :2] * 100, y[:, 2:]], 1),),
    "of a like range": lambda y, large: (torch.cat([y, large.sigmoid()], 1), y.tanh()),
}


@pytest.mark.parametrize("name", JOINED)
def test_what_a_concatenation_takes_keeps_its_steps_for_others(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(8, 4), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            joined = JOINED[name](self.first(x).sigmoid(), self.second(x) * 100)
            values = [value.flatten(1) for value in joined]  # which a product takes in integers
            return tuple(F.linear(value, torch.ones(3, value.shape[1])) for value in values)

    x = torch.randn(256, 8)
    int8 = check(Net(), x, decibels=28)
    apart = [step for step in int8.program.steps if "_in_" in step.name]
    assert len(apart) == {"of a like range": 0}.get(name, 1)
    trained = fastq.convert(fastq.prepare_qat(int8))
    assert all(torch.equal(a, b) for a, b in zip(trained(x), int8(x), strict=True))


class Named(nn.Module):
    """Values that a concatenation takes as a copy: of one whose own steps have names that are made
    of its name, or in two programs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.first = name, nn.Conv2d(3, 8, 3, padding=1)
        self.up, self.large = nn.ConvTranspose2d(8, 8, 2, 2), nn.Conv2d(3, 8, 3, padding=1)
        self.last, self.again = nn.Conv2d(16, 4, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y, large = self.first(x), self.large(x) * 100
        match self.name:
            case "transposed convolution":
                y, large = self.up(y), F.interpolate(large, scale_factor=2.0)
            case "repeated":
                y, large = y.repeat_interleave(2, 2), large.repeat_interleave(2, 2)
        z = self.last(torch.cat([y, large], 1))
        if self.name == "two programs":
            z = self.last(torch.cat([y, z.cumsum(1).repeat(1, 2, 1, 1)], 1))
        return z, self.again(y)


@pytest.mark.parametrize("name", ["transposed convolution", "repeated", "two programs"])
def test_a_copy_for_a_concatenation_has_a_name_of_its_own(name: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 8, 8)
    int8 = check(Named(name), x, decibels=30)
    assert len(int8.programs) == (2 if name == "two programs" else 1)
    steps = [step for program in int8.programs for step in program.steps]
    assert sum("_in_cat" in step.name for step in steps) == len(int8.programs)
    trained = fastq.convert(fastq.prepare_qat(int8))
    assert all(torch.equal(a, b) for a, b in zip(trained(x), int8(x), strict=True))


class NearlyZero(nn.Module):
    """Layers of which the input, or but for the last outputs the filters, are nearly zero: what
    they give is their bias, and little more."""

    def __init__(self, name: str, filters: bool) -> None:
        super().__init__()
        self.name, self.small = name, 1.0 if filters else 1e-8
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
        self.conv, self.up = nn.Conv2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 3, 1, 1)
        self.linear, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 4, 1)
        if filters:
            with torch.no_grad():
                self.conv.weight[:6] *= torch.logspace(-6, -30, 6).reshape(-1, 1, 1, 1)
                self.up.weight[:, :6] *= torch.logspace(-6, -30, 6).reshape(-1, 1, 1)
                self.linear.weight[:6] *= torch.logspace(-6, -30, 6).reshape(-1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...] | Tensor:
        y, z = self.first(x) * self.small, self.second(x)
        match self.name:
            case "convolution":
                return self.last(self.conv(y).relu())
            case "transposed":
                return self.last(self.up(y).relu())
            case "linear":
                return self.last(self.linear(y.movedim(1, -1)).movedim(-1, 1))
            case "int16":
                rows = self.linear(y.movedim(1, -1)) + z.movedim(1, -1)
                return self.last(self.norm(rows).movedim(-1, 1))
            case "several readers":
                return self.last(self.conv(y)), self.last(self.up(y.flip(3))), self.last(y * z)
        return self.last(self.conv(torch.cat([y[:, :4], z[:, 4:]], 1)))  # a range for both


@pytest.mark.parametrize("filters", [False, True])
@pytest.mark.parametrize(
    "name", ["convolution", "transposed", "linear", "int16", "several readers", "concatenation"]
)
def test_next_to_an_input_or_filters_of_nearly_zero_the_bias_stays(
    name: str, filters: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = NearlyZero(name, filters), torch.randn(16, 3, 8, 8)
    for remedies in (), ("batch_norm",), DEFAULT:
        q = quantized(model, (x,), remedies=remedies)
        with torch.no_grad():
            wanted, found = pytree.tree_leaves(model(x)), pytree.tree_leaves(q(x))
        assert all(noise_ratio(a, b) > 32 for a, b in zip(wanted, found, strict=True))
    fastq.save(q, tmp_path / "q.safetensors")
    trained = fastq.prepare_qat(fastq.load(tmp_path / "q.safetensors")).eval()
    for other in trained, fastq.convert(trained):
        leaves = pytree.tree_leaves(q(x)), pytree.tree_leaves(other(x))
        assert all(torch.equal(a, b) for a, b in zip(*leaves, strict=True))


def test_steps_of_weights_are_coarser_where_the_bias_has_no_room() -> None:
    data = np.int8([[127, -3, 1]] * 5)
    scale = np.float32([1, 1, 1, 1e-3, FLT_MIN])
    bias = np.float32([0, MAX_BIAS - 64, -4 * MAX_BIAS, 1.5 * MAX_BIAS, 1e30])
    coarse, scales = with_room(data, scale, bias, 1.0)
    factor = scales.astype(np.float64) / scale
    assert factor[:3].tolist() == [1, 1, 8] and np.array_equal(np.log2(factor) % 1, np.zeros(5))
    assert np.array_equal(coarse[:3], np.int8([[127, -3, 1], [127, -3, 1], [16, 0, 0]]))
    assert not coarse[3:].any() and (np.abs(bias / scales.astype(np.float64)) < MAX_BIAS).all()
    again, same = with_room(coarse, scales, bias, 1.0)  # as a file has it, that is trained on
    assert np.array_equal(again, coarse) and np.array_equal(same, scales)


@pytest.mark.parametrize("factor", [1e-18, 1e-28, 1e-33])
@pytest.mark.parametrize("kind", ["layer_norm", "rms_norm", "group_norm"])
def test_norms_of_values_that_vanish(kind: str, factor: float) -> None:
    def norm(x: Tensor) -> Tensor:  # next to its epsilon a variance is nothing: a constant factor
        x = x * factor
        return F.group_norm(x, 2) if kind == "group_norm" else getattr(F, kind)(x, [8], eps=1e-5)

    torch.manual_seed(0)
    check(nn.Sequential(nn.Linear(8, 8), Apply(norm)), torch.randn(64, 8), decibels=32)


# in which order an input is written, so that who reads it first needs no copy
FIRST_READERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "images": (lambda: nn.Conv2d(3, 4, 3, padding=2, padding_mode="replicate"),
               (8, 3, 9, 7), (0, 2, 3, 1)),
    "channels last": (lambda: nn.Sequential(Apply(lambda x: x.permute(0, 3, 1, 2)),
                                            nn.Conv2d(3, 4, 3)), (8, 9, 7, 3), (0, 1, 2, 3)),
    "features": (lambda: nn.Linear(3, 4), (8, 9, 7, 3), (0, 1, 2, 3)),
    "features, turned": (lambda: nn.Sequential(Apply(lambda x: x.transpose(1, 3)),
                                               nn.Linear(3, 4)), (8, 3, 7, 9), (0, 3, 2, 1)),
    "a function first": (lambda: nn.Sequential(Apply(lambda x: x.permute(0, 2, 3, 1)), nn.GELU(),
                                               nn.Linear(3, 4)), (8, 3, 7, 9), (0, 2, 3, 1)),
    "as lines": (lambda: nn.Sequential(Apply(lambda x: x.permute(0, 2, 3, 1).flatten(1, 2)),
                                       nn.Linear(3, 4)), (8, 3, 7, 9), (0, 2, 3, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", FIRST_READERS)
def test_an_input_is_written_as_its_first_reader_wants_it(name: str) -> None:
    make, shape, axes = FIRST_READERS[name]
    torch.manual_seed(0)
    steps = check(make(), torch.randn(shape)).program.steps
    assert [step.arguments["axes"] for step in steps if step.op == "quantize"] == [axes]
    assert not any(step.op == "permute" for step in steps)


OTHER_MOVES: dict[str, Callable[[Tensor], Tensor]] = {
    "of the batch": lambda x: x[[2, 0, 1]],
    "of a batch, turned": lambda x: x.flip(0),
    "by a mask": lambda x: x[:, torch.arange(8) % 3 > 0],
    "in many runs": lambda x: x[:, torch.arange(40) * 3 % 8],
    "of an axis that varies": lambda x: x.flip(3),
    "of several axes": lambda x: x.flip(1, 2),
    "split in no order": lambda x: torch.cat(x.tensor_split((5, 2), 1), 1),
    "from the end of what varies": lambda x: x[:, :, [-1, 0]],
    "a table": lambda x: x[:, torch.tensor([[0, 1], [2, 3]])].flatten(1, 2),
}


@pytest.mark.parametrize("name", OTHER_MOVES)
@pytest.mark.filterwarnings("ignore:quantize_model.*not one network")  # by a mask
def test_other_moves_are_right(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), Apply(OTHER_MOVES[name]), nn.ReLU())
    int8 = quantized(model, (torch.randn(6, 3, 6, 8),))
    x = torch.randn(4, 3, 6, 9)
    assert noise_ratio(model(x).detach(), int8(x)) > 30


SPELLINGS = [("pow", -1), ("product", -1), ("var", -1), ("pow", -3), ("var", -3)]


@pytest.mark.parametrize("spelling, dim", SPELLINGS)
def test_a_layer_norm_is_one_however_it_is_spelled(spelling: str, dim: int) -> None:
    class Over(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(dim, -1)).movedim(-1, dim)

    def network(norm: nn.Module) -> nn.Module:
        first, last = (nn.Linear, nn.Linear) if dim == -1 else (nn.Conv2d, nn.Conv2d)
        size = () if dim == -1 else (1,)
        return nn.Sequential(first(8, 16, *size), norm, last(16, 4, *size)).eval()

    model = network(SpelledLayerNorm(16, dim, spelling))
    other = network(Over(16, eps=1e-6))
    other.load_state_dict(model.state_dict())
    x = torch.randn(4, 6, 8) if dim == -1 else torch.randn(4, 8, 6, 5)
    int8, want = (quantized(m, (x,), strict=True) for m in (model, other))
    assert len(int8.programs) == 1
    assert torch.equal(int8(x), want(x))


def centered(x: Tensor, dim: int | tuple[int, int] = -1) -> Tensor:
    return x - x.mean(dim, keepdim=True)


def variance(x: Tensor, dim: int | tuple[int, int] = -1) -> Tensor:
    return x.var(dim, keepdim=True, unbiased=False) + 0.1


NO_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "of other values": lambda x: centered(x) * variance(2 * x).rsqrt(),
    "variance of another axis": lambda x: centered(x) / variance(x, 1).sqrt(),
    "mean of another axis": lambda x: centered(x, 1) / variance(x).sqrt(),
    "squares centered elsewhere": lambda x: (
        centered(x) / (centered(x, 1).square().mean(-1, keepdim=True) + 0.1).sqrt()
    ),
    "much added to a deviation": lambda x: centered(x) / (x.std(-1, keepdim=True) + 0.1),
    "without a root": lambda x: centered(x) / variance(x),
    "the inverse root": lambda x: centered(x) / variance(x).rsqrt(),
    "times the root": lambda x: centered(x) * variance(x).sqrt(),
    "of a sum": lambda x: (x + x.mean(-1, keepdim=True)) / variance(x).sqrt(),
    "of the batch": lambda x: centered(x, 0) / variance(x, 0).sqrt(),
    "of two axes": lambda x: centered(x, (1, 2)) / variance(x, (1, 2)).sqrt(),
}


@pytest.mark.parametrize("name", NO_NORMS)
def test_what_is_almost_a_layer_norm_is_none(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 16), Apply(NO_NORMS[name]), nn.Linear(16, 4)).eval()
    x = torch.randn(6, 5, 8)
    int8 = quantized(model, (x,))
    assert "layer_norm" not in str(int8.programs)
    assert noise_ratio(model(x).detach(), int8(x)) > 30


CONSTANTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "factor": lambda x, a, b: x * a,
    "shift": lambda x, a, b: b + x,
    "both": lambda x, a, b: x * a + b,
    "both, the other way": lambda x, a, b: (x + b) * a,
    "permuted": lambda x, a, b: (x.movedim(1, -1) * a.flatten() + b.flatten()).movedim(-1, 1),
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("bias", [False, True])
def test_constants_of_channels_are_the_convolutions_own(name: str, bias: bool) -> None:
    """As a batch norm that is spelled out, with its statistics frozen."""
    a, b = torch.rand(16, 1, 1) + 0.5, torch.randn(16, 1, 1)
    conv = nn.Conv2d(3, 16, 3, bias=bias)
    model = nn.Sequential(conv, Apply(lambda x: CONSTANTS[name](x, a, b)), nn.ReLU()).eval()
    x = torch.randn(4, 3, 8, 8)
    int8 = quantized(model, (x,), strict=True)
    assert not {step.op for step in int8.program.steps} & {"add", "mul", "affine", "constant"}
    assert noise_ratio(model(x).detach(), int8(x)) > 35


def test_the_largest_integer_is_no_value_of_a_program() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(3, 16, 1), nn.Linear(16, 5)

        def forward(self, x: Tensor, counts: Tensor) -> Tensor:
            y = self.first(x).amax(2) * (counts.max(2)[0] + counts.amax(2)).float()
            return self.last(y)  # type: ignore[no-any-return]

    x, counts = torch.rand(8, 3, 10), torch.randint(300, (8, 16, 4))
    model = Net().eval()
    int8 = quantized(model, (x, counts))
    assert noise_ratio(model(x, counts).detach(), int8(x, counts)) > 30


def test_where_the_largest_is_found_stays_float() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv1d(3, 16, 1), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            values, places = self.first(x).max(2)
            return self.last(values), places

    x = torch.rand(8, 3, 10)
    model = Net().eval()
    (y, places), (wanted, _) = fastq.quantize_model(model, x, progress=False)(x), model(x)
    assert places.dtype == torch.int64 and noise_ratio(wanted.detach(), y) > 30


def flat_network() -> tuple[nn.Module, Tensor]:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    return model.eval(), torch.rand(8, 3, 8, 8)


@pytest.mark.parametrize("move", ["share_memory", "pickled for a process"])
def test_memory_that_moves_is_followed(move: str) -> None:
    """What is sent to another process is moved to shared memory, and its old memory given back."""
    model, x = flat_network()
    int8 = quantized(model, (x,))
    want = int8(x)
    old = [tensor.data_ptr() for tensor in int8.buffers()]
    if move == "share_memory":
        int8.share_memory()
    else:
        ForkingPickler.dumps(int8)
    assert all(a != b.data_ptr() for a, b in zip(old, int8.buffers(), strict=True))
    for bound in int8._bound():
        for step in bound.program.steps:
            weight = step.arguments.get("weight")
            if weight is not None:
                assert address_of(weight.data) in {t.data_ptr() for t in int8.buffers()}
    assert torch.equal(int8(x), want)


def test_a_state_that_comes_through_another_module() -> None:
    model, x = flat_network()
    int8 = quantized(model, (x,))
    outer = nn.Sequential(int8)
    before = outer(x)
    state = {name: tensor.clone() for name, tensor in outer.state_dict().items()}
    (bias,) = [name for name in state if name.endswith("linear.bias")]
    state[bias] += 100
    outer.load_state_dict(state)
    assert torch.allclose(outer(x), before + 100)


def test_a_state_of_another_quantization_is_refused() -> None:
    model, x = flat_network()
    int8, other = quantized(model, (x,)), quantized(model, ((x - 0.5) * 6,))
    want = other(x)
    for taker, giver in ((other, int8), (nn.Sequential(other), nn.Sequential(int8))):
        with pytest.raises(RuntimeError, match=r"quantized otherwise.*fastq.save"):
            taker.load_state_dict(giver.state_dict())
        assert torch.equal(other(x), want)
    same = copy.deepcopy(int8)
    same.load_state_dict(int8.state_dict())
    same.load_state_dict(dict(int8.state_dict()))  # without metadata nobody knows
    assert torch.equal(same(x), int8(x))


def test_torch_compile_runs_the_programs_as_they_are() -> None:
    """Alone and in a model: Dynamo takes nothing of a network apart, whatever its batch."""
    _, q, x = small()
    graphs: list[object] = []

    def backend(graph: torch.fx.GraphModule, examples: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    alone = torch.compile(q, backend=backend)
    inside = torch.compile(nn.Sequential(nn.Identity(), q, nn.Softmax(1)), backend=backend)
    for batch in (4, 1, 3, 0, 2):
        assert torch.equal(alone(x[:batch]), q(x[:batch]))
        assert torch.equal(inside(x[:batch]), q(x[:batch]).softmax(1))
    assert len(graphs) <= 3  # softmax, for batches of 4, of 1 and of any
    with pytest.raises(TypeError, match="wanted float32"):
        alone(x.double())
    assert torch.equal(alone(x), q(x))
    torch.compiler.reset()


def test_tracing_and_exporting_are_refused() -> None:
    model, x = flat_network()
    int8 = quantized(model, (x,))
    with (
        pytest.raises(TypeError, match=r"no form in TorchScript, ONNX or torch.export: fastq.save"),
        pytest.warns(DeprecationWarning),
    ):
        torch.jit.trace(int8, x)
    with pytest.raises(
        TypeError, match=r"no form in TorchScript, ONNX or torch.export: fastq.save"
    ):
        torch.export.export(int8, (x,))


def test_calibration_data_with_nothing_in_it() -> None:
    model, x = flat_network()
    for data in (x[:0], [x, x[:0]], [(x[:0], torch.zeros(0))]):
        with pytest.raises(ValueError, match=r"a batch of calibration_data is empty: .0, 3, 8, 8"):
            fastq.quantize_model(model, data, progress=False)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_calibration_data_with_what_is_not_finite(wrong: float) -> None:
    """It is left out; a bias whose correction it would be stays."""
    model, x = flat_network()
    spoiled = x.clone()
    spoiled[0, 0, 0, 0] = wrong
    int8 = fastq.quantize_model(model, spoiled, progress=False)
    assert noise_ratio(model(x).detach(), int8(x)) > 30


def test_a_window_larger_than_the_image() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 4, 4), nn.AvgPool2d(64, ceil_mode=True))
    check(model, torch.rand(4, 3, 32, 32))
    check(
        nn.Sequential(nn.Conv2d(3, 16, 1), nn.MaxPool2d(9, ceil_mode=True)), torch.rand(4, 3, 6, 5)
    )


def test_a_program_takes_values_whose_batch_lies_anywhere() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.first = nn.Embedding(50, 32), nn.Linear(32, 32)
            self.places = nn.Parameter(torch.randn(16, 1, 32))

        def forward(self, tokens: Tensor) -> Tensor:
            y = self.words(tokens.transpose(0, 1).contiguous()) + self.places
            y = torch.erfinv(y.tanh() * 0.5)
            return self.first(y).relu().permute(1, 0, 2)

    tokens = torch.randint(50, (2, 16))
    int8 = check(Net().eval(), tokens)
    assert int8(torch.randint(50, (3, 16))).shape == (3, 16, 32)


def heads(mask: str, need_weights: bool) -> Callable[[Call, Tensor, Tensor], Tensor]:
    """Self-attention of tokens, of which some do not see others, or are seen by none."""

    def forward(net: Call, x: Tensor, padding: Tensor) -> Tensor:
        masks: dict[str, Tensor] = {}
        if mask != "padding":
            hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
            masks["attn_mask"] = hidden if mask == "bool" else hidden.float() * -1e9
        if mask == "padding" or mask == "both":
            masks["key_padding_mask"] = padding.bool()
        if mask == "both":
            masks["attn_mask"] = masks["attn_mask"].bool()
        return net.b(net.a(x, x, x, need_weights=need_weights, **masks)[0])

    return forward


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("mask", ["bool", "float", "padding", "both"])
def test_attention_does_not_see_what_is_masked(mask: str, need_weights: bool) -> None:
    model = call(
        heads(mask, need_weights),
        a=lambda: nn.MultiheadAttention(32, 4, batch_first=True), b=lambda: nn.Linear(32, 8),
    )()  # fmt: skip
    x, padding = torch.randn(8, 12, 32), torch.zeros(8, 12)
    padding[:, 9:] = 1
    int8 = check(model, x, padding, decibels=28)
    other = x.clone()
    other[:, 9:] += torch.randn(8, 3, 32)
    assert torch.equal(int8(x, padding)[:, :9], int8(other, padding)[:, :9])


def test_a_product_added_to_a_mask() -> None:
    def forward(net: Call, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1],) * 2, -torch.inf).triu(1)
        scores = torch.baddbmm(mask, net.a(x), net.b(x).mT, alpha=0.2)
        return scores.softmax(-1) @ x

    linear = {"a": lambda: nn.Linear(32, 32), "b": lambda: nn.Linear(32, 32)}
    check(call(forward, **linear)(), torch.randn(8, 12, 32))


def test_scores_that_became_infinite_in_an_unknown_way() -> None:
    def forward(net: Call, x: Tensor, near: Tensor) -> Tensor:
        scores = (net.a(x) @ net.b(x).mT * 0.2).clone()
        scores[near == 0] = -torch.inf
        return scores.softmax(-1) @ x

    linear = {"a": lambda: nn.Linear(16, 16), "b": lambda: nn.Linear(16, 16)}
    near = (torch.rand(8, 6, 6) > 0.4).float() + torch.eye(6)
    check(call(forward, **linear)(), torch.randn(8, 6, 16), near)


@pytest.mark.parametrize("alpha", [0, 0.0, 1, 2, -1])
def test_what_is_added_has_its_factor(alpha: float) -> None:
    linear = {name: lambda: nn.Linear(8, 8) for name in "abc"}
    for function in (torch.add, torch.sub):
        model = call(
            lambda net, x, function=function: net.c(function(net.a(x), net.b(x), alpha=alpha)),
            **linear,
        )()
        check(model, torch.randn(64, 8))


@pytest.mark.parametrize("scale", [0.0, -0.5, 1.0, None])
def test_attention_has_its_scale(scale: float | None) -> None:
    model = call(
        lambda net, x: F.scaled_dot_product_attention(net.a(x), net.b(x), net.c(x), scale=scale),
        **{name: lambda: nn.Linear(8, 8) for name in "abc"},
    )()
    check(model, torch.randn(16, 6, 8))


PARAMETERS: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[..., Tensor]]] = {
    "mm": ((16, 8), (6, 16), torch.mm),
    "bi,io->bo": ((16, 8), (6, 16), lambda x, w: torch.einsum("bi,io->bo", x, w)),
    "bti,oi->bot": ((8, 16), (6, 5, 16), lambda x, w: torch.einsum("bti,oi->bot", x, w)),
    "nctv,vw->nctw": ((7, 7), (6, 4, 5, 7), lambda x, w: torch.einsum("nctv,vw->nctw", x, w)),
    "bij,ijo->bo": ((4, 5, 8), (6, 4, 5), lambda x, w: torch.einsum("bij,ijo->bo", x, w)),
    "bd,dhe->bhe": ((16, 3, 8), (6, 16), lambda x, w: torch.einsum("bd,dhe->bhe", x, w)),
    "io,bi->bo": ((16, 8), (6, 16), lambda x, w: torch.einsum("io,bi->bo", w, x)),
    "on the left": ((8, 16), (6, 16, 5), lambda x, w: w @ x),
    "turned, on the left": ((16, 8), (6, 16, 1), lambda x, w: torch.matmul(w.t(), x)),
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMETERS)
def test_products_with_a_parameter(name: str) -> None:
    weight, shape, function = PARAMETERS[name]

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(weight) * 0.2)

        def forward(self, x: Tensor) -> Tensor:
            return function(x, self.weight)

    model, x = Net(), torch.randn(shape)
    int8 = check(model, x, decibels=34)
    assert not int8.layout.recipe or len(int8.layout.programs) == 1
    assert torch.equal(int8(torch.cat([x, x]))[:6], int8(x))
    training = fastq.prepare_qat(model, x, progress=False).train()
    training(x).square().sum().backward()
    assert training.weight.grad is not None and bool(training.weight.grad.any())


def test_an_argument_of_complex_numbers(tmp_path) -> None:
    def forward(net: Call, x: Tensor) -> Tensor:
        waves = torch.fft.rfft(net.a(x))
        return torch.fft.irfft(waves + torch.zeros(waves.shape, dtype=torch.cfloat))

    int8 = check(call(forward, a=lambda: nn.Linear(8, 8))(), torch.randn(16, 8))
    fastq.save(int8, tmp_path / "q")
    x = torch.randn(3, 8)
    assert torch.equal(fastq.load(tmp_path / "q")(x), int8(x))


@dataclass
class Unnamed:
    y: Tensor


def test_a_class_without_a_name_in_a_file() -> None:
    torch.export.register_dataclass(Unnamed)
    model = call(lambda net, x: Unnamed(net.a(x)), a=lambda: nn.Linear(8, 8))().eval()
    with pytest.raises(TypeError, match=r"register_dataclass.Kind, serialized_type_name="):
        fastq.quantize_model(model, torch.randn(4, 8), progress=False)


def test_what_is_quantized_already() -> None:
    model, x = flat_network()
    int8 = fastq.quantize_model(model, x, progress=False)
    with pytest.raises(TypeError, match="is quantized already; wanted a float model"):
        fastq.quantize_model(int8, x)
    with pytest.raises(TypeError, match=r"sensitivity: .* is quantized already; wanted a float"):
        fastq.sensitivity(int8, x)
    training = fastq.prepare_qat(model, x, progress=False)
    with pytest.raises(TypeError, match=r"is quantized already; wanted fastq.convert.model"):
        fastq.quantize_model(training, x)
    with pytest.raises(TypeError, match=r"sensitivity: .* already; wanted fastq.convert.model"):
        fastq.sensitivity(training, x)
    with pytest.raises(ValueError, match=r"in training; .* fastq.save.fastq.convert.model"):
        fastq.save(training, "nowhere")
    assert fastq.summary(training).rows == fastq.summary(int8).rows


def test_what_is_no_module() -> None:
    model, x = flat_network()
    for function in (fastq.quantize_model, fastq.quantize_layers, fastq.sensitivity):
        with pytest.raises(TypeError, match=f"{function.__name__}: got int, wanted a torch.nn.Mod"):
            function(5, x)
        with pytest.raises(TypeError, match=r"the one that was exported, or the program's .module"):
            function(torch.export.export(model, (x,)), x)


def test_why_there_is_no_network_is_said() -> None:
    model = call(lambda net, x: x * 2 if x.sum() > 0 else x)()
    with pytest.raises(ValueError, match=r"^quantize_model: no layer of this Call can") as caught:
        fastq.quantize_model(model, torch.randn(4, 8), progress=False)
    assert "there is no integer network: GuardOnDataDependent" in str(caught.value.__notes__)
    branching = call(lambda net, x: net.a(x) if x.sum() else x, a=lambda: nn.Linear(8, 3))()
    with pytest.raises(RuntimeError) as failed:
        fastq.quantize_model(branching, [torch.ones(2, 8), torch.ones(2, 5)], progress=False)
    assert failed.value.__notes__[0].startswith("quantize_model ran the float model, on calibratio")
    layers = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Bilinear(2, 2, 1)})
    with pytest.raises(ValueError, match=r"^quantize_model: strict=True, and layers stay float"):
        fastq.quantize_model(layers, strict=True)
    with pytest.raises(ValueError, match=r"prepare_qat: there is no graph of this Call, .*: Guard"):
        fastq.prepare_qat(model, torch.randn(4, 8), progress=False)


SHARES: dict[str, Callable[[Call, Tensor], Tensor]] = {
    "a sum": lambda net, h: (net.b(h).softmax(1) * h).sum(1),
    "turned": lambda net, h: net.c(h).softmax(1).transpose(1, 2) @ h,
    "turned before": lambda net, h: net.c(h).transpose(1, 2).softmax(-1) @ h,
    "an axis more": lambda net, h: net.b(h).squeeze(2).softmax(1).unsqueeze(1) @ h,
    "and read by others": lambda net, h: (
        (shares := net.c(h).transpose(1, 2).softmax(-1)) @ h + shares.amax(2, keepdim=True)
    ),
}


@pytest.mark.parametrize("name", SHARES)
def test_shares_of_many_values(name: str) -> None:
    """Of 600 values each has a share that is less than a step of 1/255."""
    layers = {"a": (16, 16), "b": (16, 1), "c": (16, 4)}
    model = call(
        lambda net, x: SHARES[name](net, F.relu(net.a(x))),
        **{key: lambda size=size: nn.Linear(*size) for key, size in layers.items()},
    )()
    x = torch.randn(4, 600, 16)
    int8 = check(model, x, decibels=40)
    training = fastq.prepare_qat(model, x, progress=False).eval()
    with torch.no_grad():
        assert torch.equal(training(x), fastq.convert(training)(x))
    assert torch.equal(int8(x)[:1], int8(x[:1]))
    report = fastq.report(model, int8, x, path=None, batch_sizes=(1,), passes=1, progress=False)
    assert "softmax" in str(report)


@pytest.mark.parametrize("low", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
def test_a_maximum_of_what_is_not_marked(low: float) -> None:
    linear = {"a": lambda: nn.Linear(16, 32), "b": lambda: nn.Linear(32, 8)}
    padding = torch.zeros(8, 12, 1)
    padding[:, 9:] = 1
    for function in (
        lambda net, x, pad: net.b(net.a(x).masked_fill(pad > 0, low).amax(1)),
        lambda net, x, pad: net.b(net.a(x).masked_fill(pad > 0, low).max(1)[0]),
        lambda net, x, pad: net.b(torch.where(pad > 0, low, net.a(x)).amax(1)),
    ):
        check(call(function, **linear)(), torch.randn(8, 12, 16), padding)


@pytest.mark.parametrize("low", [-1e5, -1e8, torch.finfo(torch.float32).min])
def test_choices_that_are_not_allowed(low: float) -> None:
    """What is added to them leaves the others what they are, and takes them out of a softmax."""
    model = call(
        lambda net, x, legal: net.b(F.relu(net.a(x))) + (1 - legal) * low,
        a=lambda: nn.Linear(16, 32), b=lambda: nn.Linear(32, 6),
    )()  # fmt: skip
    x, legal = torch.randn(64, 16), (torch.rand(64, 6) > 0.4).float()
    legal[:, 0] = 1
    int8 = quantized(model, (x, legal))
    with torch.no_grad():
        wanted, found = model(x, legal), int8(x, legal)
    taken = legal.bool()
    assert noise_ratio(wanted[taken], found[taken]) > 20
    assert float(found.softmax(1)[~taken].max()) < 1e-5


def test_inputs_are_taken_at_their_word() -> None:
    """Of a feature that is -1e6 where it is missing, the layer makes what the float one makes."""
    x = torch.randn(64, 8)
    x[::4, 3] = -1e6
    assert fastq.quantize_model(nn.Linear(8, 4), x, progress=False, remedies=()).program
    check(nn.Sequential(nn.Linear(8, 4)), x, decibels=30)


class Two(nn.Module):
    """Its inputs have ranges of very different widths."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(8, 32), nn.Linear(8, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.o(F.relu(self.a(x) + 0.01 * self.b(y)))


def test_the_order_of_arguments_in_a_dict() -> None:
    """Of a batch of calibration data, and of a dict that is an argument."""
    model = Two().eval()
    batches = [{"x": torch.randn(64, 8), "y": 100 * torch.randn(64, 8)} for _ in range(2)]
    turned = [batches[0], dict(reversed(batches[1].items()))]
    one, two = (fastq.quantize_model(model, data, progress=False) for data in (batches, turned))
    assert torch.equal(one(**batches[0]), two(**turned[1] | batches[0]))
    for wrong in ({"x": torch.randn(4, 8)}, {**batches[0], "z": torch.randn(4)}):
        with pytest.raises(TypeError, match=r"wanted \(x=, y=\), as in the calibration data"):
            fastq.quantize_model(model, [batches[0], wrong], progress=False)
    within = call(lambda net, d: net.a(d["p"]) - net.a(d["q"]), a=lambda: nn.Linear(8, 8))().eval()
    p, q = torch.randn(2, 4, 8)
    made = quantized(within, ({"p": p, "q": q},))
    assert torch.equal(made({"q": q, "p": p}), made({"p": p, "q": q}))
    with pytest.raises(TypeError, match="expected 2, but got 1"):
        made({"p": p})


def test_returned_sizes_are_kept_in_a_file(tmp_path) -> None:
    model = call(lambda net, x: (net.a(x), x.shape[0]), a=lambda: nn.Linear(8, 8))().eval()
    q = quantized(model, (torch.randn(16, 8),))
    fastq.save(q, tmp_path / "sizes.safetensors")
    for network in (q, fastq.load(tmp_path / "sizes.safetensors"), fastq.prepare_qat(q)):
        assert network(torch.randn(3, 8))[1] == 3


def test_under_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(4, 3, 12, 12)
    wanted = quantized(model, (x,))
    with torch.autocast("cpu"):
        found = quantized(model, (x,))
        assert len(fastq.sensitivity(model, x, progress=False).rows) == 2
    assert torch.equal(wanted(x), found(x))


class Twice(nn.Module):
    """Its layers have two names each."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.all = nn.Sequential(self.body, nn.ReLU(), self.head)

    def forward(self, x: Tensor) -> Tensor:
        return self.all(x)


def masked(net: Call, x: Tensor) -> Tensor:
    """A mask that is made in forward."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
    return x + net.a(x, x, x, attn_mask=mask, need_weights=False)[0]


@pytest.mark.parametrize("name", ["two names", "a mask in forward"])
def test_what_is_int8_is_listed_as_int8(name: str) -> None:
    attention = call(masked, a=lambda: nn.MultiheadAttention(8, 2, batch_first=True))
    model = Twice() if name == "two names" else attention()
    q = quantized(model, (torch.randn(4, 6, 8),), strict=True)
    assert {row.result for row in fastq.summary(q).rows} == {"int8 static"}


ELEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "where": lambda x: torch.where(x > 0, x, 0.2 * x),
    "maximum": lambda x: torch.maximum(x, 0.2 * x),
    "softsign": F.softsign,
    "rrelu": F.rrelu,
    "atan": torch.atan,
    "times a comparison": lambda x: x * (x > 0),
    "two comparisons": lambda x: torch.where((x > -1) & (x < 1), x, x.sign()),
    "minimum with a constant": lambda x: torch.minimum(x, torch.full_like(x, 1.0)),
    "masked_fill": lambda x: x.masked_fill(x < 0, 0.0),
}


@pytest.mark.parametrize("name", ELEMENTS)
def test_a_function_of_one_value_is_a_table(name: str) -> None:
    function = ELEMENTS[name]
    q = check(call(lambda net, x: net.b(function(net.a(x))), a=lambda: nn.Conv2d(3, 8, 3),
                   b=lambda: nn.Conv2d(8, 4, 3))(), torch.randn(4, 3, 12, 12))  # fmt: skip
    assert isinstance(q, QuantizedModel) and q.program.steps


def test_elements_of_two_values_are_no_table() -> None:
    q = check(call(lambda net, x: net.b(torch.maximum(net.a(x), net.c(x))),
                   a=lambda: nn.Conv2d(3, 8, 3), b=lambda: nn.Conv2d(8, 4, 3),
                   c=lambda: nn.Conv2d(3, 8, 3))(), torch.randn(4, 3, 12, 12))  # fmt: skip
    assert isinstance(q, QuantizedModel) and len(q.programs) == 2


def test_a_series_without_its_mean_has_the_range_of_the_difference() -> None:
    """A level that calibration did not see, which the network takes out and puts in again."""
    model = call(
        lambda net, x: net.a((x - (mean := x.mean(1, keepdim=True))).mT).mT + mean,
        a=lambda: nn.Linear(48, 12),
    )().eval()
    q, x = quantized(model, (torch.randn(64, 48, 3),)), torch.randn(64, 48, 3)
    with torch.no_grad():
        level = noise_ratio(model(x), q(x))
        for offset in (3, 30):
            wanted = model(x + offset)
            assert noise_ratio(wanted - offset, q(x + offset) - offset) > level - 1 > 30


def alibi(net: Call, x: Tensor) -> Tensor:
    """Attention whose scores fall with the distance."""
    t = x.shape[1]
    q, k, v = (part.unflatten(2, (4, 8)).transpose(1, 2) for part in net.a(x).chunk(3, -1))
    far = (torch.arange(t)[:, None] - torch.arange(t)).abs()
    slopes = 2.0 ** -torch.arange(1, 5).view(4, 1, 1)
    return net.o(((q @ k.mT / 8**0.5 - slopes * far).softmax(-1) @ v).transpose(1, 2).flatten(2))


def test_scores_far_below_the_largest_take_no_steps() -> None:
    torch.manual_seed(0)
    model = call(alibi, a=lambda: nn.Linear(32, 96), o=lambda: nn.Linear(32, 32))().eval()
    q = quantized(model, (torch.randn(4, 128, 32),))
    (step,) = (step for step in q.program.steps if step.op == "softmax_weights")
    assert 256 * step.arguments["scale"] < 20  # not 64
    with torch.no_grad():
        x = torch.randn(4, 128, 32)
        assert noise_ratio(model(x), q(x)) > 25


@pytest.mark.parametrize("fill", [-30.0, -1e9, -torch.inf])
def test_a_mask_along_any_axis(fill: float) -> None:
    """As of the neighbours in a graph: what is masked takes no more of the range than it needs."""
    torch.manual_seed(0)
    model = call(
        lambda net, x, adj: net.o(torch.einsum("bijh,bjhd->bihd", torch.softmax(
            (net.s(x).unsqueeze(2) + net.t(x).unsqueeze(1)).masked_fill(~adj.unsqueeze(-1), fill), 2
        ), net.v(x).unflatten(2, (4, 8))).flatten(2)),
        s=lambda: nn.Linear(16, 4), t=lambda: nn.Linear(16, 4), v=lambda: nn.Linear(16, 32),
        o=lambda: nn.Linear(32, 3),
    )().eval()  # fmt: skip
    x, adjacent = torch.randn(8, 20, 16), torch.rand(8, 20, 20) > 0.7
    adjacent |= torch.eye(20, dtype=torch.bool)
    q = quantized(model, (x, adjacent))
    with torch.no_grad():
        assert noise_ratio(model(x, adjacent), q(x, adjacent)) > 25


def test_a_function_that_jumps_stays_with_torch() -> None:
    q = check(call(lambda net, x: net.b(torch.where(net.a(x) > 0, 1.0, net.a(x))),
                   a=lambda: nn.Conv2d(3, 8, 3), b=lambda: nn.Conv2d(8, 4, 3))(),
              torch.randn(4, 3, 12, 12), decibels=20)  # fmt: skip
    assert isinstance(q, QuantizedModel) and len(q.programs) == 2


def test_one_place_for_a_batch_or_one_for_each() -> None:
    model = call(
        lambda net, x, y: net.o(F.relu(net.a(x) + net.b(y))), a=lambda: nn.Conv2d(3, 8, 1),
        b=lambda: nn.Conv2d(2, 8, 1), o=lambda: nn.Conv2d(8, 4, 1),
    )().eval()  # fmt: skip
    x = torch.randn(8, 3, 6, 6)
    q = quantized(model, (x, torch.randn(1, 2, 6, 6)))
    assert isinstance(q, QuantizedModel)
    for places in (1, 8):
        y = torch.randn(places, 2, 6, 6)
        with torch.no_grad():
            assert noise_ratio(model(x, y), q(x, y)) > 20


def test_what_is_copied_has_memory_of_its_own() -> None:
    def copied(net: Call, x: Tensor) -> tuple[Tensor, ...]:
        same, part = torch.zeros_like(x), torch.zeros_like(x)
        same.copy_(x)
        part[:] = x[:, :1]
        return net.a(x), same, part

    x = torch.randn(4, 8)
    q, kept = quantized(call(copied, a=lambda: nn.Linear(8, 8))(), (x,)), x.clone()
    for made in q(x)[1:]:
        made.add_(1)
    assert torch.equal(x, kept)


def test_rows_that_are_masked_as_a_whole_are_no_other_network() -> None:
    """Of finite marks, float has the softmax of the scores there; the integers, equal shares."""
    mask = torch.ones(4, 1, 6, 6)
    mask[:, :, :2] = 0
    model = call(
        lambda net, x, mask: attention_of(net, x, attn_mask=(1 - mask) * -1e4),
        a=lambda: nn.Linear(8, 24),
    )()
    assert isinstance(quantized(model, (torch.randn(4, 6, 8), mask)), QuantizedModel)


def test_a_softmax_as_the_second_operand() -> None:
    """As in ConvBERT, whose kernels are shares: they lie on a grid from 0, not around 128."""

    class Kernels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 96), nn.Linear(8, 18)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).view(-1, 16, 6) @ self.b(x).view(-1, 6, 3).softmax(1)

    torch.manual_seed(0)
    model, x = Kernels().eval(), torch.randn(64, 8)
    with torch.no_grad():
        wanted = model(x)
    found = fastq.quantize_model(model, x, progress=False)(x)
    assert (wanted - found).norm() < 0.05 * wanted.norm()


def test_what_a_layer_of_parameters_alone_becomes():
    """A constant; and a norm that follows two layers is in both."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.randn(1, 4))
            self.embed, self.norm = nn.Linear(4, 8), nn.BatchNorm1d(8)
            self.one, self.two, self.unread = (nn.Linear(8, 8) for _ in range(3))
            self.shared, self.never = nn.BatchNorm1d(8), nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            self.unread(x)
            x = x + self.norm(self.embed(self.places))
            return self.shared(self.two(self.shared(self.one(x)).relu()))

    q = fastq.quantize_model(Net().eval(), torch.randn(16, 8), progress=False)
    rows = {row.name: (row.result, row.reason) for row in fastq.summary(q).rows}
    constant = "folded", "into a constant: it is computed of parameters alone"
    assert rows["embed"] == rows["norm"] == constant
    assert rows["shared"] == ("folded", "into 'one', 'two'")
    assert rows["unread"] == ("float", "nothing that the network returns depends on it")
    assert rows["never"] == ("float", "the network does not call it")
