"""`python -m benchmarks.calibration`: what calibration costs beside the network's own passes.

Each batch goes through the float network in torch, then through the network that is watched; the
seconds of all batches are compared. Ranges, remedies and the making of the program come after that:
`quantize_model` is the whole, with the same data.
"""

from __future__ import annotations

import time
from typing import Any

import click
import torch

import fastq
from benchmarks.measure import machine, use_threads
from benchmarks.networks import NETWORKS, images
from fastq.network import prepare_model


def seconds(run: Any, *arguments: Any) -> float:
    start = time.perf_counter()
    run(*arguments)
    return time.perf_counter() - start


@click.command()
@click.option("--network", default="resnet50", show_default=True, help="As fastq bench --models.")
@click.option("--images", "count", default=300, show_default=True)
@click.option("--batch", default=10, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
def main(network: str, count: int, batch: int, threads: int) -> None:
    """Time calibration beside float32 passes, interleaved."""
    of = NETWORKS[network]
    model = of.build().eval()
    data = [images(of, batch, seed) for seed in range(count // batch)]
    click.echo(f"{machine()['cpu']}, {threads} thread(s), {network}, {len(data)} x {batch} images")
    with use_threads(threads), torch.no_grad():
        prepared = prepare_model(model, [data[0]])
        for warm in (model, lambda x: prepared.observe([x])):
            warm(data[0])
        passes = [(seconds(model, x), seconds(prepared.observe, [x])) for x in data]
        floats, watched = (sum(times) for times in zip(*passes, strict=True))
        whole = seconds(lambda: fastq.quantize_model(model, iter(data), progress=False))
    click.echo(f"float32 passes {floats:.2f} s")
    click.echo(f"calibration    {watched:.2f} s, {watched / floats:.2f} times as long")
    click.echo(f"quantize_model {whole:.2f} s, {whole / floats:.2f} times as long")


if __name__ == "__main__":
    main()
