"""The benchmark's table of shapes: its networks have their published sizes, each shape is exact."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from fastq import ops, reference
from fastq.qparams import Requant
from fastq.weights import Conv2dWeight, LinearWeight

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not an installed package

from benchmarks import shapes
from benchmarks.readme_table import put

# convolutions, and their multiply-accumulates in millions: torchvision's published totals (the
# papers' for MobileNetV1 and ShuffleNetV1), less the classifier
PUBLISHED = {
    "resnet18": (20, 1814.1 - 0.5),
    "resnet50": (53, 4089.2 - 2.0),
    "mobilenet_v1": (27, 568.7 - 1.0),
    "mobilenet_v2": (52, 300.8 - 1.3),
    "mobilenet_v3_large": (62, 216.6 - 2.5),
    "mobilenet_v3_small": (52, 56.5 - 1.6),
    "shufflenet_v1_g3": (49, 137.5 - 1.0),
    "shufflenet_v2_x1": (56, 144.9 - 1.0),
    "squeezenet1_0": (26, 818.9),
    "squeezenet1_1": (26, 349.2),
    "inception_v3": (94, 5713.2 - 2.0),
    "vgg16": (13, 15470.3 - 123.6),
}


@pytest.mark.parametrize("network", shapes.NETWORKS)
def test_a_network_has_its_published_size(network: str) -> None:
    rows = shapes.NETWORKS[network]
    layers, millions = PUBLISHED[network]
    assert sum(row.count for row in rows) == layers
    assert sum(row.count * row.macs for row in rows) / 1e6 == pytest.approx(millions, abs=0.11)


def test_bert_base_has_its_parameters() -> None:
    projections = [row for row in shapes.TRANSFORMERS["bert_base"] if row.m == 128 and row.n > 128]
    # 12 layers of 4 * 768 * 768 + 2 * 768 * 3072
    assert sum(row.count * row.n * row.k for row in projections) == 84_934_656


def congruent(size: int, least: int, step: int) -> int:
    """The smallest size from `least` on that is `size` modulo `step`; `size` if it is smaller."""
    return min(size, least + (size - least) % step)


def scaled(shape: shapes.Shape) -> shapes.Shape:
    """A shape with the same tails, strides and neighbours at the edges, in a moment's work.

    Rows keep their remainder modulo every MR, columns and K modulo every NR and KR; an image keeps
    its size modulo 8; of a grouped convolution each group stays what it is.
    """
    if isinstance(shape, shapes.Elementwise):
        return dataclasses.replace(shape, size=congruent(shape.size, 1 << 17, 64))
    if shape.macs <= 1_000_000:
        return shape
    if isinstance(shape, shapes.Gemm):
        m, n, k = (
            congruent(shape.m, 60, 120),
            congruent(shape.n, 64, 64),
            congruent(shape.k, 64, 64),
        )
        return dataclasses.replace(shape, m=m, n=n, k=k)
    (kh, kw), (dh, dw) = (shape.kh, shape.kw), shape.dilation
    h, w = congruent(shape.h, dh * kh + 4, 8), congruent(shape.w, dw * kw + 4, 8)
    groups = shape.groups
    if shape.depthwise:
        groups = congruent(groups, 64, 64)
    elif groups > 1:
        groups = congruent(groups, 4, 4)
    c, n = shape.c // shape.groups * groups, shape.n // shape.groups * groups
    if groups == 1:
        c, n = congruent(c, 32, 64), congruent(n, 64, 64)
    return dataclasses.replace(shape, h=h, w=w, c=c, n=n, groups=groups)


def distinct(rows: tuple[shapes.Shape, ...]) -> list[Any]:
    """The scaled shapes, each once, as parameters with the name of the first."""
    first: dict[shapes.Shape, str] = {}
    for row in rows:
        first.setdefault(dataclasses.replace(scaled(row), name="", count=1), row.name)
    return [pytest.param(row, id=name) for row, name in first.items()]


@pytest.mark.parametrize("shape", distinct(shapes.GEMM + shapes.MODULES))
def test_every_product_is_exact(isa: str, rng: Any, shape: shapes.Gemm) -> None:
    weight = LinearWeight(rng.integers(-128, 128, (shape.n, shape.k)).astype(np.int8))
    x = rng.integers(0, 256, (shape.m, shape.k)).astype(np.uint8)
    for epilogue in (None, requant(rng, shape)):
        want = reference.linear(x, weight, epilogue, x_zero_point=3)
        assert_array_equal(ops.linear(x, weight, epilogue, x_zero_point=3), want)


@pytest.mark.parametrize("shape", distinct(shapes.CONV + shapes.DEPTHWISE))
def test_every_convolution_is_exact(isa: str, rng: Any, shape: shapes.Conv) -> None:
    size = (shape.n, shape.c // shape.groups, shape.kh, shape.kw)
    data = rng.integers(-128, 128, size).astype(np.int8)
    weight = Conv2dWeight(data, shape.stride, shape.padding, shape.dilation, shape.groups)
    x = rng.integers(0, 256, (1, shape.h, shape.w, shape.c)).astype(np.uint8)
    for epilogue in (None, requant(rng, shape)):
        want = reference.conv2d(x, weight, epilogue, x_zero_point=3)
        assert_array_equal(ops.conv2d(x, weight, epilogue, x_zero_point=3), want)


def requant(rng: Any, shape: shapes.Gemm | shapes.Conv) -> Requant:
    """Outputs over the whole of uint8, some beyond it."""
    spread = 2.0 ** -np.ceil(np.log2(1 + shape.k**0.5 * 80))
    multiplier = (rng.uniform(0.5, 1, shape.n) * spread).astype(np.float32)
    return Requant(multiplier, 7, rng.integers(-999, 999, shape.n).astype(np.int32))


@pytest.mark.parametrize("shape", distinct(shapes.ELEMENTWISE))
def test_every_array_is_exact(rng: Any, shape: shapes.Elementwise) -> None:
    dtype = {"quantize": np.float32, "dequantize": np.uint8, "requantize": np.int32}[shape.op]
    x = rng.uniform(0, 255, shape.size).astype(dtype)
    op, scale = shape.op, np.float32(0.7)
    if op == "quantize":
        got, want = (room.quantize(x, scale=scale, zero_point=3) for room in (ops, reference))
    else:
        got, want = (getattr(room, op)(x, scale, 3) for room in (ops, reference))
    assert_array_equal(got, want)


def test_scaled_shapes_keep_their_tails() -> None:
    for row in shapes.GEMM:
        small = scaled(row)
        assert (small.m % 12, small.n % 64, small.k % 64) == (row.m % 12, row.n % 64, row.k % 64)
    for row in shapes.CONV + shapes.DEPTHWISE:
        small = scaled(row)
        assert small.macs <= 20_000_000 and small.depthwise == row.depthwise, row.name
        assert small.n % 64 == row.n % 64 or row.groups > 1, row.name
        assert [(e - o) % 2 for e, o in ((row.h, small.h), (row.w, small.w))] == [0, 0], row.name


def test_names_are_unique() -> None:
    names = [s.name for s in shapes.GEMM + shapes.CONV + shapes.DEPTHWISE + shapes.ELEMENTWISE]
    assert len(names) == len(set(names))
    for network, rows in shapes.WHOLE.items():
        assert len({row.name for row in rows}) == len(rows), network


def test_geometry_is_that_of_conv2d() -> None:
    for row in shapes.CONV + shapes.DEPTHWISE:
        data = np.zeros((row.n, row.c // row.groups, row.kh, row.kw), np.int8)
        weight = Conv2dWeight(data, row.stride, row.padding, row.dilation, row.groups)
        assert weight.c == row.c, row.name
        assert weight.output_size(row.h, row.w) == row.output_size, row.name


def test_macs_are_counted_one_by_one() -> None:
    row = shapes.conv("by_hand", 5, 5, 4, 6, 3, 2, groups=2)
    # 3 x 3 outputs of 6 channels, each from 3 x 3 taps of 2 channels
    assert row.output_size == (3, 3)
    assert row.macs == 9 * 6 * 9 * 2
    assert row.bytes == 5 * 5 * 4 + 6 * 2 * 9 + 9 * 6
    assert dataclasses.replace(row, count=7).macs == row.macs


def test_a_table_is_put_between_the_marks() -> None:
    begin, end = "<!-- results:begin -->", "<!-- results:end -->"
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    once = put(text, "new", "results")
    assert once == f"before\n{begin}\nnew\n{end}\nafter\n"
    assert put(once, "new", "results") == once
    with pytest.raises(ValueError, match="results:begin"):
        put("no marks", "new", "results")
