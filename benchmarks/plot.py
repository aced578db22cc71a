"""A picture of a run: how near the limit each shape comes, and fastq over the best peer of each."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import ScalarFormatter

from benchmarks.measure import Row, first_of_ours, summaries
from benchmarks.models import ModelRow

matplotlib.use("Agg")  # a file, no window

NAMED = 60  # shapes: so many have a bar with their name, more are a curve for each suite
OURS, PEER = "#0b6e4f", "#b0b7bf"


def draw(rows: list[Row], path: Path) -> None:
    """Write the picture; the suffix of `path` is its format (png, svg, pdf)."""
    done = [row for row in rows if not row.failed]
    ours = sorted(first_of_ours(done), key=lambda row: row.ratio)
    size = (14, 6.5 if len(ours) > NAMED else max(5, 2 + 0.19 * len(ours)))
    figure, (share, ratio) = plt.subplots(1, 2, figsize=size, layout="constrained")
    _shares(share, done, ours)
    if len(ours) > NAMED:
        _curves(ratio, ours)
    else:
        _bars(ratio, ours)
    for axes in share, ratio:
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"{done[0].cpu}, {done[0].isa}, {done[0].threads} thread(s), commit {done[0].commit}\n"
        f"{done[0].versions}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _shares(axes: Any, done: list[Row], ours: list[Row]) -> None:
    """Each shape by its work: fastq, and the fastest peer that it is compared with."""
    best: dict[str, Row] = {}
    for row in done:
        if not row.ours and (row.shape not in best or row.median < best[row.shape].median):
            best[row.shape] = row
    pairs = [(row, best.get(row.shape)) for row in ours if row.macs]
    for row, peer in pairs:
        if peer:
            axes.plot([row.macs] * 2, [row.share, peer.share], color=PEER, linewidth=0.7, zorder=1)
    peers = [peer for _, peer in pairs if peer]
    axes.scatter([p.macs for p in peers], [p.share for p in peers], s=16, color=PEER,
                 label="fastest peer", zorder=2)  # fmt: skip
    axes.scatter([r.macs for r, _ in pairs], [r.share for r, _ in pairs], s=22, color=OURS,
                 label="fastq", zorder=3)  # fmt: skip
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(0, None), xlabel="multiply-adds of the shape")
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_title(
        f"share of the roofline: {done[0].peak_gops:.0f} GOP/s of exact dot products, or memory",
        fontsize=10,
    )
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def _ratio_axis(axis: Any) -> None:
    axis.set_major_formatter(ScalarFormatter())
    axis.set_minor_formatter(
        lambda value, _: f"{value:g}" if value in (0.2, 0.3, 0.5, 2, 3, 5) else ""
    )


def _bars(axes: Any, ours: list[Row]) -> None:
    at = np.arange(len(ours))
    colors = [OURS if row.ratio >= 1 else "#c8553d" for row in ours]
    axes.barh(at, [row.ratio - 1 for row in ours], left=1, color=colors, height=0.7)
    axes.set_yticks(at, [row.shape for row in ours], fontsize=7)
    for y, row in zip(at, ours, strict=True):
        text = f" {row.ratio:.2f} "
        align = "left" if row.ratio >= 1 else "right"
        axes.text(row.ratio, y, text, fontsize=6.5, va="center", ha=align)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(-0.7, len(ours) - 0.3))
    axes.margins(x=0.12)
    _ratio_axis(axes.xaxis)
    axes.set_title("times as fast as the fastest peer of each shape", fontsize=10)


def _curves(axes: Any, ours: list[Row]) -> None:
    """Of each suite the sorted ratios, over the share of its shapes; the lowest by name."""
    by_suite: dict[str, list[Row]] = defaultdict(list)
    for row in ours:
        by_suite[row.suite].append(row)
    means = {summary.suite: summary for summary in summaries(ours)}
    for suite, rows in by_suite.items():
        mean = means[suite]
        label = f"{suite}: {mean.mean:.2f}x in the mean, {mean.slower} of {mean.shapes} slower"
        at = (np.arange(len(rows)) + 0.5) / len(rows)
        axes.plot(at, [row.ratio for row in rows], marker=".", linewidth=1, label=label)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set(yscale="log", xlabel="share of the suite's shapes, slowest first")
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    _ratio_axis(axes.yaxis)
    lowest = "\n".join(f"{row.ratio:.2f}  {row.shape}" for row in ours[:8])
    axes.text(0.62, 0.02, f"the lowest\n{lowest}", transform=axes.transAxes, fontsize=7.5,
              ha="left", va="bottom", family="monospace")  # fmt: skip
    axes.set_title("times as fast as the fastest peer of each shape", fontsize=10)
    axes.legend(frameon=False, loc="upper left", fontsize=9)


def draw_models(rows: list[ModelRow], path: Path) -> None:
    """Write a picture of whole networks: a column for each batch size and number of threads."""
    cells: dict[tuple[int, int], list[ModelRow]] = defaultdict(list)
    for row in rows:
        if row.ours and not row.failed:
            cells[row.batch, row.threads].append(row)
    names = list(dict.fromkeys(row.network for row in rows))
    at = {name: -y for y, name in enumerate(names)}
    size = (3 + 3.5 * len(cells), 1.8 + 0.32 * len(names))
    figure, columns = plt.subplots(
        1, max(len(cells), 1), figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for axes, ((batch, threads), ours) in zip(columns[0], sorted(cells.items()), strict=False):
        y = [at[row.network] for row in ours]
        int8 = np.array([row.over_int8 for row in ours])
        colors = [OURS if ratio >= 1 else "#c8553d" for ratio in int8]
        axes.barh(y, int8 - 1, left=1, color=colors, height=0.6, label="best int8 peer")
        axes.scatter([row.over_float for row in ours], y, s=18, color=PEER, zorder=3,
                     label="best float peer")  # fmt: skip
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set(xscale="log", title=f"batch {batch}, {threads} thread(s)")
        axes.set_yticks(list(at.values()), list(at), fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        _ratio_axis(axes.xaxis)
    columns[0][0].legend(frameon=False, fontsize=8, loc="lower right")
    figure.suptitle(
        f"fastq: times as fast as the best peer. {rows[0].cpu}, {rows[0].isa}, commit "
        f"{rows[0].commit}\n{rows[0].versions}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
