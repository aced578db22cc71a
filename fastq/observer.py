"""Ranges from data: what a layer's input looked like while calibration data went through.

An observer takes arrays one at a time, keeps a few numbers and never the data, and answers with
the QParams. `make_observer` makes one from its name, a class, or any function without arguments.

A new one is a class with what `Observer` names; this one's zero point is always 128:

    class Symmetric:
        count, peak = 0, 0.0
        def update(self, x):
            self.count += x.size
            self.peak = max(self.peak, abs(x).max(initial=0))
        def merge(self, other):
            self.count += other.count
            self.peak = max(self.peak, other.peak)
        def qparams(self):
            return fastq.choose_qparams(-self.peak, self.peak)

The observers here leave out NaN and infinities. All but MovingAverageObserver give the same bits
for every order of the arrays, and however they were divided among observers that are then merged:
calibration in several processes equals that in one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastq import ops
from fastq.qparams import HISTOGRAM_KEYS, QParams, as_array, choose_qparams


@runtime_checkable
class Observer(Protocol):
    """Sees arrays, gives uint8 QParams."""

    @property
    def count(self) -> int:
        """How many finite values were seen; `qparams` needs at least one."""

    def update(self, x: ArrayLike) -> None:
        """Take one array of real numbers into account; any shape, also empty."""

    def merge(self, other: Self) -> None:
        """Take everything that `other` saw into account, as if this observer had seen it."""

    def qparams(self) -> QParams:
        """The QParams of what was seen; ValueError when no finite value was."""


class MinMaxObserver:
    """The smallest and the largest finite value, as float32."""

    def __init__(self) -> None:
        self.count = 0
        self.minimum = np.float32(np.inf)
        self.maximum = np.float32(-np.inf)

    def update(self, x: ArrayLike) -> None:
        self._take(*_finite_range(x))

    def merge(self, other: MinMaxObserver) -> None:
        _check_kind(self, other)
        self._take(other.count, other.minimum, other.maximum)

    def qparams(self) -> QParams:
        """choose_qparams of the range; ValueError when no finite value was seen."""
        _check_count(self)
        return choose_qparams(self.minimum, self.maximum)

    def _take(self, count: int, lo: np.float32, hi: np.float32) -> None:
        self.count += count
        self.minimum = np.minimum(self.minimum, lo)
        self.maximum = np.maximum(self.maximum, hi)

    def __repr__(self) -> str:
        return f"MinMaxObserver(minimum={self.minimum}, maximum={self.maximum}, count={self.count})"


class MovingAverageObserver:
    """The exponential moving average of each array's smallest and largest finite value.

    average += averaging_constant * (value - average), from the first array's values on.

    averaging_constant  in (0, 1]; 0.1 forgets half of the past in 7 arrays. torch's observer of
                        this name has 0.01, for training: calibration has few arrays.

    The result depends on the order of the arrays. Merging weighs both averages by their counts, so
    calibration in several processes is near, not equal to, that in one.
    """

    def __init__(self, averaging_constant: float = 0.1) -> None:
        _check_number("MovingAverageObserver: averaging_constant", averaging_constant, 0, 1)
        self.averaging_constant = averaging_constant
        self.count = 0
        self.minimum = 0.0
        self.maximum = 0.0

    def update(self, x: ArrayLike) -> None:
        count, lo, hi = _finite_range(x)
        if count:
            self._move(float(lo), float(hi), self.averaging_constant if self.count else 1.0)
            self.count += count

    def merge(self, other: MovingAverageObserver) -> None:
        _check_kind(self, other)
        if other.count:
            self.count += other.count
            self._move(other.minimum, other.maximum, other.count / self.count)

    def qparams(self) -> QParams:
        """choose_qparams of the averages; ValueError when no finite value was seen."""
        _check_count(self)
        return choose_qparams(self.minimum, self.maximum)

    def _move(self, lo: float, hi: float, share: float) -> None:
        self.minimum += share * (lo - self.minimum)
        self.maximum += share * (hi - self.maximum)

    def __repr__(self) -> str:
        return (
            f"MovingAverageObserver(minimum={self.minimum}, maximum={self.maximum}, "
            f"count={self.count})"
        )


@dataclass(frozen=True, eq=False)
class Bins:
    """The bins of a histogram that hold finite values, in ascending order of their values.

    counts   int64 (n,): how many values.
    edges    float64 (n, 2): below and above every value that may be in the bin.
    centers  float64 (n,): the mean of the values.
    halves   float64 (n,): from the center to the nearer edge.

    Counts and means are all that is known, so a bin is taken as uniform over center +- half: all of
    it if the mean is in the middle; a point if it is at the edge, as when the bin is filled by one
    value (ReLU6's 6.0, a picture's integers).
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]
    centers: NDArray[np.float64]
    halves: NDArray[np.float64]

    def above(self, magnitude: float) -> Bins:
        """The bins whose center is farther from 0."""
        kept = np.abs(self.centers) > magnitude
        return Bins(self.counts[kept], self.edges[kept], self.centers[kept], self.halves[kept])


# Keys (upper halves of a float32's bits) of finite values, ascending by value, and where the
# magnitudes of a key's values begin and end. The key 0x7f80 is infinity's: 2**128 here.
_NEGATIVE, _INFINITY = 0x8000, 0x7F80
_ASCENDING = np.r_[_NEGATIVE + _INFINITY - 1 : _NEGATIVE - 1 : -1, 0:_INFINITY]
_MAGNITUDES = (np.arange(_INFINITY + 1, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
_MAGNITUDES[_INFINITY] = 2.0**128

MAX_LANES = 4  # a lane is at most 1 MB; four threads read as fast as memory gives


def _lanes() -> int:
    """How many threads fill a histogram. torch's still spin on their cores, waiting for more to do
    after the pass that made the values: each of ours gets half of a core."""
    return max(1, min(ops.get_num_threads() // 2, MAX_LANES))


class _Histogram:
    """A histogram over the upper 16 bits of each float32 (`ops.histogram`), and its exact range.

    A bin is at most 1/128 of its values wide, wherever the data lie. The bins depend on nothing
    but the value, their content is integers: neither order nor division can change the sums.
    """

    def __init__(self) -> None:
        # untouched pages cost nothing
        self._bins = np.zeros((_lanes(), HISTOGRAM_KEYS, 2), np.int64)
        self._ends = np.zeros((len(self._bins), 2), np.float32)

    @property
    def count(self) -> int:
        return int(self._bins[:, :, 0].sum(axis=0)[_ASCENDING].sum())

    @property
    def minimum(self) -> np.float32:
        """The smallest finite value, and 0."""
        return self._ends[:, 0].min()

    @property
    def maximum(self) -> np.float32:
        """The largest finite value, and 0."""
        return self._ends[:, 1].max()

    def __getstate__(self) -> dict[str, Any]:
        """The filled bins alone: a few of a megabyte's."""
        content = self._bins.sum(axis=0)
        filled = np.flatnonzero(content[:, 0])
        ends = np.array([[self.minimum, self.maximum]])
        return {**vars(self), "_bins": (filled, content[filled]), "_ends": ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        filled, content = state["_bins"]
        self._bins = np.zeros((1, HISTOGRAM_KEYS, 2), np.int64)
        self._bins[0, filled] = content

    def update(self, x: ArrayLike) -> None:
        ops.histogram(_float32(x), self._bins, self._ends)

    def merge(self, other: Self) -> None:
        _check_kind(self, other)
        filled = np.flatnonzero(other._bins[:, :, 0].any(axis=0))
        self._bins[0, filled] += other._bins[:, filled].sum(axis=0)
        self._ends[0] = min(self.minimum, other.minimum), max(self.maximum, other.maximum)

    def bins(self) -> Bins:
        """What was seen, for a histogram's reader: also a report's, or a plot's."""
        content = self._bins.sum(axis=0)[_ASCENDING]
        filled = np.flatnonzero(content[:, 0])
        counts, rests = content[filled].T
        key = _ASCENDING[filled]
        sign = np.where(key < _NEGATIVE, 1.0, -1.0)
        inner = _MAGNITUDES[key & ~_NEGATIVE]
        width = _MAGNITUDES[(key & ~_NEGATIVE) + 1] - inner
        mean = rests / counts / 2**16  # 0 to 1, of the width
        edges = np.sort(np.stack([sign * inner, sign * (inner + width)], axis=1), axis=1)
        centers = sign * (inner + mean * width)
        return Bins(counts, edges, centers, np.minimum(mean, 1 - mean) * width)

    def qparams(self) -> QParams:
        """The QParams of the range found; ValueError when no finite value was seen."""
        _check_count(self)
        return choose_qparams(*self._range())

    def _range(self) -> tuple[float, float]:
        raise NotImplementedError

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(minimum={self.minimum}, maximum={self.maximum}, "
            f"count={self.count})"
        )


class HistogramObserver(_Histogram):
    """The range whose uint8 grid has the least squared error on what was seen, clipping included.

    The error is that of the grid that choose_qparams gives, integrated over the bins: on the
    activations of four networks within 0.3 % of the data's own. A narrower range than from the
    smallest to the largest value has to gain more than that, so data on a grid of 256 values, such
    as a picture's, keep it. Zeros have no error. Both ends are cut at the same magnitude first,
    down to 1/1024 of the largest, then moved on, together and alone.
    """

    def _range(self) -> tuple[float, float]:
        lo, hi = float(self.minimum), float(self.maximum)
        peak = max(-lo, hi)
        # below half a step of the narrowest grid, all grids round to 0: the same error
        bins = self.bins().above(peak * 2.0**-20)
        best = _Best(lambda *grid: _squared_error(bins, *grid), lo, hi)
        whole = best.cost
        caps = peak * np.exp2(-np.arange(1, 41) / 4)
        best.offer(np.maximum(lo, -caps), np.minimum(hi, caps))
        both = lo < 0 < hi
        for octaves in (1 / 8, 1 / 32, 1 / 128):
            factors = np.exp2(octaves * np.array([-3, -2, -1, 1, 2, 3]))
            for low, high in ((1, 1), (1, 0), (0, 1)) if both else ((1, 1),):
                best.offer(
                    np.maximum(lo, best.lo * factors**low), np.minimum(hi, best.hi * factors**high)
                )
        return (best.lo, best.hi) if best.cost < 0.997 * whole else (lo, hi)


class PercentileObserver(_Histogram):
    """From the (100 - percentile)-th to the percentile-th percentile of all values, 0 included.

    percentile  in (50, 100]; 100 is the smallest and the largest value.

    Within a bin the values are taken as evenly spread, so an end is off by less than 1/128.
    """

    def __init__(self, percentile: float = 99.999) -> None:
        super().__init__()
        _check_number("PercentileObserver: percentile", percentile, 50, 100)
        self.percentile = percentile

    def _range(self) -> tuple[float, float]:
        bins = self.bins()
        until = np.cumsum(bins.counts)  # values up to a bin's end

        def at(share: float) -> float:
            i = min(int(np.searchsorted(until, share * until[-1])), len(until) - 1)
            into = 1 - (until[i] - share * until[-1]) / bins.counts[i]
            value = bins.edges[i, 0] + into * (bins.edges[i, 1] - bins.edges[i, 0])
            return float(np.clip(value, self.minimum, self.maximum))

        return at(1 - self.percentile / 100), at(self.percentile / 100)


class EntropyObserver(_Histogram):
    """The range whose uint8 grid loses the least information: the Kullback-Leibler divergence.

    The distribution of the non-zero values over 2048 bins, clipped values in the outermost, is
    compared with what is left of it when the bins of a step have the same weight. Both ends are
    cut at the same magnitude, down to 1/16 of the largest.

    Source: S. Migacz, 8-bit Inference with TensorRT, GTC 2017; here with the grid that
    choose_qparams gives, also for two signs.
    """

    def _range(self) -> tuple[float, float]:
        lo, hi = float(self.minimum), float(self.maximum)
        peak = max(-lo, hi)
        bins = self.bins().above(0)
        if not len(bins.counts):
            return lo, hi
        place = np.floor(bins.centers / peak * 2048)
        starts = np.flatnonzero(np.diff(place, prepend=-np.inf))
        counts = np.add.reduceat(bins.counts, starts).astype(np.float64)
        values = (place[starts] + 0.5) * (peak / 2048)
        best = _Best(lambda *grid: _divergence(values, counts, *grid), lo, hi)
        caps = peak * np.exp2(-np.arange(1, 65) / 16)
        best.offer(np.maximum(lo, -caps), np.minimum(hi, caps))
        return best.lo, best.hi


class _Best:
    """The range of least cost of those offered; of equals, the first.

    cost  of a grid's scale and zero point.
    """

    def __init__(self, cost: Callable[[float, float], float], lo: float, hi: float) -> None:
        self._cost = cost
        self.lo, self.hi, self.cost = lo, hi, float("inf")
        self.offer(np.array([lo]), np.array([hi]))

    def offer(self, lows: NDArray[np.float64], highs: NDArray[np.float64]) -> None:
        grids = choose_qparams(lows, highs, axis=0)
        for lo, hi, *grid in np.stack([lows, highs, grids.scale, grids.zero_point], 1).tolist():
            cost = self._cost(*grid)
            if cost < self.cost:
                self.lo, self.hi, self.cost = lo, hi, cost


def _squared_error(bins: Bins, scale: float, zero_point: float) -> float:
    """Sum of (x - dequantize(quantize(x)))**2 over the bins, each uniform over center +- half.

    In steps of the grid, with n the grid's nearest point, (x - n)**2 has the antiderivative
    n / 12 + (x - n)**3 / 3: continuous between the points, and right beyond the last one.
    """

    def antiderivative(x: NDArray[np.float64]) -> NDArray[np.float64]:
        n = np.minimum(np.maximum(np.rint(x), -zero_point), 255 - zero_point)
        r = x - n
        return n * (1 / 12) + r * r * r * (1 / 3)  # r**3 is many times slower

    x = bins.centers / scale
    # a point is given a width, lest the difference below be rounding errors alone
    half = np.maximum(bins.halves / scale, 1e-6 * np.abs(x))
    total = antiderivative(x + half) - antiderivative(x - half)
    return scale * scale * float((bins.counts * total / (2 * half)).sum())


def _divergence(
    values: NDArray[np.float64], counts: NDArray[np.float64], scale: float, zero_point: float
) -> float:
    """KL(P || Q): P is counts with clipped ones in the outermost bins, Q is flat in every step.

    values are ascending; infinite where the grid leaves nothing but clipped values.
    """
    n = np.rint(values / scale)
    first = np.searchsorted(n, -zero_point, "left")
    last = np.searchsorted(n, 255 - zero_point, "right")
    if first == last:
        return float("inf")
    p, kept = counts[first:last].copy(), counts[first:last]
    p[0] += counts[:first].sum()
    p[-1] += counts[last:].sum()
    starts = np.flatnonzero(np.diff(n[first:last], prepend=-np.inf))
    lengths = np.diff(starts, append=last - first)
    q = np.repeat(np.add.reduceat(kept, starts) / lengths, lengths)
    return float((p * np.log((p / p.sum()) / (q / q.sum()))).sum() / p.sum())


OBSERVERS: dict[str, Callable[[], Observer]] = {
    "minmax": MinMaxObserver,
    "moving_average": MovingAverageObserver,
    "histogram": HistogramObserver,
    "percentile": PercentileObserver,
    "entropy": EntropyObserver,
}

ObserverSpec = str | Callable[[], Observer]


def make_observer(spec: ObserverSpec) -> Observer:
    """A new observer: by name (a key of OBSERVERS), or what a class or function gives.

    make_observer("histogram"), make_observer(partial(PercentileObserver, 99.9)). Every layer needs
    one of its own, so an observer itself is refused: TypeError, as for anything else that cannot
    make one. ValueError for an unknown name.
    """
    if isinstance(spec, str):
        if spec not in OBSERVERS:
            raise ValueError(f"observer: {spec!r}; wanted one of {', '.join(OBSERVERS)}")
        return OBSERVERS[spec]()
    if isinstance(spec, Observer) and not isinstance(spec, type):
        raise TypeError(
            f"observer: got {spec!r}, which would be shared by all layers; wanted what makes one: "
            f"the class {type(spec).__name__}, or a function without arguments"
        )
    made: Any = spec() if callable(spec) else spec
    if not isinstance(made, Observer):
        source = f"{spec!r} made" if callable(spec) else "got"
        raise TypeError(
            f"observer: {source} {made!r}; wanted a name ({', '.join(OBSERVERS)}), or a class or "
            "function without arguments that gives an object with count, update, merge, qparams"
        )
    return made


def qparams_of(observer: Observer, layer: str) -> QParams:
    """What an observer, which may be a user's own, found: TypeError or ValueError unless it is
    uint8 QParams for all of a value. The layer is for the error."""
    found: Any = observer.qparams()
    known = isinstance(found, QParams)
    if not known or found.dtype != np.uint8 or found.axis is not None:
        given = f"{found.dtype} QParams with axis={found.axis}" if known else f"{found!r:.80}"
        raise (ValueError if known else TypeError)(
            f"observer: {type(observer).__name__} of '{layer}' gave {given}; wanted uint8 QParams "
            "without an axis, as fastq.choose_qparams(minimum, maximum) gives"
        )
    return found


def _check_number(what: str, value: Any, low: int, high: int) -> None:
    """TypeError or ValueError unless it is a number beyond low, up to high."""
    real = isinstance(value, Real)
    if not real or not low < value <= high:
        raise (ValueError if real else TypeError)(f"{what}={value!r}; wanted ({low}, {high}]")


def _float32(x: ArrayLike) -> NDArray[np.float32]:
    with np.errstate(over="ignore"):  # beyond float32: an infinity, which does not count
        return as_array("observer: x", x).astype(np.float32, copy=False)


def _finite_range(x: ArrayLike) -> tuple[int, np.float32, np.float32]:
    """How many finite values x has, the smallest and the largest; of none, inf and -inf."""
    values = _float32(x)
    with np.errstate(invalid="ignore"):
        lo, hi = values.min(initial=np.inf), values.max(initial=-np.inf)
    if not (np.isfinite(lo) and np.isfinite(hi)):
        values = values[np.isfinite(values)]
        lo, hi = values.min(initial=np.inf), values.max(initial=-np.inf)
    return values.size, lo, hi


def _check_kind(observer: Observer, other: object) -> None:
    if type(other) is not type(observer):
        raise TypeError(
            f"merge: got {type(other).__name__}, wanted a {type(observer).__name__}, as this one is"
        )


def _check_count(observer: Observer) -> None:
    if observer.count == 0:
        raise ValueError(
            f"{type(observer).__name__}: no finite value was seen, so there is no range; "
            "call update(x) with calibration data first"
        )
