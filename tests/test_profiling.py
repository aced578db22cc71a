"""Profiles of whole networks: what is counted, and that it adds up. No time is asserted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from networks import CASES, quantized_case
from torch import Tensor, nn

import fastq
from fastq import profiling
from fastq.kernels import isa as isa_room
from fastq.kernels import peak
from fastq.kernels.simd import emitter


class Tiny(nn.Module):
    """A framed convolution, a table, a concatenation in place; with `scan` a float operator."""

    def __init__(self, scan: bool) -> None:
        super().__init__()
        self.scan = scan
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.silu(self.first(x))
        x = torch.cat([x, self.second(x)], 1).mean((2, 3))
        return self.head(x.cumsum(1) if self.scan else x)


def quantized(scan: bool = False) -> fastq.QuantizedModel:
    torch.manual_seed(0)
    model = fastq.quantize_model(Tiny(scan), torch.randn(4, 3, 6, 6), progress=False)
    assert isinstance(model, fastq.QuantizedModel)
    return model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak, "compute_peak", lambda threads: 100.0)


X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", ["group norms", "rms norms", "class tokens", "transformer layer"])
def test_all_kernels_have_names(name: str) -> None:
    found = fastq.profile(quantized_case(name), *CASES[name].arguments(2), passes=1)
    assert all(kernel.name for step in found.steps for kernel in step.kernels)


def test_every_step_and_every_kernel_is_there(isa: str, threads: int) -> None:
    model = quantized()
    before = model(X)
    found = fastq.profile(model, X, passes=2)
    assert [(s.name, s.op, s.layer) for s in found.steps] == [
        (s.name, s.op, s.layer) for s in model.program.steps
    ]
    assert (found.isa, found.threads) == (isa, threads)
    _, plan = model._bound()[0].take(X.numpy())
    assert sum(len(step.kernels) for step in found.steps) == len(plan.steps)
    assert found.time == pytest.approx(sum(k.time for s in found.steps for k in s.kernels))
    assert all(kernel.time > 0 for step in found.steps for kernel in step.kernels)
    torch.testing.assert_close(model(X), before, rtol=0, atol=0)


def test_work_and_bytes_of_a_step() -> None:
    model = quantized()
    found = fastq.profile(model, X, passes=1)
    by_layer = {step.layer: step for step in found.steps if step.macs}
    pixels = 2 * 6 * 6
    assert {layer: step.macs for layer, step in by_layer.items()} == {
        "first": pixels * 8 * 27,
        "second": pixels * 8 * 9,
        "head": 2 * 16 * 5,
    }
    item = emitter(isa_room.current()).a_bytes
    quantize, first = found.steps[:2]
    assert (quantize.op, quantize.read, quantize.written) == (
        "quantize", pixels * 3 * 4, pixels * 3 * item,
    )  # fmt: skip
    assert (first.read, first.written) == (
        pixels * 3 * item + profiling._panel_bytes(model.program.steps[1]), pixels * 8 * item,
    )  # fmt: skip
    assert profiling._panel_bytes(model.program.steps[1]) >= 8 * 27
    assert by_layer["head"].written == 2 * 5 * 4
    for step in found.steps:
        assert bool(step.kernels) == (step.read > 0) == (step.written > 0) == (step.time > 0)
    assert not all(step.kernels for step in found.steps)  # a reshape, at least


def test_a_float_operator_says_why(tmp_path: Path) -> None:
    model = quantized(scan=True)
    fastq.save(model, tmp_path / "model.safetensors")
    for one in model, fastq.load(tmp_path / "model.safetensors"):
        found = fastq.profile(one, (X, "a label"), passes=1)
        (scan,) = (step for step in found.steps if step.why)
        assert scan.op == "aten.cumsum.default"
        assert scan.why == "aten.cumsum.default has no integer form"
        assert (scan.macs, scan.read, scan.written) == (0, 2 * 16 * 4, 2 * 16 * 4)
        programs = [step.name for program in one.programs for step in program.steps]
        assert [step.name for step in found.steps if not step.why] == programs
        at = found.steps.index(scan)
        assert found.steps[at - 1].op == "dequantize" and found.steps[at + 1].op == "quantize"
        assert "float: aten.cumsum.default has no integer form" in str(found)


def test_memory_is_that_of_the_plan() -> None:
    model = quantized(scan=True)
    found = fastq.profile(model, X, passes=1).memory
    pooled = 2 * 16 * 4
    assert found.floats == X.nbytes + 2 * pooled + 2 * 5 * 4
    arenas = []
    for bound, shape in zip(model._bound(), ((2, 3, 6, 6), (2, 16)), strict=True):
        _, plan = bound.take(torch.zeros(shape).numpy())
        arenas.append(plan.call.scratch_bytes)
    assert found.arena == max(arenas) > 0
    assert found.weights == sum(t.nbytes for t in model.state_dict().values())
    assert found.panels >= 8 * 27 + 8 * 9 + 16 * 5
    assert found.total == found.weights + found.panels + found.arena + found.floats
    assert found == profiling.memory(model, X)


def test_it_prints_as_a_table() -> None:
    steps = (
        profiling.StepProfile("a", "conv", "conv2d", (
            profiling.KernelTime("border", 1.0), profiling.KernelTime("tile", 7.0)),
            400_000, 3000, 2000, ""),
        profiling.StepProfile("b", "view", "reshape", (), 0, 0, 0, ""),
        profiling.StepProfile("c", "scan", "aten.cumsum.default",
                              (profiling.KernelTime("torch", 2.0),), 0, 8, 8, "no integer form"),
    )  # fmt: skip
    memory = profiling.Memory(weights=2**20, panels=2**20, arena=2**19, floats=0)
    found = profiling.Profile("avx2", 1, steps, 11.0, 400.0, memory)
    assert found.time == 10.0 and steps[0].gops == 100.0 and steps[1].gops == 0.0
    assert list(found.by_operation()) == ["conv2d", "torch", "reshape"]
    lines = str(found).splitlines()
    assert lines[0] == (
        "avx2, 1 thread(s): 3 steps, 10 us; a call 11 us; 0.4 MMAC, 80.0 GOP/s of 400"
    )
    assert lines[1] == "memory 2.50 MiB: weights 1.00, panels 1.00, arena 0.50, floats 0.00"
    conv = lines[4].split()
    assert conv == [
        "conv", "conv2d", "8.0", "80.0%", "100.0", "25%", "3.0", "2.0", "border", "+", "tile",
    ]  # fmt: skip
    assert lines[5].endswith("nothing is moved")
    assert lines[6].endswith("float: no integer form")
    assert [line.split()[0] for line in lines[-3:]] == ["tile", "torch", "border"]


def test_what_it_does_not_take() -> None:
    layers = fastq.quantize_model(nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"got a QLinear.*fastq\.explain"):
        fastq.profile(layers, torch.randn(1, 4))
    model = quantized()
    with pytest.raises(ValueError, match="passes=0"):
        fastq.profile(model, X, passes=0)
    with pytest.raises(TypeError, match="passes='a', wanted an int of at least 1"):
        fastq.profile(model, X, passes="a")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="wanted float32"):
        fastq.profile(model, torch.randn(3, 6, 6), passes=1)
