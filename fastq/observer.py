"""Ranges from data: what a layer's input looked like while calibration data went through.

An observer takes arrays one at a time, keeps a few numbers and never the data, and answers with
the QParams. A new one is a class with the four methods of `Observer`.
"""

from __future__ import annotations

from typing import Protocol, Self

import numpy as np
from numpy.typing import ArrayLike

from fastq.qparams import QParams, choose_qparams


class Observer(Protocol):
    """Sees arrays, gives uint8 QParams.

    count  how many finite values were seen; `qparams` needs at least one.
    """

    count: int

    def update(self, x: ArrayLike) -> None:
        """Take one array of real numbers into account; any shape, also empty."""

    def merge(self, other: Self) -> None:
        """Take everything that `other` saw into account, as if this observer had seen it."""

    def qparams(self) -> QParams:
        """The QParams of what was seen; ValueError when no finite value was."""


class MinMaxObserver:
    """The smallest and the largest finite value, as float32. NaN and infinities do not count.

    The result does not depend on the order of the arrays, nor on how they were divided among
    observers that are merged later: calibration in several processes gives the same bits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.minimum = np.float32(np.inf)
        self.maximum = np.float32(-np.inf)

    def update(self, x: ArrayLike) -> None:
        with np.errstate(over="ignore"):  # beyond float32: an infinity, which does not count
            values = np.asarray(x, np.float32)
        if values.size == 0:
            return
        with np.errstate(invalid="ignore"):
            lo, hi = values.min(), values.max()
        if not (np.isfinite(lo) and np.isfinite(hi)):
            values = values[np.isfinite(values)]
            lo, hi = values.min(initial=np.inf), values.max(initial=-np.inf)
        self._take(values.size, lo, hi)

    def merge(self, other: MinMaxObserver) -> None:
        if not isinstance(other, MinMaxObserver):
            raise TypeError(f"merge: got {type(other).__name__}, wanted a MinMaxObserver")
        self._take(other.count, other.minimum, other.maximum)

    def qparams(self) -> QParams:
        """choose_qparams of the range; ValueError when no finite value was seen."""
        if self.count == 0:
            raise ValueError(
                "MinMaxObserver: no finite value was seen, so there is no range; "
                "call update(x) with calibration data first"
            )
        return choose_qparams(self.minimum, self.maximum)

    def _take(self, count: int, lo: np.float32, hi: np.float32) -> None:
        self.count += count
        self.minimum = np.minimum(self.minimum, lo)
        self.maximum = np.maximum(self.maximum, hi)

    def __repr__(self) -> str:
        return f"MinMaxObserver(minimum={self.minimum}, maximum={self.maximum}, count={self.count})"
