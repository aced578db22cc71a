"""The integer operations on NumPy arrays: the functions of `reference`, checked and fast.

Arguments are checked here, once; the kernels trust them. Results have the same bits on every
instruction set and for every number of threads. No function needs torch.
"""

from fastq.kernels.executor import get_num_threads, set_num_threads
from fastq.ops.elementwise import dequantize, grid, quantize, requantize
from fastq.ops.floats import Operands, conv2d_float, linear_float
from fastq.ops.images import (
    adaptive_avg_pool2d,
    adaptive_max_pool2d,
    avg_pool2d,
    max_pool2d,
    upsample_bilinear2d,
    upsample_nearest2d,
)
from fastq.ops.norms import (
    global_response_norm,
    group_norm,
    layer_norm,
    rms_norm,
    softmax,
    softmax_weights,
)
from fastq.ops.pointwise import add, affine, mul, table
from fastq.ops.products import conv2d, linear, matmul
from fastq.ops.ranges import dynamic_qparams, histogram
from fastq.ops.sequences import recurrent, recurrent_float

__all__ = [
    "Operands",
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "add",
    "affine",
    "avg_pool2d",
    "conv2d",
    "conv2d_float",
    "dequantize",
    "dynamic_qparams",
    "get_num_threads",
    "global_response_norm",
    "grid",
    "group_norm",
    "histogram",
    "layer_norm",
    "linear",
    "linear_float",
    "matmul",
    "max_pool2d",
    "mul",
    "quantize",
    "recurrent",
    "recurrent_float",
    "requantize",
    "rms_norm",
    "set_num_threads",
    "softmax",
    "softmax_weights",
    "table",
    "upsample_bilinear2d",
    "upsample_nearest2d",
]
