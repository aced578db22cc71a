"""The goals of the package in numbers, beside what was measured."""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.measure import Row, interleave
from fastq.kernels import peak

PROCESSES = 5  # each figure of a fresh process is the median of this many


class Goal(NamedTuple):
    """`got` has to be at least `want`, or at most where `most`."""

    what: str
    got: float
    want: float
    unit: str
    most: bool = False

    @property
    def reached(self) -> bool:
        return self.got <= self.want if self.most else self.got >= self.want

    def __str__(self) -> str:
        sign = "<=" if self.most else ">="
        verdict = "reached" if self.reached else "MISSED"
        return f"{verdict:8} {self.what:64} {self.got:8.2f} {sign} {self.want:g} {self.unit}"


def kernel_goals(rows: Iterable[Row]) -> list[Goal]:
    """From the rows of the suites gemm, conv and modules of the goals."""
    by_shape: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        by_shape[row.shape][row.peer] = row
    goals = []
    for shape, peers in by_shape.items():
        if shape.startswith("goal/"):
            ours = peers["fastq"]
            share = 100 * ours.gops / peak.vpdpbusd(ours.threads)
            goals.append(Goal(f"GEMM {ours.shape}: share of vpdpbusd's peak", share, 90, "%"))
            for name in "torch._int_mm", "torch onednn", "torch fbgemm":
                ratio = peers[name].median / ours.median
                goals.append(Goal(f"GEMM {ours.shape}: over {name}", ratio, 1, "x"))
    convolutions = [p["fastq"] for s, p in by_shape.items() if s.startswith("resnet50/")]
    if convolutions:
        seconds = sum(r.count * r.median for r in convolutions)
        gops = 2e-3 * sum(r.count * r.macs for r in convolutions) / seconds
        share = 100 * gops / peak.vpdpbusd(convolutions[0].threads)
        count = sum(r.count for r in convolutions)
        goals.append(
            Goal(f"ResNet-50, {count} convolutions: share of vpdpbusd's peak", share, 85, "%")
        )
    module = by_shape.get("module/1x768x768")
    if module:
        theirs = min(r.median for r in module.values() if r.peer.startswith("torch dynamic"))
        ratio = module["fastq.QLinear"].median / theirs
        goals.append(
            Goal("QLinear 768->768, batch 1: time over torch.ao's dynamic", ratio, 1, "x", True)
        )
    return goals


def call_goals(seconds: float) -> list[Goal]:
    """What a call adds to its kernels, of a layer that is one product; torch's own beside it."""
    import torch

    import fastq
    from fastq.kernels import executor

    linear, x = torch.nn.Linear(1, 1).requires_grad_(False), torch.ones(1, 1)
    layer = fastq.QLinear.from_float(linear)
    with executor.recording() as ran:
        y = layer(x)
    (run,) = ran  # reads x and writes y
    runs = {
        "call": lambda: layer(x),
        "kernels": lambda: executor.run(*run),
        "torch": lambda: linear(x),
    }
    call, kernels, theirs = (
        1e6 * statistics.median(times) for times in interleave(runs, seconds).values()
    )
    del y
    what = f"QLinear 1->1: what its call of {call:.1f} us adds ({theirs:.1f} us: nn.Linear's)"
    return [Goal(what, call - kernels, 8, "us", True)]


_IMPORT = """
import time, torch, numba
start = time.perf_counter()
import fastq, fastq.nn
print(time.perf_counter() - start)
"""
_FIRST_CALL = """
import time, torch, fastq
layer = fastq.QLinear.from_float(torch.nn.Linear(768, 768).requires_grad_(False))
x = torch.ones(1, 768)
start = time.perf_counter()
layer(x)
print(time.perf_counter() - start)
"""


def process_goals() -> list[Goal]:
    """Import and first call, in fresh processes; the first process fills the kernel cache."""
    return [
        Goal("import fastq, over torch and numba", _fresh(_IMPORT), 0.3, "s", True),
        Goal("first call of a QLinear, warm kernel cache", _fresh(_FIRST_CALL), 0.3, "s", True),
    ]


def _fresh(program: str) -> float:
    def once() -> float:
        result = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        return float(result.stdout)

    once()
    return statistics.median(once() for _ in range(PROCESSES))
