"""Modules with int8 weights: layers that take the place of torch's own, and whole networks."""

from fastq.nn.conv import QConv2d
from fastq.nn.linear import QLinear
from fastq.nn.network import QuantizedModel

__all__ = ["QConv2d", "QLinear", "QuantizedModel"]
