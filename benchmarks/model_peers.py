"""Who runs a whole network, each behind one small builder: `build(subject, threads) -> Built`.

As in `peers`: run() is what is timed, answer(result) is the network's output as an array. Every
int8 peer is calibrated with the same images. A peer that is not installed, or cannot take a
network, raises; the caller says so.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import fastq
from benchmarks import networks
from benchmarks.peers import Array, Built, onnxruntime_call, openvino_call

BATCH = "batch"  # the name of the axis in ONNX models
OPSET = 17


@dataclass
class Subject:
    """A network for all peers: its float model, its files, and the images that are timed.

    folder  where ONNX models are kept, for other batch sizes and numbers of threads too.
    images  as many as the largest batch, and as an accuracy takes; the first ones are those of
            smaller batches.
    """

    name: str
    network: networks.Network
    folder: Path
    images: Tensor

    def __post_init__(self) -> None:
        self.batch = len(self.images)
        self.quantize_seconds = float("nan")

    @functools.cached_property
    def model(self) -> nn.Module:
        return networks.build(self.network)

    @functools.cached_property
    def macs(self) -> int:
        """Multiply-adds of one image."""
        return networks.macs(self.model, self.images[:1])

    @functools.cached_property
    def expected(self) -> Array:
        """The float32 output for all images."""
        with torch.no_grad():
            return torch.cat([self.model(x[None]) for x in self.images]).numpy()

    @functools.cached_property
    def data(self) -> list[Tensor]:
        return networks.calibration_data(self.network)

    @functools.cached_property
    def quantized(self) -> fastq.QuantizedModel:
        """fastq's network."""
        start = time.perf_counter()
        model = fastq.quantize_model(self.model, self.data, progress=False)
        self.quantize_seconds = time.perf_counter() - start
        assert isinstance(model, fastq.QuantizedModel), fastq.summary(model).note
        return model

    @property
    def x(self) -> Tensor:
        return self.images[: self.batch]

    def file(self, kind: str, write: Callable[[Path], None]) -> str:
        """The path of a model of this kind; `write` makes it when it is not there."""
        path = self.folder / f"{self.name}.{kind}.onnx"
        if not path.exists():
            new = path.with_suffix(".new")
            with quiet():
                write(new)
            new.rename(path)
        return str(path)

    def float_onnx(self) -> str:
        def write(path: Path) -> None:
            with networks.plain_attention():  # the exporter does not know the fused one
                torch.onnx.export(
                    self.model, (self.images[:1],), str(path), dynamo=False, opset_version=OPSET,
                    input_names=["x"], output_names=["y"],
                    dynamic_axes={"x": {0: BATCH}, "y": {0: BATCH}},
                )  # fmt: skip

        return self.file("float32", write)

    def int8_onnx(self, form: str) -> str:
        """As ONNX Runtime's own tool quantizes: uint8 by int8, per channel; form "QDQ" or
        "QOperator"."""
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self, data: list[Tensor]) -> None:
                self.batches = iter(data)

            def get_next(self) -> Any:
                batch = next(self.batches, None)
                return None if batch is None else {"x": batch.numpy()}

        def prepare(path: Path) -> None:  # its symbolic inference fails on transformers
            quant_pre_process(given, str(path), skip_symbolic_shape=True)

        given = self.float_onnx()
        prepared = self.file("prepared", prepare)

        def write(path: Path) -> None:
            quantization.quantize_static(
                prepared, str(path), Reader(self.data),
                quant_format=quantization.QuantFormat[form],
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8, per_channel=True,
            )  # fmt: skip

        return self.file(form, write)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Exporters and quantizers are full of advice."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


# builders


def fastq_int8(subject: Subject, threads: int) -> Built:
    model, x = subject.quantized, subject.x
    return lambda: model(x), lambda y: y.numpy()


def torch_float32(subject: Subject, threads: int) -> Built:
    model, x = subject.model, subject.x
    return lambda: model(x), lambda y: y.numpy()


def torch_channels_last(subject: Subject, threads: int) -> Built:
    layout = torch.channels_last
    model: Any = copy.deepcopy(subject.model).to(memory_format=layout)  # type: ignore[call-overload]
    x = subject.x.to(memory_format=layout)
    return lambda: model(x), lambda y: y.numpy()


def torch_int8(engine: str) -> Callable[[Subject, int], Built]:
    """torchvision's own quantizable networks, in eager mode."""

    def build(subject: Subject, threads: int) -> Built:
        networks.torchvision_models()
        from torchvision.models import quantization as quantizable

        if not hasattr(quantizable, subject.name):
            raise ImportError(f"torchvision has no quantized {subject.name}")
        with quiet():
            torch.backends.quantized.engine = engine
            given = {"aux_logits": False} if subject.name == "googlenet" else {}
            model = getattr(quantizable, subject.name)(weights=None, quantize=False, **given)
            model.load_state_dict(subject.model.state_dict())
            model.eval().fuse_model()
            model.qconfig = torch.ao.quantization.get_default_qconfig(engine)
            torch.ao.quantization.prepare(model, inplace=True)
            for batch in subject.data:
                model(batch)
            torch.ao.quantization.convert(model, inplace=True)
        x = subject.x
        return lambda: model(x), lambda y: y.numpy()

    return build


def onnxruntime(form: str) -> Callable[[Subject, int], Built]:
    """form "float32", "QDQ" or "QOperator"."""

    def build(subject: Subject, threads: int) -> Built:
        path = subject.float_onnx() if form == "float32" else subject.int8_onnx(form)
        y = np.empty((subject.batch, *subject.expected.shape[1:]), np.float32)
        sizes = {BATCH: subject.batch}
        return onnxruntime_call(path, subject.x.numpy(), y, threads, sizes)

    return build


def openvino_float(subject: Subject, threads: int) -> Built:
    """In the precision that OpenVINO chooses: bf16 where the CPU has it, else float32."""
    return openvino_call(subject.float_onnx(), subject.x.numpy(), threads, precision="")


def openvino_int8(subject: Subject, threads: int) -> Built:
    """Of the same file as ONNX Runtime."""
    return openvino_call(subject.int8_onnx("QDQ"), subject.x.numpy(), threads, precision="")


def openvino_nncf(subject: Subject, threads: int) -> Built:
    """As OpenVINO's own tool quantizes."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # see openvino_call
    import nncf
    import openvino

    with quiet():
        model = openvino.Core().read_model(subject.float_onnx())
        data = nncf.Dataset([batch.numpy() for batch in subject.data])
        quantized = nncf.quantize(model, data, fast_bias_correction=True)
    return openvino_call(quantized, subject.x.numpy(), threads, precision="")


class Peer(NamedTuple):
    """kind "int8" or "float"; build as above."""

    name: str
    kind: str
    build: Callable[[Subject, int], Built]


PEERS = (
    Peer("fastq", "int8", fastq_int8),
    Peer("onnxruntime QDQ", "int8", onnxruntime("QDQ")),
    Peer("onnxruntime QOperator", "int8", onnxruntime("QOperator")),
    Peer("openvino int8", "int8", openvino_int8),
    Peer("openvino nncf", "int8", openvino_nncf),
    Peer("torch onednn", "int8", torch_int8("onednn")),
    Peer("torch x86", "int8", torch_int8("x86")),
    Peer("onnxruntime float32", "float", onnxruntime("float32")),
    Peer("openvino float", "float", openvino_float),
    Peer("torch float32", "float", torch_float32),
    Peer("torch channels_last", "float", torch_channels_last),
)
