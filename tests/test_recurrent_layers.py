"""QLSTM, QGRU, QRNN and their cells: torch's arguments and results, the bits of the definition, and
their place in models that are quantized as layers or as one network."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import noise_ratio
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence

import fastq
from fastq import QGRU, QLSTM, QRNN, QGRUCell, QLSTMCell, QRNNCell, choose_qparams, reference
from fastq.graph import check_target
from fastq.nn.layer import STATE
from fastq.nn.recurrent import RECURRENT_KINDS

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections")

K, H = 10, 20
LAYERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm": (QLSTM, {}),
    "lstm, two layers": (QLSTM, {"num_layers": 2, "batch_first": True}),
    "lstm, both ways": (QLSTM, {"num_layers": 2, "bidirectional": True, "bias": False}),
    "projection": (QLSTM, {"proj_size": 7, "num_layers": 2, "bidirectional": True}),
    "gru": (QGRU, {"batch_first": True}),
    "gru, both ways": (QGRU, {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "rnn": (QRNN, {}),
    "relu": (QRNN, {"nonlinearity": "relu", "num_layers": 2, "bidirectional": True}),
}
CELLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "lstm cell": (QLSTMCell, {}),
    "gru cell": (QGRUCell, {"bias": False}),
    "rnn cell": (QRNNCell, {}),
    "relu cell": (QRNNCell, {"nonlinearity": "relu"}),
}


def pair(name: str) -> tuple[Any, Any]:
    """A float module and its int8 one."""
    kind, given = {**LAYERS, **CELLS}[name]
    torch.manual_seed(0)
    module = kind.FLOAT(K, H, **given).eval()
    return module, kind.from_float(module)


def states(layer: Any, *lead: int) -> Any:
    """First states with these sizes before the features."""
    if isinstance(layer, RECURRENT_KINDS[:3]):
        lead = (layer.num_layers * (1 + layer.bidirectional), *lead)
    h = torch.randn(*lead, layer.proj_size or H) / 2
    return (h, torch.randn(*lead, H)) if layer.cell == "lstm" else h


def flat(result: Any) -> list[Tensor]:
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, Tensor) else [x for part in result for x in flat(part)]


def equal(one: Any, two: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(flat(one), flat(two), strict=True))


def inputs(layer: Any) -> list[tuple[Any, Any]]:
    """Batches, one sequence, packed sequences; with and without states."""
    if isinstance(layer, RECURRENT_KINDS[3:]):
        return [
            (torch.randn(3, K), states(layer, 3)), (torch.randn(3, K), None),
            (torch.randn(K), states(layer)), (torch.randn(0, K), None),
        ]  # fmt: skip
    x = torch.randn(3, 5, K) if layer.batch_first else torch.randn(5, 3, K)
    shuffled = pack_sequence([torch.randn(n, K) for n in (3, 5, 1, 5)], enforce_sorted=False)
    ordered = pack_sequence([torch.randn(n, K) for n in (5, 4, 4, 1)])
    return [
        (x, None), (x, states(layer, 3)), (torch.randn(5, K), states(layer)),
        (shuffled, states(layer, 4)), (ordered, None), (torch.randn(1, 1, K), states(layer, 1)),
    ]  # fmt: skip


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_it_returns_what_torchs_does(name: str) -> None:
    module, layer = pair(name)
    with torch.no_grad():
        for x, hx in inputs(layer):
            wanted, found = module(x, hx), layer(x, hx)
            assert type(wanted) is type(found)
            for one, two in zip(flat(wanted), flat(found), strict=True):
                assert one.shape == two.shape and one.dtype == two.dtype
                assert one.numel() == 0 or noise_ratio(one, two) > 28
            if isinstance(wanted, tuple) and isinstance(wanted[0], PackedSequence):
                assert equal(pad_packed_sequence(found[0])[1], pad_packed_sequence(wanted[0])[1])
                assert found[0].batch_sizes is x.batch_sizes


@pytest.mark.parametrize("name", ["lstm", "gru", "rnn"])
def test_it_is_the_definition(name: str) -> None:
    _, layer = pair(name)
    x, hx = torch.randn(4, 3, K), states(layer, 3)
    hidden, *state = flat(hx)
    gates = reference.linear_float(x.reshape(-1, K).numpy(), *operands(layer.ih_l0))
    wanted, last = reference.recurrent_float(
        gates.reshape(4, 3, -1), *operands(layer.hh_l0), cell=layer.cell, axis=0,
        hidden=hidden[0].numpy(), state=state[0][0].numpy() if state else None,
    )  # fmt: skip
    y, *ends = flat(layer(x, hx) if not layer.batch_first else layer(x.transpose(0, 1), hx))
    y = y.transpose(0, 1) if layer.batch_first else y
    np.testing.assert_array_equal(y.numpy(), wanted)
    np.testing.assert_array_equal(ends[-1][0].numpy(), last)


def operands(linear: Any) -> tuple[Any, Any]:
    found = linear._operands()
    return found.weight, found.epilogue


@pytest.mark.parametrize("name", LAYERS)
def test_a_sequence_in_parts_and_alone_has_the_same_bits(name: str) -> None:
    _, layer = pair(name)
    time = int(layer.batch_first)
    x = torch.randn(3, 7, K).transpose(0, 1 - time)
    whole, ends = layer(x)
    if not layer.bidirectional:
        first, state = layer(x.narrow(time, 0, 4))
        second, state = layer(x.narrow(time, 4, 3), state)
        assert torch.equal(torch.cat([first, second], time), whole) and equal(state, ends)
    alone, last = layer(x.select(1 - time, 1))
    assert torch.equal(alone, whole.select(1 - time, 1))
    assert all(torch.equal(a, b[:, 1]) for a, b in zip(flat(last), flat(ends), strict=True))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_have_the_bits_of_each(name: str) -> None:
    _, layer = pair(name)
    sequences = [torch.randn(n, K) for n in (2, 6, 6, 1, 3)]
    hx = states(layer, 5)
    y, ends = layer(pack_sequence(sequences, enforce_sorted=False), hx)
    padded, _ = pad_packed_sequence(y, batch_first=True)
    for i, x in enumerate(sequences):
        first = tuple(state[:, i] for state in flat(hx))
        alone, last = layer(x, first if layer.cell == "lstm" else first[0])
        assert torch.equal(alone, padded[i, : len(x)])
        assert all(torch.equal(a, b[:, i]) for a, b in zip(flat(last), flat(ends), strict=True))


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_copies_and_files(name: str, tmp_path: Path) -> None:
    module, layer = pair(name)
    (x, hx), *_ = inputs(layer)
    wanted = layer(x, hx)
    assert equal(copy.deepcopy(layer)(x, hx), wanted)
    assert equal(pickle.loads(pickle.dumps(layer))(x, hx), wanted)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    given = {n: getattr(layer, n) for n in type(layer).ARGUMENTS}
    empty = type(layer)(**given, bias=layer.bias)
    with pytest.raises(RuntimeError, match="Unexpected"):
        empty.load_state_dict({**layer.state_dict(), "other": torch.zeros(1)})
    empty.load_state_dict(torch.load(file, weights_only=True))
    assert equal(empty(x, hx), wanted)
    again = layer.to_float()
    assert type(again) is type(module)
    assert noise_ratio(flat(module(x, hx))[0], flat(again(x, hx))[0]) > 28
    path = tmp_path / "layer.safetensors"
    fastq.save(nn.Sequential(layer), path)
    loaded = fastq.load(path, nn.Sequential(module))
    assert equal(loaded[0](x, hx), wanted)  # type: ignore[index]
    assert not any(part.training for part in loaded.modules())  # dropout is off
    fastq.save(layer, path)
    assert equal(fastq.load(path, module)(x, hx), wanted)
    with pytest.raises(ValueError, match="wanted"):
        fastq.load(path, type(module)(K, H + 1))


@pytest.mark.parametrize("name", ["projection", "gru", "rnn", "gru cell"])
def test_compile_export_and_torchs_checks(name: str) -> None:
    _, layer = pair(name)
    (x, hx) = inputs(layer)[0] if name == "gru cell" else inputs(layer)[1]
    with torch.no_grad():
        wanted = layer(x, hx)
        assert equal(torch.compile(layer, backend="eager", fullgraph=True)(x, hx), wanted)
        program = torch.export.export(layer, (x, hx), strict=False)
    called = [str(n.target) for n in program.graph.nodes if "fastq" in str(n.target)]
    assert called == ["fastq.recurrent.default"]
    assert equal(program.module()(x, hx), wanted)
    check_target("fastq.recurrent.default")
    if name != "gru cell":
        tensors = tensors_of(layer)
        plan = layer.cell, [], int(layer.batch_first), layer.bidirectional, 0.0
        torch.library.opcheck(
            torch.ops.fastq.recurrent.default,
            (x, flat(hx), tensors, bool(layer.proj_size), *plan),
        )


def test_static_ranges() -> None:
    module, layer = pair("lstm")
    x, hx = torch.randn(4, 3, K).clamp(-3, 3), states(layer, 3)
    layer.ih_l0.set_input_qparams(choose_qparams(-3.0, 3.0))
    layer.hh_l0.set_input_qparams(choose_qparams(-1.0, 1.0))
    assert noise_ratio(module(x, hx)[0], layer(x, hx)[0]) > 28
    assert "uint8 scale" in repr(layer)
    fresh = QLSTM(K, H)
    fresh.load_state_dict(layer.state_dict())
    assert equal(fresh(x, hx), layer(x, hx))


def test_dropout_is_for_training() -> None:
    module = nn.LSTM(K, H, 2, dropout=0.5).train()
    layer, x = QLSTM.from_float(module), torch.randn(5, 3, K)
    assert layer.training and not equal(layer(x), layer(x))
    layer.eval()
    assert equal(layer(x), layer(x))


X = torch.zeros(5, 3, K)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "float64": (lambda q: q(X.double()), TypeError, "x is float64"),
    "features": (lambda q: q(X[..., :9]), ValueError, r"wanted float32 \(steps, 10\) or"),
    "axes": (lambda q: q(X[None]), ValueError, r"\(steps, B, 10\)"),
    "no steps": (lambda q: q(X[:0]), ValueError, "no steps"),
    "grad": (lambda q: q(X.clone().requires_grad_()), RuntimeError, "x requires grad"),
    "hx": (lambda q: q(X, X), TypeError, r"wanted a tuple \(h_0, c_0\)"),
    "one state": (lambda q: q(X, (X,)), TypeError, r"wanted a tuple \(h_0, c_0\)"),
    "h_0": (lambda q: q(X, (X, X)), ValueError, r"h_0 is .* wanted float32 \(1, 3, 20\)"),
    "c_0": (lambda q: q(X, (torch.zeros(1, 3, H), torch.zeros(1, 2, H))), ValueError, "c_0 is"),
    "c_0's dtype": (lambda q: q(X, (torch.zeros(1, 3, H), torch.zeros(1, 3, H).half())), TypeError,
                    "c_0 is float16"),
    "unbatched": (lambda q: q(X[:, 0], (torch.zeros(1, 3, H),) * 2), ValueError, r"\(1, 20\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(QLSTM(K, H))


def test_bad_layers_are_refused() -> None:
    for kind in RECURRENT_KINDS:
        with pytest.raises(TypeError, match=f"wanted torch.nn.{kind.FLOAT.__name__}"):
            kind.from_float(nn.Linear(2, 2))
        for given in ({"device": "cuda"}, {"dtype": torch.float16}):
            with pytest.raises(ValueError, match="wanted None or"):
                kind(K, H, **given)
        broken = kind.FLOAT(K, H)
        with torch.no_grad():
            next(broken.parameters())[0] = torch.nan
        with pytest.raises(ValueError, match="NaN"):
            kind.from_float(broken)
    for kind in (QRNN, QRNNCell):
        with pytest.raises(ValueError, match="wanted 'tanh' or 'relu'"):
            kind(K, H, nonlinearity="sigmoid")
    with pytest.raises(ValueError, match="hidden_size"):
        QGRU(K, 0)
    with pytest.raises(ValueError, match="proj_size"):
        QLSTM(K, H, proj_size=H)
    with pytest.warns(UserWarning, match="dropout"):
        QLSTM(K, H, dropout=0.5)
    with pytest.raises(RuntimeError, match="cannot move"):
        QLSTM(K, H).to("meta")


def test_operators_check_what_they_are_given() -> None:
    """A file or an exported program may hold anything."""
    _, layer = pair("lstm")
    tensors = tensors_of(layer)
    x, h = torch.zeros(4, 3, K), torch.zeros(1, 3, H)
    plan = "lstm", [], 0, False, 0.0
    other = tensors_of(QLSTM.from_float(nn.LSTM(5 * K, H)))
    run = torch.ops.fastq.recurrent
    assert len(run(x, [h, h], tensors, False, *plan)) == 3
    wrong = [
        (x[..., :9], [h, h], tensors, False, *plan),
        (x.double(), [h, h], tensors, False, *plan),
        (x, [h[:, :2], h], tensors, False, *plan),
        (x, [h, h.double()], tensors, False, *plan),
        (x, [h, h], tensors[:9], False, *plan),
        (x, [h, h], tensors[:5], False, *plan),
        (x, [h, h], [torch.empty(0), *tensors[1:]], False, *plan),
        (x, [h], tensors, False, *plan),
        (x, [h, h, h], tensors, False, *plan),
        (x, [h.expand(2, 3, H), h.expand(2, 3, H)], tensors, False, *plan),
        (x, [h, h], [], False, *plan),
        (x, [h.expand(2, 3, H)] * 2, tensors + tensors, False, *plan),  # of layers that do not fit
        (x, [h.expand(2, 3, H)] * 2, tensors + other, False, "lstm", [], 0, True, 0.0),
        (x, [h, h], [tensors[0].float(), *tensors[1:]], False, *plan),
        (x, [h, h], [*tensors[:5], tensors[5][:, :7], *tensors[6:]], False, *plan),
        (x, [h, h], tensors, False, "gru", [], 0, False, 0.0),
        (x, [h, h], tensors, False, "lstm", [], 3, False, 0.0),
        (x[0], [h, h], tensors, False, "lstm", [2, 3], 0, False, 0.0),
        (x[0], [h, h], tensors, False, "lstm", [9], 0, False, 0.0),
        (x[0], [h, h], tensors, False, "lstm", [-3], 0, False, 0.0),
        (x[0], [h, h], tensors, False, "lstm", [2], 0, False, 0.0),
        (x[0], [h, h], tensors, False, "lstm", [1, 2], 0, False, 0.0),
        (x[0], [h, h], tensors, False, "lstm", [3, 0], 0, False, 0.0),
        (x[0], [h, h], tensors, False, *plan),
    ]
    for arguments in wrong:
        with pytest.raises((ValueError, TypeError, RuntimeError, IndexError)):
            run(*arguments)
    linear = [layer.ih_l0._buffers[key] for key in STATE]
    for bad in (torch.zeros(2, 9), torch.zeros(2, K).double(), torch.zeros(())):
        with pytest.raises((ValueError, TypeError), match="fastq::linear: x is"):
            torch.ops.fastq.linear(bad, *linear)
    conv = fastq.QConv2d.from_float(nn.Conv2d(4, 8, 3))
    of_conv = [conv._buffers[key] for key in STATE]
    for bad in (torch.zeros(1, 3, 9, 9), torch.zeros(4, 9, 9), torch.zeros(1, 4, 9, 9).double()):
        with pytest.raises((ValueError, TypeError), match="fastq::convolution: x is"):
            torch.ops.fastq.convolution(
                bad, *of_conv, [1, 1], [0, 0, 0, 0], [1, 1], False, 1, [0, 0]
            )


def tensors_of(layer: Any) -> list[Tensor]:
    """As the operator takes them."""
    found = [part._buffers[key] for part in layer.children() for key in STATE]
    return [torch.empty(0) if tensor is None else tensor for tensor in found]


def test_packed_sizes_are_checked() -> None:
    _, layer = pair("lstm, both ways")
    data = torch.randn(10, K)
    for sizes in ([5, 4], [4, 4, 4], [2, 3, 5], [10, 0]):
        with pytest.raises(ValueError, match="sum up to the rows"):
            layer(PackedSequence(data, torch.tensor(sizes)))


@pytest.mark.parametrize("name", [*LAYERS, *CELLS])
def test_results_have_memory_of_their_own(name: str) -> None:
    _, layer = pair(name)
    for x, hx in inputs(layer):
        results = flat(layer(x, hx))
        kept = [result.clone() for result in results]
        for i, result in enumerate(results):
            result.fill_(7)
            for j, other in enumerate(results):
                assert j <= i or torch.equal(other, kept[j])


@pytest.mark.filterwarnings("ignore")  # deprecated, and what it says of sizes
def test_jit_trace_and_flatten_parameters() -> None:
    for name in ("projection", "gru"):
        _, layer = pair(name)
        layer.flatten_parameters()
        x, _ = inputs(layer)[0]
        traced = torch.jit.trace(lambda x, layer=layer: layer(x)[0], x, check_trace=False)
        assert torch.equal(traced(-x), layer(-x)[0])


# ------------------------------------------------------------------------------ in whole models


class Streaming(nn.Module):
    """A step of speech recognition: called with the states that it gave before."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(6, K)
        self.rnn = nn.LSTM(K, H, 2, batch_first=batch_first)
        self.head = nn.Linear(H, 4)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor]) -> Any:
        y, state = self.rnn(self.first(x).relu(), state)
        return self.head(y), state


class Cells(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, K), nn.Linear(H, 4)
        self.lstm, self.gru = nn.LSTMCell(K, H), nn.GRUCell(H, H)

    def forward(self, x: Tensor, h: Tensor, c: Tensor, g: Tensor) -> Any:
        h, c = self.lstm(self.first(x), (h, c))
        g = self.gru(h, g)
        return self.head(g), h, c, g


class Translation(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(30, K), nn.Embedding(30, K)
        self.encoder, self.decoder = (nn.LSTM(K, H, batch_first=True) for _ in range(2))
        self.head = nn.Linear(H, 30)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        _, state = self.encoder(self.source(source))
        y: Tensor = self.head(self.decoder(self.target(target), state)[0])
        return y


def streamed(b: int, steps: int, batch_first: bool = True) -> tuple[Any, ...]:
    x = torch.randn(b, steps, 6)
    hx = torch.randn(2, b, H) / 2, torch.randn(2, b, H) / 2
    return (x if batch_first else x.transpose(0, 1).contiguous(), hx)


def of_cells(b: int, steps: int) -> tuple[Any, ...]:
    return torch.randn(b, 6), *(torch.randn(b, H) / 2 for _ in range(3))


def words(b: int, steps: int) -> tuple[Any, ...]:
    return torch.randint(0, 30, (b, steps)), torch.randint(0, 30, (b, steps))


NETWORKS: dict[str, tuple[Any, Any, set[str]]] = {
    "streaming": (Streaming, streamed, {"rnn"}),
    "steps first": (
        lambda: Streaming(False), lambda b, steps: streamed(b, steps, False), {"rnn"},
    ),
    "cells": (Cells, of_cells, {"lstm", "gru"}),
    "translation": (Translation, words, {"encoder", "decoder"}),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_with_layers_of_their_own(name: str, tmp_path: Path) -> None:
    build, example, alone = NETWORKS[name]
    torch.manual_seed(0)
    model = build().eval()
    data = [example(4, 5) for _ in range(4)]

    def run(network: Any, batch: Any) -> Any:
        return network(*batch)

    with torch.no_grad():
        int8 = fastq.quantize_model(model, data, forward=run, strict=True, progress=False)
        rows = {row.name: row.result for row in fastq.summary(int8).rows}
        assert {name for name, result in rows.items() if result == "int8 dynamic"} == alone
        assert isinstance(int8, fastq.QuantizedModel) and int8.has_layers_alone
        path = tmp_path / "model.safetensors"
        fastq.save(int8, path)
        loaded = fastq.load(path)
        for given in (data[0], example(1, 1), example(7, 9)):
            found = int8(*given)
            assert noise_ratio(flat(model(*given))[0], flat(found)[0]) > 22
            assert equal(loaded(*given), found)
    report = fastq.report(model, int8, data[:1], forward=run, passes=1, path=None, progress=False)
    assert {step.layer for step in report.steps if "recurrent" in step.op} == alone
    assert all(not step.why for step in report.steps
               if step.op.startswith("fastq"))  # fmt: skip
    names = ("x", "state", "h", "c", "g") if name != "translation" else ("source", "target")
    if name == "cells":
        names = ("x", "h", "c", "g")
    profile = fastq.profile(int8, dict(zip(names, data[0], strict=False)), passes=1)
    assert "int8 layer" in str(profile)
    with pytest.raises(ValueError, match="wanted the float model"):
        fastq.prepare_qat(int8)


class Loop(nn.Module):
    """A cell that is called for each step in Python: a graph of so many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.LSTMCell(6, H), nn.Linear(H, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], H)
        for i in range(x.shape[1]):
            h, c = self.cell(x[:, i], (h, c))
        y: Tensor = self.head(h)
        return y


@pytest.mark.parametrize("skip", [(), "cell"])
def test_a_loop_has_the_steps_of_the_example(skip: Any, tmp_path: Path) -> None:
    model, x = Loop().eval(), torch.randn(4, 5, 6)
    int8 = fastq.quantize_model(model, x, skip=skip, progress=False)
    fastq.save(int8, tmp_path / "loop.safetensors")
    for network in (int8, fastq.load(tmp_path / "loop.safetensors")):
        assert noise_ratio(model(x[:3]), network(x[:3])) > 25
        for wrong in (torch.randn(4, 7, 6), torch.randn(4, 3, 6), torch.randn(4, 5)):
            with pytest.raises(ValueError, match=r"wanted \(any, 5, 6\)"):
                network(wrong)


def test_a_file_of_weights_that_do_not_fit_is_refused(tmp_path: Path) -> None:
    """Each int8 weight in turn has more or fewer columns than what it multiplies."""
    data = streamed(4, 5)
    int8 = fastq.quantize_model(
        Streaming().eval(), [data], forward=lambda net, batch: net(*batch), progress=False
    )
    state = int8.state_dict()
    names = [name for name in state if "rnn" in name or "lstm" in name]
    weights = [name for name in names if state[name].dtype is torch.int8]
    assert len(weights) == 4
    for name in weights:
        for k in (1, K + 1, 40 * K):
            made = torch.ones(len(state[name]), k, dtype=torch.int8)
            wrong = {**state, name: made} if made.shape != state[name].shape else None
            assert wrong is not None
            network = fastq.QuantizedModel(int8.layout, wrong)
            with pytest.raises(ValueError, match=r"wanted|takes"):
                network(*data)


def test_bits_of_weights_hold_for_layers_of_their_own() -> None:
    model, data = Streaming(), streamed(4, 5)
    config = {nn.LSTM: fastq.QConfig(weight_bits=3)}
    int8 = fastq.quantize_model(
        model, [data], forward=lambda net, batch: net(*batch), config=config, progress=False
    )
    weights = [t for name, t in int8.state_dict().items() if "rnn" in name or "lstm" in name]
    assert {int(w.abs().max()) for w in weights if w.dtype is torch.int8} == {3}


def test_training_keeps_them_float() -> None:
    model, data = Streaming(), streamed(4, 5)
    prepared = fastq.prepare_qat(model, [data], forward=lambda net, batch: net(*batch))
    prepared(*data)[0].sum().backward()
    assert all(p.grad is not None for p in prepared.parameters())
    converted = fastq.convert(prepared)
    assert torch.equal(converted(*data)[0], prepared.eval()(*data)[0])
    (row,) = (row for row in fastq.summary(converted).rows if row.name == "rnn")
    assert row.result == "float"


@pytest.mark.parametrize("calibrated", [True, False])
def test_models_of_layers(calibrated: bool) -> None:
    x = torch.randn(5, 3, K)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head, self.cell = nn.GRU(K, H), nn.Linear(H, 4), nn.LSTMCell(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.cell(self.head(self.rnn(x)[0][-1]))[0]
            return y

    net = Net().eval()
    int8 = fastq.quantize_layers(net, x if calibrated else None, strict=True, progress=False)
    rows = {row.name: row.result for row in fastq.summary(int8).rows}
    of_head = "int8 static" if calibrated else "int8 dynamic"
    assert rows == {"rnn": "int8 dynamic", "head": of_head, "cell": "int8 dynamic"}
    assert isinstance(int8.rnn, QGRU) and isinstance(int8.cell, QLSTMCell)
    assert noise_ratio(net(x), int8(x)) > 25
    skipped = fastq.quantize_layers(net, skip=nn.GRU)
    assert type(skipped.rnn) is nn.GRU and isinstance(skipped.cell, QLSTMCell)
    once_more = fastq.quantize_layers(copy.deepcopy(skipped), skip=())
    assert isinstance(once_more.rnn, QGRU)
