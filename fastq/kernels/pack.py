"""Canonical int8 weights into the panels that the tiles read.

    panel p holds columns p*NR .. p*NR+NR-1, as K-steps of 4 weights for each column:

    panels[p, step] = | c0: k k+1 k+2 k+3 | c1: k k+1 k+2 k+3 | ... NR columns |      int8

Where a dot product sums two (simd.side_by_side), each vector of columns has its first pairs, then
its second ones: | c0: k k+1 | c1: k k+1 | ... | c0: k+2 k+3 | c1: k+2 k+3 | ...

The columns of a panel lie in the order in which the accumulators hold them, simd.columns; so do the
per-column operands of its epilogue.

A weight is (N, taps, run): a linear layer has one tap of K, a convolution KH taps of KW * C. A run
of R takes ceil(R / 4) steps; the last starts at R - 4, so that no activation beyond the run is
read, and is zero where the step before has already counted. Matrix tiles take K-steps of up to 64
(simd.depth): 16 rows of the panel. A shorter run has one step, a multiple of 4 long: up to 3
activations beyond the run are read then, and meet weights of 0.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastq.kernels.simd import KR, emitter


def aligned_empty(shape: tuple[int, ...], dtype: Any, align: int = 64) -> NDArray[Any]:
    """An uninitialized array that starts at a multiple of `align` bytes."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = np.empty(size + align, np.uint8)
    start = -raw.ctypes.data % align
    return raw[start : start + size].view(dtype).reshape(shape)


def step_starts(run: int, depth: int = KR) -> NDArray[np.int64]:
    """Where the K-steps of a run begin: 0, depth, 2 * depth, ..., the last at run - depth, or 0.

    So do the pieces of a line of rows that are so many at a time.
    """
    return np.minimum(np.arange(-(-run // depth)) * depth, max(run - depth, 0))


def pack_panels(weight: NDArray[np.int8], nr: int, isa: str, depth: int = KR) -> NDArray[np.int8]:
    """(N, taps, run >= 4) int8 as panels (P, taps * steps * depth / 4, NR, 4), 64-byte aligned."""
    n = len(weight)
    quads = _steps(weight, depth).reshape(n, -1, KR)
    panels, steps = -(-n // nr), quads.shape[1]
    padded = np.zeros((panels * nr, steps, KR), np.int8)
    padded[:n] = quads
    packed = aligned_empty((panels, steps, nr, KR), np.int8)
    simd = emitter(isa)
    by_step = padded.reshape(panels, nr, -1, KR)[:, simd.columns(nr)].swapaxes(1, 2)
    side = simd.side_by_side
    vectors = (*by_step.shape[:2], nr // simd.cols, simd.cols, KR // side, side)
    packed[:] = by_step.reshape(vectors).swapaxes(3, 4).reshape(by_step.shape)
    return packed


def pack_dots(weight: NDArray[np.int8], depth: int) -> NDArray[np.int8]:
    """(N, taps, run) int8 as (1, taps * steps, N, depth): the one panel of dot.py."""
    steps = _steps(weight, depth)
    packed = aligned_empty((1, steps.shape[1] * steps.shape[2], len(weight), depth), np.int8)
    packed[0] = steps.reshape(len(weight), -1, depth).swapaxes(0, 1)
    return packed


def _steps(weight: NDArray[np.int8], depth: int) -> NDArray[np.int8]:
    """The K-steps of (N, taps, run): (N, taps, steps, depth), 0 where one has counted before."""
    run = weight.shape[2]
    starts = step_starts(run, depth)[:, None]
    index = starts + np.arange(depth)
    counted = (index < np.arange(len(starts))[:, None] * depth) | (index >= run)
    return np.where(counted, np.int8(0), weight[:, :, np.minimum(index, run - 1)])


def pad_columns(values: NDArray[Any], groups: int, nr: int, isa: str) -> NDArray[Any]:
    """Per-column values (groups * N,) as whole panels, padded with zeros in each group."""
    n = len(values) // groups
    padded = aligned_empty((groups, -(-n // nr) * nr), values.dtype)
    padded[:] = 0
    padded[:, :n] = values.reshape(groups, n)
    padded[:] = padded.reshape(-1, nr)[:, emitter(isa).columns(nr)].reshape(padded.shape)
    return padded.reshape(-1)
