"""Transposed convolutions: one convolution for each place between the pixels that are set apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastq.weights import Conv2dWeight

MAX_PHASES = 2**12  # each has rows and packed weights of its own; FCN-32s has 2**10


@dataclass(frozen=True)
class Phase:
    """Every stride-th output of an axis, from `first` on: which taps it takes of which pixels.

    taps    of the kernel.      start   the pixel under the first of them, for the first output.
    count   of outputs.         before, after  pixels that are read beyond the input's ends.
    """

    first: int
    taps: slice
    start: int
    count: int
    before: int
    after: int


def phases_of(
    kernel: int, stride: int, padding: tuple[int, int], outputs: int, pixels: int
) -> list[Phase]:
    """The phases of one axis: output o takes tap k of pixel (o + k - padding) / stride."""
    found = []
    for first in range(stride):
        tap = (padding[0] - first) % stride
        start = (first + tap - padding[0]) // stride
        count, taps = len(range(first, outputs, stride)), max(len(range(tap, kernel, stride)), 1)
        last = start + count - 1 + taps - 1
        found.append(Phase(first, slice(tap, None, stride), start, count, max(0, -start),
                           max(0, last - (pixels - 1))))  # fmt: skip
    return found


def phase_weight(weight: Conv2dWeight, down: Phase, across: Phase) -> Conv2dWeight:
    """The taps of a phase of height and one of width."""
    part = weight.data[:, :, down.taps][:, :, :, across.taps]
    if part.size == 0:  # nothing falls here: one tap of 0
        part = np.zeros((*weight.data.shape[:2], 1, 1), np.int8)
    return Conv2dWeight(part, groups=weight.groups)
