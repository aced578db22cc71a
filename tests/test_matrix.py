"""Products on tile registers: rows become bands, when they are taken, exact sums at the edges."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from conftest import host_isas
from numpy.testing import assert_array_equal
from torch import Tensor, nn

import fastq
from fastq import ops, reference
from fastq.kernels import convolution, executor, layout, matrix
from fastq.kernels import isa as isa_room
from fastq.kernels.assembly import kernel_at, name_of
from fastq.kernels.call import View
from fastq.kernels.pack import aligned_empty
from fastq.kernels.products import bands_of
from fastq.kernels.tiles import Work, choose_nr, choose_product_tile
from fastq.qparams import Dequant, Requant
from fastq.weights import Conv2dWeight, LinearWeight

AMX: list[Any] = [row for row in host_isas() if row.values[0].startswith("amx")]  # type: ignore


@pytest.fixture(params=AMX)
def tier(request: pytest.FixtureRequest) -> Any:
    with isa_room.using(request.param):
        yield request.param


def u8(rng: Any, *shape: int) -> np.ndarray:
    return rng.integers(0, 256, shape).astype(np.uint8)


def s8(rng: Any, *shape: int) -> np.ndarray:
    return rng.integers(-128, 128, shape).astype(np.int8)


@pytest.mark.parametrize("most", [1, 2, 16])
@pytest.mark.parametrize("line", [1, 2, 7, 14, 16, 17, 33, 56])
def test_bands_cover_each_line(line: int, most: int) -> None:
    for lines in (1, 3):
        band, firsts = bands_of(lines * line, line, most)
        assert 1 <= band <= most
        rows = np.add.outer(firsts, np.arange(band))
        assert sorted(set(rows.ravel().tolist())) == list(range(lines * line))
        assert_array_equal(rows // line, np.repeat(rows[:, :1] // line, band, axis=1))
        assert len(firsts) == lines * -(-line // most)


def test_the_configuration_is_what_the_cpu_reads() -> None:
    """Intel's layout: palette, then bytes of a row as uint16 from 16 on, rows from 48 on."""
    config = matrix.tile_config(9, 40)
    assert config.nbytes == 64 and config[0] == 1 and not config[1:16].any()
    row_bytes, rows = config[16:48].view(np.uint16)[:8], config[48:56]
    assert row_bytes[:4].tolist() == [64] * 4 and rows[:4].tolist() == [9] * 4
    for register in matrix.A_TILES:  # 9 rows of 40 activations
        assert (row_bytes[register], rows[register]) == (40, 9)
    for register in matrix.B_TILES:  # ten K-steps of 4 for 16 columns
        assert (row_bytes[register], rows[register]) == (64, 10)
    assert not config[32:48].any() and not config[56:].any()


def kinds(call: Any) -> list[str]:
    with executor.recording() as runs:
        call()
    table = runs[-1].table.rows
    return [name_of(kernel_at(int(address))) for address in table[:, executor.KERNEL]]


def test_matrices_for_many_rows_vectors_for_one(tier: str, rng: Any) -> None:
    weight = LinearWeight(s8(rng, 64, 256))
    assert any("_matrix_" in name for name in kinds(lambda: ops.linear(u8(rng, 64, 256), weight)))
    assert not any(
        "_matrix_" in name for name in kinds(lambda: ops.linear(u8(rng, 1, 256), weight))
    )
    short = Work(1000, 63, 1, 4)  # one K-step of 4: the accumulators' way costs more
    assert choose_product_tile(tier, choose_nr(tier, 64), short).kind == "gemm"


@pytest.mark.parametrize("m, n, k", [(16, 16, 64), (17, 33, 65), (50, 70, 200), (100, 130, 515)])
def test_every_epilogue(tier: str, rng: Any, m: int, n: int, k: int) -> None:
    weight, x = LinearWeight(s8(rng, n, k)), u8(rng, m, k)
    scale, bias = (rng.random(n) * 1e-3).astype(np.float32), rng.random(n).astype(np.float32)
    rows = rng.integers(0, 256, m).astype(np.int32)
    add = u8(rng, m, n)
    for epilogue, given in (
        (None, {}),
        (None, {"x_zero_point": rows}),
        (Dequant(scale, bias=bias), {"x_zero_point": 7}),
        (Dequant(scale, rng.random(m).astype(np.float32)), {"x_zero_point": rows}),
        (Requant(scale, 100, qmin=90, qmax=200), {"x_zero_point": 3}),
        (Requant(scale, 0, add_multiplier=0.5, add_zero_point=200), {"add": add}),
        (Requant(scale, 9, add_multiplier=rng.random(n) - 0.5, add_zero_point=7), {"add": add}),
        (Requant(np.full(n, 3e4, np.float32), 128), {"x_zero_point": 128}),  # saturates both ways
    ):
        got = ops.linear(x, weight, epilogue, **given)
        assert_array_equal(got, reference.linear(x, weight, epilogue, **given))


def test_the_corners_of_the_range(tier: str) -> None:
    """255 x 127 and 255 x -128 everywhere, at the largest K whose sum is int32."""
    for k in (64, 65_793):
        x = np.full((20, k), 255, np.uint8)
        weight = LinearWeight(np.stack([np.full(k, 127), np.full(k, -128)]).astype(np.int8))
        got = ops.linear(x, weight)
        assert got[:, 0].tolist() == [255 * 127 * k] * 20
        assert got[:, 1].tolist() == [255 * -128 * k] * 20


def test_where_an_array_begins_does_not_matter(tier: str, rng: Any) -> None:
    """Staged or not, at any distance from a cache line."""
    weight, filters = LinearWeight(s8(rng, 48, 128)), Conv2dWeight(s8(rng, 48, 64, 1, 1))
    memory = aligned_empty((40 * 128 + 64,), np.uint8)
    for offset in (0, 1, 32, 63):
        memory[:] = u8(rng, memory.size)
        part = memory[offset : offset + 40 * 128]
        x, image = part.reshape(40, 128), part.reshape(1, 8, 10, 64)
        assert_array_equal(ops.linear(x, weight), reference.linear(x, weight))
        assert_array_equal(ops.conv2d(image, filters), reference.conv2d(image, filters))


@pytest.mark.parametrize("c", [1, 2, 3, 5, 20, 48, 64, 70, 96])
@pytest.mark.parametrize("size", [(3, 3), (1, 5), (7, 1)])
def test_lines_of_taps_and_single_pixels(
    tier: str, rng: Any, c: int, size: tuple[int, int], threads: int
) -> None:
    x = u8(rng, 2, 9, 19, c)
    for options in ({}, {"stride": 2}, {"dilation": (1, 2)}, {"padding": (3, 2)}):
        weight = Conv2dWeight(s8(rng, 33, c, *size), **options)
        got = ops.conv2d(x, weight, x_zero_point=9)
        assert_array_equal(got, reference.conv2d(x, weight, x_zero_point=9))


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Windows are gathered wherever a band of the matrix tiles would end with its line, as for
    images of short lines and many channels. The kinds of what is copied."""
    made: list[str] = []
    copy_row = layout.copy_row

    def counted(call: Any, x: View, out: View) -> None:
        made.append("windows" if len(x.shape) == 6 else "outputs")
        copy_row(call, x, out)

    monkeypatch.setattr(convolution, "COPY_NANOSECONDS", 0.0)
    monkeypatch.setattr(layout, "copy_row", counted)
    return made


@pytest.mark.parametrize(
    "h, w, c, n, kernel, stride, padding, dilation, groups",
    [
        (7, 7, 64, 40, (3, 3), 1, 1, 1, 1),
        (9, 5, 20, 33, (3, 3), 1, 1, 1, 1),  # no multiples
        (6, 7, 3, 16, (3, 3), 1, 1, 1, 1),  # a kernel line is a K-step
        (14, 14, 32, 24, (1, 1), 2, 0, 1, 1),
        (11, 9, 16, 16, (2, 3), (2, 1), 1, (1, 2), 1),
        (7, 7, 64, 64, (3, 3), 1, 1, 1, 4),
    ],
)
def test_gathered_windows(
    tier: str, copies: list[str], h: int, w: int, c: int, n: int, kernel: Any, stride: Any,
    padding: int, dilation: Any, groups: int,
) -> None:  # fmt: skip
    rng = np.random.default_rng(0)
    weight = Conv2dWeight(s8(rng, n, c // groups, *kernel), stride, padding, dilation, groups)
    for batch, last in (
        (1, None),
        (3, Requant(np.full(n, 1e-3, np.float32), 7)),
        (2, Dequant(np.full(n, 1e-3, np.float32))),
    ):
        x = u8(rng, batch, h, w, c)
        got = ops.conv2d(x, weight, last, x_zero_point=9)
        assert_array_equal(got, reference.conv2d(x, weight, last, x_zero_point=9))
    assert copies == ["windows"] * 3


class _Residual(nn.Module):
    """Outputs that go into a padded image, and one that is added."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        y: Tensor = self.third((x + self.second(x)).relu())
        return y


def test_gathered_windows_of_a_network(tier: str, copies: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 16, 7, 7)
    network = fastq.quantize_model(_Residual().eval(), x, progress=False)
    (program,) = network.programs
    (got,) = (network(x).numpy(),)
    assert copies.count("windows") == 3 and copies.count("outputs") > 0
    (want,) = program.reference(x.numpy())
    assert_array_equal(got, want)
