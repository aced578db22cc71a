"""Check, then time: every peer of a shape, interleaved in one process, as rows for the table."""

from __future__ import annotations

import contextlib
import csv
import functools
import os
import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import fastq
from benchmarks.peers import check, peers_of, problem_of
from benchmarks.shapes import WHOLE, Shape
from fastq.kernels import isa, peak

ROUNDS = 5
FASTQ = "fastq"  # the row whose ratio is ours; its other rows start with this too
SETTINGS = ("FASTQ_ISA", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY")
R = TypeVar("R")
PACKAGES = ("numpy", "numba", "llvmlite", "torch", "onnxruntime", "openvino")


@dataclass
class Row:
    """One peer on one shape. Times in microseconds; median and best are NaN if it did not run.

    limit       microseconds of the roofline: the tighter of dot products and memory.
    share       limit / median.
    ratio       median of the best peer / median: above 1 is faster than every peer.
    check       what the comparison with fastq.reference said, or why there is no time.
    """

    suite: str
    shape: str
    count: int
    peer: str
    check: str
    threads: int
    macs: int
    bytes: int
    limit: float = float("nan")
    median: float = float("nan")
    best: float = float("nan")
    gops: float = float("nan")
    gbps: float = float("nan")
    share: float = float("nan")
    ratio: float = float("nan")
    cpu: str = ""
    isa: str = ""
    peak_gops: float = float("nan")
    settings: str = ""
    versions: str = ""
    commit: str = ""

    @property
    def ours(self) -> bool:
        return self.peer.startswith(FASTQ)

    @property
    def failed(self) -> bool:
        return self.median != self.median


@functools.cache
def machine() -> dict[str, Any]:
    """What a number means nothing without: CPU, instruction set, versions, commit."""
    return {
        "cpu": _cpu(),
        "isa": isa.current(),
        "settings": " ".join(f"{k}={os.environ[k]}" for k in SETTINGS if k in os.environ),
        "versions": " ".join([f"python {platform.python_version()}", *map(_version, PACKAGES)]),
        "commit": _commit(),
    }


def _cpu() -> str:
    info: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            info.setdefault(key.strip(), value.strip())
    if "model name" not in info:
        return platform.processor() or platform.machine()
    return f"{info['model name']} (family {info.get('cpu family')} model {info.get('model')})"


def _version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"{package} absent"


def _commit() -> str:
    def git(*args: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(
            ["git", *args], cwd=root, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        dirty = git("status", "--porcelain", "--untracked-files=no", "--", "../fastq")
        return git("rev-parse", "--short", "HEAD") + ("+changes" if dirty else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


@contextlib.contextmanager
def use_threads(threads: int) -> Iterator[None]:
    """The same number of threads for everyone, and torch without autograd."""
    import torch

    before = torch.get_num_threads(), fastq.get_num_threads()
    torch.set_num_threads(threads)
    fastq.set_num_threads(threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(before[0])
        fastq.set_num_threads(before[1])


def interleave(runs: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call: each gets `seconds` in all, in ROUNDS turns.

    A turn starts untimed, until the caches are this one's and the previous one's threads have
    stopped spinning. A call that takes ten times as long as that is timed once, before all turns.
    """
    clock = time.perf_counter
    samples: dict[str, list[float]] = {}
    for name, run in runs.items():
        start = clock()
        run()
        once = clock() - start
        samples[name] = [once] if once > 10 * seconds else []
    turns = [name for name in runs if not samples[name]]
    for _ in range(ROUNDS):
        for name in turns:
            run = runs[name]
            end = clock() + 0.2 * seconds / ROUNDS
            run()
            while clock() < end:
                run()
            end = clock() + seconds / ROUNDS
            now = 0.0
            while now < end:
                start = clock()
                run()
                now = clock()
                samples[name].append(now - start)
    return samples


def measure(
    shape: Shape,
    suite: str,
    threads: int,
    seconds: float,
    only: Callable[[str], bool] = lambda peer: True,
) -> list[Row]:
    """The rows of one shape, within `use_threads(threads)`. A peer that failed has no times."""
    problem, rows, runs = problem_of(shape), [], {}
    for peer in peers_of(shape):
        if not only(peer.name):
            continue
        row = Row(
            suite, shape.name, shape.count, peer.name, "", threads, shape.macs, shape.bytes,
            **machine(),
        )  # fmt: skip
        rows.append(row)
        try:
            built = peer.build(problem, threads)
            row.check = check(peer, problem, built, threads)
            runs[peer.name] = built[0]
        except ImportError as error:
            row.check = f"SKIPPED: {error}"
        except AssertionError as error:
            row.check = f"WRONG: {error}"
        except Exception as error:  # a peer's own refusal of this shape, whatever its type
            row.check = f"FAILED: {type(error).__name__}: {str(error).splitlines()[0]}"
    samples = interleave(runs, seconds)
    for row in rows:
        if row.peer in samples:
            times = samples[row.peer]
            row.median, row.best = 1e6 * statistics.median(times), 1e6 * min(times)
            row.gops = 2e-3 * row.macs / row.median
            row.gbps = 1e-3 * row.bytes / row.median
    best_peer = min((r.median for r in rows if not (r.ours or r.failed)), default=float("nan"))
    for row in rows:
        row.ratio = best_peer / row.median
    peak.measure_again(threads)
    hold_to_limits(rows)
    return rows


def hold_to_limits(rows: Iterable[Row]) -> None:
    """Fill in what depends on the machine's limits, as far as they are known by now."""
    for row in rows:
        row.peak_gops = peak.compute_peak(row.threads)
        row.limit = 1e6 * peak.limit_seconds(row.macs, row.bytes, row.threads)
        row.share = row.limit / row.median


@dataclass
class Summary:
    """fastq over the best peer of each shape in a suite; `worst` has the lowest ratios."""

    suite: str
    mean: float
    slower: int
    shapes: int
    worst: list[Row]

    def __str__(self) -> str:
        return (
            f"{self.suite}: {self.mean:.2f}x the best peer of each shape, geometric mean; "
            f"{self.slower} of {self.shapes} shapes slower. The lowest:"
        )


def first_of_ours(rows: Iterable[Row]) -> list[Row]:
    """One row for each suite and shape that has a peer: of several of ours, the first."""
    first: dict[tuple[str, str], Row] = {}
    for row in rows:
        if row.ours and row.ratio == row.ratio:
            first.setdefault((row.suite, row.shape), row)
    return list(first.values())


def summaries(rows: Iterable[Row], worst: int = 5) -> list[Summary]:
    """One for each suite."""
    suites: dict[str, list[Row]] = defaultdict(list)
    for row in first_of_ours(rows):
        suites[row.suite].append(row)
    found = []
    for suite, ours in suites.items():
        mean = statistics.geometric_mean(row.ratio for row in ours)
        slower = sum(row.ratio < 1 for row in ours)
        ours.sort(key=lambda row: row.ratio)
        found.append(Summary(suite, mean, slower, len(ours), ours[:worst]))
    return found


def network_sums(rows: Iterable[Row]) -> dict[str, dict[str, tuple[float, float]]]:
    """{network: {peer: (milliseconds, GOP/s)}}: whole networks, peers that did every layer."""
    times: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if not row.failed:
            times[row.peer][row.shape] = row
    sums: dict[str, dict[str, tuple[float, float]]] = defaultdict(dict)
    for network, layers in WHOLE.items():
        macs = sum(layer.count * layer.macs for layer in layers)
        for peer, by_shape in times.items():
            if all(layer.name in by_shape for layer in layers):
                ms = 1e-3 * sum(layer.count * by_shape[layer.name].median for layer in layers)
                sums[network][peer] = ms, 2e-6 * macs / ms
    return dict(sums)


def write_csv(rows: Sequence[Any], path: Path) -> None:
    """Rows of one dataclass."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(rows[0])], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            values = asdict(row)
            writer.writerow(
                {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in values.items()}
            )


def read_csv(path: Path, kind: type[R]) -> list[R]:
    """The rows of a dataclass again."""
    kinds: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "str": str}
    with path.open(newline="") as file:
        return [
            kind(**{f.name: kinds[str(f.type)](record[f.name]) for f in fields(kind)})  # type: ignore[arg-type]
            for record in csv.DictReader(file)
        ]
