"""The benchmark's table of shapes: networks have the sizes that their papers say."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

from fastq.weights import Conv2dWeight

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is not an installed package

from benchmarks import shapes
from benchmarks.readme_table import BEGIN, END, put

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
    text = f"before\n{BEGIN}\nold\n{END}\nafter\n"
    once = put(text, "new")
    assert once == f"before\n{BEGIN}\nnew\n{END}\nafter\n"
    assert put(once, "new") == once
    with pytest.raises(ValueError, match="table:begin"):
        put("no marks", "new")
