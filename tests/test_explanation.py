"""What fastq.explain says, against what is known of the layer. Nothing here is timed."""

from __future__ import annotations

import math
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fastq
from fastq import explanation
from fastq.explanation import Explanation
from fastq.kernels import executor, peak
from fastq.kernels.assembly import k_loop_of, kernel_at, name_of
from fastq.kernels.isa import target_features


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's limits as constants, and one timed call."""
    monkeypatch.setattr(explanation, "SECONDS", 0.0)
    monkeypatch.setattr(peak, "limits", lambda macs, size, threads: (2e-11 * macs, 1e-10 * size))


def explained(layer: Any, shape: tuple[int, ...]) -> Explanation:
    result = fastq.explain(layer, shape)
    assert result.gops == pytest.approx(2e-3 * result.macs / result.time)
    assert result.share == pytest.approx(result.limit / result.time)
    for kernel in result.kernels:
        assert kernel.name in str(result)
    return result


def test_a_dynamic_linear_layer(isa: str) -> None:
    layer = fastq.QLinear.from_float(nn.Linear(48, 40).requires_grad_(False))
    result = explained(layer, (2, 5, 48))
    assert result.isa == isa and result.macs == 10 * 48 * 40
    stage, gemm = result.kernels
    assert stage.name.startswith("stage_rows dynamic") and stage.dots is None
    kind, rest = ("matrix", "") if isa.startswith("amx") else ("gemm", " affine")
    assert gemm.name.startswith(f"u8s8s32_{kind}_") and gemm.name.endswith(f"__{isa} f32{rest}")
    if isa.endswith("-emulated"):
        assert gemm.dots is None
    else:
        assert gemm.dots and gemm.spills == 0
    # 2 * 19200 operations at 100 GOP/s; 10 * (48 + 40) float32 and the weight at 10 GB/s
    assert result.limit == pytest.approx(max(2 * 19.2 / 100, (352 * 10 + 1920) / 1e4))
    assert result.bound == "memory"


def test_convolutions() -> None:
    layer = fastq.QConv2d.from_float(nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False))
    result = explained(layer, (1, 16, 8, 9))
    assert result.macs == 8 * 9 * 32 * 16 * 9 and result.bound == "compute"
    assert len(result.kernels) == 5  # range, its parameters, stage, product, channel by channel
    layer = fastq.QConv1d.from_float(nn.Conv1d(16, 32, 3, padding=2, padding_mode="circular"))
    for shape in ((1, 16, 9), (16, 9)):
        assert explained(layer, shape).macs == 11 * 32 * 16 * 3
    with pytest.raises(TypeError, match="QConvTranspose1d; wanted a QLinear, QConv1d, QConv2d"):
        fastq.explain(fastq.QConvTranspose1d(1, 1, 1), (1, 1, 1))
    weight = fastq.Conv2dWeight(np.ones((64, 1, 3, 3), np.int8), stride=2, groups=64)
    result = explained(weight, (3, 9, 11, 64))
    assert result.macs == 3 * 4 * 5 * 64 * 9
    assert "depthwise" in result.kernels[-1].name


def test_all_kernels_of_a_call_end_what_they_started(rng: Any) -> None:
    """A recorded run can be run again, kernel by kernel, after other calls of the same table."""
    weight = fastq.LinearWeight(rng.integers(-128, 128, (40, 48)).astype(np.int8))
    x, other = (rng.normal(size=(7, 48)).astype(np.float32) for _ in range(2))
    last = fastq.Dequant(0.01)
    with executor.recording() as runs:
        out = fastq.linear_float(x, weight, last)
    want = out.copy()
    fastq.linear_float(other, weight, last)
    out[:] = math.nan
    (run,) = runs
    for row in range(len(run.table.rows)):
        executor.run(run.table.part(row, row + 1), run.bases)
    np.testing.assert_array_equal(out, want)
    assert len(runs) == 1  # nothing is recorded any more


def test_a_recording_sees_all_threads(rng: Any) -> None:
    x = rng.normal(size=9).astype(np.float32)
    with executor.recording() as runs:
        thread = threading.Thread(target=lambda: fastq.quantize(x, scale=1.0))
        thread.start()
        thread.join()
    kernel = kernel_at(int(runs[0].table.rows[0, executor.KERNEL]))
    assert name_of(kernel) == "elementwise divide f32 u8 cached tensor"
    assert k_loop_of(kernel) is None


def test_what_cannot_be_explained() -> None:
    with pytest.raises(TypeError, match="got a Linear; wanted a QLinear"):
        fastq.explain(nn.Linear(2, 3), (1, 2))
    network = fastq.quantize_model(nn.Sequential(nn.Linear(2, 3)), torch.ones(1, 2), progress=False)
    with pytest.raises(TypeError, match=r"fastq\.profile takes what quantize_model returns"):
        fastq.explain(network, (1, 2))
    with pytest.raises(ValueError, match="wanted"):
        fastq.explain(fastq.QLinear.from_float(nn.Linear(2, 3).requires_grad_(False)), (1, 5))
    layer = fastq.QLinear.from_float(nn.Linear(2, 3).requires_grad_(False))
    with pytest.raises(TypeError, match="shape=8, wanted the sizes of the input"):
        fastq.explain(layer, 8)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a size of the input=0, wanted an int of"):
        fastq.explain(layer, (0, 2))
    for nothing in (fastq.QLinear(2, 0), fastq.LinearWeight(np.ones((0, 2), np.int8))):
        with pytest.raises(
            ValueError, match=r"explain: weight \(0, 2\); wanted one without a size"
        ):
            fastq.explain(nothing, (1, 2))
    with pytest.raises(LookupError, match="no kernel is at"):
        kernel_at(1)


@pytest.mark.skipif("avx2" not in target_features(), reason="this CPU lacks avx2")
def test_the_limits_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(peak, "SECONDS", 1e-4)
    compute, memory = peak.limits(10**6, 1 << 14, 1)
    assert 0 < compute < math.inf and 0 < memory < math.inf
    assert peak.limits(2 * 10**6, 1 << 14, 1) == (2 * compute, memory)
    assert peak.limit_seconds(10**6, 1 << 14, 1) == max(compute, memory)
