"""Modules with int8 weights: layers that take the place of torch's own, and whole networks."""

from fastq.nn.conv import QConv2d
from fastq.nn.embedding import QEmbedding
from fastq.nn.linear import QLinear
from fastq.nn.network import QuantizedModel
from fastq.nn.recurrent import QGRU, QLSTM, QRNN, QGRUCell, QLSTMCell, QRNNCell

__all__ = [
    "QGRU",
    "QLSTM",
    "QRNN",
    "QConv2d",
    "QEmbedding",
    "QGRUCell",
    "QLSTMCell",
    "QLinear",
    "QRNNCell",
    "QuantizedModel",
]
