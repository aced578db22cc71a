"""Modules with int8 weights: layers that take the place of torch's own, and whole networks."""

from fastq.nn.attention import QMultiheadAttention
from fastq.nn.conv import (
    CONVOLUTIONS,
    QConv1d,
    QConv2d,
    QConv3d,
    QConvTranspose1d,
    QConvTranspose2d,
    QConvTranspose3d,
)
from fastq.nn.embedding import QEmbedding, QEmbeddingBag
from fastq.nn.linear import QLinear
from fastq.nn.model import QuantizedModel
from fastq.nn.recurrent import QGRU, QLSTM, QRNN, RECURRENT_KINDS, QGRUCell, QLSTMCell, QRNNCell

LAYERS = (
    QLinear, *CONVOLUTIONS, *RECURRENT_KINDS, QMultiheadAttention, QEmbedding, QEmbeddingBag,
)  # fmt: skip

__all__ = [
    "LAYERS",
    "QGRU",
    "QLSTM",
    "QRNN",
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
    "QRNNCell",
    "QuantizedModel",
]
