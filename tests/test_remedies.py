"""Remedies: each shows its own gain on a network made for it, and leaves alone what it must."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fastq
from fastq.graph import Node, evaluate
from fastq.layerwise import decibels
from fastq.network import finish, prepare_model
from fastq.observer import PercentileObserver
from fastq.plan import BoundProgram
from fastq.prepare import ChannelEnds, Prepared
from fastq.qconfig import QConfig
from fastq.remedies import REMEDIES, observe_and_apply, remedy_names, rounding, side_by_side
from fastq.remedies.side_by_side import by_channel, simulation, take_sample, walk


def images(count: int = 8, channels: int = 3, size: int = 12) -> Tensor:
    """Smooth and not centred, as pictures are: neighbouring pixels say nearly the same."""
    rough = torch.randn(count, channels, size // 3, size // 3)
    return nn.functional.interpolate(rough, size=(size, size), mode="bilinear") + 0.5


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.third = nn.Conv2d(16, 16, 3, stride=2)
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = (x + self.second(x)).relu()
        return self.last(self.third(x).relu().mean((2, 3)))


class Depthwise(nn.Module):
    """Few weights for each output, all of them off to one side: rounding shifts means."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 16, 1), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
            nn.Conv2d(16, 16, 1), nn.ReLU6(),
            nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU6(),
        )  # fmt: skip
        self.last = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x).mean((2, 3)))


class Embedding(nn.Module):
    """A layer norm with a few channels that are 100 times as large as the others."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)
        self.last = nn.Linear(32, 32)
        with torch.no_grad():
            self.norm.weight[::8] = 100
            for layer in (self.query, self.key):
                layer.weight[:, ::8] /= 100

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.last(self.query(x) * self.key(x))


def uneven(model: nn.Sequential) -> nn.Sequential:
    """The same function, with channels between its layers that differ by 1000:1."""
    layers: list[Any] = [m for m in model if isinstance(m, nn.Conv2d | nn.Linear)]
    with torch.no_grad():
        for one, two in itertools.pairwise(layers):
            factor = torch.logspace(-1.5, 1.5, len(one.weight))[torch.randperm(len(one.weight))]
            one.weight *= factor.reshape(-1, *[1] * (one.weight.dim() - 1))
            one.bias *= factor
            two.weight /= factor.reshape(1, -1, *[1] * (two.weight.dim() - 2))
    return model


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(),
        nn.MaxPool2d(2), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip


def prepared_for(model: nn.Module, x: Tensor, **config: Any) -> Prepared:
    prepared, _ = prepare_model(model, [x], config=QConfig(**config))
    assert len(prepared.regions) == 1
    return prepared


def gained(
    model: nn.Module, data: Sequence[Tensor], test: Tensor, remedies: Any, **config: Any
) -> float:
    """What the remedies add to the SNR of the integer network's output, in dB, over none."""
    with torch.no_grad():
        real = model.eval()(test)
    ratios = []
    for names in ((), remedies):
        prepared = prepared_for(model, data[0], **config)
        observe_and_apply(prepared, [[batch] for batch in data], names)
        program = prepared.lowered(prepared.regions[0]).program
        (y,) = BoundProgram(program)(test.numpy())
        ratios.append(decibels(real, torch.from_numpy(y)))
    return ratios[1] - ratios[0]


def batches(make: Callable[[], Tensor] = images, count: int = 4) -> list[Tensor]:
    return [make() for _ in range(count)]


def test_names_are_checked_and_put_in_order() -> None:
    assert remedy_names("gptq") == ("gptq",)
    assert remedy_names(["bias_correction", "gptq"]) == ("gptq", "bias_correction")
    assert remedy_names(()) == ()
    with pytest.raises(ValueError, match="remedies: 'magic' is none; there are cross_layer"):
        remedy_names(["gptq", "magic"])
    with pytest.raises(TypeError, match=r"remedies: got None, wanted names, or \(\) for none"):
        remedy_names(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("model", [Residual, Depthwise])
def test_bias_correction_gains(model: Callable[[], nn.Module]) -> None:
    assert gained(model(), batches(), images(32), "bias_correction", weight_bits=4) > 1


@pytest.mark.parametrize("make", [Residual, Depthwise])
def test_balanced_rounding_gains(make: Callable[[], nn.Module]) -> None:
    assert gained(make(), batches(), images(32), "balanced_rounding", weight_bits=4) > 1


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("channels, kernel_size, groups", [(6, 3, 1), (8, (2, 3), 8), (12, 1, 2)])
def test_balanced_errors_sum_to_half_a_step(
    channels: int, kernel_size: int | tuple[int, int], groups: int, bits: int
) -> None:
    layer = nn.Conv2d(channels, 8, kernel_size, groups=groups)
    prepared = prepared_for(layer, torch.randn(2, layer.in_channels, 6, 6), weight_bits=bits)
    (node,) = prepared.layers()
    nearest, scale = prepared.weight(node)
    rounding.balanced_rounding(prepared, [])
    data, same_scale = prepared.weight(node)
    np.testing.assert_array_equal(same_scale, scale)
    assert np.abs(data).max() <= 2 ** (bits - 1) - 1
    assert np.abs(data - nearest.astype(np.int32)).max() == 1  # some, and by one
    steps = layer.weight.detach().numpy() / scale.reshape(-1, 1, 1, 1)
    error = steps - data
    assert np.abs(error).max() < 1
    assert np.abs(error.sum((1, 2, 3))).max() <= 0.5 + 1e-4
    assert np.abs(error.sum((2, 3))).max() <= 1 + 1e-4  # half a step, and one turned for the output


def test_equal_weights_are_not_all_turned() -> None:
    layer = nn.Linear(8, 1, bias=False)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([127.0] + [10.4] * 7)
    prepared = prepared_for(layer, torch.randn(2, 8))
    (node,) = prepared.layers()
    rounding.balanced_rounding(prepared, [])
    data, _ = prepared.weight(node)
    assert sorted(data[0]) == [10] * 4 + [11] * 3 + [127]  # 7 * 0.4 is 2.8


def test_bias_correction_restores_the_mean_of_every_layer() -> None:
    data = [[batch] for batch in batches()]
    prepared = prepared_for(Residual(), data[0][0], weight_bits=3)
    worst = {}
    for names in ((), ("bias_correction",)):
        observe_and_apply(prepared, data, names)
        shifts = []
        for node, sides in walk(prepared, data):
            errors = [s.wanted - evaluate(simulation(prepared, node), s.inputs) for s in sides]
            mean = by_channel(node, torch.cat(errors)).mean(1).abs().max()
            shifts.append(float(mean / torch.cat([s.wanted for s in sides]).std()))
        worst[names] = max(shifts)
    assert worst["bias_correction",] < 0.1 * worst[()]


def test_what_a_range_leaves_out_is_not_made_up_for() -> None:
    """Hot pixels in the calibration data, which a percentile leaves out, are not in the test."""
    data = batches()
    for batch in data:
        batch[:, :, 3, 3] = 50.0
    observer = partial(PercentileObserver, 98.0)
    assert gained(Residual(), data, images(32), "bias_correction", observer=observer) > -1


def test_equalization_reaches_a_layer_that_stays_float() -> None:
    """Else its readers would be left with the uneven channels that it makes."""
    model = uneven(plain()).eval()
    prepared, _ = prepare_model(model, [images()], config={"2": None})
    (reader,) = [node for node in prepared.graph if node.layer == "5"]
    spreads = []
    for names in ((), ("cross_layer_equalization",)):
        observe_and_apply(prepared, [[batch] for batch in batches()], names)
        inputs = reader.tensors["weight"].abs().amax((0, 2, 3))
        spreads.append(float(inputs.max() / inputs.min()))
    assert spreads[1] < spreads[0] / 10


class PadsFeatures(nn.Module):
    """Features of 0 between two layers: the second one's channels are not the first one's."""

    def __init__(self, pad: tuple[int, int]) -> None:
        super().__init__()
        self.a, self.b, self.pad = nn.Linear(6, 8), nn.Linear(8 + sum(pad), 4), pad

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.pad(torch.relu(self.a(x)), self.pad))


@pytest.mark.parametrize("pad", [(1, 2), (1, -1)])
def test_equalization_stops_where_channels_are_padded(pad: tuple[int, int]) -> None:
    model, data = PadsFeatures(pad).eval(), torch.randn(64, 6)
    with torch.no_grad():
        model.a.weight *= torch.logspace(0, -3, 8)[:, None]
    assert snr(model, [data], data, "cross_layer_equalization") == snr(model, [data], data, ())


def test_biases_are_corrected_once_however_often_it_is_asked() -> None:
    data = [[batch] for batch in batches(count=1)]
    prepared = prepared_for(Residual(), data[0][0], weight_bits=4)
    observe_and_apply(prepared, data)
    once = {node: bias.clone() for node, bias in prepared.biases.items()}
    REMEDIES["bias_correction"].apply(prepared, data, False)
    for node, bias in prepared.biases.items():
        torch.testing.assert_close(bias, once[node], atol=1e-4, rtol=1e-3)


def test_batch_norm_gains_and_restores_mean_and_variance() -> None:
    data, test = batches(), images(32)
    assert gained(Depthwise(), data, test, "batch_norm", weight_bits=4) > 1
    prepared = prepared_for(Depthwise(), data[0], weight_bits=3)
    observe_and_apply(prepared, [[batch] for batch in data], "batch_norm")
    for node, sides in walk(prepared, [[batch] for batch in data]):
        got = torch.cat([evaluate(simulation(prepared, node), s.inputs) for s in sides])
        wanted = torch.cat([s.wanted for s in sides])
        got, wanted = by_channel(node, got), by_channel(node, wanted)
        torch.testing.assert_close(got.mean(1), wanted.mean(1), atol=1e-3, rtol=1e-3)
        torch.testing.assert_close(got.std(1), wanted.std(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("remedy", ["gptq", "adaround"])
def test_learned_rounding_gains_more_than_the_mean(
    remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "ADAROUND_STEPS", 200)
    torch.manual_seed(0)
    data, test, network = batches(), images(32), Residual()
    only_mean = gained(network, data, test, "bias_correction", weight_bits=4)
    both = gained(network, data, test, [remedy, "bias_correction"], weight_bits=4)
    assert both > only_mean + 1


MEAN, DEVIATION = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def photographs(count: int = 8) -> Tensor:
    """256 values in each channel, normalized as torchvision's networks want it."""
    pixels = ((images(count) + 1) * 80).clamp(0, 255).round()
    return (pixels / 255 - MEAN[:, None, None]) / DEVIATION[:, None, None]


class Features(nn.Module):
    """Rows of features whose ranges differ by 1000:1 and that are not centred."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = torch.logspace(-1.5, 1.5, 24)
        self.first, self.last = nn.Linear(24, 32), nn.Linear(32, 10)
        with torch.no_grad():
            self.first.weight /= self.wide

    def rows(self, count: int = 64) -> Tensor:
        return (torch.rand(count, 24) + 0.3) * self.wide

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def snr(model: nn.Module, data: Any, test: Tensor, remedies: Any) -> float:
    """Of the quantized network's output, in dB."""
    int8 = fastq.quantize_model(model.eval(), data, remedies=remedies, progress=False)
    with torch.no_grad():
        return decibels(model(test), int8(test))


def test_input_equalization_keeps_all_values_of_photographs() -> None:
    data, test = [photographs(), photographs()], photographs(32)
    calibrated = {}
    for names in ((), ("input_equalization",)):
        prepared = prepared_for(Residual(), data[0])
        observe_and_apply(prepared, [[batch] for batch in data], names)
        calibrated[names] = prepared
    (grid,) = [n for n in calibrated["input_equalization",].integer_nodes() if n.op == "grid"]
    kept = calibrated["input_equalization",].qparams(grid)
    assert (float(kept.scale), int(kept.zero_point)) == (1 / 256, 0)
    pixels = 256 * evaluate(grid, [test])[..., 1:-1, 1:-1]  # the padding is none of the 256 values
    torch.testing.assert_close(pixels, pixels.round(), atol=1e-3, rtol=0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3, groups=3))  # an output reads one channel
    with torch.no_grad():
        model[0].weight.uniform_(-126, 126).round_()[:, :, 0, 0] = 127  # of integer weights
    assert snr(model, data, test, "input_equalization") > snr(model, data, test, ()) + 40


def test_input_equalization_gains_on_uneven_features() -> None:
    model = Features()
    data, test = [model.rows(700), model.rows(700)], model.rows()
    assert snr(model, data, test, "input_equalization") > snr(model, data, test, ()) + 10
    few = [model.rows(), model.rows()]  # of which the ends say little
    assert snr(model, few, test, "input_equalization") == snr(model, few, test, ())


def test_a_grid_is_no_coarser_than_the_shared_one() -> None:
    """Outliers that the observer leaves out, and a channel that never changes."""
    x = images(64, 3)
    x[:, 0] /= 2
    x[:, 1] = 0.25
    x[0, 2, 0, 0] = 300.0
    prepared = prepared_for(Residual(), x, observer=lambda: PercentileObserver(99.9))
    observe_and_apply(prepared, [[x]], ())
    shared = prepared.qparams(prepared.graph.inputs[0])
    observe_and_apply(prepared, [[x]], "input_equalization")
    (grid,) = [node for node in prepared.integer_nodes() if node.op == "grid"]
    factor, shift = (256 * grid.tensors[name].numpy() for name in ("factor", "shift"))
    np.testing.assert_allclose(factor[1:], 1 / shared.scale, rtol=1e-6)
    np.testing.assert_allclose(shift[1:], float(shared.zero_point), rtol=1e-6)
    assert factor[0] > 1.01 / shared.scale
    assert prepared.graph.inputs[0] not in prepared.ranges.parent


@pytest.mark.parametrize("grouped", [False, True])
def test_input_equalization_leaves_the_float_network_as_it_was(grouped: bool) -> None:
    model = nn.Sequential(
        nn.ZeroPad2d((0, 1, 2, 0)), nn.Conv2d(4, 8, 3, 2, padding=1, groups=2 if grouped else 1),
        nn.ReLU(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    x = images(channels=4)
    model(x)
    prepared = prepared_for(model, x)
    with torch.no_grad():
        observe_and_apply(prepared, [[x]], "input_equalization")
        assert [node.op for node in prepared.graph][1:3] == ["grid", "conv2d"]
        (y,) = prepared.graph.run([x])
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


def test_input_equalization_leaves_an_input_that_is_also_added() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x) + x

    prepared = prepared_for(Added(), images())
    before = list(prepared.graph.nodes)
    observe_and_apply(prepared, [[images()]], "input_equalization")
    assert prepared.graph.nodes == before


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.layer(x, mask)


@pytest.mark.parametrize("remedies", [(), "input_equalization"])
def test_a_mask_may_have_another_length_in_each_batch(remedies: Any) -> None:
    causal = nn.Transformer.generate_square_subsequent_mask
    batches = [{"x": torch.randn(2, n, 16), "mask": causal(n)} for n in (12, 9, 1)]
    model = Masked().eval()
    int8 = fastq.quantize_model(model, batches, remedies=remedies, progress=False)
    for batch in batches:
        with torch.no_grad():
            assert decibels(model(**batch), int8(**batch)) > 20


@pytest.mark.parametrize("sizes", [(12, 9), (12, 1), (1, 12)])
def test_ends_of_channels_that_differ_in_number(sizes: tuple[int, int]) -> None:
    one, other, same = ChannelEnds(), ChannelEnds(), ChannelEnds()
    for ends, size in zip((one, other, same), (*sizes, sizes[0]), strict=True):
        ends.update(torch.randn(5, size))
        assert not ends.uneven
    one.merge(same)
    assert not one.uneven and one.count == 10
    one.merge(other)
    same.merge(one)
    assert one.uneven and same.uneven


def test_an_equalized_input_is_saved_and_trained(tmp_path: Path) -> None:
    data = photographs()
    int8 = fastq.quantize_model(Residual(), data, remedies="input_equalization", progress=False)
    (program,) = int8.programs  # no float operator before it
    assert [step.op for step in program.steps][:2] == ["grid", "conv2d"]
    fastq.save(int8, tmp_path / "model.safetensors")
    loaded = fastq.load(tmp_path / "model.safetensors")
    trained = fastq.convert(fastq.prepare_qat(loaded))
    for network in (loaded, trained):
        assert torch.equal(network(data), int8(data))


@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_quotient_of_what_was_rounded_to_zero(remedy: str) -> None:
    """A float operator between two programs gives 0 / 0, where the float network has 1."""

    class Quotient(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).sigmoid()
            return self.last(y / y.flip(0))

    model, x = Quotient().eval(), images(1)
    with torch.no_grad():
        model.first.bias[:4] -= 12
    int8 = fastq.quantize_model(model, x, remedies=remedy, progress=False)
    assert "div" in repr(int8) and int8(x).isfinite().all()


@pytest.mark.parametrize(
    "remedy, make",
    [
        ("batch_norm", Depthwise),
        ("bias_correction", Depthwise),
        ("gptq", Residual),
        ("adaround", Residual),
        ("cross_layer_equalization", lambda: uneven(plain())),
    ],
)
def test_remedies_gain_on_data_that_are_not_all_finite(
    remedy: str, make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounding, "ADAROUND_STEPS", 200)
    torch.manual_seed(0)
    data, test, model = batches(), images(32), make()
    data[0][0, 0, 3, 3], data[1][2, 1, 5, 5] = torch.nan, torch.inf
    assert gained(model, data, test, remedy, weight_bits=4) > 1


@pytest.mark.parametrize("remedy", ["gptq", "adaround", "batch_norm"])
def test_remedies_beside_a_grid_take_data_that_are_not_all_finite(
    remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not finite goes through the factors and shifts of `input_equalization`."""
    monkeypatch.setattr(rounding, "ADAROUND_STEPS", 50)
    torch.manual_seed(0)
    model, x, test = plain(), images(16), images(16)
    x[0, 0, 3, 3], x[1, 1, 5, 5], x[2, 2, 1, 1] = torch.nan, torch.inf, -torch.inf
    int8 = fastq.quantize_model(model, x, remedies=["input_equalization", remedy], progress=False)
    with torch.no_grad():
        assert decibels(model(test), int8(test)) > 25


def test_walk_takes_arguments_that_are_no_tensors() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, times: int, x: Tensor) -> Tensor:
            return self.conv(x).relu() * times

    model, data = Scaled().eval(), images()
    int8 = fastq.quantize_model(
        model, [data], forward=lambda model, x: model(2, x), remedies=["bias_correction"]
    )
    with torch.no_grad():
        assert decibels(model(2, data), int8(2, data)) > 25


def test_cross_layer_equalization_gains_on_uneven_channels() -> None:
    assert gained(uneven(plain()), batches(), images(32), "cross_layer_equalization") > 10


def test_activation_equalization_gains_on_a_layer_norm_with_outliers() -> None:
    def tokens() -> Tensor:
        return torch.randn(8, 10, 32)

    data, test = batches(tokens), torch.randn(16, 10, 32)
    assert gained(Embedding(), data, test, "activation_equalization") > 6
    assert gained(Embedding(), data, test, "cross_layer_equalization") == 0


def equalized(model: nn.Module, x: Tensor) -> tuple[Prepared, dict[str, Node], dict[str, Tensor]]:
    """The network after equalization, its layers, and their weights before."""
    prepared = prepared_for(model, x)
    before = {n.layer: n.tensors["weight"].clone() for n in prepared.layers()}
    for name in ("cross_layer_equalization", "activation_equalization"):
        REMEDIES[name].apply(prepared, [[x]], False)
    return prepared, {node.layer: node for node in prepared.layers()}, before


@pytest.mark.parametrize("make", [lambda: uneven(plain()), Residual, Depthwise, Embedding])
def test_an_equalized_network_is_the_same_function(make: Callable[[], nn.Module]) -> None:
    model = make().eval()
    x = torch.randn(4, 10, 32) if make is Embedding else 3 * images()
    prepared, _, _ = equalized(model, x)
    with torch.no_grad():
        (y,) = prepared.graph.run([x])
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)


class PostNorm(nn.Module):
    """Norms come last, as in BERT, and have features of many sizes, and means of their own."""

    def __init__(self, **given: Any) -> None:
        super().__init__()
        given = {"batch_first": True, "activation": "gelu"} | given
        layer = nn.TransformerEncoderLayer(32, 4, 64, **given)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.last = nn.Linear(32, 10)
        for norm in (m for m in self.modules() if isinstance(m, nn.LayerNorm)):
            norm.weight = nn.Parameter(torch.randn(32).exp())
            norm.bias = nn.Parameter(2 * torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(x)[:, 0])


class Norms(nn.Module):
    """Norms of images and rows, and a batch norm that stands alone: which may be shifted, and
    which only scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.alone, self.padded = nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3, padding=1)
        self.group, self.point = nn.GroupNorm(2, 8), nn.Conv2d(8, 8, 1)
        self.clamped, self.grouped = nn.GroupNorm(8, 8), nn.Conv2d(8, 16, 2, stride=2, groups=2)
        self.rows, self.root, self.line = nn.LayerNorm(16), nn.RMSNorm(16), nn.Conv1d(16, 16, 1)
        self.one, self.two, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)
        self.spelled = nn.Parameter(torch.randn(1, 1, 16).exp())
        for norm in (self.alone, self.group, self.clamped, self.rows, self.root):
            norm.weight = nn.Parameter(torch.randn(len(norm.weight)).exp())
            if hasattr(norm, "bias"):
                norm.bias = nn.Parameter(torch.randn(len(norm.bias)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.padded(nn.functional.max_pool2d(self.alone(x), 2))
        x = self.group(x)
        x = self.clamped(x + self.point(x)).relu()
        x = self.rows(self.grouped(x).flatten(2).transpose(1, 2))
        x = self.root(x + self.one(x.transpose(0, 1)).transpose(0, 1))
        x = self.two(x[:, 1:]) + self.line(x[:, 1:].transpose(1, 2)).transpose(1, 2)
        x = x - x.mean(-1, keepdim=True)
        x = x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5)
        x = x * self.spelled + self.spelled.flip(-1)
        return self.last(nn.functional.pad(x, (0, 0, 1, 0)))


POST_NORM = [{}, {"batch_first": False}, {"norm_first": True}, {"bias": False}]


@pytest.mark.parametrize("given", POST_NORM)
def test_norms_that_sums_read_are_equalized(given: dict[str, Any]) -> None:
    """The function stays; each norm but those that something else reads is on even channels."""
    model = PostNorm(**given).eval()
    prepared = prepared_for(model, torch.randn(20, 6, 32))
    x = torch.randn(64, 6, 32)
    REMEDIES["activation_equalization"].apply(prepared, [[x[:40]], [x[40:]]], False)
    with torch.no_grad():
        (y,) = prepared.graph.run([x])
        torch.testing.assert_close(y, model(x), atol=1e-4, rtol=1e-4)
    norms = [node for node in prepared.graph if node.op == "layer_norm"]
    assert len(norms) == 4 and all(node.attrs.get("equalized") for node in norms)
    adding = [node for node in prepared.graph if "add_factor" in node.tensors]
    assert len(adding) == (0 if given.get("norm_first") else 3)  # the first layer adds the input
    assert not any(node.op == "add" for node in prepared.graph)


def test_which_norms_are_shifted() -> None:
    model = Norms().eval()
    x = images(32)
    prepared = prepared_for(model, x)
    before = {node.layer: dict(node.tensors) for node in prepared.graph if node.tensors}
    REMEDIES["activation_equalization"].apply(prepared, [[x]], False)
    with torch.no_grad():
        torch.testing.assert_close(prepared.graph.run([x])[0], model(x), atol=1e-4, rtol=1e-4)
    nodes = {node.layer: node for node in prepared.graph if node.attrs.get("equalized")}
    assert set(nodes) == {"alone", "group", "clamped", "rows", "root", ""}
    for name, shifted in (("alone", False), ("group", True), ("clamped", False), ("rows", True)):
        weight, bias = ("factor", "shift") if name == "alone" else ("weight", "bias")
        old, new = before[name], nodes[name].tensors
        scaled = old[bias] * new[weight] / old[weight]
        assert torch.allclose(scaled, new[bias], rtol=1e-4, atol=1e-5) is not shifted, name


class Others(nn.Module):
    """A norm that something else reads, too."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.linear, self.read = nn.LayerNorm(16), nn.Linear(16, 16), read

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return self.linear(x).mean(1) + self.read(x)


@pytest.mark.parametrize("read", [
    lambda x: x.mean(1), lambda x: (x @ x.transpose(1, 2)).mean(1)[:, :1], lambda x: x.tanh()[:, 0],
    lambda x: x.flatten(1)[:, :16], lambda x: nn.functional.pad(x, (1, 0))[:, 0, 1:],
    lambda x: nn.Linear(16, 16)(nn.functional.pad(x, (0, 0, 1, 0), value=2.0))[:, 0],
])  # fmt: skip
def test_norms_that_others_read_are_left_alone(read: Callable[[Tensor], Tensor]) -> None:
    model, x = Others(read).eval(), torch.randn(64, 6, 16)
    prepared = prepared_for(model, x)
    REMEDIES["activation_equalization"].apply(prepared, [[x]], False)
    assert not any("equalized" in node.attrs for node in prepared.graph)


@pytest.mark.parametrize("images, of_pixels, of_means", [(4, False, False), (8, True, False),
                                                         (256, True, True)])  # fmt: skip
def test_a_few_rows_say_nothing_of_features(images: int, of_pixels: bool, of_means: bool) -> None:
    """Nor do a few means of many."""
    body = [nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8)]
    model = nn.Sequential(*body, Mean(), nn.Linear(8, 4)).eval()
    x = torch.randn(images, 7, 7, 8)
    prepared = prepared_for(model, x)
    REMEDIES["activation_equalization"].apply(prepared, [[x]], False)
    norms = {node.layer: "equalized" in node.attrs for node in prepared.graph}
    assert (norms["0"], norms["3"]) == (of_pixels, of_means)


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), 1).flatten(1)


def test_what_is_clamped_above_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.ReLU6(), nn.Conv2d(8, 4, 1))
    prepared = prepared_for(model.eval(), images(32))
    REMEDIES["activation_equalization"].apply(prepared, [[images(32)]], False)
    assert any("clamp" in node.attrs for node in prepared.graph if node.op == "group_norm")
    assert not any("equalized" in node.attrs for node in prepared.graph)


@pytest.mark.parametrize("bits, least", [(8, 4), (6, 1), (4, 0), (2, 0)])
def test_fewer_bits_leave_weights_less_to_make_up_for(bits: int, least: float) -> None:
    torch.manual_seed(0)
    data, test = [torch.randn(64, 6, 32) for _ in range(4)], torch.randn(256, 6, 32)
    assert gained(PostNorm(), data, test, "activation_equalization", weight_bits=bits) > least


def test_a_post_norm_transformer_gains(tmp_path: Path) -> None:
    """By default; saved, loaded and run without torch it has the same bits, and so after training
    from it. The report has its values in the float network's units."""
    torch.manual_seed(0)
    model, data = PostNorm().eval(), torch.randn(256, 6, 32)
    test = torch.randn(64, 6, 32)
    rest = ("input_equalization", "balanced_rounding", "bias_correction")
    with torch.no_grad():
        real = model(test)
        int8 = fastq.quantize_model(model, data, progress=False)
        plain = fastq.quantize_model(model, data, remedies=rest, progress=False)
        assert decibels(real, int8(test)) > 5 + decibels(real, plain(test))
    fastq.save(int8, tmp_path / "model.safetensors")
    assert torch.equal(fastq.load(tmp_path / "model.safetensors")(test), int8(test))
    (y,) = fastq.load_program(tmp_path / "model.safetensors")(test.numpy())
    assert torch.equal(torch.from_numpy(y), int8(test))
    report = tmp_path / "report.html"
    steps = fastq.report(model, int8, [test], path=report, progress=False).steps
    assert all(step.snr > 25 for step in steps if step.snr is not None)
    assert [step.rescaled for step in steps if step.op == "layer_norm"] == [True] * 4
    training = fastq.prepare_qat(int8)
    assert not any("factor" in name for name, _ in training.named_parameters())
    training(data[:32]).square().mean().backward()
    assert torch.equal(fastq.convert(training.eval())(test), training(test))


@pytest.mark.parametrize("remedy", ["gptq", "adaround", "batch_norm", "bias_correction"])
def test_remedies_after_it_know_what_is_added(remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "ADAROUND_STEPS", 50)
    torch.manual_seed(0)
    data = [torch.randn(64, 6, 32) for _ in range(4)]
    names = ["activation_equalization", remedy]
    assert gained(PostNorm(), data, torch.randn(64, 6, 32), names) > 4


def test_equalization_leaves_what_a_residual_addition_reads() -> None:
    _, layers, before = equalized(Residual(), images())
    assert torch.equal(layers["first"].tensors["weight"], before["first"])
    assert torch.equal(layers["second"].tensors["weight"], before["second"])
    assert not torch.equal(layers["third"].tensors["weight"], before["third"])  # read by last alone


def test_equalization_leaves_channels_that_reach_the_bound_of_relu6() -> None:
    model = Depthwise()
    first: Any = model.body[0]
    with torch.no_grad():
        first.bias[:4] = 20
        first.bias[4:] = 0.1
    _, layers, before = equalized(model, images())
    same = (layers["body.0"].tensors["weight"] == before["body.0"]).flatten(1).all(1)
    assert same[:4].all() and not same[4:].any()


def test_the_float_network_stays_as_it_is() -> None:
    model = Residual().eval()
    state = copy.deepcopy(model.state_dict())
    prepared = prepared_for(model, images())
    observe_and_apply(prepared, [[images()]], [n for n in REMEDIES if n != "adaround"])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_adaround_stops_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "ADAROUND_SECONDS", 1e-6)
    prepared = prepared_for(Residual(), images(), weight_bits=4)
    observe_and_apply(prepared, [[images()]], "adaround")
    assert set(prepared.layers()) == prepared.chosen.keys()


def test_the_sample_is_bounded_and_all_batches_are_observed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = batches(count=5)
    value = 4 * 8 * 16 * 12 * 12  # bytes of the largest one, for a batch
    for bytes_, count in ((1, 1), (2 * value, 2), (9 * value, 5)):
        monkeypatch.setattr(side_by_side, "SAMPLE_BYTES", bytes_)
        prepared = prepared_for(Residual(), data[0])
        assert len(take_sample(prepared, iter([[batch] for batch in data]))) == count
        observe_and_apply(prepared, ([batch] for batch in data), "bias_correction")
        (x,) = prepared.graph.inputs
        assert prepared.observers[prepared.ranges.find(x)].count == 5 * data[0].numel()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("groups", [1, 3])
def test_rows_are_the_products_of_a_convolution(stride: int, groups: int) -> None:
    layer = nn.Conv2d(3, 6, (3, 2), stride, padding=(1, 0), dilation=(1, 2), groups=groups).eval()
    x = images(2, size=9)
    prepared = prepared_for(layer, x)
    prepared.observe([x])
    ((node, sides),) = walk(prepared, [[x]])
    rows = rounding._rows(node, sides)
    y = torch.einsum("rgk,gnk->rgn", rows.x, rounding._float_weight(node)).flatten(1) + layer.bias
    with torch.no_grad():
        real = layer(sides[0].inputs[0])
    assert len(y) == real.numel() // 6
    torch.testing.assert_close(y.sort(0).values, real.transpose(0, 1).flatten(1).T.sort(0).values)
    torch.testing.assert_close(rows.wanted, y, atol=0.1, rtol=0.1)  # the same outputs


def digits() -> tuple[nn.Sequential, Tensor, Tensor]:
    """A network trained on scikit-learn's digits, its images and labels."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.from_numpy(data.images.astype(np.float32) / 16)[:, None]
    y = torch.from_numpy(data.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
        nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(8):
        for at in torch.randperm(1200).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[at]), y[at]).backward()
            optimizer.step()
    return model.eval(), x, y


def test_remedies_recover_a_network_made_hard() -> None:
    model, x, y = digits()
    uneven(model[:5])
    test, labels = x[1200:], y[1200:]

    def accuracy(run: Callable[[Tensor], Tensor]) -> float:
        return float((run(test).argmax(1) == labels).double().mean())

    def quantized(remedies: Any) -> float:
        prepared = prepared_for(model, x[:2])
        observe_and_apply(prepared, [[x[:100]], [x[100:200]]], remedies)
        return accuracy(finish(prepared, model))

    with torch.no_grad():
        real = accuracy(model)
    bare = quantized(())
    best = quantized(["cross_layer_equalization", "gptq", "bias_correction"])
    assert real > 0.9 and bare < real - 0.05
    assert best - bare >= 0.9 * (real - bare)
