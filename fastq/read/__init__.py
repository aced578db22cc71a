"""What `torch.export` gives as a `Graph`: `Reader`, and what each of aten's operators becomes."""

# each registers what it reads
from fastq.read import (
    arithmetic,
    attention,
    axes,
    convolutions,
    norms,
    parts,
    pooling,
    products,
    recurrent,
)
from fastq.read.reader import CannotCapture, Folded, Indirect, Reader

__all__ = [
    "CannotCapture", "Folded", "Indirect", "Reader", "arithmetic", "attention", "axes",
    "convolutions", "norms", "parts", "pooling", "products", "recurrent",
]  # fmt: skip
