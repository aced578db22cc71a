"""Group norm == its definition, the definition is close to torch's, and so are networks with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import noise_ratio, quantized_case
from numpy.testing import assert_array_equal
from rows import check_row, guarded, u8
from torch import nn
from torch.nn import functional as F

import fastq
from fastq import ops, reference
from fastq.kernels.group_norm import PART_PIXELS, group_norm_row
from fastq.regions import Ranges

# shape, groups
SHAPES = [
    ((1, 1), 1), ((2, 7), 7), ((3, 12), 4), ((2, 5, 6), 2), ((1, 33, 70), 7), ((2, 3, 4, 8), 8),
    ((3, 7, 5, 10), 2), ((1, 9, 11, 64), 1), ((1, 17, 16, 96), 32), ((2, 4, 5, 131), 131),
    ((1, 2, 3, 2000), 4), ((1, 1, PART_PIXELS + 5, 3), 3), ((1, 300, 200, 1), 1),
]  # fmt: skip


def rule(rng: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple((rng.normal(size=channels) * 40).astype(np.float32) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_parity(
    kind: str, threads: int, rng: Any, shape: tuple[int, ...], groups: int
) -> None:  # fmt: skip
    columns = rule(rng, shape[-1])
    for x in (u8(rng, *shape), np.full(shape, 255, np.uint8), np.zeros(shape, np.uint8)):
        for epsilon in (1e-20, 3.7):
            rest = (groups, *columns, epsilon)
            want = reference.group_norm(x, *rest, zero_point=120, qmin=3, qmax=250)
            got = ops.group_norm(x, *rest, zero_point=120, qmin=3, qmax=250)
            assert_array_equal(got, want)
        for in_place in (False, True):
            check_row(kind, want, [x], lambda call, x, out, rest=rest: group_norm_row(
                call, x, out, *rest, 120, 3, 250), in_place)  # fmt: skip


@pytest.mark.parametrize("shape, groups", SHAPES, ids=str)
def test_of_int16(threads: int, rng: Any, shape: tuple[int, ...], groups: int) -> None:
    size = int(np.prod(shape))
    alternating = np.where(np.arange(size) % 2, 32767, -32768).reshape(shape)
    for x in (
        rng.integers(-(2**15), 2**15, shape), np.full(shape, -32768), np.full(shape, 32767),
        alternating, rng.integers(-3, 4, shape),
    ):  # fmt: skip
        x = x.astype(np.int16)
        for epsilon in (1e-3, 40.0):
            rest = (groups, *rule(rng, shape[-1]), epsilon)
            want = reference.group_norm(x, *rest, zero_point=100, qmax=250)
            out = guarded(np.zeros_like(want))
            ops.group_norm(guarded(x), *rest, zero_point=100, qmax=250, out=out)
            assert_array_equal(out, want)


def test_five_axes_and_no_images(rng: Any) -> None:
    x = u8(rng, 2, 3, 4, 5, 6)
    for same in (x, x.transpose(0, 3, 1, 2, 4)):
        want = reference.group_norm(same, 3, 30.0, 0.5, 1.0, zero_point=128)
        assert_array_equal(ops.group_norm(same, 3, 30.0, 0.5, 1.0, zero_point=128), want)
    assert ops.group_norm(x[:0], 3, 1.0, 0.0, 1.0).shape == (0, 3, 4, 5, 6)


def test_any_multiplier(rng: Any) -> None:
    """Factors beyond float32 stop before they are infinite: no NaN comes of them."""
    for x in (u8(rng, 2, 9, 12), np.full((2, 9, 12), 7, np.uint8)):
        for multiplier in (0.0, 1e-9, -3e7, 2.0**96):
            for shift in (0.0, -1e9, 2.0**96):
                for epsilon in (1e-70, 1.0):
                    rest = 4, multiplier, shift, epsilon
                    want = reference.group_norm(x, *rest, zero_point=9, qmin=1)
                    assert_array_equal(ops.group_norm(x, *rest, zero_point=9, qmin=1), want)


def test_it_is_torchs(rng: Any) -> None:
    x, zero_point, x_scale, y_scale = u8(rng, 3, 6, 7, 24), 77, 0.03, 0.04
    real = (x.astype(np.float32) - zero_point) * np.float32(x_scale)
    weight, bias = (rng.normal(size=24).astype(np.float32) for _ in range(2))
    images = torch.from_numpy(real).permute(0, 3, 1, 2)
    named = {"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)}
    for groups, torchs in (
        (6, F.group_norm(images, 6, **named)), (24, F.instance_norm(images, **named)),
    ):  # fmt: skip
        want = torchs.permute(0, 2, 3, 1).numpy() / y_scale + 128
        got = reference.group_norm(
            x, groups, weight / y_scale, bias / y_scale, 1e-5 / x_scale**2, zero_point=128
        )
        assert np.abs(got - np.clip(want, 0, 255)).max() < 0.502


X = np.zeros((3, 5, 6), np.uint8)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "dtype": (lambda: ops.group_norm(X + 0.5, 3, 1.0, 0.0, 1.0), TypeError, "uint8 or int16"),
    "axes": (lambda: ops.group_norm(X[0, 0], 3, 1.0, 0.0, 1.0), ValueError, r"\(B, ..., C\)"),
    "none": (lambda: ops.group_norm(X[:, :0], 3, 1.0, 0.0, 1.0), ValueError, "all but B over 0"),
    "groups": (lambda: ops.group_norm(X, 4, 1.0, 0.0, 1.0), ValueError, "a divisor of 6"),
    "no groups": (lambda: ops.group_norm(X, 0, 1.0, 0.0, 1.0), ValueError, "a divisor of 6"),
    "epsilon": (
        lambda: ops.group_norm(X, 3, 1.0, 0.0, 0.0),
        ValueError,
        "wanted a float from 1e-70",
    ),
    "channels": (lambda: ops.group_norm(X, 3, [1.0], 0.0, 1.0), ValueError, "one per channel"),
    "out": (lambda: ops.group_norm(X, 3, 1.0, 0.0, 1.0, out=X), ValueError, "overlaps"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_it_takes_int16(monkeypatch: pytest.MonkeyPatch) -> None:
    """An instance norm makes all channels equally large: those that were small need the bits."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 4, 3)
    ).eval()
    with torch.no_grad():
        model[0].weight *= torch.logspace(-2, 0, 8)[:, None, None, None]
    x = torch.randn(8, 3, 12, 12)
    wanted = model(x).detach()
    int8 = fastq.quantize_model(model, x, progress=False)
    (norm,) = (step for step in int8.program.steps if step.op == "group_norm")
    assert int8.program.dtypes[norm.inputs[0]] == "int16" and norm.arguments["groups"] == 8
    monkeypatch.setattr(Ranges, "_wide", lambda self, regions: set())
    narrow = fastq.quantize_model(model, x, progress=False)
    assert noise_ratio(wanted, int8(x)) > max(30, noise_ratio(wanted, narrow(x)) + 10)


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(2, 3).relu().transpose(2, 3)


@pytest.mark.parametrize("clamps", [[nn.ReLU6()], [nn.Hardtanh(-1, 9), nn.ReLU()], [Turned()]])
@pytest.mark.parametrize("of", ["group", "instance", "layer", "rms"])
def test_an_activation_is_its_clamp(of: str, clamps: list[nn.Module]) -> None:
    """None of the 256 steps is for what ReLU takes away."""
    norms = {
        "group": nn.GroupNorm(2, 8),
        "instance": nn.InstanceNorm2d(8, affine=True),
        "layer": nn.LayerNorm(9),
        "rms": nn.RMSNorm(9),
    }
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norms[of], *clamps, nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(8, 3, 12, 11)
    int8 = fastq.quantize_model(model, x, progress=False)
    (norm,) = (step for step in int8.program.steps if step.op.endswith("norm"))
    assert "table" not in [step.op for step in int8.program.steps]
    assert norm.arguments["zero_point"] == norm.arguments["qmin"] == 0
    assert noise_ratio(model(x).detach(), int8(x)) > 33


def test_known_statistics_are_a_batch_norm() -> None:
    torch.manual_seed(0)
    norm = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), norm, nn.Conv2d(6, 4, 3))
    x = torch.randn(8, 3, 10, 10) * 2
    model(x)
    model.eval()
    int8 = fastq.quantize_model(model, x, progress=False)
    assert [step.op for step in int8.program.steps] == ["quantize", "conv2d", "conv2d"]
    assert noise_ratio(model(x).detach(), int8(x)) > 30


def test_other_sizes_than_the_example() -> None:
    int8 = quantized_case("group norms")
    x = torch.randn(3, 3, 14, 9)
    assert_array_equal(int8(x).numpy(), int8.program.reference(x.numpy())[0])
