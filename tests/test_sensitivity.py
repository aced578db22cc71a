"""Sensitivity of single layers, and the ladder that uses it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastq
from fastq.ladder import climb
from fastq.layerwise import LayerSensitivity, Sensitivity, decibels, sensitivity
from fastq.remedies import DEFAULT, EQUALIZATIONS, REMEDIES


class Network(nn.Module):
    """`bad` has inputs with one large outlier; `unused` matters to nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.good, self.bad, self.last = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        with torch.no_grad():
            self.good.weight[0] *= 1000
            self.bad.weight[:, 0] = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bad(self.good(x)))


def test_decibels_are_hand_worked() -> None:
    assert decibels(torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])) == pytest.approx(20)
    assert decibels(torch.ones(2), torch.ones(2)) == math.inf
    assert decibels(torch.zeros(2), torch.ones(2)) == -math.inf


def test_the_layer_that_suffers_most_is_found() -> None:
    found = sensitivity(Network(), [torch.randn(64, 16)], progress=False)
    assert [row.name for row in found.rows] == ["good", "bad", "last"]
    worst = found.worst()[0]
    assert worst.name == "bad" and worst.kind == "linear"
    assert worst.snr < 20 < found.rows[0].output_snr
    assert worst.output_snr < 20 < found.rows[2].output_snr
    # of the last layer the output is the network's
    assert found.rows[2].snr == pytest.approx(found.rows[2].output_snr)


def test_only_that_layer_is_quantized() -> None:
    """Against the layer's own arithmetic, by hand."""
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.rand(32, 8)
    (row, _) = sensitivity(model, [x], progress=False).rows
    first: nn.Linear = model[0]  # type: ignore[assignment]
    scale = first.weight.abs().amax(1, keepdim=True) / 127
    step = x.max() / 255
    with torch.no_grad():
        weight = (first.weight / scale).round() * scale
        y = nn.functional.linear((x / step).round() * step, weight, first.bias).relu()
        real = first(x).relu()
        assert row.snr == pytest.approx(decibels(real, y), abs=0.5)
        assert row.output_snr == pytest.approx(decibels(model[2](real), model[2](y)), abs=0.5)


def test_it_shows_what_equalization_leaves() -> None:
    """Channels of very different size cost the layer that reads them, until they are equalized."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    factor = torch.logspace(-2, 2, 16)
    with torch.no_grad():
        model[0].weight *= factor[:, None]  # type: ignore[operator]
        model[0].bias *= factor  # type: ignore[operator]
        model[2].weight /= factor  # type: ignore[operator]
    data = [torch.randn(64, 16)]
    before = sensitivity(model, data, progress=False)
    after = sensitivity(model, data, remedies="cross_layer_equalization", progress=False)
    assert before.rows[1].snr < 20 and after.rows[1].snr > 30


def test_it_prints_the_worst_first() -> None:
    rows = (LayerSensitivity("a", "conv2d", 30, 26), LayerSensitivity("b", "linear", 25, 20))
    assert str(Sensitivity(rows)).split("\n") == [
        "layer  kind    SNR at its output  at the network's  share of its noise",
        "b      linear            25.0 dB           20.0 dB                80 %",
        "a      conv2d            30.0 dB           26.0 dB                20 %",
    ]


def test_it_plots_every_layer(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = (
        LayerSensitivity("first", "conv2d", 30.0, 40.0),
        LayerSensitivity("second", "linear", math.inf, math.inf),
    )
    figure = Sensitivity(rows).plot(tmp_path / "plot.png")
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert labels == ["first", "second"]
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def test_a_model_without_a_graph_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x - 1

    with pytest.raises(ValueError, match="sensitivity: the model has no graph"):
        sensitivity(Branches(), [torch.ones(1, 3)], progress=False)


# ---------------------------------------------------------------------------------------- ladder


class Built(nn.Module):
    def __init__(self, remedies: tuple[str, ...], skip: tuple[str, ...]) -> None:
        super().__init__()
        self.remedies, self.skip = remedies, skip


def climbed(
    scores: dict[str, float], max_drop: float, remedies: Any = DEFAULT
) -> tuple[Built, list[str]]:
    """A climb where each of these remedies and float layers adds to a score of 80; float: 90."""
    lines: list[str] = []

    def evaluate(model: nn.Module) -> float:
        if not isinstance(model, Built):
            return 90.0
        return 80 + sum(scores.get(name, 0.0) for name in (*model.remedies, *model.skip))

    data = [torch.randn(64, 16)]
    result = climb(Network(), data, evaluate, max_drop, Built, remedies=remedies, echo=lines.append)
    assert isinstance(result, Built)
    return result, lines


EVEN = ("activation_equalization", "input_equalization")  # of the defaults


def test_the_ladder_stops_at_the_first_rung_within_the_budget() -> None:
    result, lines = climbed({"bias_correction": 9.6}, 0.5)
    assert result.remedies == DEFAULT and result.skip == ()
    assert lines == [
        "float32: 90; wanted: at least 89.5",
        f"{' + '.join(DEFAULT)}: 89.6 (-0.4): enough",
    ]


def test_a_rung_that_gains_nothing_is_left_out() -> None:
    result, lines = climbed(
        {"bias_correction": 5, "cross_layer_equalization": -1, "gptq": 4.8}, 0.5
    )
    assert result.remedies == (*EVEN, "gptq", "bias_correction")
    assert lines[2].endswith("bias_correction: 84 (-6), no gain: left out")
    with_gptq = " + ".join(result.remedies)
    assert lines[3] == f"{with_gptq}: 89.8 (-0.2), gains 4.8: enough"


def test_adaround_takes_the_place_of_gptq() -> None:
    result, lines = climbed({"bias_correction": 5, "gptq": 1, "adaround": 4.8}, 0.5)
    assert result.remedies == (*EVEN, "adaround", "bias_correction")
    assert lines[-1] == f"{' + '.join(result.remedies)}: 89.8 (-0.2), gains 3.8: enough"


def test_the_most_sensitive_layers_become_float_at_last() -> None:
    result, lines = climbed({"bias_correction": 5, "bad": 4.9}, 0.5)
    assert result.skip == ("bad",)
    assert lines[-1] == (f"{' + '.join(DEFAULT)}, float: bad: 89.9 (-0.1), gains 4.9: enough")


def test_the_most_sensitive_layers_are_those_of_the_equalized_network(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[set[str]] = []

    def watched(*args: object, remedies: set[str], **kwargs: object) -> Sensitivity:
        asked.append(remedies)
        return Sensitivity((LayerSensitivity("bad", "linear", 0.0, 0.0),) * 2)

    monkeypatch.setattr("fastq.ladder.sensitivity", watched)
    with pytest.warns(UserWarning, match="nothing was within"):
        climbed({"cross_layer_equalization": 1, "gptq": 1}, 0.5)
    assert asked == [set(EQUALIZATIONS)]


def test_out_of_reach_is_said_and_the_best_is_returned() -> None:
    with pytest.warns(
        UserWarning, match=r"nothing was within 0.5 of float32's 90; the best, activation"
    ):
        result, _ = climbed({"gptq": 3.0}, 0.5)
    assert "gptq" in result.remedies and set(result.remedies) <= set(REMEDIES)


def test_a_score_that_is_nan_is_the_worst() -> None:
    scores = iter([0.0, math.nan, -0.5])
    made = climb(Network(), [], lambda m: next(scores), 0.5, Built, echo=lambda line: None)
    assert made.remedies != DEFAULT


@pytest.mark.parametrize(
    ("evaluate", "max_drop", "error", "message"),
    [
        (5, 1, TypeError, "evaluate: got 5, wanted a function that scores a model"),
        (lambda m: None, 1, TypeError, "evaluate gave None; wanted one number"),
        (lambda m: "x", 1, TypeError, "evaluate gave 'x'; wanted one number"),
        (lambda m: torch.ones(2), 1, TypeError, "evaluate gave tensor.*; wanted one number"),
        (lambda m: math.nan, 1, ValueError, "evaluate gave nan for the float model"),
        (lambda m: 1.0, "1", TypeError, "max_drop='1'; wanted at least 0"),
    ],
)
def test_a_score_is_one_number(evaluate: Any, max_drop: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        climb(Network(), [], evaluate, max_drop, Built)


def test_the_ladder_refuses_what_it_cannot_search_with() -> None:
    with pytest.raises(ValueError, match="max_drop=-1; wanted at least 0"):
        climb(Network(), [], lambda m: 0.0, -1, Built)
    with pytest.raises(ValueError, match="can be read once only"):
        climb(Network(), iter([torch.randn(1, 16)]), lambda m: 0.0, 1, Built)


def test_the_first_rung_is_the_callers() -> None:
    result, lines = climbed({"gptq": 9.9}, 0.5, remedies="bias_correction")
    assert lines[1].startswith("bias_correction: 80")
    assert result.remedies == ("gptq", "bias_correction")


class Branching(nn.Module):
    """torch.export cannot follow it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else x


@pytest.mark.filterwarnings("ignore:quantize_model.*not one network")
def test_a_search_over_a_model_without_a_graph() -> None:
    x = torch.rand(16, 8)
    given = {"evaluate": lambda m: float(isinstance(m.a, nn.Linear)), "max_drop": 0.5}
    with pytest.warns(UserWarning, match="nothing was within 0.5"):
        made = fastq.quantize_model(Branching(), x, progress=False, **given)
    assert type(made) is Branching


def test_a_search_takes_what_else_is_asked() -> None:
    given = {"evaluate": lambda m: 1.0, "max_drop": 0.5}
    with pytest.raises(TypeError, match="evaluate= wants calibration_data"):
        fastq.quantize_model(Network(), **given)
    with pytest.raises(ValueError, match="strict=True, and layers stay float"):
        model = nn.Sequential(Branching(), nn.BatchNorm1d(8))
        fastq.quantize_model(model, torch.rand(16, 8), strict=True, progress=False, **given)
