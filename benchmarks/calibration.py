"""`python -m benchmarks.calibration`: what calibration costs beside the network's own passes.

Each batch goes through the float network in torch, then through the network that is watched; the
seconds of all batches are compared. `quantize_model` is all of it, with the same data: capture,
calibration, remedies, and the making of the program.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import click
import torch

import fastq
from benchmarks.measure import machine
from benchmarks.networks import NETWORKS, build, images
from fastq.network import prepare_model


def seconds(run: Callable[..., Any], *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


@click.command()
@click.option("--network", type=click.Choice(list(NETWORKS)), default="resnet50", show_default=True)
@click.option("--images", "count", type=click.IntRange(1), default=300, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(network: str, count: int, batch: int, threads: int) -> None:
    """Time calibration beside float32 passes, interleaved."""
    torch.set_num_threads(threads)
    fastq.set_num_threads(threads)
    of = NETWORKS[network]
    model = build(of)
    data = [images(of, batch, seed) for seed in range(-(-count // batch))]
    prepared, _ = prepare_model(model, [data[0]])
    with torch.no_grad():
        model(data[0])
        prepared.observe([data[0]])  # kernels are compiled
        passes = [(seconds(model, x), seconds(prepared.observe, [x])) for x in data]
    floats, watched = (sum(times) for times in zip(*passes, strict=True))
    whole = seconds(lambda: fastq.quantize_model(model, iter(data), progress=False))
    click.echo(
        f"{machine()['cpu']}, {threads} thread(s), commit {machine()['commit']}: {network}, "
        f"{len(data)} batches of {batch}\n"
        f"float32 passes {floats:.2f} s\n"
        f"calibration    {watched:.2f} s, {watched / floats:.2f} times as long\n"
        f"quantize_model {whole:.2f} s, {whole / floats:.2f} times as long"
    )


if __name__ == "__main__":
    main()
