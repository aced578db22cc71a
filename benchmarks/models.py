"""`fastq bench --models` or `python -m benchmarks.models`: whole networks beside their peers.

Each network and number of threads has a process of its own: how many threads there are is fixed
when torch is imported, and a peer that crashes takes only its own network along. Within it
everyone is checked, then timed, interleaved.
"""

from __future__ import annotations

import contextlib
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch

import fastq
from benchmarks import networks
from benchmarks.measure import interleave, machine, read_csv, use_threads, write_csv
from benchmarks.model_peers import PEERS, Peer, Subject
from benchmarks.options import Output, Pattern
from fastq.kernels import isa, peak
from fastq.layerwise import ratio
from fastq.layout import Stage
from fastq.packed import PackedWeights
from fastq.plan import plan
from fastq.profiling import memory as memory_of
from fastq.sizes import Shapes

IMAGES_SEED = 1000
PLANS = 3  # of which the fastest counts
SCORED = 16  # images, at least, whose outputs say how exact a peer is


@dataclass
class ModelRow:
    """One peer on one network and batch. Times in milliseconds, NaN if it did not run.

    check        of fastq: its program equals the reference, bit for bit, or how it does not; of
                 others why there is no time.
    snr          decibels of the float32 outputs over what differs from them, of SCORED images:
                 those of one image scatter by more than the peers differ.
    macs         multiply-adds of the whole batch.
    share        of the int8 peak of exact dot products, peak_gops.
    over_int8    the best int8 peer's median / median: above 1 is faster; over_float likewise.
    resident     bytes by which loading the model and running it lets a fresh process grow; 0 is
                 not measured.
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
    resident: int = 0
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
            row.snr = score(peer, subject, threads)
            run, answer = peer.build(subject, threads)
            got = answer(run())
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


def score(peer: Peer, subject: Subject, threads: int) -> float:
    """The signal-to-noise ratio of a peer's outputs, all images of the subject in one batch."""
    batch, subject.batch = subject.batch, len(subject.images)
    try:
        run, answer = peer.build(subject, threads)
        return decibels(subject.expected, answer(run()))
    finally:
        subject.batch = batch


def decibels(want: Any, got: Any) -> float:
    """Signal-to-noise ratio; infinite for the same values."""
    if want.shape != got.shape:
        raise AssertionError(f"answer {got.shape}, wanted {want.shape}")
    signal, noise = (float(np.square(v, dtype=np.float64).sum()) for v in (want, want - got))
    return ratio(signal, noise)


def check(subject: Subject, got: Any) -> None:
    """AssertionError unless the first image's programs give the reference's bits on every tier that
    runs here, and every image of the batch what it gives alone."""
    model = subject.quantized
    bound = model._bound()

    def compute(stage: Stage, inputs: list[Any], shapes: Shapes) -> list[Any]:
        if stage.program < 0:
            return [model.evaluate(stage, inputs, shapes)]
        program = bound[stage.program]
        arrays = model.arrays(program, stage, inputs)
        wanted = program.program.reference(*arrays)
        for tier in isa.runnable():
            with isa.using(tier):
                results = program(*arrays)
            for name, y, want in zip(stage.outputs, results, wanted, strict=True):
                assert np.array_equal(y, want), f"{name} differs from fastq.reference on {tier}"
        return [torch.from_numpy(y) for y in wanted]

    model.walk(compute, (subject.images[:1],), {})
    for i, y in enumerate(got):
        alone = model(subject.images[i : i + 1]).numpy()[0]
        assert np.array_equal(y, alone), f"image {i} alone gives another result than in its batch"


def describe(row: ModelRow, subject: Subject) -> None:
    """What fastq's row says of memory, planning and quantizing."""
    model, x = subject.quantized, subject.x
    held = memory_of(model, x)
    row.arena, row.panels, row.weights = held.arena, held.panels, held.weights
    row.quantize = subject.quantize_seconds
    if len(model.layout.stages) == 1:
        (bound,) = model._bound()
        row.planning = _planning(bound.program, x)


def resident(name: str, peer: str, batch: int, folder: Path) -> int:
    """Bytes of memory, without what files are mapped to, that a peer takes to load and to run a
    model that lies in the folder. For a process of its own, with one thread."""
    for module in ("onnxruntime", "openvino"):  # the library itself does not count
        with contextlib.suppress(ImportError):
            import_module(module)
    network = networks.NETWORKS[name]
    subject = Subject(name, network, folder, networks.images(network, batch, IMAGES_SEED))
    subject.expected = np.load(folder / f"{name}.npy")
    build = {one.name: one.build for one in PEERS}[peer]
    with use_threads(1):
        before = _anonymous()
        if peer == "fastq":
            subject.quantized = fastq.load(folder / f"{name}.safetensors")
        run, _ = build(subject, 1)
        for _ in range(3):
            run()
        return _anonymous() - before


def _anonymous() -> int:
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in x)
    return 1024 * int(line.split()[1])


FROM_FILES = ("fastq", "onnxruntime QDQ", "onnxruntime QOperator", "openvino int8",
              "onnxruntime float32", "openvino float")  # fmt: skip
_RESIDENT = """
import sys, pathlib
from benchmarks.models import resident
print(resident(sys.argv[1], sys.argv[2], int(sys.argv[3]), pathlib.Path(sys.argv[4])))
"""


def fill_resident(rows: Iterable[ModelRow], subject: Subject) -> None:
    """Measure `resident` of the rows whose peers can load a model from a file."""
    fastq.save(subject.quantized, subject.folder / f"{subject.name}.safetensors")
    np.save(subject.folder / f"{subject.name}.npy", subject.expected)
    for row in rows:
        if row.peer in FROM_FILES and not row.failed:
            arguments = [row.network, row.peer, str(row.batch), str(subject.folder)]
            done = _run("-c", _RESIDENT, *arguments, threads=1, capture=True)
            row.resident = 0 if done.returncode else int(done.stdout.split()[-1])


def _run(*arguments: str, threads: int, capture: bool = False) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with so many threads."""
    fixed = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **fixed}, cwd=Path(__file__).parents[1],
        capture_output=capture, text=True,
    )  # fmt: skip


def _planning(program: Any, x: torch.Tensor) -> float:
    """Milliseconds for a plan of inputs like x, weights packed and kernels there."""
    packed = PackedWeights()
    shapes, strides = [tuple(x.shape)], [tuple(4 * n for n in x.stride())]
    times = []
    for _ in range(PLANS + 1):  # the first one packs
        start = time.perf_counter()
        plan(program, shapes, strides, isa.current(), packed)
        times.append(time.perf_counter() - start)
    return 1e3 * min(times[1:])


@click.command()
@click.option("--filter", "pattern", type=Pattern(), default="",
              help="Regular expression on the network's name.")  # fmt: skip
@click.option("--threads", type=click.IntRange(1), multiple=True, default=[1, 2],
              show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--batch", "batches", type=click.IntRange(1), multiple=True, default=[1, 8],
              show_default=True, help="Repeatable.")  # fmt: skip
@click.option("--peer", "peer_pattern", type=Pattern(), default="",
              help="Regular expression on the peer's name.")  # fmt: skip
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=2.0, show_default=True,
              help="Of timing, per network, batch and peer.")  # fmt: skip
@click.option("--csv", "csv_path", type=Output(), help="Write the rows here.")
@click.option("--plot", type=Output(), help="Write a picture here.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False),
              help="Keep the peers' ONNX models here, for the next time.")  # fmt: skip
@click.option("--memory", is_flag=True, help="Measure the memory that each peer takes, too.")
@click.option("--in-process", is_flag=True, help="Here, with OMP_NUM_THREADS as it is, not in "
              "processes of their own.")  # fmt: skip
def bench(
    pattern: str,
    threads: tuple[int, ...],
    batches: tuple[int, ...],
    peer_pattern: str,
    seconds: float,
    csv_path: Path | None,
    plot: Path | None,
    folder: Path | None,
    memory: bool,
    in_process: bool,
) -> None:
    """Time whole networks beside ONNX Runtime, OpenVINO and torch, fastq's answer checked first.

    Exits with 1 if an answer of fastq was wrong.
    """
    names = [name for name in networks.NETWORKS if re.search(pattern, name)]
    if not names:
        known = ", ".join(networks.NETWORKS)
        raise click.BadParameter(f"{pattern!r} matches none of {known}", param_hint="--filter")
    if not any(re.search(peer_pattern, peer.name) for peer in PEERS):
        raise click.BadParameter(f"no peer matches {peer_pattern!r}", param_hint="--peer")
    with tempfile.TemporaryDirectory() as temporary:
        kept = folder or Path(temporary)
        kept.mkdir(parents=True, exist_ok=True)
        rows: list[ModelRow] = []
        for name in names:
            for count in threads:
                if in_process:
                    rows += _network(name, kept, batches, count, seconds, peer_pattern, memory)
                else:
                    part = Path(temporary) / "rows.csv"
                    options = [
                        "--in-process", f"--filter=^{name}$", f"--threads={count}",
                        f"--peer={peer_pattern}", f"--seconds={seconds}", f"--csv={part}",
                        f"--folder={kept}", *(f"--batch={batch}" for batch in batches),
                        *["--memory"] * memory,
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
    done = _run("-m", "benchmarks.models", *options, threads=threads)
    if done.returncode:
        click.secho(f"{' '.join(options)}: exit code {done.returncode}", fg="red")
    return read_csv(part, ModelRow) if part.exists() else []


def _network(
    name: str,
    folder: Path,
    batches: Sequence[int],
    threads: int,
    seconds: float,
    pattern: str,
    with_memory: bool,
) -> list[ModelRow]:
    network = networks.NETWORKS[name]
    images = networks.images(network, max(SCORED, *batches), IMAGES_SEED)
    subject = Subject(name, network, folder, images)
    rows: list[ModelRow] = []
    with use_threads(threads):
        for batch in batches:
            subject.batch = batch
            new = measure(subject, threads, seconds, pattern)
            if with_memory:
                fill_resident(new, subject)
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
        if row.resident:
            line += f"  takes {row.resident / 2**20:.0f} MiB"
        if row.ours:
            line += (
                f"  arena {row.arena / 2**20:.1f} MiB, plan {row.planning:.0f} ms, "
                f"quantize {row.quantize:.1f} s"
            )
        click.secho(line, bold=row.ours)


if __name__ == "__main__":
    bench()
