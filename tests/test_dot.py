"""Products of few columns (dot.py): exact for every number of columns, run, line and epilogue."""

from __future__ import annotations

import sys
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from rows import guarded
from test_ops import assert_same, epilogues, s8, u8
from torch import nn

import fastq
from fastq import ops, reference
from fastq.kernels import convolution, products
from fastq.kernels.isa import using
from fastq.kernels.simd import emitter
from fastq.kernels.tiles import dot_pays, dot_tiles
from fastq.qparams import Requant
from fastq.weights import Conv2dWeight, LinearWeight


def readable(isa: str, run: int) -> bool:
    """Whether a vector can be read of a run of activations."""
    simd = emitter(isa)
    return simd.masks or run >= simd.operand.count


@pytest.fixture
def taken(isa: str, monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Lets every product that dot.py can make be made there; what it collects says which were."""
    made: list[bool] = []

    def possible(isa: str, n: int, taps: int, run: int) -> bool:
        return 0 < n <= len(dot_tiles(isa)) and readable(isa, run)

    original = products.Layer.append_dots

    def append_dots(self: Any, *given: Any) -> bool:
        made.append(original(self, *given))
        return made[-1]

    for room in (products, convolution):
        monkeypatch.setattr(room, "dot_pays", possible)
    monkeypatch.setattr(products.Layer, "append_dots", append_dots)
    return made


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages are made with Linux's mprotect")
def test_linear(isa: str, rng: Any, taken: list[bool]) -> None:
    for n in range(1, 10):
        has, fold = n <= len(dot_tiles(isa)), max(emitter(isa).lanes // n, 1)
        for k in (1, 3, 4, 5, 31, 32, 40, 63, 64, 65, 127, 128, 200):
            m = int(rng.choice([fold, fold + 1, 2 * fold - 1, 5 * fold + 3]))
            x, weight = u8(rng, m, k), LinearWeight(s8(rng, n, k))
            taken.clear()
            for epilogue in epilogues(rng, n).values():
                want = reference.linear(x, weight, epilogue)
                out = guarded(np.zeros_like(want))
                assert_same(ops.linear(guarded(x), weight, epilogue, out=out), want)
            assert set(taken) <= {has and readable(isa, max(k, 4))}
            assert_same(ops.linear(x[:, ::-1], weight), reference.linear(x[:, ::-1], weight))


def test_few_rows_and_zero_points_of_rows_are_left_to_the_tiles(
    rng: Any, taken: list[bool]
) -> None:
    x, weight = u8(rng, 20, 64), LinearWeight(s8(rng, 1, 64))
    zeros = rng.integers(0, 256, 20).astype(np.int32)
    assert_same(ops.linear(x[:3], weight), reference.linear(x[:3], weight))
    want = reference.linear(x, weight, x_zero_point=zeros)
    assert_same(ops.linear(x, weight, x_zero_point=zeros), want)
    assert not any(taken)


def test_conv2d(isa: str, rng: Any, taken: list[bool], threads: int) -> None:
    for n in (1, 2, 3, 4, 7):
        for _ in range(12):
            c = int(rng.choice([1, 3, 8, 16, 17, 32, 64, 65]))
            kernel = tuple(int(k) for k in rng.choice([1, 2, 3, 5], 2))
            named: dict[str, Any] = {
                "stride": tuple(int(s) for s in rng.integers(1, 3, 2)),
                "padding": int(rng.integers(0, 3)),
                "dilation": tuple(int(d) for d in rng.choice([1, 1, 2], 2)),
            }
            weight = Conv2dWeight(s8(rng, n, c, *kernel), **named)
            image = u8(rng, int(rng.integers(1, 3)), *(int(s) for s in rng.integers(9, 24, 2)), c)
            for epilogue in epilogues(rng, n).values():
                want = reference.conv2d(image, weight, epilogue, x_zero_point=7)
                assert_same(ops.conv2d(image, weight, epilogue, x_zero_point=7), want)
    assert any(taken) == bool(dot_tiles(isa))


def test_what_is_added_and_what_has_gaps(isa: str, rng: Any, taken: list[bool]) -> None:
    """A slice of the channels of a wider image lies with gaps; so would an output in one."""
    for n in (1, 3):
        weight = Conv2dWeight(s8(rng, n, 64, 3, 3), padding=1)
        multiplier = (rng.random(n) * 1e-3).astype(np.float32)
        for dtype in (np.uint8, np.int16):
            rule = Requant(multiplier, 0, add_multiplier=rng.random(n), dtype=dtype)
            wide = u8(rng, 1, 20, 19, 100)
            for image in (wide[..., :64], np.ascontiguousarray(wide[..., 36:])):
                more = u8(rng, 1, 20, 19, n)
                want = reference.conv2d(image, weight, rule, add=more)
                assert_same(ops.conv2d(image, weight, rule, add=more), want)
    assert set(taken) == {n <= len(dot_tiles(isa)) for n in (1, 3)}


def test_they_are_taken_where_they_take_less_time() -> None:
    for isa, n, taps, run in product(("avx2", "generic", "amx_int8"), (1, 4), (1, 9), (64, 576)):
        assert not dot_pays(isa, n, taps, run)
    for isa in ("avx512_vnni", "avx_vnni"):
        assert dot_pays(isa, 1, 1, 64) and dot_pays(isa, 3, 3, 192)
        assert not dot_pays(isa, 0, 1, 64) and not dot_pays(isa, 16, 3, 192)
    assert dot_pays("avx512_vnni", 1, 1, 16) and not dot_pays("avx_vnni", 1, 1, 16)


@pytest.mark.parametrize("kernel", [(1, 2), (1, 3), (2, 2), (3, 3), (3, 1)])
def test_a_channel_of_one_byte_between_products(
    isa: str, rng: Any, kernel: tuple[int, int]
) -> None:
    """K-steps of 4 may overlap the pixels of one channel; those of a vector want them padded."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 1, 3), nn.ReLU(), nn.Conv2d(1, 1, kernel)).eval()
    x = torch.rand(2, 16, 20, 21)
    int8 = fastq.quantize_model(model, x, progress=False)
    with using("generic"):
        want = fastq.quantize_model(model, x, progress=False)(x)
    assert torch.equal(int8(x), want)
