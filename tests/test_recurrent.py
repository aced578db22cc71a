"""Recurrent layers: the kernels give the definition's bits, the definition is close to torch's, and
networks with them are one program, in training too."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import Call, by_reference, noise_ratio, quantized_case
from numpy.testing import assert_array_equal
from rows import guarded
from torch import Tensor, nn

import fastq
from fastq import ops, reference
from fastq.arguments import check_arguments
from fastq.kernels.recurrent import BLOCK
from fastq.program import Program
from fastq.qparams import GATES, Dequant, QParams
from fastq.remedies import REMEDIES
from fastq.steps import Step
from fastq.weights import LinearWeight

# rows, steps, features
SIZES = [(1, 1, 1), (1, 5, 16), (3, 4, 33), (2, 3, 100), (17, 2, 64), (0, 3, 4), (2, 0, 4),
         (300, 3, 40), (3, 2, BLOCK + 6)]  # fmt: skip
X = np.zeros((2, 3, 8), np.int16)
ONE = Dequant(np.float32(1))
WEIGHT, GRU_WEIGHT, PROJECTION, WIDE_WEIGHT, NO_WEIGHT = (
    LinearWeight(np.ones(shape, np.int8)) for shape in ((8, 2), (6, 2), (2, 2), (8, 5), (0, 0))
)
REST = {"x_scale": 2e-4, "multiplier": 127.0, "zero_point": 131, "qmin": 3, "qmax": 250}


def layer(
    rng: Any, cell: str, features: int, bias: bool = True
) -> tuple[LinearWeight, Dequant]:  # fmt: skip
    n = GATES[cell] * features
    weight = rng.choice(np.r_[-127, 127, np.arange(-127, 128)].astype(np.int8), (n, features))
    scale = (rng.uniform(1e-3, 2e-2, n) / features**0.5).astype(np.float32)
    added = rng.normal(size=n).astype(np.float32) if bias else None
    return LinearWeight(weight), Dequant(scale, np.float32(1 / 127), added)


def steps_of(rng: Any, *shape: int) -> np.ndarray:
    return rng.choice(np.r_[-(2**15), 0, 2**15 - 1, np.arange(-(2**15), 2**15)], shape).astype(
        np.int16
    )


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_parity(isa: str, threads: int, rng: Any, cell: str, size: tuple[int, int, int]) -> None:
    rows, steps, features = size
    weight, epilogue = layer(rng, cell, features, bias=bool(steps % 2))
    for axis, reverse in ((0, True), (1, False)):
        lines = (rows, steps) if axis else (steps, rows)
        x = steps_of(rng, *lines, weight.n)
        rest = {**REST, "cell": cell, "axis": axis, "reverse": reverse}
        want = reference.recurrent(x, weight, epilogue, **rest)
        out = guarded(np.zeros_like(want))
        assert ops.recurrent(guarded(x), weight, epilogue, **rest, out=out) is out
        assert_array_equal(out, want)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("cell", GATES)
def test_float_parity(
    isa: str, threads: int, rng: Any, cell: str, size: tuple[int, int, int]
) -> None:
    """Between float layers, with and without first states, ranges of each row or given ones."""
    rows, steps, features = size
    for axis, reverse, projected in ((0, True, 0), (1, False, 0), (1, True, 5)):
        if projected and cell != "lstm":
            continue
        width = projected or features
        weight, epilogue = float_layer(rng, GATES[cell] * features, width, bias=bool(steps % 2))
        rest: dict[str, Any] = {"cell": cell, "axis": axis, "reverse": reverse}
        if reverse:
            rest["hidden"] = guarded(rng.normal(size=(rows, width)).astype(np.float32))
            if cell == "lstm":
                rest["state"] = guarded(rng.normal(size=(rows, features)).astype(np.float32))
        if axis:
            rest["x_qparams"] = QParams(np.float32(1 / 100), np.int32(120))
        if projected:
            of_rows = rest["x_qparams"] if steps % 2 else None
            rest["projection"] = *float_layer(rng, projected, features), of_rows
        x = rng.normal(0, 3, (rows, steps, weight.n)).astype(np.float32)
        x = guarded(x if axis else np.ascontiguousarray(x.swapaxes(0, 1)))
        wanted = reference.recurrent_float(x, weight, epilogue, **rest)
        out = guarded(np.zeros_like(wanted[0]))
        given = {name: np.copy(rest[name]) for name in ("hidden", "state") if name in rest}
        found = ops.recurrent_float(x, weight, epilogue, **rest, out=out)
        assert found[0] is out
        assert_array_equal(out, wanted[0])
        assert_array_equal(found[1], wanted[1])
        for name, before in given.items():
            assert_array_equal(rest[name], before)


def float_layer(rng: Any, n: int, k: int, bias: bool = True) -> tuple[LinearWeight, Dequant]:
    weight = rng.choice(np.r_[-127, 127, np.arange(-127, 128)].astype(np.int8), (n, k))
    scale = (rng.uniform(1e-3, 2e-2, n) / max(k, 1) ** 0.5).astype(np.float32)
    added = rng.normal(size=n).astype(np.float32) if bias else None
    return LinearWeight(weight), Dequant(scale, bias=added)


@pytest.mark.parametrize("cell", GATES)
def test_float_extremes(rng: Any, cell: str) -> None:
    """NaN, infinities and what overflows, in gates, states and products."""
    weight, small = float_layer(rng, GATES[cell] * 24, 24)
    huge = Dequant(small.scale * np.float32(1e38), bias=small.bias)
    strange = np.array([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-40, 0.0, -0.0], np.float32)
    x = rng.normal(size=(4, 6, weight.n)).astype(np.float32)
    x.reshape(-1)[::3] = rng.choice(strange, x.size // 3)
    hidden, state = (rng.choice(strange, (4, 24)) for _ in range(2))
    for epilogue in (small, huge):
        rest = {"cell": cell, "hidden": hidden, "state": state if cell == "lstm" else None}
        with np.errstate(all="ignore"):
            wanted = reference.recurrent_float(x, weight, epilogue, **rest)
        found = ops.recurrent_float(x, weight, epilogue, **rest)
        assert_array_equal(found[0], wanted[0])
        assert_array_equal(found[1], wanted[1])
        assert not np.isnan(found[0]).any()


@pytest.mark.parametrize("cell", GATES)
def test_float_strides_and_parts(rng: Any, cell: str) -> None:
    """Lines that are apart, and a sequence in two calls."""
    weight, epilogue = float_layer(rng, GATES[cell] * 20, 20)
    x = rng.normal(size=(6, 9, 2 * weight.n)).astype(np.float32)[::2, :, : weight.n]
    whole = ops.recurrent_float(x, weight, epilogue, cell=cell)
    contiguous = ops.recurrent_float(np.ascontiguousarray(x), weight, epilogue, cell=cell)
    assert_array_equal(whole[0], contiguous[0])
    every_second = x[:, :, ::-1][:, :, ::-1]
    assert_array_equal(ops.recurrent_float(every_second, weight, epilogue, cell=cell)[0], whole[0])
    begun, kept = ops.recurrent_float(x[:, :4], weight, epilogue, cell=cell)
    states = {"hidden": begun[:, -1], "state": kept if cell == "lstm" else None}
    rest = ops.recurrent_float(x[:, 4:], weight, epilogue, cell=cell, **states)
    assert_array_equal(np.concatenate([begun, rest[0]], 1), whole[0])
    assert_array_equal(rest[1], whole[1])


FLOAT_X = np.zeros((2, 3, 8), np.float32)
BAD_FLOAT_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "mask": ({"x": np.ma.masked_array(FLOAT_X)}, TypeError, "x is a MaskedArray"),
    "dtype": ({"x": X}, TypeError, r"wanted \(.., .., N\) float32"),
    "gates": ({"x": FLOAT_X[..., :6]}, ValueError, r"wanted \(.., .., 8\)"),
    "cell": ({"cell": ["lstm"]}, ValueError, "wanted one of lstm, gru"),
    "weight": ({"cell": "tanh"}, ValueError, r"wanted \(1 \* H, H\)"),
    "no features": ({"weight": NO_WEIGHT}, ValueError, "H > 0"),
    "kind": ({"weight": FLOAT_X}, TypeError, "LinearWeight"),
    "epilogue": ({"epilogue": None}, TypeError, "wanted a Dequant"),
    "qparams": ({"x_qparams": 3}, TypeError, "wanted a QParams"),
    "axis": ({"axis": 2}, ValueError, "wanted 0 or 1"),
    "hidden": ({"hidden": FLOAT_X[0]}, ValueError, r"hidden .*wanted None or float32 \(2, 2\)"),
    "hidden's dtype": ({"hidden": np.zeros((2, 2))}, ValueError, "wanted None or float32"),
    "hidden's kind": ({"hidden": [[0.0]]}, ValueError, "wanted None or float32"),
    "state": ({"state": FLOAT_X}, ValueError, "state .*wanted None or float32"),
    "state of a gru": (
        {"cell": "gru", "weight": GRU_WEIGHT, "x": FLOAT_X[..., :6], "state": FLOAT_X[0, :2, :2]},
        ValueError, "its first hidden state alone",
    ),
    "projection of a gru": (
        {"cell": "gru", "weight": GRU_WEIGHT, "x": FLOAT_X[..., :6],
         "projection": (PROJECTION, ONE, None)}, ValueError, "wanted an lstm's",
    ),
    "projection": ({"projection": (WEIGHT, ONE, None), "weight": WIDE_WEIGHT}, ValueError,
                   r"wanted \(4 \* H, 8\)"),
    "projection's features": ({"projection": (WIDE_WEIGHT, ONE, None)}, ValueError, "wanted 2"),
    "out": ({"out": np.zeros((2, 3, 8), np.float32)}, ValueError, "out is"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_FLOAT_CALLS)
def test_bad_float_calls_say_what_is_wanted(case: str) -> None:
    changed, error, message = BAD_FLOAT_CALLS[case]
    given = {"x": FLOAT_X, "weight": WEIGHT, "epilogue": ONE, "cell": "lstm", **changed}
    positional = [given.pop(name) for name in ("x", "weight", "epilogue")]
    with pytest.raises(error, match=message):
        ops.recurrent_float(*positional, **given)


@pytest.mark.parametrize("cell", GATES)
def test_extremes(rng: Any, cell: str) -> None:
    """Gates far beyond where a cell is flat, and outputs beyond int32 before the clamp."""
    weight, small = layer(rng, cell, 24)
    huge = Dequant(small.scale * np.float32(2.0**90), small.x_scale, small.bias)
    x = steps_of(rng, 2, 6, weight.n)
    for epilogue in (small, huge):
        for x_scale in (1e-30, 1.0, 2.0**96):
            for multiplier in (1e-3, 2.0**96):
                rest = {**REST, "cell": cell, "x_scale": x_scale, "multiplier": multiplier}
                want = reference.recurrent(x, weight, epilogue, **rest)
                assert_array_equal(ops.recurrent(x, weight, epilogue, **rest), want)


def test_the_cells_functions() -> None:
    x = np.r_[np.linspace(-12, 12, 100_001), 0.0, -0.0, 1e-30, 3e38, -3e38].astype(np.float32)
    real = x.astype(np.float64)
    assert np.abs(reference._tanh(x) - np.tanh(real)).max() < 8e-6
    assert np.abs(reference._tanh(x)).max() == 1
    with np.errstate(over="ignore"):
        assert np.abs(reference._sigmoid(x) - 1 / (1 + np.exp(-real))).max() < 4e-6


TORCHS = {"lstm": nn.LSTM, "gru": nn.GRU, "tanh": nn.RNN,
          "relu": lambda *args, **kwargs: nn.RNN(*args, nonlinearity="relu", **kwargs)}  # fmt: skip


@pytest.mark.parametrize("cell", GATES)
def test_it_is_torchs(rng: Any, cell: str) -> None:
    module = TORCHS[cell](10, 24, batch_first=True)
    x = torch.randn(3, 9, 10)
    wanted = module(x)[0].detach()
    given = (x @ module.weight_ih_l0.T + module.bias_ih_l0).detach().numpy()
    x_scale = np.abs(given).max() / (2**15 - 1)
    scale = np.float32(wanted.abs().max() / 127)
    real = module.weight_hh_l0.detach().numpy()
    of = (np.abs(real).max(1) / 127).astype(np.float32)
    weight = LinearWeight(np.rint(real / of[:, None]).astype(np.int8))
    got = reference.recurrent(
        np.rint(given / x_scale).astype(np.int16), weight,
        Dequant(of, scale, module.bias_hh_l0.detach().numpy()), cell=cell, x_scale=x_scale,
        multiplier=1 / scale, zero_point=128,
    )  # fmt: skip
    found = torch.from_numpy((got.astype(np.float32) - 128) * scale)
    assert noise_ratio(wanted, found) > 35


BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "dtype": ({"x": X.astype(np.uint8)}, TypeError, r"wanted \(.., .., N\) int16"),
    "axes": ({"x": X[0]}, ValueError, r"wanted \(.., .., N\) int16"),
    "gates": ({"x": X[..., :6]}, ValueError, r"wanted \(.., .., 8\)"),
    "cell": ({"cell": "lstn"}, ValueError, "wanted one of lstm, gru"),
    "weight": ({"cell": "gru"}, ValueError, r"wanted \(3 \* H, H\)"),
    "no features": ({"weight": LinearWeight(np.ones((0, 0), np.int8))}, ValueError, "H > 0"),
    "kind": ({"weight": WEIGHT.data}, TypeError, "wanted LinearWeight, Dequant"),
    "epilogue": ({"epilogue": None}, TypeError, "wanted LinearWeight, Dequant"),
    "x_scale of rows": ({"epilogue": Dequant(np.float32(1), np.ones(2))}, ValueError, "a scalar"),
    "scales": ({"epilogue": Dequant(np.ones(3))}, ValueError, r"wanted \(8,\)"),
    "bias": ({"epilogue": Dequant(np.float32(1), bias=np.full(8, 3e38))}, ValueError, "bias"),
    "a clamp": ({"epilogue": Dequant(np.float32(1), fmin=0.0)}, ValueError, "no clamp"),
    "factor": ({"epilogue": Dequant(np.float32(1e30))}, ValueError, "a factor of 1e\\+30"),
    "axis": ({"axis": 2}, ValueError, "wanted 0 or 1"),
    "negative": ({"multiplier": -1.0}, ValueError, "greater than 0"),
    "of rows": ({"multiplier": [1.0, 2.0]}, ValueError, "wanted numbers"),
    "large": ({"x_scale": 1e30}, ValueError, "up to 2\\*\\*96"),
    "clamp": ({"qmin": 9, "qmax": 8}, ValueError, "qmin"),
    "out": ({"out": np.zeros((2, 3, 8), np.uint8)}, ValueError, "out is"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    changed, error, message = BAD_CALLS[case]
    given = {"x": X, "weight": WEIGHT, "epilogue": ONE, "cell": "lstm", "x_scale": 1e-3,
             "multiplier": 127.0, **changed}  # fmt: skip
    positional = [given.pop(name) for name in ("x", "weight", "epilogue")]
    with pytest.raises(error, match=message):
        ops.recurrent(*positional, **given)


def test_a_program_checks_them() -> None:
    arguments = {"cell": "lstm", "weight": WEIGHT, "epilogue": ONE, "x_scale": 1e-3, "axis": 1,
                 "multiplier": 127.0, "reverse": False, "zero_point": 0, "qmin": 0,
                 "qmax": 255}  # fmt: skip
    check_arguments(Step("recurrent", "h", ("x",), arguments))
    for name, wrong in (("cell", "gru"), ("cell", 3), ("axis", 2), ("x_scale", 0.0),
                        ("epilogue", Dequant(np.ones(3)))):  # fmt: skip
        with pytest.raises(ValueError, match="wanted"):
            check_arguments(Step("recurrent", "h", ("x",), {**arguments, name: wrong}))
    narrow = {"scale": 1.0, "zero_point": 0, "axes": (0, 1, 2), "dtype": "uint8"}
    steps = Step("quantize", "q", ("x",), narrow), Step("recurrent", "h", ("q",), arguments)
    with pytest.raises(ValueError, match="h takes q, which is uint8; wanted a int16"):
        Program(("x",), steps, (), ((None, None, 8),))


@pytest.mark.parametrize("name", ["lstm", "gru, last states", "rnn"])
def test_other_lengths_than_the_example(isa: str, name: str) -> None:
    int8 = quantized_case(name)
    for batch, length in ((1, 2), (3, 40)):
        x = torch.randn(batch, 6, length + 2) if name == "lstm" else torch.randn(batch, length, 6)
        got, want = int8(x), by_reference(int8)(x)
        for one, other in zip(*(y if isinstance(y, tuple) else (y,) for y in (got, want)),
                              strict=True):  # fmt: skip
            assert torch.equal(one, other)


def network(function: Any, rnn: nn.Module) -> nn.Module:
    return Call(function, first=nn.Linear(6, 10), rnn=rnn, head=nn.Linear(12, 4)).eval()


def all_states(net: Any, x: Tensor, *state: Tensor) -> Tensor:
    return net.head(net.rnn(net.first(x), *state)[0])


def of_packed(net: Any, x: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(net.first(x), torch.tensor([7] * 8), True)
    return net.head(nn.utils.rnn.pad_packed_sequence(net.rnn(packed)[0], True)[0])


class Learned(nn.GRU):
    """Its first state is a parameter, which begins at zero."""

    def __init__(self) -> None:
        super().__init__(10, 12, batch_first=True)
        self.state = nn.Parameter(torch.zeros(1, 1, 12))

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, self.state.expand(1, x.shape[0], 12).contiguous())


def beyond(rnn: nn.Module) -> nn.Module:
    with torch.no_grad():
        next(p for name, p in rnn.named_parameters() if name.startswith("bias_hh"))[3] = 1e30
    return rnn


ALONE: dict[str, tuple[Any, Any, str]] = {
    "cell": (lambda net, x: net.head(net.rnn(net.first(x))[1][1][0]),
             lambda: nn.LSTM(10, 12, batch_first=True), "its cell is asked for"),
    "state": (lambda net, x: all_states(net, x, x[None, :, 0, :1].expand(1, -1, 12).contiguous()),
              lambda: nn.GRU(10, 12, batch_first=True), "it is given its first state"),
    "parameter": (all_states, Learned, "it is given its first state"),
    "projection": (all_states, lambda: nn.LSTM(10, 24, batch_first=True, proj_size=12),
                   "it has a projection"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("name", ALONE)
def test_what_no_program_has_is_a_layer_of_its_own(name: str) -> None:
    function, build, why = ALONE[name]
    model, x = network(function, build()), torch.randn(8, 7, 6)
    int8 = fastq.quantize_model(model, x, strict=True, progress=False)
    (row,) = (row for row in fastq.summary(int8).rows if row.name == "rnn")
    assert row.result == "int8 dynamic" and why in row.reason
    assert f"an int8 layer of its own: {row.reason}" in repr(int8)
    assert "1 int8 layer(s) of their own" in repr(int8)
    assert noise_ratio(model(x).detach(), int8(x)) > 25


FLOATS: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "as asked": (all_states, lambda: nn.GRU(10, 12, batch_first=True), {"skip": "rnn"}, "as asked"),
    "large": (all_states, lambda: beyond(nn.GRU(10, 12, batch_first=True)), {}, "beyond 2"),
}


@pytest.mark.parametrize("name", FLOATS)
def test_what_stays_float_says_why(name: str) -> None:
    function, build, given, why = FLOATS[name]
    model, x = network(function, build()), torch.randn(8, 7, 6)
    int8 = fastq.quantize_model(model, x, progress=False, **given)
    assert isinstance(int8, fastq.QuantizedModel)
    (row,) = (row for row in fastq.summary(int8).rows if row.name == "rnn")
    assert row.result == "float" and why in row.reason
    assert noise_ratio(model(x).detach(), int8(x)) > 25


@pytest.mark.filterwarnings("ignore:quantize_model.*not one network")
def test_packed_sequences_are_for_layers() -> None:
    model, x = network(of_packed, nn.LSTM(10, 12, batch_first=True)), torch.randn(8, 7, 6)
    int8 = fastq.quantize_model(model, x, progress=False)
    assert [row.result for row in fastq.summary(int8).rows].count("int8 dynamic") == 1
    assert noise_ratio(model(x).detach(), int8(x)) > 25


@pytest.mark.parametrize(
    "zeros",
    [
        lambda x: torch.zeros(1, x.shape[0], 12),
        lambda x: x.new_zeros(1, x.shape[0], 12),
        lambda x: torch.zeros(x.shape[0], 12).unsqueeze(0),
        lambda x: torch.full((1, x.shape[0], 12), 0.0),
        lambda x: torch.zeros_like(x[None, :, 0, :1]).expand(1, x.shape[0], 12),
    ],
    ids=["zeros", "new_zeros", "unsqueeze", "full", "zeros_like"],
)
def test_a_first_state_of_zeros_is_none(zeros: Any) -> None:
    model = network(
        lambda net, x: net.head(net.rnn(net.first(x), zeros(x))[0]),
        nn.GRU(10, 12, batch_first=True),
    )
    int8 = fastq.quantize_model(model, torch.randn(8, 7, 6), progress=False, strict=True)
    assert [step.op for step in int8.program.steps].count("recurrent") == 1


def test_a_sequence_without_a_batch() -> None:
    for rnn in (nn.LSTM(10, 12), nn.GRU(10, 12)):
        model, x = network(all_states, rnn), torch.randn(9, 6)
        int8 = fastq.quantize_model(
            model, [(x,)], forward=lambda m, given: m(*given), progress=False, strict=True
        )
        assert noise_ratio(model(x).detach(), int8(x)) > 25


def test_layers_of_other_ranges_do_not_share_them() -> None:
    """Of all last states one is wanted: it has the grid of its own layer."""
    for last in (lambda y, h: h[-1], lambda y, h: list(h)[-1], lambda y, h: h[2:][0]):
        rnn = nn.RNN(10, 12, 3, batch_first=True, nonlinearity="relu")
        with torch.no_grad():
            rnn.weight_ih_l0 *= 8
            for name, p in rnn.named_parameters():
                if name in ("weight_ih_l2", "bias_ih_l2", "bias_hh_l2"):
                    p *= 0.02
        model = network(lambda net, x, last=last: last(*net.rnn(net.first(x))), rnn)
        x = torch.randn(64, 7, 6)
        int8 = fastq.quantize_model(model, x, progress=False)
        assert noise_ratio(model(x).detach(), int8(x)) > 28


def test_tiny_states() -> None:
    for rnn in (nn.GRU(10, 12, batch_first=True), nn.LSTM(10, 12, batch_first=True)):
        with torch.no_grad():
            for p in rnn.parameters():
                p *= 1e-33
        model, x = network(all_states, rnn), torch.randn(8, 7, 6)
        int8 = fastq.quantize_model(model, x, progress=False)
        assert_array_equal(int8(x).numpy(), by_reference(int8)(x).numpy())


def test_a_sequence_of_no_steps_is_refused() -> None:
    int8 = quantized_case("rnn")
    with pytest.raises(ValueError, match="wanted a sequence of one step or more"):
        int8(torch.zeros(3, 0, 6))


def test_columns_of_an_image_are_a_sequence() -> None:
    """Any width goes through, of one height."""

    def read(net: Any, x: Tensor) -> Tensor:
        y = torch.relu(net.conv(x)).permute(0, 3, 1, 2).flatten(2)
        return net.head(net.rnn(y)[0])

    model = Call(read, conv=nn.Conv2d(3, 4, 3, padding=1, stride=2), head=nn.Linear(24, 5),
                 rnn=nn.LSTM(4 * 8, 12, bidirectional=True, batch_first=True)).eval()  # fmt: skip
    int8 = fastq.quantize_model(model, torch.randn(8, 3, 16, 40), progress=False)
    for width in (40, 23, 64):
        x = torch.randn(2, 3, 16, width)
        assert int8(x).shape == model(x).shape and noise_ratio(model(x).detach(), int8(x)) > 25
    with pytest.raises(ValueError, match=r"wanted \(any, 3, 16, any\)"):
        int8(torch.randn(2, 3, 18, 40))


def test_trained_as_it_runs(tmp_path: Any) -> None:
    """All parameters learn, and the integer network has the trained one's very outputs."""
    model = network(
        lambda net, x: net.head(net.rnn(net.first(x))[1][-1]), nn.GRU(10, 12, 2, batch_first=True)
    )
    x, classes = torch.randn(64, 7, 6), torch.randint(4, (64,))
    start = fastq.quantize_model(model, x, progress=False)
    fastq.save(start, tmp_path / "start.safetensors")
    trained = fastq.prepare_qat(fastq.load(tmp_path / "start.safetensors"))
    assert torch.equal(trained(x).detach(), start(x))
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = nn.functional.cross_entropy(trained(x), classes)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in trained.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    trained.eval()
    assert torch.equal(fastq.convert(trained)(x), trained(x).detach())


def test_remedies_leave_the_recurrence() -> None:
    """Every remedy works on the products alone."""
    model = network(lambda net, x: net.head(net.rnn(net.first(x))[0]),
                    nn.LSTM(10, 12, batch_first=True))  # fmt: skip
    x = torch.randn(16, 7, 6)
    for remedy in REMEDIES:
        int8 = fastq.quantize_model(model, x, remedies=remedy, progress=False)
        assert noise_ratio(model(x).detach(), int8(x)) > 25, remedy
    table = fastq.sensitivity(model, x, progress=False)
    assert [row.name for row in table.rows] == ["first", "rnn", "rnn", "head"]


def test_it_is_profiled_and_reported(tmp_path: Any) -> None:
    model = network(lambda net, x: net.head(net.rnn(net.first(x))[0]),
                    nn.LSTM(10, 12, batch_first=True))  # fmt: skip
    x = torch.randn(3, 7, 6)
    int8 = fastq.quantize_model(model, x, progress=False)
    (step,) = (step for step in fastq.profile(int8, x).steps if step.op == "recurrent")
    assert step.macs == 3 * 7 * 48 * 12 and len(step.kernels) == 2 * 7 - 1
    assert "7 x cell lstm" in str(fastq.profile(int8, x))
    page = tmp_path / "report.html"
    fastq.report(model, int8, x, path=page)
    assert "rnn" in page.read_text()
