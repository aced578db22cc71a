"""The subcommands of `fastq`, a function each. What is heavy is imported when a command runs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import fastq
from fastq.cli import extra


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fastq.__version__, prog_name="fastq")
def cli() -> None:
    """int8 inference for PyTorch on the CPU."""


def network_option(text: str) -> Callable[..., Any]:
    """Which of the demo's networks a command takes."""
    choice = click.Choice(["lenet", "efficientnet-lite0"])
    return click.option("--network", type=choice, default="lenet", show_default=True, help=text)


def output_option(text: str, default: str | None = None) -> Callable[..., Any]:
    """The file that a command writes; refused before its work if the folder is missing."""

    def check(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
        if path and not path.parent.is_dir():
            raise click.BadParameter(f"there is no folder {path.parent}")
        return path

    return click.option(
        "--output", type=click.Path(dir_okay=False, writable=True, path_type=Path), callback=check,
        default=default, show_default=True, help=text,
    )  # fmt: skip


@cli.command()
@network_option("lenet is trained here, in seconds; efficientnet-lite0 comes trained on ImageNet.")
@output_option("Where to save the int8 parameters.  [default: a new temporary directory]")
@click.option("--qat", is_flag=True, help="Train the quantized lenet as well: load, train, save.")
@extra("demo")
def demo(network: str, output: Path | None, qat: bool) -> None:
    """Quantize a real network, save it, load it back, and compare it with float32."""
    if qat and network != "lenet":
        raise click.BadParameter(
            f"there is nothing here to train {network} with", param_hint="--qat"
        )

    from rich.console import Console

    from fastq.demo import TASKS, compare, table

    task = TASKS[network]()
    path = output or Path(tempfile.mkdtemp(prefix="fastq-")) / f"{network}-int8.safetensors"
    comparison = compare(task, path, qat=qat)
    click.echo(f"int8 parameters: {path}")
    Console().print(table(comparison))


@cli.command()
@network_option("The demo's networks and images; fastq.report(...) takes your own.")
@output_option("The HTML file; the same as Markdown is written beside it.", "report.html")
@extra("demo")
def report(network: str, output: Path) -> None:
    """Write down what int8 costs a real network and gives it, layer by layer."""
    if output.suffix == ".md":
        raise click.BadParameter(
            f"{output} is the Markdown's; wanted a .html beside it", param_hint="--output"
        )

    from fastq.demo import TASKS

    task = TASKS[network]()
    fastq.report(
        task.network,
        fastq.quantize_model(task.network, task.calibration),
        task.images.split(32),
        labels=task.labels,
        path=output,
        title=f"{task.title}: int8 beside float32",
    )
    click.echo(f"{output}\n{output.with_suffix('.md')}")


@cli.command(
    context_settings={"ignore_unknown_options": True}, add_help_option=False, no_args_is_help=True
)
@click.option("--kernels", is_flag=True, help="Kernels, other people's shapes.")
@click.option("--models", is_flag=True, help="Whole networks.")
@click.option("--accuracy", is_flag=True, help="Real networks, from a folder.")
@click.option("--tiles", is_flag=True, help="How good the choice of a tile is.")
@click.argument("options", nargs=-1, type=click.UNPROCESSED, metavar="...")
@click.pass_context
@extra("bench")
def bench(context: click.Context, /, options: tuple[str, ...], **chosen: bool) -> None:
    """Time fastq beside other libraries, or score it, in a clone of the repository.

    `fastq bench --kernels --help` lists the options that may follow.
    """
    asked = [name for name, given in chosen.items() if given]
    if not asked and set(options) & set(context.help_option_names):
        click.echo(context.get_help())  # with what to measure, it is that benchmark's
        return
    if len(asked) > 1:
        both = " and ".join(f"--{name}" for name in asked)
        raise click.UsageError(f"got {both}; wanted one of them: run it for each")
    if not asked:
        raise click.UsageError(
            f"got {' '.join(options)}; what to measure comes first: fastq bench --kernels ..."
        )
    root = Path(fastq.__file__).parents[1]
    if not (root / "pyproject.toml").is_file() or not (root / "benchmarks").is_dir():
        sys.exit(
            "fastq: the benchmarks are not installed with the package; in a clone of its "
            'repository, pip install -e ".[bench]" and run this again'
        )
    sys.path.insert(0, str(root))
    (what,) = asked
    rooms = {"kernels": "run", "models": "models", "accuracy": "accuracy", "tiles": "tiles"}
    module = import_module(f"benchmarks.{rooms[what]}")
    module.bench.main(args=list(options), prog_name=f"{context.command_path} --{what}")


@cli.command()
@click.option("--network", help="Only what such networks use: bert, resnet50, mobilenet or lstm.")
@click.option("--isa", help="Another instruction set than the fastest, as FASTQ_ISA names it.")
def warmup(network: str | None, isa: str | None) -> None:
    """Compile the kernels now, into the disk cache, not at their first use."""
    from tqdm import tqdm

    try:
        done = fastq.warmup(network, isa=isa, progress=partial(tqdm, unit="kernel"))
    except (ValueError, RuntimeError) as error:
        raise click.UsageError(str(error)) from error
    click.echo(done)
