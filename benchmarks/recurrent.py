"""`python -m benchmarks.recurrent`: networks of recurrent layers beside their peers.

A network is one nn.LSTM or nn.GRU and a linear layer on all of its states, with the weights that
torch begins with. The peers quantize without data, as they do for these layers: torch.ao each step,
ONNX Runtime each sequence; so does "fastq layers" (quantize_layers), where "fastq" is one program
with the ranges of this input. All are called in turns; the answers are compared with float32's
first.
"""

from __future__ import annotations

import csv
import statistics
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

import fastq
from benchmarks.measure import interleave, machine, use_threads
from benchmarks.model_peers import OPSET, quiet
from benchmarks.peers import Built, onnxruntime_call, openvino_call
from fastq.layerwise import decibels

# name -> (class, inputs, features, layers, both directions, batch, steps)
CASES: dict[str, tuple[Any, int, int, int, bool, int, int]] = {
    "lstm 256-512, batch 1": (nn.LSTM, 256, 512, 1, False, 1, 64),
    "lstm 256-512, batch 16": (nn.LSTM, 256, 512, 1, False, 16, 64),
    "gru 256-512, batch 1": (nn.GRU, 256, 512, 1, False, 1, 64),
    "gru 256-512, batch 16": (nn.GRU, 256, 512, 1, False, 16, 64),
    "2 bidirectional lstm 80-128, batch 1": (nn.LSTM, 80, 128, 2, True, 1, 100),
    "2 lstm 512-1024, batch 1": (nn.LSTM, 512, 1024, 2, False, 1, 50),
}


class Network(nn.Module):
    def __init__(self, kind: Any, inputs: int, features: int, layers: int, both: bool) -> None:
        super().__init__()
        self.rnn = kind(inputs, features, layers, batch_first=True, bidirectional=both)
        self.head = nn.Linear(features * (1 + both), 10)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.rnn(x)[0])
        return y


@dataclass
class Row:
    """One peer on one network; milliseconds, and dB against float32 in torch."""

    network: str
    peer: str
    threads: int
    median: float
    best: float
    snr: float
    cpu: str
    isa: str
    versions: str
    commit: str


def peers(model: Network, x: Tensor, threads: int, folder: Path) -> Iterator[tuple[str, Built]]:
    """Name -> (a call, and a function of its result that gives the answer)."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    int8 = fastq.quantize_model(model, x, progress=False)
    yield "fastq", (lambda: int8(x), lambda y: y.numpy())
    layers = fastq.quantize_layers(model, progress=False)
    yield "fastq layers", (lambda: layers(x), lambda y: y.numpy())
    yield "torch float32", (lambda: model(x), lambda y: y.numpy())
    kinds = {type(model.rnn), nn.Linear}
    plain, narrow = (str(folder / f"{name}.onnx") for name in ("float32", "int8"))
    with quiet():
        dynamic = torch.ao.quantization.quantize_dynamic(model, kinds, torch.qint8)
        torch.onnx.export(model, (x,), plain, dynamo=False, opset_version=OPSET,
                          input_names=["x"], output_names=["y"])  # fmt: skip
        quantize_dynamic(plain, narrow, weight_type=QuantType.QInt8, per_channel=True)
    yield "torch dynamic", (lambda: dynamic(x), lambda y: y.numpy())
    for name, path in (("onnxruntime float32", plain), ("onnxruntime dynamic", narrow)):
        y = np.empty((*x.shape[:2], 10), np.float32)
        yield name, onnxruntime_call(path, x.numpy(), y, threads)
    yield "openvino float", openvino_call(plain, x.numpy(), threads, precision="")


def measure(name: str, threads: int, seconds: float) -> list[Row]:
    """The rows of one network, fastq's first."""
    *network, batch, steps = CASES[name]
    torch.manual_seed(0)
    model, x = Network(*network).eval(), torch.randn(batch, steps, network[1])
    with torch.no_grad():
        wanted = model(x)
    runs: dict[str, Callable[[], Any]] = {}
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder, use_threads(threads):
        for peer, (run, answer) in peers(model, x, threads, Path(folder)):
            runs[peer] = run
            found[peer] = decibels(wanted, torch.from_numpy(np.array(answer(run()))))
        samples = interleave(runs, seconds)
    about = {key: str(machine()[key]) for key in ("cpu", "isa", "versions", "commit")}
    return [
        Row(name, peer, threads, 1e3 * statistics.median(times), 1e3 * min(times), found[peer],
            **about)
        for peer, times in samples.items()
    ]  # fmt: skip


@click.command()
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True)
@click.option("--seconds", type=click.FloatRange(0, min_open=True), default=1.0, show_default=True,
              help="Of timing, per network and peer.")  # fmt: skip
@click.option("--csv", "csv_path", type=click.Path(path_type=Path), help="Write the rows here.")
def main(threads: tuple[int, ...], seconds: float, csv_path: Path | None) -> None:
    """Time recurrent networks beside torch, ONNX Runtime and OpenVINO."""
    click.echo(f"{machine()['cpu']}, {machine()['isa']}, commit {machine()['commit']}")
    rows = []
    for count in threads:
        for name in CASES:
            own, *others = found = measure(name, count, seconds)
            rows += found
            best = min(row.median for row in others if not row.peer.startswith("fastq"))
            shown = "  ".join(f"{r.peer} {r.median:.3g} ms ({r.snr:.0f} dB)" for r in found)
            click.echo(f"{count} x {best / own.median:5.2f}  {name:36} {shown}")
    if csv_path:
        with csv_path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(Row)])
            writer.writeheader()
            writer.writerows(map(asdict, rows))


if __name__ == "__main__":
    main()
