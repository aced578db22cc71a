"""Pooling and upsampling == their definition, and the definition == torch's."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import check_row, u8

from fastq import ops, reference
from fastq.kernels import windows

U8 = np.uint8

# (B, H, W, C), kernel, stride, padding, dilation, ceil_mode
POOLS: dict[str, tuple[Any, ...]] = {
    "2x2": ((2, 8, 8, 64), 2, 2, 0, 1, False),
    "2x2_odd": ((1, 7, 9, 19), 2, 2, 0, 1, True),
    "3x3_stride_2": ((2, 9, 11, 70), 3, 2, 1, 1, False),
    "3x3_stride_2_ceil": ((1, 8, 8, 129), 3, 2, 0, 1, True),
    "3x3_stride_1": ((1, 5, 6, 40), 3, 1, 1, 1, False),
    "5x5": ((1, 6, 7, 33), 5, 1, 2, 1, False),
    "not_square": ((1, 6, 9, 8), (2, 3), (1, 2), (1, 0), 1, False),
    "wide": ((1, 2, 300, 3), (1, 280), (1, 7), 0, 1, False),
    "dilated": ((1, 12, 11, 16), 3, 2, 1, (2, 3), False),
    "one_pixel": ((3, 1, 1, 1), 1, 1, 0, 1, False),
    "ceil_beyond_the_padding": ((1, 6, 6, 4), 2, 3, 1, 1, True),
}


def pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value


@pytest.mark.parametrize("case", POOLS)
def test_max_pool2d(kind: str, threads: int, rng: Any, case: str) -> None:
    shape, *parameters, ceil_mode = POOLS[case]
    x = u8(rng, *shape)
    want = reference.max_pool2d(x, *parameters, ceil_mode)
    assert_array_equal(ops.max_pool2d(x, *parameters, ceil_mode), want)
    check_row(kind, want, [x], lambda call, x, out: windows.max_pool2d_row(
        call, x, out, *map(pair, parameters), ceil_mode))  # fmt: skip


@pytest.mark.parametrize("case", [case for case in POOLS if case != "dilated"])
def test_avg_pool2d(kind: str, threads: int, rng: Any, case: str) -> None:
    shape, *parameters, _, ceil_mode = POOLS[case]
    x = u8(rng, *shape)
    rule = {"multiplier": 0.9, "x_zero_point": 77, "zero_point": 60, "qmin": 2, "qmax": 250}
    sizes = tuple(map(pair, parameters))
    for counting in ((True, None), (False, None), (True, 7)):
        want = reference.avg_pool2d(x, *parameters, ceil_mode, *counting, **rule)
        assert_array_equal(ops.avg_pool2d(x, *parameters, ceil_mode, *counting, **rule), want)
        rest = (*sizes, ceil_mode, *counting, *rule.values())
        row = functools.partial(call_with, windows.avg_pool2d_row, rest)
        check_row(kind, want, [x], row)


def call_with(row: Any, rest: Any, call: Any, x: Any, out: Any) -> None:
    row(call, x, out, *rest)


ADAPTIVE = [
    ((2, 7, 7, 200), 1), ((1, 20, 21, 64), 1), ((1, 7, 5, 33), (3, 2)), ((1, 3, 2, 17), (7, 5)),
    ((1, 6, 6, 16), 6), ((1, 300, 2, 5), 1), ((1, 1, 400, 70), (1, 1)), ((9, 1, 1, 9), 1),
]  # fmt: skip


@pytest.mark.parametrize("shape, size", ADAPTIVE, ids=str)
def test_adaptive_pooling(
    kind: str, threads: int, rng: Any, shape: tuple[int, ...], size: Any
) -> None:
    rule = {"multiplier": 1.7, "x_zero_point": 100, "zero_point": 30, "qmin": 2, "qmax": 250}
    for x in (u8(rng, *shape), np.full(shape, 255, U8)):
        want = reference.adaptive_avg_pool2d(x, size, **rule)
        assert_array_equal(ops.adaptive_avg_pool2d(x, size, **rule), want)
        check_row(kind, want, [x], lambda call, x, out: windows.adaptive_avg_pool2d_row(
            call, x, out, *rule.values()))  # fmt: skip
        want = reference.adaptive_max_pool2d(x, size)
        assert_array_equal(ops.adaptive_max_pool2d(x, size), want)
        check_row(kind, want, [x], windows.adaptive_max_pool2d_row)


SIZES = [
    ((2, 4, 5, 64), (8, 10)), ((1, 5, 7, 3), (9, 4)), ((1, 1, 1, 40), (3, 2)),
    ((1, 6, 6, 9), (6, 6)), ((1, 9, 9, 33), (1, 1)), ((1, 3, 4, 70), (10, 11)),
]  # fmt: skip


@pytest.mark.parametrize("shape, size", SIZES, ids=str)
def test_upsampling(
    kind: str, threads: int, rng: Any, shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    x = u8(rng, *shape)
    for factor in (None, (size[0] / shape[1] + 0.1, size[1] / shape[2] + 0.1)):
        want = reference.upsample_nearest2d(x, size, factor)
        assert_array_equal(ops.upsample_nearest2d(x, size, factor), want)
        check_row(kind, want, [x], lambda call, x, out, factor=factor:
                  windows.upsample_nearest2d_row(call, x, out, factor))  # fmt: skip
        for align_corners in (False, True):
            rule = align_corners, factor
            want = reference.upsample_bilinear2d(x, size, *rule)
            assert_array_equal(ops.upsample_bilinear2d(x, size, *rule), want)
            check_row(kind, want, [x], lambda call, x, out, rule=rule:
                      windows.upsample_bilinear2d_row(call, x, out, *rule))  # fmt: skip


def test_any_multiplier(rng: Any) -> None:
    x = u8(rng, 1, 6, 6, 20)
    for multiplier in (0.0, 1e-9, -3e7, 2.0**96):
        rule = {"multiplier": multiplier, "x_zero_point": 128, "zero_point": 9}
        want = reference.avg_pool2d(x, 3, **rule)
        assert_array_equal(ops.avg_pool2d(x, 3, **rule), want)


def nchw(x: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(x.transpose(0, 3, 1, 2).astype(np.float32))


def nhwc(x: Any) -> np.ndarray:
    return x.numpy().transpose(0, 2, 3, 1)


@pytest.mark.parametrize("case", POOLS)
def test_pooling_is_that_of_torch(rng: Any, case: str) -> None:
    from torch.nn import functional as F

    shape, kernel, stride, padding, dilation, ceil_mode = POOLS[case]
    x = u8(rng, *shape)
    want = nhwc(F.max_pool2d(nchw(x), kernel, stride, padding, dilation, ceil_mode))
    got = reference.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
    assert_array_equal(got, want)
    if dilation != 1:
        return
    for counting in ((True, None), (False, None), (True, 5)):
        want = nhwc(F.avg_pool2d(nchw(x), kernel, stride, padding, ceil_mode, *counting))
        got = reference.avg_pool2d(x, kernel, stride, padding, ceil_mode, *counting)
        assert np.abs(got - np.clip(want, 0, 255)).max() < 0.5001


@pytest.mark.parametrize("shape, size", ADAPTIVE, ids=str)
def test_adaptive_pooling_is_that_of_torch(rng: Any, shape: tuple[int, ...], size: Any) -> None:
    from torch.nn import functional as F

    x = u8(rng, *shape)
    want = nhwc(F.adaptive_max_pool2d(nchw(x), size))
    assert_array_equal(reference.adaptive_max_pool2d(x, size), want)
    want = nhwc(F.adaptive_avg_pool2d(nchw(x), size))
    assert np.abs(reference.adaptive_avg_pool2d(x, size) - want).max() < 0.5001


@pytest.mark.parametrize("shape, size", SIZES, ids=str)
def test_upsampling_is_that_of_torch(
    rng: Any, shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    import torch

    x = u8(rng, *shape)
    for factor in (None, (size[0] / shape[1] + 0.01, size[1] / shape[2] + 0.01)):
        scales = factor or (None, None)
        want = torch.ops.aten.upsample_nearest2d(nchw(x), size, *scales)
        assert_array_equal(reference.upsample_nearest2d(x, size, factor), nhwc(want))
        for align_corners in (False, True):
            want = torch.ops.aten.upsample_bilinear2d(nchw(x), size, align_corners, *scales)
            got = reference.upsample_bilinear2d(x, size, align_corners, factor)
            assert np.abs(got - nhwc(want)).max() < 0.501


X = np.zeros((1, 5, 5, 3), U8)
BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "axes": (lambda: ops.max_pool2d(X[0], 2), ValueError, r"wanted \(B, H, W, C\)"),
    "dtype": (lambda: ops.avg_pool2d(X.astype(np.float32), 2), TypeError, "wanted uint8"),
    "kernel": (lambda: ops.max_pool2d(X, 0), ValueError, "at least 1"),
    "three": (lambda: ops.max_pool2d(X, (1, 2, 3)), ValueError, "an int or two"),
    "padding": (lambda: ops.avg_pool2d(X, 2, padding=2), ValueError, "up to half"),
    "too_large": (lambda: ops.max_pool2d(X, 6), ValueError, "smaller than the window"),
    "misses": (
        lambda: ops.max_pool2d(X[:, :2], 2, 1, 1, 3),
        ValueError,
        "a window misses x",
    ),
    "divisor": (
        lambda: ops.avg_pool2d(X, 2, divisor_override=0),
        ValueError,
        "wanted an int from 1",
    ),
    "size": (lambda: ops.adaptive_avg_pool2d(X, 0), ValueError, "at least 1"),
    "divisor_float": (lambda: ops.avg_pool2d(X, 2, divisor_override=2.5), ValueError, "an int"),
    "window": (lambda: ops.max_pool2d(X, 2.5), ValueError, "kernel_size: got 2.5, wanted an int"),
    "stride": (lambda: ops.max_pool2d(X, 2, 2**64), ValueError, "stride: got .*, at most 1048576"),
    "factor": (
        lambda: ops.upsample_nearest2d(X, 9, (0.0, 1.0)),
        ValueError,
        "wanted a tuple of 2, each a float",
    ),
    # its inverse is infinite in float32: such positions were once read
    "tiny_factor": (
        lambda: ops.upsample_nearest2d(X, 9, (1e-39, 1e-39)),
        ValueError,
        "from 5.42e-20 to 1.84e",
    ),
    "tiny_factor_too": (
        lambda: ops.upsample_bilinear2d(X, 9, scale_factor=(1e-39, 1e-39)),
        ValueError,
        "from 5.42e-20 to 1.84e",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_no_images_and_no_channels() -> None:
    for shape in ((0, 4, 4, 3), (2, 4, 4, 0)):
        x = np.zeros(shape, U8)
        for got in (
            ops.max_pool2d(x, 2), ops.avg_pool2d(x, 2),
            ops.adaptive_avg_pool2d(x, 2), ops.upsample_nearest2d(x, 2),
        ):  # fmt: skip
            assert got.shape == (shape[0], 2, 2, shape[3])
