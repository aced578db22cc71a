"""Canonical int8 weights into the panels that the tiles read.

    panel p holds columns p*NR .. p*NR+NR-1; one panel row is one K-step of 4:
    panels[p, step, column, 0:4]         (P, taps * steps, NR, 4) int8, 64-byte aligned

A run of R weights takes ceil(R / 4) steps. The last one starts at R - 4, so that no activation
beyond the run is read; what the step before has already counted is zero in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels.simd import KR


def aligned_empty(shape: tuple[int, ...], dtype: Any, align: int = 64) -> NDArray[Any]:
    """An uninitialized array that starts at a multiple of `align` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + size].view(dtype).reshape(shape)


def pack_panels(weight: NDArray[np.int8], nr: int) -> NDArray[np.int8]:
    """(N, taps, R >= 4) int8 as panels (P, taps * steps, NR, 4)."""
    n, taps, run = weight.shape
    steps = -(-run // KR)
    starts = np.minimum(np.arange(steps) * KR, run - KR)
    index = starts[:, None] + np.arange(KR)  # (steps, 4) positions in the run
    counted = index < (np.arange(steps) * KR)[:, None]
    quads = np.where(counted, np.int8(0), weight[:, :, index])  # (N, taps, steps, 4)
    panels = -(-n // nr)
    packed = aligned_empty((panels, taps * steps, nr, KR), np.int8)
    packed[:] = 0
    for p in range(panels):
        part = quads[p * nr : (p + 1) * nr]
        packed[p, :, : len(part)] = part.reshape(len(part), taps * steps, KR).swapaxes(0, 1)
    return packed


def pad_columns(values: NDArray[Any], groups: int, nr: int) -> NDArray[Any]:
    """Per-column values (groups * N,) padded with zeros to a multiple of NR in each group."""
    n = len(values) // groups
    padded = aligned_empty((groups, -(-n // nr) * nr), values.dtype)
    padded[:] = 0
    padded[:, :n] = values.reshape(groups, n)
    return padded.reshape(-1)
