"""Observers: exact merging, hand-worked ranges, and the error of the data itself as the judge."""

from __future__ import annotations

import functools
import pickle
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import fastq
from fastq import observer as room
from fastq.observer import (
    OBSERVERS,
    EntropyObserver,
    HistogramObserver,
    MinMaxObserver,
    MovingAverageObserver,
    Observer,
    PercentileObserver,
    make_observer,
)
from fastq.qparams import QParams, choose_qparams

FLOAT_MAX = np.finfo(np.float32).max
EXACT = [name for name in OBSERVERS if name != "moving_average"]

DATA: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "normal": lambda rng: rng.normal(size=20_000),
    "relu": lambda rng: np.maximum(rng.normal(size=20_000) - 1, 0),
    "relu6": lambda rng: np.clip(rng.normal(size=20_000) * 4, 0, 6),
    "laplace": lambda rng: rng.laplace(size=20_000) * 1e-3,
    "skewed": lambda rng: np.concatenate([-0.1 * rng.random(10_000), rng.exponential(size=10_000)]),
    "silu": lambda rng: (lambda v: v / (1 + np.exp(-v)))(rng.normal(size=20_000) * 3),
    "negative": lambda rng: -rng.gamma(2, size=20_000) * 1e4,
    "outlier": lambda rng: np.append(rng.normal(size=20_000), [40, -9]),
    "uniform": lambda rng: rng.random(20_000),
    "few": lambda rng: rng.normal(size=40),
}


def observed(*arrays: object, kind: Callable[[], Observer] = MinMaxObserver) -> Any:
    observer = kind()
    for array in arrays:
        observer.update(array)  # type: ignore[arg-type]
    return observer


def squared_error(x: np.ndarray, qparams: QParams) -> float:
    """Of the data, after quantize and dequantize."""
    args = float(qparams.scale), int(qparams.zero_point)
    back = fastq.dequantize(fastq.quantize(x, scale=args[0], zero_point=args[1]), *args)
    return float(((back.astype(np.float64) - x) ** 2).sum())


def test_the_range_is_that_of_all_arrays_and_any_shape() -> None:
    observer = observed(np.float32(3), [[1.0, -2.0]], np.full((2, 3, 4), 7, np.float32), [])
    assert (observer.minimum, observer.maximum, observer.count) == (-2, 7, 27)
    assert observer.qparams() == choose_qparams(-2, 7)


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_does_not_count(bad: float, kind: Any) -> None:
    observer = observed([bad, 1.0, -4.0, bad], [bad], kind=kind)
    assert (observer.minimum, observer.maximum, observer.count) == (-4, 1, 2)
    assert observer.qparams() == observed([1.0, -4.0], kind=kind).qparams()


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
def test_beyond_float32_is_infinite(kind: Any) -> None:
    observer = observed(np.array([1e300, -1e300, 2.0]), kind=kind)
    assert (observer.maximum, observer.count) == (2, 1)


@pytest.mark.parametrize("name", OBSERVERS)
@pytest.mark.parametrize(
    "values",
    [[FLOAT_MAX], [1e-45], [-1e-45, 1e-40], [FLOAT_MAX, 1e-45, 0], [-3.0, -2.0], [7.0], [-1e30, 1]],
    ids=str,
)
def test_extreme_values_keep_their_range(name: str, values: list[float]) -> None:
    kind = functools.partial(PercentileObserver, 100) if name == "percentile" else OBSERVERS[name]
    lo, hi = min(values), max(values)
    assert observed(np.array(values, np.float32), kind=kind).qparams() == choose_qparams(lo, hi)


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
def test_a_range_wider_than_float32_has_finite_qparams(kind: Any) -> None:
    assert np.isfinite(observed([-FLOAT_MAX, FLOAT_MAX], kind=kind).qparams().scale)


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
@pytest.mark.parametrize("arrays", [[], [[]], [[np.nan, np.inf]]], ids=["no", "empty", "nan"])
def test_without_a_finite_value_there_are_no_qparams(kind: Any, arrays: list[object]) -> None:
    with pytest.raises(ValueError, match=f"{kind.__name__}: no finite value"):
        observed(*arrays, kind=kind).qparams()


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
def test_zeros_alone_have_scale_one(kind: Any) -> None:
    assert observed(np.zeros(3), np.array([-0.0]), kind=kind).qparams() == QParams(np.float32(1))


@pytest.mark.parametrize("name", EXACT)
def test_order_and_division_do_not_matter(rng: np.random.Generator, name: str) -> None:
    x = np.concatenate([f(rng) for f in DATA.values()]).astype(np.float32)
    x[:4] = np.nan, np.inf, 0, 1e-42
    whole = observed(x, kind=OBSERVERS[name])
    for trial in range(3):
        parts = np.array_split(rng.permutation(x), rng.integers(2, 9))
        threads = fastq.get_num_threads()
        fastq.set_num_threads(1 + trial % threads)
        try:
            each = [observed(part[:9], part[9:], kind=OBSERVERS[name]) for part in parts]
        finally:
            fastq.set_num_threads(threads)
        merged = OBSERVERS[name]()
        for part in each:
            merged.merge(pickle.loads(pickle.dumps(part)))  # as from another process
        assert merged.count == whole.count == np.isfinite(x).sum()
        assert merged.qparams() == whole.qparams()
        if isinstance(merged, room._Histogram):
            assert_array_equal(merged._bins.sum(axis=0), whole._bins.sum(axis=0))
            assert (merged.minimum, merged.maximum) == (whole.minimum, whole.maximum)


def test_memory_does_not_grow_with_the_data(rng: np.random.Generator) -> None:
    def held(observer: Any) -> list[int]:
        values = vars(observer).values()
        return [v.nbytes if isinstance(v, np.ndarray) else sys.getsizeof(v) for v in values]

    for kind in OBSERVERS.values():
        observer = observed(rng.normal(size=9), kind=kind)
        before = held(observer)
        for _ in range(3):
            observer.update(rng.normal(size=10_000))
        assert held(observer) == before


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
def test_merging_another_kind_is_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match=f"got int, wanted a {kind.__name__}"):
        kind().merge(3)


@pytest.mark.parametrize("kind", OBSERVERS.values(), ids=OBSERVERS)
def test_strides_do_not_matter(rng: np.random.Generator, kind: Any) -> None:
    x = rng.normal(size=(2, 6, 5, 4)).astype(np.float32)
    want = observed(np.ascontiguousarray(x[:, ::2]), kind=kind).qparams()
    assert observed(x[:, ::2], kind=kind).qparams() == want
    assert observed(x[:, ::2].transpose(0, 2, 3, 1), kind=kind).qparams() == want


def test_moving_average_by_hand() -> None:
    observer = observed([], [-1.0, 2.0], [np.nan], [-3.0, 4.0],
                        kind=functools.partial(MovingAverageObserver, 0.5))  # fmt: skip
    assert (observer.minimum, observer.maximum, observer.count) == (-2, 3, 4)
    other = observed([1.0, 7.0], [1.0, 7.0], [1.0, 7.0], [1.0, 7.0], kind=MovingAverageObserver)
    observer.merge(MovingAverageObserver())
    observer.merge(other)  # 4 values against 8
    assert_allclose([observer.minimum, observer.maximum], [0, 17 / 3])
    assert observer.qparams() == choose_qparams(0, 17 / 3)
    with pytest.raises(ValueError, match=r"averaging_constant=0; wanted \(0, 1\]"):
        MovingAverageObserver(0)


def test_bins_by_hand() -> None:
    # an octave has 128 bins: 1.0 and 1.00390625 (half a bin on) share one, 6.0 begins its own
    bins = observed([1.0, 1.0 + 2.0**-8, 6.0, -2.0, 0.0, -0.0], kind=HistogramObserver).bins()
    assert bins.counts.tolist() == [1, 1, 1, 2, 1]
    assert bins.centers.tolist() == [-2, 0, 0, 1 + 2.0**-9, 6]
    assert bins.halves.tolist() == [0, 0, 0, 2.0**-9, 0]
    assert bins.edges[3].tolist() == [1, 1 + 2.0**-7]
    assert bins.edges[[0, 4]].tolist() == [[-2 - 2.0**-6, -2], [6, 6 + 2.0**-5]]
    assert bins.above(2).centers.tolist() == [6]
    last = observed([FLOAT_MAX], kind=HistogramObserver).bins()
    assert last.edges[0, 1] == 2.0**128


@pytest.mark.parametrize("name", DATA)
def test_bins_hold_the_data(rng: np.random.Generator, name: str) -> None:
    x = DATA[name](rng).astype(np.float32)
    bins = observed(x, kind=HistogramObserver).bins()
    assert (np.diff(bins.centers) >= 0).all() and (bins.halves >= 0).all()
    assert ((bins.edges[:, 0] <= bins.centers) & (bins.centers <= bins.edges[:, 1])).all()
    assert_allclose(bins.counts @ bins.centers, x.astype(np.float64).sum(), rtol=1e-9)
    for value in (0.0, float(np.median(x)), 0.3):
        until = bins.edges[:, 1] < value
        assert bins.counts[until].sum() <= (x < value).sum()
        assert bins.counts[bins.edges[:, 0] <= value].sum() >= (x <= value).sum()


@pytest.mark.parametrize("name", DATA)
def test_the_estimated_error_is_that_of_the_data(rng: np.random.Generator, name: str) -> None:
    x = DATA[name](rng).astype(np.float32)
    bins = observed(x, kind=HistogramObserver).bins().above(0)
    tolerance = 0.15 if name == "few" else 0.02
    for share in (1, 0.8, 0.5, 0.1):
        qparams = choose_qparams(min(x.min() * share, 0), max(x.max() * share, 0))
        want = squared_error(x, qparams)
        got = room._squared_error(bins, float(qparams.scale), int(qparams.zero_point))
        assert_allclose(got, want, rtol=tolerance)


@pytest.mark.parametrize("name", DATA)
def test_the_histogram_finds_the_least_error(rng: np.random.Generator, name: str) -> None:
    x = DATA[name](rng).astype(np.float32)
    found = squared_error(x, observed(x, kind=HistogramObserver).qparams())
    lo, hi = min(x.min(), 0), max(x.max(), 0)
    assert found <= squared_error(x, choose_qparams(lo, hi))
    shares = np.linspace(0.1, 1, 19)
    least = min(
        squared_error(x, choose_qparams(lo * low, hi * high))
        for low in (shares if lo < 0 else [1])
        for high in (shares if hi > 0 else [1])
    )
    assert found <= least * (1.5 if name == "few" else 1.03)


def test_a_heavy_tail_gains(rng: np.random.Generator) -> None:
    x = rng.laplace(size=200_000).astype(np.float32)
    found = observed(x, kind=HistogramObserver).qparams()
    assert squared_error(x, found) < squared_error(x, choose_qparams(x.min(), x.max())) / 1.15


@pytest.mark.parametrize("step", [1, 1 / 255, 1 / 128, 0.37])
def test_data_on_a_grid_keep_it(rng: np.random.Generator, step: float) -> None:
    dark = np.append(rng.geometric(0.05, 50_000).clip(1, 255) - 1, [0, 255])  # 255 is rare
    x = (dark * np.float32(step)).astype(np.float32)
    assert observed(x, kind=HistogramObserver).qparams() == choose_qparams(0, x.max())


@pytest.mark.parametrize("kind", [HistogramObserver, EntropyObserver])
def test_zeros_do_not_change_the_range(rng: np.random.Generator, kind: Any) -> None:
    x = np.maximum(rng.normal(size=20_000), 0)
    assert observed(x, np.zeros(10**6), kind=kind).qparams() == observed(x, kind=kind).qparams()


def test_percentiles_by_hand_and_of_numpy(rng: np.random.Generator) -> None:
    hundred = functools.partial(PercentileObserver, 99)
    observer = observed(np.arange(1.0, 101), -np.arange(1.0, 101), kind=hundred)
    # of 200 values, the 2 at either end: 99 and 100, whose bins are half a step wide
    assert observer.qparams() == choose_qparams(-98.5, 98.5)
    for name, f in DATA.items():
        x = f(rng)
        for p in (100, 99.9, 90):
            found = observed(x, kind=functools.partial(PercentileObserver, p)).qparams()
            lo, hi = np.percentile(x, [100 - p, p], method="inverted_cdf")
            if p == 100:
                assert found == choose_qparams(lo, hi), name
            want = max(hi, 0) - min(lo, 0)
            assert_allclose(float(found.scale) * 255, want, rtol=0.012, err_msg=name)
    for bad in (50, 101, np.nan):
        with pytest.raises(ValueError, match=rf"percentile={bad}; wanted \(50, 100\]"):
            PercentileObserver(bad)
    with pytest.raises(TypeError, match=r"percentile='a'; wanted \(50, 100\]"):
        PercentileObserver("a")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x is a MaskedArray; wanted an array"):
        PercentileObserver().update(np.ma.masked_array([1.0]))


def test_divergence_by_hand() -> None:
    values, counts = np.array([0.6, 1.0, 1.4, 2.0]), np.array([2.0, 1.0, 1.0, 4.0])
    # steps of 1 from 0 to 255: the first three share a step, so Q is (4/3, 4/3, 4/3, 4) / 8
    p, q = counts / 8, np.array([4 / 3, 4 / 3, 4 / 3, 4]) / 8
    assert_allclose(room._divergence(values, counts, 1.0, 0.0), (p * np.log(p / q)).sum())
    # 255 at the top: all but the first step is clipped, P is (2, 1, 5), Q (4/3, 4/3, 4/3)
    p, q = np.array([2, 1, 5]) / 8, np.ones(3) / 3
    assert_allclose(room._divergence(values, counts, 1.0, 254.0), (p * np.log(p / q)).sum())
    assert room._divergence(values, counts, 0.001, 0.0) == np.inf


def test_entropy_cuts_outliers_and_keeps_what_is_flat(rng: np.random.Generator) -> None:
    x = np.append(rng.normal(size=50_000), [30, -20]).astype(np.float32)
    found = observed(x, kind=EntropyObserver).qparams()
    assert 5 < float(found.scale) * 255 < 16
    flat = rng.random(50_000).astype(np.float32)
    assert observed(flat, kind=EntropyObserver).qparams() == choose_qparams(0, flat.max())


def test_a_users_own_class(rng: np.random.Generator) -> None:
    """The example in the room's docstring, as it stands there."""
    lines = (room.__doc__ or "").split("\n")
    first = lines.index("    class Symmetric:")
    code = textwrap.dedent("\n".join(lines[first : lines.index("", first)]))
    names: dict[str, Any] = {"fastq": fastq}
    exec(code, names)
    made = make_observer(names["Symmetric"])
    other = make_observer(names["Symmetric"])
    made.update(np.array([1.0, -3.0], np.float32))
    other.update(np.array([2.0], np.float32))
    made.merge(other)
    assert made.count == 3
    assert made.qparams() == choose_qparams(-3, 3)
    assert int(made.qparams().zero_point) == 128


def test_make_observer() -> None:
    for name, kind in OBSERVERS.items():
        assert type(make_observer(name)) is kind
        assert type(make_observer(kind)) is kind
    made: Any = make_observer(functools.partial(PercentileObserver, 99))
    assert made.percentile == 99
    with pytest.raises(ValueError, match="'kl'; wanted one of minmax, moving_average, histogram"):
        make_observer("kl")
    with pytest.raises(TypeError, match=r"shared by all layers; .* class MinMaxObserver"):
        make_observer(MinMaxObserver())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"got 3; wanted a name .* count, update, merge, qparams"):
        make_observer(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"'list'> made \[\]; wanted"):
        make_observer(list)  # type: ignore[arg-type]
