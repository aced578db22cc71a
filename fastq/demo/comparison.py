"""Quantize, save, load, run: what int8 costs in accuracy and gives in speed and memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
from rich.table import Table
from torch import Tensor, nn

import fastq
from fastq.demo.tasks import Task, train
from fastq.reporting import same_threads
from fastq.timing import medians

BATCHES = (1, 64)
SECONDS = 2.0  # of timing per batch size


@dataclass(frozen=True)
class Measured:
    """One network on the held-out images.

    accuracy  top-1, 0 to 1.       latency  batch size -> seconds, median.
    memory    bytes of the tensors in its state_dict.       disk  bytes of its file.
    """

    accuracy: float
    latency: dict[int, float]
    memory: int
    disk: int


@dataclass(frozen=True)
class Comparison:
    """float32 and int8 on the same images; agreement: share of equal predictions, 0 to 1."""

    title: str
    images: int
    threads: int
    float32: Measured
    int8: Measured
    agreement: float

    def rows(self) -> Iterator[tuple[str, str, str, str]]:
        """Name, float32, int8, int8 against float32; the last is "" where it says nothing."""
        a, b = self.float32, self.int8
        points = 100 * (b.accuracy - a.accuracy)
        yield (
            "top-1 accuracy",
            f"{a.accuracy:.2%}",
            f"{b.accuracy:.2%}",
            f"{points:+.2f} points",
        )
        yield "predictions equal to float32's", "", f"{self.agreement:.2%}", ""
        for batch in BATCHES:
            yield (
                f"latency, batch {batch}",
                f"{1e3 * a.latency[batch]:.3f} ms",
                f"{1e3 * b.latency[batch]:.3f} ms",
                f"{a.latency[batch] / b.latency[batch]:.2f}x the speed",
            )
        for name, before, after in (
            ("parameters in memory", a.memory, b.memory),
            ("parameters on disk", a.disk, b.disk),
        ):
            yield name, f"{before:,} B", f"{after:,} B", f"{before / after:.2f}x smaller"


def compare(task: Task, path: Path, *, qat: bool = False) -> Comparison:
    """Quantize `task.network`, save it to `path`, load that file back and measure both networks.

    qat  train what was loaded, save it to `path`, and load it again; wants `task.training`.
    """
    int8 = fastq.quantize_model(task.network, task.calibration, remedies=task.remedies, strict=True)
    fastq.save(int8, path)
    if qat:
        train_file(task, path)
    int8 = fastq.load(path)

    networks = task.network, int8
    with same_threads() as threads:
        before, after = (predict(network, task.images) for network in networks)
        latency = {batch: latencies(networks, task.images, batch) for batch in BATCHES}

    def measured(which: int, network: nn.Module, predictions: Tensor, disk: int) -> Measured:
        return Measured(
            accuracy=(predictions == task.labels).float().mean().item(),
            latency={batch: latency[batch][which] for batch in BATCHES},
            memory=sum(t.nbytes for t in tensors(network).values()),
            disk=disk,
        )

    return Comparison(
        title=task.title,
        images=len(task.images),
        threads=threads,
        float32=measured(
            0, task.network, before, len(safetensors.torch.save(tensors(task.network)))
        ),
        int8=measured(1, int8, after, path.stat().st_size),
        agreement=(before == after).float().mean().item(),
    )


def train_file(task: Task, path: Path, epochs: int = 3) -> None:
    """Load the quantized parameters, train them with the integer network's values, save them."""
    if task.training is None:
        raise ValueError(f"{task.title} has no images to train with; wanted the task 'lenet'")
    model = fastq.prepare_qat(fastq.load(path))
    train(model, *task.training, epochs, lr=0.002)
    fastq.save(fastq.convert(model), path)


def tensors(network: nn.Module) -> dict[str, Tensor]:
    """The state_dict, tensors only."""
    return {k: v for k, v in network.state_dict().items() if isinstance(v, Tensor)}


def predict(network: nn.Module, images: Tensor) -> Tensor:
    """The class of each image, (n,) int64."""
    with torch.inference_mode():
        return torch.cat([network(batch).argmax(1) for batch in images.split(64)])


def latencies(networks: Sequence[nn.Module], images: Tensor, batch: int) -> list[float]:
    """Median seconds per call of each network, warm, the networks taking turns.

    Each runs at least 5 times, and on until SECONDS have passed. Images repeat where the batch
    wants more than there are.
    """
    x = images[torch.arange(batch) % len(images)]
    runs = [partial(network, x) for network in networks]
    with torch.inference_mode():
        return [1e-6 * time for time in medians(runs, sys.maxsize, SECONDS, least=5)]


def table(comparison: Comparison) -> Table:
    """The comparison as a table for the terminal."""
    result = Table(
        title=f"{comparison.title}: {comparison.images} held-out images, "
        f"{comparison.threads} threads"
    )
    result.add_column("")
    for name in ("float32", "int8", "int8 against float32"):
        result.add_column(name, justify="right")
    for row in comparison.rows():
        result.add_row(*row)
    return result
