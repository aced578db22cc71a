"""`fastq bench --tiles` or `python -m benchmarks.tiles`: how good the choice of a tile is.

Every shape of the table runs on every tile of the instruction set; the model in
fastq/kernels/tiles.py chose one of them without running any.
"""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np

from benchmarks.measure import interleave, machine, use_threads
from benchmarks.options import Output, Pattern
from benchmarks.peers import ZERO_POINT, Problem
from benchmarks.shapes import CONV, DEPTHWISE, GEMM, Conv, Gemm
from fastq import ops
from fastq.kernels import executor, isa
from fastq.kernels.assembly import kernel_at, name_of
from fastq.kernels.gemm import Tile
from fastq.kernels.tiles import only, product_tiles, tiles_of

WITHIN = 1.05  # times the best tile's time is as good as the best
REPEATS = 4


class Choice(NamedTuple):
    """Microseconds of each tile on a shape, and the model's choice."""

    shape: str
    times: dict[Tile, float]
    chosen: Tile

    @property
    def best(self) -> Tile:
        return min(self.times, key=self.times.__getitem__)

    @property
    def loss(self) -> float:
        """The chosen tile's time over the best one's."""
        return self.times[self.chosen] / self.times[self.best]


def choice(shape: Gemm | Conv, seconds: float) -> Choice | None:
    """Runs a shape on each tile, interleaved; the least time of each. None if it takes none.

    A loss is measured again before it is believed: the machine may have been busy.
    """
    problem = Problem(shape)
    runs: dict[Tile, Callable[[], Any]] = {}
    for tile in _candidates(shape):
        with only(tile):
            runs[tile] = _call(problem)
    with executor.recording() as recorded:
        _call(problem)
    kernel = kernel_at(int(recorded[0].table.rows[-1, executor.KERNEL]))
    chosen = next((tile for tile in runs if str(tile) == name_of(kernel).split()[0]), None)
    if chosen is None:  # none of these, but Winograd's
        return None
    found = Choice(shape.name, _least(runs, seconds), chosen)
    for _ in range(REPEATS):
        if found.loss <= WITHIN:
            break
        again = _least(runs, seconds)
        found = found._replace(times={n: min(us, again[n]) for n, us in found.times.items()})
    return found


def _least(runs: dict[Tile, Callable[[], Any]], seconds: float) -> dict[Tile, float]:
    """Microseconds of each, interleaved: the least."""
    samples = interleave({str(tile): run for tile, run in runs.items()}, seconds)
    return {tile: 1e6 * min(samples[str(tile)]) for tile in runs}


def _candidates(shape: Gemm | Conv) -> tuple[Tile, ...]:
    depthwise = isinstance(shape, Conv) and shape.depthwise and shape.n == shape.c
    tier = isa.current()
    return tiles_of(tier, "depthwise") if depthwise else product_tiles(tier)


def _call(problem: Problem) -> Callable[[], Any]:
    """A call of the shape, run once: on a weight of its own, which is packed at that."""
    op, x, requant = problem.op(ops), problem.x, problem.requant
    weight, out = problem.pack(), np.empty(problem.y_shape, np.uint8)

    def run() -> Any:
        return op(x, weight, requant, x_zero_point=ZERO_POINT, out=out)

    run()
    return run


@click.command()
@click.option("--filter", "pattern", type=Pattern(), default="",
              help="Regular expression on the shape's name.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=0.05, show_default=True,
              help="Of timing, per shape and tile.")  # fmt: skip
@click.option("--csv", "csv_path", type=Output(), help="Write all times here.")
def bench(pattern: str, seconds: float, csv_path: Path | None) -> None:
    """Time every tile on every shape, and say how far the model's choice is from the best."""
    shapes = [
        shape
        for shape in (*GEMM, *CONV, *DEPTHWISE)
        if re.search(pattern, shape.name) and len(_candidates(shape)) > 1
    ]
    if not shapes:
        raise click.BadParameter(
            f"no shape with a choice of tiles matches {pattern!r}", param_hint="--filter"
        )
    click.echo(f"{machine()['cpu']}, {machine()['isa']}, commit {machine()['commit']}")
    choices = []
    for shape in shapes:
        with use_threads(1):
            found = choice(shape, seconds)
        if found is None:
            continue
        choices.append(found)
        times = "  ".join(f"{str(t).split('_')[2]} {us:.1f}" for t, us in found.times.items())
        click.echo(f"{found.loss:5.2f}  {found.shape:44} {times} us")
    _report(choices)
    if csv_path:
        with csv_path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["shape", "tile", "us", "chosen"])
            for c in choices:
                writer.writerows(
                    [c.shape, t, f"{us:.6g}", t == c.chosen] for t, us in c.times.items()
                )


def _report(choices: list[Choice]) -> None:
    losses = np.array([c.loss for c in choices])
    good = np.count_nonzero(losses <= WITHIN)
    click.echo(
        f"\nthe model's choice is within 5 % of the best tile on {good} of {len(losses)} shapes; "
        f"loss in the mean {losses.mean():.3f}x, 90th percentile {np.percentile(losses, 90):.3f}x, "
        f"largest {losses.max():.2f}x. The worst:"
    )
    for c in sorted(choices, key=lambda c: -c.loss)[:10]:
        click.echo(f"{c.loss:5.2f}  {c.shape:44} chose {c.chosen}, best {c.best}")
    for tile, count in Counter(c.chosen for c in choices).items():
        best = sum(c.best == tile for c in choices)
        click.echo(f"{tile}: chosen {count} times, best {best} times")


if __name__ == "__main__":
    bench()
