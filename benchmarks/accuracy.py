"""`fastq bench --accuracy DIR`: what int8 keeps of real networks, beside ONNX Runtime and NNCF.

DIR holds the networks and the data, and a loaders.py whose TASKS says for each network: build() the
float32 module, calib(n) batches that are not scored, score(fn, limit) -> (metric, value).
"""

from __future__ import annotations

import csv
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

import fastq
from benchmarks.measure import machine
from benchmarks.options import Output
from fastq.layerwise import decibels
from fastq.network import finish, prepare_model
from fastq.remedies import DEFAULT, REMEDIES, observe_and_apply, remedy_names

Run = Callable[..., Tensor]
IMAGES = 200  # for calibration
DEFAULT_METHODS = (
    "none",
    "+".join(DEFAULT),
    "+".join(DEFAULT).replace("balanced_rounding", "gptq"),
)


@dataclass(frozen=True)
class Result:
    """A network, quantized by one method, on the images that score it.

    score      by the task's metric, float32's beside it.
    agreement  % of predictions that are float32's; NaN where nothing is predicted.
    snr        of the outputs against float32's, in dB.
    seconds    to calibrate and to quantize.
    The others say on what it was measured.
    """

    network: str
    method: str
    metric: str
    score: float
    float32: float
    agreement: float
    snr: float
    seconds: float
    cpu: str = ""
    isa: str = ""
    versions: str = ""
    commit: str = ""

    def __str__(self) -> str:
        return (
            f"{self.network:12} {self.method:44} {self.metric} {self.score:6.2f} "
            f"({self.score - self.float32:+.2f})  equal {self.agreement:6.2f} %  "
            f"SNR {self.snr:5.2f} dB  {self.seconds:5.0f} s"
        )


class _Recorder:
    """Calls a network, and keeps what it gave."""

    def __init__(self, run: Run) -> None:
        self.run, self.outputs = run, list[Tensor]()

    def __call__(self, *inputs: Tensor) -> Tensor:
        with torch.inference_mode():
            output = self.run(*inputs)
        self.outputs.append(output)
        return output


def measure(
    task: Any, network: str, limit: int | None, methods: Iterator[tuple[str, Run, float]]
) -> Iterator[Result]:
    """A result for each (name, network's function, seconds that it took to make)."""
    model = _Recorder(task.build())
    metric, float32 = task.score(model, limit)
    real = torch.cat(model.outputs)
    predicts = metric.startswith("top-1")
    for name, run, seconds in methods:
        method = _Recorder(run)
        _, score = task.score(method, limit)
        got = torch.cat(method.outputs)
        equal = 100 * (got.argmax(1) == real.argmax(1)).double().mean().item()
        yield Result(
            network, name, metric, score, float32, equal if predicts else math.nan,
            decibels(real, got), seconds, **about(),
        )  # fmt: skip


def about() -> dict[str, str]:
    """What it is measured on."""
    return {key: machine()[key] for key in ("cpu", "isa", "versions", "commit")}


def quantized(model: nn.Module, data: list[Any], names: str, config: fastq.QConfig) -> nn.Module:
    """The model in integers; names are remedies with + between them, or "none"."""
    batches = [list(batch) if isinstance(batch, tuple) else [batch] for batch in data]
    prepared, _ = prepare_model(model, batches[0], config=config, alone=True)
    observe_and_apply(prepared, batches, names.split("+") if names != "none" else ())
    return finish(prepared, model)


def ours(task: Any, methods: tuple[str, ...], config: fastq.QConfig) -> Iterator[Any]:
    model = task.build()
    for names in methods:
        start = time.perf_counter()
        made = quantized(model, task.calib(IMAGES), names, config)
        yield f"fastq {names}", made, time.perf_counter() - start


def ours_dynamic(task: Any) -> Iterator[Any]:
    start = time.perf_counter()
    made = fastq.quantize_layers(task.build(), progress=False)
    yield "fastq dynamic", made, time.perf_counter() - start


def peers(task: Any) -> Iterator[Any]:
    """ONNX Runtime, by minimum and maximum and by percentile, weights per channel; NNCF, if it is
    installed."""
    import numpy as np
    import onnxruntime
    from onnxruntime.quantization import (
        CalibrationDataReader,
        CalibrationMethod,
        QuantFormat,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process

    model, data = task.build(), task.calib(IMAGES)
    images = [batch[i : i + 1].numpy() for batch in data for i in range(len(batch))]

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.rest = iter(images)

        def get_next(self) -> dict[str, Any] | None:
            image = next(self.rest, None)
            return None if image is None else {"x": image}

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/float.onnx"
        torch.onnx.export(
            model, (data[0],), path, dynamo=False, opset_version=17, input_names=["x"],
            dynamic_axes={"x": {0: "b"}},
        )  # fmt: skip
        quant_pre_process(path, f"{path}.ready")
        for method in (CalibrationMethod.MinMax, CalibrationMethod.Percentile):
            start = time.perf_counter()
            quantize_static(
                f"{path}.ready", f"{path}.int8", Reader(), quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, per_channel=True,
                calibrate_method=method,
            )  # fmt: skip
            session = onnxruntime.InferenceSession(
                f"{path}.int8", providers=["CPUExecutionProvider"]
            )

            def run(x: Tensor, session: Any = session) -> Tensor:
                return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])

            yield f"ONNX Runtime {method.name}", run, time.perf_counter() - start
        if importlib.util.find_spec("nncf") is None:
            return
        import nncf
        import openvino

        start = time.perf_counter()
        network = nncf.quantize(
            openvino.convert_model(path), nncf.Dataset(images), subset_size=len(images)
        )
        compiled = openvino.compile_model(network, "CPU")
        seconds = time.perf_counter() - start
        yield "NNCF", lambda x: torch.from_numpy(np.array(compiled(x.numpy())[0])), seconds


def load_tasks(folder: Path) -> dict[str, Any]:
    """TASKS of the folder's loaders.py."""
    spec = importlib.util.spec_from_file_location("loaders", folder / "loaders.py")
    if spec is None or spec.loader is None or not (folder / "loaders.py").is_file():
        raise click.BadParameter(f"{folder} has no loaders.py", param_hint="DIR")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TASKS  # type: ignore[no-any-return]


def _checked(_: Any, __: Any, methods: tuple[str, ...]) -> tuple[str, ...]:
    for names in methods:
        try:
            remedy_names(names.split("+") if names != "none" else ())
        except ValueError as error:
            raise click.BadParameter(str(error)) from error
    return methods


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, path_type=Path))
@click.option("--network", "networks", multiple=True, help="Only this task of loaders.py; several.")
@click.option(
    "--remedies", "methods", multiple=True, default=DEFAULT_METHODS, show_default=True,
    callback=_checked, help=f"'none', or with + between them: {', '.join(REMEDIES)}; several.",
)  # fmt: skip
@click.option("--observer", default=fastq.QConfig.observer, show_default=True)
@click.option("--weight-range", default=fastq.QConfig.weight_range, show_default=True)
@click.option("--weight-bits", default=fastq.QConfig.weight_bits, show_default=True)
@click.option("--limit", type=click.IntRange(1), help="Score this many images only.")
@click.option("--peers", "with_peers", is_flag=True, help="ONNX Runtime, and NNCF if installed.")
@click.option("--csv", "path", type=Output(), help="Write the rows here.")
def bench(
    folder: Path,
    networks: tuple[str, ...],
    methods: tuple[str, ...],
    observer: str,
    weight_range: Any,
    weight_bits: int,
    limit: int | None,
    with_peers: bool,
    path: Path | None,
) -> None:
    """Accuracy of real networks in int8, against float32 on the same images."""
    tasks = load_tasks(folder)
    unknown = sorted(set(networks) - tasks.keys())
    if unknown:
        raise click.BadParameter(
            f"{unknown[0]}; there are {', '.join(tasks)}", param_hint="--network"
        )
    config = fastq.QConfig(observer, weight_range, weight_bits)
    results: list[Result] = []
    for name in networks or tasks:
        task = tasks[name]
        images = isinstance(task.calib(1)[0], Tensor)
        runs = [ours(task, methods, config)]
        if not images:
            runs.append(ours_dynamic(task))
        if with_peers and images:
            runs.append(peers(task))
        for made in runs:
            for result in measure(task, name, limit, made):
                click.echo(result)
                results.append(result)
                if path:
                    _write(results, path)  # a long run that stops keeps its rows


def _write(results: list[Result], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result)])
        writer.writeheader()
        writer.writerows(map(asdict, results))


if __name__ == "__main__":
    bench()
