"""torch modules: float32 tensor in, int8 arithmetic inside, float32 tensor out."""

from fastq.nn.conv import QConv2d
from fastq.nn.linear import QLinear

__all__ = ["QConv2d", "QLinear"]
