"""`python -m benchmarks.qat DIR`: what training on the integer program's values gives, beside
calibration alone. DIR is that of `fastq bench --accuracy`.

Training starts from what calibration with the default remedies made. The network learns to give the
float network's outputs on the calibration images, mirrored and shifted: no labels are needed, and
the float network's knowledge is what shall be kept. Batch norms and ranges are frozen: so few
images would only make them worse.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.nn import functional as F

import fastq
from benchmarks.accuracy import IMAGES, load_tasks, measure, quantized
from fastq.remedies import DEFAULT

TRAINING_IMAGES = 2000
BATCH = 64
SHIFT = 4  # pixels, the usual for CIFAR
# Adam's rate: steps of 4 bits are 16 times as wide, so weights have farther to go
RATES = {8: 3e-5, 4: 3e-4}


def varied(images: torch.Tensor) -> torch.Tensor:
    """Half of the images mirrored, and all moved by up to SHIFT pixels, with zeros behind them."""
    mirrored = torch.where(torch.rand(len(images), 1, 1, 1) < 0.5, images.flip(3), images)
    top, left = torch.randint(2 * SHIFT + 1, (2,)).tolist()
    h, w = images.shape[2:]
    return F.pad(mirrored, [SHIFT] * 4)[:, :, top : top + h, left : left + w]


def train(
    teacher: nn.Module, start: nn.Module, data: list[torch.Tensor], rate: float, epochs: int
) -> nn.Module:
    """The integer network `start`, trained to give the teacher's outputs."""
    torch.manual_seed(0)
    model = fastq.prepare_qat(start)
    model.freeze_batch_norm().freeze_ranges()
    images = torch.cat(data)
    steps = epochs * math.ceil(len(images) / BATCH)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=rate, total_steps=steps, pct_start=0.1
    )
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(BATCH):
            x = varied(images[chosen])
            with torch.no_grad():
                wanted = teacher(x)
            loss = F.mse_loss(model(x), wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(x)
        click.echo(f"  epoch {epoch + 1}: squared error {total / len(images):.5f}")
    return fastq.convert(model)


def methods(task: Any, config: fastq.QConfig, epochs: int) -> Iterator[Any]:
    model, rate = task.build(), RATES[config.weight_bits]
    for names in ("none", "+".join(DEFAULT)):
        start = time.perf_counter()
        made = quantized(model, task.calib(IMAGES), names, config)
        yield f"{config.weight_bits} bit {names}", made, time.perf_counter() - start
    start, busy = time.perf_counter(), time.process_time()
    trained = train(model, made, task.calib(TRAINING_IMAGES), rate, epochs)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    click.echo(f"  {seconds:.0f} s, {busy:.0f} s of CPU time")
    yield f"{config.weight_bits} bit QAT, {epochs} epochs", trained, seconds


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, path_type=Path))
@click.option("--network", default="resnet20", show_default=True, help="A task of loaders.py.")
@click.option("--bits", multiple=True, type=click.Choice(["8", "4"]), default=("8", "4"))
@click.option("--epochs", default=6, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Score this many images only.")
def main(folder: Path, network: str, bits: tuple[str, ...], epochs: int, limit: int | None) -> None:
    """Train a network of 8 and of 4 bit weights, and score it beside calibration."""
    task = load_tasks(folder)[network]
    for width in bits:
        config = fastq.QConfig(weight_bits=int(width))
        for result in measure(task, network, limit, methods(task, config, epochs)):
            click.echo(result)


if __name__ == "__main__":
    main()
