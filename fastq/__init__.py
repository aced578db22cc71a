"""int8 inference for PyTorch on the CPU: exact integer arithmetic, in Python.

`fastq.quantize`, `fastq.linear`, `fastq.conv2d` and friends work on NumPy arrays and need no torch;
`fastq.QLinear`, `fastq.quantize_model`, `fastq.save` load torch at their first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fastq.explanation import explain
from fastq.kernels.warmup import warmup
from fastq.observer import (
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    PercentileObserver,
    make_observer,
)
from fastq.ops import (
    conv2d,
    conv2d_float,
    dequantize,
    dynamic_qparams,
    get_num_threads,
    linear,
    linear_float,
    quantize,
    requantize,
    set_num_threads,
)
from fastq.qconfig import QConfig
from fastq.qparams import Dequant, QParams, Requant, choose_qparams, quantize_weight
from fastq.runtime import load_program
from fastq.weights import Conv2dWeight, LinearWeight

if TYPE_CHECKING:
    from fastq.custom import pointwise
    from fastq.layerwise import sensitivity
    from fastq.nn import (
        QGRU,
        QLSTM,
        QRNN,
        QConv1d,
        QConv2d,
        QConv3d,
        QConvTranspose1d,
        QConvTranspose2d,
        QConvTranspose3d,
        QEmbedding,
        QEmbeddingBag,
        QGRUCell,
        QLinear,
        QLSTMCell,
        QMultiheadAttention,
        QRNNCell,
        QuantizedModel,
    )
    from fastq.profiling import profile
    from fastq.qat import QATModel, convert, prepare_qat
    from fastq.quantization import quantize_model
    from fastq.reporting import report
    from fastq.serialize import load, save
    from fastq.summaries import summary
    from fastq.swap import quantize_layers

__version__ = "0.1.0"

_NEEDS_TORCH = {
    "QATModel": "fastq.qat",
    "QConv1d": "fastq.nn",
    "QConv2d": "fastq.nn",
    "QConv3d": "fastq.nn",
    "QConvTranspose1d": "fastq.nn",
    "QConvTranspose2d": "fastq.nn",
    "QConvTranspose3d": "fastq.nn",
    "QEmbedding": "fastq.nn",
    "QEmbeddingBag": "fastq.nn",
    "QGRU": "fastq.nn",
    "QGRUCell": "fastq.nn",
    "QLSTM": "fastq.nn",
    "QLSTMCell": "fastq.nn",
    "QLinear": "fastq.nn",
    "QMultiheadAttention": "fastq.nn",
    "QRNN": "fastq.nn",
    "QRNNCell": "fastq.nn",
    "QuantizedModel": "fastq.nn",
    "convert": "fastq.qat",
    "load": "fastq.serialize",
    "pointwise": "fastq.custom",
    "prepare_qat": "fastq.qat",
    "profile": "fastq.profiling",
    "quantize_layers": "fastq.swap",
    "quantize_model": "fastq.quantization",
    "report": "fastq.reporting",
    "save": "fastq.serialize",
    "sensitivity": "fastq.layerwise",
    "summary": "fastq.summaries",
}

__all__ = [
    "QGRU",
    "QLSTM",
    "QRNN",
    "Conv2dWeight",
    "Dequant",
    "EntropyObserver",
    "HistogramObserver",
    "LinearWeight",
    "MinMaxObserver",
    "MovingAverageObserver",
    "PercentileObserver",
    "QATModel",
    "QConfig",
    "QConv1d",
    "QConv2d",
    "QConv3d",
    "QConvTranspose1d",
    "QConvTranspose2d",
    "QConvTranspose3d",
    "QEmbedding",
    "QEmbeddingBag",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QMultiheadAttention",
    "QParams",
    "QRNNCell",
    "QuantizedModel",
    "Requant",
    "choose_qparams",
    "conv2d",
    "conv2d_float",
    "convert",
    "dequantize",
    "dynamic_qparams",
    "explain",
    "get_num_threads",
    "linear",
    "linear_float",
    "load",
    "load_program",
    "make_observer",
    "pointwise",
    "prepare_qat",
    "profile",
    "quantize",
    "quantize_layers",
    "quantize_model",
    "quantize_weight",
    "report",
    "requantize",
    "save",
    "sensitivity",
    "set_num_threads",
    "summary",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _NEEDS_TORCH:
        return getattr(import_module(_NEEDS_TORCH[name]), name)
    raise AttributeError(f"module 'fastq' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
