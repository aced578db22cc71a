"""`fastq bench --models` or `python -m benchmarks.models`: whole networks beside their peers.

Each network and number of threads has a process of its own: how many threads there are is fixed
when torch is imported, and a peer that crashes takes only its own network along. Within it
everyone is checked, then timed, interleaved.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

from benchmarks import networks
from benchmarks.measure import interleave, machine, read_csv, use_threads, write_csv
from benchmarks.model_peers import PEERS, Subject
from fastq.kernels import isa, peak
from fastq.nn.network import Stage
from fastq.plan import plan
from fastq.profiling import memory

IMAGES_SEED = 1000
PLANS = 3  # of which the fastest counts


@dataclass
class ModelRow:
    """One peer on one network and batch. Times in milliseconds, NaN if it did not run.

    check        of fastq: its program equals the reference, bit for bit, or how it does not; of
                 others why there is no time.
    snr          decibels of the float32 output over what differs from it.
    macs         multiply-adds of the whole batch.
    share        of the int8 peak of exact dot products, peak_gops.
    over_int8    the best int8 peer's median / median: above 1 is faster; over_float likewise.
    arena, panels, weights   fastq's bytes, as in `fastq.profiling.Memory`.
    planning     fastq's time to plan a new input size, with its kernels compiled.
    quantize     seconds of fastq.quantize_model.
    """

    network: str
    batch: int
    threads: int
    peer: str
    kind: str
    check: str
    macs: int
    snr: float = float("nan")
    median: float = float("nan")
    best: float = float("nan")
    gops: float = float("nan")
    share: float = float("nan")
    over_int8: float = float("nan")
    over_float: float = float("nan")
    arena: int = 0
    panels: int = 0
    weights: int = 0
    planning: float = float("nan")
    quantize: float = float("nan")
    cpu: str = ""
    isa: str = ""
    peak_gops: float = float("nan")
    settings: str = ""
    versions: str = ""
    commit: str = ""

    @property
    def ours(self) -> bool:
        return self.peer == "fastq"

    @property
    def failed(self) -> bool:
        return self.median != self.median


def measure(subject: Subject, threads: int, seconds: float, pattern: str = "") -> list[ModelRow]:
    """The rows of a network at its current batch size, within `use_threads(threads)`."""
    rows, runs = [], {}
    for peer in PEERS:
        if not re.search(pattern, peer.name):
            continue
        row = ModelRow(
            subject.name, subject.batch, threads, peer.name, peer.kind, "",
            subject.batch * subject.macs, **machine(),
        )  # fmt: skip
        rows.append(row)
        try:
            run, answer = peer.build(subject, threads)
            got = answer(run())
            row.snr = decibels(subject.expected[: subject.batch], got)
            if row.ours:
                describe(row, subject)
                check(subject, got)
                row.check = "exact"
            runs[peer.name] = run
        except ImportError as error:
            row.check = f"SKIPPED: {error}"
        except AssertionError as error:
            row.check = f"WRONG: {error}"
        except Exception as error:  # a peer's own refusal of this network, whatever its type
            row.check = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    peak.compute_peak(threads)
    samples = interleave(runs, seconds)
    peak.measure_again(threads)
    for row in rows:
        if row.peer in samples:
            times = samples[row.peer]
            row.median, row.best = 1e3 * statistics.median(times), 1e3 * min(times)
            row.gops = 2e-6 * row.macs / row.median
            row.peak_gops = peak.compute_peak(threads)
            row.share = row.gops / row.peak_gops
    for row in rows:
        row.over_int8, row.over_float = (
            min((r.median for r in rows if r.kind == kind and not (r.ours or r.failed)),
                default=float("nan")) / row.median
            for kind in ("int8", "float")
        )  # fmt: skip
    return rows


def decibels(want: Any, got: Any) -> float:
    """Signal-to-noise ratio; infinite for the same values."""
    if want.shape != got.shape:
        raise AssertionError(f"answer {got.shape}, wanted {want.shape}")
    noise = np.square(want - got, dtype=np.float64).sum()
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(np.square(want, dtype=np.float64).sum() / noise))


def check(subject: Subject, got: Any) -> None:
    """AssertionError unless the first image's programs give the reference's bits, and every image
    of the batch what it gives alone."""
    model = subject.quantized
    bound = model._bound()

    def compute(stage: Stage, inputs: list[Any], batch: int) -> list[Any]:
        if stage.program < 0:
            return [model.evaluate(stage, inputs, batch)]
        program = bound[stage.program]
        arrays = model.arrays(program, stage, inputs)
        results = program(*arrays)
        for name, y, want in zip(
            stage.outputs, results, program.program.reference(*arrays), strict=True
        ):
            assert np.array_equal(y, want), f"{name} differs from fastq.reference"
        return [torch.from_numpy(y) for y in results]

    model.walk(compute, (subject.images[:1],), {})
    for i, y in enumerate(got):
        alone = model(subject.images[i : i + 1]).numpy()[0]
        assert np.array_equal(y, alone), f"image {i} alone gives another result than in its batch"


def describe(row: ModelRow, subject: Subject) -> None:
    """What fastq's row says of memory, planning and quantizing."""
    model, x = subject.quantized, subject.x
    held = memory(model, x)
    row.arena, row.panels, row.weights = held.arena, held.panels, held.weights
    row.quantize = subject.quantize_seconds
    if len(model.layout.stages) == 1:
        (bound,) = model._bound()
        row.planning = _planning(bound.program, x)


def _planning(program: Any, x: torch.Tensor) -> float:
    """Milliseconds for a plan of inputs like x, weights packed and kernels there."""
    packed: dict[Any, Any] = {}
    shapes, strides = [tuple(x.shape)], [tuple(4 * n for n in x.stride())]
    times = []
    for _ in range(PLANS + 1):  # the first one packs
        start = time.perf_counter()
        plan(program, shapes, strides, isa.current(), packed)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


@click.command()
@click.option("--network", "names", type=click.Choice([*networks.NETWORKS]), multiple=True,
              help="Repeatable; all by default.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), multiple=True, default=[1, 2],
              show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=[1, 8],
              show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--peer", default="", help="Regular expression on the peer's name.")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="Of timing, per network, batch and peer.")  # fmt: skip
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the rows here.")
@click.option("--plot", type=click.Path(path_type=Path), help="Write a picture here.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False),
              help="Keep the peers' ONNX models here, for the next time.")  # fmt: skip
@click.option("--in-process", is_flag=True,
              help="Here, with OMP_NUM_THREADS as it is, not in processes of their own.")  # fmt: skip
def bench(
    names: tuple[str, ...],
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    peer: str,
    seconds: float,
    csv_path: Path | None,
    plot: Path | None,
    folder: Path | None,
    in_process: bool,
) -> None:
    """Time whole networks beside ONNX Runtime, OpenVINO and torch, fastq's answer checked first.

    Exits with 1 if an answer of fastq was wrong.
    """
    if not any(re.search(peer, p.name) for p in PEERS):
        raise click.BadParameter(f"no peer matches {peer!r}", param_hint="--peer")
    with tempfile.TemporaryDirectory() as temporary:
        kept = folder or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        rows: list[ModelRow] = []
        for name in names or networks.NETWORKS:
            for count in threads:
                if in_process:
                    rows += _network(name, kept, batches, count, seconds, peer)
                else:
                    part = Path(temporary) / "rows.csv"
                    options = [
                        "--in-process", "--network", name, "--threads", str(count), "--peer", peer,
                        "--seconds", str(seconds), "--csv", str(part), "--folder", str(kept),
                        *(f"--batch={batch}" for batch in batches),
                    ]  # fmt: skip
                    rows += _process(options, count, part)
                if csv_path and rows:
                    write_csv(rows, csv_path)  # a long run that stops keeps its rows
    if plot and rows:
        from benchmarks.plot import draw_models

        draw_models(rows, plot)
    if any(row.ours and row.failed for row in rows) or not rows:
        raise click.ClickException("an answer of fastq was wrong, or missing: see above")


def _process(options: Sequence[str], threads: int, part: Path) -> list[ModelRow]:
    """The rows that a process of its own has written; it prints them."""
    part.unlink(missing_ok=True)
    fixed = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    command = [sys.executable, "-m", "benchmarks.models", *options]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, env={**os.environ, **fixed}, cwd=root)
    if done.returncode:
        click.secho(f"{' '.join(options)}: exit code {done.returncode}", fg="red")
    return read_csv(part, ModelRow) if part.exists() else []


def _network(
    name: str, folder: Path, batches: Sequence[int], threads: int, seconds: float, pattern: str
) -> list[ModelRow]:
    network = networks.NETWORKS[name]
    images = networks.images(network, max(batches), IMAGES_SEED)
    subject = Subject(name, network, folder, images)
    rows: list[ModelRow] = []
    with use_threads(threads):
        for batch in batches:
            subject.batch = batch
            new = measure(subject, threads, seconds, pattern)
            _print(new)
            rows += new
    return rows


def _print(rows: list[ModelRow]) -> None:
    first = rows[0]
    click.echo(
        f"\n{first.network}, batch {first.batch}, {first.threads} thread(s): "
        f"{first.macs / 1e6:.0f} MMAC"
    )
    for row in sorted(rows, key=lambda r: (r.failed, r.median)):
        if row.failed:
            click.secho(f"  {row.peer:22} {row.check}", fg="red" if row.ours else "yellow")
            continue
        line = (
            f"  {row.peer:22} {row.median:8.2f} ms (min {row.best:8.2f}) {row.gops:7.1f} GOP/s "
            f"{row.share:4.0%}  int8 x{row.over_int8:.2f}  float x{row.over_float:.2f}  "
            f"{row.snr:5.1f} dB  {row.check}"
        )
        if row.ours:
            line += (
                f"  arena {row.arena / 2**20:.1f} MiB, plan {row.planning:.0f} ms, "
                f"quantize {row.quantize:.1f} s"
            )
        click.secho(line, bold=row.ours)


if __name__ == "__main__":
    bench()
