"""`python -m benchmarks.readme_table results.csv`: measured tables, from the CSVs.

Of a CSV of `benchmarks.run` the table of kernels, of `benchmarks.models` that of networks, of
`benchmarks.accuracy` that of accuracy. The place of `results.csv` in a file is between the lines
`<!-- results:begin -->` and `<!-- results:end -->`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from pathlib import Path

import click

from benchmarks.accuracy import Result
from benchmarks.measure import Row, network_sums, read_csv
from benchmarks.models import ModelRow
from benchmarks.shapes import WHOLE
from fastq.remedies import DEFAULT

# column, and the peers of which it shows the best
COLUMNS = {
    "fastq": ("fastq", "fastq int32", "fastq.QLinear"),
    "torch int8": (
        "torch._int_mm", "torch onednn", "torch fbgemm", "torch x86",
        "torch dynamic onednn", "torch dynamic fbgemm", "torch dynamic x86",
    ),
    "ONNX Runtime int8": (
        "onnxruntime QLinearMatMul", "onnxruntime MatMulInteger", "onnxruntime QLinearConv",
        "onnxruntime dynamic",
    ),
    "OpenVINO int8": ("openvino int8",),
    "float32, the best": ("torch float32", "onnxruntime float32", "openvino float32"),
}  # fmt: skip
MODEL_COLUMNS = {
    "ONNX Runtime int8": ("onnxruntime QDQ", "onnxruntime QOperator"),
    "OpenVINO int8": ("openvino int8", "openvino nncf"),
    "torch int8": ("torch onednn", "torch x86"),
    "float, the best": (
        "onnxruntime float32", "openvino float", "torch float32", "torch channels_last",
    ),
}  # fmt: skip
BY_DEFAULT = f"fastq {'+'.join(DEFAULT)}"
TITLES = {"goal": "GEMM", "module": "QLinear, float in and out, dynamic,"}


def table(rows: list[Row]) -> str:
    """Markdown: what was measured on what, then a line per shape or network. Milliseconds."""
    first = rows[0]
    lines = [
        f"{first.cpu}, {first.isa}, {first.threads} thread(s), commit {first.commit}; "
        f"{first.versions}{'; ' + first.settings if first.settings else ''}. "
        "Medians in milliseconds; in brackets the share of the roofline: "
        f"{first.peak_gops:.0f} GOP/s of exact dot products on registers, or reading memory.",
        "",
        f"| M x N x K | {' | '.join(COLUMNS)} | over the best |",
        f"|---|{'---:|' * (len(COLUMNS) + 1)}",
    ]
    by_shape: dict[str, dict[str, Row]] = defaultdict(dict)
    for row in rows:
        if not row.failed:
            by_shape[row.shape][row.peer] = row
    for shape, peers in by_shape.items():
        group, _, size = shape.partition("/")
        if group not in WHOLE:
            limit = 1e-3 * next(iter(peers.values())).limit
            times = {name: 1e-3 * row.median for name, row in peers.items()}
            lines.append(_line(f"{TITLES.get(group, group)} {size}", times, limit))
    limits = {row.shape: row.limit for row in rows}
    for network, sums in network_sums(rows).items():
        layers = WHOLE[network]
        limit = 1e-3 * sum(layer.count * limits[layer.name] for layer in layers)
        title = f"{network}, its {sum(layer.count for layer in layers)} layers in sum"
        lines.append(_line(title, {name: ms for name, (ms, _) in sums.items()}, limit))
    return "\n".join(lines)


def _line(title: str, times: dict[str, float], limit: float) -> str:
    best = {
        column: min((times[p] for p in peers if p in times), default=None)
        for column, peers in COLUMNS.items()
    }
    cells = ["-" if ms is None else f"{ms:.3g}" for ms in best.values()]
    ours = best["fastq"]
    theirs = [ms for column, ms in best.items() if column != "fastq" and ms is not None]
    ratio = "-"
    if ours is not None:
        cells[0] = f"**{cells[0]}** ({100 * limit / ours:.0f} %)"
        if theirs:
            ratio = f"{min(theirs) / ours:.2f}x"
    return f"| {title} | {' | '.join(cells)} | {ratio} |"


def models_table(rows: list[ModelRow]) -> str:
    """Markdown: what was measured on what, then a line per network, batch and threads."""
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    lines = [
        f"{first.cpu}, {first.isa}, commit {commits}; {first.versions}"
        f"{'; ' + first.settings if first.settings else ''}. Medians in milliseconds; in brackets "
        f"the share of {first.peak_gops:.0f} GOP/s a thread, the peak of exact dot products. "
        "Arena: the memory of all values between the layers, in MiB.",
        "",
        f"| network | batch | threads | fastq | {' | '.join(MODEL_COLUMNS)} | over int8 "
        "| over float | arena |",
        f"|---|{'---:|' * (len(MODEL_COLUMNS) + 6)}",
    ]
    cells: dict[tuple[str, int, int], dict[str, ModelRow]] = defaultdict(dict)
    for row in rows:
        cells[row.network, row.batch, row.threads][row.peer] = row
    for (network, batch, threads), peers in cells.items():
        ours = peers.get("fastq")
        if ours is None or ours.failed:
            continue
        best = [
            min((peers[p].median for p in names if p in peers and not peers[p].failed),
                default=None)
            for names in MODEL_COLUMNS.values()
        ]  # fmt: skip
        shown = ["-" if ms is None else f"{ms:.3g}" for ms in best]
        ratios = [
            "-" if ratio != ratio else f"{ratio:.2f}x"
            for ratio in (ours.over_int8, ours.over_float)
        ]
        lines.append(
            f"| {network} | {batch} | {threads} | **{ours.median:.3g}** ({100 * ours.share:.0f} %) "
            f"| {' | '.join(shown)} | {' | '.join(ratios)} | {ours.arena / 2**20:.2f} |"
        )
    return "\n".join(lines)


def accuracy_table(rows: list[Result]) -> str:
    """Markdown: what was measured on what, then a line per network and method."""
    first = rows[0]
    commits = ", ".join(dict.fromkeys(row.commit for row in rows))
    lines = [
        f"{first.cpu}, {first.isa}, commit {commits}; {first.versions}.",
        "",
        "| network | method | metric | int8 | float32 | same prediction | SNR of the outputs |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        same = "-" if math.isnan(row.agreement) else f"{row.agreement:.2f} %"
        name = row.method.replace(BY_DEFAULT, "**fastq**")
        lines.append(
            f"| {row.network} | {name} | {row.metric} | {row.score:.2f} | {row.float32:.2f} "
            f"| {same} | {row.snr:.1f} dB |"
        )
    return "\n".join(lines)


def put(text: str, new: str, name: str) -> str:
    """`text` with `new` between the two lines of this name; ValueError where there is not one of
    each."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"wanted one line {begin} and after it one line {end}")
    before, rest = text.split(begin)
    return f"{before}{begin}\n{new}\n{end}{rest.split(end)[1]}"


@click.command()
@click.argument("csv_path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--into", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The file with the two lines; without it the table is printed.")  # fmt: skip
@click.option("--brief", is_flag=True, help="Of networks one thread, of accuracy the defaults.")
def main(csv_path: Path, into: Path | None, brief: bool) -> None:
    """Make a table from a CSV."""
    header = csv_path.read_text().partition("\n")[0].split(",")
    if "method" in header:
        results = read_csv(csv_path, Result)
        new = accuracy_table([r for r in results if not brief or r.method == BY_DEFAULT])
    elif "network" in header:
        models = read_csv(csv_path, ModelRow)
        new = models_table([row for row in models if not brief or row.threads == 1])
    else:
        new = table(read_csv(csv_path, Row))
    if into:
        into.write_text(put(into.read_text(), new, csv_path.stem))
    else:
        click.echo(new)


if __name__ == "__main__":
    main()
