"""Global response norm == its definition, which is ConvNeXt V2's; and so are networks with it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from networks import ResponseNorm, Responses, noise_ratio, quantized_case
from numpy.testing import assert_array_equal
from rows import check_row, guarded, u8
from test_group_norm import SHAPES
from torch import nn

import fastq
from fastq import ops, reference
from fastq.kernels.group_norm import global_response_norm_row


def rule(rng: Any, channels: int) -> tuple[np.ndarray, np.ndarray]:
    return tuple((rng.normal(size=channels) * n).astype(np.float32) for n in (0.7, 40))  # type: ignore[return-value]


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=str)
def test_parity(kind: str, threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    columns = rule(rng, shape[-1])
    for x in (u8(rng, *shape), np.full(shape, 255, np.uint8), np.full(shape, 77, np.uint8)):
        for epsilon, residual, zero in ((1e-20, 0.0, 0), (3.7, 0.9, 77), (0.01, -0.3, 255)):
            rest = (*columns, epsilon)
            named = {"residual": residual, "x_zero_point": zero}
            to = {"zero_point": 120, "qmin": 3, "qmax": 250}
            want = reference.global_response_norm(x, *rest, **named, **to)
            assert_array_equal(ops.global_response_norm(x, *rest, **named, **to), want)
        for in_place in (False, True):
            check_row(kind, want, [x], lambda call, x, out, rest=rest: global_response_norm_row(
                call, x, out, *rest, -0.3, 255, 120, 3, 250), in_place)  # fmt: skip


@pytest.mark.parametrize("shape", [shape for shape, _ in SHAPES], ids=str)
def test_of_int16(threads: int, rng: Any, shape: tuple[int, ...]) -> None:
    size = int(np.prod(shape))
    alternating = np.where(np.arange(size) % 2, 32767, -32768).reshape(shape)
    for x in (
        rng.integers(-(2**15), 2**15, shape), np.full(shape, -32768), np.full(shape, 32767),
        alternating, rng.integers(-3, 4, shape),
    ):  # fmt: skip
        x = x.astype(np.int16)
        weight, shift = rule(rng, shape[-1])
        for epsilon in (1e-3, 40.0):
            rest = (weight / 256, shift, epsilon)
            want = reference.global_response_norm(x, *rest, residual=0.004, zero_point=100)
            out = guarded(np.zeros_like(want))
            ops.global_response_norm(guarded(x), *rest, residual=0.004, zero_point=100, out=out)
            assert_array_equal(out, want)


def test_five_axes_and_no_images(rng: Any) -> None:
    x = u8(rng, 2, 3, 4, 5, 6)
    for same in (x, x.transpose(0, 3, 1, 2, 4)):
        want = reference.global_response_norm(same, 0.4, 0.5, 1.0, residual=0.5, zero_point=8)
        got = ops.global_response_norm(same, 0.4, 0.5, 1.0, residual=0.5, zero_point=8)
        assert_array_equal(got, want)
    assert ops.global_response_norm(x[:0], 1.0, 0.0, 1.0).shape == (0, 3, 4, 5, 6)


def test_any_multiplier(rng: Any) -> None:
    """Factors beyond float32 stop before they are infinite: no NaN comes of them."""
    for x in (u8(rng, 2, 9, 12), np.full((2, 9, 12), 7, np.uint8)):
        for multiplier in (0.0, 1e-9, -3e7, 2.0**96):
            for shift in (0.0, -1e9, 2.0**96):
                for epsilon in (1e-70, 1.0):
                    for residual in (-(2.0**96), 1e-30):
                        rest = multiplier, shift, epsilon
                        named = {"residual": residual, "x_zero_point": 7, "qmin": 1}
                        want = reference.global_response_norm(x, *rest, **named)
                        assert_array_equal(ops.global_response_norm(x, *rest, **named), want)


@pytest.mark.parametrize("fused", [False, True])
def test_it_is_that_of_networks(rng: Any, fused: bool) -> None:
    x, zero_point, x_scale, y_scale = u8(rng, 3, 6, 7, 24), 77, 0.03, 0.12
    real = (x.astype(np.float32) - zero_point) * np.float32(x_scale)
    torch.manual_seed(0)
    norm = ResponseNorm(24, -1, fused=fused)
    weight, bias = (p.detach().numpy().flatten() for p in (norm.gamma, norm.beta))
    want = norm(torch.from_numpy(real)).detach().numpy() / y_scale + 128
    step = x_scale / y_scale
    got = reference.global_response_norm(
        x, weight * step, bias / y_scale, 1e-6 / x_scale, residual=step, x_zero_point=zero_point,
        zero_point=128,
    )  # fmt: skip
    want = np.clip(want, 0, 255)
    assert np.abs(got - want).max() < 0.502


X = np.zeros((3, 5, 6), np.uint8)
BAD_CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "dtype": ((X + 0.5, 1.0, 0.0, 1.0), {}, TypeError, "uint8 or int16"),
    "axes": ((X[0, 0], 1.0, 0.0, 1.0), {}, ValueError, r"\(B, ..., C\)"),
    "none": ((X[:, :0], 1.0, 0.0, 1.0), {}, ValueError, "all but B over 0"),
    "epsilon": ((X, 1.0, 0.0, 0.0), {}, ValueError, "wanted a float from 1e-70"),
    "channels": ((X, [1.0], 0.0, 1.0), {}, ValueError, "one per channel"),
    "residual": ((X, 1.0, 0.0, 1.0), {"residual": np.inf}, ValueError, "residual=.*wanted"),
    "text": ((X, 1.0, 0.0, 1.0), {"residual": "1"}, ValueError, "residual=.*wanted"),
    "zero": ((X, 1.0, 0.0, 1.0), {"x_zero_point": 256}, ValueError, "x_zero_point"),
    "out": ((X, 1.0, 0.0, 1.0), {"out": X}, ValueError, "overlaps"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    given, named, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        ops.global_response_norm(*given, **named)


def test_weight_bias_and_sum_are_one_operation() -> None:
    steps = [step.op for step in quantized_case("response norms").program.steps]
    assert steps.count("global_response_norm") == 3
    assert steps.count("add") == 1 and not {"mul", "affine"} & {*steps}  # that of `Responses`
    found = [step.arguments["residual"] for step in quantized_case("response norms").program.steps
             if step.op == "global_response_norm"]  # fmt: skip
    assert found[0] > 0 and found[1] > 0 and found[2] == 0


@pytest.mark.parametrize("norm", [ResponseNorm(8), ResponseNorm(8, fused=True), Responses()])
def test_it_is_close_to_float(norm: nn.Module) -> None:
    torch.manual_seed(0)
    after = 16 if isinstance(norm, Responses) else 8
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), norm, nn.Conv2d(after, 4, 3)).eval()
    x = torch.randn(8, 3, 14, 12)
    int8 = fastq.quantize_model(model, x, progress=False)
    assert len(int8.program.steps) > 3  # one program, nothing in float
    for other in (x, torch.randn(3, 3, 9, 17)):
        assert noise_ratio(model(other).detach(), int8(other)) > 27
