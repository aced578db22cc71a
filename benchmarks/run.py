"""`fastq bench --kernels` or `python -m benchmarks.run`: fastq's kernels beside their peers."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks import shapes
from benchmarks.options import Output, Pattern

if TYPE_CHECKING:
    from benchmarks.measure import Row

SUITES: dict[str, tuple[shapes.Shape, ...]] = {
    "goals": (*shapes.GOAL_GEMM, *shapes.NETWORKS["resnet50"], *shapes.MODULES),
    "gemm": shapes.GEMM,
    "conv": shapes.CONV,
    "depthwise": shapes.DEPTHWISE,
    "awkward": shapes.AWKWARD_CONV,
    "elementwise": shapes.ELEMENTWISE,
    "modules": shapes.MODULES,
    # every layer of a network, with the counts that the sums need
    **shapes.WHOLE,
}
EVERYTHING = ("gemm", "conv", "depthwise", "elementwise", "modules")


@click.command()
@click.option(
    "--suite", "suites", type=click.Choice([*SUITES, "all"]), multiple=True, default=["goals"],
    show_default=True, help="Which shapes, repeatable. The name of a network runs its layers and "
    "sums them; all is every shape of the table.",
)  # fmt: skip
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True)
@click.option("--filter", "pattern", type=Pattern(), default="",
              help="Regular expression on the shape's name.")  # fmt: skip
@click.option("--peer", "peer_pattern", type=Pattern(), default="",
              help="Regular expression on the peer's name.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.3, show_default=True,
              help="Of timing, per shape and peer.")  # fmt: skip
@click.option("--csv", "csv_path", type=Output(), help="Write the rows here.")
@click.option("--plot", type=Output(), help="Write a picture here.")
def bench(
    suites: tuple[str, ...],
    threads: int,
    pattern: str,
    peer_pattern: str,
    seconds: float,
    csv_path: Path | None,
    plot: Path | None,
) -> None:
    """Time fastq's kernels beside torch, ONNX Runtime and OpenVINO, each answer checked first.

    Exits with 1 if an answer of fastq was wrong.
    """
    if "all" in suites:
        suites = EVERYTHING
    chosen = [(n, s) for n in suites for s in SUITES[n] if re.search(pattern, s.name)]
    if not chosen:
        names = ", ".join(suites)
        raise click.BadParameter(f"no shape of {names} matches {pattern!r}", param_hint="--filter")
    # OpenMP and MKL read these when torch is imported, so all other imports come after
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(threads)
    # NumPy checks the answers, no more; its threads would spin for a while beside what is timed
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    from benchmarks import goals
    from benchmarks.measure import hold_to_limits, machine, measure, use_threads, write_csv
    from fastq.kernels import peak

    click.echo("\n".join(f"{key:9} {value}" for key, value in machine().items()))
    click.echo(f"threads   {threads}\n{peak.report(threads)}")
    rows: list[Row] = []
    with use_threads(threads):
        for suite, shape in chosen:
            new = measure(
                shape, suite, threads, seconds, lambda name: bool(re.search(peer_pattern, name))
            )
            if not new:
                raise click.BadParameter(f"no peer matches {peer_pattern!r}", param_hint="--peer")
            _print_shape(new)
            rows += new
            hold_to_limits(rows)
            if csv_path:
                write_csv(rows, csv_path)  # after each shape: a long run that stops keeps its rows
        _print_summary(rows)
        if "goals" in suites and not (pattern or peer_pattern):
            click.echo()
            for goal in goals.kernel_goals(rows) + goals.call_goals(seconds):
                click.echo(goal)
    if "goals" in suites and not (pattern or peer_pattern):
        for goal in goals.process_goals():
            click.echo(goal)
    if plot:
        from benchmarks.plot import draw

        draw(rows, plot)
    if any(row.ours and row.failed for row in rows):
        raise click.ClickException("an answer of fastq was wrong, or missing: see above")


def _print_shape(rows: list[Row]) -> None:
    first = rows[0]
    limit = f"{first.macs / 1e6:.2f} MMAC, limit {first.limit:.1f} us"
    click.echo(f"\n{first.shape}  x{first.count}  {limit}")
    for row in sorted(rows, key=lambda r: (r.failed, r.median)):
        if row.failed:
            click.secho(f"  {row.peer:28} {row.check}", fg="red" if row.ours else "yellow")
            continue
        rate = f"{row.gops:8.1f} GOP/s" if row.macs else f"{row.gbps:8.1f} GB/s "
        line = (
            f"  {row.peer:28} {row.median:10.1f} us (min {row.best:10.1f}) {rate} "
            f"{100 * row.share:5.0f} % {row.ratio:6.2f}x  {row.check}"
        )
        click.secho(line, bold=row.ours)


def _print_summary(rows: list[Row]) -> None:
    """Ratios to the best peer in each suite, and the sums over each network."""
    from benchmarks.measure import network_sums, summaries

    for suite in summaries(rows):
        click.echo(f"\n{suite}")
        for row in suite.worst:
            click.echo(f"  {row.ratio:5.2f}x  {100 * row.share:4.0f} %  {row.shape}")
    for network, sums in network_sums(rows).items():
        click.echo(f"\n{network}, sum over its layers")
        for peer, (milliseconds, gops) in sorted(sums.items(), key=lambda item: item[1]):
            click.echo(f"  {peer:28} {milliseconds:9.2f} ms {gops:8.1f} GOP/s")


if __name__ == "__main__":
    bench()
