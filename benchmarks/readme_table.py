"""`python -m benchmarks.readme_table results.csv`: the README's measured table, from the CSV."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import click

from benchmarks.measure import Row, network_sums, read_csv
from benchmarks.shapes import WHOLE

BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"
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


def put(text: str, new: str) -> str:
    """`text` with `new` between the two marks; ValueError where there is not one of each."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ValueError(f"wanted one line {BEGIN} and after it one line {END}")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{new}\n{END}{rest.split(END)[1]}"


@click.command()
@click.argument("csv_path", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--into", type=click.Path(exists=True, dir_okay=False, path_type=Path),
              help="The file with the two marks; without it the table is printed.")  # fmt: skip
def main(csv_path: Path, into: Path | None) -> None:
    """Make the README's table from a CSV of `benchmarks.run`."""
    new = table(read_csv(csv_path, Row))
    if into:
        into.write_text(put(into.read_text(), new))
    else:
        click.echo(new)


if __name__ == "__main__":
    main()
