"""ops == reference, bit for bit: every shape, tail, epilogue, instruction set and thread count."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import re
import signal
import sys
from itertools import product
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from rows import guarded

import fastq
from fastq import ops, reference
from fastq.kernels import call, convolution, gemm, layers, products
from fastq.kernels.convolution import pack_conv2d
from fastq.kernels.tiles import GROUPS, group_tiles
from fastq.ops import elementwise
from fastq.qparams import MAX_K, Dequant, Epilogue, QParams, Requant, choose_qparams
from fastq.weights import Conv2dWeight, LinearWeight

NAMES = [n for n in ops.__all__ if hasattr(reference, n)]


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    """Same dtype, shape and values (NaN equals NaN); a failure names rows and columns."""
    assert got.dtype == want.dtype
    if not np.array_equal(got, want, equal_nan=got.dtype.kind == "f"):
        where = np.argwhere(got != want)
        rows, columns = where[:, :-1], where[:, -1]
        pytest.fail(
            f"{len(where)} of {got.size} differ; first {where[:3].tolist()}; "
            f"rows modulo 6: {sorted(set((rows[:, -1] % 6).tolist())) if rows.size else []}, "
            f"columns modulo 8: {sorted(set((columns % 8).tolist()))}"
        )


def u8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Full-range uint8, the ends more often than by chance."""
    return rng.choice(np.r_[0, 255, np.arange(256)].astype(np.uint8), shape)


def s8(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Full-range int8 with -128, the ends more often than by chance."""
    return rng.choice(np.r_[-128, 127, np.arange(-128, 128)].astype(np.int8), shape)


def epilogues(rng: np.random.Generator, n: int) -> dict[str, Epilogue]:
    multiplier = (rng.random(n) * 1e-3 + 1e-5).astype(np.float32)
    return {
        "s32": None,
        "u8": Requant(multiplier, 3, rng.integers(-9999, 9999, n).astype(np.int32), 3, 250),
        "u8_plain": Requant(multiplier, 255),
        "f32": Dequant(multiplier, 0.3, rng.normal(size=n).astype(np.float32), 0.0, 6.0),
        "f32_plain": Dequant(multiplier, 0.3),
    }


EPILOGUES = ["s32", "u8", "u8_plain", "f32", "f32_plain"]

# Around the tiles: 1, MR, NR, 4 and their multiples, give or take 1
LINEAR_SHAPES = [
    (1, 1, 1), (1, 3, 2), (2, 5, 3), (1, 8, 4), (3, 7, 5), (5, 9, 6), (6, 8, 7), (7, 16, 8),
    (1, 64, 9), (11, 15, 17), (12, 17, 16), (13, 63, 31), (6, 64, 64), (7, 65, 63), (2, 129, 33),
    (25, 31, 130), (1, 768, 100), (4, 2, 1001), (61, 1, 12), (3, 200, 257), (130, 24, 36),
]  # fmt: skip


def test_reference_and_ops_have_the_same_functions() -> None:
    public = {
        name
        for name, f in vars(reference).items()
        if inspect.isfunction(f) and f.__module__ == "fastq.reference" and name[0] != "_"
    }
    assert public == set(NAMES)
    for name in NAMES:
        of_ops = inspect.signature(getattr(ops, name)).parameters
        of_reference = inspect.signature(getattr(reference, name)).parameters
        assert [(p.name, p.kind, p.default) for p in of_ops.values()] == [
            (p.name, p.kind, p.default) for p in of_reference.values()
        ], name


@pytest.mark.parametrize("epilogue", EPILOGUES)
@pytest.mark.parametrize("m, n, k", LINEAR_SHAPES)
def test_linear(isa: str, rng: Any, m: int, n: int, k: int, epilogue: str) -> None:
    x, weight = u8(rng, m, k), LinearWeight(s8(rng, n, k))
    last = epilogues(rng, n)[epilogue]
    for zero_point in (0, 255, 77):
        want = reference.linear(x, weight, last, x_zero_point=zero_point)
        assert_same(ops.linear(x, weight, last, x_zero_point=zero_point), want)


@pytest.mark.parametrize("m, n, k", LINEAR_SHAPES[::3])
def test_linear_with_a_zero_point_and_a_scale_per_row(
    isa: str, rng: Any, m: int, n: int, k: int
) -> None:
    x, weight = u8(rng, m, k), LinearWeight(s8(rng, n, k))
    zero_point = rng.integers(0, 256, m)
    scale = (rng.random(m) + 0.1).astype(np.float32)
    for last in (None, Dequant(0.01, scale, np.ones(n, np.float32))):
        want = reference.linear(x, weight, last, x_zero_point=zero_point)
        assert_same(ops.linear(x, weight, last, x_zero_point=zero_point), want)


@pytest.mark.parametrize("m, n, k", LINEAR_SHAPES)
def test_linear_float(isa: str, rng: Any, m: int, n: int, k: int) -> None:
    x = rng.normal(size=(m, k)).astype(np.float32) * rng.choice([1e-3, 1, 1e3], (m, 1))
    x = x.astype(np.float32)
    weight = LinearWeight(s8(rng, n, k))
    last = epilogues(rng, n)["f32"]
    assert isinstance(last, Dequant)
    for q in (None, choose_qparams(-2.0, 2.5), QParams(np.float32(1e-4), np.int32(255))):
        want = reference.linear_float(x, weight, last, x_qparams=q)
        assert_same(ops.linear_float(x, weight, last, x_qparams=q), want)


@pytest.mark.parametrize("given", [True, False], ids=["static", "dynamic"])
def test_linear_float_of_any_range(isa: str, rng: Any, given: bool) -> None:
    """Rows of subnormal and of huge values, each with an infinity."""
    weight, last = LinearWeight(np.eye(40, dtype=np.int8)), Dequant(np.float32(1))
    random = np.ldexp(rng.uniform(1, 2, 20), rng.integers(-149, 118, 20))
    for scale in np.float32([1e-45, 1.2e-38, 2.0**-60, 2.0**60, 1.3e36, *random]):
        x = (rng.integers(-300, 300, (3, 40)) / 2 * np.float64(scale)).astype(np.float32)
        x[:, 7] = np.inf
        q = QParams(max(scale, np.float32(1.2e-38)), np.int32(100)) if given else None
        want = reference.linear_float(x, weight, last, x_qparams=q)
        assert_same(ops.linear_float(x, weight, last, x_qparams=q), want)


# (h, w, c, n, kh, kw, stride, padding, dilation, groups)
CONV_SHAPES: dict[str, tuple[Any, ...]] = {
    "one_pixel": (1, 1, 1, 1, 1, 1, 1, 0, 1, 1),
    "pointwise": (6, 7, 32, 65, 1, 1, 1, 0, 1, 1),
    "pointwise_1_channel": (4, 5, 1, 9, 1, 1, 1, 0, 1, 1),
    "pointwise_3_channels": (4, 5, 3, 9, 1, 1, 1, 0, 1, 1),
    "pointwise_stride_2": (7, 7, 16, 24, 1, 1, 2, 0, 1, 1),
    "3x3_first_layer": (9, 9, 3, 16, 3, 3, 2, 1, 1, 1),
    "7x7_first_layer": (15, 15, 3, 8, 7, 7, 2, 3, 1, 1),
    "3x3": (7, 7, 16, 24, 3, 3, 1, 1, 1, 1),
    "3x3_odd_channels": (5, 6, 5, 7, 3, 3, 1, 1, 1, 1),
    "3x3_no_padding": (3, 3, 4, 4, 3, 3, 1, 0, 1, 1),
    "stride_on_odd_size": (8, 11, 6, 5, 3, 3, (2, 3), 1, 1, 1),
    "asymmetric_padding": (6, 5, 4, 8, 2, 3, 1, ((1, 0), (0, 2)), 1, 1),
    "same_even_kernel": (6, 5, 4, 8, 4, 2, 1, "same", 1, 1),
    "dilation": (11, 11, 8, 8, 3, 3, 1, 2, 2, 1),
    "dilation_columns_only": (9, 11, 3, 8, 3, 3, 1, 1, (1, 2), 1),
    "wide_kernel": (3, 20, 2, 4, 1, 9, 1, (0, 4), 1, 1),
    "tall_kernel": (20, 3, 1, 4, 9, 1, 1, (4, 0), 1, 1),
    "padding_beyond_the_input": (2, 2, 4, 4, 3, 3, 1, 4, 1, 1),
    "groups_2": (6, 6, 16, 10, 3, 3, 1, 1, 1, 2),
    "groups_of_1_channel": (6, 6, 3, 6, 3, 3, 1, 1, 1, 3),
    "groups_32": (5, 5, 128, 128, 3, 3, 1, 1, 1, 32),
    "groups_of_odd_channels": (5, 5, 15, 25, 3, 3, 2, 1, 1, 5),
    "groups_dilated": (9, 9, 24, 12, 3, 3, 1, 2, 2, 3),
    # columns read their own group's channels: 4 or 8 of them, 2 merged, beyond a panel's end
    "groups_of_8": (6, 5, 104, 104, 3, 3, 1, 1, 1, 13),
    "groups_of_8_dilated": (9, 9, 16, 16, 3, 3, 1, 2, 2, 2),
    "groups_of_4_pointwise": (4, 5, 20, 20, 1, 1, 1, 0, 1, 5),
    "groups_of_4_stride_2": (7, 9, 68, 68, 5, 3, (2, 1), 1, 1, 17),
    "groups_of_2": (5, 5, 24, 24, 3, 3, 2, 1, 1, 12),
    "depthwise_3x3": (9, 9, 24, 24, 3, 3, 1, 1, 1, 24),
    "depthwise_stride_2": (9, 10, 16, 16, 3, 3, 2, 1, 1, 16),
    "depthwise_5x5": (8, 8, 40, 40, 5, 5, 1, 2, 1, 40),
    "depthwise_7x7": (9, 9, 64, 64, 7, 7, 1, 3, 1, 64),
    "depthwise_non_square": (9, 9, 65, 65, 1, 3, 1, (0, 1), 1, 65),
    "depthwise_dilated": (9, 9, 17, 17, 3, 3, 1, 2, 2, 17),
    "depthwise_whole_panels": (5, 5, 64, 64, 3, 3, 1, 0, 1, 64),
    "depthwise_2_channels": (5, 5, 2, 2, 3, 3, 1, 1, 1, 2),
    "depthwise_multiplier_2": (7, 7, 12, 24, 3, 3, 1, 1, 1, 12),
    # several pixels are one: 8 of 8 channels, 4 of 16, 8 of 24, 2 of 32, 8 of 72
    "depthwise_fold_8": (3, 21, 8, 8, 3, 3, 1, 1, 1, 8),
    "depthwise_fold_16": (6, 13, 16, 16, 5, 5, 1, 2, 1, 16),
    "depthwise_fold_24": (5, 9, 24, 24, 3, 3, 1, (1, 1), (1, 2), 24),
    "depthwise_fold_32": (7, 5, 32, 32, 3, 3, (2, 1), 1, 1, 32),
    "depthwise_fold_72": (4, 11, 72, 72, 2, 2, 1, 0, 1, 72),
    "depthwise_fold_one_line": (3, 12, 16, 16, 3, 3, 1, (0, 1), 1, 16),
    "depthwise_one_line": (1, 11, 16, 16, 1, 5, 1, (0, 2), 1, 16),
    "depthwise_one_output": (5, 5, 32, 32, 5, 5, 1, 0, 1, 32),
    "depthwise_one_column": (9, 3, 16, 16, 3, 3, 1, (1, 0), 1, 16),
    "winograd": (28, 28, 64, 64, 3, 3, 1, 1, 1, 1),
}


def conv_weight(rng: np.random.Generator, shape: str) -> tuple[Conv2dWeight, int, int, int]:
    h, w, c, n, kh, kw, stride, padding, dilation, groups = CONV_SHAPES[shape]
    data = s8(rng, n, c // groups, kh, kw)
    return Conv2dWeight(data, stride, padding, dilation, groups), h, w, c


@pytest.mark.parametrize("epilogue", ["s32", "u8", "f32"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_conv2d(isa: str, rng: Any, shape: str, batch: int, epilogue: str) -> None:
    weight, h, w, c = conv_weight(rng, shape)
    x, last = u8(rng, batch, h, w, c), epilogues(rng, weight.n)[epilogue]
    for zero_point in (0, 201):
        want = reference.conv2d(x, weight, last, x_zero_point=zero_point)
        assert_same(ops.conv2d(x, weight, last, x_zero_point=zero_point), want)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16])
@pytest.mark.parametrize("shape", ["pointwise", "3x3", "groups_2", "depthwise_fold_24", "winograd"])
def test_values_beyond_int32_saturate(isa: str, rng: Any, shape: str, dtype: Any) -> None:
    """What is rounded may go up to 2**96 * 2**31; below 2**30 the kernel is another one."""
    weight, h, w, c = conv_weight(rng, shape)
    x, zero_point = u8(rng, 2, h, w, c), 7 if dtype == np.uint8 else 0
    reach = 255.0 * np.abs(weight.data.astype(int)).sum(axis=(1, 2, 3)).max()
    largest = []
    for multiplier in (1e-3, 2.0**29 / reach, 2.0**31 / reach, 2.0**40, 2.0**96):
        for factor in (None, -0.7, 2.0**60):
            last = Requant(np.full(weight.n, multiplier, np.float32), zero_point, dtype=dtype,
                           add_multiplier=factor)  # fmt: skip
            added = {}
            if factor is not None:
                added["add"] = u8(rng, *ops.conv2d(x, weight).shape)
            want = reference.conv2d(x, weight, last, x_zero_point=128, **added)
            assert_same(ops.conv2d(x, weight, last, x_zero_point=128, **added), want)
            largest.append(pack_conv2d(weight, last, 128, isa).bounded)
    assert largest[:2] == [True, True]
    assert not any(largest[-6:])


@pytest.mark.parametrize("layout", ["nhwc", "nchw", "reversed", "every_second"])
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_conv2d_float(isa: str, rng: Any, shape: str, layout: str) -> None:
    weight, h, w, c = conv_weight(rng, shape)
    x = {
        "nhwc": rng.normal(size=(2, h, w, c)),
        "nchw": rng.normal(size=(2, c, h, w)).transpose(0, 2, 3, 1),
        "reversed": rng.normal(size=(2, h, w, c))[:, ::-1, ::-1, ::-1],
        "every_second": rng.normal(size=(2, 2 * h, 2 * w, 2 * c))[:, ::2, ::2, ::2],
    }[layout].astype(np.float32, order="K")
    last = epilogues(rng, weight.n)["f32"]
    assert isinstance(last, Dequant)
    for q in (None, choose_qparams(-2.0, 2.5)):
        want = reference.conv2d_float(x, weight, last, x_qparams=q)
        assert_same(ops.conv2d_float(x, weight, last, x_qparams=q), want)


def test_conv2d_takes_any_strides(isa: str, rng: Any) -> None:
    weight, h, w, c = conv_weight(rng, "3x3")
    whole = u8(rng, 2, c, 2 * h, w)
    x = whole[:, :, ::2, ::-1].transpose(0, 2, 3, 1)
    assert_same(ops.conv2d(x, weight), reference.conv2d(x, weight))


def test_a_line_wider_than_the_strip(isa: str, rng: Any) -> None:
    weight = Conv2dWeight(s8(rng, 4, 3, 3, 3), padding=1)
    x = rng.normal(size=(1, 3, 4, 1100)).astype(np.float32).transpose(0, 2, 3, 1)
    want = reference.conv2d_float(x, weight, Dequant(0.1))
    assert_same(ops.conv2d_float(x, weight, Dequant(0.1)), want)


def test_the_saturation_examples_are_exact(isa: str) -> None:
    """The two of oneDNN's documentation that saturate in int16 elsewhere."""
    x = np.array([[255, 255]], np.uint8)
    weight = LinearWeight(np.array([[127, 127]], np.int8))
    assert ops.linear(x, weight).item() == 64770
    half = np.array([[127, 127]], np.uint8)
    assert ops.linear(half, weight).item() == 32258
    for a in (0, 255):
        for w in (-128, 127):
            wide = LinearWeight(np.full((70, 133), w, np.int8))
            got = ops.linear(np.full((9, 133), a, np.uint8), wide)
            assert_array_equal(got, np.full((9, 70), a * w * 133))


def test_the_deepest_k(isa: str) -> None:
    weight = LinearWeight(np.full((2, MAX_K), -128, np.int8))
    x = np.full((1, MAX_K), 255, np.uint8)
    assert_array_equal(ops.linear(x, weight), np.full((1, 2), -128 * 255 * MAX_K))
    with pytest.raises(ValueError, match=f"exact up to K={MAX_K}"):
        LinearWeight(np.zeros((1, MAX_K + 1), np.int8))


def test_identity(isa: str, rng: Any) -> None:
    for k in (4, 5, 16, 67):
        eye = np.eye(k, dtype=np.int8)
        x = u8(rng, 13, k)
        assert_array_equal(ops.linear(x, LinearWeight(eye)), x)
        w = s8(rng, 13, k)
        assert_array_equal(ops.linear(np.eye(k, dtype=np.uint8), LinearWeight(w)), w.T)


@pytest.mark.parametrize("m, n, k", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_empty_linear(isa: str, m: int, n: int, k: int) -> None:
    x, weight = np.ones((m, k), np.uint8), LinearWeight(np.ones((n, k), np.int8))
    for last in (None, Requant(0.5, 7), Dequant(0.5, bias=np.ones(n, np.float32))):
        want = reference.linear(x, weight, last, x_zero_point=9)
        assert_same(ops.linear(x, weight, last, x_zero_point=9), want)
    want = reference.linear_float(x.astype(np.float32), weight, Dequant(0.5))
    assert_same(ops.linear_float(x.astype(np.float32), weight, Dequant(0.5)), want)


@pytest.mark.parametrize("batch, c, n", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_empty_conv2d(isa: str, batch: int, c: int, n: int) -> None:
    x, weight = np.ones((batch, 5, 5, c), np.uint8), Conv2dWeight(np.ones((n, c, 3, 3), np.int8))
    assert_same(ops.conv2d(x, weight), reference.conv2d(x, weight))
    real = x.astype(np.float32)
    want = reference.conv2d_float(real, weight, Dequant(0.5))
    assert_same(ops.conv2d_float(real, weight, Dequant(0.5)), want)


def test_rounding_ties_and_clamps(isa: str) -> None:
    """Halves go to the even neighbour; the clamp holds at both ends."""
    x = np.arange(256, dtype=np.uint8)[:, None]
    weight = LinearWeight(np.array([[1]], np.int8))
    got = ops.linear(x, weight, Requant(0.5, 10, None, 12, 100), x_zero_point=128)
    want = [min(max(round(v / 2) + 10, 12), 100) for v in range(-128, 128)]
    assert got[:, 0].tolist() == want
    huge = ops.linear(x, weight, Requant(3e38, 10))
    assert huge[:, 0].tolist() == [10] + [255] * 255


def test_threads_do_not_change_the_result(isa: str, rng: Any, threads: int) -> None:
    x, weight = u8(rng, 200, 129), LinearWeight(s8(rng, 77, 129))
    conv = Conv2dWeight(s8(rng, 33, 17, 3, 3), padding=1)
    image = u8(rng, 3, 20, 21, 17)
    assert_same(ops.linear(x, weight), reference.linear(x, weight))
    assert_same(ops.conv2d(image, conv), reference.conv2d(image, conv))


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
@pytest.mark.parametrize("m, n, k", [(1, 9, 3), (7, 9, 5), (6, 64, 64), (13, 33, 70)])
def test_linear_reads_nothing_beyond_its_operands(
    isa: str, rng: Any, m: int, n: int, k: int
) -> None:
    x, weight = guarded(u8(rng, m, k)), LinearWeight(s8(rng, n, k))
    assert_same(ops.linear(x, weight), reference.linear(x, weight))
    real = guarded(rng.normal(size=(m, k)).astype(np.float32))
    want = reference.linear_float(real, weight, Dequant(0.1))
    assert_same(ops.linear_float(real, weight, Dequant(0.1)), want)


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
@pytest.mark.parametrize("shape", CONV_SHAPES)
def test_conv2d_reads_nothing_beyond_its_operands(isa: str, rng: Any, shape: str) -> None:
    weight, h, w, c = conv_weight(rng, shape)
    x = guarded(u8(rng, 2, h, w, c))
    assert_same(ops.conv2d(x, weight), reference.conv2d(x, weight))


@pytest.mark.parametrize("epilogue", ["s32", "u8", "f32"])
def test_nothing_beyond_out_is_written(isa: str, rng: Any, epilogue: str) -> None:
    for m, n, k in LINEAR_SHAPES:
        x, weight = u8(rng, m, k), LinearWeight(s8(rng, n, k))
        last = epilogues(rng, n)[epilogue]
        want = reference.linear(x, weight, last)
        border = np.full((m + 2) * n * 4 + 256, 0xA5, np.uint8)
        inner = border[128 : 128 + want.nbytes].view(want.dtype).reshape(m, n)
        assert ops.linear(x, weight, last, out=inner) is inner
        assert_same(inner, want)
        assert (border[:128] == 0xA5).all() and (border[128 + want.nbytes :] == 0xA5).all()


DTYPES = [np.uint8, np.int8, np.int32]
SHAPES = [(), (1,), (7,), (3, 5), (33, 70), (2, 3, 4, 5), (100_003,), (0,), (3, 0)]


def special(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    x = np.asarray(rng.normal(size=shape) * 50, np.float32)
    if x.size > 4:
        x.flat[:5] = [np.nan, np.inf, -np.inf, 3e38, -0.0]
    return x


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantize_dequantize_requantize(rng: Any, shape: tuple[int, ...], dtype: Any) -> None:
    x = special(rng, shape)
    info = np.iinfo(dtype)
    acc = rng.integers(-(2**31), 2**31, shape).astype(np.int32)
    for axis in [None, *range(-len(shape), len(shape))]:
        n = () if axis is None else (shape[axis],)
        scale = (rng.random(n) + 0.1).astype(np.float32)
        for zero_point in (0, info.min, info.max, rng.integers(info.min, info.max, n)):
            q = ops.quantize(x, scale=scale, zero_point=zero_point, axis=axis, dtype=dtype)
            named = {"scale": scale, "zero_point": zero_point, "axis": axis}
            assert_same(q, reference.quantize(x, **named, dtype=dtype))
            assert_same(ops.dequantize(q, **named), reference.dequantize(q, **named))
        for multiplier in (1e-7, 1.0, 1e30):
            rule = {"multiplier": scale * np.float32(multiplier), "axis": axis, "dtype": dtype}
            want = reference.requantize(acc, zero_point=5, qmin=-0, qmax=100, **rule)
            assert_same(ops.requantize(acc, zero_point=5, qmin=0, qmax=100, **rule), want)
            assert_same(ops.requantize(acc, **rule), reference.requantize(acc, **rule))
    assert_same(ops.quantize(x, 1.28, dtype=dtype), reference.quantize(x, 1.28, dtype=dtype))


def test_on_the_right_side_of_every_tie(rng: Any) -> None:
    """The product with a reciprocal must round as the quotient: the largest mantissa needs all of
    its 48 bits."""
    mantissas = [2**23, 2**23 + 1, 2**24 - 2, 2**24 - 1, *rng.integers(2**23, 2**24, 200)]
    ties = np.arange(-260, 260) + 0.5
    for mantissa in mantissas:
        scale = float(np.ldexp(np.float32(mantissa), rng.integers(-40, 10)))
        x = (ties * scale).astype(np.float32)
        near = [x, np.nextafter(x, np.float32(0)), np.nextafter(x, x * 2)]
        ends = np.float32([np.inf, -np.inf, np.nan, 3e38, -3e38, -0.0])
        values = np.concatenate([*near, ends])
        for zero_point, dtype in ((128, np.uint8), (0, np.uint8), (255, np.uint8), (0, np.int8)):
            named = {"scale": scale, "zero_point": zero_point, "dtype": dtype}
            assert_same(ops.quantize(values, **named), reference.quantize(values, **named))


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16])
def test_one_value_beyond_reach(rng: Any, dtype: Any) -> None:
    """Vectors are limited where an element needs it: each place of two vectors, the others near."""
    named = {"scale": 0.25, "zero_point": 3, "dtype": dtype}
    steps = [-(2.0**31), -(2.0**15), 1 - 2.0**15, 2.0**15, 2.0**31]
    for odd in [np.nan, np.inf, -np.inf, 3e38, *(0.25 * np.float32(steps))]:
        x = np.tile(special(rng, (133,))[5:], (128, 1))
        np.fill_diagonal(x, odd)
        want = reference.quantize(x, **named)
        assert_same(np.stack([ops.quantize(row, **named) for row in x]), want)
        channels = np.stack([x, x, x]).transpose(1, 2, 0)[None]  # planes
        got = ops.grid(channels, [4.0] * 3, [3.0] * 3)
        assert_same(got, reference.grid(channels, [4.0] * 3, [3.0] * 3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_at_the_ends_of_float32(rng: Any, dtype: Any) -> None:
    """A loop for scales from 2**-60 to 2**60, and another one."""
    ends = [2.0**power for power in (-126, -61, -60, 60, 61, 127)]
    scales = np.array([*ends, np.nextafter(np.float32(2.0**-60), 0)], np.float32)
    ties = np.arange(-4, 5)[:, None] + np.float32([0.0, 0.5, 0.49999997])
    with np.errstate(over="ignore"):
        x = (ties.reshape(-1, 1) * scales).astype(np.float32)
    x[::5, ::2] = np.nan
    for axis, some in ((1, x), (0, np.ascontiguousarray(x.T))):
        named = {"scale": scales, "axis": axis, "dtype": dtype}
        assert_same(ops.quantize(some, **named), reference.quantize(some, **named))
    for scale in scales:
        named = {"scale": scale, "zero_point": np.int32(3), "dtype": dtype}
        assert_same(ops.quantize(x, **named), reference.quantize(x, **named))


def test_grid(rng: Any) -> None:
    x = special(rng, (2, 5, 9, 3))
    x[0, :2] = np.ldexp(rng.integers(-600, 600, (2, 9, 3)), -1).astype(np.float32)  # all ties
    factor, shift = (rng.random((2, 3)) + 0.1).astype(np.float32)
    for source in (x, x[:, ::-1, 1:7], np.asfortranarray(x), x[:, :0]):
        for padding in (((0, 0), (0, 0)), ((1, 0), (2, 3))):
            want = reference.grid(source, factor, 99 * shift, padding=padding)
            assert_same(ops.grid(source, factor, 99 * shift, padding=padding), want)
    pixels = rng.integers(0, 256, x.shape)
    normalized = ((pixels / 255 - 0.5) / 0.5).astype(np.float32)  # halves, if it were a zero point
    got = ops.grid(normalized, [127.5] * 3, [127.5] * 3)
    assert_same(got, pixels.astype(np.uint8))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"x": np.zeros((1, 2, 2, 2))}, TypeError, "wanted (B, H, W, C) float32"),
        ({"x": np.zeros((2, 2), np.float32)}, ValueError, "wanted (B, H, W, C) float32"),
        ({"factor": [1.0]}, ValueError, "grid: factor (1,) for x (1, 2, 2, 2)"),
        ({"factor": 1.0}, ValueError, "for 2 channels; wanted (2,) of both"),
        ({"factor": [1.0, 0.0]}, ValueError, "each factor > 0"),
        ({"factor": [1.0, np.nan]}, ValueError, "grid: factor: wanted finite numbers"),
        ({"shift": [1.0, np.inf]}, ValueError, "grid: shift: wanted finite numbers"),
        ({"padding": ((0, -1), (0, 0))}, ValueError, "grid: padding: got (0, -1)"),
        ({"padding": ((0, 1),)}, ValueError, "wanted ((top, bottom), (left, right))"),
        ({"out": np.zeros((1, 2, 2, 2), np.int8)}, ValueError, "wanted (1, 2, 2, 2) uint8"),
    ],
)
def test_grid_refuses(given: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"x": np.zeros((1, 2, 2, 2), np.float32), "factor": [1.0] * 2, "shift": [0.0] * 2}
    with pytest.raises(error, match=re.escape(message)):
        ops.grid(**{**arguments, **given})


@pytest.mark.parametrize("cache_bytes", [2**40, 0], ids=["cached", "streamed"])
def test_wherever_an_array_lies(rng: Any, monkeypatch: Any, cache_bytes: int) -> None:
    """Stores are aligned to cache lines from the second vector on; nothing else is written."""
    monkeypatch.setattr(elementwise, "_CACHE_BYTES", cache_bytes)
    monkeypatch.setattr(elementwise, "_walks", {})
    for size, start in product((1, 63, 64, 65, 127, 1000), (0, 1, 7, 16, 33, 63)):
        x = rng.normal(0, 3, start + size).astype(np.float32)[start:]
        memory = np.full(size + 200, 77, np.uint8)
        out = memory[start : start + size]
        ops.quantize(x, scale=0.05, zero_point=120, out=out)
        assert_same(out, reference.quantize(x, scale=0.05, zero_point=120))
        assert (memory[:start] == 77).all() and (memory[start + size :] == 77).all()
        floats = np.full(size + 200, 77, np.float32)
        real = floats[start : start + size]
        ops.dequantize(out, 0.05, 120, out=real)
        assert_same(real, reference.dequantize(out, 0.05, 120))
        assert (floats[:start] == 77).all() and (floats[start + size :] == 77).all()


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1.0, 1e20, 3e38])
def test_quantize_with_extreme_scales(rng: Any, scale: float) -> None:
    x = special(rng, (300,))
    x[100:] *= np.float32(1e10)
    for dtype in DTYPES:
        want = reference.quantize(x, scale=scale, dtype=dtype)
        assert_same(ops.quantize(x, scale=scale, dtype=dtype), want)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s], ids=str)
def test_dynamic_qparams(rng: Any, shape: tuple[int, ...]) -> None:
    for x in (special(rng, shape), np.zeros(shape, np.float32), np.full(shape, 1e-40, np.float32)):
        for per_row in (True, False):
            got = ops.dynamic_qparams(x, per_row=per_row)
            want = reference.dynamic_qparams(x, per_row=per_row)
            assert_same(np.asarray(got[0]), np.asarray(want[0]))
            assert_same(np.asarray(got[1]), np.asarray(want[1]))


@pytest.mark.parametrize("shape", [*SHAPES, (3, 4096), (2, 64, 50, 7)], ids=str)
def test_histogram(rng: Any, shape: tuple[int, ...]) -> None:
    x = special(rng, shape)
    x.reshape(-1)[5::3] = 0
    want = np.zeros((1, 65536, 2), np.int64), np.zeros((1, 2), np.float32)
    reference.histogram(x, *want)
    for array in (
        x,
        x.T,
        np.repeat(x[..., None], 2, axis=-1)[..., 1],
        x[..., ::-1] if shape else x,
    ):
        for lanes in (1, 2, 5):
            bins, ends = np.zeros((lanes, 65536, 2), np.int64), np.zeros((lanes, 2), np.float32)
            ops.histogram(array, bins, ends)
            assert_array_equal(bins.sum(axis=0), want[0][0])
            assert_array_equal([ends[:, 0].min(), ends[:, 1].max()], want[1][0])
            ops.histogram(array, bins, ends)
            assert_array_equal(bins.sum(axis=0), 2 * want[0][0])


def test_histogram_refuses_other_operands() -> None:
    x = np.ones(3, np.float32)
    bins, ends = np.zeros((2, 65536, 2), np.int64), np.zeros((2, 2), np.float32)
    with pytest.raises(ValueError, match=r"bins \(2, 65536, 2\) int32; wanted \(lanes, 65536, 2\)"):
        ops.histogram(x, bins.astype(np.int32), ends)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"bins \(2, 9, 2\)"):
        ops.histogram(x, bins[:, :9], ends)
    with pytest.raises(ValueError, match=r"bins \(0, 65536, 2\)"):
        ops.histogram(x, bins[:0], ends[:0])
    with pytest.raises(ValueError, match=r"ends \(1, 2\) float32; wanted \(lanes, 2\)"):
        ops.histogram(x, bins, ends[:1])
    with pytest.raises(ValueError, match="bins is not C-contiguous"):
        ops.histogram(x, np.asfortranarray(bins), ends)
    with pytest.raises(TypeError, match=r"x .* complex"):
        ops.histogram(x.astype(np.complex64), bins, ends)  # type: ignore[arg-type]


def test_a_range_wider_than_float32() -> None:
    x = np.array([[3e38, -3e38, 1.0, 0.0]], np.float32)
    weight = LinearWeight(np.eye(4, dtype=np.int8))
    want = reference.linear_float(x, weight, Dequant(1.0))
    assert_same(ops.linear_float(x, weight, Dequant(1.0)), want)


def test_the_textbook_form() -> None:
    import torch

    x = [0.1, 0.2, 0.3, 0.4, 0.5]
    assert fastq.quantize(x, 128 / 100).tolist() == [0, 0, 0, 1, 1]
    array = np.array(x, np.float32)
    assert fastq.quantize(array, 128 / 100).dtype == np.int8
    tensor = fastq.quantize(torch.tensor(x), 128 / 100)
    assert isinstance(tensor, torch.Tensor) and tensor.dtype == torch.int8
    assert tensor.tolist() == [0, 0, 0, 1, 1]
    back = fastq.dequantize(tensor, 100 / 128)
    assert_array_equal(back.numpy(), tensor.numpy() * np.float32(100 / 128))
    out = torch.empty(5, dtype=torch.int8)
    assert fastq.quantize(torch.tensor(x), 128 / 100, out=out) is out
    assert out.tolist() == [0, 0, 0, 1, 1]
    with pytest.raises(ValueError, match="requires grad"):
        fastq.quantize(torch.tensor(x, requires_grad=True), 1.0)


def test_tensors_that_are_refused() -> None:
    import torch

    x, q = torch.zeros(3, 5), torch.zeros(3, dtype=torch.uint8)
    bad: list[tuple[Any, str]] = [
        (lambda: ops.quantize(x.to("meta"), scale=1.0), "quantize: x is on meta, without values"),
        (lambda: ops.quantize(x.to_sparse(), scale=1.0), r"quantize: x is .*sparse_coo; .*dense"),
        (lambda: ops.quantize(x.int(), scale=1.0), r"torch.int32; wanted float32: x\.float\(\) is"),
        (lambda: ops.quantize(x * 1j, scale=1.0), r"complex64; wanted float32$"),
        (lambda: ops.quantize(x, scale=x[0, 0].to("meta")), "quantize: scale is on meta"),
        (lambda: ops.quantize(x, 1.0, out=q.to("meta")), "quantize: out is on meta"),
        (lambda: ops.dequantize(q.to("meta"), 1.0), "dequantize: q is on meta"),
        (lambda: ops.requantize(q.int().to("meta"), 1.0), "requantize: acc is on meta"),
        (lambda: ops.dynamic_qparams(x.to_sparse()), "dynamic_qparams: x is .*sparse_coo"),
        (lambda: fastq.quantize_weight(x.to("meta")), "quantize_weight: weight is on meta"),
    ]
    for run, message in bad:
        with pytest.raises(TypeError, match=message):
            run()


def test_tensors_give_tensors() -> None:
    import torch

    x = torch.tensor([-1.0, 0.5, 3.0])
    q = fastq.quantize(x, scale=0.5, dtype=torch.int8)
    assert q.dtype is torch.int8 and q.tolist() == [-2, 1, 6]
    for half in (torch.bfloat16, torch.float16):
        scale = torch.tensor(0.5, dtype=half)
        assert torch.equal(fastq.quantize(x.to(half), scale=scale, dtype="int8"), q)
    acc, out = torch.tensor([-3, 10], dtype=torch.int32), torch.empty(2, dtype=torch.uint8)
    assert fastq.requantize(acc, 0.5).tolist() == [0, 5]
    assert fastq.requantize(acc, 0.5, 1, dtype=torch.int8, qmin=0).dtype is torch.int8
    assert fastq.requantize(acc, 0.5, out=out) is out and out.tolist() == [0, 5]
    assert isinstance(fastq.requantize(acc.numpy(), 0.5), np.ndarray)


X, W = np.zeros((3, 5), np.uint8), LinearWeight(np.zeros((4, 5), np.int8))
XF = np.zeros((3, 5), np.float32)
MASKED = np.ma.masked_array(XF)
IMAGE, FILTER = np.zeros((1, 5, 5, 3), np.uint8), Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8))

BAD_CALLS: dict[str, tuple[Any, type[Exception], str]] = {
    "features": (lambda: ops.linear(X[:, :4], W), ValueError, "x has 4 features, weight wants 5"),
    "x_dtype": (lambda: ops.linear(XF, W), TypeError, r"wanted \(M, K\) uint8"),
    "x_axes": (lambda: ops.linear(X[0], W), ValueError, r"wanted \(M, K\)"),
    "x_list": (lambda: ops.linear([[1]], W), TypeError, "wanted a NumPy array"),
    "weight_array": (lambda: ops.linear(X, W.data), TypeError, "wanted a LinearWeight"),
    "weight_kind": (lambda: ops.linear(X, FILTER), TypeError, "wanted a LinearWeight"),
    "epilogue": (lambda: ops.linear(X, W, "relu"), TypeError, "wanted None, Requant or Dequant"),
    "zero_point": (lambda: ops.linear(X, W, x_zero_point=256), ValueError, "wanted 0 to 255"),
    "zero_point_float": (lambda: ops.linear(X, W, x_zero_point=1.5), TypeError, "integers"),
    "zero_points": (lambda: ops.linear(X, W, x_zero_point=[1, 2]), ValueError, "3 rows"),
    "requant_rows": (
        lambda: ops.linear(X, W, Requant(1.0), x_zero_point=[1, 2, 3]),
        ValueError,
        "wanted one integer",
    ),
    "scale_count": (
        lambda: ops.linear(X, W, Requant([1.0, 2.0])),
        ValueError,
        r"linear: Requant.multiplier \(2,\) for 4 outputs; wanted \(4,\) or a scalar",
    ),
    "add_scale_count": (
        lambda: ops.linear(X, W, Requant(1.0, add_multiplier=[1.0, 2.0]), add=X),
        ValueError,
        r"linear: Requant.add_multiplier \(2,\) for 4 outputs; wanted \(4,\) or a scalar",
    ),
    "conv_scale_count": (
        lambda: ops.conv2d(IMAGE, FILTER, Dequant([1.0, 2.0])),
        ValueError,
        r"conv2d: Dequant.scale \(2,\) for 4 outputs",
    ),
    "float_scale_count": (
        lambda: ops.linear_float(XF, W, Dequant([1.0, 2.0])),
        ValueError,
        r"linear_float: Dequant.scale \(2,\) for 4 outputs",
    ),
    "bias_count": (
        lambda: ops.linear(X, W, Dequant(1.0, bias=np.zeros(3, np.float32))),
        ValueError,
        r"linear: Dequant.bias \(3,\) for 4 outputs; wanted \(4,\) or None",
    ),
    "out_dtype": (
        lambda: ops.linear(X, W, out=np.zeros((3, 4), np.int64)),
        ValueError,
        r"wanted \(3, 4\) int32",
    ),
    "out_shape": (
        lambda: ops.linear(X, W, out=np.zeros((4, 3), np.int32)),
        ValueError,
        r"wanted \(3, 4\) int32",
    ),
    "out_layout": (
        lambda: ops.linear(X, W, out=np.zeros((4, 3), np.int32).T),
        ValueError,
        "C-contiguous",
    ),
    "float_epilogue": (lambda: ops.linear_float(XF, W, None), TypeError, "wanted a Dequant"),
    "float_qparams": (
        lambda: ops.linear_float(XF, W, Dequant(1.0), x_qparams=choose_qparams(-1, 1, np.int8)),
        ValueError,
        "wanted uint8 per tensor",
    ),
    "channels": (lambda: ops.conv2d(IMAGE[..., :2], FILTER), ValueError, "weight wants 3"),
    "small_image": (lambda: ops.conv2d(IMAGE[:, :2], FILTER), ValueError, "smaller than the"),
    "conv_x_scale": (
        lambda: ops.conv2d(IMAGE, FILTER, Dequant(1.0, [1.0, 2.0])),
        ValueError,
        "wanted a scalar",
    ),
    "no_scale": (lambda: ops.quantize(XF), TypeError, "got neither"),
    "two_scales": (lambda: ops.quantize(XF, 1.0, scale=1.0), TypeError, "got both"),
    "factor_zero_point": (lambda: ops.quantize(XF, 1.0, zero_point=1), ValueError, "affine form"),
    "nan_scale": (lambda: ops.quantize(XF, scale=np.nan), ValueError, "finite values greater"),
    "zero_scale": (lambda: ops.quantize(XF, scale=0.0), ValueError, "finite values greater"),
    "tiny_scale": (lambda: ops.quantize(XF, scale=1e-50), ValueError, "finite values greater"),
    "scale_shape": (lambda: ops.quantize(XF, scale=[1.0, 1.0]), ValueError, "without axis="),
    "scale_axis": (lambda: ops.quantize(XF, scale=[1.0, 1.0], axis=0), ValueError, r"\(3,\)"),
    "axis": (lambda: ops.quantize(XF, scale=1.0, axis=2), ValueError, "axis=2"),
    "quantize_dtype": (lambda: ops.quantize(XF, 1.0, dtype="uint16"), ValueError, "wanted uint8"),
    "quantize_ints": (
        lambda: ops.quantize(X, 1.0),
        TypeError,
        r"wanted float32: x.astype\(np.float32\)",
    ),
    "quantize_ragged": (
        lambda: ops.quantize([[1, 2], [3]], scale=1.0),
        ValueError,
        "quantize: x is a list whose parts differ in size; wanted an array",
    ),
    "scale_ragged": (
        lambda: ops.quantize(XF, scale=[[1.0], 2.0], axis=0),
        ValueError,
        "quantize: scale is a list whose parts differ in size",
    ),
    "zero_point_one": (
        lambda: ops.quantize(XF, scale=1.0, zero_point=256),
        ValueError,
        "quantize: zero_point: got 256, wanted 0 to 255",
    ),
    "scale_one": (lambda: ops.quantize(XF, scale=-1.0), ValueError, r"in float32, got -1\.0$"),
    "requantize_requant": (
        lambda: ops.requantize(X.astype(np.int32), Requant(1.0)),
        TypeError,
        r"multiplier is a Requant.*requantize\(acc, r.multiplier, r.zero_point",
    ),
    "dequantize_dequant": (
        lambda: ops.dequantize(X, Dequant(1.0)),
        TypeError,
        "scale: got Dequant, wanted a real number",
    ),
    "zero_point_range": (
        lambda: ops.quantize(XF, scale=1.0, zero_point=200, dtype="int8"),
        ValueError,
        "wanted -128 to 127",
    ),
    "dequantize_float": (lambda: ops.dequantize(XF, 1.0), TypeError, "wanted uint8, int8"),
    "requantize_dtype": (lambda: ops.requantize(X, 1.0), TypeError, "wanted int32"),
    "requantize_clamp": (
        lambda: ops.requantize(X.astype(np.int32), 1.0, qmin=9, qmax=3),
        ValueError,
        "qmin <= qmax",
    ),
    "requant_bias": (
        lambda: ops.linear(X, W, Requant(1.0, 0, np.zeros(3, np.int32))),
        ValueError,
        "for 4 outputs",
    ),
    "scale_axes": (lambda: Dequant(np.ones((2, 2))), ValueError, "a scalar or one axis"),
    "qparams_shapes": (
        lambda: QParams(np.ones(3), np.zeros(4, np.int32), axis=0),
        ValueError,
        "wanted",
    ),
    "qparams_kind": (
        lambda: ops.linear_float(XF, W, Dequant(1.0), x_qparams=(1, 2)),
        TypeError,
        "wanted a QParams",
    ),
    "dtype_unknown": (
        lambda: ops.quantize(XF, 1.0, dtype="s8"),
        TypeError,
        "got 's8', wanted uint",
    ),
    "quantize_masked": (lambda: ops.quantize(MASKED, 1.0), TypeError, r"x\.filled\(0\) is one"),
    "dequantize_masked": (lambda: ops.dequantize(MASKED, 1.0), TypeError, "q is a MaskedArray"),
    "requantize_masked": (lambda: ops.requantize(MASKED, 1.0), TypeError, "acc is a MaskedArray"),
    "range_masked": (lambda: ops.dynamic_qparams(MASKED), TypeError, "x is a MaskedArray"),
    "axis_name": (lambda: ops.quantize(XF, scale=1.0, axis="a"), TypeError, "wanted an int"),
    "qparams_axis": (lambda: QParams(np.ones(3), axis="a"), TypeError, "QParams: axis='a'; wanted"),
    "masked": (lambda: ops.linear(np.ma.masked_array(X), W), TypeError, "wanted a NumPy array"),
    "weight_half_group": (
        lambda: Conv2dWeight(np.zeros((5, 3, 3, 3), np.int8), groups=2.5),
        ValueError,
        "an int >= 1",
    ),
    "weight_huge_stride": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), stride=2**60),
        ValueError,
        "at most",
    ),
    "weight_no_padding": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding=None),
        ValueError,
        "wanted an int or two ints",
    ),
    "weight_one_padding": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding=((1, 1),)),
        ValueError,
        "top, bottom",
    ),
    "threads": (lambda: ops.set_num_threads(0), ValueError, "wanted an int from 1"),
    "weight_float": (lambda: LinearWeight(XF), TypeError, r"wanted int8 \(N, K\)"),
    "weight_groups": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), groups=3),
        ValueError,
        "divides N",
    ),
    "weight_stride": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), stride=0),
        ValueError,
        "at least 1",
    ),
    "weight_negative_padding": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding=-1),
        ValueError,
        r"Conv2dWeight: padding: got -1, .*; or \(\(top, bottom\), \(left, right\)\)",
    ),
    "weight_four_paddings": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding=(1, 2, 3, 4)),
        ValueError,
        r"padding: got \(1, 2, 3, 4\), .*; or \(\(top, bottom\), \(left, right\)\)",
    ),
    "weight_padding_mode": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding="reflect"),
        ValueError,
        "Conv2dWeight: padding: got 'reflect', wanted 'same', 'valid' or numbers",
    ),
    "weight_negative_side": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding=((0, -1), (0, 0))),
        ValueError,
        r"Conv2dWeight: padding: got \(0, -1\)",
    ),
    "weight_padding": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), padding=(1, -1)),
        ValueError,
        "at least 0",
    ),
    "weight_same": (
        lambda: Conv2dWeight(np.zeros((4, 3, 3, 3), np.int8), 2, "same"),
        ValueError,
        "Conv2dWeight: padding='same' wants stride 1",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_calls_say_what_is_wanted(case: str) -> None:
    call, error, message = BAD_CALLS[case]
    with pytest.raises(error, match=message):
        call()


def test_out_must_not_overlap_x() -> None:
    x = np.zeros((4, 4), np.uint8)
    with pytest.raises(ValueError, match="overlaps x"):
        ops.linear(x, LinearWeight(np.eye(4, dtype=np.int8)), Requant(1.0), out=x)


def test_out_must_be_writeable() -> None:
    out = np.zeros((3, 4), np.int32)
    out.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        ops.linear(X, W, out=out)


def test_operands_are_the_values_given_at_construction(rng: Any) -> None:
    """A later write to the caller's arrays changes nothing, and fields are read-only."""
    x, data = u8(rng, 3, 5), s8(rng, 4, 5)
    multiplier = np.full(4, 1e-3, np.float32)
    weight, last = LinearWeight(data), Requant(multiplier, 9)
    want = ops.linear(x, weight, last)
    data[:], multiplier[:] = 1, 1
    for zero_point in (0, 3):
        got = ops.linear(x, weight, last, x_zero_point=zero_point)
        assert_same(got, reference.linear(x, weight, last, x_zero_point=zero_point))
    assert_same(ops.linear(x, weight, last), want)
    for array in (weight.data, last.multiplier, choose_qparams(0, 1).scale, Dequant(1.0).scale):
        assert not array.flags.writeable
    kept = s8(rng, 4, 5)
    kept.flags.writeable = False
    assert LinearWeight(kept).data is kept  # a read-only array is taken as it is


def test_a_replaced_weight_has_panels_of_its_own(rng: Any) -> None:
    weight, x = LinearWeight(s8(rng, 64, 16)), u8(rng, 9, 16)
    ops.linear(x, weight)
    part = dataclasses.replace(weight, data=weight.data[:1])
    assert_same(ops.linear(x, part), reference.linear(x, part))
    with pytest.raises(TypeError):
        LinearWeight(*fastq.quantize_weight(rng.normal(size=(4, 5))))  # type: ignore[call-arg]


def test_a_clamp_of_numpy_integers(rng: Any) -> None:
    x, weight = u8(rng, 5, 6), LinearWeight(s8(rng, 7, 6))
    last = Requant(1e-3, 10, None, np.uint8(3), np.uint8(250))  # type: ignore[arg-type]
    assert_same(ops.linear(x, weight, last), reference.linear(x, weight, last))
    with pytest.raises(TypeError, match="wanted an int"):
        Requant(1.0, qmin=11.5)  # type: ignore[arg-type]


def test_out_may_lie_over_the_scales(rng: Any) -> None:
    out, q = np.zeros((4, 4), np.float32), s8(rng, 4, 4)
    out[0] = [1, 2, 3, 4]
    want = reference.dequantize(q, out[0].copy(), axis=0)
    assert_same(ops.dequantize(q, out[0], axis=0, out=out), want)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="timers are POSIX's")
def test_a_signal_handler_may_call(rng: Any) -> None:
    """It may need more workspace than the call that it interrupts, and replace it."""
    weight = LinearWeight(s8(rng, 16, 64))
    small, large = (rng.normal(size=(m, 64)).astype(np.float32) for m in (3, 4000))
    want = ops.linear_float(small, weight, Dequant(0.1))
    calls = 0

    def handler(number: int, frame: Any) -> None:
        nonlocal calls
        calls += 1
        ops.linear_float(large[: 100 * calls], weight, Dequant(0.1))

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.005)
    try:
        last = Dequant(0.1)
        while calls < 30:
            assert_same(ops.linear_float(small, weight, last), want)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_bias_that_could_overflow_is_refused() -> None:
    bias = np.array([0, 2**31 - 1], np.int32)
    weight = LinearWeight(np.array([[1, 1], [1, 0]], np.int8))
    with pytest.raises(ValueError, match=r"bias\[1\] = 2147483647"):
        ops.linear(np.zeros((1, 2), np.uint8), weight, Requant(1.0, 0, bias))
    # with only negative weights that bias is in range
    x, negative = np.array([[1, 2]], np.uint8), LinearWeight(np.array([[1, 1], [-1, 0]], np.int8))
    last = Requant(1e-9, 0, bias)
    assert_same(ops.linear(x, negative, last), reference.linear(x, negative, last))


def test_what_is_kept_is_bounded_and_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "MAX_SHAPES", 20)
    kept, made = call.Idle(), 0

    def use(keys: int) -> int:
        """How many of so many keys, each in its turn, are made anew."""
        nonlocal made
        before = made
        for key in range(keys):
            one = kept.take(key)
            if one is None:
                made += 1
                one = key
            assert one == key
            kept.give(key, one)
        return made - before

    assert (use(20), use(20)) == (20, 0)  # as many as there may be
    use(22)
    assert sum(use(22) for _ in range(10)) < 110 and len(kept) == 20  # a few more


def test_a_weight_keeps_a_bounded_number_of_layers_and_shapes(
    rng: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "MAX_SHAPES", 16)
    weight = LinearWeight(s8(rng, 8, 8))
    for m in range(1, 3 * call.MAX_SHAPES):
        ops.linear(u8(rng, m, 8), weight, Dequant(float(m)))
    bound = [v for v in weight.panels.values() if isinstance(v, layers.BoundLinear)]
    assert len(bound) <= 8
    for m in range(1, 3 * call.MAX_SHAPES):
        ops.linear(u8(rng, m, 8), weight)
    calls = [len(v.calls) for v in weight.panels.values() if isinstance(v, type(bound[0]))]
    assert max(calls) <= call.MAX_SHAPES


def test_the_address_of_an_array_is_in_its_object(tmp_path: Any) -> None:
    base = np.zeros((4, 6, 8), np.float32)
    frozen = base.copy()
    frozen.flags.writeable = False
    mapped = np.memmap(tmp_path / "x", np.uint8, "w+", shape=(3, 5))
    arrays = [base, base[1:, ::-2, 3], base.T, frozen, base[:0], np.zeros(()), mapped[1:],
              np.ma.masked_array(base), base.view(np.recarray)]  # fmt: skip
    for array in arrays:
        assert call.address_of(array) == array.__array_interface__["data"][0]


def test_a_file_is_taken_as_its_memory(tmp_path: Any, rng: Any) -> None:
    x = u8(rng, 2, 4, 4, 3)
    mapped = np.memmap(tmp_path / "x", np.uint8, "w+", shape=x.shape)
    mapped[:] = x
    wide = np.memmap(tmp_path / "wide", np.int16, "w+", shape=(3, 5))
    wide[:] = rng.integers(-99, 99, wide.shape)
    for given, plain in (
        (ops.max_pool2d(mapped, 2), ops.max_pool2d(x, 2)),
        (ops.add(mapped, mapped, 0.5, 0.5), ops.add(x, x, 0.5, 0.5)),
        (ops.layer_norm(wide, 1, 0, 1e-5), ops.layer_norm(np.array(wide), 1, 0, 1e-5)),
    ):
        assert type(given) is np.ndarray
        assert_array_equal(given, plain)


def test_every_tile_is_exact(isa: str, rng: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row of TILES on shapes around its own edges, whatever the cost model would choose."""
    monkeypatch.setattr(products, "dot_pays", lambda *_: False)
    for tile in (t for t in gemm.TILES if t.isa == isa and t.kind != "depthwise"):
        monkeypatch.setattr(products, "choose_nr", lambda *_, nr=tile.nr: nr)
        monkeypatch.setattr(products, "choose_product_tile", lambda isa, nr, work, tile=tile: tile)
        for m in {1, tile.mr - 1, tile.mr, tile.mr + 1, 2 * tile.mr + 1} - {0}:
            for n in {1, tile.nr - 1, tile.nr, tile.nr + 1, 2 * tile.nr + 3, 5 * tile.nr}:
                x, weight = u8(rng, m, 11), LinearWeight(s8(rng, n, 11))
                assert_same(ops.linear(x, weight), reference.linear(x, weight))
        weight_2d = Conv2dWeight(s8(rng, 40, 8, 3, 3), padding=1, groups=2)
        image = u8(rng, 2, 7, 7, 16)
        assert_same(ops.conv2d(image, weight_2d), reference.conv2d(image, weight_2d))
    for group in GROUPS:
        monkeypatch.setattr(convolution, "_grouping", lambda *_, group=group: (1, group))
        for tile in group_tiles(isa, group):
            monkeypatch.setattr(products, "choose_nr", lambda *_, nr=tile.nr: nr)
            monkeypatch.setattr(products, "choose_tile", lambda *_, tile=tile, **__: tile)
            for c in {group, tile.nr, tile.nr + group, 2 * tile.nr}:
                weight_2d = Conv2dWeight(s8(rng, c, group, 3, 3), padding=1, groups=c // group)
                image = u8(rng, 2, 7, 7, c)
                assert_same(ops.conv2d(image, weight_2d), reference.conv2d(image, weight_2d))


def test_what_was_checked_before_is_checked_again_where_it_differs(rng: Any) -> None:
    """A weight remembers calls by all that their checks looked at, and nothing else."""
    x = rng.integers(0, 256, (4, 8)).astype(np.uint8)
    weight = LinearWeight(rng.integers(-127, 128, (6, 8)).astype(np.int8))
    epilogues = [Requant(np.full(6, 0.01 * i, np.float32), i) for i in range(1, 20)]
    for epilogue in (*epilogues, *epilogues, None):  # more than a weight keeps layers of
        for zero_point in (0, 7):
            want = reference.linear(x, weight, epilogue, x_zero_point=zero_point)
            for _ in range(3):
                got = ops.linear(x, weight, epilogue, x_zero_point=zero_point)
                assert_same(got, want)
                assert not np.shares_memory(got, x)
    for other in (x[:, ::-1], x[::2], np.asfortranarray(x), np.tile(x, (1, 2))[:, 8:]):
        for _ in range(2):
            assert_same(ops.linear(other, weight), reference.linear(other, weight))
    out = np.zeros((4, 6), np.int32)
    assert ops.linear(x, weight, out=out) is out
    for wrong, error in (
        ({"x": x.view(np.int8)}, TypeError),
        ({"x": np.ma.masked_array(x)}, TypeError),
        ({"x": x.tolist()}, TypeError),
        ({"weight": weight.data}, TypeError),
        ({"epilogue": 1}, TypeError),
        ({"x_zero_point": True}, TypeError),
        ({"x_zero_point": 256}, ValueError),
        ({"out": out[:3]}, ValueError),
        ({"add": out.astype(np.uint8)}, ValueError),
        ({"out": np.zeros(96, np.uint8)[:96].view(np.int32).reshape(4, 6).T}, ValueError),
    ):
        with pytest.raises(error):
            ops.linear(**{"x": x, "weight": weight, **wrong})
    shared = np.zeros(200, np.uint8)
    inside = shared[:32].reshape(4, 8)
    for _ in range(2):
        ops.linear(inside, weight)
        with pytest.raises(ValueError, match="overlaps x"):
            ops.linear(inside, weight, out=shared[:96].view(np.int32).reshape(4, 6))
    copied = copy.deepcopy(weight)
    assert weight.checked and not copied.checked and not pickle.loads(pickle.dumps(weight)).checked


def test_arrays_that_were_walked_before_are_checked_again(rng: Any) -> None:
    """What is remembered of whole arrays is how they are walked, and nothing of their values."""
    x = rng.normal(size=(6, 8)).astype(np.float32)
    q = rng.integers(0, 256, (6, 8)).astype(np.uint8)
    acc = rng.integers(-5000, 5000, (6, 8)).astype(np.int32)
    for array in (x, x[::2], x[:, ::-1], x.T, x.astype(">f4"), x.astype(np.float64)):
        for scale, zero_point in (
            (0.05, 3),
            (0.1, 200),
            (np.float64(0.1), 0),
            (np.float32(0.1), 5),
        ):
            for dtype in (np.uint8, "int16", np.dtype(np.int32)):
                named = {"scale": scale, "zero_point": zero_point, "dtype": dtype}
                want = reference.quantize(array, **named)
                assert_same(ops.quantize(array, **named), want)
                out = np.zeros(want.shape, want.dtype)
                assert ops.quantize(array, **named, out=out) is out
                assert_same(out, want)
        assert_same(ops.quantize(array, 20.0), reference.quantize(array, 20.0))
    ops.quantize(x, scale=np.ones(8), axis=1)
    for least in (0, 7):
        for _ in range(2):
            want = reference.requantize(acc, 0.02, 9, qmin=least)
            assert_same(ops.requantize(acc, 0.02, 9, qmin=least), want)
            assert_same(ops.dequantize(q, 0.02, least), reference.dequantize(q, 0.02, least))
    shared = np.zeros(96, np.uint8)
    wrong: list[tuple[Any, dict[str, Any], str]] = [
        (ops.quantize, {"x": x, "scale": 0.0}, "scale"),
        (ops.quantize, {"x": x, "scale": np.inf}, "scale"),
        (ops.quantize, {"x": x, "scale": 0.1, "zero_point": 256}, "zero_point"),
        (ops.quantize, {"x": x, "scale": 0.1, "zero_point": 3.5}, "zero_point"),
        (ops.quantize, {"x": x, "scale": 0.1, "dtype": []}, "dtype"),
        (ops.quantize, {"x": x, "quantize_factor": 20.0, "zero_point": 1}, "no zero_point"),
        (ops.quantize, {"x": x, "scale": 0.1, "quantize_factor": 20.0}, "both"),
        (ops.quantize, {"x": x, "scale": 0.1, "out": np.zeros((6, 8), np.int8)}, "out is"),
        (ops.quantize, {"x": x, "scale": 0.1, "out": q[:, ::-1]}, "C-contiguous"),
        (ops.quantize, {"x": x[:0], "scale": 0.1, "out": q}, "out is"),
        (ops.dequantize, {"q": q, "scale": 0.1, "zero_point": -1}, "zero_point"),
        (ops.dequantize, {"q": x, "scale": 0.1}, "wanted uint8, int8"),
        (ops.requantize, {"acc": acc, "multiplier": -1.0}, "multiplier"),
        (ops.requantize, {"acc": acc, "multiplier": 0.1, "qmin": 9, "qmax": 8}, "qmin=9"),
        (ops.requantize, {"acc": acc, "multiplier": 0.1, "qmin": 0.5}, "wanted integers"),
        (ops.requantize, {"acc": acc, "multiplier": 0.02, "qmin": 0.0}, "wanted integers"),
        (ops.quantize, {"x": x, "scale": np.ones(8), "axis": 1.0}, "wanted an int"),
        (ops.requantize, {"acc": x, "multiplier": 0.1}, "wanted int32"),
    ]
    for function, named, message in wrong:
        for _ in range(2):
            with pytest.raises((ValueError, TypeError), match=message):
                function(**named)
    inside = shared[:64].view(np.float32)
    for _ in range(2):
        ops.quantize(inside, scale=0.1)
        with pytest.raises(ValueError, match="overlaps x"):
            ops.quantize(inside, scale=0.1, out=shared[60:76])


def test_a_weight_is_shown_without_its_values() -> None:
    data = np.ones((5, 2, 3, 3), np.int8)
    linear, conv = LinearWeight(data.reshape(5, 18)), Conv2dWeight(data, padding=1, groups=5)
    ops.linear(np.zeros((1, 18), np.uint8), linear)  # what is packed is not shown either
    assert repr(linear) == "LinearWeight(int8 (5, 18))"
    assert repr(conv) == (
        "Conv2dWeight(int8 (5, 2, 3, 3), dilation=(1, 1), groups=5, padding=((1, 1), (1, 1)), "
        "stride=(1, 1))"
    )
