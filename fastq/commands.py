"""The subcommands of `fastq`, a function each. What is heavy is imported when a command runs."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import click

import fastq
from fastq.cli import extra


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastq.__version__, prog_name="fastq")
def cli() -> None:
    """int8 inference for PyTorch on the CPU."""


@cli.command()
@click.option(
    "--network",
    type=click.Choice(["lenet", "efficientnet-lite0"]),
    default="lenet",
    show_default=True,
    help="lenet is trained here, in seconds; efficientnet-lite0 comes trained on ImageNet.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Where to save the int8 parameters.  [default: a new temporary directory]",
)
@extra("demo")
def demo(network: str, output: Path | None) -> None:
    """Quantize a real network, save it, load it back, and compare it with float32."""
    if output and not output.parent.is_dir():
        raise click.BadParameter(f"there is no folder {output.parent}", param_hint="--output")

    from rich.console import Console

    from fastq.demo import TASKS, compare, table

    task = TASKS[network]()
    path = output or Path(tempfile.mkdtemp(prefix="fastq-")) / f"{network}-int8.safetensors"
    comparison = compare(task, path)
    click.echo(f"int8 parameters: {path}")
    Console().print(table(comparison))


@cli.command()
@click.option("--network", help="Only what such networks use: bert, resnet50 or mobilenet.")
@click.option("--isa", help="Another instruction set than the fastest, as FASTQ_ISA names it.")
def warmup(network: str | None, isa: str | None) -> None:
    """Compile the kernels now, into the disk cache, not at their first use."""
    from tqdm import tqdm

    try:
        done = fastq.warmup(network, isa=isa, progress=partial(tqdm, unit="kernel"))
    except (ValueError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(done)
