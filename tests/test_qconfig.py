from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import pytest

import fastq
from fastq import HistogramObserver, PercentileObserver, QConfig


def test_the_default_and_a_choice() -> None:
    assert QConfig() == QConfig("histogram", "max", 8)
    config = QConfig(observer=HistogramObserver, weight_range="mse", weight_bits=4)
    assert dataclasses.replace(config, weight_bits=2).observer is HistogramObserver
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.weight_bits = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "field, value, error, message",
    [
        ("observer", "mean", ValueError, "'mean'; wanted one of minmax"),
        ("observer", None, TypeError, "got None; wanted a name"),
        ("weight_range", "kl", ValueError, "QConfig: weight_range='kl'; wanted 'max' or 'mse'"),
        ("weight_bits", 1, ValueError, "QConfig: weight_bits=1; wanted 2 to 8"),
        ("weight_bits", 9, ValueError, "QConfig: weight_bits=9; wanted 2 to 8"),
        ("weight_bits", 4.0, TypeError, "QConfig: weight_bits=4.0; wanted an int"),
        ("weight_bits", True, TypeError, "QConfig: weight_bits=True; wanted an int"),
    ],
)
def test_what_cannot_be_is_said(
    field: str, value: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        QConfig(**{field: value})


def test_the_observer_of_a_layer_is_that_of_its_output() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(64, 8)

    def output(**kwargs: Any) -> torch.Tensor:
        return fastq.quantize_model(model, x, progress=False, **kwargs)(x)

    clipped = QConfig(observer=partial(PercentileObserver, 80))
    assert not torch.equal(output(), output(config={"0": clipped}))
    assert torch.equal(output(), output(config={"2": clipped}))


@pytest.mark.parametrize("function", ["quantize_model", "quantize_layers"])
@pytest.mark.parametrize(
    ("found", "error", "message"),
    [
        ("x", TypeError, "gave 'x'"),
        (fastq.QParams([1.0], axis=0), ValueError, "gave uint8 QParams with axis=0"),
        (fastq.choose_qparams(-1, 1, "int8"), ValueError, "gave int8 QParams with axis=None"),
    ],
    ids=["text", "axis", "int8"],
)
def test_what_an_observer_gives_is_checked(
    function: str, found: Any, error: type[Exception], message: str
) -> None:
    import torch
    from torch import nn

    class Mine(fastq.MinMaxObserver):
        def qparams(self) -> Any:
            return found

    model, config = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)), {"0": QConfig(Mine)}
    with pytest.raises(error, match=rf"observer: Mine of '0' {message}.*; wanted uint8 QParams"):
        getattr(fastq, function)(model, torch.randn(4, 8), config=config, progress=False)


def test_the_observer_of_a_layer_holds_through_pooling() -> None:
    import torch
    from torch import nn

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(36, 2))
    x = torch.randn(32, 3, 8, 8)

    def output(**kwargs: Any) -> torch.Tensor:
        return fastq.quantize_model(model, x, progress=False, **kwargs)(x)

    clipped = QConfig(observer=partial(PercentileObserver, 80))
    assert not torch.equal(output(), output(config={"0": clipped}))
