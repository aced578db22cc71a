"""A picture of a run: each peer under the roofline, and fastq over the best peer of each shape."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib import pyplot as plt

from benchmarks.measure import Row

matplotlib.use("Agg")  # a file, no window


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture; the suffix of `path` is its format (png, svg, pdf)."""
    done = [row for row in rows if not row.failed]
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(14, 6), layout="constrained")
    by_peer: dict[str, list[Row]] = defaultdict(list)
    for row in done:
        by_peer[row.peer].append(row)
    for peer, points in by_peer.items():
        intensity = [2 * row.macs / row.bytes for row in points]
        style = {"s": 40, "zorder": 3} if points[0].ours else {"s": 14, "alpha": 0.6}
        roof.scatter(intensity, [row.gops for row in points], label=peer, **style)
    roof.axhline(done[0].peak_gops, color="black", linewidth=1)
    roof.set(xscale="log", yscale="log", xlabel="operations per byte", ylabel="GOP/s")
    roof.set_title(f"the line: dot products on registers, {done[0].peak_gops:.0f} GOP/s")
    roof.legend(fontsize=7)

    ours = sorted((r for r in done if r.peer == "fastq" and r.ratio == r.ratio), key=_ratio)
    at = np.arange(len(ours))
    bars.barh(at, [row.ratio for row in ours])
    bars.axvline(1, color="black", linewidth=1)
    bars.set_yticks(at, [row.shape for row in ours], fontsize=max(3, 9 - len(ours) // 20))
    bars.set_title("fastq over the best peer of each shape (right of the line: faster)")
    first = done[0]
    figure.suptitle(
        f"{first.cpu}, {first.isa}, {first.threads} thread(s), commit {first.commit}\n"
        f"{first.versions}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _ratio(row: Row) -> float:
    return row.ratio
