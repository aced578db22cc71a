"""Which kernels a layer runs on this machine, how fast they are, and how fast they could be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastq import ops
from fastq.kernels import executor, isa, peak
from fastq.kernels.assembly import k_loop_of, kernel_at, name_of
from fastq.qparams import Requant
from fastq.timing import check_count, median
from fastq.weights import Conv2dWeight, LinearWeight

SECONDS = 0.1  # of timing, for the call and for each of its kernels
EPILOGUE = Requant(np.array(2.0**-10, np.float32), 128)  # of a bare weight: uint8 to uint8


@dataclass(frozen=True)
class KernelReport:
    """One kernel of a call. Times in microseconds.

    name    of a tile: types, operation, MRxNR, c KR, instruction set; then its epilogue and how
            it finds its rows. Of a plain loop: what it reads and writes.
    tasks   that the threads share.
    time    median, run alone and again and again.
    dots    dot product instructions in the K loop's assembly, and `spills` of vectors to the
            stack there; None where the kernel has no such loop.
    """

    name: str
    tasks: int
    time: float
    dots: int | None
    spills: int | None


@dataclass(frozen=True)
class Explanation:
    """What `explain` found; printed, it is a table. Times in microseconds, median.

    time        of a call, with all that Python does around the kernels.
    estimate    of the kernels on one thread, by the model that decides whether threads pay.
    macs        multiply-adds; 2 operations each in `gops`, 10^9 operations a second.
    limit       the roofline: the time that no exact sum of these products can beat here, by
                `bound`: "compute" (dot products on registers) or "memory" (reading operands of
                this size).
    share       limit / time; over 1 where Winograd does with fewer products.
    """

    layer: str
    isa: str
    threads: int
    kernels: tuple[KernelReport, ...]
    time: float
    estimate: float
    macs: int
    gops: float
    limit: float
    bound: str
    share: float

    def __str__(self) -> str:
        width = max(len(kernel.name) for kernel in self.kernels)
        lines = [
            f"{self.layer}; {self.isa}, {self.threads} thread(s)",
            f"{self.time:.1f} us a call (one thread by the model: {self.estimate:.1f} us), "
            f"{self.gops:.1f} GOP/s; {100 * self.share:.0f} % of the roofline, "
            f"{self.limit:.1f} us by {self.bound}",
            "",
            f"{'kernel':{width}}  {'tasks':>7}  {'us':>9}  {'dots':>5}  {'spills':>6}",
        ]
        for kernel in self.kernels:
            dots, spills = ("-" if n is None else n for n in (kernel.dots, kernel.spills))
            lines.append(
                f"{kernel.name:{width}}  {kernel.tasks:7}  {kernel.time:9.1f}  "
                f"{dots:>5}  {spills:>6}"
            )
        return "\n".join(lines)


def explain(layer: Any, shape: tuple[int, ...]) -> Explanation:
    """Runs a layer on random input of this shape and says which kernels it took, and how long.

    layer  QLinear, QConv1d or QConv2d: float32 to float32, statically or dynamically as it is set.
           LinearWeight or Conv2dWeight: uint8 to uint8.
    shape  of the input: (*, K); (B, C, H, W) of a QConv2d, (B, H, W, C) of a Conv2dWeight, ...

    Takes seconds: it measures the machine's limits, and compiles the kernels anew to read their
    assembly. Raises TypeError for another layer, ValueError for a size of 0, and what the layer
    raises for a wrong shape.
    """
    if not isinstance(shape, Sequence):
        raise TypeError(f"explain: shape={shape!r:.80}, wanted the sizes of the input, as (1, 512)")
    for size in shape:
        check_count("explain: a size of the input", size)
    weight, run, size = _prepared(layer, tuple(shape))
    if not weight.data.size:
        raise ValueError(f"explain: weight {weight.data.shape}; wanted one without a size of 0")
    run()  # packs the weight, compiles what is missing
    with executor.recording() as runs:
        out = run()  # held, as the runs below write there again
    threads = executor.get_num_threads()
    macs = out.size * weight.data[0].size
    seen = weight.data.size + size * (int(np.prod(shape)) + out.size)
    compute, memory = (1e6 * seconds for seconds in peak.limits(macs, seen, threads))
    time, limit = median(run, SECONDS), max(compute, memory)
    return Explanation(
        layer=f"{type(layer).__name__} {weight.data.shape}, input {tuple(shape)}",
        isa=isa.current(),
        threads=threads,
        kernels=tuple(report for recorded in runs for report in _reports(recorded)),
        time=time,
        estimate=1e-3 * sum(recorded.table.nanoseconds for recorded in runs),
        macs=macs,
        gops=2e-3 * macs / time,
        limit=limit,
        bound="memory" if memory > compute else "compute",
        share=limit / time,
    )


def _prepared(layer: Any, shape: tuple[int, ...]) -> tuple[Any, Callable[[], Any], int]:
    """The weight object, a call on random input, and the bytes of one of its inputs or outputs."""
    rng = np.random.default_rng(0)
    if isinstance(layer, LinearWeight | Conv2dWeight):
        weight, x = layer, rng.integers(0, 256, shape, dtype=np.uint8)
        function: Any = ops.linear if isinstance(layer, LinearWeight) else ops.conv2d
        return weight, lambda: function(x, weight, EPILOGUE), 1
    import torch

    from fastq.nn import QConv1d, QConv2d, QLinear

    if not isinstance(layer, QLinear | QConv1d | QConv2d):
        raise TypeError(
            f"explain: got a {type(layer).__name__}; wanted a QLinear, QConv1d, QConv2d, "
            "LinearWeight or Conv2dWeight; fastq.profile takes what quantize_model returns"
        )
    real = torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))
    weight = layer._operands().weight
    if isinstance(layer, QLinear):
        return weight, lambda: layer(real).numpy(), 4
    padded = layer.padded(real)  # held: the kernels are run again, one by one
    return weight, lambda: layer.convolved(padded).numpy(), 4


def _reports(run: executor.Run) -> list[KernelReport]:
    reports = []
    for i, row in enumerate(run.table.rows):
        kernel = kernel_at(int(row[executor.KERNEL]))
        time = median(partial(executor.run, run.table.part(i, i + 1), run.bases), SECONDS)
        loop = k_loop_of(kernel)
        dots, spills = (loop.dots, loop.spills) if loop else (None, None)
        tasks = int(row[executor.TASKS])
        reports.append(KernelReport(name_of(kernel), tasks, time, dots, spills))
    return reports
